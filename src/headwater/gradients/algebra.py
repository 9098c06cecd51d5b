"""The gradient algebra: the verbs that every kind of per-sample gradient answers, and their dense meaning.

Layout: a gradient value holds n per-sample gradients of one part, each a matrix G_n [o, i]. Example: for one row of
`Linear(3, 2)` with bias, G is [2, 4], the outer product of the output-gradient [2] with the input and a one [4].

    verb                 meaning                                   result
    dense()              the matrices themselves                   [n, o, i]
    inner(other)         <G_n, H_m>, all pairs                     [n, m]
    project(basis)       <G_n, U_k>, basis [k, o, i]               [n, k]
    combine(weights)     sum_n w_kn G_n, weights [k, n]            [k, o, i]
    sandwich(L, R)       L G_n R^T                                 a gradient value
    scale(w)             w * G_n, elementwise, w [o, i]            a gradient value
    weighted(w)          w_n G_n, w [n]                            a gradient value
    take(index)          some rows                                 a gradient value
    quadratic(w)         sum_oi w_oi (G_n)_oi^2                    [n]
    second_moment(...)   sum_n w_n (L G_n R^T)_oi^2                [o, i]
    moments(...)         sums from which Kronecker factors follow  `Moments`

Each kind overrides what it can do faster; whichever route is taken gives the same number. A route is chosen by a
cost formula and bounded by `headwater.arrays.working_memory`, never by a user setting.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

from headwater.arrays import Array, accumulable, add_product, namespace, rows_within_memory, transpose, zeros_like


@dataclass(frozen=True)
class Moments:
    """Additive sums for a Kronecker approximation of the mean of vec(G) vec(G)^T.

    The approximation is left/left_count (x) right/right_count.

    `left` is [o, o], or [o] where it is diagonal; `right` is [i, i], or None where it was counted before.
    """

    left: Array
    right: Array | None
    left_count: Array | float
    right_count: Array | float

    def named(self) -> dict[str, Array | float]:
        """The sums by name; without `right` where it was counted before."""
        found = {"left": self.left, "left_count": self.left_count, "right_count": self.right_count}
        return found if self.right is None else {**found, "right": self.right}

    def __add__(self, other: Moments) -> Moments:
        right = self.right if other.right is None else other.right if self.right is None else self.right + other.right
        return Moments(
            self.left + other.left, right, self.left_count + other.left_count, self.right_count + other.right_count
        )


class Gradient(ABC):
    """n per-sample gradients of one part, each a matrix [o, i]."""

    @property
    @abstractmethod
    def rows(self) -> int:
        """n."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(o, i)."""

    @abstractmethod
    def dense(self) -> Array:
        """The matrices themselves: [n, o, i]."""

    @abstractmethod
    def take(self, index: slice | Array) -> Self:
        """Some rows, in the order of `index`."""

    @abstractmethod
    def weighted(self, weights: Array) -> Gradient:
        """Row n times weights[n]."""

    @property
    @abstractmethod
    def arrays(self) -> tuple[Array, ...]:
        """The floating-point arrays that hold it; their finiteness is the gradient's."""

    @property
    def positions(self) -> int | None:
        """How many outer products of positions each row is a sum of; None where it is not kept as such."""
        return None

    def chunks(self, numbers_per_row: int) -> Iterator[tuple[slice, Self]]:
        """The rows in pieces, so that `numbers_per_row` numbers for each fit into the working memory."""
        # At least one row, whatever it takes: less cannot be computed.
        step = rows_within_memory(numbers_per_row, self.arrays[0])
        for start in range(0, self.rows, step):
            rows = slice(start, min(start + step, self.rows))
            yield rows, self if step >= self.rows else self.take(rows)

    def cheapest_form(self, positions: int) -> Gradient:
        """In the form that meets many gradients of that many positions at the least cost: dense, if each would be."""
        return self

    def inner(self, other: Gradient) -> Array:
        """All pairs of dot products with the rows of `other`: [n, m]."""
        blocks = [transpose(other.project(piece.dense())) for _, piece in self.chunks(self.shape[0] * self.shape[1])]
        return _stack_rows(blocks, self.arrays[0], other.rows)

    def project(self, basis: Array) -> Array:
        """Against the matrices of a basis [k, o, i]: [n, k]."""
        flat = basis.reshape((basis.shape[0], self.shape[0] * self.shape[1]))
        blocks = [
            piece.dense().reshape((piece.rows, -1)) @ transpose(flat)
            for _, piece in self.chunks(self.shape[0] * self.shape[1])
        ]
        return _stack_rows(blocks, self.arrays[0], int(basis.shape[0]))

    def combine(self, weights: Array) -> Array:
        """Weighted sums over rows, weights [k, n]: [k, o, i]."""
        total = zeros_like(self.arrays[0], (int(weights.shape[0]), self.shape[0] * self.shape[1]))
        for rows, piece in self.chunks(self.shape[0] * self.shape[1]):
            total = add_product(total, transpose(weights[:, rows]), piece.dense().reshape((piece.rows, -1)))
        return total.reshape((int(weights.shape[0]), *self.shape))

    def sandwich(self, left: Array | None, right: Array | None) -> Gradient:
        """L G R^T for L [p, o] and R [q, i]; None stands for the identity, a vector for a diagonal matrix."""
        return Dense(multiply_right(multiply_left(left, self.dense()), right))

    def scale(self, weights: Array) -> Gradient:
        """Elementwise: weights [o, i]."""
        return Dense(self.dense() * weights)

    def quadratic(self, weights: Array | None = None) -> Array:
        """sum_oi w_oi G_oi^2 of each row: [n]. Without weights, the squared norm."""
        out = []
        for _, piece in self.chunks(self.shape[0] * self.shape[1]):
            flat = piece.dense().reshape((piece.rows, -1))
            # A dot product, not a sum of squares: an array of the gradients' size would be written between.
            out.append(namespace(flat).vecdot(flat, flat if weights is None else flat * weights.reshape((-1,))))
        return namespace(*out).concat(out, axis=0) if out else zeros_like(self.arrays[0], (0,))

    def second_moment(
        self, weights: Array | None = None, left: Array | None = None, right: Array | None = None
    ) -> Array:
        """sum_n w_n (L G_n R^T)_oi^2: [o, i]."""
        total = None
        for rows, piece in self.chunks(2 * self.shape[0] * self.shape[1]):
            moment = piece.sandwich(left, right).squares(None if weights is None else weights[rows])
            total = moment if total is None else total + moment
        return zeros_like(self.arrays[0], self.shape) if total is None else total

    def moments_with(self, others: Sequence[Gradient], weights: Array | None) -> Moments | None:
        """`moments` of these draws and others of the same rows at once; None where one by one is the only way."""
        return None

    def second_moment_with(
        self, others: Sequence[Gradient], weights: Array | None, left: Array | None, right: Array | None
    ) -> Array | None:
        """The sum of `second_moment` over this and other draws of the same rows; None where it saves nothing."""
        return None

    def squares(self, weights: Array | None) -> Array:
        """sum_n w_n G_n^2, elementwise: [o, i]. `second_moment` without the sandwich or the memory bound."""
        square = self.dense() ** 2
        xp = namespace(square)
        return xp.sum(square if weights is None else square * weights[:, None, None], axis=0)

    @property
    def moment_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of the left and the right sum that `moments` gives; known before anything is summed."""
        o, i = self.shape
        return (o, o), (i, i)

    def moments(self, weights: Array | None = None, again: bool = False) -> Moments:
        """Sums for Kronecker factors; `again` for another draw of rows that have been counted already.

        Without outer-product structure, Shampoo's factors: sum G G^T per row, and sum G^T G over its own trace. Exact
        where o or i is one. Source: Gupta et al. 2018, arXiv 1802.09568; George et al. 2018, arXiv 1806.03884.
        """
        left: Any = None
        right: Any = None
        count = norm = 0.0
        o, i = self.shape
        for rows, piece in self.chunks(2 * o * i):
            plain = piece.dense()
            mine = plain if weights is None else plain * weights[rows][:, None, None]
            xp = namespace(plain)
            swap = xp.permute_dims
            # sum_n w_n G_n G_n^T as one product: columns of all rows one below the other.
            left = add_product(left, swap(plain, (0, 2, 1)).reshape((-1, o)), swap(mine, (0, 2, 1)).reshape((-1, o)))
            right = add_product(right, plain.reshape((-1, i)), mine.reshape((-1, i)))
            count = count + (piece.rows if weights is None else xp.sum(weights[rows]))
            # tr(sum w G G^T): dividing the right factor by it makes the product's trace that of the curvature.
            norm = norm + xp.sum(plain * mine)
        # Not `norm`: each draw has one of its own, and they add up.
        return Moments(left, right, 0.0 if again else count, norm)


@dataclass(frozen=True, eq=False)
class Dense(Gradient):
    """The matrices themselves: values [n, o, i]."""

    values: Array

    @property
    def rows(self) -> int:
        return int(self.values.shape[0])

    @property
    def shape(self) -> tuple[int, int]:
        return int(self.values.shape[1]), int(self.values.shape[2])

    @property
    def arrays(self) -> tuple[Array, ...]:
        return (self.values,)

    def dense(self) -> Array:
        return self.values

    def take(self, index: slice | Array) -> Self:
        return type(self)(self.values[index])

    def weighted(self, weights: Array) -> Dense:
        return Dense(self.values * weights[:, None, None])

    def inner(self, other: Gradient) -> Array:
        return transpose(other.project(self.values))

    def project(self, basis: Array) -> Array:
        size = self.shape[0] * self.shape[1]  # not -1, which says nothing of a basis without rows
        return self.values.reshape((self.rows, size)) @ transpose(basis.reshape((basis.shape[0], size)))


@dataclass(frozen=True, eq=False)
class Sum(Gradient):
    """Several gradients of one and the same matrix, added: a weight that is used in two ways (a tied embedding)."""

    terms: tuple[Gradient, ...]

    @property
    def rows(self) -> int:
        return self.terms[0].rows

    @property
    def shape(self) -> tuple[int, int]:
        return self.terms[0].shape

    @property
    def arrays(self) -> tuple[Array, ...]:
        return tuple(array for term in self.terms for array in term.arrays)

    def dense(self) -> Array:
        return _total([term.dense() for term in self.terms])

    def take(self, index: slice | Array) -> Self:
        return type(self)(tuple(term.take(index) for term in self.terms))

    def weighted(self, weights: Array) -> Sum:
        return Sum(tuple(term.weighted(weights) for term in self.terms))

    def inner(self, other: Gradient) -> Array:
        others = other.terms if isinstance(other, Sum) else (other,)
        # Cross terms count: a tied weight's gradient is the sum of its uses, not the uses side by side.
        return _total([mine.inner(theirs) for mine in self.terms for theirs in others])

    def project(self, basis: Array) -> Array:
        return _total([term.project(basis) for term in self.terms])

    def combine(self, weights: Array) -> Array:
        return _total([term.combine(weights) for term in self.terms])

    def cheapest_form(self, positions: int) -> Gradient:
        terms = tuple(term.cheapest_form(positions) for term in self.terms)
        # One dense term already takes up o i numbers a row: the whole sum takes no more.
        return Dense(self.dense()) if any(isinstance(term, Dense) for term in terms) else Sum(terms)

    @property
    def moment_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        o, i = self.shape
        # Of the sparse term, a table's; see `RowSparse.moments`.
        return (o,), (i, i)

    def sandwich(self, left: Array | None, right: Array | None) -> Sum:
        return Sum(tuple(term.sandwich(left, right) for term in self.terms))

    def scale(self, weights: Array) -> Sum:
        return Sum(tuple(term.scale(weights) for term in self.terms))


def _total(arrays: Sequence[Array]) -> Array:
    total = arrays[0]
    for array in arrays[1:]:
        total = total + array
    return total


def _stack_rows(blocks: Sequence[Array], like: Array, columns: int) -> Array:
    if not blocks:
        return zeros_like(like, (0, columns))
    return blocks[0] if len(blocks) == 1 else namespace(*blocks).concat(list(blocks), axis=0)


def multiply_left(left: Array | None, values: Array) -> Array:
    """L G for values [n, o, i] and L [p, o], a diagonal [o], or None; one large product instead of n small ones."""
    if left is None:
        return values
    if left.ndim == 1:
        return values * left[:, None]
    xp = namespace(values)
    return xp.permute_dims(multiply_right(xp.permute_dims(values, (0, 2, 1)), left), (0, 2, 1))


def multiply_right(values: Array, right: Array | None) -> Array:
    """G R^T for values [n, o, i] and R [q, i], a diagonal [i], or None."""
    if right is None:
        return values
    if right.ndim == 1:
        return values * right
    n, o, i = values.shape
    return (values.reshape((n * o, i)) @ transpose(right)).reshape((n, o, int(right.shape[0])))


def draws_second_moment(
    draws: Sequence[Gradient], weights: Array | None, left: Array | None, right: Array | None
) -> Array:
    """The sum over draws (several output-gradients of the same rows) of `second_moment`."""
    first, *rest = draws
    together = first.second_moment_with(rest, weights, left, right)
    if together is not None:
        return accumulable(together)
    return _total([accumulable(draw.second_moment(weights, left, right)) for draw in draws])
