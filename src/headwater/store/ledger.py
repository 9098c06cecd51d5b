"""What is complete, line by line: each writer has a file of its own, so that none can lose another's lines.

A line is added after what it speaks of is whole on the disk, and carries a digest of itself and of what the ledger
belongs to. One that is torn, damaged or another run's counts as not there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from headwater.store.draft import HOST, TOKEN, explained_errors, sync_folder
from headwater.store.seal import digest

Line = dict[str, Any]


class Ledger:
    """In a folder; belongs: what the lines are of."""

    def __init__(self, folder: Path, belongs: str):
        self.folder, self.belongs = folder, belongs
        # Of one writer, for its whole life: no two processes append to one file.
        self.own = folder / f"ledger-{HOST}-{os.getpid()}-{TOKEN}.jsonl"
        self._read: dict[Path, int] = {}

    @property
    def files(self) -> list[Path]:
        return sorted(self.folder.glob("ledger-*.jsonl"))

    def add(self, line: Mapping[str, Any]) -> None:
        """It counts once this returns, also after a power cut. Errors: NotWritten."""
        text = json.dumps({**line, "line": self._digest(line)}).encode()
        with explained_errors(self.own):
            new = not self.own.exists()
            with open(self.own, "ab", buffering=0) as file:
                size = file.seek(0, os.SEEK_END)
                # A process that had this name before may have left half a line: ours would be glued to it.
                content = (b"" if new or self._ends(self.own) else b"\n") + text + b"\n"
                try:
                    while content:
                        content = content[file.write(content) :]
                    os.fsync(file.fileno())
                except OSError:
                    file.truncate(size)  # no half of a line stays: on a full disk this needs no room
                    raise
            if new:
                sync_folder(self.folder)

    def news(self) -> Iterator[Line]:
        """The lines that were added since this was asked last, by anybody; all of them at first."""
        for file in self.files:
            with open(file, "rb") as opened:
                opened.seek(self._read.get(file, 0))
                content = opened.read()
            # Up to the last line that is whole: the rest may still be being written.
            whole = content.rfind(b"\n") + 1
            self._read[file] = self._read.get(file, 0) + whole
            for text in content[:whole].split(b"\n"):
                line = self._line(text)
                if line is not None:
                    yield line

    def damaged(self) -> list[Path]:
        """Files with a line that is not as it was written; a last one without an end is none."""
        return [f for f in self.files if any(t and self._line(t) is None for t in f.read_bytes().split(b"\n")[:-1])]

    def _line(self, text: bytes) -> Line | None:
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            return None
        whole = isinstance(line, dict) and line.pop("line", None) == self._digest(line)
        return line if whole else None

    def _digest(self, line: Mapping[str, object]) -> str:
        return digest(self.belongs.encode(), json.dumps(line, sort_keys=True).encode())

    @staticmethod
    def _ends(file: Path) -> bool:
        with open(file, "rb") as opened:
            size = opened.seek(0, os.SEEK_END)
            opened.seek(max(0, size - 1))
            return opened.read(1) in (b"", b"\n")
