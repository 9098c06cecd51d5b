"""A spectrum as plain numbers, and what follows from it for any damping at once.

Layout: values [k] with counts [k], how often each occurs; counts sum to the operator's size D. An operator of low rank
has its few eigenvalues, and zero D - k times. An estimate (`estimate_spectra`) has counts that are not whole numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from headwater.errors import InvalidSetting


@dataclass(frozen=True, eq=False)
class Spectrum:
    """The eigenvalues of a symmetric operator, each with how often it occurs."""

    values: np.ndarray
    """[k], float64, in any order."""
    counts: np.ndarray
    """[k], float64."""
    rounding: float = 0.0
    """The size up to which an eigenvalue may be a zero that was computed with rounding; it counts as zero."""

    @classmethod
    def of(cls, values: ArrayLike, *, size: int | None = None, rounding: float = 0.0) -> Spectrum:
        """Eigenvalues one by one, of any shape; the rest of `size` are zero."""
        found = np.asarray(values, dtype=np.float64).reshape(-1)
        rest = 0 if size is None else size - len(found)
        counts = np.ones(len(found))
        if rest > 0:
            # Once with its count, not value by value: D may be millions.
            found, counts = np.append(found, 0.0), np.append(counts, float(rest))
        return cls(found, counts, rounding)

    @classmethod
    def of_psd(cls, values: ArrayLike, eps: float, *, size: int | None = None) -> Spectrum:
        """Computed eigenvalues, k of them, of a matrix that is never negative; the rest of `size` are zero.

        What is below zero, or k eps times the largest, is rounding.
        """
        found = np.clip(np.asarray(values, dtype=np.float64).reshape(-1), 0.0, None)
        return cls.of(found, size=size, rounding=len(found) * eps * float(found.max(initial=0.0)))

    @classmethod
    def joined(cls, spectra: Sequence[Spectrum]) -> Spectrum:
        """Of operators side by side."""
        # One rounding cannot speak for all: what is zero by its own operator's is made zero first.
        kept = [np.where(np.abs(s.values) <= s.rounding, 0.0, s.values) for s in spectra]
        return cls(np.concatenate(kept), np.concatenate([s.counts for s in spectra]))

    def scaled(self, factor: float) -> Spectrum:
        """Of `factor` times the operator."""
        return Spectrum(self.values * factor, self.counts, self.rounding * abs(factor))

    def shifted(self, shift: float) -> Spectrum:
        """Of the operator plus `shift` times the identity."""
        # Once shifted, a zero that was computed with rounding is an eigenvalue like any other.
        return Spectrum(self.values + shift, self.counts, 0.0 if shift else self.rounding)

    @property
    def bounds(self) -> tuple[float, float]:
        """The smallest and the largest eigenvalue."""
        return float(self.values.min()), float(self.values.max())

    def effective_dof(self, dampings: Sequence[float] | np.ndarray) -> np.ndarray:
        """tr(C (C + damping)^-1) for each damping: how many directions the data decide, the damping the rest.

        A direction without curvature counts nothing, at zero damping too: there it is the rank. NaN where an eigenvalue
        is not above minus the damping: then C + damping is not positive, and the figure means nothing.
        Shapes: [dampings]. Units: absolute dampings. Errors: InvalidSetting for a damping below zero, or none.
        """
        given = np.asarray(dampings, dtype=np.float64)
        if given.ndim != 1 or not given.size or not (np.isfinite(given) & (given >= 0)).all():
            raise InvalidSetting(f"dampings is {dampings!r}; expected finite numbers >= 0, at least one.")
        used = np.abs(self.values) > self.rounding
        values, counts = self.values[used], self.counts[used]
        if not len(values):
            return np.zeros(len(given))
        lowest = float(values.min())
        return np.array(
            [float(counts @ (values / (values + d))) if lowest + d > 0 else np.nan for d in given], dtype=np.float64
        )
