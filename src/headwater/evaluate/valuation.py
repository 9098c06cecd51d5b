"""Two valuations of rows that need no influence: Shapley values of nearest neighbours, and what bagged models say.

Both are baselines: as all of them, [q, n] and larger first; a row that helps is positive.

1. `knn_shapley`. A game: the share of a query's K nearest rows, among those that play, that have its label (an empty
   place counts as a wrong one). Sorted by distance, with a_i = 1 where row i has the label, the Shapley values are

       s_n = a_n min(K, n) / (K n),    s_i = s_{i+1} + (a_i - a_{i+1}) min(K, i) / (K i)

   exactly: rows i and i + 1 differ only for coalitions with fewer than K nearer ones.
2. `out_of_bag`. Minus the mean loss of a train row under the models that were not trained on it: what is hard to learn
   from others comes last. It knows no query.

Sources: Jia et al. 2019, arXiv 1908.08619 (nearest neighbours); Kwon and Zou 2023, arXiv 2304.07718 (Data-OOB).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from headwater.errors import BatchMismatch, InvalidInput, ShapeMismatch
from headwater.evaluate.checks import Floats, complete_runs, row_features, subset_mask
from headwater.settings import check_whole, check_word

TARGETS = ("auto", "classes")
MANY = 20
"""Different whole numbers above which, where they have fewer than three rows each on average, they are taken for a
regression's targets."""


def knn_shapley(
    query_features: ArrayLike,
    train_features: ArrayLike,
    query_labels: ArrayLike,
    train_labels: ArrayLike,
    *,
    k: int = 5,
    targets: str = "auto",
) -> Floats:
    """Shapley values of the train rows, for each query's label by its k nearest rows (Euclidean): [q, n].

    Shapes: features [q, d] and [n, d], inputs or embeddings, scaled as distances should count them; labels [q], [n].
    Of rows as near as each other, the first in the data is nearer. The values of a query add up to the share of its k
    nearest rows that have its label. targets: labels are classes, and nothing else: "auto" refuses numbers with a
    fraction, and more than 20 different whole numbers with fewer than three rows each on average (as a regression's
    targets have); "classes" takes whole numbers as they are. A regression's targets have no values here: put them into
    a few bins, or ask `Bank.attribution`. Errors: ShapeMismatch; BatchMismatch; NonFiniteValue; InvalidSetting;
    InvalidInput for targets that are no classes.
    """
    check_whole("k", k, 1)
    check_word("targets", targets, TARGETS)
    query, train = row_features(query_features, "query"), row_features(train_features, "train")
    if query.shape[1] != train.shape[1]:
        raise ShapeMismatch(f"Queries have {query.shape[1]} features, train rows {train.shape[1]}.")
    asked, given = np.asarray(query_labels), np.asarray(train_labels)
    if asked.shape != (len(query),) or given.shape != (len(train),):
        raise BatchMismatch(
            f"The labels are {asked.shape} and {given.shape}; expected ({len(query)},) and ({len(train)},)."
        )
    for name, labels in (("query", asked), ("train", given)):
        if labels.dtype.kind == "f" and (labels != np.floor(labels)).any():
            value = labels[labels != np.floor(labels)][0]
            raise InvalidInput(f"A {name} label is {value:g}: labels are classes, not a regression's targets.")
    if targets == "auto":
        _check_classes(given)
    count = len(train)
    places = np.arange(1, count + 1)
    share = np.minimum(k, places) / (k * places)  # of the step from row i + 1 to row i
    found = np.empty((len(query), count))
    for row, one, label in zip(found, query, asked, strict=True):
        near = np.argsort(((train - one) ** 2).sum(axis=1), kind="stable")
        right = (given[near] == label).astype(np.float64)
        # Jia et al. 2019, theorem 1: from the farthest row inwards, each value is that of the next plus a step.
        steps = np.append(right[:-1] - right[1:], right[-1]) * share
        row[near] = steps[::-1].cumsum()[::-1]
    return found


def _check_classes(labels: np.ndarray) -> None:
    """Errors: InvalidInput for whole numbers that look like a regression's targets: see MANY."""
    if labels.dtype.kind not in "iuf":
        return
    distinct = len(np.unique(labels))
    if distinct > MANY and 3 * distinct > len(labels):
        raise InvalidInput(
            f"The {len(labels)} train labels are numbers with {distinct} different values, which looks like a "
            "regression; labels are classes here, equal or not. Put targets into a few bins, or ask Bank.attribution; "
            "targets='classes' if these are classes."
        )


def out_of_bag(keep: ArrayLike, outputs: ArrayLike, q: int) -> Floats:
    """Minus each train row's mean loss under the models that were not trained on it, the same for all of q queries.

    Shapes: keep [m, n], the rows of each model (a bank's masks, or the bags of a forest); outputs [m, r, n], a bank's
    whose queries are the train rows themselves, or [m, n]; NaN where not run. The result is [q, n].
    Errors: ShapeMismatch; NonFiniteValue; InvalidInput for a row that every model was trained on; InvalidSetting.
    """
    check_whole("q", q, 1)
    kept, losses = subset_mask(keep), np.asarray(outputs, dtype=np.float64)
    losses = losses[:, None] if losses.ndim == 2 else losses
    if losses.ndim != 3 or (len(losses), losses.shape[2]) != kept.shape:
        raise ShapeMismatch(
            f"The outputs are {np.shape(outputs)} for masks {kept.shape}; expected (m, runs, n), the losses of the n "
            "train rows themselves."
        )
    done = complete_runs(losses)
    outside = (~kept[:, None] & done[:, :, None]).astype(np.float64)
    counts = outside.sum(axis=(0, 1))
    if not counts.all():
        raise InvalidInput(f"Every model was trained on row {int(counts.argmin())}: none can say what it thinks of it.")
    # A run that is NaN has no weight in `outside`; 0 times NaN would be NaN all the same.
    means = (np.nan_to_num(losses) * outside).sum(axis=(0, 1)) / counts
    return np.tile(-means, (q, 1))
