"""Which distribution is behind a loss of torch; the likelihoods themselves are those of every framework."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from headwater.gradients import likelihoods as neutral
from headwater.gradients.likelihoods import FEW as FEW
from headwater.gradients.likelihoods import MOST as MOST
from headwater.gradients.likelihoods import Bernoulli as Bernoulli
from headwater.gradients.likelihoods import CrossEntropy as CrossEntropy
from headwater.gradients.likelihoods import Draw as Draw
from headwater.gradients.likelihoods import Likelihood as Likelihood
from headwater.gradients.likelihoods import OutputHessian as OutputHessian
from headwater.gradients.likelihoods import SquaredError as SquaredError
from headwater.gradients.likelihoods import TargetSampler as TargetSampler
from headwater.gradients.likelihoods import cotangent as cotangent
from headwater.torch.losses import Loss, partial_options, row_losses


class TorchOutputLoss(neutral.OutputLoss):
    """A loss of torch as a function of the output."""

    def __init__(self, loss: Loss):
        self.loss = loss
        self.name = getattr(loss, "__name__", type(loss).__name__)

    def slope(self, output: torch.Tensor, target: Any) -> torch.Tensor:
        return torch.autograd.grad(*self._total(output, target))[0]

    def bend(self, output: torch.Tensor, target: Any) -> torch.Tensor:
        total, leaf = self._total(output, target)
        slope = torch.autograd.grad(total, leaf, create_graph=True)[0]
        return torch.autograd.grad(slope.sum(), leaf)[0]

    def hessian(self, output: torch.Tensor, target: Any) -> torch.Tensor:
        with torch.enable_grad():
            total, leaf = self._total(output, target)
            slope = torch.autograd.grad(total, leaf, create_graph=True)[0].reshape(len(output), -1)
            if not slope.requires_grad:
                return neutral.no_hessian(output)
            rows = [torch.autograd.grad(column.sum(), leaf, retain_graph=True)[0] for column in slope.unbind(1)]
        hessian = torch.stack([row.reshape(len(output), -1) for row in rows], dim=1)
        return (hessian + hessian.mT) / 2

    def _total(self, output: torch.Tensor, target: Any) -> tuple[torch.Tensor, torch.Tensor]:
        leaf = output.detach().requires_grad_()
        return row_losses(self.loss, leaf, target).sum(), leaf


_KNOWN: list[tuple[tuple[Any, ...], Callable[[Any], Likelihood]]] = [
    (
        (nn.CrossEntropyLoss, F.cross_entropy),
        lambda loss: CrossEntropy(getattr(loss, "ignore_index", -100), class_axis=1),
    ),
    (
        (nn.NLLLoss, F.nll_loss),
        lambda loss: CrossEntropy(getattr(loss, "ignore_index", -100), class_axis=1, log_probabilities=True),
    ),
    ((nn.BCEWithLogitsLoss, F.binary_cross_entropy_with_logits), lambda loss: Bernoulli()),
    ((nn.BCELoss, F.binary_cross_entropy), lambda loss: Bernoulli(logits=False)),
    ((nn.MSELoss, F.mse_loss), lambda loss: SquaredError()),
]


def find_likelihood(loss: Loss, given: Likelihood | str | None) -> Likelihood | None:
    """The likelihood that was given, or the one behind a loss of torch; None for a loss that is not known."""
    if isinstance(given, Likelihood):
        return given
    if given is not None:
        found = neutral.likelihood_named(given)
        if isinstance(found, CrossEntropy):
            found.ignore_index = getattr(partial_options(loss), "ignore_index", found.ignore_index)
        return found
    plain = loss.func if isinstance(loss, partial) else loss
    for kinds, make in _KNOWN:
        for kind in kinds:
            if plain is kind or (isinstance(kind, type) and type(plain) is kind):
                options = partial_options(loss)
                return None if _reshaped(options) else make(options)
    return None


def _reshaped(options: Any) -> bool:
    """Class weights and smoothing make a loss that is no negative log-likelihood of one label."""
    weights = (getattr(options, name, None) for name in ("weight", "pos_weight"))
    return any(w is not None for w in weights) or bool(getattr(options, "label_smoothing", 0.0))


def fisher_cotangents(
    likelihood: Likelihood | None, loss: Loss, output: Any, target: Any, fisher: str, draws: Sequence[Draw]
) -> Iterator[torch.Tensor]:
    """Cotangents whose summed v v^T is (or estimates) each row's output Hessian; see `Likelihood`."""
    return neutral.fisher_cotangents(likelihood, TorchOutputLoss(loss), output, target, fisher, draws)


def ggn_cotangents(likelihood: Likelihood | None, loss: Loss, output: Any, target: Any) -> list[torch.Tensor] | None:
    """Cotangents whose summed v v^T is exactly each row's output Hessian; see `gradients.likelihoods`."""
    return neutral.ggn_cotangents(likelihood, TorchOutputLoss(loss), output, target)
