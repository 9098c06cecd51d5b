"""Optimizers as settings: for trainings whose optimizer is no object that could be asked (JAX), and for our own."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from headwater.errors import InvalidSetting
from headwater.trajectory.rules import AdamRule, Rates, Rule, SgdRule

Rate = float | Callable[[int], float]
"""A learning rate, or that of each step, from 0."""


@dataclass(frozen=True)
class Optimizer(ABC):
    """An optimizer's settings."""

    lr: Rate

    @property
    @abstractmethod
    def rule(self) -> Rule:
        """Its step."""

    @abstractmethod
    def rates(self, step: int) -> Rates:
        """Of this step, from 0."""

    def rate(self, step: int) -> float:
        """Errors: InvalidSetting for a learning rate that is no number above zero."""
        found = float(self.lr(step) if callable(self.lr) else self.lr)
        if not (math.isfinite(found) and found >= 0):
            raise InvalidSetting(f"The learning rate of step {step} is {found}; expected a finite number >= 0.")
        return found


@dataclass(frozen=True)
class Sgd(Optimizer):
    """v' = momentum v + g + weight_decay w; w' = w - lr v'. optax.sgd is this without weight decay."""

    momentum: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False

    @property
    def rule(self) -> Rule:
        return SgdRule(self.nesterov)

    def rates(self, step: int) -> Rates:
        return Rates(self.rate(step), self.weight_decay, self.momentum)


@dataclass(frozen=True)
class AdamW(Optimizer):
    """With decoupled weight decay, as torch.optim.AdamW and optax.adamw have it; without decay it is Adam."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0

    @property
    def rule(self) -> Rule:
        return AdamRule(self.eps, decoupled=True)

    def rates(self, step: int) -> Rates:
        return Rates(self.rate(step), self.weight_decay, *self.betas)
