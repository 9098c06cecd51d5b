"""An operator together with one that stands for it: a preconditioner, a sketch, leading eigenpairs."""

from __future__ import annotations

from typing import Generic, TypeVar

from headwater.operators.algebra import LinearOperator
from headwater.operators.forwarded import ForwardedOperator

Exact = TypeVar("Exact", bound=LinearOperator, covariant=True)
Approximation = TypeVar("Approximation", bound=LinearOperator | None, covariant=True)


class ApproximatedOperator(ForwardedOperator, Generic[Exact, Approximation]):
    """`exact` in all it does; `approximation` has the structure that makes it easy to invert, or None."""

    def __init__(self, exact: Exact, approximation: Approximation):
        self.exact, self.approximation = exact, approximation
        self.psd = exact.psd

    @property
    def acts_as(self) -> Exact:
        return self.exact
