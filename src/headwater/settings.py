"""Checks of settings: whole numbers, and words of a list."""

from __future__ import annotations

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
