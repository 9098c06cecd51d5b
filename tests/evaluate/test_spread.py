"""Spread of scores over seeds: what matrices have in common, and what their mean is worth."""

import numpy as np
import pytest
from scipy.stats import spearmanr

from headwater.errors import InvalidInput, InvalidSetting, NonFiniteValue, ShapeMismatch
from headwater.evaluate.rank_spread import spread

RNG = np.random.default_rng(0)
SIGNAL = RNG.standard_normal((12, 400))


def draws(count, share=1.0, seed=1):
    """The signal, and noise of `share` times its size in each matrix."""
    return SIGNAL + share * np.random.default_rng(seed).standard_normal((count, *SIGNAL.shape))


def test_figures_are_those_of_plain_loops():
    scores = draws(4)[:, :, :30]
    found = spread(scores, k=5)
    np.testing.assert_allclose(found.mean, sum(scores) / 4)
    np.testing.assert_allclose(found.deviation, np.sqrt(((scores - found.mean) ** 2).sum(axis=0) / 3))
    pairs = [(a, b) for a in range(4) for b in range(a)]
    for q in range(12):
        ranks = [spearmanr(scores[a, q], scores[b, q])[0] for a, b in pairs]
        tops = [set(np.argsort(-matrix[q])[:5].tolist()) for matrix in scores]
        assert found.correlation_by_query[q] == pytest.approx(np.mean(ranks))
        assert found.overlap_by_query[q] == pytest.approx(np.mean([len(tops[a] & tops[b]) / 5 for a, b in pairs]))
    assert found.correlation.value == pytest.approx(found.correlation_by_query.mean())
    assert found.overlap.low < found.overlap.value < found.overlap.high


def test_equal_matrices_agree_in_everything():
    found = spread([SIGNAL, SIGNAL, np.exp(SIGNAL)])
    assert found.correlation.value == pytest.approx(1)
    assert found.overlap.value == found.reliability == found.reliability_of(1) == pytest.approx(1)
    assert (spread([SIGNAL, SIGNAL]).deviation == 0).all()


def test_matrices_of_noise_have_nothing_in_common():
    found = spread(np.random.default_rng(2).standard_normal((5, 60, 200)))
    assert found.correlation.low < 0.01 and abs(found.correlation.value) < 0.02
    assert found.overlap.value == pytest.approx(10 / 200, abs=0.02)
    assert found.reliability < 0.1
    opposed = spread([SIGNAL, -SIGNAL])
    assert opposed.correlation.value == pytest.approx(-1) and opposed.reliability == 0


@pytest.mark.parametrize("count", [2, 5])
def test_reliability_is_how_two_means_correlate(count):
    first, second = (draws(count, share=1.5, seed=seed).mean(axis=0) for seed in (3, 4))
    expected = np.mean([spearmanr(a, b)[0] for a, b in zip(first, second, strict=True)])
    assert spread(draws(count, share=1.5, seed=3)).reliability == pytest.approx(expected, abs=0.04)


def test_a_query_without_a_correlation_counts_as_zero_and_is_shown():
    scores = draws(3)
    scores[1, 4] = 0.7
    found = spread(scores)
    assert found.undefined == 1 and np.isnan(found.correlation_by_query[4])
    assert found.correlation.value == pytest.approx(np.nansum(found.correlation_by_query) / 12)
    assert "1 queries undefined" in str(found)
    assert found.overlap_by_query[4] == pytest.approx(
        (2 * 10 / 400 + len(set(np.argsort(-scores[0, 4])[:10]) & set(np.argsort(-scores[2, 4])[:10])) / 10) / 3
    )


def test_what_has_no_spread_is_refused():
    for scores, error, words in (
        (SIGNAL[None], InvalidInput, "got 1"),
        ([SIGNAL, SIGNAL[:, 1:]], ShapeMismatch, r"Matrix 1 is \(12, 399\), the first \(12, 400\)"),
        (SIGNAL, ShapeMismatch, r"\(400,\)"),
        ([SIGNAL, np.where(SIGNAL > 2, np.inf, SIGNAL)], NonFiniteValue, "not finite"),
    ):
        with pytest.raises(error, match=words):
            spread(scores)
    with pytest.raises(InvalidSetting, match="k is 401; expected a whole number from 1 to 400"):
        spread(draws(2), k=401)
    with pytest.raises(InvalidSetting, match="matrices is 0"):
        spread(draws(2)).reliability_of(0)
