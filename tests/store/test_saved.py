"""Saved fits: what is loaded gives the same numbers, and what does not belong together is refused."""

import copy
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
from torch import nn

import headwater as hw
from headwater.errors import BlockMismatch, DamagedFile, InvalidInput, InvalidSetting, NotFittedError, StaleFit
from headwater.methods.base import Method
from headwater.store.seal import seal_folder
from headwater.torch import TorchComposableInfluence

METHODS = [
    hw.GradDot(),
    hw.GradCos(),
    hw.TracIn(learning_rates=0.3),
    hw.Direct(),
    hw.Direct(curvature="hessian", allow_indefinite=True),
    hw.Kfac(),
    hw.Kfac(damping_form="factored"),
    hw.Ekfac(),
    hw.Ekfac(rank=2, fisher="sampled", samples=2),
    hw.Arnoldi(rank=5),
    hw.Nystroem(rank=5),
    hw.Trak(dimension=8),
    hw.LoGra(dimension=2),
    hw.LoGra(dimension=2, init="pca"),
    hw.LoRif(dimension=3, rank=1, kept=4),
    hw.FactGrass(dimension=2),
]
READ_ROWS = [
    hw.Cg(),
    hw.Cg(curvature="hessian", allow_indefinite=True),
    hw.Cg(preconditioner="ekfac"),
    hw.Cg(preconditioner="kfac"),
    hw.Cg(preconditioner="nystroem"),
    hw.Cg(preconditioner="diagonal"),
    hw.BlockKrylov(),
    hw.Dual(),
    hw.Dual(curvature="ggn"),
    hw.DataInf(),
    hw.Trak(dimension=None),
]
HOLD_ROWS = [hw.Lissa(scale=20.0, steps=4), hw.Astra(steps=4)]


def words(method: Method) -> str:
    return method.describe()


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def rows(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(n, 4, generator=generator, dtype=torch.float64),
        torch.randint(3, (n,), generator=generator),
    )


X, Y = rows(23, 1)
QUERIES = rows(4, 2)
LOADER = [(X[:10], Y[:10]), (X[10:], Y[10:])]


def influence(model: nn.Module, method: Method, **options) -> TorchComposableInfluence:
    return TorchComposableInfluence(model, nn.CrossEntropyLoss(), method, **{"damping": 0.3, **options})


def in_turn():
    """All; the fast ones have each method with one structure."""
    for k, method in enumerate([*METHODS, *READ_ROWS]):
        for turn, blocks in enumerate(("layer", "full")):
            marks = () if (k + turn) % 2 == 0 else pytest.mark.slow
            yield pytest.param(method, blocks, id=f"{blocks}-{words(method)}", marks=marks)


@pytest.mark.parametrize(("method", "blocks"), list(in_turn()))
def test_a_loaded_fit_gives_the_same_scores(model, method, blocks, tmp_path):
    fitted = influence(model, method, blocks=blocks).fit(LOADER)
    fitted.save(tmp_path / "fit")
    other_batches = [(X[:6], Y[:6]), (X[6:13], Y[6:13]), (X[13:], Y[13:])]
    for loader in (LOADER, other_batches):
        loaded = influence(model, method, blocks=blocks).load(tmp_path / "fit", loader)
        for damping in (0.3, hw.relative(0.5)):
            expected = fitted.with_damping(damping).influences(*QUERIES, X, Y)
            got = loaded.with_damping(damping).influences(*QUERIES, X, Y)
            assert torch.allclose(got, expected, rtol=1e-6 if method in READ_ROWS else 1e-11, atol=1e-12)
    assert str(loaded.status) == str(fitted.status) or method in READ_ROWS


@pytest.mark.parametrize("method", METHODS, ids=words)
def test_most_methods_are_loaded_without_the_train_rows(model, method, tmp_path):
    fitted = influence(model, method).fit(LOADER)
    fitted.save(tmp_path / "fit")
    loaded = influence(model, method).load(tmp_path / "fit")
    assert torch.allclose(loaded.influences(*QUERIES), fitted.influences(*QUERIES), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("method", READ_ROWS, ids=words)
def test_a_method_that_reads_rows_asks_for_them(model, method, tmp_path):
    influence(model, method).fit(LOADER).save(tmp_path / "fit")
    with pytest.raises(NotFittedError, match="loader"):
        influence(model, method).load(tmp_path / "fit").influences(*QUERIES)


def test_the_dual_form_refuses_rows_that_it_was_not_fitted_on(model, tmp_path):
    influence(model, hw.Dual()).fit(LOADER).save(tmp_path / "fit")
    for wrong in ([(X[:22], Y[:22])], [(X + 1, Y)], [(X.flip(0), Y.flip(0))]):
        with pytest.raises(InvalidInput, match="other rows"):
            influence(model, hw.Dual()).load(tmp_path / "fit", wrong).influences(*QUERIES)


@pytest.mark.parametrize("method", HOLD_ROWS, ids=words)
def test_a_method_made_of_rows_is_not_saved(model, method, tmp_path):
    with pytest.raises(InvalidSetting, match="train rows"):
        influence(model, method).fit(LOADER).save(tmp_path / "fit")
    assert not any(tmp_path.iterdir())


def test_ensembles_are_saved_too(model, tmp_path):
    others = [copy.deepcopy(model) for _ in range(2)]
    with torch.no_grad():
        others[1][0].weight.mul_(2)
    for method in (hw.Ekfac(), hw.TracIn(learning_rates=(0.1, 0.2)), hw.Trak(dimension=8)):
        fitted = influence(model, method, checkpoints=others).fit(LOADER)
        path = tmp_path / type(method).__name__
        fitted.save(path)
        loaded = influence(model, method, checkpoints=others).load(path)
        assert torch.allclose(loaded.influences(*QUERIES), fitted.influences(*QUERIES), rtol=1e-11, atol=1e-12)


def test_a_saved_fit_can_be_read_in_another_process(model, tmp_path):
    fitted = influence(model, hw.Ekfac()).fit(LOADER)
    fitted.save(tmp_path / "fit")
    np.save(tmp_path / "scores.npy", fitted.influences(*QUERIES, X, Y).numpy())
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    code = f"""
        import sys, torch, numpy as np, headwater as hw
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from test_saved import QUERIES, X, Y, influence
        model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)).double()
        model.load_state_dict(torch.load({str(tmp_path / "weights.pt")!r}))
        got = influence(model, hw.Ekfac()).load({str(tmp_path / "fit")!r}).influences(*QUERIES, X, Y)
        assert np.allclose(got, np.load({str(tmp_path / "scores.npy")!r}), rtol=1e-12)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


@pytest.mark.parametrize("method", [*METHODS, *READ_ROWS], ids=words)
def test_what_was_fitted_follows_the_model_to_another_device(model, method, monkeypatch):
    """A second name of the same processor stands for the other device."""
    fitted = influence(model, method).fit(LOADER)
    expected, operators = fitted.influences(*QUERIES, X, Y), fitted.curvature
    fitted.influences(*QUERIES, X, Y)
    assert fitted.curvature is operators
    monkeypatch.setattr("headwater.torch.provider.TorchGradientProvider.device", torch.device("cpu", 0))
    assert torch.allclose(fitted.influences(*QUERIES, X, Y), expected, rtol=1e-6, atol=1e-12)
    assert fitted.curvature is not operators


# What does not belong together ----------------------------------------------------------------------------------------


def test_what_does_not_belong_to_the_fit_is_refused(model, tmp_path):
    path = tmp_path / "fit"
    influence(model, hw.Ekfac()).fit(LOADER).save(path)
    with pytest.raises(InvalidSetting, match="Kfac"):
        influence(model, hw.Kfac()).load(path)
    with pytest.raises(InvalidSetting, match="seed=3"):
        influence(model, hw.Ekfac(seed=3)).load(path)
    with pytest.raises(BlockMismatch, match="full"):
        influence(model, hw.Ekfac(), blocks="full").load(path)
    with pytest.raises(InvalidSetting, match="fitted with loss"):
        influence(model, hw.Ekfac(), measurement=lambda output, target: output.sum()).load(path)
    for loss in (nn.CrossEntropyLoss(label_smoothing=0.1), five_times, lambda output, target: output.sum()):
        with pytest.raises(InvalidSetting, match="fitted with loss"):
            TorchComposableInfluence(model, loss, hw.Ekfac(), likelihood="cross_entropy").load(path)
    with torch.no_grad():
        model[0].weight += 1e-12
    with pytest.raises(StaleFit, match="other weights"):
        influence(model, hw.Ekfac()).load(path)


def five_times(output, target):
    return 5 * nn.functional.cross_entropy(output, target)


@pytest.mark.parametrize(
    "method", [hw.Cg(preconditioner="ekfac"), hw.DataInf(), hw.Dual(), hw.BlockKrylov()], ids=words
)
def test_other_rows_than_those_fitted_are_noticed(model, method, tmp_path):
    influence(model, method).fit(LOADER).save(tmp_path / "fit")
    for wrong in ([(X[:20], Y[:20])], [(X + 1, Y)], [QUERIES]):
        with pytest.raises(InvalidInput, match="other rows"):
            influence(model, method).load(tmp_path / "fit", wrong).influences(*QUERIES)


def test_what_is_needed_is_said_where_it_is_missing(model, tmp_path):
    influence(model, hw.Ekfac()).fit(LOADER).save(f"{tmp_path}/fit/")
    described = description(tmp_path / "fit")
    for name in described:
        describe(tmp_path / "fit", {k: v for k, v in described.items() if k != name})
        with pytest.raises(InvalidInput, match="has format None" if name == "format" else f"no {name}"):
            influence(model, hw.Ekfac()).load(tmp_path / "fit")
    for rows in (0, -1, None, "x", True, float("nan"), float("inf")):
        describe(tmp_path / "fit", described | {"rows": rows})
        with pytest.raises(InvalidInput, match=f"fitted on {rows!r} rows"):
            influence(model, hw.Ekfac()).load(tmp_path / "fit")


def description(folder):
    found = json.loads((folder / "fit.json").read_text())
    return {name: value for name, value in found.items() if name != "seal"}


def describe(folder, values):
    """Another description, under a seal of its own."""
    (folder / "fit.json").write_text(json.dumps(values))
    seal_folder(folder, "fit.json")


def test_the_status_of_a_fit_without_rows_shows_dashes(model, tmp_path):
    influence(model, hw.Nystroem(rank=5)).fit(LOADER).save(tmp_path / "fit")
    assert "-" in str(influence(model, hw.Nystroem(rank=5)).load(tmp_path / "fit").status)


class Twisted(nn.Linear):
    """A layer that headwater's rule does not fit: found out on the first rows, and then taken without structure."""

    def forward(self, x):
        return super().forward(x * (1 + self.weight.sum()))


def test_parts_that_show_only_on_rows_need_some_rows(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(Twisted(4, 3)).double()
    fitted = influence(model, hw.Ekfac()).fit(LOADER)
    fitted.save(tmp_path / "fit")
    with pytest.raises(BlockMismatch, match="load\\(path, loader\\)"):
        influence(model, hw.Ekfac()).load(tmp_path / "fit")
    loaded = influence(model, hw.Ekfac()).load(tmp_path / "fit", LOADER)
    assert torch.allclose(loaded.influences(*QUERIES), fitted.influences(*QUERIES), rtol=1e-11, atol=1e-12)


def test_a_failed_load_leaves_the_influence_as_it_was(model, tmp_path):
    fitted = influence(model, hw.Ekfac()).fit(LOADER)
    before = fitted.influences(*QUERIES)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        fitted.load(tmp_path / "nowhere")
    assert torch.equal(fitted.influences(*QUERIES), before)


def test_only_a_fit_is_saved(model, tmp_path):
    with pytest.raises(NotFittedError):
        influence(model, hw.Ekfac()).save(tmp_path / "fit")
    fitted = influence(model, hw.Ekfac()).fit(LOADER)
    with torch.no_grad():
        model[0].weight *= 2
    with pytest.raises(StaleFit):
        fitted.save(tmp_path / "fit")
    assert not any(tmp_path.iterdir())


def test_broken_files_are_said_to_be(model, tmp_path):
    fitted = influence(model, hw.Ekfac()).fit(LOADER)
    for name, damage, words in [
        ("fit.json", b"{", "cannot be read"),
        ("fit.json", b"{}", "no checksums"),
        ("arrays.safetensors", b"short", "is damaged"),
    ]:
        path = tmp_path / words
        fitted.save(path)
        (path / name).write_bytes(damage)
        with pytest.raises(DamagedFile, match=f"{name} {words}" if name == "arrays" else words):
            influence(model, hw.Ekfac()).load(path)


def test_a_description_that_means_nothing_is_refused(model, tmp_path):
    """Under a seal that holds: of another version, or written by another hand."""
    path = tmp_path / "later"
    influence(model, hw.Ekfac()).fit(LOADER).save(path)
    described = description(path)
    describe(path, described | {"format": 99})
    with pytest.raises(InvalidInput, match="99"):
        influence(model, hw.Ekfac()).load(path)
    block = described["operators"]["0"]
    parts = block["operators"][0] if "operators" in block else block
    for change, words in (
        ({"class": "Mystery"}, "Mystery"),
        ({"left": {"array": "9.nothing", "dtype": "float64"}}, "no array '9.nothing'"),
        ({"left": {"what": 1}}, "means nothing"),
        ({"more": 1}, "expected"),
    ):
        before = dict(parts)
        parts.update(change)
        describe(path, described)
        with pytest.raises(InvalidInput, match=words):
            influence(model, hw.Ekfac()).load(path)
        parts.clear()
        parts.update(before)
    describe(path, described)
    influence(model, hw.Ekfac()).load(path)


def test_a_full_disk_leaves_nothing_behind(model, tmp_path, monkeypatch):
    fitted = influence(model, hw.Ekfac()).fit(LOADER)

    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("headwater.store.folder.save_file", full)
    with pytest.raises(OSError, match="No space"):
        fitted.save(tmp_path / "fit")
    assert not any(tmp_path.iterdir())
    monkeypatch.undo()
    fitted.save(tmp_path / "fit")


def test_the_files_hold_arrays_and_plain_json(model, tmp_path):
    influence(model, hw.Ekfac()).fit(LOADER).save(tmp_path / "fit")
    assert sorted(p.name for p in (tmp_path / "fit").iterdir()) == ["arrays.safetensors", "fit.json"]
    described = json.loads((tmp_path / "fit" / "fit.json").read_text())
    assert described["rows"] == len(X)
    arrays = safetensors.numpy.load_file(tmp_path / "fit" / "arrays.safetensors")
    assert {a.dtype for a in arrays.values()} == {np.dtype("float64"), np.dtype("uint64")}  # the rows' keys
