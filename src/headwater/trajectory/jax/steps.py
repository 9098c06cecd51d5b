"""A JAX function's training steps, taken again: gradients, and cotangents pulled through them for all queries at once.

One jvp of the rows' losses along a cotangent r gives <r, grad l_i> for all rows; the vjp of that is H r.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from headwater.jax.derivatives import Model, rows_alone
from headwater.jax.losses import row_losses, split_floating
from headwater.jax.provider import JaxGradientProvider
from headwater.trajectory.rules import Arrays, State
from headwater.trajectory.steps import Blocks, Piece, Point, TrainingModel


class JaxTraining(TrainingModel):
    """The function of a provider, whatever its present parameters."""

    def __init__(self, provider: JaxGradientProvider):
        self.provider = provider
        self._own = dict(provider.leaves)

    def put(self, state: State) -> State:
        def own(values: Any) -> Any:
            return {name: jnp.asarray(value, dtype=self._own[name].dtype) for name, value in values.items()}

        return State(own(state.parameters), {kind: own(values) for kind, values in state.memory.items()})

    def at(self, parameters: Arrays, pieces: Sequence[Piece], curvature: str | None) -> Point:
        return JaxPoint(self, parameters, pieces, curvature)

    def gradient(self, parameters: Arrays, pieces: Sequence[Piece]) -> Arrays:
        found: Any = None
        for x, y, shares in self.ready(pieces):
            mine = _gradient(self.provider.trained_model, parameters, self.fixed(parameters), x, y, shares)
            found = mine if found is None else jax.tree.map(jnp.add, found, mine)
        return jax.tree.map(jnp.zeros_like, dict(parameters)) if found is None else dict(found)

    def query_grads(self, parameters: Arrays, batch: Any) -> Arrays:
        own = self.provider.as_batch(batch.x, batch.y)
        return dict(_row_gradients(self.provider.explained_model, parameters, self.fixed(parameters), own.x, own.y))

    def query_losses(self, parameters: Arrays, batch: Any) -> np.ndarray:
        own = self.provider.as_batch(batch.x, batch.y)
        found = _losses(self.provider.explained_model, parameters, self.fixed(parameters), own.x, own.y)
        return np.asarray(found, dtype=np.float64)

    def wide(self) -> TrainingModel | None:
        wide = None if self.provider.dtype == "float64" else self.provider.in_float64()
        return None if wide is None else JaxTraining(wide)

    def fixed(self, parameters: Arrays) -> dict[str, Any]:
        """Leaves that are not trained."""
        return {name: value for name, value in self._own.items() if name not in parameters}

    def ready(self, pieces: Sequence[Piece]) -> list[tuple[Any, Any, Any]]:
        """x, y and shares of each piece."""
        found = []
        for piece in pieces:
            batch = self.provider.as_batch(piece.batch.x, piece.batch.y)
            found.append((batch.x, batch.y, jnp.asarray(piece.shares)))
        return found


class JaxPoint(Point):
    """The objective of a step at some parameters."""

    def __init__(self, model: JaxTraining, parameters: Arrays, pieces: Sequence[Piece], curvature: str | None):
        self.model, self.parameters, self.curvature = model, parameters, curvature
        self.pieces = pieces

    @property
    def grads(self) -> Arrays:
        return self.model.gradient(self.parameters, self.pieces)

    def pull(self, through: Arrays, blocks: Blocks = None) -> tuple[np.ndarray, Arrays]:
        along, products = [], None
        fixed, trained = self.model.fixed(self.parameters), self.model.provider.trained_model
        for x, y, shares in self.model.ready(self.pieces):
            tau, mine = _pulled(trained, self.curvature, blocks, self.parameters, fixed, x, y, shares, through)
            along.append(np.asarray(tau, dtype=np.float64))
            products = mine if products is None else jax.tree.map(jnp.add, products, mine)
        return np.concatenate(along, axis=2), dict(products)  # type: ignore[arg-type]


def _row_losses(model: Model, parameters: Any, fixed: Any, x: Any, y: Any) -> jax.Array:
    return row_losses(model.loss, rows_alone(model, {**fixed, **parameters}, x), y)


@partial(jax.jit, static_argnums=0)
def _losses(model: Model, parameters: Any, fixed: Any, x: Any, y: Any) -> jax.Array:
    return _row_losses(model, parameters, fixed, x, y)


@partial(jax.jit, static_argnums=0)
def _gradient(model: Model, parameters: Any, fixed: Any, x: Any, y: Any, shares: jax.Array) -> Any:
    def objective(parameters: Any) -> jax.Array:
        losses = _row_losses(model, parameters, fixed, x, y)
        return jnp.sum(losses * shares.astype(losses.dtype))

    return jax.grad(objective)(parameters)


@partial(jax.jit, static_argnums=0)
def _row_gradients(model: Model, parameters: Any, fixed: Any, x: Any, y: Any) -> Any:
    return jax.jacrev(lambda parameters: _row_losses(model, parameters, fixed, x, y))(parameters)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _pulled(
    model: Model,
    curvature: str | None,
    blocks: Blocks,
    parameters: Any,
    fixed: Any,
    x: Any,
    y: Any,
    shares: jax.Array,
    through: Any,
) -> tuple[jax.Array, Any]:
    """share_i <r, grad l_i> [block, q, n], and H r, for each cotangent r."""

    def losses(parameters: Any) -> jax.Array:
        return _row_losses(model, parameters, fixed, x, y)

    found, pull = jax.vjp(losses, parameters)
    shares = shares.astype(found.dtype)
    ggn = _ggn(model, parameters, fixed, x, y, shares) if curvature == "ggn" else None

    def along(parameters: Any, r: Any) -> jax.Array:
        return jax.jvp(losses, (parameters,), (r,))[1]

    def one(r: Any) -> tuple[jax.Array, Any]:
        if curvature == "hessian":
            tau, back = jax.vjp(lambda parameters: along(parameters, r), parameters)
            product = back(shares)[0]
        else:
            tau = along(parameters, r)
            if curvature == "fisher":
                product = pull(tau * shares)[0]
            else:
                product = jax.tree.map(jnp.zeros_like, r) if ggn is None else ggn(r)
        if blocks is None:
            return (tau * shares)[None], product
        parts = [{n: v if n in names else jnp.zeros_like(v) for n, v in r.items()} for names in blocks]
        return jnp.stack([along(parameters, part) for part in parts]) * shares, product

    return jax.vmap(one, out_axes=(1, 0))(through)


def _ggn(model: Model, parameters: Any, fixed: Any, x: Any, y: Any, shares: jax.Array) -> Any:
    """J^T H J, with J the outputs' Jacobian and H the Hessian of the shared losses by the outputs."""

    def output(parameters: Any) -> list[jax.Array]:
        return split_floating(rows_alone(model, {**fixed, **parameters}, x))[0]

    outputs, pull = jax.vjp(output, parameters)
    _, rest = split_floating(rows_alone(model, {**fixed, **parameters}, x))
    slope = jax.grad(lambda outputs: jnp.sum(row_losses(model.loss, rest(outputs), y) * shares))

    def product(r: Any) -> Any:
        pushed = jax.jvp(output, (parameters,), (r,))[1]
        return pull(jax.jvp(slope, (outputs,), (pushed,))[1])[0]

    return product
