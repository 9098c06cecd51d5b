"""Ways in which losses, margins and views have been wrong, and quick laws that must notice each."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import patch

import test_losses
import test_views
import torch

from headwater.gradients.likelihoods import Bernoulli, CrossEntropy, OwnHessian, SquaredError
from headwater.gradients.margin import MarginGradientProvider
from headwater.gradients.view import ProviderView
from headwater.torch import losses


def hessians() -> None:
    for name in ("weighted and smoothed", "soft", "positive answers weighted", "huber", "a function of one's own"):
        test_losses.test_the_fisher_is_the_hessian_of_the_rows_own_loss(name)


def draws() -> None:
    for name in ("tokens weighted, some ignored", "positive answers weighted", "huber"):
        test_losses.test_sampled_labels_have_that_hessian_on_average(name)


def rows_alone() -> None:
    for name in ("tokens smoothed, some ignored", "soft, smoothed and weighted", "tokens soft"):
        test_losses.test_a_rows_loss_is_the_loss_of_that_row_alone(name)


def positive_parts() -> None:
    output, target = test_losses.OUTPUT[:, :2], test_losses.VALUES[:, 0]
    test_losses.test_a_loss_that_is_not_convex_has_its_positive_part_and_says_so(test_losses.gaussian, output, target)


def margins() -> None:
    test_losses.test_train_rows_have_the_gradient_of_their_loss("weighted")


def penalties() -> None:
    test_views.test_the_penalty_of_an_estimator_stands_beside_the_margins(3.0)


LAWS: tuple[Callable[[], None], ...] = (hessians, draws, rows_alone, positive_parts, margins, penalties)

Mutant = Callable[[], AbstractContextManager[Any]]


def _replaced(owner: Any, attribute: str, make: Callable[[Any], Any]) -> Mutant:
    return lambda: patch.object(owner, attribute, make(getattr(owner, attribute)))


def _first(scale: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Of `_scaled`: another root of the masses."""

    def make(original: Any) -> Any:
        def wrong(self: Any, *given: Any) -> Any:
            p, root, *rest = original(self, *given)
            return (p, scale(root), *rest)

        return wrong

    return make


MUTANTS: dict[str, Mutant] = {
    "classes count alike whatever their weight": _replaced(CrossEntropy, "_scaled", _first(torch.ones_like)),
    "answers count alike whatever their weight": _replaced(Bernoulli, "_scaled", _first(torch.ones_like)),
    "the mass of a target counts twice": _replaced(CrossEntropy, "_scaled", _first(lambda root: root**2)),
    "second derivatives are those of the mean output": _replaced(
        SquaredError, "_root_curvature", lambda f: lambda self, *given: 0.0 * f(self, *given) + f(self, *given).mean()
    ),
    "an unknown loss has the root of its absolute Hessian": _replaced(
        OwnHessian, "_root", lambda f: lambda self, loss, output, target: _absolute(loss.hessian(output, target))
    ),
    "ignored tokens count in a row's mean": _replaced(
        losses,
        "_torch_row_losses",
        lambda f: lambda loss, output, target: _over_all(f(loss, output, target), target),
    ),
    "train rows of a margin forget the loss's class weights": _replaced(
        MarginGradientProvider,
        "grads",
        lambda f: (
            lambda self, batch, *, query=False, weighted=True: (
                f(self, batch, query=True) if query else _doubted(self, batch, weighted)
            )
        ),
    ),
    "a view drops the penalty": _replaced(ProviderView, "penalty", lambda f: lambda self, block, weight: None),
}


def _absolute(hessian: torch.Tensor) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(hessian)
    return vectors * values.abs().sqrt()[:, None, :]


def _over_all(found: torch.Tensor | None, target: torch.Tensor) -> torch.Tensor | None:
    if found is None or target.is_floating_point() or target.ndim == 1:
        return found
    return found * (target != -100).sum(1) / target.shape[1]


def _doubted(view: MarginGradientProvider, batch: Any, weighted: bool) -> Any:
    values, doubt = view.margin.grads(batch, weighted=weighted), view.one_minus_p(batch)
    return type(values)((name, value.weighted(doubt)) for name, value in values.items())
