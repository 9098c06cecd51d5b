"""Rows of tokens: what users have, as batches; and padding, of which no number may depend.

A batch in canonical form has each row's tokens first and its padding after them, and no position that is padding in
every row. Example: masks [0, 0, 1, 1] and [0, 1, 1, 1] become [1, 1, 0] and [1, 1, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset

from headwater.arrays import is_array, is_frame, to_numpy
from headwater.errors import InvalidInput
from headwater.hf.losses import IGNORED
from headwater.loaders.batches import Columns as Given
from headwater.loaders.forms import cut, named
from headwater.loaders.frames import as_ids, ids_of

Columns = dict[str, torch.Tensor]
Collator = Callable[[list[dict[str, Any]]], Mapping[str, Any]]

MASK, IDS, LABELS = "attention_mask", "input_ids", ("labels", "label", "label_ids")


# Padding --------------------------------------------------------------------------------------------------------------


def spans(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where each row's tokens begin and end, [n] each. Errors: InvalidInput for a row without tokens."""
    held = mask.bool()
    if not bool(held.any(1).all()):
        raise InvalidInput(f"Row {int(held.any(1).int().argmin())} has no token: its attention_mask is zero all over.")
    numbers = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    # The first token, and one past the last: a mask may have holes between.
    return held.int().argmax(1), (held * numbers).amax(1)


def without_spare_padding(x: Columns, y: Any, fill: int | None, labels_are_tokens: bool) -> tuple[Columns, Any]:
    """The batch in canonical form; `fill` is the id of the padding token."""
    mask = x.get(MASK)
    if mask is None or mask.ndim != 2:
        return x, y
    if bool(mask.bool().all()):
        return x, y
    first, end = spans(mask)
    # Canonical form: each row begins at its first token, and the longest fills the width.
    width, positions = int((end - first).max()), mask.shape[1]
    index = first[:, None] + torch.arange(width, device=mask.device)
    beyond = index >= end[:, None]

    def moved(column: torch.Tensor, filling: int) -> torch.Tensor:
        # A column without an entry for each token (a label, an image) stays as it is.
        if column.ndim < 2 or column.shape[1] != positions:
            return column
        shape = (...,) + (None,) * (column.ndim - 2)
        places = index.clamp(max=positions - 1)[shape].expand(-1, -1, *column.shape[2:])
        return column.gather(1, places).masked_fill(beyond[shape], filling)

    found = {name: moved(column, (fill or 0) if name == IDS else 0) for name, column in x.items()}
    return found, moved(y, IGNORED) if labels_are_tokens else y


def lengths(x: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """How many positions each row has, in canonical form: [n]; None if nothing says that some have fewer."""
    mask = x.get(MASK)
    return None if mask is None or mask.ndim != 2 else spans(mask)[1]


def check_padding_is_said(x: Columns, padding: int | None) -> None:
    """Errors: InvalidInput for rows that begin or end with the padding token, and no attention mask."""
    ids = x.get(IDS)
    if MASK in x or ids is None or padding is None or ids.ndim != 2:
        return
    padded = (ids[:, 0] == padding) | (ids[:, -1] == padding)
    if bool(padded.any()):
        raise InvalidInput(
            f"Row {int(padded.int().argmax())} begins or ends with the padding token ({padding}), and there is no "
            f"attention_mask: the model would read padding as text. Pass attention_mask=(input_ids != {padding}).long()"
            ", or ones if that token is text here."
        )


def put_back(scores: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Numbers [q, n, s] of rows in canonical form, at the positions that the mask [n, t] gives them: [q, n, t]."""
    if mask is None or mask.ndim != 2:
        return scores
    first, end = spans(mask)
    index = torch.arange(mask.shape[1], device=scores.device) - first.to(scores.device)[:, None]
    # Padding has no score: zero, as it has no part in the loss.
    inside = (index >= 0) & (index < (end - first).to(scores.device)[:, None])
    places = index.clamp(0, scores.shape[2] - 1).expand(len(scores), -1, -1)
    return scores.gather(2, places).masked_fill(~inside, 0.0)


def same_length_groups(x: Columns, y: Any, labels_are_tokens: bool) -> Iterator[tuple[np.ndarray, list[torch.Tensor]]]:
    """Rows of one length together, without their padding: (their numbers, their columns)."""
    ends = lengths(x)
    count = len(next(iter(x.values())))
    if ends is None:
        yield np.arange(count), [*(v for k, v in x.items() if k != MASK), y]
        return
    mask = x[MASK]
    # Keys of rows must not depend on how far their batch was padded: rows of one length are cut to it.
    for length in ends.unique().tolist():
        rows = (ends == length).nonzero()[:, 0]

        def cut(column: torch.Tensor, rows: torch.Tensor = rows, length: int = length) -> torch.Tensor:
            tokens = column.ndim > 1 and column.shape[1] == mask.shape[1]
            return column[rows, :length] if tokens else column[rows]

        held = cut(mask).bool()
        # Masked tokens within a row are marked: whatever id stands there, the model does not read it.
        columns = [cut(v).masked_fill(~held, -1) if name == IDS else cut(v) for name, v in x.items() if name != MASK]
        yield rows.cpu().numpy(), [*columns, cut(y) if labels_are_tokens else y[rows]]


# What users have ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """How single rows become batches."""

    tokenizer: Any = None
    """Makes tokens of strings; None if rows are tokens."""
    collator: Collator | None = None
    """Makes a batch of rows; None for plain padding on the right."""
    size: int = 8
    """Rows in a batch."""
    columns: frozenset[str] = frozenset()
    """What the model takes."""
    padding: int | None = None
    reads_itself: bool = False
    """Whether a row without labels is labelled by its own tokens, as a language model's is."""
    target: str | None = None
    """The column of labels; None for one of `LABELS`."""
    ids: str | None = None
    """The column of the rows' ids, which does not reach the model; None for positions, or a data frame's index."""

    @property
    def _added(self) -> list[str]:
        return [name for name in (self.target, self.ids) if name is not None]

    def batches(self, source: Any, provider: Any) -> Iterable[object]:
        """Rows or batches of any kind as the provider's batches, to be read again and again.

        What can be read only once, or is no collection at all, stays as it is. Errors: InvalidInput.
        """
        if isinstance(source, str):
            raise InvalidInput(f"One string is no collection of rows: {source!r:.60}. Pass a list of strings.")
        if isinstance(source, Mapping):
            said = f"the splits {list(source)}: choose one" if _has_columns(source) else "one batch: pass [it]"
            raise InvalidInput(f"A loader gives batches or rows; {type(source).__name__} is {said}.")
        if is_frame(source):
            source = TableRows(source)
        if isinstance(source, TableRows):
            names = ids_of(source.x, source.y, 0) if self.ids is None else None
            return _Batches(source, self, provider, single=True, names=names)
        if isinstance(source, Iterator) or not isinstance(source, (Iterable, Dataset)):
            return source
        return _Batches(source, self, provider, single=_has_columns(source) or _gives_rows(source))

    def collate(self, rows: list[Any]) -> Mapping[str, Any]:
        """Single rows, strings or dicts, as the columns of one batch."""
        tokens = self._completed([self._tokens(row) for row in rows])
        return self.collator(tokens) if self.collator is not None else self._padded(tokens)

    def ids_of(self, row: Any) -> Any:
        """What a row, or a batch of them, is called. Errors: InvalidInput for columns that it has not."""
        names = [] if isinstance(row, str) else list(row)
        missing = [name for name in self._added if name not in names]
        if missing:
            said = "ids=" if missing[0] == self.ids else "target="
            raise InvalidInput(f"There is no column {missing[0]!r}, which {said} names; the columns are {names}.")
        return None if self.ids is None else row[self.ids]

    def _tokens(self, row: Any) -> dict[str, Any]:
        row = {"text": row} if isinstance(row, str) else row
        if self.target is not None:
            row = {**row, LABELS[0]: row[self.target]}
        if IDS not in row and "inputs_embeds" not in row and isinstance(row.get("text"), str):
            if self.tokenizer is None:
                raise InvalidInput("Rows are strings; give tokenizer=, which makes tokens of them.")
            row = {**row, **self.tokenizer(row["text"])}
        if IDS not in row and "inputs_embeds" not in row:
            raise InvalidInput(f"A row has the columns {list(row)}, and no input_ids; tokenize it, or give tokenizer=.")
        return {name: v for name, v in row.items() if name in self.columns | {*LABELS} and v is not None}

    def _completed(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Rows that all have the columns that any of them has: what a row lacks is what the model takes it for.

        So that a row means the same in every batch, whichever row comes first. Errors: InvalidInput for a column that
        means nothing where it is not given.
        """
        called = {name for row in rows for name in row if name in LABELS}
        if len(called) > 1:
            rows = [{LABELS[0] if name in LABELS else name: v for name, v in row.items()} for row in rows]
        names = dict.fromkeys(name for row in rows for name in row)
        return [row if row.keys() >= names.keys() else self._filled(row, k, names) for k, row in enumerate(rows)]

    def _filled(self, row: dict[str, Any], number: int, names: Iterable[str]) -> dict[str, Any]:
        long = len(row[IDS] if IDS in row else row["inputs_embeds"])
        found = {MASK: [1] * long, "token_type_ids": [0] * long, "position_ids": [*range(long)]} | row
        if self.reads_itself and IDS in row:
            own = torch.as_tensor(row[IDS])
            # As a model labels a row by itself: padding predicts nothing.
            own = own.masked_fill(torch.as_tensor(found[MASK]) == 0, IGNORED)
            found |= {name: found.get(name, own) for name in names if name in LABELS}
        missing = [name for name in names if name not in found]
        if missing:
            raise InvalidInput(
                f"Some rows have {missing[0]}, others have not: row {number} of its batch has {list(row)} alone. Give "
                "it to all rows, or to none."
            )
        return {name: found[name] for name in names}

    def _padded(self, rows: list[dict[str, Any]]) -> Mapping[str, Any]:
        """Columns with an entry for each token padded on the right, with a mask; others put under one another."""
        long = [len(row[IDS] if IDS in row else row["inputs_embeds"]) for row in rows]
        found: dict[str, Any] = {}
        for name in rows[0]:
            values = [torch.as_tensor(row[name]) for row in rows]
            if all(v.ndim and len(v) == t for v, t in zip(values, long, strict=True)) and max(long) > 0:
                filling = IGNORED if name in LABELS else (self.padding or 0) if name == IDS else 0
                found[name] = torch.nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=filling)
            else:
                found[name] = torch.stack(values)
        if MASK not in found:
            found[MASK] = (torch.arange(max(long)) < torch.tensor(long)[:, None]).long()
        return found


def _has_columns(source: object) -> bool:
    """Whether it is a Dataset of Hugging Face's, or a dict of them by split, whose rows are dicts."""
    return hasattr(source, "column_names")


@dataclass(frozen=True)
class _Batches:
    """Batches of a source, read anew each time."""

    source: Any
    rows: Rows
    provider: Any
    single: bool
    names: Any = None
    """Ids of all rows, that are not in a column; None where there are none."""

    def __iter__(self) -> Iterator[Any]:
        if self.single:
            yield from self._collated()
            return
        for item in self.source:
            yield self._of_columns(item) if isinstance(item, Mapping) else item

    def _collated(self) -> Iterator[Any]:
        items, start = iter(self.source), 0
        # In order, and the last one smaller: every pass has the same batches.
        while taken := list(islice(items, self.rows.size)):
            ids = [self.rows.ids_of(row) for row in taken]  # asks for the columns of each row, too
            if self.names is not None:
                ids = self.names[start : start + len(taken)]
            start += len(taken)
            yield self._as_batch(self.rows.collate(taken), None if ids[0] is None else as_ids(ids, "ids"))

    def _of_columns(self, batch: Mapping[str, Any]) -> Any:
        """A batch that is a dict of columns."""
        ids = self.rows.ids_of(batch)
        left = {name: column for name, column in batch.items() if name not in (self.rows.target, self.rows.ids)}
        if self.rows.target is not None:
            left[LABELS[0]] = batch[self.rows.target]
        return self._as_batch(left, None if ids is None else named(ids))

    def _as_batch(self, columns: Mapping[str, object], ids: Any) -> Any:
        """A dict of columns, labels among them."""
        x = dict(columns)
        given = [x.pop(name) for name in LABELS if name in x]
        y = given[0] if given else None
        return self.provider.as_batch(x, y) if ids is None else Given(x, y, ids)


@dataclass(frozen=True, eq=False)
class TableRows(Iterable[Any]):
    """The rows of a data frame, or texts; and, where there are, their labels beside them."""

    x: Any
    y: Any = None

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for start in range(0, len(self.x), AT_ONCE):
            rows = slice(start, start + AT_ONCE)
            found = _records(cut(self.x, rows))
            if self.y is None:
                yield from found
                continue
            some = cut(self.y, rows)
            for row, label in zip(found, to_numpy(some) if is_array(some) else some, strict=True):
                yield {**row, LABELS[0]: label}


AT_ONCE = 1024
"""Rows of a data frame that are made dicts of together."""


def _records(x: Any) -> list[dict[str, Any]]:
    if is_frame(x) and x.ndim == 2:
        found: list[dict[str, Any]] = x.to_dict("records")
        return found
    return [{"text": text} for text in x]


def _gives_rows(source: Iterable[object] | Dataset[Any]) -> bool:
    """Whether it is a sequence of strings, or of dicts without a batch axis."""
    ordered = isinstance(source, Sequence) or (isinstance(source, Dataset) and not isinstance(source, IterableDataset))
    first = source[0] if ordered and len(source) else None  # type: ignore[arg-type, index]
    if isinstance(first, str):
        return True
    if not isinstance(first, Mapping):
        return False
    ids = first.get(IDS, first.get("inputs_embeds"))
    return ids is None or np.ndim(ids) == (1 if IDS in first else 2)
