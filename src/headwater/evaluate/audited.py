"""How far are approximate scores from exact ones, and what does that say of queries that were not solved exactly?

    scores   [m, n]   an approximation, for m queries chosen at random and all n train rows
    exact    [m, n]   the same with the exact inverse

Every figure is one number per query, so that the m figures and that of one more query, drawn as these were, are
exchangeable: the last one is equally likely to have any rank among m + 1. The ceil((m + 1) level)-th smallest of the m
is then exceeded by it with probability 1 - level at most, whatever the distribution (split conformal prediction). That
is a statement about one more query and one figure, not about all queries or all figures at once; and it is an average
over samples: another sample of queries would give another bound.

Sources: Vovk, Gammerman and Shafer 2005; Lei et al. 2018, arXiv 1604.04173.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from headwater.errors import InvalidInput, InvalidSetting, NonFiniteValue, ShapeMismatch
from headwater.evaluate.checks import Floats, score_matrix
from headwater.evaluate.correlation import spearman
from headwater.evaluate.retrieval import in_top
from headwater.settings import check_whole


@dataclass(frozen=True, eq=False)
class Audit:
    """Figures of the audited queries, each [m], and bounds for one more query. `print` shows a table, and says both."""

    relative_error: Floats
    """|scores - exact| / |exact|, lengths over train rows."""
    largest_error: Floats
    """The largest error on any train row, relative to the query's largest exact score."""
    rank_correlation: Floats
    """Spearman's, over train rows; NaN where a side is constant."""
    overlap_helpful: Floats
    """Share of the approximation's k most helpful train rows that are so exactly."""
    overlap_largest: Floats
    """The same for the k largest scores in size."""
    query_ids: NDArray[np.generic]
    """[m]: which queries these are."""
    k: int
    """Of the overlaps."""
    level: float
    """Probability with which the bounds hold for one more query."""
    train: int
    """Train rows n."""
    queries: int
    """Queries that there are, these included."""
    method: str = ""
    """What was audited."""
    reference: str = ""
    """What is taken to be exact, in words."""
    solves: int = 0
    """Exact solves by iteration; zero for a dense inverse."""
    missed: int = 0
    """How many of them missed their tolerance: then the reference is not exact, nor are the errors."""
    residual: float = 0.0
    """The largest relative residual of these."""

    @property
    def audited(self) -> int:
        """Queries m that were solved exactly."""
        return len(self.relative_error)

    @property
    def needed(self) -> int:
        """The fewest audited queries that give a bound at this level."""
        return math.ceil(self.level / (1 - self.level) - 1e-9)

    @property
    def relative_error_bound(self) -> float:
        """One more query's `relative_error` is larger with probability 1 - level at most; infinite if m is too few."""
        return upper_bound(self.relative_error, self.level)

    @property
    def largest_error_bound(self) -> float:
        """The same for `largest_error`."""
        return upper_bound(self.largest_error, self.level)

    @property
    def rank_correlation_bound(self) -> float:
        """One more query's is lower with probability 1 - level at most; minus infinity if m is too few.

        A query without a correlation counts as the worst: -1.
        """
        return lower_bound(np.nan_to_num(self.rank_correlation, nan=-1.0), self.level)

    @property
    def overlap_helpful_bound(self) -> float:
        """The same for `overlap_helpful`."""
        return lower_bound(self.overlap_helpful, self.level)

    @property
    def overlap_largest_bound(self) -> float:
        """The same for `overlap_largest`."""
        return lower_bound(self.overlap_largest, self.level)

    def __str__(self) -> str:
        worst = f"bound {self.level:.0%}"
        lines = [
            self.method,
            f"against the {self.reference}" if self.reference else "",
            f"{self.audited} of {self.queries} queries, at random, against all {self.train} train rows",
            "",
            f"{'':<28}{'median':>9}{'worst':>9}{worst:>11}",
            *(_line(*row) for row in self._rows()),
            "",
            self.statement,
        ]
        if self.missed:
            lines.append(
                f"{self.missed} of {self.solves} exact solves missed their tolerance (the largest relative residual is "
                f"{self.residual:.2g}): the reference itself is off by about that much."
            )
        undefined = int(np.isnan(self.rank_correlation).sum())
        if undefined:
            lines.append(f"{undefined} queries have no rank correlation; they count as the worst.")
        return "\n".join(lines).lstrip("\n")

    def _rows(self) -> list[tuple[str, Floats, Callable[[Floats], np.floating], float]]:
        """Name, figures, which end is the worst, and bound."""
        high, low = np.max, np.min
        ranks = np.nan_to_num(self.rank_correlation, nan=-1.0)
        return [
            ("relative error", self.relative_error, high, self.relative_error_bound),
            ("largest error / largest", self.largest_error, high, self.largest_error_bound),
            ("rank correlation", ranks, low, self.rank_correlation_bound),
            (f"top {self.k}, helpful", self.overlap_helpful, low, self.overlap_helpful_bound),
            (f"top {self.k}, by size", self.overlap_largest, low, self.overlap_largest_bound),
        ]

    @property
    def statement(self) -> str:
        """The bounds in words, or why there are none."""
        if self.audited >= self.queries:
            return (
                "All queries were audited: no query is left for a bound to speak of, unless more are drawn like these."
            )
        if self.audited < self.needed:
            return (
                f"{self.audited} audited queries are too few for a bound at level {self.level:g}; at least "
                f"{self.needed} are needed."
            )
        return (
            f"For one more query, drawn as these were, each of these holds with probability {self.level:.0%} or more: "
            f"its relative error is at most {self.relative_error_bound:.3g}; no score is off by more than "
            f"{self.largest_error_bound:.3g} of its largest; its rank correlation is at least "
            f"{self.rank_correlation_bound:.3g}; of its {self.k} most helpful rows at least "
            f"{self.overlap_helpful_bound:.0%} are so exactly, and of its {self.k} largest scores "
            f"{self.overlap_largest_bound:.0%}."
        )


def _line(name: str, figures: Floats, worst: Callable[[Floats], np.floating], bound: float) -> str:
    said = f"{bound:.3g}" if math.isfinite(bound) else "none"
    return f"{name:<28}{float(np.median(figures)):>9.3g}{float(worst(figures)):>9.3g}{said:>11}"


def audited(
    scores: ArrayLike,
    exact: ArrayLike,
    *,
    k: int = 10,
    level: float = 0.9,
    query_ids: ArrayLike | None = None,
    queries: int | None = None,
    method: str = "",
    reference: str = "",
    solves: int = 0,
    missed: int = 0,
    residual: float = 0.0,
) -> Audit:
    """Figures of each query from its scores and the exact ones, [m, n] each; the rest is passed on.

    query_ids: positions, if None. queries: more than the audited ones, by default, so that there is a rest.
    Errors: ShapeMismatch; InvalidInput if there is no query or no row; NonFiniteValue; InvalidSetting for k or level.
    """
    mine, truth = _checked(scores, exact)
    m, n = truth.shape
    check_whole("k", k, 1, n)
    check_level(level)
    gap = np.abs(mine - truth)
    return Audit(
        relative_error=_share(np.linalg.norm(gap, axis=1), np.linalg.norm(truth, axis=1)),
        largest_error=_share(gap.max(axis=1), np.abs(truth).max(axis=1)),
        rank_correlation=spearman(mine.T, truth.T),
        overlap_helpful=overlap(mine, truth, k),
        overlap_largest=overlap(np.abs(mine), np.abs(truth), k),
        query_ids=np.arange(m) if query_ids is None else np.asarray(query_ids),
        k=int(k),
        level=float(level),
        train=n,
        queries=m + 1 if queries is None else int(queries),
        method=method,
        reference=reference,
        solves=solves,
        missed=missed,
        residual=residual,
    )


def overlap(scores: ArrayLike, exact: ArrayLike, k: int) -> Floats:
    """The share of the k largest scores of each row of [m, n] whose exact scores are among the k largest: [m].

    A row whose exact score equals the k-th largest is among them. Equal scores are in no order: where only some of them
    are among the k largest, each counts with the chance that it is.
    """
    truth = score_matrix(exact)
    least = np.partition(truth, -k, axis=1)[:, -k, None]
    return (in_top(scores, k) * (truth >= least)).sum(axis=1) / k


def upper_bound(figures: ArrayLike, level: float) -> float:
    """What one more exchangeable figure exceeds with probability 1 - level at most; infinite if figures are too few.

    The ceil((m + 1) level)-th smallest of m. Errors: InvalidSetting for a level outside of (0, 1); NonFiniteValue for
    NaN.
    """
    check_level(level)
    values = np.asarray(figures, dtype=np.float64).reshape(-1)
    if np.isnan(values).any():
        raise NonFiniteValue(f"{int(np.isnan(values).sum())} of {len(values)} figures are not numbers.")
    k = math.ceil((len(values) + 1) * level - 1e-9)
    return float(np.sort(values)[k - 1]) if k <= len(values) else math.inf


def lower_bound(figures: ArrayLike, level: float) -> float:
    """What one more exchangeable figure is below with probability 1 - level at most; see `upper_bound`."""
    return -upper_bound(-np.asarray(figures, dtype=np.float64), level)


def check_level(level: float) -> None:
    """Errors: InvalidSetting unless it is a probability between 0 and 1."""
    if not 0 < level < 1:
        raise InvalidSetting(f"level is {level!r}; expected a probability between 0 and 1.")


def _share(gap: Floats, size: Floats) -> Floats:
    """gap / size; zero for nothing off nothing, infinite for something off nothing."""
    whole = np.where(gap > 0, np.inf, 0.0)
    return np.divide(gap, size, out=whole, where=size > 0)


def _checked(scores: ArrayLike, exact: ArrayLike) -> tuple[Floats, Floats]:
    mine, truth = np.asarray(scores, dtype=np.float64), np.asarray(exact, dtype=np.float64)
    if mine.ndim != 2 or mine.shape != truth.shape:
        raise ShapeMismatch(f"The scores are {mine.shape}, the exact ones {truth.shape}; expected (m, n) of both.")
    if 0 in mine.shape:
        raise InvalidInput(f"There is nothing to compare: the scores are {mine.shape}.")
    for what, values in (("scores", mine), ("exact scores", truth)):
        if not np.isfinite(values).all():
            first = int(np.argwhere(~np.isfinite(values))[0, 0])
            raise NonFiniteValue(
                f"{int((~np.isfinite(values)).sum())} {what} are not finite, the first of query {first}."
            )
    return mine, truth
