"""Claims about the report: one page, alone in the world, that draws what it is given."""

import base64
import re
import struct
import zlib
from html.parser import HTMLParser

import numpy as np
import pytest

from headwater.errors import InvalidInput, InvalidSetting, NonFiniteValue, ShapeMismatch
from headwater.report import (
    Case,
    Cases,
    Condition,
    Curve,
    Curves,
    Dots,
    Fact,
    Picture,
    Section,
    Share,
    Table,
    mean_and_spread,
    page,
    png,
)

TABLE = Table("Found", "More is better.", ("by", "share"), [("ours", Share(0.5)), ("random", Share(0.05))], ours=0)
CURVES = Curves(
    "Soon", "Up is better.", "checked", "found", [Curve("ours", [0, 1], [0, 1]), Curve("any", [0, 1], [0, 0.5])]
)
DOTS = Dots(
    "Again", "Left is better.", "loss", [Condition("nothing", [1.0, 2.0]), Condition("ours", [0.5, 0.75])], ours=1
)
QUERY = Picture(np.eye(8), ["is a 4", "read as 9"], alt="Query 3")
ROW = Picture(np.eye(8), ["labelled 9", "but a 4"], alt="Row 7", marked=True)
CASES = Cases("Why", "Red is wrong.", [Case(QUERY, [("most harmful", [ROW, ROW]), ("most helpful", [])])])


def whole(figures=(TABLE, CURVES, DOTS, CASES), **options):
    sections = [Section("What was found", "One.\n\nTwo.", figures)]
    return page(
        "Title", **({"lead": "Lead", "unit": "removal", "sections": sections, "facts": [Fact("3", "of 4")]} | options)
    )


class Elements(HTMLParser):
    """Every element with its attributes; complains about tags that are not closed in order."""

    def __init__(self, text):
        super().__init__()
        self.found, self.open = [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        if tag not in {"meta", "img", "br"}:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def all(self, tag):
        return [attributes for found, attributes in self.found if found == tag]


def test_the_page_loads_nothing_and_runs_nothing():
    text = whole()
    assert not re.search(r"https?://|@import|<script|<link|<iframe|\son\w+=", text)
    assert "default-src 'none'" in text
    assert not re.findall(r"url\(|src=\"(?!data:)", text)


def test_the_page_is_well_formed_and_every_picture_has_words():
    elements = Elements(whole())
    assert all(svg.get("aria-label") or svg.get("aria-hidden") for svg in elements.all("svg"))
    assert [image["alt"] for image in elements.all("img")] == ["Query 3", "Row 7", "Row 7"]
    assert elements.all("html") == [{"lang": "en"}]
    assert {head["scope"] for head in elements.all("th")} == {"row", "col"}


def test_the_page_says_what_a_score_means():
    text = whole(unit_note="In nats.")
    assert "increase of the query&rsquo;s loss when the train row is removed" in text
    assert "Positive: the train row helps" in text and "In nats." in text


def test_every_figure_says_how_to_read_it():
    text = whole()
    for figure in (TABLE, CURVES, DOTS, CASES):
        assert f"<h3>{figure.title}</h3><p>{figure.reading}</p>" in text


def test_the_page_has_a_dark_side():
    assert "prefers-color-scheme: dark" in whole()


def test_text_cannot_become_markup():
    evil = '<b onclick="x">&'
    figures = [
        Table(evil, evil, (evil, evil), [(evil, evil)]),
        Curves(evil, evil, evil, evil, [Curve(evil, [0, 1], [0, 1]), Curve(evil, [0, 1], [0, 1])]),
        Dots(evil, evil, evil, [Condition(evil, [1.0])]),
        Cases(evil, evil, [Case(Picture(np.eye(2), [evil], alt=evil), [(evil, [])])]),
    ]
    text = whole([*figures], lead=evil, foot=evil, facts=[Fact(evil, evil)], unit_note=evil)
    assert "<b" not in text.replace("<body", "").replace("<br", "")
    assert not any("onclick" in attributes for _, attributes in Elements(text).found)


def test_the_same_table_can_be_read_in_a_terminal():
    assert TABLE.text() == "Found\n  by      share\n  ours      50%\n  random     5%"


def test_charts_draw_the_numbers_where_the_axes_say():
    first, second = re.findall(r'<path class="curve c(?:0|9)" d="M([^"]+)"', CURVES.html().split('role="img"')[1])[::-1]
    ours, chance = ([tuple(map(float, point.split(","))) for point in path.split(" ")] for path in (first, second))
    assert ours[0] == chance[0] and ours[1][0] == chance[1][0]
    assert ours[0][1] - ours[1][1] == pytest.approx(2 * (chance[0][1] - chance[1][1]), abs=0.1)
    assert "ours reaches 100%; any reaches 50%" in CURVES.html()
    assert DOTS.html().count("<circle") == 4
    assert "nothing 1.50 ± 0.71; ours 0.62 ± 0.18" in DOTS.html()


def test_ticks_are_round_and_few_at_every_scale():
    for scale in (1e-6, 0.03, 1.0, 7.3, 99.0, 1e5):
        ticks = [
            float(t)
            for t in re.findall(r'middle">([\d.e+-]+)</text>', Dots("t", "r", "", [Condition("c", [scale])]).html())
        ]
        assert 3 <= len(ticks) <= 8 and ticks[0] == 0 and ticks[-1] <= scale
        np.testing.assert_allclose(np.diff(ticks), ticks[1], rtol=1e-6)


def test_one_repetition_has_no_spread():
    assert mean_and_spread([1.234]) == "1.23"
    assert mean_and_spread([1.0, 3.0], digits=1) == "2.0 ± 1.4"


def pixels(uri):
    """Decode a PNG by hand: [h, w, channels], unfiltered lines only."""
    data = base64.b64decode(uri.removeprefix("data:image/png;base64,"))
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, at = {}, 8
    while at < len(data):
        (size,), name = struct.unpack(">I", data[at : at + 4]), data[at + 4 : at + 8]
        chunks[name] = data[at + 8 : at + 8 + size]
        assert struct.unpack(">I", data[at + 8 + size : at + 12 + size])[0] == zlib.crc32(name + chunks[name])
        at += 12 + size
    width, height, depth, colour = struct.unpack(">IIBB", chunks[b"IHDR"][:10])
    channels = {2: 3, 4: 2}[colour]
    lines = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, 1 + width * channels)
    assert depth == 8 and not lines[:, 0].any()
    return lines[:, 1:].reshape(height, width, channels)


def test_ink_is_black_on_clear_paper():
    image = np.linspace(0, 1, 15).reshape(3, 5)
    shown = pixels(png(image))
    assert not shown[..., 0].any()
    np.testing.assert_array_equal(shown[..., 1], np.round(255 * image))


def test_colour_images_keep_their_colours():
    image = np.random.default_rng(0).random((4, 3, 3))
    np.testing.assert_array_equal(pixels(png(image)), np.round(255 * image))


@pytest.mark.parametrize(
    ("draw", "error", "said"),
    [
        (lambda: whole(unit="furlongs"), InvalidSetting, "'removal'.*got 'furlongs'"),
        (lambda: Share(1.5), InvalidInput, "got 1.5"),
        (lambda: Share(float("nan")), InvalidInput, "got nan"),
        (lambda: Table("t", "r", ("a", "b"), [("x", "1", "2")]), ShapeMismatch, "'x' has 3 cells.* 2 columns"),
        (lambda: Dots("t", "r", "x", [Condition("c", [1, np.nan])]).html(), NonFiniteValue, "1 of 2 values of 'c'"),
        (lambda: png(np.zeros((2, 2, 4))), ShapeMismatch, r"\[2, 2, 4\]"),
    ],
)
def test_what_cannot_be_drawn_is_refused(draw, error, said):
    with pytest.raises(error, match=said):
        draw()
