"""Train rows by their ids: a sweep asks for those of each step, whatever order the loader has them in."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from headwater.errors import BatchMismatch
from headwater.gradients.provider import StructuredGradientProvider
from headwater.rows import Each, PlacedBatch
from headwater.run.rows import distinct, joined_names, sweep_rows
from headwater.trajectory.record import Step
from headwater.trajectory.steps import Piece
from headwater.trajectory.trajectory import Trajectory
from headwater.types import join


@dataclass(frozen=True, eq=False)
class HeldRows:
    """All rows of a loader, in memory, in batches of one form."""

    names: np.ndarray
    """What the rows are called, in the loader's order: [n]."""
    batches: Sequence[Any]
    starts: np.ndarray
    """Of each batch, the position of its first row."""
    order: np.ndarray
    """Positions in the order of the names."""

    @classmethod
    def of(cls, provider: StructuredGradientProvider, loader: Iterable[object], progress: bool = False) -> HeldRows:
        """One pass, without the model. Errors: BatchMismatch for ids that come twice."""
        held = Each[PlacedBatch, PlacedBatch](lambda piece: piece)
        pieces = sweep_rows(provider, loader, held, "train rows", progress)
        names = distinct(joined_names([piece.names for piece in pieces], "train"), "train")
        batches = join([piece.batch for piece in pieces])
        starts = np.cumsum([0, *(len(batch) for batch in batches)])[:-1]
        return cls(names, batches, starts, np.argsort(names, kind="stable"))

    def __len__(self) -> int:
        return len(self.names)

    def places(self, ids: np.ndarray) -> np.ndarray:
        """Positions of the rows of these names, -1 for those that are not there: [b]."""
        if (ids.dtype.kind in "iu") != (self.names.dtype.kind in "iu"):
            return np.full(len(ids), -1)
        found = np.minimum(np.searchsorted(self.names, ids, sorter=self.order), len(self) - 1)
        at = self.order[found]
        return np.where(self.names[at] == ids, at, -1)

    def check(self, record: Trajectory) -> None:
        """Errors: BatchMismatch where the record is of rows that are not here."""
        places = self.places(record.rows)
        if (places < 0).any():
            row, first, last = (each.item() for each in (record.rows[places < 0][0], self.names[0], self.names[-1]))
            words = "" if type(row) is type(first) else " Words are not numbers: '7' is another row than 7."
            raise BatchMismatch(
                f"The training saw row {row!r}, which the train loader does not have ({int((places < 0).sum())} of the "
                f"{len(record.rows)} rows of the record; the loader's are called {first!r} to {last!r}). Give all rows "
                f"that were trained on, called as in r.step(ids).{words}"
            )

    def pieces(self, step: Step) -> list[Piece]:
        """The rows of a step, with their shares; of a model that draws random numbers, call by call.

        Errors: BatchMismatch where a call's rows are of several forms, so that they are no batch as it was.
        """
        places = self.places(step.ids)
        if not step.calls:
            return self.chosen(places, step.shares)
        found, start = [], 0
        for call in step.calls:
            rows = slice(start, start + call.rows)
            mine = self.chosen(places[rows], step.shares[rows])
            if len(mine) > 1:
                raise BatchMismatch(
                    f"Rows {step.ids[rows][:2].tolist()} ... were one batch in training, and are of {len(mine)} "
                    "shapes here: what dropout did to each is not known. Give rows that are padded to one length, as "
                    "in training."
                )
            found.append(mine[0]._replace(random=call.random))
            start += call.rows
        return found

    def chosen(self, places: np.ndarray, shares: np.ndarray) -> list[Piece]:
        """In the order of `places` where all are in one batch, else batch by batch: see `in_order`."""
        of = np.searchsorted(self.starts, places, side="right") - 1
        return [Piece(self.batches[k].take(places[of == k] - self.starts[k]), shares[of == k]) for k in np.unique(of)]

    def in_order(self, places: np.ndarray) -> np.ndarray:
        """The places in the order that `chosen` has them in."""
        of = np.searchsorted(self.starts, places, side="right") - 1
        return places[np.argsort(of, kind="stable")]

    def columns(self, ids: np.ndarray) -> np.ndarray:
        """Of a step's rows, as its pieces have them."""
        return self.in_order(self.places(ids))
