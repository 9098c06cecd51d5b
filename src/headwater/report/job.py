"""The page of a job: scores, and what their rows are, put together.

cases    for each query both ends of its ranking, as places of train rows
deck     the cards of these queries and rows, each once
page     the template's values
"""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

import headwater
from headwater.arrays import is_array, is_frame, to_numpy
from headwater.errors import InvalidInput, InvalidSetting, NonFiniteValue, ShapeMismatch
from headwater.evaluate.checks import Floats
from headwater.report.cards import LABELS, Card, Deck, card_of, letters_for
from headwater.report.figures import Fact, Section, paragraphs
from headwater.report.gather import Gathered, Groups, Scale, block_sizes, gather
from headwater.report.page import render
from headwater.report.rows import GROUPS, LISTED, RowsSection, Suspects, influential
from headwater.report.text import number, one_line, visible
from headwater.report.trust import Check, unsolved, verdicts, warning
from headwater.store.described import Described
from headwater.store.draft import explained_errors, write_whole
from headwater.store.score_matrix import ScoreMatrix

TITLE = "Which training rows are behind these predictions?"
ROOM = 620_000
"""Bytes of a page for the pictures and texts of its rows; the rest of a megabyte is for all else."""
SHOWN = 400
"""Queries of a page at most."""
WITHOUT_SCRIPT = 3
"""Queries that are there without JavaScript too."""
READ = 50_000
"""Rows of a data set that are all read for their labels."""


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


def write(scores: ScoreMatrix, path: str | os.PathLike[str], known: Known) -> Path:
    """The page as a file, whole or not at all; its folder is made. Errors: as `page`; NotWritten."""
    file = Path(path)
    with explained_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
    if file.is_dir():
        raise InvalidSetting(f"{file} is a folder; expected the name of a file, such as {file / 'report.html'}.")
    write_whole(file, page(scores, known).encode("utf-8"))
    return file


def page(scores: ScoreMatrix, known: Known) -> str:
    """The whole page as text.

    Errors: InvalidSetting for k, and for scores of changed inputs; InvalidInput, ShapeMismatch and NonFiniteValue for
    what does not fit the rows; DamagedFile, of stored scores.
    """
    asked, called = scores.are_positions
    train = Side.of(known.rows, scores.train_ids, scores.train_columns, "rows", called)
    query = Side.of(known.queries, scores.query_ids, scores.query_columns, "queries", asked)
    groups, query_groups = _groups(known.groups, train, query)
    shown = min(SHOWN, len(scores.query_ids))
    found = gather(scores, known.k, shown, groups, query_groups)
    suspects = known.suspects
    sections = [influential(found, groups, query_groups, block_sizes(scores))]
    sections += [section for section in [suspects.section()] if section is not None]
    sections += [RowsSection(f"part-{n}", s.title, paragraphs(s.text), s.figures) for n, s in enumerate(known.sections)]
    cards = _Cards(train, query, found, sections, _notes(suspects))
    queries = _queries(known, scores, query, query_groups, cards, found)
    trust = verdicts(scores, known.checks, known.details)
    alarm = warning(trust)
    images, said = cards.images()
    rows = cards.rows(groups)
    sections = [section.numbered(cards.place) for section in sections]
    data = {
        "queries": queries,
        "rows": rows,
        "images": images,
        "names": list(cards.deck.names),
        "kind": cards.kind,
    }
    return render(
        title=known.title,
        lead=known.lead or _lead(scores),
        facts=known.facts,
        warning=None if alarm is None else dict(zip(("kind", "head", "said"), alarm, strict=True)),
        contents=[("queries", "Queries"), *((s.place, s.title) for s in sections), *LAST],
        meaning=f"A score is the {scores.unit_in_words}. {known.note}".strip(),
        notes=[note for note in (_part(shown, len(scores.query_ids)), said) if note],
        sorts=_sorts(queries),
        filters=_filters(queries),
        knows_wrong=any("w" in q for q in queries),
        first=queries[:WITHOUT_SCRIPT],
        count=len(queries),
        rows=rows,
        images=images,
        names=list(cards.deck.names),
        kind=cards.kind,
        say=lambda score, query: Scale(query.get("x", 0)).said(score),
        sections=sections,
        trust=trust,
        made=_made(known.made, scores),
        version=headwater.__version__,
        data=data,
    )


LAST = (("trust", "What to trust"), ("made", "How it was made"))


def _lead(scores: ScoreMatrix) -> str:
    queries, rows = len(scores.query_ids), len(scores.train_ids)
    return f"{queries:,} {'query' if queries == 1 else 'queries'} traced to {rows:,} training rows."


def _part(shown: int, there: int) -> str:
    if shown == there:
        return ""
    return (
        f"Of {there:,} queries the first {shown:,} are on this page, so that it stays small; the charts are about all. "
        "Others: scores.sel(query=...).report(...)."
    )


# What the rows are ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Side:
    """The queries or the train rows: ids, what each is, and columns with something of all of them."""

    ids: np.ndarray
    columns: Mapping[str, np.ndarray]
    described: Described | None
    positions: bool = False
    """Whether ids are the rows' positions in their loader."""

    @classmethod
    def of(cls, given: Any, ids: np.ndarray, columns: Mapping[str, np.ndarray], what: str, positions: bool) -> Side:
        """Errors: InvalidInput for what does not describe the rows."""
        if given is None:
            return cls(ids, columns, None, positions)
        found = Described.of(given, ids, what, positions)
        # A function may be slow, or draw pictures: it is asked for what is shown alone. So is what is very long.
        reads = not callable(given) and len(ids) <= READ
        return cls(ids, {**(found.columns() if reads else {}), **columns}, found, positions)

    def item(self, place: int) -> Any:
        """What the row is; where nobody said, its columns; else None."""
        if self.described is not None:
            return self.described.item(place)
        return {name: column[place] for name, column in self.columns.items()} or None

    def card(self, place: int) -> Card:
        item = self.item(place)
        if isinstance(item, Mapping) and not self.positions:  # what the row is called stands on the card already
            item = {name: value for name, value in item.items() if str(value) != str(self.ids[place])}
        found = card_of(item)
        label = self.label_column
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
    return Groups.among([one_line(value) for value in _each(given, train.ids, "groups", train.positions)]), None


def _each(given: Any, ids: np.ndarray, what: str, positions: bool) -> list[Any]:
    """Something for each row. Errors: InvalidInput for a row without it; ShapeMismatch."""
    if is_frame(given):
        column = next(iter(Described.of(given, ids, what, positions).columns().values()), np.empty(0))
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


# Cards ----------------------------------------------------------------------------------------------------------------


class _Cards:
    """The cards of all queries and train rows that the page shows."""

    def __init__(
        self, train: Side, query: Side, found: Gathered, sections: Sequence[RowsSection], notes: Mapping[int, str]
    ):
        self.train = train
        top = found.top
        listed = [place for section in sections for place in section.places]
        ends = [end[scores * sign > 0] for end, scores, sign in _ends(top)]
        places = np.unique(np.concatenate([*ends, np.array(listed, dtype=np.int64)])).astype(np.int64)
        self.place = {int(place): number for number, place in enumerate(places)}
        rows = {place: train.card(place) for place in self.place}
        self.notes = notes
        queries = [query.card(place) for place in range(len(top.query_ids))]
        every = [*rows.values(), *queries]
        pictured = any(card.image is not None for card in every)
        self.room = ROOM // 2 if pictured and any(len(card.text) > 80 for card in every) else ROOM
        self.deck = Deck(letters_for(every, self.room))
        self._rows = {place: self.deck.draw(card) for place, card in rows.items()}
        self.queries = [self.deck.draw(card) for card in queries]
        self.kind = "images" if pictured else "rows" if any(card.columns for card in every) else "texts"

    def images(self) -> tuple[list[str], str]:
        return self.deck.images.encoded(self.room)

    def rows(self, groups: Groups | None) -> list[dict[str, Any]]:
        found = []
        for place, card in self._rows.items():
            row: dict[str, Any] = {"id": one_line(str(self.train.ids[place]), 200), "c": card}
            group = None if groups is None else groups.names[groups.of[place]]
            if group is not None and group != card.get("l"):
                row["g"] = group
            if place in self.notes:
                row["f"] = self.notes[place]
            found.append(row)
        return found


def _ends(top: Any) -> tuple[tuple[np.ndarray, np.ndarray, int], ...]:
    """Places, scores and sign of both ends: a row at the helpful end may still harm, and is not shown there then."""
    return (top.helpful_ids, top.helpful_scores, 1), (top.harmful_ids, top.harmful_scores, -1)


def _queries(
    known: Known, scores: ScoreMatrix, query: Side, groups: Groups | None, cards: _Cards, found: Gathered
) -> list[dict[str, Any]]:
    """q: id; c: card; up, down: [row's number on the page, score]; p: prediction; w: 1 if it is wrong; g: group; s, z:
    own loss in words and as a number; x, u: power of ten of its scores, and in words; r: why not to trust it.
    """
    ids, doubts = scores.query_ids, unsolved(scores)
    predicted = _predictions(known.predictions, query)
    losses = numbers("query_losses", known.query_losses, len(ids))
    (up, up_scores, _), (down, down_scores, _) = _ends(found.top)
    shown = []
    for place, card in enumerate(cards.queries):
        one: dict[str, Any] = {"q": one_line(str(ids[place]), 200), "c": card}
        one["up"] = _pairs(cards, up[place], up_scores[place], 1)
        one["down"] = _pairs(cards, down[place], down_scores[place], -1)
        scale = Scale.of(max((abs(score) for _, score in one["up"] + one["down"]), default=0.0))
        if scale.power:
            one["x"], one["u"] = scale.power, scale.in_words
        if predicted is not None:
            one["p"] = one_line(predicted[place])
            if _is_wrong(query.label(place, card.get("l")), predicted[place]):
                one["w"] = 1
        if groups is not None and groups.names[groups.of[place]] != card.get("l"):
            one["g"] = groups.names[groups.of[place]]
        if losses is not None:
            one["s"], one["z"] = number(float(losses[place]), 3), float(f"{losses[place]:.5g}")
        if place in doubts:
            one["r"] = doubts[place]
        shown.append(one)
    return shown


def _pairs(cards: _Cards, places: np.ndarray, scores: np.ndarray, sign: int) -> list[list[float]]:
    pairs = zip(places.tolist(), scores.tolist(), strict=True)
    return [[cards.place[int(place)], float(f"{score:.6g}")] for place, score in pairs if score * sign > 0]


def _is_wrong(label: Any, predicted: Any) -> bool:
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
        return query.columns[given].tolist()
    return _each(given, query.ids, "predictions", query.positions)


def _sorts(queries: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    has = {name for query in queries for name in query} | {name for query in queries for name in query["c"]}
    options = [("given", "data order", "q"), ("id", "id", "q"), ("harm", "most harmed", "q")]
    options += [("help", "most helped", "q"), ("loss", "own loss", "z"), ("label", "label", "l")]
    return [(value, name) for value, name, needs in options if needs in has]


def _filters(queries: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, list[str]]]:
    """What the list of queries can be narrowed by: what has a few values, and more than one."""
    values = {
        "l": ("Label", {q["c"]["l"] for q in queries if "l" in q["c"]}),
        "p": ("Prediction", {q["p"] for q in queries if "p" in q}),
        "g": ("Group", {q["g"] for q in queries if "g" in q}),
    }
    return [
        (name, said, list(Groups.among(sorted(found)).names))
        for name, (said, found) in values.items()
        if 1 < len(found) <= 60
    ]


# How it was made ------------------------------------------------------------------------------------------------------


def _made(given: Mapping[str, object] | None, scores: ScoreMatrix) -> list[tuple[str, str]]:
    """What was given, else found; an entry that is given as None is left out."""
    found: dict[str, Callable[[], object]] = {
        "command": lambda: shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]) if sys.argv[0] else None,
        "made": lambda: datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "headwater": lambda: headwater.__version__,
        "Python": platform.python_version,
        "NumPy": lambda: np.__version__,
        "method": lambda: scores.method or None,
        "damping": lambda: ", ".join(f"{name} {value:.3g}" for name, value in scores.damping.items()) or None,
        "unit": lambda: scores.unit,
        "explains": lambda: f"the query's {scores.explained}",
        "training rows": lambda: f"{scores.n_train:g} fitted, {len(scores.train_ids):,} scored",
    }
    own = dict(given or {})
    values = {name: own.pop(name) if name in own else value() for name, value in found.items()}
    return [(visible(str(n)), visible(str(v))[:4000]) for n, v in {**values, **own}.items() if v is not None]
