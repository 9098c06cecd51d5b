"""What to trust: each thing that is known about the scores as a verdict in plain words, with its figures.

to know         what the numbers are
fine            nothing that was looked at speaks against it
careful         it can be used, knowing what is said there
do not trust    the number says something else than what it seems to say
not checked     nobody asked; how to ask stands beside it
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np

from headwater.errors import InvalidInput
from headwater.evaluate.audited import Audit
from headwater.evaluate.calibration import Calibration
from headwater.evaluate.lds import Lds
from headwater.evaluate.verification import RANKS, RANKS_LOST, Verification
from headwater.report.figures import Condition, Curve, Curves, Dots, Figure
from headwater.report.text import number
from headwater.store.diagnosis import Diagnosis
from headwater.store.score_matrix import ScoreMatrix

Check: TypeAlias = Verification | Audit | Calibration | Diagnosis | Lds

WORDS = {
    "told": ("to know", "\N{BULLET}"),
    "good": ("fine", "\N{CHECK MARK}"),
    "careful": ("careful", "!"),
    "bad": ("do not trust", "\N{MULTIPLICATION X}"),
    "unknown": ("not checked", "\N{EN DASH}"),
}
SOLVED, UNSOLVED = 0.01, 0.1
"""Relative residual up to which a solve is fine, and above which its scores are not those asked for."""
COVERED = 0.95
"""Share of the parameters from which on what is left out is little."""
FORECASTS = 0.1
"""Held-out LDS below which a damping forecasts about nothing."""


@dataclass(frozen=True)
class Verdict:
    """One thing to know: a word, a sentence or two, and what shows it."""

    kind: str
    """A key of WORDS."""
    title: str
    said: str
    figures: Sequence[Figure] = ()
    ask: str = ""
    """The call that finds out, where nobody did."""
    brief: str = ""
    """What is wrong, in a few words, where something is."""
    table: str = ""
    """As printed in a terminal."""
    table_name: str = field(default="All figures")

    @property
    def word(self) -> str:
        return WORDS[self.kind][0]

    @property
    def mark(self) -> str:
        return WORDS[self.kind][1]


def verdicts(scores: ScoreMatrix, checks: Sequence[Check], details: str = "") -> list[Verdict]:
    """In the order in which a reader asks. Errors: InvalidInput for a check of another kind."""
    for check in checks:
        if not isinstance(check, Check):
            raise InvalidInput(
                f"checks has a {type(check).__name__}; expected what verify, audit, diagnose, calibrate and lds give "
                "(of calibrate: influence.calibration)."
            )
    verification = next((c for c in checks if isinstance(c, Verification)), None)
    audit = next((c for c in checks if isinstance(c, Audit)), None)
    diagnosis = next((c for c in checks if isinstance(c, Diagnosis)), scores.diagnosis)
    calibration = next((c for c in checks if isinstance(c, Calibration)), scores.calibration)
    return [
        _method(scores, details),
        _diagnosed(diagnosis),
        _damped(scores, calibration),
        _judged(next((c for c in checks if isinstance(c, Lds)), None)),
        _verified(verification),
        _audited(audit, verification),
        *_coverage(scores),
        *_solved(scores),
    ]


def warning(found: Sequence[Verdict]) -> tuple[str, str, str] | None:
    """Kind, head and text of what stands on top of the page; None where all is fine."""
    bad, careful = ([v.brief for v in found if v.kind == kind] for kind in ("bad", "careful"))
    if bad:
        return "bad", "Do not rely on these scores yet:", f"{'; '.join(bad)}."
    if careful:
        return "careful", "Know before you rely on these scores:", f"{'; '.join(careful)}."
    return None


def _method(scores: ScoreMatrix, details: str) -> Verdict:
    if scores.is_ranking:
        said = (
            f"The {scores.unit_in_words}. Each query's rows are ranked by it; a row whose gradient is large for every "
            "query has no advantage. Sums of directions forecast nothing: for what removing rows does, score in the "
            "unit 'removal'. "
        )
    elif scores.errors is not None:
        said = (
            f"The {scores.unit_in_words}. Measured on models that were trained again without many rows at a time, not "
            f"forecast from one; the median standard error is {np.median(scores.errors):.2g}, and that of the scores' "
            f"sizes {np.median(np.abs(scores[:])):.2g}. "
        )
    else:
        unit = "a forecast of what removing a row does" if scores.unit == "removal" else "an effect per unit of weight"
        said = (
            f"The {scores.unit_in_words}: {unit}, to first order, for one row at a time. Sums over many rows overlap, "
            "and are no forecast of removing them together. "
        )
    return Verdict(
        "told",
        "What a score is",
        f"{said}Computed by {scores.method or 'a method that is not recorded'}, for {scores.n_train:g} training rows.",
        table=details,
        table_name="The blocks",
    )


def _diagnosed(found: Diagnosis | None) -> Verdict:
    title, ask = "The model and its curvature", "influence.diagnose(train)"
    if found is None:
        return Verdict("unknown", title, "Whether the weights are a minimum, and the curvature positive.", ask=ask)
    table = str(found)
    if found.worries:
        lost = any(b.is_negative and (b.lowest_damped or 0) <= 0 for b in found.blocks.values())
        lost |= any(b.solves and b.missed / b.solves > UNSOLVED for b in found.blocks.values())
        said = " ".join(_sentence(worry) for worry in found.worries)
        count = len(found.worries)
        brief = f"{count} warning{'' if count == 1 else 's'} about the model and its curvature"
        return Verdict("bad" if lost else "careful", title, said, table=table, brief=brief)
    if found.stationarity is None and found.unknown:
        return Verdict("unknown", title, f"Not known: {'; '.join(found.unknown)}.", ask=ask, table=table)
    said = "The weights are as near to a minimum as chance allows, and no block of the curvature gives a warning."
    rest = f" Not looked at: {'; '.join(found.unknown)}." if found.unknown else ""
    return Verdict("good", title, said + rest, ask=ask if found.unknown else "", table=table)


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}" if text.endswith(".") else f"{text[:1].upper()}{text[1:]}."


def _damped(scores: ScoreMatrix, found: Calibration | None) -> Verdict:
    title = "The damping"
    amounts = sorted(scores.damping.values())
    amount = "none" if not amounts else f"{number(amounts[0], 3)}"
    if amounts and amounts[-1] != amounts[0]:
        amount = f"{number(amounts[0], 3)} to {number(amounts[-1], 3)} by block"
    if found is None:
        if not amounts:
            return Verdict("good", title, "This method damps nothing.")
        said = f"{amount}, in units of the curvature: given, or the method's default, and not measured."
        return Verdict("unknown", title, said, ask="influence.calibrate(train, query, bank)")
    said = f"{amount}, in units of the curvature; chosen from {found.source}."
    weak = found.held_out is not None and found.held_out < FORECASTS
    if found.held_out is not None:
        said += f" On models that the choice has not seen, forecasts have a rank correlation of {found.held_out:.2f}."
    if weak:
        said += " That is next to nothing: these scores hardly forecast retraining."
    if found.at_an_end:
        said += " The best value is at an end of those tried; a better one may lie beyond."
    kind = "bad" if weak else "careful" if found.at_an_end or not found.measured else "good"
    brief = (
        "their forecasts of retraining are next to nothing"
        if weak
        else "the best damping may lie beyond those tried"
        if found.at_an_end
        else "the damping was chosen without retraining"
    )
    return Verdict(kind, title, said, figures=_path(found), table=str(found), brief=brief)


def _path(found: Calibration) -> list[Figure]:
    """The LDS along the path, with the choice and the plateau."""
    pairs = [(d, v) for d, v in zip(found.path, found.measured, strict=bool(found.measured)) if np.isfinite(v)]
    if len(pairs) < 2 or pairs[0][0] <= 0:
        return []
    x, y = zip(*pairs, strict=True)
    chosen = sorted(set(found.chosen.values()))
    marks = [(value, "chosen" if len(chosen) == 1 else "") for value in chosen if x[0] <= value <= x[-1]]
    band = found.plateau if found.plateau is not None and found.plateau[1] > found.plateau[0] else None
    about = "; the shaded stretch is about as good" if band is not None else ""
    reading = f"Higher is better. {found.flatness.capitalize()}{about}."
    return [
        Curves(
            "How well each damping forecasts retraining",
            reading,
            f"damping, {found.unit}",
            "rank correlation of forecast and measurement (LDS)",
            [Curve("LDS", x, y)],
            x_form="{:g}",
            y_form="{:.2f}",
            powers=True,
            marks=marks,
            band=band,
        )
    ]


def _judged(found: Lds | None) -> Verdict:
    title = "Do they forecast retraining?"
    if found is None:
        ask = "headwater.evaluate.retrain, then lds(scores, *bank)"
        return Verdict("unknown", title, "No model was trained again to judge these scores.", ask=ask)
    raw = found.raw
    said = (
        f"On {found.subsets} models that were trained again on parts of the rows, forecast and measurement have a rank "
        f"correlation (LDS) of {raw.value:.2f}, with an interval from {raw.low:.2f} to {raw.high:.2f}."
    )
    if found.ceiling is not None:
        said += f" Retraining agrees with itself to {found.ceiling:.2f}: more cannot be had."
    kind = "bad" if raw.low <= 0 else "careful" if raw.value < FORECASTS else "good"
    chance = raw.low <= 0
    brief = f"their forecasts of retraining are {'no better than chance' if chance else 'next to nothing'}"
    return Verdict(kind, title, said, table=str(found), brief=brief)


def _verified(found: Verification | None) -> Verdict:
    title = "Computed right, on this model?"
    if found is None:
        return Verdict(
            "unknown", title, "No pair was computed again the slow, plain way.", ask="influence.verify(train, query)"
        )
    where = f"{found.queries} queries x {found.rows} training rows, drawn at random, were computed again plainly"
    if not found.passed:
        failed = ", ".join(check.name for check in found.checks if not check.passed)
        said, brief = f"{where}, and came out different: {failed}.", "they do not agree with a plain computation"
        return Verdict("bad", title, said, table=str(found), brief=brief)
    largest = found.largest_error
    off = "" if np.isnan(largest) else f", within {number(largest, 2)} of the largest score"
    skipped = sum(check.figure is None for check in found.checks)
    rest = f" {skipped} checks could not be made." if skipped else ""
    return Verdict("good", title, f"{where}, and agree{off}.{rest}", table=str(found))


def _audited(found: Audit | None, verification: Verification | None) -> Verdict:
    title = "How far from exact?"
    if found is not None:
        ranks = np.nan_to_num(found.rank_correlation, nan=-1.0)
        median, worst = float(np.median(ranks)), float(ranks.min())
        said = (
            f"On {found.audited} of {found.queries} queries the scores were also computed with the exact inverse: "
            f"the rankings agree with a median rank correlation of {median:.2f} (worst {worst:.2f}), and the {found.k} "
            f"most helpful rows are right to {float(np.median(found.overlap_helpful)):.0%}."
        )
        said += f" {found.missed} of the exact solves were not exact." if found.missed else ""
        figures = [_agreement(found)]
        return Verdict(_ranked(median), title, said, figures=figures, table=str(found), brief=RANKED)
    near = None if verification is None else verification.approximation
    if near is not None:
        median = float(np.median(np.nan_to_num(near.rank_correlations, nan=-1.0)))
        said = (
            f"On the pairs that were computed again, the exact inverse ranks rows with a correlation of {median:.2f} "
            f"to these scores; sizes are {near.relative_error:.0%} off. A small sample."
        )
        return Verdict(_ranked(median), title, said, ask="influence.audit(train, query)", brief=RANKED)
    said = "Nobody compared the scores with those of the exact inverse."
    return Verdict("unknown", title, said, ask="influence.audit(train, query)")


def _agreement(found: Audit) -> Figure:
    """Each audited query's figures; what is below zero is no better than nothing."""
    ranks = np.maximum(np.nan_to_num(found.rank_correlation), 0.0)
    return Dots(
        "How well the scores agree with the exact ones",
        "One dot per audited query, the tick their mean; 1 is the same ranking.",
        "agreement",
        [
            Condition("ranks of all rows", ranks),
            Condition(f"the {found.k} most helpful", found.overlap_helpful),
            Condition(f"the {found.k} largest", found.overlap_largest),
        ],
        ours=0,
    )


RANKED = "the exact inverse ranks rows differently"


def _ranked(correlation: float) -> str:
    return "good" if correlation >= RANKS else "careful" if correlation >= RANKS_LOST else "bad"


def _coverage(scores: ScoreMatrix) -> list[Verdict]:
    if scores.coverage == 1.0:
        return [Verdict("good", "How much of the model", "All trainable parameters are attributed.")]
    share = f"{scores.coverage:.1%} of the trainable parameters"
    said = f"The scores are about {share}: what rows do through the others is not in them."
    kind, brief = "good" if scores.coverage >= COVERED else "careful", f"they are about {share} only"
    return [Verdict(kind, "How much of the model", said, brief=brief)]


def _solved(scores: ScoreMatrix) -> list[Verdict]:
    if not scores.residuals:
        return []
    worst = np.max(list(scores.residuals.values()), axis=0)
    largest, missed = float(worst.max(initial=0.0)), int((worst > SOLVED).sum())
    kind = "bad" if not largest <= UNSOLVED else "careful" if missed else "good"
    said = f"The largest relative residual of a solve is {number(largest, 2)}."
    if missed:
        said += f" {missed} of {len(worst)} queries are above {SOLVED:g}: their scores are not those of the method."
    return [Verdict(kind, "The solves", said, brief=f"{missed} of {len(worst)} queries were not solved well")]


def unsolved(scores: ScoreMatrix) -> dict[int, str]:
    """Of queries whose solve did not come near its end: what to say beside them, by place."""
    if not scores.residuals:
        return {}
    worst = np.max(list(scores.residuals.values()), axis=0)
    return {
        int(place): f"Do not trust this query's scores: its solve stopped at a relative residual of {worst[place]:.2g}."
        for place in np.flatnonzero(~(worst <= UNSOLVED))
    }
