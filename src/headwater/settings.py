"""Checks of settings: whole numbers, words of a list, amounts of memory."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from headwater.errors import InvalidSetting


def check_whole(name: str, value: object, least: int, most: int | None = None) -> None:
    """Errors: InvalidSetting for what is no whole number from `least` to `most`."""
    whole = value if isinstance(value, int | np.integer) and not isinstance(value, bool) else None
    if whole is None or whole < least or (most is not None and whole > most):
        wanted = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise InvalidSetting(f"{name} is {value!r}; expected a whole number {wanted}.")


def check_word(name: str, word: object, words: Sequence[str]) -> None:
    """Errors: InvalidSetting for what is none of the words."""
    if word not in words:
        raise InvalidSetting(f"{name} is {word!r}; expected one of {', '.join(map(repr, words))}.")


UNITS = {
    "": 1,
    "b": 1,
    "k": 10**3,
    "m": 10**6,
    "g": 10**9,
    "t": 10**12,
    "ki": 2**10,
    "mi": 2**20,
    "gi": 2**30,
    "ti": 2**40,
}


def bytes_of(amount: int | float | str, name: str = "memory") -> int:
    """2 * 2**30, "2GiB", "500 MB" as a number of bytes. Errors: InvalidSetting."""
    found = re.fullmatch(r"\s*([0-9.]+)\s*([kmgt]?i?)b?\s*", str(amount).lower())
    try:
        size = float(found[1]) * UNITS[found[2]] if found and not isinstance(amount, bool) else 0.0
    except (ValueError, KeyError):
        size = 0.0
    if size < 1:
        raise InvalidSetting(f"{name} is {amount!r}; expected a number of bytes, or words such as '2GiB' or '500MB'.")
    return int(size)
