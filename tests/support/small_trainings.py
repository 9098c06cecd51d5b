"""Small trainings in float64 for tests of `headwater.trajectory`, by torch's own optimizers and loops alone.

`retrained` shares no code with what it verifies: rows weigh what they are told, and the rest stays as it was.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812


@dataclass(frozen=True)
class Training:
    """A model, rows, and a loop over them."""

    make: Callable[[], nn.Module]
    optimizer: Callable[[Any], torch.optim.Optimizer]
    x: torch.Tensor
    y: torch.Tensor
    loss: Callable[..., torch.Tensor] = F.cross_entropy
    steps: int = 14
    rows: int = 7
    batches: int = 1
    """Whose gradients are averaged to a step."""
    clip: float | None = None
    falling: bool = True
    weights: torch.Tensor | None = None
    """Of the rows, for all steps."""
    order: int = 3
    stop: int | None = None
    """A step before which it is killed."""
    options: dict = field(default_factory=dict)

    def ids(self) -> list[list[torch.Tensor]]:
        generator = torch.Generator().manual_seed(self.order)
        n = len(self.x)
        return [
            [torch.randint(0, n, (self.rows,), generator=generator) for _ in range(self.batches)]
            for _ in range(self.steps)
        ]

    def run(self, times: torch.Tensor | None = None, recorder: Any = None) -> nn.Module:
        """times: of each row's loss, beside its weight. recorder: (model, optimizer) -> a context with `step`."""
        model = self.make()
        optimizer = self.optimizer(model.parameters())
        base = optimizer.param_groups[0]["lr"]
        own = torch.ones(len(self.x), dtype=torch.float64) if self.weights is None else self.weights
        scale = own if times is None else own * times
        with nullcontext() if recorder is None else recorder(model, optimizer) as record:
            for number, batches in enumerate(self.ids()):
                if number == self.stop:
                    raise KeyboardInterrupt
                if record is None or number >= record.start:
                    if self.falling:
                        optimizer.param_groups[0]["lr"] = base * (1 + math.cos(math.pi * number / 2 / self.steps)) / 2
                    optimizer.zero_grad()
                    for rows in batches:
                        each = self.loss(model(self.x[rows]), self.y[rows], reduction="none")
                        ((each * scale[rows].to(each)).mean() / len(batches)).backward()
                    if self.clip is not None:
                        torch.nn.utils.clip_grad_norm_(model.parameters(), self.clip)
                    optimizer.step()
                    if record is not None:
                        said = batches if self.batches > 1 else batches[0]
                        weights = [own[b] for b in batches] if self.batches > 1 else own[batches[0]]
                        record.step(said, weights)
        return model

    def changed(self, **fields: Any) -> "Training":
        return replace(self, **fields)


def retrained(training: Training, x: torch.Tensor, y: torch.Tensor, times: torch.Tensor) -> np.ndarray:
    """Each query's loss of the model that rows of these weights train: [q]."""
    model = training.run(times)
    with torch.no_grad():
        return training.loss(model(x), y, reduction="none").numpy()


def central_differences(
    training: Training, x: torch.Tensor, y: torch.Tensor, rows: list[int], h: float = 1e-5
) -> np.ndarray:
    """d loss / d weight of these rows, by training twice for each: [q, rows]."""
    columns = []
    for row in rows:
        up, down = (torch.ones(len(training.x), dtype=torch.float64) for _ in "+-")
        up[row] += h
        down[row] -= h
        columns.append((retrained(training, x, y, up) - retrained(training, x, y, down)) / (2 * h))
    return np.stack(columns, axis=1)


# Models ---------------------------------------------------------------------------------------------------------------


class ByteGpt(nn.Module):
    """Two layers of causal attention over bytes; the table of bytes is tied to the output."""

    def __init__(self, width: int = 8, length: int = 6, vocabulary: int = 11) -> None:
        super().__init__()
        self.table = nn.Embedding(vocabulary, width)
        self.places = nn.Embedding(length, width)
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(3)])
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids) + self.places(torch.arange(ids.shape[1]))
        q, k, v = self.qkv(self.norms[0](x)).chunk(3, dim=-1)
        x = x + self.out(F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], is_causal=True)[:, 0])
        x = x + self.down(F.gelu(self.up(self.norms[1](x))))
        return self.norms[2](x) @ self.table.weight.T


def next_byte(logits: torch.Tensor, ids: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    """The mean over a row's bytes of what the model expects next."""
    each = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    rows = each.view(len(ids), -1).mean(1)
    return rows if reduction == "none" else rows.mean()


def seeded(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def made() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            return make().double()

    return made


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3))


def cnn() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.GELU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(27, 3))


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.2, momentum=0.9, weight_decay=0.01)


def nesterov(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.2, momentum=0.9, weight_decay=0.01, nesterov=True)


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1)


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.01, weight_decay=0.1)


def draw(kind: str, n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    if kind == "gpt":
        ids = torch.randint(0, 11, (n, 6), generator=generator)
        return ids, ids
    shape = (n, 6) if kind == "mlp" else (n, 1, 6, 6)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 3, (n,), generator=generator)


MAKE = {"mlp": mlp, "cnn": cnn, "gpt": ByteGpt}


def training(kind: str = "mlp", optimizer: Callable[..., Any] = sgd, n: int = 20, **fields: Any) -> Training:
    x, y = draw(kind, n, 0)
    loss = next_byte if kind == "gpt" else F.cross_entropy
    return Training(seeded(MAKE[kind]), optimizer, x, y, loss, **fields)
