"""A curvature on the span of its heaviest gradients: scores from m numbers a row, with an error that is measured.

With Phi [m, D] the heaviest gradients of the rows, P the projection on their span, F all gradients (each times
the root of its row's weight), W the rows' weight, C = F^T F / W:

    G = Phi Phi^T,   A = Phi F^T F Phi^T / W,   M = (P C P + d)^-1 = (I - Phi^T S Phi) / d
    S = G^-1 - d (A + d G)^-1                                                                                   [m, m]

A solution x = M v misses by r = v - (C + d) x, so that, with y = M u and s = u - (C + d) y for another vector u,

    v^T (C + d)^-1 u = v^T y + r^T y + r^T (C + d)^-1 s,   the last within |r| |s| / d.

Within the span r^T y is zero (Galerkin), and the error is of second order in what is left out. To leave the light
gradients out of the curvature, in place of projecting them, needs three times as many for the same error. One product
of the curvature with a few of the vectors tells it; where it is too large the span grows, and where that does not help
the vectors are solved for (see `IterativeInverse`).

Sources: Woodbury 1950; Rasmussen and Williams 2006, section 8.3 (projected processes).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from headwater.arrays import (
    Array,
    add_product,
    identity,
    is_torch,
    namespace,
    precise,
    rows_within_memory,
    transpose,
)
from headwater.curvature.dual import (
    AlongRows,
    DualInverse,
    DualOperator,
    InverseThroughRows,
    RowNorms,
    RowSumOperator,
    cholesky_solve,
    index_like,
    lower_solve,
)
from headwater.curvature.products import CurvatureOperator, DrawnRows
from headwater.errors import SingularOperator
from headwater.gradients.block import BlockGradient
from headwater.gradients.draws import are_single_products, inner_draws
from headwater.operators.algebra import LinearOperator, rowwise_inner
from headwater.operators.iterative import (
    CONVERGED,
    STAGNATED,
    IterativeInverse,
    Solver,
    SolveReport,
    default_tolerance,
    host,
    note,
    row_norms,
)
from headwater.rows import Total

FIRST, LARGEST = 768, 4096
"""Gradients of the first span that is tried, and of the largest there is."""
STEEPNESS = 1.6
"""The error falls with the trace outside of the span to at least about this power (on digits, at 10 to 900 mean
eigenvalues): a guess at how many gradients will do, after which the error is measured again."""
PRECONDITIONER = 1024
"""Gradients of the span that stands for the curvature where vectors are solved for."""
SOLVED_IN = 50
"""Products that a query is taken to need where it is solved for."""
COUNTED = 1.0 - 1e-4
"""Share of the trace that the gradients hold which are projected on the span; the lightest hold the rest."""
PROBES = 8
"""Vectors on either side that an error is measured on."""


@dataclass(frozen=True, eq=False)
class Span:
    """The span of the kept gradients, and the curvature on it: P C P."""

    dual: DualOperator
    """Of the kept gradients."""
    counted: np.ndarray
    """Whether each gradient [n k] counts in C; all but the lightest do."""

    @property
    def is_everything(self) -> bool:
        return len(self.dual.kept) == len(self.counted)

    @cached_property
    def visible(self) -> Array:
        """G [m, m], with directions that rounding hides raised to what can be told from zero."""
        gram, xp, m = self.dual.gram, namespace(self.dual.gram), len(self.dual.kept)
        # Where rows are alike it is singular, and known to the rounding of the gradients, and of its own factorisation.
        entries = float(xp.finfo(self.dual.curvature.like.dtype).eps) * float(xp.max(xp.sum(xp.abs(gram), axis=1)))
        factors = 4 * m * float(xp.finfo(gram.dtype).eps) * float(xp.max(gram))
        return gram + max(entries, factors) * identity(m, gram)

    @cached_property
    def basis(self) -> Array:
        """L [m, m], lower triangular: L^-1 Phi are orthonormal, but for directions that rounding hides."""
        return namespace(self.visible).linalg.cholesky(self.visible)

    @cached_property
    def image(self) -> Array:
        """A [m, m]: the curvature's products with the kept gradients, along these."""
        return self.dual.sweep(Total(self._image_of)) / self.dual.rows

    def _image_of(self, rows: DrawnRows) -> Array:
        """The batch's share of Phi F^T F Phi^T: [m, m]."""
        kept = self.dual.gradients_kept
        draws, each, total = self.dual.draws(rows), self.dual.draws_per_row, None
        step = rows_within_memory(kept.rows * each, kept.like)
        roots = None if rows.weights is None else namespace(rows.weights).sqrt(rows.weights)
        for start in range(0, len(rows.batch), step):
            piece = slice(start, min(start + step, len(rows.batch)))
            first, last = ((rows.start + place) * each for place in (piece.start, piece.stop))
            # The lightest gradients are in no product: hundreds of them weigh less than what is asked for.
            here = np.flatnonzero(self.counted[first:last])
            along = inner_draws(kept, draws, piece, here)
            if roots is not None:
                along = along * namespace(roots).take(roots[piece], index_like(here // each, roots), axis=0)
            along = precise(transpose(along))
            total = add_product(total, along, along)
        assert total is not None
        return total

    def inverse(self, damping: float) -> DualInverse | SpanInverse:
        """(P C P + damping)^-1; that of the whole where the span has all gradients."""
        return DualInverse(self.dual, damping) if self.is_everything else SpanInverse(self, damping)


class SpanInverse(InverseThroughRows):
    """(P C P + damping)^-1."""

    def __init__(self, span: Span, damping: float):
        super().__init__(span.dual, damping)
        self.span = span

    @cached_property
    def factor(self) -> Array:
        """The lower Cholesky factor of A + d G. Errors: SingularOperator where rounding hides the damping."""
        gram, dual = self.span.visible, self.span.dual
        xp = namespace(gram)
        dual.refuse_hidden(self.damping, float(xp.max(xp.sum(xp.abs(gram), axis=1))) / dual.rows)
        found = _cholesky(self.span.image + self.damping * gram)
        if found is None:  # along directions that the gradients do not have, all of it is rounding
            raise SingularOperator(f"Block {dual.label!r}: rounding of like rows hides {self.damping:g}.")
        return found

    def prepare(self) -> None:
        _ = self.factor

    def _apply(self, tensor: Array) -> Array:
        vectors = tensor.reshape((-1, self.input_size))
        return (self.span.dual.minus_solved(vectors, self.solve) / self.damping).reshape(tensor.shape)

    def solve(self, along: Array) -> Array:
        sides = precise(transpose(along))
        # S = G^-1 - d (A + d G)^-1: both factors are made once, and no side of m columns is solved for.
        solved = cholesky_solve(self.span.basis, sides) - self.damping * cholesky_solve(self.factor, sides)
        return namespace(along).astype(transpose(solved), along.dtype)

    def outside(self, value: BlockGradient) -> np.ndarray:
        """The share of each gradient's square that lies outside of the span: [n]."""
        inside = lower_solve(self.span.basis, precise(transpose(self.curvature.along(value))))
        squares = host(value.squared_norms())
        return 1.0 - host(rowwise_inner(transpose(inside), transpose(inside))) / np.where(squares > 0, squares, 1.0)


def _cholesky(matrix: Array) -> Array | None:
    """The lower factor; None of a matrix that is not positive."""
    xp: Any = namespace(matrix)
    if is_torch(matrix):
        found, failed = xp.linalg.cholesky_ex(matrix)
        return None if bool(failed) else found
    try:
        found = xp.linalg.cholesky(matrix)
    except np.linalg.LinAlgError:
        return None
    return found if bool(xp.all(xp.isfinite(found))) else None  # JAX gives NaN


class RowSpans(RowSumOperator):
    """A sum over rows, and the spans of its heaviest gradients, each made when it is first asked for."""

    def __init__(self, curvature: CurvatureOperator, rows: float, norms: RowNorms):
        super().__init__(curvature, rows, by_axes=True)
        self.norms = norms
        self._made: dict[int, Span] = {}

    @classmethod
    def of(cls, curvature: CurvatureOperator, rows: float) -> RowSpans:
        """Read all rows once."""
        return cls(curvature, rows, RowNorms.of(RowSumOperator(curvature, rows, by_axes=True)))

    @property
    def count(self) -> int:
        """Gradients in all."""
        return self.norms.squares.size

    @cached_property
    def _outside(self) -> np.ndarray:
        """The sum of the squares of all but the heaviest k, for each k: [count + 1]."""
        ascending = np.cumsum(np.sort(self.norms.squares.reshape(-1)))
        return np.concatenate([ascending[::-1], [0.0]])

    def affordable(self, queries: float) -> int:
        """Gradients of the largest span that costs no more than to solve for so many queries would."""
        # m^2 multiply-adds in float64 for each gradient; a product of a query meets every row's numbers twice.
        products = SOLVED_IN * queries * 2 * len(self.norms.keys) * self.input_size
        return min(LARGEST, max(FIRST, int((products / (2 * self.count)) ** 0.5)))

    def larger(self, size: int, missed: float, most: int) -> int | None:
        """How many gradients would do, where `size` of them leave so many times the error; None where none will."""
        allowed = self._outside[size] / missed ** (1.0 / STEEPNESS)
        enough = max(int(np.argmax(self._outside <= allowed)), size + size // 4)
        if self.count <= most:
            # The span of all of them has no error.
            return min(enough, self.count) if size < self.count else None
        return min(enough, most) if size < most and enough <= most * 5 // 4 else None

    def span(self, size: int) -> Span:
        """Of the heaviest `size` gradients."""
        if size not in self._made:
            flat = self.norms.squares.reshape(-1)
            kept, counted = np.sort(self.norms.heaviest(1.0, size)), np.zeros(len(flat), dtype=bool)
            counted[self.norms.heaviest(COUNTED)] = counted[kept] = True
            self._made[size] = Span(self._dual(kept), counted)
        return self._made[size]

    def _dual(self, kept: np.ndarray) -> DualOperator:
        """Of gradients at these positions, in order."""
        return DualOperator(self.curvature, self.rows, self.norms.held(kept), by_axes=True)

    def inverse(self, damping: float = 0.0) -> DualInverse | SpanInverse:
        """Of the part on one span: a preconditioner for the whole."""
        return self.span(min(PRECONDITIONER, self.count)).inverse(damping)

    def probes(self, size: int) -> BlockGradient:
        """Gradients of length one outside of the span of `size`: the heaviest of them, and some at random.

        At random not from the lightest, which together hold next to nothing (`COUNTED`).
        """
        flat, counted = self.norms.squares.reshape(-1), self.norms.heaviest(COUNTED)
        light = self.norms.heaviest(1.0)[size:]
        light = light[flat[light] > 0]
        among = light[: max(len(counted) - size, PROBES)]
        random = np.random.default_rng(0).permutation(len(among))[:PROBES]
        chosen = np.unique(np.concatenate([light[:PROBES], among[random]]))
        held = self._dual(chosen).gradients_kept
        return held.weighted(1.0 / namespace(held.like).sqrt(held.squared_norms()))


class SpanSolve(IterativeInverse):
    """(C + damping)^-1 along a span of heavy gradients where the error of the scores allows it; else solved for.

    Vectors, as `apply` takes them, are always solved for.
    """

    def __init__(
        self,
        curvature: CurvatureOperator,
        damping: float,
        solver: Solver,
        spans: RowSpans,
        near: Callable[[], LinearOperator],
        tolerance: float | None,
    ):
        """near: gives an inverse that is near to this one, once vectors have to be solved for.

        tolerance: of a score, relative to |q| |(C + d)^-1 g|, as of a solve; None for the root of eps.
        """
        super().__init__(curvature, damping, solver, None, curvature.block)
        self.spans, self._near, self.tolerance = spans, near, tolerance
        self._size: int | None = min(FIRST, spans.count)
        self._inverses: dict[int, DualInverse | SpanInverse | None] = {}
        self._probed: dict[SpanInverse, _Missed] = {}
        self._last: tuple[Array, InverseThroughRows, tuple[float, int]] | None = None

    @cached_property
    def preconditioner(self) -> LinearOperator:
        return self._near()

    def aim(self, like: Array) -> float:
        """The error that is allowed, in the dtype of `like`."""
        return default_tolerance(like) if self.tolerance is None else self.tolerance

    def block_sides(self, queries: BlockGradient, train_per_query: float) -> tuple[LinearOperator, LinearOperator]:
        inverse = self._good_enough(queries, len(self.spans.norms.keys) / train_per_query)
        if inverse is None:
            return super().block_sides(queries, train_per_query)
        return MeasuredAlongRows(self, inverse), AlongRows(inverse, solved=False)

    def quadratic(self, value: BlockGradient) -> Array:
        # Rows on themselves: as many as there are.
        inverse = self._good_enough(value, len(self.spans.norms.keys))
        return super().quadratic(value) if inverse is None else inverse.quadratic(value)

    def _good_enough(self, value: BlockGradient, queries: float) -> DualInverse | SpanInverse | None:
        """The inverse on the smallest span that serves these vectors, of so many in all; None where none does."""
        # Kept for good: a fit that was loaded gives the scores of the one that was saved.
        if self._size is None or not are_single_products(value) or not self.spans.curvature.source.keep():
            return None
        # What was too small for earlier vectors is not tried again. Read once: other threads ask, too.
        size: int | None = self._size
        while size is not None:
            inverse = self._inverse(size)
            missed = np.inf if inverse is None else self.error(inverse, value)[0] / self.aim(value.like)
            if missed <= 1.0:
                return inverse
            self._size = size = self.spans.larger(size, missed, self.spans.affordable(queries))
        return None

    def _inverse(self, size: int) -> DualInverse | SpanInverse | None:
        """None where rounding hides the damping."""
        if size not in self._inverses:
            found = self.spans.span(size).inverse(self.damping)
            try:
                found.prepare()
                self._inverses[size] = found
            except SingularOperator:
                self._inverses[size] = None
        return self._inverses[size]

    def error(self, inverse: DualInverse | SpanInverse, value: BlockGradient) -> tuple[float, int]:
        """Of scores of these rows, relative to |q| |(C + d)^-1 g|; and products made.

        On a few of them, those that reach furthest out of the span among them, and gradients of train rows.
        """
        # A run asks twice about its first queries: to choose the sides, and as they go through theirs.
        last = self._last  # read once: another thread may put its own here
        if last is None or last[0] is not value.like or last[1] is not inverse:
            found = self._error(inverse, value) if isinstance(inverse, SpanInverse) else self._rounding(inverse, value)
            last = self._last = value.like, inverse, found
        return last[2]

    def _error(self, inverse: SpanInverse, value: BlockGradient) -> tuple[float, int]:
        mine = self._missed(inverse, value.take(self._suspects(inverse, value)).flat())
        theirs = self._of_train_rows(inverse)
        return self._between(mine, theirs), len(mine.own) + len(theirs.own)

    def _between(self, one: _Missed, other: _Missed) -> float:
        """The largest error of a score of one's vectors with the other's; see the module's text."""
        first = np.abs(host(one.residual @ transpose(other.solution)))
        second = np.outer(one.missed, other.missed) / self.damping
        rounding = self._eps(one.solution) * np.outer(one.length, other.length) / self.damping
        # What a residual bounds the error of a score by: |q| |(C + d)^-1 g|, the latter from below.
        scale = np.outer(one.length, other.solved(self.damping))
        return float(((first + second + rounding)[scale > 0] / scale[scale > 0]).max(initial=0.0))

    def _rounding(self, inverse: DualInverse, value: BlockGradient) -> tuple[float, int]:
        """Of the span of all gradients: what is left is a difference of numbers of the size |v|^2 / damping."""
        # Relative to own scores, which are no larger than |q| |(C + d)^-1 q|: these vectors' solutions are not at hand.
        squares, own = host(value.squared_norms()), host(inverse.quadratic(value))
        shares = squares[own > 0] / own[own > 0]
        return self._eps(value.like) * float(shares.max(initial=0.0)) / self.damping, 0

    def _eps(self, like: Array) -> float:
        return float(namespace(like).finfo(like.dtype).eps)

    def _of_train_rows(self, inverse: SpanInverse) -> _Missed:
        if inverse not in self._probed:
            self._probed[inverse] = self._missed(inverse, self.spans.probes(len(inverse.span.dual.kept)).flat())
        return self._probed[inverse]

    def _suspects(self, inverse: SpanInverse, value: BlockGradient) -> Array:
        """Rows that reach furthest out of the span, and as many at even distances."""
        furthest = np.argsort(-inverse.outside(value), kind="stable")[: PROBES // 2]
        even = np.linspace(0, value.rows - 1, min(PROBES // 2, value.rows)).astype(int)
        return index_like(np.unique(np.concatenate([furthest, even])), value.like)

    def _missed(self, inverse: SpanInverse, vectors: Array) -> _Missed:
        solution = inverse.apply(vectors)
        residual = vectors - self.curvature.apply(solution) - solution * self.damping
        own = host(rowwise_inner(vectors, solution))
        return _Missed(solution, residual, host(row_norms(residual)), host(row_norms(vectors)), own)


@dataclass(frozen=True, eq=False)
class _Missed:
    """Some vectors' solutions on a span [k, D], by what these miss [k, D], how long that is, and the vectors, [k]."""

    solution: Array
    residual: Array
    missed: np.ndarray
    length: np.ndarray
    own: np.ndarray
    """What the vectors score on themselves: [k]."""

    def solved(self, damping: float) -> np.ndarray:
        """A lower bound of |(C + damping)^-1 v|: [k]."""
        nearest = host(row_norms(self.solution)) - self.missed / damping
        # With A = C + d: v^T A^-1 v is at least (v^T x)^2 / x^T A x (Cauchy and Schwarz), and A x = v - r.
        onto = self.length * (self.own - host(rowwise_inner(self.residual, self.solution)))
        along = np.divide(self.own**2, onto, out=np.zeros_like(onto), where=onto > 0)
        return np.maximum(nearest, along)


class MeasuredAlongRows(AlongRows):
    """The queries' side, which tells how far it may be off: `SolveReport.residual` is the error of the scores."""

    def __init__(self, solve: SpanSolve, inverse: DualInverse | SpanInverse):
        super().__init__(inverse, solved=True)
        self.solve, self.found = solve, inverse

    def apply_block(self, value: BlockGradient) -> BlockGradient:
        error, products = self.solve.error(self.found, value)
        outcome = CONVERGED if error <= self.solve.aim(value.like) else STAGNATED
        count = value.rows
        note(
            SolveReport(
                self.solve.label,
                residual=np.full(count, error),
                iterations=np.zeros(count, dtype=np.int64),
                outcome=np.full(count, outcome),
                products=products,
                on_span=True,
            )
        )
        return super().apply_block(value)
