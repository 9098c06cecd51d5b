"""The matrix of scores: numbers with the names of their rows, their unit and sign, and how they came about."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from headwater.errors import InvalidSetting, ShapeMismatch
from headwater.settings import check_word
from headwater.store.diagnosis import Diagnosis
from headwater.store.ends import TopKSink, check_labels
from headwater.store.ids import NamedColumns, check_columns, count_from_zero
from headwater.store.matrix import Columns
from headwater.store.topk import TopK

if TYPE_CHECKING:
    from headwater.evaluate.calibration import Calibration

UNIT_IN_WORDS = {
    "influence": "decrease of the query's {of} per unit of weight on the train row in the mean objective",
    "removal": "predicted increase of the query's {of} when the train row is removed",
    "replacement": "mean increase of the query's {of} when another train row, at random, takes the place of this one",
    "cosine": "cosine of the query's and the train row's gradient of the {of} in the metric of the inverse curvature: "
    "a ranking, and no change of the {of}",
    "relative": "influence on the query's {of} over the root of the train row's influence on itself: a ranking, and no "
    "change of the {of}",
}
NORMALISE = {"both": "cosine", "train": "relative"}
"""What is asked for, and the unit that scores then have."""
RANKINGS = tuple(NORMALISE.values())
"""Units of scores that only rank rows: their sums forecast nothing."""
SIGN_IN_WORDS = "positive: the train row helps (it lowers the query's {of})"


def unit_of(unit: str, normalise: str | None) -> str:
    """The unit of the scores. Errors: InvalidSetting for a forecast of removal in directions."""
    if unit in RANKINGS:
        word = next(word for word, found in NORMALISE.items() if found == unit)
        raise InvalidSetting(f"unit={unit!r} is what normalise={word!r} gives; pass that.")
    if normalise is None:
        return unit
    check_word("normalise", normalise, tuple(NORMALISE))
    if unit == "removal":
        raise InvalidSetting(
            f"normalise={normalise!r} ranks rows by direction, and forecasts no removal; leave unit='removal' out."
        )
    return NORMALISE[normalise]


@dataclass(frozen=True, eq=False)
class ScoreMatrix:
    """Scores of train rows for queries, as numbers with names. What can be done with them is in `Scores`."""

    values: np.ndarray
    """[query, train]; of `mode` "perturbation" [query, train, *x_shape]."""
    query_ids: np.ndarray
    """[query]: the ids that the batches carried, or positions in the loader."""
    train_ids: np.ndarray
    """[train]."""
    unit: str = "influence"
    """"influence" or "removal", "replacement" of retrained models, "cosine" or "relative" of directions;
    `unit_in_words` says what they mean."""
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
    errors: np.ndarray | None = None
    """Each score's standard error, [query, train], for scores that were measured on retrained models; else None."""
    calibration: Calibration | None = None
    """How the damping was chosen; None for one that was given, or the method's default."""
    diagnosis: Diagnosis | None = None
    """Whether the model, the curvature and the solves give reason to doubt the scores; None for scores made by hand."""
    mode: str = "up"
    """What is done to a train row: more weight ("up"), or another input ("perturbation")."""

    query_positions: bool | None = None
    """Whether queries are called by their positions in the loader; None: so it is if these count from zero."""
    train_positions: bool | None = None
    """Likewise the train rows."""
    train_columns: Mapping[str, np.ndarray] = field(default_factory=dict)
    """What else is known of the train rows, by name: [train] each."""
    query_columns: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Likewise of the queries: [query] each."""

    def __post_init__(self) -> None:
        check_labels(self.values, self.query_ids, self.train_ids)
        check_columns(self.train_columns, len(self.train_ids), "train rows")
        check_columns(self.query_columns, len(self.query_ids), "queries")
        for name, share in (self.by_block or {}).items():
            if share.shape != self.values.shape:
                raise ShapeMismatch(f"The scores are {self.values.shape}, the share of block {name!r} {share.shape}.")
        for name, residual in (self.residuals or {}).items():
            if residual.shape != self.query_ids.shape:
                raise ShapeMismatch(f"There are {len(self.query_ids)} queries, and {residual.shape} for {name!r}.")
        if self.errors is not None and self.errors.shape != self.values.shape:
            raise ShapeMismatch(f"The scores are {self.values.shape}, their errors {self.errors.shape}.")
        if self.unit not in UNIT_IN_WORDS:
            raise InvalidSetting(f"unit is {self.unit!r}; expected one of {', '.join(map(repr, UNIT_IN_WORDS))}.")

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def columns(self, queries: slice | np.ndarray | None = None) -> Columns:
        """The scores in pieces that memory has room for. queries: positions; None for all."""
        yield slice(0, self.shape[1]), self.values if queries is None else self.values[queries]

    def column(self, row: int) -> np.ndarray:
        """The scores of one train row, by position: [query, ...]."""
        found: np.ndarray = self.values[:, row]
        return found

    def block_columns(self, name: str) -> Columns:
        """A block's share of them, likewise. Errors: KeyError for a block that was not kept apart."""
        yield slice(0, self.shape[1]), (self.by_block or {})[name]

    def __getitem__(self, where: Any) -> np.ndarray:
        """By position: of queries, or of (queries, train rows), each by itself: two lists give all pairs."""
        queries, *rest = where if isinstance(where, tuple) else (where,)
        wanted = np.atleast_1d(np.arange(self.shape[0])[queries])
        found = np.empty((len(wanted), *self.shape[1:]), self.dtype)
        for columns, tile in self.columns(wanted):
            found[:, columns] = tile
        single = np.ndim(np.arange(self.shape[0])[queries]) == 0
        return found[(0, *rest)] if single else found[(slice(None), *rest)]

    @property
    def dtype(self) -> np.dtype:
        return self.values.dtype

    @property
    def is_ranking(self) -> bool:
        """Whether scores only rank rows (directions), so that sums of them forecast nothing."""
        return self.unit in RANKINGS

    @property
    def are_positions(self) -> tuple[bool, bool]:
        """Whether ids of queries, and of train rows, are positions in their loaders."""
        known = ((self.query_positions, self.query_ids), (self.train_positions, self.train_ids))
        query, train = (count_from_zero(ids) if given is None else given for given, ids in known)
        return query, train

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

    def top(self, k: int = 5) -> TopK:
        """The k most helpful and the k most harmful train rows of each query; with `errors`, these in a column."""
        if self.mode != "up":
            raise InvalidSetting("Scores of changed inputs have one number for each input value, and no ranking.")
        sink = TopKSink(k, self.query_ids)
        for columns, tile in self.columns():
            sink.add(tile, self.train_ids[columns])
        known = NamedColumns(self.train_ids, self.train_columns)
        found = sink.top().with_columns(known, self.query_columns, self.unit_in_words)
        if self.errors is not None:
            ends = (found.helpful_ids, found.harmful_ids)
            helpful, harmful = ({"error": _at(self.errors, self.train_ids, ids)} for ids in ends)
            found = replace(
                found,
                helpful_columns=helpful | dict(found.helpful_columns),
                harmful_columns=harmful | dict(found.harmful_columns),
            )
        return replace(found, query_positions=self.are_positions[0], train_positions=self.are_positions[1])

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


def from_attributes(found: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `Scores`, from what `Scores.attributes` gave."""
    from headwater.evaluate.calibration import Calibration

    calibration, diagnosis = found.get("calibration"), found.get("diagnosis")
    return {
        **{name: found[name] for name in ("unit", "n_train", "method", "damping", "explained", "coverage")},
        "mode": found.get("mode", "up"),
        "calibration": None if calibration is None else Calibration.from_json(calibration),
        "diagnosis": None if diagnosis is None else Diagnosis.from_json(diagnosis),
    }


def _at(values: np.ndarray, train_ids: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """values [q, n] at the rows of these names [q, k]: [q, k]."""
    order = np.argsort(train_ids, kind="stable")
    return np.take_along_axis(values, order[np.searchsorted(train_ids, ids, sorter=order)], axis=1)
