"""What can be explained in place of the loss: each row's own number, better when lower, as losses are.

Outputs are logits [n, classes] with integer targets [n], or one logit a row, [n] or [n, 1], with targets 0 and 1.
"""

from __future__ import annotations

from typing import Any

import torch

from headwater.errors import UnsupportedModel


def negative_margin(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Minus log p/(1-p), p the probability of the target: [n]. The chance of another answer is its sigmoid."""
    classes, labels = _read(output, target, "margin")
    if classes.shape[1] == 1:
        return -_signed(classes, labels)
    chosen = labels.unsqueeze(1)
    others = classes.scatter(1, chosen, -torch.inf).logsumexp(1)
    return others - classes.gather(1, chosen)[:, 0]


def negative_logit(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Minus the target's logit; with one logit a row, its sign is that of the target: [n]."""
    classes, labels = _read(output, target, "logit")
    if classes.shape[1] == 1:
        return -_signed(classes, labels)
    return -classes.gather(1, labels.unsqueeze(1))[:, 0]


def _signed(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return logits[:, 0] * (2 * labels - 1).to(logits.dtype)


def _read(output: Any, target: Any, what: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [n, classes], or [n, 1], and integer targets [n]."""
    if isinstance(output, torch.Tensor) and isinstance(target, torch.Tensor):
        one = output.ndim == 1 or (output.ndim == 2 and output.shape[1] == 1)
        if one and target.numel() == len(output):
            return output.reshape(-1, 1), target.reshape(-1)
        if output.ndim == 2 and target.ndim == 1 and not target.is_floating_point():
            return output, target.long()
    shapes = [tuple(getattr(v, "shape", ())) for v in (output, target)]
    raise UnsupportedModel(
        f"A row has no {what}: that needs logits (rows, classes) with integer targets (rows,), or one logit a row with "
        f"targets 0 and 1; the output is {shapes[0]}, the target {shapes[1]}. Give a measurement of your own."
    )
