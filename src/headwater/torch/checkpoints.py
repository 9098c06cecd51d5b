"""The torch models that an influence is of: the user's own, or copies of it at the weights of checkpoints."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from headwater.arrays import dtype_named, is_array, is_torch, to_numpy
from headwater.errors import InvalidInput, InvalidSetting, UnsupportedModel
from headwater.gradients.ensemble import EnsembleProvider
from headwater.gradients.provider import StructuredGradientProvider
from headwater.loaders.forms import map_structure
from headwater.torch.provider import TorchGradientProvider
from headwater.torch.wrapped import fsdp_modules, unwrapped

Checkpoint = Mapping[str, torch.Tensor] | nn.Module | str | os.PathLike[str]
"""Weights: a state dict, a model that has them, or a file that `torch.load` reads as a state dict."""

ProviderType = TypeVar("ProviderType", bound=TorchGradientProvider)


@dataclass(frozen=True, eq=False)
class Models(Generic[ProviderType]):
    """A model, and the gradients of it that are asked for."""

    given: nn.Module
    """Without what was wrapped around it."""
    provide: Callable[[nn.Module], ProviderType]
    """A provider of this model, or of one of its architecture."""
    own: ProviderType
    """That of the model as it was given, whatever the checkpoints."""
    provider: StructuredGradientProvider
    """That of the influence: the model's own, or one of all checkpoints."""

    @classmethod
    def of(
        cls,
        provide: Callable[[nn.Module], ProviderType],
        model: nn.Module,
        checkpoints: Sequence[Checkpoint] | None,
    ) -> Models[ProviderType]:
        """Errors: InvalidSetting, InvalidInput and UnsupportedModel for checkpoints that cannot be of this model."""
        given = unwrapped(model)
        own = provide(given)
        if checkpoints is None:
            return cls(given, provide, own, own)
        return cls(given, provide, own, EnsembleProvider(list(map(provide, _load_all(given, checkpoints)))))

    def as_own(self, arrays: Any) -> Any:
        """Fractions that are no tensors in the model's dtype; tensors as they are. In any structure."""
        return map_structure(self._tensor, arrays)

    def _tensor(self, array: Any) -> Any:
        if not is_array(array) or is_torch(array):
            return array
        found = to_numpy(array)
        if found.dtype.kind != "f":
            return found
        # A copy: what other frameworks share of their memory may not be written to.
        return torch.tensor(found).to(dtype_named(self.own.dtype, torch.empty(0)))


def _load_all(model: nn.Module, checkpoints: Sequence[Checkpoint]) -> list[nn.Module]:
    """Copies of the model at each of the weights. Errors: InvalidSetting if there are none."""
    if fsdp_modules(model):
        raise UnsupportedModel(
            "checkpoints= copies the model, and one that fully_shard (FSDP2) has spread cannot be copied. Load each "
            "checkpoint into it and make an influence of its own, or pass a model that is not spread."
        )
    if isinstance(checkpoints, (Mapping, nn.Module, str, os.PathLike)):
        raise InvalidSetting(f"checkpoints is one {type(checkpoints).__name__}; expected a sequence of checkpoints.")
    found = [_load(model, checkpoint, f"Checkpoint {k}") for k, checkpoint in enumerate(checkpoints)]
    if not found:
        raise InvalidSetting("checkpoints is empty; give at least one, or None for the model as it is.")
    return found


def _load(model: nn.Module, checkpoint: Checkpoint, name: str) -> nn.Module:
    """A copy of the model at other weights. Errors: InvalidInput for weights that are not this architecture's."""
    if isinstance(checkpoint, (str, os.PathLike)):
        name = f"{name} ({os.fspath(checkpoint)})"
    state = _state(checkpoint, name)
    loaded = copy.deepcopy(model)
    try:
        keys = loaded.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise InvalidInput(f"{name} does not fit the model: {error}") from error
    if keys.missing_keys or keys.unexpected_keys:
        raise InvalidInput(
            f"{name} is of another architecture than the model: missing are {keys.missing_keys}, unexpected are "
            f"{keys.unexpected_keys}."
        )
    return loaded


def _state(checkpoint: object, name: str) -> Mapping[str, torch.Tensor]:
    """Its state dict, whatever form it came in."""
    if isinstance(checkpoint, nn.Module):
        return unwrapped(checkpoint).state_dict()
    if isinstance(checkpoint, (str, os.PathLike)):
        checkpoint = torch.load(checkpoint, map_location="cpu", weights_only=True)
    if not isinstance(checkpoint, Mapping):
        raise InvalidInput(f"{name} is {type(checkpoint).__name__}; expected a state dict, a module, or a file of one.")
    return checkpoint
