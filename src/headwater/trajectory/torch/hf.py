"""Trajectory scores of pretrained models."""

from __future__ import annotations

import torch

from headwater.hf.influence import HfComposableInfluence
from headwater.trajectory.influence import TrajectoryInfluence
from headwater.trajectory.steps import TrainingModel
from headwater.trajectory.torch.steps import TorchTraining


class HfTrajectoryInfluence(TrajectoryInfluence[torch.Tensor], HfComposableInfluence):
    """What a recorded training did to a pretrained model; options as of `HfComposableInfluence`."""

    def training_model(self) -> TrainingModel:
        return TorchTraining(self._torch_provider)
