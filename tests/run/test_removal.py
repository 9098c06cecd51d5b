"""Removal takes the rows' own curvature away with them: closed forms, dense Newton steps, exact refits, refusals."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from typing import Any
from unittest.mock import patch

import numpy as np
import oracle
import pytest
import torch
from models import mlp, sentences, signals, split_rows
from test_oracles import design, half_square, solve_ridge
from torch import nn
from truth import assert_close, fitted, named_loader

import headwater as hw
from headwater.errors import (
    BatchMismatch,
    InvalidInput,
    InvalidSetting,
    NotFittedError,
    RoughForecast,
    SingularOperator,
    StaleFit,
)
from headwater.errors import UnsupportedModel as Unsupported
from headwater.operators.kronecker import EigenKroneckerOperator
from headwater.operators.structured import DenseOperator
from headwater.run import removal as removal_module
from headwater.torch import TorchBatch, TorchComposableInfluence

pytestmark = pytest.mark.filterwarnings("ignore::headwater.errors.RoughForecast")
"""Laws hold for whatever rows; where a forecast is warned of is a claim of its own."""

GROUPS = [[1, 4, 7], [11], [9, 2], [4, 1, 3, 10, 6]]
"""Across batches of five, overlapping, and in no order."""


def prediction(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return output[:, 0]


def regression(ridge: float, method: Any, weights: torch.Tensor | None = None) -> tuple[Any, list[Any], list[Any]]:
    """Ridge regression at its minimum, its loader, and queries whose predictions are w and four others."""
    x, y = design()
    each = np.ones(len(y)) if weights is None else weights.numpy()
    w = np.linalg.solve((x.T * each) @ x + ridge * np.eye(4), (x.T * each) @ y)
    model = nn.Linear(4, 1, bias=False).double().eval()
    with torch.no_grad():
        model.weight.copy_(torch.as_tensor(w)[None])
    influence = TorchComposableInfluence(
        model,
        half_square,
        method,
        damping=ridge / each.sum(),
        likelihood="squared_error",
        measurement=prediction,
    )
    rows = TorchBatch(torch.as_tensor(x), torch.as_tensor(y), weights)
    loader = [rows.take(slice(start, start + 5)) for start in (0, 5, 10)]
    queries = torch.as_tensor(np.concatenate([np.eye(4), np.random.default_rng(1).normal(size=(14, 4))]))
    return influence.fit(loader), loader, split_rows(queries, torch.zeros(18, dtype=torch.float64), 4)


def refitted(ridge: float, without: Any) -> np.ndarray:
    """The change of every query's prediction."""
    x, y = design()
    moved = solve_ridge(np.delete(x, without, axis=0), np.delete(y, without), ridge) - solve_ridge(x, y, ridge)
    return np.concatenate([np.eye(4), np.random.default_rng(1).normal(size=(14, 4))]) @ moved


QUADRATIC = [hw.Direct("ggn"), hw.Direct("hessian"), hw.Kfac(), hw.Ekfac()]


@pytest.mark.parametrize("method", QUADRATIC, ids=repr)
@pytest.mark.parametrize("ridge", [0.0, 0.5, 5.0])
def test_leave_one_out_of_ridge_regression_is_exact(ridge: float, method: Any) -> None:
    """Parameters (the first four queries are unit vectors) and predictions, for more queries than train rows."""
    influence, loader, queries = regression(ridge, method)
    expected = np.stack([refitted(ridge, k) for k in range(12)], axis=1)
    assert_close(influence.removal(loader, queries), expected, 1e2)


@pytest.mark.parametrize("method", QUADRATIC, ids=repr)
@pytest.mark.parametrize("ridge", [0.0, 0.5, 5.0])
def test_groups_left_out_of_ridge_regression_are_exact(ridge: float, method: Any) -> None:
    influence, loader, queries = regression(ridge, method)
    expected = np.stack([refitted(ridge, group) for group in GROUPS], axis=1)
    assert_close(influence.removal(loader, queries, GROUPS), expected, 1e2)


def test_it_is_the_removal_score_over_one_minus_leverage() -> None:
    """And not that score: least squares without damping, leverages of a third on average."""
    x, _ = design()
    influence, loader, queries = regression(0.0, hw.Direct("ggn"))
    leverage = np.einsum("ni,ij,nj->n", x, np.linalg.inv(x.T @ x), x)
    plain = influence.attribute(loader, queries, unit="removal").values
    assert leverage.max() > 0.5
    assert_close(influence.removal(loader, queries) * (1 - leverage), plain, 1e2)


@pytest.mark.parametrize("ridge", [0.7, 60.0])
def test_a_weighted_row_is_removed_with_all_its_weight(ridge: float) -> None:
    weights = torch.tensor([1.0, 2, 1, 3, 1, 0.5, 1, 1, 0, 2, 1, 1], dtype=torch.float64)
    influence, loader, queries = regression(ridge, hw.Direct("ggn"), weights)
    x, y = design()
    vectors = np.concatenate([batch[0].numpy() for batch in queries])

    def solve(each: np.ndarray) -> np.ndarray:
        return np.linalg.solve((x.T * each) @ x + ridge * np.eye(4), (x.T * each) @ y)

    each = weights.numpy()
    without = [np.where(np.isin(np.arange(12), group), 0.0, each) for group in [*range(12), *GROUPS]]
    expected = np.stack([vectors @ (solve(left) - solve(each)) for left in without], axis=1)
    assert_close(influence.removal(loader, queries), expected[:, :12], 1e2)
    assert_close(influence.removal(loader, queries, GROUPS), expected[:, 12:], 1e2)


# The dense Newton step ------------------------------------------------------------------------------------------------

CASES = {"mlp": mlp, "signals": signals, "sentences": sentences}
SINGLES = [[k] for k in range(11)]
OVERLAPPING = [[0, 5, 10], [5, 4], [7, 1, 2, 3, 8]]


@cache
def dense_pieces(name: str, structure: str) -> dict[str, tuple[np.ndarray, np.ndarray, list[np.ndarray]]]:
    """By block: gradients of queries and of train rows, and each train row's own GGN."""
    case, found = CASES[name](), {}
    for block, names in oracle.block_names(case.model, structure).items():
        query = oracle.per_sample_grads(case.model, case.loss, case.x_query, case.y_query, names)
        train = oracle.per_sample_grads(case.model, case.loss, case.x, case.y, names)
        rows = [(oracle.row(case.x, k), oracle.row(case.y, k)) for k in range(len(case.y))]
        found[block] = query, train, [oracle.ggn(case.model, case.loss, x, y, names) for x, y in rows]
    return found


def dense_removal(name: str, structure: str, inverses: dict[str, np.ndarray], groups: Any) -> np.ndarray:
    """Block by block (1/N) g_q^T (A - GGN_S / N)^-1 g_S, with A from the inverses and all else one row at a time."""
    columns: list[Any] = [0.0 for _ in groups]
    for block, (query, train, ggns) in dense_pieces(name, structure).items():
        whole, n = np.linalg.inv(inverses[block]), len(train)
        for k, group in enumerate(groups):
            left = whole - sum(ggns[row] for row in group) / n
            columns[k] = columns[k] + query @ np.linalg.solve(left, train[group].sum(0)) / n
    return np.stack(columns, axis=1)


def dense_inverses(influence: TorchComposableInfluence) -> dict[str, np.ndarray]:
    like = torch.zeros(1, dtype=torch.float64)
    return {name: op.dense(like).numpy() for name, op in influence.block_mapper.operators.items()}


STEPS = [
    *((name, hw.Direct("ggn"), s) for name in CASES for s in ("full", "layer", "parameter")),
    *(("mlp", hw.Direct("fisher"), s) for s in ("full", "layer")),
    *(("mlp", hw.Ekfac(), s) for s in ("layer", "parameter")),
]
"""EKFAC over a full block goes part by part: a claim of its own."""


@pytest.mark.parametrize(("name", "method", "structure"), STEPS, ids=str)
def test_it_is_one_newton_step_without_the_rows(name: str, method: Any, structure: str) -> None:
    case = CASES[name]()
    for factor in (3.0, 30.0) if isinstance(method, hw.Ekfac) else (0.3, 3.0):
        influence = fitted(case, method, structure, damping=hw.relative(factor))
        inverses, queries = dense_inverses(influence), split_rows(case.x_query, case.y_query, 2)
        expected = dense_removal(name, structure, inverses, SINGLES)
        condition = max(np.linalg.cond(inverse) for inverse in inverses.values())
        got = influence.removal(named_loader(case, 4), queries)
        assert_close(got, expected, 10 * condition)
        plain = influence.attribute(case.loader(), queries, unit="removal").values
        assert np.abs(got - plain).max() > 1e-2 * np.abs(plain).max()
        expected = dense_removal(name, structure, inverses, OVERLAPPING)
        assert_close(influence.removal(named_loader(case, 4), queries, OVERLAPPING), expected, 10 * condition)


@pytest.mark.parametrize("method", [hw.Kfac(), hw.Kfac("factored"), hw.Ekfac(), hw.Ekfac(rank=2)], ids=repr)
def test_parts_are_taken_one_by_one_whatever_block_they_are_in(method: Any) -> None:
    """Their curvature falls apart into parts, so that of the removed rows does too."""
    case = mlp()
    queries = split_rows(case.x_query, case.y_query, 2)
    layer = fitted(case, method, "layer", damping=0.5)
    full = fitted(case, method, "full", damping=0.5)
    assert_close(full.removal(case.loader(), queries), layer.removal(case.loader(), queries), 1e3)
    got = full.removal(case.loader(), queries, OVERLAPPING)
    assert_close(got, layer.removal(case.loader(), queries, OVERLAPPING), 1e3)
    expected = dense_removal("mlp", "layer", dense_inverses(layer), OVERLAPPING)
    assert_close(got, expected, 1e4)


def test_removal_of_an_ensemble_is_the_mean_over_its_models() -> None:
    case, states = mlp(), []
    for factor in (1.0, 0.5, -0.7):
        states.append({name: factor * value for name, value in case.model.state_dict().items()})
    queries = split_rows(case.x_query, case.y_query, 2)

    def made(checkpoints: Any) -> TorchComposableInfluence:
        method, damping = hw.Direct("ggn"), hw.relative(0.3)
        return TorchComposableInfluence(case.model, case.loss, method, damping=damping, checkpoints=checkpoints).fit(
            case.loader()
        )

    for groups in (None, OVERLAPPING):
        alone = [made([state]).removal(case.loader(), queries, groups) for state in states]
        assert np.abs(alone[0] - alone[1]).max() > 1e-2 * np.abs(alone[0]).max()
        assert_close(made(states).removal(case.loader(), queries, groups), sum(alone) / 3, 1e3)


def test_neither_batches_nor_memory_matter() -> None:
    case = sentences()
    influence = fitted(case, hw.Ekfac(), "layer", damping=0.1)
    for groups in (None, OVERLAPPING):
        reference = influence.removal(case.loader(11), split_rows(case.x_query, case.y_query, 5), groups)
        for size in (1, 3, 4):
            got = influence.removal(case.loader(size), split_rows(case.x_query, case.y_query, size), groups)
            assert_close(got, reference, 1e3)
        with hw.working_memory(1):
            got = influence.removal(case.loader(4), split_rows(case.x_query, case.y_query, 5), groups)
        assert_close(got, reference, 1e3)


def test_groups_are_named_by_ids_where_batches_carry_them() -> None:
    case = mlp()
    influence = fitted(case, hw.Direct("ggn"), "layer", damping=0.1)
    queries = split_rows(case.x_query, case.y_query, 2)
    order = torch.tensor([10, 3, 0, 7, 1, 9, 4, 2, 8, 5, 6])
    by_position = influence.removal(case.loader(), queries, OVERLAPPING)
    assert_close(influence.removal(named_loader(case, 4, order), queries, OVERLAPPING), by_position, 1e3)
    named = [TorchBatch(case.x, case.y, ids=np.array([f"row {k}" for k in range(11)]))]
    groups = [[f"row {k}" for k in group] for group in OVERLAPPING]
    assert_close(influence.removal(named, queries, groups), by_position, 1e3)


# Against the truth ----------------------------------------------------------------------------------------------------


def newton_softmax(x: torch.Tensor, y: torch.Tensor, each: torch.Tensor, l2: float) -> torch.Tensor:
    """The minima of sum each_mn l_n + l2 / 2 |W_m|^2, W [m, 2, columns of x], by Newton's method."""
    size, w = x.shape[1], torch.zeros(len(each), 2, x.shape[1], dtype=torch.float64)
    pairs, target = (x[:, :, None] * x[:, None, :]).flatten(1), nn.functional.one_hot(y, 2)
    for _ in range(30):
        p = torch.einsum("nd,mcd->mnc", x, w).softmax(2)
        slope = torch.einsum("mnc,nd->mcd", (p - target) * each[:, :, None], x) + l2 * w
        a = ((p[:, :, 0] * p[:, :, 1] * each) @ pairs).reshape(-1, size, size)
        curvature = torch.cat([torch.cat([a, -a], 2), torch.cat([-a, a], 2)], 1) + l2 * torch.eye(2 * size).double()
        step = torch.linalg.solve(curvature, slope.flatten(1)).reshape(w.shape)
        w = w - step
        if step.abs().max() < 1e-12:
            return w
    raise AssertionError("Newton's method has not converged")


def test_on_breast_cancer_it_is_nearer_to_exact_leave_one_out_than_plain_influence() -> None:
    """Softmax regression, every row left out in turn: Pearson .9965 against .928, and a fifth of the error."""
    from sklearn.datasets import load_breast_cancer

    x, y = load_breast_cancer(return_X_y=True)
    order, n, l2 = np.random.RandomState(0).permutation(len(y)), 469, 1e-2
    x, y = (x[order] - x[order][:n].mean(0)) / x[order][:n].std(0), torch.as_tensor(y[order])
    x = torch.as_tensor(np.concatenate([x, np.ones((len(x), 1))], axis=1))
    w = newton_softmax(x[:n], y[:n], torch.ones(1, n, dtype=torch.float64) / n, l2)
    others = newton_softmax(x[:n], y[:n], (1 - torch.eye(n, dtype=torch.float64)) / n, l2)
    model = nn.Linear(31, 2, bias=False).double().eval()
    with torch.no_grad():
        model.weight.copy_(w[0])
    influence = TorchComposableInfluence(model, nn.CrossEntropyLoss(), hw.Direct("ggn"), damping=l2)
    loader, queries = split_rows(x[:n], y[:n], 200), [(x[n:], y[n:])]
    influence.fit(loader)

    def losses(weights: torch.Tensor) -> np.ndarray:
        logits = torch.einsum("nd,mcd->ncm", x[n:], weights)
        return nn.functional.cross_entropy(logits, y[n:, None].expand(-1, len(weights)), reduction="none").numpy()

    truth = losses(others) - losses(w)
    plain, got = influence.attribute(loader, queries, unit="removal").values, influence.removal(loader, queries)
    near, far = (float(np.corrcoef(v.ravel(), truth.ravel())[0, 1]) for v in (got, plain))
    assert near > 0.995 > 0.95 > far, (near, far)
    assert np.abs(got - truth).mean() < 0.25 * np.abs(plain - truth).mean()


# How far to trust it --------------------------------------------------------------------------------------------------


def what_stays(influence: TorchComposableInfluence, x: torch.Tensor, group: list[int]) -> float:
    """The smallest eigenvalue of I - H of a linear softmax model, H from each row's own Jacobian; densely."""
    case, names = (influence.model, nn.CrossEntropyLoss()), ["weight"]
    size = influence.provider.n_parameters
    labels = torch.zeros(1, dtype=torch.long)
    ggn = [oracle.ggn(*case, x[k : k + 1], labels, names) for k in range(len(x))]
    inverse = np.linalg.inv(sum(ggn) / len(x) + 1e-2 * np.eye(size))
    gone = sum(ggn[k] for k in group) / len(x)
    return 1 - float(np.linalg.eigvals(inverse @ gone).real.max())


@pytest.fixture
def softmax() -> tuple[TorchComposableInfluence, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(40, 4, generator=generator).double(), torch.arange(40) % 2
    w = newton_softmax(x, y, torch.ones(1, 40, dtype=torch.float64) / 40, 1e-2)[0]
    model = nn.Linear(4, 2, bias=False).double().eval()
    with torch.no_grad():
        model.weight.copy_(w)
    influence = TorchComposableInfluence(model, nn.CrossEntropyLoss(), hw.Direct("ggn"), blocks="full", damping=1e-2)
    return influence.fit(split_rows(x, y, 15)), x, y


def test_the_warning_says_what_stays_of_the_curvature_and_of_which_group(softmax: Any) -> None:
    influence, x, y = softmax
    few, many = [3, 21], list(range(2, 36))
    with pytest.warns(RoughForecast, match="fewer rows at a time, use more damping, or retrain") as found:
        influence.removal(split_rows(x, y, 15), [(x[:3], y[:3])], [few, many])
    stays = what_stays(influence, x, many)
    assert 0 < stays < removal_module.ENOUGH < what_stays(influence, x, few)
    assert f"Without group 1 (rows 2, 3, 4, 5, 6 ...) only {stays:.2g} of the curvature" in str(found[0].message)
    assert "(1 of 2 removals leave less than 0.25)" in str(found[0].message) and len(found) == 1


@pytest.mark.filterwarnings("error")
def test_no_warning_for_few_rows_and_one_for_a_row_that_holds_a_direction_alone(softmax: Any) -> None:
    influence, x, y = softmax
    influence.removal(split_rows(x, y, 15), [(x[:3], y[:3])], [[3, 21], [5]])
    influence.removal(split_rows(x, y, 15), [(x[:3], y[:3])])
    x[:, 3] = torch.where(torch.arange(40) == 17, 3.0, 0.0)
    with pytest.warns(RoughForecast, match=r"Without row 17 only .* \(1 of 40 removals"):
        influence.fit([(x, y)]).removal([(x, y)], [(x[:3], y[:3])])


# Refusals -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def ready() -> tuple[Any, list[Any], list[Any]]:
    case = mlp()
    influence = fitted(case, hw.Direct("ggn"), "layer", damping=0.1)
    return influence, case.loader(), split_rows(case.x_query, case.y_query, 2)


def test_a_row_that_alone_holds_a_direction_is_named() -> None:
    """Least squares without damping, where only row 7 sees the last column."""
    x, y = (torch.as_tensor(v) for v in design())
    x[:, 3] = torch.where(torch.arange(12) == 7, 2.0, 0.0)
    model = nn.Linear(4, 1, bias=False).double().eval()
    influence = TorchComposableInfluence(model, half_square, hw.Direct("ggn"), damping=0.0).fit([(x, y)])
    loader = split_rows(x, y, 5)
    for groups, named in ((None, "row 7 "), ([[1, 2], [3, 7]], r"group 1 \(rows 3, 7\)")):
        with pytest.raises(SingularOperator, match=f"Without {named}.*leverage 1, .*more damping"):
            influence.removal(loader, loader, groups)
    influence.removal(loader, loader, [[1, 2], [3, 8]])
    influence.with_damping(0.1).removal(loader, loader)


def test_methods_that_predict_no_removal_are_refused(ready: Any) -> None:
    case = mlp()
    for method in (hw.GradDot(), hw.GradCos()):
        with pytest.raises(InvalidSetting, match="only similarity"):
            fitted(case, method, "layer").removal(*ready[1:])


def test_rows_whose_ggn_has_no_gradients_are_refused() -> None:
    case = signals()
    for loss in (lambda o, t: (o - t).abs().sqrt().sum(),):
        influence = TorchComposableInfluence(case.model, loss, hw.Direct("hessian", allow_indefinite=True), damping=9.0)
        with pytest.raises(Unsupported, match=r"not convex.*attribute\(unit='removal'\)"):
            influence.fit(case.loader()).removal(case.loader(), case.loader())


def test_an_operator_that_is_not_symmetric_is_refused(ready: Any) -> None:
    influence, *loaders = ready
    size = influence.block_mapper.operators["second"].input_size
    influence.block_mapper.operators["second"] = DenseOperator(torch.eye(size, dtype=torch.float64).triu())
    with pytest.raises(InvalidSetting, match="'second' is not symmetric"):
        influence.removal(*loaders)


@pytest.mark.parametrize(
    ("groups", "error", "said"),
    [
        ([[0, 1], [2, 30]], InvalidInput, r"group 1 \(rows 2, 30\) is in the train loader: 1 were found"),
        ([[0], []], InvalidInput, "Group 1 has shape"),
        ([[[0, 1]]], InvalidInput, "Group 0 has shape"),
        ([[3, 3]], BatchMismatch, r"in group 0 \(rows 3, 3\) more than once"),
        ([], InvalidInput, "no groups"),
    ],
)
def test_groups_that_mean_nothing_are_refused(ready: Any, groups: Any, error: Any, said: str) -> None:
    influence, *loaders = ready
    with pytest.raises(error, match=said):
        influence.removal(*loaders, groups)


def test_names_that_stand_for_two_rows_are_refused(ready: Any) -> None:
    (influence, _, queries), case = ready, mlp()
    doubled = [TorchBatch(case.x, case.y, ids=torch.arange(11) // 2)]
    for groups in (None, [[0, 5]]):
        with pytest.raises(BatchMismatch, match="train rows have the ids"):
            influence.removal(doubled, queries, groups)


def test_it_needs_a_fit_at_these_weights(ready: Any) -> None:
    influence, *loaders = ready
    case = mlp()
    with pytest.raises(NotFittedError):
        TorchComposableInfluence(case.model, case.loss, hw.Ekfac()).removal(*loaders)
    with torch.no_grad():
        influence.model.first.weight[0, 0] += 1e-3
    with pytest.raises(StaleFit):
        influence.removal(*loaders)


# What these tests must notice -----------------------------------------------------------------------------------------


def law_of_rows() -> None:
    influence, loader, queries = regression(20.0, hw.Direct("ggn"))
    assert_close(influence.removal(loader, queries), np.stack([refitted(20.0, k) for k in range(12)], axis=1), 1e2)


def law_of_groups() -> None:
    influence, loader, queries = regression(20.0, hw.Direct("ggn"))
    expected = np.stack([refitted(20.0, group) for group in GROUPS], axis=1)
    assert_close(influence.removal(loader, queries, GROUPS), expected, 1e2)


def law_of_weights() -> None:
    test_a_weighted_row_is_removed_with_all_its_weight(60.0)


def law_of_parts() -> None:
    test_parts_are_taken_one_by_one_whatever_block_they_are_in(hw.Ekfac())


def law_of_ensembles() -> None:
    test_removal_of_an_ensemble_is_the_mean_over_its_models()


LAWS = (law_of_rows, law_of_groups, law_of_weights, law_of_parts, law_of_ensembles)


def _leverage(change: Any) -> AbstractContextManager[Any]:
    """Another leverage than H."""
    solve = removal_module._solve_without
    return patch.object(removal_module, "_solve_without", lambda H, *given: solve(change(H), *given))


@contextmanager
def a_group_is_the_sum_of_its_rows() -> Iterator[None]:
    """Each row's own leverage, and nothing between rows."""

    def wrong(group: Any, regions: Any, queries: Any, n: float) -> tuple[np.ndarray, float]:
        names = group.names
        total: Any = 0.0
        for rows in group.rows:
            pairs = zip(regions, queries, rows, strict=True)
            shares = [removal_module._rows_share(*given, n, names) for given in pairs]
            total = total + sum(change for change, _ in shares).sum(1)
        return total, 1.0

    with patch.object(removal_module, "_group_column", wrong):
        yield


def _every_scale_is_one() -> AbstractContextManager[Any]:
    from headwater.gradients.ensemble import EnsembleProvider

    return patch.object(EnsembleProvider, "block_scale", lambda self, block: 1.0)


@contextmanager
def an_ensembles_share_is_taken_for_curvature() -> Iterator[None]:
    """The operator that holds the share is inverted with it, and so is three times too stiff."""
    regions = removal_module._regions

    def wrong(influence: Any) -> Any:
        found = []
        for region in regions(influence):
            shared = removal_module.ScaledOperator(region.scale, region.inverse)
            found.append(removal_module.Region(region.block, region.part, shared, 1.0))
        return found

    with patch.object(removal_module, "_regions", wrong):
        yield


@contextmanager
def weights_are_left_out_of_the_ggn() -> Iterator[None]:
    with patch.object(removal_module, "_weighted", lambda value, weights: value):
        yield


@contextmanager
def weights_multiply_the_ggns_gradients_whole() -> Iterator[None]:
    weighted = removal_module._weighted
    square = lambda value, roots: weighted(value, None if roots is None else roots**2)  # noqa: E731
    with patch.object(removal_module, "_weighted", square):
        yield


@contextmanager
def the_inverse_is_a_multiple_of_the_identity() -> Iterator[None]:
    def wrong(self: Any, tensor: Any) -> Any:
        return tensor * float(self.matrix.diagonal().mean())

    def wrong_kronecker(self: Any, tensor: Any) -> Any:
        return tensor * (self.trace() / self.input_size)

    with (
        patch.object(DenseOperator, "_apply", wrong),
        patch.object(EigenKroneckerOperator, "_apply", wrong_kronecker),
    ):
        yield


MUTANTS = {
    "removal adds the leverage where it is to be taken away": lambda: _leverage(lambda H: -H),
    "removal leaves the rows' curvature in": lambda: _leverage(lambda H: 0 * H),
    "removal takes the leverage twice": lambda: _leverage(lambda H: H / 2),
    "removal forgets what two rows or outputs share": lambda: _leverage(lambda H: H * torch.eye(H.shape[1])),
    "a group's removal is the sum of its rows'": a_group_is_the_sum_of_its_rows,
    "removal sums over an ensemble's models": _every_scale_is_one,
    "removal takes an ensemble's share for curvature": an_ensembles_share_is_taken_for_curvature,
    "removal leaves the rows' weights out of their curvature": weights_are_left_out_of_the_ggn,
    "removal squares the rows' weights in their curvature": weights_multiply_the_ggns_gradients_whole,
    "removal has a multiple of the identity for an inverse": the_inverse_is_a_multiple_of_the_identity,
}


@pytest.mark.parametrize("method", [hw.Dual(), hw.Direct("empirical_fisher")], ids=lambda m: type(m).__name__)
def test_a_row_leaves_the_empirical_fisher_with_its_own_gradient(method: Any) -> None:
    """Sherman and Morrison: the score over 1 - h, with h = <A^-1 g, g> / n."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x, y = torch.randn(17, 3, dtype=torch.float64), torch.arange(17) % 3
    loader, query = [(x, y)], [(x[:5] + 0.3, y[:5])]
    influence = TorchComposableInfluence(model, nn.CrossEntropyLoss(), method, blocks="full", damping=hw.relative(0.1))
    influence.fit(loader)
    leverage = influence.self_influence(loader) / 17
    expected = influence.attribute(loader, query, unit="removal").values / (1 - leverage)
    np.testing.assert_allclose(influence.removal(loader, query), expected, rtol=1e-9, atol=1e-12)


def test_data_inf_has_no_curvature_to_take_a_row_out_of() -> None:
    model, x = nn.Linear(3, 2).double(), torch.randn(6, 3, dtype=torch.float64)
    influence = TorchComposableInfluence(model, nn.MSELoss(), hw.DataInf()).fit([(x, x[:, :2])])
    with pytest.raises(InvalidSetting, match="row out of"):
        influence.removal([(x, x[:, :2])], [(x, x[:, :2])])


def test_groups_may_be_sets_and_masks_are_refused() -> None:
    model, x = nn.Linear(3, 2).double(), torch.randn(6, 3, dtype=torch.float64)
    influence = TorchComposableInfluence(model, nn.MSELoss(), hw.Direct()).fit([(x, x[:, :2])])
    loader = [(x, x[:, :2])]
    np.testing.assert_allclose(
        influence.removal(loader, loader, groups=[{4, 1}]), influence.removal(loader, loader, groups=[[1, 4]])
    )
    with pytest.raises(InvalidInput, match="mask"):
        influence.removal(loader, loader, groups=[np.arange(6) < 2])


# In a folder ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [None, [[0, 3], [1], [2, 9, 4]]], ids=["rows", "groups"])
def test_removal_in_a_folder_is_that_in_memory_and_goes_on(groups, tmp_path, monkeypatch):
    monkeypatch.setattr("headwater.run.plan.FEWEST", 4)
    monkeypatch.setattr("headwater.run.plan.ROWS", 4)
    influence, train, query = stored_case()
    expected = influence.removal(train, query, groups)
    for worker in ((1, 2), (0, 2), (0, 1)):
        found = influence.removal(train, query, groups, store=tmp_path / "run", worker=worker)
        np.testing.assert_allclose(found, expected, rtol=1e-6)
    with monkeypatch.context() as patch:
        patch.setattr("headwater.store.tiles.TileStore.write", None)
        patch.setattr("headwater.store.parts.PartStore.write", None)
        np.testing.assert_array_equal(influence.removal(train, query, groups, store=tmp_path / "run"), found)
    with pytest.raises(InvalidInput, match="damping was"):
        influence.with_damping(0.7).removal(train, query, groups, store=tmp_path / "run")


def stored_case():
    torch.manual_seed(0)
    x, y = torch.randn(14, 3, dtype=torch.float64), torch.arange(14) % 2
    model = torch.nn.Linear(3, 2).double()
    train = [(x[:5], y[:5]), (x[5:], y[5:])]
    influence = TorchComposableInfluence(model, torch.nn.CrossEntropyLoss(), hw.Direct("ggn"), damping=0.5).fit(train)
    return influence, train, [(x[:3] + 0.1, y[:3])]
