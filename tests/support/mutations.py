"""Ways in which libraries like this one have been wrong, and quick laws that must notice each of them.

A mutant changes one thing in headwater while its context lasts. A law raises AssertionError where it does not hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from truth import assert_close, fitted, truth_of

import headwater as hw
from headwater.arrays import transpose
from headwater.curvature.means import WeightedMean
from headwater.gradients.algebra import Dense, Gradient, Moments
from headwater.gradients.outer import Outer
from headwater.influence import ComposableInfluence
from headwater.mapper import InfluenceMapper, Sides
from headwater.methods.damping import in_units
from headwater.methods.direct import Direct
from headwater.methods.kronecker import Ekfac, Kfac
from headwater.operators.algebra import IdentityOperator, LinearOperator
from headwater.operators.kronecker import EigenKroneckerOperator, KroneckerOperator
from headwater.operators.structured import DenseOperator
from headwater.torch import CrossEntropy, TorchGradientProvider, likelihoods

# Laws -----------------------------------------------------------------------------------------------------------------


def equals_formula(case: str, method: hw.methods.base.Method, factor: float, mode: str = "up") -> None:
    truth = truth_of(case)
    found = truth.case
    influence = fitted(found, method, "layer", damping=hw.relative(factor))
    damping = truth.absolute(method, "layer", factor)
    expected, condition = truth.scores(method, "layer", damping, mixed=mode == "perturbation")
    rows = (found.x_query, found.y_query, found.x, found.y)
    assert_close(influence.influences(*rows, mode=mode), sum(expected.values()), condition)


def direct_equals_formula() -> None:
    equals_formula("mlp", hw.Direct("ggn"), 0.1)


def hessian_equals_formula() -> None:
    truth, method = truth_of("mlp"), hw.Direct("hessian", allow_indefinite=True)
    case, damping = truth.case, truth.absolute(method, "full", 0.1)
    expected, condition = truth.scores(method, "full", damping)
    got = fitted(case, method, "full", damping=damping).influences(case.x_query, case.y_query, case.x, case.y)
    assert_close(got, expected["full"], condition)


def fisher_equals_formula() -> None:
    equals_formula("mlp", hw.Direct("fisher"), 0.1)


def kfac_equals_formula() -> None:
    for damping_form in ("exact", "factored"):
        equals_formula("images", hw.Kfac(damping_form), 0.1)


def ekfac_equals_formula() -> None:
    equals_formula("images", hw.Ekfac(), 0.1)
    equals_formula("sentences", hw.Ekfac(), 1.0)


def perturbation_equals_formula() -> None:
    equals_formula("mlp", hw.Direct("ggn"), 0.1, "perturbation")


def sampled_ekfac_equals_formula() -> None:
    equals_formula("mlp", hw.Ekfac(fisher="sampled", samples=2, seed=3), 0.1)


def grad_dot_equals_formula() -> None:
    equals_formula("images", hw.GradDot(), 1.0)
    equals_formula("mlp", hw.GradCos(), 1.0)


def factors_make_the_round_trip() -> None:
    case = truth_of("mlp").case
    influence = fitted(case, hw.Ekfac(), "layer", damping=hw.relative(0.1))
    rows = (case.x_query, case.y_query, case.x, case.y)
    factors = influence.influence_factors(case.x_query, case.y_query)
    for mode in ("up", "perturbation"):
        again = influence.influences_from_factors(factors, case.x, case.y, mode)
        assert_close(again, influence.influences(*rows, mode=mode), 1e3)


def each_block_has_its_own_damping() -> None:
    truth, damping = truth_of("mlp"), {"first": 0.01, "second": 1.0}
    case = truth.case
    influence = fitted(case, hw.Direct("ggn"), "layer", damping=damping)
    expected, condition = truth.scores(hw.Direct("ggn"), "layer", damping)
    got = influence.influences_by_block(case.x_query, case.y_query, case.x, case.y)
    for block in damping:
        assert_close(got[block], expected[block], condition)


def batches_do_not_matter() -> None:
    case = truth_of("mlp").case
    rows = (case.x_query, case.y_query, case.x, case.y)
    for method in (hw.Direct("ggn"), hw.Ekfac()):
        one, other = (fitted(case, method, "layer", size, damping=0.1).influences(*rows) for size in (4, 11))
        assert_close(one, other, 1e4)


def the_number_of_queries_does_not_matter() -> None:
    case = truth_of("mlp").case
    for method in (hw.Direct("ggn"), hw.Ekfac()):
        influence = fitted(case, method, "layer", damping=0.1)
        together = influence.influences(case.x_query, case.y_query, case.x, case.y)
        alone = influence.influences(case.x_query[:1], case.y_query[:1], case.x, case.y)
        assert_close(alone, together[:1], 1e3)


def self_influence_is_the_diagonal() -> None:
    case = truth_of("images").case
    influence = fitted(case, hw.Ekfac(), "layer", damping=hw.relative(0.1))
    diagonal = torch.diagonal(influence.influences(case.x, case.y))
    assert_close(influence.self_influence(case.loader()), diagonal, 1e3)


LAWS: tuple[Callable[[], None], ...] = (
    direct_equals_formula,
    hessian_equals_formula,
    fisher_equals_formula,
    kfac_equals_formula,
    ekfac_equals_formula,
    perturbation_equals_formula,
    sampled_ekfac_equals_formula,
    grad_dot_equals_formula,
    factors_make_the_round_trip,
    each_block_has_its_own_damping,
    batches_do_not_matter,
    the_number_of_queries_does_not_matter,
    self_influence_is_the_diagonal,
)

# Mutants --------------------------------------------------------------------------------------------------------------

Mutant = Callable[[], AbstractContextManager[Any]]
MUTANTS: dict[str, Mutant] = {}


def mutant(change: Callable[[], Iterator[None]]) -> Callable[[], Any]:
    """A generator that changes something and restores it after its yield."""
    MUTANTS[change.__name__] = contextmanager(change)
    return change


def replaced(name: str, owner: Any, attribute: str, make: Callable[[Any], Any]) -> None:
    """A mutant that wraps one attribute: `make` gets the original."""
    MUTANTS[name] = lambda: patch.object(owner, attribute, make(getattr(owner, attribute)))


class ScaledIdentity(IdentityOperator):
    """The inverse of the mean eigenvalue: what a test cannot tell from an inverse when its damping is huge."""

    def __init__(self, curvature: LinearOperator, damping: float):
        super().__init__(curvature.input_size)
        self.factor = 1.0 / (curvature.mean_eigenvalue() + damping)

    def _apply(self, tensor: Any) -> Any:
        return tensor * self.factor

    def apply_gradient(self, value: Gradient) -> Gradient:
        return Dense(value.dense() * self.factor)

    def apply_block(self, value: Any) -> Any:
        return LinearOperator.apply_block(self, value)


for _method in (Direct, Kfac, Ekfac):
    replaced(
        f"{_method.__name__} inverts to a multiple of the identity",
        _method,
        "invert",
        lambda _: lambda self, curvature, damping: ScaledIdentity(curvature, damping),
    )
    replaced(
        f"{_method.__name__} skips damping",
        _method,
        "invert",
        lambda invert: lambda self, curvature, damping: invert(self, curvature, 1e-9 * damping),
    )
    replaced(
        f"{_method.__name__} damps twice",
        _method,
        "invert",
        lambda invert: lambda self, curvature, damping: invert(self, curvature, 2 * damping),
    )


@mutant
def eigenvectors_of_a_kronecker_side_are_transposed() -> Iterator[None]:
    from headwater.operators import kronecker as kronecker_operators

    original = kronecker_operators._diagonalise

    def wrong(side: Any) -> Any:
        values, basis = original(side)
        return values, None if basis is None else transpose(basis)

    with patch.object(kronecker_operators, "_diagonalise", wrong):
        yield


@mutant
def eigenvectors_of_a_dense_operator_are_transposed() -> Iterator[None]:
    eigen = DenseOperator.eigen.fget

    def wrong(self: DenseOperator) -> Any:
        values, vectors = eigen(self)
        return values, transpose(vectors)

    with patch.object(DenseOperator, "eigen", property(wrong)):
        yield


@mutant
def uneven_batches_count_alike() -> Iterator[None]:
    """The mean of batch means."""

    def add(self: WeightedMean, weighted_sum: Any, weight: float) -> None:
        batch_mean = weighted_sum / weight
        count = getattr(self, "_batches", 0)
        self._batches = count + 1
        self.weight += weight
        total = batch_mean if count == 0 else self._mean + batch_mean
        self._mean = total

    value = property(lambda self: self._mean / self._batches)
    with patch.object(WeightedMean, "add", add), patch.object(WeightedMean, "value", value):
        yield


@mutant
def the_last_batch_is_dropped() -> Iterator[None]:
    """A mean over all rows that has not seen the last of them."""
    add = WeightedMean.add

    def wrong(self: WeightedMean, weighted_sum: Any, weight: float) -> None:
        add(self, weighted_sum * (0.0 if weight == 3.0 else 1.0), weight)

    with patch.object(WeightedMean, "add", wrong):
        yield


@mutant
def the_bias_is_dropped() -> Iterator[None]:
    """Its column is there, and empty."""
    bordered = Outer.bordered

    def wrong(self: Outer) -> Outer:
        full = bordered(self)
        if not self.ones:
            return full
        a = full.a.clone()
        a[..., -1] = 0.0
        return Outer(a, full.b)

    with patch.object(Outer, "bordered", wrong):
        yield


@mutant
def all_blocks_get_the_damping_of_the_first() -> Iterator[None]:
    from headwater import influence

    first: list[float] = []

    def wrong(damping: Any, mean: float) -> float:
        first.append(in_units(damping, mean))
        return first[0]

    def make(original: Any) -> Any:
        def made(self: Any, fit: Any) -> Any:
            first.clear()
            return original(self, fit)

        return made

    with (
        patch.object(influence, "in_units", wrong),
        patch.object(ComposableInfluence, "_make_mapper", make(ComposableInfluence._make_mapper)),
    ):
        yield


@mutant
def relative_damping_is_that_of_the_largest_eigenvalue() -> Iterator[None]:
    def mean(self: DenseOperator) -> float:
        return float(self.eigen[0][-1])

    with patch.object(DenseOperator, "mean_eigenvalue", mean):
        yield


@mutant
def one_draw_serves_basis_and_spectrum() -> Iterator[None]:
    original = TorchGradientProvider.fisher_grads

    def wrong(self: Any, batch: Any, fisher: Any, *, draws: range = range(1), seed: int = 0) -> Any:
        return original(self, batch, fisher, draws=range(len(draws)), seed=seed)

    with patch.object(TorchGradientProvider, "fisher_grads", wrong):
        yield


@mutant
def the_fisher_takes_the_square_of_the_sum_over_classes() -> Iterator[None]:
    exact = CrossEntropy.exact

    def wrong(self: Any, *given: Any) -> Any:
        found = exact(self, *given)
        return None if found is None else [sum(found)]

    with patch.object(CrossEntropy, "exact", wrong):
        yield


@mutant
def classes_count_alike_in_the_fisher() -> Iterator[None]:
    def wrong(self: Any, loss: Any, output: Any, target: Any) -> Any:
        count = output.shape[-1]
        return [likelihoods.cotangent(loss, output, torch.full_like(target, c)) / count**0.5 for c in range(count)]

    with patch.object(CrossEntropy, "exact", wrong):
        yield


@mutant
def the_inverse_is_applied_on_both_sides() -> Iterator[None]:
    def sides(self: InfluenceMapper, grads: Any, train_per_query: float) -> Any:
        return Sides(self.operators, self.operators)

    with patch.object(InfluenceMapper, "sides", sides):
        yield


@mutant
def the_eigenbasis_is_not_left_again() -> Iterator[None]:
    """Turned into the eigenbasis, scaled, and met with train rows that were not turned."""
    forward = EigenKroneckerOperator.apply_gradient

    def wrong(self: Any, value: Any) -> Any:
        return self.rotation.apply_gradient(value).scale(self._weights)

    assert forward is not wrong
    with patch.object(EigenKroneckerOperator, "apply_gradient", wrong):
        yield


@mutant
def the_sides_of_a_kronecker_product_are_exchanged_in_damping() -> Iterator[None]:
    factored = KroneckerOperator.factored_inverse

    def wrong(self: KroneckerOperator, damping: float) -> Any:
        turned = factored(KroneckerOperator(self.right, self.left, psd=True), damping)
        return KroneckerOperator(turned.right, turned.left * 1.01, psd=True)

    with patch.object(KroneckerOperator, "factored_inverse", wrong):
        yield


@mutant
def kronecker_factors_count_positions_twice() -> Iterator[None]:
    moments = Outer.moments

    def wrong(self: Outer, *given: Any) -> Moments:
        found = moments(self, *given)
        return Moments(found.left, found.right, found.left_count * self.positions, found.right_count)

    with patch.object(Outer, "moments", wrong):
        yield


@mutant
def self_influence_forgets_the_spectrum() -> Iterator[None]:
    def wrong(self: EigenKroneckerOperator, value: Gradient) -> Any:
        return value.quadratic() * float(np.mean(np.asarray(self.spectrum)))

    with patch.object(EigenKroneckerOperator, "quadratic_gradient", wrong):
        yield


@mutant
def train_gradients_are_averaged_over_the_batch() -> Iterator[None]:
    original = TorchGradientProvider.grads

    def wrong(self: Any, batch: Any, *, query: bool = False, weighted: bool = True) -> Any:
        found = original(self, batch, query=query, weighted=weighted)
        share = torch.full((len(batch),), 1.0 / len(batch), dtype=torch.float64)
        return type(found)((name, value.weighted(share)) for name, value in found.items()) if query else found

    with patch.object(TorchGradientProvider, "grads", wrong):
        yield


@mutant
def the_hessian_is_the_ggn() -> Iterator[None]:
    original = TorchGradientProvider.curvature_product

    def wrong(self: Any, batch: Any, block: str, vectors: Any, kind: Any) -> Any:
        return original(self, batch, block, vectors, "ggn")

    with patch.object(TorchGradientProvider, "curvature_product", wrong):
        yield


@mutant
def perturbation_takes_the_wrong_branch() -> Iterator[None]:
    """The mixed gradients of the rows in another order."""
    original = TorchGradientProvider.mixed_prod

    def wrong(self: Any, batch: Any, factors: Any) -> Any:
        return original(self, batch, factors).roll(1, dims=1)

    with patch.object(TorchGradientProvider, "mixed_prod", wrong):
        yield


@mutant
def negative_eigenvalues_count_as_positive() -> Iterator[None]:
    eigen = DenseOperator.eigen.fget

    def wrong(self: DenseOperator) -> Any:
        values, vectors = eigen(self)
        return values.abs(), vectors

    with patch.object(DenseOperator, "eigen", property(wrong)):
        yield


@mutant
def only_the_leading_half_of_the_spectrum_is_kept() -> Iterator[None]:
    """A silent rank truncation."""
    eigen = DenseOperator.eigen.fget

    def wrong(self: DenseOperator) -> Any:
        values, vectors = eigen(self)
        values = values.clone()
        values[: len(values) // 2] = 0.0
        return values, vectors

    with patch.object(DenseOperator, "eigen", property(wrong)):
        yield
