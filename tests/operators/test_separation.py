"""The inverse spectrum of a damped Kronecker product as a short sum of outer products."""

import numpy as np
import pytest
import torch
from multiply_adds import counted

import headwater as hw
from headwater.curvature.cheapest import kfac_inverse
from headwater.gradients.algebra import Dense
from headwater.gradients.outer import Outer
from headwater.operators.kronecker import (
    EigenKroneckerOperator,
    KroneckerOperator,
    SeparableOperator,
    longest_sum,
)
from headwater.operators.parted import PartedOperator
from headwater.operators.separation import separate_inverse, tolerated
from headwater.torch import TorchComposableInfluence

rng = np.random.default_rng(0)


def falling(size: int, digits: float) -> np.ndarray:
    """Eigenvalues over so many orders of magnitude, some of them zero."""
    values = np.exp(-rng.uniform(0, digits * np.log(10), size))
    values[: size // 10] = 0.0
    return values


SPECTRA = {
    "even": (falling(40, 1), falling(50, 1)),
    "falling": (falling(60, 8), falling(33, 6)),
    "one large": (np.r_[np.full(30, 1e-7), 5.0], falling(40, 4)),
    "single": (np.array([2.0]), falling(20, 3)),
    "rounded below zero": (np.r_[-1e-12, falling(30, 5)], falling(30, 5)),
}


@pytest.mark.parametrize("damping", [1e-3, 0.3, 100.0])
@pytest.mark.parametrize("error", [1e-3, 1e-6, 1e-13])
@pytest.mark.parametrize("case", SPECTRA)
def test_the_error_that_is_said_is_the_largest_of_any_entry(case: str, error: float, damping: float) -> None:
    x, y = SPECTRA[case]
    damping *= max(float(np.outer(x, y).mean()), 1e-9)
    exact = 1.0 / (np.outer(x, y) + damping)
    found = separate_inverse(x, y, damping, error, 200)
    assert found is not None
    u, v, said = found
    worst = float(abs(u.T @ v / exact - 1).max())
    assert said <= error
    # It is known in closed form; what a float64 sum of the terms adds is rounding.
    assert worst == pytest.approx(said, rel=1e-3, abs=1e-13)


@pytest.mark.parametrize("case", SPECTRA)
def test_terms_do_not_cancel_so_that_float32_keeps_the_error(case: str) -> None:
    x, y = SPECTRA[case]
    damping = 1e-3 * float(np.outer(x, y).mean())
    exact = 1.0 / (np.outer(x, y) + damping)
    found = separate_inverse(x, y, damping, 1e-6, 200)
    assert found is not None
    u, v, _ = found
    assert (abs(u).T @ abs(v) / exact).max() < 10
    rounded = u.astype(np.float32).T @ v.astype(np.float32)
    assert abs(rounded / exact - 1).max() < 3e-6


def test_a_longer_sum_than_is_asked_for_is_none() -> None:
    x, y = SPECTRA["falling"]
    damping = 0.3 * float(np.outer(x, y).mean())
    found = separate_inverse(x, y, damping, 1e-6, 200)
    assert found is not None and len(found[0]) < 30
    assert separate_inverse(x, y, damping, 1e-6, len(found[0])) is not None
    assert separate_inverse(x, y, damping, 1e-6, len(found[0]) - 1) is None


def test_the_tolerance_follows_the_precision_down_to_a_limit() -> None:
    eps = [float(np.finfo(dtype).eps) for dtype in (np.float64, np.float32, np.float16)]
    assert [tolerated(e) for e in eps] == pytest.approx([1e-13, 9.5e-7, 1e-6], rel=0.01)


def covariance(size: int, digits: float) -> torch.Tensor:
    basis = np.linalg.qr(rng.normal(size=(size, size)))[0]
    return torch.tensor(basis * falling(size, digits) @ basis.T)


def rows(n: int, o: int, i: int) -> Outer:
    return Outer(torch.tensor(rng.normal(size=(n, 1, i))), torch.tensor(rng.normal(size=(n, 1, o))))


@pytest.mark.parametrize("damping", [1e-3, 1e-1, 3.0])
@pytest.mark.parametrize("error", [1e-2, 1e-5, None])
def test_no_score_is_off_by_more_than_the_error_times_the_root_of_self_influences(
    error: float | None, damping: float
) -> None:
    part = KroneckerOperator(covariance(130, 5), covariance(150, 6), psd=True)
    damping *= part.mean_eigenvalue()
    exact, found = part.inverse(damping), kfac_inverse(part, damping, error)
    assert isinstance(found, (SeparableOperator, PartedOperator)) and found.psd
    queries, train = rows(7, 130, 150), rows(9, 130, 150)

    def scores(operator) -> torch.Tensor:
        left, right = operator.sides(queries, 1.0)
        return left.apply_gradient(queries).inner(right.apply_gradient(train))

    bound = (exact.quadratic_gradient(queries)[:, None] * exact.quadratic_gradient(train)).sqrt()
    off = (abs(scores(found) - scores(exact)) / bound).max()
    assert off <= found.truncation_error + 1e-13
    assert found.truncation_error <= (1e-13 if error is None else error)
    if error is not None:
        assert off > 0  # the sum, not the exact spectrum


def test_rows_of_many_positions_and_small_parts_keep_the_dense_spectrum() -> None:
    small = KroneckerOperator(covariance(6, 5), covariance(8, 5), psd=True)
    assert isinstance(kfac_inverse(small, 0.3 * small.mean_eigenvalue()), EigenKroneckerOperator)
    part = KroneckerOperator(covariance(130, 0.5), covariance(150, 6), psd=True)
    found = kfac_inverse(part, 1.0 * part.mean_eigenvalue(), 1e-4)
    assert isinstance(found, SeparableOperator)
    terms = len(found.u)
    wide = Outer(torch.ones(2, 4, 150).double(), torch.ones(2, 4, 130).double())
    # 16 pairs of positions meet for each pair of rows, and each as `terms` outer products.
    assert 4 * terms * 280 < 130 * 150 and 16 * terms > longest_sum(130, 150)
    left, _ = found.sides(wide, 1e9)
    assert isinstance(left.apply_gradient(wide), Dense)
    left, _ = found.sides(rows(2, 130, 150), 1e9)
    assert isinstance(left.apply_gradient(rows(2, 130, 150)), Outer)


@pytest.mark.parametrize("o, i", [(1, 9), (10, 257), (256, 257), (768, 3073)])
def test_the_longest_sum_is_the_last_that_costs_fewer_multiply_adds(o: int, i: int) -> None:
    most = longest_sum(o, i)
    assert most * (o + i) < o * i
    assert (most + 2) * (o + i + 32) > o * i


def fitted(dtype: torch.dtype, damping: float) -> tuple[TorchComposableInfluence, list, list]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(64, 192), torch.nn.ReLU(), torch.nn.Linear(192, 192), torch.nn.ReLU(), torch.nn.Linear(192, 10)
    ).to(dtype)
    x, y = torch.randn(190, 64, dtype=dtype) * torch.logspace(0, -3, 64, dtype=dtype), torch.randint(10, (190,))
    train = [(x[:64], y[:64]), (x[64:128], y[64:128]), (x[128:], y[128:])]
    influence = TorchComposableInfluence(
        model, torch.nn.CrossEntropyLoss(), method=hw.Kfac(), damping=hw.relative(damping)
    )
    return influence.fit(train), train, [(x[:31] * 0.9, y[:31])]


def with_dense_spectrum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headwater.methods.kronecker.kfac_inverse", lambda part, damping: part.inverse(damping))
    monkeypatch.setattr("headwater.methods.kronecker.ekfac_inverse", lambda part, damping, _: part.inverse(damping))


def test_exact_kfac_has_the_scores_of_the_dense_spectrum_and_says_what_was_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    influence, train, queries = fitted(torch.float64, 0.3)
    scores = np.asarray(influence.attribute(train, queries))
    errors = influence.truncation_errors
    assert 0 < max(errors["0"]) <= 1e-13 and errors["4"] == [0.0]
    assert {name: block.truncation_error for name, block in influence.status.blocks.items()} == {
        name: max(found) for name, found in errors.items()
    }
    with_dense_spectrum(monkeypatch)
    influence, train, queries = fitted(torch.float64, 0.3)
    dense = np.asarray(influence.attribute(train, queries))
    assert influence.truncation_errors == {"0": [0.0], "2": [0.0], "4": [0.0]}
    np.testing.assert_allclose(scores, dense, rtol=1e-9, atol=1e-11 * abs(dense).max())


def test_pairs_of_exact_kfac_take_a_quarter_of_the_dense_multiply_adds(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []
    for dense in (False, True):
        if dense:
            with_dense_spectrum(monkeypatch)
        influence, train, queries = fitted(torch.float32, 10.0)
        queries = queries * 12
        asked = [(torch.cat([x for x, _ in queries]), torch.cat([y for _, y in queries]))]
        with counted() as products:
            influence.attribute(train, asked)
        counts.append(products.multiply_adds)
    assert counts[0] < counts[1] / 4
