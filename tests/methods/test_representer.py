"""Representer points: the train rows' shares add up to the query's own logit, where the loss is at its minimum."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from models import split_rows
from torch import nn
from truth import assert_close

import headwater as hw
from headwater.errors import InvalidSetting, UnsupportedModel
from headwater.gradients.ensemble import EnsembleProvider
from headwater.methods.representer import LogitQueries, Representer
from headwater.operators.algebra import IdentityOperator, ScaledOperator
from headwater.torch import TorchBatch, TorchComposableInfluence, negative_margin

L2, ROWS, QUERIES = 0.05, 11, 17
"""More queries than train rows."""


class Net(nn.Module):
    """A fixed hidden layer and a head of three classes."""

    def __init__(self, bias: bool = True):
        super().__init__()
        self.hidden = nn.Linear(4, 6)
        self.head = nn.Linear(6, 3, bias=bias)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.hidden(x))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(x))


class Linear(nn.Linear):
    """The model is its own last layer."""

    def features(self, x: torch.Tensor) -> torch.Tensor:
        return x

    @property
    def head(self) -> nn.Linear:
        return self


MODELS: dict[str, Any] = {
    "linear": (lambda: Linear(4, 3), "full"),
    "linear, without bias": (lambda: Linear(4, 3, bias=False), "full"),
    "linear, by parameter": (lambda: Linear(4, 3), "parameter"),
    "last layer": (Net, {"head": ["head"]}),
    "last layer, by parameter": (Net, {"weights": ["head.weight"], "biases": ["head.bias"]}),
    "last layer, without bias": (lambda: Net(bias=False), {"head": ["head"]}),
}


def data(rows: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 3, (rows,), generator=generator)


def train(model: Any, x: torch.Tensor, y: torch.Tensor, l2: float = L2, weights: Any = None) -> Any:
    """The head at the minimum of the weighted mean loss plus l2 / 2 |W|^2, by Newton's method."""
    head, each = model.head, torch.ones(len(y), dtype=torch.float64) if weights is None else weights
    phi = model.features(x).detach()
    start = torch.cat([p.detach().reshape(-1) for p in head.parameters()])
    size = head.weight.numel()

    def objective(flat: torch.Tensor) -> torch.Tensor:
        logits = phi @ flat[:size].reshape(3, -1).T + (flat[size:] if len(flat) > size else 0.0)
        losses = nn.functional.cross_entropy(logits, y, reduction="none")
        return (losses * each).sum() / each.sum() + l2 / 2 * flat.square().sum()

    for _ in range(20):
        slope, curvature = torch.func.grad(objective)(start), torch.func.jacrev(torch.func.grad(objective))(start)
        start = start - torch.linalg.solve(curvature, slope)
    assert slope.abs().max() < 1e-12
    with torch.no_grad():
        nn.utils.vector_to_parameters(start, head.parameters())
    return model


@cache
def trained(name: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return train(MODELS[name][0]().double().eval(), *data(ROWS, 1))


def representer(name: str, method: Any = None, seed: int = 0, **options: Any) -> TorchComposableInfluence:
    loss, method = nn.CrossEntropyLoss(), method or Representer(L2)
    return TorchComposableInfluence(trained(name, seed), loss, method, blocks=MODELS[name][1], **options)


def loader() -> list[Any]:
    return split_rows(*data(ROWS, 1), 4)


def dense_shares(model: Any, x: torch.Tensor, y: torch.Tensor, x_query: torch.Tensor, y_query: torch.Tensor) -> Any:
    """alpha_nc <phi_n, phi_q>, alpha = -(dl/dlogit) / l2, c the query's target: the paper's formula, times n."""
    with torch.no_grad():
        phi, phi_query = (model.features(v).numpy() for v in (x, x_query))
        p = model(x).softmax(1).numpy()
    if model.head.bias is not None:
        phi, phi_query = (np.append(v, np.ones((len(v), 1)), axis=1) for v in (phi, phi_query))
    alpha = (np.eye(3)[y.numpy()] - p) / L2
    return (phi_query @ phi.T) * alpha[:, y_query.numpy()].T


@pytest.mark.parametrize("name", MODELS)
def test_shares_of_the_train_rows_add_up_to_the_querys_own_logit(name: str) -> None:
    influence, queries = representer(name).fit(loader()), data(QUERIES, 2)
    assert influence.explained == "negative_logit"
    scores = influence.attribute(loader(), split_rows(*queries, 5))
    with torch.no_grad():
        logits = influence.model(queries[0])[torch.arange(QUERIES), queries[1]]
    assert np.abs(np.asarray(logits)).max() > 0.1
    assert_close(scores.values.sum(1) / scores.n_train, logits, 1e4)


@pytest.mark.parametrize("name", MODELS)
def test_scores_are_the_papers_formula(name: str) -> None:
    influence, queries, rows = representer(name).fit(loader()), data(QUERIES, 2), data(ROWS, 1)
    expected = dense_shares(influence.model, *rows, *queries)
    assert_close(influence.influences(*queries, *rows), expected)
    assert_close(influence.attribute(loader(), split_rows(*queries, 5)).values, expected)
    factors = influence.influence_factors(*queries)
    assert factors.shape == (QUERIES, influence.n_parameters)
    assert_close(influence.influences_from_factors(factors, *rows), expected)
    by_block = influence.influences_by_block(*queries, *rows)
    assert list(by_block) == influence.block_names
    assert_close(sum(by_block.values()), expected)


def test_a_row_of_the_querys_class_raises_its_logit() -> None:
    """The sign: with itself, a row's share of its own target's logit is positive."""
    influence, rows = representer("linear").fit(loader()), data(ROWS, 1)
    assert torch.diagonal(influence.influences(*rows, *rows)).min() > 0


def test_perturbing_a_train_input_changes_its_share_by_its_mixed_gradient() -> None:
    influence, queries, (x, y) = representer("last layer").fit(loader()), data(3, 2), data(ROWS, 1)
    got = influence.influences(*queries, x, y, mode="perturbation")
    step, expected = 1e-5, np.zeros(tuple(got.shape))
    for k in range(4):
        shift = step * torch.eye(4, dtype=torch.float64)[k]
        ends = [influence.influences(*queries, x + sign * shift, y).numpy() for sign in (1, -1)]
        expected[:, :, k] = (ends[0] - ends[1]) / (2 * step)
    np.testing.assert_allclose(got.numpy(), expected, rtol=0, atol=1e-7 * np.abs(expected).max())


def test_rows_count_with_their_weights() -> None:
    (x, y), queries = data(ROWS, 1), data(QUERIES, 2)
    weights = torch.tensor([1.0, 2, 1, 3, 1, 0.5, 2, 1, 0, 1, 1], dtype=torch.float64)
    torch.manual_seed(3)
    model = train(Linear(4, 3).double().eval(), x, y, weights=weights)
    batch = TorchBatch(x, y, weights)
    batches = [batch.take(slice(0, 4)), batch.take(slice(4, 11))]
    influence = TorchComposableInfluence(model, nn.CrossEntropyLoss(), Representer(L2), blocks="full").fit(batches)
    scores = influence.attribute(batches, [queries])
    assert scores.n_train == 13.5
    with torch.no_grad():
        logits = model(queries[0])[torch.arange(QUERIES), queries[1]]
    assert_close(scores.values.sum(1) / 13.5, logits, 1e4)
    with pytest.raises(InvalidSetting, match="stationary"):
        influence.fit(split_rows(x, y, 4))


def test_over_several_models_the_shares_add_up_to_the_mean_logit() -> None:
    models, queries = [trained("last layer", seed) for seed in (0, 5, 6)], data(QUERIES, 2)
    influence = representer("last layer", checkpoints=models).fit(loader())
    assert influence.block_names == ["0/head", "1/head", "2/head"]
    scores = influence.attribute(loader(), [queries])
    with torch.no_grad():
        logits = [model(queries[0])[torch.arange(QUERIES), queries[1]] for model in models]
    assert (logits[0] - logits[1]).abs().max() > 1e-2
    assert_close(scores.values.sum(1) / ROWS, sum(logits) / 3, 1e4)


def first_logit(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return output[:, 0]


def test_a_measurement_takes_the_place_of_the_logit() -> None:
    """Minus what is measured, since a measurement is better when lower."""
    influence, queries = representer("last layer", measurement=first_logit).fit(loader()), data(QUERIES, 2)
    assert influence.explained == "first_logit"
    scores = influence.attribute(loader(), [queries])
    with torch.no_grad():
        assert_close(scores.values.sum(1) / ROWS, -influence.model(queries[0])[:, 0], 1e4)


# Refusals -------------------------------------------------------------------------------------------------------------


def test_weights_that_are_not_at_the_minimum_are_refused_with_the_gap() -> None:
    influence = representer("last layer", Representer(L2 * 1.1))
    with pytest.raises(InvalidSetting, match=r"stationary at l2 = 0\.055:.*relative gap of 0\.0909 where 0\.01"):
        influence.fit(loader())
    assert not influence.is_fitted
    representer("last layer", Representer(L2 * 1.1, tolerance=0.1)).fit(loader())
    torch.manual_seed(0)
    fresh = TorchComposableInfluence(Linear(4, 3).double().eval(), nn.CrossEntropyLoss(), Representer(L2))
    with pytest.raises(InvalidSetting, match="Train on until it is, or give the l2"):
        fresh.fit(loader())


def test_each_model_of_an_ensemble_must_be_at_its_minimum() -> None:
    torch.manual_seed(8)
    stray = train(Net().double().eval(), *data(ROWS, 1), l2=2 * L2)
    with pytest.raises(InvalidSetting, match="weights of model 1 are not"):
        representer("last layer", checkpoints=[trained("last layer"), stray]).fit(loader())


@pytest.mark.parametrize(
    ("blocks", "options"),
    [("layer", {}), ({"weights": ["head.weight"]}, {}), ({"head": ["head"]}, {"measurement": negative_margin})],
    ids=["two layers", "without its bias", "a margin"],
)
def test_what_is_not_linear_in_the_attributed_parameters_is_refused(blocks: Any, options: Any) -> None:
    influence = TorchComposableInfluence(
        trained("last layer"), nn.CrossEntropyLoss(), Representer(L2), blocks=blocks, **options
    )
    with pytest.raises(UnsupportedModel, match=r"not linear in the attributed parameters.*up to 0\.\d+"):
        influence.fit(loader())


def test_settings_that_mean_nothing_are_refused() -> None:
    for wrong in (0.0, -1.0, float("inf"), float("nan"), "0.1", True):
        with pytest.raises(InvalidSetting, match="l2 is"):
            Representer(wrong)
        with pytest.raises(InvalidSetting, match="tolerance is"):
            Representer(0.1, wrong)


def test_a_share_is_no_prediction_of_removal() -> None:
    influence = representer("linear").fit(loader())
    with pytest.raises(InvalidSetting, match="only similarity"):
        influence.attribute(loader(), loader(), unit="removal")


def test_targets_without_a_logit_are_refused() -> None:
    model = nn.Linear(4, 2).double().eval()
    influence = TorchComposableInfluence(model, nn.MSELoss(), Representer(L2))
    with pytest.raises(UnsupportedModel, match="no logit"):
        influence.fit([(data(5, 0)[0], torch.ones(5, 2, dtype=torch.float64))])


# What these tests must notice -----------------------------------------------------------------------------------------


def law_of_sums() -> None:
    for name in ("linear", "last layer, by parameter"):
        test_shares_of_the_train_rows_add_up_to_the_querys_own_logit(name)


def law_of_the_formula() -> None:
    test_scores_are_the_papers_formula("last layer")


def law_of_ensembles() -> None:
    test_over_several_models_the_shares_add_up_to_the_mean_logit()


LAWS = (law_of_sums, law_of_the_formula, law_of_ensembles)


@contextmanager
def queries_keep_their_loss() -> Iterator[None]:
    with patch.object(LogitQueries, "_for", lambda self, query: self.plain), without_checks():
        yield


@contextmanager
def train_rows_are_seen_by_their_logit_too() -> Iterator[None]:
    with patch.object(LogitQueries, "_for", lambda self, query: self.logits), without_checks():
        yield


@contextmanager
def without_checks() -> Iterator[None]:
    def nothing(*given: Any) -> None:
        pass

    with patch.object(Representer, "check_linear", nothing), patch.object(Representer, "_check_stationary", nothing):
        yield


def _operators(factor: Any) -> Any:
    fit = Representer.fit

    def wrong(self: Any, provider: Any, loader: Any, progress: bool) -> Any:
        found, rows = fit(self, provider, loader, progress)
        operators = [
            (name, ScaledOperator(factor(self.l2), IdentityOperator(op.input_size))) for name, op in found.items()
        ]
        return type(found)(operators), rows

    return lambda: patch.object(Representer, "fit", wrong)


MUTANTS = {
    "queries keep their loss": queries_keep_their_loss,
    "train rows are seen by their logit too": train_rows_are_seen_by_their_logit_too,
    "l2 multiplies": _operators(lambda l2: l2),
    "l2 counts twice": _operators(lambda l2: 1 / (2 * l2)),
    "the sign is the other": _operators(lambda l2: -1 / l2),
    "an ensemble drops its members' weights": lambda: patch.object(
        EnsembleProvider, "block_scale", lambda self, block: 1.0
    ),
}


def test_damping_has_no_meaning() -> None:
    influence, rows = representer("linear").fit(loader()), data(ROWS, 1)
    assert_close(influence.with_damping(hw.relative(1.0)).influences(*rows), influence.influences(*rows))
