"""Several processes at one folder at once, and clocks that go back: one run, one model, no error of others."""

from __future__ import annotations

import os
import subprocess
import time

import pytest
from fault_job import begun, fit, said, score, start

from headwater.store.claims import Claims
from headwater.store.info import info
from headwater.store.runs import check

TIMES = [1, pytest.param(20, marks=pytest.mark.faults)]


def at_once(call, folder, given):
    """What each process said; they begin at the same moment. given: (worker, seed) of each."""
    folder.mkdir()
    (folder / "wait").touch()
    running = [start(call, folder, worker=worker, seed=seed) for worker, seed in given]
    for process, (worker, seed) in zip(running, given, strict=True):
        begun(folder, process, worker, seed)
    (folder / "wait").unlink()
    for process in running:
        process.join(120)
    return [said(folder, worker, seed) for worker, seed in given]


@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize("call", ["fit", "score", pytest.param("self_influence", marks=pytest.mark.faults)])
def test_two_writers_at_once_make_one_run(call, times, tmp_path):
    """Neither knows of the other: both would do all of it."""
    seen = set()
    for attempt in range(times):
        folder = tmp_path / str(attempt)
        first, second = at_once(call, folder, [((0, 1), 1), ((1, 2), 1)])
        seen |= {first, second}
        assert len(seen) == 1 and ":" not in first, (first, second)
        assert check(folder / "run") == [] if call != "fit" else info(folder / "fit", True).all_damage == ()
        assert not [file for file in folder.rglob("*") if file.name.endswith((".draft", ".claim"))]


@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize(("call", "word"), [("fit", "fingerprint was"), ("score", "fingerprint was")])
def test_of_two_models_at_once_one_has_the_folder_and_the_other_is_refused(call, word, times, tmp_path):
    alone = {}
    for seed, make in ((1, {"fit": fit, "score": score}[call]), (2, {"fit": fit, "score": score}[call])):
        (tmp_path / f"alone{seed}").mkdir()
        alone[seed] = make(tmp_path / f"alone{seed}", seed=seed).tobytes().hex()
    for attempt in range(times):
        found = at_once(call, tmp_path / str(attempt), [((0, 1), 1), ((0, 1), 2)])
        won = [text == alone[seed] for text, seed in zip(found, (1, 2), strict=True)]
        assert sorted(won) == [False, True], found
        assert found[won.index(False)].startswith("refused: ") and word in found[won.index(False)], found


# Clocks ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hours", [-1000, 0, 1000])
def test_a_run_goes_on_whatever_its_files_say_of_the_time(hours, tmp_path):
    """As if the clock had gone back, or ahead, between two calls; with claims of a dead process in it."""
    whole = score(tmp_path)
    ledger = next((tmp_path / "run").glob("ledger-*"))
    ledger.write_text("".join(ledger.read_text().splitlines(True)[:3]))
    then = time.time() + 3600 * hours
    process = start("score", tmp_path, dies=1)
    process.join(60)
    for number in (3, 4):
        Claims(tmp_path / "run").claim(f"{number}-0")
        claim = tmp_path / "run" / f"{number}-0.claim"
        claim.write_text(claim.read_text().replace(str(os.getpid()), str(process.pid)))
    for file in tmp_path.rglob("*"):
        os.utime(file, (then, then))
    assert score(tmp_path).tobytes() == whole.tobytes()
    assert check(tmp_path / "run") == [] and not list((tmp_path / "run").glob("*.claim"))


def test_a_claim_without_a_sign_of_life_is_taken_over_whatever_the_clock(tmp_path, monkeypatch):
    """Of another machine, or of a process that hangs here: what counts is this process's own time since it looked."""
    now = [1000.0]
    monkeypatch.setattr("headwater.store.claims.time.monotonic", lambda: now[0])
    monkeypatch.setattr("headwater.store.claims.TOKEN", "00000000")
    monkeypatch.setattr("headwater.store.claims.is_alive", lambda *_: True)
    Claims(tmp_path).claim("3")
    other = Claims(tmp_path)
    for then in (0, 2e9, 4e9):  # each is a sign of life
        os.utime(tmp_path / "3.claim", (then, then))
        assert not other.is_free("3")
        now[0] += 200
        assert not other.is_free("3")
    now[0] += 200
    assert other.is_free("3") and other.claim("3")


def test_a_process_that_nobody_buried_is_dead():
    """In containers whose first process asks of no child how it ended, such numbers stay for ever."""
    from headwater.store.draft import is_alive

    child = subprocess.Popen(["true"])
    deadline = time.monotonic() + 30
    while is_alive(child.pid, "00000000") and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not is_alive(child.pid, "00000000")
    os.kill(child.pid, 0)  # its number is taken still
    child.wait()
