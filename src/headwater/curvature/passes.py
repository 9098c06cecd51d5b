"""Passes over a data loader, and the one weighted accumulator of everything that is a mean over rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, Generic, TypeVar

from headwater.arrays import namespace, precise
from headwater.errors import BatchMismatch, InvalidInput
from headwater.gradients.provider import StructuredGradientProvider
from headwater.progress import track
from headwater.types import Batch

Value = TypeVar("Value")


def batches(
    provider: StructuredGradientProvider, loader: Iterable[Any], what: str, show: bool = False
) -> Iterator[Batch]:
    """The loader's batches as the framework's, empty ones left out, large ones cut to what the provider takes at once.

    Errors: InvalidInput for a loader that can be read only once, or an item that is no batch; BatchMismatch for a
    loader without rows.
    """
    if isinstance(loader, Iterator):
        raise InvalidInput(
            f"The loader is a {type(loader).__name__}, which can be read only once; pass something that can be "
            "iterated again, such as a list of batches or a DataLoader."
        )
    empty = True
    provider.begin_pass()
    for item in track(loader, what, show):
        batch = as_batch(provider, item)
        if batch is not None:
            empty = False
            yield from _pieces(provider, batch)
    if empty:
        raise BatchMismatch(f"The loader has no rows ({what}).")


def _pieces(provider: StructuredGradientProvider, batch: Any) -> Iterator[Any]:
    """The batch, or nearly equal pieces of it that the provider takes at once."""
    pieces = -(-len(batch) // max(1, provider.rows_at_once(batch)))
    if pieces == 1:
        yield batch
        return
    step = -(-len(batch) // pieces)
    for start in range(0, len(batch), step):
        yield batch.take(slice(start, start + step))


def as_batch(provider: StructuredGradientProvider, item: Any) -> Batch | None:
    """One item of a loader: a Batch, or (x, y). None if it has no rows."""
    if isinstance(item, Batch) and len(item):
        return _as_own(provider, item) if type(item) is Batch else item
    if isinstance(item, Batch):
        return None
    if isinstance(item, (tuple, list)) and len(item) == 2:
        return provider.as_batch(*item) if len(Batch(*item)) else None
    length = f" of {len(item)} entries" if isinstance(item, (tuple, list)) else ""
    raise InvalidInput(f"A loader gives (x, y) or a Batch, not {type(item).__name__}{length}. One batch is [(x, y)].")


def _as_own(provider: StructuredGradientProvider, batch: Batch) -> Batch:
    """A plain batch as the provider's kind, with the weights and ids that it has.

    Errors: InvalidInput for weights that the provider knows nothing of.
    """
    own = provider.as_batch(batch.x, batch.y)
    if batch.weights is None and batch.ids is None:
        return own
    own = replace(own, weights=batch.weights, ids=batch.ids)
    if batch.weights is not None and provider.row_weights(own) is None:
        raise InvalidInput(
            f"The batch has weights, and {type(provider).__name__} knows no weights of rows: its row_weights gives "
            "None. Leave them out, or let row_weights return them and grads multiply by them."
        )
    return own


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

    @property
    def value(self) -> Value:
        return self._total / positive_weight(self.weight)


def positive_weight(weight: float) -> float:
    """The rows' total weight. Errors: InvalidInput unless it is positive."""
    if not weight > 0:
        raise InvalidInput(f"The rows' weights sum to {weight:g}; a mean needs a positive sum.")
    return weight
