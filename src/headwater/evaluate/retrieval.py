"""Do the queries find the rows that they should? Ranking metrics of a matrix, and their mean over queries.

    scores    [q, n]   larger comes first
    relevant  [q, n]   bool: the rows that ought to be found for each query

Rows with equal scores are in no order: every figure is its mean over all the orders in which they could be listed, so
constant scores get what chance gets. What is drawn here are queries, so they are what intervals resample; two rankings
of the same queries are compared by `intervals.over_queries` of the differences of their figures.

Every function refuses shapes that differ (ShapeMismatch), scores that are not finite (NonFiniteValue) and a query with
nothing to find (InvalidInput).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from headwater.errors import InvalidInput, ShapeMismatch
from headwater.evaluate.checks import Flags, Floats, score_matrix
from headwater.evaluate.intervals import Interval, over_queries
from headwater.positions import row_positions
from headwater.settings import check_whole


def mrr(
    scores: ArrayLike, relevant: ArrayLike, *, resamples: int = 2000, level: float = 0.9, seed: int = 0
) -> Interval:
    """The mean over queries of one over the rank of the first relevant row; 1 is perfect."""
    return over_queries(reciprocal_ranks(scores, relevant), resamples=resamples, level=level, seed=seed)


def recall_at_k(
    scores: ArrayLike, relevant: ArrayLike, k: int, *, resamples: int = 2000, level: float = 0.9, seed: int = 0
) -> Interval:
    """The mean over queries of the share of its relevant rows that are among its top k; k / n is chance.

    Errors: as the module says, and InvalidSetting if k is not in 1..n.
    """
    share = found_at_k(scores, relevant, k) / np.asarray(relevant).sum(axis=1)
    return over_queries(share, resamples=resamples, level=level, seed=seed)


def precision_at_k(
    scores: ArrayLike, relevant: ArrayLike, k: int, *, resamples: int = 2000, level: float = 0.9, seed: int = 0
) -> Interval:
    """The mean over queries of the share of its top k rows that are relevant.

    Errors: as the module says, and InvalidSetting if k is not in 1..n.
    """
    return over_queries(found_at_k(scores, relevant, k) / k, resamples=resamples, level=level, seed=seed)


def duplicates(scores: ArrayLike, pairs: Mapping[int, int | Sequence[int]]) -> tuple[Floats, Flags]:
    """The scores of the queries that have planted duplicates, and which rows these are: `mrr(*duplicates(...))`.

    pairs: query -> the train row, or rows, that are its duplicates. Queries without any are left out.
    Shapes: scores [q, n]; both results [len(pairs), n], in the order of `pairs`.
    Errors: InvalidInput for no pairs, and for a query or row that does not exist.
    """
    given = score_matrix(scores)
    if not pairs:
        raise InvalidInput("There are no pairs: name at least one query and the train rows that duplicate it.")
    relevant = np.zeros((len(pairs), given.shape[1]), dtype=bool)
    for mask, (query, rows) in zip(relevant, pairs.items(), strict=True):
        if not 0 <= query < len(given):
            raise InvalidInput(f"The pairs name query {query}; there are {len(given)}.")
        mask[row_positions(rows, len(mask), f"The duplicates of query {query}", distinct=False)] = True
    return _checked(given[list(pairs)], relevant)


# Figures of each query ------------------------------------------------------------------------------------------------


def reciprocal_ranks(scores: ArrayLike, relevant: ArrayLike) -> Floats:
    """One over the rank of each query's first relevant row: [q].

    Derivation: the best relevant score is shared by g rows, p of them relevant, and s rows, none relevant, come before.

    1. The first j of the g hold nothing relevant with probability P_j = (1 - p/g)(1 - p/(g-1)) ... (1 - p/(g-j+1)).
    2. The first relevant row has rank s + j with probability P_{j-1} - P_j, j = 1..g.
    """
    given, wanted = _checked(scores, relevant)
    found = np.empty(len(given))
    for query, (values, flags) in enumerate(zip(given, wanted, strict=True)):
        best = values[flags].max()
        before, tied = int((values > best).sum()), values == best
        g, p = int(tied.sum()), int((tied & flags).sum())
        none_yet = np.cumprod(np.concatenate([[1.0], np.maximum(0.0, 1 - p / np.arange(g, 0, -1))]))
        found[query] = -(np.diff(none_yet) / (before + np.arange(1, g + 1))).sum()
    return found


def found_at_k(scores: ArrayLike, relevant: ArrayLike, k: int) -> Floats:
    """How many of each query's relevant rows are among its top k: [q].

    Errors: as the module says, and InvalidSetting if k is not in 1..n.
    """
    given, wanted = _checked(scores, relevant)
    return (in_top(given, k) * wanted).sum(axis=1)


def in_top(scores: ArrayLike, k: int) -> Floats:
    """How likely each row is among its query's top k: one, zero, or the share of the ties that still fit: [q, n].

    Errors: as the module says, and InvalidSetting if k is not in 1..n.
    """
    given = score_matrix(scores)
    n = given.shape[1]
    check_whole("k", k, 1, n)
    last = -np.partition(-given, k - 1, axis=1)[:, k - 1 : k]
    above, tied = given > last, given == last
    return above + tied * (k - above.sum(axis=1, keepdims=True)) / tied.sum(axis=1, keepdims=True)


def ranking(scores: ArrayLike, seed: int = 0) -> NDArray[np.int64]:
    """Each query's rows, the highest score first; equal scores in an order drawn from `seed`: [q, n]."""
    given = score_matrix(scores)
    return np.lexsort((np.random.default_rng(seed).random(given.shape), -given), axis=1)


def _checked(scores: ArrayLike, relevant: ArrayLike) -> tuple[Floats, Flags]:
    given, wanted = score_matrix(scores), np.asarray(relevant)
    if wanted.dtype != np.bool_:
        raise InvalidInput(f"relevant must be a bool mask (q, n); got dtype {wanted.dtype}.")
    if wanted.shape != given.shape:
        raise ShapeMismatch(f"The scores are {given.shape} and the relevant rows {wanted.shape}; expected the same.")
    nothing = ~wanted.any(axis=1)
    if nothing.any():
        raise InvalidInput(f"{int(nothing.sum())} queries have no relevant row, the first query {nothing.argmax()}.")
    return given, wanted
