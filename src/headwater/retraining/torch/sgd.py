"""Stochastic gradient descent as both trainers do it: its settings, its step, and the rows that a model visits."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor

from headwater.errors import InvalidSetting
from headwater.retraining.settings import check_counts


@dataclass(frozen=True)
class Sgd:
    """SGD with momentum on a mean of row losses plus l2 / 2 times the squared norm of the trained parameters.

    Errors: InvalidSetting for numbers of steps and rows below one, and for a checkpoint that is no step.
    """

    steps: int
    """Of every model, whatever rows it keeps."""
    batch_size: int = 64
    """Rows of a step."""
    lr: float = 0.1
    """The learning rate of the first step."""
    momentum: float = 0.9
    l2: float = 0.0
    """In units of the mean loss."""
    decay: bool = True
    """Whether the learning rate falls to zero, along a cosine."""
    checkpoints: Collection[int] = ()
    """Steps before which the parameters are kept: 0 to steps - 1."""

    def __post_init__(self) -> None:
        check_counts(steps=self.steps, batch_size=self.batch_size)
        if not all(0 <= step < self.steps for step in self.checkpoints):
            raise InvalidSetting(
                f"checkpoints are {list(self.checkpoints)}; expected steps from 0 to {self.steps - 1}."
            )

    @property
    def wanted(self) -> list[int]:
        """The checkpoints in the order of the steps, each once."""
        return sorted(set(self.checkpoints))

    def rate(self, step: int) -> float:
        """The learning rate of this step."""
        return self.lr * (1 + math.cos(math.pi * step / self.steps)) / 2 if self.decay else self.lr

    def move(self, step: int, moved: Iterable[tuple[Tensor, Tensor, Tensor]]) -> None:
        """Take this step with each (parameter, velocity, gradient of the mean loss), in place."""
        rate = self.rate(step)
        for parameter, velocity, gradient in moved:
            velocity.mul_(self.momentum).add_(gradient).add_(parameter, alpha=self.l2)
            parameter.sub_(velocity, alpha=rate)

    def visited_rows(self, keep: Tensor, generator: torch.Generator) -> Tensor:
        """The rows that a model visits, [steps, batch]: shuffles of all rows, without those that it does not keep."""
        count = self.steps * self.batch_size
        shuffles = (torch.randperm(len(keep), generator=generator) for _ in range(-(-count // int(keep.sum()))))
        return torch.cat([shuffle[keep[shuffle]] for shuffle in shuffles])[:count].view(self.steps, self.batch_size)


class SgdFields(TypedDict, total=False):
    """The fields of `Sgd`, as a trainer takes them by name."""

    steps: int
    batch_size: int
    lr: float
    momentum: float
    l2: float
    decay: bool
    checkpoints: Collection[int]


def check_models(seeds: Sequence[int], side_by_side: int) -> None:
    """Errors: InvalidSetting for no seeds, and for no models at once."""
    if not len(seeds):
        raise InvalidSetting("seeds is empty; expected one for each model.")
    check_counts(side_by_side=side_by_side)
