"""The main paths on a GPU: the same scores as on the CPU, what they cost, and which share of the device's rate that is.

    python benchmarks/device.py                     on cuda where there is one, else on the CPU, on smaller shapes
    python benchmarks/device.py --device cpu --json FILE
    python benchmarks/device.py --limit 420         wall seconds after which no further row is measured (420)

This script has been run on CPUs alone, not yet on a GPU: its figures for one are still to come.

Three tables. *The same scores*: grad-dot, KFAC, EKFAC, conjugate gradients of a GGN, and self-influence, of a small MLP
and a small model of sequences, on the device in float64 and in float32, against float64 on the CPU; the largest
difference relative to the largest score, which must be within the tolerance. The script exits with 1 where one is not.
*Costs*, in float32: seconds of fit and scores, the first time and after it (the median of three), by CUDA events on a
GPU, CPU seconds else; the share of the rate of a plain product of matrices in the same run that the least arithmetic of
the method makes of that (`floors.py`; none where the arithmetic depends on the data); on a GPU the most memory, and how
often a pass over the train rows made the host wait for the device, per batch. *Rates*: of the plain products.

Products in float32 are in full precision: TF32 is off.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import floors
import numpy as np
import torch
from floors import Rates, Shapes, Work
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

import headwater as hw
from headwater.torch import TorchBatch

EXACT, ROUNDED, SOLVED = 1e-9, 1e-5, 1e-3
"""Tolerances: in float64; in float32; in float32 where a solve ends at a residual of 3e-4."""


class Sequences(nn.Module):
    """A causal transformer of one block, for tokens [n, t]; its linear maps are attributed."""

    def __init__(self, width: int, words: int, positions: int):
        super().__init__()
        self.words, self.places = nn.Embedding(words, width), nn.Embedding(positions, width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.head = nn.Linear(width, words, bias=False)
        for parameter in (*self.words.parameters(), *self.places.parameters(), *self.head.parameters()):
            parameter.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        t = x.shape[1]
        h = self.words(x) + self.places.weight[:t]
        q, k, v = self.qkv(nn.functional.layer_norm(h, h.shape[-1:])).chunk(3, -1)
        later = torch.ones(t, t, dtype=torch.bool, device=x.device).triu(1)
        seen = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(later, float("-inf")).softmax(-1)
        h = h + self.proj(seen @ v)
        h = h + self.down(nn.functional.gelu(self.up(nn.functional.layer_norm(h, h.shape[-1:]))))
        return self.head(nn.functional.layer_norm(h, h.shape[-1:]))


def losses_of_sequences(output: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Summed over positions: [n]."""
    return nn.functional.cross_entropy(output.transpose(1, 2), y, reduction="none").sum(1)


@dataclass(frozen=True)
class Problem:
    """A model on the CPU, in float32, and its rows."""

    model: nn.Module
    loss: Callable[..., torch.Tensor]
    x: torch.Tensor
    y: torch.Tensor
    query: int
    batch: int
    tracked: tuple[str, ...]

    @property
    def xq(self) -> torch.Tensor:
        return self.x[: self.query]

    def to(self, device: torch.device, dtype: torch.dtype) -> Problem:
        """A copy of the model and the rows there."""
        x = self.x.to(dtype) if self.x.is_floating_point() else self.x
        model = copy.deepcopy(self.model)
        return replace(self, model=model.to(device, dtype).eval(), x=x.to(device), y=self.y.to(device))

    def batches(self, rows: slice = slice(None)) -> list[TorchBatch]:
        """Rows with names, on which draws of labels depend: else what they hold would, and that has another dtype."""
        names = torch.arange(len(self.x))
        pieces = (values[rows].split(self.batch) for values in (self.x, self.y, names))
        return [TorchBatch(x, y, ids=ids.numpy()) for x, y, ids in zip(*pieces, strict=True)]


def mlp(width: int, train: int, query: int, batch: int, inputs: int = 64) -> Problem:
    torch.manual_seed(0)
    layers = nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
    model = nn.Sequential(*layers).eval()
    x = torch.randn(train, inputs)
    # Labels that the inputs have something to do with.
    y = (x[:, :10] + 0.5 * torch.randn(train, 10)).argmax(1)
    return Problem(model, nn.functional.cross_entropy, x, y, query, batch, ("0", "2", "4"))


def sequences(width: int, train: int, query: int, batch: int, positions: int, words: int = 64) -> Problem:
    torch.manual_seed(0)
    model = Sequences(width, words, positions).eval()
    tokens = torch.randint(0, words, (train, positions + 1))
    x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    return Problem(model, losses_of_sequences, x, y, query, batch, ("qkv", "proj", "up", "down"))


# Paths ----------------------------------------------------------------------------------------------------------------


def pairs(influence: Any, problem: Problem) -> np.ndarray:
    return np.asarray(influence.attribute(problem.batches(slice(0, problem.query)), problem.batches()))


def on_themselves(influence: Any, problem: Problem) -> np.ndarray:
    return np.asarray(influence.self_influence(problem.batches()))


def ekfac_on_themselves(shapes: Shapes) -> Work:
    """The fit, and every row turned into the eigenbasis, squared and weighed."""
    fit = floors.ekfac(replace(shapes, query=0))
    each = (floors.turned(layer, shapes.train) + floors.dense(layer, shapes.train) for layer in shapes.layers)
    return fit + Work(sum(each))


@dataclass(frozen=True)
class Asked:
    """A method and what is asked of it."""

    name: str
    method: Callable[[], Any]
    scores: Callable[[Any, Problem], np.ndarray] = pairs
    tolerance: float = ROUNDED
    floor: Callable[[Shapes], Work] | None = None
    damping: float = 0.1  # times the mean eigenvalue

    def influence(self, problem: Problem) -> Any:
        return hw.Influence(
            problem.model, problem.loss, self.method(), likelihood="cross_entropy", damping=hw.relative(self.damping)
        )


GRAD_DOT = Asked("grad-dot", hw.GradDot, floor=floors.grad_dot)
EKFAC = Asked("EKFAC", hw.Ekfac)
SAMPLED = Asked("EKFAC, sampled labels", lambda: hw.Ekfac(fisher="sampled"), floor=floors.ekfac)
ITSELF = Asked(
    "self-influence, EKFAC, sampled labels",
    lambda: hw.Ekfac(fisher="sampled"),
    on_themselves,
    floor=ekfac_on_themselves,
)
OF_ROWS = [  # of one position each
    GRAD_DOT,
    Asked("KFAC", lambda: hw.Kfac(fisher="sampled"), floor=floors.kfac),
    Asked(
        "KFAC, factored damping", lambda: hw.Kfac(damping_form="factored", fisher="sampled"), floor=floors.kfac_factored
    ),
    EKFAC,
    SAMPLED,
    ITSELF,
]
SOLVES = [
    Asked("CG of the GGN", lambda: hw.Cg(curvature="ggn"), tolerance=SOLVED, damping=30.0),
    Asked(
        "CG of the GGN, solved for",
        lambda: hw.Cg(curvature="ggn", preconditioner="ekfac"),
        tolerance=SOLVED,
        damping=30.0,
    ),
]
OF_SEQUENCES = [GRAD_DOT, SAMPLED, ITSELF]


# The device -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Device:
    """Where it runs, and how time is taken there."""

    device: torch.device

    @property
    def is_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def name(self) -> str:
        if self.is_gpu:
            return torch.cuda.get_device_name(self.device)
        return f"{platform.machine()} CPU, {torch.get_num_threads()} thread"

    def seconds(self, work: Callable[[], object]) -> float:
        """From the first operation to the end of the last: between two events on a GPU, else of the processor."""
        if not self.is_gpu:
            start = time.process_time()
            work()
            return time.process_time() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.device)
        begin.record()
        work()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000

    def rate(self, dtype: torch.dtype) -> float:
        """Operations per second of a plain product, the median of five."""
        size = 8192 if self.is_gpu else 1024
        if self.is_gpu and dtype == torch.float64:
            size = 4096
        a = torch.randn(size, size, device=self.device, dtype=dtype)
        out = a @ a
        return 2 * size**3 / statistics.median(self.seconds(lambda: torch.mm(a, a, out=out)) for _ in range(5))

    def rates(self) -> Rates:
        return Rates(self.rate(torch.float32), self.rate(torch.float64))

    def begin_memory(self) -> None:
        if self.is_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> float | None:
        """MB, since `begin_memory`."""
        return torch.cuda.max_memory_allocated(self.device) / 2**20 if self.is_gpu else None

    @contextmanager
    def counted_waits(self) -> Iterator[list[Any]]:
        """A list that fills with a warning for each time that the host waits for the device; on a GPU alone."""
        if not self.is_gpu:
            yield []
            return
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            waits: list[Any] = []
            try:
                yield waits
            finally:
                torch.cuda.set_sync_debug_mode("default")
                waits += [each for each in seen if "synchroniz" in str(each.message)]


# The same scores ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Agreement:
    """How far scores are from float64 on the CPU, relative to the largest."""

    problem: str
    path: str
    double: float
    single: float
    cpu_single: float
    tolerance: float

    @property
    def holds(self) -> bool:
        # Solves in float64 end at a residual of 1.5e-8.
        exact = 1e-6 if self.tolerance == SOLVED else EXACT
        return self.double <= exact and self.single <= self.tolerance


def scores_of(path: Asked, problem: Problem) -> np.ndarray:
    influence = path.influence(problem).fit(problem.batches())
    return path.scores(influence, problem).astype(np.float64)


def apart(found: np.ndarray, truth: np.ndarray) -> float:
    off = float(np.abs(found - truth).max() / np.abs(truth).max())
    return off if np.isfinite(off) else float("inf")


def agreement(name: str, path: Asked, problem: Problem, device: Device) -> Agreement:
    cpu = torch.device("cpu")
    truth = scores_of(path, problem.to(cpu, torch.float64))
    places = ((device.device, torch.float64), (device.device, torch.float32), (cpu, torch.float32))
    off = [apart(scores_of(path, problem.to(*place)), truth) for place in places]
    return Agreement(name, path.name, *off, path.tolerance)


# Costs ----------------------------------------------------------------------------------------------------------------


@dataclass
class Cost:
    """Of one path; seconds."""

    problem: str
    path: str
    first: float
    fit: float
    score: float
    share: float | None
    """Of the plain products' rate."""
    peak: float | None = None
    waits: float | None = None
    """Of the host for the device, per batch of train rows."""
    times: list[tuple[float, float]] = field(default_factory=list, repr=False)


def cost(name: str, path: Asked, problem: Problem, device: Device, rates: Rates, repeats: int = 3) -> Cost:
    times, waits = [], None
    device.begin_memory()
    train = problem.batches()
    for number in range(repeats + 1):
        influence = path.influence(problem)
        fit = device.seconds(lambda influence=influence: influence.fit(train))
        score = device.seconds(lambda influence=influence: path.scores(influence, problem))
        times.append((fit, score))
        if number == repeats and device.is_gpu:
            with device.counted_waits() as seen:
                path.scores(influence, problem)
            waits = len(seen) / len(train)
    fits, scores = zip(*times[1:], strict=True)
    total = statistics.median(sum(each) for each in times[1:])
    share = None
    if path.floor is not None:
        share = rates.seconds(path.floor(floors.shapes_of(problem))) / total
    found = Cost(name, path.name, sum(times[0]), statistics.median(fits), statistics.median(scores), share)
    found.peak, found.waits, found.times = device.peak(), waits, times
    return found


# All of it ------------------------------------------------------------------------------------------------------------


def small() -> list[tuple[str, Problem, list[Asked]]]:
    """Where scores are compared: a CPU has them in float64 in no time."""
    return [
        ("MLP", mlp(width=32, train=150, query=40, batch=64), OF_ROWS + SOLVES),
        ("sequences", sequences(width=16, train=40, query=6, batch=16, positions=12), OF_SEQUENCES),
    ]


def measured(device: Device) -> list[tuple[str, Problem, list[Asked]]]:
    """Where costs are measured."""
    if device.is_gpu:
        return [
            ("MLP 784-2048-2048-10", mlp(2048, train=32_768, query=1024, batch=4096, inputs=784), OF_ROWS),
            ("MLP 64-512-512-10", mlp(512, train=4096, query=256, batch=1024), SOLVES),
            ("sequences, width 1024", sequences(1024, 1024, 64, batch=64, positions=256, words=4096), OF_SEQUENCES),
        ]
    return [
        ("MLP 64-128-128-10", mlp(128, train=600, query=64, batch=256), OF_ROWS),
        ("MLP 64-32-32-10", mlp(32, train=200, query=32, batch=128), SOLVES),
        ("sequences, width 64", sequences(64, 64, 8, batch=32, positions=32), OF_SEQUENCES),
    ]


def number(value: float | None, form: str = ".3g") -> str:
    return "" if value is None else format(value, form)


def print_table(title: str, head: list[str], rows: list[list[str]]) -> None:
    print(f"\n### {title}\n")
    for line in (head, ["---"] * len(head), *rows):
        print("| " + " | ".join(line) + " |", flush=True)


def print_agreements(found: list[Agreement]) -> None:
    head = ["model", "path", "float64", "float32", "CPU's float32", "tolerance", ""]
    errors = [[number(value, ".1e") for value in (a.double, a.single, a.cpu_single, a.tolerance)] for a in found]
    verdicts = ["" if a.holds else "**not the same**" for a in found]
    rows = [[a.problem, a.path, *error, said] for a, error, said in zip(found, errors, verdicts, strict=True)]
    print_table("The same scores", head, rows)


def print_costs(found: list[Cost]) -> None:
    head = ["model", "path", "share of the rate", "first, s", "fit, s", "score, s", "peak MB", "waits a batch"]
    rows = [
        [c.problem, c.path, number(c.share, ".1%"), *map(number, (c.first, c.fit, c.score, c.peak, c.waits))]
        for c in found
    ]
    print_table("Costs, float32", head, rows)


def arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--limit", type=float, default=420.0, help="wall seconds that begin no further row (420)")
    parser.add_argument("--json", type=Path, help="the figures, too")
    return parser.parse_args(given)


def main(given: list[str] | None = None) -> int:
    options = arguments(given)
    device, start = Device(torch.device(options.device)), time.monotonic()
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    if not device.is_gpu:
        torch.set_num_threads(1)
    print(f"{device.name}, torch {torch.__version__}")
    left_out: list[str] = []

    def each(problems: list[tuple[str, Problem, list[Asked]]]) -> Iterator[tuple[str, Problem, Asked]]:
        for name, problem, paths in problems:
            for path in paths:
                if time.monotonic() - start > options.limit:
                    left_out.append(f"{name}: {path.name}")
                else:
                    yield name, problem, path

    same = [agreement(name, path, problem, device) for name, problem, path in each(small())]
    print_agreements(same)
    rates = device.rates()
    moved = [(name, problem.to(device.device, torch.float32), paths) for name, problem, paths in measured(device)]
    costs = [cost(name, path, problem, device, rates) for name, problem, path in each(moved)]
    print_costs(costs)
    per_second = [["float32", f"{rates.single:.3g}"], ["float64", f"{rates.double:.3g}"]]
    print_table("Rates of plain products", ["dtype", "operations a second"], per_second)
    if left_out:
        print(f"\nNot begun after {options.limit:.0f} s: {'; '.join(left_out)}.")
    if options.json:
        found = {"device": device.name, "torch": torch.__version__, "rates": vars(rates), "left out": left_out}
        found |= {"same": [vars(a) for a in same], "costs": [vars(c) for c in costs]}
        options.json.write_text(json.dumps(found, indent=1))
    return int(not same or not all(a.holds for a in same))


if __name__ == "__main__":
    sys.exit(main())
