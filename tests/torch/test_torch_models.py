"""Models, losses and inputs of all kinds: right, or refused with a reason; and the model is left as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from models import CASES, Case, Mlp, images, language, mlp, sentences, settle, signals, split_rows
from torch import nn
from truth import Truth, assert_close, fitted

import headwater as hw
from headwater.errors import (
    BatchMismatch,
    BlockMismatch,
    InvalidInput,
    InvalidSetting,
    NonFiniteValue,
    NotFittedError,
    RowsInteract,
    StaleFit,
    UnsupportedLoss,
    UnsupportedModel,
)
from headwater.random import row_normals, row_uniforms
from headwater.torch import (
    Bernoulli,
    OutputHessian,
    TargetSampler,
    TorchBatch,
    TorchComposableInfluence,
    TorchGradientProvider,
)

SUM = nn.CrossEntropyLoss(reduction="sum")


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def classes(seed: int, top: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, top, shape, generator=torch.Generator().manual_seed(seed))


# Odd models -----------------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    """Two layers share a weight; a third shares a bias with the first."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = nn.Linear(3, 3), nn.Linear(3, 3, bias=False), nn.Linear(3, 3)
        self.two.weight = self.one.weight
        self.three.bias = self.one.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.three(torch.tanh(self.two(torch.tanh(self.one(x)))))


class Twice(nn.Module):
    """Modules that are called twice, one of them under two names."""

    def __init__(self):
        super().__init__()
        self.layer, self.norm, self.head = nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 3)
        self.again = self.layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(torch.tanh(self.layer(self.norm(x))))
        return self.head(torch.tanh(self.again(x)))


class TopLevel(nn.Module):
    """Parameters of the model itself: a vector, a matrix, a cube, and a single number."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.randn(3))
        self.mix = nn.Parameter(torch.randn(3, 3))
        self.cube = nn.Parameter(torch.randn(3, 2, 3))
        self.heat = nn.Parameter(torch.tensor(1.5))
        self.head = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh((x + self.shift) @ self.mix)
        x = torch.tanh(torch.einsum("ni,iko->nko", x, self.cube)).sum(1)
        return self.head(x) * self.heat


class Keywords(nn.Module):
    """Layers that are called with keywords."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(input=torch.tanh(self.norm(input=self.first(input=x))))


class Scaled(nn.Linear):
    """A subclass with a forward pass of its own: its layer rule would be wrong."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(torch.sin(input)) * 3.0


class Standardised(nn.Conv1d):
    """A subclass that changes its weight on the way."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.conv1d(input, self.weight - self.weight.mean((1, 2), keepdim=True), self.bias)


class Subclasses(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.first, self.head = Standardised(1, 2, 2), Scaled(4, 3), nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.first(self.conv(x.unsqueeze(1)).flatten(1))))


class Unused(nn.Module):
    """A layer that is never called, and a weight that is used without calling its layer."""

    def __init__(self):
        super().__init__()
        self.never, self.silent, self.head = nn.Linear(2, 2), nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(F.linear(x, self.silent.weight, self.silent.bias)))


class Attends(nn.Module):
    """torch's attention module reads its output projection's weight without calling the layer."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.stack([x, x.flip(1)], dim=1).repeat(1, 1, 2)[:, :, :4]
        return self.head(torch.tanh(self.attention(x, x, x, need_weights=False)[0].mean(1)))


class Encodes(nn.Module):
    """A whole encoder layer, which has a fast path that calls none of its layers."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(4, 2, 3, dropout=0.1, activation="gelu", batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.stack([x, x.flip(1)], dim=1).repeat(1, 1, 2)[:, :, :4]
        return self.head(self.encoder(x).mean(1))


class Recurrent(nn.Module):
    """No rule at all for the recurrent part."""

    def __init__(self):
        super().__init__()
        self.memory, self.head = nn.GRUCell(1, 2), nn.Linear(2, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state = x.new_zeros(len(x), 2)
        for step in x.unbind(1):
            state = self.memory(step.unsqueeze(1), state)
        return self.head(state)


def inplace() -> nn.Module:
    return nn.Sequential(
        nn.Linear(3, 6), nn.ReLU(inplace=True), nn.Linear(6, 4), nn.Hardtanh(inplace=True), nn.Linear(4, 3)
    )


def normalised() -> nn.Module:
    """Batch norm over plain features, instance norm, and a weight norm, which is a parametrisation."""
    return nn.Sequential(
        nn.BatchNorm1d(3),
        nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)),
        nn.Unflatten(1, (2, 2)),
        nn.InstanceNorm1d(2, affine=True, track_running_stats=True),
        nn.Flatten(),
        nn.Tanh(),
        nn.Linear(4, 3),
    )


def transposed() -> nn.Module:
    return nn.Sequential(nn.Unflatten(1, (3, 1)), nn.ConvTranspose1d(3, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(4, 3))


def deeper() -> nn.Module:
    return nn.Sequential(nn.Unflatten(1, (1, 3, 1, 1)), nn.Conv3d(1, 2, (2, 1, 1)), nn.Flatten(), nn.Linear(4, 3))


ODD: dict[str, Callable[[], nn.Module]] = {
    "no bias": partial(Mlp, bias=False),
    "tied": Tied,
    "twice": Twice,
    "top level": TopLevel,
    "keywords": Keywords,
    "subclasses": Subclasses,
    "unused": Unused,
    "attention": Attends,
    "encoder": Encodes,
    "recurrent": Recurrent,
    "in place": inplace,
    "normalised": normalised,
    "transposed": transposed,
    "deeper": deeper,
}


def odd(name: str, loss: Any = None) -> Case:
    model = settle(ODD[name](), 40)
    x, x_query = normal(41, 7, 3), normal(42, 3, 3)
    return Case(name, model, loss or nn.CrossEntropyLoss(), x, classes(43, 3, 7), x_query, classes(44, 3, 3))


def slow_gradients(case: Case, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray | None]:
    """Of the loss, and mixed with the inputs, one row at a time."""
    given = case.model, case.loss, case.x, case.y, names
    return oracle.per_sample_grads(*given), oracle.mixed_grads(*given) if case.perturbs else None


@cache
def slow_gradients_of_odd(name: str, names: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray | None]:
    return slow_gradients(odd(name), names)


def check_gradients(case: Case, structure: Any, slow: Callable[..., Any] = slow_gradients) -> None:
    """All three verbs of the provider against autograd."""
    provider = TorchGradientProvider(case.model, case.loss, blocks=structure, likelihood=case.likelihood)
    names = [n for group in oracle.block_names(case.model, structure).values() for n in group]
    batch = TorchBatch(case.x, case.y)
    expected, mixed = slow(case, names)
    assert_close(provider.flat_grads(batch), expected)
    directions = normal(45, 4, expected.shape[1])
    assert_close(provider.jacobian_prod(batch, directions), expected @ directions.numpy().T)
    if case.perturbs:
        assert_close(provider.flat_mixed_grads(batch), mixed)


@pytest.mark.parametrize("structure", ["full", "layer", "parameter"])
@pytest.mark.parametrize("name", ODD)
def test_gradients_of_odd_models_are_those_of_autograd(name: str, structure: str) -> None:
    check_gradients(odd(name), structure, lambda case, names: slow_gradients_of_odd(case.name, tuple(names)))


@pytest.mark.parametrize("name", CASES)
def test_gradients_of_the_cases_are_those_of_autograd(name: str) -> None:
    case = CASES[name]()
    for structure in ("layer", case.own_blocks):
        check_gradients(case, structure)


SHAMPOO = ("subclasses", "unused", "attention", "encoder")
"""Models in which a layer's rule does not hold: their Kronecker factors there are Shampoo's, which the oracle lacks."""


def odd_fits() -> list[Any]:
    methods = (hw.Direct("ggn"), hw.Direct("fisher"), hw.Ekfac(), hw.Kfac())
    names = [n for n in ODD if n not in ("transposed", "deeper", "normalised", "tied")]
    pairs = [(n, m) for n in names for m in methods if n not in SHAMPOO or isinstance(m, hw.Direct)]
    return [
        pytest.param(
            n, m, id=f"{n}-{m!r}", marks=() if (names.index(n) + methods.index(m)) % 2 == 0 else pytest.mark.slow
        )
        for n, m in pairs
    ]


@pytest.mark.parametrize(("name", "method"), odd_fits())
def test_scores_of_odd_models_equal_the_dense_formula(name: str, method: Any) -> None:
    case = odd(name)
    truth = Truth(case)
    damping = truth.absolute(method, "full", 0.1)
    expected, condition = truth.scores(method, "full", damping)
    got = fitted(case, method, "full", damping=hw.relative(0.1)).influences(case.x_query, case.y_query, case.x, case.y)
    assert_close(got, sum(expected.values()), condition)


def test_a_tied_linear_weight_has_kronecker_factors_over_both_uses() -> None:
    truth, method = Truth(odd("tied")), hw.Kfac()
    case = truth.case
    blocks = {"shared": ["one.weight"], "last": ["three.weight"]}
    expected, condition = truth.scores(method, blocks, truth.absolute(method, blocks, 0.1))
    influence = fitted(case, method, blocks, damping=hw.relative(0.1))
    got = influence.influences_by_block(case.x_query, case.y_query, case.x, case.y)
    for block in blocks:
        assert_close(got[block], expected[block], condition)


def test_a_subclass_with_another_forward_is_not_trusted() -> None:
    """Its rule would give other numbers than autograd; were they equal, the check above would show nothing."""
    case = odd("subclasses")
    provider = TorchGradientProvider(case.model, case.loss, blocks="layer")
    before = [
        type(part).__name__ for value in provider.grads(TorchBatch(case.x, case.y)).values() for part in value.parts
    ]
    plain = TorchGradientProvider(odd("no bias").model, case.loss, blocks="layer")
    trusted = [type(part).__name__ for v in plain.grads(TorchBatch(case.x, case.y)).values() for part in v.parts]
    assert set(before) == {"Dense", "Outer"} and set(trusted) == {"Outer"}


# Frozen parameters, coverage, blocks ----------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [["first.weight"], ["first.bias"], ["second.weight", "second.bias"]], ids=str)
@pytest.mark.parametrize("structure", ["full", "layer", "parameter"])
def test_frozen_parameters_are_left_out(frozen: list[str], structure: str) -> None:
    case = mlp()
    for name in frozen:
        case.model.get_parameter(name).requires_grad_(False)
    check_gradients(case, structure)
    truth = Truth(case)
    for method in (hw.Direct("ggn"), hw.Kfac(), hw.Ekfac()):
        influence = fitted(case, method, structure, damping=hw.relative(0.1))
        size = sum(p.numel() for n, p in case.model.named_parameters() if n not in frozen)
        assert influence.n_parameters == size
        assert (influence.coverage.attributed, influence.coverage.trainable) == (size, size)
        expected, condition = truth.scores(method, structure, truth.absolute(method, structure, 0.1))
        got = influence.influences(case.x_query, case.y_query, case.x, case.y)
        assert_close(got, sum(expected.values()), condition)


def test_frozen_layers_between_trainable_ones_pass_gradients_on() -> None:
    case = images()
    for name in ("split.weight", "split.bias", "groups.weight"):
        case.model.get_parameter(name).requires_grad_(False)
    check_gradients(case, "layer")


def test_a_model_without_trainable_parameters_is_refused() -> None:
    with pytest.raises(InvalidSetting, match="nothing to attribute"):
        TorchGradientProvider(mlp().model.requires_grad_(False), SUM)


def test_coverage_counts_what_the_blocks_leave_out() -> None:
    case = signals()
    influence = TorchComposableInfluence(case.model, case.loss, hw.GradDot(), blocks=case.own_blocks)
    coverage = influence.coverage
    assert (coverage.attributed, coverage.trainable) == (24 + 16 + 4 + 10, 24 + 16 + 4 + 4 + 10)
    assert coverage.missing == ("fine.bias",)
    assert coverage.fraction == pytest.approx(54 / 58)
    whole = TorchComposableInfluence(case.model, case.loss, hw.GradDot()).coverage
    assert (whole.attributed, whole.missing, whole.fraction) == (58, (), 1.0)


def test_a_tied_weight_is_counted_once() -> None:
    case = language()
    influence = TorchComposableInfluence(case.model, case.loss, hw.GradDot(), likelihood="cross_entropy")
    assert influence.n_parameters == influence.coverage.trainable == 20 + 12 + 8 + 48 + 20 + 8 + 15 + 16


@pytest.mark.parametrize(
    ("blocks", "error", "words"),
    [
        ({"a": ["first"], "b": ["first.bias"]}, BlockMismatch, "first.bias"),
        ({"a": ["third"]}, BlockMismatch, "third"),
        ({"a": "first"}, InvalidSetting, "list of names"),
        ("layers", InvalidSetting, "layers"),
    ],
)
def test_blocks_that_make_no_sense_are_refused(blocks: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        TorchGradientProvider(mlp().model, SUM, blocks=blocks)


# Inputs ---------------------------------------------------------------------------------------------------------------


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(3, 3), nn.Bilinear(3, 2, 3)

    def forward(self, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return self.right(torch.tanh(self.left(x)), z)


def test_tuples_are_positional_arguments() -> None:
    x, query = (normal(50, 6, 3), normal(51, 6, 2)), (normal(52, 2, 3), normal(53, 2, 2))
    case = Case("pair", settle(Pair(), 54), nn.CrossEntropyLoss(), x, classes(55, 3, 6), query, classes(56, 3, 2))
    check_gradients(case, "layer")
    truth, method = Truth(case), hw.Direct("ggn")
    expected, condition = truth.scores(method, "layer", truth.absolute(method, "layer", 0.1))
    got = fitted(case, method, "layer", damping=hw.relative(0.1)).influences(query, case.y_query, x, case.y)
    assert_close(got, sum(expected.values()), condition)
    with pytest.raises(UnsupportedModel, match="one floating-point tensor"):
        fitted(case, method, "layer").influences(query, case.y_query, mode="perturbation")


class Lookup(nn.Module):
    """One id a row, without a position axis; the last table row is padding."""

    def __init__(self, **options: Any):
        super().__init__()
        self.table, self.head = nn.Embedding(5, 3, **options), nn.Linear(3, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.table(ids)))


@pytest.mark.parametrize("options", [{}, {"padding_idx": -1}, {"sparse": True}], ids=str)
def test_one_integer_a_row(options: dict[str, Any]) -> None:
    model = settle(Lookup(**options), 57)
    case = Case(
        "lookup",
        model,
        nn.CrossEntropyLoss(),
        classes(58, 5, 9),
        classes(59, 3, 9),
        classes(60, 5, 4),
        classes(61, 3, 4),
    )
    if options.get("sparse"):
        model.table.sparse = False
        truth = Truth(case)
        _ = truth.train_grads, truth.query_grads
        matrix = truth.matrix(hw.Ekfac(), oracle.trainable(model))
        model.table.sparse = True
        assert matrix.any()
    else:
        truth = Truth(case)
        check_gradients(case, "layer")
    for method in (hw.Ekfac(), hw.Kfac("factored"), hw.GradCos()):
        got = fitted(case, method, "full", damping=0.1).influences(case.x_query, case.y_query, case.x, case.y)
        model.table.sparse = False
        expected, condition = truth.scores(method, "full", {"full": 0.1})
        model.table.sparse = bool(options.get("sparse"))
        assert_close(got, expected["full"], condition)


@pytest.mark.parametrize("method", [hw.Direct("ggn"), hw.Direct("hessian", allow_indefinite=True)], ids=repr)
def test_sparse_gradients_of_an_embedding_make_no_difference(method: Any) -> None:
    ids, y, scores = classes(58, 5, 9), classes(59, 3, 9), []
    for sparse in (False, True):
        model = settle(Lookup(sparse=sparse), 57)
        influence = TorchComposableInfluence(model, nn.CrossEntropyLoss(), method, damping=0.3).fit([(ids, y)])
        scores.append(influence.influences(ids, y))
    assert_close(scores[1], scores[0], 1e3)


@pytest.mark.parametrize("options", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}], ids=str)
def test_embeddings_that_change_their_weights_or_mix_rows_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModel, match=next(iter(options))):
        TorchGradientProvider(Lookup(**options).double().eval(), SUM)


def test_a_padding_token_has_no_gradient() -> None:
    case = sentences()
    provider = TorchGradientProvider(case.model, case.loss, blocks="parameter")
    table = provider.grads(TorchBatch(case.x, case.y))["tokens.weight"].flat().reshape(len(case.y), 6, 4)
    assert (case.x["ids"] == 0).any()
    assert not table[:, 0].any() and table[:, 1:].any()


def test_an_input_of_the_wrong_dtype_is_refused_with_both_dtypes() -> None:
    case = mlp()
    with pytest.raises(InvalidInput, match=r"x is torch.float32, the model's parameters are torch.float64"):
        TorchGradientProvider(case.model, case.loss).flat_grads(TorchBatch(case.x.float(), case.y))


def test_a_model_that_converts_its_input_may_get_another_dtype() -> None:
    class Converts(Mlp):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x.double())

    case = mlp()
    model = settle(Converts(), 1)
    got = TorchGradientProvider(model, case.loss).flat_grads(TorchBatch(case.x.float(), case.y))
    assert_close(got, oracle.per_sample_grads(model, case.loss, case.x.float(), case.y, oracle.trainable(model)))


def test_numpy_arrays_are_taken() -> None:
    case = mlp()
    influence = fitted(case, hw.GradDot(), "layer")
    got = influence.influences(case.x_query.numpy(), case.y_query.numpy(), case.x.numpy(), case.y.numpy())
    assert_close(got, influence.influences(case.x_query, case.y_query, case.x, case.y))


def test_no_rows_are_refused() -> None:
    case = mlp()
    influence = fitted(case, hw.GradDot(), "layer")
    for rows in ((case.x[:0], case.y[:0], case.x, case.y), (case.x_query, case.y_query, case.x[:0], case.y[:0])):
        with pytest.raises(BatchMismatch, match="no rows"):
            influence.influences(*rows)


def test_lengths_that_disagree_are_refused() -> None:
    case = sentences()
    influence = fitted(case, hw.GradDot(), "layer")
    with pytest.raises(BatchMismatch, match=r"x_test and y_test.* x has 5 / 5, y has 4"):
        influence.influences(case.x_query, case.y_query[:4])
    with pytest.raises(BatchMismatch, match="weights has 2"):
        TorchBatch(case.x, case.y, weights=torch.ones(2))


def test_half_of_a_pair_is_refused() -> None:
    case = mlp()
    influence = fitted(case, hw.GradDot(), "layer")
    with pytest.raises(InvalidInput, match="Only x was given"):
        influence.influences(case.x_query, case.y_query, case.x)
    with pytest.raises(InvalidInput, match="Only y was given"):
        influence.influences_by_block(case.x_query, case.y_query, None, case.y)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_the_callers_gradient_mode_does_not_matter(context: Any) -> None:
    case = mlp()
    rows = (case.x_query, case.y_query, case.x, case.y)
    for method in (hw.Direct("hessian", allow_indefinite=True), hw.Ekfac(), hw.GradCos()):
        for mode in ("up", "perturbation"):
            expected = fitted(case, method, "layer", damping=0.1).influences(*rows, mode=mode)
            with context():
                assert_close(fitted(case, method, "layer", damping=0.1).influences(*rows, mode=mode), expected)


# Loaders --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method", [hw.GradDot(), hw.Direct("ggn"), hw.Kfac(), hw.Ekfac()], ids=lambda m: type(m).__name__
)
def test_loaders_that_cannot_be_read_are_refused(method: Any) -> None:
    case = mlp()

    def unfitted() -> TorchComposableInfluence:
        return TorchComposableInfluence(case.model, case.loss, method)

    with pytest.raises(InvalidInput, match="generator, which can be read only once"):
        unfitted().fit(batch for batch in case.loader())
    with pytest.raises(BatchMismatch, match="no rows"):
        unfitted().fit([])
    with pytest.raises(BatchMismatch, match="no rows"):
        unfitted().fit([(case.x[:0], case.y[:0])])
    with pytest.raises(InvalidInput, match="not a tuple of 3 entries"):
        unfitted().fit([(case.x, case.y, case.y)])
    empty = [(case.x[:0], case.y[:0])]
    rows = (case.x_query, case.y_query, case.x, case.y)
    got = unfitted().fit(empty + case.loader() + empty).influences(*rows)
    assert_close(got, unfitted().fit(case.loader()).influences(*rows))


def test_a_loader_whose_second_pass_has_other_rows_is_refused() -> None:
    class Shrinks:
        reads = 0

        def __iter__(self) -> Any:
            self.reads += 1
            yield from mlp().loader()[: 4 - self.reads]

    with pytest.raises(BatchMismatch, match="other rows each time"):
        TorchComposableInfluence(mlp().model, mlp().loss, hw.Ekfac()).fit(Shrinks())


def test_an_unfitted_influence_says_so() -> None:
    case = mlp()
    influence = TorchComposableInfluence(case.model, case.loss, hw.Ekfac())
    factors = torch.zeros(1, influence.n_parameters, dtype=torch.float64)
    assert not influence.is_fitted
    asked: list[Callable[[], Any]] = [
        lambda: influence.influences(case.x, case.y),
        lambda: influence.influences_by_block(case.x, case.y),
        lambda: influence.influence_factors(case.x, case.y),
        lambda: influence.influence_factors_by_block(case.x, case.y),
        lambda: influence.influences_from_factors(factors, case.x, case.y),
        lambda: influence.influences_from_factors_by_block(factors, case.x, case.y),
        lambda: influence.attribute(case.loader(), case.loader()),
        lambda: influence.top(case.loader(), case.loader(), 1),
        lambda: influence.self_influence(case.loader()),
        lambda: influence.n_train,
        lambda: influence.absolute_damping,
        lambda: influence.block_mapper,
        lambda: influence.with_damping(1.0).influences(case.x, case.y),
    ]
    for ask in asked:
        with pytest.raises(NotFittedError, match="fit"):
            ask()
    assert influence.fit(case.loader()) is influence and influence.is_fitted


def test_weights_that_changed_after_the_fit_are_noticed() -> None:
    case = images()
    influence = fitted(case, hw.Ekfac(), "layer")
    rows = (case.x_query, case.y_query, case.x, case.y)
    before = influence.influences(*rows)
    for tensor in (case.model.head.bias, case.model.batch.running_var, case.model.wide.weight):
        kept = tensor.detach().clone()
        with torch.no_grad():
            tensor.view(-1)[0].add_(1e-6)
        for ask in (
            lambda: influence.influences(*rows),
            lambda: influence.with_damping(2.0).influence_factors(case.x, case.y),
            lambda: influence.attribute(case.loader(), case.loader()),
            lambda: influence.self_influence(case.loader()),
        ):
            with pytest.raises(StaleFit, match="changed since fit"):
                ask()
        with torch.no_grad():
            tensor.copy_(kept)
        assert_close(influence.influences(*rows), before)


# Losses ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("method", [hw.GradDot(), hw.Direct("ggn"), hw.Direct("fisher"), hw.Ekfac()], ids=repr)
def test_the_reduction_over_the_batch_does_not_matter(reduction: str, method: Any) -> None:
    case = mlp()
    truth = Truth(case)
    influence = fitted(replace(case, loss=nn.CrossEntropyLoss(reduction=reduction)), method, "layer", damping=0.1)
    expected, condition = truth.scores(method, "layer", {"first": 0.1, "second": 0.1})
    assert_close(influence.influences(case.x_query, case.y_query, case.x, case.y), sum(expected.values()), condition)
    assert influence.provider.normalisation == reduction


def ignoring(reduction: str) -> Callable[[Any, Any], torch.Tensor]:
    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(output.flatten(0, 1), target.flatten(), ignore_index=-1, reduction=reduction)

    return loss


@pytest.mark.parametrize(("reduction", "said"), [("mean", "weighted mean"), ("sum", "sum"), ("none", "per token")])
def test_ignored_tokens_leave_each_row_what_it_is_alone(reduction: str, said: str) -> None:
    case = language()
    y, y_query = case.y.clone(), case.y_query.clone()
    y[0, 0] = y[0, 1] = y[3, 2] = y_query[1, 0] = -1
    case = replace(case, loss=ignoring(reduction), y=y, y_query=y_query)
    check_gradients(case, "layer")
    truth, method = Truth(case), hw.Direct("empirical_fisher")
    influence = fitted(case, method, case.own_blocks, damping=0.1)
    expected, condition = truth.scores(method, case.own_blocks, {"deep": 0.1, "edges": 0.1})
    assert_close(influence.influences(case.x_query, y_query, case.x, y), sum(expected.values()), condition)
    assert influence.provider.normalisation == said


def test_ignored_targets_are_not_sampled() -> None:
    """A row of ignored and other targets: the Fisher has no share of the ignored ones."""
    case = language()
    y = case.y.clone()
    y[:, 1] = -100
    case = replace(case, y=y)
    uniforms = row_uniforms(np.arange(len(y)), 3, draw=0, seed=0)[..., 0]
    ((labels, weight),) = oracle.sampled_classes(case.model, case.x, y, [uniforms])
    labels = torch.where(y == -100, y, labels)
    names = oracle.trainable(case.model)
    expected = oracle.fisher(case.model, case.loss, case.x, [(labels, weight)], names)
    influence = fitted(case, hw.Direct("fisher"), "full")
    # The loss is half the sum over the two targets that are left, so its gradients count a quarter, its Fisher a half.
    assert_close(influence._fitted.curvature["full"].matrix, 2 * expected)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("factor", [1.0, 3.0])
@pytest.mark.parametrize("name", ["cross_entropy", "binary_cross_entropy", "squared_error", "nll", "probabilities"])
def test_the_fisher_is_the_ggn_whatever_the_scale_of_the_loss(name, factor, reduction):
    torch.manual_seed(3)
    x, classes, answers = torch.randn(9, 4).double(), torch.randint(3, (9,)), torch.randint(2, (9, 3)).double()
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    kinds = {
        "cross_entropy": (F.cross_entropy, classes, "cross_entropy"),
        "nll": (
            lambda o, t, reduction: F.nll_loss(o.log_softmax(-1), t, reduction=reduction),
            classes,
            "cross_entropy",
        ),
        "binary_cross_entropy": (F.binary_cross_entropy_with_logits, answers, "binary_cross_entropy"),
        "probabilities": (
            lambda o, t, reduction: F.binary_cross_entropy(o.sigmoid(), t, reduction=reduction),
            answers,
            "binary_cross_entropy",
        ),
        "squared_error": (F.mse_loss, torch.randn(9, 3).double(), "squared_error"),
    }
    function, y, likelihood = kinds[name]

    def loss(output, target):
        return factor * function(output, target, reduction=reduction)

    fitted = [
        TorchComposableInfluence(model, loss, hw.Direct(kind), blocks="full", likelihood=likelihood).fit([(x, y)])
        for kind in ("fisher", "ggn")
    ]
    fisher, ggn = (influence._fitted.curvature["full"].matrix for influence in fitted)
    assert_close(fisher, ggn)


@pytest.mark.parametrize("likelihood", ["cross_entropy", "binary_cross_entropy", "squared_error"])
def test_a_likelihood_that_is_not_the_losses_own_is_refused(likelihood):
    x, y = torch.randn(9, 4).double(), torch.arange(9) % 3
    y = y if likelihood == "cross_entropy" else F.one_hot(y, 3).double()
    model = nn.Linear(4, 3).double()

    def bounded(output, target):
        signs = 2 * (target if target.is_floating_point() else F.one_hot(target, 3)) - 1
        return (1 - torch.tanh(output * signs)).pow(2).sum()

    influence = TorchComposableInfluence(model, bounded, hw.Ekfac(), likelihood=likelihood)
    with pytest.raises(UnsupportedLoss, match="no positive multiple"):
        influence.fit([(x, y)])


def test_an_ignored_class_may_be_drawn_for_other_rows():
    """ignore_index=0 marks rows without a target; for the others, class 0 is a class like any."""
    torch.manual_seed(4)
    x, y = torch.randn(12, 4).double(), torch.arange(12) % 3
    model = nn.Linear(4, 3).double()
    kept = y != 0
    ignoring = TorchComposableInfluence(
        model, nn.CrossEntropyLoss(ignore_index=0, reduction="sum"), hw.Direct("fisher")
    )
    plain = TorchComposableInfluence(model, nn.CrossEntropyLoss(), hw.Direct("fisher"))
    mine = ignoring.fit([(x, y)])._fitted.curvature["root"].matrix * 12
    assert_close(mine, plain.fit([(x[kept], y[kept])])._fitted.curvature["root"].matrix * 8)


def weighted(**options: Any) -> nn.CrossEntropyLoss:
    return nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64), **options)


@pytest.mark.parametrize(
    "loss",
    [
        weighted(),
        nn.NLLLoss(weight=torch.tensor([1.0, 2.0, 4.0])),
        partial(F.cross_entropy, weight=torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)),
    ],
    ids=["cross entropy", "nll", "partial"],
)
def test_class_weights_with_a_mean_are_refused(loss: Any) -> None:
    case = mlp()
    with pytest.raises(UnsupportedLoss, match=r"weight=.*no weight. Use reduction='sum'"):
        TorchGradientProvider(case.model, loss).grads(TorchBatch(case.x, case.y))


def test_class_weights_without_a_mean_are_taken() -> None:
    for reduction in ("sum", "none"):
        check_gradients(replace(mlp(), loss=weighted(reduction=reduction)), "layer")


def test_a_loss_in_which_rows_meet_is_refused() -> None:
    def contrastive(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(output @ output.T, torch.arange(len(output)))

    case = mlp()
    for method in (hw.GradDot(), hw.Direct("ggn"), hw.Direct("fisher")):
        with pytest.raises(UnsupportedLoss, match="no weighted sum"):
            fitted(replace(case, loss=contrastive, likelihood="cross_entropy"), method, "layer").influences(
                case.x_query, case.y_query
            )


def test_a_measurement_takes_the_losss_place_for_queries() -> None:
    def margin(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        right = output.gather(1, target[:, None])[:, 0]
        others = output.scatter(1, target[:, None], -torch.inf)
        return (others.logsumexp(1) - right).sum()

    truth, method = Truth(mlp()), hw.Direct("ggn")
    case, blocks = truth.case, oracle.block_names(truth.case.model, "layer")
    influence = fitted(case, method, "layer", damping=0.1, measurement=margin)
    train = truth.train_grads
    query = oracle.per_sample_grads(case.model, margin, case.x_query, case.y_query, truth.names)
    expected = sum(
        query[:, truth.index(names)] @ truth.inverse(method, names, 0.1) @ train[:, truth.index(names)].T
        for names in blocks.values()
    )
    assert_close(influence.influences(case.x_query, case.y_query, case.x, case.y), expected, 1e3)
    found = influence.attribute(case.loader(), split_rows(case.x_query, case.y_query, 2))
    assert_close(found.values, expected, 1e3)
    itself = influence.influences(case.x, case.y)
    assert (itself - itself.T).abs().max() > 1e-3


# Likelihoods ----------------------------------------------------------------------------------------------------------


def fisher_of(case: Case, method: Any, likelihood: Any = None, **options: Any) -> torch.Tensor:
    case = replace(case, likelihood=likelihood)
    return fitted(case, method, "full", **options)._fitted.curvature["full"].matrix


def test_the_exact_fisher_of_each_known_likelihood_is_the_ggn() -> None:
    classes_, regression = mlp(), signals()
    logit = settle(nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1), nn.Flatten(0)), 70)
    binary = replace(classes_, model=logit, loss=nn.BCEWithLogitsLoss(), y=(classes_.y > 0).double())
    probability = replace(binary, model=nn.Sequential(logit, nn.Sigmoid()), loss=nn.BCELoss())
    log = replace(classes_, model=nn.Sequential(classes_.model, nn.LogSoftmax(-1)), loss=nn.NLLLoss())
    half = replace(regression, loss=lambda o, t: 0.5 * ((o - t) ** 2).sum(), likelihood="squared_error")
    named = replace(binary, loss=lambda o, t: F.softplus(o).sum() - (o * t).sum(), likelihood=Bernoulli())
    cases = [classes_, regression, binary, half, named]
    for case in cases:
        names = oracle.trainable(case.model)
        expected = oracle.ggn(case.model, case.loss, case.x, case.y, names)
        for fisher in ("auto", "exact"):
            got = fisher_of(case, hw.Direct("fisher", fisher=fisher), case.likelihood)
            assert_close(got, expected)
    # where the last layer makes probabilities, the Fisher does not change, though the GGN does
    same = fisher_of(classes_, hw.Direct("fisher"))
    assert_close(fisher_of(log, hw.Direct("fisher")), same)
    assert_close(fisher_of(probability, hw.Direct("fisher")), fisher_of(binary, hw.Direct("fisher")))


def test_sampled_targets_of_each_known_likelihood_are_those_of_the_counter() -> None:
    classes_, regression = mlp(), signals()
    logit = settle(nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1), nn.Flatten(0)), 70)
    binary = replace(classes_, model=logit, loss=nn.BCEWithLogitsLoss(), y=(classes_.y > 0).double())
    rows = np.arange(len(binary.y))
    with torch.no_grad():
        p = torch.sigmoid(logit(binary.x)).numpy()
        output = regression.model(regression.x)
    uniform = row_uniforms(rows, 1, draw=0, seed=7)[:, 0, 0]
    noise = torch.as_tensor(row_normals(rows, 2, draw=0, seed=7))
    ones = np.ones(len(rows))
    method = hw.Direct("fisher", fisher="sampled", seed=7)
    for case, target in ((binary, torch.as_tensor((uniform < p) * 1.0)), (regression, output - noise)):
        expected = oracle.fisher(case.model, case.loss, case.x, [(target, ones)], oracle.trainable(case.model))
        assert_close(fisher_of(case, method), expected)


def soft_hessian(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    p = output.softmax(-1)
    return torch.diag_embed(p) - p.unsqueeze(1) * p.unsqueeze(2)


def test_an_output_hessian_gives_the_fisher_of_any_loss() -> None:
    def hidden(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(output, target)

    case = replace(mlp(), loss=hidden)
    expected = oracle.ggn(case.model, case.loss, case.x, case.y, oracle.trainable(case.model))
    assert_close(fisher_of(case, hw.Direct("fisher"), OutputHessian(soft_hessian)), expected)
    kfac = fitted(replace(mlp(), likelihood=OutputHessian(soft_hessian)), hw.Ekfac(), "layer", damping=0.1)
    plain = fitted(mlp(), hw.Ekfac(), "layer", damping=0.1)
    assert_close(kfac.influences(case.x_query, case.y_query), plain.influences(case.x_query, case.y_query), 1e3)


@pytest.mark.slow
def test_a_sampled_output_hessian_is_right_on_average() -> None:
    case = mlp()
    expected = oracle.ggn(case.model, case.loss, case.x, case.y, oracle.trainable(case.model))
    draws = [
        fisher_of(case, hw.Direct("fisher", fisher="sampled", seed=seed), OutputHessian(soft_hessian)).numpy()
        for seed in range(150)
    ]
    error = np.linalg.norm(np.mean(draws, axis=0) - expected) / np.linalg.norm(expected)
    single = np.mean([np.linalg.norm(d - expected) for d in draws]) / np.linalg.norm(expected)
    assert error < 2.0 * single / np.sqrt(150) and single > 0.1


@pytest.mark.parametrize(
    ("hessian", "words"),
    [(lambda o, t: -soft_hessian(o, t), "negative"), (lambda o, t: torch.eye(2).expand(len(o), 2, 2), "expected")],
)
def test_an_output_hessian_that_is_none_is_refused(hessian: Any, words: str) -> None:
    with pytest.raises(InvalidSetting, match=words):
        fisher_of(mlp(), hw.Direct("fisher"), OutputHessian(hessian))


def test_a_target_sampler_says_where_targets_come_from() -> None:
    case = mlp()

    def sample(output: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
        return (uniforms[:, :1] > output.softmax(-1).cumsum(-1)).sum(-1)

    uniforms = row_uniforms(np.arange(len(case.y)), 3, draw=0, seed=2)[:, 0, 0]
    pseudo = oracle.sampled_classes(case.model, case.x, case.y, [uniforms])
    expected = oracle.fisher(case.model, case.loss, case.x, pseudo, oracle.trainable(case.model))
    assert_close(fisher_of(case, hw.Direct("fisher", seed=2), TargetSampler(sample)), expected)
    with pytest.raises(UnsupportedLoss, match="sampled"):
        fisher_of(case, hw.Direct("fisher", fisher="exact"), TargetSampler(sample))


def test_an_unknown_likelihood_is_refused() -> None:
    with pytest.raises(InvalidSetting, match="poisson"):
        TorchGradientProvider(mlp().model, SUM, likelihood="poisson")


# Weights and ids ------------------------------------------------------------------------------------------------------


@cache
def weighted_truth(make: Callable[[], Case]) -> Truth:
    case = make()
    return Truth(case, np.array([2.0, 1.0, 0.0, 0.5] * 3)[: len(case.y)])


def weighted_fits() -> Iterator[Any]:
    """All; the fast ones: every method on the MLP, and each once more on one of the larger models."""
    methods = (
        hw.GradDot(),
        hw.Direct("hessian", allow_indefinite=True),
        hw.Direct("ggn"),
        hw.Direct("fisher"),
        hw.Direct("empirical_fisher"),
        hw.Kfac(),
        hw.Kfac("factored", fisher="empirical"),
        hw.Ekfac(),
    )
    for turn, make in enumerate((sentences, signals, mlp)):
        for k, method in enumerate(methods):
            marks = () if make is mlp or k % 2 == turn else pytest.mark.slow
            yield pytest.param(make, method, id=f"{make.__name__}-{method!r}", marks=marks)


@pytest.mark.parametrize(("make", "method"), list(weighted_fits()))
def test_a_weight_of_two_means_the_row_twice(make: Callable[[], Case], method: Any) -> None:
    truth = weighted_truth(make)
    case, weights = truth.case, torch.as_tensor(truth.weights)
    rows, n = (case.x_query, case.y_query), len(case.y)
    loader = [
        TorchBatch(x, y, weights=w, ids=torch.arange(n)[start : start + 4])
        for (x, y), w, start in zip(case.loader(4), weights.split(4), range(0, n, 4), strict=True)
    ]
    influence = TorchComposableInfluence(case.model, case.loss, method, damping=0.1).fit(loader)
    assert influence.n_train == pytest.approx(float(weights.sum()))
    damping = {block: 0.1 for block in influence.block_names}
    expected, condition = truth.scores(method, "layer", damping)
    assert_close(influence.influences(*rows, case.x, case.y), sum(expected.values()), condition)
    scores = influence.attribute(loader, [rows])
    assert_close(scores.values, sum(expected.values()) * weights.numpy(), condition)
    doubled = torch.cat([torch.arange(n), torch.tensor([0])])
    twice = TorchComposableInfluence(case.model, case.loss, method, damping=0.1).fit(case.loader(4, doubled))
    by_weight = [TorchBatch(case.x, case.y, weights=torch.tensor([2.0] + [1.0] * (n - 1), dtype=torch.float64))]
    once = TorchComposableInfluence(case.model, case.loss, method, damping=0.1).fit(by_weight)
    assert_close(once.influences(*rows), twice.influences(*rows), 1e4)


def test_weights_may_be_a_numpy_array() -> None:
    case = mlp()
    rows, weights = (case.x_query, case.y_query, case.x, case.y), np.linspace(0.5, 2.0, 11)
    for method in (hw.Direct("ggn"), hw.Direct("fisher"), hw.Kfac(), hw.Ekfac()):
        scores = [
            TorchComposableInfluence(case.model, case.loss, method, damping=0.1)
            .fit([TorchBatch(case.x, case.y, weights=w)])
            .influences(*rows)
            for w in (weights, torch.as_tensor(weights))
        ]
        assert_close(scores[0], scores[1])


def test_draws_follow_ids_not_content() -> None:
    case = mlp()
    x, y = case.x[:1].repeat(64, 1), case.y[:1].repeat(64)
    provider = TorchGradientProvider(case.model, case.loss)

    def labels(ids: Any) -> torch.Tensor:
        (drawn,) = provider.fisher_grads(TorchBatch(x, y, ids=ids), "sampled")
        return drawn["full"].flat()

    by_content, by_ids = labels(None), labels(torch.arange(64))
    assert len(torch.unique(by_content, dim=0)) == 1
    assert len(torch.unique(by_ids.round(decimals=9), dim=0)) == 3
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    assert_close(labels(order), by_ids[order])
    assert_close(labels(np.asarray(order)), by_ids[order])


def test_sampled_labels_have_the_models_probabilities() -> None:
    case = mlp()
    rows = 6000
    x, y = case.x[:1].repeat(rows, 1), case.y[:1].repeat(rows)
    provider = TorchGradientProvider(case.model, case.loss, blocks={"bias": ["second.bias"]})
    (drawn,) = provider.fisher_grads(TorchBatch(x, y, ids=torch.arange(rows)), "sampled", seed=9)
    p = case.model(x[:1]).softmax(-1)[0].detach()
    found = (p - drawn["bias"].flat()).round().mean(0)  # the bias gradient is p - onehot(label)
    assert (found - p).abs().max() < 4 * (p * (1 - p) / rows).sqrt().max()


# The model is left as it was ------------------------------------------------------------------------------------------


def snapshot(model: nn.Module) -> list[Any]:
    """Everything about a model that a reader could see."""
    state = [(n, id(p), p.requires_grad, p.grad, p._version, p.detach().clone()) for n, p in model.named_parameters()]
    state += [(n, id(b), b.requires_grad, None, b._version, b.clone()) for n, b in model.named_buffers()]
    modules = [
        (n, id(m), m.training, *(len(hooks) for k, hooks in vars(m).items() if k.endswith("_hooks")), sorted(vars(m)))
        for n, m in model.named_modules()
    ]
    return [state, modules]


def assert_same(model: nn.Module, before: list[Any]) -> None:
    state, modules = snapshot(model)
    assert modules == before[1]
    for new, old in zip(state, before[0], strict=True):
        assert new[:3] == old[:3] and new[3] is old[3] and new[4] == old[4], new[0]
        assert torch.equal(new[5], old[5]), new[0]


@pytest.mark.parametrize("method", [hw.GradCos(), hw.Direct("hessian", allow_indefinite=True), hw.Ekfac()], ids=repr)
@pytest.mark.parametrize("name", [*CASES, "in place", "twice", "tied", "subclasses", "attention", "normalised"])
def test_the_model_is_left_exactly_as_it_was(name: str, method: Any) -> None:
    case = CASES[name]() if name in CASES else odd(name)
    first = next(iter(case.model.parameters()))
    first.grad = torch.ones_like(first)
    list(case.model.parameters())[-1].requires_grad_(False)
    handle = case.model.register_forward_hook(lambda *_: None)
    before = snapshot(case.model)
    fitted(case, method, "layer", damping=0.1).influences(case.x_query, case.y_query, case.x, case.y)
    provider = TorchGradientProvider(case.model, case.loss, likelihood=case.likelihood)
    if case.perturbs:
        provider.flat_mixed_grads(TorchBatch(case.x, case.y))
    assert_same(case.model, before)
    handle.remove()


def test_the_model_is_left_as_it_was_after_an_exception_in_its_forward_pass() -> None:
    class Fails(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.norm, self.head = nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.norm(self.body(x))
            if (x > 50).any():
                raise ZeroDivisionError("the model broke")
            return self.head(x)

    model = settle(Fails(), 80)
    before = snapshot(model)
    x, y = normal(81, 4, 3), classes(82, 3, 4)
    x[3] = 1e3 * model.body.weight[0].detach()
    batch, bad = TorchBatch(x[:2], y[:2]), TorchBatch(x[2:], y[2:])
    for early in (0, 1):
        provider = TorchGradientProvider(model, SUM)
        if early:
            provider.flat_grads(batch)
        asked = [
            lambda p=provider: p.flat_grads(bad),
            lambda p=provider: p.flat_mixed_grads(bad),
            lambda p=provider: p.fisher_grads(bad, "auto"),
            lambda p=provider: p.curvature_product(bad, "full", torch.ones(1, p.n_parameters).double(), "ggn"),
            lambda p=provider: p.curvature_product(bad, "full", torch.ones(1, p.n_parameters).double(), "hessian"),
            lambda p=provider: p.mixed_prod(bad, {"full": torch.ones(1, p.n_parameters).double()}),
        ]
        for ask in asked:
            with pytest.raises(ZeroDivisionError, match="the model broke"):
                ask()
            assert_same(model, before)
        assert_close(
            provider.flat_grads(batch), oracle.per_sample_grads(model, SUM, x[:2], y[:2], oracle.trainable(model))
        )


def test_results_and_inputs_share_nothing_with_autograd() -> None:
    case = mlp()
    x = case.x.clone().requires_grad_()
    influence = fitted(case, hw.Ekfac(), "layer")
    for mode in ("up", "perturbation"):
        assert not influence.influences(case.x_query, case.y_query, x, case.y, mode=mode).requires_grad
    assert not influence.influence_factors(x, case.y).requires_grad
    assert x.grad is None and x.requires_grad


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)),
        lambda: nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)),
        lambda: nn.Sequential(nn.Linear(3, 3), nn.AlphaDropout(0.1)),
        lambda: nn.Sequential(nn.Linear(3, 3), nn.RReLU()),
    ],
    ids=["dropout", "batch norm", "alpha dropout", "rrelu"],
)
def test_train_mode_is_refused_where_it_matters(make: Callable[[], nn.Module]) -> None:
    model = make().double().train()
    before = snapshot(model)
    batch = TorchBatch(normal(90, 4, 3), classes(91, 3, 4))
    provider = TorchGradientProvider(model, SUM)
    for ask in (
        lambda: provider.flat_grads(batch),
        lambda: provider.flat_mixed_grads(batch),
        lambda: provider.fisher_grads(batch, "auto"),
        lambda: TorchComposableInfluence(model, SUM, hw.Direct("ggn")).fit([batch]),
    ):
        with pytest.raises(RowsInteract, match=r"train mode.*eval\(\)"):
            ask()
    assert_same(model, before)
    model.eval()
    expected = oracle.per_sample_grads(model, SUM, batch.x, batch.y, oracle.trainable(model))
    assert_close(provider.flat_grads(batch), expected)


def test_train_mode_is_allowed_where_it_does_not_matter() -> None:
    case = mlp()
    case.model.train()
    check_gradients(case, "layer")
    zero = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.0)).double().train()
    check_gradients(replace(case, model=zero), "layer")


def test_models_whose_rows_act_on_each_other_are_refused() -> None:
    class Centred(Mlp):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x - x.mean(0))

    class Noisy(Mlp):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.dropout(super().forward(x), 0.5, training=True)

    case = mlp()
    torch.manual_seed(0)
    for model in (Centred(), Noisy()):
        model = model.double().eval()
        with pytest.raises(RowsInteract, match=r"row \d"):
            TorchGradientProvider(model, case.loss).flat_grads(TorchBatch(case.x, case.y))
    provider = TorchGradientProvider(settle(Centred(), 1), case.loss)
    provider.flat_grads(TorchBatch(case.x[:1], case.y[:1]))  # a row alone cannot show it
    with pytest.raises(RowsInteract, match=r"row 1"):
        provider.flat_grads(TorchBatch(case.x, case.y))


def test_an_output_without_rows_is_refused() -> None:
    class Total(Mlp):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).T

    case = mlp()
    with pytest.raises(UnsupportedModel, match="first axis must run over rows"):
        TorchGradientProvider(Total().double().eval(), lambda o, t: o.sum()).flat_grads(TorchBatch(case.x, case.y))


def test_an_output_with_rows_on_another_axis_is_refused() -> None:
    """An LSTM also returns its state, [layers, n, d]; with one layer and one row that looks right."""
    x = normal(92, 4, 2, 3)
    provider = TorchGradientProvider(nn.LSTM(3, 2, batch_first=True).double().eval(), lambda o, t: o[0].sum())
    with pytest.raises(UnsupportedModel, match=r"shape \(1, 2, 2\); its first axis must run over rows"):
        provider.flat_grads(TorchBatch(x, classes(93, 3, 4)))


def test_a_loss_that_depends_on_no_attributed_parameter_is_refused() -> None:
    case = mlp()
    with pytest.raises(UnsupportedModel, match="does not depend"):
        TorchGradientProvider(case.model, lambda o, t: o.detach().sum() + 0.0).flat_grads(TorchBatch(case.x, case.y))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("bad", [0, 1, 4])
def test_rows_that_are_not_finite_are_named(bad: int, value: float) -> None:
    case = mlp()
    x = case.x.clone()
    x[bad, 1] = value
    batch = TorchBatch(x, case.y)
    for ask in (
        lambda p: p.flat_grads(batch),
        lambda p: p.fisher_grads(batch, "auto"),
        lambda p: fitted(replace(case, x=x), hw.Ekfac(), "layer", size=11),
    ):
        with pytest.raises(NonFiniteValue) as refused:
            ask(TorchGradientProvider(case.model, case.loss))
        assert f"[{bad}]" in str(refused.value)


def test_a_gradient_that_is_not_finite_is_named_though_the_loss_is() -> None:
    class Root(Mlp):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + F.pad((self.first.weight.sum() * x[:, :1] ** 2).abs().sqrt(), (0, 2))

    case = mlp()
    x = case.x.clone()
    x[3, 0] = 0.0
    model = settle(Root(), 1)
    with pytest.raises(NonFiniteValue, match=r"rows \[3\]"):
        TorchGradientProvider(model, case.loss).flat_grads(TorchBatch(x, case.y))


# Half precision -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [hw.GradDot(), hw.GradCos(), hw.Kfac(), hw.Ekfac(), hw.Direct("fisher")], ids=repr)
@pytest.mark.parametrize("make", [mlp, sentences, signals])
def test_a_bfloat16_model_gives_nearly_the_scores_of_the_same_weights_in_float64(
    make: Callable[[], Case], method: Any
) -> None:
    def rounded(value: Any) -> Any:
        return value.to(torch.bfloat16) if value.is_floating_point() else value

    case = make()
    half = replace(
        case,
        model=copy.deepcopy(case.model).to(torch.bfloat16),
        **{
            name: torch.utils._pytree.tree_map(rounded, getattr(case, name))
            for name in ("x", "y", "x_query", "y_query")
        },
    )
    back = copy.deepcopy(half.model).double()
    exact = replace(
        case,
        model=back,
        **{
            name: torch.utils._pytree.tree_map(
                lambda v: v.double() if v.is_floating_point() else v, getattr(half, name)
            )
            for name in ("x", "y", "x_query", "y_query")
        },
    )
    scores = [
        fitted(c, method, "layer", damping=hw.relative(1.0)).influences(c.x_query, c.y_query, c.x, c.y)
        for c in (half, exact)
    ]
    assert scores[0].dtype == torch.float32
    assert (scores[0].double() - scores[1]).norm() < 0.1 * scores[1].norm()


def test_sums_over_a_bfloat16_models_rows_and_positions_are_kept_in_float32() -> None:
    """A bfloat16 sum of ones stops at 256."""
    model = nn.Linear(1, 1, bias=False).to(torch.bfloat16).eval()
    with torch.no_grad():
        model.weight.fill_(1.0)
    rows, positions = 300, 700
    x, y = torch.ones(rows, positions, 1, dtype=torch.bfloat16), torch.zeros(rows, dtype=torch.bfloat16)
    provider = TorchGradientProvider(model, lambda o, t: o.float().sum())
    assert torch.equal(provider.flat_grads(TorchBatch(x, y)), torch.full((rows, 1), 700.0))
    kfac = TorchComposableInfluence(model, lambda o, t: o.float().sum(), hw.Kfac(fisher="empirical")).fit([(x, y)])
    (operator,) = kfac._fitted.curvature["root"].operators
    assert (float(operator.left), float(operator.right)) == (700.0, 1.0)
    direct = TorchComposableInfluence(model, lambda o, t: o.float().sum(), hw.Direct("empirical_fisher")).fit([(x, y)])
    assert float(direct._fitted.curvature["root"].matrix) == 700.0**2


def test_swapped_weights_are_noticed():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, y = torch.randn(6, 3, dtype=torch.float64), torch.randint(2, (6,))
    influence = TorchComposableInfluence(model, nn.CrossEntropyLoss(), hw.Ekfac()).fit([(x, y)])
    with torch.no_grad():
        model[0].weight.copy_(model[0].weight.flip(0).clone())
    with pytest.raises(StaleFit):
        influence.influences(x, y)


def test_missing_targets_and_text_ids():
    model = nn.Linear(3, 40).double()
    x, y = torch.randn(6, 3, dtype=torch.float64), torch.randint(40, (6,))
    provider = TorchGradientProvider(model, nn.CrossEntropyLoss())
    with pytest.raises(InvalidInput, match="y is None"):
        provider.flat_grads(TorchBatch(x, None))
    names = [f"row {k}" for k in range(6)]
    batch = TorchBatch(x, y, ids=names)
    influence = TorchComposableInfluence(model, nn.CrossEntropyLoss(), hw.Ekfac(fisher="sampled"))
    assert influence.fit([batch]).attribute([batch], [batch]).train_ids.tolist() == names


def test_weights_of_any_stride_have_a_fingerprint():
    """A view of one element counts as contiguous, whatever its stride."""
    model = nn.Linear(3, 1).double()
    model.bias.data = torch.randn(5, 4, dtype=torch.float64)[1:2, 2]
    model.weight.data = torch.randn(3, 2, dtype=torch.float64).T[:1]
    provider = TorchGradientProvider(model, nn.MSELoss())
    same = copy.deepcopy(model)
    same.bias.data, same.weight.data = model.bias.data.clone(), model.weight.data.contiguous()
    assert provider.fingerprint() == TorchGradientProvider(same, nn.MSELoss()).fingerprint()
