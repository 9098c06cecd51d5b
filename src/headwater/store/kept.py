"""A folder of segments: rows that were computed once, and are kept.

    identity.json               what the rows are of, sealed
    manifest.json               the segments in order, with their checksums and the rows of each that were deleted;
                                written whole, in place of the one before: all that changes the store is one rename
    tiles-0/000012-5d8e1f03.safetensors
                                the thirteenth tile of the first pass; tiles-1/... those that were appended
    claims/                     who is at which tile; the lock of who changes the manifest

A segment never changes. What a killed process left is no part of the store: drafts, tiles of a pass that did not come
to its end (which the same call goes on with), and segments that a new manifest has no more.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from headwater.errors import DamagedFile, InvalidInput, NotSaved
from headwater.store.claims import Claims
from headwater.store.draft import explained_errors, is_draft, remove_dead, sync_folder, write_new, write_whole
from headwater.store.identity import IDENTITY, same, short
from headwater.store.kinds import kind_of
from headwater.store.lock import locked
from headwater.store.seal import digest, sealed, unsealed
from headwater.store.segments import REMEDY, SUFFIX, Segment, Stored, write_segment

VERSION = 1
"""Of the folder's form."""
MANIFEST, CLAIMS, LOCK = "manifest.json", "claims", "manifest.lock"
ABOUT, NUMBERS = "about", "numbers/"
"""Of what a tile is written from: its JSON, and the prefix of what is stored in the store's dtype."""
LATER = (
    "It was written after the store was made, by append or compact, and no call makes it again: check(drop=True) "
    "leaves its rows out, and append computes them, as the last; those without ids are then called by other positions."
)
POLL = 0.02
"""Seconds between two tries to be the one who changes the manifest."""


@dataclass(frozen=True)
class Entry:
    """A segment of the store."""

    file: str
    """Beside the manifest."""
    rows: int
    start: int
    """Position of its first row among all that were ever kept: what rows without ids are called by."""
    checksum: str
    gone: list[int] = field(default_factory=list)
    """Rows of the file that were deleted, ascending."""

    @property
    def visible(self) -> int:
        return self.rows - len(self.gone)

    @property
    def is_first(self) -> bool:
        """Whether the pass that made the store wrote it: a later one cannot be made again from rows alone."""
        folder, _, name = self.file.partition("/")
        return folder == "tiles-0" and name.removesuffix(SUFFIX).count(".") == 0


@dataclass(frozen=True)
class Manifest:
    """All segments of a store."""

    entries: tuple[Entry, ...] = ()
    generation: int = 0
    """How often the store was changed since it was made."""
    series: int = 0
    """Passes that came to their end: of making the store, and of each that appended rows."""
    ever: int = 0
    """Rows that were ever kept."""
    seal: str = ""
    """Of the file that it was read from."""

    @property
    def rows(self) -> int:
        """Those that are not deleted."""
        return sum(entry.visible for entry in self.entries)

    def as_json(self) -> dict[str, Any]:
        return {
            "version": VERSION,
            "generation": self.generation,
            "series": self.series,
            "ever": self.ever,
            "entries": [asdict(entry) for entry in self.entries],
        }


def _with(manifest: Manifest, tiles: Sequence[Mapping[str, Any]]) -> Manifest:
    """After one more pass."""
    entries, position = list(manifest.entries), manifest.ever
    for tile in tiles:
        entries.append(Entry(tile["file"], tile["rows"], position, tile["checksum"]))
        position += tile["rows"]
    return Manifest(tuple(entries), manifest.generation, manifest.series + 1, position)


class SegmentFolder:
    """A folder that holds one thing. kind: what that is, in words ("gradients of train rows").

    Errors: NotSaved where there is none; InvalidInput for a folder of something else; DamagedFile.
    """

    def __init__(self, path: str | os.PathLike[str], kind: str):
        self.path, self.kind = Path(path), kind
        file = self.path / IDENTITY
        if not file.is_file():
            raise NotSaved(f"There are no {kind} at {path}{kind_of(self.path)}.")
        self.identity, seal = unsealed(file, remedy="Keep them again, in another folder.")
        if self.identity.get("kind") != kind:
            raise NotSaved(f"There are no {kind} at {path}; it holds {self.identity.get('kind', 'something else')}.")
        if self.identity.get("version") != VERSION:
            found = self.identity.get("version")
            raise InvalidInput(f"{path} has version {found!r}; this headwater reads {VERSION}. Keep them again.")
        self.digest = str(seal["digest"])

    @classmethod
    def at(
        cls, path: str | os.PathLike[str], kind: str, identity: Mapping[str, Any], tolerance: float
    ) -> SegmentFolder:
        """The folder, made if there is none. tolerance: of numbers with a fraction, as in `refuse_others`.

        Errors: InvalidInput, naming what differs from what is there; NotWritten.
        """
        wanted = json.loads(json.dumps({"kind": kind, "version": VERSION, **identity}))
        folder, file = Path(path), Path(path) / IDENTITY
        if folder.exists() and not folder.is_dir():
            raise InvalidInput(f"{path} is a file; {kind} are kept in a folder. Choose another name.")
        if folder.exists() and not file.exists() and not all(is_draft(each.name) for each in folder.iterdir()):
            raise InvalidInput(f"{path} is not empty, and holds no {kind}. Choose another folder.")
        with explained_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        # Of several processes one writes it, and all compare with that.
        write_new(file, json.dumps(sealed(wanted), indent=1).encode())
        found = cls(path, kind)
        refuse_others(path, found.identity, wanted, tolerance)
        found.tidy()
        return found

    # The manifest -----------------------------------------------------------------------------------------------------

    def manifest(self) -> Manifest | None:
        """As it is now; None before the first pass has come to its end. Errors: DamagedFile."""
        file = self.path / MANIFEST
        if not file.exists():
            return None
        found, seal = unsealed(file, remedy="Keep the rows again, in another folder.")
        if found.pop("identity", None) != self.digest:
            raise DamagedFile(f"{file} belongs to another store than {self.path / IDENTITY}.")
        entries = tuple(Entry(**entry) for entry in found["entries"])
        return Manifest(entries, found["generation"], found["series"], found["ever"], str(seal["digest"]))

    def complete(self) -> Manifest:
        """The manifest. Errors: NotSaved before the first pass has come to its end."""
        found = self.manifest()
        if found is None:
            tiles = len(list(self.path.glob(f"tiles-0/*{SUFFIX}")))
            raise NotSaved(f"{self.path} is not complete: it has {tiles} tiles. Make the same call again to go on.")
        return found

    def _write(self, manifest: Manifest) -> None:
        content = sealed({**manifest.as_json(), "identity": self.digest})
        write_whole(self.path / MANIFEST, json.dumps(content, indent=1).encode())

    @contextmanager
    def _alone(self) -> Iterator[Callable[[], None]]:
        """One process at a time changes the manifest; what is yielded is a sign of life from a long change."""
        with locked(self.path / CLAIMS / LOCK) as held:
            if held:
                yield lambda: None
                return
            # Without locks: two processes that find the claim of a dead one may both take it.
            claims = self.claims()
            while not claims.claim("manifest"):
                time.sleep(POLL)
            try:
                yield lambda: claims.touch("manifest")
            finally:
                claims.release("manifest")

    def claims(self) -> Claims:
        return Claims(self.path / CLAIMS)

    def publish(self, series: int, tiles: Sequence[Mapping[str, Any]], anew: bool = False) -> Manifest:
        """The tiles of a pass that came to its end become part of the store; of several workers the first does it.

        A pass over rows that are there already renews the checksums of files that it computed again. anew: its rows are
        those of the store, in files of their own; they take the others' place.
        Errors: InvalidInput where the store has other rows, or another pass over other rows was quicker.
        """
        mine = [tile for tile in tiles if tile["rows"]]
        with self._alone():
            now = self.manifest()
            if now is None or (anew and now.generation == 0):
                self._write(_with(Manifest(), mine))
            elif now.series == series:
                self._write(replace(_with(now, mine), generation=now.generation + 1))
            else:
                self._renew(now, mine)
            self.tidy()
        return self.complete()

    def _renew(self, now: Manifest, tiles: Sequence[Mapping[str, Any]]) -> None:
        """Errors: InvalidInput."""
        checksums = {tile["file"]: tile["checksum"] for tile in tiles}
        if now.generation == 0:
            self.check_files(now, list(checksums))
        if not checksums.keys() <= {entry.file for entry in now.entries}:
            raise InvalidInput(f"{self.path} was changed by another process meanwhile. Make the same call again.")
        entries = tuple(replace(entry, checksum=checksums.get(entry.file, entry.checksum)) for entry in now.entries)
        if entries != now.entries:
            self._write(replace(now, entries=entries))

    def check_files(self, now: Manifest, files: Sequence[str]) -> None:
        """Errors: InvalidInput unless these are the store's: a file's name has a digest of the rows in it."""
        if list(files) != [entry.file for entry in now.entries]:
            raise InvalidInput(
                f"{self.path} holds {now.rows} {self.kind}, and these are others, or in another order. It stays as it "
                "is: choose another folder, or remove this one; new rows are added to kept gradients by append."
            )

    def damaged(self) -> list[Entry]:
        """Entries whose file is damaged or missing; files that this process has read before are not read again."""
        found = []
        for entry in self.complete().entries:
            try:
                self.segment(entry)
            except DamagedFile:
                found.append(entry)
        return found

    # Rows -------------------------------------------------------------------------------------------------------------

    def segment(self, entry: Entry, check: bool | None = None) -> Segment:
        """Errors: DamagedFile, naming the file."""
        remedy = REMEDY if entry.is_first else LATER
        found = Segment.open(self.path / entry.file, check, remedy)
        if found.checksum != entry.checksum:
            raise DamagedFile(f"{self.path / entry.file} is not the file that was written here. {remedy}")
        return found

    def names(self, entry: Entry, segment: Segment) -> np.ndarray:
        """What the rows of a segment are called, deleted ones too: ids, or positions. [rows]"""
        if segment.ids is not None:
            return segment.ids
        if segment.has("positions"):
            return segment.raw("positions")
        return np.arange(entry.start, entry.start + entry.rows)

    def delete(self, names: Sequence[Any]) -> int:
        """Mark rows; how many. Their bytes stay until `compact`. Errors: InvalidInput naming one that is not there."""
        wanted = np.unique(np.asarray(names))
        with self._alone():
            now = self.complete()
            entries, found = [], []
            for entry in now.entries:
                mine = self.names(entry, self.segment(entry))
                # Text against numbers: nothing is equal, and NumPy would warn.
                same = (mine.dtype.kind in "iu") == (wanted.dtype.kind in "iu")
                hit = np.flatnonzero(np.isin(mine, wanted)) if same else np.empty(0, dtype=np.int64)
                hit = np.setdiff1d(hit, np.asarray(entry.gone, dtype=np.int64))
                found.append(mine[hit])
                gone = sorted({*entry.gone, *hit.tolist()})
                entries.append(replace(entry, gone=gone))
            there = np.concatenate(found) if found else wanted[:0]
            missing = [name for name in wanted.tolist() if name not in set(there.tolist())]
            if missing:
                raise InvalidInput(f"{self.path} has no rows {missing[:5]} to delete ({len(missing)} are not there).")
            self._write(replace(now, entries=tuple(entries), generation=now.generation + 1))
        return len(there)

    def compact(self) -> int:
        """Write segments with deleted rows again without them, and remove the old ones; how many rows went.

        A process that is killed leaves the store as it was, or as it becomes: the manifest is replaced at once, and
        files that are no part of it are removed by the next call.
        """
        with self._alone() as alive:
            now = self.complete()
            entries = []
            for entry in now.entries:
                alive()
                entries.extend([entry] if not entry.gone else self._without_gone(entry, now.generation + 1))
            if any(entry.gone for entry in now.entries):
                self._write(replace(now, entries=tuple(entries), generation=now.generation + 1))
            self.tidy()
        return sum(len(entry.gone) for entry in now.entries)

    def _without_gone(self, entry: Entry, generation: int) -> list[Entry]:
        """The entry that takes its place, if rows are left."""
        segment = self.segment(entry)
        if not entry.visible:
            return []
        whole = Path(entry.file)
        file = f"{whole.parent.as_posix()}/{whole.name.partition('.')[0]}.{generation}{SUFFIX}"
        # Positions by which rows were called stay theirs.
        named = segment.ids is not None
        added = {} if named or segment.has("positions") else {"positions": self.names(entry, segment)}
        checksum = segment.without(entry.gone, self.path / file, f"{self.digest}/{file}", added)
        return [Entry(file, entry.visible, entry.start, checksum)]

    def check(self, drop: bool = False) -> list[Path]:
        """Read everything; the files that are damaged. drop: rows of these are no part of the store any more."""
        with self._alone() as alive:
            now, damaged = self.complete(), []
            for entry in now.entries:
                alive()
                try:
                    self.segment(entry, check=True)
                except DamagedFile:
                    damaged.append(entry)
            if drop and damaged:
                rest = tuple(entry for entry in now.entries if entry not in damaged)
                self._write(replace(now, entries=rest, generation=now.generation + 1))
                self.tidy()
        return [self.path / entry.file for entry in damaged]

    def tidy(self) -> None:
        """Remove what killed processes left, and files of passes that are done which are no part of the store."""
        remove_dead(self.path)
        now = self.manifest()
        named = set() if now is None else {entry.file for entry in now.entries}
        for folder in self.path.glob("tiles-*"):
            remove_dead(folder)
            number = folder.name.partition("-")[2]
            # A pass that is not done has no manifest yet that could name its tiles.
            if now is None or not number.isdecimal() or int(number) >= now.series:
                continue
            for file in folder.glob(f"*{SUFFIX}"):
                if f"{folder.name}/{file.name}" not in named and not is_draft(file.name):
                    file.unlink(missing_ok=True)
            sync_folder(folder)

    def tiles(self, series: int, dtype: Stored, bound: str) -> TileFiles:
        """Where the tiles of a pass go. bound: what besides the rows decides what is in them."""
        return TileFiles(self, series, dtype, bound)


class TileFiles:
    """The tiles of one pass, for workers that share them: what `PartStore` is for sums, with a segment for each."""

    def __init__(self, folder: SegmentFolder, series: int, dtype: Stored, bound: str):
        self.folder, self.series, self.dtype, self.bound = folder, series, dtype, bound
        self.path = folder.path
        self.claims = Claims(folder.path / CLAIMS / f"tiles-{series}")

    def has(self, name: str) -> bool:
        """Whether there is a tile of that name, of whatever rows."""
        return any(self.path.glob(f"{self._stem(name)}-*{SUFFIX}"))

    def read(self, name: str, rows: str) -> dict[str, Any] | None:
        """The tile of this name over rows with this digest: its file, rows and checksum; None if it is not whole."""
        try:
            found = Segment.open(self.path / self.file(name, rows))
        except DamagedFile:
            return None
        if not found.is_of(self._place(name, rows)):
            return None
        return {"file": self.file(name, rows), "rows": found.rows, "checksum": found.checksum}

    def write(self, name: str, rows: str, values: Mapping[str, Any]) -> None:
        """Errors: NotWritten."""
        # Another worker may have been at the same tile: the first one's stays, as the manifest may name it already.
        if self.read(name, rows) is not None:
            return
        about = json.loads(str(values[ABOUT]))
        numbers = {n.removeprefix(NUMBERS): v for n, v in values.items() if n.startswith(NUMBERS)}
        arrays = {n: v for n, v in values.items() if n != ABOUT and not n.startswith(NUMBERS)}
        file = self.path / self.file(name, rows)
        with explained_errors(file):
            file.parent.mkdir(exist_ok=True)
        place = self._place(name, rows)
        write_segment(file, place, about, arrays, numbers, self.dtype, about.get("groups"))

    def end_pass(self, label: str, tiles: int) -> None:
        """The manifest says which tiles there are."""

    def file(self, name: str, rows: str) -> str:
        """Of the tile of this name over rows with this digest, beside the manifest."""
        # With a digest of what is in it: two calls with other rows, at the same time, write other files.
        return f"{self._stem(name)}-{self._place(name, rows)[:8]}{SUFFIX}"

    def _stem(self, name: str) -> str:
        return f"tiles-{self.series}/{int(name.rpartition('/')[2]):06d}"

    def _place(self, name: str, rows: str) -> str:
        return digest(self.folder.digest.encode(), self.bound.encode(), name.encode(), rows.encode())


# Identity -------------------------------------------------------------------------------------------------------------


def refuse_others(
    path: object, found: Mapping[str, Any], wanted: Mapping[str, Any], tolerance: float, what: str = "another call"
) -> None:
    """Errors: InvalidInput, naming the fields of `wanted` that differ, and what they were and are.

    tolerance: of numbers with a fraction, relative to the larger; a fit again, in other batches, differs in the last
    digits.
    """
    wanted = json.loads(json.dumps(wanted))  # tuples would not equal the lists that were read
    different = [name for name in wanted if not same(found.get(name), wanted[name], tolerance, by_largest=True)]
    if different:
        changes = (f"{name} was {short(found.get(name))}, now {short(wanted[name])}" for name in different)
        raise InvalidInput(f"{path} is of {what}: {'; '.join(changes)}. Choose another folder, or keep them again.")
