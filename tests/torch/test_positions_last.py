"""What convolutions see is kept as it lies in memory: the same numbers, and no copy of it for sums or dense rows."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from headwater import arrays
from headwater.arrays import gram_by_rows, is_positions_last
from headwater.gradients import outer
from headwater.gradients.outer import Outer
from headwater.torch.layers import patches

torch.manual_seed(0)


def positions_last(n: int, t: int, i: int) -> torch.Tensor:
    return torch.randn(n, i, t, dtype=torch.float64).transpose(1, 2)


@pytest.mark.parametrize("size", [3, 130])
@pytest.mark.parametrize("weights", [None, (4, 1, 1), (4, 50, 1)])
def test_moments_are_the_same_whichever_way_positions_lie(size: int, weights: tuple[int, ...] | None) -> None:
    rows = positions_last(4, 50, size)
    counted = None if weights is None else torch.rand(weights, dtype=torch.float64)
    weighted = rows if counted is None else rows * counted
    expected = weighted.reshape(-1, size).T @ rows.reshape(-1, size)
    torch.testing.assert_close(gram_by_rows(rows, counted), expected, rtol=1e-12, atol=1e-12)


def test_only_large_sums_of_positions_last_are_taken_row_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, ...]] = []

    def counted(rows: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
        calls.append(tuple(rows.shape))
        return arrays.gram_by_rows(rows, weights)

    monkeypatch.setattr(outer, "gram_by_rows", counted)
    for rows in (positions_last(3, 64, 128), positions_last(3, 2, 8), positions_last(3, 64, 128).contiguous()):
        b = torch.randn(3, rows.shape[1], 2, dtype=torch.float64)
        found = Outer(rows, b, ones=True).moments()
        plain = Outer(rows.contiguous(), b, ones=True).moments()
        torch.testing.assert_close(found.right, plain.right, rtol=1e-12, atol=1e-12)
    assert calls == [(3, 64, 128)]


@pytest.mark.parametrize("outputs", [2, 9, 40])
def test_the_bias_column_is_that_of_inputs_with_a_one(outputs: int) -> None:
    value = Outer(positions_last(5, 9, 4), torch.randn(5, 9, outputs, dtype=torch.float64), ones=True)
    full = value.bordered()
    torch.testing.assert_close(value.dense(), full.b.transpose(1, 2) @ full.a, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"stride": 2}, {"padding": 1, "dilation": 2}, {"padding": "same"}])
def test_patches_times_the_weight_are_the_convolution(options: dict) -> None:
    layer = nn.Conv2d(3, 4, (3, 5), **options).double()
    x = torch.randn(2, 3, 9, 11, dtype=torch.float64)
    seen = patches(layer, x)
    assert is_positions_last(seen)
    out = seen @ layer.weight.reshape(4, -1).T + layer.bias
    torch.testing.assert_close(out.transpose(1, 2), layer(x).flatten(2), rtol=1e-12, atol=1e-12)
