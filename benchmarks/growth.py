"""How costs grow with rows, queries, width, positions and batch size: exponents fitted to CPU seconds.

    python benchmarks/growth.py [--axes rows queries width positions batch top] [--methods graddot ekfac kfac cg]
                                [--rounds 3] [--smaller K] [--json FILE]

One axis at a time is doubled, the others stay where they are. Float32, one thread, CPU seconds of fit + score, warm;
sizes take turns in each round, and a figure is the median over rounds. The exponent is the slope of log seconds on log
size by least squares, over the upper half of the sizes: near the lower end there is a constant cost of each call, which
is what "at the smallest" shows. Rows of several positions are of a network that works at each position and has a causal
mean before its last layer.

Axis "top" is the k best of each ranking out of a matrix of scores, beside sorting all of it, by train rows.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(variable, "1")

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402

import headwater as hw  # noqa: E402


@dataclass(frozen=True)
class Job:
    """Shapes of one job."""

    rows: int = 2048
    queries: int = 128
    width: int = 256
    positions: int = 1
    batch: int = 256


@dataclass(frozen=True)
class Axis:
    """What is doubled, from which job, and what would be expected of each method that is not named at all: `usual`."""

    base: Job
    sizes: tuple[int, ...]
    usual: str


LONG = Job(rows=256, queries=32, width=128)
AXES = {
    "rows": Axis(Job(), (1024, 2048, 4096, 8192), "1"),
    "queries": Axis(Job(), (64, 128, 256, 512), "at most 1: passes over the rows are shared"),
    "width": Axis(Job(rows=1024, queries=64), (128, 256, 512, 1024), "2; 3 where matrices are decomposed"),
    "positions": Axis(LONG, (8, 16, 32, 64, 128), "1"),
    "batch": Axis(Job(), (16, 64, 256, 1024), "0"),
}
METHODS: dict[str, Callable[[], Any]] = {
    "graddot": lambda: hw.GradDot(),
    "ekfac": lambda: hw.Ekfac(fisher="sampled"),
    "kfac": lambda: hw.Kfac(fisher="sampled"),
    "cg": lambda: hw.Cg(tolerance=1e-2),
}
DEAR = {"cg": ("rows", "queries", "batch")}
"""Axes of methods that do not take all of them: a span has no size of its own along the others."""
TOP, BEST = (10_000, 40_000, 160_000, 640_000), 10


class CausalMean(nn.Module):
    """Each position's mean over those up to it: [n, t, d]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.cumsum(1) / torch.arange(1, x.shape[1] + 1, dtype=x.dtype)[:, None]


def network(job: Job) -> nn.Module:
    torch.manual_seed(0)
    mixed = [CausalMean()] if job.positions > 1 else []
    first, second, last = nn.Linear(64, job.width), nn.Linear(job.width, job.width), nn.Linear(job.width, 10)
    return nn.Sequential(first, nn.GELU(), second, *mixed, nn.GELU(), last)


def rows(job: Job, count: int, seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    random = torch.Generator().manual_seed(seed)
    shape = (count,) if job.positions == 1 else (count, job.positions)
    x, y = torch.randn(*shape, 64, generator=random), torch.randint(0, 10, shape, generator=random)
    return list(zip(x.split(job.batch), y.split(job.batch), strict=True))


def token_losses(outputs: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """A row's loss is the sum over its positions: [n]."""
    return nn.functional.cross_entropy(outputs.movedim(-1, 1), y, reduction="none").reshape(len(y), -1).sum(1)


def seconds(method: str, job: Job) -> float:
    """CPU seconds of fit and score."""
    model, train = network(job).eval(), rows(job, job.rows, 1)
    query = rows(replace(job, batch=job.queries), job.queries, 2)
    blocks = "full" if method == "cg" else "layer"
    influence = hw.Influence(model, token_losses, METHODS[method](), likelihood="cross_entropy", blocks=blocks)
    start = time.process_time()
    influence.fit(train)
    np.asarray(influence.attribute(train, query))
    return time.process_time() - start


def top_seconds(count: int) -> tuple[float, float]:
    """CPU seconds of the best of each of 16 rankings of so many train rows: by the library, and by sorting."""
    values = np.random.default_rng(0).standard_normal((16, count)).astype(np.float32)
    scores = hw.Scores(values, np.arange(16), np.arange(count))
    start = time.process_time()
    best = scores.top(BEST)
    middle = time.process_time()
    order = np.argsort(-values, axis=1, kind="stable")[:, :BEST]
    end = time.process_time()
    assert np.array_equal(best.helpful_ids, order)
    return middle - start, end - middle


def exponent(sizes: tuple[int, ...], costs: list[float]) -> float:
    """The slope of log seconds on log size, over the upper half of the sizes, of three at least."""
    kept = slice(-max(3, math.ceil(len(sizes) / 2)), None)
    return float(np.polyfit(np.log(sizes[kept]), np.log(costs[kept]), 1)[0])


def measure(axis: str, method: str, rounds: int, smaller: int) -> dict[str, Any]:
    found = AXES[axis]
    sizes = tuple(max(size // smaller, 1) for size in found.sizes)
    jobs = [replace(found.base, **{axis: size}) for size in sizes]
    if smaller > 1 and axis != "rows":
        jobs = [replace(job, rows=max(job.rows // smaller, 16)) for job in jobs]
    seconds(method, jobs[0])  # warm: imports, thread pools
    each = [[seconds(method, job) for job in jobs] for _ in range(rounds)]
    costs = [statistics.median(turn[k] for turn in each) for k in range(len(jobs))]
    row = {"axis": axis, "method": method, "sizes": sizes, "seconds": costs, "usual": found.usual}
    return row | {"exponent": exponent(sizes, costs)}


def table(found: list[dict[str, Any]]) -> str:
    names = ("axis", "method", "sizes", "CPU s", "at the smallest, each", "exponent", "expected")
    lines = [names, ("---",) * len(names)]
    for row in found:
        sizes, costs = row["sizes"], row["seconds"]
        spent, each = " ".join(f"{cost:.3g}" for cost in costs), f"{1e3 * costs[0] / sizes[0]:.3g} ms"
        extent = f"{sizes[0]:,} - {sizes[-1]:,}"
        lines.append((row["axis"], row["method"], extent, spent, each, f"{row['exponent']:.2f}", row["usual"]))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def measure_top(rounds: int, smaller: int) -> list[dict[str, Any]]:
    sizes = tuple(max(size // smaller, 100) for size in TOP)
    turns = [[top_seconds(size) for size in sizes] for _ in range(rounds)]
    found = []
    for k, name in enumerate(("top 10, both ends", "sorting")):
        costs = [statistics.median(turn[place][k] for turn in turns) for place in range(len(sizes))]
        found.append({"axis": "top", "method": name, "sizes": sizes, "seconds": costs, "usual": "1"})
        found[-1]["exponent"] = exponent(sizes, costs)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axes", nargs="+", choices=[*AXES, "top"], default=[*AXES, "top"])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--smaller", type=int, default=1, help="divide sizes by this")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = []
    for axis in given.axes:
        if axis == "top":
            found += measure_top(given.rounds, given.smaller)
            continue
        for method in given.methods:
            if axis in DEAR.get(method, AXES):
                found.append(measure(axis, method, given.rounds, given.smaller))
                print(json.dumps(found[-1]), flush=True)
    print(table(found))
    if given.json:
        given.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
