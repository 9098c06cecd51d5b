"""A training's settings are one frozen object: given as it is or by its fields' names, checked when it is made."""

import math
from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from torch import nn

from headwater.errors import InvalidSetting
from headwater.retraining.torch import ProximalBregman, ProximalSettings, Sgd, pbrf, train_many, train_mlps

X = torch.randn(12, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = (X[:, 0] > 0).long()
KEEP = torch.ones(2, 12)
SGD = Sgd(steps=5, batch_size=4, lr=0.2, momentum=0.5, l2=1e-3, checkpoints=(3, 1, 3))
FIELDS = {"steps": 5, "batch_size": 4, "lr": 0.2, "momentum": 0.5, "l2": 1e-3, "checkpoints": (3, 1, 3)}


def row_losses(outputs, y):
    return nn.functional.cross_entropy(outputs, y, reduction="none")


def mlps(**options):
    return train_mlps(X, Y, KEEP, [0, 1], widths=(3, 2), **options)


def many(**options):
    return train_many(lambda: nn.Linear(3, 2).double(), X, Y, KEEP, [0, 1], loss=row_losses, **options)


def response(**options):
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    return pbrf(model, nn.CrossEntropyLoss(), X, Y, X[:2], Y[:2], [[0], [1, 2]], **options)


def test_settings_are_the_same_by_name_and_in_one():
    for one, other in ((mlps(settings=SGD), mlps(**FIELDS)), (mlps(settings=replace(SGD, l2=1e-4)), mlps_without_l2())):
        assert torch.equal(one.weights[0], other.weights[0])
        assert [point.step for point in one.checkpoints] == [point.step for point in other.checkpoints] == [1, 3]
    assert torch.equal(many(settings=SGD).parameters["weight"], many(**FIELDS).parameters["weight"])
    assert [step for step, _ in many(settings=SGD).checkpoints] == [1, 3]
    together = response(settings=ProximalSettings(0.3, weight=0.5, batch_size=5))
    assert (together == response(damping=0.3, weight=0.5, batch_size=5)).all()


def mlps_without_l2():
    return mlps(**{name: value for name, value in FIELDS.items() if name != "l2"})


@pytest.mark.parametrize("call", [mlps, many], ids=["train_mlps", "train_many"])
def test_settings_and_a_field_beside_them_are_refused(call):
    with pytest.raises(InvalidSetting, match=r"settings were given, and lr, steps too; dataclasses.replace"):
        call(settings=SGD, lr=0.1, steps=3)
    with pytest.raises(TypeError, match="unexpected keyword argument 'learning_rate'"):
        call(steps=3, learning_rate=0.1)
    with pytest.raises(TypeError, match="'steps'"):
        call(lr=0.1)


def test_a_response_takes_its_settings_once():
    with pytest.raises(InvalidSetting, match="settings were given, and damping too"):
        response(settings=ProximalSettings(0.3), damping=0.1)
    with pytest.raises(TypeError, match="'damping'"):
        ProximalBregman(nn.Linear(3, 2), nn.CrossEntropyLoss(), X, Y, X, Y)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"steps": 0}, "steps is 0; expected a whole number of at least 1"),
        ({"batch_size": True}, "batch_size is True"),
        ({"checkpoints": (5,)}, r"checkpoints are \[5\]; expected steps from 0 to 4"),
        ({"checkpoints": [-1]}, r"checkpoints are \[-1\]"),
    ],
)
def test_settings_are_checked_when_they_are_made(changed, words):
    with pytest.raises(InvalidSetting, match=words):
        replace(SGD, **changed)


def test_settings_do_not_change():
    for settings in (SGD, ProximalSettings(0.1)):
        with pytest.raises(FrozenInstanceError):
            settings.steps = 3


def test_the_learning_rate_falls_to_zero_along_a_cosine_or_stays():
    falling = [Sgd(steps=4, lr=0.2).rate(step) for step in range(5)]
    assert falling == pytest.approx([0.2, 0.1 + 0.1 * math.sqrt(0.5), 0.1, 0.1 - 0.1 * math.sqrt(0.5), 0.0], abs=1e-15)
    assert [Sgd(steps=4, lr=0.2, decay=False).rate(step) for step in range(4)] == [0.2] * 4
