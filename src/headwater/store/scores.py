"""Saved and unsaved scores: numbers with the names of their rows, their unit and sign, and how they came about."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from headwater.errors import InvalidInput, InvalidSetting, NotSaved, ShapeMismatch
from headwater.evaluate.calibration import Calibration
from headwater.store.diagnosis import Diagnosis
from headwater.store.draft import draft
from headwater.store.kinds import kind_of
from headwater.store.seal import check_folder, seal_folder
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

    `numpy.asarray(scores)` is the matrix [query, train].
    """

    values: np.ndarray
    """[query, train]."""
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
    def shape(self) -> tuple[int, int]:
        return self.values.shape

    @property
    def unit_in_words(self) -> str:
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
        return (
            f"Scores({self.shape[0]} queries x {self.shape[1]} train rows, unit={self.unit!r}, {self.method}{partly})"
        )

    def top(self, k: int) -> TopK:
        """The k most helpful and the k most harmful train rows of each query."""
        sink = TopKSink(k, self.query_ids)
        sink.add(self.values, self.train_ids)
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
        """Read what `save` wrote.

        Errors: NotSaved if there is nothing; DamagedFile, naming the file, where something is not as it was written.
        """
        if not Path(path).exists():
            raise NotSaved(f"There are no scores at {path}.")
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
                unit=attributes["unit"],
                n_train=attributes["n_train"],
                method=attributes["method"],
                damping=attributes["damping"],
                explained=attributes["explained"],
                coverage=attributes["coverage"],
                by_block=dict(zip(attributes["blocks"], shares, strict=True)) if attributes["blocks"] else None,
                residuals=dict(zip(solved, residuals, strict=True)) if solved else None,
                calibration=Calibration.from_json(attributes["calibration"]) if "calibration" in attributes else None,
                diagnosis=Diagnosis.from_json(attributes["diagnosis"]) if "diagnosis" in attributes else None,
            )

    def to_xarray(self) -> xarray.Dataset:
        """A labelled data set with attributes: `scores` (query, train); where there are any, `block_scores` (block,
        query, train) and `residuals` (solved_block, query).
        """
        import xarray as xr

        coords = {"query": self.query_ids, "train": self.train_ids}
        data: dict[str, Any] = {"scores": (("query", "train"), self.values)}
        if self.by_block is not None:
            data["block_scores"] = (("block", "query", "train"), np.stack(list(self.by_block.values())))
            coords["block"] = np.array(list(self.by_block))
        if self.residuals:
            data["residuals"] = (("solved_block", "query"), np.stack(list(self.residuals.values())))
            coords["solved_block"] = np.array(list(self.residuals))
        attributes: dict[str, Any] = {
            "unit": self.unit,
            "unit_in_words": self.unit_in_words,
            "sign": self.sign_in_words,
            "explained": self.explained,
            "coverage": self.coverage,
            "method": self.method,
            "n_train": self.n_train,
            "damping": dict(self.damping),
        }
        if self.calibration is not None:
            attributes["calibration"] = self.calibration.to_json()
        if self.diagnosis is not None:
            attributes["diagnosis"] = self.diagnosis.to_json()
        return xr.Dataset(data, coords=coords, attrs=attributes)
