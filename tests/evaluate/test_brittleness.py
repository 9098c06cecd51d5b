"""Brittleness on votes, where the number of rows that flips each query is known."""

import numpy as np
import pytest

from headwater.errors import InvalidSetting, NonFiniteValue, ShapeMismatch
from headwater.evaluate.flips import brittleness

# Row i adds VOTES[q, i] to query q's margin, on top of BASE[q].
N = 40
VOTES = np.zeros((4, N))
VOTES[0, 10:21] = 1.0  # eleven votes for, and 4.5 against: five must go
VOTES[1, 3:30] = 1.0  # 27 votes for, half a vote against: all 27 must go
VOTES[2, 7] = 1.0  # one vote for, half a vote against: one must go
BASE = np.array([-6.5, -0.5, -0.5, -0.5])  # the last has no votes: wrong with all rows
NEEDED = [5.0, 27.0, 1.0, np.nan]


class Votes:
    """A model that counts votes, and how often it was trained."""

    def __init__(self, noise=0.0):
        self.asked, self.noise = [], noise

    def __call__(self, rows, seed):
        self.asked.append((tuple(rows), seed))
        return VOTES[:, rows].sum(axis=1) + BASE + self.noise * (-1) ** seed


def test_the_known_number_of_rows_is_found():
    measure = Votes()
    found = brittleness(VOTES, measure, max_size=30, seed=1)
    np.testing.assert_array_equal(found.sizes, NEEDED)
    np.testing.assert_array_equal(found.wrong, [False, False, False, True])
    assert not found.censored.any()
    assert found.median == 5
    assert found.tried == (1, 2, 4, 8, 16, 30)


def test_nothing_is_trained_twice():
    measure = Votes()
    found = brittleness(VOTES, measure, max_size=30, random=2)
    assert len(measure.asked) == len(set(measure.asked)) == found.retrains
    shared = Votes()
    same = brittleness(np.tile(VOTES[1] + 1e-3 * np.arange(N), (4, 1)), shared, max_size=30, random=0)
    assert same.retrains == len(shared.asked) == len({len(rows) for rows, _ in shared.asked})  # one ranking, nested


def test_random_rows_need_what_their_order_says():
    found = brittleness(VOTES, Votes(), max_size=39, random=3, seed=2)
    assert found.random_sizes.shape == (3, 4)
    rng = np.random.default_rng((2, 1))
    for draw in range(3):
        order = rng.permutation(N)
        for query in range(3):
            margins = np.array([VOTES[query, order[size:]].sum() + BASE[query] for size in range(1, N)])
            expected = 1.0 + np.argmax(margins < 0) if (margins < 0).any() else np.nan
            np.testing.assert_equal(found.random_sizes[draw, query], expected)
    assert found.random_median > found.median


def test_what_is_not_flipped_is_censored_and_counted():
    found = brittleness(VOTES, Votes(), max_size=4, random=0)
    np.testing.assert_array_equal(found.censored, [True, True, False, False])
    np.testing.assert_array_equal(found.sizes, [np.nan, np.nan, 1, np.nan])
    assert found.median == np.inf
    assert "median above 4 rows, 2 not flipped by 4" in str(found) and "1 wrong" in str(found)
    assert "not least" in str(found)


def test_without_refinement_only_the_grid_is_tried():
    measure = Votes()
    found = brittleness(VOTES, measure, sizes=[2, 6, 28], refine=False, random=0)
    np.testing.assert_array_equal(found.sizes, [6, 28, 2, np.nan])
    assert {N - len(rows) for rows, _ in measure.asked} == {0, 2, 6, 28}


def test_seeds_are_averaged_before_a_flip_is_called():
    """One seed alone would call query 2 flipped, or query 0 standing; their mean is the truth."""
    measure = Votes(noise=3.0)
    found = brittleness(VOTES, measure, max_size=30, seeds=(0, 1), random=0)
    np.testing.assert_array_equal(found.sizes, NEEDED)
    assert found.retrains == len(measure.asked) and found.seeds == 2
    alone = brittleness(VOTES, Votes(noise=3.0), max_size=30, seeds=(1,), random=0)
    assert alone.wrong[2] and alone.sizes[0] == 2


def test_no_claim_is_made_between_sizes_that_were_not_tried():
    """A margin that is below zero for two rows only, on the way to eight, is missed: not the smallest there is."""

    def bumpy(rows, seed):
        removed = 20 - len(rows)
        return np.array([-1.0 if removed == 3 or removed >= 8 else 1.0])

    assert brittleness(np.arange(20.0)[None], bumpy, max_size=10, random=0).sizes[0] == 8
    assert brittleness(np.arange(20.0)[None], bumpy, sizes=range(1, 11), random=0).sizes[0] == 3


def test_a_model_that_is_wrong_everywhere_has_nothing_to_flip():
    found = brittleness(VOTES[:2], lambda rows, seed: np.array([-1.0, -2.0]), random=1)
    assert found.wrong.all() and np.isnan(found.median) and found.retrains == 1
    assert "0 queries predicted right (2 wrong" in str(found)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_size": 0}, "max_size is 0"),
        ({"max_size": N}, f"max_size is {N}; expected a whole number from 1 to {N - 1}"),
        ({"sizes": [3, 2]}, r"sizes are \[3, 2\]"),
        ({"sizes": []}, r"sizes are \[\]"),
        ({"sizes": [1, N]}, f"a size is {N}"),
        ({"sizes": [1], "max_size": 3}, "not both"),
        ({"random": -1}, "random is -1"),
        ({"seeds": ()}, "seeds is empty"),
    ],
)
def test_settings_that_mean_nothing_are_refused(options, words):
    with pytest.raises(InvalidSetting, match=words):
        brittleness(VOTES, Votes(), **options)


def test_margins_that_cannot_be_used_are_refused():
    with pytest.raises(ShapeMismatch, match=r"without 0 rows, seed 0, are \(3,\); expected \(4,\)"):
        brittleness(VOTES, lambda rows, seed: np.ones(3))
    with pytest.raises(NonFiniteValue, match=r"without 1 rows.*query 2"):
        brittleness(VOTES, lambda rows, seed: np.array([1, 1, 1 if len(rows) == N else np.nan, 1]))
    with pytest.raises(NonFiniteValue, match="query 1 and row 2"):
        brittleness([[1.0, 2, 3], [1, 2, np.nan]], Votes())
