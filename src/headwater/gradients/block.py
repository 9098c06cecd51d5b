"""The per-sample gradients of one block: its parts side by side, and the same numbers as flat vectors."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self, TypeGuard

from headwater.arrays import Array, namespace, rows_within_memory, summed
from headwater.blocks import Layout
from headwater.gradients.algebra import Dense, Gradient
from headwater.gradients.outer import Outer, RowSparse
from headwater.gradients.tiled import Tiled


@dataclass(frozen=True, eq=False)
class BlockGradient:
    """n per-sample gradients of a block: one gradient value for each part of the layout."""

    layout: Layout
    parts: tuple[Gradient, ...]

    @classmethod
    def from_flat(cls, layout: Layout, flat: Array) -> BlockGradient:
        """Flat vectors (n, D), in the block's parameter order."""
        return cls(layout, tuple(Dense(values) for values in layout.split(flat)))

    @property
    def rows(self) -> int:
        return self.parts[0].rows

    @property
    def like(self) -> Array:
        """Some array of the value: its framework, dtype and device."""
        return self.parts[0].arrays[0]

    def flat(self) -> Array:
        """(n, D), in the block's parameter order."""
        return self.layout.merge([part.dense() for part in self.parts])

    def take(self, index: slice | Array) -> BlockGradient:
        return BlockGradient(self.layout, tuple(part.take(index) for part in self.parts))

    def weighted(self, weights: Array) -> BlockGradient:
        return BlockGradient(self.layout, tuple(part.weighted(weights) for part in self.parts))

    def cheapest_form(self, partner: BlockGradient) -> BlockGradient:
        """In the form that meets many gradients like `partner` at the least cost."""
        positions = [1 if part.positions is None else part.positions for part in partner.parts]
        if len(self.parts) < len(positions):  # only what stands beside the gradient, not the gradient itself
            positions = []
        positions += [1] * (len(self.parts) - len(positions))  # what stands beside the gradient itself
        return BlockGradient(self.layout, tuple(p.cheapest_form(t) for p, t in zip(self.parts, positions, strict=True)))

    def at_one_position(self) -> Self:
        """Sums over several positions made dense; what has one position, or none, as it is."""
        several = (part.positions is not None and part.positions > 1 for part in self.parts)
        parts = zip(self.parts, several, strict=True)
        return replace(self, parts=tuple(Dense(p.dense()) if many else p for p, many in parts))

    def inner(self, other: BlockGradient) -> Array:
        """All pairs of dot products: [n, m]."""
        return summed(mine.inner(theirs) for mine, theirs in zip(self.parts, other.parts, strict=True))

    def project(self, flat: Array) -> Array:
        """Dot products with flat vectors (K, D): [n, K]."""
        return summed(part.project(basis) for part, basis in zip(self.parts, self.layout.split(flat), strict=True))

    def combine(self, weights: Array) -> Array:
        """Weighted sums over rows, weights [k, n], as flat vectors: (k, D)."""
        return self.layout.merge([part.combine(weights) for part in self.parts])

    def total(self, share: float) -> Self:
        """The sum of the rows times `share`, as one dense row."""
        weights = namespace(self.like).ones_like(self.parts[0].arrays[0].reshape((self.rows, -1))[:, :1]).T * share
        return replace(self, parts=tuple(Dense(part.combine(weights)) for part in self.parts))

    def squared_norms(self) -> Array:
        """[n]."""
        return summed(part.quadratic() for part in self.parts)

    def flat_chunks(self) -> list[Array]:
        """`flat` in pieces that fit into the working memory."""
        step = rows_within_memory(2 * self.layout.size, self.like)
        return [self.take(slice(start, start + step)).flat() for start in range(0, self.rows, step)]


def rows_in_blocks(
    layouts: Mapping[str, Layout], rows: Sequence[Mapping[str, Array]], weights: Array | None = None
) -> OrderedDict[str, BlockGradient]:
    """Gradients of single rows, by the name of the parameter, as dense blocks; times each row's weight [n] if given."""
    blocks: OrderedDict[str, BlockGradient] = OrderedDict()
    for name, layout in layouts.items():
        names = [p.name for p in layout.block.parameters]
        xp = namespace(rows[0][names[0]])
        flat = xp.stack([xp.concat([row[n].reshape((-1,)) for n in names], axis=0) for row in rows], axis=0)
        value = BlockGradient.from_flat(layout, flat)
        blocks[name] = value if weights is None else value.weighted(weights)
    return blocks


def stack(values: Sequence[BlockGradient]) -> BlockGradient:
    """Rows of several values of one block under one another."""
    first = values[0]
    if len(values) == 1:
        return first
    parts = tuple(_stack_parts([value.parts[k] for value in values]) for k in range(len(first.parts)))
    return BlockGradient(first.layout, parts)


def _stack_parts(parts: Sequence[Gradient]) -> Gradient:
    """Same kind and same number of positions: the factors are stacked; else everything is made dense."""
    xp, first = namespace(*[part.arrays[0] for part in parts]), parts[0]

    def rows(arrays: Sequence[Array]) -> Array:
        return xp.concat(list(arrays), axis=0)

    outers = [part for part in parts if _like_outer(part, first)]
    if isinstance(first, Outer) and len(outers) == len(parts):
        return Outer(rows([p.a for p in outers]), rows([p.b for p in outers]), first.ones)
    tables = [part for part in parts if _like_table(part, first)]
    if isinstance(first, RowSparse) and len(tables) == len(parts):
        return RowSparse(rows([p.ids for p in tables]), rows([p.values for p in tables]), first.size)
    tiled = [part for part in parts if _like_tiled(part, first)]
    if isinstance(first, Tiled) and len(tiled) == len(parts):
        return Tiled(*(_stack_parts(tiles) for tiles in zip(*(part.tiles for part in tiled), strict=True)))
    return Dense(rows([part.dense() for part in parts]))


def _like_tiled(part: Gradient, first: Gradient) -> TypeGuard[Tiled]:
    return isinstance(first, Tiled) and isinstance(part, Tiled) and part.cut == first.cut


def _like_table(part: Gradient, first: Gradient) -> TypeGuard[RowSparse]:
    return isinstance(first, RowSparse) and isinstance(part, RowSparse) and part.ids.shape[1] == first.ids.shape[1]


def _like_outer(part: Gradient, first: Gradient) -> TypeGuard[Outer]:
    return (
        isinstance(first, Outer)
        and isinstance(part, Outer)
        and part.positions == first.positions
        and part.ones == first.ones
    )
