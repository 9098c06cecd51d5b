"""An index of vectors by inner product, by FAISS, as one sealed file. FAISS is an extra: it is imported here alone.

Source: Douze et al. 2024, arXiv 2401.08281.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from headwater.errors import InvalidSetting, MissingExtra
from headwater.store.draft import write_whole
from headwater.store.seal import open_bytes, seal_bytes

REMEDY = "Make the index again."


def _faiss() -> Any:
    """Errors: MissingExtra."""
    try:
        import faiss
    except ImportError:
        raise MissingExtra("faiss", "faiss") from None
    return faiss


class VectorIndex:
    """Vectors [n, D], to be found by the largest inner products with others."""

    def __init__(self, index: Any):
        self._index = index

    @classmethod
    def made(cls, size: int, factory: str) -> VectorIndex:
        """An empty one. factory: its kind, in FAISS's words ("Flat", "HNSW32", "IVF256,Flat").

        Errors: MissingExtra; InvalidSetting for words that FAISS does not know.
        """
        faiss = _faiss()
        try:
            return cls(faiss.index_factory(size, factory, faiss.METRIC_INNER_PRODUCT))
        except RuntimeError as error:
            raise InvalidSetting(f"factory is {factory!r}, which FAISS does not make: {error}") from error

    @classmethod
    def open(cls, file: Path, place: str) -> VectorIndex:
        """Errors: DamagedFile; MissingExtra."""
        content = open_bytes(file, place, REMEDY)
        return cls(_faiss().deserialize_index(np.frombuffer(content, dtype=np.uint8)))

    def save(self, file: Path, place: str) -> None:
        """Errors: NotWritten."""
        write_whole(file, seal_bytes(_faiss().serialize_index(self._index).tobytes(), place))

    @property
    def is_trained(self) -> bool:
        return bool(self._index.is_trained)

    @property
    def vectors(self) -> int:
        return int(self._index.ntotal)

    def train(self, vectors: np.ndarray) -> None:
        """Learn from some vectors where vectors are, for kinds that need it."""
        self._index.train(np.ascontiguousarray(vectors, dtype=np.float32))

    def add(self, vectors: np.ndarray) -> None:
        self._index.add(np.ascontiguousarray(vectors, dtype=np.float32))

    def search(self, vectors: np.ndarray, count: int) -> np.ndarray:
        """The numbers of the vectors with the largest inner products, as far as the index finds some: [q, count].

        -1 where it found none.
        """
        _, found = self._index.search(np.ascontiguousarray(vectors, dtype=np.float32), min(count, self.vectors))
        return np.asarray(found)
