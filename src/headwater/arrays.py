"""Array verbs for every framework: the array-API namespace, and the few verbs that the standard lacks.

Nothing here imports a framework: an array brings its own namespace (`namespace(x)`), and where the standard has
no word (adding in place, scattering rows) the array's own methods are asked for.
"""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import array_api_compat
import numpy as np

Array = Any
"""An array of any framework that array-api-compat knows: NumPy, PyTorch, JAX, CuPy."""

_WORKING_MEMORY: ContextVar[int] = ContextVar("headwater_working_memory", default=64 * 2**20)


@contextmanager
def working_memory(limit: int):
    """Bound the temporary arrays of one contraction to about `limit` bytes. The numbers do not depend on it."""
    token = _WORKING_MEMORY.set(max(1, int(limit)))
    try:
        yield
    finally:
        _WORKING_MEMORY.reset(token)


def rows_within_memory(numbers_per_row: int, like: Array) -> int:
    """How many rows of `numbers_per_row` numbers of `like`'s dtype fit into the working memory; at least one."""
    return max(1, _WORKING_MEMORY.get() // max(1, numbers_per_row * itemsize(like)))


def itemsize(array: Array) -> int:
    """Bytes per number."""
    size = getattr(array.dtype, "itemsize", None)
    return int(size) if size is not None else int(np.dtype(str(array.dtype)).itemsize)


def namespace(*arrays: Array) -> Any:
    """The array-API namespace that the arrays share."""
    return array_api_compat.array_namespace(*arrays)


def is_array(value: object) -> bool:
    return array_api_compat.is_array_api_obj(value)


def device(array: Array) -> Any:
    return array_api_compat.device(array)


def zeros_like(array: Array, shape: tuple[int, ...]) -> Array:
    xp = namespace(array)
    return xp.zeros(shape, dtype=array.dtype, device=device(array))


def as_like(values: Any, array: Array, dtype: Any = None) -> Array:
    """Host numbers as an array of the same framework and device as `array`, and of its dtype unless another is given."""
    xp = namespace(array)
    return xp.asarray(values, dtype=dtype or array.dtype, device=device(array))


def identity(size: int, like: Array) -> Array:
    return namespace(like).eye(size, dtype=like.dtype, device=device(like))


def to_numpy(array: Array) -> np.ndarray:
    """A copy on the host; numbers of fewer than 32 bits come as float32, which NumPy can hold."""
    if hasattr(array, "detach"):
        array = array.detach().cpu()
    return np.asarray(accumulable(array)) if not isinstance(array, np.ndarray) else array


def accumulable(array: Array) -> Array:
    """The array in float32 or better: a bfloat16 sum of ones stops at 256."""
    xp = namespace(array)
    if str(array.dtype).rsplit(".", 1)[-1] in ("float16", "bfloat16"):
        return xp.astype(array, xp.float32)
    return array


def precise(array: Array) -> Array:
    """The array in float64, where the framework has it on this device (JAX by default does not)."""
    xp = namespace(array)
    try:
        return xp.astype(array, xp.float64)
    except (TypeError, RuntimeError):
        return array


def transpose(matrix: Array) -> Array:
    """Swap the last two axes."""
    return namespace(matrix).linalg.matrix_transpose(matrix)


def add_product(total: Array | None, left: Array, right: Array) -> Array:
    """`total + left^T right` for left [n, p], right [n, q]; in place where the framework can.

    A symmetric product (right is left) of a large matrix is built from its lower blocks only: three quarters of
    the multiplications at two blocks a side, five eighths at four.
    """
    if right is left and left.shape[1] >= 256 and left.shape[0] >= 256:
        return _add_gram(total, left)
    if total is not None and hasattr(total, "addmm_"):
        return total.addmm_(left.T, right)
    product = transpose(left) @ right
    return product if total is None else total + product


def _add_gram(total: Array | None, rows: Array) -> Array:
    xp, size = namespace(rows), int(rows.shape[1])
    step = -(-size // (4 if size >= 512 else 2))
    cuts = range(0, size, step)
    lower = [[transpose(rows[:, i : i + step]) @ rows[:, j : j + step] for j in cuts if j <= i] for i in cuts]
    full = xp.concat(
        [
            xp.concat([lower[i][j] if j <= i else transpose(lower[j][i]) for j in range(len(lower))], axis=1)
            for i in range(len(lower))
        ],
        axis=0,
    )
    return full if total is None else total + full


def scatter_rows(values: Array, ids: Array, rows: int) -> Array:
    """Sum `values` [m, d] into the rows named by `ids` [m]: the result is [rows, d]."""
    out = zeros_like(values, (rows, int(values.shape[1])))
    if hasattr(out, "index_add_"):
        return out.index_add_(0, ids, values)
    if isinstance(out, np.ndarray):
        np.add.at(out, ids, values)
        return out
    return out.at[ids].add(values)


def all_finite(array: Array) -> bool:
    """One number tells: a sum is finite unless something in it is not (or it overflows, which is as bad)."""
    xp = namespace(array)
    return bool(xp.isfinite(xp.sum(array)))
