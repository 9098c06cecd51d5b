"""Second-order products of a model's loss with flat vectors: Hessian, GGN, and the derivative of gradients by input.

Letters: K vectors; leaves, the parameters [*shape] that are differentiated; tangents, one [K, *shape] for each leaf.
All K are pushed through together (one vectorised backward); a model that cannot be vectorised is looped over.

J and J^T must be transposes. J is taken in forward mode, J^T in reverse mode, and these may differ: under `no_grad`,
behind hooks on gradients, in custom autograd functions, at an embedding's padding. The gradients that scores are made
of come from reverse mode, so J is then taken from it, too.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from headwater.errors import UnsupportedLoss, UnsupportedModel
from headwater.torch.capture import summed_products
from headwater.torch.surroundings import quiet
from headwater.torch.tree import dense, floating, tensors_in, with_tensors

Tensors = Sequence[torch.Tensor]

_forward_mode = threading.Lock()
"""Forward mode counts its levels for the whole process: two threads in it would mix their tangents (torch 2.13)."""


def batched_vjp(outputs: Tensors, inputs: Tensors, cotangents: Tensors, *, at_once: bool = True) -> list[torch.Tensor]:
    """For each k, the gradient of sum outputs . cotangents[k] by the inputs: [K, *shape] each; zero where unused.

    at_once: try one pass for all k.
    """
    # Outputs that no parameter moves would make autograd raise; their share is zero.
    live = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad]
    count = len(cotangents[0])
    if not live:
        return [i.new_zeros((count, *i.shape)) for i in inputs]
    outs, cots = [o for o, _ in live], [c for _, c in live]
    try:
        # One backward for all K where every operation has a batching rule ...
        grads = _vectorised_vjp(outs, inputs, cots) if at_once else None
    except RuntimeError:
        grads = None
    if grads is None:
        # ... else K of them, with the graph kept for the next.
        totals = [summed_products(outs, [c[k] for c in cots]) for k in range(count)]
        each = [torch.autograd.grad(total, inputs, retain_graph=True, allow_unused=True) for total in totals]
        grads = [None if column[0] is None else torch.stack(column) for column in zip(*each, strict=True)]
    return [i.new_zeros((count, *i.shape)) if g is None else dense(g) for g, i in zip(grads, inputs, strict=True)]


def _vectorised_vjp(outputs: Tensors, inputs: Tensors, cotangents: Tensors) -> Sequence[torch.Tensor | None]:
    """What `torch.autograd.grad(..., is_grads_batched=True)` does, without its import of a computer algebra.

    That costs 3 CPU seconds in torch 2.13. Where torch has moved these parts, the public way serves.
    """
    try:
        from torch._vmap_internals import _vmap
        from torch.autograd.graph import _engine_run_backward
    except ImportError:
        return torch.autograd.grad(
            outputs, inputs, cotangents, retain_graph=True, allow_unused=True, is_grads_batched=True
        )

    def pull_back(*along: torch.Tensor) -> Any:
        return _engine_run_backward(tuple(outputs), along, True, False, tuple(inputs), True, accumulate_grad=False)

    with quiet():
        return _vmap(pull_back, 0, 0, allow_none_pass_through=True)(*cotangents)


def hessian_product(loss: torch.Tensor, leaves: Tensors, tangents: Tensors) -> list[torch.Tensor]:
    """The Hessian of a scalar loss times each tangent: reverse over reverse.

    Errors: UnsupportedModel where an operation has no second derivative.
    """
    return along_leaves(gradient_graph(loss, leaves), leaves, tangents)


def gradient_graph(loss: torch.Tensor, leaves: Tensors) -> list[torch.Tensor] | None:
    """The gradient by each leaf, to be differentiated once more; None where no leaf moves the loss.

    Errors: UnsupportedModel where an operation has no second derivative.
    """
    if not loss.requires_grad:
        return None
    with _needs_second_derivatives():
        slopes = torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True, materialize_grads=True)
        # `once_differentiable` gives no error where its output is not on the path: part of the Hessian would be zero.
        if _is_cut_off(slopes):
            raise RuntimeError("one of its functions is once_differentiable")
        return [dense(s) for s in slopes]


def along_leaves(slopes: Tensors | None, leaves: Tensors, tangents: Tensors) -> list[torch.Tensor]:
    """The derivative of a `gradient_graph` along each tangent; the graph stays. Errors: as there."""
    if slopes is None:
        return [torch.zeros_like(t) for t in tangents]
    with _needs_second_derivatives():
        return batched_vjp(slopes, leaves, tangents)


@contextmanager
def _needs_second_derivatives() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise UnsupportedModel(
            f"The model has no second derivative, which the Hessian is made of ({error}). Use curvature='ggn', or a "
            "Fisher: hw.Ekfac() and hw.Kfac() need first derivatives alone."
        ) from error


def _is_cut_off(slopes: Tensors) -> bool:
    """Whether torch has put an error into the graph that a second derivative would pass by."""
    # A walk through the graph, not a try: the error node raises only if a gradient flows into it.
    seen, open_ = set(), [s.grad_fn for s in slopes if s.grad_fn is not None]
    while open_:
        node = open_.pop()
        if node in seen:
            continue
        if node.name().endswith("::Error"):
            return True
        seen.add(node)
        open_ += [after for after, _ in node.next_functions if after is not None]
    return False


def ggn_product(
    function: Callable[[Tensors], Any],
    loss: Callable[[Any], torch.Tensor],
    leaves: Tensors,
    tangents: Tensors,
    *,
    forward: bool = True,
    probe: bool = True,
) -> tuple[list[torch.Tensor], bool]:
    """J^T H J times each tangent: J the output's Jacobian by the leaves, H the loss's Hessian by the output.

    forward: whether J may be taken in forward mode. Also whether it may be the next time: not where J and J^T turn out
    to be no transposes of each other, and J then comes from reverse mode. probe: look at a random tangent, too, since
    the columns of an identity show nothing. Errors: UnsupportedModel where there is no second derivative either.
    """
    output = function(leaves)
    everything = tensors_in(output)
    outputs = floating(output)
    # The loss on a detached output: H is by the output alone, and J stays a factor of its own.
    points = [o.detach().requires_grad_() if o.is_floating_point() else o for o in everything]
    moving = [p for p in points if p.requires_grad]
    slopes = torch.autograd.grad(
        loss(with_tensors(output, iter(points))), moving, create_graph=True, allow_unused=True, materialize_grads=True
    )
    asked = _with_probe(tangents) if probe else tangents
    # Schraudolph 2002: forward through the model, H in the middle, backward through the model.
    pushed = push_forward(_floating(function), leaves, asked) if forward else None
    if pushed is not None:
        along = _hessian_products(slopes, moving, pushed)
        products = batched_vjp(outputs, leaves, along)
        # The probe's row is cut off again: it was along for the check.
        if _are_transposed(along, pushed, products, asked):
            return [p[: len(tangents[0])] for p in products], True
    # In the order of their cost; the last one is right by construction, and is not checked.
    for push in (push_in_reverse, push_by_rows):
        pushed = push(outputs, leaves, asked)
        if pushed is not None:
            along = _hessian_products(slopes, moving, pushed)
            products = batched_vjp(outputs, leaves, along)
            if push is push_by_rows or _are_transposed(along, pushed, products, asked):
                break
    return [p[: len(tangents[0])] for p in products], False


def _hessian_products(slopes: Tensors, moving: Tensors, pushed: Tensors) -> list[torch.Tensor]:
    """H J v. Errors: UnsupportedLoss for a loss that can be differentiated once only."""
    try:
        return batched_vjp(slopes, moving, pushed)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise UnsupportedLoss(
            f"The loss has no second derivative by the model's output, which its GGN is made of ({error}). Use "
            "fisher='empirical', for example hw.Ekfac(fisher='empirical') or hw.Dual()."
        ) from error


def _with_probe(tangents: Tensors) -> list[torch.Tensor]:
    """The tangents and a random one, of their size, with a part along every parameter."""
    size = torch.stack([t.square().sum() / len(t) for t in tangents]).sum().sqrt()
    # On the host and seeded: the same probe on every device, and the user's generator is left alone.
    random = torch.Generator().manual_seed(0)
    # As long as the tangents are on average, so that rounding is judged on their scale.
    drawn = [torch.randn((1, *t.shape[1:]), generator=random, dtype=torch.float64) for t in tangents]
    length = torch.stack([d.square().sum() for d in drawn]).sum().sqrt()
    return [torch.cat([t, (d / length).to(t) * size.to(t)]) for t, d in zip(tangents, drawn, strict=True)]


def _are_transposed(u: Tensors, j_v: Tensors, j_t_u: Tensors, v: Tensors) -> bool:
    """Whether u . (J v) = v . (J^T u) for each k; here u = H J v, so that both are at hand, for all rows at once."""

    def dots(left: Tensors, right: Tensors) -> torch.Tensor:
        products = [(a * b).flatten(1).sum(1) if a.ndim > 1 else a * b for a, b in zip(left, right, strict=True)]
        return torch.stack([p.double() for p in products]).sum(0)

    # In float64: the two sums run over different numbers of terms, and must not differ by that.
    one, other = dots(u, j_v), dots(v, j_t_u)
    eps = torch.finfo(v[0].dtype).eps
    share = {torch.float64: 1e-8, torch.float32: 2e-3}.get(v[0].dtype, 0.1)
    rounding = 100 * eps * torch.maximum((dots(u, u) * dots(j_v, j_v)).sqrt(), (dots(v, v) * dots(j_t_u, j_t_u)).sqrt())
    allowed = share * torch.maximum(one.abs(), other.abs()) + rounding
    return bool((~((one - other).abs() > allowed)).all())  # what is not finite is refused elsewhere


def _floating(function: Callable[[Tensors], Any]) -> Callable[..., tuple[torch.Tensor, ...]]:
    return lambda *given: tuple(floating(function(given)))


def jacobian_product(
    function: Callable[..., tuple[torch.Tensor, ...]], leaves: Tensors, tangents: Tensors
) -> list[torch.Tensor]:
    """J times each tangent, J as reverse mode has it: [K, *output shape] each; forward where that is the same."""
    outputs = function(*leaves)
    # Any cotangent tests the transpose; ones see every output.
    ones = [torch.ones_like(o)[None] for o in outputs]
    pulled, asked = batched_vjp(outputs, leaves, ones), _with_probe(tangents)
    for pushed in (push_forward(function, leaves, asked), push_in_reverse(outputs, leaves, asked)):
        if pushed is not None and _are_transposed(ones, pushed, pulled, asked):
            # The last one is the probe.
            return [p[:-1] for p in pushed]
    return push_by_rows(outputs, leaves, tangents)


def push_forward(
    function: Callable[..., tuple[torch.Tensor, ...]], leaves: Tensors, tangents: Tensors
) -> list[torch.Tensor] | None:
    """J times each tangent in forward mode: [K, *output shape]; None where an operation has no forward mode."""
    plain = tuple(leaf.detach() for leaf in leaves)

    def one(*direction: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.func.jvp(function, plain, direction)[1]

    try:
        # One thread at a time: see the lock.
        with _forward_mode, quiet():
            return list(torch.func.vmap(one)(*tangents))
    except Exception:  # of many kinds: missing formulas, functions without jvp, branches on data
        return None


def push_in_reverse(outputs: Tensors, leaves: Tensors, tangents: Tensors) -> list[torch.Tensor] | None:
    """J times each tangent from two reverse passes; None where the first cannot be differentiated.

    It may also be cut off without a word (`once_differentiable`), so that what comes out is to be checked.
    """
    dummies = [torch.zeros_like(o, requires_grad=True) for o in outputs]
    live = [(o, d) for o, d in zip(outputs, dummies, strict=True) if o.requires_grad]
    if not live:
        return [o.new_zeros((len(tangents[0]), *o.shape)) for o in outputs]
    try:
        # J^T d is linear in d: its derivative by d along v is J v, and d itself may be zero.
        pulled = torch.autograd.grad(
            summed_products([o for o, _ in live], [d for _, d in live]),
            leaves,
            create_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        return batched_vjp([dense(p) for p in pulled], dummies, tangents)
    except RuntimeError:
        return None


_MOST_ROWS = 20_000
"""Numbers of output in a batch up to which each is differentiated by itself."""


def push_by_rows(outputs: Tensors, leaves: Tensors, tangents: Tensors) -> list[torch.Tensor]:
    """J times each tangent from all rows of J, one backward pass each. Errors: UnsupportedModel where they are many."""
    return [_by_rows(output, leaves, tangents) for output in outputs]


def _by_rows(output: torch.Tensor, leaves: Tensors, tangents: Tensors) -> torch.Tensor:
    if not output.requires_grad:
        return output.new_zeros((len(tangents[0]), *output.shape))
    if output.numel() > _MOST_ROWS:
        raise UnsupportedModel(
            f"The model has first derivatives only, and {output.numel()} numbers of output in a batch, which would be "
            f"differentiated one by one; at most {_MOST_ROWS} are. Use smaller batches, or hw.Ekfac()."
        )
    columns = []
    for number in output.reshape(-1).unbind():
        slopes = torch.autograd.grad(number, leaves, retain_graph=True, allow_unused=True, materialize_grads=True)
        # One row of J against all tangents.
        along = [(t * dense(s)).reshape(len(t), -1).sum(1) for t, s in zip(tangents, slopes, strict=True)]
        columns.append(torch.stack(along).sum(0))
    return torch.stack(columns, dim=1).reshape(-1, *output.shape)


def _gradient(function: Callable[..., torch.Tensor]) -> Callable[..., dict[str, torch.Tensor]]:
    """`torch.func.grad` by the first argument, without its import of a compiler and a computer algebra.

    That costs 3 CPU seconds in torch 2.13, to switch off compiled autograd, which is not on here. Where torch has moved
    these parts, the public way serves.
    """
    try:
        from torch._functorch.eager_transforms import (
            _create_differentiable,
            _undo_create_differentiable,
            _wrap_all_tensors,
            grad_increment_nesting,
        )
    except ImportError:
        return torch.func.grad(function)

    undo: Callable[[Any, int], Any] = _undo_create_differentiable

    def gradient(*given: Any) -> Any:
        with grad_increment_nesting() as level, torch.enable_grad():
            chosen, *others = _wrap_all_tensors(given, level)
            leaves = {name: _create_differentiable(t, level) for name, t in chosen.items()}
            value = function(leaves, *others)
            if not value.requires_grad:
                return undo({name: torch.zeros_like(t) for name, t in leaves.items()}, level)
            # No argument grad_outputs: given one, torch imports the algebra after all.
            grads = torch.autograd.grad(
                value, [*leaves.values()], create_graph=True, allow_unused=True, materialize_grads=True
            )
            return undo(dict(zip(leaves, grads, strict=True)), level)

    return gradient


def rowwise_grads(function: Any, chosen: dict[str, torch.Tensor], x: Any, y: Any) -> dict[str, torch.Tensor]:
    """The gradient of function(chosen, row of x, row of y) by what is chosen, for all rows: [n, *shape] each.

    Vectorised; where the model does not allow it, one row at a time, by plain autograd.
    """
    try:
        with quiet():
            # Plain per-sample gradients [n, *shape]: whole matrices, only for parameters without a rule.
            return torch.func.vmap(_gradient(function), in_dims=(None, 0, 0))(chosen, x, y)
    except Exception:  # of many kinds, as in `push_forward`; what is really wrong is raised again below
        leaves = {name: t.detach().requires_grad_() for name, t in chosen.items()}
        each = []
        for k in range(len(tree_leaves(x)[0])):
            value = function(leaves, *tree_map(lambda t, k=k: t[k], (x, y)))
            if not value.requires_grad:
                each.append(tuple(torch.zeros_like(leaf) for leaf in leaves.values()))
                continue
            each.append(torch.autograd.grad(value, [*leaves.values()], allow_unused=True, materialize_grads=True))
        return {name: torch.stack([dense(row[k]) for row in each]) for k, name in enumerate(leaves)}


def rowwise(function: Any, chosen: dict[str, torch.Tensor], x: Any, y: Any) -> dict[str, torch.Tensor]:
    """function(chosen, row of x, row of y), for all rows: vectorised, or one by one where that fails."""
    try:
        with quiet():
            return torch.func.vmap(function, in_dims=(None, 0, 0))(chosen, x, y)
    except RuntimeError:
        rows = len(tree_leaves(x)[0])
        each = [function(chosen, *tree_map(lambda t, k=k: t[k], (x, y))) for k in range(rows)]
        return {name: torch.stack([one[name] for one in each]) for name in each[0]}
