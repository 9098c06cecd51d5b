"""Claims about kept factors, and about queries and groups that are asked together."""

from __future__ import annotations

import weakref

import numpy as np
import pytest
import torch
from test_kept import PLAIN, QUERIES, TOLERANCE, TRAIN, X, assert_near, influence, small_tiles  # noqa: F401

import headwater as hw
from headwater.errors import InvalidInput, InvalidSetting, NotSaved
from headwater.torch import TorchBatch

METHODS = [
    hw.Ekfac(),
    hw.LoGra(dimension=2),
    *(
        pytest.param(m, marks=pytest.mark.slow)
        for m in (hw.Direct(), hw.Cg(tolerance=1e-6), hw.Dual(), hw.LoRif(dimension=3))
    ),
]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_kept_factors_stand_for_the_queries(method, tmp_path, monkeypatch):
    fitted = influence(method).fit(TRAIN)
    truth, ends = fitted.attribute(TRAIN, QUERIES, by_block=True), fitted.top(TRAIN, QUERIES, 3)
    x, y = X[:6], TRAIN[0].y.repeat(2)[:6]
    queries = torch.cat([batch[0] for batch in QUERIES]), torch.cat([batch[1] for batch in QUERIES])
    perturbed = fitted.influences(*queries, x, y, mode="perturbation").numpy()
    found = fitted.factors(QUERIES, store=tmp_path / "factors")
    rows = fitted.gradients(TRAIN, store=tmp_path / "rows")
    asked, grads = [], type(fitted.source).grads
    monkeypatch.setattr(
        type(fitted.source), "grads", lambda self, batch, **o: asked.append(o) or grads(self, batch, **o)
    )
    scores = fitted.attribute(TRAIN, hw.KeptFactors.open(tmp_path / "factors"), by_block=True)
    assert not any(options.get("query") for options in asked)
    for name, share in truth.by_block.items():
        assert_near(scores.by_block[name], share)
    np.testing.assert_array_equal(scores.query_ids, truth.query_ids)
    np.testing.assert_array_equal(fitted.top(TRAIN, found, 3).helpful_ids, ends.helpful_ids)
    asked.clear()
    assert_near(fitted.attribute(rows, found).values, truth.values)
    assert not asked  # neither rows nor queries went through the model
    assert_near(found.influences(fitted, x, y).numpy(), fitted.influences(*queries, x, y).numpy())
    assert_near(found.influences(fitted, x, y, mode="perturbation").numpy(), perturbed)
    assert len(found) == 5 and found.ids.tolist() == list(range(5)) and found.check() == []


def test_factors_of_another_fit_or_damping_are_refused(tmp_path):
    fitted = influence(hw.Kfac()).fit(PLAIN)
    found = fitted.factors(QUERIES, store=tmp_path / "factors")
    with pytest.raises(InvalidInput, match="damping was"):
        fitted.with_damping(hw.relative(0.5)).attribute(PLAIN, found)
    with pytest.raises(InvalidInput, match="method was"):
        influence(hw.Ekfac()).fit(PLAIN).attribute(PLAIN, found)
    with pytest.raises(InvalidInput, match="n_train was"):
        influence(hw.Kfac()).fit(PLAIN[:5]).attribute(PLAIN, found)
    with pytest.raises(InvalidInput, match="needs the rows themselves"):
        fitted.removal(PLAIN, found)
    with pytest.raises(NotSaved, match="factors of query rows"):
        hw.KeptGradients.open(tmp_path / "factors")
    whole = [(torch.cat([batch[0] for batch in PLAIN]), torch.cat([batch[1] for batch in PLAIN]))]
    again = influence(hw.Kfac()).fit(whole)  # the same rows in other batches: the last digits differ
    assert_near(again.attribute(PLAIN, found).values, fitted.attribute(PLAIN, QUERIES).values)


def test_factors_go_on_where_they_stopped(tmp_path, monkeypatch):
    fitted = influence(hw.Kfac()).fit(PLAIN)
    truth = fitted.attribute(PLAIN, PLAIN).values
    fitted.factors(PLAIN, store=tmp_path / "factors", worker=(1, 2))
    file = next((tmp_path / "factors").glob("tiles-0/*"))
    file.unlink()
    found = fitted.factors(PLAIN, store=tmp_path / "factors", dtype="float32")
    assert_near(fitted.attribute(PLAIN, found).values, truth)
    small = fitted.factors(PLAIN, store=tmp_path / "small", dtype="int8")
    assert_near(fitted.attribute(PLAIN, small).values, truth, "int8")
    assert TOLERANCE["int8"] < 0.1


def test_kept_factors_are_read_span_by_span(tmp_path):
    """A budget cuts the queries: those of one span are in memory at a time."""
    fitted = influence(hw.Kfac()).fit(PLAIN)
    found = fitted.factors(PLAIN, store=tmp_path / "factors")  # tiles of 16, 16 and 8
    asked = found.query_rows(fitted).asked()
    whole = {name: value.flat().numpy() for name, value in asked.ready.left.items()}
    assert {len(values) for values in whole.values()} == {40}
    held = []
    for number, part in enumerate(asked.spans(6)):
        for name, value in part.ready.left.items():
            np.testing.assert_array_equal(value.flat().numpy(), whole[name][6 * number : 6 * number + 6])
        assert part.ready.left is part.ready.left  # read once
        held.append([weakref.ref(value) for value in part.ready.left.values()])
        del value
        assert not any(reference() for earlier in held[:-1] for reference in earlier)
    planned = fitted.attribute(PLAIN, found, memory="8GiB").values
    assert_near(planned, fitted.attribute(PLAIN, PLAIN).values)


# Queries and groups together ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method",
    [hw.Kfac(), *(pytest.param(m, marks=pytest.mark.slow) for m in (hw.LoGra(dimension=2), hw.Dual()))],
    ids=lambda m: type(m).__name__,
)
@pytest.mark.parametrize("how", ["mean", "sum"])
def test_queries_as_one_have_the_scores_of_all(method, how, tmp_path):
    fitted = influence(method).fit(PLAIN)
    scores = fitted.attribute(PLAIN, QUERIES).values
    truth = getattr(scores, how)(axis=0)
    order = np.argsort(-truth, kind="stable")[:4]
    for train in (PLAIN, fitted.gradients(PLAIN, store=tmp_path / "kept", form="dense")):
        found = fitted.top(train, QUERIES, 4, queries_as=how)
        assert found.query_ids.tolist() == [how]
        assert found.helpful_ids[0].tolist() == order.tolist()
        np.testing.assert_allclose(found.helpful_scores[0], truth[order], rtol=1e-4)


def test_groups_are_ranked_over_a_loader_and_over_kept_rows(tmp_path):
    fitted = influence(hw.Ekfac()).fit(TRAIN)
    scores = fitted.attribute(TRAIN, QUERIES).values
    labels = np.arange(40) % 7
    truth = np.stack([scores[:, labels == k].sum(1) for k in range(7)], axis=1)
    kept = fitted.gradients(TRAIN, store=tmp_path / "kept")
    for train in (TRAIN, kept):
        found = fitted.top(train, QUERIES, 3, groups=labels)
        np.testing.assert_array_equal(found.helpful_ids, np.argsort(-truth, axis=1)[:, :3])
        np.testing.assert_allclose(found.helpful_scores, -np.sort(-truth, axis=1)[:, :3], rtol=1e-4, atol=1e-5)
    kept.delete(range(0, 40, 7))
    means = fitted.top(kept, QUERIES, 9, groups=dict(enumerate(labels.tolist())), of="mean")
    assert sorted(means.helpful_ids[0].tolist()) == [1, 2, 3, 4, 5, 6]
    with pytest.raises(InvalidInput, match="labels"):
        fitted.top(TRAIN, QUERIES, 3, groups=labels[:-1])
    with pytest.raises(InvalidSetting, match="'all'"):
        fitted.top(TRAIN, QUERIES, 3, queries_as="all")


def test_one_folder_of_scores_serves_all_rankings(tmp_path):
    fitted = influence(hw.Kfac()).fit(PLAIN)
    for options in ({}, {"queries_as": "mean"}, {"queries_as": "sum", "groups": np.arange(40) // 7, "of": "mean"}):
        kept, plain = (fitted.top(PLAIN, QUERIES, 2, **options, **o) for o in ({"store": tmp_path / "run"}, {}))
        np.testing.assert_array_equal(kept.helpful_ids, plain.helpful_ids)
        np.testing.assert_allclose(kept.harmful_scores, plain.harmful_scores, rtol=1e-4)
        np.testing.assert_array_equal(kept.query_ids, plain.query_ids)
    named = [TorchBatch(x, y, ids=torch.arange(len(y)) + 10 * k) for k, (x, y) in enumerate(QUERIES)]
    assert fitted.top(PLAIN, named, 2).query_ids.tolist() == [0, 1, 2, 10, 11]
