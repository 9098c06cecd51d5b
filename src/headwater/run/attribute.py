"""Runs: query factors once, one pass over the train rows, a tile of scores for each train batch."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from headwater.arrays import to_numpy
from headwater.errors import InvalidSetting
from headwater.influence import ComposableInfluence
from headwater.mapper import Queries, Sides, stack_queries
from headwater.operators.iterative import joined, recorded_solves, unrecorded_solves
from headwater.rows import Each, PlacedBatch, Visitor, sweep_kept
from headwater.run.diagnosis import RunSums, diagnosis_of, meets_the_loss
from headwater.run.rows import FittedRows, check_scores, distinct, sweep_rows
from headwater.run.runners.shared import check_worker
from headwater.store.base import MemorySink, Sink, Tile
from headwater.store.scores import UNIT_IN_WORDS, Scores, TopK, TopKSink
from headwater.store.tiles import TileStore
from headwater.store.topk import GroupSink

PROBE_ROWS, PROBE_QUERIES = 8, 64
"""Of the scores that a stored run is known by."""


def attribute(
    influence: ComposableInfluence,
    train_loader: Iterable[object],
    query_loader: Iterable[object],
    *,
    unit: str,
    by_block: bool,
    store: str | os.PathLike[str] | None,
    progress: bool,
    worker: tuple[int, int] = (0, 1),
) -> Scores:
    """See `Attributor.attribute`."""
    _scale(influence, unit)
    check_worker(worker, store)
    shared = worker[1] > 1
    with recorded_solves() as log:
        asked = _queries(influence, query_loader, progress)
    solved = bool(joined(log))
    kept, memory = _opened(store, influence, unit, by_block, asked, solved), MemorySink()
    if shared and kept is not None:
        share = OwnShare(Score(influence, asked, unit, by_block, [kept]), worker)
        sweep_rows(influence.provider, train_loader, share, "own share of the scores", progress)
    score = Score(influence, asked, unit, by_block, [memory] if kept is None else [kept, memory])
    # The mean gradient takes every row's gradient, which workers are there to save.
    sums = RunSums(influence.provider, kept) if meets_the_loss(influence) and not shared else None
    try:
        train_ids = _scored(influence, train_loader, score if sums is None else score & sums, asked, unit, progress)
    finally:
        if sums is not None:
            sums.keep()
    seen = None if sums is None else sums.finished(influence, train_loader, progress)
    solves, scores = joined(log), memory.scores()
    return Scores(
        values=scores.sum(axis=0) if len(scores) > 1 else scores[0],
        query_ids=asked.ids,
        train_ids=train_ids,
        by_block=dict(zip(influence.block_names, scores, strict=True)) if by_block else None,
        unit=unit,
        n_train=influence.n_train,
        method=influence.method.describe(),
        damping=influence.absolute_damping,
        explained=influence.explained,
        coverage=influence.provider.coverage_fraction,
        residuals={name: solve.residual for name, solve in solves.items()} or None,
        calibration=influence.calibration,
        diagnosis=diagnosis_of(influence, seen, solves),
    )


def top(
    influence: ComposableInfluence,
    train_loader: Iterable[object],
    query_loader: Iterable[object],
    k: int,
    *,
    unit: str,
    progress: bool,
    store: str | os.PathLike[str] | None = None,
    queries_as: str = "each",
    groups: Sequence[Any] | Mapping[Any, Any] | None = None,
    of: str = "sum",
) -> TopK:
    """See `Attributor.top`."""
    _scale(influence, unit)
    with recorded_solves() as log:
        asked = _queries(influence, query_loader, progress).combined(queries_as)
    ends = TopKSink(k, asked.ids) if groups is None else GroupSink(k, asked.ids, groups, of)
    kept = _opened(store, influence, unit, False, asked, bool(joined(log)))
    score = Score(influence, asked, unit, False, [ends] if kept is None else [kept, ends])
    _scored(influence, train_loader, score, asked, unit, progress)
    return ends.top()


def _opened(
    store: str | os.PathLike[str] | None,
    influence: ComposableInfluence,
    unit: str,
    by_block: bool,
    asked: Asked,
    solved: bool,
) -> TileStore | None:
    """The folder of a run, if it has one. Errors: as `TileStore`."""
    if store is None:
        return None
    identity = _identity(influence, unit, by_block, asked.ids, asked.keys)
    return TileStore(store, identity, _tolerance(influence, solved))


def _scored(
    influence: ComposableInfluence,
    loader: Iterable[object],
    visitor: Visitor[PlacedBatch, Any, Any],
    asked: Asked,
    unit: str,
    progress: bool,
) -> np.ndarray:
    """The train rows' names, once all were visited."""
    fitted = FittedRows(influence, forecast=unit == "removal", queries_fitted=asked.fitted)
    # One pass for both: the rows' names are checked before their scores are computed.
    names, _ = sweep_rows(influence.provider, loader, fitted & visitor, "train scores", progress)
    return distinct(names, "train")


def self_influence(influence: ComposableInfluence, train_loader: Iterable[object], *, progress: bool) -> np.ndarray:
    """See `ComposableInfluence.self_influence`."""
    influence.ready()

    def scores(piece: PlacedBatch) -> np.ndarray:
        found = to_numpy(influence.self_influence_of(piece.self_grads(influence.provider)))
        check_scores(found[None], ["itself"], piece.names, influence)
        return found

    fitted = FittedRows(influence)
    _, found = sweep_rows(influence.provider, train_loader, fitted & Each(scores), "self-influence", progress)
    return np.concatenate(found)


@dataclass(frozen=True, eq=False)
class Asked:
    """The query rows of a run."""

    queries: Queries
    """After their side of the operators, computed once."""
    ids: np.ndarray
    keys: np.ndarray
    """Of their content."""
    fitted: bool
    """Whether all of them are among the rows that were fitted."""

    def combined(self, queries_as: str) -> Asked:
        """All queries as one, their "mean" or "sum", called so; or "each" by itself. Errors: InvalidSetting."""
        if queries_as not in ("each", "mean", "sum"):
            raise InvalidSetting(f"queries_as is {queries_as!r}; expected 'each', 'mean' or 'sum'.")
        if queries_as == "each":
            return self
        share = 1.0 / len(self.ids) if queries_as == "mean" else 1.0
        return replace(self, queries=self.queries.total(share), ids=np.array([queries_as]))


class ReadyQueries(Iterable[Any]):
    """Query rows whose side of the operators was computed before; they stand where their loader stands."""

    @abstractmethod
    def asked(self) -> Asked: ...

    def __iter__(self) -> Iterator[Any]:
        return iter(())


def _queries(influence: ComposableInfluence, query_loader: Iterable[object], progress: bool) -> Asked:
    """One pass: the rows are held until all are counted, since their number decides what they go through."""
    if isinstance(query_loader, ReadyQueries):
        return query_loader.asked()
    influence.ready()
    provider = influence.provider
    pieces = sweep_rows(
        provider, query_loader, Each[PlacedBatch, PlacedBatch](lambda piece: piece), "query rows", False, "query"
    )
    # Whether rows are rotated or queries turned back depends on how many train rows each query meets.
    factors = _Factors(influence, influence.n_train / sum(len(piece.batch) for piece in pieces))
    found = sweep_kept(pieces, factors, "query factors", progress)
    keys = np.concatenate([provider.content_keys(piece.batch) for piece in pieces])
    ids, known = distinct(np.concatenate([piece.names for piece in pieces]), "query"), influence.fitted_keys
    fitted = known is not None and all(bool(piece.keys.among(known).all()) for piece in pieces if piece.keys)
    return Asked(stack_queries(found), ids, keys, fitted)


class _Factors(Each[PlacedBatch, Queries]):
    """Query gradients after their side of the operators, which the first of them decide."""

    def __init__(self, influence: ComposableInfluence, train_per_query: float):
        super().__init__(self._factors)
        self.influence, self.train_per_query = influence, train_per_query
        self.sides: Sides | None = None

    def _factors(self, piece: PlacedBatch) -> Queries:
        grads = self.influence.provider.grads(piece.batch, query=True)
        self.sides = self.sides or self.influence.block_mapper.sides(grads, self.train_per_query)
        return self.sides.queries(grads)


def _identity(
    influence: ComposableInfluence, unit: str, by_block: bool, query_ids: np.ndarray, query_keys: np.ndarray
) -> dict[str, Any]:
    """What makes two stored runs the same, in words; `TileStore.probe` sees what words do not tell.

    What was fitted is known by the mean eigenvalue of each block's curvature, and by the damping.
    """
    fit = influence.identity()
    return {
        **{name: fit[name] for name in ("method", "loss", "architecture", "blocks")},
        "weights": fit["fingerprint"],
        "dtype": influence.provider.dtype,
        "curvature": {name: float(op.mean_eigenvalue()) for name, op in influence.curvature.items()},
        "damping": influence.absolute_damping,
        "n_train": float(influence.n_train),
        "explained": influence.explained,
        "unit": unit,
        "by_block": by_block,
        "query_ids": query_ids.tolist(),
        "query_rows": query_keys.tolist(),
    }


def _tolerance(influence: ComposableInfluence, solved: bool) -> float:
    """How far scores may be off, relative to the largest, when the same thing is fitted and solved again."""
    # A few hundred eps: another batch size adds up in another order.
    rounding = {"bfloat16": 0.1, "float16": 0.02}.get(influence.provider.dtype, 1e-4)
    # Solves stop at a tolerance, and where they stop depends on what else is solved with them.
    return max(rounding, 1e-3) if solved else rounding


def _probe(influence: ComposableInfluence, queries: Queries, item: PlacedBatch, few: slice) -> np.ndarray:
    """Scores of seeded queries on a batch's rows, each with the weight of one, so that none hides: [block, query, row].

    The first rows of the first batch: those that a call in smaller batches has in its first batch too.
    """
    # A probe is nobody's answer.
    with unrecorded_solves():
        by_block = queries.scores(item.unweighted_grads(influence.provider, few))
    found = np.stack([to_numpy(scores) for scores in by_block.values()])
    return found[:, np.random.default_rng(0).permutation(found.shape[1])[:PROBE_QUERIES]]


class OwnShare(Visitor[PlacedBatch, int, int]):
    """Another visitor, on every `count`-th batch, or piece of one, from `number` on; how many there were."""

    def __init__(self, inner: Visitor[PlacedBatch, None, None], worker: tuple[int, int]) -> None:
        self.inner, self.worker, self.met = inner, worker, 0

    def of(self, item: PlacedBatch) -> int:
        if self.met % self.worker[1] == self.worker[0] or item.start == 0:  # the first one has the store's probe
            self.inner.of(item)
        self.met += 1
        return 1

    def merge(self, one: int, other: int) -> int:
        return one + other


class Score(Visitor[PlacedBatch, None, None]):
    """Scores of all queries on the train rows, tile by tile into sinks; what one of these has is not computed."""

    def __init__(
        self, influence: ComposableInfluence, asked: Asked, unit: str, by_block: bool, sinks: Sequence[Sink]
    ) -> None:
        self.influence, self.asked, self.by_block, self.sinks = influence, asked, by_block, sinks
        self.scale = _scale(influence, unit)

    def of(self, item: PlacedBatch) -> None:
        needed = any(sink.needs_keys for sink in self.sinks)
        keys = item.content_keys(self.influence.provider) if needed else None
        scores, source = (None, None) if keys is None else self._kept(item, keys)
        scores = self._computed(item) if scores is None else scores
        check_scores(scores, self.asked.ids, item.names, self.influence)
        for sink in self.sinks:
            # A tile from one sink goes into the others: a resumed run still fills memory or the top k.
            if sink is not source:
                sink.write(Tile(item.start, item.names, keys, scores))

    def merge(self, one: None, other: None) -> None:
        """Tiles are in the sinks."""

    def _kept(self, item: PlacedBatch, keys: np.ndarray) -> tuple[np.ndarray | None, Sink | None]:
        """The tile from an earlier call, and the sink that has it."""
        for sink in self.sinks:
            # Before anything is read: a stored tile is trusted only if the run is the same.
            if item.start == 0 and isinstance(sink, TileStore):
                few = slice(0, PROBE_ROWS)
                sink.probe(keys[few], _probe(self.influence, self.asked.queries, item, few))
            scores = sink.read(item.start, keys)
            if scores is not None:
                return scores, sink
        return None, None

    def _computed(self, item: PlacedBatch) -> np.ndarray:
        """[block, q, n]."""
        by_block = item.scores(self.asked.queries, self.influence.provider, self.by_block)
        blocks = by_block if self.by_block else [sum(by_block[1:], by_block[0])]
        found = np.stack([to_numpy(block) for block in blocks])
        # In place: a tile may be large.
        found *= self.scale
        return found


def _scale(influence: ComposableInfluence, unit: str) -> float:
    if unit not in UNIT_IN_WORDS:
        raise InvalidSetting(f"unit is {unit!r}; expected one of {', '.join(map(repr, UNIT_IN_WORDS))}.")
    if unit == "removal" and not influence.method.predicts_removal:
        raise InvalidSetting(
            f"{influence.method.describe()} predicts no change of loss, only similarity; use unit='influence'."
        )
    return 1.0 / influence.n_train if unit == "removal" else 1.0
