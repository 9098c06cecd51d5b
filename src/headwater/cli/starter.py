"""The job that `headwater init` writes: see the files in `starters`."""

from __future__ import annotations

import sys
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

from headwater.errors import AlreadySaved, InvalidSetting
from headwater.store.draft import write_new


def write_starter(file: Path) -> Path:
    """A job file, and beside it the Python file, which is returned.

    Errors: InvalidSetting for another kind of name; AlreadySaved if one of the two is there.
    """
    if file.suffix != ".toml":
        raise InvalidSetting(f"{file}: expected the name of a job file, for example job.toml.")
    python = file.with_suffix(".py")
    if not file.resolve().parent.is_dir():
        raise InvalidSetting(f"{file}: there is no folder {file.resolve().parent}.")
    if python.stem in {*sys.stdlib_module_names, "headwater", "numpy", "sklearn", "torch"}:
        raise InvalidSetting(f"{python.name} would hide the module {python.stem}. Choose another name.")
    for each in (file, python):
        if each.exists():
            raise AlreadySaved(f"{each} exists; remove it, or choose another name.")
    settings = {"toml": file.name, "python": python.name, "store": "results"}
    code = _text("torch.py" if find_spec("torch") else "sklearn.py")
    for each, text in ((python, code), (file, _text("job.toml").format(**settings))):
        if not write_new(each, text.encode()):
            raise AlreadySaved(f"{each} exists; remove it, or choose another name.")
    return python


def missing_extra() -> str:
    """What brings the packages that the starter needs; "" where they are there. The data are scikit-learn's."""
    return "" if find_spec("sklearn") else "sklearn"


def _text(name: str) -> str:
    """A file to begin with, as it lies in the package."""
    return (files("headwater.cli") / "starters" / f"{name}.txt").read_text(encoding="utf-8")
