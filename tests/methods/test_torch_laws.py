"""The laws of influence, for every method, block structure, mode and damping, against explicit matrices."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from models import CASES, Case, mlp, settle
from torch import nn
from torch.utils._pytree import tree_map
from truth import Truth, assert_close, fitted, named_loader, truth_of

import headwater as hw
from headwater.errors import IndefiniteCurvature, InvalidSetting, UnsupportedModel
from headwater.methods.base import Method
from headwater.torch import TorchComposableInfluence

METHODS: dict[str, Method] = {
    "grad-dot": hw.GradDot(),
    "grad-cos": hw.GradCos(),
    "hessian": hw.Direct("hessian", allow_indefinite=True),
    "ggn": hw.Direct("ggn"),
    "fisher": hw.Direct("fisher"),
    "empirical": hw.Direct("empirical_fisher"),
    "kfac": hw.Kfac(),
    "kfac-factored": hw.Kfac("factored", fisher="empirical"),
    "ekfac": hw.Ekfac(),
    "ekfac-full-rank": hw.Ekfac(rank=10**6, fisher="empirical"),
    "tracin": hw.TracIn(0.3),
    "dual": hw.Dual(),
    "dual-ggn": hw.Dual("ggn"),
    "datainf": hw.DataInf(),
    "arnoldi": hw.Arnoldi(rank=10**6, tolerance=1e-13),
    "nystroem": hw.Nystroem(rank=10**6),
    "nystroem-6": hw.Nystroem(rank=6, seed=7),
}
"""Those that end in a closed form; what is solved for by iteration is in test_inverse_laws."""
STRUCTURES = ("full", "layer", "parameter", "own")
FACTORS = (1e-3, 0.1, 1.0)


def structure_of(case: Case, structure: str) -> Any:
    return case.own_blocks if structure == "own" else structure


SIDED = ("kfac", "kfac-factored", "ekfac", "ekfac-full-rank")
"""These look into a layer; the others see a gradient as a vector, whatever layer it is of."""


def combinations() -> Iterator[Any]:
    """All; but a table tied to the output head has no Kronecker factors (its refusal is a claim of its own).

    The fast ones have every pair of method and structure, of method and damping, and of case and structure. The MLP
    meets each method, each larger case every second, and those that look into its layers.
    """
    for i, case in enumerate(CASES):
        for k, method in enumerate(METHODS):
            for turn, structure in enumerate(STRUCTURES):
                tied = case == "language" and method.startswith("kfac")
                if tied and structure != "own":
                    continue
                name, ahead = f"{case}-{method}-{structure}", (turn + k) % len(STRUCTURES)
                met = method in SIDED or (i + k) % 2 == 0
                met &= (case, method) != ("images", "grad-cos")  # differentiating unit gradients twice takes long
                if tied or (case == "mlp" and (ahead + k) % 2 == 1) or (met and case != "mlp" and (ahead + i) % 4 == 0):
                    factor = FACTORS[(ahead + i + k) % len(FACTORS)]
                    yield pytest.param(case, method, structure, (factor,), id=f"{name}-{factor}")
                yield pytest.param(case, method, structure, FACTORS, id=name, marks=pytest.mark.slow)


@pytest.mark.parametrize(("case", "method", "structure", "factors"), list(combinations()))
def test_scores_equal_the_dense_formula(case: str, method: str, structure: str, factors: tuple[float, ...]) -> None:
    truth, settings = truth_of(case), METHODS[method]
    case_, blocks = truth.case, structure_of(truth.case, structure)
    influence = fitted(case_, settings, blocks, damping=1.0)
    rows = (case_.x_query, case_.y_query, case_.x, case_.y)
    for factor in factors:
        damping = truth.absolute(settings, blocks, factor)
        influence = influence.with_damping(damping if method == "hessian" else hw.relative(factor))
        assert influence.absolute_damping == pytest.approx(damping, rel=1e-9)
        expected, condition = truth.scores(settings, blocks, damping)
        by_block = influence.influences_by_block(*rows)
        assert list(by_block) == list(expected)
        for block in expected:
            assert_close(by_block[block], expected[block], condition)
        whole = sum(expected.values())
        assert_close(influence.influences(*rows), whole, condition)
        check_factors(influence, rows, "up", whole, condition)
        if case_.perturbs:
            mixed, condition = truth.scores(settings, blocks, damping, mixed=True)
            for block, value in influence.influences_by_block(*rows, mode="perturbation").items():
                assert_close(value, mixed[block], condition)
            check_factors(influence, rows, "perturbation", sum(mixed.values()), condition)


def check_factors(influence: Any, rows: tuple, mode: str, expected: np.ndarray, condition: float) -> None:
    """Factors computed first, whole or by block, then scored: the same as in one go."""
    x_query, y_query, x, y = rows
    assert_close(influence.influences(*rows, mode=mode), expected, condition)
    factors, split = (
        influence.influence_factors(x_query, y_query),
        influence.influence_factors_by_block(x_query, y_query),
    )
    assert factors.shape == (len(y_query), influence.n_parameters)
    assert_close(torch.cat(list(split.values()), dim=1), factors)
    for given in (factors, split):
        assert_close(influence.influences_from_factors(given, x, y, mode), expected, condition)
    summed = sum(influence.influences_from_factors_by_block(split, x, y, mode).values())
    assert_close(summed, expected, condition)


@pytest.mark.parametrize("structure", ["full", "layer", "parameter"])
@pytest.mark.parametrize("method", ["kfac", "kfac-factored"])
def test_kfac_of_a_table_tied_to_the_head_is_refused(method: str, structure: str) -> None:
    with pytest.raises(InvalidSetting, match="both as an embedding and as a linear map"):
        fitted(truth_of("language").case, METHODS[method], structure)


@pytest.mark.parametrize("case", ["language", "sentences"])
def test_perturbation_of_integer_inputs_is_refused(case: str) -> None:
    found = truth_of(case).case
    influence = fitted(found, hw.GradDot(), "layer")
    with pytest.raises(UnsupportedModel, match="one floating-point tensor"):
        influence.influences(found.x_query, found.y_query, found.x, found.y, mode="perturbation")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", ["mlp", "sentences"])
def test_exchanging_the_roles_transposes_the_scores(case: str, method: str) -> None:
    found = truth_of(case).case
    influence = fitted(found, METHODS[method], "layer", damping=0.1)
    there = influence.influences(found.x_query, found.y_query, found.x, found.y)
    back = influence.influences(found.x, found.y, found.x_query, found.y_query)
    assert_close(back.T, there, 1e3)


@pytest.mark.parametrize("method", METHODS)
def test_without_train_rows_the_queries_meet_themselves(method: str) -> None:
    found = truth_of("mlp").case
    influence = fitted(found, METHODS[method], "layer", damping=0.1)
    for mode in ("up", "perturbation"):
        both = influence.influences(found.x_query, found.y_query, found.x_query, found.y_query, mode=mode)
        assert_close(influence.influences(found.x_query, found.y_query, mode=mode), both)


# What must not matter -------------------------------------------------------------------------------------------------

SAMPLED: dict[str, Method] = {
    "fisher-sampled": hw.Direct("fisher", fisher="sampled", seed=3),
    "kfac-sampled": hw.Kfac(fisher="sampled", samples=2, seed=4),
    "ekfac-sampled": hw.Ekfac(fisher="sampled", samples=2, seed=5),
    "dual-sampled": hw.Dual("fisher", fisher="sampled", seed=6),
}


def orders() -> Iterator[Any]:
    """The fast ones: all methods on the MLP, every third on signals."""
    for case in ("mlp", "signals", "sentences"):
        for k, method in enumerate([*(m for m in METHODS if m != "ekfac-full-rank"), *SAMPLED]):
            fast = case == "mlp" or (case == "signals" and k % 3 == 0)
            yield pytest.param(case, method, marks=() if fast else pytest.mark.slow)


@pytest.mark.parametrize(("case", "method"), list(orders()))
def test_scores_do_not_depend_on_batch_size_or_row_order(case: str, method: str) -> None:
    found, settings = truth_of(case).case, (METHODS | SAMPLED)[method]
    order = torch.randperm(len(found.y), generator=torch.Generator().manual_seed(0))
    rows = (found.x_query, found.y_query, found.x, found.y)
    reference = fitted(found, settings, "layer", size=len(found.y), damping=0.1).influences(*rows)
    for size, by in ((1, None), (4, order)):
        assert_close(fitted(found, settings, "layer", size, by, damping=0.1).influences(*rows), reference, 1e4)


@pytest.mark.parametrize("method", SAMPLED)
def test_draws_follow_the_rows_content_where_there_are_no_ids(method: str) -> None:
    found = truth_of("mlp").case
    order = torch.randperm(len(found.y), generator=torch.Generator().manual_seed(1))
    rows = (found.x_query, found.y_query, found.x, found.y)
    scores = [
        TorchComposableInfluence(found.model, found.loss, SAMPLED[method], damping=0.1).fit(loader).influences(*rows)
        for loader in (found.loader(4), found.loader(5, order))
    ]
    assert_close(scores[1], scores[0], 1e4)


@pytest.mark.parametrize("method", SAMPLED)
@pytest.mark.parametrize("case", ["mlp", "language"])
def test_sampled_labels_are_those_of_the_counter(case: str, method: str) -> None:
    truth, settings = truth_of(case), SAMPLED[method]
    blocks = truth.case.own_blocks
    influence = fitted(truth.case, settings, blocks, damping=hw.relative(0.1))
    expected, condition = truth.scores(settings, blocks, truth.absolute(settings, blocks, 0.1))
    rows = (truth.case.x_query, truth.case.y_query, truth.case.x, truth.case.y)
    assert_close(influence.influences(*rows), sum(expected.values()), condition)


@pytest.mark.parametrize("method", SAMPLED)
def test_another_seed_gives_other_draws(method: str) -> None:
    found = truth_of("mlp").case
    rows = (found.x_query, found.y_query, found.x, found.y)
    one, other = (
        fitted(found, replace(SAMPLED[method], seed=seed), "layer", damping=0.1).influences(*rows) for seed in (0, 1)
    )
    assert (one - other).abs().max() > 1e-3 * one.abs().max()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", ["images", pytest.param("language", marks=pytest.mark.slow)])
def test_scores_do_not_depend_on_the_number_of_queries(case: str, method: str) -> None:
    found = truth_of(case).case
    influence = fitted(found, METHODS[method], found.own_blocks, damping=0.1)
    modes = ("up", "perturbation") if found.perturbs else ("up",)
    for mode in modes:
        together = influence.influences(found.x_query, found.y_query, found.x, found.y, mode=mode)
        for k in (0, len(found.y_query) - 1):
            x_one, y_one = tree_map(lambda t, k=k: t[k : k + 1], (found.x_query, found.y_query))
            assert_close(influence.influences(x_one, y_one, found.x, found.y, mode=mode)[0], together[k], 1e3)


def first_rows(case: Case, train: int, queries: int) -> Case:
    x, y = tree_map(lambda t: t[:train], (case.x, case.y))
    x_query, y_query = tree_map(lambda t: t[:queries], (case.x_query, case.y_query))
    return replace(case, x=x, y=y, x_query=x_query, y_query=y_query)


@pytest.mark.parametrize(
    ("case", "method"),
    [
        *(("mlp", m) for m in METHODS),
        *(pytest.param("sentences", m, marks=pytest.mark.slow) for m in METHODS if m not in ("hessian", "ggn")),
    ],
)
def test_scores_do_not_depend_on_the_working_memory(case: str, method: str) -> None:
    found = first_rows(truth_of(case).case, 5, 3)
    rows = (found.x_query, found.y_query, found.x, found.y)
    plenty = fitted(found, METHODS[method], found.own_blocks, damping=0.1)
    with hw.working_memory(1):
        little = fitted(found, METHODS[method], found.own_blocks, damping=0.1)
        assert_close(little.influences(*rows), plenty.influences(*rows), 1e4)
        if found.perturbs:
            cut = little.influences(*rows, mode="perturbation")
            assert_close(cut, plenty.influences(*rows, mode="perturbation"), 1e4)


# Shapes that have broken libraries ------------------------------------------------------------------------------------


def tiny(train: int, queries: int) -> Case:
    """Seven parameters."""
    case = mlp()

    def rows(seed: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(count, 1, generator=generator, dtype=torch.float64)
        return x, torch.randint(0, 2, (count,), generator=generator)

    model = settle(nn.Sequential(nn.Linear(1, 1), nn.Tanh(), nn.Linear(1, 2, bias=False), nn.Softplus()), 30)
    (x, y), (x_query, y_query) = rows(31, train), rows(32, queries)
    return replace(case, model=model, x=x, y=y, x_query=x_query, y_query=y_query, own_blocks=None)


SHAPES = ((9, 14), (3, 8), (1, 2))


def shapes() -> Iterator[Any]:
    """Train rows, queries, dampings: all; the fast ones have one damping a shape."""
    for (train, queries), factor in zip(SHAPES, reversed(FACTORS), strict=True):
        yield pytest.param(train, queries, (factor,), id=f"{train}-{queries}-{factor}")
        yield pytest.param(train, queries, FACTORS, id=f"{train}-{queries}", marks=pytest.mark.slow)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("train", "queries", "factors"), list(shapes()))
def test_more_queries_than_parameters_or_train_rows(
    method: str, train: int, queries: int, factors: tuple[float, ...]
) -> None:
    truth, settings = Truth(tiny(train, queries)), METHODS[method]
    case = truth.case
    assert queries > train or queries > len(truth.train_grads[0])
    for factor in factors:
        damping = truth.absolute(settings, "layer", factor)
        influence = fitted(case, settings, "layer", damping=damping)
        for mode in ("up", "perturbation"):
            expected, condition = truth.scores(settings, "layer", damping, mixed=mode == "perturbation")
            got = influence.influences(case.x_query, case.y_query, case.x, case.y, mode=mode)
            assert_close(got, sum(expected.values()), condition)


# Indefinite curvature -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["mlp", "signals", "sentences"])
def test_an_indefinite_hessian_is_refused_and_the_damping_named_in_the_error_works(case: str) -> None:
    truth = truth_of(case)
    found, names = truth.case, truth.names
    lowest = np.linalg.eigvalsh(truth.curvature("hessian")).min()
    assert lowest < 0, "this case needs a saddle"
    rows = (found.x_query, found.y_query, found.x, found.y)
    with pytest.raises(IndefiniteCurvature) as refused:
        fitted(found, hw.Direct("hessian"), "full", damping=-lowest / 2)
    named = float(re.search(r"A damping of ([0-9.e+-]+[0-9])", str(refused.value)).group(1))
    assert -lowest <= named <= -1.1 * lowest
    influence = fitted(found, hw.Direct("hessian"), "full", damping=named)
    inverse = truth.inverse(hw.Direct("hessian"), names, named)
    expected = truth.query_grads @ inverse @ truth.train_grads.T
    assert_close(influence.influences(*rows), expected, float(np.linalg.cond(inverse)))


@pytest.mark.parametrize("case", ["mlp", "signals", "sentences"])
def test_an_indefinite_hessian_equals_the_formula_where_it_is_allowed(case: str) -> None:
    truth = truth_of(case)
    found, damping = truth.case, float(-np.linalg.eigvalsh(truth.curvature("hessian")).min() / 2)
    method = hw.Direct("hessian", allow_indefinite=True)
    expected, condition = truth.scores(method, "full", {"full": damping})
    got = fitted(found, method, "full", damping=damping).influences(found.x_query, found.y_query, found.x, found.y)
    assert_close(got, expected["full"], condition)


def test_damping_relative_to_a_negative_mean_eigenvalue_is_refused() -> None:
    case = mlp()
    upside_down = replace(case, loss=lambda o, t: -case.loss(o, t))
    method = hw.Direct("hessian", allow_indefinite=True)
    with pytest.raises(IndefiniteCurvature, match=r"mean eigenvalue is -0\.\d+.*absolute damping"):
        fitted(upside_down, method, "layer", damping=hw.relative(1.0))
    fitted(upside_down, method, "layer", damping=0.1)


# Separable spectra ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("case", ["mlp", "images"])
def test_a_separable_spectrum_gives_the_scores_of_the_spectrum_that_it_says(case: str, rank: int) -> None:
    truth, method = truth_of(case), hw.Ekfac(rank=rank)
    found = truth.case
    influence = fitted(found, method, "layer", damping=hw.relative(0.1))
    damping, expected = truth.absolute(method, "layer", 0.1), 0.0
    for block, names in oracle.block_names(found.model, "layer").items():
        index, inverses = truth.index(names), []
        parts, operators = truth.kronecker(method, names), influence.block_mapper.operators[block].operators
        for part, operator, error in zip(parts, operators, influence.truncation_errors[block], strict=True):
            target = 1.0 / (part.spectrum + damping[block])
            spectrum = np.asarray(operator.spectrum)
            weighted = part.spectrum / part.spectrum.max()
            miss = np.linalg.norm(weighted * (spectrum - target)) / np.linalg.norm(weighted * target)
            assert miss == pytest.approx(error, abs=2e-4)
            inverses.append(replace(part, spectrum=1.0 / spectrum))
        assert any(e > 1e-6 for e in influence.truncation_errors["head" if case == "images" else "first"])
        inverse = oracle.assemble(inverses, len(index), lambda part: part.inverse(0.0))
        expected = expected + truth.query_grads[:, index] @ inverse @ truth.train_grads[:, index].T
    assert_close(influence.influences(found.x_query, found.y_query, found.x, found.y), expected, 1e4)


def test_damping_is_each_blocks_own() -> None:
    truth, method = truth_of("mlp"), hw.Direct("ggn")
    found, damping = truth.case, {"first": 0.003, "second": 0.7}
    influence = fitted(found, method, "layer", damping={"first": 0.003, "second": 0.7})
    expected, condition = truth.scores(method, "layer", damping)
    got = influence.influences_by_block(found.x_query, found.y_query, found.x, found.y)
    for block in damping:
        assert_close(got[block], expected[block], condition)


def test_another_damping_needs_no_other_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    found = truth_of("mlp").case
    influence = fitted(found, hw.Ekfac(), "layer", damping=hw.relative(1.0))
    fresh = fitted(found, hw.Ekfac(), "layer", damping=hw.relative(0.01))
    rows = (found.x_query, found.y_query, found.x, found.y)
    before = influence.influences(*rows)
    monkeypatch.setattr(type(influence.provider), "fisher_grads", None)
    assert_close(influence.with_damping(hw.relative(0.01)).influences(*rows), fresh.influences(*rows))
    assert_close(influence.influences(*rows), before)


def test_named_rows_are_fitted_with_their_names() -> None:
    found = truth_of("mlp").case
    assert [batch.ids.tolist() for batch in named_loader(found, 4)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
