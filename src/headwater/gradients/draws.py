"""Several gradients of the same rows, one for each output or label draw, and the curvature that they sum to.

Draws of a row share the inputs of its layers. With K draws, Q vectors and T positions, sum_k g_k <g_k, v> costs about
2 T o i Q multiply-adds a row when v is contracted with the shared inputs first, and 2 K o i (Q + T) draw by draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from headwater.arrays import Array, add_product, as_like, namespace, rows_within_memory, summed, transpose
from headwater.blocks import Layout
from headwater.gradients.algebra import Gradient
from headwater.gradients.block import BlockGradient
from headwater.gradients.outer import Outer

Draws = Sequence[BlockGradient]


class DrawsProduct:
    """The sum over rows and draws of g <g, v>, for flat vectors v (Q, D) and rows that come in batches."""

    def __init__(self, layout: Layout, vectors: Array):
        self.layout = layout
        self._sides = [_PartProduct(basis) for basis in layout.split(vectors)]

    def add(self, draws: Draws, weights: Array | None = None) -> None:
        """More rows, each counted with its weight [n]."""
        # g <g, v>: first the dot product, then the sum, without a matrix g g^T.
        along = self.project(draws)
        self.combine(draws, along if weights is None else along * weights[:, None, None])

    def project(self, draws: Draws) -> Array:
        """Dot products of every draw of every row with the vectors: [n, q, k]."""
        products = [side.project([draw.parts[k] for draw in draws]) for k, side in enumerate(self._sides)]
        return sum(products[1:], products[0])

    def combine(self, draws: Draws, weights: Array) -> None:
        """Add the draws, weighted by [n, q, k]."""
        for k, side in enumerate(self._sides):
            side.combine([draw.parts[k] for draw in draws], weights)

    def include(self, other: DrawsProduct) -> None:
        """The rows of another product with the same vectors, too."""
        for mine, theirs in zip(self._sides, other._sides, strict=True):
            mine.include(theirs)

    @property
    def value(self) -> Array:
        """(Q, D)."""
        return self.layout.merge([side.total() for side in self._sides])


def squared_norms(draws: Draws) -> Array:
    """The sum over draws of each row's squared norm: [n]."""
    norms = [draw.squared_norms() for draw in draws]
    return sum(norms[1:], norms[0])


def are_single_products(value: BlockGradient) -> bool:
    """Whether each gradient is one outer product."""
    return all(isinstance(part, Outer) and part.positions == 1 for part in value.parts)


def principal(draws: list[BlockGradient]) -> list[BlockGradient]:
    """Other draws with the same sum of g g^T for each row: orthogonal ones, the longest first; the same ones if several
    positions, or other inputs than each other's, leave no cheap way to them.

    Any rotation of a row's draws among themselves leaves the sum. Its principal axes have most of it in the fewest.
    """
    firsts = [_with_inputs_of_all([draw.parts[k] for draw in draws]) for k in range(len(draws[0].parts))]
    shared = [first for first in firsts if first is not None and first.positions == 1]
    if len(draws) == 1 or len(shared) < len(firsts):
        return draws
    xp = namespace(draws[0].like)
    outputs = [_over_positions(_stacked([draw.parts[k] for draw in draws], slice(None))) for k in range(len(shared))]
    lengths = [xp.sum(first.a**2, axis=(1, 2)) + first.ones for first in shared]
    gram = summed((b @ transpose(b)) * a[:, None, None] for a, b in zip(lengths, outputs, strict=True))
    # Ascending: the last axis is the longest.
    axes = transpose(xp.linalg.eigh(gram)[1])
    turned = [axes @ b for b in outputs]  # [n, k, o]
    return [
        replace(
            draws[0],
            parts=tuple(replace(p, b=b[:, k : k + 1]) for p, b in zip(shared, turned, strict=True)),
        )
        for k in range(len(draws) - 1, -1, -1)
    ]


def _with_inputs_of_all(parts: Sequence[Gradient]) -> Outer | None:
    """The first, if all are outer products of its inputs: by identity, as draws of a row have them."""
    first = parts[0]
    if not isinstance(first, Outer) or not all(isinstance(p, Outer) and p.a is first.a for p in parts):
        return None
    return first


def inner_draws(value: BlockGradient, draws: Draws, rows: slice, chosen: np.ndarray) -> Array:
    """Dot products of gradients [m] with some draws of some rows: [m, c].

    chosen [c]: the draws' places, when these rows' n k are counted row by row.
    """
    products = (
        _inner_part(part, [draw.parts[k] for draw in draws], rows, chosen) for k, part in enumerate(value.parts)
    )
    total: Any = next(products)
    for product in products:
        # In place where the framework can: there are m c numbers.
        total += product
    return total


def _inner_part(part: Gradient, draws: Sequence[Gradient], rows: slice, chosen: np.ndarray) -> Array:
    first, xp = _with_inputs_of_all(draws), namespace(part.arrays[0])
    places, of_rows = (as_like(each, part.arrays[0], dtype=xp.int64) for each in (chosen, chosen // len(draws)))
    if first is None or not isinstance(part, Outer) or not part.positions == first.positions == 1:
        products = xp.stack([part.inner(draw.take(rows)) for draw in draws], axis=2)
        return xp.take(products.reshape((part.rows, -1)), places, axis=1)
    # (a . a') (b . b'), the first factor once for all draws of a row.
    inputs = part.a[:, 0] @ transpose(first.a[rows][:, 0])
    if part.ones and first.ones:
        inputs = inputs + 1
    outputs = _over_positions(_stacked(draws, rows))  # [n, k, o]
    found: Any = part.b[:, 0] @ transpose(xp.take(outputs.reshape((-1, outputs.shape[2])), places, axis=0))
    found *= xp.take(inputs, of_rows, axis=1)
    return found


class _PartProduct:
    """One part's share. basis [q, o, i]; sums [q, o, i], with a bias column apart where inputs end with a one."""

    def __init__(self, basis: Array):
        self.basis = basis
        self._sum: Array | None = None
        self._column: Array | None = None
        self._dense: Array | None = None
        self._transposed: dict[bool, Array] = {}

    def project(self, parts: Sequence[Gradient]) -> Array:
        first = _shared(parts, int(self.basis.shape[0]))
        xp = namespace(self.basis)
        if first is None:
            return xp.stack([part.project(self.basis) for part in parts], axis=2)
        q, o, _ = self.basis.shape
        # U a for all outputs and vectors at once, then one small product with each draw's b.
        flat, out, t = self._inputs_first(first.ones), [], first.positions
        for rows in _pieces(first, q, len(parts)):
            a, b = first.a[rows], _stacked(parts, rows)
            n = int(a.shape[0])
            along = (a.reshape((n * t, -1)) @ flat).reshape((n, t, q, o)) @ transpose(b)
            found = along[:, 0] if t == 1 else xp.sum(along, axis=1)
            if first.ones:
                # The bias column meets the ones: sum over t of b_t, without writing ones out.
                shift = xp.tensordot(_over_positions(b), self.basis[:, :, -1], axes=([2], [1]))
                found = found + transpose(shift)
            out.append(found)
        return out[0] if len(out) == 1 else xp.concat(out, axis=0)

    def combine(self, parts: Sequence[Gradient], weights: Array) -> None:
        q, o, i = self.basis.shape
        first = _shared(parts, int(q))
        if first is None:
            for k, part in enumerate(parts):
                product = part.combine(transpose(weights[:, :, k]))
                self._dense = product if self._dense is None else self._dense + product
            return
        xp, t = namespace(weights), first.positions
        for rows in _pieces(first, q, len(parts)):
            mine, b = weights[rows], _stacked(parts, rows)
            # Draws are summed, with their weights, before they meet the inputs that they share.
            along = (mine[:, None] @ b).reshape((int(mine.shape[0]) * t, q * o))
            inputs = first.a[rows].reshape((-1, i - first.ones))
            if first.ones:
                # Kept apart, as `_sum` has no column for ones that are not stored.
                column = xp.tensordot(mine, _over_positions(b), axes=([0, 2], [0, 1]))
                self._column = column if self._column is None else self._column + column
            self._sum = add_product(self._sum, along, inputs)

    def include(self, other: _PartProduct) -> None:
        self._sum, self._column, self._dense = (
            theirs if mine is None else mine if theirs is None else mine + theirs
            for mine, theirs in (
                (self._sum, other._sum),
                (self._column, other._column),
                (self._dense, other._dense),
            )
        )

    def total(self) -> Array:
        """[q, o, i]."""
        found = [] if self._dense is None else [self._dense]
        if self._sum is not None:
            q, o, _ = self.basis.shape
            whole = self._sum.reshape((q, o, -1))
            if self._column is not None:
                whole = namespace(whole).concat([whole, self._column.reshape((q, o, 1))], axis=2)
            found.append(whole)
        return sum(found[1:], found[0]) if found else self.basis * 0

    def _inputs_first(self, ones: bool) -> Array:
        """The basis as [i, q o], without the bias column."""
        # The same for every batch: transposed once, for products that read it by columns.
        if ones not in self._transposed:
            basis = self.basis[:, :, :-1] if ones else self.basis
            self._transposed[ones] = transpose(basis.reshape((-1, int(basis.shape[2]))))
        return self._transposed[ones]


def _pieces(first: Outer, vectors: int, draws: int) -> list[slice]:
    """Rows whose products with all vectors fit into the working memory."""
    step = rows_within_memory(first.positions * int(vectors) * (first.shape[0] + draws), first.a)
    return [slice(start, start + step) for start in range(0, first.rows, step)]


def _stacked(parts: Sequence[Any], rows: slice) -> Array:
    """Output-gradients of some rows, all draws: [n, t, k, o]."""
    return namespace(parts[0].arrays[0]).stack([part.b[rows] for part in parts], axis=2)


def _over_positions(b: Array) -> Array:
    """[n, t, k, o] to [n, k, o]."""
    return b[:, 0] if b.shape[1] == 1 else namespace(b).sum(b, axis=1)


def _shared(parts: Sequence[Gradient], vectors: int) -> Outer | None:
    """The first draw, if all have its inputs and contracting with these first is the cheaper way; else None."""
    first = _with_inputs_of_all(parts)
    if first is None:
        return None
    (o, i), t, k = first.shape, first.positions, len(parts)
    # Multiply-adds of a row; see the module's text.
    together = t * vectors * o * (i + k)
    one_by_one = k * o * i * (vectors + (t if t > 1 else 0))
    return first if together <= one_by_one else None
