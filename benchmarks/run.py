"""Time headwater beside its peers in one run, and print a table for each workload.

    python benchmarks/run.py W1 W3                          every method of the plan
    python benchmarks/run.py W1 --family cg nystroem        some families of methods
    python benchmarks/run.py W1 --only headwater.ekfac kronfluence.ekfac
    python benchmarks/run.py W4 --without-headwater         the peers alone
    python benchmarks/run.py MLP CNN GPT GLM                the larger workloads of more.py
    python benchmarks/run.py W1 --peers FOLDER --python PEER_PYTHON --rounds 5

Every driver runs in its own process on one thread, in rounds (A B C, A B C, ...), so that a machine that slows down
slows all of them; headwater's by the Python that runs this, the peers' by theirs. Within a process the first repeat is
cold: with all that comes before it, imports but torch's, it is told apart as the process's first scores, and the other
figures leave it out, unless the method is so slow that one repeat is all there is; the table says so. Figures are
medians over rounds; a ratio is taken within each round first. CPU seconds are those of the process, not of the wall.
A floor is what the arithmetic alone would take, from shapes and this machine's rate in the same round: see floors.py.
"""

import argparse
import datetime
import json
import os
import platform
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from floors import Floors
from peers import one_thread, peer_python, peerbench_folder

HERE = Path(__file__).resolve().parent
GRAD_DOT = ["kronfluence.identity", "captum.tracin_sw", "dattri.graddot", "headwater.graddot"]
KRONECKER = [
    *("kronfluence.diagonal", "kronfluence.kfac", "pydvl.kfac", "headwater.kfac", "headwater.kfac_factored"),
    *("kronfluence.ekfac", "kronfluence.ekfac_qb32", "pydvl.ekfac", "dattri.ekfac", "headwater.ekfac"),
    *("headwater.ekfac_r4", "headwater.ekfac_r16", "headwater.ekfac_all_labels"),
    *("kronfluence.ekfac_emp", "headwater.ekfac_empirical"),
    *("kronfluence.ekfac@damping=none", "headwater.ekfac_rel"),
]
FEW = "@nq=16,batch=1500"  # where all 297 queries take more than 5 CPU minutes; dattri solves anew for each batch
SELF = ["kronfluence_self.identity", "headwater.graddot_self", "kronfluence_self.ekfac", "headwater.ekfac_self"]
PERTURBATION = ["pydvl.perturbation@nq=2,ntrain=64", "headwater.perturbation@nq=2,ntrain=64"]
ROW_WISE = {
    "grad-dot": GRAD_DOT,
    "tracin": ["captum.tracin_sw", "captum.tracin_fast", "dattri.graddot", "headwater.tracin"],
    "kronecker": KRONECKER,
    "direct": [
        *("captum.naive_last", "captum.naive_d50_last", "pydvl.direct_last", "dattri.explicit_last"),
        *("headwater.direct_last", "pydvl.direct_gn_last"),
    ],
    "cg": [
        *("pydvl.cg", "headwater.cg_hessian", "headwater.cg_plain", "headwater.cg"),
        *("headwater.block_krylov", "headwater.astra"),
        *("pydvl.cg" + FEW, "dattri.cg" + FEW, "headwater.cg_hessian" + FEW),
    ],
    "dual": ["pydvl.cg_gn", "headwater.dual"],
    "lissa": ["pydvl.lissa@nq=16", "headwater.lissa@nq=16", "dattri.lissa" + FEW],
    "arnoldi": [
        *("captum.arnoldi", "pydvl.arnoldi", "dattri.arnoldi", "headwater.arnoldi_top", "headwater.arnoldi"),
    ],
    "nystroem": ["pydvl.nystroem", "pydvl.nystroem_gn", "headwater.nystroem"],
    "datainf": ["pydvl.ihm", "headwater.datainf", "dattri.datainf" + FEW, "headwater.datainf" + FEW],
    "trak": [
        *("trak.trak512", "dattri.trak", "headwater.trak512", "trak.trak2048", "headwater.trak2048"),
        "headwater.trak_exact",
    ],
    "logra": ["dattri.logra", "headwater.logra", "headwater.logra_pca", "headwater.lorif"],
    "factgrass": ["dattri.factgrass", "headwater.factgrass"],
    "perturbation": PERTURBATION,
}
CONVEX = {
    **ROW_WISE,
    "direct": [
        *("captum.naive", "captum.naive_sw", "captum.naive_d50", "pydvl.direct", "dattri.explicit"),
        *("headwater.direct", "pydvl.direct_gn", "headwater.direct_gn"),
    ],
    "cg": [
        *("pydvl.cg", "dattri.cg", "headwater.cg_hessian", "headwater.cg_plain", "headwater.cg"),
        *("headwater.block_krylov", "headwater.astra", "pydvl.cg_loop", "dattri.cg_batched"),
    ],
    "lissa": ["pydvl.lissa", "dattri.lissa", "headwater.lissa"],
    "datainf": ["pydvl.ihm", "dattri.datainf", "headwater.datainf"],
}
LARGE = {
    "grad-dot": ["kronfluence.identity", "captum.tracin_sw", "headwater.graddot"],
    "kronecker": ["kronfluence.ekfac", "headwater.ekfac", "headwater.ekfac_r4"],
    "self": SELF,
}
MANY = "@batch=4096"
GENERALISED_LINEAR = {
    "grad-dot": [item + MANY for item in ("kronfluence.identity", "captum.tracin_sw", "headwater.graddot")],
    "kronecker": [item + MANY for item in ("kronfluence.ekfac", "headwater.ekfac")],
    "direct": [item + MANY for item in ("pydvl.direct", "headwater.direct", "headwater.direct_gn")],
}
PLAN = {  # {workload: {family: items}}
    "W1": {**ROW_WISE, "self": SELF},
    "W3": LARGE,
    "W4": CONVEX,
    "MLP": LARGE,
    "CNN": {**LARGE, "perturbation": PERTURBATION},
    "GPT": LARGE,
    "GLM": GENERALISED_LINEAR,
}
LARGER = ("MLP", "CNN", "GPT", "GLM")
"""The workloads of more.py."""
REPEATS = {"W1": 4, "W3": 2, "W4": 4, "MLP": 2, "CNN": 2, "GPT": 1, "GLM": 2}  # in one process, the warm-up included

# What each method of headwater is measured against. No peer has separable EKFAC, factored damping, or products with
# the Gauss-Newton matrix (pyDVL means the empirical Fisher by that): cg and its kin stand beside CG on the Hessian.
ARNOLDI = ("captum.arnoldi", "pydvl.arnoldi", "dattri.arnoldi")  # all without what the eigenpairs leave out
HESSIAN_CG = ("pydvl.cg", "dattri.cg")
COUNTERPART = {
    "graddot": ("kronfluence.identity", "captum.tracin_sw"),
    "tracin": ("kronfluence.identity", "captum.tracin_sw"),
    "kfac": ("kronfluence.kfac",),
    "kfac_factored": ("kronfluence.kfac",),
    "ekfac": ("kronfluence.ekfac",),
    "ekfac_r4": ("kronfluence.ekfac", "kronfluence.ekfac_qb32"),
    "ekfac_r16": ("kronfluence.ekfac", "kronfluence.ekfac_qb32"),
    "ekfac_all_labels": ("kronfluence.ekfac",),
    "ekfac_empirical": ("kronfluence.ekfac_emp",),
    "ekfac_rel": ("kronfluence.ekfac@damping=none",),
    "direct": ("captum.naive", "captum.naive_sw", "captum.naive_d50", "pydvl.direct", "dattri.explicit"),
    "direct_last": ("captum.naive_last", "captum.naive_d50_last", "pydvl.direct_last", "dattri.explicit_last"),
    "cg": HESSIAN_CG,
    "cg_plain": HESSIAN_CG,
    "cg_hessian": HESSIAN_CG,
    "block_krylov": HESSIAN_CG,
    "astra": HESSIAN_CG,
    "dual": ("pydvl.cg_gn",),
    "lissa": ("pydvl.lissa", "dattri.lissa"),
    "arnoldi": ARNOLDI,
    "arnoldi_top": ARNOLDI,
    "nystroem": ("pydvl.nystroem", "pydvl.nystroem_gn"),
    "datainf": ("pydvl.ihm", "dattri.datainf"),
    "trak512": ("trak.trak512", "dattri.trak"),
    "trak2048": ("trak.trak2048",),
    "trak_exact": ("trak.trak2048",),
    "logra": ("dattri.logra",),
    "logra_pca": ("dattri.logra",),
    "lorif": ("dattri.logra",),
    "factgrass": ("dattri.factgrass",),
    "graddot_self": ("kronfluence_self.identity",),
    "ekfac_self": ("kronfluence_self.ekfac",),
    "perturbation": ("pydvl.perturbation",),
}

# Shown, but never what a ratio is taken to. Each was compared with dense float64 matrices on W4, and on W1 where these
# fit; a formula that is named here gives the peer's scores to 1e-5 or better.
SUMMED_FISHER = "its Fisher is made of sum_c sqrt(p_c) g_c, so that labels interact"
BATCH_WEIGHTS = (
    "its Gauss-Newton matrix is the empirical Fisher; of B batches' means the first has weight 1/(k B), each other one "
    "1/B, where k is how many vectors are multiplied at once"
)
UNSCALED_FISHER = (
    "its Gauss-Newton matrix is the empirical Fisher, summed over rows and divided by parameters times (batches - 1)"
)
WRONG = {
    "dattri.arnoldi": "takes square roots of negative eigenvalues",
    "dattri.cg_batched": "adds up one inverse for each batch",
    "dattri.ekfac": "eigenvectors transposed, and each layer's bias laid among its weights; on W1 it is grad-dot",
    "dattri.graddot": "projected at random to 512 numbers, which cannot be turned off",
    "dattri.lissa": "its damping is multiplied by its scale, 50",
    "pydvl.cg_gn": BATCH_WEIGHTS,
    "pydvl.cg_loop": "norms along the wrong axis decide when it stops; queries beyond the parameters' number get zeros",
    "pydvl.direct_gn": UNSCALED_FISHER,
    "pydvl.direct_gn_last": UNSCALED_FISHER,
    "pydvl.ekfac": SUMMED_FISHER,
    "pydvl.kfac": SUMMED_FISHER,
    "pydvl.nystroem_gn": BATCH_WEIGHTS,
}
TOO_WIDE = "gradients of rank 31 as 512 numbers or more: the inverse, in float32, is noise"
WRONG_ON = {
    "W4": {
        "trak.trak512": TOO_WIDE,
        "trak.trak2048": TOO_WIDE,
        "dattri.trak": "this driver's log(1 - p), in float32, has no sensible gradient where p rounds to 1",
    }
}


def known_fault(workload: str, item: str) -> str | None:
    """Why a peer's scores are not what the method means, if they are known not to be."""
    name = item.partition("@")[0]
    return WRONG.get(name) or WRONG_ON.get(workload, {}).get(name)


@dataclass(frozen=True)
class Measurement:
    """What one method cost, one entry per round."""

    item: str  # peer.method, or peer.method@option=value
    fit: tuple[float, ...]  # CPU seconds
    score: tuple[float, ...]  # CPU seconds
    peak: float  # MB, the highest of all rounds
    scores: np.ndarray  # [train, query]
    fault: str | None  # why no ratio is taken to this item, if none is
    repeats: int  # in one process, the cold one included; the fewest of all rounds
    first: tuple[float, ...]  # CPU seconds of the process beyond importing torch, until its first scores
    floor: tuple[float, ...] | None  # CPU seconds of fit and score, where it is known
    torch: str  # its version

    @property
    def total(self) -> np.ndarray:
        """CPU seconds of fit and score, per round."""
        return np.add(self.fit, self.score)

    @property
    def cost(self) -> float:
        """CPU seconds of fit and score, the median over rounds."""
        return float(np.median(self.total))

    @property
    def times_floor(self) -> str:
        return "" if self.floor is None else f"{np.median(self.total / np.asarray(self.floor)):.3g}"

    def times_faster(self, other: "Measurement") -> float:
        return float(np.median(other.total / np.maximum(self.total, 1e-3)))

    def times_sooner(self, other: "Measurement") -> float:
        """By first scores."""
        return float(np.median(np.asarray(other.first) / np.maximum(self.first, 1e-3)))


@dataclass(frozen=True)
class Bench:
    """Where the drivers are, and how long they may run."""

    python: str  # has the peers
    own_python: str  # has what headwater needs
    peerbench: Path
    rounds: int
    budget: float  # wall seconds after which a process begins no further repeat
    limit: float  # CPU seconds for one process
    memory: float  # GiB of address space for one process

    def bound(self) -> None:
        """In a driver's process: one that wants too much ends there, and takes nothing else with it."""
        resource.setrlimit(resource.RLIMIT_AS, (int(self.memory * 2**30),) * 2)
        resource.setrlimit(resource.RLIMIT_CPU, (int(self.limit), int(self.limit) + 10))


def drive(bench: Bench, workload: str, item: str, out: Path) -> dict:
    """Run one driver in a process of its own; return the JSON line it prints, or one that says why there is none."""
    name, _, option = item.partition("@")
    peer, _, method = name.partition(".")
    folder = HERE if (HERE / f"peer_{peer}.py").is_file() else bench.peerbench
    python = bench.own_python if peer == "headwater" else bench.python
    command = [python, str(HERE / "first_scores.py"), *(["--more"] if workload in LARGER else [])]
    command.append(str(folder / f"peer_{peer}.py"))
    command += ["--workload", workload, "--method", method]
    command += ["--out", str(out), "--repeats", str(REPEATS[workload]), "--budget", str(bench.budget)]
    for setting in filter(None, option.split(",")):
        key, _, value = setting.partition("=")
        command += [f"--{key}", value]
    too_long = {"ok": False, "error": f"not done after {bench.limit:.0f} CPU s"}
    try:
        ended = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=4 * bench.limit,  # for one that waits and does not work
            cwd=out.parent,
            env=one_thread(bench.peerbench),
            preexec_fn=bench.bound,
        )
    except subprocess.TimeoutExpired:
        return too_long
    if -ended.returncode in (signal.SIGXCPU, signal.SIGKILL):
        return too_long
    row, first = said(ended.stdout, "JSON "), said(ended.stdout, "FIRST ")
    if row is not None:
        return row | {"first_cpu_s": first}
    last = ended.stderr.strip().splitlines()[-1:] or [f"exit status {ended.returncode}"]
    return {"ok": False, "error": last[0]}


def said(output: str, word: str) -> Any:
    """What the last line that begins with this word has in JSON; None where there is none."""
    lines = [line.removeprefix(word) for line in output.splitlines() if line.startswith(word)]
    return json.loads(lines[-1]) if lines else None


def ask_floors(bench: Bench, workload: str) -> Floors | None:
    """Counted and measured in a process of its own; None, and why on stderr, where that fails."""
    ended = subprocess.run(
        [bench.own_python, str(HERE / "floors.py"), workload],
        capture_output=True,
        text=True,
        env=one_thread(bench.peerbench),
    )
    row = said(ended.stdout, "JSON ")
    if row is None:
        print(f"{workload}: no floors: {ended.stderr.strip()[-300:]}", file=sys.stderr, flush=True)
        return None
    return Floors.of(row)


def measure(bench: Bench, workload: str, items: list[str]) -> tuple[list[Measurement], dict[str, str]]:
    """All items, round after round. Returns what was measured, and for each item that failed the reason."""
    rows: dict[str, list[dict]] = {item: [] for item in items}
    failed: dict[str, str] = {}
    floors: list[Floors | None] = []
    if workload in LARGER:
        subprocess.run([bench.own_python, str(HERE / "more.py"), workload], check=True)
    with tempfile.TemporaryDirectory() as folder:
        out = {item: Path(folder) / f"{item}.npy" for item in items}
        for turn in range(bench.rounds):
            floors.append(None if workload in LARGER else ask_floors(bench, workload))
            for item in items:
                if item in failed:
                    continue
                row = drive(bench, workload, item, out[item])
                if not row["ok"]:
                    failed[item] = row["error"]
                    print(f"{workload} {item}: {row['error']}", file=sys.stderr, flush=True)
                else:
                    rows[item].append(row)
                    cost = f"fit {row['fit_cpu_s']:.3f} score {row['score_cpu_s']:.3f} CPU s"
                    print(f"{workload} round {turn + 1} {item}: {cost}", file=sys.stderr, flush=True)
        done = [item for item in items if item not in failed]
        return [summary(workload, item, rows[item], np.load(out[item]), floors) for item in done], failed


def summary(workload: str, item: str, rows: list[dict], scores: np.ndarray, floors: list[Floors | None]) -> Measurement:
    fit, score, first = (tuple(row[key] for row in rows) for key in ("fit_cpu_s", "score_cpu_s", "first_cpu_s"))
    known = [None if each is None else each.seconds(item) for each in floors]
    floor = None if None in known else tuple(known)
    peak, repeats = max(row["peak_rss_mb"] for row in rows), min(row["n_rep"] for row in rows)
    lost = int((~np.isfinite(scores).all(0)).sum())
    not_finite = f"scores of {lost} of {scores.shape[1]} queries are not finite" if lost else None
    reasons = [reason for reason in (known_fault(workload, item), not_finite) if reason]
    fault = "; ".join(reasons) or None
    return Measurement(item, fit, score, peak, scores, fault, repeats, first, floor, rows[0]["torch"])


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks along the first axis, ties sharing their mean rank."""
    out = np.empty(values.shape)
    for column in range(values.shape[1]):
        _, place, count = np.unique(values[:, column], return_inverse=True, return_counts=True)
        out[:, column] = (np.cumsum(count) - (count - 1) / 2)[place]
    return out


def pearson(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Correlation of each column of `a` with the same column of `b`; NaN where a column is constant."""
    a, b = (values - values.mean(0) for values in (a.astype(float), b.astype(float)))
    with np.errstate(invalid="ignore"):
        return (a * b).sum(0) / np.sqrt((a * a).sum(0) * (b * b).sum(0))


def spearman(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Rank correlation of each column of `a` with the same column of `b`; NaN where a column is constant."""
    return pearson(ranks(a), ranks(b))


def mean_of_known(values: np.ndarray) -> float:
    """Mean without NaN; NaN where there is nothing else."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def told(values: np.ndarray) -> str:
    """The mean over queries, and over how many where it is not defined for all."""
    known = int((~np.isnan(values)).sum())
    return f"{mean_of_known(values):.3f}" + (f" ({known} of {len(values)})" if known < len(values) else "")


def linear_datamodeling_score(scores: np.ndarray, truth: dict[str, np.ndarray]) -> np.ndarray:
    """The rank correlation, over retrained subsets, of summed scores and minus the query's loss: [query].

    Shapes: scores [train, query]; truth["masks"] [subset, train]; truth["loss"] [subset, seed, query].
    """
    predicted = truth["masks"].astype(float) @ scores.astype(float)
    return spearman(predicted, -truth["loss"].mean(1))


def leave_one_out_correlation(scores: np.ndarray, truth: dict[str, np.ndarray]) -> np.ndarray:
    """The correlation, over train rows, of score / n_train and the query's loss gained without the row: [query].

    Shapes: scores [train, query]; truth["loo"] [train, query].
    """
    return pearson(scores / len(scores), truth["loo"])


def counterparts(item: str) -> list[str]:
    """The peers' items that this item of headwater is measured against, with the same options."""
    name, at, option = item.partition("@")
    peer, _, method = name.partition(".")
    return [other + at + option for other in COUNTERPART.get(method, ())] if peer == "headwater" else []


def seconds(values: Iterable[float]) -> str:
    return f"{statistics.median(values):.3g}"


def quality(m: Measurement, truth: dict[str, np.ndarray] | None) -> list[str]:
    """Against retrained models: LDS, and the correlation with leave-one-out where that is known."""
    if truth is None or m.scores.shape != (truth["masks"].shape[1], truth["loss"].shape[2]):
        return ["", ""]
    finite = np.where(np.isfinite(m.scores).all(0), m.scores, np.nan)
    lds = told(linear_datamodeling_score(finite, truth))
    return [lds, told(leave_one_out_correlation(finite, truth)) if "loo" in truth else ""]


def comparison(m: Measurement, by_item: dict[str, Measurement]) -> list[str]:
    """Speed warm and cold, memory, agreement beside each peer that computes the same rightly; the fastest first."""
    peers = [by_item[item] for item in counterparts(m.item) if item in by_item]
    against = sorted((c for c in peers if c.fault is None), key=lambda c: c.cost)
    speed = (f"{c.item} {m.times_faster(c):.3g}" for c in against)
    sooner = (f"{m.times_sooner(c):.3g}" for c in against)
    memory = (f"{m.peak / c.peak:.2f}" for c in against)
    agreement = (f"{mean_of_known(spearman(m.scores, c.scores)):.4f}" for c in against)
    return ["; ".join(values) for values in (speed, sooner, memory, agreement)]


HEADINGS = [
    *("method", "times the speed of", "first scores: times", "times its floor", "times its memory"),
    *("Spearman with it", "fit, CPU s", "score, CPU s", "total: least - most", "warm repeats", "first scores, CPU s"),
    *("peak MB", "LDS", "LOO Pearson"),
]


def table(measured: list[Measurement], failed: dict[str, str], truth: dict[str, np.ndarray] | None) -> str:
    """Markdown: cost, how true the scores are where truth is known, and headwater beside the peers' same method."""
    by_item = {m.item: m for m in measured}
    rows = []
    for m in measured:
        spread = f"{m.total.min():.3g} - {m.total.max():.3g}"
        repeats = str(m.repeats - 1) if m.repeats > 1 else "none: 1 repeat"
        cost = [seconds(m.fit), seconds(m.score), spread, repeats, seconds(m.first), f"{m.peak:.0f}"]
        name = m.item if m.fault is None else f"{m.item} (wrong)"
        speed, sooner, *like = comparison(m, by_item)
        rows.append([name, speed, sooner, m.times_floor, *like, *cost, *quality(m, truth)])
    kept = [k for k in range(len(HEADINGS)) if k == 0 or any(row[k] for row in rows)]
    lines = [[HEADINGS[k] for k in kept], ["---"] * len(kept), *([row[k] for k in kept] for row in rows)]
    out = ["| " + " | ".join(line) + " |" for line in lines]
    out += [f"| {item} | failed: {reason} |" for item, reason in failed.items()]
    wrong = [f"- {m.item}: {m.fault}." for m in measured if m.fault is not None]
    versions = {m.torch: m.item.partition(".")[0] for m in reversed(measured)}
    if len(versions) > 1:
        said_so = ", ".join(f"{version} ({peer})" for version, peer in versions.items())
        out += ["", f"Not all ran with one build of torch; that is part of the ratios, too: {said_so}."]
    return "\n".join([*out, *(["", "Wrong, and so left out of the ratios:", "", *wrong] if wrong else [])])


def load_truth(peerbench: Path, workload: str) -> dict[str, np.ndarray] | None:
    file = peerbench / "data" / f"{workload}_truth.npz"
    return dict(np.load(file)) if file.is_file() else None


def families(workloads: list[str]) -> list[str]:
    """The names of the families that these workloads' plans have."""
    return list(dict.fromkeys(family for workload in workloads for family in PLAN[workload]))


def chosen_items(given: argparse.Namespace, workload: str) -> list[str]:
    """What is run on a workload: what was asked for, else its plan; each item once."""
    plan = PLAN[workload]
    names = given.only or [item for family in given.family or plan for item in plan.get(family, ())]
    kept = (item for item in names if not (given.without_headwater and item.startswith("headwater.")))
    return list(dict.fromkeys(kept))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "workloads", nargs="*", default=["W1"], metavar="WORKLOAD", help=", ".join(PLAN) + "; default W1"
    )
    parser.add_argument("--peers", help="folder of the peers' drivers")
    parser.add_argument("--python", help="a Python that has the peers installed")
    parser.add_argument("--own-python", default=sys.executable, help="a Python that has what headwater needs (this)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds over all methods (3)")
    parser.add_argument("--budget", type=float, default=150.0, help="wall seconds that begin no further repeat (150)")
    parser.add_argument("--limit", type=float, default=600.0, help="CPU seconds for one process (600)")
    parser.add_argument("--memory", type=float, default=12.0, help="GiB of address space for one process (12)")
    parser.add_argument("--family", nargs="+", help="these families of the plan: " + ", ".join(families(list(PLAN))))
    parser.add_argument("--only", nargs="+", metavar="PEER.METHOD", help="these methods instead of the plan")
    parser.add_argument("--without-headwater", action="store_true", help="the peers alone")
    given = parser.parse_args()
    unknown = [w for w in given.workloads if w not in PLAN]
    if unknown:
        parser.error(f"unknown workload {unknown[0]}: choose from {', '.join(PLAN)}")
    known = families(given.workloads)
    unknown = [family for family in given.family or () if family not in known]
    if unknown:
        parser.error(f"unknown family {unknown[0]}: choose from {', '.join(known)}")
    return given


def main() -> int:
    given = arguments()
    python = peer_python(given.python)
    folder = peerbench_folder(given.peers)
    bench = Bench(python, given.own_python, folder, given.rounds, given.budget, given.limit, given.memory)
    print(f"{datetime.date.today()}, {os.cpu_count()}-core {platform.machine()}, one thread, {given.rounds} rounds")
    any_failed = False
    for workload in given.workloads:
        measured, failed = measure(bench, workload, chosen_items(given, workload))
        print(f"\n### {workload}\n\n{table(measured, failed, load_truth(folder, workload))}", flush=True)
        any_failed |= bool(failed)
    return int(any_failed)


if __name__ == "__main__":
    sys.exit(main())
