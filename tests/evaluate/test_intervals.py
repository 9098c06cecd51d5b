"""What the metrics share: intervals, ranks, and checks that name the bad value; and the names that users import."""

import subprocess
import sys

import numpy as np
import pytest
from scipy.stats import rankdata

import headwater.evaluate
from headwater.errors import InvalidInput, InvalidSetting, NonFiniteValue, ShapeMismatch
from headwater.evaluate.checks import (
    effective_runs,
    mean_over_runs,
    query_outputs,
    retrained_outputs,
    subset_mask,
    usual_runs,
)
from headwater.evaluate.correlation import mean_correlation, mid_ranks
from headwater.evaluate.intervals import Interval, about, percentiles, resampled
from headwater.settings import check_whole

DRAWS = np.arange(101.0) ** 2


def test_percentiles_are_where_the_draws_are_and_about_lays_them_about_the_figure():
    for lay, level, ends in ((percentiles, 0.9, (25, 9025)), (about, 0.9, (-2415, 6585)), (about, 0.5, (-1815, 3185))):
        found = lay(60.0, DRAWS, level)
        assert (found.value, found.level) == (60.0, level)
        assert (found.low, found.high) == pytest.approx(ends)


def test_small_figures_are_shown_with_three_digits():
    assert str(Interval(0.5, -0.25, 1.0)) == "0.500 (-0.250 to 1.000)"
    assert str(Interval(-1.234e-5, -2e-5, 3e-6)) == "-0.0000123 (-0.0000200 to 0.0000030)"
    assert str(Interval(0.0, 0.0, 0.0)) == "0.000 (0.000 to 0.000)"
    assert str(Interval(0.5, float("nan"), float("nan"))) == "0.500 (nan to nan)"


def test_nothing_resampled_is_no_interval():
    for lay in (percentiles, about):
        found = lay(1.0, [], 0.9)
        assert found.value == 1.0 and np.isnan(found.low) and np.isnan(found.high)
        with pytest.raises(InvalidSetting, match="level is 1"):
            lay(1.0, [], 1)


def test_resamples_are_of_their_seed_and_draw_with_replacement():
    draws = resampled(30, 200, seed=3)
    assert np.array_equal(draws, resampled(30, 200, seed=3)) and not np.array_equal(draws, resampled(30, 200, seed=4))
    distinct = np.mean([len(set(draw.tolist())) for draw in draws]) / 30
    assert distinct == pytest.approx(1 - (1 - 1 / 30) ** 30, abs=0.02)


def test_ties_share_the_mean_of_their_ranks():
    values = np.random.default_rng(0).integers(5, size=(40, 7)).astype(float)
    np.testing.assert_array_equal(mid_ranks(values), rankdata(values, axis=0))
    assert mid_ranks(np.zeros((0, 2))).shape == (0, 2)


def test_an_undefined_correlation_counts_as_zero():
    assert mean_correlation(np.array([1.0, np.nan, 0.5, 0.5])) == 0.5


def test_the_mean_over_runs_is_of_complete_runs_only():
    outputs = np.array([[[1.0, 2], [3, 6]], [[1, 1], [np.nan] * 2], [[np.nan] * 2, [5, 7]]])
    np.testing.assert_array_equal(mean_over_runs(outputs), [[2, 4], [1, 1], [5, 7]])
    assert usual_runs(outputs) == 1 and effective_runs(outputs) == 1.2
    kept, runs, mean = retrained_outputs(np.eye(3, dtype=bool), outputs)
    assert kept.shape == (3, 3) and runs.shape == (3, 2, 2) and mean[0, 1] == 4


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: subset_mask(np.ones((2, 2))), InvalidInput, r"\(2, 2\) of float64"),
        (lambda: query_outputs([1.0], 2, "outputs after a step"), ShapeMismatch, r"after a step are \(1,\).*\(2,\)"),
        (lambda: query_outputs([1.0, np.nan], 2, "margins"), NonFiniteValue, "margins are not finite.*query 1"),
        (lambda: check_whole("k", 0, 1, 5), InvalidSetting, "k is 0; expected a whole number from 1 to 5"),
        (lambda: check_whole("k", 6, 1, 5), InvalidSetting, "k is 6"),
        (lambda: check_whole("runs", True, 1), InvalidSetting, "runs is True; expected a whole number of at least 1"),
        (lambda: check_whole("runs", 2.0, 1), InvalidSetting, "runs is 2.0"),
        (lambda: check_whole("runs", "2", 1), InvalidSetting, "runs is '2'"),
    ],
)
def test_what_means_nothing_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_every_public_name_is_there_and_is_no_module():
    for name in headwater.evaluate.__all__:
        assert callable(getattr(headwater.evaluate, name)), name
    assert list(headwater.evaluate.__all__) == sorted(headwater.evaluate.__all__)


def test_metrics_need_no_framework():
    code = "import sys, headwater.evaluate; print(*{'torch', 'jax', 'sklearn', 'bm25s', 'xarray'} & set(sys.modules))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.split() == []
