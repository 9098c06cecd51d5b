"""Fitted operators composed with a gradient provider: where query gradients and train gradients meet.

score(query, train) = sum over blocks  < Op_block(grad loss(query)), grad loss(train) >
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from headwater.arrays import Array, itemsize, transpose, working_memory_limit
from headwater.errors import InvalidInput
from headwater.gradients.algebra import Dense
from headwater.gradients.block import BlockGradient, stack
from headwater.gradients.provider import BlockGradients, BlockProvider, StructuredGradientProvider
from headwater.operators.algebra import IdentityOperator, LinearOperator
from headwater.types import Batch, BilinearForm, BlockMapper, InfluenceMode, OperatorGradientComposition

ByBlock = OrderedDict[str, Array]


class InfluenceMapper(BlockMapper[Any, Any, OperatorGradientComposition]):
    """The contract's block mapper over a structured provider: one pass through the model serves all blocks.

    A block whose operator has a bilinear form of its own is computed by that form, and the others the faster way.
    """

    def __init__(self, provider: StructuredGradientProvider, operators: Mapping[str, LinearOperator]):
        blocks: OrderedDict[str, OperatorGradientComposition] = OrderedDict(
            (name, OperatorGradientComposition(op, provider.block(name))) for name, op in operators.items()
        )
        super().__init__(blocks)
        self.provider = provider
        self.operators = OrderedDict(operators)

    @property
    def own_forms(self) -> dict[str, BilinearForm]:
        """The forms of those blocks whose operator's form is another than `<Op left, right>`."""
        forms = {name: operator.as_bilinear_form() for name, operator in self.operators.items()}
        return {name: form for name, form in forms.items() if not form.is_default_of(self.operators[name])}

    def generate_transformed_grads(self, batch: Batch) -> Generator[Array, None, None]:
        grads = self.provider.grads(batch, query=True)
        for name, operator in self.operators.items():
            # Flat, as the contract has it: factors leave this library, and have no structure of ours.
            yield operator.apply_block(operator.seen(grads[name])).flat()

    def generate_interactions(
        self, left_batch: Any, right_batch: Any, mode: InfluenceMode | str
    ) -> Generator[Array, None, None]:
        mode, own = InfluenceMode(mode), self.own_forms
        # None: rows on themselves, as the contract says.
        right_batch = left_batch if right_batch is None else right_batch
        plain = [name for name in self.operators if name not in own]
        shared = self._shared_interactions(plain, left_batch, right_batch, mode)
        for name in self.operators:
            yield self._by_form(name, left_batch, right_batch, mode) if name in own else next(shared)

    def _by_form(self, name: str, left_batch: Any, right_batch: Any, mode: InfluenceMode) -> Array:
        # Rows on the left are explained, rows on the right are train rows; the same rows need two objects to say so.
        right_batch = copy.copy(left_batch) if right_batch is left_batch else right_batch
        provider = BlockProvider(self.provider, name, explained=left_batch)
        return OperatorGradientComposition(self.operators[name], provider).interactions(left_batch, right_batch, mode)

    def _shared_interactions(
        self, names: Sequence[str], left_batch: Batch, right_batch: Batch, mode: InfluenceMode
    ) -> Iterator[Array]:
        """Of these blocks, from one pass over either batch."""
        if not names:
            return
        every = self.provider.grads(left_batch, query=True)
        grads = OrderedDict((name, every[name]) for name in names)
        if mode is InfluenceMode.Perturbation:
            for name, value in grads.items():
                operator = self.operators[name]
                yield self.provider.mixed_prod(right_batch, {name: operator.apply_block(operator.seen(value)).flat()})
            return
        # For these two batches alone; a run chooses sides once, for all its rows.
        queries = self.sides(grads, len(right_batch) / len(left_batch)).queries(grads)
        train = self.provider.grads(right_batch)
        for name in names:
            yield queries.score(name, train[name])

    def generate_interactions_from_transformed_grads(
        self, left_factors: Array | Mapping[str, Array], right_batch: Batch, mode: InfluenceMode | str
    ) -> Generator[Array, None, None]:
        mode, factors = InfluenceMode(mode), self._factors_by_block(left_factors)
        if mode is InfluenceMode.Perturbation:
            for name in self.operators:
                yield self.provider.mixed_prod(right_batch, {name: factors[name]})
            return
        grads = self.provider.grads(right_batch)
        for name, operator in self.operators.items():
            # Factors have been through the whole operator: train rows meet them as they are.
            yield transpose(operator.seen(grads[name]).project(factors[name]))

    def perturbation(self, factors: object, batch: Batch) -> Any:
        """All blocks together, in one differentiation: (N, M, *x_shape)."""
        return self.provider.mixed_prod(batch, self._factors_by_block(factors))

    def sides(self, grads: BlockGradients, train_per_query: float) -> Sides:
        """Where queries like these and `train_per_query` train rows each had best meet."""
        forms = self.own_forms
        pairs = {name: self._sides(name, value, train_per_query, name in forms) for name, value in grads.items()}
        return Sides(
            OrderedDict((name, left) for name, (left, _) in pairs.items()),
            OrderedDict((name, right) for name, (_, right) in pairs.items()),
            forms,
        )

    def _sides(
        self, name: str, value: BlockGradient, train_per_query: float, by_form: bool
    ) -> tuple[LinearOperator, LinearOperator]:
        if by_form:  # the gradients as they are, for the form's `inner_prod`
            return (IdentityOperator(self.operators[name].input_size),) * 2
        return self.operators[name].block_sides(value, train_per_query)


@dataclass(frozen=True)
class Sides:
    """What query gradients go through, and what train gradients go through, before they meet; see `block_sides`.

    Chosen once for a run: queries that went through one pair of sides cannot meet train rows that went through another.
    """

    left: Mapping[str, LinearOperator]
    right: Mapping[str, LinearOperator]
    forms: Mapping[str, BilinearForm] = field(default_factory=dict)
    """Where an operator has a form of its own: what then takes the place of the dot product."""

    def queries(self, grads: BlockGradients) -> Queries:
        """Query gradients, ready to meet train rows."""
        # Train rows are taken to have as many positions as queries: the form is chosen once, for all of them.
        left = OrderedDict((name, _pass(self.left[name], v).cheapest_form(v)) for name, v in grads.items())
        return Queries(left, self.right, self.forms)


@dataclass(frozen=True)
class Queries:
    """Query gradients after their side of the operator, and the side that train gradients go through."""

    left: BlockGradients
    right: Mapping[str, LinearOperator]
    forms: Mapping[str, BilinearForm] = field(default_factory=dict)

    def take(self, rows: slice) -> Queries:
        """Some of them."""
        return Queries(OrderedDict((n, value.take(rows)) for n, value in self.left.items()), self.right, self.forms)

    def weighted(self, weights: Array) -> Queries:
        """Each times a number: [q]."""
        left = OrderedDict((name, value.weighted(weights)) for name, value in self.left.items())
        return Queries(left, self.right, self.forms)

    def total(self, share: float) -> Queries:
        """Their sum, times `share`, as one query: a score is linear in the query's gradient."""
        left = OrderedDict((name, value.total(share)) for name, value in self.left.items())
        return Queries(left, self.right, self.forms)

    @property
    def bytes_each(self) -> int:
        """Of one query's factors, made dense."""
        one = self.take(slice(0, 1)).left
        return sum(value.layout.size * itemsize(value.like) for value in one.values())

    def as_met(self, train: BlockGradients) -> BlockGradients:
        """Train gradients in the form in which they meet dense queries as they are: dense where there is room for it.

        For all who ask for the rows, so that none makes them dense again.
        """
        dense = sum(value.rows * value.layout.size * itemsize(value.like) for value in train.values())
        has_room = dense <= working_memory_limit()
        return OrderedDict((name, self._as_met(name, value, has_room)) for name, value in train.items())

    def _as_met(self, name: str, value: BlockGradient, has_room: bool) -> BlockGradient:
        side, left = self.right[name], self.left[name]
        turned = name in self.forms or not side.keeps_rows or side.stored_layout is not None
        turned = turned or left.layout != value.layout  # projected on their way: smaller as they are
        if turned or not all(isinstance(part, Dense) for part in left.parts):
            return value
        # Many positions meet a dense query as one matrix; without room for it, where it is no larger than they are.
        return value.at_one_position() if has_room else value.cheapest_form(left)

    def scores(self, train: BlockGradients) -> ByBlock:
        """By block: [q, n]."""
        return OrderedDict((name, self.score(name, value)) for name, value in train.items())

    def score(self, name: str, train: BlockGradient) -> Array:
        """Of one block: [q, n]."""
        if name in self.forms:
            return self.forms[name].inner_prod(self.left[name].flat(), train.flat())
        # <L g, R h> = <Op g, h>, by whichever form of the product is cheaper.
        return self.left[name].inner(_pass(self.right[name], train))


def _pass(side: LinearOperator, value: BlockGradient) -> BlockGradient:
    """Through one side of an operator, as the operator sees rows."""
    return side.apply_block(side.seen(value))


def stack_queries(pieces: list[Queries]) -> Queries:
    """Queries of several batches under one another. Errors: InvalidInput if they went through different sides."""
    # By identity: equal sides would do, but only one choice is ever meant.
    if any(piece.right is not pieces[0].right for piece in pieces):
        raise InvalidInput("Queries that went through different sides cannot be stacked.")
    left = OrderedDict((name, stack([piece.left[name] for piece in pieces])) for name in pieces[0].left)
    return Queries(left, pieces[0].right, pieces[0].forms)
