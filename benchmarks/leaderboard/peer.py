"""Runs a driver of the peers' folder on a task of the leaderboard: `peer.py ROWS DRIVER [the driver's arguments]`.

The drivers ask a module `workloads` for a model and its rows. Here it is made of one task, from the file that
`tasks.save_rows` wrote, so that they run as they are. `--workload` names the task.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent))
from tasks import TASKS, label_losses, token_losses


def mean_token_loss(outputs: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """A row's loss is the sum over its tokens; of several rows, the mean."""
    flat = nn.functional.cross_entropy(outputs.reshape(-1, outputs.shape[-1]), y.reshape(-1), reduction="sum")
    return flat / y.shape[0]


def workload(rows: str, name: str, requires: str) -> SimpleNamespace:
    """What the drivers know of a task."""
    known, task = load_file(rows), TASKS[name]
    model = task.make().eval()
    state = {key.removeprefix("model/"): value for key, value in known.items() if key.startswith("model/")}
    model.load_state_dict(state)
    trained = [name for name, value in model.named_parameters() if value.requires_grad]
    tracked = list(dict.fromkeys(name.rpartition(".")[0] for name in trained))
    last = tracked[-1:]
    wanted = last if requires == "last" else tracked
    for key, value in model.named_parameters():
        value.requires_grad_(key.rpartition(".")[0] in wanted)
    sequence = task.losses is token_losses
    return SimpleNamespace(
        name=name,
        model=model,
        state=state,
        **{key: known[key] for key in ("x", "y", "xq", "yq")},
        meta={},
        seq=sequence,
        loss=mean_token_loss if sequence else nn.functional.cross_entropy,
        loss_vec=token_losses if sequence else label_losses,
        tracked=tracked,
        last=last,
        damping=task.peer_damping,
        l2=task.l2,
        P=sum(value.numel() for value in model.parameters() if value.requires_grad),
    )


def main() -> None:
    rows, driver = sys.argv[1:3]
    module: Any = ModuleType("workloads")
    module.THREADS = int(os.environ.get("PB_THREADS", "1"))
    module.load = lambda name, requires="tracked": workload(rows, name, requires)
    sys.modules["workloads"] = module
    sys.argv = [driver, *sys.argv[3:]]
    sys.path.insert(0, str(Path(driver).parent))
    runpy.run_path(driver, run_name="__main__")


if __name__ == "__main__":
    main()
