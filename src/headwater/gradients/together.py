"""Processes that hold one model together, and so make every call on it in step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

Answer = TypeVar("Answer")


class Together(ABC):
    """What this process may ask the others; all of them ask it at the same point."""

    number: int
    """Of this process, from 0."""
    count: int

    @abstractmethod
    def all_say(self, answer: bool) -> bool:
        """Whether the answer is yes on every process. Errors: if they are not in step."""

    @abstractmethod
    def least(self, number: int) -> int:
        """The smallest number that a process has. Errors: if they are not in step."""

    @abstractmethod
    def first_does(self, act: Callable[[], Answer]) -> Answer:
        """Process 0 acts, the others wait for it; what it found, a JSON value, on every process.

        Errors: what the act raised, on process 0; on the others the same kind, saying that it was process 0; and if
        they are not in step.
        """

    @abstractmethod
    def tell_failure(self) -> None:
        """What this process has raised is said to the others, wherever they wait; nothing where they know of it."""


@contextmanager
def failures_told(together: Together | None) -> Iterator[None]:
    """An error of one process inside reaches the others, which would wait for it in vain."""
    try:
        yield
    except Exception:
        if together is not None:
            together.tell_failure()
        raise
