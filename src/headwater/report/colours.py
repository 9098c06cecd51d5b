"""Texts whose pieces have the colours of what each adds to the row's score: of each pair its own.

A row is drawn once, and stands beside many queries: its card has the pieces (w), and each pair that names it their
numbers, as [largest, [thousandths of it]], and, of a text that is cut, the thousandths of all that is left off. They
are said in the unit of the query's scores. `coloured` and `leftOff` in cards.js are the same as here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from headwater.evaluate.checks import Floats
from headwater.report.cards import PIECES
from headwater.report.figures import level_of
from headwater.report.gather import Scale
from headwater.report.text import cut

NOTE = (
    "In the texts beside a query, each token has the colour of what it adds to that row's score: blue helps, orange "
    "harms, and its number, in the unit of the scores, is there when you point at it. The numbers of a row, with that "
    "of what a long text leaves off, add up to its score."
)


@dataclass(frozen=True, eq=False)
class TokenScores:
    """Of the pairs of a page that have them; places are those in the scores."""

    rows: Callable[[int], Sequence[str]] | None = None
    """The text of a train row, in pieces; None where rows are no texts."""
    queries: Callable[[int], Sequence[str]] | None = None
    values: Mapping[tuple[int, int], Floats] = field(default_factory=dict)
    """[pieces] of a query and a train row, whose sum is the score."""
    missed: int = 0
    """Pairs whose tokens add up to another score, and are not in `values`."""

    @property
    def note(self) -> str:
        """What a page says of them all."""
        left = f"Of {self.missed} pairs they do not add up to the score, and are not shown." if self.missed else ""
        return f"{NOTE} {left}".strip() if self.values else ""

    @cached_property
    def _coloured(self) -> set[int]:
        return {row for _, row in self.values}

    def row(self, place: int, card: Mapping[str, Any], letters: int) -> dict[str, Any]:
        """A train row's card with its pieces: in place of its text if they have colours, or if it shows nothing."""
        return _in_pieces(card, self.rows, place, letters, place in self._coloured)

    def query(self, place: int, card: Mapping[str, Any], letters: int) -> dict[str, Any]:
        return _in_pieces(card, self.queries, place, letters, False)

    def of(self, query: int, row: int, shown: int) -> list[Any]:
        """What a pair carries of its first `shown` pieces: nothing, or [largest, thousandths(, those of the rest)]."""
        values = self.values.get((query, row))
        largest = 0.0 if values is None else float(np.abs(values).max(initial=0.0))
        if values is None or not largest:
            return []
        rest = round(1000 * float(values[shown:].sum()) / largest)
        thousandths = np.rint(1000 * values[:shown] / largest).astype(int).tolist()
        return [[float(f"{largest:.4g}"), thousandths, *([rest] if rest else [])]]


def _in_pieces(
    card: Mapping[str, Any], read: Callable[[int], Sequence[str]] | None, place: int, letters: int, coloured: bool
) -> dict[str, Any]:
    """letters: that a text may have."""
    shows = "k" in card or ("t" in card and not coloured) or ("i" in card and not coloured)
    if read is None or shows:
        return dict(card)
    pieces, most = read(place), min(PIECES, max(20, letters // 4))
    left = sum(map(len, pieces[most:]))
    rest = {name: value for name, value in card.items() if name not in ("t", "m")}
    return {**rest, "w": [cut(piece, 200)[0] for piece in pieces[:most]], **({"m": left} if left else {})}


def coloured(card: Mapping[str, Any], pair: Sequence[Any], scale: Scale) -> list[tuple[str, str, str]]:
    """Pieces with their colours and numbers, for a page without a script; none of a pair that carries nothing."""
    if len(pair) < 3 or "w" not in card:
        return []
    largest, shares = pair[2][:2]
    return [(w, level_of(s, 1000.0), scale.said(s / 1000 * largest)) for w, s in zip(card["w"], shares, strict=True)]


def left_off(card: Mapping[str, Any], pair: Sequence[Any], scale: Scale) -> str:
    """What the pieces add that a cut text leaves off; empty where there are none."""
    if "w" not in card or len(pair) < 3 or len(pair[2]) < 3:
        return ""
    largest, _, rest = pair[2]
    return scale.said(rest / 1000 * largest)
