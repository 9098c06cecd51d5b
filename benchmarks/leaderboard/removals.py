"""Scores of the leaderboard's networks against removals of other sizes, for the seed that was scored and another.

    python benchmarks/leaderboard/removals.py digits-mlp --removed .01 .05 .5 [--subsets 40] [--out .leaderboard]

All scores of headwater that `run.py` has kept in --out, on new banks: the task's training is taken again with rows at
weight zero (order, batches and divisor stay), by the seed of the model that was scored and by two others, whose
agreement is what a perfect forecast of another seed can get. Models of one seed are trained side by side.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
from peers import REPO  # noqa: E402
from tasks import TASKS, Task, beginning  # noqa: E402

from headwater.evaluate import lds  # noqa: E402
from headwater.retraining.torch.sgd import Sgd  # noqa: E402
from headwater.tables import table  # noqa: E402

SEEDS = (0, 1, 2)
"""That of the model that was scored, and two others."""


def subsets(n: int, removed: float, count: int) -> np.ndarray:
    generator = np.random.default_rng(0)
    keep = np.ones((count, n), dtype=bool)
    for subset in keep:
        subset[generator.choice(n, max(1, round(removed * n)), replace=False)] = False
    return keep


def started(task: Task, seed: int) -> torch.nn.Module:
    """As `train_recorded` begins."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        start = beginning(task)
        return (start if isinstance(start, torch.nn.Module) else start()).eval()


def trained(task: Task, seed: int, weights: Tensor, x: Tensor, y: Tensor) -> tuple[torch.nn.Module, dict[str, Tensor]]:
    """A model for each row of weights [m, n], side by side: all see the same batches. Parameters are [m, *shape]."""
    settings, model = Sgd(**task.training, l2=task.l2), started(task, seed)
    fixed = {name: p.detach() for name, p in model.named_parameters() if not p.requires_grad}
    parameters = {
        name: p.detach().expand(len(weights), *p.shape).clone()
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    velocities = {name: torch.zeros_like(p) for name, p in parameters.items()}
    everything = torch.ones(len(x), dtype=torch.bool)
    order = settings.visited_rows(everything, torch.Generator().manual_seed(seed))

    def objective(parameters: dict[str, Tensor], rows: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
        return (task.losses(functional_call(model, {**fixed, **parameters}, (rows,)), labels) * weight).mean()

    slopes = vmap(grad(objective), in_dims=(0, None, None, 0))
    for step, ids in enumerate(order):
        found = slopes(parameters, x[ids], y[ids], weights[:, ids])
        settings.move(step, ((parameters[name], velocities[name], found[name]) for name in parameters))
    return model, {**parameters, **{name: p.expand(len(weights), *p.shape) for name, p in fixed.items()}}


def losses(task: Task, seed: int, keep: np.ndarray, side_by_side: int) -> np.ndarray:
    """Of the queries, after trainings without some rows: [m, q]."""
    x, y, xq, yq = task.rows()
    found = []
    for start in range(0, len(keep), side_by_side):
        weights = torch.as_tensor(keep[start : start + side_by_side].astype(np.float32))
        model, parameters = trained(task, seed, weights, x, y)
        with torch.no_grad():
            outputs = vmap(lambda p: functional_call(model, p, (xq,)))(parameters)  # noqa: B023
        found += [task.losses(output, yq).numpy() for output in outputs]
    return np.stack(found)


def kept_scores(task: str, out: Path) -> dict[str, np.ndarray]:
    """By the name of the method: [q, n]."""
    beginning = f"{task} headwater "
    return {file.stem[len(beginning) :]: np.load(file) for file in sorted(out.glob(f"{beginning}*.npy"))}


def agreement(one: np.ndarray, other: np.ndarray) -> float:
    """Mean over queries of the rank correlation of outputs [m, q]."""
    ranks = [np.argsort(np.argsort(values, axis=0), axis=0).astype(float) for values in (one, other)]
    return float(np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(ranks[0].T, ranks[1].T, strict=True)]))


def measure(task: Task, given: argparse.Namespace) -> str:
    scores = kept_scores(task.name, given.out)
    if not scores:
        raise SystemExit(f"{given.out} has no scores of {task.name}: run run.py --tasks {task.name} first.")
    n = next(iter(scores.values())).shape[1]
    shares: list[float] = given.removed
    every = {share: subsets(n, share, given.subsets) for share in shares}
    start, banks = time.process_time(), []
    for seed in SEEDS:  # all subsets of a seed side by side, whatever their size
        found = losses(task, seed, np.concatenate(list(every.values())), given.side_by_side)
        banks.append(dict(zip(shares, np.split(found, len(shares)), strict=True)))
    print(f"{len(SEEDS) * len(shares) * given.subsets} trainings: {time.process_time() - start:.0f} CPU s", flush=True)
    head = ["method", *(f"{share:.0%} removed: same seed, another" for share in shares)]
    limits = [f"two other seeds agree to {agreement(banks[1][share], banks[2][share]):.3f}" for share in shares]
    lines: list[list[Any]] = [head, ["(ceiling for another seed)", *limits]]
    for name, values in scores.items():
        cells = []
        for share in shares:
            measured = [lds(values, every[share], bank[share][:, None]).raw for bank in banks[:2]]
            cells.append(", ".join(f"{each.value:.3f} ({each.low:.3f} to {each.high:.3f})" for each in measured))
        lines.append([name, *cells])
    return table(lines, left=(0,))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("task", choices=[name for name, task in TASKS.items() if task.training is not None])
    parser.add_argument("--removed", nargs="+", type=float, default=[0.01, 0.05, 0.5])
    parser.add_argument("--subsets", type=int, default=40)
    parser.add_argument("--side-by-side", type=int, default=40, help="models in memory at once")
    parser.add_argument("--out", type=Path, default=REPO / ".leaderboard")
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(measure(TASKS[given.task], given))


if __name__ == "__main__":
    main()
