"""Scores are labelled and have a unit; the top k of each query are found tile by tile."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headwater.errors import InvalidInput, InvalidSetting, NotSaved, ShapeMismatch
from headwater.evaluate import Bank
from headwater.store.folder import read_folder, write_folder
from headwater.store.parts import PartStore
from headwater.store.plan import Sizes
from headwater.store.scores import Scores, TopKSink
from headwater.store.tiles import TileStore

VALUES = np.array([[3.0, -1.0, 2.0, 0.0, 2.0], [0.5, 0.5, -4.0, 9.0, -4.0]])
QUERIES, TRAIN = np.array([70, 71]), np.array([10, 20, 30, 40, 50])


def scores(**options):
    return Scores(VALUES, QUERIES, TRAIN, **options)


def test_scores_are_their_matrix():
    whole = scores()
    assert whole.shape == (2, 5)
    np.testing.assert_array_equal(np.asarray(whole), VALUES)
    np.testing.assert_array_equal(np.add(whole, 1), VALUES + 1)
    assert np.asarray(whole, dtype=np.float32).dtype == np.float32


def test_an_array_made_from_scores_is_a_copy_only_where_asked():
    whole = scores()
    assert np.shares_memory(np.asarray(whole), VALUES)
    assert not np.shares_memory(np.array(whole), VALUES)
    assert np.shares_memory(np.array(whole, copy=False), VALUES)
    with pytest.raises(ValueError, match="float32"):
        np.array(whole, dtype=np.float32, copy=False)


@pytest.mark.parametrize("queries, train", [(3, 5), (2, 4), (5, 2)])
def test_labels_of_another_number_are_refused(queries, train):
    with pytest.raises(ShapeMismatch, match=rf"\(2, 5\).*{queries}.*{train}"):
        Scores(VALUES, np.arange(queries), np.arange(train))


def test_shares_of_blocks_of_another_shape_are_refused():
    with pytest.raises(ShapeMismatch, match="'fc'"):
        scores(by_block={"fc": VALUES[:, 1:]})


def test_an_unknown_unit_is_refused():
    with pytest.raises(InvalidSetting, match=r"'logits'.*'influence'.*'removal'"):
        scores(unit="logits")


def test_scores_say_what_they_mean():
    assert "removed" in scores(unit="removal").unit_in_words
    shown = repr(scores(unit="removal", method="Direct()"))
    for word in ("2", "5", "removal", "Direct()"):
        assert word in shown


def test_a_labelled_data_set_has_the_numbers_the_names_the_unit_and_the_sign():
    by_block = {"fc": VALUES / 4, "head": VALUES * 3 / 4}
    data = scores(by_block=by_block, n_train=5.0, unit="removal", damping={"fc": 0.1, "head": 0.2}).to_xarray()
    np.testing.assert_array_equal(data["scores"].sel(query=71, train=[40, 10]), [9.0, 0.5])
    assert data["scores"].dims == ("query", "train")
    np.testing.assert_array_equal(data["block_scores"].sel(block="head", query=70, train=30), 1.5)
    np.testing.assert_array_equal(data["block_scores"].sum("block"), VALUES)
    assert data.attrs["unit"] == "removal"
    assert "positive" in data.attrs["sign"]
    assert data.attrs["damping"] == {"fc": 0.1, "head": 0.2}
    assert data.attrs["n_train"] == 5.0
    assert "block_scores" not in scores().to_xarray()


# Both ends of the ranking ---------------------------------------------------------------------------------------------


def test_top_is_the_most_helpful_and_the_most_harmful_and_ties_go_to_the_first():
    ends = scores().top(3)
    np.testing.assert_array_equal(ends.query_ids, QUERIES)
    np.testing.assert_array_equal(ends.helpful_ids, [[10, 30, 50], [40, 10, 20]])
    np.testing.assert_array_equal(ends.helpful_scores, [[3.0, 2.0, 2.0], [9.0, 0.5, 0.5]])
    np.testing.assert_array_equal(ends.harmful_ids, [[20, 40, 30], [30, 50, 10]])
    np.testing.assert_array_equal(ends.harmful_scores, [[-1.0, 0.0, 2.0], [-4.0, -4.0, 0.5]])


def test_five_of_each_end_are_enough_for_a_look():
    ends = Scores(np.arange(14.0).reshape(2, 7), QUERIES, np.arange(7)).top()
    np.testing.assert_array_equal(ends.helpful_ids, [[6, 5, 4, 3, 2]] * 2)


def test_more_than_there_are_gives_all():
    ends = scores().top(99)
    assert ends.helpful_ids.shape == ends.harmful_ids.shape == (2, 5)
    np.testing.assert_array_equal(ends.helpful_scores, -np.sort(-VALUES, axis=1))


@given(
    q=st.integers(1, 4),
    n=st.integers(1, 30),
    k=st.integers(1, 12),
    levels=st.integers(1, 8),
    cuts=st.lists(st.integers(0, 30), max_size=5),
    seed=st.integers(0, 1000),
)
def test_tiles_merged_are_the_whole_ties_and_empty_tiles_included(q, n, k, levels, cuts, seed):
    rng = np.random.default_rng(seed)
    values = rng.integers(-levels, levels + 1, size=(q, n)).astype(float)
    ids = rng.permutation(1000)[:n]
    sink = TopKSink(k, np.arange(q))
    for tile in np.split(np.arange(n), np.sort(np.minimum(cuts, n)).astype(int)):
        sink.add(values[:, tile], ids[tile])
    ends = sink.top()
    for sign, got_ids, got in (
        (-1, ends.helpful_ids, ends.helpful_scores),
        (1, ends.harmful_ids, ends.harmful_scores),
    ):
        for query in range(q):
            ranked = sorted(range(n), key=lambda row: (sign * values[query, row], row))[:k]
            assert [*got_ids[query]] == [*ids[ranked]]
            assert [*got[query]] == [*values[query, ranked]]


def test_ids_may_be_strings():
    sink = TopKSink(2, np.array(["q"]))
    sink.add(np.array([[1.0, 3.0]]), np.array(["a", "b"]))
    sink.add(np.array([[2.0]]), np.array(["a longer one"]))
    assert [*sink.top().helpful_ids[0]] == ["b", "a longer one"]


@pytest.mark.parametrize("shape, ids", [((2, 3), 1), ((2, 3), 4), ((1, 3), 3), ((3, 3), 3)])
def test_a_tile_that_does_not_fit_its_labels_is_refused(shape, ids):
    with pytest.raises(ShapeMismatch, match=rf"\({shape[0]}, {shape[1]}\)"):
        TopKSink(2, QUERIES).add(np.zeros(shape), np.arange(ids))


@pytest.mark.parametrize("k", [0, -1, 1.5, "3", None])
def test_a_k_that_counts_nothing_is_refused(k):
    with pytest.raises(InvalidSetting, match="at least 1"):
        scores().top(k)


def test_the_top_of_nothing_are_refused():
    with pytest.raises(InvalidInput, match="tile"):
        TopKSink(2, QUERIES).top()


def test_a_folder_of_another_kind_is_called_what_it_is(tmp_path):
    write_folder(tmp_path / "fit", {"rows": 3}, {"a": np.zeros(2)})
    scores().save(tmp_path / "scores")
    PartStore(tmp_path / "sums", {})
    TileStore(tmp_path / "run", {}, lambda: Sizes(3, 2))
    with pytest.raises(NotSaved, match=r"no scores at .*fit; it is a saved fit, which influence\.load"):
        Scores.open(tmp_path / "fit")
    with pytest.raises(NotSaved, match=r"no scores at .*sums; it holds a fit"):
        Scores.open(tmp_path / "sums")
    with pytest.raises(NotSaved, match=r"run in .* is not finished \(0 tiles are there\). Make the call that began it"):
        Scores.open(tmp_path / "run")
    with pytest.raises(NotSaved, match=r"no saved fit.*; it is saved scores, which hw\.Scores\.open"):
        read_folder(tmp_path / "scores")
    with pytest.raises(NotSaved, match=r"holds no bank.*; it is a saved fit"):
        Bank.open(tmp_path / "fit")
