"""Second-order products of a model's loss with flat vectors: Hessian, GGN, and the derivative of gradients by input.

Letters: K vectors; leaves, the parameters [*shape] that are differentiated; tangents, one [K, *shape] for each leaf.
All K are pushed through together (one vectorised backward); a model that cannot be vectorised is looped over.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from headwater.torch.batch import quiet

Tensors = Sequence[torch.Tensor]


def batched_vjp(outputs: Tensors, inputs: Tensors, cotangents: Tensors) -> list[torch.Tensor]:
    """For each k, the gradient of sum outputs . cotangents[k] by the inputs: [K, *shape] each; zero where unused."""
    live = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad]
    count = len(cotangents[0])
    if not live:
        return [i.new_zeros((count, *i.shape)) for i in inputs]
    outs, cots = [o for o, _ in live], [c for _, c in live]
    try:
        with quiet():
            grads: Sequence[torch.Tensor | None] = torch.autograd.grad(
                outs, inputs, cots, retain_graph=True, allow_unused=True, is_grads_batched=True
            )
    except RuntimeError:
        each = [
            torch.autograd.grad(outs, inputs, [c[k] for c in cots], retain_graph=True, allow_unused=True)
            for k in range(count)
        ]
        grads = [None if column[0] is None else torch.stack(column) for column in zip(*each, strict=True)]
    return [i.new_zeros((count, *i.shape)) if g is None else _filled(g) for g, i in zip(grads, inputs, strict=True)]


def _filled(tensor: torch.Tensor) -> torch.Tensor:
    """Not sparse: `Embedding(sparse=True)` has sparse gradients."""
    return tensor.to_dense() if tensor.is_sparse else tensor


def hessian_product(loss: torch.Tensor, leaves: Tensors, tangents: Tensors) -> list[torch.Tensor]:
    """The Hessian of a scalar loss times each tangent: reverse over reverse."""
    slopes = torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True, materialize_grads=True)
    return batched_vjp([_filled(s) for s in slopes], leaves, tangents)


def ggn_product(
    function: Callable[[Tensors], Any], loss: Callable[[Any], torch.Tensor], leaves: Tensors, tangents: Tensors
) -> list[torch.Tensor]:
    """J^T H J times each tangent: J the output's Jacobian by the leaves, H the loss's Hessian by the output."""
    output, structure = tree_flatten(function(leaves))
    outputs = [o for o in output if isinstance(o, torch.Tensor) and o.is_floating_point()]
    pushed = push_forward(lambda given: tree_flatten(function(given))[0], outputs, leaves, tangents)
    points = [o.detach().requires_grad_() if o.is_floating_point() else o for o in output]
    moving = [p for p in points if p.requires_grad]
    slopes = torch.autograd.grad(
        loss(tree_unflatten(points, structure)), moving, create_graph=True, allow_unused=True, materialize_grads=True
    )
    return batched_vjp(outputs, leaves, batched_vjp(slopes, moving, pushed))


def push_forward(
    function: Callable[[Tensors], Any], outputs: Tensors, leaves: Tensors, tangents: Tensors
) -> list[torch.Tensor]:
    """J times each tangent: [K, *output shape]. Forward mode; where an operation has none, two reverse passes."""

    def floating(given: Tensors) -> tuple[torch.Tensor, ...]:
        return tuple(o for o in function(given) if o.is_floating_point())

    def one(*direction: torch.Tensor) -> tuple[torch.Tensor, ...]:
        plain = tuple(leaf.detach() for leaf in leaves)
        return torch.func.jvp(lambda *given: floating(given), plain, direction)[1]

    try:
        with quiet():
            return list(torch.func.vmap(one)(*tangents))
    except (NotImplementedError, RuntimeError):
        dummies = [torch.zeros_like(o, requires_grad=True) for o in outputs]
        pulled = torch.autograd.grad(
            outputs, leaves, dummies, create_graph=True, allow_unused=True, materialize_grads=True
        )
        return batched_vjp(pulled, dummies, tangents)


def rowwise_grads(function: Any, chosen: dict[str, torch.Tensor], x: Any, y: Any) -> dict[str, torch.Tensor]:
    """The gradient of function(chosen, row of x, row of y) by what is chosen, for all rows: [n, *shape] each.

    Vectorised; where the model does not allow it, one row at a time, by plain autograd.
    """
    try:
        with quiet():
            return torch.func.vmap(torch.func.grad(function), in_dims=(None, 0, 0))(chosen, x, y)
    except RuntimeError:
        leaves = {name: t.detach().requires_grad_() for name, t in chosen.items()}
        each = []
        for k in range(len(tree_leaves(x)[0])):
            value = function(leaves, *tree_map(lambda t, k=k: t[k], (x, y)))
            each.append(torch.autograd.grad(value, [*leaves.values()], allow_unused=True, materialize_grads=True))
        return {name: torch.stack([_filled(row[k]) for row in each]) for k, name in enumerate(leaves)}


def rowwise(function: Any, chosen: dict[str, torch.Tensor], x: Any, y: Any) -> dict[str, torch.Tensor]:
    """function(chosen, row of x, row of y), for all rows: vectorised, or one by one where that fails."""
    try:
        with quiet():
            return torch.func.vmap(function, in_dims=(None, 0, 0))(chosen, x, y)
    except RuntimeError:
        rows = len(tree_leaves(x)[0])
        each = [function(chosen, *tree_map(lambda t, k=k: t[k], (x, y))) for k in range(rows)]
        return {name: torch.stack([one[name] for one in each]) for name in each[0]}
