"""Directions instead of sizes: scores over the length of what meets in them, in the metric of the inverse curvature.

1. Where Op is symmetric and positive, |g|^2 = <Op g, g> is a squared length: a row's influence on itself. With
   R R = Op, a score is <R g_query, R g_train>, and |g| the length of R g.
2. normalise="both": score / (|g_query| |g_train|), the cosine of R g_query and R g_train, over all blocks together.
3. normalise="train": score / |g_train|, RelatIF: the query's own length is the same for all of its train rows, so that
   each query ranks them as in 2; only queries among themselves are compared otherwise.

Rows that are unusual influence every query: their length is large. A direction forgets the length, and with it the
unit: it ranks rows, and is no forecast of what removing one does. A row's weight has no part in it.

Sources: Barshan et al. 2020, arXiv 2003.11630 (RelatIF); Chang et al. 2024, arXiv 2410.17413 (two-sided, projected).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import numpy as np

from headwater.arrays import as_like, to_numpy
from headwater.errors import InvalidSetting, NoDirection
from headwater.gradients.provider import BlockGradients
from headwater.influence import ComposableInfluence
from headwater.mapper import Queries
from headwater.operators.iterative import unrecorded_solves
from headwater.rows import PlacedBatch
from headwater.store.score_matrix import NORMALISE, RANKINGS
from headwater.types import InfluenceMode


class Directions:
    """What the scores of one run are divided by. Rows that have no direction are noted, and score 0.

    Errors: InvalidSetting for an inverse that is not known to be symmetric and positive, or has a form of its own.
    """

    def __init__(self, influence: ComposableInfluence, unit: str) -> None:
        self.influence, self.of_queries = influence, unit == NORMALISE["both"]
        self.without: dict[str, list[Any]] = {"train": [], "query": []}
        check_inverse(influence)

    @classmethod
    def of(cls, influence: ComposableInfluence, unit: str, mode: InfluenceMode) -> Directions | None:
        """None for a unit that has sizes. Errors: as the class; InvalidSetting for changed inputs."""
        if unit not in RANKINGS:
            return None
        if mode is InfluenceMode.Perturbation:
            raise InvalidSetting("normalise= is about train rows' gradients, mode='perturbation' about their inputs.")
        return cls(influence, unit)

    def train(self, piece: PlacedBatch) -> np.ndarray:
        """1 / |g| of train rows: [n]."""
        return self._noted("train", piece.grads(self.influence.provider), piece.names)

    def queries(self, queries: Queries, grads: BlockGradients, names: np.ndarray) -> Queries:
        """The queries over their lengths, where these count. grads: as the provider gives them."""
        if not self.of_queries:
            return queries
        found = self._noted("query", grads, names)
        return queries.weighted(as_like(found, next(iter(grads.values())).like))

    def _noted(self, role: str, grads: BlockGradients, names: np.ndarray) -> np.ndarray:
        found = inverse_lengths(self.influence, grads)
        if not found.all():
            self.without[role].extend(np.asarray(names)[found == 0].tolist())
        return found

    def tell(self) -> None:
        """Warns: NoDirection, for rows whose gradient has no length."""
        for role, names in self.without.items():
            told = list(dict.fromkeys(names))
            names.clear()
            if told:
                warnings.warn(NoDirection(_said(role, told)), stacklevel=2)


def inverse_lengths(influence: ComposableInfluence, grads: BlockGradients) -> np.ndarray:
    """1 / sqrt <Op g, g>, over all blocks together, and 0 where that is nothing or not positive: float64 [n]."""
    with unrecorded_solves():  # `scores.residuals` are those of the queries
        square = to_numpy(influence.self_influence_of(grads)).astype(np.float64)
    # Of an inverse that is positive, only rounding is below zero; a NaN goes on, and is refused with its scores.
    there = ~(square <= 0)
    return np.where(there, 1.0 / np.sqrt(np.where(there, square, 1.0)), 0.0)


def check_inverse(influence: ComposableInfluence) -> None:
    """Errors: InvalidSetting for an inverse without a square root."""
    mapper = influence.ready()
    for name, operator in mapper.operators.items():
        if name in mapper.own_forms:
            raise InvalidSetting(f"Block {name!r} scores by a form of its own: its gradients have no length in it.")
        if not (operator.symmetric and operator.psd):
            raise InvalidSetting(
                f"The inverse of block {name!r} ({influence.method.describe()}) is not known to be symmetric and "
                "positive, so that gradients have no length in it. Use curvature='ggn' or 'fisher', or hw.Direct() "
                "with enough damping."
            )


def _said(role: str, names: Iterable[Any]) -> str:
    many = list(names)
    shown = ", ".join(map(str, many[:5])) + (", ..." if len(many) > 5 else "")
    rows = f"{len(many)} {role} row{'' if len(many) == 1 else 's'}"
    return f"{rows} ({shown}) have no direction: their influence on themselves is zero. Their scores are 0."
