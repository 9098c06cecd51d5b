"""Many copies of any small model, trained side by side with `torch.func`: the retraining bank's engine.

Models of one architecture differ in their seed and in the rows they see. Their parameters are stacked along a leading
axis [m, ...], and `vmap` turns a step of one into a step of all. A model depends on its own seed and rows only: its
starting weights and the order of its rows come from generators of its own, never from a shared stream. Buffers stay as
they were, and nothing may be random inside the model or be shared between the rows of a batch: a model that says
something else in train mode than in eval mode (dropout, batch normalisation) is refused.

For plain ReLU classifiers `train_mlps` does the same without `vmap`, and faster.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.utils._pytree import tree_leaves

from headwater.errors import BatchMismatch, NonFiniteValue, ShapeMismatch, UnsupportedModel
from headwater.retraining.settings import settings_of
from headwater.retraining.torch.sgd import Sgd, SgdFields, check_models
from headwater.torch.check import close
from headwater.torch.plan import differs_in_training
from headwater.torch.surroundings import quiet

RowLosses = Callable[[Any, Tensor], Tensor]
"""(outputs, y) -> the loss of each row [n]."""


@dataclass(frozen=True, eq=False)
class StackedModels:
    """Trained models of one architecture, as stacked parameters."""

    template: nn.Module
    """The architecture, in eval mode; its own weights mean nothing."""
    parameters: dict[str, Tensor]
    """By name: [m, *shape]. Those that are not trained are in the template."""
    checkpoints: tuple[tuple[int, dict[str, Tensor]], ...] = ()
    """(step, the parameters before that step), where the training was asked to keep them."""

    def __len__(self) -> int:
        return len(next(iter(self.parameters.values())))

    def losses(self, x: Tensor, y: Tensor, loss: RowLosses, *, batch_size: int = 256) -> Tensor:
        """Of every model at every row: [m, n]. x [n, ...], y [n, ...]."""

        def of_one(parameters: dict[str, Tensor], rows: Tensor, labels: Tensor) -> Tensor:
            return loss(functional_call(self.template, parameters, (rows,)), labels)

        with torch.no_grad():
            x, y = torch.as_tensor(x), torch.as_tensor(y)
            pieces = zip(x.split(batch_size), y.split(batch_size), strict=True)
            return torch.cat([self._of_all(of_one, *piece) for piece in pieces], dim=1)

    def _of_all(self, of_one: Callable[..., Tensor], rows: Tensor, labels: Tensor) -> Tensor:
        """Side by side; one by one where a layer knows that in training only (recurrent ones)."""
        try:
            with quiet():
                return vmap(of_one, in_dims=(0, None, None))(self.parameters, rows, labels)
        except RuntimeError:
            states = ({name: value[k] for name, value in self.parameters.items()} for k in range(len(self)))
            return torch.stack([of_one(state, rows, labels) for state in states])

    def model(self, index: int, checkpoint: int | None = None) -> nn.Module:
        """Model `index` as a module of its own in eval mode, as it ended or as it was at a kept step."""
        parameters = self.parameters if checkpoint is None else dict(self.checkpoints)[checkpoint]
        model = copy.deepcopy(self.template)
        model.load_state_dict({name: value[index] for name, value in parameters.items()}, strict=False)
        return model


def train_many(
    make: Callable[[], nn.Module] | nn.Module,
    x: Tensor,
    y: Tensor,
    keep: object,
    seeds: Sequence[int],
    *,
    loss: RowLosses,
    settings: Sgd | None = None,
    side_by_side: int = 16,
    progress: Callable[[int], object] | None = None,
    **fields: Unpack[SgdFields],
) -> StackedModels:
    """Train one model per seed, each on the rows it keeps: SGD with momentum, the learning rate falling to zero.

    make: makes a model with fresh weights, for which torch is seeded; or a model whose weights all of them start from
    (fine-tuning, a warm start). Parameters with requires_grad=False are left alone.
    settings: of `Sgd`, or its fields by name (steps=400, lr=0.1).

    Shapes: x [n, ...], y [n, ...] tensors; keep [m, n] bool; seeds [m].
    Units: the objective is the mean of the row losses plus l2 / 2 times the squared norm of the trained parameters.
    lr falls along a cosine; decay=False keeps it. Every model takes `steps` steps through seeded shuffles of its own
    rows; a batch may span two shuffles. The result does not depend on side_by_side beyond rounding.
    Progress: called with the number of models that took one more step.
    Errors: BatchMismatch if lengths disagree or a model keeps no row; UnsupportedModel for dropout, batch
        normalisation, and other models whose train mode differs; ShapeMismatch for a loss that is not one number a row;
        InvalidSetting for a checkpoint that is no step, and for no steps or seeds; NonFiniteValue, naming the model, if
        training diverges.
    """
    sgd = settings_of(Sgd, settings, fields)
    check_models(seeds, side_by_side)
    x, y = torch.as_tensor(x), torch.as_tensor(y)
    kept = torch.as_tensor(keep).bool().cpu()
    if kept.shape != (len(seeds), len(x)) or len(y) != len(x):
        raise BatchMismatch(f"There are {len(x)} rows x, {len(y)} rows y, {len(seeds)} seeds; keep is {kept.shape}.")
    if not kept.any(1).all():
        raise BatchMismatch(f"Every model needs a row; model {int(kept.any(1).int().argmin())} keeps none.")
    groups, first = [], _fresh(make, int(seeds[0]))
    _check_rows_apart(first, x)
    for start in range(0, len(seeds), side_by_side):
        group = slice(start, start + side_by_side)
        models = [_fresh(make, int(seed)) for seed in seeds[group]]
        _check_same_rest(first, models)
        parameters = {name: value.detach() for name, value in stack_module_state(models)[0].items()}
        trained = {name for name, value in models[0].named_parameters() if value.requires_grad}
        order = torch.stack(
            [
                sgd.visited_rows(row, torch.Generator().manual_seed(int(seed)))
                for row, seed in zip(kept[group], seeds[group], strict=True)
            ]
        )
        course = _Course(models[0], loss, sgd, progress)
        groups.append(course.run({n: parameters[n] for n in sorted(trained)}, x, y, order))
    joined = {name: torch.cat([final[name] for final, _ in groups]) for name in groups[0][0]}
    _check_finite(joined, seeds, sgd.lr)
    passed = tuple(
        (step, {name: torch.cat([states[step][name] for _, states in groups]) for name in joined})
        for step in sgd.wanted
    )
    return StackedModels(first, joined, passed)


@dataclass(frozen=True)
class _Course:
    """A training, but for what it starts from and the rows."""

    template: nn.Module
    loss: RowLosses
    sgd: Sgd
    progress: Callable[[int], object] | None

    def run(
        self, parameters: dict[str, Tensor], x: Tensor, y: Tensor, order: Tensor
    ) -> tuple[dict[str, Tensor], dict[int, dict[str, Tensor]]]:
        """order [m, steps, batch]: the rows of each step. The parameters in the end, and at the kept steps."""

        def objective(parameters: dict[str, Tensor], rows: Tensor, labels: Tensor) -> Tensor:
            losses = self.loss(functional_call(self.template, parameters, (rows,)), labels)
            if losses.shape != labels.shape[:1]:
                raise ShapeMismatch(
                    f"The loss of {len(labels)} rows has the shape {tuple(losses.shape)}; expected one number for each "
                    "row, (n,): reduction='none', and sequences summed or averaged over their positions."
                )
            return losses.mean()

        slopes = vmap(grad(objective))
        velocities = {name: torch.zeros_like(value) for name, value in parameters.items()}
        parameters = {name: value.clone() for name, value in parameters.items()}
        passed, wanted = {}, self.sgd.wanted
        for step in range(self.sgd.steps):
            if step in wanted:
                passed[step] = {name: value.clone() for name, value in parameters.items()}
            rows = order[:, step].to(x.device)
            with quiet():
                found = slopes(parameters, x[rows], y[rows])
            self.sgd.move(step, ((parameters[name], velocities[name], slope) for name, slope in found.items()))
            if self.progress is not None:
                self.progress(len(rows))
        return parameters, passed


def _fresh(make: Callable[[], nn.Module] | nn.Module, seed: int) -> nn.Module:
    """A model of its own in eval mode, its weights drawn with this seed where they are drawn at all."""
    if isinstance(make, nn.Module):
        return copy.deepcopy(make).eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make().eval()


def _check_same_rest(first: nn.Module, models: Sequence[nn.Module]) -> None:
    """Errors: UnsupportedModel where what is not trained differs from model to model: they share the first one's."""
    for model in models:
        for (name, mine), theirs in zip(_rest(first).items(), _rest(model).values(), strict=True):
            if not torch.equal(mine, theirs):
                raise UnsupportedModel(
                    f"{name} is not trained, and differs from model to model. Draw it once, outside of make()."
                )


def _rest(model: nn.Module) -> dict[str, Tensor]:
    """Frozen parameters and buffers."""
    frozen = {name: value.detach() for name, value in model.named_parameters() if not value.requires_grad}
    return {**frozen, **dict(model.named_buffers())}


def _check_finite(parameters: dict[str, Tensor], seeds: Sequence[int], lr: float) -> None:
    """Errors: NonFiniteValue, naming the first model that diverged."""
    for name, value in parameters.items():
        bad = ~torch.isfinite(value).reshape(len(value), -1).all(1)
        if bool(bad.any()):
            k = int(bad.int().argmax())
            raise NonFiniteValue(
                f"Training diverged: {name} of model {k}, seed {int(seeds[k])}, is not finite, as of {int(bad.sum())} "
                f"in all. Lower lr (it was {lr})."
            )


def _check_rows_apart(model: nn.Module, x: Tensor) -> None:
    """Errors: UnsupportedModel where train mode is random or mixes the rows of a batch; the module, if it is known."""
    for name, module in model.named_modules():
        if differs_in_training(module):
            raise UnsupportedModel(
                f"{name or 'The model'} is {type(module).__name__}: models trained side by side take no dropout and no "
                "batch normalisation. Train them one after another, with Bank.fill."
            )
    rows = x[:4]
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        outputs = tree_leaves(copy.deepcopy(model).train()(rows)), tree_leaves(model(rows))
    if not all(close(*pair) for pair in zip(*outputs, strict=True) if isinstance(pair[0], Tensor)):
        raise UnsupportedModel(
            f"{type(model).__name__} says something else in train mode than in eval mode, in which models are trained "
            "side by side. Train them one after another, with Bank.fill."
        )
