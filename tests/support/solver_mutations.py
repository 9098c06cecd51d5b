"""Ways in which solvers, sketches and the dual form have been wrong, and the quick laws that must notice each.

Unlike in mutations.py, a mutant here names the laws that concern it: {name: (mutant, laws)}.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cache, cached_property
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from mutations import ScaledIdentity
from truth import assert_close, fitted, truth_of

import headwater as hw
from headwater.arrays import namespace
from headwater.curvature import products
from headwater.curvature.dual import DualOperator, SwappedInverse
from headwater.errors import NotConverged
from headwater.gradients.draws import DrawsProduct
from headwater.methods import low_rank
from headwater.methods.base import Method
from headwater.methods.iterative import PreconditionedMethod
from headwater.operators import cg, krylov
from headwater.operators.algebra import IdentityOperator, ScaledOperator
from headwater.operators.approximated import ApproximatedOperator
from headwater.operators.block_krylov import BlockKrylovSolver
from headwater.operators.iterative import Solution, recorded_solves
from headwater.operators.lissa import Descent, SteppedOperator
from headwater.operators.structured import BesideOperator, EigenpairsOperator, EigenpairsPlusScaledOperator
from headwater.torch import TorchBatch, TorchComposableInfluence

Law = Callable[[], None]
Mutant = Callable[[], AbstractContextManager[Any]]

PLAIN: dict[str, Any] = {"preconditioner": None, "tolerance": 1e-12}
METHODS: dict[str, Method] = {
    "Cg": hw.Cg(block=False, max_iterations=100, **PLAIN),  # some mutants never converge
    "block Cg": hw.Cg(**PLAIN),
    "helped Cg": hw.Cg(preconditioner="ekfac", tolerance=1e-12, block=False, max_iterations=100),
    "BlockKrylov": hw.BlockKrylov(max_products=400, **PLAIN),
    "Lissa": hw.Lissa(rows=None, steps=7, scale=4.0),
    "Lissa of few rows": hw.Lissa(rows=3, steps=5, scale=9.0, seed=2),
    "Astra": hw.Astra(rows=None, steps=6, step_size=0.2),
    "Astra of few rows": hw.Astra(rows=3, steps=5, step_size=0.1, momentum=0.3, seed=1),
    "Arnoldi": hw.Arnoldi(rank=4, tolerance=1e-13, max_products=1000),
    "Arnoldi alone": hw.Arnoldi(rank=4, tolerance=1e-13, max_products=1000, complement=False),
    "Arnoldi of a Hessian": hw.Arnoldi(
        rank=4, tolerance=1e-13, max_products=1000, curvature="hessian", allow_indefinite=True
    ),
    "Nystroem": hw.Nystroem(rank=4, seed=7),
    "DataInf": hw.DataInf(),
    "Dual": hw.Dual(),
    "Dual of the GGN": hw.Dual("ggn"),
}


# Laws -----------------------------------------------------------------------------------------------------------------


@cache
def formula(name: str, factor: float = 0.1) -> Law:
    """Scores in one go, scores by factors and self-influence of a method are those of its dense formula."""

    def law() -> None:
        truth, method = truth_of("mlp"), METHODS[name]
        case, damping = truth.case, truth.absolute(method, "full", factor)
        inverse = truth.inverse(method, truth.names, damping["full"])
        condition = truth.condition(method, truth.names, damping["full"])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotConverged)  # the numbers are looked at, not what is said of them
            influence = fitted(case, method, "full", damping=damping)
            together = influence.influences(case.x_query, case.y_query, case.x, case.y)
            factors = influence.influence_factors(case.x_query, case.y_query)
            own = influence.self_influence(case.loader())
        apart = influence.influences_from_factors(factors, case.x, case.y)
        expected = truth.query_grads @ inverse.T @ truth.train_grads.T
        assert_close(together, expected, condition)
        assert_close(apart, expected, condition)
        assert_close(own, np.diagonal(truth.train_grads @ inverse.T @ truth.train_grads.T), condition)

    law.__name__ = f"{name}_equals_its_formula"
    return law


@cache
def weights(name: str) -> Law:
    """A row of weight two is the row twice."""

    def law() -> None:
        case, method = truth_of("mlp").case, METHODS[name]
        count = torch.tensor([1.0, 2, 0, 1, 3, 1, 1, 2, 1, 1, 1], dtype=torch.float64)
        ids = torch.arange(len(count))
        again = torch.repeat_interleave(ids, count.long())
        found = []
        for loader in (
            [TorchBatch(case.x, case.y, weights=count, ids=ids)],
            [TorchBatch(case.x[again], case.y[again], ids=ids[again])],
        ):
            influence = TorchComposableInfluence(case.model, case.loss, method, damping=0.1).fit(loader)
            found.append(influence.influences(case.x_query, case.y_query, case.x, case.y))
        assert_close(found[0], found[1], 1e4)

    law.__name__ = f"{name}_counts_weights"
    return law


def a_preconditioner_saves_steps() -> None:
    case, steps = truth_of("mlp").case, {}
    for helper in (None, "ekfac"):
        method = hw.Cg(preconditioner=helper, tolerance=1e-8, block=False)
        influence = fitted(case, method, "layer", damping=hw.relative(1e-2))
        with recorded_solves() as log:
            influence.influence_factors(case.x_query, case.y_query)
        steps[helper] = sum(int(report.iterations.sum()) for report in log)
    assert steps["ekfac"] < 0.9 * steps[None], f"off by {steps['ekfac']} steps where {steps[None]} need no help"


LAWS: tuple[Law, ...] = (
    *(formula(name) for name in METHODS),
    *(weights(name) for name in ("Cg", "BlockKrylov", "Dual", "Dual of the GGN", "DataInf", "Nystroem")),
    a_preconditioner_saves_steps,
)

# Mutants --------------------------------------------------------------------------------------------------------------

MUTANTS: dict[str, tuple[Mutant, tuple[Law, ...]]] = {}


def wrapped(text: str, owner: Any, attribute: str, make: Callable[[Any], Any], *laws: Law) -> None:
    """A mutant that replaces one attribute: `make` gets the original."""
    MUTANTS[text] = (lambda: patch.object(owner, attribute, make(getattr(owner, attribute))), laws)


def formulas(*names: str) -> tuple[Law, ...]:
    return tuple(formula(name) for name in names)


for _class, _names in {
    hw.Cg: ("Cg", "block Cg", "helped Cg"),
    hw.BlockKrylov: ("BlockKrylov",),
    hw.Lissa: ("Lissa", "Lissa of few rows"),
    hw.Astra: ("Astra", "Astra of few rows"),
    hw.Arnoldi: ("Arnoldi", "Arnoldi alone", "Arnoldi of a Hessian"),
    hw.Nystroem: ("Nystroem",),
    hw.DataInf: ("DataInf",),
    hw.Dual: ("Dual", "Dual of the GGN"),
}.items():
    for _name in _names:
        wrapped(
            f"{_name} inverts to a multiple of the identity",
            _class,
            "invert",
            lambda _: lambda self, curvature, damping: ScaledIdentity(curvature, damping),
            formula(_name),
        )
        for _text, _factor in (("hardly damps", 1e-3), ("damps twice", 2.0)):
            wrapped(
                f"{_name} {_text}",
                _class,
                "invert",
                lambda f, factor=_factor: lambda self, curvature, damping: f(self, curvature, factor * damping),
                formula(_name),
            )

wrapped(
    "conjugate gradients leave the damping out of their products",
    cg._Damped,
    "__init__",
    lambda f: lambda self, curvature, damping: f(self, curvature, 1e-3 * damping),
    *formulas("Cg", "block Cg"),
)
wrapped(
    "the shared space is solved without damping",
    BlockKrylovSolver,
    "_coefficients",
    lambda f: lambda self, space, damping, *rest: f(self, space, 1e-3 * damping, *rest),
    formula("BlockKrylov"),
)
wrapped(
    "descent leaves the damping out",
    Descent,
    "solve",
    lambda f: lambda self, curvature, damping, *rest: f(self, curvature, 0.0, *rest),
    *formulas("Lissa", "Astra"),
)


def _in_the_order_of_leaving(solution: Any) -> Any:
    def wrong(self: Any) -> Solution:
        found = solution(self)
        rows = [x for _, x in self._left]
        return Solution(namespace(self.rhs).concat(rows, axis=0), found.report)

    return wrong


wrapped(
    "columns come back in the order in which they converged",
    cg._Columns,
    "solution",
    _in_the_order_of_leaving,
    formula("Cg"),
)
wrapped(
    "conjugate gradients stop after three steps",
    cg.ConjugateGradient,
    "solve",
    lambda f: lambda self, *given: f(replace(self, max_iterations=3), *given),
    *formulas("Cg", "block Cg"),
)
wrapped(
    "the shared space stops after two products",
    BlockKrylovSolver,
    "solve",
    lambda f: lambda self, *given: f(replace(self, max_products=2), *given),
    formula("BlockKrylov"),
)


# Preconditioners


def _with_helper(change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """An inversion whose curvature comes with another approximation."""

    def make(invert: Any) -> Any:
        def wrong(self: Any, curvature: Any, damping: float) -> Any:
            helper = change(curvature.approximation)
            return invert(self, ApproximatedOperator(curvature.exact, helper), damping)

        return wrong

    return make


class Zero(IdentityOperator):
    """Whose inverse is zero."""

    def inverse(self, damping: float = 0.0) -> Any:
        return ScaledOperator(0.0, IdentityOperator(self.input_size))


def _zero(helper: Any) -> Any:
    return None if helper is None else Zero(helper.input_size)


wrapped(
    "the preconditioner is fitted and then dropped",
    PreconditionedMethod,
    "invert",
    _with_helper(lambda helper: None),
    a_preconditioner_saves_steps,
)
wrapped(
    "the preconditioner is zero",
    PreconditionedMethod,
    "invert",
    _with_helper(_zero),
    formula("helped Cg"),
)
wrapped("Astra's preconditioner is zero", hw.Astra, "invert", _with_helper(_zero), formula("Astra"))
wrapped(
    "Astra's preconditioner is a multiple of the identity",
    hw.Astra,
    "invert",
    _with_helper(lambda helper: ScaledOperator(helper.mean_eigenvalue(), IdentityOperator(helper.input_size))),
    formula("Astra"),
)


# Steps

wrapped(
    "momentum is left out",
    Descent,
    "solve",
    lambda f: lambda self, *given: f(replace(self, momentum=0.0), *given),
    formula("Astra"),
)
wrapped(
    "descent starts from the preconditioned side without being asked",
    Descent,
    "solve",
    lambda f: lambda self, *given: f(replace(self, warm_start=not self.warm_start), *given),
    *formulas("Lissa", "Astra"),
)
wrapped(
    "one step is left out",
    Descent,
    "solve",
    lambda f: lambda self, *given: f(replace(self, steps=self.steps - 1), *given),
    *formulas("Lissa", "Astra"),
)
wrapped(
    "every step sees all rows",
    SteppedOperator,
    "at",
    lambda f: lambda self, step: self.whole,
    *formulas("Lissa of few rows", "Astra of few rows"),
)
wrapped(
    "every step sees the same rows",
    SteppedOperator,
    "at",
    lambda f: lambda self, step: f(self, 0),
    *formulas("Lissa of few rows", "Astra of few rows"),
)
wrapped(
    "the seed of the steps is not used",
    products,
    "row_uniforms",
    lambda f: lambda rows, count, *, draw, seed: f(rows, count, draw=draw, seed=0),
    *formulas("Lissa of few rows", "Astra of few rows"),
)
wrapped(
    "every epoch has the same order",
    products,
    "row_uniforms",
    lambda f: lambda rows, count, *, draw, seed: f(rows, count, draw=products.STEP_DRAWS, seed=seed),
    *formulas("Lissa of few rows", "Astra of few rows"),
)


# Low rank

wrapped(
    "the seed of the sketch is not used",
    low_rank,
    "fit_nystroem",
    lambda f: lambda operator, like, *, rank, seed: f(operator, like, rank=rank, seed=0),
    formula("Nystroem"),
)
wrapped(
    "the sketch is of half its rank",
    low_rank,
    "fit_nystroem",
    lambda f: lambda operator, like, *, rank, seed: f(operator, like, rank=rank // 2, seed=seed),
    formula("Nystroem"),
)
wrapped(
    "the complement is dropped",
    EigenpairsOperator,
    "inverse",
    lambda f: lambda self, damping=0.0, *, complement=True: f(self, damping, complement=False),
    *formulas("Arnoldi", "Nystroem"),
)
wrapped(
    "the complement is kept although it is not wanted",
    EigenpairsOperator,
    "inverse",
    lambda f: lambda self, damping=0.0, *, complement=True: f(self, damping),
    formula("Arnoldi alone"),
)
wrapped(
    "the smallest eigenvalues are kept",
    krylov,
    "_leading",
    lambda f: lambda values, rank: np.argsort(np.abs(values), kind="stable")[:rank],
    formula("Arnoldi"),
)
wrapped(
    "eigenvalues are ordered by sign and not by size",
    krylov,
    "_leading",
    lambda f: lambda values, rank: np.argsort(-values, kind="stable")[:rank],
    formula("Arnoldi of a Hessian"),
)
wrapped(
    "pairs are weighted on both sides",
    BesideOperator,
    "__init__",
    lambda f: (
        lambda self, vectors, weights, scale: f(self, vectors, weights if weights.min() != 1 else 2 * weights, scale)
    ),
    *formulas("Arnoldi", "Nystroem"),
)
wrapped(
    "self-influence forgets the complement",
    EigenpairsPlusScaledOperator,
    "quadratic",
    lambda f: lambda self, value: f(self, value) - value.squared_norms() * self.scale,
    *formulas("Arnoldi", "Nystroem"),
)


# Sums over rows


def _without_the_last_batch(add: Any) -> Any:
    def wrong(self: DrawsProduct, draws: Any, weights: Any = None) -> None:
        if draws[0].rows != 3:  # batches of four, four and three
            add(self, draws, weights)

    return wrong


def _without_weights(drawn: Any) -> Any:
    def wrong(self: products.RowDraws, *arguments: Any, **options: Any) -> Any:
        return replace(drawn(self, *arguments, **options), weights=None)

    return wrong


def _one_tile_transposed(gram: Any) -> Any:
    def wrong(self: DualOperator) -> Any:
        found = gram.func(self).clone()
        tile = found[0:4, 4:8].T.clone()
        found[0:4, 4:8], found[4:8, 0:4] = tile, tile.T
        return found

    changed = cached_property(wrong)
    changed.__set_name__(DualOperator, "gram")
    return changed


wrapped(
    "the last batch is dropped from products",
    DrawsProduct,
    "add",
    _without_the_last_batch,
    *formulas("Cg", "BlockKrylov", "Arnoldi", "DataInf"),
)
wrapped(
    "products ignore the weights of rows",
    DrawsProduct,
    "add",
    lambda f: lambda self, draws, weights=None: f(self, draws),
    weights("Cg"),
    weights("DataInf"),
)
wrapped(
    "the dual form ignores the weights of rows",
    products.RowDraws,
    "drawn",
    _without_weights,
    weights("Dual"),
    weights("Dual of the GGN"),
)
wrapped("a tile of the Gram matrix is transposed", DualOperator, "gram", _one_tile_transposed, formula("Dual", 10.0))
wrapped(
    "the dual form forgets how many rows there are",
    DualOperator,
    "inverse",
    lambda f: lambda self, damping=0.0: f(self, damping / self.rows),
    formula("Dual"),
)
wrapped(
    "DataInf adds what it ought to take away",
    SwappedInverse,
    "_apply",
    lambda f: lambda self, tensor: 2 * tensor / self.damping - f(self, tensor),
    formula("DataInf"),
)
wrapped(
    "DataInf is the inverse of the mean",
    hw.DataInf,
    "invert",
    lambda f: lambda self, curvature, damping: DualOperator(curvature.curvature, curvature.rows).inverse(damping),
    formula("DataInf"),
)
wrapped(
    "outer products of several outputs are summed before they are squared",
    products.RowDraws,
    "_draws",
    lambda f: lambda self, batch: _summed(f(self, batch)),
    *formulas("Cg", "Dual of the GGN"),
)


def _summed(draws: Any) -> Any:
    """One gradient, the sum of all."""
    if draws is None or len(draws) == 1:
        return draws
    from headwater.gradients.block import BlockGradient

    return [
        {name: BlockGradient.from_flat(value.layout, sum(draw[name].flat() for draw in draws))}
        for name, value in draws[0].items()
    ]
