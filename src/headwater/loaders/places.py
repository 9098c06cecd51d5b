"""Where a pass is: errors inside it say which batch and row they are about.

A generator cannot catch what the loop around it raises. So each pass notes where it is, and whoever runs passes
(`located`) adds that to what comes out of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from headwater.errors import BatchMismatch, HeadwaterError, InvalidInput, NonFiniteValue, ShapeMismatch

RAW = (RuntimeError, TypeError, ValueError, IndexError)
"""What frameworks raise for inputs of another shape, dtype or device."""
ABOUT_ROWS = (InvalidInput, BatchMismatch, ShapeMismatch, NonFiniteValue)
"""What is raised for rows; their subclasses are about settings, blocks or modes."""


@dataclass(frozen=True)
class Place:
    """Some rows of a loader."""

    role: str
    """"train" or "query"."""
    batch: int
    """The loader's item, from 0."""
    start: int
    """Position, in the loader, of the batch's first row."""
    rows: int | None = None
    """In the batch; None where that is not known yet."""
    offset: int = 0
    """Of a piece: its first row's position in the batch."""

    def __str__(self) -> str:
        said = f"{self.role.capitalize()} rows, batch {self.batch}"
        return f"{said} (rows {self.start} to {self.start + self.rows - 1} of the loader)" if self.rows else said

    def row(self, number: int) -> str:
        """One row, by its position in the piece."""
        row = self.offset + number
        said = f"{self.role.capitalize()} rows, batch {self.batch}, row {row}"
        return f"{said} (row {self.start + row} of the loader)"


@dataclass(frozen=True)
class JoinedPlace(Place):
    """Some rows of several batches, one after the other."""

    parts: tuple[tuple[Place, int], ...] = ()
    """Each batch's place, and how many rows of it there are."""

    @classmethod
    def of(cls, parts: Sequence[tuple[Place, int]]) -> JoinedPlace:
        first = parts[0][0]
        return cls(first.role, first.batch, first.start + first.offset, sum(n for _, n in parts), parts=tuple(parts))

    def __str__(self) -> str:
        first, last = self.parts[0][0], self.parts[-1][0]
        if first.batch == last.batch:
            return str(first)
        rows = f"rows {self.start} to {self.start + (self.rows or 0) - 1} of the loader"
        return f"{self.role.capitalize()} rows, batches {first.batch} to {last.batch} ({rows})"

    def row(self, number: int) -> str:
        number += self.offset
        for place, rows in self.parts:
            if number < rows:
                return place.row(number)
            number -= rows
        return str(self)


_HERE: ContextVar[Place | None] = ContextVar("headwater_place", default=None)


def here() -> Place | None:
    """Where the innermost pass is; None outside of passes."""
    return _HERE.get()


def move_to(place: Place | None) -> None:
    """A pass says where it is, or that its rows are done."""
    _HERE.set(place)


@contextmanager
def located() -> Iterator[None]:
    """Errors of passes inside say where: of values that are not finite, of inputs, and of a framework by itself.

    Errors: InvalidInput around a framework's own error, where a pass was at some rows.
    """
    before = _HERE.set(None)
    try:
        yield
    except Exception as error:
        raise_at(error, here())
        raise
    finally:
        _HERE.reset(before)


def raise_at(error: Exception, place: Place | None) -> None:
    """Say where, once: an error passes through several runs on its way out. Errors: as `located`."""
    if place is None:
        return
    if isinstance(error, HeadwaterError):
        if type(error) in ABOUT_ROWS and not error.placed:
            row = isinstance(error, NonFiniteValue) and error.rows
            error.args = (f"{place.row(row[0]) if row else place}: {error}",)
            error.placed = True
    elif "OutOfMemory" in type(error).__name__:  # who catches it takes smaller batches: it stays what it is
        error.add_note(str(place))
    elif isinstance(error, RAW) and not isinstance(error, (NotImplementedError, RecursionError)):
        raise InvalidInput(f"{place}: {type(error).__name__}: {error}") from error
