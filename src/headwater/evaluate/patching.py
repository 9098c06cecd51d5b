"""Tail patch: does one more step on a query's top rows lower its output?

    scores            [q, n]   positive: the train row helps the query
    patch(rows [k]) -> [q]     outputs after a training step on these rows, starting from the final model; with no rows,
                               the final model's own outputs

For each query a step on its top k rows is compared with a step on k rows at random. It costs one step for each query,
and no retraining.

What it measures is one gradient step. To first order the change of a query's loss is minus the learning rate times the
dot product of its gradient with the rows' mean gradient, so the tail patch rewards grad-dot **by construction**, and a
method that corrects for curvature may be right about retraining and lose here. Do not rank methods by it alone.

Source: Chang et al. 2024, arXiv 2410.17413 (TrackStar's tail-patch score).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from headwater.evaluate.baselines import against_random
from headwater.evaluate.checks import Floats, query_outputs, score_matrix
from headwater.evaluate.intervals import Interval
from headwater.evaluate.retrieval import ranking
from headwater.settings import check_whole

Patch = Callable[[NDArray[np.int64]], ArrayLike]
"""Rows [k] -> outputs [q] after a step on them; without rows, before any step."""


@dataclass(frozen=True, eq=False)
class TailPatch:
    """The change of each query's output by a step on its top rows; below zero where the output, a loss, fell."""

    change: Interval
    """The mean over queries, by a step on each query's own top rows."""
    random: Interval
    """The same by steps on random rows, which all queries share."""
    difference: Interval
    """Top minus random, query by query: below zero where scores choose better than chance."""
    by_query: Floats
    """[q]."""
    random_by_query: Floats
    """[q], the mean over sets of random rows."""
    k: int
    steps: int
    """Calls of `patch` after the first."""

    def __str__(self) -> str:
        return (
            f"tail patch, {len(self.by_query)} queries, steps on {self.k} rows: change {self.change}, random "
            f"{self.random}, difference {self.difference}; rewards grad-dot by construction"
        )


def tail_patch(
    scores: ArrayLike,
    patch: Patch,
    k: int,
    *,
    random: int = 5,
    resamples: int = 2000,
    level: float = 0.9,
    seed: int = 0,
) -> TailPatch:
    """Step on each query's top k rows, and on `random` sets of k random ones.

    Equal scores are in an order drawn from `seed`. Intervals are over queries, and over the random sets.
    `headwater.retraining.torch.gradient_step` makes a `patch` of a torch model.
    Errors: ShapeMismatch; NonFiniteValue naming the query; InvalidSetting if k is not in 1..n, or random is below 2.
    """
    given = score_matrix(scores)
    q, n = given.shape
    check_whole("k", k, 1, n)
    check_whole("random", random, 2)

    def outputs(rows: NDArray[np.int64], of: str) -> Floats:
        return query_outputs(patch(rows), q, f"outputs {of}")

    before = outputs(np.array([], dtype=np.int64), "without a step")
    known: dict[bytes, Floats] = {}
    own = np.empty(q)
    for query, rows in enumerate(np.sort(ranking(given, seed)[:, :k], axis=1)):
        key = rows.tobytes()
        if key not in known:
            known[key] = outputs(rows, f"after a step on the rows of query {query}")
        own[query] = known[key][query] - before[query]
    rng = np.random.default_rng((seed, 1))
    chance = np.stack(
        [outputs(rng.choice(n, size=k, replace=False), f"after random step {m}") - before for m in range(random)]
    )
    found = against_random(own, chance, resamples=resamples, level=level, seed=seed)
    return TailPatch(
        found.chosen, found.random, found.difference, own, chance.mean(axis=0), int(k), len(known) + random
    )
