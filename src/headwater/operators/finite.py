"""Numbers that are too large for their dtype are refused by name, before they become scores, residuals or zeros."""

from __future__ import annotations

from typing import TypeVar

from headwater.arrays import Array, namespace
from headwater.errors import NonFiniteValue

REMEDY = "Rescale the inputs or the loss, or use float64; if that does not help, look for NaN among the rows."


T = TypeVar("T", bound=Array)


def refuse_nonfinite(array: T, what: str) -> T:
    """The array. Errors: NonFiniteValue for NaN or infinity in it; `what` names the block."""
    xp = namespace(array)
    # NaN and infinity survive in a sum, which is one reading pass; finite numbers may have an infinite sum.
    if not bool(xp.isfinite(xp.sum(array))) and not bool(xp.all(xp.isfinite(array))):
        dtype = str(array.dtype).rsplit(".", 1)[-1]
        raise NonFiniteValue(f"{what} is not finite: there are numbers too large for {dtype}. {REMEDY}")
    return array
