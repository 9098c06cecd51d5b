"""A training with dropout is taken again with the masks that it drew: each row's weight, all else as it was."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from recorded_trainings import off, recorded
from small_trainings import ByteGpt, adamw, central_differences, draw, seeded, sgd, training
from torch import nn
from torch.nn import functional as F  # noqa: N812

import headwater as hw
from headwater.errors import BatchMismatch, InvalidInput, StaleFit, UnsupportedModel
from headwater.trajectory.optimizers import Sgd
from headwater.trajectory.torch.importing import from_checkpoints
from headwater.trajectory.torch.steps import drawing, generator_state

ROWS = [0, 3, 11]


class DroppedGpt(ByteGpt):
    """With dropout in attention, by a function, and after it, by a module."""

    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.2)

    def forward(self, ids):
        x = self.drop(self.table(ids) + self.places(torch.arange(ids.shape[1])))
        q, k, v = (part[:, None] for part in self.qkv(self.norms[0](x)).chunk(3, dim=-1))
        p = 0.1 if self.training else 0.0
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=p)[:, 0])
        x = x + self.drop(self.down(F.gelu(self.up(self.norms[1](x)))))
        return self.norms[2](x) @ self.table.weight.T


def mlp():
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Dropout(0.3), nn.Linear(8, 3))


def dropped(kind, optimizer, **fields):
    """The same masks each time: the generator is seeded when a training begins. Between steps others draw from it."""
    plain = seeded({"mlp": mlp, "gpt": DroppedGpt}[kind])

    def make():
        model = plain()
        torch.manual_seed(5)
        return model

    def drawing(parameters):
        found = optimizer(parameters)
        found.register_step_post_hook(lambda *_: torch.rand(3))
        return found

    return training(kind, optimizer, **fields).changed(make=make, optimizer=drawing)


def in_eval(what, monkeypatch):
    """Queries are asked of a model in eval mode."""
    run = type(what).run
    monkeypatch.setattr(type(what), "run", lambda self, *a, **k: run(self, *a, **k).eval())


def scores_of(what, folder, curvature="hessian", rows=None):
    loss = lambda output, y: what.loss(output, y, reduction="none")  # noqa: E731
    model, record = recorded(what, folder)
    method = hw.Unrolled(record, curvature=curvature, removals=())
    rows = (what.x, what.y) if rows is None else rows
    influence = hw.Influence(model.eval(), loss, method).fit(rows)
    return influence, rows


@pytest.mark.parametrize(
    "kind, optimizer, fields",
    [("mlp", sgd, {"batches": 2, "clip": 0.3}), ("mlp", adamw, {}), ("gpt", adamw, {"steps": 6})],
    ids=["mlp-sgd", "mlp-adamw", "gpt"],
)
def test_the_derivative_equals_central_differences_with_the_same_masks(kind, optimizer, fields, tmp_path, monkeypatch):
    what = dropped(kind, optimizer, **fields)
    in_eval(what, monkeypatch)
    query = draw(kind, 3, 9)
    influence, rows = scores_of(what, tmp_path / "r")
    before = torch.get_rng_state()
    scores = np.asarray(influence.attribute(rows, query, unit="removal"))
    assert torch.equal(torch.get_rng_state(), before)
    truth = central_differences(what, *query, ROWS)
    assert off(-scores[:, ROWS], truth) < 1e-6


def test_rows_that_are_held_in_other_batches_give_the_same_scores(tmp_path):
    what = dropped("mlp", adamw, batches=2)
    influence, rows = scores_of(what, tmp_path / "r")
    query = draw("mlp", 3, 9)
    scores = np.asarray(influence.attribute(rows, query))
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    shuffled = [hw.Batch(what.x[some], what.y[some], ids=some.numpy()) for some in order.split(6)]
    again = np.asarray(influence.unfitted().fit(shuffled).attribute(shuffled, query))
    np.testing.assert_allclose(again, scores[:, order.numpy()], rtol=1e-10, atol=1e-14)


def test_queries_one_by_one_have_the_scores_of_all_together(tmp_path):
    influence, rows = scores_of(dropped("mlp", adamw), tmp_path / "r")
    x, y = draw("mlp", 3, 9)
    together = np.asarray(influence.attribute(rows, (x, y)))
    alone = [np.asarray(influence.attribute(rows, (x[k : k + 1], y[k : k + 1])))[0] for k in range(3)]
    np.testing.assert_allclose(alone, together, rtol=1e-10, atol=1e-14)


class Bag(nn.Module):
    """Rows of several vectors, as many as there are."""

    def __init__(self):
        super().__init__()
        self.each, self.drop, self.out = nn.Linear(4, 8), nn.Dropout(0.3), nn.Linear(8, 3)

    def forward(self, x):
        return self.out(self.drop(torch.tanh(self.each(x))).mean(1))


def bags(folder, asked):
    """An influence, and its rows in three batches, of widths 5, 5 and 7. asked: rows of each step."""
    torch.manual_seed(0)
    model = Bag().double()
    held = [hw.Batch(torch.randn(6, w, 4).double(), torch.arange(6) % 3) for w in (5, 5, 7)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    with hw.record(model, optimizer, folder) as r:
        for rows in asked:
            x = nn.utils.rnn.pad_sequence([held[k // 6].x[k % 6] for k in rows], batch_first=True)
            optimizer.zero_grad()
            F.cross_entropy(model(x), torch.tensor([k % 6 % 3 for k in rows])).backward()
            optimizer.step()
            r.step(rows)
    influence = hw.Influence(model.eval(), "cross_entropy", hw.Unrolled(folder, removals=()))
    return influence, held


def test_a_batch_is_put_together_from_those_that_its_rows_are_held_in(tmp_path):
    """Where they are of one form: another batch of another width is no hindrance."""
    steps = [[8, 2, 0, 11, 5], [17, 13, 16], [3, 7]]
    influence, held = bags(tmp_path / "r", steps)
    queries = [held[0].take(slice(0, 2))]
    scores = np.asarray(influence.fit(held).attribute(held, queries))
    whole = hw.Batch(torch.cat([held[0].x, held[1].x]), torch.cat([held[0].y, held[1].y]))
    again = np.asarray(influence.unfitted().fit([whole, held[2]]).attribute([whole, held[2]], queries))
    np.testing.assert_allclose(scores, again, rtol=1e-10, atol=1e-14)
    assert (scores[:, steps[0]] != 0).all()


def test_a_batch_of_rows_of_several_widths_is_refused_with_those(tmp_path):
    influence, held = bags(tmp_path / "r", [[0, 13]])
    with pytest.raises(BatchMismatch, match=r"several forms here \(x \(5, 4\), y \(\); x \(7, 4\), y \(\)\)"):
        influence.fit(held).attribute(held, held[:1])


@pytest.mark.parametrize("curvature", ["ggn", "fisher", None])
def test_other_curvatures_see_the_same_masks(curvature, tmp_path):
    """Of a linear model with a squared error the GGN is the Hessian, whatever is dropped."""
    what = dropped("mlp", sgd).changed(
        make=lambda: (torch.manual_seed(5), nn.Sequential(nn.Dropout(0.3), nn.Linear(6, 2)).double())[1],
        y=torch.randn(20, 2, generator=torch.Generator().manual_seed(4), dtype=torch.float64),
        loss=lambda o, y, reduction="mean": ((o - y) ** 2).sum(1) if reduction == "none" else ((o - y) ** 2).sum(),
    )
    found = []
    for number, kind in enumerate(("hessian", curvature)):
        influence, rows = scores_of(what.changed(), tmp_path / str(number), kind)
        found.append(np.asarray(influence.attribute(rows, (what.x[:3] + 1, what.y[:3]))))
    assert (off(found[1], found[0]) < 1e-12) == (curvature == "ggn")


def test_a_killed_training_goes_on_with_the_same_masks(tmp_path):
    what = dropped("mlp", adamw)
    _, whole = recorded(what, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        recorded(what.changed(stop=11), tmp_path / "r")
    _, record = recorded(what, tmp_path / "r", resume=True)
    assert record.digest == whole.digest


def test_the_verdict_and_source_take_the_same_masks(tmp_path):
    what = dropped("mlp", sgd)
    model, record = recorded(what, tmp_path / "r")
    rows = what.x, what.y
    influence = hw.Influence(model.eval(), "cross_entropy", hw.Unrolled(record, removals=(0.05,))).fit(rows)
    scores = influence.attribute(rows, draw("mlp", 3, 9))
    assert influence.verdict.errors[0.05] < 0.2 and np.isfinite(np.asarray(scores)).all()
    source = hw.Influence(model, "cross_entropy", hw.Source(record, segments=1)).fit(rows)
    assert np.isfinite(np.asarray(source.attribute(rows, draw("mlp", 3, 9)))).all()
    assert not any(module.training for module in model.modules())


def test_other_masks_than_those_of_the_record_are_refused(tmp_path, monkeypatch):
    what = dropped("mlp", sgd)
    influence, rows = scores_of(what, tmp_path / "r")
    monkeypatch.setattr(torch, "set_rng_state", lambda _: torch.manual_seed(6))
    with pytest.raises(StaleFit, match="replay does not come to"):
        influence.attribute(rows, rows)


def test_what_dropout_drew_is_known_call_by_call(tmp_path):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with hw.record(model, optimizer, tmp_path / "r") as r:
        small = r.bytes_for(1000)
        for _ in range(2):
            model(torch.ones(2, 6)).sum().backward()
        model.eval()(torch.ones(2, 6))
        optimizer.step()
        with pytest.raises(BatchMismatch, match=r"called 2 times in train mode for the 1 batches"):
            r.step([0, 1, 0, 1])
        r.step([[0, 1], [0, 1]])
    step = hw.Trajectory(tmp_path / "r").step(0)
    assert [call.rows for call in step.calls] == [2, 2] and (step.calls[0].random != step.calls[1].random).any()
    plain = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3))
    told = hw.record(plain, torch.optim.SGD(plain.parameters(), lr=0.1), tmp_path / "s").bytes_for(1000)
    assert small - told == pytest.approx(5056 * 1000, rel=0.01)


def test_dropout_whose_numbers_are_not_kept_is_refused_before_the_training_and_after(tmp_path):
    model = mlp().eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    said = r"2 is Dropout, which is random in training.*not in the record"
    with pytest.raises(UnsupportedModel, match=said):
        hw.record(model, optimizer, tmp_path / "r", random=False)
    states = {k: {name: value + k for name, value in model.state_dict().items()} for k in (0, 1)}
    record = from_checkpoints(tmp_path / "i", states, Sgd(0.1))
    model.load_state_dict(states[1])
    with pytest.raises(UnsupportedModel, match=said):
        hw.Influence(model, "cross_entropy", hw.Unrolled(record)).fit((torch.ones(2, 6), torch.tensor([0, 1])))


def test_functions_that_draw_are_said_to_and_compiled_models_are_refused(tmp_path):
    model = nn.Linear(6, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with hw.record(model, optimizer, tmp_path / "r", random=True) as r:
        F.dropout(model(torch.ones(2, 6)), 0.5).sum().backward()
        optimizer.step()
        r.step([0, 1])
    assert len(hw.Trajectory(tmp_path / "r").step(0).calls) == 1
    with pytest.raises(UnsupportedModel, match="DataParallel draws the masks"):
        hw.record(nn.DataParallel(model), optimizer, tmp_path / "s", random=True)


def test_two_models_in_two_threads_draw_each_its_own_masks():
    device, x = torch.device("cpu"), torch.ones(200, 50)
    models = [nn.Sequential(nn.Dropout(0.5), nn.Linear(50, 100), nn.Dropout(0.5)) for _ in range(2)]
    states = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        states.append(generator_state(device))

    def outputs(k, times=40):
        found = []
        for _ in range(times):
            with drawing(models[k], states[k], device), torch.no_grad():
                found.append(models[k](x))
        return found

    alone = [outputs(k, 1)[0] for k in (0, 1)]
    with ThreadPoolExecutor(2) as threads:
        for k, found in enumerate(threads.map(outputs, (0, 1))):
            assert all(torch.equal(output, alone[k]) for output in found)


def frozen():
    """With a part in eval mode, while the rest draws."""
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.GELU(), nn.Dropout(0.3), nn.Linear(8, 3))
    model[1].eval()
    return model


def test_a_part_that_trained_in_eval_mode_is_so_in_the_replay(tmp_path, monkeypatch):
    what = dropped("mlp", sgd)
    what = what.changed(make=lambda: (seeded(frozen)(), torch.manual_seed(5))[0])
    influence, rows = scores_of(what, tmp_path / "r")
    assert hw.Trajectory(tmp_path / "r").header.still == ("1",)
    in_eval(what, monkeypatch)
    query = draw("mlp", 3, 9)
    scores = np.asarray(influence.attribute(rows, query, unit="removal"))
    assert off(-scores[:, [11]], central_differences(what, *query, [11])) < 1e-6


def stepped(model, folder, change=lambda step: None, **options):
    """Two steps of two rows; `change` is called before each."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with hw.record(model, optimizer, folder, **options) as r:
        for step in range(r.start, 2):
            change(step)
            optimizer.zero_grad()
            model(torch.ones(2, 6)).sum().backward()
            optimizer.step()
            r.step([0, 1])


def test_a_module_that_changes_its_mode_while_it_trains_is_named(tmp_path):
    model = frozen()
    with pytest.raises(InvalidInput, match=r"1 is in train mode, and was in eval mode when the recorded training"):
        stepped(model, tmp_path / "r", lambda step: model[1].train(step == 1), keep="all")
    with pytest.raises(InvalidInput, match=r"1 is in train mode"):  # of a record that is gone on with, too
        stepped(model, tmp_path / "r", keep="all", resume=True)
    model[1].eval()
    stepped(model, tmp_path / "r", keep="all", resume=True)
    assert hw.Trajectory(tmp_path / "r").is_ended


def test_a_training_in_eval_mode_is_told_to_set_p_to_zero_which_is_recorded(tmp_path):
    model = mlp().eval()
    with pytest.raises(BatchMismatch, match="dropout does nothing: set its p to 0"):
        stepped(model, tmp_path / "r")
    model[2].p = 0.0
    stepped(model, tmp_path / "s")
    assert hw.Trajectory(tmp_path / "s").header.random == 0


def test_a_recorder_that_is_entered_again_has_forgotten_what_was_drawn(tmp_path):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = hw.record(model, optimizer, tmp_path / "r", resume=True)
    with pytest.raises(KeyboardInterrupt), recorder:
        model(torch.ones(2, 6))
        raise KeyboardInterrupt
    (tmp_path / "r" / "trajectory.json").unlink()
    with recorder as r:
        model(torch.ones(2, 6)).sum().backward()
        optimizer.step()
        r.step([0, 1])
