"""Closed forms: what influence must equal where the answer is known without it; then the oracle against itself."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from models import CASES, images, mlp, sentences, signals
from torch import nn
from truth import Truth, assert_close, fitted

import headwater as hw
from headwater.torch import TorchComposableInfluence

# Least squares --------------------------------------------------------------------------------------------------------


def design(rows: int = 12, columns: int = 4) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    return random.normal(size=(rows, columns)), random.normal(size=rows)


def half_square(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return 0.5 * (output[:, 0] - target).square().mean()


def solve_ridge(x: np.ndarray, y: np.ndarray, ridge: float) -> np.ndarray:
    """Minimises the sum of halved squares plus ridge / 2 |w|^2."""
    return np.linalg.solve(x.T @ x + ridge * np.eye(x.shape[1]), x.T @ y)


def linear_influence(x: np.ndarray, y: np.ndarray, w: np.ndarray, damping: float, method: Any) -> Any:
    model = nn.Linear(x.shape[1], 1, bias=False).double().eval()
    with torch.no_grad():
        model.weight.copy_(torch.as_tensor(w)[None])
    rows = (torch.as_tensor(x), torch.as_tensor(y))
    influence = TorchComposableInfluence(model, half_square, method, damping=damping, likelihood="squared_error")
    return influence.fit([tuple(t[:5] for t in rows), tuple(t[5:] for t in rows)]), rows


@pytest.mark.parametrize(
    "method", [hw.Direct("ggn"), hw.Direct("hessian"), hw.Direct("fisher"), hw.Kfac(), hw.Ekfac()], ids=repr
)
@pytest.mark.parametrize("ridge", [0.0, 0.5, 5.0])
def test_leave_one_out_of_least_squares_is_influence_over_one_minus_leverage(ridge: float, method: Any) -> None:
    """The change of the prediction, exactly; the ridge of the sum is the damping of the mean, times n."""
    (x, y), query = design(), np.random.default_rng(1).normal(size=(3, 4))
    n, w = len(y), solve_ridge(*design(), ridge)
    influence, rows = linear_influence(x, y, w, ridge / n, method)
    leverage = np.einsum("ni,ij,nj->n", x, np.linalg.inv(x.T @ x + ridge * np.eye(4)), x)
    targets = np.zeros(3)
    scores = influence.influences(torch.as_tensor(query), torch.as_tensor(targets), *rows).numpy() / n
    for k in range(n):
        without = solve_ridge(np.delete(x, k, axis=0), np.delete(y, k), ridge)
        moved = query @ (without - w)  # the change of the prediction
        slope = query @ w - targets  # d loss / d prediction
        assert_close(scores[:, k] / (1 - leverage[k]), slope * moved, 1e2)


def test_self_influence_gives_the_leverage() -> None:
    x, y = design()
    n, w = len(y), solve_ridge(x, y, 0.0)
    influence, rows = linear_influence(x, y, w, 0.0, hw.Direct("ggn"))
    leverage = np.einsum("ni,ij,nj->n", x, np.linalg.inv(x.T @ x), x)
    assert_close(influence.self_influence([rows]) / n, leverage * (x @ w - y) ** 2, 1e2)


def test_a_group_left_out_of_least_squares_has_a_closed_form_too() -> None:
    x, y = design()
    w, group = solve_ridge(x, y, 0.0), [1, 4, 7]
    influence, _ = linear_influence(x, y, w, 0.0, hw.Direct("ggn"))
    eye = torch.eye(4, dtype=torch.float64)
    inverse = influence.block_mapper.operators["root"].apply(eye).numpy() / len(y)
    hat = x[group] @ inverse @ x[group].T
    residual = np.linalg.solve(np.eye(3) - hat, x[group] @ w - y[group])
    without = solve_ridge(np.delete(x, group, axis=0), np.delete(y, group), 0.0)
    assert_close(w + inverse @ x[group].T @ residual, without, 1e2)


def test_scores_over_all_train_rows_add_up_to_the_damping_term_at_a_stationary_point() -> None:
    """With ridge in the objective, sum_n g_n = -ridge w: the scores add up to -ridge g_q^T (H + ridge / n)^-1 w."""
    x, y = design()
    n, ridge = len(y), 2.0
    w = solve_ridge(x, y, ridge)
    influence, rows = linear_influence(x, y, w, ridge / n, hw.Direct("ggn"))
    query, target = np.random.default_rng(2).normal(size=(3, 4)), np.ones(3)
    scores = influence.influences(torch.as_tensor(query), torch.as_tensor(target), *rows).numpy()
    slope = (query @ w - target)[:, None] * query
    expected = -ridge * slope @ np.linalg.solve(x.T @ x / n + ridge / n * np.eye(4), w)
    assert np.abs(expected).max() > 0.1
    assert_close(scores.sum(1), expected, 1e2)
    free, rows = linear_influence(x, y, solve_ridge(x, y, 0.0), 0.3, hw.Direct("ggn"))
    sums = free.influences(torch.as_tensor(query), torch.as_tensor(target), *rows).numpy().sum(1)
    assert np.abs(sums).max() < 1e-12 * np.abs(expected).max()


def test_a_newton_step_from_anywhere_is_the_sum_of_scores() -> None:
    """For a quadratic, the scores of all rows on a query add up to the linear decrease along the Newton step."""
    x, y = design()
    w = np.random.default_rng(3).normal(size=4)
    influence, rows = linear_influence(x, y, w, 0.0, hw.Direct("ggn"))
    query, target = np.random.default_rng(4).normal(size=(2, 4)), np.zeros(2)
    step = w - solve_ridge(x, y, 0.0)
    slope = (query @ w - target)[:, None] * query
    scores = influence.influences(torch.as_tensor(query), torch.as_tensor(target), *rows).numpy()
    assert_close(scores.sum(1) / len(y), slope @ step, 1e2)


# Curvatures that coincide ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), nn.MSELoss()], ids=lambda v: type(v).__name__)
def test_ggn_is_the_hessian_of_a_model_that_is_linear_in_its_parameters(loss: nn.Module) -> None:
    class Features(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(torch.sin(x))

    case = mlp()
    torch.manual_seed(0)
    model, y = Features().double().eval(), case.y if isinstance(loss, nn.CrossEntropyLoss) else torch.sin(case.x * 3)
    fits = [
        TorchComposableInfluence(model, loss, hw.Direct(kind), blocks="full", damping=0.1).fit([(case.x, y)])
        for kind in ("hessian", "ggn", "fisher")
    ]
    matrices = [fit._fitted.curvature["full"].matrix for fit in fits]
    assert matrices[0].norm() > 0.1
    assert_close(matrices[1], matrices[0])
    assert_close(matrices[2], matrices[0])
    truth = oracle.hessian(model, loss, case.x, y, oracle.trainable(model))
    assert_close(matrices[0], truth)


@pytest.mark.parametrize("bias", [True, False])
def test_kfac_is_the_ggn_of_one_linear_layer_under_a_squared_loss(bias: bool) -> None:
    random = torch.Generator().manual_seed(5)
    x, y = torch.randn(9, 3, generator=random).double(), torch.randn(9, 2, generator=random).double()
    model = nn.Linear(3, 2, bias=bias).double().eval()
    kfac = TorchComposableInfluence(model, nn.MSELoss(), hw.Kfac(), damping=0.1).fit([(x[:5], y[:5]), (x[5:], y[5:])])
    ggn = TorchComposableInfluence(model, nn.MSELoss(), hw.Direct("ggn"), damping=0.1).fit([(x, y)])
    ekfac = TorchComposableInfluence(model, nn.MSELoss(), hw.Ekfac(), damping=0.1).fit([(x, y)])
    eye = torch.eye(kfac.n_parameters, dtype=torch.float64)
    matrix = ggn._fitted.curvature["root"].matrix
    a = np.concatenate([x.numpy(), np.ones((9, 1))], axis=1) if bias else x.numpy()
    index = np.arange(6).reshape(2, 3)
    index = np.concatenate([index, [[6], [7]]], axis=1).ravel() if bias else index.ravel()
    assert_close(matrix.numpy()[np.ix_(index, index)], np.kron(np.eye(2), a.T @ a / 9))
    for other in (kfac, ekfac):
        assert_close(other._fitted.curvature["root"].apply(eye), matrix)
        assert_close(other.influences(x, y), ggn.influences(x, y), 1e3)


@cache
def fisher_matrices(case: str, structure: str) -> tuple[dict[str, torch.Tensor], ...]:
    """Fisher, KFAC and EKFAC of each block, as matrices; the empirical one, so that all passes see the same draws."""
    found = CASES[case]()
    matrices = []
    for method in (hw.Direct("empirical_fisher"), hw.Kfac(fisher="empirical"), hw.Ekfac(fisher="empirical")):
        curvature = fitted(found, method, structure)._fitted.curvature
        matrices.append({n: op.apply(torch.eye(op.input_size, dtype=torch.float64)) for n, op in curvature.items()})
        for name, op in curvature.items():
            assert float(torch.trace(matrices[-1][name])) == pytest.approx(op.trace(), rel=1e-10)
    return tuple(matrices)


LAYERS = [(case, "layer") for case in ("mlp", "images", "signals", "sentences")]


@pytest.mark.parametrize(("case", "structure"), [*LAYERS, ("mlp", "parameter")])
def test_the_trace_of_ekfac_is_the_fishers(case: str, structure: str) -> None:
    fisher, _, ekfac = fisher_matrices(case, structure)
    for name in fisher:
        assert_close(torch.trace(ekfac[name]), torch.trace(fisher[name]))


@pytest.mark.parametrize(("case", "structure"), LAYERS)
def test_ekfac_is_never_further_from_the_fisher_than_kfac(case: str, structure: str) -> None:
    fisher, kfac, ekfac = fisher_matrices(case, structure)
    closer = []
    for name, exact in fisher.items():
        far, near = (torch.linalg.norm(m[name] - exact) for m in (kfac, ekfac))
        assert near <= far + 1e-12 * torch.linalg.norm(exact)
        closer.append(bool(near < 0.99 * far))
    assert any(closer)


# Scale ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method",
    [hw.Direct("hessian", allow_indefinite=True), hw.Direct("ggn"), hw.Direct("fisher"), hw.Kfac(), hw.Ekfac()],
    ids=repr,
)
def test_a_loss_times_c_has_scores_times_c_at_relative_damping(method: Any) -> None:
    """Curvature of second derivatives grows like c, gradients on both sides like c: c c / c."""
    case, c = signals(), 7.0
    if isinstance(method, hw.Direct) and method.curvature == "hessian":
        case = mlp()

    def scaled(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return c * case.loss(output, target)

    def influence(loss: Any, likelihood: str | None) -> torch.Tensor:
        made = TorchComposableInfluence(case.model, loss, method, damping=hw.relative(0.1), likelihood=likelihood)
        return made.fit(case.loader()).influences(case.x_query, case.y_query, case.x, case.y)

    assert_close(influence(scaled, "squared_error"), c * influence(case.loss, None), 1e4)


@pytest.mark.parametrize(
    "method", [hw.Direct("empirical_fisher"), hw.Kfac(fisher="empirical"), hw.Ekfac(fisher="empirical")], ids=repr
)
def test_the_empirical_fisher_does_not_see_the_scale_of_the_loss(method: Any) -> None:
    """It grows like c squared, as the product of two gradients does."""
    case, scores = mlp(), []
    for c in (1.0, 7.0):
        made = TorchComposableInfluence(
            case.model, lambda o, t, c=c: c * case.loss(o, t), method, damping=hw.relative(0.1)
        )
        scores.append(made.fit(case.loader()).influences(case.x_query, case.y_query, case.x, case.y))
    assert_close(scores[1], scores[0], 1e4)


# The dual side --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1e-3, 0.1, 1.0])
def test_the_primal_scores_are_the_dual_ones(factor: float) -> None:
    """(G^T G / n + damping)^-1 through the n x n Gram matrix, by Woodbury's identity."""
    truth, method = Truth(images()), hw.Direct("empirical_fisher")
    case, g, query = truth.case, truth.train_grads, truth.query_grads
    damping = truth.absolute(method, "full", factor)["full"]
    n, gram = len(g), g @ g.T
    dual = (query @ g.T - query @ g.T @ np.linalg.solve(gram + n * damping * np.eye(n), gram)) / damping
    influence = fitted(case, method, "full", damping=hw.relative(factor))
    assert_close(influence.influences(case.x_query, case.y_query, case.x, case.y), dual, 1e4 / factor)


def test_perturbation_scores_are_the_derivative_of_scores_by_the_train_input() -> None:
    """Central differences of the scores, with the operator held fixed; no second derivative is asked of autograd."""
    case, step = signals(), 1e-5
    for method in (hw.GradDot(), hw.GradCos(), hw.Ekfac(), hw.Direct("ggn")):
        influence = fitted(case, method, "layer", damping=hw.relative(0.1))
        mixed = influence.influences(case.x_query, case.y_query, case.x, case.y, mode="perturbation")
        for position in ((0, 0), (1, 3), (1, 6)):
            moved = []
            for sign in (1, -1):
                x = case.x.clone()
                x[(slice(None), *position)] += sign * step
                moved.append(influence.influences(case.x_query, case.y_query, x, case.y))
            difference = (moved[0] - moved[1]) / (2 * step)
            gap = (mixed[(slice(None), slice(None), *position)] - difference).abs().max()
            assert gap < 1e-7 * max(1.0, float(difference.abs().max()))


# The oracle against itself --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [mlp, images, signals, sentences])
def test_the_oracles_inputs_and_output_gradients_make_up_the_gradient(make: Any) -> None:
    """Row by row, sum over positions of g a^T is autograd's gradient: what is unfolded is what the layer saw."""
    case = make()
    names = oracle.trainable(case.model)
    grads = oracle.per_sample_grads(case.model, case.loss, case.x, case.y, names)
    places = oracle._places(case.model, names)
    checked = 0
    for k in range(3):
        for key, value in oracle._row_factors(case.model, case.loss, case.x, case.y, k, places).items():
            kind, index = places[key]
            if kind in ("linear", "conv"):
                a, g = value
                assert_close(g.T @ a, grads[k][index])
                checked += 1
            elif kind == "table":
                a, g = value
                assert_close(a.T @ g, grads[k][index])
                checked += 1
    assert checked >= 6


def test_the_oracles_ggn_is_its_fisher_over_every_class() -> None:
    for case in (mlp(), images(), sentences()):
        names = oracle.trainable(case.model)
        pseudo = oracle.every_class(case.model, case.x, case.y)
        ggn = oracle.ggn(case.model, case.loss, case.x, case.y, names)
        assert_close(oracle.fisher(case.model, case.loss, case.x, pseudo, names), ggn)
    case = signals()
    pseudo = oracle.every_direction(case.model, case.x, case.y)
    names = oracle.trainable(case.model)
    ggn = oracle.ggn(case.model, case.loss, case.x, case.y, names)
    assert_close(oracle.fisher(case.model, case.loss, case.x, pseudo, names), ggn)


def test_the_oracles_hessian_is_the_difference_quotient_of_its_gradients() -> None:
    case, step = mlp(), 1e-5
    names = oracle.trainable(case.model)
    hessian = oracle.hessian(case.model, case.loss, case.x, case.y, names)
    moved = []
    for sign in (1, -1):
        with torch.no_grad():
            case.model.first.weight[1, 2] += sign * step
        moved.append(oracle.per_sample_grads(case.model, case.loss, case.x, case.y, names).mean(0))
        with torch.no_grad():
            case.model.first.weight[1, 2] -= sign * step
    assert np.abs((moved[0] - moved[1]) / (2 * step) - hessian[5]).max() < 1e-9
