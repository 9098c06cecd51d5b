"""Arrays as the metrics take them: each as NumPy has it, or an error that names the bad value.

scores   [q, n]      finite; labelled ones (`headwater.Scores`) are put in the order of the data by their ids
keep     [m, n]      bool: the train rows that each subset keeps
outputs  [m, r, q]   of the models retrained on each subset, r runs; NaN: not run
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from headwater.errors import InvalidInput, NonFiniteValue, ShapeMismatch

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]


@runtime_checkable
class Labelled(Protocol):
    """Scores that name their rows, as `headwater.Scores` does: ids of the queries [q] and of the train rows [n]."""

    query_ids: ArrayLike
    train_ids: ArrayLike


def score_matrix(scores: ArrayLike) -> Floats:
    """Scores as [q, n]. Errors: ShapeMismatch; NonFiniteValue naming the first query and row."""
    given = np.asarray(scores, dtype=np.float64)
    if given.ndim != 2 or not given.size:
        raise ShapeMismatch(f"The scores are {given.shape}; expected (q, n), at least one of each.")
    if isinstance(scores, Labelled):
        given = given[np.ix_(np.argsort(places(scores.query_ids)), np.argsort(places(scores.train_ids)))]
    bad = ~np.isfinite(given)
    if bad.any():
        query, row = (int(k) for k in np.argwhere(bad)[0])
        raise NonFiniteValue(f"{int(bad.sum())} scores are not finite, the first of query {query} and row {row}.")
    return given


def places(ids: ArrayLike) -> NDArray[np.int64]:
    """Where in the data the rows of these ids are: the ids are the places if they are 0 to n - 1 in some order.

    Rows of other ids (names, ascending numbers) are taken to be in the order of the data: [n].
    Errors: InvalidInput for other numbers that do not ascend: nobody knows which row of the data is which.
    """
    given = np.asarray(ids)
    order = np.arange(len(given))
    if given.dtype.kind not in "iu":
        return order
    if np.array_equal(np.sort(given), order):
        return given.astype(np.int64)
    if (np.diff(given) < 0).any():
        first = int((np.diff(given) < 0).argmax())
        raise InvalidInput(
            f"The ids of {len(given)} rows are neither 0 to {len(given) - 1} nor ascending ({given[first]} before "
            f"{given[first + 1]}): which row of the data is which? Use positions as ids, or pass numpy.asarray(scores) "
            "with its rows in the order of the data."
        )
    return order


def subset_mask(keep: ArrayLike) -> Flags:
    """The rows of subsets as [m, n]. Errors: InvalidInput."""
    kept = np.asarray(keep)
    if kept.dtype != np.bool_ or kept.ndim != 2:
        raise InvalidInput(f"The subsets are a mask (m, n) of booleans; got {kept.shape} of {kept.dtype}.")
    return kept


def retrained_outputs(keep: ArrayLike, outputs: ArrayLike) -> tuple[Flags, Floats, Floats]:
    """Masks [m, n], outputs of all runs [m, r, q], and their mean over runs [m, q].

    Errors: ShapeMismatch; InvalidInput for fewer than 3 subsets, one that keeps no row, and one that was never run.
    """
    kept, runs = subset_mask(keep), np.asarray(outputs, dtype=np.float64)
    if runs.ndim != 3 or len(runs) != len(kept):
        raise ShapeMismatch(f"The outputs are {runs.shape} for {len(kept)} subsets; expected (m, runs, q).")
    if len(kept) < 3:
        raise InvalidInput(f"A correlation over subsets needs at least 3 of them, got {len(kept)}.")
    if not np.any(kept, axis=1).all():
        raise InvalidInput(f"Subset {int(np.any(kept, axis=1).argmin())} keeps no row.")
    return kept, runs, mean_over_runs(runs)


def complete_runs(outputs: Floats) -> Flags:
    """The runs that were made: [m, r]. Errors: NonFiniteValue for one of which only some outputs are finite."""
    done = np.isfinite(outputs).all(axis=2)
    partly = ~(done | np.isnan(outputs).all(axis=2))
    if partly.any():
        subset, run = (int(k) for k in np.argwhere(partly)[0])
        query = int(np.isfinite(outputs[subset, run]).argmin())
        raise NonFiniteValue(
            f"The output of query {query} is {outputs[subset, run, query]} in run {run} of subset {subset}. (A run "
            "that was not made is NaN for all queries.)"
        )
    return np.asarray(done)


def mean_over_runs(outputs: Floats) -> Floats:
    """The mean of each subset's complete runs: [m, q]. Errors: InvalidInput for a subset that has none."""
    done = complete_runs(outputs)
    if not done.any(axis=1).all():
        raise InvalidInput(f"Subset {int(done.any(axis=1).argmin())} was not run.")
    return np.einsum("mrq,mr->mq", np.nan_to_num(outputs), done / done.sum(axis=1, keepdims=True))


def usual_runs(outputs: Floats) -> int:
    """How many complete runs a subset has, most often."""
    return int(np.bincount(complete_runs(outputs).sum(axis=1)).argmax())


def effective_runs(outputs: Floats) -> float:
    """How many runs each subset would have for as much noise in all, if all had as many: the harmonic mean."""
    return 1.0 / float(np.mean(1.0 / complete_runs(outputs).sum(axis=1)))


def row_features(values: ArrayLike, name: str) -> Floats:
    """Numbers of rows as [rows, d]. Errors: ShapeMismatch; NonFiniteValue naming the row."""
    features = np.asarray(values, dtype=np.float64)
    if features.ndim != 2 or not features.size:
        raise ShapeMismatch(f"The {name} features are {features.shape}; expected (rows, d): flatten what a row has.")
    if not np.isfinite(features).all():
        row = int(np.isfinite(features).all(axis=1).argmin())
        raise NonFiniteValue(f"The features of {name} row {row} are not finite.")
    return features


def query_outputs(values: ArrayLike, queries: int, said: str) -> Floats:
    """One model's outputs, a finite number for each query: [q].

    said: what they are, in words ("outputs after a step"). Errors: ShapeMismatch; NonFiniteValue naming the query.
    """
    found = np.asarray(values, dtype=np.float64)
    if found.shape != (queries,):
        raise ShapeMismatch(f"The {said} are {found.shape}; expected ({queries},).")
    if not np.isfinite(found).all():
        first = int(np.argmin(np.isfinite(found)))
        raise NonFiniteValue(f"The {said} are not finite, the first that of query {first}.")
    return found
