"""Disks that are full or cannot be written to: the error says so, and with room the same call goes on."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from fault_job import CALLS, score

import headwater as hw
from headwater.errors import HeadwaterError, NotWritten
from headwater.store.info import info
from headwater.store.runs import check

MANY = pytest.mark.faults


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Bytes, of this process: writes fail half-way, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def mount(*words: object) -> None:
    """Only root may."""
    if sys.platform != "linux" or os.getuid() or subprocess.run(["mount", *map(str, words)], check=False).returncode:
        pytest.skip("mounting needs Linux and root")


@contextmanager
def mounted(*words: object, at: Path) -> Iterator[None]:
    mount(*words, at)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(at)], check=True)


@pytest.fixture
def undisturbed(tmp_path):
    def of(name: str) -> tuple[Path, bytes]:
        prepare, call = CALLS[name]
        (tmp_path / "before").mkdir()
        prepare(tmp_path / "before")
        shutil.copytree(tmp_path / "before", tmp_path / "whole")
        return tmp_path / "before", call(tmp_path / "whole").tobytes()

    return of


def is_whole(folder: Path) -> None:
    assert check(folder / "run") == [] if (folder / "run").exists() else not info(folder / "fit", True).all_damage
    assert not [file for file in folder.rglob("*") if file.name.endswith((".draft", ".claim"))]


def refused(name: str, folder: Path) -> bool:
    """Whether the call said that something could not be written, and what; it may say nothing but that."""
    try:
        CALLS[name][1](folder)
    except NotWritten as error:
        assert str(folder) in str(error) and "could not be written" in str(error), error
        return True
    return False


@pytest.mark.parametrize(
    ("name", "sizes"),
    [("fit", (600,)), ("append", (900,))]
    + [pytest.param(name, tuple(range(0, 2000, 100)), marks=MANY) for name in CALLS],
    ids=str,
)
def test_no_room_for_a_file_is_said_and_with_room_it_goes_on(name, sizes, undisturbed, tmp_path):
    before, whole = undisturbed(name)
    met = 0
    for size in sizes:
        folder = tmp_path / str(size)
        shutil.copytree(before, folder)
        with files_of_at_most(size):
            met += refused(name, folder)
        assert CALLS[name][1](folder).tobytes() == whole
        is_whole(folder)
    assert met


@pytest.mark.parametrize(
    ("name", "room"),
    [
        *[(name, (24,)) for name in ("score", "compact")],
        *[pytest.param(name, tuple(range(4, 160, 8)), marks=MANY) for name in ("fit", "score", "append", "compact")],
    ],
    ids=str,
)
def test_a_full_disk_is_said_and_once_it_has_room_the_call_goes_on(name, room, undisturbed, tmp_path):
    """A real one, of so many kilobytes more than what is on it already."""
    before, whole = undisturbed(name)
    disk = tmp_path / "disk"
    disk.mkdir()
    met = 0
    with mounted("-t", "tmpfs", "-o", "size=16m", "tmpfs", at=disk):
        for more in room:
            folder = disk / str(more)
            shutil.copytree(before, folder)
            used = sum(file.stat().st_blocks for file in disk.rglob("*")) // 2 + 4
            mount("-o", f"remount,size={used + more}k", disk)
            met += refused(name, folder)
            mount("-o", "remount,size=16m", disk)
            assert CALLS[name][1](folder).tobytes() == whole
            is_whole(folder)
            shutil.rmtree(folder)
    assert met


@pytest.mark.parametrize("name", ["fit", *[pytest.param(name, marks=MANY) for name in CALLS if name != "fit"]])
def test_a_folder_that_can_only_be_read_is_said_to_be(name, undisturbed, tmp_path):
    before, whole = undisturbed(name)
    with mounted("--bind", before, at=before):
        mount("-o", "remount,ro,bind", before)
        assert refused(name, before)
    assert CALLS[name][1](before).tobytes() == whole
    is_whole(before)


def test_what_is_finished_can_be_read_where_nothing_can_be_written(tmp_path):
    whole = score(tmp_path)
    with mounted("--bind", tmp_path, at=tmp_path):
        mount("-o", "remount,ro,bind", tmp_path)
        np.testing.assert_array_equal(hw.Scores.open(tmp_path / "run").values, whole)
        assert check(tmp_path / "run") == []
        try:
            np.testing.assert_array_equal(score(tmp_path), whole)
        except HeadwaterError as error:
            raise AssertionError(f"a finished run is refused: {error}") from error
