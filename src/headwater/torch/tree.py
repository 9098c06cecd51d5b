"""Tensors inside whatever a model returns: tuples, dicts and dataclasses, beside None, numbers and words."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from headwater.types import field_values


def tensors_in(value: object) -> list[torch.Tensor]:
    """All tensors of a nested value, in order; what else is in it is left out."""
    found: list[torch.Tensor] = []
    for leaf in tree_leaves(value):
        if isinstance(leaf, torch.Tensor):
            found.append(leaf)
        elif _is_record(leaf):
            found += [tensor for part in _fields(leaf).values() for tensor in tensors_in(part)]
    return found


def floating(value: object) -> list[torch.Tensor]:
    """The tensors of a nested value that can have gradients."""
    return [tensor for tensor in tensors_in(value) if tensor.is_floating_point()]


def with_tensors(value: object, tensors: Iterator[torch.Tensor]) -> Any:
    """A copy of a nested value with other tensors, in the order of `tensors_in`."""
    leaves, structure = tree_flatten(value)
    return tree_unflatten([_replaced(leaf, tensors) for leaf in leaves], structure)


def map_tensors(function: Callable[[torch.Tensor], torch.Tensor], value: object) -> Any:
    """A copy of a nested value with `function` of each tensor."""
    if isinstance(value, torch.Tensor):
        return function(value)
    return with_tensors(value, map(function, tensors_in(value)))


def _replaced(leaf: object, tensors: Iterator[torch.Tensor]) -> Any:
    if isinstance(leaf, torch.Tensor):
        return next(tensors)
    if not _is_record(leaf):
        return leaf
    changed = copy.copy(leaf)
    for name, part in _fields(leaf).items():
        object.__setattr__(changed, name, with_tensors(part, tensors))  # frozen ones, too
    return changed


def _is_record(value: object) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _fields(record: object) -> dict[str, Any]:
    return {declared.name: value for declared, value in field_values(record)}


def dense(tensor: torch.Tensor) -> torch.Tensor:
    """Not sparse: `Embedding(sparse=True)` has sparse gradients."""
    return tensor.to_dense() if tensor.is_sparse else tensor
