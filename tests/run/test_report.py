"""Claims about the page of an influence: what it computes once, what it is given, and what it finds in the rows."""

import json
import re

import numpy as np
import pytest
import torch

import headwater as hw
from headwater.errors import InvalidInput, NotFittedError
from headwater.evaluate.verification import Check, Verification
from headwater.torch import TorchBatch, TorchComposableInfluence

ROWS, QUERIES = 60, 9


@pytest.fixture(scope="module")
def job():
    """A fitted influence, its train batches and its queries; row 5 is row 3 again, and query 2 is train row 7."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(ROWS, 1, 4, 4, generator=generator)
    y = torch.arange(ROWS) % 3
    x[5], y[5] = x[3], y[3]
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3))
    queries = torch.rand(QUERIES, 1, 4, 4, generator=generator)
    labels = torch.arange(QUERIES) % 3
    queries[2], labels[2] = x[7], y[7]
    influence = TorchComposableInfluence(
        model, torch.nn.CrossEntropyLoss(), hw.Direct(), damping=hw.relative(0.1), blocks="layer"
    )
    train = [(x[k : k + 16], y[k : k + 16]) for k in range(0, ROWS, 16)]
    return influence.fit(train), train, [(queries, labels)]


def page_of(job, tmp_path, **options):
    influence, train, queries = job
    text = influence.report(train, queries, tmp_path / "page.html", **options).read_text(encoding="utf-8")
    return text, json.loads(re.search(r'id="data">(.*?)</script>', text, re.S)[1])


def test_two_loaders_are_all_that_a_page_needs(job, tmp_path):
    influence, train, queries = job
    text, data = page_of(job, tmp_path, verify=False)
    top = influence.top(train, queries, 5, unit="removal")
    for place, query in enumerate(data["queries"]):
        right = top.helpful_scores[place] > 0
        assert [data["rows"][row]["id"] for row, _ in query["up"]] == top.helpful_ids[place][right].astype(str).tolist()
    assert data["kind"] == "images" and "predicted increase of the query" in text
    labels = torch.cat([y for _, y in train]).tolist()
    assert all(row["c"]["l"] == str(labels[int(row["id"])]) for row in data["rows"])


def test_wrong_predictions_are_found_where_nobody_says_them(job, tmp_path):
    influence, _, queries = job
    _, data = page_of(job, tmp_path, verify=False)
    said = influence.provider.model(queries[0][0]).argmax(1)
    assert [query["p"] for query in data["queries"]] == [str(label) for label in said.tolist()]
    assert [bool(query.get("w")) for query in data["queries"]] == (said != queries[0][1]).tolist()
    _, data = page_of(job, tmp_path, verify=False, queries=lambda name: {"label": "cat"})
    assert not any("p" in query for query in data["queries"])  # whose words these labels are is not known


def test_frames_and_data_sets_say_by_themselves_what_their_rows_are(tmp_path):
    pandas, sklearn = pytest.importorskip("pandas"), pytest.importorskip("sklearn.linear_model")
    frame = pandas.DataFrame({"age": range(30), "n": np.arange(30) % 7}, index=[f"p{k}" for k in range(30)])
    y = pandas.Series(np.where(frame.age > 14, "yes", "no"), index=frame.index)
    model = sklearn.LogisticRegression().fit(frame, y)
    _, data = page_of((hw.Influence(model).fit((frame, y)), (frame, y), (frame[:4], y[:4])), tmp_path, verify=False)
    assert data["names"][:2] == ["age", "n"] and [query["q"] for query in data["queries"]] == ["p0", "p1", "p2", "p3"]
    assert [query["c"]["l"] for query in data["queries"]] == [query["p"] for query in data["queries"]] == ["no"] * 4


def test_columns_that_were_attached_stand_beside_what_the_rows_are(job, tmp_path):
    influence, train, queries = job
    scores = influence.attribute(train, queries).attach(rows={"writer": [f"hand {k % 7}" for k in range(ROWS)]})
    _, data = page_of(job, tmp_path, scores=scores, verify=False)
    assert data["kind"] == "images" and all("i" in row["c"] for row in data["rows"])
    said = [row["c"]["c"][0][1] for row in data["rows"]]
    assert said == [f"hand {int(row['id']) % 7}" for row in data["rows"]]


def test_a_page_of_why_it_was_said(job, tmp_path):
    text, data = page_of(job, tmp_path, verify=False, explain="prediction")
    influence, train, queries = job
    top = influence.top(train, queries, 5, unit="removal", explain="prediction")
    assert "loss under the predicted label" in text
    assert [data["rows"][row]["id"] for row, _ in data["queries"][0]["up"]] == [
        str(name) for name, score in zip(top.helpful_ids[0], top.helpful_scores[0], strict=True) if score > 0
    ]


def test_labels_are_shown_as_they_were_given(tmp_path):
    sklearn = pytest.importorskip("sklearn.linear_model")
    x = np.random.default_rng(0).normal(size=(40, 3))
    for labels in (np.array(["no", "yes"]), np.array([1, 2]), np.array([-1, 1])):
        y = labels[(x[:, 0] > 0).astype(int)]
        model = sklearn.LogisticRegression(C=0.1).fit(x, y)
        _, data = page_of((hw.Influence(model).fit((x, y)), (x, y), (x[:9], y[:9])), tmp_path, verify=False)
        assert [query["c"]["l"].replace("\N{MINUS SIGN}", "-") for query in data["queries"]] == y[:9].astype(
            str
        ).tolist()
        said = model.predict(x[:9])
        assert [bool(query.get("w")) for query in data["queries"]] == (said != y[:9]).tolist()


@pytest.mark.parametrize(
    ("label", "said", "wrong"),
    [(True, 1, False), (1000, 1000.0, False), ("1", 1, False), (0.5, 0.51, False), (1, 2, True), ("a", "b", True)],
)
def test_a_prediction_is_wrong_where_it_is_another_label(label, said, wrong, tmp_path):
    scores = hw.Scores(np.ones((1, 2)), np.arange(1), np.arange(2))
    page = scores.report(tmp_path / "new" / "page.html", queries={"label": [label]}, predictions=[said]).read_text()
    assert ('"w":1' in page.replace(" ", "")) == wrong


def test_scores_of_another_influence_are_refused(job, tmp_path):
    influence, train, queries = job
    others = influence.with_damping(3.0).attribute(train, queries)
    with pytest.raises(InvalidInput, match="scores= are of"):
        influence.report(train, queries, tmp_path / "page.html", scores=others)


def test_losses_copies_and_queries_among_the_rows_are_found(job, tmp_path):
    influence, _, queries = job
    text, data = page_of(job, tmp_path, verify=False)
    losses = torch.nn.functional.cross_entropy(influence.provider.model(queries[0][0]), queries[0][1], reduction="none")
    np.testing.assert_allclose([query["z"] for query in data["queries"]], losses.detach().numpy(), rtol=1e-3)
    assert "2 rows are copies of one another, in 1 set" in text
    assert "is query 2" in text and "1 training row is a query as well" in text
    assert "Labels that may be wrong" in text and "not checked" in text


def test_labels_that_may_be_wrong_are_those_that_the_model_would_not_give(job, tmp_path):
    influence, train, _ = job
    text, data = page_of(job, tmp_path, verify=False)
    model = influence.provider.model
    wrong = torch.cat([model(x).argmax(1) != y for x, y in train]).nonzero()[:, 0].tolist()
    listed = re.search(r"Labels that may be wrong.*?</ol>", text, re.S)[0]
    shown = [int(row) for row in re.findall(r'class="id" dir="auto">(\d+)<', listed)]
    assert len(shown) == 10 and set(shown) <= set(wrong) and f"{len(wrong)} rows of {ROWS}" in text
    noted = {int(row["id"]) for row in data["rows"] if "its label may be wrong" in row.get("f", "")}
    assert noted == set(shown)


def test_a_small_job_is_verified_unasked_and_a_page_says_so(job, tmp_path):
    text, _ = page_of(job, tmp_path)
    assert "were computed again plainly, and agree" in text
    found = Verification("Direct()", 2, 1, 0, 1e-3, (Check("plain gradients", 0.0, 1e-3),))
    assert "1 queries x 2 training rows" in page_of(job, tmp_path, checks=[found])[0]


def test_a_verification_that_nobody_asked_for_solves_for_no_exact_inverse(job, tmp_path, monkeypatch):
    _, train, queries = job
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 70), torch.nn.Linear(70, 3))
    influence = TorchComposableInfluence(model, torch.nn.CrossEntropyLoss(), hw.Ekfac()).fit(train)
    asked: list[bool] = []
    monkeypatch.setattr("headwater.run.verify.exact_method", lambda *_: asked.append(True) or hw.Ekfac())
    text, _ = page_of((influence, train, queries), tmp_path)
    assert "were computed again plainly" in text and not asked
    page_of((influence, train, queries), tmp_path, verify=True)
    assert asked


def test_scores_that_are_there_are_not_computed_again(job, tmp_path, monkeypatch):
    influence, train, queries = job
    scores = influence.attribute(train, queries, by_block=True)
    monkeypatch.setattr("headwater.run.report.attribute", lambda *_, **__: pytest.fail("computed again"))
    text, _ = page_of(job, tmp_path, scores=scores, verify=False)
    assert "per unit of weight" in text and "Which parts of the model" in text


def test_rows_are_matched_by_their_ids_whatever_their_order(job, tmp_path):
    influence, train, queries = job
    x, y = (torch.cat(parts) for parts in zip(*train, strict=True))
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(1))
    ids = np.array([f"row {k}" for k in range(ROWS)])
    scores = influence.attribute([TorchBatch(x, y, ids=ids)], queries, unit="removal")
    shuffled = [TorchBatch(x[order], y[order], ids=ids[order.numpy()])]
    text = influence.report(
        shuffled, queries, tmp_path / "shuffled.html", scores=scores, verify=False, made={"made": None}
    ).read_text()
    straight = influence.report(
        [TorchBatch(x, y, ids=ids)], queries, tmp_path / "page.html", scores=scores, verify=False, made={"made": None}
    ).read_text()
    assert text == straight


def test_rows_that_one_is_told_about_are_shown_as_told(job, tmp_path):
    _, data = page_of(job, tmp_path, rows=lambda row: f"this is row {row}", verify=False, self_influence=False)
    assert all(row["c"]["t"] == f"this is row {row['id']}" for row in data["rows"])


def test_kept_gradients_stand_for_the_train_loader(job, tmp_path):
    influence, train, queries = job
    kept = influence.gradients(train, store=tmp_path / "kept")
    text = influence.report(kept, queries, tmp_path / "page.html").read_text()
    assert "Suspicious" not in text and "Which rows are behind each query?" in text


def test_an_influence_that_is_not_fitted_has_no_page(tmp_path):
    model = torch.nn.Linear(2, 2)
    influence = TorchComposableInfluence(model, torch.nn.CrossEntropyLoss(), hw.Direct())
    batch = [(torch.zeros(2, 2), torch.tensor([0, 1]))]
    with pytest.raises(NotFittedError):
        influence.report(batch, batch, tmp_path / "page.html")
    assert not list(tmp_path.iterdir())
