"""How true are headwater's scores, method by method? The table of docs/methods.md.

    python benchmarks/accuracy.py                    every method, on W1 and W4
    python benchmarks/accuracy.py --only cg ekfac    some, with what else is known in --out
    python benchmarks/accuracy.py --out FOLDER       where results are kept; what is there is not measured again
    python benchmarks/accuracy.py --out FOLDER --known    the table of what is there

W1, a digits network of 85,002 parameters: LDS (see README.md) at 0.1, 1 and 10 times the mean eigenvalue; at the first
two the rank correlation with the exact damped inverse of the curvature that the method approximates, in the same blocks
and at the same absolute damping; CPU seconds of fit and score; peak memory. W4, a logistic regression of 62 parameters:
LDS, and the rank correlation with exact leave-one-out, at the damping that its training had (its l2).

Every measurement is a process of its own on one thread, stopped after --limit CPU seconds, warmed up on a few rows. It
needs the workloads of the peers' folder (see `peers.py`), and no peer.
"""

import argparse
import datetime
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from peers import SOURCE, one_thread, peerbench_folder
from run import linear_datamodeling_score, load_truth, mean_of_known, spearman

for folder in (str(peerbench_folder()), str(SOURCE)):
    if folder not in sys.path:
        sys.path.insert(0, folder)

import headwater as hw  # noqa: E402

DAMPINGS, COMPARED = ("0.1", "1", "10"), ("0.1", "1")
"""Times the mean eigenvalue: for LDS, and for the comparison with the exact inverse."""


@dataclass(frozen=True)
class Item:
    """A row of the table."""

    make: Callable[[], Any]
    blocks: str = "layer"
    workloads: tuple[str, ...] = ("W1", "W4")


def representer() -> Any:
    import workloads

    return hw.Representer(l2=workloads.L2["W4"])


ITEMS = {
    "grad-dot": Item(lambda: hw.GradDot()),
    "grad-cos": Item(lambda: hw.GradCos()),
    "direct": Item(lambda: hw.Direct("hessian"), "full", ("W4",)),
    "dual": Item(lambda: hw.Dual(), "full"),
    "dual, by layer": Item(lambda: hw.Dual(), "layer", ("W1",)),
    "cg": Item(lambda: hw.Cg(), "full"),
    "cg, by layer": Item(lambda: hw.Cg(), "layer", ("W1",)),
    "block-krylov": Item(lambda: hw.BlockKrylov(), "full"),
    "lissa": Item(lambda: hw.Lissa(), "full"),
    "astra": Item(lambda: hw.Astra(), "full"),
    "arnoldi": Item(lambda: hw.Arnoldi(), "full"),
    "nystroem": Item(lambda: hw.Nystroem(), "full"),
    "ekfac": Item(lambda: hw.Ekfac()),
    "ekfac, rank 4": Item(lambda: hw.Ekfac(rank=4)),
    "kfac": Item(lambda: hw.Kfac()),
    "kfac, factored": Item(lambda: hw.Kfac(damping_form="factored")),
    "datainf": Item(lambda: hw.DataInf()),
    "trak, exact kernel": Item(lambda: hw.Trak(dimension=None), "full"),
    "trak, 512": Item(lambda: hw.Trak(dimension=512), "full"),
    "trak, 2048": Item(lambda: hw.Trak(dimension=2048), "full", ("W1",)),
    "logra": Item(lambda: hw.LoGra()),
    "logra, pca": Item(lambda: hw.LoGra(init="pca")),
    "lorif": Item(lambda: hw.LoRif()),
    "factgrass": Item(lambda: hw.FactGrass()),
    "representer": Item(representer, "full", ("W4",)),
}


# One measurement ------------------------------------------------------------------------------------------------------


def influence_on(workload: Any, method: Any, blocks: str, damping: Any) -> Any:
    import torch

    from headwater.torch import TorchComposableInfluence

    return TorchComposableInfluence(
        workload.model, torch.nn.CrossEntropyLoss(), method, blocks=blocks, damping=damping, likelihood="cross_entropy"
    )


def batches(x: Any, y: Any) -> list[Any]:
    return list(zip(x.split(256), y.split(256), strict=True))


def measured(name: str, item: str, damping: str) -> tuple[np.ndarray, dict[str, Any]]:
    """Scores [train, query], and what they cost; in this process, for the first time.

    Units: damping "0.1" or "1" is times the mean eigenvalue; "l2" is that of the workload's training, absolute.
    """
    import workloads

    w, row = workloads.load(name), ITEMS[item]
    method = row.make()
    added = None if not method.predicts_removal else w.l2 if damping == "l2" else hw.relative(float(damping))
    warm = influence_on(w, method, row.blocks, added).fit(batches(w.x[:600], w.y[:600]))
    warm.attribute(batches(w.x[:64], w.y[:64]), [(w.xq[:2], w.yq[:2])])
    train, query = batches(w.x, w.y), [(w.xq, w.yq)]
    start = time.process_time()
    influence = influence_on(w, method, row.blocks, added).fit(train)
    fitted = time.process_time()
    scores = np.asarray(influence.attribute(train, query)).T
    cost = {"fit": fitted - start, "score": time.process_time() - fitted}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    known = {"approximates": method.approximates, "explained": influence.explained, "blocks": row.blocks}
    absolute = influence.absolute_damping if method.approximates else {}
    missed = sum(int((~report.converged).sum()) for report in influence.solves.values())
    return scores, {**cost, "peak": peak, **known, "damping": absolute, "missed": missed}


def reference(name: str, item: str, found: dict[str, Any]) -> np.ndarray:
    """The exact damped inverse of what the method approximates, of the same gradients: [train, query]."""
    import workloads

    w, row = workloads.load(name), ITEMS[item]
    kind = found["approximates"]
    exact = hw.Dual() if kind == "empirical_fisher" else hw.Cg(curvature=kind, tolerance=1e-5)
    seen = influence_on(w, row.make(), row.blocks, None).unfitted(method=exact, damping=found["damping"])
    train = batches(w.x, w.y)
    return np.asarray(seen.fit(train).attribute(train, [(w.xq, w.yq)])).T


# Many -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bench:
    """Where results are kept, and how long a process may take."""

    out: Path
    limit: float
    known: bool = False  # measure nothing

    def run(self, name: str, item: str, damping: str) -> dict[str, Any]:
        """What was found of one measurement: from the folder, or measured now. {"failed": why} for one that failed."""
        file = self.out / f"{name} {item} {damping}.json"
        if not self._there(file, ["--one", name, item, damping]):
            return {"failed": "not measured"}
        found: dict[str, Any] = json.loads(file.read_text())
        if "failed" not in found:
            found["scores"] = np.load(file.with_suffix(".npy"))
        return found

    def exact(self, name: str, item: str, damping: str, found: dict[str, Any]) -> np.ndarray | None:
        """The scores that a measurement approximates; methods that approximate the same share them."""
        if "failed" in found or not found["approximates"]:
            return None
        amounts = " ".join(f"{value:.3g}" for value in found["damping"].values())
        what = found["approximates"], found["blocks"], found["explained"], amounts
        file = self.out / f"{name} exact {' '.join(what)}.json"
        if not self._there(file, ["--exact", name, item, damping]):
            return None
        return None if "failed" in json.loads(file.read_text()) else np.load(file.with_suffix(".npy"))

    def _there(self, file: Path, arguments: list[str]) -> bool:
        """Whether the file is there, after it has been made if need be."""
        if not file.is_file() and not self.known:
            self._spawn(arguments, file)
        return file.is_file()

    def _spawn(self, arguments: list[str], file: Path) -> None:
        """In a process of its own; writes the file, whatever happens."""
        limit = int(self.limit if arguments[0] == "--one" else 5 * self.limit)
        command = [sys.executable, str(Path(__file__).resolve()), *arguments, "--out", str(self.out), "--to", str(file)]
        ended = subprocess.run(
            command,
            capture_output=True,
            text=True,
            env=one_thread(peerbench_folder()),
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 5)),
        )
        if ended.returncode != 0:
            said = ended.stderr.strip().splitlines()[-1:] or [f"exit status {ended.returncode}"]
            why = f"not done after {limit} CPU s" if ended.returncode < 0 else said[0]
            file.write_text(json.dumps({"failed": why}))
            print(f"{file.stem}: {why}", file=sys.stderr, flush=True)
        else:
            print(f"{file.stem}: done", file=sys.stderr, flush=True)


def work(given: argparse.Namespace) -> None:
    """The child's part: one measurement, or one reference."""
    name, item, damping = given.one or given.exact
    if given.one:
        scores, found = measured(name, item, damping)
    else:
        found = json.loads((Path(given.out) / f"{name} {item} {damping}.json").read_text())
        scores = reference(name, item, found)
    np.save(Path(given.to).with_suffix(".npy"), scores)
    Path(given.to).write_text(json.dumps(found))


# The table ------------------------------------------------------------------------------------------------------------

HEADINGS = [
    *(
        "method",
        "blocks",
        "LDS at 0.1",
        "LDS at 1",
        "LDS at 10",
        "exact at 0.1",
        "exact at 1",
        "CPU s: fit + score",
        "peak MB",
    ),
    *("W4 LDS", "W4 leave-one-out"),
]


def line(bench: Bench, item: str, truths: dict[str, dict[str, np.ndarray]]) -> list[str]:
    row = ITEMS[item]
    cells = [item, row.blocks]
    if "W1" in row.workloads:
        first = bench.run("W1", item, DAMPINGS[0])
        damped = "failed" in first or first["approximates"]  # where not, one damping is as good as another
        found = {d: bench.run("W1", item, d) if damped else first for d in DAMPINGS}
        truth = truths["W1"]
        cells += [of(found[d], lambda s: linear_datamodeling_score(s, truth)) for d in DAMPINGS]
        exact = {d: bench.exact("W1", item, d, found[d]) for d in COMPARED}
        cells += [of(found[d], lambda s, e=exact[d]: spearman(s, e)) if exact[d] is not None else "" for d in COMPARED]
        known = [f for f in found.values() if "failed" not in f]
        totals = sorted(f["fit"] + f["score"] for f in known)
        cells += [f"{totals[0]:.2g} - {totals[-1]:.2g}" if known else "", f"{known[-1]['peak']:.0f}" if known else ""]
    else:
        cells += [""] * 7
    if "W4" in row.workloads:
        found_convex, truth_convex = bench.run("W4", item, "l2"), truths["W4"]
        cells.append(of(found_convex, lambda s: linear_datamodeling_score(s, truth_convex)))
        cells.append(of(found_convex, lambda s: spearman(s, truth_convex["loo"])))
    else:
        cells += ["", ""]
    return cells


def of(found: dict[str, Any], measure: Callable[[np.ndarray], np.ndarray]) -> str:
    if "failed" in found:
        return str(found["failed"])
    text = f"{mean_of_known(measure(found['scores'])):.3f}"
    return f"{text} ({found['missed']} solves missed)" if found["missed"] else text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=ITEMS, metavar="METHOD", help=", ".join(ITEMS))
    parser.add_argument("--out", help="folder of the results (a new one in the temporary folder)")
    parser.add_argument(
        "--limit", type=float, default=120.0, help="CPU seconds for one method (120); exact: five times"
    )
    parser.add_argument("--known", action="store_true", help="measure nothing; show what --out has")
    for hidden, count in (("--one", 3), ("--exact", 3), ("--to", None)):
        parser.add_argument(hidden, nargs=count, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one or given.exact:
        work(given)
        return 0
    folder = Path(given.out or tempfile.mkdtemp(prefix="headwater-accuracy-"))
    folder.mkdir(parents=True, exist_ok=True)
    bench = Bench(folder, given.limit, given.known)
    truths = {name: load_truth(peerbench_folder(), name) for name in ("W1", "W4")}
    lacking = [name for name, truth in truths.items() if truth is None]
    if lacking:
        parser.error(f"no ground truth for {', '.join(lacking)} in {peerbench_folder()}")
    lines = [HEADINGS, ["---"] * len(HEADINGS)]
    lines += [line(bench, item, truths) for item in given.only or ITEMS]  # type: ignore[arg-type]
    print(f"{datetime.date.today()}, {os.cpu_count()}-core {platform.machine()}, one thread\n")
    print("\n".join("| " + " | ".join(cells) + " |" for cells in lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
