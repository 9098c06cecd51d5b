"""Query rows without labels, for `explain="prediction"`: the model says their labels itself.

A model's prediction takes the form of a target (which dtype, how many numbers), and a label of the train rows shows
that form. So each row without one has the first train row's label, until the prediction takes its place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from headwater.arrays import is_array, is_frame
from headwater.loaders.forms import rows_of
from headwater.types import Batch

Labels = Callable[[int], Any]
"""So many stand-ins."""


@dataclass(frozen=True, eq=False)
class Unlabelled(Iterable[Any]):
    """A loader of batches of which some, or all, have no labels."""

    source: Iterable[Any]
    labels: Labels

    def __iter__(self) -> Iterator[Any]:
        for item in self.source:
            yield _labelled(item, self.labels)


def _labelled(item: Any, labels: Labels) -> Any:
    if isinstance(item, Batch):
        return item if item.y is not None else replace(item, y=labels(len(item)))
    if isinstance(item, (tuple, list)) and len(item) == 2 and item[1] is None:
        return item[0], labels(rows_of(item[0]))
    if isinstance(item, (tuple, list)) and len(item) == 1 and is_array(item[0]):  # of a TensorDataset of one tensor
        return item[0], labels(rows_of(item[0]))
    return (item, labels(rows_of(item))) if is_array(item) or is_frame(item) else item


def has_no_labels(held: Any, target: Any = None) -> bool:
    """Whether it is inputs alone: an array, texts, a frame without the column `target`, (x, None), or batches of these.

    Of batches the first is looked at.
    """
    if isinstance(held, (tuple, list)) and len(held) == 2 and held[1] is None:
        return True
    if is_frame(held):
        names = [target] if isinstance(target, str) else target or []
        return len(held.shape) < 2 or not all(name in list(held.columns) for name in names) or not names
    if is_array(held) or _are_texts(held):
        return True
    if isinstance(held, Batch):
        return held.y is None
    if isinstance(held, (str, Mapping, Iterator, tuple)) or not isinstance(held, Iterable):
        return False
    first = next(iter(held), None)
    if isinstance(first, (tuple, list)) and len(first) == 1:
        return is_array(first[0])
    return is_array(first) or (isinstance(first, (Batch, tuple, list)) and has_no_labels(first))


def _are_texts(held: Any) -> bool:
    return isinstance(held, list) and bool(held) and all(isinstance(text, str) for text in held)


def with_stand_ins(held: Any, labels: Labels) -> Any:
    """What `has_no_labels`, with a stand-in for each row's label."""
    if isinstance(held, (tuple, list)) and len(held) == 2 and held[1] is None:
        held = held[0]
    elif not (is_frame(held) or is_array(held) or _are_texts(held)):
        return Unlabelled(held, labels)
    count = len(held) if isinstance(held, list) else rows_of(held)
    return held, labels(count)


def repeated(row: Any) -> Labels:
    """The one label in `row`, [1, ...], as often as it is asked for."""
    return lambda count: row[np.zeros(count, dtype=np.int64)]
