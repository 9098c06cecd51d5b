"""Descent on (C + damping) x = b by steps that see a few rows each: LiSSA, and with a preconditioner ASTRA.

    v <- momentum v + step P (b - (C_t + damping) x),   x <- x + v,   starting from x = step P b (LiSSA) or P b

C_t is the curvature of the rows of step t. Sources: Agarwal, Bullins and Hazan 2017, arXiv 1602.03943 (LiSSA);
Wang et al. 2025, "Better training data attribution via better inverse Hessian-vector products" (ASTRA).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np

from headwater.arrays import Array, add_scaled, namespace
from headwater.errors import Diverged
from headwater.operators.algebra import IdentityOperator, LinearOperator, rowwise_inner
from headwater.operators.forwarded import ForwardedOperator
from headwater.operators.iterative import FINISHED, Solution, Solver, SolveReport, host, row_norms

RUNAWAY = 1e4
"""Times its own size that a right-hand side's residual may grow before the iteration counts as diverged."""


Rows = TypeVar("Rows", bound=LinearOperator, covariant=True)
"""What a curvature of all rows, or of a step's, is."""


class SteppedOperator(ForwardedOperator, Generic[Rows]):
    """A curvature, and that of the rows of each step; taken from the beginning again when steps run out."""

    def __init__(self, whole: Rows, parts: Sequence[Rows]):
        self.whole, self.parts = whole, tuple(parts)
        self.psd = whole.psd

    @property
    def acts_as(self) -> Rows:
        return self.whole

    def at(self, step: int) -> Rows:
        """The curvature of the rows of a step."""
        return self.parts[step % len(self.parts)] if self.parts else self.whole


@dataclass(frozen=True)
class Descent(Solver):
    """A fixed number of steps; the residual that is reported is that of all rows."""

    steps: int
    """How many."""
    step_size: float
    """What the residual, after the preconditioner, is multiplied with."""
    momentum: float = 0.0
    """Share of the last move that is made again."""
    warm_start: bool = False
    """Start from P b rather than from step_size P b."""

    def solve(
        self, curvature: LinearOperator, damping: float, rhs: Array, preconditioner: LinearOperator | None, label: str
    ) -> Solution:
        assert isinstance(curvature, SteppedOperator)
        approximate = preconditioner or IdentityOperator(curvature.input_size)
        sizes = host(row_norms(rhs))
        # A copy in any case: the steps write into x, and an operator may hand back what it was given.
        x = approximate.apply(rhs) * (1.0 if self.warm_start else self.step_size)
        move = x * 0 if self.momentum else None
        for step in range(self.steps):
            # In place: columns times parameters outgrow the cache, so that a step costs what is read and written.
            rest = add_scaled(rhs - curvature.at(step).apply(x), x, -damping)
            self._check(curvature.at(step), damping, x, _lengths(rest), sizes, step, preconditioner is None)
            turned = approximate.apply(rest)
            if move is None:
                x = add_scaled(x, turned, self.step_size)
                continue
            move = add_scaled(move * self.momentum, turned, self.step_size)
            x = add_scaled(x, move, 1.0)
        rest = host(row_norms(rhs - curvature.apply(x) - x * damping))
        residual = rest / np.where(sizes > 0, sizes, 1.0)
        outcome = np.full(len(sizes), FINISHED)
        products = (self.steps + 1) * len(sizes)
        return Solution(x, SolveReport(label, residual, np.full(len(sizes), self.steps), outcome, products))

    def _check(
        self, curvature: LinearOperator, damping: float, x: Array, rest: np.ndarray, sizes: np.ndarray, step: int,
        plain: bool,
    ) -> None:  # fmt: skip
        """Errors: Diverged, naming the step size to try."""
        if bool((rest <= RUNAWAY * sizes).all()):
            return
        top = _steepest(curvature, x) + damping if plain else math.nan
        raise Diverged(
            f"Diverged at step {step} with a step size of {self.step_size:.3g}. "
            + (
                f"The steepest direction met has curvature {top:.3g}: try scale={1.1 * top:.3g} (a step size of "
                f"{1 / (1.1 * top):.3g})."
                if math.isfinite(top) and top > 0
                else f"Try step_size={self.step_size / 4:.3g}, or less momentum than {self.momentum:g}."
            )
        )


def _lengths(rows: Array) -> np.ndarray:
    """Euclidean norms of [k, D], in one reading pass; infinite where a square is too large for the dtype."""
    squares: Any = rows[:, None, :] @ rows[:, :, None]
    return np.sqrt(host(squares)[:, 0, 0])


def _steepest(curvature: LinearOperator, x: Array) -> float:
    """The largest Rayleigh quotient of the columns: a runaway iteration points along the steepest direction."""
    xp = namespace(x)
    finite = host(xp.astype(xp.isfinite(row_norms(x)), x.dtype)) > 0
    if not finite.all():
        return math.nan
    length = host(rowwise_inner(x, x))
    return float((host(rowwise_inner(curvature.apply(x), x)) / np.where(length > 0, length, 1.0)).max())
