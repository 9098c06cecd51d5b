"""Rows for a torch model, and how they become calls of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_leaves, tree_map

from headwater.errors import InvalidInput, UnsupportedModel
from headwater.types import Batch


@dataclass(frozen=True, eq=False)
class TorchBatch(Batch[torch.Tensor]):
    """Inputs and targets; x is a tensor, a tuple of tensors (positional arguments) or a dict of them (keywords).

    `weights` [n]: a weight of 2 means the row twice. `ids` [n], integers: names that follow the row everywhere; random
    draws depend on them. Errors: BatchMismatch if lengths disagree.
    """

    weights: torch.Tensor | None = None
    ids: Any = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weights is not None:
            weights = torch.as_tensor(self.weights)
            if not bool((torch.isfinite(weights) & (weights >= 0)).all()):
                raise InvalidInput(f"weights must be finite and not negative; the lowest is {float(weights.min()):g}.")

    def to(self, device: torch.device) -> TorchBatch:
        """On another device; NumPy arrays become tensors. Errors: InvalidInput for what is neither."""
        x, y, weights = (tree_map(lambda v: as_tensor(v, device), part) for part in (self.x, self.y, self.weights))
        return TorchBatch(x, y, weights, self.ids)


def as_tensor(value: object, device: torch.device) -> torch.Tensor | None:
    """Errors: InvalidInput."""
    if value is None:
        return None
    if isinstance(value, torch.Tensor):
        if not (value.is_inference() or torch.is_inference_mode_enabled()):  # nearly always
            return value.detach().to(device)
        with torch.inference_mode(False):  # a tensor made in inference mode cannot take part in autograd; its copy can
            return (value.clone() if value.is_inference() else value.detach()).to(device)
    if isinstance(value, np.ndarray) and not value.flags.writeable:
        value = value.copy()  # torch knows no tensor that cannot be written to
    if isinstance(value, (np.ndarray, np.generic, int, float)):
        return torch.as_tensor(value, device=device)
    raise InvalidInput(f"A batch holds tensors or NumPy arrays, not {type(value).__name__}: {value!r:.80}")


def call(function: Callable[..., Any], x: object) -> Any:
    """The model on inputs x: a dict is keywords, a tuple positional arguments."""
    if isinstance(x, Mapping):
        return function(**x)
    if isinstance(x, (tuple, list)):
        return function(*x)
    return function(x)


def differentiable_input(x: object) -> torch.Tensor:
    """The one floating-point tensor that a perturbation acts on. Errors: UnsupportedModel if x is not one."""
    if isinstance(x, torch.Tensor) and x.is_floating_point():
        return x
    kinds = [str(leaf.dtype) for leaf in tree_leaves(x) if isinstance(leaf, torch.Tensor)]
    raise UnsupportedModel(
        f"mode='perturbation' differentiates with respect to one floating-point tensor x; here x is "
        f"{type(x).__name__} of {', '.join(kinds)}. Use mode='up', or give the model embeddings as its input."
    )
