"""The folder of a run of scores, looked at without the run: how far it is, and which files are damaged or lost."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

from headwater.errors import DamagedFile
from headwater.store.draft import is_draft
from headwater.store.seal import digest, open_bytes, unsealed
from headwater.store.tiles import AGAIN, FINISHED, TileFolder, chunk_file, read_chunk

PROBE_LOST = "Without it no tile is trusted: remove the folder, and make the run anew."


class RunSeen(TileFolder):
    """Errors: as `TileFolder`."""

    @property
    def places(self) -> list[tuple[int, int]]:
        """(number among the train rows, number among the queries) of the tiles that were entered."""
        self.line(0, 0)  # reads what is new
        return sorted(self._lines)

    @property
    def rows_there(self) -> int:
        """Train rows of which there is some tile."""
        stops: dict[int, int] = {}
        for number, queries in self.places:
            line = self.line(number, queries)
            if line is not None:
                stops[number] = line["stop"] - line["start"]
        return sum(stops.values())

    @property
    def wanted(self) -> int | None:
        """Tiles of the whole run; None for one that is not finished."""
        rows = self._finished_rows
        return None if rows is None else math.prod(self._counts(rows))

    @property
    def unfinished(self) -> list[str]:
        """That the run is not, in a sentence."""
        if self._finished_rows is not None:
            return []
        return [f"{self.path}: not finished ({self.complete()} tiles are there). Make the call that began it again."]

    def damage(self, check: bool) -> Iterator[str]:
        """Each file that is lost, in a sentence; check: each that is damaged, too."""
        probe = self.path / "probe.npz"
        if self.ledger.files and not probe.exists():
            yield f"{probe} is missing. {PROBE_LOST}"
        yield from self._tiles_damage(check)
        yield from self._ledger_damage()
        if (self.path / FINISHED).exists():
            yield from self._end_damage()
        if check:
            for name, place in self._sealed_places():
                yield from said_of(lambda name=name, place=place: open_bytes(self.path / name, place, AGAIN))  # type: ignore[misc]

    def _tiles_damage(self, check: bool) -> Iterator[str]:
        rows = self._finished_rows
        counts = (0, 0) if rows is None else self._counts(rows)
        every = {(number, queries) for number in range(counts[0]) for queries in range(counts[1])}
        for number, queries in sorted(every | set(self.places)):
            line, file = self.line(number, queries), self._chunk_of(number, queries)
            if not file.exists():
                yield f"{file} is missing. {AGAIN}"
            elif line is None:
                yield f"{file} is damaged, or the line of a ledger that is about it is lost. {AGAIN}"
            elif check:
                yield from said_of(lambda file=file, line=line: read_chunk(file, line))  # type: ignore[misc]
        for number in sorted({number for number, _ in every | set(self.places)}):
            if not self._rows(number).exists():
                yield f"{self._rows(number)} is missing. {AGAIN}"

    def _ledger_damage(self) -> Iterator[str]:
        for file in self.ledger.damaged():
            yield f"{file} is damaged: it has a line that is not what was written. {AGAIN}"
        known = {self._chunk_of(*place) for place in self.places}
        written = (file for file in (self.path / "tiles.zarr/scores/c").rglob("*") if file.is_file())
        if self._finished_rows is None:
            unknown = [file for file in written if file not in known and not is_draft(file.name)]
            # One or two are the tiles that killed workers had just written.
            yield from (f"No ledger has a whole line for {file}. {AGAIN}" for file in unknown)

    def _end_damage(self) -> Iterator[str]:
        """Of the files that say what the chunks are."""
        try:
            _, seal = unsealed(self.path / FINISHED, remedy=AGAIN)
        except DamagedFile as error:
            yield str(error)
            return
        for name, expected in seal["files"].items():
            file = self.path / name
            if not file.is_file():
                yield f"{file} is missing. {AGAIN}"
            elif digest(file.read_bytes()) != expected:
                yield f"{file} is damaged: it is not what was written. {AGAIN}"

    def _sealed_places(self) -> Iterator[tuple[str, str]]:
        belongs = self._belonging
        places = {"probe.npz": f"{self.run}/probe", "deleted.npz": f"{belongs}/deleted"}
        yield from ((name, place) for name, place in places.items() if (self.path / name).exists())
        yield from ((file.name, f"{belongs}/sums") for file in sorted(self.path.glob("sums-*.npz")))
        for file in sorted((self.path / "rows").glob("*.npz")):
            if not is_draft(file.name):
                yield f"rows/{file.name}", f"{belongs}/rows {file.stem}"

    @property
    def _finished_rows(self) -> int | None:
        try:
            return int(unsealed(self.path / FINISHED)[0]["train_rows"])
        except DamagedFile:
            return None

    def _counts(self, rows: int) -> tuple[int, int]:
        return -(-rows // self.sizes.rows), -(-len(self.identity["query_ids"]) // self.sizes.queries)

    def _chunk_of(self, number: int, queries: int) -> Path:
        """Where the tile is, or was."""
        self.line(number, queries)  # reads what is new
        axes = next((len(each[0]["shape"]) for each in self._lines.values()), 3)
        return chunk_file(self.path, number, queries, axes)


def said_of(check: Callable[[], object]) -> Iterator[str]:
    """What is said of damage, if there is any."""
    try:
        check()
    except DamagedFile as error:
        yield str(error)
