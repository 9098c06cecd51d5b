"""The exact influence function: a dense curvature, inverted once. The reference for all other methods."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeGuard

from headwater.curvature.exact import Curvature, check_kind, fit_dense
from headwater.gradients.provider import Fisher, StructuredGradientProvider
from headwater.methods.base import FitReads, Method, check_fisher, reads_of_curvature
from headwater.methods.damping import Damping, Relative
from headwater.operators.algebra import LinearOperator
from headwater.operators.structured import DenseOperator


@dataclass(frozen=True)
class Direct(Method[DenseOperator]):
    """g_query^T (C + damping I)^-1 g_train with C dense. Source: Koh and Liang 2017, arXiv 1703.04730."""

    curvature: Curvature = "ggn"
    """"hessian", "ggn", "fisher" or "empirical_fisher", of the mean loss."""
    fisher: Fisher = "auto"
    """For the Fisher: enumerate labels ("exact"), sample them ("sampled"), or whichever suits ("auto")."""
    seed: int = 0
    """For sampled labels."""
    allow_indefinite: bool = False
    """Invert a Hessian although it has negative eigenvalues at the damping; refused otherwise."""

    def __post_init__(self) -> None:
        check_kind(self.curvature)
        check_fisher(self.fisher)

    def fit(
        self, provider: StructuredGradientProvider, loader: Iterable[object], progress: bool
    ) -> tuple[OrderedDict[str, DenseOperator], float]:
        return fit_dense(provider, loader, self.curvature, fisher=self.fisher, seed=self.seed, progress=progress)

    @property
    def fit_reads(self) -> FitReads:
        return reads_of_curvature(self.curvature, self.fisher)

    def takes(self, curvature: LinearOperator) -> TypeGuard[DenseOperator]:
        return isinstance(curvature, DenseOperator)

    def invert(self, curvature: DenseOperator, damping: float) -> LinearOperator:
        return curvature.inverse(damping, allow_indefinite=self.allow_indefinite)

    @property
    def default_damping(self) -> Damping:
        """10 mean eigenvalues: near the best for exact solves on the leaderboard; see docs/leaderboard.md."""
        return Relative(10.0)

    @property
    def approximates(self) -> str:
        return self.curvature
