"""Queries kept as few outer products."""

import numpy as np
import pytest
import torch

import headwater as hw
from headwater.gradients.algebra import Dense
from headwater.gradients.outer import Outer
from headwater.run import shortened
from headwater.run.queries import PairScorer
from headwater.run.shortened import Shortening
from headwater.torch import TorchComposableInfluence

rng = np.random.default_rng(0)
O, I = 90, 110  # noqa: E741


def falling(n: int, steepness: float, o: int = O, i: int = I) -> torch.Tensor:
    """Matrices whose singular values fall at this rate, each with other vectors."""
    u = np.linalg.qr(rng.normal(size=(n, o, min(o, i))))[0]
    v = np.linalg.qr(rng.normal(size=(n, i, min(o, i))))[0]
    return torch.tensor(u * np.exp(-steepness * np.arange(min(o, i))) @ v.transpose(0, 2, 1))


def least_rank(matrix: torch.Tensor, error: float) -> int:
    values = np.linalg.svd(matrix.numpy(), compute_uv=False) ** 2
    tails = np.r_[values[::-1].cumsum()[::-1], 0.0]
    return int(np.argmax(np.sqrt(tails / values.sum()) <= error))


@pytest.mark.parametrize("error", [0.3, 1e-2, 1e-4])
@pytest.mark.parametrize("steepness", [0.4, 0.8])
def test_what_is_lost_is_measured_and_at_most_what_is_asked_for(steepness: float, error: float) -> None:
    values = falling(5, steepness)
    found, lost = shortened._short(Dense(values), Shortening(error))
    assert isinstance(found, Outer)
    off = ((found.dense() - values) ** 2).sum((1, 2)).sqrt() / (values**2).sum((1, 2)).sqrt()
    assert lost <= error and float(off.max()) == pytest.approx(lost, rel=1e-6)
    # One more than the best approximation needs, at most: the range is found by random vectors.
    best = max(least_rank(matrix, error) for matrix in values)
    assert best <= found.positions <= best + 1


def test_a_query_has_its_own_rank_whatever_it_is_asked_with() -> None:
    values = torch.cat([falling(2, 0.9), falling(2, 0.15)])
    together, _ = shortened._short(Dense(values), Shortening(0.05))
    for k in range(4):
        alone, _ = shortened._short(Dense(values[k : k + 1]), Shortening(0.05))
        torch.testing.assert_close(together.take(slice(k, k + 1)).dense(), alone.dense(), rtol=0, atol=1e-12)


def test_parts_that_are_small_or_need_all_they_have_stay_as_they_are() -> None:
    small = Dense(falling(3, 0.5, 10, 20))
    assert shortened._short(small, Shortening(0.1)) == (small, 0.0)
    noise = Dense(torch.tensor(rng.normal(size=(3, O, I))))
    assert shortened._short(noise, Shortening(0.01)) == (noise, 0.0)
    single = Outer(torch.ones(2, 1, I), torch.ones(2, 1, O))
    assert shortened._short(single, Shortening(0.1)) == (single, 0.0)


def test_queries_that_are_all_zero_meet_rows_as_zero() -> None:
    found, lost = shortened._short(Dense(torch.zeros(2, O, I, dtype=torch.float64)), Shortening(0.1))
    scores = found.inner(Dense(falling(3, 0.5)))
    assert lost == 0.0 and scores.shape == (2, 3) and not scores.any()


def fitted() -> tuple[TorchComposableInfluence, list, list]:
    """Sequences of 24 positions through layers of 96 x 97 and 97 x 80."""

    class Sequence(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = torch.nn.Linear(96, 96), torch.nn.Linear(96, 80)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(torch.tanh(self.first(x))).mean(1)

    torch.manual_seed(0)
    model = Sequence().double()
    x, y = torch.randn(44, 24, 96).double() * torch.logspace(0, -2, 96).double(), torch.randint(80, (44,))
    train, queries = [(x[:9], y[:9]), (x[9:20], y[9:20])], [(x[20:33], y[20:33]), (x[33:], y[33:])]
    influence = TorchComposableInfluence(
        model, torch.nn.CrossEntropyLoss(), method=hw.Ekfac(fisher="empirical"), damping=hw.relative(0.3)
    )
    return influence.fit(train), train, queries


@pytest.mark.parametrize("error", [0.2, 0.02])
def test_scores_are_off_by_no_more_than_the_error_times_both_lengths(error: float) -> None:
    influence, train, queries = fitted()
    exact = influence.attribute(train, queries)
    found = influence.attribute(train, queries, query_error=error)
    factors = torch.cat([influence.influence_factors(x, y) for x, y in queries]).norm(dim=1)
    grads = [influence.provider.grads(influence.provider.as_batch(x, y)) for x, y in train]
    lengths = torch.cat([sum(block.squared_norms() for block in g.values()).sqrt() for g in grads])
    off = abs(np.asarray(found) - np.asarray(exact)) / np.outer(factors.numpy(), lengths.numpy())
    said = max(block.query_error for block in found.diagnosis.blocks.values())
    assert 0 < off.max() <= said <= error
    assert all(block.query_error == 0.0 for block in exact.diagnosis.blocks.values())
    assert any("of their length" in worry for worry in found.diagnosis.worries) == (error > 0.1)
    top = influence.top(train, queries, 3, query_error=error)
    np.testing.assert_allclose(top.helpful_scores, -np.sort(-np.asarray(found), axis=1)[:, :3])


def test_queries_take_a_fraction_of_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    influence, train, queries = fitted()
    held = []
    original = PairScorer.scores

    def counting(self, piece):
        held.append(sum(a.numel() for v in self.queries.left.values() for part in v.parts for a in part.arrays))
        return original(self, piece)

    monkeypatch.setattr(PairScorer, "scores", counting)
    influence.attribute(train, queries)
    whole = held[-1]
    influence.attribute(train, queries, query_error=0.2)
    assert held[-1] < whole / 3


def test_a_run_in_a_folder_says_the_bound_and_is_a_run_of_its_own(tmp_path) -> None:
    influence, train, queries = fitted()
    found = influence.attribute(train, queries, query_error=0.05, store=tmp_path / "run")
    np.testing.assert_allclose(found[:], np.asarray(influence.attribute(train, queries, query_error=0.05)))
    assert {block.query_error for block in found.diagnosis.blocks.values()} == {0.05}
    with pytest.raises(hw.errors.InvalidInput, match="query_error"):
        influence.attribute(train, queries, store=tmp_path / "run")


def test_a_rank_is_kept_to_and_what_it_loses_is_told() -> None:
    influence, train, queries = fitted()
    found = influence.attribute(train, queries, query_rank=3)
    exact = np.asarray(influence.attribute(train, queries))
    lost = {name: block.query_error for name, block in found.diagnosis.blocks.items()}
    assert all(0.1 < off < 1 for off in lost.values()) and len(found.diagnosis.worries) >= len(lost)
    assert 0.5 < np.corrcoef(np.asarray(found).ravel(), exact.ravel())[0, 1] < 1 - 1e-6
    values = falling(4, 0.4)
    kept, off = shortened._short(Dense(values), Shortening(rank=5))
    assert isinstance(kept, Outer) and kept.positions == 5
    best = torch.linalg.svdvals(values)[:, 5:].square().sum(1).sqrt() / values.square().sum((1, 2)).sqrt()
    assert off == pytest.approx(float(best.max()), rel=0.02)
    # With an error, too, no more than it needs.
    few, off = shortened._short(Dense(values), Shortening(0.5, rank=5))
    assert isinstance(few, Outer) and few.positions < 5 and off <= 0.5


def test_a_rank_alone_has_no_bound_and_is_refused_in_a_folder(tmp_path) -> None:
    influence, train, queries = fitted()
    with pytest.raises(hw.errors.InvalidSetting, match="query_rank"):
        influence.attribute(train, queries, query_rank=3, store=tmp_path / "run")


@pytest.mark.parametrize("rank", [0, -1, 2.0, True])
def test_a_rank_that_means_nothing_is_refused(rank: object) -> None:
    with pytest.raises(hw.errors.InvalidSetting, match="query_rank"):
        Shortening(rank=rank)  # type: ignore[arg-type]


@pytest.mark.parametrize("error", [0.0, 1.0, -0.1, 1e-7, "5%", True])
def test_an_error_that_means_nothing_is_refused(error: object) -> None:
    influence, train, queries = fitted()
    with pytest.raises(hw.errors.InvalidSetting, match="query_error"):
        influence.attribute(train, queries, query_error=error)


def test_query_error_is_refused_where_queries_are_met_whole() -> None:
    influence, train, queries = fitted()
    with pytest.raises(hw.errors.InvalidSetting, match="query_error"):
        influence.attribute(train, queries, query_error=0.1, mode="perturbation")
