"""Scores as pictures, by matplotlib. Each draws on axes that are given, or on new ones, and returns them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from headwater.errors import MissingExtra
from headwater.store.ids import places_of
from headwater.store.score_matrix import ScoreMatrix
from headwater.store.summary import share_of_rows, totals
from headwater.tables import cut, visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HELPFUL, HARMFUL, LINE = "#2166ac", "#b2560d", "#444444"
"""Told apart by people who see few colours, and in grey."""


def _axes(ax: Axes | None, width: float = 6, height: float = 4) -> Axes:
    """Errors: MissingExtra without matplotlib."""
    if ax is not None:
        return ax
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtra("matplotlib", "plot") from None
    # Not by pyplot: that keeps every figure until it is closed, and may want a screen.
    return Figure(figsize=(width, height), layout="constrained").subplots()


def top(scores: ScoreMatrix, query: Any, k: int, ax: Axes | None) -> Axes:
    """The k most helpful and most harmful rows of a query, by its id, as bars."""
    where = places_of(scores.query_ids, query, "query")[:1]
    row = scores[where][0]
    order = np.argsort(-row, kind="stable")
    chosen = order if len(order) <= 2 * k else np.concatenate([order[:k], order[-k:]])
    axes = _axes(ax, height=1 + 0.3 * len(chosen))
    values = row[chosen][::-1]
    axes.barh(np.arange(len(chosen)), values, color=np.where(values > 0, HELPFUL, HARMFUL))
    axes.set_yticks(np.arange(len(chosen)), [cut(visible(str(name)), 30) for name in scores.train_ids[chosen][::-1]])
    axes.axvline(0, color=LINE, linewidth=0.8)
    axes.set_xlabel(f"{scores.unit_in_words}\n{scores.sign_in_words}", wrap=True)
    axes.set_title(f"query {cut(visible(str(query)), 40)}")
    return axes


def distribution(scores: ScoreMatrix, bins: int, ax: Axes | None) -> Axes:
    """How many scores are how large: a histogram, whose counts are on a logarithmic axis."""
    low = min(float(tile.min(initial=0.0)) for _, tile in scores.columns())
    high = max(float(tile.max(initial=0.0)) for _, tile in scores.columns())
    edges = np.linspace(low, high if high > low else low + 1.0, bins + 1)
    counts = np.zeros(bins, dtype=np.int64)
    for _, tile in scores.columns():
        counts += np.histogram(tile, edges)[0]
    axes = _axes(ax)
    middles = (edges[:-1] + edges[1:]) / 2
    axes.bar(middles, counts, width=np.diff(edges), color=np.where(middles > 0, HELPFUL, HARMFUL))
    axes.set_yscale("symlog", linthresh=1)
    axes.set_xlabel(scores.unit_in_words, wrap=True)
    axes.set_ylabel("pairs of a query and a train row")
    return axes


def concentration(scores: ScoreMatrix, ax: Axes | None) -> Axes:
    """Which share of all influence the strongest rows have, from the strongest on; the diagonal: nobody stands out."""
    by_row = np.sort(totals(scores))[::-1]
    axes = _axes(ax)
    across = np.arange(len(by_row) + 1) / len(by_row)
    axes.plot(across, np.concatenate([[0.0], np.cumsum(by_row) / (by_row.sum() or 1.0)]), color=HELPFUL)
    axes.plot([0, 1], [0, 1], color=LINE, linestyle=":")
    axes.set_xlabel("share of the train rows, strongest first")
    axes.set_ylabel("share of the sum of absolute scores")
    axes.set_title(f"half of all influence is with {share_of_rows(by_row, 0.5):.1%} of the rows")
    return axes
