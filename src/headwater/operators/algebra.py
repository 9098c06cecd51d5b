"""Linear maps with the words of algebra: apply, adjoint, +, @, scalar times, shifted, inverse; and two tags.

Layout: an operator maps vectors along the trailing axis, (..., D) to (..., D). An operator that belongs to one part
reads its vectors as matrices [o, i], row by row, and also maps gradient values without making them dense.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from headwater.arrays import Array, device, identity, itemsize, namespace, shape_of, transpose
from headwater.blocks import Layout
from headwater.errors import InvalidInput, ShapeMismatch, SingularOperator
from headwater.gradients.algebra import Dense, Gradient
from headwater.gradients.block import BlockGradient
from headwater.memory import refuse_too_large
from headwater.operators.spectrum import Spectrum
from headwater.types import BilinearForm, Operator


class LinearOperator(Operator[Array, BilinearForm]):
    """A linear map that knows whether it is symmetric and whether it is positive semi-definite."""

    symmetric: bool = False
    psd: bool = False
    truncation_error: float = 0.0
    """How far a spectrum that is cut short is from the one it stands for, relative; see where it is."""

    def _validate_tensor_input(self, tensor: Array) -> None:
        if shape_of(tensor) is None:
            raise InvalidInput(f"An operator applies to an array, not to {type(tensor).__name__}: {tensor!r}.")
        name = str(tensor.dtype).rsplit(".", 1)[-1]
        if not name.startswith(("float", "bfloat")):
            raise InvalidInput(f"{type(self).__name__} applies to floating-point arrays, not to {name}.")

    @abstractmethod
    def adjoint(self) -> LinearOperator:
        """The transposed map."""

    def prepare(self) -> None:
        """Make now what the first product needs, so that its errors show here. Errors: as `apply`."""

    def repeated(self) -> AbstractContextManager[None]:
        """Around many products in a row: what they share may be kept until its end."""
        return nullcontext()

    def inverse(self, damping: float = 0.0) -> LinearOperator:
        """(self + damping I)^-1. Errors: SingularOperator where there is none."""
        raise NotImplementedError(f"{type(self).__name__} has no closed-form inverse.")

    @abstractmethod
    def trace(self) -> float:
        """The sum of the eigenvalues."""

    def mean_eigenvalue(self) -> float:
        """trace / D: the natural unit of damping."""
        return self.trace() / self.input_size

    def spectrum_bounds(self) -> tuple[float, float] | None:
        """The smallest and the largest eigenvalue, of a symmetric operator; None where they are not known.

        Exact where the structure shows them. Where only products are to be had, they are Lanczos' estimates, which lie
        inside the spectrum; the first call then costs a few dozen products.
        """
        return None

    def inner_operators(self) -> tuple[LinearOperator, ...]:
        """The operators that its trace and the ends of its spectrum are taken from, if they are not its own."""
        return ()

    @property
    def trace_error(self) -> float:
        """Standard error of `trace` where it is estimated; zero where it is exact."""
        return max((inner.trace_error for inner in self.inner_operators()), default=0.0)

    @property
    def known_bounds(self) -> tuple[float, float] | None:
        """`spectrum_bounds` if products that were made before have shown them; asking costs nothing."""
        return next((found for inner in self.inner_operators() if (found := inner.known_bounds) is not None), None)

    def eigenvalues(self, at_most: int | None = None) -> Spectrum | None:
        """All eigenvalues of a symmetric operator; None where there are only products, or it is not symmetric.

        at_most: None, too, where that would take diagonalising a matrix larger than this which is not diagonalised yet.
        """
        return None

    def effective_dof(self, dampings: Sequence[float], at_most: int | None = None) -> np.ndarray | None:
        """tr(C (C + damping)^-1) for each damping, from one decomposition: [dampings]; see `Spectrum.effective_dof`.

        None where `eigenvalues` are not known. For an operator of products, `sketch.estimate_spectra` estimates it.
        """
        found = self.eigenvalues(at_most)
        return None if found is None else found.effective_dof(dampings)

    def shifted(self, shift: float) -> LinearOperator:
        """self + shift I."""
        return SumOperator(self, ScaledOperator(shift, IdentityOperator(self.input_size)))

    def apply_gradient(self, value: Gradient) -> Gradient:
        """Map every row of a gradient value of this operator's part."""
        flat = self.apply(value.dense().reshape((value.rows, self.input_size)))
        return Dense(flat.reshape((value.rows, *value.shape)))

    def apply_block(self, value: BlockGradient) -> BlockGradient:
        """Map every row of a whole block's gradients."""
        return BlockGradient.from_flat(value.layout, self.apply(value.flat()))

    def seen(self, value: BlockGradient) -> BlockGradient:
        """What this operator's method has of rows: all of them, unless it stores gradients cut short."""
        return value

    def stored(self, value: BlockGradient) -> BlockGradient:
        """What has to be kept of rows so that they can meet queries later: all, unless they meet in a smaller space."""
        return value

    @property
    def stored_layout(self) -> Layout | None:
        """Of what `stored` gives, where that is another space than the block's own; None where it is not."""
        return None

    def kept_sides(self, queries: BlockGradient) -> tuple[LinearOperator, LinearOperator]:
        """What query gradients go through to be kept, and what rows do that were `stored`, or are to be."""
        if self.stored_layout is None:
            return self, IdentityOperator(self.input_size)
        # In the smaller space; of a projection the sides depend neither on the queries nor on their number.
        return self.block_sides(queries, 1.0)

    def lifted(self, flat: Array) -> Array:
        """Vectors of the space of `stored_layout` in the block's own: (K, small D) to (K, D)."""
        return flat

    @property
    def keeps_rows(self) -> bool:
        """Whether this, as the side that train rows go through, leaves what is `stored` of them as it is."""
        return False

    def sides(self, queries: Gradient, train_per_query: float) -> tuple[LinearOperator, LinearOperator]:
        """Two maps L and R with <self g, h> = <L g, R h>: what to do once per query, and once per train row.

        An operator that is diagonal in a rotated basis need not rotate back: both sides may meet in that basis. What is
        cheaper depends on the number of train rows for each query; the scores are the same.
        """
        return self, IdentityOperator(self.input_size)

    def quadratic_gradient(self, value: Gradient) -> Array:
        """<self g, g> of each row of a gradient value: [n]."""
        rows = [
            rowwise_inner(self.apply_gradient(piece).dense(), piece.dense())
            for _, piece in value.chunks(4 * self.input_size)
        ]
        return namespace(value.arrays[0]).concat(rows, axis=0)

    def quadratic(self, value: BlockGradient) -> Array:
        """<self g, g> of each row of a whole block's gradients: [n]."""
        chunks = [(self.apply(flat), flat) for flat in value.flat_chunks()]
        return namespace(value.like).concat([rowwise_inner(left, right) for left, right in chunks], axis=0)

    def block_sides(self, queries: BlockGradient, train_per_query: float) -> tuple[LinearOperator, LinearOperator]:
        """`sides`, for an operator on a whole block."""
        return self, IdentityOperator(self.input_size)

    def dense(self, like: Array) -> Array:
        """The matrix [D, D], in the dtype of `like`; for checks and small operators."""
        size = self.input_size
        remedy = "Apply it to vectors instead."
        refuse_too_large(
            f"The matrix of a {type(self).__name__}", (size, size), 2 * size**2 * itemsize(like), remedy, device(like)
        )
        # `apply` maps rows: row k of the result is A e_k, a column of A.
        return transpose(self.apply(identity(self.input_size, like)))

    def __add__(self, other: LinearOperator) -> LinearOperator:
        return SumOperator(self, other)

    def __matmul__(self, other: LinearOperator) -> LinearOperator:
        return ProductOperator(self, other)

    def __mul__(self, factor: float) -> LinearOperator:
        return ScaledOperator(float(factor), self)

    __rmul__ = __mul__


def rowwise_inner(left: Array, right: Array) -> Array:
    """Row by row dot products of [n, ...] and [n, ...]: [n]."""
    product = left * right
    return namespace(product).sum(product, axis=tuple(range(1, product.ndim)))


def spread(values: Iterable[float]) -> tuple[float, float]:
    """The smallest and the largest of some numbers."""
    numbers = list(values)
    return min(numbers), max(numbers)


def ends(values: Array) -> tuple[float, float]:
    """The smallest and the largest number of an array."""
    xp = namespace(values)
    return float(xp.min(values)), float(xp.max(values))


def _same_size(first: Operator, second: Operator) -> int:
    if first.input_size != second.input_size:
        raise ShapeMismatch(
            f"{type(first).__name__} has input_size {first.input_size}, "
            f"{type(second).__name__} has {second.input_size}: they cannot be combined."
        )
    return first.input_size


class IdentityOperator(LinearOperator):
    """Every vector to itself."""

    symmetric = psd = True

    def __init__(self, input_size: int):
        self._size = int(input_size)

    @property
    def input_size(self) -> int:
        return self._size

    def _apply(self, tensor: Array) -> Array:
        return tensor

    @property
    def keeps_rows(self) -> bool:
        return True

    def apply_gradient(self, value: Gradient) -> Gradient:
        return value

    def apply_block(self, value: BlockGradient) -> BlockGradient:
        return value

    def quadratic_gradient(self, value: Gradient) -> Array:
        return value.quadratic()

    def quadratic(self, value: BlockGradient) -> Array:
        return value.squared_norms()

    def adjoint(self) -> IdentityOperator:
        return self

    def inverse(self, damping: float = 0.0) -> LinearOperator:
        if 1.0 + damping == 0.0:
            raise SingularOperator("The identity minus itself has no inverse (damping is -1).")
        return ScaledOperator(1.0 / (1.0 + damping), self)

    def trace(self) -> float:
        return float(self._size)

    def spectrum_bounds(self) -> tuple[float, float] | None:
        return 1.0, 1.0

    def eigenvalues(self, at_most: int | None = None) -> Spectrum | None:
        return Spectrum(np.ones(1), np.full(1, float(self._size)))


class ScaledOperator(LinearOperator):
    """A number times an operator."""

    def __init__(self, factor: float, inner: LinearOperator):
        self.factor = float(factor)
        self.inner = inner
        self.symmetric = inner.symmetric
        self.psd = inner.psd and self.factor >= 0

    @property
    def input_size(self) -> int:
        return self.inner.input_size

    def as_bilinear_form(self) -> BilinearForm:
        form = self.inner.as_bilinear_form()
        return super().as_bilinear_form() if form.is_default_of(self.inner) else ScaledForm(self.factor, form)

    def _apply(self, tensor: Array) -> Array:
        return self.inner.apply(tensor) * self.factor

    def apply_gradient(self, value: Gradient) -> Gradient:
        return self.inner.apply_gradient(value).weighted(self._factors(value.rows, value.arrays[0]))

    def apply_block(self, value: BlockGradient) -> BlockGradient:
        return self.inner.apply_block(value).weighted(self._factors(value.rows, value.like))

    def seen(self, value: BlockGradient) -> BlockGradient:
        return self.inner.seen(value)

    def stored(self, value: BlockGradient) -> BlockGradient:
        return self.inner.stored(value)

    @property
    def stored_layout(self) -> Layout | None:
        return self.inner.stored_layout

    def lifted(self, flat: Array) -> Array:
        return self.inner.lifted(flat)

    def _factors(self, rows: int, like: Array) -> Array:
        return namespace(like).full((rows,), self.factor, dtype=like.dtype, device=device(like))

    def sides(self, queries: Gradient, train_per_query: float) -> tuple[LinearOperator, LinearOperator]:
        left, right = self.inner.sides(queries, train_per_query)
        return ScaledOperator(self.factor, left), right

    def block_sides(self, queries: BlockGradient, train_per_query: float) -> tuple[LinearOperator, LinearOperator]:
        left, right = self.inner.block_sides(queries, train_per_query)
        return ScaledOperator(self.factor, left), right

    def quadratic_gradient(self, value: Gradient) -> Array:
        return self.inner.quadratic_gradient(value) * self.factor

    def quadratic(self, value: BlockGradient) -> Array:
        return self.inner.quadratic(value) * self.factor

    def adjoint(self) -> LinearOperator:
        return ScaledOperator(self.factor, self.inner.adjoint())

    def inverse(self, damping: float = 0.0) -> LinearOperator:
        if self.factor == 0.0:
            if damping == 0.0:
                raise SingularOperator("Zero times an operator has no inverse without damping.")
            return ScaledOperator(1.0 / damping, IdentityOperator(self.input_size))
        # (c A + d I)^-1 = (A + d / c I)^-1 / c.
        return ScaledOperator(1.0 / self.factor, self.inner.inverse(damping / self.factor))

    def trace(self) -> float:
        return self.factor * self.inner.trace()

    def spectrum_bounds(self) -> tuple[float, float] | None:
        bounds = self.inner.spectrum_bounds()
        return None if bounds is None else spread([self.factor * bound for bound in bounds])

    def eigenvalues(self, at_most: int | None = None) -> Spectrum | None:
        found = self.inner.eigenvalues(at_most)
        return None if found is None else found.scaled(self.factor)


class ScaledForm(BilinearForm[Array, Any, Any]):
    """A number times a bilinear form."""

    def __init__(self, factor: float, inner: BilinearForm):
        self.factor = factor
        self.inner = inner

    def inner_prod(self, left: Array, right: Array | None) -> Array:
        return self.inner.inner_prod(left, right) * self.factor

    def grads_inner_prod(self, left: object, right: object, gradient_provider: object) -> Array:
        return self.inner.grads_inner_prod(left, right, gradient_provider) * self.factor

    def mixed_grads_inner_prod(self, left: object, right: object, gradient_provider: object) -> Array:
        return self.inner.mixed_grads_inner_prod(left, right, gradient_provider) * self.factor

    def with_inner_product(self, product: Callable[[Array, Array], Array]) -> ScaledForm:
        return ScaledForm(self.factor, self.inner.with_inner_product(product))


class SumOperator(LinearOperator):
    """Two operators, added."""

    def __init__(self, first: LinearOperator, second: LinearOperator):
        self._size = _same_size(first, second)
        self.first, self.second = first, second
        self.symmetric = first.symmetric and second.symmetric
        self.psd = first.psd and second.psd

    @property
    def input_size(self) -> int:
        return self._size

    def _apply(self, tensor: Array) -> Array:
        return self.first.apply(tensor) + self.second.apply(tensor)

    def adjoint(self) -> LinearOperator:
        return SumOperator(self.first.adjoint(), self.second.adjoint())

    def inverse(self, damping: float = 0.0) -> LinearOperator:
        """In closed form where one term is a multiple of the identity."""
        for term, other in ((self.first, self.second), (self.second, self.first)):
            shift = _multiple_of_identity(other)
            if shift is not None:
                # A shift by the identity is damping by another name: no decomposition of the sum is needed.
                return term.inverse(damping + shift)
        return super().inverse(damping)

    def trace(self) -> float:
        return self.first.trace() + self.second.trace()

    def eigenvalues(self, at_most: int | None = None) -> Spectrum | None:
        """Where one term is a multiple of the identity."""
        for term, other in ((self.first, self.second), (self.second, self.first)):
            shift = _multiple_of_identity(other)
            if shift is not None:
                found = term.eigenvalues(at_most)
                return None if found is None else found.shifted(shift)
        return None


def _multiple_of_identity(operator: LinearOperator) -> float | None:
    if isinstance(operator, IdentityOperator):
        return 1.0
    if isinstance(operator, ScaledOperator):
        inner = _multiple_of_identity(operator.inner)
        return None if inner is None else operator.factor * inner
    return None


class ProductOperator(LinearOperator):
    """One operator after another: (first @ second) v = first(second(v))."""

    def __init__(self, first: LinearOperator, second: LinearOperator):
        self._size = _same_size(first, second)
        self.first, self.second = first, second

    @property
    def input_size(self) -> int:
        return self._size

    def _apply(self, tensor: Array) -> Array:
        return self.first.apply(self.second.apply(tensor))

    def apply_gradient(self, value: Gradient) -> Gradient:
        return self.first.apply_gradient(self.second.apply_gradient(value))

    def adjoint(self) -> LinearOperator:
        return ProductOperator(self.second.adjoint(), self.first.adjoint())

    def inverse(self, damping: float = 0.0) -> LinearOperator:
        if damping:
            return super().inverse(damping)
        return ProductOperator(self.second.inverse(), self.first.inverse())

    def trace(self) -> float:
        raise NotImplementedError("The trace of a product needs its matrix: use dense().")
