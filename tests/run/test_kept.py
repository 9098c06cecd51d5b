"""Claims about kept gradients: they stand for the loader in any form; what is damaged, gone or another's is said."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import damage
import models
import numpy as np
import pytest
import torch
from torch import nn

import headwater as hw
from headwater.errors import (
    BatchMismatch,
    DamagedFile,
    InvalidInput,
    InvalidSetting,
    NotSaved,
    StaleFit,
    UnsupportedModel,
)
from headwater.run.packing import Packing, low_rank
from headwater.run.runners import shared
from headwater.store.claims import Claims
from headwater.store.kept import SegmentFolder
from headwater.torch import TorchBatch, TorchComposableInfluence

torch.manual_seed(0)
X, Y = torch.randn(40, 5), torch.arange(40) % 3
CUTS = [slice(start, min(start + 4, 40)) for start in range(0, 40, 4)]
TRAIN = [TorchBatch(X[cut], Y[cut], weights=1.0 + X[cut, 0] ** 2) for cut in CUTS]
PLAIN = [(X[cut], Y[cut]) for cut in CUTS]
QUERIES = [(X[:3] + 0.1, Y[:3]), (X[3:5] + 0.1, Y[3:5])]
TOLERANCE = {"float32": 3e-6, "bfloat16": 1e-2, "int8": 3e-2}
"""Of scores, relative to the largest."""


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(shared, "ROWS", 16)


def influence(method, scale=1.0, **options):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    with torch.no_grad():
        model[0].weight *= scale
    return TorchComposableInfluence(model, nn.CrossEntropyLoss(), method, damping=hw.relative(0.3), **options)


def assert_near(found, truth, dtype="float32"):
    np.testing.assert_allclose(found, truth, atol=TOLERANCE[dtype] * abs(truth).max(), rtol=0)


FAST = [hw.Ekfac(), hw.LoGra(dimension=2)]
SLOW = [
    hw.Trak(dimension=8),
    hw.Direct(),
    hw.Dual(),
    hw.GradCos(),
    hw.LoGra(dimension=2, init="pca"),
    hw.LoRif(dimension=3),
    hw.FactGrass(dimension=2),
    hw.Nystroem(rank=3),
    hw.Cg(),
]
METHODS = [*FAST, *(pytest.param(method, marks=pytest.mark.slow) for method in SLOW)]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_kept_gradients_stand_for_the_loader(method, tmp_path):
    fitted = influence(method).fit(TRAIN)
    truth, alone, ends = fitted.attribute(TRAIN, QUERIES), fitted.self_influence(TRAIN), fitted.top(TRAIN, QUERIES, 4)
    shares = fitted.attribute(TRAIN, QUERIES, by_block=True).by_block
    for number, options in enumerate(
        [{}, {"form": "dense"}, {"dtype": "bfloat16"}, {"dtype": "int8", "form": "dense"}]
    ):
        found = fitted.gradients(TRAIN, store=tmp_path / str(number), **options)
        dtype = options.get("dtype", "float32")
        scores = fitted.attribute(found, QUERIES)
        assert_near(scores.values, truth.values, dtype)
        np.testing.assert_array_equal(scores.train_ids, truth.train_ids)
        assert_near(fitted.self_influence(found), alone, dtype)
        for name, share in fitted.attribute(found, QUERIES, by_block=True).by_block.items():
            assert_near(share, shares[name], dtype)
        assert_near(fitted.top(found, QUERIES, 4).helpful_scores, ends.helpful_scores, dtype)


def test_no_train_row_goes_through_the_model_again(tmp_path, monkeypatch):
    fitted = influence(hw.Ekfac()).fit(PLAIN)
    truth = [fitted.with_damping(hw.relative(d)).attribute(PLAIN, QUERIES).values for d in (0.1, 3.0)]
    found = fitted.gradients(PLAIN, store=tmp_path / "kept")
    asked = []
    grads = type(fitted.source).grads
    monkeypatch.setattr(
        type(fitted.source), "grads", lambda self, batch, **o: asked.append(o) or grads(self, batch, **o)
    )
    for damping, values in zip((0.1, 3.0), truth, strict=True):
        assert_near(fitted.with_damping(hw.relative(damping)).attribute(found, QUERIES).values, values)
    assert len(asked) == 4 and all(options.get("query") for options in asked)


@pytest.mark.slow
def test_a_method_that_is_not_fitted_keeps_gradients_for_all(tmp_path):
    found = influence(hw.Direct()).gradients(PLAIN, store=tmp_path / "kept", form="dense")
    for method in (hw.Kfac(), hw.LoGra(dimension=2)):
        fitted = influence(method).fit(PLAIN)
        assert_near(fitted.attribute(found, QUERIES).values, fitted.attribute(PLAIN, QUERIES).values)


CASES = (models.images, models.language, models.sentences)


@pytest.mark.slow
@pytest.mark.parametrize("make", CASES, ids=lambda make: make.__name__)
def test_every_kind_of_part_is_kept(make, tmp_path):
    case = make()
    train = models.split_rows(case.x, case.y, 4)
    fitted = TorchComposableInfluence(case.model, case.loss, hw.GradDot()).fit(train)
    truth = fitted.attribute(train, train).values
    for form in ("outer", "dense"):
        found = fitted.gradients(train, store=tmp_path / form, form=form)
        assert_near(fitted.attribute(found, train).values, truth)


def test_batches_of_other_lengths_make_one_segment(tmp_path):
    """Positions that some rows have not count nothing."""

    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.mix, self.head = nn.Embedding(7, 4), nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, words):
            return self.head(torch.tanh(self.mix(self.table(words))).sum(1))

    torch.manual_seed(2)
    model = Words()
    train = [(torch.randint(7, (2, length)), torch.tensor([0, 2])) for length in (3, 5, 2, 9)]
    fitted = TorchComposableInfluence(model, nn.CrossEntropyLoss(), hw.GradDot()).fit(train)
    truth = fitted.attribute(train, train[:2]).values
    for form in ("auto", "outer", "dense"):
        found = fitted.gradients(train, store=tmp_path / form, form=form)
        assert len(list(found.path.glob("tiles-0/*"))) == 1
        assert_near(fitted.attribute(found, train[:2]).values, truth)
    cut = fitted.gradients(train, store=tmp_path / "cut", form="low_rank", rank=2)
    assert 0 < cut.relative_error.max() < 1
    gap = np.abs(fitted.attribute(cut, train[:2]).values - truth)
    norms = [np.sqrt(fitted.self_influence(rows)) for rows in (train[:2], train)]
    assert (gap <= cut.relative_error * np.outer(*norms) * 1.001 + 1e-5).all()  # Cauchy and Schwarz


@pytest.mark.parametrize("positions", [None, 3, 9])
def test_rows_are_cut_as_their_singular_values_say(positions):
    rng = np.random.default_rng(0)
    if positions is None:
        from headwater.gradients.algebra import Dense

        part = Dense(rng.standard_normal((4, 6, 7)))
    else:
        from headwater.gradients.outer import Outer

        part = Outer(rng.standard_normal((4, positions, 6)), rng.standard_normal((4, positions, 5)), ones=True)
    found, lost, whole = low_rank(part, 2)
    u, s, v = np.linalg.svd(part.dense(), full_matrices=False)
    np.testing.assert_allclose(found.dense(), (u[:, :, :2] * s[:, None, :2]) @ v[:, :2], atol=1e-12)
    np.testing.assert_allclose(lost, (s[:, 2:] ** 2).sum(1), atol=1e-12)
    np.testing.assert_allclose(whole, (s**2).sum(1))


def test_settings_that_mean_nothing_are_refused(tmp_path):
    plain = influence(hw.Ekfac())
    for options, said in [
        ({"form": "small"}, "'small'"),
        ({"form": "low_rank"}, "needs rank="),
        ({"form": "dense", "rank": 2}, "is for form='low_rank'"),
        ({"form": "low_rank", "rank": 0}, "at least 1"),
        ({"dtype": "float16"}, "'float16'"),
        ({"form": "projected"}, "has to be fitted"),
        ({"worker": (2, 2)}, r"\(2, 2\)"),
    ]:
        with pytest.raises(InvalidSetting, match=said):
            plain.gradients(PLAIN, store=tmp_path / "kept", **options)
    with pytest.raises(InvalidSetting, match="projects no gradients"):
        plain.fit(PLAIN).gradients(PLAIN, store=tmp_path / "kept", form="projected")
    assert Packing("outer").rank is None


def test_another_model_is_refused_and_named(tmp_path):
    found = influence(hw.GradDot()).gradients(PLAIN, store=tmp_path / "kept")
    with pytest.raises(InvalidInput, match="another model or method: fingerprint was"):
        influence(hw.GradDot(), scale=2.0).fit(PLAIN).attribute(found, QUERIES)


@pytest.mark.slow
def test_another_model_or_method_is_refused_and_named(tmp_path):
    found = influence(hw.Ekfac()).gradients(PLAIN, store=tmp_path / "kept")
    with pytest.raises(InvalidInput, match="another model or method: fingerprint was"):
        influence(hw.Ekfac(), scale=2.0).fit(PLAIN).attribute(found, QUERIES)
    with pytest.raises(InvalidInput, match=r"views was.*now"):
        influence(hw.GradCos()).fit(PLAIN).attribute(found, QUERIES)
    with pytest.raises(InvalidInput, match="form was 'auto', now 'dense'"):
        influence(hw.Ekfac()).gradients(PLAIN, store=tmp_path / "kept", form="dense")
    with pytest.raises(InvalidInput, match="blocks was"):
        influence(hw.Ekfac(), blocks={"0": ["0.bias"]}).fit(PLAIN).attribute(found, QUERIES)
    projected = influence(hw.LoGra(dimension=2)).fit(PLAIN).gradients(PLAIN, store=tmp_path / "projected")
    with pytest.raises(InvalidInput, match=r"projected.*projects no gradients"):
        influence(hw.Ekfac()).fit(PLAIN).attribute(projected, QUERIES)
    for other in (hw.LoGra(dimension=2, seed=1), hw.FactGrass(dimension=2)):
        with pytest.raises(InvalidInput, match="projection was"):
            influence(other).fit(PLAIN).attribute(projected, QUERIES)
    stale = influence(hw.Ekfac()).fit(PLAIN)
    with torch.no_grad():
        stale.model[0].weight += 1
    with pytest.raises(StaleFit):
        stale.attribute(found, QUERIES)
    with pytest.raises(InvalidInput, match="needs the rows themselves"):
        influence(hw.Ekfac()).fit(found)
    with pytest.raises(InvalidInput, match="needs the rows themselves"):
        influence(hw.Ekfac()).fit(PLAIN).removal(found, QUERIES)


def test_opening_needs_no_model_and_folders_may_move(tmp_path):
    fitted = influence(hw.Kfac()).fit(PLAIN)
    fitted.gradients(PLAIN, store=tmp_path / "kept", dtype="bfloat16")
    shutil.move(tmp_path / "kept", tmp_path / "elsewhere")
    found = hw.KeptGradients.open(tmp_path / "elsewhere")
    assert len(found) == found.rows == 40 and found.nbytes > 0 and "bfloat16" in repr(found)
    np.testing.assert_array_equal(found.ids, np.arange(40))
    assert_near(fitted.attribute(found, QUERIES).values, fitted.attribute(PLAIN, QUERIES).values, "bfloat16")
    with pytest.raises(NotSaved, match="no gradients of train rows"):
        hw.KeptGradients.open(tmp_path / "kept")
    influence(hw.Kfac()).fit(PLAIN, store=tmp_path / "fit")
    with pytest.raises(NotSaved, match="it holds fit"):
        hw.KeptGradients.open(tmp_path / "fit")


def test_a_run_with_a_store_of_scores_goes_on_over_kept_gradients(tmp_path):
    fitted = influence(hw.Ekfac()).fit(PLAIN)
    found = fitted.gradients(PLAIN, store=tmp_path / "kept")
    first = fitted.attribute(found, QUERIES, store=tmp_path / "run")
    again = fitted.attribute(found, QUERIES, store=tmp_path / "run")
    np.testing.assert_array_equal(first.values, again.values)
    assert first.diagnosis.stationarity is None  # no sums of rounded gradients


# Rows that come and go ------------------------------------------------------------------------------------------------


def named(start, stop, shift=0.0):
    return [
        TorchBatch(X[k : k + 2] + shift, Y[k : k + 2], ids=torch.arange(100 + k, 102 + k))
        for k in range(start, stop, 2)
    ]


@pytest.mark.parametrize("ids", [False, True], ids=["positions", "ids"])
def test_only_new_rows_are_appended(ids, tmp_path, monkeypatch):
    old, grown = (named(0, 20), named(0, 40)) if ids else (PLAIN[:5], PLAIN)
    fitted = influence(hw.Ekfac()).fit(grown)
    found = fitted.gradients(old, store=tmp_path / "kept")
    rows, grads = [], type(fitted.source).grads
    monkeypatch.setattr(
        type(fitted.source), "grads", lambda self, batch, **o: rows.append(len(batch)) or grads(self, batch, **o)
    )
    assert found.append(fitted, grown) == 20
    assert sum(rows) == 21  # and a look at the first row's size
    truth = fitted.attribute(grown, QUERIES)
    scores = fitted.attribute(found, QUERIES)
    assert_near(scores.values, truth.values)
    np.testing.assert_array_equal(scores.train_ids, truth.train_ids)
    assert found.append(fitted, grown) == 0 and found.rows == 40
    fitted.gradients(grown, store=tmp_path / "kept")  # all there: nothing to do
    with pytest.raises(InvalidInput, match="4 rows of the loader are not in it"):
        more = TorchBatch(X[:4] + 9, Y[:4], ids=torch.arange(4) if ids else None)
        fitted.gradients([*grown, more], store=tmp_path / "kept")


def test_a_changed_row_with_an_id_is_not_taken_for_the_old_one(tmp_path):
    fitted = influence(hw.Ekfac()).fit(named(0, 40))
    found = fitted.gradients(named(0, 40), store=tmp_path / "kept")
    with pytest.raises(BatchMismatch, match="row 100 is kept with other content"):
        found.append(fitted, named(0, 4, shift=0.5))
    with pytest.raises(BatchMismatch, match="these have none"):
        found.append(fitted, PLAIN)
    found.delete([100, 101])
    assert found.append(fitted, named(0, 2, shift=0.5)) == 2
    assert found.ids[-2:].tolist() == [100, 101] and found.rows == 40


def content(folder):
    return b"".join(file.read_bytes() for file in damage.files_of(folder))


@pytest.mark.parametrize("form", ["outer", "dense"])
def test_deleted_rows_are_seen_no_more_and_compacted_ones_are_gone(form, tmp_path):
    fitted = influence(hw.Ekfac()).fit(TRAIN)
    found = fitted.gradients(TRAIN, store=tmp_path / "kept", form=form)
    other, size = hw.KeptGradients.open(tmp_path / "kept"), found.nbytes
    truth = fitted.attribute(TRAIN, QUERIES)
    value = found._folder.segment(found._folder.complete().entries[1]).numbers("flat" if form == "dense" else "0.0.b")[
        3
    ]
    assert found.delete([3, 19, *range(24, 32)]) == 10
    there = np.setdiff1d(np.arange(40), [3, 19, *range(24, 32)])
    assert value.tobytes() in content(found.path)
    for _ in range(2):
        scores = fitted.attribute(other, QUERIES)  # another object, the same folder
        assert_near(scores.values, truth.values[:, there])
        np.testing.assert_array_equal(scores.train_ids, there)
        assert_near(fitted.self_influence(other), fitted.self_influence(TRAIN)[there])
        assert other.rows == 30 and other.ids.tolist() == there.tolist()
        assert found.compact() in (10, 0)
    assert value.tobytes() not in content(found.path) and found.nbytes < size
    with pytest.raises(InvalidInput, match=r"no rows \[3\] to delete"):
        found.delete([3, 4])
    found.delete(there)
    with pytest.raises(InvalidInput, match="all were deleted"):
        fitted.attribute(found, QUERIES)
    assert found.compact() == 30 and found.rows == 0


def test_ids_may_be_words(tmp_path):
    train = [TorchBatch(X[c], Y[c], ids=np.array([f"naïve {k}" * (1 + k % 3) for k in range(40)])[c]) for c in CUTS]
    fitted = influence(hw.Kfac()).fit(train)
    found = fitted.gradients(train, store=tmp_path / "kept")
    np.testing.assert_array_equal(
        fitted.attribute(found, QUERIES).train_ids, fitted.attribute(train, QUERIES).train_ids
    )
    assert found.delete(["naïve 3", "naïve 1naïve 1"]) == 2 and found.rows == 38
    with pytest.raises(InvalidInput, match="no rows"):
        found.delete([3])


# Faults ---------------------------------------------------------------------------------------------------------------


def test_a_damaged_file_is_named_and_the_rest_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(shared, "ROWS", 8)
    fitted = influence(hw.Ekfac()).fit(PLAIN)
    truth = fitted.attribute(PLAIN, QUERIES).values
    fitted.gradients(PLAIN, store=tmp_path / "whole")
    kinds = damage.damages([0.1, 0.999])
    for number, (name, change) in enumerate(kinds.items()):
        for place in ("tiles-0/000002-*", "manifest.json", "identity.json"):
            folder = tmp_path / f"{number}"
            shutil.copytree(tmp_path / "whole", folder)
            file = next(folder.glob(place))
            now = change(file.read_bytes())
            file.unlink() if now is None else file.write_bytes(now)
            if place.startswith("tiles"):
                found = hw.KeptGradients.open(folder)
                with pytest.raises(DamagedFile, match="000002"):
                    fitted.attribute(found, QUERIES)
                assert found.check() == [file], name
                found.check(drop=True)
                assert_near(fitted.attribute(found, QUERIES).values, np.delete(truth, range(16, 24), axis=1))
                assert found.append(fitted, PLAIN) == 8 and found.check() == []
            else:
                with pytest.raises((DamagedFile, NotSaved), match=f"{place}|no gradients|not complete"):
                    hw.KeptGradients.open(folder)
            shutil.rmtree(folder)


def test_the_same_call_computes_what_is_damaged(tmp_path, monkeypatch):
    monkeypatch.setattr(shared, "ROWS", 8)
    fitted = influence(hw.Ekfac()).fit(PLAIN)
    truth = fitted.attribute(PLAIN, QUERIES).values
    fitted.gradients(PLAIN, store=tmp_path / "kept")
    file = next((tmp_path / "kept").glob("tiles-0/000003-*"))
    file.write_bytes(file.read_bytes()[:-5])
    others = {other: other.stat().st_mtime_ns for other in file.parent.iterdir() if other != file}
    found = fitted.gradients(PLAIN, store=tmp_path / "kept")
    assert_near(fitted.attribute(found, QUERIES).values, truth)
    assert {other: other.stat().st_mtime_ns for other in others} == others


def test_of_two_different_appends_at_once_the_later_says_so(tmp_path, monkeypatch):
    fitted = influence(hw.GradDot()).fit(PLAIN)
    found = fitted.gradients(PLAIN[:4], store=tmp_path / "kept")
    publish = SegmentFolder.publish

    def slow(self, series, tiles):
        monkeypatch.setattr(SegmentFolder, "publish", publish)
        hw.KeptGradients.open(tmp_path / "kept").append(fitted, PLAIN[7:])  # meanwhile
        return publish(self, series, tiles)

    monkeypatch.setattr(SegmentFolder, "publish", slow)
    with pytest.raises(InvalidInput, match="meanwhile"):
        found.append(fitted, PLAIN[4:7])
    assert found.rows == 28 and found.check() == []
    assert found.append(fitted, PLAIN[4:7]) == 12 and found.check() == []
    truth = fitted.attribute([*PLAIN[:4], *PLAIN[7:], *PLAIN[4:7]], QUERIES).values
    assert_near(fitted.attribute(found, QUERIES).values, truth)
    with pytest.raises(InvalidSetting, match="inputs, which are not kept"):
        fitted.attribute(found, QUERIES, mode="perturbation")


def test_workers_share_the_tiles(tmp_path, monkeypatch):
    monkeypatch.setattr(shared, "ROWS", 8)
    fitted, alone = influence(hw.Ekfac()).fit(PLAIN), tmp_path / "alone"
    fitted.gradients(PLAIN, store=alone)

    def stopped(self, name):
        raise KeyboardInterrupt

    # The first worker stops after its share, as if it had been killed; the second does its own and the rest.
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Claims, "is_free", stopped)
        fitted.gradients(PLAIN, store=tmp_path / "shared", worker=(0, 2))
    assert len(list((tmp_path / "shared" / "tiles-0").iterdir())) == 3
    with pytest.raises(NotSaved, match="not complete: it has 3 tiles"):
        hw.KeptGradients.open(tmp_path / "shared")
    fitted.gradients(PLAIN, store=tmp_path / "shared", worker=(1, 2))
    for file in sorted(alone.glob("*/*.safetensors")):
        assert (tmp_path / "shared" / file.relative_to(alone)).read_bytes() == file.read_bytes()


PROGRAM = """
    import sys, torch, headwater as hw
    from torch import nn
    from headwater.run.runners import shared
    from headwater.torch import TorchComposableInfluence
    shared.ROWS = 8
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x, y = torch.randn(40, 5), torch.arange(40) % 3
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    influence = TorchComposableInfluence(model, nn.CrossEntropyLoss(), hw.GradDot())
    class Slow:
        def __iter__(self):
            import time
            for start in range(0, 40, 4):
                time.sleep(0.02)
                yield x[start:start + 4], y[start:start + 4]
    what, path = sys.argv[1:]
    print("ready", flush=True)
    if what == "keep":
        influence.gradients(Slow(), store=path)
    if what == "append":
        hw.KeptGradients.open(path).append(influence, Slow())
    if what == "compact":
        for row in range(0, 40):
            kept = hw.KeptGradients.open(path)
            if row in kept.ids:
                kept.delete([row])
            kept.compact()
    print("done", flush=True)
"""


def killed(what, path, after):
    """Run one of the program's jobs and kill it after so many seconds; whether it was done before."""
    environment = {**os.environ, "PYTHONPATH": str(Path(hw.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(PROGRAM), what, str(path)], stdout=subprocess.PIPE, env=environment
    )
    assert child.stdout.readline() == b"ready\n"  # it has begun, and its program is a right one
    time.sleep(after)
    child.send_signal(signal.SIGKILL)
    return b"done" in child.communicate()[0]


@pytest.mark.slow
@pytest.mark.parametrize("what", ["keep", "append", "compact"])
def test_killed_at_any_moment_nothing_is_lost(what, tmp_path):
    """Twenty times each: a store is the old or the new one, and the same call ends as an undisturbed one does."""
    fitted = influence(hw.GradDot()).fit(PLAIN)
    truth = fitted.attribute(PLAIN, QUERIES).values
    rng = np.random.default_rng(0)
    for trial in range(20):
        path = tmp_path / str(trial)
        if what != "keep":
            fitted.gradients(PLAIN[:5] if what == "append" else PLAIN, store=path)
        killed(what, path, after=rng.random() * (0.35 if what != "compact" else 0.6))
        if what == "keep":
            fitted.gradients(PLAIN, store=path)
        found = hw.KeptGradients.open(path)
        if what == "append":
            assert found.rows in (20, 40)
            found.append(fitted, PLAIN)
        assert found.check() == []
        np.testing.assert_allclose(fitted.attribute(found, QUERIES).values, truth[:, found.ids], atol=1e-6)
        if what != "compact":
            assert found.rows == 40
        found.compact()
        named = {entry.file for entry in found._folder.complete().entries}
        assert {str(file.relative_to(path)) for file in path.glob("tiles-*/*")} == named


# Other frameworks -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_jax_keeps_gradients(tmp_path):
    from headwater.jax import JaxComposableInfluence
    from headwater.jax.losses import cross_entropy

    weights = np.random.default_rng(1).standard_normal((5, 3)).astype(np.float32)
    train = [(X[:20].numpy(), Y[:20].numpy()), (X[20:].numpy(), Y[20:].numpy())]
    fitted = JaxComposableInfluence(lambda w, x: x @ w, weights, cross_entropy, hw.GradDot()).fit(train)
    truth = np.asarray(fitted.attribute(train, train[:2]))
    for number, options in enumerate([{}, {"form": "dense", "dtype": "int8"}]):
        found = fitted.gradients(train, store=tmp_path / str(number), **options)
        assert_near(fitted.attribute(found, train[:2]).values, truth, options.get("dtype", "float32"))


def test_sklearn_keeps_gradients(tmp_path):
    from sklearn.linear_model import LogisticRegression

    from headwater.sklearn import SklearnComposableInfluence

    train = [(b.x.numpy(), b.y.numpy()) for b in TRAIN]
    estimator = LogisticRegression(class_weight={0: 2.0, 1: 1.0, 2: 0.5}).fit(X.numpy(), Y.numpy())
    fitted = SklearnComposableInfluence(estimator, hw.Direct()).fit(train)
    truth = np.asarray(fitted.attribute(train, train[:2]))
    for number, options in enumerate([{}, {"form": "dense", "dtype": "bfloat16"}]):
        found = fitted.gradients(train, store=tmp_path / str(number), **options)
        assert_near(fitted.attribute(found, train[:2]).values, truth, options.get("dtype", "float32"))


@pytest.mark.slow
def test_several_models_and_rows_without_a_score_on_themselves(tmp_path):
    first = influence(hw.GradDot()).model
    checkpoints = [first.state_dict(), {name: value * 1.1 for name, value in first.state_dict().items()}]
    for method in (hw.Trak(dimension=8), hw.GradCos()):
        fitted = TorchComposableInfluence(first, nn.CrossEntropyLoss(), method, checkpoints=checkpoints).fit(TRAIN)
        found = fitted.gradients(TRAIN, store=tmp_path / type(method).__name__)
        assert_near(fitted.attribute(found, QUERIES).values, fitted.attribute(TRAIN, QUERIES).values)
        assert_near(fitted.self_influence(found), fitted.self_influence(TRAIN))
    torch.manual_seed(1)
    smoothed = TorchComposableInfluence(first, nn.CrossEntropyLoss(label_smoothing=0.2), hw.Trak(dimension=8)).fit(
        PLAIN
    )
    found = smoothed.gradients(PLAIN, store=tmp_path / "smoothed")
    assert_near(smoothed.attribute(found, QUERIES).values, smoothed.attribute(PLAIN, QUERIES).values)
    with pytest.raises(UnsupportedModel, match="no multiple"):
        smoothed.self_influence(found)
