"""A progress bar around anything long; silent unless asked for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any


def track(items: Iterable[object], what: str, show: bool, total: int | None = None) -> Iterator[Any]:
    """The items, with a bar on the error stream that names what is being done."""
    if not show:
        yield from items
        return
    from tqdm.auto import tqdm

    yield from tqdm(items, desc=what, total=total, leave=False, dynamic_ncols=True)
