"""Trajectory scores of torch models."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from headwater.gradients.provider import StructuredGradientProvider
from headwater.torch.influence import TorchComposableInfluence
from headwater.trajectory.influence import TrajectoryInfluence
from headwater.trajectory.steps import TrainingModel
from headwater.trajectory.torch.steps import TorchTraining, buffers_of, weights_of


class TorchTrajectoryInfluence(TrajectoryInfluence[torch.Tensor], TorchComposableInfluence):
    """What a recorded training did to a torch model; options as of `TorchComposableInfluence`."""

    def training_model(self) -> TrainingModel:
        return TorchTraining.of(self._models.own, self.method.trajectory)

    def weights_now(self) -> dict[str, np.ndarray]:
        return weights_of(self._models.own)

    def statistics_now(self) -> dict[str, np.ndarray]:
        return buffers_of(self._models.own)

    def provider_at(self, parameters: Mapping[str, np.ndarray]) -> StructuredGradientProvider:
        return self._models.provide(at(self._models.given, parameters))


def at(model: nn.Module, parameters: Mapping[str, np.ndarray]) -> nn.Module:
    """A copy of the model with these parameters; the others stay."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name, p in other.named_parameters():
            if name in parameters:
                p.copy_(torch.as_tensor(parameters[name]))
    return other
