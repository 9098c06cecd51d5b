"""Claims about an index of kept gradients: a flat one is the scan, others are exact in what they find."""

from __future__ import annotations

import numpy as np
import pytest
from test_kept import PLAIN, QUERIES, TRAIN, influence, small_tiles  # noqa: F401

import headwater as hw
from headwater.errors import AlreadySaved, DamagedFile, InvalidInput, InvalidSetting
from headwater.run.index import KeptIndex

pytest.importorskip("faiss")
pytestmark = pytest.mark.filterwarnings("ignore:.*[Ss]wig.*:DeprecationWarning")


@pytest.mark.parametrize(
    "method", [hw.Ekfac(), hw.LoGra(dimension=2), hw.LoRif(dimension=3)], ids=lambda m: type(m).__name__
)
def test_a_flat_index_is_the_scan(method, tmp_path):
    fitted = influence(method).fit(TRAIN)
    kept = fitted.gradients(TRAIN, store=tmp_path / "kept")
    kept.delete([2, 17, 30])
    index = kept.index(fitted, tmp_path / "index")
    truth = fitted.top(kept, QUERIES, 4, unit="removal")
    for found in (index, KeptIndex(tmp_path / "index", hw.KeptGradients.open(tmp_path / "kept"))):
        ends = found.top(fitted, QUERIES, 4, candidates=4, unit="removal")
        np.testing.assert_array_equal(ends.helpful_ids, truth.helpful_ids)
        np.testing.assert_array_equal(ends.harmful_ids, truth.harmful_ids)
        np.testing.assert_allclose(ends.helpful_scores, truth.helpful_scores, rtol=1e-5)
    assert len(index) == 37


def test_other_kinds_give_exact_scores_of_what_they_find(tmp_path):
    fitted = influence(hw.LoGra(dimension=2)).fit(PLAIN)
    kept = fitted.gradients(PLAIN, store=tmp_path / "kept")
    scores = fitted.attribute(kept, QUERIES).values
    ends = kept.index(fitted, tmp_path / "graph", factory="HNSW8").top(fitted, QUERIES, 3)
    for query in range(len(scores)):
        np.testing.assert_allclose(ends.helpful_scores[query], scores[query, ends.helpful_ids[query]], rtol=1e-4)


def test_an_index_of_another_fit_or_an_older_store_is_refused(tmp_path):
    fitted = influence(hw.Kfac()).fit(PLAIN)
    kept = fitted.gradients(PLAIN, store=tmp_path / "kept")
    index = kept.index(fitted, tmp_path / "index")
    with pytest.raises(InvalidInput, match="damping was"):
        index.top(fitted.with_damping(hw.relative(1.0)), QUERIES, 3)
    with pytest.raises(AlreadySaved):
        kept.index(fitted, tmp_path / "index")
    with pytest.raises(InvalidSetting, match="'Round'"):
        kept.index(fitted, tmp_path / "round", factory="Round")
    assert not (tmp_path / "round").exists()
    kept.delete([3])
    with pytest.raises(InvalidInput, match="changed since"):
        index.top(fitted, QUERIES, 3)
    file = tmp_path / "index" / "vectors.faiss"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(DamagedFile, match=r"vectors\.faiss"):
        KeptIndex(tmp_path / "index", kept)
