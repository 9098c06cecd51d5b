"""Claims about diagnoses: what is worrying is said, with the figures that the plain formulas give."""

import dataclasses
import math
import warnings

import numpy as np
import pytest
import torch
from models import language, sentences, signals
from torch import nn
from truth import fitted as fitted_case

import headwater as hw
from headwater.errors import InvalidInput, InvalidSetting
from headwater.operators.krylov import KrylovSpace
from headwater.operators.sketch import estimate_spectra
from headwater.operators.spectrum import Spectrum
from headwater.operators.structured import (
    DenseOperator,
    DiagonalOperator,
    EigenpairsOperator,
    LowRankPlusDiagonalOperator,
)
from headwater.sklearn import SklearnComposableInfluence
from headwater.store.diagnosis import BlockDiagnosis, Diagnosis, Stationarity
from headwater.store.scores import Scores
from headwater.torch import TorchBatch, TorchComposableInfluence

torch.manual_seed(0)
X, Y = torch.randn(30, 4, dtype=torch.float64), torch.randint(0, 3, (30,))
TRAIN, QUERY = list(zip(X.split(8), Y.split(8), strict=True)), [(X[:3], Y[:3])]
LIKE = torch.zeros(1, dtype=torch.float64)


def model():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def fitted(method, train=TRAIN, **options):
    return TorchComposableInfluence(model(), nn.CrossEntropyLoss(), method, **options).fit(train)


def logistic(l2: float, steps: int = 30):
    """A linear classifier without bias at the minimum of the mean loss plus l2 / 2 |w|^2, by Newton's method."""
    linear = nn.Linear(4, 3, bias=False).double()
    flat = torch.zeros(12, dtype=torch.float64)

    def objective(w):
        return nn.functional.cross_entropy(X @ w.reshape(3, 4).T, Y) + l2 / 2 * (w @ w)

    for _ in range(steps):
        slope = torch.autograd.functional.jacobian(objective, flat)
        flat = flat - torch.linalg.lstsq(torch.autograd.functional.hessian(objective, flat), slope).solution
    with torch.no_grad():
        linear.weight.copy_(flat.reshape(3, 4))
    return linear


# Is it a minimum? -----------------------------------------------------------------------------------------------------


def plain_figures(grads: np.ndarray, weights: np.ndarray, w: np.ndarray) -> Stationarity:
    """By the definitions: rows repeated as often as their weight says, an unbiased covariance."""
    rows = np.repeat(grads, weights, axis=0)
    mean, spread = rows.mean(axis=0), rows.var(axis=0, ddof=1).sum()
    l2 = -(mean @ w) / (w @ w)
    left = mean + l2 * w
    explained = 1 - (left @ left) / (mean @ mean) if l2 > 0 else 0.0
    return Stationarity(float(np.linalg.norm(mean)), float(np.sqrt(spread / len(rows))), float(l2), float(explained))


def assert_same(found: Stationarity, expected: Stationarity, rtol: float = 1e-9) -> None:
    for field in dataclasses.fields(Stationarity):
        assert getattr(found, field.name) == pytest.approx(getattr(expected, field.name), rel=rtol, abs=1e-12)


@pytest.mark.parametrize("method", [hw.GradDot(), hw.Ekfac(), hw.Direct()], ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("weighted", [False, True])
def test_the_mean_gradient_its_noise_and_its_decay_are_those_of_the_plain_gradients(method, weighted):
    weights = torch.randint(0, 4, (30,)) if weighted else torch.ones(30, dtype=torch.int64)
    train = [
        TorchBatch(x, y, weights=w) for x, y, w in zip(*(t.split(8) for t in (X, Y, weights.double())), strict=True)
    ]
    influence = fitted(method, train, damping=1.0)
    found = influence.attribute(train, QUERY).diagnosis
    grads = influence.provider.grads(TorchBatch(X, Y))
    flat = {name: value.flat().detach().numpy() for name, value in grads.items()}
    own = {name: influence.provider.parameters(name).detach().numpy() for name in flat}
    for name in flat:
        assert_same(found.blocks[name].stationarity, plain_figures(flat[name], weights.numpy(), own[name]))
    whole = plain_figures(np.concatenate([*flat.values()], axis=1), weights.numpy(), np.concatenate([*own.values()]))
    assert_same(found.stationarity, whole)
    assert found.rows_seen == weights.sum() == found.rows
    assert_same(influence.diagnose(train).stationarity, whole)


@pytest.mark.parametrize("make", [sentences, signals, language])
def test_gradients_at_many_positions_and_of_tables_give_the_same(make):
    case = make()
    influence = fitted_case(case, hw.GradDot(), "layer")
    found = influence.attribute(case.loader(4), [(case.x_query, case.y_query)]).diagnosis
    batch = influence.provider.as_batch(case.x, case.y)
    for name, value in influence.provider.grads(batch).items():
        flat, own = value.flat().detach().numpy(), influence.provider.parameters(name).detach().numpy()
        assert_same(found.blocks[name].stationarity, plain_figures(flat, np.ones(len(flat), int), own), 1e-6)


def test_nothing_depends_on_the_batches():
    influence = fitted(hw.Ekfac())
    first, *others = (influence.attribute(list(zip(X.split(k), Y.split(k), strict=True)), QUERY) for k in (30, 7, 1))
    for other in others:
        assert_same(other.diagnosis.stationarity, first.diagnosis.stationarity)


def test_a_minimum_is_well_and_a_decayed_one_is_explained_and_any_other_is_worrying():
    def diagnosis(linear, train=TRAIN):
        influence = TorchComposableInfluence(linear, nn.CrossEntropyLoss(), hw.Ekfac(), damping=0.1).fit(train)
        return influence.attribute(train, QUERY).diagnosis

    minimum, decayed = diagnosis(logistic(0.0)), diagnosis(logistic(0.3))
    assert minimum.stationarity.ratio < 1e-20 and not minimum.worries and "No warning" in str(minimum)
    assert decayed.stationarity.weight_decay == pytest.approx(0.3) and decayed.stationarity.explained == pytest.approx(
        1
    )
    assert decayed.stationarity.ratio > 0.1 and decayed.stationarity.rest < 1e-9 and not decayed.worries
    far = logistic(0.0)
    with torch.no_grad():
        far.weight.mul_(-3.0)
    elsewhere = diagnosis(far, TRAIN * 5)
    assert elsewhere.stationarity.is_doubtful and "the weights are no minimum" in str(elsewhere)
    assert f"{elsewhere.stationarity.ratio:.3g} times what chance gives" in str(elsewhere)


@pytest.mark.slow
def test_chance_gives_a_ratio_of_one_on_average():
    """Rows whose gradients have mean zero: targets with noise, at the true weights of a linear regression."""
    generator, linear = torch.Generator().manual_seed(0), nn.Linear(3, 1, bias=False).double()
    ratios = []
    for _ in range(300):
        x = torch.randn(20, 3, dtype=torch.float64, generator=generator)
        y = (x @ linear.weight.T).detach() + torch.randn(20, 1, dtype=torch.float64, generator=generator)
        influence = TorchComposableInfluence(linear, nn.MSELoss(), hw.GradDot()).fit([(x, y)])
        ratios.append(influence.attribute([(x, y)], [(x[:1], y[:1])]).diagnosis.stationarity.ratio)
    assert np.mean(ratios) == pytest.approx(1.0, abs=4 * np.std(ratios) / 300**0.5)


def test_a_known_penalty_that_spares_intercepts_explains_all_of_the_mean_gradient():
    from sklearn.datasets import load_breast_cancer
    from sklearn.linear_model import LogisticRegression

    x, y = load_breast_cancer(return_X_y=True)
    x = (x - x.mean(0)) / x.std(0)
    estimator = LogisticRegression(C=0.05, tol=1e-10, max_iter=5000).fit(x, y)
    found = (
        SklearnComposableInfluence(estimator, hw.Direct()).fit([(x, y)]).attribute([(x, y)], [(x[:2], y[:2])]).diagnosis
    )
    assert found.stationarity.explained == pytest.approx(1.0, abs=1e-6) and not found.worries
    assert found.stationarity.weight_decay == pytest.approx(1 / (0.05 * len(y)), rel=1e-3)


def test_one_row_has_no_noise_and_says_nothing():
    influence = fitted(hw.Ekfac())
    found = influence.attribute([(X[:1], Y[:1])], QUERY).diagnosis
    assert math.isnan(found.stationarity.noise) and math.isnan(found.stationarity.ratio) and not found.worries


@pytest.mark.parametrize("method", [hw.GradCos(), hw.Trak(dimension=8)], ids=lambda m: type(m).__name__)
def test_methods_that_see_other_gradients_say_that_it_was_not_asked(method):
    influence = fitted(method)
    found = influence.attribute(TRAIN, QUERY).diagnosis
    assert found.stationarity is None and "whether the weights are a minimum" in str(found)
    assert_same(influence.diagnose(TRAIN).stationarity, fitted(hw.GradDot()).diagnose(TRAIN).stationarity)


# Stopped runs ---------------------------------------------------------------------------------------------------------


class Stopping:
    def __init__(self, after):
        self.after = after

    def __iter__(self):
        yield from TRAIN[: self.after]
        raise KeyboardInterrupt


@pytest.fixture
def stopped(tmp_path, monkeypatch):
    """An influence, a folder with half a run, and what a whole run finds."""
    monkeypatch.setattr("headwater.run.plan.FEWEST", 5)
    monkeypatch.setattr("headwater.run.plan.ROWS", 5)
    influence = fitted(hw.Ekfac())
    with pytest.raises(KeyboardInterrupt):
        influence.attribute(Stopping(2), QUERY, store=tmp_path / "run")
    return influence, tmp_path / "run", influence.attribute(TRAIN, QUERY).diagnosis


def test_a_run_that_goes_on_knows_all_rows_of_those_before(stopped):
    influence, folder, whole = stopped
    for _ in range(3):  # the third time every tile comes from the store
        found = influence.attribute(TRAIN, QUERY, store=folder).diagnosis
        assert found.rows_seen == 30
        assert_same(found.stationarity, whole.stationarity)


@pytest.mark.parametrize("damage", ["removed", "torn", "flipped", "empty"])
def test_sums_that_are_lost_cost_only_their_computation(stopped, damage):
    influence, folder, whole = stopped
    (file,) = folder.glob("sums-*.npz")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    damaged = {"torn": bytes(content[:60]), "flipped": bytes(content), "empty": b""}
    if damage == "removed":
        file.unlink()
    else:
        file.write_bytes(damaged[damage])
    for _ in range(2):
        found = influence.attribute(TRAIN, QUERY, store=folder).diagnosis
        assert found.rows_seen == 30
        assert_same(found.stationarity, whole.stationarity)


@pytest.mark.parametrize("lost", [[0], [1], [0, 1]])
def test_a_tile_that_is_lost_and_computed_again_counts_once(stopped, lost):
    influence, folder, whole = stopped
    (ledger,) = folder.glob("ledger-*.jsonl")
    lines = ledger.read_text().splitlines()
    ledger.write_text("".join(f"{line}\n" for k, line in enumerate(lines) if k not in lost))
    found = influence.attribute(TRAIN, QUERY, store=folder).diagnosis
    assert found.rows_seen == 30
    assert_same(found.stationarity, whole.stationarity)


def test_rows_of_other_tiles_are_not_counted_when_fewer_are_asked(stopped):
    influence, folder, whole = stopped
    with pytest.raises(InvalidInput, match="other rows at 5 to 8"):  # these are fewer than are there
        influence.attribute(TRAIN[:1], QUERY, store=folder)
    folder = folder.parent / "another"
    found = influence.attribute(TRAIN[:1], QUERY, store=folder).diagnosis
    assert_same(found.stationarity, influence.attribute(TRAIN[:1], QUERY).diagnosis.stationarity)
    found = influence.attribute(TRAIN, QUERY, store=folder, append=True).diagnosis
    assert_same(found.stationarity, whole.stationarity)


def test_rows_in_other_batches_are_the_same_tiles(stopped):
    influence, folder, whole = stopped
    rows = [torch.cat([batch[k] for batch in TRAIN]) for k in (0, 1)]
    other = [(rows[0][a:b], rows[1][a:b]) for a, b in ((0, 8), (8, 13), (13, 30))]
    found = influence.attribute(other, QUERY, store=folder).diagnosis
    assert found.rows_seen == 30
    assert_same(found.stationarity, whole.stationarity)


# Degrees of freedom and the spectrum ----------------------------------------------------------------------------------

CLOSED = [
    hw.Direct(),
    hw.Kfac(),
    hw.Ekfac(),
    hw.Dual(),
    hw.Dual(curvature="ggn"),
    hw.Arnoldi(rank=4),
    hw.Nystroem(rank=6),
    hw.LoGra(dimension=2),
    hw.LoRif(dimension=3, kept=3),
    hw.Trak(dimension=9),
    hw.Trak(dimension=None),
]


@pytest.mark.parametrize("method", CLOSED, ids=lambda m: m.describe()[:34])
def test_degrees_of_freedom_are_those_of_the_operator_that_is_inverted(method):
    """tr(C (C + d)^-1) = D - d tr((C + d)^-1), with the inverse that the method itself applies."""
    influence = fitted(method, damping=0.02)
    found, scores = influence.effective_dof(), influence.attribute(TRAIN, QUERY)
    for name, operator in influence.block_mapper.operators.items():
        operator = getattr(operator, "core", operator)
        size = operator.input_size
        expected = size - 0.02 * float(np.trace(np.asarray(operator.dense(LIKE))))
        assert found[name].value == pytest.approx(expected, abs=1e-7 * size) and found[name].error == 0.0
        assert 0.5 < expected < size - 0.5
        assert scores.diagnosis.blocks[name].effective_dof == pytest.approx(expected, abs=1e-7 * size)


def test_many_dampings_come_from_one_decomposition(monkeypatch):
    influence = fitted(hw.Direct())
    dampings = [0.0, 1e-3, hw.relative(1.0), 5.0]
    found = influence.effective_dof(dampings)
    for name, curvature in influence.curvature.items():
        for k, damping in enumerate(dampings):
            alone = influence.with_damping(damping if k else 1e-12).effective_dof()[name].value
            assert found[name].value[k] == pytest.approx(alone, rel=1e-3 if k == 0 else 1e-9)
        assert (np.diff(found[name].value[[0, 1, 3]]) < 0).all()
        assert found[name].value[0] == np.linalg.matrix_rank(curvature.matrix.numpy(), tol=1e-10)


@pytest.mark.parametrize("method", [hw.Cg(preconditioner=None), hw.DataInf(), hw.Lissa(steps=2)])
def test_products_are_estimated_with_an_honest_error(method, monkeypatch):
    influence = fitted(method, damping=0.02, blocks="full")
    kind = getattr(method, "curvature", "empirical_fisher")
    exact = fitted(hw.Direct(kind), damping=0.02, blocks="full").effective_dof()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", hw.NotConverged)
        assert influence.attribute(TRAIN, QUERY).diagnosis.effective_dof is None
    small = influence.effective_dof()
    monkeypatch.setattr("headwater.operators.sketch.WHOLE", 0)
    for name, truth in exact.items():
        assert small[name].value == pytest.approx(truth.value) and small[name].error == 0.0
        found = influence.effective_dof(probes=16)[name]
        assert found.error > 0 and abs(found.value - truth.value) < 4 * found.error
        assert abs(found.value - truth.value) > 1e-9
        several = influence.effective_dof([0.02, 0.2], probes=16)[name]
        assert several.value[0] == pytest.approx(found.value) and several.value[1] < several.value[0]


def test_an_estimate_is_the_mean_over_signs_of_the_quadratic_form():
    generator = np.random.default_rng(0)
    root = generator.normal(size=(60, 40))
    matrix = torch.tensor(root.T @ root / 60)
    operator = DenseOperator(matrix, psd=True)
    import headwater.operators.sketch as sketch

    signs = sketch.sign_vectors(5, 40, matrix, seed=7, stream=5)
    whole = sketch.WHOLE
    try:
        sketch.WHOLE = 0
        found = estimate_spectra(operator, matrix, probes=5, steps=8, seed=7)
    finally:
        sketch.WHOLE = whole
    inverse = torch.linalg.inv(matrix + 0.1 * torch.eye(40))
    for spectrum, z in zip(found, signs, strict=True):
        assert spectrum.counts.sum() == pytest.approx(40)
        assert spectrum.effective_dof([0.1])[0] == pytest.approx(float(z @ (matrix @ inverse) @ z), rel=1e-6)


def test_a_penalty_damps_too_except_where_it_spares_intercepts():
    from sklearn.datasets import load_breast_cancer
    from sklearn.linear_model import LogisticRegression

    x, y = load_breast_cancer(return_X_y=True)
    x = (x - x.mean(0)) / x.std(0)
    estimator = LogisticRegression(C=0.05, max_iter=5000).fit(x, y)
    influence = SklearnComposableInfluence(estimator, hw.Direct()).fit([(x, y)])
    (name,) = influence.block_names
    curvature, penalty = influence.curvature[name].matrix, np.diag(influence.provider.penalty(name, influence.n_train))
    for damping in (0.0, 0.01):
        expected = np.trace(np.linalg.solve(curvature + penalty + damping * np.eye(len(penalty)), curvature))
        assert influence.effective_dof([damping])[name].value[0] == pytest.approx(expected, rel=1e-9)
        again = influence.with_damping(damping)
        assert again.effective_dof()[name].value == pytest.approx(expected, rel=1e-9)
        assert again.diagnose([(x, y)]).effective_dof == pytest.approx(expected, rel=1e-9)


STRUCTURED = {
    "dense": DenseOperator(torch.diag(torch.tensor([3.0, -1.0, 0.5], dtype=torch.float64)), symmetric=True),
    "diagonal": DiagonalOperator(torch.tensor([3.0, 1.0, 0.0], dtype=torch.float64)),
    "eigenpairs": EigenpairsOperator(torch.tensor([2.0, 4.0]).double(), torch.eye(5, dtype=torch.float64)[:2]),
    "low rank": LowRankPlusDiagonalOperator(
        torch.randn(6, 2, dtype=torch.float64), torch.eye(2, dtype=torch.float64), torch.full((6,), 0.3).double()
    ),
}


@pytest.mark.parametrize("operator", [*STRUCTURED.values()], ids=STRUCTURED)
@pytest.mark.parametrize("change", [lambda op: op, lambda op: 2.5 * op, lambda op: op.shifted(1.5)])
def test_eigenvalues_are_those_of_the_dense_matrix(operator, change):
    operator = change(operator)
    found = operator.eigenvalues()
    listed = np.sort(np.repeat(found.values, found.counts.astype(int)))
    np.testing.assert_allclose(listed, np.linalg.eigvalsh(np.asarray(operator.dense(LIKE))), atol=1e-12)
    assert (operator @ operator).eigenvalues() is None and (operator @ operator).effective_dof([1.0]) is None


def test_negative_damped_curvature_has_no_degrees_of_freedom_and_zero_counts_nothing():
    spectrum = Spectrum.of([-1.0, 2.0], size=4)
    found = spectrum.effective_dof([0.5, 1.0, 2.0])
    assert np.isnan(found[:2]).all() and found[2] == pytest.approx(-1.0 + 0.5)
    assert Spectrum.of([0.0, 2.0]).effective_dof([0.0]).tolist() == [1.0]
    assert Spectrum.of_psd([-1e-17, 1e-17, 2.0], 2e-16, size=9).effective_dof([0.0]).tolist() == [1.0]
    for bad in ([-1.0], [], [np.nan], 0.5):
        with pytest.raises(InvalidSetting, match="dampings"):
            spectrum.effective_dof(bad)


def test_methods_without_curvature_have_no_degrees_of_freedom():
    influence = fitted(hw.GradDot())
    with pytest.raises(InvalidSetting, match="GradDot"):
        influence.effective_dof()
    assert influence.attribute(TRAIN, QUERY).diagnosis.effective_dof is None
    with pytest.raises(InvalidSetting, match="probes is 1"):
        fitted(hw.Ekfac()).effective_dof(probes=1)


def test_large_matrices_are_not_diagonalised_unasked(monkeypatch):
    monkeypatch.setattr("headwater.run.diagnosis.AT_ONCE", 8)
    influence = fitted(hw.Dual())
    found = influence.attribute(TRAIN, QUERY).diagnosis
    assert found.effective_dof is None and "effective degrees of freedom" in found.unknown
    assert influence.diagnose(TRAIN).effective_dof is not None


# Negative curvature, solves, and what was cut off ---------------------------------------------------------------------


@pytest.mark.parametrize("method", [hw.Direct("hessian", allow_indefinite=True), hw.Cg(curvature="hessian")])
def test_negative_curvature_is_said_with_what_the_damping_leaves(method):
    influence = fitted(method, damping=0.3)
    found = influence.attribute(TRAIN, QUERY).diagnosis
    truth = fitted(hw.Direct("hessian", allow_indefinite=True), damping=0.3).status.blocks
    assert min(block.lowest for block in truth.values()) < -1e-3
    for name, block in found.blocks.items():
        assert block.lowest == pytest.approx(truth[name].lowest, rel=0.05, abs=1e-3) and block.lowest_damped > 0
        assert block.is_negative == (truth[name].lowest < -1e-3)  # the last layer's own Hessian is its GGN
        assert block.is_negative == (f"block {name!r}: negative curvature" in str(found))
    bad = dataclasses.replace(found.blocks["0"], damping=0.0)
    assert "does not make up for it" in str(dataclasses.replace(found, blocks={"0": bad}))


def test_curvature_that_cannot_be_negative_is_not_asked_and_a_hessian_by_products_is_only_when_asked():
    found = fitted(hw.Cg()).attribute(TRAIN, QUERY).diagnosis
    assert all(b.nonnegative and b.lowest is None and not b.is_negative for b in found.blocks.values())
    assert ">= 0" in str(found) and not any("negative" in said for said in found.unknown)
    influence = fitted(hw.Cg(curvature="hessian", allow_indefinite=True, preconditioner=None), damping=0.3)
    found = influence.attribute(TRAIN, QUERY).diagnosis
    assert "negative curvature" in found.unknown and "influence.diagnose" in str(found)
    asked = influence.diagnose(TRAIN)
    assert not asked.unknown and asked.blocks["0"].is_negative and not asked.blocks["2"].is_negative
    assert all(block.solves == 3 for block in asked.blocks.values())


def test_solves_that_missed_are_counted():
    influence = fitted(hw.Cg(max_iterations=1, preconditioner=None), damping=hw.relative(0.01))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", hw.NotConverged)
        found = influence.attribute(TRAIN, QUERY).diagnosis
    for name, block in found.blocks.items():
        assert (block.solves, block.missed) == (3, 3)
        assert block.residual == influence.solves[name].residual.max() > 0.01
    assert "100% of the solves missed their tolerance (3 of 3)" in str(found)
    assert not any("solves" in said for said in fitted(hw.Cg()).attribute(TRAIN, QUERY).diagnosis.worries)


def test_what_was_cut_off_is_said():
    lorif = fitted(hw.LoRif(dimension=3, kept=1)).attribute(TRAIN, QUERY).diagnosis
    cut = fitted(hw.Ekfac(rank=1), damping=1e-4).attribute(TRAIN, QUERY).diagnosis
    for block in lorif.blocks.values():
        assert block.kept_rank == 1 and f"hold {block.kept_mass:.0%} of the trace" in str(lorif)
    worst = max(block.truncation_error for block in cut.blocks.values())
    assert worst > 0.1 and f"the truncated inverse spectrum is {worst:.0%} off" in str(cut)
    assert not any("truncated" in said for said in fitted(hw.Ekfac()).attribute(TRAIN, QUERY).diagnosis.worries)


# Saved ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [hw.Ekfac(), hw.Cg(), hw.GradCos()], ids=lambda m: type(m).__name__)
def test_scores_keep_their_diagnosis_on_disk(method, tmp_path):
    scores = fitted(method).attribute(TRAIN, QUERY)
    scores.save(tmp_path / "scores.zarr")
    opened = Scores.open(tmp_path / "scores.zarr").diagnosis
    assert opened == scores.diagnosis and str(opened) == str(scores.diagnosis)


def test_scores_made_by_hand_have_none(tmp_path):
    scores = Scores(np.zeros((1, 2)), np.arange(1), np.arange(2))
    assert scores.diagnosis is None
    scores.save(tmp_path / "scores.zarr")
    assert Scores.open(tmp_path / "scores.zarr").diagnosis is None


def test_numbers_that_are_none_survive_as_text():
    found = Diagnosis("m", 3.0, 1.0, {"a": BlockDiagnosis(2, 0.1, effective_dof=math.nan)}, Stationarity(1.0, math.nan))
    again = Diagnosis.from_json(found.to_json())
    assert math.isnan(again.blocks["a"].effective_dof) and math.isnan(again.stationarity.noise)
    assert str(again) == str(found)


def test_the_whole_of_several_blocks_is_their_sum():
    found = fitted(hw.Ekfac()).attribute(TRAIN, QUERY).diagnosis
    assert found.effective_dof == pytest.approx(sum(block.effective_dof for block in found.blocks.values()))
    last = next(line for line in str(found).splitlines() if line.startswith("all"))
    assert f"{found.effective_dof:.3g}" in last and f"{found.stationarity.ratio:.3g}" in last


def test_an_ensemble_is_diagnosed_model_by_model():
    other = model()
    with torch.no_grad():
        other[0].weight.mul_(3.0)
    influence = TorchComposableInfluence(model(), nn.CrossEntropyLoss(), hw.Ekfac(), checkpoints=[model(), other]).fit(
        TRAIN
    )
    found, alone = influence.attribute(TRAIN, QUERY).diagnosis, fitted(hw.Ekfac()).attribute(TRAIN, QUERY).diagnosis
    for name, block in alone.blocks.items():
        assert_same(found.blocks[f"0/{name}"].stationarity, block.stationarity)
        assert found.blocks[f"0/{name}"].effective_dof == pytest.approx(block.effective_dof)
        assert found.blocks[f"1/{name}"].effective_dof != pytest.approx(block.effective_dof)


def test_the_space_that_estimates_a_spectrum_is_the_krylov_space():
    operator = DiagonalOperator(torch.arange(1.0, 31.0).double())
    space = KrylovSpace(operator, torch.ones(1, 30, dtype=torch.float64))
    for _ in range(30):
        space.extend()
    values, vectors, _ = space.ritz()
    np.testing.assert_allclose(values, np.arange(1.0, 31.0), rtol=1e-9)
    np.testing.assert_allclose(vectors[0] ** 2 * 30, np.ones(30), rtol=1e-6)
