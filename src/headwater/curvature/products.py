"""Hessian, generalised Gauss-Newton and Fisher of the mean loss, exact and matrix-free: one operator for each block.

All are means over the training rows. Costs per product and row, in forward passes: GGN about 4 and Hessian 6 by
differentiation; GGN and Fisher 2, and as many backward passes as there are outputs or draws once for all vectors, from
gradients kept as outer products.
Source: Pearlmutter 1994; Schraudolph 2002; Martens 2020, arXiv 1412.1193.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import chain
from typing import Any, Generic

import numpy as np

from headwater.arrays import (
    Array,
    device,
    identity,
    itemsize,
    namespace,
    working_memory_is_bounded,
    working_memory_limit,
)
from headwater.curvature.exact import Curvature, check_kind
from headwater.curvature.means import positive_weight, total_weight
from headwater.errors import BatchMismatch, NonFiniteValue
from headwater.gradients.block import BlockGradient
from headwater.gradients.draws import DrawsProduct, are_single_products, squared_norms
from headwater.gradients.provider import BlockGradients, Fisher, Linearised, StructuredGradientProvider
from headwater.memory import as_many_as_fit, available_memory, on_host
from headwater.operators.algebra import LinearOperator, rowwise_inner
from headwater.operators.finite import REMEDY, refuse_nonfinite
from headwater.operators.iterative import host
from headwater.operators.krylov import Bounds, extreme_eigenvalues
from headwater.operators.sketch import normal_vectors, sign_vectors
from headwater.random import row_uniforms
from headwater.rows import (
    Accumulator,
    Each,
    Found,
    Part,
    PlacedBatch,
    Rows,
    Total,
    Visitor,
    first_batch,
    fold,
    serial,
    sweep,
)
from headwater.types import Batch, join

EXACT_TRACE = 256
"""Parameters of a block up to which a trace that no gradients give is summed up exactly, from as many products."""
PROBES = 64
"""Random vectors that estimate the trace of a larger block."""
SHARED_VECTORS = 8
"""Vectors up to which what a Hessian's products share is worth keeping: of 4 at a time it is a sixth, of 20 a tenth."""
FEW_VECTORS = 4
"""Vectors up to which differentiating twice costs less than gradients of every output."""


@dataclass(frozen=True, eq=False)
class DrawnRows:
    """One batch on its way through a product: its gradients where curvature is a sum of g g^T, else None."""

    batch: Batch
    start: int
    """Position, in the loader, of the first row."""
    draws: list[BlockGradients] | None
    weights: Array | None
    total: float
    linearised: Linearised | None = None
    """What products with few vectors share, where it is kept from one to the next."""
    principal: dict[str, list[BlockGradient]] = field(default_factory=dict)
    """For each block that has asked for them, other draws with the same sum, the longest first."""


class _Repeated(threading.local):
    """Of this thread's solve: the block that it multiplies with, and the rows whose products it has linearised."""

    def __init__(self) -> None:
        self.block: str | None = None
        self.rows: list[DrawnRows] | None = None
        self.fits = True

    def __reduce__(self) -> tuple[type[_Repeated], tuple[()]]:
        return _Repeated, ()  # a copy is in the middle of nothing


class RowDraws:
    """The rows of a data set, batch by batch, with their draws; kept in memory where all of them fit."""

    def __init__(
        self,
        provider: StructuredGradientProvider,
        loader: Iterable[object],
        kind: Curvature,
        fisher: Fisher,
        seed: int,
        progress: bool,
        keep: bool = True,
    ):
        self.provider, self.loader, self.kind = provider, loader, kind
        self.fisher: Fisher = "empirical" if kind == "empirical_fisher" else fisher
        self.seed, self.progress = seed, progress
        self._kept: list[DrawnRows] | None = None
        self.has_draws = False
        """Whether all rows turned out to have draws, at the last full pass that asked for them."""
        self.weight = 0.0
        """The rows' total weight, at the last full pass."""
        # A Hessian is no sum of g g^T, so that there is nothing to keep.
        self._fits = keep and kind != "hessian"
        self._repeated = _Repeated()

    @property
    def label(self) -> str:
        return self.kind.replace("_", " ")

    @contextmanager
    def repeated(self, block: str) -> Iterator[None]:
        """Several products of one block in a row: what they share is kept until the end, where all of it fits."""
        now = self._repeated
        # Nested, it is the outer one's. Other processes that visit rows cannot hand over a graph.
        elsewhere = isinstance(self.loader, Rows) and self.loader.runner not in (None, serial)
        if now.block is not None or self.kind != "hessian" or elsewhere:
            yield
            return
        now.block, now.fits = block, True
        try:
            yield
        finally:
            now.block = now.rows = None

    def sweep(self, visitor: Visitor[DrawnRows, Part, Found], with_draws: bool, linear: str | None = None) -> Found:
        """Visit every batch, once. Without draws where they would cost more than they save.

        linear: the block with which all rows are to be multiplied by few vectors, for what `repeated` keeps.
        """
        now = self._repeated
        kept = now.rows if linear is not None and linear == now.block else self._kept
        if kept is not None:
            return visitor.finish(fold(visitor, kept))
        linear = linear if now.fits and linear == now.block else None
        # After one pass in which they did not fit, none tries again: it would fill memory for nothing.
        trying = linear is not None or (with_draws and self._fits)
        room = -1.0
        if trying:
            room = room_for_draws(self.provider.device) if with_draws else KEPT_SHARE * working_memory_limit()
        keeping = _Keeping(visitor, partial(self.drawn, with_draws=with_draws, linear=linear), room)
        met = sweep(self.provider, self.loader, keeping, self.label, self.progress)
        # A later pass without draws keeps what is known of draws, and still has to know the weight.
        self.weight = met.weight
        if with_draws:
            self.has_draws, self._kept, self._fits = met.has_draws, met.kept, met.kept is not None
        if linear is not None:
            now.rows, now.fits = met.kept, met.kept is not None
        return visitor.finish(met.part)

    def drawn(self, piece: PlacedBatch, with_draws: bool, linear: str | None = None) -> DrawnRows:
        """Some rows with their draws, or without; linear: and the products of a block linearised."""
        batch, draws = piece.batch, self._draws(piece.batch) if with_draws else None
        weights, total = self.provider.row_weights(batch), total_weight(self.provider, batch)
        kept = None if linear is None else self.provider.linearised(batch, linear, "hessian")
        return DrawnRows(batch, piece.start, draws, weights, total, kept)

    def _draws(self, batch: Batch) -> list[BlockGradients] | None:
        if self.kind == "hessian":
            return None
        if self.kind == "ggn":
            return self.provider.ggn_grads(batch)
        return self.provider.fisher_grads(batch, self.fisher, seed=self.seed)

    @cached_property
    def like(self) -> Array:
        """Some array of the provider's: its framework, dtype and device."""
        first = first_batch(self.provider, self.loader)
        return next(iter(self.provider.grads(first).values())).like

    @property
    def is_kept(self) -> bool:
        return self._kept is not None

    def keep(self) -> bool:
        """Whether the rows' draws are in memory; after a pass, where none has tried (a fit that was loaded)."""
        if self._kept is None and self._fits and self.has_draws:
            self.sweep(Each(lambda rows: len(rows.batch)), with_draws=True)
        return self.is_kept

    def has_single_products(self, block: str) -> bool:
        """Whether all draws are in memory, each of them one outer product for each part of the block."""
        pieces = self._kept or ()
        return bool(pieces) and all(are_single_products(draw[block]) for piece in pieces for draw in piece.draws or ())


@dataclass(eq=False)
class _Met(Generic[Part]):
    """What a visitor made of some rows; and their weight, whether all had draws, these rows if they are kept."""

    part: Part
    weight: float
    has_draws: bool
    kept: list[DrawnRows] | None
    size: int


@dataclass(frozen=True, eq=False)
class _Keeping(Visitor[PlacedBatch, _Met[Part], _Met[Part]]):
    """Draws for another visitor, kept as long as there is room for all of them."""

    inner: Visitor[DrawnRows, Part, Any]
    drawn: Callable[[PlacedBatch], DrawnRows]
    room: float
    """Bytes; negative where nothing is kept."""

    def of(self, item: PlacedBatch) -> _Met[Part]:
        # The visitor sees the rows with draws that were made once, here; keeping them costs no second pass.
        return self._met(rows := self.drawn(item), self.inner.of(rows))

    def add(self, whole: _Met[Part], item: PlacedBatch) -> _Met[Part]:
        rows = self.drawn(item)
        return self._joined(whole, self._met(rows, self.inner.add(whole.part, rows)))

    def merge(self, one: _Met[Part], other: _Met[Part]) -> _Met[Part]:
        return self._joined(one, replace(other, part=self.inner.merge(one.part, other.part)))

    def _met(self, rows: DrawnRows, part: Part) -> _Met[Part]:
        size = size_of(rows.draws) if rows.linearised is None else rows.linearised.size
        held = rows.draws is not None or rows.linearised is not None
        kept = [rows] if held and size <= self.room else None
        return _Met(part, rows.total, rows.draws is not None, kept, size)

    def _joined(self, one: _Met[Part], other: _Met[Part]) -> _Met[Part]:
        """All but the part, which the later one has of both."""
        size, kept = one.size + other.size, one.kept
        # All or none: a part in memory would be out of order with what a pass reads.
        if kept is None or other.kept is None or size > self.room:
            kept = None
        else:
            kept.extend(other.kept)
        return _Met(other.part, one.weight + other.weight, one.has_draws and other.has_draws, kept, size)


STEP_DRAWS = 1 << 20
"""Where the numbers begin that put rows into order; those of labels are below."""
KEPT_SHARE, FREE_SHARE = 4.0, 0.125
"""Times the working memory that may be taken up between passes; and the part of what is free, for draws where nobody
has bounded the working memory."""


def room_for_draws(place: object) -> float:
    """Bytes that draws may take up between passes, on a provider's device."""
    room = KEPT_SHARE * working_memory_limit()
    if working_memory_is_bounded() or not on_host(place):
        return room
    # Rows whose gradients are not kept go through the model again for every product.
    return max(room, FREE_SHARE * available_memory())


def size_of(draws: list[BlockGradients] | None) -> int:
    """Bytes; arrays that draws share are counted once."""
    arrays = {
        # By identity: draws of one row share their inputs a, and differ in b alone.
        id(array): int(np.prod(array.shape)) * itemsize(array)
        for draw in draws or ()
        for block in draw.values()
        for part in block.parts
        for array in part.arrays
    }
    return sum(arrays.values())


class CurvatureOperator(LinearOperator):
    """The curvature of one block over a whole data set, by products alone; each apply is a pass over the rows."""

    symmetric = True

    trace_error: float = 0.0

    def __init__(self, source: RowDraws, block: str, *, known_trace: float | None = None, trace_error: float = 0.0):
        self.source, self.block = source, block
        self.psd = source.kind != "hessian"
        self.known_trace = known_trace
        self.trace_error = trace_error
        self._bounds: Bounds | None = None

    @property
    def input_size(self) -> int:
        return self.source.provider.sizes[self.block]

    def _apply(self, tensor: Array) -> Array:
        vectors = tensor.reshape((-1, self.input_size))
        count = int(vectors.shape[0])
        linear = self.block if count <= SHARED_VECTORS else None
        total, weight = self.source.sweep(_Product(self, vectors), self._want_draws(count), linear)
        found = refuse_nonfinite(
            total / positive_weight(weight), f"A product of the {self.source.label} of block {self.block!r}"
        )
        return found.reshape(tensor.shape)

    def _want_draws(self, vectors: int) -> bool:
        kind = self.source.kind
        # Gradients of all outputs cost a backward pass each, once for all vectors; two derivative passes cost that for
        # each vector.
        return kind != "hessian" and (kind != "ggn" or self.source.is_kept or vectors > FEW_VECTORS)

    def repeated(self) -> AbstractContextManager[None]:
        return self.source.repeated(self.block)

    def adjoint(self) -> CurvatureOperator:
        return self

    def trace(self) -> float:
        """Exact where gradients or few products give it, else Hutchinson's estimate (`trace_error`)."""
        if self.known_trace is None:
            # Not when fitting: a Hessian's trace costs products, and not every damping needs it.
            self.set_trace(*_trace_by_products(self))
        assert self.known_trace is not None
        return self.known_trace

    def set_trace(self, trace: float, error: float = 0.0) -> None:
        """Errors: NonFiniteValue."""
        if not np.isfinite(trace):
            what = f"The trace of the {self.source.label} of block {self.block!r}"
            raise NonFiniteValue(f"{what} is not finite: there are numbers too large for its dtype. {REMEDY}")
        self.known_trace, self.trace_error = trace, error

    @property
    def bounds(self) -> Bounds:
        """The ends of the spectrum, from a few dozen products, the first time."""
        if self._bounds is None:
            self._bounds = extreme_eigenvalues(self, self.start)
        return self._bounds

    @property
    def known_bounds(self) -> tuple[float, float] | None:
        return None if self._bounds is None else (self._bounds.lowest, self._bounds.highest)

    def spectrum_bounds(self) -> tuple[float, float] | None:
        return self.bounds.lowest, self.bounds.highest

    @property
    def start(self) -> Array:
        """A vector of normal random numbers, fixed by the seed: [1, D]."""
        return normal_vectors(1, self.input_size, self.like, seed=self.source.seed)

    @property
    def like(self) -> Array:
        """Some array of the provider's: its framework, dtype and device."""
        return self.source.like


@dataclass(eq=False)
class _Products:
    """Sums over rows of C v: from gradients, and by differentiation; and the rows' total weight."""

    by_draws: DrawsProduct
    rest: Array | None = None
    weight: float = 0.0
    has_draws: bool = False
    """Whether `by_draws` has any rows: else its value is an array of zeros, which costs three passes."""


@dataclass(frozen=True, eq=False)
class _Product(Accumulator[DrawnRows, _Products, tuple[Array, float]]):
    """The sum over rows of C v, for vectors (Q, D); and the rows' total weight."""

    operator: CurvatureOperator
    vectors: Array

    def start(self) -> _Products:
        return _Products(DrawsProduct(self.operator.source.provider.layouts[self.operator.block], self.vectors))

    def add(self, whole: _Products, item: DrawnRows) -> _Products:
        whole.weight += item.total
        source, block = self.operator.source, self.operator.block
        # A batch may have draws and the next one none (a GGN that is no short sum there): sums of both kinds add up.
        if item.draws is not None:
            whole.by_draws.add([draw[block] for draw in item.draws], item.weights)
            whole.has_draws = True
            return whole
        kind: Any = source.kind
        if item.linearised is not None:
            found = item.linearised.product(self.vectors)
        else:
            found = source.provider.curvature_product(item.batch, block, self.vectors, kind)
        whole.rest = found if whole.rest is None else whole.rest + found
        return whole

    def merge(self, one: _Products, other: _Products) -> _Products:
        one.by_draws.include(other.by_draws)
        one.has_draws = one.has_draws or other.has_draws
        if other.rest is not None:
            one.rest = other.rest if one.rest is None else one.rest + other.rest
        one.weight += other.weight
        return one

    def finish(self, whole: _Products) -> tuple[Array, float]:
        if whole.rest is not None and not whole.has_draws:
            return whole.rest, whole.weight
        value = whole.by_draws.value
        return value if whole.rest is None else value + whole.rest, whole.weight


def fit_products(
    provider: StructuredGradientProvider,
    loader: Iterable[object],
    kind: Curvature,
    *,
    fisher: Fisher = "auto",
    seed: int = 0,
    progress: bool = False,
) -> tuple[OrderedDict[str, CurvatureOperator], float]:
    """Every block's own curvature, matrix-free, with its trace; and the rows' total weight."""
    check_kind(kind)
    source = RowDraws(provider, loader, kind, fisher, seed, progress)
    operators = OrderedDict((name, CurvatureOperator(source, name)) for name in provider.layouts)
    # tr(sum g g^T) = sum |g|^2: the pass that counts rows gives every block's trace, too.
    traces = source.sweep(Total(_squares_of(operators)), with_draws=kind != "hessian")
    weight = positive_weight(source.weight)
    if source.has_draws:
        for name, trace in zip(operators, traces, strict=True):
            operators[name].set_trace(float(trace) / weight)
    return operators, weight


def _squares_of(blocks: Iterable[str]) -> Callable[[DrawnRows], np.ndarray]:
    """What some rows add to each block's trace: [block]; zero where they have no draws."""
    names = list(blocks)

    def squares(rows: DrawnRows) -> np.ndarray:
        found = np.zeros(len(names))
        for number, name in enumerate(names if rows.draws is not None else ()):
            # On outer products: |b a^T|^2 = |b|^2 |a|^2 for one position, no D numbers.
            norms = squared_norms([draw[name] for draw in rows.draws or ()])
            weighted = norms if rows.weights is None else norms * rows.weights
            found[number] = float(namespace(norms).sum(weighted))
        return found

    return squares


def fit_steps(
    provider: StructuredGradientProvider,
    loader: Iterable[object],
    kind: Curvature,
    *,
    steps: int,
    rows: int,
    fisher: Fisher = "auto",
    seed: int = 0,
) -> dict[str, list[CurvatureOperator]]:
    """For each block, the curvature of a few rows for each step; whatever the loader's batches.

    Each epoch puts the rows into a random order by their keys, and takes them in turn; a rest too small is left.
    Errors: BatchMismatch if the second pass over the loader gives the rows in another order than the first.
    """
    loader = Rows.of(provider, loader)
    every = Each[PlacedBatch, np.ndarray](lambda piece: provider.row_keys(piece.batch))
    keys = np.concatenate(sweep(provider, loader, every, "rows of the steps"))
    rows = min(rows, len(keys))
    step_of = np.full((steps * rows, 2), -1)  # (row, step), in any order
    # Steps in an epoch; a rest smaller than a step is left, so that every step has the same number of rows.
    each = len(keys) // rows
    for epoch in range(-(-steps // each)):
        # By keys of the rows' content: another order of the loader, or other batches, gives the same steps.
        order = np.argsort(row_uniforms(keys, 1, draw=STEP_DRAWS + epoch, seed=seed)[:, 0, 0], kind="stable")
        first = epoch * each
        taken = order[: min(each, steps - first) * rows]
        step_of[first * rows : first * rows + len(taken)] = np.stack(
            [taken, first + np.arange(len(taken)) // rows], axis=1
        )
    # The rows of all steps stay in memory: steps times rows of them, as batches, not gradients.
    pieces: list[list[Batch]] = [[] for _ in range(steps)]
    for step, batch in chain(*sweep(provider, loader, Each(_by_step(provider, keys, step_of)), "rows of the steps")):
        pieces[step].append(batch)
    sources = [RowDraws(provider, join(piece), kind, fisher, seed, False, keep=False) for piece in pieces]
    return {name: [CurvatureOperator(source, name) for source in sources] for name in provider.layouts}


def _by_step(
    provider: StructuredGradientProvider, keys: np.ndarray, step_of: np.ndarray
) -> Callable[[PlacedBatch], list[tuple[int, Batch]]]:
    """What a piece has of each step's rows. Errors: BatchMismatch for other rows than the keys are of."""

    def taken(piece: PlacedBatch) -> list[tuple[int, Batch]]:
        batch, start, stop = piece.batch, piece.start, piece.start + len(piece.batch)
        if not np.array_equal(provider.row_keys(batch), keys[start:stop]):  # rows with ids may move
            raise BatchMismatch("The loader gives other rows, or another order, than at first; pass shuffle=False.")
        inside = step_of[(step_of[:, 0] >= start) & (step_of[:, 0] < stop)]
        return [
            # In the loader's order: a step is a sum, and its rounding should not depend on the draw.
            (int(step), batch.take(np.sort(inside[inside[:, 1] == step, 0]) - start))
            for step in np.unique(inside[:, 1])
        ]

    return taken


def _trace_by_products(operator: CurvatureOperator) -> tuple[float, float]:
    """The trace, and its standard error. Source: Hutchinson 1990."""
    size, like = operator.input_size, operator.like
    # As many products as Hutchinson would take, and exact.
    if size <= EXACT_TRACE:
        return float(namespace(like).linalg.trace(operator.apply(identity(size, like)))), 0.0
    step, found = as_many_as_fit(PROBES, 3.0 * size * itemsize(like), device(like)), np.zeros(0)
    for start in range(0, PROBES, step):
        count = min(step, PROBES - start)
        # Signs, not normal numbers: z_i^2 = 1 takes the diagonal out of the variance.
        probes = sign_vectors(count, size, like, seed=operator.source.seed, stream=0, first=start)
        found = np.append(found, host(rowwise_inner(operator.apply(probes), probes)))
    return float(found.mean()), float(found.std(ddof=1) / PROBES**0.5)
