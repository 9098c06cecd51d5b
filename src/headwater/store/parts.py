"""Sums over tiles of rows in a folder, so that a pass that was stopped goes on, and several workers share one.

    identity.json                what is fitted
    0-5d8e...-Factors/3.npz      the sums over the fourth tile of rows, of the first pass
    0-5d8e...-Factors/3.claim    who is at it: host, process

A part is written whole or not at all, and sealed with the identity, its name and the keys of its rows: what is damaged,
or of other rows, is computed again. Claims save double work, no more: parts are the same whoever computes them.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from headwater.errors import DamagedFile
from headwater.store.claims import Claims
from headwater.store.draft import explained_errors, is_draft, write_whole
from headwater.store.identity import claim_folder
from headwater.store.seal import digest, open_arrays, open_bytes, seal_arrays, sealed, unsealed

Values = Mapping[str, Any]
"""Arrays of the host, and numbers."""
NUMBERS, ROWS = "__numbers__", "__rows__"
PASS = "pass.json"
AGAIN = "Call again: what is damaged is computed again."
KIND = "fit"


class PartStore:
    """Parts of one fit. Errors: InvalidInput for a folder that holds another one; DamagedFile; NotWritten."""

    def __init__(self, path: str | os.PathLike[str], identity: Mapping[str, Any]):
        self.path = Path(path)
        self._bound = claim_folder(self.path, KIND, identity)
        self.claims = Claims(self.path)

    def read(self, name: str, rows: str) -> dict[str, Any] | None:
        """The part of this name over the rows with this digest; None if there is none that is whole."""
        try:
            arrays = open_arrays(self._file(name), self._place(name, rows), "")
        except DamagedFile:
            return None
        arrays.pop(ROWS, None)
        numbers = json.loads(str(arrays.pop(NUMBERS)))
        return {**arrays, **numbers}

    def write(self, name: str, rows: str, values: Values) -> None:
        """Errors: NotWritten."""
        numbers = {each: value for each, value in values.items() if isinstance(value, (int, float))}
        arrays = {each: value for each, value in values.items() if each not in numbers}
        file = self._file(name)
        with explained_errors(file):
            file.parent.mkdir(exist_ok=True)
        # The rows' digest is in the seal; for who checks the seal without the rows, it is in the file as well.
        packed = {NUMBERS: np.array(json.dumps(numbers)), ROWS: np.array(rows), **arrays}
        write_whole(file, seal_arrays(packed, self._place(name, rows)))

    def has(self, name: str) -> bool:
        """Whether there is a file of that name, whole or not."""
        return self._file(name).is_file()

    def end_pass(self, label: str, tiles: int) -> None:
        """All tiles of a pass are there: whoever looks at the folder knows how many there ought to be."""
        file, content = self.path / label / PASS, json.dumps(sealed({"tiles": tiles})).encode()
        if not file.exists() or file.read_bytes() != content:
            write_whole(file, content)

    def _file(self, name: str) -> Path:
        return _part_file(self.path, name)

    def _place(self, name: str, rows: str) -> str:
        return _place(self._bound, name, rows)


def _part_file(folder: Path, name: str) -> Path:
    return folder / f"{name}.npz"


def _place(bound: str, name: str, rows: str) -> str:
    return digest(bound.encode(), name.encode(), rows.encode())


# Looking at a folder --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PassSeen:
    """One pass over the rows, as its files tell of it."""

    label: str
    tiles: tuple[int, ...]
    """That are there."""
    of: int | None
    """How many there ought to be; None until the pass was complete for the first time."""

    @property
    def lost(self) -> list[int]:
        """Tiles that were there."""
        return sorted(set(range(self.of or 0)) - set(self.tiles))


def passes_in(folder: Path) -> list[PassSeen]:
    """Those of a fit, in their order; nothing is written. Errors: DamagedFile for a pass.json that is not whole."""
    found = []
    for each in sorted(folder.iterdir()):
        if each.is_dir() and not is_draft(each.name):
            tiles = sorted(int(file.stem) for file in each.glob("*.npz") if file.stem.isdecimal())
            of = unsealed(each / PASS, remedy=AGAIN)[0]["tiles"] if (each / PASS).exists() else None
            found.append(PassSeen(each.name, tuple(tiles), of))
    return found


def check_part(folder: Path, bound: str, name: str) -> None:
    """Without its rows at hand. bound: the digest of the folder's identity. Errors: DamagedFile."""
    file = _part_file(folder, name)
    try:
        with np.load(io.BytesIO(file.read_bytes()), allow_pickle=False) as opened:
            rows = str(opened[ROWS])
    except Exception as error:  # NumPy and zipfile raise many kinds for what is damaged
        raise DamagedFile(f"{file} cannot be read ({error}). {AGAIN}") from error
    open_bytes(file, _place(bound, name, rows), AGAIN)
