"""The rows of a run: what they are called, whether they were fitted, and whether their scores are numbers."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from headwater.errors import BatchMismatch, InvalidInput, NonFiniteValue, RowsNotFitted
from headwater.gradients.provider import StructuredGradientProvider
from headwater.influence import ComposableInfluence
from headwater.rows import Found, Part, PlacedBatch, Rows, Visitor, sweep

Names = Sequence[Any] | np.ndarray


def check_scores(tile: np.ndarray, query_ids: Names, ids: Names, influence: ComposableInfluence) -> None:
    """Scores [..., q, n] of some train rows. Errors: NonFiniteValue, naming query and train row."""
    with np.errstate(invalid="ignore", over="ignore"):
        if np.isfinite(tile.sum()):  # a sum is finite only if all of it is
            return
    bad = np.argwhere(~np.isfinite(tile))
    if len(bad):
        *_, query, row = bad[0]
        raise NonFiniteValue(
            f"The score of query {query_ids[query]} and train row {ids[row]} is {tile[tuple(bad[0])]} ({len(bad)} of "
            f"{tile.size} in this batch are not finite). Numbers grow too large for {influence.source.dtype}: rescale "
            "the inputs (and the loss), or take model and inputs in float64.",
            [int(row)],
        )


class FittedRows(Visitor[PlacedBatch, "_Fitted", np.ndarray]):
    """The names of train rows, which ought to be those that were fitted: [n].

    forecast: whether their removal is forecast, which means nothing for others. queries_fitted: whether the queries
    are rows of the fit, so that loaders may have changed places. some_are_new: the caller knows of rows that were not
    fitted. Warns: RowsNotFitted, at the end. Errors: the same,
    at once, for a forecast.
    """

    def __init__(
        self,
        influence: ComposableInfluence,
        forecast: bool = False,
        queries_fitted: bool = False,
        some_are_new: bool = False,
    ):
        self.known, self.forecast, self.queries_fitted = influence.fitted_keys, forecast, queries_fitted
        self.some_are_new = some_are_new

    def of(self, item: PlacedBatch) -> _Fitted:
        """Errors: RowsNotFitted, where a forecast is asked for."""
        names = item.names
        if self.known is None or item.keys is None:
            return _Fitted([names])
        not_fitted = np.flatnonzero(~item.keys.among(self.known))
        if self.forecast and len(not_fitted):
            said = f"Train row {names[not_fitted[0]]} is not among the rows that were fitted, so that its removal"
            raise RowsNotFitted(f"{said} changes nothing.{self._swapped(len(not_fitted), len(names))} {WHICH_ROWS}")
        return _Fitted([names], len(not_fitted), len(names))

    def merge(self, one: _Fitted, other: _Fitted) -> _Fitted:
        one.names.extend(other.names)
        return _Fitted(one.names, one.missing + other.missing, one.compared + other.compared)

    def finish(self, whole: _Fitted) -> np.ndarray:
        if whole.missing and not (self.some_are_new and whole.missing < whole.compared):
            said = f"{whole.missing} of the {whole.compared} train rows are not among the rows that were fitted."
            swapped = self._swapped(whole.missing, whole.compared)
            warnings.warn(RowsNotFitted(f"{said}{swapped} {WHICH_ROWS}"), stacklevel=2)
        return joined_names(whole.names, "train")

    def _swapped(self, missing: int, rows: int) -> str:
        return SWAPPED if self.queries_fitted and missing == rows else ""


@dataclass(frozen=True, eq=False)
class _Fitted:
    """Names, and how many of the rows that were compared are not among those that were fitted."""

    names: list[np.ndarray]
    missing: int = 0
    compared: int = 0


SWAPPED = (
    " The query rows are: perhaps train and query loader are swapped, attribute(train, query); or the train rows have "
    "another dtype or preprocessing than in fit."
)
WHICH_ROWS = (
    "Give the rows that were fitted, without augmentation. The scores of other rows say what adding them would do, and "
    "forecast no removal."
)


def sweep_rows(
    provider: StructuredGradientProvider,
    loader: Iterable[object],
    visitor: Visitor[PlacedBatch, Part, Found],
    what: str,
    show: bool,
    role: str = "train",
) -> Found:
    """`sweep` over the rows of a run.

    Errors: BatchMismatch if positions do not name rows, because the loader gives other rows each time.
    """
    rows = Rows.of(provider, loader, role)
    rows.glance()
    return sweep(provider, rows, visitor, what, show)


def joined_names(parts: Sequence[np.ndarray], what: str) -> np.ndarray:
    """What the rows of several batches are called: [n]. Errors: InvalidInput for names of several kinds."""
    kinds = list(dict.fromkeys(_kind(part) for part in parts if len(part)))
    if len(kinds) > 1:
        at = sum(len(part) for part in parts[: [_kind(part) for part in parts].index(kinds[1])])
        # As words 1 and "1" would be one row, and nobody could ask for either.
        raise InvalidInput(
            f"The {what} rows have ids of several kinds: {kinds[0]} in the first batch, {kinds[1]} in that of row {at}."
            " Make words of them all (str), or whole numbers."
        )
    return np.concatenate(parts)


def _kind(names: np.ndarray) -> str:
    if names.dtype.kind == "O":
        return "words" if all(isinstance(name, str) for name in names.tolist()) else "other things"
    return {"i": "whole numbers", "u": "whole numbers", "U": "words", "T": "words"}.get(names.dtype.kind, "numbers")


def distinct(ids: np.ndarray, what: str) -> np.ndarray:
    """Errors: BatchMismatch, naming a row that came twice."""
    found, counts = np.unique(ids, return_counts=True)
    if (counts > 1).any():
        raise BatchMismatch(f"The {what} rows have the ids {found[counts > 1][:5].tolist()} more than once.")
    return ids
