"""A matrix of scores in a few numbers."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from headwater.store.score_matrix import ScoreMatrix
from headwater.tables import shown, table


@dataclass(frozen=True)
class Summary:
    """What `Scores.describe` gives; `print` shows a table."""

    queries: int
    rows: int
    unit_in_words: str
    method: str
    mean: float
    std: float
    min: float
    max: float
    helpful: float
    """The share of scores above zero."""
    half: float
    """The share of train rows that have half of the total of absolute scores: near .5 nobody stands out."""
    strongest: Any
    """The id of the row with the largest total of absolute scores."""
    strongest_share: float
    """Its share of the total of all."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        lines = [
            ["queries x train rows", f"{self.queries} x {self.rows}"],
            ["a score is", self.unit_in_words],
            ["method", self.method or "-"],
            ["mean, standard deviation", f"{shown(self.mean)}, {shown(self.std)}"],
            ["smallest, largest", f"{shown(self.min)}, {shown(self.max)}"],
            ["above zero (helpful)", f"{self.helpful:.1%}"],
            ["half of all influence", f"has {self.half:.1%} of the rows"],
            ["strongest row", f"{self.strongest} with {self.strongest_share:.2%} of all"],
        ]
        return table(lines, left=(0, 1))


def totals(scores: ScoreMatrix) -> np.ndarray:
    """Each train row's total of absolute scores over the queries: [train], float64."""
    found = np.empty(scores.shape[1])
    for columns, tile in scores.columns():
        found[columns] = np.abs(tile).sum(axis=0, dtype=np.float64)
    return found


def share_of_rows(totals: np.ndarray, part: float) -> float:
    """The smallest share of rows that has this part of the sum of totals [n]; NaN of a sum of zero."""
    total = totals.sum()
    if not total > 0:
        return float("nan")
    reached = np.cumsum(np.sort(totals)[::-1]) >= part * total
    return float((np.argmax(reached) + 1) / len(totals))


def summary(scores: ScoreMatrix) -> Summary:
    """In one reading of the matrix."""
    total, squares, above = 0.0, 0.0, 0
    low, high = np.inf, -np.inf
    by_row = np.zeros(scores.shape[1])
    for columns, tile in scores.columns():
        values = tile.astype(np.float64)
        total, squares, above = total + values.sum(), squares + (values**2).sum(), above + int((values > 0).sum())
        low, high = min(low, values.min(initial=np.inf)), max(high, values.max(initial=-np.inf))
        by_row[columns] = np.abs(values).sum(axis=0)
    count = scores.shape[0] * scores.shape[1]
    mean = total / count
    return Summary(
        queries=scores.shape[0],
        rows=scores.shape[1],
        unit_in_words=scores.unit_in_words,
        method=scores.method,
        mean=mean,
        std=float(np.sqrt(max(0.0, squares / count - mean**2))),
        min=float(low),
        max=float(high),
        helpful=above / count,
        half=share_of_rows(by_row, 0.5),
        strongest=scores.train_ids[int(by_row.argmax())].item(),
        strongest_share=float(by_row.max() / (by_row.sum() or np.nan)),
    )
