"""Products of a Hessian that are kept linearised are the plain ones, cost one pass of the model, and leave nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import headwater as hw
from headwater.arrays import working_memory
from headwater.curvature.products import SHARED_VECTORS, CurvatureOperator, fit_products
from headwater.errors import UnsupportedModel
from headwater.operators.krylov import extreme_eigenvalues, leading_eigenpairs
from headwater.operators.sketch import normal_vectors
from headwater.rows import Rows
from headwater.torch import TorchBatch, TorchComposableInfluence
from headwater.torch.provider import TorchGradientProvider

torch.manual_seed(0)
X, Y = torch.randn(30, 5, dtype=torch.float64), torch.arange(30) % 3
CE = nn.CrossEntropyLoss()


def model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 3)).double()


def rows(weighted: bool = False) -> list[TorchBatch]:
    weights = torch.linspace(0.5, 2.0, 30, dtype=torch.float64) if weighted else None
    return [
        TorchBatch(X[s], Y[s], None if weights is None else weights[s])
        for s in (slice(0, 12), slice(12, 25), slice(25, 30))
    ]


def operators(net: nn.Module, loader: Any, blocks: Any = "layer") -> dict[str, CurvatureOperator]:
    return dict(fit_products(TorchGradientProvider(net, CE, blocks=blocks), loader, "hessian")[0])


class Calls:
    """How often a model is called."""

    def __init__(self, net: nn.Module):
        self.count = 0
        net.register_forward_pre_hook(self._called)

    def _called(self, *_: object) -> None:
        self.count += 1

    def during(self, action: Any) -> int:
        before = self.count
        action()
        return self.count - before


@pytest.mark.parametrize("weighted", [False, True])
def test_products_that_are_kept_are_the_plain_ones(weighted: bool) -> None:
    for operator in operators(model(), rows(weighted)).values():
        for count in (1, 3, SHARED_VECTORS, SHARED_VECTORS + 1):
            vectors = normal_vectors(count, operator.input_size, X, seed=count)
            plain = operator.apply(vectors)
            with operator.repeated():
                found = [operator.apply(vectors) for _ in range(3)]
            for product in found:
                torch.testing.assert_close(product, plain, rtol=1e-12, atol=1e-13)


def test_the_model_runs_once_for_all_products_of_a_solve() -> None:
    net = model()
    operator = operators(net, rows(), "full")["full"]
    calls, vector = Calls(net), normal_vectors(1, operator.input_size, X, seed=0)
    operator.apply(vector)  # the first rows are looked at more closely
    plain = calls.during(lambda: operator.apply(vector))
    assert plain >= 1

    def solve() -> None:
        with operator.repeated():
            for _ in range(5):
                operator.apply(vector)

    assert calls.during(solve) == plain
    assert calls.during(lambda: extreme_eigenvalues(operator, vector)) == plain


def test_what_has_no_room_is_not_kept_and_nothing_else_changes() -> None:
    net = model()
    operator = operators(net, rows(), "full")["full"]
    vector = normal_vectors(2, operator.input_size, X, seed=0)
    plain = operator.apply(vector)
    with working_memory(256), operator.repeated():
        for _ in range(2):
            torch.testing.assert_close(operator.apply(vector), plain, rtol=1e-12, atol=1e-13)
            assert operator.source._repeated.rows is None


def test_after_a_solve_nothing_is_held_and_new_weights_have_new_products() -> None:
    net = model().train()
    operator = operators(net, rows(), "full")["full"]
    vector = normal_vectors(1, operator.input_size, X, seed=0)
    with operator.repeated():
        before = operator.apply(vector)
        assert sum(held.linearised.size for held in operator.source._repeated.rows or () if held.linearised) > 0
    assert operator.source._repeated.rows is None
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(1.5)
    plain = operator.apply(vector)
    with operator.repeated():
        after = operator.apply(vector)
    torch.testing.assert_close(after, plain, rtol=1e-12, atol=1e-13)
    assert not torch.allclose(after, before, rtol=0.1)
    assert net.training and all(p.grad is None and p.requires_grad for p in net.parameters())


def test_what_is_kept_goes_when_a_product_fails() -> None:
    operator = operators(model(), rows(), "full")["full"]
    with pytest.raises(RuntimeError, match="stop"), operator.repeated():
        operator.apply(operator.start)
        raise RuntimeError("stop")
    assert operator.source._repeated.rows is None and operator.source._repeated.block is None


def test_rows_that_are_visited_elsewhere_are_not_kept() -> None:
    provider = TorchGradientProvider(model(), CE)
    loader = Rows(provider, rows(), runner=lambda visitor, read, label: visitor.of(next(iter(read()))))
    operator = fit_products(provider, loader, "hessian")[0]["full"]
    with operator.repeated():
        operator.apply(operator.start)
        assert operator.source._repeated.rows is None


def test_a_model_without_a_second_derivative_is_refused_the_same_way() -> None:
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x * 2

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            return grad * 2

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(5, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return Once.apply(self.fc(x))

    operator = operators(Net().double(), rows(), "full")["full"]
    with pytest.raises(UnsupportedModel, match="second derivative"), operator.repeated():
        operator.apply(operator.start)


@pytest.mark.parametrize("block", [1, 2, 4])
def test_eigenpairs_are_those_of_the_dense_hessian_whatever_the_block(block: int) -> None:
    operator = operators(model(), rows(), "full")["full"]
    dense = operator.dense(X).numpy()
    truth = np.linalg.eigvalsh((dense + dense.T) / 2)
    truth = truth[np.argsort(-np.abs(truth))][:6]
    start = normal_vectors(block, operator.input_size, X, seed=3)
    found = leading_eigenpairs(operator, start, 6, tolerance=1e-9, max_products=200)
    np.testing.assert_allclose(sorted(found.values.tolist()), sorted(truth), rtol=1e-9)


@pytest.mark.parametrize(
    "method",
    [hw.Cg(curvature="hessian"), hw.Arnoldi(rank=4, curvature="hessian", allow_indefinite=True)],
    ids=["cg", "arnoldi"],
)
def test_absolute_damping_asks_for_no_trace_of_a_hessian(method: Any) -> None:
    influence = TorchComposableInfluence(model(), CE, method=method, damping=3.0, blocks="full").fit(rows())
    influence.attribute(rows(), [(X[:4], Y[:4])])
    operator = influence.curvature["full"].acts_as
    assert operator.known_trace is None
    assert influence.status.blocks["full"].mean_eigenvalue == operator.trace() / operator.input_size
