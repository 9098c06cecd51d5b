"""What a verification finds: a figure for each check, the distance from an exact inverse, a bound for other pairs.

The bound is split conformal: of m + 1 exchangeable errors the last is equally likely to have any rank, so that the
ceil((m + 1)(1 - a))-th smallest of the first m is exceeded by it with probability a at most, whatever the distribution.

Source: Vovk, Gammerman and Shafer 2005; Lei et al. 2018, arXiv 1604.04173.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from headwater.evaluate.audited import upper_bound
from headwater.evaluate.correlation import spearman
from headwater.tables import shown, table

GRADIENTS, PLAIN, REFIT = "plain gradients", "plain gradients, own operator", "fit and gradients in float64"
SIZES, ORDER = "batch sizes", "row order of the fit"
COMPARISONS = (PLAIN, REFIT, SIZES, ORDER)
"""Names of checks; those of COMPARISONS compare scores."""
RANKS, RANKS_LOST = 0.9, 0.6
"""Rank correlation with the exact scores from which a ranking is the same, and below which it is another one."""
MISCOVERAGE = 0.1
"""Of the bound for pairs that were not sampled."""


@dataclass(frozen=True)
class Check:
    """One line of a verification."""

    name: str
    figure: float | None = None
    """What was found; None where nothing could be."""
    allowed: float | None = None
    """The largest figure that passes; None for a figure that is only shown."""
    note: str = ""
    """Why it was not checked, or what the figure is."""

    @property
    def passed(self) -> bool:
        """Whether nothing speaks against it."""
        return self.figure is None or self.allowed is None or self.figure <= self.allowed

    @property
    def verdict(self) -> str:
        if self.figure is None:
            return f"not checked ({self.note})"
        said = "" if self.allowed is None else "ok" if self.passed else "FAILED"
        return "; ".join(filter(None, [said, self.note]))


@dataclass(frozen=True, eq=False)
class Approximation:
    """How near the method is to the exact damped inverse of each block, on the sampled pairs."""

    reference: str
    """The exact inverse, in words."""
    scores: np.ndarray
    """The method's, [query, train]."""
    exact: np.ndarray
    """The exact ones, [query, train]."""
    paired: np.ndarray
    """[train]: the query that each train row was paired with, for the bound."""
    exhaustive: bool
    """Whether the sample is all train rows; then no row is left for the bound to speak of."""

    @property
    def relative_error(self) -> float:
        """|scores - exact| / |exact|, as matrices."""
        size = float(np.linalg.norm(self.exact))
        return float(np.linalg.norm(self.scores - self.exact)) / size if size else math.nan

    @cached_property
    def rank_correlations(self) -> np.ndarray:
        """Spearman's, over the sampled train rows: [query]."""
        return spearman(self.scores.T.astype(np.float64), self.exact.T.astype(np.float64))

    @property
    def in_words(self) -> str:
        """What the rank correlation says; of the distance by size nobody can say which is too far.

        A method that damps or smooths more has other sizes and may rank, and forecast, as well: which distance matters
        is for `calibrate` and retraining to say. A ranking is judged at RANKS and RANKS_LOST, as a convention.
        """
        mean = float(self.rank_correlations.mean())
        if not math.isfinite(mean):
            return "has no ranking to compare: some query's scores are all alike"
        if not mean >= RANKS_LOST:
            return "ranks rows differently"
        return "ranks rows alike" if mean >= RANKS else "ranks rows much alike"

    @property
    def bound(self) -> float:
        """With probability 0.9, no error of one of these queries on a train row not sampled is larger; absolute."""
        errors = np.abs(self.scores - self.exact)[self.paired, np.arange(len(self.paired))]
        return upper_bound(errors, 1 - MISCOVERAGE)


@dataclass(frozen=True, eq=False)
class Verification:
    """What a verification found. `print` shows one line for each check."""

    method: str
    """The method's settings."""
    rows: int
    """Train rows that were sampled."""
    queries: int
    """Queries that were sampled."""
    seed: int
    """Of the sample."""
    tolerance: float
    """How far scores may be off, relative to the largest."""
    checks: tuple[Check, ...]
    approximation: Approximation | None = None
    """None where there is no exact inverse to compare with."""

    @property
    def passed(self) -> bool:
        """Whether no check failed. What was not checked does not count; the table says what, and why."""
        return all(check.passed for check in self.checks)

    @property
    def largest_error(self) -> float:
        """The largest figure of the checks that compare scores, relative to the largest score."""
        return max((c.figure for c in self.checks if c.name in COMPARISONS and c.figure is not None), default=math.nan)

    def __getitem__(self, name: str) -> Check:
        """The check of that name."""
        return {check.name: check for check in self.checks}[name]

    def __str__(self) -> str:
        rows = [[c.name, shown(c.figure), shown(c.allowed), c.verdict] for c in self.checks]
        lines = table([["check", "figure", "allowed", "verdict"], *rows], left=(0, 3))
        failed, skipped = (sum(map(test, self.checks)) for test in (_failed, _skipped))
        end = "All checks that were made passed" if not failed else f"{failed} of {len(self.checks)} checks FAILED"
        end += f"; {skipped} not checked." if skipped else "."
        if not failed and self.approximation is not None:
            end += f" So the method is computed right. Beside the exact inverse it {self.approximation.in_words}."
        head = f"{self.method}\n{self.queries} queries x {self.rows} train rows, at random (seed {self.seed})\n"
        return f"{head}\n{lines}\n\n{end}"


def _failed(check: Check) -> bool:
    return not check.passed


def _skipped(check: Check) -> bool:
    return check.figure is None
