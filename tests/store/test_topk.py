"""Both ends of rankings, by threshold and survivors, are those of sorting everything; groups are sums of their rows."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headwater.errors import InvalidInput, InvalidSetting
from headwater.store.base import Tile
from headwater.store.topk import GroupSink, TopKSink


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
