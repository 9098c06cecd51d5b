"""A fit and its scores on a dask cluster: one future for each tile, in folders that all workers see.

    from headwater.run.runners.dask import DaskRun

    run = DaskRun(client, "job:setup", "results")      # setup() -> influence, train, query
    run.fit()
    scores = run.attribute(memory="2GiB")

1. Each process of the cluster calls the setup once. Through the scheduler go numbers of tiles and digests of rows, no
   tensors.
2. Tiles are pure and written whole: a future that is computed again, after its worker was lost, finds what is there.
3. At the end one worker makes the plain call, which reads all rows once, checks them, and computes what may be missing.

Workers have one thread each, best, and read the loader from tile to tile: tiles come in order, so that each worker
reads the rows once in a pass.
"""

from __future__ import annotations

import os
import secrets
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from headwater.errors import InvalidInput
from headwater.influence import ComposableInfluence
from headwater.loaders.places import Place, located
from headwater.rows import PlacedBatch, Read, Rows, Visitor, first_batch, fold, sweep
from headwater.run.attribute import PairRun, Storage
from headwater.run.diagnosis import RunSums
from headwater.run.queries import Asked
from headwater.run.runners.shared import ROWS, SharedFolder, on_host, rows_of, shared_folder
from headwater.run.runners.turns import Turn
from headwater.run.tiles import QuerySpan, TilePass, Tiles, probe_run
from headwater.store.score_matrix import unit_of
from headwater.store.scores import Scores
from headwater.types import InfluenceMode

Make = Callable[[], tuple[ComposableInfluence[Any], Iterable[object], Iterable[object]]]
Done = Mapping[str, Sequence[Turn]]
"""The tiles of each pass of a fit that is complete, by its label."""
DEFAULTS = {"unit": "influence", "by_block": False, "mode": "up", "memory": None, "explain": "label", "normalise": None}
"""Of `attribute`."""
TRIES = 3
"""Times that tiles are sent out again when the workers that were at them died."""


class DaskRun:
    """A job on the workers of a `dask.distributed.Client`.

    setup: a function without arguments that gives (influence, train, query), or the name of one, "module:function";
    called once in each process. folder: where sums of the fit ("fit") and scores ("scores") are
    kept; every worker sees it under this name, and so does this process.
    """

    def __init__(self, client: Any, setup: Make | str, folder: str | os.PathLike[str]):
        self.client, self.setup, self.folder = client, setup, os.fspath(folder)
        self.token = secrets.token_hex(4)
        self.done: dict[str, Sequence[Turn]] = {}

    def fit(self) -> None:
        """All sums of the fit, each by one worker; a call that is made again goes on where one was stopped."""
        tiles = range(self._one(_count, ROWS))
        while True:
            found = self._all(_fit_tile, [(self.done, number) for number in tiles])
            if any(each is None for each in found):
                return
            labels = {label for label, _ in found}
            if len(labels) > 1:
                raise InvalidInput(f"Workers are at different passes, {sorted(labels)}: they see different rows.")
            self.done = {**self.done, labels.pop(): [turn for _, turn in found]}

    def attribute(self, **options: Any) -> Scores:
        """All scores; options as of `Attributor.attribute`, without store and worker."""
        if not self.done:
            self.fit()
        numbers, spans = self._one(_open_scores, self.done, options)
        self._all(_score_tile, [(self.done, options, n, span) for span in range(spans) for n in range(numbers)])
        self.client.run(_keep_sums, self.token)
        self._one(_finish, self.done, options)
        return Scores.open(Path(self.folder) / "scores")

    def _one(self, task: Callable[..., Any], *given: Any) -> Any:
        return self._all(task, [given])[0]

    def _all(self, task: Callable[..., Any], given: Sequence[tuple[Any, ...]]) -> list[Any]:
        """The results in order. A task whose worker is lost is given out again, also after it has killed several."""
        from distributed import KilledWorker

        for attempt in range(TRIES):
            futures = [
                self.client.submit(
                    _on_worker, task, self.token, self.setup, self.folder, each, pure=False, priority=-number
                )
                for number, each in enumerate(given)
            ]
            try:
                found: list[Any] = self.client.gather(futures)
                return found
            except KilledWorker:
                if attempt == TRIES - 1:
                    raise
        raise AssertionError("unreachable")


# On the workers -------------------------------------------------------------------------------------------------------

_JOBS: dict[str, _Job] = {}
_LOCK = threading.RLock()


def _on_worker(task: Callable[..., Any], token: str, setup: Make | str, folder: str, given: tuple[Any, ...]) -> Any:
    # A model is computed with by one thread at a time.
    with _LOCK:
        if token not in _JOBS:
            _JOBS[token] = _Job.made(setup, Path(folder))
        return task(_JOBS[token], *given)


def _count(job: _Job, step: int) -> int:
    return -(-job.influence.train_rows(job.train).count() // step)


def _fit_tile(job: _Job, done: Done, number: int) -> tuple[str, Turn] | None:
    """The pass that is being made, and what its tile is computed from; None once the fit is complete."""
    try:
        job.fit(done, number)
    except _OneTileDone as found:
        return found.label, found.turn
    return None


def _open_scores(job: _Job, done: Done, options: Mapping[str, Any]) -> tuple[int, int]:
    """How many tiles of rows there are, and how many spans of queries."""
    store, spans = job.scores(done, options)
    return _count(job, store.sizes.rows), len(spans)


def _score_tile(job: _Job, done: Done, options: Mapping[str, Any], number: int, span: int) -> None:
    store, spans = job.scores(done, options)
    if store.whole_line(number, span) is not None:
        return
    tiles = TilePass(job.influence, store, spans[span], lambda *_: True, False, job.sums, None)
    tiles.expected = None  # some of the rows are all that it meets
    size = store.sizes.rows
    job.rows.runner = lambda visitor, read, _: fold(visitor, job.onward.tile(f"scores {span}", number, size, read))
    try:
        with job.influence.source.own_precision(), located():
            sweep(job.influence.provider, job.rows, tiles, "train scores")
    finally:
        tiles.leave()


def _keep_sums(token: str) -> None:
    """What a process added up of gradients, for whoever brings the run to its end."""
    with _LOCK:
        job = _JOBS.get(token)
        if job is not None and job.sums is not None:
            job.sums.keep()


def _finish(job: _Job, done: Done, options: Mapping[str, Any]) -> None:
    job.scores(done, options)
    job.run(options).stored(job.train)


class _OneTileDone(Exception):
    """A tile of a pass is there; what comes after the pass has to wait for the others."""

    def __init__(self, label: str, turn: Turn):
        super().__init__(label)
        self.label, self.turn = label, turn


@dataclass
class _Onward:
    """Passes that are read from tile to tile, as far as they are asked for."""

    passes: dict[str, Iterator[tuple[int, Iterator[PlacedBatch]]]] = field(default_factory=dict)
    at: dict[str, int] = field(default_factory=dict)

    def tile(self, label: str, number: int, rows: int, read: Read) -> list[PlacedBatch]:
        """The pieces of a tile; reading begins anew for one that is behind."""
        if label not in self.passes or self.at[label] > number:
            self.passes[label] = groupby(read(), key=lambda piece: piece.start // rows)
        for at, pieces in self.passes[label]:
            self.at[label] = at + 1
            if at == number:
                return list(pieces)
        del self.passes[label]
        raise InvalidInput(f"The train loader has no tile {number}: it gives fewer rows than when it was counted.")


class _OneTile(SharedFolder):
    """A runner that computes one tile of the first pass that is not complete, and stops there."""

    def __init__(self, folder: SharedFolder, onward: _Onward):
        super().__init__(folder.store, folder.like)
        self.onward, self.number = onward, 0
        self.done: Done = {}
        self._wholes: dict[str, Mapping[str, Any]] = {}

    def prepare(self, done: Done, number: int) -> None:
        """What is complete, and the number of the tile to compute."""
        self.done, self.number = done, number

    def complete(self, visitor: Visitor[Any, Any, Any], read: Read, label: str) -> Sequence[Turn]:
        if label in self.done:
            return self.done[label]
        pieces = self.onward.tile(label, self.number, ROWS, read)
        name, rows = f"{label}/{self.number}", self.digest(b"".join(map(rows_of, pieces)))
        if self.store.read(name, rows) is None:
            self.keep(visitor, name, rows, fold(visitor, pieces))
        raise _OneTileDone(label, Turn(name, rows))

    def merged(self, visitor: Visitor[Any, Any, Any], tiles: Sequence[Turn], label: str) -> Any:
        """Once in a process."""
        if label not in self._wholes:
            whole = visitor.pack(super().merged(visitor, tiles, label))
            self._wholes[label] = {name: on_host(value) for name, value in whole.items()}
        return self.unpacked(visitor, self._wholes[label])


class _Job:
    """What a process of the cluster has of the job."""

    def __init__(
        self, influence: ComposableInfluence[Any], train: Iterable[object], query: Iterable[object], folder: Path
    ) -> None:
        self.influence, self.train, self.query, self.folder = influence, train, query, folder
        self.onward = _Onward()
        self.runner = _OneTile(shared_folder(influence, folder / "fit", train), self.onward)
        self.rows: Rows = influence.train_rows(train)
        self.sums: RunSums | None = None
        self._fitted = False
        self._scores: tuple[Tiles, Sequence[QuerySpan]] | None = None

    @classmethod
    def made(cls, setup: Make | str, folder: Path) -> _Job:
        made: Make = resolve_name(setup) if isinstance(setup, str) else setup
        return cls(*made(), folder)

    def fit(self, done: Done, number: int) -> None:
        """Errors: _OneTileDone unless every pass is complete."""
        if not self._fitted:
            self.runner.prepare(done, number)
            self.influence.fit(self.train, runner=self.runner, tile=ROWS)
            self._fitted, self.rows = True, self.influence.train_rows(self.train)

    def run(self, options: Mapping[str, Any]) -> PairRun:
        """All scores, as `Attributor.attribute` would compute them."""
        known: dict[str, Any] = {**DEFAULTS, **options}
        storage, mode = Storage(self.folder / "scores", known["memory"]), InfluenceMode(known["mode"])
        asked = Asked.of(self.influence, self.influence.query_rows(self.query), known["explain"])
        unit = unit_of(known["unit"], known["normalise"])
        return PairRun(self.influence, asked, unit, known["by_block"], mode, storage, False)

    def scores(self, done: Done, options: Mapping[str, Any]) -> tuple[Tiles, Sequence[QuerySpan]]:
        """The store, and spans of queries; the model is known by its probe, in every process."""
        self.fit(done, 0)
        if self._scores is None:
            influence = self.influence
            run = self.run(options)
            store = run.store(self.rows)
            spans = run.spans(store)
            first = first_batch(influence.provider, self.rows)
            placed = PlacedBatch(first, Place("train", 0, 0, len(first)), None)
            probe_run(influence, store, spans[0], placed, run.tolerance(store, spans))
            self.rows.tile = store.sizes.rows
            self.sums = run.sums(self.rows, store)
            self._scores = store, spans
        return self._scores
