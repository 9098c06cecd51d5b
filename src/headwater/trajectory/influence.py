"""Scores of what training did, with the verbs that all influences have.

A sweep makes the scores of all train rows on some queries at once, where other methods make query factors that meet
train gradients: it is a scorer of its own, and queries, tiles, stores, units and rankings are those of every run.
"""

from __future__ import annotations

import math
import os
import shutil
import warnings
import zlib
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from headwater.attributor import Attributor
from headwater.errors import InvalidInput, InvalidSetting, NotFittedError, RoughForecast, StaleFit
from headwater.gradients.provider import StructuredGradientProvider
from headwater.influence import in_own_precision
from headwater.progress import bar
from headwater.rows import PlacedBatch
from headwater.run.attribute import Storage, self_influence
from headwater.run.queries import Asked
from headwater.run.rows import check_scores
from headwater.run.runners.environment import Worker
from headwater.run.tiles import Scorer
from headwater.status import Status
from headwater.store.scores import Scores, TopK
from headwater.tables import table
from headwater.trajectory.methods import Source, TrajectoryMethod, Unrolled
from headwater.trajectory.replay import Replay, known_stretches
from headwater.trajectory.rows import HeldRows
from headwater.trajectory.source import Segment, SourceScorer, fit_segments, spans
from headwater.trajectory.steps import Blocks, TrainingModel
from headwater.trajectory.sweep import Sweep
from headwater.trajectory.trajectory import Trajectory
from headwater.trajectory.verdict import Verdict, judge
from headwater.types import InfluenceMode, TensorType

if TYPE_CHECKING:
    from headwater.run.attribute import MakeScorer


EACH = 1.25
"""Trainings that a sweep costs for each row that is asked."""
NO_LENGTH = (
    "normalise=: a direction is a score over a row's length, the root of its influence on itself, and here that is no "
    "squared length. A training that has not converged answers a row by no symmetric and positive operator: a row's "
    "influence on itself may be negative, and no metric has both a query's gradient at the end and a row's at its "
    "steps. Directions are those of an inverse: hw.Ekfac() or hw.Dual() with normalise=. For a ranking by relative "
    "influence divide by the root of self_influence(rows) yourself, where that is above zero"
)


class TrajectoryInfluence(Attributor[TensorType]):
    """An influence whose method is `hw.Unrolled` or `hw.Source`: mixed into the framework's class.

    fit(train) takes all rows that were trained on, called as in the record, and holds them in memory. The model is the
    one that training came to. What needs an inverse or a gradient of its own (calibrate, audit, kept gradients and
    factors, normalise=) is refused.
    """

    method: TrajectoryMethod
    _held: HeldRows | None = None
    _segments: list[Segment] | None = None
    _verdict: Verdict | None = None

    @abstractmethod
    def training_model(self) -> TrainingModel:
        """The provider's model, as its steps are taken again."""

    @abstractmethod
    def weights_now(self) -> dict[str, np.ndarray]:
        """The parameters of the provider's model, by name, whether or not its steps can be taken again."""

    def statistics_now(self) -> dict[str, np.ndarray]:
        """Buffers of the provider's model, by name."""
        return {}

    @abstractmethod
    def provider_at(self, parameters: Mapping[str, np.ndarray]) -> StructuredGradientProvider:
        """A provider of the same model at other parameters."""

    def fit(self, loader: Any, *others: object, progress: bool = False, **options: Any) -> Self:
        """Hold the rows that were trained on. Errors: BatchMismatch for rows of the record that are not there."""
        if options:
            raise InvalidSetting(f"{', '.join(options)}: nothing is summed over rows here that could be shared.")
        super().fit(loader, *others, progress=progress)
        held = HeldRows.of(self.provider, self.train_rows(loader), progress)
        held.check(self.method.trajectory)
        self._held = held
        self._check_end()
        if isinstance(self.method, Source):
            spans(self.method.trajectory, self.method.segments, self.method.checkpoints)  # refused before any step
            if self.method.replay and known_stretches(self.method.trajectory):
                self.replay().verify(len(held))
            self._segments = fit_segments(self.provider_at, self.method, self.train_rows(loader), progress)
        else:
            self.training_model()  # refused now where its steps cannot be taken again
        return self

    @property
    def segments(self) -> list[Segment]:
        """Of hw.Source, in the order of training. Errors: NotFittedError."""
        if self._segments is None:
            raise NotFittedError("Call fit(loader) first.")
        return self._segments

    @property
    def held(self) -> HeldRows:
        """The train rows. Errors: NotFittedError."""
        if self._held is None:
            raise NotFittedError("Call fit(loader) first.")
        return self._held

    @property
    def status(self) -> Status:
        """The record, the segments of hw.Source, and the verdict on the last scores: there is no damping to show."""
        found = super().status
        said = [repr(self.method.trajectory), f"{len(self.held)} rows held"]
        if self._segments is not None:
            cells = [["segment", "steps", "states used, before steps", "rates, summed"]]
            cells += [segment.cells(number) for number, segment in enumerate(self._segments)]
            said += ["", table(cells)]
        elif self._verdict is not None:
            said += ["", str(self._verdict)]
        return replace(found, instead="\n".join(said))

    @property
    def doubts(self) -> tuple[str, ...]:
        return () if self._verdict is None else self._verdict.doubts

    @property
    def verdict(self) -> Verdict | None:
        """Whether training was smooth enough for its derivative to forecast anything; of the last scores."""
        return self._verdict

    def sweep(self, model: TrainingModel | None = None, blocks: Blocks = None) -> Sweep:
        """Over the record's training, with the method's settings. model: another than the provider's own."""
        method = self.method
        assert isinstance(method, Unrolled)
        held, at_each_step = self.held, method.at == "step"
        return Sweep(self.replay(model), held.columns, len(held), method.curvature, at_each_step, held.places, blocks)

    @property
    def parts(self) -> Blocks:
        """Names of the record's parameters, block by block."""
        trained = set(self.method.trajectory.names)
        layouts = self.provider.layouts
        return tuple(
            tuple(p.name for p in layouts[name].block.parameters if p.name in trained) for name in self.block_names
        )

    def replay(self, model: TrainingModel | None = None) -> Replay:
        """The record's steps, by the provider's model or another."""
        own, record = self.training_model() if model is None else model, self.method.trajectory
        return Replay(record, own, self.held.pieces, dtype=self.source.dtype, checked=model is None)

    def derivatives(
        self, asked: Asked, keep: Path | None, progress: bool, by_block: bool = False, judged: bool = True
    ) -> np.ndarray:
        """d query / d weight of every train row: [block, q, n], or [1, q, n].

        judged: and the verdict on it, where the method asks for one.
        """
        sweep, queries = self.sweep(blocks=self.parts if by_block else None), [piece.batch for piece in asked.pieces]
        count = len(asked.ids) if asked.share is None else 1
        with bar("training, backwards", progress, sweep.steps_for(count)) as shown:
            tau = sweep.tau(queries, share=asked.share, keep=keep, progress=shown.update)
        method = self.method
        assert isinstance(method, Unrolled)
        tau = tau if by_block else tau[None]
        if (
            judged and method.removals and self._verdict is None
        ):  # of several spans of queries, the first speaks for all
            model = sweep.replay.model.wide()
            wide = None if model is None else self.sweep(model)
            total = len(method.removals) * method.replays
            with bar("verdict, trainings without some rows", progress, total) as shown:
                self._verdict = judge(
                    replace(sweep, blocks=None),
                    queries,
                    tau.sum(axis=0),
                    method.removals,
                    method.replays,
                    share=asked.share,
                    wide=wide,
                    progress=shown.update,
                )
        return tau

    def _check_end(self) -> None:
        """Errors: InvalidInput for blocks that leave parameters out; StaleFit for a model of another training."""
        record = self.method.trajectory
        shapes = {p.name: tuple(p.shape) for layout in self.provider.layouts.values() for p in layout.block.parameters}
        if {name: shapes.get(name) for name in record.names} != dict(record.header.shapes):
            missing = [name for name in record.names if shapes.get(name) != record.header.shapes[name]]
            raise InvalidInput(
                f"The record has parameters that the model has not, or in another shape: {missing[:4]}. Give the model "
                "that was trained, and blocks that hold all of it."
            )
        last = record.state(record.steps).parameters
        for name, value in self.weights_now().items():
            if name in last and not np.allclose(value, last[name], rtol=1e-5, atol=1e-7):
                far = float(np.abs(value - last[name]).max())
                raise StaleFit(
                    f"{name} of the model is off by {far:.3g} from where the record's training ended (step "
                    f"{record.steps}). {_whose(record)}"
                )

        now = self.statistics_now()
        for name, value in record.statistics.items():
            if name not in now or not np.allclose(now[name], value, rtol=1e-5, atol=1e-7):
                raise StaleFit(
                    f"{name} of the model is not what it was in training, where this batch normalisation was frozen: "
                    "its statistics were moved since. Give the model that was trained, as it was."
                )

    # Scores -------------------------------------------------------------------------------------------------------

    @property
    def _own_scorer(self) -> MakeScorer:
        if isinstance(self.method, Source):
            return lambda asked, scale, storage, progress, by_block: SourceScorer(
                self, self.segments, _not_kept(asked), scale, by_block
            )
        return lambda asked, scale, storage, progress, by_block: SweepScorer(
            self, _not_kept(asked), scale, storage, progress, by_block
        )

    def attribute(
        self,
        train_loader: Iterable[object],
        query_loader: Iterable[object],
        *,
        by_block: bool = False,
        mode: InfluenceMode | str = InfluenceMode.Up,
        store: str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> Scores:
        """As `Attributor.attribute`; a sweep that was stopped goes on from the last kept state, beside the store.

        by_block: what a row did to the query through its gradient in each block alone: the derivative of the query by a
        weight on that part of the row's gradient, in every step that saw the row (of hw.Source, in every segment),
        while what it moved goes on through the training of all parameters. The blocks sum to the whole. Of
        hw.Unrolled, at a backward pass more for each block, query and step.
        """
        if InfluenceMode(mode) is not InfluenceMode.Up:
            raise _refused("mode='perturbation'")
        _refuse_options(options)
        self._verdict = None
        found = super().attribute(train_loader, query_loader, by_block=by_block, store=store, **options)
        if store is not None:
            shutil.rmtree(_beside(Path(store)), ignore_errors=True)
        _tell(() if found.diagnosis is None else found.diagnosis.doubts)
        return found

    def top(self, train_loader: Iterable[object], query_loader: Iterable[object], k: int = 5, **options: Any) -> TopK:
        """As `Attributor.top`."""
        _refuse_options(options)
        self._verdict = None
        found = super().top(train_loader, query_loader, k, **options)
        _tell(self.doubts)
        return found

    def report(self, train_loader: Any, query_loader: Any, path: Any, **options: Any) -> Any:
        """As `Attributor.report`, without what is refused here."""
        if options.get("scores") is None:
            explain = options.get("explain", "label")
            options["scores"] = self.attribute(train_loader, query_loader, unit="removal", explain=explain)
        options |= {"self_influence": False, "verify": False}
        return super().report(train_loader, query_loader, path, **options)

    def removal(
        self, train_loader: Iterable[object], query_loader: Iterable[object], groups: Any = None, **options: Any
    ) -> np.ndarray:
        """The rise of each query's loss when a row, or a group, is left out of training, to first order: [q, n]."""
        scores = self.attribute(train_loader, query_loader, unit="removal", **options)
        values = np.asarray(scores)
        if groups is None:
            return values
        places = {name: place for place, name in enumerate(scores.train_ids.tolist())}
        return np.stack([values[:, [places[row] for row in np.asarray(group).tolist()]].sum(1) for group in groups], 1)

    @in_own_precision
    def self_influence(
        self,
        train_loader: Iterable[object],
        *,
        trainings: float = 100.0,
        store: str | os.PathLike[str] | None = None,
        memory: int | str | None = None,
        worker: Worker = (0, 1),
        append: bool = False,
        progress: bool = False,
    ) -> np.ndarray:
        """The score of each row on itself, asked as a query: [n], what np.diag(attribute(rows, rows)) has.

        Of hw.Unrolled that is a sweep for each row, about 1.25 trainings; the rows of a batch go together as far as
        the working memory takes them, and with a store each batch that is finished is kept. trainings: what it may
        cost. For some of the rows give a loader of those, under the ids that the record has.
        It may be negative: see `normalise=`, which is refused for that.
        Errors: InvalidSetting where it would cost more than `trainings`, saying how much.
        """
        rows = self.train_rows(train_loader)
        if isinstance(self.method, Unrolled) and (cost := EACH * rows.count()) > trainings:
            raise InvalidSetting(
                f"The influence of {rows.count()} rows on themselves is a sweep for each, about {cost:.0f} trainings "
                f"in all, and trainings={trainings:g} are allowed. Give trainings={math.ceil(cost)}, or batches of the "
                "rows that matter, with the record's ids."
            )
        storage = Storage.of(self, store, memory, worker, append)
        with self._recorded():
            return self_influence(self, rows, progress=progress, storage=storage, scorer=_OnItself(self))

    # What has no meaning here -------------------------------------------------------------------------------------

    def calibrate(self, *_: Any, **__: Any) -> Any:
        raise _refused("calibrate: there is no damping")

    def audit(self, *_: Any, **__: Any) -> Any:
        raise _refused("audit: there is no inverse; the verdict in scores.diagnosis is what stands in its place")

    def verify(self, *_: Any, **__: Any) -> Any:
        raise _refused("verify: a replay that does not come to the record's states is refused by itself")

    def factors(self, *_: Any, **__: Any) -> Any:
        raise _refused("factors")

    def gradients(self, *_: Any, **__: Any) -> Any:
        raise _refused("gradients")

    def save(self, *_: Any, **__: Any) -> None:
        raise _refused("save: the record is what there is to keep")

    def load(self, *_: Any, **__: Any) -> Any:
        raise _refused("load: the record is what there is to keep")

    def influences(self, *_: Any, **__: Any) -> Any:
        raise _refused("influences of loose tensors: rows are known by their ids. Use attribute(train, query)")

    influences_by_block = influence_factors = influence_factors_by_block = influences
    influences_from_factors = influences_from_factors_by_block = damping_path = influences


def _whose(record: Trajectory) -> str:
    if record.is_ended:
        return "Give the model that it trained. If this is it, r.step was not told of its last steps."
    return (
        f"That training was broken off, and step {record.steps} is its last kept state: go on with it "
        "(hw.record(..., resume=True)), or give the model that such a resumed record puts back."
    )


def _refused(what: str) -> InvalidSetting:
    return InvalidSetting(f"Scores of a trajectory have no {what}.")


def _refuse_options(options: Mapping[str, Any]) -> None:
    """Errors: InvalidSetting for what belongs to an inverse, or to factors."""
    if options.get("normalise") is not None:
        raise _refused(NO_LENGTH)
    for name in ("query_error", "query_rank"):
        if options.get(name) is not None:
            raise _refused(f"{name}=: there are no query factors")


def _not_kept(asked: Asked) -> Asked:
    if asked.ready is not None:
        raise _refused("kept factors: give the query rows' loader")
    return asked


def _tell(doubts: Iterable[str]) -> None:
    for said in doubts:
        warnings.warn(RoughForecast(said), stacklevel=3)


def _beside(store: Path) -> Path:
    return store.with_name(f"{store.name}.sweep")


class SweepScorer(Scorer):
    """Scores of all train rows on some queries, by one sweep when the first of them are asked for."""

    def __init__(
        self,
        influence: TrajectoryInfluence,
        asked: Asked,
        scale: float,
        storage: Storage,
        progress: bool,
        by_block: bool = False,
        judged: bool = True,
    ) -> None:
        self.influence, self.asked, self.progress = influence, asked, progress
        self.by_block, self.judged = by_block, judged
        # A row's weight over the mean objective: n times what it is in the sum that its removal is of.
        self.scale = -influence.n_train * scale
        self.keep = None
        if storage.store is not None:
            folder = _beside(Path(storage.store))
            folder.mkdir(parents=True, exist_ok=True)
            name = f"{_digest(asked.keys):08x}-{influence.method.trajectory.digest:08x}-{storage.worker[0]}"
            self.keep = folder / (f"{name}-blocks" if by_block else name)
        self._tau: np.ndarray | None = None

    @property
    def tau(self) -> np.ndarray:
        """[block, q, train rows of the fit]."""
        if self._tau is None:
            self._tau = self.influence.derivatives(self.asked, self.keep, self.progress, self.by_block, self.judged)
        return self._tau

    def scores(self, piece: PlacedBatch) -> np.ndarray:
        places = self.influence.held.places(piece.names)
        # Rows that training did not see have no part in it.
        found = np.where(places >= 0, self.tau[..., np.maximum(places, 0)], 0.0) * self.scale
        check_scores(found, self.asked.ids, piece.names, self.influence)
        return found

    def probe(self, piece: PlacedBatch) -> np.ndarray:
        return visits(self.influence, piece)


class _OnItself(Scorer):
    """Scores of rows on themselves: those of a piece are asked together."""

    def __init__(self, influence: TrajectoryInfluence) -> None:
        self.influence = influence

    def scores(self, piece: PlacedBatch) -> np.ndarray:
        influence = self.influence
        asked = Asked([piece], piece.names, piece.whole_keys(influence.provider), fitted=True)
        scorer: Scorer
        if isinstance(influence.method, Source):
            scorer = SourceScorer(influence, influence.segments, asked, 1.0)
        else:
            scorer = SweepScorer(influence, asked, 1.0, Storage(), progress=False, judged=False)
        return np.diagonal(scorer.scores(piece)[0])[None, None].copy()

    def probe(self, piece: PlacedBatch) -> np.ndarray:
        return visits(self.influence, piece)


def visits(influence: TrajectoryInfluence, piece: PlacedBatch) -> np.ndarray:
    """How often training saw the rows: what a run is known by beside its identity, without a sweep."""
    return influence.method.trajectory.visits(piece.names).astype(np.float64)[None, None]


def _digest(keys: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(keys).tobytes())
