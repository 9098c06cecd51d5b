"""Small models with smooth activations, and data for them: every case is deterministic, in float64 and eval mode."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

TRAIN, QUERIES, BATCH = 11, 5, 4
"""Batches of 4, 4 and 3 train rows: the last one is uneven."""


class Mlp(nn.Module):
    """16 + 15 parameters, three classes."""

    def __init__(self, bias: bool = True):
        super().__init__()
        self.first = nn.Linear(3, 4, bias=bias)
        self.second = nn.Linear(4, 3, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


class Images(nn.Module):
    """Stride, reflected padding, groups, dilation, and the scales of group norm and of batch norm in eval mode."""

    def __init__(self):
        super().__init__()
        self.wide = nn.Conv2d(2, 4, 2, stride=2, padding=1, padding_mode="reflect")
        self.groups = nn.GroupNorm(2, 4)
        self.split = nn.Conv2d(4, 4, 2, groups=2, dilation=2)
        self.batch = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.softplus(self.groups(self.wide(x)))
        x = torch.tanh(self.batch(self.split(x)))
        return self.head(x.flatten(1))


class Signals(nn.Module):
    """One-dimensional convolutions: zero padding with dilation and no bias, then circular padding with groups."""

    def __init__(self):
        super().__init__()
        self.coarse = nn.Conv1d(2, 4, 3, padding=2, dilation=2, stride=2, bias=False)
        self.fine = nn.Conv1d(4, 4, 2, padding=1, padding_mode="circular", groups=2)
        self.scale = nn.RMSNorm(4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.gelu(self.fine(torch.tanh(self.coarse(x))))
        return self.head(self.scale(x.mean(2)))


class Attention(nn.Module):
    """Two heads; written by hand, or with torch's own."""

    def __init__(self, width: int, by_hand: bool):
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width)
        self.by_hand = by_hand

    def forward(self, x: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
        n, t, width = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, 2, width // 2).permute(2, 0, 3, 1, 4)
        if self.by_hand:
            logits = (q @ k.transpose(2, 3)) / math.sqrt(width // 2)
            mixed = logits.masked_fill(~allowed, -1e9).softmax(-1) @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
        return self.out(mixed.transpose(1, 2).reshape(n, t, width))


class Language(nn.Module):
    """Next tokens: an embedding tied to the output head, and a positional parameter on the model itself."""

    def __init__(self, vocabulary: int = 5, positions: int = 3, width: int = 4):
        super().__init__()
        self.position = nn.Parameter(torch.randn(positions, width) / 2)
        self.tokens = nn.Embedding(vocabulary, width)
        self.before = nn.LayerNorm(width)
        self.attention = Attention(width, by_hand=True)
        self.after = nn.LayerNorm(width)
        self.hidden = nn.Linear(width, 3)
        self.back = nn.Linear(3, width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        t = ids.shape[1]
        causal = torch.ones(t, t, dtype=torch.bool).tril()
        x = self.tokens(ids) + self.position[:t]
        x = x + self.attention(self.before(x), causal)
        x = x + self.back(F.gelu(self.hidden(self.after(x))))
        return self.head(x)


class Sentences(nn.Module):
    """A class for each sentence: keyword inputs (ids and mask), a padding token, torch's attention."""

    def __init__(self, vocabulary: int = 6, width: int = 4):
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width, padding_idx=0)
        self.attention = Attention(width, by_hand=False)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 3)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = self.tokens(ids)
        x = x + self.attention(self.norm(x), mask[:, None, None, :])
        weights = mask.to(x.dtype).unsqueeze(2)
        return self.head(torch.tanh((x * weights).sum(1) / weights.sum(1)))


def token_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The mean over tokens, as language models are trained."""
    return F.cross_entropy(output.flatten(0, 1), target.flatten())


@dataclass(frozen=True)
class Case:
    """A model, its loss, train rows and queries."""

    name: str
    model: nn.Module
    loss: Callable[[Any, Any], torch.Tensor]
    x: Any
    y: torch.Tensor
    x_query: Any
    y_query: torch.Tensor
    likelihood: str | None = None
    own_blocks: dict[str, list[str]] | None = None
    """A mapping in another order than the model's, which leaves something out."""

    @property
    def perturbs(self) -> bool:
        return isinstance(self.x, torch.Tensor) and self.x.is_floating_point()

    def loader(self, size: int = BATCH, order: torch.Tensor | None = None) -> list[tuple[Any, torch.Tensor]]:
        x, y = (self.x, self.y) if order is None else tree_map(lambda t: t[order], (self.x, self.y))
        return split_rows(x, y, size)


def split_rows(x: Any, y: torch.Tensor, size: int) -> list[tuple[Any, torch.Tensor]]:
    """A loader: a list of batches."""
    rows = len(tree_leaves(x)[0])
    cuts = [slice(k, k + size) for k in range(0, rows, size)]
    return [(tree_map(lambda t, c=cut: t[c], x), y[cut]) for cut in cuts]


def settle(model: nn.Module, seed: int) -> nn.Module:
    """Float64, eval mode, and weights that are none of torch's initial zeros and ones."""
    generator = torch.Generator().manual_seed(seed)
    model = model.double().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) / math.sqrt(p[0].numel() if p.ndim else 1))
            if "norm" in name or "groups.weight" in name or "batch.weight" in name or "scale" in name:
                p.add_(1.0)
        for name, b in model.named_buffers():
            if b.is_floating_point():
                b.copy_(torch.rand(b.shape, generator=generator, dtype=b.dtype) + ("var" in name) / 2)
    if hasattr(model, "tokens") and model.tokens.padding_idx is not None:
        with torch.no_grad():
            model.tokens.weight[model.tokens.padding_idx] = 0.0
    return model


def _normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _classes(seed: int, top: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, top, shape, generator=torch.Generator().manual_seed(seed))


def mlp() -> Case:
    return Case(
        "mlp",
        settle(Mlp(), 1),
        nn.CrossEntropyLoss(),
        _normal(2, TRAIN, 3),
        _classes(3, 3, TRAIN),
        _normal(4, QUERIES, 3),
        _classes(5, 3, QUERIES),
        own_blocks={"late": ["second"], "early": ["first.bias", "first.weight"]},
    )


def images() -> Case:
    return Case(
        "images",
        settle(Images(), 6),
        nn.CrossEntropyLoss(),
        _normal(7, TRAIN, 2, 5, 5),
        _classes(8, 3, TRAIN),
        _normal(9, QUERIES, 2, 5, 5),
        _classes(10, 3, QUERIES),
        own_blocks={"end": ["head", "batch.bias"], "start": ["split", "wide.weight"], "scales": ["groups.weight"]},
    )


def signals() -> Case:
    return Case(
        "signals",
        settle(Signals(), 11),
        nn.MSELoss(),
        _normal(12, TRAIN, 2, 7),
        _normal(13, TRAIN, 2),
        _normal(14, QUERIES, 2, 7),
        _normal(15, QUERIES, 2),
        own_blocks={"all but one": ["head", "scale", "coarse", "fine.weight"]},
    )


def language() -> Case:
    return Case(
        "language",
        settle(Language(), 16),
        token_loss,
        _classes(17, 5, TRAIN, 3),
        _classes(18, 5, TRAIN, 3),
        _classes(19, 5, QUERIES, 3),
        _classes(20, 5, QUERIES, 3),
        likelihood="cross_entropy",
        own_blocks={
            "deep": ["hidden", "attention.out", "attention.qkv"],
            "edges": ["after", "position", "back.weight"],
        },
    )


def sentences() -> Case:
    def inputs(seed: int, rows: int) -> dict[str, torch.Tensor]:
        lengths = 2 + _classes(seed, 3, rows)
        mask = torch.arange(4) < lengths[:, None]
        return {"ids": (1 + _classes(seed + 1, 5, rows, 4)) * mask, "mask": mask}

    return Case(
        "sentences",
        settle(Sentences(), 21),
        nn.CrossEntropyLoss(),
        inputs(22, TRAIN),
        _classes(24, 3, TRAIN),
        inputs(25, QUERIES),
        _classes(27, 3, QUERIES),
        own_blocks={"table": ["tokens"], "rest": ["head.bias", "norm", "attention", "head.weight"]},
    )


CASES: dict[str, Callable[[], Case]] = {
    "mlp": mlp,
    "images": images,
    "signals": signals,
    "language": language,
    "sentences": sentences,
}
