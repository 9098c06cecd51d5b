"""Factors of query rows, Op(gradient), kept in a folder: queries that are asked again cost no gradient and no solve."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from headwater.arrays import Array, accumulable
from headwater.blocks import Layout
from headwater.errors import InvalidInput, InvalidSetting
from headwater.gradients.block import stack
from headwater.gradients.provider import BlockGradients
from headwater.influence import ComposableInfluence
from headwater.loaders.places import located
from headwater.mapper import Queries
from headwater.rows import PlacedBatch, Visitor, first_batch, sweep
from headwater.run.identity import fit_identity, fit_tolerance
from headwater.run.kept import TILE_BYTES, RowFacts, SharedSegments, key_arrays, keys_of, packed_tile
from headwater.run.packing import Packing, unpacked
from headwater.run.queries import Asked, ReadyQueries, flat_factors
from headwater.run.rows import distinct
from headwater.run.runners.environment import Worker
from headwater.run.runners.turns import check_worker
from headwater.store.kept import SegmentFolder, refuse_others
from headwater.store.segments import checked_dtype
from headwater.types import InfluenceMode

KIND = "factors of query rows"


class KeptFactors:
    """Factors of query rows in a folder: `influence.factors(loader, store=...)` makes it, `open` finds it again.

    It stands for the query loader in `influence.attribute` and `top`, and scores batches by itself (`influences`).
    Errors of use: InvalidInput, naming the fields in which model, method, damping or fit are others; DamagedFile.
    """

    def __init__(self, folder: SegmentFolder):
        self._folder = folder
        folder.complete()

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> KeptFactors:
        """Errors: NotSaved if there are none, or they are not complete; DamagedFile."""
        return cls(SegmentFolder(path, KIND))

    @property
    def path(self) -> Path:
        return self._folder.path

    @property
    def identity(self) -> dict[str, Any]:
        """What the factors are of, as JSON has it."""
        return dict(self._folder.identity)

    @property
    def rows(self) -> int:
        return self._folder.complete().rows

    def __len__(self) -> int:
        return self.rows

    @property
    def ids(self) -> np.ndarray:
        """What the rows are called: [rows]."""
        entries = self._folder.complete().entries
        return np.concatenate([self._folder.names(entry, self._folder.segment(entry)) for entry in entries])

    def check(self) -> list[Path]:
        """Read every file, and compare checksums: those that are damaged; the call that made them makes them anew."""
        return self._folder.check()

    def __repr__(self) -> str:
        return f"KeptFactors({self.rows} rows, {self.identity['method']}, {self.path})"

    def __iter__(self) -> Iterator[Any]:
        """Errors: InvalidInput: there are no rows in it."""
        raise InvalidInput(
            f"{self!r} stands for query rows in attribute and top; this needs the rows themselves: give their loader."
        )

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
        """Errors: DamagedFile."""
        operators = self.influence.block_mapper.operators
        like = accumulable(self.influence.like())
        layouts: dict[str, tuple[Layout, bool]] = {}
        for name, layout in self.influence.provider.layouts.items():
            small = operators[name].stored_layout
            layouts[name] = (layout, False) if small is None else (small, True)
        entries = self.folder.complete().entries
        segments = [self.folder.segment(entry) for entry in entries]
        tiles = [unpacked(segment, layouts, like) for segment in segments]
        left = OrderedDict((name, stack([tile[name] for tile in tiles])) for name in layouts)
        right = {name: operators[name].kept_sides(left[name])[1] for name in layouts}
        ids = np.concatenate([self.folder.names(e, s) for e, s in zip(entries, segments, strict=True)])
        known = self.influence.fitted_keys
        fitted = known is not None and all(bool(keys_of(segment).among(known).all()) for segment in segments)
        keys = np.concatenate([segment.raw("keys.run") for segment in segments])
        return Asked((), distinct(ids, "query"), keys, fitted, ready=Queries(left, right))


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
    runner = SharedSegments(tiles, influence.like(), worker, wide)
    rows.runner, rows.passes, rows.tile = runner, 0, runner.rows
    with located():
        found = sweep(influence.provider, rows, visitor, "query factors", progress)
        folder.publish(0, found)
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
        packed.arrays.update(key_arrays(item.keys), **{"keys.run": self.provider.content_keys(item.batch)})
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
