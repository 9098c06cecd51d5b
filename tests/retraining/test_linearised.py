"""Scores at the weights where every row counts as much as subsets keep of it forecast subsets better."""

import copy

import numpy as np
import pytest
import torch
from sklearn.datasets import load_breast_cancer
from sklearn.linear_model import LogisticRegression
from torch import nn

import headwater as hw
from headwater.errors import InvalidSetting, UnsupportedModel
from headwater.evaluate import difference, lds, plan_subsets
from headwater.torch import TorchComposableInfluence, half_weight_optimum, recentred

N, L2 = 120, 0.1
data, labels = load_breast_cancer(return_X_y=True)
data = (data - data.mean(0)) / data.std(0)
X, Y = torch.as_tensor(data[:N]), torch.as_tensor(labels[:N])
XQ, YQ = torch.as_tensor(data[N : N + 40]), torch.as_tensor(labels[N : N + 40])
LOSS = nn.CrossEntropyLoss()


def fitted(mask, share=1.0):
    """scikit-learn's minimum of share * sum of kept losses / N + l2/2 |w|^2, as two opposite halves."""
    strength = 2.0 * share / (L2 * N)
    kept = LogisticRegression(C=strength, fit_intercept=False, tol=1e-12, max_iter=1000, solver="newton-cg")
    half = torch.as_tensor(kept.fit(X[mask], Y[mask]).coef_) / 2
    model = nn.Linear(X.shape[1], 2, bias=False).double()
    model.weight.data = torch.cat([-half, half])
    return model


def losses(model):
    return nn.functional.cross_entropy(model(XQ), YQ, reduction="none").detach().numpy()


ALL = np.ones(N, dtype=bool)
MODEL = fitted(ALL)


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("size", [None, 50])
def test_it_is_the_minimum_where_rows_count_less(share, size):
    before = copy.deepcopy(MODEL.state_dict())
    found = half_weight_optimum(MODEL, LOSS, X, Y, damping=L2, share=share, batch_size=size)
    torch.testing.assert_close(found.weight, fitted(ALL, share).weight, rtol=1e-6, atol=1e-8)
    assert torch.equal(before["weight"], MODEL.weight)
    narrow = half_weight_optimum(copy.deepcopy(MODEL).float(), LOSS, X, Y, damping=L2, share=share)
    assert narrow.weight.dtype == torch.float32


def test_subsets_are_forecast_better_than_from_all_rows():
    keep = plan_subsets(N, subsets=60, repeated=0).keep
    outputs = np.stack([losses(fitted(mask)) for mask in keep])[:, None]
    optimum = half_weight_optimum(MODEL, LOSS, X, Y, damping=L2, share=0.5)
    train, query = [(X, Y)], [(XQ, YQ)]
    scores = {}
    for name, model, damping in (("all", MODEL, L2), ("best of all", MODEL, 1.5 * L2), ("half", optimum, L2 / 0.5)):
        found = TorchComposableInfluence(model, LOSS, hw.Direct("hessian"), damping=damping, blocks="full").fit(train)
        scores[name] = np.asarray(found.attribute(train, query))
    assert lds(scores["half"], keep, outputs).raw.value > 0.95
    for other in ("all", "best of all"):
        assert difference(scores["half"], scores[other], keep, outputs).low > 0


def test_where_l2_is_relative_to_the_rows_kept_the_half_weight_optimum_gains_nothing():
    """As the docstring says: it is for fits that keep each row's weight, such as scikit-learn's at one C."""
    keep = plan_subsets(N, subsets=60, repeated=0).keep
    outputs = np.stack([losses(fitted(mask, share=2.0)) for mask in keep])[:, None]
    optimum = half_weight_optimum(MODEL, LOSS, X, Y, damping=L2, share=0.5)
    scores = []
    for model, damping in ((MODEL, L2), (optimum, L2 / 0.5)):
        found = TorchComposableInfluence(model, LOSS, hw.Direct("hessian"), damping=damping, blocks="full")
        scores.append(np.asarray(found.fit([(X, Y)]).attribute([(X, Y)], [(XQ, YQ)])))
    gain = difference(scores[1], scores[0], keep, outputs)
    assert gain.low < 0 and gain.value < 0.01


def test_weights_that_are_not_at_the_minimum_are_refused():
    moved = copy.deepcopy(MODEL)
    moved.weight.data += 0.1 * torch.randn(moved.weight.shape, generator=torch.Generator().manual_seed(0))
    for model, damping in ((moved, L2), (MODEL, 2 * L2), (MODEL, 0.0)):
        with pytest.raises(UnsupportedModel, match="no minimum of mean loss"):
            half_weight_optimum(model, LOSS, X, Y, damping=damping, share=0.5)


def test_a_share_that_is_none_is_refused():
    for share in (0.0, 1.5, float("nan")):
        with pytest.raises(InvalidSetting, match="share"):
            half_weight_optimum(MODEL, LOSS, X, Y, damping=L2, share=share)


def test_the_old_name_gives_the_same_and_says_so():
    with pytest.warns(DeprecationWarning, match=r"recentred is now half_weight_optimum; the old name ends in 0\.2"):
        found = recentred(MODEL, LOSS, X, Y, damping=L2, share=0.5)
    assert torch.equal(found.weight, half_weight_optimum(MODEL, LOSS, X, Y, damping=L2).weight)
