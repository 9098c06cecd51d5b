"""Which distribution is behind a loss of torch; the likelihoods themselves are those of every framework."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from headwater.errors import UnsupportedLoss
from headwater.gradients import likelihoods as neutral
from headwater.gradients.identity import name_of
from headwater.gradients.likelihoods import FEW as FEW
from headwater.gradients.likelihoods import MOST as MOST
from headwater.gradients.likelihoods import Bernoulli as Bernoulli
from headwater.gradients.likelihoods import CrossEntropy as CrossEntropy
from headwater.gradients.likelihoods import Draw as Draw
from headwater.gradients.likelihoods import Elementwise as Elementwise
from headwater.gradients.likelihoods import Likelihood as Likelihood
from headwater.gradients.likelihoods import OutputHessian as OutputHessian
from headwater.gradients.likelihoods import OwnHessian as OwnHessian
from headwater.gradients.likelihoods import SquaredError as SquaredError
from headwater.gradients.likelihoods import TargetSampler as TargetSampler
from headwater.gradients.likelihoods import cotangent as cotangent
from headwater.torch.losses import Loss, option, row_losses


class TorchOutputLoss(neutral.OutputLoss[torch.Tensor]):
    """A loss of torch as a function of the output."""

    def __init__(self, loss: Loss):
        self.loss = loss
        self.name = name_of(loss)

    def gradient(self, output: torch.Tensor, target: object) -> torch.Tensor:
        return torch.autograd.grad(*self._total(output, target))[0]

    def hessian_row_sums(self, output: torch.Tensor, target: object) -> torch.Tensor:
        with self._twice():
            total, leaf = self._total(output, target)
            slope = torch.autograd.grad(total, leaf, create_graph=True)[0]
            return torch.autograd.grad(slope.sum(), leaf)[0] if slope.requires_grad else torch.zeros_like(output)

    def hessian(self, output: torch.Tensor, target: object) -> torch.Tensor:
        with self._twice():
            total, leaf = self._total(output, target)
            slope = torch.autograd.grad(total, leaf, create_graph=True)[0].reshape(len(output), -1)
            if not slope.requires_grad:
                return neutral.no_hessian(output)
            rows = [torch.autograd.grad(column.sum(), leaf, retain_graph=True)[0] for column in slope.unbind(1)]
        hessian = torch.stack([row.reshape(len(output), -1) for row in rows], dim=1)
        return (hessian + hessian.mT) / 2

    @contextmanager
    def _twice(self) -> Iterator[None]:
        """Errors: UnsupportedLoss for a loss whose backward pass torch cannot differentiate (CTC, multi-margin)."""
        try:
            with torch.enable_grad():
                yield
        except RuntimeError as error:
            raise UnsupportedLoss(
                f"{self.name} cannot be differentiated twice ({error}), so that its curvature is not to be had. Use "
                "fisher='empirical', hw.Dual() or hw.DataInf(), which need gradients alone."
            ) from error

    def _total(self, output: torch.Tensor, target: object) -> tuple[torch.Tensor, torch.Tensor]:
        leaf = output.detach().requires_grad_()
        return row_losses(self.loss, leaf, target).sum(), leaf


_KNOWN: list[tuple[tuple[Any, ...], Callable[[Any], Likelihood]]] = [
    (
        (nn.CrossEntropyLoss, F.cross_entropy),
        lambda loss: CrossEntropy(option(loss, "ignore_index", -100), class_axis=1),
    ),
    (
        (nn.NLLLoss, F.nll_loss),
        lambda loss: CrossEntropy(option(loss, "ignore_index", -100), class_axis=1, log_probabilities=True),
    ),
    ((nn.BCEWithLogitsLoss, F.binary_cross_entropy_with_logits), lambda loss: Bernoulli()),
    ((nn.BCELoss, F.binary_cross_entropy), lambda loss: Bernoulli(logits=False)),
    ((nn.MSELoss, F.mse_loss), lambda loss: SquaredError()),
    ((nn.KLDivLoss, F.kl_div), lambda loss: CrossEntropy(log_probabilities=True)),
    (
        (
            *(nn.HuberLoss, nn.SmoothL1Loss, nn.PoissonNLLLoss, nn.SoftMarginLoss),
            *(F.huber_loss, F.smooth_l1_loss, F.poisson_nll_loss, F.soft_margin_loss),
        ),
        lambda loss: Elementwise(),
    ),
]


def find_likelihood(loss: Loss, given: Likelihood | str | None) -> Likelihood:
    """The likelihood that was given, or the one behind a loss of torch; for any other loss its own output Hessian."""
    if isinstance(given, Likelihood):
        return given
    if given is not None:
        found = neutral.likelihood_named(given)
        if isinstance(found, CrossEntropy):
            found.ignore_index = option(loss, "ignore_index", found.ignore_index)
        return found
    plain = loss.func if isinstance(loss, partial) else loss
    for kinds, make in _KNOWN:
        for kind in kinds:
            if plain is kind or (isinstance(kind, type) and type(plain) is kind):
                return make(loss)
    return OwnHessian()


def fisher_cotangents(
    likelihood: Likelihood | None, loss: Loss, output: object, target: object, fisher: str, draws: Sequence[Draw]
) -> Iterator[torch.Tensor]:
    """Cotangents whose summed v v^T is (or estimates) each row's output Hessian; see `Likelihood`."""
    return neutral.fisher_cotangents(likelihood, TorchOutputLoss(loss), output, target, fisher, draws)


def ggn_cotangents(
    likelihood: Likelihood | None, loss: Loss, output: object, target: object
) -> list[torch.Tensor] | None:
    """Cotangents whose summed v v^T is exactly each row's output Hessian; see `gradients.likelihoods`."""
    return neutral.ggn_cotangents(likelihood, TorchOutputLoss(loss), output, target)
