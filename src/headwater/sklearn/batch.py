"""Rows for a linear model in NumPy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
from scipy.sparse import issparse

from headwater.arrays import is_frame
from headwater.errors import InvalidInput
from headwater.types import Batch


@dataclass(frozen=True, eq=False)
class SklearnBatch(Batch[np.ndarray]):
    """Inputs and targets as the estimator's `fit` takes them: arrays, lists or DataFrames, labels as they are.

    `weights` [n]: a weight of 2 means the row twice, as scikit-learn's sample_weight. `ids` [n]: names that follow the
    row everywhere; random draws depend on them. Errors: BatchMismatch if lengths disagree; InvalidInput for weights
    that are negative or not finite.
    """

    weights: Any = None
    ids: Any = None

    def __post_init__(self) -> None:
        for name, column in self._columns().items():
            object.__setattr__(self, name, _rowwise(column))
        super().__post_init__()
        if self.weights is not None:
            weights = np.asarray(self.weights, dtype=np.float64)
            if not bool((np.isfinite(weights) & (weights >= 0)).all()):
                raise InvalidInput(f"weights must be finite and not negative; the lowest is {weights.min():g}.")

    def _cut(self, column: Any, rows: slice | np.ndarray) -> Any:
        if column is None:
            return None
        return column.iloc[rows] if is_frame(column) else column[rows]


def _rowwise(value: Any) -> Any:
    """As something with rows: frames as they are, dicts of columns as one, sparse matrices by row, or an array."""
    if value is None or is_frame(value):
        return value
    if isinstance(value, Mapping):
        return import_module("pandas").DataFrame(dict(value))
    return value.tocsr() if issparse(value) else np.asarray(value)


def column_names(x: object) -> Any:
    """Of a data frame of any library; None for what has none."""
    return getattr(x, "columns", None)


def bad_rows(values: np.ndarray) -> list[int]:
    """The first few rows with NaN or infinity in them."""
    return np.flatnonzero(~np.isfinite(values).reshape(len(values), -1).all(axis=1))[:5].tolist()


class FeatureBatch(SklearnBatch):
    """Rows as the linear model meets them: x [n, features] in float64, y as numbers; see `LinearModel.encode`."""
