"""headwater: graddot | kfac | kfac_factored | ekfac | ekfac_r4 | ekfac_r16 | ekfac_all_labels | ekfac_rel.

A driver in the manner of the peers' own, started by run.py. `--damping none` stands for 0.1 times the block's mean
eigenvalue, as it does for kronfluence.
"""

import importlib.metadata
import sys
import tomllib

import numpy as np
from peers import REPO, SOURCE, peerbench_folder

for folder in (str(peerbench_folder()), str(SOURCE)):
    if folder not in sys.path:
        sys.path.insert(0, folder)

import common  # noqa: E402
import torch  # noqa: E402

import headwater as hw  # noqa: E402
from headwater.torch import TorchComposableInfluence  # noqa: E402


def batches(x: torch.Tensor, y: torch.Tensor, size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return list(zip(x.split(size), y.split(size), strict=True))


def attribute_with(method, damping=None):
    """A driver method: fit on the train rows, score every pair, return scores [train, query]."""

    def run(w, meter, args) -> np.ndarray:
        added = damping if damping is not None else hw.relative(0.1) if w.damping is None else w.damping
        loss = w.loss_vec if w.seq else torch.nn.CrossEntropyLoss()
        influence = TorchComposableInfluence(w.model, loss, method=method, damping=added, likelihood="cross_entropy")
        train, query = batches(w.x, w.y, args.batch), batches(w.xq, w.yq, args.qbatch or len(w.xq))
        with meter("fit"):
            influence.fit(train)
        with meter("score"):
            scores = np.asarray(influence.attribute(train, query))
        return scores.T

    return run


def know_own_version() -> None:
    """Let the driver's header find headwater's version where it runs from src/ and is not installed."""
    installed = importlib.metadata.version

    def version(distribution: str) -> str:
        if distribution != "headwater":
            return installed(distribution)
        return str(tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["version"])

    importlib.metadata.version = version


ONE_LABEL = {"fisher": "sampled"}  # one sampled label for each row, as in kronfluence; headwater's default takes all
METHODS = {
    "graddot": attribute_with(hw.GradDot()),
    "kfac": attribute_with(hw.Kfac(**ONE_LABEL)),
    "kfac_factored": attribute_with(hw.Kfac(damping_form="factored", **ONE_LABEL)),
    "ekfac": attribute_with(hw.Ekfac(**ONE_LABEL)),
    "ekfac_r4": attribute_with(hw.Ekfac(rank=4, **ONE_LABEL)),
    "ekfac_r16": attribute_with(hw.Ekfac(rank=16, **ONE_LABEL)),
    "ekfac_all_labels": attribute_with(hw.Ekfac()),
    "ekfac_rel": attribute_with(hw.Ekfac(**ONE_LABEL), damping=hw.relative(0.1)),
}

if __name__ == "__main__":
    know_own_version()
    common.main("headwater", "headwater", METHODS)
