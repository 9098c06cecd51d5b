"""The slow plain way: a copy of the model in float64, and gradients by autograd, one row at a time."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from headwater.errors import UnsupportedModel
from headwater.gradients.block import BlockGradient
from headwater.gradients.provider import BlockGradients
from headwater.torch.batch import TorchBatch
from headwater.torch.capture import autograd_on, detached_state
from headwater.torch.check import one_row_alone
from headwater.torch.provider import TorchGradientProvider


class PlainTorchProvider(TorchGradientProvider):
    """A model in float64 whose rows' gradients come from autograd alone: no layer rule, no batch, no algebra.

    What else is asked of a provider (draws of the Fisher information, products) is TorchGradientProvider's, in float64.
    Rows without ids are named by what they held before they became float64, so that random draws stay theirs.
    """

    def _ready(self, batch: TorchBatch) -> TorchBatch:
        if not isinstance(batch, TorchBatch) or batch.ids is None:
            batch = TorchBatch(batch.x, batch.y, getattr(batch, "weights", None), super().row_keys(batch))
        batch = batch.to(self.device)
        x, y = (tree_map(_double, part) for part in (batch.x, batch.y))
        return super()._ready(TorchBatch(x, y, batch.weights, batch.ids))

    def as_batch(self, x: Any, y: Any) -> TorchBatch:
        return self._ready(TorchBatch(x, y))

    def grads(self, batch: TorchBatch, *, query: bool = False, weighted: bool = True) -> BlockGradients:
        batch = self._prepare(batch)
        rows = [self._one_row(batch.take(slice(k, k + 1)), query) for k in range(len(batch))]
        blocks: BlockGradients = BlockGradients()
        for name, layout in self.layouts.items():
            names = [p.name for p in layout.block.parameters]
            flat = torch.stack([torch.cat([row[n].reshape(-1) for n in names]) for row in rows])
            value = BlockGradient.from_flat(layout, flat)
            weights = self.row_weights(batch) if weighted else None
            blocks[name] = value if weights is None else value.weighted(weights)
        return blocks

    def _one_row(self, row: TorchBatch, query: bool) -> dict[str, torch.Tensor]:
        with autograd_on():
            state = detached_state(self.model)
            names = [p.name for layout in self.layouts.values() for p in layout.block.parameters]
            leaves = {name: state[name].requires_grad_() for name in names}
            return one_row_alone(self.model, self.measurement if query else self.loss, row, state, leaves)[1]


def wide_copy(value: Any, what: str) -> Any:
    """A model or loss in float64, as a copy. Errors: UnsupportedModel where torch cannot copy it."""
    if isinstance(value, nn.Module):
        try:
            return copy.deepcopy(value).double()
        except (RuntimeError, TypeError) as error:
            raise UnsupportedModel(f"The {what} cannot be copied to float64: {error}") from error
    if isinstance(value, partial):
        options = {name: _double(option) for name, option in value.keywords.items()}
        return partial(value.func, *(_double(option) for option in value.args), **options)
    return value


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
