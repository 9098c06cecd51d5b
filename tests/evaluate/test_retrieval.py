"""Claims about retrieval; the slow truth lists every order that the ties allow."""

from itertools import permutations

import numpy as np
import pytest

from headwater.errors import InvalidInput, InvalidSetting, NonFiniteValue, ShapeMismatch
from headwater.evaluate.intervals import over_queries
from headwater.evaluate.retrieval import (
    duplicates,
    found_at_k,
    in_top,
    mrr,
    precision_at_k,
    ranking,
    recall_at_k,
    reciprocal_ranks,
)

TIED = np.array([[3.0, 1, 3, 2, 3, 1], [0, 0, 0, 0, 0, 0], [1, 2, 2, 2, 2, 0], [5, 4, 3, 2, 1, 0]])
WANTED = np.array([[0, 1, 0, 0, 1, 1], [0, 1, 0, 1, 0, 0], [1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]], dtype=bool)


def mean_over_listings(figure):
    """For each query, the mean of a figure of flags over all descending orders of its rows."""
    found = []
    for scores, wanted in zip(TIED, WANTED, strict=True):
        orders = [list(order) for order in permutations(range(6)) if (np.diff(scores[list(order)]) <= 0).all()]
        found.append(np.mean([figure(wanted[order]) for order in orders], axis=0))
    return np.array(found)


def test_reciprocal_ranks_are_their_means_over_all_orders_of_the_ties():
    expected = mean_over_listings(lambda flags: 1 / (1 + flags.argmax()))
    np.testing.assert_allclose(reciprocal_ranks(TIED, WANTED), expected, atol=1e-14)
    assert mrr(TIED, WANTED).value == pytest.approx(expected.mean())


@pytest.mark.parametrize("k", [1, 2, 3, 5, 6])
def test_recall_and_precision_are_their_means_over_all_orders_of_the_ties(k):
    expected = mean_over_listings(lambda flags: flags[:k].sum())
    np.testing.assert_allclose(found_at_k(TIED, WANTED, k), expected, atol=1e-14)
    assert precision_at_k(TIED, WANTED, k).value == pytest.approx((expected / k).mean())
    assert recall_at_k(TIED, WANTED, k).value == pytest.approx((expected / WANTED.sum(axis=1)).mean())


def test_the_top_has_k_rows_in_all():
    for k in range(1, 7):
        np.testing.assert_allclose(in_top(TIED, k).sum(axis=1), k)
    np.testing.assert_array_equal(in_top(TIED, 3)[0], [1, 0, 1, 0, 1, 0])
    np.testing.assert_allclose(in_top(TIED, 2)[2], [0, 0.5, 0.5, 0.5, 0.5, 0])


def test_a_constant_score_gets_what_chance_gets():
    wanted = np.eye(40, dtype=bool)[:9]
    constant = np.zeros((9, 40))
    assert mrr(constant, wanted).value == pytest.approx((1 / np.arange(1, 41)).mean())
    assert recall_at_k(constant, wanted, 10).value == pytest.approx(0.25)
    assert precision_at_k(constant, wanted, 10).value == pytest.approx(1 / 40)


def test_planted_duplicates_are_found_by_what_sees_them():
    rng = np.random.default_rng(0)
    train = rng.standard_normal((50, 8))
    query = train[[7, 3, 9, 30]] + 1e-3 * rng.standard_normal((4, 8))
    scores = -((query[:, None] - train) ** 2).sum(axis=2)
    pairs = {0: 7, 3: [30], 1: (3,)}
    given, relevant = duplicates(scores, pairs)
    np.testing.assert_array_equal(given, scores[[0, 3, 1]])
    np.testing.assert_array_equal(np.argwhere(relevant), [[0, 7], [1, 30], [2, 3]])
    assert mrr(*duplicates(scores, pairs)).value == 1
    assert recall_at_k(*duplicates(scores, {0: [7, 8]}), 1).value == 0.5
    assert mrr(*duplicates(-scores, pairs)).value < 0.05


def test_duplicates_that_do_not_exist_are_refused():
    scores = np.ones((4, 5))
    for pairs, words in (
        ({}, "no pairs"),
        ({4: 0}, "query 4; there are 4"),
        ({1: [0, 5]}, "query 1 go from 0 to 5; there are 5"),
    ):
        with pytest.raises(InvalidInput, match=words):
            duplicates(scores, pairs)
    for rows in (np.arange(5) < 2, 1.7):
        with pytest.raises(InvalidInput, match=r"query 0 are .*positions of rows"):
            duplicates(scores, {0: rows})
    with pytest.raises(InvalidInput, match="no relevant row"):
        duplicates(scores, {1: []})


def test_the_interval_of_a_mean_has_the_width_that_its_standard_error_says():
    values = np.random.default_rng(1).random(400)
    found = over_queries(values)
    error = values.std() / np.sqrt(400)
    assert found.value == pytest.approx(values.mean())
    assert found.high - found.low == pytest.approx(2 * 1.645 * error, rel=0.1)
    assert found == over_queries(values)
    alone = over_queries([0.3])
    assert (alone.low, alone.high) == (0.3, 0.3)
    assert np.isnan(over_queries(values, resamples=0).low)


def test_a_paired_difference_is_that_of_the_figures():
    first, second = reciprocal_ranks(TIED, WANTED), reciprocal_ranks(-TIED, WANTED)
    assert over_queries(first - second).value == pytest.approx(mrr(TIED, WANTED).value - mrr(-TIED, WANTED).value)


def test_a_ranking_falls_and_its_ties_are_drawn():
    scores = np.random.default_rng(2).integers(4, size=(6, 30)).astype(float)
    order = ranking(scores, seed=1)
    assert (np.diff(np.take_along_axis(scores, order, axis=1), axis=1) <= 0).all()
    np.testing.assert_array_equal(np.sort(order, axis=1), np.tile(np.arange(30), (6, 1)))
    np.testing.assert_array_equal(order, ranking(scores, seed=1))
    assert (order != ranking(scores, seed=2)).any()
    firsts = [ranking(np.zeros((1, 4)), seed)[0, 0] for seed in range(200)]
    assert (np.bincount(firsts) > 25).all()


@pytest.mark.parametrize(
    ("scores", "relevant", "error", "words"),
    [
        (TIED[0], WANTED[0], ShapeMismatch, r"scores are \(6,\)"),
        (np.ones((0, 3)), np.ones((0, 3), bool), ShapeMismatch, r"\(0, 3\)"),
        (TIED, WANTED[:2], ShapeMismatch, r"relevant rows \(2, 6\)"),
        (TIED, WANTED.astype(int), InvalidInput, "dtype int64"),
        (np.where(TIED == 5, np.nan, TIED), WANTED, NonFiniteValue, "first of query 3 and row 0"),
        (
            TIED,
            WANTED & (np.arange(4) != 2)[:, None],
            InvalidInput,
            "1 queries have no relevant row, the first query 2",
        ),
    ],
)
def test_what_has_no_ranking_is_refused(scores, relevant, error, words):
    for metric in (mrr, lambda s, r: recall_at_k(s, r, 2), lambda s, r: precision_at_k(s, r, 2)):
        with pytest.raises(error, match=words):
            metric(scores, relevant)


def test_settings_that_mean_nothing_are_refused():
    for k in (0, 7, True, 2.0):
        with pytest.raises(InvalidSetting, match=f"k is {k}; expected a whole number from 1 to 6"):
            recall_at_k(TIED, WANTED, k)
    with pytest.raises(InvalidSetting, match="level is 0"):
        mrr(TIED, WANTED, level=0)
    with pytest.raises(NonFiniteValue, match="that of query 1"):
        over_queries([0.0, np.nan])
    with pytest.raises(ShapeMismatch, match=r"\(0,\)"):
        over_queries([])
