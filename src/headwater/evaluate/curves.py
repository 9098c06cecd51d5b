"""Removal and addition curves: what does the model do without the rows that score highest, or with them alone?

    scores   [q, n]      one ranking for each query, or [n] for all of them
    outputs  [m, r, q]   measured on models retrained on the plan's subsets; NaN: not run

A removal takes the top share of rows away, an addition keeps nothing else; both are compared with the model of all
rows, as a *change* of the query's output. A change alone says little, since removing any rows does harm: the same
numbers of rows at random are removed (or kept) too, and the figure is the difference.

If outputs are losses, a good ranking raises them more than chance when its rows are removed, and less than chance when
its rows are added; if they are margins (positive: predicted right), the other way round.

Every query has its own subsets, and there is one retraining for each, so queries are what intervals resample; with them
the random sets, which all queries share. With one ranking for all queries there is one retraining behind each point:
the interval then speaks of more queries, and not of that retraining's luck. Average several runs for that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from headwater.errors import InvalidSetting, ShapeMismatch
from headwater.evaluate.bank import Plan
from headwater.evaluate.baselines import Compared, against_random
from headwater.evaluate.checks import Floats, retrained_outputs
from headwater.evaluate.retrieval import ranking
from headwater.settings import check_whole

Direction = Literal["removal", "addition"]
FEW = 50
"""Queries below which a curve says that there are few."""


@dataclass(frozen=True, eq=False)
class Curve:
    """The change of outputs by the share of rows removed, or kept; beside it that of rows at random."""

    direction: Direction
    fractions: tuple[float, ...]
    sizes: tuple[int, ...]
    """Rows removed, or kept, at each fraction."""
    points: tuple[Compared, ...]
    """The mean change over queries at each fraction, that of random sets, and the difference, paired by query."""
    by_query: Floats
    """[f, q], the change of each query's output."""
    random_by_query: Floats
    """[f, q], the same with random rows, the mean over sets."""
    flips: Floats | None
    """[f], the share of queries whose sign changed; None where the outputs are no margins."""
    random_flips: Floats | None
    """[f], the same with random rows."""
    shared: bool
    """One ranking for all queries."""

    @property
    def queries(self) -> int:
        return self.by_query.shape[1]

    @property
    def few_queries(self) -> bool:
        return self.queries < FEW

    def __str__(self) -> str:
        above = (self.direction == "removal") == (self.flips is None)
        verb = "removed" if self.direction == "removal" else "kept"
        lines = [
            f"{self.direction} curve, {self.queries} queries{', one ranking for all' if self.shared else ''}; "
            f"change of the {'output' if self.flips is None else 'margin'}, better the further its difference from "
            f"random is {'above' if above else 'below'} 0"
        ]
        for k, (fraction, size, point) in enumerate(zip(self.fractions, self.sizes, self.points, strict=True)):
            line = f"  {verb} {fraction:.3g} ({size} rows): {point.chosen}, random {point.random}, "
            line += f"difference {point.difference}"
            if self.flips is not None and self.random_flips is not None:
                line += f", flipped {self.flips[k]:.0%}, random {self.random_flips[k]:.0%}"
            lines.append(line)
        if self.few_queries:
            lines.append(f"  few queries: {self.queries}, at least {FEW} are advised; rankings of methods may change")
        return "\n".join(lines)


@dataclass(frozen=True, eq=False)
class CurvePlan:
    """The retrainings that a curve needs, and what to make of their outputs.

    Subsets of `plan`: all rows; then, for each fraction, one of each query's own (or one for all queries); then, for
    each fraction, those at random.
    """

    plan: Plan
    """Fill a `Bank` with it. Runs of the same place have the same seed, so that they differ by their rows only."""
    direction: Direction
    fractions: tuple[float, ...]
    sizes: tuple[int, ...]
    """Rows removed, or kept, at each fraction."""
    queries: int | None
    """How many have rankings of their own; None for one ranking for all."""
    random: int
    """Sets of random rows at each fraction; a set's rows are among those of its next larger size."""

    def measure(
        self,
        outputs: ArrayLike,
        *,
        margins: bool = False,
        resamples: int = 2000,
        level: float = 0.9,
        seed: int = 0,
    ) -> Curve:
        """The curve of outputs [m, r, q], a full bank's `outputs`.

        margins: outputs are margins, below zero where the query is predicted wrong; flips are then counted.
        Errors: ShapeMismatch; InvalidInput for a subset that was not run.
        """
        _, _, measured = retrained_outputs(self.plan.keep, outputs)
        queries = measured.shape[1]
        if self.queries is not None and queries != self.queries:
            raise ShapeMismatch(f"The outputs are of {queries} queries; the plan is for {self.queries}.")
        own, chance = self._split(measured)
        change, random_change = own - measured[0], chance - measured[0]
        points = [
            against_random(c, r, resamples=resamples, level=level, seed=seed)
            for c, r in zip(change, random_change, strict=True)
        ]
        right = measured[0] >= 0
        return Curve(
            self.direction,
            self.fractions,
            self.sizes,
            tuple(points),
            change,
            random_change.mean(axis=1),
            ((own >= 0) != right).mean(axis=1) if margins else None,
            ((chance >= 0) != right).mean(axis=(1, 2)) if margins else None,
            self.queries is None,
        )

    def _split(self, measured: Floats) -> tuple[Floats, Floats]:
        """From [m, q]: each query's output on its own subsets [f, q], and on the random ones [f, random, q]."""
        points, rankings = len(self.fractions), 1 if self.queries is None else self.queries
        ends = 1 + points * rankings
        own = measured[1:ends].reshape(points, rankings, -1)
        chance = measured[ends:].reshape(points, self.random, -1)
        # Every query's output is measured on every subset; its own are on the diagonal.
        return (own[:, 0] if self.queries is None else np.einsum("fqq->fq", own)), chance


def plan_curve(
    scores: ArrayLike,
    fractions: Sequence[float],
    direction: Direction = "removal",
    *,
    random: int = 5,
    runs: int = 1,
    seed: int = 0,
) -> CurvePlan:
    """Plan 1 + f (q + random) subsets: the top share of rows by score removed, or nothing else kept.

    scores: [q, n], or [n] for one ranking for all queries, which needs 1 + f (1 + random). fractions: shares of all
    rows, rounded to whole ones. random: sets of random rows at each fraction. runs: of every subset. Equal scores are
    in an order drawn from `seed`.
    Errors: ShapeMismatch; NonFiniteValue; InvalidSetting.
    """
    shared = np.ndim(scores) == 1
    order = ranking(np.asarray(scores)[None] if shared else scores, seed)
    n = order.shape[1]
    if direction not in get_args(Direction):
        raise InvalidSetting(f"direction is {direction!r}; expected 'removal' or 'addition'.")
    check_whole("random", random, 2)
    check_whole("runs", runs, 1)
    sizes = _sizes(fractions, n)
    rng = np.random.default_rng((seed, 1))
    shuffled = np.stack([rng.permutation(n) for _ in range(random)])
    chosen = [_masks(orders, size) for orders in (order, shuffled) for size in sizes]
    named = np.concatenate(chosen)
    keep = np.concatenate([np.ones((1, n), dtype=bool), ~named if direction == "removal" else named])
    seeds = rng.permutation(2**20)[:runs][None].repeat(len(keep), axis=0)
    return CurvePlan(
        Plan(keep, seeds),
        direction,
        tuple(float(fraction) for fraction in fractions),
        sizes,
        None if shared else len(order),
        random,
    )


def _sizes(fractions: Sequence[float], n: int) -> tuple[int, ...]:
    sizes = tuple(round(fraction * n) if 0 < fraction < 1 else 0 for fraction in fractions)
    for fraction, size in zip(fractions, sizes, strict=True):
        if not 0 < size < n:
            raise InvalidSetting(f"A fraction is {fraction!r}; expected a share of {n} rows, some and not all of them.")
    if not sizes or len(set(sizes)) < len(sizes):
        raise InvalidSetting(
            f"The fractions {list(fractions)} are {list(sizes)} of {n} rows; expected different sizes."
        )
    return sizes


def _masks(order: NDArray[np.int64], size: int) -> NDArray[np.bool_]:
    """The first `size` rows of each order: [orders, n]."""
    masks = np.zeros(order.shape, dtype=bool)
    np.put_along_axis(masks, order[:, :size], True, axis=1)
    return masks
