"""Saved and unsaved scores: numbers with the names of their rows, their unit and sign, and how they came about."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from headwater.errors import InvalidInput, InvalidSetting, NotSaved, ShapeMismatch
from headwater.evaluate.calibration import Calibration
from headwater.store.diagnosis import Diagnosis
from headwater.store.draft import draft
from headwater.store.identity import IDENTITY
from headwater.store.kinds import kind_of
from headwater.store.matrix import BlockShares, Columns, StoredMatrix, deleted_rows, meaning_of
from headwater.store.seal import check_folder, open_arrays, seal_folder
from headwater.store.tiles import AGAIN, TileFolder
from headwater.store.topk import TopK as TopK
from headwater.store.topk import TopKSink as TopKSink
from headwater.store.topk import check_labels

if TYPE_CHECKING:
    import xarray

UNIT_IN_WORDS = {
    "influence": "decrease of the query's {of} per unit of weight on the train row in the mean objective",
    "removal": "predicted increase of the query's {of} when the train row is removed",
}
SIGN_IN_WORDS = "positive: the train row helps (it lowers the query's {of})"
HEAD = "zarr.json"
"""The file of saved scores whose attributes hold the seal of all."""


def _check_distinct(scores: Scores) -> None:
    for what, ids in (("query", scores.query_ids), ("train", scores.train_ids)):
        if len(np.unique(ids)) < len(ids):
            raise InvalidInput(f"The {what} ids are not distinct: {len(ids)} rows have {len(np.unique(ids))} names.")


@dataclass(frozen=True, eq=False)
class Scores:
    """How much each train row helps (positive) or harms (negative) each query.

    `numpy.asarray(scores)` is the matrix [query, train]; `scores[2]`, `scores[:5, 10:20]` are parts of it, by position,
    and `scores.sel(query=..., train=...)` by name.
    """

    values: np.ndarray
    """[query, train]; of `mode` "perturbation" [query, train, *x_shape]."""
    query_ids: np.ndarray
    """[query]: the ids that the batches carried, or positions in the loader."""
    train_ids: np.ndarray
    """[train]."""
    unit: str = "influence"
    """"influence" or "removal"; `unit_in_words` says what they mean."""
    n_train: float = 1.0
    """Rows that the curvature was fitted on."""
    method: str = ""
    """The method's settings."""
    damping: Mapping[str, float] = field(default_factory=dict)
    """Absolute damping by block."""
    by_block: Mapping[str, np.ndarray] | None = None
    """Each block's share, [query, train]; they sum to `values`."""
    explained: str = "loss"
    """What the scores are about: the query's loss, or the name of another measurement. Lower is taken to be better."""
    coverage: float = 1.0
    """The share of the model's trainable parameters that was attributed."""
    residuals: Mapping[str, np.ndarray] | None = None
    """By block, each query's relative residual [query], for a method that solves; None for the others."""
    calibration: Calibration | None = None
    """How the damping was chosen; None for one that was given, or the method's default."""
    diagnosis: Diagnosis | None = None
    """Whether the model, the curvature and the solves give reason to doubt the scores; None for scores made by hand."""
    mode: str = "up"
    """What is done to a train row: more weight ("up"), or another input ("perturbation")."""

    def __post_init__(self) -> None:
        check_labels(self.values, self.query_ids, self.train_ids)
        for name, share in (self.by_block or {}).items():
            if share.shape != self.values.shape:
                raise ShapeMismatch(f"The scores are {self.values.shape}, the share of block {name!r} {share.shape}.")
        for name, residual in (self.residuals or {}).items():
            if residual.shape != self.query_ids.shape:
                raise ShapeMismatch(f"There are {len(self.query_ids)} queries, and {residual.shape} for {name!r}.")
        if self.unit not in UNIT_IN_WORDS:
            raise InvalidSetting(f"unit is {self.unit!r}; expected one of {', '.join(map(repr, UNIT_IN_WORDS))}.")

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def columns(self, queries: slice | np.ndarray | None = None) -> Columns:
        """The scores in pieces that memory has room for. queries: positions; None for all."""
        yield slice(0, self.shape[1]), self.values if queries is None else self.values[queries]

    def __getitem__(self, where: Any) -> np.ndarray:
        """By position: of queries, or of (queries, train rows), each by itself: two lists give all pairs."""
        queries, *rest = where if isinstance(where, tuple) else (where,)
        wanted = np.atleast_1d(np.arange(self.shape[0])[queries])
        found = np.empty((len(wanted), *self.shape[1:]), self.dtype)
        for columns, tile in self.columns(wanted):
            found[:, columns] = tile
        single = np.ndim(np.arange(self.shape[0])[queries]) == 0
        return found[(0, *rest)] if single else found[(slice(None), *rest)]

    def sel(self, query: Any = None, train: Any = None) -> Scores:
        """The scores of some queries and train rows, by their ids (one, or a sequence); None for all.

        Errors: InvalidInput, naming an id that is not there.
        """
        queries, rows = _positions(self.query_ids, query, "query"), _positions(self.train_ids, train, "train")
        shares, residuals = self.by_block, self.residuals
        return Scores(
            values=self[queries][:, rows],
            query_ids=self.query_ids[queries],
            train_ids=self.train_ids[rows],
            by_block=None if shares is None else {name: share[queries][:, rows] for name, share in shares.items()},
            residuals=None if residuals is None else {name: found[queries] for name, found in residuals.items()},
            **{name: value for name, value in from_attributes(self.attributes()).items() if name != "residuals"},
        )

    @property
    def dtype(self) -> np.dtype:
        return self.values.dtype

    @property
    def unit_in_words(self) -> str:
        if self.mode == "perturbation":
            return f"decrease of the query's {self.explained} per unit of change of the train row's input"
        return UNIT_IN_WORDS[self.unit].format(of=self.explained)

    @property
    def sign_in_words(self) -> str:
        return SIGN_IN_WORDS.format(of=self.explained)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False and dtype is not None and np.dtype(dtype) != self.values.dtype:
            raise ValueError(f"The scores are {self.values.dtype}; as {np.dtype(dtype)} they need a copy.")
        return np.array(self.values, dtype=dtype, copy=True) if copy else np.asarray(self.values, dtype=dtype)

    def __repr__(self) -> str:
        partly = "" if self.coverage == 1.0 else f", coverage={self.coverage:.3f}"
        size = f"{self.shape[0]} queries x {self.shape[1]} train rows"
        return f"{type(self).__name__}({size}, unit={self.unit!r}, {self.method}{partly})"

    def top(self, k: int) -> TopK:
        """The k most helpful and the k most harmful train rows of each query."""
        if self.mode != "up":
            raise InvalidSetting("Scores of changed inputs have one number for each input value, and no ranking.")
        sink = TopKSink(k, self.query_ids)
        for columns, tile in self.columns():
            sink.add(tile, self.train_ids[columns])
        return sink.top()

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
        with draft(path) as folder:
            plain = data.drop_vars(["block", "solved_block"], errors="ignore")
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
                query_ids=data["query"].values,
                train_ids=data["train"].values,
                by_block=dict(zip(attributes["blocks"], shares, strict=True)) if attributes["blocks"] else None,
                residuals=dict(zip(solved, residuals, strict=True)) if solved else None,
                **from_attributes(attributes),
            )

    def attributes(self) -> dict[str, Any]:
        """What the scores mean, as JSON has it; `from_attributes` reads it."""
        found: dict[str, Any] = {
            "unit": self.unit,
            "unit_in_words": self.unit_in_words,
            "sign": self.sign_in_words,
            "explained": self.explained,
            "coverage": self.coverage,
            "method": self.method,
            "n_train": self.n_train,
            "damping": dict(self.damping),
            "mode": self.mode,
        }
        if self.calibration is not None:
            found["calibration"] = self.calibration.to_json()
        if self.diagnosis is not None:
            found["diagnosis"] = self.diagnosis.to_json()
        return found

    def to_xarray(self) -> xarray.Dataset:
        """A labelled data set with attributes: `scores` (query, train); where there are any, `block_scores` (block,
        query, train) and `residuals` (solved_block, query).
        """
        import xarray as xr

        coords = {"query": self.query_ids, "train": self.train_ids}
        axes = ("query", "train", *(f"x{axis}" for axis in range(len(self.shape) - 2)))
        data: dict[str, Any] = {"scores": (axes, self.values)}
        if self.by_block is not None:
            data["block_scores"] = (("block", *axes), np.stack(list(self.by_block.values())))
            coords["block"] = np.array(list(self.by_block))
        if self.residuals:
            data["residuals"] = (("solved_block", "query"), np.stack(list(self.residuals.values())))
            coords["solved_block"] = np.array(list(self.residuals))
        return xr.Dataset(data, coords=coords, attrs=self.attributes())


class StoredScores(Scores):
    """`Scores` of a finished run in a folder. `values` reads all of them, once; `top`, `sel` and slices what they need.

    Errors, when tiles are read: DamagedFile, naming the file.
    """

    matrix: StoredMatrix

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
        known["by_block"] = BlockShares(dict(zip(names, shares, strict=True))) if names else None
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


def from_attributes(found: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `Scores`, from what `Scores.attributes` gave."""
    calibration, diagnosis = found.get("calibration"), found.get("diagnosis")
    return {
        **{name: found[name] for name in ("unit", "n_train", "method", "damping", "explained", "coverage")},
        "mode": found.get("mode", "up"),
        "calibration": None if calibration is None else Calibration.from_json(calibration),
        "diagnosis": None if diagnosis is None else Diagnosis.from_json(diagnosis),
    }


def _positions(ids: np.ndarray, wanted: Any, what: str) -> np.ndarray:
    """Errors: InvalidInput, naming an id that is not there."""
    if wanted is None:
        return np.arange(len(ids))
    names = np.atleast_1d(np.asarray(wanted))
    order = np.argsort(ids, kind="stable")
    place = np.minimum(np.searchsorted(ids[order], names), max(len(ids) - 1, 0))
    found = order[place]
    missing = names[ids[found] != names].tolist()
    if missing:
        raise InvalidInput(f"There is no {what} row {missing[0]!r}: ids are like {ids[:3].tolist()}.")
    return found
