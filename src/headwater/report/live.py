"""Scores as a page that asks for one case at a time: nothing is read of the matrix until somebody looks there.

    live = Live(scores, known)
    live.page(token)                         the page, without a case
    live.queries("cat", start=0, count=50)   what is listed
    live.query(3, k=10), live.row(7, k=10)   one case: a query beside rows, a train row beside queries

Each case is plain JSON of the fields that a page of all cases has (`headwater.report.cases`); beside them every entry
has its place, at, and o, its id, where the one that is shown is another text (None: it cannot be written).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal

import numpy as np

from headwater.errors import InvalidInput
from headwater.report.cases import NAME, Drawn, Known, Sides, dealt, is_wrong
from headwater.report.gather import check_ranked, ends_of_query, ends_of_row
from headwater.report.job import around
from headwater.report.page import render
from headwater.report.text import one_line
from headwater.settings import check_whole
from headwater.store.score_matrix import ScoreMatrix
from headwater.store.topk import TopK

SENT = 2_000_000
"""Bytes of one case for its pictures and texts."""
THUMBNAILS = 400_000
"""Bytes of a list, likewise."""
MOST_ROWS, MOST_QUERIES = 100, 200
"""At each end of a case; of a list."""
COUNTS = (5, 10, 20, 50, 100)
"""Rows at each end that a reader chooses among."""
KEPT = 256
"""Rankings that are kept, most lately asked for."""
SEARCHED = 400
"""Characters of a column's entry that are searched."""
WRITTEN = 500
"""Characters of an id that can be in an address."""
Kind = Literal["query", "row"]


class NoSuchRow(InvalidInput):
    """An id or a place that is not there."""


class Live:
    """For one thread at a time: a run's files, and a user's own data set, are not read by two."""

    def __init__(self, scores: ScoreMatrix, known: Known):
        """Errors: as `headwater.report.job.page`, but of the scores themselves."""
        check_ranked(scores)
        check_whole("k", known.k, 1)
        self.scores, self.known, self.sides = scores, known, Sides.of(scores, known)
        self.turned = self.sides.turned()
        self._rankings: OrderedDict[tuple[Kind, int, int], TopK] = OrderedDict()

    def page(self, token: str = "") -> str:
        """The page as text. token: what its script sends with each question."""
        shown = around(self.scores, self.known, [])
        queries, rows = self.scores.shape[:2]
        size = f"{queries:,} queries, {rows:,} training rows"
        note = f"{size}; scores are read when you ask. A training row's id leads to what it helps and harms."
        return render(
            live=True,
            **shown,
            notes=[note],
            sorts=[],
            filters=[],
            knows_wrong=self._wrong is not None,
            first=[],
            count=queries,
            counts=sorted({*COUNTS, min(self.known.k, MOST_ROWS)}),
            k=min(self.known.k, MOST_ROWS),
            rows=[],
            images=[],
            names=[],
            kind="texts",
            sections=[],
            data={"token": token},
        )

    # What is listed ---------------------------------------------------------------------------------------------------

    def queries(self, search: str = "", wrong: bool = False, start: int = 0, count: int = 50) -> dict[str, Any]:
        """Those that have the words, in the order of the data; first the one that is called so.

        count: of all that were found. wrong: only those whose prediction is not the label.
        """
        places = self._found(search.strip(), wrong)
        shown = places[start : start + count]
        side = self.sides.query
        cards = [side.card(place) for place in shown]
        deck, kind, room = dealt(cards, THUMBNAILS)
        drawn = [deck.draw(card) for card in cards]
        images, _ = deck.images.encoded(room)
        listed = [self.sides.about_query(place, card) for place, card in zip(shown, drawn, strict=True)]
        for query, place in zip(listed, shown, strict=True):
            query |= {"c": _peek(query["c"]), **_called(side.ids, place, query["q"])}
        return {"count": len(places), "queries": listed, "images": images, "names": [], "kind": kind}

    def _found(self, search: str, wrong: bool) -> Sequence[int]:
        among: Sequence[int] = range(len(self.sides.query.ids))
        if wrong and self._wrong is not None:
            among = np.flatnonzero(self._wrong).tolist()
        if not search:
            return among
        wanted = search.lower()
        found = [place for place in among if wanted in self._words[place]]
        exact = _place_of(self.sides.query.ids, search)
        return found if exact not in found else [exact, *(place for place in found if place != exact)]

    @cached_property
    def _words(self) -> list[str]:
        """What is searched, of each query: its id, label, prediction, group and columns."""
        sides, side = self.sides, self.sides.query
        found = []
        for place in range(len(side.ids)):
            words = [one_line(str(side.ids[place]), NAME)]
            words += [] if sides.predicted is None else [one_line(sides.predicted[place])]
            words += [] if sides.query_groups is None else [sides.query_groups.names[sides.query_groups.of[place]]]
            words += [f"{name} {one_line(column[place], SEARCHED)}" for name, column in side.columns.items()]
            found.append("\n".join(words).lower())
        return found

    @cached_property
    def _wrong(self) -> np.ndarray | None:
        """[query]: whether the prediction is not the label; None where one of the two is not known of all."""
        label = self.sides.query.label_column
        if label is None or self.sides.predicted is None:
            return None
        pairs = zip(self.sides.query.columns[label].tolist(), self.sides.predicted, strict=True)
        return np.array([is_wrong(given, said) for given, said in pairs])

    # One case ---------------------------------------------------------------------------------------------------------

    def query(self, place: int, k: int) -> dict[str, Any]:
        """A query and both ends of its ranking. Errors: DamagedFile, of stored scores; NonFiniteValue."""
        return self._case("query", self.sides, place, k)

    def row(self, place: int, k: int) -> dict[str, Any]:
        """A train row, as `queries`, and as `rows` the queries that it helps and harms most. Errors: as `query`."""
        return self._case("row", self.turned, place, k)

    def _case(self, kind: Kind, sides: Sides, place: int, k: int) -> dict[str, Any]:
        drawn = Drawn(sides, [place], self._ranking(kind, place, k), room=SENT)
        data, said = drawn.data()
        for query in data["queries"]:
            query |= _called(sides.query.ids, place, query["q"])
        for row, there in zip(data["rows"], drawn.place, strict=True):
            row |= _called(sides.train.ids, there, row["id"])
        return {**data, "note": said}

    def _ranking(self, kind: Kind, place: int, k: int) -> TopK:
        asked = (kind, place, k)
        if asked not in self._rankings:
            self._rankings[asked] = (ends_of_query if kind == "query" else ends_of_row)(self.scores, place, k)
            if len(self._rankings) > KEPT:
                self._rankings.popitem(last=False)
        self._rankings.move_to_end(asked)
        return self._rankings[asked]

    def place_of(self, kind: Kind, name: str) -> int:
        """By the id, as it is printed. Errors: NoSuchRow."""
        sides = self.sides if kind == "query" else self.turned
        found = _place_of(sides.query.ids, name)
        if found is None:
            raise NoSuchRow(f"There is no {WORDS[kind]} {one_line(name, 80)!r}.")
        return found

    def checked_place(self, kind: Kind, place: int) -> int:
        """Errors: NoSuchRow."""
        there = len((self.sides if kind == "query" else self.turned).query.ids)
        if not 0 <= place < there:
            raise NoSuchRow(f"There is no {WORDS[kind]} at place {place}: there are {there}.")
        return place


WORDS = {"query": "query", "row": "training row"}


def _place_of(ids: np.ndarray, name: str) -> int | None:
    """The place of the id that is printed so. Numbers and words are compared as arrays: there may be millions."""
    if ids.dtype.kind == "U":
        found = np.flatnonzero(ids == name).tolist()
    elif ids.dtype.kind in "iu":
        is_number = name.isascii() and name.removeprefix("-").isdigit() and len(name) < 20 and str(int(name)) == name
        found = np.flatnonzero(ids == int(name)).tolist() if is_number else []
    else:
        found = [place for place, each in enumerate(ids.tolist()) if str(each) == name]
    return found[0] if found else None


def _called(ids: np.ndarray, place: int, shown: str) -> dict[str, Any]:
    """at and o of an entry."""
    name = str(ids[place])
    if name == shown:
        return {"at": place}
    return {"at": place, "o": name if len(name) <= WRITTEN and name.isprintable() else None}


def _peek(card: dict[str, Any]) -> dict[str, Any]:
    """Of a card, what a list has room for."""
    found: dict[str, Any] = {field: card[field] for field in ("i", "l") if field in card}
    if "t" in card:
        found["t"] = card["t"][:100]
    if "k" in card:
        found["k"] = card["k"][:40]
    return found
