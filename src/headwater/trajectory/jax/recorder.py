"""Records a JAX training while it goes on: a context around a loop of one's own, with optax or without.

    with hw.record(params, Sgd(0.1, momentum=0.9), "folder") as r:
        for x, y, ids in loader:
            params, state = step(params, state, x, y)
            r.step(ids, params, state)

Nothing can be asked of a function that makes steps: its settings are given (`headwater.trajectory.optimizers`), and a
replay that does not come to the kept states says where they are others.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol, Self, runtime_checkable

import jax
import numpy as np

from headwater.arrays import to_numpy
from headwater.errors import InvalidInput, InvalidSetting, StaleFit
from headwater.jax.tree import take_tree
from headwater.trajectory.optimizers import Optimizer
from headwater.trajectory.record import Header, Writer, expected_bytes, step_of
from headwater.trajectory.trajectory import Trajectory

MEMORY = {"momentum": ("trace", "momentum"), "mean": ("mu", "mean"), "square": ("nu", "square")}
"""Names of what an optimizer remembers, in optax's states and in a dict."""


class JaxRecorder:
    """See `headwater.trajectory.record`; what `hw.record` returns for parameters of JAX.

    start, params, memory: where a loop goes on from with resume=True; memory is by name: {"mean": {name: array}, ...}.
    """

    def __init__(
        self,
        params: Any,
        optimizer: Optimizer,
        folder: str | os.PathLike[str],
        *,
        keep: str = "sqrt",
        clip: float | None = None,
        reduction: str = "mean",
        resume: bool = False,
    ):
        if not isinstance(optimizer, Optimizer):
            raise InvalidSetting(
                f"optimizer is {type(optimizer).__name__}; for JAX give its settings, such as "
                "headwater.trajectory.optimizers.Sgd(0.1, momentum=0.9) or AdamW(1e-3)."
            )
        if reduction not in ("mean", "sum"):
            raise InvalidSetting(f"reduction is {reduction!r}; expected 'mean' or 'sum'.")
        self.optimizer, self.folder, self._mean, self._resume = optimizer, folder, reduction == "mean", resume
        self.tree, leaves = take_tree(params)
        names = [p.name for p in self.tree.parameters]
        self.header = Header(
            optimizer.rule,
            (tuple(names),),
            {name: leaves[name].shape for name in names},
            {name: str(leaves[name].dtype) for name in names},
            keep,
            clip,
            framework="jax",
        )
        self._names = names
        self.start, self.params = 0, params
        self.memory: dict[str, dict[str, Any]] = {
            kind: {name: np.zeros_like(to_numpy(leaves[name])) for name in names} for kind in self.header.rule.remembers
        }
        self._writer: Writer | None = None
        self._last: tuple[Any, Any] = (params, self.memory)
        self._counted: int | None = None

    def bytes_for(self, steps: int, rows: int = 64) -> int:
        """Of the folder after so many steps of so many rows each."""
        return expected_bytes(self.header, steps, rows)

    def __enter__(self) -> Self:
        if self._resume and os.path.exists(os.path.join(self.folder, "trajectory.json")):
            record = Trajectory(self.folder)
            if record.header.as_json() != self.header.as_json():
                raise StaleFit(f"{self.folder} is the record of another training than the one that goes on with it.")
            self._writer = record.resumed()
            self.start, state = record.steps, record.state(record.steps)
            _, leaves = take_tree(self.params)
            self.params = self.tree.build({**leaves, **{n: jax.numpy.asarray(v) for n, v in state.parameters.items()}})
            self.memory = {kind: dict(values) for kind, values in state.memory.items()}
            self._last = (self.params, self.memory)
        else:
            self._writer = Writer.new(self.folder, self.header)
            self._writer.keep(self._arrays(self.params, self.memory))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and self._writer is not None:
            if self._writer.waiting:
                self._writer.keep(self._arrays(*self._last))
            self._writer.end()

    def step(
        self,
        ids: Any,
        params: Any,
        state: Any = None,
        weights: Any = None,
        *,
        total: float | Sequence[float] | None = None,
    ) -> None:
        """Say which rows the last step was of, and what it came to. state: optax's, or a dict of what is remembered.

        ids, weights, total: as of the torch recorder. A forgotten call is noticed here where the state counts its steps
        (Adam's, a schedule's); else by the replay, at the next kept state, and of the last step by `fit`, whose model
        is not where the record ends.
        Errors: InvalidInput where the state has no momentum or moments, or counted other than one step more.
        """
        if self._writer is None:
            raise InvalidInput("The recorder is not open: with hw.record(params, optimizer, folder) as r: ...")
        self._check_count(state, self._writer.step)
        self._writer.add(step_of(ids, weights, total, [self.optimizer.rates(self._writer.step)], self._mean))
        self._last = (params, state)
        if self._writer.wants():
            self._writer.keep(self._arrays(params, state))

    def _check_count(self, state: Any, step: int) -> None:
        """Where the state counts its steps (Adam's, and a schedule's). Errors: InvalidInput."""
        count = _field(state, ("count",))
        if count is None:
            return
        counted = int(to_numpy(count))
        if self._counted is not None and counted != self._counted + 1:
            raise InvalidInput(
                f"The optimizer's state has counted {counted - self._counted} steps since the last r.step(ids, params, "
                f"state), before step {step} of the record; call r.step once after each of them, with the state that "
                "came of it."
            )
        self._counted = counted

    def _arrays(self, params: Any, state: Any) -> dict[str, np.ndarray]:
        _, leaves = take_tree(params)
        found = {f"w/{name}": to_numpy(leaves[name]) for name in self._names}
        for kind in self.header.rule.remembers:
            values = self._remembered(kind, state)
            found |= {f"{kind}/{name}": to_numpy(values[name]) for name in self._names}
        return found

    def _remembered(self, kind: str, state: Any) -> Mapping[str, Any]:
        found = _field(state, MEMORY[kind])
        if found is None:
            if kind == "momentum" and self.optimizer.rates(0).first == 0.0:  # nothing depends on it
                return {name: np.zeros(self.header.shapes[name]) for name in self._names}
            raise InvalidInput(
                f"The state has no {kind} ({' or '.join(MEMORY[kind])}): give r.step(ids, params, state) the state of "
                f"optax, or {{{kind!r}: a tree like params, ...}}."
            )
        return take_tree(found)[1]


@runtime_checkable
class _Named(Protocol):
    """A named tuple."""

    def _asdict(self) -> dict[str, Any]: ...


def _field(state: Any, names: Sequence[str]) -> Any:
    """What an optax state, a tuple of named tuples, or a dict has by one of these names; None where nothing has."""
    if isinstance(state, Mapping):
        return next((state[name] for name in names if name in state), None)
    if isinstance(state, tuple):
        fields = state._asdict() if isinstance(state, _Named) else {}
        for name in names:
            if name in fields:
                return fields[name]
        return next((found for part in state if (found := _field(part, names)) is not None), None)
    return None
