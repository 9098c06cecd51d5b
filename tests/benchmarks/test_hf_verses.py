"""The comparison on verses: the same path on a tiny random model and thirty sentences; and, slowly, the real one."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, logging

import headwater as hw
from headwater.errors import InvalidSetting
from headwater.evaluate import bm25

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "leaderboard"))
import verses
from verses import Verse, embedding_scores, load_verses, rank, run, sample

sys.path.pop(0)

logging.set_verbosity_error()

NOUNS, VERBS = ("ark", "bread", "crown", "dove", "earth", "fig"), ("gave", "kept", "saw", "took", "sold")
VERSES = [
    Verse(10 * i + j, f"and the {noun} which he {verb} was good", f"the {noun} he {verb} was good")
    for i, noun in enumerate(NOUNS)
    for j, verb in enumerate(VERBS)
]


def tokenizer():
    words = sorted({word for verse in VERSES for word in f"{verse.passage} {verse.query}".split()})
    model = WordLevel({word: k for k, word in enumerate(["[pad]", "[unk]", *words])}, unk_token="[unk]")
    split = Tokenizer(model)
    split.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=split, pad_token="[pad]", unk_token="[unk]")


def tiny_models():
    torch.manual_seed(0)
    size = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    llama = LlamaForCausalLM(LlamaConfig(**size, num_attention_heads=2, max_position_embeddings=16, pad_token_id=0))
    return llama.eval(), BertModel(BertConfig(**size, num_attention_heads=2, pad_token_id=0)).eval()


def run_tiny(out, **options):
    llama, bert = tiny_models()
    options = {"passages": 30, "queries": 6, "progress": False} | options
    tools = {"verses": VERSES, "model": llama, "tokenizer": tokenizer(), "embedder": (bert, tokenizer())}
    return run(out, **options, **tools)


@pytest.mark.parametrize("method", ["logra", "grad-dot", "grad-cos", "ekfac"])
def test_the_page_says_how_each_ranking_did(tmp_path, method):
    found = run_tiny(tmp_path / "out", method=method)
    text = (tmp_path / "out" / "verses.md").read_text()
    names = [ranking.name for ranking in found.rankings]
    assert names == [f"influence ({method})", "BM25", "MiniLM embeddings"]
    for ranking in found.rankings:
        assert ranking.ranks.shape == (6,)
        value, low, high = ranking.intervals["MRR"]
        assert low <= value <= high
        assert f"| {ranking.name} | {value:.3f} ({low:.3f} to {high:.3f}) |" in text
    assert found.method in text


def test_a_random_model_is_no_match_for_counting_words_and_the_page_says_so(tmp_path):
    found = run_tiny(tmp_path, method="grad-dot", queries=30)
    influence, bm25, _ = (ranking.intervals["MRR"][0] for ranking in found.rankings)
    assert influence < bm25
    assert "Influence is behind" in (tmp_path / "verses.md").read_text()


def test_a_second_run_goes_on_from_the_first(tmp_path, capsys):
    first = run_tiny(tmp_path)
    kept = sorted(path.stat().st_mtime_ns for path in (tmp_path / "scores").rglob("*") if path.is_file())
    again = run_tiny(tmp_path, progress=True)
    assert kept == sorted(path.stat().st_mtime_ns for path in (tmp_path / "scores").rglob("*") if path.is_file())
    assert np.array_equal(first.rankings[0].ranks, again.rankings[0].ranks)
    assert "| ranking | MRR | recall@1 | recall@10 |" in capsys.readouterr().out


def test_scores_are_those_of_the_passages_in_their_own_order():
    llama, _ = tiny_models()
    texts, asked = [v.passage for v in VERSES[:7]], [v.query for v in VERSES[:2]]
    texts = [text + " and good" * (k % 3) for k, text in enumerate(texts)]  # of several lengths
    got, _ = verses.influence_scores(llama, tokenizer(), texts, asked, hw.GradDot(), None, False)
    alone = [
        verses.influence_scores(llama, tokenizer(), [text], asked, hw.GradDot(), None, False)[0][:, 0] for text in texts
    ]
    np.testing.assert_allclose(got, np.stack(alone, axis=1), rtol=0, atol=1e-5 * np.abs(got).max())


def test_ranks_count_ties_against_the_ranking():
    scores = np.array([[2.0, 1.0, 3.0], [1.0, 1.0, 1.0], [0.0, 0.0, 5.0]])
    assert rank("any", scores).ranks.tolist() == [2, 3, 1]
    assert rank("any", scores).intervals["recall@1"][0] == pytest.approx(1 / 3)
    assert rank("any", scores).intervals["MRR"][0] == pytest.approx((1 / 2 + 1 / 3 + 1) / 3)


def test_bm25_ranks_by_rare_shared_words():
    texts = ["the cat sat", "the dog sat", "the cat and the dog ran"]
    assert bm25(["dog sat", "ran"], texts).argmax(1).tolist() == [1, 2]


def test_embeddings_do_not_depend_on_padding():
    _, bert = tiny_models()
    texts = ["the ark was good", "the dove he kept was good and the earth was good"]
    together = embedding_scores(bert, tokenizer(), texts, texts, False)
    alone = [embedding_scores(bert, tokenizer(), texts[:1], [text], False)[0, 0] for text in texts]
    np.testing.assert_allclose(together[:, 0], alone, atol=1e-5)
    assert together[0, 0] == pytest.approx(1.0, abs=1e-5)


def test_translations_are_aligned_verse_by_verse():
    found = {verse.number: verse for verse in load_verses()}
    assert len(found) == 31086  # of 31102: sixteen are not in the second translation
    assert found[1001001].passage == "In the beginning God created the heaven and the earth."
    assert found[1001001].query == "In the beginning God created the heavens and the earth."
    assert found[42002029].query.startswith("Now lettest thou thy servant depart")
    assert not any(set("[]\n") & set(verse.passage) for verse in found.values())


def test_verses_that_settings_were_chosen_on_are_never_used():
    every = [Verse(k, str(k), str(k)) for k in range(900)]
    tuned = {every[k].number for k in np.random.default_rng(0).permutation(900)[: verses.TUNING]}
    used = {v.number for seed in range(3) for v in sample(every, 300, 50, seed, True)}
    assert not used & tuned
    assert sample(every, 20, 5, 0, True) != sample(every, 20, 5, 1, True)


def test_settings_that_mean_nothing_are_refused(tmp_path):
    with pytest.raises(InvalidSetting, match="method is 'magic'"):
        run_tiny(tmp_path, method="magic")
    for wrong in ({"queries": 31}, {"passages": 31}, {"queries": 0}):
        with pytest.raises(InvalidSetting, match="30"):
            run_tiny(tmp_path, **wrong)


@pytest.mark.slow
def test_the_packaged_model_traces_verses(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    found = run(tmp_path / "out", passages=60, queries=10, progress=False)
    assert found.rankings[0].intervals["recall@10"][0] == 1.0
    assert [path.name for path in (tmp_path / "cache" / "headwater").iterdir()] == ["smollm2-135m"]
