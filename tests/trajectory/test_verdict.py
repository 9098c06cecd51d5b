"""Scores of a rough training say so, and what would help; those of a smooth one do not."""

import numpy as np
import pytest
import torch
from small_trainings import MAKE, draw, seeded, sgd, training
from torch import nn

import headwater as hw
from headwater.errors import RoughForecast
from headwater.trajectory.verdict import ROUGH, SMOOTH, Verdict


def kinked() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3))


def steep(parameters):
    return torch.optim.SGD(parameters, lr=0.9, momentum=0.9)


def influence_of(what, folder, **settings):
    model = what.run(recorder=lambda m, o: hw.record(m, o, folder))
    return hw.Influence(model, "cross_entropy", hw.Unrolled(folder, **settings)).fit((what.x, what.y))


def test_a_smooth_training_forecasts_and_has_no_warning(tmp_path):
    what = training("mlp", sgd, n=40).changed(optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9))
    influence = influence_of(what, tmp_path / "r", removals=(0.025, 0.05))
    scores = influence.attribute((what.x, what.y), draw("mlp", 6, 9))
    verdict = influence.verdict
    assert list(verdict.errors) == [0.025, 0.05]
    assert verdict.errors[0.025] < 0.3 and verdict.metasmoothness > 0.9
    assert verdict.precision is None  # it is in float64
    assert not scores.diagnosis.doubts and "Smooth" in str(verdict)


def test_a_rough_training_is_called_rough_and_told_what_would_help(tmp_path):
    what = training("mlp", steep, n=40, steps=60, falling=False).changed(make=seeded(kinked))
    influence = influence_of(what, tmp_path / "r")
    with pytest.warns(RoughForecast, match=r"GELU.*learning rate.*batches"):
        scores = influence.attribute((what.x, what.y), draw("mlp", 6, 9), store=tmp_path / "s")
    error = influence.verdict.errors[0.01]
    assert error > ROUGH or influence.verdict.metasmoothness < SMOOTH
    assert "WORRYING: training was rough" in str(scores.diagnosis)
    with pytest.warns(RoughForecast, match="rough"):  # as it was found, without taking training again
        influence.attribute((what.x, what.y), draw("mlp", 6, 9), store=tmp_path / "s")


def test_the_error_is_that_of_training_without_the_rows(tmp_path):
    what = training("mlp", sgd, n=20)
    influence = influence_of(what, tmp_path / "r", removals=(0.05,), replays=1)
    query = draw("mlp", 3, 9)
    tau = -np.asarray(influence.attribute((what.x, what.y), query, unit="removal"))
    seen = np.unique(hw.Trajectory(tmp_path / "r").rows)
    (out,) = np.random.default_rng(0).choice(seen, 1, replace=False)
    times = torch.ones(20, dtype=torch.float64)
    times[out] = 0
    losses = [what.loss(what.run(t)(query[0]), query[1], reduction="none").detach().numpy() for t in (times, None)]
    change = losses[0] - losses[1]
    expected = np.median(np.abs(change + tau[:, out]) / np.abs(change))
    assert influence.verdict.errors[0.05] == pytest.approx(expected, rel=1e-8)


def test_float32_is_compared_with_float64(tmp_path):
    what = training("mlp", sgd)
    single = what.changed(make=lambda: seeded(MAKE["mlp"])().float(), x=what.x.float())
    influence = influence_of(single, tmp_path / "r")
    x, y = draw("mlp", 3, 9)
    influence.attribute((single.x, single.y), (x.float(), y))
    assert 0.9999 < influence.verdict.precision <= 1.0 + 1e-12


def test_a_verdict_names_what_is_over_its_limit():
    assert not Verdict({0.01: 0.5}, 0.8, 0.99).doubts
    assert "0.01 of the rows" in Verdict({0.01: 0.7, 0.05: 0.1}, 0.8).doubts[0]
    assert "cosine of 0.60" in Verdict({0.01: 0.1}, 0.6).doubts[0]
    assert "float32 or float64" in Verdict({}, None, 0.9).doubts[0]
    assert Verdict({0.01: float("inf")}).doubts and Verdict({0.01: float("nan")}).doubts


def test_no_verdict_is_made_where_none_is_asked_for(tmp_path):
    what = training("mlp", sgd)
    influence = influence_of(what, tmp_path / "r", removals=())
    influence.attribute((what.x, what.y), draw("mlp", 2, 9))
    assert influence.verdict is None
