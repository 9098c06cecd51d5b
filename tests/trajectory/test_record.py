"""A record says what training did, whole or as far as it came; a replay that does not come to it is refused."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from recorded_trainings import recorded, sweep_of
from small_trainings import adamw, sgd, training
from torch import nn

import headwater as hw
from headwater.errors import (
    AlreadySaved,
    BatchMismatch,
    DamagedFile,
    InvalidInput,
    NotSaved,
    NotWritten,
    StaleFit,
    UnsupportedModel,
)
from headwater.torch.batch import TorchBatch
from headwater.trajectory.record import HEAD, is_kept, kept_states
from headwater.trajectory.replay import _rounding
from headwater.trajectory.torch.recorder import TorchRecorder
from headwater.trajectory.trajectory import Trajectory


def test_a_record_has_every_step_with_its_rows_shares_and_rates(tmp_path):
    weights = torch.linspace(0.5, 2, 20, dtype=torch.float64)
    what = training("mlp", sgd, weights=weights)
    model, record = recorded(what, tmp_path / "r")
    assert record.steps == 14 and record.is_ended
    for number, (rows,) in enumerate(what.ids()):
        step = record.step(number)
        np.testing.assert_array_equal(step.ids, rows.numpy())
        np.testing.assert_allclose(step.shares, weights[rows].numpy() / 7)
        (rates,) = step.rates
        assert rates.lr == pytest.approx(0.1 * (1 + np.cos(np.pi * number / 28)))
        assert rates[1:] == (0.01, 0.9, 0.0)
    for name, p in model.named_parameters():
        np.testing.assert_array_equal(record.state(14).parameters[name], p.detach().numpy())


def test_gradients_of_several_batches_are_averaged_to_a_step(tmp_path):
    what = training("mlp", sgd, batches=2)
    _, record = recorded(what, tmp_path / "r")
    assert len(record.step(0).ids) == 14
    np.testing.assert_allclose(record.step(0).shares, 1 / 14)


def test_states_are_kept_at_all_steps_at_squares_or_at_powers_of_two():
    assert kept_states(20, "sqrt") == [0, 1, 4, 9, 16, 20]
    assert kept_states(20, "log") == [0, 1, 2, 4, 8, 16, 20]
    assert len(kept_states(20, "all")) == 21
    assert sum(is_kept(k, "sqrt") for k in range(10_000)) == 100


def test_the_size_is_told_beforehand(tmp_path):
    what = training("mlp", adamw)
    told = []

    def recorder(model, optimizer):
        found = TorchRecorder(model, optimizer, tmp_path / "r")
        told.append(found.bytes_for(14, rows=7))
        return found

    what.run(recorder=recorder)
    assert told[0] == pytest.approx(Trajectory(tmp_path / "r").bytes, rel=0.1)


@pytest.mark.parametrize("optimizer", [sgd, adamw])
def test_a_training_that_was_killed_goes_on_to_the_same_record(optimizer, tmp_path):
    what = training("mlp", optimizer)
    model, whole = recorded(what, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        recorded(what.changed(stop=11), tmp_path / "r")
    broken = Trajectory(tmp_path / "r")
    assert broken.steps == 9 and not broken.is_ended
    with pytest.raises(StaleFit, match=r"broken off, and step 9 .*resume=True"):
        hw.Influence(what.make(), "cross_entropy", hw.Unrolled(broken)).fit((what.x, what.y))
    again, record = recorded(what, tmp_path / "r", resume=True)
    assert record.steps == 14 and record.is_ended and record.digest == whole.digest
    for name, p in model.named_parameters():
        np.testing.assert_array_equal(dict(again.named_parameters())[name].detach().numpy(), p.detach().numpy())


def test_there_is_no_pickle_in_a_record(tmp_path):
    _, record = recorded(training("mlp", adamw), tmp_path / "r")
    for file in record.folder.glob("*.npz"):
        with np.load(file, allow_pickle=False) as found:
            assert all(found[name].dtype.kind in "iufUS" for name in found.files)


def test_a_record_is_not_written_over(tmp_path):
    recorded(training("mlp", sgd), tmp_path / "r")
    with pytest.raises(AlreadySaved, match="resume=True"):
        recorded(training("mlp", sgd), tmp_path / "r")


def test_a_folder_without_a_record_is_said(tmp_path):
    with pytest.raises(NotSaved, match=r"hw\.record"):
        Trajectory(tmp_path)


def test_a_lost_file_of_steps_is_said(tmp_path):
    _, record = recorded(training("mlp", sgd), tmp_path / "r")
    (record.folder / "steps-00000004-00000009.npz").unlink()
    with pytest.raises(DamagedFile, match="recorded 14 steps, and those after step 4"):
        Trajectory(record.folder).kept  # noqa: B018


def test_a_broken_file_is_named(tmp_path):
    _, record = recorded(training("mlp", sgd), tmp_path / "r")
    (record.folder / "state-00000004.npz").write_bytes(b"nothing")
    with pytest.raises(DamagedFile, match="state-00000004"):
        Trajectory(record.folder).state(4)
    (record.folder / HEAD).write_text("{")
    with pytest.raises(DamagedFile, match=HEAD):
        Trajectory(record.folder)


def test_a_step_is_recorded_once_for_each_step_of_the_optimizer(tmp_path):
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with TorchRecorder(model, optimizer, tmp_path / "r") as r:
        with pytest.raises(InvalidInput, match="was not called since"):
            r.step([0])
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        with pytest.raises(BatchMismatch, match="2 ids"):
            r.step([0, 1], weights=[1.0])
        r.step([0])


def test_a_parameter_without_a_gradient_is_refused(tmp_path):
    model = nn.Sequential(nn.Linear(2, 1), nn.Linear(2, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with (
        TorchRecorder(model, optimizer, tmp_path / "r"),
        pytest.raises(InvalidInput, match=r"1\.weight has no gradient"),
    ):
        model[0](torch.ones(1, 2)).sum().backward()
        optimizer.step()


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda p: torch.optim.RMSprop(p), "RMSprop"),
        (lambda p: None, "optimizer is None; expected torch's SGD"),
        (lambda p: torch.optim.Adam(p, amsgrad=True), "amsgrad"),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.5), "dampening"),
    ],
)
def test_an_optimizer_whose_steps_are_not_known_is_refused(make, said, tmp_path):
    model = nn.Linear(2, 1)
    with pytest.raises(UnsupportedModel, match=said):
        TorchRecorder(model, make(model.parameters()), tmp_path / "r")


def test_a_training_that_did_more_than_the_record_says_is_refused_with_value_and_step(tmp_path):
    what = training("mlp", sgd, clip=0.3)
    model = what.run(recorder=lambda m, o: TorchRecorder(m, o, tmp_path / "r"))  # the clipping is not said
    sweep = sweep_of(what, model, Trajectory(tmp_path / "r"))
    with pytest.raises(StaleFit, match=r"state before step 14: 0\.weight\[\d+\] is .* and was .*clipping"):
        sweep.tau([TorchBatch(what.x[:2], what.y[:2])])


def test_a_bias_whose_gradient_is_rounding_is_no_reason_to_refuse_a_replay(tmp_path):
    """Attention's key bias has no effect; Adam makes steps of what rounding leaves of its gradient of zero."""
    what = training("gpt", adamw)
    what = what.changed(make=lambda make=what.make: make().float())
    model = what.run(recorder=lambda m, o: hw.record(m, o, tmp_path / "r"))
    loss = lambda output, y: what.loss(output, y, reduction="none")  # noqa: E731
    influence = hw.Influence(model, loss, hw.Unrolled(tmp_path / "r", removals=())).fit((what.x, what.y))
    assert np.isfinite(np.asarray(influence.attribute((what.x, what.y), (what.x[:2], what.y[:2])))).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_in_any_precision_that_bias_alone_is_left_out_of_the_check(dtype, tmp_path):
    what = training("gpt", adamw)
    what = what.changed(make=lambda make=what.make: make().to(getattr(torch, dtype)))
    _, record = recorded(what, tmp_path / "r")
    left_out = _rounding(record.rule, record.state(14), dtype)
    assert list(left_out) == ["qkv.bias"] and np.flatnonzero(left_out["qkv.bias"]).tolist() == list(range(8, 16))


@pytest.mark.parametrize("penalty", [0.0, 5.0])
def test_one_huge_gradient_does_not_take_the_others_out_of_the_check(penalty, tmp_path):
    """Adam's steps are of one size, whatever the columns' gradients are."""
    x, y = torch.randn(20, 8, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 3
    x[:, 0] *= 3e8
    model = nn.Linear(8, 3)
    nn.init.constant_(model.weight, 0.1)
    with torch.no_grad():
        model.weight[:, 0] *= 1e-9
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    with hw.record(model, optimizer, tmp_path / "r") as r:
        for _ in range(4):
            optimizer.zero_grad()
            unsaid = penalty * model.weight[:, 1:].pow(2).sum()
            (nn.functional.cross_entropy(model(x), y) + unsaid).backward()
            optimizer.step()
            r.step(range(20))
    method = hw.Unrolled(tmp_path / "r", curvature=None, at="step", removals=())
    influence = hw.Influence(model, "cross_entropy", method).fit((x, y))
    with pytest.raises(StaleFit, match="does not come to") if penalty else nullcontext():
        influence.attribute((x, y), (x[:2], y[:2]))


def test_a_model_that_draws_at_random_is_refused(tmp_path):
    what = training("mlp", sgd)
    model, record = recorded(what, tmp_path / "r")
    with pytest.raises(UnsupportedModel, match="Dropout"):
        sweep_of(what, nn.Sequential(model, nn.Dropout(0.1)).eval(), record)


def test_the_rates_of_several_groups_and_of_a_schedule_are_those_of_the_step(tmp_path):
    model = nn.Linear(2, 1)
    groups = [{"params": [model.weight], "lr": 0.1}, {"params": [model.bias], "lr": 0.2, "weight_decay": 0.5}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    with TorchRecorder(model, optimizer, tmp_path / "r", reduction="sum") as r:
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.ones(3, 2)).sum().backward()
            optimizer.step()
            schedule.step()  # before r.step, too
            r.step(["a", "b", "c"])
    record = Trajectory(tmp_path / "r")
    rates = record.rates(record.step(1))
    assert rates["weight"].lr == 0.05 and rates["bias"].lr == 0.1 and rates["bias"].weight_decay == 0.5
    assert record.step(1).ids.tolist() == ["a", "b", "c"] and record.step(0).shares.tolist() == [1.0] * 3


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(2), nn.LSTM(2, 2, num_layers=2, dropout=0.1)])
def test_steps_that_cannot_be_taken_again_are_refused_before_the_training(layer, tmp_path):
    model = nn.Sequential(nn.Linear(2, 2), layer)
    with pytest.raises(UnsupportedModel, match=f"1 is {type(layer).__name__}, which mixes the rows of a step"):
        TorchRecorder(model, torch.optim.SGD(model.parameters(), lr=0.1), tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_a_step_that_was_not_told_is_refused_at_the_next_one_and_at_the_end(tmp_path):
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.ones(1, 2)).sum().backward()
    with TorchRecorder(model, optimizer, tmp_path / "r") as r:
        optimizer.step()
        r.step([0])
        optimizer.step()
        with pytest.raises(InvalidInput, match=r"step 1 of the optimizer r\.step\(ids\) was not told"):
            optimizer.step()
        r.step([0])
    with (
        pytest.raises(InvalidInput, match=r"step 0 of the optimizer r\.step\(ids\) was not told"),
        TorchRecorder(model, optimizer, tmp_path / "s"),
    ):
        optimizer.step()
    assert not Trajectory(tmp_path / "s").is_ended


def test_a_record_that_ended_or_is_of_another_training_says_so_when_it_is_resumed(tmp_path):
    what = training("mlp", sgd)
    recorded(what, tmp_path / "r")
    with pytest.raises(InvalidInput, match="after 14 steps: nothing is left to resume"):
        recorded(what, tmp_path / "r", resume=True)
    other = nn.Linear(2, 1)
    with (
        pytest.raises(StaleFit, match=r"its shape of 0\.weight is None, in the record"),
        TorchRecorder(other, torch.optim.SGD(other.parameters(), lr=0.1), tmp_path / "r", resume=True),
    ):
        pass


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "r").write_text("")
    model = nn.Linear(2, 1)
    with (
        pytest.raises(NotWritten, match="r could not be written"),
        TorchRecorder(model, torch.optim.SGD(model.parameters(), lr=0.1), tmp_path / "r"),
    ):
        pass


def test_words_that_are_numbers_name_other_rows(tmp_path):
    model, x, y = nn.Linear(2, 2), torch.randn(4, 2), torch.tensor([0, 1, 0, 1])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with TorchRecorder(model, optimizer, tmp_path / "r") as r:
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        r.step(["0", "1", "2", "3"])
    with pytest.raises(BatchMismatch, match=r"saw row '0', .*called 0 to 3.*Words are not numbers"):
        hw.Influence(model, "cross_entropy", hw.Unrolled(tmp_path / "r")).fit((x, y))
