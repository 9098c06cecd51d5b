"""A gradient whose matrices are cut into three rectangles, each of a kind of its own.

Layout, of a matrix [o, i] cut behind row k and column l:

    rows 0..k      | top [k, i]                     |
    rows k..o      | side [o - k, l] | rest [o - k, i - l] |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from headwater.arrays import Array, namespace
from headwater.gradients.algebra import Dense, Gradient


@dataclass(frozen=True, eq=False)
class Tiled(Gradient):
    """top [n, k, i], side [n, o - k, l], rest [n, o - k, i - l]; two that are cut alike meet tile by tile."""

    top: Gradient
    side: Gradient
    rest: Gradient

    @property
    def tiles(self) -> tuple[Gradient, Gradient, Gradient]:
        return self.top, self.side, self.rest

    @property
    def rows(self) -> int:
        return self.top.rows

    @property
    def shape(self) -> tuple[int, int]:
        return self.top.shape[0] + self.side.shape[0], self.top.shape[1]

    @property
    def arrays(self) -> tuple[Array, ...]:
        return tuple(array for tile in self.tiles for array in tile.arrays)

    @property
    def cut(self) -> tuple[int, int]:
        """Rows above, and columns left of, the rest."""
        return self.top.shape[0], self.side.shape[1]

    def dense(self) -> Array:
        return self._assembled([tile.dense() for tile in self.tiles])

    def take(self, index: slice | Array) -> Self:
        return type(self)(*(tile.take(index) for tile in self.tiles))

    def weighted(self, weights: Array) -> Tiled:
        return Tiled(*(tile.weighted(weights) for tile in self.tiles))

    def cheapest_form(self, positions: int) -> Gradient:
        return Tiled(*(tile.cheapest_form(positions) for tile in self.tiles))

    def inner(self, other: Gradient) -> Array:
        if not isinstance(other, Tiled) or other.shape != self.shape or other.cut != self.cut:
            return Dense(self.dense()).inner(other)
        scores = self.rest.inner(other.rest)
        for mine, theirs in ((self.top, other.top), (self.side, other.side)):
            if 0 not in mine.shape:
                scores += mine.inner(theirs)  # in place, where the framework can: it is of this call alone
        return scores

    def combine(self, weights: Array) -> Array:
        return self._assembled([tile.combine(weights) for tile in self.tiles])

    def _assembled(self, tiles: Sequence[Array]) -> Array:
        xp, (top, side, rest) = namespace(*tiles), tiles
        return xp.concat([top, xp.concat([side, rest], axis=2)], axis=1)
