"""Hessian, generalised Gauss-Newton and Fisher of the mean loss, exact and matrix-free: one operator for each block.

All are means over the training rows. Costs per product and row, in forward passes: GGN about 4 and Hessian 6 by
differentiation; GGN and Fisher 2, and as many backward passes as there are outputs or draws once for all vectors, from
gradients kept as outer products.
Source: Pearlmutter 1994; Schraudolph 2002; Martens 2020, arXiv 1412.1193.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from headwater.arrays import Array, device, identity, itemsize, namespace, working_memory_limit
from headwater.curvature.exact import Curvature, check_kind
from headwater.curvature.passes import batches, first_batch, known_rows, positive_weight, total_weight
from headwater.errors import BatchMismatch, NonFiniteValue
from headwater.gradients.draws import DrawsProduct, squared_norms
from headwater.gradients.provider import BlockGradients, Fisher, StructuredGradientProvider
from headwater.memory import as_many_as_fit
from headwater.operators.algebra import LinearOperator, rowwise_inner
from headwater.operators.finite import REMEDY, refuse_nonfinite
from headwater.operators.iterative import host
from headwater.operators.krylov import Bounds, extreme_eigenvalues
from headwater.operators.sketch import normal_vectors, sign_vectors
from headwater.random import row_uniforms
from headwater.types import Batch, join

EXACT_TRACE = 256
"""Parameters of a block up to which a trace that no gradients give is summed up exactly, from as many products."""
PROBES = 64
"""Random vectors that estimate the trace of a larger block."""
FEW_VECTORS = 4
"""Vectors up to which differentiating twice costs less than gradients of every output."""


@dataclass(frozen=True, eq=False)
class Rows:
    """One batch on its way through a product: its gradients where curvature is a sum of g g^T, else None."""

    batch: Batch
    draws: list[BlockGradients] | None
    weights: Array | None
    total: float


class RowDraws:
    """The rows of a data set, batch by batch, with their draws; kept in memory where all of them fit."""

    def __init__(
        self,
        provider: StructuredGradientProvider,
        loader: Iterable[Any],
        kind: Curvature,
        fisher: Fisher,
        seed: int,
        progress: bool,
        keep: bool = True,
    ):
        self.provider, self.loader, self.kind = provider, loader, kind
        self.fisher: Fisher = "empirical" if kind == "empirical_fisher" else fisher
        self.seed, self.progress = seed, progress
        self._kept: list[Rows] | None = None
        self.has_draws = False
        """Whether all rows turned out to have draws, at the last full pass that asked for them."""
        self.weight = 0.0
        """The rows' total weight, at the last full pass."""
        self._fits = keep and kind != "hessian"

    @property
    def label(self) -> str:
        return self.kind.replace("_", " ")

    def rows(self, with_draws: bool) -> Iterator[Rows]:
        """Every batch, once. Without draws where they would cost more than they save."""
        if self._kept is not None:
            yield from self._kept
            return
        kept: list[Rows] = []
        weight, complete = 0.0, with_draws
        room = KEPT_SHARE * working_memory_limit()
        for batch in batches(self.provider, self.loader, self.label, self.progress):
            draws = self._draws(batch) if with_draws else None
            rows = Rows(batch, draws, self.provider.row_weights(batch), total_weight(self.provider, batch))
            weight, complete = weight + rows.total, complete and draws is not None
            room -= size_of(draws)
            self._fits &= draws is not None and room >= 0
            if with_draws and self._fits:
                kept.append(rows)
            else:
                kept.clear()
            yield rows
        self.weight = weight
        if with_draws:
            self.has_draws = complete
        if with_draws and self._fits:
            self._kept = kept

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


STEP_DRAWS = 1 << 20
"""Where the numbers begin that put rows into order; those of labels are below."""
KEPT_SHARE = 4
"""Times the working memory that draws may take up between passes."""


def size_of(draws: list[BlockGradients] | None) -> int:
    """Bytes; arrays that draws share are counted once."""
    arrays = {
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
        product, rest, weight = DrawsProduct(self.source.provider.layouts[self.block], vectors), None, 0.0
        for rows in self.source.rows(self._want_draws(int(vectors.shape[0]))):
            weight += rows.total
            if rows.draws is not None:
                product.add([draw[self.block] for draw in rows.draws], rows.weights)
                continue
            found = self.source.provider.curvature_product(rows.batch, self.block, vectors, self.source.kind)  # type: ignore[arg-type]
            rest = found if rest is None else rest + found
        total = product.value if rest is None else product.value + rest
        found = refuse_nonfinite(
            total / positive_weight(weight), f"A product of the {self.source.label} of block {self.block!r}"
        )
        return found.reshape(tensor.shape)

    def _want_draws(self, vectors: int) -> bool:
        kind = self.source.kind
        return kind != "hessian" and (kind != "ggn" or self.source.is_kept or vectors > FEW_VECTORS)

    def adjoint(self) -> CurvatureOperator:
        return self

    def trace(self) -> float:
        """Exact where gradients or few products give it, else Hutchinson's estimate (`trace_error`)."""
        if self.known_trace is None:
            self.set_trace(*_trace_by_products(self))
        assert self.known_trace is not None
        return self.known_trace

    def set_trace(self, trace: float, error: float = 0.0) -> None:
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


def fit_products(
    provider: StructuredGradientProvider,
    loader: Iterable[Any],
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
    traces, weight, complete = dict.fromkeys(operators, 0.0), 0.0, True
    for rows in source.rows(with_draws=kind != "hessian"):
        weight += rows.total
        complete &= rows.draws is not None
        for name in operators if rows.draws is not None else ():
            norms = squared_norms([draw[name] for draw in rows.draws or ()])
            weighted = norms if rows.weights is None else norms * rows.weights
            traces[name] += float(namespace(norms).sum(weighted))
    positive_weight(weight)
    if complete:
        for name, operator in operators.items():
            operator.set_trace(traces[name] / weight)
    return operators, weight


def fit_steps(
    provider: StructuredGradientProvider,
    loader: Iterable[Any],
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
    loader = known_rows(provider, loader)
    keys = np.concatenate([provider.row_keys(batch) for batch in batches(provider, loader, "rows of the steps")])
    rows = min(rows, len(keys))
    step_of = np.full((steps * rows, 2), -1)  # (row, step), in any order
    each = len(keys) // rows
    for epoch in range(-(-steps // each)):
        order = np.argsort(row_uniforms(keys, 1, draw=STEP_DRAWS + epoch, seed=seed)[:, 0, 0], kind="stable")
        first = epoch * each
        taken = order[: min(each, steps - first) * rows]
        step_of[first * rows : first * rows + len(taken)] = np.stack(
            [taken, first + np.arange(len(taken)) // rows], axis=1
        )
    pieces: list[list[Batch]] = [[] for _ in range(steps)]
    start = 0
    for batch in batches(provider, loader, "rows of the steps"):
        if not np.array_equal(provider.row_keys(batch), keys[start : start + len(batch)]):  # rows with ids may move
            raise BatchMismatch("The loader gives other rows, or another order, than at first; pass shuffle=False.")
        inside = step_of[(step_of[:, 0] >= start) & (step_of[:, 0] < start + len(batch))]
        for step in np.unique(inside[:, 1]):
            pieces[step].append(batch.take(np.sort(inside[inside[:, 1] == step, 0]) - start))
        start += len(batch)
    sources = [RowDraws(provider, join(piece), kind, fisher, seed, False, keep=False) for piece in pieces]
    return {name: [CurvatureOperator(source, name) for source in sources] for name in provider.layouts}


def _trace_by_products(operator: CurvatureOperator) -> tuple[float, float]:
    """The trace, and its standard error. Source: Hutchinson 1990."""
    size, like = operator.input_size, operator.like
    if size <= EXACT_TRACE:
        return float(namespace(like).linalg.trace(operator.apply(identity(size, like)))), 0.0
    step, found = as_many_as_fit(PROBES, 3.0 * size * itemsize(like), device(like)), np.zeros(0)
    for start in range(0, PROBES, step):
        count = min(step, PROBES - start)
        probes = sign_vectors(count, size, like, seed=operator.source.seed, stream=0, first=start)
        found = np.append(found, host(rowwise_inner(operator.apply(probes), probes)))
    return float(found.mean()), float(found.std(ddof=1) / PROBES**0.5)
