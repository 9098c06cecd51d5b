"""Claims about the demo: honest numbers, the same every time, from one command."""

import re
import subprocess
import sys
from functools import cache
from importlib import import_module
from inspect import isabstract
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

import headwater
from headwater import __version__, cli
from headwater.demo import METHODS, Settings, explore, report, tell
from headwater.demo import experiment as demo
from headwater.demo.story import suspects
from headwater.errors import InvalidSetting, MissingExtra
from headwater.methods import registry
from headwater.methods.base import Method
from headwater.methods.registry import costs_table

pytestmark = pytest.mark.filterwarnings("ignore::headwater.errors.NotConverged")  # LiSSA's steps are far too few

SMALL = {"train": 400, "steps": 60, "explained": 3, "retrains": 2, "removed": 10, "quiet": True}

TINY = {"train": 120, "queries": 80, "steps": 80, "explained": 2, "retrains": 1, "removed": 5, "quiet": True}
"""For what is asked of every method."""


@cache
def tiny(method):
    return explore(Settings(**TINY, method=method))


@cache
def small(**options):
    return explore(Settings(**(SMALL | options)))


def test_the_same_seed_gives_the_same_numbers():
    again = explore(Settings(**SMALL))
    assert tell(again) == tell(small())
    assert report(again) == report(small())
    np.testing.assert_array_equal(again.scores, small().scores)


def test_another_seed_gives_other_numbers():
    assert not np.array_equal(small(seed=1).digits.given, small().digits.given)


@pytest.mark.parametrize("seed", [0, 1])
def test_wrong_labels_are_planted_as_announced(seed):
    digits = demo.load(Settings(seed=seed))
    assert len(digits.given) == 1000 and len(digits.y_query) == 797
    for digit, called, share in demo.MISLABELLED:
        mine = digits.original == digit
        assert set(digits.given[mine]) == {digit, called}
        assert (digits.given[mine] == called).mean() == pytest.approx(share, abs=0.51 / mine.sum())
    untouched = ~np.isin(digits.original, [digit for digit, *_ in demo.MISLABELLED])
    assert not digits.mislabelled[untouched].any()


def test_every_wrong_prediction_is_explained_and_no_other():
    found = small()
    assert found.scores.shape == (len(found.wrong), 400)
    assert (found.predicted != found.digits.y_query[found.wrong]).all()


def test_baselines_rank_only_rows_that_are_labelled_otherwise():
    found = small()
    same = found.digits.given == found.digits.y_query[found.wrong][:, None]
    for name in (demo.PIXELS, demo.HIDDEN, demo.LOSS, demo.RANDOM):
        assert np.array_equal(np.isneginf(found.rankings[name]), same)


def test_the_most_harmful_row_is_ranked_first():
    found = small()
    ranking = found.rankings[METHODS["ekfac"].title]
    np.testing.assert_array_equal(ranking.argmax(1), found.scores.argmin(1))


def test_every_removal_is_retrained_with_the_same_seeds():
    found = small()
    assert list(found.retrained_losses) == [demo.NOTHING, "EKFAC", demo.HIDDEN, demo.LOSS, demo.RANDOM]
    assert {losses.shape for losses in found.retrained_losses.values()} == {(3, 2)}


def test_retraining_without_rows_equals_training_on_the_others():
    """The slow truth: no shared subsets, one model at a time."""
    from headwater.retraining.torch.trainer import train_mlps

    settings, found = Settings(**SMALL), small()
    query = found.wrong[found.explained[1]]
    keep = np.ones((1, 400), bool)
    keep[0, np.argsort(found.scores[found.explained[1]], kind="stable")[:10]] = False
    digits = found.digits
    alone = train_mlps(digits.x_train, digits.given, keep, [2], widths=demo.WIDTHS, steps=settings.steps, l2=demo.L2)
    loss = alone.losses(digits.x_query[[query]], digits.y_query[[query]]).item()
    assert found.retrained_losses["EKFAC"][1, 1] == pytest.approx(loss, rel=1e-3)


def test_the_text_shows_every_baseline():
    text = tell(small())
    for name in (demo.PIXELS, demo.HIDDEN, demo.LOSS, demo.RANDOM, "strong baseline"):
        assert name in text


def test_the_report_is_one_page_that_loads_nothing():
    text = report(small())
    assert not re.search(r"https?://|<script src|<link", text)
    assert not re.findall(r'src="(?!data:image/png)', text)
    assert "increase of the query&#39;s loss when the train row is removed" in text


LIKENESS = {"tracin", "representer", "grad-dot", "grad-cos"}


TOLD = ("ekfac", "trak", "tracin", "representer", "grad-dot")
"""One of each kind: a forecast, another output, checkpoints, one layer, likeness; the others are slow tests."""


@pytest.mark.parametrize("method", [pytest.param(m, marks=() if m in TOLD else pytest.mark.slow) for m in METHODS])
def test_every_method_tells_its_story(method):
    found = tiny(method)
    recipe, text = METHODS[method], tell(found)
    assert recipe.title in text and recipe.note in text and f"--method {method}" in text
    assert np.isfinite(found.scores).all() and np.isfinite(found.self_influence).all()
    assert found.unit == ("influence" if method in LIKENESS else "removal")
    assert ("predicted fall in loss" in text) == (found.unit == "removal" and found.explained_as == "loss")
    assert report(found).endswith("</html>\n")


@pytest.mark.slow
def test_no_two_names_give_the_same_scores():
    """But for those that solve the same system."""
    same_network = [name for name, recipe in METHODS.items() if name != "direct" and not recipe.refitted]
    unit = {name: tiny(name).scores / np.linalg.norm(tiny(name).scores) for name in same_network}
    alike = {(a, b) for a, x in unit.items() for b, y in unit.items() if a < b and np.abs(x - y).max() < 1e-4}
    assert alike <= {("block-krylov", "cg")}


def test_solvers_of_one_system_agree_in_the_demo():
    cg, krylov = (tiny(name) for name in ("cg", "block-krylov"))
    np.testing.assert_allclose(krylov.scores, cg.scores, atol=0.01 * np.abs(cg.scores).max())


def test_tracin_reads_checkpoints_of_the_very_training():
    digits, settings = tiny("tracin").digits, Settings(**TINY, method="tracin")
    network = demo.train_network(settings, digits)
    assert [point.step for point in network.checkpoints] == [8, 24, 40, 56, 72]
    plain = demo.train_network(Settings(**TINY), digits)
    np.testing.assert_array_equal(network.logits(digits.x_query), plain.logits(digits.x_query))


def test_representer_points_add_up_to_the_logit_in_the_demo():
    found, settings = tiny("representer"), Settings(**TINY, method="representer")
    network = demo.train_network(settings, found.digits)
    true = found.digits.y_query[found.wrong]
    logits = network.logits(found.digits.x_query[found.wrong])[0].numpy()[np.arange(len(true)), true]
    np.testing.assert_allclose(found.scores.sum(1) / settings.train, logits, atol=0.02 * np.abs(logits).max())


def test_self_influence_by_another_method_is_said_to_be():
    found = tiny("lissa")
    np.testing.assert_array_equal(found.self_influence, tiny("cg").self_influence)
    assert "self-influence (conjugate gradients)" in tell(found)


def test_scores_of_a_margin_are_not_called_a_loss():
    text = report(tiny("trak"))
    assert "increase of the query&#39;s negative margin" in text and "query&#39;s loss" not in text


def test_the_command_line_names_every_method():
    assert get_args(cli.Method) == tuple(METHODS)


def test_the_page_on_methods_has_a_row_for_every_method():
    page = (Path(__file__).parents[2] / "docs" / "methods.md").read_text()
    assert costs_table() in page


def test_every_method_class_is_in_the_registry():
    """In the package's files, abstract ones aside: each has a line, and a type checker knows it by its name."""
    classes = {
        found
        for path in Path(registry.__file__).parent.glob("[a-z]*.py")
        for found in vars(import_module(f"headwater.methods.{path.stem}")).values()
        if isinstance(found, type) and issubclass(found, Method) and not isabstract(found)
    }
    assert {entry.cls for entry in headwater.METHODS} == classes
    seen = Path(registry.__file__).read_text()
    assert all(f"import {entry.class_name} as {entry.class_name}" in seen for entry in headwater.METHODS)


def test_one_line_in_the_registry_is_all_that_a_method_needs():
    """A method from elsewhere, registered: the demo, the command line and the docs' table know it."""
    code = """
import sys, types
from dataclasses import dataclass
from headwater.methods import registry
from headwater.methods.grad_dot import GradDot

@dataclass(frozen=True)
class Half(GradDot):
    seed: int = 0
    def invert(self, curvature, damping):
        return super().invert(curvature, damping) * 0.5

there = types.ModuleType("headwater.methods.half")
there.Half = Half
sys.modules[there.__name__] = there
costs = registry.Costs("none", "nothing", "nothing", "o i", "none")
registry.METHODS += (registry.MethodEntry("half", "Half", "half", "half of it", costs),)
for name in [name for name in sys.modules if name == "headwater"]:
    del sys.modules[name]
import headwater as hw
assert hw.Half is Half and "Half" in hw.__all__ and "`hw.Half()`" in registry.costs_table()
from headwater.demo import METHODS
from headwater.cli import app
assert METHODS["half"].title == "half of it" and METHODS["half"].method(3).seed == 3
app(["demo", "--help"])
"""
    shown = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert "half" in shown.stdout


@pytest.mark.slow
def test_the_full_demo_finds_the_planted_labels():
    """At full size a blamed row is far likelier to be mislabelled than a random one, and removal mends mistakes."""
    found = explore(Settings(quiet=True))
    _, mislabelled, *_ = zip(*suspects(found).rows, strict=True)
    assert mislabelled[0].value > 4 * mislabelled[-1].value
    losses = {name: values.mean() for name, values in found.retrained_losses.items()}
    assert losses["EKFAC"] < min(losses[demo.NOTHING], losses[demo.RANDOM]) - 0.3


def test_an_unknown_method_is_refused():
    with pytest.raises(InvalidSetting, match="got 'magic'"):
        explore(Settings(method="magic"))


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=re.escape("pip install 'headwater[demo]'")):
        explore(Settings())


# The command line ---------------------------------------------------------------------------------------------------


@pytest.fixture
def small_demo(monkeypatch):
    monkeypatch.setattr("headwater.demo.Settings", lambda **options: Settings(**(SMALL | options)))


def test_the_demo_command_writes_the_report_and_prints_the_findings(small_demo, tmp_path, capsys):
    out = tmp_path / "page.html"
    cli.main(["demo", "--out", str(out)])
    printed = capsys.readouterr().out
    assert out.read_text() == report(small())
    assert tell(small()) in printed and str(out) in printed


def test_quiet_writes_the_report_and_says_nothing(small_demo, tmp_path, capsys):
    cli.main(["demo", "--quiet", "--out", str(tmp_path / "page.html")])
    assert capsys.readouterr() == ("", "")


def test_open_shows_the_report_in_a_browser(small_demo, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr("webbrowser.open", shown.append)
    cli.main(["demo", "--quiet", "--open", "--out", str(tmp_path / "page.html")])
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
    code = "import sys, headwater.cli, headwater.demo; print({'torch', 'sklearn'} & set(sys.modules))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "set()"
