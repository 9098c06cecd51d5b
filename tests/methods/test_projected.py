"""The projected methods against their dense formulas, and the laws that they share with all methods."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from models import CASES
from projected_truth import ProjectedTruth, shared_by
from torch import nn
from torch.utils._pytree import tree_map
from truth import assert_close, fitted

import headwater as hw
from headwater.errors import InvalidSetting, SingularOperator
from headwater.methods.projected import FactGrass, LoGra, LoRif, ProjectedMethod, Trak
from headwater.operators import projection
from headwater.torch import TorchBatch, TorchComposableInfluence

METHODS: dict[str, Any] = {
    "trak": Trak(7),
    "trak-dense": Trak(7, projection="dense", seed=1),
    "trak-exact": Trak(None),
    "trak-loss": Trak(8, output="loss", seed=2),
    "logra": LoGra(2),
    "logra-pca": LoGra((3, 2), "pca"),
    "logra-fisher": LoGra((2, 3), "pca", fisher="sampled", seed=3),
    "lorif": LoRif(3, rank=1, kept=4),
    "lorif-pca": LoRif(3, "pca", rank=2, kept=7),
    "factgrass": FactGrass(2, seed=4),
    "factgrass-mask": FactGrass((2, 3), mask=(3, 4)),
}
STRUCTURES = {
    "mlp": ("full", "layer", "parameter", "own"),
    "images": ("full", "parameter", "own"),
    "signals": ("layer", "own"),
    "language": ("full", "layer"),
    "sentences": ("parameter", "own"),
}
FACTORS = (1e-3, 0.1, 1.0)


@pytest.fixture(autouse=True)
def signs_are_shared_in_small_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projection, "mixing", shared_by)


@cache
def truth_of(name: str) -> ProjectedTruth:
    return ProjectedTruth(CASES[name]())


def has(case: str, method: str) -> bool:
    """Margins and the Fisher's sampled labels are for classes."""
    if method in ("trak", "trak-dense", "trak-exact"):
        return case in ("mlp", "images", "sentences")
    return method != "logra-fisher" or case != "signals"


def combinations() -> Iterator[Any]:
    """All; the fast ones have every pair of case and method, and every structure of a case, with one damping each."""
    for i, case in enumerate(CASES):
        for k, method in enumerate(METHODS):
            for turn, structure in enumerate(STRUCTURES[case]):
                if not has(case, method):
                    continue
                name = f"{case}-{method}-{structure}"
                if (turn + k) % (2 if case == "mlp" else len(STRUCTURES[case])) == 0:
                    factor = FACTORS[(i + k) % len(FACTORS)]
                    yield pytest.param(case, method, structure, (factor,), id=f"{name}-{factor}")
                yield pytest.param(case, method, structure, FACTORS, id=name, marks=pytest.mark.slow)


def blocks_of(case: Any, structure: str) -> Any:
    return case.own_blocks if structure == "own" else structure


@pytest.mark.parametrize(("case", "method", "structure", "factors"), list(combinations()))
def test_scores_equal_the_dense_formula(case: str, method: str, structure: str, factors: tuple[float, ...]) -> None:
    truth, settings = truth_of(case), METHODS[method]
    found, blocks = truth.case, blocks_of(truth.case, structure)
    influence = fitted(found, settings, blocks, damping=1.0)
    rows = (found.x_query, found.y_query, found.x, found.y)
    for factor in factors:
        damping = truth.damping_of(settings, blocks, factor)
        influence = influence.with_damping(hw.relative(factor))
        assert influence.absolute_damping == pytest.approx(damping, rel=1e-9)
        for mode in ("up", "perturbation") if found.perturbs and factor == factors[-1] else ("up",):
            expected, condition = truth.projected_scores(settings, blocks, damping, mixed=mode == "perturbation")
            by_block = influence.influences_by_block(*rows, mode=mode)
            for block, value in by_block.items():
                assert_close(value, expected[block], condition)
            if factor == factors[-1]:
                whole = sum(by_block.values())
                assert_close(influence.influences(*rows, mode=mode), whole, condition)
                inverted = influence.influence_factors(found.x_query, found.y_query)
                assert inverted.shape == (len(found.y_query), influence.n_parameters)
                assert_close(influence.influences_from_factors(inverted, found.x, found.y, mode), whole, condition)


def in_turn(*cases: str) -> list[Any]:
    """All; the fast ones have one case a method."""
    return [
        pytest.param(case, method, marks=() if (k + turn) % len(cases) == 0 else pytest.mark.slow)
        for turn, case in enumerate(cases)
        for k, method in enumerate(METHODS)
    ]


@pytest.mark.parametrize(("case", "method"), in_turn("mlp", "images", "sentences"))
def test_attribute_and_self_influence_agree_with_influences(case: str, method: str) -> None:
    found = truth_of(case).case
    influence = fitted(found, METHODS[method], found.own_blocks, damping=hw.relative(0.1))
    train, queries = found.loader(3), [(found.x_query, found.y_query)]
    assert_close(
        influence.attribute(train, queries).values,
        influence.influences(found.x_query, found.y_query, found.x, found.y),
        1e4,
    )
    assert_close(influence.self_influence(train), torch.diagonal(influence.influences(found.x, found.y)), 1e4)


@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("trak", "trak-dense", "trak-exact")])
def test_exchanging_the_roles_transposes_the_scores(method: str) -> None:
    found = truth_of("sentences").case
    influence = fitted(found, METHODS[method], "layer", damping=hw.relative(0.1))
    there = influence.influences(found.x_query, found.y_query, found.x, found.y)
    assert_close(influence.influences(found.x, found.y, found.x_query, found.y_query).T, there, 1e4)


def test_exchanging_the_roles_transposes_traks_scores_up_to_the_doubt_of_the_train_row() -> None:
    found = truth_of("mlp").case
    influence = fitted(found, Trak(7), "full", damping=hw.relative(0.1))
    there = influence.influences(found.x_query, found.y_query, found.x, found.y)
    back = influence.influences(found.x, found.y, found.x_query, found.y_query)
    rows = (found.x, found.y), (found.x_query, found.y_query)
    others = [influence.provider.one_minus_p(TorchBatch(*pair)) for pair in rows]
    assert_close((back / others[1]).T, there / others[0], 1e4)


@pytest.mark.parametrize(("case", "method"), in_turn("mlp", "sentences"))
def test_scores_do_not_depend_on_batch_size_row_order_or_memory(case: str, method: str) -> None:
    found, settings = truth_of(case).case, METHODS[method]
    order = torch.randperm(len(found.y), generator=torch.Generator().manual_seed(0))
    rows = (found.x_query, found.y_query, found.x, found.y)
    reference = fitted(found, settings, "layer", size=len(found.y), damping=hw.relative(0.1)).influences(*rows)
    for size, by in ((1, None), (4, order)):
        scores = fitted(found, settings, "layer", size, by, damping=hw.relative(0.1)).influences(*rows)
        assert_close(scores, reference, 1e4)
    if method == "trak-exact":  # its memory is the business of the dual form
        return
    with hw.working_memory(1):
        scores = fitted(found, settings, "layer", damping=hw.relative(0.1)).influences(*rows)
    assert_close(scores, reference, 1e4)


@pytest.mark.parametrize(("case", "method"), in_turn("images", "sentences"))
def test_scores_do_not_depend_on_the_number_of_queries(case: str, method: str) -> None:
    found = truth_of(case).case
    influence = fitted(found, METHODS[method], "layer", damping=hw.relative(0.1))
    together = influence.influences(found.x_query, found.y_query, found.x, found.y)
    for k in (0, len(found.y_query) - 1):
        x, y = tree_map(lambda t, k=k: t[k : k + 1], (found.x_query, found.y_query))
        assert_close(influence.influences(x, y, found.x, found.y)[0], together[k], 1e4)


@pytest.mark.parametrize("method", METHODS)
def test_more_queries_than_rows_or_projected_numbers(method: str) -> None:
    case = truth_of("mlp").case
    case = replace(case, x=case.x[:3], y=case.y[:3], x_query=case.x, y_query=case.y)
    truth, settings = ProjectedTruth(case), METHODS[method]
    damping = truth.damping_of(settings, "layer", 0.1)
    expected, condition = truth.projected_scores(settings, "layer", damping)
    got = fitted(case, settings, "layer", damping=damping).influences(case.x_query, case.y_query, case.x, case.y)
    assert_close(got, sum(expected.values()), condition)


@pytest.mark.parametrize("method", METHODS)
def test_a_row_of_weight_two_is_the_row_twice(method: str) -> None:
    found, settings = truth_of("mlp").case, METHODS[method]
    weights = torch.tensor([1.0, 2.0, 0.0, 1.0, 3.0, 1.0, 1.0, 2.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    ids = torch.arange(len(weights))
    again = torch.repeat_interleave(ids, weights.long())
    weighted = [TorchBatch(found.x[k::2], found.y[k::2], weights=weights[k::2], ids=ids[k::2]) for k in range(2)]
    twice = [TorchBatch(found.x[again], found.y[again], ids=ids[again])]
    scores = []
    for loader in (weighted, twice):
        influence = TorchComposableInfluence(found.model, found.loss, settings, damping=hw.relative(0.1)).fit(loader)
        assert influence.n_train == weights.sum()
        scores.append(influence.influences(found.x_query, found.y_query, found.x, found.y))
    assert_close(scores[0], scores[1], 1e4)
    rows = TorchBatch(found.x, found.y, weights=weights)
    counted = influence.block_mapper.interactions(TorchBatch(found.x_query, found.y_query), rows, "up")
    assert_close(sum(counted.values()), scores[1] * weights, 1e4)


# LoGra and LoRIF ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [LoGra(99), LoGra(99, "pca"), FactGrass(99), LoRif(99, rank=99)], ids=repr)
@pytest.mark.parametrize("case", ["mlp", "images", "language"])
def test_a_dimension_beyond_every_side_gives_the_empirical_fisher(case: str, method: ProjectedMethod) -> None:
    truth = truth_of(case)
    found = truth.case
    got, exact = (
        fitted(found, m, found.own_blocks, damping=hw.relative(0.1)) for m in (method, hw.Direct("empirical_fisher"))
    )
    assert got.absolute_damping == pytest.approx(exact.absolute_damping)
    rows = (found.x_query, found.y_query, found.x, found.y)
    assert_close(got.influences(*rows), exact.influences(*rows), 1e4)


@pytest.mark.parametrize("init", ["random", "pca"])
@pytest.mark.parametrize("case", ["images", "sentences"])
def test_lorif_at_full_rank_is_logra(case: str, init: str) -> None:
    found = truth_of(case).case
    rows = (found.x_query, found.y_query, found.x, found.y)
    full, plain = (
        fitted(found, m, "layer", damping=hw.relative(0.1)) for m in (LoRif(3, init, rank=3, kept=99), LoGra(3, init))
    )
    assert_close(full.influences(*rows), plain.influences(*rows), 1e4)
    cut = fitted(found, LoRif(3, init, rank=1), "layer", damping=hw.relative(0.1))
    assert (cut.influences(*rows) - plain.influences(*rows)).abs().max() > 1e-3 * plain.influences(*rows).abs().max()


@pytest.mark.parametrize("kept", [1, 4, 100])
def test_lorif_says_how_much_of_the_spectrum_it_keeps(kept: int) -> None:
    truth, whole = truth_of("images"), LoRif(3, rank=1)
    influence = fitted(truth.case, replace(whole, kept=kept), "full")
    values = np.linalg.eigvalsh(truth.core(whole, truth.names))
    operator = influence.block_mapper.operators["full"]
    assert operator.kept_rank == min(kept, len(values))
    assert operator.kept_mass == pytest.approx(values[-kept:].sum() / values.sum())


def test_lorif_stores_outer_products_of_its_rank() -> None:
    found = truth_of("images").case
    influence = fitted(found, LoRif(3, rank=2), "full")
    grads = influence.provider.grads(TorchBatch(found.x, found.y))["full"]
    projected = influence.block_mapper.operators["full"].projection
    stored = projected.stored(grads)
    assert max(part.positions or 1 for part in stored.parts) == 2
    assert_close(projected.apply_block(projected.seen(grads)).flat(), stored.flat(), 1e3)


# TRAK -----------------------------------------------------------------------------------------------------------------


def test_a_projection_as_wide_as_the_data_without_ridge_is_refused_and_names_both_numbers() -> None:
    found = truth_of("mlp").case
    for method, width in ((Trak(11), 11), (Trak(40), 40), (LoGra(4), 16 + 12)):
        with pytest.raises(SingularOperator, match=rf"zero ridge: {width} projected numbers for 11 rows"):
            fitted(found, method, "full", damping=0.0)
        fitted(found, method, "full")


def test_without_damping_and_narrower_than_the_data_trak_is_as_published() -> None:
    truth, method = truth_of("mlp"), Trak(6)
    found = truth.case
    expected, condition = truth.projected_scores(method, "full", {"full": 0.0})
    got = fitted(found, method, "full", damping=0.0).influences(found.x_query, found.y_query, found.x, found.y)
    assert_close(got, expected["full"], condition)


def test_a_measurement_takes_the_margins_place_for_queries() -> None:
    truth, method = truth_of("mlp"), Trak(7)
    found = truth.case

    def first_logit(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return output[..., 0].sum()

    asked = ProjectedTruth(replace(found, loss=first_logit))
    truth_with = ProjectedTruth(found)
    truth_with.__dict__["margins"] = (asked.query_grads, *truth.margins[1:])
    damping = truth.damping_of(method, "layer", 0.1)
    expected, condition = truth_with.projected_scores(method, "layer", damping)
    influence = fitted(found, method, "layer", damping=hw.relative(0.1), measurement=first_logit)
    assert influence.explained == "first_logit"
    assert fitted(found, method, "layer").explained == "margin"
    got = influence.influences(found.x_query, found.y_query, found.x, found.y)
    assert_close(got, sum(expected.values()), condition)


def test_several_models_share_the_mean_of_their_one_minus_p() -> None:
    truth, method = truth_of("mlp"), Trak(7)
    found, other = truth.case, copy.deepcopy(truth.case.model)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(-0.7)
    members = truth, ProjectedTruth(replace(found, model=other))
    doubt = sum(member.margins[2] for member in members) / 2
    expected, worst = 0.0, 1.0
    for member in members:
        damping = member.damping_of(method, "layer", 0.1)
        by_block, condition = member.projected_scores(method, "layer", damping)
        expected = expected + sum(by_block.values()) / member.margins[2] * doubt / 2
        worst = max(worst, condition)
    weights = [found.model.state_dict(), other.state_dict()]
    influence = fitted(found, method, "layer", damping=hw.relative(0.1), checkpoints=weights)
    rows = (found.x_query, found.y_query, found.x, found.y)
    assert_close(influence.influences(*rows), expected, worst)
    scores = influence.attribute(found.loader(3), [(found.x_query, found.y_query)]).values
    assert_close(scores, expected, worst)


def test_another_seed_is_another_projection_and_the_description_says_so() -> None:
    found = truth_of("mlp").case
    for method in (Trak(7), LoGra(2), LoRif(2), FactGrass(2)):
        one, other = (fitted(found, replace(method, seed=seed), "layer") for seed in (0, 1))
        rows = (found.x_query, found.y_query, found.x, found.y)
        assert (one.influences(*rows) - other.influences(*rows)).abs().max() > 1e-3 * one.influences(*rows).abs().max()
        assert one.method.describe() != other.method.describe()
        assert "projection_version=1" in one.method.describe()


def test_another_damping_needs_no_other_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    found = truth_of("mlp").case
    for method in (Trak(7), LoRif(3, rank=1, kept=4)):
        influence, fresh = (fitted(found, method, "layer", damping=hw.relative(d)) for d in (1.0, 0.01))
        with monkeypatch.context() as patch:
            patch.setattr(type(influence.provider), "fisher_grads", None)
            again = influence.with_damping(hw.relative(0.01))
        rows = (found.x_query, found.y_query, found.x, found.y)
        assert_close(again.influences(*rows), fresh.influences(*rows))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Trak(0),
        lambda: Trak(output="logit"),  # type: ignore[arg-type]
        lambda: Trak(projection="sparse"),  # type: ignore[arg-type]
        lambda: LoGra((2, 0)),
        lambda: LoGra(init="svd"),  # type: ignore[arg-type]
        lambda: LoRif(rank=0),
        lambda: LoRif(kept=0),
        lambda: FactGrass(2.0),  # type: ignore[arg-type]
        lambda: FactGrass(mask=0),
    ],
)
def test_settings_that_mean_nothing_are_refused(make: Any) -> None:
    with pytest.raises(InvalidSetting):
        make()


def test_a_sketch_that_leaves_nothing_but_rounding_is_refused() -> None:
    """The output-gradients of cross entropy sum to zero; where all go to one place with one sign, nothing is left."""
    model, x = nn.Linear(4, 2, bias=False).double(), torch.randn(9, 4, dtype=torch.float64)
    loader, tried = [(x, torch.arange(9) % 2)], set()
    for seed in range(8):
        influence = TorchComposableInfluence(model, nn.CrossEntropyLoss(), hw.FactGrass(dimension=(1, 4), seed=seed))
        try:
            scores = influence.fit(loader).influences(*loader[0])
            assert float(scores.abs().max()) < 1e3
            tried.add("kept")
        except InvalidSetting as error:
            assert "nothing but rounding" in str(error)
            tried.add("refused")
    assert tried == {"kept", "refused"}
