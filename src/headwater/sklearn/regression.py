"""Regression diagnostics: leverage, Cook's distance, DFBETAS, DFFITS, studentised residuals, row by row in a DataFrame.

Layouts: inputs X [n, p] with a column of ones where there is an intercept; weights of rows w [n]; linear predictor
z = X b; one output. Of the estimator's own loss l(z, y), s_i = -w_i l'(z_i) is what row i adds to the score, and
W_i = w_i E[l''(z_i)] its weight in the expected information (for least squares w_i; the last step of iteratively
reweighted least squares elsewhere). P is the diagonal of the penalty beside the sum of losses; zero without one.

1. A = X^T W X + P, and leverages h_i = W_i x_i^T A^-1 x_i: the diagonal of the hat matrix, of ridge regression with P.
   Their sum k is the number of parameters, with a penalty the effective one; nu = n - k, without rows of weight zero.
2. Pearson residuals r_i = s_i / sqrt(W_i), of least squares sqrt(w_i) (y_i - z_i). The dispersion phi is their squares'
   sum over nu, or 1 for a log loss and Poisson counts.
3. standard_resid (internally studentised) t_i = r_i / sqrt(phi (1 - h_i)). cooks_d = t_i^2 h_i / ((1 - h_i) k).
   dffits_internal = t_i sqrt(h_i / (1 - h_i)).
4. Row i moves the coefficients by d_i = A^-1 x_i s_i / (1 - h_i): b minus what they are without it. Exact for least
   squares, with a penalty too; one step of Newton's method for the others (Pregibon 1981).
5. Least squares: phi_i = (nu phi - r_i^2 / (1 - h_i)) / (nu - 1) is the dispersion without the row. student_resid
   (externally studentised) = r_i / sqrt(phi_i (1 - h_i)), dffits the same times sqrt(h_i / (1 - h_i)), and DFBETAS
   d_i / sqrt(phi_i diag A^-1). Of the others DFBETAS are d_i / sqrt(phi diag A^-1), d_i over the standard errors.

Without a penalty these are statsmodels' `OLSInfluence` and, for the others, `GLMInfluence` of the expected information
(`get_influence(observed=False)`; with a canonical link, logistic and Poisson, that is the default).
Sources: Cook 1977, Technometrics 19; Belsley, Kuh and Welsch 1980, "Regression Diagnostics"; Pregibon 1981, Annals of
Statistics 9; Hastie and Tibshirani 1990 (effective degrees of freedom).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from headwater.arrays import is_frame
from headwater.errors import Undetermined, UnsupportedModel
from headwater.loaders.frames import ids_of
from headwater.sklearn.batch import FeatureBatch, SklearnBatch, column_names
from headwater.sklearn.families import Array, Binary, Elementwise, SquaredError, Tweedie
from headwater.sklearn.linear import LinearModel, attribute_of, last_step
from headwater.sklearn.provider import SklearnGradientProvider
from headwater.tables import pandas_module

if TYPE_CHECKING:
    import pandas

EPS = float(np.finfo(np.float64).eps)
ALONE = 1e4 * EPS
"""1 - leverage below which a row by itself decides on a direction: as for exact removal."""
INTERCEPT = "const"
"""What the intercept is called: statsmodels' name for it."""


@dataclass(frozen=True, eq=False)
class RowLabels:
    """How rows and columns of the user's x are called."""

    index: Any
    """Of a DataFrame, or of y where only that is a Series; None for arrays."""
    features: Sequence[str]
    """Of the linear model: columns of x, or what a pipeline's steps call theirs; else x1, x2, ..."""

    @classmethod
    def of(cls, estimator: Any, x: object, y: object) -> RowLabels:
        _, before = last_step(estimator)
        given = column_names(x)
        names: Any = None if given is None else [str(name) for name in given]
        if before is not None:
            rename = attribute_of(before, "get_feature_names_out")
            try:
                names = None if rename is None or names is None else list(rename(given))
            except (AttributeError, ValueError):  # a step that does not name what it gives
                names = None
        framed = next((value for value in (x, y) if is_frame(value)), None)
        return cls(None if framed is None else attribute_of(framed, "index"), names or ())


def diagnostics(estimator: Any, x: object, y: object, sample_weight: object = None) -> pandas.DataFrame:
    """Leverage, Cook's distance, DFBETAS and studentised residuals of the rows that a fitted estimator was fitted to.

    A DataFrame with x's index, one row for each train row, and the columns of statsmodels' `summary_frame()`:

    - dfb_NAME for each coefficient, dfb_const for the intercept: DFBETAS;
    - cooks_d, standard_resid (internally studentised), hat_diag (leverage), dffits_internal;
    - of least squares student_resid (externally studentised) and dffits;

    and besides d_NAME, how much larger the coefficient is with the row than without; resid (y minus the prediction),
    loo_pred and loo_resid: the prediction for the row of a fit without it, and what is then left. All are exact for
    least squares; for logistic regression and generalised linear models they are Pregibon's one-step versions, where
    `TrainingInfluence.refits()` is exact. Formulas, and what a penalty makes of them, are at the top of the module. A
    penalty is taken to stay as it is, also where it goes with the rows (`TweedieRegressor` and its kin).

    NaN, with a warning (`Undetermined`) that says which: what is about coefficients of dependent columns, which are
    arbitrary; and for a row of leverage 1, which alone decides on some direction, all that a fit without it would say.
    estimator: LinearRegression, Ridge, RidgeCV, LogisticRegression of two classes, PoissonRegressor, GammaRegressor,
    TweedieRegressor, SGD with their losses, or a pipeline that ends in one. sample_weight: as given to `fit`; only
    their ratios count where the dispersion is estimated.
    Errors: UnsupportedModel for several outputs or another loss; MissingExtra without pandas; those of
    `SklearnGradientProvider.prepared`.
    """
    ids_of(x, y, 0)  # refuses an index of x that is not y's
    provider = SklearnGradientProvider(estimator)
    weights = None if sample_weight is None else np.asarray(sample_weight, dtype=np.float64)
    return frame_of(provider, provider.prepared(SklearnBatch(x, y, weights)), RowLabels.of(estimator, x, y))


def frame_of(provider: SklearnGradientProvider, batch: FeatureBatch, labels: RowLabels) -> pandas.DataFrame:
    """See `diagnostics`."""
    pandas = pandas_module()
    model = provider.model
    given = provider.row_weights(batch)
    found = _Diagnostics(model, batch, np.ones(len(batch)) if given is None else given)
    features = list(labels.features) or [f"x{k + 1}" for k in range(model.features)]
    names = features if model.intercept is None else [INTERCEPT, *features]
    order = list(range(model.features)) if model.intercept is None else [model.features, *range(model.features)]
    dfbetas = {f"dfb_{name}": found.dfbetas[:, k] for name, k in zip(names, order, strict=True)}
    changes = {f"d_{name}": found.changes[:, k] for name, k in zip(names, order, strict=True)}
    found.warn([names[order.index(k)] for k in np.flatnonzero(~found.is_determined)], labels.index)
    return pandas.DataFrame({**dfbetas, **found.columns(), **changes, **found.left_out()}, index=labels.index)


class _Diagnostics:
    """The numbers, in NumPy; steps are those of the module."""

    def __init__(self, model: LinearModel, batch: FeatureBatch, weights: Array):
        family = _family_of(model)
        self.model, self.least_squares = model, isinstance(family, SquaredError)
        self.x = batch.x if model.intercept is None else np.concatenate([batch.x, np.ones((len(batch), 1))], axis=1)
        self.z = model.output(batch.x)
        self.targets = family.targets(batch.y, 1)
        slope, second = -family.first(self.z, self.targets)[:, 0], family.expected(self.z, self.targets)[:, 0]
        root = self.root = np.sqrt(weights * second)
        penalty = model.penalty.diagonal(model.features, model.intercept is not None)[0]
        if model.penalty.per_row:
            penalty = penalty * weights.sum()
        self._decompose(root, penalty)
        # Saturated probabilities and leverages of 1 divide by zero; what comes of it is NaN, and said.
        with np.errstate(divide="ignore", invalid="ignore"):
            self.pearson = np.sqrt(weights) * np.where(second > 0, slope / np.sqrt(second), np.nan)
            self._measure(int(np.count_nonzero(weights)), _dispersion_is_one(family))

    def _decompose(self, root: Array, penalty: Array) -> None:
        """Leverages, and A^-1 x_i sqrt(W_i), from singular values: they never square the condition."""
        stacked = np.concatenate([self.x * root[:, None], np.diag(np.sqrt(penalty))])
        # Columns of length one first, so that units of features do not pass for dependence.
        sizes = np.linalg.norm(stacked, axis=0)
        scale = 1.0 / np.where(sizes > 0, sizes, 1.0)
        left, values, right = np.linalg.svd(stacked * scale, full_matrices=False)
        kept = values > len(stacked) * EPS * values.max(initial=0.0)
        basis, values = left[: len(root), kept], values[kept]
        self.leverage = (basis**2).sum(axis=1)
        back = (scale[:, None] * right[kept].T) / values
        self.pulls, self.spread = basis @ back.T, np.sqrt((back**2).sum(axis=1))
        # A coefficient is determined where no direction that the rows leave free moves it.
        self.is_determined = (right[~kept] ** 2).sum(axis=0) <= np.sqrt(EPS)

    def _measure(self, rows: int, dispersion_is_one: bool) -> None:
        left = 1.0 - self.leverage
        self.alone = left <= ALONE
        left = np.where(self.alone, np.nan, left)
        self.parameters = float(self.leverage.sum())
        self.freedom = rows - self.parameters
        squares = float((self.pearson**2).sum())
        # Below half a degree of freedom there is none, but for rounding.
        self.dispersion = 1.0 if dispersion_is_one else squares / self.freedom if self.freedom > 0.5 else np.nan
        self.standard = self.pearson / np.sqrt(self.dispersion * left)
        self.ratio = np.sqrt(self.leverage / left)
        self.changes = self.pulls * (self.pearson / left)[:, None]
        self.changes[:, ~self.is_determined] = np.nan
        own = np.full(len(left), self.dispersion)
        if self.least_squares:
            less = self.freedom * self.dispersion - self.pearson**2 / left
            own = np.where(self.freedom > 1.5, np.maximum(less, 0.0), np.nan) / (self.freedom - 1)
        self.student = self.pearson / np.sqrt(own * left)
        self.dfbetas = self.changes / np.sqrt(own)[:, None] / self.spread

    def columns(self) -> dict[str, Array]:
        found = {
            "cooks_d": self.standard**2 * self.ratio**2 / self.parameters,
            "standard_resid": self.standard,
            "hat_diag": self.leverage,
            "dffits_internal": self.standard * self.ratio,
        }
        if self.least_squares:
            found |= {"student_resid": self.student, "dffits": self.student * self.ratio}
        return found

    def left_out(self) -> dict[str, Array]:
        """Residuals, and predictions without the row, in the units of y; of classes the probability of the second."""
        change = self.ratio**2 * self.pearson / np.where(self.root > 0, self.root, np.inf)
        without = self._mean(self.z[:, 0] - change)
        observed = (self.targets[:, 0] + 1) / 2 if isinstance(self.model.family, Binary) else self.targets[:, 0]
        return {"resid": observed - self._mean(self.z[:, 0]), "loo_pred": without, "loo_resid": observed - without}

    def _mean(self, z: Array) -> Array:
        family = self.model.family
        if isinstance(family, Binary):
            return np.exp(-np.logaddexp(0.0, -z))
        return np.exp(z) if isinstance(family, Tweedie) and family.log_link else z

    def warn(self, undetermined: Sequence[str], index: Any) -> None:
        """Of what is NaN, and why."""
        alone = np.flatnonzero(self.alone)
        said = []
        if undetermined:
            said.append(
                f"the columns are dependent, so that the coefficients of {', '.join(undetermined)} are not determined, "
                "and their dfb_ and d_ are NaN: leave a column out, or use Ridge"
            )
        if len(alone):
            names = [index[k] if index is not None else int(k) for k in alone[:5]]
            said.append(
                f"rows of leverage 1 ({len(alone)}, the first are {names}) decide alone on some direction: what a fit "
                "without them would say is NaN"
            )
        if said:
            warnings.warn(Undetermined(f"Diagnostics: {'; '.join(said)}."), stacklevel=4)


def _family_of(model: LinearModel) -> Elementwise:
    """Errors: UnsupportedModel."""
    if model.outputs != 1:
        raise UnsupportedModel(
            f"{model.name} has {model.outputs} outputs, and regression diagnostics are of one. Fit a model for each "
            "target, or a class against the rest; self_influence() and forecast() of TrainingInfluence take them all."
        )
    if not isinstance(model.family, SquaredError | Binary | Tweedie):
        raise UnsupportedModel(
            f"{model.name} minimises {model.family.name}, which is no likelihood of a generalised linear model. "
            "Regression diagnostics are of least squares, the log loss of two classes, and deviances (Poisson, gamma, "
            "Tweedie)."
        )
    return model.family


def _dispersion_is_one(family: Elementwise) -> bool:
    return isinstance(family, Binary) or (isinstance(family, Tweedie) and family.power == 1)
