"""Trajectory scores of JAX functions."""

from __future__ import annotations

import jax

from headwater.jax.influence import JaxComposableInfluence
from headwater.trajectory.influence import TrajectoryInfluence
from headwater.trajectory.jax.steps import JaxTraining
from headwater.trajectory.steps import TrainingModel


class JaxTrajectoryInfluence(TrajectoryInfluence[jax.Array], JaxComposableInfluence):
    """What a recorded training did to a JAX function; options as of `JaxComposableInfluence`."""

    def training_model(self) -> TrainingModel:
        return JaxTraining(self._jax_provider)
