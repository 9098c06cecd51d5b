"""Projections of a block's gradients to few numbers.

Layout: a projection maps the D numbers of a block to K numbers, which are a block of their own: its layout `small` has
one part [1, K], or one part [k_o, k_i] for each part of the block. Example: at 16 numbers a side `Linear(64, 32)` has
one small part [16, 16], and K is 256.

Random numbers come from named streams of `headwater.random`, named after parameters, so that a parameter is projected
alike whatever block it is in, on every device, and for every K that is large enough.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeGuard

import numpy as np

from headwater.arrays import Array, as_like, itemsize, namespace, rows_within_memory, transpose, zeros_like
from headwater.blocks import Block, Layout, Parameter, Part, Piece
from headwater.gradients.algebra import Dense, Gradient, Sum, multiply_left, multiply_right
from headwater.gradients.block import BlockGradient
from headwater.gradients.outer import Outer, RowSparse
from headwater.random import normals, signs, words

HELD = 256 * 2**20
"""Bytes of random numbers that one block's projection keeps; what takes more is drawn again for each batch."""


class ProjectedGradient(BlockGradient):
    """Projected rows of a block: small, and already in the form in which they meet."""

    def cheapest_form(self, partner: BlockGradient) -> BlockGradient:
        return self

    def take(self, index: slice | Array) -> ProjectedGradient:
        return ProjectedGradient(self.layout, super().take(index).parts)

    def weighted(self, weights: Array) -> ProjectedGradient:
        return ProjectedGradient(self.layout, super().weighted(weights).parts)


class Projection(ABC):
    """A linear map P of a block's gradients, from D numbers to K."""

    def __init__(self, layout: Layout, shapes: Sequence[tuple[int, int]]):
        self.layout = layout
        self.small = small_layout(layout.block.name, shapes)

    @abstractmethod
    def values(self, parts: Sequence[Gradient]) -> tuple[Gradient, ...]:
        """The small parts of a block's parts."""

    @abstractmethod
    def up(self, flat: Array) -> Array:
        """P^T: (..., K) to (..., D)."""

    def apply_block(self, value: BlockGradient) -> ProjectedGradient:
        """P g of every row; of rows that were projected before, themselves."""
        if self.has_projected(value):
            return value
        if value.layout != self.layout:
            value = BlockGradient.from_flat(self.layout, value.flat())
        return ProjectedGradient(self.small, self.values(value.parts))

    def down(self, flat: Array) -> Array:
        """P: (..., D) to (..., K)."""
        if 0 in flat.shape:
            return zeros_like(flat, (*flat.shape[:-1], self.small.size))
        value = BlockGradient.from_flat(self.layout, flat.reshape((-1, self.layout.size)))
        return self.apply_block(value).flat().reshape((*flat.shape[:-1], self.small.size))

    def stored(self, value: BlockGradient) -> ProjectedGradient:
        """What is kept of rows: their projection."""
        return self.apply_block(value)

    def seen(self, value: BlockGradient) -> BlockGradient:
        """Rows whose projection is what is kept of these rows."""
        return value

    def has_projected(self, value: BlockGradient) -> TypeGuard[ProjectedGradient]:
        """Whether rows are in the small space already, as they are where they were kept."""
        return isinstance(value, ProjectedGradient) and value.layout == self.small


def small_layout(name: str, shapes: Sequence[tuple[int, int]]) -> Layout:
    """A block with one plain matrix for each shape."""
    parameters = tuple(Parameter(f"{name}/projected.{k}", shape) for k, shape in enumerate(shapes))
    parts = tuple(Part(Piece(p.name, 0, shape)) for p, shape in zip(parameters, shapes, strict=True))
    return Layout(Block(name, parameters), parts)


# Random signs, over the whole block -----------------------------------------------------------------------------------


class RandomProjection(Projection):
    """Random signs over sqrt(K): each projected number is a signed sum of all of the block's numbers.

    `dense`: a sign of its own for each parameter and projected number; n K D multiply-adds for n rows. Otherwise a
    weight with o output rows shares each of its signs among m = `mixing(o)` projected numbers, through m other signs
    for each output row: P_(r m + k),(o, i) = S_r,(o, i) T_k,o / sqrt(K). Inner products are as unbiased as before, m
    times cheaper, and their variance, 1 / K for dense signs, is (1 + (m - 1) c) / K, with c the share of pairs of
    numbers that are in the same output row: about one over the number of output rows where a gradient lives.
    """

    def __init__(self, layout: Layout, dimension: int, *, seed: int, like: Array, dense: bool = False):
        super().__init__(layout, [(1, dimension)])
        self.dimension, self.seed, self.like, self.dense = dimension, seed, like, dense
        sizes = {p.name: p.shape[0] if p.shape else 1 for p in layout.block.parameters}
        self._mixing = [1 if dense else mixing(sizes[part.weight.parameter]) for part in layout.parts]

    def values(self, parts: Sequence[Gradient]) -> tuple[Gradient, ...]:
        total = zeros_like(parts[0].arrays[0], (parts[0].rows, self.dimension))
        for k, part in enumerate(parts):
            for rows, numbers in self._pieces(k):
                # Signs in memory: the gradient is taken as it is, without cutting its rows.
                whole = rows == slice(0, part.shape[0])
                # Repeats are rounded up to whole groups of m: what goes beyond K is cut off.
                total += numbers.project(part if whole else _output_rows(part, rows))[:, : self.dimension]
        # 1 / sqrt(K) makes <P g, P h> right on average (Johnson and Lindenstrauss 1984).
        return (Dense((total * self.dimension**-0.5)[:, None, :]),)

    def up(self, flat: Array) -> Array:
        small = flat.reshape((-1, self.dimension)) * self.dimension**-0.5
        xp, found = namespace(small), []
        for k in range(len(self.layout.parts)):
            found.append(xp.concat([numbers.lift(small) for _, numbers in self._pieces(k)], axis=1))
        return self.layout.merge(found).reshape((*flat.shape[:-1], self.layout.size))

    def _pieces(self, part: int) -> Iterator[tuple[slice, PartSigns]]:
        """The signs of a part, output rows by output rows."""
        if part in self._kept:
            yield slice(0, self.layout.parts[part].shape[0]), self._kept[part]
            return
        o, i = self.layout.parts[part].shape
        step = rows_within_memory(self._repeats(part) * i, self.like)
        # Parameters one below the other are rows of their own streams; a cut through them would need both.
        step = o if self.layout.parts[part].below else min(step, o)
        for start in range(0, o, step):
            rows = slice(start, min(start + step, o))
            yield rows, self._draw(part, rows)

    @cached_property
    def _kept(self) -> dict[int, PartSigns]:
        """The signs of all parts, if there is room for them."""
        numbers = sum(self._repeats(k) * part.size for k, part in enumerate(self.layout.parts))
        # All or none: a part that is drawn again for each batch costs as much as its product.
        if numbers * itemsize(self.like) > HELD:
            return {}
        return {k: self._draw(k, slice(0, part.shape[0])) for k, part in enumerate(self.layout.parts)}

    def _repeats(self, part: int) -> int:
        return -(-self.dimension // self._mixing[part])

    def _draw(self, part: int, rows: slice) -> PartSigns:
        repeats, mix = self._repeats(part), self._mixing[part]
        numbers = part_signs(self.layout.parts[part], rows, repeats, self.seed)
        shared = None if mix == 1 else as_like(mixing_signs(self.layout.parts[part], rows, mix, self.seed), self.like)
        return PartSigns(as_like(numbers, self.like), shared)


def mixing(output_rows: int) -> int:
    """How many projected numbers share a sign: a power of two, a sixteenth of the output rows, at most 16."""
    # A power of two, so that K's usual sizes divide; at most a sixteenth of the rows, so that variance stays near 1 /
    # K.
    m = 1
    while m < 16 and 32 * m <= output_rows:
        m *= 2
    return m


def part_signs(part: Part, rows: slice, repeats: int, seed: int) -> np.ndarray:
    """Signs of some rows of a part, each parameter's from the stream of its name: int8 [repeats, rows, i]."""

    # By the parameter's name and its own positions: any block structure, and any cut into pieces, draws the same signs.
    def cut(piece: Piece, start: int, stop: int) -> np.ndarray:
        i = piece.shape[1]
        columns = range(piece.start + start * i, piece.start + stop * i)
        return signs(piece.parameter, range(repeats), columns, seed=seed).reshape(repeats, stop - start, i)

    if part.below:
        return np.concatenate([cut(piece, 0, piece.shape[0]) for piece in part.pieces], axis=1)
    return np.concatenate([cut(piece, rows.start, rows.stop) for piece in part.pieces], axis=2)


def mixing_signs(part: Part, rows: slice, mix: int, seed: int) -> np.ndarray:
    """The signs that output rows have in the numbers that share: int8 [rows, mix]; one stream for each module."""

    def cut(piece: Piece, start: int, stop: int) -> np.ndarray:
        first = piece.start // piece.shape[1]
        columns = range(first + start, first + stop)
        return signs(f"{_owner(piece)} mixed", range(mix), columns, seed=seed).T

    if part.below:
        return np.concatenate([cut(piece, 0, piece.shape[0]) for piece in part.pieces])
    return cut(part.weight, rows.start, rows.stop)


def _owner(piece: Piece) -> str:
    return Parameter(piece.parameter, ()).owner


@dataclass(frozen=True, eq=False)
class PartSigns:
    """Signs of a part: `numbers` [r, o, i]; and `shared` [o, m], or None for m = 1."""

    numbers: Array
    shared: Array | None

    def project(self, value: Gradient) -> Array:
        """sum_oi numbers_roi shared_om G_oi of each row: [n, r m]."""
        if self.shared is None:
            return value.project(self.numbers)
        if isinstance(value, Sum):
            # Linear in the gradient: a sum's projection is the sum of its terms', each in its own cheapest form.
            found = [self.project(term) for term in value.terms]
            return sum(found[1:], found[0])
        r, o, i = self.numbers.shape
        if isinstance(value, RowSparse):
            # `width` is how many numbers a row needs on the way: rows are cut so that they fit into the working memory.
            along, width = self._along_sparse, r * int(value.ids.shape[1]) * i
        elif isinstance(value, Outer) and value.positions == 1:
            along, width = self._along_outer, r * o + i
        else:
            along, width = self._along_dense, r * o + 2 * o * i
        out = [along(piece) for _, piece in value.chunks(width)]
        return (
            namespace(*out).concat(out, axis=0) if out else zeros_like(value.arrays[0], (0, r * self.shared.shape[1]))
        )

    def _along_outer(self, value: Any) -> Array:
        """b_o sum_i numbers_roi a_i, then mixed over o: one product of the inputs with all the signs."""
        full, (r, o, i) = value.bordered(), self.numbers.shape
        turned = (full.a[:, 0] @ transpose(self.numbers.reshape((r * o, i)))).reshape((-1, r, o))
        # In place: [n, r, o] is the largest array here.
        turned *= full.b
        return self._mixed(turned)

    def _along_dense(self, value: Gradient) -> Array:
        xp = namespace(self.numbers)
        # Output row by output row, as one batched product over o.
        rows = xp.permute_dims(value.dense(), (1, 0, 2)) @ xp.permute_dims(self.numbers, (1, 2, 0))
        return self._mixed(xp.permute_dims(rows, (1, 2, 0)))

    def _along_sparse(self, value: Any) -> Array:
        xp, (n, t), i = namespace(self.numbers), value.ids.shape, int(value.values.shape[2])
        ids = value.ids.reshape((-1,))
        # Only rows of the embedding that occur: the signs of the others meet zeros.
        own = xp.take(self.numbers, ids, axis=1).reshape((-1, n, t, i))
        along = xp.permute_dims(xp.sum(own * value.values[None], axis=3), (1, 0, 2))
        return (along @ xp.take(self.shared, ids, axis=0).reshape((n, t, -1))).reshape((n, -1))

    def _mixed(self, turned: Array) -> Array:
        """[n, r, o] to [n, r m]."""
        assert self.shared is not None
        n, r, o = turned.shape
        return (turned.reshape((n * r, o)) @ self.shared).reshape((n, r * int(self.shared.shape[1])))

    def lift(self, small: Array) -> Array:
        """The transposed map: [n, K] to [n, o, i]; K may stop short of r m."""
        xp, (r, o, i), n = namespace(small), self.numbers.shape, int(small.shape[0])
        if self.shared is None:
            return (small @ self.numbers.reshape((r, o * i))).reshape((n, o, i))
        m = int(self.shared.shape[1])
        # K need not be a multiple of m; the numbers that are missing are zero.
        full = xp.concat([small, zeros_like(small, (n, r * m - int(small.shape[1])))], axis=1)
        turned = (full.reshape((n * r, m)) @ transpose(self.shared)).reshape((n, r, o))
        rows = xp.permute_dims(turned, (2, 0, 1)) @ xp.permute_dims(self.numbers, (1, 0, 2))
        return xp.permute_dims(rows, (1, 0, 2))


def _output_rows(value: Gradient, rows: slice) -> Gradient:
    """Some of the rows of every matrix [o, i]."""
    if isinstance(value, Sum):
        return Sum(tuple(_output_rows(term, rows) for term in value.terms))
    if isinstance(value, Outer):
        return Outer(value.a, value.b[:, :, rows], value.ones)
    if isinstance(value, RowSparse):
        xp, inside = namespace(value.values), (value.ids >= rows.start) & (value.ids < rows.stop)
        # A row outside keeps a valid index (0) and loses its values, as shapes must not depend on data.
        ids = xp.where(inside, value.ids - rows.start, xp.zeros_like(value.ids))
        values = value.values * xp.astype(inside, value.values.dtype)[:, :, None]
        return RowSparse(ids, values, rows.stop - rows.start)
    return Dense(value.dense()[:, rows])


# Each side of each part -----------------------------------------------------------------------------------------------

Side = Array | None
"""[k, o] or [k, i]; None for the identity."""


class KroneckerProjection(Projection):
    """G to L G R^T for each part, with L [k_o, o] and R [k_i, i]; outer products are projected before they are formed.

    Costs for each row and position: k_o o + k_i i + k_o k_i multiply-adds.
    """

    def __init__(self, layout: Layout, sides: Sequence[tuple[Side, Side]]):
        shapes = [
            (_height(left, part.shape[0]), _height(right, part.shape[1]))
            for (left, right), part in zip(sides, layout.parts, strict=True)
        ]
        super().__init__(layout, shapes)
        self.sides = tuple(sides)

    def values(self, parts: Sequence[Gradient]) -> tuple[Gradient, ...]:
        return tuple(Dense(part.dense()) for part in self.squeezed(parts))

    def squeezed(self, parts: Sequence[Gradient]) -> list[Gradient]:
        """The small parts, outer products still as such."""
        return [squeeze(part, *sides) for part, sides in zip(parts, self.sides, strict=True)]

    def up(self, flat: Array) -> Array:
        small = self.small.split(flat.reshape((-1, self.small.size)))
        found = [
            multiply_right(multiply_left(_transposed(left), values), _transposed(right))
            for values, (left, right) in zip(small, self.sides, strict=True)
        ]
        return self.layout.merge(found).reshape((*flat.shape[:-1], self.layout.size))


def _height(side: Side, size: int) -> int:
    return size if side is None else int(side.shape[0])


def _transposed(side: Side) -> Side:
    return None if side is None else transpose(side)


def squeeze(value: Gradient, left: Side, right: Side) -> Gradient:
    """L G R^T; on the factors of outer products, as the result is small."""
    if isinstance(value, Sum):
        terms = [squeeze(term, left, right).dense() for term in value.terms]
        return Dense(sum(terms[1:], terms[0]))
    if isinstance(value, Outer):
        if right is None:
            return Outer(value.a, multiply_right(value.b, left), value.ones)
        # The column of ones is not kept in `a`: its share is the last column of R, added to every position.
        a = multiply_right(value.a, right[:, :-1] if value.ones else right)
        return Outer(a + right[:, -1] if value.ones else a, multiply_right(value.b, left))
    if isinstance(value, RowSparse) and left is not None:
        (n, t), columns = value.ids.shape, transpose(left)
        # L times a one-hot column is a column of L: taken, not multiplied.
        b = namespace(columns).take(columns, value.ids.reshape((-1,)), axis=0).reshape((n, t, -1))
        return Outer(multiply_right(value.values, right), b)
    return value.sandwich(left, right)


class LowRankProjection(KroneckerProjection):
    """A Kronecker projection of which each row keeps, for each part, only the best approximation of this rank.

    Rows are kept as outer products of that many positions: rank (k_o + k_i) numbers in place of k_o k_i. The map itself
    is linear; `stored` and `seen` are not.
    """

    def __init__(self, layout: Layout, sides: Sequence[tuple[Side, Side]], rank: int):
        super().__init__(layout, sides)
        self.rank = rank

    def values(self, parts: Sequence[Gradient]) -> tuple[Gradient, ...]:
        return tuple(part if self._is_short(part) else Dense(part.dense()) for part in self.squeezed(parts))

    def stored(self, value: BlockGradient) -> ProjectedGradient:
        if self.has_projected(value):
            return value
        whole = self.apply_block(value)
        return ProjectedGradient(self.small, tuple(self._cut(part) for part in whole.parts))

    def seen(self, value: BlockGradient) -> BlockGradient:
        """Gradients in the full space, of outer products where something was cut, that are projected to `stored`."""
        if self.has_projected(value):
            return value
        small = self.apply_block(value)
        aligned = value if value.layout == self.layout else BlockGradient.from_flat(self.layout, value.flat())
        parts = [
            whole if self._is_short(part) else self._lifted(self._cut(part), k)
            for k, (whole, part) in enumerate(zip(aligned.parts, small.parts, strict=True))
        ]
        return BlockGradient(self.layout, tuple(parts))

    def _is_short(self, part: Gradient) -> bool:
        """Whether no row of it can have a larger rank."""
        positions = part.positions if isinstance(part, Outer) else min(part.shape)
        return min(positions, *part.shape) <= self.rank

    def _cut(self, part: Gradient) -> Gradient:
        if self._is_short(part):
            return part
        # Eckart and Young 1936: the leading singular triples are the best approximation of that rank.
        u, s, v = namespace(part.arrays[0]).linalg.svd(part.dense(), full_matrices=False)
        return Outer(v[:, : self.rank], transpose(u[:, :, : self.rank] * s[:, None, : self.rank]))

    def _lifted(self, small: Gradient, part: int) -> Gradient:
        left, right = self._lifts[part]
        return small.sandwich(left, right)

    @cached_property
    def _lifts(self) -> list[tuple[Side, Side]]:
        """Right inverses of the sides: L L+ = I."""
        # With L L+ = I, projecting what was lifted gives back what was kept.
        return [(_right_inverse(left), _right_inverse(right)) for left, right in self.sides]


def _right_inverse(side: Side) -> Side:
    return None if side is None else namespace(side).linalg.pinv(side)


# The sides themselves -------------------------------------------------------------------------------------------------

Stream = tuple[str, range]
"""The name of a random stream, and which of its numbers."""


def row_streams(part: Part) -> list[Stream]:
    """Which random numbers belong to the output rows of a part: its module's, and for rows below their parameter's."""
    first, o = part.weight.start // part.weight.shape[1], part.weight.shape[0]
    found = [(f"{_owner(part.weight)} rows", range(first, first + o))]
    if part.below and part.bias is not None:
        found.append((f"{part.bias.parameter} rows", range(part.bias.shape[0])))
    return found


def column_streams(part: Part) -> list[Stream]:
    """Which random numbers belong to the input columns of a part: its weight's, and its bias's for the last column."""
    found = [(f"{part.weight.parameter} columns", range(part.weight.shape[1]))]
    if part.bias is not None and not part.below:
        found.append((f"{part.bias.parameter} columns", range(1)))
    return found


def gaussian_side(streams: Sequence[Stream], size: int, *, seed: int) -> np.ndarray | None:
    """Normal numbers over sqrt(size), so that L^T L is the identity on average: [size, o]; None if it is no smaller."""
    # No smaller than the side itself: the identity is exact and costs nothing.
    if size >= sum(len(rows) for _, rows in streams):
        return None
    drawn = [normals(name, rows, size, seed=seed) for name, rows in streams]
    return np.ascontiguousarray(np.concatenate(drawn).T) * size**-0.5


def sparse_side(streams: Sequence[Stream], size: int, mask: int | None, *, seed: int) -> np.ndarray | None:
    """A mask and a sparse sketch: every kept coordinate goes, with a random sign, to one of `size` places: [size, o].

    mask: how many coordinates are kept, at random, scaled by sqrt(o / mask) so that L^T L is the identity on average;
    None for all. No more places than kept coordinates: these stand by themselves then. None if nothing is changed.
    """
    drawn = np.concatenate([words(name, rows, seed=seed) for name, rows in streams]).astype(np.uint64)
    total = len(drawn)
    kept = total if mask is None else min(mask, total)
    if min(kept, size) == total:
        return None
    # A random order by 64-bit keys: the first `kept` are a sample without replacement, the same on every machine.
    order = np.argsort((drawn[:, 2] << np.uint64(32)) | drawn[:, 3], kind="stable")[:kept]
    side = np.zeros((min(size, kept), total))
    if size >= kept:
        side[np.arange(kept), np.sort(order)] = (total / kept) ** 0.5
        return side
    # A uniform place in [0, size) by multiply and shift: unlike a modulo, without a bias towards small ones.
    places = (drawn[order, 0] * np.uint64(size)) >> np.uint64(32)
    side[places.astype(np.int64), order] = (2.0 * (drawn[order, 1] & np.uint64(1)) - 1.0) * (total / kept) ** 0.5
    return side


Make = Callable[[str, BlockGradient], Projection]
"""A block's projection, from its name and the first gradients that were seen of it."""
