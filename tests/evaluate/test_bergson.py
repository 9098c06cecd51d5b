"""Banks and scores of bergson: read as they were written, and what is missing, twice or damaged is named."""

import csv
import json

import numpy as np
import pytest

from headwater.errors import (
    AlreadySaved,
    HeadwaterError,
    InvalidInput,
    InvalidSetting,
    NonFiniteValue,
    NotSaved,
    ShapeMismatch,
)
from headwater.evaluate import lds
from headwater.evaluate.bergson import read_bank, read_scores, write_scores

ROWS, SUBSETS, QUERIES = 12, 9, 3
RNG = np.random.default_rng(0)
SCORES = RNG.normal(size=(QUERIES, ROWS))
LEFT_OUT = [sorted(RNG.choice(ROWS, 3, replace=False).tolist()) for _ in range(SUBSETS)]
BASE = np.array([1.0, 2.0, 3.0])
KEEP = np.array([[row not in left for row in range(ROWS)] for left in LEFT_OUT])
LOSSES = BASE + ~KEEP @ SCORES.T
"""What retraining gives where scores are true: the sum over what was left out."""


def write_csv(file, columns, lines):
    with file.open("w", newline="") as opened:
        csv.writer(opened).writerows([columns, *lines])


def validation(losses=LOSSES, subsets=range(SUBSETS)):
    return [(m, q, BASE[q] - losses[m, q], 0.5) for m in subsets for q in range(QUERIES)]


@pytest.fixture
def bergson(tmp_path):
    """A folder of bergson's."""
    return made(tmp_path / "bergson")


def made(folder, losses=LOSSES):
    folder.mkdir()
    (folder / "subsets.json").write_text(json.dumps(LEFT_OUT))
    write_csv(folder / "validation.csv", ("subset", "query", "diff", "score_sum"), validation(losses))
    summary = [(q, 0.9, 0.0, 0.9, 0.0, SUBSETS, BASE[q]) for q in range(QUERIES)]
    columns = ("query", "spearman_corr", "spearman_p", "pearson_corr", "pearson_p", "N", "baseline_loss")
    write_csv(folder / "summary.csv", columns, summary)
    return folder


def test_a_bank_is_read_with_its_losses_and_its_signs(bergson, tmp_path):
    bank = read_bank(bergson, tmp_path / "bank", rows=ROWS)
    np.testing.assert_array_equal(bank.keep, KEEP)
    np.testing.assert_allclose(bank.outputs[:, 0], LOSSES, rtol=0, atol=1e-14)
    assert {**bank.recipe, "digest": ""} == {"bank": "bergson", "output": "loss", "digest": ""}
    assert bank.plan.seeds.tolist() == [[42]] * SUBSETS
    assert lds(SCORES, *bank).raw.value == pytest.approx(1.0)
    again = read_bank(bergson, tmp_path / "bank", rows=ROWS)
    np.testing.assert_array_equal(again.outputs, bank.outputs)


def test_another_bank_of_the_same_subsets_is_not_taken_for_the_one_that_is_there(bergson, tmp_path):
    read_bank(bergson, tmp_path / "bank", rows=ROWS)
    with pytest.raises(HeadwaterError, match="digest"):
        read_bank(made(tmp_path / "other", 2 * LOSSES), tmp_path / "bank", rows=ROWS)


def test_scores_that_float32_does_not_hold_are_refused_both_ways(tmp_path):
    with pytest.raises(NonFiniteValue, match="1e\\+39"):
        write_scores(tmp_path / "scores", [[1.0, 1e39]])
    assert not (tmp_path / "scores").exists()
    write_scores(tmp_path / "scores", [[1.0, 2.0]])
    file = tmp_path / "scores" / "scores.bin"
    content = bytearray(file.read_bytes())
    content[8:12] = np.float32(np.inf).tobytes()
    file.write_bytes(content)
    with pytest.raises(InvalidInput, match="row 1 for query 0 is inf"):
        read_scores(tmp_path / "scores", helps=False)


@pytest.mark.parametrize("itemsize", [None, 3])
def test_a_layout_without_a_size_or_with_too_small_a_one_is_named(tmp_path, itemsize):
    write_scores(tmp_path / "scores", [[1.0, 2.0]])
    file = tmp_path / "scores" / "info.json"
    info = json.loads(file.read_text())
    del info["dtype"]["itemsize"]
    if itemsize is not None:
        info["dtype"]["itemsize"] = itemsize
    file.write_text(json.dumps(info))
    with pytest.raises(InvalidInput, match="does not say how a row's scores lie"):
        read_scores(tmp_path / "scores", helps=False)


def test_without_a_summary_losses_are_known_but_for_a_constant(bergson, tmp_path):
    (bergson / "summary.csv").unlink()
    bank = read_bank(bergson, tmp_path / "bank", rows=ROWS)
    np.testing.assert_allclose(bank.outputs[:, 0], LOSSES - BASE, atol=1e-14)
    assert bank.recipe["output"] != "loss"
    assert lds(SCORES, *bank).raw.value == pytest.approx(1.0)


def test_another_seed_is_another_run_of_the_same_subsets(bergson, tmp_path):
    noisy = LOSSES + np.random.default_rng(1).normal(size=LOSSES.shape)
    other = made(tmp_path / "seed43", noisy)
    bank = read_bank({42: bergson, 43: other}, tmp_path / "bank", rows=ROWS)
    np.testing.assert_allclose(bank.outputs[:, 1], noisy, rtol=0, atol=1e-14)
    found = lds(SCORES, *bank)
    assert found.runs == 2 and 0 < found.ceiling < 1
    (other / "subsets.json").write_text(json.dumps(LEFT_OUT[::-1]))
    with pytest.raises(InvalidInput, match=r"seed43 and .* leave out other subsets"):
        read_bank({42: bergson, 43: other}, tmp_path / "other", rows=ROWS)


def test_parts_that_processes_wrote_are_joined(bergson, tmp_path):
    (bergson / "validation.csv").unlink()
    columns = ("subset", "query", "diff", "score_sum")
    write_csv(bergson / "validation_0_4.csv", columns, validation(subsets=range(4)))
    with pytest.raises(InvalidInput, match="lacks 15 of 27 measurements, the first of subset 4, query 0"):
        read_bank(bergson, tmp_path / "part", rows=ROWS)
    write_csv(bergson / "validation_4_9.csv", columns, validation(subsets=range(4, 9)))
    bank = read_bank(bergson, tmp_path / "bank", rows=ROWS)
    np.testing.assert_allclose(bank.outputs[:, 0], LOSSES, rtol=0, atol=1e-14)


def test_a_bank_of_one_query_has_no_column_for_it(bergson, tmp_path):
    write_csv(bergson / "validation.csv", ("subset", "diff", "score_sum"), [(m, 0.1 * m, 0) for m in range(SUBSETS)])
    write_csv(bergson / "summary.csv", ("N", "baseline_loss"), [(SUBSETS, 2.0)])
    bank = read_bank(bergson, tmp_path / "bank", rows=ROWS)
    np.testing.assert_allclose(bank.outputs[:, 0, 0], 2.0 - 0.1 * np.arange(SUBSETS))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("subset,query\n0,0\n", r"has the columns .*; expected subset, diff"),
        ("subset,query,diff,score_sum\n0,0,0.5,1\n0,0,0.5,1\n", "line 3: subset 0, query 0 is there twice"),
        ("subset,query,diff,score_sum\n0,0,nan,1\n", "line 2: diff is 'nan'; expected a finite number"),
        ("subset,query,diff,score_sum\n0,-1,0.5,1\n", "line 2: query is '-1'; expected a whole number"),
        ("subset,query,diff,score_sum\n9,0,0.5,1\n", "line 2: subset 9 is not among the 9"),
        ("subset,query,diff,score_sum\n0,0\n", "line 2: expected 4 values"),
        ("subset,query,diff,score_sum\n", "no line but its head"),
        ("subset,query,diff,score_sum\n0,0,0.5,1\n", "lacks 8 of 9 measurements, the first of subset 1, query 0"),
    ],
)
def test_measurements_that_are_wrong_are_named(bergson, tmp_path, text, said):
    (bergson / "validation.csv").write_text(text)
    with pytest.raises(InvalidInput, match=said):
        read_bank(bergson, tmp_path / "bank", rows=ROWS)
    assert not (tmp_path / "bank").exists()


@pytest.mark.parametrize(
    ("subsets", "said"),
    [
        ("[[0, 1], [1, 1]]", "subset 1 names a row twice"),
        ("[[0, 1], [1, 0]]", "subsets 0 and 1 leave out the same rows"),
        ("[[0, 12]]", "subset 0 leaves out row 12; there are 12 rows"),
        ("[[-1]]", "subset 0 leaves out row -1"),
        ("[[]]", r"subset 0 is \[\]"),
        ("[[0.5]]", r"subset 0 is \[0.5\]"),
        ("{}", "expected a list of subsets"),
        ("[[0", "is no JSON"),
    ],
)
def test_subsets_that_are_wrong_are_named(bergson, tmp_path, subsets, said):
    (bergson / "subsets.json").write_text(subsets)
    with pytest.raises(InvalidInput, match=said):
        read_bank(bergson, tmp_path / "bank", rows=ROWS)


def test_a_summary_of_other_queries_is_refused(bergson, tmp_path):
    write_csv(bergson / "summary.csv", ("query", "baseline_loss"), [(0, 1.0), (1, 1.0)])
    with pytest.raises(InvalidInput, match="lacks query 2 of 3"):
        read_bank(bergson, tmp_path / "bank", rows=ROWS)
    write_csv(bergson / "summary.csv", ("query", "baseline_loss"), [(0, 1.0), (0, 1.0)])
    with pytest.raises(InvalidInput, match="query 0 is there twice"):
        read_bank(bergson, tmp_path / "bank", rows=ROWS)


def test_what_is_not_there_is_said(bergson, tmp_path):
    (bergson / "validation.csv").unlink()
    with pytest.raises(NotSaved, match=r"no validation\.csv"):
        read_bank(bergson, tmp_path / "bank", rows=ROWS)
    with pytest.raises(NotSaved, match=r"no subsets\.json"):
        read_bank(tmp_path / "nowhere", tmp_path / "bank", rows=ROWS)
    with pytest.raises(InvalidInput, match="no folder to read"):
        read_bank({}, tmp_path / "bank", rows=ROWS)
    with pytest.raises(InvalidSetting, match="rows"):
        read_bank(bergson, tmp_path / "bank", rows=0)


def test_scores_come_back_as_they_were_written(tmp_path):
    write_scores(tmp_path / "scores", SCORES)
    np.testing.assert_allclose(read_scores(tmp_path / "scores", helps=False), SCORES, rtol=1e-6)
    np.testing.assert_allclose(read_scores(tmp_path / "scores", helps=True), -SCORES, rtol=1e-6)
    with pytest.raises(AlreadySaved):
        write_scores(tmp_path / "scores", SCORES)


def test_the_record_of_a_row_is_that_of_its_writer(tmp_path):
    """Score and flag of a query take eight bytes, and the file is read by the layout beside it."""
    write_scores(tmp_path / "scores", SCORES)
    info = json.loads((tmp_path / "scores" / "info.json").read_text())
    assert info["num_items"] == ROWS and info["num_scores"] == QUERIES
    assert info["dtype"]["offsets"] == [0, 4, 8, 12, 16, 20] and info["dtype"]["itemsize"] == 24
    raw = np.memmap(tmp_path / "scores" / "scores.bin", dtype=np.dtype(info["dtype"]), mode="r")
    np.testing.assert_array_equal(raw["score_1"], (-SCORES[1]).astype(np.float32))
    assert raw["written_2"].all()


def test_scores_of_another_layout_or_cut_short_are_refused(tmp_path):
    folder = tmp_path / "scores"
    write_scores(folder, SCORES)
    info, content = json.loads((folder / "info.json").read_text()), (folder / "scores.bin").read_bytes()
    (folder / "scores.bin").write_bytes(content[:-1])
    with pytest.raises(InvalidInput, match="has 287 bytes; 12 rows take 288"):
        read_scores(folder, helps=True)
    (folder / "scores.bin").write_bytes(content[:-4] + b"\0" * 4)
    with pytest.raises(InvalidInput, match="row 11 for query 2 was not written"):
        read_scores(folder, helps=True)
    for changed, said in (
        ({"attribute_tokens": True, "dtype": "float32"}, "not of bergson's layout"),
        (info | {"dtype": info["dtype"] | {"formats": ["object", "bool"] * QUERIES}}, r"has scores of \['object'\]"),
    ):
        (folder / "info.json").write_text(json.dumps(changed))
        with pytest.raises(InvalidInput, match=said):
            read_scores(folder, helps=True)
    (folder / "info.json").write_text(json.dumps(info))
    (folder / "scores.bin").unlink()
    with pytest.raises(NotSaved, match=r"no scores\.bin"):
        read_scores(folder, helps=True)


def test_scores_that_are_no_matrix_are_refused(tmp_path):
    with pytest.raises(ShapeMismatch):
        write_scores(tmp_path / "scores", SCORES[0])
