"""Hessian, generalised Gauss-Newton and Fisher of the mean loss over the training rows, as dense matrices."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from headwater.arrays import Array, add_product, identity, rows_within_memory, transpose
from headwater.curvature.means import Means, MeansVisitor, no_means, rows_of, total_weight
from headwater.errors import InvalidSetting
from headwater.gradients.block import BlockGradient
from headwater.gradients.provider import Fisher, StructuredGradientProvider
from headwater.memory import refuse_too_large
from headwater.operators.finite import refuse_nonfinite
from headwater.operators.structured import DenseOperator
from headwater.rows import PlacedBatch, sweep
from headwater.settings import check_word
from headwater.types import Batch

Curvature = Literal["hessian", "ggn", "fisher", "empirical_fisher"]
KINDS = ("hessian", "ggn", "fisher", "empirical_fisher")
LARGEST_DENSE = 20_000
"""Parameters of a block beyond which a dense matrix is refused: 3.2 GB in float64, and hours to diagonalise."""


def check_kind(kind: str) -> None:
    """Errors: InvalidSetting for a kind of curvature that there is not."""
    check_word("curvature", kind, KINDS)


def fit_dense(
    provider: StructuredGradientProvider,
    loader: Iterable[object],
    kind: Curvature,
    *,
    fisher: Fisher = "auto",
    seed: int = 0,
    progress: bool = False,
) -> tuple[OrderedDict[str, DenseOperator], float]:
    """Every block's own curvature as a dense operator, in one pass; and the rows' total weight.

    Shapes: [D_block, D_block]. Errors: InvalidSetting for a block that is too large; NonFiniteValue.
    """
    check_kind(kind)
    for name, size in provider.sizes.items():
        if size > LARGEST_DENSE:
            raise InvalidSetting(
                f"Block {name!r} has {size} parameters; its dense curvature would take {size**2 * 8 / 1e9:.0f} GB. "
                "Use smaller blocks (blocks='layer'), or Kfac or Ekfac."
            )
    _refuse_without_room(provider)
    means = sweep(provider, loader, _DenseMeans(provider, kind, fisher, seed), kind, progress)
    return OrderedDict((name, _operator(name, mean.value, kind)) for name, mean in means.items()), rows_of(means)


@dataclass(frozen=True, eq=False)
class _DenseMeans(MeansVisitor):
    """Each block's matrix."""

    provider: StructuredGradientProvider
    kind: Curvature
    fisher: Fisher
    seed: int

    def start(self) -> Means:
        return no_means(self.provider.layouts)

    def add(self, whole: Means, item: PlacedBatch) -> Means:
        weight = total_weight(self.provider, item.batch)
        # Columns as products with unit vectors; a Fisher is summed from gradients, which costs one pass for all of it.
        if self.kind in ("hessian", "ggn"):
            for name in self.provider.layouts:
                whole[name].add(_by_products(self.provider, item.batch, name, self.kind), weight)
            return whole
        fisher: Fisher = "empirical" if self.kind == "empirical_fisher" else self.fisher
        for name, matrix in _by_gradients(self.provider, item.batch, fisher, self.seed).items():
            whole[name].add(matrix, weight)
        return whole


def _refuse_without_room(provider: StructuredGradientProvider) -> None:
    """All matrices are held, and their bases in float64; one is diagonalised at a time, with two copies beside it."""
    sizes = provider.sizes
    largest = max(sizes, key=lambda name: sizes[name])
    size = 12.0 * sum(size**2 for size in sizes.values()) + 16.0 * sizes[largest] ** 2
    refuse_too_large(
        f"The dense curvature of {len(sizes)} blocks, the largest that of block {largest!r},",
        (sizes[largest], sizes[largest]),
        size,
        "Use smaller blocks (blocks='layer'), or Kfac or Ekfac.",
        provider.device,
    )


def _operator(name: str, matrix: Array, kind: str) -> DenseOperator:
    refuse_nonfinite(matrix, f"The {kind} of block {name!r}")
    # Symmetric by definition, and by rounding not quite.
    return DenseOperator((matrix + transpose(matrix)) / 2, symmetric=True, psd=kind != "hessian")


def _by_products(provider: StructuredGradientProvider, batch: Batch, block: str, kind: Any) -> Array:
    like = next(iter(provider.grads(batch).values())).like
    return provider.curvature_product(batch, block, identity(provider.sizes[block], like), kind)


def _by_gradients(
    provider: StructuredGradientProvider, batch: Batch, fisher: Fisher, seed: int
) -> OrderedDict[str, Array]:
    weights = provider.row_weights(batch)
    sums: OrderedDict[str, Array] = OrderedDict()
    for draw in provider.fisher_grads(batch, fisher, seed=seed):
        for name, value in draw.items():
            total: Any = sums.get(name)
            for flat, mine in _flat_pairs(value, weights):
                total = add_product(total, flat, mine)
            sums[name] = total
    return sums


def _flat_pairs(value: BlockGradient, weights: Array | None) -> Iterable[tuple[Array, Array]]:
    """Flat gradients, and the same times the rows' weights, in pieces."""
    step = rows_within_memory(2 * value.layout.size, value.like)
    for start in range(0, value.rows, step):
        rows = slice(start, min(start + step, value.rows))
        flat = value.take(rows).flat()
        yield flat, flat if weights is None else flat * weights[rows][:, None]
