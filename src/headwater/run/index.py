"""Kept rows in an index: the best of millions without a scan, ranked exactly among themselves.

1. Op is symmetric, so that a score is <g_query, Op g_row>: each row goes through the operator once, when the index is
   made, and a query not at all.
2. The index finds candidates for both ends of every ranking, as its kind allows: "Flat" all of the best, others most.
3. The candidates of all queries are scored as a scan would score them, from the kept gradients.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from headwater.arrays import namespace, to_numpy
from headwater.errors import DamagedFile, InvalidInput, InvalidSetting
from headwater.gradients.provider import BlockGradients
from headwater.influence import ComposableInfluence
from headwater.rows import Each, PlacedBatch, Rows, sweep
from headwater.run.attribute import top
from headwater.run.identity import fit_identity, fit_tolerance
from headwater.store.draft import draft, sync_folder
from headwater.store.faiss_index import VectorIndex
from headwater.store.kept import Manifest, refuse_others
from headwater.store.scores import TopK
from headwater.store.seal import sealed, unsealed

KIND = "index of gradients"
HEAD, VECTORS = "index.json", "vectors.faiss"
ENOUGH = 10
"""Candidates for each row that is asked for, unless a number is given."""


class Scanned(Protocol):
    """Kept rows, for a run."""

    manifest: Manifest

    def only(self, rows: Mapping[str, Sequence[int]]) -> Rows:
        """Of each file, these rows alone."""
        ...


class Kept(Protocol):
    """A store of gradients."""

    @property
    def path(self) -> Path: ...

    def train_rows(self, influence: ComposableInfluence) -> Any:
        """`Scanned`, which are `Rows`."""
        ...


class KeptIndex:
    """An index of kept gradients, for one fit at one damping: `kept.index(influence, path)` makes it.

    Errors of use: InvalidInput for another fit, naming what differs, and for a store that was changed since.
    """

    def __init__(self, path: str | os.PathLike[str], kept: Kept):
        self.path, self.kept = Path(path), kept
        self.identity, seal = unsealed(self.path / HEAD, remedy="Make the index again.")
        if self.identity.get("kind") != KIND:
            raise DamagedFile(f"{path} holds no index of gradients.")
        self._vectors = VectorIndex.open(self.path / VECTORS, str(seal["digest"]))

    def __len__(self) -> int:
        return self._vectors.vectors

    def top(
        self,
        influence: ComposableInfluence,
        query_loader: Iterable[object],
        k: int,
        *,
        candidates: int | None = None,
        unit: str = "influence",
    ) -> TopK:
        """As `influence.top(kept, query_loader, k)`, among candidates: exact scores, of the rows that the index finds.

        candidates: rows that are looked for at each end of each query's ranking; None for ten times k.
        """
        with influence.source.own_precision():
            influence.ready()
            refuse_others(
                self.path, self.identity["fit"], fit_identity(influence), fit_tolerance(influence), "another fit"
            )
            rows: Scanned = self.kept.train_rows(influence)
            if rows.manifest.seal != self.identity["store"]:
                raise InvalidInput(f"{self.kept.path} was changed since {self.path} was made. Make the index again.")
            queries = influence.query_rows(query_loader)
            vectors = np.concatenate(
                sweep(influence.provider, queries, Each(lambda item: _query_vectors(influence, item)), "query rows")
            )
            count = candidates or ENOUGH * k
            found = np.concatenate([self._vectors.search(sign * vectors, count).reshape(-1) for sign in (1, -1)])
            few = rows.only(_by_file(rows.manifest, np.unique(found[found >= 0])))
            return top(influence, few, queries, k, unit=unit, progress=False)


def make_index(
    influence: ComposableInfluence, kept: Kept, path: str | os.PathLike[str], factory: str, progress: bool
) -> KeptIndex:
    """See `KeptGradients.index`."""
    mapper = influence.ready()
    if mapper.own_forms or not all(operator.symmetric for operator in mapper.operators.values()):
        raise InvalidSetting(
            f"{influence.method.describe()} has no symmetric operator that rows could go through first."
        )
    rows = kept.train_rows(influence)
    made: list[VectorIndex] = []

    def add(item: PlacedBatch) -> None:
        vectors = _row_vectors(influence, item)
        if not made:
            made.append(VectorIndex.made(vectors.shape[1], factory))
        if not made[0].is_trained:
            made[0].train(vectors)
        made[0].add(vectors)

    with draft(path) as folder:
        sweep(influence.provider, rows, Each(add), "index", progress)
        identity = {"kind": KIND, "store": rows.manifest.seal, "fit": fit_identity(influence), "factory": factory}
        head = sealed(identity)
        (folder / HEAD).write_text(json.dumps(head, indent=1))
        made[0].save(folder / VECTORS, str(head["seal"]["digest"]))
        sync_folder(folder)
    return KeptIndex(path, kept)


def _row_vectors(influence: ComposableInfluence, item: PlacedBatch) -> np.ndarray:
    """Op of kept rows, in the small space where they meet in one: float32 [n, D]."""
    operators, grads = influence.block_mapper.operators, item.grads(influence.provider)
    found = []
    for name, value in grads.items():
        left, _ = operators[name].kept_sides(value)
        found.append(_host(left.apply_block(left.seen(value)).flat()))
    return np.concatenate(found, axis=1)


def _query_vectors(influence: ComposableInfluence, item: PlacedBatch) -> np.ndarray:
    """Query gradients, in that space: float32 [q, D]."""
    operators = influence.block_mapper.operators
    grads: BlockGradients = influence.provider.grads(item.batch, query=True)
    found = [_host(operators[n].stored(operators[n].seen(value)).flat()) for n, value in grads.items()]
    return np.concatenate(found, axis=1)


def _host(flat: Any) -> np.ndarray:
    return to_numpy(namespace(flat).astype(flat, namespace(flat).float32))


def _by_file(manifest: Manifest, numbers: np.ndarray) -> dict[str, list[int]]:
    """Which rows of which file the scan's rows of these numbers are."""
    found, start = {}, 0
    for entry in manifest.entries:
        there = np.delete(np.arange(entry.rows), entry.gone)
        mine = numbers[(numbers >= start) & (numbers < start + len(there))] - start
        if len(mine):
            found[entry.file] = there[mine].tolist()
        start += len(there)
    return found
