"""Who is at which piece of work, of several workers that see one folder.

    NAME.claim    who is at it: host, process

A claim saves double work, no more: pieces are the same whoever computes them. So a claim that is lost does no harm, and
one whose owner is dead, or gives no sign of life, is taken over.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from headwater.store.draft import HOST, TOKEN, explained_errors, is_alive, remove_dead, write_new, write_whole

PATIENCE = 300.0
"""Seconds without a sign of life after which a claim is taken over whose owner is not known to be dead."""


class Claims:
    """Of pieces of work in a folder, by name; a name may have folders in it."""

    def __init__(self, path: Path):
        self.path = path
        self._tidied: set[Path] = set()
        self._touched = 0.0
        self._seen: dict[str, tuple[float, float]] = {}
        """Of others' claims: when the file was touched last, and when that was seen first by this process's clock."""

    def claim(self, name: str) -> bool:
        """Whether this process is to do the piece. Errors: NotWritten."""
        file = self._file(name)
        with explained_errors(file):
            file.parent.mkdir(parents=True, exist_ok=True)
        if file.parent not in self._tidied:
            remove_dead(file.parent)
            self._tidied.add(file.parent)
        mine = json.dumps({"host": HOST, "process": os.getpid(), "token": TOKEN}).encode()
        if write_new(file, mine):
            return True
        if not self.is_free(name):
            return False
        write_whole(file, mine)
        return True

    def is_free(self, name: str) -> bool:
        """Whether nobody is at the piece, or who was is dead, or gave no sign of life for long."""
        file = self._file(name)
        try:
            held, touched = json.loads(file.read_bytes()), file.stat().st_mtime
            if held["host"] == HOST and not is_alive(int(held["process"]), str(held["token"])):
                return True
        except (OSError, ValueError, KeyError, TypeError):
            return True
        # Here too: what has a dead owner's number may be another process, and a live one may hang.
        now = time.monotonic()
        if self._seen.get(name, (None,))[0] != touched:  # by one clock: those of two machines may differ
            self._seen[name] = (touched, now)
        return now - self._seen[name][1] > PATIENCE

    def touch(self, name: str) -> None:
        """A sign of life from who is at the piece."""
        if time.monotonic() - self._touched > PATIENCE / 10:
            self._touched = time.monotonic()
            with suppress(OSError):
                os.utime(self._file(name))

    def release(self, name: str) -> None:
        """This process is no longer at the piece."""
        file = self._file(name)
        with suppress(OSError, ValueError):
            if json.loads(file.read_bytes()).get("token") == TOKEN:
                file.unlink()

    def remove_free(self, names: Iterable[str]) -> None:
        """What the dead left beside these pieces, which are there: claims that nobody ended, and drafts."""
        for folder in {self._file(name).parent for name in names}:
            remove_dead(folder)
            for file in folder.glob("*.claim"):
                if self.is_free(file.relative_to(self.path).as_posix().removesuffix(".claim")):
                    with suppress(OSError):
                        file.unlink()

    def _file(self, name: str) -> Path:
        return self.path / f"{name}.claim"
