"""Are mistakes mended by leaving out the rows blamed for them? On a mean, where the answer is arithmetic."""

import numpy as np
import pytest

from headwater.errors import BatchMismatch, InvalidInput, InvalidSetting, ShapeMismatch
from headwater.evaluate import Bank, left_out, plan_left_out

VALUES = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 20.0])
TARGETS = np.array([3.0, 30.0, 4.0])


def losses(rows, seed):
    """Of a model that is the rows' mean, plus what the seed draws."""
    return (VALUES[rows].mean() + 0.01 * np.random.default_rng(seed).normal() - TARGETS) ** 2


def scores():
    """To first order: what each row does to the loss by being there."""
    mean = VALUES.mean()
    return -2 * (mean - TARGETS)[:, None] * (VALUES - mean)[None] / len(VALUES)


def test_what_is_left_out_is_what_is_blamed_and_the_fall_is_measured(tmp_path):
    plan = plan_left_out(scores(), [0, 2], 1, runs=3, seed=4)
    assert plan.keep.shape == (5, 8) and plan.keep[0].all() and (~plan.keep[1:]).sum(1).tolist() == [1, 1, 1, 1]
    assert not plan.keep[1, 7] and not plan.keep[2, 7]  # 20 draws the mean away from 3 and 4
    _, outputs = Bank(tmp_path / "bank", plan, 3, {}).fill(losses)
    found = left_out(scores(), [0, 2], 1, outputs)
    want = [(6 - 3) ** 2 - (4 - 3) ** 2, (6 - 4) ** 2 - (4 - 4) ** 2]
    np.testing.assert_allclose(found.measured, want, atol=0.2)
    np.testing.assert_allclose(found.foretold, [2 * 3 * 14 / 8, 2 * 2 * 14 / 8])
    assert found.before.shape == found.without.shape == found.at_random.shape == (3, 2)
    assert found.before.mean() > found.at_random.mean() - 4 and found.without.mean() < found.before.mean()
    assert found.correlation == pytest.approx(1.0)
    assert "the 1 rows blamed" in str(found) and "Foretold: a fall of 8.75" in str(found)


def test_what_does_not_fit_is_refused():
    with pytest.raises(BatchMismatch, match="more than once"):
        plan_left_out(scores(), [1, 1], 1)
    with pytest.raises(InvalidInput, match="there are 3"):
        plan_left_out(scores(), [3], 1)
    with pytest.raises(InvalidSetting, match="k is 0"):
        plan_left_out(scores(), [1], 0)
    with pytest.raises(InvalidSetting, match="k is 8"):
        plan_left_out(scores(), [1], 8)
    with pytest.raises(ShapeMismatch, match=r"expected \(3, runs, 3\)"):
        left_out(scores(), [1], 1, np.zeros((4, 1, 3)))
