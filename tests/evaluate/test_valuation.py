"""Nearest neighbours' Shapley values by their definition; out-of-bag values by plain loops, and those of a forest."""

from itertools import combinations
from math import comb

import numpy as np
import pytest
from sklearn.datasets import load_breast_cancer, load_diabetes
from sklearn.ensemble import RandomForestClassifier

from headwater.errors import BatchMismatch, InvalidInput, InvalidSetting, NonFiniteValue, ShapeMismatch
from headwater.evaluate import knn_shapley, out_of_bag, plan_subsets, retrain
from headwater.retraining.sklearn import Refit

RNG = np.random.default_rng(0)
TRAIN, QUERY = RNG.standard_normal((8, 2)), RNG.standard_normal((3, 2))
GIVEN, ASKED = np.array([0, 1, 1, 0, 2, 0, 1, 0]), np.array([0, 1, 2])


def shapley(utility, n):
    """By the definition: what a row adds to every coalition of the others, those of each size counting alike."""
    found = np.zeros(n)
    for row in range(n):
        others = [other for other in range(n) if other != row]
        for size in range(n):
            for some in combinations(others, size):
                found[row] += (utility((*some, row)) - utility(some)) / (n * comb(n - 1, size))
    return found


@pytest.mark.parametrize("k", [1, 3, 8, 10])
def test_nearest_neighbours_have_their_shapley_values(k):
    def utility(query, rows):
        near = sorted(rows, key=lambda row: (((TRAIN[row] - QUERY[query]) ** 2).sum(), row))[:k]
        return sum(GIVEN[row] == ASKED[query] for row in near) / k

    expected = [shapley(lambda rows, query=query: utility(query, rows), 8) for query in range(3)]
    found = knn_shapley(QUERY, TRAIN, ASKED, GIVEN, k=k)
    np.testing.assert_allclose(found, expected, atol=1e-14)
    np.testing.assert_allclose(found.sum(axis=1), [utility(query, range(8)) for query in range(3)], atol=1e-14)


def test_whole_numbers_that_are_a_regressions_targets_are_not_taken_for_classes():
    x, targets = load_diabetes(return_X_y=True)  # 25 to 346, without a fraction
    with pytest.raises(
        InvalidInput, match=r"442 train labels are numbers with 214 different values.*targets='classes'"
    ):
        knn_shapley(x[:5], x, targets[:5], targets)
    found = knn_shapley(x[:5], x, targets[:5], targets, targets="classes")
    words = knn_shapley(x[:5], x, targets[:5].astype(str), targets.astype(str))  # words are classes, however many
    np.testing.assert_array_equal(found, words)
    few = np.arange(60) % 20
    assert np.isfinite(knn_shapley(x[:5], x[:60], few[:5], few)).all()


def test_rows_as_near_as_each_other_are_taken_in_order():
    found = knn_shapley([[0.0]], [[1.0], [-1.0], [1.0]], ["a"], ["a", "b", "a"], k=1)
    np.testing.assert_allclose(found, [[5 / 6, -1 / 6, 1 / 3]], atol=1e-14)


def test_out_of_bag_is_the_mean_over_models_without_the_row():
    keep = plan_subsets(6, subsets=12, repeated=0, seed=1).keep
    losses = RNG.random((12, 2, 6))
    losses[3, 1] = np.nan  # not run
    found = out_of_bag(keep, losses, 4)
    for row in range(6):
        values = [v for m in range(12) for v in losses[m, :, row] if not keep[m, row] and not np.isnan(v)]
        np.testing.assert_allclose(found[:, row], -np.mean(values))
    np.testing.assert_allclose(out_of_bag(keep, losses[:, 0], 1)[0], out_of_bag(keep, losses[:, :1], 1)[0])


def test_a_forest_and_a_bank_have_out_of_bag_values_that_find_wrong_labels(tmp_path):
    X, y = load_breast_cancer(return_X_y=True)
    X, y = X[:100], y[:100].copy()
    wrong = RNG.choice(100, size=10, replace=False)
    y[wrong] = 1 - y[wrong]
    forest = RandomForestClassifier(40, max_depth=4, random_state=0).fit(X, y)
    bags = np.zeros((40, 100), dtype=bool)
    for bag, rows in zip(bags, forest.estimators_samples_, strict=True):
        bag[rows] = True
    misses = np.stack([tree.predict(X) != y for tree in forest.estimators_]).astype(float)
    small = RandomForestClassifier(4, max_depth=4)
    bank = retrain(tmp_path, Refit(small, X, y, X, y), rows=100, queries=100, subsets=20, recipe={}, progress=False)
    for values in (out_of_bag(bags, misses, 1)[0], out_of_bag(*bank, 1)[0]):
        assert np.isin(wrong, np.argsort(values)[:20]).mean() >= 0.7


def test_what_has_no_value_is_refused():
    keep = np.ones((3, 2), dtype=bool)
    keep[0, 1] = False
    for call, error, words in (
        (lambda: knn_shapley(QUERY, TRAIN, ASKED, GIVEN, k=0), InvalidSetting, "k is 0"),
        (lambda: knn_shapley(QUERY, TRAIN[:, :1], ASKED, GIVEN), ShapeMismatch, "2 features, train rows 1"),
        (lambda: knn_shapley(QUERY, TRAIN, ASKED[:2], GIVEN), BatchMismatch, r"\(2,\) and \(8,\)"),
        (lambda: knn_shapley(QUERY, TRAIN, ASKED, GIVEN + 0.5), InvalidInput, r"label is \S+\.5: labels are classes"),
        (lambda: knn_shapley(QUERY, TRAIN * np.inf, ASKED, GIVEN), NonFiniteValue, "train row 0"),
        (lambda: out_of_bag(keep, np.ones((3, 2)), 1), InvalidInput, "Every model was trained on row 0"),
        (lambda: out_of_bag(keep, np.ones((3, 1, 5)), 1), ShapeMismatch, "of the n train rows themselves"),
        (lambda: out_of_bag(~keep, np.ones((3, 2)), 0), InvalidSetting, "q is 0"),
    ):
        with pytest.raises(error, match=words):
            call()
