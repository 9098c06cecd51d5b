"""Claims about the page of a language model: its rows as texts, and each token's share of a score."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("transformers")

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteDecoder
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import ByteLevel, Whitespace
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

import headwater as hw
from headwater.errors import InvalidInput, InvalidSetting, UnsupportedModel
from headwater.hf import HfComposableInfluence
from headwater.loaders.texts import text_of

WORDS = ["[pad]", "[unk]", "the", "cat", "dog", "sat", "ran", "home", "and", "slept", ".", "<b>evil</b>"]
TEXTS = ["the cat sat .", "the dog ran home .", "cat and dog slept", "the dog sat", "home .", "the cat ran and slept"]


def tokenizer():
    words = Tokenizer(WordLevel({word: k for k, word in enumerate(WORDS)}, unk_token="[unk]"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[pad]", unk_token="[unk]")


def language_model(method=None, batch_size=4, **options):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=12, n_positions=8, n_embd=4, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config).double().eval()
    return HfComposableInfluence(
        model, method or hw.Ekfac(), damping=hw.relative(0.3), tokenizer=tokenizer(), batch_size=batch_size, **options
    )


def page_of(influence, train, query, tmp_path, **options):
    options = {"verify": False, "k": 2, **options}
    text = influence.report(train, query, tmp_path / "page.html", **options).read_text(encoding="utf-8")
    return text, json.loads(re.search(r'id="data">(.*?)</script>', text, re.S)[1])


def test_tokens_are_coloured_by_themselves_and_add_up_to_the_score(tmp_path):
    influence = language_model().fit(TEXTS)
    text, data = page_of(influence, TEXTS, TEXTS[:2], tmp_path)
    scores = influence.attribute(TEXTS, TEXTS[:2], unit="removal")
    for place, query in enumerate(data["queries"]):
        assert query["up"] and query["down"]
        for row, score, (largest, shares) in [*query["up"], *query["down"]]:
            card = data["rows"][row]["c"]
            assert "".join(card["w"]) == TEXTS[int(data["rows"][row]["id"])] and len(shares) == len(card["w"])
            exact = scores[place, int(data["rows"][row]["id"])]
            assert np.isclose(score, exact, rtol=1e-5)
            # Shares are shown in thousandths of the largest.
            assert abs(sum(shares) * largest / 1000 - exact) < 1e-3 * largest * len(shares)
    assert "of what it adds to that row" in text
    assert re.search(r'<span class="[pn]5" title="[^"]+">', text)  # without a script, too


def test_each_pair_has_the_token_scores_of_that_pair(tmp_path):
    influence = language_model(hw.GradDot()).fit(TEXTS)
    _, data = page_of(influence, TEXTS, TEXTS[:2], tmp_path)
    ids = tokenizer()(TEXTS, padding=True, return_tensors="pt")
    rows = ({"input_ids": ids["input_ids"], "attention_mask": ids["attention_mask"]}, None)
    exact = influence.token_scores(*rows).numpy()
    for place, query in enumerate(data["queries"]):
        for row, _, (largest, shares) in [*query["up"], *query["down"]]:
            mine = exact[place, int(data["rows"][row]["id"])][: len(shares)]
            assert np.allclose(np.array(shares) * largest / 1000, mine, atol=1e-3 * largest)
            assert shares[0] == 0  # nothing predicts the first token


def test_token_scores_do_not_depend_on_the_batches_of_either_side(tmp_path):
    pages = []
    for size in (1, 3, 6):
        influence = language_model(hw.GradDot(), batch_size=size).fit(TEXTS)
        _, data = page_of(influence, TEXTS, TEXTS[:3], tmp_path)
        pages.append([[pair[2] for pair in query[end]] for query in data["queries"] for end in ("up", "down")])
    assert pages[0] == pages[1] == pages[2]


def test_rows_that_are_numbers_of_tokens_are_shown_as_texts_and_escaped(tmp_path):
    influence = language_model()
    rows = [{"input_ids": torch.tensor(row)} for row in ([2, 11, 3], [2, 4, 5, 10], [11, 7], [3, 8, 4])]
    text, data = page_of(influence.fit(rows), rows, rows[:1], tmp_path)
    assert "".join(data["queries"][0]["c"]["w"]) == "the <b>evil</b> cat"
    assert "<b>evil" not in text and "&lt;b&gt;evil" in text


def test_what_a_reader_gave_for_a_row_stays_where_no_token_has_a_score(tmp_path):
    influence = language_model().fit(TEXTS)
    given = {"rows": {"text": [f"row {k}" for k in range(len(TEXTS))]}, "token_scores": False}
    text, data = page_of(influence, TEXTS, TEXTS[:2], tmp_path, **given)
    assert all(len(pair) == 2 for query in data["queries"] for pair in query["up"])
    assert {row["c"]["t"] for row in data["rows"]} <= {f"row {k}" for k in range(len(TEXTS))}
    assert "of what it adds to that row" not in text


def test_token_scores_of_directions_add_up_too(tmp_path):
    influence = language_model().fit(TEXTS)
    _, data = page_of(influence, TEXTS, TEXTS[:1], tmp_path, normalise="both")
    for _, score, (largest, shares) in [*data["queries"][0]["up"], *data["queries"][0]["down"]]:
        assert abs(sum(shares) * largest / 1000 - score) < 1e-3 * largest * len(shares)


def test_a_row_with_one_label_is_a_text_without_colours(tmp_path):
    torch.manual_seed(0)
    config = BertConfig(vocab_size=12, hidden_size=4, num_hidden_layers=1, num_attention_heads=2, intermediate_size=5)
    model = BertForSequenceClassification(config).eval()
    influence = HfComposableInfluence(model, hw.GradDot(), tokenizer=tokenizer())
    train = (TEXTS, [0, 1, 0, 1, 0, 1])
    _, data = page_of(influence.fit(train), train, (TEXTS[:2], [0, 1]), tmp_path)
    assert data["queries"][0]["c"]["t"] == TEXTS[0] and data["queries"][0]["c"]["l"] == "0"
    assert all(len(pair) == 2 for query in data["queries"] for pair in query["up"])
    with pytest.raises(UnsupportedModel, match="one label"):
        page_of(influence, train, (TEXTS[:2], [0, 1]), tmp_path, token_scores=True)


def test_scores_of_more_queries_than_the_loader_has_colour_those_that_are_there(tmp_path):
    influence = language_model(hw.GradDot()).fit(TEXTS)
    scores = influence.attribute(TEXTS, TEXTS[:4])
    for wanted, coloured in ((None, 2), (False, 0)):
        _, data = page_of(influence, TEXTS, TEXTS[:2], tmp_path, scores=scores, token_scores=wanted)
        assert [len(query["up"][0]) == 3 for query in data["queries"]] == [k < coloured for k in range(4)]
    with pytest.raises(InvalidInput, match="lacks 2 of them, such as '2'"):
        page_of(influence, TEXTS, TEXTS[:2], tmp_path, scores=scores, token_scores=True)
    with pytest.raises(InvalidInput, match="the row '4', which train_loader has not"):
        page_of(influence, TEXTS[:4], TEXTS[:4], tmp_path, scores=scores, token_scores=True)
    page_of(influence, TEXTS[:4], TEXTS[:4], tmp_path, scores=scores)


def test_why_tokens_have_no_scores_is_said(tmp_path, monkeypatch):
    influence = language_model(hw.GradDot()).fit(TEXTS)
    kept = influence.gradients(TEXTS, store=tmp_path / "kept")
    with pytest.raises(InvalidSetting, match="kept gradients are no texts"):
        page_of(influence, kept, TEXTS[:2], tmp_path, token_scores=True)
    monkeypatch.setattr("headwater.run.report.KEPT", 8)
    with pytest.raises(InvalidSetting, match="tokens take more than"):
        page_of(influence, TEXTS, TEXTS[:2], tmp_path, token_scores=True)


def test_tokens_that_add_up_to_other_scores_are_counted_or_refused(tmp_path):
    influence = language_model(hw.GradDot()).fit(TEXTS)
    scores = influence.attribute(TEXTS, TEXTS[:2])
    wrong = replace(scores, values=scores.values * np.array([[1.0], [1.5]]))
    text, _ = page_of(influence, TEXTS, TEXTS[:2], tmp_path, scores=wrong, token_scores=True)
    assert "Of 4 pairs they do not add up to the score" in text
    with pytest.raises(InvalidSetting, match="of none of the"):
        page_of(
            influence, TEXTS, TEXTS[:2], tmp_path, scores=replace(scores, values=2 * scores.values), token_scores=True
        )


def test_methods_whose_tokens_add_up_to_nothing_show_texts_alone(tmp_path):
    influence = language_model(hw.LoRif(dimension=2)).fit(TEXTS)
    _, data = page_of(influence, TEXTS, TEXTS[:2], tmp_path)
    assert all(len(pair) == 2 for query in data["queries"] for pair in query["up"])
    with pytest.raises(InvalidSetting, match="add"):
        page_of(influence, TEXTS, TEXTS[:2], tmp_path, token_scores=True)


def test_letters_of_several_tokens_are_one_piece_and_sums_stay():
    letters = {letter: k for k, letter in enumerate(ByteLevel.alphabet())}
    bytes_ = Tokenizer(BPE(letters, []))
    bytes_.pre_tokenizer, bytes_.decoder = ByteLevel(add_prefix_space=False), ByteDecoder()
    for said in ("naïve 日本", "a\N{FAMILY}b", "日"):
        ids = bytes_.encode(said).ids
        text = text_of(ids, bytes_.decode)
        assert str(text) == said and list(text.pieces) == list(said) and text.ends[-1] == len(ids)
        values = np.arange(1.0, len(ids) + 1)
        assert text.sums(values).sum() == values.sum()
    broken = text_of(bytes_.encode("日").ids[:2], bytes_.decode)
    assert broken.ends[-1] == 2 and broken.sums(np.ones(2)).sum() == 2
    assert text_of([], bytes_.decode).pieces == ()
