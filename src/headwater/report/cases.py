"""Queries beside the train rows that act on them, as plain JSON: what a page's script reads.

    known        what is known of a job besides its scores
    Sides        what the queries and the train rows are, one by one
    Drawn        some queries, and rows beside them: each card and each picture once

`queries` of the data has for each: q, its id; c, its card; up, down, [number of the row in `rows`, score, and what its
tokens add to it, as `headwater.report.colours` says]; p, the prediction, and w, 1 if it is wrong; g, the group; s, z,
the own loss in words and as a number; x, u, the power of ten of its scores, and in words; r, why not to trust it; f,
why to look twice. Of `rows`: id, c, g and f. `images` are data URIs, `names` those of columns, and `kind` says how
cards lie side by side. What there is not is left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from headwater.arrays import is_array, is_frame, to_numpy
from headwater.errors import InvalidInput, NonFiniteValue, ShapeMismatch
from headwater.evaluate.checks import Floats
from headwater.report.cards import LABELS, Card, Deck, card_of, letters_for
from headwater.report.colours import TokenScores
from headwater.report.figures import Fact, Section
from headwater.report.gather import Groups, Scale
from headwater.report.rows import GROUPS, LISTED, Suspects
from headwater.report.text import number, one_line
from headwater.report.trust import Check, unsolved
from headwater.store.described import Described
from headwater.store.score_matrix import ScoreMatrix
from headwater.store.topk import TopK

TITLE = "Which training rows are behind these predictions?"
ROOM = 620_000
"""Bytes of a page for the pictures and texts of its rows; the rest of a megabyte is for all else."""
READ = 50_000
"""Rows of a data set that are all read for their labels."""
NAME = 200
"""Characters of an id that are shown."""


@dataclass(frozen=True, eq=False)
class Known:
    """What is known of a job besides its scores. All of it is optional."""

    rows: Any = None
    """What the train rows are: see `Scores.report`."""
    queries: Any = None
    k: int = 5
    title: str = TITLE
    lead: str = ""
    groups: Any = None
    predictions: Any = None
    suspects: Suspects = field(default_factory=Suspects)
    query_losses: Floats | None = None
    """[query]."""
    checks: Sequence[Check] = ()
    made: Mapping[str, object] | None = None
    facts: Sequence[Fact] = ()
    sections: Sequence[Section] = ()
    """Of the reader's own, before what to trust."""
    note: str = ""
    """What else there is to know of a score."""
    details: str = ""
    """The blocks, as a table in plain characters."""
    tokens: TokenScores = field(default_factory=TokenScores)


# What the rows are ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Side:
    """The queries or the train rows: ids, what each is, and columns with something of all of them."""

    ids: np.ndarray
    columns: Mapping[str, np.ndarray]
    described: Described | None
    positions: bool = False
    """Whether ids are the rows' positions in their loader."""
    attached: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Columns of the scores, which stand on the cards beside what the rows are."""

    @classmethod
    def of(cls, given: Any, ids: np.ndarray, columns: Mapping[str, np.ndarray], what: str, positions: bool) -> Side:
        """Errors: InvalidInput for what does not describe the rows."""
        if given is None:
            return cls(ids, columns, None, positions, columns)
        found = Described.of(given, ids, what, positions)
        # A function may be slow, or draw pictures: it is asked for what is shown alone. So is what is very long.
        reads = not callable(given) and len(ids) <= READ
        return cls(ids, {**(found.columns() if reads else {}), **columns}, found, positions, columns)

    def item(self, place: int) -> Any:
        """What the row is; where nobody said, its columns; else None."""
        if self.described is not None:
            return self.described.item(place)
        return {name: column[place] for name, column in self.columns.items()} or None

    def card(self, place: int) -> Card:
        item = self.item(place)
        if isinstance(item, Mapping) and not self.positions:  # what the row is called stands on the card already
            item = {name: value for name, value in item.items() if str(value) != str(self.ids[place])}
        found, label = card_of(item), self.label_column
        more = {name: column[place] for name, column in self.attached.items() if name != label}
        found = replace(found, columns={**more, **found.columns})
        return found if found.label or label is None else replace(found, label=one_line(self.columns[label][place]))

    def label(self, place: int, shown: str | None) -> Any:
        """As it was given, else as it is shown."""
        return shown if self.label_column is None else self.columns[self.label_column][place]

    @property
    def label_column(self) -> str | None:
        return next((name for name in LABELS if name in self.columns), None)

    def words(self, name: str) -> list[str]:
        """A column as short texts."""
        return [one_line(value) for value in self.columns[name]]


def _groups(given: Any, train: Side, query: Side) -> tuple[Groups | None, Groups | None]:
    """Of train rows and of queries: what was given, else their labels if these are few.

    given: a column's name; a label for each train row; or a mapping from ids to labels.
    """
    if given is None:
        labels = [side.words(side.label_column) if side.label_column is not None else None for side in (train, query)]
        few = [None if found is None or len(set(found)) > GROUPS else found for found in labels]
        return tuple(None if found is None else Groups.among(found) for found in few)  # type: ignore[return-value]
    if isinstance(given, str):
        if given not in train.columns:
            raise InvalidInput(f"groups={given!r}: the train rows have the columns {sorted(train.columns)}.")
        names = query.words(given) if given in query.columns else None
        few_names = names is not None and len(set(names)) <= GROUPS
        return Groups.among(train.words(given)), Groups.among(names) if names is not None and few_names else None
    return Groups.among([one_line(value) for value in _each(given, train, "groups")]), None


def _each(given: Any, side: Side, what: str) -> list[Any]:
    """Something for each row. Errors: InvalidInput for a row without it; ShapeMismatch."""
    ids = side.ids
    if is_frame(given):  # a Series, by its index
        column = next(iter(Described.of(given, ids, what, side.positions).columns().values()), np.empty(0))
        return list(column.tolist())
    if isinstance(given, Mapping):
        missing = [name for name in ids.tolist() if name not in given]
        if missing:
            raise InvalidInput(f"{what} has nothing for row {missing[0]!r}.")
        return [given[name] for name in ids.tolist()]
    if callable(given):
        return [given(name) for name in ids.tolist()]
    values = list(to_numpy(given).tolist() if is_array(given) else given)
    if len(values) != len(ids):
        raise ShapeMismatch(f"{what} has {len(values)} entries; there are {len(ids)} rows.")
    return values


def numbers(name: str, given: Any, count: int) -> Floats | None:
    """[count] in float64. Errors: ShapeMismatch; NonFiniteValue."""
    if given is None:
        return None
    values = np.asarray(to_numpy(given) if is_array(given) else given, dtype=np.float64)
    if values.shape != (count,):
        raise ShapeMismatch(f"{name} has shape {values.shape}; expected ({count},), one number for each row.")
    if not np.isfinite(values).all():
        raise NonFiniteValue(f"{int((~np.isfinite(values)).sum())} of {count} numbers of {name} are not finite.")
    return values


def _notes(suspects: Suspects) -> dict[int, str]:
    """What a reader should know of a train row wherever it is shown."""
    found = {int(row): "its label may be wrong" for row in suspects.mislabelled[:LISTED]}
    for rows in suspects.copies or ():
        found |= {row: "; ".join(filter(None, [found.get(row), f"one of {len(rows)} copies"])) for row in rows}
    return found


def is_wrong(label: Any, predicted: Any) -> bool:
    """Whether it is another label; of fractions, which are no labels, nothing is said."""
    if label is None:
        return False
    try:
        one, other = float(label), float(predicted)
    except (TypeError, ValueError):
        return str(label) != str(predicted)
    return one != other and one.is_integer() and other.is_integer()


def _predictions(given: Any, query: Side) -> list[Any] | None:
    if given is None:
        return None
    if isinstance(given, str):
        if given not in query.columns:
            raise InvalidInput(f"predictions={given!r}: the queries have the columns {sorted(query.columns)}.")
        return list(query.columns[given].tolist())
    return _each(given, query, "predictions")


@dataclass(frozen=True, eq=False)
class Sides:
    """What is known of queries and train rows, one by one; places are theirs in the scores."""

    train: Side
    query: Side
    groups: Groups | None
    """Of the train rows."""
    query_groups: Groups | None
    predicted: Sequence[Any] | None
    """[query]."""
    losses: Floats | None
    """[query]: their own."""
    doubts: Mapping[int, str]
    """Why not to trust a query's scores."""
    notes: Mapping[int, str]
    """What a reader should know of a train row wherever it is shown."""
    tokens: TokenScores = field(default_factory=TokenScores)

    @classmethod
    def of(cls, scores: ScoreMatrix, known: Known) -> Sides:
        """Errors: InvalidInput, ShapeMismatch and NonFiniteValue for what does not fit the rows."""
        asked, called = scores.are_positions
        train = Side.of(known.rows, scores.train_ids, scores.train_columns, "rows", called)
        query = Side.of(known.queries, scores.query_ids, scores.query_columns, "queries", asked)
        return cls(
            train,
            query,
            *_groups(known.groups, train, query),
            _predictions(known.predictions, query),
            numbers("query_losses", known.query_losses, len(scores.query_ids)),
            unsolved(scores),
            _notes(known.suspects),
            known.tokens,
        )

    def about_query(self, place: int, card: Mapping[str, Any]) -> dict[str, Any]:
        """All but the rows beside it. card: as drawn."""
        found: dict[str, Any] = {"q": one_line(str(self.query.ids[place]), NAME), "c": card}
        if self.predicted is not None:
            found["p"] = one_line(self.predicted[place])
            if is_wrong(self.query.label(place, card.get("l")), self.predicted[place]):
                found["w"] = 1
        if self.query_groups is not None:
            _grouped(found, self.query_groups, place)
        if self.losses is not None:
            found["s"], found["z"] = number(float(self.losses[place]), 3), float(f"{self.losses[place]:.5g}")
        if place in self.doubts:
            found["r"] = self.doubts[place]
        return found

    def about_row(self, place: int, card: Mapping[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = {"id": one_line(str(self.train.ids[place]), NAME), "c": card}
        if self.groups is not None:
            _grouped(found, self.groups, place)
        if place in self.notes:
            found["f"] = self.notes[place]
        return found

    def turned(self) -> Sides:
        """Train rows in the place of queries, and the other way round: what a row helps and harms."""
        return Sides(self.query, self.train, self.query_groups, self.groups, None, None, self.notes, self.doubts)


def _grouped(found: dict[str, Any], groups: Groups, place: int) -> None:
    """With the group, unless the card's label says it already."""
    group = groups.names[groups.of[place]]
    if group != found["c"].get("l"):
        found["g"] = group


# Drawn ----------------------------------------------------------------------------------------------------------------


class Drawn:
    """The cards of some queries, and of the train rows that they and the lists beside them name."""

    def __init__(self, sides: Sides, queries: Sequence[int], top: TopK, listed: Iterable[int] = (), room: int = ROOM):
        """top: of these queries; in place of ids it has places of train rows."""
        self.sides, self.top, self.places = sides, top, queries
        ends = [end[scores * sign > 0] for end, scores, sign in _ends(top)]
        places = np.unique(np.concatenate([*ends, np.array(list(listed), dtype=np.int64)])).astype(np.int64)
        self.place = {int(place): number for number, place in enumerate(places)}
        """Of a train row: its number in `rows`."""
        rows = [sides.train.card(place) for place in self.place]
        asked = [sides.query.card(place) for place in queries]
        self.deck, self.kind, self.room = dealt([*rows, *asked], room)
        letters, tokens = self.deck.letters, sides.tokens
        self._rows = [
            tokens.row(place, self.deck.draw(card), letters) for place, card in zip(self.place, rows, strict=True)
        ]
        self._asked = [
            tokens.query(place, self.deck.draw(card), letters) for place, card in zip(queries, asked, strict=True)
        ]

    def data(self) -> tuple[dict[str, Any], str]:
        """As the module says, and what was done to pictures so that there is room, in words."""
        images, said = self.deck.images.encoded(self.room)
        found = {
            "queries": self.queries(),
            "rows": [self.sides.about_row(place, c) for place, c in zip(self.place, self._rows, strict=True)],
            "images": images,
            "names": list(self.deck.names),
            "kind": self.kind,
        }
        return found, said

    def queries(self) -> list[dict[str, Any]]:
        found = []
        for turn, (place, card) in enumerate(zip(self.places, self._asked, strict=True)):
            up, down = (self._pairs(place, end[turn], scores[turn], sign) for end, scores, sign in _ends(self.top))
            beside = {"up": up, "down": down, **scaled(up, down)}
            about = self.sides.about_query(place, card)
            found.append({"q": about.pop("q"), "c": about.pop("c"), **beside, **about})
        return found

    def _pairs(self, query: int, places: np.ndarray, scores: np.ndarray, sign: int) -> list[list[Any]]:
        """[number, score] of what stands at one end, the strongest first; and its tokens' numbers, if there are any."""
        found = [(int(p), s) for p, s in zip(places.tolist(), scores.tolist(), strict=True) if s * sign > 0]
        tokens, shown = self.sides.tokens, [len(self._rows[self.place[place]].get("w", ())) for place, _ in found]
        return [
            [self.place[place], float(f"{score:.6g}"), *tokens.of(query, place, count)]
            for (place, score), count in zip(found, shown, strict=True)
        ]


def dealt(cards: Sequence[Card], room: int) -> tuple[Deck, str, int]:
    """An empty deck whose texts will have room, how cards lie side by side, and the bytes left to pictures."""
    pictured = any(card.image is not None for card in cards)
    room = room // 2 if pictured and any(len(card.text) > 80 for card in cards) else room
    kind = "images" if pictured else "rows" if any(card.columns for card in cards) else "texts"
    return Deck(letters_for(cards, room)), kind, room


def _ends(top: TopK) -> tuple[tuple[np.ndarray, np.ndarray, int], ...]:
    """Places, scores and sign of both ends: a row at the helpful end may still harm, and is not shown there then."""
    return (top.helpful_ids, top.helpful_scores, 1), (top.harmful_ids, top.harmful_scores, -1)


def scaled(up: Sequence[Sequence[Any]], down: Sequence[Sequence[Any]]) -> dict[str, Any]:
    """The power of ten that these scores are shown in, if there is one."""
    scale = Scale.of(max((abs(score) for _, score, *_ in (*up, *down)), default=0.0))
    return {"x": scale.power, "u": scale.in_words} if scale.power else {}
