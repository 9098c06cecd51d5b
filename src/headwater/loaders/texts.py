"""Rows that are texts: the pieces of one, and the tokens that each is made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from headwater.arrays import is_array, is_frame

BYTES = 8
"""Tokens after which a letter that does not come to its end is taken as it is: no letter has more bytes."""
BROKEN = "\N{REPLACEMENT CHARACTER}"


def are_texts(held: Any) -> bool:
    """Whether it is a list, an array or a column of strings."""
    if isinstance(held, list) or is_array(held) or is_frame(held):
        first = held.iloc[0] if is_frame(held) and len(held) else held[0] if len(held) else None
        return isinstance(first, str)
    return False


@dataclass(frozen=True)
class Text:
    """Pieces of a text, in order; most are a token each."""

    pieces: Sequence[str]
    ends: Sequence[int]
    """How many tokens come before the end of each piece."""

    def __str__(self) -> str:
        return "".join(self.pieces)

    def sums(self, values: np.ndarray) -> np.ndarray:
        """Numbers of the tokens, summed for each piece: [pieces]. Their sum is that of all tokens."""
        along = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
        found: np.ndarray = np.diff(along[[0, *self.ends]])
        return found


def text_of(ids: Sequence[int], decode: Callable[[Sequence[int]], str]) -> Text:
    """The text of some tokens, in pieces: what each adds to the text of those before it.

    A token by itself may be no text (a part of a letter), or another one than within its word; so each is read with
    the piece before it, and one that ends within a letter belongs to the piece of those that follow.
    """
    pieces: list[str] = []
    ends: list[int] = []
    start = read = 0
    for end in range(1, len(ids) + 1):
        before, now = decode(ids[start:read]), decode(ids[start:end])
        whole = not now.endswith(BROKEN) or end - read >= BYTES
        if len(now) > len(before) and whole:
            pieces.append(now[len(before) :] if now.startswith(before) else decode(ids[read:end]))
            ends.append(end)
            start, read = read, end
    if read < len(ids):  # what adds nothing to the text, or never became a letter
        rest = decode(ids[start:])[len(decode(ids[start:read])) :]
        pieces, ends = ([*pieces, rest], [*ends, len(ids)]) if rest or not ends else (pieces, [*ends[:-1], len(ids)])
    return Text(tuple(pieces), tuple(ends))
