"""Are the scores true? Metrics on plain arrays; they know neither a framework nor how the scores were made."""

from headwater.evaluate.detection import auc, average_precision, precision_at, recall_at, recall_curve

__all__ = ["auc", "average_precision", "precision_at", "recall_at", "recall_curve"]
