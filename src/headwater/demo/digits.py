"""Images: a small network that was taught wrong labels, and what it misreads because of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits

import headwater as hw

ROWS, WIDTH, STEPS, BATCH, RATE, L2 = 1000, 16, 300, 64, 0.2, 1e-3
MISLABELLED = ((4, 9, 0.3), (7, 1, 0.2))
"""Planted in the training rows: (digit, what it is called instead, share of that digit's rows)."""


def setup(seed: int = 0, method: str | None = None) -> dict[str, Any]:
    """A job on the digits that the network gets wrong. method: a name in `hw.METHODS`, in place of the exact one."""
    images, digits = load_digits(return_X_y=True)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(digits))
    train, rest = order[:ROWS], order[ROWS:]
    labels = _mislabelled(digits[train], rng)
    x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(digits)
    given = torch.tensor(labels)
    model = trained(x[train], given, seed)
    said = model(x[rest]).argmax(1).numpy()
    wrong = rest[said != digits[rest]]
    asked, truth = x[wrong], y[wrong]

    def retrain(kept: NDArray[np.int64], seed: int) -> NDArray[np.float64]:
        """Losses of the queries, of a network that never saw the other rows."""
        again = trained(x[train][kept], given[kept], seed)
        with torch.no_grad():
            losses = torch.nn.functional.cross_entropy(again(asked), truth, reduction="none")
        return losses.double().numpy()

    def row(place: int) -> dict[str, Any]:
        truth = digits[train[place]]
        return _shown(images[train[place]], labels[place], "" if labels[place] == truth else f"in truth a {truth}")

    if method is None:
        # The Gauss-Newton curvature, exactly: the network has 1,210 weights.
        influence = hw.Influence(model, "cross_entropy", hw.Direct(curvature="ggn"), blocks="full")
    else:
        influence = hw.Influence(model, "cross_entropy", method)
    return {
        "influence": influence,
        "train": (x[train], given),
        "query": (asked, truth),
        "rows": row,
        "queries": lambda place: _shown(images[wrong[place]], digits[wrong[place]]),
        "predictions": said[said != digits[rest]],
        "retrain": retrain,
    }


def trained(x: torch.Tensor, y: torch.Tensor, seed: int) -> torch.nn.Module:
    """A network that was trained on these rows. All that is drawn comes from the seed, and nothing global does."""
    drawn = torch.Generator().manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(64, WIDTH), torch.nn.Tanh(), torch.nn.Linear(WIDTH, 10))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=drawn) * parameter.shape[-1] ** -0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9, weight_decay=L2)
    for _ in range(STEPS):
        rows = torch.randint(len(x), (BATCH,), generator=drawn)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    return model.eval()


def _shown(ink: NDArray[np.float64], label: int, note: str = "") -> dict[str, Any]:
    return {"image": 1 - ink.reshape(8, 8) / 16, "label": int(label), "note": note}


def _mislabelled(digits: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
    labels = digits.copy()
    for digit, called, share in MISLABELLED:
        rows = rng.permutation(np.flatnonzero(digits == digit))
        labels[rows[: round(share * len(rows))]] = called
    return labels
