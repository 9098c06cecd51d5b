"""What a method is: frozen settings that turn a provider and a loader into one operator per block, and invert it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Generic, Literal, TypeGuard, TypeVar, get_args

from headwater.errors import InvalidInput
from headwater.gradients.provider import Fisher, StructuredGradientProvider
from headwater.methods.damping import Damping, Relative
from headwater.operators.algebra import LinearOperator
from headwater.operators.spectrum import Spectrum
from headwater.settings import check_word
from headwater.types import field_values

Curvatures = OrderedDict[str, LinearOperator]
FitReads = Literal["weights", "gradients", "layers", "keys", "labels", "model"]
"""What a fit asks of train rows: how much each counts; the gradients of their losses, in any form; those as inputs and
output-gradients of layers; these, and the keys that random numbers are drawn by; gradients of other labels than the
rows' own; or the model itself."""
C = TypeVar("C", bound=LinearOperator)
"""The curvature that a method fits, and inverts."""


@dataclass(frozen=True)
class Method(ABC, Generic[C]):
    """A way to attribute: which curvature, and how it is inverted. Knows no framework.

    `fit` runs over the data once or twice; `invert` is cheap, so that another damping costs nothing.
    """

    @abstractmethod
    def fit(
        self, provider: StructuredGradientProvider, loader: Iterable[object], progress: bool
    ) -> tuple[OrderedDict[str, C], float]:
        """The undamped curvature of each block, a mean over the rows, and the rows' total weight."""

    @abstractmethod
    def invert(self, curvature: C, damping: float) -> LinearOperator:
        """(curvature + damping)^-1, or this method's approximation of it; damping is absolute."""

    def takes(self, curvature: LinearOperator) -> TypeGuard[C]:
        """Whether this is a curvature of the kind that `fit` gives; for one that was read from a file."""
        return True

    def checked(self, curvatures: Mapping[str, LinearOperator]) -> OrderedDict[str, C]:
        """By block, known to be this method's. Errors: InvalidInput for one that `fit` would not have given."""
        return OrderedDict((name, self._checked(name, curvature)) for name, curvature in curvatures.items())

    def _checked(self, name: str, curvature: LinearOperator) -> C:
        if not self.takes(curvature):
            raise InvalidInput(
                f"The curvature of block {name!r} is a {type(curvature).__name__} that {type(self).__name__} does not "
                "fit. Fit again, or load what this method saved."
            )
        return curvature

    @property
    def default_damping(self) -> Damping:
        """What is used when no damping is given."""
        return Relative(0.1)

    @property
    def is_damped(self) -> bool:
        """Whether damping means anything; where it does not, none is taken."""
        return True

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

    @property
    def assumes_minimum(self) -> bool:
        """Whether scores mean what they say only where the mean train gradient is zero."""
        return True

    @property
    def fit_reads(self) -> FitReads:
        """What `fit` asks of train rows; up to "layers", kept gradients may stand for them."""
        return "model"

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
    def keeps_leading(self) -> bool:
        """Whether it sees the curvature through its leading eigenvectors, which are kept as its approximation."""
        return False

    @property
    def allow_indefinite(self) -> bool:
        """Whether negative curvature is accepted."""
        return False

    def spectrum(self, curvature: C, at_most: int | None = None) -> Spectrum | None:
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


def reads_of_fisher(fisher: Fisher, own: FitReads = "gradients") -> FitReads:
    """What a Fisher information needs; own: where it is of the rows' own labels."""
    return own if fisher == "empirical" else "labels"


def reads_of_curvature(curvature: str, fisher: Fisher) -> FitReads:
    """What a curvature of this kind needs."""
    if curvature == "empirical_fisher":
        return "gradients"
    return reads_of_fisher(fisher) if curvature == "fisher" else "model"


def check_fisher(fisher: str) -> None:
    """Errors: InvalidSetting for a word that names no way to choose labels."""
    check_word("fisher", fisher, get_args(Fisher))
