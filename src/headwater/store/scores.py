"""Scores in hand: parts, tables, files, pictures, and pages of them; in memory, or on disk in a run's folder."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from copy import copy
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from headwater.arrays import is_frame
from headwater.errors import InvalidInput, InvalidSetting, NotSaved
from headwater.store.base import Tile
from headwater.store.described import Described
from headwater.store.draft import draft
from headwater.store.ends import GroupSink
from headwater.store.ends import TopKSink as TopKSink
from headwater.store.identity import IDENTITY
from headwater.store.ids import count_from_zero, places_of
from headwater.store.kinds import kind_of
from headwater.store.matrix import BlockShares, Columns, StoredMatrix, deleted_rows, meaning_of
from headwater.store.score_matrix import UNIT_IN_WORDS as UNIT_IN_WORDS
from headwater.store.score_matrix import ScoreMatrix, from_attributes
from headwater.store.seal import check_folder, open_arrays, seal_folder
from headwater.store.tiles import AGAIN, TileFolder
from headwater.store.topk import TopK as TopK
from headwater.tables import html_table

if TYPE_CHECKING:
    import pandas
    import pyarrow
    import xarray
    from matplotlib.axes import Axes
    from numpy.typing import ArrayLike

    from headwater.report.trust import Check
    from headwater.store.summary import Summary

HEAD = "zarr.json"
"""The file of saved scores whose attributes hold the seal of all."""


def _check_distinct(scores: Scores) -> None:
    for what, ids in (("query", scores.query_ids), ("train", scores.train_ids)):
        if len(np.unique(ids)) < len(ids):
            raise InvalidInput(f"The {what} ids are not distinct: {len(ids)} rows have {len(np.unique(ids))} names.")


class Scores(ScoreMatrix):
    """How much each train row helps (positive) or harms (negative) each query.

    `numpy.asarray(scores)` is the matrix [query, train]; `scores[2]`, `scores[:5, 10:20]` are parts of it, by position,
    and `scores.sel(query=..., train=...)` by name.
    """

    def sel(self, query: Any = None, train: Any = None) -> Scores:
        """The scores of some queries and train rows, by their ids (one, or a sequence); None for all.

        Errors: InvalidInput, naming an id that is not there.
        """
        queries, rows = places_of(self.query_ids, query, "query"), places_of(self.train_ids, train, "train")
        shares, residuals = self.by_block, self.residuals
        return Scores(
            values=self[queries][:, rows],
            query_ids=self.query_ids[queries],
            train_ids=self.train_ids[rows],
            by_block=None if shares is None else {name: share[queries][:, rows] for name, share in shares.items()},
            residuals=None if residuals is None else {name: found[queries] for name, found in residuals.items()},
            errors=None if self.errors is None else self.errors[queries][:, rows],
            train_columns={name: column[rows] for name, column in self.train_columns.items()},
            query_columns={name: column[queries] for name, column in self.query_columns.items()},
            query_positions=self.are_positions[0],
            train_positions=self.are_positions[1],
            **from_attributes(self.attributes()),
        )

    def attach(self, rows: Any = None, queries: Any = None) -> Self:
        """With columns of what train rows and queries are (labels, sources, groups), which tables then show.

        rows, queries: a DataFrame, columns by name, a data set, or a function of an id (see
        `headwater.store.described`); of a data set of pairs the second is the column "label". What is no single number,
        word or date is left out. Columns that were attached before stay.
        Errors: InvalidInput for what does not have the rows.
        """
        found = copy(self)
        asked, train = self.are_positions
        if rows is not None:
            new = Described.of(rows, self.train_ids, "rows", train).columns()
            object.__setattr__(found, "train_columns", {**self.train_columns, **new})  # frozen, as all scores
        if queries is not None:
            new = Described.of(queries, self.query_ids, "queries", asked).columns()
            object.__setattr__(found, "query_columns", {**self.query_columns, **new})
        return found

    def group(self, by: Any, of: str = "sum") -> Scores:
        """Scores of groups of train rows, by the "sum" or the "mean" of their rows' scores: [query, group].

        by: the name of an attached column; a Series, by its index; a mapping from ids to labels; or a label for
        each train row, in the order of `train_ids`.
        Errors: InvalidSetting; InvalidInput for labels that do not fit the rows.
        """
        self._check_plain("groups")
        self._check_sizes(of)
        if isinstance(by, str):
            if by not in self.train_columns:
                known = ", ".join(map(repr, self.train_columns)) or "none; attach(rows=...) brings them"
                raise InvalidInput(f"There is no column {by!r} of train rows: there is {known}.")
            by = self.train_columns[by]
        elif is_frame(by):  # a Series, by its index
            found = Described.of(by, self.train_ids, "by", self.are_positions[1]).columns()
            if len(found) != 1:
                raise InvalidInput(f"by has the columns {list(found)}; expected one, a Series.")
            by = next(iter(found.values()))
        sink = GroupSink(1, self.query_ids, by, of)
        for columns, tile in self.columns():
            sink.write(Tile(columns.start, self.train_ids[columns], None, tile[None]))
        labels, values = sink.grouped()
        return Scores(
            values, self.query_ids, labels, query_columns=self.query_columns, **from_attributes(self.attributes())
        )

    def sum(self, queries: Any = None) -> Scores:
        """Of some queries (ids; None for all) as one, which is called "sum": [1, train]."""
        return self._as_one(queries, "sum")

    def mean(self, queries: Any = None) -> Scores:
        """Likewise their mean."""
        return self._as_one(queries, "mean")

    def _as_one(self, queries: Any, of: str) -> Scores:
        self._check_plain("sums of queries")
        self._check_sizes(of)
        where = places_of(self.query_ids, queries, "query")
        if not len(where):
            raise InvalidInput(f"The {of} of no queries is asked for.")
        total = np.empty((1, self.shape[1]))
        for columns, tile in self.columns(where):
            total[0, columns] = tile.sum(axis=0, dtype=np.float64)
        values = total / (len(where) if of == "mean" else 1)
        return Scores(
            values.astype(self.dtype),
            np.array([of]),
            self.train_ids,
            train_columns=self.train_columns,
            **from_attributes(self.attributes()),
        )

    def _check_plain(self, what: str) -> None:
        if self.mode != "up":
            raise InvalidSetting(f"Scores of changed inputs have one number for each input value, and no {what}.")

    def _check_sizes(self, of: str) -> None:
        if of == "sum" and self.is_ranking:
            raise InvalidSetting(f"Scores of the unit {self.unit!r} rank rows, and add up to nothing; take the 'mean'.")

    def describe(self) -> Summary:
        """In a few numbers: unit, spread, and how far influence is with few rows; `print` shows a table."""
        from headwater.store.summary import summary

        self._check_plain("summary")
        return summary(self)

    def __str__(self) -> str:
        return f"{self!r}\n{self.unit_in_words}; {self.sign_in_words}"

    def _repr_html_(self) -> str:
        note = f"A score is the {self.unit_in_words}; {self.sign_in_words}."
        few = slice(0, 5)
        cells = [["query \\ train", *map(str, self.train_ids[few])]]
        if len(self.shape) == 2:
            cells += [
                [str(name), *(f"{value:+.4g}" for value in row)]
                for name, row in zip(self.query_ids[few], self[few, few], strict=True)
            ]
        return html_table(cells, f"{self!r}: the first of them. {note}")

    def to_pandas(self, form: str = "wide") -> pandas.DataFrame:
        """ "wide": queries down, train rows across. "long": a line for each pair, with what was attached beside it.

        Errors: InvalidSetting; MissingExtra without pandas.
        """
        from headwater.store.frames import to_pandas

        return to_pandas(self, form)

    def to_arrow(self) -> pyarrow.Table:
        """A line for each pair: query, train, score, and what was attached. Errors: MissingExtra without pyarrow."""
        from headwater.store.frames import to_arrow

        self._check_plain("table of pairs")
        return to_arrow(self)

    def to_parquet(self, path: str | os.PathLike[str]) -> None:
        """The lines of `to_arrow` as a file, written piece by piece. Errors: MissingExtra; NotWritten."""
        from headwater.store.frames import to_parquet

        to_parquet(self, path)

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Likewise as CSV. Errors: MissingExtra without pandas; NotWritten."""
        from headwater.store.frames import to_csv

        to_csv(self, path)

    def plot_top(self, query: Any, k: int = 10, ax: Axes | None = None) -> Axes:
        """A query's k most helpful and most harmful rows as bars. query: its id. Errors: MissingExtra."""
        from headwater.store import plots

        self._check_plain("ranking")
        return plots.top(self, query, k, ax)

    def plot_distribution(self, bins: int = 60, ax: Axes | None = None) -> Axes:
        """How many scores are how large. Errors: MissingExtra."""
        from headwater.store import plots

        self._check_plain("distribution of pairs")
        return plots.distribution(self, bins, ax)

    def plot_concentration(self, ax: Axes | None = None) -> Axes:
        """Which share of all influence the strongest rows have. Errors: MissingExtra."""
        from headwater.store import plots

        self._check_plain("totals of rows")
        return plots.concentration(self, ax)

    def report(
        self,
        path: str | os.PathLike[str],
        rows: Any = None,
        queries: Any = None,
        k: int = 5,
        *,
        title: str | None = None,
        groups: Any = None,
        self_influence: ArrayLike | None = None,
        losses: ArrayLike | None = None,
        predictions: Any = None,
        checks: Sequence[Check] = (),
        made: Mapping[str, object] | None = None,
    ) -> Path:
        """One HTML page of them, to show around: it needs no network and no other file. The path is returned.

        rows, queries: what the train rows and the queries are, as for `attach`, or a function from an id to an image,
        a text, a dict of columns, `report.Tokens` or a `report.Card`; None shows what is attached, else the ids.
        k: of each query's most helpful and most harmful rows.
        groups: a column of the train rows, a group for each [train], or a mapping from ids; None takes the labels,
        where these are few. predictions: likewise of the queries; those that are not the label are marked.
        self_influence, losses: [train], for rows that may be mislabelled. checks: what `verify`, `audit`, `diagnose`
        gave, and an influence's `calibration`. made: how the scores came about, beside versions and settings; an entry
        of None takes away one that the page would show by itself (command, made, Python, ...).
        Errors: InvalidSetting; InvalidInput, ShapeMismatch and NonFiniteValue for what does not fit the rows;
        NotWritten.
        """
        from headwater.report.cases import TITLE, Known, numbers
        from headwater.report.job import write
        from headwater.report.rows import Suspects

        rows_there = self.shape[1]
        suspects = Suspects(
            self_influence=numbers("self_influence", self_influence, rows_there),
            losses=numbers("losses", losses, rows_there),
        )
        known = Known(rows, queries, k, title or TITLE, "", groups, predictions, suspects, None, checks, made)
        return write(self, path, known)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to a zarr folder, whole or not at all, with checksums of all its files.

        Errors: AlreadySaved if there is one; NotWritten, of a full disk for example; InvalidInput for ids that are not
        distinct.
        """
        from zarr.codecs import Crc32cCodec, ZstdCodec

        _check_distinct(self)
        data = self.to_xarray()
        data.attrs["blocks"] = list(self.by_block or ())
        data.attrs["solved_blocks"] = list(self.residuals or ())
        # By number: a column may have any name, and an array's name is a path.
        for kind, columns in (("query", self.query_columns), ("train", self.train_columns)):
            data = data.drop_vars([f"{kind}_{name}" for name in columns])
            data = data.assign_coords({f"{kind}_column_{k}": (kind, c) for k, c in enumerate(columns.values())})
        data.attrs["columns"] = {"query": list(self.query_columns), "train": list(self.train_columns)}
        with draft(path) as folder:
            plain = _with_free_words(data.drop_vars(["block", "solved_block"], errors="ignore"))
            # The seal serves this library; with a checksum in each chunk others notice a flipped bit too.
            encoding = {name: {"compressors": (ZstdCodec(), Crc32cCodec())} for name in plain.variables}
            plain.to_zarr(folder, mode="w", consolidated=False, encoding=encoding)
            seal_folder(folder, HEAD, "attributes")

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Scores:
        """Read what `save` wrote, or a run that is finished (`attribute(store=)`), whose scores stay on disk.

        Errors: NotSaved if there is nothing; DamagedFile, naming the file, where something is not as it was written.
        """
        if not Path(path).exists():
            raise NotSaved(f"There are no scores at {path}.")
        if (Path(path) / IDENTITY).is_file():
            return StoredScores(path)
        other = kind_of(Path(path))
        if other and not (Path(path) / HEAD).is_file():
            raise NotSaved(f"There are no scores at {path}{other}.")
        check_folder(Path(path), HEAD, "attributes")
        try:
            found = cls._read(path)
        except (KeyError, TypeError, ValueError, OSError) as error:
            raise InvalidInput(f"{path} is whole, but holds no scores that this version can read: {error}") from error
        _check_distinct(found)
        return found

    @classmethod
    def _read(cls, path: str | os.PathLike[str]) -> Scores:
        import xarray as xr

        with xr.open_zarr(path, consolidated=False) as data:
            shares = data["block_scores"].values if "block_scores" in data else ()
            residuals = data["residuals"].values if "residuals" in data else ()
            attributes = data.attrs
            solved = attributes.get("solved_blocks", [])
            return cls(
                values=data["scores"].values,
                query_ids=_words(data["query"].values),
                train_ids=_words(data["train"].values),
                by_block=dict(zip(attributes["blocks"], shares, strict=True)) if attributes["blocks"] else None,
                residuals=dict(zip(solved, residuals, strict=True)) if solved else None,
                errors=data["errors"].values if "errors" in data else None,
                train_columns=_columns_of(data, "train"),
                query_columns=_columns_of(data, "query"),
                **from_attributes(attributes),
            )

    def to_xarray(self) -> xarray.Dataset:
        """A labelled data set with attributes: `scores` (query, train); where there are any, `block_scores` (block,
        query, train), `errors` (query, train) and `residuals` (solved_block, query). What was attached is a
        coordinate, train_NAME or query_NAME.
        """
        import xarray as xr

        coords: dict[str, Any] = {"query": self.query_ids, "train": self.train_ids}
        for kind, columns in (("query", self.query_columns), ("train", self.train_columns)):
            coords.update({f"{kind}_{name}": (kind, column) for name, column in columns.items()})
        axes = ("query", "train", *(f"x{axis}" for axis in range(len(self.shape) - 2)))
        data: dict[str, Any] = {"scores": (axes, self.values)}
        if self.by_block is not None:
            data["block_scores"] = (("block", *axes), np.stack(list(self.by_block.values())))
            coords["block"] = np.array(list(self.by_block))
        if self.errors is not None:
            data["errors"] = (axes, self.errors)
        if self.residuals:
            data["residuals"] = (("solved_block", "query"), np.stack(list(self.residuals.values())))
            coords["solved_block"] = np.array(list(self.residuals))
        return xr.Dataset(data, coords=coords, attrs=self.attributes())


def _with_free_words(data: xarray.Dataset) -> xarray.Dataset:
    """Text of no fixed width: zarr's format has a word for that, and none for NumPy's own."""
    text = {name: array.astype(object) for name, array in data.coords.items() if array.dtype.kind == "U"}
    return data.assign_coords(text)


def _columns_of(data: xarray.Dataset, kind: str) -> dict[str, np.ndarray]:
    names = data.attrs.get("columns", {}).get(kind, [])
    return {name: _words(data[f"{kind}_column_{k}"].values) for k, name in enumerate(names)}


def _words(values: np.ndarray) -> np.ndarray:
    return np.array(values.tolist(), dtype=str) if values.dtype.kind in "OT" else values


class StoredScores(Scores):
    """`Scores` of a finished run in a folder. `values` reads all of them, once; `top`, `sel` and slices what they need.

    Errors, when tiles are read: DamagedFile, naming the file.
    """

    matrix: StoredMatrix
    shares: BlockShares
    """By block; none where blocks were not kept apart."""

    def __init__(self, path: str | os.PathLike[str]):
        folder = TileFolder(path)
        meaning = meaning_of(folder)
        ids = open_arrays(folder.path / "ids.npz", f"{meaning['belongs']}/ids", AGAIN)
        rows, query_rows = len(ids["train"]), len(ids["query"])
        columns = np.setdiff1d(np.arange(rows), deleted_rows(folder.path, meaning["belongs"]), assume_unique=True)
        self._keep("matrix", StoredMatrix(folder, query_rows, columns, rows))
        known = from_attributes(meaning)
        names, residuals = meaning["blocks"], meaning["residuals"]
        known["residuals"] = residuals and {name: np.array(found) for name, found in residuals.items()}
        shares = [StoredMatrix(folder, query_rows, columns, rows, k) for k in range(len(names))]
        self._keep("shares", BlockShares(dict(zip(names, shares, strict=True))) if names else BlockShares({}))
        known["by_block"] = self.shares if names else None
        known["errors"] = None
        known |= {"train_columns": {}, "query_columns": {}}
        known |= {"query_positions": count_from_zero(ids["query"]), "train_positions": count_from_zero(ids["train"])}
        for name, value in {**known, "query_ids": ids["query"], "train_ids": ids["train"][columns]}.items():
            self._keep(name, value)

    def _keep(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)  # frozen, as all scores

    @cached_property
    def values(self) -> np.ndarray:
        """[query, train], read from disk when asked for first."""
        return self.matrix.read()

    @property
    def shape(self) -> tuple[int, ...]:
        return self.matrix.shape

    @property
    def dtype(self) -> np.dtype:
        return self.matrix.dtype

    def columns(self, queries: slice | np.ndarray | None = None) -> Columns:
        return self.matrix.tiles(queries)

    def column(self, row: int) -> np.ndarray:
        return self.matrix.column(row)

    def block_columns(self, name: str) -> Columns:
        return self.shares.tiles(name)
