"""Claims about tensors without a shape: a toy framework of nested lists passes the contract in full.

Its model is f(x) = w . x + b with loss (f(x) - y)^2 / 2, its blocks are w and b; everything is plain Python.
"""

from collections import OrderedDict

import numpy as np
import pytest

from headwater.errors import BatchMismatch, BlockMismatch, InvalidInput
from headwater.testing import BatchContract, BlockMapperContract, GradientProviderContract, OperatorContract
from headwater.types import Batch, BilinearForm, BlockMapper, GradientProvider, Operator, OperatorGradientComposition

RNG = np.random.default_rng(5)
X, Y = RNG.standard_normal((7, 3)).tolist(), RNG.standard_normal(7).tolist()
W, B = [0.5, -1.0, 2.0], 0.25


def dot(u, v):
    return sum(a * b for a, b in zip(u, v, strict=True))


def residuals(batch):
    return [dot(W, x) + B - y for x, y in zip(batch.x, batch.y, strict=True)]


class Slopes(GradientProvider):
    """The gradient by w is r x, and its derivative by x_j is w_j x + r e_j."""

    def flat_grads(self, batch):
        return [[r * v for v in x] for r, x in zip(residuals(batch), batch.x, strict=True)]

    def flat_mixed_grads(self, batch):
        rows = zip(residuals(batch), batch.x, strict=True)
        return [[[W[j] * x[d] + r * (j == d) for d in range(3)] for j in range(3)] for r, x in rows]

    def jacobian_prod(self, batch, g):
        return [[dot(grad, row) for row in g] for grad in self.flat_grads(batch)]


class Offset(Slopes):
    """The gradient by b is r, and its derivative by x is w."""

    def flat_grads(self, batch):
        return [[r] for r in residuals(batch)]

    def flat_mixed_grads(self, batch):
        return [[[w] for w in W] for _ in batch.x]


def mapped(function, z):
    """Every vector along the trailing axis."""
    return [mapped(function, part) for part in z] if isinstance(z[0], list) else function(z)


def met(vector, z):
    """The dot product of a vector with every vector of z."""
    return [met(vector, part) for part in z] if isinstance(z[0], list) else dot(vector, z)


def cut(z, axis, rows):
    return z[rows] if axis == 0 else [cut(part, axis - 1, rows) for part in z]


class ListMatrix(Operator):
    """Gives the hooks alone; the inner product is its composition's affair."""

    def __init__(self, matrix):
        self.matrix = matrix

    @property
    def input_size(self):
        return len(self.matrix)

    def _validate_tensor_input(self, tensor):
        if not isinstance(tensor, list):
            raise InvalidInput(f"A matrix with input_size {self.input_size} applies to nested lists, not to {tensor!r}")
        if tensor and isinstance(tensor[0], list):
            for part in tensor:
                self._validate_tensor_input(part)
        elif len(tensor) != self.input_size:
            raise InvalidInput(f"input_size is {self.input_size}, but a vector has {len(tensor)} numbers")

    def _apply(self, tensor):
        return mapped(lambda vector: [dot(row, vector) for row in self.matrix], tensor)


class ListForm(BilinearForm):
    def __init__(self, operator):
        self.operator = operator

    def inner_prod(self, left, right):
        right = left if right is None else right
        self.operator._validate_tensor_input(right)
        return [[met(vector, part) for part in right] for vector in self.operator.apply(left)]


class FormedMatrix(ListMatrix):
    """Gives its form as well, and needs no composition of its own."""

    def as_bilinear_form(self):
        return ListForm(self)


class ListComposition(OperatorGradientComposition):
    def _tensor_inner_product(self, left, right):
        return [[met(vector, part) for part in right] for vector in left]


class ListMapper(BlockMapper):
    def _split_to_blocks(self, z, dim=-1):
        depth, part = 0, z
        while isinstance(part, list):
            depth, part = depth + 1, part[0]
        axis, pieces, start = dim % depth, OrderedDict(), 0
        for name, block in self.composable_block_dict.items():
            pieces[name] = cut(z, axis, slice(start, start + block.op.input_size))
            start += block.op.input_size
        if width(z, axis) != start:
            raise ValueError(f"{width(z, axis)} numbers for blocks of {start}")
        return pieces


def width(z, axis):
    return len(z) if axis == 0 else width(z[0], axis - 1)


class Lists:
    has_empty_arrays = False

    def array(self, values):
        return values.tolist()


MATRIX = [[2.0, 1.0, 0.0], [0.5, 3.0, 0.0], [0.0, 0.25, 4.0]]


class TestSlopes(Lists, GradientProviderContract):
    rows = 7

    def provider(self):
        return Slopes()

    def batch(self, index):
        return Batch([X[k] for k in index], [Y[k] for k in index])

    def slow_grads(self):
        return (np.array(X) @ W + B - Y)[:, None] * X

    def slow_mixed_grads(self):
        return np.einsum("j,nd->njd", W, X) + (np.array(X) @ W + B - Y)[:, None, None] * np.eye(3)


class TestFormedMatrix(Lists, OperatorContract):
    def operator(self):
        return FormedMatrix(MATRIX)

    def matrix(self):
        return np.array(MATRIX)

    def composition(self, provider, operator=None):
        return ListComposition(self.operator() if operator is None else operator, provider)


class TestMapperByHooks(Lists, BlockMapperContract):
    """Operators without a form of their own: the composition's inner product is theirs."""

    matrix = ListMatrix

    def mapper(self):
        blocks = {"offset": ([[3.0]], Offset()), "slopes": (MATRIX, Slopes())}
        return ListMapper(
            OrderedDict((name, ListComposition(self.matrix(m), provider)) for name, (m, provider) in blocks.items())
        )

    def left(self):
        return Batch(X[:4], Y[:4])

    def right(self):
        return Batch(X[4:6], Y[4:6])


class TestMapperByForms(TestMapperByHooks):
    matrix = FormedMatrix


class TestListBatch(BatchContract):
    def batch(self, index):
        return Batch(
            [X[k] for k in index],
            [Y[k] for k in index],
            weights=[k + 1.0 for k in index],
            ids=[f"row {k}" for k in index],
        )


def test_without_hooks_the_error_names_the_hook_to_fill():
    op = ListMatrix(MATRIX)
    block = OperatorGradientComposition(op, Slopes())
    with pytest.raises(InvalidInput, match=r"list.*_tensor_inner_product.*as_bilinear_form"):
        block.interactions(Batch(X, Y), None, "up")
    mapper = BlockMapper(OrderedDict(all=block))
    with pytest.raises(InvalidInput, match=r"list.*_split_to_blocks"):
        mapper.interactions_from_transformed_grads(X, Batch(X, Y), "up")
    with pytest.raises(BlockMismatch, match=r"'all'.*input_size is 3, but a vector has 2 numbers"):
        mapper.interactions_from_transformed_grads({"all": cut(X, 1, slice(2))}, Batch(X, Y), "up")


def test_rows_of_lists_are_counted():
    with pytest.raises(BatchMismatch, match="x has 7, y has 6"):
        Batch(X, Y[1:])
