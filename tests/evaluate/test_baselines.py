"""Baselines: each is what it says, by the slow formula; and chance does not beat chance."""

import re

import numpy as np
import pytest

from headwater.errors import BatchMismatch, InvalidInput, InvalidSetting, MissingExtra, NonFiniteValue, ShapeMismatch
from headwater.evaluate import baselines
from headwater.evaluate.baselines import against_random, bm25, loss_ranking, random_scores, similarity

RNG = np.random.default_rng(0)
TEXTS = ["A cat sat on the mat", "the dog, the dog ran", "cats and dogs", "", "The cat saw the dog on the other mat"]
ASKED = ["the cat", "mat mat dog", "zebra", "", "THE"]


def test_random_scores_are_of_their_seed_only():
    scores = random_scores(30, 400, seed=3)
    assert scores.shape == (30, 400)
    np.testing.assert_array_equal(scores, random_scores(30, 400, seed=3))
    assert (scores != random_scores(30, 400, seed=4)).any()
    assert abs(scores.mean()) < 0.05 and scores.std() == pytest.approx(1, abs=0.05)


def test_similarity_is_the_cosine():
    query, train = RNG.standard_normal((3, 5)), RNG.standard_normal((7, 5))
    expected = [[q @ t / np.linalg.norm(q) / np.linalg.norm(t) for t in train] for q in query]
    np.testing.assert_allclose(similarity(query, train), expected)
    np.testing.assert_allclose(similarity(1e-200 * query, 1e200 * train), expected)
    assert (similarity(query, np.zeros((2, 5))) == 0).all()


def test_another_label_turns_the_sign_of_similarity():
    query, train = RNG.standard_normal((3, 5)), RNG.standard_normal((7, 5))
    labels, given = np.array(["a", "b", "a"]), np.array(list("abbacab"))
    plain, signed = similarity(query, train), similarity(query, train, labels, given)
    for q in range(3):
        for n in range(7):
            assert signed[q, n] == (plain[q, n] if labels[q] == given[n] else -plain[q, n])


def test_the_loss_ranking_is_the_same_for_all_queries():
    scores = loss_ranking([0.5, 2.0, 1.0], 4)
    np.testing.assert_array_equal(scores, [[0.5, 2.0, 1.0]] * 4)


def plain_bm25(query, texts, k1=1.5, b=0.75):
    """The formula, term by term."""
    words = [re.findall(r"\w\w+", text.lower()) for text in texts]
    mean = np.mean([len(w) for w in words])
    found = np.zeros(len(texts))
    for term in re.findall(r"\w\w+", query.lower()):
        df = sum(term in w for w in words)
        idf = np.log(1 + (len(texts) - df + 0.5) / (df + 0.5))
        for row, w in enumerate(words):
            tf = w.count(term)
            found[row] += idf * tf / (tf + k1 * (1 - b + b * len(w) / mean))
    return found


def test_bm25_is_its_formula():
    pytest.importorskip("bm25s")
    scores = bm25(ASKED, TEXTS)
    np.testing.assert_allclose(scores, [plain_bm25(query, TEXTS) for query in ASKED], rtol=1e-5, atol=1e-7)
    assert scores.shape == (5, 5) and scores.dtype == np.float64
    assert (scores[0] > 0).sum() == 3 and (scores[2:4] == 0).all()


def test_bm25_refuses_what_has_no_words():
    pytest.importorskip("bm25s")
    with pytest.raises(InvalidInput, match="None of the 2 train texts has a word"):
        bm25(ASKED, ["", "."])
    with pytest.raises(InvalidInput, match=r"query texts.*got \[\]"):
        bm25([], TEXTS)
    with pytest.raises(InvalidInput, match=r"train texts.*'a cat'"):
        bm25(ASKED, "a cat")


def test_bm25_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr(baselines, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"bm25s.*headwater\[verses\]"):
        bm25(ASKED, TEXTS)


def test_a_comparison_with_random_rows_is_paired():
    """What queries have in common with themselves drops out of the difference, and not of the figures."""
    offset = 10 * RNG.standard_normal(80)
    chosen = offset + 0.3 + 0.05 * RNG.standard_normal(80)
    random = offset + 0.05 * RNG.standard_normal((4, 80))
    found = against_random(chosen, random)
    assert found.difference.value == pytest.approx(chosen.mean() - random.mean())
    assert found.chosen.value == pytest.approx(chosen.mean()) and found.random.value == pytest.approx(random.mean())
    assert 0.25 < found.difference.low < 0.3 < found.difference.high + 0.03
    assert found.chosen.high - found.chosen.low > 10 * (found.difference.high - found.difference.low)


def test_the_luck_of_random_sets_is_in_the_interval():
    """All queries share a set: with sets that differ much, many queries do not make the baseline sure."""
    sets = np.array([-1.0, 0.0, 1.0, 2.0])[:, None]
    found = against_random(np.zeros(5000), sets + 0.01 * RNG.standard_normal((4, 5000)))
    assert found.random.high - found.random.low > 1
    assert found.difference.low < 0 < found.difference.high


@pytest.mark.parametrize(
    ("draws", "trials"), [(2, 50), *(pytest.param(draws, 150, marks=pytest.mark.slow) for draws in (2, 5))]
)
def test_zero_is_in_the_interval_of_a_chance_ranking_as_often_as_it_says(draws, trials):
    """Also where a set's luck, which all queries share, is thrice that of the queries."""
    rng, inside = np.random.default_rng(draws), []
    for _ in range(trials):
        luck = 3 / np.sqrt(50) * rng.standard_normal((draws, 1))
        found = against_random(rng.standard_normal(50), luck + rng.standard_normal((draws, 50)), resamples=300)
        inside.append(found.difference.low < 0 < found.difference.high)
    assert np.mean(inside) > 0.85


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ShapeMismatch, match="2 draws or more"):
        against_random(np.ones(3), np.ones((1, 3)))
    with pytest.raises(ShapeMismatch, match=r"\(3,\) and \(2, 4\) at random"):
        against_random(np.ones(3), np.ones((2, 4)))
    with pytest.raises(NonFiniteValue, match="2 queries are not finite, the first query 1"):
        against_random([0, np.nan, 0], [[0, 0, np.inf], [0, 0, 0]])


def test_features_losses_and_counts_that_mean_nothing_are_refused():
    query, train = np.ones((2, 3)), np.ones((4, 3))
    for call, error, words in (
        (lambda: similarity(query, train[:, :2]), ShapeMismatch, "3 features, train rows 2"),
        (lambda: similarity(query[0], train), ShapeMismatch, r"query features are \(3,\)"),
        (lambda: similarity(query, [[0, np.nan, 0]]), NonFiniteValue, "train row 0"),
        (lambda: similarity(query, train, [0, 1]), InvalidInput, "labels of the queries only"),
        (lambda: similarity(query, train, None, [0] * 4), InvalidInput, "labels of the train rows only"),
        (lambda: similarity(query, train, [0, 1], [0]), BatchMismatch, r"\(2,\) and \(1,\)"),
        (lambda: loss_ranking(np.ones((2, 2)), 3), ShapeMismatch, r"\(2, 2\)"),
        (lambda: loss_ranking([1, np.inf], 3), NonFiniteValue, "row 1 is inf"),
        (lambda: loss_ranking([1.0], 0), InvalidSetting, "q is 0"),
        (lambda: random_scores(2, True), InvalidSetting, "n is True"),
    ):
        with pytest.raises(error, match=words):
            call()
