"""KFAC and EKFAC: the Fisher information of each part as a Kronecker product, or diagonal in a Kronecker eigenbasis.

For a part with inputs a and output-gradients b (T positions a row): left is the sum over rows and positions of b b^T,
per row; right is the mean over rows and positions of a a^T; the Fisher is near left (x) right. EKFAC keeps the
eigenvectors of the two and replaces the eigenvalues by what they ought to be, the mean over rows of
(U_left^T G U_right)^2.

Sources: Martens and Grosse 2015, arXiv 1503.05671; George et al. 2018, arXiv 1806.03884; Grosse et al. 2023,
arXiv 2308.03296.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, TypeVar

import numpy as np

from headwater.arrays import Array, accumulable, add_product, device, itemsize, namespace
from headwater.curvature.means import WeightedMean, pack_means, positive_weight, total_weight, unpack_means
from headwater.errors import InvalidSetting
from headwater.gradients.algebra import Gradient, Moments, Sum, draws_second_moment
from headwater.gradients.provider import BlockGradients, Fisher, StructuredGradientProvider
from headwater.memory import refuse_too_large
from headwater.operators.algebra import LinearOperator
from headwater.operators.finite import refuse_nonfinite
from headwater.operators.kronecker import EigenKroneckerOperator, KroneckerOperator
from headwater.operators.structured import BlockDiagonalOperator
from headwater.random import row_uniforms
from headwater.rows import Accumulator, PlacedBatch, Visitor, sweep
from headwater.types import Batch

Place = tuple[str, int]
"""(block name, part index)."""

PartOperator = TypeVar("PartOperator", bound=LinearOperator)

CHOICE = 1 << 23
"""Number of the random draw that says which rows a basis is from: far from those of labels."""
LARGEST_SIDE = 40_000
"""Rows of a Kronecker factor beyond which it is refused: 12.8 GB in float64, and hours to diagonalise."""


def fit_kfac(
    provider: StructuredGradientProvider,
    loader: Iterable[object],
    *,
    fisher: Fisher = "auto",
    samples: int = 1,
    seed: int = 0,
    progress: bool = False,
    basis_only: bool = False,
    share: float = 1.0,
) -> tuple[OrderedDict[str, BlockDiagonalOperator[KroneckerOperator]], float]:
    """Every block's Fisher as a Kronecker product for each part, in one pass; and the rows' total weight.

    share: the fraction of the rows that the factors are from. Errors: InvalidSetting for a table that is used as a
    linear map too (tied embeddings), unless `basis_only`, when the factors' eigenvectors are all that is wanted, and
    where none of the rows was chosen; NonFiniteValue.
    """
    factors = _Factors(provider, fisher, range(samples), seed, basis_only, share)
    found = sweep(provider, loader, factors, "Kronecker factors", progress)
    positive_weight(found.weight)
    # A row of weight zero is in the sums as if it had not been chosen.
    if not any(float(moments.left_count) > 0 for moments in found.moments.values()):
        raise InvalidSetting(f"A share of {share:g} chose none of the rows: take a larger one, or all (1).")
    parts = {place: _kronecker(place, moments) for place, moments in found.moments.items()}
    return _by_block(provider, parts), found.weight


@dataclass
class _Sums:
    """Of each part's inputs and output-gradients, over the chosen rows; and the total weight of all rows."""

    moments: dict[Place, Moments]
    weight: float


@dataclass(frozen=True, eq=False)
class _Factors(Visitor[PlacedBatch, _Sums, _Sums]):
    """Both Kronecker factors of each part."""

    provider: StructuredGradientProvider
    fisher: Fisher
    draws: range
    seed: int
    basis_only: bool
    share: float = 1.0
    """The fraction of the rows that the sums are over; their keys choose them."""
    looked: list[bool] = field(default_factory=list)
    """Whether the first gradients that are met here were looked at."""

    def of(self, item: PlacedBatch) -> _Sums:
        batch, weight = self._chosen(item.batch), total_weight(self.provider, item.batch)
        if batch is None:
            return _Sums({}, weight)
        draws = self.provider.fisher_grads(batch, self.fisher, draws=self.draws, seed=self.seed)
        # Before the first batch's sums are made: they would already take that memory.
        if not self.looked:
            _refuse_large_factors(draws[0])
            self.looked.append(True)
        return _Sums(_batch_moments(draws, self.provider.row_weights(batch), self.basis_only), weight)

    def _chosen(self, batch: Batch) -> Batch | None:
        """The rows that are met: of other batches, and in another order, they are the same."""
        if self.share >= 1:
            return batch
        numbers = row_uniforms(self.provider.row_keys(batch), 1, draw=CHOICE, seed=self.seed)[:, 0, 0]
        rows = np.flatnonzero(numbers < self.share)
        return batch.take(rows) if len(rows) else None

    def merge(self, one: _Sums, other: _Sums) -> _Sums:
        for place, moments in other.moments.items():
            one.moments[place] = one.moments[place] + moments if place in one.moments else moments
        return _Sums(one.moments, one.weight + other.weight)

    @property
    def is_shareable(self) -> bool:
        return True

    def pack(self, part: _Sums) -> dict[str, Any]:
        found: dict[str, Any] = {"weight": part.weight}
        for (name, k), moments in part.moments.items():
            found |= {f"{name}/{k}/{each}": value for each, value in moments.named().items()}
        return found

    def unpack(self, values: Mapping[str, Any]) -> _Sums:
        found: dict[Place, dict[str, Any]] = {}
        for key, value in values.items():
            if key != "weight":
                name, k, each = key.rsplit("/", 2)
                found.setdefault((name, int(k)), {})[each] = value
        return _Sums({place: Moments(**{"right": None} | sums) for place, sums in found.items()}, values["weight"])


def fit_ekfac(
    provider: StructuredGradientProvider,
    loader: Iterable[object],
    *,
    fisher: Fisher = "auto",
    samples: int = 1,
    seed: int = 0,
    progress: bool = False,
    basis_share: float = 1.0,
) -> tuple[OrderedDict[str, BlockDiagonalOperator[EigenKroneckerOperator]], float]:
    """Every block's Fisher, diagonal in the Kronecker eigenbasis, in two passes; and the rows' total weight.

    basis_share: the fraction of the rows that the first pass, for the basis, runs over.
    Sampled labels of the second pass are independent of those that gave the basis: with the same draws the spectrum
    overfits the basis, and the scores are markedly worse.
    Errors: as `fit_kfac`; InvalidSetting if the second pass has rows of another total weight.
    """
    kfac, weight = fit_kfac(
        provider,
        loader,
        fisher=fisher,
        samples=samples,
        seed=seed,
        progress=progress,
        basis_only=True,
        share=basis_share,
    )
    # Only the eigenvectors of KFAC's factors are used; the second pass measures the spectrum itself.
    bases = {(name, k): part.eigen for name, block in kfac.items() for k, part in enumerate(block.operators)}
    spectra = sweep(
        provider,
        loader,
        # Draw numbers after those of the first pass: independent labels for the same rows.
        _Spectra(provider, bases, fisher, range(samples, 2 * samples), seed),
        "EKFAC spectrum",
        progress,
    )
    # Rows are compared by `Rows` where there is one; here only their weight is known.
    if any(abs(mean.weight - weight) > 1e-6 * weight for mean in spectra.values()):
        raise InvalidSetting("The loader gave other rows in the second pass than in the first.")
    return _by_block(provider, _with_spectra(bases, spectra)), weight


def fit_mean_ekfac(
    providers: Sequence[StructuredGradientProvider],
    loader: Iterable[object],
    *,
    fisher: Fisher = "auto",
    samples: int = 1,
    seed: int = 0,
    progress: bool = False,
) -> OrderedDict[str, BlockDiagonalOperator[EigenKroneckerOperator]]:
    """`fit_ekfac` of the mean over several weights of one model: factors, and then spectra, summed over all of them.

    Two passes for each. Errors: as `fit_ekfac`.
    """
    factors = [_Factors(provider, fisher, range(samples), seed, True) for provider in providers]
    sums = [sweep(each.provider, loader, each, "Kronecker factors", progress) for each in factors]
    whole = reduce(factors[0].merge, sums)
    positive_weight(whole.weight)
    bases = {place: _kronecker(place, moments).eigen for place, moments in whole.moments.items()}
    draws = range(samples, 2 * samples)
    seen = [_Spectra(provider, bases, fisher, draws, seed) for provider in providers]
    spectra = reduce(seen[0].merge, [sweep(each.provider, loader, each, "EKFAC spectrum", progress) for each in seen])
    return _by_block(providers[0], _with_spectra(bases, spectra))


Spectra = dict[Place, WeightedMean[Array]]
"""What `_Spectra` adds up: [o, i] of each part."""


@dataclass(frozen=True, eq=False)
class _Spectra(Accumulator[PlacedBatch, Spectra, Spectra]):
    """The mean square of each part's gradients, turned into its basis."""

    provider: StructuredGradientProvider
    bases: dict[Place, EigenKroneckerOperator]
    fisher: Fisher
    draws: range
    seed: int

    def start(self) -> Spectra:
        return {place: WeightedMean() for place in self.bases}

    def add(self, whole: Spectra, item: PlacedBatch) -> Spectra:
        draws = self.provider.fisher_grads(item.batch, self.fisher, draws=self.draws, seed=self.seed)
        weights, rows = self.provider.row_weights(item.batch), total_weight(self.provider, item.batch)
        for (name, k), basis in self.bases.items():
            values = [draw[name].parts[k] for draw in draws]
            # Lambda_oi = mean of (L^T G R)_oi^2: the best diagonal in this basis (George et al. 2018).
            whole[name, k].add(draws_second_moment(values, weights, *basis.rotation.turns()), rows)
        return whole

    def merge(self, one: Spectra, other: Spectra) -> Spectra:
        for place, mean in other.items():
            one[place].merge(mean)
        return one

    @property
    def is_shareable(self) -> bool:
        return True

    def pack(self, part: Spectra) -> dict[str, Any]:
        return pack_means({f"{name}/{k}": mean for (name, k), mean in part.items()})

    def unpack(self, values: Mapping[str, object]) -> Spectra:
        means = unpack_means(values)
        return {(name.rpartition("/")[0], int(name.rpartition("/")[2])): mean for name, mean in means.items()}


def _with_spectra(
    bases: Mapping[Place, EigenKroneckerOperator], spectra: Spectra
) -> dict[Place, EigenKroneckerOperator]:
    """The bases with the spectra that were measured in them. Errors: NonFiniteValue."""
    return {
        place: basis.with_spectrum(_level_null_space(basis, _finite(place, spectra[place].value)))
        for place, basis in bases.items()
    }


def _level_null_space(basis: EigenKroneckerOperator, spectrum: Array) -> Array:
    """The mean over each side's null space in place of its single entries.

    Where a factor has no eigenvalue to speak of, rounding chooses its eigenvectors, and label draws of the second pass
    need not vanish there. Their mean over the null space does not depend on the choice.
    """
    xp = namespace(spectrum)
    for axis, turned in ((1, basis.left), (0, basis.right)):
        if turned is None:
            continue
        sizes = xp.max(basis.spectrum, axis=axis)
        # What stands for zero: what an eigendecomposition in the factors' own precision leaves there, and the square of
        # what the gradients' dtype rounds, since a factor is a sum of their squares. More than that would level
        # directions that are known: with eps of float32 itself, those below 6e-5 of the largest in a layer of 64.
        eps = max(float(xp.finfo(basis.spectrum.dtype).eps), float(xp.finfo(basis.like.dtype).eps) ** 2)
        null = sizes <= float(xp.max(sizes)) * max(spectrum.shape) * 8 * eps
        count = int(xp.count_nonzero(null))
        if count > 1:
            mask = xp.astype(null, spectrum.dtype)
            mask = mask[:, None] if axis == 1 else mask[None, :]
            mean = xp.sum(spectrum * mask, axis=1 - axis, keepdims=True) / count
            spectrum = spectrum * (1 - mask) + mean * mask
    return spectrum


def _batch_moments(draws: list[BlockGradients], weights: Array | None, basis_only: bool) -> dict[Place, Moments]:
    """Sums over the batch's rows and draws; what the draws share, rows and layer inputs, is counted once."""
    first, *others = draws
    return {
        (name, k): _draws_moments(name, part, [draw[name].parts[k] for draw in others], weights, basis_only)
        for name, block in first.items()
        for k, part in enumerate(block.parts)
    }


def _draws_moments(
    name: str, part: Gradient, others: Sequence[Gradient], weights: Array | None, basis_only: bool
) -> Moments:
    together = part.moments_with(others, weights) if others else None
    if together is not None:
        return together
    found = _part_moments(name, part, weights, False, basis_only)
    for other in others:
        # From the second draw on: the rows and their layer inputs were counted with the first.
        found = found + _part_moments(name, other, weights, True, basis_only)
    return found


def _refuse_large_factors(draw: BlockGradients) -> None:
    """Errors: InvalidSetting for a factor with more than LARGEST_SIDE rows, and for factors without room in memory.

    All of them are held twice while a batch is added; the largest is diagonalised in float64: it, a copy, its basis.
    """
    remedy = (
        "Leave that layer out (blocks={name: parameters}), or use hw.LoGra() or hw.Dual(), which have no such matrix; "
        "as a preconditioner, take 'nystroem' or None."
    )
    total, largest, where, place = 0, 0, "", None
    for name, value in draw.items():
        for part in value.parts:
            side = max(shape[0] for shape in part.moment_shapes if len(shape) == 2)
            if side > LARGEST_SIDE:
                raise InvalidSetting(
                    f"Block {name!r} has a layer of shape {list(part.shape)}, with a Kronecker factor [{side}, {side}] "
                    f"of {side**2 * 8 / 1e9:.0f} GB that takes hours to diagonalise. {remedy}"
                )
            total += sum(s[0] ** 2 for s in part.moment_shapes if len(s) == 2) * itemsize(accumulable(part.arrays[0]))
            if side > largest:
                largest, where, place = side, name, device(part.arrays[0])
    what = f"The Kronecker factors of {len(draw)} blocks, the largest that of block {where!r},"
    refuse_too_large(what, (largest, largest), 2 * total + 24 * largest**2, remedy, place)


def _part_moments(name: str, part: Gradient, weights: Array | None, again: bool, basis_only: bool) -> Moments:
    if not isinstance(part, Sum):
        return part.moments(weights, again)
    if not basis_only:
        raise InvalidSetting(
            f"Block {name!r} has a weight that is used both as an embedding and as a linear map; its Fisher is no "
            "Kronecker product. Use hw.Ekfac(), hw.Direct(), or blocks without it."
        )
    return _tied_basis(part, weights)


def _tied_basis(part: Sum, weights: Array | None) -> Moments:
    """For a table that is a linear map too: no turn on the vocabulary's side, and sum G^T G on the other."""
    xp, (o, i) = namespace(part.arrays[0]), part.shape
    right: Any = None
    for rows, piece in part.chunks(2 * o * i):
        plain = piece.dense()
        mine = plain if weights is None else plain * weights[rows][:, None, None]
        right = add_product(right, plain.reshape((-1, i)), mine.reshape((-1, i)))
    ones = xp.ones_like(part.arrays[0].reshape((-1,))[:1])
    return Moments(xp.broadcast_to(ones, (o,)), right, 1.0, xp.linalg.trace(right))


def _kronecker(place: Place, moments: Moments) -> KroneckerOperator:
    right: Any = moments.right
    left, right = accumulable(moments.left), accumulable(right)
    count = moments.right_count
    # No gradient at all: the factor is zero, not 0 / 0.
    right = right / count if float(count) > 0 else right
    return KroneckerOperator(_finite(place, left / moments.left_count), _finite(place, right), psd=True)


def _finite(place: Place, array: Array) -> Array:
    return refuse_nonfinite(array, f"The Kronecker curvature of block {place[0]!r}")


def _by_block(
    provider: StructuredGradientProvider, parts: dict[Place, PartOperator]
) -> OrderedDict[str, BlockDiagonalOperator[PartOperator]]:
    return OrderedDict(
        (name, BlockDiagonalOperator(layout, [parts[name, k] for k in range(len(layout.parts))]))
        for name, layout in provider.layouts.items()
    )
