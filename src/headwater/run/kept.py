"""Gradients of train rows, kept in a folder: they stand where a train loader stands, without the model's passes.

1. One pass over the loader computes each row's gradient and keeps it in its structured form (`run.packing`), a segment
   for each tile of rows (`store.segments`), by any number of workers that see the folder (`run.runners.shared`).
2. A run over them maps the segments into memory. Rows that are matrices already, and meet queries as they are, are one
   matrix product a segment; all others go through the algebra as a loader's do.
3. What is kept is known by the model, and by what the method makes of its gradients before any curvature. So the same
   store serves every method, damping and query whose rows are those gradients; projected rows serve their projection.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np

from headwater.arrays import Array, accumulable, as_like, to_numpy
from headwater.blocks import Layout
from headwater.errors import BatchMismatch, InvalidInput, InvalidSetting, RulesChanged, UnsupportedModel
from headwater.gradients.block import BlockGradient
from headwater.gradients.provider import BlockGradients, StructuredGradientProvider
from headwater.influence import ComposableInfluence
from headwater.loaders.keys import RowKeys, RowMemory, is_among
from headwater.loaders.places import Place, here, located, move_to
from headwater.mapper import Queries
from headwater.methods.base import Method
from headwater.progress import track
from headwater.rows import Each, KeptTrainRows, PlacedBatch, Read, Rows, Visitor, first_batch, sweep
from headwater.run.index import KeptIndex, make_index
from headwater.run.kept_fit import StoredGradients, refuse_matrices, refuse_to_fit
from headwater.run.packing import Packed, Packing, described, has_layers, joined
from headwater.run.rows import distinct
from headwater.run.runners import shared
from headwater.run.runners.environment import Worker
from headwater.run.runners.turns import Turn, Wanted, check_worker, take_turns
from headwater.run.stored_rows import StoredRows, keys_of
from headwater.store.kept import ABOUT, NUMBERS, Entry, Manifest, SegmentFolder, TileFiles, refuse_others
from headwater.store.segments import Segment, checked_dtype, packed_ids

KIND = "gradients of train rows"
TILE_BYTES = 64 * 2**20
"""Of a segment, about, in float32."""
PROBE = 8
"""Numbers that a projection is known by."""
TOLERANCE = 1e-3
"""Of these: a basis that was fitted again in other batches differs in its last digits."""
MODEL = ("architecture", "loss", "fingerprint", "blocks", "views", "precision")


class KeptFolder:
    """Rows that were computed once, in a folder: they stand where a loader stands."""

    kind: ClassVar[str]
    """What is kept, in words."""
    stands_for: ClassVar[str]
    """What it takes the place of, and where."""

    def __init__(self, folder: SegmentFolder):
        self._folder = folder
        folder.complete()

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """Errors: NotSaved if there are none, or they are not complete; DamagedFile."""
        return cls(SegmentFolder(path, cls.kind))

    @property
    def path(self) -> Path:
        return self._folder.path

    @property
    def identity(self) -> dict[str, Any]:
        """What the rows are of and how they are kept, as JSON has it."""
        return dict(self._folder.identity)

    @property
    def rows(self) -> int:
        """Those that are not deleted."""
        return self._folder.complete().rows

    def __len__(self) -> int:
        return self.rows

    @property
    def ids(self) -> np.ndarray:
        """What the rows are called: their ids, or positions; appended rows come after all others. [rows]"""
        return self._each_row(self._folder.names)

    def _each_row(self, make: Callable[[Entry, Segment], np.ndarray]) -> np.ndarray:
        found = []
        for entry in self._folder.complete().entries:
            mine = make(entry, self._folder.segment(entry))
            found.append(np.delete(np.array(mine), entry.gone))
        return np.concatenate(found) if found else np.empty(0)

    def __iter__(self) -> Iterator[Any]:
        """Errors: InvalidInput: there are no rows in it."""
        raise InvalidInput(f"{self!r} stands for {self.stands_for}; this needs the rows themselves: give their loader.")


class KeptGradients(KeptFolder, KeptTrainRows):
    """Gradients of train rows in a folder: `influence.gradients(loader, store=...)` makes it, `open` finds it again.

    It stands for the train loader in `influence.attribute`, `top` and `self_influence`, whatever the damping and the
    queries, and in `fit` where that asks for gradients alone (`run.kept_fit`). Opening needs no model; using it needs
    the model that it was made with. Errors of use: InvalidInput, naming the fields in which model or method are others;
    DamagedFile, naming the file.
    """

    kind = KIND
    stands_for = "train rows in attribute, top, self_influence and fit"

    @property
    def nbytes(self) -> int:
        """Of all segments, on the disk."""
        return sum((self.path / entry.file).stat().st_size for entry in self._folder.complete().entries)

    @property
    def relative_error(self) -> np.ndarray | None:
        """|G - kept| / |G| of each row, over all blocks, by cutting to a rank: float32 [rows]; None where nothing is
        cut. Rounding to bfloat16 or int8 is not in it.
        """
        if self.identity["form"] != "low_rank":
            return None
        return self._each_row(lambda _, segment: segment.raw("error"))

    def __repr__(self) -> str:
        form = self.identity["form"] + (f" of rank {self.identity['rank']}" if self.identity["rank"] else "")
        return f"KeptGradients({self.rows} rows, {form}, {self.identity['dtype']}, {self.path})"

    # Changes ----------------------------------------------------------------------------------------------------------

    def append(
        self,
        influence: ComposableInfluence,
        loader: Iterable[object],
        *,
        worker: Worker = (0, 1),
        progress: bool = False,
    ) -> int:
        """Add a loader's rows that are not there; how many. Rows that are kept cost no pass through the model.

        A row with an id is known by it, one without by its content and weight. Rows without ids are called by the
        positions that come after those of all rows before. Errors: as use; BatchMismatch for an id whose row has
        changed (delete it first), and for rows with ids beside others without.
        """
        with influence.source.own_precision(), located():
            wanted = identity_of(influence, _packing(influence, self.identity), self.identity["dtype"])
            refuse_others(self.path, self.identity, wanted, TOLERANCE, "another model or method")
            before = self._folder.complete()
            self._folder.tidy()
            known = KnownRows.of(self._folder, before)
            rows = influence.train_rows(loader)
            number = check_worker(worker, self.path)
            tiles = _pass(influence, rows, self._folder, before, known, number, progress)
        return sum(tile["rows"] for tile in tiles)

    def delete(self, ids: Iterable[Any]) -> int:
        """Rows with these ids are seen no more, by anybody, from now on; how many. Their bytes go with `compact`.

        Errors: InvalidInput naming ids that are not there.
        """
        return self._folder.delete(list(ids))

    def compact(self) -> int:
        """Remove the bytes of deleted rows from the disk; how many rows. Killed at any moment, the store is whole.

        Other processes that are reading the store meanwhile may meet a file that is gone.
        """
        return self._folder.compact()

    def check(self, drop: bool = False) -> list[Path]:
        """Read every file, and compare checksums: those that are damaged or missing.

        drop: their rows are no part of the store any more, and the rest is; `append` computes them again, as the last,
        and those without ids are called by other positions then. Without `drop`, the call of `gradients` that made the
        store computes damaged files again, unless `append` or `compact` wrote them.
        """
        return self._folder.check(drop)

    # Use --------------------------------------------------------------------------------------------------------------

    def index(
        self,
        influence: ComposableInfluence,
        path: str | os.PathLike[str],
        factory: str = "Flat",
        progress: bool = False,
    ) -> KeptIndex:
        """The rows, gone through the operator once, in an index by inner product in a folder (needs FAISS).

        factory: its kind in FAISS's words: "Flat" looks at all, "HNSW32" or "IVF256,Flat" at some (an IVF learns from
        the first tile). It holds float32 vectors in memory: of the projected numbers where the method projects, else
        of all parameters. It is good for this fit at this damping, and for the store as it is now.
        Errors: as use; MissingExtra; InvalidSetting; AlreadySaved; NotWritten.
        """
        with influence.source.own_precision(), located():
            return make_index(influence, self, path, factory, progress)

    def train_rows(self, influence: ComposableInfluence) -> KeptRows:
        """The rows, for a run of this influence. Errors: as use."""
        packing = _packing(influence, self.identity)
        wanted = identity_of(influence, packing, self.identity["dtype"])
        refuse_others(self.path, self.identity, wanted, TOLERANCE, "another model or method")
        return KeptRows(influence, self._folder, bool(packing.operators))

    def rows_to_fit(
        self, influence: ComposableInfluence, memory: RowMemory
    ) -> tuple[StructuredGradientProvider, KeptRows]:
        """Their gradients as a fit of this influence reads them. Errors: as use, and as `refuse_to_fit`."""
        refuse_to_fit(influence.method, self.identity, self.path)
        if influence.source.needs_rows:
            raise InvalidInput(
                "Which layers the parameters form is known once rows were seen, and kept gradients show none: make the "
                "influence with example=x[:2], or call influence.look(loader) first."
            )
        rows = self.train_rows(influence)
        rows.be_met(memory, influence.method if influence.method.fit_reads == "layers" else None)
        return StoredGradients(influence.provider, self.path), rows


# Keeping --------------------------------------------------------------------------------------------------------------


def keep_gradients(
    influence: ComposableInfluence,
    loader: Iterable[object],
    *,
    store: str | os.PathLike[str],
    form: str,
    rank: int | None,
    dtype: str,
    worker: Worker,
    progress: bool,
) -> KeptGradients:
    """See `Attributor.gradients`."""
    if influence.source.together is not None:
        raise InvalidSetting("The model is spread over processes (FSDP2): what each row gives cannot be kept yet.")
    worker = check_worker(worker, store)
    checked_dtype(dtype)
    rows = influence.train_rows(loader)
    while True:
        try:
            return _kept(influence, rows, store, packing_of(influence, form, rank, dtype), dtype, worker, progress)
        except RulesChanged:  # fewer layers are left whose rules are trusted, so that this ends
            rows = influence.train_rows(loader)


def _kept(
    influence: ComposableInfluence,
    rows: Rows,
    store: str | os.PathLike[str],
    packing: Packing,
    dtype: str,
    worker: tuple[int, int],
    progress: bool,
) -> KeptGradients:
    folder = SegmentFolder.at(store, KIND, identity_of(influence, packing, dtype), TOLERANCE)
    now = folder.manifest()
    if now is None or now.generation == 0:
        _pass(influence, rows, folder, Manifest(), KnownRows(), worker, progress, packing, now)
        return KeptGradients(folder)
    if folder.damaged():
        _pass(influence, rows, folder, Manifest(), KnownRows(), worker, progress, packing, now)
    # Rows were appended or deleted since: what is missing now may be missing on purpose.
    known = KnownRows.of(folder, folder.complete())
    missing = sweep(influence.provider, rows, Each(lambda item: int((~known.has(item)).sum())), "rows", progress)
    if any(missing):
        raise InvalidInput(
            f"{store} was changed since it was made, and {sum(missing)} rows of the loader are not in it: "
            "hw.KeptGradients.open(path).append(influence, loader) adds them."
        )
    return KeptGradients(folder)


def number_of(dtype: str) -> Literal["float32", "float64"]:
    """What numbers are before they are stored, and once they were read again."""
    return "float64" if dtype == "float64" else "float32"


def packing_of(influence: ComposableInfluence, form: str, rank: int | None, dtype: str) -> Packing:
    """Errors: InvalidSetting; for form="projected", of a method that is not fitted, or projects nothing."""
    plain = Packing(form, rank, number=number_of(dtype))  # type: ignore[arg-type]
    if form not in ("auto", "projected"):
        return plain
    projecting = influence.is_fitted and any(
        op.stored_layout is not None for op in influence.block_mapper.operators.values()
    )
    if form == "projected" and not projecting:
        why = "projects no gradients" if influence.is_fitted else "has to be fitted before it can project rows"
        raise InvalidSetting(f"form is 'projected', and {influence.method.describe()} {why}.")
    return replace(plain, operators=influence.block_mapper.operators) if projecting else plain


def _packing(influence: ComposableInfluence, identity: Mapping[str, Any]) -> Packing:
    """How a store's rows are packed. Errors: InvalidInput for projected rows and a method that projects nothing."""
    form, rank, dtype = identity["form"], identity["rank"], identity["dtype"]
    if not identity["projection"]:
        return Packing("auto" if form == "projected" else form, rank, number=number_of(dtype))
    try:
        return packing_of(influence, "projected", None, dtype)
    except InvalidSetting as error:
        raise InvalidInput(f"The rows that are kept are projected: {error}") from None


def identity_of(influence: ComposableInfluence, packing: Packing, dtype: str) -> dict[str, Any]:
    """What kept gradients belong to."""
    known = influence.identity()
    form = "auto" if packing.form == "projected" else packing.form
    return {
        **{name: known[name] for name in ("architecture", "loss", "fingerprint", "blocks")},
        "views": list(influence.provider.views),
        "precision": influence.source.dtype,
        "projection": _projection(influence, packing),
        "method": influence.method.describe() if packing.operators else None,
        "form": form,
        "rank": packing.rank,
        "dtype": dtype,
    }


def _projection(influence: ComposableInfluence, packing: Packing) -> dict[str, list[float]] | None:
    """The first numbers that a seeded vector is projected to: words do not tell how a basis was fitted."""
    if not packing.operators:
        return None
    found, like = {}, accumulable(influence.like())
    for number, (name, operator) in enumerate(packing.operators.items()):
        layout = influence.provider.layouts[name]
        drawn = np.random.default_rng(number).standard_normal((1, layout.size))
        value = BlockGradient.from_flat(layout, as_like(drawn, like))
        found[name] = [float(v) for v in to_numpy(operator.stored(value).flat())[0, :PROBE]]
    return found


@dataclass(frozen=True)
class KnownRows:
    """Keys of rows that are kept."""

    plain: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.uint64))
    """Of content and weight, of rows without ids, sorted."""
    named: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.uint64))
    """All that rows with ids can be known by, sorted; see `RowKeys.fitted`."""
    names: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.uint64))
    """Of ids, sorted."""

    @classmethod
    def of(cls, folder: SegmentFolder, manifest: Manifest) -> KnownRows:
        plain, named, names = [], [], []
        for entry in manifest.entries:
            segment = folder.segment(entry)
            keys = keys_of(segment)
            there = np.delete(np.arange(entry.rows), entry.gone)
            if keys.ids is None:
                plain.append(keys.weighted[there])
            else:
                names.append(keys.ids[there])
                named.append(np.concatenate([keys.content[there], keys.ids[there], keys.shaped[there]]))  # type: ignore[index]
        return cls(*(np.sort(np.concatenate([*part, np.empty(0, np.uint64)])) for part in (plain, named, names)))

    def has(self, item: PlacedBatch) -> np.ndarray:
        """Whether each row is there: bool [n]. Errors: BatchMismatch."""
        keys = item.keys
        assert keys is not None
        if keys.ids is None:
            if len(self.names):
                raise BatchMismatch("The rows that are kept have ids, and these have none.")
            return is_among(keys.weighted, self.plain)
        if len(self.plain):
            raise BatchMismatch("The rows that are kept have no ids, and these have.")
        found, called = keys.among(self.named), is_among(keys.ids, self.names)
        if (called & ~found).any():
            row = int(np.argmax(called & ~found))
            raise BatchMismatch(
                f"{item.place.row(row)}: row {item.names[row]} is kept with other content. Delete it first."
            )
        return called


def _pass(
    influence: ComposableInfluence,
    rows: Rows,
    folder: SegmentFolder,
    before: Manifest,
    known: KnownRows,
    worker: tuple[int, int],
    progress: bool,
    packing: Packing | None = None,
    made: Manifest | None = None,
) -> list[dict[str, Any]]:
    """The tiles of one pass over a loader, of rows that are not known, once they are part of the store.

    made: by an earlier call that came to its end, of which this is a repetition; None if there was none.
    """
    packing = _packing(influence, folder.identity) if packing is None else packing
    provider = influence.provider
    visitor = KeepRows(provider, packing, known)
    # Whose rows are computed, and in which form, depends on what was there before.
    tiles = folder.tiles(before.series, checked_dtype(folder.identity["dtype"]), before.seal)
    look = first_batch(provider, rows)
    size = packing.of(provider.grads(look.take(slice(0, 1)), weighted=False)).bytes_per_row
    runner = SharedSegments(tiles, influence.like(), worker, int(TILE_BYTES // max(1.0, size)), made)
    rows.runner, rows.passes, rows.tile = runner, 0, runner.rows
    try:
        found = sweep(provider, rows, visitor, "train gradients", progress)
    finally:
        rows.runner = rows.tile = None
    folder.publish(before.series, found, runner.anew)
    return found


class SharedSegments(shared.SharedFolder):
    """A runner whose parts are segments of a store. rows: of a tile, as far as memory goes. role: of the rows.

    made: the store as an earlier call made it, if one has come to its end. Then only what is damaged is computed.
    Errors: InvalidInput for other rows than the store's; BatchMismatch for ids that come twice, and for batches
    with ids beside others without.
    """

    anew = False
    """Whether the rows are those of the store in other files, so that all were computed."""

    def __init__(
        self,
        tiles: TileFiles,
        like: Array,
        worker: tuple[int, int],
        rows: int,
        made: Manifest | None = None,
        role: str = "train",
    ):
        super().__init__(tiles, like, worker)
        self.segments, self.made, self.role, self._rows = tiles, made, role, rows
        self._keys: list[RowKeys] = []
        self._names: list[np.ndarray] = []

    @property
    def rows(self) -> int:
        return max(1, min(self._rows, shared.ROWS))

    def complete(self, visitor: Visitor[Any, Any, Any], read: Read, label: str) -> Sequence[Turn]:
        if self.made is None:
            return super().complete(visitor, read, label)
        made, files = self.made, {entry.file for entry in self.made.entries}

        def visit(wanted: Wanted) -> tuple[list[Turn], list[int]]:
            tiles, computed = self._visit(visitor, read, label, wanted)
            if made.generation == 0 and [self._file(tile) for tile in tiles] != [entry.file for entry in made.entries]:
                if not self._has_rows_of(made):
                    self.segments.folder.check_files(made, [self._file(tile) for tile in tiles])
                self.anew = True
            return tiles, computed

        # The first visit computes nothing: before it, nobody knows whether these are the rows.
        tiles = take_turns(
            visit,
            lambda _: True,
            lambda _, tile: not (self.anew or self._file(tile) in files) or self._is_there(tile),
            self.store.claims,
            self.worker,
            self.store.path,
        )
        return [tile for tile in tiles if self.anew or self._file(tile) in files]

    def merged(self, visitor: Visitor[Any, Any, Any], tiles: Sequence[Turn], label: str) -> Any:
        return super().merged(visitor, tiles, label) if tiles else []

    def _file(self, tile: Turn) -> str:
        return self.segments.file(tile.name, tile.rows)

    def _has_rows_of(self, made: Manifest) -> bool:
        """Whether the rows that were met are the store's, in its order: a layer's rule that was found wrong changes the
        files' names, and not the rows. Errors: DamagedFile.
        """
        met, segment = RowKeys.joined(self._keys), self.segments.folder.segment
        kept = RowKeys.joined([keys_of(segment(entry)) for entry in made.entries])
        if met.ids is None or kept.ids is None:
            return met.ids is kept.ids and np.array_equal(met.weighted, kept.weighted)
        return np.array_equal(met.ids, kept.ids) and np.array_equal(met.weighted, kept.weighted)

    def _visit(
        self, visitor: Visitor[Any, Any, Any], read: Read, label: str, wanted: Wanted
    ) -> tuple[list[Turn], list[int]]:
        self._keys, self._names = [], []
        found = super()._visit(visitor, read, label, wanted)
        if self._names:
            distinct(np.concatenate(self._names), self.role)
        return found

    def _noted(self, batches: Iterable[PlacedBatch], mine: str | None, keys: bytearray) -> Iterator[PlacedBatch]:
        for batch in super()._noted(batches, mine, keys):
            if batch.keys is not None:
                if self._keys and (batch.keys.ids is None) != (self._keys[0].ids is None):
                    raise BatchMismatch("Some batches have ids, and others have none. Give all rows ids, or none.")
                self._keys.append(batch.keys)
            if batch.batch.ids is not None:
                self._names.append(batch.names)
            yield batch


@dataclass(frozen=True, eq=False)
class RowFacts:
    """Some rows, ready to be written."""

    packed: Packed
    names: np.ndarray | None
    """Ids, if they have any."""
    refused: str | None
    """Why rows have no score on themselves."""


class KeepRows(Visitor[PlacedBatch, list[Any], list[dict[str, Any]]]):
    """Gradients of rows that are not known yet: on the host, and as tiles once they were written."""

    def __init__(self, provider: StructuredGradientProvider, packing: Packing, known: KnownRows):
        self.provider, self.packing, self.known = provider, packing, known

    def of(self, item: PlacedBatch) -> list[Any]:
        new = np.flatnonzero(~self.known.has(item))
        if not len(new):
            return []
        batch, keys = item.batch, item.keys
        assert keys is not None
        if len(new) < len(batch):
            batch, keys = batch.take(new), keys.take(new)
        packed = self.packing.of(self.provider.grads(batch, weighted=False))
        packed.arrays.update(key_arrays(keys))
        weights, (scale, refused) = self.provider.row_weights(batch), _self_scale(self.provider, batch)
        for name, values in (("weights", weights), ("self", scale)):
            if values is not None:
                packed.arrays[name] = to_numpy(values).astype(np.float64)
        return [RowFacts(packed, None if batch.ids is None else np.asarray(item.names)[new], refused)]

    def merge(self, one: list[Any], other: list[Any]) -> list[Any]:
        return one + other

    @property
    def is_shareable(self) -> bool:
        return True

    def pack(self, part: list[RowFacts]) -> dict[str, Any]:
        return packed_tile(part)

    def unpack(self, values: Mapping[str, object]) -> list[dict[str, Any]]:
        return [dict(values)]


def packed_tile(part: Sequence[RowFacts]) -> dict[str, Any]:
    """What a tile is written from."""
    if not part:
        return {ABOUT: described({"rows": 0, "blocks": {}})}
    about, arrays, numbers = joined([facts.packed for facts in _alike(part)])
    about["refused"] = next((facts.refused for facts in part if facts.refused), None)
    names = [facts.names for facts in part if facts.names is not None]
    arrays |= packed_ids(np.concatenate(names) if names else None)
    return {ABOUT: described(about), **arrays, **{f"{NUMBERS}{name}": v for name, v in numbers.items()}}


def _alike(part: Sequence[RowFacts]) -> Sequence[RowFacts]:
    """With weights of one for rows without, where others of the tile have some."""
    for name in ("weights", "self"):
        if any(name in facts.packed.arrays for facts in part):
            for facts in part:
                facts.packed.arrays.setdefault(name, np.ones(facts.packed.rows))
    return part


def _self_scale(provider: StructuredGradientProvider, batch: Any) -> tuple[Any, str | None]:
    try:
        return provider.self_scale(batch), None
    except UnsupportedModel as error:  # said where it is asked for
        return None, str(error)


def key_arrays(keys: RowKeys) -> dict[str, np.ndarray]:
    found = {"keys.content": keys.content, "keys.weighted": keys.weighted}
    return found if keys.ids is None else {**found, "keys.ids": keys.ids, "keys.shaped": keys.shaped}  # type: ignore


# Use ------------------------------------------------------------------------------------------------------------------


class KeptRows(Rows):
    """Rows of a store, for a run: what a loader's are, without inputs and targets."""

    def __init__(
        self,
        influence: ComposableInfluence,
        folder: SegmentFolder,
        projected: bool,
        manifest: Manifest | None = None,
    ):
        super().__init__(influence.source, (), "train")
        self.folder, self.manifest = folder, folder.complete() if manifest is None else manifest
        self._of = influence, projected
        self.like = accumulable(influence.like())
        self.layouts: dict[str, tuple[Layout, bool]] = {}
        for name, layout in influence.provider.layouts.items():
            small = influence.block_mapper.operators[name].stored_layout if projected else None
            self.layouts[name] = (layout, False) if small is None else (small, True)
        self._matrix: tuple[Queries | None, np.ndarray | None] = (None, None)

    @property
    def is_kept(self) -> bool:
        return True

    def count(self) -> int:
        return self.manifest.rows

    def glance(self) -> None:
        """Segments do not change."""

    def be_met(self, memory: RowMemory, by_layers: Method[Any] | None) -> None:
        """As a loader's rows are in a first pass. by_layers: of a method that needs what layers gave.

        Errors: DamagedFile; BatchMismatch where these rows have to be others; InvalidSetting for rows that are kept as
        matrices.
        """
        self.memory = memory
        found: list[RowKeys] = []
        start = 0
        for entry in self.manifest.entries:
            rows = self._stored(entry)
            if by_layers is not None and entry.visible and not has_layers(rows.segment):
                refuse_matrices(self.folder.path, by_layers.describe())
            memory.compare(rows.keys, Place("train", len(found), start, len(rows)))
            found.append(rows.keys)
            start += len(rows)
        if not self.manifest.rows:
            raise self._empty()
        memory.end(found, "train")

    def _stored(self, entry: Entry) -> StoredRows:
        """Errors: DamagedFile."""
        return StoredRows.of(self.folder, entry, self.layouts, self.like)

    def _empty(self) -> InvalidInput:
        return InvalidInput(f"There are no rows in {self.folder.path}: all were deleted.")

    def only(self, rows: Mapping[str, Sequence[int]]) -> KeptRows:
        """Of each file, these rows alone: all others are left out as deleted ones are."""
        entries = tuple(
            replace(entry, gone=np.setdiff1d(np.arange(entry.rows), rows[entry.file]).tolist())
            for entry in self.manifest.entries
            if entry.file in rows
        )
        influence, projected = self._of
        return KeptRows(influence, self.folder, projected, replace(self.manifest, entries=entries))

    def pieces(self, what: str, show: bool) -> Iterator[PlacedBatch]:
        """Errors: DamagedFile; InvalidInput if there are no rows."""
        if not self.manifest.rows:
            raise self._empty()
        outer, start = here(), 0
        entries = [entry for entry in self.manifest.entries if entry.visible]
        ahead = [self._stored(entry) for entry in entries[:1]]
        for number, entry in enumerate(track(entries, what, show)):
            rows = ahead.pop()
            if number + 1 < len(entries):  # the disk is at the next one while this is multiplied
                ahead.append(self._stored(entries[number + 1]))
                ahead[0].segment.will_be_read()
            place = Place("train", number, start, entry.visible)
            move_to(place)
            yield KeptBatch.of(rows, place, self)
            start += entry.visible
        move_to(outer)

    def matrix(self, queries: Queries) -> np.ndarray | None:
        """The queries as a matrix [D, q] in the rows' dtype, which rows are multiplied by; None if that is not all.

        It is, where rows meet queries as they are kept: nothing is done to them, and the product is the plain one.
        """
        if self._matrix[0] is not queries:
            self._matrix = queries, self._made(queries)
        return self._matrix[1]

    def _made(self, queries: Queries) -> np.ndarray | None:
        if queries.forms or not all(side.keeps_rows for side in queries.right.values()):
            return None
        columns = []
        for name, (layout, _) in self.layouts.items():
            left = queries.left[name]
            if left.layout != layout or len(left.parts) != len(layout.parts):  # rows are whole, and to be projected
                return None
            columns += [to_numpy(part.dense()).reshape((left.rows, -1)) for part in left.parts]
        number = number_of(self.folder.identity["dtype"])
        return np.ascontiguousarray(np.concatenate(columns, axis=1).astype(number).T)


@dataclass(frozen=True, eq=False)
class KeptBatch(PlacedBatch):
    """Rows of a segment, on their way through a run."""

    batch: StoredRows
    source: KeptRows = field(kw_only=True)

    @classmethod
    def of(cls, rows: StoredRows, place: Place, source: KeptRows) -> KeptBatch:
        return cls(rows, place, rows.keys, source=source)

    def take(self, rows: slice) -> KeptBatch:
        place = replace(self.place, offset=self.place.offset + rows.start)
        return KeptBatch.of(self.batch.take(rows), place, self.source)

    @property
    def is_kept(self) -> bool:
        return True

    @property
    def names(self) -> np.ndarray:
        return self.batch.names

    def grads(self, provider: StructuredGradientProvider) -> BlockGradients:
        return self.batch.times(self.batch.weights, self.batch.grads())

    def unweighted_grads(self, provider: StructuredGradientProvider) -> BlockGradients:
        return self.batch.grads()

    def self_grads(self, provider: StructuredGradientProvider) -> BlockGradients:
        """Errors: UnsupportedModel, as the provider's."""
        scale = self.batch.self_scale
        return self.batch.times(scale, self.grads(provider))

    def scores(self, queries: Queries, provider: StructuredGradientProvider, by_block: bool) -> list[Array]:
        """As one matrix product on the memory map, where rows are matrices and nothing else is asked."""
        matrix = None if by_block or not self.batch.is_flat else self.source.matrix(queries)
        return super().scores(queries, provider, by_block) if matrix is None else [self.batch.product(matrix).T]
