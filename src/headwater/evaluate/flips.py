"""Brittleness: how few of its top-scored rows must go before a prediction flips?

    scores  [q, n]             positive: the train row helps the query
    measure(rows, seed) -> [q] margins of the model trained on these rows; below zero: predicted wrong

For each query, its top rows are removed and the model is trained again, with more and more rows until the margin is
below zero; then the size is searched for between the last that did not flip and the first that did. A model that has
been trained is never trained again, and every query reads its margins; nothing is kept on disk (let `measure` do that
where training is dear).

The size found is the smallest *that was tried along this ranking*. It is no least set: other rows, or fewer than a size
that happened not to flip, may do. The best that a ranking can show is an upper bound, and a lower one is a better
ranking, as long as it is well below what random rows need.

Source: Ilyas et al. 2022, arXiv 2202.00622 (smallest subsets that flip predictions).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from headwater.errors import InvalidSetting
from headwater.evaluate.bank import Measure
from headwater.evaluate.checks import Floats, query_outputs, score_matrix
from headwater.evaluate.retrieval import ranking
from headwater.settings import check_whole


@dataclass(frozen=True, eq=False)
class Brittleness:
    """How many rows had to go for each query."""

    sizes: Floats
    """[q], the smallest number tried along the query's ranking that flips it; NaN where none did, or it was wrong."""
    random_sizes: Floats
    """[draws, q], the same along random orders, which all queries share."""
    wrong: NDArray[np.bool_]
    """[q], predicted wrong with all rows: nothing to flip, left out of every figure below."""
    tried: tuple[int, ...]
    """The sizes that were tried first; those between were tried where needed."""
    retrains: int
    """Models trained: sets of rows, times seeds."""
    seeds: int

    @property
    def censored(self) -> NDArray[np.bool_]:
        """[q], right with all rows, and not flipped by the largest size tried."""
        return np.isnan(self.sizes) & ~self.wrong

    @property
    def median(self) -> float:
        """Over the queries that were right; infinite if half of them were not flipped, NaN if none was right."""
        return _median(self.sizes[~self.wrong])

    @property
    def random_median(self) -> float:
        """Over these queries and all random orders."""
        return _median(self.random_sizes[:, ~self.wrong])

    def __str__(self) -> str:
        right = int((~self.wrong).sum())
        missed = np.isnan(self.random_sizes[:, ~self.wrong])
        return (
            f"brittleness of {right} queries predicted right ({int(self.wrong.sum())} wrong, left out): median "
            f"{self._said(self.median)} rows, {int(self.censored.sum())} not flipped by {self.tried[-1]}; random "
            f"{self._said(self.random_median)} rows, {int(missed.sum())} of {missed.size} not flipped; "
            f"{self.retrains} retrainings, {self.seeds} seeds each; smallest sizes tried along the ranking, not least"
        )

    def _said(self, median: float) -> str:
        return f"above {self.tried[-1]}" if np.isinf(median) else f"{median:g}"


def brittleness(
    scores: ArrayLike,
    measure: Measure,
    *,
    sizes: Sequence[int] | None = None,
    max_size: int | None = None,
    refine: bool = True,
    random: int = 1,
    seeds: Sequence[int] = (0,),
    seed: int = 0,
) -> Brittleness:
    """Search, for each query, for a small number of top rows whose removal flips its prediction.

    A prediction is flipped when the mean of its margins over `seeds` is below zero.

    sizes: to try first, growing; None for 1, 2, 4, ... up to max_size (None: half of the rows). refine: search between
    the last size that did not flip and the first that did, by halving, which takes margins to fall with the size.
    random: random orders of all rows, as a baseline. seed: of these, and of the order of equal scores.
    Cost: about 2 log2(max_size) trainings for each query and each seed, less where queries share sets.
    Errors: ShapeMismatch, and NonFiniteValue naming the query, for margins; InvalidSetting.
    """
    given = score_matrix(scores)
    q, n = given.shape
    grid = _grid(sizes, max_size, n)
    check_whole("random", random, 0)
    if not len(seeds):
        raise InvalidSetting("seeds is empty; expected at least one.")
    models = _Models(measure, q, n, [int(s) for s in seeds])
    wrong = models.margins(np.array([], dtype=np.int64)) < 0
    rng = np.random.default_rng((seed, 1))
    # One random order for all queries: their sets are then the same, and trained once.
    orders = [ranking(given, seed), *(np.tile(rng.permutation(n), (q, 1)) for _ in range(random))]
    found = np.full((1 + random, q), np.nan)
    for place, order in enumerate(orders):
        for query in np.flatnonzero(~wrong):
            found[place, query] = _search(models, order[query], int(query), grid, refine)
    return Brittleness(found[0], found[1:], wrong, grid, models.trained, len(seeds))


def _search(models: _Models, order: NDArray[np.int64], query: int, grid: tuple[int, ...], refine: bool) -> float:
    """The smallest size tried that flips the query; NaN if none does."""

    def flips(size: int) -> bool:
        return bool(models.margins(order[:size])[query] < 0)

    standing = 0
    for size in grid:
        if flips(size):
            break
        standing = size
    else:
        return float("nan")
    # Bisection between a size that did not flip and one that did; see `refine` for what that takes.
    while refine and size - standing > 1:
        middle = (standing + size) // 2
        if flips(middle):
            size = middle
        else:
            standing = middle
    return float(size)


class _Models:
    """Margins without some rows, the mean over seeds; each set of rows is trained once."""

    def __init__(self, measure: Measure, queries: int, rows: int, seeds: Sequence[int]):
        self._measure, self._queries, self._rows, self._seeds = measure, queries, rows, seeds
        self._known: dict[bytes, Floats] = {}

    @property
    def trained(self) -> int:
        return len(self._known) * len(self._seeds)

    def margins(self, removed: NDArray[np.int64]) -> Floats:
        """[q]."""
        keep = np.ones(self._rows, dtype=bool)
        keep[removed] = False
        # By the set: queries with the same top rows share a training.
        key = np.packbits(keep).tobytes()
        if key not in self._known:
            kept = np.flatnonzero(keep)
            self._known[key] = np.mean([self._run(kept, seed) for seed in self._seeds], axis=0)
        return self._known[key]

    def _run(self, kept: NDArray[np.int64], seed: int) -> Floats:
        said = f"margins without {self._rows - len(kept)} rows, seed {seed},"
        return query_outputs(self._measure(kept, seed), self._queries, said)


def _grid(sizes: Sequence[int] | None, max_size: int | None, n: int) -> tuple[int, ...]:
    """Growing sizes from 1 to n - 1."""
    if sizes is not None and max_size is not None:
        raise InvalidSetting(f"Give sizes or max_size, not both; got {list(sizes)} and {max_size}.")
    if sizes is None:
        most = n // 2 if max_size is None else max_size
        check_whole("max_size", most, 1, n - 1)
        most = int(most)
        return (*(2**k for k in range(most.bit_length()) if 2**k < most), most)
    for size in sizes:
        check_whole("a size", size, 1, n - 1)
    grid = tuple(int(size) for size in sizes)
    if not grid or list(grid) != sorted(set(grid)):
        raise InvalidSetting(f"sizes are {list(sizes)}; expected growing numbers from 1 to {n - 1}, of {n} rows.")
    return grid


def _median(sizes: Floats) -> float:
    """What was not flipped counts as infinite."""
    values = np.sort(np.where(np.isnan(sizes), np.inf, sizes), axis=None)
    if not values.size:
        return float("nan")
    low, high = values[(values.size - 1) // 2], values[values.size // 2]
    return float("inf") if np.isinf(high) else float((low + high) / 2)
