"""Rows, and groups of rows, as a user names them by their positions: checked once, for all that take them."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from headwater.errors import BatchMismatch, InvalidInput


def row_positions(rows: ArrayLike, count: int, said: str, *, distinct: bool = True) -> NDArray[np.int64]:
    """Positions [k] of some of `count` rows. said: what they are, in words ("The rows kept").

    Errors: InvalidInput for masks, numbers that are not whole, and rows that are not there; BatchMismatch for a row
    twice, if they are to be distinct.
    """
    chosen = np.atleast_1d(np.asarray(rows))
    if chosen.ndim != 1 or (chosen.size and chosen.dtype.kind not in "iu"):
        raise InvalidInput(f"{said} are {rows!r:.60}; expected positions of rows (of a mask: flatnonzero).")
    if chosen.size and (chosen.min() < 0 or chosen.max() >= count):
        raise InvalidInput(f"{said} go from {chosen.min()} to {chosen.max()}; there are {count}.")
    if distinct and len(np.unique(chosen)) < len(chosen):
        raise BatchMismatch(f"{said} have a row more than once: {rows!r:.60}.")
    return chosen.astype(np.int64)


def row_groups(groups: Iterable[ArrayLike] | None, count: int) -> list[NDArray[np.int64]]:
    """The rows of each group; None: every row by itself. Errors: those of `row_positions`; InvalidInput for none."""
    if groups is None:
        return [np.array([k]) for k in range(count)]
    found = [row_positions(group, count, f"The rows of group {number}") for number, group in enumerate(groups)]
    if not found:
        raise InvalidInput("There are no groups; pass None for every row by itself.")
    for number, group in enumerate(found):
        if not len(group):
            raise InvalidInput(f"Group {number} is empty; expected one or more rows' positions.")
    return found
