"""The retraining bank: what is planned is run once, kept as it comes, and never mixed with another recipe."""

import json
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import scripts
from damage import left_by_a_dead_process
from subset_sums import measure

from headwater.errors import (
    BatchMismatch,
    DamagedFile,
    InvalidInput,
    InvalidSetting,
    NonFiniteValue,
    NotSaved,
    NotWritten,
    ShapeMismatch,
)
from headwater.evaluate.bank import Bank, Plan, adopt, plan_removals, plan_subsets, retrain
from headwater.evaluate.lds import lds
from headwater.store.seal import sealed

PLAN = plan_subsets(12, subsets=7, repeated=3, seed=4)
RECIPE = {"model": "sum", "steps": 3}


def measure_many(keep, seeds):
    return np.stack([measure(np.flatnonzero(mask), seed) for mask, seed in zip(keep, seeds, strict=True)])


def bank(path, plan=PLAN, queries=2, **recipe):
    return Bank(path, plan, queries, RECIPE | recipe)


def test_subsets_have_one_size_and_every_run_a_seed_of_its_own():
    assert (PLAN.keep.sum(axis=1) == 6).all()
    assert PLAN.alpha == 0.5
    assert len(PLAN.places) == 10
    seeds = PLAN.seeds[PLAN.seeds >= 0]
    assert len(np.unique(seeds)) == 10
    assert len(np.unique(PLAN.keep, axis=0)) == 7
    again = plan_subsets(12, subsets=7, repeated=3, seed=4)
    np.testing.assert_array_equal(again.keep, PLAN.keep)
    np.testing.assert_array_equal(again.seeds, PLAN.seeds)
    assert (plan_subsets(12, subsets=5, runs=3).seeds >= 0).all()


def test_removals_leave_out_what_is_named_after_all_rows():
    np.testing.assert_array_equal(plan_removals(3).keep, [[1, 1, 1], [0, 1, 1], [1, 0, 1], [1, 1, 0]])
    np.testing.assert_array_equal(plan_removals(3, [[0, 2]]).keep, [[1, 1, 1], [0, 1, 0]])
    for groups, error, words in (
        ([[3]], InvalidInput, "there are 3"),
        ([[True, False, True]], InvalidInput, "flatnonzero"),
        ([[0], []], InvalidInput, "Group 1 is empty"),
        ([[1, 1]], BatchMismatch, "more than once"),
        ([[0.5]], InvalidInput, "positions of rows"),
    ):
        with pytest.raises(error, match=words):
            plan_removals(3, groups)
    with pytest.raises(InvalidSetting, match="runs is 0"):
        plan_removals(3, runs=0)


def test_a_bank_is_filled_with_what_is_measured(tmp_path):
    one = bank(tmp_path / "one").fill(measure)
    for subset, run in PLAN.places:
        rows = np.flatnonzero(PLAN.keep[subset])
        np.testing.assert_array_equal(one.outputs[subset, run], measure(rows, PLAN.seeds[subset, run]))
    assert np.isnan(one.outputs[3:, 1]).all()
    for other in (
        bank(tmp_path / "many").fill_many(measure_many, at_once=4),
        bank(tmp_path / "threads").fill(measure, workers=3),
        bank(tmp_path / "one"),
    ):
        np.testing.assert_array_equal(other.outputs, one.outputs)
        assert not other.missing


def test_a_bank_that_was_stopped_goes_on_where_it_was(tmp_path):
    asked = []

    def stops(rows, seed):
        asked.append(seed)
        if len(asked) == 5:
            raise KeyboardInterrupt
        return measure(rows, seed)

    with pytest.raises(KeyboardInterrupt):
        bank(tmp_path / "b").fill(stops)
    again = bank(tmp_path / "b")
    assert len(again.missing) == 6
    with pytest.raises(InvalidInput, match="6 of 10 runs are missing"):
        lds(np.ones((2, 12)), *again)
    again.fill(stops)
    assert len(asked) == 11
    np.testing.assert_array_equal(again.outputs, bank(tmp_path / "c").fill(measure).outputs)


def test_a_killed_process_loses_the_run_that_it_was_in(tmp_path):
    code = f"""
        import os, sys
        sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1] / "support")]!r}
        from test_bank import bank, measure
        def killed(rows, seed, seen=[]):
            seen.append(seed)
            if len(seen) == 4:
                os.kill(os.getpid(), 9)
            return measure(rows, seed)
        bank({str(tmp_path / "b")!r}).fill(killed)
    """
    assert scripts.run(code)[0] == -9
    assert len(bank(tmp_path / "b").missing) == 7


def test_two_recipes_are_not_mixed(tmp_path):
    bank(tmp_path / "b").fill(measure)
    for different, what in (
        (lambda: bank(tmp_path / "b", steps=4), "recipe was"),
        (lambda: bank(tmp_path / "b", plan=plan_subsets(12, subsets=7, repeated=3, seed=5)), "plan was"),
        (lambda: bank(tmp_path / "b", queries=3), "queries was 2, now 3"),
    ):
        with pytest.raises(InvalidInput, match=what):
            different()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("x")
    with pytest.raises(InvalidInput, match="holds no bank"):
        bank(tmp_path / "other")
    (tmp_path / "b" / "recipe.json").write_text("{")
    with pytest.raises(InvalidInput, match="cannot be read"):
        bank(tmp_path / "b")


def test_outputs_that_cannot_be_used_are_refused_and_the_rest_is_kept(tmp_path):
    def broken(rows, seed):
        return [1.0, np.nan] if seed == PLAN.seeds[4, 0] else measure(rows, seed)

    one = bank(tmp_path / "b")
    with pytest.raises(NonFiniteValue, match=f"subset 4, seed {PLAN.seeds[4, 0]}.*query 1"):
        one.fill(broken)
    assert one.missing == [(4, 0)]
    two = bank(tmp_path / "c")
    with pytest.raises(NonFiniteValue, match=f"subset 4, seed {PLAN.seeds[4, 0]}"):
        two.fill_many(lambda keep, seeds: np.stack([*map(broken, map(np.flatnonzero, keep), seeds)]))
    assert two.missing == [(4, 0)]
    with pytest.raises(ShapeMismatch, match=r"are \(3,\); expected \(2,\)"):
        one.fill(lambda rows, seed: np.zeros(3))
    with pytest.raises(ShapeMismatch, match="expected"):
        one.fill_many(lambda keep, seeds: np.zeros((1, 3)))


@pytest.mark.parametrize("workers", [1, 3])
def test_a_run_that_fails_does_not_take_others_with_it(tmp_path, workers):
    """With three workers the first run waits for three others, and then fails: they are kept, as is all the rest."""
    others = threading.Semaphore(0)

    def stumbles(rows, seed):
        if seed == PLAN.seeds[0, 0]:
            for _ in range(3 if workers > 1 else 0):
                assert others.acquire(timeout=30)
            raise RuntimeError("out of luck")
        others.release()
        return measure(rows, seed)

    one = bank(tmp_path / "b")
    for _ in range(2):  # what always fails does not stand in the way
        with pytest.raises(RuntimeError, match="out of luck") as raised:
            one.fill(stumbles, workers=workers)
        assert f"subset 0, seed {PLAN.seeds[0, 0]}" in raised.value.__notes__[0]
        assert one.missing == bank(tmp_path / "b").missing == [(0, 0)]
        others.release(3)
    np.testing.assert_array_equal(one.fill(measure).outputs, bank(tmp_path / "c").fill(measure).outputs)


@pytest.mark.parametrize("workers", [1, 2])
def test_three_failures_are_enough(tmp_path, workers):
    asked = []

    def broken(rows, seed):
        asked.append(seed)
        raise RuntimeError(f"failure {len(asked)}")

    with pytest.raises(RuntimeError, match="failure"):
        bank(tmp_path / "b").fill(broken, workers=workers)
    assert 3 <= len(asked) <= 2 + workers


def test_two_that_fill_one_bank_share_the_work(tmp_path):
    first, second, asked = bank(tmp_path / "b"), bank(tmp_path / "b"), []

    def both(rows, seed):
        asked.append(seed)
        if len(asked) == 3:
            second.fill(both)
        return measure(rows, seed)

    first.fill(both)
    assert len(asked) == 11  # the run that the first was in is done by both
    np.testing.assert_array_equal(first.outputs, second.outputs)


def test_files_that_are_not_whole_are_named(tmp_path):
    bank(tmp_path / "b").fill(measure)
    for name in ("runs/2-0.npy", "plan.npz"):
        file = tmp_path / "b" / name
        file.write_bytes(file.read_bytes()[:-40])
        with pytest.raises(DamagedFile, match=f"{file.name} is damaged"):
            Bank.open(tmp_path / "b")
        with pytest.raises(DamagedFile, match=r"2-0\.npy is damaged.*Remove it"):
            bank(tmp_path / "b")
    (tmp_path / "b" / "runs" / "2-0.npy").unlink()
    bank(tmp_path / "b")  # writes the plan again
    assert Bank.open(tmp_path / "b").missing == [(2, 0)]
    packed = bank(tmp_path / "c").fill(measure).pack()
    outputs = packed.outputs
    for other, error, words in (
        (outputs[..., :1], InvalidInput, r"packed.npz has .*\(7, 2, 1\)"),
        (outputs * np.nan, NonFiniteValue, r"subset 0, seed \d+ in .*packed.npz"),
    ):
        packed._write("packed.npz", done=~np.isnan(outputs).all(axis=2), outputs=other)
        with pytest.raises(error, match=words):
            bank(tmp_path / "c")
    (tmp_path / "c" / "packed.npz").write_bytes(b"")
    with pytest.raises(DamagedFile, match=r"packed\.npz is damaged"):
        bank(tmp_path / "c")


def test_a_run_in_the_place_of_another_is_refused(tmp_path):
    """The same bytes in another run's place, or in a bank of another recipe; or made by another hand."""
    one = bank(tmp_path / "b").fill(measure)
    bank(tmp_path / "c", steps=4).fill(measure)
    for source, target in (("b/runs/1-0.npy", "b/runs/2-0.npy"), ("c/runs/1-0.npy", "b/runs/1-0.npy")):
        before = (tmp_path / target).read_bytes()
        (tmp_path / target).write_bytes((tmp_path / source).read_bytes())
        with pytest.raises(DamagedFile, match="belongs elsewhere"):
            bank(tmp_path / "b")
        (tmp_path / target).write_bytes(before)
    np.save(tmp_path / "b" / "runs" / "2-0.npy", np.zeros(2))
    with pytest.raises(DamagedFile, match=r"2-0\.npy is damaged"):
        bank(tmp_path / "b")
    one._keep((2, 0), np.zeros(2))
    assert not bank(tmp_path / "b").missing
    with pytest.raises(ValueError, match="broadcast"):
        one._keep((2, 0), np.zeros(3))
    with pytest.raises(ShapeMismatch, match=r"2-0\.npy are \(3,\)"):
        bank(tmp_path / "b")


def test_a_bank_from_before_seals_is_refused_until_it_is_adopted(tmp_path):
    full = bank(tmp_path / "b").fill(measure)
    for file in [*(tmp_path / "b" / "runs").iterdir(), tmp_path / "b" / "plan.npz"]:  # as they were written then
        np.load(file)
        file.write_bytes(file.read_bytes().rpartition(b"\nheadwater seal ")[0])
    asked = json.loads((tmp_path / "b" / "recipe.json").read_text())
    del asked["seal"]
    (tmp_path / "b" / "recipe.json").write_text(json.dumps(asked))
    with pytest.raises(DamagedFile, match=r"no checksums.*adopt\(path\)"):
        Bank.open(tmp_path / "b")
    adopt(tmp_path / "b")
    np.testing.assert_array_equal(Bank.open(tmp_path / "b").outputs, full.outputs)
    with pytest.raises(InvalidInput, match="sealed already"):
        adopt(tmp_path / "b")
    with pytest.raises(NotSaved, match="no bank"):
        adopt(tmp_path)


def test_what_was_left_by_a_kill_does_not_hinder_packing(tmp_path):
    one = bank(tmp_path / "b").fill(measure)
    left_by_a_dead_process(tmp_path / "b" / "runs" / "2-0.npy").write_bytes(b"half")
    one.pack()
    assert not (tmp_path / "b" / "runs").exists()


def test_a_file_that_could_not_be_written_leaves_nothing(tmp_path, monkeypatch):
    def full(*given, **options):
        raise OSError(28, "No space left on device")

    one = bank(tmp_path / "b")
    for step in ("os.fsync", "os.replace"):
        with monkeypatch.context() as patched:
            patched.setattr(step, full)
            with pytest.raises(NotWritten, match=r"0-0.npy could not be written.*No space left"):
                one.fill(measure)
    assert len(one.missing) == 10
    assert os.listdir(tmp_path / "b" / "runs") == []
    assert not one.fill(measure).missing


@pytest.mark.parametrize("value", [np.int64(3), {1, 2}, float("nan")])
def test_a_recipe_that_is_not_json_is_refused(tmp_path, value):
    with pytest.raises(InvalidInput, match="must be JSON"):
        bank(tmp_path / "b", steps=value)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    "options", [{"alpha": 0.0}, {"alpha": 1.0}, {"subsets": 2}, {"runs": 0}, {"repeated": -1}, {"subsets": True}]
)
def test_plans_that_mean_nothing_are_refused(options):
    with pytest.raises(InvalidSetting, match=next(iter(options))):
        plan_subsets(12, **options)


def test_a_plan_of_your_own_must_fit_together():
    with pytest.raises(ShapeMismatch, match="2 subsets and seeds for 3"):
        Plan(np.ones((2, 5), bool), np.zeros((3, 1), int))
    with pytest.raises(InvalidInput, match="Subset 1 keeps no row"):
        Plan(np.array([[True], [False]]), np.zeros((2, 1), int))
    with pytest.raises(InvalidInput, match=r"Subset 1 has the seeds \[5, 5\]"):
        Plan(np.ones((2, 3), bool), np.array([[4, 5], [5, 5]]))
    assert len(Plan(np.ones((2, 3), bool), np.array([[4, -1], [-1, -1]])).places) == 1


def test_the_recipe_can_be_read(tmp_path):
    bank(tmp_path / "b")
    assert json.loads((tmp_path / "b" / "recipe.json").read_text())["recipe"] == RECIPE


def test_a_bank_is_opened_without_its_plan_and_recipe(tmp_path):
    filled = bank(tmp_path / "b").fill(measure)
    again = Bank.open(tmp_path / "b")
    np.testing.assert_array_equal(again.outputs, filled.outputs)
    np.testing.assert_array_equal(again.keep, PLAN.keep)
    assert again.recipe == RECIPE
    with pytest.raises(FileNotFoundError, match="holds no bank"):
        Bank.open(tmp_path)
    for text, words in ((json.dumps(sealed({})), "no recipe of a bank"), ("[1]", "no checksums"), ("[", "cannot be")):
        (tmp_path / "b" / "recipe.json").write_text(text)
        with pytest.raises(InvalidInput, match=words):
            Bank.open(tmp_path / "b")


def test_a_packed_bank_is_one_file_and_can_be_filled_further(tmp_path):
    asked = []

    def stops(rows, seed):
        asked.append(seed)
        if len(asked) == 5:
            raise KeyboardInterrupt
        return measure(rows, seed)

    half = bank(tmp_path / "b")
    with pytest.raises(KeyboardInterrupt):
        half.fill(stops)
    half.pack()
    assert sorted(os.listdir(tmp_path / "b")) == ["packed.npz", "plan.npz", "recipe.json"]
    again = bank(tmp_path / "b")
    assert len(again.missing) == 6
    again.fill(measure).pack()
    full = bank(tmp_path / "c").fill(measure).outputs
    np.testing.assert_array_equal(Bank.open(tmp_path / "b").outputs, full)
    assert sorted(os.listdir(tmp_path / "b")) == ["packed.npz", "plan.npz", "recipe.json"]


def test_processes_give_what_one_worker_gives(tmp_path):
    both = bank(tmp_path / "b").fill(measure, workers=2, processes=True)
    np.testing.assert_array_equal(both.outputs, bank(tmp_path / "c").fill(measure).outputs)


def test_retraining_in_one_call(tmp_path):
    asked = []

    def train(rows, seed):
        asked.append(seed)
        return measure(rows, seed)

    options = {"rows": 12, "queries": 2, "recipe": {}, "subsets": 5, "repeated": 3, "progress": False}
    first = retrain(tmp_path / "b", train, **options)
    measured = retrain(tmp_path / "c", train, lambda model: 2 * model, **options)
    np.testing.assert_array_equal(measured.outputs, 2 * first.outputs)
    assert "5 subsets of 12 rows, 8 of 8 runs done, 2 queries" in repr(first)
    assert len(asked) == 16
    retrain(tmp_path / "b", train, **options)
    assert len(asked) == 16
    with pytest.raises(InvalidInput, match=r"alpha was 0\.5"):
        retrain(tmp_path / "b", train, **options, alpha=0.25)


def test_a_bank_that_was_stopped_while_it_was_made_is_made_again(tmp_path):
    bank(tmp_path / "b")
    (tmp_path / "b" / "recipe.json").unlink()
    assert len(bank(tmp_path / "b").missing) == 10
