"""Rows by what they are called, and what else is known of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from headwater.errors import InvalidInput, ShapeMismatch


@dataclass(frozen=True, eq=False)
class NamedColumns:
    """Columns, by name, of rows with ids: [n] each."""

    ids: np.ndarray
    columns: Mapping[str, np.ndarray] = field(default_factory=dict)

    def of(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        """The columns' entries for these rows, in the shape of `ids`. Errors: InvalidInput, naming one not there."""
        if not self.columns:
            return {}
        places = places_of(self.ids, ids.reshape(-1), "train").reshape(ids.shape)
        return {name: column[places] for name, column in self.columns.items()}


def count_from_zero(ids: np.ndarray) -> bool:
    """Whether these are what rows without names are called: 0, 1, 2, ..."""
    return ids.dtype.kind in "iu" and bool(np.array_equal(ids, np.arange(len(ids))))


def places_of(ids: np.ndarray, wanted: Any, what: str) -> np.ndarray:
    """Errors: InvalidInput, naming an id that is not there."""
    if wanted is None:
        return np.arange(len(ids))
    names = np.atleast_1d(np.asarray(wanted))
    if names.dtype.kind == "b":
        raise InvalidInput(f"{what} is a mask; give ids: scores.{what}_ids[mask].")
    order = np.argsort(ids, kind="stable")
    place = np.minimum(np.searchsorted(ids[order], names), max(len(ids) - 1, 0))
    found = order[place]
    missing = names[ids[found] != names].tolist()
    if missing:
        raise InvalidInput(f"There is no {what} row {missing[0]!r}: ids are like {ids[:3].tolist()}.")
    return found


def check_columns(columns: Mapping[str, np.ndarray], rows: int, what: str) -> None:
    """Errors: ShapeMismatch for a column that does not have an entry for each row."""
    for name, column in columns.items():
        if column.shape != (rows,):
            raise ShapeMismatch(f"Column {name!r} has shape {column.shape}; there are {rows} {what}.")
