"""Claims about queries without labels: `explain="prediction"` needs none, in every framework and on every page."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

import headwater as hw
from headwater.cli import main
from headwater.errors import InvalidInput
from headwater.loaders.forms import collate

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


def test_inputs_alone_come_in_every_form_that_pairs_come_in():
    pandas, sparse = pytest.importorskip("pandas"), pytest.importorskip("scipy.sparse")
    influence, train, q, said = of_sklearn()
    influence.fit(train)
    expected = influence.attribute(train, (q, said)).values
    frame, matrix = pandas.DataFrame(q), sparse.csr_array(q)
    forms = [frame, [frame], matrix, [matrix], (matrix, None), [(frame, None)], [(q[:2], said[:2]), (q[2:], None)]]
    for query in [*forms, [(frame[:2], None), frame[2:]]]:
        found = influence.attribute(train, query, explain="prediction").values
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(InvalidInput, match="explain='prediction'"):
        influence.attribute(train, frame)
    with pytest.raises(InvalidInput, match="x alone is for queries, with explain='prediction'"):
        collate([q[0], q[1]], lambda _, array: array)
    with pytest.raises(InvalidInput, match="make an array of it"):
        influence.attribute(train, q.tolist(), explain="prediction")


def test_inputs_and_targets_in_a_list_are_no_two_batches():
    influence, train, q, said = of_sklearn()
    with pytest.raises(InvalidInput, match=r"a tuple, \(x, y\)"):
        influence.fit(train).attribute(train, [q, said], explain="prediction")


def test_some_labels_are_missing_and_the_first_batch_does_not_say_which(tmp_path):
    torch = pytest.importorskip("torch")
    influence, train, q, said = of_torch()
    influence.fit(train)
    expected = influence.attribute(train, (q, said)).values
    data = torch.utils.data

    class Inputs(data.Dataset):
        def __len__(self):
            return len(q)

        def __getitem__(self, k):
            return q[k]

    for query in (
        Inputs(),
        data.Subset(data.TensorDataset(q), range(len(q))),
        data.DataLoader(Inputs(), batch_size=2),
        [(q[:2], said[:2]), (q[2:], None)],
        [(q[:2], None), (q[2:], said[2:])],
        data.TensorDataset(q),
        data.DataLoader(data.TensorDataset(q), batch_size=2),
    ):
        found = influence.attribute(train, query, explain="prediction").values
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    page = influence.report(
        train, [(q[:2], said[:2]), (q[2:], None)], tmp_path / "page.html", explain="prediction", verify=False
    )
    data = json.loads(re.search(r'id="data">(.*?)</script>', page.read_text(encoding="utf-8"), re.S)[1])
    assert [query["p"] for query in data["queries"]] == [str(label) for label in said.tolist()]
    assert not any("l" in query["c"] or "s" in query for query in data["queries"])


class Counted:
    """A loader that counts how often it is read."""

    def __init__(self, batch):
        self.batch, self.reads = batch, 0

    def __iter__(self):
        self.reads += 1
        yield self.batch


def test_a_page_looks_once_whether_labels_are_there(tmp_path):
    influence, train, q, said = of_torch()
    loaders = Counted((q, said)), Counted((q, said))
    for loader, explain in zip(loaders, ("label", "prediction"), strict=True):
        influence.fit(train).report(train, loader, tmp_path / "page.html", explain=explain, verify=False)
    assert loaders[1].reads == loaders[0].reads + 1


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
