"""A fitted influence and its train rows become a `Diagnosis`: what gives reason to doubt its scores.

Train gradients are at hand while scores are computed, so that `attribute` adds them up on the way. What else is at hand
then (tags, small or known spectra, reports of solves) is told too. `diagnose` asks the rest, at the cost of a pass over
the rows, of products and of decompositions.

For a row of weight w the provider gives w g. With W the total weight, the mean gradient is the sum of these over W, and
tr Cov = (sum w |g|^2 / W - |mean|^2) W / (W - 1): a row of weight 2 counts as the row twice.
"""

from __future__ import annotations

import secrets
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from time import monotonic
from typing import Any, NamedTuple, Protocol

import numpy as np

from headwater.arrays import Array, accumulable, add_product, as_like, device, namespace, summed, to_numpy
from headwater.curvature.means import total_weight
from headwater.errors import InvalidSetting, NotFittedError, UnsupportedModel
from headwater.gradients.algebra import Dense, Gradient
from headwater.gradients.outer import Outer
from headwater.gradients.provider import BlockGradients, StructuredGradientProvider
from headwater.influence import ComposableInfluence
from headwater.methods.damping import Damping, in_units
from headwater.operators.algebra import LinearOperator, ScaledOperator
from headwater.operators.iterative import SolveReport
from headwater.operators.partial_penalty import PartialPenaltyInverse
from headwater.operators.sketch import estimate_spectra
from headwater.operators.spectrum import Spectrum
from headwater.rows import Accumulator, Each, PlacedBatch, Visitor
from headwater.run.rows import FittedRows, sweep_rows
from headwater.status import BlockStatus, status_of
from headwater.store.diagnosis import BlockDiagnosis, Diagnosis, Stationarity
from headwater.store.draft import TOKEN
from headwater.store.tiles import Where
from headwater.types import Batch

AT_ONCE = 512
"""The largest matrix that is diagonalised for a diagnosis which nobody asked for."""
PROBES, STEPS = 8, 24
"""Random vectors that estimate effective degrees of freedom, and products with each of them."""

PAUSE = 30.0
"""Seconds between two times that a run's sums are kept, at least."""


# The mean gradient ----------------------------------------------------------------------------------------------------


class GradientSums:
    """Sums over train rows of their gradients and of their squared lengths, by block; and the rows' total weight."""

    def __init__(self, provider: StructuredGradientProvider):
        self.provider = provider
        self.weight = 0.0
        self._totals: dict[str, list[_PartSum]] = {}
        self._squares: dict[str, float] = {}

    def add(self, batch: Batch, grads: BlockGradients) -> None:
        """A batch, and its weighted gradients."""
        weights = self.provider.row_weights(batch)
        self.weight += total_weight(self.provider, batch)
        for name, value in grads.items():
            totals = self._totals.setdefault(name, [_PartSum() for _ in value.parts])
            squares = summed(total.add(part) for total, part in zip(totals, value.parts, strict=True))
            # The gradients carry their weight w, so that |w g|^2 / w is the weight times |g|^2.
            self._squares[name] = self._squares.get(name, 0.0) + _unweighted(squares, weights)

    def total(self, block: str) -> Array:
        """The summed gradient: [D_block]."""
        return self.provider.layouts[block].merge([part.value[None] for part in self._totals[block]])[0]

    def square(self, block: str) -> float:
        """The sum over rows of weight times |g|^2."""
        return self._squares[block]

    def arrays(self) -> dict[str, np.ndarray]:
        """As a `TileStore` keeps them."""
        totals = {f"gradient {name}": to_numpy(self.total(name)) for name in self._totals}
        numbers = {f"square {name}": np.array(square) for name, square in self._squares.items()}
        return {**totals, **numbers, "weight": np.array(self.weight)}

    def add_arrays(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Those of another call."""
        self.weight += float(arrays["weight"])
        for name, layout in self.provider.layouts.items():
            found = arrays[f"gradient {name}"]
            like = self.provider.parameters(name) if name not in self._totals else self._totals[name][0].value
            totals = self._totals.setdefault(name, [_PartSum() for _ in layout.parts])
            for total, matrix in zip(totals, layout.split(as_like(found, accumulable(like))[None]), strict=True):
                total.add_matrix(matrix[0])
            self._squares[name] = self._squares.get(name, 0.0) + float(arrays[f"square {name}"])


class _PartSum:
    """The sum over rows of one part's gradients, a matrix [o, i]; the column of a bias is kept beside it."""

    def __init__(self) -> None:
        self._matrix: Any = None
        self._column: Array | None = None

    def add(self, part: Gradient) -> Array:
        """Add a batch's rows. Returns their squared lengths: [n]."""
        if isinstance(part, Outer) and part.positions == 1:
            # sum_n b_n a_n^T is one product: no row's matrix is made.
            a, b = accumulable(part.a[:, 0]), accumulable(part.b[:, 0])
            if part.ones and self._column is None and self._matrix is not None:  # whole matrices came before
                self._matrix, self._column = self._matrix[:, :-1], self._matrix[:, -1]
            self._matrix = add_product(self._matrix, b, a)
            if part.ones:
                column = namespace(b).sum(b, axis=0)
                self._column = column if self._column is None else self._column + column
            return part.quadratic()
        if isinstance(part, Dense):
            values = accumulable(part.values)
            self.add_matrix(namespace(values).sum(values, axis=0))
            return part.quadratic()
        if not isinstance(part, Outer):
            ones = namespace(part.arrays[0]).ones(
                (1, part.rows), dtype=part.arrays[0].dtype, device=device(part.arrays[0])
            )
            self.add_matrix(part.combine(ones)[0])
            return part.quadratic()
        squares = []
        for _, piece in part.chunks(2 * part.shape[0] * part.shape[1]):  # made dense once, for both
            dense = accumulable(piece.dense())
            xp = namespace(dense)
            self.add_matrix(xp.sum(dense, axis=0))
            flat = dense.reshape((piece.rows, -1))
            squares.append(xp.vecdot(flat, flat))
        return namespace(*squares).concat(squares, axis=0)

    def add_matrix(self, matrix: Array) -> None:
        """[o, i], the column of a bias included."""
        matrix = accumulable(matrix)
        if self._column is not None:
            matrix, self._column = matrix[:, :-1], self._column + matrix[:, -1]
        self._matrix = matrix if self._matrix is None else self._matrix + matrix

    @property
    def value(self) -> Array:
        """[o, i]."""
        if self._column is None:
            return self._matrix
        return namespace(self._column).concat([self._matrix, self._column[:, None]], axis=1)


def _unweighted(squares: Array, weights: Array | None) -> float:
    """The sum of w |g|^2, from |w g|^2; a row of weight zero counts nothing."""
    found = to_numpy(squares).astype(np.float64)
    if weights is None:
        return float(found.sum())
    host = to_numpy(weights).astype(np.float64)
    return float(np.divide(found, host, out=np.zeros_like(found), where=host != 0).sum())


class Sums(Accumulator[PlacedBatch, GradientSums, GradientSums]):
    """The sums of a pass."""

    def __init__(self, provider: StructuredGradientProvider):
        self.provider = provider

    def start(self) -> GradientSums:
        return GradientSums(self.provider)

    def add(self, whole: GradientSums, item: PlacedBatch) -> GradientSums:
        whole.add(item.batch, item.grads(self.provider))
        return whole

    def merge(self, one: GradientSums, other: GradientSums) -> GradientSums:
        one.add_arrays(other.arrays())
        return one


class SumStore(Protocol):
    """Where a run keeps them; see `TileStore`."""

    def write_sums(self, writer: str, tiles: set[Where], sums: Mapping[str, np.ndarray]) -> None: ...

    def read_sums(self) -> Iterator[tuple[set[Where], dict[str, np.ndarray]]]: ...


class RunSums(Visitor[PlacedBatch, None, None]):
    """Gradient sums over the rows of one run; where it has a store, those that other calls left there are used.

    With a store, tiles that are computed are added up here (`begin`, `of` their rows, `enter`); `meet` is told of all.
    """

    def __init__(self, provider: StructuredGradientProvider, store: SumStore | None):
        self.sums = GradientSums(provider)
        self._store = store
        self._fresh: set[Where] = set()
        self._met: set[Where] = set()
        self._pause, self._kept_at, self._kept = PAUSE, monotonic(), 0
        self._tile = self.sums
        # Of this call alone: those of an earlier one stay.
        self._name = f"{TOKEN}-{secrets.token_hex(4)}"

    def begin(self) -> None:
        """A tile; what was added up of one that did not come to its end is dropped."""
        self._tile = GradientSums(self.sums.provider)

    def of(self, item: PlacedBatch) -> None:
        self._tile.add(item.batch, item.grads(self.sums.provider))

    def merge(self, one: None, other: None) -> None:
        """Sums are added up where they are kept."""

    def meet(self, where: Where) -> None:
        """A tile of the run."""
        self._met.add(where)

    def enter(self, where: Where) -> None:
        """The tile's rows were added up."""
        self.sums.add_arrays(self._tile.arrays())
        self._fresh.add(where)
        if monotonic() - self._kept_at > self._pause:
            self.keep()

    def keep(self) -> None:
        """Into the store, for a call that goes on from here."""
        if self._store is None or len(self._fresh) == self._kept:
            return
        begun = monotonic()
        # Sums and the tiles that they cover go into one file: one without the other would count twice.
        self._store.write_sums(self._name, self._fresh, self.sums.arrays())
        self._kept_at, self._kept = monotonic(), len(self._fresh)
        self._pause = max(PAUSE, 100 * (self._kept_at - begun))  # so that it costs one per cent of a run at most

    def finished(self, influence: ComposableInfluence, loader: Iterable[object], progress: bool) -> GradientSums | None:
        """Of all rows of the run; None if there are none.

        A pass more is needed for tiles whose sums were lost, with a process that was killed.
        """
        if self._store is not None:
            covered = set(self._fresh)
            # The largest first: sums over some of the same tiles cannot be told apart.
            for tiles, arrays in sorted(self._store.read_sums(), key=lambda found: -len(found[0])):
                if tiles <= self._met and not tiles & covered:
                    covered |= tiles
                    self.sums.add_arrays(arrays)
            self._tile = self.sums
            if missing := self._met - covered:
                again = Each[PlacedBatch, None](lambda piece: self._add_missing(piece, missing))
                sweep_rows(influence.provider, loader, again, "train gradients", progress)
        return self.sums if self.sums.weight > 0 else None

    def _add_missing(self, piece: PlacedBatch, missing: set[Where]) -> None:
        if any(start <= piece.start < stop for start, stop, _ in missing):
            self.of(piece)


def stationarity(
    influence: ComposableInfluence, sums: GradientSums
) -> tuple[Stationarity, OrderedDict[str, Stationarity]]:
    """Of all blocks together, and of each."""
    found = OrderedDict((name, _mean_gradient(influence, name, sums)) for name in influence.block_names)
    return _MeanGradient.joined(list(found.values())).summary(sums.weight), OrderedDict(
        (name, gradient.summary(sums.weight)) for name, gradient in found.items()
    )


class _MeanGradient(NamedTuple):
    """A mean gradient g and the pull u of a unit weight decay, as sums that add up over blocks."""

    gradient: float
    """|g|^2."""
    square: float
    """The mean of |g_n|^2."""
    along: float
    """<g, u>; NaN where weights are not known."""
    pull: float
    """|u|^2."""
    unit: float
    """The largest weight decay in u: one, or the largest entry of a known penalty."""

    @classmethod
    def joined(cls, gradients: Sequence[_MeanGradient]) -> _MeanGradient:
        gradient, square, along, pull = (sum(column) for column in list(zip(*gradients, strict=True))[:4])
        return cls(gradient, square, along, pull, max(one.unit for one in gradients))

    def summary(self, weight: float) -> Stationarity:
        # The variance of a row's gradient: E|g|^2 - |E g|^2, with Bessel's correction.
        spread = max(0.0, self.square - self.gradient) * weight / (weight - 1) if weight > 1 else float("nan")
        decay = explained = None
        if self.pull > 0 and np.isfinite(self.along):
            # Least squares: the weight decay u times w that best balances the mean gradient.
            decay = -self.along / self.pull * self.unit
            # The share of |g|^2 that this decay explains.
            cosine = self.along**2 / (self.pull * self.gradient) if self.gradient > 0 else 0.0
            explained = min(1.0, cosine) if decay > 0 else 0.0
        # The noise: how long the mean of so many rows' gradients is by chance.
        return Stationarity(self.gradient**0.5, (spread / weight) ** 0.5, decay, explained)


def _mean_gradient(influence: ComposableInfluence, block: str, sums: GradientSums) -> _MeanGradient:
    """u is the weights, times the penalty's entries where the training objective is known to have some."""
    mean = sums.total(block) / sums.weight
    xp, along, pull, unit = namespace(mean), float("nan"), 0.0, 1.0
    try:
        weights = xp.astype(influence.source.parameters(block), mean.dtype)
    except UnsupportedModel:
        weights = None
    if weights is not None:
        penalty = influence.source.penalty(block, sums.weight)
        if penalty is not None:
            unit = float(xp.max(penalty))
            weights = weights * penalty
        along, pull = float(xp.sum(mean * weights)), float(xp.sum(weights * weights))
    return _MeanGradient(float(xp.sum(mean * mean)), sums.square(block) / sums.weight, along, pull, unit)


# Effective degrees of freedom -----------------------------------------------------------------------------------------


class EffectiveDof(NamedTuple):
    """tr(C (C + damping)^-1) of a block: a number, or [dampings]."""

    value: Any
    error: Any
    """Standard error; zero where the value is exact."""


def effective_dof(
    influence: ComposableInfluence, dampings: Sequence[Damping] | None, *, probes: int, seed: int
) -> OrderedDict[str, EffectiveDof]:
    """See `ComposableInfluence.effective_dof`."""
    _check(influence, probes)
    own, found = influence.absolute_damping, OrderedDict()
    for name, curvature in influence.curvature.items():
        mean = curvature.mean_eigenvalue()
        asked = [own[name]] if dampings is None else [in_units(damping, mean) for damping in dampings]
        spectrum = influence.method.spectrum(curvature)
        spectra = _estimated(influence, name, probes, seed) if spectrum is None else [spectrum]
        dof = _dof(influence, name, spectra, asked)
        found[name] = dof if dampings is not None else EffectiveDof(float(dof.value[0]), float(dof.error[0]))
    return found


def _check(influence: ComposableInfluence, probes: int) -> None:
    influence.ready()
    if influence.method.approximates is None:
        raise InvalidSetting(f"{influence.method.describe()} inverts no curvature: there are no degrees of freedom.")
    if not isinstance(probes, int) or isinstance(probes, bool) or probes < 2:
        raise InvalidSetting(f"probes is {probes!r}; a standard error needs a whole number of at least 2.")


def _estimated(influence: ComposableInfluence, block: str, probes: int, seed: int) -> list[Spectrum]:
    like = influence.source.parameters(block)
    return estimate_spectra(influence.curvature[block], like, probes=probes, steps=STEPS, seed=seed)


def _dof(
    influence: ComposableInfluence, block: str, spectra: Sequence[Spectrum], dampings: Sequence[float]
) -> EffectiveDof:
    """The mean over estimates of the spectrum; exact for one. A penalty beside the rows' curvature damps too."""
    penalty = influence.provider.penalty(block, influence.n_train) if influence.method.predicts_removal else None
    most = 0.0 if penalty is None else float(namespace(penalty).max(penalty))
    shifts = [damping + most for damping in dampings]
    values = np.stack([spectrum.effective_dof(shifts) for spectrum in spectra])
    error = values.std(axis=0, ddof=1) / len(values) ** 0.5 if len(values) > 1 else np.zeros(len(shifts))
    added = [_unpenalised_dof(influence, block, damping, damping + most) for damping in dampings] if most else 0.0
    return EffectiveDof(values.mean(axis=0) + added, error)


def _unpenalised_dof(influence: ComposableInfluence, block: str, damping: float, shift: float) -> float:
    """What parameters add that the penalty spares."""
    if damping != influence.absolute_damping[block]:
        influence = influence.with_damping({**influence.absolute_damping, block: damping})
    operator: LinearOperator = influence.block_mapper.operators[block]
    # An ensemble's share around the inverse.
    while isinstance(operator, ScaledOperator):
        operator = operator.inner
    return operator.unpenalised_dof(shift) if isinstance(operator, PartialPenaltyInverse) else 0.0


# The whole ------------------------------------------------------------------------------------------------------------


def diagnose(influence: ComposableInfluence, train_loader: Iterable[object], *, progress: bool) -> Diagnosis:
    """See `ComposableInfluence.diagnose`."""
    influence.ready()
    visitor = FittedRows(influence) & Sums(influence.source)
    _, sums = sweep_rows(influence.provider, train_loader, visitor, "train gradients", progress)
    return diagnosis_of(influence, sums, influence.solves, thorough=True)


def meets_the_loss(influence: ComposableInfluence) -> bool:
    """Whether the train gradients that the method sees are the loss's own: not unit gradients, or margins'."""
    return influence.provider is influence.source and influence.method.assumes_minimum


def diagnosis_of(
    influence: ComposableInfluence,
    sums: GradientSums | None,
    solves: Mapping[str, SolveReport],
    *,
    thorough: bool = False,
) -> Diagnosis:
    """What is at hand; thorough: and what costs products and decompositions."""
    whole, gradients = (None, {}) if sums is None else stationarity(influence, sums)
    return Diagnosis(
        method=influence.method.describe(),
        rows=float(influence.n_train),
        rows_seen=0.0 if sums is None else sums.weight,
        blocks=OrderedDict(
            (name, _block(influence, name, status, gradients.get(name), solves.get(name), thorough))
            for name, status in status_of(influence).blocks.items()
        ),
        stationarity=whole,
        inverts=influence.method.approximates is not None,
        assumes_minimum=influence.method.assumes_minimum,
        doubts=influence.doubts,
    )


def _block(
    influence: ComposableInfluence,
    name: str,
    status: BlockStatus,
    gradient: Stationarity | None,
    solve: SolveReport | None,
    thorough: bool,
) -> BlockDiagnosis:
    inverts, curvature = influence.method.approximates is not None, status.curvature
    bounds = _bounds(status, thorough) if inverts else None
    dof = _dof_at_hand(influence, name, thorough) if inverts else None
    return BlockDiagnosis(
        size=status.size,
        damping=status.damping,
        stationarity=gradient,
        nonnegative=inverts and curvature.psd,
        lowest=None if bounds is None else bounds[0],
        highest=None if bounds is None else bounds[1],
        effective_dof=None if dof is None else float(dof.value[0]),
        effective_dof_error=0.0 if dof is None else float(dof.error[0]),
        solves=0 if solve is None else len(solve.residual),
        missed=0 if solve is None else int((~solve.converged).sum()),
        residual=None if solve is None else float(solve.residual.max(initial=0.0)),
        kept_rank=status.kept_rank,
        kept_mass=None if status.kept_mass is None else float(status.kept_mass),
        truncation_error=float(status.truncation_error),
    )


def _bounds(status: BlockStatus, thorough: bool) -> tuple[float, float] | None:
    """Ends of the undamped curvature's spectrum: asked for, or at hand."""
    if thorough:
        return status.bounds
    found = status.curvature.eigenvalues(AT_ONCE)
    return status.curvature.known_bounds if found is None else found.bounds


def _dof_at_hand(influence: ComposableInfluence, block: str, thorough: bool) -> EffectiveDof | None:
    curvature = influence.curvature[block]
    spectrum = influence.method.spectrum(curvature, None if thorough else AT_ONCE)
    if spectrum is None and not thorough:
        return None
    try:
        spectra = [spectrum] if spectrum is not None else _estimated(influence, block, PROBES, 0)
    except (NotFittedError, UnsupportedModel):
        return None
    return _dof(influence, block, spectra, [influence.absolute_damping[block]])
