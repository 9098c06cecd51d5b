"""Text from data, as a page shows it: what cannot be seen is made visible, and what is too long is cut.

A control character, a mark that turns the writing direction, or a letter of Unicode's tag block can hide or reorder
what stands beside it; each is shown as its escape (`\\u202e`). Line breaks, tabs, spaces of any width and the joiners
that emoji and Persian are written with stay.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from headwater import tables

KEPT = "\n\t\u200c\u200d"
"""Characters of the hidden kinds that stay."""
MINUS = "\N{MINUS SIGN}"


def visible(text: str) -> str:
    """The text with its invisible characters as escapes; lone surrogates too, which no file can hold."""
    return tables.visible(text.replace("\r\n", "\n"), KEPT)


def cut(text: str, limit: int) -> tuple[str, int]:
    """The first `limit` characters, made visible, and how many were left off."""
    return visible(text[:limit]), max(0, len(text) - limit)


def one_line(value: Any, limit: int = 120) -> str:
    """A scalar as a short line: numbers in four digits, text cut, line breaks as spaces."""
    if isinstance(value, np.generic | np.ndarray) and np.ndim(value) == 0:
        value = value.item()
    if isinstance(value, float):
        return number(value)
    text = " ".join(str(value).split()) if isinstance(value, str) else str(value)
    shown, left = cut(text, limit)
    return f"{shown} …" if left else shown


def number(value: float, digits: int = 4) -> str:
    """Few digits, thousands apart, with a true minus sign; from a thousand on two decimals, so that they differ."""
    if 1e3 <= abs(value) < 1e12:
        return f"{value:,.2f}".removesuffix(".00").replace("-", MINUS)
    return f"{value:.{digits}g}".replace("-", MINUS)


def signed(value: float) -> str:
    """A score in three digits, its sign always shown; so small ones as powers of ten."""
    return f"{value:+.3g}".replace("-", MINUS)
