"""Losses of everyday life: their Fisher information is their output Hessian, and a row's loss is that of the row alone.

The truth is autograd's Hessian of the loss of one row at its output, in float64. Sampled labels are checked without
chance: what is drawn is enumerated, each with its probability.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import jax_models  # noqa: F401  # JAX in double precision
import numpy as np
import optax
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from jax_models import jax, jnp
from torch import nn

import headwater as hw
from headwater.errors import UnsupportedLoss, UnsupportedModel
from headwater.gradients import likelihoods
from headwater.jax import JaxBatch, JaxComposableInfluence, JaxGradientProvider
from headwater.jax.losses import JaxOutputLoss
from headwater.jax.losses import find_likelihood as find_in_jax
from headwater.torch import TorchBatch, TorchComposableInfluence, TorchGradientProvider
from headwater.torch.likelihoods import TorchOutputLoss, find_likelihood
from headwater.torch.losses import row_losses

GENERATOR = torch.Generator().manual_seed(0)
N, C, T = 5, 3, 2
WEIGHT = torch.tensor([0.5, 2.0, 5.0], dtype=torch.float64)


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


OUTPUT, TOKENS = numbers(N, C), numbers(N, C, T)
LABELS = torch.tensor([0, 2, 1, 1, 2])
LABELS_OF_TOKENS = torch.tensor([[0, 2], [1, -100], [2, 2], [-100, 0], [1, 1]])
SOFT, SOFT_TOKENS = numbers(N, C).softmax(1), numbers(N, C, T).softmax(1)
ANSWERS, VALUES = (numbers(N, C) > 0).double(), numbers(N, C)


def focal(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    nll = F.cross_entropy(output, target, reduction="none")
    return ((1 - (-nll).exp()) ** 2 * nll).mean()


def gaussian(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean and log variance of one number: convex in neither together."""
    return (output[:, 1] + (output[:, 0] - target) ** 2 * (-output[:, 1]).exp()).mean() / 2


CASES: dict[str, tuple[Any, torch.Tensor, torch.Tensor]] = {
    "smoothed": (nn.CrossEntropyLoss(label_smoothing=0.1), OUTPUT, LABELS),
    "weighted": (nn.CrossEntropyLoss(weight=WEIGHT, reduction="sum"), OUTPUT, LABELS),
    "weighted and smoothed": (
        nn.CrossEntropyLoss(weight=WEIGHT, label_smoothing=0.3, reduction="none"),
        OUTPUT,
        LABELS,
    ),
    "soft": (nn.CrossEntropyLoss(), OUTPUT, SOFT),
    "soft, smoothed and weighted": (nn.CrossEntropyLoss(weight=WEIGHT, label_smoothing=0.2), OUTPUT, SOFT),
    "masses that are no probabilities": (nn.CrossEntropyLoss(), OUTPUT, 3 * SOFT),
    "weighted by a partial": (partial(F.cross_entropy, weight=WEIGHT, reduction="sum"), OUTPUT, LABELS),
    "positive answers weighted": (nn.BCEWithLogitsLoss(weight=WEIGHT, pos_weight=2 * WEIGHT), OUTPUT, ANSWERS),
    "soft answers": (nn.BCEWithLogitsLoss(), OUTPUT, SOFT),
    "huber": (nn.HuberLoss(delta=0.5), OUTPUT, VALUES),
    "smooth absolute": (nn.SmoothL1Loss(), OUTPUT, VALUES),
    "poisson": (nn.PoissonNLLLoss(), OUTPUT, VALUES.abs()),
    "soft margin": (nn.SoftMarginLoss(), OUTPUT, VALUES.sign()),
    "a function of one's own": (lambda o, t: (o - t).cosh().log().sum(), OUTPUT, VALUES),
}
MANY = {
    "tokens smoothed, some ignored": (nn.CrossEntropyLoss(label_smoothing=0.1), TOKENS, LABELS_OF_TOKENS),
    "tokens weighted, some ignored": (
        nn.CrossEntropyLoss(weight=WEIGHT, reduction="sum"),
        TOKENS,
        LABELS_OF_TOKENS,
    ),
    "tokens soft": (nn.CrossEntropyLoss(weight=WEIGHT), TOKENS, SOFT_TOKENS),
}
BOTH = {**CASES, **MANY}


def hessian(loss: Any, output: torch.Tensor, target: torch.Tensor, row: int) -> torch.Tensor:
    """[K, K], of the row's loss by its output."""
    o, t = output[row : row + 1], target[row : row + 1]
    return torch.autograd.functional.hessian(lambda z: loss(z.reshape(o.shape), t).sum(), o.reshape(-1))


def moment(cotangents: list[torch.Tensor], row: int) -> torch.Tensor:
    flat = [v[row].reshape(-1) for v in cotangents]
    return sum(torch.outer(v, v) for v in flat)  # type: ignore[return-value]


def near(got: Any, expected: Any, tolerance: float = 1e-11) -> None:
    gap, size = (np.abs(np.asarray(v)).max() for v in (got - expected, expected))
    assert gap <= tolerance * max(size, 1e-3), f"off by {gap:g} where the largest is {size:g}"


@pytest.mark.parametrize("name", CASES)
def test_the_fisher_is_the_hessian_of_the_rows_own_loss(name: str) -> None:
    loss, output, target = CASES[name]
    found = find_likelihood(loss, None)
    asked = likelihoods.fisher_cotangents(found, TorchOutputLoss(loss), output, target, "exact", [])
    draws, roots = list(asked), likelihoods.ggn_cotangents(found, TorchOutputLoss(loss), output, target)
    assert roots is not None
    for row in range(N):
        expected = hessian(loss, output, target, row)
        near(moment(draws, row), expected)
        near(moment(roots, row), expected)


def enumerated(likelihood: Any, output: torch.Tensor) -> list[tuple[float, Callable[[int, bool], torch.Tensor], int]]:
    """Every draw with its probability, row by row: (probability, numbers, row)."""
    rows, found = len(output), []
    if isinstance(likelihood, likelihoods.CrossEntropy):
        p = output.movedim(1, -1).softmax(-1).reshape(rows, -1, output.shape[1])
        middles = p.cumsum(-1) - p / 2
    elif isinstance(likelihood, likelihoods.Bernoulli):
        one = output.sigmoid().reshape(rows, -1)
        p, middles = torch.stack([one, 1 - one], dim=-1), torch.stack([one / 2, (1 + one) / 2], dim=-1)
    else:
        units = torch.eye(output[0].numel(), dtype=torch.float64)
        return [(1.0, lambda k, normal, u=u: u.expand(rows, k), row) for u in units for row in range(rows)]
    for choice in product(range(p.shape[-1]), repeat=p.shape[1]):
        picked = torch.stack([middles[:, k, c] for k, c in enumerate(choice)], dim=1)
        chance = torch.stack([p[:, k, c] for k, c in enumerate(choice)], dim=1).prod(1)
        found += [(float(chance[row]), lambda k, normal, u=picked: u, row) for row in range(rows)]
    return found


@pytest.mark.parametrize("name", BOTH)
def test_sampled_labels_have_that_hessian_on_average(name: str) -> None:
    loss, output, target = BOTH[name]
    found = find_likelihood(loss, None)
    total = [torch.zeros(output[0].numel(), output[0].numel(), dtype=torch.float64) for _ in range(N)]
    for chance, draw, row in enumerated(found, output):
        total[row] += chance * moment([found.sampled(TorchOutputLoss(loss), output, target, draw)], row)
    for row in range(N):
        near(total[row], hessian(loss, output, target, row))


@pytest.mark.parametrize("name", BOTH)
def test_a_rows_loss_is_the_loss_of_that_row_alone(name: str) -> None:
    loss, output, target = BOTH[name]
    alone = [loss(output[k : k + 1], target[k : k + 1]).sum() for k in range(N)]
    near(row_losses(loss, output, target), torch.stack(alone), 1e-14)


def test_losses_by_probabilities_have_the_fisher_of_their_logits() -> None:
    """And a GGN that is another one, as their outputs are."""
    p, loss = OUTPUT.sigmoid(), nn.BCELoss(weight=WEIGHT)
    found = find_likelihood(loss, None)
    draws = list(likelihoods.fisher_cotangents(found, TorchOutputLoss(loss), p, SOFT, "exact", []))
    roots = likelihoods.ggn_cotangents(found, TorchOutputLoss(loss), p, SOFT)
    assert roots is not None
    for row in range(N):
        near(moment(draws, row), torch.diag(WEIGHT / C / (p[row] * (1 - p[row]))))
        near(moment(roots, row), hessian(loss, p, SOFT, row))
    log, divergence = OUTPUT.log_softmax(1), nn.KLDivLoss(reduction="batchmean")
    found = find_likelihood(divergence, None)
    draws = list(likelihoods.fisher_cotangents(found, TorchOutputLoss(divergence), log, 2 * SOFT, "exact", []))
    for row in range(N):
        near(moment(draws, row), torch.diag(2 * log[row].exp()))


@pytest.mark.parametrize(
    ("loss", "output", "target"), [(focal, 4 * OUTPUT, LABELS), (gaussian, OUTPUT[:, :2], VALUES[:, 0])]
)
def test_a_loss_that_is_not_convex_has_its_positive_part_and_says_so(loss: Any, output: Any, target: Any) -> None:
    found = find_likelihood(loss, None)
    draws = list(likelihoods.fisher_cotangents(found, TorchOutputLoss(loss), output, target, "exact", []))
    left_out = seen = 0.0
    for row in range(N):
        values, vectors = torch.linalg.eigh(hessian(loss, output, target, row))
        near(moment(draws, row), (vectors * values.clip(min=0)) @ vectors.T)
        left_out, seen = left_out + float(-values.clip(max=0).sum()), seen + float(values.abs().sum())
    assert 0 < left_out < seen
    near(np.array(found.negative_share), np.array(left_out / seen))  # type: ignore[attr-defined]
    assert f"positive part ({left_out / seen:.1%} was negative)" in found.said
    assert likelihoods.ggn_cotangents(found, TorchOutputLoss(loss), output, target) is None


def model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Linear(4, 3).double()


def fit(loss: Any, method: Any, target: torch.Tensor = LABELS, layer: nn.Module | None = None) -> Any:
    return TorchComposableInfluence(layer or model(), loss, method, damping=0.1).fit([(X, target)])


X = numbers(N, 4)


def test_the_status_says_what_stands_for_the_fisher_information() -> None:
    assert "own output Hessian, its positive part" in str(fit(focal, hw.Ekfac()).status)
    assert "own second derivatives" in str(fit(nn.HuberLoss(), hw.Kfac(), VALUES).status)
    for quiet in (fit(nn.CrossEntropyLoss(), hw.Ekfac()), fit(focal, hw.Ekfac(fisher="empirical"))):
        assert "in place of" not in str(quiet.status)


@pytest.mark.parametrize("name", ["smoothed", "soft, smoothed and weighted", "huber", "a function of one's own"])
def test_a_draw_depends_on_the_row_and_not_on_its_batch(name: str) -> None:
    loss, _, target = CASES[name]
    provider = TorchGradientProvider(model(), loss)
    together, alone = (
        provider.fisher_grads(TorchBatch(X[rows], target[rows]), "sampled", draws=range(1, 3), seed=4)
        for rows in (slice(0, N), slice(2, 4))
    )
    for whole, part in zip(together, alone, strict=True):
        near(part["full"].flat(), whole["full"].flat()[2:4], 1e-13)
    assert (together[0]["full"].flat() - together[1]["full"].flat()).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("loss", "target", "words"),
    [
        (nn.L1Loss(), VALUES, "piecewise linear.*fisher='empirical'"),
        (lambda o, t: (o - t).abs().sum(), VALUES, "piecewise linear.*fisher='empirical'"),
        (nn.MultiMarginLoss(), LABELS, "differentiated twice.*fisher='empirical'"),
        (nn.CrossEntropyLoss(weight=WEIGHT), LABELS, "reduction='sum'"),
    ],
    ids=["absolute", "my absolute", "margins", "weighted mean"],
)
def test_what_is_refused_names_what_works(loss: Any, target: torch.Tensor, words: str) -> None:
    with pytest.raises(UnsupportedLoss, match=words) as caught:
        fit(loss, hw.Ekfac(), target)
    assert str(caught.value).count("fisher='empirical'") <= 1


@pytest.mark.parametrize(
    "loss",
    [
        nn.BCEWithLogitsLoss(weight=torch.ones(N, 1).double()),
        nn.BCEWithLogitsLoss(pos_weight=torch.ones(N, C).double()),
        partial(F.mse_loss, weight=torch.ones(N, C).double()),
    ],
)
def test_weights_for_the_rows_of_one_batch_belong_to_the_batch(loss: Any) -> None:
    with pytest.raises(UnsupportedLoss, match=r"TorchBatch\(x, y, weights=...\)"):
        row_losses(loss, OUTPUT, ANSWERS)


def test_what_was_refused_works_with_what_was_named() -> None:
    for loss, target in ((nn.L1Loss(), VALUES), (nn.MultiMarginLoss(), LABELS)):
        assert torch.isfinite(fit(loss, hw.Ekfac(fisher="empirical"), target).influences(X, target)).all()
    wide = nn.Linear(4, 70).double()
    target = torch.arange(N)
    with pytest.raises(UnsupportedLoss, match="70 outputs") as caught:
        fit(lambda o, t: F.cross_entropy(o, t), hw.Ekfac(), target, wide)
    assert str(caught.value).count("fisher='empirical'") == 1
    named = TorchComposableInfluence(
        wide, lambda o, t: F.cross_entropy(o, t, label_smoothing=0.1), hw.Ekfac(), likelihood="cross_entropy"
    )
    known = TorchComposableInfluence(wide, nn.CrossEntropyLoss(label_smoothing=0.1), hw.Ekfac())
    near(*(influence.fit([(X, target)]).influences(X, target) for influence in (named, known)))


def test_a_huber_loss_of_many_outputs_needs_no_name() -> None:
    layer, target = nn.Linear(4, 80).double(), numbers(N, 80)
    influence = fit(nn.HuberLoss(), hw.Direct("fisher", fisher="sampled"), target, layer)
    assert influence.status.fisher


def test_several_outputs_have_an_empirical_fisher_and_no_other() -> None:
    two = {"a": jnp.asarray(numbers(4, 3).numpy()), "b": jnp.asarray(numbers(4, 2).numpy())}
    x = jnp.asarray(X.numpy())

    def loss(output: Any, target: Any) -> Any:
        return jnp.sum(output[0] ** 3) / 3 + jnp.sum((output[1] - target) ** 2)

    provider = JaxGradientProvider(lambda p, x: (x @ p["a"], x @ p["b"]), two, loss)
    batch = JaxBatch(x, jnp.asarray(VALUES[:, :2].numpy()))
    (draw,) = provider.fisher_grads(batch, "empirical")
    near(draw["full"].flat(), provider.flat_grads(batch))
    with pytest.raises(UnsupportedLoss, match=r"returns a tuple: use fisher='empirical'.*hw\.Direct"):
        provider.fisher_grads(batch, "auto")


# Other frameworks -----------------------------------------------------------------------------------------------------

IN_JAX = {
    "soft": (optax.softmax_cross_entropy, 2 * SOFT),
    "smoothed": (
        lambda o, t: optax.softmax_cross_entropy(o, optax.smooth_labels(jax.nn.one_hot(t, C), 0.1)),
        LABELS,
    ),
    "huber": (optax.huber_loss, VALUES),
}


@pytest.mark.parametrize("name", IN_JAX)
def test_jax_has_the_same_hessians(name: str) -> None:
    loss, target = IN_JAX[name]
    output, target = jnp.asarray(OUTPUT.numpy()), jnp.asarray(target.numpy())
    found = find_in_jax(loss, None)
    draws = list(likelihoods.fisher_cotangents(found, JaxOutputLoss(loss), output, target, "exact", []))
    for row in range(N):
        expected = jax.hessian(lambda o, k=row: jnp.sum(loss(o[None], target[k : k + 1])))(output[row])
        near(sum(jnp.outer(v[row], v[row]) for v in draws), expected)


def test_a_name_in_jax_covers_smoothed_labels_of_many_classes() -> None:
    output, y = jnp.asarray(numbers(2, 70).numpy()), jnp.arange(2)
    uniforms = np.array([[0.3], [0.8]])

    def smoothed(o: Any, t: Any) -> Any:
        return 2 * jnp.sum(optax.softmax_cross_entropy(o, optax.smooth_labels(jax.nn.one_hot(t, 70), 0.1)))

    def drawn(name: str | None) -> Any:
        found, draws = find_in_jax(smoothed, name), [lambda count, normal: jnp.asarray(uniforms)]
        return next(likelihoods.fisher_cotangents(found, JaxOutputLoss(smoothed), output, y, "auto", draws))

    with pytest.raises(UnsupportedLoss, match="70 outputs"):
        drawn(None)
    p = np.asarray(jax.nn.softmax(output))
    labels = (p.cumsum(1) < uniforms).sum(1)
    near(drawn("cross_entropy"), 2**0.5 * (p - np.eye(70)[labels]))


# Margins --------------------------------------------------------------------------------------------------------------


def refused(loss: Any, target: torch.Tensor, layer: nn.Module | None = None) -> None:
    with pytest.raises(UnsupportedModel, match="output='loss'"):
        fit(loss, hw.Trak(dimension=None), target, layer)
    fit(loss, hw.Trak(dimension=None, output="loss"), target, layer)


def test_only_a_cross_entropy_of_one_label_a_row_has_a_margin() -> None:
    one = nn.Linear(4, 1).double()
    refused(nn.MSELoss(), VALUES[:, :1], one)
    refused(nn.PoissonNLLLoss(), VALUES[:, :1].abs(), one)
    refused(nn.BCEWithLogitsLoss(), SOFT[:, :1], one)
    refused(nn.BCELoss(), ANSWERS[:, :1], nn.Sequential(one, nn.Sigmoid()))
    refused(nn.BCEWithLogitsLoss(), ANSWERS)
    refused(nn.CrossEntropyLoss(), SOFT)
    refused(lambda o, t: F.huber_loss(o[:, 0], t), ANSWERS[:, 0], one)
    refused(lambda o, t: F.cross_entropy(o, t, label_smoothing=0.2), LABELS)
    for loss, target, layer in (
        (nn.CrossEntropyLoss(), LABELS, None),
        (nn.CrossEntropyLoss(label_smoothing=0.2), LABELS, None),
        (lambda o, t: 3 * F.cross_entropy(o, t), LABELS, None),
        (nn.BCEWithLogitsLoss(), ANSWERS[:, :1], one),
        (lambda o, t: F.softplus(-o[:, 0] * (2 * t - 1)).sum(), ANSWERS[:, 0], one),
    ):
        fit(loss, hw.Trak(dimension=None), target, layer)


def test_jax_knows_which_losses_have_a_margin() -> None:
    x, w = jnp.asarray(X.numpy()), jnp.asarray(numbers(4, 1).numpy())
    for loss, y in ((optax.squared_error, VALUES[:, :1]), (lambda o, t: jnp.sum((o - t) ** 4), ANSWERS[:, :1])):
        with pytest.raises(UnsupportedModel, match="output='loss'"):
            JaxComposableInfluence(lambda w, x: x @ w, w, loss, hw.Trak(8)).fit([(x, jnp.asarray(y.numpy()))])
    rows = [(x, jnp.asarray(ANSWERS[:, :1].numpy()))]
    JaxComposableInfluence(lambda w, x: x @ w, w, optax.sigmoid_binary_cross_entropy, hw.Trak(8)).fit(rows)


def margin(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Minus log p/(1-p) of one row."""
    p = output.softmax(1)[0, target[0]]
    return ((1 - p) / p).log()


def rowwise(function: Any, layer: nn.Module, target: torch.Tensor) -> torch.Tensor:
    leaves = list(layer.parameters())
    rows = [
        torch.autograd.grad(function(layer(X[k : k + 1]), target[k : k + 1]).sum(), leaves) for k in range(len(target))
    ]
    return torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows])


@pytest.mark.parametrize("name", ["smoothed", "weighted"])
def test_train_rows_have_the_gradient_of_their_loss(name: str) -> None:
    layer, loss = model(), CASES[name][0]
    phi, train = rowwise(margin, layer, LABELS), rowwise(loss, layer, LABELS)
    damped = phi.T @ phi / N + 0.1 * torch.eye(phi.shape[1]).double()
    influence = TorchComposableInfluence(layer, loss, hw.Trak(dimension=None), blocks="full", damping=0.1)
    influence.fit([(X, LABELS)])
    expected = phi @ torch.linalg.solve(damped, train.T)
    near(influence.influences(X, LABELS), expected)
    if name == "weighted":
        near(influence.self_influence([(X, LABELS)]), expected.diagonal().numpy())
        return
    with pytest.raises(UnsupportedModel, match="no multiple of the margin's"):
        influence.self_influence([(X, LABELS)])
    point, leaves = X[:1].clone().requires_grad_(), list(layer.parameters())
    slope = torch.autograd.grad(loss(layer(point), LABELS[:1]), leaves, create_graph=True)
    factor = torch.linalg.solve(damped, phi[1])
    along = torch.autograd.grad(torch.cat([s.reshape(-1) for s in slope]) @ factor, point)[0]
    got = influence.influences(X[1:2], LABELS[1:2], X[:1], LABELS[:1], mode="perturbation")
    near(got[0, 0], along[0])


def test_several_models_need_the_plain_cross_entropy() -> None:
    weights = [model().state_dict(), nn.Linear(4, 3).double().state_dict()]
    options = {"blocks": "full", "damping": 0.1, "checkpoints": weights}
    plain, tripled = (
        TorchComposableInfluence(model(), loss, hw.Trak(dimension=None), likelihood="cross_entropy", **options)
        for loss in (nn.CrossEntropyLoss(), lambda o, t: 3 * F.cross_entropy(o, t))
    )
    scores = plain.fit([(X, LABELS)]).influences(X, LABELS)
    near(tripled.fit([(X, LABELS)]).influences(X, LABELS), 3 * scores)
    with pytest.raises(UnsupportedModel, match="mode='up'"):
        plain.influences(X, LABELS, mode="perturbation")
    smoothed = TorchComposableInfluence(
        model(), nn.CrossEntropyLoss(label_smoothing=0.1), hw.Trak(dimension=None), **options
    )
    with pytest.raises(UnsupportedModel, match="smoothed labels besides"):
        smoothed.fit([(X, LABELS)]).influences(X, LABELS)


def test_a_probability_of_one_for_what_is_not_so_is_taken() -> None:
    """In float32 a sigmoid reaches 1.0, where torch cuts the loss off."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 1), nn.Sigmoid())
    x = torch.randn(20, 4)
    x[3] = 100 * model[0].weight.detach()[0] / model[0].weight.detach().norm() ** 2
    y = (torch.rand(20, 1) < 0.5).float()
    y[3] = 0.0
    assert float(model(x).detach()[3]) == 1.0
    assert TorchComposableInfluence(model, nn.BCELoss(), hw.Ekfac()).fit([(x, y)]).influences(x, y).isfinite().all()
