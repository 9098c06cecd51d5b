"""The damping that is chosen is the one whose scores forecast retraining best, and it says how sure it is."""

import numpy as np
import pytest
import torch

import headwater as hw
from headwater.errors import InvalidInput, InvalidSetting, NonFiniteValue, ShapeMismatch
from headwater.evaluate.bank import retrain
from headwater.evaluate.calibration import choose_damping
from headwater.evaluate.lds import forecast, lds
from headwater.torch import TorchBatch, TorchComposableInfluence

N, Q, M = 30, 7, 8
rng = np.random.default_rng(3)
X = torch.from_numpy(rng.standard_normal((N + Q, 5)))
Y = torch.from_numpy(rng.integers(3, size=N + Q))
TRAIN = [(X[:20], Y[:20]), (X[20:N], Y[20:N])]
QUERY = [(X[N : N + 4], Y[N : N + 4]), (X[N + 4 :], Y[N + 4 :])]
KEEP = np.stack([rng.permutation(N) < N // 2 for _ in range(M)])
OUTPUTS = rng.standard_normal((M, 2, Q))
OUTPUTS[3:, 1] = np.nan


def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3)).double()


def influence(method=None, **options):
    options = {"blocks": "layer"} | options
    return TorchComposableInfluence(model(), torch.nn.CrossEntropyLoss(), method or hw.Ekfac(), **options).fit(TRAIN)


METHODS = {
    "direct": (hw.Direct(), "full"),
    "dual": (hw.Dual(), "full"),
    "cg": (hw.Cg(tolerance=1e-10), "full"),
    "block-krylov": (hw.BlockKrylov(tolerance=1e-10), "full"),
    "kfac": (hw.Kfac(), "layer"),
    "ekfac": (hw.Ekfac(), "layer"),
    "ekfac, rank 2": (hw.Ekfac(rank=2), "layer"),
    "nystroem": (hw.Nystroem(rank=6), "full"),
    "arnoldi": (hw.Arnoldi(rank=6), "full"),
    "datainf": (hw.DataInf(), "layer"),
    "logra": (hw.LoGra(dimension=3), "layer"),
    "lorif": (hw.LoRif(dimension=3), "layer"),
    "trak": (hw.Trak(dimension=8), "full"),
    "trak, exact": (hw.Trak(dimension=None), "full"),
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.filterwarnings("ignore::headwater.errors.NotConverged")
def test_the_figures_along_the_path_are_the_lds_of_the_scores(name):
    method, blocks = METHODS[name]
    found = influence(method, blocks=blocks)
    dampings = [hw.relative(amount) for amount in (0.1, 1.0, 10.0)]
    measured = found.calibrate(TRAIN, QUERY, (KEEP, OUTPUTS), dampings=dampings).calibration.measured
    for damping, figure in zip(dampings, measured, strict=True):
        scores = np.asarray(found.with_damping(damping).attribute(TRAIN, QUERY))
        assert figure == pytest.approx(lds(scores, KEEP, OUTPUTS, resamples=0).raw.value, abs=1e-9)


def test_the_right_damping_is_found_from_a_handful_of_retrained_models(tmp_path):
    """Outputs are what the scores at one damping forecast, and noise."""
    right = hw.relative(3.1622776602)
    found = influence()
    scores = np.asarray(found.with_damping(right).attribute(TRAIN, QUERY))

    def measure(rows, seed):
        mask = np.zeros((1, N), bool)
        mask[0, rows] = True
        noise = np.random.default_rng(seed).standard_normal(Q)
        return forecast(scores, mask)[0] + 0.01 * scores.std() * noise

    bank = retrain(tmp_path / "b", measure, rows=N, queries=Q, recipe={}, subsets=10, repeated=0, progress=False)
    chosen = found.calibrate(TRAIN, QUERY, bank)
    assert abs(np.log10(chosen.damping["0"].factor / 3.1622776602)) < 0.6  # one step of the path
    calibration = chosen.calibration
    assert calibration.interval[0] <= 3.1622776602 <= calibration.interval[1]
    assert calibration.plateau[0] <= 3.1622776602 <= calibration.plateau[1]
    assert calibration.held_out > 0.95
    assert not calibration.at_an_end
    assert "subsets of the rows, 10 retrained models" in str(calibration)
    at_once = found.calibrate(TRAIN, QUERY, measure, subsets=10)
    assert at_once.calibration.chosen == calibration.chosen
    assert found.calibration is None
    assert chosen.with_damping(0.1).calibration is None


def test_rows_and_queries_with_ids_are_found_in_the_bank_in_any_order():
    def mixed(x, y):
        order = np.random.default_rng(0).permutation(len(x))
        return [TorchBatch(x[some], y[some], ids=torch.from_numpy(some.copy())) for some in (order[::2], order[1::2])]

    found, train, query = influence(), mixed(X[:N], Y[:N]), mixed(X[N:], Y[N:])
    plain = found.calibrate(TRAIN, QUERY, (KEEP, OUTPUTS)).calibration
    calibrated = found.calibrate(train, query, (KEEP, OUTPUTS))
    assert calibrated.calibration.measured == pytest.approx(plain.measured)
    scores = calibrated.attribute(train, query)
    at = list(calibrated.calibration.measured)[list(calibrated.calibration.path).index(scores.calibration.chosen["0"])]
    assert lds(scores, KEEP, OUTPUTS, resamples=0).raw.value == pytest.approx(at, abs=1e-9)
    assert lds(np.asarray(scores), KEEP, OUTPUTS, resamples=0).raw.value != pytest.approx(at, abs=1e-3)


def test_how_rows_come_in_batches_changes_nothing():
    found = influence()
    plain = found.calibrate(TRAIN, QUERY, (KEEP, OUTPUTS)).calibration
    uneven = [(X[a:b], Y[a:b]) for a, b in ((0, 1), (1, 18), (18, N))]
    queries = [(X[k : k + 1], Y[k : k + 1]) for k in range(N, N + Q)]
    other = found.calibrate(uneven, queries, (KEEP, OUTPUTS)).calibration
    assert other.measured == pytest.approx(plain.measured, abs=1e-9)
    assert other.chosen == plain.chosen


def test_the_evidence_puts_the_damping_where_it_equals_degrees_of_freedom_over_squared_weights():
    dampings = [hw.relative(float(amount)) for amount in np.logspace(-6, 6, 200)]
    found = influence(hw.Direct("ggn"), blocks="full").calibrate(TRAIN, dampings=dampings)
    weights = torch.cat([p.detach().flatten() for p in found.model.parameters()])
    damping = found.absolute_damping["full"]
    eigenvalues = np.linalg.eigvalsh(found.curvature["full"].dense(weights))
    expected = (eigenvalues / (eigenvalues + damping)).sum() / (N * float(weights @ weights))
    assert damping == pytest.approx(expected, rel=2e-2)
    assert "no retraining" in str(found.calibration)
    with pytest.raises(InvalidSetting, match="spectrum"):
        influence(hw.Cg(), blocks="full").calibrate(TRAIN)


def path_of(shares, outputs, **options):
    return choose_damping([1.0, 10.0, 100.0], shares, outputs, **options)


def test_blocks_get_dampings_of_their_own_only_where_held_out_subsets_agree():
    truth = np.random.default_rng(0).standard_normal((2, 20, 50))
    wrong = np.random.default_rng(1).standard_normal((4, 20, 50)) * 5
    shares = {"a": np.stack([truth[0], wrong[0], wrong[1]]), "b": np.stack([wrong[2], wrong[3], truth[1]])}
    found = path_of(shares, truth.sum(0)[:, None], by_block=True)
    assert found.chosen == {"a": 1.0, "b": 100.0}
    assert found.held_out > 0.9 > found.common
    noise = np.random.default_rng(2).standard_normal((2, 3, 20, 50))
    same = {"a": np.stack([truth[0]] * 3) + 0.1 * noise[0], "b": np.stack([truth[1]] * 3) + 0.1 * noise[1]}
    alike = path_of(same, truth.sum(0)[:, None], by_block=True)
    assert len(set(alike.chosen.values())) == 1 or alike.held_out > alike.common
    one = {"a": np.stack([truth[0], wrong[0], wrong[1]]), "b": np.stack([truth[1], wrong[2], wrong[3]])}
    together = path_of(one, truth.sum(0)[:, None], by_block=True)
    assert together.chosen == {"a": 1.0, "b": 1.0}
    assert "one damping for all blocks" in str(together)


def test_a_flat_optimum_and_one_at_the_end_are_said():
    truth = np.random.default_rng(0).standard_normal((12, 40))
    noise = np.random.default_rng(1).standard_normal((3, 12, 40))
    flat = path_of({"a": truth + 1e-9 * noise}, truth[:, None])
    assert flat.plateau == (1.0, 100.0)
    assert "flat (2.0 decades)" in flat.flatness
    steep = path_of({"a": np.stack([noise[0], truth + 3 * noise[1], truth])}, truth[:, None])
    assert steep.at_an_end and "end of the path" in str(steep)
    assert "sharp" in steep.flatness


def test_queries_whose_output_never_changes_are_counted():
    outputs = OUTPUTS.copy()
    outputs[:, :, 2] = 1.0
    outputs[3:, 1] = np.nan
    found = influence().calibrate(TRAIN, QUERY, (KEEP, outputs)).calibration
    assert "1 of 7 queries have the same output" in str(found)
    assert "4 at a time, which reads low by 1 in 5" in str(found)


def test_a_new_fit_forgets_the_calibration():
    found = influence().calibrate(TRAIN, QUERY, (KEEP, OUTPUTS))
    assert found.calibration is not None and found.fit(TRAIN).calibration is None


def test_a_damping_that_was_left_out_is_not_chosen():
    truth = np.random.default_rng(0).standard_normal((12, 40))
    missing = np.stack([np.full_like(truth, np.nan), truth, truth])
    found = path_of({"a": missing}, truth[:, None])
    assert found.chosen["a"] > 1.0 and np.isnan(found.measured[0])
    assert "nan" not in str(found)


def test_indefinite_curvature_ends_the_path():
    found = influence(hw.Direct("hessian"), blocks="full", damping=hw.relative(1e3))
    path = [hw.relative(amount) for amount in (1e-3, 1e3, 1e4)]
    notes = found.calibrate(TRAIN, QUERY, (KEEP, OUTPUTS), dampings=path).calibration.notes
    assert "no damping of 0.001 or less was tried" in notes[0]


def test_what_does_not_fit_together_is_refused():
    found = influence()
    for bank, query, error, what in (
        ((KEEP[:, :-1], OUTPUTS), QUERY, InvalidInput, "29 rows, and the train loader has 30"),
        ((KEEP, OUTPUTS[:, :, :-1]), QUERY, InvalidInput, "6 queries, and the query loader has 7"),
        ((KEEP, OUTPUTS), None, InvalidInput, "query_loader is None"),
        ((KEEP.astype(float), OUTPUTS), QUERY, InvalidInput, "mask"),
        ((KEEP[:2], OUTPUTS[:2]), QUERY, InvalidInput, "at least 3"),
        (lambda rows, seed: np.full(Q, np.nan), QUERY, NonFiniteValue, "subset 0"),
        (lambda rows, seed: np.zeros(Q - 1), QUERY, ShapeMismatch, r"subset 0 are \(6,\)"),
        ((KEEP, np.ones_like(OUTPUTS)), QUERY, InvalidInput, "same output on every subset"),
        (None, QUERY, InvalidInput, "no bank"),
    ):
        with pytest.raises(error, match=what):
            found.calibrate(TRAIN, query, bank)
    for dampings in ([0.1], [0.1, 0.1], [0.0, 0.1], []):
        for bank in ((TRAIN, QUERY, (KEEP, OUTPUTS)), (TRAIN,)):
            with pytest.raises(InvalidSetting, match="dampings are"):
                found.calibrate(*bank, dampings=dampings)
    with pytest.raises(InvalidSetting, match="all"):
        found.calibrate(TRAIN, QUERY, (KEEP, OUTPUTS), dampings=[0.1, hw.relative(1.0)])
    with pytest.raises(InvalidSetting, match="no damping to calibrate"):
        influence(hw.GradDot()).calibrate(TRAIN, QUERY, (KEEP, OUTPUTS))
    with pytest.raises(ShapeMismatch, match="forecasts of 'a'"):
        path_of({"a": np.zeros((2, 8, 7))}, OUTPUTS)
    with pytest.raises(InvalidInput, match="ascending"):
        choose_damping([1.0, 1.0], {"a": np.zeros((2, 8, 7))}, OUTPUTS)


@pytest.mark.filterwarnings("ignore::headwater.errors.NotConverged")
def test_dear_dampings_are_left_out_once_the_forecast_has_fallen():
    found = influence(hw.Cg(tolerance=1e-8), blocks="full")
    scores = np.asarray(found.with_damping(hw.relative(1e4)).attribute(TRAIN, QUERY))
    outputs = forecast(scores, KEEP)[:, None]
    calibration = found.calibrate(TRAIN, QUERY, (KEEP, outputs)).calibration
    assert np.isnan(calibration.measured[0]) and "dear to solve" in str(calibration)


def test_scores_carry_their_calibration_to_the_disk_and_back(tmp_path):
    found = influence()
    assert found.attribute(TRAIN, QUERY).calibration is None
    for chosen in (found.calibrate(TRAIN, QUERY, (KEEP, OUTPUTS), by_block=True), found.calibrate(TRAIN)):
        scores = chosen.attribute(TRAIN, QUERY)
        assert str(scores.calibration) == str(chosen.calibration)
        path = tmp_path / str(len(chosen.calibration.measured))
        scores.save(path)
        assert hw.Scores.open(path).calibration == chosen.calibration
