"""Sums over tiles of rows in a folder, so that a pass that was stopped goes on, and several workers share one.

    identity.json          what is fitted
    0-0-Factors/3.npz      the sums over the fourth tile of rows, of the first pass
    0-0-Factors/3.claim    who is at it: host, process, time

A part is written whole or not at all, and sealed with the identity, its name and the keys of its rows: what is damaged,
or of other rows, is computed again. Claims save double work, no more: parts are the same whoever computes them.
"""

from __future__ import annotations

import io
import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from headwater.errors import DamagedFile, InvalidInput
from headwater.store.draft import HOST, TOKEN, explained_errors, is_alive, remove_dead, write_new, write_whole
from headwater.store.seal import digest, open_bytes, seal_bytes, sealed, unsealed

Values = Mapping[str, Any]
"""Arrays of the host, and numbers."""
NUMBERS = "__numbers__"
PATIENCE = 60.0
"""Seconds after which a claim from another machine is taken over, at least."""


class PartStore:
    """Parts of one fit. Errors: InvalidInput for a folder that holds another one; DamagedFile; NotWritten."""

    def __init__(self, path: str | os.PathLike[str], identity: Mapping[str, Any]):
        self.path = Path(path)
        identity = json.loads(json.dumps(identity))
        with explained_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        file = self.path / "identity.json"
        write_new(file, json.dumps(sealed(identity), indent=1).encode())
        found, seal = unsealed(file, remedy="Choose another folder, or remove this one.")
        different = sorted(name for name in {**found, **identity} if found.get(name) != identity.get(name))
        if different:
            raise InvalidInput(
                f"{self.path} holds the parts of another fit: {', '.join(different)} differ. Choose another folder, or "
                "remove this one."
            )
        self._bound = str(seal["digest"])
        self._longest = 0.0

    def read(self, name: str, rows: str) -> dict[str, Any] | None:
        """The part of this name over the rows with this digest; None if there is none that is whole."""
        try:
            content = open_bytes(self._file(name), self._place(name, rows), "")
        except DamagedFile:
            return None
        with np.load(io.BytesIO(content), allow_pickle=False) as found:
            arrays = {each: found[each] for each in found.files}
        numbers = json.loads(str(arrays.pop(NUMBERS)))
        return {**arrays, **numbers}

    def write(self, name: str, rows: str, values: Values) -> None:
        """Errors: NotWritten."""
        numbers = {each: value for each, value in values.items() if isinstance(value, (int, float))}
        arrays = {each: value for each, value in values.items() if each not in numbers}
        packed = io.BytesIO()
        np.savez(packed, allow_pickle=False, **{NUMBERS: np.array(json.dumps(numbers))}, **arrays)
        write_whole(self._file(name), seal_bytes(packed.getvalue(), self._place(name, rows)))

    def release(self, name: str) -> None:
        """This process is no longer at the part."""
        with suppress(OSError):
            self._claim(name).unlink()

    def has(self, name: str) -> bool:
        return self._file(name).is_file()

    def is_free(self, name: str) -> bool:
        """Whether nobody is at the part, or who was is dead, or far too slow."""
        return not self._is_held(self._claim(name))

    def claim(self, name: str) -> bool:
        """Whether this process is to compute the part."""
        file = self._claim(name)
        with explained_errors(file):
            file.parent.mkdir(exist_ok=True)
        remove_dead(file.parent)
        mine = json.dumps({"host": HOST, "process": os.getpid(), "token": TOKEN, "time": time.time()}).encode()
        if write_new(file, mine):
            return True
        if self._is_held(file):
            return False
        write_whole(file, mine)
        return True

    def took(self, seconds: float) -> None:
        """How long a part took here: others are given ten times as long."""
        self._longest = max(self._longest, seconds)

    def _is_held(self, file: Path) -> bool:
        try:
            held = json.loads(file.read_bytes())
            if held["host"] == HOST and not is_alive(int(held["process"]), str(held["token"])):
                return False
            return abs(time.time() - float(held["time"])) < max(PATIENCE, 10 * self._longest)
        except FileNotFoundError:  # it has been written, or given up
            return False
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def _file(self, name: str) -> Path:
        return self.path / f"{name}.npz"

    def _claim(self, name: str) -> Path:
        return self.path / f"{name}.claim"

    def _place(self, name: str, rows: str) -> str:
        return digest(self._bound.encode(), name.encode(), rows.encode())
