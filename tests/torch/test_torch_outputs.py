"""What a provider says of a row's output: its losses, its own GGN in one gradient per output, margins and logits."""

import models
import oracle
import pytest
import torch
from torch import nn
from truth import assert_close

from headwater.errors import UnsupportedModel
from headwater.torch import TorchBatch, TorchGradientProvider, negative_logit, negative_margin

CASES = ("mlp", "images", "signals", "sentences")


def provider_of(case, loss=None):
    return TorchGradientProvider(case.model, loss or case.loss, blocks="full")


@pytest.mark.parametrize("known", [True, False], ids=["likelihood known", "any loss"])
@pytest.mark.parametrize("name", CASES)
def test_the_gradients_of_the_outputs_sum_to_the_ggn(name, known):
    case = models.CASES[name]()
    loss = case.loss if known else lambda output, target: case.loss(output, target)
    draws = provider_of(case, loss).ggn_grads(TorchBatch(case.x, case.y))
    flat = [draw["full"].flat() for draw in draws]
    expected = oracle.ggn(case.model, case.loss, case.x, case.y, oracle.trainable(case.model))
    assert_close(sum(g.T @ g for g in flat) / len(case.y), expected)


def test_a_loss_that_is_not_convex_in_its_output_has_no_such_gradients():
    case = models.CASES["signals"]()
    assert provider_of(case, lambda o, t: (o - t).abs().sqrt()).ggn_grads(TorchBatch(case.x, case.y)) is None


def test_a_row_of_many_outputs_has_none_either():
    model = nn.Linear(2, 65).double()
    batch = TorchBatch(torch.ones(3, 2, dtype=torch.float64), torch.zeros(3, 65, dtype=torch.float64))
    assert TorchGradientProvider(model, nn.MSELoss()).ggn_grads(batch) is None


@pytest.mark.parametrize("name", CASES)
def test_losses_are_those_of_rows_alone(name):
    case = models.CASES[name]()
    expected = [float(oracle.row_loss(case.model, case.loss, case.x, case.y, k).detach()) for k in range(len(case.y))]
    assert_close(provider_of(case).losses(TorchBatch(case.x, case.y)), expected)


@pytest.mark.parametrize("name", ["mlp", "sentences"])
def test_margin_is_the_log_odds_and_logit_the_output_of_the_target(name):
    case = models.CASES[name]()
    batch, provider = TorchBatch(case.x, case.y), provider_of(case)
    p = (-provider.losses(batch)).exp()
    margins = provider.of_output("margin")
    assert_close(margins.losses(batch), -(p / (1 - p)).log())
    assert_close(torch.sigmoid(margins.losses(batch))[:, None] * margins.flat_grads(batch), provider.flat_grads(batch))
    model = case.model(case.x) if isinstance(case.x, torch.Tensor) else case.model(**case.x)
    assert_close(provider.of_output("logit").losses(batch), -model[range(len(case.y)), case.y])


def test_one_logit_a_row_has_a_margin_too():
    logits, target = torch.tensor([[0.5], [-2.0]]), torch.tensor([1, 0])
    for function in (negative_margin, negative_logit):
        assert function(logits, target).tolist() == function(logits[:, 0], target).tolist() == [-0.5, -2.0]


@pytest.mark.parametrize("function", [negative_margin, negative_logit])
def test_outputs_without_a_margin_are_refused(function):
    with pytest.raises(UnsupportedModel, match=r"\(2, 3, 4\)"):
        function(torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.long))


def test_parameters_are_in_the_order_of_flat_gradients():
    case = models.CASES["images"]()
    expected = torch.cat([p.reshape(-1) for p in case.model.parameters()])
    assert_close(provider_of(case).parameters("full"), expected.detach())
