"""A job for workers of a dask cluster: `python dask_job.py FOLDER WORKERS KILL`; prints a digest of all scores."""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import threading
import time

import torch

import headwater as hw
from headwater import rows
from headwater.run import plan
from headwater.run.runners import dask, shared
from headwater.torch import TorchComposableInfluence


def setup():
    rows.FEW = 1
    plan.ROWS = plan.FEWEST = shared.ROWS = dask.ROWS = 8
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x, y = torch.randn(61, 5), torch.arange(61) % 3
    model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3))
    influence = TorchComposableInfluence(model, torch.nn.CrossEntropyLoss(), hw.Ekfac(), damping=hw.relative(0.3))
    train = [(x[k : k + 6], y[k : k + 6]) for k in range(0, 61, 6)]
    return influence, train, [(x[:9] + 0.1, y[:9])]


def slowly():
    time.sleep(0.15)
    return setup()


def main() -> None:
    folder, workers, kills = sys.argv[1], int(sys.argv[2]), {"no": (), "once": (3,), "kill": (3, 20)}[sys.argv[3]]
    run(folder, workers, kills)


def run(folder, workers, kills=(), processes=True) -> None:
    """processes: of the workers; else they are threads of this one."""
    from distributed import Client, LocalCluster

    setup()  # the sizes of tiles, in this process too
    with (
        LocalCluster(n_workers=workers, threads_per_worker=1, dashboard_address=None, processes=processes) as cluster,
        Client(cluster) as client,
    ):
        if kills:
            threading.Thread(target=killing, args=(client, folder, kills), daemon=True).start()
        job = dask.DaskRun(client, slowly if processes else setup, folder)
        job.fit()
        scores = job.attribute()
        said = hashlib.blake2b(scores.values.tobytes()).hexdigest()
        print(said, f"{scores.diagnosis.rows_seen:g}", sum("killed" in line for line in os.listdir(folder)))


def killing(client, folder, kills) -> None:
    """Workers, one after the other, once they have written so many files."""
    for done in kills:
        while sum(len(files) for _, _, files in os.walk(folder)) < done:
            time.sleep(0.03)
        pids = list(client.run(os.getpid).values())
        os.kill(pids[0], signal.SIGKILL)
        with open(os.path.join(folder, f"killed {done}"), "w") as note:
            note.write("x")


if __name__ == "__main__":
    main()
