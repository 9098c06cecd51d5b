"""Eigenvalues that come several times: the leading ones are found with all their copies, or a warning is given."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from test_solvers import F32, F64, Counted, with_spectrum
from torch import nn

import headwater as hw
from headwater.curvature.products import CurvatureOperator
from headwater.errors import NotConverged
from headwater.operators.krylov import KrylovSpace, leading_eigenpairs
from headwater.operators.sketch import normal_vectors
from headwater.operators.structured import EigenpairsOperator
from headwater.torch import TorchComposableInfluence

TAIL = np.random.default_rng(0).uniform(0, 0.1, 160)


def searched(
    values: Any, rank: int, *, block: int = 4, dtype: torch.dtype = F64, limit: int | None = None, seed: int = 0
) -> tuple[EigenpairsOperator, int]:
    """What is found of a spectrum, as `hw.Arnoldi` searches; and the products that it took."""
    counted = Counted(with_spectrum(values, dtype=dtype))
    start = normal_vectors(block, len(values), counted.inner.matrix, seed=seed)
    limit = 10 * rank if limit is None else limit
    return leading_eigenpairs(counted, start, rank, tolerance=1e-3, max_products=limit, label="b"), counted.vectors


def leading(values: Any, rank: int) -> np.ndarray:
    values = np.asarray(values)
    return np.sort(values[np.argsort(-np.abs(values), kind="stable")[:rank]])


@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize(
    ("values", "rank"),
    [
        (np.concatenate([np.full(2, 3.0), np.full(3, 2.0), TAIL]), 5),
        (np.concatenate([np.full(5, 3.0), np.full(12, 2.0), TAIL]), 17),
        (np.concatenate([np.full(7, 3.0), np.full(12, 2.0), TAIL]), 11),
        (np.concatenate([np.full(9, 2.0), np.full(9, -2.0), np.full(3, 1.0), -TAIL]), 21),
        (np.concatenate([[30.0, 20.0], np.full(12, 2.0), TAIL]), 14),
        (np.ones(90), 20),
        (np.repeat([5.0, 2.0, 1.0, 0.5], 12), 100),
        (np.concatenate([np.full(30, 4.0), np.zeros(60)]), 40),
        (3.0 * (1 + 4e-4 * np.arange(12)), 12),
    ],
    ids=["two, three", "five, twelve", "cut", "both signs", "below", "identity", "rank above", "few", "nearly"],
)
def test_the_leading_eigenvalues_are_found_with_all_their_copies(values: Any, rank: int, dtype: torch.dtype) -> None:
    values = np.concatenate([values, TAIL]) if len(values) == 12 else values
    found, _ = searched(values, rank, dtype=dtype)
    expected, got = leading(values, rank), np.sort(found.values.numpy())
    size = np.abs(values).max()
    assert len(got) == min(rank, len(values), max(len(got), np.count_nonzero(values)))
    missing = np.sort(np.concatenate([got, np.zeros(len(expected) - len(got))]))
    assert np.abs(missing - expected).max() <= 2e-3 * size
    vectors = found.vectors.double()
    assert float((vectors @ vectors.T - torch.eye(len(got), dtype=F64)).abs().max()) < 1e-4


@pytest.mark.parametrize(
    "values", [np.logspace(0, -4, 200), np.linspace(-1, 3, 60) ** 3], ids=["decades", "both signs"]
)
def test_a_spectrum_without_copies_costs_what_one_space_costs(values: Any) -> None:
    """The copies that were seen tell that there are no others: no product is spent on looking for them."""
    rank, operator = 8, with_spectrum(values)
    _, products = searched(values, rank)
    space = KrylovSpace(operator, normal_vectors(4, len(values), operator.matrix, seed=0))
    while True:
        space.extend()
        found, _, errors = space.ritz()
        kept = np.argsort(-np.abs(found))[:rank]
        if errors[kept].max() <= 1e-3 * np.abs(found).max():
            break
    assert products == space.products


def test_copies_that_may_be_missing_are_said_where_products_run_out() -> None:
    values = np.concatenate([np.full(12, 3.0), TAIL])
    with pytest.warns(NotConverged, match=r"Block 'b': after \d+ products.*max_products=40"):
        searched(values, 8, limit=20)
    with pytest.warns(NotConverged, match=r"come several times.*copies may be missing"):
        searched(np.concatenate([np.full(12, 3.0), np.zeros(90)]), 12, limit=8)


def test_residuals_hold_after_a_chain_was_left_and_another_begun() -> None:
    operator = with_spectrum(np.linspace(-1, 2, 40))
    space = KrylovSpace(operator, normal_vectors(3, 40, operator.matrix, seed=0))
    for seed in (1, 2):
        space.extend()
        space.extend()
        space.restart(normal_vectors(1, 40, operator.matrix, seed=seed))
        space.extend()
        space.join(normal_vectors(2, 40, operator.matrix, seed=seed + 5))
    space.extend()
    values, vectors, errors = space.ritz()
    ritz = space.combine(vectors.T)
    true = (ritz @ operator.matrix - torch.as_tensor(values)[:, None] * ritz).norm(dim=1).numpy()
    assert (true <= errors + 1e-12).all() and (errors <= 4 * true.max()).all()


def test_an_eigenvector_of_two_equal_entries_is_met_by_every_start() -> None:
    """Half of all vectors of signs are orthogonal to (1, -1, 0, ...)."""
    torch.manual_seed(0)
    x, y = torch.randn(40, 3, dtype=F64), torch.randint(2, (40,))
    for seed in range(4):
        method = hw.Arnoldi(rank=2, curvature="hessian", seed=seed)
        influence = TorchComposableInfluence(
            nn.Linear(3, 2).double(), nn.CrossEntropyLoss(), method, blocks="parameter", damping=0.1
        ).fit([(x, y)])
        found = influence.curvature["bias"]
        assert isinstance(found.exact, CurvatureOperator)  # type: ignore[attr-defined]
        assert found.exact.bounds.highest > 0.1  # type: ignore[attr-defined]
        assert float(found.approximation.values.max()) > 0.1  # type: ignore[attr-defined]


def test_the_share_of_the_trace_that_is_kept_is_said_where_it_is_a_share() -> None:
    torch.manual_seed(0)
    model, x, y = nn.Linear(5, 6, bias=False).double(), torch.randn(50, 5, dtype=F64), torch.randn(50, 6, dtype=F64)
    eigenvalues = torch.linalg.eigvalsh(torch.kron(torch.eye(6, dtype=F64), x.T @ x / len(x) / 3)).numpy()
    for rank in (6, 8, 40):
        influence = TorchComposableInfluence(model, nn.MSELoss(), hw.Arnoldi(rank=rank), blocks="full", damping=0.1)
        status = influence.fit([(x, y)]).status.blocks["full"]
        assert status.kept_rank == min(rank, 30)
        assert status.kept_mass == pytest.approx(eigenvalues[-rank:].sum() / eigenvalues.sum(), rel=1e-2)
    bent = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 6)).double()
    method = hw.Arnoldi(rank=6, curvature="hessian", allow_indefinite=True)
    found = TorchComposableInfluence(bent, nn.MSELoss(), method, blocks="full", damping=0.1).fit([(x, y)]).status
    assert found.blocks["full"].kept_rank == 6 and found.blocks["full"].kept_mass is None
    assert "of the trace" not in str(found)
