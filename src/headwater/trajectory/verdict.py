"""Does a trajectory's derivative forecast anything? Measured on the training itself, by taking it again.

The derivative is exact, and may still forecast badly: of a training whose outcome is no smooth function of its rows'
weights (kinks of ReLU, steps larger than the curvature allows) it describes a neighbourhood smaller than one row. So:

1. First-order error. For each share that is asked about, random rows are left out, training is taken again forward
   (weight 0: same order, same batches, same divisor), and the change of the queries is compared with the sum of the
   rows' derivatives: |change - forecast| / |change| over replays, and of that the median over queries.
2. Metasmoothness. The cosine between the derivative at the weights that were and at those of the first such replay,
   over the rows that stay, for the mean of the queries.
3. Precision. The derivative of the first query by the last 32 steps, and once more in float64.
Source: Engstrom et al. 2025, arXiv 2503.13751 (metasmoothness).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from headwater.errors import NonFiniteValue
from headwater.tables import table
from headwater.trajectory.sweep import Sweep

ROUGH = 0.6
"""First-order error above which a forecast is called rough: its correlation with what happens is then about .8 at most.

Measured on the digits MLP at 1 % removals (docs/trajectory.md): an error of .1 where the LDS is .99, of .9 where it is
.41; of all pairs of eight replays, none above .21 of the first, and none below .72 of the second.
"""
SMOOTH = 0.7
"""Cosine of the two derivatives below which it is called rough, too."""
LAST = 32
"""Steps, from the end, over which numbers are compared with float64."""
PRECISE = 0.98
"""Cosine with the derivative in float64 below which numbers are too coarse."""


@dataclass(frozen=True)
class Verdict:
    """What was measured. `print` shows it."""

    errors: Mapping[float, float]
    """First-order error, by the share of the rows that is removed; infinite where training diverged."""
    metasmoothness: float | None = None
    """Cosine of the derivative here and beside; None where it was not asked for."""
    precision: float | None = None
    """Cosine with float64; None where the model is in float64, or has no such copy."""

    @property
    def doubts(self) -> tuple[str, ...]:
        """What speaks against the scores, and what would help; empty where nothing does."""
        found = []
        rough = {share: error for share, error in self.errors.items() if not error <= ROUGH}
        if rough or (self.metasmoothness is not None and not self.metasmoothness >= SMOOTH):
            said = [
                f"removing {share:.3g} of the rows is forecast with an error of {e:.2f}" for share, e in rough.items()
            ]
            if self.metasmoothness is not None and not self.metasmoothness >= SMOOTH:
                said.append(f"the derivative turns by a cosine of {self.metasmoothness:.2f} where these rows are out")
            found.append(
                f"training was rough, so that its derivative forecasts little: {', and '.join(said)} (allowed are "
                f"{ROUGH:g} and {SMOOTH:g}). A smooth activation (GELU, SiLU, Tanh instead of ReLU), a smaller "
                "learning rate, larger batches or a warm-up make it smooth; hw.Unrolled(curvature='ggn') is steadier "
                "on what is there."
            )
        if self.precision is not None and not self.precision >= PRECISE:
            found.append(
                f"numbers were too coarse: the first query's derivative has a cosine of {self.precision:.3f} with that "
                f"in float64 (allowed is {PRECISE:g}). Sweep in float32 or float64: convert the model before fit."
            )
        return tuple(found)

    def __str__(self) -> str:
        rows = [["what", "measured", "allowed"]]
        rows += [
            [f"error, {share:.3g} of the rows out", f"{e:.3f}", f"<= {ROUGH:g}"] for share, e in self.errors.items()
        ]
        if self.metasmoothness is not None:
            rows.append(["metasmoothness", f"{self.metasmoothness:.3f}", f">= {SMOOTH:g}"])
        if self.precision is not None:
            rows.append(["precision", f"{self.precision:.4f}", f">= {PRECISE:g}"])
        return "\n".join([table(rows), "", *(f"WORRYING: {said}" for said in self.doubts or ()), *self._fine()])

    def _fine(self) -> list[str]:
        return [] if self.doubts else ["Smooth: a derivative forecasts what removing rows does."]


def judge(
    sweep: Sweep,
    queries: Sequence[Any],
    tau: np.ndarray,
    removals: Sequence[float],
    replays: int,
    *,
    share: float | None = None,
    wide: Sweep | None = None,
    seed: int = 0,
) -> Verdict:
    """tau: the derivative of these queries [q, n]; share: of what the queries were asked as one. wide: in float64."""
    replay, columns = sweep.replay, tau.shape[1]
    seen = np.unique(sweep.places(replay.record.rows))
    base = _losses(sweep, queries, share)
    generator = np.random.default_rng(seed)
    errors, metasmoothness = {}, None
    for number, removed in enumerate(sorted(removals)):
        missed, changed = np.zeros(len(tau)), np.zeros(len(tau))
        for k in range(replays):
            out = generator.choice(seen, max(1, round(removed * len(seen))), replace=False)
            other = _without(sweep, columns, out)
            change = _losses(other, queries, share) - base
            with np.errstate(invalid="ignore", over="ignore"):
                missed += np.square(change + tau[:, out].sum(axis=1))
                changed += np.square(change)
            if number == k == 0 and not sweep.at_each_step:
                metasmoothness = _cosine(other, queries, tau, out, share)
        errors[removed] = _ratio(missed, changed)
    precision = None
    if wide is not None:
        first = [queries[0].take(slice(0, 1))] if share is None else queries
        precision = cosine(*(each.tau(first, share=share, last=LAST)[0] for each in (wide, sweep)))
    return Verdict(errors, metasmoothness, precision)


def _without(sweep: Sweep, columns: int, out: np.ndarray) -> Sweep:
    """The same training without these rows: weight 0, and nothing else is changed."""
    weights = np.ones(columns)
    weights[out] = 0.0
    return replace(sweep, replay=replace(sweep.replay, weigh=lambda step: weights[sweep.replay_places(step.ids)]))


def _losses(sweep: Sweep, queries: Sequence[Any], share: float | None) -> np.ndarray:
    parameters = sweep.replay.last().parameters
    found = np.concatenate([sweep.replay.model.query_losses(parameters, batch) for batch in queries])
    return found if share is None else np.array([found.sum() * share])


def _cosine(other: Sweep, queries: Sequence[Any], tau: np.ndarray, out: np.ndarray, share: float | None) -> float:
    """Of the mean query's derivative, over the rows that stay."""
    stay = np.setdiff1d(np.arange(tau.shape[1]), out)
    mean = 1.0 / len(tau) if share is None else share
    try:
        beside = other.tau(queries, share=mean)[0]
    except NonFiniteValue:
        return 0.0
    return cosine(beside[stay], tau.mean(axis=0)[stay])


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    lengths = float(np.linalg.norm(one) * np.linalg.norm(other))
    return float(one @ other) / lengths if lengths else 1.0


def _ratio(missed: np.ndarray, changed: np.ndarray) -> float:
    """The median over queries of |change - forecast| / |change|: few of them move much, and say little of the rest."""
    finite = np.isfinite(missed) & np.isfinite(changed)
    ratios = np.full(len(missed), np.inf)
    still = finite & (changed == 0)
    ratios[still] = np.where(missed[still] > 0, np.inf, 0.0)
    moved = finite & (changed > 0)
    ratios[moved] = np.sqrt(missed[moved] / changed[moved])
    return float(np.median(ratios))
