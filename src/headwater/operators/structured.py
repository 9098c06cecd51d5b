"""Operators whose structure gives the inverse in closed form: dense, diagonal, part by part, Kronecker, low rank.

Layout: the operator of a part with matrices [o, i] reads its vectors row by row, so that the Kronecker product
`left (x) right` with left [o, o] and right [i, i] maps G to left G right^T. A side may be a vector (a diagonal matrix)
or, for an eigenbasis, None (the identity).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property

from headwater.arrays import Array, as_like, identity, namespace, precise, transpose
from headwater.blocks import Layout
from headwater.errors import IndefiniteCurvature, InvalidSetting, NonFiniteValue, ShapeMismatch, SingularOperator
from headwater.gradients.algebra import Gradient, multiply_left, multiply_right
from headwater.gradients.block import BlockGradient
from headwater.gradients.outer import Outer
from headwater.operators.algebra import LinearOperator, ProductOperator


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

    @property
    def input_size(self) -> int:
        return int(self.matrix.shape[0])

    def _apply(self, tensor: Array) -> Array:
        return tensor @ transpose(self.matrix)

    def adjoint(self) -> LinearOperator:
        return self if self.symmetric else DenseOperator(transpose(self.matrix))

    @cached_property
    def eigen(self) -> tuple[Array, Array]:
        """Eigenvalues [D], ascending, and eigenvectors [D, D] in columns; symmetric operators only."""
        matrix = precise(self.matrix)
        values, vectors = namespace(matrix).linalg.eigh((matrix + transpose(matrix)) / 2)
        return values, vectors

    def inverse(self, damping: float = 0.0, *, allow_indefinite: bool = True) -> DenseOperator:
        if not self.symmetric:
            damped = self.matrix + damping * identity(self.input_size, self.matrix)
            linalg = namespace(damped).linalg
            _refuse_singular(linalg.svdvals(damped), damping, self.input_size)
            return DenseOperator(linalg.inv(damped))
        values, vectors = self.eigen
        inverse = invert_spectrum(values, damping, allow_indefinite, diagonalised=self.input_size)
        matrix = (vectors * inverse) @ transpose(vectors)
        positive = bool(namespace(inverse).all(inverse > 0))
        return DenseOperator(namespace(matrix).astype(matrix, self.matrix.dtype), symmetric=True, psd=positive)

    def trace(self) -> float:
        return float(namespace(self.matrix).linalg.trace(self.matrix))


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


class BlockDiagonalOperator(LinearOperator):
    """One operator for each part of a block's layout."""

    def __init__(self, layout: Layout, operators: Sequence[LinearOperator]):
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

    def block_sides(self, queries: BlockGradient, train_rows: int) -> tuple[LinearOperator, LinearOperator]:
        sides = [op.sides(part, train_rows) for op, part in zip(self.operators, queries.parts, strict=True)]
        left, right = zip(*sides, strict=True)
        return BlockDiagonalOperator(self.layout, left), BlockDiagonalOperator(self.layout, right)

    def map(self, change: Callable[[LinearOperator], LinearOperator]) -> BlockDiagonalOperator:
        """Another operator for each part."""
        return BlockDiagonalOperator(self.layout, [change(op) for op in self.operators])

    def adjoint(self) -> BlockDiagonalOperator:
        return self.map(lambda op: op.adjoint())

    def inverse(self, damping: float = 0.0) -> BlockDiagonalOperator:
        return self.map(lambda op: op.inverse(damping))

    def trace(self) -> float:
        return sum(op.trace() for op in self.operators)


def _side_size(side: Array) -> int:
    return int(side.shape[0])


def _side_trace(side: Array) -> float:
    xp = namespace(side)
    return float(xp.sum(side) if side.ndim == 1 else xp.linalg.trace(side))


class KroneckerOperator(LinearOperator):
    """left (x) right: G to left G right^T. left [o, o] or its diagonal [o]; right [i, i]."""

    def __init__(self, left: Array, right: Array, *, symmetric: bool = True, psd: bool = False):
        self.left, self.right = left, right
        self.symmetric = symmetric or psd
        self.psd = psd

    @property
    def input_size(self) -> int:
        return _side_size(self.left) * _side_size(self.right)

    def _apply(self, tensor: Array) -> Array:
        values = tensor.reshape((-1, _side_size(self.left), _side_size(self.right)))
        return multiply_right(multiply_left(self.left, values), self.right).reshape(tensor.shape)

    def apply_gradient(self, value: Gradient) -> Gradient:
        return value.sandwich(self.left, self.right)

    def adjoint(self) -> LinearOperator:
        if self.symmetric:
            return self
        left, right = (side if side.ndim == 1 else transpose(side) for side in (self.left, self.right))
        return KroneckerOperator(left, right, symmetric=False)

    @cached_property
    def eigen(self) -> EigenKroneckerOperator:
        """The same operator in its eigenbasis."""
        (left_values, left_basis), (right_values, right_basis) = _diagonalise(self.left), _diagonalise(self.right)
        spectrum = left_values[:, None] * right_values[None, :]
        return EigenKroneckerOperator(left_basis, right_basis, spectrum, like=self.right)

    def inverse(self, damping: float = 0.0) -> LinearOperator:
        """Exact: (left (x) right + damping I)^-1, in the eigenbasis; symmetric operators only."""
        return self.eigen.inverse(damping) if self.symmetric else super().inverse(damping)

    def factored_inverse(self, damping: float) -> KroneckerOperator:
        """(left + (s / p) I)^-1 (x) (right + s p I)^-1, with s the root of the damping and p the balance of the traces.

        Not the inverse of left (x) right + damping I, but close to it, and it keeps outer products outer products.
        Source: Martens and Grosse 2015, arXiv 1503.05671, section 6.3.
        """
        mean_left = _side_trace(self.left) / _side_size(self.left)
        mean_right = _side_trace(self.right) / _side_size(self.right)
        if damping < 0:
            raise InvalidSetting(f"Factored damping needs damping >= 0, got {damping:g}.")
        if not self.symmetric:
            raise NotImplementedError("A KroneckerOperator that is not symmetric has no inverse in factored form.")
        balance = math.sqrt(mean_right / mean_left) if mean_left > 0 and mean_right > 0 else 1.0
        root = math.sqrt(damping)
        sides = [
            _invert_side(side, shift) for side, shift in ((self.left, root / balance), (self.right, root * balance))
        ]
        return KroneckerOperator(*sides, psd=self.psd)

    def trace(self) -> float:
        return _side_trace(self.left) * _side_trace(self.right)


def _diagonalise(side: Array) -> tuple[Array, Array | None]:
    if side.ndim == 1:
        return precise(side), None
    matrix = precise(side)
    return namespace(matrix).linalg.eigh(matrix)


def _invert_side(side: Array, shift: float) -> Array:
    """(side + shift I)^-1 of a positive semi-definite side; only without a shift can it be singular."""
    xp = namespace(side)
    if side.ndim == 2 and shift > 0:
        matrix = precise(side)
        inverse = xp.linalg.inv(matrix + shift * identity(int(side.shape[0]), matrix))
        return xp.astype((inverse + transpose(inverse)) / 2, side.dtype)
    values, basis = _diagonalise(side)
    inverse = invert_spectrum(values, shift, diagonalised=_side_size(side))
    return xp.astype(inverse if basis is None else (basis * inverse) @ transpose(basis), side.dtype)


class RotationOperator(LinearOperator):
    """G to left^T G right, for orthogonal bases in columns: into the eigenbasis of an `EigenKroneckerOperator`."""

    def __init__(self, left: Array | None, right: Array | None, shape: tuple[int, int]):
        self.left, self.right, self.shape = left, right, shape

    @property
    def input_size(self) -> int:
        return math.prod(self.shape)

    def _turns(self) -> tuple[Array | None, Array | None]:
        return tuple(None if basis is None else transpose(basis) for basis in (self.left, self.right))  # type: ignore[return-value]

    def _apply(self, tensor: Array) -> Array:
        left, right = self._turns()
        return multiply_right(multiply_left(left, tensor.reshape((-1, *self.shape))), right).reshape(tensor.shape)

    def apply_gradient(self, value: Gradient) -> Gradient:
        return value.sandwich(*self._turns())

    def adjoint(self) -> LinearOperator:
        left, right = self._turns()
        return RotationOperator(left, right, self.shape)

    def inverse(self, damping: float = 0.0) -> LinearOperator:
        return super().inverse(damping) if damping else self.adjoint()

    def trace(self) -> float:
        traces = [
            float(size) if basis is None else _side_trace(basis)
            for basis, size in zip((self.left, self.right), self.shape, strict=True)
        ]
        return math.prod(traces)


class EigenKroneckerOperator(LinearOperator):
    """Diagonal in a Kronecker-factored orthogonal basis: G to L (spectrum * (L^T G R)) R^T.

    Shapes: left L [o, o] or None, right R [i, i] or None, spectrum [o, i]. The spectrum is kept in the best precision
    there is; what is applied has the dtype of `like`.
    """

    symmetric = True

    def __init__(self, left: Array | None, right: Array | None, spectrum: Array, *, like: Array):
        xp = namespace(spectrum)
        self.spectrum = spectrum
        self.left, self.right = (None if b is None else xp.astype(b, like.dtype) for b in (left, right))
        self.like = like
        self.psd = bool(xp.all(spectrum >= 0))

    @property
    def input_size(self) -> int:
        return math.prod(self.spectrum.shape)

    @cached_property
    def _weights(self) -> Array:
        return namespace(self.spectrum).astype(self.spectrum, self.like.dtype)

    @cached_property
    def rotation(self) -> RotationOperator:
        return RotationOperator(self.left, self.right, tuple(self.spectrum.shape))

    def with_spectrum(self, spectrum: Array) -> EigenKroneckerOperator:
        """Another spectrum in the same basis."""
        return EigenKroneckerOperator(self.left, self.right, spectrum, like=self.like)

    def _apply(self, tensor: Array) -> Array:
        turned = self.rotation.apply(tensor) * self._weights.reshape((-1,))
        return self.rotation.adjoint().apply(turned)

    def apply_gradient(self, value: Gradient) -> Gradient:
        turned = self.rotation.apply_gradient(value).scale(self._weights)
        return self.rotation.adjoint().apply_gradient(turned)

    def quadratic_gradient(self, value: Gradient) -> Array:
        """In the eigenbasis, without turning back."""
        return self.rotation.apply_gradient(value).quadratic(self._weights)

    def sides(self, queries: Gradient, train_rows: int) -> tuple[LinearOperator, LinearOperator]:
        """Rotate the train rows too, or the queries back: whichever costs less for these numbers of rows."""
        (o, i), positions = self.spectrum.shape, getattr(queries, "positions", None)
        sides_turned = (o * o if self.left is not None else 0, i * i if self.right is not None else 0)
        forth = min(positions or i, i) * sides_turned[0] + min(positions or o, o) * sides_turned[1]
        back = i * sides_turned[0] + o * sides_turned[1]
        if queries.rows * back < train_rows * forth:
            return super().sides(queries, train_rows)
        return ProductOperator(DiagonalOperator(self._weights), self.rotation), self.rotation

    def adjoint(self) -> EigenKroneckerOperator:
        return self

    def inverse(self, damping: float = 0.0) -> EigenKroneckerOperator:
        """Invert spectrum + damping, in the same eigenbasis.

        Units: `damping` is absolute, in the units of the spectrum.
        Errors: SingularOperator if some |spectrum + damping| is below eps times its maximum.
        Source: George et al. 2018, arXiv 1806.03884.
        """
        return self.with_spectrum(invert_spectrum(self.spectrum, damping, diagonalised=sum(self.spectrum.shape)))

    def trace(self) -> float:
        return float(namespace(self.spectrum).sum(self.spectrum))


class SeparableOperator(LinearOperator):
    """Diagonal in a Kronecker-factored basis, the spectrum a sum of R outer products: sum_r u_r v_r^T.

    An outer product stays one (R positions instead of one), so that pairs cost R (o + i) instead of o i.
    Shapes: basis as in `EigenKroneckerOperator`; u [R, o], v [R, i]. `truncation_error`: how far the spectrum is from
    the one it stands for, relative, weighted by the squared curvature.
    """

    symmetric = True

    def __init__(self, basis: EigenKroneckerOperator, u: Array, v: Array, *, truncation_error: float = 0.0):
        self.basis = basis
        self.u, self.v = u, v
        self.truncation_error = truncation_error
        self.psd = bool(namespace(u).all(self.spectrum >= 0))

    @cached_property
    def spectrum(self) -> Array:
        """The spectrum that is applied, [o, i]."""
        return transpose(self.u) @ self.v

    @property
    def input_size(self) -> int:
        return self.basis.input_size

    @cached_property
    def _expansion(self) -> SeparableScale:
        return SeparableScale(self.u, self.v)

    @cached_property
    def _exact(self) -> EigenKroneckerOperator:
        return self.basis.with_spectrum(self.spectrum)

    def _apply(self, tensor: Array) -> Array:
        return self._exact.apply(tensor)

    def apply_gradient(self, value: Gradient) -> Gradient:
        turned = self.basis.rotation.apply_gradient(value)
        return self.basis.rotation.adjoint().apply_gradient(self._expansion.apply_gradient(turned))

    def quadratic_gradient(self, value: Gradient) -> Array:
        return self._exact.quadratic_gradient(value)

    def sides(self, queries: Gradient, train_rows: int) -> tuple[LinearOperator, LinearOperator]:
        if not self._expansion.pays_for(queries):
            return self._exact.sides(queries, train_rows)
        return ProductOperator(self._expansion, self.basis.rotation), self.basis.rotation

    def adjoint(self) -> SeparableOperator:
        return self

    def trace(self) -> float:
        return self._exact.trace()


class SeparableScale(LinearOperator):
    """Elementwise by sum_r u_r v_r^T: an outer product becomes R of them."""

    symmetric = True

    def __init__(self, u: Array, v: Array):
        self.u, self.v = u, v

    @property
    def input_size(self) -> int:
        return int(self.u.shape[1] * self.v.shape[1])

    def pays_for(self, value: Gradient) -> bool:
        """Whether R (o + i) numbers for each position are fewer than o i."""
        o, i = value.shape
        return isinstance(value, Outer) and int(self.u.shape[0]) * value.positions * (o + i) < o * i

    def _apply(self, tensor: Array) -> Array:
        return tensor * (transpose(self.u) @ self.v).reshape((-1,))

    def apply_gradient(self, value: Gradient) -> Gradient:
        if not isinstance(value, Outer) or not self.pays_for(value):
            return value.scale(transpose(self.u) @ self.v)
        full = value._bordered()
        a = (full.a[:, None] * self.v[None, :, None, :]).reshape((value.rows, -1, int(self.v.shape[1])))
        b = (full.b[:, None] * self.u[None, :, None, :]).reshape((value.rows, -1, int(self.u.shape[1])))
        return Outer(a, b)

    def adjoint(self) -> SeparableScale:
        return self

    def trace(self) -> float:
        xp = namespace(self.u)
        return float(xp.sum(xp.sum(self.u, axis=1) * xp.sum(self.v, axis=1)))


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
        small = as_like(xp.eye(int(self.core.shape[0])), self.core) + self.core @ (transpose(self.factor) @ scaled)
        _refuse_singular(xp.linalg.svdvals(small), damping, int(small.shape[0]))
        core = -xp.linalg.solve(small, self.core)
        return LowRankPlusDiagonalOperator(scaled, (core + transpose(core)) / 2, inverse, psd=self.psd and damping >= 0)

    def trace(self) -> float:
        xp = namespace(self.factor)
        return float(xp.sum((self.factor @ self.core) * self.factor) + xp.sum(self.diagonal))
