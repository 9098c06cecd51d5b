"""Who computes which tile, of several workers that see one folder: each its share, then what nobody is at.

There is no coordinator and no barrier: whoever lacks a tile waits for it, or computes it when its worker is dead.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from headwater.errors import BatchMismatch, InvalidSetting
from headwater.gradients.together import Together
from headwater.loaders.keys import REMEDY
from headwater.run.runners.environment import Worker, worker_of
from headwater.store.claims import Claims

POLL = 0.2
"""Seconds between two looks for what others compute."""
TRIES = 3
"""Times that a worker computes a tile again which another one overwrites."""


def check_worker(worker: Worker, store: object, together: Together | None = None) -> tuple[int, int]:
    """`worker_of` it. together: the processes that hold the model. Errors: InvalidSetting for what means nothing,
    for several workers without a folder to meet in, and for several of one model that they hold together.
    """
    number, count = worker_of(worker)
    if together is not None and count > 1:
        raise InvalidSetting(
            f"worker is {(number, count)}, and the model is spread over processes (FSDP2), which go through it "
            "together: none can leave rows to another. Leave worker= out; each computes and returns everything."
        )
    if count > 1 and store is None:
        raise InvalidSetting(f"worker is {(number, count)}, and workers meet in a folder: give store=.")
    return number, count


@dataclass(frozen=True)
class Turn:
    """A tile of a pass: its name, and a digest of what it is computed from."""

    name: str
    rows: str


Wanted = Callable[[int, str], bool]
"""Whether to compute a tile, by its number and its name."""
Visit = Callable[[Wanted], tuple[list[Turn], list[int]]]
"""Reads all rows once, and computes what is wanted and nobody else is at: all tiles, and which were computed."""


def take_turns(
    visit: Visit,
    is_known: Callable[[str], bool],
    is_there: Callable[[int, Turn], bool],
    claims: Claims,
    worker: tuple[int, int],
    path: str | os.PathLike[str],
) -> list[Turn]:
    """All tiles, once each of them is there. is_known: whether there is something of that name, right or not.

    Errors: BatchMismatch for rows that are others each time.
    """
    tiles, computed = visit(lambda number, name: number % worker[1] == worker[0] and not is_known(name))
    tries, missing = Counter(computed), set(range(len(tiles)))
    while missing := {number for number in missing if not is_there(number, tiles[number])}:
        if max(tries.values(), default=0) > TRIES:
            raise BatchMismatch(f"{path}: another worker reads other rows than this one. {REMEDY}")
        if not any(claims.is_free(tiles[number].name) for number in missing):
            time.sleep(POLL)
            continue
        again, computed = visit(lambda number, _: number in missing and not is_there(number, tiles[number]))
        if again != tiles:  # rows with ids may come in any order
            raise BatchMismatch(f"The loader gives its rows in another order each time: tiles need one. {REMEDY}")
        tries.update(computed)
    claims.remove_free(tile.name for tile in tiles)
    return tiles
