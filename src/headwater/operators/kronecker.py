"""Operators on one part that are Kronecker products, or diagonal in a Kronecker-factored basis.

Layout: the operator of a part with matrices [o, i] reads its vectors row by row, so that the Kronecker product
`left (x) right` with left [o, o] and right [i, i] maps G to left G right^T. A side may be a vector (a diagonal matrix)
or, for an eigenbasis, None (the identity).
"""

from __future__ import annotations

import math
from functools import cached_property

import numpy as np

from headwater.arrays import Array, identity, namespace, precise, to_numpy, transpose
from headwater.errors import InvalidSetting
from headwater.gradients.algebra import Gradient, multiply_left, multiply_right
from headwater.gradients.outer import Outer
from headwater.operators.algebra import LinearOperator, ProductOperator, ends
from headwater.operators.spectrum import Spectrum
from headwater.operators.structured import DiagonalOperator, invert_spectrum


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
        self._eigen: EigenKroneckerOperator | None = None
        self._eigenvalues: tuple[np.ndarray, np.ndarray] | None = None

    @property
    def input_size(self) -> int:
        return _side_size(self.left) * _side_size(self.right)

    def _apply(self, tensor: Array) -> Array:
        # (left (x) right) vec(G) = vec(left G right^T) for vectors read row by row: two small products, no D x D
        # matrix.
        values = tensor.reshape((-1, _side_size(self.left), _side_size(self.right)))
        return multiply_right(multiply_left(self.left, values), self.right).reshape(tensor.shape)

    def apply_gradient(self, value: Gradient) -> Gradient:
        return value.sandwich(self.left, self.right)

    def adjoint(self) -> LinearOperator:
        if self.symmetric:
            return self
        left, right = (side if side.ndim == 1 else transpose(side) for side in (self.left, self.right))
        return KroneckerOperator(left, right, symmetric=False)

    @property
    def eigen(self) -> EigenKroneckerOperator:
        """The same operator in its eigenbasis, which is computed once."""
        if self._eigen is None:
            self._eigen = self._diagonalised()
        return self._eigen

    def _diagonalised(self) -> EigenKroneckerOperator:
        (left_values, left_basis), (right_values, right_basis) = _diagonalise(self.left), _diagonalise(self.right)
        # Eigenvalues of a Kronecker product are all products of the factors' eigenvalues.
        spectrum = left_values[:, None] * right_values[None, :]
        self._eigenvalues = to_numpy(left_values), to_numpy(right_values)
        return EigenKroneckerOperator(left_basis, right_basis, spectrum, like=self.right)

    def inverse(self, damping: float = 0.0) -> LinearOperator:
        """Exact: (left (x) right + damping I)^-1, in the eigenbasis; symmetric operators only."""
        return self.eigen.inverse(damping) if self.symmetric else super().inverse(damping)

    @property
    def eigenvalues_of_sides(self) -> tuple[np.ndarray, np.ndarray]:
        """[o] and [i], on the host in float64: what the spectrum of `eigen` is the products of."""
        if self._eigenvalues is None:
            self._eigen = self._diagonalised()
        assert self._eigenvalues is not None
        return self._eigenvalues

    def factored_inverse(self, damping: float) -> KroneckerOperator:
        """(left + (s / p) I)^-1 (x) (right + s p I)^-1, with s the root of the damping and p the balance of the traces.

        Not the inverse of left (x) right + damping I, but close to it, and it keeps outer products outer products.
        Source: Martens and Grosse 2015, arXiv 1503.05671, section 6.3.
        Errors: InvalidSetting for negative damping; NotImplementedError unless symmetric.
        """
        mean_left = _side_trace(self.left) / _side_size(self.left)
        mean_right = _side_trace(self.right) / _side_size(self.right)
        if damping < 0:
            raise InvalidSetting(f"Factored damping needs damping >= 0, got {damping:g}.")
        if not self.symmetric:
            raise NotImplementedError("A KroneckerOperator that is not symmetric has no inverse in factored form.")
        # pi of section 6.3: factors are known up to a scale only, and damping must not depend on how it was split.
        balance = math.sqrt(mean_right / mean_left) if mean_left > 0 and mean_right > 0 else 1.0
        root = math.sqrt(damping)
        sides = [
            # The factors' shifts multiply to the damping: (s / p) (s p) = s^2.
            _invert_side(side, shift)
            for side, shift in ((self.left, root / balance), (self.right, root * balance))
        ]
        return KroneckerOperator(*sides, psd=self.psd)

    def trace(self) -> float:
        return _side_trace(self.left) * _side_trace(self.right)

    def spectrum_bounds(self) -> tuple[float, float] | None:
        return self.eigen.spectrum_bounds() if self.symmetric else None

    def eigenvalues(self, at_most: int | None = None) -> Spectrum | None:
        sizes = [_side_size(side) for side in (self.left, self.right)]
        matrices = [size for size, side in zip(sizes, (self.left, self.right), strict=True) if side.ndim == 2]
        # The cost is the eigendecomposition of the factors, not the o x i products of their eigenvalues.
        costly = at_most is not None and max(matrices, default=0) > at_most and self._eigen is None
        if not self.symmetric or costly:
            return None
        values, eps = to_numpy(self.eigen.spectrum), float(namespace(self.right).finfo(self.right.dtype).eps)
        # Each factor's eigenvalues are off by about its size times eps; relative errors add in the product.
        rounding = sum(sizes) * eps * float(abs(values).max())
        return Spectrum.of(values.clip(0.0) if self.psd else values, rounding=rounding)


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
        # A general inverse is symmetric only within rounding; the adjoint is taken to be the operator itself.
        return xp.astype((inverse + transpose(inverse)) / 2, side.dtype)
    values, basis = _diagonalise(side)
    inverse = invert_spectrum(values, shift, diagonalised=_side_size(side))
    return xp.astype(inverse if basis is None else (basis * inverse) @ transpose(basis), side.dtype)


SUMMING = 32
"""What each term of a pair's sum costs beside its two dot products, in multiply-adds: it is written, read and added."""


def sum_cost(terms: int, o: int, i: int) -> int:
    """Multiply-adds in which so many outer products meet one, [o, i]: a dense matrix takes o i."""
    return terms * (o + i + SUMMING)


def longest_sum(o: int, i: int) -> int:
    """The most outer products that meet one in fewer multiply-adds than a dense matrix [o, i] does."""
    return (o * i - 1) // sum_cost(1, o, i)


class RotationOperator(LinearOperator):
    """G to left^T G right, for orthogonal bases in columns: into the eigenbasis of an `EigenKroneckerOperator`."""

    def __init__(self, left: Array | None, right: Array | None, shape: tuple[int, int]):
        self.left, self.right, self.shape = left, right, shape

    @property
    def input_size(self) -> int:
        return math.prod(self.shape)

    def turns(self) -> tuple[Array | None, Array | None]:
        left, right = (None if basis is None else transpose(basis) for basis in (self.left, self.right))
        return left, right

    def _apply(self, tensor: Array) -> Array:
        left, right = self.turns()
        return multiply_right(multiply_left(left, tensor.reshape((-1, *self.shape))), right).reshape(tensor.shape)

    def apply_gradient(self, value: Gradient) -> Gradient:
        return value.sandwich(*self.turns())

    def adjoint(self) -> LinearOperator:
        left, right = self.turns()
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
        # Bases in the gradients' dtype: they turn gradients at every product, and float64 there would double the cost.
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
        return RotationOperator(self.left, self.right, (self.spectrum.shape[0], self.spectrum.shape[1]))

    def with_spectrum(self, spectrum: Array) -> EigenKroneckerOperator:
        """Another spectrum in the same basis."""
        return EigenKroneckerOperator(self.left, self.right, spectrum, like=self.like)

    def _apply(self, tensor: Array) -> Array:
        rotated = self.rotation.apply(tensor) * self._weights.reshape((-1,))
        return self.rotation.adjoint().apply(rotated)

    def apply_gradient(self, value: Gradient) -> Gradient:
        rotated = self.rotation.apply_gradient(value).scale(self._weights)
        return self.rotation.adjoint().apply_gradient(rotated)

    def quadratic_gradient(self, value: Gradient) -> Array:
        """In the eigenbasis, without turning back."""
        # |L^T G R|^2 weighted: turning back is orthogonal and would not change the sum.
        return self.rotation.apply_gradient(value).quadratic(self._weights)

    def sides(self, queries: Gradient, train_per_query: float) -> tuple[LinearOperator, LinearOperator]:
        """Rotate the train rows too, or the queries back: whichever costs less."""
        (o, i), positions = self.spectrum.shape, queries.positions
        rotation_costs = (o * o if self.left is not None else 0, i * i if self.right is not None else 0)
        # Turning an outer product costs its positions only; a dense gradient, its full other side.
        forth = min(positions or i, i) * rotation_costs[0] + min(positions or o, o) * rotation_costs[1]
        # A query, once scaled, is dense: rotated back once, it then meets train rows as they are.
        back = i * rotation_costs[0] + o * rotation_costs[1]
        # Either the query is rotated back once, or every train row is rotated forth.
        if back < train_per_query * forth:
            return super().sides(queries, train_per_query)
        # <L S (L^T g R) R^T, h> = <S (L^T g R), L^T h R>: the score is the same number in the eigenbasis.
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

    def spectrum_bounds(self) -> tuple[float, float] | None:
        return ends(self.spectrum)

    def eigenvalues(self, at_most: int | None = None) -> Spectrum | None:
        return Spectrum.of(to_numpy(self.spectrum))


class SeparableOperator(LinearOperator):
    """Diagonal in a Kronecker-factored basis, the spectrum a sum of R outer products: sum_r u_r v_r^T.

    An outer product stays one (R positions instead of one), so that pairs cost R (o + i) instead of o i.
    Shapes: basis as in `EigenKroneckerOperator`; u [R, o], v [R, i]. `truncation_error`: how far the spectrum is from
    the one it stands for, relative; of KFAC the worst entry, of EKFAC a mean weighted by the squared curvature.
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
        rotated = self.basis.rotation.apply_gradient(value)
        return self.basis.rotation.adjoint().apply_gradient(self._expansion.apply_gradient(rotated))

    def quadratic_gradient(self, value: Gradient) -> Array:
        return self._exact.quadratic_gradient(value)

    def sides(self, queries: Gradient, train_per_query: float) -> tuple[LinearOperator, LinearOperator]:
        # Many positions times R terms may cost more than the dense matrix: then exact is cheaper, too.
        if not self._expansion.pays_for_pairs(queries):
            return self._exact.sides(queries, train_per_query)
        return ProductOperator(self._expansion, self.basis.rotation), self.basis.rotation

    def adjoint(self) -> SeparableOperator:
        return self

    def trace(self) -> float:
        return self._exact.trace()

    def eigenvalues(self, at_most: int | None = None) -> Spectrum | None:
        return self._exact.eigenvalues(at_most)


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

    def pays_for_pairs(self, value: Gradient) -> bool:
        """Whether rows with as many positions meet in fewer multiply-adds than o i."""
        if not isinstance(value, Outer):
            return False
        return sum_cost(int(self.u.shape[0]) * value.positions**2, *value.shape) < math.prod(value.shape)

    def _apply(self, tensor: Array) -> Array:
        return tensor * (transpose(self.u) @ self.v).reshape((-1,))

    def apply_gradient(self, value: Gradient) -> Gradient:
        if not isinstance(value, Outer) or not self.pays_for(value):
            return value.scale(transpose(self.u) @ self.v)
        full = value.bordered()
        # (u_r b)(v_r a)^T summed over r is the elementwise product with sum_r u_r v_r^T: R positions for each.
        a = (full.a[:, None] * self.v[None, :, None, :]).reshape((value.rows, -1, int(self.v.shape[1])))
        b = (full.b[:, None] * self.u[None, :, None, :]).reshape((value.rows, -1, int(self.u.shape[1])))
        return Outer(a, b)

    def adjoint(self) -> SeparableScale:
        return self

    def trace(self) -> float:
        xp = namespace(self.u)
        return float(xp.sum(xp.sum(self.u, axis=1) * xp.sum(self.v, axis=1)))
