"""Projections and the operators that act through them: linear maps, the same for every kind of gradient, in NumPy."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest

from headwater.arrays import working_memory
from headwater.blocks import Block, Layout, Parameter, Part, Piece
from headwater.errors import InvalidSetting, SingularOperator
from headwater.gradients.algebra import Dense, Gradient, Sum
from headwater.gradients.block import BlockGradient
from headwater.gradients.outer import Outer, RowSparse
from headwater.methods.projected import LoGra
from headwater.operators import projection
from headwater.operators.projected import MomentOperator, ProjectedOperator
from headwater.operators.projection import (
    KroneckerProjection,
    LowRankProjection,
    Projection,
    RandomProjection,
    column_streams,
    gaussian_side,
    mixing,
    row_streams,
    sparse_side,
)
from headwater.testing import LinearOperatorContract

WEIGHT, BIAS = Parameter("fc.weight", (40, 5)), Parameter("fc.bias", (40,))
TABLE, SCALE, SHIFT = Parameter("table.weight", (6, 4)), Parameter("norm.weight", (3,)), Parameter("norm.bias", (3,))
LINEAR = Part(Piece(WEIGHT.name, 0, (40, 5)), Piece(BIAS.name, 0, (40, 1)))
EMBEDDING = Part(Piece(TABLE.name, 0, (6, 4)))
NORM = Part(Piece(SCALE.name, 0, (3, 1)), Piece(SHIFT.name, 0, (3, 1)), below=True)
WHOLE = Layout(Block("whole", (WEIGHT, BIAS, TABLE, SCALE, SHIFT)), (LINEAR, EMBEDDING, NORM))
LIKE = np.zeros(1)


def sides(layout: Layout) -> list[tuple[np.ndarray | None, np.ndarray | None]]:
    return [
        (gaussian_side(row_streams(part), 3, seed=0), sparse_side(column_streams(part), 2, 3, seed=0))
        for part in layout.parts
    ]


PROJECTIONS: dict[str, Callable[[], Projection]] = {
    "mixed": lambda: RandomProjection(WHOLE, 11, seed=0, like=LIKE),
    "dense": lambda: RandomProjection(WHOLE, 11, seed=0, like=LIKE, dense=True),
    "kronecker": lambda: KroneckerProjection(WHOLE, sides(WHOLE)),
    "low rank": lambda: LowRankProjection(WHOLE, sides(WHOLE), 2),
}


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng((seed, *shape)).standard_normal(shape)


def values(rows: int) -> list[BlockGradient]:
    """Blocks whose parts are of several kinds."""

    def outer(positions: int, ones: bool) -> Outer:
        return Outer(normal(rows, positions, 5 if ones else 6), normal(rows, positions, 40, seed=1), ones)

    ids = np.random.default_rng(0).integers(0, 6, (rows, 3))
    table = RowSparse(ids, normal(rows, 3, 4), 6)
    tied = Sum((table, Outer(normal(rows, 2, 4), normal(rows, 2, 6, seed=2))))
    norm = Dense(normal(rows, 6, 1))
    linear: list[Gradient] = [outer(1, True), outer(1, False), outer(3, True), Dense(normal(rows, 40, 6))]
    tables: list[Gradient] = [table, tied, table, Dense(normal(rows, 6, 4))]
    return [BlockGradient(WHOLE, (a, b, norm)) for a, b in zip(linear, tables, strict=True)]


@pytest.mark.parametrize("name", PROJECTIONS)
def test_gradients_of_every_kind_are_projected_as_their_flat_vectors_are(name: str) -> None:
    made = PROJECTIONS[name]()
    matrix = made.down(np.eye(WHOLE.size)).T
    assert matrix.shape == (made.small.size, WHOLE.size)
    for value in values(7):
        expected = value.flat() @ matrix.T
        np.testing.assert_allclose(made.apply_block(value).flat(), expected, atol=1e-12)
        with working_memory(1):
            np.testing.assert_allclose(PROJECTIONS[name]().apply_block(value).flat(), expected, atol=1e-12)


@pytest.mark.parametrize("name", PROJECTIONS)
def test_up_is_the_transposed_map(name: str) -> None:
    made = PROJECTIONS[name]()
    down = made.down(np.eye(WHOLE.size))
    np.testing.assert_allclose(made.up(np.eye(made.small.size)), down.T, atol=1e-14)
    assert made.up(normal(2, 3, made.small.size)).shape == (2, 3, WHOLE.size)


@pytest.mark.parametrize("name", ["mixed", "dense"])
def test_numbers_that_are_drawn_again_for_each_batch_are_the_numbers_that_were_held(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = [PROJECTIONS[name]().apply_block(value).flat() for value in values(4)]
    up = PROJECTIONS[name]().up(normal(2, 11))
    monkeypatch.setattr(projection, "HELD", 0)
    for memory in (1, 600, 2**20):
        with working_memory(memory):
            again = [PROJECTIONS[name]().apply_block(value).flat() for value in values(4)]
            np.testing.assert_allclose(again, held, atol=1e-12)
            np.testing.assert_allclose(PROJECTIONS[name]().up(normal(2, 11)), up, atol=1e-12)


@pytest.mark.parametrize("dense", [True, False])
def test_a_parameter_is_projected_alike_in_every_block(dense: bool) -> None:
    layouts = [
        Layout(Block("fc", (WEIGHT, BIAS)), (LINEAR,)),
        Layout(Block("table", (TABLE,)), (EMBEDDING,)),
        Layout(Block("scale", (SCALE,)), (Part(NORM.weight),)),
        Layout(Block("shift", (SHIFT,)), (Part(NORM.bias),)),
    ]
    alone = Layout(Block("w", (WEIGHT,)), (Part(LINEAR.weight),)), Layout(Block("b", (BIAS,)), (Part(LINEAR.bias),))
    grouped = tuple(Part(Piece(WEIGHT.name, 100 * k, (20, 5))) for k in range(2))

    def matrix(layout: Layout) -> np.ndarray:
        return RandomProjection(layout, 9, seed=3, like=LIKE, dense=dense).down(np.eye(layout.size))

    whole = matrix(WHOLE)
    np.testing.assert_array_equal(np.concatenate([matrix(layout) for layout in layouts]), whole)
    np.testing.assert_array_equal(np.concatenate([matrix(layout) for layout in alone]), matrix(layouts[0]))
    np.testing.assert_array_equal(matrix(Layout(Block("groups", (WEIGHT,)), grouped)), matrix(alone[0]))


@pytest.mark.parametrize("dense", [True, False])
def test_more_numbers_leave_the_first_ones_as_they_were(dense: bool) -> None:
    few, many = (
        RandomProjection(WHOLE, k, seed=0, like=LIKE, dense=dense).down(np.eye(WHOLE.size)) * k**0.5 for k in (5, 21)
    )
    np.testing.assert_allclose(few, many[:, :5])
    np.testing.assert_allclose(np.abs(many), 1.0)


def test_signs_are_shared_among_few_numbers_of_wide_layers_only() -> None:
    assert [mixing(o) for o in (1, 10, 31, 32, 64, 255, 256, 10**6)] == [1, 1, 1, 2, 4, 8, 16, 16]


@pytest.mark.parametrize("rows", [2, 16, 64])
@pytest.mark.parametrize("dense", [True, False])
def test_inner_products_are_kept_on_average_and_to_the_error_that_is_said(dense: bool, rows: int) -> None:
    """Two matrices that live in `rows` output rows of 64, which share signs four by four."""
    parameter, dimension, seeds = Parameter("wide.weight", (64, 3)), 32, 400
    layout = Layout(Block("wide", (parameter,)), (Part(Piece(parameter.name, 0, (64, 3))),))
    pair = np.zeros((2, 64, 3))
    pair[0, :rows], pair[1, :rows] = normal(rows, 3), normal(rows, 3) + 0.7 * normal(rows, 3, seed=1)
    flat = pair.reshape(2, -1)
    m = 1 if dense else 4
    found = []
    for seed in range(seeds):
        small = RandomProjection(layout, dimension, seed=seed, like=LIKE, dense=dense).down(flat)
        found.append(small[0] @ small[1])
    x, y = pair
    pairs = np.outer(x**2, y**2) + np.outer(x * y, x * y)
    np.fill_diagonal(pairs, 0.0)
    same = np.kron(np.eye(64), np.ones((3, 3))).astype(bool)
    expected = (pairs.sum() + (m - 1) * pairs[same].sum()) / dimension
    assert abs(np.mean(found) - flat[0] @ flat[1]) < 4 * (expected / seeds) ** 0.5
    assert abs(np.var(found) / expected - 1) < 5 * (2 / seeds) ** 0.5


@pytest.mark.parametrize("kind", ["gaussian", "sparse", "masked"])
def test_sides_keep_lengths_on_average(kind: str) -> None:
    streams, total = [("a", range(4, 9)), ("b", range(2))], np.zeros((7, 7))
    for seed in range(1500):
        if kind == "gaussian":
            side = gaussian_side(streams, 3, seed=seed)
        else:
            side = sparse_side(streams, 3, 5 if kind == "masked" else None, seed=seed)
        total += side.T @ side / 1500
        assert side.shape == (3, 7)
    np.testing.assert_allclose(total, np.eye(7), atol=0.15)


def test_a_sparse_side_has_one_sign_for_each_kept_coordinate() -> None:
    streams = [("a", range(50))]
    for size, mask, kept in ((8, None, 50), (8, 20, 20), (20, 20, 20), (30, 20, 20)):
        side = sparse_side(streams, size, mask, seed=0)
        assert side.shape == (min(size, kept), 50)
        assert (side != 0).sum(0).tolist().count(1) == kept == (side != 0).sum()
        np.testing.assert_allclose(np.abs(side[side != 0]), (50 / kept) ** 0.5)
    few, many = (sparse_side(streams, 50, mask, seed=0).any(0) for mask in (10, 20))
    assert (many[few]).all()


@pytest.mark.parametrize("size", [7, 8])
def test_a_side_that_is_no_larger_is_left_as_it_is(size: int) -> None:
    streams = [("a", range(6)), ("b", range(1))]
    assert gaussian_side(streams, size, seed=0) is None
    assert sparse_side(streams, size, None, seed=0) is None
    assert sparse_side(streams, size, 9, seed=0) is None


def test_what_is_seen_of_rows_is_projected_to_what_is_stored_of_them() -> None:
    made = PROJECTIONS["low rank"]()
    for value in values(5):
        stored, whole = made.stored(value), made.apply_block(value)
        np.testing.assert_allclose(made.apply_block(made.seen(value)).flat(), stored.flat(), atol=1e-11)
        for part, full in zip(stored.parts, whole.parts, strict=True):
            dense = full.dense()
            singular = np.linalg.svd(dense, compute_uv=False)
            lost = np.linalg.norm(dense - part.dense(), axis=(1, 2))
            np.testing.assert_allclose(lost, np.linalg.norm(singular[:, 2:], axis=1), atol=1e-11)


# Operators ------------------------------------------------------------------------------------------------------------


@cache
def core() -> np.ndarray:
    root = normal(40, 11) * np.linspace(0.1, 2.0, 11)
    return root.T @ root / 40


class TestProjectedOperator(LinearOperatorContract):
    """Not its inverse and mean eigenvalue, which are those of the core: claims of their own below."""

    dampings = ()

    @pytest.fixture(params=["mixed", "dense"], autouse=True)
    def choose(self, request: pytest.FixtureRequest) -> None:
        self.projection = PROJECTIONS[request.param]()

    def operator(self) -> ProjectedOperator:
        return ProjectedOperator(self.projection, MomentOperator(core()), rows=40)

    def matrix(self) -> np.ndarray:
        down = self.projection.down(np.eye(WHOLE.size))
        return down @ core() @ down.T

    def block_values(self) -> list[BlockGradient]:
        return values(3)

    def test_the_trace_is_the_sum_of_the_diagonal(self) -> None:
        """Of the core."""
        self.assert_same(self.operator().trace(), np.trace(core()))
        self.assert_same(self.operator().mean_eigenvalue(), np.trace(core()) / 11)

    def test_damping_acts_on_the_core(self) -> None:
        down = self.projection.down(np.eye(WHOLE.size))
        for damping in (1e-3, 0.1, 1.0):
            inverse = self.operator().inverse(damping)
            expected = down @ np.linalg.inv(core() + damping * np.eye(11)) @ down.T
            self.assert_same(inverse.dense(LIKE), expected, scale=1e3 * float(np.abs(expected).max()))


def test_a_moment_inverted_directly_is_the_one_inverted_by_its_eigenvectors() -> None:
    moment = MomentOperator(core())
    values, vectors = np.linalg.eigh(core())
    for damping in (0.0, 1e-16, 1e-9, 1e-3, 1.0):
        expected = (vectors / (values + damping)) @ vectors.T
        np.testing.assert_allclose(moment.inverse(damping).matrix, expected, rtol=1e-9, atol=1e-9)
    with pytest.raises(SingularOperator):
        MomentOperator(np.outer(core()[0], core()[0])).inverse(0.0)


def test_a_projection_too_wide_for_a_matrix_is_refused() -> None:
    from headwater.curvature.moments import _checked

    large = KroneckerProjection(
        Layout(Block("table", (TABLE,)), (EMBEDDING,)), [(np.ones((200, 6)), np.ones((200, 4)))]
    )
    with pytest.raises(InvalidSetting, match=r"'table' is projected to 40000 numbers.* 13 GB"):
        _checked("table", large)


def test_a_large_dimension_makes_no_sides() -> None:
    make, _ = LoGra(99).projections(None, (), False)
    made = make("whole", values(2)[0])
    assert made.sides == ((None, None),) * 3
    assert made.small.size == WHOLE.size
