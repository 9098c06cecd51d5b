"""One fit by any number of workers that see one folder: the same bytes whoever computes what.

1. Rows are cut into tiles at fixed positions. A worker computes the tiles of its share, then those that nobody is at.
2. Parts are merged in the order of the rows, by a tree that depends on their number alone. So a fit of one worker, of
   three, and one that was killed and called again are equal to the last bit.
3. There is no coordinator and no barrier: whoever lacks a part waits for it, or computes it when its worker is dead.

Each worker reads the whole loader; what it saves is the work on the rows.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from headwater.arrays import Array, as_like, dtype_named, is_array, to_numpy
from headwater.errors import BatchMismatch, DamagedFile, InvalidSetting
from headwater.loaders.keys import REMEDY
from headwater.rows import PlacedBatch, Read, Visitor, fold
from headwater.store.parts import PartStore
from headwater.store.seal import digest

ROWS = 4096
"""Of a tile, about: a tile ends with the batch that fills it."""
POLL = 0.2
"""Seconds between two looks for what others compute."""


def check_worker(worker: tuple[int, int]) -> None:
    """Errors: InvalidSetting unless it is (number, count)."""
    number, count = worker
    if not 0 <= number < count:
        raise InvalidSetting(f"worker is {worker}; expected (number, count), with the number from 0 to count - 1.")


@dataclass(frozen=True)
class Tile:
    """Some batches of a pass: the name of their part, and a digest of their rows and of those of earlier passes."""

    name: str
    rows: str


class SharedFolder:
    """A runner whose parts are in a folder. worker: (its number from 0, how many there are).

    like: some array of the model's, for what is read. Errors: InvalidSetting; as `PartStore`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        identity: Mapping[str, Any],
        like: Array,
        worker: tuple[int, int] = (0, 1),
        rows: int = ROWS,
    ):
        check_worker(worker)
        self.store, self.like, self.worker, self.rows = PartStore(path, identity), like, worker, rows
        self._before = ""

    def __call__(self, visitor: Visitor[Any, Any, Any], read: Read, label: str) -> Any:
        """The part of all rows. A visitor whose parts cannot be kept is run by every worker for itself."""
        if not visitor.is_shareable:
            return fold(visitor, read())
        if label.startswith("0-"):
            self._before = ""
        label = f"{label}-{type(visitor).__name__.strip('_')}"
        tiles = self._visit(visitor, read, label, self._is_mine)
        computed: Counter[int] = Counter()
        while missing := {k for k, tile in enumerate(tiles) if self.store.read(tile.name, tile.rows) is None}:
            if self._are_disputed(computed):
                raise BatchMismatch(f"{self.store.path}: another worker reads other rows than this one. {REMEDY}")
            if any(self.store.is_free(tiles[k].name) for k in missing):
                self._visit(visitor, read, label, lambda tile, name: tile in missing)
                computed.update(missing)
            else:
                time.sleep(POLL)
        # What a later pass computes depends on what this one found, and that on all of its rows.
        self._before = digest(self._before.encode(), *(tile.rows.encode() for tile in tiles))
        return merge_in_order(visitor.merge, (self._part(visitor, tile) for tile in tiles))

    def _is_mine(self, tile: int, name: str) -> bool:
        """Whether it is of this worker's share, and not there."""
        return tile % self.worker[1] == self.worker[0] and not self.store.has(name)

    def _are_disputed(self, computed: Counter[int]) -> bool:
        """Whether a part was overwritten again and again."""
        return max(computed.values(), default=0) > 3

    def _visit(
        self, visitor: Visitor[Any, Any, Any], read: Read, label: str, mine: Callable[[int, str], bool]
    ) -> list[Tile]:
        """One pass; the tiles that are `mine`, and that nobody else is at, are computed."""
        found = []
        for k, (tile, group) in enumerate(groupby(read(), key=lambda batch: batch.start // self.rows)):
            name, keys = f"{label}/{tile}", list[bytes]()
            batches = _noted(group, keys)
            claimed = mine(k, name) and self.store.claim(name)
            try:
                part = self._computed(visitor, batches) if claimed else None
                for _ in batches:  # read to the end, for the keys
                    pass
                found.append(Tile(name, digest(self._before.encode(), *keys)))
                if part is not None:
                    self.store.write(name, found[-1].rows, part)
            finally:
                if claimed:
                    self.store.release(name)
        return found

    def _computed(self, visitor: Visitor[Any, Any, Any], batches: Iterator[PlacedBatch]) -> dict[str, Any]:
        begun = time.monotonic()
        values = {each: _on_host(value) for each, value in visitor.pack(fold(visitor, batches)).items()}
        self.store.took(time.monotonic() - begun)
        return values

    def _part(self, visitor: Visitor[Any, Any, Any], tile: Tile) -> Any:
        values = self.store.read(tile.name, tile.rows)
        if values is None:
            raise DamagedFile(f"The part {tile.name} in {self.store.path} is gone. Call again.")
        return visitor.unpack({name: self._beside(value) for name, value in values.items()})

    def _beside(self, value: Any) -> Any:
        """A host array as one of the model's framework."""
        return as_like(value, self.like, dtype_named(str(value.dtype), self.like)) if is_array(value) else value


def merge_in_order(merge: Callable[[Any, Any], Any], parts: Iterable[object]) -> Any:
    """Neighbours first, then the pairs of these, and so on: a tree that the number of parts decides.

    At most one part for each level of the tree is held.
    """
    held: list[tuple[int, Any]] = []
    for part in parts:
        level = 0
        while held and held[-1][0] == level:
            part, level = merge(held.pop()[1], part), level + 1
        held.append((level, part))
    while len(held) > 1:
        (_, later), (level, earlier) = held.pop(), held.pop()
        held.append((level, merge(earlier, later)))
    return held[0][1]


def _noted(batches: Iterable[PlacedBatch], keys: list[bytes]) -> Iterator[PlacedBatch]:
    for batch in batches:
        keys.append(b"" if batch.keys is None else batch.keys.weighted.tobytes())
        yield batch


def _on_host(value: Any) -> Any:
    if is_array(value):
        return to_numpy(value)
    return value if isinstance(value, int) else float(value)
