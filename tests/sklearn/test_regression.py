"""Regression diagnostics are statsmodels' numbers and columns, and what fits without each row say."""

from __future__ import annotations

import sys
import warnings
from importlib import import_module
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import (
    GammaRegressor,
    HuberRegressor,
    LinearRegression,
    LogisticRegression,
    PoissonRegressor,
    Ridge,
    SGDRegressor,
    TweedieRegressor,
)
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from headwater.errors import MissingExtra, Undetermined, UnsupportedModel
from headwater.sklearn import TrainingInfluence, diagnostics

pytest.importorskip("statsmodels")


def sm() -> Any:
    """Imported where it is used: that takes half a second."""
    return import_module("statsmodels.api")


rng = np.random.default_rng(5)
ROWS = 40
X = pd.DataFrame(
    rng.normal(size=(ROWS, 3)) * [1.0, 100.0, 0.01],
    columns=["age", "income", "share"],
    index=[f"r{k}" for k in range(ROWS)],
)
Z = X.to_numpy() @ [0.8, -0.006, 40.0] + 0.3
Y = pd.Series(Z + rng.normal(size=ROWS), index=X.index)
WEIGHTS = rng.uniform(0.2, 3.0, ROWS)
LABELS = np.where(Z + rng.logistic(size=ROWS) > 0, "yes", "no")
COUNTS = rng.poisson(np.exp(0.6 * Z)).astype(float)
SIZES = rng.gamma(2.0, np.exp(0.3 * Z) / 2.0)


def close(got: Any, expected: Any, tolerance: float = 1e-8) -> None:
    scale = max(1.0, float(np.nanmax(np.abs(np.asarray(expected)))))
    np.testing.assert_allclose(np.asarray(got), np.asarray(expected), rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("framed", [True, False])
def test_least_squares_has_statsmodels_frame(intercept: bool, framed: bool) -> None:
    x, y = (X, Y) if framed else (X.to_numpy(), Y.to_numpy())
    design = sm().add_constant(x) if intercept else x
    expected = sm().OLS(y, design).fit().get_influence().summary_frame()
    got = diagnostics(LinearRegression(fit_intercept=intercept).fit(x, y), x, y)
    assert list(got.columns[: len(expected.columns)]) == list(expected.columns)
    pd.testing.assert_index_equal(got.index, expected.index, exact=framed)
    close(got[expected.columns], expected)


def test_weighted_least_squares_is_that_of_rows_times_the_roots_of_weights() -> None:
    root = np.sqrt(WEIGHTS)
    expected = sm().OLS(Y * root, sm().add_constant(X).mul(root, axis=0)).fit().get_influence().summary_frame()
    model = LinearRegression().fit(X, Y, sample_weight=WEIGHTS)
    got = TrainingInfluence(model).fit(X, Y, sample_weight=WEIGHTS).diagnostics()
    close(got[expected.columns], expected)
    again = diagnostics(LinearRegression().fit(X, Y, sample_weight=10 * WEIGHTS), X, Y, 10 * WEIGHTS)
    close(again, got)


CASES: dict[str, tuple[Any, Any, Any, Any]] = {
    "logistic": (
        LogisticRegression(C=np.inf, solver="newton-cholesky", tol=1e-12),
        LABELS,
        LABELS == "yes",
        "Binomial",
    ),
    "poisson": (PoissonRegressor(alpha=0, solver="newton-cholesky", tol=1e-12), COUNTS, COUNTS, "Poisson"),
    "gamma": (GammaRegressor(alpha=0, solver="newton-cholesky", tol=1e-12), SIZES, SIZES, "Gamma"),
    "tweedie": (TweedieRegressor(power=1.5, alpha=0, solver="newton-cholesky", tol=1e-12), COUNTS, COUNTS, "Tweedie"),
}
SCALE = [1.0, 0.01, 100.0]
"""Columns of one size: solvers of scikit-learn converge to rounding then."""


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("weighted", [False, True])
def test_generalised_linear_models_have_statsmodels_numbers(name: str, weighted: bool) -> None:
    estimator, y, numbers, family = CASES[name]
    x, weights = X * SCALE, WEIGHTS if weighted else np.ones(ROWS)
    log = {} if name == "logistic" else {"link": sm().families.links.Log()}
    chosen = getattr(sm().families, family)(**log, **({"var_power": 1.5} if name == "tweedie" else {}))
    glm = sm().GLM(np.asarray(numbers, float), sm().add_constant(x), family=chosen, var_weights=weights)
    result = glm.fit(tol=1e-14, maxiter=100)
    expected = result.get_influence(observed=False)
    model = estimator.fit(x, y, sample_weight=weights)
    close(model.coef_.ravel(), result.params.iloc[1:], 1e-9)
    got = TrainingInfluence(model).fit(x, y, sample_weight=weights).diagnostics()
    frame = expected.summary_frame()
    assert list(got.columns[: len(frame.columns)]) == list(frame.columns)
    close(got["hat_diag"], expected.hat_matrix_diag)
    close(got["standard_resid"], expected.resid_studentized)
    close(got["cooks_d"], expected.cooks_distance[0])
    close(got[["d_const", "d_age", "d_income", "d_share"]], expected.d_params)
    close(got[frame.columns[:4]], expected.dfbetas)
    close(got["dffits_internal"], frame["dffits_internal"])
    if name in ("logistic", "poisson"):  # a canonical link: observed and expected information are one
        close(got[frame.columns], result.get_influence().summary_frame())


@pytest.mark.parametrize("estimator", [LinearRegression(), Ridge(alpha=7.0), Ridge(alpha=2.0, fit_intercept=False)])
def test_changes_and_left_out_predictions_are_those_of_fits_without_the_row(estimator: Any) -> None:
    x = X * SCALE
    frame = diagnostics(estimator.fit(x, Y, sample_weight=WEIGHTS), x, Y, WEIGHTS)
    coef = estimator.coef_.copy()
    for k in (0, 11, 39):
        kept = np.delete(np.arange(ROWS), k)
        other = type(estimator)(**estimator.get_params()).fit(x.iloc[kept], Y.iloc[kept], sample_weight=WEIGHTS[kept])
        close(frame.loc[x.index[k], ["d_age", "d_income", "d_share"]].astype(float), coef - other.coef_)
        close(frame["loo_pred"].iloc[k], other.predict(x.iloc[[k]])[0])
        close(frame["loo_resid"].iloc[k], Y.iloc[k] - other.predict(x.iloc[[k]])[0])
    close(frame["resid"], Y - estimator.predict(x))


def test_leverages_of_ridge_are_the_diagonal_of_its_hat_matrix() -> None:
    """By moving each target: the hat matrix is d prediction / d target."""
    model, x, y = Ridge(alpha=5.0), (X * SCALE).to_numpy(), Y.to_numpy()
    frame = diagnostics(model.fit(x, y), x, y)
    before = model.predict(x)
    for k in range(4):
        moved = y.copy()
        moved[k] += 1.0
        close(frame["hat_diag"].iloc[k], Ridge(alpha=5.0).fit(x, moved).predict(x)[k] - before[k])
    assert 1.0 < frame["hat_diag"].sum() < 4.0


def test_one_step_without_a_row_is_near_the_refit_of_a_penalised_logistic_regression() -> None:
    x, model = X * SCALE, LogisticRegression(C=0.5, tol=1e-10)
    whole = TrainingInfluence(model.fit(x, LABELS)).fit(x, LABELS)
    frame, exact = whole.diagnostics(), whole.refits()
    changes = model.coef_[0] - exact.coef[:, 0]
    got = frame[["d_age", "d_income", "d_share"]].to_numpy()
    np.testing.assert_allclose(got, changes, rtol=0, atol=0.1 * np.abs(changes).max())
    assert np.abs(changes).max() > 0.02
    p = model.predict_proba(x)[:, 1]
    close(frame["resid"], (LABELS == "yes") - p)
    assert frame["loo_pred"].between(0, 1).all()


def test_a_pipeline_names_what_its_steps_give() -> None:
    model = make_pipeline(StandardScaler(), LinearRegression()).fit(X, Y)
    got = TrainingInfluence(model).fit(X, Y).diagnostics()
    expected = sm().OLS(Y, sm().add_constant(X)).fit().get_influence().summary_frame()
    columns = [c for c in expected.columns if c != "dfb_const"]  # of centred features the intercept is another
    close(got[columns], expected[columns])
    assert list(got.index) == list(X.index)


def test_dependent_columns_have_finite_residuals_and_no_coefficients() -> None:
    x = X.assign(double=2 * X["age"]) * [*SCALE, 1.0]
    with pytest.warns(Undetermined, match=r"dependent.*age, double are not determined"):
        got = diagnostics(LinearRegression().fit(x, Y), x, Y)
    expected = diagnostics(LinearRegression().fit(X, Y), X, Y)
    assert got[["dfb_age", "dfb_double", "d_age", "d_double"]].isna().all().all()
    shared = [c for c in expected.columns if not c.endswith("age")]
    close(got[shared].drop(columns=["d_income", "d_share"]), expected[shared].drop(columns=["d_income", "d_share"]))
    assert np.isfinite(got.drop(columns=["dfb_age", "dfb_double", "d_age", "d_double"]).to_numpy()).all()


def test_more_columns_than_rows_leave_nothing_to_say() -> None:
    x = rng.normal(size=(4, 6))
    with pytest.warns(Undetermined, match=r"dependent.*leverage 1 \(4, the first are \[0, 1, 2, 3\]\)"):
        got = diagnostics(LinearRegression().fit(x, Y[:4]), x, Y[:4].to_numpy())
    close(got["hat_diag"], np.ones(4))
    assert got[["cooks_d", "standard_resid", "student_resid", "loo_pred"]].isna().all().all()


def test_a_row_of_leverage_one_has_no_numbers_without_it_and_the_others_are_right() -> None:
    x = X.assign(only=np.arange(ROWS) == 3).astype(float)
    with pytest.warns(Undetermined, match=r"leverage 1 \(1, the first are \['r3'\]\)"):
        got = diagnostics(LinearRegression().fit(x, Y), x, Y)
    assert got.loc["r3", "hat_diag"] == pytest.approx(1.0)
    assert got.loc["r3"].drop(["hat_diag", "resid"]).isna().all()
    others = np.arange(ROWS) != 3
    expected = sm().OLS(Y[others], sm().add_constant(X[others])).fit().get_influence().summary_frame()
    columns = ["hat_diag", "standard_resid", "student_resid", "dffits", "dffits_internal"]
    close(got.loc[others, columns], expected[columns])


def test_rows_of_weight_zero_change_nothing() -> None:
    weights = np.where(np.arange(ROWS) < 5, 0.0, 1.0)
    got = diagnostics(LinearRegression().fit(X, Y, sample_weight=weights), X, Y, weights)
    close(got.iloc[5:], diagnostics(LinearRegression().fit(X[5:], Y[5:]), X[5:], Y[5:]))
    close(got["hat_diag"].iloc[:5], np.zeros(5))


def test_what_has_no_diagnostics_is_refused() -> None:
    many = LinearRegression().fit(X, np.stack([Y, COUNTS], axis=1))
    with pytest.raises(UnsupportedModel, match="2 outputs"):
        diagnostics(many, X, np.stack([Y, COUNTS], axis=1))
    three = np.array(["a", "b", "c"])[np.arange(ROWS) % 3]
    with pytest.raises(UnsupportedModel, match="3 outputs"):
        diagnostics(LogisticRegression().fit(X * SCALE, three), X * SCALE, three)
    with pytest.raises(UnsupportedModel, match="no likelihood"):
        diagnostics(SGDRegressor(loss="huber").fit(X * SCALE, Y), X * SCALE, Y)
    with pytest.raises(UnsupportedModel, match="HuberRegressor is not supported"):
        diagnostics(HuberRegressor().fit(X * SCALE, Y), X * SCALE, Y)


def test_without_pandas_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = LinearRegression().fit(X.to_numpy(), Y.to_numpy())
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MissingExtra, match="needs pandas"):
        diagnostics(model, X.to_numpy(), Y.to_numpy())


def test_a_perfect_fit_warns_of_nothing_but_says_nan_or_rounding() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frame = diagnostics(LinearRegression().fit(X, np.zeros(ROWS)), X, np.zeros(ROWS))
    assert frame["standard_resid"].isna().all()
    assert np.isfinite(frame["hat_diag"]).all()


def test_cooks_distance_is_self_influence_by_another_name() -> None:
    whole = TrainingInfluence(LinearRegression().fit(X * SCALE, Y)).fit(X * SCALE, Y)
    frame = whole.diagnostics()
    k = 4
    variance = (frame["resid"] ** 2).sum() / (ROWS - k)
    close(frame["cooks_d"], whole.self_influence() / (ROWS * k * variance * (1 - frame["hat_diag"]) ** 2))
