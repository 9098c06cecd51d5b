"""Batch normalisation in eval mode is an affine map of its own statistics: recorded, replayed, and held to them."""

import numpy as np
import pytest
import torch
from recorded_trainings import off, recorded, sweep_of
from small_trainings import adamw, central_differences, draw, seeded, sgd, training
from torch import nn

import headwater as hw
from headwater.errors import InvalidInput, StaleFit, UnsupportedModel
from headwater.torch.batch import TorchBatch
from headwater.trajectory.torch.recorder import TorchRecorder
from headwater.trajectory.trajectory import Trajectory


def normed(kind, dropout=0.0):
    """Statistics far from zero and one, as a training before left them."""
    if kind == "mlp":
        model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.GELU(), nn.Dropout(dropout), nn.Linear(8, 3))
    else:
        model = nn.Sequential(
            nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.GELU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(27, 3)
        )
    model[1].running_mean.normal_()
    model[1].running_var.uniform_(0.2, 2.0)
    return model.eval()


def with_norm(kind, optimizer, **fields):
    return training(kind, optimizer, **fields).changed(make=seeded(lambda: normed(kind)))


@pytest.mark.parametrize("kind, optimizer", [("mlp", adamw), ("cnn", sgd)])
def test_the_derivative_of_a_training_with_frozen_norms_equals_central_differences(kind, optimizer, tmp_path):
    what = with_norm(kind, optimizer, steps=8, clip=0.5)
    x, y = draw(kind, 4, 9)
    model = what.run(recorder=lambda m, o: hw.record(m, o, tmp_path / "r", clip=what.clip))
    influence = hw.Influence(model, "cross_entropy", hw.Unrolled(tmp_path / "r", removals=())).fit((what.x, what.y))
    found = np.asarray(influence.attribute((what.x, what.y), (x, y), unit="removal"))
    truth = central_differences(what, x, y, [0, 3, 11])
    assert off(-found[:, [0, 3, 11]], truth) < 1e-6


def test_the_record_has_the_statistics_and_the_model_is_held_to_them(tmp_path):
    what = with_norm("mlp", sgd, steps=6)
    model, record = recorded(what, tmp_path / "r")
    assert record.header.frozen == ("1",)
    np.testing.assert_array_equal(record.statistics["1.running_var"], model[1].running_var.numpy())
    model[1].running_mean += 0.01
    with pytest.raises(StaleFit, match=r"1\.running_mean of the model is not what it was in training"):
        hw.Influence(model, "cross_entropy", hw.Unrolled(record)).fit((what.x, what.y))


def begun(tmp_path, **settings):
    model = normed("mlp", **settings).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return model, optimizer, TorchRecorder(model, optimizer, tmp_path / "r")


def step(model, optimizer, r):
    x, y = draw("mlp", 6, 0)
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    r.step(range(6))


def test_a_norm_in_train_mode_is_refused_at_the_step_that_mixes_rows(tmp_path):
    model, optimizer, recorder = begun(tmp_path)
    with pytest.raises(InvalidInput, match=r"1 \(BatchNorm1d\) is in train mode.*no derivative"), recorder as r:
        step(model, optimizer, r)
        model.train()
        step(model, optimizer, r)


def test_statistics_that_moved_between_two_steps_are_refused(tmp_path):
    model, optimizer, recorder = begun(tmp_path)
    with pytest.raises(InvalidInput, match=r"1\.num_batches_tracked changed"), recorder as r:
        step(model, optimizer, r)
        model[1].momentum = 0.0  # statistics stay, and rows were mixed
        model.train()(torch.randn(5, 6).double())
        model.eval()


def test_a_norm_without_statistics_of_its_own_is_refused_in_any_mode(tmp_path):
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, track_running_stats=False)).eval()
    with pytest.raises(UnsupportedModel, match="1 is BatchNorm1d, which mixes the rows"):
        TorchRecorder(model, torch.optim.SGD(model.parameters(), lr=0.1), tmp_path / "r")


def test_dropout_is_drawn_while_norms_stay_frozen(tmp_path):
    model, optimizer, recorder = begun(tmp_path, dropout=0.3)
    model.train()
    model[1].eval()
    with recorder as r:
        for _ in range(5):
            step(model, optimizer, r)
    x, y = draw("mlp", 6, 0)
    record = Trajectory(tmp_path / "r")
    assert record.header.still == record.header.frozen == ("1",)
    influence = hw.Influence(model.eval(), "cross_entropy", hw.Unrolled(record, removals=())).fit((x, y))
    assert np.isfinite(np.asarray(influence.attribute((x, y), draw("mlp", 2, 9)))).all()


def test_a_resumed_training_has_the_statistics_of_its_record(tmp_path):
    what = with_norm("mlp", sgd, steps=14)
    whole, record = recorded(what, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        recorded(what.changed(stop=6), tmp_path / "r")

    def fresh():
        model = what.make()
        model[1].reset_running_stats()
        return model.eval()

    model, again = recorded(what.changed(make=fresh), tmp_path / "r", resume=True)
    for name, value in whole.state_dict().items():
        np.testing.assert_array_equal(model.state_dict()[name].numpy(), value.numpy())
    assert again.steps == record.steps


def test_curvatures_pass_through_frozen_norms(tmp_path):
    what = with_norm("mlp", sgd, steps=4)
    model, record = recorded(what, tmp_path / "r")
    batch = TorchBatch(*draw("mlp", 2, 9))
    for curvature in ("ggn", "fisher", None):
        sweep = sweep_of(what, model, record, curvature)
        assert np.isfinite(sweep.tau([batch])).all()
