"""A fitted estimator, read as a linear model: coefficients, the loss of a row, and the penalty of its objective.

Everything that scikit-learn minimises here has one of two forms, with w_i the rows' weights and W their sum:

    sum_i w_i l_i + strength / 2 |coef|^2            Ridge (strength alpha), LogisticRegression (1 / C), ...
    sum_i w_i l_i / W + strength / 2 |coef|^2        Poisson, Gamma, Tweedie and SGD (strength alpha)

Over W, the first has the penalty strength / W beside the mean loss, whatever row is taken away. In the second the
penalty goes with the rows: each brings strength / 2 |coef|^2, and takes it along when it leaves (`Penalty.per_row`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
from sklearn import linear_model
from sklearn.exceptions import NotFittedError as LibraryNotFittedError
from sklearn.pipeline import Pipeline
from sklearn.utils.validation import check_is_fitted

from headwater.errors import InvalidInput, InvalidSetting, NonFiniteValue, NotFittedError, UnsupportedModel
from headwater.sklearn import families
from headwater.sklearn.batch import bad_rows
from headwater.sklearn.families import Array, Family


class EstimatorNotFittedError(NotFittedError, LibraryNotFittedError):
    """The estimator, or what is built on it, has not been fitted: headwater's error and scikit-learn's own."""


@dataclass(frozen=True, eq=False)
class Penalty:
    """strength / 2 times the squared coefficients."""

    strength: Array
    """One for each output: [o]."""
    per_row: bool
    """Whether it stands beside the mean loss, so that every row brings its share; else beside the weighted sum."""
    intercept: float = 0.0
    """Strength on the intercept; zero but for the liblinear solver."""

    @property
    def is_zero(self) -> bool:
        return not (self.strength.any() or self.intercept)

    def beside_mean(self, weight: float) -> Penalty:
        """The same penalty beside the mean loss over rows of this total weight."""
        if self.per_row:
            return self
        return replace(self, strength=self.strength / weight, intercept=self.intercept / weight)

    def diagonal(self, features: int, intercept: bool) -> Array:
        """[o, features], and a last column for the intercept."""
        columns = np.repeat(self.strength[:, None], features, axis=1)
        own = np.full((len(self.strength), 1), self.intercept)
        return np.concatenate([columns, own], axis=1) if intercept else columns


@dataclass(frozen=True, eq=False)
class LinearModel:
    """What an estimator has learned, and what it minimised."""

    name: str
    """The class of the estimator."""
    coef: Array
    """[o, features]."""
    intercept: Array | None
    """[o], or None where there is none."""
    family: Family
    penalty: Penalty
    classes: Array | None
    """The labels in the order of their numbers, for a classifier."""
    class_weight: Any
    """None, "balanced", or {label: weight}."""

    @property
    def outputs(self) -> int:
        return int(self.coef.shape[0])

    @property
    def features(self) -> int:
        return int(self.coef.shape[1])

    @property
    def weights(self) -> Array:
        """Coefficients, and the intercept as a last column: [o, features (+ 1)]."""
        return self.coef if self.intercept is None else np.concatenate([self.coef, self.intercept[:, None]], axis=1)

    def output(self, x: Array) -> Array:
        """[n, o]."""
        z = x @ self.coef.T
        return z if self.intercept is None else z + self.intercept

    def encode(self, y: object) -> Array:
        """Targets as numbers: of classes (integers [n]), or values ([n], or [n, o]). Errors: InvalidInput."""
        given = np.asarray(y)
        return self._values(given) if self.classes is None else self._numbers(given, self.classes)

    def _values(self, y: Array) -> Array:
        try:
            if y.dtype.kind not in "iufbO":
                raise TypeError(f"the dtype is {y.dtype}")
            values = y.astype(np.float64)
        except (TypeError, ValueError) as error:
            raise InvalidInput(f"{self.name} predicts numbers, and y has others: {error}. Pass a numeric y.") from None
        shapes = [(len(y), self.outputs)] + ([(len(y),)] if self.outputs == 1 else [])
        if y.ndim == 0 or values.shape not in shapes:
            raise InvalidInput(f"y has shape {values.shape}; {self.name} was fitted to targets of shape {shapes[-1]}.")
        if not np.isfinite(values).all():
            raise NonFiniteValue("y has NaN or infinity.", bad_rows(values))
        if len(values):
            self.family.check(values)
        # One output: [n, 1] and [n] are the same targets, and must have the same row keys.
        return values[:, 0] if values.ndim == 2 and self.outputs == 1 else values

    def _numbers(self, y: Array, classes: Array) -> Array:
        numeric = [kind in "iufb" for kind in (y.dtype.kind, classes.dtype.kind)]
        if y.ndim != 1:
            raise InvalidInput(f"y has shape {y.shape}; expected one label for each row, of {classes.tolist()}.")
        # NumPy would compare "1" with 1 as text, or not at all.
        if numeric[0] != numeric[1]:
            raise InvalidInput(
                f"y has labels of dtype {y.dtype}, such as {_few(y)}; {self.name} was fitted with classes "
                f"{classes.tolist()} ({classes.dtype}). Pass labels as they were at fit."
            )
        try:
            unknown = np.setdiff1d(y, classes)
        except TypeError as error:
            raise InvalidInput(f"y has labels that cannot be compared with {classes.tolist()}: {error}.") from None
        if len(unknown):
            raise InvalidInput(f"y has labels {_few(unknown)} that {self.name} does not know: {classes.tolist()}.")
        # scikit-learn keeps classes sorted.
        return np.searchsorted(classes, y).astype(np.int64)

    def class_weights(self, given: Mapping[Any, float] | None) -> Array | None:
        """The weight of each class [classes], from `given` or the estimator; None if all are one.

        Errors: InvalidSetting where they follow from training rows, or mean something else than weights of rows.
        """
        chosen = self.class_weight if given is None else given
        if chosen is None:
            return None
        if self.classes is None:
            raise InvalidSetting(f"class_weight is {chosen!r}, but {self.name} is no classifier.")
        if isinstance(chosen, str):
            raise InvalidSetting(
                f"class_weight={chosen!r} follows from the training rows. Pass class_weight={{label: weight}}, as "
                "sklearn.utils.class_weight.compute_class_weight gives them; TrainingInfluence does so by itself."
            )
        unknown = [label for label in chosen if label not in self.classes]
        if unknown:
            raise InvalidSetting(f"class_weight names {unknown}; the classes are {self.classes.tolist()}.")
        if self.name == "SGDClassifier" and len(self.classes) > 2:
            raise UnsupportedModel(
                "SGDClassifier weighs the classes of each one-against-the-rest problem apart, which is no weight of "
                "rows. Use class_weight=None, or LogisticRegression."
            )
        return np.array([float(chosen.get(label, 1.0)) for label in self.classes.tolist()])


def _few(values: Array) -> str:
    shown = [str(v) if values.dtype.kind in "OU" else f"{v:g}" for v in values[:5]]
    return f"[{', '.join(shown)}{', ...' if len(values) > 5 else ''}]"


@runtime_checkable
class Search(Protocol):
    """A search for settings, such as GridSearchCV, that fits the best again."""

    estimator: Any
    refit: Any


def attribute_of(estimator: object, name: str, default: object = None) -> Any:
    """An option that not every estimator, or every version of it, has; or what `fit` leaves, once it has."""
    return getattr(estimator, name, default)


def last_step(estimator: object) -> tuple[Any, Any]:
    """The linear model at the end of a pipeline or a finished search, and the steps before it (None if there are none).

    Errors: EstimatorNotFittedError.
    """
    if isinstance(estimator, Search):
        best = attribute_of(estimator, "best_estimator_")
        if best is None:
            raise EstimatorNotFittedError(f"{_called(estimator)} has no best_estimator_: call fit, with refit=True.")
        return last_step(best)
    if isinstance(estimator, Pipeline):
        inner, before = last_step(estimator.steps[-1][1])
        if before is not None:
            raise UnsupportedModel(f"{_called(estimator)} ends with a pipeline; make one pipeline of the two.")
        return inner, estimator[:-1] if len(estimator.steps) > 1 else None
    return estimator, None


def _has_no_gradient(estimator: object) -> bool:
    """Trees and what is made of them, neighbours, kernels, naive Bayes: told by the module that they come from."""
    home = type(estimator).__module__
    # LinearSVC and LinearSVR are linear models; theirs is a loss that is not supported.
    return home.startswith(WITHOUT_GRADIENTS) and not _called(estimator).startswith("Linear")


WITHOUT_GRADIENTS = (
    "sklearn.ensemble.",
    "sklearn.tree.",
    "sklearn.svm.",
    "sklearn.neighbors.",
    "sklearn.naive_bayes",
    "sklearn.gaussian_process.",
    "xgboost.",
    "lightgbm.",
    "catboost.",
)


def _called(estimator: object) -> str:
    return type(estimator).__name__


def read(estimator: object) -> LinearModel:
    """A fitted estimator's last step as a linear model, as it is now.

    Errors: EstimatorNotFittedError; UnsupportedModel for an estimator, a loss or a penalty that is not supported.
    """
    if isinstance(estimator, type):
        raise UnsupportedModel(f"The estimator is the class {estimator.__name__}; pass a fitted instance of it.")
    final, _ = last_step(estimator)
    rule = _RULES.get(type(final))
    if rule is None:
        if _has_no_gradient(final):
            raise UnsupportedModel(
                f"{_called(final)} has no parameters that a loss could be differentiated by, which influence functions "
                "are made of. Attribution by retraining fits it: a bank of models fitted to parts of the rows, "
                "headwater.evaluate.retrain with headwater.retraining.sklearn.Refit."
            )
        known = ", ".join(kind.__name__ for kind in _RULES)
        raise UnsupportedModel(f"{_called(final)} is not supported; supported are {known}, alone or after a Pipeline.")
    try:
        check_is_fitted(final, "coef_")
    except LibraryNotFittedError:
        raise EstimatorNotFittedError(f"{_called(final)} is not fitted yet: call its fit(X, y) first.") from None
    coef = np.atleast_2d(np.asarray(final.coef_, dtype=np.float64))
    intercept = None
    if final.fit_intercept:
        # A model of several outputs may have one number for all of them.
        intercept = np.broadcast_to(np.asarray(final.intercept_, dtype=np.float64).reshape(-1), (len(coef),)).copy()
    family, penalty = rule(final, len(coef))
    classes = attribute_of(final, "classes_")
    classes = None if classes is None else np.asarray(classes)
    return LinearModel(_called(final), coef, intercept, family, penalty, classes, attribute_of(final, "class_weight"))


# One rule for each estimator -----------------------------------------------------------------------------------------

Rule = Callable[[Any, int], tuple[Family, Penalty]]


def _no_penalty(outputs: int) -> Penalty:
    return Penalty(np.zeros(outputs), per_row=False)


def _least_squares(estimator: object, outputs: int) -> tuple[Family, Penalty]:
    _refuse_positive(estimator)
    return families.SquaredError(), _no_penalty(outputs)


def _refuse_positive(estimator: Any) -> None:
    if estimator.positive:
        raise UnsupportedModel(f"{_called(estimator)}(positive=True) stops at a bound, where no gradient is zero.")


def _ridge(estimator: Any, outputs: int) -> tuple[Family, Penalty]:
    if attribute_of(estimator, "positive"):
        _refuse_positive(estimator)
    classes, chosen = attribute_of(estimator, "classes_"), attribute_of(estimator, "alpha_")
    family = families.SquaredError() if classes is None else families.SquaredErrorOfSigns()
    if classes is not None and outputs == 1 and len(classes) > 2:
        raise UnsupportedModel(f"{_called(estimator)} of several labels a row is not supported.")
    # A cross-validated model fitted with `alpha_`, the one that it chose.
    alpha = np.asarray(estimator.alpha if chosen is None else chosen, float)
    return family, Penalty(np.broadcast_to(alpha.reshape(-1), (outputs,)).copy(), per_row=False)


def _logistic(estimator: Any, outputs: int) -> tuple[Family, Penalty]:
    binary, form = len(estimator.classes_) == 2, attribute_of(estimator, "multi_class", "auto")
    if (binary and form == "multinomial") or (not binary and form == "ovr"):
        raise UnsupportedModel(f"LogisticRegression(multi_class={form!r}) of {len(estimator.classes_)} classes.")
    kind = attribute_of(estimator, "penalty", "deprecated")
    if kind == "deprecated":
        # scikit-learn 1.8 says the penalty by l1_ratio, older versions by name.
        kind = {0: "l2", None: "l2", 1: "l1"}.get(estimator.l1_ratio, "elasticnet")
    if kind == "elasticnet" and estimator.l1_ratio == 0:
        kind = "l2"
    if kind not in ("l2", None):
        raise _not_smooth(estimator, kind)
    # The objective is C times summed losses plus |w|^2 / 2: divided by C, the penalty is 1 / C beside the sum.
    inverse = 0.0 if kind is None or np.isinf(estimator.C) else 1.0 / estimator.C
    # liblinear takes the intercept for one more coefficient, and penalises it.
    by_liblinear = estimator.solver == "liblinear" and estimator.fit_intercept
    intercept = inverse / estimator.intercept_scaling**2 if by_liblinear else 0.0
    family: Family = families.Binary() if binary else families.Softmax()
    return family, Penalty(np.full(outputs, inverse), per_row=False, intercept=intercept)


def _not_smooth(estimator: object, kind: object) -> UnsupportedModel:
    return UnsupportedModel(
        f"{_called(estimator)} has the penalty {kind!r}, which has no curvature where a coefficient is zero. Only 'l2' "
        "and no penalty are supported; you can fit the features that were kept again, with 'l2'."
    )


def _generalised(power: float | None) -> Rule:
    def rule(estimator: Any, outputs: int) -> tuple[Family, Penalty]:
        own = estimator.power if power is None else power
        link = "log" if power is not None else estimator.link
        # As scikit-learn chooses: the identity for the normal distribution alone.
        log = link == "log" or (link == "auto" and own > 0)
        return families.Tweedie(float(own), bool(log)), Penalty(np.full(outputs, float(estimator.alpha)), per_row=True)

    return rule


def _sgd(losses: Mapping[str, Callable[[Any], Family]]) -> Rule:
    def rule(estimator: Any, outputs: int) -> tuple[Family, Penalty]:
        if estimator.loss not in losses:
            raise UnsupportedModel(
                f"{_called(estimator)} has the loss {estimator.loss!r}, whose slope jumps; twice differentiable almost "
                f"everywhere are {', '.join(map(repr, losses))}."
            )
        plain = estimator.penalty is None or (estimator.penalty == "elasticnet" and estimator.l1_ratio == 0)
        if estimator.penalty != "l2" and not plain:
            raise _not_smooth(estimator, estimator.penalty)
        strength = 0.0 if estimator.penalty is None else float(estimator.alpha)
        return losses[estimator.loss](estimator), Penalty(np.full(outputs, strength), per_row=True)

    return rule


_RULES: dict[type, Rule] = {
    linear_model.LinearRegression: _least_squares,
    linear_model.Ridge: _ridge,
    linear_model.RidgeCV: _ridge,
    linear_model.RidgeClassifier: _ridge,
    linear_model.RidgeClassifierCV: _ridge,
    linear_model.LogisticRegression: _logistic,
    linear_model.PoissonRegressor: _generalised(1.0),
    linear_model.GammaRegressor: _generalised(2.0),
    linear_model.TweedieRegressor: _generalised(None),
    linear_model.SGDClassifier: _sgd(
        {
            "log_loss": lambda e: families.Binary() if len(e.classes_) == 2 else families.LogLoss(),
            "modified_huber": lambda e: families.ModifiedHuber(),
            "squared_hinge": lambda e: families.SquaredHinge(),
            "squared_error": lambda e: families.SquaredErrorOfSigns(),
        }
    ),
    linear_model.SGDRegressor: _sgd(
        {
            "squared_error": lambda e: families.SquaredError(),
            "huber": lambda e: families.Huber(float(e.epsilon)),
            "squared_epsilon_insensitive": lambda e: families.SquaredEpsilonInsensitive(float(e.epsilon)),
        }
    ),
}
