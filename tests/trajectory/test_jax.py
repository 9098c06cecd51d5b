"""JAX gives the numbers of torch, from a record of its own."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from jax_models import weights
from recorded_trainings import off
from small_trainings import adamw, draw, sgd, training

import headwater as hw
from headwater.errors import AlreadySaved, InvalidInput, InvalidSetting, StaleFit, UnsupportedModel
from headwater.jax import cross_entropy
from headwater.trajectory.jax.trainer import shuffled, train_recorded
from headwater.trajectory.optimizers import AdamW, Sgd

CURVATURES = ["hessian", pytest.param("ggn", marks=pytest.mark.slow), "fisher", None]


def apply(params, x):
    hidden = jax.nn.gelu(x @ params["0.weight"].T + params["0.bias"], approximate=False)
    return hidden @ params["2.weight"].T + params["2.bias"]


def objective(params, x, y):
    return cross_entropy(apply(params, x), y)


def scores_of(model, loss, method, rows, query):
    return np.asarray(hw.Influence(model, loss, method).fit(rows).attribute(rows, query))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("curvature", CURVATURES)
def test_jax_equals_torch(optimizer, curvature, tmp_path):
    """One record, of torch, swept by both."""
    what = training("mlp", {"sgd": sgd, "adamw": adamw}[optimizer], steps=6, clip=0.5)
    model = what.run(recorder=lambda m, o: hw.record(m, o, tmp_path / "r", clip=0.5))
    method = hw.Unrolled(tmp_path / "r", curvature=curvature, removals=())
    rows, query = (what.x, what.y), draw("mlp", 3, 9)
    expected = scores_of(model, "cross_entropy", method, rows, query)
    own = [tuple(np.asarray(t) for t in pair) for pair in (rows, query)]
    found = scores_of((apply, weights(model)), "cross_entropy", method, *own)
    assert off(found, expected) < 1e-10


def loop(folder, optimizer, settings, steps=9, start=0, **options):
    """With optax, and a function of one's own."""
    x, y = (np.asarray(t) for t in draw("mlp", 20, 0))
    params = weights(training("mlp").make())
    state = optimizer.init(params)
    step = jax.jit(lambda p, s, x, y: optimizer.update(jax.grad(objective)(p, x, y), s, p))
    with hw.record(params, settings, folder, **options) as r:
        for ids in shuffled(20, steps, 7, 3):
            updates, state = step(params, state, x[ids], y[ids])
            params = optax.apply_updates(params, updates)
            r.step(ids, params, state)
    return params, (x, y)


@pytest.mark.parametrize(
    "optimizer, settings",
    [
        (optax.sgd(0.2, momentum=0.9), Sgd(0.2, momentum=0.9)),
        pytest.param(
            optax.sgd(0.2, momentum=0.9, nesterov=True),
            Sgd(0.2, momentum=0.9, nesterov=True),
            marks=pytest.mark.slow,
        ),
        pytest.param(optax.sgd(0.2), Sgd(0.2), marks=pytest.mark.slow),
        (optax.adamw(0.01, weight_decay=0.1), AdamW(0.01, weight_decay=0.1)),
    ],
    ids=["momentum", "nesterov", "plain", "adamw"],
)
def test_a_loop_with_optax_is_recorded_and_replayed(optimizer, settings, tmp_path):
    params, rows = loop(tmp_path / "r", optimizer, settings)
    query = tuple(np.asarray(t) for t in draw("mlp", 2, 9))
    method = hw.Unrolled(tmp_path / "r", removals=())
    assert np.isfinite(scores_of((apply, params), "cross_entropy", method, rows, query)).all()


def test_other_settings_than_those_of_the_loop_are_found_out(tmp_path):
    params, rows = loop(tmp_path / "r", optax.sgd(0.2, momentum=0.9), Sgd(0.1, momentum=0.9))
    influence = hw.Influence((apply, params), "cross_entropy", hw.Unrolled(tmp_path / "r", removals=())).fit(rows)
    with pytest.raises(StaleFit, match="replay does not come to"):
        influence.attribute(rows, rows)


class Forgetful:
    """A recorder that is not told of some steps."""

    def __init__(self, recorder, forgotten):
        self.recorder, self.forgotten, self.number = recorder, forgotten, -1

    def __enter__(self):
        self.recorder.__enter__()
        return self

    def __exit__(self, *error):
        self.recorder.__exit__(*error)

    def step(self, *said):
        self.number += 1
        if self.number not in self.forgotten:
            self.recorder.step(*said)


@pytest.mark.parametrize("forgotten", [4, 8])
def test_a_forgotten_step_is_noticed_at_once_by_adams_count_and_otherwise_by_fit_or_by_the_replay(
    forgotten, tmp_path, monkeypatch
):
    record = hw.record
    monkeypatch.setattr(hw, "record", lambda *given: Forgetful(record(*given), {forgotten}))
    if forgotten < 8:
        with pytest.raises(InvalidInput, match=r"counted 2 steps since the last r\.step.*before step 4 of the record"):
            loop(tmp_path / "a", optax.adamw(0.01), AdamW(0.01, weight_decay=1e-4))
    params, rows = loop(tmp_path / "r", optax.sgd(0.2, momentum=0.9), Sgd(0.2, momentum=0.9))
    influence = hw.Influence((apply, params), "cross_entropy", hw.Unrolled(tmp_path / "r", removals=()))
    with pytest.raises(StaleFit, match=r"r\.step was not told of"):
        influence.fit(rows).attribute(rows, rows)


def test_our_trainer_is_recorded_and_goes_on(tmp_path):
    x, y = (np.asarray(t) for t in draw("mlp", 20, 0))
    params = weights(training("mlp").make())
    options = {"steps": 9, "batch_size": 7, "seed": 3}
    settings = Sgd(lambda step: 0.2 / (1 + step), momentum=0.9)
    with pytest.raises(ZeroDivisionError):
        stopping = Sgd(lambda step: 0.2 / (1 + step) if step < 6 else 1 / 0, momentum=0.9)
        train_recorded(apply, params, cross_entropy, x, y, stopping, tmp_path / "r", **options)
    train_recorded(apply, params, cross_entropy, x, y, settings, tmp_path / "r", **options)
    train_recorded(apply, params, cross_entropy, x, y, settings, tmp_path / "whole", **options)
    assert hw.Trajectory(tmp_path / "r").digest == hw.Trajectory(tmp_path / "whole").digest
    with pytest.raises(AlreadySaved):
        train_recorded(apply, params, cross_entropy, x, y, settings, tmp_path / "r", **options)


def test_our_trainer_is_the_loop_with_optax(tmp_path):
    x, y = (np.asarray(t) for t in draw("mlp", 20, 0))
    start = weights(training("mlp").make())
    mine = train_recorded(apply, start, cross_entropy, x, y, AdamW(0.01), tmp_path / "a", steps=9, batch_size=7, seed=3)
    theirs, _ = loop(tmp_path / "b", optax.adamw(0.01, weight_decay=0.0), AdamW(0.01))
    for name, value in mine.items():
        np.testing.assert_allclose(value, theirs[name], rtol=1e-10, atol=1e-12)


def test_a_state_without_its_moments_is_refused(tmp_path):
    params = {"w": jnp.ones(2)}
    with (
        pytest.raises(InvalidInput, match="no mean"),
        hw.record(params, AdamW(0.1), tmp_path / "r") as r,
    ):
        r.step([0], params)


def test_what_is_no_training_is_refused(tmp_path):
    with pytest.raises(UnsupportedModel, match="no training that can be recorded"):
        hw.record({"w": jnp.ones(2)}, optax.sgd(0.1), tmp_path / "r")
    with pytest.raises(InvalidSetting, match="learning rate of step 0"):
        Sgd(float("nan")).rates(0)
    torch.manual_seed(0)
