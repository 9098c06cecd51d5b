"""Claims about `headwater verify`: what it reads, what it prints, and its exit status."""

import pytest

import headwater as hw
from headwater import cli
from headwater.attributor import Attributor

SETUP = """
import torch
from torch import nn
import headwater as hw
from headwater.torch import TorchComposableInfluence

torch.manual_seed(0)
model = nn.Linear(3, 2)
x, y = torch.randn(20, 3), torch.randint(0, 2, (20,))
train, query = [(x, y)], [(x[:5], y[:5])]
influence = TorchComposableInfluence(model, nn.CrossEntropyLoss(), hw.Ekfac())
"""
FUNCTION = SETUP.replace("influence =", "made =") + "\n\ndef setup():\n    return made.fit(train), train, query\n"


def verify(*arguments, capsys):
    """Exit status, and what was printed."""
    try:
        cli.main(["verify", *map(str, arguments)])
        status = 0
    except SystemExit as stopped:
        status = stopped.code
    return status, capsys.readouterr()


@pytest.fixture
def write(tmp_path):
    def to_file(text, name="mine.py"):
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return to_file


@pytest.mark.parametrize("text", [SETUP, FUNCTION, SETUP + "influence.fit(train)\n"])
def test_right_scores_exit_with_status_0_and_print_the_table(text, write, capsys):
    status, printed = verify(write(text), "--rows", 2, "--quiet", capsys=capsys)
    assert status == 0 and printed.err == ""
    assert "4 queries x 8 train rows" in printed.out and "All checks that were made passed" in printed.out


def test_a_named_function_of_a_file_or_module_is_called(write, capsys, monkeypatch):
    path = write(FUNCTION.replace("def setup", "def other"), "a_setup_of_mine.py")
    assert verify(f"{path}:other", "--rows", 2, "--quiet", capsys=capsys)[0] == 0
    monkeypatch.chdir(path.parent)
    assert verify("a_setup_of_mine:other", "--rows", 2, "--quiet", capsys=capsys)[0] == 0


def test_scores_past_the_tolerance_exit_with_status_1(write, capsys):
    status, printed = verify(write(SETUP), "--rows", 2, "--tolerance", "1e-15", "--quiet", capsys=capsys)
    assert status == 1 and "FAILED" in printed.out and printed.err == ""


def test_a_broken_operator_exits_with_status_1(write, capsys):
    broken = SETUP + "\ninfluence.fit(train)\nfor op in influence.block_mapper.operators.values():\n"
    broken += "    op.operators[0].spectrum.mul_(2.0)\n"
    assert verify(write(broken), "--quiet", capsys=capsys)[0] == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("train = query = []", "influence"),
        ("influence, train, query = 1, [], []", "int; expected an Attributor"),
        ("def setup():\n    return 3", "got int"),
        ("def setup():\n    raise KeyError('weights.pt')", "KeyError: 'weights.pt' (mine.py, line 2)"),
        ("import no_such_module", "ModuleNotFoundError"),
        ("x = (", "SyntaxError"),
        (SETUP + "query = []", "no rows"),
    ],
)
def test_a_setup_that_gives_nothing_to_verify_is_one_line_and_status_2(text, said, write, capsys):
    status, printed = verify(write(text), "--quiet", capsys=capsys)
    assert status == 2 and printed.out == ""
    assert printed.err.startswith("headwater: ") and printed.err.count("\n") == 1 and said in printed.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--demo"),
        (["nowhere.py"], "There is no file nowhere.py"),
        (["no_such_module:setup"], "no_such_module"),
        (["--demo", "mine.py"], "either"),
        (["--demo", "--seed", "-1"], "--seed"),
        (["mine.py", "--rows", "x"], "--rows"),
    ],
)
def test_a_wrong_command_is_one_line_and_status_2(arguments, said, capsys):
    status, printed = verify(*arguments, capsys=capsys)
    assert status == 2 and printed.out == ""
    assert printed.err.startswith("headwater: ") and printed.err.count("\n") == 1 and said in printed.err


def test_options_go_to_the_verification(write, capsys, monkeypatch):
    seen = {}

    def fake(self, train, query, **options):
        seen.update(options)
        return type("Found", (), {"passed": True, "__str__": lambda self: "a table"})()

    monkeypatch.setattr(Attributor, "verify", fake)
    status, printed = verify(
        write(SETUP), "--rows", 3, "--queries", 2, "--seed", 5, "--tolerance", 0.5, "--quiet", capsys=capsys
    )
    assert status == 0 and printed.out == "a table\n"
    assert seen == {"rows": 3, "queries": 2, "seed": 5, "tolerance": 0.5, "progress": False}


def test_the_demo_has_a_setup_that_is_verified(capsys, monkeypatch):
    seen = []

    def fake(self, train, query, **options):
        seen.append((self, train, query))
        return type("Found", (), {"passed": True, "__str__": lambda self: "a table"})()

    monkeypatch.setattr(Attributor, "verify", fake)
    monkeypatch.setattr(Attributor, "fit", lambda self, *args, **options: self)
    status, printed = verify("--demo", "--quiet", capsys=capsys)
    assert status == 0 and printed.out == "a table\n"
    ((influence, train, query),) = seen
    assert influence.method == hw.Direct() and len(train) and len(query)


@pytest.mark.slow
def test_the_demo_is_verified(capsys):
    status, printed = verify("--demo", "--rows", 1, "--queries", 1, "--quiet", capsys=capsys)
    assert status == 0 and printed.out.startswith("Direct(")
