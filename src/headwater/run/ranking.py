"""What a ranking is of: train rows or groups of them, for each query or for all as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np

from headwater.errors import InvalidSetting
from headwater.run.queries import Asked
from headwater.settings import check_word
from headwater.store.base import Tile
from headwater.store.ends import GroupSink, TopKSink
from headwater.store.scores import Scores
from headwater.store.topk import TopK

QueriesAs = Literal["each", "mean", "sum"]


@dataclass(frozen=True)
class Ranking:
    """The settings of `Attributor.top`. Errors: InvalidSetting; InvalidInput for labels that are no list."""

    k: int
    queries_as: str = "each"
    groups: Sequence[Any] | Mapping[Any, Any] | None = None
    of: str = "sum"

    def __post_init__(self) -> None:
        check_word("queries_as", self.queries_as, get_args(QueriesAs))
        self.sink(np.empty(0))

    def check_no_sum(self) -> None:
        """Errors: InvalidSetting where directions would be summed."""
        if self.queries_as == "sum" or (self.groups is not None and self.of == "sum"):
            asked = "queries_as='sum'" if self.queries_as == "sum" else "of='sum'"
            raise InvalidSetting(f"normalise= ranks rows by direction, and {asked} adds sizes; take the 'mean'.")

    def sink(self, query_ids: np.ndarray) -> TopKSink | GroupSink:
        """For the scores of these queries."""
        if self.groups is None:
            return TopKSink(self.k, query_ids)
        return GroupSink(self.k, query_ids, self.groups, self.of)

    def asked(self, asked: Asked) -> Asked:
        """The queries, as one where they are asked so: a score is linear in the query's gradient."""
        if self.queries_as == "each":
            return asked
        share = 1.0 / len(asked) if self.queries_as == "mean" else 1.0
        return replace(asked, ids=np.array([self.queries_as]), share=share)

    def of_scores(self, scores: Scores) -> TopK:
        """Of scores that are there, which stay where they are."""
        together = self.queries_as != "each"
        sink = self.sink(np.array([self.queries_as]) if together else scores.query_ids)
        for columns, tile in scores.columns():
            if together:
                tile = (tile.mean if self.queries_as == "mean" else tile.sum)(axis=0, keepdims=True)
            sink.write(Tile(int(columns.start or 0), scores.train_ids[columns], None, tile[None]))
        return sink.top()
