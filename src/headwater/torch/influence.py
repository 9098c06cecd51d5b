"""Influence for torch models."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from headwater.blocks import Structure
from headwater.influence import ComposableInfluence
from headwater.methods.base import Method
from headwater.methods.damping import Damping
from headwater.torch.likelihoods import Likelihood
from headwater.torch.losses import Loss
from headwater.torch.provider import Coverage, TorchGradientProvider


class TorchComposableInfluence(ComposableInfluence[torch.Tensor]):
    """Which training rows made a torch model do this, and by how much.

    model, loss, measurement, likelihood: see `TorchGradientProvider`. method: settings such as hw.Ekfac(). blocks:
    "full", "layer", "parameter" or {name: [parameter or module names]}. damping: a float (absolute), hw.relative(...)
    (times the block's mean eigenvalue), a dict of these by block, or None for the method's default.

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
        measurement: Loss | None = None,
        likelihood: Likelihood | str | None = None,
    ):
        self._torch_provider = TorchGradientProvider(
            model, loss, blocks=blocks, measurement=measurement, likelihood=likelihood
        )
        super().__init__(self._torch_provider, method, damping=damping)

    @property
    def model(self) -> nn.Module:
        return self._torch_provider.model

    @property
    def coverage(self) -> Coverage:
        """How many of the trainable parameters are attributed, and which are not."""
        return self._torch_provider.coverage
