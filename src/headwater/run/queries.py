"""The query rows of a run, and what they become once they went through the inverse."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from headwater.arrays import Array, namespace, to_numpy
from headwater.errors import InvalidSetting
from headwater.gradients.provider import EXPLAIN
from headwater.influence import ComposableInfluence
from headwater.loaders.keys import RowKeys
from headwater.mapper import Queries, Sides, stack_queries
from headwater.operators.iterative import unrecorded_solves
from headwater.rows import Each, PlacedBatch, sweep_kept, within_tiles
from headwater.run.directions import Directions
from headwater.run.rows import check_scores, distinct, joined_names, sweep_rows
from headwater.run.shortened import Shortening, level, shorten
from headwater.run.tiles import Scorer
from headwater.settings import check_word
from headwater.types import Batch, InfluenceMode

PROBE_QUERIES = 64
"""Of the queries whose scores a stored run is known by."""


def _refuse_kept(explain: str) -> None:
    if explain != "label":
        raise InvalidSetting(
            f"explain={explain!r}: kept factors are of the labels that their rows had. Give the query rows' loader."
        )


@dataclass(frozen=True, eq=False)
class Asked:
    """Query rows: held until all are counted, since their number decides what they go through."""

    pieces: Sequence[PlacedBatch]
    ids: np.ndarray
    keys: np.ndarray
    """Of their content."""
    fitted: bool
    """Whether all of them are among the rows that were fitted."""
    share: float | None = None
    """Where they are asked as one: what their sum is multiplied by."""
    ready: Queries | None = None
    """Their factors, where these were computed before; there are no pieces then."""
    explain: str = "label"
    """Whose label the query rows have: their own, or the model's "prediction"."""
    short: Shortening | None = None
    """Where few outer products are kept of each query."""

    @classmethod
    def of(cls, influence: ComposableInfluence, loader: Iterable[object], explain: str = "label") -> Asked:
        """One pass. Errors: BatchMismatch for ids that come twice; UnsupportedModel for predictions without label."""
        check_word("explain", explain, EXPLAIN)
        if isinstance(loader, ReadyQueries):
            _refuse_kept(explain)
            return loader.asked()
        provider, known = influence.provider, influence.fitted_keys

        def taken(piece: PlacedBatch) -> PlacedBatch:
            if explain == "label":
                return piece
            asked_about = provider.predicted(piece.batch)
            # Known by the label that it has now.
            return PlacedBatch(asked_about, piece.place, RowKeys.of(provider, asked_about))

        pieces = sweep_rows(provider, loader, Each[PlacedBatch, PlacedBatch](taken), "query rows", False, "query")
        ids = distinct(joined_names([piece.names for piece in pieces], "query"), "query")
        keys = np.concatenate([piece.whole_keys(provider) for piece in pieces])
        fitted = known is not None and all(bool(piece.keys.among(known).all()) for piece in pieces if piece.keys)
        return cls(pieces, ids, keys, fitted, explain=explain)

    def __len__(self) -> int:
        return len(self.ids)

    def shortened(self, how: Shortening | None) -> Asked:
        """With few outer products for each query. Errors: InvalidSetting."""
        if how is not None and self.ready is not None:
            raise InvalidSetting(
                "query_error= and query_rank= are for query rows that are computed now; kept factors are whole."
            )
        return replace(self, short=how)

    def explained(self, influence: ComposableInfluence) -> str:
        """What the scores are about, in words."""
        return influence.explained + (" under the predicted label" if self.explain == "prediction" else "")

    def spans(self, queries: int) -> list[Asked]:
        """As many at once, each with its rows; those that are asked as one are not parted."""
        if self.share is not None:
            return [self]
        if self.ready is not None:
            cuts = [slice(k, min(k + queries, len(self))) for k in range(0, len(self), queries)]
            return [replace(self, ids=self.ids[c], keys=self.keys[c], ready=self.ready.take(c)) for c in cuts]
        parts: dict[int, list[PlacedBatch]] = {}
        for piece in self.pieces:
            for part in within_tiles(piece, queries):
                parts.setdefault(part.start // queries, []).append(part)
        found = []
        for number, pieces in sorted(parts.items()):
            mine = slice(number * queries, (number + 1) * queries)
            found.append(Asked(pieces, self.ids[mine], self.keys[mine], self.fitted, short=self.short))
        return found


class ReadyQueries(Iterable[Any]):
    """Query rows whose factors were computed before; they stand where their loader stands."""

    @abstractmethod
    def asked(self) -> Asked: ...

    def __iter__(self) -> Iterator[Any]:
        return iter(())


class PairScorer(Scorer):
    """<Op g_query, g_train>, and its derivative by the train row's input in perturbation mode."""

    def __init__(
        self,
        influence: ComposableInfluence,
        asked: Asked,
        mode: InfluenceMode,
        by_block: bool,
        scale: float,
        progress: bool,
        directions: Directions | None = None,
    ):
        self.influence, self.asked, self.by_block, self.scale = influence, asked, by_block, scale
        self.directions = directions
        perturbed = mode is InfluenceMode.Perturbation
        self.lost: dict[str, float] = {}
        """Of the queries' lengths, by block, what the worst of them has lost; empty where they are whole."""
        self.queries: Queries | None = None if perturbed else self._queries(progress)
        self.factors: Any = flat_factors(influence, asked, progress) if perturbed else None

    def _queries(self, progress: bool) -> Queries:
        influence, asked, directions = self.influence, self.asked, self.directions
        if asked.ready is not None:
            if directions is not None and directions.of_queries:
                raise InvalidSetting(
                    "normalise='both' needs the queries' own lengths, which kept factors do not have: give their "
                    "loader, or take normalise='train', which ranks each query's rows alike."
                )
            return asked.ready if asked.share is None else asked.ready.total(asked.share)
        # Whether rows are rotated or queries turned back depends on how many train rows each query meets.
        short = asked.short if asked.share is None else None
        factors = _Factors(influence, influence.n_train / len(asked), short, directions)
        pieces = sweep_kept(asked.pieces, factors, "query factors", progress)
        self.lost = factors.lost
        found = stack_queries(pieces if asked.short is None else level(pieces))
        return found if asked.share is None else found.total(asked.share)

    def scores(self, piece: PlacedBatch) -> np.ndarray:
        """[block, q, n, ...]. Errors: NonFiniteValue."""
        if self.queries is None:
            found = self._perturbed(piece.batch)
        else:
            by_block = piece.scores(self.queries, self.influence.provider, self.by_block)
            blocks = by_block if self.by_block else [sum(by_block[1:], by_block[0])]
            found = np.stack([to_numpy(block) for block in blocks])
        # In place: a tile may be large.
        found *= self.scale if self.directions is None else self.directions.train(piece).astype(found.dtype)
        check_scores(found, self.asked.ids, piece.names, self.influence)
        return found

    def _perturbed(self, batch: Batch) -> np.ndarray:
        mapper = self.influence.block_mapper
        if mapper.own_forms:
            parts = [mapper.interactions(one.batch, batch, InfluenceMode.Perturbation) for one in self.asked.pieces]
            stacked = [np.concatenate([to_numpy(part[name]) for part in parts]) for name in parts[0]]
            return np.stack(stacked) if self.by_block else np.sum(stacked, axis=0)[None]
        if self.by_block:
            found = mapper.interactions_from_transformed_grads(self.factors, batch, InfluenceMode.Perturbation)
            return np.stack([to_numpy(values) for values in found.values()])
        # A copy: some frameworks' arrays cannot be written to.
        return np.stack([to_numpy(mapper.perturbation(self.factors, batch))])

    def probe(self, piece: PlacedBatch) -> np.ndarray:
        """Of seeded queries."""
        few = np.random.default_rng(0).permutation(len(self.asked))[:PROBE_QUERIES]
        # A probe is nobody's answer.
        with unrecorded_solves():
            if self.queries is None:
                found = self._perturbed(piece.batch)
            else:
                by_block = self.queries.scores(piece.unweighted_grads(self.influence.provider))
                found = np.stack([to_numpy(scores) for scores in by_block.values()])
        return found[:, few]


def flat_factors(influence: ComposableInfluence, asked: Asked, progress: bool) -> dict[str, Array]:
    """Op(gradient) by block: [q, D_block]."""
    if asked.ready is not None:
        operators = influence.block_mapper.operators
        return {name: operators[name].lifted(value.flat()) for name, value in asked.ready.left.items()}
    make = Each[PlacedBatch, Any](lambda piece: influence.block_mapper.transformed_grads(piece.batch))
    found = sweep_kept(asked.pieces, make, "query factors", progress)
    return {name: namespace(found[0][name]).concat([factors[name] for factors in found], axis=0) for name in found[0]}


class _Factors(Each[PlacedBatch, Queries]):
    """Query gradients after their side of the operators, which the first of them decide."""

    def __init__(
        self,
        influence: ComposableInfluence,
        train_per_query: float,
        short: Shortening | None,
        directions: Directions | None,
    ):
        super().__init__(self._factors)
        self.influence, self.train_per_query = influence, train_per_query
        self.short, self.directions = short, directions
        self.sides: Sides | None = None
        self.lost: dict[str, float] = {}

    def _factors(self, piece: PlacedBatch) -> Queries:
        grads = self.influence.provider.grads(piece.batch, query=True)
        self.sides = self.sides or self.influence.block_mapper.sides(grads, self.train_per_query)
        found = self.sides.queries(grads)
        if self.directions is not None:
            found = self.directions.queries(found, grads, piece.names)
        if self.short is None or found.forms:  # a form of its own meets whole gradients
            return found
        short, lost = shorten(found, self.short)
        self.lost = {name: max(off, self.lost.get(name, 0.0)) for name, off in lost.items()}
        return short
