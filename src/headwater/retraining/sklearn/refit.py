"""Any estimator of scikit-learn, fitted again without some rows: a `measure` for a bank of retrained models.

    rows     [k]   the train rows kept, by position
    outputs  [q]   the losses of the queries under the estimator that was fitted to them

For linear models that `TrainingInfluence` covers, its `remove` finds the same losses exactly and much faster.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import clone, is_classifier, is_regressor
from sklearn.pipeline import Pipeline

from headwater.arrays import is_frame, shape_of
from headwater.errors import BatchMismatch, InvalidInput, InvalidSetting, NonFiniteValue, ShapeMismatch
from headwater.types import SizedTraining

Measurement = Callable[[Any, Any, Any], ArrayLike]
"""(fitted estimator, X_query, y_query) -> a number for each query [q]."""


@dataclass(frozen=True, eq=False)
class Refit(SizedTraining):
    """Fit a clone of the estimator to some of the rows, and measure the queries: (rows kept, seed) -> [q].

        bank = retrain("bank", Refit(forest, X, y, X_query, y_query), rows=len(X), queries=len(X_query), recipe={...})

    or `Bank(...).fill(Refit(...), workers=4, processes=True)`: it can be pickled if the estimator and the data can.

    What is measured without a `measure` is a loss. Of a classifier, minus the logarithm of the probability that
    predict_proba gives the query's class, where probabilities below `least` count as `least`: so does a class that none
    of the rows kept has, which the fitted estimator does not know. Of a regressor, half of the squared error,
    summed over outputs. Both are in the units of `TrainingInfluence`.

    Errors: InvalidSetting for an estimator that has no such loss; InvalidInput for a query of a class that no train row
    has, and, when called, where the rows kept cannot be fitted (of one class only, say); BatchMismatch for lengths
    that differ; NonFiniteValue naming the query.
    """

    estimator: Any
    """Cloned before each fit, and never changed."""
    X: Any
    """[n, ...]: an array, a sparse matrix, a data frame or a list."""
    y: Any
    """[n], or [n, outputs] for a regressor."""
    X_query: Any
    """[q, ...]."""
    y_query: Any
    """[q], or [q, outputs]."""
    sample_weight: ArrayLike | None = field(default=None, kw_only=True)
    """[n], of the train rows; passed to `fit`, in a pipeline to that of its last step."""
    measure: Measurement | None = field(default=None, kw_only=True)
    """In place of the loss."""
    least: float = field(default=float(np.finfo(np.float64).eps), kw_only=True)
    """The lowest probability; scikit-learn's own `log_loss` has the same."""

    def __post_init__(self) -> None:
        for name, rows, targets in (("train", self.X, self.y), ("query", self.X_query, self.y_query)):
            if _rows(rows) != _rows(targets) or not _rows(rows):
                raise BatchMismatch(
                    f"There are {_rows(rows)} {name} rows and {_rows(targets)} {name} targets; expected as many, and "
                    "at least one."
                )
        if self.sample_weight is not None and np.shape(self.sample_weight) != (_rows(self.X),):
            raise BatchMismatch(
                f"sample_weight has shape {np.shape(self.sample_weight)}; expected ({_rows(self.X)},), one of each row."
            )
        if not 0 < self.least < 1:
            raise InvalidSetting(f"least is {self.least}; expected a probability between 0 and 1.")
        if self.measure is None:
            self._check_loss()

    @property
    def n_rows(self) -> int:
        """n; a bank of subsets of another number of rows is refused."""
        return _rows(self.X)

    def _check_loss(self) -> None:
        name = type(self.estimator).__name__
        if is_regressor(self.estimator):
            return
        if not is_classifier(self.estimator) or not hasattr(self.estimator, "predict_proba"):
            raise InvalidSetting(
                f"{name} is no regressor, and no classifier with predict_proba: give `measure`, a function of the "
                "fitted estimator, X_query and y_query."
            )
        if np.ndim(self.y) != 1 or np.ndim(self.y_query) != 1:
            raise InvalidSetting(f"The classes have shape {np.shape(self.y)}; of several outputs, give `measure`.")
        unseen = np.setdiff1d(np.asarray(self.y_query), np.asarray(self.y))
        if len(unseen):
            raise InvalidInput(f"Queries have the classes {unseen.tolist()[:5]}, which no train row has.")

    def __call__(self, rows: ArrayLike, seed: int) -> NDArray[np.float64]:
        """The queries' losses [q] without the other rows; `seed` is every random_state that the estimator has."""
        fitted = self.fit(np.asarray(rows), seed)
        if self.measure is not None:
            found = self.measure(fitted, self.X_query, self.y_query)
        elif is_regressor(fitted):
            found = _half_squares(fitted, self.X_query, self.y_query)
        else:
            found = _log_losses(fitted, self.X_query, self.y_query, self.least)
        return self._checked(found, seed)

    def fit(self, rows: NDArray[np.int64], seed: int) -> Any:
        """A clone of the estimator, fitted to these rows. Errors: InvalidInput."""
        own = clone(self.estimator)
        states = [name for name in own.get_params() if name.split("__")[-1] == "random_state"]
        own.set_params(**dict.fromkeys(states, int(seed)))
        options: dict[str, Any] = {}
        if self.sample_weight is not None:
            options[_weight_name(own)] = np.asarray(self.sample_weight)[rows]
        x, y = _taken(self.X, rows), _taken(self.y, rows)
        try:
            return own.fit(x, y, **options)
        except ValueError as error:
            raise InvalidInput(
                f"{type(own).__name__} cannot be fitted to the {len(rows)} rows kept (seed {seed}): {error}"
            ) from error

    def _checked(self, found: ArrayLike, seed: int) -> NDArray[np.float64]:
        values, queries = np.asarray(found, dtype=np.float64), _rows(self.X_query)
        if values.shape != (queries,):
            raise ShapeMismatch(f"What was measured is {values.shape}; expected a number for each query, ({queries},).")
        if not np.isfinite(values).all():
            first = int(np.isfinite(values).argmin())
            raise NonFiniteValue(f"What was measured of query {first} is {values[first]} (seed {seed}).")
        return values


def _log_losses(fitted: Any, x: Any, y: Any, least: float) -> NDArray[np.float64]:
    given, classes = np.asarray(fitted.predict_proba(x), dtype=np.float64), np.asarray(fitted.classes_)
    hit = np.asarray(y)[:, None] == classes
    return -np.log(np.maximum((given * hit).sum(axis=1), least))


def _half_squares(fitted: Any, x: Any, y: Any) -> NDArray[np.float64]:
    given, wanted = (np.asarray(values, dtype=np.float64) for values in (fitted.predict(x), y))
    return ((given.reshape(wanted.shape) - wanted) ** 2 / 2).reshape(len(wanted), -1).sum(axis=1)


def _weight_name(estimator: object) -> str:
    return f"{estimator.steps[-1][0]}__sample_weight" if isinstance(estimator, Pipeline) else "sample_weight"


def _rows(values: Any) -> int:
    shape = shape_of(values)
    return len(values) if shape is None else int(shape[0])


def _taken(values: Any, rows: NDArray[np.int64]) -> Any:
    if is_frame(values):
        return values.iloc[rows]
    if shape_of(values) is not None:
        return values[rows]
    return [values[row] for row in rows]
