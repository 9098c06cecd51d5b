"""One HTML page of any job: for each query the rows behind it, who influences most, what is suspicious, what to trust.

    scores.report("page.html", rows=frame, queries=frame)        of scores that are there
    influence.report(train, query, "page.html", rows=...)        and of what else the influence can tell

`cards` draws a row as what it is, `images` packs pictures, `gather` reads scores tile by tile, `rows` and `trust` write
the sections, `figures` draws, `page` fills the templates.
"""

from headwater.report.cards import Card, Tokens
from headwater.report.cases import Known
from headwater.report.figures import (
    Bar,
    Bars,
    Condition,
    Curve,
    Curves,
    Dots,
    Fact,
    Figure,
    Grid,
    Points,
    Section,
    Share,
    Table,
    mean_and_spread,
)
from headwater.report.images import png
from headwater.report.job import page, write
from headwater.report.rows import Suspects

__all__ = [
    "Bar",
    "Bars",
    "Card",
    "Condition",
    "Curve",
    "Curves",
    "Dots",
    "Fact",
    "Figure",
    "Grid",
    "Known",
    "Points",
    "Section",
    "Share",
    "Suspects",
    "Table",
    "Tokens",
    "mean_and_spread",
    "page",
    "png",
    "write",
]
