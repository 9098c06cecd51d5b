"""Rows of a segment, where a provider takes a batch: what is asked of them is what was kept."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from headwater.arrays import Array, as_like, namespace
from headwater.blocks import Layout
from headwater.errors import UnsupportedModel
from headwater.gradients.provider import BlockGradients
from headwater.loaders.keys import RowKeys
from headwater.run.packing import FLAT, is_flat, unpacked
from headwater.store.kept import Entry, SegmentFolder
from headwater.store.segments import Segment


@dataclass(frozen=True, eq=False)
class StoredRows:
    """Rows of a segment that are not deleted: what is asked of a batch of them, as it was kept."""

    folder: SegmentFolder
    entry: Entry
    segment: Segment
    layouts: Mapping[str, tuple[Layout, bool]]
    """By block, and whether it is projected."""
    like: Array
    span: slice
    """Rows of the segment, one after the other."""
    there: np.ndarray | None
    """Which of these, from their first on; None for all."""

    @classmethod
    def of(
        cls, folder: SegmentFolder, entry: Entry, layouts: Mapping[str, tuple[Layout, bool]], like: Array
    ) -> StoredRows:
        """All rows of a segment. Errors: DamagedFile."""
        there = np.delete(np.arange(entry.rows), entry.gone) if entry.gone else None
        return cls(folder, entry, folder.segment(entry), layouts, like, slice(0, entry.rows), there)

    def __len__(self) -> int:
        return self.span.stop - self.span.start if self.there is None else len(self.there)

    def take(self, rows: slice) -> StoredRows:
        """Some of them, one after the other; of what is left where some were deleted."""
        start, stop, _ = rows.indices(len(self))
        span, there = slice(self.span.start + start, self.span.start + stop), None
        if self.there is not None and stop > start:
            some = self.there[start:stop]
            span = slice(self.span.start + int(some[0]), self.span.start + int(some[-1]) + 1)
            there = some - some[0]
        return replace(self, span=span, there=there)

    @property
    def names(self) -> np.ndarray:
        return self._mine(self.folder.names(self.entry, self.segment))

    @property
    def keys(self) -> RowKeys:
        keys = keys_of(self.segment).take(self.span)
        return keys if self.there is None else keys.take(self.there)

    @property
    def is_flat(self) -> bool:
        """Whether all of the rows is in one matrix."""
        return is_flat(self.segment)

    @property
    def weights(self) -> np.ndarray | None:
        """float64 [n]; None if all are one."""
        return self._each("weights")

    @property
    def self_scale(self) -> np.ndarray | None:
        """As the provider's, float64 [n]. Errors: UnsupportedModel, as the provider's."""
        if self.segment.about["refused"]:
            raise UnsupportedModel(self.segment.about["refused"])
        return self._each("self")

    def grads(self) -> BlockGradients:
        """Without weights."""
        found = unpacked(self.segment, self.layouts, self.like, self.span)
        if self.there is None:
            return found
        there = as_like(self.there, self.like, namespace(self.like).int64)
        return OrderedDict((name, value.take(there)) for name, value in found.items())

    def times(self, factors: np.ndarray | None, values: BlockGradients) -> BlockGradients:
        """Each row times its factor [n]."""
        if factors is None:
            return values
        own = as_like(factors, self.like)
        return OrderedDict((block, value.weighted(own)) for block, value in values.items())

    def product(self, matrix: np.ndarray) -> np.ndarray:
        """Weighted rows on a matrix [D, q], on the memory map: [n, q]."""
        product = self.segment.product(FLAT, matrix, self.span)
        found = product if self.there is None else product[self.there]
        weights = self.weights
        if weights is not None:
            found *= weights.astype(found.dtype)[:, None]
        return found

    def _each(self, name: str) -> np.ndarray | None:
        return self._mine(self.segment.raw(name)) if self.segment.has(name) else None

    def _mine(self, values: np.ndarray) -> np.ndarray:
        return values[self.span] if self.there is None else values[self.span][self.there]


def keys_of(segment: Segment) -> RowKeys:
    """Of the rows of a segment, deleted ones too."""
    ids, shaped = (segment.raw(f"keys.{n}") if segment.has(f"keys.{n}") else None for n in ("ids", "shaped"))
    return RowKeys(segment.raw("keys.content"), segment.raw("keys.weighted"), ids, shaped)
