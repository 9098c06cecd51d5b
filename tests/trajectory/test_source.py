"""SOURCE is the closed form where curvature is constant, and lies near the exact derivative where it is not."""

import numpy as np
import pytest
import torch
from recorded_trainings import off
from small_trainings import adamw, draw, sgd, training
from torch import nn

import headwater as hw
from headwater.errors import InvalidSetting, StaleFit
from headwater.trajectory.functions import function_of
from headwater.trajectory.replay import Replay
from headwater.trajectory.torch.steps import TorchTraining

RATE, MOMENTUM, STEPS = 0.05, 0.5, 40


def linear():
    torch.manual_seed(0)
    return nn.Linear(4, 1).double()


def quadratic(folder, optimizer, steps=STEPS, keep="all"):
    """Full batches on a linear model with a squared error: its curvature is constant."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(12, 4, generator=generator, dtype=torch.float64)
    y = x @ torch.tensor([[1.0], [-2.0], [0.5], [0.0]], dtype=torch.float64) + 0.3
    model = linear()
    optimizer = optimizer(model.parameters())
    with hw.record(model, optimizer, folder, keep=keep) as r:
        for _ in range(steps):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()
            r.step(range(12))
    query = torch.randn(3, 4, generator=generator, dtype=torch.float64), torch.zeros(3, 1, dtype=torch.float64)
    return model, (x, y), query


def hessian(x):
    ones = torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], dim=1)
    return (2 * ones.T @ ones / len(x)).numpy()


def row_grads(parameters, x, y):
    weight, bias = (torch.as_tensor(parameters[name]) for name in ("weight", "bias"))
    residual = x @ weight.T + bias - y
    return (2 * residual * torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], dim=1)).numpy()


def matrix_function(matrix, function):
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * function(values)) @ vectors.T


def closed_form(record, rows, query, segments, states, decay=0.0):
    """With dense matrices: every segment's exponentials, and the mean gradients of its states."""
    curvature = hessian(rows[0]) + decay * np.eye(5)
    q = row_grads(record.state(record.steps).parameters, *query)
    total = 0.0
    for start, stop, chosen in reversed(list(zip(segments[:-1], segments[1:], states, strict=True))):
        c = (stop - start) * RATE / (1 - MOMENTUM)
        answer = matrix_function(curvature, lambda s, c=c: -np.expm1(-c * s) / s)
        mean = np.mean([row_grads(record.state(step).parameters, *rows) for step in chosen], axis=0)
        total = total + q @ answer @ mean.T
        q = q @ matrix_function(curvature, lambda s, c=c: np.exp(-c * s))
    return total


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_source_equals_the_closed_form_on_a_quadratic(decay, tmp_path):
    def optimizer(p):
        return torch.optim.SGD(p, lr=RATE, momentum=MOMENTUM, weight_decay=decay)

    model, rows, query = quadratic(tmp_path / "r", optimizer)
    method = hw.Source(tmp_path / "r", segments=2, checkpoints=2, fisher="exact")
    influence = hw.Influence(model, "mse", method, blocks="full").fit(rows)
    found = influence.attribute(rows, query)
    record = hw.Trajectory(tmp_path / "r")
    expected = closed_form(record, rows, query, [0, 20, 40], [(5, 15), (25, 35)], decay)
    assert off(np.asarray(found), expected) < 1e-9
    removal = influence.attribute(rows, query, unit="removal")
    np.testing.assert_allclose(np.asarray(removal), np.asarray(found) / 12, rtol=1e-12)


def test_with_many_segments_source_comes_near_the_exact_derivative(tmp_path):
    """On a quadratic all that is left is that steps are taken for a flow."""
    model, rows, query = quadratic(tmp_path / "r", lambda p: torch.optim.SGD(p, lr=0.04), steps=24)
    exact = hw.Influence(model, "mse", hw.Unrolled(tmp_path / "r", removals=())).fit(rows).attribute(rows, query)
    gaps = []
    for segments in (1, 3, 8):
        method = hw.Source(tmp_path / "r", segments=segments, checkpoints=1, fisher="exact")
        found = hw.Influence(model, "mse", method, blocks="full").fit(rows).attribute(rows, query)
        gaps.append(off(np.asarray(found), np.asarray(exact)))
    assert gaps[0] > gaps[1] > gaps[2] and gaps[2] < 0.1


def test_adams_form_equals_dense_matrices(tmp_path):
    def optimizer(p):
        return torch.optim.AdamW(p, lr=0.02, weight_decay=0.1)

    model, rows, query = quadratic(tmp_path / "r", optimizer, steps=20)
    method = hw.Source(tmp_path / "r", segments=2, checkpoints=1, fisher="exact")
    found = hw.Influence(model, "mse", method, blocks="full").fit(rows).attribute(rows, query)
    record = hw.Trajectory(tmp_path / "r")
    q, total = row_grads(record.state(20).parameters, *query), 0.0
    for step in (15, 5):
        square = record.state(step).memory["square"]
        v = np.concatenate([square[name].reshape(-1) for name in ("weight", "bias")]) / (1 - 0.999**step)
        speed = 10 * 0.02 / (np.sqrt(v) + 1e-8)
        root = np.diag(speed**0.5)
        m = root @ hessian(rows[0]) @ root + 10 * 0.02 * 0.1 * np.eye(5)
        grads = row_grads(record.state(step).parameters, *rows)
        total = total + q @ root @ matrix_function(m, lambda s: -np.expm1(-s) / s) @ root @ grads.T
        q = q @ root @ matrix_function(m, lambda s: np.exp(-s)) @ np.linalg.inv(root)
    assert off(np.asarray(found), total) < 1e-8


@pytest.mark.parametrize("optimizer", [pytest.param(sgd, marks=pytest.mark.slow), adamw])
def test_source_ranks_rows_as_the_exact_derivative_does(optimizer, tmp_path):
    what = training("mlp", optimizer, steps=20, falling=False)
    model = what.run(recorder=lambda m, o: hw.record(m, o, tmp_path / "r", keep="all"))
    rows, query = (what.x, what.y), draw("mlp", 4, 9)
    found = [
        np.asarray(hw.Influence(model, "cross_entropy", method).fit(rows).attribute(rows, query)).ravel()
        for method in (hw.Source(tmp_path / "r"), hw.Unrolled(tmp_path / "r", removals=()))
    ]
    assert np.corrcoef(*found)[0, 1] > 0.5


def test_scores_in_a_folder_are_those_in_memory(tmp_path):
    what = training("mlp", sgd)
    model = what.run(recorder=lambda m, o: hw.record(m, o, tmp_path / "r", keep="all"))
    rows, query = (what.x, what.y), draw("mlp", 4, 9)
    influence = hw.Influence(model, "cross_entropy", hw.Source(tmp_path / "r")).fit(rows)
    memory = influence.attribute(rows, query)
    for _ in range(2):
        stored = influence.attribute(rows, query, store=tmp_path / "s")
        np.testing.assert_allclose(np.asarray(stored), np.asarray(memory), rtol=1e-12)
    top = influence.top(rows, query, 2, queries_as="mean")
    assert top.helpful_scores[0, 0] == pytest.approx(np.asarray(memory).mean(0).max())


def test_clipping_that_the_record_does_not_state_is_found_by_taking_some_steps_again(tmp_path, monkeypatch):
    what = training("mlp", sgd, clip=0.3)
    model = what.run(recorder=lambda m, o: hw.record(m, o, tmp_path / "r"))  # the clipping is not said
    rows = what.x, what.y
    with pytest.raises(StaleFit, match=r"state before step 1: 0\.weight\[\d+\] is .* and was .*clipping"):
        hw.Influence(model, "cross_entropy", hw.Source(tmp_path / "r", segments=1)).fit(rows)
    taken, gradient = [], TorchTraining.gradient
    monkeypatch.setattr(TorchTraining, "gradient", lambda *a: (taken.append(1), gradient(*a))[1])
    hw.Influence(model, "cross_entropy", hw.Source(tmp_path / "r", segments=1, replay=False)).fit(rows)
    assert not taken


def test_the_steps_that_are_taken_again_have_about_as_many_rows_as_there_are(tmp_path, monkeypatch):
    """Of 60 steps of 7 rows: the first, and of the stretches those that fit, the last before others."""
    what = training("mlp", sgd, steps=60)
    model = what.run(recorder=lambda m, o: hw.record(m, o, tmp_path / "r"))
    taken, forward = [], Replay.forward
    monkeypatch.setattr(Replay, "forward", lambda self, s, number: (taken.append(number), forward(self, s, number))[1])
    influence = hw.Influence(model, "cross_entropy", hw.Source(tmp_path / "r", segments=1)).fit((what.x, what.y))
    assert taken == [0]  # of 20 rows; with it, no longer stretch fits
    taken.clear()
    assert influence.replay().verify(rows=7 * 18) == 15
    assert taken == [0, *range(49, 60), 1, 2, 3]


def test_a_status_says_which_states_and_rates_the_segments_have(tmp_path):
    what = training("mlp", sgd)
    model = what.run(recorder=lambda m, o: hw.record(m, o, tmp_path / "r", keep="all"))
    influence = hw.Influence(model, "cross_entropy", hw.Source(tmp_path / "r", segments=2)).fit((what.x, what.y))
    said = str(influence.status)
    assert "14 steps, 15 states kept" in said and "20 rows held" in said and "damping" not in said
    assert "0 to 6" in said and "2, 5" in said and "7 to 13" in said


def test_a_segment_without_a_kept_state_is_refused(tmp_path):
    what = training("mlp", sgd)
    model = what.run(recorder=lambda m, o: hw.record(m, o, tmp_path / "r", keep="log"))
    with pytest.raises(InvalidSetting, match="keep='all'"):
        hw.Influence(model, "cross_entropy", hw.Source(tmp_path / "r", segments=8)).fit((what.x, what.y))


@pytest.mark.parametrize("settings", [{"segments": 0}, {"checkpoints": 1.5}, {"fisher": "some"}])
def test_settings_that_mean_nothing_are_refused(settings):
    with pytest.raises(InvalidSetting):
        hw.Source("nowhere", **settings)


def test_a_function_of_a_matrix_needs_its_products_alone():
    generator = np.random.default_rng(0)
    half = generator.normal(size=(30, 30))
    matrix, vectors = half @ half.T, generator.normal(size=(3, 30))
    vectors[1] = 0.0
    vectors[2] = np.linalg.eigh(matrix)[1][:, 0]  # its space is exhausted at once
    found, change = function_of(lambda v: v @ matrix, vectors, lambda s: np.exp(-s / 10))
    assert off(found, vectors @ matrix_function(matrix, lambda s: np.exp(-s / 10))) < 1e-10 and change == 0.0
    _, change = function_of(lambda v: v @ matrix, vectors, lambda s: np.exp(-s), steps=4)
    assert change > 0
