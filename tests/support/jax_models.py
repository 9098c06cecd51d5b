"""The models of `models.py` once more as JAX functions with the same weights, and functions that only JAX has.

JAX has float64 here only because of the setting below.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import models
import numpy as np
import torch

from headwater.jax import cross_entropy, squared_error

jax.config.update("jax_enable_x64", True)


class Affine(NamedTuple):
    """Named and ordered as torch has them."""

    weight: Any
    bias: Any = None


@dataclass(frozen=True)
class JaxCase:
    """A function, its parameters, its loss, train rows and queries; and the torch case with the same numbers."""

    apply: Callable[[Any, Any], Any]
    params: Any
    loss: Callable[[Any, Any], Any]
    x: Any
    y: Any
    x_query: Any = None
    y_query: Any = None
    twin: models.Case | None = None
    likelihood: str | None = None

    def loader(self, size: int = models.BATCH) -> list[tuple[Any, Any]]:
        return [(self.x[k : k + size], self.y[k : k + size]) for k in range(0, len(self.y), size)]

    @property
    def queries(self) -> tuple[Any, Any, Any, Any]:
        return self.x_query, self.y_query, self.x, self.y


def arrays(case: models.Case) -> tuple[np.ndarray, ...]:
    return tuple(np.asarray(t) for t in (case.x, case.y, case.x_query, case.y_query))


def weights(model: torch.nn.Module) -> dict[str, jax.Array]:
    return {name: jnp.asarray(p.detach().numpy()) for name, p in model.named_parameters()}


def mlp() -> JaxCase:
    """Weights [o, i], as torch has them."""
    case = models.mlp()
    w = weights(case.model)
    params = {name: Affine(w[f"{name}.weight"], w[f"{name}.bias"]) for name in ("first", "second")}

    def apply(p: Any, x: Any) -> Any:
        return jnp.tanh(x @ p["first"].weight.T + p["first"].bias) @ p["second"].weight.T + p["second"].bias

    return JaxCase(apply, params, cross_entropy, *arrays(case), case)


def kernels() -> JaxCase:
    """The same with weights [i, o], as Flax has them."""
    case = models.mlp()
    w = weights(case.model)
    params = {name: {"kernel": w[f"{name}.weight"].T, "bias": w[f"{name}.bias"]} for name in ("first", "second")}

    def apply(p: Any, x: Any) -> Any:
        return jnp.tanh(x @ p["first"]["kernel"] + p["first"]["bias"]) @ p["second"]["kernel"] + p["second"]["bias"]

    return JaxCase(apply, params, cross_entropy, *arrays(case), case)


class Net(torch.nn.Module):
    """Stride, padding, groups, dilation; scale and shift of a layer norm."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = torch.nn.Conv2d(2, 4, 2, stride=2, padding=1)
        self.split = torch.nn.Conv2d(4, 4, 2, groups=2, dilation=2)
        self.tight = torch.nn.LayerNorm(4)
        self.turn = torch.nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.nn.functional.softplus(self.wide(x))
        return self.turn(self.tight(torch.tanh(self.split(x)).flatten(1)))


def convolve(x: Any, weight: Any, **options: Any) -> Any:
    return jax.lax.conv_general_dilated(x, weight, **options, dimension_numbers=("NCHW", "OIHW", "NCHW"))


def layer_norm(x: Any, p: Affine) -> Any:
    mean, variance = jnp.mean(x, -1, keepdims=True), jnp.var(x, -1, keepdims=True)
    return (x - mean) / jnp.sqrt(variance + 1e-5) * p.weight + p.bias


def images() -> JaxCase:
    case = models.images()
    case = models.Case("net", models.settle(Net(), 3), case.loss, case.x, case.y, case.x_query, case.y_query)
    w = weights(case.model)
    params = {name: Affine(w[f"{name}.weight"], w[f"{name}.bias"]) for name in ("wide", "split", "tight", "turn")}

    def apply(p: Any, x: Any) -> Any:
        x = convolve(x, p["wide"].weight, window_strides=(2, 2), padding=((1, 1), (1, 1)))
        x = jax.nn.softplus(x + p["wide"].bias[:, None, None])
        x = convolve(
            x, p["split"].weight, window_strides=(1, 1), padding="VALID", rhs_dilation=(2, 2), feature_group_count=2
        )
        x = jnp.tanh(x + p["split"].bias[None, :, None, None]).reshape(len(x), -1)
        return layer_norm(x, p["tight"]) @ p["turn"].weight.T + p["turn"].bias

    return JaxCase(apply, params, cross_entropy, *arrays(case), case)


def language() -> JaxCase:
    """A table that is the output head too, and a parameter for each position."""
    case = models.language()
    w = weights(case.model)

    def affine(name: str) -> Affine:
        return Affine(w[f"{name}.weight"], w.get(f"{name}.bias"))

    names = ("tokens", "before", "after", "hidden", "back")
    params = {"position": w["position"], **{name: affine(name) for name in names}}
    params["attention"] = {"qkv": affine("attention.qkv"), "out": affine("attention.out")}

    def attend(p: Any, x: Any) -> Any:
        n, t, width = x.shape
        q, k, v = jnp.transpose((x @ p["qkv"].weight.T).reshape(n, t, 3, 2, width // 2), (2, 0, 3, 1, 4))
        logits = q @ jnp.swapaxes(k, 2, 3) / np.sqrt(width // 2)
        logits = jnp.where(jnp.tril(jnp.ones((t, t), bool)), logits, -1e9)
        mixed = jax.nn.softmax(logits) @ v
        return jnp.swapaxes(mixed, 1, 2).reshape(n, t, width) @ p["out"].weight.T + p["out"].bias

    def apply(p: Any, ids: Any) -> Any:
        x = jnp.take(p["tokens"].weight, ids, axis=0) + p["position"][: ids.shape[1]]
        x = x + attend(p["attention"], layer_norm(x, p["before"]))
        hidden = jax.nn.gelu(layer_norm(x, p["after"]) @ p["hidden"].weight.T + p["hidden"].bias, approximate=False)
        x = x + hidden @ p["back"].weight.T + p["back"].bias
        return x @ p["tokens"].weight.T

    return JaxCase(apply, params, cross_entropy, *arrays(case), case)


def odd() -> JaxCase:
    """Lists and tuples; parameters in a loop, in a product with themselves, cut, stacked, in two roles; a number."""
    draw = np.random.default_rng(5)
    params = (
        [draw.standard_normal((3, 4)) / 2, draw.standard_normal((2, 4, 4)) / 2],
        {"loop": draw.standard_normal((2, 4, 4)) / 2, "scale": np.float64(0.7), "steps": np.int64(2)},
        (draw.standard_normal((4, 2)), draw.standard_normal((2, 4)), draw.standard_normal(4)),
    )

    def apply(p: Any, x: Any) -> Any:
        (first, stack), named, (head, heads, both) = p
        x = jnp.tanh(x @ first + both)
        x = x * both + x @ stack[0] @ stack[1]
        x, _ = jax.lax.scan(lambda x, w: (jnp.sin(x @ w), None), x, named["loop"])
        x = x @ (first.T @ first) * named["scale"] / named["steps"]
        return x @ head + jax.checkpoint(lambda h, x: jnp.cos(x @ h.T))(heads, x)

    return JaxCase(
        apply, params, squared_error, draw.standard_normal((models.TRAIN, 3)), draw.standard_normal((models.TRAIN, 2))
    )


CASES: dict[str, Callable[[], JaxCase]] = {
    "mlp": mlp,
    "kernels": kernels,
    "images": images,
    "language": language,
    "odd": odd,
}


# The slow truth -------------------------------------------------------------------------------------------------------


def flattened(case: JaxCase) -> tuple[jax.Array, Callable[[Any], Any]]:
    """The floating-point parameters as one vector, and the pytree again."""
    leaves, structure = jax.tree.flatten(case.params)
    floating = [np.issubdtype(np.asarray(leaf).dtype, np.floating) for leaf in leaves]
    cuts = np.cumsum([np.size(leaf) for leaf, f in zip(leaves, floating, strict=True) if f])[:-1]

    def build(flat: Any) -> Any:
        pieces = iter(jnp.split(flat, cuts))
        new = [next(pieces).reshape(np.shape(leaf)) if f else leaf for leaf, f in zip(leaves, floating, strict=True)]
        return jax.tree.unflatten(structure, new)

    return jnp.concatenate([jnp.ravel(leaf) for leaf, f in zip(leaves, floating, strict=True) if f]), build


def row_loss(case: JaxCase) -> Callable[[Any, Any, Any], Any]:
    """Of flat parameters and one row."""
    _, build = flattened(case)
    return lambda flat, x, y: jnp.sum(case.loss(case.apply(build(flat), x[None]), y[None]))


def grads(case: JaxCase) -> np.ndarray:
    """[n, D], one row at a time."""
    flat, _ = flattened(case)
    one = jax.jit(jax.grad(row_loss(case)))
    return np.stack([one(flat, x, y) for x, y in zip(case.x, case.y, strict=True)])


def mixed_grads(case: JaxCase) -> np.ndarray | None:
    """[n, *x_shape, D]; None for inputs without derivatives."""
    if case.x.dtype.kind != "f":
        return None
    flat, _ = flattened(case)
    one = jax.jit(jax.jacfwd(jax.grad(row_loss(case)), argnums=1))
    return np.stack([np.moveaxis(one(flat, x, y), 0, -1) for x, y in zip(case.x, case.y, strict=True)])


def curvature(case: JaxCase, kind: str) -> np.ndarray:
    """Of the sum over rows: [D, D]."""
    flat, build = flattened(case)

    def ggn(flat: Any, x: Any, y: Any) -> Any:
        def output(flat: Any) -> Any:
            return case.apply(build(flat), x[None])

        found = output(flat)
        bend = jax.hessian(lambda o: jnp.sum(case.loss(o.reshape(found.shape), y[None])))(jnp.ravel(found))
        jacobian = jax.jacrev(output)(flat).reshape(found.size, -1)
        return jacobian.T @ bend @ jacobian

    one = jax.jit(ggn if kind == "ggn" else jax.hessian(row_loss(case)))
    return sum(np.asarray(one(flat, x, y)) for x, y in zip(case.x, case.y, strict=True))
