"""Curvature as a sum over train rows, inverted through the rows: the dual form, exact; and DataInf, which swaps."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, TypeGuard, get_args

from headwater.arrays import namespace, to_numpy
from headwater.curvature.dual import DualOperator, RowSumOperator, SwappedInverse, fit_dual
from headwater.curvature.products import fit_products
from headwater.errors import InvalidSetting
from headwater.gradients.provider import Fisher, StructuredGradientProvider
from headwater.methods.base import FitReads, Method, check_fisher, reads_of_curvature
from headwater.methods.damping import Damping, Relative
from headwater.operators.algebra import LinearOperator
from headwater.operators.spectrum import Spectrum

DualCurvature = Literal["empirical_fisher", "fisher", "ggn"]


@dataclass(frozen=True)
class Dual(Method[DualOperator]):
    """The exact damped inverse through the Gram matrix of the rows' gradients; nothing is D x D, nothing is N x D.

    For m gradients (rows times draws) it takes m^2 ghost products, one m x m factorisation for each damping, and for
    each query two passes over the rows. The natural choice where rows are fewer than parameters.
    """

    curvature: DualCurvature = "empirical_fisher"
    """"empirical_fisher" (one gradient a row), or "fisher" or "ggn" (one for each output; for few outputs)."""
    fisher: Fisher = "auto"
    """For the Fisher: enumerate labels ("exact"), sample them ("sampled"), or whichever suits ("auto")."""
    seed: int = 0
    """For sampled labels."""

    def __post_init__(self) -> None:
        check_fisher(self.fisher)
        if self.curvature not in get_args(DualCurvature):
            known = ", ".join(map(repr, get_args(DualCurvature)))
            raise InvalidSetting(
                f"curvature is {self.curvature!r}; the dual form needs a sum over rows: one of {known}."
            )

    def fit(
        self, provider: StructuredGradientProvider, loader: Iterable[object], progress: bool
    ) -> tuple[OrderedDict[str, DualOperator], float]:
        return fit_dual(provider, loader, self.curvature, fisher=self.fisher, seed=self.seed, progress=progress)

    @property
    def fit_reads(self) -> FitReads:
        return reads_of_curvature(self.curvature, self.fisher)

    @property
    def default_damping(self) -> Damping:
        """10 mean eigenvalues: near the best for exact solves on the leaderboard; see docs/leaderboard.md."""
        return Relative(10.0)

    @property
    def approximates(self) -> str:
        return self.curvature

    def spectrum(self, curvature: DualOperator, at_most: int | None = None) -> Spectrum | None:
        return gram_spectrum(curvature, at_most)

    def takes(self, curvature: LinearOperator) -> TypeGuard[DualOperator]:
        return isinstance(curvature, DualOperator)

    def invert(self, curvature: DualOperator, damping: float) -> LinearOperator:
        return curvature.inverse(damping)


def gram_spectrum(curvature: DualOperator, at_most: int | None = None) -> Spectrum | None:
    """Of Phi^T Phi / W through the Gram matrix Phi Phi^T [m, m], whose eigenvalues are the same but for zeros.

    at_most: None for a larger Gram matrix than this.
    """
    if at_most is not None and len(curvature.kept) > at_most:
        return None
    gram, size = curvature.gram, curvature.input_size
    values = to_numpy(namespace(gram).linalg.eigvalsh(gram))[-size:] / curvature.rows
    eps = float(namespace(gram).finfo(curvature.curvature.like.dtype).eps)
    return Spectrum.of_psd(values, eps, size=size)


@dataclass(frozen=True)
class DataInf(Method[RowSumOperator]):
    """The mean over rows of (g g^T + damping)^-1, in place of the inverse of the mean. Exact for collinear gradients.

    Needs no inverse of any matrix: two passes over the rows for each batch of queries.
    Source: Kwon et al. 2024, arXiv 2310.00902 (its damping is 0.1 times the mean eigenvalue, block by block).
    """

    def fit(
        self, provider: StructuredGradientProvider, loader: Iterable[object], progress: bool
    ) -> tuple[OrderedDict[str, RowSumOperator], float]:
        operators, rows = fit_products(provider, loader, "empirical_fisher", progress=progress)
        return OrderedDict((name, RowSumOperator(operator, rows)) for name, operator in operators.items()), rows

    @property
    def fit_reads(self) -> FitReads:
        return "gradients"

    def takes(self, curvature: LinearOperator) -> TypeGuard[RowSumOperator]:
        return isinstance(curvature, RowSumOperator)

    def invert(self, curvature: RowSumOperator, damping: float) -> LinearOperator:
        return SwappedInverse(curvature, damping)

    @property
    def approximates(self) -> str:
        return "empirical_fisher"
