"""Every method of the library and the published libraries' own, on the same models and retraining banks.

    python benchmarks/leaderboard/run.py                       everything that is not known, then docs/leaderboard.md
    python benchmarks/leaderboard/run.py --tasks digits-mlp    some tasks
    python benchmarks/leaderboard/run.py --only ekfac pydvl    entries whose name contains one of these, and no page
    python benchmarks/leaderboard/run.py --page                the page alone, of what is known
    python benchmarks/leaderboard/run.py --jobs 2              two entries at once

What is found is kept in --out (.leaderboard/ by default), an entry at a time; delete a file there to measure again.
Every entry is a process of its own on one thread, and not warmed up.

The first SELECTION subsets of a bank choose our damping, one model each: ten retrained models. All figures are of the
other subsets. Peers have no calibration: each runs on a path of dampings, and the page has the best of them *in
hindsight*, on the very subsets that it is judged on.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from peers import REPO, SOURCE, one_thread, peer_python, peerbench_folder  # noqa: E402
from tasks import (  # noqa: E402
    TASKS,
    WINDOW,
    bank,
    beginning,
    convex_losses,
    network_losses,
    ready,
    save_rows,
    token_losses,
)

if str(SOURCE) not in sys.path:
    sys.path.insert(0, str(SOURCE))

SELECTION = 10
SHARE = 0.5
"""Of the rows, that the banks' subsets keep."""
CLASSIFIERS = ("digits-mlp", "mnist-cnn")
NETWORKS = (*CLASSIFIERS, "gospels-lm")
LOGISTIC = ("digits-logistic", "cancer-logistic")
ALL = (*NETWORKS, *LOGISTIC)


# What is measured -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ours:
    """A method of the library."""

    make: Callable[[Any], Any]
    blocks: str = "layer"
    tasks: tuple[str, ...] = ALL
    checkpoints: bool = False
    """Averaged over the last half of the weights that the training kept."""
    at_l2: bool = False
    """With the training's l2 as damping: nothing is chosen."""
    half_weight: bool = False
    """At the weights where every row counts one half, with the damping that follows from the l2: nothing is chosen."""
    normalise: str | None = None
    """Directions instead of sizes. "both" and "train" have the same LDS: a query's own length is the same for all."""
    recorded: bool = False
    """Made of a record of the training, which is taken again for it."""
    dear: tuple[str, ...] = ()
    """Tasks on which it takes long at each damping, so that three are tried; elsewhere all seven decades are."""

    def path(self, task: str) -> list[Any] | None:
        """Dampings to choose from; None for all seven decades."""
        short = (10**0.5, 10.0, 10**1.5) if task == "gospels-lm" else (1.0, 10.0, 100.0)
        return [hw().relative(amount) for amount in short] if task in self.dear else None


def hw() -> Any:
    import headwater

    return headwater


def loose(task: Any) -> float:
    """The relative residual at which solves end: ranks need no more, and a sequence's products are dear."""
    return 1e-1 if task.losses is token_losses else 1e-2


OURS = {
    "grad-dot": Ours(lambda task: hw().GradDot()),
    "grad-cos": Ours(lambda task: hw().GradCos()),
    "tracin, checkpoints": Ours(lambda task: hw().TracIn(), tasks=NETWORKS, checkpoints=True),
    "direct (Hessian)": Ours(lambda task: hw().Direct("hessian"), "full", LOGISTIC),
    "direct (Hessian), at l2": Ours(lambda task: hw().Direct("hessian"), "full", LOGISTIC, at_l2=True),
    "direct (Hessian), half-weight optimum": Ours(
        lambda task: hw().Direct("hessian"), "full", LOGISTIC, half_weight=True
    ),
    "dual (empirical Fisher)": Ours(lambda task: hw().Dual(), "full"),
    "cg (GGN)": Ours(lambda task: hw().Cg(tolerance=loose(task)), "full", dear=("gospels-lm",)),
    "cg (GGN), by layer": Ours(lambda task: hw().Cg(tolerance=1e-2), "layer", CLASSIFIERS),
    "cg (GGN), checkpoints": Ours(lambda task: hw().Cg(tolerance=1e-2), "full", CLASSIFIERS, checkpoints=True),
    "block-krylov (GGN)": Ours(lambda task: hw().BlockKrylov(tolerance=1e-2), "full", (*CLASSIFIERS, *LOGISTIC)),
    "arnoldi": Ours(lambda task: hw().Arnoldi(), "full"),
    "nystroem": Ours(lambda task: hw().Nystroem(), "full"),
    "lissa": Ours(lambda task: hw().Lissa(), "full", ("digits-mlp", *LOGISTIC), dear=ALL),
    "astra": Ours(lambda task: hw().Astra(), "full", ("digits-mlp", *LOGISTIC), dear=ALL),
    "kfac": Ours(lambda task: hw().Kfac()),
    "ekfac": Ours(lambda task: hw().Ekfac()),
    "ekfac, rank 4": Ours(lambda task: hw().Ekfac(rank=4)),
    "ekfac, checkpoints": Ours(lambda task: hw().Ekfac(), tasks=NETWORKS, checkpoints=True),
    "datainf": Ours(lambda task: hw().DataInf()),
    "trak, exact kernel": Ours(lambda task: hw().Trak(dimension=None), "full", (*CLASSIFIERS, *LOGISTIC)),
    "trak, 512": Ours(lambda task: hw().Trak(dimension=512), "full", (*CLASSIFIERS, *LOGISTIC)),
    "logra": Ours(lambda task: hw().LoGra()),
    "logra, pca": Ours(lambda task: hw().LoGra(init="pca"), tasks=NETWORKS),
    "lorif": Ours(lambda task: hw().LoRif()),
    "factgrass": Ours(lambda task: hw().FactGrass()),
    "ekfac, directions": Ours(lambda task: hw().Ekfac(), tasks=(*CLASSIFIERS, *LOGISTIC), normalise="both"),
    "dual (empirical Fisher), directions": Ours(
        lambda task: hw().Dual(), "full", (*CLASSIFIERS, *LOGISTIC), normalise="both"
    ),
    "unrolled": Ours(lambda folder: hw().Unrolled(folder, removals=(1 - SHARE,)), tasks=NETWORKS, recorded=True),
    "unrolled (GGN)": Ours(
        lambda folder: hw().Unrolled(folder, curvature="ggn", removals=()), tasks=NETWORKS, recorded=True
    ),
    "in-run": Ours(
        lambda folder: hw().Unrolled(folder, curvature=None, at="step", removals=()), tasks=NETWORKS, recorded=True
    ),
    "source": Ours(lambda folder: hw().Source(folder), tasks=NETWORKS, recorded=True),
    "representer": Ours(lambda task: hw().Representer(l2=task.l2), "full", LOGISTIC),
}
LONGER = {("gospels-lm", "headwater", "cg (GGN)"): 2000, ("gospels-lm", "pydvl", "cg"): 1000}
"""Limits in CPU seconds where they are longer: ours is for calibration and all, a peer's for one damping."""
BASELINES = ("random", "input similarity", "embedding similarity", "bm25", "loss ranking", "knn-shapley")
RETRAINED = ("banzhaf", "ridge", "out-of-bag")
"""Made of models that are trained again on other random halves than the bank's, and of nothing else."""
REFITS = {"digits-logistic": 400, "cancer-logistic": 400, "digits-mlp": 200, "mnist-cnn": 200, "gospels-lm": 100}
DAMPED = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
"""What peers try on networks; on the convex tasks, DAMPED_L2 times the l2 of the training."""
SOLVED = (1e-2, 3e-2, 1e-1)
"""For inverses of all parameters; on the language model, whose rows' losses are sums over tokens, WINDOW times that."""
DAMPED_L2 = (0.5, 1.0, 1.5, 2.0, 3.0)
PEERS: dict[tuple[str, str], tuple[tuple[str, ...], tuple[float, ...]]] = {
    ("kronfluence", "identity"): (ALL, ()),
    ("kronfluence", "kfac"): (ALL, DAMPED),
    ("kronfluence", "ekfac"): (ALL, DAMPED),
    ("pydvl", "direct"): (LOGISTIC, DAMPED),
    ("pydvl", "cg"): (NETWORKS, (*SOLVED, 6e-2)),
    ("pydvl", "cg_gn"): (CLASSIFIERS, (1e-2, 3e-2)),
    ("pydvl", "ekfac"): (ALL, DAMPED),
    ("pydvl", "nystroem"): (ALL, SOLVED),
    ("pydvl", "arnoldi"): ((*CLASSIFIERS, *LOGISTIC), SOLVED),
    ("pydvl", "lissa"): (("digits-mlp", *LOGISTIC), SOLVED),
    ("pydvl", "ihm"): (ALL, (1e-2, 1e-1)),
    ("dattri", "explicit"): (LOGISTIC, DAMPED),
    ("dattri", "arnoldi"): (("digits-mlp", *LOGISTIC), SOLVED),
    ("dattri", "datainf"): ((*CLASSIFIERS, *LOGISTIC), (1e-2,)),
    ("dattri", "ekfac"): (("digits-mlp", *LOGISTIC), SOLVED),
    ("dattri", "graddot"): ((*CLASSIFIERS, *LOGISTIC), ()),
    ("dattri", "trak"): ((*CLASSIFIERS, *LOGISTIC), ()),
    ("dattri", "logra"): (ALL, DAMPED),
    ("dattri", "factgrass"): (("digits-mlp", *LOGISTIC), (1e-3, 1e-1)),
    ("captum", "tracin_sw"): (ALL, ()),
    ("captum", "naive"): (LOGISTIC, (1e-2,)),
    ("captum", "arnoldi"): (("digits-mlp", *LOGISTIC), SOLVED),
    ("trak", "trak512"): (ALL, ()),
    ("trak", "trak2048"): (CLASSIFIERS, ()),
}


@dataclass(frozen=True)
class Entry:
    """One measurement."""

    task: str
    library: str
    method: str
    damping: float | None = None

    @property
    def name(self) -> str:
        amount = "" if self.damping is None else f" {self.damping:g}"
        return f"{self.task} {self.library} {self.method}{amount}"


def entries(task: str) -> Iterator[Entry]:
    """All that is measured on a task."""
    without = "knn-shapley" if task == "gospels-lm" else "bm25"
    yield from (Entry(task, "baseline", name) for name in BASELINES if name != without)
    yield from (Entry(task, "retraining", name) for name in RETRAINED)
    yield from (Entry(task, "headwater", name) for name, ours in OURS.items() if task in ours.tasks)
    for (library, method), (tasks, dampings) in PEERS.items():
        if task in tasks:
            path = dampings
            if task in LOGISTIC and dampings:
                path = tuple(TASKS[task].l2 * share for share in DAMPED_L2)
            elif task == "gospels-lm" and method in ("cg", "nystroem"):
                path = tuple(WINDOW * damping for damping in dampings)
            yield from (Entry(task, library, method, damping) for damping in path or (None,))


# One measurement, in a process of its own -----------------------------------------------------------------------------


def influence_of(found: Any, ours: Ours) -> Any:
    import torch

    from headwater.torch import TorchComposableInfluence, half_weight_optimum

    sequence, model, l2 = found.task.losses is token_losses, found.model, found.task.l2
    damping = l2 if ours.at_l2 else None
    if ours.half_weight:
        model = half_weight_optimum(model, torch.nn.CrossEntropyLoss(), found.x, found.y, damping=l2, share=SHARE)
        damping = l2 / SHARE
    return TorchComposableInfluence(
        model,
        token_losses if sequence else torch.nn.CrossEntropyLoss(),
        ours.make(found.task),
        damping=damping,
        blocks=ours.blocks,
        likelihood="cross_entropy",
        checkpoints=found.checkpoints[len(found.checkpoints) // 2 :] if ours.checkpoints else None,
    )


def measure_ours(entry: Entry, file: Path) -> dict[str, Any]:
    """Fit, calibrate on ten models, score; and the best damping on the path, in hindsight."""
    from headwater.retraining.torch.trainer import batches

    found, ours = ready(entry.task), OURS[entry.method]
    if ours.recorded:
        return measure_recorded(found, ours, file)
    size = 4 if found.task.losses is token_losses else 256  # products of sequences are fastest on a few
    train, query = batches(found.x, found.y, size), batches(found.xq, found.yq, len(found.xq))
    keep, outputs = bank(found.task)
    cost, start = {}, time.process_time()

    def took(what: str) -> None:
        nonlocal start
        cost[what] = time.process_time() - start
        start = time.process_time()

    influence = influence_of(found, ours).fit(train)
    took("fit")
    known: dict[str, Any] = {}
    if influence.method.predicts_removal and not (ours.at_l2 or ours.half_weight):
        directions = ours.normalise is not None
        chosen, rest = calibrations(influence, train, query, keep, outputs, ours.path(entry.task), directions)
        took("calibrate")
        amount = next(iter(chosen.chosen.values()))
        calibrated = influence.with_damping(hw().relative(amount))
        known = {
            "chosen": amount,
            "interval": chosen.interval,
            "plateau": chosen.plateau,
            "held out": chosen.held_out,
            "selection": dict(zip(chosen.path, chosen.measured, strict=True)),
            "hindsight": dict(zip(rest.path, rest.measured, strict=True)),
        }
        if found.task.losses is not token_losses and ours.make(found.task).approximates:
            known["evidence"] = evidence(influence, train)
        start = time.process_time()
        influence = calibrated
    scores = np.asarray(influence.attribute(train, query, normalise=ours.normalise), dtype=np.float32)
    took("score")
    np.save(file.with_suffix(".npy"), scores)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {**known, "cost": cost, "peak": peak, "blocks": ours.blocks}


def measure_recorded(found: Any, ours: Ours, file: Path) -> dict[str, Any]:
    """Train once more, with a record of it, and ask that. What the verdict says is kept beside the scores."""
    from headwater.trajectory.torch.trainer import train_recorded

    options = {"loss": found.task.losses, "l2": found.task.l2, **found.task.training}
    rows, query = (found.x, found.y), (found.xq, found.yq)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", hw().errors.RoughForecast)
        start = time.process_time()
        model = train_recorded(beginning(found.task), *rows, Path(folder) / "r", seed=0, **options)
        method = ours.make(Path(folder) / "r")
        influence = hw().Influence(model, found.task.losses, method, likelihood="cross_entropy").fit(rows)
        cost = {"fit": time.process_time() - start}
        start = time.process_time()
        scores = np.asarray(influence.attribute(rows, query), dtype=np.float32)
        cost["score"] = time.process_time() - start
        verdict = "" if influence.verdict is None else str(influence.verdict)
    np.save(file.with_suffix(".npy"), scores)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"cost": cost, "peak": peak, "verdict": verdict}


def measure_retrained(entry: Entry, file: Path) -> dict[str, Any]:
    """Attribution by models that were trained on other random halves than those of the bank that judges it."""
    from headwater.evaluate import out_of_bag, plan_subsets
    from headwater.evaluate.attributed import attribution

    task = TASKS[entry.task]
    x, y, xq, _ = task.rows()
    plan = plan_subsets(len(x), subsets=REFITS[task.name], repeated=0, seed=1)
    losses = convex_losses if task.training is None else network_losses
    itself = entry.method == "out-of-bag"
    known = file.parent / f"{task.name} refits{', train rows' if itself else ''}.npz"
    if not known.exists():  # once for all of RETRAINED, each of which counts its cost
        start = time.process_time()
        outputs = losses(task, plan.keep, plan.seeds[:, 0], (x, y) if itself else None)
        np.savez(known, outputs=outputs, seconds=time.process_time() - start)
    kept = np.load(known)
    outputs, cost = kept["outputs"][:, None], {"fit": float(kept["seconds"])}
    start = time.process_time()
    if itself:
        scores = out_of_bag(plan.keep, outputs, len(xq))
    else:
        scores = np.asarray(attribution(plan.keep, outputs, entry.method))
    cost["score"] = time.process_time() - start
    np.save(file.with_suffix(".npy"), scores.astype(np.float32))
    return {"cost": cost, "refits": len(plan.keep)}


def calibrations(
    influence: Any, train: Any, query: Any, keep: Any, outputs: Any, path: list[Any] | None, directions: bool = False
) -> tuple[Any, Any]:
    """What `influence.calibrate` finds on the ten models of the selection, and on all other subsets."""
    from headwater.evaluate.calibration import choose_damping
    from headwater.run.calibrate import path_forecasts

    first = outputs[:SELECTION, :1]
    found = path_forecasts(influence, train, query, keep, first, dampings=path, directions=directions)
    mine = {name: values[:, :SELECTION] for name, values in found.forecasts.items()}
    theirs = {name: values[:, SELECTION:] for name, values in found.forecasts.items()}
    return choose_damping(found.path, mine, first), choose_damping(found.path, theirs, outputs[SELECTION:], resamples=0)


def evidence(influence: Any, train: Any) -> dict[str, float] | None:
    """Where the evidence puts the damping; None where it is not known."""
    from headwater.errors import InvalidSetting

    try:
        return dict(influence.calibrate(train).calibration.chosen)
    except InvalidSetting:
        return None


def measure_baseline(entry: Entry, file: Path) -> dict[str, Any]:
    """Scores that know no gradient."""
    import torch

    from headwater.evaluate import baselines, knn_shapley

    found = ready(entry.task)
    start = time.process_time()
    count, sequence = len(found.xq), found.task.losses is token_losses
    if entry.method == "random":
        scores = baselines.random_scores(count, len(found.x))
    elif entry.method == "bm25":
        texts = [[bytes(row).decode("ascii") for row in rows.tolist()] for rows in (found.xq, found.x)]
        scores = baselines.bm25(*texts)
    elif entry.method == "knn-shapley":
        scores = knn_shapley(*inputs(found, sequence), found.yq.numpy(), found.y.numpy())
    elif entry.method == "loss ranking":
        with torch.no_grad():
            scores = baselines.loss_ranking(found.task.losses(found.model(found.x), found.y).numpy(), count)
    else:
        features = (embedded if entry.method.startswith("embedding") else inputs)(found, sequence)
        labels = () if sequence else (found.yq.numpy(), found.y.numpy())
        scores = baselines.similarity(*features, *labels)
    np.save(file.with_suffix(".npy"), scores.astype(np.float32))
    return {"cost": {"score": time.process_time() - start}}


def inputs(found: Any, sequence: bool) -> tuple[np.ndarray, np.ndarray]:
    """Inputs as vectors; of bytes, how often each is there."""
    import torch

    if sequence:
        count = torch.nn.functional.one_hot
        return tuple(count(rows, 256).float().mean(1).numpy() for rows in (found.xq, found.x))
    return tuple(rows.flatten(1).numpy() for rows in (found.xq, found.x))


def embedded(found: Any, sequence: bool) -> tuple[np.ndarray, np.ndarray]:
    """What the model's last layer is given, averaged over positions."""
    import torch

    last = found.model.head if sequence else list(found.model.children())[-1]
    seen: list[Any] = []
    hook = last.register_forward_hook(lambda module, given, output: seen.append(given[0].detach()))
    with torch.no_grad():
        found.model(found.xq)
        found.model(found.x)
    hook.remove()
    return tuple((rows.mean(1) if rows.ndim == 3 else rows).numpy() for rows in seen)


WORK = {"headwater": measure_ours, "baseline": measure_baseline, "retraining": measure_retrained}
"""What is measured without a peer, in a process of its own."""


# Many -----------------------------------------------------------------------------------------------------------------


def measure(entry: Entry, out: Path, limit: int) -> None:
    """Measure an entry if it is not known, and keep what was found, be it a failure."""
    file = out / f"{entry.name}.json"
    if file.exists():
        return
    limit = max(limit, LONGER.get((entry.task, entry.library, entry.method), 0))
    draft = out / f"{entry.name}.draft.npy"
    if entry.library in WORK:
        asked = json.dumps([entry.task, entry.library, entry.method])
        command = [sys.executable, str(HERE / "run.py"), "--one", asked, "--out", str(out)]
    else:
        rows = out / f"{entry.task}.safetensors"
        driver = peerbench_folder() / f"peer_{entry.library}.py"
        command = [peer_python(), str(HERE / "peer.py"), str(rows), str(driver), "--workload", entry.task]
        command += ["--method", entry.method, "--out", str(draft), "--repeats", "1"]
        command += [] if entry.damping is None else ["--damping", f"{entry.damping:g}"]
    within = ["sh", "-c", 'ulimit -t "$0" && exec "$@"', str(limit), *command]
    ended = subprocess.run(within, capture_output=True, text=True, env=one_thread(peerbench_folder()))
    known = [line[5:] for line in ended.stdout.splitlines() if line.startswith("JSON ")]
    found = json.loads(known[-1]) if known else {}
    if not found or found.get("ok") is False:
        said = found.get("error") or (ended.stderr.strip().splitlines() or [f"exit {ended.returncode}"])[-1]
        found = {"failed": f"not done after {limit} CPU s" if ended.returncode in (-9, -24) else said[:200]}
    elif draft.exists():
        os.replace(draft, file.with_suffix(".npy"))
        np.save(file.with_suffix(".npy"), np.load(file.with_suffix(".npy")).T)
        found = {
            "cost": {"fit": found["fit_cpu_s"], "score": found["score_cpu_s"]},
            "peak": found["peak_rss_mb"],
            "version": found["version"],
        }
    file.write_text(json.dumps(found))
    print(f"{entry.name}: {found.get('failed', 'done')}", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--tasks", nargs="*", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--out", type=Path, default=REPO / ".leaderboard")
    parser.add_argument("--limit", type=int, default=600, help="CPU seconds of an entry")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--page", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        entry = Entry(*json.loads(given.one))
        print("JSON " + json.dumps(WORK[entry.library](entry, given.out / f"{entry.name}.json")))
        return
    given.out.mkdir(exist_ok=True)
    (given.out / ".gitignore").write_text("*\n")
    wanted = [entry for task in given.tasks for entry in entries(task)]
    wanted = [entry for entry in wanted if not given.only or any(part in entry.name for part in given.only)]
    if not given.page:
        for task in given.tasks:
            save_rows(ready(task), given.out / f"{task}.safetensors")
        if any(entry.library not in WORK for entry in wanted):
            peer_python()  # made once, before several processes ask for it
        with ThreadPoolExecutor(given.jobs) as pool:
            list(pool.map(lambda entry: measure(entry, given.out, given.limit), wanted))
    if given.only:
        return
    from page import write_page

    write_page(given.out, REPO / "docs" / "leaderboard.md")


if __name__ == "__main__":
    main()
