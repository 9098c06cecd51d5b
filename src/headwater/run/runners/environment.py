"""Which worker this process is, as its launcher says it in the environment.

    torchrun          RANK of WORLD_SIZE
    srun              SLURM_PROCID of SLURM_NTASKS
    SLURM arrays      SLURM_ARRAY_TASK_ID, from SLURM_ARRAY_TASK_MIN in steps of SLURM_ARRAY_TASK_STEP, of
                      SLURM_ARRAY_TASK_COUNT; each task may itself be several processes of torchrun or srun

A share decides who begins with what, and no number depends on it: whoever is done takes over what others have left.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

from headwater.errors import InvalidSetting

Worker = tuple[int, int] | str
"""(number from 0, how many there are), "number/how many", or "env": as the environment says."""


def worker_here(environment: Mapping[str, str] | None = None) -> tuple[int, int]:
    """(number, count) of this process, by `environment` or the process's own; (0, 1) where nothing is said.

    Errors: InvalidSetting for variables that are missing, are no numbers, or contradict each other.
    """
    said = os.environ if environment is None else environment
    # The launcher that is nearest: srun starts torchrun, whose processes are the workers.
    inner = _torchrun(said) or _srun(said) or (0, 1)
    outer = _array(said) or (0, 1)
    return outer[0] * inner[1] + inner[0], outer[1] * inner[1]


def worker_of(worker: Worker) -> tuple[int, int]:
    """What `worker=` means, as (number, count). Errors: InvalidSetting unless the number is from 0 to count - 1."""
    if worker == "env":
        return worker_here()
    if isinstance(worker, str):
        if not (found := re.fullmatch(r"(\d+)/(\d+)", worker)):
            raise InvalidSetting(
                f"worker is {worker!r}; expected (number, count), 'number/count' such as '0/8', or 'env'."
            )
        worker = int(found[1]), int(found[2])
    pair = isinstance(worker, tuple) and len(worker) == 2 and all(type(each) is int for each in worker)
    if not pair:
        raise InvalidSetting(f"worker is {worker!r}; expected (number, count), 'number/count' such as '0/8', or 'env'.")
    number, count = worker
    if not 0 <= number < count:
        raise InvalidSetting(f"worker is {worker}; expected (number, count), with the number from 0 to count - 1.")
    return number, count


def _torchrun(said: Mapping[str, str]) -> tuple[int, int] | None:
    if "RANK" not in said and "WORLD_SIZE" not in said:
        return None
    return _checked("RANK", _number(said, "RANK"), "WORLD_SIZE", _number(said, "WORLD_SIZE"))


def _srun(said: Mapping[str, str]) -> tuple[int, int] | None:
    # Each may be there without the other where nothing is shared: salloc sets the one, a batch script has the other, 0.
    if "SLURM_PROCID" not in said or (said["SLURM_PROCID"] == "0" and "SLURM_NTASKS" not in said):
        return None
    return _checked("SLURM_PROCID", _number(said, "SLURM_PROCID"), "SLURM_NTASKS", _number(said, "SLURM_NTASKS"))


def _array(said: Mapping[str, str]) -> tuple[int, int] | None:
    if "SLURM_ARRAY_TASK_ID" not in said:
        return None
    task, first, count = (_number(said, f"SLURM_ARRAY_TASK_{name}") for name in ("ID", "MIN", "COUNT"))
    step = _number(said, "SLURM_ARRAY_TASK_STEP") if "SLURM_ARRAY_TASK_STEP" in said else 1
    number, between = divmod(task - first, max(step, 1))
    if between or not 0 <= number < count:
        raise InvalidSetting(
            f"SLURM_ARRAY_TASK_ID={task} is none of {count} tasks from {first} in steps of {step}. Give the array as a "
            f"range, --array=0-{max(count - 1, 0)}, or say worker=(number, count) yourself."
        )
    return number, count


def _number(said: Mapping[str, str], name: str) -> int:
    """Errors: InvalidSetting for a variable that is missing or no whole number."""
    if name not in said:
        there = [each for each in sorted(said) if each in ("RANK", "WORLD_SIZE") or each.startswith("SLURM_")]
        raise InvalidSetting(
            f"worker='env' needs {name}, which is not set; {', '.join(there)} are. Start with torchrun or srun, set "
            "both variables, or say worker=(number, count) yourself."
        )
    try:
        return int(said[name])
    except ValueError:
        raise InvalidSetting(f"{name}={said[name]!r} is no whole number.") from None


def _checked(name: str, number: int, of: str, count: int) -> tuple[int, int]:
    if not 0 <= number < count:
        raise InvalidSetting(f"{name}={number} and {of}={count} contradict each other: {name} is from 0 to {of} - 1.")
    return number, count
