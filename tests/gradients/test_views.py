"""What looks at a provider shows what it changes and forwards the rest: no answer is inherited that is not its own."""

from __future__ import annotations

import inspect

import models
import pytest
import torch
from sklearn.linear_model import LogisticRegression, SGDClassifier
from torch import nn
from truth import assert_close

import headwater as hw
from headwater.gradients.ensemble import EnsembleProvider
from headwater.gradients.margin import MarginGradientProvider
from headwater.gradients.normalised import NormalisedGradientProvider
from headwater.gradients.provider import StructuredGradientProvider
from headwater.gradients.view import ProviderView
from headwater.methods.representer import LogitQueries
from headwater.sklearn import SklearnComposableInfluence, SklearnGradientProvider
from headwater.torch import TorchBatch, TorchGradientProvider

FOLLOWS = {"flat_grads", "jacobian_prod", "block", "sizes", "n_parameters", "self_grads", "self_scale"}
"""What the base class makes of other answers, which are the view's own."""
SHARED = {"as_batch", "row_weights", "row_keys", "content_keys", "explained", "settings", "normalisation", "dtype"}
SHARED |= {"device", "coverage_fraction", "likelihood", "own_precision", "keys_by_content", "host_arrays", "views"}
SHARED |= {"curvature_scale"}
"""What all models of an ensemble answer alike, so that the first may answer for them."""
VIEWS = (ProviderView, NormalisedGradientProvider, MarginGradientProvider, LogitQueries, EnsembleProvider)


def questions() -> set[str]:
    """Everything public that a provider answers."""
    return {name for name, _ in inspect.getmembers(StructuredGradientProvider) if not name.startswith("_")}


def owner(view: type, name: str) -> type:
    return next(kind for kind in view.__mro__ if name in vars(kind))


@pytest.mark.parametrize("view", VIEWS)
def test_no_view_inherits_a_default(view: type) -> None:
    inherited = {name for name in questions() if not issubclass(owner(view, name), ProviderView)}
    assert inherited <= FOLLOWS, f"{view.__name__} has the base class's answers to {sorted(inherited - FOLLOWS)}"


def test_an_ensemble_asks_its_first_model_only_what_all_share() -> None:
    """Its blocks are not those of a model: whatever speaks of blocks, or of what models say, is its own."""
    asked = {name for name in questions() - FOLLOWS if owner(EnsembleProvider, name) is ProviderView}
    assert asked == SHARED


def provider() -> TorchGradientProvider:
    case = models.mlp()
    return TorchGradientProvider(case.model, case.loss, blocks="layer")


def test_a_plain_view_answers_what_it_looks_at() -> None:
    case, plain = models.mlp(), provider()
    view, batch = ProviderView(plain), TorchBatch(case.x, case.y, weights=torch.linspace(0.5, 2.0, len(case.y)))
    for name in ("dtype", "device", "coverage_fraction", "explained", "layouts", "likelihood", "n_parameters"):
        assert getattr(view, name) == getattr(plain, name), name
    assert view.settings() == plain.settings() and view.fingerprint() == plain.fingerprint()
    assert_close(view.losses(batch), plain.losses(batch))
    assert_close(view.flat_grads(batch), plain.flat_grads(batch))
    for mine, theirs in zip(view.ggn_grads(batch), plain.ggn_grads(batch), strict=True):
        assert_close(mine["first"].flat(), theirs["first"].flat())
    wide = view.in_float64()
    assert type(wide) is ProviderView and wide.plain is not plain
    assert_close(wide.flat_grads(batch), plain.flat_grads(batch))
    margins = view.of_output("margin")
    assert_close(margins.one_minus_p(batch), 1 - (-plain.losses(batch)).exp())


def test_unit_gradients_of_an_ensemble_keep_its_weights() -> None:
    members = EnsembleProvider([provider(), provider()], (0.25, 0.5))
    view = NormalisedGradientProvider(members)
    assert [view.block_scale(name) for name in view.layouts] == [0.25, 0.25, 0.5, 0.5]
    assert view.dtype == "float64"


# Penalties -----------------------------------------------------------------------------------------------------------


def rows() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(40, 3, dtype=torch.float64)
    return x, (x[:, 0] + torch.randn(40) > 0).long()


def slopes(estimator: object, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of minus the margin and of the loss, by autograd: [n, 4]."""
    w = torch.tensor([*estimator.coef_[0], *estimator.intercept_], requires_grad=True)  # type: ignore[attr-defined]
    found = []
    for k in range(len(x)):
        margin = (1 - 2 * y[k]) * (x[k] @ w[:3] + w[3])
        found.append(
            [torch.autograd.grad(v, w, retain_graph=True)[0] for v in (margin, nn.functional.softplus(margin))]
        )
    return tuple(torch.stack(values) for values in zip(*found, strict=True))  # type: ignore[return-value]


@pytest.mark.parametrize("strength", [0.02, 3.0])
def test_the_penalty_of_an_estimator_stands_beside_the_margins(strength: float) -> None:
    x, y = rows()
    estimator = LogisticRegression(C=1 / (40 * strength), tol=1e-10).fit(x.numpy(), y.numpy())
    influence = SklearnComposableInfluence(estimator, hw.Trak(dimension=None), blocks="full", damping=1e-3)
    got = influence.fit([(x.numpy(), y.numpy())]).influences(x[:5].numpy(), y[:5].numpy(), x.numpy(), y.numpy())
    margins, losses = slopes(estimator, x, y)
    penalty = torch.diag(torch.tensor([strength] * 3 + [0.0], dtype=torch.float64))
    inverse = torch.linalg.inv(margins.T @ margins / 40 + penalty + 1e-3 * torch.eye(4))
    assert_close(got, margins[:5] @ inverse @ losses.T, 1e5)


def test_a_row_takes_its_share_of_a_penalty_along_when_margins_are_explained() -> None:
    x, y = rows()
    estimator = SGDClassifier(loss="log_loss", alpha=0.1, random_state=0).fit(x.numpy(), y.numpy())
    view = MarginGradientProvider(SklearnGradientProvider(estimator))
    batch = view.as_batch(x.numpy(), y.numpy())
    pull = torch.tensor([*(0.1 * estimator.coef_[0]), 0.0])
    assert_close(view.flat_grads(batch), slopes(estimator, x, y)[1] + pull, 1e3)
    assert view.penalty("full", 40.0)[:3].tolist() == [0.1] * 3


def test_losses_without_a_margin_are_refused_in_scikit_learn() -> None:
    from sklearn.linear_model import PoissonRegressor, Ridge

    x, y = rows()
    for estimator in (Ridge(), PoissonRegressor(), SGDClassifier(loss="squared_hinge")):
        estimator.fit(x.numpy(), y.numpy())
        with pytest.raises(hw.errors.UnsupportedModel, match="output='loss'"):
            SklearnComposableInfluence(estimator, hw.Trak())
        SklearnComposableInfluence(estimator, hw.Trak(dimension=None, output="loss")).fit([(x.numpy(), y.numpy())])
