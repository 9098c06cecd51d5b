"""Many small classifiers, trained side by side: the retraining bank's engine.

Models of one architecture differ in their seed and in the rows they see. Their parameters are stacked along a leading
axis, so that a step of all of them is one batched matmul per layer:

    weights[l]  [m, o, i]      biases[l]  [m, o]      m models; layer l maps i inputs to o outputs

A model depends on its own seed and rows only: its draws come from one CPU generator per seed, never from a shared
stream. The starting weights are drawn first, so equal seeds start equal whatever rows are kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from headwater.errors import BatchMismatch, InvalidInput, NonFiniteValue, ShapeMismatch

training_loss = cross_entropy
"""The loss that `train_mlps` minimises, averaged over a batch; its `reduction="none"` is the per-row loss."""


@dataclass(frozen=True)
class StackedMlps:
    """Trained multi-layer perceptrons (ReLU between the layers) of one shape, as stacked parameters."""

    weights: tuple[Tensor, ...]
    """One [m, o, i] per layer."""
    biases: tuple[Tensor, ...]
    """One [m, o] per layer."""

    def __len__(self) -> int:
        return len(self.weights[0])

    def features(self, x: Any) -> Tensor:
        """The last hidden layer, [m, n, width]: what the final linear layer sees. x: [n, i], tensor or NumPy."""
        rows = torch.as_tensor(x).to(self.weights[0])
        return _hidden(self.weights, self.biases, rows.expand(len(self), *rows.shape))

    def logits(self, x: Any) -> Tensor:
        """What every model says of every row, [m, n, classes]. x: [n, i], tensor or NumPy."""
        return _linear(self.features(x), self.weights[-1], self.biases[-1])

    def losses(self, x: Any, y: Any) -> Tensor:
        """The cross-entropy of every model at every row, [m, n], in nats. x: [n, i]; y: [n] class indices."""
        logits = self.logits(x)
        labels = torch.as_tensor(y, device=logits.device).long().expand(logits.shape[:2])
        return cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)

    def model(self, index: int) -> torch.nn.Sequential:
        """Model `index` as an ordinary module in eval mode, with parameters of its own."""
        layers: list[torch.nn.Module] = []
        for weight, bias in zip(self.weights, self.biases, strict=True):
            linear = torch.nn.Linear(weight.shape[2], weight.shape[1], device=weight.device, dtype=weight.dtype)
            linear.load_state_dict({"weight": weight[index], "bias": bias[index]})
            layers += [linear, torch.nn.ReLU()]
        return torch.nn.Sequential(*layers[:-1]).eval()


def train_mlps(
    x: Any,
    y: Any,
    keep: Any,
    seeds: Sequence[int],
    *,
    widths: Sequence[int],
    steps: int,
    batch_size: int = 64,
    lr: float = 0.1,
    momentum: float = 0.9,
    l2: float = 1e-4,
    side_by_side: int = 32,
    progress: Callable[[int], object] | None = None,
) -> StackedMlps:
    """Train one classifier per seed, each on the rows it keeps: SGD with momentum and a cosine learning rate.

    Every model takes the same number of steps, through seeded shuffles of its own rows. A batch may span two shuffles.
    The result does not depend on `side_by_side` beyond the rounding of a batched matmul.

    Shapes: x [n, i]; y [n] class indices; keep [m, n] bool; seeds [m]; widths (i, ..., classes). Tensors or NumPy
        arrays; the dtype and device of x are those of the models.
    Units: the objective is mean cross-entropy in nats plus l2 / 2 times the squared norm of all parameters.
    Progress: called with the number of models that took one more step; m * steps in all (`tqdm(...).update` fits).
    Errors: BatchMismatch if lengths disagree or a model keeps no row; ShapeMismatch if x does not fit the first width;
        InvalidInput if a label has no output or x is not floating point; NonFiniteValue if training diverges.
    """
    x, y, keep = torch.as_tensor(x), torch.as_tensor(y).long(), torch.as_tensor(keep).bool().cpu()
    _check_shapes(x, y, keep, seeds, widths)
    y, groups = y.to(x.device), []
    for start in range(0, len(seeds), side_by_side):
        group = slice(start, start + side_by_side)
        draws = [
            _draws(rows, seed, widths, steps * batch_size) for rows, seed in zip(keep[group], seeds[group], strict=True)
        ]
        parameters = [torch.stack(p).to(x).requires_grad_() for p in zip(*(start for start, _ in draws), strict=True)]
        order = torch.stack([rows for _, rows in draws]).to(x.device).view(len(draws), steps, batch_size)
        _descend(parameters, x, y, order, lr=lr, momentum=momentum, l2=l2, progress=progress)
        groups.append([p.detach() for p in parameters])
    stacked = [torch.cat(p) for p in zip(*groups, strict=True)]
    return StackedMlps(weights=tuple(stacked[0::2]), biases=tuple(stacked[1::2]))


def batches(x: Any, y: Any, batch_size: int = 256) -> list[tuple[Tensor, Tensor]]:
    """Rows in order as (x, y) batches of tensors: a list, so it can be read again. x: [n, ...]; y: [n]."""
    x, y = torch.as_tensor(x), torch.as_tensor(y)
    return list(zip(x.split(batch_size), y.split(batch_size), strict=True))


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch on one thread meanwhile: sums keep one order whatever the machine, and tiny matmuls need no more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _hidden(weights: Sequence[Tensor], biases: Sequence[Tensor], x: Tensor) -> Tensor:
    """x [m, n, i] through every layer but the last -> [m, n, width]."""
    for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
        x = _linear(x, weight, bias).relu()
    return x


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x [m, n, i], weight [m, o, i], bias [m, o] -> [m, n, o]."""
    return torch.baddbmm(bias.unsqueeze(1), x, weight.mT)


def _draws(keep: Tensor, seed: int, widths: Sequence[int], count: int) -> tuple[list[Tensor], Tensor]:
    """All that is random about one model: its starting parameters (weight, bias, ...) and the rows it visits, [count].

    Drawn in float64 on the CPU, so that devices and dtypes start from the same numbers. Uniform in +-1/sqrt(i), which
    is how torch.nn.Linear starts.
    """
    generator = torch.Generator().manual_seed(int(seed))
    parameters = []
    for i, o in pairwise(widths):
        for shape in ((o, i), (o,)):
            uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
            parameters.append((2 * uniform - 1) / math.sqrt(i))
    shuffles = (torch.randperm(len(keep), generator=generator) for _ in range(-(-count // int(keep.sum()))))
    return parameters, torch.cat([shuffle[keep[shuffle]] for shuffle in shuffles])[:count]


def _descend(
    parameters: list[Tensor],
    x: Tensor,
    y: Tensor,
    order: Tensor,
    *,
    lr: float,
    momentum: float,
    l2: float,
    progress: Callable[[int], object] | None,
) -> None:
    """SGD in place on stacked parameters (weight, bias, weight, ...). order [m, steps, batch]: the rows of each step.

    The sum over models of their batch means is differentiated: each model's gradient is that of its own mean.
    """
    weights, biases = parameters[0::2], parameters[1::2]
    velocities = [torch.zeros_like(p) for p in parameters]
    steps, batch_size = order.shape[1:]
    for step in range(steps):
        rows = order[:, step]
        logits = _linear(_hidden(weights, biases, x[rows]), weights[-1], biases[-1])
        loss = cross_entropy(logits.flatten(0, 1), y[rows].flatten(), reduction="sum") / batch_size
        rate = lr * (1 + math.cos(math.pi * step / steps)) / 2
        with torch.no_grad():
            for p, v, gradient in zip(parameters, velocities, torch.autograd.grad(loss, parameters), strict=True):
                v.mul_(momentum).add_(gradient).add_(p, alpha=l2)
                p.sub_(v, alpha=rate)
        if progress is not None:
            progress(len(rows))
    if not math.isfinite(loss.item()):
        raise NonFiniteValue(f"Training diverged: the last batch's loss is {loss.item()}. Lower lr (it was {lr}).")


def _check_shapes(x: Tensor, y: Tensor, keep: Tensor, seeds: Sequence[int], widths: Sequence[int]) -> None:
    """Refuse what cannot be trained, before any work."""
    if keep.shape != (len(seeds), len(x)) or y.shape != (len(x),):
        raise BatchMismatch(
            f"Expected x [n, i], y [n], keep [m, n] and m seeds; got x {list(x.shape)}, y {list(y.shape)}, "
            f"keep {list(keep.shape)} and {len(seeds)} seeds."
        )
    if x.ndim != 2 or x.shape[1] != widths[0]:
        raise ShapeMismatch(f"The first width is {widths[0]}: expected x [n, {widths[0]}], got {list(x.shape)}.")
    if not x.is_floating_point():
        raise InvalidInput(f"x must be floating point: its dtype is that of the models; got {x.dtype}.")
    if not keep.any(1).all():
        raise BatchMismatch(f"Every model needs a row; model {int(keep.any(1).int().argmin())} keeps none.")
    if not 0 <= int(y.min()) <= int(y.max()) < widths[-1]:
        raise InvalidInput(f"Labels run from {int(y.min())} to {int(y.max())}, but there are {widths[-1]} classes.")
