"""What is tried on the first rows: the train loss on train rows, the measurement on query rows, and rows that reach."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import headwater as hw
from headwater.errors import UnsupportedLoss, UnsupportedModel
from headwater.torch import TorchComposableInfluence

torch.manual_seed(0)
X, Y = torch.randn(8, 4, dtype=torch.float64), torch.arange(8) % 3


def contrast(output, target):
    """One class against another: of query rows, whose targets are pairs."""
    return (output.gather(1, target[:, 1:]) - output.gather(1, target[:, :1])).mean()


def test_a_measurement_is_tried_on_query_rows_and_need_not_read_train_targets():
    model = nn.Linear(4, 3).double()
    made = TorchComposableInfluence(model, nn.CrossEntropyLoss(), hw.GradDot(), measurement=contrast)
    pairs = torch.tensor([[0, 1], [2, 0]])
    scores = made.fit([(X, Y)]).attribute([(X, Y)], [(X[:2], pairs)]).values
    slope = (nn.functional.one_hot(pairs[:, 1], 3) - nn.functional.one_hot(pairs[:, 0], 3)).double()
    query = torch.cat([(slope[:, :, None] * X[:2, None, :]).flatten(1), slope], 1)
    residual = model(X).softmax(1).detach() - nn.functional.one_hot(Y, 3)
    train = torch.cat([(residual[:, :, None] * X[:, None, :]).flatten(1), residual], 1)
    assert torch.allclose(torch.as_tensor(scores), query @ train.T)


def test_queries_that_come_before_any_train_rows_are_not_given_to_the_train_loss():
    made = TorchComposableInfluence(nn.Linear(4, 3).double(), nn.CrossEntropyLoss(), hw.GradDot(), measurement=contrast)
    provider = made.provider
    batch = provider.as_batch(X, torch.tensor([[0, 1]] * 8))
    assert provider.rows_at_once(batch) >= 8
    for rows, query in ((batch, True), (provider.as_batch(X, Y), False)):
        assert all(value.rows == 8 for value in provider.grads(rows, query=query).values())


def test_a_measurement_whose_rows_act_on_each_other_is_refused_on_query_rows():
    def spread(output, target):
        return (output - output.mean(0)).pow(2).sum()

    made = TorchComposableInfluence(nn.Linear(4, 3).double(), nn.CrossEntropyLoss(), hw.GradDot(), measurement=spread)
    fitted = made.fit([(X, Y)])
    with pytest.raises(UnsupportedLoss, match="measurement of a batch"):
        fitted.attribute([(X, Y)], [(X, Y)])


class Routed(nn.Module):
    """Rows with a positive first entry go to the first expert, the others to the second, which alone is trained."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 3), nn.Linear(4, 3)
        self.first.requires_grad_(False)

    def forward(self, x):
        there = x[:, 0] <= 0
        found = x.new_zeros(len(x), 3)
        for expert, rows in ((self.first, ~there), (self.second, there)):
            if rows.any():
                found = found.index_put((rows.nonzero()[:, 0],), expert(x[rows]))
        return found


def test_rows_that_are_routed_past_the_trained_expert_have_gradients_of_zero():
    model = Routed().double()
    x = X.clone()
    x[:, 0] = torch.tensor([1.0, 1.0, 1.0, 1.0, -1.0, 1.0, -1.0, 1.0])
    made = TorchComposableInfluence(model, nn.CrossEntropyLoss(), hw.Ekfac())
    fitted = made.fit([(x, Y)])
    scores = fitted.attribute([(x[:4], Y[:4]), (x[4:], Y[4:])], [(x[:5], Y[:5])]).values
    reached = [4, 6]
    assert (scores[4, reached] != 0).all()
    assert (scores[:, [k for k in range(8) if k not in reached]] == 0).all() and (scores[:4] == 0).all()
    with pytest.raises(UnsupportedModel, match="none of the 4 rows"):
        TorchComposableInfluence(model, nn.CrossEntropyLoss(), hw.Ekfac()).fit([(x[:4], Y[:4])])
