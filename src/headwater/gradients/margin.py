"""A provider whose function is the margin: train rows count as much as the model doubts them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from headwater.arrays import Array, namespace
from headwater.blocks import Layout
from headwater.errors import UnsupportedModel
from headwater.gradients.provider import BlockGradients, Fisher, Kind, OutputFunction, StructuredGradientProvider
from headwater.types import Batch


class MarginGradientProvider(StructuredGradientProvider[Any, Any]):
    """Query rows have the gradient of minus the margin f = log p/(1-p); train rows have that times 1 - p.

    For cross entropy, (1 - p) times the gradient of -f is exactly the gradient of the loss. Curvature is that of the
    unscaled gradients. A measurement of the user's own takes the margin's place for query rows. In perturbation mode
    the factor 1 - p is differentiated too: the input moves the doubt as well as the margin's gradient. That is the
    mixed gradient of the cross entropy, so it needs a model whose loss that is (UnsupportedModel for any other).

    1 - p is the sigmoid of the margin provider's losses, or what its `doubt(batch)` says, where it has one (several
    models: the mean of their doubts). Source: Park et al. 2023, arXiv 2303.14186.
    """

    def __init__(self, plain: StructuredGradientProvider):
        self.plain = plain
        self.margin = plain.of_output("margin")

    @property
    def layouts(self) -> OrderedDict[str, Layout]:
        return self.margin.layouts

    @property
    def explained(self) -> str:
        return "margin" if self.plain.explained == "loss" else self.plain.explained

    def grads(self, batch: Any, *, query: bool = False, weighted: bool = True) -> BlockGradients:
        if query:
            asked = self.margin if self.plain.explained == "loss" else self.plain
            return asked.grads(batch, query=True, weighted=weighted)
        return _scaled(self.margin.grads(batch, weighted=weighted), self.doubt(batch))

    def self_grads(self, batch: Any) -> BlockGradients:
        """Gradients whose length, in any metric, is the score of a row on itself: the margin's times sqrt(1 - p)."""
        return _scaled(self.margin.grads(batch), self.doubt(batch) ** 0.5)

    def doubt(self, batch: Any) -> Array:
        """1 - p, the chance of another answer than the row's target: [n]."""
        own = getattr(self.margin, "doubt", None)
        return own(batch) if own is not None else _sigmoid(self.margin.losses(batch))

    def mixed_prod(self, batch: Any, factors: Mapping[str, Array]) -> Array:
        self._need_cross_entropy(batch)
        return self.plain.mixed_prod(batch, factors)

    def flat_mixed_grads(self, batch: Any) -> Array:
        self._need_cross_entropy(batch)
        return self.plain.flat_mixed_grads(batch)

    def _need_cross_entropy(self, batch: Any) -> None:
        """Errors: UnsupportedModel unless the rows' losses are log(1 + exp(-f)), whose gradient is (1 - p) grad -f."""
        losses, expected = self.plain.losses(batch), _softplus(self.margin.losses(batch))
        xp = namespace(losses)
        allowed = float(xp.finfo(losses.dtype).eps) ** 0.5 * (1.0 + float(xp.max(xp.abs(losses))))
        gap = float(xp.max(xp.abs(losses - expected)))
        if not gap <= allowed:
            raise UnsupportedModel(
                "mode='perturbation' with margins differentiates (1 - p) times the margin's gradient, which is the "
                f"gradient of the cross entropy; the loss of this model is another one (off by {gap:.2g}). Use "
                "output='loss', or mode='up'."
            )

    def losses(self, batch: Any, *, query: bool = False) -> Array:
        if query and self.plain.explained != "loss":
            return self.plain.losses(batch, query=True)
        return self.margin.losses(batch)

    def fisher_grads(
        self, batch: Any, fisher: Fisher, *, draws: range = range(1), seed: int = 0
    ) -> list[BlockGradients]:
        if fisher == "empirical":
            return [self.margin.grads(batch, weighted=False)]
        return self.margin.fisher_grads(batch, fisher, draws=draws, seed=seed)

    def curvature_product(self, batch: Any, block: str, vectors: Array, kind: Kind) -> Array:
        return self.margin.curvature_product(batch, block, vectors, kind)

    def of_output(self, function: OutputFunction) -> StructuredGradientProvider:
        return self.plain.of_output(function)

    def block_scale(self, block: str) -> float:
        return self.plain.block_scale(block)

    def parameters(self, block: str) -> Array:
        return self.plain.parameters(block)

    def as_batch(self, x: Any, y: Any) -> Batch:
        return self.plain.as_batch(x, y)

    def row_weights(self, batch: Any) -> Array | None:
        return self.plain.row_weights(batch)

    @property
    def form(self) -> int:
        return self.margin.form

    def begin_pass(self) -> None:
        self.plain.begin_pass()
        self.margin.begin_pass()

    def own_precision(self) -> AbstractContextManager[Any]:
        return self.plain.own_precision()

    def rows_at_once(self, batch: Any) -> int:
        return self.margin.rows_at_once(batch)

    def row_keys(self, batch: Any) -> np.ndarray:
        return self.plain.row_keys(batch)

    def content_keys(self, batch: Any) -> np.ndarray:
        return self.plain.content_keys(batch)

    @property
    def normalisation(self) -> str | None:
        return self.plain.normalisation

    @property
    def coverage_fraction(self) -> float:
        return self.plain.coverage_fraction

    def fingerprint(self) -> tuple[Any, ...]:
        return self.plain.fingerprint()


def _scaled(values: BlockGradients, scale: Array) -> BlockGradients:
    """Row n times scale[n]."""
    xp = namespace(scale)
    return OrderedDict((name, value.weighted(xp.astype(scale, value.like.dtype))) for name, value in values.items())


def _softplus(x: Array) -> Array:
    """log(1 + exp(x)) without overflow."""
    xp = namespace(x)
    return xp.logaddexp(xp.zeros_like(x), x)


def _sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)) without overflow."""
    return namespace(x).exp(-_softplus(-x))
