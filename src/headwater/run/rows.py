"""The rows of a run: what they are called, whether they were fitted, and whether their scores are numbers."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from headwater.arrays import is_array, to_numpy
from headwater.curvature.passes import Piece, known_rows, read
from headwater.errors import BatchMismatch, NonFiniteValue, RowsNotFitted
from headwater.gradients.provider import StructuredGradientProvider
from headwater.influence import ComposableInfluence

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


def train_batches(
    influence: ComposableInfluence,
    loader: Iterable[Any],
    what: str,
    progress: bool,
    forecast: bool = False,
    queries_fitted: bool = False,
) -> Iterator[tuple[Any, np.ndarray, int]]:
    """`named_batches` of train rows, which ought to be those that were fitted.

    forecast: whether their removal is forecast, which means nothing for others. queries_fitted: whether the queries
    are rows of the fit, so that loaders may have changed places. Warns: RowsNotFitted, at the end. Errors: the same,
    at once, for a forecast.
    """
    known, missing, total = influence.fitted_keys, 0, 0
    for piece, names in named_pieces(influence.provider, loader, what, progress, "train"):
        if known is not None and piece.keys is not None:
            strange = np.flatnonzero(~piece.keys.among(known))
            if forecast and len(strange):
                said = f"Train row {names[strange[0]]} is not among the rows that were fitted, so that its removal"
                swapped = SWAPPED if queries_fitted and len(strange) == len(names) else ""
                raise RowsNotFitted(f"{said} changes nothing.{swapped} {WHICH_ROWS}")
            missing, total = missing + len(strange), total + len(names)
        yield piece.batch, names, piece.start
    if missing:
        swapped = SWAPPED if queries_fitted and missing == total else ""
        said = f"{missing} of the {total} train rows are not among the rows that were fitted.{swapped} {WHICH_ROWS}"
        warnings.warn(RowsNotFitted(said), stacklevel=2)


SWAPPED = (
    " The query rows are: perhaps train and query loader are swapped, attribute(train, query); or the train rows have "
    "another dtype or preprocessing than in fit."
)
WHICH_ROWS = (
    "Give the rows that were fitted, without augmentation. The scores of other rows say what adding them would do, and "
    "forecast no removal."
)


def named_batches(
    provider: StructuredGradientProvider, loader: Iterable[Any], what: str, progress: bool, role: str = "query"
) -> Iterator[tuple[Any, np.ndarray, int]]:
    """Batches, the names of their rows (their own ids, or positions in the loader), and where each starts.

    Errors: BatchMismatch if positions do not name rows, because the loader gives other rows each time.
    """
    for piece, names in named_pieces(provider, loader, what, progress, role):
        yield piece.batch, names, piece.start


def named_pieces(
    provider: StructuredGradientProvider, loader: Iterable[Any], what: str, progress: bool, role: str
) -> Iterator[tuple[Piece, np.ndarray]]:
    """Errors: as `named_batches`."""
    rows = known_rows(provider, loader, role)
    rows.glance()
    for piece in read(provider, rows, what, progress):
        ids = piece.batch.ids
        if ids is None:
            ids = np.arange(piece.start, piece.start + len(piece.batch))
        yield piece, np.asarray(to_numpy(ids) if is_array(ids) else ids)


def distinct(ids: np.ndarray, what: str) -> np.ndarray:
    found, counts = np.unique(ids, return_counts=True)
    if (counts > 1).any():
        raise BatchMismatch(f"The {what} rows have the ids {found[counts > 1][:5].tolist()} more than once.")
    return ids
