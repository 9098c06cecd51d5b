"""Removal and addition curves: the plan removes what it says, and exact scores of a linear model beat chance."""

import numpy as np
import pytest

from headwater.errors import InvalidInput, InvalidSetting, NonFiniteValue, ShapeMismatch
from headwater.evaluate.bank import Bank
from headwater.evaluate.curves import plan_curve
from headwater.store.scores import Scores

RNG = np.random.default_rng(0)
N, Q = 60, 55
X, W = RNG.standard_normal((N, 5)), RNG.standard_normal(5)
Y = X @ W + RNG.standard_normal(N)
X_QUERY = RNG.standard_normal((Q, 5))
Y_QUERY = X_QUERY @ W + RNG.standard_normal(Q)


def fitted(rows):
    return np.linalg.solve(X[rows].T @ X[rows] + np.eye(5), X[rows].T @ Y[rows])


def losses(rows, seed=0):
    return 0.5 * (X_QUERY @ fitted(rows) - Y_QUERY) ** 2


def margins(rows, seed=0):
    """Of the sign of the target."""
    return (X_QUERY @ fitted(rows)) * np.sign(X_QUERY @ W)


def measured(plan, measure):
    return np.stack([[measure(np.flatnonzero(mask)) for _ in seeds] for mask, seeds in zip(plan.keep, plan.seeds)])  # noqa: B905


ALL = losses(np.arange(N))
EXACT = np.stack([losses(np.delete(np.arange(N), row)) - ALL for row in range(N)], axis=1)
ALL_MARGINS = margins(np.arange(N))
EXACT_MARGINS = np.stack([ALL_MARGINS - margins(np.delete(np.arange(N), row)) for row in range(N)], axis=1)


def test_a_plan_is_all_rows_then_each_querys_own_then_random_ones():
    scores = np.array([[3.0, 1, 2, 0, 5, 4, 9, 8], [0, 1, 2, 3, 4, 5, 6, 7]])
    found = plan_curve(scores, [0.25, 0.5], random=3, runs=2)
    removed = ~found.plan.keep
    assert found.plan.keep.shape == (1 + 2 * (2 + 3), 8) and found.sizes == (2, 4)
    own = [np.flatnonzero(mask).tolist() for mask in removed[:5]]
    assert own == [[], [6, 7], [6, 7], [4, 5, 6, 7], [4, 5, 6, 7]]
    np.testing.assert_array_equal(removed[5:].sum(axis=1), [2, 2, 2, 4, 4, 4])
    assert not (removed[5:8] & ~removed[8:]).any()  # the larger random sets hold the smaller
    assert (found.plan.seeds == found.plan.seeds[0]).all() and len(set(found.plan.seeds[0])) == 2
    np.testing.assert_array_equal(
        plan_curve(scores, [0.25, 0.5], "addition", random=3, runs=2).plan.keep[1:], removed[1:]
    )


def test_one_ranking_for_all_queries_is_one_subset_at_each_fraction():
    found = plan_curve(EXACT.mean(axis=0), [0.1, 0.3], random=4)
    assert found.plan.keep.shape == (1 + 2 * (1 + 4), N) and found.queries is None
    order = np.argsort(-EXACT.mean(axis=0))
    np.testing.assert_array_equal(np.flatnonzero(~found.plan.keep[2]), np.sort(order[:18]))
    curve = found.measure(measured(found.plan, losses))
    np.testing.assert_allclose(curve.by_query[1], losses(np.sort(order[18:])) - ALL)
    assert curve.shared and "one ranking for all" in str(curve)


def test_figures_are_those_of_retraining_by_hand():
    found = plan_curve(EXACT, [0.1, 0.2], random=3, runs=1, seed=5)
    outputs = measured(found.plan, losses)
    curve = found.measure(outputs)
    order = np.argsort(-EXACT, axis=1)
    for place, size in enumerate((6, 12)):
        by_hand = [losses(np.delete(np.arange(N), order[q, :size]))[q] - ALL[q] for q in range(Q)]
        np.testing.assert_allclose(curve.by_query[place], by_hand)
        first = 1 + 2 * Q + 3 * place
        chance = (outputs[first : first + 3, 0] - ALL).mean(axis=0)
        np.testing.assert_allclose(curve.random_by_query[place], chance)
        point = curve.points[place]
        assert point.chosen.value == pytest.approx(np.mean(by_hand))
        assert point.difference.value == pytest.approx(np.mean(by_hand) - chance.mean())


def test_removing_by_exact_scores_beats_chance_and_reversed_ones_fall_behind(tmp_path):
    found = plan_curve(EXACT, [0.1, 0.3])
    bank = Bank(tmp_path, found.plan, Q, {}).fill(losses)
    curve = found.measure(bank.outputs)
    assert all(point.difference.low > 0 for point in curve.points)
    assert curve.points[1].chosen.value > curve.points[0].chosen.value
    reverse = plan_curve(-EXACT, [0.1, 0.3])
    behind = reverse.measure(measured(reverse.plan, losses))
    assert all(point.difference.high < 0 for point in behind.points)


def test_adding_by_exact_scores_gives_lower_losses_than_chance():
    found = plan_curve(EXACT, [0.3], "addition")
    curve = found.measure(measured(found.plan, losses))
    assert curve.points[0].difference.high < 0
    assert "further its difference from random is below 0" in str(curve)


def test_scores_at_random_are_no_better_than_chance():
    found = plan_curve(RNG.standard_normal((Q, N)), [0.2], random=10)
    difference = found.measure(measured(found.plan, losses)).points[0].difference
    assert difference.low < 0 < difference.high


def test_flips_are_counted_where_outputs_are_margins():
    found = plan_curve(EXACT_MARGINS, [0.1, 0.4], random=3)
    outputs = measured(found.plan, margins)
    curve = found.measure(outputs, margins=True)
    order = np.argsort(-EXACT_MARGINS, axis=1)
    for place, size in enumerate((6, 24)):
        after = np.array([margins(np.delete(np.arange(N), order[q, :size]))[q] for q in range(Q)])
        assert curve.flips[place] == np.mean((after > 0) != (ALL_MARGINS > 0))
        first = 1 + 2 * Q + 3 * place
        assert curve.random_flips[place] == np.mean((outputs[first : first + 3, 0] > 0) != (ALL_MARGINS > 0))
    assert curve.flips[1] > curve.random_flips[1]
    assert curve.points[1].difference.high < 0
    assert "is below 0" in str(curve) and f"flipped {curve.flips[1]:.0%}" in str(curve)
    assert found.measure(outputs).flips is None and "flipped" not in str(found.measure(outputs))


def test_runs_are_averaged_and_one_that_was_not_run_is_left_out():
    found = plan_curve(EXACT, [0.2], random=2, runs=2)
    outputs = measured(found.plan, losses)
    outputs[:, 1] += 1.0
    curve = found.measure(outputs)
    plain = found.measure(outputs[:, :1])
    np.testing.assert_allclose(curve.by_query, plain.by_query, atol=1e-12)
    outputs[5, 1] = np.nan
    assert found.measure(outputs).by_query[0, 4] == pytest.approx(plain.by_query[0, 4] - 0.5)


def test_few_queries_are_said_to_be_few():
    few = plan_curve(EXACT[:7], [0.2], random=2)
    curve = few.measure(measured(few.plan, losses)[:, :, :7])
    assert curve.few_queries and "few queries: 7" in str(curve)
    many = plan_curve(EXACT, [0.2], random=2)
    assert "few queries" not in str(many.measure(measured(many.plan, losses)))


def test_equal_scores_are_removed_in_no_order():
    taken = [np.flatnonzero(~plan_curve(np.zeros(N), [0.1], seed=seed).plan.keep[1]).tolist() for seed in range(3)]
    assert taken[0] != taken[1] != taken[2] and max(map(max, taken)) > 20


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"fractions": [0.0]}, r"fraction is 0\.0"),
        ({"fractions": [1.0]}, r"fraction is 1\.0"),
        ({"fractions": [0.001]}, r"fraction is 0\.001"),
        ({"fractions": [0.1, 0.101]}, "different sizes"),
        ({"fractions": []}, "different sizes"),
        ({"direction": "both"}, "direction is 'both'"),
        ({"random": 1}, "random is 1"),
        ({"runs": 0}, "runs is 0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(change, words):
    with pytest.raises(InvalidSetting, match=words):
        plan_curve(**({"scores": EXACT, "fractions": [0.1]} | change))


def test_labelled_scores_are_ranked_by_the_rows_that_they_name():
    order = np.random.default_rng(0).permutation(EXACT.shape[1])
    labelled = Scores(EXACT[:, order], np.arange(len(EXACT)), order)
    found = plan_curve(labelled, [0.1, 0.3], random=2).plan.keep
    np.testing.assert_array_equal(found, plan_curve(EXACT, [0.1, 0.3], random=2).plan.keep)


def test_scores_and_outputs_that_do_not_fit_are_refused():
    with pytest.raises(ShapeMismatch, match=r"\(2, 2, 2\)"):
        plan_curve(np.ones((2, 2, 2)), [0.5])
    with pytest.raises(NonFiniteValue, match="query 0 and row 1"):
        plan_curve([1.0, np.nan, 2.0], [0.5])
    found = plan_curve(EXACT, [0.2], random=2)
    outputs = measured(found.plan, losses)
    with pytest.raises(ShapeMismatch, match="54 queries; the plan is for 55"):
        found.measure(outputs[:, :, :-1])
    with pytest.raises(ShapeMismatch, match="outputs are"):
        found.measure(outputs[1:])
    outputs[3] = np.nan
    with pytest.raises(InvalidInput, match="Subset 3"):
        found.measure(outputs)
