"""The linear datamodeling score: one for a perfect forecast, none for a scrambled one, and its noise taken off."""

import numpy as np
import pytest
from scipy.stats import spearmanr
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from headwater.errors import InvalidInput, InvalidSetting, NonFiniteValue, ShapeMismatch
from headwater.evaluate.bank import plan_subsets
from headwater.evaluate.lds import ceiling, difference, forecast, lds, spearman
from headwater.sklearn import TrainingInfluence

RNG = np.random.default_rng(0)
SCORES = RNG.standard_normal((15, 80))
KEEP = plan_subsets(80, subsets=90, seed=1).keep
CLEAN = forecast(SCORES, KEEP)


def noisy(runs: int, share: float = 1.0) -> np.ndarray:
    """Outputs [m, r, q]: the truth, and as much noise as there is signal times `share`."""
    rng = np.random.default_rng(runs)
    spread = CLEAN.std(axis=0)
    return CLEAN[:, None] + share * spread * rng.standard_normal((len(CLEAN), runs, CLEAN.shape[1]))


def test_spearman_is_that_of_scipy_with_and_without_ties():
    first, second = RNG.integers(4, size=(30, 6)).astype(float), RNG.standard_normal((30, 6))
    np.testing.assert_allclose(
        spearman(first, second), [spearmanr(a, b)[0] for a, b in zip(first.T, second.T, strict=True)]
    )
    assert np.isnan(spearman(np.ones((5, 1)), RNG.standard_normal((5, 1)))).all()


def test_a_perfect_forecast_scores_one_and_a_reversed_one_minus_one():
    found = lds(SCORES, KEEP, CLEAN[:, None])
    assert found.raw.value == pytest.approx(1.0)
    assert (found.alpha, found.subsets, found.runs, found.ceiling) == (0.5, 90, 1, None)
    assert lds(-SCORES, KEEP, CLEAN[:, None]).raw.value == pytest.approx(-1.0)


def test_only_the_order_of_subsets_matters():
    found = lds(np.pi * SCORES, KEEP, np.exp(CLEAN / CLEAN.std())[:, None])
    assert found.raw.value == pytest.approx(1.0)


def test_a_scrambled_score_is_zero_within_its_interval():
    scrambled = np.random.default_rng(5).permutation(SCORES, axis=1)
    found = lds(scrambled, KEEP, noisy(2))
    assert found.raw.low < 0 < found.raw.high


def test_the_ceiling_is_what_a_perfect_forecast_gets():
    for runs in (2, 4):
        found = lds(SCORES, KEEP, noisy(runs))
        assert found.ceiling == pytest.approx(found.raw.value, abs=0.05)
        assert found.corrected.value == pytest.approx(1.0, abs=0.08)


def test_more_runs_raise_the_score_and_leave_the_corrected_one():
    few, many = (lds(SCORES + RNG.standard_normal(SCORES.shape), KEEP, noisy(runs)) for runs in (2, 8))
    assert many.raw.value > few.raw.value + 0.03
    assert many.corrected.value == pytest.approx(few.corrected.value, abs=0.06)


def test_some_subsets_run_twice_are_enough_for_the_ceiling():
    whole = noisy(2)
    some = whole.copy()
    some[30:, 1] = np.nan
    assert ceiling(some) == pytest.approx(lds(SCORES, KEEP, whole[:, :1]).raw.value, abs=0.08)
    assert ceiling(whole[:, :1]) is None
    assert lds(SCORES, KEEP, some).runs == 1


def test_a_paired_difference_is_sharper_than_two_intervals():
    worse = SCORES + 0.3 * RNG.standard_normal(SCORES.shape)
    outputs = noisy(1, share=0.5)
    gap = difference(SCORES, worse, KEEP, outputs)
    assert gap.low > 0
    first, second = lds(SCORES, KEEP, outputs).raw, lds(worse, KEEP, outputs).raw
    assert gap.value == pytest.approx(first.value - second.value)
    assert gap.high - gap.low < (first.high - first.low) + (second.high - second.low)


def test_a_query_without_a_correlation_is_counted_as_zero_and_shown():
    flat = SCORES.copy()
    flat[3] = 0.0
    found = lds(flat, KEEP, CLEAN[:, None])
    assert found.undefined == 1
    assert found.raw.value == pytest.approx(14 / 15)
    assert "1 queries undefined" in str(found)


@pytest.mark.parametrize(
    ("scores", "keep", "outputs", "error", "words"),
    [
        (SCORES[:, :5], KEEP, CLEAN[:, None], ShapeMismatch, "scores are"),
        (SCORES, KEEP.astype(float), CLEAN[:, None], InvalidInput, "mask"),
        (SCORES, KEEP, CLEAN, ShapeMismatch, "outputs are"),
        (SCORES[:3], KEEP, CLEAN[:, None], ShapeMismatch, "3 queries"),
        (np.where(SCORES > 2, np.nan, SCORES), KEEP, CLEAN[:, None], NonFiniteValue, "not finite"),
        (SCORES, KEEP[:2], CLEAN[:2, None], InvalidInput, "at least 3"),
        (SCORES, KEEP & (np.arange(90) != 7)[:, None], CLEAN[:, None], InvalidInput, "Subset 7 keeps no row"),
        (SCORES, KEEP, np.where(np.arange(90)[:, None, None] == 4, np.nan, CLEAN[:, None]), InvalidInput, "Subset 4"),
    ],
)
def test_what_has_no_score_is_refused(scores, keep, outputs, error, words):
    with pytest.raises(error, match=words):
        lds(scores, keep, outputs)


def test_a_level_is_a_probability():
    with pytest.raises(InvalidSetting, match="level is 2"):
        lds(SCORES, KEEP, CLEAN[:, None], level=2)


def test_exact_influence_forecasts_convex_retraining():
    """Logistic regression, fitted again without half of the rows, to the end: there is no noise to correct for."""
    x, y = load_digits(return_X_y=True)
    x, train, query = x / 16, slice(0, 500), slice(500, 560)
    estimator = LogisticRegression(C=0.01, tol=1e-10, max_iter=1000).fit(x[train], y[train])
    influence = TrainingInfluence(estimator).fit(x[train], y[train])
    keep = plan_subsets(500, subsets=40, repeated=0, seed=2).keep
    removed = [np.flatnonzero(~mask) for mask in keep]
    outputs = influence.remove(removed, x[query], y[query]).T  # rises of losses without the other half
    found = lds(influence.scores(x[query], y[query]).values, keep, outputs[:, None])
    assert found.raw.value > 0.98
