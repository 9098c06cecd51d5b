"""Cards: a row of data as what it is, an image, a text, tokens with a number each, a table row, or its id alone.

    "words"                                  a text
    [h, w], [h, w, 3], [3, h, w], PIL ...    an image
    {"age": 41, "income": 2300, ...}         a table row; of a data set's item, its image, text and label by themselves
    (x, y)                                   x, labelled y
    Tokens(["New", " York"], [.3, -.1])      a text whose pieces have colours
    Card(...)                                any of these together
    None                                     nothing is known: the id stands alone

`Deck.draw` turns a card into plain JSON, which the page's script and its templates both read. What cards may take of
the page is shared out among them: many long texts are cut shorter than a few.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from headwater.arrays import is_array, to_numpy
from headwater.errors import NonFiniteValue, ShapeMismatch
from headwater.report.figures import level_of
from headwater.report.images import Images, Levels, as_levels
from headwater.report.text import cut, number, one_line, signed, visible

LABELS = ("label", "labels", "y", "target", "class", "category")
"""Names of a column that is taken for the rows' label, the first that is there."""
LONG = 60
"""Characters from which a column's text is the row's text, and not a cell of a table."""
COLUMNS = 60
"""Columns of a table row that are shown at most."""
PIECES = 600
"""Tokens of a text that are shown at most."""


@dataclass(frozen=True)
class Tokens:
    """A text in pieces, with a number for each: positive helps, negative harms.

    Errors: ShapeMismatch unless there is a number for each piece; NonFiniteValue.
    """

    pieces: Sequence[str]
    values: Any
    """[pieces]."""

    def __post_init__(self) -> None:
        values = np.asarray(self.values, dtype=np.float64)
        if values.shape != (len(self.pieces),):
            raise ShapeMismatch(f"There are {len(self.pieces)} pieces of text, and values of shape {values.shape}.")
        if not np.isfinite(values).all():
            raise NonFiniteValue(f"{int((~np.isfinite(values)).sum())} of {values.size} token scores are not finite.")


@dataclass(frozen=True)
class Card:
    """What is shown of a row; everything is optional."""

    image: Any = None
    """As `headwater.report.images.as_levels` takes it."""
    text: str = ""
    tokens: Tokens | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)
    """A table row: scalars by name."""
    label: str = ""
    """What the row is labelled."""
    note: str = ""
    """A short line that stands out, with a reason to look twice."""


def card_of(item: Any) -> Card:
    """What a row's thing looks like, by its type. Errors: NonFiniteValue, of an image."""
    if item is None:
        return Card()
    if isinstance(item, Card):
        return item
    if isinstance(item, str):
        return Card(text=item)
    if isinstance(item, Tokens):
        return Card(tokens=item)
    if isinstance(item, Mapping):
        return _of_mapping(item)
    if isinstance(item, (tuple, list)) and len(item) >= 2 and not all(_is_scalar(part) for part in item):
        return replace(card_of(item[0]), label=_label(item[1]))
    if (levels := as_levels(item)) is not None:
        return Card(image=levels)
    if is_array(item) or isinstance(item, (tuple, list)):
        return _of_numbers(item)
    return Card(text=one_line(item, 2000) if _is_scalar(item) else str(item))


def _of_mapping(item: Mapping[Any, Any]) -> Card:
    """A data set's item or a table's row: its first image, its label and its long text are more than cells."""
    image, text, label, note, columns = None, "", "", "", {}
    named = next((name for name in LABELS if name in item and _is_scalar(item[name])), None)
    for name, value in item.items():
        if name == named:
            label = _label(value)
        elif name == "note" and isinstance(value, str):
            note = value
        elif isinstance(value, str):
            if not text and (len(value) > LONG or name == "text"):
                text = value
            else:
                columns[str(name)] = value
        elif _is_scalar(value):
            columns[str(name)] = value
        elif image is None and (levels := as_levels(value)) is not None:
            image = levels
        elif not _is_list(value):  # tokens by number and the like say nothing
            columns[str(name)] = _summary(value)
    return Card(image=image, text=text, columns=columns, label=label, note=note)


def _of_numbers(values: Any) -> Card:
    numbers = np.asarray(to_numpy(values) if is_array(values) else values)
    if numbers.ndim == 0:
        return Card(text=one_line(numbers))
    if numbers.ndim == 1:
        return Card(columns={f"x{k}": value for k, value in enumerate(numbers[: COLUMNS + 1])})
    return Card(text=_summary(values))


def _summary(value: Any) -> str:
    """Of what has no place in a cell: its kind and its shape."""
    if is_array(value):
        return f"array {list(np.shape(value))}"
    return f"{type(value).__name__} of {len(value)}" if isinstance(value, (list, tuple, dict)) else str(value)


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple)) or (is_array(value) and value.ndim == 1)


def _is_scalar(value: Any) -> bool:
    if isinstance(value, (Mapping, set)):
        return False
    return isinstance(value, (str, bool, int, float, np.generic)) or value is None or np.ndim(value) == 0


def _label(value: Any) -> str:
    if is_array(value):
        value = to_numpy(value)
        return one_line(value) if value.ndim == 0 or value.size == 1 else _summary(value)
    return one_line(value) if _is_scalar(value) else one_line(str(value))


# As plain JSON --------------------------------------------------------------------------------------------------------


class Deck:
    """The cards of one page: pictures are shared, names of columns too.

    letters: of each text that are kept at most.
    """

    def __init__(self, letters: int = 2000):
        self.images, self.letters = Images(), letters
        self.names: dict[str, int] = {}

    def draw(self, card: Card) -> dict[str, Any]:
        """i: number of a picture; t: text, m: characters left off; k: tokens [piece, colour, value]; c: cells
        [column's number, value]; l: label; n: note. Only what there is.
        """
        found = {**self._image(card), **self._text(card), **self._tokens(card), **self._cells(card)}
        if card.label:
            found["l"] = one_line(card.label)
        if card.note:
            found["n"] = one_line(card.note)
        return found

    def _image(self, card: Card) -> dict[str, Any]:
        levels: Levels | None = None if card.image is None else as_levels(card.image)
        return {} if levels is None else {"i": self.images.add(levels)}

    def _text(self, card: Card) -> dict[str, Any]:
        if not card.text:
            return {}
        shown, left = cut(card.text, self.letters)
        return {"t": shown, "m": left} if left else {"t": shown}

    def _tokens(self, card: Card) -> dict[str, Any]:
        if card.tokens is None:
            return {}
        values = np.asarray(card.tokens.values, dtype=np.float64)
        largest = float(np.abs(values).max(initial=0.0))
        most = min(PIECES, max(20, self.letters // 8))
        pieces = zip(card.tokens.pieces[:most], values[:most].tolist(), strict=True)
        drawn = [[cut(piece, 200)[0], level_of(value, largest), signed(value)] for piece, value in pieces]
        left = sum(map(len, card.tokens.pieces[most:]))
        return {"k": drawn, "m": left} if left else {"k": drawn}

    def _cells(self, card: Card) -> dict[str, Any]:
        if not card.columns:
            return {}
        shown = list(card.columns.items())[:COLUMNS]
        cells = [[self.names.setdefault(visible(str(n)), len(self.names)), _cell(v)] for n, v in shown]
        left = len(card.columns) - len(shown)
        return {"c": cells, "d": left} if left else {"c": cells}


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "missing"
    if isinstance(value, (np.floating, float)):
        return number(float(value))
    return one_line(value, 80) if _is_scalar(value) else _summary(value)


def texts(cards: Sequence[Card]) -> Iterator[int]:
    """How long the texts are: for how much of each there is room."""
    yield from (len(card.text) for card in cards if card.text)


def letters_for(cards: Sequence[Card], room: int, least: int = 160, most: int = 4000) -> int:
    """How much of each text is shown, so that all take `room` characters: short texts leave theirs to the long."""
    lengths = sorted(texts(cards))
    for place, length in enumerate(lengths):
        share = room / (len(lengths) - place)
        if length > share:
            return int(min(most, max(least, share)))
        room -= length
    return most
