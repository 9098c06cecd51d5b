"""Both ends of rankings, by threshold and survivors, are those of sorting everything; groups are sums of their rows."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headwater.errors import InvalidInput, InvalidSetting
from headwater.store.base import Tile
from headwater.store.ends import GroupSink, TopKSink


class Sorting:
    """The slow truth: everything that was seen is sorted, stably, each time."""

    def __init__(self, k):
        self.k, self.ends = k, None

    def add(self, scores, ids):
        ids = np.broadcast_to(ids, scores.shape)
        self.ends = [
            self._best(np.concatenate([kept, scores], axis=1), np.concatenate([names, ids], axis=1), sign)
            for (kept, names), sign in zip(self.ends or [(scores[:, :0], ids[:, :0])] * 2, (-1, 1), strict=True)
        ]

    def _best(self, scores, ids, sign):
        order = np.argsort(sign * scores, axis=1, kind="stable")[:, : self.k]
        return np.take_along_axis(scores, order, axis=1), np.take_along_axis(ids, order, axis=1)


@given(
    q=st.integers(1, 5),
    sizes=st.lists(st.integers(0, 60), min_size=1, max_size=6),
    k=st.integers(1, 12),
    levels=st.sampled_from([0, 1, 3, 50, 10_000]),
    odd=st.sampled_from([None, np.nan, np.inf, -np.inf, -0.0]),
    order=st.sampled_from(["random", "rising", "falling"]),
    dtype=st.sampled_from([np.float32, np.float64]),
    seed=st.integers(0, 1000),
)
def test_survivors_of_a_threshold_are_the_best_of_all(q, sizes, k, levels, odd, order, dtype, seed):
    rng = np.random.default_rng(seed)
    values = rng.integers(-levels, levels + 1, size=(q, sum(sizes))).astype(dtype)
    if order != "random":
        values = np.sort(values, axis=1)[:, :: -1 if order == "falling" else 1]
    if odd is not None:
        values = np.where(rng.random(values.shape) < 0.05, dtype(odd), values)
    fast, slow, start = TopKSink(k, np.arange(q)), Sorting(k), 0
    for size in sizes:
        tile, ids = values[:, start : start + size], np.arange(start, start + size)
        fast.add(tile, ids)
        slow.add(tile, ids)
        start += size
    found = fast.top()
    (helpful, helpful_ids), (harmful, harmful_ids) = slow.ends
    np.testing.assert_array_equal(found.helpful_ids, helpful_ids)
    np.testing.assert_array_equal(found.helpful_scores, helpful)
    np.testing.assert_array_equal(found.harmful_ids, harmful_ids)
    np.testing.assert_array_equal(found.harmful_scores, harmful)
    assert found.helpful_scores.dtype == dtype


@pytest.mark.parametrize("of", ["sum", "mean"])
@pytest.mark.parametrize("by_name", [False, True], ids=["labels", "mapping"])
def test_groups_are_ranked_by_what_their_rows_add_up_to(of, by_name):
    rng = np.random.default_rng(0)
    values, labels = rng.standard_normal((3, 40)), np.array([f"source {n}" for n in rng.integers(0, 9, 40)])
    ids = rng.permutation(1000)[:40]
    sink = GroupSink(4, np.arange(3), dict(zip(ids.tolist(), labels.tolist(), strict=True)) if by_name else labels, of)
    for rows in (slice(0, 11), slice(11, 12), slice(12, 40)):
        sink.write(Tile(rows.start, ids[rows], None, np.stack([values[:, rows] / 4, values[:, rows] * 0.75])))
    names = np.unique(labels)
    sums = np.stack([getattr(values[:, labels == name], of)(axis=1) for name in names], axis=1)
    order = np.argsort(-sums, axis=1)[:, :4]
    np.testing.assert_array_equal(sink.top().helpful_ids, names[order])
    np.testing.assert_allclose(sink.top().helpful_scores, np.take_along_axis(sums, order, axis=1))
    np.testing.assert_array_equal(sink.top().harmful_ids, names[np.argsort(sums, axis=1)[:, :4]])


def test_groups_that_do_not_fit_the_rows_are_refused():
    tile = Tile(0, np.arange(3), None, np.ones((1, 2, 3)))
    with pytest.raises(InvalidInput, match=r"2 labels.*at least 3"):
        GroupSink(1, np.arange(2), [0, 1]).write(tile)
    sink = GroupSink(1, np.arange(2), [0, 1, 1, 2])
    sink.write(tile)
    with pytest.raises(InvalidInput, match=r"4 labels.*3 train rows"):
        sink.top()
    with pytest.raises(InvalidInput, match="no label for train row 1"):
        GroupSink(1, np.arange(2), {0: "a", 2: "b"}).write(tile)
    with pytest.raises(InvalidSetting, match="'most'"):
        GroupSink(1, np.arange(2), [0], of="most")
    with pytest.raises(InvalidInput, match="no tile"):
        GroupSink(1, np.arange(2), [0]).top()


def test_memory_grows_with_the_groups_and_not_with_the_tiles():
    labels = ["a", "b"] * 100
    labels[51] = "late"
    sink = GroupSink(3, np.arange(2), labels)
    for start in range(0, 200, 10):
        sink.write(Tile(start, np.arange(start, start + 10), None, np.ones((1, 2, 10))))
    assert sink._sums.shape[1] <= 4
    assert sink.top().helpful_ids[0].tolist() == ["a", "b", "late"]


KINDS = [(1, "x"), (1, "y"), None, 1, "1"]


@pytest.mark.parametrize("by_name", [False, True], ids=["labels", "mapping"])
def test_labels_may_be_tuples_none_and_mixed(by_name):
    labels = [*KINDS, *KINDS[::-1]]
    sink = GroupSink(5, np.arange(1), dict(enumerate(labels)) if by_name else labels)
    for rows in (slice(0, 3), slice(3, 10)):
        ids = np.arange(10)[rows]
        sink.write(Tile(rows.start, ids, None, np.array([1.0, 2, 4, 8, 16, 160, 80, 40, 20, 10])[None, None, rows]))
    assert dict(zip(sink.top().helpful_ids[0], sink.top().helpful_scores[0], strict=True)) == {
        "1": 176,
        1: 88,
        None: 44,
        (1, "y"): 22,
        (1, "x"): 11,
    }


def test_labels_that_are_all_tuples_are_names():
    sink = GroupSink(2, np.arange(1), [(1, "x"), (2, "y")])
    sink.write(Tile(0, np.arange(2), None, np.array([[[1.0, 2.0]]])))
    assert sink.top().helpful_ids[0].tolist() == [(2, "y"), (1, "x")]


def test_labels_that_cannot_be_looked_up_are_refused():
    tile = Tile(0, np.arange(2), None, np.ones((1, 1, 2)))
    with pytest.raises(InvalidInput, match=r"label \['a'\]"):
        GroupSink(1, np.arange(1), {0: "b", 1: ["a"]}).write(tile)
    with pytest.raises(InvalidInput, match="one label for each"):
        GroupSink(1, np.arange(1), np.ones((2, 2)))
