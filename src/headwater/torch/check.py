"""What is checked on the first rows that a provider sees, and on every gradient: what is wrong is an error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from headwater.errors import NonFiniteValue, RowsInteract, UnsupportedLoss, UnsupportedModel
from headwater.gradients.provider import BlockGradients
from headwater.torch.batch import TorchBatch
from headwater.torch.capture import run
from headwater.torch.losses import Loss, check_finite, explain_failure
from headwater.torch.surroundings import twice_differentiable
from headwater.torch.tree import dense, map_tensors, tensors_in
from headwater.torch.wrapped import check_unwrapped


def one_row_alone(
    model: nn.Module,
    loss: Loss,
    row: TorchBatch,
    state: Mapping[str, torch.Tensor],
    leaves: Mapping[str, torch.Tensor],
) -> tuple[Any, dict[str, torch.Tensor]]:
    """A batch of one row through plain autograd: the model's output, and the loss's gradient by each leaf."""
    with twice_differentiable():
        output = run(model, state, row.x)
    check_rows(output, 1)
    with explain_failure(output, row.y):
        value = loss(output, row.y).sum()
    if not value.requires_grad:  # a row that is routed past all of them
        zeros = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
        return map_tensors(torch.Tensor.detach, output), zeros
    grads = torch.autograd.grad(value, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return map_tensors(torch.Tensor.detach, output), dict(zip(leaves, map(dense, grads), strict=True))


def with_a_gradient(
    model: nn.Module, loss: Loss, batch: TorchBatch, chosen: np.ndarray, state: Mapping[str, torch.Tensor]
) -> np.ndarray:
    """The chosen rows, the last in place of another if its loss depends on no attributed parameter: routed past them.

    Errors: UnsupportedModel where no row of the batch depends on any.
    """

    def depends(rows: np.ndarray) -> bool:
        some = batch.take(rows)
        output = run(model, state, some.x)
        check_rows(output, len(rows))
        with explain_failure(output, some.y):
            return bool(loss(output, some.y).requires_grad)

    if depends(chosen[-1:]):
        return chosen
    left = np.arange(len(batch))
    if not depends(left):
        raise UnsupportedModel(
            f"The loss does not depend on any attributed parameter, for none of the {len(batch)} rows of this batch. "
            "Is the output detached, or are the rows routed past all that is attributed? Then take larger batches."
        )
    while len(left) > 1:  # halves, one of which depends
        half = left[: len(left) // 2]
        # About log2(n) forward passes, where looking at each row would take n.
        left = half if depends(half) else left[len(left) // 2 :]
    others = chosen[chosen != left[0]]
    return np.append(others[: len(chosen) - 1], left)


def check_model(model: nn.Module) -> None:
    """Errors: UnsupportedModel for models that are spread over devices by other means than FSDP2, and scripted ones."""
    check_unwrapped(model)
    if isinstance(model, torch.jit.ScriptModule):
        raise UnsupportedModel(
            "The model is scripted, so that its layers cannot be watched nor its parameters swapped; pass the module "
            "that torch.jit was given."
        )


def check_rows(output: object, rows: int) -> None:
    """Errors: UnsupportedModel for an output whose first axis is not that of the rows, or that holds no numbers."""
    tensors = tensors_in(output)
    for tensor in tensors:
        if tensor.ndim == 0 or len(tensor) != rows:
            raise UnsupportedModel(
                f"The model's output for {rows} row(s) has shape {tuple(tensor.shape)}; "
                "its first axis must run over rows."
            )
    if not tensors:
        raise UnsupportedModel(f"The model's output holds no tensor: it is {type(output).__name__}, {output!r:.80}.")


def check_independence(together: object, alone: object, rows: np.ndarray | list[int], kind: torch.dtype) -> None:
    """Errors: RowsInteract if the output for `rows` is another than in other company, beyond the rounding of `kind`.

    together: of the batch that the rows are numbered in; alone: of these rows only.
    """
    for one, both in zip(tensors_in(alone), tensors_in(together), strict=True):
        # Whole numbers (predicted classes, lengths) have no rounding to allow for, and no gradient.
        if not one.is_floating_point():
            continue
        one, both = one.detach(), both.detach()[torch.as_tensor(rows, device=both.device)]
        if close(both, one, kind=kind):
            continue
        gaps = (both - one).abs().reshape(len(one), -1).amax(1)
        row = int(gaps.argmax())
        raise RowsInteract(
            f"The model's output for row {rows[row]} changes by {float(gaps[row]):g} when the row comes in another "
            "batch: rows act on each other, or the model is random. Its rows have no gradients of their own."
        )


def check_loss_reads_outputs(
    loss: Loss, output: object, target: object, parameters: Mapping[str, torch.Tensor], what: str = "loss"
) -> None:
    """Errors: UnsupportedLoss for a loss that depends on the model's parameters otherwise than through its output."""
    with explain_failure(output, target):
        value = loss(map_tensors(torch.Tensor.detach, output), target).sum()
    if not value.requires_grad:
        return
    grads = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
    read = [name for name, grad in zip(parameters, grads, strict=True) if grad is not None]
    if read:
        raise UnsupportedLoss(
            f"The {what} reads {', '.join(read[:4])}{' ...' if len(read) > 4 else ''} by itself, beside the model's "
            "output. Take a penalty on weights out of it: it belongs to no row. Its curvature can be given as damping."
        )


def close(got: torch.Tensor, expected: torch.Tensor, floor: float = 0.0, kind: torch.dtype | None = None) -> bool:
    """Equal up to rounding, in norm; or both no more than the rounding of numbers of the size of `floor`.

    kind: the dtype that was computed in, if it is coarser than the tensors'.
    """
    kind = kind or expected.dtype
    # A wrong rule is off by the size of the gradient; rounding over thousands of positions, by far less than this.
    tolerance = max(1e-8, 1e4 * torch.finfo(kind).eps) if kind == torch.float64 else 2e-3
    tolerance = 0.1 if kind in (torch.float16, torch.bfloat16) else tolerance
    gap, scale = (got - expected).norm(), torch.maximum(got.norm(), expected.norm())
    # In norm, not entry by entry: a small entry beside large ones has their rounding.
    allowed = tolerance * scale + rounding_of(kind) * floor + torch.finfo(expected.dtype).tiny
    return bool(gap <= allowed)


def rounding_of(kind: torch.dtype) -> float:
    """What rounding leaves of a gradient that is zero in exact numbers (a bias before a norm), of sums over positions.

    Relative to the length of all parameters' gradients together.
    """
    return {torch.float64: 1e6, torch.float32: 1e3}.get(kind, 10) * torch.finfo(kind).eps


def check_finite_grads(draws: Sequence[BlockGradients], losses: torch.Tensor | None = None) -> None:
    """Errors: NonFiniteValue naming the block and the rows, or the rows whose losses are not finite.

    A sum is finite only if all of it is: one look for the losses and all draws, as each look waits for the device.
    """
    parts = [part for blocks in draws for value in blocks.values() for part in value.parts]
    # By identity: draws share their inputs.
    arrays: dict[int, Any] = {id(array): array for part in parts for array in part.arrays}
    sums = [array.sum().double() for array in arrays.values()]
    if losses is not None:
        sums.append(losses.detach().sum().double())
    if bool(torch.isfinite(torch.stack(sums).sum())):
        return
    if losses is not None:
        check_finite(losses)
    for name, value in ((name, value) for blocks in draws for name, value in blocks.items()):
        for part in value.parts:
            held: Any = part.arrays
            bad = {int(k) for a in held for k in (~torch.isfinite(a.reshape(len(a), -1)).all(1)).nonzero()[:, 0]}
            if bad:
                rows = sorted(bad)[:5]
                raise NonFiniteValue(f"The gradients of block {name!r} are not finite for rows {rows}.", rows)


def check_finite_factors(factors: Mapping[str, torch.Tensor]) -> None:
    """Errors: NonFiniteValue naming the block and the queries."""
    for name, factor in factors.items():
        bad = (~torch.isfinite(factor).all(1)).nonzero()[:, 0].tolist()
        if bad:
            raise NonFiniteValue(f"The factors of block {name!r} are not finite for queries {bad[:5]}.")
