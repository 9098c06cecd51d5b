"""The inverse of an operator after part of its diagonal is taken away again.

1. A penalty on some parameters and not on others is a diagonal p. With m its largest entry,
   C + damping + diag(p) = A - E R E^T, where A = C + (damping + m) I, E picks the k parameters with p < m, and
   R = diag(m - p) there.
2. A^-1 is any method's inverse at the damping `damping + m`. By Woodbury's identity the wanted inverse is
   A^-1 + A^-1 E (R^-1 - E^T A^-1 E)^-1 E^T A^-1: as exact as A^-1 is, at the cost of k solves.

For a linear model E picks the intercepts: one for each output.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import numpy as np

from headwater.arrays import Array, identity, namespace, to_numpy, transpose
from headwater.errors import IndefiniteCurvature, InvalidSetting, SingularOperator
from headwater.gradients.block import BlockGradient
from headwater.operators.algebra import LinearOperator
from headwater.operators.iterative import unrecorded_solves
from headwater.operators.projected import ProjectedOperator
from headwater.types import BilinearForm

NOTHING = 1e4
"""Times eps: the share of the penalty taken away below which curvature is nothing but rounding."""


def penalised(invert: Callable[[float], LinearOperator], damping: float, penalty: Array | None) -> LinearOperator:
    """(C + damping I + diag(penalty))^-1, where `invert(d)` is (C + d I)^-1; penalty [D] is not negative.

    A projection has no place for single parameters: there the largest entry is damping, and no more is done.
    """
    if penalty is None:
        return invert(damping)
    # The largest entry goes in as damping, which every method can invert; the rest of the diagonal is corrected.
    most = namespace(penalty).max(penalty)
    inverse = invert(damping + float(most))
    missing = most - penalty
    if isinstance(inverse, ProjectedOperator) or not bool(namespace(penalty).any(missing > 0)):
        return inverse
    return PartialPenaltyInverse(inverse, missing)


class PartialPenaltyInverse(LinearOperator):
    """(A - E R E^T)^-1, given A^-1: `inner`; `missing_penalty` [D] is R, with zeros elsewhere.

    A direction with neither curvature nor penalty, once that is taken away (all intercepts of a softmax shifted by
    the same number) is left alone, if no gradient points there. Errors, when applied: SingularOperator where one does;
    IndefiniteCurvature.
    """

    def __init__(self, inner: LinearOperator, missing_penalty: Array):
        self.inner = inner
        self._missing = missing_penalty
        self._index = np.flatnonzero(to_numpy(missing_penalty))
        self.symmetric = inner.symmetric
        self.psd = inner.psd

    @property
    def input_size(self) -> int:
        return self.inner.input_size

    def as_bilinear_form(self) -> BilinearForm:
        """Errors: InvalidSetting where the inverse has a form of its own: it would keep the whole penalty."""
        if not self.inner.as_bilinear_form().is_default_of(self.inner):
            raise InvalidSetting(
                f"{type(self.inner).__name__} has a bilinear form of its own, which counts the penalty on parameters "
                "that it spares (an intercept), too. Use its matrix: <Op left, right>."
            )
        return super().as_bilinear_form()

    @cached_property
    def _correction(self) -> tuple[Array, Array, Array]:
        """(R^-1 - E^T A^-1 E)^-1 [k, k], its null space [k, null], and (A^-1 E)^T [k, D].

        Errors: IndefiniteCurvature.
        """
        # Solves for E are the library's own: a user's report is of the queries' solves.
        with unrecorded_solves():
            columns = self.inner.apply(identity(self.input_size, self._missing)[self._index])
        # R^-1 of step 2; the index picks only entries above zero, so that no division is by zero.
        room = 1.0 / self._missing[self._index]
        xp = namespace(columns)
        core = identity(len(self._index), columns) * room - columns[:, self._index]
        values, vectors = xp.linalg.eigh((core + transpose(core)) / 2)
        eps, most = float(xp.finfo(core.dtype).eps), float(xp.max(room))
        # The root of eps: the columns are solves, which are as exact as the inverse is, not as the dtype.
        if float(xp.min(values)) < -(eps**0.5) * most:
            raise IndefiniteCurvature(
                "On what the penalty spares (an intercept), the damped curvature is negative. Use more damping."
            )
        # Zero within rounding: no curvature and no penalty along that direction, so the inverse is left out there.
        empty = np.flatnonzero(to_numpy(xp.abs(values) <= NOTHING * eps * most))
        full = np.setdiff1d(np.arange(len(self._index)), empty)
        kept = vectors[:, full]
        return (kept / values[full]) @ transpose(kept), vectors[:, empty], columns

    def _apply(self, tensor: Array) -> Array:
        core, empty, columns = self._correction
        found = self.inner.apply(tensor)
        along = found[..., self._index]
        # A pseudo-inverse is right only for gradients without a share in the null space: softmax shifts have none.
        self._refuse_unpenalised(along, along @ empty)
        # Woodbury, step 2: A^-1 g + A^-1 E core E^T A^-1 g.
        return found + (along @ core) @ columns

    def _refuse_unpenalised(self, along: Array, unpenalised: Array) -> None:
        """Errors: SingularOperator for a vector with a share where there is no curvature and no penalty."""
        xp = namespace(along)
        if 0 in unpenalised.shape or 0 in along.shape:
            return
        if float(xp.max(xp.abs(unpenalised))) > float(xp.finfo(along.dtype).eps) ** 0.5 * float(xp.max(xp.abs(along))):
            raise SingularOperator(
                "In some direction of the parameters that the penalty spares (an intercept) the train rows have "
                "no curvature, and a gradient points there. Use more damping."
            )

    def seen(self, value: BlockGradient) -> BlockGradient:
        return self.inner.seen(value)

    def adjoint(self) -> LinearOperator:
        return self if self.symmetric else PartialPenaltyInverse(self.inner.adjoint(), self._missing)

    def trace(self) -> float:
        core, _, columns = self._correction
        xp = namespace(core)
        return self.inner.trace() + float(xp.sum(core * (columns @ transpose(columns))))

    def unpenalised_dof(self, shift: float) -> float:
        """tr(C M) - tr(C A^-1) for this operator M, where A = C + shift I: what the parameters add that lack penalty.

        M = A^-1 + K core K^T with K = A^-1 E, and C K = E - shift K, so that it is tr(core (E^T K - shift K^T K)).
        """
        core, _, columns = self._correction
        xp = namespace(core)
        return float(xp.sum(core * (columns[:, self._index] - shift * (columns @ transpose(columns)))))
