"""One small model around every layer of torch.nn: a few rows, float64, eval mode. Nothing of headwater is used here.

A case says which classes it covers, how its layer is made and what its rows are. `Model` puts a trainable linear map
before the layer (where the rows are floating point) and a small head behind it, so that gradients pass through a layer
that has no parameters itself. A layer that takes or gives more than one tensor is wrapped, so that scripting works too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils._pytree import tree_leaves, tree_map

CLASSES = 3
Rows = Callable[[int], Any]


@dataclass(frozen=True)
class Case:
    """A layer with its settings, and rows for it."""

    name: str
    covers: type
    make: Callable[[], nn.Module]
    rows: Rows
    refused: str = ""
    """Why its rows have no gradients of their own, where they do not: it must be refused."""
    training: bool = False
    """Left in train mode."""


def floats(*shape: int) -> Rows:
    return lambda n: torch.randn(n, *shape, dtype=torch.float64)


def words(*shape: int, of: int = 5) -> Rows:
    return lambda n: torch.randint(of, (n, *shape))


def with_padding(rows: Rows, length: int) -> Rows:
    """Beside the rows, the mask [n, t] of what is padding: True at the end, and never everywhere."""
    return lambda n: (rows(n), torch.arange(length)[None] >= 1 + torch.arange(n)[:, None] % length)


# Layers that take or give more than one tensor -----------------------------------------------------------------------


class Wrapper(nn.Module):
    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner


class First(Wrapper):
    """Its first output."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)[0]


class Second(Wrapper):
    """The last hidden state, rows first again."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)[1].transpose(0, 1)


class TimeFirst(Wrapper):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x.transpose(0, 1))[0].transpose(0, 1)


class Pairs(Wrapper):
    """Two inputs: the row, and the row backwards."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x, 0.5 * x.flip(-1))


class Steps(Wrapper):
    """A recurrent cell over the positions, from a hidden state of zeros."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.inner(x[:, 0])
        for t in range(1, x.shape[1]):
            hidden = self.inner(x[:, t], hidden)
        return hidden


class LongSteps(Wrapper):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden, cell = self.inner(x[:, 0])
        for t in range(1, x.shape[1]):
            hidden, cell = self.inner(x[:, t], (hidden, cell))
        return hidden


class Attend(Wrapper):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x, x, x)[0]


class AttendFast(Wrapper):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x, x, x, need_weights=False)[0]


class AttendCausal(Wrapper):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        return self.inner(x, x, x, attn_mask=later)[0]


class AttendTimeFirst(Wrapper):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        t = x.transpose(0, 1)
        return self.inner(t, t, t)[0].transpose(0, 1)


class AttendElsewhere(Wrapper):
    """Keys and values of other widths."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x, x[..., :3], x[..., 1:3])[0]


class AttendPadded(Wrapper):
    def forward(self, x: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
        return self.inner(x, x, x, key_padding_mask=padding)[0] * (~padding).unsqueeze(2).to(x.dtype)


class Encode(Wrapper):
    """What it gives at padding is left out."""

    def forward(self, x: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
        return self.inner(x, src_key_padding_mask=padding) * (~padding).unsqueeze(2).to(x.dtype)


class EncodeAll(Wrapper):
    """What it gives at padding counts too: zeros on torch's nested fast path, other numbers without it."""

    def forward(self, x: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
        return self.inner(x, src_key_padding_mask=padding)


class EncodeCausal(Wrapper):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        later = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
        return self.inner(x, later, is_causal=True)


class Decode(Wrapper):
    def forward(self, x: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
        return self.inner(0.5 * x, x.flip(-1), memory_key_padding_mask=padding)


class Translate(Wrapper):
    def forward(self, x: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
        return self.inner(x, 0.5 * x.flip(-1), src_key_padding_mask=padding, memory_key_padding_mask=padding)


class Bag(Wrapper):
    """Words in one long list, with the places where rows begin; words of -1 are none."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        there = x >= 0
        counts = there.sum(1)
        return self.inner(x[there], counts.cumsum(0) - counts)


class BagToTheEnd(Wrapper):
    """With the place where the last row ends."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        there = x >= 0
        ends = there.sum(1).cumsum(0)
        return self.inner(x[there], torch.cat([torch.zeros_like(ends[:1]), ends]))


class WeightedBag(Wrapper):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x, per_sample_weights=(1.0 + x).to(torch.float64) / 3)


class Unpool(Wrapper):
    def __init__(self, inner: nn.Module, pool: nn.Module):
        super().__init__(inner)
        self.pool = pool

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        value, index = self.pool(x)
        return self.inner(value, index)


class LogProbabilities(Wrapper):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner.log_prob(x)


class OfTarget(Wrapper):
    """The value at a target that comes with the row; the loss that is given beside it has no rows and is dropped."""

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return self.inner(x, target)[0].unsqueeze(1)


class CriterionOfTarget(Wrapper):
    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return self.inner(x, target).unsqueeze(1)


class Listed(nn.Module):
    """Parameters in a list and in a dict, used without a layer."""

    def __init__(self, kind: str):
        super().__init__()
        values = [torch.randn(3, 3), torch.randn(3)]
        self.held = nn.ParameterList(values) if kind == "list" else nn.ParameterDict({"0": values[0], "1": values[1]})
        self.keys: list[Any] = [0, 1] if kind == "list" else ["0", "1"]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sin(x @ self.held[self.keys[0]] + self.held[self.keys[1]])


class Doubled(nn.Module):
    """A parametrization of one's own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * torch.sin(x)


def own_parametrization() -> nn.Module:
    layer = nn.Conv1d(2, 3, 2)
    parametrize.register_parametrization(layer, "weight", Doubled())
    return layer


def moved_statistics(layer: nn.Module) -> nn.Module:
    """Running statistics and scales that are not those of a fresh layer."""
    for name, tensor in [*layer.named_buffers(), *layer.named_parameters()]:
        if tensor.is_floating_point():
            tensor.data.uniform_(0.5, 1.5)
            tensor.data.sub_(0.8 if "mean" in name else 0.0)
    return layer


def dry(layer: nn.Module, rows: Rows) -> nn.Module:
    """A lazy layer after its first call."""
    layer.double()(rows(2))
    return layer


# The cases ------------------------------------------------------------------------------------------------------------


def case(
    covers: type, rows: Rows, *args: Any, name: str = "", inside: Callable[..., nn.Module] | None = None, **kwargs: Any
) -> Case:
    """covers(*args, **kwargs), inside a wrapper where one is named."""

    def make() -> nn.Module:
        layer = covers(*args, **kwargs)
        return layer if inside is None else inside(layer)

    words = ", ".join([*map(repr, args), *(f"{k}={v!r}" for k, v in kwargs.items())])
    return Case(f"{covers.__name__}({words})" + (f" {name}" if name else ""), covers, make, rows)


def linear() -> list[Case]:
    return [
        case(nn.Linear, floats(3), 3, 2),
        case(nn.Linear, floats(3), 3, 2, bias=False),
        case(nn.Linear, floats(2, 3), 3, 2, name="at positions"),
        case(nn.Bilinear, floats(3), 3, 3, 2, inside=Pairs),
        case(nn.Bilinear, floats(2, 3), 3, 3, 2, inside=Pairs, bias=False, name="at positions"),
        case(nn.Identity, floats(3)),
        Case("LazyLinear(2)", nn.LazyLinear, lambda: dry(nn.LazyLinear(2), floats(3)), floats(3)),
    ]


SPACES = {1: (6,), 2: (4, 4), 3: (3, 3, 3)}
"""Numbers of positions along each axis, by the number of axes."""


def convolutions() -> list[Case]:
    found = []
    for axes, (plain, back) in enumerate(
        [
            (nn.Conv1d, nn.ConvTranspose1d),
            (nn.Conv2d, nn.ConvTranspose2d),
            (nn.Conv3d, nn.ConvTranspose3d),
        ],
        start=1,
    ):
        rows = floats(2, *SPACES[axes])
        settings: list[dict[str, Any]] = [
            {},
            {"bias": False},
            {"stride": 2, "padding": 1},
            {"dilation": 2},
            {"groups": 2},
        ]
        found += [case(plain, rows, 2, 4, 2, **s) for s in settings]
        found += [
            case(plain, rows, 2, 2, 2, padding="same"),
            case(plain, rows, 2, 2, 2, padding=1, padding_mode="reflect"),
            case(plain, rows, 2, 2, 2, padding=1, padding_mode="replicate"),
            case(plain, rows, 2, 2, 2, padding=1, padding_mode="circular"),
        ]
        found += [case(back, rows, 2, 2, 2, **s) for s in settings]
        found += [case(back, rows, 2, 2, 2, stride=2, output_padding=1)]
    found += [case(nn.Conv2d, floats(2, 3, 4), 2, 4, (1, 2), stride=(2, 1), padding=(1, 0), groups=2)]
    for axes, (plain, back) in enumerate(
        [
            (nn.LazyConv1d, nn.LazyConvTranspose1d),
            (nn.LazyConv2d, nn.LazyConvTranspose2d),
            (nn.LazyConv3d, nn.LazyConvTranspose3d),
        ],
        start=1,
    ):
        rows = floats(2, *SPACES[axes])
        found += [
            Case(f"{lazy.__name__}(2, 2)", lazy, lambda lazy=lazy, rows=rows: dry(lazy(2, 2), rows), rows)
            for lazy in (plain, back)
        ]
    return found


def embeddings() -> list[Case]:
    def some(n: int) -> torch.Tensor:
        ids = torch.randint(5, (n, 4))
        return ids.masked_fill(torch.arange(4)[None] > torch.arange(n)[:, None] % 4, -1)

    table, bag = (nn.Embedding, words(4), 5, 3), (nn.EmbeddingBag, words(4), 5, 3)
    found = [
        case(*table),
        case(*table, padding_idx=0),
        case(*table, sparse=True),
        case(*table, scale_grad_by_freq=True),
        case(nn.Embedding, words(), 5, 3, name="of one word"),
        case(*table, max_norm=0.5),
    ]
    found[-1] = Case(found[-1].name, nn.Embedding, found[-1].make, words(4), "its forward pass changes its weight")
    found += [case(*bag, mode=mode) for mode in ("sum", "mean", "max")]
    found += [
        case(*bag, mode="sum", sparse=True),
        case(*bag, mode="mean", padding_idx=0),
        case(*bag, mode="sum", inside=WeightedBag, name="with weights"),
        case(*bag, mode="mean", scale_grad_by_freq=True),
        *(case(nn.EmbeddingBag, some, 5, 3, mode=m, inside=Bag, name="by offsets") for m in ("sum", "mean", "max")),
        case(nn.EmbeddingBag, some, 5, 3, include_last_offset=True, inside=BagToTheEnd, name="by offsets"),
    ]
    return found


def norms() -> list[Case]:
    found = []
    batch = [(nn.BatchNorm1d, (3, 4)), (nn.BatchNorm2d, (3, 2, 2)), (nn.BatchNorm3d, (3, 2, 2, 2))]
    batch += [(nn.BatchNorm1d, (3,)), (nn.SyncBatchNorm, (3, 2, 2))]

    def moved(covers: type, shape: tuple[int, ...], *args: Any, **kwargs: Any) -> Case:
        return case(covers, floats(*shape), *args, inside=moved_statistics, **kwargs)

    found += [moved(kind, shape, 3, name="of vectors" if len(shape) == 1 else "") for kind, shape in batch]
    found += [moved(nn.BatchNorm2d, (3, 2, 2), 3, affine=False)]
    for kind, shape in batch[:3]:
        lone = case(kind, floats(*shape), 3, track_running_stats=False)
        found.append(Case(lone.name, kind, lone.make, lone.rows, "its statistics are those of the batch"))
    train = case(nn.BatchNorm1d, floats(3), 3, name="in train mode")
    found.append(
        Case(train.name, nn.BatchNorm1d, train.make, train.rows, "its statistics are those of the batch", True)
    )
    instance = [(nn.InstanceNorm1d, (2, 4)), (nn.InstanceNorm2d, (2, 2, 3)), (nn.InstanceNorm3d, (2, 2, 2, 2))]
    for kind, shape in instance:
        found += [moved(kind, shape, 2), moved(kind, shape, 2, affine=True)]
        found += [moved(kind, shape, 2, affine=True, track_running_stats=True)]
    lazy = [(nn.LazyBatchNorm1d, (3, 4)), (nn.LazyBatchNorm2d, (3, 2, 2)), (nn.LazyBatchNorm3d, (3, 2, 2, 2))]
    lazy += [(nn.LazyInstanceNorm1d, (2, 4)), (nn.LazyInstanceNorm2d, (2, 2, 3)), (nn.LazyInstanceNorm3d, (2, 2, 2, 2))]
    found += [
        Case(f"{k.__name__}()", k, lambda k=k, s=s: moved_statistics(dry(k().eval(), floats(*s))), floats(*s))
        for k, s in lazy
    ]
    found += [
        moved(nn.GroupNorm, (4, 3), 2, 4),
        moved(nn.GroupNorm, (4,), 2, 4, name="of vectors"),
        moved(nn.GroupNorm, (4, 2, 2), 2, 4, affine=False),
        moved(nn.LayerNorm, (4,), 4),
        moved(nn.LayerNorm, (2, 4), 4, name="at positions"),
        moved(nn.LayerNorm, (2, 2, 3), (2, 3)),
        moved(nn.LayerNorm, (4,), 4, bias=False),
        moved(nn.LayerNorm, (4,), 4, elementwise_affine=False),
        moved(nn.RMSNorm, (4,), 4),
        moved(nn.RMSNorm, (2, 2, 3), (2, 3)),
        moved(nn.RMSNorm, (4,), 4, elementwise_affine=False),
        case(nn.LocalResponseNorm, floats(4, 3), 2, alpha=0.5),
        case(nn.CrossMapLRN2d, floats(4, 2, 2), 2, alpha=0.5),
    ]
    return found


def recurrent() -> list[Case]:
    rows, found = floats(3, 3), []
    for kind in (nn.RNN, nn.LSTM, nn.GRU):
        found += [
            case(kind, rows, 3, 2, batch_first=True, inside=First),
            case(kind, rows, 3, 2, inside=TimeFirst),
            case(kind, rows, 3, 2, bidirectional=True, batch_first=True, inside=First),
            case(kind, rows, 3, 2, num_layers=2, bias=False, batch_first=True, inside=First),
            case(kind, rows, 3, 2, num_layers=2, dropout=0.5, batch_first=True, inside=First),
        ]
    found += [
        case(nn.RNN, rows, 3, 2, nonlinearity="relu", batch_first=True, inside=Second, name="last state"),
        case(nn.GRU, rows, 3, 2, batch_first=True, inside=Second, name="last state"),
        case(nn.LSTM, rows, 3, 4, proj_size=2, batch_first=True, inside=First),
        case(nn.RNNCell, rows, 3, 2, inside=Steps),
        case(nn.GRUCell, rows, 3, 2, inside=Steps),
        case(nn.LSTMCell, rows, 3, 2, inside=LongSteps),
        case(nn.LSTMCell, rows, 3, 2, bias=False, inside=LongSteps),
    ]
    return found


def attention() -> list[Case]:
    rows, padded = floats(3, 4), with_padding(floats(3, 4), 3)
    many = nn.MultiheadAttention
    small = {"dim_feedforward": 3, "batch_first": True}

    def encoder(**kwargs: Any) -> nn.Module:
        return nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, **small), 1, **kwargs)

    def decoder() -> nn.Module:
        return nn.TransformerDecoder(nn.TransformerDecoderLayer(4, 2, **small), 1)

    return [
        case(many, rows, 4, 2, batch_first=True, inside=Attend),
        case(many, rows, 4, 2, batch_first=True, inside=AttendFast, name="without weights"),
        case(many, rows, 4, 2, batch_first=True, inside=AttendCausal, name="causal"),
        case(many, rows, 4, 2, inside=AttendTimeFirst),
        case(many, rows, 4, 2, bias=False, batch_first=True, inside=Attend),
        case(many, rows, 4, 2, kdim=3, vdim=2, batch_first=True, inside=AttendElsewhere),
        case(many, rows, 4, 2, add_bias_kv=True, add_zero_attn=True, batch_first=True, inside=Attend),
        case(many, padded, 4, 2, batch_first=True, inside=AttendPadded, name="padded"),
        case(nn.TransformerEncoderLayer, rows, 4, 2, **small),
        case(nn.TransformerEncoderLayer, rows, 4, 2, norm_first=True, activation="gelu", **small),
        case(nn.TransformerEncoderLayer, rows, 4, 2, **small, inside=EncodeCausal, name="causal"),
        case(nn.TransformerEncoderLayer, padded, 4, 2, **small, inside=Encode, name="padded"),
        Case("TransformerEncoder", nn.TransformerEncoder, encoder, rows),
        Case("TransformerEncoder padded", nn.TransformerEncoder, lambda: Encode(encoder()), padded),
        Case("TransformerEncoder padded, all positions", nn.TransformerEncoder, lambda: EncodeAll(encoder()), padded),
        Case(
            "TransformerEncoder padded, no nested tensors",
            nn.TransformerEncoder,
            lambda: Encode(encoder(enable_nested_tensor=False)),
            padded,
        ),
        case(nn.TransformerDecoderLayer, padded, 4, 2, **small, inside=Decode, name="padded"),
        Case("TransformerDecoder padded", nn.TransformerDecoder, lambda: Decode(decoder()), padded),
        case(nn.Transformer, padded, 4, 2, 1, 1, 2, batch_first=True, inside=Translate, name="padded"),
    ]


def activations() -> list[Case]:
    rows = floats(2, 4)
    names = (
        "CELU ELU GELU GLU Hardshrink Hardsigmoid Hardswish Hardtanh LeakyReLU LogSigmoid Mish ReLU ReLU6 RReLU SELU "
        "SiLU Sigmoid Softplus Softshrink Softsign Tanh Tanhshrink"
    )
    found = [case(getattr(nn, name), rows) for name in names.split()]
    found += [case(getattr(nn, name), rows, -1) for name in ("Softmax", "Softmin", "LogSoftmax")]
    found += [
        case(nn.ReLU, rows, inplace=True),
        case(nn.Threshold, rows, 0.1, 0.2),
        case(nn.Softmax2d, floats(2, 2, 2)),
        case(nn.PReLU, rows),
        case(nn.PReLU, rows, 2),
    ]
    train = case(nn.RReLU, rows, name="in train mode")
    return [*found, Case(train.name, nn.RReLU, train.make, rows, "it is random", True)]


def pooling() -> list[Case]:
    found = []
    for axes, space in SPACES.items():
        rows = floats(2, *space)
        kinds = [getattr(nn, f"{kind}{axes}d") for kind in ("MaxPool", "AvgPool", "LPPool")]
        found += [
            case(kinds[0], rows, 2),
            case(kinds[0], rows, 2, stride=1, dilation=2),
            case(kinds[1], rows, 2, stride=1, padding=1),
            case(kinds[2], rows, 2, 2),
            case(getattr(nn, f"AdaptiveAvgPool{axes}d"), rows, 2),
            case(getattr(nn, f"AdaptiveMaxPool{axes}d"), rows, 2),
        ]
        pool, back = kinds[0], getattr(nn, f"MaxUnpool{axes}d")
        even = floats(1, *(4 for _ in range(axes)))
        found.append(case(back, even, 2, inside=lambda m, pool=pool: Unpool(m, pool(2, return_indices=True))))
    for axes in (2, 3):
        kind = getattr(nn, f"FractionalMaxPool{axes}d")
        rows = floats(1, *(5 for _ in range(axes)))
        chance = case(kind, rows, 2, output_size=3)
        found.append(Case(chance.name, kind, chance.make, rows, "its regions are random"))
    return found


def reshaping() -> list[Case]:
    found = []
    for axes, space in SPACES.items():
        for kind in ("Reflection", "Replication", "Circular", "Zero"):
            found.append(case(getattr(nn, f"{kind}Pad{axes}d"), floats(1, *space), 1))
        found.append(case(getattr(nn, f"ConstantPad{axes}d"), floats(1, *space), 1, 0.3))
    rows = floats(2, 3, 3)
    return [
        *found,
        case(nn.PixelShuffle, floats(4, 2, 2), 2),
        case(nn.PixelUnshuffle, floats(1, 4, 4), 2),
        case(nn.ChannelShuffle, floats(4, 2), 2),
        case(nn.Upsample, rows, scale_factor=2),
        case(nn.Upsample, floats(2, 3), scale_factor=2, mode="linear"),
        case(nn.Upsample, rows, size=4, mode="bilinear", align_corners=True),
        case(nn.Upsample, rows, size=4, mode="bicubic"),
        case(nn.Upsample, floats(1, 2, 2, 2), scale_factor=2, mode="trilinear"),
        case(nn.UpsamplingNearest2d, rows, scale_factor=2),
        case(nn.UpsamplingBilinear2d, rows, scale_factor=2),
        case(nn.Fold, floats(4, 4), (3, 3), (2, 2)),
        case(nn.Unfold, rows, (2, 2)),
        case(nn.Flatten, rows),
        case(nn.Unflatten, floats(4), 1, (2, 2)),
    ]


def dropout() -> list[Case]:
    shapes = {"Dropout": (4,), "Dropout1d": (2, 3), "Dropout2d": (2, 2, 2), "Dropout3d": (2, 2, 2, 2)}
    shapes |= {"AlphaDropout": (4,), "FeatureAlphaDropout": (2, 3)}
    found = [case(getattr(nn, name), floats(*shape)) for name, shape in shapes.items()]
    train = case(nn.Dropout, floats(4), name="in train mode")
    return [*found, Case(train.name, nn.Dropout, train.make, train.rows, "it is random", True)]


def distances() -> list[Case]:
    def with_target(n: int) -> Any:
        return torch.randn(n, 3, dtype=torch.float64), torch.arange(n) % 5

    adaptive, criterion = nn.AdaptiveLogSoftmaxWithLoss, getattr(nn, "LinearCrossEntropyLoss", None)
    found = [
        case(nn.CosineSimilarity, floats(2, 3), inside=Pairs),
        case(nn.PairwiseDistance, floats(2, 3), inside=Pairs),
        case(adaptive, floats(3), 3, 5, cutoffs=[2], div_value=1.0, inside=LogProbabilities, name="log_prob"),
        case(adaptive, with_target, 3, 5, cutoffs=[2], div_value=1.0, inside=OfTarget, name="of targets"),
    ]
    if criterion is not None:
        named = {"options": None, "reduction": "none", "bias": True}
        found.append(case(criterion, with_target, 3, 5, **named, inside=CriterionOfTarget))
    return found


def parametrised() -> list[Case]:
    def named(name: str, make: Callable[[], nn.Module], rows: Rows) -> Case:
        return Case(name, type(make()), make, rows)

    def older() -> nn.Module:
        return nn.utils.spectral_norm(nn.Linear(3, 2))

    return [
        named("ParameterList", lambda: Listed("list"), floats(3)),
        named("ParameterDict", lambda: Listed("dict"), floats(3)),
        Case("Linear with weight_norm", nn.Linear, lambda: parametrizations.weight_norm(nn.Linear(3, 2)), floats(3)),
        Case(
            "Conv1d with weight_norm", nn.Conv1d, lambda: parametrizations.weight_norm(nn.Conv1d(2, 3, 2)), floats(2, 4)
        ),
        Case(
            "Linear with spectral_norm", nn.Linear, lambda: parametrizations.spectral_norm(nn.Linear(3, 2)), floats(3)
        ),
        Case("Linear with orthogonal", nn.Linear, lambda: parametrizations.orthogonal(nn.Linear(3, 3)), floats(3)),
        Case("Conv1d with a parametrization of one's own", nn.Conv1d, own_parametrization, floats(2, 4)),
        Case("Linear with the older spectral_norm", nn.Linear, older, floats(3)),
    ]


CASES = [
    *linear(),
    *convolutions(),
    *embeddings(),
    *norms(),
    *recurrent(),
    *attention(),
    *activations(),
    *pooling(),
    *reshaping(),
    *dropout(),
    *distances(),
    *parametrised(),
]

LEFT_OUT = {
    **dict.fromkeys(("Module", "Container", "Sequential", "ModuleList", "ModuleDict"), "holds layers; no layer itself"),
    **dict.fromkeys(("RNNBase", "RNNCellBase"), "base class of others here"),
    **dict.fromkeys(("ParameterList", "ParameterDict"), "hold parameters; a model that uses them is here"),
    "DataParallel": "wraps a model: a column of the table",
    **dict.fromkeys(
        [
            "BCELoss",
            "BCEWithLogitsLoss",
            "CTCLoss",
            "CosineEmbeddingLoss",
            "CrossEntropyLoss",
            "GaussianNLLLoss",
            "HingeEmbeddingLoss",
            "HuberLoss",
            "KLDivLoss",
            "L1Loss",
            "MSELoss",
            "MarginRankingLoss",
            "MultiLabelMarginLoss",
            "MultiLabelSoftMarginLoss",
            "MultiMarginLoss",
            "NLLLoss",
            "NLLLoss2d",
            "PoissonNLLLoss",
            "SmoothL1Loss",
            "SoftMarginLoss",
            "TripletMarginLoss",
            "TripletMarginWithDistanceLoss",
        ],
        "a loss without parameters",
    ),
}
"""Classes of torch.nn without a case of their own, and why."""


def classes_of_torch() -> list[str]:
    """Every public module class of torch.nn."""
    return [name for name, kind in vars(nn).items() if isinstance(kind, type) and issubclass(kind, nn.Module)]


# The model around a layer ---------------------------------------------------------------------------------------------


class Tail(nn.Module):
    """Whatever comes, flattened and projected to four numbers, then classes; a second input counts as its square."""

    def __init__(self, features: int):
        super().__init__()
        self.register_buffer("projection", torch.randn(features, 4, dtype=torch.float64) / features**0.5)
        self.head = nn.Linear(4, CLASSES)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1) @ self.projection if x.dim() > 1 else x.unsqueeze(1) @ self.projection

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.features(x)))


class Model(nn.Module):
    """One input tensor."""

    def __init__(self, front: nn.Module, layer: nn.Module, tail: nn.Module):
        super().__init__()
        self.front, self.layer, self.tail = front, layer, tail

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.tail(self.layer(self.front(x)))


class PairModel(Model):
    """A second input tensor, which goes to the layer as it is."""

    def forward(self, x: torch.Tensor, beside: torch.Tensor) -> torch.Tensor:
        return self.tail(self.layer(self.front(x), beside))


class Twice(nn.Module):
    """The layer on the rows, and `again` (which may be the same layer) on the rows backwards."""

    def __init__(self, model: Model, again: nn.Module | None):
        super().__init__()
        self.front, self.layer, self.tail = model.front, model.layer, model.tail
        self.again = again

    def forward(self, *x: torch.Tensor) -> torch.Tensor:
        def features(layer: nn.Module, inputs: Any) -> torch.Tensor:
            return self.tail.features(layer(self.front(inputs[0]), *inputs[1:]))

        backwards = tree_map(lambda t: t.flip(-1) if t.dim() > 1 else t, x)
        other = features(self.layer if self.again is None else self.again, backwards)
        return self.tail.head(torch.tanh(features(self.layer, x) + 0.3 * other**2))


def build(case: Case, seed: int = 0) -> tuple[Model, Any, torch.Tensor]:
    """The model of a case in float64, its five rows and their classes."""
    torch.manual_seed(seed)
    rows = case.rows(5)
    first = tree_leaves(rows)[0]
    front = nn.Linear(first.shape[-1], first.shape[-1]) if first.is_floating_point() else nn.Identity()
    layer = case.make()
    double = nn.ModuleList([front, layer]).double().eval()
    with torch.no_grad():
        out = layer(front(rows[0]), *rows[1:]) if isinstance(rows, tuple) else layer(front(rows))
    kind = PairModel if isinstance(rows, tuple) else Model
    model = kind(front, layer, Tail(out[0].numel())).double()
    del double
    return model.train(case.training), rows, torch.arange(5) % CLASSES
