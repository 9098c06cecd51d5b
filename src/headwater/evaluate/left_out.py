"""Do mistakes go away when the rows blamed for them are left out? Each query, trained again without its own rows.

The queries are those whose outputs are to be mended (losses of wrong predictions). For each, the `k` rows with the
lowest scores are left out, and, to compare, as many at random; runs with the same seeds on all rows say what a fresh
seed does by itself. What the scores foretell is the sum of the scores of the rows that are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean, stdev

import numpy as np
from numpy.typing import ArrayLike, NDArray

from headwater.errors import InvalidSetting, ShapeMismatch
from headwater.evaluate.bank import Plan, plan_removals
from headwater.evaluate.checks import Floats, score_matrix
from headwater.evaluate.correlation import pearson
from headwater.positions import row_positions
from headwater.settings import check_whole
from headwater.tables import table


@dataclass(frozen=True, eq=False)
class LeftOut:
    """What became of e queries in r runs; `print` shows a table."""

    queries: NDArray[np.int64]
    """[e]: positions."""
    k: int
    """Rows left out for each."""
    foretold: Floats
    """[e]: the fall of the output that the scores of the rows left out add up to."""
    before: Floats
    """[r, e]: outputs with all rows."""
    without: Floats
    """[r, e]: without the rows blamed."""
    at_random: Floats
    """[r, e]: without as many rows at random."""

    @property
    def measured(self) -> Floats:
        """[e]: the fall of the output, the mean over runs."""
        return (self.before - self.without).mean(axis=0)

    @property
    def correlation(self) -> float:
        """Pearson's, of what was foretold with what was measured; NaN where one of the two is the same for all."""
        return float(pearson(self.foretold[:, None], self.measured[:, None])[0])

    def rows(self) -> list[tuple[str, Floats]]:
        """By what was left out: the mean over queries of each run, [r]."""
        return [
            ("nothing", self.before.mean(axis=1)),
            (f"the {self.k} rows blamed", self.without.mean(axis=1)),
            (f"{self.k} rows at random", self.at_random.mean(axis=1)),
        ]

    def __str__(self) -> str:
        lines = [["left out", "mean output"], *([name, spread(values)] for name, values in self.rows())]
        return f"{table(lines, left=(0, 1))}\n{self.in_words}"

    @property
    def in_words(self) -> str:
        """What was foretold beside what was measured."""
        return (
            f"Foretold: a fall of {self.foretold.mean():.3g} for each of {len(self.queries)} queries; measured: "
            f"{self.measured.mean():.3g} (correlation {self.correlation:.2f})."
        )


def spread(values: Floats) -> str:
    """Mean and standard deviation over runs, as text."""
    return f"{fmean(values):.3g}" + (f" ± {stdev(values):.2g}" if len(values) > 1 else "")


def plan_left_out(scores: ArrayLike, queries: ArrayLike, k: int, *, runs: int = 2, seed: int = 0) -> Plan:
    """What is to be trained again for `left_out`: all rows, and all but some for each of the queries, twice.

    scores: [q, n]. queries: positions of those that are to be mended. Errors: InvalidInput; InvalidSetting.
    """
    given = score_matrix(scores)
    check_whole("k", k, 1)
    if k >= given.shape[1]:
        raise InvalidSetting(f"k is {k}; there are {given.shape[1]} rows, and some must stay.")
    chosen = row_positions(np.asarray(queries), len(given), "The queries")
    rng = np.random.default_rng([seed, 1])
    random = [rng.choice(given.shape[1], k, replace=False) for _ in chosen]
    groups = [group.tolist() for group in (*_blamed(given, chosen, k), *random)]
    return plan_removals(given.shape[1], groups, runs=runs, seed=seed)


def left_out(scores: ArrayLike, queries: ArrayLike, k: int, outputs: ArrayLike) -> LeftOut:
    """outputs: [1 + 2 e, r, q], of a bank of `plan_left_out(scores, queries, k)`. Errors: ShapeMismatch."""
    given, runs = score_matrix(scores), np.asarray(outputs, dtype=np.float64)
    chosen = row_positions(np.asarray(queries), len(given), "The queries")
    e = len(chosen)
    if runs.ndim != 3 or runs.shape[0] != 1 + 2 * e or runs.shape[2] != len(given):
        raise ShapeMismatch(f"The outputs are {runs.shape}; expected ({1 + 2 * e}, runs, {len(given)}).")
    each = np.arange(e)
    foretold = [-given[query, rows].sum() for query, rows in zip(chosen, _blamed(given, chosen, k), strict=True)]
    return LeftOut(
        queries=chosen,
        k=k,
        foretold=np.array(foretold),
        before=runs[0][:, chosen],
        without=runs[1 + each, :, chosen].T,
        at_random=runs[1 + e + each, :, chosen].T,
    )


def _blamed(scores: Floats, queries: NDArray[np.int64], k: int) -> list[NDArray[np.int64]]:
    """The rows with the k lowest scores of each query."""
    return [np.argsort(scores[query], kind="stable")[:k] for query in queries]
