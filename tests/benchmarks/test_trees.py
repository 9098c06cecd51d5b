"""The gate of attribution by refits, small: it reaches what its refits allow, and beats the rows' own losses."""

import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def trees():
    sys.path.insert(0, str(FOLDER))
    import trees

    yield trees
    sys.path.remove(str(FOLDER))


def test_boosted_trees_reach_what_their_refits_allow_and_beat_the_rows_own_losses(trees, tmp_path):
    task = trees.Task(trees.load_diabetes, trees.GradientBoostingRegressor(n_estimators=8, max_depth=2, subsample=0.8))
    bank = trees.bank_of(tmp_path, task, 120, 40, n=30, queries=20)
    (half, whole), linear = trees.judged(bank, 40, trees.own_losses(task, 30, 20), ("ridge",))
    assert (half.refits, whole.refits) == (60, 120)
    assert half.allowed < whole.allowed < linear
    assert half.lds.high > half.allowed and whole.lds.high > whole.allowed > 0.4
    assert whole.over_loss.low > 0.1
