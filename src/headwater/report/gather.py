"""What a page needs of scores, in one pass over their tiles: both ends of each ranking, and sums over queries."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from headwater.errors import InvalidInput, InvalidSetting, NonFiniteValue
from headwater.evaluate.checks import Floats
from headwater.report.text import MINUS
from headwater.store.ends import TopKSink
from headwater.store.score_matrix import ScoreMatrix
from headwater.store.topk import TopK


@dataclass(frozen=True, eq=False)
class Groups:
    """Which group each row is in. of: [n] numbers of `names`."""

    names: tuple[str, ...]
    of: np.ndarray

    @classmethod
    def among(cls, labels: list[str]) -> Groups:
        """In the order of their names, numbers as numbers."""
        names = sorted(set(labels), key=_natural)
        number = {name: k for k, name in enumerate(names)}
        return cls(tuple(names), np.array([number[label] for label in labels], dtype=np.int64))

    def sums(self, values: Floats) -> Floats:
        """Of each group's rows: [groups]."""
        return np.bincount(self.of, values, len(self.names)).astype(np.float64)

    @property
    def counts(self) -> np.ndarray:
        return np.bincount(self.of, minlength=len(self.names))


def _natural(name: str) -> tuple[int, float, str]:
    try:
        found = float(name)
    except ValueError:
        return 1, 0.0, name
    return (0, found, name) if math.isfinite(found) else (1, 0.0, name)


@dataclass(frozen=True, eq=False)
class Gathered:
    """q queries, n train rows."""

    top: TopK
    """Of the queries that are shown; in place of ids it has places of train rows."""
    total: Floats
    """[n]: each train row's scores, summed over all queries."""
    size: Floats
    """[n]: their sizes, summed likewise."""
    added: str = "sum"
    """What became of a row's scores: the "mean" over queries where scores only rank, and have no sum."""
    between: Floats | None = None
    """[query groups, train groups]: mean score of the pairs; None without groups of both."""


def gather(
    scores: ScoreMatrix, k: int, shown: int, train: Groups | None = None, query: Groups | None = None
) -> Gathered:
    """One pass over the tiles; never more than one of them is in memory.

    Errors: InvalidSetting for scores that have more than a number for each pair; InvalidInput for none at all;
    NonFiniteValue; DamagedFile, of stored scores.
    """
    check_ranked(scores)
    rows = len(scores.train_ids)
    sink, total, size = TopKSink(k, scores.query_ids[:shown]), np.zeros(rows), np.zeros(rows)
    between = None if train is None or query is None else np.zeros((len(query.names), len(train.names)))
    member = None if query is None else (query.of == np.arange(len(query.names))[:, None]).astype(np.float32)
    for columns, tile in scores.columns():
        sink.add(tile[:shown], np.arange(rows)[columns])
        total[columns] = tile.sum(axis=0, dtype=np.float64)
        size[columns] = np.abs(tile).sum(axis=0, dtype=np.float64)
        if between is not None and train is not None and member is not None:
            np.add.at(between.T, train.of[columns], (member @ tile).T.astype(np.float64))
    if not np.isfinite(size).all():
        row = int(np.argmin(np.isfinite(size)))
        raise NonFiniteValue(f"Scores of train row {scores.train_ids[row]} are not finite: they rank nothing.", [row])
    if between is not None and train is not None and query is not None:
        between /= np.maximum(1, np.outer(query.counts, train.counts))
    added = "mean" if scores.is_ranking else "sum"
    share = 1.0 / len(scores.query_ids) if scores.is_ranking else 1.0
    return Gathered(sink.top(), total * share, size * share, added, between)


def check_ranked(scores: ScoreMatrix) -> None:
    """Errors: InvalidSetting for scores that have more than a number for each pair; InvalidInput for none at all."""
    if scores.mode != "up":
        raise InvalidSetting("Scores of changed inputs have one number for each input value, and no ranking to report.")
    queries, rows = len(scores.query_ids), len(scores.train_ids)
    if not queries or not rows:
        raise InvalidInput(f"There is nothing to report: the scores are {queries} queries x {rows} train rows.")


def ends_of_query(scores: ScoreMatrix, place: int, k: int) -> TopK:
    """Both ends of one query's ranking, as `Gathered.top` has those of many; read tile by tile, of its rows alone.

    Errors: NonFiniteValue; DamagedFile, of stored scores.
    """
    rows, sink = np.arange(len(scores.train_ids)), TopKSink(k, scores.query_ids[[place]])
    for columns, tile in scores.columns(np.array([place])):
        sink.add(_finite(tile, f"query {scores.query_ids[place]}"), rows[columns])
    return sink.top()


def ends_of_row(scores: ScoreMatrix, place: int, k: int) -> TopK:
    """Which queries one train row helps and harms most, likewise: in place of ids it has places of queries."""
    sink, column = TopKSink(k, scores.train_ids[[place]]), scores.column(place)
    sink.add(_finite(column[None], f"train row {scores.train_ids[place]}"), np.arange(len(column)))
    return sink.top()


def _finite(tile: np.ndarray, what: str) -> np.ndarray:
    if not np.isfinite(tile).all():
        raise NonFiniteValue(f"Scores of {what} are not finite: they rank nothing.")
    return tile


def block_sizes(scores: ScoreMatrix) -> dict[str, float]:
    """Each block's share of the size of all scores, summed over pairs; empty where blocks were not kept apart."""
    sizes = {
        name: math.fsum(float(np.abs(tile).sum(dtype=np.float64)) for _, tile in scores.block_columns(name))
        for name in scores.by_block or ()
    }
    whole = math.fsum(sizes.values())
    return {name: size / whole for name, size in sizes.items()} if whole else {}


@dataclass(frozen=True)
class Scale:
    """The power of ten that scores are shown in, so that nobody reads 0.0000123; of each query its own."""

    power: int

    @classmethod
    def of(cls, largest: float) -> Scale:
        if largest == 0 or 0.1 <= largest < 1e4:
            return cls(0)
        return cls(3 * math.floor(math.log10(largest) / 3))

    def said(self, score: float) -> str:
        """The score in three digits, its sign always shown; `said` in page.js is the same."""
        value = score / 10.0**self.power
        size = abs(value)
        digits = 0 if size >= 99.95 else 1 if size >= 9.995 else 2 if size >= 0.0995 or size == 0 else 3
        return f"{MINUS if value < 0 else '+'}{size:.{digits}f}"

    @property
    def in_words(self) -> str:
        raised = str(self.power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
        return f"in units of 10{raised}" if self.power else ""
