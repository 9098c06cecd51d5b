"""The one weighted accumulator of everything that is a mean over rows."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Any, Generic, TypeVar

from headwater.arrays import Array, namespace, precise
from headwater.errors import InvalidInput
from headwater.gradients.provider import StructuredGradientProvider
from headwater.types import Batch

Value = TypeVar("Value")


def total_weight(provider: StructuredGradientProvider, batch: Batch) -> float:
    """The number of rows, each counted with its weight."""
    weights = provider.row_weights(batch)
    return float(len(batch)) if weights is None else float(namespace(weights).sum(precise(weights)))


class WeightedMean(Generic[Value]):
    """sum of values over sum of weights: the mean over rows, whatever batches they came in."""

    def __init__(self) -> None:
        self._total: Any = None
        self.weight = 0.0

    def add(self, weighted_sum: Value, weight: float) -> None:
        """A batch's contribution: its weighted sum, and its rows' total weight."""
        self._total = weighted_sum if self._total is None else self._total + weighted_sum
        self.weight += weight

    def merge(self, other: WeightedMean[Value]) -> None:
        """The rows of another mean, too."""
        self.add(other._total, other.weight)

    @property
    def value(self) -> Value:
        return self._total / positive_weight(self.weight)


Means = OrderedDict[str, WeightedMean[Array]]
"""By block."""


def no_means(blocks: Iterable[str]) -> Means:
    """Of no rows yet."""
    return OrderedDict((name, WeightedMean[Array]()) for name in blocks)


def merged(one: Means, other: Means) -> Means:
    """Of the rows of both; `one` is changed."""
    for name, mean in other.items():
        one[name].merge(mean)
    return one


def rows_of(means: Means) -> float:
    """The rows' total weight."""
    return next(iter(means.values())).weight


def positive_weight(weight: float) -> float:
    """The rows' total weight. Errors: InvalidInput unless it is positive."""
    if not weight > 0:
        raise InvalidInput(f"The rows' weights sum to {weight:g}; a mean needs a positive sum.")
    return weight
