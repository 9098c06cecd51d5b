"""PyTorch models trained again: side by side for a bank, without rows by the proximal Bregman response, one step on."""

import headwater.torch  # noqa: F401 - says which extra is missing
from headwater.retraining.torch.linearised import half_weight_optimum
from headwater.retraining.torch.linearised import recentred as recentred  # deprecated
from headwater.retraining.torch.many import StackedModels, train_many
from headwater.retraining.torch.pbrf import ProximalBregman, ProximalSettings, Response, pbrf
from headwater.retraining.torch.sgd import Sgd
from headwater.retraining.torch.tail_patch import gradient_step
from headwater.retraining.torch.trainer import StackedMlps, TrainingCheckpoint, refit_heads, train_mlps

__all__ = [
    "ProximalBregman",
    "ProximalSettings",
    "Response",
    "Sgd",
    "StackedMlps",
    "StackedModels",
    "TrainingCheckpoint",
    "gradient_step",
    "half_weight_optimum",
    "pbrf",
    "refit_heads",
    "train_many",
    "train_mlps",
]
