"""Claims about jobs: one small file, verbs that go on by themselves, exit statuses that mean something."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import job_process
import numpy as np
import pytest

import headwater
from headwater import cli, rows
from headwater.errors import RowsNotFitted
from headwater.job import Call, Job
from headwater.run import plan
from headwater.run.runners import shared
from headwater.store.record import read_record
from headwater.store.scores import Scores, TopK

SETUP = """
import os, time
import torch
from torch import nn
import headwater as hw
from headwater import rows
from headwater.run import plan
from headwater.run.runners import shared
from headwater.torch import TorchBatch, TorchComposableInfluence

rows.FEW, shared.ROWS, plan.ROWS, plan.FEWEST = 1, 8, 8, 8  # many tiles of few rows

class Slow:
    def __iter__(self):
        for start in range(0, 48, 8):
            time.sleep(float(os.environ.get("PAUSE", 0)))
            yield TorchBatch(X[start : start + 8], Y[start : start + 8], ids=torch.arange(start, start + 8) + 100)

torch.manual_seed(0)
X, Y = torch.randn(48, 3), torch.randint(0, 2, (48,))
model = nn.Linear(3, 2)

def setup():
    influence = TorchComposableInfluence(model, nn.CrossEntropyLoss(), hw.Kfac(), damping=hw.relative(0.3))
    return influence, Slow(), [(X[:5] + 0.1, Y[:5])]
"""
TOML = 'setup = "mine.py:setup"\nstore = "found"\n[score]\nunit = "removal"\n[top]\nk = 3\n'


@pytest.fixture(autouse=True)
def tiles_as_before(monkeypatch):
    """Setups of these tests set them."""
    for module, name in ((rows, "FEW"), (shared, "ROWS"), (plan, "ROWS"), (plan, "FEWEST")):
        monkeypatch.setattr(module, name, vars(module)[name])


@pytest.fixture
def job(tmp_path, monkeypatch):
    """A job file, in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)  # another test's
    return write_job(tmp_path)


def write_job(folder, toml=TOML, setup=SETUP):
    (folder / "mine.py").write_text(setup)
    (folder / "job.toml").write_text(toml)
    return folder / "job.toml"


def run(*arguments, capsys):
    """Exit status, and what was printed."""
    try:
        cli.main([*map(str, arguments)])
        status = 0
    except SystemExit as stopped:
        status = stopped.code
    return status, capsys.readouterr()


def values(folder):
    """The scores of a job's store, read from its run."""
    return Call(Job.read(str(folder / "job.toml"))).score().values


# What a job says ------------------------------------------------------------------------------------------------------


def test_settings_have_defaults_and_paths_are_relative_to_the_file(tmp_path):
    found = Job.read(str(write_job(tmp_path, 'setup = "mine.py:setup"')))
    assert (found.store, found.score.unit, found.score.by_block, found.top.k) == (
        tmp_path / "results",
        "influence",
        False,
        10,
    )
    assert found.load().influence is not None


@pytest.mark.parametrize("target", ["mine.py", "mine.py:setup", "mine:setup"])
def test_a_setup_alone_is_a_job_with_default_settings(target, job, capsys):
    status, printed = run("fit", target, "--store", "elsewhere", "--json", "--quiet", capsys=capsys)
    assert status == 0 and json.loads(printed.out)["rows"] == 48
    assert read_record(Path("elsewhere")).settings["setup"] == target
    sys.modules.pop("mine", None)


@pytest.mark.parametrize(
    ("toml", "said"),
    [
        ("setpu = 'mine.py'", "no key setpu; did you mean setup?"),
        ("setup = 'mine.py'\n[score]\nunits = 'removal'", "no key [score] units; did you mean unit?"),
        ("setup = 'mine.py'\n[tpo]\nk = 1", "no key tpo; did you mean top?"),
        ("store = 'x'", "has no setup"),
        ("setup = 3", "setup is 3; expected text"),
        ("setup = 'mine.py'\ntop = 3", "top is 3; expected a table"),
        ("setup = 'mine.py'\n[top]\nk = 0", "[top] k is 0; expected a whole number"),
        ("setup = 'mine.py'\n[score]\nunit = 'loss'", "[score] unit is 'loss'; expected one of"),
        ("setup = 'mine.py'\n[score]\nby_block = 1", "by_block is 1; expected true or false"),
        ("setup = 'mine.py'\n[fit]\nworking_memory = '1 lot'", "expected a number of bytes"),
        ("setup = ", "is not TOML"),
        ("setup = 'nowhere.py'", "There is no file"),
        ("setup = 'mine.py:nothing'", "no function 'nothing'"),
    ],
)
def test_what_is_wrong_in_a_job_is_one_line_and_status_2(toml, said, job, capsys):
    write_job(job.parent, toml)
    status, printed = run("score", job, capsys=capsys)
    assert status == 2 and printed.out == ""
    assert printed.err.startswith("headwater: ") and printed.err.count("\n") == 1 and said in printed.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["fit", "none.toml"], "headwater init none.toml"),
        (["fit", "job.toml", "--worker", "2/2"], "worker is (2, 2)"),
        (["top", "job.toml", "--query", "here"], "no query 'here'"),
        (["score", "job.toml", "--unit", "removal"], "--unit"),
        (["fit", "job.toml", "--store", "."], "holds no results of a job"),
    ],
)
def test_a_wrong_command_on_a_job_is_one_line_and_status_2(arguments, said, job, capsys):
    status, printed = run(*arguments, "--quiet", capsys=capsys)
    assert status == 2 and printed.out == "" and printed.err.count("\n") == 1 and said in printed.err


# Verbs ----------------------------------------------------------------------------------------------------------------


def test_top_fits_and_scores_first_and_prints_both_ends(job, capsys):
    status, printed = run("top", job, "--quiet", "--json", capsys=capsys)
    found = json.loads(printed.out)
    assert status == 0 and found["unit"] == "removal" and len(found["queries"]) == 5
    every = values(job.parent)
    for query, scores in zip(found["queries"], every, strict=True):
        for end, sign in (("helpful", -1), ("harmful", 1)):
            order = np.argsort(sign * scores, kind="stable") + 100  # ids begin at 100
            assert [row["id"] for row in query[end]] == order[:3].tolist()
        np.testing.assert_allclose([row["score"] for row in query["helpful"]], -np.sort(-scores)[:3], rtol=1e-6)


def test_settings_versions_command_and_times_are_beside_the_results(job, capsys):
    run("score", job, "--quiet", capsys=capsys)
    found = json.loads((job.parent / "found" / "job.json").read_text())
    assert found["settings"]["score"] == {
        "unit": "removal",
        "normalise": None,
        "explain": "label",
        "by_block": False,
        "memory": None,
    }
    assert found["settings"]["top"] == {"k": 3} and found["versions"]["headwater"] == headwater.__version__
    assert found["verbs"]["score"]["command"] == f"headwater score {job} --quiet"
    assert (
        found["verbs"]["fit"]["rows"] == 48
        and found["verbs"]["score"]["started"] <= found["verbs"]["score"]["finished"]
    )


def test_a_refused_call_leaves_the_settings_of_the_results(job, capsys):
    run("score", job, "--quiet", capsys=capsys)
    write_job(job.parent, TOML.replace('unit = "removal"', 'unit = "influence"'))
    status, printed = run("score", job, "--quiet", capsys=capsys)
    assert status == 2 and "unit was 'removal', now 'influence'" in printed.err
    assert read_record(job.parent / "found").settings["score"]["unit"] == "removal"


def test_a_file_that_has_just_changed_is_read_as_it_is(job):
    for count in (48, 32, 40):  # files of one size
        (job.parent / "mine.py").write_text(SETUP.replace("range(0, 48, 8)", f"range(0, {count}, 8)"))
        assert len(list(Job.read(str(job)).load().train)) == count // 8


def test_workers_share_one_store_and_find_the_same_scores(job, capsys):
    for number in range(2):
        assert run("score", job, "--worker", f"{number}/2", "--store", "two", "--quiet", capsys=capsys)[0] == 0
    two = Call(Job.read(str(job), Path("two"))).score().values
    np.testing.assert_array_equal(two, values(job.parent))


def test_rows_at_the_end_of_the_loader_are_appended_by_the_fit_of_those_before(job, capsys):
    toml, fewer = TOML.replace("removal", "influence"), SETUP.replace("range(0, 48, 8)", "range(0, 32, 8)")
    write_job(job.parent, toml, fewer)
    status, printed = run("append", job, "--quiet", capsys=capsys)
    assert status == 2 and "score first" in printed.err
    assert run("score", job, "--quiet", capsys=capsys)[0] == 0
    before = Scores.open("found/scores").values
    write_job(job.parent, toml, SETUP)
    status, printed = run("append", job, "--json", "--quiet", capsys=capsys)
    assert status == 0 and json.loads(printed.out)["rows"] == 48
    after = Scores.open("found/scores").values
    np.testing.assert_array_equal(after[:, :32], before)
    setup = Job.read(str(job)).load()
    fitted = setup.influence.fit(list(setup.train)[:4])
    with pytest.warns(RowsNotFitted, match="16 of the 48"):
        np.testing.assert_allclose(after, fitted.attribute(setup.train, setup.query).values, rtol=1e-3, atol=1e-4)
        status, printed = run("top", job, "--json", "--quiet", capsys=capsys)
    assert status == 0 and any(row["id"] >= 132 for q in json.loads(printed.out)["queries"] for row in q["harmful"])


def test_deleted_rows_are_out_of_rankings_and_their_bytes_go(job, capsys):
    run("score", job, "--quiet", capsys=capsys)
    before = Scores.open("found/scores")
    scores = before.values
    status, printed = run("delete", job, 103, 140, "--json", capsys=capsys)
    assert status == 0 and json.loads(printed.out)["deleted"] == 2
    status, printed = run("delete", job, "--compact", "--quiet", capsys=capsys)
    stay = [each for each in before.train_ids.tolist() if each not in (103, 140)]
    after = Scores.open("found/scores")
    assert status == 0 and after.train_ids.tolist() == stay and not list(Path("found").rglob("deleted.npz"))
    np.testing.assert_array_equal(after.values, np.delete(scores, [3, 40], axis=1))
    found = json.loads(run("top", job, "--k", 46, "--json", "--quiet", capsys=capsys)[1].out)
    assert {row["id"] for row in found["queries"][0]["helpful"]} == set(stay)
    assert run("info", job, "--check", capsys=capsys)[0] == 0
    for words, said in ((["7"], "no train row '7'"), ([], "--compact")):
        status, printed = run("delete", job, *words, capsys=capsys)
        assert status == 2 and said in printed.err and printed.err.count("\n") == 1


def test_blocks_are_kept_and_ranked_together(job, capsys):
    write_job(job.parent, TOML.replace("[top]", "by_block = true\n[top]"))
    status, printed = run("top", job, "--json", "--quiet", capsys=capsys)
    assert status == 0 and len(json.loads(printed.out)["queries"][0]["harmful"]) == 3


def test_queries_may_be_left_out_of_a_fit_and_are_asked_for_before_it(job, capsys):
    write_job(job.parent, setup=SETUP.replace(", [(X[:5] + 0.1, Y[:5])]", ""))
    status, printed = run("score", job, "--quiet", capsys=capsys)
    assert status == 2 and "gives no queries" in printed.err and not Path("found").exists()
    assert run("fit", job, "--quiet", capsys=capsys)[0] == 0


def test_an_error_of_the_users_loader_has_its_traceback_and_status_2(job, capsys):
    write_job(job.parent, setup=SETUP.replace("time.sleep(", "nothing_of_that_name("))
    status, printed = run("fit", job, "--quiet", capsys=capsys)
    assert status == 2 and "Traceback" in printed.err and "nothing_of_that_name" in printed.err


def test_what_lies_beside_a_setup_can_be_imported_within_its_function(job, capsys):
    (job.parent / "beside_a_setup.py").write_text("damping = 0.3")
    write_job(
        job.parent, setup=SETUP.replace("    return influence", "    import beside_a_setup\n    return influence")
    )
    assert run("fit", job, "--quiet", capsys=capsys)[0] == 0


def test_the_table_fits_the_terminal_and_keeps_control_characters_out_of_it():
    names = np.array([["a" * 200, "b\x1b[31m"]])
    found = TopK(np.array(["q" * 50]), names, np.array([[2.0, 1.0]]), names, np.array([[-2.0, -1.0]]))
    for width in (60, 80, 200):
        lines = found.table(width).splitlines()
        assert max(map(len, lines)) <= width and "\x1b" not in "".join(lines)
        assert lines[0].split() == ["query", "end", "rank", "id", "score"] and len(lines) == 5


# What else a setup may give -------------------------------------------------------------------------------------------

MORE = SETUP.replace(
    "    return influence, Slow(), [(X[:5] + 0.1, Y[:5])]",
    """    return {"influence": influence, "train": Slow(), "query": [(X[:5] + 0.1, Y[:5])], "retrain": retrain,
            "rows": lambda name: {"kind": "odd" if name % 2 else "even"}, "queries": {"label": Y[:5]}}

def retrain(kept, seed):
    torch.manual_seed(seed)
    again = nn.Linear(3, 2)
    optimizer = torch.optim.Adam(again.parameters(), lr=0.1)
    for _ in range(20):
        optimizer.zero_grad()
        nn.functional.cross_entropy(again(X[kept]), Y[kept]).backward()
        optimizer.step()
    with open("trained", "a") as counted:
        counted.write("x")
    return nn.functional.cross_entropy(again(X[:5] + 0.1), Y[:5], reduction="none").detach().numpy()
""",
)


@pytest.fixture
def more(job):
    write_job(job.parent, TOML + "[retrain]\ncalibrate = 6\nevaluate = 6\nrepeated = 2\n", MORE)
    return job


def test_what_rows_are_stands_beside_their_ids(more, capsys):
    status, printed = run("top", more, "--query", 2, "--quiet", capsys=capsys)
    head, first, *_ = printed.out.splitlines()
    assert status == 0 and head.split() == ["query", "end", "rank", "id", "score", "kind", "query_label"]
    assert first.split()[5] == ("odd" if int(first.split()[3]) % 2 else "even")


def test_a_job_ends_in_a_page_which_trains_nothing(more, capsys):
    status, printed = run("report", more, "--quiet", capsys=capsys)
    page = Path("report.html").read_text()
    assert status == 0 and printed.out == "" and not Path("trained").exists() and "No model was trained again" in page
    assert run("evaluate", more, "--quiet", capsys=capsys)[0] == 0
    assert run("report", more, "--out", "other.html", capsys=capsys)[1].out == "Wrote other.html\n"
    page = Path("other.html").read_text()
    assert "rank correlation (LDS)" in page and "headwater report" in page
    before = Path("trained").read_text()
    assert run("report", more, "--quiet", capsys=capsys)[0] == 0 and Path("trained").read_text() == before


def test_scores_leave_as_a_table(more, capsys):
    pandas = pytest.importorskip("pandas")
    for file, lines in (("all.parquet", 5 * 48), ("all.csv", 5 * 48)):
        assert run("export", more, file, "--quiet", capsys=capsys)[0] == 0
        found = (pandas.read_parquet if file.endswith("parquet") else pandas.read_csv)(file)
        assert len(found) == lines and list(found.columns) == ["query", "train", "score", "train_kind", "query_label"]
        wide = found.pivot(index="query", columns="train", values="score")
        np.testing.assert_allclose(wide.to_numpy(), values(more.parent))
    assert run("export", more, "top.csv", "--top", 2, "--quiet", capsys=capsys)[0] == 0
    assert len(pandas.read_csv("top.csv")) == 5 * 4
    status, printed = run("export", more, "scores.xlsx", capsys=capsys)
    assert status == 2 and "ends in one of .parquet, .csv" in printed.err


def test_a_damping_is_calibrated_once_and_used_beside_the_scores_of_before(more, capsys):
    before = values(more.parent)
    status, printed = run("calibrate", more, "--json", "--quiet", capsys=capsys)
    chosen = json.loads(printed.out)["chosen"]
    assert status == 0 and Path("trained").read_text() == 6 * "x"
    more.write_text(more.read_text().replace("[score]", '[fit]\ndamping = "calibrated"\n[score]'))
    found = Call(Job.read(str(more))).score()
    assert Path("trained").read_text() == 6 * "x" and Path("found/scores-calibrated").is_dir()
    assert found.calibration is not None and dict(found.calibration.chosen) == chosen
    assert not np.allclose(found.values, before)
    np.testing.assert_array_equal(Scores.open("found/scores").values, before)
    assert run("info", "found", "--check", "--json", capsys=capsys)[0] == 0


def test_scores_are_judged_by_models_trained_again(more, capsys):
    status, printed = run("evaluate", more, "--json", "--quiet", capsys=capsys)
    found = json.loads(printed.out)
    assert status == 0 and found["low"] <= found["lds"] <= found["high"] and found["subsets"] == 6
    assert Path("trained").read_text() == 8 * "x"
    assert run("evaluate", more, "--quiet", capsys=capsys)[0] == 0 and Path("trained").read_text() == 8 * "x"


def test_models_that_were_trained_for_another_model_or_other_queries_are_refused(more, capsys):
    assert run("calibrate", more, "--quiet", capsys=capsys)[0] == 0
    assert run("evaluate", more, "--quiet", capsys=capsys)[0] == 0
    write_job(more.parent, more.read_text(), MORE.replace("X[:5] + 0.1", "X[:5] + 0.2"))
    for verb in ("calibrate", "evaluate"):  # of the second the scores differ, too
        sys.modules.pop("mine", None)
        status, printed = run(verb, more, "--quiet", capsys=capsys)
        assert status == 2 and "quer" in printed.err, printed.err
    assert Path("trained").read_text() == (6 + 8) * "x"


def test_the_rows_blamed_for_a_query_are_left_out_and_so_are_others(more, capsys):
    more.write_text(more.read_text() + "leave_out = 2\nremoved = 4\nruns = 2\n")
    status, printed = run("evaluate", more, "--json", "--quiet", capsys=capsys)
    assert status == 0 and Path("trained").read_text() == (8 + 2 * 5) * "x"
    scores, asked = values(more.parent), np.random.default_rng(0).permutation(5)[:2]
    told = [-np.sort(scores[query])[:4].sum() for query in asked]
    np.testing.assert_allclose(json.loads(printed.out)["foretold"], np.mean(told), rtol=1e-6)
    more.write_text(more.read_text().replace('"removal"', '"influence"'))
    status, printed = run("evaluate", more, "--store", "other", "--json", "--quiet", capsys=capsys)
    np.testing.assert_allclose(json.loads(printed.out)["foretold"], np.mean(told), rtol=1e-6)


def test_of_scores_that_rows_were_deleted_from_nothing_is_retrained(more, capsys):
    assert run("score", more, "--quiet", capsys=capsys)[0] == run("delete", more, "103", capsys=capsys)[0] == 0
    status, printed = run("evaluate", more, "--quiet", capsys=capsys)
    assert status == 2 and "Rows were deleted" in printed.err and not Path("trained").exists()


def test_rows_are_deleted_at_every_damping(more, capsys):
    assert run("score", more, "--quiet", capsys=capsys)[0] == 0
    more.write_text(more.read_text().replace("[score]", "[fit]\ndamping = 0.7\n[score]"))
    assert run("score", more, "--quiet", capsys=capsys)[0] == run("delete", more, "103", capsys=capsys)[0] == 0
    for folder in ("scores", "scores-0.7"):
        assert 103 not in Scores.open(f"found/{folder}").train_ids


@pytest.mark.parametrize("verb", ["score", "top", "report"])
def test_deleted_rows_do_not_come_back_at_another_damping(verb, more, capsys):
    assert run("score", more, "--quiet", capsys=capsys)[0] == run("delete", more, "103", capsys=capsys)[0] == 0
    assert run("report", more, "--quiet", capsys=capsys)[0] == 0
    assert '"id":"103"' not in Path("report.html").read_text()
    more.write_text(more.read_text().replace("[score]", "[fit]\ndamping = 0.7\n[score]"))
    status, printed = run(verb, more, "--quiet", capsys=capsys)
    assert status == 2 and "would bring them back" in printed.err and not Path("found/scores-0.7").exists()


def test_settings_may_change_between_the_verbs(more, capsys):
    assert run("evaluate", more, "--quiet", capsys=capsys)[0] == 0
    more.write_text(more.read_text().replace("evaluate = 6", "evaluate = 7"))
    assert run("report", more, "--quiet", capsys=capsys)[0] == 0
    assert "No model was trained again" in Path("report.html").read_text()
    assert run("evaluate", more, "--quiet", capsys=capsys)[0] == 0 and len(Path("trained").read_text()) == 8 + 9


@pytest.mark.parametrize("verb", ["calibrate", "evaluate"])
def test_without_a_function_that_retrains_nothing_is_begun(verb, job, capsys):
    status, printed = run(verb, job, "--quiet", capsys=capsys)
    assert status == 2 and "no function retrain" in printed.err and not Path("found").exists()


@pytest.mark.parametrize(("damping", "same"), [("0.3", False), ('"0.3 relative"', True)])
def test_a_damping_in_the_file_is_in_place_of_the_setups(damping, same, job):
    before = values(job.parent)
    job.write_text(job.read_text().replace("[score]", f"[fit]\ndamping = {damping}\n[score]"))
    assert np.allclose(values(job.parent), before) == same


@pytest.mark.parametrize("given", ["-1", "true", '"a lot"', '"1 absolute"'])
def test_a_damping_that_is_none_is_refused(given, job, capsys):
    job.write_text(job.read_text().replace("[score]", f"[fit]\ndamping = {given}\n[score]"))
    status, printed = run("fit", job, "--quiet", capsys=capsys)
    assert status == 2 and "expected a number of at least 0" in printed.err


def test_a_setup_that_gives_something_else_is_refused(job, capsys):
    write_job(job.parent, setup=MORE.replace('"retrain": retrain', '"train_again": retrain'))
    status, printed = run("fit", job, "--quiet", capsys=capsys)
    assert status == 2 and "returned 'train_again'; expected some of" in printed.err


# The first job --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("framework", ["sklearn", pytest.param("torch", marks=pytest.mark.slow)])  # README has it, too
def test_init_writes_a_job_that_runs_as_it_stands(framework, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("headwater.cli.starter.find_spec", lambda name: framework == "torch" or None)
    assert run("init", "first.toml", capsys=capsys)[0] == 0
    status, printed = run("top", "first.toml", "--query", 3, "--quiet", capsys=capsys)
    assert status == 0 and framework in Path("first.py").read_text()
    assert [line.split()[0] for line in printed.out.splitlines()] == ["query", *10 * ["3"]]


def test_init_overwrites_nothing_and_hides_no_module(job, capsys):
    (job.parent / "other.py").write_text("precious")
    for name, said in (
        ("job.toml", "exists"),
        ("other.toml", "other.py exists"),
        ("torch.toml", "hide"),
        ("x.py", "x.py"),
    ):
        status, printed = run("init", name, capsys=capsys)
        assert status == 2 and said in printed.err, name
    assert (job.parent / "other.py").read_text() == "precious" and not (job.parent / "other.toml").exists()


# Signals --------------------------------------------------------------------------------------------------------------


def wait_for(folder, pattern, is_alive):
    while not any(folder.glob(pattern)):
        assert is_alive()
        time.sleep(0.01)


def check_stopped(status, said, number):
    """That it says how to go on, in one line, and has the status that shells know."""
    word = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}[number]
    command = "headwater score job.toml --quiet"
    assert said == f"headwater: {word}. What is finished is kept in found; the same command goes on: {command}\n"
    assert status == 128 + number


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    write_job(folder)
    return values(folder)


STOPS = [(signal.SIGTERM, "found/fit/*/2.npz"), (signal.SIGINT, "found/scores/tiles.zarr/scores/c/0/0/1")]


@pytest.mark.parametrize(("number", "there"), STOPS)
def test_a_signal_leaves_a_store_that_the_same_command_goes_on_with(number, there, job, undisturbed, capsys):
    process = job_process.start(job.parent, ["score", "job.toml", "--quiet"], PAUSE="0.5")
    wait_for(job.parent, there, process.is_alive)
    os.kill(process.pid, number)
    process.join(60)
    check_stopped(process.exitcode, Path("said").read_text(), number)
    kept = {file: file.stat().st_mtime_ns for file in job.parent.glob("found/fit/*/*.npz")}
    assert kept and run("score", job, "--quiet", capsys=capsys)[0] == 0
    assert all(file.stat().st_mtime_ns == written for file, written in kept.items())  # none was computed again
    np.testing.assert_array_equal(values(job.parent), undisturbed)


@pytest.mark.slow
@pytest.mark.faults
def test_twenty_signals_at_random_moments_lose_nothing(tmp_path, undisturbed):
    rng, stopped = np.random.default_rng(0), 0
    for attempt in range(20):
        folder, number = tmp_path / str(attempt), [signal.SIGTERM, signal.SIGINT][attempt % 2]
        folder.mkdir()
        write_job(folder)
        command = [sys.executable, "-m", "headwater", "score", "job.toml", "--quiet"]
        environment = {**os.environ, "PAUSE": "0.1", "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)
        wait_for(folder, "found/job.json", lambda process=process: process.poll() is None)
        time.sleep(rng.uniform(0, 2.5))
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
        if process.returncode:
            check_stopped(process.returncode, said, number)
            stopped += 1
        np.testing.assert_array_equal(values(folder), undisturbed)
    assert stopped >= 10


# The command ----------------------------------------------------------------------------------------------------------


def test_help_says_whose_code_runs_and_what_exit_statuses_mean(capsys):
    status, printed = run("score", "--help", capsys=capsys)
    text = " ".join(printed.out.split())
    assert status == 0 and "is your own code, and is run" in text
    assert "0 all went well; 1 a check failed; 2 something was wrong" in text and "130 interrupted" in text


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_are_told_of_every_verb(shell, capsys):
    status, printed = run("completion", shell, capsys=capsys)
    assert status == 0 and all(verb in printed.out for verb in ("init", "fit", "score", "top", "info", "--worker"))


def test_python_runs_the_package_and_help_brings_no_framework():
    command = [sys.executable, "-X", "importtime", "-m", "headwater", "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True)
    imported = {line.split("|")[-1].strip().partition(".")[0] for line in shown.stderr.splitlines()}
    assert "Your own job" in shown.stdout and "cyclopts" in imported
    assert not imported & {"torch", "sklearn", "jax", "zarr", "numpy", "xarray"}


# Directions -----------------------------------------------------------------------------------------------------------


def test_a_job_scores_directions_from_the_command_line(job, capsys):
    write_job(job.parent, 'setup = "mine.py:setup"\nstore = "found"\n[score]\nnormalise = "both"\n[top]\nk = 2\n')
    status, printed = run("top", "job.toml", "--json", "--quiet", capsys=capsys)
    assert status == 0 and json.loads(printed.out)["unit"] == "cosine"
    found = values(job.parent)
    assert np.abs(found).max() <= 1 + 1e-6 and Scores.open(Path("found/scores")).is_ranking


def test_a_job_refuses_forecasts_of_directions(job, capsys):
    wrong = 'setup = "mine.py:setup"\n[score]\nnormalise = "both"\nunit = "removal"\n'
    status, printed = run("score", write_job(job.parent, wrong), capsys=capsys)
    assert status == 2 and "forecasts no removal" in printed.err
