"""Trajectory scores of pretrained models."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from headwater.gradients.provider import StructuredGradientProvider
from headwater.hf.influence import HfComposableInfluence
from headwater.trajectory.influence import TrajectoryInfluence
from headwater.trajectory.steps import TrainingModel
from headwater.trajectory.torch.influence import at
from headwater.trajectory.torch.steps import TorchTraining, buffers_of, weights_of


class HfTrajectoryInfluence(TrajectoryInfluence[torch.Tensor], HfComposableInfluence):
    """What a recorded training did to a pretrained model; options as of `HfComposableInfluence`."""

    def training_model(self) -> TrainingModel:
        return TorchTraining.of(self._models.own, self.method.trajectory)

    def weights_now(self) -> dict[str, np.ndarray]:
        return weights_of(self._models.own)

    def statistics_now(self) -> dict[str, np.ndarray]:
        return buffers_of(self._models.own)

    def provider_at(self, parameters: Mapping[str, np.ndarray]) -> StructuredGradientProvider:
        return self._models.provide(at(self._models.given, parameters))
