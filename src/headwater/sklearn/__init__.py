"""scikit-learn: fitted linear models in NumPy, gradients and curvature in closed form, and exact removal of rows."""

try:
    import sklearn as _sklearn  # noqa: F401
except ImportError:
    from headwater.errors import MissingExtra

    raise MissingExtra("scikit-learn", "sklearn") from None

from typing import TYPE_CHECKING

from headwater.moved import offered
from headwater.sklearn.batch import SklearnBatch
from headwater.sklearn.influence import SklearnComposableInfluence
from headwater.sklearn.linear import EstimatorNotFittedError
from headwater.sklearn.provider import SklearnGradientProvider
from headwater.sklearn.regression import diagnostics

if TYPE_CHECKING:
    from headwater.retraining.sklearn import ExactRemoval, Refit, Refits, TrainingInfluence

__getattr__ = offered(
    __name__, ("ExactRemoval", "Refit", "Refits", "TrainingInfluence"), "headwater.retraining.sklearn"
)

__all__ = [
    "EstimatorNotFittedError",
    "ExactRemoval",
    "Refit",
    "Refits",
    "SklearnBatch",
    "SklearnComposableInfluence",
    "SklearnGradientProvider",
    "TrainingInfluence",
    "diagnostics",
]
