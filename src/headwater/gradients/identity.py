"""The identity of functions and settings, as text: for saved fits, which must not be taken for others."""

from __future__ import annotations

from functools import partial
from types import CodeType, FunctionType, MethodType
from typing import Any
from zlib import crc32

import numpy as np

from headwater.arrays import is_array, to_numpy


def identity_of(value: object) -> str:
    """The same in every process for the same function, module or setting; another, as far as can be seen, for others.

    A function is its name, its code, and what it closes over; an object its class and its public attributes. What is
    met again, as where objects hold each other, is its name alone.
    """
    return _identity(value, set())


def name_of(function: object, otherwise: str | None = None) -> str:
    """A function's own name; of a module or another object that can be called its class's, or `otherwise`."""
    return str(getattr(function, "__name__", type(function).__name__ if otherwise is None else otherwise))


def module_of(value: object) -> str:
    """Where a function, or an object's class, was defined; "" for what Python itself brings."""
    return str(getattr(value, "__module__", ""))


def _identity(value: Any, seen: set[int]) -> str:
    if value is None or isinstance(value, (bool, int, float, str, bytes, type)):
        return repr(value)
    if is_array(value) or isinstance(value, np.generic):
        array = np.ascontiguousarray(to_numpy(value) if is_array(value) else value)
        return f"{array.dtype}{array.shape}#{crc32(array.tobytes())}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_identity(item, seen)}" for key, item in value.items()) + "}"
    if isinstance(value, (tuple, list)):
        return "(" + ", ".join(_identity(item, seen) for item in value) + ")"
    if isinstance(value, partial):
        return f"partial({', '.join(_identity(part, seen) for part in (value.func, value.args, value.keywords))})"
    name = f"{module_of(value)}.{getattr(value, '__qualname__', type(value).__qualname__)}"
    if id(value) in seen:
        return name
    seen.add(id(value))
    function = value.__func__ if isinstance(value, MethodType) else value
    if not isinstance(function, FunctionType):
        found = {k: v for k, v in getattr(value, "__dict__", {}).items() if not k.startswith("_")}
        return name + (_identity(_plain(found), seen) if found else "")
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    given = _identity(_plain(dict(enumerate(cells))), seen) + _identity(function.__defaults__ or (), seen)
    return f"{name}{_code(function.__code__)}{given}"


def _code(code: CodeType) -> str:
    """Two functions that call others by name differ in nothing but the names: tanh(x) is the bytecode of relu(x)."""
    kept = [repr(constant) for constant in code.co_consts if isinstance(constant, (int, float, str))]
    inner = [_code(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    return f"#{crc32(code.co_code)}[{' '.join(code.co_names)}]({', '.join(kept)}){''.join(inner)}"


def _plain(found: dict[Any, Any]) -> dict[Any, Any]:
    """Without what has no identity of its own."""
    kinds = (bool, int, float, str, tuple, list)
    return {k: v for k, v in found.items() if v is None or isinstance(v, kinds) or is_array(v) or callable(v)}
