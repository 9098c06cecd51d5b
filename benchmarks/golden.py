"""What every method gives today, kept to be compared with what it gives after a change that should alter nothing.

    python benchmarks/golden.py record FILE
    python benchmarks/golden.py compare FILE      # exits 1 where a number moved by more than 1e-12 of the largest

float64, one thread. All methods, both modes, three block structures, on three frameworks; and the verbs over loaders.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["JAX_ENABLE_X64"] = "1"

import jax
import jax.numpy as jnp
import numpy as np
import torch
from sklearn.datasets import load_breast_cancer, load_diabetes
from sklearn.linear_model import LogisticRegression, Ridge
from torch import nn

import headwater as hw
from headwater.attributor import Attributor
from headwater.jax import JaxComposableInfluence
from headwater.sklearn import SklearnComposableInfluence
from headwater.torch import TorchComposableInfluence

TOLERANCE = 1e-12
INDEFINITE: dict[str, Any] = {"curvature": "hessian", "allow_indefinite": True}
METHODS = {
    "grad-dot": hw.GradDot(),
    "grad-cos": hw.GradCos(),
    "tracin": hw.TracIn(learning_rates=0.3),
    "direct-ggn": hw.Direct("ggn"),
    "direct-hessian": hw.Direct(**INDEFINITE),
    "direct-fisher": hw.Direct("fisher"),
    "direct-fisher-sampled": hw.Direct("fisher", fisher="sampled", seed=3),
    "direct-empirical-fisher": hw.Direct("empirical_fisher"),
    "dual": hw.Dual(),
    "dual-ggn": hw.Dual("ggn"),
    "kfac": hw.Kfac(),
    "kfac-factored": hw.Kfac(damping_form="factored"),
    "ekfac": hw.Ekfac(),
    "ekfac-sampled": hw.Ekfac(fisher="sampled", samples=2, seed=1),
    "ekfac-rank-2": hw.Ekfac(rank=2),
    "cg": hw.Cg(),
    "cg-ekfac": hw.Cg(preconditioner="ekfac"),
    "cg-nystroem": hw.Cg(preconditioner="nystroem"),
    "cg-hessian": hw.Cg(**INDEFINITE),
    "block-krylov": hw.BlockKrylov(),
    "lissa": hw.Lissa(steps=6, rows=4, scale=30.0),
    "astra": hw.Astra(steps=4, rows=None, step_size=0.2),
    "arnoldi": hw.Arnoldi(rank=6),
    "nystroem": hw.Nystroem(rank=8),
    "datainf": hw.DataInf(),
    "trak": hw.Trak(dimension=6),
    "trak-exact": hw.Trak(dimension=None),
    "logra": hw.LoGra(dimension=2),
    "logra-pca": hw.LoGra(dimension=2, init="pca"),
    "lorif": hw.LoRif(dimension=3, rank=1, kept=5),
    "factgrass": hw.FactGrass(dimension=2, mask=3, seed=1),
    "representer": hw.Representer(l2=0.05),
}
Make = Callable[[Any, str], Attributor]


def rows(n: int, seed: int, shape: tuple[int, ...] = (3,), classes: int = 3) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    return random.standard_normal((n, *shape)), random.integers(classes, size=n)


def torch_case(model: nn.Module, shape: tuple[int, ...]) -> tuple[Make, Any, Any]:
    def tensors(n: int, seed: int) -> Any:
        x, y = rows(n, seed, shape)
        return torch.as_tensor(x), torch.as_tensor(y)

    def make(method: Any, blocks: str) -> Attributor:
        return TorchComposableInfluence(model, nn.CrossEntropyLoss(), method, blocks=blocks, damping=hw.relative(0.1))

    return make, tensors(23, 0), tensors(5, 1)


def jax_case() -> tuple[Make, Any, Any]:
    random = np.random.default_rng(2)
    params = {
        name: {"w": jnp.asarray(random.standard_normal((i, o))), "b": jnp.asarray(random.standard_normal(o))}
        for name, i, o in (("first", 3, 4), ("second", 4, 3))
    }

    def apply(params: Any, x: Any) -> Any:
        hidden = jnp.tanh(x @ params["first"]["w"] + params["first"]["b"])
        return hidden @ params["second"]["w"] + params["second"]["b"]

    def arrays(n: int, seed: int) -> Any:
        return tuple(jnp.asarray(a) for a in rows(n, seed))

    def make(method: Any, blocks: str) -> Attributor:
        return JaxComposableInfluence(apply, params, "cross_entropy", method, blocks=blocks, damping=hw.relative(0.1))

    return make, arrays(23, 0), arrays(5, 1)


def sklearn_case(estimator: Any, x: np.ndarray, y: np.ndarray) -> tuple[Make, Any, Any]:
    estimator.fit(x[:60], y[:60])

    def make(method: Any, blocks: str) -> Attributor:
        return SklearnComposableInfluence(estimator, method, damping=hw.relative(0.1))

    return make, (x[:60], y[:60]), (x[60:66], y[60:66])


def cases() -> Iterator[tuple[str, Make, Any, Any, tuple[str, ...]]]:
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    conv = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.GELU(), nn.Flatten(), nn.LayerNorm(8), nn.Linear(8, 3, bias=False)
    ).double()
    yield "torch mlp", *torch_case(mlp, (3,)), ("full", "layer", "parameter")
    yield "torch conv", *torch_case(conv, (1, 4, 4)), ("full", "layer", "parameter")
    yield "jax mlp", *jax_case(), ("full", "layer", "parameter")
    x, y = load_breast_cancer(return_X_y=True)
    yield "sklearn logistic", *sklearn_case(LogisticRegression(C=0.1), (x - x.mean(0)) / x.std(0), y), ("full",)
    x, y = load_diabetes(return_X_y=True)
    yield "sklearn ridge", *sklearn_case(Ridge(alpha=0.3), x, y / 100), ("full",)


def batches(data: Any, size: int) -> list[Any]:
    x, y = data
    return [(x[start : start + size], y[start : start + size]) for start in range(0, len(y), size)]


def numbers(make: Make, name: str, method: Any, blocks: str, train: Any, query: Any) -> dict[str, Any]:
    influence = make(method, blocks)
    loader, queries = batches(train, 8), batches(query, 3)
    influence.fit(loader)
    found = {
        "up": influence.influences(*query, *train),
        "factors": influence.influence_factors(*query),
        "scores": np.asarray(influence.attribute(loader, queries)),
        "self": influence.self_influence(loader),
        "top": influence.top(loader, queries, 3).helpful_scores,
    }
    try:
        found["perturbation"] = influence.influences(*query, *train, mode="perturbation")
    except hw.errors.HeadwaterError as error:
        found["perturbation"] = refusal(error)
    if method.predicts_removal:
        try:
            found["removal"] = influence.removal(loader, queries)
        except hw.errors.HeadwaterError as error:
            found["removal"] = refusal(error)
    return found


def refusal(error: Exception) -> np.ndarray:
    return np.array(type(error).__name__)


def golden() -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for case, make, train, query, structures in cases():
        for blocks in structures:
            for name, method in METHODS.items():
                key = f"{case} | {blocks} | {name}"
                try:
                    values = numbers(make, name, method, blocks, train, query)
                except hw.errors.HeadwaterError as error:
                    values = {"refused": refusal(error)}
                found |= {f"{key} | {what}": np.asarray(value) for what, value in values.items()}
            print(case, blocks, len(found), file=sys.stderr, flush=True)
    return found


def differences(now: dict[str, np.ndarray], then: dict[str, np.ndarray]) -> list[str]:
    lines = [f"{key}: only in one" for key in sorted(now.keys() ^ then.keys())]
    for key in sorted(now.keys() & then.keys()):
        a, b = now[key], then[key]
        if a.dtype.kind == "U" or b.dtype.kind == "U":
            lines += [] if str(a) == str(b) else [f"{key}: {a} now, {b} then"]
            continue
        off = float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-300)) if a.shape == b.shape else float("inf")
        lines += [] if off <= TOLERANCE else [f"{key}: off by {off:.1e}"]
    return lines


def main(verb: str, file: str) -> int:
    warnings.simplefilter("ignore")
    jax.config.update("jax_disable_most_optimizations", True)  # what is compared is the mathematics
    now = golden()
    if verb == "record":
        np.savez_compressed(file, **now)
        print(f"{len(now)} arrays kept in {file}")
        return 0
    with np.load(file) as kept:
        lines = differences(now, dict(kept))
    print("\n".join(lines) or f"{len(now)} arrays are as they were")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
