"""Exact removal: the estimator as it would be, had some rows not been there.

Least squares (LinearRegression, Ridge, RidgeClassifier) has it in closed form. With Z the inputs, a one for the
intercept, w the weights and P the penalty, let Q R be the factorisation of [sqrt(w) Z; sqrt(P)], and Q_n the rows that
belong to data:

1. the coefficients are R^-1 Q_n^T sqrt(w) y, and the residuals e = sqrt(w) (Z coef - y);
2. without the rows S they are coef + R^-1 Q_S^T (I - Q_S Q_S^T)^-1 e_S. One row: its leverage is |Q_s|^2.

Every other loss is refitted: Newton's method on the estimator's own objective from the coefficients with all rows, all
groups at once, each step by conjugate gradients whose preconditioner is the inverse of the Hessian of all rows. That is
no approximation, only more work: it ends at rounding. Source of 2: Allen 1974; Cook 1977.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike

from headwater.arrays import rows_within_memory
from headwater.errors import NotConverged, SingularOperator
from headwater.positions import row_groups
from headwater.sklearn.batch import FeatureBatch
from headwater.sklearn.families import Array, SquaredError
from headwater.sklearn.linear import LinearModel
from headwater.sklearn.provider import SklearnGradientProvider

TOLERANCE = 1e-11
"""Newton's decrement, over the root of one plus the objective, after which the step just taken is the last."""
STEPS = 60
INNER_TOLERANCE = 1e-4
"""Of conjugate gradients within a step, relative, in the norm of the preconditioner."""
EPS = float(np.finfo(np.float64).eps)


@dataclass(frozen=True, eq=False)
class Refits:
    """Coefficients without each of several groups of rows."""

    model: LinearModel
    weights: Array
    """Coefficients, and the intercept as a last column: [groups, o, features (+ 1)]."""
    closed_form: bool
    """Whether they follow from a formula; else they were refitted, to rounding."""
    steps: Array
    """Newton steps of each group; zero in closed form."""

    @property
    def coef(self) -> Array:
        """[groups, o, features]."""
        return self.weights[:, :, : self.model.features]

    @property
    def intercept(self) -> Array:
        """[groups, o]; zeros where the estimator has none."""
        if self.model.intercept is None:
            return np.zeros(self.weights.shape[:2])
        return self.weights[:, :, -1]

    def outputs(self, x: Array) -> Array:
        """What each of them gives for features x [q, features], before any link: [groups, q, o]."""
        return x @ np.swapaxes(self.coef, 1, 2) + self.intercept[:, None, :]

    def losses(self, batch: FeatureBatch) -> Array:
        """Each query's loss under each of them: [q, groups]."""
        step = rows_within_memory(4 * len(batch) * self.model.outputs, batch.x)
        pieces = (Refits(self.model, w, self.closed_form, self.steps) for w in _cut(self.weights, step))
        found = [self.model.family.losses(piece.outputs(batch.x), batch.y) for piece in pieces]
        return np.concatenate(found).T if found else np.zeros((len(batch), 0))


def _cut(values: Array, step: int) -> Iterable[Array]:
    return (values[start : start + step] for start in range(0, len(values), step))


class ExactRemoval:
    """A fitted estimator's objective on its train rows, and its minimum without some of them.

    Class weights stay as they are: "balanced" ones are not balanced again. What goes with the rows of the penalty goes
    (see `headwater.sklearn.linear`). Errors: SingularOperator where coefficients are not determined.
    """

    def __init__(self, provider: SklearnGradientProvider, batch: FeatureBatch):
        self.model = provider.model
        self.x, self.y = batch.x, batch.y
        weights = provider.row_weights(batch)
        self.row_weights = np.ones(len(batch)) if weights is None else weights
        self._inverse: Array | None = None
        ones = np.ones((len(batch), 1))
        self._z = self.x if self.model.intercept is None else np.concatenate([self.x, ones], axis=1)

    @property
    def closed_form(self) -> bool:
        """Least squares whose penalty does not go with the rows."""
        penalty = self.model.penalty
        return isinstance(self.model.family, SquaredError) and (penalty.is_zero or not penalty.per_row)

    @cached_property
    def with_all(self) -> Refits:
        """The minimum with all rows, as exactly as the others: the estimator's own, but for its solver's tolerance."""
        if self.closed_form:
            start = np.stack([s.coef for s in self._squares], axis=0)
            return Refits(self.model, start[None], True, np.zeros(1, dtype=int))
        # The estimator stopped at its own tolerance: a difference of two refits must not have that in it.
        return self._refitted([np.array([], dtype=int)], self.model.weights)

    def without(self, groups: Iterable[ArrayLike] | None = None) -> Refits:
        """Without each of the groups of rows, named by position; None for every row by itself.

        Errors: InvalidInput for a group that is empty, or names rows that are not there; BatchMismatch for a row twice.
        """
        chosen = row_groups(groups, len(self.x))
        if not self.closed_form:
            return self._refitted(chosen, self.with_all.weights[0])
        weights = np.stack([square.without(chosen) for square in self._squares], axis=1)
        return Refits(self.model, weights, True, np.zeros(len(chosen), dtype=int))

    # Least squares ------------------------------------------------------------------------------------------------

    @cached_property
    def _squares(self) -> list[_LeastSquares]:
        """One for each output; outputs of one strength share the factorisation."""
        penalty, model = self.model.penalty, self.model
        penalty_diagonal = penalty.diagonal(model.features, model.intercept is not None)
        targets = model.family.targets(self.y, model.outputs)  # type: ignore[attr-defined]
        factors: dict[float, tuple[Array, Array]] = {}
        for strength, diagonal in zip(penalty.strength, penalty_diagonal, strict=True):
            # Outputs differ in their targets only: one QR serves all of one strength.
            if strength not in factors:
                factors[strength] = _factorise(self._z, self.row_weights, diagonal)
        return [
            _LeastSquares(*factors[strength], self._z, targets[:, k], self.row_weights)
            for k, strength in enumerate(penalty.strength)
        ]

    # Newton's method ----------------------------------------------------------------------------------------------

    def _refitted(self, groups: Sequence[Array], start: Array) -> Refits:
        rows, outputs = len(self.x), self.model.outputs
        at_once = rows_within_memory(8 * rows * outputs, self.x)
        found, steps = [], []
        for first in range(0, len(groups), at_once):
            piece = groups[first : first + at_once]
            kept = np.ones((len(piece), rows))
            for mask, group in zip(kept, piece, strict=True):
                # A weight of zero, not fewer rows: all groups then have arrays of one shape.
                mask[group] = 0.0
            # The Hessian of all rows is near to that of nearly all rows, and is inverted once for all groups.
            newton = _Newton(self, kept * self.row_weights, self._preconditioner(start))
            weights, taken = newton.minimise(np.broadcast_to(start, (len(piece), *start.shape)).copy())
            found.append(weights)
            steps.append(taken)
        return Refits(self.model, np.concatenate(found), False, np.concatenate(steps))

    def penalty_diagonal(self, weight: Array) -> Array:
        """The penalty's diagonal beside the sum over rows of these total weights [groups]: [groups, o, i]."""
        penalty, model = self.model.penalty, self.model
        diagonal = penalty.diagonal(model.features, model.intercept is not None)
        return diagonal * (weight[:, None, None] if penalty.per_row else np.ones((len(weight), 1, 1)))

    def _preconditioner(self, at: Array) -> Array:
        """The pseudo-inverse of the Hessian of all rows: [D, D]; once, at the first coefficients that are asked for."""
        if self._inverse is None:
            o, i = at.shape
            z, eye = self._z @ at.T, np.eye(o)
            products = [self.model.family.hessian_product(z, self.y, np.broadcast_to(unit, z.shape)) for unit in eye]
            hessian = np.zeros((o, i, o, i))
            for k, product in enumerate(products):
                for m in range(o):
                    hessian[k, :, m, :] = (self._z * (product[:, m] * self.row_weights)[:, None]).T @ self._z
            matrix = hessian.reshape((o * i, o * i))
            matrix[np.diag_indices(o * i)] += self.penalty_diagonal(self.row_weights.sum(keepdims=True))[0].reshape(-1)
            self._inverse = _pseudo_inverse(matrix)
        return self._inverse

    @property
    def inputs(self) -> Array:
        """Features, and a one for the intercept: [n, i]."""
        return self._z


def _pseudo_inverse(matrix: Array) -> Array:
    """Of a symmetric positive semi-definite matrix, after its diagonal has been scaled to ones."""
    # Features of different units would else hide small eigenvalues (Jacobi scaling).
    scale = 1.0 / np.sqrt(np.where(np.diag(matrix) > 0, np.diag(matrix), 1.0))
    values, vectors = np.linalg.eigh(matrix * scale[:, None] * scale)
    # A softmax without penalty has a null space (one number added to all outputs): left alone, not divided by.
    kept = values > len(values) * EPS * values.max(initial=0.0)
    turned = vectors[:, kept] * scale[:, None]
    return (turned / values[kept]) @ turned.T


def _factorise(z: Array, weights: Array, penalty_diagonal: Array) -> tuple[Array, Array]:
    """Q_n [n, i] and R^-1 with the columns' scales [i, i]. Errors: SingularOperator for dependent columns."""
    # The penalty as further rows: QR of the stack never squares the condition, as normal equations would.
    stacked = np.concatenate([z * np.sqrt(weights)[:, None], np.diag(np.sqrt(penalty_diagonal))])
    scale = np.linalg.norm(stacked, axis=0)
    if not scale.all():
        raise SingularOperator(
            f"Column {int(np.argmin(scale))} of the inputs is zero: its coefficient is undetermined."
        )
    q, r = np.linalg.qr(stacked / scale)
    sizes = np.abs(np.diag(r))
    if sizes.min() <= len(stacked) * EPS * sizes.max():
        raise SingularOperator(
            "The inputs have dependent columns, so that the coefficients of least squares are not determined. Leave "
            "some columns out, or use Ridge."
        )
    # Rows' own part of Q: its products with itself are their leverages.
    return q[: len(z)], np.linalg.inv(r) / scale[:, None]


class _LeastSquares:
    """One output of least squares."""

    def __init__(self, q: Array, back: Array, z: Array, y: Array, weights: Array):
        self._q, self._back = q, back
        root = np.sqrt(weights)
        self.coef = back @ (q.T @ (root * y))
        self._residuals = root * (z @ self.coef - y)

    def without(self, groups: Sequence[Array]) -> Array:
        """[groups, i]."""
        return np.stack([self._without(group) for group in groups])

    def _without(self, group: Array) -> Array:
        q = self._q[group]
        # I - H for the group, H its leverage: exact leave-out of least squares (Cook 1977).
        left = np.eye(len(group)) - q @ q.T
        lowest = float(np.linalg.eigvalsh(left)[0])
        if lowest <= 1e4 * EPS:
            raise SingularOperator(
                f"Without rows {group[:5].tolist()} the coefficients are not determined: the rows' leverage is "
                f"{1 - lowest:.6g}."
            )
        return self.coef + self._back @ (q.T @ np.linalg.solve(left, self._residuals[group]))


class _Newton:
    """Newton's method for several weighted objectives over the same rows; arrays have an axis of groups first."""

    def __init__(self, problem: ExactRemoval, row_weights: Array, inverse: Array):
        self.family, self.z, self.y = problem.model.family, problem.inputs, problem.y
        self.row_weights = row_weights
        self.penalty_diagonal = problem.penalty_diagonal(row_weights.sum(axis=1))
        self.inverse = inverse

    def _select(self, index: Array) -> _Newton:
        # Groups that have converged leave; all else is shared, not copied.
        other = object.__new__(_Newton)
        other.__dict__.update(self.__dict__)
        other.row_weights, other.penalty_diagonal = self.row_weights[index], self.penalty_diagonal[index]
        return other

    def _output(self, weights: Array) -> Array:
        return self.z @ np.swapaxes(weights, 1, 2)

    def _pull(self, cotangent: Array) -> Array:
        return np.swapaxes(cotangent * self.row_weights[:, :, None], 1, 2) @ self.z

    def objective(self, weights: Array) -> Array:
        losses = self.family.losses(self._output(weights), self.y)
        return (losses * self.row_weights).sum(axis=1) + (self.penalty_diagonal * weights**2).sum(axis=(1, 2)) / 2

    def gradient(self, output: Array, weights: Array) -> Array:
        return self._pull(self.family.gradient(output, self.y)) + self.penalty_diagonal * weights

    def product(self, output: Array, v: Array) -> Array:
        return self._pull(self.family.hessian_product(output, self.y, self._output(v))) + self.penalty_diagonal * v

    def precondition(self, v: Array) -> Array:
        return (v.reshape((len(v), -1)) @ self.inverse).reshape(v.shape)

    def minimise(self, weights: Array) -> tuple[Array, Array]:
        """From these weights: the minima [groups, o, i], and how many steps each took."""
        steps, active = np.zeros(len(weights), dtype=int), np.arange(len(weights))
        for _ in range(STEPS):
            own = self._select(active)
            moved, size = own._step(weights[active])
            weights[active] = moved
            steps[active] += 1
            active = active[~(size <= TOLERANCE)]
            if not len(active):
                return weights, steps
        warnings.warn(
            f"{len(active)} of {len(weights)} refits have not converged after {STEPS} Newton steps; the first is group "
            f"{active[0]} of its batch.",
            NotConverged,
            stacklevel=2,
        )
        return weights, steps

    def _step(self, weights: Array) -> tuple[Array, Array]:
        """One step down, and Newton's decrement before it, relative."""
        output = self._output(weights)
        gradient = self.gradient(output, weights)
        step = self._solve(output, gradient)
        before = self.objective(weights)
        # Newton's decrement: about how far the objective still is above its minimum.
        size = np.sqrt(np.maximum(_inner(gradient, step), 0.0) / (1 + np.abs(before)))
        length = np.ones(len(weights))
        for _ in range(30):
            after = self.objective(weights - length[:, None, None] * step)
            # Within rounding a step may seem to go up; that is no reason to halve it.
            worse = ~(after <= before + 1e3 * EPS * (1 + np.abs(before)))
            if not worse.any():
                break
            length[worse] /= 2
        return weights - length[:, None, None] * step, size

    def _solve(self, output: Array, right: Array) -> Array:
        """Conjugate gradients."""
        x, residual = np.zeros_like(right), right.copy()
        direction = smoothed = self.precondition(residual)
        rho = first = _inner(residual, smoothed)
        for _ in range(right[0].size):
            active = rho > INNER_TOLERANCE**2 * first
            if not active.any():
                break
            product = self.product(output, direction)
            curvature = _inner(direction, product)
            # A null direction of one group must not stop the others.
            active &= curvature > 0
            alpha = np.where(active, rho / np.where(active, curvature, 1.0), 0.0)[:, None, None]
            x, residual = x + alpha * direction, residual - alpha * product
            smoothed = self.precondition(residual)
            following = _inner(residual, smoothed)
            beta = np.where(active, following / np.where(active, rho, 1.0), 0.0)[:, None, None]
            direction = smoothed + beta * direction
            rho = np.where(active, following, 0.0)
        return x


def _inner(left: Array, right: Array) -> Array:
    """[groups]."""
    return (left * right).sum(axis=(1, 2))
