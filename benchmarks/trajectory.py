"""Does the derivative of training forecast retraining? LDS at several removals, and what the verdict says of a recipe.

    python benchmarks/trajectory.py [RECIPE ...] [--removed .01 .05 .5] [--curvatures hessian ggn fisher none]
                                    [--seeds 3] [--queries 20] [--subsets 40] [--margin] [--json FILE]
                                    [--divisor all|kept] [--weight 1]

digits: an MLP 64-256-256-10 (scikit-learn's digits, 1400 train rows), SGD with momentum .9, cosine to zero, batches of
64. text: the leaderboard's byte transformer (2 layers, width 64, 99,456 trained parameters), which has read the Old
Testament, tuned on 400 passages of 32 bytes from the Gospels (text16: of 16), batches of 20, cosine to zero. All in
float32.

For each recipe and share of the rows that is removed: the LDS over 40 subsets for the same seed, and for another one
with its ceiling (how two other seeds agree); the verdict; the cost of a sweep in trainings. Subsets are trained with
weight zero: order, batches and divisors stay. --seeds 1: of the recorded seed alone.

What a subset's steps are divided by matters where many rows go. --divisor all: each batch's rows, there or not, as a
derivative by a row's weight has it: without half of the rows, each step is half as long. --divisor kept: the rows of a
batch that are there, as training on fewer rows has it. --weight .5: the recorded training gives every row this weight.
"""

import argparse
import json
import math
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy

sys.path.append(str(Path(__file__).resolve().parent / "leaderboard"))

import headwater as hw
from headwater.evaluate import lds

SEEDS = (0, 10, 20)
"""The one that is recorded, and two others."""


@dataclass(frozen=True)
class Recipe:
    """How a model is trained."""

    rows: Callable[[int], tuple[torch.Tensor, ...]]
    """Train rows x, y, and so many queries x, y."""
    make: Callable[[int], nn.Module]
    """A model to start from, for a seed."""
    losses: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    """Of each row."""
    optimizer: Callable[[Any, float], torch.optim.Optimizer]
    steps: int
    lr: float
    batch: int
    outputs: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None
    """What is forecast of each query; None for its loss."""

    @property
    def asked(self) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        return self.outputs or self.losses


# Digits ---------------------------------------------------------------------------------------------------------------


def digits_rows(queries: int) -> tuple[torch.Tensor, ...]:
    from sklearn.datasets import load_digits

    digits, n = load_digits(), 1400
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    x = torch.tensor(digits.data / 16.0, dtype=torch.float32)[order]
    y = torch.tensor(digits.target)[order]
    return x[:n], y[:n], x[n : n + queries], y[n : n + queries]


def mlp(activation: type[nn.Module], seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = [layer for i, o in pairwise((64, 256, 256, 10)) for layer in (nn.Linear(i, o), activation())]
        return nn.Sequential(*layers[:-1])


def label_losses(outputs: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return cross_entropy(outputs, y, reduction="none")


def margins(outputs: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Minus the label's logit over the others': it rises as the loss does, without its saturation."""
    others = outputs.scatter(1, y[:, None], -torch.inf).logsumexp(1)
    return others - outputs.gather(1, y[:, None])[:, 0]


def momentum(parameters: Any, lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9)


def digits(activation: type[nn.Module], steps: int, lr: float) -> Recipe:
    return Recipe(digits_rows, lambda seed: mlp(activation, seed), label_losses, momentum, steps, lr, 64)


# Text -----------------------------------------------------------------------------------------------------------------

PASSAGES = 400


def text_rows(length: int, queries: int) -> tuple[torch.Tensor, ...]:
    from tasks import gospels

    return tuple(part[:, :length].contiguous() for part in gospels(PASSAGES, queries))


def reader(seed: int) -> nn.Module:
    """The same start for every seed: what a seed changes is the order of the rows."""
    from safetensors.torch import load_file
    from tasks import TASKS, ByteModel

    model = ByteModel()
    model.load_state_dict(load_file(TASKS["gospels-lm"].folder / "pretrained.safetensors"))
    return model


def byte_losses(outputs: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return cross_entropy(outputs.transpose(1, 2), y, reduction="none").mean(1)


def adamw(parameters: Any, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01)


def damped_adamw(parameters: Any, lr: float) -> torch.optim.Optimizer:
    """With an eps of the size of the gradients' roots, so that small gradients make no whole steps."""
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01, eps=3e-4)


def text(optimizer: Callable[[Any, float], torch.optim.Optimizer], lr: float, length: int = 32) -> Recipe:
    return Recipe(lambda queries: text_rows(length, queries), reader, byte_losses, optimizer, 200, lr, 20)


RECIPES = {
    "gelu 150 steps lr .05": digits(nn.GELU, 150, 0.05),
    "gelu 400 steps lr .1": digits(nn.GELU, 400, 0.1),
    "gelu 400 steps lr .4": digits(nn.GELU, 400, 0.4),
    "relu 150 steps lr .02": digits(nn.ReLU, 150, 0.02),
    "relu 150 steps lr .05": digits(nn.ReLU, 150, 0.05),
    "relu 400 steps lr .1": digits(nn.ReLU, 400, 0.1),
    "text adamw 200 steps lr .0003": text(adamw, 3e-4),
    "text sgd 200 steps lr .05": text(momentum, 0.05),
    "text16 adamw 200 steps lr .0003": text(adamw, 3e-4, 16),
    "text16 adamw 200 steps lr .0001": text(adamw, 1e-4, 16),
    "text16 adamw eps .0003 200 steps lr .0003": text(damped_adamw, 3e-4, 16),
    "text16 sgd 200 steps lr .05": text(momentum, 0.05, 16),
    "text16 sgd 200 steps lr .01": text(momentum, 0.01, 16),
}


# Measuring ------------------------------------------------------------------------------------------------------------


def trained(recipe: Recipe, x, y, seed=0, weights=None, folder=None, divisor="all"):
    """seed: of the starting weights and of the order of the rows. divisor: see above."""
    model = recipe.make(seed)
    optimizer = recipe.optimizer([p for p in model.parameters() if p.requires_grad], recipe.lr)
    generator, steps, n = torch.Generator().manual_seed(seed + 1), recipe.steps, len(x)
    shuffles = [torch.randperm(n, generator=generator) for _ in range(-(-steps * recipe.batch // n))]
    order = torch.cat(shuffles)[: steps * recipe.batch].view(steps, recipe.batch)
    recorder = None if folder is None else hw.record(model, optimizer, folder)
    if recorder is not None:
        recorder.__enter__()
    for step, ids in enumerate(order):
        optimizer.param_groups[0]["lr"] = recipe.lr * (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.zero_grad()
        losses = recipe.losses(model(x[ids]), y[ids])
        mine = None if weights is None else weights[ids]
        weighted = losses if mine is None else losses * mine
        (weighted.mean() if mine is None or divisor == "all" else weighted.sum() / mine.sum()).backward()
        optimizer.step()
        if recorder is not None:
            recorder.step(ids, mine)
    if recorder is not None:
        recorder.__exit__(None, None, None)
    return model


def outputs(recipe: Recipe, rows, keep, seed, divisor):
    x, y, xq, yq = rows
    found = []
    for kept in keep:
        model = trained(recipe, x, y, seed, torch.as_tensor(kept.astype(np.float32)), divisor=divisor)
        with torch.no_grad():
            found.append(recipe.asked(model(xq), yq).numpy())
    return np.stack(found)


def subsets(n: int, removed: float, count: int) -> np.ndarray:
    generator = np.random.default_rng(0)
    keep = np.ones((count, n), dtype=bool)
    for subset in keep:
        subset[generator.choice(n, round(removed * n), replace=False)] = False
    return keep


def measure(name: str, given: argparse.Namespace) -> dict[str, Any]:
    recipe = replace(RECIPES[name], outputs=margins) if given.margin else RECIPES[name]
    rows = recipe.rows(given.queries)
    x, y, *query = rows
    options = {"likelihood": "cross_entropy", "measurement": recipe.outputs}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", hw.errors.RoughForecast)
        trained(recipe, x, y)  # what is loaded at first is no part of the cost
        start = time.process_time()
        trained(recipe, x, y)
        once = time.process_time() - start
        weights = None if given.weight == 1 else torch.full((len(x),), given.weight)
        model = trained(recipe, x, y, weights=weights, folder=Path(folder) / "r")
        scores, cost = {}, {}
        for curvature in given.curvatures:
            method = hw.Unrolled(Path(folder) / "r", curvature=curvature, removals=())
            influence = hw.Influence(model, recipe.losses, method, **options).fit((x, y))
            start = time.process_time()
            scores[curvature] = np.asarray(influence.attribute((x, y), tuple(query), unit="removal"))
            cost[curvature] = (time.process_time() - start) / once
        method = hw.Unrolled(Path(folder) / "r", curvature=given.curvatures[0], removals=given.removed)
        judged = hw.Influence(model, recipe.losses, method, **options).fit((x, y))
        start = time.process_time()
        judged.attribute((x, y), tuple(query), unit="removal")
        verdict_cost = (time.process_time() - start) / once - cost[given.curvatures[0]]
    print(f"\n{name}: one training {once:.2f} CPU s, {given.queries} queries")
    print("  sweeps: " + ", ".join(f"{c!s} {amount:.1f} trainings" for c, amount in cost.items()))
    print(f"  verdict at {verdict_cost:.1f} trainings:")
    print("    " + str(judged.verdict).replace("\n", "\n    "), flush=True)
    found = [removal(recipe, rows, share, scores, given) for share in given.removed]
    return {"recipe": name, "training": once, "cost": {str(k): v for k, v in cost.items()}, "removals": found}


def removal(recipe: Recipe, rows, share: float, scores: dict, given: argparse.Namespace) -> dict[str, Any]:
    keep = subsets(len(rows[0]), share, given.subsets)
    truths = [outputs(recipe, rows, keep, seed, given.divisor) for seed in SEEDS[: given.seeds]]
    found: dict[str, Any] = {"removed": share}
    if len(truths) == len(SEEDS):
        agree = [_spearman(truths[1][:, q], truths[2][:, q]) for q in range(given.queries)]
        found["ceiling"] = float(np.mean(agree))
    agreed = f"; two other seeds agree to {found['ceiling']:.3f}" if "ceiling" in found else ""
    print(f"  {share:.0%} removed{agreed}")
    for curvature, values in scores.items():
        measured = [lds(values, keep, truth[:, None]).raw for truth in truths[:2]]
        found[str(curvature)] = [interval.value for interval in measured]
        said = (f"{label} {interval}" for label, interval in zip(("same seed", "another"), measured, strict=False))
        print(f"    {curvature!s:8} LDS " + ", ".join(said), flush=True)
    return found


def _spearman(one, other):
    ranks = [np.argsort(np.argsort(values)) for values in (one, other)]
    return float(np.corrcoef(*ranks)[0, 1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("recipes", nargs="*", metavar="RECIPE", help=", ".join(RECIPES))
    parser.add_argument("--removed", nargs="+", type=float, default=[0.01])
    parser.add_argument("--curvatures", nargs="+", default=["hessian", "ggn", "fisher", "none"])
    parser.add_argument("--seeds", type=int, choices=(1, 2, 3), default=3)
    parser.add_argument("--queries", type=int, default=20)
    parser.add_argument("--subsets", type=int, default=40)
    parser.add_argument("--margin", action="store_true", help="of digits, forecast the margin in place of the loss")
    parser.add_argument("--divisor", choices=("all", "kept"), default="all", help="of a subset's steps")
    parser.add_argument("--weight", type=float, default=1.0, help="of every row in the recorded training")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    given.curvatures = [None if word == "none" else word for word in given.curvatures]
    found = []
    for each in given.recipes or [name for name in RECIPES if not name.startswith("text")]:
        try:
            found.append(measure(each, given))
        except hw.errors.NonFiniteValue as error:
            print(f"\n{each}: {error}")
    if given.json:
        given.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
