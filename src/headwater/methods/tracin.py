"""TracIn: gradient similarity, summed along training."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Real
from typing import Any

from headwater.errors import InvalidSetting
from headwater.gradients.ensemble import EnsembleProvider
from headwater.gradients.provider import StructuredGradientProvider
from headwater.methods.base import Curvatures, FitReads
from headwater.methods.grad_dot import GradDot
from headwater.operators.algebra import ScaledOperator


@dataclass(frozen=True)
class TracIn(GradDot):
    """sum over checkpoints of learning rate times <grad query, grad train>; damping has no meaning here.

    A sum, not a mean: what gradient descent on the train row took off the query's loss. With one model it is the
    learning rate times GradDot. Errors: InvalidSetting for another number of learning rates than of checkpoints.
    Source: Pruthi et al. 2020, arXiv 2002.08484.
    """

    learning_rates: tuple[float, ...] | float = 1.0
    """One for all checkpoints, or one for each."""

    def __post_init__(self) -> None:
        given: Any = self.learning_rates
        if isinstance(given, str) or not isinstance(given, (Real, Iterable)):
            raise InvalidSetting(f"learning_rates is {given!r}; expected a number, or one for each checkpoint.")
        if not isinstance(given, Real):
            object.__setattr__(self, "learning_rates", tuple(given))
        for rate in (given,) if isinstance(given, Real) else given:
            if isinstance(rate, bool) or not isinstance(rate, Real) or not math.isfinite(rate) or rate < 0:
                raise InvalidSetting(f"A learning rate is {rate!r}; expected a finite number >= 0.")

    def rates(self, checkpoints: int) -> tuple[float, ...]:
        """One for each checkpoint."""
        given = self.learning_rates
        if not isinstance(given, tuple):
            return (float(given),) * checkpoints
        if len(given) != checkpoints:
            raise InvalidSetting(
                f"There are {len(given)} learning rates and {checkpoints} checkpoints; give one rate for all, or one "
                "for each."
            )
        return given

    def view(self, provider: StructuredGradientProvider) -> StructuredGradientProvider:
        """An ensemble's members count with their learning rates, in place of their shares in a mean."""
        if isinstance(provider, EnsembleProvider):
            return provider.with_weights(self.rates(len(provider.members)))
        self.rates(1)
        return provider

    @property
    def fit_reads(self) -> FitReads:
        # How many checkpoints there are is asked of the provider itself; and rows are only counted.
        return "model"

    def fit(
        self, provider: StructuredGradientProvider, loader: Iterable[object], progress: bool
    ) -> tuple[Curvatures, float]:
        operators, rows = super().fit(provider, loader, progress)
        if isinstance(provider, EnsembleProvider):
            return operators, rows
        (rate,) = self.rates(1)
        return OrderedDict((name, ScaledOperator(rate, operator)) for name, operator in operators.items()), rows
