"""JAX: per-sample gradients of any function of parameters and rows, and influence on top of them."""

try:
    import jax as _jax  # noqa: F401
except ImportError:
    from headwater.errors import MissingExtra

    raise MissingExtra("jax", "jax") from None

from headwater.gradients.coverage import Coverage
from headwater.gradients.likelihoods import (
    Bernoulli,
    CrossEntropy,
    Likelihood,
    OutputHessian,
    SquaredError,
    TargetSampler,
)
from headwater.gradients.measurements import negative_logit, negative_margin
from headwater.jax.batch import JaxBatch
from headwater.jax.cache import compilation_cache
from headwater.jax.influence import JaxComposableInfluence
from headwater.jax.losses import binary_cross_entropy, cross_entropy, squared_error
from headwater.jax.provider import JaxGradientProvider

__all__ = [
    "Bernoulli",
    "Coverage",
    "CrossEntropy",
    "JaxBatch",
    "JaxComposableInfluence",
    "JaxGradientProvider",
    "Likelihood",
    "OutputHessian",
    "SquaredError",
    "TargetSampler",
    "binary_cross_entropy",
    "compilation_cache",
    "cross_entropy",
    "negative_logit",
    "negative_margin",
    "squared_error",
]
