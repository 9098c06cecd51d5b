"""Which rows decide the outputs of retrained models? A bank's masks and outputs, and no gradient of anything.

    keep     [m, n]   bool: the train rows that each subset keeps
    outputs  [m, q]   of the models retrained on them, a mean over runs; losses, so that lower is better
    scores   [q, n]   positive: the row helps (its absence raises the output)
    errors   [q, n]   standard errors, over subsets: what other subsets as many would have moved the scores by

Three estimates, of which the linear ones are a *datamodel*, output ~ constant - sum of scores of the rows kept:

1. `banzhaf`: the mean output without the row, minus that with it. Each model serves all rows (maximum sample reuse);
   for subsets of independent coin flips it is the Banzhaf value. Error: that of a difference of two means.
2. `ridge`: least squares with a penalty on the squares, for each query the penalty with the smallest error on subsets
   left out one by one, in closed form: the residual over 1 - h, h the subset's leverage. Error: jackknife over subsets
   at that penalty, in closed form too.
3. `lasso`: with a penalty on the absolute values, chosen by `FOLDS` folds of subsets; for outputs that few rows decide.
   Error: jackknife over `GROUPS` groups of subsets, at that penalty; 0 for a row that none of them takes in.

Errors are those of the penalised estimate: what the penalty takes off (both linear ones shrink) is not in them.

With m subsets of one size nobody can know what a row does by itself: one that goes makes room for another. Scores then
say what a row does in place of another at random; those of the first two add up to zero.

Sources: Wang and Jia 2023, arXiv 2205.15466 (Banzhaf, sample reuse); Ilyas et al. 2022, arXiv 2202.00622 (datamodels);
Allen 1974 (PRESS); Beck and Teboulle 2009 (FISTA); O'Donoghue and Candes 2015 (restarts).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from headwater.errors import InvalidInput, InvalidSetting, NonFiniteValue, NotConverged, ShapeMismatch
from headwater.evaluate.checks import Flags, Floats, subset_mask

FOLDS = 5
"""Of subsets, that choose a lasso's penalty."""
GROUPS = 20
"""Of subsets, left out one after the other for a lasso's errors."""
RIDGE_PATH = np.logspace(-4, 4, 33)
"""Penalties of a ridge, in mean eigenvalues of the masks' Gram matrix."""
LASSO_PATH = np.logspace(0, -3, 19)
"""Penalties of a lasso, as shares of the smallest that leaves no row."""
ROUGH, FINE, STEPS = 1e-3, 1e-7, 20_000
"""A lasso's step that ends it, as a share of that penalty: while choosing, and in the end; and how many at most."""


@dataclass(frozen=True, eq=False)
class Datamodel:
    """Of q queries and n rows."""

    scores: Floats
    """[q, n]."""
    errors: Floats
    """[q, n]."""
    penalties: Floats | None = None
    """[q]: of a ridge in mean eigenvalues, of a lasso as a share of the smallest that leaves no row; else None."""
    explained: Floats | None = None
    """[q]: the share of the outputs' variance that is forecast for subsets left out; below zero: none of it."""


def banzhaf(keep: ArrayLike, outputs: ArrayLike) -> Datamodel:
    """The mean output of the subsets without each row, minus that of those with it.

    Errors: ShapeMismatch; InvalidInput for a row that fewer than two subsets keep, or leave out.
    """
    kept, values = _checked(keep, outputs)
    there, counts = kept.astype(np.float64), kept.sum(axis=0)
    few = np.minimum(counts, len(kept) - counts) < 2
    if few.any():
        row = int(few.argmax())
        raise InvalidInput(
            f"Row {row} is in {int(counts[row])} of {len(kept)} subsets; its mean output with it and without it need "
            "two of each."
        )
    centred = values - values.mean(axis=0)  # so that squares lose no digits
    means, spreads = [], []
    for mask, count in ((there, counts), (1.0 - there, len(kept) - counts)):
        mean = mask.T @ centred / count[:, None]
        squares = mask.T @ centred**2 / count[:, None] - mean**2
        means.append(mean)
        spreads.append(np.maximum(squares, 0.0) / (count[:, None] - 1))
    return Datamodel((means[1] - means[0]).T, np.sqrt(spreads[0] + spreads[1]).T)


def ridge(keep: ArrayLike, outputs: ArrayLike, penalty: float | None = None) -> Datamodel:
    """Least squares of the outputs on the masks, with a penalty on squares; None: for each query the best of a path.

    penalty: in mean eigenvalues of the centred masks' Gram matrix. Errors: ShapeMismatch; InvalidSetting.
    """
    kept, values = _checked(keep, outputs)
    m, centred = len(kept), values - values.mean(axis=0)
    masks = kept - kept.mean(axis=0)
    # In the space of subsets: few of them, and rows may be many.
    spectrum, basis = np.linalg.eigh(masks @ masks.T)
    spectrum = spectrum.clip(min=0.0)
    amounts = RIDGE_PATH if penalty is None else np.array([_amount(penalty)])
    along, squares = basis.T @ centred, basis**2

    def left_out(amount: float) -> Floats:
        """Each subset's error, by the model of all others: [m, q]."""
        share = spectrum / (spectrum + amount * spectrum.mean())
        leverage = 1.0 / m + squares @ share
        found: Floats = (centred - basis @ (share[:, None] * along)) / (1.0 - leverage)[:, None]
        return found

    errors = np.stack([(left_out(amount) ** 2).sum(axis=0) for amount in amounts])
    best = errors.argmin(axis=0)
    scores, spread = np.empty((values.shape[1], masks.shape[1])), np.empty((values.shape[1], masks.shape[1]))
    for k in np.unique(best):
        mine = best == k
        # The map from outputs to coefficients; without subset i they move by its column times the error left out.
        smoother = masks.T @ ((basis / (spectrum + amounts[k] * spectrum.mean())) @ basis.T)
        moves = left_out(amounts[k])[:, mine]
        scores[mine] = -(smoother @ centred[:, mine]).T
        variance = smoother**2 @ moves**2 - (smoother @ moves) ** 2 / m
        spread[mine] = np.sqrt(np.maximum(variance, 0.0) * (m - 1) / m).T
    # The mean of all others would be this far off: a constant is what a datamodel has to beat.
    plain = (centred**2).sum(axis=0) * (m / (m - 1)) ** 2
    return Datamodel(scores, spread, amounts[best], 1.0 - _ratio(errors.min(axis=0), plain))


def lasso(keep: ArrayLike, outputs: ArrayLike, penalty: float | None = None, *, seed: int = 0) -> Datamodel:
    """Least squares of the outputs on the masks, with a penalty on absolute values; None: the best of a path.

    penalty: as a share of the smallest that leaves no row. seed: of the folds. Errors: ShapeMismatch; InvalidSetting.
    Warns: NotConverged.
    """
    kept, values = _checked(keep, outputs)
    rng, m = np.random.default_rng(seed), len(kept)
    path = LASSO_PATH if penalty is None else np.array([_amount(penalty)])
    best, explained = np.zeros(values.shape[1], dtype=int), None
    if penalty is None:
        errors = np.zeros((len(path), values.shape[1]))
        plain = np.zeros(values.shape[1])
        for fold in np.array_split(rng.permutation(m), min(FOLDS, m)):
            others = np.setdiff1d(np.arange(m), fold)
            problem = _Lasso.of(kept[others], values[others])
            found = problem.zero
            for k, amount in enumerate(path):
                found = problem.solve(amount * problem.largest, found, ROUGH)
                errors[k] += (problem.misses(found, kept[fold], values[fold]) ** 2).sum(axis=0)
            plain += (problem.misses(problem.zero, kept[fold], values[fold]) ** 2).sum(axis=0)
        best = errors.argmin(axis=0)
        explained = 1.0 - _ratio(errors.min(axis=0), plain)
    whole = _Lasso.of(kept, values)
    amounts = path[best] * whole.largest
    coefficients = whole.solve(amounts, whole.zero, FINE)
    # Absolute penalties stay: groups differ in what the smallest that leaves no row is.
    groups = np.array_split(rng.permutation(m), min(GROUPS, m))
    moved = np.stack([_without(kept, values, group, amounts, coefficients) for group in groups])
    variance = ((moved - moved.mean(axis=0)) ** 2).sum(axis=0) * (len(groups) - 1) / len(groups)
    return Datamodel(-coefficients.T, np.sqrt(variance).T, path[best], explained)


ESTIMATES: dict[str, Callable[..., Datamodel]] = {"banzhaf": banzhaf, "ridge": ridge, "lasso": lasso}


def _without(kept: Flags, values: Floats, group: ArrayLike, amounts: Floats, start: Floats) -> Floats:
    others = np.setdiff1d(np.arange(len(kept)), group)
    return _Lasso.of(kept[others], values[others]).solve(amounts, start, ROUGH)


@dataclass(frozen=True, eq=False)
class _Lasso:
    """|outputs - masks c|^2 / (2 m) + penalty |c|_1, with a free constant; for all queries at once."""

    masks: Floats
    """[m, n], centred."""
    outputs: Floats
    """[m, q], centred."""
    centres: tuple[Floats, Floats]
    gram: Floats | None
    """[n, n], where there are fewer rows than subsets."""
    right: Floats
    """[n, q]."""
    steepest: float
    """The largest eigenvalue of the Gram matrix."""

    @classmethod
    def of(cls, kept: Flags, values: Floats) -> _Lasso:
        centres = kept.mean(axis=0), values.mean(axis=0)
        masks, outputs = kept - centres[0], values - centres[1]
        m, n = masks.shape
        small = (masks @ masks.T if m < n else masks.T @ masks) / m
        steepest = float(np.linalg.eigvalsh(small)[-1])
        return cls(masks, outputs, centres, None if m < n else small, masks.T @ outputs / m, steepest)

    @property
    def zero(self) -> Floats:
        return np.zeros_like(self.right)

    @property
    def largest(self) -> Floats:
        """[q]: the smallest penalty that leaves no row; 1 for outputs that do not vary."""
        found: Floats = np.abs(self.right).max(axis=0)
        return np.where(found > 0, found, 1.0)

    def misses(self, coefficients: Floats, kept: Flags, values: Floats) -> Floats:
        """Of other subsets: [m, q]."""
        found: Floats = values - self.centres[1] - (kept - self.centres[0]) @ coefficients
        return found

    def _slope(self, c: Floats) -> Floats:
        found: Floats = self.gram @ c if self.gram is not None else self.masks.T @ (self.masks @ c) / len(self.masks)
        return found - self.right

    def solve(self, penalties: Floats, start: Floats, tolerance: float) -> Floats:
        """[n, q]: proximal steps with momentum, until none moves by more than the tolerance says."""
        step = 1.0 / max(self.steepest, 1e-300)
        found, ahead, momentum = start, start, np.ones(start.shape[1])
        # A step over its length is what the optimality conditions miss, in units of the penalty.
        enough = tolerance * self.largest * step
        missed = np.inf
        for _ in range(STEPS):
            after = _shrunk(ahead - step * self._slope(ahead), penalties * step)
            missed = float(np.max(np.abs(after - ahead).max(axis=0) / enough))
            if missed <= 1.0:
                return after
            longer = (1.0 + np.sqrt(1.0 + 4.0 * momentum**2)) / 2.0
            # A query whose momentum points uphill drops it: the rate is then that of strong convexity.
            uphill = ((ahead - after) * (after - found)).sum(axis=0) > 0
            ahead = after + np.where(uphill, 0.0, (momentum - 1.0) / longer) * (after - found)
            found, momentum = after, np.where(uphill, 1.0, longer)
        warnings.warn(NotConverged(f"A lasso's last step was {missed:.3g} times the tolerance."), stacklevel=2)
        return found


def _shrunk(values: Floats, by: Floats) -> Floats:
    found: Floats = np.sign(values) * np.maximum(np.abs(values) - by, 0.0)
    return found


def _ratio(values: Floats, over: Floats) -> Floats:
    """One where both are nothing: then nothing is explained, and nothing is there."""
    return np.divide(values, over, out=np.ones_like(values), where=over > 0)


def _amount(penalty: float) -> float:
    """Errors: InvalidSetting."""
    if isinstance(penalty, bool) or not isinstance(penalty, (int, float)) or not 0 < penalty < np.inf:
        raise InvalidSetting(f"penalty is {penalty!r}; expected a finite number > 0, or None to choose one.")
    return float(penalty)


def _checked(keep: ArrayLike, outputs: ArrayLike) -> tuple[Flags, Floats]:
    """Errors: ShapeMismatch; InvalidInput for fewer than 4 subsets, subsets that are all the same; NonFiniteValue."""
    kept, values = subset_mask(keep), np.asarray(outputs, dtype=np.float64)
    if values.ndim != 2 or len(values) != len(kept):
        raise ShapeMismatch(f"The outputs are {values.shape} for {len(kept)} subsets; expected (m, q).")
    if len(kept) < 4:
        raise InvalidInput(f"An attribution takes at least 4 subsets, got {len(kept)}.")
    if (kept == kept[0]).all():
        raise InvalidInput("All subsets keep the same rows: nothing says what a row does.")
    if not np.isfinite(values).all():
        subset, query = (int(k) for k in np.argwhere(~np.isfinite(values))[0])
        raise NonFiniteValue(f"The output of query {query} on subset {subset} is {values[subset, query]}.")
    return kept, values
