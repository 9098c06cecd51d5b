"""What can be explained about query rows in place of the loss of a linear model: numbers of its output, by name.

All are better when lower, as losses are, and so minus what they are called by: a train row that helps lowers minus the
probability, and raises the probability. Layouts as in `families`: outputs z [..., n, o], targets as numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import numpy as np

from headwater.errors import UnsupportedModel
from headwater.settings import check_word
from headwater.sklearn.families import Array, Binary, Classes, Family, Softmax, Tweedie, of_output

Measurement = Literal["probability", "log_probability", "margin", "logit", "output", "prediction"]
"""Of the row's label: its probability p, log p, log p/(1-p), its output. And whatever the label: "output", what
`decision_function` gives, or a regression's linear predictor; "prediction", what a regression's `predict` gives."""


class RowFunction(Protocol):
    """A number of each row as a function of its output; a `Family` is one, with curvature besides."""

    def losses(self, z: Array, y: Array) -> Array:
        """[..., n]."""

    def gradient(self, z: Array, y: Array) -> Array:
        """By the output: [..., n, o]."""


@dataclass(frozen=True)
class NegativeProbability:
    """Minus the probability of the label; `family` is its cross entropy l, so that this is -exp(-l)."""

    family: Family

    def losses(self, z: Array, y: Array) -> Array:
        return -np.exp(-self.family.losses(z, y))

    def gradient(self, z: Array, y: Array) -> Array:
        return np.exp(-self.family.losses(z, y))[..., None] * self.family.gradient(z, y)


@dataclass(frozen=True)
class NegativeValue:
    """Minus the one output, or (log_link) minus its exponential."""

    log_link: bool = False

    def losses(self, z: Array, y: Array) -> Array:
        return -(np.exp(z) if self.log_link else z)[..., 0]

    def gradient(self, z: Array, y: Array) -> Array:
        return -np.exp(z) if self.log_link else -np.ones_like(z)


def measurement_named(name: str, family: Family, outputs: int) -> RowFunction:
    """Errors: InvalidSetting for another name; UnsupportedModel for an estimator that has no such number."""
    check_word("measurement", name, get_args(Measurement))
    if name in ("margin", "logit"):
        return of_output(family, name)
    if name in ("probability", "log_probability"):
        if not isinstance(family, Binary | Softmax):
            raise UnsupportedModel(
                f"A row has no {name}: that needs the log loss of classes, one output for two of them or a softmax; "
                f"here the loss is {family.name}."
            )
        return family if name == "log_probability" else NegativeProbability(family)
    if outputs != 1:
        raise UnsupportedModel(f"measurement={name!r} is about one output a row; this model has {outputs}.")
    if name == "prediction" and isinstance(family, Classes | Softmax):
        raise UnsupportedModel(
            "A classifier's prediction is a label, which does not change by little: measurement='output' is what "
            "decides on it, 'probability' how sure that is, and explain='prediction' the loss under it."
        )
    return NegativeValue(log_link=name == "prediction" and isinstance(family, Tweedie) and family.log_link)
