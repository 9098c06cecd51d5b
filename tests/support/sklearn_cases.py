"""Fitted estimators of every kind, and the truth about them: losses of one row, differentiated by torch's autograd."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from sklearn import linear_model as lm

ROWS, QUERIES, FEATURES = 23, 5, 3
RNG = np.random.default_rng(11)
X = RNG.standard_normal((ROWS, FEATURES)) * [1.0, 0.5, 2.0] + [0.0, 0.3, 1.0]
X_QUERY = RNG.standard_normal((QUERIES, FEATURES))
PLANE = np.array([[1.0, -1.0, 0.3], [-0.5, 0.4, -0.2], [0.2, 0.9, 0.1]])


def _values(x: np.ndarray, seed: int) -> np.ndarray:
    return x @ PLANE[0] + 0.4 + np.random.default_rng(seed).standard_normal(len(x))


def _labels(x: np.ndarray, seed: int, classes: int) -> np.ndarray:
    noise = np.random.default_rng(seed).gumbel(size=(len(x), classes))
    return (x @ PLANE[:classes].T + 1.5 * noise).argmax(1)


def _counts(x: np.ndarray, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).poisson(np.exp(0.3 * x @ PLANE[0])).astype(float)


Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(output [o], target []) or target [o] -> a number."""


def squared(z, y):
    return ((z - y) ** 2).sum() / 2


def logistic(z, y):
    return F.binary_cross_entropy_with_logits(z, y.to(z.dtype).reshape(1))


def softmax(z, y):
    return F.cross_entropy(z[None], y.long().reshape(1))


def against_the_rest(one: Callable[[torch.Tensor], torch.Tensor]) -> Loss:
    """A sum over outputs of a function of signed margins."""

    def loss(z, y):
        sign = 2.0 * (torch.arange(len(z)) == y) - 1 if len(z) > 1 else 2.0 * y.to(z.dtype).reshape(1) - 1
        return one(sign * z).sum()

    return loss


def huber(z, y):
    return F.huber_loss(z, y.reshape(1), delta=0.5)


def beyond(z, y):
    return (F.relu((z - y).abs() - 0.5) ** 2).sum()


def tweedie(power: float, log: bool = True) -> Loss:
    def loss(z, y):
        mean, y = (z.exp() if log else z).squeeze(), y.squeeze()
        if power == 1:
            return torch.xlogy(y, y) - y * torch.log(mean) - y + mean
        if power == 2:
            return -torch.log(y / mean) + y / mean - 1
        whole = y ** (2 - power) / ((1 - power) * (2 - power)) if power else y**2 / 2
        return whole - y * mean ** (1 - power) / (1 - power) + mean ** (2 - power) / (2 - power)

    return loss


@dataclass(frozen=True, eq=False)
class Case:
    """An estimator that is fitted, its rows, and its loss written for torch."""

    estimator: Any
    loss: Loss
    x: np.ndarray
    y: np.ndarray
    x_query: np.ndarray
    y_query: np.ndarray
    strength: float = 0.0
    per_row: bool = False

    @property
    def weights(self) -> np.ndarray:
        """[o, features (+ 1)]."""
        coef = np.atleast_2d(self.estimator.coef_)
        if not self.estimator.fit_intercept:
            return coef
        return np.concatenate([coef, np.reshape(self.estimator.intercept_, (-1, 1)) * np.ones((len(coef), 1))], axis=1)

    def flat(self, matrices: np.ndarray) -> np.ndarray:
        """[..., o, i] in the order of the parameters: coefficients, then intercepts."""
        lead = matrices.shape[:-2]
        return np.concatenate(
            [matrices[..., :FEATURES].reshape(*lead, -1), matrices[..., FEATURES:].reshape(*lead, -1)], axis=-1
        )

    @property
    def held(self) -> np.ndarray:
        """What the penalty holds, flat: ones for coefficients, zeros for intercepts."""
        mask = np.zeros_like(self.weights)
        mask[:, :FEATURES] = 1.0
        return self.flat(mask)

    def row_loss(self, w: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        z = w[:, :FEATURES] @ x + (w[:, FEATURES] if w.shape[1] > FEATURES else 0.0)
        return self.loss(z, y)

    def _rows(self, x: np.ndarray, y: np.ndarray):
        w = torch.tensor(self.weights)
        return w, [(torch.tensor(a), torch.as_tensor(b)) for a, b in zip(x, y, strict=True)]

    def grads(self, x: np.ndarray, y: np.ndarray, train: bool = False) -> np.ndarray:
        w, rows = self._rows(x, y)
        found = [torch.func.grad(self.row_loss)(w, *row).numpy() for row in rows]
        flat = self.flat(np.stack(found))
        return flat + self.strength * self.held * self.flat(self.weights) if train and self.per_row else flat

    def mixed(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        w, rows = self._rows(x, y)
        found = [torch.func.jacrev(torch.func.grad(self.row_loss, argnums=1))(w, *row).numpy() for row in rows]
        return self.flat(np.stack(found))

    def hessians(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """[n, D, D]."""
        w, rows = self._rows(x, y)
        found = np.stack([torch.func.jacrev(torch.func.jacrev(self.row_loss))(w, *row).numpy() for row in rows])
        return self.flat(np.moveaxis(self.flat(found), -1, 1)).swapaxes(1, 2)

    @cached_property
    def train_grads(self) -> np.ndarray:
        return self.grads(self.x, self.y, train=True)

    @cached_property
    def train_mixed(self) -> np.ndarray:
        return self.mixed(self.x, self.y)

    @cached_property
    def train_hessians(self) -> np.ndarray:
        return self.hessians(self.x, self.y)

    def losses(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        w, rows = self._rows(x, y)
        return np.array([float(self.row_loss(w, *row)) for row in rows])

    def penalty(self, rows: float) -> np.ndarray:
        """The diagonal beside the mean curvature."""
        return self.held * (self.strength if self.per_row else self.strength / rows)


def _fit(estimator: Any, y: np.ndarray) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return estimator.fit(X, y)


def _case(estimator: Any, loss: Loss, targets: Callable[[np.ndarray, int], np.ndarray], **options: Any) -> Case:
    y, y_query = targets(X, 1), targets(X_QUERY, 2)
    return Case(_fit(estimator, y), loss, X, y, X_QUERY, y_query, **options)


def _two(x, seed):
    return np.stack([_values(x, seed), _values(x, seed + 10)], axis=1)


def _binary(x, seed):
    return _labels(x, seed, 2)


def _three(x, seed):
    return _labels(x, seed, 3)


def _positive(x, seed):
    return _counts(x, seed) + 0.5


def _sgd(kind: type, **options: Any) -> Any:
    return kind(random_state=0, alpha=0.05, max_iter=200, **options)


MAKERS: dict[str, Callable[[], Case]] = {
    "least squares": lambda: _case(lm.LinearRegression(), squared, _values),
    "least squares of two targets": lambda: _case(lm.LinearRegression(fit_intercept=False), squared, _two),
    "ridge": lambda: _case(lm.Ridge(alpha=2.0), squared, _values, strength=2.0),
    "ridge of two targets": lambda: _case(lm.Ridge(alpha=0.5), squared, _two, strength=0.5),
    "ridge classifier": lambda: _case(
        lm.RidgeClassifier(alpha=1.5), against_the_rest(lambda m: (1 - m) ** 2 / 2), _three, strength=1.5
    ),
    "logistic": lambda: _case(lm.LogisticRegression(C=0.7, tol=1e-10), logistic, _binary, strength=1 / 0.7),
    "multinomial": lambda: _case(lm.LogisticRegression(C=2.0, tol=1e-10), softmax, _three, strength=0.5),
    "multinomial without intercept": lambda: _case(
        lm.LogisticRegression(C=2.0, tol=1e-10, fit_intercept=False), softmax, _three, strength=0.5
    ),
    "poisson": lambda: _case(
        lm.PoissonRegressor(alpha=0.3, tol=1e-10), tweedie(1.0), _counts, strength=0.3, per_row=True
    ),
    "gamma": lambda: _case(
        lm.GammaRegressor(alpha=0.2, tol=1e-10), tweedie(2.0), _positive, strength=0.2, per_row=True
    ),
    "tweedie": lambda: _case(
        lm.TweedieRegressor(power=1.5, alpha=0.1, tol=1e-10), tweedie(1.5), _counts, strength=0.1, per_row=True
    ),
    "normal with identity": lambda: _case(
        lm.TweedieRegressor(power=0, alpha=0.1, tol=1e-10), tweedie(0.0, False), _values, strength=0.1, per_row=True
    ),
    "sgd log loss": lambda: _case(
        _sgd(lm.SGDClassifier, loss="log_loss"), logistic, _binary, strength=0.05, per_row=True
    ),
    "sgd of three classes": lambda: _case(
        _sgd(lm.SGDClassifier, loss="log_loss"),
        against_the_rest(lambda m: F.softplus(-m)),
        _three,
        strength=0.05,
        per_row=True,
    ),
    "sgd squared hinge": lambda: _case(
        _sgd(lm.SGDClassifier, loss="squared_hinge", learning_rate="invscaling", eta0=0.01),
        against_the_rest(lambda m: F.relu(1 - m) ** 2),
        _binary,
        strength=0.05,
        per_row=True,
    ),
    "sgd modified huber": lambda: _case(
        _sgd(lm.SGDClassifier, loss="modified_huber", learning_rate="invscaling", eta0=0.01),
        against_the_rest(lambda m: torch.where(m >= -1, F.relu(1 - m) ** 2, -4 * m)),
        _binary,
        strength=0.05,
        per_row=True,
    ),
    "sgd least squares": lambda: _case(_sgd(lm.SGDRegressor), squared, _values, strength=0.05, per_row=True),
    "sgd huber": lambda: _case(
        _sgd(lm.SGDRegressor, loss="huber", epsilon=0.5),
        huber,
        _values,
        strength=0.05,
        per_row=True,
    ),
    "sgd beyond epsilon": lambda: _case(
        _sgd(lm.SGDRegressor, loss="squared_epsilon_insensitive", epsilon=0.5),
        beyond,
        _values,
        strength=0.05,
        per_row=True,
    ),
}


@cache
def case_of(name: str) -> Case:
    return MAKERS[name]()
