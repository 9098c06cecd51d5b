"""The loss of one row, and the distribution behind a loss.

The loss of a row is the loss function's value on that row alone; a loss that is not reduced is summed over its entries.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from headwater.arrays import dtype_of, is_array, kind_of, shape_of
from headwater.errors import InvalidInput, NonFiniteValue, UnsupportedLoss
from headwater.gradients.identity import module_of, name_of
from headwater.gradients.likelihoods import (
    Bernoulli,
    CrossEntropy,
    Elementwise,
    Likelihood,
    OutputLoss,
    OwnHessian,
    SquaredError,
    likelihood_named,
)
from headwater.gradients.rowwise import Slopes, explain_loss_failure, is_weighted_sum
from headwater.gradients.spreading import spread_in_words
from headwater.jax.batch import padded_rows

Loss = Callable[[Any, Any], Any]


def cross_entropy(output: jax.Array, target: jax.Array) -> jax.Array:
    """Of logits [n, ..., classes] and integer classes [n, ...]: the mean over rows and positions.

    NaN for a label that is no class.
    """
    chosen = jnp.take_along_axis(output, target[..., None], axis=-1)[..., 0]
    known = (target >= 0) & (target < output.shape[-1])
    return jnp.mean(jnp.where(known, jax.nn.logsumexp(output, axis=-1) - chosen, jnp.nan))


def binary_cross_entropy(output: jax.Array, target: jax.Array) -> jax.Array:
    """Of logits and targets 0 and 1 of the same shape: the mean."""
    _same_shape(output, target)
    return jnp.mean(jax.nn.softplus(output) - output * target)


def squared_error(output: jax.Array, target: jax.Array) -> jax.Array:
    """The mean of squares, of arrays of the same shape."""
    _same_shape(output, target)
    return jnp.mean((output - target) ** 2)


LOSSES: dict[str, Callable[[], Loss]] = {
    "cross_entropy": lambda: cross_entropy,
    "binary_cross_entropy": lambda: binary_cross_entropy,
    "mse": lambda: squared_error,
}
"""Losses that a word names."""


def _same_shape(output: jax.Array, target: jax.Array) -> None:
    """Errors: InvalidInput: one would be spread over the other, and rows would meet."""
    if output.shape != target.shape:
        said = spread_in_words(output.shape, target.shape)
        said = said or f"The output has shape {output.shape} and the target {target.shape}; they need the same."
        raise InvalidInput(said)


def loss_of_row(loss: Loss, output: object, target: object) -> jax.Array:
    """The loss on a batch of one row: a number. Errors: InvalidInput where the loss fails; UnsupportedLoss."""
    with explain_failure(output, target):
        value = loss(output, target)
    if dtype_of(value) is None or not jnp.issubdtype(value.dtype, jnp.floating):
        raise UnsupportedLoss(f"The loss returned {kind_of(value)}; expected a number.")
    return jnp.sum(value)


def row_losses(loss: Loss, output: object, target: object) -> jax.Array:
    """The loss of each row on its own: [n]."""
    return jax.vmap(lambda o, t: loss_of_row(loss, as_row(o), as_row(t)))(output, target)


def as_row(row: object) -> Any:
    """A batch of one row."""
    return jax.tree.map(lambda v: v[None], row)


def explain_failure(output: object, target: object) -> AbstractContextManager[None]:
    """Errors: InvalidInput that says what the loss was called with, for whatever the loss raises."""
    return explain_loss_failure(
        lambda: (
            f"output {describe(output)} and target {describe(target)}; a loss is called on batches and on rows alone, "
            "and has to be traceable by JAX."
        )
    )


def describe(value: object) -> str:
    """Shapes and dtypes."""
    return ", ".join(
        f"{tuple(leaf.shape)} of {leaf.dtype}" for leaf in jax.tree.leaves(value) if shape_of(leaf) is not None
    )


def check_finite(losses: object, rows: int) -> None:
    """Of the first rows, those that are no padding. Errors: NonFiniteValue naming the rows."""
    values = np.atleast_1d(np.asarray(losses))[:rows]
    if not np.isfinite(values).all():
        bad = np.flatnonzero(~np.isfinite(values))[:5].tolist()
        raise NonFiniteValue(
            f"The loss is not finite for rows {bad} of this batch (values {[float(values[k]) for k in bad]}): "
            "look for NaN or infinity in these inputs, or for a row without any target.",
            bad,
        )


def normalisation(loss: Loss, output: Any, target: Any, whole: Any, rows: Any) -> str:
    """How the loss treats several rows: "mean", "sum", "none", "per token", or "weighted mean" of its rows' losses.

    whole: the loss of the batch; rows: of each row alone [n]. Errors: UnsupportedLoss if the one is no weighted sum of
    the others (a contrastive loss, say); InvalidInput if it has more terms than they, of shapes that were spread.
    """
    value, alone = np.asarray(whole), np.asarray(rows)
    one = is_array(output) and is_array(target)
    spread = spread_in_words(output.shape, target.shape) if one else None
    if value.size > 1:
        if spread is not None and value.size != alone.size * jax.eval_shape(loss, output[:1], target[:1]).size:
            raise InvalidInput(spread)
        return "none" if value.size == alone.size else "per token"
    eps = float(jnp.finfo(value.dtype).eps)
    for name, reduced in (("mean", alone.mean()), ("sum", alone.sum())):
        if np.allclose(value.reshape(()), reduced, rtol=min(1e3 * eps, 0.03), atol=eps):
            return name
    moving, rest = split_floating(output)

    def slopes(at: list[jax.Array]) -> Slopes:
        together = jax.grad(lambda o: jnp.sum(loss(rest(o), target)))(at)
        each = jax.grad(lambda o: jnp.sum(row_losses(loss, rest(o), target)))(at)
        mine, own = ([np.reshape(g, (alone.size, -1)) for g in grads] for grads in (together, each))
        return np.concatenate(mine, axis=1), np.concatenate(own, axis=1)

    moved = [[leaf.at[0].set((leaf[0] + share * leaf[-1]) / 2) for leaf in moving] for share in (0.0, 1.0)]
    if is_weighted_sum(slopes(moving), *map(slopes, moved)):
        return "weighted mean"
    raise UnsupportedLoss(
        "The loss of a batch is no weighted sum of its rows' losses: rows act on each other inside the loss, so a "
        f"row's own gradient has no meaning.{'' if spread is None else ' ' + spread}"
    )


def split_floating(output: object) -> tuple[list[jax.Array], Callable[[list[jax.Array]], Any]]:
    """The floating-point leaves of an output, and the output again from them."""
    leaves, structure = jax.tree.flatten(output)
    places = [k for k, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.floating)]

    def rest(moving: list[jax.Array]) -> Any:
        changed = dict(zip(places, moving, strict=True))
        return jax.tree.unflatten(structure, [changed.get(k, leaf) for k, leaf in enumerate(leaves)])

    return [leaves[k] for k in places], rest


class JaxOutputLoss(OutputLoss[jax.Array]):
    """A loss of JAX as a function of the output."""

    def __init__(self, loss: Loss, given: Callable[[Any], Any] = lambda value: value, padded: int = 0):
        """given: makes of what was computed what is handed out. padded: how many rows are compiled for, if more."""
        self.loss = loss
        self.name = name_of(loss)
        self._given = given
        self._padded = padded

    def gradient(self, output: object, target: object) -> Any:
        return self._of(_gradient, output, target)

    def hessian_row_sums(self, output: object, target: object) -> Any:
        return self._of(_hessian_row_sums, output, target)

    def hessian(self, output: object, target: object) -> Any:
        return self._of(_hessian, output, target)

    def _of(self, function: Callable[[Loss, Any, Any], Any], output: Any, target: Any) -> Any:
        if not isinstance(output, np.ndarray) or len(output) >= self._padded:
            return self._given(function(self.loss, output, target))
        # As the batch was, so that few shapes are compiled.
        return self._given(function(self.loss, *padded_rows((output, target), self._padded)))[: len(output)]


@partial(jax.jit, static_argnums=0)
def _gradient(loss: Loss, output: object, target: object) -> Any:
    return jax.grad(lambda o: jnp.sum(row_losses(loss, o, target)))(output)


@partial(jax.jit, static_argnums=0)
def _hessian_row_sums(loss: Loss, output: object, target: object) -> Any:
    return jax.grad(lambda o: jnp.sum(_gradient(loss, o, target)))(output)


@partial(jax.jit, static_argnums=0)
def _hessian(loss: Loss, output: Any, target: Any) -> Any:
    def one(row: Any, t: Any) -> Any:
        return jax.jacrev(jax.grad(lambda flat: loss_of_row(loss, flat.reshape((1, *row.shape)), as_row(t))))(
            row.reshape(-1)
        )

    hessian = jax.vmap(one)(output, target)
    return (hessian + jnp.matrix_transpose(hessian)) / 2


_KNOWN: dict[str, Callable[[], Likelihood]] = {
    "softmax_cross_entropy_with_integer_labels": partial(CrossEntropy, class_axis=-1),
    "softmax_cross_entropy": partial(CrossEntropy, class_axis=-1),
    "safe_softmax_cross_entropy": partial(CrossEntropy, class_axis=-1),
    "kl_divergence": partial(CrossEntropy, class_axis=-1, log_probabilities=True),
    "huber_loss": Elementwise,
    "log_cosh": Elementwise,
    "sigmoid_binary_cross_entropy": Bernoulli,
    "squared_error": SquaredError,
    "l2_loss": SquaredError,
}
"""Losses of optax, by name: optax is not needed to know them."""

_OWN: dict[Any, Callable[[], Likelihood]] = {
    cross_entropy: CrossEntropy,
    binary_cross_entropy: Bernoulli,
    squared_error: SquaredError,
}


def find_likelihood(loss: Loss, given: Likelihood | str | None) -> Likelihood:
    """The likelihood that was given, or the one behind a loss of optax or of `headwater.jax`; else its own Hessian."""
    if isinstance(given, Likelihood):
        return given
    if given is not None:
        return likelihood_named(given)
    if isinstance(loss, partial):  # options may change what the loss is
        return OwnHessian()
    own = next((make for known, make in _OWN.items() if known is loss), None)
    if own is None and module_of(loss).partition(".")[0] == "optax":
        own = _KNOWN.get(name_of(loss, ""))
    return OwnHessian() if own is None else own()
