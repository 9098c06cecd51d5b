"""Solvers on matrices alone: what each promises of its steps, its products, its residuals and its refusals."""

from __future__ import annotations

import copy
import os
import re
import tempfile
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from models import mlp
from truth import assert_close, fitted, truth_of

import headwater as hw
from headwater.errors import Diverged, IndefiniteCurvature, NotConverged, SingularOperator
from headwater.operators.algebra import LinearOperator
from headwater.operators.block_krylov import BlockKrylovSolver
from headwater.operators.cg import ConjugateGradient
from headwater.operators.iterative import (
    BROKEN,
    CONVERGED,
    FINISHED,
    STAGNATED,
    UNFINISHED,
    IterativeInverse,
    joined,
    recorded_solves,
)
from headwater.operators.krylov import KrylovSpace, extreme_eigenvalues, leading_eigenpairs, orthonormal, steepness
from headwater.operators.lissa import Descent, SteppedOperator
from headwater.operators.sketch import estimate_diagonal, fit_nystroem, sign_vectors
from headwater.operators.structured import DenseOperator, DiagonalOperator, EigenpairsOperator

F64, F32 = torch.float64, torch.float32


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def rotation(size: int, seed: int = 0) -> torch.Tensor:
    return torch.linalg.qr(normal(size, size, seed=seed))[0]


def with_spectrum(values: Any, seed: int = 0, dtype: torch.dtype = F64) -> DenseOperator:
    values = torch.as_tensor(np.asarray(values), dtype=F64)
    basis = rotation(len(values), seed)
    matrix = (basis * values) @ basis.T
    return DenseOperator(((matrix + matrix.T) / 2).to(dtype), symmetric=True, psd=bool((values >= 0).all()))


def exact(operator: DenseOperator, damping: float, sides: torch.Tensor) -> torch.Tensor:
    matrix = operator.matrix.double()
    return torch.linalg.solve(matrix + damping * torch.eye(len(matrix), dtype=F64), sides.double().T).T


def true_residual(operator: DenseOperator, damping: float, x: torch.Tensor, sides: torch.Tensor) -> np.ndarray:
    """|b - (C + damping) x| / |b| in float64: [k]."""
    x, sides = x.double(), sides.double()
    rest = sides - x @ operator.matrix.double() - damping * x
    return (rest.norm(dim=1) / sides.norm(dim=1).clamp(min=1e-300)).numpy()


class Counted(LinearOperator):
    """Counts the vectors that go through."""

    symmetric = True

    def __init__(self, inner: LinearOperator):
        self.inner, self.psd, self.vectors = inner, inner.psd, 0

    @property
    def input_size(self) -> int:
        return self.inner.input_size

    def _apply(self, tensor: Any) -> Any:
        self.vectors += int(tensor.reshape((-1, self.input_size)).shape[0])
        return self.inner.apply(tensor)

    def adjoint(self) -> LinearOperator:
        return self

    def trace(self) -> float:
        return self.inner.trace()


def named_number(text: str, pattern: str) -> float:
    """A number that a message names."""
    found = re.search(pattern + r"([0-9.e+-]*[0-9])", text)
    assert found, text
    return float(found.group(1))


CG = {"each by itself": ConjugateGradient(1e-10), "block": ConjugateGradient(1e-10, block=True)}
SOLVERS: dict[str, Any] = CG | {"krylov": BlockKrylovSolver(1e-10, max_products=400)}
solvers = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
both = pytest.mark.parametrize("solver", CG.values(), ids=CG)


# Preconditioners ------------------------------------------------------------------------------------------------------


def iterations(operator: LinearOperator, damping: float, helper: LinearOperator | None) -> int:
    sides = normal(4, operator.input_size, seed=9)
    return int(ConjugateGradient(1e-8).solve(operator, damping, sides, helper, "").report.iterations.max())


def test_the_diagonal_preconditioner_saves_steps_where_parameters_are_badly_scaled() -> None:
    """Layers of different scale; the large does not mix with the rest, so that few random signs see the diagonal."""
    layers = [10.0**k * with_spectrum(np.linspace(1, 2, 10), seed=k).matrix for k in range(4)]
    operator = DenseOperator(torch.block_diag(*layers), psd=True)
    diagonal = estimate_diagonal(operator, operator.matrix, probes=32, seed=0)
    plain, helped = (iterations(operator, 0.1, h) for h in (None, diagonal.inverse(0.1)))
    assert helped < plain / 2


def test_the_nystroem_preconditioner_saves_steps_where_few_directions_hold_the_curvature() -> None:
    operator = with_spectrum(np.concatenate([np.logspace(0, 3, 12), 1e-2 * np.ones(48)]))
    sketch = fit_nystroem(operator, operator.matrix, rank=20, seed=0)
    plain, helped = (iterations(operator, 1e-2, h) for h in (None, sketch.inverse(1e-2)))
    assert helped < plain / 2
    assert helped <= 6


@pytest.mark.parametrize("kind", ["ekfac", "kfac"])
def test_kronecker_preconditioners_save_steps_on_a_network(kind: Any) -> None:
    case = mlp()
    counts = {}
    for helper in (None, kind):
        method = hw.Cg(preconditioner=helper, tolerance=1e-8, block=False)
        influence = fitted(case, method, "layer", damping=hw.relative(1e-2))
        with recorded_solves() as log:
            influence.influence_factors(case.x, case.y)
        counts[helper] = {report.label: report.iterations.sum() for report in log}
    assert counts[kind].keys() == {"first", "second"}
    for block in counts[kind]:
        assert counts[kind][block] < counts[None][block]


def test_a_preconditioner_does_not_change_what_is_solved() -> None:
    operator, sides = with_spectrum(np.logspace(-2, 1, 20)), normal(3, 20)
    helper = DiagonalOperator(torch.logspace(-1, 1, 20, dtype=F64))
    for solver in SOLVERS.values():
        for inverse in (None, helper):
            assert_close(solver.solve(operator, 0.1, sides, inverse, "").x, exact(operator, 0.1, sides), 1e5)


# Columns --------------------------------------------------------------------------------------------------------------


def test_columns_that_have_converged_leave() -> None:
    operator = with_spectrum(np.logspace(-3, 0, 30))
    easy = rotation(30)[:, :3].T  # eigenvectors: one step each
    sides = torch.cat([easy, normal(2, 30)])
    report = ConjugateGradient(1e-10).solve(operator, 1e-3, sides, None, "").report
    assert report.iterations[:3].tolist() == [1, 1, 1]
    assert report.products == report.iterations.sum() < len(sides) * report.iterations.max() / 2


@solvers
def test_a_right_hand_side_of_zero_costs_nothing(solver: Any) -> None:
    counted = Counted(with_spectrum(np.logspace(-2, 0, 10)))
    nothing = torch.zeros(3, 10, dtype=F64)
    solution = solver.solve(counted, 0.1, nothing, None, "")
    assert counted.vectors == solution.report.products == 0
    assert_close(solution.x, nothing)
    assert (solution.report.outcome == CONVERGED).all() and (solution.report.residual == 0).all()
    mixed = torch.stack([nothing[0], normal(10), nothing[0]])
    solution = solver.solve(counted, 0.1, mixed, None, "")
    assert_close(solution.x, exact(counted.inner, 0.1, mixed), 1e4)
    assert counted.vectors == solution.report.products <= 11


@solvers
def test_no_right_hand_sides_give_no_solutions(solver: Any) -> None:
    solution = solver.solve(with_spectrum([1.0, 2, 3]), 0.1, torch.zeros(0, 3, dtype=F64), None, "b")
    assert solution.x.shape == (0, 3) and solution.report.outcome.shape == (0,)


def test_products_are_what_went_through_the_curvature() -> None:
    for solver in SOLVERS.values():
        counted = Counted(with_spectrum(np.logspace(-2, 0, 25)))
        report = solver.solve(counted, 0.05, normal(4, 25), None, "").report
        assert counted.vectors == report.products > 0


@both
def test_what_runs_out_of_iterations_is_said_column_by_column(solver: Any) -> None:
    operator = with_spectrum(np.logspace(-4, 0, 40))
    sides = torch.cat([rotation(40)[:, 5:6].T, normal(2, 40)])
    short = ConjugateGradient(1e-10, 4, block=False)
    report = short.solve(operator, 1e-4, sides, None, "").report
    assert report.outcome.tolist() == [CONVERGED, UNFINISHED, UNFINISHED]
    assert report.converged.tolist() == [True, False, False]
    assert report.iterations.tolist() == [1, 4, 4]
    inverse = IterativeInverse(operator, 1e-4, short, label="encoder")
    with pytest.warns(NotConverged, match=r"Block 'encoder': 2 of 3 solves missed.*\(2 out of iterations\).*is \d"):
        inverse.apply(sides)
    report = BlockKrylovSolver(1e-10, 4).solve(operator, 1e-4, sides, None, "").report
    assert set(report.outcome[1:]) == {UNFINISHED}


@pytest.mark.parametrize("block", [False, True])
def test_rounding_that_hides_the_tolerance_is_called_stagnation(block: bool) -> None:
    operator, sides = with_spectrum(np.logspace(-7, 0, 30), dtype=F32), normal(3, 30).to(F32)
    solver = ConjugateGradient(1e-12, block=block)
    report = solver.solve(operator, 1e-7, sides, None, "").report
    assert report.outcome.tolist() == [STAGNATED] * 3
    assert (report.residual > 1e-12).all()
    with pytest.warns(NotConverged, match=r"3 of 3 solves missed the tolerance \(3 stagnated\).*residual is \d"):
        IterativeInverse(operator, 1e-7, solver).apply(sides)


@pytest.mark.parametrize(
    "solver",
    [ConjugateGradient(1e-9), ConjugateGradient(1e-9, block=True), BlockKrylovSolver(1e-9, 150)],
    ids=["each by itself", "block", "krylov"],
)
@pytest.mark.parametrize("columns", [1, 4])
def test_a_residual_that_rises_before_it_falls_is_no_stagnation(solver: Any, columns: int) -> None:
    operator, sides = with_spectrum(np.logspace(-5, 0, 120)), normal(columns, 120)
    solution = solver.solve(operator, 1e-5, sides, None, "")
    assert solution.report.converged.all()
    assert (true_residual(operator, 1e-5, solution.x, sides) < 3e-9).all()


def test_a_direction_without_any_curvature_is_a_breakdown_of_its_column_alone() -> None:
    operator = DenseOperator(torch.diag(torch.tensor([1.0, 2.0, 0.0], dtype=F64)), psd=True)
    sides = torch.tensor([[0.0, 0.0, 1.0], [1.0, 1.0, 0.0]], dtype=F64)
    report = ConjugateGradient(1e-10).solve(operator, 0.0, sides, None, "").report
    assert report.outcome.tolist() == [BROKEN, CONVERGED]
    assert report.residual[0] == 1.0


@pytest.mark.parametrize("condition", [1e1, 1e3, 1e5])
@pytest.mark.parametrize("solver", [ConjugateGradient(), ConjugateGradient(block=True), BlockKrylovSolver()], ids=repr)
def test_the_residual_that_is_reported_in_float32_is_the_true_one(solver: Any, condition: float) -> None:
    """In float64, at the default tolerance: within a factor of three, or both below it.

    At condition 1e5, where rounding hides the tolerance, the residual that CG carries along drifts: a factor of eight.
    """
    operator = with_spectrum(np.logspace(-np.log10(condition), 0, 50), dtype=F32)
    sides, damping = normal(6, 50).to(F32), 1.0 / condition
    solution = solver.solve(operator, damping, sides, None, "")
    true, tolerance = true_residual(operator, damping, solution.x, sides), float(np.finfo(np.float32).eps) ** 0.5
    if condition < 1e4:
        assert solution.report.converged.all()
    allowed = (3 if condition < 1e4 else 8) * solution.report.residual
    assert (true <= np.maximum(allowed, tolerance)).all()


# Indefinite curvature -------------------------------------------------------------------------------------------------


@solvers
def test_negative_curvature_is_refused_and_the_damping_named_in_the_error_works(solver: Any) -> None:
    operator, sides = with_spectrum(np.linspace(-0.5, 2.0, 30)), normal(3, 30)
    with pytest.raises(IndefiniteCurvature, match="curvature='ggn'") as refused:
        solver.solve(operator, 0.3, sides, None, "")
    named = named_number(str(refused.value), r"[Aa] damping (?:of|above) ")
    assert 0.5 <= named <= 0.6
    assert_close(solver.solve(operator, named, sides, None, "").x, exact(operator, named, sides), 1e6)


def test_negative_curvature_that_is_allowed_is_solved_for() -> None:
    """Although a residual may grow on the way."""
    operator, sides = with_spectrum(np.linspace(-0.51, 2.0, 30)), normal(3, 30)
    for helper in (None, DiagonalOperator(torch.linspace(0.5, 2, 30, dtype=F64))):
        whole = BlockKrylovSolver(1e-10, 100, allow_indefinite=True).solve(operator, 0.1, sides, helper, "")
        assert whole.report.converged.all()
        assert_close(whole.x, exact(operator, 0.1, sides), 1e6)


def test_a_nystroem_sketch_of_an_indefinite_hessian_is_refused_with_advice() -> None:
    operator = with_spectrum(np.linspace(-1.0, 2.0, 20))
    with pytest.raises(IndefiniteCurvature, match=r"it has met -\d.*curvature='ggn' or a Fisher, or Arnoldi"):
        fit_nystroem(operator, operator.matrix, rank=15, seed=0)


# Block conjugate gradients --------------------------------------------------------------------------------------------


def test_one_space_for_all_columns_needs_fewer_steps_and_no_more_products() -> None:
    operator, sides = with_spectrum(np.logspace(-3, 0, 60)), normal(8, 60)
    alone, together = (solver.solve(operator, 1e-3, sides, None, "").report for solver in CG.values())
    assert together.products <= alone.products
    assert together.iterations.max() < alone.iterations.max() / 2


@pytest.mark.parametrize("solver", [CG["block"], SOLVERS["krylov"]], ids=["block", "krylov"])
def test_columns_that_repeat_or_depend_on_each_other_do_no_harm(solver: Any) -> None:
    operator, few = with_spectrum(np.logspace(-2, 0, 40)), normal(2, 40)
    many = torch.cat([few, few, few[:1] - 3 * few[1:], 1e-6 * few, torch.zeros(1, 40, dtype=F64)])
    less, more = (solver.solve(operator, 0.01, sides, None, "") for sides in (few, many))
    assert_close(more.x, exact(operator, 0.01, many), 1e4)
    if solver is SOLVERS["krylov"]:
        assert more.report.products == less.report.products
    alone = CG["each by itself"].solve(operator, 0.01, many, None, "").report
    assert more.report.products <= alone.products


@solvers
def test_more_columns_than_dimensions(solver: Any) -> None:
    operator, sides = with_spectrum(np.logspace(-2, 0, 6)), normal(15, 6)
    solution = solver.solve(operator, 0.01, sides, None, "")
    assert_close(solution.x, exact(operator, 0.01, sides), 1e4)
    if solver is not CG["each by itself"]:
        assert solution.report.products <= 6 * 2


# Shared Krylov spaces -------------------------------------------------------------------------------------------------


def test_the_residual_is_orthogonal_to_the_space() -> None:
    operator, sides = with_spectrum(np.logspace(-3, 0, 50)), normal(3, 50)
    solution = BlockKrylovSolver(0.0, 5).solve(operator, 1e-3, sides, None, "")
    rest = sides - solution.x @ operator.matrix - 1e-3 * solution.x
    assert rest.norm() > 0.1 * sides.norm()
    powers, space = sides, []
    for _ in range(5):
        space.append(powers)
        powers = powers @ operator.matrix
    basis = torch.linalg.qr(torch.cat(space).T)[0]
    assert float((rest @ basis).abs().max()) < 1e-8 * float(rest.norm())


@pytest.mark.parametrize("helped", [False, True])
def test_the_damping_path_is_a_fresh_solve_at_every_damping(helped: bool) -> None:
    """With a preconditioner the space is the first damping's: the others' residuals are true, but not the least."""
    operator, sides = with_spectrum(np.logspace(-3, 0, 50)), normal(3, 50)
    helper = DiagonalOperator(operator.matrix.diagonal()).inverse(0.01) if helped else None
    solver, dampings = BlockKrylovSolver(0.0, 6), [1e-3, 1e-2, 0.1, 1.0]
    counted = Counted(operator)
    path = solver.solve_path(counted, dampings, sides, helper, "")
    assert counted.vectors == 6 * 3
    for damping, solution in zip(dampings, path, strict=True):
        if damping == dampings[0] or helper is None:
            fresh = solver.solve(operator, damping, sides, helper, "")
            assert_close(solution.x, fresh.x, 1e4)
            np.testing.assert_allclose(solution.report.residual, fresh.report.residual, rtol=1e-9)
        true = true_residual(operator, damping, solution.x, sides)
        np.testing.assert_allclose(solution.report.residual, true, rtol=1e-8)


@pytest.mark.parametrize("dtype", [F64, F32])
def test_residuals_are_true_down_to_rounding(dtype: torch.dtype) -> None:
    """Not to the root of rounding only, where the squares of nearly equal lengths are subtracted."""
    operator, sides = with_spectrum(np.logspace(-3, 0, 40), dtype=dtype), normal(2, 40).to(dtype)
    eps, seen = float(torch.finfo(dtype).eps), []
    for m in (2, 6, 10, 14, 40):
        solution = BlockKrylovSolver(0.0, m).solve(operator, 1e-2, sides, None, "")
        true = true_residual(operator, 1e-2, solution.x, sides)
        assert (true <= 3 * solution.report.residual + 10 * eps).all()
        assert (solution.report.residual <= 3 * true + 1e3 * eps).all()
        seen.append(float(true.max()))
    assert seen[-1] < 1e4 * eps < seen[0]
    report = BlockKrylovSolver(1e3 * eps).solve(operator, 1e-2, sides, None, "").report
    assert report.converged.all()


def test_a_space_that_ends_before_it_holds_the_right_hand_sides_goes_on_from_what_is_left() -> None:
    operator, sides = with_spectrum([0.0] * 30 + [1.0, 2, 3, 4, 5]), normal(3, 35)
    helper = DiagonalOperator(torch.logspace(-1, 1, 35, dtype=F64))
    solution = BlockKrylovSolver(1e-10).solve(operator, 0.1, sides, helper, "")
    assert solution.report.converged.all()
    assert_close(solution.x, exact(operator, 0.1, sides), 1e4)


def test_a_bound_on_memory_splits_the_columns_into_groups_with_the_same_answers() -> None:
    operator, sides = with_spectrum(np.logspace(-2, 0, 40)), normal(7, 40)
    whole = BlockKrylovSolver(1e-10).solve(operator, 0.01, sides, None, "b")
    memory = 3 * 10 * 40 * 8  # the basis of three columns
    seen: list[int] = []

    class Watched(Counted):
        def _apply(self, tensor: Any) -> Any:
            seen.append(int(tensor.shape[0]))
            return super()._apply(tensor)

    split = BlockKrylovSolver(1e-10, memory=memory)
    parts = split.solve(Watched(operator), 0.01, sides, None, "b")
    assert max(seen) == 3 and seen[-1] == 1  # three, three and one
    assert parts.report.residual.shape == (7,)
    for solution in (whole, parts):
        gap = (solution.x - exact(operator, 0.01, sides)).norm(dim=1)
        assert (gap.numpy() <= solution.report.residual / 0.01 * sides.norm(dim=1).numpy() + 1e-12).all()
    assert whole.report.converged.all()
    assert int(parts.report.products) > int(whole.report.products)


def test_a_basis_on_disk_gives_the_same_and_leaves_nothing_behind(tmp_path: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    operator, sides = with_spectrum(np.logspace(-2, 0, 40)), normal(4, 40)
    seen: list[int] = []

    class Watched(Counted):
        def _apply(self, tensor: Any) -> Any:
            seen.append(sum(len(files) for _, _, files in os.walk(tmp_path)))
            return super()._apply(tensor)

    there, here = (
        BlockKrylovSolver(1e-10, on_disk=on_disk).solve(Watched(operator), 0.01, sides, None, "")
        for on_disk in (True, False)
    )
    assert max(seen) > 3
    assert_close(there.x, here.x)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(IndefiniteCurvature):
        BlockKrylovSolver(on_disk=True).solve(with_spectrum(np.linspace(-1, 1, 20)), 0.1, normal(2, 20), None, "")
    assert list(tmp_path.iterdir()) == []


# Descent --------------------------------------------------------------------------------------------------------------


def test_a_diverging_lissa_names_a_scale_that_converges() -> None:
    operator, sides = with_spectrum(np.logspace(-1, 1, 20)), normal(3, 20)
    stepped = SteppedOperator(operator, [])
    with pytest.raises(Diverged, match=r"Diverged at step \d+ with a step size of 0\.5") as refused:
        Descent(400, 0.5).solve(stepped, 0.1, sides, None, "")
    scale = named_number(str(refused.value), "try scale=")
    assert scale > (10.0 + 0.1) / 2
    solution = Descent(4000, 1.0 / scale).solve(stepped, 0.1, sides, None, "")
    assert_close(solution.x, exact(operator, 0.1, sides), 1e4)
    np.testing.assert_allclose(solution.report.residual, true_residual(operator, 0.1, solution.x, sides), atol=1e-12)


def test_a_diverging_preconditioned_descent_names_a_smaller_step() -> None:
    operator, sides = with_spectrum(np.logspace(-1, 1, 20)), normal(3, 20)
    stepped, helper = SteppedOperator(operator, []), DiagonalOperator(torch.full((20,), 0.2, dtype=F64))
    with pytest.raises(Diverged, match=r"less momentum than 0\.5") as refused:
        Descent(400, 2.5, 0.5).solve(stepped, 0.1, sides, helper, "")
    smaller = named_number(str(refused.value), "Try step_size=")
    assert smaller < 2.5
    Descent(50, smaller, 0.5).solve(stepped, 0.1, sides, helper, "")


def test_descent_reports_the_residual_of_all_rows_and_the_steps_that_were_asked_for() -> None:
    parts = [with_spectrum(np.logspace(-1, 0, 12), seed=k) for k in range(3)]
    whole = DenseOperator(sum(part.matrix for part in parts) / 3, psd=True)
    sides, x = normal(2, 12), normal(2, 12) * 0
    solution = Descent(7, 0.4, 0.3).solve(SteppedOperator(whole, parts), 0.2, sides, None, "")
    x, move = 0.4 * sides, 0.0
    for k in range(7):
        move = 0.3 * move + 0.4 * (sides - x @ parts[k % 3].matrix - 0.2 * x)
        x = x + move
    assert_close(solution.x, x)
    np.testing.assert_allclose(solution.report.residual, true_residual(whole, 0.2, x, sides), rtol=1e-10)
    assert solution.report.outcome.tolist() == [FINISHED] * 2 and solution.report.converged.all()
    assert solution.report.iterations.tolist() == [7, 7]


def test_the_steepness_is_a_little_above_the_largest_eigenvalue_of_the_preconditioned_curvature() -> None:
    operator, helper = with_spectrum(np.logspace(-2, 1, 25)), DiagonalOperator(torch.linspace(0.5, 3, 25, dtype=F64))
    both = helper.diagonal[:, None] * (operator.matrix + 0.1 * torch.eye(25, dtype=F64))
    top = float(torch.linalg.eigvals(both).real.max())
    assert top <= steepness(operator, 0.1, helper, sign_vectors(1, 25, both, seed=0, stream=3), 40) <= 1.2 * top


# Eigenvalues ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [np.linspace(-1, 3, 80), np.logspace(-6, 2, 80), np.repeat([-2.0, 0.5, 4.0], 20), [1.0, 5.0]],
    ids=["even", "decades", "copies", "two"],
)
def test_bounds_of_the_spectrum_hold_the_true_ends(values: Any) -> None:
    operator, values = with_spectrum(values), np.asarray(values)
    counted = Counted(operator)
    bounds = extreme_eigenvalues(counted, normal(1, len(values), seed=3))
    size = np.abs(values).max()
    assert bounds.lowest >= values.min() - 1e-12 * size and bounds.highest <= values.max() + 1e-12 * size
    assert bounds.lowest - bounds.lowest_error <= values.min() + 1e-10 * size
    assert bounds.highest + bounds.highest_error >= values.max() - 1e-10 * size
    assert counted.vectors == bounds.products <= 61


def pairs(operator: DenseOperator, rank: int, start: int = 4, tolerance: float = 1e-10) -> EigenpairsOperator:
    signs = sign_vectors(start, operator.input_size, operator.matrix, seed=0, stream=4)
    return leading_eigenpairs(operator, signs, rank, tolerance=tolerance, max_products=10 * operator.input_size)


def check_pairs(operator: DenseOperator, found: EigenpairsOperator, values: Any, rank: int) -> None:
    """Those that are not zero: of zeros, none needs to be found."""
    values, got = np.asarray(values), found.values.numpy()
    size = np.abs(values).max()
    expected = np.sort(values[np.argsort(-np.abs(values), kind="stable")[:rank]])
    got, expected = (np.sort(some[np.abs(some) > 1e-9 * size]) for some in (got, expected))
    np.testing.assert_allclose(got, expected, atol=1e-9 * size)
    assert_close(found.vectors @ found.vectors.T, torch.eye(len(found.values), dtype=F64), 1e3)
    image, scaled = found.vectors @ operator.matrix, found.values[:, None] * found.vectors
    assert float((image - scaled).abs().max()) <= 1e-9 * np.abs(values).max()


@pytest.mark.parametrize(
    "values",
    [
        np.linspace(-2.03, 3, 60),
        np.logspace(-5, 0, 60),
        np.concatenate([[5.0, 5 - 1e-7, 5 - 2e-7, -4.0, -4.0], np.linspace(0, 1, 55)]),
        np.repeat([7.0, -5.0, 3.0, 2.0, 1.0], 12),
        np.concatenate([np.full(10, 3.0), np.zeros(50)]),
    ],
    ids=["even", "decades", "clusters", "twelve copies each", "ten copies and zero"],
)
@pytest.mark.parametrize("rank", [5, 11, 60])
def test_leading_eigenpairs_are_the_largest_in_magnitude(values: Any, rank: int) -> None:
    operator = with_spectrum(values)
    check_pairs(operator, pairs(operator, rank), values, rank)


def test_an_exhausted_space_gives_what_there_is() -> None:
    operator = with_spectrum([3.0, 2.0, 1.0])
    check_pairs(operator, pairs(operator, 50), [3.0, 2.0, 1.0], 3)
    low = with_spectrum([4.0, 2.0] + [0.0] * 38)
    found = pairs(low, 10)
    np.testing.assert_allclose(np.sort(found.values.numpy())[-2:], [2.0, 4.0])
    assert_close(found.dense(low.matrix), low.matrix, 1e3)
    check_pairs(with_spectrum([2.5] * 9), pairs(with_spectrum([2.5] * 9), 9), [2.5] * 9, 9)
    zero = with_spectrum([0.0] * 9)
    assert_close(pairs(zero, 9).dense(zero.matrix), zero.matrix)


def test_products_are_bounded_and_the_pairs_are_then_as_good_as_the_space() -> None:
    operator = with_spectrum(np.logspace(-2, 0, 80))
    counted = Counted(operator)
    signs = sign_vectors(4, 80, operator.matrix, seed=0, stream=4)
    with pytest.warns(NotConverged, match=r"Block 'b': after 20 products 10 of 10 leading.*max_products=40"):
        found = leading_eigenpairs(counted, signs, 10, tolerance=1e-12, max_products=20, label="b")
    assert counted.vectors == 20 and found.values.shape == (10,)
    assert float(found.values.max()) <= 1.0 + 1e-12


def test_a_space_is_orthonormal_and_its_ritz_errors_are_true() -> None:
    operator = with_spectrum(np.linspace(-1, 2, 40))
    space = KrylovSpace(operator, normal(3, 40))
    for _ in range(5):
        space.extend()
    values, vectors, errors = space.ritz()
    basis = space.combine(np.eye(space.size))
    assert_close(basis @ basis.T, torch.eye(space.size, dtype=F64))
    assert_close(basis @ operator.matrix @ basis.T, space.projected())
    ritz = space.combine(vectors.T)
    true = (ritz @ operator.matrix - torch.as_tensor(values)[:, None] * ritz).norm(dim=1)
    assert_close(errors, true, 1e2)


# Sketches -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [3, 4, 8, 40])
def test_a_sketch_as_wide_as_the_curvature_is_the_curvature(size: int) -> None:
    """Also in few dimensions, where random signs are often dependent."""
    operator = with_spectrum(np.logspace(-2, 0, size))
    for seed in range(6):
        assert_close(
            fit_nystroem(operator, operator.matrix, rank=size, seed=seed).dense(operator.matrix), operator.matrix, 1e4
        )


def test_a_sketch_is_never_above_the_curvature_and_grows_with_its_rank() -> None:
    operator, last = with_spectrum(np.logspace(-3, 0, 30)), torch.zeros(30, 30, dtype=F64)
    for rank in (3, 8, 20):
        sketch = fit_nystroem(operator, operator.matrix, rank=rank, seed=1).dense(operator.matrix)
        for difference in (operator.matrix - sketch, sketch - last):
            assert float(torch.linalg.eigvalsh(difference)[0]) > -1e-8
        last = sketch
    assert float(torch.trace(last)) > 0.9 * operator.trace()


def test_sign_vectors_are_the_same_whatever_their_number_and_differ_by_seed_and_stream() -> None:
    like = torch.zeros(1, dtype=F64)
    many, few = (sign_vectors(n, 300, like, seed=5, stream=1) for n in (9, 2))
    assert torch.equal(many[:2], few) and set(few.unique().tolist()) == {-1.0, 1.0}
    for other in (sign_vectors(2, 300, like, seed=6, stream=1), sign_vectors(2, 300, like, seed=5, stream=2)):
        assert 0.35 < float((other == few).double().mean()) < 0.65
    assert float((many @ many.T / 300 - torch.eye(9)).abs().max()) < 0.25


# Orthonormal rows -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize("gap", [1e-1, 1e-3, 1e-5])
def test_rows_that_nearly_depend_on_each_other_become_orthonormal(dtype: torch.dtype, gap: float) -> None:
    rows = normal(1, 60).repeat(5, 1) + gap * normal(5, 60, seed=1)
    basis = orthonormal(rows.to(dtype))
    eps = float(torch.finfo(dtype).eps)
    assert float((basis @ basis.T - torch.eye(len(basis), dtype=dtype)).abs().max()) < 50 * eps
    rest = rows.to(dtype).double() - rows.to(dtype).double() @ basis.double().T @ basis.double()
    assert float(rest.norm(dim=1).max()) < 1e3 * eps * float(rows.norm(dim=1).max())
    against = orthonormal(normal(7, 60, seed=2).to(dtype))
    more = orthonormal(rows.to(dtype), [against[:4], against[4:]])
    both = torch.cat([against, more])
    assert float((both @ both.T - torch.eye(len(both), dtype=dtype)).abs().max()) < 50 * eps


@pytest.mark.parametrize("dtype", [F64, F32])
def test_zero_rows_repeated_rows_and_more_rows_than_numbers_add_nothing(dtype: torch.dtype) -> None:
    rows = normal(3, 10).to(dtype)
    zero = torch.zeros(2, 10, dtype=dtype)
    assert orthonormal(zero).shape == (0, 10)
    assert orthonormal(torch.cat([rows, zero, rows, 1e-3 * rows])).shape == (3, 10)
    assert orthonormal(normal(25, 10, seed=4).to(dtype)).shape == (10, 10)
    assert orthonormal(rows, [orthonormal(rows)]).shape[0] == 0
    assert orthonormal(rows[:0]).shape == (0, 10)


# Reports --------------------------------------------------------------------------------------------------------------


def test_reports_come_in_order_and_contexts_nest() -> None:
    operator, solver = with_spectrum(np.logspace(-1, 0, 8)), ConjugateGradient(1e-10)
    first, second = (IterativeInverse(operator, 0.1, solver, label=label) for label in ("a", "b"))
    with recorded_solves() as outer:
        first.apply(normal(2, 8))
        with recorded_solves() as inner:
            second.apply(normal(8))
            first.apply(normal(3, 8))
        second.apply(normal(4, 8))
    second.apply(normal(1, 8))
    assert [(r.label, len(r.residual)) for r in inner] == [("b", 1), ("a", 3)]
    assert [(r.label, len(r.residual)) for r in outer] == [("a", 2), ("b", 1), ("a", 3), ("b", 4)]
    together = joined(outer)
    assert list(together) == ["a", "b"]
    assert len(together["a"].residual) == len(together["a"].outcome) == len(together["a"].iterations) == 5
    assert together["b"].products == outer[1].products + outer[3].products
    assert together["a"].residual.tolist() == [*outer[0].residual, *outer[2].residual]
    assert joined([]) == {}


def test_reports_are_kept_when_the_body_fails() -> None:
    operator = with_spectrum(np.logspace(-1, 0, 8))
    with recorded_solves() as outer, pytest.raises(KeyError), recorded_solves():
        IterativeInverse(operator, 0.1, ConjugateGradient()).apply(normal(2, 8))
        raise KeyError
    assert len(outer) == 1


def test_an_inverse_that_is_solved_for_keeps_shapes_and_has_no_trace() -> None:
    operator = with_spectrum(np.logspace(-1, 0, 8))
    inverse = IterativeInverse(operator, 0.1, ConjugateGradient(1e-12))
    vectors = normal(2, 3, 8)
    assert_close(inverse.apply(vectors), exact(operator, 0.1, vectors.reshape(6, 8)).reshape(2, 3, 8), 1e3)
    assert_close(inverse.apply(vectors[0, 0]), exact(operator, 0.1, vectors[0, :1])[0], 1e3)
    assert_close(inverse.adjoint().apply(vectors), inverse.apply(vectors))
    with pytest.raises(NotImplementedError):
        inverse.trace()


def test_solves_work_in_numpy_too() -> None:
    matrix, sides = with_spectrum(np.logspace(-2, 0, 20)).matrix.numpy(), normal(4, 20).numpy()
    operator = DenseOperator(matrix, psd=True)
    expected = np.linalg.solve(matrix + 0.01 * np.eye(20), sides.T).T
    for solver in SOLVERS.values():
        assert_close(solver.solve(operator, 0.01, sides, None, "").x, expected, 1e5)
    stepped = Descent(3000, 0.9).solve(SteppedOperator(operator, []), 0.01, sides, None, "")
    assert_close(stepped.x, expected, 1e5)
    assert_close(fit_nystroem(operator, matrix, rank=20, seed=0).dense(matrix), matrix, 1e4)
    start = sign_vectors(4, 20, matrix, seed=0, stream=4)
    whole = leading_eigenpairs(operator, start, 20, tolerance=1e-12, max_products=200)
    assert_close(whole.dense(matrix), matrix, 1e3)


# Both sides of a pair -------------------------------------------------------------------------------------------------

SIDED = {
    "arnoldi": hw.Arnoldi(rank=4),
    "arnoldi alone": hw.Arnoldi(rank=4, complement=False),
    "arnoldi of a hessian": hw.Arnoldi(rank=4, curvature="hessian", allow_indefinite=True),
    "nystroem": hw.Nystroem(rank=4),
    "dual": hw.Dual(),
    "dual of the ggn": hw.Dual("ggn"),
    "datainf": hw.DataInf(),
    "cg": hw.Cg(tolerance=1e-12),
}


@pytest.mark.parametrize("method", SIDED.values(), ids=SIDED)
@pytest.mark.parametrize("case", ["mlp", "signals", "sentences"])
@pytest.mark.parametrize("structure", ["full", "parameter"])
def test_pairs_meet_in_the_same_scores_on_every_route(case: str, method: Any, structure: str) -> None:
    """Factors, `influences`, `attribute` and `self_influence`."""
    found = truth_of(case).case
    influence = fitted(found, method, structure, damping=0.2)
    train, queries = found.loader(3), [(found.x_query, found.y_query)]
    factors = influence.influence_factors(found.x_query, found.y_query)
    expected = influence.influences_from_factors(factors, found.x, found.y)
    assert_close(influence.influences(found.x_query, found.y_query, found.x, found.y), expected, 1e4)
    assert_close(influence.attribute(train, queries).values, expected, 1e4)
    own = influence.influences_from_factors(influence.influence_factors(found.x, found.y), found.x, found.y)
    assert_close(influence.self_influence(train), torch.diagonal(own), 1e4)


def test_gradients_along_few_directions_never_get_all_their_numbers() -> None:
    """The point of both sides: a pair meets in its outer products and in rank numbers more."""
    found = truth_of("mlp").case
    influence = fitted(found, hw.Arnoldi(rank=2), "layer", damping=0.2)
    grads = influence.provider.grads(found.loader(11)[0] and influence.provider.as_batch(found.x, found.y))
    for name, value in grads.items():
        left, right = influence.block_mapper.operators[name].block_sides(value, 1.0)
        for side in (left, right):
            seen = side.apply_block(value)
            assert [type(part).__name__ for part in seen.parts] == ["Outer", "Dense"]
            assert seen.parts[-1].shape == (1, 2)


def test_without_damping_a_low_rank_inverse_is_refused() -> None:
    leading = EigenpairsOperator(torch.tensor([1.0, 2.0], dtype=F64), rotation(5)[:2])
    with pytest.raises(SingularOperator, match="more damping"):
        leading.inverse(0.0)
    matrix = leading.inverse(0.0, complement=False).dense(leading.vectors)
    assert_close(matrix, torch.linalg.pinv(leading.dense(leading.vectors)), 1e2)


def test_solves_are_of_the_last_call_of_this_thread_and_copies_have_none():
    case = mlp()
    influence = fitted(case, hw.Cg(), "full", damping=0.5)
    influence.influences(case.x_query, case.y_query, case.x, case.y)
    mine = influence.solves
    assert mine["full"].residual.size == len(case.y_query)
    with ThreadPoolExecutor(1) as other:
        assert other.submit(lambda: influence.solves).result() == {}
        other.submit(influence.influences, case.x_query[:1], case.y_query[:1], case.x, case.y).result()
        assert other.submit(lambda: influence.solves["full"].residual.size).result() == 1
    assert influence.solves is mine
    assert copy.deepcopy(influence).solves == {} == influence.with_damping(1.0).solves
