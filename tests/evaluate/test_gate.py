"""The gate: where the truth can be had, exact influence tells it. Converged logistic regression, refitted exactly."""

import numpy as np
import pytest
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits
from sklearn.linear_model import LinearRegression, LogisticRegression, Ridge
from sklearn.preprocessing import StandardScaler

from headwater.evaluate import agreement
from headwater.evaluate.bank import Bank, plan_removals, plan_subsets
from headwater.evaluate.baselines import random_scores
from headwater.evaluate.lds import lds
from headwater.retraining.sklearn.refit import Refit
from headwater.sklearn import TrainingInfluence

CASES = {
    "digits": (lambda x: x / 16, load_digits, 500, 0.01, 0.5),
    "breast cancer": (StandardScaler().fit_transform, load_breast_cancer, 400, 0.004, 0.75),
}
"""How inputs are scaled, data, train rows, C, and the share of rows that subsets keep."""
QUERIES = 100


@pytest.fixture(scope="module", params=CASES)
def case(request):
    scale, load, train, strength, alpha = CASES[request.param]
    x, y = load(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))[: train + QUERIES]
    x, y = scale(x[order]), y[order]
    model = LogisticRegression(C=strength, tol=1e-10, max_iter=10_000).fit(x[:train], y[:train])
    found = TrainingInfluence(model).fit(x[:train], y[:train])
    return found, x[train:], y[train:], alpha, found.scores(x[train:], y[train:])


def subset_outputs(found, x, y, keep):
    """The rise of each query's loss on exact refits without what each subset leaves out: [m, 1, q]."""
    return found.remove([np.flatnonzero(~mask) for mask in keep], x, y).T[:, None]


def test_summed_scores_forecast_what_subsets_do(case):
    found, x, y, alpha, scores = case
    keep = plan_subsets(scores.shape[1], alpha=alpha, subsets=80, repeated=0).keep
    outputs = subset_outputs(found, x, y, keep)
    measured = lds(scores, keep, outputs, resamples=100)
    assert measured.raw.value > 0.98
    assert measured.ceiling is None and measured.alpha == pytest.approx(alpha)
    scrambled = lds(random_scores(*scores.shape), keep, outputs)
    assert scrambled.raw.low < 0 < scrambled.raw.high


def test_scores_are_the_rise_of_the_loss_when_a_row_is_left_out(case):
    found, x, y, _, scores = case
    rows = np.arange(0, scores.shape[1], 5)
    truth = found.remove([[k] for k in rows], x, y)
    same = agreement(np.asarray(scores)[:, rows], truth)
    assert same.pearson.value > 0.995
    assert same.slope.value == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("estimator", [LinearRegression(), Ridge(alpha=3.0)], ids=["OLS", "ridge"])
def test_the_exact_method_has_an_lds_of_one_on_least_squares(tmp_path, estimator):
    """Subsets that lack one row each, refitted by scikit-learn; to first order alone it is less."""
    x, y = load_diabetes(return_X_y=True)
    train, query = (x[:60], y[:60]), (x[60:80], y[60:80])
    bank = Bank(tmp_path, plan_removals(60), 20, {}).fill(Refit(estimator.fit(*train), *train, *query))
    found = TrainingInfluence(estimator).fit(*train)
    exact = lds(found.leave_one_out(*query), *bank, resamples=0)
    assert exact.raw.value == pytest.approx(1.0, abs=1e-12)
    first_order = lds(found.scores(*query), *bank, resamples=0)
    assert 0.9 < first_order.raw.value < 1 - 1e-6
