"""The rows of a data set, and the one loop over them.

A pass takes a visitor: what it makes of some rows, how two such parts become one, and what the whole means. `sweep`
reads the loader, and is the only loop over one that computes anything; a runner decides which batches are visited
where.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar
from zlib import crc32

import numpy as np

from headwater.arrays import Array, is_array, to_numpy
from headwater.errors import BatchMismatch, HeadwaterError
from headwater.gradients.provider import BlockGradients, StructuredGradientProvider
from headwater.loaders.batches import as_batch, check_loader
from headwater.loaders.forms import Cut
from headwater.loaders.frames import as_ids
from headwater.loaders.keys import RowKeys, RowMemory
from headwater.loaders.places import JoinedPlace, Place, here, move_to, raise_at
from headwater.progress import track
from headwater.types import Batch, join

Item = TypeVar("Item")
Part = TypeVar("Part")
Found = TypeVar("Found")
OtherPart = TypeVar("OtherPart")
OtherFound = TypeVar("OtherFound")

FEW = 256
"""Rows up to which batches are joined: below, what a call of a model costs by itself is most of its cost.

What a provider takes at once bounds it: rows with large gradients are cut again. On a digits MLP in batches of 32, 256
in place of 64 saves a third of an EKFAC fit."""


@dataclass(frozen=True, eq=False)
class PlacedBatch:
    """Some rows of a pass: a batch of the loader, or a part of one that the provider takes at once."""

    batch: Any
    place: Place
    keys: RowKeys | None
    """What the rows are known by; None for a loader that is nobody's `Rows`."""
    _grads: list[tuple[StructuredGradientProvider, BlockGradients]] = field(default_factory=list)

    @property
    def start(self) -> int:
        """Position, in the loader, of the first row."""
        return self.place.start + self.place.offset

    @property
    def names(self) -> np.ndarray:
        """What the rows are called: their ids, or their positions in the loader. [n]"""
        ids = self.batch.ids
        if ids is None:
            return np.arange(self.start, self.start + len(self.batch))
        if isinstance(ids, (list, tuple)) and any(isinstance(each, str) for each in ids):
            return as_ids(ids, "ids")
        return np.asarray(to_numpy(ids) if is_array(ids) else ids)

    @property
    def is_kept(self) -> bool:
        """Whether the rows come from a store of gradients, and not from a loader."""
        return False

    def whole_keys(self, provider: StructuredGradientProvider) -> np.ndarray:
        """Of all that is said of the rows: uint64 [n]."""
        keys = RowKeys.of(provider, self.batch) if self.keys is None else self.keys
        return keys.whole

    def unweighted_grads(self, provider: StructuredGradientProvider) -> BlockGradients:
        """Gradients of the rows, each with the weight of one."""
        return provider.grads(self.batch, weighted=False)

    def self_grads(self, provider: StructuredGradientProvider) -> BlockGradients:
        """As the provider's."""
        return provider.self_grads(self.batch)

    def scores(self, queries: Any, provider: StructuredGradientProvider, by_block: bool) -> list[Array]:
        """Scores of `mapper.Queries` on the rows, [q, n]: of each block, or terms that sum to those of all."""
        self._grads[:] = [(provider, queries.as_met(self.grads(provider)))]
        return list(queries.scores(self._grads[0][1]).values())

    def take(self, rows: slice) -> PlacedBatch:
        """Some of the rows, one after the other."""
        place = replace(self.place, offset=self.place.offset + rows.start)
        return PlacedBatch(self.batch.take(rows), place, None if self.keys is None else self.keys.take(rows))

    def grads(self, provider: StructuredGradientProvider) -> BlockGradients:
        """The rows' weighted gradients: of several visitors that ask, the first computes them."""
        # One entry: visitors of one pass ask for one provider's gradients, and these are large.
        if not self._grads or self._grads[0][0] is not provider:
            self._grads[:] = [(provider, provider.grads(self.batch))]
        return self._grads[0][1]


# Visitors -------------------------------------------------------------------------------------------------------------


class Visitor(ABC, Generic[Item, Part, Found]):
    """What a pass computes. Parts are merged in the order of the rows; what there are no rows of has no part."""

    @abstractmethod
    def of(self, item: Item) -> Part:
        """What some rows give."""

    @abstractmethod
    def merge(self, one: Part, other: Part) -> Part:
        """What these rows give and those after them; `one` may be changed."""

    def add(self, whole: Part, item: Item) -> Part:
        """`merge(whole, of(item))`, for parts that take rows in without a part between."""
        return self.merge(whole, self.of(item))

    def finish(self, whole: Part) -> Found:
        """What the part of all rows means."""
        return whole  # type: ignore[return-value]

    @property
    def is_shareable(self) -> bool:
        """Whether parts can be kept in files: `pack` and `unpack` are there."""
        return False

    def pack(self, part: Part) -> Mapping[str, Any]:
        """A part as named arrays and numbers."""
        raise NotImplementedError(f"Parts of {type(self).__name__} cannot be kept in files.")

    def unpack(self, values: Mapping[str, object]) -> Part:
        """What `pack` gave, arrays in the model's framework."""
        raise NotImplementedError(f"Parts of {type(self).__name__} cannot be kept in files.")

    def __and__(
        self, other: Visitor[Item, OtherPart, OtherFound]
    ) -> Visitor[Item, tuple[Part, OtherPart], tuple[Found, OtherFound]]:
        """Both in one pass; at each item, this one first."""
        return Both(self, other)


class Accumulator(Visitor[Item, Part, Found]):
    """A visitor whose parts are made by taking rows in: a subclass has `start` and `add`."""

    @abstractmethod
    def start(self) -> Part:
        """The part of no rows."""

    @abstractmethod
    def add(self, whole: Part, item: Item) -> Part: ...

    def of(self, item: Item) -> Part:
        return self.add(self.start(), item)


@dataclass(frozen=True, eq=False)
class Both(Visitor[Item, tuple[Part, OtherPart], tuple[Found, OtherFound]]):
    """Two visitors in one pass."""

    first: Visitor[Item, Part, Found]
    second: Visitor[Item, OtherPart, OtherFound]

    def of(self, item: Item) -> tuple[Part, OtherPart]:
        return self.first.of(item), self.second.of(item)

    def merge(self, one: tuple[Part, OtherPart], other: tuple[Part, OtherPart]) -> tuple[Part, OtherPart]:
        return self.first.merge(one[0], other[0]), self.second.merge(one[1], other[1])

    def add(self, whole: tuple[Part, OtherPart], item: Item) -> tuple[Part, OtherPart]:
        return self.first.add(whole[0], item), self.second.add(whole[1], item)

    def finish(self, whole: tuple[Part, OtherPart]) -> tuple[Found, OtherFound]:
        return self.first.finish(whole[0]), self.second.finish(whole[1])

    @property
    def is_shareable(self) -> bool:
        return self.first.is_shareable and self.second.is_shareable

    def pack(self, part: tuple[Part, OtherPart]) -> dict[str, Any]:
        pairs = zip("12", (self.first.pack(part[0]), self.second.pack(part[1])), strict=True)
        return {f"{side}/{name}": value for side, values in pairs for name, value in values.items()}

    def unpack(self, values: Mapping[str, object]) -> tuple[Part, OtherPart]:
        own, others = (
            {name.removeprefix(f"{side}/"): v for name, v in values.items() if name.startswith(f"{side}/")}
            for side in "12"
        )
        return self.first.unpack(own), self.second.unpack(others)


@dataclass(frozen=True, eq=False)
class Each(Visitor[Item, list[Found], list[Found]]):
    """A list of what a function makes of each item."""

    make: Callable[[Item], Found]

    def of(self, item: Item) -> list[Found]:
        return [self.make(item)]

    def merge(self, one: list[Found], other: list[Found]) -> list[Found]:
        one.extend(other)
        return one


@dataclass(frozen=True, eq=False)
class Total(Visitor[Item, Found, Found]):
    """The sum of what a function makes of each item."""

    make: Callable[[Item], Found]

    def of(self, item: Item) -> Found:
        return self.make(item)

    def merge(self, one: Found, other: Found) -> Found:
        return one + other  # type: ignore[operator]

    @property
    def is_shareable(self) -> bool:
        return True

    def pack(self, part: Found) -> dict[str, Any]:
        return {"total": part}

    def unpack(self, values: Mapping[str, Any]) -> Found:
        found: Found = values["total"]
        return found


# Runners --------------------------------------------------------------------------------------------------------------

Read = Callable[[], Iterator[PlacedBatch]]
"""Begins a pass over the rows."""
Runner = Callable[[Visitor[Any, Any, Any], Read, str], Any]
"""Visits rows: (visitor, read, label) -> the part of all of them.

`sweep` makes of that part what the visitor finds (`finish`). label: a name of the pass, the same in every process: its
number over these rows, from 0, and the form of the provider's gradients.
"""


def serial(visitor: Visitor[PlacedBatch, Part, Found], read: Read, label: str) -> Part:
    """A runner: one batch after the other, in this process."""
    return fold(visitor, read())


def fold(visitor: Visitor[Item, Part, Found], items: Iterable[Item]) -> Part:
    """The part of all items, one after the other. Errors: BatchMismatch for none."""
    whole: list[Part] = []
    for item in items:
        # A list, as a part may itself be None or False.
        whole = [visitor.add(whole[0], item) if whole else visitor.of(item)]
    if not whole:
        raise BatchMismatch("A pass met no rows.")
    return whole[0]


# Rows -----------------------------------------------------------------------------------------------------------------


class Rows(Iterable[Any]):
    """A loader, for one fit or run: every pass over it meets the same rows, or is refused.

    role: "train" or "query". memory: of what the same loader gave before, if it was read before. runner: of every pass
    over it, which it is told the number of (`passes`); None for `serial`. tile: no piece of a pass has rows on both
    sides of a multiple of it; None where there are no tiles.
    """

    def __init__(
        self,
        provider: StructuredGradientProvider,
        source: Iterable[object],
        role: str = "train",
        memory: RowMemory | None = None,
        runner: Runner | None = None,
        tile: int | None = None,
    ):
        self.provider, self.source, self.role, self.runner, self.tile = provider, source, role, runner, tile
        self.passes = 0
        self.memory = RowMemory() if memory is None else memory

    @classmethod
    def of(cls, provider: StructuredGradientProvider, loader: Iterable[object], role: str = "train") -> Rows:
        """The loader, if it is one of these already, or as one."""
        if isinstance(loader, Rows):
            return loader
        check_loader(loader, role)
        return cls(provider, loader, role)

    def __iter__(self) -> Iterator[Any]:
        """The loader's items as they are, compared on their way: for who makes other batches of them."""
        start, found = 0, []
        for number, item in enumerate(self.source):
            batch = _placed_batch(self.provider, item, Place(self.role, number, start))
            if batch is not None:
                found.append(self.compared(self.provider, batch, Place(self.role, number, start, len(batch))))
                start += len(batch)
            yield item
        if found:
            self.memory.end(found, self.role)

    @property
    def is_kept(self) -> bool:
        """Whether they come from a store of gradients, and not from a loader."""
        return False

    def pieces(self, what: str, show: bool) -> Iterator[PlacedBatch] | None:
        """The rows as they are kept, in place of reading `source`; None for those that are read."""
        return None

    def compared(self, provider: StructuredGradientProvider, batch: Batch, place: Place) -> RowKeys:
        """The keys of a batch's rows. Errors: BatchMismatch where they are not those of an earlier pass."""
        keys = RowKeys.of(provider, batch)
        self.memory.compare(keys, place)
        return keys

    def count(self) -> int:
        """How many rows there are: known, or counted by reading the loader once, without the model."""
        return self.memory.rows or sum(len(batch) for _, batch in _whole_batches(self.provider, self.source, self.role))

    def glance(self) -> None:
        """Look at the first rows, so that a loader that shuffles is noticed when they come again.

        A built-in collection does not shuffle, nor do arrays, and a loader that was read before is compared with that.
        """
        check_loader(self.source, self.role)
        if self.memory.is_empty and not isinstance(self.source, (list, tuple, Cut)):
            # One batch suffices: a loader that shuffles rarely gives the same first batch twice.
            first = next(_whole_batches(self.provider, self.source, self.role), None)
            if first is not None and (keys := RowKeys.of(self.provider, first[1])).ids is None:
                self.memory.expect(keys)


class KeptTrainRows(ABC):
    """Gradients of train rows that were kept: they stand for the loader in a run."""

    @abstractmethod
    def train_rows(self, influence: Any) -> Rows:
        """The rows, for a run of this influence. Errors: InvalidInput where they are of another."""

    @abstractmethod
    def rows_to_fit(self, influence: Any, memory: RowMemory) -> tuple[StructuredGradientProvider, Rows]:
        """What a fit of this influence reads of them, and the rows; memory: of those that they have to be, if any.

        Errors: InvalidInput where they are of another; InvalidSetting where the method needs more than was kept.
        """


class KeptQueryRows(ABC):
    """Factors of query rows that were kept: they stand for the loader in a run."""

    @abstractmethod
    def query_rows(self, influence: Any) -> Iterable[object]:
        """The rows, for a run of this influence. Errors: InvalidInput where they are of another."""


def sweep(
    provider: StructuredGradientProvider,
    loader: Iterable[object],
    visitor: Visitor[PlacedBatch, Part, Found],
    what: str,
    show: bool = False,
) -> Found:
    """Visit a loader's rows once: as the framework's batches, empty ones left out, small ones joined where they fit
    together, large ones cut to what is taken at once. what: the name of the pass on a progress bar, which `show` draws.

    Errors: InvalidInput for what is no loader, can be read only once, or gives an item that is no batch; BatchMismatch
    for a loader without rows, and for `Rows` that are others than in an earlier pass; the visitor's own.
    """
    # The runner belongs to the rows: whoever made them decides where all passes over them run.
    runner: Runner = serial
    label = ""
    if isinstance(loader, Rows) and loader.runner is not None:
        runner, label = loader.runner, f"{loader.passes}-{_form_of(provider)}"
        loader.passes += 1
    whole: Part = runner(visitor, lambda: _read(provider, loader, what, show), label)
    return visitor.finish(whole)


def _form_of(provider: StructuredGradientProvider) -> str:
    """Another one where gradients have other parts: sums of both cannot be added."""
    parts = [(name, [part.shape for part in layout.parts]) for name, layout in provider.layouts.items()]
    return f"{crc32(repr((provider.form, parts)).encode()):08x}"


def sweep_kept(
    pieces: Iterable[PlacedBatch], visitor: Visitor[PlacedBatch, Part, Found], what: str, show: bool = False
) -> Found:
    """Visit pieces that were kept from a pass; errors name their places as in a pass."""
    return visitor.finish(fold(visitor, _again(pieces, what, show)))


def first_batch(provider: StructuredGradientProvider, loader: Iterable[object]) -> Batch:
    """A look at some rows, which is no pass. Errors: as `sweep`."""
    if isinstance(loader, Rows) and (kept := loader.pieces("rows", False)) is not None:
        outer = here()
        first = next(iter(kept))
        move_to(outer)
        return first.take(slice(0, min(len(first.batch), FEW))).batch
    source = loader.source if isinstance(loader, Rows) else loader
    check_loader(source, "train")
    # Not compared and not remembered: a look must not use up what a pass will check.
    place, batch = next(_whole_batches(provider, source, "train"))
    found: Batch = next(_pieces(provider, PlacedBatch(batch, place, None))).batch
    return found


def _read(
    provider: StructuredGradientProvider, loader: Iterable[object], what: str, show: bool
) -> Iterator[PlacedBatch]:
    known = loader if isinstance(loader, Rows) else None
    kept = None if known is None else known.pieces(what, show)
    if kept is not None:
        for batch in kept:
            yield from within_tiles(batch, known.tile if known else None)
        return
    role = "train" if known is None else known.role
    source: Iterable[object] = loader if known is None else known.source
    check_loader(source, role)
    outer = here()
    # Layer rules are checked again on the first batch of every pass.
    provider.begin_pass()
    move_to(None)  # the loader's own errors are its own
    whole = _compared(provider, known, track(source, what, show), role)
    for piece in _in_step(provider, _gathered(provider, whole, None if known is None else known.tile)):
        move_to(piece.place)
        yield piece
        # Between batches the loader works, and its errors are not about the last batch.
        move_to(None)
    move_to(outer)


def _compared(
    provider: StructuredGradientProvider, known: Rows | None, source: Iterable[object], role: str
) -> Iterator[PlacedBatch]:
    """The loader's batches; before they are visited, as wrong rows must not reach a sum."""
    found = []
    for place, batch in _whole_batches(provider, source, role):
        move_to(place)  # what is asked of the provider now is about this batch
        keys = None if known is None else known.compared(provider, batch, place)
        if keys is not None:
            found.append(keys)
        move_to(None)
        yield PlacedBatch(batch, place, keys)
    if known is not None and found:
        # Only at the end of a whole pass: one that was broken off says nothing of how many rows there are.
        known.memory.end(found, role)


def _gathered(
    provider: StructuredGradientProvider, batches: Iterable[PlacedBatch], tile: int | None
) -> Iterator[PlacedBatch]:
    """Pieces to visit: a model's call for each row would be most of the cost, and a large batch may not fit."""
    held: list[PlacedBatch] = []
    count = 0
    for batch in batches:
        for part in within_tiles(batch, tile):
            rows = len(part.batch)
            if held and (rows >= FEW or (tile is not None and part.start % tile == 0)):
                yield from _joined(provider, held)
                held, count = [], 0
            if rows >= FEW:
                yield from _pieces(provider, part)
                continue
            held, count = [*held, part], count + rows
            if count >= FEW:
                yield from _joined(provider, held)
                held, count = [], 0
    yield from _joined(provider, held)


def within_tiles(batch: PlacedBatch, tile: int | None) -> Iterator[PlacedBatch]:
    """The rows, cut at the multiples of `tile`."""
    rows = len(batch.batch)
    if tile is None or batch.start % tile + rows <= tile:
        yield batch
        return
    start = 0
    while start < rows:
        stop = min(rows, start + tile - (batch.start + start) % tile)
        yield batch.take(slice(start, stop))
        start = stop


def _joined(provider: StructuredGradientProvider, held: list[PlacedBatch]) -> Iterator[PlacedBatch]:
    batches = join([each.batch for each in held])
    if len(batches) < len(held):
        place = JoinedPlace.of([(each.place, len(each.batch)) for each in held])
        keys = [each.keys for each in held if each.keys is not None]
        held = [PlacedBatch(batches[0], place, RowKeys.joined(keys) if len(keys) == len(held) else None)]
    for each in held:
        yield from _pieces(provider, each)


def _in_step(provider: StructuredGradientProvider, pieces: Iterator[PlacedBatch]) -> Iterator[PlacedBatch]:
    """The pieces; where other processes hold parts of the model, these are told how they ended."""
    try:
        yield from pieces
    except Exception:
        with suppress(HeadwaterError):  # what the loader raised is the news
            provider.end_pass(failed=True)
        raise
    provider.end_pass()


def _again(pieces: Iterable[PlacedBatch], what: str, show: bool) -> Iterator[PlacedBatch]:
    outer = here()
    for piece in track(pieces, what, show):
        move_to(piece.place)
        yield piece
    move_to(outer)


def _whole_batches(
    provider: StructuredGradientProvider, source: Iterable[object], role: str
) -> Iterator[tuple[Place, Batch]]:
    start = 0
    for number, item in enumerate(source):
        batch = _placed_batch(provider, item, Place(role, number, start))
        if batch is not None:
            yield Place(role, number, start, len(batch)), batch
            start += len(batch)
    if not start:
        raise BatchMismatch(f"The {role} loader has no rows. A loader gives batches: one batch is [(x, y)].")


def _placed_batch(provider: StructuredGradientProvider, item: object, place: Place) -> Batch | None:
    """Errors: as `as_batch`, naming the place."""
    try:
        return as_batch(provider, item, place.start)
    except Exception as error:
        # Adds the batch's place to the message and raises; the bare raise below is for errors that it leaves alone.
        raise_at(error, place)
        raise


def _pieces(provider: StructuredGradientProvider, batch: PlacedBatch) -> Iterator[PlacedBatch]:
    """The rows as they are, or as nearly equal pieces that the provider takes at once."""
    rows = len(batch.batch)
    move_to(batch.place)
    pieces = -(-rows // max(1, provider.rows_at_once(batch.batch)))
    if pieces == 1:
        yield batch
        return
    # Nearly equal pieces, without a last one of a few rows.
    step = -(-rows // pieces)
    for start in range(0, rows, step):
        yield batch.take(slice(start, min(start + step, rows)))
