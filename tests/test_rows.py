"""Claims about passes: however rows are cut and merged, each visitor finds the same; a runner meets every pass."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import headwater as hw
from headwater import rows
from headwater.curvature.products import room_for_draws
from headwater.errors import BatchMismatch, InvalidInput, NonFiniteValue
from headwater.gradients.outer import Outer
from headwater.loaders.places import located
from headwater.rows import Each, Rows, Total, fold, serial, sweep
from headwater.torch import TorchBatch, TorchComposableInfluence

pytestmark = pytest.mark.sampled

torch.manual_seed(0)
X, Y = torch.randn(11, 4, dtype=torch.float64), torch.arange(11) % 3
MODEL = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).double()
CUTS = [slice(0, 3), slice(3, 4), slice(4, 9), slice(9, 11)]
TRAIN = [TorchBatch(X[cut], Y[cut], weights=1.0 + X[cut, 0] ** 2) for cut in CUTS]
QUERIES = [(X[:2] + 0.1, Y[:2]), (X[2:5] - 0.2, Y[2:5])]
METHODS = [
    hw.GradDot(),
    hw.GradCos(),
    hw.Direct(),
    hw.Direct(curvature="ggn"),
    hw.Dual(),
    hw.DataInf(),
    hw.Cg(curvature="ggn"),
    hw.BlockKrylov(curvature="ggn"),
    hw.Arnoldi(rank=4, curvature="ggn"),
    hw.Nystroem(rank=4, curvature="ggn"),
    hw.Lissa(curvature="ggn", steps=5, rows=4),
    hw.Kfac(),
    hw.Ekfac(),
    hw.LoGra(dimension=2),
    hw.Trak(dimension=8),
]


def pairwise(visitor, read, label):
    """Every batch by itself, and parts merged two by two: how several workers would."""
    return pairs_of(visitor, read())


def pairs_of(visitor, items):
    parts = [visitor.of(item) for item in items]
    while len(parts) > 1:
        pairs = [parts[k : k + 2] for k in range(0, len(parts), 2)]
        parts = [visitor.merge(*pair) if len(pair) == 2 else pair[0] for pair in pairs]
    return parts[0]


@pytest.fixture
def merged(monkeypatch):
    """Passes are made by `pairwise` from here on."""
    monkeypatch.setattr("headwater.rows.serial", pairwise)
    monkeypatch.setattr("headwater.curvature.products.fold", pairs_of)


def influence(method, damping=0.3):
    return TorchComposableInfluence(MODEL, nn.CrossEntropyLoss(), method, damping=damping).fit(TRAIN)


def numbers(fitted):
    """What a run finds: scores, each row's own, stationarity."""
    scores = fitted.attribute(TRAIN, QUERIES, by_block=True)
    seen = scores.diagnosis.stationarity
    slope = [] if seen is None else [seen.gradient, seen.noise]
    return [scores.values, *scores.by_block.values(), fitted.self_influence(TRAIN), np.array(slope), fitted.n_train]


@pytest.mark.filterwarnings("ignore::headwater.errors.NotConverged")  # few steps of LiSSA
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.describe())
def test_parts_of_the_rows_merge_to_what_one_pass_finds(method, request):
    expected = numbers(influence(method))
    request.getfixturevalue("merged")
    for found, wanted in zip(numbers(influence(method)), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-12)


def verbs(fitted):
    """What the other verbs find."""
    top = fitted.top(TRAIN, QUERIES, 3)
    audit = fitted.audit(TRAIN, QUERIES, queries=3, k=2)
    return [
        fitted.removal(TRAIN, QUERIES),
        fitted.removal(TRAIN, QUERIES, [[0, 3, 10], [4]]),
        top.helpful_scores,
        top.harmful_ids,
        audit.relative_error,
        audit.rank_correlation,
        fitted.diagnose(TRAIN).stationarity.ratio,
        fitted.verify(TRAIN, QUERIES, rows=2, queries=2).approximation.scores,
    ]


def test_verbs_find_the_same_of_merged_parts(request):
    expected = verbs(influence(hw.Direct(curvature="ggn")))
    request.getfixturevalue("merged")
    for found, wanted in zip(verbs(influence(hw.Direct(curvature="ggn"))), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-12)


def test_a_gram_matrix_in_groups_is_that_of_one(monkeypatch):
    """Where gradients do not fit into memory, each group of batches meets all batches in a pass of its own."""
    expected = influence(hw.Dual()).attribute(TRAIN, QUERIES).values
    for module in ("dual", "products"):
        monkeypatch.setattr(f"headwater.curvature.{module}.room_for_draws", lambda place: 0.0)
    np.testing.assert_allclose(influence(hw.Dual()).attribute(TRAIN, QUERIES).values, expected, rtol=1e-9)


def test_gradients_are_kept_in_an_eighth_of_what_is_free_unless_the_working_memory_is_bounded(monkeypatch):
    monkeypatch.setattr("headwater.curvature.products.available_memory", lambda: 8e12)
    assert room_for_draws("cpu") == 1e12
    assert room_for_draws("cuda:0") == 4 * 64 * 2**20
    with hw.working_memory(10**6):
        assert room_for_draws("cpu") == 4e6


def test_a_runner_meets_every_pass_over_its_rows():
    met, provider = [], influence(hw.GradDot()).provider

    def runner(visitor, read, label):
        met.append((label[0], label[2:], type(visitor).__name__))
        return serial(visitor, read, label)

    rows = Rows(provider, TRAIN, runner=runner)
    hw.Ekfac().fit(provider, rows, False)
    form = met[0][1]
    assert met == [("0", form, "_Factors"), ("1", form, "_Spectra")] and len(form) == 8


def test_two_visitors_of_a_pass_share_its_gradients():
    provider, calls = influence(hw.GradDot()).provider, []
    grads = provider.grads
    provider.grads = lambda *args, **options: calls.append(1) or grads(*args, **options)
    names = Each(lambda batch: batch.names) & Total(lambda batch: len(batch.batch))
    both = names & (Each(lambda batch: batch.grads(provider)) & Each(lambda batch: batch.grads(provider)))
    (found, rows), (one, other) = sweep(provider, TRAIN, both, "rows")
    assert np.concatenate(found).tolist() == list(range(11)) and rows == 11
    assert len(calls) == 4 and all(a is b for a, b in zip(one, other, strict=True))


def test_a_pass_without_rows_is_refused():
    with pytest.raises(BatchMismatch, match="no rows"):
        fold(Total(len), [])


# Batches that are joined, and cut ------------------------------------------------------------------------------------


def pieces(loader, few=64, tile=None, **options):
    provider = influence(hw.GradDot(), **options).provider
    rows.FEW, before = few, rows.FEW
    try:
        return sweep(provider, Rows(provider, loader, tile=tile), Each(lambda piece: piece), "rows")
    finally:
        rows.FEW = before


@pytest.mark.parametrize(
    ("few", "tile", "sizes"),
    [
        (64, None, [11]),
        (5, None, [4, 5, 2]),
        (4, None, [4, 5, 2]),
        (64, 4, [4, 4, 3]),
        (64, 6, [6, 5]),
        (1, 6, [3, 1, 2, 3, 2]),
        (64, 100, [11]),
        (3, 2, [2, 2, 2, 2, 2, 1]),
    ],
)
def test_small_batches_are_joined_and_none_crosses_a_tile(few, tile, sizes):
    found = pieces(TRAIN, few, tile)
    assert [len(piece.batch) for piece in found] == sizes
    assert [piece.start for piece in found] == np.cumsum([0, *sizes])[:-1].tolist()
    assert torch.equal(torch.cat([piece.batch.x for piece in found]), X)
    assert torch.equal(torch.cat([piece.batch.weights for piece in found]), 1.0 + X[:, 0] ** 2)
    whole = pieces([TorchBatch(X, Y, weights=1.0 + X[:, 0] ** 2)])[0].keys
    for name in ("content", "weighted"):
        np.testing.assert_array_equal(np.concatenate([getattr(p.keys, name) for p in found]), getattr(whole, name))


def test_joined_rows_keep_their_ids():
    (found,) = pieces([TorchBatch(X[cut], Y[cut], ids=[f"row {n}" for n in range(11)[cut]]) for cut in CUTS])
    assert found.names.tolist() == [f"row {n}" for n in range(11)]
    alone = pieces([TorchBatch(X, Y, ids=[f"row {n}" for n in range(11)])])[0].keys
    for name in ("ids", "shaped"):
        np.testing.assert_array_equal(getattr(found.keys, name), getattr(alone, name))


def test_batches_that_do_not_fit_together_stay_apart():
    mixed = [TorchBatch(X[:3], Y[:3]), TorchBatch(X[3:5], Y[3:5], ids=[1, 2]), TorchBatch(X[5:], Y[5:])]
    assert [len(piece.batch) for piece in pieces(mixed)] == [3, 2, 6]


def test_what_is_wrong_in_a_joined_batch_is_said_of_its_own_row(monkeypatch):
    monkeypatch.setattr(rows, "FEW", 64)
    bad = X.clone()
    bad[7, 2] = np.nan
    with pytest.raises(NonFiniteValue, match=r"Train rows, batch 2, row 3 \(row 7 of the loader\)"):
        influence(hw.Kfac()).fit([(bad[cut], Y[cut]) for cut in CUTS])
    with (
        located(),
        pytest.raises(InvalidInput, match=r"Train rows, batches 0 to 3 \(rows 0 to 10 of the loader\): ValueError: no"),
        located(),
    ):
        fitted = influence(hw.GradDot())
        sweep(fitted.provider, fitted.train_rows(TRAIN), Each(raise_no), "rows")


def raise_no(piece):
    raise ValueError("no")


@pytest.mark.filterwarnings("ignore::headwater.errors.NotConverged")  # few steps of LiSSA
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.describe())
def test_joined_batches_give_the_same_scores(method, monkeypatch):
    def scores():
        return influence(method).fit(TRAIN).attribute(TRAIN, QUERIES).values

    apart = scores()
    monkeypatch.setattr(rows, "FEW", 64)
    np.testing.assert_allclose(scores(), apart, rtol=1e-5, atol=1e-6 * abs(apart).max())


def test_gradients_of_many_positions_are_made_dense_once_for_scores_and_sums(monkeypatch):
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    x, y = torch.randn(12, 9, 4, dtype=torch.float64), torch.randn(12, 9, 3, dtype=torch.float64)

    def loss(output, target):
        return ((output - target) ** 2).sum((1, 2)).mean()

    made = TorchComposableInfluence(model, loss, hw.GradDot()).fit([(x, y)])
    expected = made.influences(x[:2], y[:2], x, y)
    train, queries = [(x[:6], y[:6]), (x[6:], y[6:])], [(x[:2], y[:2])]
    counted = []
    dense = Outer.dense
    monkeypatch.setattr(Outer, "dense", lambda self: counted.append(self.rows) or dense(self))
    scores = made.attribute(train, queries)
    # Each train row once, not again for the mean gradient of the diagnosis; the first ones are checked, too.
    assert counted.count(6) == 3
    np.testing.assert_allclose(scores.values, expected, rtol=1e-12)
    assert scores.diagnosis is not None
