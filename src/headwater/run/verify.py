"""Are these scores right, on this model and these rows? Random pairs, computed again the slow plain way.

1. A random sample: some queries, and for each of them some train rows; all their pairs are computed again.
2. Is it implemented right? Gradients come from plain autograd in float64, one row at a time. They meet through the
   method's own operators, applied to plain vectors: those of the fit at hand, and those of a fit from the start, in
   float64, on rows in other batches. All this ought to give the same scores. So ought any batch size and row order.
3. How near is the method to what it approximates? The same pairs with the exact damped inverse of each block, in
   float64: solved densely where blocks are small, else by conjugate gradients to 1e-8.
4. What does that say of other pairs? Each sampled row gets one of the queries at random, so that the m errors of these
   pairs, and that of one more row with its query, are exchangeable. Then the ceil((m + 1) 0.9)-th smallest of the m is
   exceeded by the next one with probability 0.1 at most, whatever the distribution (split conformal prediction).

Nothing of the user's is changed: the float64 model is a copy, and fits go into copies of the influence.
"""

from __future__ import annotations

import math
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from headwater.arrays import Array, namespace, precise, to_numpy, transpose
from headwater.curvature.means import total_weight
from headwater.errors import HeadwaterError, InvalidSetting, NotConverged
from headwater.evaluate.verification import (
    GRADIENTS,
    MISCOVERAGE,
    ORDER,
    PLAIN,
    RANKS,
    RANKS_LOST,
    REFIT,
    SIZES,
    Approximation,
    Check,
    Verification,
)
from headwater.gradients.block import BlockGradient
from headwater.gradients.likelihoods import Bernoulli, CrossEntropy
from headwater.gradients.provider import StructuredGradientProvider
from headwater.influence import ComposableInfluence
from headwater.mapper import InfluenceMapper, stack_queries
from headwater.methods.base import Method
from headwater.methods.direct import Direct
from headwater.methods.iterative import Cg
from headwater.operators.algebra import LinearOperator
from headwater.operators.iterative import SolveReport, joined, recorded_solves
from headwater.progress import track
from headwater.random import row_uniforms
from headwater.rows import PlacedBatch, Visitor, sweep
from headwater.settings import check_whole
from headwater.status import status_of
from headwater.types import Batch, join

ONE_BY_ONE = 300
"""Train rows up to which a fit is repeated with batches of one row."""
REFITTED, LEAST_REFITTED = 2e7, 32
"""Work up to which all train rows are fitted again, else a sample of them; and the smallest sample."""
ROW = 20_000
"""What a row costs by itself, computed plainly and alone, in parameters that are differentiated."""
CONDITION = 1e3
"""The largest eigenvalue over the damping, at most, of fits to a sample of rows."""
DENSE = 1000
"""Parameters of a block up to which the exact inverse is a dense one."""
EXACT_WORK = 1e8
"""Work beyond which there is no exact inverse to compare with: train rows times (parameters + ROW)."""
EXACT_NUMBERS = 3e7
"""Numbers of all rows' gradients of the outputs up to which it is found by conjugate gradients: 240 MB, which are kept
between products (see `room_for_draws`)."""
EXACT_PRODUCTS = 2e6
"""Work of one product up to which that is done without such gradients, which takes hundreds of plain products."""
TOLERANCES = {"float64": 1e-8, "float32": 1e-3}
"""How far scores may be off, relative to the largest; 0.1 for any other dtype."""
SOLVED = 0.05
"""The most that unfinished solves may add to that."""
NO_LIMIT = "what the method approximates away, no mistake of its computation, so that no size fails"
SAMPLING = 1 << 21
"""Where the random numbers begin that choose pairs."""

Grads = Mapping[str, Array]


# The sample -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """Rows of a loader chosen at random, each a batch of its own; and what else one pass over the loader shows."""

    rows: list[Batch]
    labels: np.ndarray
    """[rows]: another uniform number of each."""
    count: int
    """Rows in the loader."""
    weight: float
    more: list[Batch]
    """These rows and others, as many as are fitted again."""

    @property
    def whole(self) -> bool:
        """Whether all rows are fitted again."""
        return len(self.more) == self.count


def _sample(
    provider: StructuredGradientProvider,
    loader: Iterable[object],
    size: int,
    seed: int,
    draw: int,
    what: str,
    show: bool,
    more: int = 0,
) -> Sample:
    """The rows with the smallest random numbers, which depend on the seed and the row's position alone."""
    found = sweep(provider, loader, _Sampling(provider, max(size, more), draw, seed), what, show)
    rows, labels = [row for *_, row in found.chosen], np.array([label for _, label, _ in found.chosen[:size]])
    return Sample(rows[:size], labels, found.count, found.weight, rows)


@dataclass(frozen=True, eq=False)
class _Sampled:
    """chosen: a row's two numbers, and the row as a batch of its own."""

    chosen: list[tuple[float, float, Batch]]
    count: int
    weight: float


@dataclass(frozen=True, eq=False)
class _Sampling(Visitor[PlacedBatch, _Sampled, _Sampled]):
    provider: StructuredGradientProvider
    size: int
    draw: int
    seed: int

    def of(self, item: PlacedBatch) -> _Sampled:
        batch, positions = item.batch, np.arange(item.start, item.start + len(item.batch))
        numbers = row_uniforms(positions, 1, draw=SAMPLING + self.draw, seed=self.seed)[:, 0]
        first = np.argsort(numbers[:, 0], kind="stable")[: self.size]
        chosen = [(float(numbers[k, 0]), float(numbers[k, 1]), batch.take(slice(int(k), int(k) + 1))) for k in first]
        return _Sampled(chosen, len(batch), total_weight(self.provider, batch))

    def merge(self, one: _Sampled, other: _Sampled) -> _Sampled:
        # The smallest random numbers of all rows: a uniform sample, whatever the batches.
        chosen = sorted([*one.chosen, *other.chosen], key=lambda row: row[0])[: self.size]
        return _Sampled(chosen, one.count + other.count, one.weight + other.weight)


def cut(rows: Sequence[Batch], size: int) -> list[Batch]:
    """Rows in batches of `size`, the last one smaller; or as they are, where they do not fit together."""
    return [batch for start in range(0, len(rows), size) for batch in join(rows[start : start + size])]


# Scores of the sample, in many ways -----------------------------------------------------------------------------------


def _scores(
    mapper: InfluenceMapper, queries: Sequence[object], train: Sequence[object], train_per_query: float
) -> np.ndarray:
    """As a run computes them: both sides chosen once, queries through theirs, then the train batches: [q, n]."""
    grads = [mapper.provider.grads(batch, query=True) for batch in queries]
    sides = mapper.sides(grads[0], train_per_query)
    # Sides are chosen by the first batch and kept: as in a run.
    ready = stack_queries([sides.queries(values) for values in grads])
    return np.concatenate([_total(ready.scores(mapper.provider.grads(batch))) for batch in train], axis=1)


def _scores_from_factors(mapper: InfluenceMapper, queries: Sequence[object], train: Sequence[object]) -> np.ndarray:
    """As `influences_from_factors` computes them: [q, n]."""
    found = []
    for batch in queries:
        factors = mapper.transformed_grads(batch)
        found.append([_total(mapper.interactions_from_transformed_grads(factors, rows, "up")) for rows in train])
    return np.concatenate([np.concatenate(row, axis=1) for row in found])


def _scores_of_plain(
    operators: Mapping[str, LinearOperator], mapper: InfluenceMapper, q: Grads, n: Grads
) -> np.ndarray:
    """Plain vectors through operators as plain maps, and their dot products in float64: [q, n]."""
    found = []
    for name, operator in operators.items():
        layout = mapper.provider.layouts[name]
        left, right = (operator.seen(BlockGradient.from_flat(layout, g[name])).flat() for g in (q, n))
        # Plain vectors and one dot product: none of the shortcuts that a run takes.
        found.append(to_numpy(precise(operator.apply(left)) @ transpose(precise(right))))
    return np.sum(found, axis=0)


def _total(by_block: Mapping[str, Array]) -> np.ndarray:
    return np.sum([to_numpy(block).astype(np.float64) for block in by_block.values()], axis=0)


def _flat(provider: StructuredGradientProvider, rows: Sequence[object], query: bool) -> OrderedDict[str, Array]:
    """Gradients of batches as flat vectors, by block: [n, D_block]."""
    pieces = [provider.grads(row, query=query) for row in rows]
    xp = namespace(next(iter(pieces[0].values())).like)
    return OrderedDict((name, xp.concat([piece[name].flat() for piece in pieces], axis=0)) for name in pieces[0])


def _off(got: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, relative to the largest entry; not a number where there is one in either."""
    gap, size = float(np.abs(got - expected).max()), float(np.abs(expected).max())
    return gap / size if size else gap


# The verification -----------------------------------------------------------------------------------------------------


def verify(
    influence: ComposableInfluence,
    train_loader: Iterable[object],
    query_loader: Iterable[object],
    *,
    rows: int = 8,
    queries: int = 4,
    seed: int = 0,
    tolerance: float | None = None,
    solves: bool = True,
    progress: bool = False,
) -> Verification:
    """See `ComposableInfluence.verify`. solves: whether an exact inverse that is not dense is solved for.

    Errors: NotFittedError; StaleFit; BatchMismatch for a loader without rows; InvalidSetting.
    """
    influence.ready()
    for name, value in (("rows", rows), ("queries", queries)):
        check_whole(name, value, 1)
    if tolerance is not None and not 0 < tolerance < math.inf:
        raise InvalidSetting(f"tolerance is {tolerance!r}; expected a positive number, or None.")
    provider = influence.provider
    asked = _sample(provider, query_loader, queries, seed, 0, "queries", progress)
    more = max(LEAST_REFITTED, int(REFITTED // (sum(provider.sizes.values()) + ROW)))
    train = _sample(provider, train_loader, rows * len(asked.rows), seed, 1, "train rows", progress, more)
    allowed = TOLERANCES.get(influence.source.dtype, 0.1) if tolerance is None else float(tolerance)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotConverged)  # the table says so
        return _Verifier(influence, train_loader, asked, train, allowed, seed, solves, progress).verification()


class _Verifier:
    """The checks of one verification, and what several of them need."""

    def __init__(
        self,
        influence: ComposableInfluence,
        loader: Iterable[object],
        queries: Sample,
        train: Sample,
        tolerance: float,
        seed: int,
        solves: bool,
        progress: bool,
    ):
        self.influence, self.loader, self.queries, self.train = influence, loader, queries, train
        self.tolerance, self.seed, self.may_solve, self.progress = tolerance, seed, solves, progress
        self.mapper = influence.block_mapper
        self.joined_queries, self.joined_train = join(queries.rows), join(train.rows)
        self.ratio = train.count / queries.count
        # Once, before all checks: each compares with these scores.
        with recorded_solves() as log:
            self.scores = _scores(self.mapper, self.joined_queries, self.joined_train, self.ratio)
        self.solves = joined(log)

    def verification(self) -> Verification:
        approximation, why = self._approximation()
        checks = [check for step in track(self._steps, "checks", self.progress) for check in step()]
        return Verification(
            method=self.influence.method.describe(),
            rows=len(self.train.rows),
            queries=len(self.queries.rows),
            seed=self.seed,
            tolerance=self.tolerance,
            checks=(*checks, *self._describe(approximation, why)),
            approximation=approximation,
        )

    @property
    def _steps(self) -> list[Callable[[], Iterable[Check]]]:
        """What is checked, in the table's order."""
        return [
            self._gradients,
            self._refit,
            self._batch_sizes,
            self._row_order,
            lambda: [self._rows_fitted(), self._finite(), *self._solves(), self._coverage()],
        ]

    def _coverage(self) -> Check:
        return Check("coverage", self.influence.provider.coverage_fraction, note="share of the trainable parameters")

    @cached_property
    def allowed(self) -> float:
        """The tolerance, what rounding may grow to at this damping, and what solves with these residuals may be off by.

        A score's error is <r, A^-1 g> with r the query's residual: |r| |g| over the smallest damped eigenvalue at most,
        for each of two solves.
        """
        if not self.solves:
            return self.tolerance + min(SOLVED, self._rounding)
        total = 0.0
        for name, report in self.solves.items():
            status = status_of(self.influence).blocks[name]
            if status.lowest_damped is None or not status.lowest_damped > 0:
                return self.tolerance + SOLVED
            q, n = (self._lengths(batch, name, query) for batch, query in self._sides)
            scale = self.influence.provider.block_scale(name)
            # Cauchy and Schwarz: |<r, A^-1 g>| <= |r| |g| / lowest; a bound, so that SOLVED caps it.
            total += 2 * scale * float((report.residual[: len(q)] * q).max() * n.max()) / status.lowest_damped
        largest = float(np.abs(self.scores).max())
        return self.tolerance + min(SOLVED, total / largest if largest else 0.0)

    @property
    def _rounding(self) -> float:
        """Ten times eps, times the worst condition number that the damping leaves."""
        if self.influence.source.dtype not in TOLERANCES:
            return 0.0
        conditions = [block.condition for block in status_of(self.influence).blocks.values()]
        # A perturbation of eps in A changes A^-1 g by condition times eps.
        worst = max((c for c in conditions if c is not None), default=1.0)
        return 10 * float(np.finfo(self.influence.source.dtype).eps) * worst

    @property
    def _sides(self) -> tuple[tuple[list[Batch], bool], tuple[list[Batch], bool]]:
        return (self.joined_queries, True), (self.joined_train, False)

    def _lengths(self, rows: Sequence[object], block: str, query: bool) -> np.ndarray:
        values = [self.mapper.provider.grads(batch, query=query)[block].squared_norms() for batch in rows]
        return np.sqrt(np.concatenate([to_numpy(value) for value in values]))

    @cached_property
    def plain(self) -> tuple[ComposableInfluence, Grads, Grads] | str:
        """An influence on the float64 copy, and plain gradients of queries and train rows; or why there are none."""
        try:
            source = self.influence.source.in_float64()
            if source is None:
                return f"{type(self.influence.source).__name__} has no float64 copy (in JAX: jax_enable_x64)"
            copied = self.influence.unfitted(source)
            q, n = (_flat(copied.provider, rows.rows, query) for rows, query in self._samples)
            return copied, q, n
        except (HeadwaterError, RuntimeError) as error:
            return _in_words(error)

    @property
    def _samples(self) -> tuple[tuple[Sample, bool], tuple[Sample, bool]]:
        return (self.queries, True), (self.train, False)

    # Is it implemented right?

    def _gradients(self) -> list[Check]:
        """Gradients in batches against plain ones; and plain ones through the fitted operators against the scores."""
        if isinstance(self.plain, str):
            return [Check(name, note=self.plain) for name in (GRADIENTS, PLAIN)]
        copied, q, n = self.plain
        worst = 0.0
        for (batch, query), (rows, _) in zip(self._sides, self._samples, strict=True):
            plain = _flat(copied.source, rows.rows, query)
            for name, mine in _flat(self.influence.source, batch, query).items():
                worst = max(worst, _off_by_row(to_numpy(mine), to_numpy(plain[name])))
        like = next(iter(self.mapper.provider.grads(self.queries.rows[0]).values())).like
        xp = namespace(like)
        q, n = ({name: xp.astype(g, like.dtype) for name, g in grads.items()} for grads in (q, n))
        scores = _scores_of_plain(self.mapper.operators, self.mapper, q, n)
        return [
            Check(GRADIENTS, worst, self.tolerance, self._why_rounded() if worst > self.tolerance else ""),
            Check(PLAIN, _off(self.scores, scores), self.allowed),
        ]

    def _why_rounded(self) -> str:
        """What may explain gradients that differ from plain ones: rows that the model fits to the last digit."""
        source = self.influence.source
        # Halves are allowed a tenth; and only of a log loss is the slope what is said below.
        if source.dtype != "float32" or not isinstance(source.likelihood, (CrossEntropy, Bernoulli)):
            return ""
        losses = [np.abs(to_numpy(source.losses(batch))) for batch in self.joined_train]
        largest = max((float(found.max()) for found in losses), default=0.0)
        # The slope of a loss l near zero is a difference of numbers near one (p - 1 = -l), which are rounded to eps.
        if largest > 10 * float(np.finfo(np.float32).eps) / self.tolerance:
            return ""
        return (
            f"no loss of these rows is above {largest:.1e}: float32 rounds such gradients away. Convert model and data "
            "to float64"
        )

    @cached_property
    def reference(self) -> tuple[np.ndarray, dict[str, float] | None] | str:
        """What a fit that is made again ought to give, and at which damping; or why it gives nothing.

        The scores, where all rows are fitted again; else those of a fit to the sample of rows. Few rows leave most
        directions without curvature: at the fit's own damping rounding in float32 would decide. So it is CONDITION at
        least.
        """
        if self.train.whole:
            return self.scores, None
        try:
            fitted = self.influence.unfitted().fit(cut(self.train.more, self._at_once), progress=self.progress)
            damping = {
                name: max([block.damping, *(abs(end) / CONDITION for end in block.bounds or ())])
                for name, block in status_of(fitted).blocks.items()
            }
            return self._scores_of(fitted.with_damping(damping)), damping
        except (HeadwaterError, RuntimeError) as error:
            return _in_words(error)

    def _fitted_again(self, influence: ComposableInfluence, batches: list[Any]) -> ComposableInfluence:
        found = influence.unfitted().fit(batches, progress=self.progress)
        damping = None if isinstance(self.reference, str) else self.reference[1]
        return found if damping is None else found.with_damping(damping)

    def _scores_of(self, fitted: ComposableInfluence) -> np.ndarray:
        return _scores(fitted.block_mapper, self.joined_queries, self.joined_train, self.ratio)

    @property
    def _at_once(self) -> int:
        """Rows of a batch of a fit that is made again: few, or an eighth of them all."""
        return max(16, len(self.train.more) // 8)

    @property
    def _expected(self) -> np.ndarray | str:
        return self.reference if isinstance(self.reference, str) else self.reference[0]

    @property
    def _which(self) -> str:
        return "" if self.train.whole else f"both fits to {len(self.train.more)} rows at random, of {self.train.count}"

    def _refit(self) -> list[Check]:
        """All again in float64: fit, gradients, operators, dot products."""
        if isinstance(self.plain, str):
            return [Check(REFIT, note=self.plain)]
        copied, q, n = self.plain
        # One by one no batch can hide anything; for more rows that would take too long.
        size = 1 if self.train.whole and self.train.count <= ONE_BY_ONE else 16

        def compute() -> np.ndarray:
            fitted = self._fitted_again(copied, cut(self.train.more, size))
            return _scores_of_plain(fitted.block_mapper.operators, fitted.block_mapper, q, n)

        said = "one row at a time" if size == 1 else f"{size} rows at a time"
        return [self._compare(REFIT, compute, self._expected, "; ".join(filter(None, [said, self._which])))]

    def _batch_sizes(self) -> list[Check]:
        """Rows one at a time, all at once, and in uneven batches, by three routes."""
        q, n = self.queries.rows, self.train.rows

        def compute() -> np.ndarray:
            found = [
                _scores_from_factors(self.mapper, q, n),
                _total(self.mapper.interactions(self.joined_queries[0], self.joined_train[0], "up")),
                _scores(self.mapper, cut(q, 3), cut(n, 5), 0.0),
                _scores(self.mapper, self.joined_queries, cut(n, 7), 1e9),
            ]
            gaps = (scores - self.scores[: scores.shape[0], : scores.shape[1]] for scores in found)
            # The worst of all routes, as scores: some were computed for a part of the pairs only.
            return self.scores + max(gaps, key=lambda gap: np.abs(gap).max())

        return [self._compare(SIZES, compute, self.scores)]

    def _row_order(self) -> list[Check]:
        """A fit to the same rows in another order and in other batches."""
        numbers = row_uniforms(np.arange(len(self.train.more)), 1, draw=SAMPLING + 2, seed=self.seed)[:, 0, 0]
        order = [self.train.more[k] for k in np.argsort(numbers, kind="stable")]
        batches = cut(order, self._at_once - 3)
        return [
            self._compare(
                ORDER,
                lambda: self._scores_of(self._fitted_again(self.influence, batches)),
                self._expected,
                self._which,
            )
        ]

    def _compare(
        self, name: str, compute: Callable[[], np.ndarray], expected: np.ndarray | str, note: str = ""
    ) -> Check:
        """What is computed against what is expected; a note says where its solves missed their tolerance."""
        if isinstance(expected, str):
            return Check(name, note=expected)
        try:
            with recorded_solves() as log:
                figure = _off(compute(), expected)
        except (HeadwaterError, RuntimeError) as error:
            return Check(name, note=_in_words(error))
        missed = sum(int((~report.converged).sum()) for report in log)
        said = [note, f"{missed} solves missed their tolerance"] if missed else [note]
        return Check(name, figure, self.allowed, "; ".join(filter(None, said)))

    # Is anything missing?

    def _rows_fitted(self) -> Check:
        """The loader's rows against those of the fit."""
        fitted, here = self.influence.n_train, self.train.weight
        note = "" if math.isclose(fitted, here, rel_tol=1e-6) else f"the fit had {fitted:g}, the loader has {here:g}"
        return Check("rows of the fit missing", abs(fitted - here), 1e-6 * here, note)

    def _finite(self) -> Check:
        return Check("scores not finite", float((~np.isfinite(self.scores)).sum()), 0.0)

    def _solves(self) -> list[Check]:
        return [
            Check(f"solves missed{where}", float((~report.converged).sum()), 0.0, _residual(report))
            for name, report in self.solves.items()
            for where in (f", block {name}" if len(self.solves) > 1 else "",)
        ]

    # How near is the method to what it approximates?

    def _approximation(self) -> tuple[Approximation | None, str]:
        """The comparison, or why there is none."""
        kind = self.influence.method.approximates
        if kind is None:
            return None, "the method approximates no inverse"
        if isinstance(self.plain, str):
            return None, self.plain
        copied, q, n = self.plain
        rows, dense = self.train.count, max(copied.provider.sizes.values()) <= DENSE
        if not dense and not self.may_solve:
            return None, "it takes many products with all rows; verify(train, query) measures it"
        if self._is_too_much(copied, kind, dense):
            return None, f"too dear plainly for {rows} rows; audit(train, query) measures it in batches"
        method = exact_method(self.influence.method, kind, dense)
        reference = copied.unfitted(method=method, damping=self.influence.absolute_damping)
        try:
            fitted = reference.fit(self.loader, progress=self.progress)
            exact = _scores_of_plain(fitted.block_mapper.operators, fitted.block_mapper, q, n)
        except (HeadwaterError, RuntimeError) as error:
            return None, _in_words(error)
        how = "dense" if dense else "conjugate gradients to 1e-8"
        return Approximation(
            reference=f"exact damped inverse of the {kind.replace('_', ' ')} by block, {how}, float64",
            scores=self.scores,
            exact=exact,
            paired=(self.train.labels * len(self.queries.rows)).astype(np.int64),
            exhaustive=len(self.train.rows) == rows,
        ), ""

    def _is_too_much(self, copied: ComposableInfluence, kind: str, dense: bool) -> bool:
        """Whether the exact inverse takes more plain gradients and products than a verification is for."""
        parameters, rows = sum(copied.provider.sizes.values()), self.train.count
        work = rows * (parameters + ROW)
        if dense or work > EXACT_WORK:
            return work > EXACT_WORK
        one, fisher = self.train.rows[0], copied.method.fisher
        if kind == "hessian":
            return work > EXACT_PRODUCTS
        draws = copied.provider.ggn_grads(one) if kind == "ggn" else copied.provider.fisher_grads(one, fisher)
        return work > EXACT_PRODUCTS if draws is None else rows * parameters * len(draws) > EXACT_NUMBERS

    def _describe(self, found: Approximation | None, why: str) -> list[Check]:
        names = ("distance from the exact inverse", "rank correlation with it", "error bound for other pairs")
        if found is None:
            return [Check(name, note=why) for name in names]
        lowest = found.rank_correlations.min()
        return [
            # A distance of the method, not of its computation: no size of it is a mistake.
            Check(names[0], found.relative_error, note=f"{found.reference}; {NO_LIMIT}"),
            Check(
                names[1],
                float(found.rank_correlations.mean()),
                note=f"{found.in_words}: Spearman, mean of queries (lowest {lowest:.3g}); alike from {RANKS:g}, "
                f"differently below {RANKS_LOST:g}",
            ),
            self._bound(names[2], found),
        ]

    def _bound(self, name: str, found: Approximation) -> Check:
        count, bound = len(found.paired), found.bound
        if found.exhaustive:
            return Check(name, note="no train row is left that was not sampled")
        if math.isinf(bound):
            return Check(name, note=f"{count} train rows are too few: rows=9 are the fewest for a bound")
        share = bound / float(np.abs(found.exact).max())
        note = (
            f"with probability {1 - MISCOVERAGE:.0%}, no error of one of these queries on a train row not sampled is "
            f"larger; {share:.2g} of the largest score here"
        )
        return Check(name, bound, note=note)


def exact_method(method: Method, kind: str, dense: bool) -> Method:
    """The exact damped inverse of a curvature of this kind, with the labels that the method would take."""
    fisher = "empirical" if kind == "empirical_fisher" else method.fisher
    options: dict[str, Any] = {"curvature": kind, "fisher": fisher, "seed": method.seed or 0}
    if dense:
        return Direct(**options, allow_indefinite=True)
    return Cg(
        **options,
        tolerance=1e-8,
        max_iterations=5000,
        preconditioner="diagonal",
        allow_indefinite=method.allow_indefinite,
    )


def _off_by_row(got: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference of two rows, in length, relative to the longest row."""
    gap, size = (float(np.linalg.norm(rows, axis=1).max()) for rows in (got - expected, expected))
    return gap / size if size else gap


def _residual(report: SolveReport) -> str:
    return f"the worst relative residual is {report.residual.max(initial=0.0):.2g}"


def _in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
