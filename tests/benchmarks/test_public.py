"""Our rows on a made-up bank of bergson's: a tiny GPT-2, and losses that follow dot products of gradients."""

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, logging

from headwater.evaluate.bergson import read_scores

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "leaderboard"))
import public

sys.path.pop(0)
logging.set_verbosity_error()

ROWS, QUERIES, SUBSETS = 14, 3, 12


def gradients(model, rows, names):
    """Of each row's mean token loss, [n, d], for the layers' parameters."""
    wanted = [p for name, p in model.named_parameters() if name.rpartition(".")[0] in names]
    found = []
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        found.append(torch.cat([g.flatten() for g in torch.autograd.grad(model(ids, labels=ids).loss, wanted)]))
    return torch.stack(found).double().numpy()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder with a bank, the files of rows, and what the dot products are: [q, n]."""
    folder = tmp_path_factory.mktemp("public")
    torch.manual_seed(0)
    size = {"vocab_size": 19, "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(**size, bos_token_id=0, eos_token_id=0)).eval()
    rng = np.random.default_rng(0)
    rows = [{"input_ids": rng.integers(1, 19, 8).tolist()} for _ in range(ROWS + QUERIES)]
    for name, part in (("train", rows[:ROWS]), ("query", rows[ROWS:])):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)) + "\n")
    names = public.layers(model)
    assert sorted(name.rpartition(".")[2] for name in names) == ["c_attn", "c_fc", "c_proj", "c_proj"]
    truth = gradients(model, rows[ROWS:], names) @ gradients(model, rows[:ROWS], names).T
    bank = folder / "bank"
    model.save_pretrained(bank / "retrained" / "base")
    left_out = [sorted(rng.choice(ROWS, 4, replace=False).tolist()) for _ in range(SUBSETS)]
    (bank / "subsets.json").write_text(json.dumps(left_out))
    with (bank / "validation.csv").open("w", newline="") as opened:
        lines = [
            (m, q, -truth[q, left].sum(), 0.0)  # the loss rises by what was left out: the difference falls
            for m, left in enumerate(left_out)
            for q in range(QUERIES)
        ]
        csv.writer(opened).writerows([("subset", "query", "diff", "score_sum"), *lines])
    return folder, truth


def test_the_method_that_the_bank_follows_has_an_lds_of_one_and_its_scores_are_written(made, capsys, monkeypatch):
    folder, truth = made
    monkeypatch.setattr(public, "RESAMPLES", 20)
    rows = [str(folder / name) for name in ("bank", "train.jsonl", "query.jsonl")]
    options = ["--out", str(folder / "out"), "--only", "grad-dot", "--batch", "5"]
    for _ in range(2):  # the second goes on where the first ended
        public.main([*rows, *options])
        text = capsys.readouterr().out
        assert "MAGIC (published)" in text and "grad-cos" not in text
        line = next(line for line in text.splitlines() if "headwater, grad-dot" in line)
        assert "1.000 (1.000 to 1.000)" in line
    written = read_scores(folder / "out" / "grad-dot" / "scores", helps=False)
    np.testing.assert_allclose(written, truth, rtol=0, atol=1e-5 * np.abs(truth).max())


@pytest.mark.slow
def test_every_method_has_a_row_also_for_another_seed(made, capsys):
    folder, _ = made
    rows = [str(folder / name) for name in ("bank", "train.jsonl", "query.jsonl")]
    public.main([*rows, "--out", str(folder / "all"), "--other-seed", f"43={folder / 'bank'}"])
    text = capsys.readouterr().out
    assert all(f"headwater, {name} " in text for name in public.METHODS)


def test_rows_that_are_not_the_banks_are_refused(made):
    folder, _ = made
    bank, train, query = folder / "bank", folder / "train.jsonl", folder / "query.jsonl"
    with pytest.raises(SystemExit, match="There are 14 queries and 14 rows; the bank has 3, 14"):
        public.main([str(bank), str(train), str(train), "--out", str(folder / "other")])
    wrong = folder / "wrong.jsonl"
    wrong.write_text('{"input_ids": [1, 2]}\n{"text": "no tokens"}\n')
    with pytest.raises(SystemExit, match=r"wrong\.jsonl, line 2: expected"):
        public.main([str(bank), str(wrong), str(query), "--out", str(folder / "other")])
    with pytest.raises(SystemExit, match="expected SEED=FOLDER"):
        public.main([str(bank), str(train), str(query), "--other-seed", "folder"])
