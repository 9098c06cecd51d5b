"""A user's own file, or function, that says what to work on: an influence, its train rows and queries."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from headwater.attributor import Attributor
from headwater.errors import EXTRAS, HeadwaterError, InvalidInput, InvalidSetting

NAMES = ("influence", "train", "query", "rows", "queries", "predictions", "retrain")
"""What a setup gives, in this order; from the third on, it may be left out."""


@dataclass(frozen=True, eq=False)
class Setup:
    """What a setup file gives."""

    influence: Attributor
    """Fitted or not."""
    train: Iterable[object]
    """The loader of the rows that were, or will be, fitted."""
    query: Iterable[object] | None = None
    """The loader of the queries; None where there are none yet."""
    rows: Any = None
    """What train rows are, for tables and the report: a DataFrame, a data set, a function of an id (`Described`)."""
    queries: Any = None
    """Likewise the queries."""
    predictions: Any = None
    """What the model says of each query, in the loader's order."""
    retrain: Callable[[Any, int], Any] | None = None
    """(positions of the train rows that are kept, a seed) -> losses of the queries [q] of a model trained on these."""

    @property
    def query_loader(self) -> Iterable[object]:
        """Errors: InvalidSetting where there is none."""
        if self.query is None:
            raise InvalidSetting("The setup gives no queries: it should give influence, train and query.")
        return self.query

    @property
    def retraining(self) -> Callable[[Any, int], Any]:
        """Errors: InvalidSetting where there is none."""
        if self.retrain is None:
            raise InvalidSetting(
                "The setup gives no function retrain(rows, seed), which trains on these rows alone and returns the "
                'queries\' losses: without it nothing can be measured. setup() returns it in a dict, as "retrain".'
            )
        return self.retrain


def load_setup(target: str, folder: Path | None = None) -> Setup:
    """From "setup.py", "setup.py:function" or "module:function"; the function is `setup` by default.

    It returns influence, train and query, or a dict of these and what else NAMES has; a file without it defines them
    itself. All but the first two may be left out, or None. folder: what the target is relative to; None for the current
    one. Errors: InvalidSetting for what is not there; InvalidInput, with the place, for what the user's code raises.
    """
    place, name = split_target(target)
    with _importable(place, folder):
        module = _run(target, lambda: _load(place, folder))
        defined = {each: getattr(module, each, None) for each in (name or "setup", *NAMES)}
        function = defined[name or "setup"]
        if name and not callable(function):
            raise InvalidSetting(f"{place} has no function {name!r}.")
        given: Any = {each: defined[each] for each in NAMES if defined[each] is not None}
        return as_setup(_run(target, function) if callable(function) else given, target)


def as_setup(given: Any, target: str) -> Setup:
    """From what a setup function returned. Errors: InvalidSetting for what is missing, or something else."""
    values = _as_dict(given, target)
    missing = [each for each in NAMES[:2] if values.get(each) is None]
    if missing:
        raise InvalidSetting(
            f"{target} does not define {', '.join(missing)}. It should define influence, train and query, or a "
            "function setup() that returns them."
        )
    influence = values["influence"]
    if not isinstance(influence, Attributor):
        raise InvalidSetting(f"{target}: the influence is {type(influence).__name__}; expected an Attributor.")
    return Setup(**values)


def _as_dict(given: Any, target: str) -> dict[str, Any]:
    """What a setup function returned, by name. Errors: InvalidSetting."""
    if isinstance(given, (tuple, list)) and len(given) in (2, 3):
        return dict(zip(NAMES, given, strict=False))
    if isinstance(given, Mapping):
        unknown = [name for name in given if name not in NAMES]
        if unknown:
            raise InvalidSetting(f"{target} returned {unknown[0]!r}; expected some of {', '.join(NAMES)}.")
        return dict(given)
    raise InvalidSetting(
        f"{target}: expected {', '.join(NAMES[:3])}, or a dict of {', '.join(NAMES)}; got {type(given).__name__}."
    )


def split_target(target: str) -> tuple[str, str]:
    """The file or module, and the function; "" where none is named."""
    place, colon, name = target.rpartition(":")
    return (place, name) if colon and name.isidentifier() else (target, "")


@contextmanager
def _importable(place: str, folder: Path | None) -> Iterator[None]:
    """What lies beside the user's file can be imported, also from within its function."""
    beside = str((Path(folder or "") / place).resolve().parent) if place.endswith(".py") else str(folder or "")
    sys.path.insert(0, beside)
    try:
        yield
    finally:
        with suppress(ValueError):  # the user's code may have put it in order already
            sys.path.remove(beside)


def _load(place: str, folder: Path | None) -> ModuleType:
    if not place.endswith(".py"):
        if (Path(folder or "") / place).is_file():
            raise InvalidSetting(f"{place} is no setup: expected a job (.toml), FILE.py, or module:function.")
        importlib.invalidate_caches()  # the file may be younger than what was seen of its folder
        return importlib.import_module(place)
    path = (Path(folder or "") / place).resolve()
    if not path.is_file():
        raise InvalidSetting(f"There is no file {Path(folder or '') / place}.")
    loader = _AsItStands("headwater_setup", str(path))
    spec = importlib.util.spec_from_file_location("headwater_setup", path, loader=loader)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where pickle finds the classes of a data set that workers read
    spec.loader.exec_module(module)
    return module


class _AsItStands(SourceFileLoader):
    """Of the file as it is now: bytecode that was kept is taken for that of any file of one size and one second."""

    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        return self.source_to_code(self.get_data(path), path)


def _run(target: str, step: Callable[[], Any]) -> Any:
    """A step through the user's code; what it raises, with the line that did."""
    try:
        return step()
    except HeadwaterError:
        raise
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(frame.filename).name}, line {frame.lineno}"
        raise InvalidInput(
            f"{target} failed: {type(error).__name__}: {error} ({place}).{_how_to_add(error)}"
        ) from error


def _how_to_add(error: Exception) -> str:
    """A framework that is not there."""
    extra = EXTRAS.get(error.name or "") if isinstance(error, ModuleNotFoundError) else None
    return f" To add it: pip install 'headwater[{extra}]'" if extra else ""
