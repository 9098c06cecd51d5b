"""Claims about sentences on a terminal: they fit it; and about how little it takes to print help."""

import subprocess
import sys

import pytest
from rich.cells import cell_len

from headwater.cli.app import print_wrapped
from headwater.tables import table, wrapped

LONG = "WORRYING: the mean gradient is many times what chance gives, so that the model is not at a minimum of its loss."


@pytest.mark.parametrize("width", [20, 40, 79])
def test_sentences_fit_the_width_and_keep_their_words(width):
    text = f"{LONG}\n\n  {LONG}\nshort"
    found = wrapped(text, width)
    assert max(map(cell_len, found.split("\n"))) <= width
    assert found.split() == text.split() and found.count("\n\n") == 1 and found.endswith("\nshort")


def test_what_begins_indented_goes_on_indented():
    assert all(line.startswith("  W") or line.startswith("  ") for line in wrapped(f"  {LONG}", 40).split("\n"))


def test_the_last_cell_of_a_table_goes_on_below_itself():
    first, *more = wrapped(table([["missing", LONG], ["size", "3"]], left=(0, 1)), 60).split("\n")
    assert first.startswith("missing  WORRYING") and more[0].startswith(" " * 9) and more[0][9] != " "
    assert more[-1] == "size     3"


def test_rows_of_numbers_stay_rows():
    numbers = table([["block", *["1234.5"] * 12]])
    assert wrapped(numbers, 60) == numbers


def test_a_word_that_is_too_long_has_a_line_of_its_own():
    assert wrapped(f"see {'x' * 30} there", 20).split("\n") == ["see", "x" * 30, "there"]


def test_wide_characters_take_two_columns():
    assert max(map(cell_len, wrapped("図書 " * 30, 20).split("\n"))) <= 20


def test_only_a_terminal_has_its_sentences_wrapped(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    print_wrapped(LONG)
    assert capsys.readouterr().out == f"{LONG}\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    print_wrapped(LONG)
    assert capsys.readouterr().out == f"{wrapped(LONG, 40)}\n"


HELP = """
import sys
from headwater import cli
for verb in ([], *([name] for name in cli.app if not name.startswith("-")), ["demo", "digits"], ["demo", "text"]):
    cli.app([*verb, "--help"], result_action="return_value")
print(*sorted({name.partition(".")[0] for name in sys.modules}), file=sys.stderr)
"""


def test_help_of_every_verb_imports_nothing_that_computes():
    """What takes its time is importing; a count of seconds would depend on the machine."""
    done = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, check=True)
    assert done.stdout.count("Usage: headwater") > 15
    slow = {"torch", "sklearn", "jax", "numpy", "scipy", "pandas", "xarray", "zarr", "tqdm", "jinja2", "matplotlib"}
    assert not slow & set(done.stderr.split())
