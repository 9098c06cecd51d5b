"""Claims about queries without labels: `explain="prediction"` needs none, in every framework and on every page."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

import headwater as hw
from headwater.cli import main
from headwater.errors import InvalidInput

ROWS, QUERIES = 24, 5


def numbers():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(ROWS + QUERIES, 3)).astype(np.float32)
    return x[:ROWS], (x[:ROWS, 0] > 0).astype(np.int64) + (x[:ROWS, 1] > 1), x[ROWS:]


def of_torch():
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    x, y, q = (torch.as_tensor(part) for part in numbers())
    model = torch.nn.Linear(3, 3)
    influence = hw.Influence(model, torch.nn.CrossEntropyLoss(), method=hw.Direct(), damping=0.1)
    return influence, (x, y), q, model(q).argmax(1)


def of_jax():
    jax = pytest.importorskip("jax")
    x, y, q = (jax.numpy.asarray(part) for part in numbers())
    w = jax.random.normal(jax.random.PRNGKey(0), (3, 3))
    model = (lambda p, x: x @ p["w"], {"w": w})
    influence = hw.Influence(model, "cross_entropy", method=hw.Direct(), damping=0.1)
    return influence, (x, y), q, (q @ w).argmax(1)


def of_sklearn():
    sklearn = pytest.importorskip("sklearn.linear_model")
    x, y, q = numbers()
    words = np.array(["no", "maybe", "yes"])[y]
    model = sklearn.LogisticRegression().fit(x, words)
    return hw.Influence(model), (x, words), q, model.predict(q)


@pytest.mark.parametrize("make", [of_torch, of_jax, of_sklearn])
def test_a_query_without_a_label_is_explained_as_one_with_any(make):
    influence, train, q, said = make()
    influence.fit(train)
    expected = influence.attribute(train, (q, said), explain="prediction")
    np.testing.assert_allclose(expected.values, influence.attribute(train, (q, said)).values, rtol=1e-5, atol=1e-6)
    for query in (q, (q, None), [(q[:2], None), (q[2:], None)], [q[:2], q[2:]]):
        found = influence.attribute(train, query, explain="prediction")
        np.testing.assert_allclose(found.values, expected.values, rtol=1e-4, atol=1e-5)
        top = influence.top(train, query, 2, explain="prediction")
        assert np.array_equal(top.helpful_ids, expected.top(2).helpful_ids)
    removed = influence.removal(train, q, [[0, 1]], explain="prediction")
    again = influence.removal(train, (q, said), [[0, 1]], explain="prediction")
    np.testing.assert_allclose(removed, again, rtol=1e-4, atol=1e-6)
    with pytest.raises(InvalidInput):
        influence.attribute(train, q)


def test_batches_and_frames_without_labels_keep_their_ids():
    pandas = pytest.importorskip("pandas")
    from headwater.torch import TorchBatch

    influence, train, q, _ = of_torch()
    influence.fit(train)
    names = [f"q{k}" for k in range(QUERIES)]
    for query in ([TorchBatch(q, None, ids=np.array(names))], pandas.DataFrame(q.numpy(), index=names)):
        assert influence.attribute(train, query, explain="prediction").query_ids.tolist() == names
    with pytest.raises(InvalidInput, match="no targets with explain='prediction'"):
        influence.attribute(train, [TorchBatch(q, None)])


@pytest.mark.parametrize("make", [of_torch, of_sklearn])
def test_a_page_of_them_shows_what_was_said_and_no_label(make, tmp_path):
    influence, train, q, said = make()
    page = influence.fit(train).report(train, q, tmp_path / "page.html", explain="prediction")
    data = json.loads(re.search(r'id="data">(.*?)</script>', page.read_text(encoding="utf-8"), re.S)[1])
    assert [query["p"] for query in data["queries"]] == [str(label) for label in said.tolist()]
    assert not any("l" in query["c"] or "w" in query or "s" in query for query in data["queries"])


def test_kept_gradients_do_not_show_what_labels_look_like(tmp_path):
    influence, train, q, _ = of_torch()
    kept = influence.fit(train).gradients(train, store=tmp_path / "kept")
    with pytest.raises(InvalidInput, match="what labels look like"):
        influence.attribute(kept, q, explain="prediction")


SETUP = """
import sys
sys.path.insert(0, {tests!r})
from test_unlabelled import of_sklearn

def setup():
    influence, train, q, _ = of_sklearn()
    return influence, train, q
"""


def test_a_job_of_them_runs_to_its_page(tmp_path, monkeypatch, capsys):
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(SETUP.format(tests=str(Path(__file__).parent)))
    Path("job.toml").write_text('setup = "mine.py:setup"\n[score]\nexplain = "prediction"\n')
    main(["report", "job.toml", "--quiet"])
    text = Path("report.html").read_text(encoding="utf-8")
    assert "loss under the predicted label" in text and '"p":' in text
    main(["top", "job.toml", "--quiet", "--json"])
    Path("job.toml").write_text('setup = "mine.py:setup"\n[score]\nexplain = "both"\n')
    with pytest.raises(SystemExit):
        main(["top", "job.toml"])
