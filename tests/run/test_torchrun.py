"""Claims about fits and runs under torchrun: real processes, on gloo; slow, as each launch starts three of them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from headwater.store.info import info
from headwater.store.runs import check

HERE = Path(__file__).parent
SCALE = HERE.parents[1] / "docs" / "scale.md"
pytestmark = pytest.mark.slow


def torchrun(folder, code, *given, restarts=0, fails=False, timeout=300):
    """Two processes run this code; what was said is in the error where that goes otherwise than expected."""
    script = folder / "script.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(HERE)!r})\n{textwrap.dedent(code)}")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, "--max-restarts", str(restarts), script, *map(str, given)],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done


# Workers that meet in a folder ----------------------------------------------------------------------------------------

SHARED = """
    import os, signal
    import torch
    from torch import nn

    import headwater as hw
    from headwater.run.runners import shared
    from headwater.torch import TorchBatch, TorchComposableInfluence

    shared.ROWS = 8
    rank, starts = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    dies = sys.argv[1:][starts : starts + 1]  # where, at each start
    torch.manual_seed(0)
    x, y = torch.randn(40, 5), torch.arange(40) % 3

    class Train:
        def __init__(self, where):
            self.where = where

        def __iter__(self):
            for k in range(0, 40, 4):
                if [self.where] == dies and rank == 0 and k == 20:
                    os.kill(os.getpid(), signal.SIGKILL)
                yield TorchBatch(x[k : k + 4], y[k : k + 4], weights=1 + x[k : k + 4, 0] ** 2)

    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    influence = TorchComposableInfluence(model, nn.CrossEntropyLoss(), hw.Ekfac(), damping=hw.relative(0.3))
    influence.fit(Train("fit"), store="fit", worker="env")
    scores = influence.attribute(Train("scores"), [(x[:3] + 0.1, y[:3])], store="scores", worker="env")
    with open(f"{rank}.bytes", "wb") as file:
        file.write(scores.values.tobytes())
"""


def scores_of(folder):
    return [(folder / f"{rank}.bytes").read_bytes() for rank in (0, 1)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    torchrun(folder, SHARED)
    first, second = scores_of(folder)
    assert first == second
    return first


def test_a_killed_rank_is_started_again_and_nothing_is_lost(undisturbed, tmp_path):
    """Killed in the fit; started again by torchrun with its partner, killed in the scores; and again."""
    said = torchrun(tmp_path, SHARED, "fit", "scores", restarts=2)
    assert said.stderr.count("exitcode: -9") == 2, said.stderr
    assert scores_of(tmp_path) == [undisturbed] * 2
    assert not list(tmp_path.rglob("*.claim"))


def test_a_job_that_failed_goes_on_when_it_is_started_again(undisturbed, tmp_path):
    for dies in ("fit", "scores"):
        torchrun(tmp_path, SHARED, dies, fails=True)
    torchrun(tmp_path, SHARED)
    assert scores_of(tmp_path) == [undisturbed] * 2
    assert not list(tmp_path.rglob("*.claim"))


OVER_AND_OVER = """
    import os, random, signal
    from pathlib import Path
    sys.path.insert(0, sys.argv[1])
    import torch
    import fault_job

    for module, name, value in fault_job.SIZES:
        setattr(module, name, value)
    rank = int(os.environ["RANK"])

    class Mortal:
        '''The train rows; the process is killed on the way to a seeded one.'''
        def __init__(self, note, dies):
            self.note, self.left = note, dies

        def __iter__(self):
            for batch in fault_job.TRAIN:
                self.left -= 1
                if self.left == 0 and not self.note.exists():
                    self.note.touch()
                    os.kill(os.getpid(), signal.SIGKILL)
                yield batch

    for job in range(int(sys.argv[2])):
        folder = Path(f"job-{job}")
        folder.mkdir(exist_ok=True)
        dies = random.Random(job).randint(1, 40)  # of about 22 batches in a fit, 11 in its scores
        train = Mortal(folder / "killed", dies if job % 2 == rank else 0)
        influence = fault_job.influence().fit(train, store=folder / "fit", worker="env")
        scores = influence.attribute(train, fault_job.QUERIES, store=folder / "run", worker="env")
        (folder / f"{rank}.bytes").write_bytes(scores.values.tobytes())
"""


@pytest.mark.parametrize("times", [pytest.param(20, marks=pytest.mark.faults)])
def test_ranks_that_are_killed_over_and_over_lose_nothing(times, tmp_path):
    """A job after the other, in one of whose two ranks a kill waits; torchrun starts both ranks again after each."""
    torchrun(tmp_path, OVER_AND_OVER, HERE.parent / "support", times, restarts=times, timeout=1800)
    folders = [tmp_path / f"job-{job}" for job in range(times)]
    assert sum((folder / "killed").exists() for folder in folders) >= times / 2
    assert len({found for folder in folders for found in scores_of(folder)}) == 1
    for folder in folders:
        assert check(folder / "run") == [] and info(folder / "fit", check=True).all_damage == ()
        assert not list(folder.rglob("*.claim"))


# FSDP2 ----------------------------------------------------------------------------------------------------------------

IN_STEP = """
    import json, sys, time, warnings
    from datetime import timedelta
    warnings.simplefilter("error")

    import numpy as np
    import torch, torch.distributed as dist
    from torch import nn
    from torch.distributed.fsdp import fully_shard

    import headwater as hw
    from headwater import rows
    from headwater.errors import HeadwaterError
    from headwater.torch import TorchBatch, TorchComposableInfluence

    dist.init_process_group("gloo", timeout=timedelta(seconds=8))
    rank, found = dist.get_rank(), {}
    torch.manual_seed(0)
    rows.FEW = 1  # batches that are not joined
    x, y = torch.randn(280, 5), torch.arange(280) % 3
    train = [TorchBatch(x[k : k + 70], y[k : k + 70], weights=1 + x[k : k + 70, 0] ** 2) for k in range(0, 280, 70)]
    queries = [(x[:4] + 0.1, y[:4])]

    def model():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 3))

    def spread():
        found = model()
        for layer in (found[0], found[2]):
            fully_shard(layer)
        return fully_shard(found)

    def influence(of, method):
        damping = None if isinstance(method, hw.GradDot) else 1.0
        return TorchComposableInfluence(of, nn.CrossEntropyLoss(), method, damping=damping)

    for method in (hw.GradDot(), hw.Ekfac(), hw.Direct(curvature="hessian", allow_indefinite=True), hw.Cg()):
        alone = influence(model(), method).fit(train)
        fitted = influence(spread(), method).fit(train)
        assert fitted.identity() == alone.identity()
        expected, scores = alone.attribute(train, queries).values, fitted.attribute(train, queries).values
        found[method.describe()] = float(abs(scores - expected).max() / abs(expected).max())
    fitted.save(f"fit-{rank}")
    found["loaded"] = influence(model(), hw.Cg()).load(f"fit-{rank}", train).absolute_damping == alone.absolute_damping

    class Broken:
        def __iter__(self):
            yield from train[:2]
            raise OSError("the disk")

    def refused(loader, **options):
        try:
            influence(spread(), hw.Ekfac()).fit(loader, **options)
        except (HeadwaterError, OSError) as error:
            return f"{type(error).__name__}: {error}"

    other = [TorchBatch(x[::2] + 1, y[::2])]
    found["fewer rows"] = refused(train[: 4 - 2 * rank])
    found["other rows"] = refused([train, other][rank])
    found["an error"] = refused([train, Broken()][rank])
    found["shares"] = refused(train, store="shares", worker="env")
    found["again"] = refused(train)
    if rank == 1:
        time.sleep(12)  # stays away
    else:
        found["nobody there"] = refused(train)
    with open(f"{rank}.json", "w") as file:
        json.dump(found, file)
"""


def test_processes_that_hold_a_model_together_go_in_step_or_say_why_not(tmp_path):
    torchrun(tmp_path, IN_STEP)
    said = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    for found in said:
        assert len([name for name in found if "(" in name]) == 4
        assert all(found[name] < 1e-5 for name in found if "(" in name), found
        assert found["loaded"]
        assert "a forward pass on [0], the end of its rows on [1]" in found["fewer rows"]
        assert "have different rows" in found["other rows"]
        assert "DistributedSampler" in found["other rows"]
        assert "Leave worker= out" in found["shares"]
        assert found["again"] is None
    assert "a forward pass on [0], an error on [1]" in said[0]["an error"]
    assert said[1]["an error"] == "OSError: the disk"
    assert said[0]["nobody there"].startswith("ProcessLost: Of the 2 processes")


KEPT_IN_STEP = """
    import os, signal
    import torch, torch.distributed as dist
    from torch import nn
    from torch.distributed.fsdp import fully_shard

    import headwater as hw
    from headwater.run.runners import shared
    from headwater.torch import TorchComposableInfluence

    dist.init_process_group("gloo")
    rank, dies = dist.get_rank(), sys.argv[1:] == ["dies"]
    shared.ROWS = 8
    torch.manual_seed(0)
    x, y = torch.randn(40, 5), torch.arange(40) % 3

    class Train:
        read = 0

        def __iter__(self):
            for k in range(0, 40, 8):
                Train.read += 1
                if dies and rank == 0 and Train.read == 8:  # in the second pass
                    os.kill(os.getpid(), signal.SIGKILL)
                yield x[k : k + 8], y[k : k + 8]

    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    for layer in (model[0], model[2], model):
        fully_shard(layer)
    influence = TorchComposableInfluence(model, nn.CrossEntropyLoss(), hw.Ekfac(), damping=hw.relative(0.3))
    fold, computed = shared.fold, []
    shared.fold = lambda *given: computed.append(1) or fold(*given)
    scores = influence.fit(Train(), store="fit").attribute(list(Train()), [(x[:3] + 0.1, y[:3])])
    with open(f"{rank}.bytes", "wb") as file:
        file.write(scores.values.tobytes())
    with open(f"{rank}.computed", "w") as file:
        file.write(str(len(computed)))
    dist.destroy_process_group()
"""


def test_a_fit_in_step_goes_on_in_its_folder(tmp_path):
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    torchrun(tmp_path / "whole", KEPT_IN_STEP)
    torchrun(tmp_path / "killed", KEPT_IN_STEP, "dies", fails=True)
    torchrun(tmp_path / "killed", KEPT_IN_STEP)
    assert len({*scores_of(tmp_path / "whole"), *scores_of(tmp_path / "killed")}) == 1
    for folder, tiles in (("whole", 10), ("killed", 5)):  # five tiles in each pass; the first was done
        assert [(tmp_path / folder / f"{rank}.computed").read_text() for rank in (0, 1)] == [str(tiles)] * 2


# The guide's own scripts ----------------------------------------------------------------------------------------------


def script_of(section):
    """The script of a section of docs/scale.md."""
    text = SCALE.read_text().partition(f"## {section}\n")[2].partition("\n## ")[0]
    return re.search(r"```python\n(.*?)```", text, re.S)[1]


def test_the_script_for_torchrun_runs_and_both_processes_say_the_same(tmp_path):
    said = torchrun(tmp_path, script_of("torchrun"))
    half = len(said.stdout) // 2
    assert said.stdout[:half] == said.stdout[half:] != ""
    assert not list((tmp_path / "job").rglob("*.claim"))


def test_the_script_for_models_that_are_spread_runs(tmp_path):
    assert torchrun(tmp_path, script_of("Models that FSDP2 spreads over processes")).stdout
    assert (tmp_path / "fit-0").is_dir() and (tmp_path / "fit-1").is_dir()


def test_the_script_runs_as_two_tasks_of_a_slurm_array(tmp_path):
    """At once; a third, late one finds all of it done."""
    (tmp_path / "script.py").write_text(script_of("torchrun"))

    def task(number):
        named = {"ID": number, "MIN": 1, "MAX": 3, "COUNT": 3}
        said = {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in named.items()}
        environment = {**os.environ, **said, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "script.py"]
        return subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)

    first = [each.communicate(timeout=300)[0] for each in (task(1), task(2))]
    late = task(3).communicate(timeout=300)[0]
    assert first[0] == first[1] == late != ""
