"""The leaderboard's banks are whole and of the recipes that the code says; its page is made of what was measured."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from headwater.evaluate import Bank, ceiling, plan_subsets

FOLDER = Path(__file__).parents[2] / "benchmarks" / "leaderboard"


@pytest.fixture(scope="module")
def boards():
    """The modules of the folder; they are scripts, and find each other by its name."""
    added = [str(FOLDER), str(FOLDER.parent)]
    sys.path[:0] = added
    import page
    import run
    import tasks

    yield tasks, run, page
    for name in added:
        sys.path.remove(name)


def test_every_bank_is_full_and_of_the_tasks_recipe(boards):
    tasks, _, _ = boards
    assert len(tasks.TASKS) == 5
    for task in tasks.TASKS.values():
        bank = Bank.open(task.folder / "bank")
        assert not bank.missing
        assert bank.recipe == json.loads(json.dumps(task.recipe))
        repeated = 0 if task.training is None else task.repeated
        plan = plan_subsets(bank.keep.shape[1], subsets=task.subsets, repeated=repeated)
        np.testing.assert_array_equal(bank.keep, plan.keep)
        share = ceiling(bank.outputs)
        assert share is None if task.training is None else share > 0.3


@pytest.mark.parametrize("name", ["digits-logistic", "cancer-logistic"])
def test_a_bank_of_a_convex_task_is_what_refitting_gives(boards, name):
    tasks, _, _ = boards
    task = tasks.TASKS[name]
    bank = tasks.bank(task)
    again = tasks.convex_losses(task, bank.keep[:3], None)
    np.testing.assert_allclose(again, bank.outputs[:3, 0], rtol=1e-6, atol=1e-9)
    found = tasks.ready(name)
    model = tasks.fit_convex(task, found.x, found.y)
    np.testing.assert_allclose(found.model[0].weight.detach(), model[0].weight.detach(), atol=1e-6)


def test_an_entry_is_measured_and_the_page_says_what_was_found(boards, tmp_path, monkeypatch):
    _, run, page = boards
    monkeypatch.setattr(page, "RESAMPLES", 5)
    monkeypatch.setattr(page, "PAIRED", 20)
    ours = ("direct (Hessian)", "direct (Hessian), at l2", "direct (Hessian), half-weight optimum", "grad-dot")
    for library, method in (*(("headwater", name) for name in ours), ("baseline", "random")):
        entry = run.Entry("cancer-logistic", library, method)
        work = run.measure_ours if library == "headwater" else run.measure_baseline
        found = work(entry, tmp_path / f"{entry.name}.json")
        (tmp_path / f"{entry.name}.json").write_text(json.dumps(found))
        if method == "direct (Hessian)":
            best = max(value for value in found["hindsight"].values() if np.isfinite(value))
            assert found["chosen"] > 0
            assert best > 0.9
            scores = np.load(tmp_path / f"{entry.name}.npy")
            worse = np.random.default_rng(0).permuted(scores, axis=1)
            for damping, found_by_it in ((0.1, scores), (0.05, worse)):
                peer = run.Entry("cancer-logistic", "pydvl", "direct", damping)
                np.save(tmp_path / f"{peer.name}.npy", found_by_it)
                known = {"cost": {"fit": 1.0, "score": 2.0}, "peak": 300}
                (tmp_path / f"{peer.name}.json").write_text(json.dumps(known))
    failed = run.Entry("cancer-logistic", "captum", "naive", 0.1)
    (tmp_path / f"{failed.name}.json").write_text(json.dumps({"failed": "out of memory"}))
    page.write_page(tmp_path, tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text()
    given, halved = [line for line in text.splitlines() if line.startswith("| cancer-logistic")]
    assert halved.startswith("| cancer-logistic, half-weight optimum")
    assert "(Hessian), half-weight optimum: 0.99" in halved
    assert all("pydvl direct, damping 0.1" in line for line in (given, halved))
    assert "| yes |" in halved, "a model that is solved anew stands by itself"
    assert "half-weight" not in given
    lines = {line.split(" | ")[0][2:]: line for line in text.splitlines() if "**headwater**" in line}
    assert set(lines) == set(ours)
    assert "| l2 |" in lines["direct (Hessian), at l2"]
    assert "| l2 / share |" in lines["direct (Hessian), half-weight optimum"]
    assert "| 0.1, best of 2 |" in next(line for line in text.splitlines() if "| pydvl |" in line)
    assert "for 1 of 1 pairs of a method and a task.\n" in text
    assert "captum naive at 0.1 (out of memory)" in text
    assert "Not measured yet: " in text and "pydvl direct at 0.2;" in text and "pydvl direct at 0.1;" not in text
    assert text.index("| direct (Hessian)") < text.index("| random | baseline")


def test_what_is_as_good_as_a_peer_is_not_called_better(boards, tmp_path, monkeypatch):
    _, run, page = boards
    monkeypatch.setattr(page, "RESAMPLES", 5)
    monkeypatch.setattr(page, "PAIRED", 20)
    scores = np.random.default_rng(0).standard_normal((169, 400)).astype(np.float32)
    for library, method, damping in (("headwater", "grad-dot", None), ("pydvl", "direct", 0.1)):
        entry = run.Entry("cancer-logistic", library, method, damping)
        np.save(tmp_path / f"{entry.name}.npy", scores)
        (tmp_path / f"{entry.name}.json").write_text(json.dumps({"cost": {}}))
    page.write_page(tmp_path, tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text()
    assert "| +0.000 (+0.000 to +0.000) | **no** |" in text
    assert "**cancer-logistic**: not significantly above the best peer. The model is at its minimum" in text
    assert "-0.000" not in text


def test_models_that_are_trained_again_are_other_ones_than_those_that_judge(boards, tmp_path, monkeypatch):
    tasks, run, page = boards
    monkeypatch.setitem(run.REFITS, "cancer-logistic", 40)
    task = tasks.TASKS["cancer-logistic"]
    for library, method in (("retraining", "ridge"), ("retraining", "banzhaf"), ("baseline", "knn-shapley")):
        entry = run.Entry("cancer-logistic", library, method)
        assert entry in set(run.entries("cancer-logistic"))
        found = run.WORK[library](entry, tmp_path / f"{entry.name}.json")
        (tmp_path / f"{entry.name}.json").write_text(json.dumps(found))
        assert np.load(tmp_path / f"{entry.name}.npy").shape == (169, 400)
    refits = np.load(tmp_path / "cancer-logistic refits.npz")["outputs"]
    assert not np.isin(refits[:, 0], tasks.bank(task).outputs[:, 0, 0]).any()
    found = page.board("cancer-logistic", tmp_path)
    assert found.best(ours=True) is None and found.best(ours=False) is None
    assert {row.entry.method: row.value.raw.value > 0.25 for row in found.rows}["ridge"]


@pytest.mark.slow
def test_a_record_of_the_tasks_training_is_of_its_model(boards, tmp_path, monkeypatch):
    tasks, run, _ = boards
    trained = []
    monkeypatch.setattr(tasks.np, "save", lambda file, scores: trained.append(scores.shape))
    found = run.measure_recorded(tasks.ready("digits-mlp"), run.OURS["source"], tmp_path / "s.json")
    assert trained == [(200, 1000)] and set(found["cost"]) == {"fit", "score"}


DRIVER = """
import argparse, json
import numpy as np
from workloads import load
parser = argparse.ArgumentParser()
for name in ("workload", "method", "out", "repeats", "damping"):
    parser.add_argument("--" + name)
given = parser.parse_args()
w = load(given.workload)
if given.method == "nystroem":
    raise RuntimeError("singular matrix")
while given.method == "lissa":
    pass
np.save(given.out, np.arange(len(w.x) * len(w.xq)).reshape(len(w.x), -1) * float(given.damping))
print("JSON " + json.dumps({"fit_cpu_s": 1, "score_cpu_s": 2, "peak_rss_mb": 3, "version": "4"}))
"""


@pytest.mark.slow
def test_a_peer_is_run_as_it_is_and_what_became_of_it_is_kept(boards, tmp_path, monkeypatch):
    tasks, run, _ = boards
    (tmp_path / "peer_pydvl.py").write_text(DRIVER)
    monkeypatch.setattr(run, "peerbench_folder", lambda: tmp_path)
    monkeypatch.setattr(run, "peer_python", lambda: sys.executable)
    tasks.save_rows(tasks.ready("cancer-logistic"), tmp_path / "cancer-logistic.safetensors")
    kept = {}
    for method, limit in (("direct", 100), ("nystroem", 100), ("lissa", 8)):
        entry = run.Entry("cancer-logistic", "pydvl", method, 2.0)
        run.measure(entry, tmp_path, limit)
        kept[method] = json.loads((tmp_path / f"{entry.name}.json").read_text())
    assert kept["direct"] == {"cost": {"fit": 1, "score": 2}, "peak": 3, "version": "4"}
    scores = np.load(tmp_path / "cancer-logistic pydvl direct 2.npy")
    np.testing.assert_array_equal(scores[:, 1] - scores[:, 0], np.full(169, 2.0 * 169))  # [query, train]
    assert kept["nystroem"]["failed"] == "RuntimeError: singular matrix"
    assert kept["lissa"]["failed"] == "not done after 8 CPU s"
