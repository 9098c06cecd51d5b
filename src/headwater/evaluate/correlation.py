"""Correlations of the columns of two arrays, [m, q] each: one for each query, over m subsets, groups or rows."""

from __future__ import annotations

import numpy as np

from headwater.evaluate.checks import Floats


def spearman(first: Floats, second: Floats) -> Floats:
    """Rank correlation of each column of two [m, q] arrays, ties sharing their mean rank: [q]; NaN for a constant."""
    # Spearman is Pearson of ranks; with mid-ranks their mean is (m + 1) / 2, ties or not.
    left, right = (mid_ranks(values) - (len(values) + 1) / 2 for values in (first, second))
    norms = np.sqrt((left**2).sum(axis=0) * (right**2).sum(axis=0))
    return np.divide((left * right).sum(axis=0), norms, out=np.full(left.shape[1], np.nan), where=norms > 0)


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


def mid_ranks(values: Floats) -> Floats:
    """Ranks from 1 of each column of [m, q], ascending; ties share the mean of the ranks they take up."""
    order = np.argsort(values, axis=0, kind="stable")
    ordered = np.take_along_axis(values, order, axis=0)
    m = len(values)
    # Where a run of equal values begins and ends: its ranks' mean is the mean of first and last.
    starts = np.vstack([np.ones((1, values.shape[1]), bool), ordered[1:] != ordered[:-1]])
    place = np.arange(1, m + 1)[:, None]
    first = np.maximum.accumulate(np.where(starts, place, 1), axis=0)
    ends = np.vstack([starts[1:], np.ones((1, values.shape[1]), bool)])
    last = np.minimum.accumulate(np.where(ends, place, m)[::-1], axis=0)[::-1]
    ranks = np.empty(values.shape)
    np.put_along_axis(ranks, order, (first + last) / 2, axis=0)
    return ranks
