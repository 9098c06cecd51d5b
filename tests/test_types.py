"""Claims about the contract's types, kept by a third party's backend that fills only abstract methods and hooks.

The backend is linear regression in plain NumPy, f(x) = W x + b with loss |f(x) - y|^2 / 2; its blocks are W and b.
"""

import os
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from headwater import types
from headwater.errors import (
    BatchMismatch,
    BlockMismatch,
    InvalidInput,
    ShapeMismatch,
    UnsupportedInfluenceModeError,
    UnsupportedInfluenceModeException,
)
from headwater.testing import BlockMapperContract, GradientProviderContract, OperatorContract, RememberedGradients
from headwater.types import (
    Batch,
    BatchType,
    BilinearForm,
    BilinearFormType,
    BlockMapper,
    DataLoaderType,
    GradientProvider,
    GradientProviderType,
    InfluenceMode,
    Operator,
    OperatorBilinearForm,
    OperatorGradientComposition,
    OperatorGradientCompositionType,
    OperatorType,
    TensorType,
    split,
)

ROOT = Path(__file__).parents[1]

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


# Forms, and the mapper's blocks ---------------------------------------------------------------------------------------


class FormAlone(Operator):
    """Known by its form alone: it cannot be applied."""

    input_size = O * I

    def _apply(self, tensor):
        raise AssertionError("an operator that is known by its form was applied")

    def as_bilinear_form(self):
        return Signs()


class Signs(BilinearForm):
    """The sum of the products of signs."""

    def inner_prod(self, left, right):
        assert right is not None, "no right side reached inner_prod"
        return np.einsum("nd,m...d->nm...", np.sign(left), np.sign(right))


class Batches(Signs):
    """Looks at batches, not at gradients."""

    def grads_inner_prod(self, left, right, gradient_provider):
        return gradient_provider, len(left), right

    def mixed_grads_inner_prod(self, left, right, gradient_provider):
        return "mixed", len(left), right


def test_an_operator_that_is_known_by_its_form_alone_is_obeyed():
    provider, left, right = WeightGradients(), Batch(X[:6], Y[:6]), Batch(X[6:], Y[6:])
    block = OperatorGradientComposition(FormAlone(), provider)
    signs = {rows: np.sign(provider.flat_grads(rows)) for rows in (left, right)}
    mixed = np.sign(provider.flat_mixed_grads(right))
    np.testing.assert_array_equal(block.interactions(left, right, "up"), signs[left] @ signs[right].T)
    np.testing.assert_array_equal(block.interactions(left, None, "up"), signs[left] @ signs[left].T)
    got = PlainMapper(OrderedDict(one=block)).interactions(left, right, "perturbation")["one"]
    np.testing.assert_array_equal(got, np.einsum("nd,mxd->nmx", signs[left], mixed))


def test_a_form_is_asked_with_the_batches_as_they_came():
    class Asked(FormAlone):
        def as_bilinear_form(self):
            return Batches()

    provider, left, right = WeightGradients(), Batch(X[:6], Y[:6]), Batch(X[6:], Y[6:])
    block = OperatorGradientComposition(Asked(), provider)
    assert block.interactions(left, None, "up") == (provider, 6, None)
    assert block.interactions(left, right, "up") == (provider, 6, right)
    assert block.interactions(left, None, "perturbation") == ("mixed", 6, None)


def test_only_an_operators_own_plain_form_is_its_default():
    class Inherited(OperatorBilinearForm):
        pass

    first, second = (DampedInverse(np.eye(2), 1.0) for _ in range(2))
    assert first.as_bilinear_form().is_default_of(first)
    assert not first.as_bilinear_form().is_default_of(second)
    assert not Inherited(first).is_default_of(first)
    assert not Signs().is_default_of(first)


def test_the_blocks_are_kept_as_they_were_given():
    given = compositions({"weight": WeightGradients(), "bias": BiasGradients()})
    mapper, left, right = PlainMapper(given), Batch(X[:6], Y[:6]), Batch(X[6:], Y[6:])
    assert mapper.composable_block_dict is given
    before = [*mapper.generate_interactions(left, right, "up")]
    given.move_to_end("weight")
    assert [*mapper.interactions(left, right, "up")] == ["bias", "weight"]
    for one, other in zip(mapper.generate_interactions(left, right, "up"), reversed(before), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_generator_of_tensors_may_be_overridden():
    class Doubled(PlainMapper):
        def generate_interactions(self, left_batch, right_batch, mode):
            for tensor in super().generate_interactions(left_batch, right_batch, mode):
                yield 2 * tensor

    class Short(PlainMapper):
        def generate_transformed_grads(self, batch):
            yield next(super().generate_transformed_grads(batch))

    blocks, rows = compositions({"weight": WeightGradients(), "bias": BiasGradients()}), Batch(X, Y)
    for name, value in Doubled(blocks).interactions(rows, rows, "up").items():
        np.testing.assert_array_equal(value, 2 * blocks[name].interactions(rows, rows, "up"))
    with pytest.raises(BlockMismatch, match=r"Short gave 1 tensors for blocks \['weight', 'bias'\]"):
        Short(blocks).transformed_grads(rows)


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


# Typed code that was written for the original names -------------------------------------------------------------------


def test_type_parameters_are_those_of_the_original_interface_in_its_order():
    parameters = {
        Batch: [TensorType],
        GradientProvider: [BatchType, TensorType],
        BilinearForm: [TensorType, BatchType, GradientProviderType],
        Operator: [TensorType, BilinearFormType],
        OperatorGradientComposition: [TensorType, BatchType, OperatorType, GradientProviderType],
        BlockMapper: [TensorType, BatchType, OperatorGradientCompositionType],
    }
    for generic, expected in parameters.items():
        assert generic.__parameters__ == tuple(expected)
        assert generic[tuple(expected)].__origin__ is generic
    assert DataLoaderType.__bound__ is Iterable
    assert UnsupportedInfluenceModeException is UnsupportedInfluenceModeError is types.UnsupportedInfluenceModeException


def test_subclasses_may_subscript_stay_generic_or_leave_the_parameters_out():
    class Form(BilinearForm[np.ndarray, Batch[np.ndarray], WeightGradients]):
        def inner_prod(self, left, right):
            return left @ right.T

    class Typed(Operator[np.ndarray, "Form"]):
        input_size = 6

        def _apply(self, tensor):
            return tensor

        def as_bilinear_form(self):
            return Form()

    class Generic(OperatorGradientComposition[TensorType, BatchType, OperatorType, GradientProviderType]):
        pass

    class Bound(BlockMapper[np.ndarray, Batch, Generic[np.ndarray, Batch, Typed, WeightGradients]]):
        pass

    rows, grads = Batch(X, Y), WeightGradients().flat_grads(Batch(X, Y))
    mapper = Bound(OrderedDict(all=Generic(Typed(), WeightGradients())))
    np.testing.assert_array_equal(mapper.interactions(rows, None, "up")["all"], grads @ grads.T)


TYPED = """
from typing import Union

class Narrow(RidgeMapper):
    def generate_interactions(
        self, left_batch: ArrayBatch, right_batch: Optional[ArrayBatch], mode: InfluenceMode
    ) -> Generator[Array, None, None]:
        yield from super().generate_interactions(left_batch, right_batch, mode)

    def interactions_from_transformed_grads(
        self, left_factors: Union[Array, OrderedDict[str, Array]], right_batch: ArrayBatch, mode: InfluenceMode
    ) -> OrderedDict[str, Array]:
        found = self.generate_interactions_from_transformed_grads(left_factors, right_batch, mode)
        return self._to_ordered_dict(found)

class Whole(RidgeBlock):
    def interactions(
        self, left_batch: ArrayBatch, right_batch: Optional[ArrayBatch], mode: InfluenceMode
    ) -> Array:
        return self.op.as_bilinear_form().grads_inner_prod(left_batch, right_batch, self.gp)

def of_string(block: RidgeBlock, rows: ArrayBatch) -> Array:
    return block.interactions(rows, None, "up")
"""


@pytest.mark.slow
def test_typed_subclasses_of_the_page_pass_a_strict_checker(tmp_path):
    """Those written for pyDVL's names, overrides with the original's narrower arguments included."""
    page = (ROOT / "docs" / "coming-from-pydvl.md").read_text()
    (tmp_path / "page.py").write_text(page.partition("```python\n")[2].partition("```")[0] + TYPED)
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--ignore-missing-imports"]
    environment = os.environ | {"MYPYPATH": str(ROOT / "src")}
    done = subprocess.run([*command, "page.py"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


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
