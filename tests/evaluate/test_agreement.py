"""Agreement with leave-one-out: exact on least squares, none for scrambled scores, and the truth's noise is told."""

import numpy as np
import pytest
from scipy.stats import pearsonr, spearmanr

from headwater.errors import InvalidInput, InvalidSetting, NonFiniteValue, ShapeMismatch
from headwater.evaluate.bank import Bank, plan_removals
from headwater.evaluate.correlation import pearson
from headwater.evaluate.removals import agreement, leave_one_out, removal_forecast

RNG = np.random.default_rng(0)
X, W = RNG.standard_normal((30, 4)), RNG.standard_normal(4)
Y = X @ W + RNG.standard_normal(30)
X_QUERY = RNG.standard_normal((6, 4))
Y_QUERY = X_QUERY @ W + RNG.standard_normal(6)
RIDGE = 0.5


def losses(rows, seed=0):
    """Ridge regression fitted to these rows: half of the squared error of each query."""
    coef = np.linalg.solve(X[rows].T @ X[rows] + RIDGE * np.eye(4), X[rows].T @ Y[rows])
    return 0.5 * (X_QUERY @ coef - Y_QUERY) ** 2


def closed_form():
    """How the queries' losses rise without each row, by its leverage; and to first order."""
    inverse = np.linalg.inv(X.T @ X + RIDGE * np.eye(4))
    residual, leverage = X @ (inverse @ X.T @ Y) - Y, np.einsum("ni,ij,nj->n", X, inverse, X)
    shift = X_QUERY @ inverse @ X.T * residual
    query = (X_QUERY @ (inverse @ X.T @ Y) - Y_QUERY)[:, None]
    exact = shift / (1 - leverage)
    return query * exact + 0.5 * exact**2, query * shift


EXACT, FIRST_ORDER = closed_form()
GROUPS = [[0, 3], [5], [7, 8, 9], [1, 2], [20, 11], [29]]


def noisy(share, runs, seed=1):
    """A bank's outputs [1 + n, r, q]: the exact losses, with seed noise of `share` times the effects' size."""
    rng = np.random.default_rng(seed)
    clean = np.stack([losses(np.flatnonzero(mask)) for mask in plan_removals(30).keep])
    effects = (clean[1:] - clean[0]).std(axis=0)
    return clean[:, None] + share * effects * rng.standard_normal((31, runs, 6))


def test_exact_leave_one_out_of_ridge_agrees_to_rounding(tmp_path):
    bank = Bank(tmp_path, plan_removals(30), 6, {}).fill(losses)
    found = leave_one_out(EXACT, *bank)
    assert found.pearson.value == pytest.approx(1, abs=1e-9)
    assert found.spearman.value == pytest.approx(1, abs=1e-9)
    assert found.slope.value == pytest.approx(1, abs=1e-9)
    np.testing.assert_allclose(found.slope_by_query, 1, atol=1e-9)
    assert (found.groups, found.runs, found.reliability, found.undefined) == (30, 1, None, 0)
    assert "reliability of the truth unknown" in str(found)


def test_first_order_scores_forecast_too_little_and_the_slope_says_so():
    found = leave_one_out(FIRST_ORDER, plan_removals(30).keep, noisy(0, 1))
    assert 1.05 < found.slope.value < 1.5
    assert 0.97 < found.pearson.value < 1 - 1e-6


def test_figures_are_those_of_scipy_query_by_query():
    forecast = EXACT + EXACT.std() * RNG.standard_normal(EXACT.shape)
    found = agreement(forecast, EXACT)
    pairs = list(zip(forecast, EXACT, strict=True))
    np.testing.assert_allclose(found.pearson_by_query, [pearsonr(f, t)[0] for f, t in pairs])
    np.testing.assert_allclose(found.spearman_by_query, [spearmanr(f, t)[0] for f, t in pairs])
    slopes = [np.linalg.lstsq(f[:, None], t, rcond=None)[0][0] for f, t in pairs]
    np.testing.assert_allclose(found.slope_by_query, slopes)
    assert found.pearson.value == pytest.approx(found.pearson_by_query.mean())
    assert found.slope.value == pytest.approx(np.linalg.lstsq(forecast.reshape(-1, 1), EXACT.ravel(), rcond=None)[0][0])


def test_a_group_is_forecast_by_the_sum_of_its_rows():
    plan = plan_removals(30, GROUPS)
    outputs = np.stack([losses(np.flatnonzero(mask)) for mask in plan.keep])
    found = leave_one_out(EXACT, plan.keep, outputs[:, None])
    sums = np.stack([EXACT[:, group].sum(axis=1) for group in GROUPS], axis=1)
    np.testing.assert_allclose(removal_forecast(EXACT, GROUPS), sums)
    again = agreement(sums, (outputs[1:] - outputs[0]).T)
    np.testing.assert_allclose(again.pearson_by_query, found.pearson_by_query)
    assert again.slope.value == pytest.approx(found.slope.value)
    assert again.runs is None and "reliability" not in str(again)


@pytest.mark.slow
def test_scrambled_scores_agree_with_nothing():
    """Zero is in an interval of nine tenths for about nine of ten scrambled scores."""
    rng = np.random.default_rng(3)
    truth = rng.standard_normal((5, 120))
    found = [agreement(rng.permutation(truth, axis=1), truth, resamples=100) for _ in range(100)]
    for figure in ("pearson", "spearman", "slope"):
        intervals = [getattr(one, figure) for one in found]
        assert 0.8 < np.mean([i.low < 0 < i.high for i in intervals]) < 0.98
        assert abs(np.mean([i.value for i in intervals])) < 0.03


def test_reversed_scores_agree_the_wrong_way_round():
    found = leave_one_out(-EXACT, plan_removals(30).keep, noisy(0, 1))
    assert found.pearson.value == pytest.approx(-1) and found.slope.value == pytest.approx(-1)


def test_reliability_is_the_correlation_with_the_same_measurement_repeated():
    rng = np.random.default_rng(4)
    signal = rng.standard_normal((300, 1, 8))
    keep = plan_removals(300).keep

    def measured(share, runs):
        """The run of all rows has noise, too, and all groups' rises have it in common."""
        everything, effects = np.zeros((1, runs, 8)), signal + np.zeros((300, runs, 8))
        return np.concatenate([part + share * rng.standard_normal(part.shape) for part in (everything, effects)])

    for share, runs in ((1.0, 2), (2.0, 6), (0.3, 2), (1.0, 4)):
        outputs, again = measured(share, runs), measured(share, runs)
        found = leave_one_out(rng.standard_normal((8, 300)), keep, outputs, resamples=2).reliability
        rises = [(part[1:] - part[:1]).mean(axis=1).T for part in (outputs, again)]
        expected = np.mean([spearmanr(a, b)[0] for a, b in zip(*rises, strict=True)])
        assert found == pytest.approx(expected, abs=0.05)


def test_a_truth_of_noise_is_called_so():
    found = leave_one_out(EXACT, plan_removals(30).keep, noisy(6, 2))
    assert found.noisy and found.reliability < 0.3
    assert f"reliability of the truth {found.reliability:.3f}, NOISY" in str(found)
    clear = leave_one_out(EXACT, plan_removals(30).keep, noisy(0.1, 2))
    assert not clear.noisy and "NOISY" not in str(clear)


def test_what_a_run_has_in_common_for_all_subsets_is_no_effect():
    """Runs of one seed share its luck; that a group lacks a run must not read as that luck."""
    outputs = noisy(0, 3)
    shifted = outputs + np.array([0.0, 5.0, -2.0])[:, None]
    shifted[4:9, 2], shifted[12:15, 1] = np.nan, np.nan
    found = leave_one_out(EXACT, plan_removals(30).keep, shifted)
    assert found.pearson.value == pytest.approx(1) and found.slope.value == pytest.approx(1)
    assert found.runs == 3


def test_a_query_without_a_correlation_counts_as_zero_and_is_shown():
    flat = EXACT.copy()
    flat[2] = 0.1
    flat[3] = 0.0
    found = agreement(flat, EXACT)
    assert found.undefined == 2 and "2 queries undefined" in str(found)
    assert found.pearson.value == pytest.approx(4 / 6)
    assert np.isnan(found.slope_by_query[3]) and not np.isnan(found.slope_by_query[2])
    assert np.isnan(agreement(np.zeros_like(EXACT), EXACT).slope.value)


def test_a_column_of_one_number_has_no_correlation_whatever_its_rounding():
    assert np.isnan(pearson(np.full((7, 1), 0.1), RNG.standard_normal((7, 1)))).all()


KEEP, OUTPUTS = plan_removals(30).keep, noisy(0, 1)


@pytest.mark.parametrize(
    ("scores", "keep", "outputs", "error", "words"),
    [
        (EXACT[:, :5], KEEP, OUTPUTS, ShapeMismatch, r"scores are \(6, 5\)"),
        (EXACT[:2], KEEP, OUTPUTS, ShapeMismatch, "outputs of 6 queries"),
        (EXACT, KEEP, OUTPUTS[:, 0], ShapeMismatch, "outputs are"),
        (EXACT, KEEP, OUTPUTS[:9], ShapeMismatch, "31 subsets"),
        (EXACT, KEEP.astype(int), OUTPUTS, InvalidInput, "mask"),
        (np.where(EXACT > 0, np.nan, EXACT), KEEP, OUTPUTS, NonFiniteValue, "not finite"),
        (EXACT, KEEP[1:], OUTPUTS[1:], InvalidInput, "it lacks 1"),
        (EXACT, KEEP[[0, 1, 0, 2]], OUTPUTS[:4], InvalidInput, "Subset 2 leaves out no row"),
        (EXACT, KEEP[:3], OUTPUTS[:3], InvalidInput, "at least 3 of them, got 2"),
        (EXACT, KEEP, np.where(np.arange(31)[:, None, None] == 4, np.nan, OUTPUTS), InvalidInput, "Subset 4 has no"),
        (EXACT, KEEP, np.where(np.arange(31)[:, None, None] == 0, np.nan, OUTPUTS), InvalidInput, "Subset 1 has no"),
    ],
)
def test_a_bank_that_is_no_leave_one_out_is_refused(scores, keep, outputs, error, words):
    with pytest.raises(error, match=words):
        leave_one_out(scores, keep, outputs)


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ShapeMismatch, match=r"\(6, 30\), the truth \(6, 29\)"):
        agreement(EXACT, EXACT[:, 1:])
    with pytest.raises(NonFiniteValue, match="truth of query 1 for group 2 is nan"):
        agreement(EXACT, np.where(np.arange(180).reshape(6, 30) == 32, np.nan, EXACT))
    with pytest.raises(InvalidInput, match="got 2"):
        agreement(EXACT[:, :2], EXACT[:, :2])
    with pytest.raises(InvalidSetting, match="level is 1"):
        agreement(EXACT, EXACT, level=1)
    with pytest.raises(InvalidInput, match="rows of group 1 go from 30 to 30; there are 30"):
        removal_forecast(EXACT, [[0], [30]])
    for group in (np.arange(30) < 2, [5.9, 7.9]):
        with pytest.raises(InvalidInput, match="positions of rows"):
            removal_forecast(EXACT, [group])
