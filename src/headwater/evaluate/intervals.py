"""A figure and where resampling puts it: what was drawn at random (subsets, groups, queries) is drawn again.

Two ways to lay percentiles of resampled values about a figure:

- `percentiles`, as they are: for means;
- `about`, shifted so that their median is the figure: for rank correlations, which a resample pulls down, because what
  it draws twice is tied.

Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import floor, isfinite, log10

import numpy as np
from numpy.typing import ArrayLike, NDArray

from headwater.errors import InvalidSetting, NonFiniteValue, ShapeMismatch


@dataclass(frozen=True)
class Interval:
    """A figure, and where resampling puts it."""

    value: float
    low: float
    high: float
    level: float = 0.9

    def __str__(self) -> str:
        """Three decimals, or as many as three digits of the largest take."""
        largest = max((abs(v) for v in (self.value, self.low, self.high) if isfinite(v) and v), default=1.0)
        # A figure of 1e-5 with three decimals would read 0.000.
        places = max(3, 2 - floor(log10(largest)))
        return f"{self.value:.{places}f} ({self.low:.{places}f} to {self.high:.{places}f})"


def resampled(count: int, resamples: int, seed: int) -> list[NDArray[np.int64]]:
    """Places drawn with replacement, `resamples` times: [count] each."""
    rng = np.random.default_rng(seed)
    return [rng.integers(count, size=count) for _ in range(resamples)]


def percentiles(value: float, draws: ArrayLike, level: float) -> Interval:
    """A value between the percentiles of its resampled values; NaN where nothing was resampled.

    Errors: InvalidSetting for a level that is no probability.
    """
    low, _, high = _quantiles(draws, level)
    return Interval(value, low, high, level)


def about(value: float, draws: ArrayLike, level: float) -> Interval:
    """A value, and the percentiles' distances from their median laid about it; NaN where nothing was resampled.

    Errors: InvalidSetting for a level that is no probability.
    """
    low, middle, high = _quantiles(draws, level)
    # Shifted, not reflected: a resample's median is biased, its spread is not.
    return Interval(value, value + low - middle, value + high - middle, level)


def over_queries(values: ArrayLike, *, resamples: int = 2000, level: float = 0.9, seed: int = 0) -> Interval:
    """The mean of one figure per query, and where resampling the queries puts it.

    Shapes: values [q]. Errors: NonFiniteValue naming the query; ShapeMismatch; InvalidSetting.
    """
    figures = np.asarray(values, dtype=np.float64)
    if figures.ndim != 1 or not len(figures):
        raise ShapeMismatch(f"Expected one figure for each query, (q,); got {figures.shape}.")
    if not np.isfinite(figures).all():
        bad = ~np.isfinite(figures)
        raise NonFiniteValue(f"{int(bad.sum())} figures are not finite, the first that of query {int(bad.argmax())}.")
    # Queries are what was drawn at random: the mean speaks of other queries like these.
    draws = [figures[chosen].mean() for chosen in resampled(len(figures), resamples, seed)]
    return percentiles(float(figures.mean()), draws, level)


def _quantiles(draws: ArrayLike, level: float) -> tuple[float, float, float]:
    """Low, median, high."""
    if not 0 < level < 1:
        raise InvalidSetting(f"level is {level}; expected a probability between 0 and 1.")
    drawn = np.asarray(draws, dtype=np.float64)
    if not drawn.size:
        return float("nan"), float("nan"), float("nan")
    low, middle, high = np.quantile(drawn, [(1 - level) / 2, 0.5, (1 + level) / 2])
    return float(low), float(middle), float(high)
