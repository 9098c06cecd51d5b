"""Train a model and record it: the steps of `rules`, for torch and JAX alike. No framework here."""

from __future__ import annotations

import os
from collections.abc import Iterable

import numpy as np

from headwater.arrays import namespace, to_numpy
from headwater.errors import AlreadySaved, NonFiniteValue
from headwater.trajectory.optimizers import Optimizer
from headwater.trajectory.record import HEAD, Header, Writer, step_of
from headwater.trajectory.replay import Rows
from headwater.trajectory.rules import Arrays, Clip, State
from headwater.trajectory.steps import TrainingModel
from headwater.trajectory.trajectory import Trajectory


def train(
    model: TrainingModel,
    start: Arrays,
    optimizer: Optimizer,
    order: Iterable[np.ndarray],
    rows: Rows,
    folder: str | os.PathLike[str],
    *,
    keep: str = "sqrt",
    clip: float | None = None,
    framework: str = "",
) -> State:
    """Steps over the rows of `order`, ids of each step's batch, from these parameters. A record that is there, and not
    ended, is gone on with.

    Errors: AlreadySaved for a record that is ended; NonFiniteValue where training diverges.
    """
    names = list(start)
    header = Header(
        optimizer.rule,
        (tuple(names),),
        {name: tuple(start[name].shape) for name in names},
        {name: str(start[name].dtype).removeprefix("torch.") for name in names},
        keep,
        clip,
        framework=framework,
    )
    if (os.path.exists(os.path.join(folder, HEAD))) and not (record := Trajectory(folder)).is_ended:
        if record.header.as_json() != header.as_json():
            raise AlreadySaved(f"{folder} has the record of another training.")
        writer, state = record.resumed(), model.put(record.state(record.steps))
    else:
        writer = Writer.new(folder, header)
        nothing = {kind: {n: namespace(w).zeros_like(w) for n, w in start.items()} for kind in optimizer.rule.remembers}
        state = State(dict(start), nothing)
        writer.keep(_arrays(state))
    clipping = None if clip is None else Clip(clip)
    for number, ids in enumerate(order):
        if number < writer.step:
            continue
        step = step_of(ids, None, None, [optimizer.rates(number)])
        grads = model.gradient(state.parameters, rows(step))
        if clipping is not None:
            grads = clipping.clipped(grads)
        rates = dict.fromkeys(names, step.rates[0])
        state = optimizer.rule.step(state, grads, rates, number + 1)
        writer.add(step)
        if writer.wants():
            writer.keep(_arrays(state))
    if writer.waiting:
        writer.keep(_arrays(state))
    for name, value in state.parameters.items():
        if not np.isfinite(to_numpy(value)).all():
            raise NonFiniteValue(f"Training diverged: {name} is not finite. Lower the learning rate.")
    writer.end()
    return state


def _arrays(state: State) -> dict[str, np.ndarray]:
    found = {f"w/{name}": to_numpy(value) for name, value in state.parameters.items()}
    for kind, values in state.memory.items():
        found |= {f"{kind}/{name}": to_numpy(value) for name, value in values.items()}
    return found
