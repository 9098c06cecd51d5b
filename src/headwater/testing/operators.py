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
from headwater.types import Batch, BilinearForm, GradientProvider, InfluenceMode, Operator, OperatorGradientComposition


class RememberedGradients(GradientProvider[Batch[Array], Array]):
    """Gradients from elsewhere: a batch's x are its gradients (N, D), its y the mixed ones (N, ..., D)."""

    def flat_grads(self, batch: Batch[Array]) -> Array:
        return batch.x

    def flat_mixed_grads(self, batch: Batch[Array]) -> Array:
        return batch.y

    def jacobian_prod(self, batch: Batch[Array], g: Array) -> Array:
        return batch.x @ g.T


class BilinearFormContract(Contract):
    """What every `headwater.types.BilinearForm` obeys. A subclass fills `form` and `form_matrix`."""

    def form(self) -> BilinearForm[Any, Any, Any]:
        """A hook: the form under test, on vectors of 2 numbers or more."""
        raise NotImplementedError

    def form_matrix(self) -> np.ndarray:
        """A hook: B in left B right^T, [D, D] in float64, found without the form."""
        raise NotImplementedError

    def vectors(self, *leading: int, seed: int = 0) -> np.ndarray:
        return self.random(*leading, len(self.form_matrix()), seed=seed)

    def rows(self) -> list[tuple[int, int]]:
        """Numbers of rows on either side: fewer, more, none."""
        none = [(0, 3), (3, 0)] if self.has_empty_arrays else []
        return [(2, 5), (5, 2), (len(self.form_matrix()) + 3, 1), (1, 1), *none]

    def test_the_bilinear_form_has_its_matrix_whichever_side_has_more_rows(self) -> None:
        for n, m in self.rows():
            left, right = self.vectors(n), self.vectors(m, seed=1)
            got = self.form().inner_prod(self.array(left), self.array(right))
            self.assert_same(got, left @ self.form_matrix() @ right.T)
        left = self.vectors(4)
        self.assert_same(self.form().inner_prod(self.array(left), None), left @ self.form_matrix() @ left.T)

    def test_the_bilinear_form_keeps_the_inner_axes_of_the_right_side(self) -> None:
        for n, m in self.rows():
            left = self.vectors(n)
            for inner in [(3,), (2, 3)]:
                right = self.vectors(m, *inner)
                expected = np.einsum("nd,m...d->nm...", left @ self.form_matrix(), right)
                self.assert_same(self.form().inner_prod(self.array(left), self.array(right)), expected)

    def test_the_bilinear_form_refuses_sides_of_different_lengths(self) -> None:
        size = len(self.form_matrix())
        for left, right in [(size, size + 1), (size + 1, size)]:
            with self.refuses(ValueError):
                self.form().inner_prod(self.array(self.random(2, left)), self.array(self.random(2, right)))

    def test_the_bilinear_form_takes_batches(self) -> None:
        (left, right), form, provider = self._batches(), self.form(), RememberedGradients()
        met = host(left.x) @ self.form_matrix()
        self.assert_same(form.grads_inner_prod(left, right, provider), met @ host(right.x).T)
        self.assert_same(form.grads_inner_prod(left, None, provider), met @ host(left.x).T)
        for other, given in [(right, right), (left, None)]:
            mixed = form.mixed_grads_inner_prod(left, given, provider)
            self.assert_same(mixed, np.einsum("nd,mxd->nmx", met, host(other.y)))

    def test_no_right_batch_reaches_the_inner_product_as_the_left_gradients(self) -> None:
        form, met = self.form(), []
        inner_prod = form.inner_prod

        def recorded(left: object, right: object) -> Any:
            met.append((left, right))
            return inner_prod(left, right)

        form.inner_prod = recorded  # type: ignore[method-assign]
        form.grads_inner_prod(self._batches()[0], None, RememberedGradients())
        for left, right in met:  # none, where the form has another way
            assert right is not None, "the right side is None"
            self.assert_same(right, host(left))

    def _batches(self) -> tuple[Batch[Array], Batch[Array]]:
        """More rows on the left than numbers in a vector, fewer on the right."""
        sizes = len(self.form_matrix()) + 2, 3
        left, right = ((self.array(self.vectors(n)), self.array(self.vectors(n, 2))) for n in sizes)
        return Batch(*left), Batch(*right)


class OperatorContract(BilinearFormContract):
    """What every `headwater.types.Operator` obeys. A subclass fills `operator` and `matrix`, and `array` if need be.

    An operator with a bilinear form of its own fills `form_matrix` besides.
    """

    def operator(self) -> Operator[Any, Any]:
        """A hook: the operator under test, of 2 numbers or more, and no multiple of the identity."""
        raise NotImplementedError

    def matrix(self) -> np.ndarray:
        """A hook: what it stands for, [D, D] in float64, found without the operator."""
        raise NotImplementedError

    def form(self) -> BilinearForm[Any, Any, Any]:
        return self.operator().as_bilinear_form()

    def form_matrix(self) -> np.ndarray:
        return self.matrix().T

    def test_input_size_is_the_number_of_columns(self) -> None:
        size = self.operator().input_size
        assert isinstance(size, int)
        assert size == len(self.matrix())

    def test_a_vector_is_multiplied_by_the_matrix(self) -> None:
        vector = self.vectors()
        self.assert_same(self.operator().apply(self.array(vector)), self.matrix() @ vector)

    def test_leading_axes_of_any_number_are_kept(self) -> None:
        size = len(self.matrix())
        for leading in [(1,), (3,), (size,), (2, 3), (2, 1, 3), *([(0,), (0, 2), (2, 0)] * self.has_empty_arrays)]:
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

    def test_what_is_applied_is_validated_then_measured_then_mapped(self) -> None:
        """The trailing axis is measured in between, where there is a shape."""
        op, steps = self.operator(), []
        validate, apply = op._validate_tensor_input, op._apply
        op._validate_tensor_input = lambda tensor: steps.append("validated") or validate(tensor)  # type: ignore[method-assign, func-returns-value]
        op._apply = lambda tensor: steps.append("mapped") or apply(tensor)  # type: ignore[method-assign, func-returns-value]
        op.apply(self.array(self.vectors(2)))
        assert {*steps[: steps.index("mapped")]} == {"validated"}
        steps.clear()
        with self.refuses(ValueError):
            op.apply(self.array(self.random(2, len(self.matrix()) + 1)))
        assert {*steps} == {"validated"}

    def test_what_is_applied_is_left_as_it_was(self) -> None:
        vectors = self.vectors(3)
        given = self.array(vectors.copy())
        self.operator().apply(given)
        np.testing.assert_array_equal(host(given), vectors)

    def test_the_default_form_says_which_length_does_not_fit(self) -> None:
        op, size = self.operator(), len(self.matrix())
        if op.as_bilinear_form().is_default_of(op):
            for left, right in [(size, size + 1), (size + 1, size)]:
                with self.refuses(ValueError, size, size + 1):
                    op.as_bilinear_form().inner_prod(
                        self.array(self.random(2, left)), self.array(self.random(2, right))
                    )

    def test_sums_and_multiples_go_through(self) -> None:
        op, u, v = self.operator(), self.vectors(2), self.vectors(2, seed=1)
        one, other = (host(op.apply(self.array(vectors))) for vectors in (u, v))
        self.assert_same(op.apply(self.array(2.0 * u - 3.0 * v)), 2.0 * one - 3.0 * other)

    def test_composed_with_a_provider_it_gives_interactions_in_both_modes(self) -> None:
        (left, right), block = self._batches(), self.composition(RememberedGradients())
        factors = block.transformed_grads(left)
        self.assert_same(factors, host(left.x) @ self.matrix().T)
        met = host(left.x) @ self.form_matrix()
        for mode in ("up", InfluenceMode.Up):
            self.assert_same(block.interactions(left, right, mode), met @ host(right.x).T)
            self.assert_same(block.interactions(left, None, mode), met @ host(left.x).T)
            later = block.interactions_from_transformed_grads(factors, right, mode)
            self.assert_same(later, host(factors) @ host(right.x).T)
        mixed = np.einsum("nd,mxd->nmx", met, host(right.y))
        self.assert_same(block.interactions(left, right, "perturbation"), mixed)
        self.assert_same(block.interactions(left, None, "perturbation"), np.einsum("nd,mxd->nmx", met, host(left.y)))
        later = block.interactions_from_transformed_grads(factors, right, "perturbation")
        self.assert_same(later, np.einsum("nd,mxd->nmx", host(factors), host(right.y)))

    def test_interactions_obey_the_operators_form(self) -> None:
        """Whatever the operator, once its form is another one."""
        (left, right), op = self._batches(), self.operator()
        op.as_bilinear_form = FirstNumbers  # type: ignore[method-assign]
        block = self.composition(RememberedGradients(), op)
        pairs = np.outer(host(left.x)[:, 0], host(right.x)[:, 0])
        self.assert_same(block.interactions(left, right, "up"), pairs)
        mixed = np.einsum("n,mx->nmx", host(left.x)[:, 0], host(right.y)[:, :, 0])
        self.assert_same(block.interactions(left, right, "perturbation"), mixed)

    def composition(self, provider: object, operator: object = None) -> OperatorGradientComposition[Any, Any, Any, Any]:
        """A hook: the operator and a provider as one block; a framework's own composition where it has one."""
        return OperatorGradientComposition(self.operator() if operator is None else operator, provider)


class FirstNumbers(BilinearForm[Any, Any, Any]):
    """The product of the first numbers of both sides, and no operator behind it; in NumPy."""

    def inner_prod(self, left: object, right: object) -> Any:
        return np.tensordot(host(left)[:, 0], host(left if right is None else right)[..., 0], axes=0)


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
