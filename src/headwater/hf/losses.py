"""The loss of a row of tokens, and the distribution of labels behind it.

Labels stand at their own positions, as Hugging Face has them: [n, t], -100 where there is none. A causal language model
says at position t - 1 what it expects at t, so its labels are ahead of its outputs by one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F  # noqa: N812

from headwater.arrays import Array
from headwater.errors import InvalidSetting, UnsupportedModel
from headwater.gradients.likelihoods import CrossEntropy, Draw, Likelihood, OutputLoss

IGNORED = -100
"""The label of a position that has none."""

PerToken = Literal["mean", "sum"]


@dataclass(frozen=True)
class TokenLoss:
    """The cross entropy of a row's labels: their mean, or their sum.

    Shapes: logits [n, t, classes], labels [n, t]; the result is [n].
    Units: nats per label, or nats. "mean" is what a model reports for a row by itself, and gives every row the same
    weight; with "sum" a long row weighs more. A row without labels has a mean of NaN.
    """

    ahead: bool
    """Whether labels are one position ahead of outputs."""
    per_token: PerToken = "mean"
    """How a row's labels are reduced."""

    def __post_init__(self) -> None:
        if self.per_token not in get_args(PerToken):
            raise InvalidSetting(f"per_token is {self.per_token!r}; expected 'mean' or 'sum'.")

    def __call__(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.row_losses(logits, labels)

    def row_losses(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """[n]."""
        total = self._each(logits, labels).sum(1)
        return total / self._count(labels) if self.per_token == "mean" else total

    def terms(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """What each label adds to its row's loss, at the label's own position; zero where there is none: [n, t]."""
        each = self._each(logits, labels)
        each = each / self._count(labels).unsqueeze(1) if self.per_token == "mean" else each
        return F.pad(each, (1, 0)) if self.ahead else each

    def _each(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        outputs, targets = (logits[:, :-1], labels[:, 1:]) if self.ahead else (logits, labels)
        flat = F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), reduction="none", ignore_index=IGNORED)
        return flat.reshape(targets.shape)

    def _count(self, labels: torch.Tensor) -> torch.Tensor:
        return (labels[:, self.ahead :] != IGNORED).sum(1)


class NextToken(Likelihood):
    """Cross entropy where labels are one position ahead of outputs."""

    def __init__(self) -> None:
        self.beside = CrossEntropy(IGNORED, class_axis=-1)

    def exact(self, loss: OutputLoss, output: Array, target: Any) -> list[Array] | None:
        return self.beside.exact(_Behind(loss), output, _moved(target, -1))

    def sampled(self, loss: OutputLoss, output: Array, target: Any, draw: Draw) -> Array:
        return self.beside.sampled(_Behind(loss), output, _moved(target, -1), draw)

    def predicted(self, output: Array, target: Any) -> Array:
        """Errors: UnsupportedModel: a continuation is several tokens, each after those before it."""
        raise UnsupportedModel(
            'explain="prediction": what a causal language model says is a text, and the likeliest token after each of '
            "the row's own tokens is none. Let it generate, and give prompt and answer as the query's row, with labels "
            f'{IGNORED} at the prompt and explain="label": that is "why did it say this?".'
        )


class _Behind(OutputLoss[torch.Tensor]):
    """A loss as a function of targets that stand beside their outputs: they are put back where they belong."""

    def __init__(self, loss: OutputLoss[torch.Tensor]):
        self.loss = loss
        self.name = loss.name

    def gradient(self, output: torch.Tensor, target: Any) -> torch.Tensor:
        return self.loss.gradient(output, _moved(target, 1))

    def hessian_row_sums(self, output: torch.Tensor, target: Any) -> torch.Tensor:
        return self.loss.hessian_row_sums(output, _moved(target, 1))

    def hessian(self, output: torch.Tensor, target: Any) -> torch.Tensor:
        return self.loss.hessian(output, _moved(target, 1))


def _moved(labels: torch.Tensor, by: int) -> torch.Tensor:
    """Labels [n, t] moved along their row, -100 where none arrives."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED) if by < 0 else F.pad(labels[:, :-1], (1, 0), value=IGNORED)
