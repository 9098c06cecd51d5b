"""Tables in plain characters, for a terminal; in HTML, for a notebook; and as data frames."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from headwater.errors import MissingExtra

if TYPE_CHECKING:
    import pandas

WIDEST = 40
"""Columns of a terminal that a cell with a text of the user's may take."""


def shown(value: float | None) -> str:
    """Three digits, or a dash."""
    return "-" if value is None else f"{value:.3g}"


def visible(text: str, kept: str = "") -> str:
    """Text as it can be shown: what steers a terminal, turns the direction of reading, or breaks a line, as escapes.

    kept: characters that stay all the same.
    """
    if text.isprintable():  # the common case, decided in C
        return text
    return "".join(c if c in kept or unicodedata.category(c) not in HIDDEN else _escape(c) for c in text)


HIDDEN = {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}
"""Unicode categories: control, format (bidi marks among them), surrogate, private, line and paragraph separators."""


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode()


def cell_len(text: str) -> int:
    """How many columns of a terminal the text takes."""
    if text.isascii() and text.isprintable():  # one each, so that most tables need no table of widths
        return len(text)
    from rich.cells import cell_len as measured

    return measured(text)


def cut(text: str, width: int = WIDEST) -> str:
    """At most so many columns of a terminal; an ellipsis stands for the rest."""
    if cell_len(text) <= width:
        return text
    while cell_len(text) > width - 1:
        text = text[: min(len(text) - 1, width - 1)]
    return text + "…"


def table(
    rows: Sequence[Sequence[str]], left: Collection[int] = (0,), widest: int | None = None, width: int | None = None
) -> str:
    """Columns of equal width, numbers to the right; those in `left`, of texts, to the left.

    widest: where cells are cut. width: of the terminal; the widest columns in `left` give way, so that lines fit.
    """
    cells = [[visible(cell) for cell in row] for row in rows]
    widths = [min(max(map(cell_len, column)), widest or 10**9) for column in zip(*cells, strict=True)]
    if width is not None:
        widths = _fitted(widths, left, width - 2 * (len(widths) - 1))
    lines = []
    for row in cells:
        padded = (_padded(cut(cell, w), w, k in left) for k, (cell, w) in enumerate(zip(row, widths, strict=True)))
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


NARROWEST = 5
"""Columns of a terminal that are left of a text."""


def _fitted(widths: Sequence[int], left: Collection[int], room: int) -> list[int]:
    """Widths that are `room` together, if texts can give way so far."""
    found = list(widths)
    while sum(found) > room:
        k = max(left, key=lambda each: found[each], default=None)
        if k is None or found[k] <= NARROWEST:
            break
        found[k] -= 1
    return found


def _padded(cell: str, width: int, left: bool) -> str:
    """Wide characters take two columns: `str.ljust` would count one."""
    space = " " * (width - cell_len(cell))
    return cell + space if left else space + cell


def wrapped(text: str, width: int) -> str:
    """Sentences in lines of at most so many columns of a terminal, where their words allow; below their own beginning.

    A row of a table goes on below its last cell, where that begins in the left half; else it stays as it is.
    """
    return "\n".join(_wrapped_line(line, width) for line in text.split("\n"))


def _wrapped_line(line: str, width: int) -> str:
    gap = re.match(r".*\S {2,}|\s*", line)
    begin = gap[0] if gap else ""
    indent = cell_len(begin)
    if cell_len(line) <= width or indent > width // 2:
        return line
    lines, used = [begin], indent
    for word in line[len(begin) :].split(" "):
        if used > indent and used + 1 + cell_len(word) > width:
            lines.append(" " * indent)
            used = indent
        space = " " if used > indent else ""
        lines[-1] += space + word
        used += len(space) + cell_len(word)
    return "\n".join(lines)


def html_table(rows: Sequence[Sequence[str]], note: str = "") -> str:
    """The same for a notebook; the first row has the headings."""
    head, *body = [[cut(visible(cell), 4 * WIDEST) for cell in row] for row in rows]
    from markupsafe import Markup

    titles = Markup().join(Markup("<th>{}</th>").format(cell) for cell in head)
    lines = Markup().join(
        Markup("<tr>{}</tr>").format(Markup().join(Markup("<td>{}</td>").format(cell) for cell in row)) for row in body
    )
    page = Markup("<table><thead><tr>{}</tr></thead><tbody>{}</tbody></table>").format(titles, lines)
    return str(page + (Markup("<p>{}</p>").format(note) if note else ""))


def frame(columns: Mapping[str, np.ndarray]) -> pandas.DataFrame:
    """Errors: MissingExtra without pandas."""
    return pandas_module().DataFrame({name: as_words(column) for name, column in columns.items()})


def pandas_module() -> Any:
    """Errors: MissingExtra."""
    try:
        import pandas
    except ImportError:
        raise MissingExtra("pandas", "tables") from None
    return pandas


def as_words(column: np.ndarray) -> Any:
    """Text as Python's own, which has no fixed width; all else as it is."""
    return column.astype(object) if column.dtype.kind == "U" else column
