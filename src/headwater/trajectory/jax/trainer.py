"""Train a JAX function, recorded."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from headwater.jax.losses import Loss
from headwater.jax.provider import Apply, JaxGradientProvider
from headwater.retraining.settings import check_counts
from headwater.trajectory.jax.steps import JaxTraining
from headwater.trajectory.optimizers import Optimizer
from headwater.trajectory.rows import HeldRows
from headwater.trajectory.train import train
from headwater.types import Batch


def train_recorded(
    apply: Apply,
    params: Any,
    loss: Loss,
    x: Any,
    y: Any,
    optimizer: Optimizer,
    folder: str | os.PathLike[str],
    *,
    steps: int,
    batch_size: int = 64,
    seed: int = 0,
    keep: str = "sqrt",
    clip: float | None = None,
) -> Any:
    """The parameters that training comes to, from `params`: means of row losses over seeded shuffles of the rows.

    x, y: arrays [n, ...]; rows are called by their positions. The same call goes on with a record that was broken off.
    Errors: InvalidSetting; AlreadySaved; NonFiniteValue.
    """
    check_counts(steps=steps, batch_size=batch_size)
    provider = JaxGradientProvider(apply, params, loss)
    held = HeldRows.of(provider, [Batch(x, y)])
    names = [p.name for layout in provider.layouts.values() for p in layout.block.parameters]
    start = {name: provider.leaves[name] for name in names}
    order = shuffled(len(held), steps, batch_size, seed)
    state = train(
        JaxTraining(provider), start, optimizer, order, held.pieces, folder, keep=keep, clip=clip, framework="jax"
    )
    return provider.trained_model.tree.build({**provider.leaves, **state.parameters})


def shuffled(rows: int, steps: int, batch_size: int, seed: int) -> np.ndarray:
    """The rows of each step, [steps, batch]: one seeded shuffle after the other; a batch may span two."""
    generator = np.random.default_rng(seed)
    shuffles = [generator.permutation(rows) for _ in range(-(-steps * batch_size // rows))]
    return np.concatenate(shuffles)[: steps * batch_size].reshape(steps, batch_size)
