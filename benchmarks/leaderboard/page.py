"""docs/leaderboard.md, of what `run.py` found."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from run import LOGISTIC, OURS, SELECTION, Entry, entries
from tasks import TASKS, bank

from headwater.evaluate.calibration import FLAT
from headwater.evaluate.checks import effective_runs
from headwater.evaluate.lds import Interval, Lds, ceiling, difference, lds

RESAMPLES, PAIRED = 60, 200
"""Of the subsets, for the interval of each row, and for that of each difference in the summary."""

HEAD = (Path(__file__).parent / "head.md").read_text()
AT_A_MINIMUM = (
    "The model is at its minimum, so that every library's exact inverse there is the same operator. What is left is "
    "the damping, and that of the peers is chosen in hindsight."
)


@dataclass(frozen=True)
class Row:
    """A line of a task's table."""

    entry: Entry
    found: dict[str, Any]
    scores: np.ndarray
    value: Lds
    tried: int = 1
    """Dampings of which this is the best in hindsight."""

    @property
    def ours(self) -> bool:
        return self.entry.library == "headwater"

    @property
    def half_weight(self) -> bool:
        return self.ours and OURS[self.entry.method].half_weight


@dataclass(frozen=True)
class Board:
    """What is known of a task."""

    task: str
    keep: np.ndarray
    outputs: np.ndarray
    rows: list[Row]
    failed: list[tuple[Entry, str]]
    pending: list[Entry]
    """Not measured yet."""
    ceiling: float | None
    """Of the whole bank, as its first subsets are those that were run twice."""

    def best(self, *, ours: bool, half_weight: bool = False) -> Row | None:
        """At the weights that were given, or at those where every row counts one half."""
        others = ("baseline", "retraining")
        wanted = [row for row in self.rows if row.ours == ours and row.entry.library not in others]
        wanted = [row for row in wanted if row.half_weight == half_weight]
        return max(wanted, key=lambda row: row.value.raw.value, default=None)


def raw(scores: np.ndarray, keep: np.ndarray, outputs: np.ndarray) -> float:
    return lds(scores, keep, outputs, resamples=0).raw.value


def board(task: str, out: Path) -> Board | None:
    """Of peers' several dampings the best; of all, their LDS on the subsets that chose nothing.

    None where nothing was measured: the task's rows are then not read."""
    groups: dict[tuple[str, str], list[tuple[Entry, dict, np.ndarray]]] = {}
    failed, pending = [], []
    for entry in entries(task):
        file = out / f"{entry.name}.json"
        if not file.exists():
            pending.append(entry)
            continue
        found = json.loads(file.read_text())
        if "failed" in found:
            failed.append((entry, found["failed"]))
            continue
        scores = np.load(file.with_suffix(".npy"))
        if not np.isfinite(scores).all():
            failed.append((entry, f"{int((~np.isfinite(scores)).sum())} scores are not finite"))
            continue
        groups.setdefault((entry.library, entry.method), []).append((entry, found, scores))
    if not groups:
        return None
    known = bank(TASKS[task])
    keep, outputs = (values[SELECTION:] for values in known)
    rows = []
    for group in groups.values():
        entry, found, scores = max(group, key=lambda item: raw(item[2], keep, outputs))
        rows.append(Row(entry, found, scores, lds(scores, keep, outputs, resamples=RESAMPLES), len(group)))
    rows.sort(key=lambda row: -row.value.raw.value)
    return Board(task, keep, outputs, rows, failed, pending, ceiling(known.outputs, runs=effective_runs(outputs)))


def write_page(out: Path, file: Path) -> None:
    boards = [found for task in TASKS if (found := board(task, out)) is not None]
    parts = [HEAD, summary(boards)]
    parts += [section(found) for found in boards]
    file.write_text("\n".join(parts))


def shown(value: Interval) -> str:
    return f"{value.value:.3f} ({value.low:.3f} - {value.high:.3f})"


def table(headings: list[str], lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [headings, ["---"] * len(headings), *lines]) + "\n"


def named(row: Row) -> str:
    return f"{row.entry.library} {row.entry.method}" if not row.ours else row.entry.method


def summary(boards: list[Board]) -> str:
    lines, notes = [], []
    for found, half_weight in ((board, half_weight) for board in boards for half_weight in (False, True)):
        mine, theirs = found.best(ours=True, half_weight=half_weight), found.best(ours=False)
        if mine is None or theirs is None:
            continue
        gap = difference(mine.scores, theirs.scores, found.keep, found.outputs, resamples=PAIRED)
        lines.append(
            [
                found.task + (", half-weight optimum" if half_weight else ""),
                "exact" if found.ceiling is None else f"{found.ceiling:.3f}",
                f"{mine.entry.method}: {mine.value.raw.value:.3f}",
                f"{named(theirs)}, damping {theirs.entry.damping or 0:g}: {theirs.value.raw.value:.3f}",
                f"{signed(gap.value)} ({signed(gap.low)} to {signed(gap.high)})",
                "yes" if gap.low > 0 else "**no**",
                regret(mine),
            ]
        )
        if gap.low <= 0:
            why = AT_A_MINIMUM if found.task in LOGISTIC else ""
            notes.append(f"**{found.task}**: not significantly above the best peer. {why}\n")
    headings = [
        "task",
        "ceiling",
        "our best",
        "peers' best, in hindsight",
        "difference",
        "significant",
        "lost by calibration",
    ]
    text = "\n## In short\n\n" + table(headings, lines)
    return text + "".join("\n" + note for note in [*notes, calibrated(boards)])


def calibrated(boards: list[Board]) -> str:
    """How often ten models were enough, and where they were not."""
    tried = [(lost(row), f"{row.entry.method} on {board.task}") for board in boards for row in board.rows]
    known = [(value, name) for value, name in tried if value is not None]
    missed = sorted(((value, name) for value, name in known if value > FLAT), reverse=True)
    text = (
        f"**Calibration**: ten retrained models choose a damping within {FLAT} LDS of the best on its path for "
        f"{len(known) - len(missed)} of {len(known)} pairs of a method and a task"
    )
    if not missed:
        return text + ".\n"
    named = "; ".join(f"{name} loses {value:.3f}" for value, name in missed)
    return f"{text}. Elsewhere the ten subsets happen to put dampings in another order than the rest does: {named}.\n"


def lost(row: Row) -> float | None:
    """How much LDS the calibration left on the path; None where nothing was calibrated."""
    known = row.found.get("hindsight")
    if not known:
        return None
    return max(value for value in known.values() if np.isfinite(value)) - row.value.raw.value


def regret(row: Row) -> str:
    value = lost(row)
    return "" if value is None else signed(value)


def signed(value: float) -> str:
    """Three decimals; what rounds to zero has no sign."""
    return f"{round(value, 3) + 0.0:+.3f}"


def at_default(row: Row) -> str:
    """LDS at the damping of the path that is nearest to the method's default."""
    known = {float(amount): value for amount, value in row.found.get("hindsight", {}).items() if np.isfinite(value)}
    if not known:
        return ""
    default = OURS[row.entry.method].make(TASKS[row.entry.task]).default_damping.factor
    return f"{known[min(known, key=lambda amount: abs(np.log(amount / default)))]:.3f}"


def section(found: Board) -> str:
    task = TASKS[found.task]
    first = found.rows[0].value
    lines = []
    for row in found.rows:
        lines.append(
            [
                row.entry.method,
                f"**{row.entry.library}**" if row.ours else row.entry.library,
                damping(row),
                shown(row.value.raw),
                "" if not found.ceiling else f"{row.value.raw.value / found.ceiling:.3f}",
                at_default(row),
                regret(row),
                " + ".join(seconds(row.found["cost"].get(part, 0)) for part in ("fit", "score")),
                seconds(row.found["cost"]["calibrate"]) if "calibrate" in row.found["cost"] else "",
                f"{row.found['peak']:.0f}" if "peak" in row.found else "",
            ]
        )
    headings = [
        *("method", "library", "damping", "LDS", "corrected", "at default", "lost", "fit + score, CPU s"),
        *("calibration", "MB"),
    ]
    noise = "no noise" if found.ceiling is None else f"ceiling {found.ceiling:.3f}"
    text = f"\n## {found.task}\n\n{task.title[0].upper()}{task.title[1:]}.\n"
    text += f"{first.subsets} subsets, alpha {first.alpha:.2g}, {noise}.\n\n"
    text += table(headings, lines)
    if found.failed:
        said = {f"{named_entry(entry)} ({why})" for entry, why in found.failed}
        text += "\nNo scores: " + "; ".join(sorted(said)) + ".\n"
    if found.pending:
        names = {named_entry(entry): None for entry in found.pending}
        text += "\nNot measured yet: " + "; ".join(names) + ".\n"
    evidence = [row for row in found.rows if row.found.get("evidence")]
    if evidence and found.task not in LOGISTIC:
        amounts = (
            f"{row.entry.method} {geometric(row.found['evidence']):.2g} (calibrated: {row.found['chosen']:.2g})"
            for row in evidence[:3]
        )
        text += "\nWithout retraining, the evidence would choose, in mean eigenvalues: " + ", ".join(amounts) + ".\n"
    return text


def named_entry(entry: Entry) -> str:
    return f"{entry.library} {entry.method}" + ("" if entry.damping is None else f" at {entry.damping:g}")


def seconds(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


def geometric(amounts: dict[str, float]) -> float:
    return float(np.exp(np.mean(np.log(list(amounts.values())))))


def damping(row: Row) -> str:
    if "chosen" in row.found:
        low, high = row.found["plateau"]
        return f"{row.found['chosen']:.2g} x mean ({low:.2g} - {high:.2g})"
    if row.ours and OURS[row.entry.method].at_l2:
        return "l2"
    if row.half_weight:
        return "l2 / share"
    if row.entry.damping is not None:
        return f"{row.entry.damping:g}, best of {row.tried}"
    return ""
