"""Claims about the page of a job: the same numbers as the scores, one small file, and text that stays text."""

import json
import re
from html import unescape
from html.parser import HTMLParser

import numpy as np
import pandas
import pytest

from headwater.errors import InvalidInput, InvalidSetting, NonFiniteValue, NotWritten, ShapeMismatch
from headwater.evaluate.audited import audited
from headwater.evaluate.calibration import choose_damping
from headwater.evaluate.verification import Check, Verification
from headwater.report import Suspects, Tokens
from headwater.report.gather import Groups, Scale, gather
from headwater.store.diagnosis import BlockDiagnosis, Diagnosis, Stationarity
from headwater.store.scores import Scores

RNG = np.random.default_rng(0)
QUERIES, ROWS = 12, 40
EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\u202e\u2028\x00&'\""


def make(q=QUERIES, n=ROWS, **more):
    values = np.random.default_rng(1).normal(size=(q, n)).astype(np.float32)
    given = {"unit": "removal", "n_train": float(n), "method": "Ekfac()", "damping": {"a": 0.1}} | more
    return Scores(values, np.arange(q), np.arange(n), **given)


def written(scores, tmp_path, **options):
    return scores.report(tmp_path / "page.html", **options).read_text(encoding="utf-8")


def data_of(text):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])


class Elements(HTMLParser):
    """Every element with its attributes; complains about tags that are not closed in order."""

    def __init__(self, text):
        super().__init__()
        self.found, self.open, self.words = [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        if tag not in {"meta", "img", "br", "input"}:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    def all(self, tag):
        return [attributes for found, attributes in self.found if found == tag]


# The numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 5, 100])
def test_the_page_shows_the_rows_of_top(tmp_path, k):
    scores = make()
    data, top = data_of(written(scores, tmp_path, k=k)), scores.top(k)
    for place, query in enumerate(data["queries"]):
        assert query["q"] == str(scores.query_ids[place])
        for end, ids, values in (
            ("up", top.helpful_ids, top.helpful_scores),
            ("down", top.harmful_ids, top.harmful_scores),
        ):
            right = values[place] > 0 if end == "up" else values[place] < 0  # the others are not what the heading says
            assert [data["rows"][row]["id"] for row, _ in query[end]] == [str(i) for i in ids[place][right]]
            np.testing.assert_allclose([score for _, score in query[end]], values[place][right], rtol=1e-3)


def test_sums_over_queries_equal_those_of_the_matrix():
    scores = make()
    query, train = Groups.among(list("abc") * 4), Groups.among(list("xy") * 20)
    found = gather(scores, 3, 5, train, query)
    np.testing.assert_allclose(found.total, scores.values.sum(0, dtype=float), rtol=1e-12)
    np.testing.assert_allclose(found.size, np.abs(scores.values).sum(0, dtype=float), rtol=1e-12)
    expected = [[scores.values[query.of == g][:, train.of == t].mean() for t in (0, 1)] for g in (0, 1, 2)]
    np.testing.assert_allclose(found.between, expected, rtol=1e-5)
    assert found.top.helpful_ids.shape == (5, 3)


def test_predictions_and_losses_may_be_tensors(tmp_path):
    import torch

    data = data_of(written(make(), tmp_path, predictions=torch.arange(QUERIES), losses=torch.ones(ROWS)))
    assert [query["p"] for query in data["queries"]] == [str(k) for k in range(QUERIES)]


def test_groups_are_in_the_order_of_their_names():
    groups = Groups.among(["10", "9", "b", "a", "9"])
    assert groups.names == ("9", "10", "a", "b") and groups.of.tolist() == [1, 0, 3, 2, 0]
    assert groups.sums(np.ones(5)).tolist() == groups.counts.tolist() == [2, 1, 1, 1]


@pytest.mark.parametrize(("largest", "power"), [(0.0, 0), (0.1, 0), (123.0, 0), (0.0123, -3), (3.1e-6, -6), (4e7, 6)])
def test_scores_are_shown_in_a_power_of_ten_that_reads_well(largest, power):
    scale = Scale.of(largest)
    assert scale.power == power and re.fullmatch(r"\+\d{1,4}(\.\d{1,3})?", scale.said(largest))
    assert ("10" in scale.in_words) == (power != 0)


def test_a_run_on_disk_is_never_read_whole(tmp_path, monkeypatch):
    import torch

    import headwater as hw
    from headwater.store.matrix import StoredMatrix
    from headwater.torch import TorchComposableInfluence

    torch.manual_seed(0)
    model, x, y = torch.nn.Linear(3, 2).double(), torch.randn(300, 3).double(), torch.randint(2, (300,))
    influence = TorchComposableInfluence(model, torch.nn.CrossEntropyLoss(), hw.Direct(), damping=hw.relative(0.1))
    influence.fit([(x, y)])
    stored = influence.attribute(
        [(x, y)], [(x[:7], y[:7])], store=tmp_path / "run", unit="removal", by_block=True, memory="8GiB"
    )
    held = Scores(stored.values, stored.query_ids, stored.train_ids, by_block=dict(stored.by_block))
    again = Scores.open(tmp_path / "run")
    monkeypatch.setattr(StoredMatrix, "read", lambda *_: pytest.fail("the whole matrix was read"))
    monkeypatch.setattr(type(again), "values", property(lambda _: pytest.fail("the whole matrix was read")))
    text = written(again, tmp_path)
    assert data_of(text)["rows"] == data_of(written(held, tmp_path))["rows"]
    assert "Which parts of the model" in text


# The rows -------------------------------------------------------------------------------------------------------------


def test_each_row_and_each_picture_is_there_once(tmp_path):
    images = np.random.default_rng(0).random((ROWS, 8, 8))
    images[1::2] = images[0]  # half of the rows look alike
    data = data_of(written(make(q=30), tmp_path, rows=(images, np.arange(ROWS) % 3), queries=images[:30]))
    assert len({row["id"] for row in data["rows"]}) == len(data["rows"]) <= ROWS
    assert len(data["images"]) <= ROWS // 2 and data["kind"] == "images"
    assert {row["c"]["l"] for row in data["rows"]} <= {"0", "1", "2"}


def test_a_normal_job_is_under_one_megabyte(tmp_path):
    smooth = np.linspace(0, 1, 32)[:, None, None] * RNG.random((900, 1, 32, 3)) + 0.1 * RNG.random((900, 32, 32, 3))
    scores = make(300, 600, by_block={"a": np.ones((300, 600), np.float32)})
    text = written(scores, tmp_path, rows=(smooth[:600], np.arange(600) % 10), queries=smooth[600:])
    assert len(data_of(text)["queries"]) == 300 and len(text.encode()) < 1_000_000
    assert "Pictures are shown" in text


def test_long_texts_are_cut_so_that_the_page_stays_small(tmp_path):
    rows = ["word " * 2000] * 1200
    text = written(make(300, 1200), tmp_path, rows=rows, queries=rows[:300])
    assert len(text.encode()) < 1_000_000 and data_of(text)["rows"][0]["c"]["m"] > 9000


def test_where_rows_are_large_there_are_fewer_queries(tmp_path):
    columns = {f"a column of a long name {c}": RNG.random(1200) for c in range(60)}
    text = written(make(300, 1200), tmp_path, rows=columns, queries={name: c[:300] for name, c in columns.items()})
    shown = len(data_of(text)["queries"])
    assert 5 <= shown < 300 and len(text.encode()) < 1_000_000 and f"Of 300 queries the first {shown}" in text


def test_many_queries_are_said_to_be_left_off(tmp_path):
    text = written(make(450, 10), tmp_path)
    assert len(data_of(text)["queries"]) == 400 and "Of 450 queries the first 400" in text


def test_what_is_attached_is_shown(tmp_path):
    labels = np.array(list("ab") * 20)
    scores = make().attach(rows={"label": labels, "age": np.arange(ROWS)}, queries={"label": labels[:QUERIES]})
    data = data_of(written(scores, tmp_path))
    assert all(row["c"]["l"] == labels[int(row["id"])] for row in data["rows"])
    assert data["names"] == ["age"] and data["kind"] == "rows"


def test_a_function_is_asked_for_what_is_shown_alone(tmp_path):
    asked = []
    scores = make(2, 10_000)
    text = written(scores, tmp_path, k=2, rows=lambda row: asked.append(row) or Tokens(["a ", "b"], [1, -1]))
    assert len(asked) == len(data_of(text)["rows"]) < 40 and data_of(text)["rows"][0]["c"]["k"][0] == ["a ", "p5", "+1"]


def test_wrong_predictions_are_marked(tmp_path):
    labels = np.arange(QUERIES) % 2
    predictions = labels.copy()
    predictions[3] = 1 - predictions[3]
    text = written(make(), tmp_path, queries=([""] * QUERIES, labels), predictions=predictions)
    queries = data_of(text)["queries"]
    assert [k for k, query in enumerate(queries) if query.get("w")] == [3] and 'id="wrong"' in text


@pytest.mark.parametrize("groups", ["site", np.array(list("ab") * 20), {k: "ab"[k % 2] for k in range(ROWS)}])
def test_groups_come_as_a_column_as_labels_or_by_id(tmp_path, groups):
    scores = make().attach(rows={"site": list("ab") * 20})
    text = written(scores, tmp_path, groups=groups)
    assert "Influence by group of training rows" in text
    assert all(row["g"] == "ab"[int(row["id"]) % 2] for row in data_of(text)["rows"])


def test_rows_with_high_self_influence_and_loss_are_suspicious(tmp_path):
    itself, losses = np.ones(ROWS), np.ones(ROWS)
    itself[[3, 7]], losses[[7, 9]] = 50.0, 50.0
    text = written(make(), tmp_path, self_influence=itself, losses=losses)
    listed = re.search(r"Labels that may be wrong.*?</ol>", text, re.S)[0]
    assert re.findall(r'class="id" dir="auto">(\d+)<', listed) == ["7"]
    assert "more than 35 times the median row" in text and f": 1 row of {ROWS}." in text
    assert "own loss" in text and "Suspicious" in text
    assert "Suspicious" not in written(make(), tmp_path)


def test_rows_are_not_suspicious_because_somebody_must_be_first(tmp_path):
    rng = np.random.default_rng(0)
    text = written(make(), tmp_path, self_influence=rng.normal(size=ROWS) ** 2, losses=rng.normal(size=ROWS) ** 2)
    assert "None stands out" in text and "Labels that may be wrong" not in text and "label may be wrong" not in text
    text = written(make(), tmp_path, losses=np.zeros(ROWS))
    assert "not said: the median row's own loss is 0" in unescape(text) and "Labels that may be wrong" not in text


def test_a_row_whose_label_the_model_would_not_give_stands_out():
    losses, itself = np.arange(1.0, ROWS + 1), np.arange(1.0, ROWS + 1)[::-1]
    disagrees = np.isin(np.arange(ROWS), [2, 20, 30])
    found = Suspects(itself, losses, disagrees=disagrees)
    assert found.mislabelled.tolist() == [20, 30, 2]  # first what is high in both
    assert f"3 rows of {ROWS}" in found.rule and "predicts another label" in found.rule
    none = Suspects(itself, losses, disagrees=np.zeros(ROWS, bool))
    assert not len(none.mislabelled) and "None stands out" in none.rule and "by heart" in none.rule
    assert not any(each.title == "Labels that may be wrong" for each in none.section().lists)
    many = Suspects(disagrees=np.ones(ROWS, bool)).section()
    assert many.lists[0].reading == f"The first 10 of {ROWS}."


# What to trust --------------------------------------------------------------------------------------------------------


def verification(figure):
    return Verification("Ekfac()", 8, 4, 0, 1e-3, (Check("plain gradients, own operator", figure, 1e-3),))


def test_nothing_asked_is_said_to_be_unchecked(tmp_path):
    text = written(make(), tmp_path)
    assert text.count("not checked") >= 4 and "influence.verify(train, query)" in text
    assert 'class="alarm' not in text.partition("<main>")[0]


def test_a_failed_check_stands_on_top_of_the_page(tmp_path):
    top = written(make(), tmp_path, checks=[verification(0.5)]).partition("<main>")[0]
    assert "Do not rely on these scores yet" in top and "do not agree with a plain computation" in top
    assert "Do not rely" not in written(make(), tmp_path, checks=[verification(1e-6)])


def test_each_check_has_its_verdict_and_its_figures(tmp_path):
    exact = np.random.default_rng(0).normal(size=(20, ROWS))
    audit = audited(exact + 0.01, exact, k=5, level=0.9, query_ids=np.arange(20), queries=30)
    path = [0.01, 0.1, 1.0, 10.0]
    outputs = np.random.default_rng(1).normal(size=(8, 1, 5))
    calibration = choose_damping(path, {"a": np.stack([outputs[:, 0] * s for s in (-1, 1, 1, -1)])}, outputs)
    diagnosis = Diagnosis(
        "Cg()",
        40.0,
        40.0,
        {"a": BlockDiagnosis(3, 0.1, lowest=-0.5, highest=1.0)},
        Stationarity(1.0, 0.1, None, None),
    )
    text = written(make(), tmp_path, checks=[verification(1e-6), audit, calibration, diagnosis])
    assert "How well each damping forecasts retraining" in text and "chosen" in text
    assert "How well the scores agree" in text and "median rank correlation of 1.00" in text and "agree, within" in text
    assert "Negative curvature" not in text and "negative curvature" in text
    assert "Do not rely on these scores yet" in text  # the damping does not make up for it


def test_solves_that_stopped_early_are_said_beside_the_query(tmp_path):
    residuals = np.full(QUERIES, 1e-5)
    residuals[2] = 0.7
    text = written(make(residuals={"a": residuals}), tmp_path)
    assert [k for k, query in enumerate(data_of(text)["queries"]) if "r" in query] == [2]
    assert "Do not rely on these scores yet" in text


def test_little_coverage_is_said_on_top(tmp_path):
    assert "12.0% of the trainable parameters only" in written(make(coverage=0.12), tmp_path).partition("<main>")[0]


# The file -------------------------------------------------------------------------------------------------------------


def test_the_page_loads_nothing_and_its_policy_allows_what_is_in_it(tmp_path):
    text = written(make(), tmp_path)
    assert not re.search(r"https?://|@import|<link|<iframe|\son\w+=|\sstyle=|url\(", text)
    assert not re.findall(r'src="(?!data:image/)', text)
    assert "default-src &#39;none&#39;; img-src data:" in text and "unsafe-" not in text


def test_the_page_is_well_formed_and_labelled(tmp_path):
    images = np.random.default_rng(0).random((ROWS, 8, 8))
    text = written(make(), tmp_path, rows=images, queries=images[:QUERIES], self_influence=RNG.random(ROWS))
    elements = Elements(text)
    assert elements.all("html") == [{"lang": "en"}] and len(elements.all("h1")) == len(elements.all("main")) == 1
    ids = [attributes["id"] for _, attributes in elements.found if "id" in attributes]
    assert len(ids) == len(set(ids))
    named = [attributes["aria-labelledby"] for _, attributes in elements.found if "aria-labelledby" in attributes]
    assert set(named) <= set(ids)
    assert all(image["alt"] for image in elements.all("img"))
    links = {a["href"] for a in elements.all("a")}
    assert {link.removeprefix("#") for link in links} <= set(ids)


def test_text_from_data_stays_text_wherever_it_comes_from(tmp_path):
    ids = np.array([f"{EVIL}{k}" for k in range(3)])
    values = np.random.default_rng(0).normal(size=(3, 3))
    scores = Scores(values, ids, ids, method=EVIL, damping={EVIL: 1.0}, explained=EVIL, by_block={EVIL: values})
    frame = pandas.DataFrame({EVIL: [EVIL] * 3, "label": [EVIL, "b", EVIL], "n": [1, 2, 3]}, index=ids)
    text = written(
        scores, tmp_path, rows=frame, queries=frame, title=EVIL, groups=EVIL, predictions=["b"] * 3, made={EVIL: EVIL}
    )
    elements = Elements(text)
    scripts = elements.all("script")
    assert scripts == [{"type": "application/json", "id": "data"}, {}]
    assert not any("onerror" in attributes for _, attributes in elements.found)
    assert not any(mark in text for mark in "\u202e\u2028\x00")
    assert "\\u202e" in data_of(text)["queries"][0]["q"]


def test_the_page_says_how_it_was_made(tmp_path):
    text = written(make(), tmp_path, made={"command": "headwater report job.toml", "seed": 7, "Python": None})
    made = text.rpartition('<section id="made"')[2].partition("</section>")[0]
    assert "headwater report job.toml" in made and '<dt>seed</dt><dd dir="auto">7</dd>' in made and "UTC" in made
    assert "<dt>Python</dt>" not in made and "Ekfac()" in made


def test_without_javascript_the_first_queries_are_there(tmp_path):
    text = written(make(), tmp_path)
    fallback = re.search(r"<noscript>(.*?)</noscript>", text, re.S)[1]
    assert fallback.count("<article") == 3 and fallback.count('class="score help"') == 15


def test_the_path_is_returned_and_a_page_is_replaced_whole(tmp_path, monkeypatch):
    file = tmp_path / "page.html"
    assert make().report(file) == file
    before = file.read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(NotWritten):
        make(method="Other()").report(file)
    assert file.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["page.html"]


@pytest.mark.parametrize(
    ("scores", "options", "error", "said"),
    [
        (make(), {"k": 0}, InvalidSetting, "k"),
        (make(), {"losses": np.ones(3)}, ShapeMismatch, r"losses has shape \(3,\)"),
        (make(), {"self_influence": np.full(ROWS, np.nan)}, NonFiniteValue, "self_influence"),
        (make(), {"predictions": [1]}, ShapeMismatch, "predictions has 1"),
        (make(), {"predictions": "said"}, InvalidInput, "'said'"),
        (make(), {"groups": "site"}, InvalidInput, "'site'"),
        (make(), {"groups": {0: "a"}}, InvalidInput, "groups has nothing for row 1"),
        (make(), {"rows": ["one"]}, InvalidInput, "rows has 1 entries for 40 rows"),
        (make(), {"checks": ["verified"]}, InvalidInput, "checks has a str"),
        (make(0), {}, InvalidInput, "nothing to report"),
        (
            Scores(np.zeros((2, 3, 4)), np.arange(2), np.arange(3), mode="perturbation"),
            {},
            InvalidSetting,
            "no ranking to report",
        ),
        (Scores(np.full((1, 2), np.nan), np.arange(1), np.arange(2)), {}, NonFiniteValue, "train row 0"),
    ],
)
def test_what_cannot_be_reported_is_refused(tmp_path, scores, options, error, said):
    with pytest.raises(error, match=said):
        scores.report(tmp_path / "page.html", **options)
    assert not list(tmp_path.iterdir())


def test_a_folder_is_no_page(tmp_path):
    with pytest.raises(InvalidSetting, match="is a folder"):
        make().report(tmp_path)
