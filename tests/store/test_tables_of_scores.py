"""Scores in hand: readable tables, frames, files and pictures, with what is known of the rows beside them."""

import numpy as np
import pandas as pd
import pytest

from headwater.errors import AlreadySaved, InvalidInput, InvalidSetting, NotWritten
from headwater.store import frames
from headwater.store.scores import Scores

VALUES = np.array([[3.0, -1.0, 2.0, 0.0], [0.5, 0.25, -4.0, 9.0]])
ROWS = pd.DataFrame(
    {"label": ["cat", "dog", "cat", "owl"], "age": [1, 2, 3, 4]}, index=pd.Index(["a", "b", "c", "d"], name="name")
)
QUERIES = pd.DataFrame({"said": ["cat", "owl"]})


def scores(**options):
    return Scores(VALUES, np.array([0, 1]), np.array(["a", "b", "c", "d"]), unit="removal", **options)


def attached():
    return scores().attach(rows=ROWS, queries=QUERIES)


def named(columns):
    return pd.DataFrame(columns, index=ROWS.index)


def test_the_top_is_a_table_that_names_query_rank_id_score_and_what_was_attached():
    lines = str(attached().top(1)).split("\n")
    assert lines[0].split() == ["query", "end", "rank", "id", "score", "label", "age", "query_said"]
    assert lines[1].split() == ["0", "helpful", "1", "a", "+3", "cat", "1", "cat"]
    assert lines[2].split() == ["0", "harmful", "1", "b", "-1", "dog", "2", "cat"]
    assert "predicted increase of the query's loss when the train row is removed" in lines[-1]


def test_of_many_queries_the_first_are_shown_and_the_others_counted():
    many = Scores(np.zeros((20, 3)), np.arange(20), np.arange(3))
    assert "and 15 more queries" in str(many.top(2)) and "and 15 more queries" in many.top(2)._repr_html_()
    assert len(many.top(2).to_pandas()) == 20 * 4


def test_the_table_of_the_top_is_a_frame():
    frame = attached().top(2).to_pandas()
    assert frame.query("query == 1 and end == 'harmful'")[["id", "score", "age"]].values.tolist() == [
        ["c", -4.0, 3],
        ["b", 0.25, 2],
    ]


def test_what_is_attached_to_a_top_is_what_is_attached_to_the_scores():
    pd.testing.assert_frame_equal(scores().top(2).attach(ROWS, QUERIES).to_pandas(), attached().top(2).to_pandas())


def test_numbers_that_are_no_positions_are_not_taken_for_them(tmp_path):
    """A top names a few of the rows: it must find the same entries as the scores do."""
    known = [f"row {k}" for k in range(4)]
    given = Scores(VALUES, np.array([0, 1]), np.array([1, 2, 3, 4]))
    for named in (given, given.top(1)):
        with pytest.raises(InvalidInput, match="does not say which entry is which row's"):
            named.attach(rows=known)
    plain = Scores(VALUES, np.array([0, 1]), np.arange(4))
    for found in (plain.top(1), plain.sel(train=[0, 3]).top(1)):
        assert found.attach(rows=known).helpful_columns["text"].tolist() == [["row 0"], ["row 3"]]


def test_what_was_attached_stays():
    top = scores().top(1).attach(rows=ROWS[["label"]]).attach(rows=ROWS[["age"]], queries=QUERIES)
    assert list(top.helpful_columns) == ["label", "age"] and list(top.query_columns) == ["said"]


def test_a_mask_is_no_id():
    with pytest.raises(InvalidInput, match="train is a mask"):
        scores().sel(train=np.array([True, False, True, False]))


def test_columns_of_any_name_are_saved(tmp_path):
    scores().attach(rows=named({"a/b": [1, 2, 3, 4], "..": [5, 6, 7, 8]})).save(tmp_path / "s.zarr")
    found = Scores.open(tmp_path / "s.zarr").train_columns
    assert {name: column.tolist() for name, column in found.items()} == {"a/b": [1, 2, 3, 4], "..": [5, 6, 7, 8]}


def test_rows_without_a_number_are_one_group():
    assert scores().group([1.0, np.nan, np.nan, 1.0]).values.tolist() == [[3.0, 1.0], [9.5, -3.75]]


def test_a_column_that_has_a_name_of_the_table_gets_another():
    frame = scores().attach(rows=named({"score": [1, 2, 3, 4]})).top(1).to_pandas()
    assert frame["score"].tolist()[0] == 3.0 and frame["score_"].tolist()[0] == 1


def test_text_cannot_steer_the_terminal_or_the_page():
    nasty = scores().attach(rows=named({"text": ["\x1b[31mred\u202e\n", "<b>&", "日本", "x" * 500]})).top(2)
    assert "\x1b" not in str(nasty) and "\\x1b[31mred\\u202e\\n" in str(nasty)
    assert "<b>" not in nasty._repr_html_() and "&lt;b&gt;&amp;" in nasty._repr_html_()
    assert max(map(len, str(nasty).split("\n"))) < 120


def test_wide_letters_are_counted_as_wide():
    from rich.cells import cell_len

    from headwater.tables import table

    lines = table([["日本", "1"], ["abcd", "2"]]).split("\n")
    assert cell_len(lines[0]) == cell_len(lines[1])


def test_wide_and_long_frames_have_the_same_numbers():
    wide, long = attached().to_pandas(), attached().to_pandas("long")
    assert wide.loc[1, "c"] == -4.0 and wide.shape == (2, 4)
    assert list(long.columns) == ["query", "train", "score", "train_label", "train_age", "query_said"]
    assert long.pivot(index="query", columns="train", values="score").values.tolist() == wide.values.tolist()
    with pytest.raises(InvalidSetting, match="'wide', 'long'"):
        scores().to_pandas("tall")


def test_files_have_all_pairs_and_say_what_the_numbers_are(tmp_path, monkeypatch):
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(frames, "PIECE", 5)  # written in several pieces
    attached().to_parquet(tmp_path / "s.parquet")
    attached().to_csv(tmp_path / "s.csv")
    want = attached().to_pandas("long")
    assert pd.read_parquet(tmp_path / "s.parquet").values.tolist() == want.values.tolist()
    assert pd.read_csv(tmp_path / "s.csv").values.tolist() == want.values.tolist()
    assert attached().to_arrow().equals(parquet.read_table(tmp_path / "s.parquet"))
    meaning = parquet.read_schema(tmp_path / "s.parquet").metadata
    assert b"removed" in meaning[b"headwater_unit_in_words"]


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    scores().to_csv(tmp_path / "s.csv")
    before = (tmp_path / "s.csv").read_bytes()

    def full(*given):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(frames, "_lines", full)
    with pytest.raises(NotWritten, match=r"s\.csv"):
        scores().to_csv(tmp_path / "s.csv")
    assert (tmp_path / "s.csv").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_columns_are_saved_with_the_scores(tmp_path):
    attached().save(tmp_path / "s.zarr")
    found = Scores.open(tmp_path / "s.zarr")
    assert found.train_columns["label"].tolist() == ["cat", "dog", "cat", "owl"]
    assert found.query_columns["said"].tolist() == ["cat", "owl"]
    with pytest.raises(AlreadySaved):
        found.save(tmp_path / "s.zarr")


def test_parts_keep_their_columns():
    part = attached().sel(query=[1], train=["d", "a"])
    assert part.train_columns["age"].tolist() == [4, 1] and part.query_columns["said"].tolist() == ["owl"]


def test_groups_sum_their_rows():
    by_label = attached().group("label")
    assert by_label.train_ids.tolist() == ["cat", "dog", "owl"]
    assert by_label.values.tolist() == [[5.0, -1.0, 0.0], [-3.5, 0.25, 9.0]]
    assert attached().group(["x", "x", "y", "y"], of="mean").values.tolist() == [[1.0, 1.0], [0.375, 2.5]]
    assert scores().group({"a": 1, "b": 1, "c": 2, "d": 2}).train_ids.tolist() == [1, 2]
    with pytest.raises(InvalidInput, match="no column 'colour' of train rows: there is 'label', 'age'"):
        attached().group("colour")


def test_a_series_of_groups_goes_by_its_index():
    assert scores().group(ROWS["label"][::-1]).values.tolist() == scores().group({**ROWS["label"]}).values.tolist()
    with pytest.raises(InvalidInput, match="expected one, a Series"):
        scores().group(ROWS)


def test_queries_as_one():
    assert scores().sum().values.tolist() == [[3.5, -0.75, -2.0, 9.0]]
    assert scores().mean([1]).values.tolist() == VALUES[1:].tolist()
    assert attached().sum().top(1).helpful_columns["label"].tolist() == [["owl"]]


def test_a_summary_has_the_plain_numbers():
    found = scores().describe()
    assert (found.mean, found.min, found.max) == (VALUES.mean(), -4.0, 9.0)
    assert found.std == pytest.approx(VALUES.std())
    assert (found.helpful, found.strongest, found.half) == (5 / 8, "d", 0.5)
    assert "has 50.0% of the rows" in str(found)


def test_pictures_show_the_numbers():
    pytest.importorskip("matplotlib")
    bars = attached().plot_top(1, k=1)
    assert [bar.get_width() for bar in bars.patches] == [-4.0, 9.0]
    assert [label.get_text() for label in bars.get_yticklabels()] == ["c", "d"]
    assert sum(bar.get_height() for bar in attached().plot_distribution(bins=7).patches) == VALUES.size
    line = attached().plot_concentration().lines[0].get_ydata()
    assert line[1] == pytest.approx(9 / np.abs(VALUES).sum()) and line[-1] == 1
    assert bars.figure is attached().plot_top(0, ax=bars).figure


def test_scores_of_changed_inputs_have_no_rows_to_rank():
    changed = Scores(np.zeros((1, 2, 3)), np.arange(1), np.arange(2), mode="perturbation")
    for verb in (changed.describe, changed.to_pandas, changed.to_arrow, changed.sum, changed.plot_concentration):
        with pytest.raises(InvalidSetting, match="changed inputs"):
            verb()
    assert "perturbation" in changed._repr_html_() or "changed" in changed._repr_html_() or changed._repr_html_()
