"""How far do scores of the same pairs differ: over seeds, checkpoints, or draws of a projection?

    scores  [s, q, n]   s matrices of the same queries and train rows

Scores that change with a seed rank rows by that seed. What the matrices have in common is told by the mean correlation
of their ranks, pair by pair of matrices; and the *reliability* is what to expect of the mean of s of them: how its
ranks would correlate with those of the mean of s others.

Sources: Spearman 1910, Brown 1910 (reliability of a mean).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import ArrayLike

from headwater.errors import InvalidInput, InvalidSetting, ShapeMismatch
from headwater.evaluate.checks import Floats, score_matrix
from headwater.evaluate.correlation import spearman
from headwater.evaluate.intervals import Interval, over_queries
from headwater.evaluate.retrieval import in_top


@dataclass(frozen=True, eq=False)
class Spread:
    """What several score matrices agree on."""

    mean: Floats
    """[q, n]."""
    deviation: Floats
    """[q, n], the standard deviation of each pair over matrices (s - 1 in the denominator)."""
    correlation: Interval
    """Of ranks, the mean over pairs of matrices and over queries; the interval is over queries."""
    correlation_by_query: Floats
    """[q]; NaN for a query that some matrix scores the same for all rows."""
    overlap: Interval
    """The share of the top k rows that two matrices have in common, likewise; k / n is chance."""
    overlap_by_query: Floats
    """[q]."""
    k: int
    matrices: int

    @property
    def undefined(self) -> int:
        """Queries without a correlation; they count as zero."""
        return int(np.isnan(self.correlation_by_query).sum())

    @property
    def reliability(self) -> float:
        """Of the mean of all the matrices."""
        return self.reliability_of(self.matrices)

    def reliability_of(self, matrices: int) -> float:
        """Of the mean of so many, by Spearman and Brown: m r / (1 + (m - 1) r); zero where r is not above zero.

        Errors: InvalidSetting for fewer than one.
        """
        if matrices < 1:
            raise InvalidSetting(f"matrices is {matrices}; expected at least 1.")
        r = max(0.0, self.correlation.value)
        return matrices * r / (1.0 + (matrices - 1) * r)

    def __str__(self) -> str:
        found = (
            f"{self.matrices} matrices of {self.mean.shape[0]} queries x {self.mean.shape[1]} train rows: rank "
            f"correlation {self.correlation}, top-{self.k} overlap {self.overlap}, reliability of one "
            f"{self.reliability_of(1):.3f}, of their mean {self.reliability:.3f}"
        )
        return found + (f"; {self.undefined} queries undefined, counted as 0" if self.undefined else "")


def spread(
    scores: Sequence[ArrayLike] | ArrayLike, *, k: int = 10, resamples: int = 2000, level: float = 0.9, seed: int = 0
) -> Spread:
    """What several matrices of scores agree on; ties at the top count by their chance to be listed.

    Shapes: scores [s, q, n], or a sequence of s matrices. k: rows at the top that are compared.
    Errors: InvalidInput for fewer than 2 matrices; ShapeMismatch; NonFiniteValue; InvalidSetting if k is not in 1..n.
    """
    found = [score_matrix(matrix) for matrix in scores]  # type: ignore[union-attr]
    if len(found) < 2:
        raise InvalidInput(f"A spread needs at least 2 matrices of scores; got {len(found)}.")
    for place, matrix in enumerate(found):
        if matrix.shape != found[0].shape:
            raise ShapeMismatch(f"Matrix {place} is {matrix.shape}, the first {found[0].shape}; expected the same.")
    pairs = list(combinations(found, 2))
    tops = [in_top(matrix, k) for matrix in found]
    correlations = np.mean([spearman(one.T, other.T) for one, other in pairs], axis=0)
    overlaps = np.mean([(one * other).sum(axis=1) / k for one, other in combinations(tops, 2)], axis=0)
    stacked = np.stack(found)
    return Spread(
        stacked.mean(axis=0),
        stacked.std(axis=0, ddof=1),
        over_queries(np.nan_to_num(correlations), resamples=resamples, level=level, seed=seed),
        correlations,
        over_queries(overlaps, resamples=resamples, level=level, seed=seed),
        overlaps,
        int(k),
        len(found),
    )
