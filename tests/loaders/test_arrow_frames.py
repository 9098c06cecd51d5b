"""Claims about data frames of other libraries than pandas: they are taken wherever pandas' are, by Arrow."""

import re

import numpy as np
import pytest

import headwater as hw
from headwater import arrays
from headwater.errors import InvalidInput, MissingExtra

arrow, pandas = pytest.importorskip("pyarrow"), pytest.importorskip("pandas")
sklearn = pytest.importorskip("sklearn.linear_model")

ROWS = 30


class Foreign:
    """A frame that has Arrow's interface and columns alone, as polars' have."""

    def __init__(self, table):
        self.table, self.columns = table, table.column_names

    def __arrow_c_stream__(self, requested_schema=None):
        return self.table.__arrow_c_stream__(requested_schema)


class ForeignColumn:
    def __init__(self, column):
        self.column = column

    def __arrow_c_stream__(self, requested_schema=None):
        return self.column.__arrow_c_stream__(requested_schema)


def frame():
    rng = np.random.default_rng(0)
    made = pandas.DataFrame({"age": rng.integers(20, 60, ROWS), "income": rng.normal(size=ROWS)})
    return made.assign(paid=np.where(made.age + 9 * made.income > 40, "yes", "no"))


def kinds(table):
    """As pandas', as pyarrow's, and as anybody's with the interface."""
    x, y = table.drop(columns="paid"), table.paid
    made = arrow.Table.from_pandas(x, preserve_index=False), arrow.chunked_array([y.tolist()])
    return {
        "pandas": (x, y),
        "pyarrow": made,
        "foreign": (Foreign(made[0]), ForeignColumn(made[1])),
        "array": (made[0], arrow.array(y.tolist())),
    }


def test_frames_of_any_library_give_the_scores_of_pandas(tmp_path):
    given, texts = kinds(frame()), {}
    model = sklearn.LogisticRegression().fit(*given["pandas"])
    scores = {}
    for name, (x, y) in given.items():
        influence = hw.Influence(model).fit((x, y))
        scores[name] = influence.attribute((x, y), (x, y), explain="prediction")
        page = influence.report((x, y), (x, y), tmp_path / f"{name}.html", verify=False, rows=x)
        texts[name] = re.search(r'"names":\[[^]]*\]', page.read_text(encoding="utf-8"))[0]
        assert len(scores[name].attach(rows=x).train_columns["age"]) == ROWS
    for name in ("pyarrow", "foreign"):
        np.testing.assert_array_equal(scores[name].values, scores["pandas"].values)
        assert texts[name] == texts["pandas"] and "income" in texts[name]
        assert np.array_equal(scores[name].train_ids, np.arange(ROWS))


def test_a_frame_with_a_column_of_labels_and_tensors_of_a_network():
    torch = pytest.importorskip("torch")
    table = frame().assign(paid=lambda f: (f.paid == "yes").astype(int))
    model = torch.nn.Linear(2, 2)
    found = []
    for x, y in kinds(table).values():
        influence = hw.Influence(model, torch.nn.CrossEntropyLoss(), method=hw.Direct(), damping=0.1).fit((x, y))
        found.append(influence.attribute((x, y), (x, y)).values)
        np.testing.assert_allclose(influence.influences(x, y), found[-1], rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])


def test_columns_that_are_no_numbers_are_named():
    torch = pytest.importorskip("torch")
    x, y = kinds(frame())["foreign"]
    influence = hw.Influence(torch.nn.Linear(2, 2), torch.nn.CrossEntropyLoss(), method=hw.Direct(), damping=0.1)
    with pytest.raises(InvalidInput, match="position of each row's class"):
        influence.fit((x, y))


def test_without_pyarrow_the_extra_is_named(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(arrays, "import_module", missing)
    with pytest.raises(MissingExtra, match=r"pyarrow.*headwater\[tables\]"):
        arrays.as_pandas(kinds(frame())["foreign"])


def test_a_stream_that_can_be_read_once_is_refused_before_it_is_empty():
    table = frame()
    x, y = kinds(table)["array"]
    influence = hw.Influence(sklearn.LogisticRegression().fit(table[["age", "income"]], table.paid)).fit((x, y))
    for given in (x.to_reader(), (x.to_reader(), y)):
        with pytest.raises(InvalidInput, match="RecordBatchReader can be read only once"):
            influence.attribute((x, y), given, explain="prediction")
    whole = influence.attribute((x, y), x, explain="prediction").values
    for given in (x.to_batches(), [x]):
        assert np.array_equal(influence.attribute((x, y), given, explain="prediction").values, whole)
