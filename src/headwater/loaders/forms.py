"""What users hold in place of a loader: all rows at once, or a data set of single rows; cut into batches as it is read.

    (x, y)                    arrays, lists of numbers, data frames; x also a tuple or dict of arrays
    (frame, "column")         a data frame, and which column is the target
    frame                     with target="column"
    a Dataset                 `len`, and items that are rows: tuples (x, y), or dicts with target="column" or unpack=

Batches are slices: nothing is copied but the rows of one batch. Their size changes no number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Number
from typing import Any

import numpy as np

from headwater.arrays import Numbered, described, dtype_of, is_array, is_frame, is_sparse, namespace, shape_of
from headwater.errors import BatchMismatch, InvalidInput
from headwater.loaders.batches import Columns, Unpack, Unpacked
from headwater.loaders.frames import as_ids, check_same_index, check_unique, is_default
from headwater.settings import check_whole
from headwater.types import Batch

Own = Callable[[str, Any], Any]
"""(its name, an array of whatever kind) -> the array as the framework takes it."""


@dataclass(frozen=True)
class Form:
    """How what users hold becomes batches. Errors: InvalidSetting."""

    size: int = 256
    """Rows in a batch."""
    target: Any = None
    """The column, or the columns, of targets, in data frames and in dicts."""
    ids: Any = None
    """The column of ids, likewise; it does not reach the model."""

    def __post_init__(self) -> None:
        check_whole("batch_size", self.size, 1)

    def batches(self, held: Any, role: str, own: Own, unpack: Unpack | None = None) -> Iterable[object]:
        """What a user gave for rows, as batches; a loader, and what is none, as it is. Errors: InvalidInput."""
        if is_tensor_dataset(held):
            held = tuple(held.tensors)
        if is_frame(held) and self.target is None and unpack is not None:
            return Unpacked(Cut((held,), self.size, lambda rows: rows[0]), unpack, self.ids)
        if isinstance(held, tuple) and len(held) == 2 and is_frame(held[0]) and isinstance(held[1], str):
            return replace(self, target=held[1]).of_frame(held[0])
        if is_frame(held) and self.target is not None:
            return self.of_frame(held)
        if is_pair(held):
            x, y = held
            return pair(x, y, self.size, own)
        source = Collated(held, self.size, own) if gives_rows(held) else held
        if unpack is not None:
            return source if _is_nothing(source) else Unpacked(source, unpack, self.ids)
        return source if self.target is None or _is_nothing(source) else Targeted(source, self)

    @property
    def _apart(self) -> list[Any]:
        """The columns that are no inputs: of targets, then of ids."""
        targets = self.target if isinstance(self.target, (list, tuple)) else [self.target]
        return [*targets, *([] if self.ids is None else [self.ids])]

    def of_frame(self, frame: Any) -> Cut:
        """A data frame whose column of targets is known, as batches. Errors: InvalidInput for columns it has not."""
        self._check_columns(frame.columns)
        if self.ids is None:
            _check_names(frame.index)
        return Cut((frame,), self.size, lambda rows: self._parted(rows[0]))

    def _parted(self, frame: Any) -> Columns:
        apart = self._apart
        # One name is one target for each row, a list of names a row of targets.
        target = [*self.target] if isinstance(self.target, (list, tuple)) else self.target
        ids = None if self.ids is None else as_ids(frame[self.ids].tolist(), "ids")
        return Columns(frame[[name for name in frame.columns if name not in apart]], frame[target], ids)

    def _check_columns(self, names: Iterable[Any]) -> None:
        names = list(names)
        missing = [name for name in self._apart if name not in names]
        if missing:
            raise InvalidInput(f"There is no column {missing[0]!r}; the columns are {', '.join(map(repr, names))}.")

    def columns(self, item: Any) -> Any:
        """A batch that is a dict or a frame, as x, y and ids: x is the column that is left, or a dict of several."""
        if is_frame(item):
            self._check_columns(item.columns)
            return self._parted(item)
        if not isinstance(item, Mapping):
            return item
        self._check_columns(item)
        apart = self._apart
        left = {name: column for name, column in item.items() if name not in apart}
        y = item[self.target] if isinstance(self.target, str) else _side_by_side([item[n] for n in self.target])
        x = next(iter(left.values())) if len(left) == 1 else left
        return Columns(x, y, None if self.ids is None else named(item[self.ids]))


@dataclass(frozen=True, eq=False)
class Targeted(Iterable[Any]):
    """A loader whose items are dicts or frames, one of whose columns is the target."""

    source: Iterable[object]
    form: Form

    def __iter__(self) -> Iterator[Any]:
        for item in self.source:
            yield self.form.columns(item)


def _side_by_side(columns: Sequence[Any]) -> Any:
    return namespace(*columns).stack(list(columns), axis=1)


def named(ids: Any) -> Any:
    """A column of ids; lists of words as an array."""
    return ids if ids is None or is_array(ids) else as_ids(ids, "ids")


def map_structure(make: Callable[[Any], Any], value: Any) -> Any:
    """The same tuple or dict, with what a function makes of each array in it."""
    if isinstance(value, Mapping):
        return {name: map_structure(make, v) for name, v in value.items()}
    if isinstance(value, tuple):
        return tuple(map_structure(make, v) for v in value)
    return make(value)


def _is_nothing(source: object) -> bool:
    """Whether nothing can be read from it again and again: what is wrong with it is said where it is read."""
    return not (isinstance(source, (Iterable, Numbered)) and not isinstance(source, (Iterator, Mapping, str, Batch)))


# All rows at once -----------------------------------------------------------------------------------------------------


class Cut(Iterable[Any]):
    """Rows that are all there: some columns, cut side by side, and what is made of each cut."""

    def __init__(self, parts: Sequence[Any], size: int, make: Callable[[tuple[Any, ...]], Any]):
        self.parts = tuple(map_structure(by_row, part) for part in parts)
        self.size, self.make = size, make
        self.rows = next(rows_of(part) for part in self.parts)

    def __len__(self) -> int:
        """Batches."""
        return -(-self.rows // self.size)

    def __iter__(self) -> Iterator[Any]:
        for start in range(0, self.rows, self.size):
            yield self.make(tuple(cut(part, slice(start, start + self.size)) for part in self.parts))


def pair(x: Any, y: Any, size: int, own: Own) -> Cut:
    """Inputs and targets of all rows. Errors: BatchMismatch if there are not as many; InvalidInput for two indices."""
    x, y = map_structure(as_array, x), map_structure(as_array, y)
    len(Batch(x, y))
    frames = [value for value in (x, y) if is_frame(value)]
    if len(frames) == 2:
        check_same_index(*(frame.index for frame in frames))
    if frames:
        _check_names(frames[0].index)
    return Cut((x, y), size, lambda rows: (own("x", rows[0]), own("y", rows[1])))


def _check_names(index: Any) -> None:
    if not is_default(index, 0):
        check_unique(index)


def is_pair(held: Any) -> bool:
    """Whether it is (x, y) of all rows, and no tuple of two batches."""
    if not isinstance(held, tuple) or len(held) != 2 or not _is_column(held[1]):
        return False
    x = held[0]
    group = list(x.values()) if isinstance(x, Mapping) else list(x) if isinstance(x, tuple) else []
    return _is_column(x) or (bool(group) and all(map(_is_column, group)))


def _is_column(value: Any) -> bool:
    """An array of any kind with a first axis, or a list of numbers, of words, or of lists of numbers."""
    shape = shape_of(value)
    if shape is not None and (is_frame(value) or dtype_of(value) is not None):
        return len(shape) > 0
    return _is_list(value) and all(isinstance(v, (Number, str)) or (_is_list(v) and _is_numbers(v)) for v in value)


def _is_list(value: Any) -> bool:
    return isinstance(value, list) and bool(value)


def _is_numbers(value: list[Any]) -> bool:
    return all(isinstance(v, Number) or (_is_list(v) and _is_numbers(v)) for v in value)


def as_array(value: Any) -> Any:
    """A list of numbers as an array. Errors: InvalidInput for rows of different lengths."""
    if not isinstance(value, list) or any(isinstance(v, str) for v in value):
        return value
    try:
        return np.asarray(value)
    except ValueError:
        raise InvalidInput(f"{described(value)} has rows of different lengths; pass an array, or batches.") from None


def by_row(value: Any) -> Any:
    """As something that can be cut: sparse matrices by row."""
    return value.tocsr() if is_sparse(value) else value


def rows_of(value: Any) -> int:
    if isinstance(value, (Mapping, tuple)):
        return rows_of(next(iter(value.values() if isinstance(value, Mapping) else value)))
    shape = shape_of(value)
    return len(value) if shape is None else int(shape[0])


def cut(value: Any, rows: slice) -> Any:
    """Some rows, one after the other: a view where the array has views."""
    return map_structure(lambda array: array.iloc[rows] if is_frame(array) else array[rows], value)


# Single rows ----------------------------------------------------------------------------------------------------------


class Collated(Iterable[Any]):
    """A data set of single rows, in batches, in its own order; the last one is smaller.

    alone: x of an item, where that is all that is wanted; a batch is (x,) then.
    """

    def __init__(self, source: Any, size: int, own: Own, *, alone: Callable[[Any], Any] | None = None):
        self.source, self.size, self.own, self.alone = source, size, own, alone

    def __len__(self) -> int:
        return -(-len(self.source) // self.size)

    def __iter__(self) -> Iterator[Any]:
        count = len(self.source)
        for start in range(0, count, self.size):
            rows = [self.source[k] for k in range(start, min(start + self.size, count))]
            yield self._collated(rows, start)

    def _collated(self, rows: list[Any], start: int) -> Any:
        try:
            return collate([(self.alone(row),) for row in rows] if self.alone is not None else rows, self.own)
        except (InvalidInput, BatchMismatch) as error:
            last = start + len(rows) - 1
            raise InvalidInput(f"{type(self.source).__name__}, rows {start} to {last}: {error}") from error


def collate(rows: list[Any], own: Own) -> Any:
    """Single rows as the columns of one batch. Errors: InvalidInput for what cannot be put under one another."""
    first = rows[0]
    if isinstance(first, Mapping):
        return {name: _column(name, [row[name] for row in rows], own) for name in first}
    if not isinstance(first, (tuple, list)):
        raise InvalidInput(
            f"an item is {described(first)}; expected (x, y), or a dict with target= or unpack=; "
            "x alone is for queries, with explain='prediction'."
        )
    if len({len(row) for row in rows}) > 1:
        raise InvalidInput("some items have more entries than others.")
    names = ("x", "y") if len(first) == 2 else [f"entry {k}" for k in range(len(first))]
    return tuple(_column(name, [row[k] for row in rows], own) for k, name in enumerate(names))


def _column(name: str, values: list[Any], own: Own) -> Any:
    first = values[0]
    if isinstance(first, Mapping):
        return {key: _column(f"{name}[{key!r}]", [value[key] for value in values], own) for key in first}
    if isinstance(first, (tuple, list)) and not all(isinstance(entry, Number) for entry in first):
        return tuple(_column(f"{name}[{k}]", [value[k] for value in values], own) for k in range(len(first)))
    if isinstance(first, str):
        return values
    if is_array(first):
        shapes = {tuple(value.shape) for value in values}
        if len(shapes) > 1:
            few = " and ".join(map(str, sorted(shapes)[:2]))
            raise InvalidInput(f"{name} has other shapes from row to row, {few}: give a DataLoader with a collate_fn.")
        return own(name, namespace(first).stack(values))
    try:
        found = np.asarray(values)
    except ValueError:
        found = np.empty(0, dtype=object)
    if found.dtype.kind not in "iufb":
        raise InvalidInput(f"{name} is {described(first)}; expected arrays or numbers: transform it in the data set.")
    return own(name, found)


def gives_rows(held: Any) -> bool:
    """Whether it is a data set whose items are single rows: of torch or Hugging Face, or by its first item."""
    if isinstance(held, (list, tuple, str, Mapping, Iterator, Batch)):
        return False
    kinds = {f"{kind.__module__}.{kind.__qualname__}" for kind in type(held).__mro__}
    if kinds & {"torch.utils.data.dataset.Dataset", "datasets.arrow_dataset.Dataset"}:
        return "torch.utils.data.dataset.IterableDataset" not in kinds and isinstance(held, Numbered)
    # What Python iterates over by numbers alone is a loader where its items are batches.
    if not isinstance(held, Numbered) or isinstance(held, Iterable) or shape_of(held) is not None or not len(held):
        return False
    return _is_row(held[0])


def _is_row(item: Any) -> bool:
    """Whether some entry has no axis, or their first axes have different lengths: no batch has that."""
    entries = list(item.values()) if isinstance(item, Mapping) else item if isinstance(item, (tuple, list)) else []
    shapes = [shape_of(entry) for entry in entries]
    scalar = any(isinstance(entry, (Number, str)) or shape == () for entry, shape in zip(entries, shapes, strict=True))
    return scalar or len({shape[0] for shape in shapes if shape}) > 1


def is_tensor_dataset(held: Any, count: int = 2) -> bool:
    """Whether it is torch's data set of so many tensors, side by side; of two it is what `(x, y)` is."""
    kind = type(held)
    if (kind.__module__, kind.__name__) != ("torch.utils.data.dataset", "TensorDataset"):
        return False
    return len(held.tensors) == count
