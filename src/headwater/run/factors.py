"""Factors of query rows, Op(gradient), kept in a folder: queries that are asked again cost no gradient and no solve."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from headwater.arrays import Array, accumulable
from headwater.blocks import Layout
from headwater.errors import InvalidSetting
from headwater.gradients.block import stack
from headwater.gradients.provider import BlockGradients
from headwater.influence import ComposableInfluence
from headwater.loaders.places import located
from headwater.mapper import Queries
from headwater.operators.algebra import LinearOperator
from headwater.rows import KeptQueryRows, PlacedBatch, Visitor, first_batch, sweep
from headwater.run.identity import fit_identity, fit_tolerance
from headwater.run.kept import TILE_BYTES, KeptFolder, RowFacts, SharedSegments, key_arrays, packed_tile
from headwater.run.packing import Packing, unpacked
from headwater.run.queries import Asked, ReadyQueries, flat_factors
from headwater.run.rows import distinct
from headwater.run.runners.environment import Worker
from headwater.run.runners.turns import check_worker
from headwater.run.stored_rows import keys_of
from headwater.store.kept import SegmentFolder, refuse_others
from headwater.store.segments import Segment, checked_dtype
from headwater.types import InfluenceMode

KIND = "factors of query rows"


class KeptFactors(KeptFolder, KeptQueryRows):
    """Factors of query rows in a folder: `influence.factors(loader, store=...)` makes it, `open` finds it again.

    It stands for the query loader in `influence.attribute` and `top`, and scores batches by itself (`influences`).
    Errors of use: InvalidInput, naming the fields in which model, method, damping or fit are others; DamagedFile.
    """

    kind = KIND
    stands_for = "query rows in attribute and top"

    def check(self) -> list[Path]:
        """Read every file, and compare checksums: those that are damaged; the same call computes these again."""
        return self._folder.check()

    def __repr__(self) -> str:
        return f"KeptFactors({self.rows} rows, {self.identity['method']}, {self.path})"

    def query_rows(self, influence: ComposableInfluence) -> KeptQueries:
        """The rows, for a run of this influence. Errors: as use."""
        influence.ready()
        refuse_others(
            self.path,
            self.identity,
            {**fit_identity(influence), "dtype": self.identity["dtype"]},
            fit_tolerance(influence),
        )
        return KeptQueries(influence, self._folder)

    def by_block(self, influence: ComposableInfluence) -> OrderedDict[str, Array]:
        """As `influence_factors_by_block` gives them: (rows, D_block) by block. Errors: as use."""
        return OrderedDict(flat_factors(influence, self.query_rows(influence).asked(), False))

    def influences(
        self, influence: ComposableInfluence, x: object, y: object, mode: InfluenceMode | str = InfluenceMode.Up
    ) -> Any:
        """Scores of train rows (x, y): (rows, N), or in mode "perturbation" (rows, N, *x_shape).

        Errors: as use; UnsupportedInfluenceModeError.
        """
        return influence.influences_from_factors(self.by_block(influence), x, y, mode)


class KeptQueries(ReadyQueries):
    """Kept factors, for a run."""

    def __init__(self, influence: ComposableInfluence, folder: SegmentFolder):
        self.influence, self.folder = influence, folder

    def asked(self) -> Asked:
        """Factors are read when they are asked for, some queries at a time. Errors: DamagedFile."""
        entries = self.folder.complete().entries
        segments = [self.folder.segment(entry) for entry in entries]
        ids = np.concatenate([self.folder.names(e, s) for e, s in zip(entries, segments, strict=True)])
        known = self.influence.fitted_keys
        fitted = known is not None and all(bool(keys_of(segment).among(known).all()) for segment in segments)
        keys = np.concatenate([keys_of(segment).whole for segment in segments])
        ready = KeptSides.of(self.influence, segments, len(ids))
        return Asked((), distinct(ids, "query"), keys, fitted, ready=ready)


class FactorsRead:
    """Factors of one span of kept queries at a time: those of another one are read in their place."""

    def __init__(self, segments: Sequence[Segment], layouts: Mapping[str, tuple[Layout, bool]], like: Array):
        self.segments, self.layouts, self.like = segments, layouts, like
        self._held: tuple[slice, BlockGradients] | None = None

    def of(self, span: slice) -> BlockGradients:
        """Rows [start, stop) of all segments under one another, by block. Errors: DamagedFile."""
        if self._held is None or self._held[0] != span:
            self._held = None  # before the others are read: both may not fit
            self._held = span, self._read(span)
        return self._held[1]

    def _read(self, span: slice) -> BlockGradients:
        found, start = [], 0
        for segment in self.segments:
            rows = slice(max(span.start - start, 0), min(span.stop - start, segment.rows))
            if rows.start < rows.stop:
                found.append(unpacked(segment, self.layouts, self.like, rows))
            start += segment.rows
        return OrderedDict((name, stack([values[name] for values in found])) for name in self.layouts)


class KeptSides(Queries):
    """Kept queries, whose factors are read when they are asked for."""

    def __init__(self, read: FactorsRead, span: slice, right: Mapping[str, LinearOperator]):
        # `left` is a property here; the fields of the frozen base are set as its own constructor sets them.
        object.__setattr__(self, "read", read)
        object.__setattr__(self, "span", span)
        object.__setattr__(self, "right", right)
        object.__setattr__(self, "forms", {})

    read: FactorsRead
    span: slice

    @classmethod
    def of(cls, influence: ComposableInfluence, segments: Sequence[Segment], queries: int) -> KeptSides:
        """All of them. Errors: DamagedFile."""
        operators = influence.block_mapper.operators
        layouts: dict[str, tuple[Layout, bool]] = {}
        for name, layout in influence.provider.layouts.items():
            small = operators[name].stored_layout
            layouts[name] = (layout, False) if small is None else (small, True)
        read = FactorsRead(segments, layouts, accumulable(influence.like()))
        # What rows go through does not depend on which queries these are: see `kept_sides`.
        right = {name: operators[name].kept_sides(value)[1] for name, value in read.of(slice(0, 1)).items()}
        return cls(read, slice(0, queries), right)

    @property
    def left(self) -> BlockGradients:
        return self.read.of(self.span)

    def take(self, rows: slice) -> KeptSides:
        start, stop, _ = rows.indices(self.span.stop - self.span.start)
        return KeptSides(self.read, slice(self.span.start + start, self.span.start + stop), self.right)


def keep_factors(
    influence: ComposableInfluence,
    loader: Iterable[object],
    *,
    store: str | os.PathLike[str],
    dtype: str,
    worker: Worker,
    progress: bool,
) -> KeptFactors:
    """See `Attributor.factors`."""
    if influence.source.together is not None:
        raise InvalidSetting("The model is spread over processes (FSDP2): what each row gives cannot be kept yet.")
    worker = check_worker(worker, store)
    mapper = influence.ready()
    if mapper.own_forms:
        raise InvalidSetting(
            f"{influence.method.describe()} scores by a bilinear form of its own, not by <Op left, right>: there are "
            "no factors that train rows could meet."
        )
    folder = SegmentFolder.at(
        store, KIND, {**fit_identity(influence), "dtype": checked_dtype(dtype)}, fit_tolerance(influence)
    )
    rows = influence.query_rows(loader)
    tiles = folder.tiles(0, checked_dtype(dtype), "")
    visitor = KeepFactors(influence)
    size = Packing().of(visitor.factors(influence.provider, first_batch(influence.provider, rows).take(slice(0, 1))))
    wide = max(1, int(TILE_BYTES // max(1.0, size.bytes_per_row)))
    runner = SharedSegments(tiles, influence.like(), worker, wide, folder.manifest(), "query")
    rows.runner, rows.passes, rows.tile = runner, 0, runner.rows
    try:
        with located():
            found = sweep(influence.provider, rows, visitor, "query factors", progress)
    finally:
        rows.runner = rows.tile = None
    folder.publish(0, found, runner.anew)
    return KeptFactors(folder)


class KeepFactors(Visitor[PlacedBatch, list[Any], list[dict[str, Any]]]):
    """Factors of query rows: on the host, and as tiles once they were written."""

    def __init__(self, influence: ComposableInfluence):
        self.provider, self.operators = influence.provider, influence.block_mapper.operators

    def factors(self, provider: Any, batch: Any) -> BlockGradients:
        """In the small space, where rows meet in one."""
        grads = provider.grads(batch, query=True)
        found: BlockGradients = OrderedDict()
        for name, value in grads.items():
            left, _ = self.operators[name].kept_sides(value)
            found[name] = left.apply_block(left.seen(value))
        return found

    def of(self, item: PlacedBatch) -> list[Any]:
        packed = Packing().of(self.factors(self.provider, item.batch))
        assert item.keys is not None
        packed.arrays.update(key_arrays(item.keys))
        return [RowFacts(packed, None if item.batch.ids is None else np.asarray(item.names), None)]

    def merge(self, one: list[Any], other: list[Any]) -> list[Any]:
        return one + other

    @property
    def is_shareable(self) -> bool:
        return True

    def pack(self, part: Sequence[RowFacts]) -> dict[str, Any]:
        return packed_tile(part)

    def unpack(self, values: Mapping[str, object]) -> list[dict[str, Any]]:
        return [dict(values)]
