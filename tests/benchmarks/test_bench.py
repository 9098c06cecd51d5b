"""The comparison with peers: who runs by which Python, what is told apart as cold, and what a floor counts.

The drivers are fakes whose clock is a number: importing their "torch" takes 100 s.
"""

import importlib.util
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"

TORCH = """
import time
now = 0.0
def spend(seconds):
    global now
    now += seconds
time.process_time = lambda: now
spend(100)
"""
COMMON = """
import argparse, json, sys, time
import numpy as np
from torch import spend
class Meter:
    def __init__(self): self.t = {}
    def __call__(self, name):
        self.name = name
        return self
    def __enter__(self): self.start = time.process_time()
    def __exit__(self, *error): self.t[self.name] = time.process_time() - self.start
def main(method):
    parser = argparse.ArgumentParser()
    for name in ("workload", "method", "out", "budget"): parser.add_argument("--" + name)
    parser.add_argument("--repeats", type=int)
    given = parser.parse_args()
    repeats = []
    for number in range(given.repeats):
        meter = Meter()
        scores = method(meter, number)
        repeats.append(meter.t)
    np.save(given.out, scores)
    last = repeats[-1]
    row = dict(fit_cpu_s=last["fit"], score_cpu_s=last["score"], peak_rss_mb=PEAK, n_rep=len(repeats), torch="fake")
    print("JSON " + json.dumps(dict(row, ok=True)))
    sys.exit(0)
"""
DRIVER = """
import os
import common
from torch import spend
common.PEAK = {peak}
spend({imports})
if os.environ["PYTHON_OF"] != {python!r}: raise SystemExit("by the wrong Python")
def method(meter, number):
    with meter("fit"): spend({fit} + (number == 0) * {cold})
    with meter("score"): spend({score})
    return common.np.ones((3, 2))
common.main(method)
"""


@pytest.fixture
def modules(monkeypatch):
    """run.py and floors.py; another folder of benchmarks has a run.py too."""
    monkeypatch.syspath_prepend(str(FOLDER))
    kept = {name: sys.modules.pop(name, None) for name in ("floors", "peers")}
    spec = importlib.util.spec_from_file_location("bench_run", FOLDER / "run.py")
    run = importlib.util.module_from_spec(spec)
    sys.modules["bench_run"] = run
    spec.loader.exec_module(run)
    yield run, sys.modules["floors"]
    for name, module in {**kept, "bench_run": None}.items():
        sys.modules.pop(name, None)
        if module is not None:
            sys.modules[name] = module


@pytest.fixture
def bench(modules, tmp_path, monkeypatch):
    """Two Pythons, and drivers that each refuse the other's."""
    run, _ = modules
    own, theirs = tmp_path / "own", tmp_path / "theirs"
    for folder in (own, theirs):
        folder.mkdir()
        python = folder / "python"
        python.write_text(f'#!/bin/sh\nPYTHON_OF={folder.name} exec {sys.executable} "$@"\n')
        python.chmod(0o755)
    (theirs / "torch.py").write_text(TORCH)
    (theirs / "common.py").write_text(COMMON)
    (own / "peer_headwater.py").write_text(DRIVER.format(peak=50, imports=1, fit=1, cold=2, score=1, python="own"))
    fake = DRIVER.format(peak=100, imports=7, fit=4, cold=8, score=2, python="theirs")
    (theirs / "peer_kronfluence.py").write_text(fake)
    shutil.copy(FOLDER / "first_scores.py", own)
    monkeypatch.setattr(run, "HERE", own)
    return run.Bench(str(theirs / "python"), str(own / "python"), theirs, rounds=1, budget=9, limit=60, memory=12)


# The bounds of a driver are set between fork and exec, which JAX warns of where another test has imported it.
pytestmark = pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")
ITEMS = ["kronfluence.identity", "headwater.graddot"]


def test_each_library_runs_by_its_own_python_and_first_scores_are_told_apart_from_warm_ones(modules, bench):
    run, _ = modules
    (theirs, ours), failed = run.measure(bench, "W1", ITEMS)
    assert not failed
    assert (ours.fit, ours.score, ours.peak, ours.repeats) == ((1,), (1,), 50, 4)
    # Importing the driver's library counts, and the cold repeat; importing torch does not.
    assert ours.first == (1 + 3 + 1,) and theirs.first == (7 + 12 + 2,)


def test_a_table_has_its_ratios_first(modules, bench):
    run, _ = modules
    measured, failed = run.measure(bench, "W1", ITEMS)
    head, _, _, ours = run.table(measured, failed, None).splitlines()
    cells = dict(zip(head.split(" | "), ours.split(" | "), strict=True))
    assert list(cells)[:3] == ["| method", "times the speed of", "first scores: times"]
    assert cells["times the speed of"] == "kronfluence.identity 3"
    assert cells["first scores: times"] == f"{21 / 5:.3g}" and cells["first scores, CPU s"] == "5"
    assert cells["times its memory"] == "0.50"
    assert "times its floor" not in cells  # this folder has no floors.py


def shapes(floors, *layers, train=5, query=3, forward=100.0):
    return floors.Shapes(tuple(floors.Layer(*each) for each in layers), forward, train, query)


def test_a_floor_is_so_many_times_what_the_shapes_and_the_rate_give(modules):
    run, floors = modules
    found = floors.Floors(shapes(floors, (4, 2, 1)), floors.Rates(single=10.0, double=5.0))
    passes, pairs = 2 * 100 * (5 + 3), 2 * 5 * 3 * (4 + 2 + 1)
    dense = 2 * 8 * 8 + 2 * 5 * 3 * 8
    assert found.seconds("headwater.graddot") == (passes + min(pairs, dense)) / 10
    assert found.seconds("headwater.cg") is None
    row = {"fit_cpu_s": 30.0, "score_cpu_s": 70.0, "first_cpu_s": 1.0, "peak_rss_mb": 1, "n_rep": 2, "torch": "t"}
    m = run.summary("W1", "headwater.graddot", [row, row], np.ones((5, 3)), [found, found])
    assert m.times_floor == f"{100 / found.seconds('headwater.graddot'):.3g}"
    assert run.summary("W1", "headwater.graddot", [row], np.ones((5, 3)), [None]).times_floor == ""


def test_floors_follow_the_rows_and_take_the_cheaper_form(modules):
    _, floors = modules
    found = floors.Floors(shapes(floors, (64, 64, 1), (65, 64, 32)), floors.Rates(1.0, 1.0))
    assert found.seconds("headwater.graddot@nq=1") < found.seconds("headwater.graddot")
    ordered = [found.seconds(f"headwater.{name}") for name in ("graddot", "kfac_factored", "kfac", "ekfac")]
    assert ordered == sorted(ordered) and len(set(ordered)) == 4
    one, many = found.shapes.layers
    # At one position outer products are less; at 32, dense gradients.
    assert floors.outer_pairs(one, found.shapes) == 2 * 15 * (64 + 64 + 1)
    assert floors.outer_pairs(many, found.shapes) == 2 * 64 * 65 * (8 * 32 + 15)


def test_shapes_are_those_of_the_models_layers(modules):
    import torch

    _, floors = modules

    class Workload:
        model = torch.nn.Sequential(torch.nn.Conv2d(1, 3, 2), torch.nn.Flatten(), torch.nn.Linear(12, 5, bias=False))
        x, xq, tracked = torch.zeros(7, 1, 3, 3), torch.zeros(2, 1, 3, 3), ("0", "2")

    found = floors.shapes_of(Workload)
    assert found.layers == (floors.Layer(5, 3, 4), floors.Layer(12, 5, 1))
    assert (found.train, found.query) == (7, 2)
    assert found.forward == 2 * (4 * 4 * 3 + 12 * 5)
