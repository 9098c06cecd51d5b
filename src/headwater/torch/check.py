"""What is checked on the first rows that a provider sees, and on every gradient: nothing is wrong without a word."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from headwater.errors import NonFiniteValue, RowsInteract, UnsupportedModel
from headwater.gradients.provider import BlockGradients
from headwater.torch.batch import TorchBatch
from headwater.torch.capture import run, twice_differentiable
from headwater.torch.losses import Loss, explain_failure


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
    if not value.requires_grad:
        raise UnsupportedModel("The loss does not depend on any attributed parameter.")
    grads = torch.autograd.grad(value, list(leaves.values()), allow_unused=True, materialize_grads=True)
    dense = [g.to_dense() if g.is_sparse else g for g in grads]
    return tree_map(lambda t: t.detach(), output), dict(zip(leaves, dense, strict=True))


def check_rows(output: Any, rows: int) -> None:
    """Errors: UnsupportedModel for an output whose first axis is not that of the rows."""
    for tensor in tree_leaves(output):
        if isinstance(tensor, torch.Tensor) and (tensor.ndim == 0 or len(tensor) != rows):
            raise UnsupportedModel(
                f"The model's output for {rows} row(s) has shape {tuple(tensor.shape)}; "
                "its first axis must run over rows."
            )


def check_independence(together: Any, alone: Any, row: int, kind: torch.dtype) -> None:
    """Errors: RowsInteract if the output for `row` is another when the row is alone, beyond the rounding of `kind`."""
    for one, both in zip(tree_leaves(alone), tree_leaves(together), strict=True):
        if (
            isinstance(one, torch.Tensor)
            and one.is_floating_point()
            and not close(both.detach()[row], one[0], kind=kind)
        ):
            gap = float((both.detach()[row] - one[0]).abs().max())
            raise RowsInteract(
                f"The model's output for row {row} changes by {gap:g} when the row is alone in its batch: rows act "
                "on each other, or the model is random. Its rows have no gradients of their own."
            )


def close(got: torch.Tensor, expected: torch.Tensor, floor: float = 0.0, kind: torch.dtype | None = None) -> bool:
    """Equal up to rounding, in norm; or both no more than the rounding of numbers of the size of `floor`.

    kind: the dtype that was computed in, if it is coarser than the tensors'.
    """
    kind = kind or expected.dtype
    tolerance = max(1e-8, 1e4 * torch.finfo(kind).eps) if kind == torch.float64 else 2e-3
    tolerance = 0.1 if kind in (torch.float16, torch.bfloat16) else tolerance
    gap, scale = (got - expected).norm(), torch.maximum(got.norm(), expected.norm())
    allowed = tolerance * scale + 10 * torch.finfo(expected.dtype).eps * floor + torch.finfo(expected.dtype).tiny
    return bool(gap <= allowed)


def check_finite_grads(blocks: BlockGradients) -> None:
    """Errors: NonFiniteValue naming the block and the rows. A sum is finite only if all of it is: one look for all."""
    sums = [array.sum().double() for value in blocks.values() for part in value.parts for array in part.arrays]
    if bool(torch.isfinite(torch.stack(sums).sum())):
        return
    for name, value in blocks.items():
        for part in value.parts:
            bad = {int(k) for a in part.arrays for k in (~torch.isfinite(a.reshape(len(a), -1)).all(1)).nonzero()[:, 0]}
            if bad:
                rows = sorted(bad)[:5]
                raise NonFiniteValue(f"The gradients of block {name!r} are not finite for rows {rows}.", rows)


def check_finite_factors(factors: Mapping[str, torch.Tensor]) -> None:
    """Errors: NonFiniteValue naming the block and the queries."""
    for name, factor in factors.items():
        bad = (~torch.isfinite(factor).all(1)).nonzero()[:, 0].tolist()
        if bad:
            raise NonFiniteValue(f"The factors of block {name!r} are not finite for queries {bad[:5]}.")
