"""The matrix of a finished run, which stays on disk: tiles are read when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from headwater.errors import DamagedFile, NotSaved
from headwater.store.plan import spans
from headwater.store.seal import open_arrays, unsealed
from headwater.store.tiles import AGAIN, FINISHED, TileFolder, chunk_file, read_chunk

Columns = Iterator[tuple[slice, np.ndarray]]
"""Which train columns, and their scores: [query, n, ...]."""


class StoredMatrix:
    """Scores [query, train, ...] of a finished run, on disk; block: its number, None for the sum of all."""

    def __init__(self, folder: TileFolder, query_rows: int, columns: np.ndarray, rows: int, block: int | None = None):
        self.folder, self.columns, self.rows, self.block = folder, columns, rows, block
        first = folder.line(0, 0)
        if first is None:
            raise DamagedFile(f"{folder.path}: the first tile is gone. {AGAIN}")
        self.shape: tuple[int, ...] = (query_rows, len(columns), *first["shape"][3:])
        self.dtype = np.dtype(first["dtype"]).newbyteorder("=")

    def tiles(self, queries: slice | np.ndarray | None = None) -> Columns:
        """Some train columns after the other: which of them, and their scores [queries, n, ...]."""
        wanted = np.arange(self.shape[0])[slice(None) if queries is None else queries]
        done = 0
        for number, span in enumerate(spans(self.rows, self.folder.sizes.rows)):
            first, last = np.searchsorted(self.columns, span)
            if first < last:
                kept = self.columns[first:last] - span.start
                found = self._tile(number, wanted)
                yield slice(done, done + len(kept)), found if len(kept) == span.stop - span.start else found[:, kept]
                done += len(kept)

    def column(self, row: int) -> np.ndarray:
        """Of one train row, the row-th of those that are shown: [query, ...]. Reads its own tiles, one after the other.

        Errors: DamagedFile, naming the file.
        """
        number, place = divmod(int(self.columns[row]), self.folder.sizes.rows)
        tiles = range(-(-self.shape[0] // self.folder.sizes.queries))
        # A copy of each: a view would keep the whole tile in memory.
        return np.concatenate([self._chunk(number, each)[:, place].copy() for each in tiles])

    def _tile(self, number: int, wanted: np.ndarray) -> np.ndarray:
        """[wanted, rows of the tile, ...]. Errors: DamagedFile, naming the file."""
        parts, step = [], self.folder.sizes.queries
        for each in range(-(-self.shape[0] // step)):
            mine = wanted[(wanted // step) == each] - each * step
            if len(mine):
                parts.append(self._chunk(number, each)[mine])
        if not parts:
            return self._chunk(number, 0)[:0]
        found = parts[0] if len(parts) == 1 else np.concatenate(parts)
        if len(parts) > 1 and (np.diff(wanted) < 0).any():  # put back in the order that was asked for
            back = np.empty(len(wanted), dtype=np.intp)
            back[np.argsort(wanted // step, kind="stable")] = np.arange(len(wanted))
            found = found[back]
        return found

    def _chunk(self, number: int, queries: int) -> np.ndarray:
        line = self.folder.line(number, queries)
        file = chunk_file(self.folder.path, number, queries, len(self.shape) + 1)
        if line is None:
            raise DamagedFile(f"{file} is missing, or is not what was written. {AGAIN}")
        found = read_chunk(file, line)
        if self.block is not None:
            return found[self.block]
        return found.sum(axis=0) if len(found) > 1 else found[0]

    def read(self, queries: slice | np.ndarray | None = None) -> np.ndarray:
        """In memory: [queries, train, ...]."""
        count = len(np.arange(self.shape[0])[slice(None) if queries is None else queries])
        found = np.empty((count, *self.shape[1:]), self.dtype)
        for columns, tile in self.tiles(queries):
            found[:, columns] = tile
        return found


class BlockShares(Mapping[str, np.ndarray]):
    """Each block's share, read when it is asked for."""

    def __init__(self, shares: Mapping[str, StoredMatrix]):
        self._shares = shares

    def __getitem__(self, name: str) -> np.ndarray:
        return self._shares[name].read()

    def tiles(self, name: str) -> Columns:
        """One block's share, in pieces."""
        return self._shares[name].tiles()

    def __iter__(self) -> Iterator[str]:
        return iter(self._shares)

    def __len__(self) -> int:
        return len(self._shares)


def meaning_of(folder: TileFolder) -> dict[str, Any]:
    """What the scores of a finished run mean. Errors: NotSaved for one that is not finished; DamagedFile."""
    if not (folder.path / FINISHED).is_file():
        raise NotSaved(
            f"The run in {folder.path} is not finished ({folder.complete()} tiles are there). Make the call that began "
            "it again: it goes on."
        )
    meaning, _ = unsealed(folder.path / FINISHED, remedy=AGAIN)
    return meaning


def deleted_rows(path: Path, belongs: str) -> np.ndarray:
    """Positions of rows that are no longer shown: int64, sorted. Errors: DamagedFile."""
    file = path / "deleted.npz"
    if not file.exists():
        return np.empty(0, dtype=np.int64)
    return open_arrays(file, f"{belongs}/deleted", "Delete the rows again.")["rows"]
