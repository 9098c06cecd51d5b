"""Numbers wide enough: sums of half-precision numbers in float32, and copies of models, losses and rows in float64."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from headwater.errors import UnsupportedModel
from headwater.torch.batch import TorchBatch


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """Half precision becomes float32: products and sums are never accumulated in less."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def wide_copy(value: object, what: str) -> Any:
    """A model or loss in float64, as a copy. Errors: UnsupportedModel where torch cannot copy it."""
    if isinstance(value, nn.Module):
        try:
            return copy.deepcopy(value).double()
        except Exception as error:  # whatever copying a user's object raises
            raise UnsupportedModel(f"The {what} cannot be copied to float64: {error}") from error
    if isinstance(value, partial):
        options = {name: _double(option) for name, option in value.keywords.items()}
        return partial(value.func, *(_double(option) for option in value.args), **options)
    return value


def doubled(batch: TorchBatch) -> TorchBatch:
    """The same rows, with inputs and targets in float64."""
    return replace(batch, x=tree_map(_double, batch.x), y=tree_map(_double, batch.y))


def _double(value: object) -> Any:
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
