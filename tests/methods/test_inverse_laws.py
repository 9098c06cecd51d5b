"""Inverses that are solved for, stepped towards or cut short: each against its formula, written out densely.

How near is near enough: a solve says with what residual r (relative to its right-hand side g) it stopped; then a factor
is off by at most r |g| |A^-1|, and a score by at most r |g| |A^-1 h|. Residuals may be the tolerance, or what rounding
at that condition number hides. All else is compared to rounding, as in test_torch_laws.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import CASES, mlp, settle
from test_torch_laws import FACTORS, METHODS, STRUCTURES, shapes, structure_of, tiny
from torch import nn
from torch.utils._pytree import tree_map
from truth import EPS, Truth, assert_close, fitted, truth_of

import headwater as hw
from headwater.blocks import Block, Layout, Parameter, Part, Piece
from headwater.errors import BatchMismatch, InvalidSetting, NotConverged
from headwater.gradients.algebra import Dense
from headwater.gradients.block import BlockGradient
from headwater.gradients.draws import DrawsProduct, squared_norms
from headwater.gradients.outer import Outer, RowSparse
from headwater.methods.base import Method
from headwater.methods.stochastic import SteppedMethod
from headwater.operators.iterative import joined, recorded_solves
from headwater.torch import TorchBatch, TorchComposableInfluence

pytestmark = pytest.mark.filterwarnings("ignore::headwater.errors.NotConverged")  # steps are few, and truths as short

INDEFINITE: dict[str, Any] = {"curvature": "hessian", "allow_indefinite": True}
HELPED: dict[str, Any] = {"preconditioner": "ekfac"}


def _lissa(truth: Truth, rows: int | None) -> hw.Lissa:
    """A scale above what any few rows can have, at every damping here."""
    share = 1 if rows is None else len(truth.case.y) / rows
    scale = 2.2 * share * float(np.linalg.eigvalsh(truth.curvature("ggn"))[-1])
    return hw.Lissa(steps=5 if rows else 7, rows=rows, scale=scale, seed=2)


SOLVERS: dict[str, Callable[[Truth], Method]] = {
    "cg": lambda truth: hw.Cg(tolerance=1e-12, block=False, **HELPED),
    "cg-plain": lambda truth: hw.Cg(tolerance=1e-12, block=False, preconditioner=None),
    "block-cg": lambda truth: hw.Cg(tolerance=1e-12, **HELPED),
    "block-cg-plain": lambda truth: hw.Cg(tolerance=1e-12, preconditioner=None),
    "cg-hessian": lambda truth: hw.Cg(tolerance=1e-11, **INDEFINITE, **HELPED),
    "block-krylov": lambda truth: hw.BlockKrylov(tolerance=1e-11, max_products=400, **HELPED),
    "block-krylov-on-disk": lambda truth: hw.BlockKrylov(
        tolerance=1e-11, max_products=400, memory=200_000, on_disk=True, preconditioner=None
    ),
    "block-krylov-hessian": lambda truth: hw.BlockKrylov(tolerance=1e-11, max_products=400, **INDEFINITE, **HELPED),
    "lissa": lambda truth: _lissa(truth, None),
    "lissa-of-few-rows": lambda truth: _lissa(truth, 3),
    "astra": lambda truth: hw.Astra(steps=6, rows=None, step_size=0.2),
    "astra-of-few-rows": lambda truth: hw.Astra(steps=5, rows=3, step_size=0.1, momentum=0.3, seed=1),
    "arnoldi-5": lambda truth: hw.Arnoldi(rank=5, tolerance=1e-13, max_products=1000),
    "arnoldi-5-alone": lambda truth: hw.Arnoldi(rank=5, tolerance=1e-13, max_products=1000, complement=False),
    "arnoldi-hessian": lambda truth: hw.Arnoldi(rank=10**6, tolerance=1e-13, **INDEFINITE),
}
KINDS = (
    "cg",
    "cg-hessian",
    "block-cg-plain",
    "block-krylov-on-disk",
    "lissa",
    "lissa-of-few-rows",
    "astra-of-few-rows",
    "arnoldi-5",
)
"""One of each way to solve, for the fast tests of what must not matter; its variants are slow ones."""


def each(methods: Iterable[str]) -> list[Any]:
    fast = {*METHODS, *KINDS}
    return [pytest.param(m, marks=() if m in fast else pytest.mark.slow) for m in methods]


FEW_ROWS = ("lissa-of-few-rows", "astra-of-few-rows")
CLEAR_GAP = 1e5
"""|C| over the gap behind the kept eigenvalues, up to which "the leading eigenvectors" means something."""


LARGER = {
    "cg": "signals",
    "block-cg-plain": "images",
    "block-krylov-on-disk": "sentences",
    "lissa-of-few-rows": "images",
    "arnoldi-5-alone": "language",
}
"""A solver sees products, whatever model they are of: one of each kind meets a larger one in the fast tests."""


def combinations() -> Iterator[Any]:
    """All; the fast ones have every pair of method and structure, and of method and damping."""
    for case in CASES:
        for k, method in enumerate(SOLVERS):
            for turn, structure in enumerate(STRUCTURES):
                name, ahead = f"{case}-{method}-{structure}", (turn - k) % len(STRUCTURES)
                if case == ("mlp" if ahead > 0 else LARGER.get(method, "mlp")):
                    factor = FACTORS[(ahead + k) % len(FACTORS)]
                    yield pytest.param(case, method, structure, (factor,), id=f"{name}-{factor}")
                yield pytest.param(case, method, structure, FACTORS, id=name, marks=pytest.mark.slow)


@pytest.mark.parametrize(("case", "method", "structure", "factors"), list(combinations()))
def test_factors_and_scores_equal_the_dense_formula(
    case: str, method: str, structure: str, factors: tuple[float, ...]
) -> None:
    truth = truth_of(case)
    chosen, blocks = SOLVERS[method](truth), structure_of(truth.case, structure)
    influence = fitted(truth.case, chosen, blocks, damping=1.0)
    for factor in factors:
        damping = truth.absolute(chosen, blocks, factor)
        hessian = getattr(chosen, "curvature", None) == "hessian"
        influence = influence.with_damping(damping if hessian else hw.relative(factor))
        assert influence.absolute_damping == pytest.approx(damping, rel=1e-9)
        check(influence, truth, blocks, damping)


def check(influence: Any, truth: Truth, blocks: Any, damping: dict[str, float]) -> None:
    """Factors, scores of factors in both modes, and scores in one go; by block."""
    method, case = influence.method, truth.case
    with warnings.catch_warnings(), recorded_solves() as log:
        warnings.simplefilter("ignore", NotConverged)  # what is missed is judged below
        factors = influence.influence_factors_by_block(case.x_query, case.y_query)
        up = influence.influences_by_block(case.x_query, case.y_query, case.x, case.y)
    reports, modes = joined(log), ("up", "perturbation") if case.perturbs else ("up",)
    assert factors.keys() == up.keys() == damping.keys()
    again = {mode: influence.influences_from_factors_by_block(factors, case.x, case.y, mode) for mode in modes}
    seen = 0
    for block, names in oracle.block_names(case.model, blocks).items():
        index = truth.index(names)
        if isinstance(method, hw.Arnoldi) and truth.gap(method, truth.matrix(method, names)) > CLEAR_GAP:
            continue
        seen += 1
        inverse = truth.inverse(method, names, damping[block])
        condition = truth.condition(method, names, damping[block])
        query, train, off = truth.query_grads[:, index], truth.train_grads[:, index], 0.0
        expected = query @ inverse.T
        if block in reports and not isinstance(method, SteppedMethod):
            off = _largest(query) * float(reports[block].residual.max())
            assert reports[block].residual.max() <= max(method.tolerance, 1e2 * EPS * condition)
        assert_close(factors[block], expected, condition, off * np.linalg.norm(inverse, 2))
        for got in (up[block], again["up"][block]):
            assert_close(got, expected @ train.T, condition, off * _largest(train @ inverse.T))
        if case.perturbs:
            mixed = truth.mixed[..., index]
            scores = oracle.contract(expected, mixed)
            assert_close(again["perturbation"][block], scores, condition, off * _largest(mixed @ inverse.T))
    assert seen, "no block has a clear gap"


def _largest(vectors: np.ndarray) -> float:
    return float(np.linalg.norm(vectors, axis=-1).max())


# What must not matter -------------------------------------------------------------------------------------------------

NEAR = 1e5
"""Two solves at tolerances of 1e-11 or less and condition numbers of some hundreds agree to about 1e-8: `condition`."""


def rows_of(case: Any) -> tuple[Any, ...]:
    return case.x_query, case.y_query, case.x, case.y


def _scores(case: Any, method: Method, loader: Any, blocks: Any = "layer", damping: Any = 0.1) -> torch.Tensor:
    influence = TorchComposableInfluence(
        case.model, case.loss, method, blocks=blocks, damping=damping, likelihood=case.likelihood
    )
    return influence.fit(loader).influences(*rows_of(case))


@pytest.mark.parametrize(
    ("case", "method"),
    [
        pytest.param(c, m, marks=() if c == "mlp" and m in KINDS else pytest.mark.slow)
        for c in ("mlp", "signals", "sentences")
        for m in SOLVERS
        if not (c == "signals" and "arnoldi-5" in m)
    ],
)
def test_scores_do_not_depend_on_batch_size_or_row_order(case: str, method: str) -> None:
    """Signals have blocks whose fifth and sixth eigenvalues are too near for five eigenvectors to mean anything."""
    truth = truth_of(case)
    found, chosen = truth.case, SOLVERS[method](truth)
    order = torch.randperm(len(found.y), generator=torch.Generator().manual_seed(0))
    reference = fitted(found, chosen, "layer", size=len(found.y), damping=0.1).influences(*rows_of(found))
    size = (1, 4)[list(SOLVERS).index(method) % 2]
    assert_close(fitted(found, chosen, "layer", size, order, damping=0.1).influences(*rows_of(found)), reference, NEAR)


@pytest.mark.parametrize("method", each(SOLVERS))
@pytest.mark.parametrize("case", ["mlp", pytest.param("language", marks=pytest.mark.slow)])
def test_scores_do_not_depend_on_the_number_of_queries(case: str, method: str) -> None:
    truth = truth_of(case)
    found = truth.case
    influence = fitted(found, SOLVERS[method](truth), found.own_blocks, damping=0.1)
    together = influence.influences(*rows_of(found))
    for k in (1, len(found.y_query) - 1):
        x_one, y_one = tree_map(lambda t, k=k: t[k : k + 1], (found.x_query, found.y_query))
        assert_close(influence.influences(x_one, y_one, found.x, found.y)[0], together[k], NEAR)


@pytest.mark.parametrize("method", each(SOLVERS))
def test_scores_do_not_depend_on_the_working_memory(method: str) -> None:
    truth = Truth(tiny(4, 2))
    found, chosen = truth.case, SOLVERS[method](truth)
    modes = ("up", "perturbation")
    enough = fitted(found, chosen, "full", damping=0.1)
    plenty = [enough.influences(*rows_of(found), mode=mode) for mode in modes]
    with hw.working_memory(1):
        little = fitted(found, chosen, "full", damping=0.1)
        for mode, expected in zip(modes, plenty, strict=True):
            assert_close(little.influences(*rows_of(found), mode=mode), expected, NEAR)


@pytest.mark.parametrize("method", each(m for m in SOLVERS if m not in FEW_ROWS))
@pytest.mark.parametrize("case", ["mlp", pytest.param("sentences", marks=pytest.mark.slow)])
def test_exchanging_the_roles_transposes_the_scores(case: str, method: str) -> None:
    """But where each step sees other rows: a product of different matrices is not symmetric."""
    truth = truth_of(case)
    found = truth.case
    influence = fitted(found, SOLVERS[method](truth), "layer", damping=0.1)
    back = influence.influences(found.x, found.y, found.x_query, found.y_query)
    assert_close(back.T, influence.influences(*rows_of(found)), NEAR)


@pytest.mark.parametrize("method", each(SOLVERS))
def test_another_damping_is_a_fresh_fit_and_leaves_the_first_as_it_was(method: str) -> None:
    truth = Truth(tiny(9, 4))
    found, chosen = truth.case, SOLVERS[method](truth)
    first, fresh = (fitted(found, chosen, "layer", damping=d) for d in (0.5, 0.1))
    before = first.influences(*rows_of(found))
    assert_close(first.with_damping(0.1).influences(*rows_of(found)), fresh.influences(*rows_of(found)), NEAR)
    assert_close(first.influences(*rows_of(found)), before, NEAR)


@pytest.mark.parametrize("method", each(SOLVERS))
@pytest.mark.parametrize(("train", "queries", "factors"), list(shapes()))
def test_more_queries_than_parameters_or_train_rows(
    method: str, train: int, queries: int, factors: tuple[float, ...]
) -> None:
    truth = Truth(tiny(train, queries))
    chosen = SOLVERS[method](truth)
    if isinstance(chosen, SteppedMethod) and chosen.rows is not None:
        chosen = replace(chosen, rows=min(chosen.rows, train))
    for factor in factors:
        damping = truth.absolute(chosen, "layer", factor)
        check(fitted(truth.case, chosen, "layer", damping=damping), truth, "layer", damping)


WEIGHTS = torch.tensor([1.0, 2.0, 0.0, 1.0, 3.0, 1.0, 1.0, 2.0, 1.0, 1.0, 1.0], dtype=torch.float64)
EVERY: dict[str, Callable[[Truth], Method]] = {name: lambda truth, m=m: m for name, m in METHODS.items()} | SOLVERS


@pytest.mark.parametrize("method", each(m for m in EVERY if m not in FEW_ROWS))
def test_a_row_of_weight_two_is_the_row_twice(method: str) -> None:
    """But where steps draw rows: a row that is there twice may be in two steps."""
    truth = truth_of("mlp")
    found, chosen = truth.case, EVERY[method](truth)
    ids = torch.arange(len(WEIGHTS))
    again = torch.repeat_interleave(ids, WEIGHTS.long())
    weighted = [TorchBatch(found.x[k::2], found.y[k::2], weights=WEIGHTS[k::2], ids=ids[k::2]) for k in range(2)]
    twice = [TorchBatch(found.x[again], found.y[again], ids=ids[again])]
    assert_close(_scores(found, chosen, weighted), _scores(found, chosen, twice), NEAR)


def test_a_step_counts_its_rows_with_their_weights() -> None:
    truth = Truth(mlp())
    chosen = hw.Lissa(steps=5, rows=4, scale=9.0)
    assert isinstance(truth.row_ggns, np.ndarray)
    loader = [TorchBatch(truth.case.x, truth.case.y, weights=WEIGHTS + 0.5, ids=torch.arange(11))]
    index, unit = truth.index(truth.names), np.eye(len(truth.names) and len(truth.train_grads[0]))
    x, weights = unit / 9.0, np.asarray(WEIGHTS + 0.5)
    for rows in truth.step_rows(chosen):
        mean = np.tensordot(weights[rows], truth.row_ggns[rows], axes=1) / weights[rows].sum()
        x = x + (unit - mean[np.ix_(index, index)] @ x - 0.1 * x) / 9.0
    assert_close(_scores(truth.case, chosen, loader, "full"), truth.query_grads @ x.T @ truth.train_grads.T, 1e3)


# Loaders that shuffle -------------------------------------------------------------------------------------------------


class Shuffled:
    """Another order, and other batches, every time."""

    def __init__(self, case: Any):
        self.case, self.generator = case, torch.Generator().manual_seed(5)

    def __iter__(self) -> Iterator[TorchBatch]:
        order = torch.randperm(len(self.case.y), generator=self.generator)
        for index in order.split(4):
            yield TorchBatch(*tree_map(lambda t, i=index: t[i], (self.case.x, self.case.y)), ids=index)


@pytest.mark.parametrize("method", each(m for m in EVERY if m not in FEW_ROWS and not m.startswith("dual")))
def test_a_loader_that_shuffles_changes_nothing(method: str) -> None:
    truth = Truth(tiny(5, 2))
    found, chosen = truth.case, EVERY[method](truth)
    expected = fitted(found, chosen, "layer", damping=0.1).influences(*rows_of(found))
    with hw.working_memory(1):  # so that every product reads the rows again
        assert_close(_scores(found, chosen, Shuffled(found)), expected, NEAR)


@pytest.mark.parametrize("method", [hw.Dual(), hw.Dual("ggn")], ids=repr)
def test_the_dual_form_refuses_a_loader_that_shuffles_unless_all_rows_fit_into_memory(method: Method) -> None:
    found = truth_of("mlp").case
    expected = fitted(found, method, "layer", damping=0.1).influences(*rows_of(found))
    assert_close(_scores(found, method, Shuffled(found)), expected, NEAR)
    with hw.working_memory(1), pytest.raises(BatchMismatch, match="shuffle=False"):
        _scores(found, method, Shuffled(found))


@pytest.mark.parametrize("method", FEW_ROWS)
def test_steps_of_few_rows_refuse_a_loader_that_shuffles(method: str) -> None:
    truth = truth_of("mlp")
    with pytest.raises(BatchMismatch, match="shuffle=False"):
        _scores(truth.case, SOLVERS[method](truth), Shuffled(truth.case))


# Refusals -------------------------------------------------------------------------------------------------------------


def test_the_dual_form_of_a_ggn_that_is_no_short_sum_is_refused() -> None:
    """More outputs than are enumerated, or a loss that is not convex in them."""
    wide = replace(mlp(), model=settle(nn.Linear(3, 70), 1), y=torch.arange(11) % 70, y_query=torch.arange(5))
    bent = replace(mlp(), loss=lambda output, target: torch.sin(output).sum())
    for case in (wide, bent):
        with pytest.raises(InvalidSetting, match=r"no short sum.*Use curvature='empirical_fisher'.*hw\.Cg"):
            fitted(case, hw.Dual("ggn"), "layer", damping=0.1)
        fitted(case, hw.Dual(), "layer", damping=0.1)


def test_a_dual_form_of_a_hessian_is_refused() -> None:
    with pytest.raises(InvalidSetting, match="sum over rows"):
        hw.Dual("hessian")  # type: ignore[arg-type]


def test_another_seed_gives_other_steps_and_other_sketches() -> None:
    truth = truth_of("mlp")
    for method in (_lissa(truth, 3), hw.Astra(steps=5, rows=3, step_size=0.1), hw.Nystroem(rank=4)):
        one, other = (
            fitted(truth.case, replace(method, seed=seed), "full", damping=0.1).influences(*rows_of(truth.case))
            for seed in (0, 1)
        )
        assert (one - other).abs().max() > 1e-3 * one.abs().max()


# Any shapes -----------------------------------------------------------------------------------------------------------


@st.composite
def networks(draw: Any) -> tuple[Any, list[int], float]:
    """A small classifier with data, where the loader's batches are cut, and damping in mean eigenvalues."""
    size = st.integers(1, 5)
    inputs, hidden, outputs, train, queries = draw(size), draw(size), draw(st.integers(2, 4)), draw(size), draw(size)
    train = 2 * train + draw(st.integers(0, 1))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))

    def rows(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.randn(count, inputs, generator=generator, dtype=torch.float64)
        return x, torch.randint(0, outputs, (count,), generator=generator)

    model = settle(nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, outputs)), 3)
    (x, y), (x_query, y_query) = rows(train), rows(queries)
    case = replace(mlp(), model=model, x=x, y=y, x_query=x_query, y_query=y_query, own_blocks=None)
    cuts = sorted({0, train, *draw(st.lists(st.integers(0, train), max_size=4))})
    return case, cuts, draw(st.sampled_from([1e-2, 0.1, 1.0, 10.0]))


@settings(max_examples=5)
@given(networks())
def test_all_exact_inverses_agree_on_networks_of_any_shape(drawn: tuple[Any, list[int], float]) -> None:
    case, cuts, factor = drawn
    loader = [TorchBatch(case.x[a:b], case.y[a:b], ids=torch.arange(a, b)) for a, b in pairwise(cuts)]
    damping = hw.relative(factor)
    expected = _scores(case, hw.Direct("ggn"), loader, "full", damping)
    for method in (
        hw.Cg(tolerance=1e-12, preconditioner=None),
        hw.Cg(tolerance=1e-12, block=False),
        hw.BlockKrylov(tolerance=1e-12, max_products=200),
        hw.Dual("ggn"),
        hw.Nystroem(rank=10**6),
        hw.Arnoldi(rank=10**6, tolerance=1e-13),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotConverged)
            assert_close(_scores(case, method, loader, "full", damping), expected, 1e6)
    expected = _scores(case, hw.Direct("empirical_fisher"), loader, "full", damping)
    assert_close(_scores(case, hw.Dual(), loader, "full", damping), expected, 1e6)


@st.composite
def drawn_gradients(draw: Any) -> tuple[Any, list[list[BlockGradient]], list[np.ndarray], list[np.ndarray]]:
    """A layout of one to three parts; batches of rows with one to three draws; their dense meaning; weights."""
    random = np.random.default_rng(draw(st.integers(0, 999)))
    kinds = draw(st.lists(st.sampled_from(["outer", "ones", "apart", "dense", "sparse"]), min_size=1, max_size=3))
    shapes = [(draw(st.integers(1, 4)), draw(st.integers(2, 4))) for _ in kinds]
    parameters = tuple(Parameter(f"p{k}", shape) for k, shape in enumerate(shapes))
    parts = tuple(Part(Piece(p.name, 0, p.shape)) for p in parameters)
    layout = Layout(Block("b", parameters), parts)
    count, positions = draw(st.integers(1, 3)), draw(st.integers(1, 3))

    def values(kind: str, o: int, i: int, n: int) -> list[Any]:
        if kind == "dense":
            return [Dense(torch.as_tensor(random.normal(size=(n, o, i)))) for _ in range(count)]
        if kind == "sparse":
            ids = torch.as_tensor(random.integers(0, o, size=(n, positions)))
            return [RowSparse(ids, torch.as_tensor(random.normal(size=(n, positions, i))), o) for _ in range(count)]
        inputs = [torch.as_tensor(random.normal(size=(n, positions, i - (kind == "ones")))) for _ in range(count)]
        sides = [torch.as_tensor(random.normal(size=(n, positions, o))) for _ in range(count)]
        return [Outer(inputs[k if kind == "apart" else 0], side, kind == "ones") for k, side in enumerate(sides)]

    batches, dense, weights = [], [], []
    for n in draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)):
        found = [values(kind, *shape, n) for kind, shape in zip(kinds, shapes, strict=True)]
        batches.append([BlockGradient(layout, tuple(part[k] for part in found)) for k in range(count)])
        dense.append(np.stack([draw_.flat().numpy() for draw_ in batches[-1]], axis=1))
        weights.append(random.uniform(size=n))
    return layout, batches, dense, weights


@settings(max_examples=25)
@given(drawn_gradients(), st.integers(1, 6), st.booleans(), st.booleans())
def test_products_with_draws_are_their_dense_meaning(drawn: Any, q: int, weighted: bool, little: bool) -> None:
    layout, batches, dense, weights = drawn
    vectors = np.random.default_rng(q).normal(size=(q, layout.size))
    with hw.working_memory(1 if little else 2**26):
        product, apart = (DrawsProduct(layout, torch.as_tensor(vectors)) for _ in range(2))
        expected = 0.0
        for rows, meaning, weight in zip(batches, dense, weights, strict=True):
            weight = weight if weighted else np.ones(len(weight))
            along = np.einsum("nkd,qd->nqk", meaning, vectors)
            assert_close(product.project(rows), along, 1e2)
            product.add(rows, torch.as_tensor(weight) if weighted else None)
            apart.combine(rows, torch.as_tensor(along * weight[:, None, None]))
            expected = expected + np.einsum("nkd,nqk,n->qd", meaning, along, weight)
            assert_close(squared_norms(rows), (meaning**2).sum((1, 2)), 1e2)
            for mine, one in zip(rows, meaning.transpose(1, 0, 2), strict=True):
                for theirs, other in zip(batches[0], dense[0].transpose(1, 0, 2), strict=True):
                    assert_close(mine.inner(theirs), one @ other.T, 1e3)
        assert_close(product.value, expected, 1e3)
        assert_close(apart.value, expected, 1e3)


def test_products_with_no_rows_are_zero() -> None:
    layout = Layout(Block("b", (Parameter("w", (2, 3)),)), (Part(Piece("w", 0, (2, 3))),))
    assert_close(DrawsProduct(layout, torch.ones(4, 6, dtype=torch.float64)).value, torch.zeros(4, 6))
