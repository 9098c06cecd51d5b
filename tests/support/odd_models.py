"""Models that do what a sweep over layers does not show: odd parameters, rows, outputs and gradients.

Each is small, in float64 and eval mode, with five rows. Nothing of headwater is used here.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
import torch.utils.checkpoint
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

CE = nn.CrossEntropyLoss()


def vectors() -> Any:
    return torch.randn(5, 4, dtype=torch.float64)


def classes() -> Any:
    return torch.arange(5) % 3


@dataclass(frozen=True)
class Odd:
    """A model and its rows."""

    name: str
    model: Callable[[], nn.Module]
    x: Callable[[], Any] = vectors
    y: Callable[[], Any] = classes
    loss: Callable[[Any, Any], torch.Tensor] = CE
    one_tensor: bool = True
    """Its output is one tensor, so that it has a GGN."""
    refused: str = ""
    """Why it must be refused, where its rows have no gradients of their own."""
    plain: Callable[[], nn.Module] | None = None
    """Another model that computes the same, for the truth."""
    after: Callable[[nn.Module], bool] = field(default=lambda model: True)
    """What must hold of the model afterwards."""

    def truth(self) -> nn.Module:
        torch.manual_seed(0)
        return (self.plain or self.model)().double().eval()

    def build(self) -> tuple[nn.Module, Any, Any]:
        torch.manual_seed(0)
        return self.model().double().eval(), self.x(), self.y()


class Net(nn.Module):
    """4 + 3 hidden numbers; subclasses change what happens between and around."""

    def __init__(self) -> None:
        super().__init__()
        self.back, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def hidden(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.back(x))

    def between(self, h: torch.Tensor) -> torch.Tensor:
        return h

    def forward(self, x: torch.Tensor) -> Any:
        return self.head(self.between(self.hidden(x)))


# Parameters -----------------------------------------------------------------------------------------------------------


class Beside(Net):
    """A parameter that comes before all others, and how it takes part."""

    def __init__(self, value: torch.Tensor, trainable: bool, use: Callable[[Any, Any], torch.Tensor]):
        nn.Module.__init__(self)
        self.first = nn.Parameter(value, requires_grad=trainable)
        self.use = use
        self.back, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """`double()` leaves the odd parameter as it is."""
        first = self._parameters.pop("first")
        super()._apply(fn, recurse)
        self._parameters = {"first": first, **self._parameters}
        return self

    def between(self, h: torch.Tensor) -> torch.Tensor:
        return self.use(h, self.first)


def beside(value: Callable[[], torch.Tensor], trainable: bool, use: Any) -> Callable[[], nn.Module]:
    return lambda: Beside(value(), trainable, use)


class Unused(Net):
    def __init__(self) -> None:
        super().__init__()
        self.never = nn.Linear(2, 2)


class Scalars(Net):
    """Parameters without axes."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.tensor(0.7)), nn.Parameter(torch.tensor(0.2))

    def between(self, h: torch.Tensor) -> torch.Tensor:
        return h * self.scale + self.shift


class TwoPaths(Net):
    """A layer's weight used by the layer, and once more by hand."""

    def between(self, h: torch.Tensor) -> torch.Tensor:
        return torch.sin(F.linear(h, self.back.weight)) + self.back(h)


class Generated(Net):
    """Weights made by another network."""

    def __init__(self) -> None:
        super().__init__()
        self.made = nn.Linear(2, 16)

    def between(self, h: torch.Tensor) -> torch.Tensor:
        return torch.tanh(F.linear(h, self.made(h.new_tensor([0.3, -0.4])).reshape(4, 4)))


# Rows -----------------------------------------------------------------------------------------------------------------


class Sorting(Net):
    """Sorts the rows, if there are more than `from_rows`, and puts them back."""

    def __init__(self, from_rows: int):
        super().__init__()
        self.from_rows = from_rows

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) <= self.from_rows:
            return super().forward(x)
        order = x[:, 0].argsort(descending=True)
        return super().forward(x[order])[order.argsort()]


class Unique(Net):
    """Computes rows that come several times once."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        different, place = x.unique(dim=0, return_inverse=True)
        return super().forward(different)[place]


class OneByOne(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([super(OneByOne, self).forward(x[k : k + 1]) for k in range(len(x))])


class Chunks(Net):
    """Two rows at a time: an uneven last call."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([super(Chunks, self).forward(part) for part in x.split(2)])


class Vmapped(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.vmap(super().forward)(x)


class Crossed(nn.Module):
    """Positions first, as many as there are rows."""

    def __init__(self) -> None:
        super().__init__()
        self.back, self.head = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.back(x.transpose(0, 1)))).mean(0)


class Packed(nn.Module):
    """Rows of different lengths, packed; the layer sees one list of all their steps."""

    def __init__(self, kind: type) -> None:
        super().__init__()
        self.embed, self.steps, self.head = nn.Linear(3, 3), kind(3, 2, batch_first=True), nn.Linear(2, 3)

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        packed = packed._replace(data=torch.tanh(self.embed(packed.data)))
        states = pad_packed_sequence(self.steps(packed)[0], batch_first=True)[0]
        return self.head(states.sum(1))


class Experts(nn.Module):
    """Tokens are routed by their first number."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 3) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.reshape(-1, 4)
        chosen = (tokens[:, 0] > 0).long()
        out = tokens.new_zeros(len(tokens), 3)
        for k, expert in enumerate(self.experts):
            mine = (chosen == k).nonzero()[:, 0]
            out = out.index_add(0, mine, expert(tokens[mine]))
        return out.reshape(len(x), -1, 3).sum(1)


def routed(*signs: int) -> Callable[[], torch.Tensor]:
    """One token a row; to which expert each goes."""

    def make() -> torch.Tensor:
        x = vectors()
        x[:, 0] = x[:, 0].abs() * torch.tensor(signs)
        return x

    return make


def as_many_tokens_as_rows() -> torch.Tensor:
    """Two tokens a row, five of ten to each expert, but not one of each row; the first two rows look regular."""
    x = torch.randn(5, 2, 4, dtype=torch.float64)
    x[..., 0] = x[..., 0].abs() * torch.tensor([[1, -1], [1, -1], [1, 1], [-1, -1], [1, -1]])
    return x


class Centred(Net):
    """Takes the mean of the rows away, if there are more than two."""

    def between(self, h: torch.Tensor) -> torch.Tensor:
        return h - h.mean(0) if len(h) > 2 else h


class Noisy(Net):
    def between(self, h: torch.Tensor) -> torch.Tensor:
        return F.dropout(h, 0.5, training=True)


class Remembering(nn.Module):
    """Goes on from the state of the call before."""

    def __init__(self) -> None:
        super().__init__()
        self.steps, self.head = nn.GRUCell(4, 4), nn.Linear(4, 3)
        self.state: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state = self.steps(x, None if self.state is None else self.state[: len(x)].mean(0).expand(len(x), -1))
        self.state = state.detach()
        return self.head(state)


class Counting(Net):
    """Counts its calls in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def between(self, h: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return h


# Outputs --------------------------------------------------------------------------------------------------------------


@dataclass
class Told:
    """No pytree."""

    logits: torch.Tensor
    hidden: torch.Tensor | None = None
    loss: float | None = None


Named = namedtuple("Named", ["logits", "words"])


class Telling(Net):
    """Its output by a function of what it computed."""

    def __init__(self, tell: Callable[[torch.Tensor, torch.Tensor], Any]):
        super().__init__()
        self.tell = tell

    def forward(self, x: torch.Tensor) -> Any:
        h = self.hidden(x)
        return self.tell(self.head(h), h)


def telling(name: str, tell: Any, logits: Callable[[Any], torch.Tensor]) -> Odd:
    return Odd(name, lambda: Telling(tell), loss=lambda o, t: F.cross_entropy(logits(o), t), one_tensor=False)


def both(output: Any, target: Any) -> torch.Tensor:
    return F.cross_entropy(output[0], target[0]) + F.mse_loss(output[1], target[1])


# Gradients ------------------------------------------------------------------------------------------------------------


class Reverse(torch.autograd.Function):
    """The identity, with the gradient turned around."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return -0.5 * grad


class Square(torch.autograd.Function):
    """Without a second derivative."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return 2 * grad * ctx.saved_tensors[0]


class Cube(torch.autograd.Function):
    """With rules for vmap and forward mode."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: torch.Tensor) -> torch.Tensor:
        return x**3

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.save_for_forward(inputs[0])

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return 3 * grad * ctx.saved_tensors[0] ** 2

    @staticmethod
    def jvp(ctx: Any, tangent: torch.Tensor) -> torch.Tensor:
        return 3 * tangent * ctx.saved_tensors[0] ** 2


class Rounded(torch.autograd.Function):
    """Rounded, with the gradient as if it were not: a straight-through estimator."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.round(4 * x) / 4

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad


class Through(Net):
    """A function between the two layers."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]):
        super().__init__()
        self.function = function

    def between(self, h: torch.Tensor) -> torch.Tensor:
        return self.function(h)


def through(function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], nn.Module]:
    return lambda: Through(function)


def hooked(h: torch.Tensor) -> torch.Tensor:
    """A gradient reversal by a tensor hook."""
    if h.requires_grad:
        h.register_hook(lambda grad: -0.5 * grad)
    return h


class NoGradients(Net):
    """The first layer is computed without gradients."""

    def hidden(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return super().hidden(x)


class HalfDetached(Net):
    def between(self, h: torch.Tensor) -> torch.Tensor:
        return h + h.detach() ** 2


class Checkpointed(Net):
    def __init__(self, reentrant: bool):
        super().__init__()
        self.reentrant = reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        run = torch.utils.checkpoint.checkpoint
        x = x if x.requires_grad else x.clone().requires_grad_()
        return self.head(run(self.hidden, x, use_reentrant=self.reentrant))


class InPlace(Net):
    """What layers give is overwritten."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.back(x).mul_(0.7).tanh_()
        return self.head(h).add_(1.0).mul_(0.5)


class Slope(Net):
    """Its output is a derivative of its hidden numbers by its input, as in models of forces."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            x = x if x.requires_grad else x.detach().requires_grad_()
            energy = self.hidden(x).pow(2).sum()
            return self.head(torch.autograd.grad(energy, x, create_graph=True)[0])


def with_forward_hook() -> nn.Module:
    model = Net()
    model.back.register_forward_hook(lambda module, args, output: 2 * output)
    return model


def with_pre_hook() -> nn.Module:
    model = Net()
    model.head.register_forward_pre_hook(lambda module, args: (args[0] ** 2,))
    return model


def with_backward_hook() -> nn.Module:
    """Gradients through the first layer's output are doubled."""
    model = Net()
    model.head.register_full_backward_hook(lambda module, given, out: (2 * given[0],))
    return model


class Cast(Net):
    """A part of it in bfloat16, by itself."""

    def between(self, h: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return torch.tanh(h @ h.new_ones(4, 4) / 4)


def sparse(h: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    return torch.sparse.mm(table, h.T).T


MODELS = [
    Odd("an integer parameter", beside(lambda: torch.arange(-2, 2, dtype=torch.int8), False, lambda h, w: h * w / 2)),
    Odd(
        "a frozen complex parameter",
        beside(lambda: torch.randn(4, dtype=torch.complex128), False, lambda h, w: (h * w).real),
    ),
    Odd(
        "a trainable complex parameter",
        beside(lambda: torch.randn(4, dtype=torch.complex128), True, lambda h, w: (h * w).abs()),
        refused="a complex parameter has no real gradient vector",
    ),
    Odd(
        "a parameter of no numbers", beside(lambda: torch.empty(0, dtype=torch.float64), True, lambda h, w: h + w.sum())
    ),
    Odd("a frozen sparse parameter", beside(lambda: torch.eye(4, dtype=torch.float64).to_sparse(), False, sparse)),
    Odd("a trainable sparse parameter", beside(lambda: torch.eye(4, dtype=torch.float64).to_sparse(), True, sparse)),
    Odd("a frozen half-precision parameter", beside(lambda: torch.ones(4).half(), False, lambda h, w: h * w)),
    Odd("a parameter that nothing uses", Unused),
    Odd("parameters without axes", Scalars),
    Odd("a weight used by its layer and by hand", TwoPaths),
    Odd("weights made by a network", Generated),
    Odd("rows are sorted", lambda: Sorting(1)),
    Odd("rows are sorted from three on", lambda: Sorting(2)),
    Odd("equal rows are computed once", Unique, x=lambda: vectors()[[0, 1, 0, 2, 1]]),
    Odd("rows one by one", OneByOne),
    Odd("rows two by two", Chunks),
    Odd("rows under vmap", Vmapped),
    Odd("as many positions as rows, positions first", Crossed, x=lambda: torch.randn(5, 5, 3, dtype=torch.float64)),
    Odd("two positions, positions first", Crossed, x=lambda: torch.randn(5, 2, 3, dtype=torch.float64)),
    *(
        Odd(
            f"packed rows, {kind.__name__}",
            lambda kind=kind: Packed(kind),
            x=lambda: (torch.randn(5, 4, 3, dtype=torch.float64), torch.tensor([2, 4, 1, 3, 2])),
        )
        for kind in (nn.RNN, nn.LSTM, nn.GRU)
    ),
    Odd("experts", Experts, x=routed(1, -1, 1, 1, -1)),
    Odd("experts, one of which gets one row", Experts, x=routed(1, 1, 1, -1, 1)),
    Odd("experts, one of which gets nothing", Experts, x=routed(1, 1, 1, 1, 1)),
    Odd("experts that get as many tokens as there are rows", Experts, x=as_many_tokens_as_rows),
    Odd("rows act on each other from three on", Centred, refused="rows act on each other"),
    Odd("chance in eval mode", Noisy, refused="it is random"),
    Odd("a state kept between calls", Remembering, refused="a call depends on the call before"),
    Odd("calls counted in a buffer", Counting, after=lambda model: int(model.calls) == 0),
    telling("a dataclass as output", lambda logits, h: Told(logits, h), lambda o: o.logits),
    telling("None beside the output", lambda logits, h: (logits, None), lambda o: o[0]),
    telling(
        "a number and a word beside the output", lambda logits, h: {"y": logits, "n": 2, "s": "on"}, lambda o: o["y"]
    ),
    telling("a named tuple as output", lambda logits, h: Named(logits, "on"), lambda o: o.logits),
    telling("a dict with an unused tensor", lambda logits, h: {"y": logits, "h": h}, lambda o: o["y"]),
    Odd(
        "two heads",
        lambda: Telling(lambda logits, h: (logits, h[:, :1])),
        y=lambda: (classes(), torch.linspace(-1, 1, 5, dtype=torch.float64)[:, None]),
        loss=both,
        one_tensor=False,
    ),
    Odd("a gradient turned around by a tensor hook", through(hooked)),
    Odd("a gradient turned around by a function", through(Reverse.apply)),
    Odd("a function without second derivative", through(Square.apply)),
    Odd("a function with rules for vmap and forward mode", through(Cube.apply)),
    Odd("a straight-through estimator", through(Rounded.apply)),
    Odd("a part without gradients", NoGradients),
    Odd("a part that is detached", HalfDetached),
    Odd("checkpointing", lambda: Checkpointed(False), plain=Net),
    Odd("reentrant checkpointing", lambda: Checkpointed(True), plain=Net),
    Odd("changed in place", InPlace),
    Odd("a derivative as output", Slope),
    Odd("a forward hook of its user's", with_forward_hook),
    Odd("a forward pre-hook of its user's", with_pre_hook),
    Odd("a backward hook of its user's", with_backward_hook),
    Odd("a part under autocast of its own", Cast),
]
