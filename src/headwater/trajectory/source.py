"""SOURCE: unrolling in a few segments, with the mean curvature of each in Kronecker bases.

1. A segment l of the training takes K steps. c = sum of its rates (over 1 - momentum); H = the mean over its states of
   the Fisher, diagonal in a Kronecker eigenbasis, plus the weight decay; gbar_i = the mean over its states of row i's
   gradient. Seen as a flow of constant curvature, a weight on row i moves the parameters at its end by

       F gbar_i,  F = (1 - exp(-c H)) / H,     and what was moved before it by  B = exp(-c H).

2. So the query's loss falls, for a unit of weight in the mean objective, by

       score(q, i) = sum over segments l of < F_l prod over l' > l of B_l' q, gbar_i >     (H, F, B symmetric).

3. Adam steps by S g in place of c g, S = sum of rates times the mean of 1 / (root of the second moment + eps). With
   M = S^1/2 H S^1/2 (+ the decoupled decay): F = S^1/2 (1 - exp(-M)) / M S^1/2, and B as it meets a query is
   S^-1/2 exp(-M) S^1/2. M is no Kronecker operator, and its functions are Lanczos'.

Layout: one query factor for each state, q [q, D] by block; a row's score is the sum over states of the dot product of
that with its gradient there.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from headwater.arrays import Array, as_like, namespace, to_numpy
from headwater.blocks import Layout
from headwater.curvature.kronecker import fit_mean_ekfac
from headwater.errors import InvalidSetting, NotConverged
from headwater.gradients.block import BlockGradient
from headwater.gradients.provider import StructuredGradientProvider
from headwater.influence import ComposableInfluence
from headwater.operators.kronecker import EigenKroneckerOperator
from headwater.operators.structured import BlockDiagonalOperator
from headwater.rows import PlacedBatch, Rows
from headwater.run.queries import Asked
from headwater.run.rows import check_scores
from headwater.run.tiles import Scorer
from headwater.trajectory.functions import function_of
from headwater.trajectory.methods import Source
from headwater.trajectory.rules import AdamRule, Rates
from headwater.trajectory.trajectory import Trajectory

Flat = OrderedDict[str, Array]
"""By block: [q, D_block]."""
FAR = 0.02
"""Relative change by the last products of Lanczos above which it is said."""


@dataclass(frozen=True)
class Span:
    """The steps of a segment, and those before which its states were kept that are used."""

    start: int
    stop: int
    states: tuple[int, ...]


def spans(record: Trajectory, segments: int, checkpoints: int) -> list[Span]:
    """Errors: InvalidSetting for a segment without a kept state."""
    cuts = [round(k * record.steps / segments) for k in range(segments + 1)]
    found = []
    for start, stop in pairwise(cuts):
        # The state before a segment's first step is that of its beginning; the last one, of the end.
        inside = [step for step in record.kept if start <= step < stop or (step == stop == record.steps)]
        if not inside or stop <= start:
            raise InvalidSetting(
                f"Of steps {start} to {stop}, one of {segments} segments, no state was kept (kept are "
                f"{list(record.kept)}). Use fewer segments, or record with keep='all'."
            )
        # Spread over the segment, as one state of many may not stand for it.
        wanted = [start + (2 * k + 1) * (stop - start) / (2 * checkpoints) for k in range(checkpoints)]
        chosen = {inside[int(np.argmin(np.abs(np.array(inside) - at)))] for at in wanted}
        found.append(Span(start, stop, tuple(sorted(chosen))))
    return found


@dataclass(frozen=True, eq=False)
class Segment:
    """What a segment does to a query's gradient on its way back."""

    span: Span
    rate: float
    """Of its steps together: the sum of the first group's learning rates."""
    providers: Sequence[StructuredGradientProvider]
    """The model at each of its states."""
    curvature: Mapping[str, BlockDiagonalOperator[EigenKroneckerOperator]]
    speed: Mapping[str, np.ndarray]
    """S, what a step's gradient is multiplied by, summed over the steps: [D_block]."""
    coupled: Mapping[str, np.ndarray]
    """Weight decay that is added to the curvature: [D_block]."""
    decoupled: Mapping[str, np.ndarray]
    """Weight decay beside it, summed over the steps: [D_block]."""

    def cells(self, number: int) -> list[str]:
        """Of a table: its number, steps, states and summed rates."""
        states = ", ".join(map(str, self.span.states))
        return [str(number), f"{self.span.start} to {self.span.stop - 1}", states, f"{self.rate:.3g}"]

    def reacted(self, queries: Flat) -> Flat:
        """F q."""
        return OrderedDict((name, self._of(name, q, _answered, 0.5)) for name, q in queries.items())

    def passed(self, queries: Flat) -> Flat:
        """B q, as a query meets it."""
        return OrderedDict((name, self._of(name, q, _decayed, -0.5)) for name, q in queries.items())

    def _of(self, name: str, q: Array, function: Any, after: float) -> Array:
        """S^after f(M) S^1/2 q. M = S^1/2 (H + coupled) S^1/2 + decoupled."""
        speed, coupled, decoupled = self.speed[name], self.coupled[name], self.decoupled[name]
        block = self.curvature[name]
        if all(np.ptp(part) == 0 for part in (speed, coupled, decoupled)):
            c, added, beside = float(speed[0]), float(coupled[0]), float(decoupled[0])
            factor = c if after > 0 else 1.0  # S^1/2 S^1/2, or S^-1/2 S^1/2
            parts = [
                part.with_spectrum(_on(part.spectrum, lambda s: factor * function(c * (s + added) + beside)))
                for part in block.operators
            ]
            return BlockDiagonalOperator(block.layout, parts).apply(q)
        root = as_like(speed**0.5, q)
        shift = as_like(coupled * speed + decoupled, q)

        def product(v: Array) -> Array:
            return root * block.apply(root * v) + shift * v

        found, change = function_of(product, root * q, function)
        if change > FAR:
            warnings.warn(
                NotConverged(
                    f"Block {name!r}: Lanczos left a change of {change:.2g} in SOURCE's functions of the curvature. "
                    "Rates times eigenvalues are large here; more segments make each of them smaller."
                ),
                stacklevel=2,
            )
        return found * (root if after > 0 else 1 / root)


def _answered(x: np.ndarray) -> np.ndarray:
    """(1 - exp(-x)) / x, 1 at zero; eigenvalues below zero are rounding."""
    x = np.maximum(x, 0.0)
    return np.where(x > 1e-8, -np.expm1(-x) / np.maximum(x, 1e-300), 1.0 - x / 2)


def _decayed(x: np.ndarray) -> np.ndarray:
    return np.exp(-np.maximum(x, 0.0))


def _on(spectrum: Array, function: Any) -> Array:
    return as_like(function(to_numpy(spectrum).astype(np.float64)), spectrum)


def fit_segments(
    provider_at: Callable[[Mapping[str, np.ndarray]], StructuredGradientProvider],
    method: Source,
    rows: Rows,
    progress: bool,
) -> list[Segment]:
    """In the order of training. Two passes over the rows for each state that is used.

    provider_at: of the model at other parameters.
    """
    record = method.trajectory
    found = []
    for span in spans(record, method.segments, method.checkpoints):
        states = [record.state(step) for step in span.states]
        providers = [provider_at(state.parameters) for state in states]
        curvature = fit_mean_ekfac(
            providers, rows, fisher=method.fisher, samples=method.samples, seed=method.random_seed, progress=progress
        )
        speed, coupled, decoupled = speeds(record, span)
        layouts = providers[0].layouts
        rate = sum(record.step(number).rates[0].lr for number in range(span.start, span.stop))
        found.append(
            Segment(
                span, rate, providers, curvature, *(_in_blocks(layouts, part) for part in (speed, coupled, decoupled))
            )
        )
    return found


def speeds(record: Trajectory, span: Span) -> tuple[dict[str, np.ndarray], ...]:
    """S, coupled and decoupled decay of every parameter, [*shape] by name."""
    rule, names = record.rule, record.names
    rates: dict[str, list[Rates]] = {name: [] for name in names}
    for number in range(span.start, span.stop):
        for name, rate in record.rates(record.step(number)).items():
            rates[name].append(rate)
    scale = {name: np.ones(record.header.shapes[name]) for name in names}
    if isinstance(rule, AdamRule):
        scale = _adam_scales(record, rule, span)
    speed, coupled, decoupled = {}, {}, {}
    for name in names:
        # Momentum repeats a gradient 1 / (1 - mu) times; Adam's mean is a mean.
        total = sum(r.lr / (1.0 if rule.is_adaptive else 1.0 - r.first) for r in rates[name])
        decay = sum(r.weight_decay for r in rates[name]) / len(rates[name])
        beside = isinstance(rule, AdamRule) and rule.decoupled
        one = np.ones_like(scale[name])
        speed[name] = total * scale[name]
        coupled[name] = (0.0 if beside else decay) * one
        decoupled[name] = (sum(r.lr * r.weight_decay for r in rates[name]) if beside else 0.0) * one
    return speed, coupled, decoupled


def _adam_scales(record: Trajectory, rule: AdamRule, span: Span) -> dict[str, np.ndarray]:
    """The mean over the segment's states of 1 / (root + eps); of the step after a state that is the first."""
    found: dict[str, list[np.ndarray]] = {name: [] for name in record.names}
    # Before the first step nothing is remembered: then what the segment ends with stands for it.
    known = [step for step in span.states if record.count(step) > 1] or [
        step for step in record.kept if span.start < step <= span.stop
    ]
    for step in known:
        count = record.count(step) - 1
        rates = record.rates(record.step(max(0, step - 1)))
        for name, square in record.state(step).memory["square"].items():
            corrected = square.astype(np.float64) / (1 - rates[name].second ** count)
            found[name].append(1 / (np.sqrt(corrected) + rule.eps))
    if not all(found.values()):
        raise InvalidSetting(
            f"Of steps {span.start} to {span.stop} only the state before the first step was kept, when Adam remembers "
            "nothing yet. Use more checkpoints or fewer segments, or record with keep='all'."
        )
    return {name: np.mean(scales, axis=0) for name, scales in found.items()}


def _in_blocks(layouts: Mapping[str, Layout], values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {
        name: np.concatenate([values[p.name].reshape(-1) for p in layout.block.parameters])
        for name, layout in layouts.items()
    }


class SourceScorer(Scorer):
    """Scores of train rows on some queries: at each state, the dot product of a query factor and a row's gradient."""

    def __init__(
        self,
        influence: ComposableInfluence,
        segments: Sequence[Segment],
        asked: Asked,
        scale: float,
        by_block: bool = False,
    ) -> None:
        self.influence, self.segments, self.asked, self.scale = influence, segments, asked, scale
        self.by_block = by_block
        self._factors: list[tuple[StructuredGradientProvider, OrderedDict[str, BlockGradient]]] | None = None

    @property
    def factors(self) -> list[tuple[StructuredGradientProvider, OrderedDict[str, BlockGradient]]]:
        """A state's model, and the queries as they meet its gradients."""
        if self._factors is None:
            self._factors = self._made()
        return self._factors

    def _made(self) -> list[tuple[StructuredGradientProvider, OrderedDict[str, BlockGradient]]]:
        q = _query_grads(self.influence.provider, self.asked)
        found = []
        for segment in reversed(self.segments):
            share = 1.0 / len(segment.providers)
            answered = segment.reacted(q)
            for provider in segment.providers:
                left = OrderedDict(
                    (name, BlockGradient.from_flat(provider.layouts[name], value * share))
                    for name, value in answered.items()
                )
                found.append((provider, left))
            q = segment.passed(q)
        return found

    def scores(self, piece: PlacedBatch) -> np.ndarray:
        found = self._met(piece) * self.scale
        check_scores(found, self.asked.ids, piece.names, self.influence)
        return found

    def _met(self, piece: PlacedBatch, weighted: bool = True) -> np.ndarray:
        """[block, q, n], or of all blocks together [1, q, n]."""
        total: Any = None
        for provider, left in self.factors:
            grads = provider.grads(piece.batch, weighted=weighted)
            each = [to_numpy(left[name].inner(value)).astype(np.float64) for name, value in grads.items()]
            mine = np.stack(each) if self.by_block else np.stack(each).sum(axis=0, keepdims=True)
            total = mine if total is None else total + mine
        return np.asarray(total)

    def probe(self, piece: PlacedBatch) -> np.ndarray:
        return self._met(piece, weighted=False)


def _query_grads(provider: StructuredGradientProvider, asked: Asked) -> Flat:
    pieces = [provider.grads(piece.batch, query=True) for piece in asked.pieces]
    found: Flat = OrderedDict()
    for name in pieces[0]:
        flat = [piece[name].flat() for piece in pieces]
        xp = namespace(*flat)
        whole = xp.concat(flat, axis=0)
        found[name] = whole if asked.share is None else xp.sum(whole, axis=0, keepdims=True) * asked.share
    return found
