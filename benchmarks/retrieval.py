"""Finding rows of one kind, and choosing rows to train on: digits of scikit-learn, a small network, CPU minutes.

    python benchmarks/retrieval.py planted [--seeds 10]
    python benchmarks/retrieval.py selection [--seeds 10]

**planted.** Among 1,400 rows, 20 threes are labelled as eights. The network learns both rules. Ten reference queries
are other threes, labelled as eights; rows are ranked by their mean score over the ten, and the average precision says
how far up the 20 are. What they look like does not tell them from other threes, nor their label from other eights;
features and labels together do, which is the baseline to beat.

**selection.** Of 1,200 rows, the labels of half are drawn anew at random. Rows are ranked by their mean score over 100
clean queries, the best 300 train a network from scratch, for as many steps; its accuracy is taken on 400 other rows.

Each seed draws its own rows, labels and first weights. Figures are means over seeds, with 90 % intervals over them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits

import headwater as hw
from headwater.evaluate import (
    average_precision,
    knn_shapley,
    loss_ranking,
    over_queries,
    random_scores,
    similarity,
)
from headwater.tables import table

PLANTED, REFERENCES, CHOSEN, STEPS = 20, 10, 300, 150
Ranking = Callable[[], np.ndarray]
"""Scores [q, n]."""
DIRECTIONS: Mapping[str, tuple[Any, str | None]] = {
    "grad-dot": (hw.GradDot(), None),
    "grad-cos": (hw.GradCos(), None),
    "EKFAC": (hw.Ekfac(), None),
    "EKFAC, train side": (hw.Ekfac(), "train"),
    "EKFAC, both sides": (hw.Ekfac(), "both"),
    "TRAK": (hw.Trak(256), None),
    "TRAK, both sides": (hw.Trak(256), "both"),
}


def trained(x: torch.Tensor, y: torch.Tensor, seed: int) -> torch.nn.Sequential:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Tanh(), torch.nn.Linear(32, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=1e-4)
    for _ in range(STEPS):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


def rankings(x: torch.Tensor, y: torch.Tensor, asked: torch.Tensor, wanted: torch.Tensor, seed: int) -> dict[str, Any]:
    """By name: what ranks the rows (x, y) for queries (asked, wanted), larger first."""
    model, labels = trained(x, y, seed), (wanted.numpy(), y.numpy())
    with torch.no_grad():
        inner, outer = model[1](model[0](x)).numpy(), model[1](model[0](asked)).numpy()
        losses = torch.nn.functional.cross_entropy(model(x), y, reduction="none").numpy()

    def scored(method: Any, normalise: str | None) -> Ranking:
        def ranking() -> np.ndarray:
            influence = hw.Influence(model, "cross_entropy", method)
            return np.asarray(influence.fit([(x, y)]).attribute([(x, y)], [(asked, wanted)], normalise=normalise))

        return ranking

    found: dict[str, Ranking] = {
        "random": lambda: random_scores(len(asked), len(x), seed),
        "own loss, largest": lambda: loss_ranking(losses, len(asked)),
        "own loss, smallest": lambda: loss_ranking(-losses, len(asked)),
        "cosine of inputs": lambda: similarity(asked.numpy(), x.numpy()),
        "cosine of inputs, with labels": lambda: similarity(asked.numpy(), x.numpy(), *labels),
        "cosine of activations, with labels": lambda: similarity(outer, inner, *labels),
        "KNN-Shapley": lambda: knn_shapley(asked.numpy(), x.numpy(), *labels),
    }
    return found | {name: scored(*setting) for name, setting in DIRECTIONS.items()}


def digits(seed: int) -> tuple[torch.Tensor, torch.Tensor, np.random.Generator]:
    """In an order of the seed."""
    rng, (x, y) = np.random.default_rng(seed), load_digits(return_X_y=True)
    order = rng.permutation(len(x))
    return torch.as_tensor(x[order] / 16.0, dtype=torch.float32), torch.as_tensor(y[order]), rng


def planted(seed: int) -> dict[str, float]:
    """Average precision of the planted rows, by what ranks."""
    x, y, rng = digits(seed)
    threes = np.flatnonzero(y[:1400].numpy() == 3)
    kind = np.zeros(1400, dtype=bool)
    kind[rng.choice(threes, PLANTED, replace=False)] = True
    labels = y[:1400].clone()
    labels[torch.as_tensor(kind)] = 8
    others = 1400 + np.flatnonzero(y[1400:].numpy() == 3)[:REFERENCES]
    asked, wanted = x[others], torch.full((len(others),), 8)
    ranked = rankings(x[:1400], labels, asked, wanted, seed)
    return {name: float(average_precision(rank().mean(axis=0), kind)) for name, rank in ranked.items()}


def selection(seed: int) -> dict[str, float]:
    """Accuracy of a network on the rows that are chosen, by what ranks."""
    x, y, rng = digits(seed)
    labels = y[:1200].clone()
    wrong = torch.as_tensor(rng.choice(1200, 600, replace=False))
    labels[wrong] = torch.as_tensor(rng.integers(10, size=600))
    found = {}
    for name, rank in rankings(x[:1200], labels, x[1200:1300], y[1200:1300], seed).items():
        best = torch.as_tensor(np.argsort(-rank().mean(axis=0))[:CHOSEN].copy())
        model = trained(x[best], labels[best], seed + 1000)
        with torch.no_grad():
            found[name] = float((model(x[1300:1700]).argmax(1) == y[1300:1700]).double().mean())
    return found


def main() -> None:
    given = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    given.add_argument("task", choices=["planted", "selection"])
    given.add_argument("--seeds", type=int, default=10)
    asked = given.parse_args()
    task = {"planted": planted, "selection": selection}[asked.task]
    found = [task(seed) for seed in range(asked.seeds)]
    figure = {"planted": "average precision", "selection": "accuracy"}[asked.task]
    lines = [["ranked by", figure]]
    lines += [[name, str(over_queries(np.array([one[name] for one in found])))] for name in found[0]]
    print(table(lines, left=(0, 1)))


if __name__ == "__main__":
    main()
