"""What a job was: settings, versions, commands and times, in job.json beside its results.

job.json    this record, sealed
fit/        sums over tiles of train rows
scores/     the tiles of a run
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from headwater.errors import InvalidInput
from headwater.store.draft import explained_errors, is_draft, write_whole
from headwater.store.seal import sealed, unsealed

RECORD, FIT, FITTED, SCORES = "job.json", "fit", "fitted", "scores"
REMEDY = "Remove it: the next command writes it again."
PACKAGES = {
    "jax": "jax",
    "numpy": "numpy",
    "safetensors": "safetensors",
    "sklearn": "scikit-learn",
    "torch": "torch",
    "transformers": "transformers",
    "zarr": "zarr",
}
"""Whose versions may matter: by the module, what is installed."""


@dataclass(frozen=True)
class Record:
    """Whole or not there, whenever a command is stopped."""

    job: str
    """The file or function that the job is."""
    settings: Mapping[str, Any]
    """All of them, defaults too."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Of Python, headwater and what was imported."""
    verbs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """By verb its last call: command, worker, started, finished (None until it has), and what it found."""

    def with_call(self, verb: str, **facts: object) -> Record:
        """This call in place of the verb's last one; what only that one knew stays."""
        call = {**self.verbs.get(verb, {}), **facts}
        return Record(self.job, self.settings, versions(), {**self.verbs, verb: call})


def now() -> str:
    """To the second, in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    """Of what this process has imported."""
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for module, package in {"headwater": "headwater", **PACKAGES}.items():
        if module in sys.modules:
            try:
                found[module] = version(package)
            except PackageNotFoundError:  # a module from a folder, not installed
                continue
    return found


def read_record(folder: Path) -> Record | None:
    """None if there is none. Errors: DamagedFile."""
    if not (folder / RECORD).exists():
        return None
    values, _ = unsealed(folder / RECORD, remedy=REMEDY)
    return Record(values["job"], values["settings"], values["versions"], values["verbs"])


def write_record(folder: Path, record: Record) -> None:
    """Errors: InvalidInput for a folder of other things; NotWritten."""
    ours = {RECORD, FIT, FITTED, SCORES}
    found = [each.name for each in folder.iterdir()] if folder.is_dir() else []
    if found and not any(name in ours or is_draft(name) for name in found):
        raise InvalidInput(f"{folder} is not empty and holds no results of a job. Choose another folder.")
    with explained_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    values = {
        "kind": "results of a job",
        "job": record.job,
        "settings": record.settings,
        "versions": record.versions,
        "verbs": record.verbs,
    }
    write_whole(folder / RECORD, (json.dumps(sealed(values), indent=1) + "\n").encode())
