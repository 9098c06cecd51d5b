"""Which tiles a run is made of: plain data, the same for any number of workers, kept beside what it made."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple, Self

from headwater.errors import DamagedFile
from headwater.store.draft import write_whole
from headwater.store.seal import sealed, unsealed


class Span(NamedTuple):
    """Rows from `start` on, before `stop`."""

    start: int
    stop: int


class PlannedTile(NamedTuple):
    """One piece of work."""

    stage: str
    """"fit" (one tile for each pass of the method over the rows) or "score"."""
    train: Span
    query: Span | None
    """None in a fit."""


@dataclass(frozen=True)
class Sizes:
    """Of the tiles of a run."""

    rows: int
    """Train rows of a tile; the last one may have fewer."""
    queries: int
    """Query rows of a tile."""
    working: int | None = None
    """Bytes that the gradients of a piece of a tile may take; None for the default."""


@dataclass(frozen=True)
class Plan:
    """A run before it is made."""

    train_rows: int
    query_rows: int
    sizes: Sizes
    fit_rows: int
    """Train rows of a tile of a fit."""
    memory: int | None = None
    """The budget that it was made for, in bytes; None for none."""

    def tiles(self) -> list[PlannedTile]:
        """Those of one pass of a fit, and those of all scores, in order."""
        fit = [PlannedTile("fit", rows, None) for rows in spans(self.train_rows, self.fit_rows)]
        queries, rows = spans(self.query_rows, self.sizes.queries), list(spans(self.train_rows, self.sizes.rows))
        return fit + [PlannedTile("score", train, query) for query in queries for train in rows]

    def save(self, path: str | os.PathLike[str]) -> None:
        """As JSON. Errors: NotWritten."""
        write_whole(Path(path), json.dumps(sealed(asdict(self)), indent=1).encode())

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """Errors: DamagedFile."""
        found, _ = unsealed(Path(path), remedy="Make the plan again.")
        try:
            return cls(**{**found, "sizes": Sizes(**found["sizes"])})
        except (KeyError, TypeError) as error:
            raise DamagedFile(f"{path} is whole, but holds no plan that this version can read: {error}") from error

    def __str__(self) -> str:
        count = len(self.tiles())
        budget = "" if self.memory is None else f", within {self.memory / 2**20:.0f} MiB"
        return (
            f"{self.train_rows} train rows x {self.query_rows} queries in {count} tiles{budget}: scores in tiles of "
            f"{self.sizes.rows} x {self.sizes.queries}, a fit in tiles of {self.fit_rows} rows"
        )


def spans(count: int, step: int) -> Iterator[Span]:
    """0 to step, step to 2 step, ...; the last one ends at count."""
    return (Span(start, min(start + step, count)) for start in range(0, count, step))
