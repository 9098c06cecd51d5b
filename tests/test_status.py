"""Claims about what a fitted influence says of itself: spectrum, damping, what was cut off, solves."""

import dataclasses
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import headwater as hw
from headwater.curvature.products import CurvatureOperator
from headwater.errors import NotFittedError, ShapeMismatch
from headwater.store.scores import Scores
from headwater.torch import TorchComposableInfluence

torch.manual_seed(0)
X, Y = torch.randn(30, 4, dtype=torch.float64), torch.randint(0, 3, (30,))
TRAIN, QUERY = list(zip(X.split(8), Y.split(8), strict=True)), [(X[:3], Y[:3]), (X[3:5], Y[3:5])]


def fitted(method, **options):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    return TorchComposableInfluence(model, nn.CrossEntropyLoss(), method, **options).fit(TRAIN)


def eigenvalues(influence) -> dict[str, np.ndarray]:
    like = torch.zeros(1, dtype=torch.float64)
    return {
        name: np.linalg.eigvalsh(np.asarray(curvature.dense(like))) for name, curvature in influence.curvature.items()
    }


# The spectrum ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method",
    [hw.Direct(), hw.Direct(curvature="hessian", allow_indefinite=True), hw.Kfac(), hw.Ekfac(), hw.GradDot()],
    ids=["dense", "hessian", "kronecker", "eigen-kronecker", "identity"],
)
def test_bounds_and_mean_are_those_of_the_dense_eigenvalues(method):
    influence = fitted(method, damping=0.3)
    for name, truth in eigenvalues(influence).items():
        block = influence.status.blocks[name]
        assert (block.lowest, block.highest) == pytest.approx((truth[0], truth[-1]), abs=1e-12)
        assert block.mean_eigenvalue == pytest.approx(truth.mean()) and block.mean_error == 0.0
        assert block.damping == 0.3
        assert block.lowest_damped == pytest.approx(truth[0] + 0.3)
        assert block.condition == pytest.approx((truth[-1] + 0.3) / (truth[0] + 0.3))
        assert block.size == len(truth)


@pytest.mark.parametrize("method", [hw.LoGra(dimension=3), hw.LoRif(dimension=3, kept=2), hw.Trak(dimension=9)])
def test_bounds_of_a_projected_curvature_are_those_of_what_is_damped(method):
    influence = fitted(method)
    like = torch.zeros(1, dtype=torch.float64)
    for name, curvature in influence.curvature.items():
        truth = np.linalg.eigvalsh(np.asarray(curvature.core.dense(like)))
        block = influence.status.blocks[name]
        assert (block.lowest, block.highest) == pytest.approx((truth[0], truth[-1]), abs=1e-10)


@pytest.mark.parametrize("method", [hw.Cg(), hw.Dual(), hw.DataInf(), hw.Lissa(steps=3), hw.Nystroem(rank=4)])
def test_bounds_by_products_lie_inside_the_spectrum_and_near_its_ends(method):
    influence = fitted(method)
    for name, truth in eigenvalues(influence).items():
        block = influence.status.blocks[name]
        assert truth[0] - 1e-12 <= block.lowest <= truth[0] + 0.02 * truth[-1]
        assert 0.98 * truth[-1] <= block.highest <= truth[-1] * (1 + 1e-12)


def test_asking_for_a_status_costs_no_product_and_asking_for_bounds_costs_them_once(monkeypatch):
    influence, seen = fitted(hw.Cg(preconditioner=None)), []
    plain = CurvatureOperator._apply
    monkeypatch.setattr(CurvatureOperator, "_apply", lambda self, v: seen.append(1) or plain(self, v))
    block = influence.status.blocks["0"]
    assert not seen
    assert block.lowest is not None
    first = len(seen)
    assert first > 0 and block.highest is not None and influence.status.blocks["0"].highest == block.highest
    assert len(seen) == first


def test_an_estimated_mean_has_a_standard_error(monkeypatch):
    monkeypatch.setattr("headwater.curvature.products.EXACT_TRACE", 0)
    influence = fitted(hw.Cg(curvature="hessian", preconditioner=None, allow_indefinite=True), damping=1.0)
    for name, truth in eigenvalues(influence).items():
        block = influence.status.blocks[name]
        assert block.mean_error > 0
        assert abs(block.mean_eigenvalue - truth.mean()) < 4 * block.mean_error
        assert "+-" in str(influence.status)


def test_an_operator_that_does_not_know_its_spectrum_says_so():
    influence = fitted(hw.Direct())
    for operator in influence.curvature.values():
        assert (operator @ operator).spectrum_bounds() is None


# What was cut off -----------------------------------------------------------------------------------------------------


def test_low_rank_methods_say_their_rank_and_their_share_of_the_trace():
    influence = fitted(hw.Arnoldi(rank=4))
    for name, truth in eigenvalues(influence).items():
        block = influence.status.blocks[name]
        assert block.kept_rank == 4
        assert block.kept_mass == pytest.approx(truth[-4:].sum() / truth.sum(), rel=1e-4)


def test_a_separable_spectrum_says_its_truncation_error_and_an_exact_one_has_none():
    assert all(block.truncation_error == 0.0 for block in fitted(hw.Ekfac()).status.blocks.values())
    influence = fitted(hw.Ekfac(rank=1))
    for name, block in influence.status.blocks.items():
        assert block.truncation_error == max(influence.truncation_errors[name]) > 0
        assert block.kept_rank is None


def test_lorif_says_what_it_kept_and_a_preconditioner_of_low_rank_cuts_nothing():
    for block in fitted(hw.LoRif(dimension=3, kept=2)).status.blocks.values():
        assert block.kept_rank == 2 and 0 < block.kept_mass < 1
    assert all(block.kept_rank is None for block in fitted(hw.Cg(preconditioner="nystroem")).status.blocks.values())


# Solves ---------------------------------------------------------------------------------------------------------------


def test_every_call_keeps_how_far_its_solves_came():
    influence, blocks = fitted(hw.Cg()), {"0", "2"}
    assert influence.solves == {}
    calls = {
        "influences": (lambda: influence.influences(X[:7], Y[:7], X, Y), 7),
        "influences_by_block": (lambda: influence.influences_by_block(X[:6], Y[:6], X, Y), 6),
        "influence_factors": (lambda: influence.influence_factors(X[:4], Y[:4]), 4),
        "attribute": (lambda: influence.attribute(TRAIN, QUERY), 5),
        "top": (lambda: influence.top(TRAIN, QUERY, 2), 5),
        "self_influence": (lambda: influence.self_influence(TRAIN), 30),
        "perturbation": (lambda: influence.influences(X[:2], Y[:2], X, Y, mode="perturbation"), 2),
    }
    for name, (call, count) in calls.items():
        call()
        assert set(influence.solves) == blocks, name
        for report in influence.solves.values():
            assert len(report.residual) == count and report.residual.max() <= 1.5e-8 and report.products > 0
        assert influence.status.blocks["0"].solve is influence.solves["0"]


def test_solves_that_missed_are_in_the_status_too():
    influence = fitted(hw.Cg(max_iterations=1, preconditioner=None), damping=hw.relative(0.01))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", hw.NotConverged)
        influence.influence_factors(X[:4], Y[:4])
    assert not influence.status.blocks["0"].solve.converged.any()


def test_another_damping_starts_without_solves_and_leaves_those_of_the_first():
    influence = fitted(hw.Cg())
    influence.influence_factors(X[:4], Y[:4])
    other = influence.with_damping(0.5)
    assert other.solves == {} and len(influence.solves["0"].residual) == 4
    other.influence_factors(X[:2], Y[:2])
    assert len(other.solves["0"].residual) == 2 and len(influence.solves["0"].residual) == 4


def test_a_method_that_solves_nothing_has_no_solves():
    influence = fitted(hw.Ekfac())
    scores = influence.attribute(TRAIN, QUERY)
    assert influence.solves == {} and scores.residuals is None
    assert all(block.solve is None for block in influence.status.blocks.values())


def test_scores_carry_the_residual_of_each_query_to_disk_and_back(tmp_path):
    influence = fitted(hw.Cg())
    scores = influence.attribute(TRAIN, QUERY, by_block=True)
    assert set(scores.residuals) == {"0", "2"}
    for name, residual in scores.residuals.items():
        np.testing.assert_array_equal(residual, influence.solves[name].residual)
        assert residual.shape == (5,)
    scores.save(tmp_path / "scores.zarr")
    opened = Scores.open(tmp_path / "scores.zarr")
    assert list(opened.residuals) == list(scores.residuals) and list(opened.by_block) == list(scores.by_block)
    for name, residual in scores.residuals.items():
        np.testing.assert_array_equal(opened.residuals[name], residual)
    data = scores.to_xarray()
    assert float(data["residuals"].sel(solved_block="2", query=4)) == scores.residuals["2"][4]


def test_scores_without_solves_are_saved_without_residuals(tmp_path):
    fitted(hw.Ekfac()).attribute(TRAIN, QUERY).save(tmp_path / "scores.zarr")
    assert Scores.open(tmp_path / "scores.zarr").residuals is None


def test_residuals_of_another_number_of_queries_are_refused():
    with pytest.raises(ShapeMismatch, match="'fc'"):
        Scores(np.zeros((2, 3)), np.arange(2), np.arange(3), residuals={"fc": np.zeros(3)})


# The whole ------------------------------------------------------------------------------------------------------------


def test_a_status_says_method_rows_coverage_dtype_and_seed():
    influence = fitted(hw.Ekfac(seed=7), blocks={"head": ["2"]})
    status = influence.status
    assert status.method == influence.method.describe() and status.n_train == 30.0
    assert status.coverage == 18 / 43 and status.dtype == "float64" and status.seed == 7
    assert fitted(hw.GradDot()).status.seed is None
    with pytest.raises(dataclasses.FrozenInstanceError):
        status.seed = 3
    with pytest.raises(NotFittedError):
        _ = influence.unfitted().status


def test_a_printed_status_is_a_table_with_a_line_for_each_block():
    influence = fitted(hw.Cg())
    influence.influence_factors(X[:4], Y[:4])
    lines = str(influence.status).splitlines()
    assert lines[0].startswith("Cg(") and "30 train rows, 100.0% of the trainable parameters, float64" in lines[1]
    assert [line.split()[0] for line in lines[3:]] == ["block", "0", "2"]
    assert "(4 solves)" in lines[-1]
