"""The page of a job: scores, and what their rows are, put together. `page` fills the template's values."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

import headwater
from headwater.errors import InvalidSetting
from headwater.report.cases import Drawn, Known, Sides
from headwater.report.colours import coloured, left_off
from headwater.report.figures import paragraphs
from headwater.report.gather import Groups, Scale, block_sizes, gather
from headwater.report.page import render
from headwater.report.rows import RowsSection, influential
from headwater.report.text import visible
from headwater.report.trust import verdicts, warning
from headwater.store.draft import explained_errors, write_whole
from headwater.store.score_matrix import ScoreMatrix
from headwater.store.topk import TopK

SHOWN = 400
"""Queries of a page at most."""
LARGEST, FEWEST = 1_000_000, 5
"""Bytes of a page, which has fewer queries where it would be larger; but not fewer than that."""
WITHOUT_SCRIPT = 3
"""Queries that are there without JavaScript too."""


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
    sides = Sides.of(scores, known)
    groups, query_groups = sides.groups, sides.query_groups
    shown = min(SHOWN, len(scores.query_ids))
    found = gather(scores, known.k, shown, groups, query_groups)
    sections = [influential(found, groups, query_groups, block_sizes(scores))]
    sections += [section for section in [known.suspects.section()] if section is not None]
    sections += [RowsSection(f"part-{n}", s.title, paragraphs(s.text), s.figures) for n, s in enumerate(known.sections)]
    while True:
        text = _rendered(scores, known, sides, found.top, sections, shown)
        size = len(text.encode())
        if size <= LARGEST or shown <= FEWEST:
            return text
        # Texts and pictures are made smaller first, as they are drawn; what is left over is queries.
        shown = max(FEWEST, int(0.9 * shown * LARGEST / size))


def _rendered(
    scores: ScoreMatrix, known: Known, sides: Sides, top: TopK, sections: Sequence[RowsSection], shown: int
) -> str:
    """With so many queries, the first."""
    drawn = Drawn(
        sides, range(shown), top.take(slice(shown)), [place for section in sections for place in section.places]
    )
    data, said = drawn.data()
    queries = data["queries"]
    sections = [section.numbered(drawn.place) for section in sections]
    return render(
        **around(scores, known, [(section.place, section.title) for section in sections]),
        notes=[note for note in (_part(shown, len(scores.query_ids)), said, known.tokens.note) if note],
        sorts=_sorts(queries),
        filters=_filters(queries),
        knows_wrong=any("w" in q for q in queries),
        first=queries[:WITHOUT_SCRIPT],
        count=len(queries),
        rows=data["rows"],
        images=data["images"],
        names=data["names"],
        kind=data["kind"],
        coloured=lambda card, pair, query: coloured(card, pair, scale_of(query)),
        left_off=lambda card, pair, query: left_off(card, pair, scale_of(query)),
        say=lambda score, query: scale_of(query).said(score),
        sections=sections,
        data=data,
    )


def scale_of(query: Mapping[str, Any]) -> Scale:
    """Of a query as it is drawn."""
    return Scale(query.get("x", 0))


def around(scores: ScoreMatrix, known: Known, sections: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """What any page says that is about all scores, and costs no pass over them. sections: place and title of each."""
    trust = verdicts(scores, known.checks, known.details)
    alarm = warning(trust)
    return {
        "title": known.title,
        "lead": known.lead or _lead(scores),
        "facts": known.facts,
        "warning": None if alarm is None else dict(zip(("kind", "head", "said"), alarm, strict=True)),
        "contents": [("queries", "Queries"), *sections, *LAST],
        "meaning": f"A score is the {scores.unit_in_words}. {known.note}".strip(),
        "trust": trust,
        "made": _made(known.made, scores),
        "version": headwater.__version__,
    }


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
