"""A table: is a tumour benign? Patients that a logistic regression is wrong about, and the patients behind that."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_breast_cancer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

import headwater as hw

ROWS = 350


def setup(seed: int = 0) -> dict[str, Any]:
    """A job on the patients that the model gets wrong. Rows are data frames; patients' names are their ids."""
    x, y = load_breast_cancer(return_X_y=True, as_frame=True)
    x = x[[name for name in x.columns if name.startswith("mean ")]]
    x.columns = [name.removeprefix("mean ") for name in x.columns]
    diagnosis = y.map({0: "malignant", 1: "benign"}).rename("diagnosis")
    x.index = diagnosis.index = x.index.map("patient {:03d}".format)
    order = np.random.default_rng(seed).permutation(len(x))
    train, rest = order[:ROWS], order[ROWS:]
    model = trained(x.iloc[train], diagnosis.iloc[train])
    said = model.predict(x.iloc[rest])
    wrong = rest[said != diagnosis.iloc[rest]]
    asked, truth = x.iloc[wrong], diagnosis.iloc[wrong]

    def retrain(kept: NDArray[np.int64], seed: int) -> NDArray[np.float64]:
        """Losses of the queries, of a model that never saw the other rows; the scale of columns stays that of all."""
        again = _classifier().fit(model[:-1].transform(x.iloc[train[kept]]), diagnosis.iloc[train[kept]])
        chances = again.predict_log_proba(model[:-1].transform(asked))
        return -chances[np.arange(len(wrong)), np.searchsorted(again.classes_, truth)]

    return {
        "influence": hw.Influence(model),
        "train": (x.iloc[train], diagnosis.iloc[train]),
        "query": (asked, truth),
        "rows": x.join(diagnosis.rename("label")),
        "queries": x.join(diagnosis.rename("label")),
        "predictions": model.predict(asked),
        "retrain": retrain,
    }


def trained(x: Any, y: Any) -> Pipeline:
    """Standardised, then a logistic regression."""
    return make_pipeline(StandardScaler(), _classifier()).fit(x, y)


def _classifier() -> LogisticRegression:
    return LogisticRegression(C=1.0, max_iter=2000, tol=1e-10)
