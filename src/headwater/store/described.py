"""What rows are: the user's table, data set or function, looked up by what the rows are called.

Scores know rows by their ids. What the user knows of them (labels, sources, images, texts) is in a DataFrame, a data
set or a function. `Described.of` finds the entry of each row:

    DataFrame                     by its index, if that has all ids; else row by row, if it has as many rows
    mapping                       from ids to entries, if it has all ids; else of columns, row by row
    (x, y), a list of batches     row by row, as a loader gives them
    data set, sequence, array     entry k is that of the row whose id is the number k, else of the k-th row
    function                      of an id
"""

from __future__ import annotations

import datetime
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from headwater.arrays import Numbered, described, is_array, is_frame, to_numpy
from headwater.errors import InvalidInput

SCALARS = (bool, int, float, str, np.generic, datetime.date, datetime.timedelta)
LABEL, TEXT, VALUE = "label", "text", "value"
"""What the second of a pair is called among columns, and an entry that is text, or a number."""


class Described(ABC):
    """The entries of some rows. place: where a row's id is among those that were given."""

    def __init__(self, ids: np.ndarray):
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    @abstractmethod
    def item(self, place: int) -> Any:
        """The row's entry: a dict of a table's row, what a data set has, what the function gave."""

    def columns(self) -> dict[str, np.ndarray]:
        """What is one number, word or date for each row, by name: [n] each. All entries are read."""
        found: dict[str, list[Any]] = {}
        for place in range(len(self)):
            for name, value in _scalars(self.item(place)).items():
                found.setdefault(name, [None] * place).append(value)
            for values in found.values():
                values.extend([None] * (place + 1 - len(values)))
        return {name: as_column(values) for name, values in found.items()}

    @classmethod
    def of(cls, given: Any, ids: np.ndarray, what: str = "rows") -> Described:
        """Errors: InvalidInput for what is none of these, or does not have the rows."""
        if is_frame(given):
            return _Framed(given, ids, what)
        if isinstance(given, Mapping):
            return _of_mapping(given, ids, what)
        if isinstance(given, tuple) and len(given) == 2 and all(_is_column(part) for part in given):
            return _Paired(given, ids, what)
        if isinstance(given, (str, bytes)):
            raise InvalidInput(f"{what} is one {type(given).__name__}, {given!r:.60}; expected {EXPECTED}.")
        if is_array(given) or isinstance(given, (Sequence, Numbered)):
            return _of_sequence(given, ids, what)
        if callable(given):
            return _Called(given, ids, what)
        if isinstance(given, Iterable):
            raise InvalidInput(
                f"{what} is {described(given)}, whose rows cannot be looked up. Give the data set that it reads "
                "(loader.dataset), or a function of a row's id."
            )
        raise InvalidInput(f"{what} is {described(given)}; expected {EXPECTED}.")


EXPECTED = "a DataFrame, columns by name, a data set, or a function of a row's id"


class _Framed(Described):
    """A DataFrame, or a column of one."""

    def __init__(self, frame: Any, ids: np.ndarray, what: str):
        super().__init__(ids)
        self.frame = frame.to_frame(str(frame.name or VALUE)) if len(frame.shape) == 1 else frame
        self.places = self._places(what)

    def _places(self, what: str) -> np.ndarray:
        index = self.frame.index
        if index.is_unique:
            # Ids that came through a store are NumPy's; of an index of dates or pairs they are its words.
            for names in (index, index.map(str)):
                found = names.get_indexer(self.ids) if names.is_unique else np.full(len(self), -1)
                if (found >= 0).all():
                    return found
        return _in_order(len(self.frame), self.ids, what, "its index does not have them")

    def item(self, place: int) -> dict[str, Any]:
        row = self.frame.iloc[int(self.places[place])]
        return {str(name): value for name, value in row.items()}

    def columns(self) -> dict[str, np.ndarray]:
        chosen = self.frame.iloc[self.places]
        return {str(name): as_column(chosen[name].tolist()) for name in chosen.columns if _plain(chosen[name])}


class _Listed(Described):
    """Entries by number."""

    def __init__(self, entries: Any, ids: np.ndarray, places: np.ndarray):
        super().__init__(ids)
        self.entries, self.places = entries, places

    def item(self, place: int) -> Any:
        return self.entries[int(self.places[place])]


class _Paired(Described):
    """Arrays of inputs and labels."""

    def __init__(self, pair: tuple[Any, Any], ids: np.ndarray, what: str):
        super().__init__(ids)
        lengths = [len(part) for part in pair]
        if lengths[0] != lengths[1]:
            raise InvalidInput(f"{what} has {lengths[0]} inputs and {lengths[1]} labels.")
        self.parts = [Described.of(part, ids, what) for part in pair]

    def item(self, place: int) -> tuple[Any, Any]:
        x, y = (part.item(place) for part in self.parts)
        return x, next(iter(y.values())) if isinstance(y, dict) and len(y) == 1 else y


class _Columns(Described):
    """Columns by name."""

    def __init__(self, given: Mapping[Any, Any], ids: np.ndarray, what: str):
        super().__init__(ids)
        self.parts = {str(name): Described.of(column, ids, f"{what}[{name!r}]") for name, column in given.items()}

    def item(self, place: int) -> dict[str, Any]:
        return {name: part.item(place) for name, part in self.parts.items()}


class _Named(Described):
    """Entries by id."""

    def __init__(self, given: Mapping[Any, Any], ids: np.ndarray):
        super().__init__(ids)
        self.given, self.names = given, ids.tolist()

    def item(self, place: int) -> Any:
        return self.given[self.names[place]]


class _Batched(Described):
    """A list of batches (x, y), whose rows are the rows in order."""

    def __init__(self, batches: Sequence[Any], ids: np.ndarray, sizes: list[int], what: str):
        super().__init__(ids)
        self.batches, self.ends = batches, np.cumsum(sizes)
        self.places = _by_number(int(self.ends[-1]), ids, what)

    def item(self, place: int) -> Any:
        number = int(self.places[place])
        batch = int(np.searchsorted(self.ends, number, side="right"))
        start = int(self.ends[batch - 1]) if batch else 0
        return tuple(part[number - start] for part in self.batches[batch])


class _Called(Described):
    """A function of an id."""

    def __init__(self, function: Callable[[Any], Any], ids: np.ndarray, what: str):
        super().__init__(ids)
        self.function, self.names, self.what = function, ids.tolist(), what

    def item(self, place: int) -> Any:
        try:
            return self.function(self.names[place])
        except Exception as error:
            raise InvalidInput(
                f"{self.what}= failed for row {self.names[place]!r}: {type(error).__name__}: {error}"
            ) from error


def _of_mapping(given: Mapping[Any, Any], ids: np.ndarray, what: str) -> Described:
    if all(name in given for name in ids.tolist()):
        return _Named(given, ids)
    if not given or not all(_is_column(column) for column in given.values()):
        missing = next(name for name in ids.tolist() if name not in given)
        raise InvalidInput(f"{what} has no entry for row {missing!r}, and is no mapping of columns, either.")
    return _Columns(given, ids, what)


def _of_sequence(given: Any, ids: np.ndarray, what: str) -> Described:
    if isinstance(given, (list, tuple)) and given and len(given) != len(ids):
        sizes = [len(batch[0]) for batch in given if _is_batch(batch)]
        if len(sizes) == len(given):
            return _Batched(given, ids, sizes, what)
    return _Listed(given, ids, _by_number(len(given), ids, what))


def _is_batch(item: Any) -> bool:
    return isinstance(item, (tuple, list)) and len(item) > 1 and all(is_array(part) and part.shape for part in item)


def _is_column(value: Any) -> bool:
    return is_frame(value) or (is_array(value) and bool(value.shape)) or isinstance(value, list)


def _by_number(count: int, ids: np.ndarray, what: str) -> np.ndarray:
    """Where the entry of each row is. Errors: InvalidInput for another number of entries."""
    if ids.dtype.kind in "iu" and (not len(ids) or (ids.min() >= 0 and ids.max() < count)):
        return ids
    return _in_order(count, ids, what, "entries are found by number")


def _in_order(count: int, ids: np.ndarray, what: str, why: str) -> np.ndarray:
    if count != len(ids):
        raise InvalidInput(
            f"{what} has {count} entries for {len(ids)} rows, which are called {ids[0].item()!r}, ...: {why}. Give a "
            "DataFrame with these ids as its index, or a function of an id."
        )
    return np.arange(count)


# Columns --------------------------------------------------------------------------------------------------------------


def _scalars(item: Any) -> dict[str, Any]:
    """Of one row's entry: what is one value, by name."""
    if isinstance(item, Mapping):
        found = {str(name): value for name, value in item.items()}
    elif isinstance(item, tuple) and len(item) > 1:
        found = {LABEL: item[1], **({TEXT: item[0]} if isinstance(item[0], str) else {})}
    else:
        found = {TEXT if isinstance(item, str) else VALUE: item}
    return {name: as_scalar(value) for name, value in found.items() if _is_scalar(value)}


def _is_scalar(value: Any) -> bool:
    return value is None or isinstance(value, SCALARS) or (is_array(value) and not value.shape)


def _plain(column: Any) -> bool:
    """Whether all of a DataFrame's column are single values."""
    return column.dtype.kind != "O" or all(_is_scalar(value) for value in column)


def as_scalar(value: Any) -> Any:
    """As Python has it: of an array without axes its number."""
    if is_array(value):
        value = to_numpy(value)[()]
    return value.item() if isinstance(value, np.generic) and value.dtype.kind in "biufSU" else value


def as_column(values: Sequence[Any]) -> np.ndarray:
    """[n]: of one kind; None is NaN among numbers, and no word among words."""
    kinds = {type(value) for value in values if value is not None}
    if kinds and kinds <= {bool}:
        return np.array([value if value is not None else False for value in values])
    if kinds and kinds <= {bool, int} and None not in values:
        return np.array(values)
    if kinds <= {bool, int, float}:
        return np.array([np.nan if value is None else value for value in values], dtype=float)
    return np.array(["" if value is None else str(value) for value in values], dtype=str)
