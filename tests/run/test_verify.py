"""Claims about verifying: right scores pass, and every way of being wrong that we can think of fails."""

import copy
import dataclasses
import math
import warnings
from functools import cache

import numpy as np
import pytest
import torch
from torch import nn

import headwater as hw
from headwater import rows as row_module
from headwater.curvature.means import WeightedMean
from headwater.errors import BatchMismatch, InvalidInput, InvalidSetting, NotFittedError, StaleFit
from headwater.evaluate.audited import upper_bound
from headwater.evaluate.verification import (
    GRADIENTS,
    ORDER,
    PLAIN,
    REFIT,
    SIZES,
    Check,
)
from headwater.operators.algebra import IdentityOperator, ScaledOperator
from headwater.operators.structured import DenseOperator
from headwater.run import verify as home
from headwater.torch import TorchBatch, TorchComposableInfluence, TorchGradientProvider

RIGHT = [
    hw.Direct(),
    hw.Direct(curvature="fisher", fisher="sampled", seed=3),
    hw.Ekfac(),
    hw.Ekfac(rank=2, fisher="sampled"),
    hw.Ekfac(fisher="empirical"),
    hw.Kfac(damping_form="factored"),
    hw.Cg(),
    hw.Dual(),
    hw.LoGra(dimension=3),
    hw.LoRif(dimension=3, kept=4),
    hw.Trak(dimension=20),
    hw.DataInf(),
    hw.Nystroem(rank=5),
    hw.GradCos(),
    hw.Lissa(steps=5),
]
EXACT = ("distance from the exact inverse", "rank correlation with it", "error bound for other pairs")


def data(rows: int = 13, queries: int = 7, dtype: torch.dtype = torch.float32):
    """A model, batches of its train rows (the last one uneven), and of its queries."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)
    x, y = torch.randn(rows + queries, 4, dtype=dtype), torch.randint(0, 3, (rows + queries,))
    train = list(zip(x[:rows].split(5), y[:rows].split(5), strict=True))
    return model, train, [(x[rows:], y[rows:])]


def fitted(method=None, dtype=torch.float32, rows=13, damping=None, **options):
    model, train, query = data(rows, dtype=dtype)
    influence = TorchComposableInfluence(model, nn.CrossEntropyLoss(), method or hw.Ekfac(), damping=damping, **options)
    return influence.fit(train), train, query


@cache
def verified(method, dtype=torch.float32):
    """With three rows a query; for claims that only read what was found."""
    influence, train, query = fitted(method, dtype)
    return influence.verify(train, query, rows=3)


def failed(found) -> list[str]:
    return [check.name for check in found.checks if not check.passed]


# What is right passes -------------------------------------------------------------------------------------------------


def right_methods():
    """All; the fast ones: each in float32, every third in float64."""
    for k, method in enumerate(RIGHT):
        for dtype, fast in ((torch.float32, True), (torch.float64, k % 3 == 0)):
            name = f"{method.describe()[:28]}-{str(dtype)[6:]}"
            yield pytest.param(method, dtype, id=name, marks=() if fast else pytest.mark.slow)


@pytest.mark.parametrize(("method", "dtype"), list(right_methods()))
def test_right_methods_pass_every_check(method, dtype):
    found = verified(method, dtype)
    assert found.passed, str(found)
    assert all(found[name].figure is not None for name in (GRADIENTS, PLAIN, REFIT, SIZES, ORDER))
    assert found.largest_error <= (1e-8 if dtype is torch.float64 else 1e-3)


@pytest.mark.parametrize("fisher", ["auto", "sampled", "empirical"])
def test_ekfac_in_float32_is_that_of_float64_near_a_minimum_that_fits_every_row(fisher):
    """More units than rows, and labels learned by heart: curvature of all sizes, down to none."""
    torch.manual_seed(0)
    x, y = torch.randn(28, 12), torch.randint(0, 5, (28,))
    model = nn.Sequential(nn.Linear(12, 40), nn.ReLU(), nn.Linear(40, 5))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(30):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[:24]), y[:24]).backward()
        optimizer.step()
    train, query = [(x[:24], y[:24])], [(x[24:], y[24:])]
    method = hw.Ekfac(fisher=fisher)
    influence = TorchComposableInfluence(model, nn.CrossEntropyLoss(), method, damping=hw.relative(0.001)).fit(train)
    found = influence.verify(train, query, rows=3, queries=2)
    assert found.passed and found[REFIT].figure < 1e-3, str(found)


@pytest.mark.parametrize("method", [hw.Direct(), hw.Cg(), hw.Dual(), hw.Direct(curvature="empirical_fisher")])
def test_exact_methods_are_at_no_distance_from_the_exact_inverse(method):
    found = verified(method, torch.float64)
    assert found.approximation.relative_error < 1e-7
    assert found.approximation.rank_correlations.min() == 1.0


def test_the_distance_of_an_approximation_is_that_of_the_dense_matrices():
    influence, train, query = fitted(hw.Ekfac(), torch.float64, rows=21)
    found = influence.verify(train, query, rows=4)
    exact = influence.unfitted(method=hw.Direct(), damping=influence.absolute_damping).fit(train)
    whole, mine = (np.asarray(i.attribute(train, query)) for i in (exact, influence))
    approximation = found.approximation
    for scores, all_scores in ((approximation.exact, whole), (approximation.scores, mine)):
        nearest = np.abs(scores[..., None] - all_scores.reshape(-1)).min(axis=-1)
        assert nearest.max() < 1e-9 * np.abs(all_scores).max()
    assert 0.01 < approximation.relative_error < 1


def test_a_distance_fails_nothing_and_a_ranking_is_judged_in_words():
    found = verified(hw.Ekfac())
    distance, ranks = (found[name] for name in EXACT[:2])
    assert distance.allowed is None and "no size fails" in distance.verdict
    assert "ranks rows" in ranks.verdict and "alike from 0.9, differently below 0.6" in ranks.verdict
    scores = np.arange(12.0).reshape(1, 12)
    for exact, said in ((scores * 3, "alike"), (scores[:, [1, 3, 0, 2, 7, 4, 6, 5, 10, 8, 11, 9]], "alike")):
        assert home.Approximation("", scores, exact, np.zeros(12, int), False).in_words.endswith(said)
    backwards = home.Approximation("", scores, -scores, np.zeros(12, int), False)
    assert backwards.in_words == "ranks rows differently"


def test_large_blocks_are_compared_by_conjugate_gradients_and_give_the_same(monkeypatch):
    influence, train, query = fitted(hw.Ekfac(), torch.float64)
    dense = verified(hw.Ekfac(), torch.float64)
    monkeypatch.setattr(home, "DENSE", 10)
    solved = influence.verify(train, query, rows=3)
    assert "conjugate" in solved.approximation.reference and "dense" in dense.approximation.reference
    np.testing.assert_allclose(solved.approximation.exact, dense.approximation.exact, rtol=1e-5, atol=1e-7)


def test_ensembles_weights_ids_and_sampled_labels_pass():
    model, train, query = data()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[0].weight.mul_(1.3)
    start = np.cumsum([0, *(len(y) for _, y in train)])
    named = [
        TorchBatch(x, y, weights=torch.rand(len(y)) + 0.5, ids=torch.arange(s, s + len(y)))
        for (x, y), s in zip(train, start, strict=False)
    ]
    influence = TorchComposableInfluence(
        model, nn.CrossEntropyLoss(), hw.Ekfac(fisher="sampled"), checkpoints=[model, other]
    ).fit(named)
    found = influence.verify(named, query, rows=3)
    assert found.passed, str(found)
    assert found[REFIT].figure is not None


def test_rows_padded_to_other_lengths_pass():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))

    def loss(output, target):
        return ((output - target) ** 2).mean()

    train = [(torch.randn(5, t, 3), torch.randn(5, t, 2)) for t in (2, 4, 3)]
    influence = TorchComposableInfluence(model, loss, hw.Direct(curvature="empirical_fisher")).fit(train)
    assert influence.verify(train, train[:1], rows=2).passed


def test_losses_with_their_own_numbers_are_taken_to_float64_too():
    model, train, query = data()
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5]), reduction="sum")
    influence = TorchComposableInfluence(model, loss, hw.Direct()).fit(train)
    found = influence.verify(train, query, rows=3)
    assert found.passed and found[REFIT].figure is not None, str(found)
    assert loss.weight.dtype is torch.float32


def test_verifying_changes_nothing_of_the_users():
    influence, train, query = fitted()
    before = copy.deepcopy(influence.model.state_dict())
    scores, mapper = np.asarray(influence.attribute(train, query)), influence.block_mapper
    influence.verify(train, query, rows=3)
    assert influence.block_mapper is mapper and next(influence.model.parameters()).dtype is torch.float32
    for name, value in influence.model.state_dict().items():
        assert torch.equal(value, before[name])
    np.testing.assert_array_equal(np.asarray(influence.attribute(train, query)), scores)


def test_the_same_seed_takes_the_same_pairs_and_another_takes_others():
    influence, train, query = fitted()
    first, again, other = (influence.verify(train, query, rows=2, seed=seed).approximation for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.scores, again.scores)
    assert not np.array_equal(first.scores, other.scores)


def test_float32_keeps_small_eigenvalues_that_are_well_above_its_rounding():
    """Direct once took for rounding, in float32, what lay below D eps times the largest: a quarter."""
    size = 600
    spectrum = 10.0 ** -torch.linspace(0, 5, size, dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(0)).double())[0]
    matrix = (basis * spectrum) @ basis.T
    for damping in (float(spectrum.mean()), 1e-3 * float(spectrum.mean())):
        exact, single = (DenseOperator(m, psd=True).inverse(damping).matrix for m in (matrix, matrix.float()))
        assert float((single - exact).norm() / exact.norm()) < 1e-6 / damping


# What is wrong fails --------------------------------------------------------------------------------------------------


def test_gradients_of_one_layer_scaled_fail(monkeypatch):
    plain = TorchGradientProvider.grads

    def scaled(self, batch, **options):
        found = plain(self, batch, **options)
        if not self.plain:
            found["2"] = found["2"].weighted(torch.full((len(batch),), 1.01))
        return found

    monkeypatch.setattr(TorchGradientProvider, "grads", scaled)
    influence, train, query = fitted()
    found = influence.verify(train, query, rows=3)
    assert {GRADIENTS, PLAIN, REFIT} <= set(failed(found))
    assert not found[GRADIENTS].note  # it is not put down to rounding


def test_gradients_that_depend_on_the_batch_size_fail(monkeypatch):
    plain = TorchGradientProvider.grads

    def scaled(self, batch, **options):
        share = torch.full((len(batch),), 1 + 0.01 * len(batch))
        return type(found := plain(self, batch, **options))((n, v.weighted(share)) for n, v in found.items())

    monkeypatch.setattr(TorchGradientProvider, "grads", scaled)
    influence, train, query = fitted()
    assert {GRADIENTS, SIZES} <= set(failed(influence.verify(train, query, rows=3)))


def test_curvature_that_depends_on_the_batch_size_fails(monkeypatch):
    plain = TorchGradientProvider.fisher_grads

    def scaled(self, batch, *arguments, **options):
        share = torch.full((len(batch),), len(batch) ** 0.5)
        draws = plain(self, batch, *arguments, **options)
        return [type(d)((n, v.weighted(share.to(v.like.dtype))) for n, v in d.items()) for d in draws]

    monkeypatch.setattr(TorchGradientProvider, "fisher_grads", scaled)
    influence, train, query = fitted(damping=0.1)
    assert {REFIT, ORDER} <= set(failed(influence.verify(train, query, rows=3)))


@pytest.mark.parametrize("method", [hw.Ekfac(), hw.Direct(), hw.LoGra(dimension=3)], ids=lambda m: type(m).__name__)
def test_a_last_batch_that_was_dropped_fails(method):
    model, train, query = data()
    influence = TorchComposableInfluence(model, nn.CrossEntropyLoss(), method).fit(train[:-1])
    found = influence.verify(train, query, rows=3)
    assert {REFIT, ORDER, "rows of the fit missing"} <= set(failed(found))
    assert "the fit had 10, the loader has 13" in str(found)


def test_batches_that_drop_a_row_in_passing_fail(monkeypatch):
    def cut(provider, batch):
        yield batch.take(slice(0, max(1, len(batch.batch) - 1)))

    with monkeypatch.context() as patch:
        patch.setattr(row_module, "_pieces", cut)
        influence, train, query = fitted()
    assert {REFIT, ORDER} <= set(failed(influence.verify(train, query, rows=3)))


def test_means_of_batch_means_fail(monkeypatch):
    def add(self, weighted_sum, weight):
        weighted_sum = weighted_sum / weight
        self._total = weighted_sum if self._total is None else self._total + weighted_sum
        self.weight += 1.0

    monkeypatch.setattr(WeightedMean, "add", add)
    influence, train, query = fitted(hw.Direct())
    assert {REFIT, ORDER} <= set(failed(influence.verify(train, query, rows=3)))


@pytest.mark.parametrize("factor", [1.0, None], ids=["identity", "the inverse, off by a percent"])
def test_another_operator_fails(factor):
    influence, train, query = fitted()
    operators = influence.block_mapper.operators
    for name, operator in list(operators.items()):
        wrong = ScaledOperator(1.01, operator) if factor is None else IdentityOperator(operator.input_size) * factor
        operators[name] = wrong
    assert failed(influence.verify(train, query, rows=3)) == [REFIT, ORDER]


def test_a_forgotten_damping_fails():
    influence, train, query = fitted(damping=hw.relative(1.0))
    influence._mapper = influence.with_damping(hw.relative(0.5)).block_mapper
    assert {REFIT, ORDER} <= set(failed(influence.verify(train, query, rows=3)))


def test_solves_that_were_cut_short_fail():
    influence, train, query = fitted(hw.Cg(max_iterations=2, preconditioner=None), damping=hw.relative(0.01))
    found = influence.verify(train, query, rows=3)
    assert [name for name in failed(found) if name.startswith("solves missed")]


def test_a_tighter_tolerance_can_fail_what_float32_passes():
    influence, train, query = fitted()
    assert verified(hw.Ekfac()).passed
    assert not influence.verify(train, query, rows=3, tolerance=1e-12).passed


def test_figures_that_are_no_numbers_fail():
    assert not Check("scores", math.nan, 1.0).passed


# What cannot be checked is said ---------------------------------------------------------------------------------------


def test_of_more_rows_than_are_fitted_again_a_sample_is_and_that_is_said(monkeypatch):
    monkeypatch.setattr(home, "REFITTED", 0)
    influence, train, query = fitted(rows=41)
    found = influence.verify(train, query, rows=3)
    assert found.passed and str(found).count("both fits to 32 rows at random, of 41") == 2, str(found)
    assert found[REFIT].figure > 0 and found[ORDER].figure is not None and found[EXACT[0]].figure is not None


def test_what_is_wrong_fails_on_a_sample_of_the_rows_too(monkeypatch):
    plain = TorchGradientProvider.fisher_grads

    def scaled(self, batch, *arguments, **options):
        share = torch.full((len(batch),), len(batch) ** 0.5)
        draws = plain(self, batch, *arguments, **options)
        return [type(d)((n, v.weighted(share.to(v.like.dtype))) for n, v in d.items()) for d in draws]

    monkeypatch.setattr(home, "REFITTED", 0)
    monkeypatch.setattr(TorchGradientProvider, "fisher_grads", scaled)
    influence, train, query = fitted(rows=41, damping=0.1)
    assert ORDER in failed(influence.verify(train, query, rows=3))


@pytest.mark.parametrize("damping", [0.1, hw.relative(0.3)], ids=str)
@pytest.mark.parametrize("method", [hw.Direct(), hw.Ekfac(fisher="sampled"), hw.Cg(), hw.GradCos()], ids=repr)
def test_right_scores_pass_on_a_sample_of_the_rows(method, damping, monkeypatch):
    monkeypatch.setattr(home, "REFITTED", 0)
    influence, train, query = fitted(method, rows=41, damping=None if isinstance(method, hw.GradCos) else damping)
    found = influence.verify(train, query, rows=3)
    assert found.passed and found[REFIT].figure is not None and found[ORDER].figure is not None, str(found)


def test_a_verification_of_a_large_model_costs_no_more_for_more_rows(monkeypatch):
    """Rows that the Fisher information is taken of, over all fits that are made again: for 60 rows as for 240."""
    monkeypatch.setattr(home, "REFITTED", 0)
    monkeypatch.setattr(home, "EXACT_WORK", 0)
    plain, seen, totals = TorchGradientProvider.fisher_grads, [], []

    def counting(self, batch, *arguments, **options):
        seen.append(len(batch))
        return plain(self, batch, *arguments, **options)

    for rows in (60, 240):
        influence, train, query = fitted(rows=rows)
        with monkeypatch.context() as patch:
            patch.setattr(TorchGradientProvider, "fisher_grads", counting)
            found = influence.verify(train, query, rows=3)
        totals.append(sum(seen) - sum(totals))
        assert found.passed and found.approximation is None and "audit(train, query)" in str(found)
    assert totals[0] == totals[1] > 0


def test_a_provider_without_a_float64_copy_is_said(monkeypatch):
    monkeypatch.setattr(TorchGradientProvider, "in_float64", lambda self: None)
    influence, train, query = fitted()
    found = influence.verify(train, query, rows=3)
    assert found.passed and found.approximation is None
    assert [check.name for check in found.checks if check.figure is None] == [GRADIENTS, PLAIN, REFIT, *EXACT]
    assert found[SIZES].figure is not None and "TorchGradientProvider has no float64 copy" in str(found)


@pytest.mark.parametrize(("size", "said"), [(18.0, True), (1.0, False)])
def test_gradients_that_float32_rounds_away_are_said_to_be_that(size, said):
    torch.manual_seed(0)
    x, model = torch.randn(40, 4), nn.Linear(4, 2, bias=False)
    y = (x[:, 0] > 0).long()
    x[:, 0] += torch.sign(x[:, 0])  # separable: the losses fall to nothing as the weights grow
    with torch.no_grad():
        model.weight.copy_(size * torch.tensor([[-1.0, 0, 0, 0], [0, 0, 0, 0]]))
    influence = TorchComposableInfluence(model, nn.CrossEntropyLoss(), hw.Ekfac(), damping=1e-3).fit([(x, y)])
    found = influence.verify([(x, y)], [(x[:8], y[:8])], rows=8)[GRADIENTS]
    assert found.passed is not said and ("Convert model and data to float64" in found.note) is said


def test_small_losses_of_squares_explain_nothing(monkeypatch):
    plain = TorchGradientProvider.grads
    monkeypatch.setattr(
        TorchGradientProvider,
        "grads",
        lambda self, batch, **given: type(found := plain(self, batch, **given))(
            (name, value if self.plain else value.weighted(torch.full((len(batch),), 1.01)))
            for name, value in found.items()
        ),
    )
    torch.manual_seed(0)
    x, y = torch.randn(12, 3), 1e-3 * torch.randn(12, 1)
    influence = TorchComposableInfluence(nn.Linear(3, 1), nn.MSELoss(), hw.GradDot())
    with torch.no_grad():
        influence.provider.model.weight.mul_(1e-3)
        influence.provider.model.bias.mul_(1e-3)
    found = influence.fit([(x, y)]).verify([(x, y)], [(x[:3], y[:3])], rows=3)[GRADIENTS]
    assert not found.passed and not found.note


def test_a_model_that_does_not_run_in_float64_is_said():
    class Single(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x):
            return self.layer(x.float())

    _, train, query = data()
    influence = TorchComposableInfluence(Single(), nn.CrossEntropyLoss(), hw.Ekfac()).fit(train)
    found = influence.verify(train, query, rows=3)
    assert found.passed and "not checked (RuntimeError" in str(found)


def test_a_method_without_curvature_has_no_distance():
    assert verified(hw.GradDot()).approximation is None


def test_a_table_has_one_line_for_each_check():
    found = verified(hw.Cg())
    lines = str(found).splitlines()
    for check in found.checks:
        assert sum(line.startswith(f"{check.name}  ") for line in lines) == 1
    assert "All checks that were made passed." in lines[-1]


@pytest.mark.parametrize("wrong", [{"rows": 0}, {"queries": 1.5}, {"tolerance": 0.0}, {"tolerance": math.nan}])
def test_settings_that_mean_nothing_are_refused(wrong):
    influence, train, query = fitted()
    with pytest.raises(InvalidSetting, match=next(iter(wrong))):
        influence.verify(train, query, **wrong)


def test_what_cannot_be_verified_is_refused():
    influence, train, query = fitted()
    with pytest.raises(NotFittedError, match="fit"):
        influence.unfitted().verify(train, query)
    for loaders in (([], query), (train, [])):
        with pytest.raises(BatchMismatch, match="no rows"):
            influence.verify(*loaders)
    with pytest.raises(InvalidInput, match="only once"):
        influence.verify(iter(train), query)
    with torch.no_grad():
        influence.model[0].weight.add_(1.0)
    with pytest.raises(StaleFit):
        influence.verify(train, query)


# The bound for other pairs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("m, k", [(9, 9), (19, 18), (32, 30), (99, 90)])
def test_the_bound_is_the_order_statistic_of_split_conformal_prediction(m, k):
    errors = np.random.default_rng(0).permutation(np.arange(1.0, m + 1))
    assert upper_bound(errors, 0.9) == k


def test_eight_errors_are_too_few_for_a_bound():
    assert upper_bound(np.ones(8), 0.9) == math.inf


@pytest.mark.parametrize("heavy", [False, True])
def test_the_next_error_is_within_the_bound_nine_times_in_ten(heavy):
    rng, m, trials = np.random.default_rng(1), 32, 4000
    draws = rng.standard_cauchy((trials, m + 1)) if heavy else rng.random((trials, m + 1))
    inside = np.mean([abs(row[-1]) <= upper_bound(np.abs(row[:-1]), 0.9) for row in draws])
    expected = 30 / 33
    assert abs(inside - expected) < 4 * math.sqrt(expected * (1 - expected) / trials)


@pytest.mark.slow
def test_the_bound_of_a_verification_holds_for_pairs_that_were_not_sampled():
    """Over seeds, at least 0.9 of the errors of sampled queries on other rows; three standard errors of slack."""
    model, train, query = data(rows=60, queries=12, dtype=torch.float64)
    influence = TorchComposableInfluence(model, nn.CrossEntropyLoss(), hw.Ekfac()).fit(train)
    exact = influence.unfitted(method=hw.Direct(), damping=influence.absolute_damping).fit(train)
    whole, mine = (np.asarray(i.attribute(train, query)) for i in (exact, influence))
    errors, shares = np.abs(whole - mine), []
    quick = pytest.MonkeyPatch()
    quick.setattr(home, "REFITTED", 0)
    for seed in range(4):
        found = influence.verify(train, query, rows=8, queries=4, seed=seed).approximation
        place = [np.abs(mine - row[0]).argmin() // 60 for row in found.scores]
        taken = [np.abs(mine[place[0]] - score).argmin() for score in found.scores[0]]
        assert len(set(place)) == 4 and len(set(taken)) == 32
        shares.append(np.mean(np.delete(errors[place], taken, axis=1) <= found.bound))
    quick.undo()
    assert np.mean(shares) >= 0.9 - 3 * np.std(shares, ddof=1) / math.sqrt(len(shares))
    assert np.mean(shares) < 0.99


def test_the_bound_is_not_given_where_it_says_nothing():
    influence, train, query = fitted()
    assert "too few" in influence.verify(train, query, rows=2).checks[-1].verdict
    assert "no train row is left" in influence.verify(train, query, rows=4).checks[-1].verdict


def test_warnings_of_solves_are_in_the_table_and_nowhere_else():
    influence, train, query = fitted(hw.BlockKrylov(max_products=2, preconditioner=None), damping=hw.relative(0.01))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = influence.verify(train, query, rows=3)
    assert "missed their tolerance" in str(found) and not found.passed


def test_a_verification_is_a_value():
    found = verified(hw.Ekfac())
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.seed = 3
