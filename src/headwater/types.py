"""The contract: what any tensor framework gives, and what influence is made of. No framework is imported here.

Letters: N, M, K numbers of rows; D parameters in the block; x_shape the shape of one input row without the batch
axis; l the loss of one row; w = (w_1, w_2, ...) the parameters.

A third party adds a framework by filling the abstract methods and the hooks (`Operator._apply`,
`Operator._validate_tensor_input`, `OperatorGradientComposition._tensor_inner_product`, `BlockMapper._split_to_blocks`);
everything else follows. `headwater.testing` has the contract as test classes to inherit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, Generic, Self, TypeVar

import numpy as np

from headwater.arrays import namespace
from headwater.errors import (
    BatchMismatch,
    BlockMismatch,
    InvalidInput,
    ShapeMismatch,
    UnsupportedInfluenceModeError,
)

TensorType = TypeVar("TensorType")
BatchType = TypeVar("BatchType", bound="Batch")


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

    `x` may be a tensor, or a tuple or mapping of tensors whose first axis runs over the rows. A subclass may carry
    sample weights and row ids. Errors: BatchMismatch if lengths disagree, or there are none.
    """

    x: Any
    y: Any

    def __post_init__(self) -> None:
        lengths = {name: _lengths(value) for name, value in self._columns().items()}
        if not any(lengths.values()):
            raise BatchMismatch("There is nothing in the batch: x and y are None.")
        if len({n for sizes in lengths.values() for n in sizes}) > 1:
            said = ", ".join(f"{name} has {' / '.join(map(str, sizes))}" for name, sizes in lengths.items() if sizes)
            raise BatchMismatch(f"The pieces of a batch need the same number of rows, but {said}.")

    def _columns(self) -> dict[str, Any]:
        """What runs over the rows, by name."""
        return {"x": self.x, "y": self.y}

    def __len__(self) -> int:
        return next(n for value in self._columns().values() for n in _lengths(value))

    def take(self, rows: slice | np.ndarray) -> Self:
        """Some of the rows: a slice, or their numbers in the order that is wanted."""
        return replace(self, **{name: _rows(value, rows) for name, value in self._columns().items()})


def join(batches: Sequence[BatchType]) -> list[BatchType]:
    """The batches as one, or as they are where their pieces do not fit together (rows padded to other lengths)."""
    if len(batches) < 2:
        return list(batches)
    try:
        columns = {name: _joined([b._columns()[name] for b in batches]) for name in batches[0]._columns()}
    except _DoNotFit:
        return list(batches)
    return [replace(batches[0], **columns)]


class _DoNotFit(Exception):
    """Pieces of batches that are no one array."""


def _joined(values: list[Any]) -> Any:
    first = values[0]
    if all(value is None for value in values):
        return None
    if isinstance(first, Mapping):
        return {name: _joined([value[name] for value in values]) for name in first}
    if isinstance(first, (tuple, list)) and any(hasattr(v, "shape") for v in first):
        return tuple(_joined(list(column)) for column in zip(*values, strict=True))
    if not all(hasattr(v, "shape") and v.shape[1:] == first.shape[1:] and v.dtype == first.dtype for v in values):
        raise _DoNotFit
    return namespace(*values).concat(values, axis=0)


def _rows(value: Any, rows: slice | np.ndarray) -> Any:
    if value is None:
        return None
    if isinstance(value, Mapping):
        return {name: _rows(v, rows) for name, v in value.items()}
    if isinstance(value, (tuple, list)) and any(hasattr(v, "shape") for v in value):
        return tuple(_rows(v, rows) for v in value)
    if isinstance(rows, slice) or hasattr(value, "shape"):
        return value[rows]
    return [value[k] for k in rows]


def _lengths(value: Any) -> list[int]:
    if value is None:
        return []
    if isinstance(value, Mapping):
        return [n for v in value.values() for n in _lengths(v)]
    if isinstance(value, (tuple, list)) and any(hasattr(v, "shape") for v in value):
        return [n for v in value for n in _lengths(v)]
    shape = getattr(value, "shape", None)
    if shape == () or (shape is None and not hasattr(value, "__len__")):
        raise BatchMismatch(f"A piece of the batch has no rows: {value!r:.80}")
    return [len(value) if shape is None else int(shape[0])]


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


class BilinearForm(ABC, Generic[BatchType, TensorType]):
    """`<left, right>_B`."""

    @abstractmethod
    def inner_prod(self, left: TensorType, right: TensorType | None) -> TensorType:
        """left (N, D), right (M, ..., D), or None for left itself: (N, M, ...)."""

    def grads_inner_prod(
        self, left: BatchType, right: BatchType | None, gradient_provider: GradientProvider[BatchType, TensorType]
    ) -> TensorType:
        """Between the gradients of two batches; right None means left: (N, M)."""
        left_grads = gradient_provider.flat_grads(left)
        return self.inner_prod(left_grads, None if right is None else gradient_provider.flat_grads(right))

    def mixed_grads_inner_prod(
        self, left: BatchType, right: BatchType | None, gradient_provider: GradientProvider[BatchType, TensorType]
    ) -> TensorType:
        """Plain gradient on the left, mixed gradient on the right; right None means left: (N, M, *x_shape)."""
        right_grads = gradient_provider.flat_mixed_grads(left if right is None else right)
        return self.inner_prod(gradient_provider.flat_grads(left), right_grads)


class Operator(ABC, Generic[TensorType]):
    """A linear map on vectors of `input_size` numbers; knows no model and no data."""

    @property
    @abstractmethod
    def input_size(self) -> int:
        """D, the length of the vectors that it takes."""

    @abstractmethod
    def _apply(self, tensor: TensorType) -> TensorType:
        """Map every vector along the trailing axis. The input has been validated: (..., D) to (..., D)."""

    def _validate_tensor_input(self, tensor: TensorType) -> None:
        """Refuse what `_apply` cannot take; a hook, called before the trailing axis is checked."""
        if not hasattr(tensor, "shape"):
            raise InvalidInput(f"An operator applies to an array, not to {type(tensor).__name__}: {tensor!r}.")

    def apply(self, tensor: TensorType) -> TensorType:
        """Map vectors along the trailing axis: (..., D) to (..., D), and (D,) to (D,).

        Errors: ShapeMismatch if the trailing axis is not `input_size`.
        """
        self._validate_tensor_input(tensor)
        shape = tuple(getattr(tensor, "shape", ()))
        if not shape or shape[-1] != self.input_size:
            raise ShapeMismatch(
                f"{type(self).__name__} has input_size {self.input_size}, "
                f"but the trailing axis has {shape[-1] if shape else 'no'} entries (shape {shape})."
            )
        return self._apply(tensor)

    def as_bilinear_form(self) -> BilinearForm:
        """`<left, right> = <Op left, right>`."""
        return OperatorBilinearForm(self)


class OperatorBilinearForm(BilinearForm[BatchType, TensorType]):
    """`<left, right> = <Op left, right>`: the left side is mapped, whatever the numbers of rows."""

    def __init__(self, operator: Operator[TensorType]):
        self.operator = operator

    def inner_prod(self, left: TensorType, right: TensorType | None) -> TensorType:
        return tensor_inner_product(self.operator.apply(left), left if right is None else right)


def tensor_inner_product(left: Any, right: Any) -> Any:
    """Sum over the trailing axes: left (N, D), right (M, ..., D) to (N, M, ...). Any array framework."""
    if left.ndim != 2 or right.ndim < 2 or left.shape[-1] != right.shape[-1]:
        raise ShapeMismatch(
            f"Expected left (N, D) and right (M, ..., D), got {tuple(left.shape)} and {tuple(right.shape)}."
        )
    return namespace(left, right).tensordot(left, right, axes=([1], [right.ndim - 1]))


class OperatorGradientComposition(Generic[TensorType, BatchType]):
    """One block: an operator, and the gradient provider whose gradients it acts on. Serves every array type."""

    def __init__(self, op: Operator[TensorType], gp: GradientProvider[BatchType, TensorType]):
        self.op = op
        self.gp = gp

    def _tensor_inner_product(self, left: TensorType, right: TensorType) -> TensorType:
        """left (N, D), right (M, ..., D) to (N, M, ...); a hook for arrays that need their own words."""
        return tensor_inner_product(left, right)

    def interactions(
        self, left_batch: BatchType, right_batch: BatchType | None, mode: InfluenceMode | str
    ) -> TensorType:
        """`<Op(grad left), grad right>`, (N, M), or `<Op(grad left), grad_x grad right>`, (N, M, *x_shape)."""
        right_batch = left_batch if right_batch is None else right_batch
        return self.interactions_from_transformed_grads(self.transformed_grads(left_batch), right_batch, mode)

    def transformed_grads(self, batch: BatchType) -> TensorType:
        """Op(grad batch): (N, D)."""
        return self.op.apply(self.gp.flat_grads(batch))

    def interactions_from_transformed_grads(
        self, left_factors: TensorType, right_batch: BatchType, mode: InfluenceMode | str
    ) -> TensorType:
        """The same as `interactions`, with factors computed before."""
        if InfluenceMode(mode) is InfluenceMode.Up:
            return self._tensor_inner_product(left_factors, self.gp.flat_grads(right_batch))
        return self._tensor_inner_product(left_factors, self.gp.flat_mixed_grads(right_batch))


class BlockMapper(ABC, Generic[TensorType, BatchType]):
    """Named blocks, in order, each an operator composed with a gradient provider."""

    def __init__(self, composable_block_dict: Mapping[str, OperatorGradientComposition[TensorType, BatchType]]):
        self.composable_block_dict = OrderedDict(composable_block_dict)

    def _split_to_blocks(self, z: TensorType, dim: int = -1) -> OrderedDict[str, TensorType]:
        """Cut one tensor by the blocks' sizes, in order, along `dim`; a hook."""
        sizes = {name: block.op.input_size for name, block in self.composable_block_dict.items()}
        return split(z, sizes, dim)

    def transformed_grads(self, batch: BatchType) -> OrderedDict[str, TensorType]:
        """By block: Op(grad batch), (N, D_block)."""
        return OrderedDict(self.generate_transformed_grads(batch))

    def interactions(
        self, left_batch: BatchType, right_batch: BatchType | None, mode: InfluenceMode | str
    ) -> OrderedDict[str, TensorType]:
        """By block: (N, M) or (N, M, *x_shape)."""
        return OrderedDict(self.generate_interactions(left_batch, right_batch, mode))

    def interactions_from_transformed_grads(
        self,
        left_factors: TensorType | Mapping[str, TensorType],
        right_batch: BatchType,
        mode: InfluenceMode | str,
    ) -> OrderedDict[str, TensorType]:
        """By block, from factors computed before: one tensor (N, sum of D), or a dict by block."""
        return OrderedDict(self.generate_interactions_from_transformed_grads(left_factors, right_batch, mode))

    def generate_transformed_grads(self, batch: BatchType) -> Iterator[tuple[str, TensorType]]:
        """`transformed_grads`, lazily, one (name, tensor) at a time."""
        for name, block in self.composable_block_dict.items():
            yield name, block.transformed_grads(batch)

    def generate_interactions(
        self, left_batch: BatchType, right_batch: BatchType | None, mode: InfluenceMode | str
    ) -> Iterator[tuple[str, TensorType]]:
        """`interactions`, lazily."""
        mode = InfluenceMode(mode)
        for name, block in self.composable_block_dict.items():
            yield name, block.interactions(left_batch, right_batch, mode)

    def generate_interactions_from_transformed_grads(
        self,
        left_factors: TensorType | Mapping[str, TensorType],
        right_batch: BatchType,
        mode: InfluenceMode | str,
    ) -> Iterator[tuple[str, TensorType]]:
        """`interactions_from_transformed_grads`, lazily."""
        mode, factors = InfluenceMode(mode), self._factors_by_block(left_factors)
        for name, block in self.composable_block_dict.items():
            yield name, block.interactions_from_transformed_grads(factors[name], right_batch, mode)

    def _factors_by_block(self, factors: TensorType | Mapping[str, TensorType]) -> Mapping[str, TensorType]:
        if not isinstance(factors, Mapping):
            factors = self._split_to_blocks(factors)
        if set(factors) != set(self.composable_block_dict):
            raise BlockMismatch(
                f"The factors have blocks {list(factors)}, the mapper has {list(self.composable_block_dict)}. "
                "Compute both with the same blocks."
            )
        for name, factor in factors.items():
            expected = self.composable_block_dict[name].op.input_size
            shape = tuple(getattr(factor, "shape", ()))
            if len(shape) != 2 or shape[1] != expected:
                raise BlockMismatch(f"The factors of block {name!r} have shape {shape}, expected (N, {expected}).")
        return factors


def split(z: Any, sizes: Mapping[str, int], dim: int = -1) -> OrderedDict[str, Any]:
    """Cut `z` along `dim` into named pieces of the given sizes, in order; views where the framework has them."""
    axis = dim if dim >= 0 else z.ndim + dim
    if not 0 <= axis < z.ndim or z.shape[axis] != sum(sizes.values()):
        raise BlockMismatch(
            f"Expected {sum(sizes.values())} entries along axis {dim} (blocks {dict(sizes)}), got {tuple(z.shape)}."
        )
    pieces, start = OrderedDict(), 0
    for name, size in sizes.items():
        pieces[name] = z[(slice(None),) * axis + (slice(start, start + size),)]
        start += size
    return pieces
