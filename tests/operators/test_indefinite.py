"""Solves with a Hessian that is negative somewhere, at a damping where it is not: with every preconditioner."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from test_solvers import F32, F64, SOLVERS, exact, normal, true_residual, with_spectrum
from torch import nn
from truth import assert_close

import headwater as hw
from headwater.errors import IndefiniteCurvature
from headwater.methods.iterative import near_inverse
from headwater.operators.sketch import estimate_diagonal, fit_nystroem
from headwater.torch import TorchComposableInfluence


def hessian_case() -> tuple[Any, Any, Any, float]:
    """A network far from a minimum, its rows, and the size of its Hessian's lowest eigenvalue, which is negative."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    x, y = torch.randn(20, 4, dtype=F64), torch.randint(3, (20,))
    names = [name for name, _ in model.named_parameters()]

    def loss(*values: Any) -> Any:
        out = torch.func.functional_call(model, dict(zip(names, values, strict=True)), (3 * x,))
        return nn.functional.cross_entropy(out, y)

    values = tuple(p.detach() for p in model.parameters())
    blocks = torch.autograd.functional.hessian(loss, values)
    sizes = [v.numel() for v in values]
    matrix = torch.cat(
        [
            torch.cat([b.reshape(r, c) for b, c in zip(row, sizes, strict=True)], 1)
            for row, r in zip(blocks, sizes, strict=True)
        ]
    )
    return model, 3 * x, y, -float(torch.linalg.eigvalsh(matrix)[0])


@pytest.mark.parametrize("solver", [hw.Cg, hw.BlockKrylov])
@pytest.mark.parametrize("preconditioner", [None, "diagonal", "nystroem", "ekfac", "dual"])
def test_every_preconditioner_serves_a_hessian_that_is_positive_only_with_its_damping(
    solver: Any, preconditioner: Any
) -> None:
    model, x, y, below = hessian_case()
    assert below > 0
    damping, scores = 1.1 * below, {}
    for name, method in {
        "direct": hw.Direct("hessian"),
        "solved": solver(curvature="hessian", preconditioner=preconditioner, tolerance=1e-11),
    }.items():
        influence = TorchComposableInfluence(model, nn.CrossEntropyLoss(), method, blocks="full", damping=damping)
        scores[name] = influence.fit([(x, y)]).influences(x[:5], y[:5], x, y)
    assert float((scores["solved"] - scores["direct"]).abs().max()) < 1e-7 * float(scores["direct"].abs().max())


SPECTRA = {
    "a little below": np.concatenate([np.logspace(0, 3, 12), np.linspace(-0.5, 0.05, 48)]),
    "no trace": np.concatenate([np.linspace(0.1, 2, 30), -np.linspace(0.1, 2, 30)]),
    "mostly below": np.concatenate([[4.0], -np.linspace(0.1, 1, 59)]),
}


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
@pytest.mark.parametrize("values", SPECTRA.values(), ids=SPECTRA)
@pytest.mark.parametrize("rank", [5, 25, 60])
def test_a_shifted_sketch_is_positive_wherever_the_damped_curvature_is(solver: Any, values: Any, rank: int) -> None:
    operator, sides = with_spectrum(values), normal(3, 60)
    damping = -1.02 * values.min()
    sketch = fit_nystroem(operator, operator.matrix, rank=rank, seed=0, shifted=True)
    inverse = near_inverse(sketch, damping, operator.mean_eigenvalue())
    assert float(torch.linalg.eigvalsh(inverse.dense(operator.matrix))[0]) > 0
    solution = solver.solve(operator, damping, sides, inverse, "")
    assert solution.report.converged.all()
    assert (true_residual(operator, damping, solution.x, sides) < 1e-9).all()


def test_a_shifted_sketch_saves_steps_and_is_the_curvature_where_it_is_as_wide() -> None:
    values = SPECTRA["a little below"]
    operator, sides = with_spectrum(values), normal(3, 60)
    sketch = fit_nystroem(operator, operator.matrix, rank=20, seed=0, shifted=True)
    solver = SOLVERS["each by itself"]
    plain, helped = (solver.solve(operator, 1.0, sides, h, "").report.products for h in (None, sketch.inverse(1.0)))
    assert helped < plain / 2
    for dtype, allowed in ((F64, 1e-10), (F32, 1e-3)):
        same = with_spectrum(values, dtype=dtype)
        whole = fit_nystroem(same, same.matrix, rank=60, seed=0, shifted=True).dense(same.matrix)
        assert float((whole - same.matrix).abs().max()) < allowed * 1e3
    psd = with_spectrum(np.logspace(-2, 1, 30))
    plainly, shifted = (fit_nystroem(psd, psd.matrix, rank=9, seed=0, shifted=s) for s in (False, True))
    assert_close(plainly.dense(psd.matrix), shifted.dense(psd.matrix))


def test_a_diagonal_preconditioner_takes_what_is_negative_on_the_diagonal_for_zero() -> None:
    operator = with_spectrum(np.linspace(-3, -1, 12))
    found = estimate_diagonal(operator, operator.matrix, probes=32, seed=0)
    assert float(found.diagonal.max()) == 0.0
    sides = normal(2, 12)
    solution = SOLVERS["block"].solve(operator, 3.1, sides, near_inverse(found, 3.1, operator.mean_eigenvalue()), "")
    assert_close(solution.x, exact(operator, 3.1, sides), 1e6)


def test_the_nystroem_method_refuses_what_its_preconditioner_takes() -> None:
    model, x, y, below = hessian_case()
    method = hw.Nystroem(curvature="hessian", rank=20)
    with pytest.raises(IndefiniteCurvature, match="never negative"):
        TorchComposableInfluence(model, nn.CrossEntropyLoss(), method, blocks="full", damping=2 * below).fit([(x, y)])


class Saddle(nn.Module):
    """x a b: at a = b = 0 its squared error's Hessian has the eigenvalues c and -c, and no trace."""

    def __init__(self) -> None:
        super().__init__()
        self.pair = nn.Parameter(torch.zeros(2, dtype=F64))

    def forward(self, x: Any) -> Any:
        return x * self.pair[0] * self.pair[1]


@pytest.mark.parametrize("method", [hw.Direct("hessian"), hw.Cg(curvature="hessian", preconditioner="nystroem")])
def test_damping_relative_to_no_trace_is_refused_where_there_is_curvature(method: Any) -> None:
    x, y = torch.ones(6, 1, dtype=F64), torch.ones(6, 1, dtype=F64)
    influence = TorchComposableInfluence(Saddle(), nn.MSELoss(), method, blocks="full")
    with pytest.raises(IndefiniteCurvature, match=r"mean eigenvalue is 0, between -2 and 2.*absolute"):
        influence.fit([(x, y)])
    scores = influence.unfitted(damping=3.0).fit([(x, y)]).influences(x, y)
    assert float(scores.abs().max()) == 0.0  # no gradient there
