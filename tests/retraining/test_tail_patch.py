"""The tail patch: on a linear model a step is known in closed form, and grad-dot wins by construction."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from headwater.errors import InvalidInput, InvalidSetting, NonFiniteValue, ShapeMismatch, UnsupportedModel
from headwater.evaluate.patching import tail_patch
from headwater.retraining.torch.tail_patch import gradient_step

RNG = np.random.default_rng(0)
N, Q, D, LR = 50, 30, 6, 0.01
X, Y = RNG.standard_normal((N, D)), RNG.standard_normal(N)
X_QUERY, Y_QUERY = RNG.standard_normal((Q, D)), RNG.standard_normal(Q)
W = RNG.standard_normal(D)
GRAD_DOT = ((X_QUERY @ W - Y_QUERY)[:, None] * X_QUERY) @ ((X @ W - Y)[:, None] * X).T


def patch(rows):
    """Half of squared errors, after a step on their mean over the rows."""
    w = W - (LR * ((X[rows] @ W - Y[rows])[:, None] * X[rows]).mean(axis=0) if len(rows) else 0.0)
    return 0.5 * (X_QUERY @ w - Y_QUERY) ** 2


def linear():
    model = nn.Linear(D, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.from_numpy(W)[None])
    return model


def half_square(output, target):
    return 0.5 * (output - target) ** 2


def test_figures_are_those_of_steps_by_hand():
    found = tail_patch(GRAD_DOT, patch, 4, random=3, seed=2)
    order = np.argsort(-GRAD_DOT, axis=1)
    by_hand = [patch(order[q, :4])[q] - patch([])[q] for q in range(Q)]
    np.testing.assert_allclose(found.by_query, by_hand)
    assert found.change.value == pytest.approx(np.mean(by_hand))
    assert found.difference.value == pytest.approx(np.mean(by_hand) - found.random_by_query.mean())
    rng = np.random.default_rng((2, 1))
    chance = [patch(rng.choice(N, size=4, replace=False)) - patch([]) for _ in range(3)]
    np.testing.assert_allclose(found.random_by_query, np.mean(chance, axis=0))


def test_grad_dot_lowers_losses_more_than_chance_and_its_reverse_raises_them():
    best, worst = tail_patch(GRAD_DOT, patch, 3), tail_patch(-GRAD_DOT, patch, 3)
    assert best.change.high < 0 and best.difference.high < 0
    assert worst.change.low > 0 and worst.difference.low > 0
    assert "grad-dot by construction" in str(best)


def test_no_scores_choose_better_than_grad_dot_for_a_small_step():
    """The construction itself: to first order the change is minus lr times the mean of grad-dot's scores."""
    found = tail_patch(GRAD_DOT, patch, 3)
    top = np.sort(GRAD_DOT, axis=1)[:, -3:].mean(axis=1)
    np.testing.assert_allclose(found.by_query, -LR * top, atol=0.1 * LR * np.abs(top).max())


def test_random_scores_choose_no_better_than_chance():
    found = tail_patch(RNG.standard_normal((Q, N)), patch, 5, random=10)
    assert found.difference.low < 0 < found.difference.high


def test_queries_with_the_same_rows_share_a_step():
    asked = []

    def counted(rows):
        asked.append(tuple(rows))
        return patch(rows)

    found = tail_patch(np.tile(GRAD_DOT[0], (Q, 1)), counted, 4, random=2)
    assert len(asked) == 1 + 1 + 2 and asked[0] == () and found.steps == 3


def test_outputs_and_settings_that_mean_nothing_are_refused():
    for k in (0, N + 1, True):
        with pytest.raises(InvalidSetting, match=f"k is {k}; expected a whole number from 1 to {N}"):
            tail_patch(GRAD_DOT, patch, k)
    with pytest.raises(InvalidSetting, match="random is 1"):
        tail_patch(GRAD_DOT, patch, 3, random=1)
    with pytest.raises(ShapeMismatch, match=r"without a step are \(2,\); expected \(30,\)"):
        tail_patch(GRAD_DOT, lambda rows: np.ones(2), 3)
    with pytest.raises(NonFiniteValue, match="rows of query 0 are not finite, the first that of query 0"):
        tail_patch(GRAD_DOT, lambda rows: np.full(Q, np.nan if len(rows) else 1.0), 3)
    with pytest.raises(NonFiniteValue, match="query 0 and row 0"):
        tail_patch(np.full((Q, N), np.nan), patch, 3)


# Of a torch model -----------------------------------------------------------------------------------------------------


def of_torch(**options):
    return gradient_step(linear(), half_square, X, Y[:, None], X_QUERY, Y_QUERY[:, None], **({"lr": LR} | options))


def test_a_torch_step_is_the_closed_form():
    step = of_torch(batch_size=7)
    for rows in ([], [3], [0, 4, 9, 11], np.arange(N)):
        np.testing.assert_allclose(step(np.array(rows, dtype=int)), patch(rows), rtol=1e-12)
    twice = W.copy()
    for _ in range(2):
        twice -= LR * ((X[:5] @ twice - Y[:5])[:, None] * X[:5]).mean(axis=0)
    np.testing.assert_allclose(of_torch(steps=2)(np.arange(5)), 0.5 * (X_QUERY @ twice - Y_QUERY) ** 2, rtol=1e-12)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_a_step_is_that_of_sgd_and_every_call_starts_anew(reduction):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    labels, asked = torch.arange(N) % 3, torch.arange(Q) % 3
    loss = nn.CrossEntropyLoss(reduction=reduction)
    step = gradient_step(model, loss, X, labels, X_QUERY, asked, lr=0.3)
    with torch.no_grad():  # no_grad around the call does not stop the step
        found = [step(rows) for rows in (np.array([1, 2, 30]), np.array([8]), np.array([1, 2, 30]))]
    np.testing.assert_array_equal(found[0], found[2])
    other = copy.deepcopy(model)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.3)
    nn.functional.cross_entropy(other(torch.from_numpy(X[[1, 2, 30]])), labels[[1, 2, 30]]).backward()
    optimizer.step()
    expected = nn.functional.cross_entropy(other(torch.from_numpy(X_QUERY)), asked, reduction="none")
    np.testing.assert_allclose(found[0], expected.detach(), rtol=1e-12)
    assert np.abs(found[0] - found[1]).max() > 1e-3


def test_the_users_model_is_never_changed_and_the_step_keeps_its_own():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1)).double().train()
    model[0].bias.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    step = gradient_step(model, nn.MSELoss(), X, Y[:, None], X_QUERY, Y_QUERY[:, None], lr=0.1)
    first = step(np.arange(10))
    assert model.training and all(p.grad is None for p in model.parameters())
    assert not model[0].bias.requires_grad
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert np.abs(first - step(np.arange(0))).max() > 1e-4
    with torch.no_grad():
        model[0].weight.zero_()
    np.testing.assert_array_equal(step(np.arange(10)), first)


def test_frozen_parameters_stay_and_tied_ones_move_together():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(D, D, bias=False), nn.Linear(D, D, bias=False)
            self.second.weight = self.first.weight
            self.scale = nn.Parameter(torch.tensor(2.0), requires_grad=False)

        def forward(self, x):
            return self.scale * self.second(torch.tanh(self.first(x)))

    torch.manual_seed(0)
    model = Tied().double()
    step = gradient_step(model, nn.MSELoss(), X, X, X_QUERY, X_QUERY, lr=0.2)
    other = copy.deepcopy(model)
    nn.functional.mse_loss(other(torch.from_numpy(X[:9])), torch.from_numpy(X[:9])).backward()
    torch.optim.SGD([p for p in other.parameters() if p.requires_grad], lr=0.2).step()
    asked = torch.from_numpy(X_QUERY)
    np.testing.assert_allclose(step(np.arange(9)), ((other(asked) - asked) ** 2).mean(dim=1).detach(), rtol=1e-12)


def test_a_torch_patch_is_measured():
    found = tail_patch(GRAD_DOT, of_torch(), 4)
    np.testing.assert_allclose(found.by_query, tail_patch(GRAD_DOT, patch, 4).by_query, rtol=1e-8)


def test_steps_that_mean_nothing_are_refused():
    for options, words in (({"lr": 0.0}, r"lr is 0\.0"), ({"lr": np.nan}, "lr is nan"), ({"steps": 0}, "steps is 0")):
        with pytest.raises(InvalidSetting, match=words):
            of_torch(**options)
    with pytest.raises(InvalidInput, match=f"from 0 to {N}; there are {N}"):
        of_torch()([0, N])
    with pytest.raises(InvalidInput, match="positions of rows"):
        of_torch()([0.0, 1.0])
    with pytest.raises(NonFiniteValue, match=r"query 0 is .* after 60 steps of lr 1000000\.0"):
        of_torch(lr=1e6, steps=60)(np.arange(N))
    with pytest.raises(UnsupportedModel, match="nothing to step"):
        gradient_step(linear().requires_grad_(False), half_square, X, Y[:, None], X_QUERY, Y_QUERY[:, None], lr=LR)
