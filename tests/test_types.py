"""Claims about the contract's types, kept by a third party's backend that fills only abstract methods and hooks.

The backend is linear regression in plain NumPy, f(x) = W x + b with loss |f(x) - y|^2 / 2; its blocks are W and b.
"""

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import pytest

from headwater.errors import BatchMismatch, InvalidInput, ShapeMismatch, UnsupportedInfluenceModeError
from headwater.testing import BlockMapperContract, GradientProviderContract, OperatorContract, RememberedGradients
from headwater.types import (
    Batch,
    BilinearForm,
    BlockMapper,
    GradientProvider,
    InfluenceMode,
    Operator,
    OperatorGradientComposition,
    split,
)

O, I, ROWS = 2, 3, 9  # noqa: E741
RNG = np.random.default_rng(0)
W, B = RNG.standard_normal((O, I)), RNG.standard_normal(O)
X, Y = RNG.standard_normal((ROWS, I)), RNG.standard_normal((ROWS, O))


class WeightGradients(GradientProvider):
    """d loss / dW = r x^T with r = W x + b - y; its derivative by x_j is W_.j x^T + r e_j^T."""

    def flat_grads(self, batch):
        return np.einsum("no,ni->noi", batch.x @ W.T + B - batch.y, batch.x).reshape(len(batch), O * I)

    def flat_mixed_grads(self, batch):
        residual = batch.x @ W.T + B - batch.y
        mixed = np.einsum("oj,ni->njoi", W, batch.x) + np.einsum("no,ij->njoi", residual, np.eye(I))
        return mixed.reshape(len(batch), I, O * I)

    def jacobian_prod(self, batch, g):
        residual = batch.x @ W.T + B - batch.y
        return np.einsum("no,koi,ni->nk", residual, g.reshape(-1, O, I), batch.x)


class BiasGradients(GradientProvider):
    def flat_grads(self, batch):
        return batch.x @ W.T + B - batch.y

    def flat_mixed_grads(self, batch):
        return np.broadcast_to(W.T, (len(batch), I, O))

    def jacobian_prod(self, batch, g):
        return self.flat_grads(batch) @ g.T


class DampedInverse(Operator):
    """(C + damping I)^-1 for a matrix C."""

    def __init__(self, curvature, damping):
        self.matrix = np.linalg.inv(curvature + damping * np.eye(len(curvature)))

    @property
    def input_size(self):
        return len(self.matrix)

    def _apply(self, tensor):
        return tensor @ self.matrix.T


class PlainMapper(BlockMapper):
    pass


def curvature(grads):
    return grads.T @ grads / len(grads)


def compositions(provider_of, damping=0.1):
    """Damping of the size of the spectrum: a tenth of the mean eigenvalue."""
    blocks = OrderedDict()
    for name, provider in provider_of.items():
        matrix = curvature(provider.flat_grads(Batch(X, Y)))
        operator = DampedInverse(matrix, damping * np.trace(matrix) / len(matrix))
        blocks[name] = OperatorGradientComposition(operator, provider)
    return blocks


def by_differences(function, x, step=1e-4):
    """Derivatives by the input, exact for quadratics but for rounding: (N, D) to (N, I, D)."""
    steps = step * np.eye(I)
    return np.stack([(function(x + e) - function(x - e)) / (2 * step) for e in steps], axis=1)


class TestWeightGradients(GradientProviderContract):
    rounding = 1e5  # the truth is a difference quotient
    rows = ROWS
    provider_type = WeightGradients

    def provider(self):
        return self.provider_type()

    def batch(self, index):
        return Batch(X[list(index)], Y[list(index)])

    def slow_grads(self):
        return np.array([np.outer(W @ x + B - y, x).ravel() for x, y in zip(X, Y, strict=True)])

    def slow_mixed_grads(self):
        return by_differences(lambda x: self.provider_type().flat_grads(Batch(x, Y)), X)


class TestBiasGradients(TestWeightGradients):
    provider_type = BiasGradients

    def slow_grads(self):
        return np.array([W @ x + B - y for x, y in zip(X, Y, strict=True)])


class TestDampedInverse(OperatorContract):
    def operator(self):
        return DampedInverse(np.diag([1.0, 2.0, 4.0]) + 0.1, 0.5)

    def matrix(self):
        return np.linalg.inv(np.diag([1.5, 2.5, 4.5]) + 0.1)


class TestPlainMapper(BlockMapperContract):
    def mapper(self):
        return PlainMapper(compositions({"weight": WeightGradients(), "bias": BiasGradients()}))

    def left(self):
        return Batch(X[:6], Y[:6])

    def right(self):
        return Batch(X[6:8], Y[6:8])


# An array type that no namespace knows, through the hooks alone -------------------------------------------------------


@dataclass(frozen=True)
class Exact:
    """Rows of whole numbers; nothing but a shape, a slice of columns, and the numbers."""

    numbers: tuple

    @property
    def shape(self):
        return len(self.numbers), len(self.numbers[0])


class ExactScale(Operator):
    """Every number times its position, counted from one."""

    def __init__(self, size):
        self.size = size

    @property
    def input_size(self):
        return self.size

    def _validate_tensor_input(self, tensor):
        if not isinstance(tensor, Exact):
            raise InvalidInput(f"Exact numbers are needed, not {tensor!r}.")

    def _apply(self, tensor):
        return Exact(tuple(tuple((k + 1) * n for k, n in enumerate(row)) for row in tensor.numbers))


class ExactComposition(OperatorGradientComposition):
    def _tensor_inner_product(self, left, right):
        pairs = [[sum(a * b for a, b in zip(u, v, strict=True)) for v in right.numbers] for u in left.numbers]
        return Exact(tuple(map(tuple, pairs)))


class ExactMapper(BlockMapper):
    def _split_to_blocks(self, z, dim=-1):
        pieces, start = OrderedDict(), 0
        for name, block in self.composable_block_dict.items():
            stop = start + block.op.input_size
            pieces[name] = Exact(tuple(row[start:stop] for row in z.numbers))
            start = stop
        return pieces


class ExactColumns(RememberedGradients):
    """A batch's x are its gradients; this block's are some of the columns."""

    def __init__(self, start, stop):
        self.columns = slice(start, stop)

    def flat_grads(self, batch):
        return Exact(tuple(row[self.columns] for row in batch.x.numbers))

    flat_mixed_grads = flat_grads


def test_an_array_type_of_ones_own_runs_in_full_through_the_hooks():
    blocks = {
        "first": ExactComposition(ExactScale(2), ExactColumns(0, 2)),
        "last": ExactComposition(ExactScale(1), ExactColumns(2, 3)),
    }
    mapper = ExactMapper(blocks)
    left, right = (Batch(Exact(rows), [0] * len(rows)) for rows in (((1, 2, 3), (0, 1, 10**30)), ((5, 7, 11),)))
    factors = mapper.transformed_grads(left)
    assert factors["first"].numbers == ((1, 4), (0, 2))
    expected = {"first": ((5 + 28,), (14,)), "last": ((33,), (11 * 10**30,))}
    whole = Exact(tuple(a + b for a, b in zip(factors["first"].numbers, factors["last"].numbers, strict=True)))
    for mode in ("up", "perturbation"):
        for got in (
            mapper.interactions(left, right, mode),
            mapper.interactions_from_transformed_grads(factors, right, mode),
            mapper.interactions_from_transformed_grads(whole, right, mode),
        ):
            assert {name: value.numbers for name, value in got.items()} == expected
    with pytest.raises(ShapeMismatch, match=r"ExactScale has input_size 2.*3 entries"):
        ExactScale(2).apply(left.x)
    with pytest.raises(InvalidInput, match="Exact numbers"):
        ExactScale(2).apply([1, 2])


# What is abstract, and what is not ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, missing",
    [
        (GradientProvider, {"flat_grads", "flat_mixed_grads", "jacobian_prod"}),
        (BilinearForm, {"inner_prod"}),
        (Operator, {"input_size", "_apply"}),
    ],
)
def test_what_a_third_party_must_fill_is_abstract(kind, missing):
    assert kind.__abstractmethods__ == missing
    with pytest.raises(TypeError, match="abstract"):
        kind()


def test_a_composition_that_can_be_made_serves_arrays_of_any_framework():
    torch = pytest.importorskip("torch")
    block = OperatorGradientComposition(DampedInverse(np.diag([1.0, 2.0]), 1.0), RememberedGradients())
    grads, mixed = RNG.standard_normal((4, 2)), RNG.standard_normal((4, 3, 2))
    for mode, expected in [("up", grads @ grads.T), ("perturbation", np.einsum("nd,mxd->nmx", grads, mixed))]:
        got = block.interactions_from_transformed_grads(
            torch.as_tensor(grads), Batch(*map(torch.as_tensor, (grads, mixed))), mode
        )
        np.testing.assert_allclose(got.numpy(), expected, rtol=1e-13, atol=1e-14)


# Modes ----------------------------------------------------------------------------------------------------------------


def test_modes_are_their_strings():
    assert [mode.value for mode in InfluenceMode] == ["up", "perturbation"]
    assert InfluenceMode("up") is InfluenceMode.Up == "up"
    assert InfluenceMode("perturbation") is InfluenceMode.Perturbation == "perturbation"
    assert InfluenceMode(InfluenceMode.Up) is InfluenceMode.Up


@pytest.mark.parametrize("wrong", ["Up", "UP", "", "down", None, 0, ["up"]])
def test_any_other_mode_is_refused_by_its_name(wrong):
    with pytest.raises(UnsupportedInfluenceModeError) as refused:
        InfluenceMode(wrong)
    assert repr(wrong) in str(refused.value)
    assert "'up'" in str(refused.value) and "'perturbation'" in str(refused.value)
    assert isinstance(refused.value, ValueError)
    block = OperatorGradientComposition(DampedInverse(np.eye(6), 1.0), WeightGradients())
    with pytest.raises(ValueError, match="mode is"):
        block.interactions(Batch(X, Y), None, wrong)


# Batches --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "x",
    [X, (X, Y[:, 0]), {"ids": np.zeros((ROWS, 5), dtype=int), "mask": np.ones(ROWS)}, {"a": {"b": X}}, [[1, 2]] * ROWS],
    ids=["array", "tuple", "dict", "nested", "lists"],
)
def test_a_batch_has_as_many_rows_as_each_of_its_pieces(x):
    assert len(Batch(x, Y)) == ROWS
    assert len(Batch(x, None)) == ROWS
    with pytest.raises(BatchMismatch, match=rf"{ROWS}.*{ROWS - 1}"):
        Batch(x, Y[1:])


@pytest.mark.parametrize("x", [(X, Y[1:]), {"a": X, "b": Y[1:]}])
def test_pieces_of_x_that_disagree_are_refused(x):
    with pytest.raises(BatchMismatch, match=f"x has {ROWS} / {ROWS - 1}"):
        Batch(x, Y)


def test_a_subclass_carries_more_columns():
    @dataclass(frozen=True, eq=False)
    class Weighted(Batch):
        weights: object = None

        def _columns(self):
            return super()._columns() | {"weights": self.weights}

    assert len(Weighted(X, Y)) == len(Weighted(X, Y, np.ones(ROWS))) == ROWS
    with pytest.raises(BatchMismatch, match="weights has 2"):
        Weighted(X, Y, np.ones(2))


@pytest.mark.parametrize("y", [np.float64(1.0), np.array(3), 2.5])
def test_a_piece_without_rows_is_refused(y):
    with pytest.raises(BatchMismatch, match="y has no batch dimension"):
        Batch(X, y)


def test_a_batch_of_nothing_is_refused():
    with pytest.raises(BatchMismatch, match="nothing"):
        Batch(None, None)


def test_a_batch_cannot_be_changed():
    with pytest.raises(AttributeError):
        Batch(X, Y).x = Y


# Splitting ------------------------------------------------------------------------------------------------------------


def test_pieces_are_views_in_order_along_any_axis():
    z = RNG.standard_normal((4, 6, 6))
    for dim in (1, 2, -1, -2):
        pieces = split(z, OrderedDict(b=4, a=2), dim)
        assert [*pieces] == ["b", "a"]
        np.testing.assert_array_equal(np.concatenate([*pieces.values()], axis=dim), z)
        assert all(np.shares_memory(piece, z) for piece in pieces.values())


@pytest.mark.parametrize("dim", [0, 3, -4])
def test_an_axis_that_is_missing_or_of_another_length_is_refused(dim):
    with pytest.raises(ValueError, match=r"6 entries along axis.*\(4, 6, 6\)"):
        split(np.zeros((4, 6, 6)), {"b": 4, "a": 2}, dim)
