"""How large the tiles of a run are: from the number of queries, and from a budget of memory where there is one.

A budget is what the process may hold in all. What it holds already is taken off; of the rest, a quarter goes to the
queries' factors, a quarter to a tile of scores, and a quarter to a piece of train rows, which is measured on the first.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from headwater.arrays import itemsize, working_memory, working_memory_limit
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
WIDTH = 8
"""Bytes of a score at most."""
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
    budget: int | None,
    factor: float,
) -> Sizes:
    """numbers: of one score (blocks, or values of an input). factor: bytes of one query's factors.

    Errors: InvalidSetting for a budget that is too small.
    """
    # Rows of a store of gradients go through no model.
    first = None if isinstance(loader, Rows) and loader.is_kept else first_batch(provider, loader)
    rows = ROWS if first is None else min(ROWS, max(FEWEST, _round(PIECES * provider.rows_at_once(first))))
    queries, chunk, working = query_rows, float(CHUNK), None
    if budget is not None:
        room = agreed(provider, budget - resident_memory())
        if room < LEAST:
            raise InvalidSetting(
                f"memory={budget} ({budget / 2**20:.0f} MiB) is too little: the process holds "
                f"{(budget - room) / 2**20:.0f} MiB already, and needs {LEAST / 2**20:.0f} MiB more at least."
            )
        queries = min(query_rows, max(1, int(room / 4 / (FORMS * factor))))
        working = None if first is None else _working(provider, first, room / 4)
        chunk = min(chunk, room / 4 / COPIES)
    # Of that many rows at least, if the queries can be fewer.
    queries = max(1, min(queries, int(chunk / (numbers * WIDTH * min(FEWEST, rows)))))
    if numbers * WIDTH > chunk:
        raise InvalidSetting(
            f"One pair of rows takes {numbers * WIDTH / 2**20:.0f} MiB of scores, more than a tile may: give more "
            "memory."
        )
    fitting = int(chunk / (queries * numbers * WIDTH))
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
    return agreed(provider, working if taken <= room else max(2**20, int(working * room / taken)))


def agreed(provider: StructuredGradientProvider, number: int) -> int:
    """What this process measured; of processes that hold the model together, the smallest that one of them did."""
    return number if provider.together is None else provider.together.least(number)


def plan(
    influence: ComposableInfluence,
    train: Rows,
    query: Rows,
    *,
    by_block: bool,
    memory: int | float | str | None,
) -> Plan:
    """See `Attributor.plan`."""
    budget, queries, numbers = budget_of(memory), query.count(), len(influence.block_names) if by_block else 1
    sizes = tile_sizes(influence.provider, train, queries, numbers, budget, factor_bytes(influence))
    return Plan(train.count(), queries, sizes, FIT_ROWS, budget)


def factor_bytes(influence: ComposableInfluence) -> int:
    """Of one query: of the forms that its factors may be kept in the largest, as the run decides which is cheaper."""
    return influence.n_parameters * itemsize(influence.like())


def budget_of(memory: int | float | str | None) -> int | None:
    """Errors: InvalidSetting."""
    return None if memory is None else bytes_of(memory)


def _round(rows: float) -> int:
    """Down to a multiple of the fewest; 0 below that."""
    return math.floor(rows / FEWEST) * FEWEST
