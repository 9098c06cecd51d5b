"""Records a torch training while it goes on: a context around a loop of one's own.

    with hw.record(model, optimizer, "folder") as r:
        for x, y, ids in loader:
            optimizer.zero_grad()
            loss(model(x), y).backward()
            optimizer.step()
            r.step(ids)

The rates are those that `optimizer.step` saw, so that a scheduler may come before or after `r.step`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch import nn

from headwater.arrays import to_numpy
from headwater.errors import BlockMismatch, InvalidInput, InvalidSetting, StaleFit, UnsupportedModel
from headwater.torch.wrapped import unwrapped
from headwater.trajectory.record import Header, Writer, expected_bytes, kept_states, step_of
from headwater.trajectory.rules import AdamRule, Rates, Rule, SgdRule
from headwater.trajectory.torch.steps import (
    MIXES,
    check_repeatable,
    draws_in_training,
    generator_state,
    norms_of,
    statistics_of,
)
from headwater.trajectory.trajectory import Trajectory

REDUCTIONS = ("mean", "sum")
MEMORY = {
    SgdRule: {"momentum": "momentum_buffer"},
    AdamRule: {"mean": "exp_avg", "square": "exp_avg_sq"},
}
"""What torch calls what an optimizer remembers."""


class TorchRecorder:
    """See `headwater.trajectory.record`; what `hw.record` returns for a torch model.

    start: the step that the loop begins with: 0, or with resume=True that of the last kept state, which model,
    optimizer and torch's random state are put back to.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        folder: str | os.PathLike[str],
        *,
        keep: str = "sqrt",
        clip: float | None = None,
        reduction: str = "mean",
        random: bool | None = None,
        resume: bool = False,
    ):
        if reduction not in REDUCTIONS:
            raise InvalidSetting(f"reduction is {reduction!r}; expected one of {', '.join(map(repr, REDUCTIONS))}.")
        self.model, self.optimizer, self.folder, self._mean = unwrapped(model), optimizer, folder, reduction == "mean"
        drawn = any(draws_in_training(module) for module in self.model.modules()) if random is None else random
        if drawn and self.model is not model:
            raise UnsupportedModel(
                f"{type(model).__name__} draws the masks of dropout in another way than the model inside it: train and "
                "record that by itself, or train with p=0."
            )
        self._norms = {name: norm for name, norm in norms_of(self.model).items() if not norm.training}
        check_repeatable(self.model, drawn, self._norms)  # now, and not when the training is over and asked about
        self._statistics = statistics_of(self.model, self._norms)
        self._named = trained(self.model, optimizer)
        self._names = {id(p): name for name, p in self._named.items()}
        self._resume = resume and _is_begun(folder)
        rule, groups = rule_for(optimizer), _groups(optimizer, self._names)
        self.header = Header(
            rule,
            groups,
            {name: tuple(p.shape) for name, p in self._named.items()},
            {name: str(p.dtype).removeprefix("torch.") for name, p in self._named.items()},
            keep,
            clip,
            _count(optimizer, self._named),
            "torch",
            len(self._generator()) if drawn else 0,
            frozen=tuple(self._norms),
        )
        self.start = 0
        self._writer: Writer | None = None
        self._seen: list[Rates] = []
        self._taken = 0
        self._hooks: list[Any] = []
        self._drawn: list[np.ndarray] = []
        """States of the generator before the model's calls since the last step."""
        self._modules = dict(self.model.named_modules())
        self._drawing = [module for module in self._modules.values() if draws_in_training(module)]
        self._still: tuple[str, ...] | None = None
        """Modules in eval mode at the first call that drew; None before it."""

    def bytes_for(self, steps: int, rows: int = 64) -> int:
        """Of the folder after so many steps of so many rows each."""
        return expected_bytes(self.header, steps, rows)

    def states_for(self, steps: int) -> int:
        """How many states are kept of so many steps."""
        return len(kept_states(steps, self.header.keep))

    def __enter__(self) -> Self:
        self._drawn, self._still = [], None  # whatever was in a context that was left before
        if self._resume:
            record = Trajectory(self.folder)
            _check_same(record.header, self.header)
            self._writer = record.resumed()
            self.start = record.steps
            self._still = record.header.still if self.start else None
            self._put_back(record)
        else:
            self._writer = Writer.new(self.folder, self.header)
            self._writer.keep(self._arrays())
        self._hooks = [self.optimizer.register_step_pre_hook(self._look)]
        if self.header.random:
            self._hooks.append(self.model.register_forward_pre_hook(self._before_call))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        writer = self._writing
        if kind is None:
            self._check_said()
            self._check_statistics()
            if writer.waiting:
                writer.keep(self._arrays())
            writer.end()

    def step(self, ids: Any, weights: Any = None, *, total: float | Sequence[float] | None = None) -> None:
        """Say which rows the step that `optimizer.step` just took was of.

        ids: of the batch's rows; where gradients of several batches were accumulated to their mean, a list of those.
        weights: what each row's loss was multiplied by. total: what the weighted sum of the rows' losses was divided
        by; None for the number of rows.
        Errors: InvalidInput where there was no step of the optimizer; those of `step_of`.
        """
        writer = self._writing
        if not self._taken:
            raise InvalidInput(
                "optimizer.step() was not called since the last r.step(ids); call r.step once after each of them."
            )
        self._check_norms()
        ids, weights = _on_host(ids), _on_host(weights)
        drawn = self._drawn if self.header.random else None
        writer.add(step_of(ids, weights, total, self._seen, self._mean, drawn))
        self._taken, self._drawn = 0, []
        if writer.wants():
            self._check_statistics()
            writer.keep(self._arrays())

    @property
    def _writing(self) -> Writer:
        if self._writer is None:
            raise InvalidInput("The recorder is not open: with hw.record(model, optimizer, folder) as r: ...")
        return self._writer

    def _look(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        """At the rates, when the optimizer begins a step. Errors: InvalidInput where the last one had no r.step."""
        self._check_said()
        missing = [name for name, p in self._named.items() if p.grad is None]
        if missing:
            raise InvalidInput(
                f"{missing[0]} has no gradient in this step ({len(missing)} of {len(self._named)} parameters have "
                "none), and would not be moved. A record is of trainings that move all parameters in every step; set "
                "requires_grad=False where one is not trained."
            )
        self._seen = [rates_of(group) for group in optimizer.param_groups]
        self._taken += 1

    def _before_call(self, model: nn.Module, *_: object) -> None:
        """At the generator that the model is about to draw from."""
        if model.training or any(module.training for module in self._drawing):
            self._look_at_modes()
            self._drawn.append(self._generator())

    def _look_at_modes(self) -> None:
        """Errors: InvalidInput, naming a module whose mode is another one than when training began."""
        still = tuple(name for name, module in self._modules.items() if not module.training)
        if self._still is None:
            if still:
                self._writing.tell(replace(self._writing.header, still=still))
            self._still = still
        elif still != self._still:
            name = min(set(still) ^ set(self._still))
            was, now = ("train", "eval") if name in still else ("eval", "train")
            raise InvalidInput(
                f"{name or 'The model'} is in {now} mode, and was in {was} mode when the recorded training began: a "
                "record has one mode of each module. Keep it as it was, or record what follows into another folder."
            )

    def _check_norms(self) -> None:
        """Errors: InvalidInput for a batch normalisation that is in train mode now."""
        for name, norm in self._norms.items():
            if norm.training:
                raise InvalidInput(
                    f"{name or 'The model'} ({type(norm).__name__}) is in train mode, and was in eval mode when the "
                    f"record began. It {MIXES}."
                )

    def _check_statistics(self) -> None:
        """Errors: InvalidInput for statistics of a frozen batch normalisation that are others than at the beginning."""
        now = statistics_of(self.model, self._norms)
        for name, was in self._statistics.items():
            if not np.array_equal(now[name], was, equal_nan=True):
                raise InvalidInput(
                    f"{name} changed during the training: a batch normalisation was in train mode in between, and "
                    f"{MIXES}."
                )

    def _generator(self) -> np.ndarray:
        return generator_state(next(iter(self._named.values())).device)

    def _check_said(self) -> None:
        if self._taken:
            raise InvalidInput(
                f"Of step {self._writing.step} of the optimizer r.step(ids) was not told which rows it was of; call it "
                "after each optimizer.step()."
            )

    def _arrays(self) -> dict[str, np.ndarray]:
        found = {f"w/{name}": to_numpy(p) for name, p in self._named.items()}
        for kind, values in memory_of(self.optimizer, self._named).items():
            found |= {f"{kind}/{name}": to_numpy(value) for name, value in values.items()}
        found |= {f"b/{name}": value for name, value in self._statistics.items()}
        return found | random_state()

    def _put_back(self, record: Trajectory) -> None:
        arrays = record.arrays(record.steps)
        with torch.no_grad():
            for name, p in self._named.items():
                p.copy_(torch.as_tensor(arrays[f"w/{name}"]))
            self._statistics = record.statistics
            buffers = dict(self.model.named_buffers())
            for name, value in self._statistics.items():
                buffers[name].copy_(torch.as_tensor(value))
        count = record.count(record.steps - 1)
        for name, p in self._named.items():
            state = self.optimizer.state[p]
            for kind, theirs in MEMORY[type(record.rule)].items():
                state[theirs] = torch.as_tensor(arrays[f"{kind}/{name}"]).to(p)
            if record.rule.is_adaptive:
                state["step"] = torch.tensor(float(count))
        set_random_state(arrays)


def _is_begun(folder: str | os.PathLike[str]) -> bool:
    return os.path.exists(os.path.join(folder, "trajectory.json"))


def _on_host(values: Any) -> Any:
    if isinstance(values, torch.Tensor):
        return values.detach().cpu().numpy()
    if isinstance(values, (list, tuple)):
        return [_on_host(value) for value in values]
    return values


# Optimizers -----------------------------------------------------------------------------------------------------------


def trained(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, nn.Parameter]:
    """The parameters that the optimizer moves, by name. Errors: BlockMismatch for one that is not the model's."""
    names = {id(p): name for name, p in model.named_parameters()}
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise UnsupportedModel(f"The optimizer is {optimizer!r}; expected torch's SGD, Adam or AdamW of this model.")
    moved = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    if not moved or not all(id(p) in names for p in moved):
        raise BlockMismatch("The optimizer has parameters that are not the model's; give the model that it trains.")
    wanted = {id(p) for p in moved}
    return {name: p for name, p in model.named_parameters() if id(p) in wanted}


def rule_for(optimizer: torch.optim.Optimizer) -> Rule:
    """Errors: UnsupportedModel for another optimizer than SGD, Adam and AdamW, and for options that have no rule."""
    known = {torch.optim.SGD: "SGD", torch.optim.Adam: "Adam", torch.optim.AdamW: "AdamW"}
    kind = next((said for cls, said in known.items() if type(optimizer) is cls), None)
    if kind is None:
        raise UnsupportedModel(
            f"The optimizer is {type(optimizer).__name__}; the steps of torch's SGD, Adam and AdamW are known."
        )
    rules: list[Rule] = []
    for group in optimizer.param_groups:
        for option, wanted in (("maximize", False), ("amsgrad", False), ("dampening", 0)):
            if group.get(option, wanted) != wanted:
                raise UnsupportedModel(f"The optimizer has {option}={group[option]!r}, which no step here has.")
        if kind == "SGD":
            rules.append(SgdRule(bool(group["nesterov"])))
        else:
            decoupled = kind == "AdamW" or bool(group.get("decoupled_weight_decay", False))
            rules.append(AdamRule(float(group["eps"]), decoupled))
    if len(set(rules)) > 1:
        raise UnsupportedModel(f"The optimizer's groups step in different ways: {', '.join(map(str, set(rules)))}.")
    return rules[0]


def _groups(optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(names[id(p)] for p in group["params"] if p.requires_grad) for group in optimizer.param_groups)


def rates_of(group: Mapping[str, Any]) -> Rates:
    """Of a group of an optimizer's parameters."""
    first, second = group.get("betas", (group.get("momentum", 0.0), 0.0))
    return Rates(*(float(value) for value in (group["lr"], group["weight_decay"], first, second)))


def memory_of(
    optimizer: torch.optim.Optimizer, named: Mapping[str, nn.Parameter]
) -> dict[str, dict[str, torch.Tensor]]:
    """What the optimizer remembers; zeros before its first step."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for kind, theirs in MEMORY[type(rule_for(optimizer))].items():
        found[kind] = {}
        for name, p in named.items():
            value = optimizer.state[p].get(theirs) if p in optimizer.state else None
            found[kind][name] = torch.zeros_like(p) if value is None else value
    return found


def _count(optimizer: torch.optim.Optimizer, named: Mapping[str, nn.Parameter]) -> int:
    """Steps that were taken before. SGD does not count them, and does not need to."""
    counts = {int(optimizer.state[p]["step"]) for p in named.values() if "step" in optimizer.state.get(p, {})}
    if len(counts) > 1:
        raise UnsupportedModel(f"The optimizer has taken {sorted(counts)} steps with different parameters.")
    return counts.pop() if counts else 0


def _check_same(one: Header, other: Header) -> None:
    """Errors: StaleFit where a record is gone on with by another training."""
    shapes, others = one.shapes, other.shapes
    for what, mine, theirs in (
        ("optimizer", one.rule, other.rule),
        *((f"shape of {name}", shapes.get(name), others.get(name)) for name in {**shapes, **others}),
        ("groups of parameters", one.groups, other.groups),
        ("keep", one.keep, other.keep),
        ("clip", one.clip, other.clip),
        ("random state of each call", one.random, other.random),
        ("frozen batch normalisations", one.frozen, other.frozen),
    ):
        if mine != theirs:
            raise StaleFit(
                f"The training that goes on with the record is another one: its {what} is {theirs}, in the record "
                f"{mine}. Give the same model, optimizer and options, or another folder."
            )


# Random states --------------------------------------------------------------------------------------------------------


def random_state() -> dict[str, np.ndarray]:
    """Of torch's generators, and of NumPy's old one."""
    found = {"random/torch": torch.get_rng_state().numpy()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        found |= {f"random/cuda{k}": state.numpy() for k, state in enumerate(torch.cuda.get_rng_state_all())}
    state: Any = np.random.get_state(legacy=True)
    place = np.array([state[2], state[3]], dtype=np.int64)
    return found | {"random/numpy": state[1], "random/numpy_place": place, "random/numpy_gauss": np.array(state[4])}


def set_random_state(arrays: Mapping[str, np.ndarray]) -> None:
    if "random/torch" in arrays:
        torch.set_rng_state(torch.as_tensor(arrays["random/torch"]))
    cuda = [torch.as_tensor(value) for name, value in arrays.items() if name.startswith("random/cuda")]
    if cuda and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(cuda)
    if "random/numpy" in arrays:
        place = arrays["random/numpy_place"]
        gauss = float(arrays["random/numpy_gauss"])
        np.random.set_state(("MT19937", arrays["random/numpy"], int(place[0]), int(place[1]), gauss))
