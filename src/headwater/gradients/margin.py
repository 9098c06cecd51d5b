"""A provider whose function is the margin: train rows are scaled by 1 - p, the chance of another answer."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping

import numpy as np

from headwater.arrays import Array, namespace
from headwater.errors import NonFiniteValue, UnsupportedModel
from headwater.gradients.provider import (
    BlockGradients,
    Fisher,
    Kind,
    Linearised,
    OutputFunction,
    StructuredGradientProvider,
)
from headwater.gradients.view import ProviderView
from headwater.types import Batch

REMEDY = "Give output='loss' to hw.Trak(), which takes any loss."

LOOK = 8
"""Rows of a batch whose losses several models compare with what their margins say."""


class MarginGradientProvider(ProviderView):
    """Query rows have the gradient of minus the margin f = log p/(1-p); train rows have that of their loss.

    1. For cross entropy that is (1 - p) times the gradient of -f, as published: rows that the model is unsure of count
       more.
       Class weights, smoothed labels and a row's share of a penalty are in it too, as the training has them.
    2. Several models share the mean of their 1 - p, so that there a train row's gradient is (1 - p) times that of -f.
    3. Curvature is that of the margins' own gradients. A penalty stands beside it, as for every method.

    A measurement of the user's own takes the margin's place for query rows. In perturbation mode the loss's mixed
    gradients are those of (1 - p) times the margin's gradient: the input changes 1 - p too.

    Errors: UnsupportedModel for a loss without a margin: it has to be a cross entropy with one label a row. A loss that
    is not known by name is compared with log(1 + exp(-f)) on the first rows.
    Source: Park et al. 2023, arXiv 2303.14186.
    """

    def __init__(self, plain: StructuredGradientProvider):
        super().__init__(plain)
        self._models = _models(plain)
        self._known = all(model.likelihood is not None and model.likelihood.has_margin for model in self._models)
        for model in self._models:
            if model.likelihood is not None and model.likelihood.has_margin is False:
                raise UnsupportedModel(
                    f"{type(model.likelihood).__name__} is what is behind this loss, and a margin log p/(1-p) is there "
                    f"only for a cross entropy of logits with one label a row. {REMEDY}"
                )
        self.margin = plain.of_output("margin")
        self._checked = False

    @property
    def explained(self) -> str:
        return "margin" if self.plain.explained == "loss" else self.plain.explained

    def _for(self, query: bool) -> StructuredGradientProvider:
        return self.margin if query and self.plain.explained == "loss" else self.plain

    def grads(self, batch: Batch, *, query: bool = False, weighted: bool = True) -> BlockGradients:
        if query and self.plain.explained != "loss":
            return self.plain.grads(batch, query=True, weighted=weighted)
        self._check(batch)
        if query or len(self._models) == 1:
            return self._for(query).grads(batch, query=query, weighted=weighted)
        # TRAK's Q is the mean of 1 - p over models, taken before it meets any of their gradients (Park et al. 2023).
        return _scaled(self.margin.grads(batch, weighted=weighted), self._shared_one_minus_p(batch))

    def self_grads(self, batch: Batch) -> BlockGradients:
        """Gradients whose length, in any metric, is the score of a row on itself: the margin's times sqrt(1 - p).

        With class weights: times the root of what the loss's gradient is of the margin's. Errors: UnsupportedModel
        where it is no multiple of that (smoothed labels).
        """
        self._check(batch)
        margins = self.margin.grads(batch)
        if len(self._models) > 1:
            return _scaled(margins, self._shared_one_minus_p(batch) ** 0.5)
        if self._factors(batch) == [1.0]:
            return _scaled(margins, self.one_minus_p(batch) ** 0.5)
        return _scaled(margins, _multiples(self.grads(batch), margins) ** 0.5)

    def self_scale(self, batch: Batch) -> Array:
        """Train rows are 1 - p times the margin's gradient, and `self_grads` the root of that times it."""
        self._check(batch)
        if len(self._models) > 1:
            found = self._shared_one_minus_p(batch)
        elif self._factors(batch) == [1.0]:
            found = self.one_minus_p(batch)
        else:
            found = _multiples(self.grads(batch), self.margin.grads(batch))
        xp = namespace(found)
        # A row that is predicted for certain has no gradient: its own score is zero, not infinite.
        safe = xp.where(found > 0, found, xp.ones_like(found))
        return xp.where(found > 0, safe**-0.5, xp.zeros_like(found))

    def curvature_scale(self, self_scale: Array | None) -> Array | None:
        """A train row is 1 - p times the margin's gradient, and `self_scale` one over the root of that."""
        return None if self_scale is None else self_scale**2

    def one_minus_p(self, batch: Batch) -> Array:
        """1 - p, the chance of another answer than the row's target: [n]."""
        return self.margin.one_minus_p(batch)

    def _shared_one_minus_p(self, batch: Batch) -> Array:
        """What several models' margin gradients are scaled by. Errors: UnsupportedModel where that says too little.

        A few rows of every batch are looked at: all of them would take one more pass through each model.
        """
        factors = self._factors(batch if len(batch) <= LOOK else batch.take(_spread(len(batch))))
        if None in factors:
            raise UnsupportedModel(
                "Several models share the mean of their 1 - p, which stands for the plain cross entropy; this "
                f"loss has class weights or smoothed labels besides. {REMEDY}"
            )
        return self.one_minus_p(batch) * sum(f or 0.0 for f in factors) / len(factors)

    def losses(self, batch: Batch, *, query: bool = False) -> Array:
        return self._for(True).losses(batch, query=True) if query else self.margin.losses(batch)

    def fisher_grads(
        self, batch: Batch, fisher: Fisher, *, draws: range = range(1), seed: int = 0
    ) -> list[BlockGradients]:
        self._check(batch)
        if fisher == "empirical":
            return [self.margin.grads(batch, weighted=False)]
        return self.margin.fisher_grads(batch, fisher, draws=draws, seed=seed)

    def ggn_grads(self, batch: Batch) -> list[BlockGradients] | None:
        self._check(batch)
        return self.margin.ggn_grads(batch)

    def curvature_product(self, batch: Batch, block: str, vectors: Array, kind: Kind) -> Array:
        self._check(batch)
        return self.margin.curvature_product(batch, block, vectors, kind)

    def linearised(self, batch: Batch, block: str, kind: Kind) -> Linearised | None:
        self._check(batch)
        return self.margin.linearised(batch, block, kind)

    def of_output(self, function: OutputFunction) -> StructuredGradientProvider:
        return self.plain.of_output(function)

    def mixed_prod(self, batch: Batch, factors: Mapping[str, Array]) -> Array:
        self._need_one_model()
        return self.plain.mixed_prod(batch, factors)

    def flat_mixed_grads(self, batch: Batch) -> Array:
        self._need_one_model()
        return self.plain.flat_mixed_grads(batch)

    def _need_one_model(self) -> None:
        if len(self._models) > 1:
            raise UnsupportedModel(
                "mode='perturbation' differentiates (1 - p) times the margin's gradient, and several models share the "
                f"mean of their 1 - p. Use one model, or mode='up'. {REMEDY}"
            )

    def _check(self, batch: Batch) -> None:
        """On the first rows. Errors: UnsupportedModel for targets without a margin, and losses that know none."""
        if self._checked:
            return
        for model, own in self._pairs():
            losses = model.losses(batch)  # first: what is not finite here is no matter of margins
            try:
                margins = own.losses(batch)
            except NonFiniteValue as error:
                raise UnsupportedModel(
                    "The first rows have no margin log p/(1-p): that needs one label a row, a class or 0 / 1. " + REMEDY
                ) from error
            if not self._known and _factor(losses, softplus(margins)) is None:
                raise UnsupportedModel(
                    "The losses of the first rows are no multiple of log(1 + exp(-f)), f the margin log p/(1-p) of "
                    "their targets: this is no cross entropy of one label a row, or one with class weights or "
                    f"smoothing, and then likelihood='cross_entropy' says so. {REMEDY}"
                )
        self._checked = True

    @property
    def form(self) -> int:
        return self.plain.form + self.margin.form

    def begin_pass(self) -> None:
        self.plain.begin_pass()
        self.margin.begin_pass()

    def _factors(self, batch: Batch) -> list[float | None]:
        """For each model what its losses are of log(1 + exp(-f)), whose gradient is 1 - p times that of -f; None if no
        multiple."""
        return [_factor(model.losses(batch), softplus(own.losses(batch))) for model, own in self._pairs()]

    def _pairs(self) -> Iterable[tuple[StructuredGradientProvider, StructuredGradientProvider]]:
        """Each model with its loss, and with its margin."""
        return zip(self._models, _models(self.margin), strict=True)


def _models(provider: StructuredGradientProvider) -> list[StructuredGradientProvider]:
    """Those of an ensemble, or the only one."""
    found: list[StructuredGradientProvider] = []

    def seen(model: StructuredGradientProvider) -> StructuredGradientProvider:
        found.append(model)
        return model

    provider.each(seen)
    return found


def _spread(rows: int) -> np.ndarray:
    """`LOOK` rows, evenly over the batch."""
    return np.linspace(0, rows - 1, LOOK).astype(np.int64)


def softplus(x: Array) -> Array:
    """log(1 + exp(x)) without overflow."""
    xp = namespace(x)
    return xp.logaddexp(xp.zeros_like(x), x)


def _factor(losses: Array, expected: Array) -> float | None:
    """c, where all losses are c times what is expected, up to rounding; exactly one where they are that itself."""
    xp = namespace(losses)
    eps, size = float(xp.finfo(losses.dtype).eps), float(xp.sum(expected**2))
    fitted = float(xp.sum(losses * expected)) / size if size else 1.0
    for factor in (1.0, fitted):
        allowed = eps**0.5 * (1.0 + float(xp.max(xp.abs(losses))))
        if factor > 0 and float(xp.max(xp.abs(losses - factor * expected))) <= allowed:
            return factor
    return None


def _multiples(grads: BlockGradients, of: BlockGradients) -> Array:
    """c, where each row's gradient is c times the other one: [n]. Errors: UnsupportedModel where it is no multiple."""
    first = next(iter(of.values()))
    xp, found = namespace(first.like), []
    for k in range(first.rows):
        row = slice(k, k + 1)
        mine, other = ({n: v.take(row).flat()[0] for n, v in values.items()} for values in (grads, of))
        size = sum(xp.sum(v**2) for v in other.values())
        factor = sum(xp.sum(mine[n] * v) for n, v in other.items()) / xp.where(size > 0, size, xp.ones_like(size))
        gap = sum(xp.sum((mine[n] - factor * v) ** 2) for n, v in other.items()) ** 0.5
        if float(gap) > float(xp.finfo(size.dtype).eps) ** 0.5 * float(sum(xp.sum(v**2) for v in mine.values())) ** 0.5:
            raise UnsupportedModel(
                "The gradient of this loss is no multiple of the margin's (smoothed labels?), so that a row's score on "
                f"itself is no length. Take the diagonal of influences(x, y). {REMEDY}"
            )
        found.append(xp.clip(factor, min=0.0))
    return xp.stack(found)


def _scaled(values: BlockGradients, scale: Array) -> BlockGradients:
    """Row n times scale[n]."""
    xp = namespace(scale)
    return OrderedDict((name, value.weighted(xp.astype(scale, value.like.dtype))) for name, value in values.items())
