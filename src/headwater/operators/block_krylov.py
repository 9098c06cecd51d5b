"""One Krylov space for all right-hand sides, seeded by an approximate inverse; every damping from one run.

1. Seeds S = M B, M near (C + damping)^-1; the space is span {S, C S, C^2 S, ...} for all columns of B together. It does
   not depend on the damping that is asked for, only on that of M.
2. x = V^T (T + damping)^-1 V b, with T = V C V^T: the residual is orthogonal to the space (Galerkin). Where C + damping
   is indefinite, and that is allowed, x has the smallest residual instead (as in MINRES), which always exists.
3. (C + damping) x lies in the space and the next block N, so |r|^2 = |b|^2 - |V b|^2 - |N b|^2 + |N b - N C V^T y|^2:
   every residual, at every damping, costs nothing.

Sources: O'Leary 1980; Simoncini and Gallopoulos 1995; Frommer and Glaessner 1998 (shifted systems).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from headwater.arrays import Array, itemsize, namespace, transpose
from headwater.errors import IndefiniteCurvature
from headwater.operators.algebra import LinearOperator
from headwater.operators.iterative import (
    CONVERGED,
    STAGNATED,
    UNFINISHED,
    Solution,
    Solver,
    SolveReport,
    default_tolerance,
    host,
    joined,
    row_norms,
)
from headwater.operators.krylov import BasisOnDisk, KrylovSpace


@dataclass(frozen=True)
class BlockKrylovSolver(Solver):
    """A shared space, grown until all residuals are at the tolerance."""

    tolerance: float | None = None
    """Relative residual; None for the square root of the dtype's eps."""
    max_products: int = 50
    """For each column."""
    memory: int = 2**31
    """Bytes for the basis; columns are taken in groups that fit."""
    on_disk: bool = False
    """Keep the basis in files; then `memory` bounds them."""
    allow_indefinite: bool = False
    """Go on where the projected curvature has negative eigenvalues at the damping."""

    def solve(
        self, curvature: LinearOperator, damping: float, sides: Array, preconditioner: LinearOperator | None, label: str
    ) -> Solution:
        return self.solve_path(curvature, [damping], sides, preconditioner, label)[0]

    def solve_path(
        self,
        curvature: LinearOperator,
        dampings: Sequence[float],
        sides: Array,
        preconditioner: LinearOperator | None,
        label: str,
    ) -> list[Solution]:
        """One solution for each damping, all from the same spaces."""
        step = self._group(sides)
        groups = [
            self._solve_group(curvature, dampings, sides[start : start + step], preconditioner, label)
            for start in range(0, int(sides.shape[0]), step)
        ]
        return [_stack([group[k] for group in groups], label, sides) for k in range(len(dampings))]

    def _group(self, sides: Array) -> int:
        """Columns whose basis fits into memory, if they take ten products each."""
        each = 10 * int(sides.shape[1]) * itemsize(sides)
        return max(1, self.memory // each)

    def _solve_group(
        self,
        curvature: LinearOperator,
        dampings: Sequence[float],
        sides: Array,
        preconditioner: LinearOperator | None,
        label: str,
    ) -> list[Solution]:
        seeds = sides if preconditioner is None else preconditioner.apply(sides)
        space = KrylovSpace(curvature, seeds, BasisOnDisk(sides) if self.on_disk else None)
        seen = _Seen(self, sides, dampings)
        room = self.memory // max(1, int(sides.shape[1]) * itemsize(sides))
        while not space.exhausted:
            seen.note(space.next)
            space.extend()
            seen.solve(space)
            crowded = space.size + int(space.next.shape[0]) > room
            if seen.done or seen.powers >= self.max_products or crowded:
                break
        return seen.solutions(space, label)


class _Seen:
    """The right-hand sides as the space sees them, and their coefficients at every damping."""

    def __init__(self, settings: BlockKrylovSolver, sides: Array, dampings: Sequence[float]):
        self.settings, self.sides, self.dampings = settings, sides, dampings
        self.tolerance = default_tolerance(sides) if settings.tolerance is None else settings.tolerance
        self.norms = host(row_norms(sides))
        count = len(self.norms)
        self.along: list[np.ndarray] = []
        self.coefficients = [np.zeros((count, 0)) for _ in dampings]
        self.residuals = [np.where(self.norms > 0, 1.0, 0.0) for _ in dampings]
        self.powers = 0

    def note(self, block: Array) -> None:
        """A block that is about to join the space."""
        self.along.append(host(self.sides @ transpose(block)))

    @property
    def done(self) -> bool:
        return all(bool((residual <= self.tolerance).all()) for residual in self.residuals)

    def solve(self, space: KrylovSpace) -> None:
        self.powers += 1
        inside, small = np.concatenate(self.along, axis=1), space.projected()
        beyond = host(self.sides @ transpose(space.next))
        last = self.along[-1].shape[1]
        for k, damping in enumerate(self.dampings):
            y = self._coefficients(small, damping, inside, beyond, space.coupling)
            missed = (self.norms**2 - (inside**2).sum(1) - (beyond**2).sum(1)).clip(min=0.0)
            missed = missed + ((beyond - y[:, -last:] @ space.coupling) ** 2).sum(1)
            self.coefficients[k] = y
            self.residuals[k] = np.sqrt(missed) / np.where(self.norms > 0, self.norms, 1.0)

    def _coefficients(
        self, small: np.ndarray, damping: float, inside: np.ndarray, beyond: np.ndarray, coupling: np.ndarray
    ) -> np.ndarray:
        """Galerkin's; where the damped curvature is indefinite, and that is allowed, the smallest residual's."""
        damped = small + damping * np.eye(len(small))
        try:
            half = np.linalg.cholesky(damped)
        except np.linalg.LinAlgError:
            lowest = float(np.linalg.eigvalsh(small)[0])
            if not self.settings.allow_indefinite and lowest + damping < 0:
                raise IndefiniteCurvature(
                    f"At damping {damping:g} the curvature has a negative eigenvalue, {lowest + damping:g} or less. "
                    f"Not a minimum: a damping above {-1.01 * lowest:.3g} is needed; curvature='ggn' is never negative."
                ) from None
        else:
            return np.linalg.solve(half.T, np.linalg.solve(half, inside.T)).T
        below = np.zeros((coupling.shape[1], len(small)))
        below[:, len(small) - len(coupling) :] = coupling.T
        stacked, sides = np.concatenate([damped, below]), np.concatenate([inside, beyond], axis=1)
        return np.linalg.lstsq(stacked, sides.T, rcond=None)[0].T

    def solutions(self, space: KrylovSpace, label: str) -> list[Solution]:
        found = []
        for y, residual in zip(self.coefficients, self.residuals, strict=True):
            x = space.combine(y) if space.size else self.sides * 0
            ended = STAGNATED if space.exhausted else UNFINISHED
            outcome = np.where(residual <= self.tolerance, CONVERGED, ended).astype(str)
            steps = np.full(len(residual), self.powers)
            found.append(Solution(x, SolveReport(label, residual, steps, outcome, space.products)))
        return found


def _stack(solutions: list[Solution], label: str, sides: Array) -> Solution:
    if not solutions:
        nothing = np.zeros(0)
        return Solution(sides, SolveReport(label, nothing, nothing.astype(int), nothing.astype(str), 0))
    x = namespace(sides).concat([solution.x for solution in solutions], axis=0)
    return Solution(x, joined([solution.report for solution in solutions])[label])
