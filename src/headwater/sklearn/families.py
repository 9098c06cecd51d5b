"""Losses as functions of a linear model's output, with their first and second derivatives, in closed form.

Layouts: outputs z [..., n, o], one column for each row of the coefficients; tangents t of that shape; targets as the
batch holds them: class numbers [n] (integers), or numbers [n] or [n, o].
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from headwater.errors import InvalidInput, UnsupportedModel
from headwater.gradients.likelihoods import NO_LABEL

Array = np.ndarray
Draw = Callable[[int, bool], Array]
"""(numbers per row, normal?) -> uniform or standard normal numbers [n, count], fixed by row, seed and draw."""

FEW = 16
"""Outputs up to which targets are enumerated under fisher="auto", as for PyTorch."""
MOST = 64
"""Outputs up to which a row's GGN is kept as one gradient for each."""


def sigmoid(z: Array) -> Array:
    """1 / (1 + exp(-z)) without overflow."""
    return np.exp(-np.logaddexp(0.0, -z))


def softmax(z: Array) -> Array:
    shifted = np.exp(z - z.max(axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)


def one_by_one(values: Array) -> list[Array]:
    """[n, o] as o arrays that hold one column each, and zero elsewhere."""
    return [values * unit for unit in np.eye(values.shape[-1])]


@dataclass(frozen=True)
class Family(ABC):
    """The loss of a row as a function of its output."""

    @abstractmethod
    def losses(self, z: Array, y: Array) -> Array:
        """[..., n]."""

    @abstractmethod
    def gradient(self, z: Array, y: Array) -> Array:
        """The gradient by the output: [..., n, o]."""

    @abstractmethod
    def hessian_product(self, z: Array, y: Array, t: Array) -> Array:
        """The Hessian by the output, times tangents: [..., n, o]."""

    @abstractmethod
    def roots(self, z: Array, y: Array) -> list[Array] | None:
        """Cotangents [n, o] whose summed v v^T is that Hessian; None where it is not convex, or large."""

    @abstractmethod
    def exact(self, z: Array, y: Array) -> list[Array]:
        """Cotangents whose summed v v^T is the Fisher information of the output.

        A loss that is no negative log-likelihood has its own output Hessian in place of it, where that is positive.
        """

    @abstractmethod
    def sampled(self, z: Array, y: Array, draw: Draw) -> Array:
        """One cotangent with v v^T right on average."""

    def predicted(self, z: Array) -> Array:
        """The class that the model predicts: its number [n]. Errors: UnsupportedModel where it predicts numbers."""
        raise UnsupportedModel(NO_LABEL)

    def check(self, y: Array) -> None:  # noqa: B027 - most losses take every target
        """Errors: InvalidInput for targets outside of the loss's domain."""

    @property
    def name(self) -> str:
        return type(self).__name__


class Elementwise(Family):
    """Every output meets a target of its own, and their losses add up."""

    @abstractmethod
    def value(self, z: Array, t: Array) -> Array:
        """The loss of each output, z and target t of one shape."""

    @abstractmethod
    def first(self, z: Array, t: Array) -> Array:
        """Its derivative."""

    @abstractmethod
    def second(self, z: Array, t: Array) -> Array:
        """Its second derivative."""

    def expected(self, z: Array, t: Array) -> Array:
        """The second derivative's mean over the likelihood's targets, without one the own one, where it is positive."""
        return np.maximum(self.second(z, t), 0.0)

    def targets(self, y: Array, outputs: int) -> Array:
        """[n, o]."""
        return y.reshape((len(y), outputs))

    def losses(self, z: Array, y: Array) -> Array:
        return self.value(z, self.targets(y, z.shape[-1])).sum(axis=-1)

    def gradient(self, z: Array, y: Array) -> Array:
        return self.first(z, self.targets(y, z.shape[-1]))

    def hessian_product(self, z: Array, y: Array, t: Array) -> Array:
        return self.second(z, self.targets(y, z.shape[-1])) * t

    def roots(self, z: Array, y: Array) -> list[Array] | None:
        second = self.second(z, self.targets(y, z.shape[-1]))
        # A negative second derivative has no real root: then a row's GGN is no sum of v v^T.
        return None if z.shape[-1] > MOST or bool((second < 0).any()) else one_by_one(np.sqrt(second))

    def exact(self, z: Array, y: Array) -> list[Array]:
        return one_by_one(np.sqrt(self.expected(z, self.targets(y, z.shape[-1]))))

    def sampled(self, z: Array, y: Array, draw: Draw) -> Array:
        return np.sqrt(self.expected(z, self.targets(y, z.shape[-1]))) * draw(z.shape[-1], True)


class SquaredError(Elementwise):
    """(z - y)^2 / 2."""

    def value(self, z: Array, t: Array) -> Array:
        return (z - t) ** 2 / 2

    def first(self, z: Array, t: Array) -> Array:
        return z - t

    def second(self, z: Array, t: Array) -> Array:
        return np.ones_like(z - t)

    def expected(self, z: Array, t: Array) -> Array:
        return np.ones_like(z)


@dataclass(frozen=True)
class Huber(Elementwise):
    """r^2 / 2 up to epsilon, then epsilon (|r| - epsilon / 2). Its second derivative is that almost everywhere."""

    epsilon: float

    def value(self, z: Array, t: Array) -> Array:
        r = np.abs(z - t)
        return np.where(r <= self.epsilon, r**2 / 2, self.epsilon * (r - self.epsilon / 2))

    def first(self, z: Array, t: Array) -> Array:
        return np.clip(z - t, -self.epsilon, self.epsilon)

    def second(self, z: Array, t: Array) -> Array:
        return np.where(np.abs(z - t) <= self.epsilon, 1.0, 0.0)


@dataclass(frozen=True)
class SquaredEpsilonInsensitive(Elementwise):
    """max(0, |r| - epsilon)^2."""

    epsilon: float

    def _beyond(self, z: Array, t: Array) -> Array:
        return np.maximum(np.abs(z - t) - self.epsilon, 0.0)

    def value(self, z: Array, t: Array) -> Array:
        return self._beyond(z, t) ** 2

    def first(self, z: Array, t: Array) -> Array:
        return 2 * self._beyond(z, t) * np.sign(z - t)

    def second(self, z: Array, t: Array) -> Array:
        return np.where(self._beyond(z, t) > 0, 2.0, 0.0)


@dataclass(frozen=True)
class Tweedie(Elementwise):
    """Half the Tweedie deviance of a power: 0 normal, 1 Poisson, 2 gamma, 3 inverse Gaussian, and between."""

    power: float
    log_link: bool

    def _mean(self, z: Array) -> Array:
        return np.exp(z) if self.log_link else z

    def value(self, z: Array, t: Array) -> Array:
        p, mean = self.power, self._mean(z)
        if p == 0:
            return (t - mean) ** 2 / 2
        if p == 1:
            # t log t is 0 at t = 0: the log is taken of 1 there.
            own = np.where(t > 0, t, 1.0)
            return t * np.log(own / mean) - t + mean
        if p == 2:
            return np.log(mean / t) + t / mean - 1
        # For negative powers targets may be negative; the deviance then counts max(t, 0).
        constant = np.maximum(t, 0.0) ** (2 - p) / ((1 - p) * (2 - p))
        return constant - t * mean ** (1 - p) / (1 - p) + mean ** (2 - p) / (2 - p)

    def first(self, z: Array, t: Array) -> Array:
        mean = self._mean(z)
        # d/dz of the deviance is (mean - t) / mean^p times d mean / dz, which is mean for the log link, else 1.
        return (mean - t) * mean ** (self.log_link - self.power)

    def second(self, z: Array, t: Array) -> Array:
        p, mean = self.power, self._mean(z)
        if self.log_link:
            return mean ** (2 - p) + (1 - p) * (mean - t) * mean ** (1 - p)
        return mean**-p - p * (mean - t) * mean ** (-p - 1)

    def expected(self, z: Array, t: Array) -> Array:
        # (d mean / dz)^2 / mean^p: the second derivative where the target is its mean.
        return self._mean(z) ** (2 * self.log_link - self.power)

    def check(self, y: Array) -> None:
        """Errors: InvalidInput for targets outside of the deviance's domain."""
        lowest = float(y.min())
        if (self.power >= 2 and lowest <= 0) or (1 <= self.power < 2 and lowest < 0):
            sign = "> 0" if self.power >= 2 else ">= 0"
            raise InvalidInput(f"y has {lowest:g}; the deviance of power {self.power:g} needs targets {sign}.")


class Classes:
    """How losses of one signed output read classes: as 1 and -1, one against the other, or each against the rest."""

    def targets(self, y: Array, outputs: int) -> Array:
        if outputs == 1:
            return (2.0 * y - 1.0)[:, None]
        return np.where(y[:, None] == np.arange(outputs), 1.0, -1.0)

    def predicted(self, z: Array) -> Array:
        return _likeliest(z)


class SquaredErrorOfSigns(Classes, SquaredError):
    """(z - s)^2 / 2 for s = 1 or -1: a classifier fitted by least squares."""


class LogLoss(Classes, Elementwise):
    """log(1 + exp(-s z)), s = 1 or -1."""

    def value(self, z: Array, t: Array) -> Array:
        # exp(-s z) overflows for a confident mistake.
        return np.logaddexp(0.0, -t * z)

    def first(self, z: Array, t: Array) -> Array:
        return -t * sigmoid(-t * z)

    def second(self, z: Array, t: Array) -> Array:
        return self.expected(z, t)

    def expected(self, z: Array, t: Array) -> Array:
        # p (1 - p), whatever the target; as a product of two sigmoids it keeps its digits near 0.
        return sigmoid(z) * sigmoid(-z) * np.ones_like(t)

    def sampled(self, z: Array, y: Array, draw: Draw) -> Array:
        p = sigmoid(z)
        return p - (draw(z.shape[-1], False) < p)


class SquaredHinge(Classes, Elementwise):
    """max(0, 1 - s z)^2. Its second derivative is that almost everywhere."""

    def value(self, z: Array, t: Array) -> Array:
        return np.maximum(0.0, 1 - t * z) ** 2

    def first(self, z: Array, t: Array) -> Array:
        return -2 * t * np.maximum(0.0, 1 - t * z)

    def second(self, z: Array, t: Array) -> Array:
        return np.where(t * z < 1, 2.0, 0.0)


class ModifiedHuber(Classes, Elementwise):
    """max(0, 1 - s z)^2 down to s z = -1, then -4 s z. Its second derivative is that almost everywhere."""

    def value(self, z: Array, t: Array) -> Array:
        return np.where(t * z >= -1, np.maximum(0.0, 1 - t * z) ** 2, -4 * t * z)

    def first(self, z: Array, t: Array) -> Array:
        return t * np.where(t * z >= -1, -2 * np.maximum(0.0, 1 - t * z), -4.0)

    def second(self, z: Array, t: Array) -> Array:
        return np.where((t * z >= -1) & (t * z < 1), 2.0, 0.0)


def _likeliest(z: Array) -> Array:
    """The class of each row's outputs [n, o], as scikit-learn's `predict` decides: its number [n]."""
    found = z[:, 0] > 0 if z.shape[1] == 1 else z.argmax(axis=1)
    return found.astype(np.int64)


class NegativeLogit(Classes, Elementwise):
    """-s z: minus the output that belongs to the target, one output a row; it is also the margin there."""

    def value(self, z: Array, t: Array) -> Array:
        return -t * z

    def first(self, z: Array, t: Array) -> Array:
        return -t * np.ones_like(z)

    def second(self, z: Array, t: Array) -> Array:
        return np.zeros_like(t * z)


class Softmax(Family):
    """Cross entropy: -log p_y, with p the softmax of the outputs."""

    def losses(self, z: Array, y: Array) -> Array:
        return logsumexp(z) - z[..., np.arange(len(y)), y]

    def gradient(self, z: Array, y: Array) -> Array:
        return softmax(z) - np.eye(z.shape[-1])[y]

    def hessian_product(self, z: Array, y: Array, t: Array) -> Array:
        p = softmax(z)
        # (diag p - p p^T) t without the matrix.
        return p * (t - (p * t).sum(axis=-1, keepdims=True))

    def roots(self, z: Array, y: Array) -> list[Array] | None:
        return None if z.shape[-1] > MOST else self.exact(z, y)

    def exact(self, z: Array, y: Array) -> list[Array]:
        p = softmax(z)
        # sum_c p_c (p - e_c)(p - e_c)^T = diag p - p p^T.
        return [(p - unit) * np.sqrt(p[:, c : c + 1]) for c, unit in enumerate(np.eye(z.shape[-1]))]

    def sampled(self, z: Array, y: Array, draw: Draw) -> Array:
        return _drawn(softmax(z), draw)

    def predicted(self, z: Array) -> Array:
        return _likeliest(z)


class NegativeMargin(Family):
    """Minus log p_y / (1 - p_y) of the softmax: the log-sum-exp of the other outputs, minus the target's."""

    def _others(self, z: Array, y: Array) -> Array:
        hidden = np.array(z, copy=True)
        # exp(-inf) = 0: the target's own output has no share in the others' sum.
        hidden[..., np.arange(len(y)), y] = -np.inf
        return hidden

    def losses(self, z: Array, y: Array) -> Array:
        return logsumexp(self._others(z, y)) - z[..., np.arange(len(y)), y]

    def gradient(self, z: Array, y: Array) -> Array:
        return softmax(self._others(z, y)) - np.eye(z.shape[-1])[y]

    def hessian_product(self, z: Array, y: Array, t: Array) -> Array:
        p = softmax(self._others(z, y))
        return p * (t - (p * t).sum(axis=-1, keepdims=True))

    def roots(self, z: Array, y: Array) -> list[Array] | None:
        return None if z.shape[-1] > MOST else self.exact(z, y)

    def exact(self, z: Array, y: Array) -> list[Array]:
        p = softmax(self._others(z, y))
        return [(p - unit) * np.sqrt(p[:, c : c + 1]) for c, unit in enumerate(np.eye(z.shape[-1]))]

    def sampled(self, z: Array, y: Array, draw: Draw) -> Array:
        return _drawn(softmax(self._others(z, y)), draw)


class NegativeOutput(Family):
    """Minus the target's output, of several."""

    def losses(self, z: Array, y: Array) -> Array:
        return -z[..., np.arange(len(y)), y]

    def gradient(self, z: Array, y: Array) -> Array:
        return np.zeros_like(z) - np.eye(z.shape[-1])[y]

    def hessian_product(self, z: Array, y: Array, t: Array) -> Array:
        return np.zeros_like(t)

    def roots(self, z: Array, y: Array) -> list[Array] | None:
        return None if z.shape[-1] > MOST else self.exact(z, y)

    def exact(self, z: Array, y: Array) -> list[Array]:
        return one_by_one(np.zeros(z.shape))

    def sampled(self, z: Array, y: Array, draw: Draw) -> Array:
        return np.zeros(z.shape)


def _drawn(p: Array, draw: Draw) -> Array:
    """p minus a label that is drawn from it: [n, o]."""
    below = np.cumsum(p, axis=-1) < draw(1, False) * p.sum(axis=-1, keepdims=True)
    # At most the last class: the cumulative sum may end below u by rounding.
    return p - np.eye(p.shape[-1])[np.minimum(below.sum(axis=-1), p.shape[-1] - 1)]


def logsumexp(z: Array) -> Array:
    top = z.max(axis=-1)
    return top + np.log(np.exp(z - top[..., None]).sum(axis=-1))


def of_output(family: Family, function: str) -> Family:
    """The margin or the logit, for a family of classes with probabilities. Errors: UnsupportedModel."""
    if isinstance(family, Softmax):
        return NegativeMargin() if function == "margin" else NegativeOutput()
    if isinstance(family, Binary):
        return NegativeLogit()
    raise UnsupportedModel(
        f"A row has no {function}: that needs the log loss of classes, one output for two of them or a softmax; "
        f"here the loss is {family.name}. For hw.Trak() give output='loss'."
    )


class Binary(LogLoss):
    """The log loss of two classes, one output a row."""
