"""Second moments of projected gradients: one mean over the rows of the data set, K x K for each block."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field

from headwater.arrays import Array, accumulable, add_product, device, itemsize, namespace
from headwater.curvature.exact import LARGEST_DENSE
from headwater.curvature.means import Means, MeansVisitor, WeightedMean, rows_of, total_weight
from headwater.errors import InvalidSetting
from headwater.gradients.block import BlockGradient
from headwater.gradients.provider import Fisher, StructuredGradientProvider
from headwater.memory import refuse_too_large
from headwater.operators.finite import refuse_nonfinite
from headwater.operators.projected import MomentOperator, ProjectedOperator
from headwater.operators.projection import Make, Projection
from headwater.rows import PlacedBatch, Total, first_batch, sweep
from headwater.types import Batch


def fit_moments(
    provider: StructuredGradientProvider,
    loader: Iterable[object],
    make: Make,
    *,
    fisher: Fisher = "empirical",
    draws: range = range(1),
    seed: int = 0,
    progress: bool = False,
) -> tuple[OrderedDict[str, ProjectedOperator], float]:
    """Every block's mean of P g g^T P^T, between its projections, in one pass; and the rows' total weight.

    Shapes: the core of a block is [K, K]. Which g: as in `fisher_grads`; a row's weight multiplies its product.
    Errors: InvalidSetting if K is too large for a matrix; NonFiniteValue.
    """
    moments = _Moments(provider, make, fisher, draws, seed)
    means, rows = sweep(
        provider, loader, moments & Total(lambda piece: len(piece.batch)), "projected gradients", progress
    )
    if not moments.projections:  # all parts were there
        moments.look(first_batch(provider, loader))
    operators = ((name, _operator(name, moments.projections[name], mean, rows)) for name, mean in means.items())
    return OrderedDict(operators), rows_of(means)


@dataclass(frozen=True, eq=False)
class _Moments(MeansVisitor):
    """Each block's second moment of projected gradients."""

    provider: StructuredGradientProvider
    make: Make
    fisher: Fisher
    draws: range
    seed: int
    projections: dict[str, Projection] = field(default_factory=dict)
    """Of each block; the first gradients that are met say what is projected."""

    def start(self) -> Means:
        return OrderedDict()

    def add(self, whole: Means, item: PlacedBatch) -> Means:
        weights, sums = self.provider.row_weights(item.batch), dict[str, Array]()
        for draw in self.provider.fisher_grads(item.batch, self.fisher, draws=self.draws, seed=self.seed):
            for name, value in draw.items():
                sums[name] = _product(sums.get(name), self._projection(name, value), value, weights)
        for name, matrix in sums.items():
            whole.setdefault(name, WeightedMean()).add(matrix, total_weight(self.provider, item.batch))
        return whole

    def look(self, batch: Batch) -> None:
        """Make the projections, whose gradients some rows show."""
        for name, value in self.provider.grads(batch).items():
            self._projection(name, value)

    def _projection(self, name: str, value: BlockGradient) -> Projection:
        if name not in self.projections:
            # When first met: a projection's sides may depend on the first gradients.
            self.projections[name] = _checked(name, self.make(name, value))
            _refuse_without_room(name, self.projections, value)
            _refuse_rounding(name, self.projections[name], value)
        return self.projections[name]


def _product(total: Array | None, projection: Projection, value: BlockGradient, weights: Array | None) -> Array:
    # As rows are kept (LoRIF cuts their rank): the moment is of what scores are made of.
    small = accumulable(projection.stored(value).flat())
    return add_product(total, small, small if weights is None else small * weights[:, None])


def _operator(name: str, projection: Projection, mean: WeightedMean[Array], rows: int) -> ProjectedOperator:
    matrix = mean.value
    xp = namespace(matrix)
    refuse_nonfinite(matrix, f"The second moment of the projected gradients of block {name!r}")
    symmetric = (matrix + xp.linalg.matrix_transpose(matrix)) / 2
    return ProjectedOperator(projection, MomentOperator(symmetric), rows=rows)


LOOK = 16
"""Rows whose projections are looked at before the pass."""


def _checked(name: str, projection: Projection) -> Projection:
    size = projection.small.size
    if size > LARGEST_DENSE:
        raise InvalidSetting(
            f"Block {name!r} is projected to {size} numbers, whose second moment would take "
            f"{size**2 * 8 / 1e9:.0f} GB. Use a smaller dimension, or smaller blocks (blocks='layer')."
        )
    return projection


def _refuse_without_room(name: str, found: dict[str, Projection], value: BlockGradient) -> None:
    """Moments are held twice while a batch is added, and inverted in float64, one at a time."""
    sizes = [projection.small.size for projection in found.values()]
    refuse_too_large(
        f"The second moments of {len(sizes)} blocks' projected gradients, the last that of block {name!r},",
        (sizes[-1], sizes[-1]),
        2.0 * itemsize(accumulable(value.like)) * sum(size**2 for size in sizes) + 16.0 * max(sizes) ** 2,
        "Use a smaller dimension, or smaller blocks (blocks='layer').",
        device(value.like),
    )


def _refuse_rounding(name: str, projection: Projection, value: BlockGradient) -> None:
    """Errors: InvalidSetting if nothing but rounding is left of the first rows.

    It can happen to few numbers: a cross entropy's output-gradients sum to zero, and that sum may be all there is.
    """
    first = value.take(slice(0, LOOK))
    whole, left = (float(namespace(v.like).sum(v.squared_norms())) for v in (first, projection.apply_block(first)))
    if math.isinf(whole):  # squares beyond the dtype: the moment itself tells, where it is too large as well
        return
    if left <= (100 * float(namespace(value.like).finfo(value.like.dtype).eps)) ** 2 * whole and whole > 0:
        raise InvalidSetting(
            f"The projection of block {name!r} to {projection.small.size} numbers leaves "
            "nothing but rounding of its gradients. Use another seed, or a larger dimension."
        )
