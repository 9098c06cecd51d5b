"""The slow plain way: the parameters in float64, and gradients by JAX alone, one row at a time."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import jax
import jax.numpy as jnp

from headwater.gradients.block import BlockGradient
from headwater.gradients.provider import BlockGradients
from headwater.jax import derivatives
from headwater.jax.batch import JaxBatch
from headwater.jax.provider import JaxGradientProvider


class PlainJaxProvider(JaxGradientProvider):
    """A function in float64 whose rows' gradients come from `jax.grad` alone: no capture, no batch, no algebra.

    What else is asked of a provider (draws of the Fisher information, products) is JaxGradientProvider's, in float64.
    Rows without ids are named by what they held before they became float64, so that random draws stay theirs.
    """

    @classmethod
    def copy_of(cls, provider: JaxGradientProvider) -> PlainJaxProvider:
        found = cls.__new__(cls)
        vars(found).update(vars(provider))
        found._leaves = {name: _double(leaf) for name, leaf in provider._leaves.items()}
        found._fingerprint = None
        return found

    def _ready(self, batch: Any) -> JaxBatch:
        batch = super()._ready(batch)
        ids = super().row_keys(batch) if batch.ids is None else batch.ids
        return JaxBatch(jax.tree.map(_double, batch.x), jax.tree.map(_double, batch.y), batch.weights, ids)

    def as_batch(self, x: Any, y: Any) -> JaxBatch:
        return self._ready(JaxBatch(x, y))

    def row_keys(self, batch: JaxBatch) -> Any:
        return super().row_keys(batch if batch.ids is not None else self._ready(batch))

    def grads(self, batch: JaxBatch, *, query: bool = False, weighted: bool = True) -> BlockGradients:
        batch = self._prepare(batch)
        model = self._measured if query else self._model
        parameters = [p.name for layout in self._plan.layouts for p in layout.block.parameters]
        chosen = {name: self._leaves[name] for name in parameters}
        rows = [batch.take(slice(k, k + 1)) for k in range(len(batch))]
        found = [derivatives.plain_gradient(model, chosen, self._leaves, row.x, row.y)[1] for row in rows]
        blocks: BlockGradients = OrderedDict()
        for name, layout in self.layouts.items():
            names = [p.name for p in layout.block.parameters]
            flat = jnp.stack([jnp.concatenate([grad[n].reshape(-1) for n in names]) for grad in found])
            value = BlockGradient.from_flat(layout, flat)
            weights = self.row_weights(batch) if weighted else None
            blocks[name] = value if weights is None else value.weighted(weights)
        return blocks


def _double(value: Any) -> Any:
    return value.astype(jnp.float64) if jnp.issubdtype(value.dtype, jnp.floating) else value
