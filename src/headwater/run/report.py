"""A page about an influence and two loaders: their scores, and what else it can tell of the rows.

One more pass over each loader finds the rows' own losses, their self-influence, which of them have the same content,
and what they look like where nobody says. Rows are matched by what they are called, whatever order they come in.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from headwater.arrays import Numbered, is_array, is_frame, to_numpy
from headwater.errors import InvalidInput, InvalidSetting, UnsupportedModel
from headwater.evaluate.verification import Verification
from headwater.influence import ComposableInfluence
from headwater.loaders.texts import Text, are_texts
from headwater.loaders.unlabelled import StandIns
from headwater.report import Card, Known, Suspects, write
from headwater.report.colours import TokenScores
from headwater.rows import Each, PlacedBatch, Rows
from headwater.run.attribute import attribute
from headwater.run.rows import sweep_rows
from headwater.run.tokens import PairTokens
from headwater.run.tokens import token_scores as scores_of_tokens
from headwater.run.verify import ROW, verify
from headwater.status import BlockStatus, status_of
from headwater.store.scores import Scores
from headwater.tables import shown, table

KEPT = 64 * 2**20
"""Bytes of rows that are held to be shown, where nobody says what they are."""
NO_TEXTS = "it needs rows that are texts, a language model's, with tokenizer="
KEPT_ALONE = "train rows that are kept gradients are no texts any more; give their loader"
PAIRS = {"rows": 6, "queries": 2}
"""Of a verification that the page asks for."""
VERIFIED = 2e6
"""Work, train rows times (parameters + what a row costs by itself), up to which it does so unasked: a few seconds."""


def report(
    influence: ComposableInfluence,
    train_loader: Iterable[object],
    query_loader: Iterable[object],
    path: str | os.PathLike[str],
    known: Known,
    *,
    scores: Scores | None = None,
    self_influence: bool = True,
    verified: bool | None = None,
    explain: str = "label",
    own_rows: bool = False,
    own_labels: bool = False,
    stand_ins: StandIns | None = None,
    normalise: str | None = None,
    token_scores: bool | None = None,
    progress: bool = False,
) -> Path:
    """See `Attributor.report`. own_rows, own_labels: whether `known` describes rows, and queries, by their loader.

    stand_ins: labels of query rows that have none, of which the page says nothing.
    """
    influence.ready()
    train, query = influence.train_rows(train_loader), influence.query_rows(query_loader)
    if scores is not None:
        _check_same(influence, scores)
    else:
        unit = "removal" if influence.method.predicts_removal and normalise is None else "influence"
        asked_for: dict[str, Any] = {"unit": unit, "by_block": False, "explain": explain, "normalise": normalise}
        scores = attribute(influence, train, query, **asked_for, progress=progress)
    look = _Look(influence, itself=self_influence, look=known.rows is None, predict=True)
    seen = _Seen.of(influence, train, scores.train_ids, "own losses", look, progress)
    asked_look = _Look(influence, itself=False, look=known.queries is None, predict=own_labels, stand_ins=stand_ins)
    asked = _Seen.of(influence, query, scores.query_ids, "query losses", asked_look, progress)
    # What the loaders themselves say is of other rows than the scores are.
    known = replace(
        known,
        rows=None if own_rows and seen.lacks else known.rows,
        queries=None if own_labels and asked.lacks else known.queries,
    )
    checks = [*known.checks, *_verified(influence, train, query, scores, known, verified, progress)]
    given = known.suspects
    suspects = Suspects(
        self_influence=seen.itself if given.self_influence is None else given.self_influence,
        losses=seen.losses if given.losses is None else given.losses,
        disagrees=None if seen.said is None or seen.y is None else seen.said != seen.y,
        copies=_copies(seen.keys),
        leaks=_leaks(seen.keys, asked.keys, scores.query_ids),
    )
    tokens = TokenScores(seen.pieces, asked.pieces)
    if token_scores is not False:
        wanted: dict[str, Any] = {"k": known.k, "explain": explain, "wanted": token_scores, "progress": progress}
        pairs = _pairs(influence, train, query, scores, seen, **wanted)
        tokens = replace(tokens, values=pairs.values, missed=pairs.missed)
    found = replace(
        known,
        tokens=tokens,
        rows=seen.card if known.rows is None else known.rows,
        queries=asked.card if known.queries is None else known.queries,
        suspects=suspects,
        query_losses=asked.losses,
        predictions=asked.said if known.predictions is None else known.predictions,
        checks=checks,
        details=_details(influence),
        made={"seed": influence.method.seed, "precision": influence.source.dtype, **(known.made or {})},
    )
    return write(scores, path, found)


def _verified(
    influence: ComposableInfluence,
    train: Rows,
    query: Rows,
    scores: Scores,
    known: Known,
    wanted: bool | None,
    progress: bool,
) -> list[Verification]:
    """Of a few pairs; none where it is not wanted, or there is one already. wanted: None where that is quick."""
    quick = len(scores.train_ids) * (sum(influence.provider.sizes.values()) + ROW) <= VERIFIED
    if not (quick if wanted is None else wanted) or train.is_kept:
        return []
    if any(isinstance(check, Verification) for check in known.checks):
        return []
    # Conjugate gradients go over all rows hundreds of times, which nobody has asked for.
    solves = wanted is not None
    return [verify(influence, train, query, **PAIRS, seed=0, solves=solves, progress=progress)]


def _pairs(
    influence: ComposableInfluence, train: Rows, query: Rows, scores: Scores, seen: _Seen, **options: Any
) -> PairTokens:
    """Options: of `run.tokens.token_scores`. Errors: likewise, and InvalidSetting for rows that are no texts."""
    if not isinstance(seen.tokens, str):
        return scores_of_tokens(influence, train, query, scores, seen.tokens, seen.text, **options)
    if options["wanted"]:
        kind = InvalidInput if seen.lacks else InvalidSetting
        raise kind(f"token_scores=True: {seen.tokens}.")
    return PairTokens({})


def described_by(loader: Any) -> Any:
    """What was given for rows, where it says by itself what they are: data frames, texts, data sets of dicts."""
    if isinstance(loader, tuple) and len(loader) == 2 and loader[1] is None:
        loader = loader[0]
    if isinstance(loader, list) and are_texts(loader):
        return {"text": loader}
    if isinstance(loader, tuple) and len(loader) == 2 and is_frame(loader[0]):
        return loader[0] if isinstance(loader[1], str) else loader
    if is_frame(loader):
        return loader
    if isinstance(loader, tuple) and len(loader) == 2 and are_texts(loader[0]) and not isinstance(loader[1], str):
        labels = is_array(loader[1]) or isinstance(loader[1], (list, tuple))
        return {"text": loader[0], "label": loader[1]} if labels else None
    numbered = isinstance(loader, Numbered) and not is_array(loader) and len(loader) > 0
    return loader if numbered and isinstance(loader[0], Mapping) else None


def _check_same(influence: ComposableInfluence, scores: Scores) -> None:
    """Errors: InvalidInput for scores that another influence made: the page would speak of two."""
    mine, theirs = influence.absolute_damping, dict(scores.damping)
    same = scores.method in ("", influence.method.describe()) and bool(np.isclose(scores.n_train, influence.n_train))
    same = (
        same and mine.keys() == theirs.keys() and all(np.isclose(mine[name], theirs[name], rtol=1e-4) for name in mine)
    )
    if not same:
        raise InvalidInput(
            f"scores= are of {scores.method}, damping {theirs}, {scores.n_train:g} rows; this influence is "
            f"{influence.method.describe()}, damping {mine}, {influence.n_train:g} rows. Leave scores= out, or call "
            "scores.report(...)."
        )


# What a pass sees -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Piece:
    """Of some rows."""

    names: np.ndarray
    losses: np.ndarray | None
    keys: np.ndarray | None
    """Of their content."""
    itself: np.ndarray | None
    x: np.ndarray | None
    y: np.ndarray | None
    said: np.ndarray | None
    """What the model predicts, as labels."""
    tokens: Sequence[np.ndarray] | str
    """Of each row; or why there are none."""


@dataclass(frozen=True, eq=False)
class _Seen:
    """Of all rows of a loader, in the order of the scores; None for what the loader or the model does not tell."""

    losses: np.ndarray | None
    keys: np.ndarray | None
    itself: np.ndarray | None
    x: np.ndarray | None
    y: np.ndarray | None
    said: np.ndarray | None
    tokens: Mapping[int, np.ndarray] | str
    """Of each row, by its place; or why there are none."""
    read: Callable[[np.ndarray], Text]
    places: Mapping[Any, int]
    lacks: bool = False
    """Whether rows of the scores are not in the loader."""
    texts: dict[int, Text] = field(default_factory=dict)
    """Those that were read."""

    @classmethod
    def of(
        cls,
        influence: ComposableInfluence,
        rows: Iterable[object],
        ids: np.ndarray,
        what: str,
        look: _Look,
        progress: bool,
    ) -> _Seen:
        places = {name: place for place, name in enumerate(ids.tolist())}
        if isinstance(rows, Rows) and rows.is_kept:  # gradients alone
            return cls(None, None, None, None, None, None, KEPT_ALONE, influence.text_of, places)
        role = "query" if what.startswith("query") else "train"
        visitor = Each[PlacedBatch, _Piece](look)
        pieces = sweep_rows(influence.provider, rows, visitor, what, progress, role)
        names = [name for piece in pieces for name in piece.names.tolist()]
        order = np.argsort([places[name] for name in names if name in places], kind="stable")
        chosen = np.flatnonzero([name in places for name in names])[order]
        count = len(places)
        return cls(
            losses=_joined([piece.losses for piece in pieces], chosen, count),
            keys=_joined([piece.keys for piece in pieces], chosen, count),
            itself=_joined([piece.itself for piece in pieces], chosen, count),
            x=_joined([piece.x for piece in pieces], chosen, count),
            y=_joined([piece.y for piece in pieces], chosen, count),
            said=_joined([piece.said for piece in pieces], chosen, count),
            tokens=_tokens(pieces, places),
            read=influence.text_of,
            places=places,
            lacks=len(chosen) < count,
        )

    def text(self, place: int) -> Text:
        assert not isinstance(self.tokens, str)
        if place not in self.texts:
            self.texts[place] = self.read(self.tokens[place])
        return self.texts[place]

    @property
    def pieces(self) -> Callable[[int], Sequence[str]] | None:
        """Of a row's text, by its place; None where rows are no texts."""
        return None if isinstance(self.tokens, str) else lambda place: self.text(place).pieces

    def card(self, name: Any) -> Card | None:
        """What the row looks like, of its id."""
        place = self.places[name]
        label = "" if self.y is None else str(self.y[place])
        if self.x is None:
            return Card(label=label) if label else None
        row = self.x[place]
        if row.ndim == 1:
            return Card(columns={f"x{k}": value for k, value in enumerate(row)}, label=label)
        return Card(image=row, label=label)


def _joined(parts: Sequence[np.ndarray | None], chosen: np.ndarray, count: int) -> np.ndarray | None:
    """None where a part is missing, where parts do not fit together, or where rows of the scores are not there."""
    there = [part for part in parts if part is not None]
    if len(there) < len(parts) or len(chosen) < count or len({part.shape[1:] for part in there}) > 1:
        return None
    found: np.ndarray = np.concatenate(there)[chosen]
    return found


def _tokens(pieces: Sequence[_Piece], places: Mapping[Any, int]) -> dict[int, np.ndarray] | str:
    """By the rows' places; or why there are none, where a part is missing as in `_joined`."""
    found: dict[int, np.ndarray] = {}
    for piece in pieces:
        if isinstance(piece.tokens, str):
            return piece.tokens
        named = zip(piece.names.tolist(), piece.tokens, strict=True)
        found |= {places[name]: tokens for name, tokens in named if name in places}
    missing = [str(name) for name, place in places.items() if place not in found]
    return f"scores= have the row {missing[0]!r}, which train_loader has not" if missing else found


class _Look:
    """What is asked of each piece of a pass; what it looks like only as long as there is room."""

    def __init__(
        self,
        influence: ComposableInfluence,
        *,
        itself: bool,
        look: bool,
        predict: bool,
        stand_ins: StandIns | None = None,
    ):
        self.influence, self.itself, self.predict, self.room = influence, itself, predict, KEPT if look else 0
        self.texts, self.stand_ins = KEPT, stand_ins

    @property
    def labelled(self) -> bool:
        """Whether all rows so far have labels of their own."""
        return self.stand_ins is None or not self.stand_ins.used

    def __call__(self, piece: PlacedBatch) -> _Piece:
        provider, x = self.influence.provider, self._shown(piece.batch.x)
        itself = self.influence.self_influence_of(piece.self_grads(provider)) if self.itself else None
        return _Piece(
            names=np.asarray(piece.names),
            losses=self._losses(piece),
            keys=None if piece.keys is None else piece.keys.content,
            itself=None if itself is None else to_numpy(itself).astype(np.float64),
            x=x,
            y=self._labels(piece.batch.y) if self.labelled else None,
            said=self._predicted(piece),
            tokens=self._tokens(piece),
        )

    def _tokens(self, piece: PlacedBatch) -> Sequence[np.ndarray] | str:
        found = self.influence.tokens_of(piece.batch)
        if found is None:
            return NO_TEXTS
        self.texts -= sum(tokens.nbytes for tokens in found)
        return found if self.texts >= 0 else f"the rows' tokens take more than {KEPT / 2**20:g} MiB"

    def _losses(self, piece: PlacedBatch) -> np.ndarray | None:
        if not self.labelled:  # of a label that stands in for none
            return None
        try:
            return to_numpy(self.influence.provider.losses(piece.batch)).astype(np.float64)
        except UnsupportedModel:  # the page says nothing of losses then
            return None

    def _predicted(self, piece: PlacedBatch) -> np.ndarray | None:
        """Where rows have labels of their own, which these can be compared with."""
        if not (self.predict or not self.labelled) or self._labels(piece.batch.y) is None:
            return None
        try:
            return self._labels(self.influence.source.predicted(piece.batch).y)
        except (UnsupportedModel, InvalidSetting):  # of a loss without labels, say
            return None

    def _labels(self, y: Any) -> np.ndarray | None:
        """Whole numbers or words, one a row."""
        if not is_array(y) or y.ndim != 1 or to_numpy(y).dtype.kind not in "iub":
            return None
        return np.asarray(to_numpy(self.influence.source.labels_of(y)))

    def _shown(self, x: Any) -> np.ndarray | None:
        if not is_array(x) or x.ndim not in (2, 3, 4):
            return None
        values = to_numpy(x)
        # Whole numbers in a row are numbers of tokens: they say nothing without their words.
        if values.ndim == 2 and values.dtype.kind in "iu":
            return None
        self.room -= values.nbytes
        return values if self.room >= 0 else None


def _copies(keys: np.ndarray | None) -> list[list[int]] | None:
    """Places of rows with the same content, two or more each."""
    if keys is None:
        return None
    order = np.argsort(keys, kind="stable")
    ends = np.flatnonzero(np.diff(keys[order])) + 1
    return [sorted(group.tolist()) for group in np.split(order, ends) if len(group) > 1]


def _leaks(train: np.ndarray | None, query: np.ndarray | None, query_ids: np.ndarray) -> list[tuple[int, str]] | None:
    """Train rows with the content of a query, and the name of that."""
    if train is None or query is None:
        return None
    first = {int(key): place for place, key in reversed(list(enumerate(query.tolist())))}
    return [(place, str(query_ids[first[key]])) for place, key in enumerate(train.tolist()) if key in first]


def _details(influence: ComposableInfluence) -> str:
    """The blocks, without what it would cost products to ask."""
    status = status_of(influence)
    rows = [[name, *_cells(block)] for name, block in status.blocks.items()]
    return table([["block", "parameters", "damping", "mean eigenvalue", "kept"], *rows])


def _cells(block: BlockStatus) -> list[str]:
    kept = "all" if block.kept_rank is None else str(block.kept_rank)
    return [f"{block.size:,}", shown(block.damping), shown(block.mean_eigenvalue), kept]
