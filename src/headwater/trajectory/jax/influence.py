"""Trajectory scores of JAX functions."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from headwater.arrays import to_numpy
from headwater.gradients.provider import StructuredGradientProvider
from headwater.jax.influence import JaxComposableInfluence
from headwater.trajectory.influence import TrajectoryInfluence
from headwater.trajectory.jax.steps import JaxTraining
from headwater.trajectory.steps import TrainingModel


class JaxTrajectoryInfluence(TrajectoryInfluence[jax.Array], JaxComposableInfluence):
    """What a recorded training did to a JAX function; options as of `JaxComposableInfluence`."""

    def training_model(self) -> TrainingModel:
        return JaxTraining(self._jax_provider)

    def weights_now(self) -> dict[str, np.ndarray]:
        return {name: to_numpy(value) for name, value in self._jax_provider.leaves.items()}

    def provider_at(self, parameters: Mapping[str, np.ndarray]) -> StructuredGradientProvider:
        own = self._jax_provider.leaves
        new = {name: jnp.asarray(value, dtype=own[name].dtype) for name, value in parameters.items()}
        return self._jax_provider.with_params(self._jax_provider.trained_model.tree.build({**own, **new}))
