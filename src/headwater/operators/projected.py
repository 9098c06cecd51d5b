"""Operators that act in a projected space: with P [K, D] the projection and a core C [K, K], v to P^T C P v."""

from __future__ import annotations

import numpy as np

from headwater.arrays import Array, as_like, namespace, precise, transpose
from headwater.blocks import Layout
from headwater.errors import NonFiniteValue, SingularOperator
from headwater.gradients.block import BlockGradient
from headwater.operators.algebra import LinearOperator, rowwise_inner
from headwater.operators.projection import ProjectedGradient, Projection
from headwater.operators.spectrum import Spectrum
from headwater.operators.structured import DenseOperator


class ProjectedOperator(LinearOperator):
    """v to P^T core(P v). Rows meet in the projected space, where a pair costs K.

    Its trace, mean eigenvalue and inverse are those of the core: damping acts on the projected curvature, and relative
    damping is relative to the mean of its K eigenvalues. rows: how many went into the core. kept_rank and kept_mass:
    how many of the core's eigenvalues are kept, and their share of the trace.
    """

    symmetric = True

    def __init__(
        self,
        projection: Projection,
        core: LinearOperator,
        *,
        rows: int,
        kept_rank: int | None = None,
        kept_mass: float = 1.0,
    ):
        self.projection, self.core, self.rows = projection, core, rows
        self.kept_rank = core.input_size if kept_rank is None else kept_rank
        self.kept_mass = kept_mass
        self.psd = core.psd

    @property
    def input_size(self) -> int:
        return self.projection.layout.size

    def _apply(self, tensor: Array) -> Array:
        return self.projection.up(self.core.apply(self.projection.down(tensor)))

    def apply_block(self, value: BlockGradient) -> BlockGradient:
        small = self.core.apply(self.projection.apply_block(value).flat())
        return BlockGradient.from_flat(self.projection.layout, self.projection.up(small))

    def seen(self, value: BlockGradient) -> BlockGradient:
        return self.projection.seen(value)

    def stored(self, value: BlockGradient) -> ProjectedGradient:
        return self.projection.stored(value)

    @property
    def stored_layout(self) -> Layout:
        return self.projection.small

    def lifted(self, flat: Array) -> Array:
        return self.projection.up(flat)

    def quadratic(self, value: BlockGradient) -> Array:
        small = self.projection.apply_block(value).flat()
        return rowwise_inner(self.core.apply(small), small)

    def block_sides(self, queries: BlockGradient, train_per_query: float) -> tuple[LinearOperator, LinearOperator]:
        # The core on the queries' side, which are fewer; and train rows may then be stored before it is known.
        return ProjectionSide(self.projection, self.core), ProjectionSide(self.projection)

    def adjoint(self) -> ProjectedOperator:
        return self

    def inverse(self, damping: float = 0.0) -> ProjectedOperator:
        """(core + damping I)^-1 between the projections.

        Errors: SingularOperator; in particular for a projection as wide as the data without damping.
        """
        size = self.core.input_size
        # K numbers or more for n rows: the core has a null space, which only damping keeps from being divided by.
        if damping == 0.0 and size >= self.rows:
            raise SingularOperator(
                f"The projection is wider than the data with zero ridge: {size} projected numbers for {self.rows} rows "
                "and a damping of 0, so that the scores would be noise. Use fewer numbers, or damping=hw.relative(0.1)."
            )
        return ProjectedOperator(
            self.projection,
            self.core.inverse(damping),
            rows=self.rows,
            kept_rank=self.kept_rank,
            kept_mass=self.kept_mass,
        )

    def trace(self) -> float:
        return self.core.trace()

    def mean_eigenvalue(self) -> float:
        return self.core.mean_eigenvalue()

    def spectrum_bounds(self) -> tuple[float, float] | None:
        """Those of the core, which is what is damped."""
        return self.core.spectrum_bounds()

    def eigenvalues(self, at_most: int | None = None) -> Spectrum | None:
        """Those of the core, which is what is damped."""
        return self.core.eigenvalues(at_most)


class ProjectionSide(LinearOperator):
    """From D numbers to K, and through a core: what rows go through before they meet in the projected space."""

    def __init__(self, projection: Projection, core: LinearOperator | None = None):
        self.projection, self.core = projection, core

    @property
    def input_size(self) -> int:
        return self.projection.layout.size

    def _apply(self, tensor: Array) -> Array:
        small = self.projection.down(tensor)
        return small if self.core is None else self.core.apply(small)

    @property
    def keeps_rows(self) -> bool:
        return self.core is None

    def seen(self, value: BlockGradient) -> BlockGradient:
        return self.projection.seen(value)

    def apply_block(self, value: BlockGradient) -> BlockGradient:
        small = self.projection.apply_block(value)
        if self.core is None:
            return small
        layout = small.layout
        return ProjectedGradient(layout, BlockGradient.from_flat(layout, self.core.apply(small.flat())).parts)

    def adjoint(self) -> LinearOperator:
        """Errors: NotImplementedError."""
        raise NotImplementedError("A side maps between two spaces; use the operator that it belongs to.")

    def trace(self) -> float:
        """Errors: NotImplementedError."""
        raise NotImplementedError("A side maps between two spaces and has no trace.")


class MomentOperator(DenseOperator):
    """A second moment [K, K]. At a damping well above its rounding it is inverted directly, at a tenth of the cost."""

    def __init__(self, matrix: Array):
        super().__init__(matrix, symmetric=True, psd=True)

    def inverse(self, damping: float = 0.0, *, allow_indefinite: bool = True) -> DenseOperator:
        """Errors: NonFiniteValue."""
        xp, size = namespace(self.matrix), self.input_size
        if not bool(xp.all(xp.isfinite(self.matrix))):
            raise NonFiniteValue(f"The operator is not finite, and has no inverse (damping {damping:g}).")
        if damping <= 100 * float(xp.finfo(self.matrix.dtype).eps) * self.trace():
            return super().inverse(damping, allow_indefinite=allow_indefinite)
        matrix = precise(self.matrix)
        inverse = xp.linalg.inv(matrix + as_like(np.eye(size) * damping, matrix))
        inverse = xp.astype((inverse + transpose(inverse)) / 2, self.matrix.dtype)
        return DenseOperator(inverse, symmetric=True, psd=True)
