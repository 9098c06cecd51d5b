"""Sums over tiles of rows in a folder, so that a pass that was stopped goes on, and several workers share one.

    identity.json                what is fitted
    0-5d8e...-Factors/3.npz      the sums over the fourth tile of rows, of the first pass
    0-5d8e...-Factors/3.claim    who is at it: host, process

A part is written whole or not at all, and sealed with the identity, its name and the keys of its rows: what is damaged,
or of other rows, is computed again. Claims save double work, no more: parts are the same whoever computes them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from headwater.errors import DamagedFile
from headwater.store.claims import Claims
from headwater.store.draft import explained_errors, write_whole
from headwater.store.identity import claim_folder
from headwater.store.seal import digest, open_arrays, seal_arrays

Values = Mapping[str, Any]
"""Arrays of the host, and numbers."""
NUMBERS = "__numbers__"
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
        numbers = json.loads(str(arrays.pop(NUMBERS)))
        return {**arrays, **numbers}

    def write(self, name: str, rows: str, values: Values) -> None:
        """Errors: NotWritten."""
        numbers = {each: value for each, value in values.items() if isinstance(value, (int, float))}
        arrays = {each: value for each, value in values.items() if each not in numbers}
        file = self._file(name)
        with explained_errors(file):
            file.parent.mkdir(exist_ok=True)
        packed = {NUMBERS: np.array(json.dumps(numbers)), **arrays}
        write_whole(file, seal_arrays(packed, self._place(name, rows)))

    def has(self, name: str) -> bool:
        """Whether there is a file of that name, whole or not."""
        return self._file(name).is_file()

    def _file(self, name: str) -> Path:
        return self.path / f"{name}.npz"

    def _place(self, name: str, rows: str) -> str:
        return digest(self._bound.encode(), name.encode(), rows.encode())
