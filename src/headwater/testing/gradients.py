"""The contract of gradient values: every verb of the algebra is its dense meaning, whatever the working memory."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from headwater.arrays import Array, working_memory
from headwater.gradients.algebra import Dense, Gradient, Moments
from headwater.testing.contract import Contract, host
from headwater.types import field_values


class GradientContract(Contract):
    """What every kind of `Gradient` obeys. A subclass fills `value` and `meaning`, and `array` if need be."""

    memory: tuple[int, ...] = (2**26, 1)
    """Bytes of working memory; the numbers must not depend on them."""

    def value(self) -> Gradient:
        """A hook: the gradient value under test, of at least one row."""
        raise NotImplementedError

    def meaning(self) -> np.ndarray:
        """A hook: its dense meaning [n, o, i] in float64, found without the value."""
        raise NotImplementedError

    def partners(self) -> list[tuple[Gradient, np.ndarray]]:
        """A hook: other values of the same shape, of any kind and number of rows, with their dense meaning."""
        dense = self.random(3, *self.meaning().shape[1:], seed=1)
        return [(Dense(self.array(dense)), dense)]

    def assert_sum(self, got: Array, formula: str, *terms: np.ndarray) -> None:
        """`got` is the einsum of the terms; rounding is relative to the same sum of absolute values."""
        size = np.einsum(formula, *map(np.abs, terms))
        self.assert_same(got, np.einsum(formula, *terms), scale=float(np.max(size)) if size.size else 0.0)

    def _limits(self) -> Iterator[None]:
        for limit in self.memory:
            with working_memory(limit):
                yield

    def test_rows_shape_and_dense(self) -> None:
        value, meaning = self.value(), self.meaning()
        assert (value.rows, *value.shape) == meaning.shape
        self.assert_same(value.dense(), meaning)

    def test_inner_is_all_pairs_of_dot_products_from_either_side(self) -> None:
        value, mine = self.value(), self.meaning()
        for _ in self._limits():
            self.assert_sum(value.inner(value), "noi,moi->nm", mine, mine)
            for other, theirs in self.partners():
                self.assert_sum(value.inner(other), "noi,moi->nm", mine, theirs)
                self.assert_sum(other.inner(value), "noi,moi->nm", theirs, mine)

    def test_project_is_dot_products_with_a_basis_of_any_size(self) -> None:
        meaning = self.meaning()
        for _ in self._limits():
            for k in (1, 2, meaning[0].size + 1, 0):
                basis = self.random(k, *meaning.shape[1:], seed=2)
                self.assert_sum(self.value().project(self.array(basis)), "noi,koi->nk", meaning, basis)

    def test_combine_is_weighted_sums_over_rows(self) -> None:
        meaning = self.meaning()
        for _ in self._limits():
            for k in (1, 3, 0):
                weights = self.random(k, len(meaning), seed=3)
                self.assert_sum(self.value().combine(self.array(weights)), "kn,noi->koi", weights, meaning)

    def test_sandwich_multiplies_on_both_sides(self) -> None:
        for _ in self._limits():
            for left, right in self._pairs_of_sides():
                got = self.value().sandwich(self._side(left), self._side(right))
                terms = _as_matrix(left, self.meaning().shape[1]), _as_matrix(right, self.meaning().shape[2])
                self.assert_sum(got.dense(), "po,noi,qi->npq", terms[0], self.meaning(), terms[1])
                self.assert_sum(got.inner(got), "npq,mpq->nm", host(got.dense()), host(got.dense()))

    def _pairs_of_sides(self) -> list[tuple[np.ndarray | None, np.ndarray | None]]:
        """None, a diagonal, a square matrix, and one that changes the size."""
        _, o, i = self.meaning().shape
        lefts = None, self.random(o, seed=4), self.random(o, o, seed=4), self.random(o + 1, o, seed=4)
        rights = None, self.random(i, seed=5), self.random(i, i, seed=5), self.random(i + 2, i, seed=5)
        return [(left, right) for left in lefts for right in rights]

    def _side(self, side: np.ndarray | None) -> Array | None:
        return None if side is None else self.array(side)

    def test_scale_is_elementwise(self) -> None:
        weights = self.random(*self.meaning().shape[1:], seed=6)
        self.assert_sum(self.value().scale(self.array(weights)).dense(), "noi,oi->noi", self.meaning(), weights)

    def test_weighted_is_a_number_for_each_row(self) -> None:
        weights = self.random(len(self.meaning()), seed=7)
        got = self.value().weighted(self.array(weights))
        self.assert_sum(got.dense(), "noi,n->noi", self.meaning(), weights)
        self.assert_sum(got.inner(self.value()), "noi,moi,n->nm", self.meaning(), self.meaning(), weights)

    def test_take_is_rows_in_the_order_asked(self) -> None:
        value, meaning = self.value(), self.meaning()
        last = len(meaning) - 1
        for index in (slice(0, 1), slice(1, None), slice(last, last + 5)):
            self.assert_same(value.take(index).dense(), meaning[index])
        backwards = np.arange(last, -1, -1)
        self.assert_same(value.take(self.array(backwards)).dense(), meaning[::-1])

    def test_chunks_are_all_rows_once_and_in_order(self) -> None:
        for _ in self._limits():
            found = [(rows, host(piece.dense())) for rows, piece in self.value().chunks(self.meaning()[0].size)]
            assert [row for rows, _ in found for row in range(rows.start, rows.stop)] == [*range(len(self.meaning()))]
            self.assert_same(np.concatenate([piece for _, piece in found]), self.meaning())

    def test_quadratic_is_weighted_squares_of_each_row(self) -> None:
        meaning = self.meaning()
        weights = self.random(*meaning.shape[1:], seed=8)
        for _ in self._limits():
            self.assert_sum(self.value().quadratic(), "noi->n", meaning**2)
            self.assert_sum(self.value().quadratic(self.array(weights)), "noi,oi->n", meaning**2, weights)

    def test_second_moment_is_weighted_squares_of_the_sandwich(self) -> None:
        _, o, i = self.meaning().shape
        weights, ones = self.random(len(self.meaning()), seed=9), np.ones(len(self.meaning()))
        for _ in self._limits():
            for left, right in self._pairs_of_sides():
                turned = np.einsum("po,noi,qi->npq", _as_matrix(left, o), self.meaning(), _as_matrix(right, i))
                sides = self._side(left), self._side(right)
                self.assert_sum(self.value().second_moment(None, *sides), "npq,n->pq", turned**2, ones)
                got = self.value().second_moment(self.array(weights), *sides)
                self.assert_sum(got, "npq,n->pq", turned**2, weights)

    def test_moments_of_all_rows_are_the_sum_of_those_of_each(self) -> None:
        for _ in self._limits():
            whole, each = (
                self.value().moments(),
                [self.value().take(slice(k, k + 1)).moments() for k in range(len(self.meaning()))],
            )
            self.assert_same_moments(whole, sum(each[1:], each[0]))

    def test_a_weight_of_two_counts_a_row_twice_in_the_moments(self) -> None:
        weights = np.arange(len(self.meaning())) % 3 + 1
        repeated = self.value().take(self.array(np.repeat(np.arange(len(weights)), weights)))
        for _ in self._limits():
            self.assert_same_moments(self.value().moments(self.array(weights.astype(float))), repeated.moments())

    def assert_same_moments(self, got: Moments, expected: Moments) -> None:
        for (_, mine), (_, wanted) in zip(field_values(got), field_values(expected), strict=True):
            self.assert_same(mine, wanted)

    def test_nothing_changes_the_value(self) -> None:
        value = self.value()
        before = [host(array).copy() for array in value.arrays]
        weights = self.array(self.random(2, value.rows))
        value.inner(value), value.combine(weights), value.weighted(weights[0]), value.second_moment(), value.moments()
        for array, kept in zip(value.arrays, before, strict=True):
            np.testing.assert_array_equal(host(array), kept)


def _as_matrix(side: np.ndarray | None, size: int) -> np.ndarray:
    if side is None:
        return np.eye(size)
    return np.diag(side) if side.ndim == 1 else side
