"""Claims about operators: each is its matrix, in NumPy and in torch; what cannot be inverted is refused."""

import re
from dataclasses import dataclass
from functools import reduce

import numpy as np
import pytest
import torch

from headwater.blocks import Block, Layout, Parameter, Part, Piece
from headwater.errors import (
    IndefiniteCurvature,
    InvalidInput,
    InvalidSetting,
    NonFiniteValue,
    ShapeMismatch,
    SingularOperator,
)
from headwater.gradients.algebra import Dense
from headwater.gradients.block import BlockGradient
from headwater.gradients.outer import Outer, RowSparse
from headwater.operators.algebra import (
    IdentityOperator,
    LinearOperator,
    ProductOperator,
    ScaledOperator,
    SumOperator,
)
from headwater.operators.kronecker import (
    EigenKroneckerOperator,
    KroneckerOperator,
    RotationOperator,
    SeparableOperator,
    SeparableScale,
)
from headwater.operators.structured import (
    BlockDiagonalOperator,
    DenseOperator,
    DiagonalOperator,
    LowRankPlusDiagonalOperator,
)
from headwater.testing import LinearOperatorContract

FRAMEWORKS = {"numpy": np.asarray, "torch": torch.as_tensor}
O, I = 3, 5  # noqa: E741
D = O * I


def normal(*shape, seed=0):
    return np.random.default_rng((seed, *shape)).standard_normal(shape)


def orthogonal(size, seed=0):
    return np.linalg.qr(normal(size, size, seed=seed))[0]


def positive(size, seed=0):
    """Eigenvalues over two and a half decades, so that every damping matters."""
    basis = orthogonal(size, seed)
    return (basis * np.logspace(-2, 0.5, size)) @ basis.T


def indefinite(size, seed=0):
    basis = orthogonal(size, seed)
    return (basis * np.linspace(-1.3, 2.7, size)) @ basis.T


@dataclass(frozen=True)
class Case:
    """How an operator is built from arrays of a framework, and its matrix by NumPy's own words."""

    build: object
    matrix: np.ndarray
    inverts: bool = True
    part: tuple[int, int] | None = (O, I)


L, R, SPECTRUM = positive(O, 1), positive(I, 2), np.abs(normal(O, I)) + 0.02
QL, QR = orthogonal(O, 3), orthogonal(I, 4)
U, V = np.abs(normal(2, O)) + 0.1, np.abs(normal(2, I)) + 0.1
FACTOR, CORE, DIAGONAL = normal(D, 4), positive(4, 5), np.linspace(0.05, 2.0, D)
TURN = np.kron(QL.T, QR.T)


def eigen_matrix(left, spectrum, right):
    basis = np.kron(left, right)
    return (basis * spectrum.ravel()) @ basis.T


def eigen_kronecker(a, left, right, spectrum):
    return EigenKroneckerOperator(
        None if left is None else a(left), None if right is None else a(right), a(spectrum), like=a(spectrum)
    )


def separable(a):
    return SeparableOperator(eigen_kronecker(a, QL, QR, SPECTRUM), a(U), a(V))


CASES = {
    "identity": Case(lambda a: IdentityOperator(D), np.eye(D)),
    "scaled": Case(lambda a: ScaledOperator(-2.5, DenseOperator(a(L), symmetric=True)), -2.5 * L, part=None),
    "sum": Case(
        lambda a: SumOperator(DiagonalOperator(a(SPECTRUM)), KroneckerOperator(a(L), a(R), psd=True)),
        np.diag(SPECTRUM.ravel()) + np.kron(L, R),
        inverts=False,
    ),
    "shifted": Case(
        lambda a: ScaledOperator(0.3, IdentityOperator(D)) + KroneckerOperator(a(L), a(R), psd=True),
        0.3 * np.eye(D) + np.kron(L, R),
    ),
    "product": Case(
        lambda a: ProductOperator(DiagonalOperator(a(SPECTRUM)), RotationOperator(a(QL), a(QR), (O, I))),
        SPECTRUM.reshape(-1, 1) * TURN,
        inverts=False,
    ),
    "dense": Case(lambda a: DenseOperator(a(np.kron(L, R)), psd=True), np.kron(L, R)),
    "dense indefinite": Case(lambda a: DenseOperator(a(indefinite(D)), symmetric=True), indefinite(D)),
    "dense unsymmetric": Case(lambda a: DenseOperator(a(normal(D, D) + 3 * np.eye(D))), normal(D, D) + 3 * np.eye(D)),
    "diagonal": Case(lambda a: DiagonalOperator(a(SPECTRUM.ravel())), np.diag(SPECTRUM.ravel())),
    "diagonal of a part": Case(lambda a: DiagonalOperator(a(SPECTRUM - 0.5)), np.diag(SPECTRUM.ravel() - 0.5)),
    "Kronecker": Case(lambda a: KroneckerOperator(a(L), a(R), psd=True), np.kron(L, R)),
    "Kronecker indefinite": Case(lambda a: KroneckerOperator(a(L), a(indefinite(I))), np.kron(L, indefinite(I))),
    "Kronecker with diagonals": Case(
        lambda a: KroneckerOperator(a(np.diag(L).copy()), a(R), psd=True), np.kron(np.diag(np.diag(L)), R)
    ),
    "Kronecker unsymmetric": Case(
        lambda a: KroneckerOperator(a(normal(O, O)), a(normal(I, I)), symmetric=False),
        np.kron(normal(O, O), normal(I, I)),
        inverts=False,
    ),
    "rotation": Case(lambda a: RotationOperator(a(QL), a(QR), (O, I)), TURN, inverts=False),
    "rotation of one side": Case(
        lambda a: RotationOperator(None, a(QR), (O, I)), np.kron(np.eye(O), QR.T), inverts=False
    ),
    "eigen-Kronecker": Case(lambda a: eigen_kronecker(a, QL, QR, SPECTRUM), eigen_matrix(QL, SPECTRUM, QR)),
    "eigen-Kronecker of one side": Case(
        lambda a: eigen_kronecker(a, None, QR, SPECTRUM), eigen_matrix(np.eye(O), SPECTRUM, QR)
    ),
    "separable": Case(separable, eigen_matrix(QL, U.T @ V, QR), inverts=False),
    "separable scale": Case(lambda a: SeparableScale(a(U), a(V)), np.diag((U.T @ V).ravel()), inverts=False),
    "low rank plus diagonal": Case(
        lambda a: LowRankPlusDiagonalOperator(a(FACTOR), a(CORE), a(DIAGONAL), psd=True),
        FACTOR @ CORE @ FACTOR.T + np.diag(DIAGONAL),
    ),
    "low rank with a singular core": Case(
        lambda a: LowRankPlusDiagonalOperator(a(FACTOR), a(np.diag([1.0, 0, 2, 0])), a(DIAGONAL), psd=True),
        FACTOR @ np.diag([1.0, 0, 2, 0]) @ FACTOR.T + np.diag(DIAGONAL),
    ),
}


@pytest.mark.parametrize("array", FRAMEWORKS.values(), ids=FRAMEWORKS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
class TestOperators(LinearOperatorContract):
    @pytest.fixture(autouse=True)
    def _which(self, case, array):
        self.case, self.array = case, array
        self.dampings = LinearOperatorContract.dampings if case.inverts else ()

    def operator(self):
        return self.case.build(self.array)

    def matrix(self):
        return self.case.matrix

    def gradient_values(self):
        """One position and many, with and without ones; rows of a table; dense."""
        if self.case.part is None:
            return []
        a, (o, i) = self.array, self.case.part
        ids = np.random.default_rng(0).integers(0, o, size=(4, 3))
        return [
            Outer(a(normal(6, 1, i)), a(normal(6, 1, o))),
            Outer(a(normal(2, 7, i - 1)), a(normal(2, 7, o)), ones=True),
            RowSparse(a(ids), a(normal(4, 3, i)), o),
            Dense(a(normal(3, o, i))),
        ]


LAYOUT = Layout(
    Block(
        "layer",
        (Parameter("scale", (3,)), Parameter("weight", (O, I - 1)), Parameter("bias", (O,)), Parameter("shift", (3,))),
    ),
    (
        Part(Piece("weight", 0, (O, I - 1)), Piece("bias", 0, (O, 1))),
        Part(Piece("scale", 0, (3, 1)), Piece("shift", 0, (3, 1)), below=True),
    ),
)
PLACES = [
    np.concatenate([3 + np.arange(O * (I - 1)).reshape(O, I - 1), 3 + O * (I - 1) + np.arange(O)[:, None]], axis=1),
    np.concatenate([np.arange(3), 3 + D + np.arange(3)])[:, None],
]
"""Where the numbers of each part, row by row, are in the flat vector."""
AFFINE = positive(6, 7)


def of_parts(*matrices):
    whole = np.zeros((LAYOUT.size, LAYOUT.size))
    for places, matrix in zip(PLACES, matrices, strict=True):
        whole[np.ix_(places.ravel(), places.ravel())] = matrix
    return whole


BLOCK_CASES = {
    "Kronecker": Case(
        lambda a: BlockDiagonalOperator(
            LAYOUT, [KroneckerOperator(a(L), a(R), psd=True), DenseOperator(a(AFFINE), psd=True)]
        ),
        of_parts(np.kron(L, R), AFFINE),
    ),
    "eigen-Kronecker": Case(
        lambda a: BlockDiagonalOperator(
            LAYOUT, [eigen_kronecker(a, QL, QR, SPECTRUM), DiagonalOperator(a(np.diag(AFFINE).copy()))]
        ),
        of_parts(eigen_matrix(QL, SPECTRUM, QR), np.diag(np.diag(AFFINE))),
    ),
    "separable": Case(
        lambda a: BlockDiagonalOperator(LAYOUT, [separable(a), IdentityOperator(6)]),
        of_parts(eigen_matrix(QL, U.T @ V, QR), np.eye(6)),
        inverts=False,
    ),
    "dense": Case(lambda a: DenseOperator(a(positive(D + 6)), psd=True), positive(D + 6)),
}


@pytest.mark.parametrize("array", FRAMEWORKS.values(), ids=FRAMEWORKS)
@pytest.mark.parametrize("case", BLOCK_CASES.values(), ids=BLOCK_CASES)
class TestOperatorsOfBlocks(LinearOperatorContract):
    @pytest.fixture(autouse=True)
    def _which(self, case, array):
        self.case, self.array = case, array
        self.dampings = LinearOperatorContract.dampings if case.inverts else ()

    def operator(self):
        return self.case.build(self.array)

    def matrix(self):
        return self.case.matrix

    def block_values(self):
        a = self.array
        values = [
            (Outer(a(normal(5, 1, I - 1)), a(normal(5, 1, O)), ones=True), Dense(a(normal(5, 6, 1)))),
            (Outer(a(normal(2, 9, I - 1)), a(normal(2, 9, O)), ones=True), Dense(a(normal(2, 6, 1)))),
        ]
        return [BlockGradient(LAYOUT, parts) for parts in values]


@pytest.mark.parametrize("rank, o, i", [(1, 8, 9), (2, 12, 10), (2, 3, 4)])
def test_a_separable_scale_keeps_an_outer_product_where_that_is_cheaper(rank, o, i):
    u, v = normal(rank, o), normal(rank, i)
    value = Outer(normal(4, 1, i - 1), normal(4, 1, o), ones=True)
    scaled = SeparableScale(u, v).apply_gradient(value)
    assert isinstance(scaled, Outer) == (rank * (o + i) < o * i)
    np.testing.assert_allclose(scaled.dense(), value.dense() * (u.T @ v), rtol=0, atol=1e-13)


def test_a_separable_operator_on_wide_layers_is_its_matrix():
    """Wide enough that outer products are kept on both sides."""
    o, i = 19, 18
    left, right, u, v = orthogonal(o), orthogonal(i), normal(2, o) ** 2, normal(2, i) ** 2
    basis = eigen_kronecker(np.asarray, left, right, np.ones((o, i)))
    op, matrix = SeparableOperator(basis, u, v), eigen_matrix(left, u.T @ v, right)
    queries, train = (Outer(normal(n, 1, i - 1), normal(n, 1, o), ones=True) for n in (3, 6))
    mine, theirs = op.sides(queries, 6)
    assert isinstance(mine.apply_gradient(queries), Outer)
    expected = queries.dense().reshape(3, -1) @ matrix @ train.dense().reshape(6, -1).T
    for got in (
        mine.apply_gradient(queries).inner(theirs.apply_gradient(train)),
        op.apply_gradient(queries).inner(train),
    ):
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-12 * np.abs(expected).max())


# What cannot be inverted is refused -----------------------------------------------------------------------------------


def singular(size, seed=0):
    """Of rank size - 1, to rounding: the least eigenvalue that eigh finds is not exactly zero."""
    basis = orthogonal(size, seed)
    return (basis * np.linspace(0, 3, size)) @ basis.T


SINGULAR = {
    "zero times an operator": lambda a: ScaledOperator(0.0, IdentityOperator(3)),
    "the identity minus itself": lambda a: IdentityOperator(3).shifted(-1.0),
    "dense": lambda a: DenseOperator(a(singular(40)), psd=True),
    "dense of low rank": lambda a: DenseOperator(a(normal(30, 4) @ normal(30, 4).T), psd=True),
    "dense unsymmetric": lambda a: DenseOperator(a(normal(9, 4) @ normal(4, 9))),
    "dense unsymmetric, exactly": lambda a: DenseOperator(a(np.array([[1.0, 2.0], [2.0, 4.0]]))),
    "diagonal": lambda a: DiagonalOperator(a(np.array([1.0, 0.0, 2.0]))),
    "all zero": lambda a: DiagonalOperator(a(np.zeros(4))),
    "Kronecker": lambda a: KroneckerOperator(a(singular(20)), a(R), psd=True),
    "eigen-Kronecker": lambda a: eigen_kronecker(a, QL, QR, np.outer([0.0, 1.0, 2.0], np.ones(I))),
    "low rank plus diagonal": lambda a: LowRankPlusDiagonalOperator(
        a(np.eye(4)[:, :1]), a(-np.ones((1, 1))), a(np.ones(4))
    ),
    "low rank with a zero diagonal": lambda a: LowRankPlusDiagonalOperator(a(FACTOR), a(CORE), a(np.zeros(D))),
    "block diagonal": lambda a: BlockDiagonalOperator(
        LAYOUT, [KroneckerOperator(a(singular(O)), a(R), psd=True), IdentityOperator(6)]
    ),
}


@pytest.mark.parametrize("array", FRAMEWORKS.values(), ids=FRAMEWORKS)
@pytest.mark.parametrize("build", SINGULAR.values(), ids=SINGULAR)
def test_a_singular_operator_is_refused_and_damping_helps(build, array):
    op = build(array)
    with pytest.raises(SingularOperator):
        op.inverse()
    damped = op.dense(array(np.eye(op.input_size))) + 0.5 * array(np.eye(op.input_size))
    got = op.inverse(0.5).apply(damped.T)
    np.testing.assert_allclose(np.asarray(got), np.eye(op.input_size), rtol=0, atol=1e-11)


@pytest.mark.parametrize("array", FRAMEWORKS.values(), ids=FRAMEWORKS)
def test_negative_curvature_is_refused_where_asked_and_the_damping_that_would_do_is_said(array):
    op = DenseOperator(array(indefinite(D)), symmetric=True)
    for damping in (0.0, 0.65):
        with pytest.raises(IndefiniteCurvature, match=r"damping of \S+ would do") as refused:
            op.inverse(damping, allow_indefinite=False)
        enough = float(re.search(r"damping of (\S+) would do", str(refused.value))[1])
        assert op.inverse(enough, allow_indefinite=False).psd
    inverse = op.inverse(1.4, allow_indefinite=False)
    assert inverse.psd
    assert not op.inverse(0.7).psd
    expected = np.linalg.inv(indefinite(D) + 1.4 * np.eye(D))
    np.testing.assert_allclose(np.asarray(inverse.matrix), expected, rtol=0, atol=1e-12)


def test_tags_of_an_inverse_follow_the_damped_spectrum():
    """A positive operator, damped below its own eigenvalues, is positive no more."""
    for op in (
        LowRankPlusDiagonalOperator(FACTOR, CORE, DIAGONAL, psd=True),
        DiagonalOperator(DIAGONAL),
        KroneckerOperator(L, R, psd=True),
        DenseOperator(np.kron(L, R), psd=True),
        IdentityOperator(3),
    ):
        inverse = op.inverse(-1.1)
        assert np.linalg.eigvalsh(inverse.dense(DIAGONAL)).min() < 0
        assert inverse.symmetric and not inverse.psd


def test_an_operator_without_an_inverse_in_closed_form_says_so():
    unsymmetric = KroneckerOperator(normal(O, O), normal(I, I), symmetric=False)
    both = DiagonalOperator(SPECTRUM) + KroneckerOperator(L, R)
    rotation = RotationOperator(QL, QR, (O, I))
    for op in (unsymmetric, unsymmetric.adjoint(), both, separable(np.asarray), rotation, rotation @ rotation):
        with pytest.raises(NotImplementedError, match=type(op).__name__):
            op.inverse(0.1)
    with pytest.raises(NotImplementedError, match="Kronecker"):
        unsymmetric.factored_inverse(0.1)


def test_rotations_and_products_are_inverted_without_damping():
    rotation = RotationOperator(QL, QR, (O, I))
    np.testing.assert_allclose(rotation.inverse().dense(SPECTRUM), TURN.T, rtol=0, atol=1e-14)
    product = DiagonalOperator(SPECTRUM) @ rotation
    expected = np.linalg.inv(SPECTRUM.reshape(-1, 1) * TURN)
    np.testing.assert_allclose(product.inverse().dense(SPECTRUM), expected, rtol=0, atol=1e-12 * np.abs(expected).max())


# Factored damping -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("array", FRAMEWORKS.values(), ids=FRAMEWORKS)
@pytest.mark.parametrize("left", [L, np.diag(L).copy()], ids=["matrix", "diagonal"])
def test_factored_damping_is_shared_out_by_the_traces(array, left):
    damping = 0.3 * np.trace(np.kron(L, R)) / D
    balance = np.sqrt((np.trace(R) / I) / (np.trace(L) / O))
    sides = (
        (left if left.ndim == 2 else np.diag(left)) + np.sqrt(damping) / balance * np.eye(O),
        (R + np.sqrt(damping) * balance * np.eye(I)),
    )
    expected = np.linalg.inv(np.kron(*sides))
    got = KroneckerOperator(array(left), array(R), psd=True).factored_inverse(damping)
    np.testing.assert_allclose(np.asarray(got.dense(array(R))), expected, rtol=0, atol=1e-12 * np.abs(expected).max())


def test_factored_damping_is_exact_without_damping_and_not_negative():
    got = KroneckerOperator(L, R, psd=True).factored_inverse(0.0).dense(R)
    expected = np.linalg.inv(np.kron(L, R))
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-11 * np.abs(expected).max())
    with pytest.raises(InvalidSetting, match="-1"):
        KroneckerOperator(L, R, psd=True).factored_inverse(-1.0)


# What cannot be applied is refused ------------------------------------------------------------------------------------


def test_whole_numbers_and_lists_are_refused():
    op = DiagonalOperator(DIAGONAL)
    with pytest.raises(InvalidInput, match="int64"):
        op.apply(np.arange(D))
    with pytest.raises(InvalidInput, match="list"):
        op.apply([1.0] * D)


def test_matrices_and_parts_that_do_not_fit_are_refused():
    with pytest.raises(ShapeMismatch, match=r"\(3, 4\)"):
        DenseOperator(normal(3, 4))
    with pytest.raises(ShapeMismatch, match=r"\[15, 6\].*\[15, 5\]"):
        BlockDiagonalOperator(LAYOUT, [IdentityOperator(D), IdentityOperator(5)])


def test_an_operator_that_is_not_finite_is_not_inverted():
    for bad in (np.nan, np.inf):
        spectrum = DIAGONAL.copy()
        spectrum[3] = bad
        with pytest.raises(NonFiniteValue):
            DiagonalOperator(spectrum).inverse(0.1)


def test_a_third_partys_operator_needs_only_three_methods():
    """Everything else follows from the dense meaning."""

    class Shear(LinearOperator):
        input_size = D

        def __init__(self, matrix):
            self.matrix = matrix

        def _apply(self, tensor):
            return tensor @ self.matrix.T

        def adjoint(self):
            return Shear(self.matrix.T)

        def trace(self):
            return float(np.trace(self.matrix))

    class Contract(LinearOperatorContract):
        dampings = ()

        def operator(self):
            return Shear(reduce(np.matmul, [np.kron(L, R), TURN]))

        def matrix(self):
            return np.kron(L, R) @ TURN

        def gradient_values(self):
            return [Outer(normal(3, 2, I), normal(3, 2, O)), Dense(normal(2, O, I))]

    Contract().check()
