"""What surely does not fit into memory is refused before it is allocated, naming block, shape, GB and remedy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from test_solvers import F64, normal, with_spectrum
from torch import nn

import headwater as hw
from headwater import memory
from headwater.curvature import kronecker
from headwater.curvature.products import fit_products
from headwater.errors import InvalidSetting
from headwater.methods.base import Method
from headwater.operators.algebra import IdentityOperator
from headwater.operators.cg import ConjugateGradient
from headwater.operators.iterative import IterativeInverse
from headwater.operators.sketch import sign_vectors
from headwater.torch import TorchComposableInfluence


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A machine with so many bytes."""

    def have(size: float) -> None:
        monkeypatch.setattr(memory, "WORTH_A_LOOK", 0)
        monkeypatch.setattr(memory, "available_memory", lambda: size)

    return have


def influence_of(method: Method, blocks: Any = "layer", *, outputs: int = 30) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, outputs)).double()
    x, y = torch.randn(40, 6, dtype=F64), torch.randint(outputs, (40,))
    return TorchComposableInfluence(model, nn.CrossEntropyLoss(), method, blocks=blocks, damping=0.1), x, y


NEEDED: dict[str, tuple[Method, float, str]] = {
    # The largest thing that each must hold, in bytes, and how it is named.
    "Kfac": (hw.Kfac(), 30**2 * 8.0, r"Kronecker factors .*block '2', of shape \[30, 30\]"),
    "Ekfac": (hw.Ekfac(), 30**2 * 8.0, r"Kronecker factors .*block '2', of shape \[30, 30\]"),
    "Cg": (hw.Cg(preconditioner="ekfac"), 30**2 * 8.0, r"Kronecker factors .*'nystroem' or None"),
    "Direct": (hw.Direct(), 270**2 * 8.0, r"dense curvature .*block '2', of shape \[270, 270\].*Ekfac"),
    "Dual": (hw.Dual(), 40**2 * 8.0, r"Gram matrices .*of shape \[40, 40\].*fewer rows"),
    "Trak": (hw.Trak(50), 50**2 * 8.0, r"second moments .*block '0', of shape \[50, 50\].*smaller dimension"),
    "LoGra": (hw.LoGra(5), 25**2 * 8.0, r"second moments .*of shape \[25, 25\].*smaller dimension"),
    "Nystroem": (hw.Nystroem(rank=20), 270 * 20 * 8.0, r"sketch from vectors of shape \[20, 270\].*lower rank"),
    "Arnoldi": (hw.Arnoldi(rank=20), 270 * 20 * 8.0, r"Block '2': eigenpairs .*\[20, 270\].*lower rank"),
    "diagonal": (hw.Cg(preconditioner="diagonal"), 32 * 270 * 8.0, r"diagonal .*\[32, 270\].*preconditioner"),
}


@pytest.mark.parametrize("name", NEEDED)
def test_a_fit_without_room_is_refused_before_it_allocates(name: str, small: Any) -> None:
    method, needed, words = NEEDED[name]
    influence, x, y = influence_of(method)
    small(needed)
    with pytest.raises(InvalidSetting, match=words + "|" + words.replace("block '2'", "block '0'")) as refused:
        influence.fit([(x, y)])
    assert "GB of memory" in str(refused.value) and "GB are free" in str(refused.value)
    small(100 * needed)
    influence.fit([(x, y)])


def test_solves_for_too_many_queries_are_refused_by_name(small: Any) -> None:
    operator, sides = with_spectrum(np.ones(30)), normal(40, 30)
    inverse = IterativeInverse(operator, 0.1, ConjugateGradient(), label="encoder")
    small(40 * 30 * 8.0)
    with pytest.raises(InvalidSetting, match=r"'encoder': solving .*\[40, 30\].*fewer queries at once"):
        inverse.apply(sides)
    inverse.apply(sides[:4])


def test_the_matrix_of_a_large_operator_is_refused() -> None:
    with pytest.raises(
        InvalidSetting, match=r"IdentityOperator of shape \[10000000, 10000000\] would take 1.6e\+06 GB"
    ):
        IdentityOperator(10**7).dense(torch.zeros(1, dtype=F64))


def test_a_kronecker_factor_of_a_large_vocabulary_is_refused_whatever_the_machine(
    monkeypatch: pytest.MonkeyPatch, small: Any
) -> None:
    monkeypatch.setattr(kronecker, "LARGEST_SIDE", 25)
    small(1e15)
    for method in (hw.Kfac(), hw.Ekfac(), hw.LoGra(init="pca"), hw.Astra(steps=2)):
        influence, x, y = influence_of(method)
        with pytest.raises(InvalidSetting, match=r"Block '2' has a layer of shape \[30, 9\].*\[30, 30\].*LoGra"):
            influence.fit([(x, y)])
    for method in (hw.LoGra(), hw.Dual(), hw.Cg(preconditioner="nystroem")):  # the remedies that it names
        influence, x, y = influence_of(method)
        assert influence.fit([(x, y)]).influences(x[:2], y[:2], x, y).isfinite().all()
    influence, x, y = influence_of(hw.Ekfac(), {"first": ["0.weight", "0.bias"]})
    influence.fit([(x, y)])


def test_the_vocabulary_of_an_embedding_is_a_diagonal_and_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kronecker, "LARGEST_SIDE", 25)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(60, 4), nn.Flatten(), nn.Linear(12, 3)).double()
    x, y = torch.randint(60, (20, 3)), torch.randint(3, (20,))
    TorchComposableInfluence(model, nn.CrossEntropyLoss(), hw.Ekfac(), damping=0.1).fit([(x, y)])


def test_an_accelerator_is_asked_for_nothing_and_memory_is_known_here() -> None:
    assert memory.on_host(None) and memory.on_host(torch.device("cpu")) and memory.on_host("TFRT_CPU_0")
    assert not memory.on_host("cuda:0")
    memory.refuse_too_large("A matrix", (10**9, 10**9), 8e18, "", "cuda:0")
    assert 1e6 < memory.available_memory() < 1e15


def test_a_trace_by_probes_is_the_same_in_groups_that_fit(small: Any) -> None:
    influence, x, y = influence_of(hw.Cg(curvature="hessian"), "full", outputs=40)
    found = []
    for size in (1e15, 2 * 3.0 * 416 * 8 * 7):
        small(size)
        (operator,) = fit_products(influence.provider, [(x, y)], "hessian")[0].values()
        found.append((operator.trace(), operator.trace_error))
    assert operator.input_size == 416 and found[0] == pytest.approx(found[1], rel=1e-10)
    like = torch.zeros(1, dtype=F64)
    whole, rest = (sign_vectors(9 - k, 50, like, seed=1, stream=0, first=k) for k in (0, 4))
    assert torch.equal(whole[4:], rest)
