"""Correlations of the columns of two arrays, [m, q] each: one for each query, over m subsets, groups or rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from headwater.evaluate.checks import Floats

AT_ONCE = 500_000
"""Numbers that are ranked together: enough that little is spent on calls, few enough for the cache."""


def spearman(first: Floats, second: Floats) -> Floats:
    """Rank correlation of each column of two [m, q] arrays, ties sharing their mean rank: [q]; NaN for a constant.

    Axes may stand between these two, and those of one array be broadcast: [m, k, q] and [m, 1, q] give [k, q].
    """
    # Spearman is Pearson of ranks; with mid-ranks their mean is (m + 1) / 2, ties or not.
    left, right = (mid_ranks(values) - (len(values) + 1) / 2 for values in (first, second))
    # Ranks are halves of whole numbers, and so their sums are exact: in any order, and in any company.
    norms = np.sqrt((left**2).sum(axis=0) * (right**2).sum(axis=0))
    return np.divide((left * right).sum(axis=0), norms, out=np.full(norms.shape, np.nan), where=norms > 0)


def pearson(first: Floats, second: Floats) -> Floats:
    """Correlation of each column of two [m, q] arrays: [q]; NaN for a constant."""
    left, right = (values - values.mean(axis=0) for values in (first, second))
    # Not by the norm: the mean of equal numbers may be off by rounding, and the norm then is not zero.
    vary = (np.ptp(first, axis=0) > 0) & (np.ptp(second, axis=0) > 0)
    norms = np.sqrt((left**2).sum(axis=0)) * np.sqrt((right**2).sum(axis=0))
    return np.divide((left * right).sum(axis=0), norms, out=np.full(left.shape[1], np.nan), where=vary & (norms > 0))


def mean_correlation(by_query: Floats) -> float:
    """The mean over queries. One without a correlation (NaN) forecasts nothing: it counts as zero, not dropped."""
    return float(np.nan_to_num(by_query).mean())


def mean_spearman(first: Floats, second: Floats, draws: Sequence[NDArray[np.int64]]) -> list[float]:
    """`mean_correlation` of `spearman` on each draw of rows: `[m, q]` arrays, draws of one length."""
    found: list[float] = []
    for piece in _pieces(len(draws), first.size):
        chosen = np.stack(draws[piece], axis=1)  # [rows, draws]: the arrays become [rows, draws, q]
        found += map(mean_correlation, spearman(first[chosen], second[chosen]))
    return found


def mean_spearman_of_each(several: Sequence[Floats], second: Floats) -> list[float]:
    """`mean_correlation` of `spearman` of each of several `[m, q]` arrays with one, whose ranks they share."""
    found: list[float] = []
    for piece in _pieces(len(several), second.size):
        found += map(mean_correlation, spearman(np.stack(several[piece], axis=1), second[:, None]))
    return found


def _pieces(count: int, size: int) -> Iterator[slice]:
    """Of so many arrays, each of so many numbers."""
    step = max(1, AT_ONCE // max(1, size))
    return (slice(begin, begin + step) for begin in range(0, count, step))


def mid_ranks(values: Floats) -> Floats:
    """Ranks from 1 along the first axis of [m, ...], ascending; ties share the mean of the ranks they take up."""
    # What is sorted lies side by side: along the first axis, sorting would gather each column first.
    columns = np.ascontiguousarray(np.moveaxis(values, 0, -1))
    order = np.argsort(columns, axis=-1, kind="stable")
    ordered = np.take_along_axis(columns, order, axis=-1)
    m = len(values)
    # Where a run of equal values begins and ends: its ranks' mean is the mean of first and last.
    starts = np.ones((*columns.shape[:-1], m + 1), bool)
    starts[..., 1:-1] = ordered[..., 1:] != ordered[..., :-1]
    place = np.arange(1, m + 1)
    first = np.maximum.accumulate(np.where(starts[..., :-1], place, 1), axis=-1)
    last = np.minimum.accumulate(np.where(starts[..., 1:], place, m)[..., ::-1], axis=-1)[..., ::-1]
    ranks = np.empty(columns.shape)
    np.put_along_axis(ranks, order, (first + last) / 2, axis=-1)
    return np.moveaxis(ranks, -1, 0)
