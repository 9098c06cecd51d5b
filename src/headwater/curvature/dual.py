"""Curvature that is a sum of g g^T over rows, inverted through the rows: no D x D and no N x D array.

With Phi the gradients [m, D] of all rows and draws (each times the root of its row's weight), W the rows' total weight:

    C = Phi^T Phi / W,   (C + damping)^-1 v = (v - Phi^T (W damping I + Phi Phi^T)^-1 Phi v) / damping

The Gram matrix Phi Phi^T [m, m] is made of ghost products. DataInf swaps the mean over rows with the inverse, and needs
no Gram matrix at all.

Sources: Woodbury 1950; Kwon et al. 2024, arXiv 2310.00902 (DataInf).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from headwater.arrays import (
    Array,
    as_like,
    identity,
    is_torch,
    namespace,
    precise,
    put_rows,
    transpose,
    zeros_like,
)
from headwater.curvature.exact import Curvature
from headwater.curvature.products import CurvatureOperator, DrawnRows, fit_products, room_for_draws, size_of
from headwater.errors import BatchMismatch, InvalidSetting, SingularOperator
from headwater.gradients.algebra import Dense
from headwater.gradients.block import BlockGradient, stack
from headwater.gradients.draws import DrawsProduct, are_single_products, principal, squared_norms
from headwater.gradients.provider import Fisher, StructuredGradientProvider
from headwater.memory import refuse_too_large
from headwater.operators.algebra import LinearOperator, rowwise_inner
from headwater.operators.finite import refuse_nonfinite
from headwater.operators.iterative import host
from headwater.rows import Accumulator, Each, Found, Item, Part, Visitor

LARGEST_GRAM = 20_000
"""Gradients beyond which a Gram matrix is refused: 1.6 GB in float32, and hours to factorise."""


class RowSumOperator(LinearOperator):
    """A curvature that is the mean over rows of g g^T, by products; its inverse is a sum over rows too."""

    symmetric = psd = True

    def __init__(self, curvature: CurvatureOperator, rows: float, *, by_axes: bool = False):
        """by_axes: take a row's gradients along their principal axes: the same sum, most of it in the fewest."""
        self.curvature, self.rows, self.by_axes = curvature, rows, by_axes

    @property
    def input_size(self) -> int:
        return self.curvature.input_size

    def _apply(self, tensor: Array) -> Array:
        return self.curvature.apply(tensor)

    def adjoint(self) -> LinearOperator:
        return self

    def trace(self) -> float:
        return self.curvature.trace()

    def inner_operators(self) -> tuple[LinearOperator, ...]:
        return (self.curvature,)

    def spectrum_bounds(self) -> tuple[float, float] | None:
        return self.curvature.spectrum_bounds()

    @property
    def label(self) -> str:
        return self.curvature.block

    def sweep(self, visitor: Visitor[DrawnRows, Part, Found]) -> Found:
        """Visit every batch with its draws."""
        return self.curvature.source.sweep(visitor, with_draws=True)

    def each(self, make: Callable[[DrawnRows], Found]) -> list[Found]:
        """What a function makes of each batch."""
        return self.sweep(Each(make))

    def product(self, vectors: Array) -> DrawsProduct:
        return DrawsProduct(self.curvature.source.provider.layouts[self.label], vectors)

    def draws(self, rows: DrawnRows) -> list[BlockGradient]:
        """Errors: InvalidSetting for rows that have none."""
        if rows.draws is None:
            raise InvalidSetting(
                f"Block {self.label!r}: a row's GGN is no short sum of g g^T here (many outputs, or a loss that "
                "is not convex in them). Use curvature='empirical_fisher' or 'fisher', or hw.Cg()."
            )
        found = [draw[self.label] for draw in rows.draws]
        if not self.by_axes:
            return found
        if self.label not in rows.principal:
            rows.principal[self.label] = principal(found)
        return rows.principal[self.label]

    @property
    def is_kept(self) -> bool:
        """Whether passes read the rows' gradients from memory."""
        return self.curvature.source.is_kept

    def along(self, value: BlockGradient) -> Array:
        """Dot products of a block's gradients with Phi, every draw times the root of its row's weight: [n, m]."""
        # Roots of the weights on Phi alone: Phi^T Phi then has the weights, and Phi Phi^T stays symmetric.
        found = self.each(lambda rows: value.inner(stack([rooted(draw, rows) for draw in self.draws(rows)])))
        return namespace(*found).concat(found, axis=1)


class InverseThroughRows(LinearOperator, ABC):
    """(I - Phi^T S Phi) / damping, for the gradients Phi [m, D] of all rows and a matrix S over them."""

    symmetric = psd = True

    def __init__(self, curvature: RowSumOperator, damping: float):
        if not damping > 0:
            raise SingularOperator(f"A sum over rows is singular; its inverse needs damping above 0, got {damping:g}.")
        self.curvature, self.damping = curvature, damping

    @property
    def input_size(self) -> int:
        return self.curvature.input_size

    @abstractmethod
    def solve(self, along: Array) -> Array:
        """S times vectors over the rows: (q, m)."""

    def _meets_along_rows(self, value: BlockGradient) -> bool:
        """Whether a gradient is cheaper to meet along the rows than as D numbers: ghost products, rows at hand."""
        # With several positions a ghost product costs their square; and without rows in memory each meeting is a pass.
        return self.curvature.is_kept and are_single_products(value)

    def block_sides(self, queries: BlockGradient, train_per_query: float) -> tuple[LinearOperator, LinearOperator]:
        """Gradients that are one outer product meet as they are, and along the m fitted ones; nothing has D numbers."""
        if not self._meets_along_rows(queries):
            return super().block_sides(queries, train_per_query)
        # <(C + d)^-1 g, h> = (<g, h> - (Phi g)^T S (Phi h)) / d: two small products, S on one side only.
        return AlongRows(self, solved=True), AlongRows(self, solved=False)

    def quadratic(self, value: BlockGradient) -> Array:
        if not self._meets_along_rows(value):
            return super().quadratic(value)
        along = self.curvature.along(value)
        return (value.squared_norms() - rowwise_inner(self.solve(along), along)) / self.damping

    def adjoint(self) -> LinearOperator:
        return self

    def trace(self) -> float:
        """Errors: NotImplementedError; use `dense`."""
        raise NotImplementedError("The trace of an inverse through the rows needs its matrix: use dense().")


class AlongRows(LinearOperator):
    """A gradient, and beside it, as one part more, its dot products with the m fitted gradients.

    <x, y> / damping - Phi x S Phi y / damping: the query's side brings the damping and S. It takes whole blocks.
    """

    def __init__(self, inverse: InverseThroughRows, solved: bool):
        self.through, self.solved = inverse, solved

    @property
    def input_size(self) -> int:
        return self.through.input_size

    def _apply(self, tensor: Array) -> Array:
        """Errors: NotImplementedError: what stands beside a gradient has no place in its D numbers."""
        raise NotImplementedError("Gradients are met along rows as blocks: use apply_block.")

    def adjoint(self) -> LinearOperator:
        """Errors: NotImplementedError."""
        raise NotImplementedError("A gradient beside its dot products has no adjoint within the block.")

    def trace(self) -> float:
        """Errors: NotImplementedError."""
        raise NotImplementedError("A gradient beside its dot products has no trace.")

    def apply_block(self, value: BlockGradient) -> BlockGradient:
        along = self.through.curvature.along(value)
        parts = value.parts
        if self.solved:
            # The minus of Woodbury's correction rides on the query's extra part.
            along = self.through.solve(along) * (-1.0 / self.through.damping)
            # Weighted row by row, so that the parts stay outer products.
            each = namespace(along).ones_like(along[:, 0]) * (1.0 / self.through.damping)
            parts = value.weighted(each).parts
        return BlockGradient(value.layout, (*parts, Dense(along[:, None, :])))


class SwappedInverse(InverseThroughRows):
    """The mean over rows of (damping I + g g^T)^-1: DataInf. S is diagonal: 1 / (damping + |g|^2) for each row, / W."""

    def solve(self, along: Array) -> Array:
        return along * self._shares

    @cached_property
    def _shares(self) -> Array:
        # Sherman and Morrison for one row: (d I + g g^T)^-1 = (I - g g^T / (d + |g|^2)) / d (Kwon et al. 2024).
        found = self.curvature.each(lambda rows: 1.0 / (self.damping + squared_norms(self.curvature.draws(rows))))
        shares = namespace(*found).concat(found, axis=0) / self.curvature.rows
        return refuse_nonfinite(shares, f"Block {self.curvature.label!r}: what the rows' gradients count")

    def _apply(self, tensor: Array) -> Array:
        vectors = tensor.reshape((-1, self.input_size))
        total = self.curvature.sweep(_ShrunkProduct(self.curvature, vectors, self.damping))
        return ((vectors - total / self.curvature.rows) / self.damping).reshape(tensor.shape)


class _RowProduct(Accumulator[Item, DrawsProduct, Array]):
    """A sum over rows of vectors (Q, D) along their gradients: (Q, D)."""

    def merge(self, one: DrawsProduct, other: DrawsProduct) -> DrawsProduct:
        one.include(other)
        return one

    def finish(self, whole: DrawsProduct) -> Array:
        return whole.value


@dataclass(frozen=True, eq=False)
class _ShrunkProduct(_RowProduct[DrawnRows]):
    """The sum over rows of g <g, v> / (damping + |g|^2)."""

    curvature: RowSumOperator
    vectors: Array
    damping: float

    def start(self) -> DrawsProduct:
        return self.curvature.product(self.vectors)

    def add(self, whole: DrawsProduct, item: DrawnRows) -> DrawsProduct:
        draws = self.curvature.draws(item)
        shrink = 1.0 / (self.damping + squared_norms(draws))
        whole.add(draws, shrink if item.weights is None else shrink * item.weights)
        return whole


@dataclass(frozen=True, eq=False)
class RowNorms:
    """How long the gradients of all rows are, and which rows these are."""

    keys: np.ndarray
    """The rows' content keys, in the loader's order: uint64 [n]."""
    squares: np.ndarray
    """Squared norms, each times its row's weight: [n, draws]."""

    @classmethod
    def of(cls, curvature: RowSumOperator) -> RowNorms:
        """Read all rows once."""
        provider = curvature.curvature.source.provider

        def seen(rows: DrawnRows) -> tuple[np.ndarray, np.ndarray]:
            each = [host(rooted(draw, rows).squared_norms()) for draw in curvature.draws(rows)]
            return provider.content_keys(rows.batch), np.stack(each, axis=1)

        # Norms alone in this pass: which gradients are kept is known only after the last row.
        keys, squares = zip(*curvature.each(seen), strict=True)
        return cls(np.concatenate(keys), np.concatenate(squares))

    def heaviest(self, share: float, most: int | None = None) -> np.ndarray:
        """Positions of the largest that make up a share of the sum, `most` at most; largest first."""
        flat = self.squares.reshape(-1)
        # Stable: of gradients of one length the first rows are kept, whatever the machine.
        order = np.argsort(-flat, kind="stable")
        if share == 1.0:
            return order[:most]
        # The trace is the sum of squared norms: the heaviest rows hold most of it where norms are uneven.
        held = np.cumsum(flat[order])
        count = int(np.searchsorted(held, share * held[-1])) + 1
        return order[: min(count, most or count)]

    def held(self, kept: np.ndarray) -> HeldRows:
        """Rows, of which the gradients at some positions, in order, are kept."""
        return HeldRows(self.keys, kept, int(self.squares.shape[1]))


@dataclass(frozen=True, eq=False)
class HeldRows:
    """Which rows a dual form is made of, and which of their gradients."""

    keys: np.ndarray
    """The rows' content keys, in the loader's order: uint64 [n]."""
    kept: np.ndarray
    """Positions [m] of the kept gradients, counted row by row and within a row draw by draw."""
    draws_per_row: int
    gram: Array | None = None
    """Phi Phi^T [m, m], once it is known."""


class DualOperator(RowSumOperator):
    """A sum over rows whose Gram matrix is known: its damped inverse is exact.

    held: which of its gradients are kept. What is inverted is then the part of the curvature that they make up: a
    preconditioner for the whole.
    """

    def __init__(self, curvature: CurvatureOperator, rows: float, held: HeldRows, *, by_axes: bool = False):
        super().__init__(curvature, rows, by_axes=by_axes)
        self._held = held

    @property
    def held(self) -> HeldRows:
        """Which gradients are kept, with their Gram matrix."""
        return replace(self._held, gram=self.gram)

    @property
    def kept(self) -> np.ndarray:
        return self._held.kept

    @property
    def row_count(self) -> int:
        return len(self._held.keys)

    @property
    def draws_per_row(self) -> int:
        return self._held.draws_per_row

    @classmethod
    def of_heaviest(
        cls, curvature: CurvatureOperator, rows: float, heaviest: float = 1.0, most: int | None = None
    ) -> DualOperator:
        """Of the gradients that are largest in norm: as many as hold a share of the trace, `most` at most.

        Errors: InvalidSetting for more gradients than a Gram matrix may have.
        """
        norms = RowNorms.of(RowSumOperator(curvature, rows))
        kept = np.sort(norms.heaviest(heaviest, most))
        # Before the Gram matrix is made: this costs one pass, that would cost hours.
        if len(kept) > LARGEST_GRAM:
            raise InvalidSetting(
                f"Block {curvature.block!r}: {len(kept)} gradients (rows times draws) make too large a Gram matrix; at "
                f"most {LARGEST_GRAM} do. Use hw.Cg(), hw.Ekfac(), or fewer rows."
            )
        return cls(curvature, rows, norms.held(kept))

    @cached_property
    def gradients_kept(self) -> BlockGradient:
        """The kept gradients as rows of one value, each times the root of its row's weight; only where these fit."""
        pieces: list[BlockGradient] = self.sweep_held(Each(self.gradients))
        return stack(pieces)

    def sweep_held(self, visitor: Visitor[HeldPiece, Part, Found]) -> Found:
        """Visit every batch, with which of its gradients are kept.

        Errors: BatchMismatch if it gives other rows than the first pass did.
        """
        return self.sweep(_Holding(self, visitor))

    def held_piece(self, rows: DrawnRows) -> HeldPiece:
        """Some rows, and which of their gradients are kept. Errors: as `sweep_held`."""
        keys, each = self.curvature.source.provider.content_keys(rows.batch), self.draws_per_row
        # S belongs to positions in the loader: in another order it would be paired with other gradients, and no shape
        # shows it.
        self.check_rows(np.array_equal(keys, self._held.keys[rows.start : rows.start + len(keys)]))
        # `kept` is sorted over all rows, so that a batch's are one run of it.
        first, last = np.searchsorted(self.kept, [rows.start * each, (rows.start + len(keys)) * each])
        return HeldPiece(rows, self.kept[first:last] - rows.start * each, int(first))

    def check_rows(self, same: bool) -> None:
        """Errors: BatchMismatch unless they are the same."""
        if not same:
            raise BatchMismatch(
                f"Block {self.label!r}: the loader gives other rows, or another order, than at first. "
                "The dual form reads the rows again for every solve; pass shuffle=False."
            )

    @cached_property
    def gram(self) -> Array:
        """Phi Phi^T [m, m] of the kept gradients, in the best precision there is."""
        if self._held.gram is not None:
            return self._held.gram
        # Gradients are not kept all at once: m x D numbers are what the dual form avoids.
        tiles = self.sweep_held(_GramTiles(self, room_for_draws(self.curvature.source.provider.device)))
        numbers = sorted({number for _, number in tiles})
        xp = namespace(next(iter(tiles.values())))
        # The lower triangle is the upper one transposed: half the ghost products.
        whole = [[tiles[a, b] if a <= b else transpose(tiles[b, a]) for b in numbers] for a in numbers]
        gram = precise(xp.concat([xp.concat(row, axis=1) for row in whole], axis=0))
        return refuse_nonfinite(gram, f"Block {self.label!r}: the Gram matrix of the rows' gradients")

    def gradients(self, piece: HeldPiece) -> BlockGradient:
        """The kept gradients of a batch as rows of one value, each times the root of its row's weight."""
        # Positions count row by row and within a row draw by draw; draws come one after another, so that they are
        # sorted back.
        row, draw = np.divmod(piece.kept, self.draws_per_row)
        pieces = [rooted(value, piece.rows).take(row[draw == k]) for k, value in enumerate(self.draws(piece.rows))]
        back = np.argsort(np.concatenate([np.flatnonzero(draw == k) for k in range(self.draws_per_row)]))
        return stack(pieces).take(back)

    def along(self, value: BlockGradient) -> Array:
        if self.is_kept and are_single_products(value):
            # Stacked once for all batches that meet them; m outer products are small.
            return value.inner(self.gradients_kept)
        found = self.sweep_held(Each(lambda piece: value.inner(self.gradients(piece))))
        return namespace(*found).concat(found, axis=1)

    def inverse(self, damping: float = 0.0) -> DualInverse:
        return DualInverse(self, damping)

    def refuse_hidden(self, damping: float, largest: float) -> None:
        """Errors: SingularOperator where rounding hides the damping, beside the largest eigenvalue."""
        # Of the gradients' dtype, not the Gram matrix's: its entries were rounded before they came to float64.
        like = self.curvature.like
        rounding = float(namespace(like).finfo(like.dtype).eps) * largest
        if not damping > rounding:
            raise SingularOperator(
                f"At damping {damping:g} the smallest eigenvalue is zero to rounding of the gradients (largest "
                f"{largest:g}). Use more damping, {10 * rounding:.2g} for example, or float64."
            )

    def minus_solved(self, vectors: Array, solve: Callable[[Array], Array]) -> Array:
        """v - Phi^T S Phi v of vectors (q, D), for S over the kept gradients: (q, m) to (q, m)."""
        product, xp, q = self.product(vectors), namespace(vectors), int(vectors.shape[0])

        def along(piece: HeldPiece) -> Array:
            # [n, q, draws]; as q rows of n draws numbers, in the order of `kept`.
            products = _weighted(product.project(self.draws(piece.rows)), piece.rows)
            return xp.take(
                xp.permute_dims(products, (1, 0, 2)).reshape((q, -1)), index_like(piece.kept, vectors), axis=1
            )

        # Two passes: Phi v has to be whole before S can be applied, and Phi^T comes after S.
        solved = solve(xp.concat(self.sweep_held(Each(along)), axis=1))
        return vectors - self.sweep_held(_Combination(self, vectors, solved))


@dataclass(frozen=True, eq=False)
class HeldPiece:
    """A batch of a dual form's rows."""

    rows: DrawnRows
    kept: np.ndarray
    """Positions of the gradients that are kept, within the batch, row by row."""
    first: int
    """How many are kept of the batches before."""


@dataclass(frozen=True, eq=False)
class _Holding(Visitor[DrawnRows, tuple[Part, int], Found]):
    """For another visitor: which gradients of a batch are kept; and how many rows there are, as at first."""

    dual: DualOperator
    inner: Visitor[HeldPiece, Part, Found]

    def of(self, item: DrawnRows) -> tuple[Part, int]:
        return self.inner.of(self.dual.held_piece(item)), len(item.batch)

    def add(self, whole: tuple[Part, int], item: DrawnRows) -> tuple[Part, int]:
        return self.inner.add(whole[0], self.dual.held_piece(item)), whole[1] + len(item.batch)

    def merge(self, one: tuple[Part, int], other: tuple[Part, int]) -> tuple[Part, int]:
        return self.inner.merge(one[0], other[0]), one[1] + other[1]

    def finish(self, whole: tuple[Part, int]) -> Found:
        # Each batch was right as far as it went; a loader that stops early shows only here.
        self.dual.check_rows(whole[1] == self.dual.row_count)
        return self.inner.finish(whole[0])


Tiles = dict[tuple[int, int], Array]
"""Products of the gradients of two batches, which are known by their first rows."""


@dataclass(eq=False)
class _Group:
    """Batches whose gradients are in memory, and the tiles of those before."""

    tiles: Tiles = field(default_factory=dict)
    gradients: dict[int, BlockGradient] = field(default_factory=dict)
    size: int = 0


@dataclass(frozen=True, eq=False)
class _GramTiles(Accumulator[HeldPiece, _Group, Tiles]):
    """The upper triangle of Phi Phi^T, a group of batches that fits into memory against all batches at a time."""

    dual: DualOperator
    limit: float

    def start(self) -> _Group:
        return _Group()

    def add(self, whole: _Group, item: HeldPiece) -> _Group:
        size = size_of(item.rows.draws)
        # One batch at least, however large: a group of none would never end.
        if whole.gradients and whole.size + size > self.limit:
            whole = _Group(self._with_tiles(whole))
        whole.gradients[item.rows.start] = self.dual.gradients(item)
        whole.size += size
        return whole

    def merge(self, one: _Group, other: _Group) -> _Group:
        return _Group(self._with_tiles(one) | other.tiles, other.gradients, other.size)

    def finish(self, whole: _Group) -> Tiles:
        return self._with_tiles(whole)

    def _with_tiles(self, group: _Group) -> Tiles:
        """A pass for each group. (In a pass over the same rows: a loader can be read twice at a time.)"""
        found = self.dual.sweep_held(Each(lambda piece: self._against(group, piece)))
        return group.tiles | {places: tile for tiles in found for places, tile in tiles.items()}

    def _against(self, group: _Group, piece: HeldPiece) -> Tiles:
        # Only batches up to this one, itself included: the upper triangle.
        before = {start: mine for start, mine in group.gradients.items() if start <= piece.rows.start and mine.rows}
        if not before or not len(piece.kept):
            return {}
        right = self.dual.gradients(piece)
        return {(start, piece.rows.start): mine.inner(right) for start, mine in before.items()}


class DualInverse(InverseThroughRows):
    """(C + damping)^-1 through the rows; exact. S is (W damping I + Phi Phi^T)^-1."""

    curvature: DualOperator

    @cached_property
    def factor(self) -> Array:
        """The lower Cholesky factor of W damping I + Phi Phi^T. Errors: SingularOperator where rounding hides it."""
        gram = self.curvature.gram
        # W damping, not damping: Phi is not divided by the root of W.
        xp, shift = namespace(gram), self.curvature.rows * self.damping
        largest = float(xp.max(xp.sum(xp.abs(gram), axis=1)))  # no eigenvalue is larger
        self.curvature.refuse_hidden(self.damping, largest / self.curvature.rows)
        # Once for each damping: every query after it costs two triangular solves.
        return xp.linalg.cholesky(gram + shift * identity(int(gram.shape[0]), gram))

    def prepare(self) -> None:
        _ = self.factor

    def _apply(self, tensor: Array) -> Array:
        vectors = tensor.reshape((-1, self.input_size))
        return (self.curvature.minus_solved(vectors, self.solve) / self.damping).reshape(tensor.shape)

    def solve(self, along: Array) -> Array:
        solved = cholesky_solve(self.factor, precise(transpose(along)))
        return namespace(along).astype(transpose(solved), along.dtype)


@dataclass(frozen=True, eq=False)
class _Combination(_RowProduct[HeldPiece]):
    """Phi^T solved, for numbers (q, m) along the kept gradients."""

    curvature: DualOperator
    vectors: Array
    solved: Array

    def start(self) -> DrawsProduct:
        return self.curvature.product(self.vectors)

    def add(self, whole: DrawsProduct, item: HeldPiece) -> DrawsProduct:
        rows, each, q = item.rows, self.curvature.draws_per_row, int(self.vectors.shape[0])
        mine = transpose(self.solved[:, item.first : item.first + len(item.kept)])
        # Gradients that were not kept count nothing in the sum.
        full = zeros_like(self.vectors, (len(rows.batch) * each, q))
        full = put_rows(full, index_like(item.kept, self.vectors), mine).reshape((len(rows.batch), each, q))
        by_query = namespace(full).permute_dims(full, (0, 2, 1))
        whole.combine(self.curvature.draws(rows), _weighted(by_query, rows))
        return whole


def rooted(value: BlockGradient, rows: DrawnRows) -> BlockGradient:
    """Each row times the root of its weight."""
    return value if rows.weights is None else value.weighted(namespace(rows.weights).sqrt(rows.weights))


def _weighted(values: Array, rows: DrawnRows) -> Array:
    """[n, q, k], each row times the root of its weight."""
    return values if rows.weights is None else values * namespace(values).sqrt(rows.weights)[:, None, None]


def index_like(positions: np.ndarray, like: Array) -> Array:
    return as_like(positions, like, dtype=namespace(like).int64)


def cholesky_solve(lower: Array, sides: Array) -> Array:
    """(L L^T)^-1 sides: two triangular systems, where the framework has them; else two general ones."""
    if is_torch(sides):
        return sides.cholesky_solve(lower)
    solve = namespace(lower).linalg.solve
    # The array-API standard has no triangular solve.
    return solve(transpose(lower), solve(lower, sides))


def lower_solve(lower: Array, sides: Array, *, transposed: bool = False) -> Array:
    """lower^-1 sides, or its transpose's; both [m, ...], lower triangular [m, m]."""
    if is_torch(sides):
        xp: Any = namespace(sides).linalg
        return xp.solve_triangular(lower.T if transposed else lower, sides, upper=transposed)
    # The array-API standard has no triangular solve.
    return namespace(lower).linalg.solve(transpose(lower) if transposed else lower, sides)


def _refuse_without_room(provider: StructuredGradientProvider, duals: OrderedDict[str, DualOperator]) -> None:
    """Each block has its own Gram matrix in float64, and its factor at one damping."""
    sizes = {name: len(dual.kept) for name, dual in duals.items()}
    largest = max(sizes, key=lambda name: sizes[name])
    refuse_too_large(
        f"The Gram matrices of {len(sizes)} blocks, the largest that of block {largest!r},",
        (sizes[largest], sizes[largest]),
        # Two float64 matrices [m, m] a block: the Gram matrix and its factor.
        16.0 * sum(size**2 for size in sizes.values()),
        "Use fewer blocks (blocks='full' has one), fewer rows, or hw.Cg() or hw.Ekfac().",
        provider.device,
    )


def fit_dual(
    provider: StructuredGradientProvider,
    loader: Iterable[object],
    kind: Curvature = "empirical_fisher",
    *,
    fisher: Fisher = "auto",
    seed: int = 0,
    progress: bool = False,
) -> tuple[OrderedDict[str, DualOperator], float]:
    """Every block's own curvature with its Gram matrix; and the rows' total weight.

    Errors: InvalidSetting for a Hessian, for rows whose GGN is no short sum, and for too many rows.
    """
    operators, rows = fit_products(provider, loader, kind, fisher=fisher, seed=seed, progress=progress)
    duals = OrderedDict((name, DualOperator.of_heaviest(operator, rows)) for name, operator in operators.items())
    _refuse_without_room(provider, duals)
    return duals, rows
