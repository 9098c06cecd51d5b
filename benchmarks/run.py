"""Time headwater beside its peers in one run, and print a table for each workload.

    python benchmarks/run.py W1 W3                          every method of the plan
    python benchmarks/run.py W1 --only headwater.ekfac kronfluence.ekfac
    python benchmarks/run.py W1 --peers FOLDER --python PEER_PYTHON --rounds 5

Every driver runs in its own process on one thread, in rounds (A B C, A B C, ...), so that a machine that slows down
slows all of them. Within a process the first repeat is a warm-up and is dropped. Figures are medians over rounds;
a ratio is taken within each round first. CPU seconds are those of the process, not of the wall.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from peers import one_thread, peer_python, peerbench_folder

HERE = Path(__file__).resolve().parent
ROW_WISE = [
    *("kronfluence.identity", "captum.tracin_sw", "headwater.graddot"),
    *("kronfluence.kfac", "headwater.kfac", "headwater.kfac_factored"),
    *("kronfluence.ekfac", "headwater.ekfac", "headwater.ekfac_r4", "headwater.ekfac_r16"),
    "headwater.ekfac_all_labels",
    *("kronfluence.ekfac@damping=none", "headwater.ekfac_rel"),
]
SEQUENCES = [
    *("kronfluence.identity", "captum.tracin_sw", "headwater.graddot"),
    *("kronfluence.ekfac", "headwater.ekfac", "headwater.ekfac_r4"),
]
PLAN = {"W1": ROW_WISE, "W3": SEQUENCES}
REPEATS = {"W1": 4, "W3": 2}  # in one process, the warm-up included

# What each method of headwater is measured against. No peer has separable EKFAC or factored damping.
COUNTERPART = {
    "graddot": ("kronfluence.identity", "captum.tracin_sw"),
    "kfac": ("kronfluence.kfac",),
    "kfac_factored": ("kronfluence.kfac",),
    "ekfac": ("kronfluence.ekfac",),
    "ekfac_r4": ("kronfluence.ekfac",),
    "ekfac_r16": ("kronfluence.ekfac",),
    "ekfac_all_labels": ("kronfluence.ekfac",),
    "ekfac_rel": ("kronfluence.ekfac@damping=none",),
}


@dataclass(frozen=True)
class Measurement:
    """What one method cost, one entry per round."""

    item: str  # peer.method, or peer.method@option=value
    fit: tuple[float, ...]  # CPU seconds
    score: tuple[float, ...]  # CPU seconds
    peak: float  # MB, the highest of all rounds
    scores: np.ndarray  # [train, query]

    @property
    def total(self) -> np.ndarray:
        """CPU seconds of fit and score, per round."""
        return np.add(self.fit, self.score)


def drive(workload: str, item: str, python: str, peerbench: Path, out: Path, repeats: int, limit: float) -> dict:
    """Run one driver in a process of its own; return the JSON line it prints, or one that says why there is none."""
    name, _, option = item.partition("@")
    peer, _, method = name.partition(".")
    folder = HERE if peer == "headwater" else peerbench
    command = [python, str(folder / f"peer_{peer}.py"), "--workload", workload, "--method", method]
    command += ["--out", str(out), "--repeats", str(repeats), "--budget", str(limit)]
    for setting in filter(None, option.split(",")):
        key, _, value = setting.partition("=")
        command += [f"--{key}", value]
    try:
        ended = subprocess.run(
            command, capture_output=True, text=True, timeout=limit, cwd=out.parent, env=one_thread(peerbench)
        )
    except subprocess.TimeoutExpired:
        return {"ok": False, "error": f"not done after {limit:.0f} s"}
    lines = [line[5:] for line in ended.stdout.splitlines() if line.startswith("JSON ")]
    if lines:
        return json.loads(lines[-1])
    last = ended.stderr.strip().splitlines()[-1:] or [f"exit status {ended.returncode}"]
    return {"ok": False, "error": last[0]}


def measure(workload, items, python, peerbench, rounds, repeats, limit) -> tuple[list[Measurement], dict[str, str]]:
    """All items, round after round. Returns what was measured, and for each item that failed the reason."""
    rows: dict[str, list[dict]] = {item: [] for item in items}
    failed: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        out = {item: Path(folder) / f"{item}.npy" for item in items}
        for turn in range(rounds):
            for item in items:
                if item in failed:
                    continue
                row = drive(workload, item, python, peerbench, out[item], repeats, limit)
                if not row["ok"]:
                    failed[item] = row["error"]
                    print(f"{workload} {item}: {row['error']}", file=sys.stderr, flush=True)
                elif row["n_rep"] < repeats:
                    failed[item] = f"{row['n_rep']} of {repeats} repeats within {limit:.0f} s: raise --limit"
                else:
                    rows[item].append(row)
                    cost = f"fit {row['fit_cpu_s']:.3f} score {row['score_cpu_s']:.3f} CPU s"
                    print(f"{workload} round {turn + 1} {item}: {cost}", file=sys.stderr, flush=True)
        done = [item for item in items if item not in failed]
        return [summary(item, rows[item], np.load(out[item])) for item in done], failed


def summary(item: str, rows: list[dict], scores: np.ndarray) -> Measurement:
    fit, score = (tuple(row[key] for row in rows) for key in ("fit_cpu_s", "score_cpu_s"))
    return Measurement(item, fit, score, max(row["peak_rss_mb"] for row in rows), scores)


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks along the first axis, ties sharing their mean rank."""
    out = np.empty(values.shape)
    for column in range(values.shape[1]):
        _, place, count = np.unique(values[:, column], return_inverse=True, return_counts=True)
        out[:, column] = (np.cumsum(count) - (count - 1) / 2)[place]
    return out


def spearman(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Rank correlation of each column of `a` with the same column of `b`; NaN where a column is constant."""
    a, b = (values - values.mean(0) for values in (ranks(a), ranks(b)))
    with np.errstate(invalid="ignore"):
        return (a * b).sum(0) / np.sqrt((a * a).sum(0) * (b * b).sum(0))


def linear_datamodeling_score(scores: np.ndarray, truth: dict[str, np.ndarray]) -> float:
    """Mean over queries of the rank correlation, over retrained subsets, of summed scores and minus the query's loss.

    Shapes: scores [train, query]; truth["masks"] [subset, train]; truth["loss"] [subset, seed, query].
    """
    predicted = truth["masks"].astype(float) @ scores.astype(float)
    return float(np.nanmean(spearman(predicted, -truth["loss"].mean(1))))


def counterparts(item: str) -> list[str]:
    """The peers' items that this item of headwater is measured against, with the same options."""
    name, at, option = item.partition("@")
    peer, _, method = name.partition(".")
    return [other + at + option for other in COUNTERPART.get(method, ())] if peer == "headwater" else []


def seconds(values: Iterable[float]) -> str:
    return f"{statistics.median(values):.3g}"


def table(measured: list[Measurement], failed: dict[str, str], truth: dict[str, np.ndarray] | None) -> str:
    """Markdown: cost, LDS where truth is known, and headwater against the peers' same method."""
    by_item = {m.item: m for m in measured}
    lines = [
        "| method | fit, CPU s | score, CPU s | total: least - most | peak MB | LDS | times the speed of | Spearman |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for m in measured:
        known = truth is not None and m.scores.shape == (truth["masks"].shape[1], truth["loss"].shape[2])
        quality = f"{linear_datamodeling_score(m.scores, truth):.3f}" if known else ""
        against = [by_item[item] for item in counterparts(m.item) if item in by_item]
        ratios = "; ".join(f"{c.item} {np.median(c.total / np.maximum(m.total, 1e-3)):.3g}" for c in against)
        agreement = "; ".join(f"{np.nanmean(spearman(m.scores, c.scores)):.4f}" for c in against)
        spread = f"{m.total.min():.3g} - {m.total.max():.3g}"
        cells = [m.item, seconds(m.fit), seconds(m.score), spread, f"{m.peak:.0f}", quality, ratios, agreement]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [f"| {item} | failed: {reason} |" for item, reason in failed.items()]
    return "\n".join(lines)


def load_truth(peerbench: Path, workload: str) -> dict[str, np.ndarray] | None:
    file = peerbench / "data" / f"{workload}_truth.npz"
    return dict(np.load(file)) if file.is_file() else None


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workloads", nargs="*", default=["W1"], metavar="WORKLOAD", help="W1 (default), W3")
    parser.add_argument("--peers", help="folder of the peers' drivers")
    parser.add_argument("--python", help="a Python that has the peers installed")
    parser.add_argument("--rounds", type=int, default=3, help="rounds over all methods (3)")
    parser.add_argument("--limit", type=float, default=900.0, help="wall seconds for one process (900)")
    parser.add_argument("--only", nargs="+", metavar="PEER.METHOD", help="these methods instead of the plan")
    given = parser.parse_args()
    unknown = [w for w in given.workloads if w not in PLAN]
    if unknown:
        parser.error(f"unknown workload {unknown[0]}: choose from {', '.join(PLAN)}")
    return given


def main() -> int:
    given = arguments()
    peerbench, python = peerbench_folder(given.peers), peer_python(given.python)
    print(f"{datetime.date.today()}, {os.cpu_count()}-core {platform.machine()}, one thread, {given.rounds} rounds")
    any_failed = False
    for workload in given.workloads:
        items = given.only or PLAN[workload]
        repeats = REPEATS[workload]
        measured, failed = measure(workload, items, python, peerbench, given.rounds, repeats, given.limit)
        print(f"\n### {workload}\n\n{table(measured, failed, load_truth(peerbench, workload))}", flush=True)
        any_failed |= bool(failed)
    return int(any_failed)


if __name__ == "__main__":
    sys.exit(main())
