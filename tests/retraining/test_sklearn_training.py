"""TrainingInfluence keeps scikit-learn's conventions, and says what is wrong when it is misused."""

import pickle

import numpy as np
import pandas as pd
import pytest
from sklearn import linear_model as lm
from sklearn.base import clone
from sklearn.compose import make_column_transformer
from sklearn.datasets import load_breast_cancer
from sklearn.exceptions import NotFittedError as LibraryNotFittedError
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from sklearn.utils.class_weight import compute_class_weight
from sklearn.utils.estimator_checks import parametrize_with_checks
from sklearn_cases import case_of

import headwater as hw
from headwater.errors import HeadwaterError, InvalidInput, InvalidSetting, NotFittedError, StaleFit, UnsupportedModel
from headwater.sklearn import SklearnComposableInfluence, SklearnGradientProvider, TrainingInfluence

OTHERS = [hw.Cg(), hw.BlockKrylov(), hw.Dual("ggn"), hw.Kfac(), hw.Ekfac(), hw.DataInf()]
TIGHT = {"tol": 1e-12, "max_iter": 10_000, "solver": "newton-cholesky"}


@parametrize_with_checks(
    [TrainingInfluence(lm.LogisticRegression(), prefit=False), TrainingInfluence(lm.Ridge(), prefit=False)],
)
@pytest.mark.filterwarnings("ignore")
def test_conventions_of_scikit_learn(estimator, check):
    check(estimator)


def rows_of(name):
    case = case_of(name)
    return case.x, case.y, case.x_query, case.y_query


def test_settings_are_kept_as_they_are_and_survive_a_clone():
    estimator, method = lm.Ridge(alpha=3.0), hw.Dual("ggn")
    influence = TrainingInfluence(estimator, method, damping=0.5, prefit=False)
    assert influence.get_params(deep=False) == {
        "estimator": estimator,
        "method": method,
        "damping": 0.5,
        "prefit": False,
    }
    assert influence.get_params()["estimator__alpha"] == 3.0
    copied = clone(influence).set_params(estimator__alpha=7.0, damping=0.25)
    assert (copied.estimator.alpha, copied.damping, copied.method) == (7.0, 0.25, method)
    assert estimator.alpha == 3.0
    assert "Ridge" in repr(influence)


def test_a_clone_is_fitted_where_the_estimator_is_not():
    x, y, x_query, y_query = rows_of("ridge")
    given = lm.Ridge(alpha=2.0)
    influence = TrainingInfluence(given, prefit=False).fit(x, y)
    assert not hasattr(given, "coef_")
    assert influence.estimator_ is not given
    expected = TrainingInfluence(lm.Ridge(alpha=2.0).fit(x, y)).fit(x, y)
    assert expected.estimator_ is expected.estimator
    np.testing.assert_array_equal(influence.scores(x_query, y_query).values, expected.scores(x_query, y_query).values)


def test_weights_reach_the_last_step_of_a_pipeline():
    x, y, _, _ = rows_of("logistic")
    weights = np.linspace(0.5, 2.0, len(y))
    pipeline = make_pipeline(StandardScaler(), lm.LogisticRegression(**TIGHT))
    influence = TrainingInfluence(pipeline, prefit=False).fit(x, y, weights)
    features = StandardScaler().fit_transform(x)
    expected = lm.LogisticRegression(**TIGHT).fit(features, y, weights)
    np.testing.assert_allclose(influence.estimator_[-1].coef_, expected.coef_, rtol=1e-10)
    assert influence.influence_.n_train == pytest.approx(weights.sum())


def test_scores_are_labelled_and_their_default_unit_is_removal():
    x, y, x_query, y_query = rows_of("ridge")
    influence = TrainingInfluence(case_of("ridge").estimator).fit(x, y)
    scores = influence.scores(x_query, y_query)
    assert scores.values.shape == (len(y_query), len(y))
    assert scores.unit == "removal"
    np.testing.assert_array_equal(scores.train_ids, np.arange(len(y)))
    plain = influence.scores(x_query, y_query, unit="influence").values
    np.testing.assert_allclose(plain, scores.values * len(y), rtol=1e-12)
    own = influence.influence_.influences(x, y)
    np.testing.assert_allclose(influence.self_influence(), np.diag(own), rtol=1e-10)


@pytest.mark.parametrize("method", OTHERS, ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("name", ["logistic", "multinomial", "ridge"])
def test_other_methods_hold_the_penalty_too(name, method):
    """Against a dense inverse with the penalty on the coefficients, and none on the intercept."""
    case = case_of(name)
    influence = TrainingInfluence(case.estimator, method, damping=0.01).fit(case.x, case.y)
    inner = influence.influence_
    got = inner.influences(case.x_query, case.y_query, case.x, case.y)
    curvature, n, size = inner.curvature["full"], len(case.y), inner.n_parameters
    if isinstance(method, hw.DataInf):
        released = case.penalty(n).max() - case.penalty(n)
        swapped = method.invert(curvature, 0.01 + case.penalty(n).max()).dense(np.eye(size))
        inverse = np.linalg.inv(np.linalg.inv(swapped) - np.diag(released))
    else:
        inverse = np.linalg.inv(curvature.dense(np.eye(size)) + np.diag(case.penalty(n)) + 0.01 * np.eye(size))
    expected = case.grads(case.x_query, case.y_query) @ inverse @ case.grads(case.x, case.y, train=True).T
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    assert not np.allclose(got, inner.with_damping(0.0).influences(case.x_query, case.y_query, case.x, case.y))


def test_verification_knows_the_penalty():
    x, y, x_query, y_query = rows_of("multinomial")
    influence = TrainingInfluence(case_of("multinomial").estimator, hw.Ekfac(), damping=0.1).fit(x, y).influence_
    found = influence.verify([(x, y)], [(x_query, y_query)], rows=4, queries=3)
    assert found.passed, str(found)
    assert "mean" in str(influence.status)


def test_projected_methods_take_the_penalty_as_damping():
    x, y, x_query, y_query = rows_of("logistic")
    estimator, n = case_of("logistic").estimator, len(y)
    got = SklearnComposableInfluence(estimator, hw.LoGra(), damping=0.1).fit([(x, y)])
    bare = clone(estimator).set_params(C=np.inf)
    bare.coef_, bare.intercept_, bare.classes_ = estimator.coef_, estimator.intercept_, estimator.classes_
    shifted = SklearnComposableInfluence(bare, hw.LoGra(), damping=0.1 + case_of("logistic").strength / n)
    expected = shifted.fit([(x, y)]).influences(x_query, y_query, x, y)
    np.testing.assert_allclose(got.influences(x_query, y_query, x, y), expected, rtol=1e-10)


# Class weights --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "estimator",
    [
        lm.LogisticRegression(class_weight="balanced", **TIGHT),
        lm.RidgeClassifier(class_weight="balanced"),
        lm.SGDClassifier(
            loss="log_loss", class_weight="balanced", random_state=0, alpha=0.1, max_iter=10_000, tol=1e-7
        ),
    ],
    ids=lambda e: type(e).__name__,
)
def test_balanced_classes_are_weighed_as_the_estimator_does(estimator):
    x, y, _, _ = rows_of("logistic")
    estimator = clone(estimator).fit(x, y)
    influence = TrainingInfluence(estimator)
    influence.fit(x, y)
    balanced = compute_class_weight("balanced", classes=np.array([0, 1]), y=y)
    assert influence.class_weight_ == pytest.approx(dict(enumerate(balanced)))
    assert influence.slope_ < (1e-2 if "SGD" in type(estimator).__name__ else 1e-8)
    rows = influence.influence_.provider
    np.testing.assert_allclose(rows.row_weights(rows.as_batch(x, y)), balanced[y])
    with pytest.raises(InvalidSetting, match="compute_class_weight"):
        SklearnComposableInfluence(estimator, hw.Direct())
    assert SklearnComposableInfluence(estimator, hw.Direct(), class_weight={0: 1.0, 1: 2.0}).n_parameters == 4


def test_class_weights_are_weights_of_rows_but_not_of_queries():
    x, y, _, _ = rows_of("logistic")
    weighted = lm.LogisticRegression(class_weight={0: 3.0}, **TIGHT).fit(x, y)
    provider = SklearnGradientProvider(weighted)
    batch = provider.as_batch(x, y)
    plain = provider.grads(batch, query=True)["full"].flat()
    np.testing.assert_allclose(provider.flat_grads(batch), plain * np.where(y == 0, 3.0, 1.0)[:, None], rtol=1e-12)


def test_class_weights_that_mean_something_else_are_refused():
    x, y, _, _ = rows_of("multinomial")
    estimator = lm.SGDClassifier(loss="log_loss", class_weight={0: 2.0}, random_state=0).fit(x, y)
    with pytest.raises(UnsupportedModel, match="one-against-the-rest"):
        SklearnGradientProvider(estimator)
    binary = lm.LogisticRegression().fit(*rows_of("logistic")[:2])
    with pytest.raises(InvalidSetting, match=r"names \[7\]"):
        SklearnGradientProvider(binary, class_weight={7: 1.0})
    with pytest.raises(InvalidSetting, match="no classifier"):
        SklearnGradientProvider(case_of("ridge").estimator, class_weight={0: 1.0})


def test_weights_of_stochastic_descent_need_to_average_one():
    x, y, _, _ = rows_of("sgd least squares")
    estimator = lm.SGDRegressor(random_state=0).fit(x, y)
    with pytest.raises(InvalidSetting, match="average 2"):
        TrainingInfluence(estimator).fit(x, y, np.full(len(y), 2.0))


# DataFrames, pipelines, searches --------------------------------------------------------------------------------------


def frames():
    data = load_breast_cancer(as_frame=True)
    return data.data.iloc[:120, :4], data.target.iloc[:120]


def test_frames_are_taken_and_their_columns_remembered():
    x, y = frames()
    pipeline = make_pipeline(StandardScaler(), lm.LogisticRegression(**TIGHT)).fit(x, y)
    influence = TrainingInfluence(pipeline).fit(x, y)
    assert influence.n_features_in_ == 4
    assert list(influence.feature_names_in_) == list(x.columns)
    scores = influence.scores(x.iloc[:3], y.iloc[:3])
    expected = TrainingInfluence(pipeline[-1]).fit(pipeline[:-1].transform(x), y.to_numpy())
    got = expected.scores(pipeline[:-1].transform(x.iloc[:3]), y.to_numpy()[:3])
    np.testing.assert_allclose(scores.values, got.values, rtol=1e-12)


def test_other_columns_are_refused_by_name():
    x, y = frames()
    influence = TrainingInfluence(lm.RidgeClassifier().fit(x, y)).fit(x, y)
    other = x.rename(columns={"mean radius": "radius"})
    for ask in (influence.scores, influence.leave_one_out, influence.forecast):
        with pytest.raises(InvalidInput, match=r"missing are \['mean radius'\], unknown are \['radius'\]"):
            ask(other, y)
        with pytest.raises(InvalidInput, match="another order"):
            ask(x[x.columns[::-1]], y)
    with pytest.raises(InvalidInput, match="another order"):
        TrainingInfluence(influence.estimator_).fit(x[x.columns[::-1]], y)


def test_a_pipeline_may_take_columns_of_words():
    x, y = frames()
    x = x.assign(size=np.where(x["mean radius"] > 14, "large", "small"))
    steps = make_column_transformer((OneHotEncoder(), ["size"]), (StandardScaler(), list(x.columns[:4])))
    pipeline = make_pipeline(steps, lm.LogisticRegression(C=0.5, **TIGHT)).fit(x, y)
    influence = TrainingInfluence(pipeline).fit(x, y)
    assert influence.scores(x.iloc[:2], y.iloc[:2]).values.shape == (2, len(y))
    loaders = [(x.iloc[:50], y.iloc[:50]), (x.iloc[50:], y.iloc[50:])]
    again = SklearnComposableInfluence(pipeline, hw.Direct("hessian"), damping=0.0).fit(loaders)
    np.testing.assert_allclose(
        again.influences(x.iloc[:2], y.iloc[:2], x, y),
        influence.scores(x.iloc[:2], y.iloc[:2], unit="influence").values,
        rtol=1e-9,
    )


def test_sparse_features_of_texts_are_taken():
    texts = np.array(["a good day", "a bad day", "good good", "bad day", "so good", "so bad", "a day"] * 2)
    y = np.array([1, 0, 1, 0, 1, 0, 1] * 2)
    pipeline = make_pipeline(TfidfVectorizer(), lm.LogisticRegression(**TIGHT)).fit(texts, y)
    influence = SklearnComposableInfluence(pipeline, hw.Direct("hessian"), damping=0.0).fit([(texts, y)])
    scores = influence.attribute([(texts, y)], [(["good"], [1])]).values
    assert scores.shape == (1, len(y))
    assert scores[0, 2] > 0 > scores[0, 3]


def test_the_best_estimator_of_a_search_is_read():
    x, y, x_query, y_query = rows_of("ridge")
    search = GridSearchCV(lm.Ridge(), {"alpha": [0.1, 1.0]}, cv=3).fit(x, y)
    influence = TrainingInfluence(search).fit(x, y)
    expected = TrainingInfluence(search.best_estimator_).fit(x, y)
    np.testing.assert_array_equal(influence.scores(x_query, y_query).values, expected.scores(x_query, y_query).values)


# Misuse ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "estimator",
    [lm.LogisticRegression(), make_pipeline(StandardScaler(), lm.Ridge()), GridSearchCV(lm.Ridge(), {"alpha": [1.0]})],
    ids=lambda e: type(e).__name__,
)
@pytest.mark.parametrize(
    "make",
    [
        lambda e: TrainingInfluence(e).fit(*rows_of("logistic")[:2]),
        SklearnGradientProvider,
        lambda e: SklearnComposableInfluence(e, hw.Direct()),
    ],
    ids=["front", "provider", "influence"],
)
def test_an_estimator_that_is_not_fitted_is_refused(make, estimator):
    for error in (NotFittedError, LibraryNotFittedError, HeadwaterError, ValueError):
        with pytest.raises(error, match="call"):
            make(estimator)


def test_what_needs_fit_says_so():
    _, _, x_query, y_query = rows_of("ridge")
    influence = TrainingInfluence(case_of("ridge").estimator)
    for ask in (
        lambda: influence.scores(x_query, y_query),
        lambda: influence.leave_one_out(x_query, y_query),
        lambda: influence.remove([[0]], x_query, y_query),
        lambda: influence.refits(),
        influence.self_influence,
    ):
        for error in (NotFittedError, LibraryNotFittedError):
            with pytest.raises(error, match=r"call fit\(X, y\)"):
                ask()


def test_labels_of_another_kind_or_unknown_are_named():
    x, y, x_query, y_query = rows_of("logistic")
    words = np.array(["no", "yes"])
    influence = TrainingInfluence(lm.LogisticRegression(**TIGHT).fit(x, words[y])).fit(x, words[y])
    assert influence.scores(x_query, words[y_query]).values.shape == (len(y_query), len(y))
    with pytest.raises(InvalidInput, match=r"int64.*'no', 'yes'"):
        influence.scores(x_query, y_query)
    with pytest.raises(InvalidInput, match=r"\[perhaps\].*'no', 'yes'"):
        influence.scores(x_query, np.array(["perhaps", *words[y_query][1:]]))
    numbers = TrainingInfluence(case_of("logistic").estimator).fit(x, y)
    with pytest.raises(InvalidInput, match=r"\[0.5\]"):
        numbers.scores(x_query, np.array([0.5, *y_query[1:]]))
    with pytest.raises(InvalidInput, match="numeric"):
        TrainingInfluence(case_of("ridge").estimator).fit(x, words[y])


def test_rows_that_are_not_those_of_the_fit_are_noticed():
    x, y, _, _ = rows_of("multinomial")
    estimator = case_of("multinomial").estimator
    with pytest.raises(ValueError, match="3 features"):
        TrainingInfluence(estimator).fit(x[:, :2], y)
    with pytest.raises(InvalidInput, match=r"no row of \[2\]"):
        TrainingInfluence(estimator).fit(x[y < 2], y[y < 2])
    with pytest.warns(hw.NotConverged, match="no minimum"):
        TrainingInfluence(estimator).fit(x[::2], y[::2])
    with pytest.warns(hw.NotConverged, match="no minimum"):
        TrainingInfluence(estimator).fit(x, y, np.linspace(0.1, 2.0, len(y)))
    assert TrainingInfluence(estimator).fit(x, y).slope_ < 1e-6


def test_an_estimator_that_has_not_converged_is_noticed():
    x, y, _, _ = rows_of("multinomial")
    estimator = lm.SGDRegressor(max_iter=1, tol=None, random_state=0).fit(x, y.astype(float))
    with pytest.warns(hw.NotConverged, match="has not converged"):
        TrainingInfluence(estimator).fit(x, y.astype(float))


def test_coefficients_that_changed_after_fit_are_noticed():
    x, y, x_query, y_query = rows_of("ridge")
    estimator = lm.Ridge(alpha=2.0).fit(x, y)
    influence = TrainingInfluence(estimator).fit(x, y)
    estimator.set_params(alpha=5.0).fit(x, y)
    for ask in (influence.scores, influence.leave_one_out):
        with pytest.raises(StaleFit):
            ask(x_query, y_query)


@pytest.mark.parametrize(
    ("estimator", "words"),
    [
        (lm.Lasso(), "Lasso is not supported; supported are LinearRegression"),
        (lm.LogisticRegression(l1_ratio=1.0, solver="saga", max_iter=10_000), "'l1'"),
        (lm.LogisticRegression(l1_ratio=0.5, solver="saga", max_iter=10_000), "'elasticnet'"),
        (lm.SGDClassifier(), "'hinge', whose slope jumps"),
        (lm.SGDClassifier(loss="log_loss", penalty="l1"), "'l1'"),
        (lm.SGDRegressor(loss="epsilon_insensitive"), "'epsilon_insensitive'"),
        (lm.LinearRegression(positive=True), "positive=True"),
        (lm.Ridge(positive=True), "positive=True"),
    ],
    ids=str,
)
def test_what_has_no_influence_function_is_refused_with_the_reason(estimator, words):
    x, y, _, _ = rows_of("logistic")
    with pytest.raises(UnsupportedModel, match=words):
        SklearnGradientProvider(clone(estimator).fit(x, y))


def test_a_class_in_place_of_an_estimator_is_refused():
    with pytest.raises(UnsupportedModel, match="fitted instance"):
        SklearnGradientProvider(lm.Ridge)


def test_targets_outside_of_the_domain_are_refused():
    x, _, _, _ = rows_of("poisson")
    for name, wrong in (("poisson", -1.0), ("gamma", 0.0)):
        provider = SklearnGradientProvider(case_of(name).estimator)
        with pytest.raises(InvalidInput, match="needs targets >"):
            provider.as_batch(x, np.full(len(x), wrong))


def test_margins_need_probabilities_of_classes():
    for name in ("ridge", "sgd of three classes", "sgd squared hinge"):
        with pytest.raises(UnsupportedModel, match="margin"):
            SklearnGradientProvider(case_of(name).estimator).of_output("margin")
        with pytest.raises(UnsupportedModel, match="logit"):
            SklearnGradientProvider(case_of(name).estimator, measurement="logit")


def test_numbers_that_are_not_finite_are_refused():
    x, y, _, _ = rows_of("ridge")
    provider = SklearnGradientProvider(case_of("ridge").estimator)
    bad = x.copy()
    bad[2, 1] = np.nan
    with pytest.raises(InvalidInput, match="x has NaN"):
        provider.as_batch(bad, y)
    with pytest.raises(InvalidInput, match="y has NaN"):
        provider.as_batch(x, np.where(y == y[0], np.inf, y))


def test_liblinear_penalises_the_intercept_and_is_known_to():
    x, y, x_query, y_query = rows_of("logistic")
    estimator = lm.LogisticRegression(C=0.3, solver="liblinear", intercept_scaling=2.0, tol=1e-12, max_iter=10_000)
    influence = TrainingInfluence(estimator.fit(x, y)).fit(x, y)
    assert influence.slope_ < 1e-7
    kept = np.arange(1, len(y))
    again = SklearnGradientProvider(clone(estimator).fit(x[kept], y[kept]))
    before = SklearnGradientProvider(estimator)
    expected = again.losses(again.as_batch(x_query, y_query)) - before.losses(before.as_batch(x_query, y_query))
    np.testing.assert_allclose(influence.remove([[0]], x_query, y_query)[:, 0], expected, atol=1e-7)


def test_a_fitted_influence_can_be_pickled_as_estimators_can():
    x, y, x_query, y_query = rows_of("multinomial")
    influence = TrainingInfluence(case_of("multinomial").estimator).fit(x, y)
    again = pickle.loads(pickle.dumps(influence))
    np.testing.assert_array_equal(again.scores(x_query, y_query).values, influence.scores(x_query, y_query).values)


def test_a_frame_of_targets_may_be_a_series_with_any_index():
    x, y = frames()
    shuffled = np.random.default_rng(0).permutation(len(y))
    x, y = x.iloc[shuffled], y.iloc[shuffled]
    estimator = lm.RidgeClassifier().fit(x, y)
    influence = TrainingInfluence(estimator).fit(x, y)
    expected = TrainingInfluence(estimator).fit(pd.DataFrame(x.to_numpy(), columns=x.columns), y.to_numpy())
    got = influence.scores(x.iloc[:4], y.iloc[:4]).values
    np.testing.assert_array_equal(got, expected.scores(x.iloc[:4], y.iloc[:4]).values)


def test_a_changed_step_before_the_model_is_noticed() -> None:
    x, y = load_breast_cancer(return_X_y=True)
    model = make_pipeline(StandardScaler(), lm.LogisticRegression()).fit(x, y)
    influence = TrainingInfluence(model).fit(x, y)
    model[0].mean_ = model[0].mean_ + 5
    with pytest.raises(StaleFit):
        influence.scores(x[:2], y[:2])


def test_no_groups_no_weight_and_labels_of_no_kind_are_refused() -> None:
    x, y = load_breast_cancer(return_X_y=True)
    model = lm.LogisticRegression(max_iter=5000).fit(x / x.max(0), y)
    x = x / x.max(0)
    influence = TrainingInfluence(model).fit(x, y)
    with pytest.raises(InvalidInput, match="no groups"):
        influence.remove([], x[:2], y[:2])
    with pytest.raises(InvalidInput, match="flatnonzero"):
        influence.remove([np.zeros(len(x), bool)], x[:2], y[:2])
    with pytest.raises(InvalidInput, match="weights"):
        TrainingInfluence(model).fit(x, y, sample_weight=np.zeros(len(x)))
