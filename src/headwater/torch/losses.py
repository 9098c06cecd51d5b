"""The loss of one row.

The loss of a row is the loss function's value on that row alone; a loss that is not reduced is summed over its entries.
So "mean", "sum" and "none" give the same number for a row of one term; for a row of several terms (tokens, outputs)
the user's own reduction over them is kept.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.utils._pytree import tree_map

from headwater.errors import InvalidInput, NonFiniteValue, UnsupportedLoss
from headwater.gradients.identity import name_of
from headwater.gradients.rowwise import Slopes, explain_loss_failure, is_weighted_sum
from headwater.gradients.spreading import spread_in_words
from headwater.torch.surroundings import quiet
from headwater.torch.tree import tensors_in, with_tensors

Loss = Callable[[Any, Any], torch.Tensor]

LOSSES: dict[str, Callable[[], Loss]] = {
    "cross_entropy": nn.CrossEntropyLoss,
    "binary_cross_entropy": nn.BCEWithLogitsLoss,
    "mse": nn.MSELoss,
}
"""Losses that a word names."""


@runtime_checkable
class RowLosses(Protocol):
    """A loss that gives the rows' own losses itself: [n]."""

    def row_losses(self, output: object, target: object, /) -> torch.Tensor: ...


def row_losses(loss: Loss, output: object, target: object) -> torch.Tensor:
    """The loss of each row on its own: [n]. One vectorised call where the loss allows it, else row by row.

    A loss may say so itself, with a method `row_losses(output, target)`.
    Errors: InvalidInput where the loss fails on these outputs and targets.
    """
    with explain_failure(output, target):
        if isinstance(loss, RowLosses):
            return loss.row_losses(output, target)
        if isinstance(output, torch.Tensor) and isinstance(target, torch.Tensor):
            _refuse_spreading(loss, output, target)
            found = _torch_row_losses(loss, output, target)
            if found is not None:
                return found
        return _any_row_losses(loss, output, target)


def _refuse_spreading(loss: Loss, output: torch.Tensor, target: torch.Tensor) -> None:
    """Errors: InvalidInput for torch's losses of terms on shapes that they would spread over one another, and warn."""
    if output.shape == target.shape:
        return
    plain: Any = loss.func if isinstance(loss, partial) else loss
    if plain in (*_TERMWISE, F.poisson_nll_loss) or isinstance(plain, (*_TERMWISE_MODULES, nn.PoissonNLLLoss)):
        said = spread_in_words(output.shape, target.shape)
        if said is not None:
            raise InvalidInput(said)


def _any_row_losses(loss: Loss, output: object, target: object) -> torch.Tensor:
    outputs = tensors_in(output)

    def one(o: list[torch.Tensor], t: object) -> torch.Tensor:
        # A row is a batch of one: a loss may look at the number of axes.
        alone = with_tensors(output, (v.unsqueeze(0) for v in o))  # None, numbers and words stay as they are
        return _scalar(loss(alone, tree_map(lambda v: v.unsqueeze(0), t)))

    try:
        with quiet():
            return torch.func.vmap(one)(outputs, target)
    except Exception:  # of many kinds; what is really wrong is raised again below
        pick = [tree_map(lambda v, k=k: v[k], (outputs, target)) for k in range(len(outputs[0]))]
        return torch.stack([one(o, t) for o, t in pick])


def slopes_at(loss: Loss, output: object, target: object) -> list[torch.Tensor]:
    """The gradient of the rows' losses by each floating tensor of the output: [n, ...] each."""
    with torch.enable_grad():
        everything = [tensor.detach() for tensor in tensors_in(output)]
        leaves = [tensor.requires_grad_() for tensor in everything if tensor.is_floating_point()]
        total = row_losses(loss, with_tensors(output, iter(everything)), target).sum()
        if not total.requires_grad:
            return [torch.zeros_like(leaf) for leaf in leaves]
        return list(torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True))


def explain_failure(output: object, target: object) -> AbstractContextManager[None]:
    """Errors: InvalidInput that says what the loss was called with, for whatever the loss raises."""
    return explain_loss_failure(
        lambda: (
            f"output {_describe(output)} and target {_describe(target)}; a loss is called on batches and on rows "
            f"alone.{_spread(output, target)}"
        )
    )


def _spread(output: Any, target: Any) -> str:
    """What to do about shapes that do not go together, if that is it."""
    both = isinstance(output, torch.Tensor) and isinstance(target, torch.Tensor)
    said = spread_in_words(output.shape, target.shape) if both else None
    return "" if said is None else f" {said}"


def _describe(value: object) -> str:
    return ", ".join(f"{tuple(t.shape)} of {t.dtype}" for t in tensors_in(value)) or repr(value)[:60]


_TERMWISE = (F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss, F.binary_cross_entropy)
_TERMWISE_MODULES = (nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss, nn.BCELoss, nn.BCEWithLogitsLoss)
_WEIGHTED = (*_TERMWISE, F.binary_cross_entropy_with_logits)
_WEIGHTED_MODULES = (nn.BCELoss, nn.BCEWithLogitsLoss)
_CLASSES = (F.cross_entropy, F.nll_loss)
_CLASSES_MODULES = (nn.CrossEntropyLoss, nn.NLLLoss)


def _torch_row_losses(loss: Loss, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor | None:
    """Torch's own losses unreduced, then reduced row by row as they would have been; None for any other loss."""
    plain: Any = loss.func if isinstance(loss, partial) else loss
    options = loss.keywords if isinstance(loss, partial) else {}
    _check_weights(loss, plain, output, target)
    of_classes = plain in _CLASSES or type(plain) in _CLASSES_MODULES
    if not (of_classes or plain in _WEIGHTED or type(plain) in _TERMWISE_MODULES):
        return None
    if not of_classes and output.shape != target.shape:
        return None
    if isinstance(plain, nn.Module):
        reduction, unreduced = plain.reduction, copy.copy(plain)
        unreduced.reduction = "none"  # type: ignore[assignment]
        terms = unreduced(output, target)
    elif "reduce" in options or "size_average" in options or (isinstance(loss, partial) and loss.args):
        return None
    else:
        reduction = options.get("reduction", "mean")
        # Unreduced in one call; the row's own reduction follows, as the loss would do on that row alone.
        terms = plain(output, target, **{**options, "reduction": "none"})
    terms = terms.reshape(len(output), -1)
    # "none", too: a row's loss is then the sum of its terms.
    if reduction != "mean":
        return terms.sum(1)
    if not of_classes or target.is_floating_point():
        return terms.mean(1)
    ignored = option(plain, "ignore_index", options.get("ignore_index", -100))
    # Torch divides by the targets that are not ignored; a row with none gives NaN, as alone, and is named.
    return terms.sum(1) / (target.reshape(len(target), -1) != ignored).sum(1)


def _scalar(value: object) -> torch.Tensor:
    if not isinstance(value, torch.Tensor):
        raise UnsupportedLoss(f"The loss returned {type(value).__name__}; expected a tensor.")
    return value.sum()


def check_finite(losses: torch.Tensor) -> None:
    """Errors: NonFiniteValue naming the rows."""
    if not torch.isfinite(losses.detach().sum()):
        losses = losses.detach()
        bad = (~torch.isfinite(losses)).nonzero()[:, 0].tolist()
        raise NonFiniteValue(
            f"The loss is not finite for rows {bad[:5]} of this batch (values {[float(losses[k]) for k in bad[:5]]}): "
            "look for NaN or infinity in these inputs, or for a row without any target.",
            bad,
        )


def check_loss(loss: Loss) -> None:
    """Errors: UnsupportedLoss where a row alone means something else than in its batch, as far as the loss says it;
    InvalidInput for what is no loss.
    """
    given: Any = loss  # whatever its type says
    if isinstance(given, type) and issubclass(given, nn.Module):
        raise InvalidInput(f"The loss is the class {given.__name__}; pass an instance of it: {given.__name__}().")
    if not callable(loss):
        raise InvalidInput(
            f"The loss is {loss!r:.60}; expected a function of (output, target), such as torch.nn.CrossEntropyLoss()."
        )
    plain: Any = loss.func if isinstance(loss, partial) else loss
    if isinstance(plain, nn.NLLLoss) or plain is F.nll_loss:
        _refuse_weighted_mean(loss, plain)


def _check_weights(loss: Loss, plain: object, output: torch.Tensor, target: torch.Tensor) -> None:
    """Errors: UnsupportedLoss for weights that a row loses, or that it cannot tell its own of, when it is alone."""
    if isinstance(plain, nn.CrossEntropyLoss) or plain is F.cross_entropy:
        if not target.is_floating_point():  # a mean over probabilities is one over rows
            _refuse_weighted_mean(loss, plain)
    elif plain in _WEIGHTED or isinstance(plain, _WEIGHTED_MODULES):
        for name in ("weight", "pos_weight"):
            weight = option(loss, name)
            if weight is not None and weight.ndim >= output.ndim and weight.shape[0] != 1:
                raise UnsupportedLoss(
                    f"{name_of(plain)}({name}=...) of shape {tuple(weight.shape)} has numbers for the rows of "
                    f"one batch, of outputs {tuple(output.shape)}, so that a row on its own has none. Give the rows' "
                    "weights with their batch: TorchBatch(x, y, weights=...)."
                )


def _refuse_weighted_mean(loss: Loss, plain: object) -> None:
    if option(loss, "weight") is not None and option(loss, "reduction", "mean") == "mean":
        raise UnsupportedLoss(
            f"{name_of(plain)}(weight=..., reduction='mean') divides by the batch's total class weight, so a row on "
            "its own has no weight. Use reduction='sum': a row's loss is then its class weight times its cross entropy."
        )


def normalisation(loss: Loss, output: Any, target: Any, what: str = "loss") -> str:
    """How the loss treats several rows: "mean", "sum", "none", "per token", or "weighted mean" of its rows' losses.

    Errors: UnsupportedLoss if the batch's loss is no weighted sum of the rows' losses (a contrastive loss, say).
    """
    rows = row_losses(loss, output, target)
    with explain_failure(output, target):
        value = loss(output, target)
    if value.numel() > 1:
        _refuse_more_terms(loss, output, target, value.numel())
        return "none" if value.numel() == len(rows) else "per token"
    # Batch and rows add up in another order, and may be in half precision.
    eps = torch.finfo(value.dtype).eps
    for name, reduced in (("mean", rows.mean()), ("sum", rows.sum())):
        if torch.allclose(value.reshape(()), reduced.to(value.dtype), rtol=min(1e3 * eps, 0.03), atol=eps):
            return name
    leaves = tensors_in(output)
    moving = [k for k, t in enumerate(leaves) if t.requires_grad]

    def slopes(at: Any) -> Slopes:
        given = [t.detach().requires_grad_() if k in moving else t for k, t in enumerate(at)]
        outputs, changed = [given[k] for k in moving], with_tensors(output, iter(given))
        found = []
        for value in (loss(changed, target).reshape(()), row_losses(loss, changed, target).sum()):
            grads = torch.autograd.grad(value, outputs, retain_graph=True, allow_unused=True, materialize_grads=True)
            found.append(torch.cat([g.reshape(len(rows), -1) for g in grads], dim=1).double().cpu().numpy())
        return found[0], found[1]

    # Weights of a weighted sum must not depend on the outputs: one row's output is moved, and the others' gradients
    # stay.
    moved = [
        [torch.cat([(t[:1] + share * t[-1:]) / 2, t[1:]]) if k in moving else t for k, t in enumerate(leaves)]
        for share in (0.0, 1.0)
    ]
    if is_weighted_sum(slopes(leaves), *map(slopes, moved)):
        return "weighted mean"
    raise UnsupportedLoss(
        f"The {what} of a batch is no weighted sum of its rows' own: rows act on each other inside the {what}, so a "
        f"row's own gradient has no meaning.{_spread(output, target)}"
    )


def _refuse_more_terms(loss: Loss, output: object, target: object, terms: int) -> None:
    """Errors: InvalidInput for an unreduced loss of a batch that has other terms than its rows alone: (N, N), say."""
    if not (isinstance(output, torch.Tensor) and isinstance(target, torch.Tensor)):
        return
    said = spread_in_words(output.shape, target.shape)
    if said is None:
        return
    alone = zip(output.split(1), target.split(1), strict=True)
    if terms != sum(loss(o, t).numel() for o, t in alone):
        raise InvalidInput(said)


def option(loss: Loss, name: str, default: object = None) -> Any:
    """What a loss was told: an attribute of a module, a keyword of a functools.partial, the default of a function."""
    return loss.keywords.get(name, default) if isinstance(loss, partial) else getattr(loss, name, default)
