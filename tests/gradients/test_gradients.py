"""Claims about the gradient algebra: every verb of every kind is its dense meaning, in NumPy and in torch."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headwater.arrays import add_product, to_numpy, working_memory
from headwater.blocks import Block, Layout, Parameter, Part, Piece
from headwater.errors import ShapeMismatch
from headwater.gradients.algebra import Dense, Sum, draws_second_moment
from headwater.gradients.block import BlockGradient, stack
from headwater.gradients.outer import Outer, RowSparse
from headwater.testing import GradientContract

FRAMEWORKS = {"numpy": np.asarray, "torch": torch.as_tensor}
frameworks = pytest.mark.parametrize("array", FRAMEWORKS.values(), ids=FRAMEWORKS)


def normal(*shape, seed=0):
    return np.random.default_rng((seed, *shape)).standard_normal(shape)


def bordered(a):
    return np.concatenate([a, np.ones((*a.shape[:2], 1))], axis=2)


def outer(array, n, t, o, i, ones=False, seed=0):
    """The value and its meaning; with `ones` one of the i inputs is the one."""
    a, b = normal(n, t, i - ones, seed=seed), normal(n, t, o, seed=seed + 1)
    full = bordered(a) if ones else a
    return Outer(array(a), array(b), ones), np.einsum("nto,nti->noi", b, full)


def row_sparse(array, n, t, o, i, seed=0):
    """Few table rows and many positions: ids repeat within a row."""
    ids, values = np.random.default_rng(seed).integers(0, o, size=(n, t)), normal(n, t, i, seed=seed)
    return RowSparse(array(ids), array(values), o), np.einsum("nto,nti->noi", np.eye(o)[ids], values)


def dense(array, n, t, o, i, seed=0):
    values = normal(n, o, i, seed=seed)
    return Dense(array(values)), values


def outer_with_ones(array, n, t, o, i, seed=0):
    return outer(array, n, t, o, i, i > 1, seed)


def tied(array, n, t, o, i, seed=0):
    """A table that is looked up and multiplied by: rows of it, outer products and dense terms."""
    terms = [
        row_sparse(array, n, t, o, i, seed),
        outer(array, n, t + 1, o, i, False, seed),
        dense(array, n, t, o, i, seed),
    ]
    return Sum(tuple(value for value, _ in terms)), sum(meaning for _, meaning in terms)


KINDS = {"outer": outer, "outer with ones": outer_with_ones, "row-sparse": row_sparse, "dense": dense, "tied": tied}


@dataclass
class Case(GradientContract):
    """One kind of gradient of one size; partners are all kinds, with other numbers of rows and positions."""

    kind: str = "outer"
    array: object = np.asarray
    n: int = 4
    t: int = 1
    o: int = 3
    i: int = 5
    seed: int = 0

    def _made(self):
        return KINDS[self.kind](self.array, self.n, self.t, self.o, self.i, seed=self.seed)

    def value(self):
        return self._made()[0]

    def meaning(self):
        return self._made()[1]

    def partners(self):
        sizes = [(1, 1), (self.n + 1, self.t + 2)]
        return [make(self.array, n, t, self.o, self.i, seed=self.seed + 9) for make in KINDS.values() for n, t in sizes]


SIZES = {
    "one position": {"t": 1},
    "few positions": {"t": 3, "o": 6, "i": 7},
    "more positions than numbers": {"t": 40, "o": 3, "i": 4},
    "one input": {"t": 2, "i": 1},
    "one output": {"t": 2, "o": 1},
    "one row": {"n": 1, "t": 2},
}


@frameworks
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
class TestGradients(GradientContract):
    @pytest.fixture(autouse=True)
    def _which(self, kind, array, size):
        self.case = Case(kind, array, **size)
        self.array = array

    def value(self):
        return self.case.value()

    def meaning(self):
        return self.case.meaning()

    def partners(self):
        return self.case.partners()


@frameworks
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=10)
@given(
    n=st.integers(1, 6),
    t=st.integers(1, 12),
    o=st.integers(1, 8),
    i=st.integers(1, 8),
    memory=st.integers(1, 4000),
    seed=st.integers(0, 99),
)
def test_every_verb_is_its_dense_meaning_for_any_shape_and_any_memory(kind, array, n, t, o, i, memory, seed):
    case = Case(kind, array, n, t, o, i, seed)
    case.memory = (memory,)
    case.check()


# Routes that the cost formulas choose ---------------------------------------------------------------------------------


@frameworks
@pytest.mark.parametrize("ones", [False, True])
@pytest.mark.parametrize("t, s", [(1, 1), (2, 3), (1, 50), (50, 50)])
def test_the_ghost_form_and_dense_gradients_give_the_same_pairs(array, t, s, ones):
    """The route that is not taken by itself is asked for by name."""
    (left, mine), (right, theirs) = outer(array, 5, t, 4, 6, ones), outer(array, 3, s, 4, 6, not ones, seed=3)
    expected = np.einsum("noi,moi->nm", mine, theirs)
    for got in (left._ghost_inner(right), left.project(right.dense()), left.inner(right)):
        np.testing.assert_allclose(to_numpy(got), expected, rtol=0, atol=1e-12 * np.abs(expected).max())
    assert left._ghost_is_cheaper(right) == (t * s < 6)


@frameworks
@pytest.mark.parametrize("t", [1, 3])
@pytest.mark.parametrize("weighted", [False, True])
def test_several_draws_of_the_same_rows_sum_their_second_moments(array, t, weighted):
    """Draws that share their inputs take one product at one position; those that do not, one each."""
    a, weights = array(normal(6, t, 4)), array(normal(6, seed=5) ** 2) if weighted else None
    left, right = array(normal(3, 3)), array(normal(5, 5))
    shared = [Outer(a, array(normal(6, t, 3, seed=k)), ones=True) for k in range(3)]
    apart = [Outer(array(to_numpy(draw.a).copy()), draw.b, ones=True) for draw in shared]
    turned = [np.einsum("po,noi,qi->npq", to_numpy(left), to_numpy(d.dense()), to_numpy(right)) for d in shared]
    each = to_numpy(weights) if weighted else np.ones(6)
    expected = sum(np.einsum("npq,n->pq", draw**2, each) for draw in turned)
    for draws in (shared, apart, [shared[0], apart[1], Dense(shared[2].dense())]):
        got = draws_second_moment(draws, weights, left, right)
        np.testing.assert_allclose(to_numpy(got), expected, rtol=0, atol=1e-12 * np.abs(expected).max())


@frameworks
@pytest.mark.parametrize("ones", [False, True])
def test_outer_products_count_rows_and_positions_in_their_moments(array, ones):
    value, _ = outer(array, 5, 3, 2, 4, ones)
    a, b = bordered(to_numpy(value.a)) if ones else to_numpy(value.a), to_numpy(value.b)
    moments, again = value.moments(), value.moments(again=True)
    np.testing.assert_allclose(to_numpy(moments.left), np.einsum("nto,ntp->op", b, b), rtol=1e-13)
    np.testing.assert_allclose(to_numpy(moments.right), np.einsum("nti,ntj->ij", a, a), rtol=1e-12, atol=1e-13)
    assert (moments.left_count, moments.right_count) == (5, 15)
    both = moments + again  # another draw of the same rows: twice the output-gradients, the same rows and inputs
    np.testing.assert_allclose(to_numpy(both.left), 2 * to_numpy(moments.left), rtol=1e-13)
    np.testing.assert_array_equal(to_numpy(both.right), to_numpy(moments.right))
    assert (both.left_count, both.right_count) == (5, 15)


@frameworks
def test_the_moments_of_a_table_are_frequencies_of_ids_and_products_of_values(array):
    value, _ = row_sparse(array, 5, 3, 4, 2)
    moments, again = value.moments(), value.moments(again=True)
    values = to_numpy(value.values).reshape(-1, 2)
    np.testing.assert_array_equal(to_numpy(moments.left), np.bincount(to_numpy(value.ids).ravel(), minlength=4))
    np.testing.assert_allclose(to_numpy(moments.right), values.T @ values, rtol=1e-13)
    assert (moments.left_count, moments.right_count) == (15, 5)
    both = moments + again
    np.testing.assert_array_equal(to_numpy(both.left), to_numpy(moments.left))
    np.testing.assert_allclose(to_numpy(both.right), 2 * values.T @ values, rtol=1e-13)
    assert (both.left_count, both.right_count) == (15, 5)


@frameworks
@pytest.mark.parametrize("o, i", [(1, 5), (4, 1)])
def test_dense_moments_are_exact_where_one_side_is_a_number(array, o, i):
    value, meaning = dense(array, 6, 1, o, i)
    moments = value.moments()
    got = np.kron(to_numpy(moments.left) / moments.left_count, to_numpy(moments.right) / float(moments.right_count))
    flat = meaning.reshape(6, -1)
    np.testing.assert_allclose(got, flat.T @ flat / 6, rtol=0, atol=1e-13)


@frameworks
@pytest.mark.parametrize("size", [127, 128, 130, 515])
def test_a_gram_matrix_built_from_its_lower_half_is_the_whole_product(array, size):
    rows = normal(20, size)
    total = normal(size, size)
    got = add_product(array(total.copy()), array(rows), array(rows))  # two arrays: the plain product
    given = array(rows)
    for found in (got, add_product(array(total.copy()), given, given)):
        np.testing.assert_allclose(to_numpy(found), total + rows.T @ rows, rtol=0, atol=1e-10)
    np.testing.assert_allclose(to_numpy(add_product(None, given, given)), rows.T @ rows, rtol=0, atol=1e-10)


@frameworks
def test_gradients_of_the_same_matrix_are_joined_into_more_positions(array):
    for ones, others in [(False, False), (True, True), (True, False), (False, True)]:
        (first, mine), (second, theirs) = outer(array, 4, 2, 3, 5, ones), outer(array, 4, 3, 3, 5, others, seed=4)
        joined = first.join(second)
        assert joined.positions == 5
        np.testing.assert_allclose(to_numpy(joined.dense()), mine + theirs, rtol=0, atol=1e-13)
    (first, mine), (second, theirs) = row_sparse(array, 4, 2, 3, 5), row_sparse(array, 4, 3, 3, 5, seed=4)
    np.testing.assert_allclose(to_numpy(first.join(second).dense()), mine + theirs, rtol=0, atol=1e-13)


# Blocks: parts side by side -------------------------------------------------------------------------------------------

GROUPED = Layout(
    Block(
        "block",
        (
            Parameter("norm.weight", (4,)),
            Parameter("conv.weight", (4, 3, 1)),  # two groups of two output channels
            Parameter("conv.bias", (4,)),
            Parameter("norm.bias", (4,)),
            Parameter("table", (5, 2)),
        ),
    ),
    (
        Part(Piece("table", 0, (5, 2))),
        Part(Piece("conv.weight", 0, (2, 3)), Piece("conv.bias", 0, (2, 1))),
        Part(Piece("conv.weight", 6, (2, 3)), Piece("conv.bias", 2, (2, 1))),
        Part(Piece("norm.weight", 0, (4, 1)), Piece("norm.bias", 0, (4, 1)), below=True),
    ),
)
"""A block whose flat order is not the order of its parts: bias columns, groups, and a bias below its weight."""


def grouped(array, n, t=2, seed=0):
    """A value of GROUPED, and its flat meaning, put together by hand."""
    table, tables = row_sparse(array, n, t, 5, 2, seed)
    first, firsts = outer(array, n, t, 2, 4, True, seed)
    second, seconds = outer(array, n, 1, 2, 4, True, seed + 20)
    affine, affines = dense(array, n, 1, 8, 1, seed)
    flat = np.concatenate(
        [
            affines[:, :4, 0],
            firsts[:, :, :3].reshape(n, 6),
            seconds[:, :, :3].reshape(n, 6),
            firsts[:, :, 3],
            seconds[:, :, 3],
            affines[:, 4:, 0],
            tables.reshape(n, 10),
        ],
        axis=1,
    )
    return BlockGradient(GROUPED, (table, first, second, affine)), flat


@frameworks
def test_flat_vectors_are_in_the_order_of_the_parameters_and_back(array):
    value, flat = grouped(array, 5)
    np.testing.assert_allclose(to_numpy(value.flat()), flat, rtol=0, atol=1e-14)
    again = BlockGradient.from_flat(GROUPED, array(flat))
    assert [part.shape for part in again.parts] == [part.shape for part in GROUPED.parts]
    np.testing.assert_array_equal(to_numpy(again.flat()), flat)
    for mine, theirs in zip(value.parts, again.parts, strict=True):
        np.testing.assert_allclose(to_numpy(mine.dense()), to_numpy(theirs.dense()), rtol=0, atol=1e-14)


@frameworks
@pytest.mark.parametrize("memory", [2**26, 1])
def test_the_verbs_of_a_block_are_those_of_its_flat_vectors(array, memory):
    (value, flat), (other, others) = grouped(array, 5), grouped(array, 3, t=1, seed=1)
    basis, weights, each = normal(40, GROUPED.size), normal(2, 5), normal(5, seed=2)
    index = np.array([3, 0, 3])
    with working_memory(memory):
        for got, expected in [
            (value.inner(other), flat @ others.T),
            (other.inner(value), others @ flat.T),
            (value.project(array(basis)), flat @ basis.T),
            (value.combine(array(weights)), weights @ flat),
            (value.squared_norms(), np.sum(flat**2, axis=1)),
            (value.weighted(array(each)).flat(), flat * each[:, None]),
            (value.take(array(index)).flat(), flat[index]),
            (value.take(slice(1, 4)).flat(), flat[1:4]),
            (np.concatenate([to_numpy(piece) for piece in value.flat_chunks()]), flat),
        ]:
            np.testing.assert_allclose(to_numpy(got), expected, rtol=0, atol=1e-12 * np.abs(expected).max())


@frameworks
def test_stacked_values_are_the_rows_under_one_another(array):
    """Of the same kind, with other numbers of positions, and with another kind."""
    (first, top), (second, middle), (third, bottom) = (
        grouped(array, n, t, seed=k) for k, (n, t) in enumerate([(4, 2), (1, 2), (3, 5)])
    )
    together = stack([first, second])
    assert [type(part) for part in together.parts] == [type(part) for part in first.parts]
    np.testing.assert_allclose(to_numpy(together.flat()), np.concatenate([top, middle]), rtol=0, atol=1e-14)
    plain = BlockGradient.from_flat(GROUPED, array(bottom))
    for other in (third, plain):
        got = to_numpy(stack([first, other, second]).flat())
        np.testing.assert_allclose(got, np.concatenate([top, bottom, middle]), rtol=0, atol=1e-14)


@frameworks
@pytest.mark.parametrize("change", [-1, 1, GROUPED.size])
def test_flat_vectors_of_another_length_are_refused(array, change):
    wrong = array(normal(2, GROUPED.size + change))
    for use in (GROUPED.split, lambda flat: BlockGradient.from_flat(GROUPED, flat), grouped(array, 2)[0].project):
        with pytest.raises(ShapeMismatch, match=rf"{GROUPED.size}.*{GROUPED.size + change}"):
            use(wrong)


def test_parts_that_do_not_hold_all_numbers_of_the_block_are_refused():
    with pytest.raises(ShapeMismatch, match=r"'block'.*18.*34"):
        Layout(GROUPED.block, GROUPED.parts[:2])
