"""Does the derivative of training forecast retraining? LDS at small removals, and what the verdict says of each recipe.

    python benchmarks/trajectory.py [RECIPE ...]

The digits MLP 64-256-256-10 (scikit-learn's digits, 1400 train rows, 20 queries), SGD with momentum .9, cosine to zero,
batches of 64, float32. For each recipe: the LDS at removals of 1 % (40 subsets) for the same seed, and for another one
with its ceiling (two other seeds of the same subsets); the verdict; the cost of a sweep in trainings.
"""

import math
import sys
import tempfile
import time
import warnings
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

import headwater as hw
from headwater.evaluate import lds

N, QUERIES, SUBSETS, REMOVED, BATCH = 1400, 20, 40, 0.01, 64
RECIPES = {
    "gelu 150 steps lr .05": (nn.GELU, 150, 0.05),
    "gelu 400 steps lr .1": (nn.GELU, 400, 0.1),
    "gelu 400 steps lr .4": (nn.GELU, 400, 0.4),
    "relu 150 steps lr .02": (nn.ReLU, 150, 0.02),
    "relu 150 steps lr .05": (nn.ReLU, 150, 0.05),
    "relu 400 steps lr .1": (nn.ReLU, 400, 0.1),
}


def rows() -> tuple[torch.Tensor, ...]:
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    x = torch.tensor(digits.data / 16.0, dtype=torch.float32)[order]
    y = torch.tensor(digits.target)[order]
    return x[:N], y[:N], x[N : N + QUERIES], y[N : N + QUERIES]


def trained(recipe, x, y, seed=0, weights=None, folder=None):
    """seed: of the starting weights and of the order of the rows."""
    activation, steps, lr = recipe
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sizes = (64, 256, 256, 10)
        layers = [layer for i, o in pairwise(sizes) for layer in (nn.Linear(i, o), activation())][:-1]
        model = nn.Sequential(*layers)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    generator = torch.Generator().manual_seed(seed + 1)
    shuffles = [torch.randperm(N, generator=generator) for _ in range(-(-steps * BATCH // N))]
    order = torch.cat(shuffles)[: steps * BATCH].view(steps, BATCH)
    recorder = None if folder is None else hw.record(model, optimizer, folder)
    if recorder is not None:
        recorder.__enter__()
    for step, ids in enumerate(order):
        optimizer.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.zero_grad()
        losses = cross_entropy(model(x[ids]), y[ids], reduction="none")
        (losses if weights is None else losses * weights[ids]).mean().backward()
        optimizer.step()
        if recorder is not None:
            recorder.step(ids)
    if recorder is not None:
        recorder.__exit__(None, None, None)
    return model


def outputs(recipe, keep, seed):
    x, y, xq, yq = rows()
    found = []
    for kept in keep:
        model = trained(recipe, x, y, seed, torch.as_tensor(kept.astype(np.float32)))
        found.append(cross_entropy(model(xq), yq, reduction="none").detach().numpy())
    return np.stack(found)


def measure(name: str) -> None:
    recipe = RECIPES[name]
    x, y, xq, yq = rows()
    generator = np.random.default_rng(0)
    keep = np.ones((SUBSETS, N), dtype=bool)
    for subset in keep:
        subset[generator.choice(N, round(REMOVED * N), replace=False)] = False
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", hw.errors.RoughForecast)
        trained(recipe, x, y)  # what is loaded at first is no part of the cost
        start = time.process_time()
        trained(recipe, x, y)
        once = time.process_time() - start
        model = trained(recipe, x, y, folder=Path(folder) / "r")
        scores, cost = {}, {}
        for curvature in ("hessian", "ggn", "fisher", None):
            method = hw.Unrolled(Path(folder) / "r", curvature=curvature, removals=())
            influence = hw.Influence(model, "cross_entropy", method).fit((x, y))
            start = time.process_time()
            scores[curvature] = np.asarray(influence.attribute((x, y), (xq, yq), unit="removal"))
            cost[curvature] = (time.process_time() - start) / once
        method = hw.Unrolled(Path(folder) / "r", removals=(REMOVED,))
        judged = hw.Influence(model, "cross_entropy", method).fit((x, y))
        start = time.process_time()
        judged.attribute((x, y), (xq, yq), unit="removal")
        verdict_cost = (time.process_time() - start) / once - cost["hessian"]
    mine, other, third = (outputs(recipe, keep, seed) for seed in (0, 10, 20))
    print(f"\n{name}: one training {once:.2f} CPU s")
    for curvature, found in scores.items():
        same, another = (lds(found, keep, truth[:, None]).raw.value for truth in (mine, other))
        print(f"  {curvature!s:8} LDS same seed {same:.3f}, another {another:.3f}; {cost[curvature]:.1f} trainings")
    ceiling = np.mean([_spearman(other[:, q], third[:, q]) for q in range(QUERIES)])
    print(f"  two other seeds agree to {ceiling:.3f}; verdict at {verdict_cost:.1f} trainings:")
    print("    " + str(judged.verdict).replace("\n", "\n    "))


def _spearman(one, other):
    ranks = [np.argsort(np.argsort(values)) for values in (one, other)]
    return float(np.corrcoef(*ranks)[0, 1])


if __name__ == "__main__":
    torch.set_num_threads(1)
    for each in sys.argv[1:] or RECIPES:
        try:
            measure(each)
        except hw.errors.NonFiniteValue as error:
            print(f"\n{each}: {error}")
