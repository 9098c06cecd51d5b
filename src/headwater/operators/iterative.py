"""Inverses that only need `apply`: what a solve reports of itself, and the operator that solves when it is applied.

A solver takes right-hand sides [k, D] together and returns a `Solution`. Layout: a *column* of the system is a row of
these arrays.
"""

from __future__ import annotations

import math
import threading
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import numpy as np

from headwater.arrays import Array, device, itemsize, namespace, to_numpy
from headwater.errors import NotConverged
from headwater.memory import refuse_too_large
from headwater.operators.algebra import LinearOperator, rowwise_inner
from headwater.operators.finite import refuse_nonfinite

CONVERGED, STAGNATED, UNFINISHED, BROKEN = "converged", "stagnated", "out of iterations", "breakdown"
FINISHED, ELSEWHERE = "finished", "another damping's space"
FAR = 0.25
"""Relative residual up to which steps that were asked for and done count as an answer."""


@dataclass(frozen=True, eq=False, repr=False)
class SolveReport:
    """How far a solve came, column by column; arrays [k]. `print` says it in a sentence."""

    label: str
    """What was inverted: the block's name."""
    residual: np.ndarray
    """|b - (C + damping) x| / |b|, as the solver knows it; zero where b is. On a span, where nothing was solved for:
    the largest error of a score q (C + d)^-1 g that was measured, relative to |q| |(C + d)^-1 g|."""
    iterations: np.ndarray
    """Steps that the column took part in."""
    outcome: np.ndarray
    """"converged", "finished" (as many steps as were asked for), "stagnated" (rounding allows no more), "out of
    iterations", "another damping's space" (in which there was no more) or "breakdown"."""
    products: int
    """Vectors that went through the curvature, over all columns."""
    on_span: bool = False
    """Whether some columns were answered on a span of gradients, without iterations (docs/methods.md)."""

    @property
    def columns(self) -> str:
        """What the columns are: how many solves, or queries that were answered on a span."""
        return f"{len(self.residual)} {'queries, on a span' if self.on_span else 'solves'}"

    def __repr__(self) -> str:
        outcomes = ", ".join(sorted(set(self.outcome.tolist())))
        most = f"{self.residual.max(initial=0.0):.2g}"
        done = f"{outcomes}; up to {self.iterations.max(initial=0)} iterations, {self.products} products"
        what = "error of a score, measured," if self.on_span else "relative residual"
        return f"SolveReport({self.label!r}: {self.columns}; {what} up to {most}; {done})"

    @property
    def converged(self) -> np.ndarray:
        """[k]; steps that were asked for and done count too, unless they ended far from the answer."""
        return (self.outcome == CONVERGED) | ((self.outcome == FINISHED) & (self.residual <= FAR))


@dataclass(frozen=True, eq=False)
class Solution:
    """Solved right-hand sides [k, D], and how far each came."""

    x: Array
    report: SolveReport


class Solver(ABC):
    """Frozen settings of a way to solve (C + damping I) x = b for many b at once."""

    @abstractmethod
    def solve(
        self, curvature: LinearOperator, damping: float, rhs: Array, preconditioner: LinearOperator | None, label: str
    ) -> Solution:
        """rhs [k, D]. Errors: IndefiniteCurvature where negative curvature is met and not allowed."""

    def solve_path(
        self,
        curvature: LinearOperator,
        dampings: Sequence[float],
        rhs: Array,
        preconditioner: LinearOperator | None,
        label: str,
    ) -> list[Solution]:
        """A solution for each damping; a solver that can shares its work among them."""
        return [self.solve(curvature, damping, rhs, preconditioner, label) for damping in dampings]


_LOG: ContextVar[list[SolveReport] | None] = ContextVar("headwater_solves", default=None)


@contextmanager
def recorded_solves() -> Iterator[list[SolveReport]]:
    """A list that fills with the report of every solve in this context, in order."""
    log: list[SolveReport] = []
    # Contexts nest: an inner record is part of what the outer one was asked to see.
    outer = _LOG.get()
    # A context variable: other threads and tasks keep their own.
    token = _LOG.set(log)
    try:
        yield log
    finally:
        _LOG.reset(token)
        if outer is not None:
            outer.extend(log)


@contextmanager
def unrecorded_solves() -> Iterator[None]:
    """Solves of an operator's own in this context are nobody's answer: no log hears of them."""
    token = _LOG.set(None)
    try:
        yield
    finally:
        _LOG.reset(token)


class LastSolves(threading.local):
    """The solves of a thread's last call, by label; threads do not see each other's."""

    def __init__(self) -> None:
        self.found: dict[str, SolveReport] = {}

    def __reduce__(self) -> tuple[type[LastSolves], tuple[()]]:
        return LastSolves, ()  # a copy, and what is read from a file, has solved nothing yet


def joined(reports: Sequence[SolveReport]) -> dict[str, SolveReport]:
    """By label, the columns of all its reports one after the other."""
    labels = dict.fromkeys(report.label for report in reports)
    return {label: _join(label, [r for r in reports if r.label == label]) for label in labels}


def _join(label: str, reports: Sequence[SolveReport]) -> SolveReport:
    return SolveReport(
        label,
        residual=np.concatenate([report.residual for report in reports]),
        iterations=np.concatenate([report.iterations for report in reports]),
        outcome=np.concatenate([report.outcome for report in reports]),
        products=sum(report.products for report in reports),
        on_span=any(report.on_span for report in reports),
    )


class IterativeInverse(LinearOperator):
    """(curvature + damping I)^-1, solved anew for whatever it is applied to; all columns together.

    A warning (`NotConverged`) says when columns missed the tolerance; `recorded_solves` has the figures.
    """

    symmetric = True

    def __init__(
        self,
        curvature: LinearOperator,
        damping: float,
        solver: Solver,
        preconditioner: LinearOperator | None = None,
        label: str = "",
    ):
        self.curvature, self.damping, self.solver = curvature, float(damping), solver
        self._preconditioner, self.label = preconditioner, label
        self.psd = curvature.psd

    @property
    def preconditioner(self) -> LinearOperator | None:
        return self._preconditioner

    @property
    def input_size(self) -> int:
        return self.curvature.input_size

    def _apply(self, tensor: Array) -> Array:
        rhs = tensor.reshape((-1, self.input_size))
        _refuse_without_room(rhs, self.label)
        # C x = b is linear in b: scaling by rows, and back, changes no digit that counts.
        rhs, scale = _scaled(rhs, self.label)
        solution = self.solver.solve(self.curvature, self.damping, rhs, self.preconditioner, self.label)
        note(solution.report)
        return _unscaled(solution.x, scale, self.label).reshape(tensor.shape)

    def adjoint(self) -> IterativeInverse:
        return self

    def trace(self) -> float:
        """Errors: NotImplementedError; use `dense`."""
        raise NotImplementedError("The trace of an inverse that is solved for needs its matrix: use dense().")


def apply_path(operators: Sequence[LinearOperator], tensor: Array) -> list[Array]:
    """One tensor through several operators; inverses of one curvature at several dampings share their work."""
    inverses = [op for op in operators if isinstance(op, IterativeInverse)]
    if len(inverses) == len(operators) and all(op.curvature is inverses[0].curvature for op in inverses):
        return _solved_path(inverses, tensor)
    return [operator.apply(tensor) for operator in operators]


def _solved_path(inverses: Sequence[IterativeInverse], tensor: Array) -> list[Array]:
    """Of one curvature, in one call of its solver; the smallest damping comes first, as its solution is the hardest."""
    order = sorted(range(len(inverses)), key=lambda k: inverses[k].damping)
    hardest, label = inverses[order[0]], inverses[0].label
    dampings = [inverses[k].damping for k in order]
    rhs = tensor.reshape((-1, hardest.input_size))
    _refuse_without_room(rhs, label)
    rhs, scale = _scaled(rhs, label)
    solutions = hardest.solver.solve_path(hardest.curvature, dampings, rhs, hardest.preconditioner, label)
    found: dict[int, Array] = {}
    for k, solution in zip(order, solutions, strict=True):
        note(solution.report)
        found[k] = _unscaled(solution.x, scale, label).reshape(tensor.shape)
    return [found[k] for k in range(len(inverses))]


def _refuse_without_room(rhs: Array, label: str) -> None:
    """Every solver holds solutions, residuals and what the curvature makes of them, beside the right-hand sides."""
    shape = tuple(map(int, rhs.shape))
    refuse_too_large(
        f"Block {label!r}: solving for right-hand sides",
        shape,
        3.0 * shape[0] * shape[1] * itemsize(rhs),
        "Ask about fewer queries at once, in smaller batches.",
        device(rhs),
    )


SAFE = 1e12
"""Largest entry, and one over the smallest largest entry, with which squares and products stay within float32."""


def _scaled(rhs: Array, label: str) -> tuple[Array, Array | None]:
    """Right-hand sides [k, D], and what their rows were divided by: [k, 1], or None where all are of sensible size.

    A system is linear in them; but squares beyond float32 make a norm infinite, or zero, and any residual a small one.
    Errors: NonFiniteValue.
    """
    refuse_nonfinite(rhs, f"Block {label!r}: what is to be solved for (queries' gradients)")
    xp = namespace(rhs)
    if not math.prod(rhs.shape):
        return rhs, None
    largest = xp.max(xp.abs(rhs), axis=1)
    used = host(largest)
    used = used[used > 0]
    # As nearly always: then the numbers stay as they are, bit by bit.
    if used.size == 0 or (used.max() <= SAFE and used.min() >= 1.0 / SAFE):
        return rhs, None
    scale = xp.where(largest > 0, largest, xp.ones_like(largest))[:, None]
    return rhs / scale, scale


def _unscaled(x: Array, scale: Array | None, label: str) -> Array:
    """The solutions, in the size of the right-hand sides as they were given. Errors: NonFiniteValue."""
    return refuse_nonfinite(x if scale is None else x * scale, f"Block {label!r}: what was solved for")


def note(report: SolveReport) -> None:
    """Tell whoever records solves, and warn of columns that missed the tolerance."""
    log = _LOG.get()
    if log is not None:
        log.append(report)
    _warn(report)


def _warn(report: SolveReport) -> None:
    missed = ~report.converged
    if missed.any():
        worst = report.residual[missed].max()
        kinds = ", ".join(f"{(report.outcome == kind).sum()} {kind}" for kind in np.unique(report.outcome[missed]))
        warnings.warn(
            f"Block {report.label!r}: {missed.sum()} of {len(missed)} solves missed the tolerance ({kinds}); the worst "
            f"relative residual is {worst:.2g}. Allow more iterations, use more damping, or another preconditioner.",
            NotConverged,
            stacklevel=2,
        )


def row_norms(rows: Array) -> Array:
    """Euclidean norms of [k, D]: [k]; also where the squares are too large, or too small, for the dtype."""
    xp = namespace(rows)
    norms = xp.sqrt(rowwise_inner(rows, rows))
    # The plain formula where it serves; the scaled one costs another pass over [k, D].
    if bool(xp.all(xp.isfinite(norms) & (norms > 0))) or not math.prod(rows.shape):
        return norms
    largest = xp.max(xp.abs(rows), axis=1)
    scale = xp.where((largest > 0) & xp.isfinite(largest), largest, xp.ones_like(largest))[:, None]
    scaled = rows / scale
    return xp.sqrt(rowwise_inner(scaled, scaled)) * scale[:, 0]


def default_tolerance(like: Array) -> float:
    """Relative residual that is worth asking for: the square root of eps, 3e-4 in float32, 1.5e-8 in float64."""
    return float(namespace(like).finfo(like.dtype).eps) ** 0.5


def host(values: Array) -> np.ndarray:
    """Small arrays on the host, in float64."""
    return to_numpy(values).astype(np.float64)
