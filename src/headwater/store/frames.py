"""Scores as tables: pandas, Arrow, Parquet, CSV; a line for each pair of a query and a train row, or [query, train]."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from headwater.errors import InvalidSetting, MissingExtra
from headwater.settings import check_word
from headwater.store.draft import drafted_file
from headwater.store.score_matrix import ScoreMatrix
from headwater.store.topk import TopK
from headwater.tables import as_words, frame, pandas_module

if TYPE_CHECKING:
    import pandas
    import pyarrow

FORMS = ("wide", "long")
PIECE = 1_000_000
"""Lines that a table on its way to a file has in memory."""


def to_pandas(scores: ScoreMatrix, form: str) -> pandas.DataFrame:
    """ "wide": queries down, train rows across; "long": a line for each pair, with all columns that were attached.

    Errors: InvalidSetting; MissingExtra without pandas.
    """
    check_word("form", form, FORMS)
    _check_plain(scores)
    if form == "long":
        return frame(_joined(list(pieces(scores))))
    make = pandas_module()
    index = make.Index(as_words(scores.query_ids), name="query")
    found: pandas.DataFrame = make.DataFrame(
        scores[:], index=index, columns=make.Index(as_words(scores.train_ids), name="train")
    )
    return found


def to_arrow(scores: ScoreMatrix) -> pyarrow.Table:
    """The long table. Errors: MissingExtra without pyarrow."""
    return _arrow(_joined(list(pieces(scores))), _meaning(scores))


def to_parquet(scores: ScoreMatrix, path: str | os.PathLike[str]) -> None:
    """The long table as a Parquet file, piece by piece; what the scores mean is in the file's metadata.

    Errors: MissingExtra without pyarrow; NotWritten.
    """
    _check_plain(scores)
    parquet = _pyarrow().parquet
    meaning = _meaning(scores)
    schema = _arrow(_first(scores), meaning).schema
    with drafted_file(Path(path)) as file, parquet.ParquetWriter(file, schema) as writer:
        for piece in pieces(scores):
            writer.write_table(_arrow(piece, meaning))


def to_csv(scores: ScoreMatrix, path: str | os.PathLike[str]) -> None:
    """The long table as CSV, piece by piece. Errors: NotWritten; MissingExtra without pandas."""
    _check_plain(scores)
    with drafted_file(Path(path)) as file:
        frame(_first(scores)).iloc[:0].to_csv(file, index=False)
        for piece in pieces(scores):
            frame(piece).to_csv(file, index=False, header=False)


ENDINGS = (".parquet", ".csv")


def check_ending(path: Path) -> None:
    """Errors: InvalidSetting for a file of another kind."""
    if path.suffix not in ENDINGS:
        raise InvalidSetting(f"{path}: expected a name that ends in one of {', '.join(ENDINGS)}.")


def export(scores: ScoreMatrix, path: Path) -> None:
    """As the name's ending says. Errors: InvalidSetting for another ending; MissingExtra; NotWritten."""
    check_ending(path)
    (to_parquet if path.suffix == ".parquet" else to_csv)(scores, path)


def export_top(top: TopK, path: Path) -> None:
    """The table of a ranking, likewise."""
    check_ending(path)
    with drafted_file(path) as file:
        if path.suffix == ".parquet":
            _pyarrow().parquet.write_table(_arrow(top.columns(), {}), file)
        else:
            top.to_pandas().to_csv(file, index=False)


def pieces(scores: ScoreMatrix) -> Iterator[dict[str, np.ndarray]]:
    """The long table, some lines after the other: query, train, score, and what else is known of both."""
    for columns, tile in scores.columns():
        step = max(1, PIECE // max(1, tile.shape[1]))
        for start in range(0, len(tile), step):
            yield _lines(scores, slice(start, start + step), columns, tile[start : start + step])


def _lines(scores: ScoreMatrix, queries: slice, train: slice, values: np.ndarray) -> dict[str, np.ndarray]:
    """values: [q, n] of these queries and rows; the result [q n] each."""
    q, n = values.shape
    found = {
        "query": np.repeat(scores.query_ids[queries], n),
        "train": np.tile(scores.train_ids[train], q),
        "score": values.reshape(-1),
    }
    if scores.errors is not None:
        found["error"] = scores.errors[queries, train].reshape(-1)
    for name, column in scores.train_columns.items():
        found[f"train_{name}"] = np.tile(column[train], q)
    for name, column in scores.query_columns.items():
        found[f"query_{name}"] = np.repeat(column[queries], n)
    return found


def _first(scores: ScoreMatrix) -> dict[str, np.ndarray]:
    """A line of the table, which shows the kinds of its columns."""
    one = slice(0, 1)
    return _lines(scores, one, one, np.zeros((1, 1), scores.dtype))


def _joined(found: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([piece[name] for piece in found]) for name in found[0]}


def _check_plain(scores: ScoreMatrix) -> None:
    """Errors: InvalidSetting for scores of changed inputs."""
    if scores.mode != "up":
        raise InvalidSetting("Scores of changed inputs have one number for each input value: use to_xarray() for them.")


def _meaning(scores: ScoreMatrix) -> dict[str, str]:
    kept = ("unit", "unit_in_words", "sign", "explained", "method")
    return {f"headwater_{name}": str(value) for name, value in scores.attributes().items() if name in kept}


def _pyarrow() -> Any:
    """Errors: MissingExtra."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise MissingExtra("pyarrow", "tables") from None
    return pyarrow


def _arrow(columns: Mapping[str, np.ndarray], meaning: Mapping[str, str]) -> pyarrow.Table:
    table = _pyarrow().table({name: as_words(column) for name, column in columns.items()})
    return table.replace_schema_metadata(dict(meaning))
