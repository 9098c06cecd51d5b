"""One Krylov space for all right-hand sides, seeded by an approximate inverse; every damping from one run.

1. With M near (C + damping)^-1, the first directions are M b for all columns b; further ones M r, for the columns whose
   residual r is still too large. In exact arithmetic: the Krylov space of M (C + damping), for all columns together.
2. V is an orthonormal basis of the space, W = C V is kept beside it, and x = V^T y solves the projected system,
   (V W^T + damping) y = V b: the residual is orthogonal to the space (Galerkin).
3. r = b - W^T y - damping V^T y needs no further product, and neither does any other damping.

Sources: O'Leary 1980; Saad 2003, "Iterative methods for sparse linear systems", chapters 5 and 9.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from headwater.arrays import Array, as_like, itemsize, namespace, transpose
from headwater.errors import IndefiniteCurvature
from headwater.operators.algebra import LinearOperator
from headwater.operators.cg import PATIENCE, take
from headwater.operators.finite import refuse_nonfinite
from headwater.operators.iterative import (
    CONVERGED,
    ELSEWHERE,
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
from headwater.operators.krylov import Basis, BasisOnDisk, extreme_eigenvalues, mirrored, orthonormal


@dataclass(frozen=True)
class BlockKrylovSolver(Solver):
    """A shared space, grown until all residuals are at the tolerance."""

    tolerance: float | None = None
    """Relative residual; None for the square root of the dtype's eps."""
    max_products: int = 50
    """For each column."""
    memory: int = 2**31
    """Bytes for the basis and its images; columns are taken in groups that fit."""
    on_disk: bool = False
    """Keep both in files; then `memory` bounds these."""
    allow_indefinite: bool = False
    """Go on where the projected curvature has negative eigenvalues at the damping."""

    def solve(
        self, curvature: LinearOperator, damping: float, rhs: Array, preconditioner: LinearOperator | None, label: str
    ) -> Solution:
        return self.solve_path(curvature, [damping], rhs, preconditioner, label)[0]

    def solve_path(
        self,
        curvature: LinearOperator,
        dampings: Sequence[float],
        rhs: Array,
        preconditioner: LinearOperator | None,
        label: str,
    ) -> list[Solution]:
        """One solution for each damping, all from the spaces that serve the first: no products for the others."""
        step, groups = self._group(rhs), []
        for start in range(0, int(rhs.shape[0]), step):
            group = rhs[start : start + step]
            with GalerkinSpace(curvature, self.on_disk, group) as space:
                groups.append(self._solve_in(space, dampings, group, preconditioner, label))
        return [_stack([group[k] for group in groups], label, rhs) for k in range(len(dampings))]

    def _group(self, rhs: Array) -> int:
        """Columns whose basis and images fit into memory, if they take four products each."""
        # Each product of a column leaves one basis vector and its image: four products, eight vectors.
        return max(1, self.memory // (8 * _bytes(rhs)))

    def _solve_in(
        self,
        space: GalerkinSpace,
        dampings: Sequence[float],
        rhs: Array,
        preconditioner: LinearOperator | None,
        label: str,
    ) -> list[Solution]:
        columns = _Columns(rhs, default_tolerance(rhs) if self.tolerance is None else self.tolerance)
        # The first directions are M b: with x = 0 the residual is b itself.
        room, missed = self.memory // _bytes(rhs), rhs
        while len(columns.live) and columns.steps < self.max_products:
            rows = take(missed, columns.live)
            rows = rows if preconditioner is None else preconditioner.apply(rows)
            if not space.extend(rows, rhs):
                break
            # Only the first damping steers the growth; the others are read off the same space afterwards.
            y = self._coefficients(space, dampings[0], rhs)
            missed = space.residual(rhs, y, dampings[0])
            columns.judge(host(row_norms(missed)), space.rounding(y, dampings[0], rhs))
            # Two vectors for each direction: the basis's and its image's.
            if columns.stuck or 2 * (space.size + len(columns.live)) > room:
                break
        found = []
        for number, damping in enumerate(dampings):
            y = self._coefficients(space, damping, rhs)
            residuals = host(row_norms(space.residual(rhs, y, damping))) if space.size else columns.norms * 0
            # Products count once, for the damping for which the space was grown.
            report = columns.report(residuals, 0 if number else space.size, label, grown=number == 0)
            found.append(Solution(space.combine(space.basis, y, rhs), report))
        return found

    def _coefficients(self, space: GalerkinSpace, damping: float, rhs: Array) -> np.ndarray:
        """y [k, m] with (T + damping) y = V b."""
        damped = space.projected() + damping * np.eye(space.size)
        try:
            # Cholesky is also the test: it fails just where the projected system is not positive definite.
            half = np.linalg.cholesky(damped)
        except np.linalg.LinAlgError:
            # A Ritz value bounds the smallest eigenvalue from above, so that a negative one is proof of negative
            # curvature.
            lowest = float(np.linalg.eigvalsh(damped)[0])
            if not self.allow_indefinite and lowest < 0:
                bounds = extreme_eigenvalues(space.operator, rhs[:1])
                needed = max(damping - lowest, bounds.lowest_error - bounds.lowest)
                raise IndefiniteCurvature(
                    f"At damping {damping:g} the curvature has a negative eigenvalue, {lowest:g} or less: not a "
                    f"minimum. A damping of {1.01 * needed:.3g} would do; so would curvature='ggn', which is never "
                    "negative."
                ) from None
            # Singular or indefinite, and allowed: the smallest y that meets the equations, in place of a division by
            # about 0.
            return np.linalg.lstsq(damped, space.along.T, rcond=None)[0].T
        return np.linalg.solve(half.T, np.linalg.solve(half, space.along.T)).T


def _bytes(rhs: Array) -> int:
    """Of one vector."""
    return max(1, int(rhs.shape[1]) * itemsize(rhs))


class GalerkinSpace:
    """An orthonormal basis V, its images W = C V, and what right-hand sides b have along it."""

    def __init__(self, operator: LinearOperator, on_disk: bool, rhs: Array):
        self.operator = operator
        self.basis: Basis = BasisOnDisk(rhs) if on_disk else []
        self.images: Basis = BasisOnDisk(rhs) if on_disk else []
        self.along = np.zeros((int(rhs.shape[0]), 0))
        """V b, float64 [k, m]."""
        self._rows: list[np.ndarray] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *reason: object) -> None:
        for kept in (self.basis, self.images):
            if isinstance(kept, BasisOnDisk):
                kept.__exit__()

    @property
    def size(self) -> int:
        return int(self.along.shape[1])

    def extend(self, rows: Array, rhs: Array) -> bool:
        """Directions more; False if rows hold none that is new."""
        # Against all earlier blocks: a preconditioned space has no three-term recurrence to rely on.
        block = orthonormal(rows, self.basis)
        if not int(block.shape[0]):
            return False
        image = self.operator.apply(block)
        self.basis.append(block)
        self.images.append(image)
        # One block row of T for each step; symmetry gives the rest (`mirrored`).
        row = np.concatenate([host(image @ transpose(b)) for b in self.basis], axis=1)
        self._rows.append(refuse_nonfinite(row, "A product of the curvature"))
        self.along = np.concatenate([self.along, host(rhs @ transpose(block))], axis=1)
        return True

    def projected(self) -> np.ndarray:
        """T = V C V^T, float64 [m, m]."""
        return mirrored(self._rows)

    def residual(self, rhs: Array, y: np.ndarray, damping: float) -> Array:
        """b - C V^T y - damping V^T y: [k, D]."""
        return rhs - self.combine(self.images, y, rhs) - self.combine(self.basis, y, rhs) * damping

    def rounding(self, y: np.ndarray, damping: float, rhs: Array) -> np.ndarray:
        """About what rounding does to a residual: eps |C + damping| |y|, with a lower bound of the norm."""
        # The largest row norm is at most the spectral norm of T, which is at most that of C.
        norm = float(np.linalg.norm(self.projected(), axis=1).max(initial=0.0))
        return float(namespace(rhs).finfo(rhs.dtype).eps) * (norm + abs(damping)) * np.linalg.norm(y, axis=1)

    def combine(self, blocks: Basis, y: np.ndarray, like: Array) -> Array:
        """Linear combinations [k, D] of the basis or its images."""
        total, start = like * 0, 0
        for block in blocks:
            stop = start + int(block.shape[0])
            total, start = total + as_like(y[:, start:stop], block) @ block, stop
        return total


class _Columns:
    """How far each right-hand side has come."""

    def __init__(self, rhs: Array, tolerance: float):
        self.tolerance = tolerance
        self.norms = host(row_norms(rhs))
        self.live = np.flatnonzero(self.norms > 0)
        self.taken = np.zeros(len(self.norms), dtype=np.int64)
        self.best, self.since = np.full(len(self.norms), np.inf), np.zeros(len(self.norms), dtype=np.int64)
        self.steps, self.hidden = 0, False

    def judge(self, residuals: np.ndarray, rounding: np.ndarray) -> None:
        """After a step in which all live columns took part; what rounding does to the residuals [k]."""
        self.steps += 1
        self.taken[self.live] += 1
        relative = residuals / np.where(self.norms > 0, self.norms, 1.0)
        self.live = np.flatnonzero(relative > self.tolerance)
        # Ten times: `rounding` is a lower bound, for one product, and many were added up.
        self.hidden = bool((residuals <= 10 * rounding)[self.live].all())
        better = relative < 0.99 * self.best
        self.since = np.where(better, 0, self.since + 1)
        self.best = np.minimum(self.best, relative)

    @property
    def stuck(self) -> bool:
        """Whether rounding allows no more, or the residual of no live column has fallen for many steps."""
        return self.hidden or bool((self.since[self.live] >= PATIENCE).all())

    def report(self, residuals: np.ndarray, products: int, label: str, *, grown: bool) -> SolveReport:
        """grown: the space was grown for the damping that these residuals belong to."""
        relative = residuals / np.where(self.norms > 0, self.norms, 1.0)
        # For a damping the space was not grown for, more steps are no remedy: ELSEWHERE says to solve for it itself.
        missed = (STAGNATED if self.stuck else UNFINISHED) if grown else ELSEWHERE
        outcome = np.where(relative <= self.tolerance, CONVERGED, missed).astype(str)
        return SolveReport(label, relative, self.taken.copy(), outcome, products)


def _stack(solutions: list[Solution], label: str, rhs: Array) -> Solution:
    if not solutions:
        nothing = np.zeros(0)
        return Solution(rhs, SolveReport(label, nothing, nothing.astype(int), nothing.astype(str), 0))
    x = namespace(rhs).concat([solution.x for solution in solutions], axis=0)
    return Solution(x, joined([solution.report for solution in solutions])[label])
