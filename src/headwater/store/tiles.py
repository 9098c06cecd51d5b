"""A run in a folder: tiles of scores, each complete or not there, so that a run that was stopped can go on.

    identity.json          what was asked
    plan.json              how many train rows and queries a tile has
    probe.npz              scores of the first few train rows, which tell what is asked now from what was asked before,
                           where words do not: another model with the same weights, a fit on other labels
    rows/3.npz             ids and keys of the train rows of the fourth tiles
    tiles.zarr/            one zarr array, scores [block, query, train, ...]; a chunk is a tile
    ledger-WRITER.jsonl    a line for each tile that is complete, one file for each process that wrote some
    sums-WRITER.npz        what was added up over tiles beside their scores, and which tiles these were
    finished.json          once all tiles are there: how many, and what the scores mean
    3-0.claim              who is at a tile
    deleted.npz            positions of rows that are no longer shown
    compacted/             the run without them, on its way into the place of all this

All of them are sealed (`store.seal`), chunks by the checksum that zarr reads too. A tile is written first and entered
after, so a run that is killed, or runs out of disk, loses at most the tile that it was writing. What is damaged or lost
is either computed again (tiles, rows, ledger, sums) or refused (identity, plan, probe). Without a probe no tile is
trusted. A chunk has one writer at a time, and is replaced whole.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from headwater.errors import DamagedFile, InvalidInput, NotSaved
from headwater.store.base import Sink, Tile
from headwater.store.claims import Claims
from headwater.store.draft import draft_of, explained_errors, remove_dead, sync_folder, write_new, write_whole
from headwater.store.identity import IDENTITY, OTHER_FOLDER, claim_folder
from headwater.store.kinds import kind_of
from headwater.store.ledger import Ledger, Line
from headwater.store.lock import locked
from headwater.store.plan import Sizes
from headwater.store.seal import digest, open_arrays, seal_arrays, sealed, unsealed

Where = tuple[int, int, int]
"""The rows of a tile: from, to; and a number that their content gives (`where_of`)."""
KIND = "run"
PLAN, FINISHED = "plan.json", "finished.json"
COMPACTED, COMPLETE = "compacted", "complete.json"
LOCK = ".lock"
"""Held by who deletes, compacts, or brings a run to its end."""
LABELS = ("block", "query", "train")
CHECKSUM = 4
"""Bytes at the end of a chunk: CRC-32C of the others, as zarr's codec of that name writes it."""
ANEW = "Remove the folder; the run is then made anew."
AGAIN = "Make the call that wrote it again: what is damaged is then computed anew."


class TileFolder:
    """A run in a folder, to be read. Errors: NotSaved where there is none; DamagedFile."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        finish_compaction(self.path)
        if not (self.path / IDENTITY).is_file():
            raise NotSaved(f"There are no scores at {self.path}{kind_of(self.path)}.")
        self.identity, seal = unsealed(self.path / IDENTITY, remedy=OTHER_FOLDER)
        if self.identity.get("kind") != KIND:
            raise NotSaved(f"There are no scores at {self.path}; it holds a {self.identity.get('kind')}.")
        self.run = str(seal["digest"])
        file = self.path / PLAN
        found, _ = unsealed(file, remedy=ANEW)
        if found.pop("run", None) != self.run:
            raise DamagedFile(f"{file} belongs to another run. {ANEW}")
        self.sizes = Sizes(found["rows"], found["queries"], found.get("working"))
        self._ledger: Ledger | None = None
        self._lines: dict[tuple[int, int], list[Line]] = {}
        self._whole: set[tuple[int, int, str]] = set()

    # Tiles ------------------------------------------------------------------------------------------------------------

    @property
    def _belonging(self) -> str:
        """What the run's files belong to: its identity and probe."""
        probe = self.path / "probe.npz"
        return digest(self.run.encode(), probe.read_bytes() if probe.exists() else b"")

    @property
    def ledger(self) -> Ledger:
        if self._ledger is None:
            self._ledger = Ledger(self.path, self._belonging)
        return self._ledger

    def line(self, number: int, queries: int) -> Line | None:
        """What is entered of a tile: its rows from `start`, before `stop`, their digest (`rows`), its shape and dtype.

        number: of the train rows' tile, from 0; queries: of the query rows'. None where there is no such tile, or its
        file is not the one that was entered.
        """
        for line in self.ledger.news():
            self._lines.setdefault((line["tile"], line["queries"]), []).append(line)
        lines = self._lines.get((number, queries), [])
        if not lines:
            return None
        try:
            with open(self._chunk(lines[0]), "rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(0, size - CHECKSUM))
                checksum = file.read()
        except OSError:
            return None
        # The last four bytes and the size: which of several lines, by several writers, is about this very file.
        of_it = [n for n in lines if n["checksum"] == checksum.hex() and size == CHECKSUM + _bytes(n)]
        return of_it[-1] if of_it else None

    def whole_line(self, number: int, queries: int) -> Line | None:
        """`line`, of a tile that was read to its end once and is as it was written."""
        line = self.line(number, queries)
        if line is None or (number, queries, line["checksum"]) in self._whole:
            return line
        try:
            read_chunk(self._chunk(line), line)
        except DamagedFile:
            return None
        self._whole.add((number, queries, line["checksum"]))
        return line

    def complete(self) -> int:
        """How many tiles are there."""
        self.line(0, 0)  # reads what is new
        return sum(self.line(*place) is not None for place in list(self._lines))

    def _first_lines(self) -> list[Line]:
        """One of each tile."""
        return [lines[0] for lines in self._lines.values()]

    def read(self, number: int, queries: int) -> np.ndarray | None:
        """A tile that is there, whole: [block, query, train, ...]; None where `line` is, or its file is damaged."""
        line = self.whole_line(number, queries)
        return None if line is None else read_chunk(self._chunk(line), line)

    def rows(self, number: int) -> dict[str, np.ndarray] | None:
        """`ids` and `keys` of the train rows of these tiles: [n] each; None where they are not there, whole."""
        try:
            return open_arrays(self._rows(number), f"{self._belonging}/rows {number}", "")
        except DamagedFile:
            return None

    def read_sums(self) -> Iterator[tuple[set[Where], dict[str, np.ndarray]]]:
        """What each writer kept: the tiles, and the arrays; without what is not as it was written."""
        for file in sorted(self.path.glob("sums-*.npz")):
            try:
                arrays = open_arrays(file, f"{self._belonging}/sums", "")
            except DamagedFile:
                continue
            covered = arrays.pop("__tiles__")
            yield {(int(start), int(stop), int(rows)) for start, stop, rows in covered}, arrays

    def other_rows(self, start: int, stop: int) -> InvalidInput:
        return InvalidInput(
            f"The train loader gives other rows at {start} to {stop} than in the run stored in {self.path}. To go on "
            "with a run, its loader must not shuffle."
        )

    @property
    def finished_rows(self) -> int | None:
        """How many train rows the run has; None for one that is not finished, or whose end has to be written again."""
        try:
            meaning, seal = unsealed(self.path / FINISHED, remedy=AGAIN)
            return int(meaning["train_rows"]) if labels_digests(self.path) == seal["files"] else None
        except (DamagedFile, OSError):
            return None

    def _chunk(self, line: Line) -> Path:
        return chunk_file(self.path, line["tile"], line["queries"], len(line["shape"]))

    def _rows(self, number: int) -> Path:
        return self.path / "rows" / f"{number}.npz"


class TileStore(TileFolder, Sink):
    """Tiles of one run. Opening a folder that holds another run is refused.

    identity: what makes two runs the same, JSON values only; None for that of the folder. sizes: of the tiles, asked
    for where the folder has none yet. tolerance: how far scores of one run may be off, relative to the largest, when it
    is fitted again in other batches; fractions in the identity may be off by a tenth of it.
    Errors: InvalidInput naming what differs; DamagedFile; NotWritten.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        identity: Mapping[str, Any] | None,
        sizes: Callable[[], Sizes],
        tolerance: float = 1e-4,
    ):
        finish_compaction(Path(path))
        plan = Path(path) / PLAN
        run = None if identity is None else claim_folder(Path(path), KIND, identity, tolerance / 10)
        if run is not None and not plan.exists():
            # Those of whoever came first: tiles of two sizes cannot be mixed.
            write_new(plan, json.dumps(sealed({**asdict(sizes()), "run": run}), indent=1).encode())
        super().__init__(path)
        self.tolerance = tolerance
        self.claims = Claims(self.path)
        self._tidied: set[Path] = set()

    # What tells runs apart --------------------------------------------------------------------------------------------

    def probe(self, keys: np.ndarray, scores: np.ndarray, tolerance: float | None = None) -> None:
        """The first few train rows' keys [train] and scores [block, query, train, ...], without their weights.

        Kept by the run's first call, compared by others, each block to the tolerance; None for the store's.
        Errors: InvalidInput for other scores or other rows; DamagedFile; NotWritten.
        """
        tolerance = self.tolerance if tolerance is None else tolerance
        file, place = self.path / "probe.npz", f"{self.run}/probe"
        # What tiles belong to depends on the probe, which may be written now.
        self._ledger, self._lines = None, {}
        # Of several processes one writes it; the others compare with that one.
        if not file.exists() and write_new(file, seal_arrays({"keys": keys, "scores": scores}, place)):
            return
        found = open_arrays(file, place, "Remove it; the run's tiles are then computed again.")
        both = min(len(keys), len(found["keys"]))  # a call in smaller batches has fewer rows in its first
        if not both:  # all of them were deleted
            return
        if not np.array_equal(keys[:both], found["keys"][:both]):
            raise self.other_rows(0, both)
        # In float64: gaps of half-precision scores would round to zero or to infinity.
        before = found["scores"][:, :, :both].astype(np.float64)
        now = scores[:, :, :both].astype(np.float64)
        if before.shape != now.shape:
            raise InvalidInput(f"{self.path} holds another run: its probe is {before.shape}, now {now.shape}.")
        for gap, largest in zip(np.abs(before - now), np.abs(now), strict=True):
            if not gap.max() <= tolerance * largest.max():  # NaN is refused
                raise InvalidInput(
                    f"The run stored in {self.path} has other scores than this call (they differ by {gap.max():.3g}, "
                    f"of {largest.max():.3g}): it was fitted on other rows, or its model computes something else. "
                    f"{OTHER_FOLDER}"
                )

    def write(self, tile: Tile) -> None:
        """Keep a tile; it counts once this returns. Errors: NotWritten; InvalidInput for one that is no tile of these.

        Its first axis has one entry where scores are not kept by block.
        """
        count, queries = tile.scores.shape[2], tile.scores.shape[1]
        number, first = tile.start // self.sizes.rows, tile.queries // self.sizes.queries
        if tile.keys is None or tile.start % self.sizes.rows or count > self.sizes.rows or queries > self.sizes.queries:
            raise InvalidInput(f"The rows from {tile.start} on are no tile of {self.sizes}, or have no keys.")
        rows = self.write_rows(number, tile.ids, tile.keys)
        # Padded: all chunks of a zarr array have one shape.
        shape = (len(tile.scores), self.sizes.queries, self.sizes.rows, *tile.scores.shape[3:])
        padded = np.full(shape, np.nan, tile.scores.dtype.newbyteorder("<"))
        padded[:, :queries, :count] = tile.scores
        content, line = padded.tobytes(), {"tile": number, "queries": first, "start": tile.start, "rows": rows}
        line |= {"stop": tile.start + count, "asked": queries, "shape": list(padded.shape), "dtype": padded.dtype.str}
        checksum = google_crc32c.value(content).to_bytes(CHECKSUM, "little")
        line["checksum"] = checksum.hex()
        # Files first, then the line: a line promises that its files are whole.
        self._write(self._chunk(line), content + checksum)
        self.ledger.add(line)

    def write_rows(self, number: int, ids: np.ndarray, keys: np.ndarray) -> str:
        """Keep what the train rows of these tiles are called, if it is not there. Returns the rows' digest.

        Errors: NotWritten.
        """
        rows, there = rows_digest(keys), self.rows(number)
        if there is None or rows_digest(there["keys"]) != rows or not np.array_equal(there["ids"], ids):
            content = seal_arrays({"ids": ids, "keys": keys}, f"{self._belonging}/rows {number}")
            self._write(self._rows(number), content)
        return rows

    def _write(self, file: Path, content: bytes) -> None:
        if file.parent not in self._tidied:
            with explained_errors(file):
                file.parent.mkdir(parents=True, exist_ok=True)
            remove_dead(file.parent)
            self._tidied.add(file.parent)
        write_whole(file, content)

    # Sums -------------------------------------------------------------------------------------------------------------

    def write_sums(self, writer: str, tiles: Collection[Where], sums: Mapping[str, np.ndarray]) -> None:
        """Keep arrays that a writer added up over these tiles, in place of those it kept before. Errors: NotWritten."""
        covered = np.array(sorted(tiles), dtype=np.int64).reshape((-1, 3))
        content = seal_arrays({"__tiles__": covered, **sums}, f"{self._belonging}/sums")
        write_whole(self.path / f"sums-{writer}.npz", content)

    # The end of a run -------------------------------------------------------------------------------------------------

    def reopen(self) -> None:
        """A finished run goes on: rows are added."""
        with explained_errors(self.path):
            (self.path / FINISHED).unlink(missing_ok=True)

    def finish(
        self, query_ids: np.ndarray, train_ids: np.ndarray, blocks: list[str], meaning: Mapping[str, Any]
    ) -> None:
        """All tiles are there. meaning: what the scores mean, JSON values. Errors: NotWritten; DamagedFile."""
        with locked(self.path / LOCK):
            if self.finished_rows == len(train_ids):  # another worker was quicker
                return
            line = self.line(0, 0)
            if line is None:
                raise DamagedFile(f"{self.path}: the first tile is gone. {AGAIN}")
            for folder in {self.path / "rows", *(file.parent for file in map(self._chunk, self._first_lines()))}:
                remove_dead(folder)
            write_metadata(self.path, line, query_ids, train_ids, blocks)
            ids = seal_arrays({"query": query_ids, "train": train_ids}, f"{self._belonging}/ids")
            write_whole(self.path / "ids.npz", ids)
            found = {**meaning, "train_rows": len(train_ids), "blocks": blocks, "belongs": self._belonging}
            write_whole(self.path / FINISHED, json.dumps(sealed(found, labels_digests(self.path)), indent=1).encode())


def labels_digests(path: Path) -> dict[str, str]:
    """Of the files of a finished run that say what its chunks are. Errors: OSError where one is missing."""
    array = path / "tiles.zarr"
    files = [path / "ids.npz", array / "zarr.json", array / "scores/zarr.json"]
    files += [file for name in LABELS for file in sorted((array / name).rglob("*")) if file.is_file()]
    return {file.relative_to(path).as_posix(): digest(file.read_bytes()) for file in files}


def chunk_file(path: Path, number: int, queries: int, axes: int) -> Path:
    """Where zarr looks for a tile: its number among the train rows, and among the queries; axes: of the array."""
    return path.joinpath("tiles.zarr/scores/c", *map(str, (0, queries, number, *[0] * (axes - 3))))


def read_chunk(file: Path, line: Line) -> np.ndarray:
    """[block, query, train, ...], without what it is padded with. Errors: DamagedFile."""
    try:
        content = file.read_bytes()
    except OSError as error:
        raise DamagedFile(f"{file} cannot be read ({error}). {AGAIN}") from error
    scores, checksum = content[:-CHECKSUM], content[-CHECKSUM:]
    whole = len(scores) == _bytes(line) and checksum.hex() == line["checksum"]
    if not whole or google_crc32c.value(scores).to_bytes(CHECKSUM, "little") != checksum:
        raise DamagedFile(f"{file} is damaged: it is not what was written. {AGAIN}")
    padded = np.frombuffer(scores, line["dtype"]).reshape(line["shape"])
    return padded[:, : line["asked"], : line["stop"] - line["start"]]


def write_metadata(path: Path, line: Line, query_ids: np.ndarray, train_ids: np.ndarray, blocks: list[str]) -> None:
    """What makes the chunks one array for whoever reads zarr, with labels as xarray has them. Errors: NotWritten."""
    import xarray as xr
    import zarr
    from zarr.codecs import BytesCodec, Crc32cCodec
    from zarr.errors import UnstableSpecificationWarning

    further = line["shape"][3:]
    labels = dict(zip(LABELS, (np.array(blocks or ["all"]), query_ids, train_ids), strict=True))
    array, written = path / "tiles.zarr", draft_of(path / "tiles.zarr")
    try:
        with explained_errors(array), warnings.catch_warnings():
            warnings.simplefilter("ignore", UnstableSpecificationWarning)  # of words, as labels
            xr.Dataset(coords=labels).to_zarr(written, mode="w", consolidated=False)
            # Without its chunks, which are there.
            zarr.open_group(written, mode="a").create_array(
                "scores",
                shape=(line["shape"][0], len(query_ids), len(train_ids), *further),
                chunks=tuple(line["shape"]),
                dtype=line["dtype"],
                serializer=BytesCodec(endian="little"),
                compressors=(Crc32cCodec(),),
                fill_value=float("nan"),
                dimension_names=[*LABELS, *(f"x{axis}" for axis in range(len(further)))],
            )
            for name in labels:
                shutil.rmtree(array / name, ignore_errors=True)
                (written / name).rename(array / name)
            for name in ("scores/zarr.json", "zarr.json"):
                (written / name).replace(array / name)
    finally:
        # Of a write that failed, zarr's threads may still write others: what they put back is removed, too.
        for _ in range(20):
            shutil.rmtree(written, ignore_errors=True)
            if not written.exists():
                break
            time.sleep(0.01)


def finish_compaction(path: Path) -> None:
    """Take what `compact` made, and was killed before it was in its place. Errors: NotWritten; DamagedFile."""
    made = path / COMPACTED
    if not (made / COMPLETE).is_file():
        return
    with locked(path / LOCK):
        take_compacted(path)


def take_compacted(path: Path) -> None:
    """The same for who holds the lock."""
    made = path / COMPACTED
    with explained_errors(path):
        if not (made / COMPLETE).is_file():  # another process was quicker
            return
        names, _ = unsealed(made / COMPLETE, remedy="Compact the run again.")
        for old in [*path.glob("ledger-*.jsonl"), *path.glob("sums-*.npz"), path / "deleted.npz"]:
            if old.name not in names["files"]:
                old.unlink(missing_ok=True)
        # What has been moved is no longer there: this may be the second time.
        for name in names["files"]:
            if (made / name).exists():
                if (path / name).is_dir():  # aside, at once: a folder cannot be replaced
                    aside = draft_of(path / name)
                    (path / name).rename(aside)
                    shutil.rmtree(aside, ignore_errors=True)
                (made / name).replace(path / name)
        sync_folder(path)
        remove_dead(path)  # what an earlier attempt put aside
        shutil.rmtree(made, ignore_errors=True)


def rows_digest(keys: np.ndarray) -> str:
    """Of the rows with these keys, in order."""
    return digest(np.ascontiguousarray(keys, dtype="<u8").tobytes())


def where_of(start: int, stop: int, rows: str) -> Where:
    """The tile of these rows, with this digest."""
    # 15 hex digits are 60 bits: they fit into the int64 array of `write_sums`.
    return start, stop, int(rows[:15], 16)


def _bytes(line: Line) -> int:
    """Of a chunk's numbers."""
    return math.prod(line["shape"]) * np.dtype(line["dtype"]).itemsize
