"""The distribution of targets behind a loss: what the Fisher information averages over, for every framework.

A likelihood gives cotangents of the output [n, ...], v, such that the sum (or the mean over draws) of v v^T is the
Hessian of the row's loss with respect to the row's output. What it needs of the loss, a framework says in an
`OutputLoss`.
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

from headwater.arrays import (
    Array,
    accumulable,
    as_like,
    identity,
    is_array,
    kind_of,
    namespace,
    precise,
    shape_of,
    sigmoid,
    zeros_like,
)
from headwater.errors import InvalidSetting, UnsupportedLoss, UnsupportedModel

FEW = 16
"""As many classes or outputs are enumerated under fisher="auto"; beyond, labels are sampled."""

MOST = 64
"""Outputs of a row up to which its GGN is kept as one gradient for each output."""

UNKNOWN_LABEL = (
    'explain="prediction": which label the outputs mean is not known ({}). Give likelihood="cross_entropy" or '
    '"binary_cross_entropy" if they are logits of classes; or give the query rows the labels that you ask about as y, '
    'with explain="label".'
)
NO_LABEL = (
    'explain="prediction": this model predicts a number, and at the predicted number its loss has its minimum, a '
    'gradient of zero, and scores of zero. To ask what moved the prediction give measurement="output", with '
    'explain="label".'
)
"""Of regression."""

Draw = Callable[[int, bool], Array]
"""(numbers per row, normal?) -> uniform or standard normal numbers [n, count], fixed by row, seed and draw."""


T = TypeVar("T", bound=Array)


class OutputLoss(ABC, Generic[T]):
    """The rows' losses as a function of the output, with its derivatives; a framework fills it."""

    name: str
    """Of the loss, for messages."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "slope" in cls.__dict__ and "gradient" not in cls.__dict__:  # the name until 0.1
            said = f"{cls.__name__}: OutputLoss.slope is now gradient; the old name ends in 0.2."
            warnings.warn(said, DeprecationWarning, stacklevel=2)
            setattr(cls, "gradient", cls.__dict__["slope"])  # noqa: B010  # a method, by name: mypy refuses the plain form

    @abstractmethod
    def gradient(self, output: T, target: object) -> T:
        """The gradient of the rows' losses with respect to the output: [n, ...]."""

    def hessian_row_sums(self, output: T, target: object) -> T:
        """The Hessian times ones: its diagonal, where each output's loss depends on that output alone: [n, ...]."""
        hessian = self.hessian(output, target)
        return namespace(hessian).sum(hessian, axis=2).reshape(output.shape)

    @abstractmethod
    def hessian(self, output: T, target: Any) -> T:
        """Of each row's loss by its flattened output: [n, K, K], symmetric."""


class Likelihood(ABC):
    """The distribution of targets behind a loss: what the Fisher information averages over.

    Both methods give cotangents of the output [n, ...], v, such that the mean (or sum) of v v^T is the Hessian of the
    row's loss with respect to the output (for outputs that are probabilities: the Hessian by the logits behind them).
    """

    @abstractmethod
    def exact(self, loss: OutputLoss, output: Array, target: Any) -> list[Array] | None:
        """Cotangents whose summed v v^T is exactly it; None where a row has several targets."""

    @abstractmethod
    def sampled(self, loss: OutputLoss, output: Array, target: Any, draw: Draw) -> Array:
        """One cotangent, with v v^T right on average."""

    @property
    def is_hessian(self) -> bool:
        """Whether that is the Hessian by the output itself: not where outputs are probabilities or their logarithms."""
        return True

    @property
    def has_margin(self) -> bool | None:
        """Whether the loss is a cross entropy of logits, so that a row of one label has a margin; None if unknown."""
        return None

    def predicted(self, output: Array, target: Any) -> Array:
        """What the model predicts, in the form of `target`, which it takes the place of.

        Errors: UnsupportedModel where a prediction is no label.
        """
        raise UnsupportedModel(UNKNOWN_LABEL.format(type(self).__name__))

    @property
    def said(self) -> str:
        """What a fit's status says of it; nothing of a distribution that is the loss's own."""
        return ""


def cotangent(loss: OutputLoss, output: Array, target: object) -> Array:
    """The gradient of the rows' losses with respect to the output: [n, ...]."""
    return loss.gradient(output, target)


def loss_scale(change: Array, residual: Array, axes: tuple[int, ...] = ()) -> Array:
    """c, where the loss's gradient changes by c times `residual`; `axes`: those of one target."""
    xp, along, size = namespace(change), change * residual, residual**2
    if axes:
        # Least squares: c = <change, residual> / |residual|^2, over the numbers of one target.
        along, size = xp.sum(along, axis=axes), xp.sum(size, axis=axes)
    # Where the residual is zero the scale is unknown and counts for nothing: 0, not NaN.
    return along / xp.clip(size, min=float(xp.finfo(size.dtype).smallest_normal))


def check_scale(name: str, found: Array, expected: Array, scale: Array) -> None:
    """Errors: UnsupportedLoss if what was found is not `expected`, or a scale is negative: another likelihood."""
    xp = namespace(found)
    if not _size(found):
        return
    allowed = _tolerance(found) * float(xp.max(xp.abs(scale)))
    gap = float(xp.max(xp.abs(found - expected)))
    # `not <=`: NaN is refused too.
    if not gap <= allowed or bool(xp.any(scale < -allowed)):
        raise UnsupportedLoss(
            f"The loss is no positive multiple of the {name} (its gradient is off by {gap:g}). Leave likelihood= out: "
            f"a loss of at most {MOST} outputs a row has its own output Hessian taken. Or give an OutputHessian or a "
            "TargetSampler, or fisher='empirical'."
        )


def _tolerance(like: Array) -> float:
    return min(1e4 * float(namespace(like).finfo(like.dtype).eps), 0.05)


class CrossEntropy(Likelihood):
    """Classes: -sum_c t_c log p_c for any masses t >= 0: a label, a smoothed or weighted one, or probabilities.

    1. By the logits its gradient is M p - t with M the sum of t, and its Hessian M (diag p - p p^T): the target counts
       only by its mass, which is the label's class weight, zero where the label is ignored, and otherwise one over the
       number of targets that a mean is over.
    2. So M is measured, and its form checked, by the gradient at two outputs, whatever the target is and however the
       loss is written: their difference is M (p' - p).
    3. Labels drawn from p, with the residual p - e_label times the root of M, have that Hessian as second moment.

    Targets: classes (integers) of the output's shape without its class axis, where `ignore_index` is none; or numbers
    of the output's shape. `class_axis` of the output: -1 or 1; None for whichever the target lacks.
    `log_probabilities` if the output already is that (NLLLoss, KLDivLoss): then its gradient is -t wherever it is.
    """

    def __init__(self, ignore_index: int = -100, *, class_axis: int | None = None, log_probabilities: bool = False):
        self.ignore_index = ignore_index
        self.class_axis = class_axis
        self.log_probabilities = log_probabilities

    @property
    def is_hessian(self) -> bool:
        return not self.log_probabilities

    @property
    def has_margin(self) -> bool:
        return True

    def _residual(self, p: Array, hit: Array) -> Array:
        """The gradient of -log p(label), classes last; `hit` is one at the label."""
        return (0.0 * p if self.log_probabilities else p) - hit

    def _scaled(self, loss: OutputLoss, output: Array, target: Any) -> tuple[Array, Array, int]:
        """Probabilities [..., C], the root of the targets' masses [...], and the axis of the classes."""
        axis, xp = _class_axis(output, target, self.class_axis), namespace(output)
        z, slope = xp.moveaxis(output, axis, -1), xp.moveaxis(loss.gradient(output, target), axis, -1)
        p = xp.exp(z) if self.log_probabilities else _softmax(z)
        # Far from the output on purpose: near it, any smooth loss looks like this one.
        elsewhere = z - 1.0 if self.log_probabilities else _far(z)
        change = xp.moveaxis(loss.gradient(xp.moveaxis(elsewhere, -1, axis), target), axis, -1) - slope
        if self.log_probabilities:
            # The gradient of -sum t z is -t, whatever z: its sum is the mass, and it must not change elsewhere.
            mass = -xp.sum(slope, axis=-1)
            check_scale("cross entropy", change, 0.0 * change, mass)
            check_scale("cross entropy", xp.clip(-slope, max=0.0), 0.0 * slope, mass)
        else:
            moved = _softmax(elsewhere) - p
            mass = loss_scale(change, moved, (-1,))
            check_scale("cross entropy", change, moved * mass[..., None], mass)
        # Below zero by rounding only: `check_scale` has refused the rest.
        mass = xp.clip(mass, min=0)
        if tuple(target.shape) == tuple(mass.shape):
            mass = xp.where(target != self.ignore_index, mass, xp.zeros_like(mass))
        return p, xp.sqrt(mass), axis

    def exact(self, loss: OutputLoss, output: Array, target: object) -> list[Array] | None:
        p, root, axis = self._scaled(loss, output, target)
        if _size(root) != root.shape[0]:
            return None
        xp = namespace(p)
        found: list[Array] = []
        for c, hit in enumerate(identity(int(p.shape[-1]), p)):
            residual = self._residual(p, hit)
            # sum_c p_c (p - e_c)(p - e_c)^T = diag p - p p^T: step 3, with every label enumerated.
            found.append(xp.moveaxis(residual * (root * xp.sqrt(p[..., c]))[..., None], -1, axis))
        return found

    def sampled(self, loss: OutputLoss, output: Array, target: object, draw: Draw) -> Array:
        p, root, axis = self._scaled(loss, output, target)
        xp, fine = namespace(p), precise(p)
        u = draw(_per_row(root), False).reshape(root.shape)
        # Inverse distribution function; u times the sum, as p adds up to 1 only within rounding.
        below = xp.cumulative_sum(fine, axis=-1) < u[..., None] * xp.sum(fine, axis=-1, keepdims=True)
        labels = xp.sum(xp.astype(below, xp.argmin(p, axis=-1).dtype), axis=-1)
        hit = xp.astype(_is_class(labels, p), p.dtype)
        return xp.moveaxis(self._residual(p, hit) * root[..., None], -1, axis)

    def predicted(self, output: Array, target: Any) -> Array:
        """The likeliest class of each target; one that is ignored stays so. Masses go to it whole."""
        axis, xp = _class_axis(output, target, self.class_axis), namespace(output)
        labels = xp.argmax(output, axis=axis)
        if tuple(target.shape) == tuple(output.shape):
            hit = xp.moveaxis(_is_class(labels, xp.moveaxis(output, axis, -1)), -1, axis)
            return xp.astype(hit, target.dtype) * xp.sum(target, axis=axis, keepdims=True)
        return xp.where(target == self.ignore_index, target, xp.astype(labels, target.dtype))


def _far(logits: Array) -> Array:
    """Logits [..., C] at which most of the mass is on what was the least likely class."""
    xp = namespace(logits)
    least = _is_class(xp.argmin(logits, axis=-1), logits)
    # Above the log of the sum of all the others, by 2: so it has most of the mass.
    return xp.where(least, xp.max(logits, axis=-1, keepdims=True) + math.log(logits.shape[-1]) + 2.0, logits)


def _is_class(labels: Array, p: Array) -> Array:
    """Whether a label is the class, for every class: [..., C]; a label beyond the classes is the last."""
    xp, last = namespace(labels), p.shape[-1] - 1
    classes = as_like(range(p.shape[-1]), labels)
    return xp.clip(labels, max=last)[..., None] == classes


def _softmax(logits: Array) -> Array:
    xp = namespace(logits)
    # Without the shift exp of a large logit is infinite.
    e = xp.exp(logits - xp.max(logits, axis=-1, keepdims=True))
    return e / xp.sum(e, axis=-1, keepdims=True)


def _class_axis(output: Array, target: Any, given: int | None) -> int:
    """The axis of the classes, which integer targets lack; targets of the output's shape are masses of classes."""
    shape, wanted = tuple(output.shape), tuple(shape_of(target) or ())
    axes = {len(shape) - 1, 1} if given is None else {given % len(shape)}
    if is_array(target) and namespace(target).isdtype(target.dtype, "real floating"):
        fitting = [axis for axis in axes if shape == wanted and axis > 0]
    else:
        fitting = [axis for axis in axes if is_array(target) and shape[:axis] + shape[axis + 1 :] == wanted]
    if not fitting:
        raise UnsupportedLoss(
            f"Cross entropy needs integer classes of the output's shape without its class axis, or probabilities of "
            f"the output's shape; the output is {shape}, the target {wanted} of "
            f"{kind_of(target)}. For another loss, give its likelihood."
        )
    if len(fitting) > 1:
        raise UnsupportedLoss(
            f"The classes of an output of shape {shape} may be on axis 1 or {len(shape) - 1}; give "
            "likelihood=CrossEntropy(class_axis=...)."
        )
    return fitting[0]


class Bernoulli(Likelihood):
    """Yes / no targets of the output's shape, each -t_1 log p - t_0 log(1 - p) for any masses t_1, t_0 >= 0.

    That is the binary cross entropy of targets from 0 to 1, with weights, with one of positive targets (pos_weight), or
    any positive multiple. By the logit its gradient is M p - t_1 with M = t_1 + t_0, and its second derivative
    M p (1 - p): M is measured, and the form checked, by the gradient at two outputs, as in `CrossEntropy`.
    The output is a logit, or a probability (BCELoss): by that the gradient is t_0 / (1 - p) - t_1 / p.
    """

    def __init__(self, logits: bool = True):
        self.logits = logits

    @property
    def is_hessian(self) -> bool:
        return self.logits

    @property
    def has_margin(self) -> bool:
        return self.logits

    def _variance(self, p: Array) -> Array:
        xp = namespace(p)
        # A saturated probability has variance 0, by which the residual would be divided.
        return xp.clip(p * (1 - p), min=float(xp.finfo(p.dtype).eps))

    def _scaled(self, loss: OutputLoss, output: Array, target: object) -> tuple[Array, Array]:
        """Probabilities, and the root of the targets' masses; the output's shape."""
        xp = namespace(output)
        if self.logits:
            elsewhere = xp.where(output < 0, xp.full_like(output, 2.0), xp.full_like(output, -2.0))
            # To the other side of zero: a change that is large for every output.
            p, moved = sigmoid(output), sigmoid(elsewhere) - sigmoid(output)
            change = loss.gradient(elsewhere, target) - loss.gradient(output, target)
            mass = loss_scale(change, moved)
            check_scale("binary cross entropy", change, moved * mass, mass)
        else:
            p, half, quarter = output, xp.full_like(output, 0.5), xp.full_like(output, 0.25)
            at_half, at_quarter = loss.gradient(half, target), loss.gradient(quarter, target)
            # Two equations for t_0 and t_1, at p = 1/2 and p = 1/4: gradient t_0 / (1 - p) - t_1 / p.
            yes = at_half / 4 - at_quarter * 3 / 8  # of 2 (t_0 - t_1) and 4 t_0 / 3 - 4 t_1
            mass = 2 * yes + at_half / 2
            inner = xp.clip(output, min=0.01, max=0.99)  # at 0 and 1 frameworks cut the loss off
            own = loss.gradient(inner, target) * inner * (1 - inner)
            check_scale("binary cross entropy", own, mass * inner - yes, mass)
        return p, xp.sqrt(xp.clip(mass, min=0))

    def exact(self, loss: OutputLoss, output: Array, target: object) -> list[Array] | None:
        p, root = self._scaled(loss, output, target)
        if output.ndim > 2:
            return None
        spread = namespace(p).sqrt(self._variance(p))
        return one_by_one(root * spread if self.logits else root / spread)

    def sampled(self, loss: OutputLoss, output: Array, target: object, draw: Draw) -> Array:
        p, root = self._scaled(loss, output, target)
        u = draw(_per_row(output), False).reshape(output.shape)
        residual = p - namespace(p).astype(u < p, p.dtype)
        return (residual if self.logits else residual / self._variance(p)) * root

    def predicted(self, output: Array, target: Any) -> Array:
        """1 where it is the likelier answer, else 0."""
        xp = namespace(output)
        return xp.astype(output > (0.0 if self.logits else 0.5), target.dtype).reshape(target.shape)


def one_by_one(values: Array) -> list[Array]:
    """[n, K] as K arrays that hold one column each, and zero elsewhere; [n] as one."""
    flat = values.reshape((values.shape[0], _per_row(values)))
    unit = identity(int(flat.shape[1]), flat)
    return [(flat * unit[k]).reshape(values.shape) for k in range(unit.shape[0])]


class SquaredError(Likelihood):
    """Gaussian targets of the output's shape; the variance follows from the loss's own scale."""

    def predicted(self, output: Array, target: Any) -> Array:
        """Errors: UnsupportedModel."""
        raise UnsupportedModel(NO_LABEL)

    @property
    def has_margin(self) -> bool:
        return False

    def _root_curvature(self, loss: OutputLoss, output: Array, target: object) -> Array:
        xp = namespace(output)
        second = loss.hessian_row_sums(output, target)
        self._check(loss, output, target, second)
        return xp.sqrt(xp.clip(second, min=0))

    def _check(self, loss: OutputLoss, output: Array, target: object, second: Array) -> None:
        """A sum of squares has one second derivative everywhere, and none across outputs.

        The step is as long as residuals are: shorter ones are lost in the rounding of these.
        """
        xp, first = namespace(output), loss.gradient(output, target)
        most = xp.max(xp.abs(second))
        size = xp.max(xp.abs(output)) + 1.0 + xp.max(xp.abs(first)) / xp.where(most > 0, most, xp.ones_like(most))
        step = xp.where(xp.cumulative_sum(xp.ones_like(_flat(output)), axis=1) % 2 < 1, size, -size)
        step = step.reshape(output.shape)
        change = loss.gradient(output + step, target) - first
        check_scale("squared error", change / size, second * step / size, second)

    def exact(self, loss: OutputLoss, output: Array, target: object) -> list[Array] | None:
        if output.ndim > 2:
            return None
        return one_by_one(self._root_curvature(loss, output, target))

    def sampled(self, loss: OutputLoss, output: Array, target: object, draw: Draw) -> Array:
        noise = draw(_per_row(output), True).reshape(output.shape)
        return self._root_curvature(loss, output, target) * namespace(output).astype(noise, output.dtype)


class Elementwise(SquaredError):
    """Outputs that meet a target each, for any number of them: the loss's own second derivative by each.

    Huber, Poisson and the like. A Gaussian with that curvature stands for the distribution. It is the GGN; where the
    loss is concave, zero is taken.
    """

    def __init__(self) -> None:
        self._asked = False

    def _check(self, loss: OutputLoss, output: Array, target: object, second: Array) -> None:
        """Nothing: the loss is known."""
        self._asked = True

    @property
    def said(self) -> str:
        return "the loss's own second derivatives by each output" if self._asked else ""


class OwnHessian(Likelihood):
    """Any loss of at most `MOST` outputs a row whose distribution is not known: its own output Hessian, by autograd.

    That is the GGN. Where a row's loss is not convex in its output (focal losses, a learned variance), its positive
    part is taken, the nearest matrix that is a second moment; `negative_share` says how much that left out.
    Errors: UnsupportedLoss for more outputs, and for a loss whose Hessian is zero everywhere (hinge, absolute error).
    """

    def __init__(self) -> None:
        self._left_out, self._seen = 0.0, 0.0

    @property
    def negative_share(self) -> float:
        """Of the absolute eigenvalues of the rows seen so far: those that were negative."""
        return self._left_out / self._seen if self._seen else 0.0

    @property
    def said(self) -> str:
        if not self._seen:
            return ""
        cut = f", its positive part ({self.negative_share:.1%} was negative)" if self.negative_share else ""
        return f"the loss's own output Hessian{cut}"

    def _root(self, loss: OutputLoss, output: Array, target: object) -> Array:
        """[n, K, K]."""
        if _per_row(output) > MOST:
            raise UnsupportedLoss(
                f"The Fisher information needs the distribution behind the loss, which is not known for {loss.name}, "
                f"and a row has {_per_row(output)} outputs; up to {MOST} its output Hessian would serve. Give "
                "likelihood='cross_entropy', 'binary_cross_entropy' or 'squared_error', an OutputHessian, a "
                "TargetSampler, or ask for fisher='empirical'."
            )
        hessian = accumulable(loss.hessian(output, target))  # there are no eigenvalues in half precision
        xp = namespace(hessian)
        if not bool(xp.any(hessian != 0)) and _is_piecewise_linear(loss, output, target):
            raise UnsupportedLoss(
                f"{loss.name} is piecewise linear in the output: its second derivative is zero wherever there is one, "
                "and so are its GGN and every score by it. Use fisher='empirical', hw.Dual() or hw.DataInf()."
            )
        values, vectors = xp.linalg.eigh(hessian)
        # Counted over all rows, for the fit's status: a large share says that the GGN is a poor stand-in.
        self._left_out += float(xp.sum(xp.where(values < -_rounding(values), -values, xp.zeros_like(values))))
        self._seen += float(xp.sum(xp.abs(values)))
        # H = V diag(values) V^T: columns v sqrt(value) are cotangents whose sum of v v^T is H.
        return vectors * xp.sqrt(xp.clip(values, min=0))[:, None, :]

    def exact(self, loss: OutputLoss, output: Array, target: object) -> list[Array] | None:
        return _columns(self._root(loss, output, target), output)

    def sampled(self, loss: OutputLoss, output: Array, target: object, draw: Draw) -> Array:
        return _combined(self._root(loss, output, target), output, draw)


def _is_piecewise_linear(loss: OutputLoss, output: Array, target: Any) -> bool:
    """Whether the Hessian is zero also at the origin, at the opposite, and close to the targets.

    A batch of outliers has none of a Huber loss either, or one of safe rows of a squared hinge.
    """
    xp = namespace(output)
    # A zero Hessian here may be chance; at all of these it is the loss's form.
    points = [0.0 * output, -output, 0.01 * output, 0.0 * output + 0.01]
    if is_array(target) and tuple(target.shape) == tuple(output.shape):
        near = xp.astype(target, output.dtype)
        points += [near, near + 0.01, 0.99 * near - 0.001]
    return not any(bool(xp.any(loss.hessian(point, target) != 0)) for point in points)


def _rounding(values: Array) -> Array:
    """What an eigenvalue may be below zero by rounding."""
    xp = namespace(values)
    return 1e3 * float(xp.finfo(values.dtype).eps) * xp.max(xp.abs(values))


def _columns(root: Array, output: Array) -> list[Array]:
    """The columns of a root [n, K, K], as cotangents of the output."""
    root = namespace(root).astype(root, output.dtype)
    return [root[:, :, k].reshape(output.shape) for k in range(root.shape[2])]


def _combined(root: Array, output: Array, draw: Draw) -> Array:
    """The columns of a root [n, K, K], combined with normal numbers."""
    xp = namespace(root)
    # E[noise noise^T] = I: one cotangent R noise has R R^T = H on average.
    noise = xp.astype(draw(int(root.shape[2]), True), root.dtype)
    return xp.astype((root @ noise[:, :, None]).reshape(output.shape), output.dtype)


class OutputHessian(Likelihood):
    """Any loss whose Hessian with respect to a row's flattened output the user gives.

    `hessian(output, target)`: [n, K, K], symmetric positive semi-definite, K numbers of output per row.
    """

    def __init__(self, hessian: Callable[[Array, Any], Array]):
        self.hessian = hessian

    def _root(self, output: Array, target: object) -> Array:
        values, vectors = namespace(output).linalg.eigh(self.hessian(output, target))
        xp, rows, size = namespace(values), int(output.shape[0]), _per_row(output)
        if tuple(vectors.shape) != (rows, size, size):
            raise InvalidSetting(f"The output Hessian is {tuple(vectors.shape)}; expected {(rows, size, size)}.")
        if bool(xp.any(values < -1e-6 * xp.max(xp.abs(values)))):
            raise InvalidSetting(f"The output Hessian has a negative eigenvalue, {float(xp.min(values)):g}.")
        return vectors * xp.sqrt(xp.clip(values, min=0))[:, None, :]

    def exact(self, loss: OutputLoss, output: Array, target: object) -> list[Array] | None:
        return _columns(self._root(output, target), output)

    def sampled(self, loss: OutputLoss, output: Array, target: object, draw: Draw) -> Array:
        return _combined(self._root(output, target), output, draw)


class TargetSampler(Likelihood):
    """Any loss whose targets the user samples: `sample(output, uniforms [n, K])` gives targets for the loss.

    K is the number of outputs per row. The targets must follow the distribution whose negative logarithm the loss is.
    """

    def __init__(self, sample: Callable[[Array, Array], Any]):
        self.sample = sample

    def exact(self, loss: OutputLoss, output: Array, target: object) -> list[Array] | None:
        return None

    def sampled(self, loss: OutputLoss, output: Array, target: object, draw: Draw) -> Array:
        return loss.gradient(output, self.sample(output, draw(_per_row(output), False)))


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


def predicted_labels(likelihood: Likelihood | None, output: Any, target: Any) -> Any:
    """What the model predicts, as targets. Errors: UnsupportedModel where it is no label, or not known."""
    if likelihood is None or not (is_array(output) and is_array(target)):
        kinds = f"the output is {type(output).__name__}, the target {type(target).__name__}"
        raise UnsupportedModel(UNKNOWN_LABEL.format("a loss of another function" if likelihood is None else kinds))
    return likelihood.predicted(output, target)


def fisher_cotangents(
    likelihood: Likelihood | None,
    loss: OutputLoss,
    output: Any,
    target: Any,
    fisher: str,
    draws: Sequence[Draw],
) -> Iterator[Any]:
    """Cotangents whose summed v v^T is (or estimates) each row's output Hessian; see `Likelihood`.

    Errors: InvalidSetting; UnsupportedLoss for outputs that are no single array, or targets that cannot be
    enumerated.
    """
    if fisher not in ("auto", "exact", "sampled", "empirical"):
        raise InvalidSetting(f"fisher is {fisher!r}; expected 'auto', 'exact', 'sampled' or 'empirical'.")
    if fisher == "empirical":
        yield loss.gradient(output, target)
        return
    if not is_array(output):
        raise UnsupportedLoss(
            f"The Fisher information is that of one output tensor, and the model returns a {type(output).__name__}: "
            "use fisher='empirical', or a method of the GGN (hw.Direct(), hw.Cg(preconditioner=None))."
        )
    likelihood = OwnHessian() if likelihood is None else likelihood
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
        # A mean over draws: each v counts 1 / sqrt(K), so that v v^T counts 1 / K.
        yield likelihood.sampled(loss, output, target, draw) / math.sqrt(len(draws))


def ggn_cotangents(likelihood: Likelihood | None, loss: OutputLoss, output: Any, target: Any) -> list[Any] | None:
    """Cotangents whose summed v v^T is exactly each row's output Hessian, for any loss of few outputs; else None.

    None also where the loss is not convex in the output: then the GGN has no such root.
    """
    if not is_array(output) or _per_row(output) > MOST:
        return None
    if likelihood is not None and likelihood.is_hessian and not isinstance(likelihood, OwnHessian | Elementwise):
        try:
            found = likelihood.exact(loss, output, target)
        except UnsupportedLoss:
            found = None
        if found is not None:
            return found
    # The general way: K second derivatives a row, and no assumption about the loss.
    hessian = accumulable(loss.hessian(output, target))
    xp = namespace(hessian)
    values, vectors = xp.linalg.eigh(hessian)
    if bool(xp.any(values < -_rounding(values))):
        return None
    return _columns(vectors * xp.sqrt(xp.clip(values, min=0))[:, None, :], output)


def no_hessian(output: Array) -> Any:
    """Of a loss that is linear in its output: zeros [n, K, K]."""
    size = _per_row(output)
    return zeros_like(output, (int(output.shape[0]), size, size))


def _flat(array: Array) -> Array:
    """[n, numbers of a row]."""
    return array.reshape((array.shape[0], _per_row(array)))


def _size(array: Array) -> int:
    return math.prod(array.shape)


def _per_row(array: Array) -> int:
    """Numbers of one row."""
    return math.prod(array.shape[1:])
