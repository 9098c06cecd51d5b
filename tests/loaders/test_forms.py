"""Whatever people hold gives the numbers of a list of batches, in every framework; and rows keep their names."""

from __future__ import annotations

import datasets
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

import headwater as hw
from headwater.errors import BatchMismatch, InvalidInput, InvalidSetting, RowsNotFitted
from headwater.jax import JaxBatch, JaxComposableInfluence, cross_entropy
from headwater.sklearn import SklearnBatch, SklearnComposableInfluence
from headwater.torch import TorchBatch, TorchComposableInfluence

RNG = np.random.default_rng(4)
X, Y = RNG.standard_normal((23, 3)), np.arange(23) % 3
QUERIES = (X[:4] + 0.1, Y[1:5])
NAMES = [f"row {k}" for k in range(23)]
COLUMNS = ["a", "b", "c"]

torch.manual_seed(0)
LINEAR = nn.Linear(3, 3).double()
ESTIMATOR = make_pipeline(StandardScaler(), LogisticRegression(C=0.7)).fit(pd.DataFrame(X, columns=COLUMNS), Y)
ON_ARRAYS = make_pipeline(StandardScaler(), LogisticRegression(C=0.7)).fit(X, Y)


@pytest.fixture(autouse=True)
def in_float64():
    with jax.enable_x64(True):
        yield


def of_torch(**options):
    return TorchComposableInfluence(LINEAR, nn.CrossEntropyLoss(), hw.Direct(), **options)


def affine(params, x):
    return x @ params["w"] + params["b"]


def of_jax(**options):
    params = {"w": jnp.asarray(LINEAR.weight.detach().numpy().T), "b": jnp.asarray(LINEAR.bias.detach().numpy())}
    return JaxComposableInfluence(affine, params, cross_entropy, hw.Direct(), **options)


def of_sklearn(**options):
    return SklearnComposableInfluence(ON_ARRAYS, hw.Direct(), **options)


def of_named_columns(**options):
    return SklearnComposableInfluence(ESTIMATOR, hw.Direct(), **options)


MAKERS = {"torch": of_torch, "jax": of_jax, "sklearn": of_sklearn}
BATCHES = {"torch": TorchBatch, "jax": JaxBatch, "sklearn": SklearnBatch}
every_framework = pytest.mark.parametrize("framework", MAKERS)
jax_is_slow = pytest.mark.parametrize("framework", ["torch", pytest.param("jax", marks=pytest.mark.slow), "sklearn"])


def arrays(framework):
    make = {"torch": torch.tensor, "jax": jnp.asarray, "sklearn": np.asarray}[framework]
    return make(X), make(Y)


def expected(framework):
    x, y = arrays(framework)
    queries = [tuple(map(torch.tensor, QUERIES)) if framework == "torch" else QUERIES]
    made = MAKERS[framework]()
    return made.fit([(x[:9], y[:9]), (x[9:], y[9:])]).attribute([(x, y)], queries)


def frame(index=None):
    return pd.DataFrame(X, columns=COLUMNS, index=index)


def column(index=None):
    return pd.Series(Y, name="kind", index=index)


class Own(Dataset):
    """Single rows: an array and a number, a dict of them, or both as they come from a file."""

    def __init__(self, make):
        self.make = make

    def __len__(self):
        return len(X)

    def __getitem__(self, k):
        if not 0 <= k < len(X):
            raise IndexError(k)
        return self.make(k)


class Sequence:
    """No class of torch's: rows by number."""

    __len__, __getitem__ = Own.__len__, Own.__getitem__
    make = staticmethod(lambda k: (X[k], Y[k]))


HELD = {
    "arrays": lambda framework: arrays(framework),
    "arrays of NumPy": lambda framework: (X, Y),
    "tensors": lambda framework: (torch.tensor(X), torch.tensor(Y)),
    "arrays of JAX": lambda framework: (jnp.asarray(X), jnp.asarray(Y)),
    "lists of numbers": lambda framework: (X.tolist(), Y.tolist()),
    "arrays that cannot be written to": lambda framework: (np.frombuffer(X.tobytes()).reshape(23, 3), Y),
    "a TensorDataset": lambda framework: TensorDataset(torch.tensor(X), torch.tensor(Y)),
    "a part of a TensorDataset": lambda framework: Subset(TensorDataset(torch.tensor(X), torch.tensor(Y)), range(23)),
    "a Dataset": lambda framework: Own(lambda k: (X[k], int(Y[k]))),
    "a Dataset of lists": lambda framework: Own(lambda k: (X[k].tolist(), Y[k])),
    "rows by number": lambda framework: Sequence(),
    "a frame and a column": lambda framework: (frame(), column()),
    "a frame and an array": lambda framework: (frame(), Y),
    "a frame and its column's name": lambda framework: (frame().assign(kind=Y), "kind"),
    "batches of frames": lambda framework: [(frame()[:9], column()[:9]), (frame()[9:], column()[9:])],
}


@jax_is_slow
@pytest.mark.parametrize("size", [5, 64])
def test_what_people_hold_gives_the_numbers_of_batches(framework, size):
    known = expected(framework)
    for what, hold in HELD.items():
        if framework == "sklearn" and "frame" in what:
            continue  # of an estimator that knows no names of columns: below
        made, held = MAKERS[framework](batch_size=size), hold(framework)
        made.fit(held)
        scores = made.attribute(held, QUERIES)
        np.testing.assert_allclose(scores.values, known.values, rtol=1e-12, atol=1e-15, err_msg=what)
        np.testing.assert_array_equal(scores.train_ids, np.arange(23), what)
        np.testing.assert_allclose(made.self_influence(held), made.self_influence([arrays(framework)]), rtol=1e-12)


def test_frames_reach_an_estimator_as_they_are():
    queries = [(pd.DataFrame(QUERIES[0], columns=COLUMNS), QUERIES[1])]
    known = of_named_columns().fit([(frame(), Y)]).attribute([(frame(), Y)], queries).values
    rows = [dict(zip(COLUMNS, x, strict=True), kind=int(y)) for x, y in zip(X, Y, strict=True)]
    held = [frame().assign(kind=Y), datasets.Dataset.from_list(rows), Own(rows.__getitem__)]
    for given in [*(hold("sklearn") for what, hold in HELD.items() if "frame" in what), *held]:
        made = of_named_columns(batch_size=6, target="kind")
        scores = made.fit(given).attribute(given, queries)
        np.testing.assert_allclose(scores.values, known, rtol=1e-12, atol=1e-15)
    sparse = SklearnComposableInfluence(LogisticRegression().fit(X, Y), hw.Direct(), batch_size=4)
    matrix = scipy.sparse.coo_matrix(X)
    np.testing.assert_allclose(
        sparse.fit((matrix, Y)).attribute((matrix, Y), QUERIES).values,
        sparse.fit([(X, Y)]).attribute([(X, Y)], QUERIES).values,
        rtol=1e-12,
    )


@every_framework
def test_columns_are_named_in_frames_dicts_and_data_sets(framework):
    if framework == "sklearn":
        pytest.skip("a data set of columns is a frame for scikit-learn: above")
    known = expected(framework).values
    table = {"inputs": list(X), "kind": Y, "name": NAMES}
    held = [
        datasets.Dataset.from_dict({name: list(column) for name, column in table.items()}),
        Own(lambda k: {name: column[k] for name, column in table.items()}),
        [{"inputs": x, "kind": y, "name": NAMES} for x, y in [arrays(framework)]],
    ]
    if framework == "torch":
        held.append(DataLoader(held[1], batch_size=4))
    for given in held:
        made = MAKERS[framework](target="kind", ids="name", batch_size=6)
        scores = made.fit(given).attribute(given, QUERIES)
        np.testing.assert_allclose(scores.values, known, rtol=1e-12, atol=1e-15)
        assert scores.train_ids.tolist() == NAMES
    named = frame().assign(kind=Y, name=NAMES)
    scores = made.fit(named).attribute(named, QUERIES)
    assert scores.train_ids.tolist() == NAMES
    np.testing.assert_allclose(scores.values, known, rtol=1e-12, atol=1e-15)
    unpacked = MAKERS[framework](unpack=lambda batch: (batch["inputs"], batch["kind"]), ids="name", batch_size=6)
    scores = unpacked.fit(held[0]).attribute(held[1], QUERIES)
    assert scores.train_ids.tolist() == NAMES
    np.testing.assert_allclose(scores.values, known, rtol=1e-12, atol=1e-15)


def test_a_model_of_several_inputs_takes_them_as_a_tuple_or_a_dict():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = LINEAR

        def forward(self, first, rest):
            return self.linear(torch.cat([first, rest], 1))

    made = TorchComposableInfluence(Two(), nn.CrossEntropyLoss(), hw.Direct(), batch_size=6, target="kind")
    known = expected("torch").values
    queries = {"first": QUERIES[0][:, :1], "rest": QUERIES[0][:, 1:]}
    rows = Own(lambda k: {"first": X[k, :1], "rest": X[k, 1:], "kind": Y[k]})
    for held in ((X[:, :1], X[:, 1:]), Y), ({"first": X[:, :1], "rest": X[:, 1:]}, Y), rows:
        found = made.fit(held).attribute(held, (queries, QUERIES[1])).values
        np.testing.assert_allclose(found, known, rtol=1e-12, atol=1e-15)


def test_fractions_come_in_the_models_dtype():
    model = nn.Linear(3, 1)
    made = TorchComposableInfluence(model, nn.MSELoss(), hw.Direct(), target="t")
    x, t = torch.tensor(X, dtype=torch.float32), torch.tensor(X[:, :1], dtype=torch.float32)
    known = made.fit([(x, t)]).attribute([(x, t)], [(x, t)]).values
    whole = frame().assign(flag=Y > 0, t=X[:, 0])
    for held in (X, X[:, :1]), (frame(), frame()[["a"]]), Own(lambda k: (X[k], X[k, :1])):
        np.testing.assert_allclose(made.fit(held).attribute(held, held).values, known, rtol=1e-3, atol=1e-6)
    several = TorchComposableInfluence(nn.Linear(4, 2), nn.MSELoss(), hw.Direct(), target=["t", "a"])
    assert several.fit(whole.assign(d=1)).attribute(whole.assign(d=1), whole.assign(d=1)).values.shape == (23, 23)


def test_rows_are_cut_as_they_are_read(tmp_path):
    """Nothing but the rows of a batch is read of a file, or asked of a data set."""
    np.save(tmp_path / "x.npy", X)
    held = np.load(tmp_path / "x.npy", mmap_mode="r")
    asked = []

    class Watched(np.memmap):
        def __getitem__(self, rows):
            asked.append(rows)
            return np.asarray(super().__getitem__(rows))

    of_torch(batch_size=10).fit((held.view(Watched), Y))
    assert set(map(str, asked)) == {str(slice(k, k + 10)) for k in (0, 10, 20)}


# The same rows again --------------------------------------------------------------------------------------------------


@every_framework
def test_pairs_are_known_again_and_changes_are_noticed(framework):
    x, y = X.copy(), Y.copy()
    made = MAKERS[framework](batch_size=6).fit((x, y))
    made.attribute((x, y), QUERIES)
    x[[2, 3]] = x[[3, 2]]
    with pytest.raises(BatchMismatch, match=r"row 2 of the loader.*other rows each time"):
        made.attribute((x, y), QUERIES)
    with pytest.warns(RowsNotFitted, match="1 of the 23"):  # other objects are another loader
        made.attribute((np.vstack([X[:22], X[:1] + 9]), y), QUERIES)


def test_a_data_set_with_random_rows_is_noticed():
    rng = np.random.default_rng(0)
    augmented = Own(lambda k: (X[k] + 0.1 * rng.standard_normal(3), int(Y[k])))
    with pytest.raises(BatchMismatch, match="other rows each time it is read"):
        of_torch().fit(augmented).attribute(augmented, QUERIES)


# Ids ------------------------------------------------------------------------------------------------------------------

INDICES = {
    "words": (NAMES, NAMES),
    "numbers": (np.arange(100, 123), list(range(100, 123))),
    "a range that does not begin at zero": (pd.RangeIndex(50, 73), list(range(50, 73))),
    "dates": (pd.date_range("2020-01-01", periods=23, freq="6h"), None),
    "categories": (pd.CategoricalIndex(NAMES), NAMES),
    "fractions": (np.arange(23) / 2, [str(k / 2) for k in range(23)]),
    "numbers that may be missing": (pd.array(range(7, 30), dtype="Int64"), list(range(7, 30))),
}


def frames_for(framework, **options):
    return of_named_columns(**options) if framework == "sklearn" else MAKERS[framework](**options)


@every_framework
@pytest.mark.parametrize("kind", INDICES)
def test_an_index_names_the_rows_end_to_end(framework, kind, tmp_path):
    index, names = INDICES[kind]
    names = names or [str(label) for label in index]
    held, made = (frame(index), column(index)), frames_for(framework, batch_size=8)
    queries = (pd.DataFrame(QUERIES[0], columns=COLUMNS, index=index[:4]), QUERIES[1])
    scores = made.fit(held).attribute(held, queries, store=tmp_path / "scores")
    assert scores.train_ids.tolist() == names and scores.query_ids.tolist() == names[:4]
    opened = hw.Scores.open(tmp_path / "scores")
    assert opened.train_ids.tolist() == names
    top = made.top(held, queries, 2)
    assert top.helpful_ids[0, 0] == names[int(np.argmax(scores.values[0]))]
    whole = [(frame(index)[:11], column(index)[:11]), (frame(index)[11:], column(index)[11:])]
    assert made.attribute(whole, queries).train_ids.tolist() == names
    shuffled = [whole[1], whole[0]]
    np.testing.assert_allclose(made.attribute(shuffled, queries).values[:, 12:], scores.values[:, :11], rtol=1e-12)


@jax_is_slow
def test_words_are_ids_in_batches_groups_and_appended_rows(framework, tmp_path):
    kind, made = BATCHES[framework], MAKERS[framework]()
    x, y = arrays(framework)
    batches = [kind(x[:9], y[:9], ids=NAMES[:9]), kind(x[9:], y[9:], ids=np.array(NAMES[9:]))]
    scores = made.fit(batches).attribute(batches[:1], QUERIES, store=tmp_path / "run")
    assert scores.train_ids.tolist() == NAMES[:9]
    more = made.attribute(batches, QUERIES, store=tmp_path / "run", append=True)
    assert more.train_ids.tolist() == NAMES
    assert made.top(batches, QUERIES, 3).helpful_ids.dtype.kind == "U"
    by_name = made.removal(batches, QUERIES, [[NAMES[3], NAMES[12]], [NAMES[0]]])
    np.testing.assert_allclose(by_name, made.removal([(x, y)], QUERIES, [[3, 12], [0]]), rtol=1e-10)
    chosen = made.attribute(batches, QUERIES).sel(train=NAMES[4:5])
    np.testing.assert_array_equal(chosen.values, made.attribute(batches, QUERIES).values[:, 4:5])
    kept = made.gradients(batches, store=tmp_path / "kept")
    assert made.attribute(kept, QUERIES).train_ids.tolist() == NAMES


@every_framework
def test_small_batches_of_words_of_other_lengths_are_joined(framework):
    kind, (x, y) = BATCHES[framework], arrays(framework)
    batches = [kind(x[k : k + 1], y[k : k + 1], ids=np.array([NAMES[k]])) for k in range(23)]
    from headwater.types import join

    (joined,) = join(batches)
    assert np.asarray(joined.ids).tolist() == NAMES


REFUSED = {
    "labels that come twice": ((frame(["a", *NAMES[1:-1], "a"]), Y), r"label 'a' more than once \(rows 0, 22\).*reset"),
    "other labels": ((frame(NAMES), column(NAMES[::-1])), "row 0 is 'row 0' in x and 'row 22' in y"),
    "a label and its position": ((frame(NAMES), column()), "row 0 is 'row 0' in x and 0 in y"),
    "two levels": ((frame(pd.MultiIndex.from_arrays([NAMES, NAMES])), Y), "index has 2 levels"),
    "a label that is missing": ((frame([*range(22), np.nan]), Y), "no label for row 22"),
    "several kinds": ((frame([0, *NAMES[1:]]), Y), "labels of several kinds: int, str"),
    "no such column": ((frame(), "kind"), "no column 'kind'; the columns are 'a', 'b', 'c'"),
    "fewer targets": ((X, Y[:-1]), "x has 23, y has 22"),
    "rows of other lengths": (([[1.0], [2.0, 3.0]], [0, 1]), "rows of different lengths"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_name_its_rows_is_refused(what):
    held, said = REFUSED[what]
    with pytest.raises(InvalidInput, match=said):
        of_torch(batch_size=30).fit(held)


@pytest.mark.parametrize("make", [of_torch, of_jax])
def test_columns_that_are_no_numbers_are_named(make):
    words = frame().assign(town="Rome", day=pd.Timestamp("2020-01-01"))
    with pytest.raises(InvalidInput, match=r"x has columns that are no numbers: 'town' \(\w+\), 'day' .*get_dummies"):
        make().fit((words, Y))
    with pytest.raises(InvalidInput, match=r"y is a column of \w+, 'cat'.*cat\.codes"):
        make().fit((frame(), pd.Series(["cat"] * 23)))


def test_rows_of_a_data_set_that_make_no_batch_say_which():
    ragged = Own(lambda k: (np.zeros(3 + k // 20), int(Y[k])))
    with pytest.raises(InvalidInput, match=r"Own, rows 16 to 22: x has other shapes.*\(3,\) and \(4,\).*collate_fn"):
        of_torch(batch_size=8).fit(ragged)
    with pytest.raises(InvalidInput, match="x is object; expected arrays or numbers"):
        of_torch().fit(Own(lambda k: (object(), 0)))
    with pytest.raises(InvalidInput, match="no column 'kind'; the columns are 'image'"):
        of_torch(target="kind").fit(Own(lambda k: {"image": X[k]}))
    with pytest.raises(InvalidSetting, match="batch_size is 0"):
        of_torch(batch_size=0)


def test_a_tuple_of_batches_is_still_a_loader():
    x, y = arrays("torch")
    known = expected("torch").values
    for held in (((x[:9], y[:9]), (x[9:], y[9:])), (TorchBatch(x[:9], y[:9]), TorchBatch(x[9:], y[9:]))):
        made = of_torch().fit(held)
        np.testing.assert_allclose(made.attribute(held, QUERIES).values, known, rtol=1e-12)


def test_frames_can_be_verified():
    held = (frame(NAMES), column(NAMES))
    model = nn.Linear(3, 3)
    made = TorchComposableInfluence(model, nn.CrossEntropyLoss(), hw.Ekfac(), batch_size=6).fit(held)
    assert made.verify(held, held, rows=3, queries=2).passed
    batch = [SklearnBatch(frame(NAMES), Y)]
    assert of_named_columns().fit(batch).attribute(batch, batch).train_ids.tolist() == NAMES
