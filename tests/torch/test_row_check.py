"""A row's gradient is that row's, J and J^T are transposes, and the model's call is the user's: right, or refused.

Truth is autograd on the model's own parameters, one row at a time, in float64, and dense linear algebra; nothing of
headwater is in it.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
import torch.utils.checkpoint
from torch import nn
from torch.autograd.function import once_differentiable

import headwater as hw
from headwater.errors import HeadwaterError, RowsInteract, UnsupportedLoss, UnsupportedModel
from headwater.torch import TorchBatch, TorchComposableInfluence, TorchGradientProvider

CE = nn.CrossEntropyLoss()


@pytest.fixture(autouse=True)
def float64():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def data(rows: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(rows, 4, generator=generator), torch.randint(3, (rows,), generator=generator)


def grads_of(value: torch.Tensor, parameters: list[nn.Parameter]) -> torch.Tensor:
    found = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
    dense = [None if g is None else g.to_dense() if g.is_sparse else g for g in found]
    pairs = zip(dense, parameters, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).reshape(-1) for g, p in pairs])


def by_row(model: nn.Module, loss: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.stack([grads_of(loss(model(x[k : k + 1]), y[k : k + 1]), parameters) for k in range(len(x))])


def softmax_ggn(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    parameters = [p for p in model.parameters() if p.requires_grad]
    total = 0
    for k in range(len(x)):
        output = model(x[k : k + 1])[0]
        p = output.detach().softmax(0)
        jacobian = torch.stack([grads_of(number, parameters) for number in output])
        total = total + jacobian.T @ (torch.diag(p) - torch.outer(p, p)) @ jacobian
    return total / len(x)


def assert_near(got: Any, expected: torch.Tensor, tolerance: float = 1e-8) -> None:
    gap = float((torch.as_tensor(got) - expected).abs().max() / expected.abs().max())
    assert gap < tolerance, f"off by {gap:.2g}"


def grad_dot(model: nn.Module, x: torch.Tensor, y: torch.Tensor, loss: Any = CE) -> torch.Tensor:
    return TorchComposableInfluence(model, loss, hw.GradDot()).fit([(x, y)]).influences(x, y, x, y)


def direct(model: nn.Module, x: torch.Tensor, y: torch.Tensor, **options: Any) -> torch.Tensor:
    influence = TorchComposableInfluence(model, CE, hw.Direct(**options), blocks="full", damping=0.1)
    return influence.fit([(x, y)]).influences(x, y, x, y)


def expected_direct(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    g, c = by_row(model, CE, x, y), softmax_ggn(model, x)
    return g @ torch.linalg.solve(c + 0.1 * torch.eye(len(c)), g.T)


# Rows -----------------------------------------------------------------------------------------------------------------


class Reordered(nn.Module):
    """Puts rows into another order on the way, and back: which is no business of anybody's."""

    def __init__(self, order: Any):
        super().__init__()
        self.layer, self.order = nn.Linear(4, 3), order

    def forward(self, x):
        order = self.order(x)
        return self.layer(x[order])[order.argsort()]


def two_swapped(x: torch.Tensor) -> torch.Tensor:
    order = torch.arange(len(x))
    if len(x) > 12:
        order[[10, 11]] = order[[11, 10]]
    return order


ORDERS = {
    "sorted by length": lambda x: x.norm(dim=1).argsort(),
    "reversed": lambda x: torch.arange(len(x)).flip(0),
    "two swapped in large batches": two_swapped,
}


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_rows_that_are_reordered_inside_keep_their_gradients(order):
    x, y = data()
    x[0], x[1] = x[0] / 100, x[1] * 100  # in order already, as the first rows see it
    model = Reordered(order)
    g = by_row(model, CE, x, y)
    assert_near(grad_dot(model, x, y), g @ g.T)
    assert_near(direct(model, x, y), expected_direct(model, x, y))


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 3) for _ in range(2))

    def forward(self, x):
        chosen = (x[:, 0] > 0).long()
        found = x.new_zeros(len(x), 3)
        for k, expert in enumerate(self.experts):
            where = (chosen == k).nonzero()[:, 0]
            found = found.index_add(0, where, expert(x[where]))
        return found


@pytest.mark.parametrize("method", [hw.GradDot(), hw.Ekfac(), hw.Direct()], ids=repr)
def test_experts_that_first_get_all_rows_and_then_some(method):
    """Seen only on the second batch, when gradients have been handed out: the fit starts again."""
    x, y = data()
    x[:10, 0] = x[:10, 0].abs()
    model = Experts()
    loader = [(x[:10], y[:10]), (x[10:], y[10:])]
    influence = TorchComposableInfluence(model, CE, method, blocks="full", damping=0.1).fit(loader)
    whole = TorchComposableInfluence(model, CE, method, blocks="full", damping=0.1).fit([(x, y)])
    scores = influence.influences(x, y, x, y)
    assert_near(scores, whole.influences(x, y, x, y))
    if isinstance(method, hw.Direct):
        assert_near(scores, expected_direct(model, x, y))


def test_a_rule_that_fails_after_the_fit_asks_for_another():
    x, y = data()
    x[:, 0] = x[:, 0].abs()
    other = x * torch.where(torch.arange(20) % 2 == 0, 1.0, -1.0)[:, None]
    influence = TorchComposableInfluence(Experts(), CE, hw.Ekfac()).fit([(x, y)])
    with pytest.raises(hw.errors.RulesChanged, match="fit again"):
        influence.influences(other, y, x, y)
    with pytest.raises(hw.errors.StaleFit, match="Fit again"):
        influence.influences(x, y)
    g = by_row(influence.model, CE, x, y)
    again = TorchComposableInfluence(influence.model, CE, hw.Ekfac()).fit([(x, y)])
    assert influence.fit([(x, y), (other, y)]).influences(other, y, x, y).shape == (20, 20)
    assert again.influences(x, y).shape == g.shape[:1] * 2


class Centred(nn.Module):
    """Rows act on each other, but not the first two."""

    def __init__(self, detached: bool):
        super().__init__()
        self.layer, self.detached = nn.Linear(4, 3), detached

    def forward(self, x):
        output = self.layer(x)
        if len(x) <= 2:
            return output
        return output - (output.mean(0).detach() if self.detached else output.mean(0))


class Numbered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        return self.layer(x * (1 + (torch.arange(len(x)) > 1)[:, None]))


class Remembering(nn.Module):
    """Keeps its state from call to call."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.state = nn.GRUCell(4, 3), torch.zeros(1, 3)

    def forward(self, x):
        found = self.cell(x, self.state.to(x.dtype).expand(len(x), 3))
        self.state = found.detach().mean(0, keepdim=True)
        return found


MIXING = {
    "centred": lambda: Centred(False),
    "centred, detached": lambda: Centred(True),
    "numbered": Numbered,
    "remembering": Remembering,
    "batch norm without statistics": lambda: nn.Sequential(
        nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False)
    ).eval(),
}


@pytest.mark.parametrize("make", MIXING.values(), ids=MIXING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_rows_that_act_on_each_other_are_refused(make, dtype):
    x, y = data()
    with pytest.raises(RowsInteract):
        grad_dot(make().to(dtype), x.to(dtype), y)


def test_a_flipped_gate_is_no_disagreement():
    """Rounding decides about gates whose inputs are about zero; float64 is asked before rows are blamed."""
    x, y = data(64)
    model = nn.Sequential(nn.Linear(4, 200), nn.ReLU(), nn.Linear(200, 3)).float()
    with torch.no_grad():
        model[0].bias.zero_()
        model[0].weight[:, 1:] = 0
    x[:, 0] = torch.where(torch.arange(64) % 2 == 0, 1e-30, -1e-30)
    grad_dot(model, x.float(), y)


def test_a_loss_that_reads_parameters_is_refused_by_their_name():
    x, y = data()
    layer = nn.Linear(4, 3)
    for loss in (lambda o, t: CE(o, t) + layer.weight.square().sum(), lambda o, t: CE(o + layer.bias, t)):
        with pytest.raises(UnsupportedLoss, match=r"reads (weight|bias) by itself"):
            grad_dot(layer, x, y, loss)


def test_a_hook_on_a_parameter_is_refused():
    x, y = data()
    model = nn.Linear(4, 3)
    model.weight.register_hook(lambda g: g * (torch.arange(4) > 1))
    with pytest.raises(UnsupportedModel, match="hook"):
        grad_dot(model, x, y)


# Rules ----------------------------------------------------------------------------------------------------------------


class OnOtherAxes(nn.LayerNorm):
    def forward(self, x):
        return F.layer_norm(x.mT, self.normalized_shape, self.weight, self.bias, self.eps).mT


class Doubled(nn.Conv1d):
    def forward(self, x):
        return 2 * super().forward(x) + self.weight.sum()


class Shifted(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids + 1)


def replaced(layer: nn.Module, *shape: int) -> nn.Module:
    layer.weight = nn.Parameter(torch.randn(*shape))
    layer.bias = nn.Parameter(torch.randn(shape[0]))
    return layer


RULES = {
    "norm over another axis": lambda: nn.Sequential(nn.Unflatten(1, (4, 1)), OnOtherAxes(4), nn.Flatten()),
    "convolution with more": lambda: nn.Sequential(nn.Unflatten(1, (2, 2)), Doubled(2, 3, 2), nn.Flatten()),
    "ids moved": lambda: nn.Sequential(Ids(), Shifted(9, 3), nn.Flatten(), nn.Linear(12, 3)),
    "linear of another shape": lambda: replaced(nn.Linear(9, 9), 3, 4),
    "convolution of another shape": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 2)), replaced(nn.Conv1d(5, 6, 1), 3, 2, 2), nn.Flatten()
    ),
}


class Ids(nn.Module):
    def forward(self, x):
        return (x * 9).long() % 8


@pytest.mark.parametrize("make", RULES.values(), ids=RULES)
def test_a_rule_that_does_not_apply_gives_way(make):
    x, y = data()
    model = make()
    g = by_row(model, CE, x, y)
    assert_near(grad_dot(model, x, y), g @ g.T)


class OneByOne(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        rows = [self.layer(x[k : k + 1]) for k in range(len(x))]
        assert all(row.shape == (1, 3) for row in rows)
        return torch.cat(rows)


class Positions(nn.Module):
    """One embedding of positions for all rows, which says what it got."""

    def __init__(self) -> None:
        super().__init__()
        self.places, self.head = nn.Embedding(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(torch.tanh(x[:, :, None] * self.places(torch.arange(4)[None])).sum(1))


@pytest.mark.parametrize("make", [OneByOne, Positions])
def test_a_layer_called_on_one_row_is_left_as_it_is(make):
    x, y = data()
    model = make()
    g = by_row(model, CE, x, y)
    assert_near(grad_dot(model, x, y), g @ g.T)


def test_positions_shared_by_all_rows_need_no_plain_gradients():
    x, y = data()
    provider = TorchGradientProvider(Positions(), CE)
    provider.grads(TorchBatch(x, y))
    assert provider._plan.plain == ()


# J and J^T ------------------------------------------------------------------------------------------------------------


class StoppedInPart(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.back, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        with torch.no_grad():
            h = torch.tanh(self.back(x))
        return self.head(h)


class Scaled(nn.Module):
    """A hook on the gradient, which forward mode does not see."""

    def __init__(self) -> None:
        super().__init__()
        self.back, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        h = self.back(x)
        if h.requires_grad:
            h.register_hook(lambda g: -0.5 * g)
        return self.head(torch.tanh(h))


class Through(torch.autograd.Function):
    """Rounds, and passes gradients straight through: its forward mode says zero."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.round(decimals=1)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, g):
        return g

    @staticmethod
    def jvp(ctx, t):
        return torch.zeros_like(t)


class Once(torch.autograd.Function):
    """Its backward cannot be differentiated."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return 3 * ctx.saved_tensors[0] ** 2 * g


class Applied(nn.Module):
    def __init__(self, function: Any):
        super().__init__()
        self.back, self.head, self.function = nn.Linear(4, 5), nn.Linear(5, 3), function

    def forward(self, x):
        return self.head(self.function.apply(self.back(x)))


class Padded(nn.Module):
    """Padding is no word of the first rows."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(6, 5, padding_idx=0), nn.Linear(5, 3)
        with torch.no_grad():
            self.words.weight[0] = 1.0

    def forward(self, x):
        ids = (x.abs() * 2).long().clamp(max=5)
        return self.head(torch.tanh(self.words(ids)).mean(1))


class Bagged(nn.Module):
    def __init__(self, mode: str):
        super().__init__()
        self.words, self.head = nn.EmbeddingBag(6, 5, mode=mode), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.words((x.abs() * 2).long().clamp(max=5))))


JACOBIANS = {
    "stopped in part": StoppedInPart,
    "a hook on a gradient": Scaled,
    "straight through": lambda: Applied(Through),
    "differentiable once": lambda: Applied(Once),
    "padding": Padded,
    "bags": lambda: Bagged("mean"),
    "bags of maxima": lambda: Bagged("max"),
}


@pytest.mark.parametrize("make", JACOBIANS.values(), ids=JACOBIANS)
def test_curvature_has_the_jacobian_that_gradients_have(make):
    x, y = data()
    x[:2] = x[:2].abs() + 0.6
    model = make()
    assert_near(direct(model, x, y), expected_direct(model, x, y))


def test_a_hessian_that_the_model_does_not_have_is_refused():
    x, y = data()
    for model in (Bagged("sum"), Applied(Once)):
        with pytest.raises(UnsupportedModel, match=r"second derivative.*ggn"):
            direct(model, x, y, curvature="hessian", allow_indefinite=True)


def test_verification_sees_a_jacobian_that_is_not_the_gradients(monkeypatch):
    """What verifies shares no derivative with what it verifies."""
    from headwater.torch import products

    x, y = data()
    model = StoppedInPart()
    influence = TorchComposableInfluence(model, CE, hw.Direct(), blocks="full", damping=0.1)
    assert influence.fit([(x, y)]).verify([(x, y)], [(x[:3], y[:3])], rows=3, queries=2).passed
    monkeypatch.setattr(products, "_are_transposed", lambda *given: True)
    other = TorchComposableInfluence(model, CE, hw.Direct(), blocks="full", damping=0.1).fit([(x, y)])
    assert not other.verify([(x, y)], [(x[:3], y[:3])], rows=3, queries=2).passed


# Outputs and parameters -----------------------------------------------------------------------------------------------


@dataclass
class Answer:
    logits: torch.Tensor
    note: str = "yes"
    other: Any = None


class Answering(nn.Module):
    def __init__(self, answer: Any):
        super().__init__()
        self.layer, self.answer = nn.Linear(4, 3), answer

    def forward(self, x):
        return self.answer(self.layer(x))


ANSWERS = {
    "None": (lambda o: (o, None), lambda a: a[0]),
    "numbers and words": (lambda o: {"logits": o, "temperature": 2.0, "note": "no"}, lambda a: a["logits"]),
    "a dataclass": (Answer, lambda a: a.logits),
    "a dataclass within": (lambda o: [Answer(o, other=(o, 3))], lambda a: a[0].other[0]),
    "a tuple": (lambda o: (o, o * 1), lambda a: a[0] + a[1]),
}
OF_GRADIENTS = [hw.GradDot(), hw.Dual(), hw.DataInf(), hw.LoGra(dimension=2), hw.Ekfac(fisher="empirical"), hw.Cg()]


@pytest.mark.parametrize(("answer", "logits"), ANSWERS.values(), ids=ANSWERS)
@pytest.mark.parametrize("method", OF_GRADIENTS, ids=repr)
def test_outputs_may_be_anything_that_the_loss_understands(answer, logits, method):
    x, y = data()
    model = Answering(answer)
    influence = TorchComposableInfluence(model, lambda o, t: CE(logits(o), t), method, blocks="full", damping=0.1)
    times = 2 if answer is ANSWERS["a tuple"][0] else 1
    plain = Answering(lambda o: times * o)
    plain.layer = model.layer
    plain = TorchComposableInfluence(plain, lambda o, t: CE(o, t), method, blocks="full", damping=0.1)
    expected = plain.fit([(x, y)]).influences(x, y)
    assert_near(influence.fit([(x, y)]).influences(x, y), expected, 1e-6)


class Beside(nn.Module):
    """A parameter of another kind comes first."""

    def __init__(self, value: torch.Tensor, trained: bool = False):
        super().__init__()
        self.value, self.layer = nn.Parameter(value, requires_grad=trained), nn.Linear(4, 3)

    def forward(self, x):
        return self.layer(x)


KINDS = {
    "whole numbers": torch.arange(3),
    "complex": torch.ones(2, dtype=torch.complex128),
    "empty": torch.zeros(0, 3),
    "sparse": torch.eye(3).to_sparse(),
    "half": torch.ones(2, dtype=torch.float16),
    "flags": torch.ones(2, dtype=torch.bool),
}


@pytest.mark.parametrize("value", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize(
    "method", [hw.GradDot(), hw.Ekfac(), hw.Cg(), hw.Direct("hessian", allow_indefinite=True)], ids=repr
)
def test_parameters_of_other_kinds_stand_beside(value, method):
    x, y = data()
    model, weights = Beside(value), torch.linspace(0.1, 1.9, 20)
    batch = TorchBatch(x, y, weights=weights)
    found = [
        TorchComposableInfluence(m, CE, method, blocks="full", damping=0.1).fit([batch]).attribute([batch], [(x, y)])
        for m in (model, model.layer)
    ]
    assert_near(found[0].values, torch.as_tensor(found[1].values))


def test_trained_parameters_of_other_kinds_are_refused_or_left_out():
    x, y = data()
    for name in ("complex", "sparse"):
        with pytest.raises(UnsupportedModel, match="value is"):
            grad_dot(Beside(KINDS[name], trained=True), x, y)
    g = by_row((model := Beside(KINDS["empty"], trained=True)).layer, CE, x, y)
    assert_near(grad_dot(model, x, y), g @ g.T)


# The call -------------------------------------------------------------------------------------------------------------


def in_two_threads(call: Any) -> None:
    failed: list[Exception] = []

    def run(number: int) -> None:
        try:
            call(number)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, failed


def test_threads_leave_the_process_as_it_was():
    x, y = data()
    models = [nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)) for _ in range(2)]
    flags = [torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.mem_efficient_sdp_enabled]
    before, filters = [flag() for flag in flags], list(warnings.filters)
    in_two_threads(lambda k: [direct(models[k], x, y) for _ in range(10)])
    calls: list[int] = []

    def watched(v: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return v.sin()

    for reentrant in (True, False):
        v = torch.ones(2, requires_grad=True)
        torch.utils.checkpoint.checkpoint(watched, v, use_reentrant=reentrant).sum().backward()
    assert len(calls) == 4
    assert torch.backends.mha.get_fastpath_enabled()
    assert [flag() for flag in flags] == before
    assert list(warnings.filters) == filters


class WithinCheckpoint(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.calls = nn.Linear(4, 3), 0

    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(self.step, x, use_reentrant=False)

    def step(self, x):
        self.calls += 1
        return self.layer(x).sin()


def test_another_thread_keeps_its_checkpointing_meanwhile():
    from headwater.torch.surroundings import model_call

    model, other = WithinCheckpoint(), WithinCheckpoint()
    x = torch.ones(2, 4, requires_grad=True)
    with model_call(model):
        model(x).sum().backward()
        in_two_threads(lambda k: other(x).sum().backward() if k == 0 else None)
    assert (model.calls, other.calls) == (1, 2)


def test_two_threads_on_one_model_get_its_numbers():
    x, y = data()
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    expected = grad_dot(model, x, y)
    in_two_threads(lambda k: [assert_near(grad_dot(model, x, y), expected) for _ in range(10)])


class UnderAutocast(nn.Module):
    def __init__(self, inner: nn.Module, by_itself: bool):
        super().__init__()
        self.inner, self.by_itself = inner, by_itself

    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.by_itself or torch.is_autocast_enabled("cpu")):
            return self.inner(x).float()


METHODS_OF_ALL_KINDS = [
    *(hw.GradDot(), hw.Direct(), hw.Kfac(), hw.Ekfac(), hw.Ekfac(rank=2), hw.Cg(), hw.BlockKrylov(), hw.Dual()),
    *(hw.Arnoldi(rank=3), hw.Nystroem(rank=3), hw.DataInf(), hw.LoGra(dimension=2), hw.Trak(dimension=8)),
]


@pytest.mark.parametrize("method", METHODS_OF_ALL_KINDS, ids=repr)
@pytest.mark.filterwarnings("ignore::headwater.errors.NotConverged")
def test_the_callers_autocast_reaches_the_models_call_and_nothing_else(method):
    x, y = data()
    x, inner = x.float(), nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).float()

    def scores(model: nn.Module) -> torch.Tensor:
        influence = TorchComposableInfluence(model, CE, method, damping=0.1).fit([(x, y)])
        return torch.as_tensor(influence.attribute([(x, y)], [(x[:5], y[:5])]).values)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = scores(UnderAutocast(inner, by_itself=False))
        assert torch.is_autocast_enabled("cpu")
    assert_near(found, scores(UnderAutocast(inner, by_itself=True)), 1e-4)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(7, 4)
        self.layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 6, batch_first=True), 1)
        self.head = nn.Linear(4, 3)

    def forward(self, ids):
        return self.head(self.layers(self.words(ids), src_key_padding_mask=ids == 0).mean(1))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_padding_goes_the_way_that_training_went():
    ids = torch.randint(1, 7, (8, 5)) * (torch.arange(5) < torch.tensor([3, 5, 2, 4, 5, 3, 2, 4])[:, None])
    y, model = torch.randint(3, (8,)), Encoder().eval()
    g = by_row(model, CE, ids, y)
    assert_near(grad_dot(model, ids, y), g @ g.T)
    assert_near(direct(model, ids, y), expected_direct(model, ids, y))


def compiled_in_place(model: nn.Module) -> nn.Module:
    model[0].compile(backend="eager")
    return model


def compiled_by_layer(model: nn.Module) -> nn.Module:
    model[0] = torch.compile(model[0], backend="eager")
    return model


COMPILED = {
    "whole": lambda model: torch.compile(model, backend="eager"),
    "by layer": compiled_by_layer,
    "in place": compiled_in_place,
}


@pytest.mark.parametrize("compiled", COMPILED.values(), ids=COMPILED)
def test_compiled_models_are_attributed_as_they_were_written(compiled):
    x, y = data()
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    expected = expected_direct(model, x, y)
    model = compiled(model)
    model(x)
    assert_near(direct(model, x, y), expected)
    provider = TorchGradientProvider(model, CE)
    provider.grads(TorchBatch(x, y))
    assert provider._plan.plain == ()


def test_scripted_models_are_refused_with_what_to_pass():
    x, y = data()
    model = nn.Linear(4, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted = torch.jit.script(model)
    with pytest.raises(UnsupportedModel, match="scripted"):
        grad_dot(scripted, x, y)


def test_first_scores_import_no_computer_algebra():
    code = (
        "import sys, torch, headwater as hw\n"
        "from headwater.torch import TorchComposableInfluence as Influence\n"
        "x, y = torch.randn(30, 4), torch.randint(3, (30,))\n"
        "for method in (hw.GradDot(), hw.Ekfac(), hw.Kfac(fisher='empirical'), hw.Cg(), hw.Direct()):\n"
        "    influence = Influence(torch.nn.Linear(4, 3), torch.nn.CrossEntropyLoss(), method, damping=.1)\n"
        "    influence.fit([(x, y)]).attribute([(x, y)], [(x, y)])\n"
        "print([n for n in ('sympy', 'torch._dynamo') if n in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


def test_errors_of_this_page_are_headwaters():
    assert issubclass(RowsInteract, HeadwaterError) and issubclass(hw.errors.RulesChanged, HeadwaterError)
