"""Train rows by their ids: a sweep asks for those of each step, whatever order the loader has them in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from headwater.arrays import shape_of
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

        Errors: BatchMismatch where a call's rows are of several forms, so that they are no batch as it was; those of
        other calls, and of batches of one form, do not matter.
        """
        places = self.places(step.ids)
        if not step.calls:
            return self.chosen(places, step.shares)
        found, start = [], 0
        for call in step.calls:
            rows = slice(start, start + call.rows)
            mine = self._called(places[rows], step.shares[rows], step.ids[rows])
            found.append(mine._replace(random=call.random))
            start += call.rows
        return found

    def _called(self, places: np.ndarray, shares: np.ndarray, ids: np.ndarray) -> Piece:
        """The rows of one call in its order, which is that of their masks, whatever batches they are held in."""
        pieces = self.chosen(places, shares)
        if len(pieces) == 1:
            return pieces[0]
        joined = join([piece.batch for piece in pieces])
        if len(joined) > 1:
            forms = list(dict.fromkeys(_form(piece.batch) for piece in pieces))
            raise BatchMismatch(
                f"Rows {ids[:2].tolist()} ... were one batch in training, and are of several forms here "
                f"({'; '.join(forms)}): what dropout did to each is not known. Give rows that are padded to one "
                "length, as in training."
            )
        order = np.argsort(self._batch_of(places), kind="stable")
        return Piece(joined[0].take(np.argsort(order)), shares)

    def _batch_of(self, places: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.starts, places, side="right") - 1

    def chosen(self, places: np.ndarray, shares: np.ndarray) -> list[Piece]:
        """In the order of `places` where all are in one batch, else batch by batch: see `in_order`."""
        of = self._batch_of(places)
        return [Piece(self.batches[k].take(places[of == k] - self.starts[k]), shares[of == k]) for k in np.unique(of)]

    def in_order(self, places: np.ndarray) -> np.ndarray:
        """The places in the order that `chosen` has them in."""
        return places[np.argsort(self._batch_of(places), kind="stable")]

    def columns(self, ids: np.ndarray) -> np.ndarray:
        """Of a step's rows, as its pieces have them."""
        return self.in_order(self.places(ids))


def _form(batch: Any) -> str:
    """What one row has: "x (5, 4), y ()"."""
    return f"x {_shape(batch.x)}, y {_shape(batch.y)}"


def _shape(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_shape(one)}" for name, one in value.items())
    shape = shape_of(value)
    return type(value).__name__ if shape is None else str(tuple(map(int, shape[1:])))
