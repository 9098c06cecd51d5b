"""How large the tiles of a run are: from the number of queries, and from a budget of memory where there is one.

A budget is what the process may hold in all. What it holds already is taken off; of the rest, a quarter goes to the
queries' factors, a quarter to a tile of scores, and a quarter to a piece of train rows, which is measured on the first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from headwater.arrays import working_memory, working_memory_limit
from headwater.errors import InvalidSetting
from headwater.gradients.provider import StructuredGradientProvider
from headwater.influence import ComposableInfluence
from headwater.memory import peak_memory, resident_memory
from headwater.rows import Rows, first_batch
from headwater.run.runners.shared import ROWS as FIT_ROWS
from headwater.settings import bytes_of
from headwater.store.plan import Plan, Sizes

ROWS = 4096
"""Train rows of a tile at most."""
FEWEST = 64
"""Train rows of a tile at least."""
CHUNK = 64 * 2**20
"""Bytes of a tile at most."""
PIECES = 8
"""Of a tile of rows that a provider takes only few of at once: what is lost with a process that is killed."""
LEAST = 64 * 2**20
"""Bytes below which nothing can be planned."""
COPIES = 5
"""Of a tile that is being written: its pieces, the tile, its padded chunk, and the bytes of that, twice."""
FORMS = 3
"""Of a query's factors, while they are made: the gradient, its image and the form that is kept."""


def tile_sizes(
    provider: StructuredGradientProvider,
    loader: Iterable[object],
    query_rows: int,
    numbers: int,
    itemsize: int,
    budget: int | None,
    factor_bytes: Callable[[], float],
) -> Sizes:
    """numbers: of one score (blocks, or values of an input). factor_bytes: of one query, measured when asked for.

    Errors: InvalidSetting for a budget that is too small.
    """
    # Rows of a store of gradients go through no model.
    first = None if isinstance(loader, Rows) and loader.is_kept else first_batch(provider, loader)
    rows = ROWS if first is None else min(ROWS, max(FEWEST, _round(PIECES * provider.rows_at_once(first))))
    queries, chunk, working = query_rows, float(CHUNK), None
    if budget is not None:
        room = budget - resident_memory()
        if room < LEAST:
            raise InvalidSetting(
                f"memory={budget} ({budget / 2**20:.0f} MiB) is too little: the process holds "
                f"{resident_memory() / 2**20:.0f} MiB already, and needs {LEAST / 2**20:.0f} MiB more at least."
            )
        queries = min(query_rows, max(1, int(room / 4 / (FORMS * factor_bytes()))))
        working = None if first is None else _working(provider, first, room / 4)
        chunk = min(chunk, room / 4 / COPIES)
    # Of that many rows at least, if the queries can be fewer.
    queries = max(1, min(queries, int(chunk / (numbers * itemsize * min(FEWEST, rows)))))
    if numbers * itemsize > chunk:
        raise InvalidSetting(
            f"One pair of rows takes {numbers * itemsize / 2**20:.0f} MiB of scores, more than a tile may: give more "
            "memory."
        )
    fitting = int(chunk / (queries * numbers * itemsize))
    return Sizes(max(1, min(rows, _round(fitting) or fitting)), queries, working)


def _working(provider: StructuredGradientProvider, first: object, room: float) -> int:
    """Bytes of gradients at once, for which the peak of what a pass holds stays within the room."""
    working = min(working_memory_limit(), int(room / 4))
    with working_memory(working):
        batch = first.take(slice(0, provider.rows_at_once(first)))  # type: ignore[attr-defined]
        before = resident_memory()
        with peak_memory() as peak:
            provider.grads(batch)
            taken = max(peak() - before, 0)
    return working if taken <= room else max(2**20, int(working * room / taken))


def plan(
    influence: ComposableInfluence,
    train: Rows,
    query: Rows,
    *,
    by_block: bool,
    memory: int | float | str | None,
) -> Plan:
    """See `Attributor.plan`."""
    budget, first = budget_of(memory), first_batch(influence.provider, query)
    queries = query.count()
    # Parameters in all: the most that the factors of one query take, whatever form they are kept in.
    numbers, size = len(influence.block_names) if by_block else 1, influence.n_parameters
    itemsize = int(next(iter(influence.provider.grads(first.take(slice(0, 1))).values())).like.dtype.itemsize)
    sizes = tile_sizes(influence.provider, train, queries, numbers, 8, budget, lambda: float(size * itemsize))
    return Plan(train.count(), queries, sizes, FIT_ROWS, budget)


def budget_of(memory: int | float | str | None) -> int | None:
    """Errors: InvalidSetting."""
    return None if memory is None else bytes_of(memory)


def _round(rows: float) -> int:
    """Down to a multiple of the fewest; 0 below that."""
    return math.floor(rows / FEWEST) * FEWEST
