"""Where the scores of a run go, tile by tile."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np

from headwater.errors import InvalidInput


@dataclass(frozen=True, eq=False)
class Tile:
    """Scores of all queries on some train rows."""

    start: int
    """Position, in the train loader, of the first row."""
    ids: np.ndarray
    """What the rows are called: [n]."""
    keys: np.ndarray | None
    """Of the rows' content, uint64 [n]; None where no sink needs them."""
    scores: np.ndarray
    """[block, q, n], in the run's unit."""


class Sink(ABC):
    """Takes the tiles of a run in any order, each once."""

    @property
    def needs_keys(self) -> bool:
        """Whether tiles have to come with the keys of their rows."""
        return False

    def read(self, start: int, keys: np.ndarray) -> np.ndarray | None:
        """The scores [block, q, n] of the train rows from `start` on, if they are here from an earlier call."""
        return None

    @abstractmethod
    def write(self, tile: Tile) -> None: ...


class MemorySink(Sink):
    """All scores, in memory."""

    def __init__(self) -> None:
        self._tiles: dict[int, np.ndarray] = {}

    def write(self, tile: Tile) -> None:
        self._tiles[tile.start] = tile.scores

    def scores(self) -> np.ndarray:
        """[block, q, n], in the loader's order; the sink is empty then. Errors: InvalidInput if there are none."""
        if not self._tiles:
            raise InvalidInput("There is no tile of scores yet.")
        first = next(iter(self._tiles.values()))
        found = np.empty((*first.shape[:2], sum(tile.shape[2] for tile in self._tiles.values())), first.dtype)
        for start in sorted(self._tiles):  # tiles go as they are copied, so that the matrix is held once
            tile = self._tiles.pop(start)
            found[..., start : start + tile.shape[2]] = tile
        return found
