"""Scores of a trajectory have the verbs, units, stores and pages of every influence."""

import copy
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from recorded_trainings import off
from small_trainings import adamw, central_differences, draw, retrained, sgd, training

import headwater as hw
from headwater.errors import BatchMismatch, InvalidSetting, NotFittedError, StaleFit
from headwater.evaluate import lds
from headwater.trajectory import sweep as sweeps
from headwater.trajectory.rules import Rule

QUIET = {"removals": ()}


def recorded(what, folder):
    return what.run(recorder=lambda m, o: hw.record(m, o, folder, clip=what.clip))


def influence_of(what, folder, **settings):
    model = recorded(what, folder) if not folder.exists() else what.run()
    found = hw.Influence(model, "cross_entropy", hw.Unrolled(folder, **QUIET, **settings))
    return found.fit((what.x, what.y))


@pytest.fixture
def case(tmp_path):
    what = training("mlp", adamw)
    return what, influence_of(what, tmp_path / "r"), draw("mlp", 4, 9)


def test_a_forecast_of_removal_is_minus_the_derivative_by_the_rows_weight(case):
    what, influence, query = case
    scores = influence.attribute((what.x, what.y), query, unit="removal")
    truth = central_differences(what, *query, [0, 3, 11])
    assert off(-np.asarray(scores)[:, [0, 3, 11]], truth) < 1e-6
    whole = influence.attribute((what.x, what.y), query)
    np.testing.assert_allclose(np.asarray(whole), 20 * np.asarray(scores), rtol=1e-12)


def test_rankings_are_of_the_same_scores(case):
    what, influence, query = case
    scores = influence.attribute((what.x, what.y), query)
    top = influence.top((what.x, what.y), query, 3)
    expected = np.argsort(-np.asarray(scores), axis=1)[:, :3]
    np.testing.assert_array_equal(top.helpful_ids, expected)


def test_queries_that_are_asked_as_one_have_the_mean_of_their_scores(case):
    what, influence, query = case
    scores = np.asarray(influence.attribute((what.x, what.y), query)).mean(0)
    top = influence.top((what.x, what.y), query, 2, queries_as="mean")
    np.testing.assert_allclose(top.helpful_scores[0], np.sort(scores)[::-1][:2], rtol=1e-9)


def test_rows_are_found_by_their_ids_whatever_their_order(case):
    what, influence, query = case
    scores = np.asarray(influence.attribute((what.x, what.y), query))
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    shuffled = [hw.Batch(what.x[rows], what.y[rows], ids=rows.numpy()) for rows in order.split(6)]
    again = influence.unfitted().fit(shuffled).attribute(shuffled, query)
    np.testing.assert_array_equal(again.train_ids, order.numpy())
    np.testing.assert_allclose(np.asarray(again), scores[:, order.numpy()], rtol=1e-10, atol=1e-14)


class Stopped(Exception):
    pass


def test_a_run_that_was_killed_goes_on_to_the_same_bytes(case, tmp_path, monkeypatch):
    what, influence, query = case
    whole = np.asarray(influence.attribute((what.x, what.y), query))
    write, calls = sweeps._Swept.write, []

    def stopping(self, file):
        write(self, file)
        calls.append(self.step)
        if len(calls) == 2:
            raise Stopped

    with monkeypatch.context() as patched:
        patched.setattr(sweeps._Swept, "write", stopping)
        with pytest.raises(Stopped):
            influence.attribute((what.x, what.y), query, store=tmp_path / "s")
    taken, pull = [], Rule.pull
    monkeypatch.setattr(Rule, "pull", lambda *a, **k: (taken.append(1), pull(*a, **k))[1])
    scores = influence.attribute((what.x, what.y), query, store=tmp_path / "s")
    assert np.asarray(scores).tobytes() == whole.tobytes()
    assert len(taken) == calls[-1] < 14
    assert not (tmp_path / "s.sweep").exists()


def test_progress_knows_how_many_steps_there_are_also_in_groups_and_asked_as_one(case, monkeypatch):
    what, influence, query = case
    shown = []

    @contextmanager
    def bar(what, show, total=None, unit=""):
        done = []
        yield SimpleNamespace(update=lambda n=1: done.append(n))
        shown.append((what, total, sum(done)))

    monkeypatch.setattr("headwater.trajectory.influence.bar", bar)
    influence.attribute((what.x, what.y), query, progress=True)
    monkeypatch.setattr(sweeps.Sweep, "at_once", 3)
    influence.attribute((what.x, what.y), query, progress=True)
    influence.top((what.x, what.y), query, 1, queries_as="mean", progress=True)
    assert shown == [("training, backwards", steps, steps) for steps in (14, 28, 14)]


def test_a_status_says_what_there_is(case):
    _, influence, _ = case
    said = str(influence.status)
    assert "Unrolled(" in said and "14 steps, 5 states kept" in said and "20 rows held" in said
    assert "damping" not in said and "mean" not in said


def test_a_finished_run_is_read_without_a_sweep(case, tmp_path, monkeypatch):
    what, influence, query = case
    first = influence.attribute((what.x, what.y), query, store=tmp_path / "s")
    monkeypatch.setattr(sweeps.Sweep, "tau", None)
    again = influence.attribute((what.x, what.y), query, store=tmp_path / "s")
    np.testing.assert_array_equal(np.asarray(again), np.asarray(first))


def test_another_training_is_another_run(case, tmp_path):
    what, influence, query = case
    influence.attribute((what.x, what.y), query, store=tmp_path / "s")
    other = influence_of(what.changed(order=4), tmp_path / "r2")
    with pytest.raises(hw.errors.InvalidInput):
        other.attribute((what.x, what.y), query, store=tmp_path / "s")


def test_without_curvature_each_step_by_itself_is_tracin(tmp_path):
    """Full batches: TracIn gives every row to every checkpoint."""
    rates = (0.3, 0.2, 0.1)
    x, y = draw("mlp", 12, 0)
    model = training("mlp").make()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    checkpoints = []
    with hw.record(model, optimizer, tmp_path / "r") as r:
        for rate in rates:
            checkpoints.append({name: p.clone() for name, p in model.state_dict().items()})
            optimizer.param_groups[0]["lr"] = rate
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            r.step(range(12))
    query = draw("mlp", 3, 9)
    method = hw.Unrolled(tmp_path / "r", curvature=None, at="step", removals=())
    found = hw.Influence(model, "cross_entropy", method).fit((x, y)).attribute((x, y), query)
    tracin = hw.Influence(model, "cross_entropy", hw.TracIn(rates), checkpoints=checkpoints).fit((x, y))
    np.testing.assert_allclose(np.asarray(found), np.asarray(tracin.attribute((x, y), query)), rtol=1e-10)

    method = hw.Unrolled(tmp_path / "r", curvature=None, removals=())
    final = hw.Influence(model, "cross_entropy", method).fit((x, y)).attribute((x, y), query)
    grads = hw.Influence(model, "cross_entropy", hw.GradDot()).source
    asked = grads.flat_grads(hw.Batch(*query))
    expected = sum(
        rate
        * asked
        @ hw.Influence(_at(model, state), "cross_entropy", hw.GradDot()).source.flat_grads(hw.Batch(x, y)).T
        for rate, state in zip(rates, checkpoints, strict=True)
    )
    np.testing.assert_allclose(np.asarray(final), expected.numpy(), rtol=1e-10)


def _grads(model, x, y):
    return hw.Influence(model, "cross_entropy", hw.GradDot()).source.flat_grads(hw.Batch(x, y))


def _at(model, state):
    other = copy.deepcopy(model)
    other.load_state_dict(state)
    return other


def test_one_step_is_grad_dot_times_the_rate(tmp_path):
    x, y = draw("mlp", 12, 0)
    model = training("mlp").make()
    before = hw.Influence(_at(model, model.state_dict()), "cross_entropy", hw.GradDot()).fit((x, y))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    with hw.record(model, optimizer, tmp_path / "r") as r:
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        r.step(range(12))
    query = draw("mlp", 3, 9)
    method = hw.Unrolled(tmp_path / "r", curvature=None, at="step", removals=())
    found = hw.Influence(model, "cross_entropy", method).fit((x, y)).attribute((x, y), query)
    np.testing.assert_allclose(np.asarray(found), 0.3 * np.asarray(before.attribute((x, y), query)), rtol=1e-10)


def test_scores_forecast_retraining_with_the_same_seed(case):
    what, influence, query = case
    scores = influence.attribute((what.x, what.y), query)
    keep = np.random.default_rng(0).random((30, 20)) > 0.1
    outputs = np.stack([retrained(what, *query, torch.as_tensor(rows.astype(np.float64))) for rows in keep])
    assert lds(np.asarray(scores), keep, outputs[:, None]).raw.value > 0.9


def test_a_report_is_one_page(case, tmp_path):
    what, influence, query = case
    page = influence.report((what.x, what.y), query, tmp_path / "page.html")
    assert "Unrolled" in page.read_text()


def test_removing_a_group_is_the_sum_of_its_rows(case):
    what, influence, query = case
    single = influence.removal((what.x, what.y), query)
    groups = influence.removal((what.x, what.y), query, [[0, 3], [5]])
    np.testing.assert_allclose(groups, np.stack([single[:, 0] + single[:, 3], single[:, 5]], axis=1))


@pytest.mark.parametrize("verb", ["calibrate", "audit", "verify", "gradients", "factors", "save"])
def test_what_has_no_meaning_for_a_trajectory_is_refused(case, verb):
    _, influence, _ = case
    with pytest.raises(InvalidSetting, match="Scores of a trajectory have no"):
        getattr(influence, verb)([])


def test_some_rows_are_asked_about_themselves_under_their_ids(case):
    what, influence, _ = case
    some = [hw.Batch(what.x[2:4], what.y[2:4], ids=np.array([2, 3]))]
    own = np.diag(np.asarray(influence.attribute(some, (what.x[2:4], what.y[2:4]))))
    whole = np.asarray(influence.attribute((what.x, what.y), (what.x, what.y)))
    np.testing.assert_allclose(own, np.diag(whole)[2:4], rtol=1e-9)


def test_a_loader_without_the_rows_that_were_trained_on_is_refused(tmp_path):
    what = training("mlp", adamw)
    model = recorded(what, tmp_path / "r")
    influence = hw.Influence(model, "cross_entropy", hw.Unrolled(tmp_path / "r"))
    with pytest.raises(BatchMismatch, match=r"training saw row .* does not have"):
        influence.fit((what.x[:9], what.y[:9]))
    with pytest.raises(NotFittedError):
        influence.attribute((what.x, what.y), (what.x, what.y))


def test_a_model_that_is_not_where_training_ended_is_refused(tmp_path):
    what = training("mlp", adamw)
    recorded(what, tmp_path / "r")
    with pytest.raises(StaleFit, match=r"step 14\)"):
        hw.Influence(what.make(), "cross_entropy", hw.Unrolled(tmp_path / "r")).fit((what.x, what.y))


@pytest.mark.parametrize(
    "settings", [{"curvature": "gnn"}, {"at": "end"}, {"at": "step"}, {"removals": (2.0,)}, {"replays": 0}]
)
def test_settings_that_mean_nothing_are_refused(settings):
    with pytest.raises(InvalidSetting):
        hw.Unrolled("nowhere", **settings)


def test_a_measurement_takes_the_place_of_the_loss(tmp_path):
    what = training("mlp", sgd)
    model, query = recorded(what, tmp_path / "r"), draw("mlp", 3, 9)

    def logit(output, y):
        return output.gather(1, y[:, None])[:, 0]

    influence = hw.Influence(model, "cross_entropy", hw.Unrolled(tmp_path / "r", removals=()), measurement=logit)
    scores = influence.fit((what.x, what.y)).attribute((what.x, what.y), query, unit="removal")

    def trained(weight):
        times = torch.ones(20, dtype=torch.float64)
        times[3] += weight
        return logit(what.run(times)(query[0]), query[1]).detach().numpy()

    truth = (trained(1e-5) - trained(-1e-5)) / 2e-5
    assert off(-np.asarray(scores)[:, 3], truth) < 1e-6


@pytest.mark.parametrize("option", [{"normalise": "both"}, {"query_error": 0.1}])
def test_options_of_inverses_are_refused(case, option):
    what, influence, query = case
    with pytest.raises(InvalidSetting, match="Scores of a trajectory have no"):
        influence.attribute((what.x, what.y), query, **option)


def test_damping_is_refused_as_nothing_is_inverted(tmp_path):
    model = recorded(training("mlp", adamw), tmp_path / "r")
    with pytest.raises(InvalidSetting, match=r"damping is 0.1, and Unrolled inverts nothing"):
        hw.Influence(model, "cross_entropy", hw.Unrolled(tmp_path / "r"), damping=0.1)
