"""Attribution from a bank: each estimate against its plain definition, its error bars against what they stand for."""

from itertools import product

import numpy as np
import pytest
from sklearn.linear_model import Lasso

import headwater as hw
from headwater.errors import InvalidInput, InvalidSetting, NonFiniteValue, ShapeMismatch
from headwater.evaluate import Bank, Plan, lds, plan_subsets
from headwater.evaluate.datamodels import RIDGE_PATH, banzhaf, lasso, ridge

RNG = np.random.default_rng(0)


def subsets(m, n, seed=0, alpha=0.5):
    return plan_subsets(n, subsets=m, alpha=alpha, repeated=0, seed=seed).keep


def linear(keep, effects, noise, seed=1):
    """Outputs of a datamodel: positive effects lower them. [m, q]"""
    values = -keep.astype(float) @ effects.T
    return values + noise * np.random.default_rng(seed).standard_normal(values.shape)


EFFECTS = RNG.standard_normal((3, 12))


def test_banzhaf_over_all_subsets_is_the_banzhaf_value():
    """The mean over all subsets of the other rows of what the row adds; here, of a game that is not additive."""
    every = np.array(list(product([False, True], repeat=5)))
    game = {mask.tobytes(): np.array([mask.sum() ** 2, float(mask[0] & mask[1]) - mask[2]]) for mask in every}
    outputs = np.stack([game[mask.tobytes()] for mask in every])
    expected = np.zeros((2, 5))
    for row in range(5):
        for mask in every[~every[:, row]]:
            with_it = mask.copy()
            with_it[row] = True
            expected[:, row] += (game[mask.tobytes()] - game[with_it.tobytes()]) / 16
    np.testing.assert_allclose(banzhaf(every, outputs).scores, expected, atol=1e-12)


def test_banzhaf_and_its_error_are_those_of_two_means():
    keep = subsets(30, 12)
    outputs = linear(keep, EFFECTS, 0.5) + 1e6  # a constant costs no digits
    found = banzhaf(keep, outputs)
    for query, row in ((0, 0), (2, 7)):
        inside, outside = outputs[keep[:, row], query], outputs[~keep[:, row], query]
        np.testing.assert_allclose(found.scores[query, row], outside.mean() - inside.mean(), atol=1e-8)
        error = np.sqrt(inside.var(ddof=1) / len(inside) + outside.var(ddof=1) / len(outside))
        np.testing.assert_allclose(found.errors[query, row], error, rtol=1e-7)


def dense_ridge(keep, outputs, penalty, amount=None):
    """Coefficients [n, q] and constants [q] from the normal equations; and the absolute penalty."""
    masks = keep - keep.mean(axis=0)
    gram = masks.T @ masks
    amount = penalty * np.trace(gram) / len(keep) if amount is None else amount
    found = np.linalg.solve(gram + amount * np.eye(gram.shape[0]), masks.T @ (outputs - outputs.mean(axis=0)))
    return found, outputs.mean(axis=0) - keep.mean(axis=0) @ found, amount


@pytest.mark.parametrize(("m", "alpha"), [(30, 0.5), (9, 0.25)])  # more subsets than rows, and fewer
def test_ridge_is_the_normal_equations_and_its_errors_are_refits_without_each_subset(m, alpha):
    keep = subsets(m, 12, alpha=alpha)
    outputs = linear(keep, EFFECTS, 0.5)
    found = ridge(keep, outputs, 0.3)
    expected, _, amount = dense_ridge(keep, outputs, 0.3)
    np.testing.assert_allclose(found.scores, -expected.T, atol=1e-10)
    others = [np.delete(np.arange(m), k) for k in range(m)]
    moved = np.stack([dense_ridge(keep[o], outputs[o], None, amount)[0] for o in others])
    variance = ((moved - moved.mean(axis=0)) ** 2).sum(axis=0) * (m - 1) / m
    np.testing.assert_allclose(found.errors, np.sqrt(variance).T, rtol=1e-7)


def test_a_ridge_penalty_is_the_one_that_forecasts_subsets_left_out_best():
    keep = subsets(20, 12)
    outputs = linear(keep, EFFECTS, np.array([0.1, 2.0, 8.0]))
    found = ridge(keep, outputs)
    errors = np.zeros((len(RIDGE_PATH), 3))
    for k, penalty in enumerate(RIDGE_PATH):
        amount = dense_ridge(keep, outputs, penalty)[2]
        for subset in range(20):
            others = np.delete(np.arange(20), subset)
            slopes, constant, _ = dense_ridge(keep[others], outputs[others], None, amount)
            errors[k] += (outputs[subset] - constant - keep[subset] @ slopes) ** 2
    np.testing.assert_allclose(found.penalties, RIDGE_PATH[errors.argmin(axis=0)])
    plain = sum((outputs[k] - np.delete(outputs, k, axis=0).mean(axis=0)) ** 2 for k in range(20))
    np.testing.assert_allclose(found.explained, 1 - errors.min(axis=0) / plain, atol=1e-9)
    assert found.penalties[0] < found.penalties[2] and found.explained[0] > 0.9


@pytest.mark.parametrize("m", [40, 10])
def test_lasso_is_that_of_scikit_learn(m):
    keep = subsets(m, 12)
    effects = EFFECTS * (np.arange(12) < 4)
    outputs = linear(keep, effects, 0.3)
    found = lasso(keep, outputs, 0.1)
    masks = keep - keep.mean(axis=0)
    for query in range(3):
        penalty = 0.1 * np.abs(masks.T @ (outputs[:, query] - outputs[:, query].mean())).max() / m
        expected = Lasso(alpha=penalty, tol=1e-12, max_iter=100_000).fit(keep.astype(float), outputs[:, query]).coef_
        # Where there are fewer subsets than rows, and one size, the minimum is a set: what it forecasts is one.
        np.testing.assert_allclose(masks @ -found.scores[query], masks @ expected, atol=1e-5)
        if m > 12:
            shift = (-found.scores[query] - expected).mean()
            np.testing.assert_allclose(-found.scores[query] - expected, shift, atol=1e-4)
    assert (found.errors >= 0).all() and found.errors.max() > 0


def test_a_chosen_lasso_finds_the_few_rows_that_matter():
    keep = np.random.default_rng(3).random((80, 40)) < 0.5
    effects = np.zeros((2, 40))
    effects[0, [3, 17]], effects[1, 8] = (1.0, -1.0), 1.0
    found = lasso(keep, linear(keep, effects, 0.1))
    assert np.abs(found.scores - effects).max() < 0.15 and (found.explained > 0.9).all()
    assert (found.scores == 0).mean() > 0.4


@pytest.mark.parametrize("estimate", [banzhaf, lambda k, o: ridge(k, o, 0.05), lambda k, o: lasso(k, o, 0.02)])
def test_error_bars_are_how_far_another_bank_is_off(estimate):
    """Over banks of other subsets and other noise, estimates scatter by about their standard errors."""
    found = [estimate(keep, linear(keep, EFFECTS, 1.0, seed)) for seed in range(24) for keep in [subsets(60, 12, seed)]]
    scatter = np.std([one.scores for one in found], axis=0, ddof=1)
    claimed = np.mean([one.errors for one in found], axis=0)
    assert 0.8 < np.median(scatter / claimed) < 1.25


def test_rows_and_outputs_that_say_nothing_are_refused():
    keep = subsets(8, 6)
    outputs = linear(keep, EFFECTS[:, :6], 0.1)
    always = keep.copy()
    always[:, 2] = True
    with pytest.raises(InvalidInput, match="Row 2 is in 8 of 8 subsets"):
        banzhaf(always, outputs)
    assert (ridge(always, outputs).scores[:, 2] == 0).all()
    with pytest.raises(ShapeMismatch, match=r"The outputs are \(8, 1, 3\)"):
        ridge(keep, outputs[:, None])
    with pytest.raises(InvalidInput, match="at least 4 subsets"):
        ridge(keep[:3], outputs[:3])
    with pytest.raises(InvalidInput, match="keep the same rows"):
        lasso(keep[[0] * 8], outputs)
    with pytest.raises(NonFiniteValue, match="The output of query 1 on subset 2"):
        ridge(keep, np.where(np.arange(24).reshape(8, 3) == 7, np.nan, outputs))
    for penalty in (0, -1.0, "small"):
        with pytest.raises(InvalidSetting, match="penalty is"):
            ridge(keep, outputs, penalty)
    flat = ridge(keep, np.ones((8, 2)))
    assert (flat.scores == 0).all() and (flat.explained == 0).all()


# Banks ----------------------------------------------------------------------------------------------------------------


def filled(path, keep, outputs, runs=1):
    seeds = np.arange(len(keep) * runs).reshape(len(keep), runs)
    bank = Bank(path, Plan(keep, seeds), outputs.shape[1], {"made": "up"})
    return bank.fill(lambda rows, seed: outputs[seed // runs])


@pytest.mark.parametrize("method", ["banzhaf", "ridge", "lasso"])
def test_a_bank_is_an_attribution_like_any_other(tmp_path, method):
    keep = subsets(60, 12)
    bank = filled(tmp_path / "bank", keep, linear(keep, EFFECTS, 0.2))
    scores = bank.attribution(method, subsets=range(40))
    assert isinstance(scores, hw.Scores) and scores.unit == "replacement" and scores.n_train == 12
    assert scores.method.startswith(f"{method} of 40 retrained models, each of 50% of the rows")
    assert "another train row, at random, takes the place" in scores.unit_in_words
    # One size of subsets: what all rows do alike is not to be seen.
    assert np.corrcoef(scores.values[1], EFFECTS[1])[0, 1] > 0.9
    assert scores.errors.shape == scores.shape and (scores.errors >= 0).all()
    assert lds(scores, keep[40:], bank.outputs[40:]).raw.value > 0.8
    ends = scores.top(2)
    assert ends.helpful_ids[1][0] == scores.values[1].argmax()
    rows = ends.to_pandas()
    assert (rows["error"] == scores.errors[rows["query"], rows["id"]]).all()
    part = scores.sel(query=1, train=[3, 4])
    assert (part.errors == scores.errors[1:2, 3:5]).all()
    scores.save(tmp_path / "kept")
    again = hw.Scores.open(tmp_path / "kept")
    assert (again.errors == scores.errors).all() and again.unit_in_words == scores.unit_in_words
    assert {"score", "error"} <= set(scores.to_pandas("long").columns)
    page = scores.report(tmp_path / "page.html").read_text()
    assert "trained again without many rows at a time" in page


def test_subsets_of_several_sizes_tell_what_removal_does(tmp_path):
    keep = np.random.default_rng(5).random((80, 12)) < 0.6
    bank = filled(tmp_path, keep, linear(keep, EFFECTS, 0.01))
    scores = bank.attribution("ridge", penalty=1e-6)
    assert scores.unit == "removal" and np.abs(scores.values - EFFECTS).max() < 0.02


def test_a_bank_that_is_not_full_uses_what_was_run(tmp_path):
    keep = subsets(20, 12)
    outputs = linear(keep, EFFECTS, 0.2)
    bank = Bank(tmp_path, Plan(keep, np.arange(20)[:, None]), 3, {})

    def some(rows, seed):
        if seed >= 12:
            raise RuntimeError("no more")
        return outputs[seed]

    with pytest.raises(RuntimeError):
        bank.fill(some)
    expected = ridge(keep[:12], outputs[:12]).scores
    np.testing.assert_allclose(bank.attribution().values, expected)
    with pytest.raises(InvalidInput, match="Subset 13 was not run"):
        bank.attribution(subsets=[1, 2, 3, 4, 13])
    with pytest.raises(InvalidSetting, match="method is 'shapley'"):
        bank.attribution("shapley")
    with pytest.raises(InvalidSetting, match="has no penalty"):
        bank.attribution("banzhaf", penalty=1.0)


def test_attribution_in_this_unit_is_not_for_methods():
    from models import mlp
    from truth import fitted

    case = mlp()
    with pytest.raises(InvalidSetting, match="expected one of 'influence', 'removal'"):
        fitted(case, hw.GradDot(), "full").attribute(case.loader(), case.loader(), unit="replacement")
