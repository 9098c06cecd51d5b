"""The slow plain way: parameters in float64, and gradients by `jax.grad` alone, one row at a time.

No capture, no batch, no algebra; curvature where a row has few outputs, J written out in reverse mode. A provider with
`plain=True` computes like this; draws of the Fisher information and products of many outputs are its usual ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from headwater.gradients.provider import Kind
from headwater.jax import derivatives
from headwater.jax.batch import JaxBatch
from headwater.jax.derivatives import Model
from headwater.jax.losses import loss_of_row, split_floating
from headwater.jax.tree import Leaves


def gradients(model: Model, chosen: Leaves, leaves: Leaves, rows: Iterable[JaxBatch]) -> list[Leaves]:
    """The gradient of each row's loss by the chosen parameters; rows: batches of one."""
    return [derivatives.plain_gradient(model, chosen, leaves, row.x, row.y)[1] for row in rows]


def product(
    model: Model,
    kind: Kind,
    vectors: jax.Array,
    chosen: Leaves,
    leaves: Leaves,
    rows: Sequence[JaxBatch],
    weights: jax.Array | None,
) -> jax.Array | None:
    """The rows' summed curvature by the chosen parameters times vectors: (K, D); None for a GGN of many outputs."""
    total = jnp.zeros_like(vectors, dtype=jnp.float64)
    for k, row in enumerate(rows):
        if kind == "ggn" and _numbers_of_output(model, leaves, row.x) > MOST_OUTPUTS:
            return None
        mine = _products_of_row(model, kind, vectors.astype(jnp.float64), chosen, leaves, row.x, row.y)
        total = total + (mine if weights is None else mine * weights[k])
    return total


def rows_of(batch: JaxBatch) -> list[JaxBatch]:
    """Batches of one row."""
    return [batch.take(slice(k, k + 1)) for k in range(len(batch))]


def doubled(batch: JaxBatch, ids: object) -> JaxBatch:
    """The batch in float64. ids: of its rows, by what they held before, so that random draws stay theirs."""
    return JaxBatch(jax.tree.map(double, batch.x), jax.tree.map(double, batch.y), batch.weights, ids)


MOST_OUTPUTS = 512
"""Numbers of output of a row up to which its Jacobian is written out."""


def _numbers_of_output(model: Model, leaves: Leaves, x: object) -> int:
    return sum(v.size for v in jax.tree.leaves(jax.eval_shape(model, leaves, x)))


@partial(jax.jit, static_argnums=(0, 1))
def _products_of_row(
    model: Model, kind: Kind, vectors: jax.Array, chosen: Leaves, leaves: Leaves, x: object, y: object
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


def double(value: Any) -> Any:
    return value.astype(jnp.float64) if jnp.issubdtype(value.dtype, jnp.floating) else value
