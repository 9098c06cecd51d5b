"""The derivatives of training equal central differences of training again, which shares no code with them."""

import numpy as np
import pytest
import torch
from recorded_trainings import off, recorded, sweep_of
from small_trainings import adam, adamw, central_differences, draw, nesterov, sgd, training

from headwater.torch.batch import TorchBatch
from headwater.trajectory.torch.steps import TorchPoint, TorchTraining

ROWS = [0, 3, 11]


CASES = [
    ("mlp", sgd, {}),
    ("mlp", nesterov, {"clip": 0.3}),
    ("mlp", adam, {"clip": 0.3}),
    ("mlp", adamw, {"batches": 2, "weights": torch.linspace(0.5, 2, 20, dtype=torch.float64)}),
    ("cnn", sgd, {"steps": 8, "clip": 0.5}),
    ("cnn", adamw, {"steps": 8}),
    ("gpt", sgd, {"steps": 8}),
    ("gpt", adamw, {"steps": 8, "clip": 0.5}),
]


@pytest.mark.parametrize(
    "kind, optimizer, fields", CASES, ids=lambda value: getattr(value, "__name__", str(value))[:24]
)
def test_the_exact_derivative_equals_central_differences_of_retraining(kind, optimizer, fields, tmp_path):
    what = training(kind, optimizer, **fields)
    x, y = draw(kind, 4, 9)
    model, record = recorded(what, tmp_path / "r")
    found = sweep_of(what, model, record).tau([TorchBatch(x, y)])
    truth = central_differences(what, x, y, ROWS)
    assert off(found[:, ROWS], truth) < 1e-6


SLOW = [pytest.param(word, marks=pytest.mark.slow) for word in ("ggn", "fisher")]


@pytest.mark.parametrize("curvature", ["hessian", *SLOW, None])
def test_numbers_do_not_depend_on_how_queries_are_grouped(curvature, tmp_path):
    what = training("mlp", adamw)
    x, y = draw("mlp", 5, 9)
    sweep = sweep_of(what, *recorded(what, tmp_path / "r"), curvature)
    whole = sweep.tau([TorchBatch(x, y)])
    parts = sweep.tau([TorchBatch(x[:2], y[:2]), TorchBatch(x[2:], y[2:])], group=2)
    np.testing.assert_allclose(parts, whole, rtol=1e-12, atol=1e-15)


def test_numbers_do_not_depend_on_which_states_are_kept_and_held(tmp_path):
    what = training("mlp", adamw, steps=17)
    x, y = draw("mlp", 3, 9)
    found = []
    for keep, held in (("all", 32), ("sqrt", 2), ("log", 3)):
        model, record = recorded(what, tmp_path / f"{keep}", keep=keep)
        found.append(sweep_of(what, model, record, held=held).tau([TorchBatch(x, y)]))
    assert off(found[1], found[0]) < 1e-12
    assert off(found[2], found[0]) < 1e-12


def test_curvatures_agree_where_the_model_is_linear_and_the_loss_quadratic(tmp_path):
    """There the GGN is the Hessian."""
    from torch import nn

    what = training("mlp", sgd).changed(
        make=lambda: nn.Linear(6, 2).double(),
        y=torch.randn(20, 2, generator=torch.Generator().manual_seed(4), dtype=torch.float64),
        loss=lambda o, y, reduction="mean": ((o - y) ** 2).sum(1) if reduction == "none" else ((o - y) ** 2).sum(),
    )
    torch.manual_seed(0)
    model, record = recorded(what, tmp_path / "r")
    batch = TorchBatch(what.x[:3] + 1, what.y[:3])
    hessian, ggn, fisher = (sweep_of(what, model, record, c).tau([batch]) for c in ("hessian", "ggn", "fisher"))
    assert off(ggn, hessian) < 1e-12
    assert off(fisher, hessian) > 1e-3


def test_a_sweep_that_was_stopped_goes_on_to_the_same_bytes(tmp_path):
    what = training("mlp", adamw)
    x, y = draw("mlp", 3, 9)
    sweep = sweep_of(what, *recorded(what, tmp_path / "r"))
    whole = sweep.tau([TorchBatch(x, y)])

    class Stopped(Exception):
        pass

    def until(calls):
        def tell(_):
            calls.append(1)
            if len(calls) == 9:
                raise Stopped

        return tell

    with pytest.raises(Stopped):
        sweep.tau([TorchBatch(x, y)], keep=tmp_path / "sweep", progress=until([]))
    left = []
    again = sweep.tau([TorchBatch(x, y)], keep=tmp_path / "sweep", progress=left.append)
    assert 0 < len(left) < 14
    assert again.tobytes() == whole.tobytes()


def test_a_sweep_takes_each_step_once_forward_and_once_backward_whatever_the_number_of_queries(tmp_path, monkeypatch):
    what = training("mlp", adamw)
    sweep = sweep_of(what, *recorded(what, tmp_path / "r"))
    for queries in (1, 9):
        calls = {"gradient": 0, "at": 0, "pull": 0}
        for owner, name in ((TorchTraining, "gradient"), (TorchTraining, "at"), (TorchPoint, "pull")):
            plain = getattr(owner, name)

            def counted(self, *args, name=name, plain=plain, calls=calls):
                calls[name] += 1
                return plain(self, *args)

            monkeypatch.setattr(owner, name, counted)
        sweep.tau([TorchBatch(*draw("mlp", queries, 9))])
        monkeypatch.undo()
        assert calls == {"gradient": 14, "at": 14, "pull": 14}
