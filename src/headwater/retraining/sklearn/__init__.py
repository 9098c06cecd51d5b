"""scikit-learn estimators fitted again: any of them for a bank, linear models without rows exactly."""

import headwater.sklearn  # noqa: F401 - says which extra is missing
from headwater.retraining.sklearn.refit import Refit
from headwater.retraining.sklearn.removal import ExactRemoval, Refits
from headwater.retraining.sklearn.training import TrainingInfluence

__all__ = ["ExactRemoval", "Refit", "Refits", "TrainingInfluence"]
