"""An operator together with one that stands for it: a preconditioner, a sketch, leading eigenpairs."""

from __future__ import annotations

from typing import Generic, TypeVar

from headwater.arrays import Array
from headwater.operators.algebra import LinearOperator
from headwater.operators.spectrum import Spectrum

Exact = TypeVar("Exact", bound=LinearOperator, covariant=True)
Approximation = TypeVar("Approximation", bound=LinearOperator | None, covariant=True)


class ApproximatedOperator(LinearOperator, Generic[Exact, Approximation]):
    """`exact` in all it does; `approximation` has the structure that makes it easy to invert, or None."""

    symmetric = True

    def __init__(self, exact: Exact, approximation: Approximation):
        self.exact, self.approximation = exact, approximation
        self.psd = exact.psd

    @property
    def input_size(self) -> int:
        return self.exact.input_size

    def _apply(self, tensor: Array) -> Array:
        return self.exact.apply(tensor)

    def adjoint(self) -> LinearOperator:
        return self

    def trace(self) -> float:
        return self.exact.trace()

    def inner_operators(self) -> tuple[LinearOperator, ...]:
        return (self.exact,)

    def spectrum_bounds(self) -> tuple[float, float] | None:
        return self.exact.spectrum_bounds()

    def eigenvalues(self, at_most: int | None = None) -> Spectrum | None:
        return self.exact.eigenvalues(at_most)
