"""What a folder of work belongs to: written once, by whoever comes first, and compared by all others."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from headwater.errors import InvalidInput
from headwater.store.draft import explained_errors, is_draft, remove_dead, write_new
from headwater.store.seal import sealed, unsealed

IDENTITY = "identity.json"
OTHER_FOLDER = "Choose another folder, or remove this one."


def claim_folder(path: Path, kind: str, identity: Mapping[str, Any], tolerance: float = 0.0) -> str:
    """Make the folder, or find that it is of the same kind and identity; the digest of the identity that came first.

    kind: what the folder holds, in words. identity: JSON values only; fractions may be off by the tolerance, relative.
    Errors: InvalidInput for a folder of other things, or of another identity, naming what differs; DamagedFile;
    NotWritten.
    """
    # Through JSON: tuples would not equal the lists that are read back.
    mine = json.loads(json.dumps({"kind": kind, **identity}))
    file = path / IDENTITY
    if not file.exists():
        # Never write into somebody's folder of other things.
        if path.exists() and not (path.is_dir() and all(is_draft(each.name) for each in path.iterdir())):
            raise _about_folder(
                f"{path} is not empty and holds no {kind} of headwater: there is no {IDENTITY} in it. "
                "Choose another folder."
            )
        with explained_errors(path):
            path.mkdir(parents=True, exist_ok=True)
        write_new(file, json.dumps(sealed(mine), indent=1).encode())
    remove_dead(path)
    found, seal = unsealed(file, remedy=OTHER_FOLDER)
    if found.get("kind") != kind:
        raise _about_folder(
            f"{path} holds a {found.get('kind', 'thing of another kind')}, and no {kind}. {OTHER_FOLDER}"
        )
    # Fractions to a tolerance: a fit again, in other batches, gives another damping in its last digits.
    different = [n for n in {**found, **mine} if not same(found.get(n), mine.get(n), tolerance)]
    if different:
        changes = (f"{name} was {short(found.get(name))}, now {short(mine.get(name))}" for name in different)
        raise _about_folder(f"{path} holds another {kind}: {'; '.join(changes)}. {OTHER_FOLDER}")
    return str(seal["digest"])


def _about_folder(said: str) -> InvalidInput:
    error = InvalidInput(said)
    error.placed = True  # no rows are meant, wherever a pass may be
    return error


def same(a: Any, b: Any, tolerance: float, by_largest: bool = False) -> bool:
    """JSON values; numbers, one of them with a fraction, to a relative tolerance.

    by_largest: lists of such numbers are vectors, and relative means to their largest.
    """
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[name], b[name], tolerance, by_largest) for name in a)
    if isinstance(a, list) and isinstance(b, list):
        if by_largest and len(a) == len(b) and a and all(isinstance(value, float) for value in (*a, *b)):
            largest = max(map(abs, (*a, *b)))
            return all(x == y or abs(x - y) <= tolerance * largest for x, y in zip(a, b, strict=True))
        return len(a) == len(b) and all(same(x, y, tolerance, by_largest) for x, y in zip(a, b, strict=True))
    numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in (a, b))
    # Whole numbers are counts and settings: they are the same or they are not.
    if numbers and (isinstance(a, float) or isinstance(b, float)):
        return bool(a == b or (a != a and b != b) or abs(a - b) <= tolerance * max(abs(a), abs(b)))
    return bool(type(a) is type(b) and a == b)


def short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
