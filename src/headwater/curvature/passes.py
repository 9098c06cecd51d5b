"""Passes over a data loader, and the one weighted accumulator of everything that is a mean over rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

from headwater.arrays import is_array, is_frame, namespace, precise
from headwater.curvature.known_rows import RowKeys, RowMemory
from headwater.curvature.places import Place, here, move_to, raise_at
from headwater.errors import BatchMismatch, InvalidInput
from headwater.gradients.provider import StructuredGradientProvider
from headwater.progress import track
from headwater.types import Batch

Value = TypeVar("Value")
Unpack = Callable[[Any], Any]
"""An item of a loader -> (x, y), (x, y, ids) or (x, y, ids, weights), with None for what there is not; or a Batch."""


@dataclass(frozen=True, eq=False)
class Piece:
    """Some rows of a pass: a batch of the loader, or a part of one that the provider takes at once."""

    batch: Any
    place: Place
    keys: RowKeys | None
    """What the rows are known by; None for a loader that is nobody's `KnownRows`."""

    @property
    def start(self) -> int:
        """Position, in the loader, of the first row."""
        return self.place.start + self.place.offset


class KnownRows(Iterable[Any]):
    """A loader, for one fit or run: every pass over it meets the same rows, or is refused.

    role: "train" or "query". memory: of what the same loader gave before, if it was read before.
    """

    def __init__(
        self,
        provider: StructuredGradientProvider,
        source: Iterable[Any],
        role: str = "train",
        memory: RowMemory | None = None,
    ):
        self.provider, self.source, self.role = provider, source, role
        self.memory = RowMemory() if memory is None else memory

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

    def compared(self, provider: StructuredGradientProvider, batch: Any, place: Place) -> RowKeys:
        """The keys of a batch's rows. Errors: BatchMismatch where they are not those of an earlier pass."""
        keys = RowKeys.of(provider, batch)
        self.memory.compare(keys, place)
        return keys

    def glance(self) -> None:
        """Look at the first rows, so that a loader that shuffles is noticed when they come again.

        A built-in collection does not shuffle, and a loader that was read before is compared with that.
        """
        check_loader(self.source, self.role)
        if self.memory.is_empty and not isinstance(self.source, (list, tuple)):
            first = next(_whole_batches(self.provider, self.source, self.role), None)
            if first is not None and (keys := RowKeys.of(self.provider, first[1])).ids is None:
                self.memory.expect(keys)


def known_rows(provider: StructuredGradientProvider, loader: Iterable[Any], role: str = "train") -> KnownRows:
    """The loader, if it is one of these already, or as one."""
    if isinstance(loader, KnownRows):
        return loader
    check_loader(loader, role)
    return KnownRows(provider, loader, role)


def batches(
    provider: StructuredGradientProvider, loader: Iterable[Any], what: str, show: bool = False
) -> Iterator[Batch]:
    """`read`, batches alone."""
    return (piece.batch for piece in read(provider, loader, what, show))


def read(provider: StructuredGradientProvider, loader: Iterable[Any], what: str, show: bool = False) -> Iterator[Piece]:
    """The loader's batches as the framework's, empty ones left out, large ones cut to what the provider takes at once.

    Errors: InvalidInput for what is no loader, can be read only once, or gives an item that is no batch; BatchMismatch
    for a loader without rows, and for `KnownRows` that are others than in an earlier pass.
    """
    known = loader if isinstance(loader, KnownRows) else None
    role = "train" if known is None else known.role
    source: Iterable[Any] = loader if known is None else known.source
    check_loader(source, role)
    outer, found = here(), []
    provider.begin_pass()
    move_to(None)  # the loader's own errors are its own
    for place, batch in _whole_batches(provider, track(source, what, show), role):
        move_to(place)  # what is asked of the provider now is about this batch
        keys = None if known is None else known.compared(provider, batch, place)
        if keys is not None:
            found.append(keys)
        for rows, piece in _pieces(provider, batch):
            part = replace(place, offset=rows.start) if rows.start else place
            move_to(part)
            yield Piece(piece, part, None if keys is None else keys.take(rows))
        move_to(None)
    if known is not None and found:
        known.memory.end(found, role)
    move_to(outer)


def again(pieces: Iterable[Piece], what: str, show: bool = False) -> Iterator[Piece]:
    """Pieces of a pass that were kept, in turn: a pass as well, to errors."""
    outer = here()
    for piece in track(pieces, what, show):
        move_to(piece.place)
        yield piece
    move_to(outer)


def first_batch(provider: StructuredGradientProvider, loader: Iterable[Any]) -> Batch:
    """A look at some rows, which is no pass. Errors: as `read`."""
    source = loader.source if isinstance(loader, KnownRows) else loader
    check_loader(source, "train")
    _, batch = next(_whole_batches(provider, source, "train"))
    return next(_pieces(provider, batch))[1]


def _whole_batches(
    provider: StructuredGradientProvider, source: Iterable[Any], role: str
) -> Iterator[tuple[Place, Batch]]:
    start = 0
    for number, item in enumerate(source):
        batch = _placed_batch(provider, item, Place(role, number, start))
        if batch is not None:
            yield Place(role, number, start, len(batch)), batch
            start += len(batch)
    if not start:
        raise BatchMismatch(f"The {role} loader has no rows. A loader gives batches: one batch is [(x, y)].")


def _placed_batch(provider: StructuredGradientProvider, item: Any, place: Place) -> Batch | None:
    """Errors: as `as_batch`, naming the place."""
    try:
        return as_batch(provider, item)
    except Exception as error:
        raise_at(error, place)
        raise


def _pieces(provider: StructuredGradientProvider, batch: Any) -> Iterator[tuple[slice, Any]]:
    """The batch, or nearly equal pieces of it that the provider takes at once; and which rows they are."""
    pieces = -(-len(batch) // max(1, provider.rows_at_once(batch)))
    if pieces == 1:
        yield slice(0, len(batch)), batch
        return
    step = -(-len(batch) // pieces)
    for start in range(0, len(batch), step):
        rows = slice(start, min(start + step, len(batch)))
        yield rows, batch.take(rows)


# What users give ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Columns:
    """What `unpack` gave for an item."""

    x: Any
    y: Any
    ids: Any = None
    weights: Any = None


class Unpacked(Iterable[Any]):
    """A loader whose items are made (x, y[, ids, weights]) by a function of the user's, each time that it is read."""

    def __init__(self, source: Iterable[Any], unpack: Unpack):
        self.source, self.unpack = source, unpack

    def __iter__(self) -> Iterator[Any]:
        for number, item in enumerate(self.source):
            try:
                found = self.unpack(item)
            except Exception as error:
                said = f"unpack= failed on batch {number} of the loader, {described(item)}"
                raise InvalidInput(f"{said}: {type(error).__name__}: {error}") from error
            if isinstance(found, Batch):
                yield found
            elif isinstance(found, (tuple, list)) and 2 <= len(found) <= 4:
                yield Columns(*found)
            else:
                raise InvalidInput(
                    f"unpack= gave {described(found)} for batch {number}; expected (x, y), (x, y, ids) or "
                    "(x, y, ids, weights), with None for what there is not."
                )


@runtime_checkable
class Numbered(Protocol):
    """What Python can iterate over by numbers, without `__iter__`: a data set of torch, a sequence of one's own."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> Any: ...


def check_loader(loader: Any, role: str) -> None:
    """Errors: InvalidInput for what is no collection of batches that can be read again, in a sentence for each."""
    said = None
    if loader is None:
        said = "is None"
    elif isinstance(loader, Iterator):
        said = f"is a {type(loader).__name__}, which can be read only once: pass list(loader), or a DataLoader"
    elif isinstance(loader, (str, bytes)):
        said = f"is one {type(loader).__name__}, {loader!r:.60}"
    elif isinstance(loader, Batch):
        said = f"is one {type(loader).__name__}: pass [batch]"
    elif isinstance(loader, Mapping):
        said = f"is one dict of {', '.join(map(repr, list(loader)[:5]))}: pass [(x, y)], with x the dict of inputs"
    elif is_frame(loader):
        said = f"is a {type(loader).__name__}: iterating over it gives its columns' names. Pass [(x, y)]"
    elif is_array(loader):
        said = f"is one array of shape {tuple(loader.shape)}: pass inputs and targets, [(x, y)]"
    elif isinstance(loader, (list, tuple)) and not loader:
        raise BatchMismatch(f"The {role} loader is an empty {type(loader).__name__}: it has no rows.")
    elif isinstance(loader, tuple) and any(is_array(part) for part in loader):
        said = "is one batch: pass [(x, y)]"
    elif not isinstance(loader, Iterable) and not isinstance(loader, Numbered):
        said = f"is {described(loader)}"
    if said is not None:
        raise InvalidInput(f"The {role} loader {said}. A loader is a list of batches, [(x, y), ...], or a DataLoader.")


def described(value: Any) -> str:
    """A value in a few words."""
    if isinstance(value, Mapping):
        return f"a dict of {', '.join(map(repr, list(value)[:5]))}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)} entries"
    return f"{type(value).__name__} of shape {tuple(value.shape)}" if is_array(value) else type(value).__name__


def as_batch(provider: StructuredGradientProvider, item: Any) -> Batch | None:
    """One item of a loader: a Batch, (x, y), or what `unpack` made of it. None if it has no rows."""
    if isinstance(item, Columns) or type(item) is Batch:
        batch = paired(provider, item.x, item.y)
        return None if batch is None else _with_columns(provider, batch, item.weights, item.ids)
    if isinstance(item, Batch):
        return item if len(item) else None
    if isinstance(item, (tuple, list)) and len(item) == 2:
        return paired(provider, *item)
    if is_array(item):
        raise InvalidInput(
            f"A loader gives (x, y) or a Batch, not {described(item)}. Are these inputs and targets of one batch, "
            "[x, y]? Pass a list of batches, [(x, y)]."
        )
    raise InvalidInput(
        f"A loader gives (x, y) or a Batch, not {described(item)}. One batch is [(x, y)]; of items of another form "
        f"unpack= makes (x, y[, ids, weights]), {_unpack_example(item)}."
    )


def paired(provider: StructuredGradientProvider, x: Any, y: Any) -> Batch | None:
    """Inputs and targets as a batch; None without rows. Errors: InvalidInput, in plain words, for what makes none."""
    with plain_words(x, y):
        batch = provider.as_batch(x, y) if len(Batch(x, y)) else None
        if batch is None:
            return None
        for name, value, held in (("x", x, batch.x), ("y", y, batch.y)):
            if isinstance(held, list):
                raise InvalidInput(_why_no_batch(name, value) or f"{name} is a list; pass an array.")
        return batch


def _unpack_example(item: Any) -> str:
    if isinstance(item, Mapping) and len(item) > 1:
        names = list(item)
        return f"for example unpack=lambda batch: (batch[{names[0]!r}], batch[{names[-1]!r}])"
    if isinstance(item, (tuple, list)) and len(item) == 3:
        return (
            "for example unpack=lambda batch: (batch[0], batch[1], batch[2]) of (x, y, ids), "
            "(batch[0], batch[2], batch[1]) of (x, ids, y), or (batch[1], batch[2], batch[0]) of (ids, x, y)"
        )
    return "a function of the item that says which entry is which"


@contextmanager
def plain_words(x: Any, y: Any) -> Iterator[None]:
    """Where x and y make no batch because they are a single row, or no arrays, that is what is said."""
    try:
        yield
    except (InvalidInput, TypeError, ValueError, RuntimeError) as error:
        said = _why_no_batch("x", x) or _why_no_batch("y", y) or _why_one_row(x, y)
        if said is None:
            raise
        if isinstance(error, BatchMismatch):
            raise BatchMismatch(said) from error
        raise InvalidInput(f"{said} {error}") from error


def _why_no_batch(name: str, value: Any) -> str | None:
    if isinstance(value, (str, bytes)):
        return f"{name} is one word, {value!r:.60}; expected an array with a row for each example."
    if isinstance(value, (bool, int, float)) or (is_array(value) and not value.shape):
        return (
            f"{name} is one number, {value!r:.60}, and has no batch axis: a single row, such as a Dataset gives. Pass "
            f"a batch of one row, {name}[None]; of a Dataset, DataLoader(dataset, batch_size=256)."
        )
    if isinstance(value, (list, tuple)) and value:
        if all(isinstance(entry, (str, bytes)) for entry in value):
            return f"{name} has words, {value[0]!r:.40}, ...; give numbers, such as the position of each row's class."
        if all(isinstance(entry, (bool, int, float, list)) for entry in value):
            return f"{name} is a {type(value).__name__} of {len(value)} numbers or lists; pass one array of them."
    return None


def _why_one_row(x: Any, y: Any) -> str | None:
    if is_array(x) and is_array(y) and len(x.shape) == 1 and tuple(y.shape) == (1,) and x.shape[0] > 1:
        return (
            f"x has shape {tuple(x.shape)} and y (1,): x has no batch axis, if this is one row. Pass x[None]; of a "
            "Dataset, DataLoader(dataset, batch_size=256)."
        )
    return None


# Means ----------------------------------------------------------------------------------------------------------------


def _with_columns(provider: StructuredGradientProvider, batch: Batch, weights: Any, ids: Any) -> Batch:
    """A batch of the provider's kind with the weights and ids that were given.

    Errors: InvalidInput for weights that the provider knows nothing of.
    """
    if weights is None and ids is None:
        return batch
    batch = replace(batch, weights=weights, ids=ids)
    if weights is not None and provider.row_weights(batch) is None:
        raise InvalidInput(
            f"The batch has weights, and {type(provider).__name__} knows no weights of rows: its row_weights gives "
            "None. Leave them out, or let row_weights return them and grads multiply by them."
        )
    return batch


def total_weight(provider: StructuredGradientProvider, batch: Batch) -> float:
    """The number of rows, each counted with its weight."""
    weights = provider.row_weights(batch)
    return float(len(batch)) if weights is None else float(namespace(weights).sum(precise(weights)))


class WeightedMean(Generic[Value]):
    """sum of values over sum of weights: the mean over rows, whatever batches they came in."""

    def __init__(self) -> None:
        self._total: Any = None
        self.weight = 0.0

    def add(self, weighted_sum: Value, weight: float) -> None:
        """A batch's contribution: its weighted sum, and its rows' total weight."""
        self._total = weighted_sum if self._total is None else self._total + weighted_sum
        self.weight += weight

    @property
    def value(self) -> Value:
        return self._total / positive_weight(self.weight)


def positive_weight(weight: float) -> float:
    """The rows' total weight. Errors: InvalidInput unless it is positive."""
    if not weight > 0:
        raise InvalidInput(f"The rows' weights sum to {weight:g}; a mean needs a positive sum.")
    return weight
