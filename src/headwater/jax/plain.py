"""The slow plain way: the parameters in float64, and gradients by JAX alone, one row at a time."""

from __future__ import annotations

from collections import OrderedDict
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from headwater.gradients.block import BlockGradient
from headwater.gradients.provider import BlockGradients, Kind
from headwater.jax import derivatives
from headwater.jax.batch import JaxBatch
from headwater.jax.derivatives import Model
from headwater.jax.losses import loss_of_row, split_floating
from headwater.jax.provider import JaxGradientProvider
from headwater.jax.tree import Leaves


class PlainJaxProvider(JaxGradientProvider):
    """A function in float64 whose rows' gradients come from `jax.grad` alone: no capture, no batch, no algebra.

    So does their curvature where a row has few outputs, J written out in reverse mode. What else is asked of a provider
    (draws of the Fisher information, products of many outputs) is JaxGradientProvider's, in float64. Rows without ids
    are named by what they held before they became float64, so that random draws stay theirs.
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

    def curvature_product(self, batch: JaxBatch, block: str, vectors: jax.Array, kind: Kind) -> jax.Array:
        batch = self._prepare(batch)
        parameters = self.layouts[block].block.parameters
        chosen = {p.name: self._leaves[p.name] for p in parameters}
        weights = self.row_weights(batch)
        total = jnp.zeros_like(vectors, dtype=jnp.float64)
        for k in range(len(batch)):
            row = batch.take(slice(k, k + 1))
            if kind == "ggn" and _numbers_of_output(self._model, self._leaves, row.x) > MOST_OUTPUTS:
                return super().curvature_product(batch, block, vectors, kind)
            mine = _products_of_row(self._model, kind, vectors.astype(jnp.float64), chosen, self._leaves, row.x, row.y)
            total = total + (mine if weights is None else mine * weights[k])
        return total


MOST_OUTPUTS = 512
"""Numbers of output of a row up to which its Jacobian is written out."""


def _numbers_of_output(model: Model, leaves: Leaves, x: Any) -> int:
    return sum(v.size for v in jax.tree.leaves(jax.eval_shape(model, leaves, x)))


@partial(jax.jit, static_argnums=(0, 1))
def _products_of_row(
    model: Model, kind: Kind, vectors: jax.Array, chosen: Leaves, leaves: Leaves, x: Any, y: Any
) -> jax.Array:
    """One row's Hessian or GGN by the chosen parameters, in their order, times vectors: (K, D)."""
    sizes = [value.size for value in chosen.values()]

    def built(flat: jax.Array) -> Leaves:
        pieces = jnp.split(flat, np.cumsum(sizes)[:-1])
        mine = {name: piece.reshape(chosen[name].shape) for name, piece in zip(chosen, pieces, strict=True)}
        return {**leaves, **mine}

    flat = jnp.concatenate([value.reshape(-1) for value in chosen.values()])
    if kind == "hessian":
        slope = jax.grad(lambda flat: loss_of_row(model.loss, model(built(flat), x), y))
        return jax.vmap(jax.grad(lambda flat, v: jnp.vdot(slope(flat), v)), in_axes=(None, 0))(flat, vectors)

    moving, rest = split_floating(model(leaves, x))
    ends = np.cumsum([value.size for value in moving])[:-1]

    def outputs(flat: jax.Array) -> jax.Array:
        return jnp.concatenate([value.reshape(-1) for value in split_floating(model(built(flat), x))[0]])

    def loss(output: jax.Array) -> jax.Array:
        pieces = zip(jnp.split(output, ends), moving, strict=True)
        return loss_of_row(model.loss, rest([piece.reshape(value.shape) for piece, value in pieces]), y)

    jacobian = jax.jacrev(outputs)(flat)
    return vectors @ jacobian.T @ jax.jacrev(jax.grad(loss))(outputs(flat)) @ jacobian


def _double(value: Any) -> Any:
    return value.astype(jnp.float64) if jnp.issubdtype(value.dtype, jnp.floating) else value
