"""What stands for a null space of EKFAC's factors: rounding alone, in either precision and any cut into batches."""

import numpy as np
import pytest
import torch
from torch import nn

import headwater as hw

ROWS, INPUTS = 40, 64
"""Fewer rows than inputs, so that a factor has a null space that rounding turns."""


def scores(dtype, size, fisher):
    random = torch.Generator().manual_seed(1)
    # Down to a thousandth: directions that are small and known, beside those that are not there.
    x = torch.randn(ROWS, INPUTS, generator=random) @ torch.diag(torch.logspace(0, -3, INPUTS))
    y = torch.randint(0, 10, (ROWS,), generator=random)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(INPUTS, 32), nn.GELU(), nn.Linear(32, 10)).to(dtype)
    x = x.to(dtype)
    train = list(zip(x.split(size), y.split(size), strict=True))
    influence = hw.Influence(model, "cross_entropy", hw.Ekfac(fisher=fisher), damping=hw.relative(0.003)).fit(train)
    return np.asarray(influence.attribute(train, (x[:9] + 0.1, y[:9])), dtype=np.float64)


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_float32_scores_are_those_of_float64_whatever_the_batches(fisher):
    exact = scores(torch.float64, ROWS, fisher)
    for dtype, size, allowed in ((torch.float64, 7, 1e-10), (torch.float32, ROWS, 1e-4), (torch.float32, 7, 1e-4)):
        found = scores(dtype, size, fisher)
        assert np.abs(found - exact).max() <= allowed * np.abs(exact).max(), (dtype, size)
