"""A folder of processes that hold one model together: each tile is computed by all, and written by the first.

1. Which tiles are there is the same answer on all processes, since none may leave a forward pass to the others: of sums
   of a fit all are asked, as each reads them; of scores the first is, and says it to the others.
2. So there is nothing to claim and nobody to wait for: the runners of `shared.py` and `tiles.py` do the same on all, by
   what these stores answer.
3. What the first cannot write, or refuses, is raised on all of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from headwater.errors import InvalidInput, NotSaved
from headwater.gradients.together import Together
from headwater.store.base import Tile
from headwater.store.claims import Claims
from headwater.store.draft import remove_dead
from headwater.store.ledger import Line
from headwater.store.parts import PartStore, Values
from headwater.store.plan import Sizes
from headwater.store.tiles import PLAN, TileFolder, TileStore, Where

NOT_SEEN = (
    "{} is not there, or is another run, on one of the {} processes that hold the model together, though the first has "
    "written it. Choose a folder that all of them see."
)


class PartsInStep(PartStore):
    """Parts that are there once all processes see them."""

    def __init__(self, path: str | os.PathLike[str], identity: Mapping[str, Any], together: Together):
        super().__init__(path, identity)
        self._together = together
        self.claims = NoClaims(self.path)

    def has(self, name: str) -> bool:
        return self._together.all_say(super().has(name))

    def read(self, name: str, rows: str) -> dict[str, Any] | None:
        found = super().read(name, rows)
        return found if self._together.all_say(found is not None) else None

    def write(self, name: str, rows: str, values: Values) -> None:
        def write() -> None:
            PartStore.write(self, name, rows, values)  # super() knows no class in here
            # No claim is there to say that its writer has died.
            remove_dead(self._file(name).parent)

        self._together.first_does(write)


def open_parts(path: str | os.PathLike[str], identity: Mapping[str, Any], together: Together | None) -> PartStore:
    """A folder of parts, of this process or of those that hold the model together."""
    return PartStore(path, identity) if together is None else PartsInStep(path, identity, together)


class NoClaims(Claims):
    """All compute what is missing: everything is theirs, and nothing is another's."""

    def claim(self, name: str) -> bool:
        return True

    def is_free(self, name: str) -> bool:
        return True

    def touch(self, name: str) -> None:
        pass

    def release(self, name: str) -> None:
        pass


class TilesInStep:
    """A run's tiles: the first process has the `TileStore`, the others what it says and a folder to read from.

    Errors: as `TileStore`, on all; NotSaved where a process does not see the folder.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        identity: Mapping[str, Any],
        sizes: Callable[[], Sizes],
        tolerance: float,
        together: Together,
    ):
        self._together, self.tolerance, folder = together, tolerance, Path(path)
        # Sizes are measured with the model: on all of them, or on none.
        planned = together.first_does(lambda: (folder / PLAN).exists())
        measured = None if planned else sizes()
        # The first's own; others read, and write nothing.
        self._store: TileStore | None = None

        def opened() -> str:
            self._store = TileStore(folder, identity, sizes if measured is None else lambda: measured, tolerance)
            return self._store.run

        run, found = together.first_does(opened), self._store
        reader: TileFolder | None = found
        if reader is None:
            with suppress(NotSaved, InvalidInput, OSError):
                reader = TileFolder(folder)
        if not together.all_say(reader is not None and reader.run == run) or reader is None:
            raise NotSaved(NOT_SEEN.format(folder, together.count))
        self._reader, self.path, self.sizes = reader, reader.path, reader.sizes
        self.claims: Claims = NoClaims(self.path)

    @property
    def _first(self) -> TileStore:
        """Of process 0 alone, which is the one that acts."""
        assert self._store is not None
        return self._store

    # What the first says ----------------------------------------------------------------------------------------------

    @property
    def finished_rows(self) -> int | None:
        return self._together.first_does(lambda: self._first.finished_rows)

    def line(self, number: int, queries: int) -> Line | None:
        return self._together.first_does(lambda: self._first.line(number, queries))

    def whole_line(self, number: int, queries: int) -> Line | None:
        return self._together.first_does(lambda: self._first.whole_line(number, queries))

    # What each reads: to say what is wrong with its rows, and what an earlier call has added up -----------------------

    def rows(self, number: int) -> dict[str, np.ndarray] | None:
        return self._reader.rows(number)

    def read_sums(self) -> Iterator[tuple[set[Where], dict[str, np.ndarray]]]:
        return self._reader.read_sums()

    def other_rows(self, start: int, stop: int) -> InvalidInput:
        return self._reader.other_rows(start, stop)

    # What the first writes --------------------------------------------------------------------------------------------

    def probe(self, keys: np.ndarray, scores: np.ndarray, tolerance: float | None = None) -> None:
        self._together.first_does(lambda: self._first.probe(keys, scores, tolerance))

    def write(self, tile: Tile) -> None:
        self._together.first_does(lambda: self._first.write(tile))

    def write_rows(self, number: int, ids: np.ndarray, keys: np.ndarray) -> str:
        return self._together.first_does(lambda: self._first.write_rows(number, ids, keys))

    def write_sums(self, writer: str, tiles: set[Where], sums: Mapping[str, np.ndarray]) -> None:
        """Without the others, who may think that it is not yet time for it."""
        if self._together.number == 0:
            self._first.write_sums(writer, tiles, sums)

    def reopen(self) -> None:
        self._together.first_does(lambda: self._first.reopen())

    def finish(
        self, query_ids: np.ndarray, train_ids: np.ndarray, blocks: list[str], meaning: Mapping[str, Any]
    ) -> None:
        self._together.first_does(lambda: self._first.finish(query_ids, train_ids, blocks, meaning))
