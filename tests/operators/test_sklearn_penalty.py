"""A penalty that holds some parameters and not others, beside any method's inverse."""

import numpy as np
import pytest
import torch

from headwater.errors import IndefiniteCurvature, SingularOperator
from headwater.operators.kronecker import KroneckerOperator
from headwater.operators.partial_penalty import PartialPenaltyInverse, penalised
from headwater.operators.structured import DenseOperator
from headwater.testing import OperatorContract

RNG = np.random.default_rng(5)
ROOT = RNG.standard_normal((9, 6))
CURVATURE = ROOT.T @ ROOT / 9
PENALTY = np.array([0.5, 0.5, 0.0, 0.5, 0.2, 0.0])


class PartialPenaltyContract(OperatorContract):
    rounding = 1e5

    def operator(self):
        curvature = DenseOperator(self.array(CURVATURE), symmetric=True, psd=True)
        return penalised(curvature.inverse, 0.1, self.array(PENALTY))

    def matrix(self):
        return np.linalg.inv(CURVATURE + np.diag(PENALTY) + 0.1 * np.eye(6))


class TestPartialPenaltyInverse(PartialPenaltyContract):
    def test_the_trace_is_that_of_the_matrix(self):
        self.assert_same(self.operator().trace(), np.trace(self.matrix()))

    def test_it_is_its_own_adjoint(self):
        operator = self.operator()
        assert operator.adjoint() is operator


class TestPartialPenaltyInverseInTorch(PartialPenaltyContract):
    def array(self, values):
        return torch.as_tensor(values)


def test_a_kronecker_product_keeps_its_structure_and_the_penalty_is_exact():
    left, right = CURVATURE[:3, :3], CURVATURE[3:5, 3:5]
    penalty = np.array([0.4, 0.0] * 3)
    operator = penalised(KroneckerOperator(left, right, psd=True).inverse, 0.01, penalty)
    expected = np.linalg.inv(np.kron(left, right) + np.diag(penalty) + 0.01 * np.eye(6))
    np.testing.assert_allclose(operator.dense(np.eye(6)), expected, rtol=0, atol=1e-11 * np.abs(expected).max())


def test_one_strength_for_all_is_damping():
    curvature = DenseOperator(CURVATURE, symmetric=True, psd=True)
    operator = penalised(curvature.inverse, 0.1, np.full(6, 0.3))
    assert isinstance(operator, DenseOperator)
    np.testing.assert_array_equal(operator.matrix, curvature.inverse(0.1 + 0.3).matrix)
    assert penalised(curvature.inverse, 0.1, None).matrix.shape == (6, 6)


def flat_in(direction):
    """Curvature that is zero along a direction, and nowhere else."""
    unit = direction / np.linalg.norm(direction)
    off = np.eye(6) - np.outer(unit, unit)
    return off @ CURVATURE @ off


def test_a_direction_that_nothing_holds_is_left_alone_where_no_gradient_points():
    """As the intercepts of a softmax, all shifted by one number."""
    direction = np.array([0.0, 0.0, 1.0, 0.0, 0.0, 1.0])
    matrix = flat_in(direction)
    operator = penalised(DenseOperator(matrix, symmetric=True, psd=True).inverse, 0.0, PENALTY)
    assert isinstance(operator, PartialPenaltyInverse)
    vectors = RNG.standard_normal((4, 6))
    vectors -= np.outer(vectors @ direction, direction) / 2
    expected = vectors @ np.linalg.pinv(matrix + np.diag(PENALTY))
    np.testing.assert_allclose(operator.apply(vectors), expected, rtol=0, atol=1e-10 * np.abs(expected).max())
    with pytest.raises(SingularOperator, match="a gradient points there"):
        operator.apply(direction)


def test_negative_curvature_that_only_the_penalty_hid_is_refused():
    matrix = np.diag([1.0, 1.0, -0.3, 1.0, 1.0, 1.0])
    curvature = DenseOperator(matrix, symmetric=True)
    operator = penalised(lambda d: curvature.inverse(d, allow_indefinite=False), 0.0, PENALTY)
    with pytest.raises(IndefiniteCurvature, match="more damping"):
        operator.apply(np.ones(6))
