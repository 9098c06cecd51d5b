"""What a job was: settings, versions, commands and times, in job.json beside its results.

job.json    this record, sealed
fit/        sums over tiles of train rows
fitted/     the fit, saved
scores/     the tiles of a run; of another damping than the setup's, scores-DAMPING/
calibration.json                          the damping that retrained models chose
calibrating/, evaluating/, leaving-out/   banks of these models
"""

from __future__ import annotations

import json
import re
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
CALIBRATION = "calibration.json"
BANKS = CALIBRATING, EVALUATING, LEAVING_OUT = "calibrating", "evaluating", "leaving-out"
REMEDY = "Remove it: the next command writes it again."
CALIBRATE_AGAIN = "Remove it, and calibrate again."
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


def scores_at(damping: object) -> str:
    """The folder of the scores at a damping; None for the setup's own."""
    return SCORES if damping is None else f"{SCORES}-{re.sub('[^A-Za-z0-9.]+', '-', str(damping))}"


def _is_ours(name: str) -> bool:
    return name in (RECORD, FIT, FITTED, CALIBRATION, *BANKS) or name.startswith(SCORES) or is_draft(name)


def write_record(folder: Path, record: Record) -> None:
    """Errors: InvalidInput for a folder of other things; NotWritten."""
    found = [each.name for each in folder.iterdir()] if folder.is_dir() else []
    if found and not any(_is_ours(name) for name in found):
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
