"""Ways in which projected methods have been wrong, and quick laws that must notice each."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache
from typing import Any
from unittest.mock import patch

import models
from projected_truth import ProjectedTruth, shared_by
from truth import assert_close, fitted

import headwater as hw
from headwater.gradients.margin import MarginGradientProvider
from headwater.methods.projected import FactGrass, LoGra, LoRif, Trak
from headwater.operators import projection
from headwater.operators.algebra import IdentityOperator, ScaledOperator
from headwater.operators.projected import ProjectedOperator, ProjectionSide
from headwater.operators.projection import LowRankProjection

METHODS = (Trak(7), LoGra(3), LoGra((3, 2), "pca"), LoRif(3, rank=1, kept=5), FactGrass((2, 3), mask=4))


@cache
def truth_of(name: str) -> ProjectedTruth:
    return ProjectedTruth(models.CASES[name]())


def _law(case: str, method: Any) -> Callable[[], None]:
    def law() -> None:
        truth = truth_of(case)
        found = truth.case
        with patch.object(projection, "mixing", shared_by):
            influence = fitted(found, method, "full", damping=hw.relative(0.1))
            damping = truth.damping_of(method, "full", 0.1)
            expected, condition = truth.projected_scores(method, "full", damping)
            got = influence.influences(found.x_query, found.y_query, found.x, found.y)
        assert_close(got, expected["full"], condition)

    law.__name__ = f"{type(method).__name__}_equals_formula_on_{case}"
    return law


LAWS: tuple[Callable[[], None], ...] = tuple(_law("images", method) for method in METHODS)

Mutant = Callable[[], AbstractContextManager[Any]]


def _to_identity(inverse: Any) -> Any:
    def wrong(self: ProjectedOperator, damping: float = 0.0) -> ProjectedOperator:
        scale = 1.0 / (self.mean_eigenvalue() + damping)
        core = ScaledOperator(scale, IdentityOperator(self.core.input_size))
        return ProjectedOperator(self.projection, core, rows=self.rows)

    return wrong


def _replaced(owner: Any, attribute: str, make: Callable[[Any], Any]) -> Mutant:
    return lambda: patch.object(owner, attribute, make(getattr(owner, attribute)))


MUTANTS: dict[str, Mutant] = {
    "the projected inverse is a multiple of the identity": _replaced(ProjectedOperator, "inverse", _to_identity),
    "the projected curvature is not damped": _replaced(
        ProjectedOperator, "inverse", lambda f: lambda self, damping=0.0: f(self, 1e-6 * damping)
    ),
    "train rows go through the core too": _replaced(
        ProjectedOperator,
        "block_sides",
        lambda f: lambda self, queries, count: (ProjectionSide(self.projection, self.core),) * 2,
    ),
    "train rows are not scaled by 1 - p": _replaced(
        MarginGradientProvider,
        "grads",
        lambda f: lambda self, batch, *, query=False, weighted=True: self.margin.grads(batch, weighted=weighted),
    ),
    "the moment is that of the scaled gradients": _replaced(
        MarginGradientProvider, "fisher_grads", lambda f: lambda self, batch, fisher, **options: [self.grads(batch)]
    ),
    "rows are cut in the moment but not in the scores": _replaced(
        LowRankProjection, "seen", lambda f: lambda self, value: value
    ),
    "rows are cut in the scores but not in the moment": _replaced(
        LowRankProjection, "stored", lambda f: lambda self, value: self.apply_block(value)
    ),
    "relative damping is relative to the mean over all parameters": _replaced(
        ProjectedOperator, "mean_eigenvalue", lambda f: lambda self: self.trace() / self.input_size
    ),
}
for _method in (Trak, LoGra, LoRif, FactGrass):
    MUTANTS[f"{_method.__name__} inverts to a multiple of the identity"] = _replaced(
        _method, "invert", lambda f: lambda self, curvature, damping: _to_identity(None)(curvature, damping)
    )
