"""What training did, in a folder: states that are kept, and of every step its rows, their shares and its rates.

    trajectory.json                  the optimizer, its groups, the parameters' shapes and dtypes; how many steps, once
                                     training ended
    state-00000024.npz               the model before step 24 (from 0): "w/<name>", and what the optimizer remembers,
                                     "<memory>/<name>"; "random/<generator>" where there is a random state
    steps-00000012-00000024.npz      steps 12 to 23: ids (all rows, step after step), starts [steps + 1], shares (what
                                     each row's loss was multiplied by), rates [steps, groups, 4]; of a model that draws
                                     random numbers (dropout) also calls (rows of each of its calls, step after step),
                                     call_starts [steps + 1], random [calls, bytes], the generator before each

Arrays are NumPy's, without pickle, and each file is whole or not there. Steps are written before the state that they
lead to: whatever kills a training, the folder is a shorter one, and `resume` goes on from its last state.
"""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from headwater.errors import AlreadySaved, BatchMismatch, InvalidInput, InvalidSetting, NonFiniteValue
from headwater.settings import check_word
from headwater.store.draft import explained_errors, write_whole
from headwater.trajectory.rules import Clip, Rates, Rule

FORMAT = 1
HEAD = "trajectory.json"
NAMED, RANDOM = 300, 8900
"""Bytes that an array's name and place take in a file, and a random state of torch and NumPy."""
KEEP = ("all", "sqrt", "log")
"""Which states are kept: each; those before steps 0, 1, 4, 9, ...; those before steps 0, 1, 2, 4, 8, ..."""


@dataclass(frozen=True)
class Header:
    """What does not change during a training."""

    rule: Rule
    groups: tuple[tuple[str, ...], ...]
    """Names of the parameters that share their rates."""
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]
    keep: str = "sqrt"
    clip: float | None = None
    first: int = 0
    """Steps that the optimizer had taken before the record began."""
    framework: str = ""
    random: int = 0
    """Bytes of a generator's state, which is kept for each of the model's calls where it draws from it; else zero."""
    still: tuple[str, ...] = ()
    """Of such a model: modules that were in eval mode while it trained, as the dropout of a frozen part may be."""
    frozen: tuple[str, ...] = ()
    """Batch normalisations, which were in eval mode; their statistics are in each kept state, as "b/name"."""

    def __post_init__(self) -> None:
        check_word("keep", self.keep, KEEP)
        if self.clip is not None:
            Clip(self.clip)

    def as_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "framework": self.framework,
            "rule": self.rule.describe(),
            "groups": [list(names) for names in self.groups],
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "dtypes": dict(self.dtypes),
            "keep": self.keep,
            "clip": self.clip,
            "first": self.first,
        } | {name: found for name, found in self._seldom.items() if found}

    @property
    def _seldom(self) -> dict[str, Any]:
        """What most models have nothing of."""
        return {"random": self.random, "still": list(self.still), "frozen": list(self.frozen)}

    @property
    def state_bytes(self) -> int:
        """Of one state, about: a random state takes some, and a name in a file."""
        copies = 1 + len(self.rule.remembers)
        numbers = sum(math.prod(shape) * _width(self.dtypes[name]) + NAMED for name, shape in self.shapes.items())
        return copies * numbers + RANDOM


def _width(dtype: str) -> int:
    return {"float64": 8, "float32": 4}.get(dtype, 4)  # halves are kept as float32


def is_kept(step: int, keep: str) -> bool:
    """Whether the state before this step is kept, as far as the schedule goes; the last state always is."""
    if keep == "all" or step < 2:
        return True
    if keep == "sqrt":
        return math.isqrt(step) ** 2 == step
    return step & (step - 1) == 0


def kept_states(steps: int, keep: str) -> list[int]:
    """Of a training of so many steps."""
    return [step for step in range(steps + 1) if step == steps or is_kept(step, keep)]


class Call(NamedTuple):
    """One of a step's calls of a model that draws random numbers."""

    rows: int
    random: np.ndarray
    """The generator's state before it, uint8."""


@dataclass(frozen=True)
class Step:
    """One step of the optimizer: the rows whose losses it saw, and how."""

    ids: np.ndarray
    """[b]; a row may be there twice."""
    shares: np.ndarray
    """What each row's loss is multiplied by in the step's objective: its weight over the batch's total. [b]"""
    rates: tuple[Rates, ...]
    """Of each group of parameters."""
    calls: tuple[Call, ...] = ()
    """Of the model, with the rows in their order; empty where nothing is drawn."""


def step_of(
    ids: Any,
    weights: Any,
    total: float | Sequence[float] | None,
    rates: Sequence[Rates],
    mean: bool = True,
    random: Sequence[np.ndarray] | None = None,
) -> Step:
    """A step from what a training loop says of it.

    ids: of the batch's rows; or a list of such, one for each of several batches whose gradients were averaged.
    weights: of the rows' losses, likewise; None for ones. total: what the weighted sum was divided by; None for the
    number of rows (one, where the loss is a sum). random: the generator's state before each of the model's calls, where
    it draws from it: one for each batch. Errors: BatchMismatch; NonFiniteValue.
    """
    several = isinstance(ids, (list, tuple)) and len(ids) > 0 and np.ndim(_host(ids[0])) == 1
    batches = [_host(batch) for batch in ids] if several else [_host(ids)]
    given = [None] * len(batches) if weights is None else [_host(w) for w in weights] if several else [_host(weights)]
    totals: list[Any] = list(total) if isinstance(total, (list, tuple)) else [total] * len(batches)
    if not (len(batches) == len(given) == len(totals)):
        raise BatchMismatch(f"There are {len(batches)} batches, {len(given)} weights and {len(totals)} totals.")
    shares = []
    for batch, weight, whole in zip(batches, given, totals, strict=True):
        if batch.ndim != 1 or not len(batch):
            raise BatchMismatch(f"The ids of a step have the shape {batch.shape}; expected one for each row, (n,).")
        if batch.dtype.kind not in "iuUS":
            raise InvalidInput(f"The ids of a step are {batch.dtype}; expected whole numbers or words.")
        weight = np.ones(len(batch)) if weight is None else np.asarray(weight, dtype=np.float64)
        if weight.shape != batch.shape:
            raise BatchMismatch(f"There are {len(batch)} ids and weights of shape {weight.shape}.")
        divisor = (len(batch) if mean else 1.0) if whole is None else float(whole)
        shares.append(weight / (divisor * len(batches)))
    found = np.concatenate(shares)
    if not np.isfinite(found).all():
        raise NonFiniteValue("The weights of a step's rows, over their total, are not finite.")
    if random is not None and not random:
        raise BatchMismatch(
            "The model draws random numbers in train mode, and no call of it in this step was in that. If it trains in "
            "eval mode, dropout does nothing: set its p to 0 before hw.record, which is the same training. Else call "
            "model.train() and model(x)."
        )
    if random is not None and len(random) != len(batches):
        raise BatchMismatch(
            f"The model draws random numbers, and was called {len(random)} times in train mode for the {len(batches)} "
            "batches that r.step was told of: it is known what was drawn where each batch is one call. Give r.step a "
            "list of batches where gradients of several were accumulated, and evaluate in eval mode."
        )
    calls = () if random is None else tuple(Call(len(b), state) for b, state in zip(batches, random, strict=True))
    return Step(np.concatenate(batches), found, tuple(rates), calls)


def _host(values: Any) -> np.ndarray:
    found = np.asarray(values)
    return found.astype(str) if found.dtype.kind == "O" else found


@dataclass
class Writer:
    """Writes a record while training goes on. Framework-free: a recorder hands it arrays of NumPy."""

    folder: Path
    header: Header
    step: int = 0
    """The next one."""
    begun: int = 0
    """The first of the steps that are not written."""
    waiting: list[Step] = field(default_factory=list)

    @classmethod
    def new(cls, folder: str | os.PathLike[str], header: Header) -> Writer:
        """Errors: AlreadySaved where there is a record; NotWritten."""
        path = Path(folder)
        if (path / HEAD).exists():
            raise AlreadySaved(f"{path} has a record already; give another folder, or resume=True to go on with it.")
        with explained_errors(path):
            path.mkdir(parents=True, exist_ok=True)
        write_whole(path / HEAD, json.dumps(header.as_json()).encode())
        return cls(path, header)

    def wants(self) -> bool:
        """Whether the state before the next step is kept."""
        return is_kept(self.step, self.header.keep)

    def add(self, step: Step) -> None:
        self.waiting.append(step)
        self.step += 1

    def tell(self, header: Header) -> None:
        """What the first step found out, for the rest of the training."""
        self.header = header
        write_whole(self.folder / HEAD, json.dumps(header.as_json()).encode())

    def keep(self, arrays: Mapping[str, np.ndarray]) -> None:
        """The state as it is now, and the steps that led to it."""
        if self.waiting:
            _save(self.folder / steps_name(self.begun, self.step), _steps_arrays(self.waiting))
        _save(self.folder / state_name(self.step), arrays)
        self.begun, self.waiting = self.step, []

    def end(self) -> None:
        """Training is over, and its last state kept."""
        head = self.header.as_json() | {"steps": self.step}
        write_whole(self.folder / HEAD, json.dumps(head).encode())


def expected_bytes(header: Header, steps: int, rows: int) -> int:
    """Of the folder of a training of so many steps of so many rows."""
    if steps < 0:
        raise InvalidSetting(f"steps is {steps}; expected a whole number >= 0.")
    return len(kept_states(steps, header.keep)) * header.state_bytes + steps * (
        16 * rows + 32 * len(header.groups) + 8 + NAMED // 2 + header.random
    )


def state_name(step: int) -> str:
    return f"state-{step:08d}.npz"


def steps_name(start: int, stop: int) -> str:
    return f"steps-{start:08d}-{stop:08d}.npz"


def _steps_arrays(steps: Sequence[Step]) -> dict[str, np.ndarray]:
    found = {
        "ids": np.concatenate([step.ids for step in steps]),
        "shares": np.concatenate([step.shares for step in steps]),
        "starts": np.cumsum([0, *(len(step.ids) for step in steps)]),
        "rates": np.array([step.rates for step in steps], dtype=np.float64),
    }
    calls = [call for step in steps for call in step.calls]
    if not calls:
        return found
    return found | {
        "calls": np.array([call.rows for call in calls]),
        "call_starts": np.cumsum([0, *(len(step.calls) for step in steps)]),
        "random": np.stack([call.random for call in calls]),
    }


def _save(file: Path, arrays: Mapping[str, np.ndarray]) -> None:
    content = io.BytesIO()
    np.savez(content, **{name: np.ascontiguousarray(value).reshape(value.shape) for name, value in arrays.items()})  # type: ignore[arg-type]
    write_whole(file, content.getvalue())
