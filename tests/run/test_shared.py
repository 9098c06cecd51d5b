"""Claims about fits in a folder: any number of workers, killed or not, give the same bytes."""

from __future__ import annotations

import json
import os
import signal
import time

import numpy as np
import pytest
import scripts
import torch
from torch import nn

import headwater as hw
from headwater.errors import BatchMismatch, InvalidInput, InvalidSetting
from headwater.rows import serial
from headwater.run import plan
from headwater.run.runners import shared, turns
from headwater.store.claims import Claims
from headwater.store.draft import HOST
from headwater.store.parts import PartStore
from headwater.store.tiles import TileStore
from headwater.torch import TorchBatch, TorchComposableInfluence

torch.manual_seed(0)
X, Y = torch.randn(40, 5), torch.arange(40) % 3
CUTS = [slice(start, min(start + 4, 40)) for start in range(0, 40, 4)]
TRAIN = [TorchBatch(X[cut], Y[cut], weights=1.0 + X[cut, 0] ** 2) for cut in CUTS]
QUERIES = [(X[:3] + 0.1, Y[:3])]
SHARED = [
    hw.GradDot(),
    hw.Direct(),
    hw.Direct(curvature="empirical_fisher"),
    hw.Kfac(),
    hw.Ekfac(),
    hw.Ekfac(basis_share=0.2, seed=1),  # some tiles have no row of the basis
    hw.LoGra(dimension=2),
    hw.LoGra(dimension=2, init="pca"),
    hw.LoRif(dimension=2),
    hw.FactGrass(dimension=2),
    hw.Trak(dimension=8),
    hw.TracIn(0.1),
    hw.Representer(l2=0.1, tolerance=1e9),  # no minimum, and not linear: what is shared is a sum all the same
]
ALONE = [hw.Cg(), hw.Dual(), hw.Nystroem(rank=3)]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(shared, "ROWS", 8)
    monkeypatch.setattr(plan, "ROWS", 4)
    monkeypatch.setattr(plan, "FEWEST", 4)


def influence(method, scale=1.0, **options):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    with torch.no_grad():
        model[0].weight *= scale
    return TorchComposableInfluence(model, nn.CrossEntropyLoss(), method, damping=hw.relative(0.3), **options)


def scores(fitted):
    return fitted.attribute(TRAIN, QUERIES).values


@pytest.mark.parametrize("method", SHARED + ALONE, ids=lambda method: method.describe())
def test_any_number_of_workers_gives_the_same_bytes(method, tmp_path):
    """Of the three, one does the work of all: the others come late."""
    alone = scores(influence(method).fit(TRAIN, store=tmp_path / "alone"))
    for worker in ((0, 3), (1, 3), (2, 3)):
        found = scores(influence(method).fit(TRAIN, store=tmp_path / "three", worker=worker))
        np.testing.assert_array_equal(found, alone)
    np.testing.assert_allclose(alone, scores(influence(method).fit(TRAIN)), rtol=2e-3, atol=1e-4 * abs(alone).max())


def test_a_worker_is_what_the_environment_or_a_text_says(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InvalidSetting, match=r"\(1, 2\), and workers meet"):
        influence(hw.Kfac()).fit(TRAIN, worker="env")
    fitted = influence(hw.Kfac()).fit(TRAIN, store=tmp_path / "fit", worker="env")
    np.testing.assert_array_equal(
        scores(fitted), scores(influence(hw.Kfac()).fit(TRAIN, store=tmp_path / "fit", worker="0/2"))
    )
    found = fitted.attribute(TRAIN, QUERIES, store=tmp_path / "run", worker="env")
    np.testing.assert_array_equal(found.values, scores(fitted))


def of_jax():
    from headwater.jax import JaxComposableInfluence
    from headwater.jax.losses import cross_entropy

    weights = np.random.default_rng(1).standard_normal((5, 3))
    found = JaxComposableInfluence(lambda w, x: x @ w, weights, cross_entropy, hw.Ekfac(), damping=0.3)
    return found, [(b.x.numpy(), b.y.numpy()) for b in TRAIN], [(QUERIES[0][0].numpy(), QUERIES[0][1].numpy())]


def of_sklearn():
    from sklearn.linear_model import LogisticRegression

    from headwater.sklearn import SklearnComposableInfluence

    estimator = LogisticRegression().fit(X.numpy(), Y.numpy())
    train = [(b.x.numpy(), b.y.numpy()) for b in TRAIN]
    return SklearnComposableInfluence(estimator, hw.Kfac()), train, train[:1]


def of_several_models():
    first = influence(hw.GradDot()).model
    checkpoints = [first.state_dict(), {name: value * 1.1 for name, value in first.state_dict().items()}]
    found = TorchComposableInfluence(first, nn.CrossEntropyLoss(), hw.Ekfac(), damping=0.3, checkpoints=checkpoints)
    return found, TRAIN, QUERIES


@pytest.mark.parametrize("make", [of_jax, of_sklearn, of_several_models], ids=lambda make: make.__name__)
def test_other_frameworks_and_several_models_share_a_fit(make, tmp_path):
    def found(**options):
        fitted, train, queries = make()
        return np.asarray(fitted.fit(train, **options).attribute(train, queries))

    alone, whole = found(store=tmp_path / "fit", worker=(0, 2)), found()
    np.testing.assert_array_equal(found(store=tmp_path / "fit", worker=(1, 2)), alone)
    np.testing.assert_allclose(alone, whole, rtol=2e-3, atol=1e-4 * abs(whole).max())


def test_who_reads_past_a_claim_gives_no_sign_of_life_for_its_owner(tmp_path, monkeypatch):
    """Else the claim of a dead worker on another machine would be kept alive by those who wait for it."""
    touched, asked, claim = [], [], Claims.claim
    monkeypatch.setattr(Claims, "touch", lambda self, name: touched.append(name[-1]))
    monkeypatch.setattr(Claims, "claim", lambda self, name: (name[-1] != "2" or len(asked) > 3) and claim(self, name))
    monkeypatch.setattr(Claims, "is_free", lambda self, name: asked.append(name) or len(asked) > 3)
    monkeypatch.setattr(turns, "POLL", 0.0)
    influence(hw.Kfac()).fit(TRAIN, store=tmp_path / "fit")
    assert touched == [*"00113344", *"22"]  # two batches a tile, and those of tile 2 once it was free


@pytest.mark.parametrize("method", SHARED, ids=lambda method: method.describe())
def test_a_fit_that_is_there_computes_nothing(method, tmp_path, monkeypatch):
    def curvature(fitted):
        return [operator.trace() for operator in fitted.curvature.values()]

    first = curvature(influence(method).fit(TRAIN, store=tmp_path / "fit"))
    monkeypatch.setattr(shared, "fold", None)
    assert curvature(influence(method).fit(TRAIN, store=tmp_path / "fit")) == first


def test_what_is_damaged_or_of_other_rows_is_computed_again(tmp_path):
    first = scores(influence(hw.Ekfac()).fit(TRAIN, store=tmp_path / "fit"))
    parts = sorted((tmp_path / "fit").rglob("*.npz"))
    assert len(parts) == 10  # five tiles in each of two passes
    for part in (parts[0], parts[7]):
        content = bytearray(part.read_bytes())
        content[len(content) // 2] ^= 1
        part.write_bytes(content)
    np.testing.assert_array_equal(scores(influence(hw.Ekfac()).fit(TRAIN, store=tmp_path / "fit")), first)
    others = [TorchBatch(batch.x + (k == 3), batch.y, weights=batch.weights) for k, batch in enumerate(TRAIN)]
    found = influence(hw.Ekfac()).fit(others, store=tmp_path / "fit").curvature
    expected = influence(hw.Ekfac()).fit(others, store=tmp_path / "new").curvature
    assert [op.trace() for op in found.values()] == [op.trace() for op in expected.values()]


def test_another_fit_is_refused(tmp_path):
    influence(hw.Kfac()).fit(TRAIN, store=tmp_path / "fit")
    with pytest.raises(InvalidInput, match="another fit: fingerprint was"):
        influence(hw.Kfac(), scale=2.0).fit(TRAIN, store=tmp_path / "fit")
    with pytest.raises(InvalidInput, match="another fit: method was"):
        influence(hw.Ekfac()).fit(TRAIN, store=tmp_path / "fit")
    with pytest.raises(InvalidInput, match="another fit: blocks was"):  # of one shape, and other layers
        influence(hw.Kfac(), blocks={"0": ["0.bias"]}).fit(TRAIN, store=tmp_path / "of one layer")
        influence(hw.Kfac(), blocks={"0": ["2.bias"]}).fit(TRAIN, store=tmp_path / "of one layer")
    with pytest.raises(InvalidInput, match="a fit, and no run"):
        influence(hw.Kfac()).fit(TRAIN).attribute(TRAIN, QUERIES, store=tmp_path / "fit")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(InvalidInput, match="not empty"):
        influence(hw.Kfac()).fit(TRAIN, store=tmp_path / "mine")
    for options in ({"worker": (0, 2)}, {"store": tmp_path / "new", "runner": serial}):
        with pytest.raises(InvalidSetting, match="store="):
            influence(hw.Kfac()).fit(TRAIN, **options)
    with pytest.raises(InvalidSetting, match=r"\(3, 3\)"):
        influence(hw.Kfac()).fit(TRAIN, store=tmp_path / "fit", worker=(3, 3))


def test_workers_that_read_other_rows_do_not_go_on_for_ever(tmp_path, monkeypatch):
    fitted = influence(hw.Kfac())
    monkeypatch.setattr(PartStore, "read", lambda self, name, rows: None)
    with pytest.raises(BatchMismatch, match="other rows"):
        fitted.fit(TRAIN, store=tmp_path / "fit")


class Odd(nn.Linear):
    """A layer whose rule does not hold: it doubles what it computes, and so its gradients."""

    def forward(self, x):
        return super().forward(x) * 2 + self.bias


def odd(method, **options):
    torch.manual_seed(1)
    model = nn.Sequential(Odd(5, 4), nn.Tanh(), nn.Linear(4, 3))
    return TorchComposableInfluence(model, nn.CrossEntropyLoss(), method, damping=hw.relative(0.3), **options)


@pytest.mark.parametrize("method", [hw.Kfac(), hw.Ekfac(), hw.Direct()], ids=lambda method: method.describe())
def test_workers_that_compute_nothing_know_which_rules_do_not_hold(method, tmp_path):
    first = scores(odd(method).fit(TRAIN, store=tmp_path / "fit"))
    for worker in ((0, 1), (1, 2)):
        np.testing.assert_array_equal(scores(odd(method).fit(TRAIN, store=tmp_path / "fit", worker=worker)), first)
    np.testing.assert_allclose(first, scores(odd(method).fit(TRAIN)), rtol=2e-3, atol=1e-4 * abs(first).max())


class Shuffling:
    """Batches with ids, in another order each time."""

    reads = 0  # of all of them

    def __iter__(self):
        Shuffling.reads += 1
        named = [TorchBatch(b.x, b.y, weights=b.weights, ids=torch.arange(4) + 4 * k) for k, b in enumerate(TRAIN)]
        return iter(named[self.reads % 3 :] + named[: self.reads % 3])


def test_rows_in_another_order_are_refused_where_that_matters(tmp_path):
    influence(hw.Kfac()).fit(Shuffling(), store=tmp_path / "fit")  # one pass, one order
    with pytest.raises(BatchMismatch, match="another order each time"):
        influence(hw.Kfac()).fit(Shuffling(), store=tmp_path / "fit", worker=(1, 2))


def test_a_claim_of_the_living_is_theirs_and_one_of_the_dead_is_not(tmp_path, monkeypatch):
    store = Claims(tmp_path / "fit")
    assert store.claim("0-a/1") and not store.claim("0-a/1")
    monkeypatch.setattr("headwater.store.claims.TOKEN", "0" * 8)  # another process
    store.release("0-a/1")
    assert not store.claim("0-a/1")
    claim = tmp_path / "fit" / "0-a" / "1.claim"
    for content in (
        {"host": "elsewhere", "process": 1, "token": "x"},
        {"host": HOST, "process": 2**22 + 1, "token": "x"},
    ):
        claim.write_text(json.dumps(content))
        assert store.is_free("0-a/1") == (content["host"] != "elsewhere")
    claim.write_text(json.dumps({"host": "elsewhere", "process": 1, "token": "x"}))
    assert not store.is_free("0-a/1")
    monkeypatch.setattr("headwater.store.claims.PATIENCE", -1.0)
    assert store.is_free("0-a/1")


def test_an_error_leaves_no_claim(tmp_path):
    bad = [*TRAIN[:3], TorchBatch(X[:4] * float("nan"), Y[:4])]
    with pytest.raises(hw.errors.NonFiniteValue, match="batch 3, row 0"):
        influence(hw.Kfac()).fit(bad, store=tmp_path / "fit")
    assert not list((tmp_path / "fit").rglob("*.claim"))


@pytest.mark.parametrize("count", range(1, 12))
def test_parts_are_merged_in_order_whatever_their_number(count):
    assert shared.merge_in_order(lambda one, other: one + other, ([k] for k in range(count))) == list(range(count))


WORKER = """
    import os, signal, sys, time
    sys.path.insert(0, sys.argv[1])
    import test_shared as here
    from headwater import rows
    from headwater.run.runners import shared
    import headwater as hw
    rows.FEW, shared.ROWS = 1, 8
    folder, number, count, dies = sys.argv[2], *map(int, sys.argv[3:])
    written = here.PartStore.write
    def write(self, name, rows, values):
        time.sleep(0.05)
        write.count += 1
        if write.count == dies:
            os.kill(os.getpid(), signal.SIGKILL)
        written(self, name, rows, values)
    write.count = 0
    here.PartStore.write = write
    found = here.scores(here.influence(hw.Ekfac()).fit(here.TRAIN, store=folder, worker=(number, count)))
    sys.stdout.write(found.tobytes().hex())
"""


def test_workers_at_once_one_of_them_killed_give_the_same_bytes(tmp_path, monkeypatch):
    """The other takes over what the dead one had claimed; called again, that one only reads."""
    expected = scores(influence(hw.Ekfac()).fit(TRAIN, store=tmp_path / "alone")).tobytes().hex()
    written = PartStore.write

    def write(self, name, rows, values):
        time.sleep(0.05)
        written(self, name, rows, values)

    monkeypatch.setattr(PartStore, "write", write)  # as slow as the other
    first = scripts.Script(WORKER, os.path.dirname(__file__), tmp_path / "fit", 0, 2, 2)
    while first.poll() is None and not list(tmp_path.glob("fit/**/*.claim")):
        time.sleep(0.01)
    # This process is the second worker: another one would import everything anew.
    found = scores(influence(hw.Ekfac()).fit(TRAIN, store=tmp_path / "fit", worker=(1, 2)))
    status, said = first.end()
    assert status == -signal.SIGKILL, said
    assert found.tobytes().hex() == expected
    again = scores(influence(hw.Ekfac()).fit(TRAIN, store=tmp_path / "fit", worker=(0, 2)))
    assert again.tobytes().hex() == expected
    assert not list((tmp_path / "fit").rglob("*.claim"))


def test_ends_of_the_ranking_and_all_scores_are_one_run(tmp_path, monkeypatch):
    fitted, written, write = influence(hw.Ekfac()).fit(TRAIN), [], TileStore.write

    def count(self, tile):
        written.append(tile.start)
        write(self, tile)

    monkeypatch.setattr(TileStore, "write", count)
    top = fitted.top(TRAIN, QUERIES, 3, store=tmp_path / "run")
    expected = fitted.top(TRAIN, QUERIES, 3)
    np.testing.assert_array_equal(top.helpful_scores, expected.helpful_scores)
    np.testing.assert_array_equal(top.harmful_ids, expected.harmful_ids)
    found = fitted.attribute(TRAIN, QUERIES, store=tmp_path / "run")
    np.testing.assert_array_equal(found.values, scores(fitted))
    assert written == list(range(0, 40, 4))
    with pytest.raises(InvalidSetting, match="remval"):
        fitted.attribute(TRAIN, QUERIES, unit="remval", store=tmp_path / "new")
    assert not (tmp_path / "new").exists()


SCORER = """
    import os, signal, sys
    sys.path.insert(0, sys.argv[1])
    import test_shared as here
    from headwater import rows
    from headwater.run import plan
    from headwater.store.tiles import TileStore
    import headwater as hw
    folder, number, count, dies = sys.argv[2], *map(int, sys.argv[3:])
    rows.FEW, plan.FEWEST, plan.ROWS = 1, 4, 4
    written = TileStore.write
    def write(self, tile):
        write.count += 1
        if write.count == dies:
            os.kill(os.getpid(), signal.SIGKILL)
        written(self, tile)
    write.count = 0
    TileStore.write = write
    fitted = here.influence(hw.Ekfac()).fit(here.TRAIN)
    found = fitted.attribute(here.TRAIN, here.QUERIES, store=folder, worker=(number, count))
    sys.stdout.write(f"{write.count} " + found.values.tobytes().hex())
"""


def test_scores_are_shared_and_a_killed_worker_is_made_up_for(tmp_path):
    fitted = influence(hw.Ekfac()).fit(TRAIN)
    expected = fitted.attribute(TRAIN, QUERIES).values.tobytes().hex()
    status, said = scripts.run(SCORER, os.path.dirname(__file__), tmp_path / "run", 0, 2, 3)
    assert status == -signal.SIGKILL, said
    # Called again, and another worker beside it, which is this process.
    second = fitted.attribute(TRAIN, QUERIES, store=tmp_path / "run", worker=(1, 2))
    first = fitted.attribute(TRAIN, QUERIES, store=tmp_path / "run", worker=(0, 2))
    assert [found.values.tobytes().hex() for found in (first, second)] == [expected] * 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TileStore, "write", None)  # nothing is left to compute
        again = fitted.attribute(TRAIN, QUERIES, store=tmp_path / "run", worker=(0, 2))
    assert again.values.tobytes().hex() == expected
    with pytest.raises(InvalidSetting, match="give store="):
        fitted.attribute(TRAIN, QUERIES, worker=(0, 2))
