"""The linear datamodeling score: do summed scores forecast what retraining on subsets of the rows gives?

    scores   [q, n]      positive: the train row helps the query (lowers its output, a loss)
    keep     [m, n]      bool: the rows that each subset keeps
    outputs  [m, r, q]   measured on models retrained on each subset, r runs with seeds of their own; NaN: not run

For a query, the forecast of a subset is minus the sum of the scores of its rows. Spearman's correlation over subsets
between forecast and measurement (the mean over runs) is the query's score, and the LDS is the mean over queries.

Retraining is noisy, and no forecast can be better than its measurement lets it. The *ceiling* is the square root of the
measurement's reliability, found from subsets that were run several times; LDS over ceiling is what the score would be
without that noise, whatever the number of runs, also where some subsets have more than others. What is resampled for
intervals are subsets: queries share them.

Sources: Park et al. 2023, arXiv 2303.14186 (LDS); Spearman 1910, Brown 1910 (reliability of a mean of runs).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from headwater.errors import ShapeMismatch
from headwater.evaluate.checks import (
    Flags,
    Floats,
    complete_runs,
    effective_runs,
    retrained_outputs,
    score_matrix,
    subset_mask,
    usual_runs,
)
from headwater.evaluate.correlation import mean_correlation, mean_spearman
from headwater.evaluate.correlation import spearman as spearman
from headwater.evaluate.intervals import Interval as Interval
from headwater.evaluate.intervals import about, resampled


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
        # The ceiling is taken as known: its own uncertainty is not in this interval.
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
        if self.ceiling is not None and self.raw.low > self.ceiling:
            found += "; above what a perfect forecast gets: were the scores made from these very subsets?"
        return found + (f"; {self.undefined} queries undefined, counted as 0" if self.undefined else "")


def forecast(scores: ArrayLike, keep: ArrayLike) -> Floats:
    """Minus the summed scores of each subset's rows: [m, q].

    Errors: ShapeMismatch; NonFiniteValue naming the first query and row; InvalidInput for subsets that are no mask.
    """
    given, kept = score_matrix(scores), subset_mask(keep)
    if given.shape[1] != kept.shape[1]:
        raise ShapeMismatch(f"The scores are {given.shape}, the subsets {kept.shape}; expected (q, n) and (m, n).")
    # A score is how much a row lowers the loss: a subset's summed scores, with a minus, forecast its loss.
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
    kept, runs, measured = retrained_outputs(keep, outputs)
    predicted = _forecast(scores, kept, measured)
    by_query = spearman(predicted, measured)
    # Subsets are resampled, queries stay: what is random is which subsets were trained.
    draws = mean_spearman(predicted, measured, resampled(len(kept), resamples, seed))
    return Lds(
        about(mean_correlation(by_query), draws, level),
        ceiling(outputs),
        by_query,
        float(kept.mean()),
        len(kept),
        usual_runs(runs),
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
    kept, _, measured = retrained_outputs(keep, outputs)
    first, second = (_forecast(given, kept, measured) for given in (scores, others))

    # Paired: both scores see the same subsets, so that luck with these cancels.
    draws = [np.arange(len(kept)), *resampled(len(kept), resamples, seed)]
    ours, theirs = (mean_spearman(values, measured, draws) for values in (first, second))
    gap, *gaps = np.subtract(ours, theirs).tolist()
    return about(gap, gaps, level)


def _forecast(scores: ArrayLike, kept: Flags, measured: Floats) -> Floats:
    """Errors: those of `forecast`; ShapeMismatch for outputs of other queries."""
    predicted = forecast(scores, kept)
    if predicted.shape[1] != measured.shape[1]:
        raise ShapeMismatch(f"There are scores of {predicted.shape[1]} queries and outputs of {measured.shape[1]}.")
    return predicted


def ceiling(outputs: ArrayLike, *, runs: float | None = None, splits: int = 20, seed: int = 0) -> float | None:
    """The square root of the measurement's reliability; None where fewer than 3 subsets were run twice.

    runs: of so many runs' mean; None: of as many as these subsets have (`effective_runs`).

    1. Take the subsets with two runs or more, and split their runs into halves, at random, `splits` times: for all
       subsets alike, as runs of one place may share a seed, whose luck is no subset's.
    2. r, the mean over queries of Spearman's correlation of the halves' means, is the reliability of k / 2 runs' mean.
    3. That of R runs' mean follows by Spearman and Brown: 2 R r / k over 1 + (2 R / k - 1) r. Where subsets have
       unequal numbers of runs, R is their harmonic mean: the noise of all of them together is that of R runs each.

    Where queries differ in their noise it is a little high: the root of a mean is above the mean of roots.
    Errors: ShapeMismatch unless outputs are [m, runs, q].
    """
    measured = np.asarray(outputs, dtype=np.float64)
    if measured.ndim != 3:
        raise ShapeMismatch(f"The outputs are {measured.shape}; expected (m, runs, q).")
    done = complete_runs(measured)
    counts = done.sum(axis=1)
    twice = np.flatnonzero(counts >= 2)
    if len(twice) < 3:
        return None
    # Halves of one size for all subsets: reliability is that of a mean of so many runs.
    half = int(counts[twice].min()) // 2
    rng, found = np.random.default_rng(seed), []
    for _ in range(splits):
        halves = np.empty((2, len(twice), measured.shape[2]))
        shuffled = rng.permutation(measured.shape[1])
        for place, subset in enumerate(twice):
            # In one order for all subsets: see step 1.
            order = shuffled[done[subset, shuffled]]
            halves[0, place] = measured[subset, order[:half]].mean(0)
            # An odd run is left out: halves of different sizes would have different reliabilities.
            halves[1, place] = measured[subset, order[half : 2 * half]].mean(0)
        found.append(mean_correlation(spearman(halves[0], halves[1])))
    r, longer = float(np.mean(found)), (effective_runs(measured) if runs is None else runs) / half
    # Spearman and Brown 1910. The root: a perfect forecast correlates with a noisy measurement by sqrt(reliability).
    return float(np.sqrt(max(0.0, longer * r / (1.0 + (longer - 1.0) * r))))
