"""Draw architecture.svg of architecture.txt: python docs/architecture.py. The text file says its own form."""

from __future__ import annotations

from dataclasses import dataclass, field
from html import escape
from pathlib import Path

TEXT = Path(__file__).with_suffix(".txt")
SVG = Path(__file__).with_suffix(".svg")

WIDTH, MARGIN, LABEL, GAP = 1180, 20, 90, 8
BOX, RULE, HEAD, STEP = 44, 22, 44, 34
STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#1d2733}.name{font-weight:600}.note{font-size:10px;fill:#5a6878}"
    ".layer{fill:#5a6878}.rule{font-style:italic;fill:#5a6878}.title{font-size:16px;font-weight:600}"
    "rect{fill:#fff;stroke:#9fb0c3}.band{fill:#eef3f8;stroke:none}.step{fill:#dfeee4;stroke:#7fae8f}"
    "path{stroke:#7a8aa0;fill:none;marker-end:url(#tip)}"
)


@dataclass
class Picture:
    """What the text file says, in its order."""

    title: str = ""
    rows: list[tuple[str, str | list[tuple[str, str]]]] = field(default_factory=list)
    """("rule", its text), or (the layer's name, its packages with a few words each), from the top down."""
    steps: list[str] = field(default_factory=list)

    @property
    def layers(self) -> list[list[str]]:
        """The packages' names, from the top down."""
        return [[name for name, _ in boxes] for _, boxes in self.rows if not isinstance(boxes, str)]


def read(text: str) -> Picture:
    """Errors: ValueError for a line of no known form, or a step that does not go on from the one before."""
    found = Picture()
    for line in text.splitlines():
        word, _, rest = line.strip().partition(" ")
        rest = rest.strip()
        if not word or word.startswith("#"):
            continue
        if line.startswith("  ") and found.rows and not isinstance(boxes := found.rows[-1][1], str):
            boxes.append((word, rest))
        elif word == "title":
            found.title = rest
        elif word == "layer":
            found.rows.append((rest, []))
        elif word == "rule":
            found.rows.append((word, rest))
        elif word == "step":
            start, _, stop = rest.partition(" -> ")
            if found.steps and found.steps[-1] != start:
                raise ValueError(f"The step {rest!r} does not go on from {found.steps[-1]!r}.")
            found.steps = [*(found.steps or [start]), stop]
        else:
            raise ValueError(f"Not a title, layer, rule, step or package: {line!r}.")
    return found


def text(x: float, y: float, words: str, kind: str, middle: bool = True) -> str:
    anchor = ' text-anchor="middle"' if middle else ""
    return f'<text x="{x:g}" y="{y:g}" class="{kind}"{anchor}>{escape(words)}</text>'


def box(x: float, y: float, width: float, height: float, kind: str) -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="4" class="{kind}"/>'


def draw(picture: Picture) -> str:
    y, drawn = MARGIN + HEAD, [text(MARGIN, MARGIN + 16, picture.title, "title", middle=False)]
    room = WIDTH - 2 * MARGIN - LABEL
    drawn.append(text(MARGIN, MARGIN + 34, "Imports run downward, from a layer to any below it.", "note", middle=False))
    for name, boxes in picture.rows:
        if isinstance(boxes, str):
            drawn.append(text(MARGIN + LABEL + room / 2, y + 14, boxes, "rule"))
            y += RULE
            continue
        drawn.append(box(MARGIN, y, WIDTH - 2 * MARGIN, BOX + 2 * GAP, "band"))
        drawn.append(text(MARGIN + GAP, y + GAP + BOX / 2 + 4, name, "layer", middle=False))
        wide = (room - GAP * len(boxes)) / len(boxes)
        for k, (package, note) in enumerate(boxes):
            x = MARGIN + LABEL + k * (wide + GAP)
            drawn.append(box(x, y + GAP, wide, BOX, "package"))
            drawn.append(text(x + wide / 2, y + GAP + 19, package, "name"))
            drawn.append(text(x + wide / 2, y + GAP + 35, note, "note"))
        if name != picture.rows[-1][0]:
            drawn.append(f'<path d="M{MARGIN + LABEL / 2 - GAP} {y + BOX + GAP} v{2.5 * GAP + 4:g}"/>')
        y += BOX + 3 * GAP
    drawn.append(text(MARGIN, y + 16, "One line of data", "layer", middle=False))
    y += 26
    wide = (WIDTH - 2 * MARGIN) / len(picture.steps)
    for k, step in enumerate(picture.steps):
        x = MARGIN + k * wide
        drawn.append(box(x, y, wide - 3 * GAP, STEP, "step"))
        drawn.append(text(x + (wide - 3 * GAP) / 2, y + 21, step, "name"))
        if k:
            drawn.append(f'<path d="M{x - 3 * GAP:g} {y + STEP / 2:g} h{3 * GAP - 5}"/>')
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y + STEP + MARGIN:g}" role="img">'
    tip = (
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="6" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<polygon points="0,0 8,4 0,8" fill="#7a8aa0"/></marker></defs>'
    )
    ground = f'<rect width="{WIDTH}" height="{y + STEP + MARGIN:g}" style="fill:#fff;stroke:none"/>'
    title = f"<title>{escape(picture.title)}</title><style>{STYLE}</style>{tip}"
    return "\n".join([head, title, ground, *drawn, "</svg>", ""])


if __name__ == "__main__":
    SVG.write_text(draw(read(TEXT.read_text())))
