"""An operator that does as another does: a base for those that know more of it than its products."""

from __future__ import annotations

from abc import abstractmethod
from contextlib import AbstractContextManager

from headwater.arrays import Array
from headwater.operators.algebra import LinearOperator
from headwater.operators.spectrum import Spectrum


class ForwardedOperator(LinearOperator):
    """`acts_as` in all it does; a symmetric operator."""

    symmetric = True

    @property
    @abstractmethod
    def acts_as(self) -> LinearOperator:
        """The operator whose products, trace and spectrum these are."""

    @property
    def input_size(self) -> int:
        return self.acts_as.input_size

    def _apply(self, tensor: Array) -> Array:
        return self.acts_as.apply(tensor)

    def repeated(self) -> AbstractContextManager[None]:
        return self.acts_as.repeated()

    def adjoint(self) -> LinearOperator:
        return self

    def trace(self) -> float:
        return self.acts_as.trace()

    def inner_operators(self) -> tuple[LinearOperator, ...]:
        return (self.acts_as,)

    def spectrum_bounds(self) -> tuple[float, float] | None:
        return self.acts_as.spectrum_bounds()

    def eigenvalues(self, at_most: int | None = None) -> Spectrum | None:
        return self.acts_as.eigenvalues(at_most)
