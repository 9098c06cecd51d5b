"""Query rows without labels, for `explain="prediction"`: the model says their labels itself.

A model's prediction takes the form of a target (which dtype, how many numbers), and a label of the train rows shows
that form. So each row without one has the first train row's label, until the prediction takes its place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from numbers import Number
from typing import Any

import numpy as np

from headwater.arrays import as_pandas, described, is_array, is_frame, is_sparse
from headwater.errors import InvalidInput
from headwater.loaders.forms import Collated, Form, gives_rows, is_tensor_dataset, rows_of
from headwater.loaders.texts import are_texts
from headwater.types import Batch

ALONE = (
    "x without labels is an array, a data frame, a sparse matrix, (x, None), a Dataset of x, or a list or loader of "
    "batches of these"
)


class StandIns:
    """So many labels as are asked for, all the same; `used` once any were."""

    def __init__(self, first: Callable[[], Any]):
        """first: the one label, [1, ...], which is asked for when it is needed."""
        self.first, self.used = first, False

    @cached_property
    def _row(self) -> Any:
        return self.first()

    def __call__(self, count: int) -> Any:
        row = self._row
        self.used = True
        return row[np.zeros(count, dtype=np.int64)]


@dataclass(frozen=True, eq=False)
class Unlabelled(Iterable[Any]):
    """A loader of batches of which some, or all, may have no labels."""

    source: Iterable[Any]
    labels: StandIns
    target: Any = None

    def __iter__(self) -> Iterator[Any]:
        for item in self.source:
            yield self._labelled(item)

    def _labelled(self, item: Any) -> Any:
        if isinstance(item, Batch):
            return item if item.y is not None else replace(item, y=self.labels(len(item)))
        item = _alone(as_pandas(item))
        if is_inputs_alone(item) and not _has_column(item, self.target):
            return item, self.labels(rows_of(item))
        if isinstance(item, (tuple, list)) and item and isinstance(item[0], (Number, list)):
            raise InvalidInput(f"A batch is {described(item)}; {ALONE}: make an array of it.")
        return item


def is_inputs_alone(item: Any) -> bool:
    """Whether it is x without y: an array, a frame, a sparse matrix."""
    return is_array(item) or is_frame(item) or is_sparse(item)


def _alone(item: Any) -> Any:
    """x of (x, None), and of the one entry of a batch of a TensorDataset; all else as it is."""
    if isinstance(item, (tuple, list)) and len(item) == 2 and item[1] is None:
        return item[0]
    if isinstance(item, (tuple, list)) and len(item) == 1 and is_inputs_alone(item[0]):
        return item[0]
    return item


def _has_column(held: Any, target: Any) -> bool:
    """Whether it is a frame whose targets are among its columns."""
    names = [target] if isinstance(target, str) else target or []
    if not is_frame(held) or len(held.shape) < 2 or not names:
        return False
    return all(name in list(held.columns) for name in names)


def with_stand_ins(held: Any, labels: StandIns, form: Form) -> Any:
    """What a user gave for queries, with a stand-in for the label of each row that has none.

    All rows at once: an array, texts, a frame without the column of targets, a sparse matrix, (x, None), a Dataset of
    x; else batches, each with labels or without. Errors: InvalidInput for a list of two arrays of as many rows.
    """
    _check_pair(held)
    if is_tensor_dataset(held, 1):
        held = held.tensors[0]
    if isinstance(held, (tuple, list)) and len(held) == 2 and held[1] is None:
        held = held[0]
        return held, labels(len(held) if isinstance(held, list) else rows_of(held))
    if is_inputs_alone(held):
        return held if _has_column(held, form.target) else (held, labels(rows_of(held)))
    if are_texts(held):
        return held, labels(len(held))
    if gives_rows(held) and len(held) and is_inputs_alone(_alone(held[0])):
        held = Collated(held, form.size, lambda name, value: value, alone=_alone)
    return Unlabelled(held, labels, form.target) if _gives_batches(held) else held


def _check_pair(held: Any) -> None:
    if not (isinstance(held, list) and len(held) == 2 and all(is_inputs_alone(part) for part in held)):
        return
    if rows_of(held[0]) == rows_of(held[1]):
        raise InvalidInput(
            "The query loader is a list of two arrays of as many rows: inputs and targets, or two batches without "
            "labels? The one is a tuple, (x, y); the other [(first, None), (second, None)]."
        )


def _gives_batches(held: Any) -> bool:
    """Whether its first item is a batch, with labels or without; what is no loader is refused elsewhere."""
    if isinstance(held, (str, Mapping, Iterator, tuple, Batch)) or not isinstance(held, Iterable) or gives_rows(held):
        return False
    first = as_pandas(next(iter(held), None))
    return isinstance(first, (Batch, tuple, list)) or is_inputs_alone(first)
