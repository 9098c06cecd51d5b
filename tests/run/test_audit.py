"""Claims about audits: the exact has no error, the bad is shown as bad, and bounds hold as often as they say."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import headwater as hw
from headwater.errors import InvalidInput, InvalidSetting, NonFiniteValue, NotFittedError, ShapeMismatch
from headwater.evaluate.audited import audited, lower_bound, overlap, upper_bound
from headwater.run import audit as home
from headwater.torch import TorchBatch, TorchComposableInfluence


def fitted(method, dtype=torch.float64, rows=37, queries=15, damping=None):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)
    x, y = torch.randn(rows + queries, 4, dtype=dtype), torch.randint(0, 3, (rows + queries,))
    train = list(zip(x[:rows].split(8), y[:rows].split(8), strict=True))
    query = list(zip(x[rows:].split(4), y[rows:].split(4), strict=True))
    return TorchComposableInfluence(model, nn.CrossEntropyLoss(), method, damping=damping).fit(train), train, query


# Figures --------------------------------------------------------------------------------------------------------------


def test_figures_by_hand():
    exact = np.array([[3.0, 0.0, -4.0, 1.0]])
    found = audited([[3.0, 0.0, -1.0, 5.0]], exact, k=1)
    assert found.relative_error == pytest.approx([5 / math.sqrt(26)])
    assert found.largest_error == pytest.approx([1.0])
    assert found.rank_correlation == pytest.approx([0.8])  # ranks 3 2 1 4 and 4 2 1 3
    assert found.overlap_helpful.tolist() == [0.0] and found.overlap_largest.tolist() == [0.0]
    two = audited([[3.0, 0.0, -1.0, 5.0]], exact, k=2)
    assert two.overlap_helpful.tolist() == [1.0] and two.overlap_largest.tolist() == [0.5]


def test_overlap_is_the_mean_over_all_orders_of_equal_scores():
    rng = np.random.default_rng(0)
    scores, exact = rng.integers(0, 4, (6, 9)).astype(float), rng.normal(size=(6, 9))
    for k in (1, 3, 9):
        found = np.zeros(6)
        for _ in range(4000):
            shuffled = scores + rng.uniform(0, 0.5, scores.shape)
            for q in range(6):
                best, truth = np.argsort(-shuffled[q])[:k], np.argsort(-exact[q])[:k]
                found[q] += len(set(best) & set(truth)) / k / 4000
        np.testing.assert_allclose(overlap(scores, exact, k), found, atol=0.03)


def test_rows_that_tie_exactly_at_the_end_of_the_top_are_all_in_it():
    assert overlap([[4.0, 3.0, 2.0, 1.0]], [[9.0, 5.0, 5.0, 5.0]], 2).tolist() == [1.0]
    assert overlap([[1.0, 2.0, 3.0, 4.0]], [[9.0, 5.0, 5.0, 0.0]], 2).tolist() == [0.5]


def test_nothing_off_nothing_is_no_error_and_something_off_nothing_is_infinite():
    found = audited([[0.0, 0.0], [1.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]], k=1)
    assert found.relative_error.tolist() == [0.0, math.inf] and found.largest_error.tolist() == [0.0, math.inf]
    assert np.isnan(found.rank_correlation).all() and "2 queries have no rank correlation" in str(found)


def test_a_query_without_rank_correlation_counts_as_the_worst():
    rng = np.random.default_rng(0)
    exact = rng.normal(size=(9, 6))
    scores = exact.copy()
    scores[3] = 1.0
    assert audited(scores, exact, k=2).rank_correlation_bound == -1.0


@pytest.mark.parametrize(
    ("scores", "exact", "options", "error", "said"),
    [
        (np.zeros((2, 3)), np.zeros((2, 4)), {}, ShapeMismatch, r"\(2, 4\)"),
        (np.zeros(3), np.zeros(3), {}, ShapeMismatch, r"\(3,\)"),
        (np.zeros((0, 3)), np.zeros((0, 3)), {}, InvalidInput, r"\(0, 3\)"),
        (np.full((2, 3), np.nan), np.zeros((2, 3)), {}, NonFiniteValue, "6 scores"),
        (np.zeros((2, 3)), np.diag([1.0, np.inf, 1.0])[:2], {}, NonFiniteValue, "1 exact scores.*query 1"),
        (np.zeros((2, 3)), np.zeros((2, 3)), {"k": 4}, InvalidSetting, "k is 4"),
        (np.zeros((2, 3)), np.zeros((2, 3)), {"level": 1.0}, InvalidSetting, "level is 1.0"),
    ],
)
def test_what_cannot_be_compared_is_refused(scores, exact, options, error, said):
    with pytest.raises(error, match=said):
        audited(scores, exact, **{"k": 1, **options})


# Bounds ---------------------------------------------------------------------------------------------------------------


def test_a_bound_is_the_order_statistic_that_the_level_asks_for():
    assert upper_bound(np.arange(9.0), 0.9) == 8.0  # ceil(10 * 0.9) = 9
    assert upper_bound(np.arange(8.0), 0.9) == math.inf
    assert upper_bound(np.arange(19.0), 0.9) == 17.0 and upper_bound(np.arange(20.0), 0.9) == 18.0
    assert upper_bound(np.arange(3.0), 0.5) == 1.0
    assert lower_bound(np.arange(9.0), 0.9) == 0.0 and lower_bound(np.arange(8.0), 0.9) == -math.inf
    with pytest.raises(NonFiniteValue, match="1 of 2"):
        upper_bound([1.0, np.nan], 0.9)


@pytest.mark.parametrize("trials", [300, pytest.param(2000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("level", [0.5, 0.8, 0.9])
def test_bounds_cover_a_fresh_query_as_often_as_they_say_and_not_much_more(level, trials):
    """m = 19: the chance is exactly ceil(20 level) / 20 for figures without ties."""
    rng, covered = np.random.default_rng(1), np.zeros((trials, 5))
    for trial in covered:
        exact = rng.standard_t(3, size=(20, 12))
        scores = exact + rng.exponential(size=(20, 1)) * rng.normal(size=(20, 12))
        drawn, fresh = (audited(scores[part], exact[part], k=4, level=level) for part in (slice(19), slice(19, 20)))
        trial[:] = [
            fresh.relative_error[0] <= drawn.relative_error_bound,
            fresh.largest_error[0] <= drawn.largest_error_bound,
            fresh.rank_correlation[0] >= drawn.rank_correlation_bound,
            fresh.overlap_helpful[0] >= drawn.overlap_helpful_bound,
            fresh.overlap_largest[0] >= drawn.overlap_largest_bound,
        ]
    share, noise = covered.mean(axis=0), 4 * math.sqrt(level * (1 - level) / trials)
    assert (share >= level - noise).all()
    assert share[:2] == pytest.approx(math.ceil(20 * level - 1e-9) / 20, abs=noise)


def test_few_queries_give_no_bound_and_say_how_many_would():
    rng = np.random.default_rng(0)
    exact = rng.normal(size=(8, 5))
    found = audited(exact + 0.1, exact, k=2, queries=50)
    assert found.relative_error_bound == math.inf and found.rank_correlation_bound == -math.inf
    assert found.needed == 9 and "at least 9 are needed" in str(found) and "none" in str(found)
    assert audited(exact, exact, k=2, queries=8).statement.startswith("All queries were audited")


# Audits of influence --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [hw.Direct(), hw.Cg(), hw.Dual(), hw.Direct("hessian", allow_indefinite=True)])
def test_exact_methods_have_no_error(method):
    influence, train, query = fitted(method, damping=0.5)
    found = influence.audit(train, query, queries=10, k=5)
    assert found.relative_error_bound < 1e-6 and found.largest_error_bound < 1e-6
    assert found.rank_correlation_bound > 0.9999
    assert found.overlap_helpful_bound == found.overlap_largest_bound == 1.0
    assert found.missed == 0 and found.audited == 10 and found.queries == 15 and found.train == 37


@pytest.mark.parametrize("method", [hw.Ekfac(), hw.Kfac()], ids=["ekfac", "kfac"])
def test_kronecker_factors_are_exact_for_a_linear_model_with_squared_loss(method):
    torch.manual_seed(0)
    model, x, y = nn.Linear(4, 3).double(), torch.randn(40, 4).double(), torch.randn(40, 3).double()
    influence = TorchComposableInfluence(model, nn.MSELoss(), method).fit([(x[:25], y[:25])])
    found = influence.audit([(x[:25], y[:25])], [(x[25:], y[25:])], queries=12)
    assert found.relative_error.max() < 1e-10 and found.overlap_largest.min() == 1.0


def test_figures_are_those_of_the_dense_matrices():
    influence, train, query = fitted(hw.Ekfac(), damping=hw.relative(0.05))
    found = influence.audit(train, query, queries=6, k=4, seed=3)
    mine, exact = np.zeros((15, 37)), np.zeros((15, 37))
    xq, yq, xt, yt = (torch.cat([pair[k] for pair in pairs]) for pairs in (query, train) for k in (0, 1))
    direct = influence.unfitted(method=hw.Direct()).fit(train)
    for name, damping in influence.absolute_damping.items():
        q, n = (influence.provider.grads(TorchBatch(*rows))[name].flat().numpy() for rows in ((xq, yq), (xt, yt)))
        matrix = direct.curvature[name].matrix.numpy()
        exact += q @ np.linalg.solve(matrix + damping * np.eye(len(matrix)), n.T)
        mine += influence.block_mapper.operators[name].apply(torch.tensor(q)).numpy() @ n.T
    chosen = found.query_ids
    assert len(set(chosen.tolist())) == 6 and (np.diff(chosen) > 0).all()
    error = np.linalg.norm(mine - exact, axis=1) / np.linalg.norm(exact, axis=1)
    np.testing.assert_allclose(found.relative_error, error[chosen], rtol=1e-8)
    largest = np.abs(mine - exact).max(axis=1) / np.abs(exact).max(axis=1)
    np.testing.assert_allclose(found.largest_error, largest[chosen], rtol=1e-8)
    assert error.min() > 0.01


def test_a_bad_approximation_is_shown_as_bad():
    good, train, query = fitted(hw.Ekfac())
    bad, _, _ = fitted(hw.LoGra(dimension=1))
    near, far = (influence.audit(train, query, queries=12, k=5) for influence in (good, bad))
    assert far.relative_error_bound > 0.5 > near.relative_error_bound
    assert far.rank_correlation_bound < 0.8 < near.rank_correlation_bound
    assert far.overlap_largest_bound < near.overlap_largest_bound
    assert f"at most {far.relative_error_bound:.3g}" in str(far)


def test_large_blocks_are_solved_by_conjugate_gradients_to_the_same(monkeypatch):
    influence, train, query = fitted(hw.Ekfac())
    dense = influence.audit(train, query, queries=9)
    monkeypatch.setattr(home, "DENSE", 10)
    solved = influence.audit(train, query, queries=9)
    assert "dense" in dense.reference and "conjugate gradients to 1e-08" in solved.reference
    assert solved.solves == 18 and solved.missed == 0 and 0 < solved.residual <= 1e-8
    np.testing.assert_allclose(solved.relative_error, dense.relative_error, rtol=1e-5)


def test_solves_that_miss_their_tolerance_are_said(monkeypatch):
    influence, train, query = fitted(hw.Ekfac(), dtype=torch.float32)
    monkeypatch.setattr(home, "DENSE", 10)
    found = influence.audit(train, query, queries=9, tolerance=1e-14)
    assert found.missed > 0 and f"{found.missed} of {found.solves} exact solves missed" in str(found)


def test_the_sample_depends_on_the_seed_alone():
    influence, train, query = fitted(hw.Ekfac())
    whole = [(torch.cat([x for x, _ in query]), torch.cat([y for _, y in query]))]
    first, again, other = (
        influence.audit(train, loader, queries=5, seed=seed) for loader, seed in ((query, 0), (whole, 0), (query, 1))
    )
    np.testing.assert_array_equal(first.query_ids, again.query_ids)
    np.testing.assert_allclose(first.relative_error, again.relative_error, rtol=1e-9)
    assert first.query_ids.tolist() != other.query_ids.tolist()


def test_ids_name_the_queries_and_more_than_there_are_means_all():
    influence, train, query = fitted(hw.Ekfac())
    named = [TorchBatch(*pair, ids=torch.arange(100 * k, 100 * k + len(pair[1]))) for k, pair in enumerate(query)]
    found = influence.audit(train, named, queries=99)
    assert found.query_ids.tolist() == [int(i) for batch in named for i in batch.ids]
    assert found.audited == found.queries == 15 and "All queries were audited" in str(found)


@pytest.mark.parametrize("method", [hw.GradDot(), hw.GradCos(), hw.TracIn()], ids=lambda m: type(m).__name__)
def test_methods_without_an_inverse_are_refused(method):
    influence, train, query = fitted(method)
    with pytest.raises(InvalidSetting, match=type(method).__name__):
        influence.audit(train, query)


@pytest.mark.parametrize(
    ("options", "said"),
    [({"queries": 0}, "queries is 0"), ({"k": 0}, "k is 0"), ({"level": 1.5}, "level is 1.5"),
     ({"tolerance": 0.0}, "tolerance is 0.0"), ({"k": 38}, "from 1 to 37")],
)  # fmt: skip
def test_settings_that_mean_nothing_are_refused(options, said):
    influence, train, query = fitted(hw.Ekfac())
    with pytest.raises(InvalidSetting, match=said):
        influence.audit(train, query, **options)


def test_an_audit_needs_the_rows_that_were_fitted():
    influence, train, query = fitted(hw.Ekfac())
    with pytest.raises(InvalidInput, match="8 rows, and 37 were fitted"):
        influence.audit(train[:1], query)


def test_an_audit_needs_a_fit():
    influence, train, query = fitted(hw.Ekfac())
    with pytest.raises(NotFittedError):
        influence.unfitted().audit(train, query)
