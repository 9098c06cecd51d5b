"""Trajectory scores of torch models."""

from __future__ import annotations

import torch

from headwater.torch.influence import TorchComposableInfluence
from headwater.trajectory.influence import TrajectoryInfluence
from headwater.trajectory.steps import TrainingModel
from headwater.trajectory.torch.steps import TorchTraining


class TorchTrajectoryInfluence(TrajectoryInfluence[torch.Tensor], TorchComposableInfluence):
    """What a recorded training did to a torch model; options as of `TorchComposableInfluence`."""

    def training_model(self) -> TrainingModel:
        return TorchTraining(self._torch_provider)
