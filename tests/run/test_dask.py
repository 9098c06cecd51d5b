"""Claims about runs on a dask cluster of local processes: the same bytes as in one process, whoever is killed."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("distributed")
import dask_job

from headwater import rows
from headwater.run import plan
from headwater.run.runners import dask, shared


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """The digest of all scores that one process makes."""
    for module, name in ((rows, "FEW"), (plan, "ROWS"), (plan, "FEWEST"), (shared, "ROWS"), (dask, "ROWS")):
        monkeypatch.setattr(module, name, getattr(module, name))  # put back what the setup changes
    influence, train, query = dask_job.setup()
    influence.fit(train, store=tmp_path / "alone")
    scores = influence.attribute(train, query, store=tmp_path / "scores alone")
    return hashlib.blake2b(scores.values.tobytes()).hexdigest()


def test_workers_in_threads_give_the_bytes_of_one_process(alone, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    dask_job.run(tmp_path / "run", 2, processes=False)
    digest, seen, killed = capsys.readouterr().out.split()
    assert (digest, seen, killed) == (alone, "61", "0")


@pytest.mark.parametrize(
    ("workers", "kill"),
    [
        pytest.param(2, "once", marks=pytest.mark.slow),
        pytest.param(2, "kill", marks=pytest.mark.slow),
        pytest.param(1, "no", marks=pytest.mark.slow),
        pytest.param(2, "no", marks=pytest.mark.slow),
        pytest.param(3, "no", marks=pytest.mark.slow),
        *[pytest.param(2, "kill", marks=[pytest.mark.slow, pytest.mark.faults], id=f"killed {n}") for n in range(20)],
    ],
)
def test_any_number_of_workers_gives_the_bytes_of_one_process(workers, kill, alone, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    command = [sys.executable, dask_job.__file__, str(folder), str(workers), kill]
    source = str(Path(rows.__file__).parents[1])
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, env=os.environ | {"PYTHONPATH": source}
    )
    assert done.returncode == 0, done.stderr
    digest, seen, killed = done.stdout.split()[-3:]
    assert (digest, seen) == (alone, "61") and int(killed) == {"no": 0, "once": 1, "kill": 2}[kill]
