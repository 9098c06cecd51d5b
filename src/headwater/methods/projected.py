"""Projected gradients: rows become few numbers, and curvature is a small matrix between them."""

from __future__ import annotations

from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeGuard, TypeVar, get_args

from headwater.arrays import Array, as_like, device, identity, namespace, transpose
from headwater.blocks import Layout, Part
from headwater.curvature.dual import DualOperator, fit_dual
from headwater.curvature.kronecker import fit_kfac
from headwater.curvature.moments import fit_moments
from headwater.errors import InvalidSetting
from headwater.gradients.block import BlockGradient
from headwater.gradients.margin import MarginGradientProvider
from headwater.gradients.provider import Fisher, StructuredGradientProvider
from headwater.methods.base import FitReads, Method, check_fisher, reads_of_fisher
from headwater.methods.dual import gram_spectrum
from headwater.operators.algebra import LinearOperator
from headwater.operators.kronecker import KroneckerOperator
from headwater.operators.projected import ProjectedOperator
from headwater.operators.projection import (
    KroneckerProjection,
    LowRankProjection,
    Make,
    RandomProjection,
    Side,
    column_streams,
    gaussian_side,
    row_streams,
    sparse_side,
)
from headwater.operators.spectrum import Spectrum
from headwater.operators.structured import LowRankPlusDiagonalOperator
from headwater.random import PROJECTION_VERSION
from headwater.settings import check_word

Moments = TypeVar("Moments", bound=ProjectedOperator | DualOperator)
"""Of projected gradients; or through all pairs of rows, where nothing is projected."""
Output = Literal["margin", "loss"]
Projecting = Literal["mixed", "dense"]
Init = Literal["random", "pca"]
Sides = Sequence[tuple[Side, Side]]


@dataclass(frozen=True, kw_only=True)
class ProjectedMethod(Method[Moments]):
    """Second moments of projected gradients, inverted in the projected space; relative damping is relative to them.

    Zero damping is allowed, unless a block is projected to as many numbers as there are rows or more: what is left is
    noise then, and `fit` says so.
    """

    seed: int = 0
    """For the random numbers of the projection, and for sampled labels."""
    projection_version: int = field(default=PROJECTION_VERSION, init=False)
    """Which random numbers: scores of another version are other scores."""

    def invert(self, curvature: Moments, damping: float) -> LinearOperator:
        return curvature.inverse(damping)

    @property
    def approximates(self) -> str:
        return "empirical_fisher"


@dataclass(frozen=True)
class Trak(ProjectedMethod[ProjectedOperator | DualOperator]):
    """TRAK: margins' gradients, projected at random over the whole block, for one model or several.

    score = phi_query^T (mean of phi phi^T + damping)^-1 phi_train (1 - p_train), with phi the projected gradient of the
    margin log p/(1-p) and p the probability of the row's target. As published, damping is zero; the default is
    Relative(0.1), which is meaningful for any dimension, keeps directions that few rows have from deciding the
    scores, and costs nothing. A measurement of your own takes the margin's place for query rows.

    A margin takes a cross entropy, of logits, with one label a row; any other loss takes output="loss". What phi_train
    (1 - p_train) stands for is the gradient of the row's loss, with class weights where the loss has some. An
    estimator's penalty is kept beside the second moment, as it is.

    Source: Park et al. 2023, arXiv 2303.14186.
    """

    dimension: int | None = 512
    """K, projected numbers for each block; None for the exact kernel, through all pairs of train rows."""
    output: Output = "margin"
    """What is differentiated: the "margin", or the "loss" (then train rows are not scaled by 1 - p)."""
    projection: Projecting = "mixed"
    """"dense": a random sign for each parameter and number, as published; "mixed": shared, up to 16 times cheaper."""

    def __post_init__(self) -> None:
        check_word("output", self.output, get_args(Output))
        check_word("projection", self.projection, get_args(Projecting))
        if self.dimension is not None:
            _check_size("dimension", self.dimension)

    def takes(self, curvature: LinearOperator) -> TypeGuard[ProjectedOperator | DualOperator]:
        return isinstance(curvature, DualOperator if self.dimension is None else ProjectedOperator)

    def spectrum(self, curvature: ProjectedOperator | DualOperator, at_most: int | None = None) -> Spectrum | None:
        """Of the projected curvature, zeros included; or of the rows' own, where nothing is projected."""
        if isinstance(curvature, DualOperator):
            return gram_spectrum(curvature, at_most)
        return super().spectrum(curvature, at_most)

    @property
    def fit_reads(self) -> FitReads:
        return "gradients"

    def view(self, provider: StructuredGradientProvider) -> StructuredGradientProvider:
        return provider if self.output == "loss" else MarginGradientProvider(provider)

    def fit(
        self, provider: StructuredGradientProvider, loader: Iterable[object], progress: bool
    ) -> tuple[OrderedDict[str, ProjectedOperator | DualOperator], float]:
        dimension = self.dimension
        if dimension is None:
            duals, rows = fit_dual(provider, loader, "empirical_fisher", seed=self.seed, progress=progress)
            return OrderedDict(duals), rows

        def make(name: str, value: BlockGradient) -> RandomProjection:
            dense = self.projection == "dense"
            return RandomProjection(value.layout, dimension, seed=self.seed, like=value.like, dense=dense)

        moments, weight = fit_moments(provider, loader, make, progress=progress)
        return OrderedDict(moments), weight


@dataclass(frozen=True, kw_only=True)
class SidedMethod(ProjectedMethod[ProjectedOperator]):
    """Each part's gradients projected on both sides, L G R^T, and the block's second moment of all these numbers."""

    fisher: Fisher = "empirical"
    """Labels: the data's own ("empirical"), all of them ("exact"), "sampled", or "auto": all where they are few."""

    def __post_init__(self) -> None:
        check_fisher(self.fisher)

    def takes(self, curvature: LinearOperator) -> TypeGuard[ProjectedOperator]:
        return isinstance(curvature, ProjectedOperator)

    def fit(
        self, provider: StructuredGradientProvider, loader: Iterable[object], progress: bool
    ) -> tuple[OrderedDict[str, ProjectedOperator], float]:
        make, draws = self.projections(provider, loader, progress)
        moments, weight = fit_moments(
            provider, loader, make, fisher=self.fisher, draws=draws, seed=self.seed, progress=progress
        )
        return OrderedDict((name, self.reduce(moment)) for name, moment in moments.items()), weight

    @property
    def fit_reads(self) -> FitReads:
        return reads_of_fisher(self.fisher)

    @abstractmethod
    def projections(
        self, provider: StructuredGradientProvider, loader: Iterable[object], progress: bool
    ) -> tuple[Make, range]:
        """How a block's projection is made, and which label draws the second moment takes."""

    def reduce(self, moment: ProjectedOperator) -> ProjectedOperator:
        """What is kept of a second moment: all of it."""
        return moment

    @property
    def approximates(self) -> str:
        return "empirical_fisher" if self.fisher == "empirical" else "ggn"


Project = Callable[[Layout, Sides], KroneckerProjection]
"""A block's projection, from the two sides of each of its parts."""


@dataclass(frozen=True)
class TwoSides:
    """How LoGra's and LoRIF's projections are drawn; their settings are explained there."""

    dimension: int | tuple[int, int]
    init: Init
    fisher: Fisher
    seed: int

    def __post_init__(self) -> None:
        _check_sizes("dimension", self.dimension)
        check_word("init", self.init, get_args(Init))

    @property
    def fit_reads(self) -> FitReads:
        # Leading eigenvectors are those of KFAC's factors, of layers' inputs and output-gradients.
        return reads_of_fisher(self.fisher, "gradients" if self.init == "random" else "layers")

    def projections(
        self, provider: StructuredGradientProvider, loader: Iterable[object], progress: bool, project: Project
    ) -> tuple[Make, range]:
        """As `SidedMethod.projections`."""
        if self.init == "random":
            return lambda name, value: project(value.layout, self._random(value)), range(1)
        kfac, _ = fit_kfac(provider, loader, fisher=self.fisher, seed=self.seed, progress=progress, basis_only=True)

        def make(name: str, value: BlockGradient) -> KroneckerProjection:
            factors = zip(kfac[name].operators, value.layout.parts, strict=True)
            return project(value.layout, [self._leading(op, part, value.like) for op, part in factors])

        return make, range(1, 2)

    def _random(self, value: BlockGradient) -> Sides:
        return [self._random_sides(part, value.like) for part in value.layout.parts]

    def _random_sides(self, part: Part, like: Array) -> tuple[Side, Side]:
        streams = row_streams(part), column_streams(part)
        left, right = (
            gaussian_side(mine, size, seed=self.seed) for mine, size in zip(streams, _pair(self.dimension), strict=True)
        )
        return _as_side(left, like), _as_side(right, like)

    def _leading(self, factors: KroneckerOperator, part: Part, like: Array) -> tuple[Side, Side]:
        bases, drawn = (factors.eigen.left, factors.eigen.right), self._random_sides(part, like)
        found = [
            other if other is None else _leading_side(side, basis, size, other)
            for side, basis, size, other in zip(
                (factors.left, factors.right), bases, _pair(self.dimension), drawn, strict=True
            )
        ]
        return found[0], found[1]


def _leading_side(side: Array, basis: Side, size: int, drawn: Array) -> Array:
    """The eigenvectors of the largest eigenvalues of one Kronecker factor, in rows: [size, o].

    A diagonal factor (an embedding's) has the axes themselves; one that is constant prefers none: random then.
    """
    xp = namespace(side)
    if basis is not None:
        return xp.astype(transpose(basis[:, -size:]), drawn.dtype)
    if bool(xp.all(side == side[0])):
        return drawn
    chosen = xp.argsort(side, descending=True, stable=True)[:size]
    axes = xp.arange(side.shape[0], device=device(side))[None, :] == chosen[:, None]
    return xp.astype(axes, drawn.dtype)


@dataclass(frozen=True)
class LoGra(SidedMethod):
    """LoGra: the gradients of each layer projected before they are formed, (a R^T)(g L^T).

    A side that is no larger than the dimension is left as it is, so that a large dimension gives the empirical Fisher
    itself. Source: Choe et al. 2024, arXiv 2405.13954.
    """

    dimension: int | tuple[int, int] = 16
    """Numbers for each side of a part, or (output side, input side)."""
    init: Init = "random"
    """"random": normal numbers, which keep lengths on average; "pca": the leading eigenvectors of KFAC's factors."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.sides  # noqa: B018  # which checks them

    @property
    def fit_reads(self) -> FitReads:
        return self.sides.fit_reads

    @property
    def sides(self) -> TwoSides:
        return TwoSides(self.dimension, self.init, self.fisher, self.seed)

    def projections(
        self, provider: StructuredGradientProvider, loader: Iterable[object], progress: bool
    ) -> tuple[Make, range]:
        return self.sides.projections(provider, loader, progress, KroneckerProjection)


@dataclass(frozen=True)
class LoRif(SidedMethod):
    """LoRIF: LoGra whose rows are kept at a low rank, and whose curvature keeps few eigenvalues.

    Every row's projected gradient of a part, [k_o, k_i], is replaced by its best approximation of rank `rank`: rank
    (k_o + k_i) numbers to store. Queries and train rows are both seen so. The second moment of these is replaced by its
    `kept` leading eigenpairs (U, s), and (U s U^T + damping)^-1 by U (s + damping)^-1 U^T + (I - U U^T) / damping.
    Relative damping is relative to the mean of the K eigenvalues that are left, zeros counted. What was kept is said by
    `kept_rank` and `kept_mass` of the operators. In perturbation mode the query is seen cut, and the train row's mixed
    gradient is whole: the cut is for storage, and nothing is stored of derivatives.

    Source: LoRIF, 2026; no public implementation is known.
    """

    dimension: int | tuple[int, int] = 16
    """As LoGra's."""
    init: Init = "random"
    """As LoGra's."""
    rank: int = 1
    """The rank at which each row's projected gradient of a part is kept."""
    kept: int | None = None
    """How many eigenpairs of a block's second moment are kept; None for all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.sides  # noqa: B018  # which checks them
        _check_size("rank", self.rank)
        if self.kept is not None:
            _check_size("kept", self.kept)

    @property
    def fit_reads(self) -> FitReads:
        return self.sides.fit_reads

    @property
    def sides(self) -> TwoSides:
        return TwoSides(self.dimension, self.init, self.fisher, self.seed)

    def projections(
        self, provider: StructuredGradientProvider, loader: Iterable[object], progress: bool
    ) -> tuple[Make, range]:
        return self.sides.projections(
            provider, loader, progress, lambda layout, sides: LowRankProjection(layout, sides, self.rank)
        )

    def reduce(self, moment: ProjectedOperator) -> ProjectedOperator:
        if self.kept is None or self.kept >= moment.core.input_size:
            return moment
        values, vectors = moment.core.eigen  # type: ignore[attr-defined]
        xp, dtype = namespace(values), moment.core.matrix.dtype  # type: ignore[attr-defined]
        top = xp.clip(values[-self.kept :], 0.0, None)
        total = float(xp.sum(xp.clip(values, 0.0, None)))
        factor, core, zero = (
            xp.astype(v, dtype) for v in (vectors[:, -self.kept :], identity(self.kept, top) * top, 0.0 * values)
        )
        return ProjectedOperator(
            moment.projection,
            LowRankPlusDiagonalOperator(factor, core, zero, psd=True),
            rows=moment.rows,
            kept_rank=self.kept,
            kept_mass=float(xp.sum(top)) / total if total else 1.0,
        )


@dataclass(frozen=True)
class FactGrass(SidedMethod):
    """FactGraSS: sparse sketches of a layer's inputs and output-gradients, before their product.

    Each side keeps `mask` coordinates at random and adds each of them, with a random sign, to one of `dimension`
    numbers; scaled so that lengths are kept on average. Source: Hu et al. 2025, arXiv 2505.18976.
    """

    dimension: int | tuple[int, int] = 16
    """Numbers for each side of a part, or (output side, input side)."""
    mask: int | tuple[int, int] | None = None
    """How many coordinates of each side are kept before the sketch; None for all, which is more accurate."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_sizes("dimension", self.dimension)
        if self.mask is not None:
            _check_sizes("mask", self.mask)

    def projections(
        self, provider: StructuredGradientProvider, loader: Iterable[object], progress: bool
    ) -> tuple[Make, range]:
        def make(name: str, value: BlockGradient) -> KroneckerProjection:
            return KroneckerProjection(value.layout, [self._sides(part, value.like) for part in value.layout.parts])

        return make, range(1)

    def _sides(self, part: Part, like: Array) -> tuple[Side, Side]:
        streams = row_streams(part), column_streams(part)
        masks = (None, None) if self.mask is None else _pair(self.mask)
        left, right = (
            sparse_side(mine, size, mask, seed=self.seed)
            for mine, size, mask in zip(streams, _pair(self.dimension), masks, strict=True)
        )
        return _as_side(left, like), _as_side(right, like)


def _as_side(side: object, like: Array) -> Side:
    return None if side is None else as_like(side, like)


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    """(output side, input side)."""
    return (size, size) if isinstance(size, int) else size


def _check_sizes(name: str, sizes: object) -> None:
    if isinstance(sizes, tuple) and len(sizes) == 2:
        for size in sizes:
            _check_size(name, size)
    else:
        _check_size(name, sizes)


def _check_size(name: str, size: object) -> None:
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise InvalidSetting(f"{name} is {size!r}; expected a whole number of at least 1.")
