"""Gradients kept as what they are: outer products of inputs and output-gradients, summed over positions.

Layouts:
- `Outer`: inputs a [n, t, i], output-gradients b [n, t, o]; G_n = sum_t b_nt a_nt^T is [o, i]. With `ones`, every input
  has a further entry 1 that is not stored (the bias column), and G_n is [o, i + 1].
- `RowSparse`: ids [n, t], values [n, t, d]; G_n = sum_t e_(ids_nt) values_nt^T is [vocabulary, d]. Never one-hot.
- Either may have `kept` [n, t], one for a position that the row has and zero for padding. Padding has no part in the
  gradient (a zero output-gradient); `kept` says that it does not count among the inputs of a Kronecker factor either.

Costs in multiply-adds per row (T positions): stored T (o + i); made dense T o i; a pair by the ghost form T T' (o + i)
against o i once both are dense. At T = 1 the ghost form is nearly free.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from headwater.arrays import (
    Array,
    add_product,
    as_like,
    device,
    gram_by_rows,
    is_positions_last,
    namespace,
    rows_within_memory,
    scatter_rows,
    transpose,
    zeros_like,
)
from headwater.gradients.algebra import Dense, Gradient, Moments, Sum, multiply_left, multiply_right

LARGE_PRODUCT = 500_000
"""Multiply-adds above which a matrix product outweighs the call that starts it."""


@dataclass(frozen=True, eq=False)
class Outer(Gradient):
    """Sums over positions of outer products: a [n, t, i], b [n, t, o]."""

    a: Array
    b: Array
    ones: bool = False
    kept: Array | None = None

    @property
    def rows(self) -> int:
        return int(self.a.shape[0])

    @property
    def positions(self) -> int:
        return int(self.a.shape[1])

    @property
    def shape(self) -> tuple[int, int]:
        return int(self.b.shape[2]), int(self.a.shape[2]) + self.ones

    @property
    def arrays(self) -> tuple[Array, ...]:
        return self.a, self.b

    def take(self, index: slice | Array) -> Self:
        return replace(self, a=self.a[index], b=self.b[index], kept=_taken(self.kept, index))

    def weighted(self, weights: Array) -> Outer:
        return replace(self, b=self.b * weights[:, None, None])

    def join(self, other: Outer) -> Outer:
        """The sum of two gradients of the same matrix: more positions."""
        xp, mine, theirs = namespace(self.a), self, other
        if mine.ones != theirs.ones:
            mine, theirs = mine.bordered(), theirs.bordered()
        a, b = xp.concat([mine.a, theirs.a], axis=1), xp.concat([mine.b, theirs.b], axis=1)
        return Outer(a, b, mine.ones, _joined_kept((mine.kept, mine.a), (theirs.kept, theirs.a)))

    def bordered(self) -> Outer:
        """The ones written out as a last entry of every input."""
        if not self.ones:
            return self
        xp = namespace(self.a)
        column = xp.ones_like(self.a[:, :, :1])
        return Outer(xp.concat([self.a, column], axis=2), self.b, kept=self.kept)

    def dense(self) -> Array:
        if self.ones and 1 < self.shape[0] < self.positions:
            # The bias column beside a small matrix, not a column of ones beside larger inputs: each is a whole copy.
            matrix = transpose(self.b) @ self.a
            return namespace(matrix).concat([matrix, namespace(self.b).sum(self.b, axis=1)[:, :, None]], axis=2)
        full = self.bordered()
        if self.positions == 1:
            # A broadcast, not n matrix products of one column with one row.
            return full.b[:, 0, :, None] * full.a[:, 0, None, :]
        return transpose(full.b) @ full.a

    def inner(self, other: Gradient) -> Array:
        if not isinstance(other, Outer):
            # The other kinds know how to meet an outer product; <G, H> is symmetric.
            return transpose(other.inner(self))
        if self._ghost_is_cheaper(other):
            return self._ghost_inner(other)
        # One of the two is made dense: the one with fewer rows. The other meets it chunk by chunk.
        small, large = (self, other) if self.rows <= other.rows else (other, self)
        scores = large.project(small.dense())
        return scores if large is self else transpose(scores)

    def cheapest_form(self, positions: int) -> Gradient:
        (o, i), t = self.shape, self.positions
        # Each later meeting costs t t' (o + i) as outer products and o i once dense; at one position products are the
        # fastest there is.
        return self if t * positions * (o + i) <= o * i or t == positions == 1 else Dense(self.dense())

    def _ghost_is_cheaper(self, other: Outer) -> bool:
        (o, i), n, m = self.shape, self.rows, other.rows
        # Multiply-adds of each form, including what making the rows dense costs; see the module's text.
        ghost = n * m * self.positions * other.positions * (o + i)
        dense = (n * self.positions + m * other.positions) * o * i + n * m * o * i
        return ghost <= dense

    def _ghost_inner(self, other: Outer) -> Array:
        """sum over t, t' of (a_nt . a_mt') (b_nt . b_mt'): Gram matrices over positions, never a gradient."""
        t, s, xp = self.positions, other.positions, namespace(self.a)
        a, b = transpose(other.a.reshape((other.rows * s, -1))), transpose(other.b.reshape((other.rows * s, -1)))
        # Both end with a one that is not stored: its product is 1 in every entry of the Gram matrix.
        out, one = [], 1 if self.ones and other.ones else 0
        if self.ones != other.ones:
            return self.bordered()._ghost_inner(other.bordered())
        # Two Gram matrices [n t, m s] at a time, of inputs and of output-gradients.
        step = rows_within_memory(2 * t * s * other.rows, self.a)
        for start in range(0, self.rows, step):
            mine = self.take(slice(start, start + step))
            grams = mine.a.reshape((mine.rows * t, -1)) @ a
            # In place where the framework can: the products are of this call alone, and as large as the scores.
            if one:
                grams += one
            grams *= mine.b.reshape((mine.rows * t, -1)) @ b
            out.append(grams if t == s == 1 else xp.sum(grams.reshape((mine.rows, t, other.rows, s)), axis=(1, 3)))
        if not out:
            return zeros_like(self.a, (0, other.rows))
        return out[0] if len(out) == 1 else xp.concat(out, axis=0)

    def project(self, basis: Array) -> Array:
        """At many positions, dense rows against the basis. At one, sum_o b_no (U_ko . a_n), nothing made dense."""
        (o, i), k = self.shape, int(basis.shape[0])
        if self.positions > 1:
            return super().project(basis)
        full = self.bordered()
        xp, a, b = namespace(self.a), transpose(full.a[:, 0]), transpose(full.b[:, 0])
        # Large products keep the machine busy one by one; small ones are better done at once, at the cost of [k, o, n].
        if self.rows * k * i >= LARGE_PRODUCT:
            total = zeros_like(self.a, (k, self.rows))
            # Output by output: the product of all at once would hold [k, o, n].
            for row in range(o):
                total += basis[:, row] @ (a * b[row])
            return transpose(total)
        out = []
        for rows, _ in full.chunks(k * o):
            some = a[:, rows]
            turned = (basis.reshape((k * o, i)) @ some).reshape((k, o, int(some.shape[1])))
            out.append(xp.sum(turned * b[:, rows], axis=1))
        return transpose(xp.concat(out, axis=1)) if out else zeros_like(self.a, (0, k))

    def combine(self, weights: Array) -> Array:
        k = int(weights.shape[0])
        # Dense rows are made once for all k; for a single sum, weights on b and one product are cheaper.
        if k > 1 and self.positions > 1:
            return super().combine(weights)
        full, (o, i) = self.bordered(), self.shape
        a = full.a.reshape((-1, i))
        xp = namespace(a)
        sums = [transpose((full.b * w[:, None, None]).reshape((-1, o))) @ a for w in weights]
        return xp.stack(sums, axis=0) if sums else zeros_like(self.a, (0, o, i))

    def sandwich(self, left: Array | None, right: Array | None) -> Gradient:
        """On the factors while they are the cheaper thing to hold; else each side is turned where it is smaller."""
        t, (o, i) = self.positions, self.shape
        if t * (o + i) <= o * i or t == 1:
            return self._turn(left, right)
        # Turning a factor costs t o^2 (or t i^2), turning the dense matrix i o^2 (o i^2): each side where it is
        # smaller.
        first_left, first_right = t <= i, t <= o
        turned = self._turn(left if first_left else None, right if first_right else None)
        values = multiply_left(None if first_left else left, turned.dense())
        return Dense(multiply_right(values, None if first_right else right))

    def scale(self, weights: Array) -> Gradient:
        values: Any = self.dense()
        if values.dtype != weights.dtype:
            return Dense(values * weights)
        # In place, where the framework can: the values are nobody else's, and a second array of their size costs more
        # (in fresh pages) than the product.
        values *= weights
        return Dense(values)

    def _turn(self, left: Array | None, right: Array | None) -> Outer:
        b = multiply_right(self.b, left)
        if right is None:
            return replace(self, b=b)
        if not self.ones:
            return Outer(multiply_right(self.a, right), b)
        # A diagonal acts on the ones as well: they are no ones any more, and are written out.
        if right.ndim == 1:
            return Outer(multiply_right(self.bordered().a, right), b)
        # [a, 1] R^T = a R'^T + r, with r the last column of R: nothing has to be written out.
        return Outer(multiply_right(self.a, right[:, :-1]) + right[:, -1], b)

    def quadratic(self, weights: Array | None = None) -> Array:
        if self.positions > 1:
            return super().quadratic(weights)
        xp = namespace(self.a)
        if weights is None:
            a, b = self.a[:, 0], self.b[:, 0]
            # |b a^T|^2 = |a|^2 |b|^2, and the stored inputs lack the one.
            return (xp.vecdot(a, a) + (1 if self.ones else 0)) * xp.vecdot(b, b)
        full = self.bordered()
        return xp.vecdot((full.b[:, 0] ** 2) @ weights, full.a[:, 0] ** 2)

    def squares(self, weights: Array | None) -> Array:
        if self.positions > 1:
            return super().squares(weights)
        full = self.bordered()
        b = full.b[:, 0] ** 2
        return transpose(b if weights is None else b * weights[:, None]) @ full.a[:, 0] ** 2

    def second_moment_with(
        self, others: Sequence[Gradient], weights: Array | None, left: Array | None, right: Array | None
    ) -> Array | None:
        """At one position, draws that share their inputs need one product for all; None if these do not."""
        b = self._draws(others)
        if b is None:
            return None
        a = self._turn(None, right).bordered().a
        # sum_k (b_k a)^2 = (sum_k b_k^2) a^2: the inputs are squared and multiplied once.
        squares = namespace(b).sum(multiply_right(b, left) ** 2, axis=1)
        return transpose(squares if weights is None else squares * weights[:, None]) @ a[:, 0] ** 2

    def moments_with(self, others: Sequence[Gradient], weights: Array | None) -> Moments | None:
        """At one position, draws that share their inputs are so many more output-gradients in one product."""
        b = self._draws(others)
        return None if b is None else replace(self, b=b).moments(weights)

    def _draws(self, others: Sequence[Gradient]) -> Array | None:
        """The output-gradients of all draws side by side, [n, k, o], if all have one position and these inputs."""
        # Identity, not equality: draws of one batch share the very array.
        draws = [self, *(d for d in others if isinstance(d, Outer) and d.a is self.a)]
        if self.positions > 1 or len(draws) <= len(others):
            return None
        return self.b if len(draws) == 1 else namespace(self.b).concat([draw.b for draw in draws], axis=1)

    def moments(self, weights: Array | None = None, again: bool = False) -> Moments:
        """Sums over rows and positions of b b^T and a a^T; means over rows, and positions, follow by the counts."""
        o, xp = self.shape[0], namespace(self.a)
        # Padding has b = 0 and adds nothing; but means need the count of rows, not of positions, here.
        left = _gram(None, self.b, None if weights is None else weights[:, None, None], o)
        # Another draw of the same rows: their inputs, and the rows themselves, were counted with the first.
        if again:
            return Moments(left, None, 0.0, 0.0)
        weighted, rows, positions = _counted(self.a, self.kept, weights)
        right = self.inputs_gram(weighted)
        if self.ones:
            a = self.a if weighted is None else self.a * weighted
            # The ones' row and column of sum [a, 1][a, 1]^T: sums of inputs, and in the corner how many positions there
            # are.
            column = xp.sum(a, axis=(0, 1))[:, None]
            corner = as_like(positions, self.a).reshape((1, 1))
            right = xp.concat(
                [xp.concat([right, column], axis=1), xp.concat([transpose(column), corner], axis=1)], axis=0
            )
        return Moments(left, right, rows, positions)

    def inputs_gram(self, weights: Array | None) -> Array:
        """The sum over rows and positions of w a a^T, [i, i]; weights [n, t or 1, 1], or None for one."""
        return _gram(None, self.a, weights, int(self.a.shape[2]))


def _counted(like: Array, kept: Array | None, weights: Array | None) -> tuple[Any, Any, Any]:
    """How much each position counts, [n, t or 1, 1] (None: one), and the total weights of rows and of positions."""
    xp, (n, t) = namespace(like), like.shape[:2]
    rows = n if weights is None else xp.sum(weights)
    if kept is None:
        return None if weights is None else weights[:, None, None], rows, rows * t
    counted = xp.astype(kept, like.dtype)[:, :, None]
    counted = counted if weights is None else counted * weights[:, None, None]
    return counted, rows, xp.sum(counted)


def _taken(kept: Array | None, index: slice | Array) -> Array | None:
    return None if kept is None else kept[index]


def _joined_kept(*uses: tuple[Array | None, Array]) -> Array | None:
    """The positions of several uses [n, t_k, ...] side by side; all of a use without `kept` count."""
    if all(kept is None for kept, _ in uses):
        return None
    xp = namespace(uses[0][1])
    dtype = uses[0][1].dtype
    return xp.concat(
        [xp.ones_like(like[:, :, 0]) if kept is None else xp.astype(kept, dtype) for kept, like in uses], axis=1
    )


def _gram(total: Array | None, rows: Array, weights: Array | None, size: int) -> Array:
    """total + the sum over rows and positions of w a a^T, for a [n, t, size]."""
    if total is None and int(rows.shape[1]) * size * size >= LARGE_PRODUCT and is_positions_last(rows):
        return gram_by_rows(rows, weights)
    flat = rows.reshape((-1, size))
    if weights is None:
        return add_product(total, flat, flat)
    return add_product(total, (rows * weights).reshape((-1, size)), flat)


@dataclass(frozen=True, eq=False)
class RowSparse(Gradient):
    """Sums over positions of vectors that belong to rows of a table: ids [n, t], values [n, t, d]; `size` rows."""

    ids: Array
    values: Array
    size: int
    kept: Array | None = None

    @property
    def rows(self) -> int:
        return int(self.ids.shape[0])

    @property
    def shape(self) -> tuple[int, int]:
        return self.size, int(self.values.shape[2])

    @property
    def arrays(self) -> tuple[Array, ...]:
        return (self.values,)

    def take(self, index: slice | Array) -> Self:
        return replace(self, ids=self.ids[index], values=self.values[index], kept=_taken(self.kept, index))

    def weighted(self, weights: Array) -> RowSparse:
        return replace(self, values=self.values * weights[:, None, None])

    def join(self, other: RowSparse) -> RowSparse:
        """The sum of two gradients of the same table: more positions."""
        xp = namespace(self.values)
        ids, values = xp.concat([self.ids, other.ids], axis=1), xp.concat([self.values, other.values], axis=1)
        kept = _joined_kept((self.kept, self.values), (other.kept, other.values))
        return replace(self, ids=ids, values=values, kept=kept)

    def _coalesced(self) -> RowSparse:
        """Positions with the same id in one row added up at the first of them; the others become zero."""
        # A square is not linear: (v_1 + v_2)^2 for an id that a row has twice, so that these are added up first.
        same = self.ids[:, :, None] == self.ids[:, None, :]
        xp, t = namespace(self.values), int(self.ids.shape[1])
        order = xp.arange(t, device=device(self.ids))
        earlier = order[:, None] > order[None, :]
        # Shapes must not depend on data (JAX compiles them): doubles stay, as zeros.
        first = ~xp.any(same & earlier, axis=2)
        summed = xp.astype(same, self.values.dtype) @ self.values
        return replace(self, values=summed * xp.astype(first, self.values.dtype)[:, :, None])

    def dense(self) -> Array:
        n, t = self.ids.shape
        xp = namespace(self.ids)
        # One scatter for all rows: row n's table begins at n times its size.
        offset = xp.arange(n, dtype=self.ids.dtype, device=device(self.ids))[:, None] * self.size
        values = self.values.reshape((n * t, self.shape[1]))
        flat = scatter_rows(values, (self.ids + offset).reshape((-1,)), n * self.size)
        return flat.reshape((n, *self.shape))

    def inner(self, other: Gradient) -> Array:
        """Rows meet only on shared ids."""
        if isinstance(other, Sum):
            return transpose(other.inner(self))
        if isinstance(other, Outer):
            return self._inner_outer(other.bordered())
        if not isinstance(other, RowSparse):
            return transpose(other.inner(self))
        t, s = int(self.ids.shape[1]), int(other.ids.shape[1])
        # As many pairs of positions as the table has rows: dense rows are cheaper then.
        if t * s > self.size:
            return super().inner(other)
        xp, flat, out = namespace(self.values), transpose(other.values.reshape((other.rows * s, -1))), []
        for _, mine in self.chunks(2 * t * s * other.rows):
            grams = (mine.values.reshape((mine.rows * t, -1)) @ flat).reshape((mine.rows, t, other.rows, s))
            # Different ids are different rows of the table, which are orthogonal.
            same = mine.ids[:, :, None, None] == other.ids[None, None]
            out.append(xp.sum(grams * xp.astype(same, grams.dtype), axis=(1, 3)))
        return xp.concat(out, axis=0) if out else zeros_like(self.values, (0, other.rows))

    def _inner_outer(self, other: Outer) -> Array:
        """The cross term of a tied table: sum over t, s of b_ms[ids_nt] (values_nt . a_ms)."""
        xp, out = namespace(self.values), []
        t, s, m = int(self.ids.shape[1]), other.positions, other.rows
        a, b = transpose(other.a.reshape((m * s, -1))), other.b.reshape((m * s, -1))
        for _, mine in self.chunks(2 * t * s * m):
            ids = mine.ids.reshape((-1,))
            # Row ids_nt of sum_s b_ms a_ms^T is sum_s b_ms[ids_nt] a_ms: the one-hot side is a look-up.
            grams = (mine.values.reshape((mine.rows * t, -1)) @ a) * transpose(xp.take(b, ids, axis=1))
            out.append(xp.sum(grams.reshape((mine.rows, t, m, s)), axis=(1, 3)))
        return xp.concat(out, axis=0) if out else zeros_like(self.values, (0, m))

    def project(self, basis: Array) -> Array:
        xp, out = namespace(self.values), []
        t, d = self.ids.shape[1], self.values.shape[2]
        for _, mine in self.chunks(2 * int(basis.shape[0]) * int(t) * int(d)):
            rows = xp.take(basis, mine.ids.reshape((-1,)), axis=1)
            rows = rows.reshape((int(basis.shape[0]), mine.rows, t * d))
            out.append(transpose(xp.sum(rows * mine.values.reshape((1, mine.rows, t * d)), axis=2)))
        return xp.concat(out, axis=0) if out else zeros_like(self.values, (0, int(basis.shape[0])))

    def combine(self, weights: Array) -> Array:
        xp, ids = namespace(self.values), self.ids.reshape((-1,))
        sums = [
            scatter_rows((self.values * w[:, None, None]).reshape((-1, self.shape[1])), ids, self.size) for w in weights
        ]
        return xp.stack(sums, axis=0) if sums else zeros_like(self.values, (0, *self.shape))

    def sandwich(self, left: Array | None, right: Array | None) -> Gradient:
        # A full matrix mixes the table's rows: the result is no longer sparse.
        if left is not None and left.ndim == 2:
            return Dense(multiply_right(multiply_left(left, self.dense()), right))
        values = self.values if left is None else self.values * left[self.ids][:, :, None]
        return replace(self, values=multiply_right(values, right))

    def scale(self, weights: Array) -> RowSparse:
        return replace(self, values=self.values * weights[self.ids])

    def quadratic(self, weights: Array | None = None) -> Array:
        xp, square = namespace(self.values), self._coalesced().values ** 2
        return xp.sum(square if weights is None else square * weights[self.ids], axis=(1, 2))

    def second_moment(
        self, weights: Array | None = None, left: Array | None = None, right: Array | None = None
    ) -> Array:
        if left is not None and left.ndim == 2:
            return super().second_moment(weights, left, right)
        t, total = int(self.ids.shape[1]), None
        for rows, piece in self.chunks(2 * t * t):
            moment = piece.sandwich(left, right).squares(None if weights is None else weights[rows])
            total = moment if total is None else total + moment
        return zeros_like(self.values, self.shape) if total is None else total

    def squares(self, weights: Array | None) -> Array:
        square = self._coalesced().values ** 2
        square = square if weights is None else square * weights[:, None, None]
        return scatter_rows(square.reshape((-1, self.shape[1])), self.ids.reshape((-1,)), self.size)

    @property
    def moment_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        o, i = self.shape
        return (o,), (i, i)

    def moments(self, weights: Array | None = None, again: bool = False) -> Moments:
        """The table's side is diagonal, the frequencies of the ids; the other side is sum values values^T.

        The roles of left and right are those of a linear map applied to one-hot ids: left carries the inputs here.
        """
        xp, (n, t) = namespace(self.values), self.ids.shape
        each = xp.ones_like(self.values[:, :, :1])
        counted, total, positions = _counted(each, self.kept, weights)
        counted = each if counted is None else each * counted
        # One-hot inputs are orthogonal: their second moment is diagonal, with how often each id occurs.
        counts = scatter_rows(counted.reshape((-1, 1)), self.ids.reshape((-1,)), self.size)[:, 0]
        each = each if weights is None else each * weights[:, None, None]
        flat = self.values.reshape((n * t, -1))
        right = add_product(None, flat if weights is None else (self.values * each).reshape((n * t, -1)), flat)
        if again:
            return Moments(counts * 0.0, right, 0.0, 0.0)
        return Moments(counts, right, positions, total)


def with_inputs(value: Gradient, first: Gradient) -> Gradient:
    """The same layer inputs as the first draw's, so that what depends on them alone is computed once."""
    if isinstance(value, Outer) and isinstance(first, Outer):
        return replace(value, a=first.a)
    if isinstance(value, RowSparse) and isinstance(first, RowSparse):
        return replace(value, ids=first.ids)
    return value
