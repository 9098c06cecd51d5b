"""Processes that hold one model together, and so make every call on it in step."""

from __future__ import annotations

from abc import ABC, abstractmethod


class Together(ABC):
    """What this process may ask the others; all of them ask it at the same point."""

    number: int
    """Of this process, from 0."""
    count: int

    @abstractmethod
    def all_say(self, answer: bool) -> bool:
        """Whether the answer is yes on every process. Errors: if they are not in step."""
