"""What can be explained in place of the loss: each row's own number, better when lower, as losses are.

That is why all of them are negative: a train row that helps lowers minus the probability, and so raises the
probability. Outputs are logits [n, classes] with integer targets [n], or one logit a row, [n] or [n, 1], with targets 0
and 1. Only `negative_output` takes any output of one number a row, and asks for no target.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from headwater.arrays import Array, as_like, is_array, namespace, shape_of
from headwater.errors import InvalidSetting, UnsupportedModel


def negative_margin(output: object, target: object) -> Any:
    """Minus log p/(1-p), p the probability of the target: [n]. The chance of another answer is its sigmoid."""
    classes, labels = _read(output, target, "margin")
    if classes.shape[1] == 1:
        return -_signed(classes, labels)
    xp, hit = namespace(classes), _hit(classes, labels)
    others = xp.where(hit, xp.full_like(classes, -math.inf), classes)
    top = xp.max(others, axis=1, keepdims=True)
    among_others = top[:, 0] + xp.log(xp.sum(xp.exp(others - top), axis=1))
    return among_others - _chosen(classes, hit)


def negative_logit(output: object, target: object) -> Any:
    """Minus the target's logit; with one logit a row, its sign is that of the target: [n]."""
    classes, labels = _read(output, target, "logit")
    if classes.shape[1] == 1:
        return -_signed(classes, labels)
    return -_chosen(classes, _hit(classes, labels))


def negative_log_probability(output: object, target: object) -> Any:
    """Minus log p, p the probability of the target: [n]. A cross entropy without class weights or smoothing."""
    margin = negative_margin(output, target)
    xp = namespace(margin)
    # log p = log sigmoid(margin), without overflow.
    return xp.logaddexp(xp.zeros_like(margin), margin)


def negative_probability(output: object, target: object) -> Any:
    """Minus p: [n]."""
    return -namespace(output).exp(-negative_log_probability(output, target))


def negative_output(output: Any, target: object) -> Any:
    """Minus the output, of one number a row, whatever the target: [n]."""
    shape = tuple(shape_of(output) or ())
    if not is_array(output) or math.prod(shape[1:]) != 1:
        raise UnsupportedModel(
            f"measurement='output' is about one output a row, and the output is {shape}. For classes give 'logit', "
            "'margin', 'log_probability' or 'probability'; or a function of (output, target) that chooses one."
        )
    return -output.reshape((-1,))


NAMED: dict[str, Callable[[Any, Any], Any]] = {
    "probability": negative_probability,
    "log_probability": negative_log_probability,
    "margin": negative_margin,
    "logit": negative_logit,
    "output": negative_output,
}
"""What `measurement=` takes by name: the number that is explained; a row that helps raises it."""


def measurement_of(given: Any) -> Any:
    """The function that a name stands for; anything else as it is. Errors: InvalidSetting for another name."""
    if not isinstance(given, str):
        return given
    if given not in NAMED:
        raise InvalidSetting(
            f"measurement is {given!r}; expected one of {', '.join(map(repr, NAMED))}, or a function of (output, "
            "target), better when lower."
        )
    return NAMED[given]


def _hit(classes: Array, labels: Array) -> Array:
    """Whether a class is the row's label: [n, classes]."""
    return labels[:, None] == as_like(range(classes.shape[1]), labels)


def _chosen(classes: Array, hit: Array) -> Array:
    """The label's logit: [n]; NaN for a label that is no class."""
    xp = namespace(classes)
    found = xp.sum(xp.where(hit, classes, xp.zeros_like(classes)), axis=1)
    return xp.where(xp.any(hit, axis=1), found, xp.full_like(found, math.nan))


def _signed(logits: Array, labels: Array) -> Array:
    """The logit of the answer that is the row's: [n]; NaN for a target that is neither 0 nor 1."""
    xp = namespace(logits)
    signs = xp.astype(2 * labels - 1, logits.dtype)
    return logits[:, 0] * xp.where(xp.abs(signs) == 1, signs, xp.full_like(signs, math.nan))


def _read(output: Any, target: Any, what: str) -> tuple[Array, Array]:
    """Logits [n, classes], or [n, 1], and integer targets [n]."""
    if is_array(output) and is_array(target):
        one = output.ndim == 1 or (output.ndim == 2 and output.shape[1] == 1)
        if one and math.prod(target.shape) == output.shape[0]:
            return output.reshape((-1, 1)), target.reshape((-1,))
        if output.ndim == 2 and target.ndim == 1 and namespace(target).isdtype(target.dtype, "integral"):
            return output, target
    shapes = [tuple(shape_of(v) or ()) for v in (output, target)]
    raise UnsupportedModel(
        f"A row has no {what}: that needs logits (rows, classes) with integer targets (rows,), or one logit a row with "
        f"targets 0 and 1; the output is {shapes[0]}, the target {shapes[1]}. Give a measurement of your own, or "
        "output='loss' to hw.Trak()."
    )
