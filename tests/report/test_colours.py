"""Claims about the numbers of tokens on a page: their unit is the score's, and they add up to it."""

import json
import re
import shutil
import subprocess

import numpy as np
import pytest

from headwater.report.colours import TokenScores, coloured, left_off
from headwater.report.gather import Scale
from headwater.report.page import _file
from headwater.report.text import MINUS

PIECES = [f"w{k} " for k in range(30)]


def drawn(power=-3):
    values = np.linspace(-1, 2, 30) * 10.0**power
    tokens = TokenScores(rows=lambda _: PIECES, values={(0, 0): values})
    card = tokens.row(0, {"t": "".join(PIECES), "m": 3}, letters=80)
    return values, card, [0, values.sum(), *tokens.of(0, 0, len(card["w"]))]


def amount(text):
    return float(text.replace(MINUS, "-"))


def test_the_numbers_of_a_cut_text_and_of_what_is_left_off_add_up_to_the_score():
    values, card, pair = drawn()
    assert len(card["w"]) == 20 and card["m"] > 0
    said = [amount(number) for _, _, number in coloured(card, pair, Scale(-3))]
    np.testing.assert_allclose(said, 1e3 * values[:20], atol=0.006)
    rest = amount(left_off(card, pair, Scale(-3)))
    np.testing.assert_allclose(rest, 1e3 * values[20:].sum(), rtol=5e-3)
    assert abs(sum(said) + rest - 1e3 * values.sum()) < 0.1
    assert left_off(card, pair[:2], Scale(0)) == "" and coloured(card, pair[:2], Scale(0)) == []


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
@pytest.mark.parametrize("power", [-3, 0, 3])
def test_a_browser_says_the_same_numbers_as_a_page_without_a_script(power):
    _, card, pair = drawn(power)
    found = re.findall(r"^function (?:said|coloured)\(.*?^}", _file("cards.js"), re.S | re.M)
    code = f"const MINUS = '\\u2212';{''.join(found)}"
    code += f"console.log(JSON.stringify(coloured({json.dumps(card)}, {json.dumps(pair[2])}, {power})))"
    shown = json.loads(subprocess.run(["node", "-e", code], capture_output=True, check=True, text=True).stdout)
    assert [tuple(piece) for piece in shown] == coloured(card, pair, Scale(power))
