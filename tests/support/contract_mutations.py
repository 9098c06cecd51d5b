"""Ways in which the contract's types have been wrong, and quick laws that must notice each; see mutations.py.

The backend is the third party's of tests/test_third_party.py, in plain NumPy.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import numpy as np
import test_third_party as third

import headwater as hw
from headwater.gradients.provider import BlockProvider
from headwater.loaders import batches
from headwater.mapper import InfluenceMapper
from headwater.operators.algebra import IdentityOperator, ScaledOperator
from headwater.types import (
    Batch,
    BilinearForm,
    BlockMapper,
    GradientProvider,
    Operator,
    OperatorBilinearForm,
    OperatorGradientComposition,
    join,
)

RNG = np.random.default_rng(0)
W, B, X, Y = (RNG.standard_normal(shape) for shape in ((2, 3), 2, (9, 3), (9, 2)))
ROWS, OTHERS = third.Rows(third.X, third.Y), third.Rows(third.QUERY_X, third.QUERY_Y)


def same(got: Any, expected: Any) -> None:
    """Errors: AssertionError, in the words that the mutation check expects."""
    got, expected = np.asarray(got), np.asarray(expected)
    if got.shape != expected.shape:
        raise AssertionError(f"off by a shape: {got.shape}, expected {expected.shape}")
    error = np.max(np.abs(got - expected), initial=0.0)
    if not error <= 1e-10 * np.max(np.abs(expected), initial=0.0):
        raise AssertionError(f"off by {error:g}")


class OffsetGradients(GradientProvider[Any, Any]):
    """Of the offsets b, for f(x) = W x + b and half the squared error; mixed: W^T."""

    def flat_grads(self, batch: Any) -> Any:
        return batch.x @ W.T + B - batch.y

    def flat_mixed_grads(self, batch: Any) -> Any:
        return np.broadcast_to(W.T, (len(batch), *W.T.shape))

    def jacobian_prod(self, batch: Any, g: Any) -> Any:
        return self.flat_grads(batch) @ g.T


class Signs(BilinearForm[Any, Any, Any]):
    """The sum of the products of signs."""

    def inner_prod(self, left: Any, right: Any) -> Any:
        return np.einsum("nd,m...d->nm...", np.sign(left), np.sign(left if right is None else right))


@dataclass(frozen=True, eq=False)
class Labelled(Batch[Any]):
    """A column, and a number for all rows."""

    groups: Any
    temperature: float = 1.0


class Doubling(Operator[Any, BilinearForm]):
    input_size = 2

    def _apply(self, tensor: Any) -> Any:
        return 2 * tensor


class Signed(Doubling):
    def as_bilinear_form(self) -> Signs:
        return Signs()


class Halved(OperatorGradientComposition[Any, Any, Any, Any]):
    """An inner product of its own: half the usual one."""

    def _tensor_inner_product(self, left: Any, right: Any) -> Any:
        return np.einsum("nd,m...d->nm...", left, right) / 2


# Laws -----------------------------------------------------------------------------------------------------------------


def an_operators_form_is_obeyed() -> None:
    rows = Batch(X, Y)
    block, signs = OperatorGradientComposition(Signed(), OffsetGradients()), np.sign(X @ W.T + B - Y)
    same(block.interactions(rows, None, "up"), signs @ signs.T)
    mixed = np.broadcast_to(np.sign(W.T), (len(X), *W.T.shape))
    same(block.interactions(rows, rows, "perturbation"), np.einsum("nd,mxd->nmx", signs, mixed))


def no_right_side_is_the_left_gradients() -> None:
    met = []

    class Counts(Signs):
        def inner_prod(self, left: Any, right: Any) -> Any:
            met.append(0.0 if right is None else 1.0)
            return left

    Counts().grads_inner_prod(Batch(X, Y), None, OffsetGradients())
    same(met, [1.0])


def a_compositions_inner_product_is_used() -> None:
    grads = X @ W.T + B - Y
    same(Halved(Doubling(), OffsetGradients()).interactions(Batch(X, Y), None, "up"), grads @ grads.T)


def the_structured_mapper_obeys_forms() -> None:
    for kind in (third.OwnForm, third.InheritedForm):
        mapper = third.with_own_form(kind)
        block = mapper.composable_block_dict["second"]
        form = block.op.as_bilinear_form()
        left, right = block.gp.flat_grads(ROWS), block.gp.flat_grads(OTHERS)
        same(mapper.interactions(ROWS, OTHERS, "up")["second"], form.inner_prod(left, right))


def a_scaled_operator_keeps_the_form() -> None:
    operator = ScaledOperator(3.0, IdentityOperator(2))
    operator.inner.as_bilinear_form = Signs  # type: ignore[method-assign]
    same(operator.as_bilinear_form().inner_prod(X[:, :2], Y), 3 * np.sign(X[:, :2]) @ np.sign(Y).T)


def blocks_come_in_the_order_of_the_operators() -> None:
    operators = third.TestMapper().mapper().operators
    mapper = InfluenceMapper(third.LinearProvider(), OrderedDict(reversed(operators.items())))
    truth = {name: block.transformed_grads(ROWS) for name, block in mapper.composable_block_dict.items()}
    for got in (mapper.transformed_grads(ROWS), dict(zip(truth, mapper.generate_transformed_grads(ROWS), strict=True))):
        for name, value in truth.items():
            same(got[name], value)


def factors_may_come_in_any_order() -> None:
    mapper = third.TestMapper().mapper()
    factors = mapper.transformed_grads(ROWS)
    got = mapper.interactions_from_transformed_grads(dict(reversed(factors.items())), OTHERS, "up")
    for name, block in mapper.composable_block_dict.items():
        same(got[name], factors[name] @ block.gp.flat_grads(OTHERS).T)


def dicts_follow_the_generators() -> None:
    class Doubled(BlockMapper[Any, Any, Any]):
        def generate_transformed_grads(self, batch: Any) -> Any:
            yield from (2 * tensor for tensor in super().generate_transformed_grads(batch))

    block = OperatorGradientComposition(Doubling(), OffsetGradients())
    same(Doubled(OrderedDict(one=block)).transformed_grads(Batch(X, Y))["one"], 4 * (X @ W.T + B - Y))


def added_columns_are_cut_and_joined() -> None:
    groups = np.arange(9.0)
    first, second = (Labelled(X[k::2], Y[k::2], groups[k::2]) for k in range(2))
    same(first.take(np.array([2, 0])).groups, [4.0, 0.0])
    (joined,) = join([first, second])
    same(joined.groups, [*groups[::2], *groups[1::2]])


def what_differs_is_not_joined() -> None:
    first, second = (Labelled(X, Y, X[:, 0], temperature=t) for t in (1.0, 2.0))
    same([batch.temperature for batch in join([first, second])], [1.0, 2.0])


def a_plain_batch_keeps_its_weights() -> None:
    weights = np.arange(1.0, 8.0)
    influence = third.LinearInfluence(hw.Direct()).fit([Batch(third.X, third.Y, weights=weights)])
    same(influence.n_train, weights.sum())


def rows_on_the_left_are_explained() -> None:
    class Measured(third.LinearProvider):
        def grads(self, batch: Any, *, query: bool = False, weighted: bool = True) -> Any:
            found = super().grads(batch, query=query, weighted=weighted)
            each = np.full(len(batch), 2.0 if query else 1.0)
            return OrderedDict((name, value.weighted(each)) for name, value in found.items())

    operators = third.with_own_form(third.OwnForm).operators
    plain, measured = (InfluenceMapper(kind(), operators) for kind in (third.LinearProvider, Measured))
    expected = 2**3 * plain.interactions(ROWS, ROWS, "up")["second"]
    same(measured.interactions(ROWS, None, "up")["second"], expected)


LAWS: tuple[Callable[[], None], ...] = (
    an_operators_form_is_obeyed,
    no_right_side_is_the_left_gradients,
    a_compositions_inner_product_is_used,
    the_structured_mapper_obeys_forms,
    a_scaled_operator_keeps_the_form,
    blocks_come_in_the_order_of_the_operators,
    factors_may_come_in_any_order,
    dicts_follow_the_generators,
    added_columns_are_cut_and_joined,
    what_differs_is_not_joined,
    a_plain_batch_keeps_its_weights,
    rows_on_the_left_are_explained,
)

# Mutants --------------------------------------------------------------------------------------------------------------

Mutant = Callable[[], AbstractContextManager[Any]]


def _instead(owner: Any, attribute: str, wrong: Any) -> Mutant:
    return lambda: patch.object(owner, attribute, wrong)


def _by_the_operator(self: Any, left: Any, right: Any, mode: Any) -> Any:
    factors = self.transformed_grads(left)
    return self.interactions_from_transformed_grads(factors, left if right is None else right, mode)


def _none_for_none(self: Any, left: Any, right: Any, provider: Any) -> Any:
    return self.inner_prod(provider.flat_grads(left), None if right is None else provider.flat_grads(right))


def _in_the_providers_order(self: Any, batch: Any) -> Any:
    for name, value in self.provider.grads(batch, query=True).items():
        yield self.operators[name].apply_block(value).flat()


def _in_the_order_given(self: Any, factors: Any) -> Any:
    return OrderedDict(zip(self.composable_block_dict, factors.values(), strict=True))


MUTANTS: dict[str, Mutant] = {
    "interactions pass by the operator's form": _instead(OperatorGradientComposition, "interactions", _by_the_operator),
    "no right side stays None": _instead(BilinearForm, "grads_inner_prod", _none_for_none),
    "a composition's inner product is forgotten": _instead(
        OperatorBilinearForm, "with_inner_product", lambda self, product: self
    ),
    "the structured mapper knows no forms": _instead(InfluenceMapper, "own_forms", {}),
    "whatever inherits the default form is the default form": _instead(
        OperatorBilinearForm, "is_default_of", lambda self, operator: True
    ),
    "scaling an operator loses its form": _instead(
        ScaledOperator, "as_bilinear_form", lambda self: OperatorBilinearForm(self)
    ),
    "tensors come in the order of the provider's blocks": _instead(
        InfluenceMapper, "generate_transformed_grads", _in_the_providers_order
    ),
    "factors are taken in the order given": _instead(BlockMapper, "_factors_by_block", _in_the_order_given),
    "names go to the blocks in reverse": _instead(
        BlockMapper,
        "_to_ordered_dict",
        lambda self, tensors: OrderedDict(zip(reversed(self.composable_block_dict), tensors, strict=True)),
    ),
    "dicts pass by the generators": _instead(
        BlockMapper,
        "transformed_grads",
        lambda self, batch: OrderedDict(
            (name, block.transformed_grads(batch)) for name, block in self.composable_block_dict.items()
        ),
    ),
    "added columns are no columns": _instead(
        Batch, "_is_column", lambda self, declared, value: declared.name in ("x", "y", "weights", "ids")
    ),
    "what differs is joined": _instead(Batch, "_carried", lambda self: {}),
    "a plain batch loses its weights": _instead(batches, "_with_columns", lambda provider, batch, weights, ids: batch),
    "rows on the left of a form have the gradients of the loss": _instead(
        BlockProvider, "_grads", lambda self, batch: self.whole.grads(batch)[self.name]
    ),
}
