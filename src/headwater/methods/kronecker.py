"""KFAC and EKFAC: the Fisher information in Kronecker factors, from a laptop to large models."""

from __future__ import annotations

from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Generic, Literal, TypeGuard, TypeVar, get_args

from headwater.curvature.cheapest import ekfac_inverse, kfac_inverse
from headwater.curvature.kronecker import fit_ekfac, fit_kfac
from headwater.errors import InvalidSetting
from headwater.gradients.provider import Fisher, StructuredGradientProvider
from headwater.methods.base import FitReads, Method, check_fisher, reads_of_fisher
from headwater.methods.damping import Damping, Relative
from headwater.operators.algebra import LinearOperator
from headwater.operators.kronecker import EigenKroneckerOperator, KroneckerOperator
from headwater.operators.structured import BlockDiagonalOperator

Piece = TypeVar("Piece", bound=LinearOperator)
"""What stands for one part's Fisher."""
DampingForm = Literal["exact", "factored"]


@dataclass(frozen=True, kw_only=True)
class KroneckerMethod(Method[BlockDiagonalOperator[Piece]], Generic[Piece]):
    """The Fisher information, part by part, in Kronecker factors: which labels it averages over."""

    fisher: Fisher = "auto"
    """Labels: all of them ("exact"), "sampled", the data's own ("empirical"), or "auto": all where they are few."""
    samples: int = 1
    """How many labels are sampled for a row, in each pass."""
    seed: int = 0
    """For sampled labels."""

    def __post_init__(self) -> None:
        check_fisher(self.fisher)
        if not isinstance(self.samples, int) or self.samples < 1:
            raise InvalidSetting(f"samples is {self.samples}; expected a whole number of at least 1.")

    @property
    def fit_reads(self) -> FitReads:
        return reads_of_fisher(self.fisher, "layers")

    @property
    def default_damping(self) -> Damping:
        """0.3 mean eigenvalues: near the best on the leaderboard, whose optimum is flat; see docs/leaderboard.md."""
        return Relative(0.3)

    @property
    def approximates(self) -> str:
        return "empirical_fisher" if self.fisher == "empirical" else "ggn"

    def takes(self, curvature: LinearOperator) -> TypeGuard[BlockDiagonalOperator[Piece]]:
        return isinstance(curvature, BlockDiagonalOperator) and all(map(self.takes_part, curvature.operators))

    @abstractmethod
    def takes_part(self, part: LinearOperator) -> TypeGuard[Piece]:
        """Whether this is of the kind that `fit` gives for a part."""

    def invert(self, curvature: BlockDiagonalOperator[Piece], damping: float) -> LinearOperator:
        return curvature.map(lambda part: self.invert_part(part, damping))

    @abstractmethod
    def invert_part(self, part: Piece, damping: float) -> LinearOperator:
        """(part + damping)^-1, or what stands for it."""


@dataclass(frozen=True)
class Kfac(KroneckerMethod[KroneckerOperator]):
    """The Fisher of each layer as a Kronecker product. Source: Martens and Grosse 2015, arXiv 1503.05671."""

    damping_form: DampingForm = "exact"
    """"exact": added to the product; "factored": shared out to the two factors, so that pairs cost o + i, not o i."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.damping_form not in get_args(DampingForm):
            raise InvalidSetting(f"damping_form is {self.damping_form!r}; expected 'exact' or 'factored'.")

    def fit(
        self, provider: StructuredGradientProvider, loader: Iterable[object], progress: bool
    ) -> tuple[OrderedDict[str, BlockDiagonalOperator[KroneckerOperator]], float]:
        return fit_kfac(provider, loader, fisher=self.fisher, samples=self.samples, seed=self.seed, progress=progress)

    def takes_part(self, part: LinearOperator) -> TypeGuard[KroneckerOperator]:
        return isinstance(part, KroneckerOperator)

    def invert_part(self, part: KroneckerOperator, damping: float) -> LinearOperator:
        return kfac_inverse(part, damping) if self.damping_form == "exact" else part.factored_inverse(damping)


@dataclass(frozen=True)
class Ekfac(KroneckerMethod[EigenKroneckerOperator]):
    """KFAC's eigenbasis with the right eigenvalues. Source: George et al. 2018, arXiv 1806.03884.

    With `rank`, the inverse spectrum is a sum of that many outer products: pairs cost rank (o + i) instead of o i, and
    `truncation_errors` of the fitted influence says what that costs in accuracy.

    Two passes over the rows give the basis and then the spectrum. With `basis_share` the first runs the model on a part
    of the rows only: at .25 a fit costs about three quarters. The spectrum is the best one in whichever basis it is
    (George et al., section 3), so that little is lost where that part has more rows, times positions, than a layer has
    inputs; benchmarks/README.md has figures.
    """

    rank: int | None = None
    """None for the exact inverse spectrum, else how many outer products stand for it."""
    basis_share: float = 1.0
    """The fraction of the rows that the eigenbasis is from, above 0, at most 1; their keys and the seed choose them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank is not None and (not isinstance(self.rank, int) or self.rank < 1):
            raise InvalidSetting(f"rank is {self.rank}; expected at least 1, or None for the exact spectrum.")
        if not isinstance(self.basis_share, (int, float)) or not 0 < self.basis_share <= 1:
            raise InvalidSetting(f"basis_share is {self.basis_share!r}; expected more than 0 and at most 1.")

    @property
    def fit_reads(self) -> FitReads:
        return super().fit_reads if self.basis_share == 1 or self.fisher != "empirical" else "keys"

    def fit(
        self, provider: StructuredGradientProvider, loader: Iterable[object], progress: bool
    ) -> tuple[OrderedDict[str, BlockDiagonalOperator[EigenKroneckerOperator]], float]:
        return fit_ekfac(
            provider,
            loader,
            fisher=self.fisher,
            samples=self.samples,
            seed=self.seed,
            progress=progress,
            basis_share=self.basis_share,
        )

    def takes_part(self, part: LinearOperator) -> TypeGuard[EigenKroneckerOperator]:
        return isinstance(part, EigenKroneckerOperator)

    def invert_part(self, part: EigenKroneckerOperator, damping: float) -> LinearOperator:
        return ekfac_inverse(part, damping, self.rank)
