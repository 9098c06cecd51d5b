"""Claims about cards: a row is shown as what it is, whatever it is, and its text stays text."""

import numpy as np
import pytest
import torch

from headwater.errors import NonFiniteValue, ShapeMismatch
from headwater.report import Card, Tokens
from headwater.report.cards import Deck, card_of, letters_for
from headwater.report.text import MINUS, cut, number, visible

IMAGE = np.random.default_rng(0).random((8, 8))


def drawn(item, **options):
    deck = Deck(**options)
    return deck.draw(card_of(item)), deck


def test_nothing_known_is_an_empty_card():
    assert drawn(None)[0] == {}


def test_a_text_is_a_text():
    assert drawn("to be\nor not")[0] == {"t": "to be\nor not"}


@pytest.mark.parametrize("image", [IMAGE, IMAGE[None], torch.tensor(IMAGE), np.dstack([IMAGE] * 3)])
def test_an_image_is_a_picture_and_its_pair_has_a_label(image):
    assert drawn(image)[0] == {"i": 0}
    assert drawn((image, 3))[0] == {"i": 0, "l": "3"}
    assert drawn((image, torch.tensor(3)))[0] == {"i": 0, "l": "3"}
    assert drawn([image, np.int64(3)])[0] == {"i": 0, "l": "3"}


def test_a_table_row_is_its_cells():
    found, deck = drawn({"age": 41, "income": np.float32(2300.5), "city": "Ely", "label": "paid", "gone": None})
    assert found == {"c": [[0, "41"], [1, "2,300.50"], [2, "Ely"], [3, "missing"]], "l": "paid"}
    assert list(deck.names) == ["age", "income", "city", "gone"]


def test_an_item_of_a_data_set_shows_its_image_text_and_label():
    found, _ = drawn({"image": IMAGE, "label": 4, "text": "four", "source": "web", "boxes": {"a": 1}, "tokens": [1, 2]})
    assert found["i"] == 0 and found["l"] == "4" and found["t"] == "four"
    assert [value for _, value in found["c"]] == ["web", "dict of 1"]


def test_numbers_in_a_row_are_cells():
    found, deck = drawn((np.array([0.5, -2.0]), 1))
    assert found == {"c": [[0, "0.5"], [1, MINUS + "2"]], "l": "1"} and list(deck.names) == ["x0", "x1"]


def test_long_rows_say_how_much_is_left_off():
    found, _ = drawn({f"c{k}": k for k in range(100)})
    assert len(found["c"]) == 60 and found["d"] == 40


def test_tokens_have_a_colour_and_a_number_each():
    found, _ = drawn(Tokens(["New", " York", "!"], [1.0, -0.5, 0.0]))
    assert found["k"] == [["New", "p5", "+1"], [" York", "n3", MINUS + "0.5"], ["!", "z", "+0"]]


def test_tokens_without_their_numbers_are_refused():
    with pytest.raises(ShapeMismatch, match="2 pieces"):
        Tokens(["a", "b"], [1.0])
    with pytest.raises(NonFiniteValue, match="1 of 2"):
        Tokens(["a", "b"], [1.0, np.nan])


def test_a_card_of_ones_own_is_taken_as_it_is():
    found, _ = drawn(Card(text="sound 3", columns={"seconds": 2.0}, label="bark", note="clipped"))
    assert found == {"t": "sound 3", "c": [[0, "2"]], "l": "bark", "n": "clipped"}


def test_anything_else_is_shown_as_its_text():
    assert drawn(3.5)[0] == {"t": "3.5"}
    assert drawn({1, 2})[0] == {"t": "{1, 2}"}


def test_huge_texts_are_cut_and_say_by_how_much():
    found, _ = drawn("x" * 10**6, letters=500)
    assert found == {"t": "x" * 500, "m": 10**6 - 500}
    assert cut("abc", 3) == ("abc", 0)


def test_short_texts_leave_their_room_to_long_ones():
    short, long = [Card(text="x" * 10)] * 90, [Card(text="x" * 10_000)] * 10
    assert letters_for(short + long, 20_000) == 1910
    assert letters_for(short, 20_000) == 4000
    assert letters_for(long * 1000, 20_000) == 160


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain é 漢字 🙂", "plain é 漢字 🙂"),
        ("a\r\nb\tc", "a\nb\tc"),
        ("\u202eevil\u2066", "\\u202eevil\\u2066"),
        ("\x00\x1b[31m\x07", "\\x00\\x1b[31m\\x07"),
        ("\ud800", "\\ud800"),
        ("\U000e0041", "\\U000e0041"),
        ("👩\u200d🔬", "👩\u200d🔬"),
        ("a\u00a0b", "a\u00a0b"),
        ("\u2028", "\\u2028"),
    ],
)
def test_what_cannot_be_seen_is_made_visible(text, shown):
    assert visible(text) == shown
    visible(text).encode("utf-8")


def test_numbers_are_short_and_their_minus_is_one():
    assert [number(v) for v in (0.123456, -1.0, 12345.678, 1e-9, 33552.0)] == [
        "0.1235",
        MINUS + "1",
        "12,345.68",
        f"1e{MINUS}09",
        "33,552",
    ]
