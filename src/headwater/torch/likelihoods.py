"""The distribution of targets behind a loss: what the Fisher information averages over.

A likelihood gives cotangents of the output [n, ...], v, such that the sum (or the mean over draws) of v v^T is the
Hessian of the row's loss with respect to the row's output.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from headwater.errors import InvalidSetting, UnsupportedLoss
from headwater.torch.losses import Loss, partial_options, row_losses

FEW = 16
"""As many classes or outputs are enumerated under fisher="auto"; beyond, labels are sampled."""

MOST = 64
"""Outputs of a row up to which its GGN is kept as one gradient for each output."""

Draw = Callable[[int, bool], torch.Tensor]
"""(numbers per row, normal?) -> uniform or standard normal numbers [n, count], fixed by row, seed and draw."""


class Likelihood(ABC):
    """The distribution of targets behind a loss: what the Fisher information averages over.

    Both methods give cotangents of the output [n, ...], v, such that the mean (or sum) of v v^T is the Hessian of the
    row's loss with respect to the output.
    """

    @abstractmethod
    def exact(self, loss: Loss, output: torch.Tensor, target: Any) -> list[torch.Tensor] | None:
        """Cotangents whose summed v v^T is exactly it; None where a row has several targets."""

    @abstractmethod
    def sampled(self, loss: Loss, output: torch.Tensor, target: Any, draw: Draw) -> torch.Tensor:
        """One cotangent, with v v^T right on average."""


def cotangent(loss: Loss, output: torch.Tensor, target: Any) -> torch.Tensor:
    """The gradient of the rows' losses with respect to the output: [n, ...]."""
    leaf = output.detach().requires_grad_()
    return torch.autograd.grad(row_losses(loss, leaf, target).sum(), leaf)[0]


def loss_scale(slope: torch.Tensor, residual: torch.Tensor, dim: tuple[int, ...] = ()) -> torch.Tensor:
    """c, where the loss's gradient is c times that of the negative log-likelihood; `dim`: the axes of one target."""
    along, size = slope * residual, residual**2
    if dim:
        along, size = along.sum(dim), size.sum(dim)
    return along / size.clamp(min=torch.finfo(size.dtype).tiny)


def check_scale(name: str, slope: torch.Tensor, expected: torch.Tensor, scale: torch.Tensor) -> None:
    """Errors: UnsupportedLoss if the gradient at the data's own targets is not `expected`: another likelihood."""
    tolerance = 1e4 * torch.finfo(slope.dtype).eps
    gap = float((slope - expected).abs().max()) if slope.numel() else 0.0
    if gap > tolerance * float(scale.abs().max()) or bool((scale < 0).any()):
        raise UnsupportedLoss(
            f"The loss is no positive multiple of the {name} of one target (its gradient is off by {gap:g}): class "
            "weights, smoothing, or another loss. Give an OutputHessian or a TargetSampler, or fisher='empirical'."
        )


class CrossEntropy(Likelihood):
    """Integer classes; the loss may be any positive multiple of the cross entropy, another for each target.

    Where the target is `ignore_index` there is none. `class_axis` of the output: -1 or 1; None for whichever the
    target lacks. `log_probabilities` if the output already is that (NLLLoss).
    """

    def __init__(self, ignore_index: int = -100, *, class_axis: int | None = None, log_probabilities: bool = False):
        self.ignore_index = ignore_index
        self.class_axis = class_axis
        self.log_probabilities = log_probabilities

    def _residual(self, p: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The gradient of -log p(label), classes last; for ignored targets it means nothing."""
        hit = torch.zeros_like(p).scatter_(-1, labels.clamp(0, p.shape[-1] - 1).unsqueeze(-1), 1.0)
        return -hit if self.log_probabilities else p - hit

    def _scaled(self, loss: Loss, output: torch.Tensor, target: Any) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Probabilities [..., C], the root of the loss's scale [...] (zero where ignored), and the axis of the classes.

        The scale is measured at each target's least likely class, where the gradient is largest.
        """
        axis = _class_axis(output, target, self.class_axis)
        moved = output.detach().movedim(axis, -1)
        p = moved.exp() if self.log_probabilities else moved.softmax(-1)
        kept, allowed = target != self.ignore_index, p.clone()
        if 0 <= self.ignore_index < p.shape[-1]:
            allowed[..., self.ignore_index] = torch.inf
        far = torch.where(kept, allowed.argmin(-1), target)
        slope = cotangent(loss, output, far).movedim(axis, -1)
        scale = torch.where(kept, loss_scale(slope, self._residual(p, far), (-1,)), 0.0)
        own = cotangent(loss, output, target).movedim(axis, -1)
        check_scale("cross entropy", own, self._residual(p, target) * scale.unsqueeze(-1), scale)
        return p, scale.clamp(min=0).sqrt(), axis

    def exact(self, loss: Loss, output: torch.Tensor, target: Any) -> list[torch.Tensor] | None:
        p, root, axis = self._scaled(loss, output, target)
        if target.numel() != len(target):
            return None
        classes = (torch.full_like(target, c) for c in range(p.shape[-1]))
        return [
            (self._residual(p, label) * (root * p[..., c].sqrt()).unsqueeze(-1)).movedim(-1, axis)
            for c, label in enumerate(classes)
        ]

    def sampled(self, loss: Loss, output: torch.Tensor, target: Any, draw: Draw) -> torch.Tensor:
        p, root, axis = self._scaled(loss, output, target)
        u = draw(target.numel() // max(1, len(target)), False).reshape(target.shape)
        below = p.double().cumsum(-1) < u.unsqueeze(-1) * p.double().sum(-1, keepdim=True)
        labels = below.sum(-1).clamp_(max=p.shape[-1] - 1)
        return (self._residual(p, labels) * root.unsqueeze(-1)).movedim(-1, axis)


def _class_axis(output: torch.Tensor, target: Any, given: int | None) -> int:
    """The axis of the classes, which the target lacks."""
    shape, wanted = tuple(output.shape), tuple(getattr(target, "shape", ()))
    axes = {len(shape) - 1, 1} if given is None else {given % len(shape)}
    fitting = [axis for axis in axes if shape[:axis] + shape[axis + 1 :] == wanted]
    if not isinstance(target, torch.Tensor) or target.is_floating_point() or not fitting:
        raise UnsupportedLoss(
            f"Cross entropy needs integer classes of the output's shape without its class axis; the output is {shape}, "
            f"the target {wanted} of {getattr(target, 'dtype', type(target).__name__)}. For another loss, give its "
            "likelihood."
        )
    if len(fitting) > 1:
        raise UnsupportedLoss(
            f"The classes of an output of shape {shape} may be on axis 1 or {len(shape) - 1}; give "
            "likelihood=CrossEntropy(class_axis=...)."
        )
    return fitting[0]


class Bernoulli(Likelihood):
    """Independent yes / no targets of the output's shape; the output is a logit, or a probability (BCELoss).

    The loss may be any positive multiple of the binary cross entropy, another for each target.
    """

    def __init__(self, logits: bool = True):
        self.logits = logits

    def _residual(self, p: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The gradient of -log p(target)."""
        return p - target if self.logits else (p - target) / self._variance(p)

    def _variance(self, p: torch.Tensor) -> torch.Tensor:
        return (p * (1 - p)).clamp(min=torch.finfo(p.dtype).eps)

    def _scaled(self, loss: Loss, output: torch.Tensor, target: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Probabilities, and the root of the loss's scale, measured at the less likely answers; the output's shape."""
        p = output.detach().sigmoid() if self.logits else output.detach()
        far = (p < 0.5).to(target.dtype)
        scale = loss_scale(cotangent(loss, output, far), self._residual(p, far))
        own = cotangent(loss, output, target)
        check_scale("binary cross entropy", own, self._residual(p, target) * scale, scale)
        return p, scale.clamp(min=0).sqrt()

    def exact(self, loss: Loss, output: torch.Tensor, target: Any) -> list[torch.Tensor] | None:
        p, root = self._scaled(loss, output, target)
        if output.ndim > 2:
            return None
        spread = self._variance(p).sqrt() if self.logits else 1 / self._variance(p).sqrt()
        return one_by_one(root * spread)

    def sampled(self, loss: Loss, output: torch.Tensor, target: Any, draw: Draw) -> torch.Tensor:
        p, root = self._scaled(loss, output, target)
        u = draw(output.numel() // max(1, len(output)), False).reshape(output.shape)
        return self._residual(p, (u < p).to(p.dtype)) * root


def one_by_one(values: torch.Tensor) -> list[torch.Tensor]:
    """[n, K] as K arrays that hold one column each, and zero elsewhere; [n] as one."""
    flat = values.reshape(len(values), -1)
    unit = torch.eye(flat.shape[1], dtype=flat.dtype, device=flat.device)
    return [(flat * row).reshape(values.shape) for row in unit]


class SquaredError(Likelihood):
    """Gaussian targets of the output's shape; the variance follows from the loss's own scale."""

    def _root_curvature(self, loss: Loss, output: torch.Tensor, target: Any) -> torch.Tensor:
        leaf = output.detach().requires_grad_()
        slope = torch.autograd.grad(row_losses(loss, leaf, target).sum(), leaf, create_graph=True)[0]
        return torch.autograd.grad(slope.sum(), leaf)[0].clamp_(min=0).sqrt()

    def exact(self, loss: Loss, output: torch.Tensor, target: Any) -> list[torch.Tensor] | None:
        if output.ndim > 2:
            return None
        return one_by_one(self._root_curvature(loss, output, target))

    def sampled(self, loss: Loss, output: torch.Tensor, target: Any, draw: Draw) -> torch.Tensor:
        noise = draw(output.numel() // max(1, len(output)), True).reshape(output.shape)
        return self._root_curvature(loss, output, target) * noise.to(output.dtype)


class OutputHessian(Likelihood):
    """Any loss whose Hessian with respect to a row's flattened output the user gives.

    `hessian(output, target)`: [n, K, K], symmetric positive semi-definite, K numbers of output per row.
    """

    def __init__(self, hessian: Callable[[torch.Tensor, Any], torch.Tensor]):
        self.hessian = hessian

    def _root(self, output: torch.Tensor, target: Any) -> torch.Tensor:
        values, vectors = torch.linalg.eigh(self.hessian(output.detach(), target))
        size = output.numel() // max(1, len(output))
        if vectors.shape != (len(output), size, size):
            raise InvalidSetting(f"The output Hessian is {tuple(vectors.shape)}; expected {(len(output), size, size)}.")
        if bool((values < -1e-6 * values.abs().amax()).any()):
            raise InvalidSetting(f"The output Hessian has a negative eigenvalue, {float(values.min()):g}.")
        return vectors * values.clamp(min=0).sqrt().unsqueeze(-2)

    def exact(self, loss: Loss, output: torch.Tensor, target: Any) -> list[torch.Tensor] | None:
        root = self._root(output, target)
        return [root[:, :, k].reshape(output.shape) for k in range(root.shape[2])]

    def sampled(self, loss: Loss, output: torch.Tensor, target: Any, draw: Draw) -> torch.Tensor:
        root = self._root(output, target)
        noise = draw(root.shape[2], True).to(root.dtype)
        return (root @ noise.unsqueeze(-1)).reshape(output.shape)


class TargetSampler(Likelihood):
    """Any loss whose targets the user samples: `sample(output, uniforms [n, K])` gives targets for the loss.

    K is the number of outputs per row. The targets must follow the distribution whose negative logarithm the loss is.
    """

    def __init__(self, sample: Callable[[torch.Tensor, torch.Tensor], Any]):
        self.sample = sample

    def exact(self, loss: Loss, output: torch.Tensor, target: Any) -> list[torch.Tensor] | None:
        return None

    def sampled(self, loss: Loss, output: torch.Tensor, target: Any, draw: Draw) -> torch.Tensor:
        uniforms = draw(output.numel() // max(1, len(output)), False)
        return cotangent(loss, output, self.sample(output.detach(), uniforms))


_NAMES: dict[str, Callable[[], Likelihood]] = {
    "cross_entropy": CrossEntropy,
    "binary_cross_entropy": Bernoulli,
    "squared_error": SquaredError,
}
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
        if given not in _NAMES:
            raise InvalidSetting(f"likelihood is {given!r}; expected one of {list(_NAMES)}, or a Likelihood.")
        found = _NAMES[given]()
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
    likelihood: Likelihood | None,
    loss: Loss,
    output: Any,
    target: Any,
    fisher: str,
    draws: Sequence[Draw],
) -> Iterator[torch.Tensor]:
    """Cotangents whose summed v v^T is (or estimates) each row's output Hessian; see `Likelihood`."""
    if fisher not in ("auto", "exact", "sampled", "empirical"):
        raise InvalidSetting(f"fisher is {fisher!r}; expected 'auto', 'exact', 'sampled' or 'empirical'.")
    if fisher == "empirical":
        yield cotangent(loss, output, target)
        return
    if likelihood is None or not isinstance(output, torch.Tensor):
        what = (
            type(output).__name__
            if not isinstance(output, torch.Tensor)
            else getattr(loss, "__name__", type(loss).__name__)
        )
        raise UnsupportedLoss(
            f"The Fisher information needs the distribution behind the loss, which is not known for {what}. Give "
            "likelihood='cross_entropy', 'binary_cross_entropy' or 'squared_error', an OutputHessian, a TargetSampler, "
            "or ask for fisher='empirical'."
        )
    few = fisher == "auto" and output.numel() <= FEW * len(output)
    found = likelihood.exact(loss, output, target) if fisher == "exact" or few else None
    if found is not None:
        yield from found
        return
    if fisher == "exact":
        raise UnsupportedLoss(
            "fisher='exact' enumerates the targets of a row, which needs one target per row and a likelihood that "
            "can be enumerated. Use fisher='sampled'."
        )
    for draw in draws:
        yield likelihood.sampled(loss, output, target, draw) / math.sqrt(len(draws))


def ggn_cotangents(likelihood: Likelihood | None, loss: Loss, output: Any, target: Any) -> list[torch.Tensor] | None:
    """Cotangents whose summed v v^T is exactly each row's output Hessian, for any loss of few outputs; else None.

    None also where the loss is not convex in the output: then the GGN has no such root.
    """
    if not isinstance(output, torch.Tensor) or output.numel() > MOST * len(output):
        return None
    if likelihood is not None:
        try:
            found = likelihood.exact(loss, output, target)
        except UnsupportedLoss:
            found = None
        if found is not None:
            return found
    values, vectors = torch.linalg.eigh(_output_hessian(loss, output, target))
    if bool((values < -1e3 * torch.finfo(values.dtype).eps * values.abs().amax()).any()):
        return None
    root = vectors * values.clamp(min=0).sqrt().unsqueeze(-2)
    return [root[:, :, k].reshape(output.shape) for k in range(root.shape[2])]


def _output_hessian(loss: Loss, output: torch.Tensor, target: Any) -> torch.Tensor:
    """The Hessian of each row's loss by its flattened output: [n, K, K]."""
    size = output.numel() // len(output)
    with torch.enable_grad():
        leaf = output.detach().reshape(len(output), size).requires_grad_()
        losses = row_losses(loss, leaf.reshape(output.shape), target)
        slope = torch.autograd.grad(losses.sum(), leaf, create_graph=True)[0]
        if not slope.requires_grad:  # a loss that is linear in its output
            return leaf.new_zeros((len(leaf), size, size))
        rows = [torch.autograd.grad(slope[:, k].sum(), leaf, retain_graph=True)[0] for k in range(size)]
    hessian = torch.stack(rows, dim=1)
    return (hessian + hessian.mT) / 2
