"""What users give: batches in many forms, and the plain words for what is none."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from headwater.arrays import Numbered, described, is_array, is_frame
from headwater.errors import BatchMismatch, InvalidInput
from headwater.gradients.provider import StructuredGradientProvider
from headwater.loaders.frames import as_ids, ids_of
from headwater.types import Batch

Unpack = Callable[[Any], Any]
"""An item of a loader -> (x, y), (x, y, ids) or (x, y, ids, weights), with None for what there is not; or a Batch."""


@dataclass(frozen=True, eq=False)
class Columns:
    """What `unpack` gave for an item."""

    x: Any
    y: Any
    ids: Any = None
    weights: Any = None


class Unpacked(Iterable[Any]):
    """A loader whose items are made (x, y[, ids, weights]) by a function of the user's, each time that it is read.

    ids: what the ids are called in items that are dicts, for a function that gives x and y alone.
    """

    def __init__(self, source: Iterable[Any], unpack: Unpack, ids: Any = None):
        self.source, self.unpack, self.ids = source, unpack, ids

    def __iter__(self) -> Iterator[Any]:
        for number, item in enumerate(self.source):
            if isinstance(item, Batch):  # rows that were unpacked before, in another order
                yield item
                continue
            try:
                found = self.unpack(item)
                if self.ids is not None and isinstance(found, (tuple, list)) and len(found) == 2:
                    found = (*found, as_ids(item[self.ids], "ids"))
            except Exception as error:
                said = f"unpack= failed on batch {number} of the loader, {described(item)}"
                raise InvalidInput(f"{said}: {type(error).__name__}: {error}") from error
            if isinstance(found, (Batch, Columns)):
                yield found
            elif isinstance(found, (tuple, list)) and 2 <= len(found) <= 4:
                yield Columns(*found)
            else:
                raise InvalidInput(
                    f"unpack= gave {described(found)} for batch {number}; expected (x, y), (x, y, ids) or "
                    "(x, y, ids, weights), with None for what there is not."
                )


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
        said = (
            f"is a {type(loader).__name__}, and nothing says which column is the target: pass (frame, 'column'), "
            "(frame, column), or target='column' to the influence"
        )
    elif is_array(loader):
        said = f"is one array of shape {tuple(loader.shape)}: pass inputs and targets, (x, y)"
    elif isinstance(loader, (list, tuple)) and not loader:
        raise BatchMismatch(f"The {role} loader is an empty {type(loader).__name__}: it has no rows.")
    elif isinstance(loader, tuple) and any(is_array(part) for part in loader):
        said = f"is {described(loader)}, some of them arrays: pass inputs and targets of all rows, (x, y)"
    elif not isinstance(loader, Iterable) and not isinstance(loader, Numbered):
        said = f"is {described(loader)}"
    if said is not None:
        alone = loader[1] is None if isinstance(loader, tuple) and len(loader) == 2 else is_array(loader)
        if role != "train" and (alone or is_frame(loader)):
            said += "; queries without labels have an answer with explain='prediction'"
        raise InvalidInput(
            f"The {role} loader {said}. A loader is a list of batches, [(x, y), ...], or a DataLoader; (x, y) is all "
            "rows at once, and a Dataset gives them one by one."
        )


def check_one(others: tuple[object, ...]) -> None:
    """Errors: InvalidInput for inputs and targets that were given to `fit` side by side."""
    if others:
        raise InvalidInput("fit takes one thing, the train rows: pass inputs and targets as a pair, fit((x, y)).")


def as_batch(provider: StructuredGradientProvider, item: object, start: int = 0) -> Batch | None:
    """One item of a loader: a Batch, (x, y), or what `unpack` made of it. None if it has no rows.

    start: position, in the loader, of its first row. The index of a data frame names the rows, if nothing else does.
    Errors: InvalidInput for what is no batch.
    """
    if isinstance(item, (tuple, list)) and len(item) == 2:
        item = Columns(*item)
    if isinstance(item, Columns) or type(item) is Batch:
        batch = paired(provider, item.x, item.y)
        if batch is None:
            return None
        ids = ids_of(item.x, item.y, start) if item.ids is None else item.ids
        return _with_columns(provider, batch, item.weights, ids)
    if isinstance(item, Batch):
        return item if len(item) else None
    if is_array(item):
        raise InvalidInput(
            f"A loader gives (x, y) or a Batch, not {described(item)}. Are these inputs and targets of one batch, "
            "[x, y]? Pass a list of batches, [(x, y)]."
        )
    raise InvalidInput(
        f"A loader gives (x, y) or a Batch, not {described(item)}. One batch is [(x, y)]; of items of another form "
        f"unpack= makes (x, y[, ids, weights]), {_unpack_example(item)}."
    )


def paired(provider: StructuredGradientProvider, x: object, y: object) -> Batch | None:
    """Inputs and targets as a batch; None without rows. Errors: InvalidInput, in plain words, for what makes none."""
    with plain_words(x, y):
        batch = provider.as_batch(x, y) if len(Batch(x, y)) else None
        if batch is None:
            return None
        for name, value, held in (("x", x, batch.x), ("y", y, batch.y)):
            if isinstance(held, list):
                raise InvalidInput(_why_no_batch(name, value) or f"{name} is a list; pass an array.")
        return batch


def _unpack_example(item: object) -> str:
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
def plain_words(x: object, y: object) -> Iterator[None]:
    """Where x and y make no batch because they are a single row, or no arrays, that is what is said.

    Errors: InvalidInput, or BatchMismatch, in words about x and y.
    """
    try:
        yield
    except (InvalidInput, TypeError, ValueError, RuntimeError) as error:
        said = _why_no_batch("x", x) or _why_no_batch("y", y) or _why_one_row(x, y)
        if said is None:
            raise
        if isinstance(error, BatchMismatch):
            raise BatchMismatch(said) from error
        raise InvalidInput(said if str(error).startswith(said) else f"{said} {error}") from error


def _why_no_batch(name: str, value: Any) -> str | None:
    if isinstance(value, (str, bytes)):
        return f"{name} is one word, {value!r:.60}; expected an array with a row for each example."
    if isinstance(value, (bool, int, float)) or (is_array(value) and not value.shape):
        return (
            f"{name} is one number, {value!r:.60}, and has no batch axis: a single row, such as a Dataset gives. Pass "
            f"a batch of one row, {name}[None]; of a Dataset, DataLoader(dataset, batch_size=256)."
        )
    if isinstance(value, np.ndarray) and value.dtype.kind in "USO" and len(value):
        said = f"{name} has words, {str(value.reshape(-1)[0])!r:.40}, ..."
        return f"{said}; give numbers, such as the position of each row's class."
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


def _with_columns(provider: StructuredGradientProvider, batch: Batch, weights: object, ids: object) -> Batch:
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
