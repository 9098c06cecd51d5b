"""Boosted trees, attributed by a bank of refits: how near the ceiling is that so many refits allow?

    python benchmarks/trees.py FOLDER [--only diabetes] [--refits 400] [--judges 100]

Three tasks of scikit-learn, each with `ROWS` train rows and `QUERIES` queries. `judges` subsets are fitted twice, and
judge alone; `refits` others are fitted once, and attributed by `Bank.attribution`. A folder keeps the banks: the same
command goes on where it was stopped, and prints the table again.

What m refits allow. Let p and p' be the forecasts for the judges' subsets by the Banzhaf values of two banks of m
refits each, and y what was measured. Banzhaf values estimate the linear part of the outputs without bias, so that

    V = cov(p, p')                    is the variance of the linear part: all else in p and p' is each one's own,
    E = var(p) - V                    is the noise of m refits, and E / 2 that of 2 m,
    V / sqrt((V + E) var(y))          is the correlation of p with y that is to be expected.

That is the ceiling for forecasts that know nothing but m refits; it is found without comparing any of them with y. An
estimate that shrinks, or expects few rows to matter, knows more, and may be above it. With any number of refits a
linear forecast ends at sqrt(V / var(y)), and any forecast at the usual ceiling, the root of the judges' reliability.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits
from sklearn.ensemble import GradientBoostingClassifier, GradientBoostingRegressor

from headwater.evaluate import Bank, Interval, ceiling, difference, lds, loss_ranking, plan_subsets
from headwater.evaluate.lds import forecast
from headwater.retraining.sklearn import Refit
from headwater.tables import table

ROWS, QUERIES = 200, 40


@dataclass(frozen=True)
class Task:
    """What is fitted, and on what."""

    load: Callable[..., Any]
    estimator: Any

    def rows(self, n: int, queries: int) -> tuple[Any, Any, Any, Any]:
        X, y = self.load(return_X_y=True)
        order = np.random.default_rng(0).permutation(len(X))[: n + queries]
        X, y = X[order], y[order]
        if y.dtype.kind == "f":  # so that losses are near one
            y = (y - y.mean()) / y.std()
        return X[:n], y[:n], X[n:], y[n:]


TASKS = {
    "breast_cancer": Task(load_breast_cancer, GradientBoostingClassifier(n_estimators=40, max_depth=2, subsample=0.8)),
    "diabetes": Task(load_diabetes, GradientBoostingRegressor(n_estimators=40, max_depth=2, subsample=0.8)),
    "digits": Task(
        load_digits, GradientBoostingClassifier(n_estimators=15, max_depth=2, subsample=0.8, max_features="sqrt")
    ),
}


@dataclass(frozen=True)
class Found:
    """Of one task, and one number of refits."""

    refits: int
    method: str
    lds: Interval
    allowed: float
    """What so many refits allow a forecast that knows nothing else."""
    over_loss: Interval
    """The LDS, minus that of the rows' own losses, whichever sign of theirs is better."""


@dataclass(frozen=True)
class Allowed:
    """Of each query, [q]: see above."""

    linear: np.ndarray
    """V."""
    noise: np.ndarray
    """E, of half of the refits."""
    measured: np.ndarray
    """The variance of y."""

    @classmethod
    def by(cls, bank: Bank, judges: int, halves: Sequence[np.ndarray]) -> Allowed:
        keep, measured = bank.keep[:judges], bank.outputs[:judges].mean(axis=1)
        # Of subsets of one size, a row's Banzhaf value also has what the others in its place do: n / (n - 1) too much.
        share = 1.0 - 1.0 / keep.shape[1]
        one, other = (share * forecast(bank.attribution("banzhaf", subsets=half), keep) for half in halves)
        linear = np.maximum(_covariance(one, other), 0.0)
        return cls(linear, np.sqrt(one.var(axis=0) * other.var(axis=0)) - linear, measured.var(axis=0))

    def of(self, times: float) -> float:
        """The mean over queries, for so many times half of the refits."""
        variance = (self.linear + np.maximum(self.noise, 0.0) / times) * self.measured
        return float(np.mean(self.linear / np.sqrt(np.where(variance > 0, variance, 1.0))))


def _covariance(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return np.asarray(((one - one.mean(axis=0)) * (other - other.mean(axis=0))).mean(axis=0))


def bank_of(folder: Path, task: Task, refits: int, judges: int, n: int = ROWS, queries: int = QUERIES) -> Bank:
    """The first `judges` subsets are fitted twice."""
    X, y, asked, wanted = task.rows(n, queries)
    plan = plan_subsets(n, subsets=judges + refits, repeated=judges, seed=0)
    recipe = {"estimator": repr(task.estimator), "data": task.load.__name__}
    return Bank(folder, plan, queries, recipe).fill(Refit(task.estimator, X, y, asked, wanted), progress=True)


def own_losses(task: Task, n: int = ROWS, queries: int = QUERIES) -> np.ndarray:
    """Of the train rows, under the estimator that was fitted to all of them: [n]."""
    X, y, _, _ = task.rows(n, queries)
    return np.asarray(Refit(task.estimator, X, y, X, y)(np.arange(n), 0))


def judged(bank: Bank, judges: int, losses: np.ndarray, methods: tuple[str, ...]) -> tuple[list[Found], float]:
    """Each method, by half of the refits and by all of them; and what any number of them allows a linear forecast."""
    keep, outputs = bank.keep[:judges], bank.outputs[:judges]
    total = len(bank.keep)
    halves = np.array_split(np.arange(judges, total), 2)
    plain = loss_ranking(losses, bank.queries)
    plain = max((plain, -plain), key=lambda scores: lds(scores, keep, outputs, resamples=1).raw.value)
    allowed, found = Allowed.by(bank, judges, halves), []
    for method in methods:
        for subsets, times in ((halves[0], 1.0), (np.arange(judges, total), 2.0)):
            scores = bank.attribution(method, subsets=subsets)
            gap = difference(scores, plain, keep, outputs)
            found.append(Found(len(subsets), method, lds(scores, keep, outputs).raw, allowed.of(times), gap))
    return found, allowed.of(np.inf)


def main() -> None:
    given = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    given.add_argument("folder", type=Path)
    given.add_argument("--only", choices=list(TASKS), action="append")
    given.add_argument("--refits", type=int, default=400)
    given.add_argument("--judges", type=int, default=100)
    asked = given.parse_args()
    lines = [["task", "by", "refits", "LDS", "allowed", "over own loss"]]
    for name in asked.only or TASKS:
        task = TASKS[name]
        bank = bank_of(asked.folder / name, task, asked.refits, asked.judges)
        found, linear = judged(bank, asked.judges, own_losses(task), ("banzhaf", "ridge", "lasso"))
        for one in found:
            lines.append([name, one.method, str(one.refits), str(one.lds), f"{one.allowed:.3f}", str(one.over_loss)])
        perfect = ceiling(bank.outputs[: asked.judges]) or 0.0
        lines.append([name, "any number of refits", "", f"linear {linear:.3f}, any forecast {perfect:.3f}", "", ""])
    print(table(lines, left=(0, 1)), flush=True)


if __name__ == "__main__":
    main()
