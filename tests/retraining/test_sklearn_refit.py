"""Refits of any estimator: those of a plain loop, whatever the workers; a bank finds what influence finds."""

import pickle

import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csr_array
from sklearn.compose import TransformedTargetRegressor
from sklearn.datasets import load_breast_cancer, load_diabetes, load_iris
from sklearn.ensemble import (
    GradientBoostingClassifier,
    GradientBoostingRegressor,
    RandomForestClassifier,
    RandomForestRegressor,
)
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.feature_selection import SelectFromModel
from sklearn.linear_model import LinearRegression, LogisticRegression, Ridge
from sklearn.metrics import log_loss
from sklearn.naive_bayes import MultinomialNB
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from headwater.errors import BatchMismatch, InvalidInput, InvalidSetting, NonFiniteValue, ShapeMismatch
from headwater.evaluate import Bank, lds, plan_removals, plan_subsets, retrain
from headwater.sklearn import Refit, TrainingInfluence

CELLS, BENIGN = load_breast_cancer(return_X_y=True)
IRIS, KINDS = load_iris(return_X_y=True)
PATIENTS, PROGRESS = load_diabetes(return_X_y=True)
TRAIN, QUERY = slice(0, 60), slice(300, 312)
FOREST = RandomForestClassifier(n_estimators=8, max_depth=4, random_state=99)
KEPT = np.random.default_rng(0).choice(60, size=30, replace=False)


def cells(estimator, **options):
    return Refit(estimator, CELLS[TRAIN], BENIGN[TRAIN], CELLS[QUERY], BENIGN[QUERY], **options)


def test_a_forest_is_the_plain_loop_with_its_seed():
    outputs = cells(FOREST)(KEPT, 7)
    fitted = RandomForestClassifier(n_estimators=8, max_depth=4, random_state=7).fit(CELLS[KEPT], BENIGN[KEPT])
    probabilities = fitted.predict_proba(CELLS[QUERY])
    expected = [log_loss([y], p[None], labels=[0, 1]) for y, p in zip(BENIGN[QUERY], probabilities, strict=True)]
    np.testing.assert_allclose(outputs, expected, rtol=1e-12, atol=1e-15)
    assert (outputs != cells(FOREST)(KEPT, 8)).any()
    assert FOREST.random_state == 99 and not hasattr(FOREST, "estimators_")


def test_every_random_state_of_a_pipeline_is_the_seed():
    def chain(state):
        chosen = SelectFromModel(RandomForestClassifier(n_estimators=3, random_state=state), max_features=4)
        return make_pipeline(StandardScaler(), chosen, RandomForestClassifier(n_estimators=5, random_state=state))

    fitted = chain(3).fit(CELLS[KEPT], BENIGN[KEPT])
    right = fitted.predict_proba(CELLS[QUERY])[np.arange(12), BENIGN[QUERY]]
    expected = -np.log(np.maximum(right, np.finfo(float).eps))
    np.testing.assert_allclose(cells(chain(None))(KEPT, 3), expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("outputs", [1, 2])
def test_a_regressor_has_half_of_squared_errors(outputs):
    y = PROGRESS if outputs == 1 else np.stack([PROGRESS, PROGRESS[::-1]], axis=1)
    forest = RandomForestRegressor(n_estimators=4)
    found = Refit(forest, PATIENTS[TRAIN], y[TRAIN], PATIENTS[QUERY], y[QUERY])(KEPT, 5)
    fitted = RandomForestRegressor(n_estimators=4, random_state=5).fit(PATIENTS[KEPT], y[KEPT])
    expected = (fitted.predict(PATIENTS[QUERY]) - y[QUERY]) ** 2 / 2
    np.testing.assert_allclose(found, expected if outputs == 1 else expected.sum(axis=1))


def test_weights_go_to_the_fit_and_follow_their_rows():
    weights = np.random.default_rng(1).random(60)
    for estimator, name in (
        (Ridge(), "sample_weight"),
        (make_pipeline(StandardScaler(), Ridge()), "ridge__sample_weight"),
    ):
        refit = Refit(
            estimator, PATIENTS[TRAIN], PROGRESS[TRAIN], PATIENTS[QUERY], PROGRESS[QUERY], sample_weight=weights
        )
        fitted = estimator.fit(PATIENTS[KEPT], PROGRESS[KEPT], **{name: weights[KEPT]})
        np.testing.assert_allclose(refit(KEPT, 0), (fitted.predict(PATIENTS[QUERY]) - PROGRESS[QUERY]) ** 2 / 2)


def test_a_class_that_no_row_kept_has_gets_the_least_probability():
    refit = Refit(RandomForestClassifier(n_estimators=5), IRIS, KINDS, IRIS[::10], KINDS[::10], least=1e-3)
    outputs = refit(np.flatnonzero(KINDS != 1), 0)
    missing = KINDS[::10] == 1
    np.testing.assert_allclose(outputs[missing], -np.log(1e-3))
    assert (outputs[~missing] < 1).all() and outputs.max() <= -np.log(1e-3) + 1e-12
    known = RandomForestClassifier(n_estimators=5, random_state=0).fit(IRIS[KINDS != 1], KINDS[KINDS != 1])
    columns = np.searchsorted([0, 2], KINDS[::10][~missing])
    probabilities = known.predict_proba(IRIS[::10][~missing])[np.arange(len(columns)), columns]
    np.testing.assert_allclose(outputs[~missing], -np.log(np.maximum(probabilities, 1e-3)), atol=1e-15)


def test_rows_of_one_class_only_are_refused_where_the_estimator_refuses_them():
    refit = Refit(LogisticRegression(), IRIS, KINDS, IRIS[:5], KINDS[:5])
    with pytest.raises(
        InvalidInput, match=r"LogisticRegression cannot be fitted to the 50 rows kept \(seed 4\).*class"
    ):
        refit(np.flatnonzero(KINDS == 0), 4)


def test_a_measure_of_ones_own_is_given_the_fitted_estimator():
    def margins(fitted, x, y):
        return np.where(y == 1, 1, -1) * fitted.decision_function(x)

    machine = SVC()
    fitted = SVC().fit(CELLS[KEPT], BENIGN[KEPT])
    expected = margins(fitted, CELLS[QUERY], BENIGN[QUERY])
    np.testing.assert_allclose(cells(machine, measure=margins)(KEPT, 0), expected)
    with pytest.raises(ShapeMismatch, match=r"\(3,\).*\(12,\)"):
        cells(machine, measure=lambda fitted, x, y: [1.0, 2.0, 3.0])(KEPT, 0)
    with pytest.raises(NonFiniteValue, match=r"query 1 is nan \(seed 6\)"):
        cells(machine, measure=lambda fitted, x, y: np.where(np.arange(12) == 1, np.nan, 0.0))(KEPT, 6)


def test_frames_sparse_matrices_and_texts_are_rows_too():
    expected = cells(FOREST)(KEPT, 1)
    frame, labels = pd.DataFrame(CELLS).add_prefix("f"), pd.Series(BENIGN)
    frame.index = labels.index = range(1000, 1000 + len(frame))
    framed = Refit(FOREST, frame[TRAIN], labels[TRAIN], frame[QUERY], labels[QUERY])
    np.testing.assert_array_equal(framed(KEPT, 1), expected)
    sparse = Refit(FOREST, csr_array(CELLS[TRAIN]), BENIGN[TRAIN], CELLS[QUERY], list(BENIGN[QUERY]))
    np.testing.assert_array_equal(sparse(KEPT, 1), expected)
    texts = ["a good day", "good and good", "a bad day", "bad and worse"]
    words = Refit(make_pipeline(CountVectorizer(), MultinomialNB()), texts, list("ggbb"), ["good"], ["g"])
    assert words(np.arange(4), 0)[0] < words([0, 2, 3], 0)[0]


@pytest.mark.parametrize("processes", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_workers_in_threads_or_processes_give_the_same_bank(tmp_path, processes):
    plan = plan_subsets(60, subsets=4, repeated=2)
    refit = cells(make_pipeline(StandardScaler(), FOREST))
    serial, both = (
        Bank(tmp_path / name, plan, 12, {"model": "forest"}).fill(refit, **options)
        for name, options in (("serial", {}), ("both", {"workers": 2, "processes": processes}))
    )
    by_hand = [
        [refit(np.flatnonzero(mask), seed) for seed in row if seed >= 0]
        for mask, row in zip(plan.keep, plan.seeds, strict=True)
    ]
    for outputs, hand in zip(serial.outputs, by_hand, strict=True):
        np.testing.assert_array_equal(outputs[: len(hand)], hand)
    np.testing.assert_array_equal(both.outputs, serial.outputs)
    again = pickle.loads(pickle.dumps(refit))
    np.testing.assert_array_equal(again(KEPT, 2), refit(KEPT, 2))


def test_without_a_row_it_is_the_exact_removal_of_linear_models(tmp_path):
    x, y = PATIENTS[TRAIN], PROGRESS[TRAIN] / 100
    influence = TrainingInfluence(Ridge(alpha=0.1), prefit=False).fit(x, y)
    refit = Refit(Ridge(alpha=0.1), x, y, PATIENTS[QUERY], PROGRESS[QUERY] / 100)
    bank = Bank(tmp_path / "bank", plan_removals(60, [[3], [5, 9]]), 12, {}).fill(refit)
    rises = (bank.outputs[1:, 0] - bank.outputs[0, 0]).T
    exact = influence.remove([[3], [5, 9]], PATIENTS[QUERY], PROGRESS[QUERY] / 100)
    np.testing.assert_allclose(rises, exact, rtol=0, atol=1e-9 * np.abs(rises).max())


@pytest.mark.parametrize("rows", [50, 70])
def test_subsets_of_another_number_of_rows_than_a_refit_has_are_refused(rows, tmp_path):
    options = {"queries": 12, "recipe": {}, "subsets": 4, "repeated": 0, "progress": False}
    with pytest.raises(BatchMismatch, match=f"drawn from {rows} rows, and Refit has 60: .*rows=60"):
        retrain(tmp_path / "bank", cells(FOREST), rows=rows, **options)
    assert not (tmp_path / "bank").exists()
    with pytest.raises(BatchMismatch, match=f"drawn from {rows} rows"):
        Bank(tmp_path / "bank", plan_subsets(rows, subsets=4, repeated=0), 12, {}).fill(cells(FOREST))


def test_a_bank_of_refits_is_forecast_by_influence(tmp_path):
    chain = make_pipeline(StandardScaler(), LogisticRegression(C=0.1))
    refit = cells(chain)
    bank = retrain(
        tmp_path / "bank", refit, rows=60, queries=12, recipe={}, alpha=0.8, subsets=30, repeated=0, progress=False
    )
    chain.fit(CELLS[TRAIN], BENIGN[TRAIN])
    influence = TrainingInfluence(chain, prefit=True).fit(CELLS[TRAIN], BENIGN[TRAIN])
    assert lds(influence.scores(CELLS[QUERY], BENIGN[QUERY]).values, *bank).raw.value > 0.8


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: cells(SVC()), InvalidSetting, "SVC is no regressor.*give `measure`"),
        (lambda: cells(StandardScaler()), InvalidSetting, "StandardScaler is no regressor"),
        (lambda: cells(FOREST, least=0.0), InvalidSetting, "least is 0.0"),
        (lambda: cells(FOREST, sample_weight=[1.0]), BatchMismatch, r"sample_weight has shape \(1,\).*\(60,\)"),
        (lambda: Refit(FOREST, IRIS, KINDS[:3], IRIS, KINDS), BatchMismatch, "150 train rows and 3 train targets"),
        (lambda: Refit(FOREST, IRIS, KINDS, IRIS[:0], KINDS[:0]), BatchMismatch, "0 query rows"),
        (lambda: Refit(FOREST, IRIS, KINDS, IRIS[:1], [5]), InvalidInput, r"classes \[5\], which no train row has"),
        (
            lambda: Refit(FOREST, IRIS, np.stack([KINDS, KINDS], 1), IRIS, np.stack([KINDS, KINDS], 1)),
            InvalidSetting,
            r"\(150, 2\)",
        ),
    ],
)
def test_what_has_no_loss_is_refused(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_an_estimator_around_another_is_a_regressor_too():
    wrapped = TransformedTargetRegressor(LinearRegression(), func=np.log, inverse_func=np.exp)
    refit = Refit(wrapped, PATIENTS[TRAIN], PROGRESS[TRAIN], PATIENTS[QUERY], PROGRESS[QUERY])
    fitted = LinearRegression().fit(PATIENTS[KEPT], np.log(PROGRESS[KEPT]))
    np.testing.assert_allclose(refit(KEPT, 0), (np.exp(fitted.predict(PATIENTS[QUERY])) - PROGRESS[QUERY]) ** 2 / 2)


# Attribution without gradients ----------------------------------------------------------------------------------------


def boosted(name):
    """(classifier, regressor) of a library that may not be there; one thread, few trees."""
    if name == "scikit-learn":
        few = {"n_estimators": 10, "max_depth": 2, "subsample": 0.8}
        return GradientBoostingClassifier(**few), GradientBoostingRegressor(**few)
    if name == "LightGBM":
        lightgbm = pytest.importorskip("lightgbm")
        few = {"n_estimators": 10, "num_leaves": 4, "min_child_samples": 5, "n_jobs": 1, "verbose": -1}
        return lightgbm.LGBMClassifier(**few), lightgbm.LGBMRegressor(**few)
    xgboost = pytest.importorskip("xgboost")
    few = {"n_estimators": 10, "max_depth": 2, "n_jobs": 1}
    return xgboost.XGBClassifier(**few), xgboost.XGBRegressor(**few)


@pytest.mark.parametrize("piped", [False, True])
@pytest.mark.parametrize("kind", ["classifier", "regressor"])
@pytest.mark.parametrize("library", ["scikit-learn", "LightGBM", "XGBoost"])
def test_boosted_trees_are_attributed_as_they_are(library, kind, piped, tmp_path):
    """A row that is copied into the queries with its own label helps its copy."""
    estimator = boosted(library)[kind == "regressor"]
    estimator = make_pipeline(StandardScaler(), estimator) if piped else estimator
    X, y = (CELLS, BENIGN) if kind == "classifier" else (PATIENTS, PROGRESS)
    order = np.random.default_rng(1).permutation(len(X))[:64]
    X, y = X[order], y[order]
    refit = Refit(estimator, X[:60], y[:60], X[56:64], y[56:64])
    bank = retrain(tmp_path, refit, rows=60, queries=8, subsets=24, repeated=0, recipe={}, progress=False)
    for method in ("banzhaf", "ridge"):
        scores = bank.attribution(method)
        own = [scores.values[k, 56 + k] for k in range(4)]
        assert scores.shape == (8, 60) and np.isfinite(scores.values).all() and (scores.errors > 0).any()
        assert np.mean(own) > np.median(scores.values)


def test_a_forest_is_attributed_on_half_of_its_subsets_and_judged_on_the_others(tmp_path):
    forest = RandomForestRegressor(n_estimators=5, max_depth=4)
    refit = Refit(forest, PATIENTS[:40], PROGRESS[:40], PATIENTS[40:60], PROGRESS[40:60])
    bank = retrain(tmp_path, refit, rows=40, queries=20, subsets=100, repeated=0, recipe={}, progress=False)
    scores = bank.attribution("ridge", subsets=range(70))
    assert lds(scores, bank.keep[70:], bank.outputs[70:]).raw.low > 0.1
