"""Where the scores of a run go, tile by tile."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np

from headwater.errors import InvalidInput


@dataclass(frozen=True, eq=False)
class Tile:
    """Scores of some queries on some train rows."""

    start: int
    """Position, in the train loader, of the first row."""
    ids: np.ndarray
    """What the rows are called: [n]."""
    keys: np.ndarray | None
    """Of the rows' content, uint64 [n]; None where no sink needs them."""
    scores: np.ndarray
    """[block, q, n, ...], in the run's unit."""
    queries: int = 0
    """Position, among the query rows, of the first query."""


class Sink(ABC):
    """Takes the tiles of a run in any order, each once."""

    @abstractmethod
    def write(self, tile: Tile) -> None: ...


class MemorySink(Sink):
    """All scores, in memory."""

    def __init__(self) -> None:
        self._tiles: dict[tuple[int, int], np.ndarray] = {}

    def write(self, tile: Tile) -> None:
        self._tiles[tile.queries, tile.start] = tile.scores

    def scores(self) -> np.ndarray:
        """[block, q, n, ...], in the loader's order; the sink is empty then. Errors: InvalidInput if there are none."""
        if not self._tiles:
            raise InvalidInput("There is no tile of scores yet.")
        last = self._tiles[max(self._tiles)]
        queries, rows = (at + size for at, size in zip(max(self._tiles), last.shape[1:3], strict=True))
        found = np.empty((len(last), queries, rows, *last.shape[3:]), last.dtype)
        for query, start in sorted(self._tiles):  # tiles go as they are copied, so that the matrix is held once
            tile = self._tiles.pop((query, start))
            found[:, query : query + tile.shape[1], start : start + tile.shape[2]] = tile
        return found
