"""Claims about which worker a process is: what launchers put into the environment."""

from __future__ import annotations

import pytest

from headwater.errors import InvalidSetting
from headwater.run.runners.environment import worker_here, worker_of


def array(task, first, count, **more):
    named = {"SLURM_ARRAY_TASK_ID": task, "SLURM_ARRAY_TASK_MIN": first, "SLURM_ARRAY_TASK_COUNT": count}
    return {name: str(value) for name, value in {**named, **more}.items()}


SAID = {
    "nothing": ({}, (0, 1)),
    "torchrun": ({"RANK": "3", "WORLD_SIZE": "8"}, (3, 8)),
    "srun": ({"SLURM_PROCID": "1", "SLURM_NTASKS": "4"}, (1, 4)),
    "a batch script's own process": ({"SLURM_PROCID": "0"}, (0, 1)),
    "the shell of salloc": ({"SLURM_NTASKS": "4"}, (0, 1)),
    "torchrun that srun started": (
        {"RANK": "5", "WORLD_SIZE": "8", "SLURM_PROCID": "1", "SLURM_NTASKS": "2"},
        (5, 8),
    ),
    "an array": (array(3, 0, 6), (3, 6)),
    "an array from 1": (array(3, 1, 6), (2, 6)),
    "an array in steps": (array(4, 0, 4, SLURM_ARRAY_TASK_STEP=2), (2, 4)),
    "an array of tasks of several processes": (array(2, 1, 3, SLURM_PROCID=1, SLURM_NTASKS=4), (5, 12)),
}


@pytest.mark.parametrize("said", SAID.values(), ids=SAID)
def test_a_process_knows_its_number_from_its_launcher(said, monkeypatch):
    environment, expected = said
    assert worker_here(environment) == expected
    for name in SAID["torchrun that srun started"][0]:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert worker_of("env") == expected


def test_all_numbers_of_an_array_of_several_processes_are_different():
    found = [
        worker_here(array(task, 1, 3, SLURM_PROCID=process, SLURM_NTASKS=4))
        for task in (1, 2, 3)
        for process in range(4)
    ]
    assert found == [(number, 12) for number in range(12)]


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"RANK": "1"}, "WORLD_SIZE, which is not set; RANK are"),
        ({"WORLD_SIZE": "2"}, "RANK, which is not set"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "contradict"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK='one' is no whole number"),
        ({"SLURM_PROCID": "1"}, "SLURM_NTASKS, which is not set"),
        ({"SLURM_PROCID": "4", "SLURM_NTASKS": "4"}, "SLURM_PROCID=4 and SLURM_NTASKS=4 contradict"),
        ({"SLURM_ARRAY_TASK_ID": "4"}, "SLURM_ARRAY_TASK_MIN, which is not set"),
        (array(7, 1, 3), "--array=0-2"),
        (array(5, 0, 4, SLURM_ARRAY_TASK_STEP=2), "SLURM_ARRAY_TASK_ID=5"),
    ],
)
def test_what_is_missing_or_contradicts_itself_is_refused(environment, said):
    with pytest.raises(InvalidSetting, match=said):
        worker_here(environment)


def test_a_worker_may_be_written_as_text():
    assert worker_of("2/8") == (2, 8) == worker_of((2, 8))
    for worker in ("8/8", "2/8/1", "two", "-1/8", (8, 8)):
        with pytest.raises(InvalidSetting, match="number"):
            worker_of(worker)
