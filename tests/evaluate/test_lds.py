"""The linear datamodeling score: one for a perfect forecast, none for a scrambled one, and its noise taken off."""

import numpy as np
import pytest
from scipy.stats import spearmanr
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from headwater.errors import InvalidInput, InvalidSetting, NonFiniteValue, ShapeMismatch
from headwater.evaluate import correlation
from headwater.evaluate.bank import plan_subsets
from headwater.evaluate.correlation import mean_correlation, mid_ranks
from headwater.evaluate.intervals import resampled
from headwater.evaluate.lds import ceiling, difference, forecast, lds, spearman
from headwater.sklearn import TrainingInfluence
from headwater.store.scores import Scores

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


@pytest.mark.parametrize("at_once", [1, 700, 10**6])
def test_draws_and_forecasts_that_are_ranked_together_have_the_numbers_of_each_alone(at_once, monkeypatch):
    """To the last bit, with ties, columns without a correlation, and pieces that do not come out even."""
    monkeypatch.setattr(correlation, "AT_ONCE", at_once)
    first, second = RNG.integers(9, size=(4, 30, 7)).astype(float), RNG.standard_normal((30, 7))
    second[:, 2] = 1.0
    draws = resampled(30, 11, 0)
    each = [mean_correlation(spearman(first[0][draw], second[draw])) for draw in draws]
    assert correlation.mean_spearman(first[0], second, draws) == each
    assert correlation.mean_spearman_of_each(first, second) == [mean_correlation(spearman(f, second)) for f in first]
    assert correlation.mean_spearman(first[0], second, []) == []


def test_resamples_are_not_ranked_one_by_one(monkeypatch):
    calls = []
    monkeypatch.setattr(correlation, "mid_ranks", lambda values: calls.append(values.shape) or mid_ranks(values))
    lds(SCORES, KEEP, CLEAN[:, None], resamples=300)
    assert len(calls) == 2 + 2 * -(-300 * CLEAN.size // correlation.AT_ONCE)


def test_a_perfect_forecast_scores_one_and_a_reversed_one_minus_one():
    found = lds(SCORES, KEEP, CLEAN[:, None])
    assert found.raw.value == pytest.approx(1.0)
    assert (found.alpha, found.subsets, found.runs, found.ceiling) == (0.5, 90, 1, None)
    assert lds(-SCORES, KEEP, CLEAN[:, None]).raw.value == pytest.approx(-1.0)


def test_only_the_order_of_subsets_matters():
    found = lds(np.pi * SCORES, KEEP, np.exp(CLEAN / CLEAN.std())[:, None])
    assert found.raw.value == pytest.approx(1.0)


def test_a_score_above_its_ceiling_asks_whether_it_was_made_from_these_subsets():
    outputs = noisy(2)
    fitted = np.linalg.lstsq(KEEP - KEEP.mean(), -(outputs.mean(axis=1) - outputs.mean()), rcond=None)[0].T
    assert "were the scores made from these very subsets?" in str(lds(fitted, KEEP, outputs))
    assert "very subsets" not in str(lds(SCORES, KEEP, outputs))


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


@pytest.mark.parametrize(("subsets", "repeated"), [(90, 20), (40, 20), (60, 60)])
def test_a_perfect_forecast_is_one_when_corrected_however_many_subsets_ran_twice(subsets, repeated):
    """Those that ran twice have less noise, and the forecast gains by them: the ceiling is for these very runs."""
    rng, figures = np.random.default_rng(6), []
    for _ in range(30):
        outputs = CLEAN[:, None] + CLEAN.std(axis=0) * rng.standard_normal((90, 2, 15))
        outputs[repeated:, 1] = np.nan
        figures.append(lds(SCORES, KEEP[:subsets], outputs[:subsets], resamples=0).corrected.value)
    assert np.mean(figures) == pytest.approx(1.0, abs=0.025)


def test_a_ceiling_is_for_as_many_runs_as_are_asked_for():
    whole = noisy(2)
    assert ceiling(whole, runs=1) < ceiling(whole) == pytest.approx(ceiling(whole, runs=2))
    with pytest.raises(ShapeMismatch, match=r"\(90, 15\)"):
        ceiling(CLEAN)


def test_the_luck_of_a_seed_that_all_subsets_share_is_no_noise():
    shared = CLEAN[:, None] + 5 * CLEAN.std() * RNG.standard_normal((1, 2, 15))
    assert ceiling(shared) == pytest.approx(1.0)


def test_a_run_that_is_partly_finite_is_named():
    for value in (np.nan, np.inf):
        outputs = noisy(2)
        outputs[3, 1, 2] = value
        with pytest.raises(NonFiniteValue, match=r"query 2 is (nan|inf) in run 1 of subset 3"):
            lds(SCORES, KEEP, outputs)


def test_a_difference_needs_the_outputs_of_all_queries():
    outputs = noisy(1)
    for first, second in ((SCORES, SCORES[:3]), (SCORES[:3], SCORES), (SCORES[:1], SCORES[:1])):
        with pytest.raises(ShapeMismatch, match="queries and outputs of 15"):
            difference(first, second, KEEP, outputs)
    with pytest.raises(ShapeMismatch, match="outputs of 1"):
        difference(SCORES, -SCORES, KEEP, outputs[..., :1])


def test_labelled_scores_are_put_in_the_order_of_the_data():
    order, others = np.random.default_rng(1).permutation(80), np.random.default_rng(2).permutation(15)
    outputs, mixed = noisy(1), SCORES[np.ix_(others, order)]
    expected = lds(SCORES, KEEP, outputs).by_query
    np.testing.assert_array_equal(lds(Scores(mixed, others, order), KEEP, outputs).by_query, expected)
    names = np.array([f"row {k}" for k in range(80)])
    for train_ids in (names, np.arange(80) + 1000):
        found = lds(Scores(SCORES, np.arange(15), train_ids), KEEP, outputs)
        np.testing.assert_array_equal(found.by_query, expected)
    with pytest.raises(InvalidInput, match="which row of the data is which"):
        lds(Scores(mixed, others, order + 1000), KEEP, outputs)


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
