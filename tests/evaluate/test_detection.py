"""Claims about the ranking metrics; the slow truth lists every order that the ties allow."""

from itertools import permutations

import numpy as np
import pytest

from headwater.errors import BatchMismatch, HeadwaterError, InvalidInput, InvalidSetting, NonFiniteValue
from headwater.evaluate import auc, average_precision, precision_at, recall_at, recall_curve

TIED = np.array([3.0, 1.0, 3.0, 2.0, 3.0, 1.0, 0.0])
WANTED = np.array([True, True, False, False, True, False, True])


def listings(scores, positives):
    """The flags of every descending order of the rows, ties in all their orders."""
    for order in permutations(range(len(scores))):
        if (np.diff(scores[list(order)]) <= 0).all():
            yield positives[list(order)]


def mean_over_listings(metric):
    return np.mean([metric(flags) for flags in listings(TIED, WANTED)], axis=0)


def test_auc_is_the_share_of_pairs_in_the_right_order_with_ties_at_one_half():
    pairs = [(p > n) + 0.5 * (p == n) for p in TIED[WANTED] for n in TIED[~WANTED]]
    assert auc(TIED, WANTED) == pytest.approx(np.mean(pairs), abs=1e-15)


def test_average_precision_is_its_mean_over_all_orders_of_the_ties():
    def of_one_order(flags):
        return np.mean((np.cumsum(flags) / np.arange(1, len(flags) + 1))[flags])

    assert average_precision(TIED, WANTED) == pytest.approx(mean_over_listings(of_one_order), abs=1e-14)


def test_recall_and_precision_are_their_means_over_all_orders_of_the_ties():
    found = mean_over_listings(np.cumsum)
    np.testing.assert_allclose(recall_curve(TIED, WANTED)[1:], found / 4, atol=1e-15)
    assert recall_at(TIED, WANTED, 2 / 7) == pytest.approx(found[1] / 4)
    assert precision_at(TIED, WANTED, 5) == pytest.approx(found[4] / 5)


def test_a_perfect_ranking_is_perfect_and_its_reverse_is_not():
    scores, wanted = np.arange(100.0), np.arange(100) >= 90
    assert auc(scores, wanted) == average_precision(scores, wanted) == recall_at(scores, wanted, 0.1) == 1
    assert precision_at(scores, wanted, 20) == 0.5
    assert auc(-scores, wanted) == precision_at(-scores, wanted, 20) == 0


def test_a_constant_score_gets_what_chance_gets():
    wanted = np.arange(50) % 5 == 0
    assert auc(np.zeros(50), wanted) == 0.5
    assert precision_at(np.zeros(50), wanted, 7) == pytest.approx(0.2)
    assert recall_at(np.zeros(50), wanted, 0.1) == pytest.approx(0.1)


def test_infinite_scores_rank_first_and_last():
    assert auc([np.inf, 0.0, -np.inf], np.array([True, False, False])) == 1


def test_auc_and_average_precision_agree_with_scikit_learn_where_nothing_ties():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    scores, wanted = rng.normal(size=200), rng.random(200) < 0.2
    assert auc(scores, wanted) == pytest.approx(metrics.roc_auc_score(wanted, scores), abs=1e-14)
    assert average_precision(scores, wanted) == pytest.approx(
        metrics.average_precision_score(wanted, scores), abs=1e-14
    )


METRICS = {
    "auc": auc,
    "average_precision": average_precision,
    "recall_at": lambda scores, positives: recall_at(scores, positives, 0.1),
    "precision_at": lambda scores, positives: precision_at(scores, positives, 2),
}


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
@pytest.mark.parametrize(
    ("scores", "positives", "error", "said"),
    [
        (np.ones(3), np.zeros(3, bool), InvalidInput, "None of the 3 rows is positive"),
        (np.array([1, np.nan, np.nan]), np.ones(3, bool), NonFiniteValue, "2 of 3 scores are NaN, the first at row 1"),
        (np.ones(3), np.array([0, 1, 1]), InvalidInput, "bool mask.*int64"),
        (np.ones(3), np.ones(4, bool), BatchMismatch, r"scores \(3,\) and positives \(4,\)"),
    ],
)
def test_bad_rows_are_refused_by_every_metric(metric, scores, positives, error, said):
    with pytest.raises(error, match=said) as caught:
        metric(scores, positives)
    assert isinstance(caught.value, HeadwaterError) and isinstance(caught.value, ValueError)


def test_a_metric_without_meaning_is_refused():
    wanted = np.array([True, False])
    with pytest.raises(InvalidInput, match="all 2 rows are positive"):
        auc([1, 2], np.ones(2, bool))
    for fraction in (0, 1.5):
        with pytest.raises(InvalidSetting, match=str(fraction)):
            recall_at([1, 2], wanted, fraction)
    for k in (0, 3, 1.5):
        with pytest.raises(InvalidSetting, match=f"k is {k}; expected a whole number from 1 to 2"):
            precision_at([1, 2], wanted, k)
