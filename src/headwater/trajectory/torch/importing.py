"""A record from checkpoints that a run left behind: as much of a training as they say.

With the rows of every step it is a record like any other, and a replay finds out whether it is right. Without, it has
states and rates, which is what hw.Source needs.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from headwater.arrays import to_numpy
from headwater.errors import InvalidInput
from headwater.torch.checkpoints import Checkpoint
from headwater.torch.wrapped import unwrapped
from headwater.trajectory.optimizers import Optimizer
from headwater.trajectory.record import Header, Step, Writer, step_of
from headwater.trajectory.torch.recorder import MEMORY
from headwater.trajectory.trajectory import Trajectory


def from_checkpoints(
    folder: str | os.PathLike[str],
    checkpoints: Mapping[int, Checkpoint],
    optimizer: Optimizer,
    *,
    rows: Sequence[Any] | None = None,
    optimizer_states: Mapping[int, Any] | None = None,
    names: Sequence[str] | None = None,
    clip: float | None = None,
) -> Trajectory:
    """Write a record of these checkpoints, and open it.

    checkpoints: weights by the number of steps that were taken before: state dicts, modules, or files that `torch.load`
    reads. optimizer: its settings (`headwater.trajectory.optimizers`), with the learning rate of each step. rows: for
    each step, the ids of its batch (or several, averaged); None where they are not known. optimizer_states: by the same
    numbers, what `optimizer.state_dict()` gave, or files of it; zeros where there are none. names: of the trained
    parameters, in the optimizer's order; None for all floating-point ones of the first checkpoint, in its order.
    Errors: InvalidInput for checkpoints of different parameters, and for fewer than two.
    """
    steps = sorted(checkpoints)
    if len(steps) < 2 or steps[0] < 0:
        raise InvalidInput(f"checkpoints are of steps {steps}; expected two or more, from 0.")
    states = {step: _state(checkpoints[step]) for step in steps}
    first = states[steps[0]]
    chosen = [n for n, v in first.items() if v.is_floating_point()] if names is None else list(names)
    for step, state in states.items():
        wrong = [n for n in chosen if n not in state or state[n].shape != first[n].shape]
        if wrong:
            raise InvalidInput(f"The checkpoint of step {step} has no {wrong[0]}, or one of another shape.")
    header = Header(
        optimizer.rule,
        (tuple(chosen),),
        {name: tuple(first[name].shape) for name in chosen},
        {name: str(first[name].dtype).removeprefix("torch.") for name in chosen},
        "all",
        clip,
        steps[0],
        "torch",
    )
    writer = Writer.new(folder, header)
    for number in range(steps[0], steps[-1] + 1):
        if number in states:
            memory = _memory(optimizer, chosen, states[number], (optimizer_states or {}).get(number))
            writer.keep({f"w/{name}": to_numpy(states[number][name]) for name in chosen} | memory)
        if number < steps[-1]:
            rates = optimizer.rates(number)
            known = None if rows is None else rows[number]
            nothing = Step(np.empty(0, np.int64), np.empty(0), (rates,))
            writer.add(nothing if known is None else step_of(known, None, None, [rates]))
    writer.end()
    return Trajectory(Path(folder))


def _state(checkpoint: object) -> Mapping[str, torch.Tensor]:
    if isinstance(checkpoint, nn.Module):
        return {name: value.detach() for name, value in unwrapped(checkpoint).state_dict().items()}
    if isinstance(checkpoint, (str, os.PathLike)):
        checkpoint = torch.load(checkpoint, map_location="cpu", weights_only=True)
    if not isinstance(checkpoint, Mapping):
        raise InvalidInput(f"A checkpoint is {type(checkpoint).__name__}; expected a state dict, a module, or a file.")
    return checkpoint


def _memory(
    optimizer: Optimizer, names: Sequence[str], state: Mapping[str, torch.Tensor], given: Any
) -> dict[str, np.ndarray]:
    """From an optimizer's state dict, whose parameters have numbers in the order of its groups."""
    kinds = MEMORY[type(optimizer.rule)]
    if given is None:
        return {f"{kind}/{n}": np.zeros_like(to_numpy(state[n])) for kind in optimizer.rule.remembers for n in names}
    if isinstance(given, (str, os.PathLike)):
        given = torch.load(given, map_location="cpu", weights_only=True)
    order = [number for group in given["param_groups"] for number in group["params"]]
    if len(order) != len(names):
        raise InvalidInput(f"The optimizer's state has {len(order)} parameters, and there are {len(names)} names.")
    found = {}
    for kind in optimizer.rule.remembers:
        for name, number in zip(names, order, strict=True):
            value = given["state"].get(number, {}).get(kinds[kind])
            found[f"{kind}/{name}"] = to_numpy(torch.zeros_like(state[name]) if value is None else value)
    return found
