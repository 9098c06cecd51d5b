"""PyTorch: per-sample gradients of any nn.Module, and influence on top of them."""

try:
    import torch as _torch  # noqa: F401
except ImportError:
    from headwater.errors import MissingExtra

    raise MissingExtra("torch", "torch") from None

from typing import TYPE_CHECKING

from headwater.gradients.coverage import Coverage
from headwater.moved import offered
from headwater.torch.batch import TorchBatch
from headwater.torch.influence import TorchComposableInfluence
from headwater.torch.likelihoods import Bernoulli, CrossEntropy, Likelihood, OutputHessian, SquaredError, TargetSampler
from headwater.torch.measurements import negative_logit, negative_margin
from headwater.torch.provider import TorchGradientProvider

if TYPE_CHECKING:
    from headwater.retraining.torch.linearised import half_weight_optimum
    from headwater.retraining.torch.linearised import recentred as recentred  # deprecated
    from headwater.retraining.torch.pbrf import ProximalBregman, pbrf

__getattr__ = offered(
    __name__, ("ProximalBregman", "half_weight_optimum", "pbrf", "recentred"), "headwater.retraining.torch"
)

__all__ = [
    "Bernoulli",
    "Coverage",
    "CrossEntropy",
    "Likelihood",
    "OutputHessian",
    "ProximalBregman",
    "SquaredError",
    "TargetSampler",
    "TorchBatch",
    "TorchComposableInfluence",
    "TorchGradientProvider",
    "half_weight_optimum",
    "negative_logit",
    "negative_margin",
    "pbrf",
]
