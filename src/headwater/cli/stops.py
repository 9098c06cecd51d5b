"""Ctrl-C and SIGTERM: both end a command in the same way, and it says how to go on."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
_heard: list[signal.Signals] = []
"""Of this command: signals are a process's affair, and so is this list."""


class SignalCame(KeyboardInterrupt):
    """A class of its own: where the plain one leaves an `exec` of text, Python ends by SIGINT, whoever caught it."""


class Stopped(BaseException):
    """A signal came. status: to exit with, 128 and the signal's number, as shells have it."""

    def __init__(self, said: str):
        super().__init__(said)
        self.status = 128 + _heard[0]


@contextmanager
def stop_signals() -> Iterator[None]:
    """Signals raise KeyboardInterrupt where the work is, and that is Stopped in the end.

    Errors: Stopped, also where a library made another exception of the first one.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        _heard.append(signal.Signals(number))
        raise SignalCame

    _heard.clear()
    before = {}
    if threading.current_thread() is threading.main_thread():  # elsewhere Python lets nobody listen
        for number in WORDS:
            # Started in the background of a script: Ctrl-C is another command's.
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, stop)
    try:
        with kept(""):
            yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


@contextmanager
def kept(said: str) -> Iterator[None]:
    """Whoever is stopped in here is told so. Errors: Stopped."""
    try:
        yield
    except Stopped:
        raise
    except BaseException as error:
        if _heard:
            raise Stopped(f"{WORDS[_heard[0]]}. {said}".strip()) from error
        raise
