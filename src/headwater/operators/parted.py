"""Inverse spectra whose rows, or columns, are alike but for those of the directions that have curvature.

Units that are never active, pixels that are always zero and directions in which no gradient points: what rounding left
of the curvature there is levelled by the fit, or far below the damping. Once the eigenbasis is sorted so that such
directions come first, the inverse spectrum [o, i] is, with k rows and m columns that are alike,

    rows 0..k      | across [i], the same for each row                |
    rows k..o      | down [o - k], for each column | core [o - k, i - m] |

and two outer products meet for o + i + m multiply-adds, and those of the core, in place of o i. Nothing is subtracted,
so that nothing cancels.
"""

from __future__ import annotations

import math
from functools import cached_property

from headwater.arrays import Array, namespace, zeros_like
from headwater.gradients.algebra import Gradient
from headwater.gradients.outer import Outer
from headwater.gradients.tiled import Tiled
from headwater.operators.algebra import LinearOperator, ProductOperator
from headwater.operators.kronecker import SUMMING, EigenKroneckerOperator, SeparableScale
from headwater.operators.spectrum import Spectrum
from headwater.operators.structured import DiagonalOperator


def parted_cost(shape: tuple[int, int], cut: tuple[int, int], core: float) -> float:
    """Multiply-adds of a pair, of which those of the core are `core`; see the module's text."""
    (o, i), (k, m) = shape, cut
    top = k + i + SUMMING if k else 0
    side = o - k + m + SUMMING if m else 0
    return top + side + core


class Parting(LinearOperator):
    """Every matrix [o, i] to itself; an outer product becomes three `Tiled` ones, cut behind row k and column m."""

    symmetric = psd = True

    def __init__(self, shape: tuple[int, int], cut: tuple[int, int]):
        self.shape, self.cut = shape, cut

    @property
    def input_size(self) -> int:
        return math.prod(self.shape)

    def _apply(self, tensor: Array) -> Array:
        return tensor

    def apply_gradient(self, value: Gradient) -> Gradient:
        return self.tiled(value) if isinstance(value, Outer) else value

    def tiled(self, value: Outer) -> Tiled:
        full, (k, m) = value.bordered(), self.cut
        a, b = full.a, full.b
        return Tiled(Outer(a, b[:, :, :k]), Outer(a[:, :, :m], b[:, :, k:]), Outer(a[:, :, m:], b[:, :, k:]))

    def adjoint(self) -> Parting:
        return self

    def trace(self) -> float:
        return float(self.input_size)


class PartedScale(LinearOperator):
    """Elementwise by a spectrum [o, i]: `across` [i] in its first k rows, `down` [o - k] in the first m columns of the
    others, and the core [o - k, i - m] in the rest.
    """

    symmetric = True

    def __init__(
        self, cut: tuple[int, int], across: Array, down: Array, core: DiagonalOperator | SeparableScale, rest: Array
    ):
        """core: what the rest is multiplied by; rest: the same as a matrix."""
        self.across, self.down, self.core, self.rest = across, down, core, rest
        self.parting = Parting((cut[0] + int(down.shape[0]), int(across.shape[0])), cut)

    @property
    def input_size(self) -> int:
        return self.parting.input_size

    @cached_property
    def spectrum(self) -> Array:
        """What is multiplied by, [o, i]."""
        xp, (k, m) = namespace(self.across), self.parting.cut
        top = xp.stack([self.across] * k, axis=0) if k else self.across[None][:0]
        side = xp.stack([self.down] * m, axis=1) if m else self.down[:, None][:, :0]
        return xp.concat([top, xp.concat([side, self.rest], axis=1)], axis=0)

    def _apply(self, tensor: Array) -> Array:
        return tensor * self.spectrum.reshape((-1,))

    def apply_gradient(self, value: Gradient) -> Gradient:
        if not isinstance(value, Outer):
            return value.scale(self.spectrum)
        tiles = self.parting.tiled(value)
        return Tiled(
            tiles.top.sandwich(None, self.across),
            tiles.side.sandwich(self.down, None),
            self.core.apply_gradient(tiles.rest),
        )

    @cached_property
    def expansion(self) -> SeparableScale | None:
        """The whole of it as a sum of outer products, where the core is one."""
        if not isinstance(self.core, SeparableScale):
            return None
        xp, (k, m), u, v = namespace(self.across), self.parting.cut, self.core.u, self.core.v
        (terms, rows), columns = u.shape, int(v.shape[1])
        ones, zeros = xp.ones_like(self.across[:1]), zeros_like
        return SeparableScale(
            xp.concat(
                [
                    xp.concat([zeros(u, (1, k)) + ones, zeros(u, (1, rows))], axis=1),
                    xp.concat([zeros(u, (1, k)), self.down[None]], axis=1),
                    xp.concat([zeros(u, (terms, k)), u], axis=1),
                ],
                axis=0,
            ),
            xp.concat(
                [
                    self.across[None],
                    xp.concat([zeros(v, (1, m)) + ones, zeros(v, (1, columns))], axis=1),
                    xp.concat([zeros(v, (terms, m)), v], axis=1),
                ],
                axis=0,
            ),
        )

    def adjoint(self) -> PartedScale:
        return self

    def trace(self) -> float:
        return float(namespace(self.spectrum).sum(self.spectrum))


class PartedOperator(LinearOperator):
    """Diagonal in a Kronecker-factored basis, sorted so that its spectrum is a `PartedScale`.

    `truncation_error`: how far the spectrum is from the one it stands for, relative, as in `SeparableOperator`.
    """

    symmetric = True

    def __init__(self, basis: EigenKroneckerOperator, scale: PartedScale, *, truncation_error: float):
        self.scale, self.truncation_error = scale, truncation_error
        # What is applied is one spectrum, whatever the way.
        self.basis = basis.with_spectrum(scale.spectrum)
        self.psd = self.basis.psd

    @property
    def spectrum(self) -> Array:
        """[o, i], in the sorted basis."""
        return self.basis.spectrum

    @property
    def input_size(self) -> int:
        return self.basis.input_size

    def _apply(self, tensor: Array) -> Array:
        return self.basis.apply(tensor)

    def apply_gradient(self, value: Gradient) -> Gradient:
        expansion = self.scale.expansion
        if expansion is None or not expansion.pays_for(value):
            return self.basis.apply_gradient(value)
        rotation = self.basis.rotation
        return rotation.adjoint().apply_gradient(expansion.apply_gradient(rotation.apply_gradient(value)))

    def quadratic_gradient(self, value: Gradient) -> Array:
        return self.basis.quadratic_gradient(value)

    def sides(self, queries: Gradient, train_per_query: float) -> tuple[LinearOperator, LinearOperator]:
        # Several positions: each pair of rows would meet at every pair of positions; dense rows meet once.
        if not isinstance(queries, Outer) or queries.positions > 1:
            return self.basis.sides(queries, train_per_query)
        rotation = self.basis.rotation
        return ProductOperator(self.scale, rotation), ProductOperator(self.scale.parting, rotation)

    def adjoint(self) -> PartedOperator:
        return self

    def trace(self) -> float:
        return self.basis.trace()

    def eigenvalues(self, at_most: int | None = None) -> Spectrum | None:
        return self.basis.eigenvalues(at_most)
