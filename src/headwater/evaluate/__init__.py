"""Are the scores true? Metrics on plain arrays, and a bank of retrained models; no framework, no method is known."""

from headwater.evaluate.detection import auc, average_precision, precision_at, recall_at, recall_curve

__all__ = ["auc", "average_precision", "precision_at", "recall_at", "recall_curve"]
