"""Inverse spectra with rows and columns that are alike: three small meetings in place of a dense one."""

import numpy as np
import pytest
import torch
from multiply_adds import counted

import headwater as hw
from headwater.curvature.cheapest import ekfac_inverse, kfac_inverse
from headwater.gradients.algebra import Dense
from headwater.gradients.block import BlockGradient, stack
from headwater.gradients.outer import Outer
from headwater.gradients.tiled import Tiled
from headwater.operators.kronecker import EigenKroneckerOperator, KroneckerOperator
from headwater.operators.parted import PartedOperator
from headwater.torch import TorchComposableInfluence

rng = np.random.default_rng(0)
O, I = 60, 80  # noqa: E741


def normal(*shape: int) -> torch.Tensor:
    return torch.tensor(rng.normal(size=shape))


def orthogonal(size: int) -> torch.Tensor:
    return torch.linalg.qr(normal(size, size))[0]


def rows(n: int, positions: int = 1) -> Outer:
    return Outer(normal(n, positions, I - 1), normal(n, positions, O), ones=True)


def spectrum(alike_rows: int, alike_columns: int, level: float = 0.0) -> torch.Tensor:
    """With so many rows that are alike, and columns; in no order but for the first of each."""
    values = normal(O, I) ** 2
    rows_alike = np.r_[0, 1 + rng.permutation(O - 1)[: alike_rows - 1]] if alike_rows else []
    columns_alike = np.r_[0, 1 + rng.permutation(I - 1)[: alike_columns - 1]] if alike_columns else []
    values[:, columns_alike] = level * values[:, :1]
    values[rows_alike] = level * values[:1]
    return values


def part_with(values: torch.Tensor) -> EigenKroneckerOperator:
    return EigenKroneckerOperator(orthogonal(O), orthogonal(I), values, like=values)


def meet(operator, queries: Outer, train: Outer) -> torch.Tensor:
    left, right = operator.sides(queries, 1e9)
    return left.apply_gradient(queries).inner(right.apply_gradient(train))


@pytest.mark.parametrize("level", [0.0, 0.2])
@pytest.mark.parametrize("alike", [(50, 70), (50, 0), (0, 70), (59, 79), (60, 80)])
def test_a_parted_spectrum_gives_the_scores_of_the_dense_one(alike: tuple[int, int], level: float) -> None:
    part = part_with(spectrum(*alike, level))
    exact, found = part.inverse(0.3), ekfac_inverse(part, 0.3)
    assert isinstance(found, PartedOperator) and found.truncation_error < 1e-13
    queries, train = rows(7), rows(9)
    expected = meet(exact, queries, train)
    for got in (
        meet(found, queries, train),
        found.apply_gradient(queries).inner(train),
        Dense(found.apply(queries.dense().reshape(7, -1)).reshape(7, O, I)).inner(train),
        meet(found, rows_of(queries), rows_of(train)),
    ):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12 * float(abs(expected).max()))
    torch.testing.assert_close(found.quadratic_gradient(queries), exact.quadratic_gradient(queries))
    assert found.trace() == pytest.approx(exact.trace())


def rows_of(value: Outer) -> Outer:
    """The same rows as sums over two positions: they meet in another form."""
    half = Outer(value.a, value.b / 2, value.ones)
    return half.join(half)


@pytest.mark.parametrize("rank", [4, 6])
def test_a_rank_is_that_of_the_part_that_is_not_alike(rank: int) -> None:
    part = part_with(spectrum(40, 60))
    found = ekfac_inverse(part, 0.3, rank)
    assert isinstance(found, PartedOperator) and found.truncation_error > 1e-3
    exact, cut = part.inverse(0.3), found.spectrum
    values = torch.linalg.matrix_rank(cut - 1 / 0.3)
    assert 1 <= int(values) <= rank + 1
    queries, train = rows(5), rows(6)
    basis = found.basis
    rotated = [torch.einsum("noi,op,iq->npq", g.dense(), basis.left, basis.right) for g in (queries, train)]
    expected = torch.einsum("noi,oi,moi->nm", rotated[0], cut, rotated[1])
    torch.testing.assert_close(meet(found, queries, train), expected)
    kept = found.apply_gradient(queries)
    assert isinstance(kept, Outer) and kept.positions == rank + 2
    torch.testing.assert_close(kept.inner(train), expected)
    assert not torch.allclose(expected, meet(exact, queries, train), rtol=1e-4)


def test_parts_without_alike_directions_stay_as_they_are() -> None:
    part = part_with(spectrum(0, 0))
    assert isinstance(ekfac_inverse(part, 0.3), EigenKroneckerOperator)
    assert isinstance(ekfac_inverse(part_with(spectrum(1, 0)), 0.3), EigenKroneckerOperator)
    diagonal = EigenKroneckerOperator(None, orthogonal(I), spectrum(50, 0), like=normal(1))
    assert isinstance(ekfac_inverse(diagonal, 0.3), EigenKroneckerOperator)


def test_dead_directions_of_kfac_are_parted_within_the_error() -> None:
    x, y = rng.uniform(0.1, 1, O), rng.uniform(0.1, 1, I)
    x[:30], y[:40] = 1e-9 * x[:30], 0.0
    left, right = orthogonal(O), orthogonal(I)
    part = KroneckerOperator((left * torch.tensor(x)) @ left.T, (right * torch.tensor(y)) @ right.T, psd=True)
    queries, train = rows(7), rows(9)
    exact, found = part.inverse(0.3), kfac_inverse(part, 0.3, 1e-6)
    assert isinstance(found, PartedOperator) and 1e-10 < found.truncation_error <= 1e-6
    bound = (exact.quadratic_gradient(queries)[:, None] * exact.quadratic_gradient(train)).sqrt()
    off = abs(meet(found, queries, train) - meet(exact, queries, train)) / bound
    assert 0 < off.max() <= found.truncation_error


def tiled(n: int, cut: tuple[int, int] = (4, 3)) -> Tiled:
    k, m = cut
    return Tiled(
        Outer(normal(n, 1, 8), normal(n, 1, k)),
        Outer(normal(n, 1, m), normal(n, 1, 6 - k)),
        Outer(normal(n, 2, 8 - m), normal(n, 2, 6 - k)),
    )


def test_verbs_of_a_tiled_gradient_are_those_of_its_matrices() -> None:
    value, other, elsewhere = tiled(5), tiled(3), tiled(3, (2, 3))
    dense = value.dense()
    assert dense.shape == (5, *value.shape) and value.cut == (4, 3)
    weights = normal(5)
    for got, expected in (
        (value.inner(other), Dense(dense).inner(Dense(other.dense()))),
        (value.inner(elsewhere), Dense(dense).inner(Dense(elsewhere.dense()))),
        (value.inner(Dense(other.dense())), Dense(dense).inner(Dense(other.dense()))),
        (Dense(other.dense()).inner(value), Dense(other.dense()).inner(Dense(dense))),
        (value.take(slice(1, 3)).dense(), dense[1:3]),
        (value.weighted(weights).dense(), dense * weights[:, None, None]),
        (value.combine(normal(2, 5) * 0 + weights), Dense(dense).combine(weights.expand(2, 5))),
        (value.cheapest_form(1).dense(), dense),
        (value.quadratic(), (dense**2).sum((1, 2))),
        (value.sandwich(normal(2, 6) * 0 + 1, None).dense(), dense.sum(1, keepdim=True).expand(5, 2, 8)),
    ):
        torch.testing.assert_close(got, expected)


def test_tiled_rows_are_stacked_tile_by_tile() -> None:
    from headwater.operators.projection import small_layout

    layout, values = small_layout("block", [(6, 8)]), [tiled(2), tiled(3)]
    found = stack([BlockGradient(layout, (value,)) for value in values]).parts[0]
    assert isinstance(found, Tiled)
    torch.testing.assert_close(found.dense(), torch.cat([value.dense() for value in values]))


def test_exact_ekfac_with_dead_units_takes_a_third_of_the_multiply_adds(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 192), torch.nn.ReLU(), torch.nn.Linear(192, 10)).double()
    x, y = torch.randn(190, 64).double(), torch.randint(10, (190,))
    x[:, 8:] = 0.0
    with torch.no_grad():
        model[0].bias[20:] = -100.0
    train, queries = [(x[:64], y[:64]), (x[64:], y[64:])], [(x[:91] * 0.9, y[:91]), (x[91:] * 1.1, y[91:])]
    counts, scores = [], []
    for dense in (False, True):
        if dense:
            monkeypatch.setattr("headwater.methods.kronecker.ekfac_inverse", lambda part, d, _: part.inverse(d))
        influence = TorchComposableInfluence(
            model, torch.nn.CrossEntropyLoss(), method=hw.Ekfac(), damping=hw.relative(0.3)
        ).fit(train)
        with counted() as products:
            scores.append(np.asarray(influence.attribute(train, queries)))
        counts.append(products.multiply_adds)
    np.testing.assert_allclose(*scores, rtol=0, atol=1e-12 * abs(scores[1]).max())
    assert counts[0] < counts[1] / 3
