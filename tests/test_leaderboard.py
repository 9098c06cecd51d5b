"""The leaderboard's banks are whole and of the recipes that the code says; its page is made of what was measured."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from headwater.evaluate import Bank, ceiling, plan_subsets

FOLDER = Path(__file__).parents[1] / "benchmarks" / "leaderboard"


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
    monkeypatch.setattr(page, "RESAMPLES", 20)
    for library, method in (("headwater", "direct (Hessian)"), ("headwater", "grad-dot"), ("baseline", "random")):
        entry = run.Entry("cancer-logistic", library, method)
        work = run.measure_ours if library == "headwater" else run.measure_baseline
        found = work(entry, tmp_path / f"{entry.name}.json")
        (tmp_path / f"{entry.name}.json").write_text(json.dumps(found))
        if method.startswith("direct"):
            best = max(value for value in found["hindsight"].values() if np.isfinite(value))
            assert found["chosen"] > 0
            assert best > 0.9
            scores = np.load(tmp_path / f"{entry.name}.npy")
            peer = run.Entry("cancer-logistic", "pydvl", "direct", 0.1)
            np.save(tmp_path / f"{peer.name}.npy", np.random.default_rng(0).permuted(scores, axis=1))
            (tmp_path / f"{peer.name}.json").write_text(json.dumps({"cost": {"fit": 1.0, "score": 2.0}, "peak": 300}))
    failed = run.Entry("cancer-logistic", "captum", "naive", 0.1)
    (tmp_path / f"{failed.name}.json").write_text(json.dumps({"failed": "out of memory"}))
    page.write_page(tmp_path, tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text()
    summary = next(line for line in text.splitlines() if line.startswith("| cancer-logistic"))
    assert "direct (Hessian)" in summary and "pydvl direct, damping 0.1" in summary and "| yes |" in summary
    lines = [line for line in text.splitlines() if line.startswith("| direct (Hessian) | **headwater**")]
    assert len(lines) == 1
    assert "captum naive (out of memory)" in text
    assert text.index("| direct (Hessian)") < text.index("| random | baseline")
