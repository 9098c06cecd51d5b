"""Claims about exit statuses: what `EXITS` and the README say is so, whatever comes out of a user's own code."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from headwater import cli

README = Path(__file__).parents[1] / "README.md"


def status_of(*arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([*map(str, arguments)])
    return stopped.value.code, capsys.readouterr()


def test_the_readme_and_the_help_name_the_same_statuses():
    sentence = re.search(r"Exit status 0: .*?printed\.", README.read_text(), re.S)[0]
    assert set(re.findall(r"\d+", sentence)) == set(re.findall(r"\d+", cli.EXITS))


@pytest.mark.parametrize(
    "code", ["exit(1)", "import sys; sys.exit('no data')", "def setup():\n    raise SystemExit(0)"]
)
def test_a_setup_that_ends_python_is_no_failed_check_and_no_success(code, tmp_path, capsys):
    (tmp_path / "mine.py").write_text(code)
    status, printed = status_of("top", tmp_path / "mine.py", capsys=capsys)
    assert status == 2 and "SystemExit" in printed.err and printed.err.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("job.toml", b"setup = [", "is not TOML"),
        ("job.toml", b"\xff\xfe", "is not TOML"),
        ("job.toml", b"# nothing", "has no setup"),
        ("notes.txt", b"hello", "is no setup: expected a job"),
        ("mine.py", b"import jax.nothing_of_this_name", "No module named"),
        ("mine.py", b"raise MemoryError", "MemoryError"),
        ("mine.py", b"raise ModuleNotFoundError(name='torch')", "pip install 'headwater[torch]'"),
    ],
)
def test_a_wrong_file_is_one_line_and_status_2(name, content, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(content)
    status, printed = status_of("top", name, capsys=capsys)
    assert status == 2 and said in printed.err and printed.err.count("\n") == 1 and printed.out == ""


@pytest.mark.parametrize("arguments", [["--help"], ["completion", "bash"], ["version"]])
def test_output_that_nobody_reads_is_no_error(arguments):
    ours, theirs = os.pipe()
    os.close(ours)
    command = [sys.executable, "-m", "headwater", *arguments]
    done = subprocess.run(command, stdout=theirs, stderr=subprocess.PIPE, text=True)
    os.close(theirs)
    assert (done.returncode, done.stderr) == (141, "")
