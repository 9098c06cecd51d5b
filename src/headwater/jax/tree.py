"""Parameters as a pytree: their names, which of them are attributed, and the pytree again from its leaves."""

from __future__ import annotations

import zlib
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import GetAttrKey, keystr, tree_flatten_with_path

from headwater.blocks import Parameter
from headwater.errors import InvalidSetting

Leaves = Mapping[str, jax.Array]


@dataclass(frozen=True)
class Tree:
    """The form of a pytree of parameters. A leaf is named by its path, "params.Dense_0.kernel"; `floating`: which of
    the leaves are attributed, in order."""

    structure: Hashable
    names: tuple[str, ...]
    floating: tuple[bool, ...]
    shapes: tuple[tuple[int, ...], ...]

    @cached_property
    def parameters(self) -> tuple[Parameter, ...]:
        """The attributed leaves, in the pytree's own order."""
        leaves = zip(self.names, self.shapes, self.floating, strict=True)
        return tuple(Parameter(name, shape) for name, shape, floating in leaves if floating)

    def build(self, leaves: Leaves) -> Any:
        """The pytree with these leaves."""
        return jax.tree.unflatten(self.structure, [leaves[name] for name in self.names])


def take_tree(params: object) -> tuple[Tree, dict[str, jax.Array]]:
    """The form of `params`, and its leaves by name; arrays of NumPy are copied, so that nobody can change them.

    Errors: InvalidSetting for a leaf that is no array, for two of one name, or where no leaf is floating point.
    """
    paths, structure = tree_flatten_with_path(params)
    leaves: dict[str, jax.Array] = {}
    for path, leaf in paths:
        boxed = len(path) > 1 and isinstance(path[-1], GetAttrKey) and path[-1].name == "value"  # a variable of nnx
        name = keystr(path[:-1] if boxed else path, simple=True, separator=".") or "parameters"
        if name in leaves:
            raise InvalidSetting(f"Two leaves of params have the name {name!r}; rename one of them.")
        if not isinstance(leaf, (jax.Array, np.ndarray, np.generic, float, int)):
            raise InvalidSetting(f"The parameter {name!r} is {type(leaf).__name__}; expected an array: {leaf!r:.60}.")
        leaves[name] = leaf if isinstance(leaf, jax.Array) else jnp.array(leaf)
    floating = tuple(jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.size > 0 for leaf in leaves.values())
    if not any(floating):
        raise InvalidSetting("params has no leaf of floating-point numbers: there is nothing to attribute.")
    return Tree(structure, tuple(leaves), floating, tuple(leaf.shape for leaf in leaves.values())), leaves


def checksums(leaves: Leaves) -> tuple[int, ...]:
    """Of each leaf's bytes."""
    return tuple(zlib.crc32(np.ascontiguousarray(_numbers(leaf)).view(np.uint8).tobytes()) for leaf in leaves.values())


def _numbers(leaf: jax.Array) -> jax.Array:
    """A key of random numbers as the words that it is made of; else the leaf."""
    return jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf


def wide(array: jax.Array) -> jax.Array:
    """Half precision becomes float32: products and sums are never accumulated in less."""
    return array.astype(jnp.float32) if jnp.issubdtype(array.dtype, jnp.floating) and array.itemsize < 4 else array
