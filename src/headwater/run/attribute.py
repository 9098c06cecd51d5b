"""Serial runs: query factors once, one pass over the train rows, a tile of scores for each train batch."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from headwater.arrays import to_numpy
from headwater.curvature.passes import again
from headwater.errors import InvalidSetting
from headwater.gradients.provider import BlockGradients
from headwater.influence import ComposableInfluence
from headwater.mapper import Queries, Sides, stack_queries
from headwater.operators.iterative import joined, recorded_solves, unrecorded_solves
from headwater.run.diagnosis import RunSums, diagnosis_of, meets_the_loss
from headwater.run.rows import check_scores, distinct, named_batches, named_pieces, train_batches
from headwater.store.scores import UNIT_IN_WORDS, Extremes, Running, Scores
from headwater.store.tiles import TileStore, Where, place_of

PROBE_ROWS, PROBE_QUERIES = 8, 64
"""Of the scores that a stored run is known by."""


@dataclass(frozen=True)
class Tile:
    """Scores of all queries on the rows of one train batch; by_block [q, n] each, already in the wanted unit."""

    by_block: dict[str, np.ndarray]
    train_ids: np.ndarray

    @property
    def total(self) -> np.ndarray:
        return (
            np.sum(list(self.by_block.values()), axis=0)
            if len(self.by_block) > 1
            else next(iter(self.by_block.values()))
        )


def attribute(
    influence: ComposableInfluence,
    train_loader: Iterable[Any],
    query_loader: Iterable[Any],
    *,
    unit: str,
    by_block: bool,
    store: str | os.PathLike[str] | None,
    progress: bool,
) -> Scores:
    """See `ComposableInfluence.attribute`."""
    with recorded_solves() as log:
        asked = _queries(influence, query_loader, progress)
    query_ids, kept = asked.ids, None
    if store is not None:
        identity = _identity(influence, unit, by_block, query_ids, asked.keys)
        kept = TileStore(store, identity, _tolerance(influence, solved=bool(joined(log))))
    sums = RunSums(influence.provider, kept) if meets_the_loss(influence) else None
    try:
        tiles = list(_tiles(influence, asked, train_loader, unit, by_block, progress, kept, sums))
    finally:
        if sums is not None:
            sums.keep()
    seen = None if sums is None else sums.finished(lambda: _places(influence, train_loader, progress))
    solves = joined(log)
    return Scores(
        values=np.concatenate([tile.total for tile in tiles], axis=1),
        query_ids=query_ids,
        train_ids=distinct(np.concatenate([tile.train_ids for tile in tiles]), "train"),
        by_block={
            name: np.concatenate([tile.by_block[name] for tile in tiles], axis=1) for name in influence.block_names
        }
        if by_block
        else None,
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
    train_loader: Iterable[Any],
    query_loader: Iterable[Any],
    k: int,
    *,
    unit: str,
    progress: bool,
) -> Extremes:
    """See `ComposableInfluence.top`."""
    asked = _queries(influence, query_loader, progress)
    running, ids = Running(k, asked.ids), []
    for tile in _tiles(influence, asked, train_loader, unit, False, progress):
        running.add(tile.total, tile.train_ids)
        ids.append(tile.train_ids)
    distinct(np.concatenate(ids), "train")
    return running.extremes()


def self_influence(influence: ComposableInfluence, train_loader: Iterable[Any], *, progress: bool) -> np.ndarray:
    """See `ComposableInfluence.self_influence`."""
    influence.ready()
    found = []
    for batch, names, _ in train_batches(influence, train_loader, "self-influence", progress):
        found.append(to_numpy(influence.batch_self_influence(batch)))
        check_scores(found[-1][None], ["itself"], names, influence)
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


def _queries(influence: ComposableInfluence, query_loader: Iterable[Any], progress: bool) -> Asked:
    """One pass: the rows are held until all are counted, since their number decides what they go through."""
    influence.ready()
    named = list(named_pieces(influence.provider, query_loader, "query rows", False, "query"))
    pieces = [piece for piece, _ in named]
    train_per_query = influence.n_train / sum(len(piece.batch) for piece in pieces)
    sides: Sides | None = None
    found, keys = [], []
    for piece in again(pieces, "query factors", progress):
        grads = influence.provider.grads(piece.batch, query=True)
        sides = sides or influence.block_mapper.sides(grads, train_per_query)
        found.append(sides.queries(grads))
        keys.append(influence.provider.content_keys(piece.batch))
    ids, known = distinct(np.concatenate([names for _, names in named]), "query"), influence.fitted_keys
    fitted = known is not None and all(bool(piece.keys.among(known).all()) for piece in pieces if piece.keys)
    return Asked(stack_queries(found), ids, np.concatenate(keys), fitted)


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
    rounding = {"bfloat16": 0.1, "float16": 0.02}.get(influence.provider.dtype, 1e-4)
    return max(rounding, 1e-3) if solved else rounding


def _probe(influence: ComposableInfluence, queries: Queries, batch: Any) -> np.ndarray:
    """Scores of seeded queries on a batch's rows, each with the weight of one, so that none hides: [block, query, row].

    The first rows of the first batch: those that a call in smaller batches has in its first batch too.
    """
    with unrecorded_solves():
        by_block = queries.scores(influence.provider.grads(batch, weighted=False))
    found = np.stack([to_numpy(scores) for scores in by_block.values()])
    return found[:, np.random.default_rng(0).permutation(found.shape[1])[:PROBE_QUERIES]]


def _places(influence: ComposableInfluence, loader: Iterable[Any], progress: bool) -> Iterator[tuple[Where, Any]]:
    """The run's tiles, and their batches."""
    for batch, _, start in named_batches(influence.provider, loader, "train gradients", progress):
        yield place_of(start, influence.provider.content_keys(batch)), batch


def _tiles(
    influence: ComposableInfluence,
    asked: Asked,
    train_loader: Iterable[Any],
    unit: str,
    by_block: bool,
    progress: bool,
    store: TileStore | None = None,
    sums: RunSums | None = None,
) -> Iterator[Tile]:
    """One for each train batch; from the store where it is there, and into the store where it is not.

    The gradients of what is computed are added to `sums`.
    """
    scale, names = _scale(influence, unit), influence.block_names if by_block else ["all"]

    def compute(batch: Any) -> tuple[np.ndarray, BlockGradients]:
        grads = influence.provider.grads(batch)
        scores = list(asked.queries.scores(grads).values())
        blocks = scores if by_block else [sum(scores[1:], scores[0])]
        return np.stack([to_numpy(block) for block in blocks]) * scale, grads

    grads: BlockGradients | None
    forecast, swapped = unit == "removal", asked.fitted
    for batch, ids, start in train_batches(influence, train_loader, "train scores", progress, forecast, swapped):
        if store is None:
            tile, grads = compute(batch)
            if sums is not None:
                sums.add(batch, grads)
        else:
            keys = influence.provider.content_keys(batch)
            if start == 0:
                few = slice(0, PROBE_ROWS)
                store.probe(keys[few], _probe(influence, asked.queries, batch.take(few)))
            found = store.read(start, keys)
            tile, grads = compute(batch) if found is None else (found, None)
            if found is None:
                check_scores(tile, asked.ids, ids, influence)
                store.write(start, keys, tile)
            if sums is not None:
                sums.meet(place_of(start, keys), batch, grads)
        check_scores(tile, asked.ids, ids, influence)
        yield Tile(dict(zip(names, tile, strict=True)), ids)


def _scale(influence: ComposableInfluence, unit: str) -> float:
    if unit not in UNIT_IN_WORDS:
        raise InvalidSetting(f"unit is {unit!r}; expected one of {', '.join(map(repr, UNIT_IN_WORDS))}.")
    if unit == "removal" and not influence.method.predicts_removal:
        raise InvalidSetting(
            f"{influence.method.describe()} predicts no change of loss, only similarity; use unit='influence'."
        )
    return 1.0 / influence.n_train if unit == "removal" else 1.0
