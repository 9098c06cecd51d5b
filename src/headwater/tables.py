"""Tables in plain characters, for a terminal."""

from __future__ import annotations

from collections.abc import Collection, Sequence


def shown(value: float | None) -> str:
    """Three digits, or a dash."""
    return "-" if value is None else f"{value:.3g}"


def table(rows: Sequence[Sequence[str]], left: Collection[int] = (0,)) -> str:
    """Columns of equal width, numbers to the right; those in `left` to the left."""
    columns = list(zip(*rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    sides = [str.ljust if k in left else str.rjust for k in range(len(columns))]
    lines = ([side(cell, w) for side, cell, w in zip(sides, row, widths, strict=True)] for row in rows)
    return "\n".join("  ".join(line).rstrip() for line in lines)
