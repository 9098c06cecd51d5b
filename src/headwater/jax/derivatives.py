"""What JAX compiles: gradients of rows, pull-backs, and second-order products.

Everything that decides what is compiled is an argument that can be compared: the model's function and loss, and the
plan of its parameters. So equal providers, and a loop over batches of one shape, compile once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from headwater.blocks import Layout
from headwater.gradients.algebra import Dense, Gradient, Sum
from headwater.gradients.block import BlockGradient
from headwater.gradients.outer import Outer, RowSparse
from headwater.gradients.provider import Kind
from headwater.jax.losses import Loss, as_row, loss_of_row, row_losses, split_floating
from headwater.jax.plan import Filling, Place, Plan, fill
from headwater.jax.trace import Program, trace
from headwater.jax.tree import Leaves, Tree, wide

for kind in (Dense, Sum, Outer, RowSparse):  # compiled functions give gradient values back
    names = [field.name for field in fields(kind)]
    numbers = [name for name in names if name in ("ones", "size")]
    jax.tree_util.register_dataclass(kind, [name for name in names if name not in numbers], numbers)


@dataclass(frozen=True)
class Model:
    """A function of parameters and rows, the form of its parameters, and a loss."""

    apply: Callable[[Any, Any], Any]
    tree: Tree
    loss: Loss

    def __call__(self, leaves: Leaves, x: object) -> Any:
        return self.apply(self.tree.build(leaves), x)

    def program(self, leaves: Leaves, x: object) -> Program:
        """The function on one row of the shape of x's."""
        row = jax.tree.map(lambda v: jax.ShapeDtypeStruct((1, *v.shape[1:]), v.dtype), x)
        return trace(self.apply, self.tree, leaves, row)


@partial(jax.jit, static_argnums=0)
def first(count: int, values: object) -> Any:
    """The first rows of every array."""
    return jax.tree.map(lambda v: v[:count], values)


def rows_alone(model: Model, leaves: Leaves, x: object) -> Any:
    """The outputs [n, ...] of rows that each are a batch by themselves: what a model does with several has no part."""
    found = jax.vmap(lambda row: model(leaves, as_row(row)))(x)
    return jax.tree.map(lambda v: v.reshape((v.shape[0], *v.shape[2:])), found)


@partial(jax.jit, static_argnums=0)
def outputs(model: Model, leaves: Leaves, x: object) -> Any:
    """Of the rows of a batch."""
    return rows_alone(model, leaves, x)


@partial(jax.jit, static_argnums=0)
def losses(model: Model, leaves: Leaves, x: object, y: object) -> jax.Array:
    """Of each row: [n]."""
    return row_losses(model.loss, rows_alone(model, leaves, x), y)


@partial(jax.jit, static_argnums=0)
def outputs_and_losses(model: Model, leaves: Leaves, x: object, y: object) -> tuple[jax.Array, Any]:
    """The losses [n] and the outputs of rows."""
    output = rows_alone(model, leaves, x)
    return row_losses(model.loss, output, y), output


@partial(jax.jit, static_argnums=(0, 1))
def gradients(model: Model, plan: Plan, leaves: Leaves, x: Any, y: Any) -> tuple[jax.Array, dict[Place, Gradient]]:
    """The rows' losses [n], and their gradient values."""
    # While tracing: the plan and the shapes are static, and the compiled code has only arrays in it.
    filling = fill(plan, model.program(leaves, x))
    nudges, chosen = _points(filling, leaves)

    def one(x: Any, y: Any) -> Any:
        def loss(nudges: Any, chosen: Any) -> Any:
            # The gradient by a zero added to a step's output is the output-gradient; the operand comes out beside it.
            output, operands = filling.program.run({**leaves, **chosen}, as_row(x), nudges)
            return loss_of_row(model.loss, output, as_row(y)), operands

        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(nudges, chosen)

    (found, operands), (slopes, grads) = jax.vmap(one)(x, y)
    return found, filling.values(operands, slopes, grads)


@partial(jax.jit, static_argnums=(0, 1))
def pulled_back(
    model: Model, plan: Plan, leaves: Leaves, x: Any, cotangents: jax.Array
) -> tuple[dict[Place, jax.Array], dict[Place, Gradient]]:
    """Gradient values of the output contracted with each of the cotangents [c, n, ...], for `draw`.

    Layer inputs [n, ...], which cotangents share, where a value has such; and the values without them, [c, n, ...].
    """
    filling = fill(plan, model.program(leaves, x))
    nudges, chosen = _points(filling, leaves)

    def one(x: Any, cotangents: Any) -> Any:
        def output(nudges: Any, chosen: Any) -> Any:
            return filling.program.run({**leaves, **chosen}, as_row(x), nudges)

        _, pull, operands = jax.vjp(output, nudges, chosen, has_aux=True)
        return operands, *jax.vmap(lambda v: pull(as_row(v)))(cotangents)

    # Operands once for each row, gradients for each cotangent: draws share their inputs.
    operands, slopes, grads = jax.vmap(one, in_axes=(0, 1), out_axes=(0, 1, 1))(x, cotangents)
    shared = filling.sharing

    def apart(slopes: Any, grads: Any) -> tuple[dict[Place, Any], dict[Place, Gradient]]:
        values = filling.values(operands, slopes, grads)
        pairs = {place: _without_inputs(value) if place in shared else (None, value) for place, value in values.items()}
        inputs = {place: mine for place, (mine, _) in pairs.items() if mine is not None}
        return inputs, {place: value for place, (_, value) in pairs.items()}

    # One program for all, whose size does not depend on how many there are; inputs once, not once for each.
    inputs, _ = apart(*jax.tree.map(lambda v: v[0], (slopes, grads)))
    return inputs, jax.vmap(lambda *mine: apart(*mine)[1])(slopes, grads)


def _without_inputs(value: Gradient) -> tuple[Any, Gradient]:
    if isinstance(value, Outer):
        return value.a, replace(value, a=None)  # type: ignore[arg-type]
    if isinstance(value, RowSparse):
        return value.ids, replace(value, ids=None)  # type: ignore[arg-type]
    return None, value


def drawn(
    count: int, rows: int, found: tuple[dict[Place, Any], dict[Place, Gradient]], cut: Callable[..., Any] | None = None
) -> list[dict[Place, Gradient]]:
    """The values of each of the cotangents of `pulled_back`, of the first rows; inputs are the same array in all.

    cut: how they are cut out, compiled by default; `apart` for NumPy's arrays, which have views.
    """
    inputs, each = (cut or _compiled_apart)(count, rows, found)
    return [{place: _with_inputs(value, inputs.get(place)) for place, value in mine.items()} for mine in each]


def apart(count: int, rows: int, found: Any) -> tuple[dict[Place, Any], list[dict[Place, Any]]]:
    """Of the first rows: shared inputs, and each cotangent's values."""
    inputs, values = found
    each = [jax.tree.map(lambda v, c=c: v[c, :rows], values) for c in range(count)]
    return {place: v[:rows] for place, v in inputs.items()}, each


_compiled_apart = jax.jit(apart, static_argnums=(0, 1))


def _with_inputs(value: Gradient, inputs: Any) -> Gradient:
    if inputs is None:
        return value
    if isinstance(value, Outer):
        return replace(value, a=inputs)
    return replace(value, ids=inputs) if isinstance(value, RowSparse) else value


def _points(filling: Filling, leaves: Leaves) -> tuple[dict[int, jax.Array], dict[str, jax.Array]]:
    """Where gradients are taken: zeros at the sites' outputs, and the parameters that are differentiated plainly."""
    return filling.program.zeros(filling.steps), {name: leaves[name] for name in filling.parameters}


def gradient_alone(model: Model, chosen: Leaves, leaves: Leaves, x: Any, y: Any) -> tuple[jax.Array, Leaves]:
    """The loss of one row, and its gradient by the chosen parameters; x and y are a batch of that row."""

    def loss(chosen: Any) -> Any:
        return loss_of_row(model.loss, model({**leaves, **chosen}, x), y)

    return jax.value_and_grad(loss)(dict(chosen))


plain_gradient = jax.jit(gradient_alone, static_argnums=0)


@partial(jax.jit, static_argnums=(0, 1, 2))
def curvature_products(
    model: Model, layout: Layout, kind: Kind, vectors: jax.Array, leaves: Leaves, x: Any, y: Any, weights: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The rows' losses, and the Hessian or GGN of their weighted sum by a block times vectors: (K, D_block)."""
    chosen = {p.name: leaves[p.name] for p in layout.block.parameters}

    def output(chosen: Any) -> Any:
        return rows_alone(model, {**leaves, **chosen}, x)

    def total(output: object) -> jax.Array:
        return jnp.sum(row_losses(model.loss, output, y) * weights)

    if kind == "ggn":
        product = _ggn(output, total, chosen)
    else:
        # Reverse over reverse: the Hessian is symmetric, so that its vjp is its product.
        _, product = jax.vjp(jax.grad(lambda chosen: total(output(chosen))), chosen)
    found = jax.vmap(lambda v: product(v)[0])(_cut(layout, vectors, leaves))
    return row_losses(model.loss, output(chosen), y), _join(layout, found)


def _cut(layout: Layout, vectors: jax.Array, leaves: Leaves) -> dict[str, jax.Array]:
    """Flat vectors (K, D) as one array [K, *shape] for each parameter of the block, in its dtype."""
    found, start = {}, 0
    for p in layout.block.parameters:
        piece = vectors[:, start : start + p.size].reshape(len(vectors), *p.shape)
        found[p.name] = piece.astype(leaves[p.name].dtype)
        start += p.size
    return found


def _join(layout: Layout, pieces: Leaves) -> jax.Array:
    """The inverse: (K, D)."""
    flat = [pieces[p.name].reshape(len(pieces[p.name]), -1) for p in layout.block.parameters]
    return wide(jnp.concatenate(flat, axis=1))


def _ggn(function: Callable[[Any], Any], total: Callable[[Any], jax.Array], chosen: object) -> Callable[[Any], Any]:
    """J^T H J: J the output's Jacobian by the parameters, H the loss's Hessian by the output.

    J comes from the pull-back, which is linear, by transposing it: so functions whose derivative is given in reverse
    only have a GGN too.
    """
    moving, rest = split_floating(function(chosen))

    def floating(chosen: object) -> list[jax.Array]:
        return split_floating(function(chosen))[0]

    _, pull = jax.vjp(floating, chosen)
    _, hessian_product = jax.vjp(jax.grad(lambda moving: total(rest(moving))), moving)
    # v to J^T v is linear: its vjp, at any point, is J.
    _, push = jax.vjp(lambda v: pull(v)[0], jax.tree.map(jnp.zeros_like, moving))
    return lambda vector: pull(hessian_product(push(vector)[0])[0])


@partial(jax.jit, static_argnums=(0, 1))
def mixed_products(
    model: Model, layouts: tuple[Layout, ...], factors: Sequence[jax.Array], leaves: Leaves, x: object, y: object
) -> tuple[jax.Array, jax.Array]:
    """The rows' losses, and each row's derivative by its input of <factor, gradient>: [n, K, *x_shape]."""
    pieces = [_cut(layout, factor, leaves) for layout, factor in zip(layouts, factors, strict=True)]
    directions = {name: piece for cut in pieces for name, piece in cut.items()}

    def one(x: object, y: object) -> tuple[jax.Array, jax.Array]:
        def slopes(x: object) -> tuple[Leaves, jax.Array]:
            chosen = {name: leaves[name] for name in directions}
            value, grads = jax.value_and_grad(lambda chosen: _loss(model, {**leaves, **chosen}, x, y))(chosen)
            return grads, value

        # The input's derivative of the gradient, contracted with each factor in turn: [K, *x_shape] a row.
        _, pull, value = jax.vjp(slopes, x, has_aux=True)
        return value, jax.vmap(lambda direction: pull(direction)[0])(directions)

    losses, found = jax.vmap(one)(x, y)
    return losses, wide(found)


@partial(jax.jit, static_argnums=(0, 1))
def mixed_gradients(
    model: Model, layouts: tuple[Layout, ...], leaves: Leaves, x: Any, y: Any
) -> tuple[jax.Array, jax.Array]:
    """The rows' losses, and the gradient by the input of the gradient: [n, *x_shape, D]."""
    chosen = {p.name: leaves[p.name] for layout in layouts for p in layout.block.parameters}

    def one(x: Any, y: Any) -> tuple[jax.Array, Leaves]:
        def by_input(chosen: Any) -> jax.Array:
            return jax.grad(lambda x: _loss(model, {**leaves, **chosen}, x, y))(x)

        return _loss(model, leaves, x, y), jax.jacrev(by_input)(chosen)

    losses, found = jax.vmap(one)(x, y)
    flat = [found[name].reshape(*x.shape, -1) for name in chosen]
    return losses, wide(jnp.concatenate(flat, axis=-1))


def block_gradient(layout: Layout, values: Mapping[Place, Gradient]) -> BlockGradient:
    """The parts of a block side by side."""
    return BlockGradient(layout, tuple(values[layout.block.name, k] for k in range(len(layout.parts))))


def _loss(model: Model, leaves: Leaves, x: object, y: object) -> jax.Array:
    return loss_of_row(model.loss, model(leaves, as_row(x)), as_row(y))
