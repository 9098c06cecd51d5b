"""A run in a folder: each tile of scores is computed once, by whichever worker is at it, and kept.

For each span of queries the train rows are read once: tiles that are there are checked, missing ones computed. A worker
that finds all of them there computes nothing but the probe.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from headwater.arrays import working_memory, working_memory_limit
from headwater.errors import InvalidInput
from headwater.influence import ComposableInfluence
from headwater.rows import PlacedBatch, Rows, Visitor
from headwater.run.diagnosis import RunSums, SumStore
from headwater.run.rows import FittedRows, distinct, sweep_rows
from headwater.run.runners.in_step import TilesInStep
from headwater.run.runners.turns import Turn, Wanted, take_turns
from headwater.store.base import Tile
from headwater.store.claims import Claims
from headwater.store.ledger import Line
from headwater.store.plan import Sizes
from headwater.store.tiles import TileStore, rows_digest, where_of

PROBE_ROWS = 8
"""Of the train rows whose scores a stored run is known by."""


class Tiles(SumStore, Protocol):
    """The tiles of one run; see `TileStore`."""

    tolerance: float
    path: Path
    sizes: Sizes
    claims: Claims

    @property
    def finished_rows(self) -> int | None: ...

    def line(self, number: int, queries: int) -> Line | None: ...

    def whole_line(self, number: int, queries: int) -> Line | None: ...

    def rows(self, number: int) -> dict[str, np.ndarray] | None: ...

    def other_rows(self, start: int, stop: int) -> InvalidInput: ...

    def probe(self, keys: np.ndarray, scores: np.ndarray, tolerance: float | None = None) -> None: ...

    def write(self, tile: Tile) -> None: ...

    def write_rows(self, number: int, ids: np.ndarray, keys: np.ndarray) -> str: ...

    def reopen(self) -> None: ...

    def finish(
        self, query_ids: np.ndarray, train_ids: np.ndarray, blocks: list[str], meaning: Mapping[str, Any]
    ) -> None: ...


def open_tiles(
    influence: ComposableInfluence,
    path: str | os.PathLike[str],
    identity: Mapping[str, Any],
    sizes: Callable[[], Sizes],
    tolerance: float,
) -> Tiles:
    """The run's folder, of this process or of those that hold the model together.

    Errors: as `TileStore` and `TilesInStep`.
    """
    together = influence.source.together
    if together is None:
        return TileStore(path, identity, sizes, tolerance)
    return TilesInStep(path, identity, sizes, tolerance, together)


class Scorer(ABC):
    """What a run computes of train rows, for some queries."""

    @abstractmethod
    def scores(self, piece: PlacedBatch) -> np.ndarray:
        """[block, q, n, ...]. Errors: NonFiniteValue."""

    @abstractmethod
    def probe(self, piece: PlacedBatch) -> np.ndarray:
        """Of some queries, on rows that each have the weight of one, so that none hides: [block, some, n, ...]."""


@dataclass(frozen=True, eq=False)
class QuerySpan:
    """Some of the queries of a run, from `start` on; their scorer is made when it is needed."""

    number: int
    start: int
    make: Callable[[], Scorer]

    @cached_property
    def scorer(self) -> Scorer:
        return self.make()


def run_tiles(
    influence: ComposableInfluence,
    loader: Iterable[object],
    store: Tiles,
    spans: Sequence[QuerySpan],
    *,
    fitted: FittedRows,
    what: str,
    worker: tuple[int, int],
    append: bool,
    progress: bool,
    sums: RunSums | None = None,
    tolerance: float | None = None,
) -> np.ndarray:
    """Compute what is missing, and wait for what others compute. Returns the train rows' names, all tiles being there.

    fitted: checks the rows, once. append: rows may be more than those of a finished run. sums: of the gradients of
    tiles that are computed here. tolerance: of the probe. Errors: InvalidInput for rows that are others than the run's.
    """
    rows = Rows.of(influence.provider, loader)
    rows.tile = store.sizes.rows
    names: list[np.ndarray] = []
    turns: list[Turn] = []
    with working_memory(store.sizes.working or working_memory_limit()):
        for span in spans:

            def visit(wanted: Wanted, span: QuerySpan = span) -> tuple[list[Turn], list[int]]:
                tiles = TilePass(influence, store, span, wanted, append, sums, tolerance)
                try:
                    if names:
                        sweep_rows(influence.provider, rows, tiles, what, progress)
                    else:
                        found, _ = sweep_rows(influence.provider, rows, fitted & tiles, what, progress)
                        names.append(distinct(found, "train"))
                finally:
                    tiles.leave()
                    if sums is not None:
                        sums.keep()
                return tiles.found, tiles.computed

            # The rows are known from the first span: of a later one that is there, nothing needs to be read.
            if turns and all(_is_there(store, number, span.number, turn) for number, turn in enumerate(turns)):
                continue
            turns = take_turns(
                visit,
                lambda _: False,
                lambda number, turn, span=span: _is_there(store, number, span.number, turn),  # type: ignore[misc]
                store.claims,
                worker,
                store.path,
            )
    return names[0]


def probe_run(
    influence: ComposableInfluence, store: Tiles, span: QuerySpan, first: PlacedBatch, tolerance: float | None
) -> None:
    """Compare what is computed here with what the run is known by, on the first rows. Errors: as `TileStore.probe`."""
    few = first.take(slice(0, min(PROBE_ROWS, len(first.batch))))
    store.probe(few.whole_keys(influence.provider), span.scorer.probe(few), tolerance)


def _is_there(store: Tiles, number: int, queries: int, turn: Turn) -> bool:
    line = store.whole_line(number, queries)
    return line is not None and line["rows"] == turn.rows


@dataclass(eq=False)
class _Begun:
    """A tile whose rows are being met."""

    number: int
    start: int
    claimed: bool
    names: list[np.ndarray] = field(default_factory=list)
    keys: list[np.ndarray] = field(default_factory=list)
    scores: list[np.ndarray] = field(default_factory=list)

    @property
    def stop(self) -> int:
        return self.start + sum(map(len, self.keys))


class TilePass(Visitor[PlacedBatch, None, None]):
    """One pass over the train rows for some queries: what is wanted, missing and nobody else's is computed and kept."""

    def __init__(
        self,
        influence: ComposableInfluence,
        store: Tiles,
        span: QuerySpan,
        wanted: Wanted,
        append: bool,
        sums: RunSums | None,
        tolerance: float | None,
    ) -> None:
        self.influence, self.store, self.span, self.wanted, self.sums = influence, store, span, wanted, sums
        self.tolerance, self.append, self.expected = tolerance, append, store.finished_rows
        self.found: list[Turn] = []
        self.computed: list[int] = []
        self.rows = 0
        self._begun: _Begun | None = None

    def of(self, item: PlacedBatch) -> None:
        # Before anything is read: a stored tile is trusted only if the run is the same.
        if item.start == 0 and self.span.number == 0:
            probe_run(self.influence, self.store, self.span, item, self.tolerance)
        number = item.start // self.store.sizes.rows
        if self._begun is None:
            self._begun = self._begin(number)
        begun = self._begun
        begun.names.append(item.names)
        begun.keys.append(item.whole_keys(self.influence.provider))
        if begun.claimed:
            begun.scores.append(self.span.scorer.scores(item))
            if self.sums is not None and self.span.number == 0:
                self.sums.of(item)
            self.store.claims.touch(self._name(number))
        if begun.stop == (number + 1) * self.store.sizes.rows:
            self._end()

    def merge(self, one: None, other: None) -> None:
        """Tiles are in the store."""

    def finish(self, whole: None) -> None:
        """Errors: InvalidInput for fewer rows than a finished run has."""
        self._end()
        if self.expected is not None and self.rows < self.expected:
            raise self._fewer_rows()

    def leave(self) -> None:
        """A pass that ended in the middle gives up the tile that it was at."""
        if self._begun is not None and self._begun.claimed:
            self.store.claims.release(self._name(self._begun.number))

    def _name(self, number: int) -> str:
        return f"{number}-{self.span.number}"

    def _begin(self, number: int) -> _Begun:
        start = number * self.store.sizes.rows
        if self.expected is not None and not self.append and start >= self.expected:
            raise self._more_rows()
        line = self.store.whole_line(number, self.span.number)
        # A last tile that has fewer rows may have more now.
        grows = line is not None and line["stop"] - start < self.store.sizes.rows and self._may_grow
        claimed = (
            (line is None or grows)
            and self.wanted(number, self._name(number))
            and self.store.claims.claim(self._name(number))
        )
        if claimed and self.sums is not None and self.span.number == 0:
            self.sums.begin()
        return _Begun(number, start, claimed)

    @property
    def _may_grow(self) -> bool:
        return self.append or self.expected is None

    def _fewer_rows(self) -> InvalidInput:
        return InvalidInput(
            f"The train loader has {self.rows} rows, the finished run in {self.store.path} {self.expected}. To take "
            "rows out of it, use headwater.store.runs.delete; or choose another folder."
        )

    def _more_rows(self) -> InvalidInput:
        return InvalidInput(
            f"The train loader has more rows than the finished run in {self.store.path}, which has {self.expected}. If "
            "they were added on purpose, call attribute(..., append=True)."
        )

    def _end(self) -> None:
        begun = self._begun
        if begun is None:
            return
        self._begun, self.rows = None, begun.stop
        keys, names = np.concatenate(begun.keys), np.concatenate(begun.names)
        digest, stop = rows_digest(keys), begun.start + len(keys)
        if begun.claimed:
            try:
                self._check_grown(begun, keys)
                scores = np.concatenate(begun.scores, axis=2)
                if self.append:  # only now: rows before these were the run's
                    self.store.reopen()
                self.store.write(Tile(begun.start, names, keys, scores, self.span.start))
                if self.sums is not None and self.span.number == 0:
                    self.sums.enter(where_of(begun.start, stop, digest))
                self.computed.append(begun.number)
            finally:
                self.store.claims.release(self._name(begun.number))
        else:
            line = self.store.whole_line(begun.number, self.span.number)
            if line is not None and line["rows"] != digest:
                if self.expected is not None and stop > self.expected and not self.append:
                    raise self._more_rows()
                known = self.store.rows(begun.number)
                if self.expected is not None and known is not None and np.array_equal(known["keys"][: len(keys)], keys):
                    raise self._fewer_rows()
                if not self._may_grow or line["stop"] >= stop:
                    raise self.store.other_rows(begun.start, stop)
            if line is not None and line["rows"] == digest:
                self.store.write_rows(begun.number, names, keys)
        if self.sums is not None:
            self.sums.meet(where_of(begun.start, stop, digest))
        self.found.append(Turn(self._name(begun.number), digest))

    def _check_grown(self, begun: _Begun, keys: np.ndarray) -> None:
        """Errors: InvalidInput where the tile had other rows before."""
        line, known = self.store.line(begun.number, self.span.number), self.store.rows(begun.number)
        if line is None or known is None or rows_digest(known["keys"]) != line["rows"]:
            return
        before = known["keys"]
        if np.array_equal(before[: len(keys)], keys) and len(before) > len(keys):
            self.expected = self.expected or begun.start + len(before)
            raise self._fewer_rows()
        if len(before) > len(keys) or not np.array_equal(before, keys[: len(before)]):
            raise self.store.other_rows(begun.start, begun.start + len(keys))
