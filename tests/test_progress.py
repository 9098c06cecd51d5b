"""Claims about progress: a bar where one can be drawn, whole lines elsewhere, and nothing unless asked for."""

import fcntl
import os
import pty
import struct
import termios
from contextlib import redirect_stderr

import pytest

from headwater import progress
from headwater.progress import bar, track


@pytest.fixture
def clock(monkeypatch):
    """Seconds, which pass when they are told to."""
    now = [100.0]
    monkeypatch.setattr(progress, "monotonic", lambda: now[0])
    return now


def drawn_on_a_terminal(monkeypatch, columns, term="xterm"):
    """What a track of four steps writes to a terminal that says it has so many columns."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24 if columns else 0, columns, 0, 0))
    monkeypatch.setenv("TERM", term)
    with os.fdopen(theirs, "w") as stream, redirect_stderr(stream):
        assert list(track("abcd", "checks", show=True)) == list("abcd")
        stream.write("end")
    shown = b""
    while not shown.endswith(b"end"):  # the system passes it on in its own time
        shown += os.read(ours, 10_000)
    os.close(ours)
    return shown.decode().removesuffix("end")


@pytest.mark.parametrize("columns", [0, 40, 200])
def test_a_terminal_has_a_bar_also_where_it_does_not_say_how_wide_it_is(columns, monkeypatch):
    shown = drawn_on_a_terminal(monkeypatch, columns)
    assert "checks:" in shown and "0/4" in shown and "|" in shown
    assert max(map(len, shown.replace("\x1b[A", "").split("\r"))) <= (columns or 80)


def test_a_dumb_terminal_has_no_bar(monkeypatch):
    assert drawn_on_a_terminal(monkeypatch, 80, term="dumb") == ""


def test_a_log_has_whole_lines_every_few_seconds(clock, capsys):
    for _ in track(range(100), "retraining", show=True):
        clock[0] += 1
    assert capsys.readouterr().err.splitlines() == [
        "retraining: 2 of 100 (2%), 0:02, about 1:38 left",
        *(f"retraining: {k} of 100 ({k}%), {spent}, about {left} left" for k, spent, left in SEEN),
        "retraining: 100 of 100 (100%), 1:40",
    ]


SEEN = [
    (12, "0:12", "1:28"),
    (22, "0:22", "1:18"),
    (32, "0:32", "1:08"),
    (42, "0:42", "0:58"),
    (52, "0:52", "0:48"),
    (62, "1:02", "0:38"),
    (72, "1:12", "0:28"),
    (82, "1:22", "0:18"),
    (92, "1:32", "0:08"),
]


def test_what_is_short_writes_nothing_to_a_log(clock, capsys):
    assert list(track(range(5), "checks", show=True)) == list(range(5))
    assert capsys.readouterr().err == ""


def test_a_log_is_told_what_is_known_where_no_total_is(clock, capsys):
    with bar("fit", True, unit="rows") as shown:
        clock[0] += 3700
        shown.update(64)
    assert capsys.readouterr().err.splitlines() == ["fit: 64 rows, 1:01:40"] * 2


def test_a_step_that_fails_ends_the_lines(clock, capsys):
    with pytest.raises(KeyError), bar("fit", True, 2) as shown:
        clock[0] += 5
        shown.update()
        raise KeyError
    assert capsys.readouterr().err.count("\n") == 1


def test_nothing_is_shown_unless_asked_for(clock, capsys):
    for _ in track(range(5), "checks", show=False):
        clock[0] += 60
    with bar("checks", False, 5) as shown:
        shown.update()
    assert capsys.readouterr().err == ""
