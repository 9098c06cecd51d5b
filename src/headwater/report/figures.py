"""Figures of a page: plain data that draws itself as HTML and inline SVG.

    Table     rows of text and of shares (drawn as small bars), with the baselines beside the method
    Curves    lines over a common x axis, told apart by dash as well as by colour
    Dots      one dot per repetition, mean and spread, one line per condition
    Bars      one bar per name to the left or the right of zero
    Points    one point per row on two axes, some of them picked out
    Grid      a matrix of signed numbers as coloured cells

Every figure has a title and a `reading`: one sentence that says how to read it. Pieces are put together by
`Markup.format`, which escapes whatever is text.

No chart library draws them: the smallest that would do is a few hundred kilobytes of script in a page that is to stay
under one megabyte, and it would draw nothing where scripts do not run, on paper for example.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Protocol

import numpy as np
from markupsafe import Markup, escape
from numpy.typing import ArrayLike, NDArray

from headwater.errors import InvalidInput, NonFiniteValue, ShapeMismatch
from headwater.report.text import MINUS, signed, visible
from headwater.tables import table

EMPTY = Markup("")


class Figure(Protocol):
    """Anything that can draw itself as one HTML element."""

    def html(self) -> Markup: ...


@dataclass(frozen=True)
class Section:
    """A heading, paragraphs (separated by blank lines) and figures."""

    title: str
    text: str
    figures: Sequence[Figure] = ()


@dataclass(frozen=True)
class Fact:
    """A number worth seeing first, and what it counts."""

    value: str
    meaning: str


# --- tables -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Share:
    """A number from 0 to 1, shown as a percentage over a small bar."""

    value: float

    def __post_init__(self) -> None:
        if not 0 <= self.value <= 1:
            raise InvalidInput(f"A share lies between 0 and 1; got {self.value}.")

    def __str__(self) -> str:
        return f"{self.value:.0%}"

    def html(self) -> Markup:
        # A width as an attribute: the page's policy allows no style attributes.
        bar = '<svg class="bar" aria-hidden="true" viewBox="0 0 100 3" preserveAspectRatio="none">{}</svg>'
        drawn = Markup(bar).format(Markup('<rect width="{:.2f}" height="3"/>').format(100 * self.value))
        return Markup('<td class="share">{}{}</td>').format(str(self), drawn)


@dataclass(frozen=True)
class Table:
    """Rows with a name each; row `ours` is set apart, the others are what it is measured against."""

    title: str
    reading: str
    columns: Sequence[str]
    """Headings, the first one for the rows' names."""
    rows: Sequence[Sequence[str | Share]]
    """Cells: the name, then one entry per further column."""
    ours: int | None = None
    """Which row is the method that the page is about."""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ShapeMismatch(f"Row {row[0]!r} has {len(row)} cells; the table has {len(self.columns)} columns.")

    def text(self) -> str:
        """The same table in plain characters, for a terminal."""
        lines = table([[str(cell) for cell in row] for row in (self.columns, *self.rows)])
        return "\n".join([self.title, *(f"  {line}" for line in lines.split("\n"))])

    def html(self) -> Markup:
        head = EMPTY.join(Markup('<th scope="col">{}</th>').format(_text(column)) for column in self.columns)
        body = EMPTY.join(self._row(row, index == self.ours) for index, row in enumerate(self.rows))
        drawn = Markup("<table><thead><tr>{}</tr></thead><tbody>{}</tbody></table>").format(head, body)
        return _figure(self.title, self.reading, _wide(self.title, drawn))

    @staticmethod
    def _row(row: Sequence[str | Share], ours: bool) -> Markup:
        name, *cells = row
        drawn = EMPTY.join(
            cell.html() if isinstance(cell, Share) else Markup("<td>{}</td>").format(_text(cell)) for cell in cells
        )
        kind = Markup(' class="ours"') if ours else EMPTY
        return Markup('<tr{}><th scope="row">{}</th>{}</tr>').format(kind, _text(str(name)), drawn)


# --- charts -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """One line of a chart. x, y: [k]."""

    name: str
    x: ArrayLike
    y: ArrayLike


@dataclass(frozen=True)
class Curves:
    """Lines over a common x axis, both axes from 0 unless said otherwise. The first curve is ours, the last is chance.

    A single curve has no legend.
    """

    title: str
    reading: str
    x_label: str
    y_label: str
    curves: Sequence[Curve]
    x_form: str = "{:.0%}"
    y_form: str = "{:.0%}"
    powers: bool = False
    """Whether the x axis has powers of ten at equal distances; x is positive then."""
    floor: float | None = 0.0
    """Where the y axis begins at the latest; None for the smallest value."""
    marks: Sequence[tuple[float, str]] = ()
    """Places on the x axis that are worth a line, and what they are."""
    band: tuple[float, float] | None = None
    """A stretch of the x axis that is set apart."""

    def html(self) -> Markup:
        points = [(_finite(curve.name, curve.x), _finite(curve.name, curve.y)) for curve in self.curves]
        across, up = self._across([x for x, _ in points]), self._up([y for _, y in points])
        lines = EMPTY.join(
            _path(f"curve c{style}", zip(across(x), up(y), strict=True))
            for style, (x, y) in reversed(list(zip(self._styles(), points, strict=True)))
        )
        ends = "; ".join(
            f"{c.name} reaches {self.y_form.format(y[-1])}" for c, (_, y) in zip(self.curves, points, strict=True)
        )
        alt = f"Line chart of {self.y_label} against {self.x_label}. At the right edge: {ends}."
        grid = _vertical_grid(across, 32, 272, self.x_form, self.x_label) + _horizontal_grid(
            up, LEFT, WIDTH - 20, self.y_form
        )
        heading = Markup('<text x="0" y="14">{}</text>').format(_text(self.y_label))
        content = EMPTY.join([self._band(across), grid, heading, lines, self._marks(across)])
        return _figure(self.title, self.reading, self._legend() + _wide(self.title, _svg(alt, 320, content)))

    def _across(self, x: Sequence[NDArray[np.float64]]) -> _Axis:
        low, high = min(v.min() for v in x), max(v.max() for v in x)
        return _Axis(low if self.powers else 0.0, high, LEFT, WIDTH - 20, self.powers)

    def _up(self, y: Sequence[NDArray[np.float64]]) -> _Axis:
        low, high = min(v.min() for v in y), max(v.max() for v in y)
        return _Axis(low if self.floor is None else min(low, self.floor), high, 272, 32)

    def _band(self, across: _Axis) -> Markup:
        if self.band is None:
            return EMPTY
        left, right = across(np.array(self.band))
        return Markup('<rect class="band" x="{:.1f}" y="32" width="{:.1f}" height="240"/>').format(left, right - left)

    def _marks(self, across: _Axis) -> Markup:
        found = []
        for place, said in self.marks:
            x = float(across(place))
            side = ("end", x - 6) if x > WIDTH * 0.6 else ("start", x + 6)
            found.append(
                Markup(
                    '<path class="mark-line" d="M{0:.1f},32V272"/>'
                    '<text class="mark-text" x="{1:.1f}" y="264" text-anchor="{2}">{3}</text>'
                ).format(x, side[1], side[0], _text(said))
            )
        return EMPTY.join(found)

    def _styles(self) -> list[int]:
        """The look of each curve: 0 ours, 9 chance, 1, 2, ... between."""
        return [0] if len(self.curves) == 1 else [*range(len(self.curves) - 1), 9]

    def _legend(self) -> Markup:
        if len(self.curves) == 1:
            return EMPTY
        line = Markup('<svg aria-hidden="true" viewBox="0 0 32 8" width="32" height="8">{}</svg>')
        keys = EMPTY.join(
            Markup("<li>{} {}</li>").format(line.format(_path(f"curve c{style}", [(0, 4), (32, 4)])), _text(curve.name))
            for style, curve in zip(self._styles(), self.curves, strict=True)
        )
        return Markup('<ul class="legend">{}</ul>').format(keys)


@dataclass(frozen=True)
class Condition:
    """What was done, and what came of it each time. values: [r], one per repetition."""

    name: str
    values: ArrayLike


@dataclass(frozen=True)
class Dots:
    """One line per condition: a dot per repetition, a bar over mean +- one standard deviation, a tick at the mean."""

    title: str
    reading: str
    x_label: str
    conditions: Sequence[Condition]
    ours: int | None = None
    """Which condition is the method that the page is about."""

    def html(self) -> Markup:
        values = [_finite(condition.name, condition.values) for condition in self.conditions]
        bottom = 16 + 38 * len(values)
        across = _Axis(0, max(v.max() for v in values), 208, WIDTH - 112)
        rows = EMPTY.join(
            self._row(condition.name, v, across, 32 + 38 * i, i == self.ours)
            for i, (condition, v) in enumerate(zip(self.conditions, values, strict=True))
        )
        told = "; ".join(f"{c.name} {mean_and_spread(v)}" for c, v in zip(self.conditions, values, strict=True))
        alt = f"Dot chart of {self.x_label}, mean and standard deviation: {told}."
        grid = _vertical_grid(across, 8, bottom, "{:g}", self.x_label)
        return _figure(self.title, self.reading, _wide(self.title, _svg(alt, bottom + 48, grid + rows)))

    @staticmethod
    def _row(name: str, values: NDArray[np.float64], across: _Axis, y: float, ours: bool) -> Markup:
        mean, spread = fmean(values), _spread(values)
        low, high = across(np.array([max(0.0, mean - spread), mean + spread]))
        dots = EMPTY.join(Markup('<circle cx="{:.1f}" cy="{}" r="3.5"/>').format(x, y) for x in across(values))
        return Markup(
            '<g class="dots{kind}"><text x="0" y="{base}">{name}</text>'
            '<rect x="{low:.1f}" y="{top}" width="{width:.1f}" height="16" rx="3"/>{dots}'
            '<path d="M{mean:.1f},{tick}v22"/>'
            '<text x="{end}" y="{base}" text-anchor="end">{said}</text></g>'
        ).format(
            kind=" ours" if ours else "",
            base=y + 4,
            name=_text(name),
            low=low,
            top=y - 8,
            width=high - low,
            dots=dots,
            mean=float(across(mean)),
            tick=y - 11,
            end=WIDTH,
            said=mean_and_spread(values),
        )


def mean_and_spread(values: ArrayLike, digits: int = 2) -> str:
    """Mean ± standard deviation over repetitions, as text; the mean alone where there is one repetition."""
    numbers = _finite("values", values)
    spread = f" ± {_spread(numbers):.{digits}f}" if len(numbers) > 1 else ""
    return f"{fmean(numbers):.{digits}f}{spread}"


def _spread(values: NDArray[np.float64]) -> float:
    """The sample standard deviation; 0 for a single value."""
    return stdev(values) if len(values) > 1 else 0.0


@dataclass(frozen=True)
class Bar:
    """A name, a number, and what is said of it beside the number."""

    name: str
    value: float
    said: str


@dataclass(frozen=True)
class Bars:
    """One bar for each name: to the right of zero where the number is positive, else to its left.

    signed: whether the two sides have the colours of helpful and harmful.
    """

    title: str
    reading: str
    bars: Sequence[Bar]
    signed: bool = False

    def html(self) -> Markup:
        values = _finite("bars", [bar.value for bar in self.bars])
        top, names = len(values), 170
        across = _Axis(min(0.0, values.min(initial=0.0)), max(0.0, values.max(initial=0.0)), names, WIDTH - 190)
        zero = float(across(0.0))
        rows = EMPTY.join(self._row(bar, across, zero, 26 * i) for i, bar in enumerate(self.bars))
        told = "; ".join(f"{bar.name} {bar.said}" for bar in self.bars)
        axis = Markup('<path class="zero" d="M{0:.1f},0V{1}"/>').format(zero, 26 * top)
        svg = _svg(f"Bar chart. {told}.", 26 * top, rows + axis)
        return _figure(self.title, self.reading, _wide(self.title, svg))

    def _row(self, bar: Bar, across: _Axis, zero: float, y: float) -> Markup:
        end = float(across(bar.value))
        kind = ("help" if bar.value >= 0 else "harm") if self.signed else "plain"
        return Markup(
            '<text x="0" y="{0}">{1}</text><rect class="bar-{2}" x="{3:.1f}" y="{4}" width="{5:.1f}" height="14" '
            'rx="2"/><text x="{6}" y="{0}" text-anchor="end">{7}</text>'
        ).format(y + 17, _text(_short(bar.name)), kind, min(zero, end), y + 6, abs(end - zero), WIDTH, _text(bar.said))


@dataclass(frozen=True)
class Points:
    """One point per row on two axes; those of `marked` stand out. x, y: [n]."""

    title: str
    reading: str
    x_label: str
    y_label: str
    x: ArrayLike
    y: ArrayLike
    marked: Sequence[int] = ()

    def html(self) -> Markup:
        x, y = _finite(self.x_label, self.x), _finite(self.y_label, self.y)
        across, up = (_Axis(*_ends(values), *place) for values, place in ((x, (LEFT, WIDTH - 20)), (y, (272, 32))))
        chosen = np.zeros(len(x), dtype=bool)
        chosen[list(self.marked)] = True
        dots = EMPTY.join(
            Markup('<path class="points{}" d="{}"/>').format(kind, self._dots(across(x[which]), up(y[which])))
            for kind, which in (("", ~chosen), (" marked", chosen))
        )
        alt = f"Scatter chart of {self.y_label} against {self.x_label}; {len(x)} points, {chosen.sum()} marked."
        grid = _vertical_grid(across, 32, 272, "{:,.4g}", self.x_label) + _horizontal_grid(
            up, LEFT, WIDTH - 20, "{:,.4g}"
        )
        heading = Markup('<text x="0" y="14">{}</text>').format(_text(self.y_label))
        return _figure(self.title, self.reading, _wide(self.title, _svg(alt, 320, grid + heading + dots)))

    @staticmethod
    def _dots(x: NDArray[np.float64], y: NDArray[np.float64]) -> str:
        """One path for all: lines of no length with round ends, a tenth of what circles take."""
        return "".join(dict.fromkeys(f"M{a:.0f},{b:.0f}h0" for a, b in zip(x, y, strict=True)))


@dataclass(frozen=True)
class Grid:
    """Signed numbers [r, c] as coloured cells, rows and columns named."""

    title: str
    reading: str
    corner: str
    """What the rows are, and what the columns."""
    rows: Sequence[str]
    columns: Sequence[str]
    values: ArrayLike

    def html(self) -> Markup:
        values = _finite(self.title, self.values)
        largest = float(np.abs(values).max(initial=0.0)) or 1.0
        head = EMPTY.join(Markup('<th scope="col">{}</th>').format(_text(name)) for name in self.columns)
        body = EMPTY.join(
            Markup('<tr><th scope="row">{}</th>{}</tr>').format(
                _text(name), EMPTY.join(self._cell(float(value), largest) for value in row)
            )
            for name, row in zip(self.rows, values, strict=True)
        )
        drawn = Markup(
            '<table class="grid-of"><thead><tr><th scope="col">{}</th>{}</tr></thead><tbody>{}</tbody></table>'
        ).format(_text(self.corner), head, body)
        return _figure(self.title, self.reading, _wide(self.title, drawn), broad=len(self.columns) > BROAD)

    @staticmethod
    def _cell(value: float, largest: float) -> Markup:
        return Markup('<td class="{}" title="{}">{}</td>').format(
            level_of(value, largest), signed(value), _share_of(value / largest)
        )


def _share_of(share: float) -> str:
    return "0%" if round(100 * share) == 0 else f"{share:+.0%}".replace("-", MINUS)


def level_of(value: float, largest: float) -> str:
    """The class of a colour: p1 .. p5 for what helps, n1 .. n5 for what harms, z for about nothing."""
    level = min(5, math.ceil(5 * abs(value) / largest - 0.25)) if largest > 0 and math.isfinite(value) else 0
    return "z" if level <= 0 else f"{'p' if value > 0 else 'n'}{level}"


# --- the parts of a drawing -------------------------------------------------------------------------------------------

WIDTH = 640
"""Of every chart, in its own units; the page scales it."""
BROAD = 7
"""Columns beyond which a grid takes the whole width."""
LEFT = 60
"""Where the plot begins, right of the y axis's values."""


@dataclass(frozen=True)
class _Axis:
    """A map from values to pixels, with round ticks: linear, or of the values' logarithms."""

    start: float
    stop: float
    first: float
    last: float
    powers: bool = field(default=False)

    def __call__(self, value: ArrayLike) -> NDArray[np.float64]:
        values, start, stop = np.asarray(value, dtype=np.float64), self.start, self.stop
        if self.powers:
            values, start, stop = np.log10(values), math.log10(start), math.log10(stop)
        share = (values - start) / ((stop - start) or 1.0)
        return self.first + share * (self.last - self.first)

    def ticks(self) -> NDArray[np.float64]:
        """Four to seven round values inside the axis; of powers of ten at most eight."""
        if self.powers:
            low, high = math.ceil(math.log10(self.start) - 1e-9), math.floor(math.log10(self.stop) + 1e-9)
            return np.asarray(10.0 ** np.arange(low, high + 1, max(1, math.ceil((high - low) / 7))), dtype=np.float64)
        span = (self.stop - self.start) or 1.0
        power = 10.0 ** math.floor(math.log10(span))
        step = next(power * part for part in (0.2, 0.25, 0.5, 1, 2) if span / (power * part) <= 6)
        places = np.arange(math.ceil(self.start / step - 1e-9), math.floor(self.stop / step + 1e-9) + 1)
        return np.asarray(places * step if step < 1e-9 else np.round(places * step, 12), dtype=np.float64)


def _ends(values: NDArray[np.float64]) -> tuple[float, float]:
    """From zero, or from the smallest value where that is negative."""
    return min(0.0, float(values.min(initial=0.0))), float(values.max(initial=0.0))


def _vertical_grid(axis: _Axis, top: float, bottom: float, form: str, label: str) -> Markup:
    """Thin lines across the x axis, their values below, and what they measure below that."""
    lines = EMPTY.join(
        Markup('<path class="grid" d="M{:.1f},{}V{}"/>').format(axis(t), top, bottom) for t in axis.ticks()
    )
    values = EMPTY.join(
        Markup('<text x="{:.1f}" y="{}" text-anchor="middle">{}</text>').format(axis(t), bottom + 17, form.format(t))
        for t in axis.ticks()
    )
    middle = (axis.first + axis.last) / 2
    name = Markup('<text x="{:.0f}" y="{}" text-anchor="middle">{}</text>').format(middle, bottom + 40, _text(label))
    return lines + values + name


def _horizontal_grid(axis: _Axis, left: float, right: float, form: str) -> Markup:
    """Thin lines across the y axis and their values, on the left."""
    line = Markup('<path class="grid" d="M{0},{1:.1f}H{2}"/><text x="{3}" y="{4:.1f}" text-anchor="end">{5}</text>')
    return EMPTY.join(
        line.format(left, float(axis(t)), right, left - 8, float(axis(t)) + 4, form.format(t)) for t in axis.ticks()
    )


def _path(kind: str, points: Iterable[tuple[float, float]]) -> Markup:
    drawn = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return Markup('<path class="{}" d="M{}"/>').format(kind, drawn)


def _svg(alt: str, height: float, content: Markup) -> Markup:
    return Markup('<svg role="img" viewBox="0 0 {} {}"><title>{}</title>{}</svg>').format(
        WIDTH, height, _text(alt), content
    )


def _wide(name: str, content: Markup) -> Markup:
    """What may be wider than a phone scrolls by itself, with the keyboard too."""
    return Markup('<div class="wide" tabindex="0" role="group" aria-label="{}">{}</div>').format(_text(name), content)


def _figure(title: str, reading: str, content: Markup, broad: bool = False) -> Markup:
    """broad: whether it takes the place of two where figures stand side by side."""
    kind = Markup(' class="broad"') if broad else EMPTY
    return Markup("<figure{}><figcaption><h3>{}</h3><p>{}</p></figcaption>{}</figure>").format(
        kind, _text(title), _text(reading), content
    )


def _short(name: str, limit: int = 18) -> str:
    return name if len(name) <= limit else f"{name[: limit - 1]}…"


def _text(text: str) -> Markup:
    return escape(visible(text))


def paragraphs(text: str) -> Markup:
    """Parts of a text, parted by blank lines."""
    return EMPTY.join(Markup("<p>{}</p>").format(_text(part)) for part in text.split("\n\n") if part)


def _finite(name: str, values: ArrayLike) -> NDArray[np.float64]:
    """As float64; a page never drops a value that it cannot draw."""
    numbers = np.asarray(values, dtype=np.float64)
    if not np.isfinite(numbers).all():
        missing = int((~np.isfinite(numbers)).sum())
        raise NonFiniteValue(f"{missing} of {numbers.size} values of {name!r} are not finite and cannot be drawn.")
    return numbers
