"""The one weighted accumulator of everything that is a mean over rows."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any, Generic, TypeVar

from headwater.arrays import Array, namespace, precise
from headwater.errors import InvalidInput
from headwater.gradients.provider import StructuredGradientProvider
from headwater.rows import Accumulator, PlacedBatch
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

    def pack(self) -> dict[str, Any]:
        """As named values, for `of`."""
        return {"total": self._total, "weight": self.weight}

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> WeightedMean[Value]:
        """What `pack` gave."""
        found = cls()
        found.add(values["total"], values["weight"])
        return found

    @property
    def value(self) -> Value:
        return self._total / positive_weight(self.weight)


Means = OrderedDict[str, WeightedMean[Array]]
"""By block."""


def no_means(blocks: Iterable[str]) -> Means:
    """Of no rows yet."""
    return OrderedDict((name, WeightedMean[Array]()) for name in blocks)


def pack_means(means: Mapping[str, WeightedMean[Array]]) -> dict[str, Any]:
    """As named values, for `unpack_means`."""
    return {f"{name}/{each}": value for name, mean in means.items() for each, value in mean.pack().items()}


def unpack_means(values: Mapping[str, object]) -> Means:
    """What `pack_means` gave, in the same order."""
    found: OrderedDict[str, dict[str, Any]] = OrderedDict()
    for key, value in values.items():
        name, _, each = key.rpartition("/")
        found.setdefault(name, {})[each] = value
    return OrderedDict((name, WeightedMean.of(mean)) for name, mean in found.items())


class MeansVisitor(Accumulator[PlacedBatch, Means, Means]):
    """A visitor whose parts are means by block: a subclass has `start` and `add`."""

    def merge(self, one: Means, other: Means) -> Means:
        """Of the rows of both; `one` is changed."""
        for name, mean in other.items():
            one[name].merge(mean)
        return one

    @property
    def is_shareable(self) -> bool:
        return True

    def pack(self, part: Means) -> dict[str, Any]:
        return pack_means(part)

    def unpack(self, values: Mapping[str, object]) -> Means:
        return unpack_means(values)


def rows_of(means: Means) -> float:
    """The rows' total weight."""
    return next(iter(means.values())).weight


def positive_weight(weight: float) -> float:
    """The rows' total weight. Errors: InvalidInput unless it is positive."""
    if not weight > 0:
        raise InvalidInput(f"The rows' weights sum to {weight:g}; a mean needs a positive sum.")
    return weight
