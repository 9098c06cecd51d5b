"""Small calls that keep something in a folder, made by processes that are killed: real ones, forked off a server."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from functools import cache
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from torch import nn

import headwater as hw
from headwater import rows
from headwater.errors import HeadwaterError
from headwater.run import plan
from headwater.run.runners import shared
from headwater.store import runs
from headwater.torch import TorchBatch, TorchComposableInfluence

FORKS = get_context("forkserver")
NEEDED = ["headwater.torch", "headwater.run.attribute", "headwater.run.removal", "headwater.run.runners.shared"]
LATE = ["torch.distributed.fsdp", "xarray", "zarr", "dask.array"]
"""What is imported on the way, where it is installed."""
FORKS.set_forkserver_preload([*NEEDED, "headwater.run.diagnosis", "headwater.store.runs", *LATE])
SIZES = ((rows, "FEW", 1), (shared, "ROWS", 8), (plan, "ROWS", 8), (plan, "FEWEST", 8))
"""Many tiles of few rows."""
X = torch.randn(44, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(44) % 3
TRAIN = [TorchBatch(X[k : k + 4], Y[k : k + 4], ids=torch.arange(k, k + 4) + 100) for k in range(0, 44, 4)]
QUERIES = [(X[:3] + 0.1, Y[:3])]
GONE = [100, 117, 143]


def influence(seed: int = 1) -> TorchComposableInfluence:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3))
    return TorchComposableInfluence(model, nn.CrossEntropyLoss(), hw.Ekfac(), damping=hw.relative(0.3))


@cache
def fitted(seed: int = 1) -> TorchComposableInfluence:
    return influence(seed).fit(TRAIN)


# Calls: what each gives is the same however often it is made ----------------------------------------------------------

Worker = tuple[int, int]
ALONE = (0, 1)


def fit(folder: Path, worker: Worker = ALONE, seed: int = 1) -> np.ndarray:
    found = influence(seed).fit(TRAIN, store=folder / "fit", worker=worker)
    return found.attribute(TRAIN[:1], QUERIES).values


def score(folder: Path, worker: Worker = ALONE, seed: int = 1) -> np.ndarray:
    return fitted(seed).attribute(TRAIN, QUERIES, store=folder / "run", worker=worker).values


def append(folder: Path, worker: Worker = ALONE) -> np.ndarray:
    return fitted().attribute(TRAIN, QUERIES, store=folder / "run", worker=worker, append=True).values


def compact(folder: Path, worker: Worker = ALONE) -> np.ndarray:
    runs.compact(folder / "run")
    return hw.Scores.open(folder / "run").values


def self_influence(folder: Path, worker: Worker = ALONE) -> np.ndarray:
    return fitted().self_influence(TRAIN, store=folder / "run", worker=worker)


def removal(folder: Path, worker: Worker = ALONE) -> np.ndarray:
    return fitted().removal(TRAIN, QUERIES, store=folder / "run", worker=worker)


def nothing(folder: Path) -> None:
    """No preparation."""


def fewer_rows(folder: Path) -> None:
    fitted().attribute(TRAIN[:7], QUERIES, store=folder / "run")


def with_deleted_rows(folder: Path) -> None:
    score(folder)
    runs.delete(folder / "run", GONE)


CALLS: dict[str, tuple[Callable[[Path], None], Callable[..., np.ndarray]]] = {
    "fit": (nothing, fit),
    "score": (nothing, score),
    "append": (fewer_rows, append),
    "compact": (with_deleted_rows, compact),
    "self_influence": (nothing, self_influence),
    "removal": (nothing, removal),
}
"""By name: what has to be there before, and the call."""


# Processes ------------------------------------------------------------------------------------------------------------

CHANGES = {"open", "os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir"}


class Count:
    """Of what the process asks of files; the process is killed just before one of them."""

    def __init__(self, folder: Path, dies: int):
        self.folder, self.dies, self.seen = str(folder), dies, 0
        sync = os.fsync
        os.fsync = lambda file: (self.one(), sync(file))[1]  # of which the interpreter tells nobody
        sys.addaudithook(self.hear)

    def hear(self, event: str, given: tuple[object, ...]) -> None:
        if event in CHANGES and (event != "open" or str(given[0]).startswith(self.folder)):
            self.one()

    def one(self) -> None:
        self.seen += 1
        if self.seen == self.dies:
            os.kill(os.getpid(), signal.SIGKILL)


def start(call: str, folder: Path, dies: int = 0, worker: Worker = ALONE, seed: int = 1):
    """A process that makes the call, killed just before it asks something of files for the `dies`-th time; 0: not.

    `begun` files say that it is at it; `said` files say how that ended: the bytes, in hex, or an error.
    """
    process = FORKS.Process(target=_main, args=(call, folder, dies, worker, seed))
    process.start()
    return process


def said(folder: Path, worker: Worker = ALONE, seed: int = 1) -> str:
    return (folder / f"said-{worker[0]}-{seed}").read_text()


def begun(folder: Path, process, worker: Worker = ALONE, seed: int = 1) -> None:
    """Wait until it is."""
    while not (folder / f"begun-{worker[0]}-{seed}").exists():
        assert process.is_alive()
        time.sleep(0.001)


def _main(call: str, folder: Path, dies: int, worker: Worker, seed: int) -> None:
    torch.set_num_threads(1)
    for module, name, value in SIZES:
        setattr(module, name, value)
    if call != "fit":
        fitted(seed)
    name = f"{worker[0]}-{seed}"
    (folder / f"begun-{name}").touch()
    while (folder / "wait").exists():
        time.sleep(0.0005)
    count, options = Count(folder, dies), {} if seed == 1 else {"seed": seed}
    try:
        found = CALLS[call][1](folder, worker, **options).tobytes().hex()
    except HeadwaterError as error:
        found = f"refused: {error}"
    except BaseException as error:
        found = f"raw: {error!r}"
    seen = count.seen
    (folder / f"said-{name}").write_text(found)
    (folder / f"seen-{name}").write_text(str(seen))
