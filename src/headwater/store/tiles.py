"""A run at rest: tiles of scores in a folder, each complete or not there, so that a run that was stopped can go on.

Layout of the folder: `identity.json` (what was asked), `tiles.zarr` (one array for each tile, [block, query, train]),
and `ledger.jsonl`, one line for each tile that is complete. A tile is written first and entered after, so a run that is
killed, or runs out of disk, loses at most the tile that it was writing. `sums.npz` holds what was added up over tiles
beside their scores, and which tiles these were; it is written whole, when a run ends or is stopped.
"""

from __future__ import annotations

import json
import os
import zipfile
import zlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from headwater.errors import InvalidInput


class TileStore:
    """Tiles of one run. Opening a folder that holds another run is refused.

    identity: what makes two runs the same, JSON values only. Errors: InvalidInput naming what differs.
    """

    def __init__(self, path: str | os.PathLike[str], identity: Mapping[str, Any]):
        self.path = Path(path)
        self._check_identity(json.loads(json.dumps(identity)))
        self._ledger = {(line["start"], line["stop"]): line for line in self._read_ledger()}

    def _check_identity(self, identity: dict[str, Any]) -> None:
        file = self.path / "identity.json"
        if not file.exists():
            if self.path.exists() and any(self.path.iterdir()):
                raise InvalidInput(f"{self.path} is not empty and holds no run of headwater; choose another folder.")
            self.path.mkdir(parents=True, exist_ok=True)
            _write_whole(file, json.dumps(identity, indent=1))
            return
        try:
            found = json.loads(file.read_text())
        except ValueError as error:
            raise InvalidInput(f"{file} cannot be read ({error}); choose another folder.") from error
        different = [key for key in {**found, **identity} if found.get(key) != identity.get(key)]
        if different:
            changes = (f"{key} was {_short(found.get(key))}, now {_short(identity.get(key))}" for key in different)
            raise InvalidInput(
                f"{self.path} holds another run: {'; '.join(changes)}. Choose another folder, or remove this one."
            )

    def _read_ledger(self) -> list[dict[str, Any]]:
        file, lines = self.path / "ledger.jsonl", []
        for line in file.read_text().splitlines() if file.exists() else []:
            try:
                found = json.loads(line)
            except json.JSONDecodeError:  # the line that a killed run was writing
                continue
            if isinstance(found, dict) and {"start", "stop", "rows", "tile"} <= found.keys():
                lines.append(found)
        return lines

    def read(self, start: int, keys: np.ndarray) -> np.ndarray | None:
        """The tile of the train rows from `start` on, with these keys: [block, query, train]; None if it is not there.

        Errors: InvalidInput if the tile was computed from other rows.
        """
        line = self._ledger.get((start, start + len(keys)))
        if line is None:
            return None
        if line["rows"] != _checksum(keys):
            raise InvalidInput(
                f"The train loader gives other rows at {start} to {start + len(keys)} than in the run stored in "
                f"{self.path}. To go on with a run, its loader must not shuffle."
            )
        group, name = self._group(), f"{start}-{start + len(keys)}"
        tile = np.asarray(group[name][:]) if name in group else None
        return None if tile is None or _checksum(tile) != line["tile"] else tile  # lost, by a power cut for example

    def check(self, stored: np.ndarray, fresh: np.ndarray) -> None:
        """Stored scores beside the same ones computed again. Errors: InvalidInput if they differ beyond rounding."""
        gap, largest = float(np.abs(stored - fresh).max()), float(np.abs(fresh).max())
        if gap > 1e-3 * largest:
            raise InvalidInput(
                f"The run stored in {self.path} has other scores than this call (they differ by {gap:g}, of "
                f"{largest:g}): it was fitted on other rows, or with another loss. Choose another folder, or "
                "remove this one."
            )

    def write(self, start: int, keys: np.ndarray, tile: np.ndarray) -> None:
        """Keep a tile [block, query, train]; it counts once this returns."""
        stop = start + len(keys)
        self._group().create_array(f"{start}-{stop}", data=np.ascontiguousarray(tile), overwrite=True)
        line = {"start": start, "stop": stop, "rows": _checksum(keys), "tile": _checksum(tile)}
        with open(self.path / "ledger.jsonl", "a+b") as ledger:
            torn = ledger.seek(0, os.SEEK_END) > 0 and not _ends_line(ledger)
            ledger.write((b"\n" if torn else b"") + json.dumps(line).encode() + b"\n")
            ledger.flush()
            os.fsync(ledger.fileno())
        self._ledger[start, stop] = line

    def write_sums(self, tiles: Collection[tuple[int, int]], sums: Mapping[str, np.ndarray]) -> None:
        """Keep arrays that were added up over these tiles, each (start, stop), in place of those kept before."""
        draft = self.path / "sums.draft"
        with open(draft, "wb") as file:
            covered = np.array(sorted(tiles), dtype=np.int64).reshape((-1, 2))
            np.savez(file, allow_pickle=False, __tiles__=covered, **sums)
        os.replace(draft, self.path / "sums.npz")

    def read_sums(self) -> tuple[set[tuple[int, int]], dict[str, np.ndarray]] | None:
        """What `write_sums` kept: the tiles, and the arrays; None if there is nothing, or it cannot be read."""
        try:
            with open(self.path / "sums.npz", "rb") as file, np.load(file, allow_pickle=False) as found:
                arrays = {name: found[name] for name in found.files}
        except (OSError, ValueError, EOFError, zipfile.BadZipFile):
            return None
        if "__tiles__" not in arrays:
            return None
        covered = arrays.pop("__tiles__")
        return {(int(start), int(stop)) for start, stop in covered}, arrays

    def _group(self) -> Any:
        import zarr

        return zarr.open_group(self.path / "tiles.zarr", mode="a")


def _ends_line(file: Any) -> bool:
    file.seek(-1, os.SEEK_END)
    return bool(file.read(1) == b"\n")


def _write_whole(file: Path, text: str) -> None:
    """The whole text, or nothing."""
    draft = file.with_suffix(".draft")
    draft.write_text(text)
    os.replace(draft, file)


def _checksum(values: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(values).tobytes())


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
