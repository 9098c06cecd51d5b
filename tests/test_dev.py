"""Claims about ./dev, with a fake Python and a fake uv: what it installs for which verb, and what it says meanwhile."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

PYTHON = """#!/bin/sh
here=$(dirname "$0")
case "$*" in
    "-m venv .venv") mkdir -p .venv/bin; cp "$0" .venv/bin/python; cp "$here/headwater" .venv/bin/headwater ;;
    "-m pip config list") [ -z "${PIP_SETTING:-}" ] || echo "$PIP_SETTING" ;;
    -c*) ;;
    *) echo "python $*" >>"$LOG" ;;
esac
"""
UV = '#!/bin/sh\necho "uv $* [$UV_TORCH_BACKEND] [$UV_FIND_LINKS]" >>"$LOG"\nexit "${UV_STATUS:-0}"\n'
HEADWATER = '#!/bin/sh\necho "headwater $*" >>"$LOG"\n'
NEEDED = ("sh", "cat", "cksum", "cp", "dirname", "grep", "head", "mkdir", "sed")

DEMO, VERSES, DEV = (f"-c constraints.txt -e .[{extra}]" for extra in ("demo", "verses", "dev"))


@pytest.fixture
def dev(tmp_path):
    """Runs ./dev in a folder of its own; what the fake programs were asked for, and what was said."""
    project, programs, log = tmp_path / "project", tmp_path / "bin", tmp_path / "log"
    project.mkdir()
    programs.mkdir()
    for name in ("dev", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, project / name)
    for name in NEEDED:
        (programs / name).symlink_to(shutil.which(name))
    uname = '#!/bin/sh\necho "${SYSTEM:-Linux}"\n'
    for name, text in {"python3": PYTHON, "uv": UV, "headwater": HEADWATER, "uname": uname}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)

    def run(*arguments, status=0, **environment):
        log.write_text("")
        env = {"PATH": str(programs), "LOG": str(log), "UV_TORCH_BACKEND": "", "UV_FIND_LINKS": "", **environment}
        done = subprocess.run([project / "dev", *arguments], env=env, capture_output=True, text=True)
        assert done.returncode == status, done.stderr
        return log.read_text().splitlines(), done.stderr

    run.project, run.programs = project, programs
    return run


def installed(lines):
    return [line.partition("--python .venv/bin/python ")[2].partition(" [")[0] for line in lines if "uv pip" in line]


def test_the_demo_installs_what_it_needs_and_says_so(dev):
    lines, said = dev("demo", "--seed", "3")
    assert installed(lines) == [DEMO] and lines[-1] == "headwater demo --seed 3"
    assert said.startswith("Setting up .venv for the demo: about ") and "MB" in said
    assert not any(quiet in lines[0] for quiet in ("--quiet", "-q"))


def test_what_is_set_up_is_not_set_up_again(dev):
    dev("demo")
    assert dev("demo") == (["headwater demo"], "")
    assert installed(dev("test")[0]) == [DEV]
    assert installed(dev("test")[0]) == installed(dev("demo")[0]) == []


def test_the_text_demo_adds_its_own(dev):
    lines, _ = dev("verses")
    assert installed(lines)[0] == VERSES and installed(lines)[1].startswith("--no-deps llm-")
    assert DEV not in installed(dev("demo")[0])


def test_other_requirements_are_set_up_again(dev):
    dev("demo")
    with (dev.project / "constraints.txt").open("a") as file:
        file.write("more==1\n")
    assert installed(dev("demo")[0]) == [DEMO]


def test_an_install_that_failed_is_tried_again(dev):
    lines, _ = dev("demo", UV_STATUS="3", status=3)
    assert "headwater demo" not in lines
    assert installed(dev("demo")[0]) == [DEMO]


@pytest.mark.parametrize(
    ("given", "torch"),
    [
        ({}, "[cpu]"),
        ({"UV_TORCH_BACKEND": "cu130"}, "[cu130]"),
        ({"SYSTEM": "Darwin"}, "[]"),
        ({"PIP_SETTING": "global.extra-index-url='https://example.org/simple'"}, "[]"),
    ],
)
def test_torch_is_the_cpu_build_unless_settings_say_where_it_comes_from(given, torch, dev):
    lines, _ = dev("demo", **given)
    assert torch in lines[0]


def test_uv_is_told_of_pips_settings(dev):
    lines, _ = dev("demo", PIP_SETTING="global.find-links='/wheels'")
    assert lines[0].endswith("[] [/wheels]")


def test_the_whole_test_run_says_how_long_it_takes_and_which_step_it_is_at(dev):
    _, said = dev("test")
    assert "about 12 minutes on two cores" in said
    assert [line[:6] for line in said.splitlines() if line[1:5] == " of "] == ["1 of 3", "2 of 3", "3 of 3"]


def test_a_missing_browser_is_said_in_one_line(dev):
    said = [line for line in dev("test")[1].splitlines() if "chromium" in line]
    assert len(said) == 1 and "apt install chromium" in said[0] and "skipped" in said[0]
    (dev.programs / "chromium").symlink_to(dev.programs / "sh")
    assert "chromium" not in dev("test")[1]


def test_an_unknown_verb_installs_nothing(dev):
    lines, said = dev("dmeo", status=2)
    assert lines == [] and "./dev demo" in said


def test_help_needs_nothing(dev):
    assert dev("--help") == ([], "")
    assert os.listdir(dev.project).count(".venv") == 0
