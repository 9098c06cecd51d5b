"""What each token of the rows on a page adds to their scores: of the pairs that are shown, and of no other.

A score is linear in the train row's gradient, and that is a sum over the row's labels; so each label has a share, and
the shares add up to the score (`HfComposableInfluence.token_scores`). Each query goes through the inverse once more,
and its few rows through one derivative along what comes out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from headwater.errors import InvalidInput, InvalidSetting, UnsupportedModel
from headwater.influence import ComposableInfluence
from headwater.loaders.texts import Text
from headwater.report.gather import gather
from headwater.report.job import SHOWN
from headwater.rows import Each, PlacedBatch
from headwater.run.queries import Asked
from headwater.run.rows import sweep_rows
from headwater.store.scores import Scores
from headwater.types import Batch, join

UNASKED = 2e10
"""Work, parameters times tokens of all pairs, up to which it is done unasked: some seconds on one core."""
GAP = 0.01
"""By how much of their sizes tokens may miss the score, before they are taken for those of another one."""
SCALED = {"influence", "removal"}
"""Units whose tokens' scale is known; directions are divided by what belongs to the whole row."""


@dataclass(frozen=True)
class PairTokens:
    """Of the pairs that a page shows."""

    values: Mapping[tuple[int, int], np.ndarray]
    """By places in the scores: a number for each piece of the train row's text, whose sum is the score."""
    missed: int = 0
    """Pairs whose tokens add up to another score than the page's."""


def token_scores(
    influence: ComposableInfluence,
    train: Iterable[object],
    query: Iterable[object],
    scores: Scores,
    tokens: Mapping[int, np.ndarray],
    text: Callable[[int], Text],
    k: int,
    explain: str,
    wanted: bool | None,
    progress: bool = False,
) -> PairTokens:
    """tokens: numbers of each train row's tokens, by its place; text: its text. wanted: None to do it if that is quick.

    Pairs whose query the loader has not are left out. Errors, if it was wanted: UnsupportedModel and InvalidSetting
    where tokens have no scores; InvalidInput for such a query.
    """
    top = gather(scores, k, min(SHOWN, len(scores.query_ids))).top
    pairs: dict[int, dict[int, float]] = {
        place: {
            int(row): float(score)
            for ids, found in ((top.helpful_ids, top.helpful_scores), (top.harmful_ids, top.harmful_scores))
            for row, score in zip(ids[place].tolist(), found[place].tolist(), strict=True)
        }
        for place in range(len(top.helpful_ids))
    }
    work = influence.n_parameters * sum(len(tokens[row]) for rows in pairs.values() for row in rows)
    if wanted is None and (work > UNASKED or influence.solves):
        return PairTokens({})
    asked = _rows_named(Asked.of(influence, query, explain).pieces, scores.query_ids, set(pairs))
    if wanted:
        _check_there(pairs, asked, scores.query_ids)
    pairs = {place: found for place, found in pairs.items() if place in asked}
    wanted_rows = {row for rows in pairs.values() for row in rows}
    rows = _found(influence, train, scores.train_ids, wanted_rows, progress)
    values: dict[tuple[int, int], np.ndarray] = {}
    missed = 0
    try:
        for place, found in pairs.items():
            batches = join([rows[row] for row in found])
            shares = [each for batch in batches for each in influence.token_scores_of(asked[place], batch)]
            for (row, score), share in zip(found.items(), shares, strict=True):
                scaled = _scaled(share[0], score, scores)
                if scaled is not None:
                    values[place, row] = text(row).sums(scaled)
                else:
                    missed += 1
    except (UnsupportedModel, InvalidSetting):  # the page shows texts without colours then
        if wanted:
            raise
    if wanted and missed and not values:
        raise InvalidSetting(
            f"token_scores=True: of none of the {missed} pairs do the tokens add up to the score. Are scores= those of "
            "this influence, these loaders and this explain=?"
        )
    return PairTokens(values, missed)


def _check_there(wanted: Iterable[int], found: Mapping[int, Batch], ids: np.ndarray) -> None:
    missing = [str(ids[place]) for place in wanted if place not in found]
    if missing:
        raise InvalidInput(
            f"token_scores=True needs the queries of scores=, and query_loader lacks {len(missing)} of them, such as "
            f"{missing[0]!r}: give the loader that the scores are of, or leave token_scores= out."
        )


def _found(
    influence: ComposableInfluence, train: Iterable[object], ids: np.ndarray, wanted: set[int], progress: bool
) -> dict[int, Batch]:
    """The rows of these places, in a pass that keeps no other."""
    visitor = Each[PlacedBatch, dict[int, Batch]](lambda piece: _rows_named([piece], ids, wanted))
    return {
        k: v for part in sweep_rows(influence.provider, train, visitor, "tokens", progress) for k, v in part.items()
    }


def _rows_named(pieces: Iterable[PlacedBatch], ids: np.ndarray, wanted: set[int]) -> dict[int, Batch]:
    """Rows by their places in the scores, each a batch of its own."""
    places = {name: place for place, name in enumerate(ids.tolist())}
    return {
        places[name]: piece.batch.take(slice(k, k + 1))
        for piece in pieces
        for k, name in enumerate(piece.names.tolist())
        if places.get(name) in wanted
    }


def _scaled(share: np.ndarray, score: float, scores: Scores) -> np.ndarray | None:
    """Tokens' numbers in the unit of the scores: their sum is the score; None where it is not."""
    whole, size = float(share.sum()), float(np.abs(share).sum())
    if not size:
        return None if score else share
    if scores.unit not in SCALED:
        return share * (score / whole) if whole * score > 0 else None
    scale = 1.0 / scores.n_train if scores.unit == "removal" else 1.0
    return share * scale if abs(scale * whole - score) <= GAP * scale * size else None
