"""Conjugate gradients for many right-hand sides: each by itself, or all in one space (block CG).

Sources: Hestenes and Stiefel 1952; O'Leary 1980 (block); Ji and Li 2017 (block CG that survives dependent columns).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from headwater.arrays import Array, as_like, namespace, precise, transpose
from headwater.errors import IndefiniteCurvature
from headwater.operators.algebra import IdentityOperator, LinearOperator, rowwise_inner
from headwater.operators.finite import refuse_nonfinite
from headwater.operators.iterative import (
    BROKEN,
    CONVERGED,
    STAGNATED,
    UNFINISHED,
    Solution,
    Solver,
    SolveReport,
    default_tolerance,
    host,
    row_norms,
)
from headwater.operators.krylov import extreme_eigenvalues, orthonormal

PATIENCE = 200
"""Steps without a smaller residual after which a column is given up. Residuals rise before they fall: at condition 1e5
for more than a hundred steps."""


@dataclass(frozen=True)
class ConjugateGradient(Solver):
    """Preconditioned conjugate gradients; columns that have converged leave.

    A column has converged when its residual is at most tolerance |b|. It has stagnated when rounding, about eps times
    |C| |x|, hides anything smaller than its residual, or when the residual no longer falls.
    It refuses negative curvature.
    """

    tolerance: float | None = None
    """Relative residual; None for the square root of the dtype's eps."""
    max_iterations: int = 1000
    """Per column."""
    block: bool = False
    """One space for all columns: fewer steps, and k x k systems in each."""

    def solve(
        self, curvature: LinearOperator, damping: float, rhs: Array, preconditioner: LinearOperator | None, label: str
    ) -> Solution:
        state = _Columns(rhs, self.tolerance, label)
        run = _block_steps if self.block else _steps
        if not state.live.size:
            return state.solution()
        with curvature.repeated():
            run(self, _Damped(curvature, damping), preconditioner or IdentityOperator(curvature.input_size), state)
        return state.solution()


class _Damped:
    """C + damping, which counts what goes through it and remembers the largest and smallest Rayleigh quotients."""

    def __init__(self, curvature: LinearOperator, damping: float):
        self.curvature, self.damping = curvature, damping
        self.products = 0
        # The largest Rayleigh quotient so far: a lower bound of |C + damping|, which rises as CG goes on.
        self.norm = abs(damping)

    def __call__(self, rows: Array) -> Array:
        self.products += int(rows.shape[0])
        return self.curvature.apply(rows) + rows * self.damping

    def refuse(self, rhs: Array, lowest: float) -> None:
        """Errors: IndefiniteCurvature, naming a damping that would do."""
        # CG saw one negative direction, not the lowest; Lanczos finds how much damping the whole spectrum needs.
        bounds = extreme_eigenvalues(self.curvature, rhs[:1])
        needed = max(self.damping - lowest, bounds.lowest_error - bounds.lowest)
        raise IndefiniteCurvature(
            f"At damping {self.damping:g} there are directions of negative curvature ({lowest:g}): not a minimum. A "
            f"damping of {1.01 * needed:.3g} would do; so would curvature='ggn', which is never negative."
        )


class _Columns:
    """The state of all columns: who is still at work, and what those that left brought home."""

    def __init__(self, rhs: Array, tolerance: float | None, label: str):
        self.rhs, self.label = rhs, label
        self.tolerance = default_tolerance(rhs) if tolerance is None else tolerance
        self.eps = float(namespace(rhs).finfo(rhs.dtype).eps)
        count = int(rhs.shape[0])
        self.norms = host(row_norms(rhs))
        # b = 0 has the solution x = 0; in the loop its relative residual would be 0 / 0.
        self.live = np.flatnonzero(self.norms > 0)
        self.residual = np.zeros(count)
        self.iterations = np.zeros(count, dtype=np.int64)
        self.outcome = np.full(count, CONVERGED, dtype=object)
        self.best = np.full(count, np.inf)
        self.since = np.zeros(count, dtype=np.int64)
        self.products = 0
        self._left: list[tuple[np.ndarray, Array]] = []

    def judge(self, residuals: np.ndarray, sizes: np.ndarray, norm: float, step: int) -> np.ndarray:
        """Mark what has ended among the live columns, from |r| and |x| [live]; which of them stay [live], boolean."""
        refuse_nonfinite(residuals, f"Block {self.label!r}: a residual after {step} steps of conjugate gradients")
        live, relative = self.live, residuals / self.norms[self.live]
        # The recurrence's r goes on falling after x has no digits left to hold it: what x can hold is eps |C| |x|, and
        # no residual below that is ever reported.
        floor = self.eps * norm * sizes / self.norms[live]
        self.residual[live] = np.maximum(relative, floor)
        self.iterations[live] = step
        # A hundredth at least: in float32 a stagnated residual still jitters in its last digits.
        better = relative < 0.99 * self.best[live]
        self.since[live] = np.where(better, 0, self.since[live] + 1)
        self.best[live] = np.minimum(self.best[live], relative)
        done = self.residual[live] <= self.tolerance
        # Stagnated is not failed: below the floor another step would only add rounding.
        stuck = ~done & ((relative <= floor) | (self.since[live] >= PATIENCE))
        self.outcome[live[done]] = CONVERGED
        self.outcome[live[stuck]] = STAGNATED
        return ~(done | stuck)

    def release(self, x: Array, leaving: np.ndarray) -> None:
        """Columns of the live that leave, with their solutions."""
        if leaving.any():
            self._left.append((self.live[leaving], take(x, np.flatnonzero(leaving))))
            self.live = self.live[~leaving]

    def go_on(self, x: Array, stay: np.ndarray, *, last: bool) -> np.ndarray:
        """Let go of columns that do not stay [live], after the last step of all; the places of the others."""
        if last:
            self.outcome[self.live[stay]] = UNFINISHED
            stay = np.zeros_like(stay)
        self.release(x, ~stay)
        return np.flatnonzero(stay)

    def solution(self) -> Solution:
        xp = namespace(self.rhs)
        # Columns left in the order in which they converged; argsort puts them back where they came from.
        order = np.concatenate([columns for columns, _ in self._left] or [np.zeros(0, dtype=np.int64)])
        # Those that never took part: their right-hand side was zero.
        zero = np.setdiff1d(np.arange(len(self.norms)), order)
        rows = [x for _, x in self._left] + ([take(self.rhs, zero) * 0] if len(zero) else [])
        x = take(xp.concat(rows, axis=0), np.argsort(np.concatenate([order, zero]))) if rows else self.rhs
        outcome = self.outcome.astype(str)
        return Solution(x, SolveReport(self.label, self.residual, self.iterations, outcome, self.products))


def take(rows: Array, index: np.ndarray) -> Array:
    """Some rows, by host indices."""
    # Mostly nobody leaves; then no copy of [k, D] is made.
    if len(index) == int(rows.shape[0]) and np.array_equal(index, np.arange(len(index))):
        return rows
    xp = namespace(rows)
    return xp.take(rows, as_like(index.astype(np.int64), rows, dtype=xp.int64), axis=0)


def _column(values: np.ndarray, like: Array) -> Array:
    return as_like(values, like)[:, None]


def _steps(settings: ConjugateGradient, operator: _Damped, inverse: LinearOperator, state: _Columns) -> None:
    """Each column by itself."""
    r = take(state.rhs, state.live)
    x, z = r * 0, inverse.apply(r)
    p, rz = z, host(rowwise_inner(r, z))
    for step in range(1, settings.max_iterations + 1):
        product = operator(p)
        # Hestenes and Stiefel 1952, section 3: the step length is r^T z / p^T A p, for each column by itself.
        curve, length = host(rowwise_inner(p, product)), host(rowwise_inner(p, p))
        operator.norm = max(operator.norm, float(np.max(np.abs(curve) / np.where(length > 0, length, 1.0))))
        # A product is off by eps |C| |p|; only what lies well below that is curvature which is really negative.
        negative = curve < -4 * state.eps * operator.norm * length
        if negative.any():
            operator.refuse(r, float((curve / np.where(length > 0, length, 1.0)).min()))
        # p^T A p = 0 within rounding: no step length there; dividing by it would make the whole block infinite.
        broken = np.abs(curve) <= state.eps**2 * operator.norm * length
        rate = np.where(broken, 0.0, rz / np.where(broken, 1.0, curve))
        x, r = x + _column(rate, x) * p, r - _column(rate, r) * product
        stay = state.judge(host(row_norms(r)), host(row_norms(x)), operator.norm, step) & ~broken
        state.outcome[state.live[broken]] = BROKEN
        # The last step's columns leave with what they have, so that all have a solution and an outcome.
        kept = state.go_on(x, stay, last=step == settings.max_iterations)
        if not len(kept):
            break
        x, r, p, rz = take(x, kept), take(r, kept), take(p, kept), rz[kept]
        z = inverse.apply(r)
        following = host(rowwise_inner(r, z))
        # beta = r_new^T z_new / r^T z (Fletcher and Reeves' form), which needs a symmetric preconditioner.
        p, rz = z + _column(following / rz, z) * p, following
    state.products = operator.products


def _block_steps(settings: ConjugateGradient, operator: _Damped, inverse: LinearOperator, state: _Columns) -> None:
    """All columns in one space; directions that others already span are dropped."""
    xp = namespace(state.rhs)
    r = take(state.rhs, state.live)
    x = r * 0
    # The directions are orthonormalised afresh at every step, so that columns which have become dependent, as near the
    # end, leave the space in place of making P A P^T singular (Ji and Li 2017, breakdown-free block CG).
    p = orthonormal(inverse.apply(r))
    for step in range(1, settings.max_iterations + 1):
        product = operator(p)
        # k x k in the best precision there is: its smallest eigenvalues decide whether the curvature is negative.
        small = precise(p @ transpose(product))
        values, vectors = xp.linalg.eigh((small + transpose(small)) / 2)
        operator.norm = max(operator.norm, float(xp.max(xp.abs(values))))
        if float(values[0]) < -4 * state.eps * operator.norm:
            operator.refuse(r, float(values[0]))
        safe = xp.where(xp.abs(values) > state.eps**2 * operator.norm, values, xp.ones_like(values))
        # core = (P A P^T)^-1 [k, k], by its eigenvalues: those at rounding level are left alone, not divided by.
        core = (vectors / safe) @ transpose(vectors)
        core = xp.astype(core, p.dtype)
        # Every column minimises over the span of all columns' directions, not of its own alone.
        rate = (r @ transpose(p)) @ core
        x, r = x + rate @ p, r - rate @ product
        stay = state.judge(host(row_norms(r)), host(row_norms(x)), operator.norm, step)
        kept = state.go_on(x, stay, last=step == settings.max_iterations)
        if not len(kept):
            break
        x, r = take(x, kept), take(r, kept)
        z = inverse.apply(r)
        # A-orthogonal to the last directions; to all earlier ones by the recurrence, but for rounding.
        p = orthonormal(z - ((z @ transpose(product)) @ core) @ p)
        # No direction is left although columns have not converged: the space is invariant within rounding.
        if not int(p.shape[0]):
            state.outcome[state.live] = BROKEN
            state.release(x, np.ones(len(kept), dtype=bool))
            break
    state.products = operator.products
