"""From the end of a training to its beginning, for all queries together: what each row's weight did to each query.

    tau[q, i] = d f_q(w_T) / d weight_i = sum over steps t that saw row i of <r_t, share_i grad l_i(w_t)>

p = grad f_q(w_T) is where it starts; each step's adjoint (`rules`) gives r_t, the cotangent of its gradient, and with
the curvature H_t of its objective the next p. H is the Hessian (the exact derivative of training), the GGN, the batch's
empirical Fisher, or zero. at="step" asks each step by itself: p = grad f_q(w_t), and nothing is carried on.

By block: tau_b[q, i] has of each <r_t, share_i grad l_i> the part of the parameters in block b. It is the derivative
by a weight that row i has in block b's gradient alone, in every step that saw it, while what that moves goes on through
all parameters; the sum over blocks is tau.

Removing row i changes f_q by about -tau[q, i]. What has been swept is kept at each kept state, where there is a place
for it: a sweep that was stopped goes on from there, to the same bytes.
Source: Ilyas and Engstrom 2025, arXiv 2503.13751 (the exact derivative); Wang et al. 2024, arXiv 2406.11011 (at each
step); Pruthi et al. 2020, arXiv 2002.08484 (no curvature).
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from headwater.arrays import as_like, namespace, to_numpy, working_memory_limit
from headwater.errors import DamagedFile, NonFiniteValue
from headwater.store.draft import write_whole
from headwater.trajectory.replay import Replay
from headwater.trajectory.rules import Arrays, Cotangents
from headwater.trajectory.steps import Blocks

Progress = Callable[[int], object]
"""Told of so many more steps."""
WIDTHS = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
"""Bytes of a number."""


@dataclass(frozen=True, eq=False)
class Sweep:
    """Unrolled derivatives of a record's training."""

    replay: Replay
    places: Callable[[np.ndarray], np.ndarray]
    """(ids of a step's rows) -> their columns, in the order that `replay.rows` has them in."""
    columns: int
    curvature: str | None = "hessian"
    at_each_step: bool = False
    asked_places: Callable[[np.ndarray], np.ndarray] | None = None
    """The same in the order of the ids; None where that is one."""
    blocks: Blocks = None
    """Whose parts of tau are kept apart, at a backward pass more for each block and step."""

    def replay_places(self, ids: np.ndarray) -> np.ndarray:
        """Columns of rows, in the order of their ids."""
        return self.places(ids) if self.asked_places is None else self.asked_places(ids)

    @property
    def at_once(self) -> int:
        """Queries whose cotangents, and what comes of them in a step, fit into the working memory."""
        record = self.replay.record
        each = sum(math.prod(shape) for shape in record.header.shapes.values()) * WIDTHS.get(self.replay.dtype, 4)
        return max(1, int(working_memory_limit() // (each * (3 + 2 * len(record.rule.remembers)))))

    def steps_for(self, queries: int) -> int:
        """Steps that `tau` goes back for so many queries: the whole training for each group of them."""
        return self.replay.record.steps * -(-queries // self.at_once)

    def tau(
        self,
        queries: Sequence[Any],
        *,
        share: float | None = None,
        keep: Path | None = None,
        group: int | None = None,
        progress: Progress | None = None,
        last: int | None = None,
    ) -> np.ndarray:
        """[q, columns], float64; of blocks [block, q, columns]. queries: batches of query rows.

        keep: a file for what a stopped sweep had.

        share: all queries are asked as one, their sum times this. group: queries at once; None for as many as the
        working memory takes. The numbers do not depend on it. last: of so many last steps alone.
        Errors: StaleFit where the replay does not come to the record's states; NonFiniteValue.
        """
        grads = self._asked(queries, self.replay.last().parameters, share)
        count = len(next(iter(grads.values())))
        size = self.at_once if group is None else group
        found = np.zeros((self._parts, count, self.columns))
        for start in range(0, count, size):
            rows = slice(start, min(count, start + size))
            file = None if keep is None else keep.with_name(f"{keep.name}-{start:06d}.npz")
            # Each group goes through the whole training: states are replayed once for each.
            mine = {name: g[rows] for name, g in grads.items()}
            found[:, rows] = self._of(queries, mine, rows, share, file, progress, last)
        return found[0] if self.blocks is None else found

    @property
    def _parts(self) -> int:
        return 1 if self.blocks is None else len(self.blocks)

    def _asked(self, queries: Sequence[Any], parameters: Arrays, share: float | None) -> Arrays:
        """Gradients of what is explained: of each query [q, *shape], or of all as one [1, *shape]."""
        each = [self.replay.model.query_grads(parameters, batch) for batch in queries]
        found = {n: namespace(each[0][n]).concat([piece[n] for piece in each], axis=0) for n in each[0]}
        if share is None:
            return found
        return {n: namespace(g).sum(g, axis=0, keepdims=True) * share for n, g in found.items()}

    def _of(
        self,
        queries: Sequence[Any],
        grads: Arrays,
        rows: slice,
        share: float | None,
        keep: Path | None,
        progress: Progress | None,
        last: int | None,
    ) -> np.ndarray:
        record, rule = self.replay.record, self.replay.record.rule
        found = _Swept.read(keep, grads, rule.remembers) if keep is not None else None
        if found is None:
            nothing = {kind: {n: namespace(g).zeros_like(g) for n, g in grads.items()} for kind in rule.remembers}
            count = len(next(iter(grads.values())))
            found = _Swept(record.steps, np.zeros((self._parts, count, self.columns)), Cotangents(dict(grads), nothing))
        elif progress is not None and found.step < record.steps:
            progress(record.steps - found.step)
        tau, cotangents = found.tau, found.cotangents
        clean = cotangents.memory if self.at_each_step else {}
        if self.at_each_step:
            clean = {kind: {n: namespace(v).zeros_like(v) for n, v in each.items()} for kind, each in clean.items()}
        first = 0 if last is None else record.steps - last
        for number, state in self.replay.backward(found.step):
            if number < first:
                break
            if self.at_each_step:
                asked = self._asked(queries, state.parameters, share)
                cotangents = Cotangents({name: g[rows] for name, g in asked.items()}, clean)
            step = self.replay.step(number)
            point = self.replay.model.at(state.parameters, self.replay.rows(step), self.curvature)
            raw = point.grads
            grads_seen = raw if record.clip is None else record.clip.clipped(raw)
            through, direct = rule.pull(state, grads_seen, cotangents, record.rates(step), record.count(number))
            if record.clip is not None:
                through = record.clip.pull(raw, through)
            along, products = point.pull(through, self.blocks)
            # Calls of a model that draws random numbers are in the order of the ids, whatever batches rows are held in.
            columns = self.replay_places(step.ids) if step.calls else self.places(step.ids)
            np.add.at(tau.transpose(2, 0, 1), columns, along.transpose(2, 0, 1))  # a row may be in a step twice
            if not self.at_each_step:
                moved = {name: p + products[name] for name, p in direct.parameters.items()}
                cotangents = Cotangents(moved, direct.memory)
            _check_finite(tau, number)
            if keep is not None and number in record.kept:
                _Swept(number, tau, cotangents).write(keep)
            if progress is not None:
                progress(1)
        return tau


@dataclass(frozen=True, eq=False)
class _Swept:
    """A sweep on its way: the next step is the one before `step`."""

    step: int
    tau: np.ndarray
    """[block, q, columns]."""
    cotangents: Cotangents

    def write(self, file: Path) -> None:
        arrays = {"step": np.array(self.step), "tau": self.tau}
        arrays |= {f"p/{name}": to_numpy(value) for name, value in self.cotangents.parameters.items()}
        for kind, values in self.cotangents.memory.items():
            arrays |= {f"u/{kind}/{name}": to_numpy(value) for name, value in values.items()}
        content = io.BytesIO()
        np.savez(content, **arrays)  # type: ignore[arg-type]
        write_whole(file, content.getvalue())

    @classmethod
    def read(cls, file: Path, like: Arrays, memory: Sequence[str]) -> _Swept | None:
        """None where there is nothing. Errors: DamagedFile."""
        if not file.exists():
            return None
        try:
            with np.load(file, allow_pickle=False) as found:
                parameters = {name: as_like(found[f"p/{name}"], value) for name, value in like.items()}
                kept = {k: {n: as_like(found[f"u/{k}/{n}"], v) for n, v in like.items()} for k in memory}
                return cls(int(found["step"]), found["tau"], Cotangents(parameters, kept))
        except Exception as error:  # of zipfile, NumPy and the system
            raise DamagedFile(f"{file} cannot be read ({error}); remove it, and the sweep begins anew.") from error


def _check_finite(tau: np.ndarray, number: int) -> None:
    # A sum is finite only if all of it is.
    with np.errstate(invalid="ignore", over="ignore"):
        if np.isfinite(tau.sum()):
            return
    raise NonFiniteValue(
        f"The derivative grew beyond all numbers at step {number}: training here was chaotic (its steps were larger "
        "than its curvature allows), and no derivative forecasts it. Lower the learning rate, or ask "
        "hw.Unrolled(curvature='ggn') or None."
    )
