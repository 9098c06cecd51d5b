"""The contract: what any tensor framework gives, and what influence is made of. No framework is imported here.

Letters: N, M, K numbers of rows; D parameters in the block; x_shape the shape of one input row without the batch
axis; l the loss of one row; w = (w_1, w_2, ...) the parameters.

A third party adds a framework by filling the abstract methods and the hooks (`Operator._apply`,
`Operator._validate_tensor_input`, `OperatorGradientComposition._tensor_inner_product`, `BlockMapper._split_to_blocks`);
everything else follows. A tensor may be anything: what has a `shape` is checked by it, the rest is the subclass's
affair. `headwater.testing` has the contract as test classes to inherit.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence, Set, Sized
from dataclasses import Field, dataclass, field, fields, replace
from enum import Enum
from typing import Any, Generic, Self, TypeVar, cast

import numpy as np

from headwater.arrays import is_array, namespace, shape_of, to_numpy
from headwater.errors import (
    BatchMismatch,
    BlockMismatch,
    InvalidInput,
    ShapeMismatch,
    UnsupportedInfluenceModeError,
)
from headwater.errors import UnsupportedInfluenceModeException as UnsupportedInfluenceModeException

TensorType = TypeVar("TensorType")
BatchType = TypeVar("BatchType", bound="Batch")
DataLoaderType = TypeVar("DataLoaderType", bound=Iterable)
GradientProviderType = TypeVar("GradientProviderType", bound="GradientProvider")
BilinearFormType = TypeVar("BilinearFormType", bound="BilinearForm")
OperatorType = TypeVar("OperatorType", bound="Operator")
OperatorGradientCompositionType = TypeVar("OperatorGradientCompositionType", bound="OperatorGradientComposition")

Mode = Any
"""An `InfluenceMode` or its string; declared as Any so that an override may say `mode: InfluenceMode` to a checker."""
Factors = Any
"""One tensor (N, sum of D), or a mapping of tensors by block; Any for the same reason."""


class InfluenceMode(str, Enum):
    """What is changed about a train row: its weight, or its input."""

    Up = "up"
    Perturbation = "perturbation"

    @classmethod
    def _missing_(cls, value: object) -> InfluenceMode:
        raise UnsupportedInfluenceModeError(
            f"mode is {value!r}; expected one of {', '.join(repr(m.value) for m in cls)}, or an InfluenceMode."
        )


@dataclass(frozen=True, eq=False)
class Batch(Generic[TensorType]):
    """Some rows: inputs x and targets y, the same number of each.

    `x` may be a tensor, or a tuple or mapping of tensors whose first axis runs over the rows. `weights` [n]: a weight
    of 2 means the row twice. `ids` [n]: names that follow the row everywhere.

    A dataclass that inherits this may add fields. Those that hold rows (an array, a list, a mapping of them) are
    columns: their lengths are checked, `take` cuts them and `join` joins them. What cannot hold rows (a number, a word,
    a flag) is carried along, and so is a field that says so, such as the names of the classes:
    `dataclasses.field(metadata={"column": False})`. Batches are joined only where what they carry along is the same. A
    field with `init=False` is left to the subclass's `__post_init__`, which runs for what is cut or joined too.

    Errors: BatchMismatch if lengths disagree, or there are none.
    """

    x: Any
    y: Any
    weights: Any = field(default=None, kw_only=True)
    ids: Any = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        lengths = {name: _lengths(value, name) for name, value in self._columns().items()}
        if not any(lengths.values()):
            raise BatchMismatch("There is nothing in the batch: x and y are None.")
        if len({n for sizes in lengths.values() for n in sizes}) > 1:
            said = ", ".join(f"{name} has {' / '.join(map(str, sizes))}" for name, sizes in lengths.items() if sizes)
            raise BatchMismatch(f"The pieces of a batch need the same number of rows, but {said}.{self._advice()}")
        for name, value in (("weights", self.weights), ("ids", self.ids)):
            if value is not None and np.ndim(value) != 1:
                raise BatchMismatch(f"{name} has shape {tuple(np.shape(value))}; expected one number for each row.")

    def _advice(self) -> str:
        added = [name for name in self._columns() if name not in COLUMNS]
        if not added:
            return ""
        return f" If {' or '.join(added)} is no column, declare it with field(metadata={{'column': False}})."

    def _columns(self) -> dict[str, Any]:
        """What runs over the rows, by field."""
        return {f.name: value for f, value in field_values(self, derived=False) if self._is_column(f, value)}

    def _is_column(self, declared: Field, value: Any) -> bool:
        known = declared.metadata.get("column")
        if known is None:
            known = declared.name in COLUMNS or _may_have_rows(value)
        return bool(known)

    def _carried(self) -> dict[str, Any]:
        """The other fields."""
        return {f.name: value for f, value in field_values(self, derived=False) if not self._is_column(f, value)}

    def _cut(self, column: Any, rows: slice | np.ndarray) -> Any:
        """Some of the rows of one column; a hook for columns of another kind, such as data frames."""
        return _rows(column, rows)

    def __len__(self) -> int:
        for name, value in (("x", self.x), ("y", self.y)):  # nearly always the first; columns are looked up otherwise
            if found := _lengths(value, name):
                return found[0]
        return next(n for name, value in self._columns().items() for n in _lengths(value, name))

    def take(self, rows: slice | np.ndarray) -> Self:
        """Some of the rows: a slice, or their numbers in the order that is wanted."""
        return replace(self, **{name: self._cut(value, rows) for name, value in self._columns().items()})


COLUMNS = ("x", "y", "weights", "ids")
"""The fields that are columns whatever they hold."""


def field_values(record: Any, *, derived: bool = True) -> Iterator[tuple[Field, Any]]:
    """The fields of a dataclass, each with its value.

    derived: those with `init=False` too, which `__post_init__` fills in; they may not be there before it has run.
    """
    for declared in fields(record):
        if derived or declared.init:
            yield declared, getattr(record, declared.name)


def join(batches: Sequence[BatchType]) -> list[BatchType]:
    """The batches as one, or as they are where their pieces do not fit together (rows padded to other lengths)."""
    if len(batches) < 2:
        return list(batches)
    first = batches[0]
    try:
        if not all(type(b) is type(first) and _same(b._carried(), first._carried()) for b in batches):
            raise _DoNotFit
        columns = _joined([b._columns() for b in batches])
    except _DoNotFit:
        return list(batches)
    return [replace(first, **columns)]


class _DoNotFit(Exception):
    """Pieces of batches that are no one array."""


def _same(one: Any, other: Any) -> bool:
    """Whether two values that batches carry along are equal, arrays included."""
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if is_array(one):
        return np.array_equal(to_numpy(one), to_numpy(other))
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)


def _joined(values: list[Any]) -> Any:
    first = values[0]
    if any(type(value) is not type(first) for value in values):
        raise _DoNotFit
    if first is None:
        return None
    if isinstance(first, Mapping):
        if any(value.keys() != first.keys() for value in values):
            raise _DoNotFit
        return {name: _joined([value[name] for value in values]) for name in first}
    if isinstance(first, (tuple, list)):
        return _joined_sequences(values)
    # Words are arrays of the longest of them: those of two batches differ in dtype, and fit together.
    if not all(is_array(v) and v.shape[1:] == first.shape[1:] and _kind(v) == _kind(first) for v in values):
        raise _DoNotFit
    return namespace(*values).concat(values, axis=0)


def _kind(array: Any) -> Any:
    return "words" if isinstance(array, np.ndarray) and array.dtype.kind == "U" else array.dtype


def _joined_sequences(values: list[Any]) -> Any:
    """Tuples of tensors place by place; lists of rows one after the other."""
    if not any(_is_group(value) for value in values):
        return type(values[0])(row for value in values for row in value)
    if len({len(value) for value in values}) > 1:
        raise _DoNotFit
    return tuple(_joined(list(column)) for column in zip(*values, strict=True))


def _is_group(value: Any) -> bool:
    """A tuple or list of several tensors, each with the rows along its first axis."""
    return isinstance(value, (tuple, list)) and any(shape_of(v) for v in value)


def _rows(value: Any, rows: slice | np.ndarray) -> Any:
    if value is None:
        return None
    if isinstance(value, Mapping):
        return {name: _rows(v, rows) for name, v in value.items()}
    if _is_group(value):
        return tuple(_rows(v, rows) for v in value)
    if isinstance(rows, slice) or shape_of(value) is not None:
        return value[rows]
    return type(value)(value[k] for k in rows) if isinstance(value, tuple) else [value[k] for k in rows]


def _lengths(value: Any, name: str) -> list[int]:
    if value is None:
        return []
    if isinstance(value, Mapping):
        return [n for key, v in value.items() for n in _lengths(v, f"{name}[{key!r}]")]
    if _is_group(value):
        return [n for k, v in enumerate(value) for n in _lengths(v, f"{name}[{k}]")]
    if not _may_have_rows(value):
        raise BatchMismatch(f"{name} has no batch dimension ({value!r:.80}); for a single row pass {name}[None].")
    shape = shape_of(value)
    return [len(value) if shape is None else int(shape[0])]


def _may_have_rows(value: Any) -> bool:
    """Nothing, something with a first axis, or a mapping of such."""
    if value is None:
        return True
    if isinstance(value, Mapping):
        return bool(value) and all(v is not None and _may_have_rows(v) for v in value.values())
    shape = shape_of(value)
    if shape is not None:
        return len(shape) > 0
    return isinstance(value, Sized) and not isinstance(value, (str, bytes, Set))


class GradientProvider(ABC, Generic[BatchType, TensorType]):
    """Gradients of the loss l of a model f with parameters w, one for each row of a batch."""

    @abstractmethod
    def flat_grads(self, batch: BatchType) -> TensorType:
        """Per-sample gradients, all blocks' parameters flattened in order: (N, D)."""

    @abstractmethod
    def flat_mixed_grads(self, batch: BatchType) -> TensorType:
        """Per-sample gradient, with respect to the input, of the gradient: (N, *x_shape, D)."""

    @abstractmethod
    def jacobian_prod(self, batch: BatchType, g: TensorType) -> TensorType:
        """Per-sample gradients times g^T for g (K, D): (N, K); equals `flat_grads(batch) @ g.T`."""


class BilinearForm(ABC, Generic[TensorType, BatchType, GradientProviderType]):
    """`<left, right>_B`."""

    @abstractmethod
    def inner_prod(self, left: TensorType, right: TensorType | None) -> TensorType:
        """left (N, D), right (M, ..., D), or None for left itself: (N, M, ...)."""

    def grads_inner_prod(
        self, left: BatchType, right: BatchType | None, gradient_provider: GradientProviderType
    ) -> TensorType:
        """Between the gradients of two batches; right None means left: (N, M)."""
        left_grads = gradient_provider.flat_grads(left)
        return self.inner_prod(left_grads, left_grads if right is None else gradient_provider.flat_grads(right))

    def mixed_grads_inner_prod(
        self, left: BatchType, right: BatchType | None, gradient_provider: GradientProviderType
    ) -> TensorType:
        """Plain gradient on the left, mixed gradient on the right; right None means left: (N, M, *x_shape)."""
        right_grads = gradient_provider.flat_mixed_grads(left if right is None else right)
        return self.inner_prod(gradient_provider.flat_grads(left), right_grads)

    def is_default_of(self, operator: Operator) -> bool:
        """Whether this is `<operator left, right>` and nothing else, so that it may be computed in another order."""
        return False

    def with_inner_product(self, product: Callable[[TensorType, TensorType], TensorType]) -> Self:
        """The same form, contracting trailing axes by `product` if it does such a thing at all; self by default."""
        return self


class Operator(ABC, Generic[TensorType, BilinearFormType]):
    """A linear map on vectors of `input_size` numbers; knows no model and no data."""

    @property
    @abstractmethod
    def input_size(self) -> int:
        """D, the length of the vectors that it takes."""

    @abstractmethod
    def _apply(self, tensor: TensorType) -> TensorType:
        """Map every vector along the trailing axis. The input has been validated: (..., D) to (..., D)."""

    def _validate_tensor_input(self, tensor: TensorType) -> None:
        """Refuse, with a ValueError, what `_apply` cannot take; a hook, called before the trailing axis is checked.

        The only check of a tensor that has no `shape`.
        """

    def apply(self, tensor: TensorType) -> TensorType:
        """Map vectors along the trailing axis: (..., D) to (..., D), and (D,) to (D,).

        Errors: ShapeMismatch if the tensor has a shape whose trailing axis is not `input_size`.
        """
        self._validate_tensor_input(tensor)
        shape = shape_of(tensor)
        if shape is not None and (not shape or shape[-1] != self.input_size):
            raise ShapeMismatch(
                f"{type(self).__name__} has input_size {self.input_size}, "
                f"but the trailing axis has {shape[-1] if shape else 'no'} entries (shape {tuple(shape)})."
            )
        return self._apply(tensor)

    def as_bilinear_form(self) -> BilinearFormType:
        """`<left, right> = <Op left, right>`; an operator with a form of its own returns that."""
        return cast(BilinearFormType, OperatorBilinearForm(self))


class OperatorBilinearForm(BilinearForm[TensorType, BatchType, GradientProviderType]):
    """`<left, right> = <Op left, right>`: the left side is mapped, whatever the numbers of rows."""

    def __init__(self, operator: Operator):
        self.operator = operator
        self._product: Callable[[Any, Any], Any] = tensor_inner_product

    def inner_prod(self, left: TensorType, right: TensorType | None) -> TensorType:
        return self._product(self.operator.apply(left), left if right is None else right)

    def is_default_of(self, operator: Operator) -> bool:
        # The exact type: a subclass is there because something about it differs.
        return type(self) is OperatorBilinearForm and self.operator is operator

    def with_inner_product(self, product: Callable[[TensorType, TensorType], TensorType]) -> Self:
        other = copy.copy(self)
        other._product = product
        return other


def tensor_inner_product(left: Any, right: Any) -> Any:
    """Sum over the trailing axes: left (N, D), right (M, ..., D) to (N, M, ...). Any array framework.

    Errors: ShapeMismatch; InvalidInput for what is no array of a known framework.
    """
    if not (is_array(left) and is_array(right)):
        raise InvalidInput(
            f"Tensors of type {type(left).__name__} and {type(right).__name__} need an inner product of their own: "
            "override OperatorGradientComposition._tensor_inner_product, or the operator's as_bilinear_form."
        )
    if left.ndim != 2 or right.ndim < 2 or left.shape[-1] != right.shape[-1]:
        raise ShapeMismatch(
            f"Expected left (N, D) and right (M, ..., D), got {tuple(left.shape)} and {tuple(right.shape)}."
        )
    return namespace(left, right).tensordot(left, right, axes=([1], [right.ndim - 1]))


class OperatorGradientComposition(Generic[TensorType, BatchType, OperatorType, GradientProviderType]):
    """One block: an operator, and the gradient provider whose gradients it acts on. Serves every array type."""

    def __init__(self, op: OperatorType, gp: GradientProviderType):
        self.op = op
        self.gp = gp

    def _tensor_inner_product(self, left: TensorType, right: TensorType) -> TensorType:
        """left (N, D), right (M, ..., D) to (N, M, ...); a hook for arrays that need their own words."""
        return tensor_inner_product(left, right)

    def interactions(self, left_batch: BatchType, right_batch: BatchType | None, mode: Mode) -> TensorType:
        """The operator's form between gradients, (N, M), or between gradients and mixed ones, (N, M, *x_shape).

        `<Op(grad left), grad right>` and `<Op(grad left), grad_x grad right>`, unless the operator has a form of its
        own. No right batch means the left one.
        """
        form = self.op.as_bilinear_form().with_inner_product(self._tensor_inner_product)
        if InfluenceMode(mode) is InfluenceMode.Up:
            return form.grads_inner_prod(left_batch, right_batch, self.gp)
        return form.mixed_grads_inner_prod(left_batch, right_batch, self.gp)

    def transformed_grads(self, batch: BatchType) -> TensorType:
        """Op(grad batch): (N, D)."""
        return self.op.apply(self.gp.flat_grads(batch))

    def interactions_from_transformed_grads(
        self, left_factors: TensorType, right_batch: BatchType, mode: Mode
    ) -> TensorType:
        """`<factor, grad right>` or `<factor, grad_x grad right>`, with factors computed before.

        The same as `interactions`, unless the operator has a form of its own.
        """
        if InfluenceMode(mode) is InfluenceMode.Up:
            return self._tensor_inner_product(left_factors, self.gp.flat_grads(right_batch))
        return self._tensor_inner_product(left_factors, self.gp.flat_mixed_grads(right_batch))


class BlockMapper(ABC, Generic[TensorType, BatchType, OperatorGradientCompositionType]):
    """Named blocks, in order, each an operator composed with a gradient provider.

    The generators yield tensors alone, in the order of `composable_block_dict`; what they yield is given its names by
    `_to_ordered_dict`. A subclass may override any of them.
    """

    def __init__(self, composable_block_dict: OrderedDict[str, OperatorGradientCompositionType]):
        self.composable_block_dict = composable_block_dict

    def _split_to_blocks(self, z: TensorType, dim: int = -1) -> OrderedDict[str, TensorType]:
        """Cut one tensor by the blocks' sizes, in order, along `dim`; a hook."""
        sizes = {name: block.op.input_size for name, block in self.composable_block_dict.items()}
        return split(z, sizes, dim)

    def _to_ordered_dict(self, tensor_generator: Generator[TensorType, None, None]) -> OrderedDict[str, TensorType]:
        """The blocks' names for the tensors of a generator; a hook. Errors: BlockMismatch if their number differs."""
        names, tensors = list(self.composable_block_dict), list(tensor_generator)
        if len(tensors) != len(names):
            raise BlockMismatch(f"A generator of {type(self).__name__} gave {len(tensors)} tensors for blocks {names}.")
        return OrderedDict(zip(names, tensors, strict=True))

    def transformed_grads(self, batch: BatchType) -> OrderedDict[str, TensorType]:
        """By block: Op(grad batch), (N, D_block)."""
        return self._to_ordered_dict(self.generate_transformed_grads(batch))

    def interactions(
        self, left_batch: BatchType, right_batch: BatchType | None, mode: Mode
    ) -> OrderedDict[str, TensorType]:
        """By block: (N, M) or (N, M, *x_shape)."""
        return self._to_ordered_dict(self.generate_interactions(left_batch, right_batch, mode))

    def interactions_from_transformed_grads(
        self, left_factors: Factors, right_batch: BatchType, mode: Mode
    ) -> OrderedDict[str, TensorType]:
        """By block, from factors computed before: one tensor (N, sum of D), or a dict by block."""
        return self._to_ordered_dict(self.generate_interactions_from_transformed_grads(left_factors, right_batch, mode))

    def generate_transformed_grads(self, batch: BatchType) -> Generator[TensorType, None, None]:
        """`transformed_grads`, lazily, one block's tensor at a time."""
        for block in self.composable_block_dict.values():
            yield block.transformed_grads(batch)

    def generate_interactions(
        self, left_batch: BatchType, right_batch: BatchType | None, mode: Mode
    ) -> Generator[TensorType, None, None]:
        """`interactions`, lazily."""
        mode = InfluenceMode(mode)
        for block in self.composable_block_dict.values():
            yield block.interactions(left_batch, right_batch, mode)

    def generate_interactions_from_transformed_grads(
        self, left_factors: Factors, right_batch: BatchType, mode: Mode
    ) -> Generator[TensorType, None, None]:
        """`interactions_from_transformed_grads`, lazily."""
        mode, factors = InfluenceMode(mode), self._factors_by_block(left_factors)
        for name, block in self.composable_block_dict.items():
            yield block.interactions_from_transformed_grads(factors[name], right_batch, mode)

    def _factors_by_block(self, factors: Factors) -> OrderedDict[str, TensorType]:
        """One tensor or a mapping in any order, as the blocks are named and ordered here. Errors: BlockMismatch."""
        if not isinstance(factors, Mapping):
            factors = self._split_to_blocks(factors)
        if set(factors) != set(self.composable_block_dict):
            raise BlockMismatch(
                f"The factors have blocks {list(factors)}, the mapper has {list(self.composable_block_dict)}. "
                "Compute both with the same blocks."
            )
        for name, block in self.composable_block_dict.items():
            self._check_factor(name, block.op, factors[name])
        return OrderedDict((name, factors[name]) for name in self.composable_block_dict)

    def _check_factor(self, name: str, op: Operator, factor: TensorType) -> None:
        shape = shape_of(factor)
        if shape is None:
            try:
                op._validate_tensor_input(factor)
            except ValueError as error:
                raise BlockMismatch(f"The factors of block {name!r}: {error}") from error
        elif len(shape) != 2 or shape[1] != op.input_size:
            raise BlockMismatch(
                f"The factors of block {name!r} have shape {tuple(shape)}, expected (N, {op.input_size})."
            )


class SizedTraining(ABC):
    """A training that is called with the rows it keeps, and knows how many there are to keep from."""

    @property
    @abstractmethod
    def n_rows(self) -> int:
        """All train rows."""

    def check_rows(self, rows: int) -> None:
        """Errors: BatchMismatch where subsets are to be drawn from another number of rows."""
        if rows != self.n_rows:
            raise BatchMismatch(
                f"Subsets are to be drawn from {rows} rows, and {type(self).__name__} has {self.n_rows}: what is past "
                f"the fewer of them would never be kept, or is not there. Give rows={self.n_rows}, or the data of "
                f"{rows} rows."
            )


def split(z: Any, sizes: Mapping[str, int], dim: int = -1) -> OrderedDict[str, Any]:
    """Cut `z` along `dim` into named pieces of the given sizes, in order; views where the framework has them.

    Errors: BlockMismatch; InvalidInput for a tensor without a shape.
    """
    shape = shape_of(z)
    if shape is None:
        raise InvalidInput(
            f"Tensors of type {type(z).__name__} are cut by an override of BlockMapper._split_to_blocks."
        )
    axis = dim if dim >= 0 else len(shape) + dim
    if not 0 <= axis < len(shape) or shape[axis] != sum(sizes.values()):
        raise BlockMismatch(
            f"Expected {sum(sizes.values())} entries along axis {dim} (blocks {dict(sizes)}), got {tuple(shape)}."
        )
    pieces, start = OrderedDict(), 0
    for name, size in sizes.items():
        pieces[name] = z[(slice(None),) * axis + (slice(start, start + size),)]
        start += size
    return pieces
