"""scikit-learn: fitted linear models in NumPy, gradients and curvature in closed form, and exact removal of rows."""

try:
    import sklearn as _sklearn  # noqa: F401
except ImportError:
    from headwater.errors import MissingExtra

    raise MissingExtra("scikit-learn", "sklearn") from None

from headwater.sklearn.batch import SklearnBatch
from headwater.sklearn.influence import SklearnComposableInfluence
from headwater.sklearn.linear import EstimatorNotFittedError
from headwater.sklearn.provider import SklearnGradientProvider
from headwater.sklearn.removal import ExactRemoval, Refits
from headwater.sklearn.retraining import Refit
from headwater.sklearn.training import TrainingInfluence

__all__ = [
    "EstimatorNotFittedError",
    "ExactRemoval",
    "Refit",
    "Refits",
    "SklearnBatch",
    "SklearnComposableInfluence",
    "SklearnGradientProvider",
    "TrainingInfluence",
]
