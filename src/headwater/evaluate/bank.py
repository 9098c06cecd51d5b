"""A bank of retrained models' outputs: planned once, filled with resume, used for every method and metric.

    keep     [m, n]      bool: the train rows that each subset keeps
    seeds    [m, r]      of each run of each subset
    outputs  [m, r, q]   what was measured of each query on the model of each run; NaN where it has not been run

A bank is a folder: `recipe.json` says what was asked, `plan.npz` which rows and seeds, and `runs/` has a file for each
run that is complete, so that a bank that was stopped goes on where it was. A full bank can be packed into one file.
Banks of different recipes are never mixed. All files are sealed (`headwater.store.seal`): what is damaged, or was put
in another's place, is refused by name. A run whose file is lost is run again.
"""

from __future__ import annotations

import io
import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from headwater.errors import DamagedFile, InvalidInput, InvalidSetting, NotSaved, ShapeMismatch
from headwater.evaluate.checks import Floats, query_outputs
from headwater.positions import row_groups
from headwater.progress import track
from headwater.settings import check_whole
from headwater.store.draft import explained_errors, is_draft, remove_dead, write_new, write_whole
from headwater.store.kinds import kind_of
from headwater.store.seal import open_bytes, seal_bytes, sealed, unsealed
from headwater.types import SizedTraining

if TYPE_CHECKING:
    from headwater.store.scores import Scores

Measure = Callable[[NDArray[np.int64], int], ArrayLike]
"""(rows kept, seed) -> outputs [q] of the model trained on them."""
MeasureMany = Callable[[NDArray[np.bool_], NDArray[np.int64]], ArrayLike]
"""(masks [b, n], seeds [b]) -> outputs [b, q] of the models trained on them, many at once."""
Place = tuple[int, int]
"""(subset, run)."""
FAILURES = 3
"""Runs that may fail before no other is begun."""
RECIPE, PLAN, PACKED = "recipe.json", "plan.npz", "packed.npz"
RUN_AGAIN = "Remove it; what it held is then run again."
RECIPE_LOST = (
    "Choose another folder, or take a copy that is whole. A bank of an older version is sealed as it is by "
    "headwater.evaluate.bank.adopt(path)."
)


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
        for subset, seeds in enumerate(self.seeds):
            runs = seeds[seeds >= 0].tolist()
            if len(set(runs)) < len(runs):
                raise InvalidInput(f"Subset {subset} has the seeds {runs}: the same run twice tells nothing of noise.")

    @property
    def alpha(self) -> float:
        """The share of rows that are kept."""
        return float(self.keep.mean())

    @property
    def places(self) -> list[Place]:
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
        check_whole(name, value, least)
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
    # Without repetition: two runs of one subset with one seed would be one run.
    seeds[wanted] = rng.permutation(2**31 - 1 if wanted.sum() > 2**20 else 2**20)[: wanted.sum()]
    return Plan(keep, seeds)


def plan_removals(rows: int, groups: Sequence[Sequence[int]] | None = None, *, runs: int = 1, seed: int = 0) -> Plan:
    """All rows but those of a group, for each group (None: every row by itself); before them, once, all rows.

    Errors: InvalidInput for a mask, a row that does not exist, or a group that is empty; BatchMismatch for a row twice;
    InvalidSetting.
    """
    check_whole("rows", rows, 2)
    check_whole("runs", runs, 1)
    chosen = row_groups(groups, rows)
    keep = np.ones((1 + len(chosen), rows), dtype=bool)
    for mask, group in zip(keep[1:], chosen, strict=True):
        mask[group] = False
    return Plan(keep, np.random.default_rng(seed).permutation(2**20)[:runs][None].repeat(len(keep), 0))


def retrain(
    path: str | os.PathLike[str],
    train: Callable[[NDArray[np.int64], int], Any],
    measure: Callable[[Any], ArrayLike] | None = None,
    *,
    rows: int,
    queries: int,
    recipe: Mapping[str, object],
    alpha: float = 0.5,
    subsets: int = 100,
    runs: int = 1,
    repeated: int = 20,
    seed: int = 0,
    workers: int = 1,
    processes: bool = False,
    progress: bool = True,
) -> Bank:
    """A full bank of models that were trained on random subsets of the rows; goes on where it was stopped.

    train: (indices of the rows kept, seed) -> model. measure: (model) -> outputs [queries], losses unless the recipe
    says otherwise; None if `train` returns the outputs itself. recipe: what else decides the outputs, as JSON has it
    (data, architecture, steps, ...); another recipe needs another folder. alpha, subsets, runs, repeated, seed: see
    `plan_subsets`. workers, processes: see `Bank.fill`. Errors: those of `Bank.fill`.
    """
    check_rows(train, rows)
    plan = plan_subsets(rows, alpha=alpha, subsets=subsets, runs=runs, repeated=repeated, seed=seed)
    bank = Bank(path, plan, queries, recipe)
    return bank.fill(
        partial(_train_and_measure, train, measure), workers=workers, processes=processes, progress=progress
    )


def check_rows(train: object, rows: int) -> None:
    """Errors: BatchMismatch, of a training that knows how many rows it has."""
    if isinstance(train, SizedTraining):
        train.check_rows(rows)


def _train_and_measure(
    train: Callable[[NDArray[np.int64], int], Any],
    measure: Callable[[Any], ArrayLike] | None,
    rows: NDArray[np.int64],
    seed: int,
) -> ArrayLike:
    model = train(rows, seed)
    return model if measure is None else measure(model)


class Bank:
    """Outputs of retrained models, in a folder.

    plan: what is to be run. queries: how many outputs a model has. recipe: all else that decides the outputs (model,
    data, steps, what is measured), JSON values. Errors: InvalidInput if the folder holds another bank, which names what
    differs, and for a recipe that is not JSON.
    """

    def __init__(self, path: str | os.PathLike[str], plan: Plan, queries: int, recipe: Mapping[str, Any]):
        check_whole("queries", queries, 1)
        self.path, self.plan, self.queries = Path(path), plan, int(queries)
        try:
            self.recipe = json.loads(json.dumps(dict(recipe), allow_nan=False))
        except (TypeError, ValueError) as error:
            raise InvalidInput(f"The recipe must be JSON (text, finite numbers, lists, dicts): {error}") from error
        self._digest = self._check()
        self._keep_plan()
        self.outputs = np.full((*plan.seeds.shape, self.queries), np.nan)
        """[m, r, q]."""
        self._done = np.zeros(plan.seeds.shape, dtype=bool)
        self._read_packed()
        for place in plan.places:
            self._read(place)

    def __repr__(self) -> str:
        subsets, rows = self.plan.keep.shape
        runs = f"{int(self._done.sum())} of {len(self.plan.places)} runs done"
        return f"Bank({str(self.path)!r}: {subsets} subsets of {rows} rows, {runs}, {self.queries} queries)"

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """The bank in a folder, whatever its recipe. Errors: NotSaved; DamagedFile; InvalidInput if it is no bank."""
        file = Path(path) / RECIPE
        if not file.exists():
            raise NotSaved(f"{path} holds no bank: there is no {file.name} in it{kind_of(Path(path))}.")
        asked, seal = unsealed(file, remedy=RECIPE_LOST)
        if not {"recipe", "rows", "queries"} <= asked.keys():
            raise InvalidInput(f"{file} is no recipe of a bank: it has {sorted(asked)}.")
        remedy = "Open the bank with its plan, Bank(path, plan, ...), which writes it again."
        kept = _loaded(Path(path) / PLAN, f"{seal['digest']}/{PLAN}", remedy)
        plan = Plan(np.unpackbits(kept["keep"], axis=1, count=int(asked["rows"])).astype(bool), kept["seeds"])
        return cls(path, plan, asked["queries"], asked["recipe"])

    def _check(self) -> str:
        """The digest of the recipe, to which all other files belong."""
        asked = {
            "recipe": self.recipe,
            "rows": int(self.plan.keep.shape[1]),
            "subsets": len(self.plan.keep),
            "queries": self.queries,
            "alpha": self.plan.alpha,
            # The masks themselves are in another file: a bank is refused for another plan without reading it.
            "plan": zlib.crc32(self.plan.keep.tobytes() + self.plan.seeds.astype(np.int64).tobytes()),
        }
        file = self.path / RECIPE
        if not file.exists():
            found = self.path.iterdir() if self.path.exists() else ()
            if any(each.name != PLAN and not is_draft(each.name) for each in found):
                raise InvalidInput(f"{self.path} is not empty and holds no bank; choose another folder.")
            with explained_errors(self.path):
                self.path.mkdir(parents=True, exist_ok=True)
            write_new(file, json.dumps(sealed(asked), indent=1).encode())
        known, seal = unsealed(file, remedy=RECIPE_LOST)
        different = [name for name in asked if known.get(name) != asked[name]]
        if different:
            said = "; ".join(f"{name} was {known.get(name)!r}, now {asked[name]!r}" for name in different)
            raise InvalidInput(f"{self.path} is a bank of another recipe: {said}. Choose another folder.")
        for folder in (self.path, self.path / "runs"):
            remove_dead(folder)
        return str(seal["digest"])

    def _keep_plan(self) -> None:
        """Beside the recipe, for `open`; again where it was lost."""
        try:
            open_bytes(self.path / PLAN, self._place(PLAN), "")
        except DamagedFile:
            self._write(PLAN, keep=np.packbits(self.plan.keep, axis=1), seeds=self.plan.seeds)

    def _place(self, name: str) -> str:
        """Where a file belongs: it cannot be another bank's, or another run's."""
        return f"{self._digest}/{name}"

    def _write(self, name: str, **arrays: NDArray[Any]) -> None:
        content = io.BytesIO()
        np.savez_compressed(content, allow_pickle=False, **arrays)
        write_whole(self.path / name, seal_bytes(content.getvalue(), self._place(name)))

    def _file(self, place: Place) -> Path:
        return self.path / _run_name(place)

    def _read_packed(self) -> None:
        file = self.path / PACKED
        if file.exists():
            packed = _loaded(file, self._place(PACKED), RUN_AGAIN)
            shapes = {name: np.shape(packed.get(name)) for name in ("done", "outputs")}
            if shapes != {"done": self._done.shape, "outputs": self.outputs.shape}:
                raise InvalidInput(f"{file} has {shapes}; expected outputs {self.outputs.shape}, and which are done.")
            for place in map(tuple, np.argwhere(packed["done"])):
                self._take(place, packed["outputs"][place], file)

    def _read(self, place: Place) -> bool:
        """Whether the run is there, from now on in memory too."""
        file = self._file(place)
        if not file.exists():
            return False
        self._take(place, _loaded(file, self._place(_run_name(place)), RUN_AGAIN), file)
        return True

    def _take(self, place: Place, outputs: ArrayLike, file: Path) -> None:
        self.outputs[place] = query_outputs(outputs, self.queries, f"outputs of {self._name(place)} in {file}")
        self._done[place] = True

    def _keep(self, place: Place, outputs: Floats) -> None:
        with explained_errors(self.path):
            self._file(place).parent.mkdir(exist_ok=True)
        content = io.BytesIO()
        np.save(content, outputs, allow_pickle=False)
        write_whole(self._file(place), seal_bytes(content.getvalue(), self._place(_run_name(place))))
        self.outputs[place], self._done[place] = outputs, True

    @property
    def missing(self) -> list[Place]:
        """(subset, run) that have not been run."""
        return [place for place in self.plan.places if not self._done[place]]

    @property
    def keep(self) -> NDArray[np.bool_]:
        """[m, n]."""
        return self.plan.keep

    def fill(self, measure: Measure, *, workers: int = 1, processes: bool = False, progress: bool = False) -> Self:
        """Run what is missing, one model after another or `workers` at once; each is kept as it comes.

        processes: the workers are fresh processes, not threads; then `measure` must be picklable, and a script must
        start under `if __name__ == "__main__"`. Threads share generators: a training that draws from a global one
        (torch.manual_seed, numpy.random.seed) is not reproducible in threads; use processes.
        A run that fails is passed over; the error of the first is raised in the end, or after the third, with a note
        that names the subset and the seed. What others found is kept.
        Errors: ShapeMismatch for outputs that are not (q,); NonFiniteValue naming the subset and the seed;
        BatchMismatch where `measure` is of another number of rows and knows it, as headwater.sklearn.Refit does.
        """
        check_whole("workers", workers, 1)
        check_rows(measure, self.keep.shape[1])
        self._read_packed()
        # Another process may have run some since.
        # A generator: looked up only when a worker is free, as runs of other processes come in meanwhile.
        jobs = ((place, self._job(measure, place)) for place in self.missing if not self._read(place))
        pool: Executor = _Here() if workers == 1 else ThreadPoolExecutor(workers)
        if processes and workers > 1:
            # Not fork: threads of torch and JAX do not survive it.
            pool = ProcessPoolExecutor(workers, get_context("spawn"))
        with pool:
            found = _as_they_come(pool, workers, jobs)
            for place, outputs in track(found, "retraining", progress, total=len(self.missing)):
                self._keep(place, outputs)
        return self

    def _job(self, measure: Measure, place: Place) -> Callable[[], Floats]:
        rows, seed = np.flatnonzero(self.keep[place[0]]), int(self.plan.seeds[place])
        return partial(_run, measure, rows, seed, self.queries, self._name(place))

    def fill_many(self, measure: MeasureMany, *, at_once: int = 32, progress: bool = False) -> Self:
        """The same with models that are trained side by side, `at_once` of them.

        Errors: ShapeMismatch; NonFiniteValue naming the subset and the seed, after the others were kept.
        """
        check_whole("at_once", at_once, 1)
        missing = self.missing
        for start in track(range(0, len(missing), at_once), "retraining", progress):
            places = missing[start : start + at_once]
            subsets, runs = np.array(places).T
            found = np.asarray(measure(self.keep[subsets], self.plan.seeds[subsets, runs]), dtype=np.float64)
            if found.shape != (len(places), self.queries):
                raise ShapeMismatch(f"The outputs are {found.shape}; expected {(len(places), self.queries)}.")
            broken = ~np.isfinite(found).all(axis=1)
            for k in np.argsort(broken, kind="stable"):  # first what can be kept
                self._keep(places[k], query_outputs(found[k], self.queries, f"outputs of {self._name(places[k])}"))
        return self

    def pack(self) -> Self:
        """All runs in one file, for keeping; a bank can be packed again after more runs."""
        self._read_packed()
        for place in self.plan.places:
            self._read(place)
        self._write(PACKED, outputs=self.outputs, done=self._done)
        for place in self.plan.places:
            # Only after the packed file is whole and on disk.
            self._file(place).unlink(missing_ok=True)
        remove_dead(self.path / "runs")
        with suppress(OSError):  # another process may be writing
            (self.path / "runs").rmdir()
        return self

    def attribution(
        self,
        method: str = "ridge",
        *,
        subsets: Sequence[int] | ArrayLike | None = None,
        penalty: float | None = None,
        explained: str = "loss",
        seed: int = 0,
    ) -> Scores:
        """Which rows decide the outputs, of any model that can be trained again: hw.Scores with `errors`, [q, n].

        method: "banzhaf", a row's mean output without it minus with it; "ridge" or "lasso", a linear model of the
        outputs on the masks, whose penalty is chosen by subsets left out (see `headwater.evaluate.datamodels`). Where
        all subsets have one size, scores are of the unit "replacement": a row in place of another at random.
        subsets: positions of those that are used, so that others can judge, `lds(scores, keep[rest], outputs[rest])`;
        None for all that were run. penalty: in place of one that is chosen. explained: what the outputs are, if no
        loss. seed: of a lasso's folds.
        Errors: InvalidInput for fewer than 4 subsets, for one that was not run, and of "banzhaf" for a row that fewer
        than two subsets keep or leave out; InvalidSetting.
        """
        from headwater.evaluate.attributed import attribution

        options: dict[str, Any] = {"subsets": subsets, "penalty": penalty, "explained": explained, "seed": seed}
        return attribution(self.keep, self.outputs, method, **options)

    def _name(self, place: Place) -> str:
        return f"subset {place[0]}, seed {int(self.plan.seeds[place])}"

    def __iter__(self) -> Iterator[NDArray[Any]]:
        """keep and outputs: `lds(scores, *bank)`. Errors: InvalidInput for a bank that is not full."""
        if self.missing:
            raise InvalidInput(f"{len(self.missing)} of {len(self.plan.places)} runs are missing; fill the bank first.")
        return iter((self.keep, self.outputs))


def _run(measure: Measure, rows: NDArray[np.int64], seed: int, queries: int, name: str) -> Floats:
    """One run's outputs [q]; what goes wrong in it says which run it was."""
    try:
        found = measure(rows, seed)
    except Exception as error:
        # A note, not another error: the training's own traceback is what the user needs.
        error.add_note(f"Raised by {name} of the bank; other runs are kept.")
        raise
    return query_outputs(found, queries, f"outputs of {name}")


def _as_they_come(
    pool: Executor, workers: int, jobs: Iterator[tuple[Place, Callable[[], Floats]]]
) -> Iterator[tuple[Place, Floats]]:
    """The jobs' results, whichever is ready first. In the end, or after FAILURES, what failed first is raised."""
    running: dict[Future[Floats], Place] = {}
    failed: list[BaseException] = []
    while True:
        # As many as there are workers: a queue of all jobs would hold all their rows.
        for place, job in islice(jobs, workers - len(running) if len(failed) < FAILURES else 0):
            running[pool.submit(job)] = place
        if not running:
            break
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            place, error = running.pop(future), future.exception()
            if error is None:
                yield place, future.result()
            else:
                failed.append(error)
    if failed:
        raise failed[0]


class _Here(Executor):
    """One worker: this thread."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


def _run_name(place: Place) -> str:
    return f"runs/{place[0]}-{place[1]}.npy"


def _loaded(file: Path, place: str, remedy: str) -> Any:
    """An array, or a dict of arrays. Errors: DamagedFile, naming the file, where it is not what was written here."""
    found = np.load(io.BytesIO(open_bytes(file, place, remedy)), allow_pickle=False)
    return found if isinstance(found, np.ndarray) else dict(found)


def adopt(path: str | os.PathLike[str]) -> None:
    """Seal a bank that was filled before there were seals, as it is: nothing tells whether its files are whole.

    Runs can be expensive; a bank that is read on and on should be adopted once, and watched from then on. Errors:
    NotSaved; InvalidInput for a bank that is sealed already, or a file that NumPy cannot read.
    """
    folder = Path(path)
    recipe = folder / RECIPE
    if not recipe.exists():
        raise NotSaved(f"{path} holds no bank: there is no {recipe.name} in it.")
    contents = {}
    try:
        asked = dict(json.loads(recipe.read_bytes()))
        for name in (PLAN, PACKED, *(f"runs/{file.name}" for file in sorted((folder / "runs").glob("*.npy")))):
            if (folder / name).exists():
                contents[name] = (folder / name).read_bytes()
                read = np.load(io.BytesIO(contents[name]), allow_pickle=False)
                _ = read if isinstance(read, np.ndarray) else dict(read)
    except Exception as error:  # whatever damage makes NumPy raise
        raise InvalidInput(f"{folder} cannot be read as a bank: {error}") from error
    if "seal" in asked:
        raise InvalidInput(f"{folder} is sealed already.")
    closed = sealed(asked)
    for name, content in contents.items():
        write_whole(folder / name, seal_bytes(content, f"{closed['seal']['digest']}/{name}"))
    # Last: until then the folder is an unsealed bank, and can be adopted again.
    write_whole(recipe, json.dumps(closed, indent=1).encode())
