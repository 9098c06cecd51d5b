"""Trajectory scores of torch models."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from headwater.arrays import to_numpy
from headwater.gradients.provider import StructuredGradientProvider
from headwater.torch.influence import TorchComposableInfluence
from headwater.trajectory.influence import TrajectoryInfluence
from headwater.trajectory.steps import TrainingModel
from headwater.trajectory.torch.steps import TorchTraining


class TorchTrajectoryInfluence(TrajectoryInfluence[torch.Tensor], TorchComposableInfluence):
    """What a recorded training did to a torch model; options as of `TorchComposableInfluence`."""

    def training_model(self) -> TrainingModel:
        header = self.method.trajectory.header
        return TorchTraining(self._torch_provider, header.random > 0, header.still)

    def weights_now(self) -> dict[str, np.ndarray]:
        return {name: to_numpy(p) for name, p in self._torch_provider.model.named_parameters()}

    def provider_at(self, parameters: Mapping[str, np.ndarray]) -> StructuredGradientProvider:
        return self._provide(at(self._given, parameters))


def at(model: nn.Module, parameters: Mapping[str, np.ndarray]) -> nn.Module:
    """A copy of the model with these parameters; the others stay."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name, p in other.named_parameters():
            if name in parameters:
                p.copy_(torch.as_tensor(parameters[name]))
    return other
