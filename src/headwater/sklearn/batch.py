"""Rows for a linear model in NumPy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from headwater.errors import BatchMismatch, InvalidInput
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

    def _columns(self) -> dict[str, Any]:
        return {"x": self.x, "y": self.y, "weights": self.weights, "ids": self.ids}

    def __post_init__(self) -> None:
        for name, column in self._columns().items():
            object.__setattr__(self, name, _rowwise(column))
        super().__post_init__()
        for name, column in (("weights", self.weights), ("ids", self.ids)):
            if column is not None and np.ndim(column) != 1:
                raise BatchMismatch(f"{name} has shape {np.shape(column)}; expected one number for each row.")
        if self.weights is not None:
            weights = np.asarray(self.weights, dtype=np.float64)
            if not bool((np.isfinite(weights) & (weights >= 0)).all()):
                raise InvalidInput(f"weights must be finite and not negative; the lowest is {weights.min():g}.")

    def take(self, rows: slice | np.ndarray) -> Self:
        return type(self)(**{name: _rows(value, rows) for name, value in self._columns().items()})


def _rowwise(value: Any) -> Any:
    """As something with rows: frames as they are, sparse matrices by row, all else as an array."""
    if value is None or hasattr(value, "iloc"):
        return value
    return value.tocsr() if hasattr(value, "tocsr") else np.asarray(value)


def _rows(value: Any, rows: slice | np.ndarray) -> Any:
    if value is None:
        return None
    return value.iloc[rows] if hasattr(value, "iloc") else value[rows]


def bad_rows(values: np.ndarray) -> list[int]:
    """The first few rows with NaN or infinity in them."""
    return np.flatnonzero(~np.isfinite(values).reshape(len(values), -1).all(axis=1))[:5].tolist()


class FeatureBatch(SklearnBatch):
    """Rows as the linear model meets them: x [n, features] in float64, y as numbers; see `LinearModel.encode`."""
