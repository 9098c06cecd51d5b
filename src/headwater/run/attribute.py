"""Runs: query factors once, one pass over the train rows, a tile of scores for each of its pieces."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from headwater.arrays import itemsize, to_numpy, working_memory, working_memory_limit
from headwater.errors import InvalidInput, InvalidSetting
from headwater.gradients.provider import BlockGradients
from headwater.gradients.together import failures_told
from headwater.influence import ComposableInfluence
from headwater.memory import resident_memory
from headwater.operators.iterative import SolveReport, joined, recorded_solves
from headwater.rows import Each, PlacedBatch, Rows, Visitor, first_batch
from headwater.run.diagnosis import RunSums, diagnosis_of, meets_the_loss
from headwater.run.directions import Directions
from headwater.run.identity import fit_identity
from headwater.run.plan import agreed, budget_of, factor_bytes, tile_sizes
from headwater.run.queries import Asked, PairScorer
from headwater.run.ranking import Ranking
from headwater.run.rows import FittedRows, check_scores, distinct, sweep_rows
from headwater.run.runners.environment import Worker
from headwater.run.runners.turns import check_worker
from headwater.run.shortened import Shortening
from headwater.run.tiles import QuerySpan, Scorer, Tiles, open_tiles, run_tiles
from headwater.store.base import MemorySink, Sink, Tile
from headwater.store.ends import GroupSink, TopKSink
from headwater.store.plan import Sizes
from headwater.store.score_matrix import RANKINGS, UNIT_IN_WORDS, unit_of
from headwater.store.scores import Scores
from headwater.store.topk import TopK
from headwater.types import InfluenceMode

Path = str | os.PathLike[str]
SIZES = ("influence", "removal")
"""Units that a method's scores have; `RANKINGS` are those of directions."""


@dataclass(frozen=True)
class Storage:
    """Where and how a run is kept."""

    store: Path | None = None
    memory: int | float | str | None = None
    worker: tuple[int, int] = (0, 1)
    append: bool = False

    @classmethod
    def of(
        cls,
        influence: ComposableInfluence,
        store: Path | None,
        memory: int | float | str | None,
        worker: Worker,
        append: bool = False,
    ) -> Storage:
        """Errors: InvalidSetting."""
        return cls(store, memory, check_worker(worker, store, influence.source.together), append)

    def __post_init__(self) -> None:
        check_worker(self.worker, self.store)
        if self.append and self.store is None:
            raise InvalidSetting("append=True adds rows to a run in a folder: give store=.")
        budget_of(self.memory)


MakeScorer = Callable[[Asked, float, Storage, bool, bool], Scorer]
"""(queries, what a score is multiplied by, storage, progress, by_block) -> what computes their scores."""


def attribute(
    influence: ComposableInfluence,
    train_loader: Iterable[object],
    query_loader: Iterable[object],
    *,
    unit: str,
    by_block: bool,
    progress: bool,
    storage: Storage | None = None,
    mode: InfluenceMode | str = InfluenceMode.Up,
    explain: str = "label",
    short: Shortening | None = None,
    normalise: str | None = None,
    scorer: MakeScorer | None = None,
) -> Scores:
    """See `Attributor.attribute`. scorer: makes what computes scores; None for `PairScorer`."""
    mode, storage, unit = InfluenceMode(mode), storage or Storage(), unit_of(unit, normalise)
    if mode is InfluenceMode.Perturbation and isinstance(train_loader, Rows) and train_loader.is_kept:
        raise InvalidSetting("mode='perturbation' is about train rows' inputs, which are not kept: give their loader.")
    influence.ready()
    if short is not None and mode is InfluenceMode.Perturbation:
        raise InvalidSetting("mode='perturbation' meets queries whole: leave query_error= and query_rank= out.")
    asked = Asked.of(influence, query_loader, explain).shortened(short)
    run = PairRun(influence, asked, unit, by_block, mode, storage, progress, scorer)
    return run.stored(train_loader) if storage.store is not None else run.in_memory(train_loader)


def top(
    influence: ComposableInfluence,
    train_loader: Iterable[object],
    query_loader: Iterable[object],
    k: int,
    *,
    unit: str,
    progress: bool,
    storage: Storage | None = None,
    ranking: Ranking | None = None,
    explain: str = "label",
    short: Shortening | None = None,
    normalise: str | None = None,
    scorer: MakeScorer | None = None,
) -> TopK:
    """See `Attributor.top`."""
    storage, ranking, unit = storage or Storage(), ranking or Ranking(k), unit_of(unit, normalise)
    if unit in RANKINGS:
        ranking.check_no_sum()
    influence.ready()
    asked = Asked.of(influence, query_loader, explain).shortened(short)
    if storage.store is not None:  # of scores in a folder each query has its own
        run = PairRun(influence, asked, unit, False, InfluenceMode.Up, storage, progress, scorer)
        stored = run.stored(train_loader)
        found, (asked_by, called_by) = ranking.of_scores(stored), stored.are_positions
        return replace(
            found,
            unit_in_words=stored.unit_in_words,
            query_positions=asked_by and ranking.queries_as == "each",
            train_positions=called_by and ranking.groups is None,
        )
    run = PairRun(influence, ranking.asked(asked), unit, False, InfluenceMode.Up, storage, progress, scorer)
    ends: list[TopKSink | GroupSink] = []

    def sink(_: int, part: Asked) -> Sink:
        ends.append(ranking.sink(part.ids))
        return ends[-1]

    run.into(sink, train_loader)
    words = UNIT_IN_WORDS[unit].format(of=asked.explained(influence))
    return replace(TopK.joined([each.top() for each in ends]), unit_in_words=words)


class PairRun:
    """Scores of all queries on all train rows."""

    def __init__(
        self,
        influence: ComposableInfluence,
        asked: Asked,
        unit: str,
        by_block: bool,
        mode: InfluenceMode,
        storage: Storage,
        progress: bool,
        scorer: MakeScorer | None = None,
    ):
        self.influence, self.asked, self.unit, self.by_block = influence, asked, unit, by_block
        self.make_scorer = scorer
        self.mode, self.storage, self.progress = mode, storage, progress
        self.scale = _scale(influence, unit)
        self.lost: dict[str, float] = {}
        """See `PairScorer.lost`: of all queries so far."""
        self.directions = Directions.of(influence, unit, mode)
        if mode is InfluenceMode.Perturbation and unit == "removal":
            raise InvalidSetting("unit='removal' is about a row that goes, mode='perturbation' about one that changes.")

    @property
    def _fitted(self) -> FittedRows:
        forecast = self.unit == "removal"
        return FittedRows(self.influence, forecast, self.asked.fitted, some_are_new=self.storage.append)

    def sums(self, loader: Iterable[object], store: Tiles | None) -> RunSums | None:
        """Of train gradients, which say whether the weights are a minimum; None where they are not met."""
        # Kept gradients have a store's dtype and form; in perturbation mode gradients' derivatives are met.
        kept = isinstance(loader, Rows) and loader.is_kept
        meets = meets_the_loss(self.influence) and self.mode is InfluenceMode.Up and not kept
        return RunSums(self.influence.provider, store) if meets else None

    def _scorer(self, asked: Asked) -> Scorer:
        if self.make_scorer is not None:
            return self.make_scorer(asked, self.scale, self.storage, self.progress, self.by_block)
        scorer = PairScorer(self.influence, asked, self.mode, self.by_block, self.scale, self.progress, self.directions)
        self.lost = {name: max(off, self.lost.get(name, 0.0)) for name, off in scorer.lost.items()}
        return scorer

    def _numbers(self, train: Iterable[object]) -> int:
        """Of each pair's score."""
        numbers = len(self.influence.block_names) if self.by_block else 1
        if self.mode is InfluenceMode.Perturbation:
            numbers *= int(np.prod(np.shape(first_batch(self.influence.provider, train).x)[1:]))
        return numbers

    def _sizes(self, loader: Iterable[object]) -> Sizes:
        train = self.influence.train_rows(loader)
        return tile_sizes(
            self.influence.provider,
            train,
            len(self.asked),
            self._numbers(train),
            budget_of(self.storage.memory),
            factor_bytes(self.influence) if self.asked.ready is None else self.asked.ready.bytes_each,
        )

    # In memory --------------------------------------------------------------------------------------------------------

    def into(
        self, sink: Callable[[int, Asked], Sink], loader: Iterable[object], sums: RunSums | None = None
    ) -> np.ndarray:
        """The train rows' names, once all scores are in sinks. sink: for some queries, from which position on."""
        parts, working, start, names = [self.asked], working_memory_limit(), 0, None
        if self.storage.memory is not None:
            sizes = self._sizes(loader)
            parts, working = self.asked.spans(sizes.queries), sizes.working or working
        with working_memory(working):
            for part in parts:
                score = _Score(self._scorer(part), sink(start, part), start)
                start += len(part)
                if names is not None:
                    sweep_rows(self.influence.provider, loader, score, "train scores", self.progress)
                    continue
                both: Visitor[PlacedBatch, Any, Any] = score if sums is None else score & sums
                # One pass for all: the rows' names are checked before their scores are computed.
                names, _ = sweep_rows(
                    self.influence.provider, loader, self._fitted & both, "train scores", self.progress
                )
        assert names is not None
        self._tell()
        return distinct(names, "train")

    def _tell(self) -> None:
        """Warns: as `Directions`."""
        if self.directions is not None:
            self.directions.tell()

    def in_memory(self, loader: Iterable[object]) -> Scores:
        self._check_room(loader)
        memory = MemorySink()
        sums = self.sums(loader, None)
        with recorded_solves() as log:
            train_ids = self.into(lambda *_: memory, loader, sums)
        seen = None if sums is None else sums.finished(self.influence, loader, self.progress)
        solves, scores = joined(log), memory.scores()
        return Scores(
            values=scores.sum(axis=0) if len(scores) > 1 else scores[0],
            query_ids=self.asked.ids,
            train_ids=train_ids,
            by_block=dict(zip(self.influence.block_names, scores, strict=True)) if self.by_block else None,
            residuals={name: solve.residual for name, solve in solves.items()} or None,
            **self._meaning(),
            diagnosis=diagnosis_of(self.influence, seen, solves).with_query_errors(self.lost),
        )

    def _check_room(self, loader: Iterable[object]) -> None:
        """Errors: InvalidSetting where the budget has no room for the scores themselves."""
        budget = budget_of(self.storage.memory)
        if budget is None:
            return
        train = self.influence.train_rows(loader)
        size = (
            train.count()
            * len(self.asked)
            * self._numbers(train)
            * (2 if self.by_block else 1)
            * itemsize(self.influence.like())
        )
        if size > agreed(self.influence.provider, budget - resident_memory()):
            raise InvalidSetting(
                f"memory={self.storage.memory!r} has no room for the scores, {size / 2**20:.0f} MiB: give store=, "
                "where they stay on disk; or use top()."
            )

    def _meaning(self) -> dict[str, Any]:
        return {
            "unit": self.unit,
            "n_train": self.influence.n_train,
            "method": self.influence.method.describe(),
            "damping": self.influence.absolute_damping,
            "explained": self.asked.explained(self.influence),
            "coverage": self.influence.provider.coverage_fraction,
            "calibration": self.influence.calibration,
            "mode": str(self.mode.value),
        }

    # In a folder ------------------------------------------------------------------------------------------------------

    def stored(self, loader: Iterable[object]) -> Scores:
        """Compute what is missing; the scores stay on disk."""
        with failures_told(self.influence.source.together):
            return self._stored(loader)

    def _stored(self, loader: Iterable[object]) -> Scores:
        if self.asked.short is not None and self.asked.short.rank is not None:
            raise InvalidSetting(
                "query_rank= has no bound on what is lost, and of other processes' queries a run in a folder would not "
                "know it: give query_error=, or leave store= out."
            )
        loader = self.influence.train_rows(loader)  # one object for all passes: its tiles are those of the run
        store = self.store(loader)
        sums = self.sums(loader, store)
        with recorded_solves() as log:
            spans = self.spans(store)
            tolerance = self.tolerance(store, spans)
            train_ids = run_tiles(
                self.influence,
                loader,
                store,
                spans,
                fitted=self._fitted,
                what="train scores",
                worker=self.storage.worker,
                append=self.storage.append,
                progress=self.progress,
                sums=sums,
                tolerance=tolerance,
            )
        self._tell()
        if store.finished_rows != len(train_ids):
            seen = None if sums is None else sums.finished(self.influence, loader, self.progress)
            store.finish(self.asked.ids, train_ids, *self._described(seen, joined(log)))
        return Scores.open(store.path)

    def store(self, loader: Iterable[object]) -> Tiles:
        """The run's folder. Errors: as `open_tiles`."""
        assert self.storage.store is not None
        identity = run_identity(self.influence, self.asked) | {
            "explained": self.asked.explained(self.influence),
            "unit": self.unit,
            "by_block": self.by_block,
            "mode": str(self.mode.value),
        }
        return open_tiles(
            self.influence, self.storage.store, identity, lambda: self._sizes(loader), rounding(self.influence)
        )

    def spans(self, store: Tiles) -> list[QuerySpan]:
        """Of queries, each with what computes its scores."""
        step = store.sizes.queries
        parts = enumerate(self.asked.spans(step))
        return [QuerySpan(k, k * step, lambda part=part: self._scorer(part)) for k, part in parts]  # type: ignore[misc]

    def tolerance(self, store: Tiles, spans: Sequence[QuerySpan]) -> float:
        """Of the probe, which needs the first queries' factors in any case."""
        with recorded_solves() as log:
            _ = spans[0].scorer
        # Solves stop at a tolerance, and where they stop depends on what else is solved with them.
        return max(store.tolerance, 1e-3) if log else store.tolerance

    def _described(self, seen: Any, solves: dict[str, SolveReport]) -> tuple[list[str], dict[str, Any]]:
        """Names of blocks, and what the scores mean as JSON has it."""
        blank = np.zeros((1, 1))
        # Of queries that another process, or call, has seen there is the bound.
        short, names = self.asked.short, self.influence.block_names
        bound = {} if short is None or short.error is None else dict.fromkeys(names, short.error)
        diagnosis = diagnosis_of(self.influence, seen, solves).with_query_errors(bound)
        words = Scores(blank, blank[0], blank[0], **self._meaning(), diagnosis=diagnosis).attributes()
        # Those of an earlier call, for other queries, are not known here.
        known = all(len(solve.residual) == len(self.asked) for solve in solves.values())
        residuals = {name: solve.residual.tolist() for name, solve in solves.items()} if known else {}
        return self.influence.block_names if self.by_block else [], {**words, "residuals": residuals or None}


class _Score(Visitor[PlacedBatch, None, None]):
    """Scores of all queries on the train rows, piece by piece into a sink."""

    def __init__(self, scorer: Scorer, sink: Sink, queries: int) -> None:
        self.scorer, self.sink, self.queries = scorer, sink, queries

    def of(self, item: PlacedBatch) -> None:
        self.sink.write(Tile(item.start, item.names, None, self.scorer.scores(item), self.queries))

    def merge(self, one: None, other: None) -> None:
        """Tiles are in the sink."""


# Rows on themselves ---------------------------------------------------------------------------------------------------


def self_influence(
    influence: ComposableInfluence,
    train_loader: Iterable[object],
    *,
    progress: bool,
    storage: Storage | None = None,
    scorer: Scorer | None = None,
) -> np.ndarray:
    """See `Attributor.self_influence`. scorer: what computes it, [1, 1, n]; None for <Op g, g>."""
    influence.ready()
    scorer, fitted, storage = scorer or _OnThemselves(influence), FittedRows(influence), storage or Storage()
    if storage.store is None:
        each, working = Each[PlacedBatch, np.ndarray](lambda piece: scorer.scores(piece)[0, 0]), None
        if storage.memory is not None:
            working = _column_sizes(influence, train_loader, 1, storage).working
        with working_memory(working or working_memory_limit()):
            _, scores = sweep_rows(influence.provider, train_loader, fitted & each, "self-influence", progress)
        return np.concatenate(scores)
    ids = np.array(["itself"])
    _, found = stored_columns(influence, train_loader, scorer, ids, fitted, "self-influence", storage, progress)
    return found[0]


class _OnThemselves(Scorer):
    """<Op g_n, g_n>."""

    def __init__(self, influence: ComposableInfluence):
        self.influence = influence

    def scores(self, piece: PlacedBatch) -> np.ndarray:
        found = self._of(piece.self_grads(self.influence.provider))
        check_scores(found, ["itself"], piece.names, self.influence)
        return found

    def probe(self, piece: PlacedBatch) -> np.ndarray:
        return self._of(piece.unweighted_grads(self.influence.provider))

    def _of(self, grads: BlockGradients) -> np.ndarray:
        return to_numpy(self.influence.self_influence_of(grads))[None, None]


def stored_columns(
    influence: ComposableInfluence,
    loader: Iterable[object],
    scorer: Scorer,
    query_ids: np.ndarray,
    fitted: FittedRows,
    verb: str,
    storage: Storage,
    progress: bool,
    query_keys: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """A run in a folder, of a scorer that has all queries: the train rows' names, and a number for each pair [q, n]."""
    with failures_told(influence.source.together):
        assert storage.store is not None
        train = influence.train_rows(loader)
        keys = np.empty(0, dtype=np.uint64) if query_keys is None else query_keys
        identity = fit_identity(influence) | {
            "verb": verb,
            "query_ids": query_ids.tolist(),
            "query_rows": keys.tolist(),
        }

        def sizes() -> Sizes:
            return _column_sizes(influence, train, len(query_ids), storage)

        store = open_tiles(influence, storage.store, identity, sizes, rounding(influence))
        train_ids = run_tiles(
            influence,
            train,
            store,
            [QuerySpan(0, 0, lambda: scorer)],
            fitted=fitted,
            what=verb,
            worker=storage.worker,
            append=storage.append,
            progress=progress,
        )
        if store.finished_rows != len(train_ids):
            words: dict[str, Any] = {
                "unit": "removal" if verb == "removal" else "influence",
                "n_train": influence.n_train,
            }
            words |= {"method": influence.method.describe(), "damping": influence.absolute_damping}
            words |= {
                "explained": influence.explained,
                "coverage": influence.provider.coverage_fraction,
                "residuals": None,
            }
            store.finish(query_ids, train_ids, [], words)
        found = Scores.open(storage.store).values
        if found.shape[1] != len(train_ids):
            raise InvalidInput(
                f"Of the {len(train_ids)} rows in {storage.store} {len(train_ids) - found.shape[1]} are deleted, and "
                "numbers without names would be taken for other rows'. Compact it (headwater.store.runs.compact), and "
                "leave the rows out of the loader."
            )
        return train_ids, found


def _column_sizes(influence: ComposableInfluence, train: Iterable[object], queries: int, storage: Storage) -> Sizes:
    # A byte a query: all of them fit, as they are there already.
    return tile_sizes(influence.provider, train, queries, 1, budget_of(storage.memory), 1.0)


# What makes two runs the same -----------------------------------------------------------------------------------------


def run_identity(influence: ComposableInfluence, asked: Asked) -> dict[str, Any]:
    short = {} if asked.short is None else asked.short.described()
    return fit_identity(influence) | {"query_ids": asked.ids.tolist(), "query_rows": asked.keys.tolist()} | short


def rounding(influence: ComposableInfluence) -> float:
    """How far scores may be off, relative to the largest, when the same thing is fitted again."""
    # A few hundred eps: another batch size adds up in another order.
    return {"bfloat16": 0.1, "float16": 0.02}.get(influence.provider.dtype, 1e-4)


def _scale(influence: ComposableInfluence, unit: str) -> float:
    if unit not in (*SIZES, *RANKINGS):
        raise InvalidSetting(f"unit is {unit!r}; expected one of {', '.join(map(repr, SIZES))}.")
    if unit == "removal" and not influence.method.predicts_removal:
        raise InvalidSetting(
            f"{influence.method.describe()} predicts no change of loss, only similarity; use unit='influence'."
        )
    return 1.0 / influence.n_train if unit == "removal" else 1.0
