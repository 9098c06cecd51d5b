"""Targets of another shape than the outputs: (N, 1) against (N,), which arrays spread over one another in silence."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod


def spread_in_words(output: Sequence[int], target: Sequence[int]) -> str | None:
    """What to do where rows of the one would meet every row of the other; None for shapes that do not do this."""
    if len(output) == len(target) or prod(output) != prod(target) or not (output and target and output[0] == target[0]):
        return None
    given, wanted = _of_rows(target), _of_rows(output)
    mend = f"y.reshape(-1{''.join(f', {size}' for size in output[1:])})"
    return (
        f"The model's outputs have the shape {wanted} and the targets {given}, N rows: subtracted, they are spread "
        f"over one another, each row against every row. Pass targets of the outputs' shape: {mend}."
    )


def _of_rows(shape: Sequence[int]) -> str:
    return f"(N{''.join(f', {size}' for size in shape[1:])}{',' if len(shape) == 1 else ''})"
