"""The contract of batches: rows that are counted, cut and joined, with every column that a subclass adds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from headwater.arrays import shape_of
from headwater.errors import BatchMismatch
from headwater.testing.contract import Contract, host
from headwater.types import Batch, field_values, join


class BatchContract(Contract):
    """What every `headwater.types.Batch` obeys. A subclass fills `batch`, and `columns` if its own are no arrays."""

    length: int = 7
    """How many rows the data set behind `batch` has; at least 5."""

    def batch(self, index: Sequence[int]) -> Batch[Any]:
        """A hook: these rows of a fixed data set, in this order, with every field of the class; all rows differ."""
        raise NotImplementedError

    def columns(self, batch: Batch[Any]) -> list[np.ndarray]:
        """A hook: what the batch holds of its rows, every field of it, each with the rows along its first axis."""
        return [leaf for _, held in field_values(batch) for leaf in _leaves(held)]

    def carried(self, batch: Batch[Any]) -> list[Any]:
        """A hook: what it holds besides, which neither `take` nor `join` may change."""
        return []

    def assert_same_batch(self, got: Batch[Any], expected: Batch[Any]) -> None:
        assert type(got) is type(expected)
        mine, theirs = self.columns(got), self.columns(expected)
        assert len(mine) == len(theirs)
        for one, other in zip(mine, theirs, strict=True):
            np.testing.assert_array_equal(one, other)
        assert self.carried(got) == self.carried(expected)

    def test_a_batch_has_a_length(self) -> None:
        for rows in (self.length, 3, 1):
            assert len(self.batch(range(rows))) == rows

    def test_every_column_is_cut(self) -> None:
        whole = self.batch(range(self.length))
        for rows in (slice(2), slice(1, self.length, 2), slice(3, 4)):
            self.assert_same_batch(whole.take(rows), self.batch(range(self.length)[rows]))
        for index in ([3, 0, 4], [2, 2], [self.length - 1]):
            self.assert_same_batch(whole.take(np.array(index)), self.batch(index))

    def test_every_column_is_joined(self) -> None:
        cuts = [range(2), range(2, 3), range(3, self.length)]
        (joined,) = join([self.batch(cut) for cut in cuts])
        self.assert_same_batch(joined, self.batch(range(self.length)))
        assert join([self.batch(range(2))]) != []
        assert join([]) == []

    def test_columns_of_other_lengths_are_refused_by_their_names(self) -> None:
        whole, shorter = self.batch(range(self.length)), self.batch(range(self.length - 1))
        for (column, held), (_, other) in zip(field_values(whole), field_values(shorter), strict=True):
            if column.init and [*_leaves(held)] and self.is_column(column.name):
                with self.refuses(BatchMismatch, column.name, self.length, self.length - 1):
                    replace(whole, **{column.name: other})

    def is_column(self, name: str) -> bool:
        """A hook: whether a field is a column; by default, unless the dataclass says otherwise."""
        return name in self.batch(range(2))._columns()

    def test_a_batch_cannot_be_changed(self) -> None:
        with self.refuses(AttributeError):
            self.batch(range(2)).x = None  # type: ignore[misc]


def _leaves(value: object) -> list[np.ndarray]:
    if value is None:
        return []
    if isinstance(value, Mapping):
        return [leaf for v in value.values() for leaf in _leaves(v)]
    if isinstance(value, (tuple, list)) and any(shape_of(v) for v in value):
        return [leaf for v in value for leaf in _leaves(v)]
    array = host(value)
    return [array] if array.ndim else []
