"""A provider that looks at another one: a subclass shows what it changes, and this base forwards all the rest.

A view may not inherit an answer that is not its own: every question that `StructuredGradientProvider` answers by
default is forwarded here, and tests/gradients/test_views.py walks that class to see it. What follows from other
answers, as `flat_grads` does from `grads`, is not forwarded: it follows from the view's.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Self

import numpy as np

from headwater.arrays import Array
from headwater.blocks import Layout
from headwater.gradients.likelihoods import Likelihood
from headwater.gradients.provider import (
    BlockGradients,
    Fisher,
    Kind,
    Linearised,
    OutputFunction,
    StructuredGradientProvider,
)
from headwater.gradients.together import Together
from headwater.types import Batch


class ProviderView(StructuredGradientProvider[Any, Any]):
    """The provider `plain`, unchanged."""

    def __init__(self, plain: StructuredGradientProvider):
        self.plain = plain

    def _over(self, plain: StructuredGradientProvider) -> Self:
        """The same view of another provider."""
        return type(self)(plain)

    # Blocks -------------------------------------------------------------------------------------------------------

    @property
    def layouts(self) -> OrderedDict[str, Layout]:
        return self.plain.layouts

    def block_scale(self, block: str) -> float:
        return self.plain.block_scale(block)

    def penalty(self, block: str, weight: float) -> Array | None:
        return self.plain.penalty(block, weight)

    def parameters(self, block: str) -> Array:
        return self.plain.parameters(block)

    # Gradients ----------------------------------------------------------------------------------------------------

    def grads(self, batch: Batch, *, query: bool = False, weighted: bool = True) -> BlockGradients:
        return self.plain.grads(batch, query=query, weighted=weighted)

    def fisher_grads(
        self, batch: Batch, fisher: Fisher, *, draws: range = range(1), seed: int = 0
    ) -> list[BlockGradients]:
        return self.plain.fisher_grads(batch, fisher, draws=draws, seed=seed)

    def ggn_grads(self, batch: Batch) -> list[BlockGradients] | None:
        return self.plain.ggn_grads(batch)

    def curvature_product(self, batch: Batch, block: str, vectors: Array, kind: Kind) -> Array:
        return self.plain.curvature_product(batch, block, vectors, kind)

    def linearised(self, batch: Batch, block: str, kind: Kind) -> Linearised | None:
        return self.plain.linearised(batch, block, kind)

    def mixed_prod(self, batch: Batch, factors: Mapping[str, Array]) -> Array:
        return self.plain.mixed_prod(batch, factors)

    def flat_mixed_grads(self, batch: Batch) -> Array:
        return self.plain.flat_mixed_grads(batch)

    def losses(self, batch: Batch, *, query: bool = False) -> Array:
        return self.plain.losses(batch, query=query)

    def curvature_scale(self, self_scale: Array | None) -> Array | None:
        return self.plain.curvature_scale(self_scale)

    def one_minus_p(self, batch: Batch) -> Array:
        return self.plain.one_minus_p(batch)

    def labels_of(self, y: Any) -> Any:
        return self.plain.labels_of(y)

    def predicted(self, batch: Batch) -> Batch:
        return self.plain.predicted(batch)

    # Other providers ----------------------------------------------------------------------------------------------

    def of_output(self, function: OutputFunction) -> StructuredGradientProvider:
        return self._over(self.plain.of_output(function))

    def in_float64(self) -> StructuredGradientProvider | None:
        found = self.plain.in_float64()
        return None if found is None else self._over(found)

    def each(self, change: Callable[[StructuredGradientProvider], StructuredGradientProvider]) -> Any:
        """The view is changed, not what it looks at."""
        return change(self)

    # Rows ---------------------------------------------------------------------------------------------------------

    def as_batch(self, x: object, y: object) -> Any:
        return self.plain.as_batch(x, y)

    def row_weights(self, batch: Batch) -> Array | None:
        return self.plain.row_weights(batch)

    def row_keys(self, batch: Batch) -> np.ndarray:
        return self.plain.row_keys(batch)

    def content_keys(self, batch: Batch) -> np.ndarray:
        return self.plain.content_keys(batch)

    def keys_by_content(self, batch: Batch) -> np.ndarray:
        return self.plain.keys_by_content(batch)

    def host_arrays(self, batch: Batch, weighted: bool = False) -> list[np.ndarray]:
        return self.plain.host_arrays(batch, weighted)

    def rows_at_once(self, batch: Batch) -> int:
        return self.plain.rows_at_once(batch)

    def begin_pass(self) -> None:
        self.plain.begin_pass()

    def end_pass(self, failed: bool = False) -> None:
        self.plain.end_pass(failed)

    @property
    def together(self) -> Together | None:
        return self.plain.together

    def own_precision(self) -> AbstractContextManager[object]:
        return self.plain.own_precision()

    # What is known ------------------------------------------------------------------------------------------------

    def fingerprint(self) -> tuple[object, ...]:
        return self.plain.fingerprint()

    def settings(self) -> tuple[str, ...]:
        return self.plain.settings()

    @property
    def views(self) -> tuple[str, ...]:
        return type(self).__name__, *self.plain.views

    @property
    def architecture(self) -> str:
        return self.plain.architecture

    @property
    def form(self) -> int:
        return self.plain.form

    @property
    def likelihood(self) -> Likelihood | None:  # type: ignore[override]
        return self.plain.likelihood

    @property
    def explained(self) -> str:
        return self.plain.explained

    @property
    def normalisation(self) -> str | None:
        return self.plain.normalisation

    @property
    def dtype(self) -> str:
        return self.plain.dtype

    @property
    def device(self) -> Any:
        return self.plain.device

    @property
    def needs_rows(self) -> bool:
        return self.plain.needs_rows

    @property
    def coverage_fraction(self) -> float:
        return self.plain.coverage_fraction
