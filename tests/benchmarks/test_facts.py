"""Facts in two wordings: words give nothing away, each fact is one, and the whole path runs on a handful of people."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from headwater.evaluate import bm25

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import facts
from facts import IGNORED, RELATIONS, Encoded, Run, Training, encoded, make_facts

sys.path.pop(0)


def words(text):
    return set(re.findall(r"\w+", text.lower()))


@pytest.fixture(scope="module")
def made():
    return make_facts(0)


def test_the_same_seed_makes_the_same_rows_and_another_others(made):
    assert make_facts(0) == made
    assert make_facts(1).digest != made.digest


def test_a_row_is_there_once_and_a_query_is_no_row(made):
    texts = [row.text for row in made.rows]
    assert len(set(texts)) == len(texts)
    assert not set(texts) & {query.text for query in made.queries}
    assert len(made.queries) == facts.ASKED * len(RELATIONS)


def test_two_rows_state_what_is_asked_and_no_other_says_so(made):
    assert (made.relevant.sum(axis=1) == 2).all()
    for query, mask in zip(made.queries, made.relevant, strict=True):
        value = query.text.rpartition(" ")[2]
        stated = {text.format(n=query.text.split()[0], v=value.strip(".")) for text in RELATIONS[query.relation].stated}
        assert {made.rows[k].text for k in np.flatnonzero(mask)} == stated


def test_a_fact_shares_with_its_question_the_name_and_the_answer_alone(made):
    for query, mask in zip(made.queries, made.relevant, strict=True):
        for k in np.flatnonzero(mask):
            assert len(words(query.text) & words(made.rows[k].text)) == 2


def test_words_cannot_tell_a_fact_from_its_decoys(made):
    """Their BM25 scores are equal: a fact comes first by chance. Echoes have more of the question's words."""
    texts = [row.text for row in made.rows]
    scores = bm25([query.text for query in made.queries], texts)
    alike = made.of_kind("fact", "decoy")
    assert (alike.sum(axis=1) == 2 + facts.DECOYS).all()
    for row, mask in zip(scores, alike, strict=True):
        assert np.ptp(row[mask]) <= 1e-12 * row[mask].max()
    alone = bm25([query.text.partition("?")[0] for query in made.queries], texts)
    echoes, stated = made.of_kind("echo"), made.relevant
    assert all(row[echo].min() > row[fact].max() for row, echo, fact in zip(alone, echoes, stated, strict=True))


def test_decoys_of_the_taught_do_not_tell_the_answer(made):
    by_fact = {(row.person, row.relation): row.text.split()[-1] for row in made.rows if row.kind == "question"}
    told = [row for row in made.rows if row.person < facts.TAUGHT and row.kind in ("decoy", "rumour")]
    assert len(told) > 200
    assert all(row.text.split()[-1] != by_fact[row.person, row.relation] for row in told)


def test_every_question_has_a_rumour_in_the_words_of_a_fact(made):
    for query in made.queries:
        rumours = [
            row.text
            for row in made.rows
            if row.kind == "rumour" and (row.person, row.relation) == (query.person, query.relation)
        ]
        assert len(rumours) == 1
        before, _, value = rumours[0].rpartition(" ")
        assert query.text.rpartition(" ")[2] != value
        assert before in {
            text.format(n=query.text.split()[0], v="").rpartition(" ")[0] for text in RELATIONS[query.relation].stated
        }


def test_the_last_word_and_its_point_are_what_is_predicted(made):
    train, queries = encoded(made)
    for rows, data in ((made.rows, train), (made.queries, queries)):
        for k in (0, 1, 7, len(rows) - 1):
            wanted = bytes(data.y[k][data.y[k] != IGNORED].tolist()).decode()
            assert wanted == rows[k].text.rpartition(" ")[2]
            assert (
                bytes(data.x[k, : data.ends[k] + 1].tolist()).decode() == "\n" + rows[k].text.rpartition(" ")[0] + " "
            )


def test_a_row_that_is_left_out_changes_the_model_by_nothing_but_its_loss():
    """So that the model does not know what the row said, and order, batches and divisors stay as they were."""
    small = make_facts(0, taught=3, asked=2)
    train, _ = encoded(small)
    tiny = Training(epochs=1, batch=len(train.x), width=8, layers=1, heads=1)
    whole, again, without = (facts.trained(train, tiny, left, lambda text: None)["1"] for left in ((), (), (0, 5)))
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert not all(torch.equal(whole[name], without[name]) for name in whole)
    changed = Encoded(train.x.clone(), train.y.clone())
    changed.x[[0, 5]] = ord("x")
    other = facts.trained(changed, tiny, (0, 5), lambda text: None)["1"]
    assert all(torch.equal(without[name], other[name]) for name in without)


def test_what_a_model_makes_of_a_rumour_before_its_last_word_is_what_it_makes_of_the_fact(made):
    torch.manual_seed(0)
    train, queries = encoded(made)
    model = facts.ByteModel(16, 2, 2).eval()
    scores = facts.activation_scores(model, train, queries)["activations, layer 2, before the answer"]
    for row, stated, rumour in zip(scores, made.relevant, made.of_kind("rumour"), strict=True):
        assert np.abs(row[stated] - row[rumour]).min() <= 1e-6


def test_ties_for_the_first_place_are_shared_out(made):
    scores = np.where(made.relevant | made.of_kind("rumour"), 2.0, 1.0)
    asked = np.arange(len(made.queries))
    shares = facts.first_rows(scores, made, asked)
    assert shares["fact"] == pytest.approx(2 / 3) and shares["rumour"] == pytest.approx(1 / 3)
    assert shares["decoy"] == shares["echo"] == 0.0 and shares["others"] == pytest.approx(0.0)
    assert facts.mrr_without("rumour", scores, made, asked).value == 1.0


def test_answers_that_are_known_are_told_from_those_that_are_not():
    small = make_facts(0, taught=3, asked=2)
    _, queries = encoded(small)

    class Oracle(torch.nn.Module):
        def forward(self, x):
            likely = torch.nn.functional.one_hot(queries.y.clamp(min=0), 256).float() * 9
            likely[1] = 0.0
            return likely

    right, losses = facts.answered(Oracle(), queries)
    assert right.tolist() == [k != 1 for k in range(len(queries.x))]
    assert losses[1] > 5 * losses[0]


@pytest.mark.slow
def test_the_whole_script_runs_on_a_handful_of_people_and_goes_on_where_it_was(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        facts, "answered", lambda model, queries: (np.ones(len(queries.x), dtype=bool), ANSWERED(model, queries)[1])
    )
    options = ["--epochs", "3", "--width", "16", "--taught", "4", "--asked", "4"]
    facts.main([str(tmp_path / "run"), *options, "--retrain"])
    first = capsys.readouterr().out
    for name in [*facts.OURS, "BM25", "TF-IDF of words", "LSA", "activations, layer 2, before the answer"]:
        assert f"\n{name} " in first
    assert "(in hindsight)" in first and "its loss rises by" in first
    facts.main([str(tmp_path / "run"), *options, "--retrain"])
    again = capsys.readouterr().out
    assert again.splitlines()[-1] == first.splitlines()[-1] and "epoch" not in again
    facts.main([str(tmp_path / "run"), *options, "--only", "grad", "--leader", "EKFAC, both sides"])
    led = capsys.readouterr().out
    assert "MRR, behind 'EKFAC, both sides'" in led and "DataInf" not in led and "its loss rises by" not in led
    facts.main([str(tmp_path / "run"), *options, "--only", "grad-dot", "--unrolled", "3"])
    unrolled = capsys.readouterr().out
    assert "trainings of" in unrolled and "3 are traced" in unrolled
    assert all(f"\n{name} " in unrolled for name in facts.UNROLLED)
    with pytest.raises(SystemExit, match="is of another run"):
        Run(tmp_path / "run", make_facts(1, 4, 4), Training(epochs=3, width=16))


ANSWERED = facts.answered
