"""One network with the same weights in PyTorch, JAX and NumPy: the same numbers for every method, to 1e-10.

The suite is one class of claims, inherited by each framework. They are compared with PyTorch, whose numbers other tests
compare with dense formulas. The NumPy backend is the one of docs/add-a-framework.md, as printed there.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax_models  # noqa: F401  # JAX in double precision, and quick to compile
import numpy as np
import pytest
import torch
from torch import nn

import headwater as hw
from headwater.attributor import Attributor
from headwater.methods.base import Method
from headwater.testing.contract import Contract, host
from headwater.torch import TorchBatch, TorchComposableInfluence, TorchGradientProvider

pytestmark = [
    pytest.mark.sampled,
    pytest.mark.filterwarnings("ignore::headwater.errors.NotConverged"),  # LiSSA and ASTRA of few steps
]

I, HIDDEN, CLASSES = 4, 4, 4  # noqa: E741  # layers of one shape: JAX compiles for each shape anew
STRUCTURES = ("full", "layer")
TOLERANCE = 1e-10
INDEFINITE: dict[str, Any] = {"curvature": "hessian", "allow_indefinite": True}
SOLVED: dict[str, Any] = {"tolerance": 1e-13}

METHODS: dict[str, Method] = {
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
    "kfac-sampled": hw.Kfac(fisher="sampled", samples=2, seed=1),
    "ekfac": hw.Ekfac(),
    "ekfac-empirical": hw.Ekfac(fisher="empirical"),
    "ekfac-sampled": hw.Ekfac(fisher="sampled", samples=2, seed=1),
    "ekfac-rank-2": hw.Ekfac(rank=2),
    "cg": hw.Cg(**SOLVED),
    "cg-plain": hw.Cg(preconditioner=None, block=False, **SOLVED),
    "cg-ekfac": hw.Cg(preconditioner="ekfac", **SOLVED),
    "cg-nystroem": hw.Cg(preconditioner="nystroem", **SOLVED),
    "cg-diagonal": hw.Cg(preconditioner="diagonal", **SOLVED),
    "cg-hessian": hw.Cg(**INDEFINITE, **SOLVED),
    "block-krylov": hw.BlockKrylov(**SOLVED),
    "lissa": hw.Lissa(steps=3, rows=6, scale=30.0),
    "astra": hw.Astra(steps=4, rows=None, step_size=0.2),
    "arnoldi": hw.Arnoldi(rank=10**6, tolerance=1e-13),
    "nystroem": hw.Nystroem(rank=8),
    "datainf": hw.DataInf(),
    "trak": hw.Trak(dimension=6),
    "trak-dense": hw.Trak(dimension=6, projection="dense"),
    "trak-exact": hw.Trak(dimension=None),
    "logra": hw.LoGra(dimension=2),
    "logra-pca": hw.LoGra(dimension=2, init="pca"),
    "lorif": hw.LoRif(dimension=3, rank=1, kept=5),
    "factgrass": hw.FactGrass(dimension=2, mask=3, seed=1),
}


class Net(nn.ModuleList):
    """Two layers, named "0" and "1"."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = self
        return second(torch.tanh(first(x)))


class Rows(NamedTuple):
    x: np.ndarray
    y: np.ndarray


def _rows(n: int, seed: int) -> Rows:
    rng = np.random.default_rng(seed)
    return Rows(rng.standard_normal((n, I)), rng.integers(CLASSES, size=n))


TRAIN, QUERY = _rows(11, 0), _rows(4, 1)


@cache
def weights() -> list[tuple[np.ndarray, np.ndarray]]:
    """(weight [o, i], bias [o]) of each layer."""
    rng = np.random.default_rng(2)
    shapes = [(HIDDEN, I), (CLASSES, HIDDEN)]
    return [(rng.standard_normal(shape), rng.standard_normal(shape[0])) for shape in shapes]


def alternating() -> list[Any]:
    """All; the fast ones have every method, and half of them each structure."""
    return [
        pytest.param(method, blocks, marks=() if (k + turn) % len(STRUCTURES) == 0 else pytest.mark.slow)
        for k, method in enumerate(METHODS)
        for turn, blocks in enumerate(STRUCTURES)
    ]


class FrameworkSuite(Contract):
    """Claims about one framework. A subclass fills the three hooks."""

    def provider(self, blocks: str) -> Any:
        """A hook: the network's gradient provider."""
        raise NotImplementedError

    def batch(self, rows: Rows) -> Any:
        """A hook: rows as the framework's batch."""
        raise NotImplementedError

    def influence(self, method: Method, blocks: str, damping: Any) -> Attributor[Any]:
        """A hook: influence on the network, not fitted."""
        return Attributor(self.provider(blocks), method, damping=damping)

    def same(self, got: Any, expected: Any) -> None:
        expected = host(expected)
        np.testing.assert_allclose(
            host(got), expected, rtol=0, atol=TOLERANCE * max(1.0, float(np.abs(expected).max()))
        )

    @pytest.mark.parametrize("blocks", STRUCTURES)
    def test_gradients_and_mixed_gradients(self, blocks: str) -> None:
        mine, other = self.provider(blocks), torch_provider(blocks)
        for verb in ("flat_grads", "flat_mixed_grads"):
            self.same(getattr(mine, verb)(self.batch(TRAIN)), getattr(other, verb)(torch_batch(TRAIN)))

    @pytest.mark.parametrize("blocks", STRUCTURES)
    @pytest.mark.parametrize("kind", ["ggn", "hessian"])
    def test_curvature(self, blocks: str, kind: Any) -> None:
        mine, other = self.provider(blocks), torch_provider(blocks)
        assert mine.sizes == other.sizes
        for name, size in mine.sizes.items():
            expected = other.curvature_product(torch_batch(TRAIN), name, torch.eye(size, dtype=torch.float64), kind)
            like = mine.parameters(name)
            self.same(
                mine.curvature_product(self.batch(TRAIN), name, self.array_like(np.eye(size), like), kind), expected
            )

    def array_like(self, values: np.ndarray, like: Any) -> Any:
        return self.array(values)

    @pytest.mark.parametrize("fisher", ["exact", "sampled", "empirical"])
    def test_labels_of_the_fisher_information(self, fisher: Any) -> None:
        found, expected = (
            provider.fisher_grads(batch, fisher, draws=range(2), seed=5)
            for provider, batch in (
                (self.provider("layer"), self.batch(TRAIN)),
                (torch_provider("layer"), torch_batch(TRAIN)),
            )
        )
        for mine, other in zip(found, expected, strict=True):
            for name, value in mine.items():
                self.same(value.flat(), other[name].flat())

    @pytest.mark.parametrize(("method", "blocks"), alternating())
    def test_factors_and_scores(self, method: str, blocks: str) -> None:
        damping = 0.7 if "hessian" in method else hw.relative(0.4)
        influence = self.influence(METHODS[method], blocks, damping).fit(
            [self.batch(Rows(*(c[:7] for c in TRAIN))), self.batch(Rows(*(c[7:] for c in TRAIN)))]
        )
        other = reference(method, blocks, damping)
        query, train = (self.tensors(rows) for rows in (QUERY, TRAIN))
        torch_query, torch_train = (torch_tensors(rows) for rows in (QUERY, TRAIN))
        self.same([*influence.absolute_damping.values()], [*other.absolute_damping.values()])
        self.same(influence.influence_factors(*query), other.influence_factors(*torch_query))
        for mode in ("up", "perturbation"):
            self.same(
                influence.influences(*query, *train, mode=mode),
                other.influences(*torch_query, *torch_train, mode=mode),
            )

    def tensors(self, rows: Rows) -> tuple[Any, Any]:
        batch = self.batch(rows)
        return batch.x, batch.y


# PyTorch, which the others are compared with --------------------------------------------------------------------------


@cache
def torch_model() -> nn.Module:
    model = Net([nn.Linear(I, HIDDEN), nn.Linear(HIDDEN, CLASSES)]).double()
    for layer, (weight, bias) in zip(model, weights(), strict=True):
        layer.load_state_dict({"weight": torch.as_tensor(weight), "bias": torch.as_tensor(bias)})
    return model


def torch_provider(blocks: str) -> TorchGradientProvider:
    return TorchGradientProvider(torch_model(), nn.CrossEntropyLoss(), blocks=blocks)


def torch_tensors(rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.as_tensor(rows.x), torch.as_tensor(rows.y)


def torch_batch(rows: Rows) -> TorchBatch:
    return TorchBatch(*torch_tensors(rows))


@cache
def reference(method: str, blocks: str, damping: Any) -> TorchComposableInfluence:
    influence = TorchComposableInfluence(
        torch_model(), nn.CrossEntropyLoss(), METHODS[method], blocks=blocks, damping=damping
    )
    return influence.fit([torch_batch(TRAIN)])


# NumPy, from the guide ------------------------------------------------------------------------------------------------


@cache
def guide() -> dict[str, Any]:
    """The names that the guide's first snippet defines."""
    text = (Path(__file__).parents[1] / "docs" / "add-a-framework.md").read_text()
    code = re.search(r"```python\n(.*?)```", text, re.S)
    assert code is not None
    names: dict[str, Any] = {}
    exec(code[1], names)
    return names


class Margin:
    """Minus the margin, or minus the logit, of the target, for the guide's network."""

    name = "margin"

    def __init__(self, function: str):
        self.function = function

    def _others(self, z: np.ndarray, y: np.ndarray) -> np.ndarray:
        return np.exp(np.where(np.eye(z.shape[1], dtype=bool)[y], -np.inf, z))

    def values(self, z: np.ndarray, y: np.ndarray) -> np.ndarray:
        chosen = z[np.arange(len(y)), y]
        return (np.log(self._others(z, y).sum(axis=1)) if self.function == "margin" else 0.0) - chosen

    def gradient(self, z: np.ndarray, y: np.ndarray) -> np.ndarray:
        others = self._others(z, y)
        p = others / others.sum(axis=1, keepdims=True) if self.function == "margin" else np.zeros_like(z)
        return p - np.eye(z.shape[1])[y]


def numpy_provider(blocks: str) -> Any:
    class Provider(guide()["NumpyProvider"]):  # type: ignore[misc]
        def of_output(self, function: str) -> Any:
            other = Provider(self.layers, blocks)
            other.loss = Margin(function)
            return other

    return Provider(weights(), blocks)


class TestNumpy(FrameworkSuite):
    def provider(self, blocks: str) -> Any:
        return numpy_provider(blocks)

    def batch(self, rows: Rows) -> Any:
        return hw.Batch(rows.x, rows.y)


@pytest.mark.torch
class TestTorch(FrameworkSuite):
    """PyTorch against itself: other batches."""

    def provider(self, blocks: str) -> Any:
        return torch_provider(blocks)

    def batch(self, rows: Rows) -> TorchBatch:
        return torch_batch(rows)

    def array(self, values: np.ndarray) -> Any:
        return torch.as_tensor(values)


# JAX ------------------------------------------------------------------------------------------------------------------


class Layer(NamedTuple):
    """One layer of the pytree, in the order of PyTorch's parameters."""

    weight: Any
    bias: Any


def jax_apply(params: list[Layer], x: Any) -> Any:
    import jax.numpy as jnp

    first, second = params
    return jnp.tanh(x @ first.weight.T + first.bias) @ second.weight.T + second.bias


@cache
def jax_provider(blocks: str) -> Any:
    """One for all claims, so that everything is compiled once."""
    import jax.numpy as jnp
    import optax

    from headwater.jax import JaxGradientProvider

    params = [Layer(*map(jnp.asarray, layer)) for layer in weights()]
    return JaxGradientProvider(jax_apply, params, optax.softmax_cross_entropy_with_integer_labels, blocks=blocks)


VARIANTS = {
    "direct-fisher": "ekfac-sampled",
    "direct-fisher-sampled": "ekfac-sampled",
    "direct-empirical-fisher": "dual",
    "dual-ggn": "dual",
    "kfac-factored": "ekfac-sampled",
    "kfac": "ekfac-sampled",
    "kfac-sampled": "ekfac-sampled",
    "ekfac": "ekfac-sampled",
    "ekfac-empirical": "ekfac-sampled",
    "ekfac-rank-2": "ekfac-sampled",
    "cg": "lissa",
    "cg-plain": "lissa",
    "cg-ekfac": "lissa",
    "cg-nystroem": "lissa",
    "cg-diagonal": "lissa",
    "cg-hessian": "direct-hessian",
    "block-krylov": "lissa",
    "arnoldi": "lissa",
    "astra": "lissa",
    "nystroem": "lissa",
    "trak": "trak-exact",
    "trak-dense": "trak-exact",
    "logra-pca": "logra",
    "lorif": "logra",
}
"""Methods that ask a provider for nothing that another does not ask for too; slow in JAX, which compiles each anew."""
IN_JAX = "kfac"
"""The method that is fast with the maths in JAX's arrays, each of whose operations is compiled for each shape."""


@pytest.mark.jax
class TestJax(FrameworkSuite):
    @pytest.mark.parametrize(
        ("method", "blocks"),
        [
            pytest.param(m, b, marks=pytest.mark.slow if b == "full" or m in VARIANTS else ())
            for b in STRUCTURES
            for m in METHODS
        ],
    )
    def test_factors_and_scores(self, method: str, blocks: str) -> None:
        super().test_factors_and_scores(method, blocks)

    @pytest.mark.parametrize(
        ("method", "blocks"),
        [
            pytest.param(m, b, marks=() if (m, b) == (IN_JAX, "layer") else pytest.mark.slow)
            for b in STRUCTURES
            for m in METHODS
        ],
    )
    def test_factors_and_scores_in_arrays_of_jax(self, method: str, blocks: str, monkeypatch: Any) -> None:
        monkeypatch.setattr(self, "influence", super().influence)
        super().test_factors_and_scores(method, blocks)

    def influence(self, method: Method, blocks: str, damping: Any) -> Attributor[Any]:
        """As users have it: the maths in NumPy's arrays."""
        return Attributor(self.provider(blocks).in_numpy(), method, damping=damping)

    def provider(self, blocks: str) -> Any:
        return jax_provider(blocks)

    def batch(self, rows: Rows) -> Any:
        from headwater.jax import JaxBatch

        return JaxBatch(self.array(rows.x), self.array(rows.y))

    def array(self, values: np.ndarray) -> Any:
        import jax.numpy as jnp

        return jnp.asarray(values)
