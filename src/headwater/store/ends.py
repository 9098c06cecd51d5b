"""Both ends of every query's ranking, found tile by tile: of train rows, or of groups of them.

Threshold first, then sort what survives. Once k rows are known, a tile's row matters only where it beats the k-th best
so far; after a few tiles hardly any does. So each tile costs two comparisons a score, and sorting a handful of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from headwater.errors import InvalidInput, ShapeMismatch
from headwater.settings import check_whole, check_word
from headwater.store.base import Sink, Tile
from headwater.store.ids import count_from_zero
from headwater.store.topk import TopK

MANY = 8
"""Survivors, in multiples of k for each query, above which the tile's own k-th best is looked for too."""
MISSING = float("nan")
"""The label of all rows whose label is no number: no two NaN are equal, and this one object is."""


class TopKSink(Sink):
    """The k largest and smallest scores of each query so far; ties go to the row that came first."""

    def __init__(self, k: int, query_ids: np.ndarray):
        self.k = checked_k(k)
        self.query_ids = query_ids
        self._ends: list[End] | None = None
        self._numbered = True
        """Whether all rows so far were called by their positions."""

    def add(self, scores: np.ndarray, train_ids: np.ndarray) -> None:
        """A tile: scores [query, n] of the train rows with these ids [n]."""
        check_labels(scores, self.query_ids, train_ids)
        if self._ends is None:
            none = np.broadcast_to(train_ids[:0], (len(scores), 0))
            self._ends = [End(sign, scores[:, :0], none) for sign in (-1, 1)]
        # NaN compares with nothing: such tiles are sorted, as they are rare, and refused by runs.
        with np.errstate(invalid="ignore", over="ignore"):
            ordered = bool(np.isfinite(scores.sum()))
        self._ends = [end.with_tile(self.k, scores, train_ids, ordered) for end in self._ends]

    def write(self, tile: Tile) -> None:
        self._numbered &= tile.ids.dtype.kind in "iu" and count_from_zero(tile.ids - tile.start)
        self.add(tile.scores.sum(axis=0) if len(tile.scores) > 1 else tile.scores[0], tile.ids)

    def top(self) -> TopK:
        """What has been seen so far; fewer than k columns if there were fewer rows.

        Errors: InvalidInput before any tile.
        """
        if self._ends is None:
            raise InvalidInput("There is no tile of scores yet.")
        helpful, harmful = self._ends
        found = TopK(self.query_ids, helpful.ids, helpful.scores, harmful.ids, harmful.scores)
        return replace(found, train_positions=self._numbered)


@dataclass(frozen=True, eq=False)
class End:
    """One end of all rankings: the best so far, strongest first."""

    sign: int
    """-1 for the largest, 1 for the smallest."""
    scores: np.ndarray
    """[q, up to k]."""
    ids: np.ndarray

    def with_tile(self, k: int, scores: np.ndarray, ids: np.ndarray, ordered: bool) -> End:
        """With the rows of one more tile, [q, n]; ordered: whether no score is NaN."""
        if not ordered or scores.shape[1] <= k or np.isnan(self.scores[:, -1:]).any():
            return self._sorted(k, scores, ids)
        full = self.scores.shape[1] == k
        # Strictly better than the k-th so far: a tie is the earlier row's.
        survives = self._better(scores, self.scores[:, -1:]) if full else None
        if survives is None or np.count_nonzero(survives) > MANY * k * len(scores):
            # No worse than the tile's own k-th: of ties there, the stable sort takes the first.
            good = ~self._better(self._own_bar(k, scores), scores)
            survives = good if survives is None else survives & good
        # On the flat array: NumPy looks for the places of True in a matrix eleven times slower.
        query, row = np.divmod(np.flatnonzero(survives), scores.shape[1])
        return self._merged(k, scores[query, row], ids[row], query) if len(query) else self

    def _better(self, scores: np.ndarray, bar: np.ndarray) -> np.ndarray:
        return scores > bar if self.sign < 0 else scores < bar

    def _own_bar(self, k: int, scores: np.ndarray) -> np.ndarray:
        """The k-th best of a tile of more than k rows: [q, 1]."""
        place = k - 1 if self.sign > 0 else scores.shape[1] - k
        return np.partition(scores, place, axis=1)[:, place : place + 1]

    def _merged(self, k: int, scores: np.ndarray, ids: np.ndarray, query: np.ndarray) -> End:
        """With survivors of each query, in the order of the rows: scores, ids and query, [m] each."""
        q, held = self.scores.shape
        every = np.concatenate([self.scores.reshape(-1), scores])
        names = np.concatenate([self.ids.reshape(-1), ids])
        owner = np.concatenate([np.repeat(np.arange(q), held), query])
        # Stable, and what was there comes first: ties go to the row that came first.
        order = np.lexsort((self.sign * every, owner))
        starts = np.searchsorted(owner[order], np.arange(q))
        best = order[starts[:, None] + np.arange(k)]
        return End(self.sign, every[best], names[best])

    def _sorted(self, k: int, scores: np.ndarray, ids: np.ndarray) -> End:
        """As `with_tile`, whatever the scores are: all are sorted."""
        every = np.concatenate([self.scores, scores], axis=1)
        names = np.concatenate([self.ids, np.broadcast_to(ids, scores.shape)], axis=1)
        order = np.argsort(self.sign * every, axis=1, kind="stable")[:, :k]
        return End(self.sign, np.take_along_axis(every, order, axis=1), np.take_along_axis(names, order, axis=1))


# Groups ---------------------------------------------------------------------------------------------------------------


class GroupSink(Sink):
    """The k best and worst groups of train rows for each query, by the sum or the mean of their rows' scores.

    labels: one for each train row, in the loader's order; or a mapping from what rows are called to labels. of: "sum"
    or "mean". Ties go to the group whose first row came first. Errors: InvalidSetting; InvalidInput for rows without a
    label, and at the end for labels of a list without a row.
    """

    def __init__(self, k: int, query_ids: np.ndarray, labels: Sequence[Any] | Mapping[Any, Any], of: str = "sum"):
        check_word("of", of, ("sum", "mean"))
        self.k, self.query_ids, self.of = checked_k(k), query_ids, of
        self.labels: Any = labels if isinstance(labels, Mapping) else _listed(labels)
        self._number: dict[Any, int] = {}
        self._first: list[int] = []
        self._counts = np.zeros(0)
        self._sums = np.zeros((len(query_ids), 0))
        self._rows = 0

    def write(self, tile: Tile) -> None:
        numbers = self._numbers(self._labels_of(tile), tile.start)
        self._rows += len(numbers)
        self._grow()
        groups, inverse = np.unique(numbers, return_inverse=True)
        order = np.argsort(inverse.reshape(-1), kind="stable")
        edges = np.searchsorted(inverse.reshape(-1)[order], np.arange(len(groups)))
        # In float64: a group may have a million rows.
        scores = tile.scores.sum(axis=0, dtype=np.float64)
        self._sums[:, groups] += np.add.reduceat(scores[:, order], edges, axis=1)
        self._counts[groups] += np.bincount(inverse.reshape(-1))

    def _labels_of(self, tile: Tile) -> list[Any]:
        if isinstance(self.labels, Mapping):
            missing = [name for name in tile.ids.tolist() if name not in self.labels]
            if missing:
                raise InvalidInput(f"groups has no label for train row {missing[0]!r}.")
            return [self.labels[name] for name in tile.ids.tolist()]
        stop = tile.start + len(tile.ids)
        if stop > len(self.labels):
            raise InvalidInput(f"groups has {len(self.labels)} labels, and there are at least {stop} train rows.")
        found: list[Any] = self.labels[tile.start : stop]
        return found

    def _numbers(self, labels: Sequence[Any], start: int) -> np.ndarray:
        """Of each row's group. start: the first row. Errors: InvalidInput for a label that a dict does not take."""
        # Through a dict, and not as an array: NumPy makes text of 1 beside "1", and a matrix of tuples.
        known, found = self._number, []
        for row, label in enumerate(labels, start):
            if isinstance(label, float) and label != label:
                label = MISSING  # no two NaN are equal
            try:
                number = known.setdefault(label, len(known))
            except TypeError:
                raise InvalidInput(
                    f"groups has the label {label!r}, which cannot be looked up; use text, say."
                ) from None
            if number == len(self._first):
                self._first.append(row)
            elif row < self._first[number]:
                self._first[number] = row
            found.append(number)
        return np.array(found, dtype=np.int64)

    def _grow(self) -> None:
        new = len(self._number) - len(self._counts)
        if new > 0:
            # Twice as many as before at least, so that a group a tile is not copied a thousand times.
            room = max(new, len(self._counts))
            self._counts = np.concatenate([self._counts, np.zeros(room)])
            self._sums = np.concatenate([self._sums, np.zeros((len(self._sums), room))], axis=1)

    def grouped(self) -> tuple[np.ndarray, np.ndarray]:
        """The groups' labels [g], that of the first row first, and their scores [q, g].

        Errors: InvalidInput before any tile, and for labels that have no row.
        """
        if not self._number:
            raise InvalidInput("There is no tile of scores yet.")
        if not isinstance(self.labels, Mapping) and self._rows != len(self.labels):
            raise InvalidInput(f"groups has {len(self.labels)} labels, and there are {self._rows} train rows.")
        order = np.argsort(np.array(self._first), kind="stable")
        scores = self._sums[:, order] / self._counts[order] if self.of == "mean" else self._sums[:, order]
        return _as_array(list(self._number))[order], scores

    def top(self) -> TopK:
        """`TopK` whose ids are labels. Errors: as `grouped`."""
        labels, scores = self.grouped()
        ends = TopKSink(self.k, self.query_ids)
        ends.add(scores, labels)
        return replace(ends.top(), train_positions=False)  # of groups


def _listed(labels: Any) -> list[Any]:
    """One label for each row, as Python's own values. Errors: InvalidInput for what has more axes."""
    if isinstance(labels, (list, tuple)):
        return [label.item() if isinstance(label, np.generic) else label for label in labels]
    array = np.asarray(labels)
    if array.ndim != 1:
        raise InvalidInput(f"groups has shape {array.shape}; expected one label for each train row.")
    found: list[Any] = array.tolist()
    return found


def _as_array(labels: list[Any]) -> np.ndarray:
    """[n], of objects where they are not all text or all numbers."""
    kinds = {type(label) for label in labels}
    if kinds in ({str}, {bytes}, {bool}) or kinds <= {int, float}:
        return np.array(labels)
    found = np.empty(len(labels), dtype=object)
    for number, label in enumerate(labels):  # at once, tuples of one length would be taken for rows of a matrix
        found[number] = label
    return found


def checked_k(k: int) -> int:
    """Errors: InvalidSetting unless it counts something."""
    check_whole("k", k, 1)
    return int(k)


def check_labels(values: np.ndarray, query_ids: np.ndarray, train_ids: np.ndarray) -> None:
    """Errors: ShapeMismatch unless the scores are [query, train, ...]."""
    if values.shape[:2] != (len(query_ids), len(train_ids)):
        raise ShapeMismatch(f"The scores are {values.shape}, for {len(query_ids)} queries and {len(train_ids)} rows.")
