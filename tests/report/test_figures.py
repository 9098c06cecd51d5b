"""Claims about the figures of a page: plain data that draws itself, and lets no text become markup."""

import base64
import re
import struct
import zlib
from html.parser import HTMLParser

import numpy as np
import pytest
from markupsafe import escape

from headwater.errors import InvalidInput, NonFiniteValue, ShapeMismatch
from headwater.report import (
    Bar,
    Bars,
    Condition,
    Curve,
    Curves,
    Dots,
    Grid,
    Points,
    Share,
    Table,
    mean_and_spread,
    png,
)
from headwater.report.figures import level_of
from headwater.report.images import Images, as_levels, png_bytes

TABLE = Table("Found", "More is better.", ("by", "share"), [("ours", Share(0.5)), ("random", Share(0.05))], ours=0)
CURVES = Curves(
    "Soon", "Up is better.", "checked", "found", [Curve("ours", [0, 1], [0, 1]), Curve("any", [0, 1], [0, 0.5])]
)
DOTS = Dots(
    "Again", "Left is better.", "loss", [Condition("nothing", [1.0, 2.0]), Condition("ours", [0.5, 0.75])], ours=1
)
BARS = Bars("Groups", "Right helps.", [Bar("a", 2.0, "2"), Bar("b", -1.0, "1")], signed=True)
POINTS = Points("Rows", "One each.", "loss", "self", [0.0, 1.0, 2.0], [0.0, 4.0, 2.0], marked=[1])
GRID = Grid("Between", "Blue helps.", "query \\ train", ["a", "b"], ["a", "b"], [[1.0, -0.5], [0.0, 0.2]])
FIGURES = (TABLE, CURVES, DOTS, BARS, POINTS, GRID)


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


def test_figures_are_well_formed_and_each_drawing_has_a_title():
    for figure in FIGURES:
        elements = Elements(figure.html())
        drawings = [svg for svg in elements.all("svg") if not svg.get("aria-hidden")]
        assert all(svg["role"] == "img" for svg in drawings)
        assert len(elements.all("title")) == len(drawings)
        assert {head["scope"] for head in elements.all("th")} <= {"row", "col"}
        assert not any("style" in attributes for _, attributes in elements.found)  # the page's policy refuses them


def test_every_figure_says_how_to_read_it():
    for figure in FIGURES:
        assert f"<h3>{escape(figure.title)}</h3><p>{figure.reading}</p>" in figure.html()


def test_text_cannot_become_markup():
    evil = '<b onclick="x">&\u202e'
    figures = [
        Table(evil, evil, (evil, evil), [(evil, evil)]),
        Curves(evil, evil, evil, evil, [Curve(evil, [0, 1], [0, 1]), Curve(evil, [0, 1], [0, 1])], marks=[(0.5, evil)]),
        Dots(evil, evil, evil, [Condition(evil, [1.0])]),
        Bars(evil, evil, [Bar(evil, 1.0, evil)]),
        Points(evil, evil, evil, evil, [1.0], [1.0]),
        Grid(evil, evil, evil, [evil], [evil], [[1.0]]),
    ]
    for figure in figures:
        drawn = figure.html()
        assert "<b" not in drawn and "\u202e" not in drawn
        assert not any("onclick" in attributes for _, attributes in Elements(drawn).found)


def test_the_same_table_can_be_read_in_a_terminal():
    assert TABLE.text() == "Found\n  by      share\n  ours      50%\n  random     5%"


def test_charts_draw_the_numbers_where_the_axes_say():
    paths = dict(re.findall(r'<path class="curve (c0|c9)" d="M([^"]+)"', CURVES.html().split('role="img"')[1]))
    ours, chance = ([tuple(map(float, p.split(","))) for p in paths[name].split(" ")] for name in ("c0", "c9"))
    assert ours[0] == chance[0] and ours[1][0] == chance[1][0]
    assert ours[0][1] - ours[1][1] == pytest.approx(2 * (chance[0][1] - chance[1][1]), abs=0.1)
    assert "ours reaches 100%; any reaches 50%" in CURVES.html()
    assert DOTS.html().count("<circle") == 4
    assert "nothing 1.50 ± 0.71; ours 0.62 ± 0.18" in DOTS.html()
    right, left = re.findall(r'x="([\d.]+)" y="[\d.]+" width="([\d.]+)" height="14"', BARS.html())
    assert float(right[1]) == pytest.approx(2 * float(left[1]), abs=0.1)
    assert float(left[0]) + float(left[1]) == pytest.approx(float(right[0]), abs=0.11)


def test_an_axis_of_powers_has_equal_distances_between_them():
    drawn = Curves("t", "r", "x", "y", [Curve("c", [1, 10, 100], [0, 1, 1])], x_form="{:.0f}", powers=True).html()
    x = [float(p.split(",")[0]) for p in re.search(r'curve c0" d="M([^"]+)"', drawn)[1].split(" ")]
    assert x[1] - x[0] == pytest.approx(x[2] - x[1], abs=0.1)


def test_what_helps_and_what_harms_have_colours_of_their_own():
    assert level_of(1.0, 1.0) == "p5" and level_of(-1.0, 1.0) == "n5" and level_of(0.0, 1.0) == "z"
    assert level_of(0.01, 1.0) == "z" and level_of(1.0, 0.0) == "z"


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


# Pictures -------------------------------------------------------------------------------------------------------------


def pixels(data):
    """Decode a PNG by hand: [h, w] or [h, w, 3]."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, at = {}, 8
    while at < len(data):
        (size,), name = struct.unpack(">I", data[at : at + 4]), data[at + 4 : at + 8]
        chunks[name] = data[at + 8 : at + 8 + size]
        assert struct.unpack(">I", data[at + 8 + size : at + 12 + size])[0] == zlib.crc32(name + chunks[name])
        at += 12 + size
    width, height, bits, colour = struct.unpack(">IIBB", chunks[b"IHDR"][:10])
    packed = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, -1)
    if colour == 3:
        places = np.unpackbits(packed[:, 1:], axis=1).reshape(height, -1, bits)
        index = (places << np.arange(bits)[::-1]).sum(-1)[:, :width]
        return np.frombuffer(chunks[b"PLTE"], np.uint8).reshape(-1, 3)[index]
    step, lines = {0: 1, 2: 3}[colour], []
    for kind, *line in packed.astype(int).tolist():
        for k in range(len(line)):
            left = line[k - step] if k >= step and kind == 1 else 0
            above = lines[-1][k] if lines and kind == 2 else 0
            line[k] = (line[k] + left + above) % 256
        lines.append(line)
    shown = np.array(lines, np.uint8)
    return shown if colour == 0 else shown.reshape(height, width, 3)


def decoded(uri):
    return pixels(base64.b64decode(uri.removeprefix("data:image/png;base64,")))


@pytest.mark.parametrize("shape", [(3, 5), (4, 3, 3), (16, 16), (9, 16, 3)])
def test_pictures_keep_their_levels(shape):
    image = np.random.default_rng(0).random(shape)
    np.testing.assert_array_equal(decoded(png(image)), np.round(255 * image).astype(np.uint8))


@pytest.mark.parametrize("colours", [1, 2, 3, 16])
def test_pictures_of_few_colours_are_small_and_the_same(colours):
    rng = np.random.default_rng(0)
    table = rng.integers(0, 256, (colours, 3)).astype(np.uint8)
    image = table[rng.integers(0, colours, (13, 11))]
    np.testing.assert_array_equal(pixels(png_bytes(image)), image)


@pytest.mark.parametrize(
    ("given", "shape"),
    [
        (np.zeros((8, 6)), (8, 6)),
        (np.zeros((8, 6, 1)), (8, 6)),
        (np.zeros((1, 8, 6)), (8, 6)),
        (np.zeros((8, 6, 3)), (8, 6, 3)),
        (np.zeros((3, 8, 6)), (8, 6, 3)),
        (np.zeros((8, 6, 4), np.uint8), (8, 6, 3)),
        (np.zeros(6), None),
        (np.zeros((2, 8, 6)), None),
        (np.zeros((2, 3, 8, 6)), None),
        ("text", None),
        (3.0, None),
    ],
)
def test_what_is_an_image_is_told_by_its_shape(given, shape):
    found = as_levels(given)
    assert found is None if shape is None else (found.shape == shape and found.dtype == np.uint8)


def test_tensors_and_pillow_images_are_images():
    import torch
    from PIL import Image

    image = torch.rand(3, 5, 7)
    expected = np.round(255 * np.moveaxis(image.numpy().astype(float), 0, -1)).astype(np.uint8)
    np.testing.assert_array_equal(as_levels(image), expected)
    np.testing.assert_array_equal(as_levels(Image.fromarray(expected)), expected)
    assert as_levels(Image.fromarray(expected).convert("P")).shape == (5, 7, 3)


def test_numbers_beyond_one_are_stretched_and_bytes_are_not():
    image = np.array([[-1.0, 0.0], [1.0, 3.0]])
    np.testing.assert_array_equal(as_levels(image), [[0, 64], [128, 255]])
    np.testing.assert_array_equal(as_levels(np.array([[0, 7], [9, 16]], np.uint8)), [[0, 7], [9, 16]])


def test_a_picture_that_comes_twice_is_kept_once():
    images, image = Images(), np.eye(8, dtype=np.uint8)
    assert [images.add(image), images.add(1 - image), images.add(image.copy())] == [0, 1, 0]


def test_many_pictures_are_made_coarser_until_they_fit():
    images, rng = Images(), np.random.default_rng(0)
    for _ in range(200):
        images.add(rng.integers(0, 256, (32, 32, 3)).astype(np.uint8))
    found, said = images.encoded(150_000)
    assert len(found) == 200 and sum(map(len, found)) <= 150_000 and "pixels at most" in said
    same, coarse = images.encoded(700_000)
    assert "coarser colours" in coarse and "pixels" not in coarse and len(same) == 200
    exact, nothing = images.encoded(10**7)
    assert nothing == "" and decoded(exact[0]).shape == (32, 32, 3)


@pytest.mark.parametrize(
    ("draw", "error", "said"),
    [
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
