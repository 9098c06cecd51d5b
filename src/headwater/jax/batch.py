"""Rows for a JAX function."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from headwater.arrays import dtype_of
from headwater.errors import BatchMismatch, InvalidInput, UnsupportedModel
from headwater.loaders.frames import missing_column
from headwater.types import Batch


@dataclass(frozen=True, eq=False)
class JaxBatch(Batch[jax.Array]):
    """Inputs and targets; x is an array, or a tuple or dict of arrays: it reaches the function as it is.

    Arrays are JAX's or NumPy's. `weights` [n]: a weight of 2 means the row twice. `ids` [n], integers: names that
    follow the row everywhere; random draws depend on them. Errors: BatchMismatch if lengths disagree.
    """

    weights: Any = None
    ids: Any = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weights is not None:
            weights = np.asarray(self.weights)
            if not (np.isfinite(weights) & (weights >= 0)).all():
                raise InvalidInput(f"weights must be finite and not negative; the lowest is {float(weights.min()):g}.")

    def ready(self) -> JaxBatch:
        """With numbers as JAX has them (no float64 where it has none). Errors: InvalidInput for what is no array."""
        if self.x is None or self.y is None:
            raise InvalidInput(missing_column("x" if self.x is None else "y"))
        if len(self) == 0:
            raise BatchMismatch("The batch has no rows.")
        return JaxBatch(jax.tree.map(_as_array, self.x), jax.tree.map(_as_array, self.y), self.weights, self.ids)

    def padded(self, least: int = 1) -> tuple[Any, Any]:
        """x and y with the last row repeated up to a rounded number of rows, so that few shapes are compiled."""
        return padded_rows((self.x, self.y), rounded(len(self), least))


def rounded(count: int, least: int = 1) -> int:
    """Up to the next power of two, beyond 16 to the next multiple of 16; at least `least`."""
    return max(least, 1 << (count - 1).bit_length() if count <= 16 else -(-count // 16) * 16)


def padded_rows(arrays: Any, count: int) -> Any:
    """Arrays, one or more, with their last row repeated up to so many rows."""
    return jax.tree.map(lambda v: _repeat_last(v, count - len(v)), arrays)


def _repeat_last(array: Any, extra: int) -> Any:
    if not extra:
        return array
    xp = jnp if isinstance(array, jax.Array) else np
    return xp.concatenate([array, xp.repeat(array[-1:], extra, axis=0)])


def _as_array(value: object) -> Any:
    if isinstance(value, jax.Array):
        return value
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
        return value.astype(jax.dtypes.canonicalize_dtype(value.dtype), copy=False)
    if isinstance(value, np.ndarray) and jnp.issubdtype(value.dtype, jnp.floating):  # bfloat16
        return value
    raise InvalidInput(f"A batch holds arrays of JAX or NumPy, not {type(value).__name__}: {value!r:.80}")


def host_leaves(*parts: Any) -> list[np.ndarray]:
    """The arrays of x and y on the host, dicts in their own order; bfloat16 as float32."""
    return [_host(leaf) for part in parts for leaf in _leaves(part)]


def _leaves(part: object) -> Iterator[Any]:
    if isinstance(part, Mapping):
        for value in part.values():
            yield from _leaves(value)
    elif isinstance(part, (tuple, list)):
        for value in part:
            yield from _leaves(value)
    elif part is not None:
        yield part


def _host(value: object) -> np.ndarray:
    array = np.asarray(value)
    return array.astype(np.float32) if array.dtype.name == "bfloat16" else array


def differentiable_input(x: Any) -> Any:
    """The one floating-point array that a perturbation acts on. Errors: UnsupportedModel if x is not one."""
    if dtype_of(x) is not None and jnp.issubdtype(x.dtype, jnp.floating):
        return x
    kinds = [str(leaf.dtype) for leaf in jax.tree.leaves(x)]
    raise UnsupportedModel(
        f"mode='perturbation' differentiates with respect to one floating-point tensor x; here x is "
        f"{type(x).__name__} of {', '.join(kinds)}. Use mode='up', or give the function embeddings as its input."
    )
