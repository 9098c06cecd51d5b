"""What a loader gave when it was read first: keys of its rows, which later passes are compared with.

1. Every number is a mean or a sum over rows: passes that do not see the same rows make it a wrong number, silently.
   So the keys of all rows are kept, 8 bytes each, and compared in every later pass, batch by batch.
2. A row without an id is known by its position: the same row must come at the same place, whatever the batches.
3. A row with an id may come at any place. It is known by its content; or by its id where its shape is another one than
   at first, since rows of tokens are padded to the longest of their batch.
4. Weights belong to a row within a fit, and not to the question whether a row was fitted.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from headwater.arrays import to_numpy
from headwater.errors import BatchMismatch
from headwater.gradients.provider import StructuredGradientProvider
from headwater.loaders.places import Place
from headwater.random import name_keys, row_digests
from headwater.types import Batch


@dataclass(frozen=True, eq=False)
class RowKeys:
    """64-bit keys of a batch's rows: uint64 [n] each."""

    content: np.ndarray
    """Of inputs and targets alone."""
    weighted: np.ndarray
    """Of these and the row's weight."""
    ids: np.ndarray | None
    """Of the rows' ids, if they have any."""
    shaped: np.ndarray | None
    """Of an id together with the shape of its row."""

    @classmethod
    def of(cls, provider: StructuredGradientProvider, batch: Batch) -> RowKeys:
        ids, weights = batch.ids, batch.weights
        # Content without id and weight: a row that was fitted with another weight is still that row.
        apart = {name: None for name, column in (("ids", ids), ("weights", weights)) if column is not None}
        bare = replace(batch, **apart) if apart else batch
        content = weighted = provider.content_keys(bare)
        if weights is not None:
            counted: Any = provider.row_weights(batch)
            weighted = row_digests([content, np.asarray(to_numpy(counted), dtype=np.float64)])
        if ids is None:
            return cls(content, weighted, None, None)
        names = provider.row_keys(batch)
        shape = name_keys([_shapes(batch.x), _shapes(batch.y)])
        # Id and shape together: an id counts only where padding may have changed the content.
        shaped = row_digests([names, *(np.broadcast_to(key, len(names)) for key in shape)])
        return cls(content, weighted, row_digests([names]), shaped)

    def __len__(self) -> int:
        return len(self.content)

    @property
    def whole(self) -> np.ndarray:
        """Of everything that is said of a row: content, weight and id."""
        return self.weighted if self.ids is None else row_digests([self.weighted, self.ids])

    @property
    def names(self) -> np.ndarray:
        """What a row is called from pass to pass."""
        return self.weighted if self.ids is None else self.ids

    @property
    def fitted(self) -> np.ndarray:
        """All that a row can be known by: [n], or [3 n] where there are ids."""
        return self.content if self.ids is None else np.concatenate([self.content, self.ids, self.shaped])

    def take(self, rows: slice | np.ndarray) -> RowKeys:
        ids, shaped = (None if keys is None else keys[rows] for keys in (self.ids, self.shaped))
        return RowKeys(self.content[rows], self.weighted[rows], ids, shaped)

    @classmethod
    def joined(cls, pieces: Sequence[RowKeys]) -> RowKeys:
        """Of the rows of several batches, either all with ids or all without."""
        content = np.concatenate([k.content for k in pieces])
        weighted = np.concatenate([k.weighted for k in pieces])
        named = [(k.ids, k.shaped) for k in pieces if k.ids is not None and k.shaped is not None]
        if not named:
            return cls(content, weighted, None, None)
        ids, shaped = (np.concatenate(found) for found in zip(*named, strict=True))
        return cls(content, weighted, ids, shaped)

    def among(self, known: np.ndarray) -> np.ndarray:
        """Whether each row is one of those whose `fitted` keys, sorted, are known: bool [n]."""
        found = is_among(self.content, known)
        # Same id, same shape, other content: the row has changed, and its id is no excuse.
        return found if self.ids is None else found | (is_among(self.ids, known) & ~is_among(self.shaped, known))


def is_among(keys: np.ndarray | None, known: np.ndarray) -> np.ndarray:
    """Whether each key is in a sorted array: bool [n]."""
    assert keys is not None
    if not len(known):
        return np.zeros(len(keys), dtype=bool)
    # A key above all known ones would be looked up past the end.
    place = np.minimum(np.searchsorted(known, keys), len(known) - 1)
    return known[place] == keys


def _shapes(value: Any) -> str:
    """The shapes of single rows, in words."""
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{name}: {_shapes(v)}' for name, v in value.items())}}}"
    if isinstance(value, tuple):
        return f"({', '.join(map(_shapes, value))})"
    return str(tuple(np.shape(value))[1:])


class RowMemory:
    """Keys of the rows that one loader gave, from the first time that it was read to its end."""

    def __init__(self, fitted: np.ndarray | None = None):
        self._saved = fitted
        """Sorted keys of a fit that was saved: which rows, and not in which order."""
        self._names = np.empty(0, dtype=np.uint64)
        self._known = np.empty(0, dtype=np.uint64)
        self.is_complete = False

    @property
    def is_empty(self) -> bool:
        return not len(self._names)

    @property
    def rows(self) -> int | None:
        """How many there are; None before the loader was read to its end."""
        return len(self._names) if self.is_complete else None

    @property
    def fitted(self) -> np.ndarray | None:
        """Sorted keys of all rows; None before the loader was read to its end."""
        return self._known if self.is_complete else self._saved

    def expect(self, keys: RowKeys) -> None:
        """These rows come first."""
        self._names = keys.names

    def compare(self, keys: RowKeys, place: Place) -> None:
        """Errors: BatchMismatch, naming the first row that is not the one of an earlier pass."""
        if keys.ids is None:
            expected = self._names[place.start : place.start + len(keys)]
            # In a first pass only the rows glanced at are expected; what comes after has nothing to be compared with.
            same = keys.names[: len(expected)] == expected
            # More rows than the whole loader had.
            if self.is_complete and len(expected) < len(keys):
                same = np.append(same, False)
        elif self.is_complete:
            same = keys.among(self._known)
        else:
            same = np.empty(0, dtype=bool)
        if same.all() and self._saved is not None and not self.is_complete:
            same = keys.among(self._saved)
        if not same.all():
            row = int(np.argmin(same))
            error = BatchMismatch(f"{place.row(row)}: {self._why(keys, place, row)} {REMEDY}")
            # The message names the place already; the pass must not add it again.
            error.placed = True
            raise error

    def _why(self, keys: RowKeys, place: Place, row: int) -> str:
        if self._saved is not None and not self.is_complete:
            return "the loader gives other rows than those that were fitted and saved."
        if keys.ids is not None:
            return "the loader gives other rows each time it is read: this one was not there before, or has changed."
        if self.is_complete and place.start + row >= len(self._names):
            return (
                f"the loader gives other rows each time it is read: it had {len(self._names)} rows before, now more. "
                "If rows were added on purpose, make a new loader of them, and fit it if they are to be train rows."
            )
        before = np.flatnonzero(self._names == keys.names[row])
        said = f"this one was row {before[0]} before (it shuffles)." if len(before) else "it shuffles, or changes them."
        return f"the loader gives other rows each time it is read: {said}"

    def end(self, keys: list[RowKeys], role: str) -> None:
        """A pass has come to its end. Errors: BatchMismatch for fewer rows than in an earlier one, or others."""
        names = np.concatenate([key.names for key in keys])
        if self.is_complete:
            # A sum modulo 2^64, whatever the order: rows with ids may come twice in place of another, and the count
            # stays.
            if len(names) != len(self._names) or names.sum(dtype=np.uint64) != self._names.sum(dtype=np.uint64):
                raise BatchMismatch(
                    f"The {role} loader gives other rows each time it is read: it had {len(self._names)} before, and "
                    f"{len(names)} this time, not each of them once. {REMEDY}"
                )
            return
        found = np.sort(np.concatenate([key.fitted for key in keys]))
        if self._saved is not None and len(found) != len(self._saved):
            raise BatchMismatch(
                f"The {role} loader gives other rows than those that were fitted and saved: {len(names)} of them, and "
                "others were fitted too."
            )
        self._names, self._known, self.is_complete = names, found, True


REMEDY = (
    "Every pass needs the same rows: pass shuffle=False and no random augmentation; or, where only the order changes, "
    "batches with ids, such as unpack=lambda batch: (x, y, ids) makes of a data set's items that have a third entry."
)


class LoadersSeen:
    """What each loader gave, for as long as somebody holds the loader."""

    def __init__(self) -> None:
        self._seen: list[tuple[list[Callable[[], Any]], RowMemory]] = []

    def memory(self, loader: object) -> RowMemory:
        """Of this very object, or of a tuple of these very objects, such as (x, y).

        Lists and other built-in collections have a new one each time: they do not shuffle.
        """
        # Identity of an object is good as long as it lives: its address may be another loader's afterwards.
        self._seen = [(there, memory) for there, memory in self._seen if all(part() is not None for part in there)]
        parts = _parts(loader)
        for there, memory in self._seen:
            if len(there) == len(parts) and all(map(_is_known, there, parts)):
                return memory
        return self.keep(loader, RowMemory())

    def keep(self, loader: object, memory: RowMemory) -> RowMemory:
        parts = _parts(loader)
        with suppress(TypeError):  # built-in collections cannot be referred to weakly
            self._seen.append(([_reference(part) for part in parts], memory))
        return memory


def _parts(loader: object) -> tuple[Any, ...]:
    return loader if type(loader) is tuple else (loader,)


def _reference(part: object) -> Callable[[], Any]:
    """To an object, for as long as it lives; to a word, such as a column's name, which is what it says."""
    return (lambda: part) if isinstance(part, str) else weakref.ref(part)


def _is_known(there: Callable[[], Any], part: object) -> bool:
    known = there()
    return known is part or (isinstance(part, str) and isinstance(known, str) and known == part)
