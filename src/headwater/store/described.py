"""What rows are: the user's table, data set or function, looked up by what the rows are called.

Scores know rows by their ids. What the user knows of them (labels, sources, images, texts) is in a DataFrame, a data
set or a function. `Described.of` finds the entry of each row:

    DataFrame                     by its index, if that has all ids; a default index is none
    mapping                       from ids to entries, if it has all ids; else of columns
    function                      of an id
    (x, y), columns, a list of    entry k is that of row k of the loader, where rows are called by their positions in
    batches, a data set, an       it. A DataFrame with names among columns finds the rows for all of them; so does a
    array, a sequence             column of names in a data set of dicts
"""

from __future__ import annotations

import datetime
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from headwater.arrays import Numbered, as_pandas, described, is_array, is_frame, to_numpy
from headwater.errors import InvalidInput

SCALARS = (bool, int, float, str, np.generic, datetime.date, datetime.timedelta)
LABEL, TEXT, VALUE = "label", "text", "value"
"""What the second of a pair is called among columns, and an entry that is text, or a number."""
NAMED = 100_000
"""Entries of a data set that are looked through for names."""
EXPECTED = "a DataFrame, columns by name, a data set, or a function of a row's id"


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
    def of(cls, given: Any, ids: np.ndarray, what: str = "rows", positions: bool = False) -> Described:
        """positions: whether ids are the rows' positions in their loader.

        Errors: InvalidInput for what is none of these, or does not have the rows.
        """
        given = as_pandas(given)
        if is_frame(given):
            return _Framed(given, ids, _places([given], ids, what, positions))
        if isinstance(given, Mapping) and all(name in given for name in ids.tolist()):
            return _Called(given.__getitem__, ids, what)
        if isinstance(given, Mapping):
            return _of_columns(given, ids, what, positions)
        if isinstance(given, tuple) and len(given) == 2 and all(_is_column(part) for part in given):
            return _Paired(given, ids, _places(given, ids, what, positions))
        if isinstance(given, (str, bytes)):
            raise InvalidInput(f"{what} is one {type(given).__name__}, {given!r:.60}; expected {EXPECTED}.")
        if is_array(given) or isinstance(given, (Sequence, Numbered)):
            return _of_sequence(given, ids, what, positions)
        if callable(given):
            return _Called(given, ids, what)
        if isinstance(given, Iterable):
            raise InvalidInput(
                f"{what} is {described(given)}, whose rows cannot be looked up. Give the data set that it reads "
                "(loader.dataset), or a function of a row's id."
            )
        raise InvalidInput(f"{what} is {described(given)}; expected {EXPECTED}.")


class _Framed(Described):
    """A DataFrame, or a column of one."""

    def __init__(self, frame: Any, ids: np.ndarray, places: np.ndarray):
        super().__init__(ids)
        named = frame.to_frame(str(frame.name or VALUE)) if len(frame.shape) == 1 else frame
        self.frame = named.iloc[places]
        # By its place: two columns may have one name.
        self.missing = self.frame.isna().to_numpy()

    def item(self, place: int) -> dict[str, Any]:
        row = zip(self.frame.columns, self.frame.iloc[place].tolist(), self.missing[place], strict=True)
        return {str(name): None if missing else value for name, value, missing in row}

    def columns(self) -> dict[str, np.ndarray]:
        found = {}
        for k, name in enumerate(self.frame.columns):
            values = self.frame.iloc[:, k].tolist()
            known = [None if missing else value for value, missing in zip(values, self.missing[:, k], strict=True)]
            if all(_is_scalar(value) for value in known):
                found[str(name)] = as_column(known)
        return found


class _Listed(Described):
    """Entries by number."""

    def __init__(self, entries: Any, ids: np.ndarray, places: np.ndarray):
        super().__init__(ids)
        self.entries, self.places = entries, places

    def item(self, place: int) -> Any:
        return self.entries[int(self.places[place])]


class _Paired(Described):
    """Inputs and labels."""

    def __init__(self, pair: tuple[Any, Any], ids: np.ndarray, places: np.ndarray):
        super().__init__(ids)
        self.parts = [_part(part, ids, places) for part in pair]

    def item(self, place: int) -> tuple[Any, Any]:
        x, y = (part.item(place) for part in self.parts)
        return x, next(iter(y.values())) if isinstance(y, dict) and len(y) == 1 else y


class _Columns(Described):
    """Columns by name."""

    def __init__(self, given: Mapping[Any, Any], ids: np.ndarray, places: np.ndarray):
        super().__init__(ids)
        self.parts = {str(name): _part(column, ids, places) for name, column in given.items()}

    def item(self, place: int) -> dict[str, Any]:
        entries = {name: part.item(place) for name, part in self.parts.items()}
        single = {name: part for name, part in entries.items() if isinstance(part, dict) and len(part) == 1}
        return {**entries, **{name: next(iter(part.values())) for name, part in single.items()}}


class _Batched(Described):
    """A list of batches (x, y), whose rows are the rows in order."""

    def __init__(self, batches: Sequence[Any], ids: np.ndarray, sizes: list[int], places: np.ndarray):
        super().__init__(ids)
        self.batches, self.ends, self.places = batches, np.cumsum(sizes), places

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


def _of_columns(given: Mapping[Any, Any], ids: np.ndarray, what: str, positions: bool) -> Described:
    if not given or not all(_is_column(column) for column in given.values()):
        missing = next(name for name in ids.tolist() if name not in given)
        raise InvalidInput(f"{what} has no entry for row {missing!r}, and is no mapping of columns, either.")
    return _Columns(given, ids, _places(list(given.values()), ids, what, positions))


def _of_sequence(given: Any, ids: np.ndarray, what: str, positions: bool) -> Described:
    if isinstance(given, (list, tuple)) and given:
        sizes = [len(batch[0]) for batch in given if _is_batch(batch)]
        if len(sizes) == len(given):
            return _Batched(given, ids, sizes, _by_number(sum(sizes), ids, what, positions))
    if not positions and 0 < len(given) <= NAMED and isinstance(given[0], Mapping):
        places = _by_names_inside(given, ids)
        if places is not None:
            return _Listed(given, ids, places)
    return _Listed(given, ids, _by_number(len(given), ids, what, positions))


def _by_names_inside(given: Any, ids: np.ndarray) -> np.ndarray | None:
    """Where the entries have a column with the rows' names: [n]; None where they have none."""
    wanted = ids.tolist()
    known = set(wanted)
    for name in [name for name, value in given[0].items() if _is_scalar(value)]:
        values = (given[k].get(name) for k in range(len(given)))
        numbers = {as_scalar(value): k for k, value in enumerate(values) if _is_scalar(value)}
        if known <= numbers.keys():
            return np.array([numbers[each] for each in wanted])
    return None


def _part(part: Any, ids: np.ndarray, places: np.ndarray) -> Described:
    return _Framed(part, ids, places) if is_frame(part) else _Listed(part, ids, places)


def _is_batch(item: Any) -> bool:
    return isinstance(item, (tuple, list)) and len(item) > 1 and all(is_array(part) and part.shape for part in item)


def _is_column(value: Any) -> bool:
    return is_frame(value) or (is_array(value) and bool(value.shape)) or isinstance(value, list)


# Where a row's entry is -----------------------------------------------------------------------------------------------


def _places(parts: Sequence[Any], ids: np.ndarray, what: str, positions: bool) -> np.ndarray:
    """In columns side by side: [n]. Errors: InvalidInput for columns of other lengths, and rows that are not there."""
    lengths = [len(part) for part in parts]
    if len(set(lengths)) > 1:
        raise InvalidInput(f"{what} has columns of {min(lengths)} and of {max(lengths)} entries.")
    # By its name: of a default index nobody meant the labels.
    given = [part.index for part in parts if is_frame(part) and type(part.index).__name__ != "RangeIndex"]
    return _by_index(given[0], ids, what) if given else _by_number(lengths[0], ids, what, positions)


def _by_index(index: Any, ids: np.ndarray, what: str) -> np.ndarray:
    if not index.is_unique:
        raise InvalidInput(f"The index of {what} has {index[index.duplicated()][0]!r} more than once.")
    # Ids that came through a store are NumPy's; of an index of dates or categories they are its words.
    places = [names.get_indexer(ids) for names in (index, index.map(str)) if names.is_unique]
    best: np.ndarray = max(places, key=lambda found: int((found >= 0).sum()))
    if (best < 0).any():
        missing = ids[int(np.argmax(best < 0))].item()
        raise InvalidInput(
            f"The index of {what} has no {missing!r}: rows are called {ids[:3].tolist()}, ..., and it has "
            f"{index[:3].tolist()}, ... Rows that are called by their positions need no index: reset_index(drop=True) "
            "takes it away."
        )
    return best


def _by_number(count: int, ids: np.ndarray, what: str, positions: bool) -> np.ndarray:
    """Errors: InvalidInput for rows that have names, and those that are not there."""
    if not positions:
        raise InvalidInput(
            f"Rows are called {ids[:3].tolist()}, ..., and {what} does not say which entry is which row's. Give a "
            "DataFrame with these names as its index, a mapping from names to entries, or a function of a name."
        )
    if len(ids) and ids.max() >= count:
        raise InvalidInput(f"{what} has {count} entries, and there is a row {ids.max()}; rows are counted from 0.")
    return ids


# Columns --------------------------------------------------------------------------------------------------------------


def _scalars(item: Any) -> dict[str, Any]:
    """Of one row's entry: what is one value, by name."""
    if isinstance(item, Mapping):
        found = {str(name): value for name, value in item.items()}
    elif isinstance(item, tuple) and len(item) > 1:
        inner = item[0] if isinstance(item[0], Mapping) else {TEXT: item[0]} if isinstance(item[0], str) else {}
        found = {LABEL: item[1], **{str(name): value for name, value in inner.items()}}
    else:
        found = {TEXT if isinstance(item, str) else VALUE: item}
    return {name: as_scalar(value) for name, value in found.items() if _is_scalar(value)}


def _is_scalar(value: Any) -> bool:
    return value is None or isinstance(value, SCALARS) or (is_array(value) and not value.shape)


def as_scalar(value: Any) -> Any:
    """As Python has it: of an array without axes its number."""
    if is_array(value):
        value = to_numpy(value)[()]
    return value.item() if isinstance(value, np.generic) and value.dtype.kind in "biufSU" else value


def as_column(values: Sequence[Any]) -> np.ndarray:
    """[n]: of one kind; None is NaN among numbers, and no word among words."""
    plain = [as_scalar(value) for value in values]
    kinds, whole = {type(value) for value in plain if value is not None}, None not in plain
    if whole and (kinds == {bool} or kinds == {int}):
        with suppress(OverflowError):  # integers beyond 64 bits are words
            return np.array(plain, dtype=bool if kinds == {bool} else np.int64)
    elif kinds and kinds <= {int, float}:
        return np.array([np.nan if value is None else value for value in plain], dtype=float)
    return np.array(["" if value is None else str(value) for value in plain], dtype=str)
