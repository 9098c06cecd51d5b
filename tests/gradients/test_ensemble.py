"""Several models as one provider: every method's score is the mean over models, or with TracIn the sum of rates."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from models import CASES, Case, Mlp, mlp, split_rows
from test_third_party import BIASES, WEIGHTS, LinearProvider, Rows, X, Y
from test_third_party import slow_curvature as linear_curvature
from torch import nn
from truth import assert_close, named_loader

import headwater as hw
from headwater.attributor import Attributor
from headwater.errors import BlockMismatch, InvalidInput, InvalidSetting, StaleFit
from headwater.gradients.ensemble import EnsembleProvider
from headwater.methods.tracin import TracIn
from headwater.operators.algebra import IdentityOperator, ScaledOperator
from headwater.operators.kronecker import KroneckerOperator
from headwater.operators.structured import BlockDiagonalOperator, DenseOperator
from headwater.testing import InfluenceContract, StructuredProviderContract
from headwater.torch import TorchBatch, TorchComposableInfluence, TorchGradientProvider

FACTORS = (1.0, 0.6, -1.3)
"""The checkpoints are the model's weights times these."""

METHODS: dict[str, Any] = {
    "grad-dot": hw.GradDot(),
    "grad-cos": hw.GradCos(),
    "hessian": hw.Direct("hessian", allow_indefinite=True),
    "ggn": hw.Direct("ggn"),
    "empirical": hw.Direct("empirical_fisher"),
    "kfac": hw.Kfac(),
    "kfac-factored": hw.Kfac("factored"),
    "ekfac": hw.Ekfac(),
    "ekfac-sampled": hw.Ekfac(fisher="sampled", samples=2, seed=3),
    "ekfac-separable": hw.Ekfac(rank=1),
}


@cache
def case_of(name: str) -> Case:
    return CASES[name]()


def states_of(case: Case) -> list[dict[str, torch.Tensor]]:
    return [
        {name: v * factor if v.is_floating_point() and "var" not in name else v for name, v in state.items()}
        for factor in FACTORS
        for state in [case.model.state_dict()]
    ]


def made(case: Case, method: Any, checkpoints: Any, structure: Any = "layer", **options: Any) -> Any:
    return TorchComposableInfluence(
        case.model,
        case.loss,
        method,
        blocks=structure,
        likelihood=case.likelihood,
        checkpoints=checkpoints,
        **options,
    )


@cache
def pair_of(name: str, method: str, structure: str = "layer") -> tuple[Any, list[Any]]:
    """Fitted once, for claims that only read scores."""
    case = case_of(name)
    return fitted_pair(case, METHODS[method], case.own_blocks if structure == "own" else structure)


def fitted_pair(case: Case, method: Any, structure: Any = "layer", damping: Any = None) -> tuple[Any, list[Any]]:
    """The ensemble, and each of its models by itself: the user's own model at these weights."""
    if damping is None:
        damping = 0.3 if getattr(method, "curvature", "") == "hessian" else hw.relative(0.3)
    together = made(case, method, states_of(case), structure, damping=damping).fit(named_loader(case, 4))
    alone = []
    for state in states_of(case):
        model = type(case.model)().double().eval()
        model.load_state_dict(state)
        influence = TorchComposableInfluence(
            model, case.loss, method, blocks=structure, likelihood=case.likelihood, damping=damping
        )
        alone.append(influence.fit(named_loader(case, 3)))
    return together, alone


def rows_of(case: Case) -> tuple[Any, ...]:
    return case.x_query, case.y_query, case.x, case.y


# The score is the mean over models ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "structure"),
    [(method, "layer") for method in METHODS]
    + [("ggn", "full"), ("grad-cos", "parameter"), ("ekfac", "own")]
    + [
        pytest.param(method, structure, marks=pytest.mark.slow)
        for method, structures in {
            "grad-cos": ("full", "own"),
            "ggn": ("parameter", "own"),
            "ekfac": ("full", "parameter"),
        }.items()
        for structure in structures
    ],
)
def test_scores_are_the_mean_over_models(method: str, structure: str) -> None:
    case = case_of("mlp")
    together, alone = pair_of("mlp", method, structure)
    for mode in ("up", "perturbation"):
        shares = [influence.influences(*rows_of(case), mode=mode) for influence in alone]
        assert all((share - shares[0]).abs().max() > 1e-2 * shares[0].abs().max() for share in shares[1:])
        assert_close(together.influences(*rows_of(case), mode=mode), sum(shares) / 3, 1e4)
        by_block = together.influences_by_block(*rows_of(case), mode=mode)
        own = [influence.influences_by_block(*rows_of(case), mode=mode) for influence in alone]
        assert list(by_block) == [f"{k}/{name}" for k in range(3) for name in own[k]]
        for name, value in by_block.items():
            assert_close(value, own[int(name[0])][name[2:]] / 3, 1e4)


@pytest.mark.parametrize(
    ("name", "method"),
    [("mlp", method) for method in METHODS]
    + [("images", "ekfac"), ("sentences", "grad-cos")]
    + [pytest.param(n, "ggn", marks=pytest.mark.slow) for n in ("images", "sentences")],
)
def test_every_path_gives_the_mean(name: str, method: str) -> None:
    case = case_of(name)
    together, alone = pair_of(name, method)
    expected = sum(influence.influences(*rows_of(case)) for influence in alone) / 3
    factors = together.influence_factors(case.x_query, case.y_query)
    assert factors.shape == (5, together.n_parameters) == (5, sum(influence.n_parameters for influence in alone))
    assert_close(together.influences_from_factors(factors, case.x, case.y), expected, 1e4)
    back = together.influences(case.x, case.y, case.x_query, case.y_query)
    assert_close(back.T, expected, 1e4)
    for size, by_block in ((11, True), (4, False)):
        scores = together.attribute(case.loader(size), split_rows(case.x_query, case.y_query, 2), by_block=by_block)
        assert_close(scores.values, expected, 1e4)
        assert scores.coverage == 1.0
    expected = sum(influence.self_influence(case.loader(4)) for influence in alone) / 3
    assert_close(together.self_influence(case.loader(4)), expected, 1e4)


@pytest.mark.parametrize("method", ["ggn", "kfac-factored", "ekfac"])
def test_damping_is_each_models_own(method: str) -> None:
    """In mean eigenvalues of that model's block, or by the block's name."""
    case = case_of("mlp")
    together, alone = pair_of("mlp", method)
    for factor in (1e-2, 1.0):
        other = together.with_damping(hw.relative(factor))
        shares = [influence.with_damping(hw.relative(factor)) for influence in alone]
        absolute = {f"{k}/{n}": d for k, i in enumerate(shares) for n, d in i.absolute_damping.items()}
        assert other.absolute_damping == pytest.approx(absolute, rel=1e-9)
        assert len({f"{d:.6g}" for d in absolute.values()}) == 6
        expected = sum(influence.influences(*rows_of(case)) for influence in shares) / 3
        assert_close(other.influences(*rows_of(case)), expected, 1e4)
        assert_close(together.with_damping(absolute).influences(*rows_of(case)), expected, 1e4)


def test_a_weight_of_two_is_the_row_twice() -> None:
    case, weights = case_of("mlp"), torch.tensor([1.0, 2, 1, 3, 1, 1, 2, 1, 0, 1, 1]).double()
    index = torch.arange(11).repeat_interleave(weights.long())
    for method in (hw.Direct("ggn"), hw.Ekfac(), TracIn((0.5, 1.0, 2.0))):
        batch = TorchBatch(case.x, case.y, weights)
        weighted = made(case, method, states_of(case)).fit([batch.take(slice(0, 4)), batch.take(slice(4, 11))])
        repeated = made(case, method, states_of(case)).fit([(case.x[index], case.y[index])])
        assert weighted.n_train == repeated.n_train == 14
        assert_close(weighted.influences(*rows_of(case)), repeated.influences(*rows_of(case)), 1e4)
        scores = weighted.attribute([batch], [(case.x_query, case.y_query)]).values
        assert_close(scores, repeated.influences(*rows_of(case)).numpy() * weights.numpy(), 1e4)


def test_each_model_knows_what_its_separable_spectrum_costs() -> None:
    together, alone = pair_of("mlp", "ekfac-separable")
    expected = {f"{k}/{n}": e for k, i in enumerate(alone) for n, e in i.truncation_errors.items()}
    assert {n: pytest.approx(e) for n, e in expected.items()} == together.truncation_errors
    assert min(max(errors) for errors in expected.values()) > 1e-3


def test_a_measurement_is_each_models_own() -> None:
    case = case_of("mlp")

    def third(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return output[:, 2] ** 2

    pair = [
        made(case, hw.Direct("ggn"), states, measurement=third).fit(case.loader())
        for states in (states_of(case), states_of(case)[:1], states_of(case)[1:2], states_of(case)[2:])
    ]
    together, *alone = (influence.influences(*rows_of(case)) for influence in pair)
    assert pair[0].explained == "third"
    assert_close(together, sum(alone) / 3, 1e4)


# Checkpoints ----------------------------------------------------------------------------------------------------------


def test_state_dicts_models_and_files_are_the_same_checkpoints(tmp_path: Any) -> None:
    case, states = mlp(), states_of(case_of("mlp"))
    model = Mlp().double()
    model.load_state_dict(states[1])
    torch.save(states[2], tmp_path / "third.pt")
    torch.save(states[0], tmp_path / "first.pt")
    mixed = made(case, hw.Direct("ggn"), (str(tmp_path / "first.pt"), model, tmp_path / "third.pt"))
    plain = made(case, hw.Direct("ggn"), states)
    assert mixed.block_names == [f"{k}/{name}" for k in range(3) for name in ("first", "second")]
    scores = [influence.fit(case.loader()).influences(*rows_of(case)) for influence in (mixed, plain)]
    assert_close(scores[0], scores[1])


def test_the_users_model_gives_the_architecture_and_is_not_changed() -> None:
    case, other = mlp(), mlp()
    with torch.no_grad():
        for parameter in other.model.parameters():
            parameter.mul_(17.0)
    for model in (other.model, case.model):
        model.second.bias.requires_grad_(False)
    before = {name: value.clone() for name, value in other.model.state_dict().items()}
    states = states_of(case)
    influence = made(other, hw.Direct("ggn"), states, {"w": ["first.weight", "second"]}).fit(other.loader())
    expected = (
        made(case, hw.Direct("ggn"), states, {"w": ["first.weight", "second"]})
        .fit(case.loader())
        .influences(*rows_of(case))
    )
    states[0]["first.weight"].zero_()
    assert_close(influence.influences(*rows_of(case)), expected)
    assert influence.model is other.model
    assert all(torch.equal(value, before[name]) for name, value in other.model.state_dict().items())
    assert all(parameter.grad is None for parameter in other.model.parameters())
    assert influence.coverage.missing == ("first.bias",)
    assert influence.coverage.fraction == influence.provider.coverage_fraction == 24 / 28
    assert influence.n_parameters == 3 * 24


def test_weights_of_any_model_that_change_after_the_fit_are_noticed() -> None:
    case = case_of("mlp")
    influence = made(case, hw.Direct("ggn"), states_of(case)).fit(case.loader())
    with torch.no_grad():
        influence.provider.members[2].model.first.bias[0] += 1e-6
    with pytest.raises(StaleFit):
        influence.influences(*rows_of(case))


class Other(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.third = nn.Linear(3, 4), nn.Linear(4, 3)


def test_checkpoints_that_do_not_fit_are_refused(tmp_path: Any) -> None:
    case, states = case_of("mlp"), states_of(case_of("mlp"))
    torch.save({"model": states[0]}, tmp_path / "wrapped.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    shrunk = states[0] | {"first.weight": torch.zeros(4, 2).double()}
    wrong: list[tuple[Any, str]] = [
        ([states[0], Other()], r"Checkpoint 1 is.*missing are \['second.weight', .*unexpected are \['third.weight'"),
        ([tmp_path / "wrapped.pt"], r"Checkpoint 0 \(.*wrapped.pt\).*missing.*unexpected are \['model'\]"),
        ([tmp_path / "list.pt"], r"Checkpoint 0 \(.*list.pt\) is list; expected a state dict"),
        ([states[0], 3], "Checkpoint 1 is int; expected a state dict"),
        ([shrunk], r"Checkpoint 0 does not fit.*first.weight"),
    ]
    for checkpoints, said in wrong:
        with pytest.raises(InvalidInput, match=f"(?s){said}"):
            made(case, hw.Direct("ggn"), checkpoints)
    for one in (states[0], case.model, "file.pt", tmp_path):
        with pytest.raises(InvalidSetting, match="expected a sequence of checkpoints"):
            made(case, hw.Direct("ggn"), one)
    with pytest.raises(InvalidSetting, match="empty"):
        made(case, hw.Direct("ggn"), [])


# TracIn ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "structure"),
    [
        pytest.param(name, structure, marks=() if name == "mlp" or turn == k else pytest.mark.slow)
        for k, name in enumerate(("mlp", "images", "sentences"))
        for turn, structure in enumerate(("full", "layer", "parameter"))
    ],
)
def test_tracin_is_the_sum_of_learning_rates_times_gradient_dots(name: str, structure: str) -> None:
    case, rates = case_of(name), (0.5, 0.02, 3.0)
    _, alone = fitted_pair(case, hw.GradDot(), structure)
    for given, each in ((0.7, (0.7,) * 3), (list(rates), rates)):
        influence = made(case, TracIn(given), states_of(case), structure).fit(case.loader())
        for mode in ("up", "perturbation") if case.perturbs else ("up",):
            shares = [i.influences(*rows_of(case), mode=mode) for i in alone]
            expected = sum(rate * share for rate, share in zip(each, shares, strict=True))
            assert_close(influence.influences(*rows_of(case), mode=mode), expected)
        expected = sum(r * i.self_influence(case.loader()) for r, i in zip(each, alone, strict=True))
        assert_close(influence.self_influence(case.loader()), expected)
        scores = influence.attribute(case.loader(), [(case.x_query, case.y_query)])
        assert_close(scores.values, influence.influences(*rows_of(case)))


def test_tracin_of_one_model_is_its_learning_rate_times_the_gradient_dot() -> None:
    case = case_of("mlp")
    dot = made(case, hw.GradDot(), None).fit(case.loader())
    for method in (TracIn(0.3), TracIn((0.3,))):
        influence = made(case, method, None).fit(case.loader())
        for mode in ("up", "perturbation"):
            expected = 0.3 * dot.influences(*rows_of(case), mode=mode)
            assert_close(influence.influences(*rows_of(case), mode=mode), expected)
        assert influence.block_names == ["first", "second"]
        assert_close(influence.self_influence(case.loader()), 0.3 * dot.self_influence(case.loader()))


def test_tracin_of_one_step_is_what_that_step_takes_off_the_query_loss() -> None:
    """Gradient descent on one train row: the query's loss falls by the rate times the dot product, to first order."""
    case, rate = mlp(), 1e-5
    influence = made(case, TracIn(rate), [case.model]).fit(case.loader())
    scores = influence.influences(*rows_of(case)).numpy()
    for k in (0, 6):
        model = mlp().model
        case.loss(model(case.x[k : k + 1]), case.y[k : k + 1]).backward()
        losses = []
        for step in (0.0, rate):
            with torch.no_grad():
                for p in model.parameters():
                    p.sub_(step * p.grad)
                losses.append(nn.functional.cross_entropy(model(case.x_query), case.y_query, reduction="none").numpy())
        np.testing.assert_allclose(losses[0] - losses[1], scores[:, k], atol=1e-4 * np.abs(scores).max())


def test_learning_rates_that_mean_nothing_are_refused() -> None:
    case = case_of("mlp")
    with pytest.raises(InvalidSetting, match="2 learning rates and 3 checkpoints"):
        made(case, TracIn((0.1, 0.2)), states_of(case))
    with pytest.raises(InvalidSetting, match="2 learning rates and 1 checkpoints"):
        made(case, TracIn((0.1, 0.2)), None)
    for wrong in (-0.1, float("nan"), (0.1, float("inf")), (True,), ("0.1",)):
        with pytest.raises(InvalidSetting, match="learning rate is"):
            TracIn(wrong)
    influence = made(case, TracIn(), states_of(case)).fit(case.loader())
    with pytest.raises(InvalidSetting, match="only similarity"):
        influence.attribute(case.loader(), case.loader(), unit="removal")


# The provider, and any framework --------------------------------------------------------------------------------------

MODELS = [(WEIGHTS, BIASES), (WEIGHTS[::-1] * 0.3, BIASES + 1.0)]
COSTS = np.array([1.0, 4.0])


def linear_ensemble(weights: Any = None) -> EnsembleProvider:
    return EnsembleProvider([LinearProvider(*model) for model in MODELS], weights)


def slow_gradient(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    residuals = [weights @ x + biases - y for weights, biases in MODELS]
    return np.concatenate([c * r * np.append(x, 1.0) for residual in residuals for c, r in zip(COSTS, residual)])  # noqa: B905


class TestEnsembleProvider(StructuredProviderContract):
    rounding = 1e5  # the truth of the mixed gradients is a difference quotient

    def provider(self) -> EnsembleProvider:
        return linear_ensemble()

    def batch(self, index: Any) -> Rows:
        return Rows(X[list(index)], Y[list(index)])

    def slow_grads(self) -> np.ndarray:
        return np.array([slow_gradient(x, y) for x, y in zip(X, Y, strict=True)])

    def slow_mixed_grads(self) -> np.ndarray:
        step = 1e-4
        up, down = (
            np.array([[slow_gradient(x + e, y) for e in s * np.eye(3)] for x, y in zip(X, Y, strict=True)])
            for s in (step, -step)
        )
        return (up - down) / (2 * step)

    def slow_curvature(self, kind: str) -> np.ndarray:
        return np.kron(np.eye(2), linear_curvature(X))


class LinearEnsembleInfluence(Attributor[Any]):
    def __init__(self, method: Any, damping: Any = None):
        super().__init__(linear_ensemble(), method, damping=damping)


@pytest.mark.parametrize("method", [hw.Direct(), hw.Kfac(), hw.Ekfac(), TracIn((0.5, 3.0))], ids=repr)
class TestEnsembleInfluence(InfluenceContract):
    @pytest.fixture(autouse=True)
    def _which(self, method: Any) -> None:
        self.method = method
        if isinstance(method, TracIn):
            self.dampings = ()

    def influence(self, damping: Any = None) -> LinearEnsembleInfluence:
        return LinearEnsembleInfluence(self.method, damping)

    def train(self) -> tuple[np.ndarray, np.ndarray]:
        return X, Y

    def queries(self) -> tuple[np.ndarray, np.ndarray]:
        return X[:3] + 1.0, Y[1:4]

    def slow_scores(self, mode: str, damping: float) -> np.ndarray | None:
        if mode == "perturbation":
            return None
        queries, train = (
            np.array([slow_gradient(x, y) for x, y in zip(*rows, strict=True)])
            for rows in (self.queries(), self.train())
        )
        if isinstance(self.method, TracIn):
            operator = np.kron(np.diag([0.5, 3.0]), np.eye(8))
        else:
            curvature = np.kron(np.eye(2), linear_curvature(X) / 7)
            means = [np.trace(curvature[k : k + 4, k : k + 4]) / 4 for k in range(0, 16, 4)]
            operator = np.linalg.inv(curvature + damping * np.kron(np.diag(means), np.eye(4))) / 2
        return queries @ operator @ train.T


def test_ggn_gradients_of_the_models_are_taken_output_by_output() -> None:
    case = case_of("mlp")
    influence = made(case, hw.Direct("ggn"), states_of(case))
    batch = TorchBatch(case.x, case.y)
    draws = influence.provider.ggn_grads(batch)
    for k, member in enumerate(influence.provider.members):
        for draw, own in zip(draws, member.ggn_grads(batch), strict=True):
            assert_close(draw[f"{k}/second"].flat(), own["second"].flat())
    assert list(draws[0]) == influence.block_names
    assert linear_ensemble().ggn_grads(Rows(X, Y)) is None


def test_losses_and_doubt_are_means_over_models() -> None:
    case = case_of("mlp")
    ensemble = made(case, hw.Direct("ggn"), states_of(case)).provider
    batch = TorchBatch(case.x, case.y)
    p = []
    for member in ensemble.members:
        with torch.no_grad():
            p.append(member.model(case.x).softmax(1)[torch.arange(11), case.y])
    assert_close(ensemble.losses(batch), sum(-v.log() for v in p) / 3)
    margins = ensemble.of_output("margin")
    assert margins.weights == ensemble.weights
    assert_close(margins.one_minus_p(batch), sum(1 - v for v in p) / 3)
    assert ensemble.parameters("1/second").tolist() == ensemble.members[1].parameters("second").tolist()


def test_ensembles_that_make_no_sense_are_refused() -> None:
    case = case_of("mlp")
    torch.manual_seed(0)
    small, large = (TorchGradientProvider(m, case.loss) for m in (nn.Linear(3, 2), nn.Linear(3, 4)))
    with pytest.raises(BlockMismatch, match=r"Model 1 has the blocks {'full': 16}, model 0 has {'full': 8}"):
        EnsembleProvider([small, large])
    with pytest.raises(InvalidSetting, match="at least one"):
        EnsembleProvider([])
    for wrong in ((1.0,), (1.0, float("nan"))):
        with pytest.raises(InvalidSetting, match="expected 2 finite numbers"):
            linear_ensemble(wrong)
    for name in ("first", "2/first", "0/third", "x/first"):
        with pytest.raises(BlockMismatch, match=f"no block '{name}'.*'0/first'"):
            linear_ensemble().curvature_product(Rows(X, Y), name, np.eye(4), "ggn")
    draws = patch.object(LinearProvider, "fisher_grads", lambda self, *a, **k: [OrderedDict()] * int(self.biases[0]))
    with draws, pytest.raises(BlockMismatch, match="the same number of all"):
        EnsembleProvider([LinearProvider(WEIGHTS, BIASES * 0 + k) for k in (1, 2)]).fisher_grads(Rows(X, Y), "exact")


@pytest.mark.parametrize(
    "inner",
    [
        IdentityOperator(6),
        DenseOperator(np.diag([1.0, 2, 3, 4, 5, 6]), psd=True),
        KroneckerOperator(np.diag([1.0, 3.0]), np.diag([1.0, 2, 5]), psd=True).eigen,
    ],
    ids=lambda v: type(v).__name__,
)
def test_a_scaled_operator_is_scaled_on_every_route(inner: Any) -> None:
    from headwater.blocks import Block, Layout, Parameter, Part, Piece
    from headwater.gradients.block import BlockGradient
    from headwater.gradients.outer import Outer

    random = np.random.default_rng(0)
    layout = Layout(Block("b", (Parameter("w", (2, 3)),)), (Part(Piece("w", 0, (2, 3))),))
    value = Outer(random.normal(size=(4, 2, 3)), random.normal(size=(4, 2, 2)))
    block, flat = BlockGradient(layout, (value,)), value.dense().reshape(4, 6)
    operator = ScaledOperator(-0.3, inner)
    expected = -0.3 * inner.apply(flat)
    assert_close(operator.apply(flat), expected)
    assert_close(operator.apply_gradient(value).dense().reshape(4, 6), expected)
    whole = ScaledOperator(-0.3, BlockDiagonalOperator(layout, [inner]))
    assert_close(whole.apply_block(block).flat(), expected)
    assert_close(operator.quadratic_gradient(value), (expected * flat).sum(1))
    assert_close(whole.quadratic(block), (expected * flat).sum(1))
    for train_per_query in (0.01, 1e6):
        left, right = operator.sides(value, train_per_query)
        assert_close(left.apply_gradient(value).inner(right.apply_gradient(value)), expected @ flat.T)
        left, right = whole.block_sides(block, train_per_query)
        assert_close(left.apply_block(block).inner(right.apply_block(block)), expected @ flat.T)


# What these tests must notice -----------------------------------------------------------------------------------------


def law_of_means() -> None:
    case = case_of("mlp")
    for method in (hw.Direct("ggn"), hw.Ekfac(), hw.GradCos()):
        together, alone = fitted_pair(case, method)
        expected = sum(influence.influences(*rows_of(case)) for influence in alone) / 3
        assert_close(together.influences(*rows_of(case)), expected, 1e4)
        factors = together.influence_factors(case.x_query, case.y_query)
        assert_close(together.influences_from_factors(factors, case.x, case.y), expected, 1e4)


def law_of_rates() -> None:
    test_tracin_is_the_sum_of_learning_rates_times_gradient_dots("mlp", "layer")


def law_of_self_influence() -> None:
    case = case_of("mlp")
    together, alone = fitted_pair(case, hw.Ekfac())
    expected = sum(influence.self_influence(case.loader()) for influence in alone) / 3
    assert_close(together.self_influence(case.loader()), expected, 1e4)


def law_of_perturbations() -> None:
    case = case_of("mlp")
    together, alone = fitted_pair(case, hw.Direct("ggn"))
    expected = sum(influence.influences(*rows_of(case), mode="perturbation") for influence in alone) / 3
    assert_close(together.influences(*rows_of(case), mode="perturbation"), expected, 1e4)


def law_of_one_model() -> None:
    test_tracin_of_one_model_is_its_learning_rate_times_the_gradient_dot()


LAWS = (law_of_one_model, law_of_self_influence, law_of_perturbations, law_of_rates, law_of_means)
"""The cheap ones first."""


@contextmanager
def all_models_are_the_first() -> Iterator[None]:
    locate = EnsembleProvider._locate

    def grads(self: Any, batch: Any, **options: Any) -> Any:
        return self._merge([self.members[0].grads(batch, **options)] * len(self.members))

    with patch.object(EnsembleProvider, "grads", grads), patch.object(EnsembleProvider, "_locate", locate):
        yield


@contextmanager
def train_gradients_are_weighted_too() -> Iterator[None]:
    grads = EnsembleProvider.grads

    def wrong(self: Any, batch: Any, *, query: bool = False, weighted: bool = True) -> Any:
        found = grads(self, batch, query=query, weighted=weighted)
        scale = {name: torch.full((len(batch),), self.block_scale(name), dtype=torch.float64) for name in found}
        return found if query else OrderedDict((name, v.weighted(scale[name])) for name, v in found.items())

    with patch.object(EnsembleProvider, "grads", wrong):
        yield


@contextmanager
def unit_gradients_are_of_all_models_together() -> Iterator[None]:
    from headwater.gradients.normalised import NormalisedGradientProvider

    def wrong(self: Any, provider: Any) -> Any:
        return NormalisedGradientProvider(provider)

    with patch.object(hw.GradCos, "view", wrong):
        yield


@contextmanager
def models_exchange_their_curvature() -> Iterator[None]:
    fit = hw.Direct.fit

    def wrong(self: Any, provider: Any, loader: Any, progress: bool) -> Any:
        found, rows = fit(self, provider, loader, progress)
        names = list(found)
        turned = [found[name] for name in (*names[2:], *names[:2])]
        return OrderedDict(zip(names, turned, strict=True)), rows

    with patch.object(hw.Direct, "fit", wrong):
        yield


def _replaced(owner: Any, name: str, value: Any) -> Any:
    return lambda: patch.object(owner, name, value)


MUTANTS = {
    "an ensemble drops its members' weights": _replaced(EnsembleProvider, "block_scale", lambda self, block: 1.0),
    "all models count as the first does": _replaced(
        EnsembleProvider, "block_scale", lambda self, block: self.weights[0]
    ),
    "all models' gradients are the first's": all_models_are_the_first,
    "train gradients carry the members' weights too": train_gradients_are_weighted_too,
    "unit gradients are of all models together": unit_gradients_are_of_all_models_together,
    "models exchange their curvature": models_exchange_their_curvature,
    "the first learning rate serves all checkpoints": _replaced(
        TracIn,
        "rates",
        lambda self, n: (
            (self.learning_rates[0] if isinstance(self.learning_rates, tuple) else self.learning_rates,) * n
        ),
    ),
    "TracIn takes the mean over checkpoints": _replaced(
        TracIn,
        "view",
        lambda self, provider: (
            provider.with_weights([r / len(provider.members) for r in self.rates(len(provider.members))])
            if isinstance(provider, EnsembleProvider)
            else provider
        ),
    ),
    "TracIn of one model forgets its rate": _replaced(TracIn, "fit", hw.GradDot.fit),
    "a scaled operator forgets its factor in self-influence": _replaced(
        ScaledOperator, "quadratic", lambda self, value: self.inner.quadratic(value)
    ),
    "a scaled operator scales both sides": _replaced(
        ScaledOperator,
        "block_sides",
        lambda self, queries, per: tuple(
            ScaledOperator(self.factor, side) for side in self.inner.block_sides(queries, per)
        ),
    ),
    "a scaled operator forgets its factor in factors": _replaced(
        ScaledOperator, "apply_block", lambda self, value: self.inner.apply_block(value)
    ),
}
