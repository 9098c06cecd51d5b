"""One fit by any number of workers that see one folder: the same bytes whoever computes what.

1. Rows are cut into tiles at fixed positions. A worker computes the tiles of its share, then those that nobody is at.
2. Parts are merged in the order of the rows, by a tree that depends on their number alone. So a fit of one worker, of
   three, and one that was killed and called again are equal to the last bit.
3. Workers take turns (`turns`): who was killed is made up for.

Each worker reads the whole loader; what it saves is the work on the rows.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

from headwater.arrays import Array, as_like, dtype_named, is_array, to_numpy
from headwater.errors import DamagedFile
from headwater.influence import ComposableInfluence
from headwater.rows import PlacedBatch, Read, Visitor, fold
from headwater.run.runners.environment import Worker
from headwater.run.runners.in_step import open_parts
from headwater.run.runners.turns import Turn, Wanted, check_worker, take_turns
from headwater.store.claims import Claims
from headwater.store.seal import digest

ROWS = 4096
"""Of a tile."""


class Parts(Protocol):
    """Where parts are kept, each under its name and a digest of the rows that it is of; see `PartStore`."""

    @property
    def path(self) -> Path: ...

    @property
    def claims(self) -> Claims: ...

    def has(self, name: str) -> bool: ...

    def read(self, name: str, rows: str) -> dict[str, Any] | None: ...

    def write(self, name: str, rows: str, values: Mapping[str, Any]) -> None: ...

    def end_pass(self, label: str, tiles: int) -> None: ...


class SharedFolder:
    """A runner whose parts are in a store. worker: (its number from 0, how many there are).

    like: some array of the model's, for what is read.
    """

    def __init__(self, store: Parts, like: Array, worker: tuple[int, int] = (0, 1)):
        self.store, self.like, self.worker = store, like, worker
        self._before = ""

    @property
    def rows(self) -> int:
        """Of a tile."""
        return ROWS

    def __call__(self, visitor: Visitor[Any, Any, Any], read: Read, label: str) -> Any:
        """The part of all rows. A visitor whose parts cannot be kept is run by every worker for itself."""
        if not visitor.is_shareable:
            return fold(visitor, read())
        if label.startswith("0-"):
            self._before = ""
        label = f"{label}-{type(visitor).__name__.strip('_')}"
        tiles = self.complete(visitor, read, label)
        self.store.end_pass(label, len(tiles))
        # What a later pass computes depends on what this one found, and that on all of its rows.
        self._before = digest(self._before.encode(), *(tile.rows.encode() for tile in tiles))
        return self.merged(visitor, tiles, label)

    def complete(self, visitor: Visitor[Any, Any, Any], read: Read, label: str) -> Sequence[Turn]:
        """The tiles of a pass, once the part of each is there."""
        return take_turns(
            lambda wanted: self._visit(visitor, read, label, wanted),
            self.store.has,
            lambda _, tile: self._is_there(tile),
            self.store.claims,
            self.worker,
            self.store.path,
        )

    def merged(self, visitor: Visitor[Any, Any, Any], tiles: Sequence[Turn], label: str) -> Any:
        """The part of all rows."""
        return merge_in_order(visitor.merge, (self._part(visitor, tile) for tile in tiles))

    def digest(self, rows: bytes) -> str:
        """What a part is computed from: the keys of its rows, and those of the passes before."""
        return digest(self._before.encode(), rows)

    def keep(self, visitor: Visitor[Any, Any, Any], name: str, rows: str, part: Any) -> None:
        """Errors: NotWritten."""
        self.store.write(name, rows, {each: on_host(value) for each, value in visitor.pack(part).items()})

    def _is_there(self, tile: Turn) -> bool:
        """Whether there is a part of these very rows."""
        return self.store.has(tile.name) and self.store.read(tile.name, tile.rows) is not None

    def _visit(
        self, visitor: Visitor[Any, Any, Any], read: Read, label: str, wanted: Wanted
    ) -> tuple[list[Turn], list[int]]:
        """One pass: all tiles, and which were computed: those that are wanted and that nobody else is at."""
        found, computed = [], []
        for k, (tile, group) in enumerate(groupby(read(), key=lambda batch: batch.start // self.rows)):
            name, keys = f"{label}/{tile}", bytearray()
            claimed = wanted(k, name) and self.store.claims.claim(name)
            batches = self._noted(group, name if claimed else None, keys)
            try:
                part = [fold(visitor, batches)] if claimed else []
                for _ in batches:  # read to the end, for the keys
                    pass
                found.append(Turn(name, self.digest(bytes(keys))))
                if part:
                    self.keep(visitor, name, found[-1].rows, part[0])
                    computed.append(k)
            finally:
                if claimed:
                    self.store.claims.release(name)
        return found, computed

    def _noted(self, batches: Iterable[PlacedBatch], mine: str | None, keys: bytearray) -> Iterator[PlacedBatch]:
        """The batches; what their rows are known by is noted. mine: the part that this worker is at, and alive."""
        for batch in batches:
            keys += rows_of(batch)
            yield batch
            if mine is not None:
                self.store.claims.touch(mine)

    def _part(self, visitor: Visitor[Any, Any, Any], tile: Turn) -> Any:
        values = self.store.read(tile.name, tile.rows)
        if values is None:
            raise DamagedFile(f"The part {tile.name} in {self.store.path} is gone. Call again.")
        return self.unpacked(visitor, values)

    def unpacked(self, visitor: Visitor[Any, Any, Any], values: Mapping[str, Any]) -> Any:
        """A part from what the store has of it."""
        return visitor.unpack({name: self._beside(value) for name, value in values.items()})

    def _beside(self, value: Any) -> Any:
        """A host array as one of the model's framework."""
        return as_like(value, self.like, dtype_named(str(value.dtype), self.like)) if is_array(value) else value


def shared_folder(
    influence: ComposableInfluence[Any],
    store: str | os.PathLike[str],
    loader: Iterable[object],
    worker: Worker = (0, 1),
) -> SharedFolder:
    """The runner of `influence.fit(loader, store=, worker=)`. Errors: as there."""
    influence.look(loader)
    known = influence.identity()
    belongs = {name: known[name] for name in ("method", "loss", "architecture", "fingerprint")}
    blocks = {name: block["parameters"] for name, block in known["blocks"].items()}
    belongs |= {"blocks": blocks, "dtype": influence.source.dtype}
    together = influence.source.together
    number = check_worker(worker, store, together)
    return SharedFolder(open_parts(store, belongs, together), influence.like(), number)


def rows_of(batch: PlacedBatch) -> bytes:
    """What its rows are known by."""
    if batch.keys is None:
        return b""
    # Labels are drawn by id: the same rows under other ids have other parts.
    return batch.keys.weighted.tobytes() + (b"" if batch.keys.ids is None else batch.keys.ids.tobytes())


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


def on_host(value: Any) -> Any:
    if is_array(value):
        return to_numpy(value)
    return value if isinstance(value, int) else float(value)
