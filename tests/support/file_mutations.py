"""Ways in which files have lied, and quick laws that must notice each; for the registry in tests/test_mutations.py."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from damage import QUERY, TRAIN, X, Y, by_torch, left_by_a_dead_process

import headwater as hw
from headwater.errors import HeadwaterError
from headwater.evaluate import Bank, bank, plan_subsets
from headwater.run import attribute, diagnosis, plan, queries
from headwater.run import tiles as run_tiles
from headwater.store import draft, folder, matrix, scores, seal, tiles
from headwater.torch import TorchBatch

Law = Callable[[], None]


def the_same_or_refused(read: Callable[[], Any], expected: Any) -> None:
    """Errors: AssertionError."""
    try:
        found = np.asarray(read(), dtype=np.float64)
    except HeadwaterError:
        return
    expected = np.asarray(expected, dtype=np.float64)
    gap = np.abs(found - expected).max() if found.shape == expected.shape else np.inf
    assert gap <= 1e-4 * np.abs(expected).max(), f"off by {gap:.3g}"


@contextmanager
def scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as path:
        yield Path(path)


def a_lost_chunk_of_scores_is_no_number() -> None:
    with scratch() as path:
        hw.Scores(np.ones((2, 3)), np.arange(2), np.arange(3)).save(path / "s")
        (path / "s" / "scores" / "c" / "0" / "0").unlink()
        the_same_or_refused(lambda: hw.Scores.open(path / "s").values, np.ones((2, 3)))


def a_fit_says_how_many_rows_it_saw() -> None:
    with scratch() as path:
        by_torch().fit(TRAIN).save(path / "f")
        file = path / "f" / "fit.json"
        file.write_text(file.read_text().replace('"rows": 11', '"rows": 17'))
        the_same_or_refused(lambda: by_torch().load(path / "f").n_train, 11)


def a_run_of_a_bank_is_its_own() -> None:
    with scratch() as path:
        plan = plan_subsets(6, subsets=3, repeated=0)
        full = Bank(path / "b", plan, 1, {}).fill(lambda rows, seed: [seed])
        (path / "b" / "runs" / "0-0.npy").write_bytes((path / "b" / "runs" / "1-0.npy").read_bytes())
        the_same_or_refused(lambda: Bank.open(path / "b").outputs, full.outputs)


def a_damaged_tile_is_computed_again() -> None:
    influence = by_torch().fit(TRAIN)
    with scratch() as path:
        expected = influence.attribute(TRAIN, QUERY, store=path / "r").values
        chunk = path / "r/tiles.zarr/scores/c/0/0/0"
        content = bytearray(chunk.read_bytes())
        content[2] ^= 64
        chunk.write_bytes(content)
        the_same_or_refused(lambda: influence.attribute(TRAIN, QUERY, store=path / "r").values, expected)


def a_store_does_not_give_the_scores_of_another_model() -> None:
    weights = torch.ones(11)
    weights[0] = 0
    train = [TorchBatch(X, Y, weights=weights)]
    one, two = (by_torch(damping=0.1, activation=kind).fit(TRAIN) for kind in (torch.nn.Tanh, torch.nn.ReLU))
    with scratch() as path, patch.object(type(one.source), "architecture", ""):
        one.attribute(train, QUERY, store=path / "r")
        the_same_or_refused(
            lambda: two.attribute(train, QUERY, store=path / "r").values, two.attribute(train, QUERY).values
        )


def a_resumed_run_knows_all_rows() -> None:
    influence = by_torch().fit(TRAIN)
    whole = influence.attribute(TRAIN, QUERY).diagnosis
    for lost in (None, "sums-*", "ledger-*"):
        with scratch() as path, patch.object(plan, "ROWS", 6), patch.object(plan, "FEWEST", 6):
            influence.attribute(TRAIN[:1], QUERY, store=path / "r")
            for file in (path / "r").glob(lost or "nothing"):
                file.unlink()
            found = influence.attribute(TRAIN, QUERY, store=path / "r", append=True).diagnosis
            gap = abs(found.rows_seen - whole.rows_seen) + abs(
                found.stationarity.gradient - whole.stationarity.gradient
            )
            assert gap < 1e-5, f"off by {gap:.3g}"


def drafts_of_the_dead_are_removed() -> None:
    with scratch() as path:
        left_by_a_dead_process(path / "s").write_text("half")
        hw.Scores(np.ones((1, 1)), np.arange(1), np.arange(1)).save(path / "s")
        found = len(list(path.iterdir()))
        assert found == 1, f"off by {found - 1} files"


LAWS: tuple[Law, ...] = (
    a_lost_chunk_of_scores_is_no_number,
    a_fit_says_how_many_rows_it_saw,
    a_run_of_a_bank_is_its_own,
    a_damaged_tile_is_computed_again,
    a_store_does_not_give_the_scores_of_another_model,
    a_resumed_run_knows_all_rows,
    drafts_of_the_dead_are_removed,
)

Mutant = Callable[[], AbstractContextManager[Any]]


def _replaced(owner: Any, attribute: str, value: Any) -> Mutant:
    return lambda: patch.object(owner, attribute, value)


def _unchecked(path: Path, head: str, inside: str | None = None) -> dict[str, Any]:
    return seal.unsealed(path / head, inside)[0]


def _listed_only(path: Path, head: str, inside: str | None = None) -> dict[str, Any]:
    """The files are checked, their list is not."""
    with patch.object(seal, "digest", lambda *pieces: _Any()):
        return seal.check_folder(path, head, inside)


class _Any(str):
    """A digest that equals any."""

    def __eq__(self, other: object) -> bool:
        return True

    def __ne__(self, other: object) -> bool:
        return False

    __hash__ = str.__hash__


def _without_place(content: bytes, place: str) -> bytes:
    return seal.seal_bytes(content, "")


@contextmanager
def _anywhere() -> Iterator[None]:
    with (
        patch.object(bank, "seal_bytes", _without_place),
        patch.object(bank, "open_bytes", lambda file, place, remedy: seal.open_bytes(file, "", remedy)),
    ):
        yield


@contextmanager
def _unchecked_tiles() -> Iterator[None]:
    """Of a chunk only the line and the last bytes are compared."""
    with patch.object(tiles, "read_chunk", _read_unchecked), patch.object(matrix, "read_chunk", _read_unchecked):
        yield


def _read_unchecked(file: Path, line: dict[str, Any]) -> np.ndarray:
    padded = np.frombuffer(file.read_bytes()[:-4], line["dtype"]).reshape(line["shape"])
    return padded[:, : line["asked"], : line["stop"] - line["start"]]


@contextmanager
def _any_model() -> Iterator[None]:
    told = attribute.fit_identity
    with (
        patch.object(attribute, "fit_identity", lambda *given: told(*given) | {"curvature": 0}),
        patch.object(tiles.TileStore, "probe", lambda self, *given: None),
    ):
        yield


@contextmanager
def _probe_with_weights() -> Iterator[None]:
    """As it was: one row, with its weight."""
    told = attribute.fit_identity

    def probe(self: Any, batch: Any) -> np.ndarray:
        by_block = self.queries.scores(self.influence.provider.grads(batch))
        return np.stack([scores.numpy() for scores in by_block.values()])

    with (
        patch.object(attribute, "fit_identity", lambda *given: told(*given) | {"curvature": 0}),
        patch.object(queries.PairScorer, "probe", probe),
        patch.object(run_tiles, "PROBE_ROWS", 1),
    ):
        yield


MUTANTS: dict[str, Mutant] = {
    "saved scores are not checked": _replaced(scores, "check_folder", _unchecked),
    "saved fits' own words are not checked": _replaced(folder, "check_folder", _listed_only),
    "a bank's files belong anywhere": _anywhere,
    "tiles are not checked": _unchecked_tiles,
    "a store is known by its words alone": _any_model,
    "a store is known by one row and its weight": _probe_with_weights,
    "tiles from the store are not counted": _replaced(diagnosis.RunSums, "meet", lambda self, where: None),
    "drafts are left": _replaced(draft, "remove_dead", lambda path: None),
}
