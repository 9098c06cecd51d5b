"""A run in a folder: tiles of scores, each complete or not there, so that a run that was stopped can go on.

    identity.json    what was asked
    probe.npz        scores of the first few train rows, which tell what is asked now from what was asked before, where
                     words do not: another model with the same weights, a fit on other labels
    tiles.zarr       one array for each tile, [block, query, train]
    ledger.jsonl     a line for each tile that is complete, with digests of its rows and of its files
    sums.npz         what was added up over tiles beside their scores, and which tiles these were

All of them are sealed (`store.seal`), and belong to one identity. A tile is written first and entered after, so a run
that is killed, or runs out of disk, loses at most the tile that it was writing. What is damaged or lost is either
computed again (tiles, ledger, sums) or refused (identity, probe). Without a probe no tile is trusted.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from headwater.errors import DamagedFile, InvalidInput
from headwater.store.base import Sink, Tile
from headwater.store.draft import draft_of, explained_errors, is_draft, remove_dead, write_new, write_whole
from headwater.store.seal import digest, file_digests, open_arrays, seal_arrays, sealed, unsealed

Where = tuple[int, int, int]
"""A tile: its rows from, to; and a number that their content gives (`place_of`)."""
OTHER_FOLDER = "Choose another folder, or remove this one."


class TileStore(Sink):
    """Tiles of one run. Opening a folder that holds another run is refused.

    identity: what makes two runs the same, JSON values only. tolerance: how far scores of one run may be off, relative
    to the largest, when it is fitted again in other batches; fractions in the identity may be off by a tenth of it.
    Errors: InvalidInput naming what differs; DamagedFile; NotWritten.
    """

    def __init__(self, path: str | os.PathLike[str], identity: Mapping[str, Any], tolerance: float = 1e-4):
        self.path, self.tolerance = Path(path), tolerance
        # Through JSON: tuples would not equal the lists that are read back.
        self._run = self._check_identity(json.loads(json.dumps(identity)), tolerance / 10)
        self._bound: str | None = None
        self._seen = 0
        """Bytes of the ledger when it was read last."""
        self._lines: dict[tuple[int, int], dict[str, Any]] | None = None
        # Tiles half-written by a killed run.
        for folder in (self.path, self._tiles):
            remove_dead(folder)

    def _check_identity(self, identity: dict[str, Any], tolerance: float) -> str:
        """The digest of the run's identity: that which came first."""
        file = self.path / "identity.json"
        if not file.exists():
            # Never write into somebody's folder of other things.
            if self.path.exists() and not all(is_draft(each.name) for each in self.path.iterdir()):
                raise InvalidInput(
                    f"{self.path} is not empty and holds no run of headwater: there is no {file.name} in it. "
                    "Choose another folder."
                )
            with explained_errors(self.path):
                self.path.mkdir(parents=True, exist_ok=True)
            write_new(file, json.dumps(sealed(identity), indent=1).encode())
        found, seal = unsealed(file, remedy=OTHER_FOLDER)
        names = {**found, **identity}
        # Fractions to a tolerance: a fit again, in other batches, gives another damping in its last digits.
        different = [name for name in names if not _same(found.get(name), identity.get(name), tolerance)]
        if different:
            changes = (f"{name} was {_short(found.get(name))}, now {_short(identity.get(name))}" for name in different)
            raise InvalidInput(f"{self.path} holds another run: {'; '.join(changes)}. {OTHER_FOLDER}")
        return str(seal["digest"])

    # What tells runs apart --------------------------------------------------------------------------------------------

    def probe(self, keys: np.ndarray, scores: np.ndarray) -> None:
        """The first few train rows' keys [train] and scores [block, query, train], without their weights.

        Kept by the run's first call, compared by others, each block to the tolerance. Errors: InvalidInput for other
        scores or other rows; DamagedFile; NotWritten.
        """
        file, place = self.path / "probe.npz", f"{self._run}/probe"
        # What tiles belong to depends on the probe, which may be written now.
        self._bound = self._lines = None
        # Of several processes one writes it; the others compare with that one.
        if not file.exists() and write_new(file, seal_arrays({"keys": keys, "scores": scores}, place)):
            return
        found = open_arrays(file, place, "Remove it; the run's tiles are then computed again.")
        both = min(len(keys), len(found["keys"]))  # a call in smaller batches has fewer rows in its first
        if not np.array_equal(keys[:both], found["keys"][:both]):
            raise self._other_rows(0, both)
        # In float64: gaps of half-precision scores would round to zero or to infinity.
        before = found["scores"][..., :both].astype(np.float64)
        now = scores[..., :both].astype(np.float64)
        if before.shape != now.shape:
            raise InvalidInput(f"{self.path} holds another run: its probe is {before.shape}, now {now.shape}.")
        for gap, largest in zip(np.abs(before - now), np.abs(now), strict=True):
            if not gap.max() <= self.tolerance * largest.max():  # NaN is refused
                raise InvalidInput(
                    f"The run stored in {self.path} has other scores than this call (they differ by {gap.max():.3g}, "
                    f"of {largest.max():.3g}): it was fitted on other rows, or its model computes something else. "
                    f"{OTHER_FOLDER}"
                )

    def _other_rows(self, start: int, stop: int) -> InvalidInput:
        return InvalidInput(
            f"The train loader gives other rows at {start} to {stop} than in the run stored in {self.path}. To go on "
            "with a run, its loader must not shuffle."
        )

    # Tiles ------------------------------------------------------------------------------------------------------------

    @property
    def _tiles(self) -> Path:
        return self.path / "tiles.zarr"

    @property
    def _belonging(self) -> str:
        """What the run's files belong to: its identity and probe."""
        if self._bound is None:
            probe = self.path / "probe.npz"
            self._bound = digest(self._run.encode(), probe.read_bytes() if probe.exists() else b"")
        return self._bound

    @property
    def _ledger(self) -> dict[tuple[int, int], dict[str, Any]]:
        """The lines that are whole and belong to this run, by tile."""
        if self._lines is None:
            file, bound = self.path / "ledger.jsonl", self._belonging
            # A line that is torn or another run's counts as not there: its tile is computed again.
            read = (_line(text, bound) for text in (file.read_bytes().split(b"\n") if file.exists() else ()))
            self._lines = {(line["start"], line["stop"]): line for line in read if line is not None}
        return self._lines

    def _look_again(self) -> None:
        """Others may write into the same run at the same time."""
        file = self.path / "ledger.jsonl"
        size = file.stat().st_size if file.exists() else 0
        if size != self._seen:
            self._lines, self._seen = None, size

    def read(self, start: int, keys: np.ndarray) -> np.ndarray | None:
        """The tile of the train rows from `start` on, with these keys: [block, query, train].

        None if it is not there, or not as it was written. Errors: InvalidInput if it was computed from other rows.
        """
        stop = start + len(keys)
        self._look_again()
        line = self._ledger.get((start, stop))
        if line is None:
            return None
        if line["rows"] != rows_digest(keys):
            raise self._other_rows(start, stop)
        import zarr

        folder = self._tiles / f"{start}-{stop}"
        try:
            # Digests of the very files: a tile that was changed after its line is not trusted.
            whole = folder.is_dir() and file_digests(folder) == line["tile"]
            return np.asarray(zarr.open_array(folder, mode="r")[:]) if whole else None
        except (OSError, KeyError, ValueError):  # another process is writing it again
            return None

    @property
    def needs_keys(self) -> bool:
        return True

    def write(self, tile: Tile) -> None:
        """Keep a tile; it counts once this returns. Errors: NotWritten; InvalidInput for one without keys."""
        if tile.keys is None:
            raise InvalidInput(f"The tile of train rows from {tile.start} on has no keys of its rows.")
        start, stop = tile.start, tile.start + len(tile.keys)
        # Files first, then the line: a line promises that its files are whole.
        digests = self._write_tile(start, stop, tile.scores)
        line = {"start": start, "stop": stop, "rows": rows_digest(tile.keys), "tile": digests}
        text = json.dumps({**line, "line": _line_digest(line, self._belonging)}).encode()
        with explained_errors(self.path), open(self.path / "ledger.jsonl", "a+b") as ledger:
            # A killed process may have left half a line: ours would be glued to it, and lost.
            torn = ledger.seek(0, os.SEEK_END) > 0 and not _ends_line(ledger)
            ledger.write((b"\n" if torn else b"") + text + b"\n")
            ledger.flush()
            # "It counts once this returns" has to hold after a power cut, too.
            os.fsync(ledger.fileno())
            if ledger.tell() == self._seen + len(text) + 1 + torn:  # nobody else wrote: there is nothing to look for
                self._seen = ledger.tell()
        self._ledger[start, stop] = line

    def _write_tile(self, start: int, stop: int, tile: np.ndarray) -> dict[str, str]:
        """The digests of its files. It takes its place at once: another process may be at the same tile."""
        import zarr

        folder = self._tiles / f"{start}-{stop}"
        written = draft_of(folder)
        with explained_errors(folder):
            try:
                self._tiles.mkdir(exist_ok=True)
                if not (self._tiles / "zarr.json").exists():
                    group = {"zarr_format": 3, "node_type": "group", "attributes": {}}
                    (self._tiles / "zarr.json").write_text(json.dumps(group))
                # Chunks that are all zero would not be written otherwise, and could not be told from lost ones.
                config: Any = {"write_empty_chunks": True}
                zarr.create_array(written, data=np.ascontiguousarray(tile), config=config)
                digests = file_digests(written)
                _take_place(written, folder)
                return digests
            except BaseException:
                shutil.rmtree(written, ignore_errors=True)
                raise

    # Sums -------------------------------------------------------------------------------------------------------------

    def write_sums(self, tiles: Collection[Where], sums: Mapping[str, np.ndarray]) -> None:
        """Keep arrays that were added up over these tiles, in place of those kept before. Errors: NotWritten."""
        covered = np.array(sorted(tiles), dtype=np.int64).reshape((-1, 3))
        content = seal_arrays({"__tiles__": covered, **sums}, f"{self._belonging}/sums")
        write_whole(self.path / "sums.npz", content)

    def read_sums(self) -> tuple[set[Where], dict[str, np.ndarray]] | None:
        """What `write_sums` kept: the tiles, and the arrays; None if there is nothing, or not as it was written."""
        try:
            arrays = open_arrays(self.path / "sums.npz", f"{self._belonging}/sums", "")
        except DamagedFile:
            return None
        covered = arrays.pop("__tiles__")
        return {(int(start), int(stop), int(rows)) for start, stop, rows in covered}, arrays


def rows_digest(keys: np.ndarray) -> str:
    """Of the rows with these keys, in order."""
    return digest(np.ascontiguousarray(keys, dtype="<u8").tobytes())


def place_of(start: int, keys: np.ndarray) -> Where:
    """The tile of the rows from `start` on, with these keys."""
    # 15 hex digits are 60 bits: they fit into the int64 array of `write_sums`.
    return start, start + len(keys), int(rows_digest(keys)[:15], 16)


def _line(text: bytes, bound: str) -> dict[str, Any] | None:
    """A line of the ledger; None for one that is torn, damaged, or another run's."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    whole = isinstance(line, dict) and line.pop("line", None) == _line_digest(line, bound)
    return line if whole else None


def _line_digest(line: Mapping[str, object], bound: str) -> str:
    return digest(bound.encode(), json.dumps(line, sort_keys=True).encode())


def _take_place(written: Path, folder: Path) -> None:
    for attempt in range(10):
        # A folder cannot be replaced atomically; between removal and rename another process may be quicker.
        shutil.rmtree(folder, ignore_errors=True)
        if folder.is_file():
            folder.unlink()
        try:
            written.rename(folder)
            return
        except OSError:  # another process was quicker
            if attempt == 9:
                raise


def _same(a: Any, b: Any, tolerance: float) -> bool:
    """JSON values; numbers, one of them with a fraction, to a relative tolerance."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[name], b[name], tolerance) for name in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(_same(x, y, tolerance) for x, y in zip(a, b, strict=True))
    numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in (a, b))
    # Whole numbers are counts and settings: they are the same or they are not.
    if numbers and (isinstance(a, float) or isinstance(b, float)):
        return a == b or (a != a and b != b) or abs(a - b) <= tolerance * max(abs(a), abs(b))
    return type(a) is type(b) and a == b


def _ends_line(file: Any) -> bool:
    file.seek(-1, os.SEEK_END)
    return bool(file.read(1) == b"\n")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
