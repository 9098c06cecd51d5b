"""Names that are found in another module: imported on first use, so that a package can offer names of one above it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection
from importlib import import_module
from typing import Any


def offered(package: str, names: Collection[str], home: str) -> Callable[[str], Any]:
    """A package's `__getattr__`: these names are the home's. Errors: AttributeError for any other."""

    def look_up(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(home), name)

    return look_up


def moved(old: str, new: str, ends: str = "0.2") -> Callable[[str], Any]:
    """The `__getattr__` of a module that is now another one. Warns where it is imported, once: DeprecationWarning."""
    # Frames: this one, the old module, and who imports it; Python leaves those of the import machinery out.
    warnings.warn(f"{old} is now {new}; the old name ends in {ends}.", DeprecationWarning, stacklevel=3)
    return lambda name: getattr(import_module(new), name)
