"""The distribution of targets behind a loss: what the Fisher information averages over, for every framework.

A likelihood gives cotangents of the output [n, ...], v, such that the sum (or the mean over draws) of v v^T is the
Hessian of the row's loss with respect to the row's output. What it needs of the loss, a framework says in an
`OutputLoss`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from headwater.arrays import Array, as_like, identity, is_array, namespace, precise, zeros_like
from headwater.errors import InvalidSetting, UnsupportedLoss

FEW = 16
"""As many classes or outputs are enumerated under fisher="auto"; beyond, labels are sampled."""

MOST = 64
"""Outputs of a row up to which its GGN is kept as one gradient for each output."""

Draw = Callable[[int, bool], Array]
"""(numbers per row, normal?) -> uniform or standard normal numbers [n, count], fixed by row, seed and draw."""


class OutputLoss(ABC):
    """The rows' losses as a function of the output, with its derivatives; a framework fills it."""

    name: str
    """Of the loss, for messages."""

    @abstractmethod
    def slope(self, output: Array, target: Any) -> Array:
        """The gradient of the rows' losses with respect to the output: [n, ...]."""

    def bend(self, output: Array, target: Any) -> Array:
        """The gradient of the summed slope: the second derivatives, where outputs act for themselves: [n, ...]."""
        hessian = self.hessian(output, target)
        return namespace(hessian).sum(hessian, axis=2).reshape(output.shape)

    @abstractmethod
    def hessian(self, output: Array, target: Any) -> Array:
        """Of each row's loss by its flattened output: [n, K, K], symmetric."""


class Likelihood(ABC):
    """The distribution of targets behind a loss: what the Fisher information averages over.

    Both methods give cotangents of the output [n, ...], v, such that the mean (or sum) of v v^T is the Hessian of the
    row's loss with respect to the output.
    """

    @abstractmethod
    def exact(self, loss: OutputLoss, output: Array, target: Any) -> list[Array] | None:
        """Cotangents whose summed v v^T is exactly it; None where a row has several targets."""

    @abstractmethod
    def sampled(self, loss: OutputLoss, output: Array, target: Any, draw: Draw) -> Array:
        """One cotangent, with v v^T right on average."""


def cotangent(loss: OutputLoss, output: Array, target: Any) -> Array:
    """The gradient of the rows' losses with respect to the output: [n, ...]."""
    return loss.slope(output, target)


def loss_scale(slope: Array, residual: Array, axes: tuple[int, ...] = ()) -> Array:
    """c, where the loss's gradient is c times that of the negative log-likelihood; `axes`: those of one target."""
    xp, along, size = namespace(slope), slope * residual, residual**2
    if axes:
        along, size = xp.sum(along, axis=axes), xp.sum(size, axis=axes)
    return along / xp.clip(size, min=float(xp.finfo(size.dtype).smallest_normal))


def check_scale(name: str, slope: Array, expected: Array, scale: Array) -> None:
    """Errors: UnsupportedLoss if the gradient at the data's own targets is not `expected`: another likelihood."""
    xp = namespace(slope)
    tolerance = min(1e4 * float(xp.finfo(slope.dtype).eps), 0.05)
    gap = float(xp.max(xp.abs(slope - expected))) if _size(slope) else 0.0
    if gap > tolerance * float(xp.max(xp.abs(scale))) or bool(xp.any(scale < 0)):
        raise UnsupportedLoss(
            f"The loss is no positive multiple of the {name} of one target (its gradient is off by {gap:g}): class "
            "weights, smoothing, or another loss. Give an OutputHessian or a TargetSampler, or fisher='empirical'."
        )


class CrossEntropy(Likelihood):
    """Integer classes; the loss may be any positive multiple of the cross entropy, another for each target.

    Where the target is `ignore_index` there is none. `class_axis` of the output: -1 or 1; None for whichever the
    target lacks. `log_probabilities` if the output already is that (NLLLoss).
    """

    def __init__(self, ignore_index: int = -100, *, class_axis: int | None = None, log_probabilities: bool = False):
        self.ignore_index = ignore_index
        self.class_axis = class_axis
        self.log_probabilities = log_probabilities

    def _residual(self, p: Array, labels: Array) -> Array:
        """The gradient of -log p(label), classes last; for ignored targets it means nothing."""
        xp = namespace(p)
        hit = xp.astype(_is_class(xp.clip(labels, min=0, max=p.shape[-1] - 1), p), p.dtype)
        return -hit if self.log_probabilities else p - hit

    def _scaled(self, loss: OutputLoss, output: Array, target: Any) -> tuple[Array, Array, int]:
        """Probabilities [..., C], the root of the loss's scale [...] (zero where ignored), and the axis of the classes.

        The scale is measured at each target's least likely class, where the gradient is largest.
        """
        axis, xp = _class_axis(output, target, self.class_axis), namespace(output)
        moved = xp.moveaxis(output, axis, -1)
        p = xp.exp(moved) if self.log_probabilities else _softmax(moved)
        kept, allowed = target != self.ignore_index, p
        if 0 <= self.ignore_index < p.shape[-1]:
            ignored = _is_class(xp.full_like(target, self.ignore_index), p)
            allowed = xp.where(ignored, xp.full_like(p, math.inf), p)
        far = xp.where(kept, xp.astype(xp.argmin(allowed, axis=-1), target.dtype), target)
        slope = xp.moveaxis(loss.slope(output, far), axis, -1)
        scale = loss_scale(slope, self._residual(p, far), (-1,))
        scale = xp.where(kept, scale, xp.zeros_like(scale))
        own = xp.moveaxis(loss.slope(output, target), axis, -1)
        check_scale("cross entropy", own, self._residual(p, target) * scale[..., None], scale)
        return p, xp.sqrt(xp.clip(scale, min=0)), axis

    def exact(self, loss: OutputLoss, output: Array, target: Any) -> list[Array] | None:
        p, root, axis = self._scaled(loss, output, target)
        if _size(target) != target.shape[0]:
            return None
        xp, found = namespace(p), []
        for c in range(p.shape[-1]):
            residual = self._residual(p, xp.full_like(target, c))
            found.append(xp.moveaxis(residual * (root * xp.sqrt(p[..., c]))[..., None], -1, axis))
        return found

    def sampled(self, loss: OutputLoss, output: Array, target: Any, draw: Draw) -> Array:
        p, root, axis = self._scaled(loss, output, target)
        xp, fine = namespace(p), precise(p)
        u = draw(_per_row(target), False).reshape(target.shape)
        below = xp.cumulative_sum(fine, axis=-1) < u[..., None] * xp.sum(fine, axis=-1, keepdims=True)
        labels = xp.sum(xp.astype(below, target.dtype), axis=-1, dtype=target.dtype)
        return xp.moveaxis(self._residual(p, labels) * root[..., None], -1, axis)


def _is_class(labels: Array, p: Array) -> Array:
    """Whether a label is the class, for every class: [..., C]; a label beyond the classes is the last."""
    xp, last = namespace(labels), p.shape[-1] - 1
    classes = as_like(range(p.shape[-1]), labels)
    return xp.clip(labels, max=last)[..., None] == classes


def _softmax(logits: Array) -> Array:
    xp = namespace(logits)
    e = xp.exp(logits - xp.max(logits, axis=-1, keepdims=True))
    return e / xp.sum(e, axis=-1, keepdims=True)


def _sigmoid(logits: Array) -> Array:
    xp = namespace(logits)
    e = xp.exp(-xp.abs(logits))
    return xp.where(logits < 0, e, xp.ones_like(e)) / (1 + e)


def _class_axis(output: Array, target: Any, given: int | None) -> int:
    """The axis of the classes, which the target lacks."""
    shape, wanted = tuple(output.shape), tuple(getattr(target, "shape", ()))
    axes = {len(shape) - 1, 1} if given is None else {given % len(shape)}
    fitting = [axis for axis in axes if shape[:axis] + shape[axis + 1 :] == wanted]
    if not is_array(target) or namespace(target).isdtype(target.dtype, "real floating") or not fitting:
        raise UnsupportedLoss(
            f"Cross entropy needs integer classes of the output's shape without its class axis; the output is {shape}, "
            f"the target {wanted} of {getattr(target, 'dtype', type(target).__name__)}. For another loss, give its "
            "likelihood."
        )
    if len(fitting) > 1:
        raise UnsupportedLoss(
            f"The classes of an output of shape {shape} may be on axis 1 or {len(shape) - 1}; give "
            "likelihood=CrossEntropy(class_axis=...)."
        )
    return fitting[0]


class Bernoulli(Likelihood):
    """Independent yes / no targets of the output's shape; the output is a logit, or a probability (BCELoss).

    The loss may be any positive multiple of the binary cross entropy, another for each target.
    """

    def __init__(self, logits: bool = True):
        self.logits = logits

    def _residual(self, p: Array, target: Array) -> Array:
        """The gradient of -log p(target)."""
        return p - target if self.logits else (p - target) / self._variance(p)

    def _variance(self, p: Array) -> Array:
        xp = namespace(p)
        return xp.clip(p * (1 - p), min=float(xp.finfo(p.dtype).eps))

    def _scaled(self, loss: OutputLoss, output: Array, target: Any) -> tuple[Array, Array]:
        """Probabilities, and the root of the loss's scale, measured at the less likely answers; the output's shape."""
        xp, p = namespace(output), _sigmoid(output) if self.logits else output
        far = xp.astype(p < 0.5, target.dtype)
        scale = loss_scale(loss.slope(output, far), self._residual(p, far))
        own = loss.slope(output, target)
        check_scale("binary cross entropy", own, self._residual(p, target) * scale, scale)
        return p, xp.sqrt(xp.clip(scale, min=0))

    def exact(self, loss: OutputLoss, output: Array, target: Any) -> list[Array] | None:
        p, root = self._scaled(loss, output, target)
        if output.ndim > 2:
            return None
        spread = namespace(p).sqrt(self._variance(p))
        return one_by_one(root * spread if self.logits else root / spread)

    def sampled(self, loss: OutputLoss, output: Array, target: Any, draw: Draw) -> Array:
        p, root = self._scaled(loss, output, target)
        u = draw(_per_row(output), False).reshape(output.shape)
        return self._residual(p, namespace(p).astype(u < p, p.dtype)) * root


def one_by_one(values: Array) -> list[Array]:
    """[n, K] as K arrays that hold one column each, and zero elsewhere; [n] as one."""
    flat = values.reshape((values.shape[0], _per_row(values)))
    unit = identity(int(flat.shape[1]), flat)
    return [(flat * unit[k]).reshape(values.shape) for k in range(unit.shape[0])]


class SquaredError(Likelihood):
    """Gaussian targets of the output's shape; the variance follows from the loss's own scale."""

    def _root_curvature(self, loss: OutputLoss, output: Array, target: Any) -> Array:
        xp = namespace(output)
        return xp.sqrt(xp.clip(loss.bend(output, target), min=0))

    def exact(self, loss: OutputLoss, output: Array, target: Any) -> list[Array] | None:
        if output.ndim > 2:
            return None
        return one_by_one(self._root_curvature(loss, output, target))

    def sampled(self, loss: OutputLoss, output: Array, target: Any, draw: Draw) -> Array:
        noise = draw(_per_row(output), True).reshape(output.shape)
        return self._root_curvature(loss, output, target) * namespace(output).astype(noise, output.dtype)


class OutputHessian(Likelihood):
    """Any loss whose Hessian with respect to a row's flattened output the user gives.

    `hessian(output, target)`: [n, K, K], symmetric positive semi-definite, K numbers of output per row.
    """

    def __init__(self, hessian: Callable[[Array, Any], Array]):
        self.hessian = hessian

    def _root(self, output: Array, target: Any) -> Array:
        values, vectors = namespace(output).linalg.eigh(self.hessian(output, target))
        xp, rows, size = namespace(values), int(output.shape[0]), _per_row(output)
        if tuple(vectors.shape) != (rows, size, size):
            raise InvalidSetting(f"The output Hessian is {tuple(vectors.shape)}; expected {(rows, size, size)}.")
        if bool(xp.any(values < -1e-6 * xp.max(xp.abs(values)))):
            raise InvalidSetting(f"The output Hessian has a negative eigenvalue, {float(xp.min(values)):g}.")
        return vectors * xp.sqrt(xp.clip(values, min=0))[:, None, :]

    def exact(self, loss: OutputLoss, output: Array, target: Any) -> list[Array] | None:
        root = self._root(output, target)
        return [root[:, :, k].reshape(output.shape) for k in range(root.shape[2])]

    def sampled(self, loss: OutputLoss, output: Array, target: Any, draw: Draw) -> Array:
        root = self._root(output, target)
        noise = namespace(root).astype(draw(int(root.shape[2]), True), root.dtype)
        return (root @ noise[:, :, None]).reshape(output.shape)


class TargetSampler(Likelihood):
    """Any loss whose targets the user samples: `sample(output, uniforms [n, K])` gives targets for the loss.

    K is the number of outputs per row. The targets must follow the distribution whose negative logarithm the loss is.
    """

    def __init__(self, sample: Callable[[Array, Array], Any]):
        self.sample = sample

    def exact(self, loss: OutputLoss, output: Array, target: Any) -> list[Array] | None:
        return None

    def sampled(self, loss: OutputLoss, output: Array, target: Any, draw: Draw) -> Array:
        return loss.slope(output, self.sample(output, draw(_per_row(output), False)))


NAMES: dict[str, Callable[[], Likelihood]] = {
    "cross_entropy": CrossEntropy,
    "binary_cross_entropy": Bernoulli,
    "squared_error": SquaredError,
}


def likelihood_named(name: str) -> Likelihood:
    """Errors: InvalidSetting for a name that is not known."""
    if name not in NAMES:
        raise InvalidSetting(f"likelihood is {name!r}; expected one of {list(NAMES)}, or a Likelihood.")
    return NAMES[name]()


def fisher_cotangents(
    likelihood: Likelihood | None,
    loss: OutputLoss,
    output: Any,
    target: Any,
    fisher: str,
    draws: Sequence[Draw],
) -> Iterator[Array]:
    """Cotangents whose summed v v^T is (or estimates) each row's output Hessian; see `Likelihood`."""
    if fisher not in ("auto", "exact", "sampled", "empirical"):
        raise InvalidSetting(f"fisher is {fisher!r}; expected 'auto', 'exact', 'sampled' or 'empirical'.")
    if fisher == "empirical":
        yield loss.slope(output, target)
        return
    if likelihood is None or not is_array(output):
        raise UnsupportedLoss(
            "The Fisher information needs the distribution behind the loss, which is not known for "
            f"{loss.name if is_array(output) else type(output).__name__}. Give likelihood='cross_entropy', "
            "'binary_cross_entropy' or 'squared_error', an OutputHessian, a TargetSampler, or ask for "
            "fisher='empirical'."
        )
    few = fisher == "auto" and _per_row(output) <= FEW
    found = likelihood.exact(loss, output, target) if fisher == "exact" or few else None
    if found is not None:
        yield from found
        return
    if fisher == "exact":
        raise UnsupportedLoss(
            "fisher='exact' enumerates the targets of a row, which needs one target per row and a likelihood that "
            "can be enumerated. Use fisher='sampled'."
        )
    for draw in draws:
        yield likelihood.sampled(loss, output, target, draw) / math.sqrt(len(draws))


def ggn_cotangents(likelihood: Likelihood | None, loss: OutputLoss, output: Any, target: Any) -> list[Array] | None:
    """Cotangents whose summed v v^T is exactly each row's output Hessian, for any loss of few outputs; else None.

    None also where the loss is not convex in the output: then the GGN has no such root.
    """
    if not is_array(output) or _per_row(output) > MOST:
        return None
    if likelihood is not None:
        try:
            found = likelihood.exact(loss, output, target)
        except UnsupportedLoss:
            found = None
        if found is not None:
            return found
    hessian = loss.hessian(output, target)
    xp = namespace(hessian)
    values, vectors = xp.linalg.eigh(hessian)
    if bool(xp.any(values < -1e3 * float(xp.finfo(values.dtype).eps) * xp.max(xp.abs(values)))):
        return None
    root = vectors * xp.sqrt(xp.clip(values, min=0))[:, None, :]
    return [root[:, :, k].reshape(output.shape) for k in range(root.shape[2])]


def no_hessian(output: Array) -> Array:
    """Of a loss that is linear in its output: zeros [n, K, K]."""
    size = _per_row(output)
    return zeros_like(output, (int(output.shape[0]), size, size))


def _size(array: Array) -> int:
    return math.prod(array.shape)


def _per_row(array: Array) -> int:
    """Numbers of one row."""
    return math.prod(array.shape[1:])
