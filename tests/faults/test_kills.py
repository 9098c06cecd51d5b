"""Processes that are killed at any moment lose nothing: the same call ends as if nobody had been."""

from __future__ import annotations

import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from fault_job import CALLS, begun, said, start

from headwater.errors import DamagedFile, NotSaved
from headwater.store.info import info
from headwater.store.runs import check

FEW = ("fit", "score", "compact")
"""Those of the short form, twice each; the long one makes all calls, twenty times."""
TIMES = [
    *[pytest.param(name, 2, id=f"{name}-2") for name in FEW],
    *[pytest.param(name, 20, id=f"{name}-20", marks=pytest.mark.faults) for name in CALLS],
]
SHARED = [each for each in TIMES if each.values[0] != "compact"]
"""What several workers do together."""


class Undisturbed:
    """A call that was made once: its bytes, what it asked of files, how long that took."""

    def __init__(self, name: str, folder: Path):
        self.name, self.before, self.call = name, folder / "before", CALLS[name][1]
        self.before.mkdir()
        CALLS[name][0](self.before)
        place = self.copy(folder / "undisturbed")
        process, began = start(name, place), time.monotonic()
        begun(place, process)
        began = time.monotonic()
        process.join(120)
        self.seconds = time.monotonic() - began
        self.bytes, self.asked = said(place), int((place / "seen-0-1").read_text())
        assert self.bytes == self.call(place).tobytes().hex()

    def copy(self, to: Path) -> Path:
        shutil.copytree(self.before, to)
        return to

    def is_made_up_for(self, folder: Path) -> None:
        """The same call, once more, gives the same, and leaves a folder with nothing wrong in it."""
        look(folder)
        assert self.call(folder).tobytes().hex() == self.bytes
        if (folder / "run").exists():
            assert check(folder / "run") == []
        else:
            assert info(folder / "fit", check=True).all_damage == ()
        assert left_over(folder) == []


def look(folder: Path) -> None:
    """Whoever looks at what is there meets no error but ours."""
    for name in ("fit", "run"):
        try:
            info(folder / name, check=True)
        except (NotSaved, DamagedFile):
            continue


def left_over(folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*") if file.name.endswith((".draft", ".claim"))]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    known: dict[str, Undisturbed] = {}

    def of(name: str) -> Undisturbed:
        if name not in known:
            known[name] = Undisturbed(name, tmp_path_factory.mktemp(name))
        return known[name]

    return of


@pytest.mark.parametrize(("name", "times"), TIMES)
def test_a_call_that_is_killed_ends_as_if_it_had_not_been(name, times, undisturbed, tmp_path):
    """Half of them before one of the things that it asks of files, half of them whenever that is."""
    whole, rng, killed = undisturbed(name), np.random.default_rng(0), 0
    for attempt in range(times):
        folder = whole.copy(tmp_path / str(attempt))
        if attempt % 2:
            process = start(name, folder)
            begun(folder, process)
            time.sleep(rng.uniform(0, whole.seconds))
            process.kill()
        else:
            process = start(name, folder, dies=int(rng.integers(1, whole.asked + 1)))
        process.join(120)
        killed += process.exitcode == -signal.SIGKILL
        whole.is_made_up_for(folder)
    assert killed >= times / 2


@pytest.mark.faults
@pytest.mark.parametrize("name", ["fit", "score", "compact"])
def test_whatever_a_call_asks_of_files_may_be_its_last(name, undisturbed, tmp_path):
    """Killed before each of them, in a folder of its own each time."""
    whole = undisturbed(name)
    for dies in range(1, whole.asked + 1):
        folder = whole.copy(tmp_path / str(dies))
        process = start(name, folder, dies=dies)
        process.join(120)
        whole.is_made_up_for(folder)
        shutil.rmtree(folder)


@pytest.mark.parametrize(("name", "times"), SHARED)
def test_of_two_workers_at_once_one_is_killed_and_the_other_does_its_work(name, times, undisturbed, tmp_path):
    whole, rng, killed = undisturbed(name), np.random.default_rng(1), 0
    for attempt in range(times):
        folder = whole.copy(tmp_path / str(attempt))
        (folder / "wait").touch()
        both = [
            start(name, folder, dies=int(rng.integers(1, whole.asked // 2)), worker=(0, 2)),
            start(name, folder, worker=(1, 2)),
        ]
        for number, process in enumerate(both):
            begun(folder, process, (number, 2))
        (folder / "wait").unlink()
        for process in both:
            process.join(120)
        killed += both[0].exitcode == -signal.SIGKILL
        assert said(folder, (1, 2)) == whole.bytes
        whole.is_made_up_for(folder)
    assert killed >= times / 2
