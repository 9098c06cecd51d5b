"""A bank of retrained models' outputs: planned once, filled with resume, used for every method and metric.

    keep     [m, n]      bool: the train rows that each subset keeps
    seeds    [m, r]      of each run of each subset
    outputs  [m, r, q]   what was measured of each query on the model of each run; NaN where it has not been run

A bank is a folder: `recipe.json` says what was asked, and `runs/` has a file for each run that is complete, so that a
bank that was stopped goes on where it was. Banks of different recipes are never mixed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
from numpy.typing import ArrayLike, NDArray

from headwater.errors import InvalidInput, InvalidSetting, NonFiniteValue, ShapeMismatch
from headwater.progress import track

Measure = Callable[[NDArray[np.int64], int], ArrayLike]
"""(rows kept, seed) -> outputs [q] of the model trained on them."""
MeasureMany = Callable[[NDArray[np.bool_], NDArray[np.int64]], ArrayLike]
"""(masks [b, n], seeds [b]) -> outputs [b, q] of the models trained on them, many at once."""


@dataclass(frozen=True, eq=False)
class Plan:
    """Which rows each subset keeps, and the seeds of its runs."""

    keep: NDArray[np.bool_]
    """[m, n]."""
    seeds: NDArray[np.int64]
    """[m, r]; below zero where a subset is run less often."""

    def __post_init__(self) -> None:
        if self.keep.ndim != 2 or self.keep.dtype != np.bool_ or self.seeds.ndim != 2:
            raise ShapeMismatch(f"Expected masks (m, n), seeds (m, r); got {self.keep.shape} and {self.seeds.shape}.")
        if len(self.keep) != len(self.seeds):
            raise ShapeMismatch(f"There are {len(self.keep)} subsets and seeds for {len(self.seeds)}.")
        if not self.keep.any(axis=1).all():
            raise InvalidInput(f"Subset {int(self.keep.any(axis=1).argmin())} keeps no row.")

    @property
    def alpha(self) -> float:
        """The share of rows that are kept."""
        return float(self.keep.mean())

    @property
    def places(self) -> list[tuple[int, int]]:
        """(subset, run) of all runs, subset after subset."""
        return [(int(m), int(r)) for m, r in np.argwhere(self.seeds >= 0)]


def plan_subsets(
    rows: int,
    *,
    alpha: float = 0.5,
    subsets: int = 100,
    runs: int = 1,
    repeated: int = 20,
    seed: int = 0,
) -> Plan:
    """Random subsets of a share `alpha` of the rows, each the same size.

    runs: of every subset. repeated: the first so many subsets have one run more, so that the measurement's reliability
    is known (it is anyway for two runs or more; then none has more). No two runs have the same seed.
    Errors: InvalidSetting.
    """
    for name, value, least in (
        ("rows", rows, 2),
        ("subsets", subsets, 3),
        ("runs", runs, 1),
        ("repeated", repeated, 0),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise InvalidSetting(f"{name} is {value!r}; expected a whole number of at least {least}.")
    size = round(alpha * rows) if 0 < alpha < 1 else 0
    if not 0 < size < rows:
        raise InvalidSetting(
            f"alpha is {alpha!r}; expected a share of {rows} rows that keeps some and leaves some out."
        )
    rng = np.random.default_rng(seed)
    keep = np.zeros((subsets, rows), dtype=bool)
    for mask in keep:
        mask[rng.choice(rows, size=size, replace=False)] = True
    repeated = min(repeated, subsets) if runs == 1 else 0
    seeds = np.full((subsets, 2 if repeated else runs), -1)
    wanted = np.zeros(seeds.shape, dtype=bool)
    wanted[:, :runs], wanted[:repeated] = True, True
    seeds[wanted] = rng.permutation(2**31 - 1 if wanted.sum() > 2**20 else 2**20)[: wanted.sum()]
    return Plan(keep, seeds)


def plan_removals(rows: int, groups: Sequence[Sequence[int]] | None = None, *, runs: int = 1, seed: int = 0) -> Plan:
    """All rows but those of a group, for each group (None: every row by itself); before them, once, all rows.

    Errors: InvalidInput for a row that does not exist.
    """
    chosen = [[k] for k in range(rows)] if groups is None else [list(group) for group in groups]
    keep = np.ones((1 + len(chosen), rows), dtype=bool)
    for mask, group in zip(keep[1:], chosen, strict=True):
        if not all(0 <= k < rows for k in group):
            raise InvalidInput(f"A group has rows {group}; there are {rows}.")
        mask[group] = False
    return Plan(keep, np.random.default_rng(seed).permutation(2**20)[:runs][None].repeat(len(keep), 0))


class Bank:
    """Outputs of retrained models, in a folder.

    plan: what is to be run. queries: how many outputs a model has. recipe: all else that decides the outputs (model,
    data, steps, what is measured), JSON values. Errors: InvalidInput if the folder holds another bank, which names what
    differs.
    """

    def __init__(self, path: str | os.PathLike[str], plan: Plan, queries: int, recipe: Mapping[str, Any]):
        self.path, self.plan, self.queries = Path(path), plan, int(queries)
        self.recipe = json.loads(json.dumps(dict(recipe)))
        self._check()
        self.outputs = np.full((*plan.seeds.shape, self.queries), np.nan)
        """[m, r, q]."""
        self._done = np.zeros(plan.seeds.shape, dtype=bool)
        for place in plan.places:
            self._read(place)

    def _check(self) -> None:
        asked = {
            "recipe": self.recipe,
            "rows": int(self.plan.keep.shape[1]),
            "subsets": len(self.plan.keep),
            "queries": self.queries,
            "alpha": self.plan.alpha,
            "plan": crc32(self.plan.keep.tobytes() + self.plan.seeds.astype(np.int64).tobytes()),
        }
        file = self.path / "recipe.json"
        if not file.exists():
            if self.path.exists() and any(self.path.iterdir()):
                raise InvalidInput(f"{self.path} is not empty and holds no bank; choose another folder.")
            (self.path / "runs").mkdir(parents=True, exist_ok=True)
            _write(file, json.dumps(asked, indent=1).encode())
            return
        try:
            found = json.loads(file.read_text())
        except ValueError as error:
            raise InvalidInput(f"{file} cannot be read: {error}") from error
        different = [name for name in asked if found.get(name) != asked[name]]
        if different:
            said = "; ".join(f"{name} was {found.get(name)!r}, now {asked[name]!r}" for name in different)
            raise InvalidInput(f"{self.path} is a bank of another recipe: {said}. Choose another folder.")

    def _file(self, place: tuple[int, int]) -> Path:
        return self.path / "runs" / f"{place[0]}-{place[1]}.npy"

    def _read(self, place: tuple[int, int]) -> None:
        if self._file(place).exists():
            self.outputs[place] = np.load(self._file(place))
            self._done[place] = True

    def _keep(self, place: tuple[int, int], outputs: NDArray[np.float64]) -> None:
        draft = self._file(place).with_suffix(".draft.npy")
        np.save(draft, outputs)
        os.replace(draft, self._file(place))
        self.outputs[place], self._done[place] = outputs, True

    @property
    def missing(self) -> list[tuple[int, int]]:
        """(subset, run) that have not been run."""
        return [place for place in self.plan.places if not self._done[place]]

    @property
    def keep(self) -> NDArray[np.bool_]:
        """[m, n]."""
        return self.plan.keep

    def fill(self, measure: Measure, *, workers: int = 1, progress: bool = False) -> Bank:
        """Run what is missing, one model after another or `workers` at once; each is kept as it comes.

        Errors: ShapeMismatch for outputs that are not (q,); NonFiniteValue naming the subset and the seed.
        """

        def one(place: tuple[int, int]) -> tuple[tuple[int, int], ArrayLike]:
            subset, run = place
            return place, measure(np.flatnonzero(self.keep[subset]), int(self.plan.seeds[subset, run]))

        missing = self.missing
        with ThreadPoolExecutor(workers) as pool:
            found = map(one, missing) if workers == 1 else pool.map(one, missing)
            for place, outputs in track(found, "retraining", progress, total=len(missing)):
                self._keep(place, self._checked(place, outputs))
        return self

    def fill_many(self, measure: MeasureMany, *, at_once: int = 32, progress: bool = False) -> Bank:
        """The same with models that are trained side by side, `at_once` of them."""
        missing = self.missing
        for start in track(range(0, len(missing), at_once), "retraining", progress):
            places = missing[start : start + at_once]
            subsets, runs = np.array(places).T
            found = np.asarray(measure(self.keep[subsets], self.plan.seeds[subsets, runs]), dtype=np.float64)
            if found.shape != (len(places), self.queries):
                raise ShapeMismatch(f"The outputs are {found.shape}; expected {(len(places), self.queries)}.")
            for place, outputs in zip(places, found, strict=True):
                self._keep(place, self._checked(place, outputs))
        return self

    def _checked(self, place: tuple[int, int], outputs: ArrayLike) -> NDArray[np.float64]:
        found = np.asarray(outputs, dtype=np.float64)
        where = f"subset {place[0]}, seed {int(self.plan.seeds[place])}"
        if found.shape != (self.queries,):
            raise ShapeMismatch(f"The outputs of {where} are {found.shape}; expected ({self.queries},).")
        if not np.isfinite(found).all():
            first = int(np.argmin(np.isfinite(found)))
            raise NonFiniteValue(f"The outputs of {where} are not finite, the first that of query {first}.")
        return found

    def __iter__(self) -> Iterator[NDArray[Any]]:
        """keep and outputs: `lds(scores, *bank)`. Errors: InvalidInput for a bank that is not full."""
        if self.missing:
            raise InvalidInput(f"{len(self.missing)} of {len(self.plan.places)} runs are missing; fill the bank first.")
        return iter((self.keep, self.outputs))


def _write(file: Path, content: bytes) -> None:
    draft = file.with_suffix(".draft")
    draft.write_bytes(content)
    os.replace(draft, file)
