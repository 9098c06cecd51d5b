"""Claims about `headwater info`: what a folder is, how far it has come, and every file that is damaged or lost."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import headwater as hw
from headwater import cli
from headwater.errors import DamagedFile, NotSaved
from headwater.evaluate.bank import Bank, plan_subsets
from headwater.job import Call, Job
from headwater.run import plan
from headwater.run.runners import shared
from headwater.store.info import info
from headwater.torch import TorchComposableInfluence

torch.manual_seed(0)
X, Y = torch.randn(40, 5), torch.arange(40) % 3
TRAIN = [(X[start : start + 8], Y[start : start + 8]) for start in range(0, 40, 8)]
MODEL = nn.Linear(5, 3)
SETUP = (
    "from test_info import influence, TRAIN, X, Y\n\ndef setup():\n    return influence(), TRAIN, [(X[:3], Y[:3])]\n"
)


def influence():
    return TorchComposableInfluence(MODEL, nn.CrossEntropyLoss(), hw.Kfac(), damping=hw.relative(0.3))


def write_all(folder):
    """One of each kind, by its name."""
    fitted = influence().fit(TRAIN, store=folder / "sums")
    scores = fitted.attribute(TRAIN, [(X[:3], Y[:3])], store=folder / "run")
    fitted.save(folder / "fit")
    fitted.gradients(TRAIN, store=folder / "gradients")
    fitted.factors([(X[:3], Y[:3])], store=folder / "factors")
    scores.save(folder / "scores")
    bank = Bank(folder / "bank", plan_subsets(40, subsets=4, repeated=1), 3, {"what": "nothing"})
    bank.fill_many(lambda keep, seeds: np.ones((len(keep), 3)))
    (folder / "mine.py").write_text(SETUP)
    (folder / "job.toml").write_text('setup = "mine.py"\nstore = "job"')
    Call(Job.read(str(folder / "job.toml"))).score()


KINDS = {
    "sums": "the sums of a fit",
    "run": "the tiles of a run of scores",
    "fit": "a saved fit",
    "gradients": "gradients of train rows",
    "factors": "factors of query rows",
    "scores": "saved scores",
    "bank": "a bank of retrained models",
    "job": "the results of a job",
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("info")
    with pytest.MonkeyPatch.context() as patch:
        for module, name in ((shared, "ROWS"), (plan, "ROWS"), (plan, "FEWEST")):
            patch.setattr(module, name, 8)
        patch.syspath_prepend(str(Path(__file__).parent))
        write_all(folder)
    return folder


@pytest.fixture
def copy(written, tmp_path):
    shutil.copytree(written, tmp_path / "copy")
    return tmp_path / "copy"


def files(folder):
    """All that have something in them: a lock has nothing."""
    found = (file for file in folder.rglob("*") if file.is_file() and not file.name.startswith("."))
    return sorted(file for file in found if file.name != "manifest.lock")


@pytest.mark.parametrize("name", KINDS)
def test_a_whole_folder_is_named_and_nothing_is_missing(name, written):
    found = info(written / name, check=True)
    assert found.kind == KINDS[name] and found.missing == "" and found.all_damage == ()
    assert found.size == sum(file.stat().st_size for file in (written / name).rglob("*") if file.is_file())
    assert json.loads(json.dumps(found.to_dict()))["kind"] == KINDS[name]


def test_method_rows_and_tiles_are_told(written):
    sums, run, fitted = info(written / "job").inside
    assert sums.facts["method"] == run.facts["method"] == hw.Kfac().describe()
    assert sums.facts["rows"] == run.facts["rows"] == 40 and sums.facts["tiles"] == run.facts["tiles"] == 5
    assert info(written / "fit").facts == fitted.facts and fitted.facts["rows"] == 40
    assert (info(written / "scores").facts["queries"], info(written / "scores").facts["rows"]) == (3, 40)
    assert info(written / "bank").facts["runs"] == "5 of 5"
    assert (info(written / "gradients").facts["rows"], info(written / "factors").facts["rows"]) == (40, 3)


@pytest.mark.parametrize("name", KINDS)
def test_every_file_that_is_damaged_is_named(name, written, copy):
    """One flipped byte, at the begin, in the middle, at the end; a cut."""
    for file in files(copy / name):
        whole = file.read_bytes()
        damages = [bytes([*whole[:at], whole[at] ^ 8, *whole[at + 1 :]]) for at in (0, len(whole) // 2, len(whole) - 1)]
        for damaged in (*damages, whole[: len(whole) // 2]):
            file.write_bytes(damaged)
            said = info(copy / name, check=True).all_damage
            assert any(str(file) in each or file.parent.name in each for each in said), (file, said)
        file.write_bytes(whole)
    assert info(copy / name, check=True).all_damage == ()


HEADS = {"identity.json", "fit.json", "zarr.json", "recipe.json"}
"""Without them nothing says what the folder is."""
NOT_YET = {
    "run/finished.json",
    "gradients/manifest.json",
    "factors/manifest.json",
    *(f"bank/runs/{run}.npy" for run in ("0-0", "0-1", "1-0", "2-0", "3-0")),
}
"""Lost, they are as what was never written: it is told as missing."""


@pytest.mark.parametrize("name", KINDS)
def test_every_file_that_is_lost_is_named(name, copy):
    for file in files(copy / name):
        whole, known = file.read_bytes(), file.relative_to(copy).as_posix()
        file.unlink()
        if file.name in HEADS and file.parent == copy / name:
            with pytest.raises(NotSaved):
                info(copy / name, check=True)
        elif known in NOT_YET:
            assert info(copy / name, check=True).missing
        elif file.name != "pass.json" and not file.name.startswith("sums-"):  # written again, and missed by nobody
            named = "line of a ledger" if file.name.startswith("ledger-") else str(file)
            assert any(named in said for said in info(copy / name, check=True).all_damage), file
        file.write_bytes(whole)


def test_what_is_not_there_yet_is_missing_and_no_damage(copy):
    for file in (copy / "bank" / "runs").glob("*.npy"):
        file.unlink()
    assert info(copy / "bank", check=True).missing == "5 runs" and info(copy / "bank", check=True).damage == ()
    label = next(each for each in (copy / "sums").iterdir() if each.is_dir())
    (label / "pass.json").unlink()
    (label / "4.npz").unlink()
    assert info(copy / "sums", check=True).missing == f"the rest of {label.name}"
    assert info(copy / "sums", check=True).damage == ()


def test_a_check_of_damage_exits_with_status_1_and_looking_does_not(copy, capsys):
    next((copy / "job" / "fit").glob("*/3.npz")).write_bytes(b"")
    cli.main(["info", str(copy / "job")])
    assert "is damaged" not in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        cli.main(["info", str(copy / "job"), "--check", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert stopped.value.code == 1 and "3.npz" in found["inside"][0]["damage"][0]


def test_a_job_file_stands_for_its_results_and_its_code_is_not_run(copy, capsys):
    (copy / "mine.py").write_text("raise SystemExit('run')")
    cli.main(["info", str(copy / "job.toml")])
    assert "the results of a job" in capsys.readouterr().out


def test_what_is_nothing_of_ours_is_one_line_and_status_2(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for given in (tmp_path, tmp_path / "nowhere", tmp_path / "file"):
        with pytest.raises(SystemExit) as stopped:
            cli.main(["info", str(given)])
        printed = capsys.readouterr()
        assert stopped.value.code == 2 and printed.err.count("\n") == 1 and str(given) in printed.err


def test_looking_at_a_damaged_head_says_so(copy):
    (copy / "sums" / "identity.json").write_text("{")
    with pytest.raises(DamagedFile, match=r"identity\.json"):
        info(copy / "sums")


def test_looking_needs_no_framework_and_writes_nothing(written):
    before = {file: file.stat().st_mtime_ns for file in written.rglob("*")}
    code = """
import sys
from headwater.cli import main
for folder in sys.argv[1:]:
    main(["info", folder, "--check"])
assert not {"torch", "zarr"} & {*sys.modules}
"""
    folders = [str(written / name) for name in KINDS]
    subprocess.run([sys.executable, "-c", code, *folders], check=True, capture_output=True)
    assert {file: file.stat().st_mtime_ns for file in written.rglob("*")} == before
