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
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Unpack

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from headwater.errors import BatchMismatch, InvalidInput, InvalidSetting, NonFiniteValue, ShapeMismatch
from headwater.retraining.settings import settings_of
from headwater.retraining.torch.sgd import Sgd, SgdFields, check_models

training_loss = cross_entropy
"""The loss that `train_mlps` minimises, averaged over a batch; its `reduction="none"` is the per-row loss."""


@dataclass(frozen=True)
class StackedMlps:
    """Trained multi-layer perceptrons (ReLU between the layers) of one shape, as stacked parameters."""

    weights: tuple[Tensor, ...]
    """One [m, o, i] per layer."""
    biases: tuple[Tensor, ...]
    """One [m, o] per layer."""
    checkpoints: tuple[TrainingCheckpoint, ...] = ()
    """What the training passed through, where it was asked to keep that."""

    def __len__(self) -> int:
        return len(self.weights[0])

    def features(self, x: object) -> Tensor:
        """The last hidden layer, [m, n, width]: what the final linear layer sees. x: [n, i], tensor or NumPy."""
        rows = torch.as_tensor(x).to(self.weights[0])
        return _hidden(self.weights, self.biases, rows.expand(len(self), *rows.shape))

    def logits(self, x: object) -> Tensor:
        """What every model says of every row, [m, n, classes]. x: [n, i], tensor or NumPy."""
        return _linear(self.features(x), self.weights[-1], self.biases[-1])

    def losses(self, x: object, y: object) -> Tensor:
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


@dataclass(frozen=True)
class TrainingCheckpoint:
    """The models as they were before a step, and the learning rate of that step."""

    step: int
    rate: float
    models: StackedMlps


def train_mlps(
    x: object,
    y: object,
    keep: object,
    seeds: Sequence[int],
    *,
    widths: Sequence[int],
    settings: Sgd | None = None,
    side_by_side: int = 32,
    progress: Callable[[int], object] | None = None,
    **fields: Unpack[SgdFields],
) -> StackedMlps:
    """Train one classifier per seed, each on the rows it keeps: SGD with momentum and a cosine learning rate.

    settings: of `Sgd`, or its fields by name (steps=400, lr=0.1); by name, l2 is 1e-4 where it is not given.
    Every model takes the same number of steps, through seeded shuffles of its own rows. A batch may span two shuffles.
    The result does not depend on `side_by_side` beyond the rounding of a batched matmul.

    Shapes: x [n, i]; y [n] class indices; keep [m, n] bool; seeds [m]; widths (i, ..., classes). Tensors or NumPy
        arrays; the dtype and device of x are those of the models.
    Units: the objective is mean cross-entropy in nats plus l2 / 2 times the squared norm of all parameters.
    Checkpoints: the models before each of these steps (0 to steps - 1) are kept, in the order of the steps.
    Progress: called with the number of models that took one more step; m * steps in all (`tqdm(...).update` fits).
    Errors: BatchMismatch if lengths disagree or a model keeps no row; ShapeMismatch if x does not fit the first width;
        InvalidInput if a label has no output or x is not floating point; InvalidSetting for a checkpoint that is no
        step, and for no steps or seeds; NonFiniteValue if training diverges.
    """
    sgd = settings_of(Sgd, settings, {"l2": 1e-4, **fields} if settings is None else fields)
    check_models(seeds, side_by_side)
    x, y, keep = torch.as_tensor(x), torch.as_tensor(y).long(), torch.as_tensor(keep).bool().cpu()
    _check_shapes(x, y, keep, seeds, widths)
    y = y.to(x.device)
    groups: list[list[list[Tensor]]] = []  # of each: the parameters at every checkpoint, and in the end
    for start in range(0, len(seeds), side_by_side):
        group = slice(start, start + side_by_side)
        # Model by model, each from its own seed: the group that it is trained in changes nothing.
        draws = [_draws(rows, seed, widths, sgd) for rows, seed in zip(keep[group], seeds[group], strict=True)]
        parameters = [torch.stack(p).to(x).requires_grad_() for p in zip(*(start for start, _ in draws), strict=True)]
        order = torch.stack([rows for _, rows in draws]).to(x.device)
        passed = _descend(parameters, x, y, order, sgd, progress)
        groups.append([*passed, [p.detach() for p in parameters]])
    *kept, final = (_stacked(group) for group in zip(*groups, strict=True))
    return replace(final, checkpoints=tuple(map(TrainingCheckpoint, sgd.wanted, map(sgd.rate, sgd.wanted), kept)))


def _stacked(groups: Sequence[Sequence[Tensor]]) -> StackedMlps:
    """Models of several groups (weight, bias, weight, ...), under one another."""
    parameters = [torch.cat(p) for p in zip(*groups, strict=True)]
    return StackedMlps(weights=tuple(parameters[0::2]), biases=tuple(parameters[1::2]))


def refit_heads(models: StackedMlps, x: object, y: object, *, l2: float) -> StackedMlps:
    """The same models, with last layers at the minimum of their regularised loss on these rows; features stay.

    Each minimises mean cross-entropy plus l2 / 2 times the squared norm of its last weight and bias: convex, solved in
    float64 by L-BFGS. Shapes: x [n, i]; y [n] class indices. Errors: InvalidSetting unless l2 > 0.
    """
    if not l2 > 0:
        raise InvalidSetting(f"l2 is {l2}; without regularisation the minimum may lie at infinity.")
    features = models.features(x).double()
    labels = torch.as_tensor(y, device=features.device).long().expand(features.shape[:2]).flatten()
    head = [part[-1].double().clone().requires_grad_() for part in (models.weights, models.biases)]
    # One problem for all heads: it is a sum over models, and convex in each.
    solver = torch.optim.LBFGS(
        head, max_iter=500, history_size=50, tolerance_grad=1e-8, tolerance_change=0.0, line_search_fn="strong_wolfe"
    )

    def objective() -> float:
        logits = _linear(features, *head)
        loss = cross_entropy(logits.flatten(0, 1), labels, reduction="sum") / features.shape[1]
        loss = loss + l2 / 2 * sum(p.square().sum() for p in head)
        for p, slope in zip(head, torch.autograd.grad(loss, head), strict=True):
            p.grad = slope
        return float(loss.detach())

    solver.step(objective)
    weight, bias = (p.detach().to(models.weights[-1]) for p in head)
    return StackedMlps((*models.weights[:-1], weight), (*models.biases[:-1], bias))


def batches(x: object, y: object, batch_size: int = 256) -> list[tuple[Tensor, Tensor]]:
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
    # All models in one batched product.
    return torch.baddbmm(bias.unsqueeze(1), x, weight.mT)


def _draws(keep: Tensor, seed: int, widths: Sequence[int], sgd: Sgd) -> tuple[list[Tensor], Tensor]:
    """All that is random about one model: its starting parameters (weight, bias, ...), and its rows [steps, batch].

    Drawn in float64 on the CPU, so that devices and dtypes start from the same numbers. Uniform in +-1/sqrt(i), which
    is how torch.nn.Linear starts.
    """
    generator = torch.Generator().manual_seed(int(seed))
    parameters = []
    for i, o in pairwise(widths):
        for shape in ((o, i), (o,)):
            uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
            # In float64 and then rounded: float32 and float64 models start from the same numbers.
            parameters.append((2 * uniform - 1) / math.sqrt(i))
    return parameters, sgd.visited_rows(keep, generator)


def _descend(
    parameters: list[Tensor],
    x: Tensor,
    y: Tensor,
    order: Tensor,
    sgd: Sgd,
    progress: Callable[[int], object] | None,
) -> list[list[Tensor]]:
    """SGD in place on stacked parameters (weight, bias, weight, ...). order [m, steps, batch]: the rows of each step.

    Returned: copies of the parameters before each of the wanted steps.
    The sum over models of their batch means is differentiated: each model's gradient is that of its own mean.
    """
    weights, biases = parameters[0::2], parameters[1::2]
    velocities = [torch.zeros_like(p) for p in parameters]
    passed: list[list[Tensor]] = []
    wanted = sgd.wanted
    for step in range(sgd.steps):
        if step in wanted:
            passed.append([p.detach().clone() for p in parameters])
        rows = order[:, step]
        logits = _linear(_hidden(weights, biases, x[rows]), weights[-1], biases[-1])
        loss = cross_entropy(logits.flatten(0, 1), y[rows].flatten(), reduction="sum") / sgd.batch_size
        slopes = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            sgd.move(step, zip(parameters, velocities, slopes, strict=True))
        if progress is not None:
            progress(len(rows))
    # Once at the end: NaN stays NaN, and a check in each step would wait for the device.
    if not math.isfinite(loss.item()):
        raise NonFiniteValue(f"Training diverged: the last batch's loss is {loss.item()}. Lower lr (it was {sgd.lr}).")
    return passed


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
