"""The part of the curvature that a few directions hold: Arnoldi (Lanczos) and Nystroem."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeGuard

from headwater.arrays import namespace
from headwater.curvature.products import CurvatureOperator
from headwater.errors import IndefiniteCurvature, InvalidSetting
from headwater.gradients.provider import StructuredGradientProvider
from headwater.methods.base import FitReads, reads_of_curvature
from headwater.methods.iterative import ProductMethod
from headwater.operators.algebra import LinearOperator
from headwater.operators.approximated import ApproximatedOperator
from headwater.operators.krylov import leading_eigenpairs
from headwater.operators.sketch import fit_nystroem, normal_vectors, refuse_vectors
from headwater.operators.spectrum import Spectrum
from headwater.operators.structured import EigenpairsOperator

Leading = ApproximatedOperator[CurvatureOperator, EigenpairsOperator]
"""The curvature, by products, and the eigenpairs that stand for it."""


@dataclass(frozen=True, kw_only=True)
class LowRankMethod(ProductMethod[Leading]):
    """A curvature seen through `rank` directions; off them there is the damping alone."""

    rank: int = 50
    """How many directions; at most the block's parameters."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.rank, int) or self.rank < 1:
            raise InvalidSetting(f"rank is {self.rank!r}; expected a whole number of at least 1.")

    @property
    def keeps_leading(self) -> bool:
        return True

    @property
    def fit_reads(self) -> FitReads:
        return reads_of_curvature(self.curvature, self.fisher)

    def fit(
        self, provider: StructuredGradientProvider, loader: Iterable[object], progress: bool
    ) -> tuple[OrderedDict[str, Leading], float]:
        operators, rows = self.products(provider, loader, progress)
        return OrderedDict((n, ApproximatedOperator(op, self._leading(op))) for n, op in operators.items()), rows

    def takes(self, curvature: LinearOperator) -> TypeGuard[Leading]:
        return isinstance(curvature, ApproximatedOperator) and isinstance(curvature.approximation, EigenpairsOperator)

    def spectrum(self, curvature: Leading, at_most: int | None = None) -> Spectrum | None:
        """Of the directions that are kept; zero off them."""
        leading = curvature.approximation
        if curvature.psd:  # what is below zero is rounding
            leading = EigenpairsOperator(namespace(leading.values).clip(leading.values, 0.0, None), leading.vectors)
        return leading.eigenvalues(at_most)

    def _leading(self, operator: CurvatureOperator) -> EigenpairsOperator:
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Arnoldi(LowRankMethod):
    """The eigenpairs that are largest in magnitude, by Lanczos with full reorthogonalisation.

    Source: Schioppa et al. 2022, arXiv 2112.03052, which leaves the complement out.
    """

    complement: bool = True
    """Count what the eigenpairs leave out as 1 / damping; without it low and middle curvature are lost."""
    tolerance: float = 1e-3
    """How well the eigenpairs must have converged, relative to the largest."""
    max_products: int | None = None
    """None for ten times the rank."""
    block: int = 4
    """Start vectors; products are cheaper by the block."""
    allow_indefinite: bool = False
    """Keep eigenvalues that are negative at the damping; refused otherwise."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in (("block", self.block), ("max_products", self.max_products)):
            if not (value is None and name == "max_products") and (not isinstance(value, int) or value < 1):
                raise InvalidSetting(f"{name} is {value!r}; expected a whole number of at least 1.")

    def _leading(self, operator: CurvatureOperator) -> EigenpairsOperator:
        rank = min(self.rank, operator.input_size)
        remedy = "Use a lower rank, or smaller blocks (blocks='layer')."
        refuse_vectors(f"Block {operator.block!r}: eigenpairs", rank, operator.input_size, 2, operator.like, remedy)
        start = normal_vectors(self.block, operator.input_size, operator.like, seed=self.seed)
        limit = self.max_products or 10 * self.rank
        return leading_eigenpairs(
            operator, start, self.rank, tolerance=self.tolerance, max_products=limit, label=operator.block
        )

    def invert(self, curvature: Leading, damping: float) -> LinearOperator:
        leading = curvature.approximation
        if curvature.psd:  # what is below zero is rounding
            leading = EigenpairsOperator(namespace(leading.values).clip(leading.values, 0.0, None), leading.vectors)
        lowest = min(float(value) for value in leading.values)
        if lowest + damping < 0 and not self.allow_indefinite:
            raise IndefiniteCurvature(
                f"At damping {damping:g} an eigenvalue is {lowest + damping:g}: not a minimum. A damping of "
                f"{-1.01 * lowest:.3g} would do for those found; curvature='ggn' is never negative."
            )
        return leading.inverse(damping, complement=self.complement)


@dataclass(frozen=True, kw_only=True)
class Nystroem(LowRankMethod):
    """The curvature's part in the range of its product with random vectors. Positive semi-definite curvature only.

    Sources: Williams and Seeger 2000; Hataya and Yamada 2023, arXiv 2302.09726; Frangella, Tropp and Udell 2023.
    """

    def _leading(self, operator: CurvatureOperator) -> EigenpairsOperator:
        return fit_nystroem(operator, operator.like, rank=self.rank, seed=self.seed)

    def invert(self, curvature: Leading, damping: float) -> LinearOperator:
        return curvature.approximation.inverse(damping)
