"""Operators whose structure gives the inverse in closed form: dense, diagonal, part by part, low rank plus diagonal."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from headwater.arrays import Array, as_like, identity, namespace, precise, to_numpy, transpose
from headwater.blocks import Layout
from headwater.errors import IndefiniteCurvature, NonFiniteValue, ShapeMismatch, SingularOperator
from headwater.gradients.algebra import Dense, Gradient
from headwater.gradients.block import BlockGradient
from headwater.operators.algebra import IdentityOperator, LinearOperator, ends, spread
from headwater.operators.finite import refuse_nonfinite
from headwater.operators.spectrum import Spectrum


def invert_spectrum(spectrum: Array, damping: float, allow_indefinite: bool = True, *, diagonalised: int = 1) -> Array:
    """1 / (spectrum + damping), in the precision of the spectrum.

    diagonalised: the size of the matrix whose computed eigenvalues these are; a zero among them shows as about that
    many eps. Errors: SingularOperator if some |spectrum + damping| is zero to rounding; IndefiniteCurvature, naming a
    damping that would do, if some is negative and that is not allowed; NonFiniteValue.
    """
    xp = namespace(spectrum)
    damped = spectrum + damping
    _refuse_singular(xp.abs(damped), damping, diagonalised)
    lowest = float(xp.min(damped))
    if not allow_indefinite and lowest < 0:
        raise IndefiniteCurvature(
            f"At damping {damping:g} the smallest eigenvalue is {lowest:g}: not a minimum. A damping of "
            f"{1.01 * (damping - lowest):.3g} would do; so would curvature='ggn', which is never negative."
        )
    return 1.0 / damped


def _refuse_singular(sizes: Array, damping: float, diagonalised: int) -> None:
    """Look at the sizes of what is about to be inverted. Errors: SingularOperator; NonFiniteValue."""
    xp = namespace(sizes)
    largest, smallest = float(xp.max(sizes)), float(xp.min(sizes))
    if not math.isfinite(largest):
        raise NonFiniteValue(f"The operator is not finite, and has no inverse (damping {damping:g}).")
    # An eigendecomposition is off by about its size times eps of float64, in which it is computed.
    if smallest <= largest * max(float(xp.finfo(sizes.dtype).eps), diagonalised * 2.0**-52):
        raise SingularOperator(
            f"At damping {damping:g} the smallest eigenvalue is zero to rounding (largest {largest:g}). "
            "Use more damping."
        )


class DenseOperator(LinearOperator):
    """A matrix [D, D]. A symmetric one is diagonalised once, and every damping is then free."""

    def __init__(self, matrix: Array, *, symmetric: bool = False, psd: bool = False):
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ShapeMismatch(f"A dense operator needs a square matrix, got {tuple(matrix.shape)}.")
        self.matrix = matrix
        self.symmetric = symmetric or psd
        self.psd = psd
        self._eigen: tuple[Array, Array] | None = None

    @property
    def input_size(self) -> int:
        return int(self.matrix.shape[0])

    def _apply(self, tensor: Array) -> Array:
        return tensor @ transpose(self.matrix)

    def adjoint(self) -> LinearOperator:
        return self if self.symmetric else DenseOperator(transpose(self.matrix))

    @property
    def eigen(self) -> tuple[Array, Array]:
        """Eigenvalues [D], ascending, and eigenvectors [D, D] in columns, computed once; symmetric operators only."""
        if self._eigen is None:
            self._eigen = self._diagonalised()
        return self._eigen

    def _diagonalised(self) -> tuple[Array, Array]:
        matrix = refuse_nonfinite(precise(self.matrix), "A dense operator")
        values, vectors = namespace(matrix).linalg.eigh((matrix + transpose(matrix)) / 2)
        return values, vectors

    def inverse(self, damping: float = 0.0, *, allow_indefinite: bool = True) -> DenseOperator:
        if not self.symmetric:
            damped = self.matrix + damping * identity(self.input_size, self.matrix)
            linalg = namespace(damped).linalg
            # Not symmetric: singular values say how near to singular it is, eigenvalues do not.
            _refuse_singular(linalg.svdvals(damped), damping, self.input_size)
            return DenseOperator(linalg.inv(damped))
        values, vectors = self.eigen
        xp = namespace(values)
        if self.psd:  # what is below zero is rounding, in the precision that the matrix was summed in
            rounding = float(xp.finfo(self.matrix.dtype).eps) * float(xp.max(values))
            hidden = damping <= self.input_size**0.5 * rounding  # then small eigenvalues decide, and may be rounding
            values = xp.where(values > (self.input_size * rounding if hidden else 0.0), values, xp.zeros_like(values))
        inverse = invert_spectrum(values, damping, allow_indefinite, diagonalised=self.input_size)
        matrix = (vectors * inverse) @ transpose(vectors)
        # Not `psd`: an indefinite matrix may be positive once damped.
        positive = bool(namespace(inverse).all(inverse > 0))
        return DenseOperator(namespace(matrix).astype(matrix, self.matrix.dtype), symmetric=True, psd=positive)

    def trace(self) -> float:
        return float(namespace(self.matrix).linalg.trace(self.matrix))

    def spectrum_bounds(self) -> tuple[float, float] | None:
        return ends(self.eigen[0]) if self.symmetric else None

    def eigenvalues(self, at_most: int | None = None) -> Spectrum | None:
        costly = at_most is not None and self.input_size > at_most and self._eigen is None
        if not self.symmetric or costly:
            return None
        values, eps = to_numpy(self.eigen[0]), float(namespace(self.matrix).finfo(self.matrix.dtype).eps)
        if self.psd:
            return Spectrum.of_psd(values, eps)
        return Spectrum.of(values, rounding=len(values) * eps * float(abs(values).max()))


class DiagonalOperator(LinearOperator):
    """A vector [D] on the diagonal, or a matrix [o, i] of a part, read row by row."""

    symmetric = True

    def __init__(self, diagonal: Array):
        self.diagonal = diagonal
        xp = namespace(diagonal)
        self.psd = bool(xp.all(diagonal >= 0))

    @property
    def input_size(self) -> int:
        return math.prod(self.diagonal.shape)

    def _apply(self, tensor: Array) -> Array:
        return tensor * self.diagonal.reshape((-1,))

    def apply_gradient(self, value: Gradient) -> Gradient:
        return value.scale(self.diagonal.reshape(value.shape))

    def quadratic_gradient(self, value: Gradient) -> Array:
        return value.quadratic(self.diagonal.reshape(value.shape))

    def adjoint(self) -> DiagonalOperator:
        return self

    def inverse(self, damping: float = 0.0) -> DiagonalOperator:
        return DiagonalOperator(invert_spectrum(self.diagonal, damping))

    def trace(self) -> float:
        return float(namespace(self.diagonal).sum(self.diagonal))

    def spectrum_bounds(self) -> tuple[float, float] | None:
        return ends(self.diagonal)

    def eigenvalues(self, at_most: int | None = None) -> Spectrum | None:
        return Spectrum.of(to_numpy(self.diagonal))


Piece = TypeVar("Piece", bound=LinearOperator, covariant=True)
Other = TypeVar("Other", bound=LinearOperator)


class BlockDiagonalOperator(LinearOperator, Generic[Piece]):
    """One operator for each part of a block's layout."""

    def __init__(self, layout: Layout, operators: Sequence[Piece]):
        sizes = [part.size for part in layout.parts]
        if [op.input_size for op in operators] != sizes:
            raise ShapeMismatch(f"The parts have {sizes} numbers, the operators {[op.input_size for op in operators]}.")
        self.layout = layout
        self.operators = tuple(operators)
        self.symmetric = all(op.symmetric for op in operators)
        self.psd = all(op.psd for op in operators)

    @property
    def input_size(self) -> int:
        return self.layout.size

    def _apply(self, tensor: Array) -> Array:
        flat = tensor.reshape((-1, self.input_size))
        rows = int(flat.shape[0])
        mapped = [
            op.apply(matrix.reshape((rows, op.input_size))).reshape(matrix.shape)
            for op, matrix in zip(self.operators, self.layout.split(flat), strict=True)
        ]
        return self.layout.merge(mapped).reshape(tensor.shape)

    def apply_block(self, value: BlockGradient) -> BlockGradient:
        parts = (op.apply_gradient(part) for op, part in zip(self.operators, value.parts, strict=True))
        return BlockGradient(value.layout, tuple(parts))

    def quadratic(self, value: BlockGradient) -> Array:
        rows = [op.quadratic_gradient(part) for op, part in zip(self.operators, value.parts, strict=True)]
        return sum(rows[1:], rows[0])

    @property
    def keeps_rows(self) -> bool:
        return all(op.keeps_rows for op in self.operators)

    def block_sides(self, queries: BlockGradient, train_per_query: float) -> tuple[LinearOperator, LinearOperator]:
        sides = [op.sides(part, train_per_query) for op, part in zip(self.operators, queries.parts, strict=True)]
        left, right = zip(*sides, strict=True)
        return BlockDiagonalOperator(self.layout, left), BlockDiagonalOperator(self.layout, right)

    def map(self, change: Callable[[Piece], Other]) -> BlockDiagonalOperator[Other]:
        """Another operator for each part."""
        return BlockDiagonalOperator(self.layout, [change(op) for op in self.operators])

    def adjoint(self) -> BlockDiagonalOperator[LinearOperator]:
        return BlockDiagonalOperator(self.layout, [op.adjoint() for op in self.operators])

    def inverse(self, damping: float = 0.0) -> BlockDiagonalOperator[LinearOperator]:
        return BlockDiagonalOperator(self.layout, [op.inverse(damping) for op in self.operators])

    def trace(self) -> float:
        return sum(op.trace() for op in self.operators)

    def spectrum_bounds(self) -> tuple[float, float] | None:
        bounds = [op.spectrum_bounds() for op in self.operators]
        return None if None in bounds else spread(bound for pair in bounds if pair for bound in pair)

    def eigenvalues(self, at_most: int | None = None) -> Spectrum | None:
        found = [op.eigenvalues(at_most) for op in self.operators]
        known = [spectrum for spectrum in found if spectrum is not None]
        return Spectrum.joined(known) if len(known) == len(found) else None


class LowRankPlusDiagonalOperator(LinearOperator):
    """factor core factor^T + diagonal. Shapes: factor [D, r], core [r, r], diagonal [D]."""

    symmetric = True

    def __init__(self, factor: Array, core: Array, diagonal: Array, *, psd: bool = False):
        self.factor, self.core, self.diagonal = factor, core, diagonal
        self.psd = psd

    @property
    def input_size(self) -> int:
        return int(self.factor.shape[0])

    def _apply(self, tensor: Array) -> Array:
        return ((tensor @ self.factor) @ self.core) @ transpose(self.factor) + tensor * self.diagonal

    def adjoint(self) -> LowRankPlusDiagonalOperator:
        return self

    def inverse(self, damping: float = 0.0) -> LowRankPlusDiagonalOperator:
        """By Woodbury's identity, in an r x r system; the core may be singular."""
        xp = namespace(self.factor)
        inverse = invert_spectrum(self.diagonal, damping)
        scaled = self.factor * inverse[:, None]
        # (D + F C F^T)^-1 = D^-1 - D^-1 F (I + C F^T D^-1 F)^-1 C F^T D^-1: no inverse of the core.
        small = as_like(xp.eye(int(self.core.shape[0])), self.core) + self.core @ (transpose(self.factor) @ scaled)
        _refuse_singular(xp.linalg.svdvals(small), damping, int(small.shape[0]))
        # Symmetric in exact arithmetic: (I + C K)^-1 C = C (I + K C)^-1.
        core = -xp.linalg.solve(small, self.core)
        return LowRankPlusDiagonalOperator(scaled, (core + transpose(core)) / 2, inverse, psd=self.psd and damping >= 0)

    def trace(self) -> float:
        xp = namespace(self.factor)
        return float(xp.sum((self.factor @ self.core) * self.factor) + xp.sum(self.diagonal))

    def spectrum_bounds(self) -> tuple[float, float] | None:
        """With a constant diagonal; see `eigenvalues`."""
        found = self.eigenvalues()
        return None if found is None else found.bounds

    def eigenvalues(self, at_most: int | None = None) -> Spectrum | None:
        """With a constant diagonal: those of the r x r matrix R core R^T, for factor = Q R, and zero off its span."""
        low, high = ends(self.diagonal)
        if low != high or (at_most is not None and int(self.core.shape[0]) > at_most):
            return None
        xp = namespace(self.factor)
        # Q R C R^T Q^T has the eigenvalues of R C R^T: r x r in place of D x D.
        triangle = xp.linalg.qr(precise(self.factor), mode="reduced")[1]
        values = to_numpy(xp.linalg.eigvalsh(triangle @ precise(self.core) @ transpose(triangle)))
        eps = float(xp.finfo(self.factor.dtype).eps)
        found = (
            Spectrum.of_psd(values, eps, size=self.input_size)
            if self.psd and low >= 0
            else Spectrum.of(values, size=self.input_size)
        )
        return found.shifted(low)


class EigenpairsOperator(LinearOperator):
    """sum_k values_k u_k u_k^T with orthonormal u: the leading part of a symmetric operator, low in rank.

    Shapes: values [k], vectors [k, D].
    """

    symmetric = True

    def __init__(self, values: Array, vectors: Array):
        self.values, self.vectors = values, vectors
        self.psd = bool(namespace(values).all(values >= 0))

    @property
    def input_size(self) -> int:
        return int(self.vectors.shape[1])

    def _apply(self, tensor: Array) -> Array:
        return ((tensor @ transpose(self.vectors)) * self._weights) @ self.vectors

    @property
    def _weights(self) -> Array:
        return namespace(self.values).astype(self.values, self.vectors.dtype)

    def adjoint(self) -> EigenpairsOperator:
        return self

    def inverse(self, damping: float = 0.0, *, complement: bool = True) -> EigenpairsPlusScaledOperator:
        """On the span 1 / (values + damping); off it 1 / damping, or nothing without the complement."""
        values = invert_spectrum(self.values, damping)
        if not complement:
            return EigenpairsPlusScaledOperator(EigenpairsOperator(values, self.vectors), 0.0)
        if damping == 0.0:
            raise SingularOperator("An operator of low rank has no inverse without damping. Use more damping.")
        # 1 / damping everywhere, and on the span the difference to 1 / (value + damping).
        return EigenpairsPlusScaledOperator(EigenpairsOperator(values - 1.0 / damping, self.vectors), 1.0 / damping)

    def trace(self) -> float:
        return float(namespace(self.values).sum(self.values))

    def spectrum_bounds(self) -> tuple[float, float] | None:
        # Off its span the operator is zero, which is an eigenvalue too.
        rest = () if int(self.vectors.shape[0]) >= self.input_size else (0.0,)
        return spread((*ends(self.values), *rest))

    def eigenvalues(self, at_most: int | None = None) -> Spectrum | None:
        return Spectrum.of(to_numpy(self.values), size=self.input_size)


class EigenpairsPlusScaledOperator(LinearOperator):
    """A multiple of the identity, corrected on a few directions: leading + scale I.

    Pairs need not meet in D numbers: gradients meet as they are, in outer products, and in k numbers more.
    """

    symmetric = True

    def __init__(self, leading: EigenpairsOperator, scale: float):
        self.leading, self.scale = leading, float(scale)
        self.psd = bool(namespace(leading.values).all(leading.values + self.scale >= 0)) and scale >= 0

    @property
    def input_size(self) -> int:
        return self.leading.input_size

    def _apply(self, tensor: Array) -> Array:
        return self.leading.apply(tensor) + tensor * self.scale

    def adjoint(self) -> EigenpairsPlusScaledOperator:
        return self

    def trace(self) -> float:
        return self.leading.trace() + self.scale * self.input_size

    def spectrum_bounds(self) -> tuple[float, float] | None:
        bounds = self.leading.spectrum_bounds()
        return None if bounds is None else (bounds[0] + self.scale, bounds[1] + self.scale)

    def eigenvalues(self, at_most: int | None = None) -> Spectrum | None:
        found = self.leading.eigenvalues(at_most)
        return None if found is None else found.shifted(self.scale)

    def quadratic(self, value: BlockGradient) -> Array:
        # scale |g|^2 + sum_k w_k <u_k, g>^2: g stays in its own form.
        along = value.project(self.leading.vectors)
        return value.squared_norms() * self.scale + (along * along) @ self.leading._weights

    def block_sides(self, queries: BlockGradient, train_per_query: float) -> tuple[LinearOperator, LinearOperator]:
        """Train rows along k directions, where k is below the number of queries; else queries through the operator."""
        # k coordinates for each train row cost k products; the queries, applied once, cost one for each query.
        if int(self.leading.vectors.shape[0]) >= queries.rows:
            return super().block_sides(queries, train_per_query)
        vectors, weights = self.leading.vectors, self.leading._weights
        beside = 1.0 if self.scale else 0.0  # without a complement the gradients themselves are left out on both sides
        return BesideOperator(vectors, weights, self.scale), BesideOperator(vectors, weights * 0 + 1, beside)


class BesideOperator(IdentityOperator):
    """A gradient, scaled, and beside it, as one part more, its weighted coordinates along some directions."""

    def __init__(self, vectors: Array, weights: Array, scale: float):
        super().__init__(int(vectors.shape[1]))
        self.vectors, self.weights, self.scale = vectors, weights, scale

    @property
    def keeps_rows(self) -> bool:
        return False

    def apply_block(self, value: BlockGradient) -> BlockGradient:
        along = (value.project(self.vectors) * self.weights)[:, None, :]
        if self.scale == 0.0:
            return BlockGradient(value.layout, (Dense(along),))
        each = namespace(along).ones_like(along[:, 0, 0]) * self.scale
        parts = value.parts if self.scale == 1.0 else value.weighted(each).parts
        return BlockGradient(value.layout, (*parts, Dense(along)))
