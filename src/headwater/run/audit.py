"""An approximation against the exact inverse that it stands for, on queries chosen at random and all train rows.

1. Which queries depends on the seed and on positions in the loader alone.
2. The reference is the exact damped inverse of the curvature that the method approximates, with the same blocks, the
   same absolute damping and the same gradients: dense where blocks are small, else by conjugate gradients.
3. Both score the chosen queries against all train rows, in the model's own dtype.

What follows for the other queries is in `headwater.evaluate.audited`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from headwater.errors import InvalidInput, InvalidSetting, NotConverged
from headwater.evaluate.audited import Audit as Audit
from headwater.evaluate.audited import audited, check_level
from headwater.influence import ComposableInfluence
from headwater.methods.base import Method
from headwater.methods.iterative import Cg
from headwater.operators.iterative import joined, recorded_solves
from headwater.random import row_uniforms
from headwater.rows import PlacedBatch, Total, Visitor
from headwater.run.attribute import attribute
from headwater.run.rows import sweep_rows
from headwater.run.verify import DENSE, exact_method
from headwater.settings import check_whole
from headwater.types import join

TOLERANCES = {"float64": 1e-8, "float32": 1e-4}
"""Relative residuals of exact solves; 1e-2 for any other dtype."""
AUDITED = 1 << 22
"""Where the random numbers begin that choose queries."""


def audit(
    influence: ComposableInfluence,
    train_loader: Iterable[object],
    query_loader: Iterable[object],
    *,
    queries: int,
    k: int,
    level: float,
    tolerance: float | None,
    seed: int,
    progress: bool,
) -> Audit:
    """See `ComposableInfluence.audit`.

    Errors: NotFittedError; StaleFit; InvalidSetting for a method without an inverse, and for settings that mean
    nothing; InvalidInput for other train rows than those that were fitted; those of the exact method's fit
    (SingularOperator, IndefiniteCurvature, ...).
    """
    influence.ready()
    kind = influence.method.approximates
    if kind is None:
        raise InvalidSetting(f"{influence.method.describe()} approximates no inverse: there is nothing to audit.")
    _check(queries, k, level, tolerance)
    chosen, ids, count = _chosen(influence, query_loader, queries, seed, progress)
    allowed = tolerance or TOLERANCES.get(influence.source.dtype, 1e-2)
    method, how = _exact(influence, kind, allowed)
    options: dict[str, Any] = {"unit": "influence", "by_block": False, "progress": progress}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotConverged)  # the audit says so
        reference = influence.unfitted(method=method, damping=influence.absolute_damping)
        reference.fit(train_loader, progress=progress)
        if not np.isclose(reference.n_train, influence.n_train):
            raise InvalidInput(
                f"The train loader has {reference.n_train:g} rows, and {influence.n_train:g} were fitted: an audit "
                "needs those that were fitted."
            )
        scores = attribute(influence, train_loader, chosen, **options)
        check_whole("k", k, 1, scores.shape[1])
        with recorded_solves() as log:
            exact = attribute(reference, train_loader, chosen, **options)
    solves = joined(log).values()
    return audited(
        scores.values,
        exact.values,
        k=k,
        level=level,
        query_ids=ids,
        queries=count,
        method=influence.method.describe(),
        reference=f"exact damped inverse of the {kind.replace('_', ' ')} by block, {how}",
        solves=sum(len(solve.residual) for solve in solves),
        missed=sum(int((~solve.converged).sum()) for solve in solves),
        residual=max((float(solve.residual.max(initial=0.0)) for solve in solves), default=0.0),
    )


def _check(queries: int, k: int, level: float, tolerance: float | None) -> None:
    for name, value in (("queries", queries), ("k", k)):
        check_whole(name, value, 1)
    check_level(level)
    if tolerance is not None and not 0 < tolerance < 1:
        raise InvalidSetting(f"tolerance is {tolerance!r}; expected a number between 0 and 1, or None.")


def _exact(influence: ComposableInfluence, kind: str, tolerance: float) -> tuple[Method, str]:
    """The exact method, and how it inverts, in words."""
    dense = max(influence.provider.sizes.values()) <= DENSE
    method = exact_method(influence.method, kind, dense)
    if dense:
        return method, "dense"
    assert isinstance(method, Cg)
    return replace(method, tolerance=tolerance, preconditioner="auto"), f"conjugate gradients to {tolerance:g}"


def _chosen(
    influence: ComposableInfluence, loader: Iterable[object], queries: int, seed: int, progress: bool
) -> tuple[list[Any], np.ndarray, int]:
    """Queries drawn at random, in the loader's order: batches of them, their names, and how many there are in all."""
    visitor = Drawn(queries, seed) & Total[PlacedBatch, int](lambda piece: len(piece.batch))
    drawn, count = sweep_rows(influence.provider, loader, visitor, "queries", progress, "query")
    drawn.sort(key=lambda found: found[1])
    return join([row for *_, row, _ in drawn]), np.asarray([name for *_, name in drawn]), count


Draw = tuple[float, int, Any, Any]
"""A row's random number and position; the row as a batch of its own, and its name."""


@dataclass(frozen=True, eq=False)
class Drawn(Visitor[PlacedBatch, list[Draw], list[Draw]]):
    """The rows with the smallest random numbers, which depend on the seed and the row's position alone."""

    size: int
    seed: int

    def of(self, item: PlacedBatch) -> list[Draw]:
        positions, names = np.arange(item.start, item.start + len(item.batch)), item.names
        numbers = row_uniforms(positions, 1, draw=AUDITED, seed=self.seed)[:, 0, 0]
        return [
            (float(numbers[row]), int(positions[row]), item.batch.take(slice(int(row), int(row) + 1)), names[row])
            for row in np.argsort(numbers, kind="stable")[: self.size]
        ]

    def merge(self, one: list[Draw], other: list[Draw]) -> list[Draw]:
        return sorted([*one, *other], key=lambda draw: draw[0])[: self.size]
