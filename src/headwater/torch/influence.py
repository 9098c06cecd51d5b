"""Influence for torch models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from headwater.attributor import Attributor
from headwater.blocks import Structure
from headwater.gradients.coverage import Coverage
from headwater.loaders.batches import Unpack
from headwater.loaders.forms import Form
from headwater.methods.base import Method
from headwater.methods.damping import Damping
from headwater.torch.checkpoints import Checkpoint, Models
from headwater.torch.likelihoods import Likelihood
from headwater.torch.losses import Loss
from headwater.torch.provider import TorchGradientProvider


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

        self._models = Models.of(provide, model, checkpoints)
        form = Form(batch_size, target, ids)
        super().__init__(self._models.provider, method, damping=damping, unpack=unpack, form=form)

    def as_own(self, name: str, array: Any) -> Any:
        """Fractions that are no tensors in the model's dtype; tensors as they are."""
        return self._models.as_own(array)

    @property
    def model(self) -> nn.Module:
        return self._models.own.model

    @property
    def coverage(self) -> Coverage:
        """How many of the trainable parameters are attributed, and which are not."""
        return self._models.own.coverage
