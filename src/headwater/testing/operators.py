"""The contract of operators: of any `Operator`, and of those that know the words of algebra."""

from __future__ import annotations

from typing import Any

import numpy as np

from headwater.arrays import Array
from headwater.errors import ShapeMismatch
from headwater.gradients.algebra import Gradient
from headwater.gradients.block import BlockGradient
from headwater.operators.algebra import IdentityOperator, LinearOperator
from headwater.testing.contract import Contract, host
from headwater.types import Batch, GradientProvider, InfluenceMode, Operator, OperatorGradientComposition


class RememberedGradients(GradientProvider[Batch[Array], Array]):
    """Gradients from elsewhere: a batch's x are its gradients (N, D), its y the mixed ones (N, ..., D)."""

    def flat_grads(self, batch: Batch[Array]) -> Array:
        return batch.x

    def flat_mixed_grads(self, batch: Batch[Array]) -> Array:
        return batch.y

    def jacobian_prod(self, batch: Batch[Array], g: Array) -> Array:
        return batch.x @ g.T


class OperatorContract(Contract):
    """What every `headwater.types.Operator` obeys. A subclass fills `operator` and `matrix`, and `array` if need be."""

    def operator(self) -> Operator[Any]:
        """A hook: the operator under test, of 2 numbers or more, and no multiple of the identity."""
        raise NotImplementedError

    def matrix(self) -> np.ndarray:
        """A hook: what it stands for, [D, D] in float64, found without the operator."""
        raise NotImplementedError

    def vectors(self, *leading: int, seed: int = 0) -> np.ndarray:
        return self.random(*leading, len(self.matrix()), seed=seed)

    def test_input_size_is_the_number_of_columns(self) -> None:
        size = self.operator().input_size
        assert isinstance(size, int)
        assert size == len(self.matrix())

    def test_a_vector_is_multiplied_by_the_matrix(self) -> None:
        vector = self.vectors()
        self.assert_same(self.operator().apply(self.array(vector)), self.matrix() @ vector)

    def test_leading_axes_of_any_number_are_kept(self) -> None:
        size = len(self.matrix())
        for leading in [(1,), (3,), (size,), (2, 3), (2, 1, 3), (0,)]:
            vectors = self.vectors(*leading)
            got = self.operator().apply(self.array(vectors))
            self.assert_same(got, np.einsum("de,...e->...d", self.matrix(), vectors))

    def test_another_trailing_axis_is_refused_and_both_numbers_are_said(self) -> None:
        size = len(self.matrix())
        for shape in [(size + 1,), (size - 1,), (size, size + 1), (2, size, 2 * size)]:
            with self.refuses(ValueError, size, shape[-1]):
                self.operator().apply(self.array(self.random(*shape)))

    def test_a_number_without_axes_is_refused(self) -> None:
        with self.refuses(ValueError, len(self.matrix())):
            self.operator().apply(self.array(self.random(1))[0])

    def test_what_is_applied_is_left_as_it_was(self) -> None:
        vectors = self.vectors(3)
        given = self.array(vectors.copy())
        self.operator().apply(given)
        np.testing.assert_array_equal(host(given), vectors)

    def test_sums_and_multiples_go_through(self) -> None:
        op, u, v = self.operator(), self.array(self.vectors(2)), self.array(self.vectors(2, seed=1))
        self.assert_same(op.apply(2.0 * u - 3.0 * v), 2.0 * op.apply(u) - 3.0 * op.apply(v))

    def test_the_bilinear_form_maps_the_left_side_whichever_side_has_more_rows(self) -> None:
        size, form = len(self.matrix()), self.operator().as_bilinear_form()
        for n, m in [(2, 5), (5, 2), (size + 3, 1), (1, 1)]:
            left, right = self.vectors(n), self.vectors(m, seed=1)
            got = form.inner_prod(self.array(left), self.array(right))
            self.assert_same(got, left @ self.matrix().T @ right.T)
        left = self.vectors(4)
        self.assert_same(form.inner_prod(self.array(left), None), left @ self.matrix().T @ left.T)

    def test_the_bilinear_form_keeps_the_inner_axes_of_the_right_side(self) -> None:
        left, form = self.vectors(4), self.operator().as_bilinear_form()
        for inner in [(3,), (2, 3)]:
            right = self.vectors(2, *inner)
            expected = np.einsum("nd,m...d->nm...", left @ self.matrix().T, right)
            self.assert_same(form.inner_prod(self.array(left), self.array(right)), expected)

    def test_the_bilinear_form_refuses_sides_of_different_lengths(self) -> None:
        size = len(self.matrix())
        with self.refuses(ValueError, size + 1):
            self.operator().as_bilinear_form().inner_prod(
                self.array(self.vectors(2)), self.array(self.random(2, size + 1))
            )

    def test_the_bilinear_form_takes_batches(self) -> None:
        (left, right), form, provider = self._batches(), self.operator().as_bilinear_form(), RememberedGradients()
        mapped = host(left.x) @ self.matrix().T
        self.assert_same(form.grads_inner_prod(left, right, provider), mapped @ host(right.x).T)
        self.assert_same(form.grads_inner_prod(left, None, provider), mapped @ host(left.x).T)
        mixed = form.mixed_grads_inner_prod(left, right, provider)
        self.assert_same(mixed, np.einsum("nd,mxd->nmx", mapped, host(right.y)))
        mixed = form.mixed_grads_inner_prod(left, None, provider)
        self.assert_same(mixed, np.einsum("nd,mxd->nmx", mapped, host(left.y)))

    def test_composed_with_a_provider_it_gives_interactions_in_both_modes(self) -> None:
        (left, right), block = self._batches(), OperatorGradientComposition(self.operator(), RememberedGradients())
        factors = block.transformed_grads(left)
        self.assert_same(factors, host(left.x) @ self.matrix().T)
        up, mixed = host(factors) @ host(right.x).T, np.einsum("nd,mxd->nmx", host(factors), host(right.y))
        for mode, expected in [("up", up), (InfluenceMode.Up, up), ("perturbation", mixed)]:
            self.assert_same(block.interactions(left, right, mode), expected)
            self.assert_same(block.interactions_from_transformed_grads(factors, right, mode), expected)

    def _batches(self) -> tuple[Batch[Array], Batch[Array]]:
        """More rows on the left than numbers in a vector, fewer on the right."""
        sizes = len(self.matrix()) + 2, 3
        left, right = ((self.array(self.vectors(n)), self.array(self.vectors(n, 2))) for n in sizes)
        return Batch(*left), Batch(*right)


class LinearOperatorContract(OperatorContract):
    """What every `LinearOperator` obeys besides. A subclass may also fill the hooks below."""

    dampings: tuple[float, ...] = (1e-3, 1e-1, 1.0)
    """In mean eigenvalues; () for an operator without an inverse in closed form."""

    def operator(self) -> LinearOperator:
        raise NotImplementedError

    def gradient_values(self) -> list[Gradient]:
        """A hook: gradient values of this operator's part, of several kinds and row counts; [] if it has no part."""
        return []

    def block_values(self) -> list[BlockGradient]:
        """A hook: gradients of a whole block that this operator maps, of several row counts; [] if it maps none."""
        return []

    def test_its_matrix_in_the_framework_under_test(self) -> None:
        self.assert_same(self.operator().dense(self.array(self.vectors())), self.matrix())

    def test_the_adjoint_is_the_transposed_map_and_its_adjoint_the_map(self) -> None:
        like, adjoint = self.array(self.vectors()), self.operator().adjoint()
        self.assert_same(adjoint.dense(like), self.matrix().T)
        self.assert_same(adjoint.adjoint().dense(like), self.matrix())

    def test_tags_are_true(self) -> None:
        like = self.array(self.vectors())
        for op in [self.operator(), self.operator().adjoint(), *self._inverses()]:
            matrix = host(op.dense(like))
            if op.symmetric or op.psd:
                self.assert_same(matrix, matrix.T)
            if op.psd:
                lowest, highest = np.linalg.eigvalsh(matrix)[[0, -1]]
                assert lowest >= -self.rounding * np.finfo(float).eps * highest, f"psd, with the eigenvalue {lowest}"

    def _inverses(self) -> list[LinearOperator]:
        return [self.operator().inverse(damping) for damping in self._dampings()]

    def _dampings(self) -> list[float]:
        mean = float(np.trace(self.matrix())) / len(self.matrix())
        return [factor * mean for factor in self.dampings]

    def test_the_trace_is_the_sum_of_the_diagonal(self) -> None:
        size = float(np.max(np.abs(self.matrix())))
        try:
            trace = self.operator().trace()
        except NotImplementedError:  # said, not guessed
            return
        assert isinstance(trace, float)
        self.assert_same(trace, np.trace(self.matrix()), scale=size * len(self.matrix()))
        self.assert_same(self.operator().mean_eigenvalue(), np.trace(self.matrix()) / len(self.matrix()), scale=size)

    def test_sums_products_multiples_and_shifts_are_those_of_the_matrices(self) -> None:
        op, matrix, like = self.operator(), self.matrix(), self.array(self.vectors())
        for combined, expected in [
            (op + op.adjoint(), matrix + matrix.T),
            (op @ op.adjoint(), matrix @ matrix.T),
            (op.adjoint() @ op, matrix.T @ matrix),
            (-2.0 * op, -2.0 * matrix),
            (op.shifted(0.5), matrix + 0.5 * np.eye(len(matrix))),
        ]:
            self.assert_same(combined.dense(like), expected)
            self.assert_same(combined.adjoint().dense(like), expected.T)

    def test_operators_of_different_sizes_are_not_combined(self) -> None:
        op = self.operator()
        other = IdentityOperator(op.input_size + 1)
        for combine in (lambda: op + other, lambda: op @ other, lambda: other + op):
            with self.refuses(ShapeMismatch, op.input_size, op.input_size + 1):
                combine()

    def test_the_inverse_is_that_of_the_damped_matrix(self) -> None:
        vectors = self.vectors(3)
        for damping, inverse in zip(self._dampings(), self._inverses(), strict=True):
            damped = self.matrix() + damping * np.eye(len(self.matrix()))
            expected = np.linalg.solve(damped, vectors.T).T
            scale = float(np.max(np.abs(expected)) * np.linalg.cond(damped))
            self.assert_same(inverse.apply(self.array(vectors)), expected, scale=scale)

    def test_inverting_what_is_shifted_is_inverting_with_damping(self) -> None:
        vectors, op = self.array(self.vectors(3)), self.operator()
        for damping in self._dampings():
            expected = host(op.inverse(damping).apply(vectors))
            self.assert_same(op.shifted(damping / 2).inverse(damping / 2).apply(vectors), expected)
            self.assert_same((2.0 * op).inverse(2.0 * damping).apply(vectors), expected / 2)

    def test_gradient_values_are_mapped_as_their_dense_rows_are(self) -> None:
        for value in self.gradient_values():
            rows = host(value.dense()).reshape(value.rows, -1)
            mapped = rows @ self.matrix().T
            self.assert_same(self.operator().apply_gradient(value).dense(), mapped.reshape(value.rows, *value.shape))
            self.assert_same(self.operator().quadratic_gradient(value), np.sum(mapped * rows, axis=1))

    def test_both_sides_together_are_the_operator_for_any_numbers_of_rows(self) -> None:
        values, op = self.gradient_values(), self.operator()
        for queries in values:
            mapped = host(queries.dense()).reshape(queries.rows, -1) @ self.matrix().T
            for train_rows in (1, 10**9):
                left, right = op.sides(queries, train_rows)
                for train in values:
                    got = left.apply_gradient(queries).inner(right.apply_gradient(train))
                    self.assert_same(got, mapped @ host(train.dense()).reshape(train.rows, -1).T)

    def test_whole_blocks_are_mapped_as_their_flat_rows_are(self) -> None:
        for value in self.block_values():
            rows = host(value.flat())
            mapped = rows @ self.matrix().T
            self.assert_same(self.operator().apply_block(value).flat(), mapped)
            self.assert_same(self.operator().quadratic(value), np.sum(mapped * rows, axis=1))

    def test_both_sides_of_a_whole_block_together_are_the_operator(self) -> None:
        values, op = self.block_values(), self.operator()
        for queries in values:
            mapped = host(queries.flat()) @ self.matrix().T
            for train_rows in (1, 10**9):
                left, right = op.block_sides(queries, train_rows)
                for train in values:
                    got = left.apply_block(queries).inner(right.apply_block(train))
                    self.assert_same(got, mapped @ host(train.flat()).T)
