"""What a row did through each block of parameters, and what it did to itself."""

import numpy as np
import pytest
import torch
from jax_models import weights
from recorded_trainings import off, recorded, sweep_of
from small_trainings import adamw, draw, retrained, sgd, training

import headwater as hw
from headwater.errors import InvalidSetting
from headwater.torch.batch import TorchBatch
from headwater.trajectory.sweep import Sweep

ROWS = [0, 3, 11]
BLOCKS = {"first": ("0.weight", "0.bias"), "last": ("2.weight", "2.bias")}


def influence_of(what, folder, method=hw.Unrolled, **options):
    model = what.run(recorder=lambda m, o: hw.record(m, o, folder, clip=what.clip))
    settings = {"removals": ()} if method is hw.Unrolled else {}
    return hw.Influence(model, "cross_entropy", method(folder, **settings, **options)).fit((what.x, what.y))


def retrained_by_block(what, x, y, names, times):
    """Each query's loss after a training in which the gradient of some parameters alone weighs rows otherwise."""
    model = what.make()
    optimizer = what.optimizer(model.parameters())
    for batches in what.ids():
        slopes = []
        for scale in (torch.ones_like(times), times):
            optimizer.zero_grad()
            for rows in batches:
                each = what.loss(model(what.x[rows]), what.y[rows], reduction="none")
                ((each * scale[rows]).mean() / len(batches)).backward()
            slopes.append({name: p.grad.clone() for name, p in model.named_parameters()})
        for name, p in model.named_parameters():
            p.grad = slopes[name in names][name]
        if what.clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), what.clip)
        optimizer.step()
    with torch.no_grad():
        return what.loss(model(x), y, reduction="none").numpy()


def differences_by_block(what, x, y, names, h=1e-5):
    columns = []
    for row in ROWS:
        ends = []
        for sign in (1, -1):
            times = torch.ones(len(what.x), dtype=torch.float64)
            times[row] += sign * h
            ends.append(retrained_by_block(what, x, y, names, times))
        columns.append((ends[0] - ends[1]) / (2 * h))
    return np.stack(columns, axis=1)


@pytest.mark.parametrize(
    "optimizer, fields", [(adamw, {"clip": 0.3}), pytest.param(sgd, {"batches": 2}, marks=pytest.mark.slow)]
)
def test_a_block_has_the_derivative_by_a_weight_in_its_gradient_alone(optimizer, fields, tmp_path):
    what = training("mlp", optimizer, falling=False, steps=8, **fields)
    x, y = draw("mlp", 4, 9)
    scores = influence_of(what, tmp_path / "r").attribute((what.x, what.y), (x, y), unit="removal", by_block=True)
    assert list(scores.by_block) == ["0", "2"]
    for found, names in zip(scores.by_block.values(), BLOCKS.values(), strict=True):
        assert off(-np.asarray(found)[:, ROWS], differences_by_block(what, x, y, names)) < 1e-6


@pytest.mark.parametrize(
    "settings",
    [
        {},
        pytest.param({"curvature": "ggn"}, marks=pytest.mark.slow),
        {"curvature": "fisher"},
        {"curvature": None},
        pytest.param({"curvature": None, "at": "step"}, marks=pytest.mark.slow),
    ],
    ids=lambda value: "-".join(map(str, value.values())) or "hessian",
)
def test_blocks_sum_to_the_whole(settings, tmp_path):
    what = training("mlp", adamw, steps=4)
    influence, query = influence_of(what, tmp_path / "r", **settings), draw("mlp", 3, 9)
    whole = influence.attribute((what.x, what.y), query)
    parts = influence.attribute((what.x, what.y), query, by_block=True)
    np.testing.assert_allclose(sum(map(np.asarray, parts.by_block.values())), np.asarray(whole), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(np.asarray(parts), np.asarray(whole), rtol=1e-9, atol=1e-12)
    assert all(np.abs(np.asarray(part)).max() > 1e-3 for part in parts.by_block.values())


def test_segments_have_blocks_that_sum_to_the_whole(tmp_path):
    what = training("mlp", sgd)
    influence, query = influence_of(what, tmp_path / "r", hw.Source, segments=2), draw("mlp", 3, 9)
    whole = influence.attribute((what.x, what.y), query)
    parts = influence.attribute((what.x, what.y), query, by_block=True)
    np.testing.assert_allclose(sum(map(np.asarray, parts.by_block.values())), np.asarray(whole), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("curvature", ["hessian", pytest.param("fisher", marks=pytest.mark.slow)])
def test_jax_has_the_blocks_of_torch(curvature, tmp_path):
    import jax

    what = training("mlp", adamw, steps=5)
    influence, query = influence_of(what, tmp_path / "r", curvature=curvature), draw("mlp", 3, 9)
    expected = influence.attribute((what.x, what.y), query, by_block=True).by_block

    def apply(params, x):
        hidden = jax.nn.gelu(x @ params["0.weight"].T + params["0.bias"], approximate=False)
        return hidden @ params["2.weight"].T + params["2.bias"]

    method = hw.Unrolled(tmp_path / "r", curvature=curvature, removals=())
    own, asked = (tuple(np.asarray(t) for t in pair) for pair in ((what.x, what.y), query))
    other = hw.Influence((apply, weights(what.run())), "cross_entropy", method, blocks="parameter").fit(own)
    found = other.attribute(own, asked, by_block=True).by_block
    for block, names in zip(expected.values(), BLOCKS.values(), strict=True):
        assert off(sum(np.asarray(found[name]) for name in names), np.asarray(block)) < 1e-10


def test_blocks_do_not_depend_on_groups_of_queries_and_are_stored(tmp_path, monkeypatch):
    what = training("mlp", adamw, steps=6)
    influence, query = influence_of(what, tmp_path / "r"), draw("mlp", 5, 9)
    whole = influence.attribute((what.x, what.y), query, by_block=True, store=tmp_path / "s")
    monkeypatch.setattr(Sweep, "at_once", 2)
    parts = influence.attribute((what.x, what.y), query, by_block=True)
    for name, block in parts.by_block.items():
        np.testing.assert_allclose(np.asarray(block), np.asarray(whole.by_block[name]), rtol=1e-9, atol=1e-12)
    monkeypatch.setattr(Sweep, "tau", None)
    again = influence.attribute((what.x, what.y), query, by_block=True, store=tmp_path / "s")
    np.testing.assert_array_equal(np.asarray(again), np.asarray(whole))


def test_a_sweep_by_block_takes_as_many_steps_as_one_of_the_whole(tmp_path, monkeypatch):
    from headwater.trajectory.torch import steps

    what = training("mlp", sgd, steps=6)
    sweep, calls = sweep_of(what, *recorded(what, tmp_path / "r")), []
    plain = steps.batched_vjp
    monkeypatch.setattr(steps, "batched_vjp", lambda *a, **k: (calls.append(1), plain(*a, **k))[1])
    batch = TorchBatch(*draw("mlp", 3, 9))
    counts = []
    for blocks in (None, tuple(BLOCKS.values())):
        calls.clear()
        Sweep(**{**sweep.__dict__, "blocks": blocks}).tau([batch])
        counts.append(len(calls))
    assert counts == [1 + 6, 1 + 6 * 3]  # one for the queries' gradients; of each step one, and one for each block


# Rows on themselves ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method, settings", [(hw.Unrolled, {}), (hw.Source, {"segments": 2})])
def test_influence_on_itself_is_the_diagonal(method, settings, tmp_path):
    what = training("mlp", adamw, steps=6)
    influence = influence_of(what, tmp_path / "r", method, **settings)
    own = influence.self_influence((what.x, what.y))
    whole = np.asarray(influence.attribute((what.x, what.y), (what.x, what.y)))
    np.testing.assert_allclose(own, np.diag(whole), rtol=1e-9, atol=1e-12)
    some = [hw.Batch(what.x[[3, 8]], what.y[[3, 8]], ids=np.array([3, 8]))]
    np.testing.assert_allclose(influence.self_influence(some), own[[3, 8]], rtol=1e-9)
    stored = influence.self_influence((what.x, what.y), store=tmp_path / "s")
    np.testing.assert_allclose(stored, own, rtol=1e-12)


def test_influence_on_itself_is_the_derivative_of_a_rows_own_loss_by_its_weight(tmp_path):
    what = training("mlp", adamw, steps=6)
    found = influence_of(what, tmp_path / "r").self_influence((what.x, what.y))
    seen = np.flatnonzero(found)[[0, 3, -1]]
    for row in seen:
        times = torch.ones(20, dtype=torch.float64)
        ends = []
        for h in (1e-5, -1e-5):
            times[row] = 1 + h
            ends.append(retrained(what, what.x[[row]], what.y[[row]], times)[0])
        expected = -(ends[0] - ends[1]) / 2e-5
        assert abs(found[row] / 20 - expected) < 1e-6 * abs(expected)


def test_influence_on_itself_says_what_it_would_cost_and_judges_nothing(tmp_path, monkeypatch):
    what = training("mlp", sgd, steps=6)
    model = what.run(recorder=lambda m, o: hw.record(m, o, tmp_path / "r"))
    influence = hw.Influence(model, "cross_entropy", hw.Unrolled(tmp_path / "r")).fit((what.x, what.y))
    with monkeypatch.context() as patched:
        patched.setattr(Sweep, "tau", None)
        with pytest.raises(InvalidSetting, match=r"20 rows .* about 25 trainings .*trainings=9 .*Give trainings=25"):
            influence.self_influence((what.x, what.y), trainings=9)
    influence.self_influence((what.x, what.y))
    assert influence.verdict is None


def test_directions_are_refused_as_a_rows_influence_on_itself_is_no_length(tmp_path):
    what = training("mlp", adamw)
    influence = influence_of(what, tmp_path / "r")
    with pytest.raises(InvalidSetting, match=r"no squared length.*may be negative.*self_influence\(rows\) yourself"):
        influence.attribute((what.x, what.y), draw("mlp", 2, 9), normalise="train")
