"""The curvature that is asked for is the dense one of plain autograd: every kind, block, framework and penalty."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import jax_models
import models
import numpy as np
import oracle
import pytest
import torch
from hf_cases import ROWS as HF_ROWS
from hf_cases import case_of as hf_case
from sklearn.linear_model import LogisticRegression
from sklearn_cases import case_of
from torch import nn

import headwater as hw
from headwater.curvature.model import LARGEST_MATRIX, BlockCurvature
from headwater.errors import (
    BatchMismatch,
    BlockMismatch,
    InvalidInput,
    InvalidSetting,
    NotConverged,
    ShapeMismatch,
    StaleFit,
    UnsupportedModel,
)
from headwater.jax.losses import squared_error
from headwater.sklearn import SklearnBatch, SklearnComposableInfluence
from headwater.torch import TorchBatch, TorchComposableInfluence

KINDS = ("hessian", "ggn", "fisher", "empirical_fisher")
CASE = models.mlp()
NAMES = oracle.trainable(CASE.model)
WEIGHTS = np.linspace(0.5, 2.0, len(CASE.y))


def truth(kind: str, weights: np.ndarray | None = None) -> np.ndarray:
    """Of the small network, by the oracle: [D, D]."""
    model, loss, x, y = CASE.model, CASE.loss, CASE.x, CASE.y
    if kind in ("hessian", "ggn"):
        compute = {"hessian": oracle.hessian, "ggn": oracle.ggn}[kind]
        each = [compute(model, loss, x[k : k + 1], y[k : k + 1], NAMES) for k in range(len(y))]
        return np.average(each, axis=0, weights=weights)
    pseudo = oracle.every_class(model, x, y) if kind == "fisher" else oracle.own_targets(y)
    grads = [(oracle.per_sample_grads(model, loss, x, targets, NAMES), share) for targets, share in pseudo]
    each = sum(share[:, None, None] * g[:, :, None] * g[:, None, :] for g, share in grads)
    return np.average(each, axis=0, weights=weights)


def asked(kind: str = "ggn", blocks: Any = "full", loader: Any = None, **options: Any) -> Any:
    loader = CASE.loader() if loader is None else loader
    return hw.curvature_of(CASE.model, CASE.loss, loader, kind=kind, blocks=blocks, **options)  # type: ignore[arg-type]


def close(got: Any, expected: Any) -> None:
    expected = np.asarray(expected)
    np.testing.assert_allclose(np.asarray(got), expected, rtol=0, atol=1e-11 * max(1e-3, np.abs(expected).max()))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_all_that_is_asked_agrees_with_the_dense_matrix(kind: str, weighted: bool) -> None:
    weights = torch.as_tensor(WEIGHTS) if weighted else None
    found = asked(kind, loader=[TorchBatch(CASE.x, CASE.y, weights)])
    expected = truth(kind, WEIGHTS if weighted else None)
    size = len(expected)
    assert found.shape == (size, size)
    close(found.dense(), expected)
    close(found.diagonal(), np.diag(expected))
    assert found.trace().value == pytest.approx(np.trace(expected), rel=1e-11)
    assert found.trace().error == 0.0
    vectors = torch.as_tensor(np.random.default_rng(0).normal(size=(size, 7)))
    close(found @ vectors, expected @ vectors.numpy())
    close(found @ vectors[:, 0], expected @ vectors[:, 0].numpy())
    close(found.apply(vectors.T), (expected @ vectors.numpy()).T)
    values = np.linalg.eigvalsh(expected)
    ends = found.spectrum(3)
    close(ends.lowest, values[:3])
    close(ends.highest, values[::-1][:3])
    close(expected @ ends.highest_vectors[0].numpy(), values[-1] * ends.highest_vectors[0].numpy())


def test_a_hessian_is_that_of_torch_func() -> None:
    """Of the mean loss as one function of one vector: nothing of this house, and not of its oracle."""
    shapes = {name: p.shape for name, p in CASE.model.named_parameters()}
    flat = torch.cat([p.detach().reshape(-1) for p in CASE.model.parameters()])

    def mean_loss(flat: torch.Tensor) -> torch.Tensor:
        pieces = flat.split([shape.numel() for shape in shapes.values()])
        state = {name: piece.reshape(shapes[name]) for name, piece in zip(shapes, pieces, strict=True)}
        return CASE.loss(torch.func.functional_call(CASE.model, state, (CASE.x,)), CASE.y)

    close(asked("hessian").dense(), torch.func.jacrev(torch.func.jacrev(mean_loss))(flat))


@pytest.mark.parametrize("blocks", ["layer", "parameter", CASE.own_blocks])
def test_blocks_are_the_blocks_of_the_whole_matrix(blocks: Any) -> None:
    whole, found = truth("hessian"), asked("hessian", blocks)
    places = oracle.block_slices(CASE.model, oracle.block_names(CASE.model, blocks))
    order = oracle.trainable(CASE.model)
    sizes = [dict(CASE.model.named_parameters())[name].numel() for name in order]
    index = np.split(np.arange(len(whole)), np.cumsum(sizes)[:-1])
    of = dict(zip(order, index, strict=True))
    assert list(found) == list(places)
    pieces = []
    for name, names in oracle.block_names(CASE.model, blocks).items():
        own = np.concatenate([of[n] for n in names])
        pieces.append(whole[np.ix_(own, own)])
        close(found[name].dense(), pieces[-1])
        close(found[name].spectrum(2).highest, np.linalg.eigvalsh(pieces[-1])[::-1][:2])
    size = sum(len(p) for p in pieces)
    assembled, start = np.zeros((size, size)), 0
    for piece in pieces:
        assembled[start : start + len(piece), start : start + len(piece)] = piece
        start += len(piece)
    close(found.dense(), assembled)
    close(found.diagonal(), np.diag(assembled))
    vector = np.random.default_rng(1).normal(size=size)
    close(found @ vector, assembled @ vector)
    by_block = {n: v for n, v in zip(found, np.split(vector, np.cumsum([len(p) for p in pieces])[:-1]), strict=True)}
    close(np.concatenate(list(found.apply(by_block).values())), assembled @ vector)
    values = np.linalg.eigvalsh(assembled)
    ends = found.spectrum(4)
    close(ends.lowest, values[:4])
    close(ends.highest, values[::-1][:4])
    assert found.trace().value == pytest.approx(values.sum(), rel=1e-11)
    with pytest.raises(BlockMismatch, match="There is no block 'nowhere'"):
        found["nowhere"]


def wide_case() -> tuple[nn.Module, Any, torch.Tensor, torch.Tensor, np.ndarray]:
    """More parameters than are diagonalised, and its Hessian by torch.func."""
    generator = torch.Generator().manual_seed(3)
    model = models.settle(nn.Sequential(nn.Linear(30, 10), nn.Tanh(), nn.Linear(10, 3)), 5)
    x, y = torch.randn(25, 30, generator=generator, dtype=torch.float64), torch.arange(25) % 3
    shapes = {name: p.shape for name, p in model.named_parameters()}
    flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()])

    def mean_loss(flat: torch.Tensor) -> torch.Tensor:
        pieces = flat.split([shape.numel() for shape in shapes.values()])
        state = {name: piece.reshape(shapes[name]) for name, piece in zip(shapes, pieces, strict=True)}
        return nn.functional.cross_entropy(torch.func.functional_call(model, state, (x,)), y)

    return model, nn.CrossEntropyLoss(), x, y, torch.func.jacrev(torch.func.jacrev(mean_loss))(flat).numpy()


WIDE = wide_case()


def test_ends_by_lanczos_lie_within_their_errors() -> None:
    model, loss, x, y, expected = WIDE
    found = hw.curvature_of(model, loss, (x, y), kind="hessian")
    assert found.size > 256
    values = np.linalg.eigvalsh(expected)
    sharp = found.spectrum(3, tolerance=1e-10, products=400)
    np.testing.assert_allclose(sharp.highest, values[::-1][:3], rtol=0, atol=1e-9)
    np.testing.assert_allclose(sharp.lowest, values[:3], rtol=0, atol=1e-9)
    rough = found.spectrum(2)
    for value, error in zip([*rough.highest, *rough.lowest], [*rough.highest_error, *rough.lowest_error], strict=True):
        assert np.abs(values - value).min() <= error + 1e-12
        assert error <= 1e-4 * np.abs(values).max()
    residual = expected @ rough.highest_vectors[0].numpy() - rough.highest[0] * rough.highest_vectors[0].numpy()
    np.testing.assert_allclose(np.linalg.norm(residual), rough.highest_error[0], rtol=1e-6)
    with pytest.warns(NotConverged, match="Give products= more than 4"):
        found.spectrum(1, tolerance=1e-12, products=4)
    assert "off by at most" in str(rough)


def test_an_eigenvalue_is_found_as_often_as_it_occurs() -> None:
    """Outputs of least squares share one matrix: every eigenvalue of the whole occurs three times."""
    x = torch.as_tensor(np.random.default_rng(2).normal(size=(150, 100)))
    model = nn.Linear(100, 3, bias=False).double()
    found = hw.curvature_of(model, nn.MSELoss(reduction="sum"), (x, torch.zeros(150, 3, dtype=torch.float64)))
    values = np.linalg.eigvalsh(2 * (x.T @ x).numpy() / 150)
    ends = found.spectrum(4, tolerance=1e-9, products=300)
    np.testing.assert_allclose(ends.highest, [values[-1]] * 3 + [values[-2]], rtol=1e-6)
    np.testing.assert_allclose(ends.lowest, [values[0]] * 3 + [values[1]], rtol=1e-4, atol=1e-8)


def test_a_trace_that_is_estimated_has_a_standard_error() -> None:
    model, loss, x, y, expected = WIDE
    found = hw.curvature_of(model, loss, [(x, y)], kind="hessian").trace()
    assert found.error > 0
    assert abs(found.value - np.trace(expected)) <= 4 * found.error
    exact = hw.curvature_of(model, loss, [(x, y)], kind="ggn").trace()
    assert exact.error == 0 and float(exact) > 0


def test_an_influence_gives_the_curvature_whatever_its_method() -> None:
    """Also one that was not fitted, and one that sees margins in place of the loss."""
    for method in (hw.GradDot(), hw.Trak(dimension=8), hw.Direct()):
        influence = TorchComposableInfluence(CASE.model, CASE.loss, method, blocks="full")
        close(influence.curvature_of(CASE.loader(), "hessian").dense(), truth("hessian"))


def test_it_is_what_a_method_inverts() -> None:
    """Damped and with the penalty: `influence_factors` are its solves."""
    case = case_of("logistic")
    influence = SklearnComposableInfluence(case.estimator, hw.Direct(), damping=0.3).fit([(case.x, case.y)])
    matrix = influence.curvature_of([(case.x, case.y)]).dense() + 0.3 * np.eye(case.held.size)
    grads = case.grads(case.x_query, case.y_query)
    close(influence.influence_factors(case.x_query, case.y_query), np.linalg.solve(matrix, grads.T).T)


@pytest.mark.parametrize("name", ["ridge", "logistic", "multinomial", "poisson"])
def test_an_estimators_penalty_is_in_it_unless_it_is_left_out(name: str) -> None:
    case = case_of(name)
    rows = case.hessians(case.x, case.y).mean(axis=0)
    penalty = np.diag(case.held * case.strength / (1 if case.per_row else len(case.y)))
    assert penalty.any()
    found = hw.curvature_of(case.estimator, data=(case.x, case.y), kind="hessian")
    close(found.dense(), rows + penalty)
    close(found.diagonal(), np.diag(rows + penalty))
    close(found @ np.ones(found.size), (rows + penalty) @ np.ones(found.size))
    assert found.trace().value == pytest.approx(np.trace(rows + penalty))
    close(found.spectrum(1).highest, np.linalg.eigvalsh(rows + penalty)[-1:])
    close(hw.curvature_of(case.estimator, data=(case.x, case.y), kind="hessian", penalty=False).dense(), rows)
    if name != "poisson":  # the model is linear in its parameters
        close(hw.curvature_of(case.estimator, data=(case.x, case.y), kind="ggn").dense(), rows + penalty)


def test_weights_of_rows_count() -> None:
    case, weights = case_of("logistic"), np.arange(23) % 3 + 0.5
    found = hw.curvature_of(case.estimator, data=[SklearnBatch(case.x, case.y, weights)], penalty=False)
    close(found.dense(), np.average(case.hessians(case.x, case.y), axis=0, weights=weights))
    close(found.diagonal(), np.diag(np.average(case.hessians(case.x, case.y), axis=0, weights=weights)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["hessian", "ggn"])
def test_a_network_in_jax_has_jaxs_own_curvature(kind: str) -> None:
    case = jax_models.mlp()
    found = hw.curvature_of(case.apply, case.loss, case.loader(), params=case.params, kind=kind)  # type: ignore[arg-type]
    expected = jax_models.curvature(case, kind) / len(case.y)
    close(found.dense(), expected)
    vector = np.random.default_rng(0).normal(size=found.size)
    close(found @ vector, expected @ vector)


def test_a_function_of_jax_has_jaxs_own_hessian() -> None:
    rng = np.random.default_rng(4)
    x, y, w = (jnp.asarray(rng.normal(size=shape)) for shape in ((6, 2), (6, 1), (2, 1)))

    def apply(w: Any, x: Any) -> Any:
        return jnp.tanh(x @ w)

    expected = jax.hessian(lambda w: jnp.mean((apply(w, x) - y) ** 2))(w).reshape(2, 2)
    found = hw.curvature_of(apply, squared_error, (x, y), params=w, kind="hessian").dense()
    assert isinstance(found, jax.Array)
    close(found, expected)


def test_a_pretrained_model_needs_no_loss() -> None:
    case = hf_case("bert sequence")
    x, y = case.rows(range(HF_ROWS))
    found = hw.curvature_of(case.model, data=[(x, y)], kind="ggn", blocks={"head": ["classifier"]})
    names = [f"model.{name}" for name in case.names]
    own = [k for k, name in enumerate(names) if "classifier" in name]
    sizes = np.cumsum([0, *(dict(case.model.named_parameters())[n].numel() for n in case.names)])
    index = np.concatenate([np.arange(sizes[k], sizes[k + 1]) for k in own])
    close(found["head"].dense(), case.curvature("ggn")[np.ix_(index, index)])


def test_what_does_not_fit_is_refused() -> None:
    _, loss, x, y, _ = WIDE
    found = asked()
    with pytest.raises(ShapeMismatch, match="right-hand side"):
        found @ np.ones(3)
    with pytest.raises(BlockMismatch, match="the curvature"):
        found.apply({"other": np.ones(found.size)})
    with pytest.raises(InvalidSetting, match="curvature is 'bend'"):
        asked("bend")
    with pytest.raises(InvalidSetting, match="k is 0"):
        found.spectrum(0)
    large, mse = nn.Linear(LARGEST_MATRIX, 2).double(), nn.MSELoss()
    rows = torch.ones(2, LARGEST_MATRIX, dtype=torch.float64), torch.zeros(2, 2, dtype=torch.float64)
    sums = hw.curvature_of(large, mse, rows)
    with pytest.raises(InvalidSetting, match=f"matrix of up to {LARGEST_MATRIX}"):
        sums.dense()
    with pytest.raises(InvalidSetting, match="would take as many products"):
        sums["full"].dense()
    assert np.asarray(sums.diagonal()).shape == (sums.size,)  # a sum of gradients has no limit
    with pytest.raises(InvalidSetting, match="kind='fisher'"):
        hw.curvature_of(large, mse, rows, kind="hessian").diagonal()
    for given in ((CASE.model, CASE.loss, None), (CASE.model, None, [(CASE.x, CASE.y)])):
        with pytest.raises(InvalidInput):
            hw.curvature_of(*given)
    with pytest.raises(UnsupportedModel):
        hw.curvature_of("model", None, [(x, y)])
    with pytest.raises(InvalidInput, match="has its own"):
        hw.curvature_of(LogisticRegression().fit(x, y), loss, (x, y))


def test_other_weights_and_other_rows_are_refused() -> None:
    model = models.settle(nn.Linear(3, 2), 1)
    x, y = torch.randn(8, 3, dtype=torch.float64), torch.arange(8) % 2

    class Shuffled:
        def __iter__(self) -> Any:
            order = torch.randperm(8)
            yield x[order], y[order]

    with torch.random.fork_rng():
        torch.manual_seed(0)
        moving = hw.curvature_of(model, nn.CrossEntropyLoss(), Shuffled(), kind="hessian")
        with pytest.raises(BatchMismatch):
            for _ in range(3):
                moving @ np.ones(moving.size)
    found = hw.curvature_of(model, nn.CrossEntropyLoss(), (x, y))
    found @ np.ones(found.size)
    with torch.no_grad():
        model.weight += 1.0
    with pytest.raises(StaleFit, match="Ask anew"):
        found @ np.ones(found.size)


def test_a_curvature_says_what_it_is() -> None:
    found = asked("hessian", "layer")
    assert repr(found).startswith("ModelCurvature(hessian, mean over rows of weight ")
    assert isinstance(found["first"], BlockCurvature) and "'first'" in repr(found["first"])
    assert len(found) == 2 and "second" in found
