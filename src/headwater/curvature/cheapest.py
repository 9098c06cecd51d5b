"""The damped inverses of KFAC and EKFAC in the form in which pairs of rows meet in the fewest multiply-adds.

    form          the inverse spectrum [o, i]                               a pair of outer products takes
    dense         as it is                                                  o i
    a short sum   R outer products (`SeparableOperator`)                    R (o + i)
    parted        rows and columns that are alike, and a core [o', i'] of   2 i + o - i', and the core's o' i' or
                  the others, dense or a short sum (`PartedOperator`)       R (o' + i')

All are the same operator within a relative error of any entry of 1e-6 (float32; 1e-13 in float64), so that no score is
off by more than that times the geometric mean of the two rows' self-influences; see `operators.separation`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from headwater.arrays import Array, as_like, namespace, to_numpy, transpose
from headwater.curvature.separable import separate
from headwater.operators.algebra import LinearOperator
from headwater.operators.kronecker import (
    EigenKroneckerOperator,
    KroneckerOperator,
    SeparableOperator,
    SeparableScale,
    longest_sum,
    sum_cost,
)
from headwater.operators.parted import PartedOperator, PartedScale, parted_cost
from headwater.operators.separation import separate_inverse, tolerated
from headwater.operators.structured import DiagonalOperator

Terms = tuple[np.ndarray, np.ndarray, float]
"""u [R, o] and v [R, i] of a sum of outer products, and its error."""


def kfac_inverse(part: KroneckerOperator, damping: float, error: float | None = None) -> LinearOperator:
    """(left (x) right + damping I)^-1. error: the largest relative one of any entry; None for what rounding hides.

    Errors: as `EigenKroneckerOperator.inverse`.
    """
    inverse = part.eigen.inverse(damping)
    if damping <= 0:
        return inverse
    limit = _limit(part.right) if error is None else error

    def summed(order: SortedBasis) -> Terms | None:
        x, y = (v[mine] for v, mine in zip(part.eigenvalues_of_sides, (order.left, order.right), strict=True))
        k, m = order.cut
        return separate_inverse(x[k:], y[m:], damping, limit, longest_sum(*order.core_shape))

    most = SortedBasis.of(inverse, limit)
    terms = summed(most)
    order = most.where_it_pays(None if terms is None else len(terms[0]))
    return order.operator(inverse, terms if order is most else summed(order))


def ekfac_inverse(
    part: EigenKroneckerOperator, damping: float, rank: int | None = None, error: float | None = None
) -> LinearOperator:
    """(part + damping I)^-1. rank: of the sum that stands for the core, whatever its error; None for the exact one.

    Errors: as `EigenKroneckerOperator.inverse`.
    """
    inverse = part.inverse(damping)
    rank = None if rank is None or rank >= min(part.spectrum.shape) else rank
    order = SortedBasis.of(inverse, _limit(part.like) if error is None else error).where_it_pays(rank)
    if rank is None or rank >= min(order.core_shape):
        return order.operator(inverse, None)
    u, v, off = separate(order.core(inverse.spectrum), order.core(part.spectrum), rank)
    return order.operator(inverse, (to_numpy(u), to_numpy(v), off))


def _limit(like: Array) -> float:
    return tolerated(float(namespace(like).finfo(like.dtype).eps))


@dataclass(frozen=True, eq=False)
class SortedBasis:
    """The directions of both sides of an eigenbasis, those that are alike first: orders, and how many these are."""

    left: np.ndarray
    right: np.ndarray
    cut: tuple[int, int]
    error: float
    """The largest relative difference of an entry from its like."""

    @classmethod
    def of(cls, inverse: EigenKroneckerOperator, error: float) -> SortedBasis:
        spectrum, xp = inverse.spectrum, namespace(inverse.spectrum)
        # The first direction has the least eigenvalue: if any have no curvature, it is one of them.
        differences = [
            to_numpy(xp.max(abs(spectrum / spectrum[:1] - 1), axis=1)),
            to_numpy(xp.max(abs(spectrum / spectrum[:, :1] - 1), axis=0)),
        ]
        if inverse.left is None or inverse.right is None:  # a basis that is no matrix has no columns to sort
            return cls(_in_order(differences[0]), _in_order(differences[1]), (0, 0), 0.0)
        alike = [found <= error for found in differences]
        # At least one direction is left for the core.
        alike = [found if not found.all() else np.arange(len(found)) < len(found) - 1 for found in alike]
        # One alone is like itself, and saves nothing.
        alike = [found if found.sum() > 1 else np.zeros_like(found) for found in alike]
        left, right = (np.argsort(~found, kind="stable") for found in alike)
        off = max(float(d[found].max(initial=0.0)) for d, found in zip(differences, alike, strict=True))
        return cls(left, right, (int(alike[0].sum()), int(alike[1].sum())), off)

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.left), len(self.right)

    @property
    def core_shape(self) -> tuple[int, int]:
        return self.shape[0] - self.cut[0], self.shape[1] - self.cut[1]

    def where_it_pays(self, terms: int | None) -> SortedBasis:
        """Cut on both sides, on one or on none, whichever is cheapest. terms: of the core's sum; None: it is dense."""
        k, m = self.cut
        found = [self._with_cut(cut) for cut in ((k, m), (k, 0), (0, m), (0, 0))]
        return min(found, key=lambda order: order.cost(terms))

    def _with_cut(self, cut: tuple[int, int]) -> SortedBasis:
        if cut == self.cut:
            return self
        left, right = (
            order if size else _in_order(order) for order, size in zip((self.left, self.right), cut, strict=True)
        )
        return SortedBasis(left, right, cut, self.error if any(cut) else 0.0)

    def cost(self, terms: int | None) -> float:
        """Multiply-adds of a pair."""
        core = math.prod(self.core_shape)
        core = core if terms is None else min(core, sum_cost(terms, *self.core_shape))
        return parted_cost(self.shape, self.cut, core)

    def sorted(self, spectrum: Array) -> Array:
        xp = namespace(spectrum)
        rows, columns = (as_like(order, spectrum, xp.int64) for order in (self.left, self.right))
        return xp.take(xp.take(spectrum, rows, axis=0), columns, axis=1)

    def core(self, spectrum: Array) -> Array:
        return self.sorted(spectrum)[self.cut[0] :, self.cut[1] :]

    def operator(self, inverse: EigenKroneckerOperator, terms: Terms | None) -> LinearOperator:
        """The inverse, parted and with the terms for its core; as it is where neither is there."""
        like, (k, m) = inverse.like, self.cut
        sums = None if terms is None else SeparableScale(*(as_like(factor, like) for factor in terms[:2]))
        off = 0.0 if terms is None else terms[2]
        if not any(self.cut):
            return inverse if sums is None else SeparableOperator(inverse, sums.u, sums.v, truncation_error=off)
        exact = namespace(like).astype(self.sorted(inverse.spectrum), like.dtype)
        rest = exact[k:, m:] if sums is None else transpose(sums.u) @ sums.v
        core = DiagonalOperator(rest) if sums is None else sums
        scale = PartedScale(self.cut, exact[0], exact[k:, 0], core, rest)
        return PartedOperator(self._basis(inverse), scale, truncation_error=max(off, self.error))

    def _basis(self, inverse: EigenKroneckerOperator) -> EigenKroneckerOperator:
        left, right = self._columns(inverse.left, self.left), self._columns(inverse.right, self.right)
        return EigenKroneckerOperator(left, right, self.sorted(inverse.spectrum), like=inverse.like)

    @staticmethod
    def _columns(basis: Array | None, order: np.ndarray) -> Array | None:
        if basis is None:
            return None
        xp = namespace(basis)
        found: Array = xp.take(basis, as_like(order, basis, xp.int64), axis=1)
        return found


def _in_order(values: np.ndarray) -> np.ndarray:
    return np.arange(len(values))
