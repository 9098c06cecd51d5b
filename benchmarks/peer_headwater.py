"""headwater's methods, by the names in METHODS; a driver in the manner of the peers' own, started by run.py.

`--damping none` stands for 0.1 times the block's mean eigenvalue, as it does for kronfluence. Methods whose peers work
on all parameters at once have one block, "full"; the others one for each layer. A name that ends in `_last` sees the
last layer only.
"""

import importlib.metadata
import sys
import tomllib
from collections.abc import Callable

import numpy as np
from peers import REPO, SOURCE, peerbench_folder

for folder in (str(peerbench_folder()), str(SOURCE)):
    if folder not in sys.path:
        sys.path.insert(0, folder)

import common  # noqa: E402
import torch  # noqa: E402

import headwater as hw  # noqa: E402
from headwater.gradients.likelihoods import CrossEntropy  # noqa: E402
from headwater.torch import TorchComposableInfluence  # noqa: E402


def batches(x: torch.Tensor, y: torch.Tensor, size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return list(zip(x.split(size), y.split(size), strict=True))


def influence_of(w, method, *, blocks: str = "layer", damping=None) -> TorchComposableInfluence:
    """Of the workload's model, with its damping where none is said."""
    added = damping if damping is not None else hw.relative(0.1) if w.damping is None else w.damping
    loss = w.loss_vec if w.seq else torch.nn.CrossEntropyLoss()
    # Of sequences the last axis is said: as many positions as classes would leave it open.
    labels = CrossEntropy(class_axis=-1) if w.seq else "cross_entropy"
    return TorchComposableInfluence(w.model, loss, method=method, blocks=blocks, damping=added, likelihood=labels)


def attribute_with(make_method: Callable, *, blocks: str = "layer", damping=None) -> Callable[..., np.ndarray]:
    """A driver method: fit on the train rows, score every pair, return scores [train, query].

    The method is made when the driver runs, so that a table may name what another version does not have.
    """

    def run(w, meter, args) -> np.ndarray:
        influence = influence_of(w, make_method(), blocks=blocks, damping=damping)
        train, query = batches(w.x, w.y, args.batch), batches(w.xq, w.yq, args.qbatch or len(w.xq))
        with meter("fit"):
            influence.fit(train)
        with meter("score"):
            scores = np.asarray(influence.attribute(train, query))
        return scores.T

    return run


def on_themselves(make_method: Callable) -> Callable[..., np.ndarray]:
    """Self-influence; each row's score stands in every query's column, since drivers return scores [train, query]."""

    def run(w, meter, args) -> np.ndarray:
        influence, train = influence_of(w, make_method()), batches(w.x, w.y, args.batch)
        with meter("fit"):
            influence.fit(train)
        with meter("score"):
            found = np.asarray(influence.self_influence(train))
        return np.repeat(found[:, None], len(w.xq), axis=1)

    return run


def perturbed(make_method: Callable) -> Callable[..., np.ndarray]:
    """Perturbation mode: the norm over a row's features, as the peer's driver has it."""

    def run(w, meter, args) -> np.ndarray:
        influence, train = influence_of(w, make_method()), batches(w.x, w.y, 64)
        with meter("fit"):
            influence.fit(batches(w.x, w.y, args.batch))
        with meter("score"):
            found = [
                influence.influences(w.xq, w.yq, x, y, mode="perturbation").flatten(2).norm(dim=2) for x, y in train
            ]
        return np.asarray(torch.cat(found, 1)).T

    return run


def on_all_parameters(make_method: Callable) -> Callable[..., np.ndarray]:
    """As the peers that take all parameters jointly do."""
    return attribute_with(make_method, blocks="full")


def know_own_version() -> None:
    """Let the driver's header find headwater's version where it runs from src/ and is not installed."""
    installed = importlib.metadata.version

    def version(distribution: str) -> str:
        if distribution != "headwater":
            return installed(distribution)
        return str(tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["version"])

    importlib.metadata.version = version


ONE_LABEL = {"fisher": "sampled"}  # one sampled label for each row, as in kronfluence; headwater's default takes all
LOOSE = {"tolerance": 1e-3}
LARGEST = {"rank": 50, "curvature": "hessian", "allow_indefinite": True}
METHODS = {
    "graddot": attribute_with(lambda: hw.GradDot()),
    "tracin": attribute_with(lambda: hw.TracIn()),
    "kfac": attribute_with(lambda: hw.Kfac(**ONE_LABEL)),
    "kfac_factored": attribute_with(lambda: hw.Kfac(damping_form="factored", **ONE_LABEL)),
    "ekfac": attribute_with(lambda: hw.Ekfac(**ONE_LABEL)),
    "ekfac_r4": attribute_with(lambda: hw.Ekfac(rank=4, **ONE_LABEL)),
    "ekfac_r16": attribute_with(lambda: hw.Ekfac(rank=16, **ONE_LABEL)),
    "ekfac_all_labels": attribute_with(lambda: hw.Ekfac()),
    "ekfac_empirical": attribute_with(lambda: hw.Ekfac(fisher="empirical")),
    "ekfac_rel": attribute_with(lambda: hw.Ekfac(**ONE_LABEL), damping=hw.relative(0.1)),
    "direct": on_all_parameters(lambda: hw.Direct("hessian", allow_indefinite=True)),
    "direct_gn": on_all_parameters(lambda: hw.Direct("ggn")),
    "direct_last": on_all_parameters(lambda: hw.Direct("hessian", allow_indefinite=True)),
    "cg": on_all_parameters(lambda: hw.Cg(curvature="ggn", **LOOSE)),
    "cg_plain": on_all_parameters(lambda: hw.Cg(curvature="ggn", preconditioner=None, **LOOSE)),
    "cg_hessian": on_all_parameters(lambda: hw.Cg(curvature="hessian", **LOOSE)),
    "block_krylov": on_all_parameters(lambda: hw.BlockKrylov(**LOOSE)),
    "astra": on_all_parameters(lambda: hw.Astra()),
    "lissa": on_all_parameters(lambda: hw.Lissa()),
    "arnoldi": on_all_parameters(lambda: hw.Arnoldi(**LARGEST)),
    "arnoldi_top": on_all_parameters(lambda: hw.Arnoldi(complement=False, **LARGEST)),
    "nystroem": on_all_parameters(lambda: hw.Nystroem(rank=50)),
    "dual": on_all_parameters(lambda: hw.Dual()),
    "datainf": attribute_with(lambda: hw.DataInf()),
    "trak512": on_all_parameters(lambda: hw.Trak(dimension=512)),
    "trak2048": on_all_parameters(lambda: hw.Trak(dimension=2048)),
    "trak_exact": on_all_parameters(lambda: hw.Trak(dimension=None)),
    "logra": attribute_with(lambda: hw.LoGra(dimension=16)),
    "logra_pca": attribute_with(lambda: hw.LoGra(dimension=16, init="pca")),
    "lorif": attribute_with(lambda: hw.LoRif(dimension=16)),
    "factgrass": attribute_with(lambda: hw.FactGrass(dimension=16)),
    "graddot_self": on_themselves(lambda: hw.GradDot()),
    "ekfac_self": on_themselves(lambda: hw.Ekfac(**ONE_LABEL)),
    "perturbation": perturbed(lambda: hw.DataInf()),
}

if __name__ == "__main__":
    know_own_version()
    common.main("headwater", "headwater", METHODS)
