"""Descent on the inverse by steps that see a few rows each: LiSSA and ASTRA."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

from headwater.curvature.kronecker import fit_ekfac
from headwater.curvature.products import CurvatureOperator, fit_steps
from headwater.errors import InvalidSetting
from headwater.gradients.provider import StructuredGradientProvider
from headwater.methods.iterative import ProductMethod, near_inverse, refuse_indefinite
from headwater.operators.algebra import LinearOperator
from headwater.operators.approximated import ApproximatedOperator
from headwater.operators.iterative import IterativeInverse
from headwater.operators.krylov import steepness
from headwater.operators.lissa import Descent, SteppedOperator

Steps = SteppedOperator[CurvatureOperator]
Preconditioned = ApproximatedOperator[Steps, LinearOperator]
"""Steps, and the preconditioner's curvature."""
C = TypeVar("C", bound=LinearOperator)


@dataclass(frozen=True, kw_only=True)
class SteppedMethod(ProductMethod[C]):
    """A fixed number of steps, each with the curvature of a few rows.

    Which rows belong to a step depends on the seed and on the rows, never on the loader's batches or their order: rows
    are put into a random order, by their ids or their content, and taken in turn. The rows of all steps are held in
    memory.
    """

    steps: int = 200
    """How many."""
    rows: int | None = 64
    """Train rows in a step; None for all of them in every step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in (("steps", self.steps), ("rows", self.rows)):
            if not (value is None and name == "rows") and (not isinstance(value, int) or value < 1):
                raise InvalidSetting(f"{name} is {value!r}; expected a whole number of at least 1.")

    def stepped(
        self, provider: StructuredGradientProvider, loader: Iterable[object], progress: bool
    ) -> tuple[OrderedDict[str, Steps], float]:
        """Each block's curvature, and that of each step's rows; and the rows' total weight."""
        whole, rows = self.products(provider, loader, progress)
        parts: dict[str, list[CurvatureOperator]] = {name: [] for name in whole}
        if self.rows is not None:
            parts = fit_steps(
                provider, loader, self.curvature, steps=self.steps, rows=self.rows, fisher=self.fisher, seed=self.seed
            )
        return OrderedDict((name, SteppedOperator(op, parts[name])) for name, op in whole.items()), rows


@dataclass(frozen=True, kw_only=True)
class Lissa(SteppedMethod[Steps]):
    """x <- x + (g - (C_t + damping) x) / scale, from x = g / scale. Source: Agarwal et al. 2017, arXiv 1602.03943."""

    scale: float | None = None
    """Must exceed half the largest eigenvalue of every step's C_t + damping; None for the whole data set's largest."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scale is not None and not self.scale > 0:
            raise InvalidSetting(f"scale is {self.scale!r}; expected a positive number, or None.")

    def fit(
        self, provider: StructuredGradientProvider, loader: Iterable[object], progress: bool
    ) -> tuple[OrderedDict[str, Steps], float]:
        return self.stepped(provider, loader, progress)

    def invert(self, curvature: Steps, damping: float) -> LinearOperator:
        whole = curvature.whole
        refuse_indefinite(whole, damping, surely=True)
        scale = self.scale
        if scale is None:
            scale = whole.bounds.highest + whole.bounds.highest_error + damping
        return IterativeInverse(curvature, damping, Descent(self.steps, 1.0 / scale), label=whole.block)


@dataclass(frozen=True, kw_only=True)
class Astra(SteppedMethod[Preconditioned]):
    """x <- x + v, v <- momentum v + step_size (EKFAC + damping)^-1 (g - (C_t + damping) x), from EKFAC's answer.

    Source: Wang et al. 2025, "Better training data attribution via better inverse Hessian-vector products".
    """

    steps: int = 50
    """How many."""
    rows: int | None = 256
    """Train rows in a step; None for all of them in every step."""
    step_size: float | None = None
    """None for one over the largest eigenvalue of (EKFAC + damping)^-1 (C_t + damping) of any step."""
    momentum: float = 0.5
    """Share of the last move that is made again."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.step_size is not None and not self.step_size > 0:
            raise InvalidSetting(f"step_size is {self.step_size!r}; expected a positive number, or None.")
        if not 0 <= self.momentum < 1:
            raise InvalidSetting(f"momentum is {self.momentum!r}; expected a number from 0 to below 1.")

    def fit(
        self, provider: StructuredGradientProvider, loader: Iterable[object], progress: bool
    ) -> tuple[OrderedDict[str, Preconditioned], float]:
        operators, rows = self.stepped(provider, loader, progress)
        preconditioners, _ = fit_ekfac(provider, loader, fisher=self.fisher, seed=self.seed, progress=progress)
        found = ((name, ApproximatedOperator(op, preconditioners[name])) for name, op in operators.items())
        return OrderedDict(found), rows

    def invert(self, curvature: Preconditioned, damping: float) -> LinearOperator:
        stepped, whole = curvature.exact, curvature.exact.whole
        refuse_indefinite(whole, damping, surely=True)
        preconditioner = near_inverse(curvature.approximation, damping, curvature.approximation.mean_eigenvalue())
        step = self.step_size or 1.0 / max(
            steepness(part, damping, preconditioner, whole.start) for part in (whole, *stepped.parts)
        )
        solver = Descent(self.steps, step, self.momentum, warm_start=True)
        return IterativeInverse(stepped, damping, solver, preconditioner, whole.block)
