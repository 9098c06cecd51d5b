"""Claims about fits of kept gradients: they equal the fit of the model, or are refused with what was not kept."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import models
import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn

import headwater as hw
from headwater.errors import BatchMismatch, DamagedFile, InvalidInput, InvalidSetting
from headwater.methods.base import Method
from headwater.methods.registry import METHODS
from headwater.rows import serial
from headwater.run.runners import shared
from headwater.sklearn import SklearnComposableInfluence
from headwater.torch import TorchBatch, TorchComposableInfluence

X, Y = torch.randn(44, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), torch.arange(44) % 3
IDS = torch.randperm(1000, generator=torch.Generator().manual_seed(1))[:44]
UNEVEN = [slice(0, 7), slice(7, 19), slice(19, 20), slice(20, 44)]
TRAIN = [TorchBatch(X[cut], Y[cut], weights=1 + X[cut, 0] ** 2, ids=IDS[cut]) for cut in UNEVEN]
PLAIN = [(X[cut], Y[cut]) for cut in UNEVEN]
QUERIES = [(X[:4] + 0.1, Y[:4])]
EMPIRICAL = {"curvature": "empirical_fisher"}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(shared, "ROWS", 16)


def influence(method, seed=1):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    damping = hw.relative(0.3) if method.is_damped and not isinstance(method, hw.GradDot) else None
    return TorchComposableInfluence(model, nn.CrossEntropyLoss(), method, damping=damping)


def kept(folder, train=TRAIN, method=None, **options):
    return influence(method or hw.GradDot()).gradients(train, store=folder, **({"dtype": "float64"} | options))


def assert_same(found, truth, tolerance=1e-12):
    np.testing.assert_allclose(found, truth, atol=tolerance * abs(truth).max(), rtol=0)


FAST = [
    hw.Ekfac(fisher="empirical"),
    hw.Dual(),
    hw.DataInf(),
    hw.LoGra(dimension=2, init="pca"),
    hw.Trak(dimension=8),
    hw.Direct(**EMPIRICAL),
]
SLOW = [
    hw.GradDot(),
    hw.GradCos(),
    hw.Kfac(fisher="empirical"),
    hw.LoGra(dimension=2),
    hw.LoRif(dimension=3),
    hw.FactGrass(dimension=2),
    hw.Trak(dimension=8, output="loss"),
    hw.Trak(dimension=None),
    hw.Cg(**EMPIRICAL, tolerance=1e-14),
    hw.Cg(**EMPIRICAL, tolerance=1e-14, preconditioner="ekfac", fisher="empirical"),
    hw.BlockKrylov(**EMPIRICAL, tolerance=1e-14, preconditioner="nystroem"),
    hw.Arnoldi(**EMPIRICAL, rank=5),
    hw.Nystroem(**EMPIRICAL, rank=5),
]
FITTED = [*FAST, *(pytest.param(method, marks=pytest.mark.slow) for method in SLOW)]


@pytest.mark.parametrize("method", FITTED, ids=lambda method: type(method).__name__)
def test_a_fit_of_kept_gradients_is_the_fit_of_the_model(method, tmp_path):
    """Uneven batches, weights, ids out of order; margins too, whose gradients are not those of the loss."""
    truth = influence(method).fit(TRAIN)
    found = influence(method).fit(kept(tmp_path / "kept", method=method, form="outer"))
    assert found.n_train == pytest.approx(truth.n_train, rel=1e-14)
    np.testing.assert_array_equal(found.fitted_keys, truth.fitted_keys)
    assert found.absolute_damping == pytest.approx(truth.absolute_damping, rel=1e-12)
    assert_same(found.attribute(TRAIN, QUERIES).values, truth.attribute(TRAIN, QUERIES).values, 1e-11)
    assert_same(found.self_influence(TRAIN), truth.self_influence(TRAIN), 1e-11)


def test_no_row_goes_through_the_model(tmp_path, monkeypatch):
    rows, method = kept(tmp_path / "kept", form="outer"), hw.Ekfac(fisher="empirical")
    truth = influence(method).fit(TRAIN)
    found, asked = influence(method), []
    for name in ("grads", "fisher_grads", "losses", "row_keys", "curvature_product"):
        monkeypatch.setattr(type(found.source), name, lambda self, *_, **__: asked.append(self))
    found.fit(rows)
    assert asked == []
    monkeypatch.undo()
    assert_same(found.attribute(rows, QUERIES).values, truth.attribute(TRAIN, QUERIES).values, 1e-12)


def test_one_folder_serves_many_methods_and_settings(tmp_path):
    rows = kept(tmp_path / "kept")
    for method in (hw.Dual(), hw.LoGra(dimension=2), hw.LoGra(dimension=3, seed=5), hw.DataInf()):
        truth = influence(method).fit(TRAIN)
        assert_same(influence(method).fit(rows).attribute(rows, QUERIES).values, truth.attribute(TRAIN, QUERIES).values)


@pytest.mark.slow
def test_float32_rows_of_a_float64_model_differ_in_the_seventh_digit(tmp_path):
    rows, method = kept(tmp_path / "kept", dtype="float32", form="outer"), hw.Ekfac(fisher="empirical")
    truth = influence(method).fit(TRAIN).attribute(TRAIN, QUERIES).values
    found = influence(method).fit(rows).attribute(TRAIN, QUERIES).values
    assert 1e-9 < abs(found - truth).max() / abs(truth).max() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["images", "signals", "language", "sentences"])
@pytest.mark.parametrize("method", [hw.Ekfac(fisher="empirical"), hw.Dual()], ids=["Ekfac", "Dual"])
def test_every_kind_of_layer_is_fitted_from_what_it_gave(name, method, tmp_path):
    """Convolutions, norms, embeddings, tied weights; texts with padding, which counts in no mean."""
    case = models.CASES[name]()

    def made():
        return TorchComposableInfluence(models.CASES[name]().model, case.loss, method, likelihood=case.likelihood)

    train = case.loader()
    truth, found = made().fit(train), made()
    found.look(train)
    found.fit(made().gradients(train, store=tmp_path / "kept", form="outer", dtype="float64"))
    query = [(case.x_query, case.y_query)]
    assert_same(found.attribute(train, query).values, truth.attribute(train, query).values, 1e-10)


@pytest.mark.slow
def test_texts_of_other_lengths_in_each_batch_are_fitted_as_they_were(tmp_path):
    """Shorter ones are padded to the longest of a file; where they are, nothing counts."""
    torch.manual_seed(3)
    lengths = [3, 5, 2]
    train = [(torch.randint(1, 9, (4, t)), torch.arange(4) % 3) for t in lengths]

    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.wide, self.head = nn.Embedding(9, 4), nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x):
            return self.head(torch.tanh(self.wide(self.table(x))).mean(1))

    def made():
        torch.manual_seed(4)
        method = hw.Ekfac(fisher="empirical")
        return TorchComposableInfluence(Words().double(), nn.CrossEntropyLoss(), method, damping=hw.relative(0.3))

    truth, found = (
        made().fit(train),
        made().fit(made().gradients(train, store=tmp_path / "k", form="outer", dtype="float64")),
    )
    for name, curvature in truth.curvature.items():
        vectors = torch.randn(2, curvature.input_size, dtype=torch.float64)
        torch.testing.assert_close(found.curvature[name].apply(vectors), curvature.apply(vectors))


@pytest.mark.slow
@pytest.mark.parametrize("method", [hw.Trak(dimension=8), hw.Dual()], ids=["Trak", "Dual"])
def test_several_models_are_fitted_from_what_they_gave(method, tmp_path):
    """Whose margins share the mean of their 1 - p."""

    def made():
        weights = [influence(hw.GradDot(), seed).model.state_dict() for seed in (1, 2)]
        model = influence(hw.GradDot()).model
        damping = hw.relative(0.3)
        return TorchComposableInfluence(model, nn.CrossEntropyLoss(), method, damping=damping, checkpoints=weights)

    truth = made().fit(TRAIN).attribute(TRAIN, QUERIES).values
    rows = made().gradients(TRAIN, store=tmp_path / "kept", form="outer", dtype="float64")
    assert_same(made().fit(rows).attribute(TRAIN, QUERIES).values, truth, 1e-11)


@pytest.mark.slow
@pytest.mark.parametrize("method", [hw.Dual(), hw.Ekfac(fisher="empirical"), hw.Trak(dimension=8)], ids=str)
def test_an_estimator_s_penalty_stays_beside_what_was_kept(method, tmp_path):
    x, y = X.numpy(), Y.numpy()
    model = LogisticRegression(C=0.3).fit(x, y)

    def made():
        return SklearnComposableInfluence(model, method)

    truth = made().fit([(x, y)]).attribute([(x, y)], [(x[:3], y[:3])]).values
    rows = made().gradients([(x, y)], store=tmp_path / "kept", form="outer", dtype="float64")
    assert_same(made().fit(rows).attribute([(x, y)], [(x[:3], y[:3])]).values, truth, 1e-10)


# In files -------------------------------------------------------------------------------------------------------------


def test_deleted_rows_are_not_fitted(tmp_path):
    rows = kept(tmp_path / "kept", PLAIN)
    rows.delete([0, 7, 8, 43])
    there = np.setdiff1d(np.arange(44), [0, 7, 8, 43])
    left = [(X[there], Y[there])]
    truth = influence(hw.Dual()).fit(left).attribute(left, QUERIES).values
    assert_same(influence(hw.Dual()).fit(rows).attribute(rows, QUERIES).values, truth)
    rows.delete(there)
    with pytest.raises(InvalidInput, match="all were deleted"):
        influence(hw.Dual()).fit(rows)


def test_a_damaged_file_is_named(tmp_path):
    rows = kept(tmp_path / "kept")
    for file in sorted((tmp_path / "kept" / "tiles-0").iterdir()):
        content = file.read_bytes()
        for changed in (content[:-9], content[:-200] + bytes([content[-200] ^ 1]) + content[-199:]):
            file.write_bytes(changed)
            with pytest.raises(DamagedFile, match=file.name):
                influence(hw.Dual()).fit(rows)
        file.unlink()
        with pytest.raises(DamagedFile, match=f"{file.name} is missing"):
            influence(hw.Dual()).fit(rows)
        file.write_bytes(content)
    assert influence(hw.Dual()).fit(rows).is_fitted


def test_a_fit_of_kept_gradients_is_kept_itself_by_any_number_of_workers(tmp_path):
    rows, method = kept(tmp_path / "kept", form="outer"), hw.Ekfac(fisher="empirical")
    found = [
        influence(method)
        .fit(rows, store=tmp_path / f"fit of {count}", worker=(0, count))
        .attribute(rows, QUERIES)
        .values
        for count in (1, 2)
    ]
    assert found[0].tobytes() == found[1].tobytes()
    assert_same(found[0], influence(method).fit(TRAIN).attribute(TRAIN, QUERIES).values)


def test_a_saved_fit_is_loaded_with_kept_gradients(tmp_path):
    rows = kept(tmp_path / "kept")
    fitted = influence(hw.Dual()).fit(rows)
    fitted.save(tmp_path / "fit")
    loaded = influence(hw.Dual()).load(tmp_path / "fit", hw.KeptGradients.open(tmp_path / "kept"))
    assert_same(loaded.attribute(rows, QUERIES).values, fitted.attribute(rows, QUERIES).values)
    with pytest.raises(BatchMismatch, match="fitted and saved"):
        influence(hw.Dual()).load(tmp_path / "fit", kept(tmp_path / "others", TRAIN[1:]))


# What cannot be right -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "said"),
    [
        (hw.Ekfac(), r"labels that the model would give.*Take fisher='empirical'"),
        (hw.Ekfac(fisher="empirical", basis_share=0.5), "keys of random draws choose.*take basis_share=1"),
        (hw.LoGra(fisher="sampled"), "labels that the model would give"),
        (hw.Direct(curvature="fisher"), "labels that the model would give"),
        (hw.Direct(), "products with a curvature that is no sum"),
        (hw.Cg(), "products with a curvature"),
        (hw.Lissa(**EMPIRICAL), "asks for more than the rows' gradients"),
    ],
    ids=lambda each: type(each).__name__,
)
def test_what_needs_the_model_is_refused(method, said, tmp_path):
    with pytest.raises(InvalidSetting, match=f"{said}.*Or give the train rows' loader"):
        influence(method).fit(kept(tmp_path / "kept", PLAIN))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"form": "low_rank", "rank": 1}, "cut to rank 1"),
        ({"dtype": "bfloat16"}, "rounded to bfloat16"),
        ({"dtype": "int8"}, "rounded to int8"),
    ],
)
def test_rows_that_were_rounded_or_cut_are_refused(options, said, tmp_path):
    rows = kept(tmp_path / "kept", PLAIN, **options)
    with pytest.raises(InvalidSetting, match=said):
        influence(hw.Dual()).fit(rows)
    assert influence(hw.GradDot()).fit(rows).n_train == 44  # which asks only how many they are


def test_projected_rows_are_refused(tmp_path):
    fitted = influence(hw.LoGra(dimension=2)).fit(PLAIN)
    rows = fitted.gradients(PLAIN, store=tmp_path / "kept")
    with pytest.raises(InvalidSetting, match="are projected"):
        influence(hw.LoGra(dimension=2)).fit(rows)


@pytest.mark.parametrize("form", ["dense", "auto"])
def test_matrices_are_refused_where_layers_inputs_are_needed(form, tmp_path):
    """Of a last layer with few outputs, "auto" keeps the matrix, which is the smaller."""
    few = [(X[:8], Y[:8])]

    def made(method):
        torch.manual_seed(1)
        return TorchComposableInfluence(
            nn.Sequential(nn.Linear(5, 1), nn.Linear(1, 3)).double(), nn.CrossEntropyLoss(), method
        )

    rows = made(hw.Dual()).gradients(few, store=tmp_path / form, form=form, dtype="float64")
    assert made(hw.Dual()).fit(rows).is_fitted
    with pytest.raises(InvalidSetting, match=r"inputs and output-gradients.*form='outer'"):
        made(hw.Ekfac(fisher="empirical")).fit(rows)


def test_another_model_or_view_is_refused(tmp_path):
    rows = kept(tmp_path / "kept", PLAIN)
    with pytest.raises(InvalidInput, match="fingerprint was"):
        influence(hw.Dual(), seed=2).fit(rows)
    with pytest.raises(InvalidInput, match="views was"):
        influence(hw.Trak(dimension=8)).fit(rows)


def test_margins_of_rows_that_the_model_is_sure_of_are_refused(tmp_path):
    def made():
        found = influence(hw.Trak(dimension=8))
        with torch.no_grad():
            found.model[2].bias += torch.tensor([40.0, 0, 0], dtype=torch.float64)
        return TorchComposableInfluence(found.model, nn.CrossEntropyLoss(), hw.Trak(dimension=8))

    rows = made().gradients(PLAIN, store=tmp_path / "kept", form="outer", dtype="float64")
    with pytest.raises(InvalidInput, match="so sure that 1 - p is zero to rounding"):
        made().fit(rows)


def table():
    """Of docs/scale.md: by method, who may share its fit, and whether kept gradients may stand for its rows."""
    text = (Path(__file__).parents[2] / "docs" / "scale.md").read_text()
    rows = re.findall(r"^\| `hw\.(\w+)` \| ([^|]+) \| ([^|]+) \|$", text, re.M)
    return {name: (shared, kept) for name, shared, kept in rows}


EITHER = {"Representer": {"l2": 1.0, "tolerance": 1e9}}
"""Settings that a method has to have; and a tolerance by which any weights are stationary, and linear."""


def test_the_guide_s_table_of_fits_has_every_method():
    assert list(table()) == [entry.class_name for entry in METHODS]


@pytest.mark.parametrize("entry", METHODS, ids=lambda entry: entry.class_name)
def test_the_guide_says_of_each_method_whether_its_fit_is_shared_and_reads_kept_gradients(entry):
    shared_by, kept_from = table()[entry.class_name]
    method, passes = entry.cls(**EITHER.get(entry.class_name, {})), []

    def runner(visitor, read, label):
        passes.append(visitor.is_shareable)
        return serial(visitor, read, label)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        influence(method).fit(PLAIN, runner=runner, tile=64)
    assert (shared_by == "yes") == all(passes), passes
    assert shared_by == "yes" or shared_by.startswith("each by itself")
    fits = ("weights", "gradients", "layers")
    if kept_from == "yes":
        assert method.fit_reads in fits
    elif kept_from.startswith("with"):
        name, value = re.fullmatch(r'with `(\w+)="(\w+)"`', kept_from).groups()
        assert method.fit_reads not in fits and entry.cls(**{name: value}).fit_reads in fits
    else:
        assert kept_from.startswith("no: ") and method.fit_reads == "model"


def test_every_method_says_what_its_fit_reads():
    """By default the model itself, which is refused: a method that says nothing cannot be fitted wrongly."""
    silent = {entry.class_name for entry in METHODS if entry.cls.fit_reads is Method.fit_reads}
    assert silent == {"Lissa", "Astra"}
    assert hw.Representer(l2=0.1).fit_reads == hw.TracIn().fit_reads == "model"


def test_a_function_of_jax_has_to_be_shown_rows_first(tmp_path):
    jax = pytest.importorskip("jax.numpy")
    from headwater.jax import JaxComposableInfluence
    from headwater.jax.losses import cross_entropy

    x, y = np.random.default_rng(0).standard_normal((12, 5)).astype("float32"), np.arange(12) % 3
    weights = jax.asarray(np.random.default_rng(1).standard_normal((5, 3)), dtype="float32")

    def made(**options):
        method = hw.Ekfac(fisher="empirical")
        return JaxComposableInfluence(lambda w, x: x @ w, weights, cross_entropy, method, damping=0.1, **options)

    rows = made().gradients([(x, y)], store=tmp_path / "kept", form="outer")
    with pytest.raises(InvalidInput, match=r"example=x\[:2\], or call influence.look"):
        made().fit(rows)
    found = made(example=x[:2]).fit(rows).attribute([(x, y)], [(x[:3], y[:3])]).values
    assert_same(found, made().fit([(x, y)]).attribute([(x, y)], [(x[:3], y[:3])]).values, 1e-4)
