"""Damping: what is added to the curvature before it is inverted."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Real

from headwater.errors import BlockMismatch, IndefiniteCurvature, InvalidSetting


@dataclass(frozen=True)
class Relative:
    """Damping in units of a block's mean eigenvalue."""

    factor: float
    """How many mean eigenvalues are added; 0.1 to 1 is a good range (see docs)."""

    def __post_init__(self) -> None:
        _check(self.factor, "relative damping")

    def absolute(self, mean_eigenvalue: float) -> float:
        """In the units of the operator. Errors: IndefiniteCurvature if the mean eigenvalue is negative."""
        if mean_eigenvalue < 0:
            raise IndefiniteCurvature(
                f"The mean eigenvalue is {mean_eigenvalue:g}, so damping relative to it would be negative. Give an "
                "absolute damping, or use curvature='ggn', which is never negative."
            )
        return self.factor * mean_eigenvalue


Damping = float | Relative
"""Absolute, in the units of the curvature, or relative to the block's mean eigenvalue."""


def relative(factor: float) -> Relative:
    """Damping of `factor` times the block's mean eigenvalue. Errors: InvalidSetting if it is negative or no number."""
    return Relative(factor)


def damping_by_block(
    damping: Damping | Mapping[str, Damping] | None, default: Damping, blocks: Iterable[str]
) -> dict[str, Damping]:
    """One damping for each block.

    Errors: BlockMismatch if a mapping leaves out a block or names another; InvalidSetting for what is no damping.
    """
    names = list(blocks)
    if isinstance(damping, Mapping):
        if set(damping) != set(names):
            raise BlockMismatch(f"The damping is for blocks {list(damping)}, the provider has {names}.")
        return {name: _checked(damping[name]) for name in names}
    chosen = _checked(default if damping is None else damping)
    return {name: chosen for name in names}


def _checked(damping: Damping) -> Damping:
    if isinstance(damping, Relative):
        return damping
    _check(damping, "damping")
    return float(damping)


def _check(value: float, what: str) -> None:
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value) or value < 0:
        raise InvalidSetting(f"{what} is {value!r}; expected a finite number >= 0, or hw.relative(...).")


def in_units(damping: Damping, mean_eigenvalue: float) -> float:
    """Absolute damping."""
    return damping.absolute(mean_eigenvalue) if isinstance(damping, Relative) else damping
