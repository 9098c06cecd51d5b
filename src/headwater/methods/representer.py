"""Representer points: how much of a query's logit each train row holds, at the minimum of a regularised loss.

1. Where the mean loss plus l2 / 2 |W|^2 is stationary in W, W = -(1 / (l2 N)) sum_n g_n, with g_n the gradient by W.
2. A logit z_q that is linear in W is <dz_q, W> = sum_n -<dz_q, g_n> / (l2 N): a share for each train row, exactly.
3. A query's measurement is minus its logit, and its gradient -dz_q; so the operator is (1 / l2) I, and a score over N
   is the row's share of the logit. Positive: the row raises it.

Source: Yeh et al. 2018, arXiv 1811.09720.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Real

from headwater.arrays import Array, device, namespace
from headwater.curvature.means import Means, MeansVisitor, no_means, rows_of, total_weight
from headwater.errors import InvalidSetting, UnsupportedModel
from headwater.gradients.block import BlockGradient
from headwater.gradients.ensemble import EnsembleProvider
from headwater.gradients.provider import BlockGradients, OutputFunction, StructuredGradientProvider
from headwater.gradients.view import ProviderView
from headwater.methods.base import Curvatures, FitReads
from headwater.methods.grad_dot import GradDot
from headwater.operators.algebra import IdentityOperator, ScaledOperator
from headwater.rows import PlacedBatch, sweep
from headwater.types import Batch

ByBlock = Mapping[str, Array]


@dataclass(frozen=True)
class Representer(GradDot):
    """<logit gradient of the query, loss gradient of the train row> / l2, for the last layer or a linear model.

    Score / n_train, summed over the train rows, is the query's own logit of its target (or minus the measurement that
    you give). That is a decomposition, no prediction of removal. Name the last layer as the only block, or use a model
    that is linear in its parameters; its bias, if it has one, is regularised too. Damping has no meaning here.

    Errors, at fit: InvalidSetting if the weights are not where the regularised loss is stationary; UnsupportedModel if
    what is explained is not linear in the attributed parameters.
    """

    l2: float
    """The regularisation: training minimised the mean loss plus l2 / 2 times the squared norm of the parameters."""
    tolerance: float = 1e-2
    """The largest relative gap, from stationary and from linear, that is accepted at fit."""

    def __post_init__(self) -> None:
        for name, value in (("l2", self.l2), ("tolerance", self.tolerance)):
            if isinstance(value, bool) or not isinstance(value, Real) or not 0 < float(value) < math.inf:
                raise InvalidSetting(f"{name} is {value!r}; expected a finite number > 0.")

    def view(self, provider: StructuredGradientProvider) -> StructuredGradientProvider:
        """Queries are explained by their logit, unless there is a measurement."""
        return provider if provider.explained != "loss" else provider.each(LogitQueries)

    @property
    def fit_reads(self) -> FitReads:
        # What queries ask, of train rows: whether it is linear in the weights.
        return "model"

    def fit(
        self, provider: StructuredGradientProvider, loader: Iterable[object], progress: bool
    ) -> tuple[Curvatures, float]:
        means = sweep(provider, loader, _MeanGradient(provider, self), "stationarity", progress)
        slopes = OrderedDict((name, mean.value) for name, mean in means.items())
        self._check_stationary(provider, slopes)
        operators = ((name, ScaledOperator(1 / self.l2, IdentityOperator(d))) for name, d in provider.sizes.items())
        return OrderedDict(operators), rows_of(means)

    def _check_stationary(self, provider: StructuredGradientProvider, slopes: ByBlock) -> None:
        """For each model alone: |mean gradient + l2 W| against |l2 W|."""
        for where, model, own in _by_model(provider, slopes):
            pulls = {name: model.parameters(name) * self.l2 for name in own}
            gap, size = _norm([own[name] + pulls[name] for name in own]), _norm(pulls.values())
            if not gap <= self.tolerance * size:
                raise InvalidSetting(
                    f"The weights{where} are not where the mean loss plus l2/2 |W|^2 is stationary at l2 = "
                    f"{self.l2:g}: |mean gradient + l2 W| is {gap:.3g} and |l2 W| is {size:.3g}, a relative gap of "
                    f"{gap / size if size else math.inf:.3g} where {self.tolerance:g} is accepted. Train on until it "
                    "is, or give the l2 of the training."
                )

    def check_linear(self, provider: StructuredGradientProvider, batch: Batch) -> None:
        """For each model alone: <gradient, W> against the value itself, on the batch's rows."""
        for where, model, _ in _by_model(provider, {}):
            grads = model.grads(batch, query=True, weighted=False)
            along = [value.project(model.parameters(name)[None, :])[:, 0] for name, value in grads.items()]
            values = model.losses(batch, query=True)
            gap, size = _largest(sum(along[1:], along[0]) - values), _largest(values)
            if not gap <= self.tolerance * size:
                raise UnsupportedModel(
                    f"The {model.explained}{where} is not linear in the attributed parameters: it differs from its "
                    f"gradient times them by up to {gap:.3g}, where the largest is {size:.3g}. Attribute the last "
                    "layer alone, blocks={'head': ['head']}, with its bias if it has one."
                )


@dataclass(frozen=True, eq=False)
class _MeanGradient(MeansVisitor):
    """By block; the first rows show whether what is explained is linear."""

    provider: StructuredGradientProvider
    method: Representer

    def start(self) -> Means:
        return no_means(self.provider.layouts)

    def add(self, whole: Means, item: PlacedBatch) -> Means:
        if item.start == 0:
            self.method.check_linear(self.provider, item.batch)
        weight = total_weight(self.provider, item.batch)
        for name, value in self.provider.grads(item.batch).items():
            whole[name].add(_sum_of_rows(value), weight)
        return whole


def _by_model(
    provider: StructuredGradientProvider, values: ByBlock
) -> list[tuple[str, StructuredGradientProvider, ByBlock]]:
    """Each model of an ensemble, or the only one: its name in an error, itself, and its own blocks' values."""
    if not isinstance(provider, EnsembleProvider):
        return [("", provider, values)]
    pairs = zip(provider.members, provider.by_member(values), strict=True)
    return [(f" of model {k}", member, own) for k, (member, own) in enumerate(pairs)]


def _sum_of_rows(value: BlockGradient) -> Array:
    ones = namespace(value.like).ones((1, value.rows), dtype=value.like.dtype, device=device(value.like))
    return value.combine(ones)[0, :]


def _norm(vectors: Iterable[Array]) -> float:
    """Of all of them as one vector."""
    return math.sqrt(sum(float(namespace(v).sum(v**2)) for v in vectors))


def _largest(values: Array) -> float:
    xp = namespace(values)
    return float(xp.max(xp.abs(values)))


class LogitQueries(ProviderView):
    """A provider whose query rows are explained by minus the logit of their target; train rows keep their loss."""

    def __init__(self, plain: StructuredGradientProvider):
        super().__init__(plain)
        self.logits = plain.of_output("logit")

    def _for(self, query: bool) -> StructuredGradientProvider:
        return self.logits if query else self.plain

    @property
    def explained(self) -> str:
        return "negative_logit"

    def grads(self, batch: Batch, *, query: bool = False, weighted: bool = True) -> BlockGradients:
        return self._for(query).grads(batch, weighted=weighted)

    def losses(self, batch: Batch, *, query: bool = False) -> Array:
        return self._for(query).losses(batch)

    def of_output(self, function: OutputFunction) -> StructuredGradientProvider:
        return self.plain.of_output(function)
