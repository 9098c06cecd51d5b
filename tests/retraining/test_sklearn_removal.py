"""Exact removal equals fitting again without the rows, on the data sets that scikit-learn ships."""

import warnings

import numpy as np
import pytest
from sklearn import linear_model as lm
from sklearn.base import clone
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn_cases import MAKERS, case_of

import headwater as hw
from headwater.errors import BatchMismatch, InvalidInput, RoughForecast, SingularOperator
from headwater.retraining.sklearn.removal import ExactRemoval
from headwater.sklearn import SklearnBatch, SklearnGradientProvider, TrainingInfluence

TIGHT = {"tol": 1e-12, "max_iter": 10_000}


def breast_cancer():
    x, y = load_breast_cancer(return_X_y=True)
    return StandardScaler().fit_transform(x), y


def diabetes():
    x, y = load_diabetes(return_X_y=True)
    return x * 20, y


def digits():
    x, y = load_digits(return_X_y=True)
    return x / 16, y


def assert_same(got, expected, tolerance=1e-8):
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * max(1.0, np.abs(expected).max()))


def brute_force(estimator, x, y, groups, x_query, y_query, sample_weight=None):
    """Fitted again without each group: the change of the queries' losses [q, groups], and coefficients."""

    def fit(kept):
        weights = None if sample_weight is None else sample_weight[kept]
        again = clone(estimator).fit(x[kept], y[kept], sample_weight=weights)
        provider = SklearnGradientProvider(again, class_weight={} if hasattr(again, "classes_") else None)
        return provider.losses(provider.as_batch(x_query, y_query)), np.atleast_2d(again.coef_)

    before, _ = fit(np.arange(len(y)))
    found = [fit(np.setdiff1d(np.arange(len(y)), group)) for group in groups]
    return np.stack([losses - before for losses, _ in found], axis=1), np.stack([coef for _, coef in found])


def check(estimator, x, y, groups, sample_weight=None, queries=20):
    estimator = clone(estimator).fit(x, y, sample_weight=sample_weight)
    influence = TrainingInfluence(estimator).fit(x, y, sample_weight)
    rows = np.linspace(0, len(y) - 1, queries).astype(int)
    expected, coef = brute_force(estimator, x, y, groups, x[rows], y[rows], sample_weight)
    assert np.abs(expected).max() > 1e-4
    assert_same(influence.remove(groups, x[rows], y[rows]), expected)
    assert_same(influence.refits(groups).coef, coef)
    return influence


def some(rows, step):
    return [[k] for k in range(0, rows, step)] + [[1, 2, 3, 50, 90], list(range(7, 107))]


# The three data sets --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("C", [0.01, 1.0])
def test_logistic_regression_on_breast_cancer(C, weighted):
    x, y = breast_cancer()
    weights = np.linspace(0.2, 2.0, len(y)) if weighted else None
    estimator = lm.LogisticRegression(C=C, solver="newton-cholesky", class_weight={0: 2.0, 1: 0.5}, **TIGHT)
    influence = check(estimator, x, y, some(len(y), 40), weights)
    assert not influence.refits([[0]]).closed_form


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    "estimator", [lm.LinearRegression(), lm.Ridge(3.0), lm.Ridge(0.5, fit_intercept=False)], ids=str
)
def test_least_squares_on_diabetes(estimator, weighted):
    x, y = diabetes()
    weights = np.linspace(0.2, 2.0, len(y)) if weighted else None
    influence = check(estimator, x, y, some(len(y), 4), weights)
    assert influence.refits([[0]]).closed_form


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    "estimator",
    [
        lm.PoissonRegressor(alpha=0.1, solver="newton-cholesky", **TIGHT),
        lm.GammaRegressor(alpha=0.01, solver="newton-cholesky", **TIGHT),
        lm.TweedieRegressor(power=1.5, alpha=1.0, solver="newton-cholesky", **TIGHT),
    ],
    ids=str,
)
def test_generalised_linear_models_on_diabetes(estimator, weighted):
    """Their penalty stands beside the mean, and shrinks with every row that leaves."""
    x, y = diabetes()
    weights = np.linspace(0.2, 2.0, len(y)) if weighted else None
    check(estimator, x, y, some(len(y), 30), weights)


def test_multinomial_regression_on_digits():
    x, y = digits()
    x, y = x[:500], y[:500]
    check(lm.LogisticRegression(C=0.5, solver="newton-cholesky", **TIGHT), x, y, [[3], [250], [5, 6, 7]])


def test_ridge_classifier_on_breast_cancer():
    """Two classes have one output."""
    x, y = breast_cancer()
    check(lm.RidgeClassifier(2.0, class_weight={0: 3.0}), x, y, some(len(y), 50))


def test_ridge_classifier_on_digits():
    x, y = digits()
    check(lm.RidgeClassifier(2.0), x, y, [[3], [100], list(range(50, 90))])


@pytest.mark.slow
@pytest.mark.parametrize("data", [breast_cancer, digits], ids=lambda data: data.__name__)
def test_leaving_out_rows_of_the_whole_data_set(data):
    x, y = data()
    step = 1 if data is breast_cancer else 60
    check(lm.LogisticRegression(solver="newton-cholesky", **TIGHT), x, y, some(len(y), step))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [lm.PoissonRegressor, lm.GammaRegressor])
def test_leaving_out_every_row_of_diabetes(kind):
    x, y = diabetes()
    check(kind(alpha=0.01, solver="newton-cholesky", **TIGHT), x, y, some(len(y), 1))


# Closed forms ---------------------------------------------------------------------------------------------------------


def test_inputs_of_very_different_sizes_are_no_obstacle():
    """Condition number 1e12 in the normal equations; the factorisation does not square it."""
    x, y = load_breast_cancer(return_X_y=True)
    check(lm.LinearRegression(), x, y.astype(float), some(len(y), 25))


def test_one_row_is_its_residual_over_one_minus_its_leverage():
    x, y = diabetes()
    influence = TrainingInfluence(lm.LinearRegression().fit(x, y)).fit(x, y)
    z = np.concatenate([x, np.ones((len(y), 1))], axis=1)
    leverage = np.diag(z @ np.linalg.inv(z.T @ z) @ z.T)
    residual = y - lm.LinearRegression().fit(x, y).predict(x)
    refits = influence.refits()
    own = refits.outputs(x)[np.arange(len(y)), np.arange(len(y)), 0]
    np.testing.assert_allclose(y - own, residual / (1 - leverage), rtol=1e-9)


@pytest.mark.parametrize("name", ["least squares", "ridge", "ridge of two targets", "normal with identity"])
def test_influence_with_leverage_is_exact_to_first_order_of_the_query(name):
    """removal() gives <g_q, delta>; for least squares delta is the exact change of the coefficients."""
    case = case_of(name)
    influence = TrainingInfluence(case.estimator).fit(case.x, case.y)
    groups = [[0], [5], [1, 2, 3]]
    moved = influence.refits(groups).weights - influence._exact.with_all.weights
    expected = case.grads(case.x_query, case.y_query) @ case.flat(moved).T
    if not case.per_row:
        assert_same(influence.forecast(case.x_query, case.y_query, groups), expected, 1e-9)
        singles = influence.forecast(case.x_query, case.y_query)
        assert_same(singles[:, [0, 5]], expected[:, :2], 1e-9)
    else:  # the share of the penalty's curvature that goes with the rows stays in the forecast
        got = influence.forecast(case.x_query, case.y_query, groups)
        off = np.abs(got - expected).max(0) / np.abs(expected).max(0)
        assert (off < np.array([1, 1, 3]) / len(case.y)).all()


def test_two_targets_may_have_strengths_of_their_own():
    case = case_of("least squares of two targets")
    both = lm.Ridge(alpha=[0.5, 20.0]).fit(case.x, case.y)
    refits = TrainingInfluence(both).fit(case.x, case.y).refits([[2], [4, 5]])
    for k, alpha in enumerate([0.5, 20.0]):
        one = lm.Ridge(alpha=alpha).fit(case.x, case.y[:, k])
        alone = TrainingInfluence(one).fit(case.x, case.y[:, k]).refits([[2], [4, 5]])
        np.testing.assert_allclose(refits.weights[:, k], alone.weights[:, 0], rtol=1e-11)
    forecast = TrainingInfluence(both).fit(case.x, case.y).scores(case.x_query, case.y_query).values
    shares = [
        TrainingInfluence(lm.Ridge(alpha=alpha).fit(case.x, case.y[:, k]))
        .fit(case.x, case.y[:, k])
        .scores(case.x_query, case.y_query[:, k])
        .values
        for k, alpha in enumerate([0.5, 20.0])
    ]
    np.testing.assert_allclose(forecast, sum(shares), rtol=1e-9)


# Forecasts are forecasts of the refits --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "ridge",
        "logistic",
        "multinomial",
        "multinomial without intercept",
        "poisson",
        "gamma",
        "tweedie",
        "ridge classifier",
    ],
)
def test_a_score_is_the_slope_of_the_refits(name):
    """Central differences in the weight of a row, of refits by scikit-learn: what the scores say to first order.

    For a generalised linear model that holds only because the row takes its share of the penalty along.
    """
    case = case_of(name)
    tight = {k: v for k, v in {"tol": 1e-13, "max_iter": 10_000}.items() if k in case.estimator.get_params()}
    if "solver" in case.estimator.get_params() and "ridge" not in name:
        tight["solver"] = "newton-cholesky"
    estimator = clone(case.estimator).set_params(**tight)

    def fitted(weights):
        return clone(estimator).fit(case.x, case.y, sample_weight=weights)

    def losses(weights):
        provider = SklearnGradientProvider(fitted(weights))
        return provider.losses(provider.as_batch(case.x_query, case.y_query))

    influence = TrainingInfluence(fitted(None)).fit(case.x, case.y)
    got, step = influence.scores(case.x_query, case.y_query).values, 1e-4
    for row in (0, 7, 11):
        ones = np.ones(len(case.y))
        less, more = ones.copy(), ones.copy()
        less[row] -= step
        more[row] += step
        slope = (losses(less) - losses(more)) / (2 * step)
        np.testing.assert_allclose(got[:, row], slope, rtol=0, atol=1e-5 * np.abs(got).max())


def test_leverage_brings_forecasts_nearer_to_the_refits():
    x, y = breast_cancer()
    estimator = lm.LogisticRegression(C=0.1, solver="newton-cholesky", **TIGHT).fit(x, y)
    influence = TrainingInfluence(estimator).fit(x, y)
    exact = influence.leave_one_out(x[:5], y[:5])
    better, plain = influence.forecast(x[:5], y[:5]), influence.scores(x[:5], y[:5]).values
    errors = [np.linalg.norm(found - exact) / np.linalg.norm(exact) for found in (plain, better)]
    assert errors[1] < 0.7 * errors[0] < 0.3
    assert np.corrcoef(better.ravel(), exact.ravel())[0, 1] > 0.99


def test_the_forecasts_that_are_warned_of_are_the_bad_ones():
    """Groups of 1 to 320 rows, at random and by self-influence: medians of the error, as a share of the true change."""
    x, y = breast_cancer()
    x, y = x[:400], np.where(np.arange(400) % 10 == 0, 1 - y[:400], y[:400])
    influence = TrainingInfluence(lm.LogisticRegression(tol=1e-8, max_iter=2000).fit(x, y)).fit(x, y)
    order, rng = np.argsort(-influence.self_influence()), np.random.default_rng(0)
    errors = {True: [], False: []}
    for size in (1, 2, 5, 10, 20, 80, 160, 250, 320):
        for group in (rng.choice(400, size, replace=False), order[:size]):
            with warnings.catch_warnings(record=True) as found:
                warnings.simplefilter("always")
                got = influence.forecast(x[:50], y[:50], [group])
            truth = influence.remove([group], x[:50], y[:50])
            rough = any(issubclass(warning.category, RoughForecast) for warning in found)
            errors[rough].append(np.linalg.norm(got - truth) / np.linalg.norm(truth))
    warned, other = (np.median(errors[rough]) for rough in (True, False))
    assert min(map(len, errors.values())) >= 4 and warned > 1.5 * other, errors


@pytest.mark.parametrize("name", [n for n in MAKERS if "sgd" not in n])
def test_refits_are_where_the_objective_is_least(name):
    """The gradient of the objective without the rows, by torch's autograd, is zero there."""
    case = case_of(name)
    group = np.array([1, 4])
    kept = np.setdiff1d(np.arange(len(case.y)), group)
    influence = TrainingInfluence(case.estimator).fit(case.x, case.y)
    weights = influence.refits([group]).weights[0]
    provider = SklearnGradientProvider(_at(case.estimator, weights))
    grads = provider.flat_grads(provider.as_batch(case.x[kept], case.y[kept]))
    pull = 0.0 if case.per_row else case.strength * case.held * case.flat(weights)
    assert np.abs(grads.sum(0) + pull).max() < 1e-8 * np.abs(grads).sum()


def _at(estimator, weights):
    """The estimator at other coefficients."""
    again = clone(estimator)
    features = estimator.n_features_in_
    for name in ("classes_", "n_features_in_"):
        if name in vars(estimator):
            setattr(again, name, getattr(estimator, name))
    again.coef_ = weights[:, :features].reshape(np.shape(estimator.coef_))
    again.intercept_ = weights[:, features:].reshape(-1) if estimator.fit_intercept else 0.0
    if hasattr(estimator, "_label_binarizer"):
        again._label_binarizer = estimator._label_binarizer
        again.classes_ = estimator.classes_
    return again


# Refusals -------------------------------------------------------------------------------------------------------------


def test_groups_that_name_no_rows_are_refused():
    case = case_of("ridge")
    influence = TrainingInfluence(case.estimator).fit(case.x, case.y)
    for wrong in ([[]], [[len(case.y)]], [[-1]], [[0.5]], [["a"]]):
        with pytest.raises(InvalidInput, match=r"(?i)group 0"):
            influence.remove(wrong, case.x_query, case.y_query)
    with pytest.raises(BatchMismatch, match="more than once"):
        influence.remove([[1, 1]], case.x_query, case.y_query)


def test_dependent_columns_have_no_exact_removal_without_a_penalty():
    case = case_of("least squares")
    x = np.concatenate([case.x, case.x[:, :1]], axis=1)
    estimator = lm.LinearRegression().fit(x, case.y)
    influence = TrainingInfluence(estimator, damping=hw.relative(0.1)).fit(x, case.y)
    with pytest.raises(SingularOperator, match="dependent columns"):
        influence.leave_one_out(x[:2], case.y[:2])


def test_a_row_that_alone_determines_a_coefficient_cannot_be_left_out():
    case = case_of("least squares")
    x = np.concatenate([case.x, np.eye(len(case.y))[:, :1]], axis=1)
    influence = TrainingInfluence(lm.LinearRegression().fit(x, case.y)).fit(x, case.y)
    with pytest.raises(SingularOperator, match="leverage"):
        influence.remove([[0]], x[:2], case.y[:2])
    assert influence.remove([[1]], x[:2], case.y[:2]).shape == (2, 1)


def test_refits_that_have_not_converged_are_reported(monkeypatch):
    case = case_of("logistic")
    provider = SklearnGradientProvider(case.estimator)
    exact = ExactRemoval(provider, provider.as_batch(case.x, case.y))
    exact.without([[0]])
    monkeypatch.setattr("headwater.retraining.sklearn.removal.STEPS", 1)
    with pytest.warns(hw.NotConverged, match="2 of 2 refits"):
        exact.without([[4, 5], [6]])


def test_a_pipeline_removes_rows_of_the_features_as_they_are():
    """The steps before the model are not fitted again."""
    x, y = load_breast_cancer(return_X_y=True)
    pipeline = make_pipeline(StandardScaler(), lm.LogisticRegression(solver="newton-cholesky", **TIGHT)).fit(x, y)
    influence = TrainingInfluence(pipeline).fit(x, y)
    features = pipeline[:-1].transform(x)
    alone = TrainingInfluence(pipeline[-1]).fit(features, y)
    np.testing.assert_allclose(
        influence.remove([[0], [4, 9]], x[:6], y[:6]), alone.remove([[0], [4, 9]], features[:6], y[:6]), atol=1e-14
    )
    np.testing.assert_allclose(influence.scores(x[:6], y[:6]).values, alone.scores(features[:6], y[:6]).values)


def test_batches_with_weights_are_removed_with_their_weights():
    x, y = diabetes()
    weights = np.linspace(0.5, 3.0, len(y))
    provider = SklearnGradientProvider(lm.Ridge(1.0).fit(x, y, sample_weight=weights))
    exact = ExactRemoval(provider, provider.prepared(SklearnBatch(x, y, weights)))
    kept = np.arange(5, len(y))
    again = lm.Ridge(1.0).fit(x[kept], y[kept], sample_weight=weights[kept])
    np.testing.assert_allclose(exact.without([np.arange(5)]).coef[0, 0], again.coef_, rtol=1e-9)
    np.testing.assert_allclose(exact.without([np.arange(5)]).intercept[0, 0], again.intercept_, rtol=1e-9)
