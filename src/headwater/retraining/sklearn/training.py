"""Training data attribution with scikit-learn's conventions: settings in `__init__`, rows in `fit`, results after."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from inspect import signature
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import ArrayLike
from sklearn.base import BaseEstimator, MetaEstimatorMixin, clone
from sklearn.utils import get_tags
from sklearn.utils.class_weight import compute_class_weight
from sklearn.utils.validation import validate_data

from headwater.errors import InvalidInput, InvalidSetting, NotConverged
from headwater.gradients.provider import EXPLAIN
from headwater.methods.base import Method
from headwater.methods.damping import Damping
from headwater.methods.direct import Direct
from headwater.retraining.sklearn.removal import ExactRemoval, Refits
from headwater.settings import check_word
from headwater.sklearn.batch import FeatureBatch, SklearnBatch
from headwater.sklearn.families import Array
from headwater.sklearn.influence import SklearnComposableInfluence
from headwater.sklearn.linear import EstimatorNotFittedError, LinearModel, attribute_of, last_step, read
from headwater.sklearn.provider import SklearnGradientProvider, check_names
from headwater.sklearn.regression import RowLabels, frame_of

if TYPE_CHECKING:
    import pandas

STATIONARY = 1e-2
"""The largest mean slope, in any parameter and relative to the slopes of single rows, that passes for a minimum."""


class TrainingInfluence(MetaEstimatorMixin, BaseEstimator):
    """Which training rows made an estimator predict this: forecasts for all rows at once, and the exact answer.

    Parameters
    ----------
    estimator : a linear model of scikit-learn, alone, at the end of a Pipeline, or found by a search.
    method : settings such as hw.Direct(); None for hw.Direct(curvature="hessian"), the exact influence function.
    damping : beside the estimator's own penalty; 0 for none, hw.relative(...), or None for the method's default.
    prefit : True if the estimator has been fitted to the rows that `fit` is given; False to fit a clone of it to them.

    Attributes
    ----------
    estimator_ : the fitted estimator: the one that was given, or the clone.
    influence_ : the fitted `SklearnComposableInfluence`, with all that it can do.
    class_weight_ : {label: weight} if the estimator weighs classes, else None.
    slope_ : how far the rows are from having their minimum at the coefficients; see `STATIONARY`.
    n_features_in_, feature_names_in_ : of the rows that were fitted; names only where the columns had them.

    Rows are named by their position. Values are positive where the row helps: where the loss of the query rises
    without it. Warns (NotConverged) if the coefficients are no minimum on the rows: not converged, or other rows.
    scikit-learn's clones have their estimator unfitted: for searches over this class give prefit=False.
    """

    def __init__(
        self,
        estimator: Any,
        method: Method | None = None,
        *,
        damping: Damping | None = 0.0,
        prefit: bool = True,
    ):
        self.estimator = estimator
        self.method = method
        self.damping = damping
        self.prefit = prefit

    def fit(self, X: object, y: object, sample_weight: object = None) -> Self:
        """The rows that the estimator was fitted to, or is to be.

        Errors: EstimatorNotFittedError; InvalidInput for rows that cannot be those of the fit (other features, names or
        classes); UnsupportedModel for estimators, losses and penalties without an influence function.
        """
        if isinstance(self.estimator, type):
            read(self.estimator)
        if self.prefit:
            read(self.estimator)
            check_names(self.estimator, X)
        validate_data(self, X, y, skip_check_array=True)
        self.estimator_ = self.estimator if self.prefit else self._fitted_clone(X, y, sample_weight)
        model = read(self.estimator_)
        _check_classes(model, y)
        weights = None
        if sample_weight is not None:
            given = np.asarray(sample_weight, dtype=np.float64)
            weights = np.full(len(np.asarray(y)), given) if given.ndim == 0 else given
        self.class_weight_ = _class_weight(model, y, weights)
        influence: SklearnComposableInfluence = SklearnComposableInfluence(
            self.estimator_,
            Direct(curvature="hessian") if self.method is None else self.method,
            damping=self.damping,
            class_weight=self.class_weight_,
        )
        provider = influence.source
        assert isinstance(provider, SklearnGradientProvider)
        train = provider.prepared(SklearnBatch(X, y, weights))
        _check_weights(model, provider.row_weights(train))
        self.slope_ = _slope(provider, train)
        if not self.slope_ <= STATIONARY:
            warnings.warn(
                f"{model.name} is at no minimum of its objective on these rows: the mean slope is {self.slope_:.2g} of "
                "a row's. It has not converged (lower tol, raise max_iter), or was fitted to other rows or weights.",
                NotConverged,
                stacklevel=2,
            )
        self._provider, self._train = provider, train
        self._labels = RowLabels.of(self.estimator_, X, y)
        self._exact = ExactRemoval(provider, train)
        self.influence_ = influence.fit([train])
        return self

    def _fitted_clone(self, X: object, y: object, sample_weight: object) -> Any:
        options: dict[str, Any] = {}
        if sample_weight is not None:
            before = last_step(self.estimator)[1] is not None
            options = {f"{self.estimator.steps[-1][0]}__sample_weight" if before else "sample_weight": sample_weight}
        return clone(self.estimator).fit(X, y, **options)

    # Forecasts ----------------------------------------------------------------------------------------------------

    def scores(self, X: object, y: object, *, unit: str = "removal", explain: str = "label") -> Any:
        """How much each training row helps each query row: hw.Scores, labelled values [q, n].

        unit: "removal", the forecast rise of the query's loss without the row, to first order; or "influence".
        explain: the loss under the query's own "label", or under the label that is the model's "prediction".
        """
        return self._ready().attribute([self._train], [self._queries(X, y)], unit=unit, explain=explain)

    def forecast(
        self, X: object, y: object, groups: Iterable[ArrayLike] | None = None, *, explain: str = "label"
    ) -> Array:
        """The rise of each query's loss without a row, or a group of rows, by one Newton step: [q, n] or [q, groups].

        Better than `scores` for rows of high leverage, and for groups. See `headwater.run.removal`. explain: as there.
        """
        return self._ready().removal([self._train], [self._queries(X, y)], groups, explain=explain)

    def self_influence(self) -> Array:
        """How much each training row helps itself, per unit of weight in the mean objective: [n]."""
        return self._ready().self_influence([self._train])

    # Exactly ------------------------------------------------------------------------------------------------------

    def leave_one_out(self, X: object, y: object, *, explain: str = "label") -> Array:
        """The rise of each query's loss without each training row, exactly: [q, n].

        In closed form for least squares; refitted to rounding for every other loss (see
        `headwater.retraining.sklearn.removal`).
        """
        return self.remove(None, X, y, explain=explain)

    def remove(self, groups: Iterable[ArrayLike] | None, X: object, y: object, *, explain: str = "label") -> Array:
        """The rise of each query's loss without each group of training rows, exactly: [q, groups].

        explain: the loss under the query's own "label", or under the label that is the model's "prediction".
        """
        self._ready()
        check_word("explain", explain, EXPLAIN)
        queries = self._queries(X, y)
        queries = self._provider.predicted(queries) if explain == "prediction" else queries
        return self._exact.without(groups).losses(queries) - self._exact.with_all.losses(queries)

    def refits(self, groups: Iterable[ArrayLike] | None = None) -> Refits:
        """The coefficients without each training row, or group of them, exactly."""
        self._ready()
        return self._exact.without(groups)

    # Regression diagnostics ---------------------------------------------------------------------------------------

    def diagnostics(self) -> pandas.DataFrame:
        """Leverage, Cook's distance, DFBETAS, DFFITS and studentised residuals of the training rows, a DataFrame.

        Columns as statsmodels has them; see `headwater.sklearn.diagnostics`.
        """
        self._ready()
        return frame_of(self._provider, self._train, self._labels)

    # What they share ----------------------------------------------------------------------------------------------

    def _ready(self) -> SklearnComposableInfluence:
        if not self.__sklearn_is_fitted__():
            raise EstimatorNotFittedError(f"This {type(self).__name__} is not fitted yet: call fit(X, y) first.")
        self.influence_.check_weights()
        return self.influence_

    def _queries(self, X: object, y: object) -> FeatureBatch:
        self._ready()
        check_names(self, X)
        return self._provider.as_batch(X, y)

    def __sklearn_is_fitted__(self) -> bool:
        return attribute_of(self, "influence_") is not None

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        if not isinstance(self.estimator, type):
            tags.input_tags = get_tags(self.estimator).input_tags
        tags.target_tags.required = True
        return tags


def _check_classes(model: LinearModel, y: object) -> None:
    """Errors: InvalidInput for labels that the model does not know, or a class of it without any row."""
    numbers = model.encode(y)
    if model.classes is None:
        return
    missing = np.setdiff1d(np.arange(len(model.classes)), numbers)
    if len(missing):
        raise InvalidInput(
            f"y has no row of {model.classes[missing].tolist()}, but {model.name} was fitted with the classes "
            f"{model.classes.tolist()}. Pass the rows that it was fitted to."
        )


def _class_weight(model: LinearModel, y: object, weights: Array | None) -> Mapping[Any, float] | None:
    """The weights of classes that the estimator used, "balanced" ones worked out as it does."""
    if not isinstance(model.class_weight, str):
        return model.class_weight
    assert model.classes is not None
    options: dict[str, Any] = {"classes": model.classes, "y": np.asarray(y)}
    if model.name == "LogisticRegression" and "sample_weight" in signature(compute_class_weight).parameters:
        options["sample_weight"] = np.ones(len(options["y"])) if weights is None else weights
    found = compute_class_weight(model.class_weight, **options)
    return dict(zip(model.classes.tolist(), map(float, found), strict=True))


def _check_weights(model: LinearModel, weights: Array | None) -> None:
    """Stochastic descent divides by the number of rows, not by their weights. Errors: InvalidInput; InvalidSetting."""
    if weights is not None and not weights.sum() > 0:
        raise InvalidInput("All weights of rows are zero: nothing was fitted to them.")
    if weights is not None and model.name.startswith("SGD") and not np.isclose(weights.mean(), 1.0, rtol=1e-9):
        raise InvalidSetting(
            f"The rows' weights average {weights.mean():g}, but {model.name} holds its penalty against the number of "
            "rows: they need to average 1. Divide them by their mean."
        )


def _slope(provider: SklearnGradientProvider, train: FeatureBatch) -> float:
    """The largest mean slope of the objective by a parameter, over what slopes of rows are like there.

    That is the root mean squares of the input and of the output's gradient, multiplied; so that units of inputs and
    targets have no part in it. A perfect fit has gradients of rounding alone; they are compared with the outputs.
    """
    model = provider.model
    weights = provider.row_weights(train)
    total = float(len(train)) if weights is None else float(weights.sum())
    output = model.output(train.x)
    slopes = model.family.gradient(output, train.y)
    weighted = slopes if weights is None else slopes * weights[:, None]
    inputs = train.x if model.intercept is None else np.concatenate([train.x, np.ones((len(train), 1))], axis=1)
    held = model.penalty.beside_mean(total).diagonal(model.features, model.intercept is not None)
    mean = weighted.T @ inputs / total + held * model.weights
    sizes = [_root_mean_square(values) for values in (slopes, output, inputs)]
    usual = (sizes[0] + 1e-8 * sizes[1])[:, None] * sizes[2]
    return float(np.max(np.abs(mean[usual > 0]) / usual[usual > 0], initial=0.0))


def _root_mean_square(values: Array) -> Array:
    """By column."""
    return np.sqrt(np.mean(values**2, axis=0))
