"""Gradient similarity: no curvature at all, a baseline and a reference."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from headwater.curvature.means import positive_weight, total_weight
from headwater.gradients.normalised import NormalisedGradientProvider
from headwater.gradients.provider import StructuredGradientProvider
from headwater.methods.base import Curvatures, FitReads, Method
from headwater.methods.damping import Damping
from headwater.operators.algebra import IdentityOperator, LinearOperator
from headwater.rows import PlacedBatch, Total, sweep


@dataclass(frozen=True)
class GradDot(Method[LinearOperator]):
    """<grad query, grad train>: one step of gradient descent on the train row. Damping has no meaning here."""

    def fit(
        self, provider: StructuredGradientProvider, loader: Iterable[object], progress: bool
    ) -> tuple[Curvatures, float]:
        weights = Total[PlacedBatch, float](lambda piece: total_weight(provider, piece.batch))
        rows = sweep(provider, loader, weights, "counting rows", progress)
        operators = ((name, IdentityOperator(size)) for name, size in provider.sizes.items())
        return OrderedDict(operators), positive_weight(rows)

    @property
    def fit_reads(self) -> FitReads:
        return "weights"

    def invert(self, curvature: LinearOperator, damping: float) -> LinearOperator:
        return curvature

    @property
    def default_damping(self) -> Damping:
        return 0.0

    @property
    def predicts_removal(self) -> bool:
        return False


@dataclass(frozen=True)
class GradCos(GradDot):
    """The cosine between the two gradients, over all blocks of a model together. Damping has no meaning here."""

    def view(self, provider: StructuredGradientProvider) -> StructuredGradientProvider:
        return provider.each(NormalisedGradientProvider)
