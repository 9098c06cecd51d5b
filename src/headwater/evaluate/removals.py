"""Do scores forecast what leaving rows out does? Their agreement with retraining, one row or group at a time.

    scores   [q, n]      positive: the train row helps the query (lowers its output, a loss)
    keep     [1 + g, n]  bool: first all rows, then all rows but those of each group (`bank.plan_removals`)
    outputs  [1 + g, r, q]   measured on models retrained on these; NaN: not run
    truth    [q, g]      the rise of each query's output when the group is gone

The forecast of a group is the sum of its rows' scores. Three figures say how it agrees with the truth over groups:
Pearson's and Spearman's correlation, each the mean over queries, and the *slope*, by which the forecasts of all queries
must be multiplied to fit best (regression through the origin): 1 is calibrated, above 1 forecasts too little. It means
that for scores of the unit "removal" alone.

Retraining a network without one row mostly measures its seed. The *reliability* says how much: it is the correlation
to expect with the same measurement repeated. Below one half the truth is mostly noise, and no figure made from it says
much.
Runs are compared with the run of all rows that has the same place: `plan_removals` gives these the same seed.

What is resampled for intervals are groups: queries share them. With few groups and effects of long tails they come out
narrow, the slope's most: for 30 rows of a ridge regression, intervals of nine tenths held zero for .85 (Pearson), .91
(Spearman) and .79 (slope) of 200 scrambled scores; for 120 groups of normal effects for .89, .90 and .89.

Sources: Koh and Liang 2017, arXiv 1703.04730 (leave-one-out); Spearman 1910, Brown 1910 (reliability of a mean).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from headwater.errors import InvalidInput, NonFiniteValue, ShapeMismatch
from headwater.evaluate.checks import (
    Flags,
    Floats,
    complete_runs,
    mean_over_runs,
    score_matrix,
    subset_mask,
    usual_runs,
)
from headwater.evaluate.correlation import mean_correlation, mean_spearman, pearson, spearman
from headwater.evaluate.intervals import Interval, about, resampled
from headwater.evaluate.lds import ceiling
from headwater.positions import row_positions

NOISY = 0.5
"""Reliability below which a truth is called noisy."""


@dataclass(frozen=True, eq=False)
class Agreement:
    """How well forecasts of removals agree with what removing does."""

    pearson: Interval
    """The mean over queries."""
    spearman: Interval
    """The mean over queries."""
    slope: Interval
    """Of truth on forecast through the origin, all queries together; 1 is calibrated. NaN if all forecasts are zero."""
    pearson_by_query: Floats
    """[q]; NaN for a query whose forecast or truth is the same for all groups."""
    spearman_by_query: Floats
    """[q]; NaN likewise."""
    slope_by_query: Floats
    """[q]; NaN for a query whose forecasts are all zero."""
    groups: int
    runs: int | None
    """Of each group, most often; None for a truth that was given, without runs."""
    reliability: float | None
    """Of the mean over runs; None where it is not known: fewer than 3 groups were run twice, or there are no runs."""

    @property
    def undefined(self) -> int:
        """Queries without a correlation; they count as zero."""
        return int(np.isnan(self.spearman_by_query).sum())

    @property
    def noisy(self) -> bool:
        """Whether the truth is known to be mostly noise."""
        return self.reliability is not None and self.reliability < NOISY

    def __str__(self) -> str:
        found = f"Pearson {self.pearson}, Spearman {self.spearman}, slope {self.slope}, {self.groups} groups"
        if self.runs is not None:
            found += f" x {self.runs} runs; reliability of the truth " + (
                "unknown: run groups at least twice" if self.reliability is None else f"{self.reliability:.3f}"
            )
        if self.noisy:
            found += f", NOISY: below {NOISY} the truth is mostly seed noise, and these figures say little"
        return found + (f"; {self.undefined} queries undefined, counted as 0" if self.undefined else "")


def leave_one_out(
    scores: ArrayLike,
    keep: ArrayLike,
    outputs: ArrayLike,
    *,
    resamples: int = 500,
    level: float = 0.9,
    seed: int = 0,
) -> Agreement:
    """How scores agree with a bank of removals: `leave_one_out(scores, *bank)`.

    Errors: ShapeMismatch; NonFiniteValue for a score that is not finite; InvalidInput if the first subset lacks a row,
    another has all, there are fewer than 3 groups, or one has no run that all rows have too.
    """
    kept, rises = _checked(keep, outputs)
    given = score_matrix(scores)
    if given.shape != (rises.shape[2], kept.shape[1]):
        raise ShapeMismatch(
            f"The scores are {given.shape}; there are outputs of {rises.shape[2]} queries and subsets of "
            f"{kept.shape[1]} rows."
        )
    half = ceiling(rises)
    return _agreement(
        # A forecast of a group is its rows' summed scores: positive, the loss rises without them.
        given @ (~kept[1:]).T.astype(np.float64),
        mean_over_runs(rises).T,
        usual_runs(rises),
        None if half is None else half**2,
        (resamples, level, seed),
    )


def agreement(
    forecast: ArrayLike, truth: ArrayLike, *, resamples: int = 500, level: float = 0.9, seed: int = 0
) -> Agreement:
    """How forecasts [q, g] agree with a truth [q, g] that has no runs: exact refits of a convex model, say.

    Errors: ShapeMismatch; NonFiniteValue; InvalidInput for fewer than 3 groups.
    """
    predicted, measured = (np.asarray(given, dtype=np.float64) for given in (forecast, truth))
    if predicted.ndim != 2 or predicted.shape != measured.shape:
        raise ShapeMismatch(f"The forecast is {predicted.shape}, the truth {measured.shape}; expected (q, g) twice.")
    for name, values in (("forecast", predicted), ("truth", measured)):
        bad = ~np.isfinite(values)
        if bad.any():
            query, group = (int(k) for k in np.argwhere(bad)[0])
            raise NonFiniteValue(f"The {name} of query {query} for group {group} is {values[query, group]}.")
    return _agreement(predicted, measured, None, None, (resamples, level, seed))


def removal_forecast(scores: ArrayLike, groups: Sequence[Sequence[int]]) -> Floats:
    """The summed scores of each group's rows: [q, g].

    Errors: InvalidInput for a mask, or a row that does not exist; BatchMismatch for a row twice.
    """
    given = score_matrix(scores)
    found = np.zeros((len(given), len(groups)))
    for place, group in enumerate(groups):
        rows = row_positions(group, given.shape[1], f"The rows of group {place}")
        found[:, place] = given[:, rows].sum(axis=1)
    return found


def _agreement(
    predicted: Floats,
    truth: Floats,
    runs: int | None,
    reliability: float | None,
    resampling: tuple[int, float, int],
) -> Agreement:
    if predicted.shape[1] < 3:
        raise InvalidInput(f"A correlation over groups needs at least 3 of them, got {predicted.shape[1]}.")
    resamples, level, seed = resampling
    forecasts, measured = predicted.T, truth.T

    def figures(chosen: NDArray[np.int64] | slice) -> tuple[float, float]:
        f, t = forecasts[chosen], measured[chosen]
        # All queries together: a slope of each query would weigh those with hardly any effect as much.
        return mean_correlation(pearson(f, t)), float(_slopes(f.reshape(-1, 1), t.reshape(-1, 1))[0])

    draws = resampled(len(forecasts), resamples, seed)
    linear, slope = figures(slice(None))
    others = [figures(draw) for draw in draws]
    # A resample may have nothing but groups with a forecast of zero.
    slopes = [draw[1] for draw in others if np.isfinite(draw[1])]
    ranked = spearman(forecasts, measured)
    return Agreement(
        about(linear, [draw[0] for draw in others], level),
        about(mean_correlation(ranked), mean_spearman(forecasts, measured, draws), level),
        about(slope, slopes, level),
        pearson(forecasts, measured),
        ranked,
        _slopes(forecasts, measured),
        len(forecasts),
        runs,
        reliability,
    )


def _slopes(predicted: Floats, truth: Floats) -> Floats:
    """Of truth on forecast through the origin, column by column: [q]; NaN for a forecast that is zero."""
    squares = (predicted**2).sum(axis=0)
    return np.divide((predicted * truth).sum(axis=0), squares, out=np.full(len(squares), np.nan), where=squares > 0)


def _checked(keep: ArrayLike, outputs: ArrayLike) -> tuple[Flags, Floats]:
    """Masks [1 + g, n], and the rise of the outputs of each run over the same run with all rows: [g, r, q]."""
    kept, runs = subset_mask(keep), np.asarray(outputs, dtype=np.float64)
    if runs.ndim != 3 or len(runs) != len(kept):
        raise ShapeMismatch(f"The outputs are {runs.shape} for {len(kept)} subsets; expected (1 + g, runs, q).")
    if not len(kept) or not kept[0].all():
        missing = int((~kept[:1]).sum())
        raise InvalidInput(
            f"The first subset must keep all rows; it lacks {missing}. `plan_removals` makes such a bank."
        )
    if kept[1:].all(axis=1).any():
        raise InvalidInput(f"Subset {1 + int(kept[1:].all(axis=1).argmax())} leaves out no row.")
    rises = np.where(np.isfinite(runs[1:]) & np.isfinite(runs[:1]), runs[1:] - np.nan_to_num(runs[:1]), np.nan)
    done = np.any(complete_runs(rises), axis=1)
    if not done.all():
        raise InvalidInput(f"Subset {1 + int(done.argmin())} has no run that all rows have too, with finite outputs.")
    return kept, rises
