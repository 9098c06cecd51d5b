"""EKFAC whose basis is from a part of the rows: the same part whatever the batches, and the right numbers for it."""

import numpy as np
import pytest
import torch
from torch import nn

import headwater as hw
from headwater.errors import InvalidSetting
from headwater.random import row_uniforms

ROWS, SHARE, DAMPING = 60, 0.4, 0.02
torch.manual_seed(0)
X, Y = torch.randn(ROWS, 5, dtype=torch.float64), torch.arange(ROWS) % 3
IDS = torch.arange(ROWS) + 1000
MODEL = nn.Linear(5, 3, bias=False).double()


def fitted(size=ROWS, order=slice(None), method=None, model=MODEL, weights=None):
    columns = [X[order], Y[order], IDS[order], torch.ones(ROWS) if weights is None else weights[order]]
    batches = [
        hw.Batch(x, y, ids=ids, weights=w)
        for x, y, ids, w in zip(*(column.split(size) for column in columns), strict=True)
    ]
    method = method or hw.Ekfac(fisher="empirical", basis_share=SHARE)
    return hw.Influence(model, "cross_entropy", method, damping=DAMPING).fit(batches)


def scores(influence):
    return np.asarray(influence.attribute((X, Y), (X[:7] + 0.1, Y[:7])))


def test_the_basis_is_of_the_chosen_rows_and_the_spectrum_of_all():
    """In NumPy, from the definition: softmax regression, whose gradient is (p - e) x^T."""
    x, y, w = X.numpy(), Y.numpy(), MODEL.weight.detach().numpy()
    weights = torch.rand(ROWS, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.5
    v = weights.numpy()

    def grads(x, y):
        z = np.exp(x @ w.T - (x @ w.T).max(1, keepdims=True))
        return z / z.sum(1, keepdims=True) - np.eye(3)[y]

    b, keys = grads(x, y), IDS.numpy().astype(np.uint64)
    some = row_uniforms(keys, 1, draw=1 << 23, seed=0)[:, 0, 0] < SHARE
    assert 10 < some.sum() < 50
    left = np.linalg.eigh(np.einsum("n,ni,nj->ij", v[some], b[some], b[some]))[1]
    right = np.linalg.eigh(np.einsum("n,ni,nj->ij", v[some], x[some], x[some]))[1]
    spectrum = np.einsum("n,ni,nj->ij", v, (b @ left) ** 2, (x @ right) ** 2) / v.sum()
    q = np.einsum("ni,nj->nij", grads(x[:7] + 0.1, y[:7]), x[:7] + 0.1)
    solved = left @ ((left.T @ q @ right) / (spectrum + DAMPING)) @ right.T
    expected = np.einsum("qij,ni,nj->qn", solved, b, x)
    np.testing.assert_allclose(scores(fitted(weights=weights)), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("fisher", ["empirical", "sampled"])
def test_batches_and_the_order_of_rows_change_nothing(fisher):
    method = hw.Ekfac(fisher=fisher, basis_share=SHARE)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    expected = scores(fitted(method=method, model=model))
    shuffled = torch.randperm(ROWS, generator=torch.Generator().manual_seed(2))
    for size, order in ((1, slice(None)), (7, slice(None)), (16, shuffled)):
        found = scores(fitted(size, order, method, model))
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-10 * np.abs(expected).max())
    assert np.abs(scores(fitted(method=hw.Ekfac(fisher=fisher), model=model)) - expected).max() > 1e-6


def test_a_share_of_nearly_all_is_all():
    whole = scores(fitted(method=hw.Ekfac(fisher="empirical")))
    np.testing.assert_array_equal(scores(fitted(method=hw.Ekfac(fisher="empirical", basis_share=1 - 1e-12))), whole)


def test_the_model_runs_for_the_chosen_rows_only(monkeypatch):
    seen = []
    forward = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: seen.append(len(x)) or forward(self, x))
    counts = []
    for share in (1.0, SHARE):
        seen.clear()
        fitted(20, method=hw.Ekfac(fisher="empirical", basis_share=share))
        counts.append(sum(seen))
    assert counts[0] - counts[1] > 0.4 * ROWS  # of the 60 rows of the first pass, 36 or so are left out


@pytest.mark.parametrize("share", [0, -0.1, 1.5, float("nan"), "0.5", None])
def test_a_share_that_means_nothing_is_refused(share):
    with pytest.raises(InvalidSetting, match="basis_share"):
        hw.Ekfac(basis_share=share)


def test_a_share_that_chooses_no_row_is_refused():
    with pytest.raises(InvalidSetting, match="chose none of the rows"):
        fitted(method=hw.Ekfac(basis_share=1e-9))


def test_chosen_rows_of_no_weight_are_none():
    numbers = row_uniforms(IDS.numpy().astype(np.uint64), 1, draw=1 << 23, seed=0)[:, 0, 0]
    with pytest.raises(InvalidSetting, match="chose none of the rows"):
        fitted(weights=torch.as_tensor(numbers >= SHARE, dtype=torch.float64))
