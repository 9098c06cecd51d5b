"""What a method is: frozen settings that turn a provider and a loader into one operator per block, and invert it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, get_args

from headwater.errors import InvalidSetting
from headwater.gradients.provider import Fisher, StructuredGradientProvider
from headwater.methods.damping import Damping, Relative
from headwater.operators.algebra import LinearOperator
from headwater.operators.spectrum import Spectrum
from headwater.types import field_values

Curvatures = OrderedDict[str, LinearOperator]


@dataclass(frozen=True)
class Method(ABC):
    """A way to attribute: which curvature, and how it is inverted. Knows no framework.

    `fit` runs over the data once or twice; `invert` is cheap, so that another damping costs nothing.
    """

    @abstractmethod
    def fit(
        self, provider: StructuredGradientProvider, loader: Iterable[Any], progress: bool
    ) -> tuple[Curvatures, float]:
        """The undamped curvature of each block, a mean over the rows, and the rows' total weight."""

    @abstractmethod
    def invert(self, curvature: LinearOperator, damping: float) -> LinearOperator:
        """(curvature + damping)^-1, or this method's approximation of it; damping is absolute."""

    @property
    def default_damping(self) -> Damping:
        """What is used when no damping is given."""
        return Relative(0.1)

    @property
    def predicts_removal(self) -> bool:
        """Whether score / n_train predicts the change of the query's loss when the row is removed."""
        return True

    @property
    def approximates(self) -> str | None:
        """The curvature whose damped inverse the scores stand for, exactly or nearly; None for a method without one.

        "hessian", "ggn", "fisher" or "empirical_fisher", of what the method's view of the provider differentiates.
        """
        return None

    # Settings that many methods have, as a field with a default, and what holds of those that have not.

    @property
    def seed(self) -> int | None:
        """Of the random numbers; None for a method that draws none."""
        return None

    @property
    def fisher(self) -> Fisher:
        """Which labels the Fisher information is of."""
        return "auto"

    @property
    def allow_indefinite(self) -> bool:
        """Whether negative curvature is accepted."""
        return False

    def spectrum(self, curvature: LinearOperator, at_most: int | None = None) -> Spectrum | None:
        """The eigenvalues of what `invert` damps and inverts, undamped; None where there are only products.

        at_most: None, too, where a matrix larger than this would have to be diagonalised first.
        """
        return curvature.eigenvalues(at_most)

    def view(self, provider: StructuredGradientProvider) -> StructuredGradientProvider:
        """The provider as this method sees it."""
        return provider

    def describe(self) -> str:
        """The settings in words: "Ekfac(fisher='auto', ...)"."""
        options = ", ".join(f"{declared.name}={value!r}" for declared, value in field_values(self))
        return f"{type(self).__name__}({options})"


def check_fisher(fisher: str) -> None:
    """Errors: InvalidSetting for a word that names no way to choose labels."""
    if fisher not in get_args(Fisher):
        raise InvalidSetting(f"fisher is {fisher!r}; expected one of {', '.join(map(repr, get_args(Fisher)))}.")
