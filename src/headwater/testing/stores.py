"""The contract of a store of tiles: complete or not there, and never another run's."""

from __future__ import annotations

import tempfile
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from headwater.errors import InvalidInput
from headwater.store.base import Tile
from headwater.store.plan import Sizes
from headwater.testing.contract import Contract


class TileStoreLike(Protocol):
    """What a run asks of a store; tiles are [block, query, train], keys [train] name the rows' content."""

    def read(self, number: int, queries: int) -> np.ndarray | None: ...

    def rows(self, number: int) -> dict[str, np.ndarray] | None: ...

    def write(self, tile: Tile) -> None: ...

    def probe(self, keys: np.ndarray, scores: np.ndarray) -> None: ...


class TileStoreContract(Contract):
    """For `store.tiles.TileStore` and whatever takes its place. Hook: `open_store`."""

    @abstractmethod
    def open_store(self, path: Path, identity: Mapping[str, Any], sizes: Sizes) -> TileStoreLike:
        """A hook: the store in this folder, new or found there. Errors: InvalidInput if it holds another run."""

    def opened(self, path: Path, identity: Mapping[str, Any]) -> TileStoreLike:
        """With tiles of five train rows and three queries."""
        return self.open_store(path, identity, Sizes(5, 3))

    @contextmanager
    def folder(self) -> Iterator[Path]:
        """An empty place for one claim."""
        with tempfile.TemporaryDirectory() as path:
            yield Path(path) / "run"

    def tile(self, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Keys of five rows, and a tile for them: two blocks, three queries."""
        return np.arange(5, dtype=np.uint64) + np.uint64(seed), self.random(2, 3, 5, seed=seed)

    def test_what_was_written_is_read_by_another_opening(self) -> None:
        with self.folder() as path:
            keys, tile = self.tile()
            self.opened(path, {"run": 1}).write(Tile(10, keys, keys, tile))
            store = self.opened(path, {"run": 1})
            np.testing.assert_array_equal(store.read(2, 0), tile)
            rows = store.rows(2)
            assert rows is not None
            np.testing.assert_array_equal(rows["keys"], keys)

    def test_the_last_tile_may_have_fewer_rows_and_queries(self) -> None:
        with self.folder() as path:
            keys, tile = self.tile()
            self.opened(path, {"run": 1}).write(Tile(10, keys[:2], keys[:2], tile[:, :1, :2], 6))
            np.testing.assert_array_equal(self.opened(path, {"run": 1}).read(2, 2), tile[:, :1, :2])

    def test_what_was_not_written_is_not_there(self) -> None:
        with self.folder() as path:
            keys, tile = self.tile()
            store = self.opened(path, {"run": 1})
            store.write(Tile(10, keys, keys, tile))
            assert store.read(0, 0) is None
            assert store.read(2, 1) is None

    def test_a_tile_can_be_written_again(self) -> None:
        with self.folder() as path:
            (keys, tile), (_, other) = self.tile(), self.tile(seed=1)
            store = self.opened(path, {"run": 1})
            store.write(Tile(0, keys, keys, tile))
            store.write(Tile(0, keys, keys, other))
            np.testing.assert_array_equal(self.opened(path, {"run": 1}).read(0, 0), other)

    def test_tiles_at_other_places_are_refused(self) -> None:
        with self.folder() as path:
            keys, tile = self.tile()
            store = self.opened(path, {"run": 1})
            for wrong in (Tile(3, keys, keys, tile), Tile(0, keys, None, tile)):
                with self.refuses(InvalidInput, "no tile"):
                    store.write(wrong)

    def test_tiles_keep_the_size_that_came_first(self) -> None:
        with self.folder() as path:
            keys, tile = self.tile()
            self.opened(path, {"run": 1}).write(Tile(5, keys, keys, tile))
            found = self.open_store(path, {"run": 1}, Sizes(100, 100)).read(1, 0)
            np.testing.assert_array_equal(found, tile)

    def test_another_run_is_refused_and_what_differs_is_named(self) -> None:
        with self.folder() as path:
            keys, tile = self.tile()
            self.opened(path, {"method": "a", "damping": 1.0}).write(Tile(0, keys, keys, tile))
            with self.refuses(InvalidInput, "damping", "2.0"):
                self.opened(path, {"method": "a", "damping": 2.0})

    def test_scores_that_come_out_otherwise_are_refused(self) -> None:
        with self.folder() as path:
            keys, tile = self.tile()
            self.opened(path, {"run": 1}).probe(keys, tile)
            store = self.opened(path, {"run": 1})
            store.probe(keys, tile * (1 + 1e-6))
            store.probe(keys[:2], tile[..., :2])
            for scores in (tile * 1.1, np.where(np.arange(5) == 3, np.nan, tile)):
                with self.refuses(InvalidInput, "other scores"):
                    self.opened(path, {"run": 1}).probe(keys, scores)
            with self.refuses(InvalidInput, "other rows"):
                store.probe(keys + np.uint64(1), tile)

    def test_numbers_that_differ_by_rounding_are_the_same_run(self) -> None:
        with self.folder() as path:
            keys, tile = self.tile()
            self.opened(path, {"damping": {"a": 0.1}}).write(Tile(0, keys, keys, tile))
            found = self.opened(path, {"damping": {"a": 0.1 * (1 + 1e-8)}}).read(0, 0)
            np.testing.assert_array_equal(found, tile)
