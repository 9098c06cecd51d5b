"""Runs in a folder: a stopped run goes on, another run is refused, saved scores come back."""

import json
import signal

import numpy as np
import pytest
import scripts
import torch

import headwater as hw
from headwater.errors import BatchMismatch, InvalidInput, NotWritten
from headwater.store.base import Tile
from headwater.store.plan import Sizes
from headwater.store.tiles import TileStore
from headwater.testing import TileStoreContract
from headwater.torch import TorchBatch, TorchComposableInfluence


class TestTiles(TileStoreContract):
    def open_store(self, path, identity, sizes):
        return TileStore(path, identity, lambda: sizes)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Six rows a tile."""
    monkeypatch.setattr("headwater.run.plan.FEWEST", 6)
    monkeypatch.setattr("headwater.run.plan.ROWS", 6)


def lines(run):
    return [json.loads(line) for file in sorted(run.glob("ledger-*.jsonl")) for line in file.read_text().splitlines()]


@pytest.fixture
def run():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 4))
    x, y = torch.randn(23, 5), torch.randint(4, (23,))
    loader = [(x[i : i + 6], y[i : i + 6]) for i in range(0, 23, 6)]
    influence = TorchComposableInfluence(model, torch.nn.CrossEntropyLoss(), hw.Ekfac()).fit(loader)
    return influence, loader, [(x[:4], y[:4])]


class Stopping:
    """A loader that fails after some batches."""

    def __init__(self, batches, after):
        self.batches, self.after = batches, after

    def __iter__(self):
        yield from self.batches[: self.after]
        raise KeyboardInterrupt


def test_a_stopped_run_goes_on_and_gives_the_same_scores(run, tmp_path):
    influence, loader, query = run
    with pytest.raises(KeyboardInterrupt):
        influence.attribute(Stopping(loader, 2), query, store=tmp_path / "run", by_block=True)
    assert [line["tile"] for line in lines(tmp_path / "run")] == [0, 1]
    whole = influence.attribute(loader, query, by_block=True)
    influence.provider.grads, calls = _counted(influence.provider.grads)
    resumed = influence.attribute(loader, query, store=tmp_path / "run", by_block=True)
    assert len(calls) == 1 + 2 + 1, "the queries, the two tiles that were missing, and the probe"
    np.testing.assert_array_equal(resumed.values, whole.values)
    for name in whole.by_block:
        np.testing.assert_array_equal(resumed.by_block[name], whole.by_block[name])


def _counted(function):
    calls = []

    def counting(*args, **kwargs):
        calls.append(args)
        return function(*args, **kwargs)

    return counting, calls


def test_a_torn_ledger_line_is_computed_again(run, tmp_path):
    influence, loader, query = run
    whole = influence.attribute(loader, query, store=tmp_path / "run")
    (ledger,) = (tmp_path / "run").glob("ledger-*.jsonl")
    ledger.write_text(ledger.read_text()[:-9])
    np.testing.assert_array_equal(influence.attribute(loader, query, store=tmp_path / "run").values, whole.values)
    assert ledger.read_text().count('"checksum"') == 5, "a half, and the same once more"


def test_another_run_in_the_same_folder_is_refused(run, tmp_path):
    influence, loader, query = run
    influence.attribute(loader, query, store=tmp_path / "run")
    with pytest.raises(InvalidInput, match="damping was"):
        influence.with_damping(0.5).attribute(loader, query, store=tmp_path / "run")
    with pytest.raises(InvalidInput, match="query_rows"):
        influence.attribute(loader, [loader[2]][:1], store=tmp_path / "run")
    shuffled = [loader[1], loader[0], *loader[2:]]
    with pytest.raises(InvalidInput, match="must not shuffle"):
        influence.attribute(shuffled, query, store=tmp_path / "run")


def test_a_folder_with_other_things_is_refused_and_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InvalidInput, match="holds no run"):
        TileStore(tmp_path, {}, lambda: Sizes(3, 2))
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_a_tile_that_cannot_be_written_is_not_entered(tmp_path, monkeypatch):
    store, keys = TileStore(tmp_path / "run", {"a": 1}, lambda: Sizes(3, 2)), np.arange(3, dtype=np.uint64)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("os.replace", full)
        with pytest.raises(NotWritten, match=r"0.npz could not be written.*No space"):
            store.write(Tile(0, keys, keys, np.ones((1, 2, 3))))
    assert TileStore(tmp_path / "run", {"a": 1}, lambda: Sizes(3, 2)).read(0, 0) is None


def test_a_killed_run_goes_on(tmp_path):
    script = """
        import os, signal, sys
        import numpy as np
        from headwater.store.base import Tile
        from headwater.store.plan import Sizes
        from headwater.store.tiles import TileStore
        store = TileStore(sys.argv[1], {"run": 1}, lambda: Sizes(3, 2))
        for start in range(0, 9, 3):
            if start == 6:
                os.kill(os.getpid(), signal.SIGKILL)
            keys = np.arange(start, start + 3, dtype=np.uint64)
            store.write(Tile(start, keys, keys, np.full((1, 2, 3), float(start))))
    """
    assert scripts.run(script, tmp_path / "run")[0] == -signal.SIGKILL
    store = TileStore(tmp_path / "run", {"run": 1}, lambda: Sizes(3, 2))
    found = [store.read(number, 0) for number in range(3)]
    assert found[0][0, 0, 0] == 0.0 and found[1][0, 0, 0] == 3.0 and found[2] is None


def test_saved_scores_come_back_whole(run, tmp_path):
    influence, loader, query = run
    for by_block in (False, True):
        scores = influence.attribute(loader, query, unit="removal", by_block=by_block)
        scores.save(tmp_path / f"{by_block}.zarr")
        again = hw.Scores.open(tmp_path / f"{by_block}.zarr")
        np.testing.assert_array_equal(again.values, scores.values)
        np.testing.assert_array_equal(again.train_ids, scores.train_ids)
        assert (again.unit, again.method, again.n_train) == (scores.unit, scores.method, scores.n_train)
        assert dict(again.damping) == dict(scores.damping)
        assert (again.by_block or {}).keys() == (scores.by_block or {}).keys()
        with pytest.raises(FileExistsError, match="exists"):
            scores.save(tmp_path / f"{by_block}.zarr")


def test_a_loader_that_shuffles_is_refused_unless_its_batches_carry_ids(run):
    influence, loader, query = run
    x, y = (torch.cat(column) for column in zip(*loader, strict=True))
    plain = influence.attribute(loader, query)
    rows = torch.utils.data.TensorDataset(x, y, torch.arange(100, 123))
    shuffled = torch.utils.data.DataLoader(
        rows, batch_size=6, shuffle=True, collate_fn=lambda items: tuple(map(torch.stack, zip(*items, strict=True)))
    )

    class Pairs:
        def __iter__(self):
            return ((x, y) for x, y, _ in shuffled)

    class Named:
        def __iter__(self):
            return (TorchBatch(x, y, ids=ids) for x, y, ids in shuffled)

    for refused in (influence.attribute, lambda t, q: influence.top(t, q, 2), lambda t, q: influence.self_influence(t)):
        with pytest.raises(BatchMismatch, match="shuffle=False"):
            refused(Pairs(), query)
    named = influence.fit(Named()).attribute(Named(), query)
    order = np.argsort(named.train_ids)
    np.testing.assert_array_equal(named.train_ids[order], np.arange(100, 123))
    np.testing.assert_allclose(named.values[:, order], plain.values, rtol=1e-4, atol=1e-5)


def test_a_run_fitted_otherwise_is_not_resumed(run, tmp_path):
    """Same settings, same rows, same damping: what was fitted is part of the identity."""
    influence, loader, query = run
    absolute = influence.with_damping(0.5)
    absolute.attribute(loader, query, store=tmp_path / "run")
    other = TorchComposableInfluence(influence.model, torch.nn.CrossEntropyLoss(), hw.Ekfac(), damping=0.5)
    other.fit([(x * 2, y) for x, y in loader])
    with pytest.raises(InvalidInput, match="another run: curvature was"):
        other.attribute(loader, query, store=tmp_path / "run")
    weighted = [TorchBatch(x, y, weights=torch.full((len(y),), 2.0)) for x, y in loader]
    with pytest.raises(InvalidInput, match="other rows"):
        absolute.attribute(weighted, query, store=tmp_path / "run")


def test_scores_that_could_not_be_written_are_not_there(run, tmp_path, monkeypatch):
    influence, loader, query = run
    scores = influence.attribute(loader, query)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    for step in ("headwater.store.scores.seal_folder", "pathlib.Path.rename"):
        with monkeypatch.context() as patched:
            patched.setattr(step, full)
            with pytest.raises(NotWritten, match=r"scores.zarr could not be written.*No space"):
                scores.save(tmp_path / "scores.zarr")
        assert not any(tmp_path.iterdir())
    scores.save(tmp_path / "scores.zarr")
