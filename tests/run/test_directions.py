"""Directions: scores over the lengths of what meets in them, against dense matrices in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import mlp, sentences, signals, split_rows
from truth import assert_close, fitted, truth_of

import headwater as hw
from headwater.errors import InvalidInput, InvalidSetting, NoDirection, RowsNotFitted
from headwater.methods.base import Method
from headwater.torch import TorchBatch, TorchComposableInfluence

METHODS = [
    hw.GradDot(),
    hw.Direct("ggn"),
    hw.Kfac("factored"),
    hw.Kfac(),
    hw.Ekfac(),
    hw.Cg(tolerance=1e-12),
    hw.Dual(),
    hw.DataInf(),
    hw.Arnoldi(rank=6, tolerance=1e-10),
    hw.Nystroem(rank=6),
    hw.TracIn(0.3),
]
PROJECTED = [hw.Trak(8), hw.LoGra(2), hw.Trak(None)]
SOLVED = 1e-6


def dense(name: str, method: Method, structure: Any, damping: Any) -> tuple[np.ndarray, np.ndarray]:
    """Scores and squared lengths of the case: raw [q, n], (train [n], query [q])."""
    import oracle

    truth = truth_of(name)
    query, train = truth.gradients(method, structure, False)
    raw, long, wide = 0.0, 0.0, 0.0
    for block, names in oracle.block_names(truth.case.model, structure).items():
        index, inverse = truth.index(names), truth.inverse(method, names, damping[block])
        raw = raw + query[:, index] @ inverse @ train[:, index].T
        long = long + np.einsum("nd,de,ne->n", train[:, index], inverse, train[:, index])
        wide = wide + np.einsum("nd,de,ne->n", query[:, index], inverse, query[:, index])
    return raw, (long, wide)


def queries(case: Any, size: int = 2) -> list[Any]:
    return split_rows(case.x_query, case.y_query, size)


@pytest.mark.parametrize("structure", ["full", "layer"])
@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_directions_equal_dense_ones_whatever_the_batches(method: Method, structure: str) -> None:
    case = mlp()
    truth = truth_of("mlp")
    blocks = truth.absolute(method, structure, 0.3)
    influence = fitted(case, method, structure, damping=None if isinstance(method, hw.GradDot) else blocks)
    raw, (long, wide) = dense("mlp", method, structure, blocks)
    relative = raw / np.sqrt(long)
    cosine = relative / np.sqrt(wide)[:, None]
    for train_size, query_size in ((4, 2), (1, 5)):
        train, asked = case.loader(train_size), queries(case, query_size)
        both = influence.attribute(train, asked, normalise="both", by_block=True)
        assert np.abs(both.values - cosine).max() < SOLVED and both.unit == "cosine"
        assert np.abs(sum(both.by_block.values()) - both.values).max() < 1e-12
        one = influence.attribute(train, asked, normalise="train")
        assert np.abs(one.values - relative).max() < SOLVED * np.abs(relative).max() and one.unit == "relative"
    ends = influence.top(case.loader(4), queries(case), 3, normalise="both")
    assert np.allclose(ends.helpful_scores, -np.sort(-cosine, axis=1)[:, :3], atol=SOLVED)
    assert "cosine" in ends.unit_in_words


@pytest.mark.parametrize("method", [hw.Ekfac(), hw.Kfac()], ids=repr)
@pytest.mark.parametrize("make", [sentences, signals])
def test_a_cosine_is_a_score_over_both_self_influences(make: Any, method: Method) -> None:
    case = make()
    influence = fitted(case, method, "layer", damping=hw.relative(0.3))
    plain = influence.attribute(case.loader(), queries(case)).values
    long = np.sqrt(influence.self_influence(case.loader()))
    with pytest.warns(RowsNotFitted):
        wide = np.sqrt(influence.self_influence(queries(case)))
    both = influence.attribute(case.loader(3), queries(case, 5), normalise="both").values
    assert_close(both, plain / long / wide[:, None], 1e4)
    assert np.abs(both).max() <= 1 + 1e-12


@pytest.mark.parametrize("method", PROJECTED, ids=repr)
def test_projected_rows_are_as_long_as_their_projection(method: Method) -> None:
    """A row on itself has the cosine 1, whatever stands between its gradient and its loss."""
    case = mlp()
    influence = fitted(case, method, "full")
    itself = influence.attribute(case.loader(), case.loader(3), normalise="both").values
    assert_close(np.diag(itself), np.ones(len(itself)), 1e4)
    assert np.abs(itself).max() < 1 + 1e-9 and np.abs(itself - itself.T).max() < 1e-9


def test_without_curvature_the_cosine_is_that_of_the_gradients() -> None:
    case = mlp()
    direction = fitted(case, hw.GradDot(), "layer").attribute(case.loader(), queries(case), normalise="both")
    assert_close(direction.values, fitted(case, hw.GradCos(), "layer").attribute(case.loader(), queries(case)).values)


def test_weights_of_rows_have_no_part_in_a_direction() -> None:
    case = mlp()
    weights = torch.linspace(0.5, 2.0, len(case.y), dtype=torch.float64)
    influence = fitted(case, hw.Direct("ggn"), "full", damping=0.3)
    weighted = [TorchBatch(case.x, case.y, weights=weights)]
    both = influence.attribute(weighted, queries(case), normalise="both").values
    assert_close(both, influence.attribute(case.loader(), queries(case), normalise="both").values, 1e4)


def test_a_row_without_a_gradient_scores_nothing_and_is_told() -> None:
    case = mlp()
    influence = fitted(case, hw.Direct("ggn"), "full", damping=0.3)
    weights = torch.ones(len(case.y), dtype=torch.float64)
    weights[3] = 0.0
    batch = [TorchBatch(case.x, case.y, weights=weights)]
    with pytest.warns(NoDirection, match=r"1 train row \(3\) have no direction"):
        scores = influence.attribute(batch, queries(case), normalise="both")
    assert (scores.values[:, 3] == 0).all() and (np.delete(scores.values, 3, axis=1) != 0).all()


def test_directions_in_a_folder_are_those_in_memory_and_another_run(tmp_path: Path) -> None:
    case = mlp()
    influence = fitted(case, hw.Ekfac(), "layer", damping=0.3)
    for normalise in ("both", "train"):
        folder = tmp_path / normalise
        kept = influence.attribute(case.loader(), queries(case), normalise=normalise, store=folder)
        again = influence.attribute(case.loader(4), queries(case, 3), normalise=normalise, store=folder)
        plain = influence.attribute(case.loader(), queries(case), normalise=normalise)
        assert_close(kept.values, plain.values, 1e3)
        assert (again.values == kept.values).all() and hw.Scores.open(folder).unit == plain.unit
        ends = influence.top(case.loader(), queries(case), 2, normalise=normalise, store=folder)
        assert ends.unit_in_words == plain.unit_in_words
    for other in ({}, {"normalise": "train"}):
        with pytest.raises(InvalidInput, match="unit"):
            influence.attribute(case.loader(), queries(case), store=tmp_path / "both", **other)


def test_kept_gradients_have_the_same_directions_and_kept_factors_one_side(tmp_path: Path) -> None:
    case = mlp()
    influence = fitted(case, hw.Direct("ggn"), "full", damping=0.3)
    kept = influence.gradients(case.loader(), store=tmp_path / "gradients")
    for normalise in ("both", "train"):
        expected = influence.attribute(case.loader(), queries(case), normalise=normalise).values
        found = influence.attribute(kept, queries(case), normalise=normalise).values
        assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()
    factors = influence.factors(queries(case), store=tmp_path / "factors")
    found = influence.attribute(case.loader(), factors, normalise="train").values
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()
    with pytest.raises(InvalidSetting, match="normalise='train', which ranks each query's rows alike"):
        influence.attribute(case.loader(), factors, normalise="both")


def test_queries_as_one_are_the_mean_of_their_directions_in_memory_and_in_a_folder(tmp_path: Path) -> None:
    case = mlp()
    influence = fitted(case, hw.Ekfac(), "layer", damping=0.3)
    expected = influence.attribute(case.loader(), queries(case), normalise="both").values.mean(axis=0)
    options: dict[str, Any] = {"normalise": "both", "queries_as": "mean"}
    for store in (None, tmp_path / "run"):
        found = influence.top(case.loader(), queries(case), 3, store=store, **options)
        assert_close(found.helpful_scores[0], -np.sort(-expected)[:3], 1e4)


def test_what_directions_cannot_say_is_refused() -> None:
    case = mlp()
    influence = fitted(case, hw.Direct("ggn"), "full", damping=0.3)
    train, asked = case.loader(), queries(case)
    refused: list[tuple[str, dict[str, Any]]] = [
        ("forecasts no removal", {"normalise": "both", "unit": "removal"}),
        ("normalise='both' gives; pass that", {"unit": "cosine"}),
        ("normalise is 'query'; expected", {"normalise": "query"}),
        ("mode='perturbation' about their inputs", {"normalise": "train", "mode": "perturbation"}),
    ]
    for message, options in refused:
        with pytest.raises(InvalidSetting, match=message):
            influence.attribute(train, asked, **options)
    for message, options in (
        ("queries_as='sum' adds sizes", {"queries_as": "sum"}),
        ("of='sum' adds sizes", {"groups": ["a"] * len(case.y)}),
    ):
        with pytest.raises(InvalidSetting, match=message):
            influence.top(train, asked, 1, normalise="both", **options)
    scores = influence.attribute(train, asked, normalise="both")
    groups = ["a", "b"] * 5 + ["a"]
    for add in (scores.sum, lambda: scores.group(groups)):
        with pytest.raises(InvalidSetting, match="add up to nothing"):
            add()
    assert scores.group(groups, "mean").shape == (5, 2) and scores.mean().unit == "cosine"


def test_an_inverse_that_is_not_positive_has_no_directions() -> None:
    case = mlp()
    influence = fitted(case, hw.Direct("hessian", allow_indefinite=True), "full", damping=1e-3)
    with pytest.raises(InvalidSetting, match="not known to be symmetric and positive"):
        influence.attribute(case.loader(), queries(case), normalise="both")


def test_directions_of_an_ensemble_are_over_all_its_models() -> None:
    case = mlp()
    one = {name: value.clone() for name, value in case.model.state_dict().items()}
    other = {name: value * 1.5 for name, value in one.items()}
    influence = TorchComposableInfluence(
        case.model, case.loss, hw.Direct("ggn"), damping=0.3, checkpoints=[one, other]
    ).fit(case.loader())
    itself = influence.attribute(case.loader(), case.loader(), normalise="both").values
    assert_close(np.diag(itself), np.ones(len(itself)), 1e4)


def test_a_damping_is_calibrated_for_directions_as_they_are_scored() -> None:
    """At each damping of the path, the LDS of the scores that it would have."""
    from headwater.evaluate import lds

    case = mlp()
    influence = fitted(case, hw.Direct("ggn"), "full")
    rng = np.random.default_rng(0)
    keep = rng.random((12, 11)) < 0.5
    keep[:, 0] |= ~keep.any(axis=1)
    outputs = rng.standard_normal((12, 1, 5))
    path = [hw.relative(factor) for factor in (0.1, 1.0, 10.0)]
    found = influence.calibrate(case.loader(), queries(case), (keep, outputs), dampings=path, normalise="both")
    expected = []
    for damping in path:
        scores = influence.with_damping(damping).attribute(case.loader(), queries(case), normalise="both")
        expected.append(lds(scores, keep, outputs).raw.value)
    assert np.allclose(found.calibration.measured, expected, atol=1e-9)
    assert any("normalise='both'" in note for note in found.calibration.notes)
    for options in ({"by_block": True}, {"bank": None}):
        given = {"bank": (keep, outputs), "normalise": "train", **options}
        with pytest.raises(InvalidSetting, match="give a bank, and leave by_block out"):
            influence.calibrate(case.loader(), queries(case), **given)


def test_a_page_of_directions_says_that_they_rank(tmp_path: Path) -> None:
    case = mlp()
    influence = fitted(case, hw.Ekfac(), "layer", damping=0.3)
    page = influence.report(case.loader(), queries(case), tmp_path / "page.html", normalise="both").read_text()
    assert "cosine of the query" in page and "Sums of directions forecast nothing" in page
    assert "The mean of a row" in page and "The sum of a row" not in page


def test_rows_kept_as_projections_have_their_lengths_there(tmp_path: Path) -> None:
    case = mlp()
    influence = fitted(case, hw.LoGra(2), "layer")
    kept = influence.gradients(case.loader(), store=tmp_path, form="projected")
    assert kept.identity["projection"]
    expected = influence.attribute(case.loader(), queries(case), normalise="both").values
    assert np.abs(influence.attribute(kept, queries(case), normalise="both").values - expected).max() < 1e-5


def test_an_estimator_and_a_function_of_jax_have_directions_too() -> None:
    import jax.numpy as jnp
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((30, 4)), rng.integers(2, size=30)
    train, asked = (x[:20], y[:20]), (x[20:], y[20:])
    estimator = hw.Influence(LogisticRegression(C=0.5).fit(*train))
    weights = {"w": jnp.asarray(rng.standard_normal((4, 2)), dtype=jnp.float32)}
    function = hw.Influence((lambda p, one: one @ p["w"], weights), "cross_entropy", hw.Direct("ggn"))
    cast = (lambda a: a, lambda a: a.astype(np.float32))
    for influence, as_own in zip((estimator, function), cast, strict=True):
        rows, others = ((as_own(part[0]), part[1]) for part in (train, asked))
        influence.fit(rows)
        plain, long = influence.attribute(rows, others).values, influence.self_influence(rows)
        with pytest.warns(RowsNotFitted):
            wide = influence.self_influence(others)
        both = influence.attribute(rows, others, normalise="both").values
        assert np.abs(both - plain / np.sqrt(np.outer(wide, long))).max() < 1e-4
