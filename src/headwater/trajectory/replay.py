"""Steps of a record taken again, from its kept states; what does not come to the next kept state is refused.

A record's rows, its rates and its states are what training did. That they say all of it (no other masks of dropout, no
loader that gave other rows, no penalty beside the rows' losses, no kernel of another machine) shows only in a replay:
from each kept state it must come to the next one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np

from headwater.arrays import precise, to_numpy
from headwater.errors import StaleFit
from headwater.trajectory.record import Step
from headwater.trajectory.rules import AdamRule, Rule, State
from headwater.trajectory.steps import Piece, TrainingModel
from headwater.trajectory.trajectory import Trajectory

TOLERANCES = {"float64": 1e-8, "float32": 1e-3}
"""How far a replayed parameter may be from the kept one, relative to the way from state to state; halves: a tenth."""
HALVES_ROUND = 1e-3
"""Of the largest gradient: what is smaller may be rounding in half precision, whose sums are in float32."""
FEW = 0.05
"""Share of a model's numbers that may be left out of a replay's check, as their gradients are rounding."""

Rows = Callable[[Step], Sequence[Piece]]
"""The rows of a step with their shares."""


@dataclass(frozen=True, eq=False)
class Replay:
    """A record's steps, by a model that can take them. held: states that may be in memory at once, at least two."""

    record: Trajectory
    model: TrainingModel
    rows: Rows
    held: int = 32
    dtype: str = "float32"
    weigh: Callable[[Step], np.ndarray] | None = None
    """Of a training that was not: what each row's share of a step is multiplied by; None for the record's own."""

    checked: bool = True
    """Whether what does not come to the record's states is refused: not where another precision is meant."""

    def step(self, number: int) -> Step:
        step = self.record.step(number)
        return step if self.weigh is None else replace(step, shares=step.shares * self.weigh(step))

    def last(self) -> State:
        """Where training ends: the record's last state, or of other weights by taking all steps."""
        if self.weigh is None:
            return self.kept(self.record.steps)
        state = self.kept(self.record.kept[0])
        for number in range(self.record.kept[0], self.record.steps):
            state = self.forward(state, number)
        return state

    def forward(self, state: State, number: int) -> State:
        """The state after step `number`."""
        step = self.step(number)
        grads = self.model.gradient(state.parameters, self.rows(step))
        if self.record.clip is not None:
            grads = self.record.clip.clipped(grads)
        return self.record.rule.step(state, grads, self.record.rates(step), self.record.count(number))

    def kept(self, number: int) -> State:
        return self.model.put(self.record.state(number))

    def verify(self, rows: int) -> int:
        """Take some of the record's steps again, from one kept state to the next: how many steps.

        The shortest stretch, then the last, then others from the first on, as long as these have no more than so many
        rows together. Left out is what cannot be taken again: steps whose rows are not known, and states without the
        optimizer's memory, as checkpoints may have it. Errors: StaleFit, as of `backward`.
        """
        stretches = known_stretches(self.record)
        if not stretches:
            return 0
        first = min(stretches, key=lambda stretch: stretch[1] - stretch[0])
        taken = left = 0
        for start, stop in dict.fromkeys([first, stretches[-1], *stretches]):
            size = sum(len(self.record.step(number).ids) for number in range(start, stop))
            if taken and size > left:
                continue
            left = (left if taken else rows) - size
            taken += stop - start
            before = state = self.kept(start)
            for number in range(start, stop):
                state = self.forward(state, number)
            self._check(before, state, stop)
        return taken

    def backward(self, until: int | None = None) -> Iterator[tuple[int, State]]:
        """(step, the state before it), from the step before `until` (the end) to the first.

        Of the states between two kept ones `held` are in memory, and the rest is replayed from these: in all, each step
        is taken about once forward, twice where states are far apart.
        Errors: StaleFit, naming value and step, where the replay does not come to the next kept state.
        """
        stop = self.record.steps if until is None else until
        kept, check = (self.record.kept, self.checked) if self.weigh is None else (self.record.kept[:1], False)
        starts = [step for step in kept if step < stop]
        for start, after in reversed(list(zip(starts, [*starts[1:], stop], strict=True))):
            checked = check and after in self.record.kept
            yield from self._segment(self.kept(start), start, after, checked)

    def _segment(self, state: State, start: int, stop: int, check: bool) -> Iterator[tuple[int, State]]:
        """Backwards over steps start to stop - 1, from the state before the first."""
        length = stop - start
        gap = 1 if length <= self.held else -(-length // self.held)
        held = {}
        for number in range(start, stop):
            if (number - start) % gap == 0:
                held[number] = state
            if check or number + 1 < stop:
                state = self.forward(state, number)
        if check:
            self._check(held[start], state, stop)
        for number, found in sorted(held.items(), reverse=True):
            end = min(stop, number + gap)
            if end - number == 1:
                yield number, found
            else:
                yield from self._segment(found, number, end, check=False)

    def _check(self, before: State, found: State, step: int) -> None:
        kept = self.kept(step)
        tolerance = TOLERANCES.get(self.dtype, 0.1)
        rounding = _rounding(self.record.rule, kept, self.dtype)
        for name in self.record.names:
            mine, theirs, start = (_flat(state.parameters[name]) for state in (found, kept, before))
            if name in rounding:
                mine, theirs, start = (np.where(rounding[name], 0.0, values) for values in (mine, theirs, start))
            # Relative to how far the step goes, and to rounding of the parameter itself.
            way = float(np.linalg.norm(theirs - start))
            far = float(np.linalg.norm(mine - theirs))
            floor = 16 * _eps(self.dtype) * float(np.linalg.norm(theirs))
            if not far <= tolerance * way + floor:
                worst = int(np.argmax(np.nan_to_num(np.abs(mine - theirs), nan=np.inf)))
                share = far / way if way else math.inf
                raise StaleFit(
                    f"The replay does not come to the record's state before step {step}: {name}[{worst}] is "
                    f"{mine[worst]:.9g}, and was {theirs[worst]:.9g}; it is off by {share:.2g} "
                    f"of the way since the state before, where {tolerance:g} is allowed. Training did something that "
                    "the record does not say: dropout by a function (record(..., random=True)) or in a fused kernel, "
                    "another loss (or a penalty, label smoothing, an average over tokens instead of rows), clipping "
                    "(record(..., clip=)), a step that r.step was not told of, other rows or weights, mixed precision."
                )


def known_stretches(record: Trajectory) -> list[tuple[int, int]]:
    """From one kept state to the next, where the steps can be taken again."""
    return [(start, stop) for start, stop in pairwise(record.kept) if _is_known(record, start, stop)]


def _is_known(record: Trajectory, start: int, stop: int) -> bool:
    first = record.step(start)
    if not all(len(record.step(number).ids) for number in range(start, stop)):
        return False
    # Momentum of zero forgets; Adam with a first beta of zero still remembers squares.
    remembers = record.rule.is_adaptive or any(rates.first for rates in first.rates)
    if record.count(start) == 1 or not remembers:
        return True
    memory = record.state(start).memory
    return any(value.any() for values in memory.values() for value in values.values())


def _rounding(rule: Rule, kept: State, dtype: str) -> dict[str, np.ndarray]:
    """Which numbers of a parameter have a gradient that is rounding alone: [size], by name, where there are any.

    A bias of attention's keys has no effect at all, and its gradient is what rounding left of zero. Adam divides it by
    its own size, so that it makes whole steps of chance, which no other order of additions repeats. Of a byte
    transformer their roots are 1e-9 to 1e-7 of the largest in float32, up to 1e-4 in bfloat16, and those of other
    parameters 1e-3 and more (measured). Where these are more than a few of all numbers, a large gradient elsewhere
    makes them look small, and none is left out: a replay that nothing was held against would say nothing.
    """
    if not isinstance(rule, AdamRule):
        return {}
    level = min(16 * _eps(dtype), HALVES_ROUND)
    roots = {name: np.sqrt(_flat(square)) for name, square in kept.memory["square"].items()}
    largest = max((float(root.max(initial=0.0)) for root in roots.values()), default=0.0)
    found = {name: (root > 0) & (root <= level * largest) for name, root in roots.items()}
    if sum(int(some.sum()) for some in found.values()) > FEW * sum(root.size for root in roots.values()):
        return {}
    return {name: some for name, some in found.items() if some.any()}


def _flat(value: Any) -> np.ndarray:
    return to_numpy(precise(value)).astype(np.float64).reshape(-1)


def _eps(dtype: str) -> float:
    return {"float64": 2.2e-16, "float32": 1.2e-7, "float16": 9.8e-4}.get(dtype, 8e-3)
