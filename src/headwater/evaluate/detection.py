"""Does a score find the rows it should? Ranking metrics, with ties shared fairly.

    scores     [n] one number per row; larger means "look here first"
    positives  [n] bool: the rows that ought to be found (wrong labels, say)

Rows with equal scores are in no order. Every metric is its mean over all the orders in which they could be listed, so a
constant score gets what chance gets. Nothing is dropped: a NaN is counted and refused.

Every function refuses lengths that differ (BatchMismatch), positives that are no mask or that are all False
(InvalidInput) and NaN (NonFiniteValue).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from headwater.errors import BatchMismatch, InvalidInput, InvalidSetting, NonFiniteValue
from headwater.evaluate.correlation import mid_ranks
from headwater.settings import check_whole


def auc(scores: ArrayLike, positives: ArrayLike) -> float:
    """The chance that a positive row outranks a negative one, ties counting one half: 0.5 is chance, 1 is perfect.

    Errors: as the module says, and InvalidInput if there are no negatives.
    """
    values, wanted = _checked(scores, positives)
    negatives = int((~wanted).sum())
    if negatives == 0:
        raise InvalidInput(f"AUC compares positives with negatives, but all {len(wanted)} rows are positive.")
    # A positive's rank counts all rows below it; those that are positive are taken off (Mann and Whitney 1947).
    below, below_of_positives = mid_ranks(values[:, None])[wanted], mid_ranks(values[wanted][:, None])
    negatives_below = below - below_of_positives
    return float(negatives_below.mean() / negatives)


def average_precision(scores: ArrayLike, positives: ArrayLike) -> float:
    """The mean over positives of the precision of the list that ends with that positive; 1 is perfect.

    Chance is about the share of positives. Derivation, for place j = 1..g of a group of g ties that holds p positives,
    listed after s rows of which f are positive:

    1. the place holds a positive with probability p / g;
    2. given that, each of the j - 1 places before it does with probability (p - 1) / (g - 1);
    3. so it adds (p / g) * (f + 1 + (j - 1) (p - 1) / (g - 1)) / (s + j) to the sum over positives.
    """
    values, wanted = _checked(scores, positives)
    _, group, size = np.unique(-values, return_inverse=True, return_counts=True)
    found = np.bincount(group, weights=wanted)
    rows_before, found_before = np.cumsum(size) - size, np.cumsum(found) - found
    g, p, s, f = (np.repeat(of_group, size) for of_group in (size, found, rows_before, found_before))
    j = np.arange(1, len(values) + 1) - s
    # A group of one has no places before it: p - 1 is zero there, and g - 1 must not be divided by.
    expected = p / g * (f + 1 + (j - 1) * (p - 1) / np.maximum(g - 1, 1)) / (s + j)
    return float(expected.sum() / wanted.sum())


def recall_curve(scores: ArrayLike, positives: ArrayLike) -> NDArray[np.float64]:
    """The share of all positives found after looking at the first 0, 1, ..., n rows: [n + 1], from 0 to 1."""
    values, wanted = _checked(scores, positives)
    return _found(values, wanted) / wanted.sum()


def recall_at(scores: ArrayLike, positives: ArrayLike, fraction: float) -> float:
    """The share of all positives found in the top `fraction` of rows (whole rows, rounded, at least one).

    Errors: as the module says, and InvalidSetting if `fraction` is not in (0, 1].
    """
    if not 0 < fraction <= 1:
        raise InvalidSetting(f"fraction is the share of rows to look at, in (0, 1]; got {fraction}.")
    curve = recall_curve(scores, positives)
    return float(curve[max(1, round(fraction * (len(curve) - 1)))])


def precision_at(scores: ArrayLike, positives: ArrayLike, k: int) -> float:
    """The share of positives among the top k rows.

    Errors: as the module says, and InvalidSetting if k is not in 1..n.
    """
    values, wanted = _checked(scores, positives)
    check_whole("k", k, 1, len(values))
    return float(_found(values, wanted)[k] / k)


def _found(values: NDArray[np.float64], wanted: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Positives expected among the first 0, 1, ..., n rows, [n + 1]: each row counts its ties' share of positives."""
    _, group, size = np.unique(-values, return_inverse=True, return_counts=True)
    share = np.bincount(group, weights=wanted) / size
    return np.concatenate([[0.0], np.cumsum(np.repeat(share, size))])


def _checked(scores: ArrayLike, positives: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Both as [n] arrays, or an error that names the bad value."""
    values, wanted = np.asarray(scores, dtype=np.float64), np.asarray(positives)
    if wanted.dtype != np.bool_:
        raise InvalidInput(f"positives must be a bool mask, one entry per row; got dtype {wanted.dtype}.")
    if values.ndim != 1 or values.shape != wanted.shape:
        raise BatchMismatch(
            f"Expected one score and one flag per row; got scores {values.shape} and positives {wanted.shape}."
        )
    if np.isnan(values).any():
        raise NonFiniteValue(
            f"{int(np.isnan(values).sum())} of {len(values)} scores are NaN, the first at row "
            f"{int(np.isnan(values).argmax())}. They have no rank: find out where they come from."
        )
    if not wanted.any():
        raise InvalidInput(f"None of the {len(wanted)} rows is positive: there is nothing to find.")
    return values, wanted
