"""Exact curvature, inverted by iteration: conjugate gradients, and what makes them fast."""

from __future__ import annotations

from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeGuard, TypeVar, get_args

from headwater.curvature.dual import DualOperator
from headwater.curvature.exact import Curvature, check_kind
from headwater.curvature.kronecker import fit_ekfac, fit_kfac
from headwater.curvature.products import CurvatureOperator, fit_products
from headwater.curvature.span import RowSpans, SpanSolve
from headwater.errors import IndefiniteCurvature, InvalidSetting, SingularOperator, UnsupportedLoss
from headwater.gradients.provider import Fisher, StructuredGradientProvider
from headwater.methods.base import FitReads, Method, check_fisher, reads_of_curvature, reads_of_fisher
from headwater.methods.damping import Damping, Relative
from headwater.operators.algebra import LinearOperator
from headwater.operators.approximated import ApproximatedOperator
from headwater.operators.block_krylov import BlockKrylovSolver
from headwater.operators.cg import ConjugateGradient
from headwater.operators.iterative import IterativeInverse, Solver
from headwater.operators.sketch import estimate_diagonal, fit_nystroem

Preconditioned = ApproximatedOperator[CurvatureOperator, LinearOperator | None]
"""The curvature, by products, and what is near to it and easy to invert; None for no preconditioner."""
C = TypeVar("C", bound=LinearOperator)
Preconditioner = Literal["auto", "dual", "ekfac", "kfac", "nystroem", "diagonal"]


@dataclass(frozen=True, kw_only=True)
class ProductMethod(Method[C]):
    """Curvature by products alone: of which kind, and with which labels."""

    curvature: Curvature = "ggn"
    """"hessian", "ggn", "fisher" or "empirical_fisher", of the mean loss."""
    fisher: Fisher = "auto"
    """For the Fisher: enumerate labels ("exact"), sample them ("sampled"), or whichever suits ("auto")."""
    seed: int = 0
    """For sampled labels, and all other random numbers."""

    def __post_init__(self) -> None:
        check_kind(self.curvature)
        check_fisher(self.fisher)

    @property
    def default_damping(self) -> Damping:
        """10 mean eigenvalues: near the best for exact solves on the leaderboard; see docs/leaderboard.md."""
        return Relative(10.0)

    @property
    def approximates(self) -> str:
        return self.curvature

    def products(
        self, provider: StructuredGradientProvider, loader: Iterable[object], progress: bool
    ) -> tuple[OrderedDict[str, CurvatureOperator], float]:
        """Each block's curvature, matrix-free, and the rows' total weight."""
        return fit_products(provider, loader, self.curvature, fisher=self.fisher, seed=self.seed, progress=progress)


@dataclass(frozen=True, kw_only=True)
class PreconditionedMethod(ProductMethod[Preconditioned]):
    """A solver with a preconditioner: an operator near to the curvature, which is easy to invert."""

    preconditioner: Preconditioner | None = "auto"
    """"dual" (the heaviest gradients of the outputs, or their span, inverted exactly through a matrix over them),
    "ekfac", "kfac", "nystroem" (rank 50), "diagonal" (Hutchinson's estimate), None, or "auto": dual for few outputs,
    else EKFAC."""
    tolerance: float | None = None
    """Relative residual of each solve; None for the square root of eps (3e-4 in float32). A score q (C + d)^-1 g is off
    by no more than that times |q| |(C + d)^-1 g|, and is held to it where no solve is needed."""
    allow_indefinite: bool = False
    """Solve with a Hessian although it has negative eigenvalues at the damping; refused otherwise."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.preconditioner is not None and self.preconditioner not in get_args(Preconditioner):
            known = ", ".join(map(repr, get_args(Preconditioner)))
            raise InvalidSetting(f"preconditioner is {self.preconditioner!r}; expected one of {known}, or None.")
        if self.tolerance is not None and not 0 <= self.tolerance < 1:
            raise InvalidSetting(f"tolerance is {self.tolerance!r}; expected a number from 0 to 1, or None.")

    @property
    def fit_reads(self) -> FitReads:
        reads = reads_of_curvature(self.curvature, self.fisher)
        # These two are a Fisher information beside the curvature, of the labels that `fisher` says.
        beside = reads == "gradients" and self.preconditioner in ("ekfac", "kfac")
        return reads_of_fisher(self.fisher, "layers") if beside else reads

    @property
    @abstractmethod
    def solver(self) -> Solver:
        """The settings of the solver."""

    def solver_for(self, curvature: CurvatureOperator) -> Solver:
        """The settings that suit this curvature."""
        return self.solver

    def fit(
        self, provider: StructuredGradientProvider, loader: Iterable[object], progress: bool
    ) -> tuple[OrderedDict[str, Preconditioned], float]:
        operators, rows = self.products(provider, loader, progress)
        preconditioners = self._fit_preconditioner(provider, loader, operators, progress)
        found = ((n, ApproximatedOperator(op, preconditioners.get(n))) for n, op in operators.items())
        return OrderedDict(found), rows

    def _fit_preconditioner(
        self,
        provider: StructuredGradientProvider,
        loader: Iterable[object],
        operators: OrderedDict[str, CurvatureOperator],
        progress: bool,
    ) -> dict[str, LinearOperator]:
        kind = self.preconditioner
        if kind in ("auto", "dual"):
            found = heaviest_rows(provider, loader, operators, self.curvature, progress)
            if found is not None:
                return found
            if kind == "dual":
                raise InvalidSetting(
                    "preconditioner='dual' needs a loss that is convex in few outputs, so that a row's GGN is a short "
                    "sum of g g^T. Use 'ekfac'."
                )
        if kind in ("auto", "ekfac", "kfac"):
            fit = fit_kfac if kind == "kfac" else fit_ekfac
            try:
                return dict(fit(provider, loader, fisher=self.fisher, seed=self.seed, progress=progress)[0])
            except UnsupportedLoss:
                if kind == "auto":  # a loss without a Fisher; plain conjugate gradients need none
                    return {}
                raise
        if kind == "nystroem":
            return {
                n: fit_nystroem(op, op.like, rank=SKETCH, seed=self.seed, shifted=not op.psd)
                for n, op in operators.items()
            }
        if kind == "diagonal":
            return {n: estimate_diagonal(op, op.like, probes=PROBES, seed=self.seed) for n, op in operators.items()}
        return {}

    def takes(self, curvature: LinearOperator) -> TypeGuard[Preconditioned]:
        return isinstance(curvature, ApproximatedOperator) and isinstance(curvature.exact, CurvatureOperator)

    def invert(self, curvature: Preconditioned, damping: float) -> LinearOperator:
        exact, preconditioner = curvature.exact, curvature.approximation
        if not self.allow_indefinite:
            refuse_indefinite(exact, damping)
        if preconditioner is None:
            return IterativeInverse(exact, damping, self.solver_for(exact), None, exact.block)
        # The preconditioner's own mean eigenvalue: a Hessian's would cost 64 products.
        near = partial(near_inverse, preconditioner, damping, preconditioner.mean_eigenvalue())
        if isinstance(preconditioner, RowSpans) and self.curvature != "hessian":
            return SpanSolve(exact, damping, self.solver_for(exact), preconditioner, near, self.tolerance)
        return IterativeInverse(exact, damping, self.solver_for(exact), near(), exact.block)


SKETCH, PROBES = 50, 32
"""Vectors that a Nystroem, and a diagonal preconditioner are made from."""
SPANNED = 4096
"""Parameters of a block beyond which it is worth a span of rows' gradients."""
HEAVIEST, MOST = 0.99, 4096
"""Share of the trace, and number, up to which gradients go into a dual preconditioner."""


def heaviest_rows(
    provider: StructuredGradientProvider,
    loader: Iterable[object],
    operators: OrderedDict[str, CurvatureOperator],
    curvature: Curvature,
    progress: bool,
) -> dict[str, LinearOperator] | None:
    """For each block what the heaviest gradients make of its GGN (or Fisher); None where rows have none."""
    if curvature == "hessian":
        operators, _ = fit_products(provider, loader, "ggn", progress=progress)
    if not all(op.source.has_draws for op in operators.values()):
        return None
    rows = next(iter(operators.values())).source.weight
    return {n: _heaviest_of(op, rows) for n, op in operators.items()}


def _heaviest_of(curvature: CurvatureOperator, rows: float) -> LinearOperator:
    """Their span, where gradients are single outer products in memory, and many more numbers than a span has."""
    if curvature.source.has_single_products(curvature.block) and curvature.input_size > SPANNED:
        return RowSpans.of(curvature, rows)
    return DualOperator.of_heaviest(curvature, rows, HEAVIEST, MOST)


def near_inverse(preconditioner: LinearOperator, damping: float, mean: float) -> LinearOperator:
    """(preconditioner + damping)^-1, with more damping where that is singular to rounding: it need not be exact.

    mean: the mean eigenvalue of what it stands for. Errors: SingularOperator if no damping up to that will do.
    """
    shift = max(damping, 1e-6 * abs(mean))
    while True:
        try:
            found = preconditioner.inverse(shift)
            found.prepare()  # whether it is singular is found out when it is factorised
            return found
        except SingularOperator:
            if shift >= abs(mean):
                raise
            shift *= 10


def refuse_indefinite(curvature: CurvatureOperator, damping: float, *, surely: bool = False) -> None:
    """Errors: IndefiniteCurvature, naming a damping that would do, where a Hessian has negative eigenvalues.

    surely: refuse also where it may have some, by the error of the bound; for solvers that would not notice.
    """
    if curvature.psd:
        return
    bounds = curvature.bounds
    if bounds.lowest - (bounds.lowest_error if surely else 0.0) + damping < 0:
        raise IndefiniteCurvature(
            f"At damping {damping:g} the smallest eigenvalue is {bounds.lowest + damping:g} or less: not a minimum. A "
            f"damping of {1.01 * (bounds.lowest_error - bounds.lowest):.3g} would do; so would curvature='ggn', which "
            "is never negative."
        )


@dataclass(frozen=True, kw_only=True)
class Cg(PreconditionedMethod):
    """Conjugate gradients on (C + damping) x = g for all queries together; columns that have converged leave.

    Of few outputs no system is solved where a span of heavy gradients gives the scores within the tolerance: see
    `headwater.curvature.span`.

    Sources: Hestenes and Stiefel 1952; Martens 2010 (curvature by products).
    """

    max_iterations: int = 1000
    """For each query."""
    block: bool = True
    """One space for all queries (block CG): far fewer products, and q x q systems in each step; else each by itself."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.max_iterations, int) or self.max_iterations < 1:
            raise InvalidSetting(f"max_iterations is {self.max_iterations!r}; expected a whole number of at least 1.")

    @property
    def solver(self) -> ConjugateGradient:
        return ConjugateGradient(self.tolerance, self.max_iterations, self.block)

    def solver_for(self, curvature: CurvatureOperator) -> Solver:
        """Where an indefinite Hessian is allowed, a space with full orthogonalisation: CG would break down."""
        if not self.allow_indefinite or curvature.psd:
            return self.solver
        return BlockKrylovSolver(self.tolerance, self.max_iterations, allow_indefinite=True)


@dataclass(frozen=True, kw_only=True)
class BlockKrylov(PreconditionedMethod):
    """One Krylov space for all queries, seeded by the preconditioner's answers; every damping from one run.

    The space serves the damping at hand; at others (`solve_path`) it is as good as their residuals say.
    Sources: O'Leary 1980; Saad 2003.
    """

    max_products: int = 50
    """For each query."""
    memory: int = 2**31
    """Bytes for the basis and its images; queries are taken in groups that fit."""
    on_disk: bool = False
    """Keep both in temporary files, which `memory` then bounds."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in (("max_products", self.max_products), ("memory", self.memory)):
            if not isinstance(value, int) or value < 1:
                raise InvalidSetting(f"{name} is {value!r}; expected a whole number of at least 1.")

    @property
    def solver(self) -> BlockKrylovSolver:
        return BlockKrylovSolver(self.tolerance, self.max_products, self.memory, self.on_disk, self.allow_indefinite)
