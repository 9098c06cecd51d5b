"""Models trained side by side are the models that would have been trained one by one."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from headwater.errors import BatchMismatch, InvalidSetting, NonFiniteValue, ShapeMismatch, UnsupportedModel
from headwater.retraining.torch.many import train_many
from headwater.retraining.torch.trainer import train_mlps

torch.manual_seed(0)
X, Y = torch.randn(20, 1, 6, 6, dtype=torch.float64), torch.randint(3, (20,))
KEEP = np.random.default_rng(1).random((5, 20)) < 0.6
SEEDS = [3, 1, 4, 15, 9]


def make():
    layers = nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(32, 3)
    return nn.Sequential(*layers).double()


def losses(outputs, y):
    return nn.functional.cross_entropy(outputs, y, reduction="none")


OPTIONS = {"loss": losses, "steps": 7, "batch_size": 4, "lr": 0.2, "momentum": 0.5, "l2": 0.01}


def trained(seeds=SEEDS, keep=KEEP, start=make, **options):
    return train_many(start, X, Y, keep, seeds, **OPTIONS | options)


def by_hand(keep, seed, *, steps=7, decay=True, start=None):
    """One model with torch's own optimizer, through the same rows."""
    if start is None:
        torch.manual_seed(seed)
        model = make()
    else:
        model = copy.deepcopy(start)
    generator = torch.Generator().manual_seed(seed)
    rows = []
    while len(rows) < steps * 4:
        rows += [int(k) for k in torch.randperm(len(X), generator=generator) if keep[int(k)]]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.5, weight_decay=0.01)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.2 * (1 + math.cos(math.pi * step / steps)) / 2 if decay else 0.2
        batch = rows[4 * step : 4 * step + 4]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(X[batch]), Y[batch]).backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("side_by_side", [1, 2, 16])
@pytest.mark.parametrize("decay", [True, False])
def test_every_model_is_the_one_that_would_be_trained_alone(side_by_side, decay):
    found = trained(side_by_side=side_by_side, decay=decay)
    assert len(found) == 5
    for k, (mask, seed) in enumerate(zip(KEEP, SEEDS, strict=True)):
        alone = by_hand(mask, seed, decay=decay)
        for mine, theirs in zip(found.model(k).parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)
        expected = losses(alone(X), Y).detach()
        torch.testing.assert_close(found.losses(X, Y, losses, batch_size=7)[k], expected, rtol=1e-9, atol=1e-11)


def test_a_warm_start_begins_at_the_given_weights_and_leaves_them():
    start = by_hand(np.ones(20, bool), 5)
    before = copy.deepcopy(start.state_dict())
    found = trained(start=start)
    alone = by_hand(KEEP[2], SEEDS[2], start=start)
    for mine, theirs in zip(found.model(2).parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)
    assert all(torch.equal(before[name], value) for name, value in start.state_dict().items())


def test_frozen_parameters_stay_and_checkpoints_are_what_training_passed_through():
    start = make()
    start[0].requires_grad_(False)
    found = trained(start=start, checkpoints=(0, 3))
    assert sorted(found.parameters) == ["3.bias", "3.weight"]
    assert torch.equal(found.model(1)[0].weight, start[0].weight)
    assert torch.equal(found.model(1, checkpoint=0)[3].weight, start[3].weight)
    assert not torch.equal(found.model(1, checkpoint=3)[3].weight, found.model(1)[3].weight)


@pytest.mark.parametrize("side_by_side", [1, 2, 16])
def test_what_training_leaves_alone_is_the_same_in_all_models(side_by_side):
    def partly_random():
        model = make()
        model[0].requires_grad_(False)
        return model

    with pytest.raises(UnsupportedModel, match=r"0\.weight"):
        trained(start=partly_random, side_by_side=side_by_side)


def test_plain_classifiers_agree_with_the_trainer_that_is_made_for_them():
    x, y, keep = torch.randn(30, 4, dtype=torch.float64), torch.randint(3, (30,)), np.ones((2, 30), bool)
    plain = train_mlps(x, y, keep, [1, 2], widths=(4, 5, 3), steps=6, batch_size=30, lr=0.1, l2=0.0)
    start = train_mlps(x, y, keep, [1, 2], widths=(4, 5, 3), steps=6, batch_size=30, lr=0.1, l2=0.0, checkpoints=[0])
    for k in range(2):
        begun = start.checkpoints[0].models.model(k)
        mine = train_many(begun, x, y, keep[:1], [1], loss=losses, steps=6, batch_size=30, lr=0.1)
        for a, b in zip(mine.model(0).parameters(), plain.model(k).parameters(), strict=True):
            torch.testing.assert_close(a, b)


def test_what_cannot_be_trained_side_by_side_is_refused():
    attention, recurrent = nn.MultiheadAttention(4, 2, dropout=0.1), nn.LSTM(4, 4, num_layers=2, dropout=0.1)
    for layer in (nn.Dropout(0.5), nn.BatchNorm2d(1), nn.RReLU(), attention, recurrent):
        with pytest.raises(UnsupportedModel, match=type(layer).__name__):
            trained(start=lambda layer=layer: nn.Sequential(layer, make()))
    for name in ("steps", "batch_size", "side_by_side"):
        with pytest.raises(InvalidSetting, match=f"{name} is 0"):
            trained(**{name: 0})
    with pytest.raises(InvalidSetting, match="seeds is empty"):
        trained(seeds=[], keep=KEEP[:0])
    for reduction in ("mean", "sum"):
        with pytest.raises(ShapeMismatch, match="one number for each"):
            trained(loss=nn.CrossEntropyLoss(reduction=reduction))
    with pytest.raises(InvalidSetting, match="checkpoints"):
        trained(checkpoints=[7])
    with pytest.raises(BatchMismatch, match="model 1 keeps none"):
        trained(seeds=[1, 2], keep=np.stack([KEEP[0], np.zeros(20, bool)]))
    with pytest.raises(BatchMismatch, match="20 rows x"):
        trained(keep=KEEP[:, :19])
    with pytest.raises(NonFiniteValue, match=r"diverged.*model 0, seed \d"):
        trained(lr=1e200)


@pytest.mark.parametrize("kind", ["dropout", "running statistics"])
def test_a_model_that_differs_in_train_mode_is_refused_however_it_does_so(kind):
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = make()
            self.norm = nn.InstanceNorm2d(1, track_running_stats=True).double()

        def forward(self, x):
            if kind == "dropout":
                return self.layers(nn.functional.dropout(x, 0.5, self.training))
            return self.layers(self.norm(x))

    with pytest.raises(UnsupportedModel, match="Noisy says something else in train mode"):
        trained(start=Noisy)


def test_rounding_of_another_kernel_and_outputs_in_a_dict_are_no_reason_to_refuse():
    """An encoder layer takes a fused path in eval mode."""

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True)
            self.head = nn.Linear(6, 3)

        def forward(self, x):
            return {"logits": self.head(self.layer(x[:, 0]).mean(1))}

    found = train_many(
        Encoder, X.float(), Y, KEEP[:1], [1], loss=lambda out, y: losses(out["logits"], y), steps=2, batch_size=4
    )
    assert len(found) == 1


def test_recurrent_layers_are_trained_side_by_side_as_alone():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = nn.LSTM(6, 4, batch_first=True), nn.Linear(4, 3)

        def forward(self, x):
            return self.head(self.layer(x[:, 0])[0][:, -1])

    found = trained(start=lambda: Recurrent().double(), steps=3)
    alone = trained(start=lambda: Recurrent().double(), steps=3, seeds=SEEDS[2:3], keep=KEEP[2:3])
    torch.testing.assert_close(found.losses(X, Y, losses)[2:3], alone.losses(X, Y, losses), rtol=1e-9, atol=1e-11)
    own = nn.functional.cross_entropy(found.model(2)(X), Y, reduction="none").detach()
    torch.testing.assert_close(found.losses(X, Y, losses)[2], own, rtol=1e-9, atol=1e-11)


def test_progress_counts_steps_of_models():
    seen = []
    trained(progress=seen.append, side_by_side=3)
    assert sum(seen) == 5 * 7
