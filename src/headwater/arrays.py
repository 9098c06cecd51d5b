"""Array verbs for every framework: the array-API namespace, and the few verbs that the standard lacks.

Nothing here imports a framework: an array brings its own namespace (`namespace(x)`), and where the standard has
no word (adding in place, scattering rows) the framework's own method is called.

What may be anything (a user's target, a loader, a data frame) is asked here, once, what it has: `shape_of`,
`dtype_of`, `is_frame`, `is_sparse`, `described`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import import_module
from typing import Any, Protocol, TypeGuard, runtime_checkable

import array_api_compat
import numpy as np

from headwater.errors import InvalidInput, MissingExtra


class Array(Protocol):
    """An array of any framework that array-api-compat knows: NumPy, PyTorch, JAX, CuPy.

    For a type checker only, never for isinstance: what the frameworks' arrays have in common, as it is used here. Where
    they differ (in place, devices) the code asks which it is. Operands are Any: numbers, or arrays of the same kind.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def ndim(self) -> int: ...
    @property
    def dtype(self) -> Any: ...
    @property
    def T(self) -> Array: ...  # noqa: N802
    def reshape(self, shape: Any, /) -> Array: ...
    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Any]: ...
    def __getitem__(self, key: Any, /) -> Any: ...
    def __float__(self) -> float: ...
    def __int__(self) -> int: ...
    def __bool__(self) -> bool: ...
    def __neg__(self) -> Array: ...
    def __add__(self, other: Any, /) -> Array: ...
    def __radd__(self, other: Any, /) -> Array: ...
    def __sub__(self, other: Any, /) -> Array: ...
    def __rsub__(self, other: Any, /) -> Array: ...
    def __mul__(self, other: Any, /) -> Array: ...
    def __rmul__(self, other: Any, /) -> Array: ...
    def __truediv__(self, other: Any, /) -> Array: ...
    def __rtruediv__(self, other: Any, /) -> Array: ...
    def __pow__(self, other: Any, /) -> Array: ...
    def __matmul__(self, other: Any, /) -> Array: ...
    def __eq__(self, other: Any, /) -> Any: ...
    def __ne__(self, other: Any, /) -> Any: ...
    def __lt__(self, other: Any, /) -> Any: ...
    def __le__(self, other: Any, /) -> Any: ...
    def __gt__(self, other: Any, /) -> Any: ...
    def __ge__(self, other: Any, /) -> Any: ...


_WORKING_MEMORY: ContextVar[int | None] = ContextVar("headwater_working_memory", default=None)
DEFAULT_WORKING_MEMORY = 64 * 2**20


@contextmanager
def working_memory(limit: int) -> Iterator[None]:
    """Bound the temporary arrays of one contraction to about `limit` bytes. The numbers do not depend on it."""
    token = _WORKING_MEMORY.set(max(1, int(limit)))
    try:
        yield
    finally:
        _WORKING_MEMORY.reset(token)


def working_memory_limit() -> int:
    """Bytes."""
    found = _WORKING_MEMORY.get()
    return DEFAULT_WORKING_MEMORY if found is None else found


def working_memory_is_bounded() -> bool:
    """Whether somebody said how much it may be."""
    return _WORKING_MEMORY.get() is not None


def rows_within_memory(numbers_per_row: int, like: Array) -> int:
    """How many rows of `numbers_per_row` numbers of `like`'s dtype fit into the working memory; at least one."""
    return max(1, working_memory_limit() // max(1, numbers_per_row * itemsize(like)))


def itemsize(array: Array) -> int:
    """Bytes per number."""
    return int(array.dtype.itemsize)


def namespace(*arrays: object) -> Any:
    """The array-API namespace that the arrays share."""
    if len(arrays) == 1:
        found = _NAMESPACES.get(type(arrays[0]))
        return _of_one(arrays[0]) if found is None else found
    return array_api_compat.array_namespace(*arrays)


_NAMESPACES: dict[type, Any] = {}
"""Namespaces by the type of an array: small calls ask hundreds of times."""


def _of_one(array: object) -> Any:
    found = array_api_compat.array_namespace(array)
    # A NumPy array may stand for JAX's gradient of zero: its type does not say.
    if not isinstance(array, (np.ndarray, np.generic)):
        _NAMESPACES[type(array)] = found
    return found


def is_array(value: object) -> bool:
    return array_api_compat.is_array_api_obj(value)


def is_torch(value: object) -> TypeGuard[Any]:
    """Whether it is a tensor of PyTorch, which is not imported for that; its own methods may be called then."""
    return array_api_compat.is_torch_array(value)


def is_jax(value: object) -> TypeGuard[Any]:
    """Whether it is an array of JAX, likewise."""
    return array_api_compat.is_jax_array(value)


def shape_of(value: Any) -> tuple[int, ...] | None:
    """The shape of an array or tensor of any kind, known or not; None for what has none."""
    return getattr(value, "shape", None)


def dtype_of(value: Any) -> Any:
    """The dtype of an array or tensor of any kind, in its framework's own words; None for what has none."""
    return getattr(value, "dtype", None)


def kind_of(value: Any) -> str:
    """Of an array its dtype, of all else its type, in a word."""
    dtype = dtype_of(value)
    return type(value).__name__ if dtype is None else str(dtype)


def dtype_named(name: str, like: Array) -> Any:
    """The dtype of this name in the framework of `like`."""
    return getattr(namespace(like), name)


@runtime_checkable
class Numbered(Protocol):
    """What Python can iterate over by numbers, without `__iter__`: a data set of torch, a sequence of one's own."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> Any: ...


def is_frame(value: object) -> bool:
    """Whether it is a data frame or a column of one, as pandas has them: rows by position are `value.iloc[rows]`."""
    return hasattr(value, "iloc")


ARROW, ARROW_ARRAY = "__arrow_c_stream__", "__arrow_c_array__"
"""What frames of other libraries (polars, pyarrow, DuckDB) have, and columns of them: Arrow's PyCapsule interface, in
pieces or in one."""


def as_pandas(value: Any) -> Any:
    """Frames and columns of other libraries as pandas has them, by Arrow; a tuple by its parts; all else as it is.

    Their rows have no index: they are called by their positions. Errors: MissingExtra without pandas and pyarrow;
    InvalidInput for a stream that can be read only once.
    """
    if type(value) is tuple:
        return tuple(as_pandas(part) for part in value)
    streams = hasattr(value, ARROW)
    if is_frame(value) or not (streams or hasattr(value, ARROW_ARRAY)):
        return value
    if isinstance(value, Iterator):
        raise InvalidInput(f"A {type(value).__name__} can be read only once: pass a table of it, reader.read_all().")
    try:
        arrow, _ = import_module("pyarrow"), import_module("pandas")
    except ImportError as error:
        raise MissingExtra(str(error.name), "tables") from None
    if hasattr(value, "columns"):
        return (arrow.table(value) if streams else arrow.record_batch(value)).to_pandas()
    return (arrow.chunked_array(value) if streams else arrow.array(value)).to_pandas()


def is_sparse(value: object) -> bool:
    """Whether it is a sparse matrix, as SciPy has them: `value.tocsr()` has it by row."""
    return hasattr(value, "tocsr")


def described(value: Any) -> str:
    """A value in a few words."""
    if isinstance(value, Mapping):
        return f"a dict of {', '.join(map(repr, list(value)[:5]))}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)} entries"
    return f"{type(value).__name__} of shape {tuple(value.shape)}" if is_array(value) else type(value).__name__


def device(array: Array) -> Any:
    return array_api_compat.device(array)


def zeros_like(array: Array, shape: tuple[int, ...]) -> Array:
    xp = namespace(array)
    return xp.zeros(shape, dtype=array.dtype, device=device(array))


def as_like(values: Any, array: Array, dtype: Any = None) -> Array:
    """Host numbers as an array of `array`'s framework and device, and of its dtype unless another is given."""
    xp = namespace(array)
    if dtype is not None and is_jax(array):
        dtype = xp.asarray(np.empty(0, dtype)).dtype  # without float64 JAX has no int64 either
    return xp.asarray(values, dtype=dtype or array.dtype, device=device(array))


def identity(size: int, like: Array) -> Array:
    return namespace(like).eye(size, dtype=like.dtype, device=device(like))


def to_numpy(array: Array) -> np.ndarray:
    """A copy on the host; numbers of fewer than 32 bits come as float32, which NumPy can hold."""
    if is_torch(array):
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
    if is_jax(array) and xp.zeros(()).dtype != xp.float64:
        return array
    try:
        return xp.astype(array, xp.float64)
    except (TypeError, RuntimeError):
        return array


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)) without overflow."""
    xp = namespace(x)
    # exp of a negative number only: for large |x| the other form is inf / inf.
    e = xp.exp(-xp.abs(x))
    return xp.where(x < 0, e, xp.ones_like(e)) / (1 + e)


def transpose(matrix: Array) -> Array:
    """Swap the last two axes."""
    return namespace(matrix).linalg.matrix_transpose(matrix)


def summed(values: Iterable[Array]) -> Any:
    """Their sum, in order; None where there are none."""
    total = None
    for value in values:
        total = value if total is None else total + value
    return total


def add_product(total: Array | None, left: Array, right: Array) -> Array:
    """`total + left^T right` for left [n, p], right [n, q]; in place where the framework can.

    A product of an array with itself is symmetric, and only its lower half is computed (NumPy does that by itself).
    """
    if not is_torch(left):
        # NumPy (BLAS syrk) sees that both are one array; JAX compiles what it is given.
        product = transpose(left) @ right
        return product if total is None else total + product
    # By identity: the caller says that the product is symmetric. Small ones are not worth four calls.
    held: Any = total
    if right is left and left.shape[1] >= PANELS * 32:
        product = _gram(left)
        return product if held is None else held.add_(product)
    return transpose(left) @ right if held is None else held.addmm_(left.T, right)


def add_scaled(total: Array, array: Array, factor: float) -> Array:
    """`total + factor array`; in place where the framework can, without an array between where it is torch."""
    held: Any = total
    if is_torch(held):
        return held.add_(array, alpha=factor)
    if isinstance(held, np.ndarray):
        held += array * factor
        return held
    return held + array * factor


PANELS = 4
"""Row panels of a symmetric product: with 4, five eighths of the multiplications are left."""


def _gram(rows: Array) -> Array:
    """rows^T rows, panel by panel up to the diagonal, the rest mirrored."""
    size = int(rows.shape[1])
    full: Any = zeros_like(rows, (size, size))  # of torch or NumPy, which can be written into
    for start, stop in _panels(size):
        # Only up to the diagonal; what is right of it is the transpose of what is below.
        full[start:stop, :stop] = rows[:, start:stop].T @ rows[:, :stop]
    return _mirrored(full)


def _panels(size: int) -> list[tuple[int, int]]:
    step = -(-size // PANELS)
    return [(start, min(start + step, size)) for start in range(0, size, step)]


def _mirrored(full: Any) -> Array:
    """Above the panels' diagonal blocks, what is below."""
    for start, stop in _panels(int(full.shape[0])):
        full[:start, start:stop] = full[start:stop, :start].T
    return full


def is_positions_last(rows: Any) -> bool:
    """Whether [n, t, i] of torch lies in memory as [n, i, t], as what convolutions see does: reshaping copies that."""
    if not is_torch(rows) or rows.ndim != 3:
        return False
    return bool(not rows.is_contiguous() and rows.mT.is_contiguous())


def gram_by_rows(rows: Any, weights: Any | None) -> Array:
    """The sum over n and t of w a a^T for `is_positions_last` rows [n, t, i], weights [n, t or 1, 1]: [i, i].

    A product for each row reads them as they lie; one for all would first have to write them the other way round.
    """
    size = int(rows.shape[2])
    full: Any = zeros_like(rows, (size, size))
    right = transpose(rows)
    left = right if weights is None else right * transpose(weights)
    panels = _panels(size) if size >= PANELS * 32 else [(0, size)]
    for mine, other in zip(left, right, strict=True):
        for start, stop in panels:
            full[start:stop, :stop].addmm_(mine[start:stop], other[:stop].T)
    return _mirrored(full) if len(panels) > 1 else full


def scatter_rows(values: Array, ids: Array, rows: int) -> Array:
    """Sum `values` [m, d] into the rows named by `ids` [m]: the result is [rows, d]."""
    out: Any = zeros_like(values, (rows, int(values.shape[1])))
    if is_torch(out):
        return out.index_add_(0, ids, values)
    if isinstance(out, np.ndarray):
        # Unbuffered: `out[ids] += values` would count an id once that occurs twice.
        np.add.at(out, np.asarray(ids), np.asarray(values))
        return out
    return out.at[ids].add(values)


def put_rows(array: Any, ids: Array, rows: Array) -> Array:
    """`array` [n, d] with the rows that `ids` [m] names replaced by `rows` [m, d]; in place if possible."""
    if is_jax(array):
        return array.at[ids].set(rows)
    array[ids] = rows
    return array
