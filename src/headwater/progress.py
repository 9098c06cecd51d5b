"""How far something long has come: a bar on a terminal, a line now and then elsewhere; silent unless asked for."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from operator import length_hint
from time import monotonic
from typing import Any, Protocol

FIRST, EVERY = 2.0, 10.0
"""Seconds until the first line, and between lines: a log of an hour's work has some hundreds."""
COLUMNS, ROWS = 80, 24
"""Of a terminal that does not say how large it is."""


class Progress(Protocol):
    """What is told of each step."""

    def update(self, n: int = 1) -> object:
        """n more steps are done."""


def track(items: Iterable[object], what: str, show: bool, total: int | None = None) -> Iterator[Any]:
    """The items; on the error stream, how many have been taken, and what is being done with them."""
    if not show:
        yield from items
        return
    with bar(what, show, total or length_hint(items) or None) as shown:
        for each in items:
            yield each
            shown.update()


@contextmanager
def bar(what: str, show: bool, total: int | None = None, unit: str = "") -> Iterator[Progress]:
    """Something to be told of steps, which shows them on the error stream if it is to."""
    if not show:
        yield _Silent()
    elif _draws():
        from tqdm.auto import tqdm

        width: dict[str, Any] = {"dynamic_ncols": True} if _columns() else {"ncols": COLUMNS, "nrows": ROWS}
        if unit:
            width |= {"unit": f" {unit}", "unit_scale": True}
        with tqdm(desc=what, total=total, leave=False, **width) as drawn:
            yield drawn
    else:
        lines = _Lines(what, total, unit)
        yield lines
        lines.end()


def _draws() -> bool:
    """Whether a line can be drawn over: on a terminal that can go back in it, or in a notebook, which has its own."""
    return "ipykernel" in sys.modules or (sys.stderr.isatty() and os.environ.get("TERM") != "dumb")


def _columns() -> int:
    """Of the terminal; 0 where it does not say: tqdm would take that for a width, and draw nothing."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns
    except (OSError, ValueError):  # no terminal, or no file: a notebook
        return COLUMNS


class _Silent:
    def update(self, n: int = 1) -> None:
        pass


class _Lines:
    """For logs and pipes: what is short says nothing, what takes longer a whole line every few seconds."""

    def __init__(self, what: str, total: int | None, unit: str):
        self._what, self._total, self._unit = what, total, f" {unit}" if unit else ""
        self._done, self._said = 0, False
        self._began = monotonic()
        self._next = self._began + FIRST

    def update(self, n: int = 1) -> None:
        self._done += n
        now = monotonic()
        if now >= self._next:
            self._say(now)
            self._next = now + EVERY

    def end(self) -> None:
        if self._said:
            self._say(monotonic())

    def _say(self, now: float) -> None:
        took = now - self._began
        of = f" of {self._total} ({100 * self._done // self._total}%)" if self._total else ""
        left = took * (self._total - self._done) / self._done if self._total and self._done else 0
        more = f", about {_clock(left)} left" if left else ""
        print(f"{self._what}: {self._done}{of}{self._unit}, {_clock(took)}{more}", file=sys.stderr, flush=True)
        self._said = True


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
