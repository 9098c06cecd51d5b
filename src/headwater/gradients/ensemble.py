"""Several models of one architecture as one provider: checkpoints of one run, or models that were trained apart.

Layout: the blocks of member k are "k/<block>", the members one after the other. Example: two models with the blocks
"fc" and "head" give "0/fc", "0/head", "1/fc", "1/head". A score is a sum over blocks, so every method works on them;
the operators of member k are multiplied by its weight, so that the score is a weighted sum over members.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from headwater.arrays import Array, namespace, to_numpy
from headwater.blocks import Layout
from headwater.errors import BlockMismatch, InvalidSetting, UnsupportedModel
from headwater.gradients.provider import (
    BlockGradients,
    Fisher,
    Kind,
    Linearised,
    OutputFunction,
    StructuredGradientProvider,
)
from headwater.gradients.together import Together
from headwater.gradients.view import ProviderView
from headwater.types import Batch


class EnsembleProvider(ProviderView):
    """Providers of one architecture at other weights, side by side; what they share is asked of the first.

    weights: what each member's score is multiplied by; by default one over their number, so that the score is the mean.
    Gradients and curvature are the members' own, unweighted. Errors: InvalidSetting without members, or with another
    number of weights; BlockMismatch if members have different blocks.
    """

    def __init__(self, members: Iterable[StructuredGradientProvider], weights: Sequence[float] | None = None):
        self.members = tuple(members)
        if not self.members:
            raise InvalidSetting("An ensemble needs at least one model.")
        super().__init__(self.members[0])
        count = len(self.members)
        self.weights = (1.0 / count,) * count if weights is None else tuple(float(w) for w in weights)
        if len(self.weights) != count or not all(map(math.isfinite, self.weights)):
            raise InvalidSetting(
                f"The weights are {self.weights}; expected {count} finite numbers, one for each model."
            )
        for k, member in enumerate(self.members):
            if member.sizes != self.members[0].sizes:
                raise BlockMismatch(
                    f"Model {k} has the blocks {dict(member.sizes)}, model 0 has {dict(self.members[0].sizes)}. The "
                    "models of an ensemble share one architecture."
                )

    def with_weights(self, weights: Sequence[float]) -> EnsembleProvider:
        """The same members, whose scores count otherwise."""
        return EnsembleProvider(self.members, weights)

    def each(self, change: Callable[[StructuredGradientProvider], StructuredGradientProvider]) -> EnsembleProvider:
        return EnsembleProvider([member.each(change) for member in self.members], self.weights)

    @property
    def needs_rows(self) -> bool:
        return any(member.needs_rows for member in self.members)

    def in_float64(self) -> EnsembleProvider | None:
        copies = [member.in_float64() for member in self.members]
        found = [member for member in copies if member is not None]
        return EnsembleProvider(found, self.weights) if len(found) == len(copies) else None

    def of_output(self, function: OutputFunction) -> EnsembleProvider:
        return EnsembleProvider([member.of_output(function) for member in self.members], self.weights)

    # Blocks -------------------------------------------------------------------------------------------------------

    @property
    def layouts(self) -> OrderedDict[str, Layout]:
        found: OrderedDict[str, Layout] = OrderedDict()
        for name, layout in self._merge([member.layouts for member in self.members]).items():
            found[name] = Layout(replace(layout.block, name=name), layout.parts)
        return found

    def block_scale(self, block: str) -> float:
        """The weight of the block's member, times the member's own scale."""
        number, name = self._locate(block)
        return self.weights[number] * self.members[number].block_scale(name)

    def penalty(self, block: str, weight: float) -> Any:
        number, name = self._locate(block)
        return self.members[number].penalty(name, weight)

    def by_member(self, values: Mapping[str, object]) -> list[OrderedDict[str, Any]]:
        """What is named by the ensemble's blocks, for each member by its own blocks."""
        found: list[OrderedDict[str, Any]] = [OrderedDict() for _ in self.members]
        for block, value in values.items():
            number, name = self._locate(block)
            found[number][name] = value
        return found

    def _locate(self, block: str) -> tuple[int, str]:
        """The member that a block belongs to, and its name there. Errors: BlockMismatch."""
        number, _, name = block.partition("/")
        if not (number.isdecimal() and int(number) < len(self.members) and name in self.members[int(number)].layouts):
            raise BlockMismatch(f"There is no block {block!r}; the blocks are {list(self.layouts)}.")
        return int(number), name

    def _merge(self, values: Sequence[Mapping[str, object]]) -> OrderedDict[str, Any]:
        """What each member names by its own blocks, by the ensemble's."""
        # Blocks of different members never share parameters: the ensemble's curvature is block-diagonal in them.
        return OrderedDict((f"{k}/{name}", v) for k, value in enumerate(values) for name, v in value.items())

    # Gradients ----------------------------------------------------------------------------------------------------

    def grads(self, batch: Batch, *, query: bool = False, weighted: bool = True) -> BlockGradients:
        return self._merge([member.grads(batch, query=query, weighted=weighted) for member in self.members])

    def fisher_grads(
        self, batch: Batch, fisher: Fisher, *, draws: range = range(1), seed: int = 0
    ) -> list[BlockGradients]:
        return self._draws([member.fisher_grads(batch, fisher, draws=draws, seed=seed) for member in self.members])

    def ggn_grads(self, batch: Batch) -> list[BlockGradients] | None:
        found = [draws for member in self.members if (draws := member.ggn_grads(batch)) is not None]
        return self._draws(found) if len(found) == len(self.members) else None

    def _draws(self, found: list[list[BlockGradients]]) -> list[BlockGradients]:
        """Draw by draw, the members' blocks side by side. Errors: BlockMismatch for different numbers of draws."""
        counts = [len(draws) for draws in found]
        if len(set(counts)) > 1:
            raise BlockMismatch(
                f"The models give {counts} gradients for a row; an ensemble needs the same number of all."
            )
        return [self._merge(draw) for draw in zip(*found, strict=True)]

    def curvature_product(self, batch: Batch, block: str, vectors: Array, kind: Kind) -> Array:
        number, name = self._locate(block)
        return self.members[number].curvature_product(batch, name, vectors, kind)

    def linearised(self, batch: Batch, block: str, kind: Kind) -> Linearised | None:
        number, name = self._locate(block)
        return self.members[number].linearised(batch, name, kind)

    def mixed_prod(self, batch: Batch, factors: Mapping[str, Array]) -> Array:
        pairs = zip(self.members, self.by_member(factors), strict=True)
        return _sum([member.mixed_prod(batch, mine) for member, mine in pairs if mine])

    def flat_mixed_grads(self, batch: Batch) -> Array:
        """(N, *x_shape, D), member after member."""
        found = [member.flat_mixed_grads(batch) for member in self.members]
        return namespace(*found).concat(found, axis=-1)

    # What the models say of the rows ------------------------------------------------------------------------------

    def losses(self, batch: Batch, *, query: bool = False) -> Array:
        """The mean over members: [n]."""
        return _sum([member.losses(batch, query=query) for member in self.members]) / len(self.members)

    def one_minus_p(self, batch: Batch) -> Array:
        """The mean over members of the chance of another answer, where the losses are minus log p/(1-p): [n]."""
        margins = [member.losses(batch) for member in self.members]
        xp = namespace(*margins)
        # The logistic function by tanh, which no framework lacks and which does not overflow.
        return _sum([(1.0 + xp.tanh(margin / 2)) / 2 for margin in margins]) / len(margins)

    def labels_of(self, y: Any) -> Any:
        return self.members[0].labels_of(y)

    def predicted(self, batch: Batch) -> Batch:
        """Errors: UnsupportedModel where the members predict different labels: a row has one."""
        found = [member.predicted(batch) for member in self.members]
        labels = [np.asarray(to_numpy(one.y)) for one in found]
        differing = np.any([(other != labels[0]).reshape(len(batch), -1).any(axis=1) for other in labels], axis=0)
        if differing.any():
            raise UnsupportedModel(
                f'explain="prediction": of these {len(batch)} query rows, the {len(found)} models predict different '
                f"labels for {int(differing.sum())}, and a query has one. Give the labels that you ask about as y, "
                'with explain="label": those of the last checkpoint, say, or of the mean of the models.'
            )
        return found[0]

    def parameters(self, block: str) -> Array:
        number, name = self._locate(block)
        return self.members[number].parameters(name)

    def fingerprint(self) -> tuple[object, ...]:
        return (self.weights, *(member.fingerprint() for member in self.members))

    @property
    def form(self) -> int:
        return sum(member.form for member in self.members)

    def begin_pass(self) -> None:
        for member in self.members:
            member.begin_pass()

    def end_pass(self, failed: bool = False) -> None:
        for member in self.members:
            member.end_pass(failed)

    @property
    def together(self) -> Together | None:
        return next((found for member in self.members if (found := member.together) is not None), None)

    def rows_at_once(self, batch: Batch) -> int:
        """All members' gradients are held together."""
        return max(1, min(member.rows_at_once(batch) for member in self.members) // len(self.members))

    @property
    def architecture(self) -> str:
        return ", ".join(dict.fromkeys(member.architecture for member in self.members))


def _sum(arrays: Sequence[Array]) -> Array:
    total = arrays[0]
    for array in arrays[1:]:
        total = total + array
    return total
