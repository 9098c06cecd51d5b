"""Influence for torch models."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from headwater.arrays import dtype_named, is_array, is_torch, to_numpy
from headwater.attributor import Attributor
from headwater.blocks import Structure
from headwater.errors import InvalidInput, InvalidSetting, UnsupportedModel
from headwater.gradients.coverage import Coverage
from headwater.gradients.ensemble import EnsembleProvider
from headwater.gradients.provider import StructuredGradientProvider
from headwater.loaders.batches import Unpack
from headwater.loaders.forms import Form, map_structure
from headwater.methods.base import Method
from headwater.methods.damping import Damping
from headwater.torch.likelihoods import Likelihood
from headwater.torch.losses import Loss
from headwater.torch.provider import TorchGradientProvider
from headwater.torch.wrapped import fsdp_modules, unwrapped

Checkpoint = Mapping[str, torch.Tensor] | nn.Module | str | os.PathLike[str]
"""Weights: a state dict, a model that has them, or a file that `torch.load` reads as a state dict."""


class TorchComposableInfluence(Attributor[torch.Tensor]):
    """Which training rows made a torch model do this, and by how much.

    model, loss, measurement, likelihood: see `TorchGradientProvider`. method: settings such as hw.Ekfac(). blocks:
    "full", "layer", "parameter" or {name: [parameter or module names]}. damping: a float (absolute), hw.relative(...)
    (times the block's mean eigenvalue), a dict of these by block, or None for the method's default.

    checkpoints: weights of the same architecture, from one run or from models that were trained apart. The scores are
    then the mean over them (for hw.TracIn the sum, with learning rates), and the blocks are "0/<block>", "1/<block>",
    ... `model` gives the architecture only: its own present weights are no further checkpoint, and are not changed.

    unpack: makes (x, y[, ids, weights]) of a loader's items, where they have another form (dicts, three entries).
    target, ids: which columns are the targets and the rows' ids, in data frames and dicts. batch_size: rows in a batch
    that is cut of (x, y), a data frame or a Dataset; no number depends on it. See `headwater.loaders.forms`.

    Parameters with requires_grad=False are left out; `coverage` says how much is attributed.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        method: Method,
        *,
        blocks: Structure = "layer",
        damping: Damping | Mapping[str, Damping] | None = None,
        measurement: Loss | str | None = None,
        likelihood: Likelihood | str | None = None,
        checkpoints: Sequence[Checkpoint] | None = None,
        unpack: Unpack | None = None,
        target: str | Sequence[str] | None = None,
        ids: str | None = None,
        batch_size: int = 256,
    ):
        def provide(model: nn.Module) -> TorchGradientProvider:
            return TorchGradientProvider(model, loss, blocks=blocks, measurement=measurement, likelihood=likelihood)

        self._assemble(provide, model, method, damping, checkpoints, unpack, Form(batch_size, target, ids))

    def _assemble(
        self,
        provide: Callable[[Any], TorchGradientProvider],
        model: nn.Module,
        method: Method,
        damping: Damping | Mapping[str, Damping] | None,
        checkpoints: Sequence[Checkpoint] | None,
        unpack: Unpack | None = None,
        form: Form | None = None,
    ) -> None:
        """One provider, or one for each checkpoint of the model; and the influence on top."""
        model = unwrapped(model)
        self._provide, self._given = provide, model
        self._torch_provider = provide(model)
        provider: StructuredGradientProvider = self._torch_provider
        if checkpoints is not None:
            provider = EnsembleProvider([provide(loaded) for loaded in _load_all(model, checkpoints)])
        Attributor.__init__(self, provider, method, damping=damping, unpack=unpack, form=form)

    def as_own(self, name: str, array: Any) -> Any:
        """Fractions that are no tensors in the model's dtype; tensors as they are."""
        return map_structure(self._tensor, array)

    def _tensor(self, array: Any) -> Any:
        if not is_array(array) or is_torch(array):
            return array
        found = to_numpy(array)
        if found.dtype.kind != "f":
            return found
        # A copy: what other frameworks share of their memory may not be written to.
        return torch.tensor(found).to(dtype_named(self._torch_provider.dtype, torch.empty(0)))

    @property
    def model(self) -> nn.Module:
        return self._torch_provider.model

    @property
    def coverage(self) -> Coverage:
        """How many of the trainable parameters are attributed, and which are not."""
        return self._torch_provider.coverage


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
