"""What a user knows of the rows is found by the rows' ids, whatever it is given as."""

import numpy as np
import pandas as pd
import pytest

from headwater.errors import InvalidInput
from headwater.store.described import Described

IDS = np.array([2, 0, 1])
LABELS = ["no", "yes", "maybe"]


class DataSet:
    """As torch has them."""

    def __len__(self):
        return 3

    def __getitem__(self, k):
        return np.full((2, 2), k), k * 10


@pytest.mark.parametrize(
    "given",
    [
        pd.DataFrame({"label": LABELS}),
        {"label": LABELS},
        {"label": np.array(LABELS)},
        {name: {"label": label} for name, label in enumerate(LABELS)},
        [{"label": label} for label in LABELS],
        [(np.zeros(4), label) for label in LABELS],
        (np.zeros((3, 4)), np.array(LABELS)),
        lambda name: {"label": LABELS[name]},
    ],
    ids=["frame", "columns", "arrays", "by id", "dicts", "pairs", "arrays of pairs", "function"],
)
def test_a_column_of_labels_is_found_by_id_in_whatever_it_comes(given):
    assert Described.of(given, IDS, positions=True).columns()["label"].tolist() == ["maybe", "no", "yes"]


def test_a_frame_is_looked_up_by_its_index():
    frame = pd.DataFrame({"age": [30, 40, 50]}, index=["ann", "bob", "cy"])
    found = Described.of(frame, np.array(["cy", "ann"]))
    assert found.columns()["age"].tolist() == [50, 30]
    assert found.item(0) == {"age": 50}


def test_of_an_index_of_dates_the_words_are_ids():
    days = pd.date_range("2026-01-01", periods=3)
    frame = pd.DataFrame({"n": [1, 2, 3]}, index=days)
    ids = np.array([str(days[1]), str(days[0])])
    assert Described.of(frame, ids).columns()["n"].tolist() == [2, 1]


@pytest.mark.parametrize("ids", [np.array(["a", "b"]), np.array([1, 0]), np.array([5, 6])])
def test_of_rows_with_names_an_order_says_nothing(ids):
    """A shuffled loader would attach another row's label."""
    for given in (pd.DataFrame({"n": [1, 2]}), [1, 2], {"n": np.array([1, 2])}, np.zeros((2, 3))):
        with pytest.raises(InvalidInput, match=r"does not say which entry is which row's\. Give a DataFrame"):
            Described.of(given, ids)


def test_rows_that_are_not_there_are_said():
    with pytest.raises(InvalidInput, match="rows has 2 entries, and there is a row 2; rows are counted from 0"):
        Described.of([1, 2], np.arange(3), positions=True)


def test_a_data_set_of_dicts_is_looked_up_by_its_column_of_names():
    entries = [{"n": k, "uid": name, "tokens": [k]} for k, name in enumerate(["c", "a", "b"])]
    assert Described.of(entries, np.array(["a", "c"])).columns()["n"].tolist() == [1, 0]


def test_an_index_with_some_of_the_names_is_no_table_in_their_order():
    frame = pd.DataFrame({"n": [1, 2, 3]}, index=[3, 1, 2])
    with pytest.raises(InvalidInput, match=r"The index of rows has no 0: .*reset_index"):
        Described.of(frame, np.arange(3), positions=True)
    with pytest.raises(InvalidInput, match="'a' more than once"):
        Described.of(pd.DataFrame({"n": [1, 2]}, index=["a", "a"]), np.array(["a", "b"]))


def test_columns_side_by_side_are_found_together():
    """By the index of the one that has names; an array beside it goes row by row with it."""
    x, y = pd.DataFrame({"n": [10, 11, 12]}, index=[2, 0, 1]), np.array([10, 11, 12])
    for given in ((x, y), (y, x["n"])):
        for place in range(3):
            one, other = Described.of(given, np.arange(3), positions=True).item(place)
            assert (one["n"] if isinstance(one, dict) else one) == other == [11, 12, 10][place]
    found = Described.of({"a": x["n"], "b": y}, np.arange(3), positions=True).columns()
    assert found["a"].tolist() == found["b"].tolist() == [11, 12, 10]
    with pytest.raises(InvalidInput, match="columns of 2 and of 3 entries"):
        Described.of({"a": [1, 2], "b": [1, 2, 3]}, np.arange(3), positions=True)


def test_what_pandas_calls_missing_is_missing():
    frame = pd.DataFrame(
        {
            "word": pd.array(["a", None, "c"], dtype="string"),
            "count": pd.array([1, None, 3], dtype="Int64"),
            "flag": pd.array([True, None, False], dtype="boolean"),
        }
    )
    found = Described.of(frame, np.arange(3), positions=True).columns()
    assert found["word"].tolist() == ["a", "", "c"] and found["flag"].tolist() == ["True", "", "False"]
    np.testing.assert_array_equal(found["count"], [1, np.nan, 3])


def test_a_data_set_has_things_and_labels():
    found = Described.of(DataSet(), IDS, positions=True)
    thing, label = found.item(0)
    assert thing.tolist() == [[2, 2], [2, 2]] and label == 20
    assert {name: column.tolist() for name, column in found.columns().items()} == {"label": [20, 0, 10]}


def test_a_list_of_batches_is_read_row_by_row():
    batches = [(np.zeros((2, 4)), np.array([5, 6])), (np.ones((1, 4)), np.array([7]))]
    found = Described.of(batches, IDS, positions=True)
    assert found.columns()["label"].tolist() == [7, 5, 6]
    assert found.item(0)[0].tolist() == [1, 1, 1, 1]


def test_texts_are_a_column_of_their_own():
    assert Described.of(["a b", "c", "d"], IDS, positions=True).columns()["text"].tolist() == ["d", "a b", "c"]


def test_what_is_missing_is_nan_among_numbers_and_no_word_among_words():
    found = Described.of([{"n": 1}, {"s": "x"}, {"n": 2, "s": "y"}], np.arange(3), positions=True).columns()
    assert found["n"].tolist()[::2] == [1, 2] and np.isnan(found["n"][1])
    assert found["s"].tolist() == ["", "x", "y"]


def test_columns_that_hold_more_than_a_value_are_left_out():
    frame = pd.DataFrame({"image": [np.zeros(2), np.ones(2)], "label": [1, 2]})
    assert list(Described.of(frame, np.arange(2), positions=True).columns()) == ["label"]


def test_tensors_are_numbers():
    torch = pytest.importorskip("torch")
    data = torch.utils.data.TensorDataset(torch.zeros(3, 2), torch.tensor([4, 5, 6]))
    assert Described.of(data, IDS, positions=True).columns()["label"].tolist() == [6, 4, 5]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("rows.csv", "rows is one str"),
        (3, "rows is int; expected a DataFrame"),
        (iter([1]), "cannot be looked up"),
        ({"label": 3}, "no entry for row 2, and is no mapping of columns"),
        ((np.zeros((3, 1)), np.zeros(2)), "columns of 2 and of 3 entries"),
        (lambda name: 1 // 0, "failed for row 2: ZeroDivisionError"),
    ],
)
def test_what_does_not_describe_rows_is_said(given, said):
    with pytest.raises(InvalidInput, match=said):
        Described.of(given, IDS, positions=True).columns()
