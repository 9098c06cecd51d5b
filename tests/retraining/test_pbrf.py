"""The proximal Bregman response: closed on least squares, retraining on convex models, influence to first order."""

import copy
import pickle
import warnings

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn

import headwater as hw
from headwater.errors import (
    BatchMismatch,
    InvalidInput,
    InvalidSetting,
    NonFiniteValue,
    NotConverged,
    RowsInteract,
    UnsupportedLoss,
    UnsupportedModel,
)
from headwater.evaluate import Bank, leave_one_out, plan_removals, plan_subsets
from headwater.torch import ProximalBregman, TorchComposableInfluence, pbrf

GROUPS = [[1, 4, 7], [11], [9, 2], [4, 1, 3, 10, 6]]
RNG = np.random.default_rng(0)
X, Y = torch.as_tensor(RNG.standard_normal((17, 4))), torch.as_tensor(RNG.standard_normal(17))
X_QUERY, Y_QUERY = torch.as_tensor(RNG.standard_normal((21, 4))), torch.as_tensor(RNG.standard_normal(21))
CLASSES, CLASSES_QUERY = torch.as_tensor(RNG.integers(3, size=17)), torch.as_tensor(RNG.integers(3, size=21))


def half_square(output, target):
    return 0.5 * (output[:, 0] - target).square().mean()


def prediction(output, target):
    return output[:, 0]


def linear(outputs, weight):
    model = nn.Linear(4, outputs, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.as_tensor(weight))
    return model


def network():
    """Smooth, small, and far from any minimum."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def batches(*columns, size=5):
    return [tuple(c[start : start + size] for c in columns) for start in range(0, len(columns[0]), size)]


# The loss is quadratic: the forecast is exact however little curvature stays.
@pytest.mark.filterwarnings("ignore::headwater.errors.RoughForecast")
@pytest.mark.parametrize("damping", [0.05, 1.0])
@pytest.mark.parametrize("groups", [GROUPS, None], ids=["groups", "rows"])
def test_on_least_squares_it_is_removal_at_the_same_damping(damping, groups):
    """Weights are anywhere, not at a minimum; what is measured is linear, so that removal leaves nothing out."""
    model = linear(1, RNG.standard_normal((1, 4)))
    options = {"measurement": prediction}
    influence = TorchComposableInfluence(
        model, half_square, hw.Direct("ggn"), damping=damping, likelihood="squared_error", **options
    ).fit(batches(X, Y))
    expected = influence.removal(batches(X, Y), batches(X_QUERY, Y_QUERY), groups)
    found = pbrf(model, half_square, X, Y, X_QUERY, Y_QUERY, groups, damping=damping, tolerance=1e-13, **options)
    assert found.shape == (21, 17 if groups is None else 4)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-11 * np.abs(expected).max())


@pytest.mark.parametrize("size", [None, 6])
def test_newtons_steps_are_few_on_a_quadratic(size):
    """Each reduces the gradient by what it had been reduced already: the products are the Hessian's."""
    model = linear(1, RNG.standard_normal((1, 4)))
    response = ProximalBregman(
        model, half_square, X, Y, X_QUERY, Y_QUERY, damping=1.0, tolerance=1e-13, batch_size=size
    )
    solved = response.solve([1, 2, 3])
    assert solved.converged and 1 <= solved.steps <= 5


def softmax_minimum(x, y, c):
    kept = LogisticRegression(C=c, fit_intercept=False, tol=1e-13, max_iter=10000, solver="newton-cg").fit(x, y)
    return kept.coef_


@pytest.mark.parametrize("groups", [GROUPS, [[k] for k in range(17)]], ids=["groups", "rows"])
def test_on_logistic_regression_at_its_minimum_it_is_exact_retraining(groups):
    """With damping of the size of the penalty: 1 / (C N)."""
    c = 0.5
    start = softmax_minimum(X, CLASSES, c)
    loss = nn.CrossEntropyLoss()
    found = pbrf(linear(3, start), loss, X, CLASSES, X_QUERY, CLASSES_QUERY, groups, damping=1 / (c * 17))
    each = nn.CrossEntropyLoss(reduction="none")
    before = each(linear(3, start)(X_QUERY), CLASSES_QUERY)
    for column, group in zip(found.T, groups, strict=True):
        kept = np.setdiff1d(np.arange(17), group)
        refitted = linear(3, softmax_minimum(X[kept], CLASSES[kept], c))
        rise = (each(refitted(X_QUERY), CLASSES_QUERY) - before).detach().numpy()
        np.testing.assert_allclose(column, rise, rtol=0, atol=1e-6 * np.abs(rise).max())


def test_to_first_order_in_the_weight_it_is_influence_of_a_network():
    """A central difference is not to be had (weights are above 0): halving it halves what is not linear."""
    model, loss, damping = network(), nn.CrossEntropyLoss(), 0.1
    influence = TorchComposableInfluence(model, loss, hw.Direct("ggn"), damping=damping, blocks="full").fit(
        batches(X, CLASSES)
    )
    scores = influence.attribute(batches(X, CLASSES), batches(X_QUERY, CLASSES_QUERY), unit="removal").values
    expected = np.stack([scores[:, group].sum(axis=1) for group in GROUPS], axis=1)
    rates = []
    for weight in (2e-3, 1e-3):
        moved = pbrf(
            model, loss, X, CLASSES, X_QUERY, CLASSES_QUERY, GROUPS, damping=damping, weight=weight, tolerance=1e-11
        )
        rates.append(moved / weight)
    scale = np.abs(expected).max()
    assert np.abs(rates[1] - expected).max() < 2e-3 * scale
    np.testing.assert_allclose(2 * rates[1] - rates[0], expected, rtol=0, atol=2e-6 * scale)


def test_on_a_network_it_is_the_minimum_of_the_objective_as_it_is_written():
    """The plain formula, its slope by autograd at the weights found; and lower than at the start."""
    model, loss, damping, group = network(), nn.CrossEntropyLoss(), 0.05, [3, 8, 12]
    solved = ProximalBregman(model, loss, X, CLASSES, X_QUERY, CLASSES_QUERY, damping=damping).solve(group)
    each = nn.CrossEntropyLoss(reduction="none")
    start = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    base = model(X).detach().requires_grad_()
    slopes = torch.autograd.grad(each(base, CLASSES).sum(), base)[0]

    def objective(weights):
        shapes = [p.shape for p in model.parameters()]
        split = torch.split(weights, [shape.numel() for shape in shapes])
        state = {n: s.reshape(v) for (n, _), s, v in zip(model.named_parameters(), split, shapes, strict=True)}
        output = torch.func.functional_call(model, state, (X,))
        losses = each(output, CLASSES)
        divergence = losses - each(base.detach(), CLASSES) - (slopes * (output - base.detach())).sum(1)
        return divergence.mean() + damping / 2 * (weights - start).square().sum() - losses[group].sum() / 17

    def slope(at):
        leaf = at.clone().requires_grad_()
        return torch.autograd.grad(objective(leaf), leaf)[0].norm()

    assert solved.converged and solved.slope <= 1e-9
    assert slope(solved.weights) < 1e-8 * slope(start)
    assert objective(solved.weights) < objective(start)
    assert (solved.weights - start).norm() > 1e-2


def test_pieces_of_rows_and_single_precision_change_nothing():
    model, loss = network(), nn.CrossEntropyLoss()
    whole, split = (
        pbrf(model, loss, X, CLASSES, X_QUERY, CLASSES_QUERY, GROUPS, damping=0.1, batch_size=size)
        for size in (None, 6)
    )
    np.testing.assert_allclose(split, whole, rtol=0, atol=1e-8 * np.abs(whole).max())
    narrow = copy.deepcopy(model).float()
    single = pbrf(narrow, loss, X.float(), CLASSES, X_QUERY.float(), CLASSES_QUERY, GROUPS, damping=0.1)
    assert single.dtype == np.float64
    np.testing.assert_allclose(single, whole, rtol=0, atol=1e-4 * np.abs(whole).max())


def test_the_model_is_left_alone_and_frozen_parameters_stay():
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Tanh(), nn.Linear(5, 3)).double()
    for p in model[0].parameters():
        p.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        response = ProximalBregman(
            model, nn.CrossEntropyLoss(), X.numpy(), CLASSES.numpy(), X_QUERY, CLASSES_QUERY, damping=0.1
        )
        first, again = response.solve([2, 5]), response.solve([2, 5])
    assert model.training and all(p.grad is None for p in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert len(first.weights) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    np.testing.assert_array_equal(first.losses, again.losses)


def test_a_bank_of_responses_agrees_with_damped_influence(tmp_path):
    """What the response is for: a truth for a network that has not converged."""
    model, loss, damping = network(), nn.CrossEntropyLoss(), 0.3
    measure = ProximalBregman(model, loss, X, CLASSES, X_QUERY, CLASSES_QUERY, damping=damping)
    recipe = {"truth": "pbrf", "damping": damping}
    bank = Bank(tmp_path / "pbrf", plan_removals(17), 21, recipe).fill(measure, workers=2)
    direct = pbrf(model, loss, X, CLASSES, X_QUERY, CLASSES_QUERY, damping=damping)
    np.testing.assert_array_equal(bank.outputs[1:, 0] - bank.outputs[:1, 0], direct.T)
    np.testing.assert_array_equal(bank.outputs[0, 0], measure.losses)
    influence = TorchComposableInfluence(model, loss, hw.Direct("ggn"), damping=damping, blocks="full").fit(
        batches(X, CLASSES)
    )
    scores = influence.attribute(batches(X, CLASSES), batches(X_QUERY, CLASSES_QUERY), unit="removal").values
    found = leave_one_out(scores, *bank)
    assert found.pearson.value > 0.98 and 0.8 < found.slope.value < 1.25
    reversed_ = leave_one_out(-scores, *bank)
    assert reversed_.pearson.value < -0.98


def test_random_halves_may_be_left_out_too(tmp_path):
    measure = ProximalBregman(network(), nn.CrossEntropyLoss(), X, CLASSES, X_QUERY, CLASSES_QUERY, damping=0.3)
    plan = plan_subsets(17, subsets=3, repeated=0)
    bank = Bank(tmp_path / "halves", plan, 21, {}).fill(measure)
    for mask, outputs in zip(plan.keep, bank.outputs[:, 0], strict=True):
        np.testing.assert_array_equal(outputs, measure.solve(np.flatnonzero(~mask)).losses)


def test_what_has_not_converged_is_said():
    model = network()
    with pytest.warns(NotConverged, match=r"4 of 4 groups; the first is group 0: after 1 steps"):
        pbrf(model, nn.CrossEntropyLoss(), X, CLASSES, X_QUERY, CLASSES_QUERY, GROUPS, damping=0.01, steps=1)
    measure = ProximalBregman(model, nn.CrossEntropyLoss(), X, CLASSES, X_QUERY, CLASSES_QUERY, damping=0.01, steps=1)
    with pytest.warns(NotConverged, match="the model without 2 rows"):
        measure(np.arange(2, 17), 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(measure(np.arange(17), 0), measure.losses)  # nothing removed: nothing to do


def test_a_loss_that_is_not_convex_is_refused():
    def bounded(output, target):
        return -torch.exp(-(output[:, 0] - target).square()).mean()

    model = linear(1, np.full((1, 4), 2.0))
    with pytest.raises(UnsupportedLoss, match=r"row \d+ is not convex"):
        pbrf(model, bounded, X, Y, X_QUERY, Y_QUERY, [[0, 1, 2, 3, 4, 5, 6]], damping=0.02)


def test_rows_that_act_on_each_other_are_refused():
    class Centred(nn.Linear):
        def forward(self, x):
            return super().forward(x - x.mean(dim=0))

    def contrastive(output, target):
        return output.logsumexp(dim=0).sum()

    given = {"x": X, "y": Y, "x_query": X_QUERY, "y_query": Y_QUERY, "groups": [[0]], "damping": 0.1}
    with pytest.raises(RowsInteract, match="row 0 changes"):
        pbrf(Centred(4, 1).double(), half_square, **given)
    with pytest.raises(UnsupportedLoss, match="rows act on each other inside the loss"):
        pbrf(linear(1, np.ones((1, 4))), contrastive, **given)


def test_a_response_can_be_sent_to_another_process():
    measure = ProximalBregman(network(), nn.CrossEntropyLoss(), X, CLASSES, X_QUERY, CLASSES_QUERY, damping=0.3)
    sent = pickle.loads(pickle.dumps(measure))
    np.testing.assert_array_equal(sent(np.arange(3, 17), 0), measure(np.arange(3, 17), 1))


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 1).double()

    def forward(self, x):
        return self.inner(x), self.inner(x)


@pytest.mark.parametrize(
    ("changed", "error", "words"),
    [
        ({"damping": -1.0}, InvalidSetting, "damping is -1.0"),
        ({"damping": float("nan")}, InvalidSetting, "damping is nan"),
        ({"weight": 0.0}, InvalidSetting, r"weight is 0.0.*\(0, 1\]"),
        ({"weight": 1.5}, InvalidSetting, "weight is 1.5"),
        ({"tolerance": 0.0}, InvalidSetting, "tolerance is 0.0"),
        ({"steps": 0}, InvalidSetting, "steps is 0"),
        ({"batch_size": True}, InvalidSetting, "batch_size is True"),
        ({"groups": [[0], [17]]}, InvalidInput, "group 1 go from 17 to 17; there are 17"),
        ({"groups": [[0, 0]]}, BatchMismatch, "group 0 have a row more than once"),
        ({"groups": [[0], []]}, InvalidInput, "Group 1 is empty"),
        ({"groups": []}, InvalidInput, "no groups"),
        ({"groups": [[True, False]]}, InvalidInput, "of a mask: flatnonzero"),
        ({"y": Y[:5]}, BatchMismatch, "17"),
        ({"y": torch.where(Y[3] == Y, torch.nan, Y)}, NonFiniteValue, r"rows \[3\]"),
        ({"y_query": torch.where(Y_QUERY[2] == Y_QUERY, torch.inf, Y_QUERY)}, NonFiniteValue, "query 2 is inf"),
        ({"model": Pair()}, UnsupportedModel, "output is tuple"),
        ({"model": linear(1, np.ones((1, 4))).requires_grad_(False)}, UnsupportedModel, "no parameter"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_has_no_response_is_refused(changed, error, words):
    given = {
        "model": linear(1, np.ones((1, 4))),
        "loss": half_square,
        "x": X,
        "y": Y,
        "x_query": X_QUERY,
        "y_query": Y_QUERY,
        "damping": 0.1,
        "groups": [[0]],
    }
    with pytest.raises(error, match=words):
        pbrf(**(given | changed))
