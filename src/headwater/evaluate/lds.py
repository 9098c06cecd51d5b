"""The linear datamodeling score: do summed scores forecast what retraining on subsets of the rows gives?

    scores   [q, n]      positive: the train row helps the query (lowers its output, a loss)
    keep     [m, n]      bool: the rows that each subset keeps
    outputs  [m, r, q]   measured on models retrained on each subset, r runs with seeds of their own; NaN: not run

For a query, the forecast of a subset is minus the sum of the scores of its rows. Spearman's correlation over subsets
between forecast and measurement (the mean over runs) is the query's score, and the LDS is the mean over queries.

Retraining is noisy, and no forecast can be better than its measurement lets it. The *ceiling* is the square root of the
measurement's reliability, found from subsets that were run several times; LDS over ceiling is what the score would be
without that noise, whatever the number of runs. What is resampled for intervals are subsets: queries share them.

Sources: Park et al. 2023, arXiv 2303.14186 (LDS); Spearman 1910, Brown 1910 (reliability of a mean of runs).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from headwater.errors import InvalidInput, InvalidSetting, NonFiniteValue, ShapeMismatch

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A figure, and where resampling the subsets puts it."""

    value: float
    low: float
    high: float
    level: float = 0.9

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"


@dataclass(frozen=True, eq=False)
class Lds:
    """How well scores forecast retraining."""

    raw: Interval
    """As measured, with the noise of the retraining in it."""
    ceiling: float | None
    """What a perfect forecast would get, on average; None where no subset was run twice."""
    by_query: Floats
    """[q]; NaN for a query whose forecast or measurement is the same for all subsets."""
    alpha: float
    """The share of rows that the subsets keep."""
    subsets: int
    runs: int
    """Of each subset, most often."""

    @property
    def corrected(self) -> Interval | None:
        """Over the ceiling: without the noise of the measurement."""
        if self.ceiling is None or not self.ceiling > 0:
            return None
        raw, share = self.raw, self.ceiling
        return Interval(raw.value / share, raw.low / share, raw.high / share, raw.level)

    @property
    def undefined(self) -> int:
        """Queries without a correlation; they count as zero."""
        return int(np.isnan(self.by_query).sum())

    def __str__(self) -> str:
        found = f"LDS {self.raw}, alpha {self.alpha:.2g}, {self.subsets} subsets x {self.runs} runs"
        if self.ceiling is not None:
            found += f"; ceiling {self.ceiling:.3f}"
        if self.corrected is not None:
            found += f", corrected {self.corrected}"
        return found + (f"; {self.undefined} queries undefined, counted as 0" if self.undefined else "")


def forecast(scores: ArrayLike, keep: ArrayLike) -> Floats:
    """Minus the summed scores of each subset's rows: [m, q]."""
    given, kept = np.asarray(scores, dtype=np.float64), _mask(keep)
    if given.ndim != 2 or given.shape[1] != kept.shape[1]:
        raise ShapeMismatch(f"The scores are {given.shape}, the subsets {kept.shape}; expected (q, n) and (m, n).")
    bad = ~np.isfinite(given)
    if bad.any():
        raise NonFiniteValue(
            f"{int(bad.sum())} scores are not finite, the first of query {int(np.argwhere(bad)[0, 0])}."
        )
    return -(kept.astype(np.float64) @ given.T)


def lds(
    scores: ArrayLike,
    keep: ArrayLike,
    outputs: ArrayLike,
    *,
    resamples: int = 500,
    level: float = 0.9,
    seed: int = 0,
) -> Lds:
    """The linear datamodeling score of a matrix of scores, with its interval and ceiling.

    Errors: ShapeMismatch; NonFiniteValue for a score that is not finite; InvalidInput for fewer than 3 subsets, for
    one that was never run, and for one that keeps no row.
    """
    kept, runs, measured = _checked(keep, outputs)
    predicted = forecast(scores, kept)
    if predicted.shape[1] != measured.shape[1]:
        raise ShapeMismatch(f"There are scores of {predicted.shape[1]} queries and outputs of {measured.shape[1]}.")
    by_query = spearman(predicted, measured)
    draws = [_mean(spearman(predicted[chosen], measured[chosen])) for chosen in _resampled(len(kept), resamples, seed)]
    counts = np.isfinite(runs).all(axis=2).sum(axis=1)
    return Lds(
        _interval(_mean(by_query), draws, level),
        ceiling(outputs),
        by_query,
        float(kept.mean()),
        len(kept),
        int(np.bincount(counts).argmax()),
    )


def difference(
    scores: ArrayLike,
    others: ArrayLike,
    keep: ArrayLike,
    outputs: ArrayLike,
    *,
    resamples: int = 500,
    level: float = 0.9,
    seed: int = 0,
) -> Interval:
    """The LDS of `scores` minus that of `others`, on the same resampled subsets; zero outside: one is better."""
    kept, _, measured = _checked(keep, outputs)
    first, second = forecast(scores, kept), forecast(others, kept)

    def gap(chosen: NDArray[np.int64] | slice) -> float:
        truth = measured[chosen]
        return _mean(spearman(first[chosen], truth)) - _mean(spearman(second[chosen], truth))

    return _interval(gap(slice(None)), [gap(chosen) for chosen in _resampled(len(kept), resamples, seed)], level)


def ceiling(outputs: ArrayLike, *, splits: int = 20, seed: int = 0) -> float | None:
    """The square root of the measurement's reliability; None where fewer than 3 subsets were run twice.

    1. Take the subsets with two runs or more, and split their runs into halves, at random, `splits` times.
    2. r, the mean over queries of Spearman's correlation of the halves' means, is the reliability of k / 2 runs' mean.
    3. That of R runs' mean, R the number most subsets have, follows by Spearman and Brown: 2 R r / k over
       1 + (2 R / k - 1) r.
    """
    runs = np.asarray(outputs, dtype=np.float64)
    counts = np.isfinite(runs).all(axis=2).sum(axis=1)
    twice = np.flatnonzero(counts >= 2)
    if len(twice) < 3:
        return None
    half = int(counts[twice].min()) // 2
    rng, found = np.random.default_rng(seed), []
    for _ in range(splits):
        halves = np.empty((2, len(twice), runs.shape[2]))
        for place, subset in enumerate(twice):
            order = rng.permutation(np.flatnonzero(np.isfinite(runs[subset]).all(axis=1)))
            halves[0, place], halves[1, place] = (
                runs[subset, order[:half]].mean(0),
                runs[subset, order[half : 2 * half]].mean(0),
            )
        found.append(_mean(spearman(halves[0], halves[1])))
    r, longer = float(np.mean(found)), int(np.bincount(counts).argmax()) / half
    return float(np.sqrt(max(0.0, longer * r / (1.0 + (longer - 1.0) * r))))


def spearman(first: Floats, second: Floats) -> Floats:
    """Rank correlation of each column of two [m, q] arrays, ties sharing their mean rank: [q]; NaN for a constant."""
    left, right = (_centred_ranks(values) for values in (first, second))
    norms = np.sqrt((left**2).sum(0) * (right**2).sum(0))
    return np.divide((left * right).sum(0), norms, out=np.full(left.shape[1], np.nan), where=norms > 0)


def _centred_ranks(values: Floats) -> Floats:
    """Column by column; ties share the mean of the ranks they take up."""
    order = np.argsort(values, axis=0, kind="stable")
    ordered = np.take_along_axis(values, order, axis=0)
    m = len(values)
    starts = np.vstack([np.ones((1, values.shape[1]), bool), ordered[1:] != ordered[:-1]])
    place = np.arange(m)[:, None]
    first = np.maximum.accumulate(np.where(starts, place, 0), axis=0)
    ends = np.vstack([starts[1:], np.ones((1, values.shape[1]), bool)])
    last = np.minimum.accumulate(np.where(ends, place, m)[::-1], axis=0)[::-1]
    ranks = np.empty(values.shape)
    np.put_along_axis(ranks, order, (first + last) / 2 - (m - 1) / 2, axis=0)
    return ranks


def _mean(by_query: Floats) -> float:
    """A query without a correlation forecasts nothing: it counts as zero, and is not dropped."""
    return float(np.nan_to_num(by_query).mean())


def _resampled(subsets: int, resamples: int, seed: int) -> list[NDArray[np.int64]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(subsets, size=subsets) for _ in range(resamples)]


def _interval(value: float, draws: list[float], level: float) -> Interval:
    """Percentiles of resampled values about their median, laid about the value: resampled ties pull ranks together."""
    if not 0 < level < 1:
        raise InvalidSetting(f"level is {level}; expected a probability between 0 and 1.")
    if not draws:
        return Interval(value, float("nan"), float("nan"), level)
    low, middle, high = np.quantile(draws, [(1 - level) / 2, 0.5, (1 + level) / 2])
    return Interval(value, float(value + low - middle), float(value + high - middle), level)


def _mask(keep: ArrayLike) -> NDArray[np.bool_]:
    kept = np.asarray(keep)
    if kept.dtype != np.bool_ or kept.ndim != 2:
        raise InvalidInput(f"The subsets are a mask (m, n) of booleans; got {kept.shape} of {kept.dtype}.")
    return kept


def _checked(keep: ArrayLike, outputs: ArrayLike) -> tuple[NDArray[np.bool_], Floats, Floats]:
    """Masks, outputs of all runs, and the mean over runs: [m, q]."""
    kept, runs = _mask(keep), np.asarray(outputs, dtype=np.float64)
    if runs.ndim != 3 or len(runs) != len(kept):
        raise ShapeMismatch(f"The outputs are {runs.shape} for {len(kept)} subsets; expected (m, runs, q).")
    if len(kept) < 3:
        raise InvalidInput(f"A correlation over subsets needs at least 3 of them, got {len(kept)}.")
    if not np.any(kept, axis=1).all():
        raise InvalidInput(f"Subset {int(np.any(kept, axis=1).argmin())} keeps no row.")
    done = np.asarray(np.isfinite(runs).all(axis=2))
    if not done.any(axis=1).all():
        raise InvalidInput(f"Subset {int(done.any(axis=1).argmin())} has no run whose outputs are all finite.")
    return kept, runs, np.einsum("mrq,mr->mq", np.nan_to_num(runs), done / done.sum(axis=1, keepdims=True))
