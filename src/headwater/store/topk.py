"""Both ends of every query's ranking, in hand: a table, with what is known of the rows and queries beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from headwater.store.described import Described
from headwater.store.ids import NamedColumns, check_columns, count_from_zero
from headwater.tables import WIDEST, cell_len, frame, html_table, table, visible

if TYPE_CHECKING:
    import pandas

SHOWN = 5
"""Queries that a printed table has room for."""
ALWAYS = ("query", "end", "rank", "id", "score")
"""Columns of every table."""
NUMBERS = ("rank", "score", "error")
"""Those that are no text."""
WIDTH = 120
"""Characters of a line, where there is no terminal to ask."""


@dataclass(frozen=True, eq=False)
class TopK:
    """Both ends of every query's ranking; arrays [query, k], strongest first. `print` shows a table."""

    query_ids: np.ndarray
    helpful_ids: np.ndarray
    helpful_scores: np.ndarray
    """Descending."""
    harmful_ids: np.ndarray
    harmful_scores: np.ndarray
    """Ascending: the most harmful first."""
    query_columns: Mapping[str, np.ndarray] = field(default_factory=dict)
    """What else is known of the queries, by name: [query] each."""
    helpful_columns: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Likewise of the rows: [query, k] each."""
    harmful_columns: Mapping[str, np.ndarray] = field(default_factory=dict)
    unit_in_words: str = ""
    query_positions: bool = False
    """Whether queries are called by their positions in the loader."""
    train_positions: bool = False
    """Likewise the train rows."""

    def __len__(self) -> int:
        return len(self.query_ids)

    @classmethod
    def joined(cls, parts: Sequence[TopK]) -> TopK:
        """Of several sets of queries, one under the other."""
        arrays = [np.concatenate(found) for found in zip(*(part._arrays() for part in parts), strict=True)]
        return cls(
            arrays[0],
            arrays[1],
            arrays[2],
            arrays[3],
            arrays[4],
            query_positions=count_from_zero(arrays[0]),
            train_positions=all(part.train_positions for part in parts),
        )

    def _arrays(self) -> tuple[np.ndarray, ...]:
        return self.query_ids, self.helpful_ids, self.helpful_scores, self.harmful_ids, self.harmful_scores

    def with_columns(self, rows: NamedColumns, queries: Mapping[str, np.ndarray], unit_in_words: str) -> TopK:
        """With what is known of the rows and of the queries."""
        check_columns(queries, len(self), "queries")
        helpful, harmful = rows.of(self.helpful_ids), rows.of(self.harmful_ids)
        return replace(
            self,
            query_columns=queries,
            helpful_columns=helpful,
            harmful_columns=harmful,
            unit_in_words=unit_in_words,
        )

    def attach(self, rows: Any = None, queries: Any = None) -> TopK:
        """With columns of what rows and queries are: a DataFrame, a data set, a function of an id (see `Described`).

        Errors: InvalidInput for what does not have them.
        """
        found = self
        if rows is not None:
            ids = np.unique(np.concatenate([self.helpful_ids.reshape(-1), self.harmful_ids.reshape(-1)]))
            named = NamedColumns(ids, Described.of(rows, ids, "rows", self.train_positions).columns())
            helpful = {**self.helpful_columns, **named.of(self.helpful_ids)}
            harmful = {**self.harmful_columns, **named.of(self.harmful_ids)}
            found = replace(found, helpful_columns=helpful, harmful_columns=harmful)
        if queries is not None:
            known = Described.of(queries, self.query_ids, "queries", self.query_positions).columns()
            found = replace(found, query_columns={**self.query_columns, **known})
        return found

    def columns(self) -> dict[str, np.ndarray]:
        """A table with a line for each query, end and rank: query, end, rank, id, score, and what else is known."""
        queries, k = self.helpful_ids.shape
        found = {
            "query": np.repeat(self.query_ids, 2 * k),
            "end": np.tile(np.repeat(np.array(["helpful", "harmful"]), k), queries),
            "rank": np.tile(np.arange(1, k + 1), 2 * queries),
            "id": _in_turn(self.helpful_ids, self.harmful_ids),
            "score": _in_turn(self.helpful_scores, self.harmful_scores),
        }
        for name, column in self.helpful_columns.items():
            found[_free(name, found)] = _in_turn(column, self.harmful_columns[name])
        for name, column in self.query_columns.items():
            found[_free(f"query_{name}", found)] = np.repeat(column, 2 * k)
        return found

    def to_pandas(self) -> pandas.DataFrame:
        """The table of `columns`. Errors: MissingExtra without pandas."""
        return frame(self.columns())

    def take(self, queries: Sequence[int] | slice) -> TopK:
        """Some queries, by position."""
        where = np.arange(len(self))[queries]
        chosen = TopK(
            self.query_ids[where],
            self.helpful_ids[where],
            self.helpful_scores[where],
            self.harmful_ids[where],
            self.harmful_scores[where],
        )
        return replace(
            chosen,
            query_columns=_rows(self.query_columns, where),
            helpful_columns=_rows(self.helpful_columns, where),
            harmful_columns=_rows(self.harmful_columns, where),
            unit_in_words=self.unit_in_words,
            query_positions=self.query_positions,
            train_positions=self.train_positions,
        )

    def table(self, width: int = WIDTH) -> str:
        """All of it in plain characters. width: of the terminal; what was attached is there as far as it fits."""
        cells = self._cells()
        room, shown = width, []
        for k in sorted(range(len(cells[0])), key=lambda k: (k >= len(ALWAYS), "label" not in cells[0][k])):
            room -= 2 + min(WIDEST, max(cell_len(visible(row[k])) for row in cells))
            if k < len(ALWAYS) or room >= -2:
                shown.append(k)
        shown.sort()
        rows = [[row[k] for k in shown] for row in cells]
        left = [k for k, name in enumerate(rows[0]) if name not in NUMBERS]
        hidden = len(cells[0]) - len(shown)
        more = f"\n({hidden} more columns: to_pandas() has them)" if hidden else ""
        return table(rows, left, WIDEST, width) + more

    def _cells(self) -> list[list[str]]:
        columns = self.columns()
        texts = [[_cell(value, name == "score") for value in column] for name, column in columns.items()]
        return [list(columns), *(list(row) for row in zip(*texts, strict=True))]

    def _note(self) -> str:
        """How many queries are not shown, and what the numbers are."""
        hidden = len(self) - SHOWN
        more = f"... and {hidden} more queries; to_pandas() and columns() have them all. " if hidden > 0 else ""
        return more + (f"A score is the {self.unit_in_words}." if self.unit_in_words else "")

    def __str__(self) -> str:
        return "\n".join(filter(None, [self.take(slice(SHOWN)).table(), self._note()]))

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        return html_table(self.take(slice(SHOWN))._cells(), self._note())


def _rows(columns: Mapping[str, np.ndarray], where: np.ndarray) -> dict[str, np.ndarray]:
    return {name: column[where] for name, column in columns.items()}


def _in_turn(helpful: np.ndarray, harmful: np.ndarray) -> np.ndarray:
    """Of each query its helpful rows, then the harmful ones: [2 q k]."""
    return np.stack([helpful, harmful], axis=1).reshape(-1)


def _free(name: str, taken: Mapping[str, Any]) -> str:
    return name if name not in taken else _free(f"{name}_", taken)


def _cell(value: Any, signed: bool) -> str:
    if isinstance(value, (float, np.floating)):
        return f"{value:{'+' if signed else ''}.4g}"
    return str(value)
