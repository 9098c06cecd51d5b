"""Are the scores true? Metrics on plain arrays, and a bank of retrained models; no framework, no method is known.

Truth by retraining: `Bank`, `retrain`, `plan_subsets`, `plan_removals`. Forecasts of it: `lds`, `leave_one_out`,
`plan_curve`, `brittleness`. Rows that ought to be found: `auc` and its kin, `mrr`, `recall_at_k`. Scores by themselves:
`spread`. What any method should beat: `random_scores`, `similarity`, `bm25`, `loss_ranking`, `knn_shapley`,
`out_of_bag`.
"""

from headwater.evaluate.audited import Audit
from headwater.evaluate.bank import Bank, Plan, plan_removals, plan_subsets, retrain
from headwater.evaluate.baselines import Compared, against_random, bm25, loss_ranking, random_scores, similarity
from headwater.evaluate.calibration import Calibration, choose_damping
from headwater.evaluate.correlation import pearson, spearman
from headwater.evaluate.curves import Curve, CurvePlan, plan_curve
from headwater.evaluate.detection import auc, average_precision, precision_at, recall_at, recall_curve
from headwater.evaluate.flips import Brittleness, brittleness
from headwater.evaluate.intervals import Interval, over_queries
from headwater.evaluate.lds import Lds, ceiling, difference, forecast, lds
from headwater.evaluate.left_out import LeftOut, left_out, plan_left_out
from headwater.evaluate.patching import TailPatch, tail_patch
from headwater.evaluate.rank_spread import Spread, spread
from headwater.evaluate.removals import Agreement, agreement, leave_one_out, removal_forecast
from headwater.evaluate.retrieval import duplicates, mrr, precision_at_k, ranking, recall_at_k, reciprocal_ranks
from headwater.evaluate.valuation import knn_shapley, out_of_bag

__all__ = [
    "Agreement",
    "Audit",
    "Bank",
    "Brittleness",
    "Calibration",
    "Compared",
    "Curve",
    "CurvePlan",
    "Interval",
    "Lds",
    "LeftOut",
    "Plan",
    "Spread",
    "TailPatch",
    "against_random",
    "agreement",
    "auc",
    "average_precision",
    "bm25",
    "brittleness",
    "ceiling",
    "choose_damping",
    "difference",
    "duplicates",
    "forecast",
    "knn_shapley",
    "lds",
    "leave_one_out",
    "left_out",
    "loss_ranking",
    "mrr",
    "out_of_bag",
    "over_queries",
    "pearson",
    "plan_curve",
    "plan_left_out",
    "plan_removals",
    "plan_subsets",
    "precision_at",
    "precision_at_k",
    "random_scores",
    "ranking",
    "recall_at",
    "recall_at_k",
    "recall_curve",
    "reciprocal_ranks",
    "removal_forecast",
    "retrain",
    "similarity",
    "spearman",
    "spread",
    "tail_patch",
]
