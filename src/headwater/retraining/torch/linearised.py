"""Forecasts of random subsets, linearised at the half-weight optimum: the model for which every row counts one half.

An influence score is a slope: what a little of a row's weight does, at the weights of the model. What a random part of
the rows does, every row being there with probability `share` (one half, say), is better forecast from the model for
which every row counts `share` of what it did. To first order the slope there is each row's Banzhaf value, the mean over
random subsets of what the row adds, and the sum of such values is the best additive forecast of a subset by least
squares.

1. For a convex model at the minimum of mean loss + l2/2 |w|^2 that model is the minimum of
   share * mean loss + l2/2 |w|^2. One Newton solve on all rows finds it, from the weights at hand: nothing is retrained
   on subsets, and no query is looked at.
2. Its curvature is share * H + l2 = share (H + l2 / share). So scores there take damping l2 / share, and forecasts in
   losses are those of the unit "removal" over share; ranks need no such factor.
3. This is so where retraining keeps the sum of the kept rows' losses over all N rows, plus l2 / 2 |w|^2: as a refit of
   scikit-learn does with the same C. A training on the *mean* loss of the kept rows plus l2 / 2 |w|^2 gives fewer rows
   more weight each; then the given weights serve as well or better, with damping l2 (breast cancer, halves: LDS .984,
   at the half-weight optimum .971). Networks that are trained on means are of this kind too.
4. The model must be at the minimum that is meant, all trained parameters under the penalty; that is checked.

Sources: Wang and Jia 2023, "Data Banzhaf", arXiv 2205.15466; Bae et al. 2022, arXiv 2209.05364, for the objective.
"""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import numpy as np
import torch
from torch import nn

from headwater.errors import InvalidSetting, UnsupportedModel
from headwater.retraining.torch.pbrf import ProximalBregman, ProximalSettings, warn_not_converged
from headwater.torch.losses import Loss

NEARLY = 0.05
"""Of the loss's and the penalty's pull, what may be left of their sum at a minimum."""


def half_weight_optimum(
    model: nn.Module,
    loss: Loss,
    x: object,
    y: object,
    *,
    damping: float,
    share: float = 0.5,
    steps: int = 100,
    tolerance: float = 1e-9,
    batch_size: int | None = None,
) -> nn.Module:
    """A copy of the model, solved anew with every row's weight times `share`, for scores that forecast such subsets.

        optimum = half_weight_optimum(model, loss, x, y, damping=l2)
        influence = TorchComposableInfluence(optimum, loss, hw.Direct("hessian"), damping=l2 / 0.5, blocks="full")

    loss: a mean over rows, convex in the output. x, y: all train rows. damping: the l2 of the training, which minimises
    mean loss + l2/2 |w|^2. share: of the rows in the subsets that are asked about, in (0, 1]; when these are fitted,
    rows must keep their weight 1 / N (3 above). The rest as in `ProximalBregman`, which it uses: the solve is in
    float64, and the copy has the model's own dtype.
    Errors: those of `ProximalBregman`; InvalidSetting for the share; UnsupportedModel where the weights are not at that
    minimum. Warns: NotConverged.
    """
    if not (math.isfinite(share) and 0 < share <= 1):
        raise InvalidSetting(f"share is {share}; expected the share of the rows that subsets keep, in (0, 1].")
    found = copy.deepcopy(model)
    if share == 1:
        return found
    settings = ProximalSettings(damping, 1 - share, steps, tolerance, batch_size)
    response = ProximalBregman(model, loss, x, y, x, y, settings=settings)
    _check_minimum(response, damping)
    solved = response.solve(np.arange(response.rows))
    if not solved.converged:
        warn_not_converged(f"the model with every row's weight times {share:g}", solved.steps, solved.slope, settings)
    trained = [parameter for parameter in found.parameters() if parameter.requires_grad]
    with torch.no_grad():
        for parameter, values in zip(trained, solved.weights.split([p.numel() for p in trained]), strict=True):
            parameter.copy_(values.reshape(parameter.shape))
    return found


def recentred(*args: Any, **options: Any) -> nn.Module:
    """Deprecated: `half_weight_optimum`. Warns: DeprecationWarning."""
    warnings.warn("recentred is now half_weight_optimum; the old name ends in 0.2.", DeprecationWarning, stacklevel=2)
    return half_weight_optimum(*args, **options)


def _check_minimum(response: ProximalBregman, damping: float) -> None:
    """Errors: UnsupportedModel unless the mean loss pulls as the penalty pulls back, but for NEARLY."""
    slope, pull = response.mean_gradient(), damping * response.start
    rest, whole = float((slope + pull).norm()), float(slope.norm() + pull.norm())
    if rest > NEARLY * whole:
        raise UnsupportedModel(
            f"The weights are no minimum of mean loss + {damping:g} / 2 |w|^2: its gradient is {rest / whole:.0%} of "
            "what loss and penalty pull. Was the damping the l2 of the training, on all trained parameters, and did "
            "it converge?"
        )
