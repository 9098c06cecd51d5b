"""What is checked on the first rows that a provider sees, and on every gradient: what is wrong is an error."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from headwater.errors import HeadwaterError, InvalidInput, NonFiniteValue, RowsInteract, UnsupportedModel
from headwater.gradients.provider import BlockGradients
from headwater.jax.derivatives import Model, gradient_alone, rows_alone
from headwater.jax.losses import describe, explain_failure, row_losses
from headwater.jax.tree import Leaves


class FirstLook(NamedTuple):
    """What some rows give, by the plain ways."""

    together: Any
    """The output, as the model has it for a batch."""
    alone: Any
    """The outputs of rows that each are a batch by themselves."""
    loss: Any
    """Of the batch."""
    losses: jax.Array
    """Of each row: [n]."""
    last_loss: jax.Array
    gradient: Leaves
    """Of the last row, alone, by the chosen parameters."""


def first_look(model: Model, names: tuple[str, ...], leaves: Leaves, x: Any, y: Any) -> FirstLook:
    """One program, compiled without optimisations: it runs once.

    Errors: InvalidInput where the function or the loss fails; UnsupportedModel; UnsupportedLoss.
    """
    return _compiled_look(jax.default_backend())(model, names, leaves, x, y)


@cache
def _compiled_look(backend: str) -> Callable[..., FirstLook]:
    # Half the time of compiling, on CPUs; other backends may not know the option.
    options = {"xla_backend_optimization_level": 0} if backend == "cpu" else None
    return jax.jit(_look, static_argnums=(0, 1), compiler_options=options)


def _look(model: Model, names: tuple[str, ...], leaves: Leaves, x: Any, y: Any) -> FirstLook:
    together = first_outputs(model, leaves, x)
    check_rows(together, len(jax.tree.leaves(x)[0]))
    with explain_failure(together, y):
        loss = model.loss(together, y)
        losses = row_losses(model.loss, together, y)
    last = jax.tree.map(lambda v: v[-1:], (x, y))
    last_loss, gradient = gradient_alone(model, {name: leaves[name] for name in names}, leaves, *last)
    return FirstLook(together, rows_alone(model, leaves, x), loss, losses, last_loss, gradient)


def first_outputs(model: Model, leaves: Leaves, x: object) -> Any:
    """The output of a batch. Errors: InvalidInput where the function fails, with what it was called with."""
    try:
        return model(leaves, x)
    except HeadwaterError:
        raise
    except Exception as error:
        raise InvalidInput(
            f"apply failed: {str(error).rstrip('.')}. It was called with x {describe(x)}; it is called on batches and "
            "on rows alone, and has to be traceable by JAX."
        ) from error


def check_rows(output: object, rows: int) -> None:
    """Errors: UnsupportedModel for an output whose first axis is not that of the rows."""
    for leaf in jax.tree.leaves(output):
        if leaf.ndim == 0 or len(leaf) != rows:
            raise UnsupportedModel(
                f"The output of apply for {rows} row(s) has shape {tuple(leaf.shape)}; its first axis must run over "
                "rows."
            )


def check_independence(together: object, alone: object, row: int) -> None:
    """Errors: RowsInteract if the output for `row` is another when each row is alone."""
    for one, both in zip(jax.tree.leaves(alone), jax.tree.leaves(together), strict=True):
        expected, got = np.asarray(one)[row], np.asarray(both)[row]
        if not jnp.issubdtype(one.dtype, jnp.floating):
            continue
        if not np.isfinite(expected).all():
            raise NonFiniteValue(f"The output of apply is not finite for row {row}: look for NaN in this input.", [row])
        if not close(got, expected):
            gap = float(np.max(np.abs(got - expected)))
            raise RowsInteract(
                f"The output of apply for row {row} changes by {gap:g} when the row is alone in its batch: rows act "
                "on each other (batch norm in train mode, say), or the function is random. Its rows have no "
                "gradients of their own."
            )


def close(got: Any, expected: Any) -> bool:
    """Equal up to rounding, in norm."""
    tolerance = {2: 0.1, 4: 2e-3}.get(expected.dtype.itemsize, 1e-8)
    one, other = (np.asarray(v, dtype=np.float64).ravel() for v in (got, expected))
    gap, scale = np.linalg.norm(one - other), max(np.linalg.norm(one), np.linalg.norm(other))
    return bool(gap <= tolerance * scale + 1e-38)


@jax.jit
def _sums(arrays: list[Any]) -> jax.Array:
    return jnp.stack([jnp.sum(array.astype(jnp.float32)) for array in arrays])


def check_finite_grads(draws: Sequence[BlockGradients]) -> None:
    """Errors: NonFiniteValue naming the block and the rows. A sum is finite only if all of it is: one look for all."""
    parts = [part for blocks in draws for value in blocks.values() for part in value.parts]
    # By identity: draws share their inputs.
    arrays: list[Any] = [*{id(array): array for part in parts for array in part.arrays}.values()]
    if all(isinstance(array, np.ndarray) for array in arrays):
        with np.errstate(over="ignore", invalid="ignore"):
            sums: Any = [array.sum(dtype=np.float64) for array in arrays]
    else:
        sums = np.asarray(_sums(arrays))
    if np.isfinite(sums).all():
        return
    for name, value in ((name, value) for blocks in draws for name, value in blocks.items()):
        for array in (array for part in value.parts for array in part.arrays):
            bad = np.flatnonzero(~np.isfinite(np.asarray(array)).reshape(len(array), -1).all(axis=1))[:5].tolist()
            if bad:
                raise NonFiniteValue(f"The gradients of block {name!r} are not finite for rows {bad}.", bad)


def check_finite_factors(factors: Mapping[str, object]) -> None:
    """Errors: NonFiniteValue naming the block and the queries."""
    for name, factor in factors.items():
        bad = np.flatnonzero(~np.isfinite(np.asarray(factor)).all(axis=1))[:5].tolist()
        if bad:
            raise NonFiniteValue(f"The factors of block {name!r} are not finite for queries {bad}.")
