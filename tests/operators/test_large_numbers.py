"""Numbers beyond their dtype: the right answer where scaling saves it, else NonFiniteValue with block and remedy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from test_solvers import F32, F64, SOLVERS, exact, normal, with_spectrum
from torch import nn

import headwater as hw
from headwater.errors import NonFiniteValue
from headwater.methods.base import Method
from headwater.operators.algebra import LinearOperator
from headwater.operators.block_krylov import BlockKrylovSolver
from headwater.operators.cg import ConjugateGradient
from headwater.operators.iterative import IterativeInverse, apply_path, recorded_solves, row_norms
from headwater.operators.krylov import extreme_eigenvalues, leading_eigenpairs
from headwater.operators.lissa import Descent, SteppedOperator
from headwater.operators.sketch import estimate_diagonal, fit_nystroem, normal_vectors
from headwater.operators.structured import DenseOperator
from headwater.torch import TorchComposableInfluence

IN_FLOAT32: dict[str, Any] = {
    "each by itself": ConjugateGradient(1e-4),
    "block": ConjugateGradient(1e-4, block=True),
    "krylov": BlockKrylovSolver(1e-4),
    "descent": Descent(60, 1.0),
}


@pytest.mark.parametrize("size", [1e25, 1e-30])
@pytest.mark.parametrize("solver", IN_FLOAT32.values(), ids=IN_FLOAT32)
def test_sides_whose_squares_no_float32_holds_are_solved_all_the_same(solver: Any, size: float) -> None:
    """Their norm would be infinite, and any residual as good as none; or zero, and so the answer."""
    operator = with_spectrum(np.logspace(-1, 0, 20), dtype=F32)
    sides = normal(3, 20).to(F32) * torch.tensor([[size], [1.0], [0.0]], dtype=F32)
    curvature: LinearOperator = operator
    if isinstance(solver, Descent):
        curvature = SteppedOperator(operator, [])
    inverse = IterativeInverse(curvature, 0.1, solver, label="b")
    with recorded_solves() as log:
        found, (again,) = inverse.apply(sides), apply_path([inverse], sides)
    expected = exact(operator, 0.1, sides)
    for x in (found, again):
        off = (x.double() - expected).norm(dim=1) / expected.norm(dim=1).clamp(min=1e-300)
        assert off.max() < 5e-3
    assert log[0].residual.max() < 5e-3 and np.isfinite(log[0].residual).all()


def test_norms_are_those_of_float64_whatever_the_size() -> None:
    rows = normal(4, 9).to(F32) * torch.tensor([[1e30], [1e-30], [1.0], [0.0]], dtype=F32)
    np.testing.assert_allclose(row_norms(rows).double(), rows.double().norm(dim=1), rtol=1e-6)
    assert not torch.isfinite(row_norms(rows * float("inf"))[0])


@pytest.mark.parametrize("solver", [*IN_FLOAT32.values(), SOLVERS["krylov"]])
def test_what_is_to_be_solved_for_must_be_finite(solver: Any) -> None:
    operator = with_spectrum(np.logspace(-1, 0, 20), dtype=F32)
    sides = normal(3, 20).to(F32)
    sides[1, 4] = float("nan")
    curvature = SteppedOperator(operator, []) if isinstance(solver, Descent) else operator
    with pytest.raises(NonFiniteValue, match=r"Block 'head': what is to be solved for.*float32.*Rescale the inputs"):
        IterativeInverse(curvature, 0.1, solver, label="head").apply(sides)


class Overflowing(DenseOperator):
    """Finite as a matrix; its products are not, from some vector on."""

    def __init__(self, good: int):
        super().__init__(torch.eye(20, dtype=F32) * torch.linspace(1, 3, 20), psd=True)
        self.good = good

    def _apply(self, tensor: Any) -> Any:
        self.good -= 1
        return super()._apply(tensor) * (1.0 if self.good >= 0 else float("inf"))


@pytest.mark.parametrize("good", [0, 2])
@pytest.mark.parametrize("name", ["each by itself", "block", "krylov", "bounds", "eigenpairs", "sketch"])
def test_a_product_that_overflows_is_no_residual_and_no_eigenvalue(name: str, good: int) -> None:
    operator, like = Overflowing(0 if name == "sketch" else good), torch.zeros(1, dtype=F32)
    start = normal_vectors(2, 20, like, seed=0)
    with pytest.raises(NonFiniteValue, match=r"not finite.*Rescale the inputs"):
        if name in IN_FLOAT32:
            IterativeInverse(operator, 0.0, IN_FLOAT32[name], label="b").apply(normal(2, 20).to(F32))
        elif name == "bounds":
            extreme_eigenvalues(operator, start[:1])
        elif name == "eigenpairs":
            leading_eigenpairs(operator, start, 8, tolerance=1e-3, max_products=80)
        else:
            fit_nystroem(operator, like, rank=5, seed=0)


def regression(size: float, dtype: torch.dtype = F32) -> tuple[nn.Module, Any, Any]:
    """Large inputs, small weights, sensible outputs; the same numbers in every dtype."""
    torch.manual_seed(0)
    model, x, y = nn.Linear(5, 2), torch.randn(30, 5) * size, torch.randn(30, 2)
    with torch.no_grad():
        model.weight /= size
    return model.to(dtype), x.to(dtype), y.to(dtype)


METHODS: dict[str, Method] = {
    "Direct": hw.Direct(),
    "Direct of a Hessian": hw.Direct("hessian"),
    "Kfac": hw.Kfac(),
    "Ekfac": hw.Ekfac(rank=1),
    "Cg": hw.Cg(),
    "BlockKrylov": hw.BlockKrylov(preconditioner="nystroem"),
    "Lissa": hw.Lissa(steps=3),
    "Astra": hw.Astra(steps=3),
    "Arnoldi": hw.Arnoldi(rank=3),
    "Nystroem": hw.Nystroem(rank=3),
    "Dual": hw.Dual(),
    "DataInf": hw.DataInf(),
    "Trak": hw.Trak(3, output="loss"),
    "LoGra": hw.LoGra(2),
    "LoGra of leading directions": hw.LoGra(2, init="pca"),
    "LoRif": hw.LoRif(2),
    "FactGrass": hw.FactGrass(2),
}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("damping", [1.0, hw.relative(0.3)], ids=["absolute", "relative"])
def test_a_fit_on_inputs_of_1e20_is_refused_with_the_block_and_the_remedy(method: Method, damping: Any) -> None:
    model, x, y = regression(1e20)
    with pytest.raises(
        NonFiniteValue, match=r"lock 'root'.*not finite.*Rescale the inputs or the loss, or use float64"
    ):
        TorchComposableInfluence(model, nn.MSELoss(), method, blocks="layer", damping=damping).fit([(x, y)])


@pytest.mark.parametrize("name", ["Cg", "BlockKrylov", "Nystroem", "Dual", "DataInf", "Ekfac", "Direct"])
def test_scores_from_large_inputs_are_those_of_float64(name: str) -> None:
    """Inputs and gradients of 1e13: fourth powers are beyond float32, and neither curvature nor scores are."""
    scores = []
    for dtype in (F32, F64):
        model, x, y = regression(1e13, dtype)
        influence = TorchComposableInfluence(
            model, nn.MSELoss(), METHODS[name], blocks="layer", damping=hw.relative(0.3)
        ).fit([(x, y)])
        scores.append(influence.influences(x[:4], y[:4], x, y).double())
    assert float((scores[0] - scores[1]).abs().max()) < 1e-2 * float(scores[1].abs().max())


@pytest.mark.parametrize(
    "method", [hw.Ekfac(rank=1), hw.Ekfac(), hw.Nystroem(rank=3), hw.Arnoldi(rank=3), hw.Cg(preconditioner="nystroem")]
)
def test_a_block_without_any_curvature_is_damping_alone(method: Method) -> None:
    """Inputs of zero: a layer without bias has no gradient and no curvature, which is no overflow."""
    model, x, y = nn.Sequential(nn.Linear(5, 4, bias=False), nn.Linear(4, 2)), torch.zeros(9, 5), torch.randn(9, 2)
    influence = TorchComposableInfluence(model, nn.MSELoss(), method, blocks="layer", damping=0.5).fit([(x, y)])
    by_block = influence.influences_by_block(x, y)
    assert float(by_block["0"].abs().max()) == 0.0 and float(by_block["1"].abs().max()) > 0
    like = torch.zeros(1, dtype=F64)
    nothing = DenseOperator(torch.zeros(6, 6, dtype=F64), psd=True)
    assert float(fit_nystroem(nothing, like, rank=3, seed=0).values.abs().max()) == 0.0
    assert float(estimate_diagonal(nothing, like, probes=4, seed=0).diagonal.abs().max()) == 0.0


def test_a_matrix_that_is_not_finite_is_not_diagonalised() -> None:
    for matrix in (np.full((3, 3), np.nan), torch.full((3, 3), float("inf"))):
        with pytest.raises(NonFiniteValue, match="not finite"):
            DenseOperator(matrix, psd=True).inverse(0.1)
