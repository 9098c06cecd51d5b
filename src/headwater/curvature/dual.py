"""Curvature that is a sum of g g^T over rows, inverted through the rows: no D x D and no N x D array.

With Phi the gradients [m, D] of all rows and draws (each times the root of its row's weight), W the rows' total weight:

    C = Phi^T Phi / W,   (C + damping)^-1 v = (v - Phi^T (W damping I + Phi Phi^T)^-1 Phi v) / damping

The Gram matrix Phi Phi^T [m, m] is made of ghost products. DataInf swaps the mean over rows with the inverse, and needs
no Gram matrix at all.

Sources: Woodbury 1950; Kwon et al. 2024, arXiv 2310.00902 (DataInf).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Any

import numpy as np

from headwater.arrays import Array, identity, namespace, precise, transpose, working_memory_limit
from headwater.curvature.exact import Curvature
from headwater.curvature.products import KEPT_SHARE, CurvatureOperator, Rows, fit_products, size_of
from headwater.errors import BatchMismatch, InvalidSetting, SingularOperator
from headwater.gradients.algebra import Dense
from headwater.gradients.block import BlockGradient
from headwater.gradients.draws import DrawsProduct, draws_gram, squared_norms
from headwater.gradients.outer import Outer
from headwater.gradients.provider import Fisher, StructuredGradientProvider
from headwater.operators.algebra import IdentityOperator, LinearOperator, rowwise_inner

LARGEST_GRAM = 20_000
"""Gradients beyond which a Gram matrix is refused: 1.6 GB in float32, and hours to factorise."""


class RowSumOperator(LinearOperator):
    """A curvature that is the mean over rows of g g^T, by products; its inverse is a sum over rows too."""

    symmetric = psd = True

    def __init__(self, curvature: CurvatureOperator, rows: float):
        self.curvature, self.rows = curvature, rows

    @property
    def input_size(self) -> int:
        return self.curvature.input_size

    def _apply(self, tensor: Array) -> Array:
        return self.curvature.apply(tensor)

    def adjoint(self) -> LinearOperator:
        return self

    def trace(self) -> float:
        return self.curvature.trace()

    @property
    def label(self) -> str:
        return self.curvature.block

    def passes(self) -> Iterator[Rows]:
        """Every batch with its draws."""
        for rows in self.curvature.source.rows(with_draws=True):
            if rows.draws is None:
                raise InvalidSetting(
                    f"Block {self.label!r}: a row's GGN is no short sum of g g^T here (many outputs, or a loss that "
                    "is not convex in them). Use curvature='empirical_fisher' or 'fisher', or hw.Cg()."
                )
            yield rows

    def product(self, vectors: Array) -> DrawsProduct:
        return DrawsProduct(self.curvature.source.provider.layouts[self.label], vectors)

    def draws(self, rows: Rows) -> list[Any]:
        return [draw[self.label] for draw in rows.draws or ()]


class SwappedInverse(LinearOperator):
    """The mean over rows of (damping I + g g^T)^-1: DataInf."""

    symmetric = psd = True

    def __init__(self, curvature: RowSumOperator, damping: float):
        self.curvature, self.damping = curvature, _positive(damping)

    @property
    def input_size(self) -> int:
        return self.curvature.input_size

    def _apply(self, tensor: Array) -> Array:
        vectors = tensor.reshape((-1, self.input_size))
        product, weight = self.curvature.product(vectors), 0.0
        for rows in self.curvature.passes():
            draws = self.curvature.draws(rows)
            shrink = 1.0 / (self.damping + squared_norms(draws))
            product.add(draws, shrink if rows.weights is None else shrink * rows.weights)
            weight += rows.total
        return ((vectors - product.value / weight) / self.damping).reshape(tensor.shape)

    def adjoint(self) -> LinearOperator:
        return self

    def trace(self) -> float:
        raise NotImplementedError("The trace of DataInf's inverse needs its matrix: use dense().")


class DualOperator(RowSumOperator):
    """A sum over rows whose Gram matrix is known: its damped inverse is exact."""

    def __init__(self, curvature: CurvatureOperator, rows: float):
        super().__init__(curvature, rows)
        self._keys: list[np.ndarray] = []

    def note_rows(self) -> None:
        """Read all rows once, and remember which they are."""
        source, gradients = self.curvature.source, 0
        for rows in self.passes():
            self._keys.append(source.provider.content_keys(rows.batch))
            gradients += len(rows.batch) * len(rows.draws or ())
            if gradients > LARGEST_GRAM:
                raise InvalidSetting(
                    f"Block {self.label!r}: more than {LARGEST_GRAM} gradients (rows times draws) make too large a "
                    "Gram matrix. Use hw.Cg(), hw.Ekfac(), or fewer rows."
                )

    def ordered(self) -> Iterator[tuple[Rows, int]]:
        """Every batch, and where its rows begin.

        Errors: BatchMismatch if a later pass gives other rows than the first.
        """
        start, source = 0, self.curvature.source
        for number, rows in enumerate(self.passes()):
            keys = source.provider.content_keys(rows.batch)
            if number >= len(self._keys) or not np.array_equal(keys, self._keys[number]):
                raise BatchMismatch(
                    f"Block {self.label!r}: the loader gives other rows, or another order, than at first. "
                    "The dual form reads the rows again for every solve; pass shuffle=False."
                )
            yield rows, start
            start += len(rows.batch)

    @cached_property
    def gram(self) -> Array:
        """Phi Phi^T [m, m], row by row and within a row draw by draw, in the best precision there is."""
        tiles: dict[tuple[int, int], Array] = {}
        for group in self._groups():
            for right, start in self.ordered():
                for left, begin in group:
                    if begin <= start:
                        tiles[begin, start] = self._tile(left, right)
        starts = sorted({start for _, start in tiles})
        xp = namespace(next(iter(tiles.values())))
        rows = [[tiles[a, b] if a <= b else transpose(tiles[b, a]) for b in starts] for a in starts]
        return precise(xp.concat([xp.concat(row, axis=1) for row in rows], axis=0))

    def _groups(self) -> Iterator[list[tuple[Rows, int]]]:
        """The rows in groups whose draws fit into memory together."""
        group: list[tuple[Rows, int]] = []
        room = limit = KEPT_SHARE * working_memory_limit()
        for rows, start in self.ordered():
            room -= size_of(rows.draws)
            if group and room < 0:
                yield group
                group, room = [], limit - size_of(rows.draws)
            group.append((rows, start))
        yield group

    def along(self, value: BlockGradient) -> Array:
        """Dot products of a block's gradients with all fitted ones, Phi g: [n, m]."""
        found = []
        for rows, _ in self.ordered():
            n, _, m, k = (tile := draws_gram([value], self.draws(rows))).shape
            if rows.weights is not None:
                tile = tile * namespace(tile).sqrt(rows.weights)[:, None]
            found.append(tile.reshape((n, m * k)))
        return namespace(*found).concat(found, axis=1)

    def _tile(self, left: Rows, right: Rows) -> Array:
        tile = draws_gram(self.draws(left), self.draws(right))
        n, k, m, j = tile.shape
        if left.weights is not None and right.weights is not None:
            roots = namespace(tile).sqrt(left.weights[:, None] * right.weights[None, :])
            tile = tile * roots[:, None, :, None]
        return tile.reshape((n * k, m * j))

    def inverse(self, damping: float = 0.0) -> DualInverse:
        return DualInverse(self, _positive(damping))


class DualInverse(LinearOperator):
    """(C + damping)^-1 through the rows; exact."""

    symmetric = psd = True

    def __init__(self, curvature: DualOperator, damping: float):
        self.curvature, self.damping = curvature, damping

    @property
    def input_size(self) -> int:
        return self.curvature.input_size

    @cached_property
    def _factor(self) -> Array:
        """The lower Cholesky factor of W damping I + Phi Phi^T."""
        gram = self.curvature.gram
        shift = self.curvature.rows * self.damping
        return namespace(gram).linalg.cholesky(gram + shift * identity(int(gram.shape[0]), gram))

    def _apply(self, tensor: Array) -> Array:
        vectors = tensor.reshape((-1, self.input_size))
        product, curvature, along = self.curvature.product(vectors), self.curvature, []
        for rows, _ in curvature.ordered():
            along.append(_rooted(product.project(curvature.draws(rows)), rows))
        xp = namespace(vectors)
        whole = xp.permute_dims(xp.concat(along, axis=0), (1, 0, 2))
        q, n, k = whole.shape
        weights = xp.permute_dims(self.solve(whole.reshape((q, n * k))).reshape((q, n, k)), (1, 0, 2))
        for rows, start in curvature.ordered():
            product.combine(curvature.draws(rows), _rooted(weights[start : start + len(rows.batch)], rows))
        return ((vectors - product.value) / self.damping).reshape(tensor.shape)

    def solve(self, along: Array) -> Array:
        """(W damping I + Phi Phi^T)^-1 for vectors over the rows: (q, m)."""
        solved = _cholesky_solve(self._factor, precise(transpose(along)))
        return namespace(along).astype(transpose(solved), along.dtype)

    def block_sides(self, queries: BlockGradient, train_per_query: float) -> tuple[LinearOperator, LinearOperator]:
        """Gradients that are one outer product meet as they are, and along the m fitted ones; nothing has D numbers."""
        if not all(isinstance(part, Outer) and part.positions == 1 for part in queries.parts):
            return super().block_sides(queries, train_per_query)
        return AlongRows(self, solved=True), AlongRows(self, solved=False)

    def quadratic(self, value: BlockGradient) -> Array:
        if not all(isinstance(part, Outer) and part.positions == 1 for part in value.parts):
            return super().quadratic(value)
        along = self.curvature.along(value)
        return (value.squared_norms() - rowwise_inner(self.solve(along), along)) / self.damping

    def adjoint(self) -> LinearOperator:
        return self

    def trace(self) -> float:
        raise NotImplementedError("The trace of a dual inverse needs its matrix: use dense().")


class AlongRows(IdentityOperator):
    """A gradient, and beside it, as one part more, its dot products with the m fitted gradients.

    <x, y> / damping - Phi x (W damping I + Phi Phi^T)^-1 Phi y: the query's side brings the damping and the solve.
    """

    def __init__(self, inverse: DualInverse, solved: bool):
        super().__init__(inverse.input_size)
        self.dual, self.solved = inverse, solved

    def apply_block(self, value: BlockGradient) -> BlockGradient:
        along = self.dual.curvature.along(value)
        parts = value.parts
        if self.solved:
            along = self.dual.solve(along) * (-1.0 / self.dual.damping)
            each = namespace(along).ones_like(along[:, 0]) * (1.0 / self.dual.damping)
            parts = value.weighted(each).parts
        return BlockGradient(value.layout, (*parts, Dense(along[:, None, :])))


def _rooted(values: Array, rows: Rows) -> Array:
    """[n, q, k], each row times the root of its weight."""
    return values if rows.weights is None else values * namespace(values).sqrt(rows.weights)[:, None, None]


def _cholesky_solve(lower: Array, sides: Array) -> Array:
    """Two triangular systems, where the framework has them; else two general ones."""
    if hasattr(sides, "addmm_"):  # torch, without naming it
        return sides.cholesky_solve(lower)
    solve = namespace(lower).linalg.solve
    return solve(transpose(lower), solve(lower, sides))


def _positive(damping: float) -> float:
    if not damping > 0:
        raise SingularOperator(f"A sum over rows is singular; its inverse needs damping above 0, got {damping:g}.")
    return damping


def fit_dual(
    provider: StructuredGradientProvider,
    loader: Iterable[Any],
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
    duals = OrderedDict((name, DualOperator(operator, rows)) for name, operator in operators.items())
    for dual in duals.values():
        dual.note_rows()
    return duals, rows
