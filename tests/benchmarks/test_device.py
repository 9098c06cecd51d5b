"""The script for devices runs on the CPU as it would there, and says no where scores differ."""

import json
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def device(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import device

    return device


@pytest.mark.slow
def test_every_path_scores_the_same_in_float32_and_is_measured(device, tmp_path, capsys):
    assert device.main(["--device", "cpu", "--json", str(tmp_path / "found.json")]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert not found["left out"]
    paths = len(device.OF_ROWS) + len(device.SOLVES) + len(device.OF_SEQUENCES)
    assert len(found["same"]) == len(found["costs"]) == paths
    assert all(each["single"] <= each["tolerance"] <= 1e-3 for each in found["same"])
    assert all(each["fit"] + each["score"] > 0 and len(each["times"]) == 4 for each in found["costs"])
    known = [each for each in found["costs"] if each["share"] is not None]
    assert len(known) >= 8 and all(0 < each["share"] < 1 for each in known)
    assert "not the same" not in capsys.readouterr().out


def test_scores_that_are_off_are_told(device, monkeypatch, capsys):
    problem, cpu = device.mlp(width=8, train=20, query=5, batch=8), device.torch.device("cpu")
    right = device.agreement("MLP", device.GRAD_DOT, problem, device.Device(cpu))
    assert right.holds and 0 < right.single < 1e-6 and right.double == 0
    off = device.Asked("grad-dot", device.hw.GradDot, lambda *given: device.pairs(*given) + np.random.rand() * 1e-3)
    wrong = device.agreement("MLP", off, problem, device.Device(cpu))
    assert not wrong.holds
    device.print_agreements([right, wrong])
    assert capsys.readouterr().out.count("not the same") == 1


def test_nothing_is_begun_after_the_limit_and_no_agreement_is_no_success(device, capsys):
    assert device.main(["--device", "cpu", "--limit", "-1"]) == 1
    assert "Not begun" in capsys.readouterr().out
