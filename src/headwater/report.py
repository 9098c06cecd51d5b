"""One HTML page that holds everything it shows: no network, no scripts; light and dark.

A page is a list of sections; a section is a few paragraphs and figures; a figure is plain data that can draw itself:

    page("Digits", lead="...", unit="removal", sections=[Section("Found?", "...", [Table(...), Curves(...)])])

    Table     rows of text and of shares (drawn as small bars), with the baselines beside the method
    Curves    lines over a common x axis, told apart by dash as well as by colour
    Dots      one dot per repetition, mean and spread, one line per condition
    Cases     pictures: a query between the rows that harmed it most and those that helped it most

Every figure has a title and a `reading`: one sentence that says how to read it. All text is escaped.
"""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from statistics import fmean, stdev
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from headwater.errors import InvalidInput, InvalidSetting, NonFiniteValue, ShapeMismatch
from headwater.store.score_matrix import SIGN_IN_WORDS, UNIT_IN_WORDS
from headwater.tables import table


class Figure(Protocol):
    """Anything that can draw itself as one HTML element."""

    def html(self) -> str: ...


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


def page(
    title: str,
    *,
    lead: str,
    unit: str,
    sections: Sequence[Section],
    facts: Sequence[Fact] = (),
    unit_note: str = "",
    explained: str = "loss",
    foot: str = "",
) -> str:
    """The whole page as text; write it anywhere, it needs no other file.

    Units: `unit` names the unit of every score on the page ("removal", "influence"); the page explains it and the sign,
        and `unit_note` may add what else is to know. `explained` is what of a query they are about.
    Errors: InvalidSetting if the unit is unknown; the figures' own.
    """
    if unit not in UNIT_IN_WORDS:
        raise InvalidSetting(f"The unit of the scores must be one of {sorted(UNIT_IN_WORDS)}; got {unit!r}.")
    in_words, sign = UNIT_IN_WORDS[unit].format(of=explained), SIGN_IN_WORDS.format(of=explained).capitalize()
    meaning = f"A score is the {in_words}. {sign}; negative: it harms. {unit_note}"
    strip = "".join(f"<div><dt>{_text(f.meaning)}</dt><dd>{_text(f.value)}</dd></div>" for f in facts)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{_text(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<header>
<p class="mark">headwater</p>
<h1>{_text(title)}</h1>
<p class="lead">{_text(lead)}</p>
</header>
{f'<dl class="facts">{strip}</dl>' if strip else ""}
<aside><h2>What a score says</h2><p>{_text(meaning.strip())}</p></aside>
{"".join(_section(section) for section in sections)}
<footer>{_paragraphs(foot)}</footer>
</main>
</body>
</html>
"""


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

    def html(self) -> str:
        return f'<td class="share" style="--share:{self.value:.4f}">{self}</td>'


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

    def html(self) -> str:
        head = "".join(f'<th scope="col">{_text(column)}</th>' for column in self.columns)
        body = "".join(self._row(row, index == self.ours) for index, row in enumerate(self.rows))
        table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        return _figure(self.title, self.reading, f'<div class="wide">{table}</div>')

    @staticmethod
    def _row(row: Sequence[str | Share], ours: bool) -> str:
        name, *cells = row
        drawn = "".join(cell.html() if isinstance(cell, Share) else f"<td>{_text(cell)}</td>" for cell in cells)
        return f'<tr{" class=ours" if ours else ""}><th scope="row">{_text(str(name))}</th>{drawn}</tr>'


# --- charts -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """One line of a chart. x, y: [k]."""

    name: str
    x: ArrayLike
    y: ArrayLike


@dataclass(frozen=True)
class Curves:
    """Lines over a common x axis, both axes in shares from 0. The first curve is ours, the last one is chance."""

    title: str
    reading: str
    x_label: str
    y_label: str
    curves: Sequence[Curve]

    def html(self) -> str:
        points = [(_finite(curve.name, curve.x), _finite(curve.name, curve.y)) for curve in self.curves]
        across = _Axis(0, max(x.max() for x, _ in points), 44, WIDTH - 20)
        up = _Axis(0, max(y.max() for _, y in points), 272, 32)
        lines = "".join(
            _path(f"curve c{style}", zip(across(x), up(y), strict=True))
            for style, (x, y) in reversed(list(zip(self._styles(), points, strict=True)))
        )
        ends = "; ".join(f"{c.name} reaches {y[-1]:.0%}" for c, (_, y) in zip(self.curves, points, strict=True))
        alt = f"Line chart of {self.y_label} against {self.x_label}. At the right edge: {ends}."
        grid = _vertical_grid(across, 32, 272, "{:.0%}", self.x_label) + _horizontal_grid(up, 44, WIDTH - 20, "{:.0%}")
        heading = f'<text x="0" y="14">{_text(self.y_label)}</text>'
        return _figure(self.title, self.reading, self._legend() + _svg(alt, 320, grid + heading + lines))

    def _styles(self) -> list[int]:
        """The look of each curve: 0 ours, 9 chance, 1, 2, ... between."""
        return [*range(len(self.curves) - 1), 9]

    def _legend(self) -> str:
        line = '<svg aria-hidden="true" viewBox="0 0 32 8" width="32" height="8">{}</svg>'
        keys = (
            f"<li>{line.format(_path(f'curve c{style}', [(0, 4), (32, 4)]))} {_text(curve.name)}</li>"
            for style, curve in zip(self._styles(), self.curves, strict=True)
        )
        return f'<ul class="legend">{"".join(keys)}</ul>'


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

    def html(self) -> str:
        values = [_finite(condition.name, condition.values) for condition in self.conditions]
        bottom = 16 + 38 * len(values)
        across = _Axis(0, max(v.max() for v in values), 208, WIDTH - 112)
        rows = "".join(
            self._row(condition.name, v, across, 32 + 38 * i, i == self.ours)
            for i, (condition, v) in enumerate(zip(self.conditions, values, strict=True))
        )
        told = "; ".join(f"{c.name} {mean_and_spread(v)}" for c, v in zip(self.conditions, values, strict=True))
        alt = f"Dot chart of {self.x_label}, mean and standard deviation: {told}."
        grid = _vertical_grid(across, 8, bottom, "{:g}", self.x_label)
        return _figure(self.title, self.reading, _svg(alt, bottom + 48, grid + rows))

    @staticmethod
    def _row(name: str, values: NDArray[np.float64], across: _Axis, y: float, ours: bool) -> str:
        mean, spread = fmean(values), _spread(values)
        low, high = across(np.array([max(0.0, mean - spread), mean + spread]))
        dots = "".join(f'<circle cx="{x:.1f}" cy="{y}" r="3.5"/>' for x in across(values))
        return (
            f'<g class="dots{" ours" if ours else ""}"><text x="0" y="{y + 4}">{_text(name)}</text>'
            f'<rect x="{low:.1f}" y="{y - 8}" width="{high - low:.1f}" height="16" rx="3"/>{dots}'
            f'<path d="M{across(mean):.1f},{y - 11}v22"/>'
            f'<text x="{WIDTH}" y="{y + 4}" text-anchor="end">{mean_and_spread(values)}</text></g>'
        )


def mean_and_spread(values: ArrayLike, digits: int = 2) -> str:
    """Mean ± standard deviation over repetitions, as text; the mean alone where there is one repetition."""
    numbers = _finite("values", values)
    spread = f" ± {_spread(numbers):.{digits}f}" if len(numbers) > 1 else ""
    return f"{fmean(numbers):.{digits}f}{spread}"


def _spread(values: NDArray[np.float64]) -> float:
    """The sample standard deviation; 0 for a single value."""
    return stdev(values) if len(values) > 1 else 0.0


# --- pictures ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Picture:
    """A small image with lines of text below it; a `marked` one stands out, and its text should say why.

    image: [h, w] ink from 0 (paper) to 1, or [h, w, 3] colour from 0 to 1.
    """

    image: ArrayLike
    lines: Sequence[str]
    alt: str
    marked: bool = False

    def html(self) -> str:
        kind = "ink" if np.ndim(self.image) == 2 else "colour"
        image = f'<div class="frame"><img class="{kind}" src="{png(self.image)}" alt="{_text(self.alt)}"></div>'
        lines = "<br>".join(_text(line) for line in self.lines)
        return f"<li{' class=marked' if self.marked else ''}>{image}<span>{lines}</span></li>"


@dataclass(frozen=True)
class Case:
    """One query, and rows of pictures about it, each with a name."""

    query: Picture
    groups: Sequence[tuple[str, Sequence[Picture]]]

    def html(self) -> str:
        groups = "".join(
            f"<div><h4>{_text(name)}</h4><ul>{''.join(picture.html() for picture in pictures)}</ul></div>"
            for name, pictures in self.groups
        )
        return f'<div class="case"><ul class="query">{self.query.html()}</ul><div class="groups">{groups}</div></div>'


@dataclass(frozen=True)
class Cases:
    """Queries explained in pictures, one below the other."""

    title: str
    reading: str
    cases: Sequence[Case]

    def html(self) -> str:
        return _figure(self.title, self.reading, "".join(case.html() for case in self.cases))


def png(image: ArrayLike) -> str:
    """A PNG as a data URI. [h, w] is black ink on clear paper, so that a page can invert it; [h, w, 3] is opaque.

    Values from 0 to 1. Errors: ShapeMismatch for other shapes.
    """
    levels = np.round(255 * np.clip(_finite("image", image), 0, 1)).astype(np.uint8)
    if levels.ndim == 2:
        levels, colour_type = np.stack([np.zeros_like(levels), levels], -1), 4  # grey + alpha
    elif levels.ndim == 3 and levels.shape[-1] == 3:
        colour_type = 2  # red, green, blue
    else:
        raise ShapeMismatch(f"An image is [h, w] or [h, w, 3]; got {list(levels.shape)}.")
    height, width = levels.shape[:2]
    unfiltered = np.pad(levels.reshape(height, -1), ((0, 0), (1, 0)))  # each line starts with its filter: 0, none
    header = struct.pack(">IIBBBBB", width, height, 8, colour_type, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(unfiltered.tobytes(), 9)), (b"IEND", b""))
    packed = b"".join(struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks)
    return "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + packed).decode()


# --- the parts of a drawing -------------------------------------------------------------------------------------------

WIDTH = 720
"""Of every chart, in its own units; the page scales it."""


@dataclass(frozen=True)
class _Axis:
    """A linear map from values to pixels, with round ticks."""

    start: float
    stop: float
    first: float
    last: float

    def __call__(self, value: ArrayLike) -> NDArray[np.float64]:
        share = (np.asarray(value, dtype=np.float64) - self.start) / ((self.stop - self.start) or 1.0)
        return self.first + share * (self.last - self.first)

    def ticks(self) -> NDArray[np.float64]:
        """Four to seven round values inside the axis."""
        span = (self.stop - self.start) or 1.0
        power = 10.0 ** math.floor(math.log10(span))
        step = next(power * part for part in (0.2, 0.25, 0.5, 1, 2) if span / (power * part) <= 6)
        return np.round(np.arange(math.ceil(self.start / step), math.floor(self.stop / step + 1e-9) + 1) * step, 12)


def _vertical_grid(axis: _Axis, top: float, bottom: float, form: str, label: str) -> str:
    """Thin lines across the x axis, their values below, and what they measure below that."""
    lines = "".join(f'<path class="grid" d="M{axis(t):.1f},{top}V{bottom}"/>' for t in axis.ticks())
    values = "".join(
        f'<text x="{axis(t):.1f}" y="{bottom + 17}" text-anchor="middle">{form.format(t)}</text>' for t in axis.ticks()
    )
    middle = (axis.first + axis.last) / 2
    return f'{lines}{values}<text x="{middle:.0f}" y="{bottom + 40}" text-anchor="middle">{_text(label)}</text>'


def _horizontal_grid(axis: _Axis, left: float, right: float, form: str) -> str:
    """Thin lines across the y axis and their values, on the left."""
    return "".join(
        f'<path class="grid" d="M{left},{axis(t):.1f}H{right}"/>'
        f'<text x="{left - 8}" y="{axis(t) + 4:.1f}" text-anchor="end">{form.format(t)}</text>'
        for t in axis.ticks()
    )


def _path(kind: str, points: Iterable[tuple[float, float]]) -> str:
    return f'<path class="{kind}" d="M{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}"/>'


def _svg(alt: str, height: float, content: str) -> str:
    svg = f'<svg role="img" aria-label="{_text(alt)}" viewBox="0 0 {WIDTH} {height}">{content}</svg>'
    return f'<div class="wide">{svg}</div>'


def _figure(title: str, reading: str, content: str) -> str:
    caption = f"<figcaption><h3>{_text(title)}</h3><p>{_text(reading)}</p></figcaption>"
    return f"<figure>{caption}{content}</figure>"


def _section(section: Section) -> str:
    figures = "".join(figure.html() for figure in section.figures)
    return f"<section><h2>{_text(section.title)}</h2>{_paragraphs(section.text)}{figures}</section>"


def _text(text: str) -> str:
    """Escaped, with typographic apostrophes."""
    return escape(text, quote=False).replace("'", "&rsquo;").replace('"', "&quot;")


def _paragraphs(text: str) -> str:
    return "".join(f"<p>{_text(part)}</p>" for part in text.split("\n\n") if part)


def _finite(name: str, values: ArrayLike) -> NDArray[np.float64]:
    """As float64; a page never drops a value that it cannot draw."""
    numbers = np.asarray(values, dtype=np.float64)
    if not np.isfinite(numbers).all():
        missing = int((~np.isfinite(numbers)).sum())
        raise NonFiniteValue(f"{missing} of {numbers.size} values of {name!r} are not finite and cannot be drawn.")
    return numbers


STYLE = """
:root { --paper: #fbfaf7; --ink: #23262b; --muted: #676c74; --rule: #dedbd3; --ours: #17667f; --wash: #e3eef0;
  --second: #a8662a; --third: #7a6a9b; --mark: #b3382c; --mark-wash: #f8e6e2; }
@media (prefers-color-scheme: dark) { :root { --paper: #17191c; --ink: #e4e2dc; --muted: #9da1a7; --rule: #35383d;
  --ours: #6cc0d6; --wash: #1f343a; --second: #dda06a; --third: #b3a3d6; --mark: #ef8a7d; --mark-wash: #3d2623; }
  img.ink { filter: invert(1); } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 17px/1.6 Charter, "Iowan Old Style",
  "Palatino Linotype", Palatino, "Book Antiqua", Georgia, serif; -webkit-text-size-adjust: 100%; }
main { max-width: 47rem; margin: 0 auto; padding: 4.5rem 1.25rem 5rem; }
h1, h2, h3, h4 { line-height: 1.25; font-weight: 600; margin: 0; text-wrap: balance; }
h1 { font-size: 2.3rem; letter-spacing: -.015em; }
h2 { font-size: 1.4rem; margin-top: 4rem; }
p { margin: .7em 0; text-wrap: pretty; }
.mark, .facts dt, figcaption p, .wide, .legend, h4, li span, footer, aside h2 {
  font-family: ui-sans-serif, system-ui, -apple-system, "Segoe UI", "Helvetica Neue", Arial, sans-serif; }
.mark { color: var(--ours); font-size: .85rem; font-weight: 600; letter-spacing: .04em; margin: 0 0 1rem; }
.lead { font-size: 1.2rem; line-height: 1.5; color: var(--muted); }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: 1.5rem; margin: 2.5rem 0;
  padding: 1.5rem 0; border: solid var(--rule); border-width: 1px 0; }
.facts div { display: flex; flex-direction: column-reverse; justify-content: flex-end; }
.facts dt { font-size: .82rem; line-height: 1.4; color: var(--muted); }
.facts dd { margin: 0 0 .3rem; font-size: 1.7rem; line-height: 1.1; font-variant-numeric: lining-nums tabular-nums; }
aside { background: var(--wash); border-radius: 6px; padding: 1.1rem 1.4rem; }
aside h2 { font-size: .85rem; margin: 0; color: var(--ours); }
aside p { margin: .3rem 0 0; font-size: .97rem; line-height: 1.5; }
figure { margin: 2.5rem 0 0; }
figcaption { margin-bottom: 1.1rem; }
h3 { font-size: 1.05rem; }
figcaption p { margin: .25rem 0 0; font-size: .87rem; line-height: 1.5; color: var(--muted); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .88rem; line-height: 1.4;
  font-variant-numeric: lining-nums tabular-nums; }
th, td { padding: .5rem .7rem; text-align: right; border-bottom: 1px solid var(--rule); font-weight: 400; }
th:first-child { text-align: left; padding-left: .4rem; }
thead th { color: var(--muted); font-size: .8rem; vertical-align: bottom; border-color: var(--muted); }
.ours th, .ours td { font-weight: 650; }
.share { background: linear-gradient(var(--rule) 0 0) no-repeat .7rem calc(100% - .22rem);
  background-size: calc((100% - 1.4rem) * var(--share)) 3px; }
.ours .share { background-image: linear-gradient(var(--ours) 0 0); }
.wide > svg { display: block; width: 100%; min-width: 34rem; height: auto; font-size: 13px; }
svg text { fill: var(--muted); font-variant-numeric: lining-nums tabular-nums; }
.grid { stroke: var(--rule); }
.curve { fill: none; stroke-width: 2.2; stroke-linejoin: round; stroke: var(--muted); }
.c0 { stroke: var(--ours); stroke-width: 3; } .c1 { stroke: var(--second); stroke-dasharray: 7 3; }
.c2 { stroke: var(--third); stroke-dasharray: 2 3; } .c9 { stroke-width: 1.4; stroke-dasharray: 1 4; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .3rem 1.6rem; margin: 0 0 .8rem; padding: 0;
  font-size: .87rem; }
.legend svg { vertical-align: middle; margin-right: .35rem; }
.dots text { fill: var(--ink); } .dots rect { fill: var(--rule); opacity: .8; } .dots circle { fill: var(--muted); }
.dots path { stroke: var(--ink); stroke-width: 2; }
.dots.ours text { font-weight: 650; } .dots.ours rect { fill: var(--wash); opacity: 1; }
.dots.ours circle { fill: var(--ours); } .dots.ours path { stroke: var(--ours); }
.case { display: flex; gap: 1.8rem; padding: 1.4rem 0; border-top: 1px solid var(--rule); }
.case ul { list-style: none; display: grid; grid-template-columns: repeat(auto-fill, minmax(3.4rem, 5.2rem));
  gap: .6rem; margin: 0; padding: 0; }
.case img { display: block; width: 100%; }
.frame { border: 1px solid var(--rule); border-radius: 3px; overflow: hidden; }
.case li { font-size: .74rem; line-height: 1.35; color: var(--muted); }
.case li span { display: block; margin-top: .35rem; font-variant-numeric: lining-nums tabular-nums; }
.case .query { flex: none; display: block; width: 7rem; } .case .query li { font-size: .8rem; color: var(--ink); }
.groups { flex: 1; display: grid; gap: 1.1rem; }
h4 { font-size: .8rem; margin-bottom: .4rem; }
.marked .frame { border-color: var(--mark); box-shadow: 0 0 0 1px var(--mark); background: var(--mark-wash); }
.case .marked span { color: var(--mark); }
footer { margin-top: 4.5rem; padding-top: 1rem; border-top: 1px solid var(--rule); font-size: .82rem;
  color: var(--muted); }
@media (max-width: 36rem) { .case { flex-direction: column; } main { padding-top: 2.5rem; } h1 { font-size: 1.8rem; } }
@media print { body { font-size: 11pt; } figure, .case { break-inside: avoid; } }
"""
