"""Every pass over a loader meets the same rows, whoever reads it; and errors say which rows they are about."""

from __future__ import annotations

import warnings

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import headwater as hw
from headwater.errors import BatchMismatch, InvalidInput, NonFiniteValue, RowsNotFitted
from headwater.jax import JaxBatch, JaxComposableInfluence
from headwater.jax.losses import cross_entropy
from headwater.random import row_digests
from headwater.sklearn import SklearnBatch, SklearnComposableInfluence
from headwater.torch import TorchBatch, TorchComposableInfluence

torch.manual_seed(0)
X, Y = torch.randn(12, 4, dtype=torch.float64), torch.arange(12) % 3
XQ, YQ = torch.randn(3, 4, dtype=torch.float64), torch.arange(3)
MODEL = nn.Linear(4, 3).double()
CE = nn.CrossEntropyLoss()
QUERIES = [(XQ, YQ)]


def batches(x=X, y=Y, size=4):
    return [(x[k : k + size], y[k : k + size]) for k in range(0, len(y), size)]


TRAIN = batches()


class Changing:
    """A loader that gives something else each time that it is read; the last of it from then on."""

    def __init__(self, *passes):
        self.passes, self.reads = passes, 0

    def __iter__(self):
        self.reads += 1
        return iter(self.passes[min(self.reads, len(self.passes)) - 1])


SHUFFLED = [TRAIN[0], TRAIN[2], TRAIN[1]]
CHANGES = {
    "shuffles": SHUFFLED,
    "shuffles within a batch": [TRAIN[0], (X[[5, 4, 6, 7]], Y[[5, 4, 6, 7]]), TRAIN[2]],
    "augments": [TRAIN[0], (TRAIN[1][0] + 1e-12, TRAIN[1][1]), TRAIN[2]],
    "other labels": [TRAIN[0], (TRAIN[1][0], TRAIN[1][1].flip(0)), TRAIN[2]],
    "fewer": TRAIN[:2],
    "more": [*TRAIN, TRAIN[0]],
    "a row twice": [TRAIN[0], (X[[4, 4, 6, 7]], Y[[4, 4, 6, 7]]), TRAIN[2]],
}
METHODS = {
    "ekfac": hw.Ekfac(),
    "cg": hw.Cg(curvature="hessian"),
    "direct by two ways": hw.Dual(),
    "nystroem": hw.Nystroem(rank=3),
    "lissa": hw.Lissa(steps=4, rows=2),
    "block krylov": hw.BlockKrylov(curvature="hessian", preconditioner="ekfac"),
}


def influence(method=None, **options):
    options = {"damping": 0.5} | options
    return TorchComposableInfluence(MODEL, CE, method or hw.GradDot(), **options)


# The same rows in every pass ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("method", METHODS)
def test_a_fit_that_reads_twice_refuses_other_rows(method, change):
    """Where the rows' gradients fit into memory some methods read once; here they do not."""
    with hw.working_memory(1), pytest.raises(BatchMismatch, match="gives other rows each time it is read") as caught:
        influence(METHODS[method]).fit(Changing(TRAIN, CHANGES[change])).influences(XQ, YQ)
    said = str(caught.value)
    assert "shuffle=False" in said and "augmentation" in said and "ids" in said
    assert ("on purpose" in said) == (change == "more")
    if change != "fewer":
        assert f"rain rows, batch {3 if change == 'more' else 1}, row" in said


@pytest.mark.parametrize("method", [hw.GradDot(), hw.Direct(), hw.Kfac(), hw.LoGra(dimension=2), hw.DataInf()])
def test_a_method_that_reads_once_takes_a_loader_that_shuffles(method):
    expected = influence(method).fit(TRAIN).influences(XQ, YQ, X, Y)
    loader = Changing(SHUFFLED, TRAIN)
    assert np.allclose(influence(method).fit(loader).influences(XQ, YQ, X, Y), expected)


@pytest.mark.filterwarnings("ignore::headwater.errors.NotConverged")
@pytest.mark.parametrize("method", [hw.Ekfac(), hw.Cg(curvature="hessian"), hw.Lissa(steps=4, rows=2)])
def test_other_batches_of_the_same_rows_are_the_same(method):
    expected = influence(method).fit(TRAIN).influences(XQ, YQ, X, Y)
    loader = Changing(TRAIN, batches(size=5), batches(size=12), batches(size=1))
    assert np.allclose(influence(method).fit(loader).influences(XQ, YQ, X, Y), expected)
    scores = influence(method).fit(loader).attribute(batches(size=5), QUERIES)
    assert np.allclose(scores.values, expected)


def named(order, x=X, size=4):
    return [TorchBatch(x[k], Y[k], ids=k + 100) for k in torch.as_tensor(order).split(size)]


def test_rows_with_ids_may_come_in_any_order_and_may_not_change():
    order = torch.arange(12).flip(0)
    expected = influence(hw.Ekfac()).fit(named(range(12))).influences(XQ, YQ, X, Y)
    fitted = influence(hw.Ekfac()).fit(Changing(named(range(12)), named(order, size=5)))
    assert np.allclose(fitted.influences(XQ, YQ, X, Y), expected)
    for later in (named(order, X + 1e-9), named(order)[:2], named([*range(12), 0]), named([0, *range(11)])):
        with pytest.raises(BatchMismatch, match="gives other rows each time it is read"):
            influence(hw.Ekfac()).fit(Changing(named(range(12)), later))


def test_rows_with_ids_may_be_padded_otherwise():
    """Rows of tokens are padded to the longest of their batch."""

    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.head = nn.Embedding(9, 4, dtype=torch.float64), nn.Linear(4, 3, dtype=torch.float64)

        def forward(self, tokens, mask):
            return self.head((self.words(tokens) * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))

    model, long = Pooled(), torch.tensor([2, 3, 5, 4, 2, 5])
    tokens = torch.randint(1, 9, (6, 5), generator=torch.Generator().manual_seed(0))

    def padded(order):
        for rows in torch.as_tensor(order).split(3):
            width = int(long[rows].max())
            mask = (torch.arange(width) < long[rows, None]).double()
            yield TorchBatch({"tokens": tokens[rows, :width] * mask.long(), "mask": mask}, Y[rows], ids=rows)

    there, back = list(padded([0, 1, 3, 2, 4, 5])), list(padded([5, 0, 1, 2, 3, 4]))
    made = TorchComposableInfluence(model, CE, hw.Ekfac(), damping=0.5).fit(Changing(there, back))
    assert made.attribute(back, back, unit="removal").shape == (6, 6)


VERBS = {
    "attribute": lambda i, rows: i.attribute(rows, QUERIES),
    "attribute queries": lambda i, rows: i.attribute(TRAIN, rows),
    "top": lambda i, rows: i.top(rows, QUERIES, 2),
    "self_influence": lambda i, rows: i.self_influence(rows),
    "removal": lambda i, rows: i.removal(rows, QUERIES),
    "groups": lambda i, rows: i.removal(rows, QUERIES, [[0, 5]]),
    "diagnose": lambda i, rows: i.diagnose(rows),
    "verify": lambda i, rows: i.verify(rows, QUERIES, rows=2, queries=2),
    "audit": lambda i, rows: i.audit(rows, QUERIES, queries=2, k=2),
    "calibrate": lambda i, rows: i.calibrate(rows, QUERIES, (np.eye(12) == 0, np.ones((12, 1, 3)))),
}


@pytest.mark.parametrize("change", ["shuffles", "augments", "fewer"])
@pytest.mark.parametrize("verb", [name for name in VERBS if name != "attribute queries"])
def test_every_verb_refuses_a_fitted_loader_that_changed(verb, change):
    """Rows are named by position: where they come in another order, the names are those of other rows."""
    loader = Changing(TRAIN, CHANGES[change])
    fitted = influence(hw.Direct()).fit(loader)
    assert loader.reads == 1
    with pytest.raises(BatchMismatch, match="gives other rows each time it is read"):
        VERBS[verb](fitted, loader)


@pytest.mark.parametrize("verb", ["attribute", "attribute queries", "top", "self_influence"])
def test_a_loader_that_was_never_fitted_is_noticed_when_it_shuffles(verb):
    first_differs = [TRAIN[1], TRAIN[0], TRAIN[2]]
    with pytest.raises(BatchMismatch, match=r"this one was row|it shuffles"):
        VERBS[verb](influence().fit(TRAIN), Changing(TRAIN, first_differs))
    fitted, loader = influence().fit(TRAIN), Changing(TRAIN, TRAIN, SHUFFLED)
    if verb != "attribute queries":  # other queries every day are no mistake
        VERBS[verb](fitted, loader)
        with pytest.raises(BatchMismatch, match=r"batch 1, row 0 \(row 4 of the loader\)"):
            VERBS[verb](fitted, loader)


def test_loaders_of_torch_that_shuffle_are_refused_and_others_are_taken():
    data = TensorDataset(X, Y)
    expected = influence(hw.Ekfac()).fit(TRAIN).influences(XQ, YQ, X, Y)
    plain, shuffled = DataLoader(data, batch_size=4), DataLoader(data, batch_size=4, shuffle=True)
    assert np.allclose(influence(hw.Ekfac()).fit(plain).attribute(plain, QUERIES).values, expected)
    with pytest.raises(BatchMismatch, match="shuffle=False"):
        influence(hw.Ekfac()).fit(shuffled)
    once = influence(hw.Direct()).fit(shuffled)
    with pytest.raises(BatchMismatch, match="shuffle=False"):
        once.attribute(shuffled, QUERIES)
    assert np.allclose(
        once.attribute(plain, QUERIES).values, influence(hw.Direct()).fit(TRAIN).influences(XQ, YQ, X, Y)
    )


def test_loaders_are_read_no_more_often_than_needed():
    train, query = Changing(TRAIN), Changing(QUERIES)
    fitted = influence(hw.Direct()).fit(train)
    fitted.attribute(train, query)
    assert (train.reads, query.reads) == (2, 2)  # a look at the first batch of queries, and the queries


def test_a_new_fit_may_have_new_rows():
    loader = Changing(TRAIN, TRAIN, SHUFFLED)
    fitted = influence(hw.Ekfac()).fit(loader)
    with pytest.raises(BatchMismatch):
        fitted.attribute(loader, QUERIES)
    assert influence(hw.Ekfac()).fit(loader).attribute(loader, QUERIES).shape == (3, 12)


def jax_influence(method, **options):
    params = {"w": jnp.asarray(MODEL.weight.detach().numpy().T, jnp.float32)}
    return JaxComposableInfluence(lambda p, x: x @ p["w"], params, cross_entropy, method, damping=0.5, **options)


def sklearn_influence(method, **options):
    estimator = LogisticRegression(C=0.5).fit(X.numpy(), Y.numpy())
    return SklearnComposableInfluence(estimator, method, damping=0.5, **options)


def arrays(rows):
    return [(np.float32(x.numpy()), y.numpy()) for x, y in rows]


@pytest.mark.parametrize("make", [jax_influence, sklearn_influence])
@pytest.mark.parametrize("change", ["shuffles", "augments"])
def test_other_frameworks_refuse_other_rows_too(make, change):
    other = CHANGES[change] if change == "shuffles" else [TRAIN[0], (TRAIN[1][0] + 1e-3, TRAIN[1][1]), TRAIN[2]]
    loader = Changing(arrays(TRAIN), arrays(other))
    with pytest.raises(BatchMismatch, match="gives other rows each time it is read"):
        make(hw.GradDot()).fit(loader).attribute(loader, arrays(QUERIES))


def test_digests_tell_rows_apart_and_do_not_depend_on_the_batch():
    """Signs, zeros and ones are where sums of words would cancel."""
    signs = np.array(np.meshgrid(*[[-1.0, 1.0]] * 10)).reshape(10, -1).T
    for rows in (signs.astype(np.float32), (signs > 0).astype(np.float64), (signs > 0), signs.astype(np.float16)):
        keys = row_digests([rows, np.arange(len(rows)) // len(rows)])
        assert len(np.unique(keys)) == len(rows)
        assert np.array_equal(row_digests([rows[5:9], np.zeros(4, dtype=int)]), keys[5:9])
    assert row_digests([signs[:1], signs[1:2]]) != row_digests([signs[1:2], signs[:1]])


# Rows that were not fitted --------------------------------------------------------------------------------------------


def test_rows_that_were_not_fitted_are_counted_in_one_warning():
    fitted = influence(hw.Ekfac()).fit(TRAIN)
    mixed = [TRAIN[0], (XQ, YQ)]
    for verb in ("attribute", "top", "self_influence", "diagnose"):
        with pytest.warns(RowsNotFitted, match="3 of the 7 train rows are not among") as said:
            VERBS[verb](fitted, mixed)
        assert len(said) == 1
    with pytest.raises(RowsNotFitted, match="Train row 4 is not among the rows that were fitted"):
        fitted.attribute(mixed, QUERIES, unit="removal")
    for verb in ("removal", "groups"):
        with pytest.raises(InvalidInput, match="Train row 4 is not among"):
            VERBS[verb](fitted, mixed)


@pytest.mark.parametrize("size", [1, 3])
def test_swapped_loaders_are_named(size):
    fitted = influence(hw.Ekfac()).fit(TRAIN)
    with pytest.warns(RowsNotFitted, match="train and query loader are swapped"):
        fitted.attribute(batches(XQ, YQ, size), TRAIN)
    with pytest.raises(RowsNotFitted, match="train and query loader are swapped"):
        fitted.attribute(batches(XQ, YQ, size), TRAIN, unit="removal")
    fitted.attribute(TRAIN, TRAIN, unit="removal")  # train rows that are asked about


def test_the_same_rows_are_fitted_whatever_comes_with_them():
    """Other batches, order, weights, ids; a copy of the fit; raw tensors, which may be anything."""
    weights = torch.linspace(0.5, 2, 12)
    for rows in (TRAIN, named(range(12)), [TorchBatch(X, Y, weights=weights)]):
        fitted = influence(hw.Ekfac()).fit(rows)
        for others in (batches(size=5), named(range(11, -1, -1)), [TorchBatch(X[:7], Y[:7], weights=weights[:7])]):
            fitted.with_damping(0.1).attribute(others, QUERIES, unit="removal")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fitted.influences(XQ, YQ, X + 1, Y)


@pytest.mark.parametrize("make", [jax_influence, sklearn_influence])
def test_other_frameworks_know_their_fitted_rows(make):
    fitted = make(hw.GradDot()).fit(arrays(TRAIN))
    fitted.self_influence(arrays(batches(size=4)[::-1]))
    with pytest.warns(RowsNotFitted, match="3 of the 3 train rows"):
        fitted.self_influence(arrays(QUERIES))


# Errors say where -----------------------------------------------------------------------------------------------------


def spoilt(rows, batch, row, value=float("nan")):
    rows = [(x.clone(), y) for x, y in rows]
    rows[batch][0][row, 2] = value
    return rows


@pytest.mark.parametrize("memory", [2**26, 1])
@pytest.mark.parametrize("method", [hw.Direct(), hw.Ekfac(), hw.GradDot(), hw.Cg()])
def test_what_is_not_finite_is_named_by_batch_and_row(method, memory):
    bad = spoilt(TRAIN, 1, 2)
    with hw.working_memory(memory):
        with pytest.raises(NonFiniteValue, match=r"^Train rows, batch 1, row 2 \(row 6 of the loader\): "):
            influence(method).fit(bad).self_influence(bad)
        fitted = influence(method).fit(TRAIN)
        with pytest.raises(NonFiniteValue, match=r"^Query rows, batch 2, row 0 \(row 8 of the loader\): "):
            fitted.attribute(TRAIN, spoilt(TRAIN, 2, 0))


@pytest.mark.parametrize("make", [jax_influence, sklearn_influence])
def test_other_frameworks_name_batch_and_row_too(make):
    bad = arrays(spoilt(TRAIN, 1, 2))
    with pytest.raises(NonFiniteValue, match=r"^Train rows, batch 1, row 2 \(row 6 of the loader\): "):
        make(hw.GradDot()).fit(bad).self_influence(bad)
    with pytest.raises(NonFiniteValue, match=r"^Query rows, batch 1, row 2 \(row 6 of the loader\): "):
        make(hw.GradDot()).fit(arrays(TRAIN)).attribute(arrays(TRAIN), bad)


@pytest.mark.parametrize("method", [hw.GradDot(), hw.Direct(), hw.DataInf()])
def test_scores_that_overflow_are_no_scores(method):
    """Each gradient is a number in float32, and their product is none."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    rows = [(x.float() * (1.0 if k == 0 else 3e19), y) for k, (x, y) in enumerate(TRAIN)]
    small = [(x.float(), y) for x, y in TRAIN]
    fitted = TorchComposableInfluence(model, CE, method, damping=1e-3).fit(small)
    with pytest.raises(NonFiniteValue, match=r"score of query \d and train row \d.*float64"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RowsNotFitted)
        fitted.attribute(rows, [(XQ.float() * 3e19, YQ)])


@pytest.mark.parametrize("which", ["fit", "train", "query"])
def test_what_the_framework_raises_names_the_batch(which):
    wide = [TRAIN[0], (torch.zeros(4, 7, dtype=torch.float64), Y[:4])]
    expected = "Query rows, batch 1" if which == "query" else r"Train rows, batch 1 \(rows 4 to 7 of the loader\)"
    with pytest.raises(InvalidInput, match=f"^{expected}.*shapes cannot be multiplied"):
        fitted = influence(hw.Ekfac()).fit(wide if which == "fit" else TRAIN)
        fitted.attribute(wide if which == "train" else TRAIN, wide if which == "query" else TRAIN)


def test_the_loaders_own_errors_are_its_own():
    class Broken:
        def __iter__(self):
            yield TRAIN[0]
            raise RuntimeError("the disk is gone")

    with pytest.raises(RuntimeError, match=r"^the disk is gone$"):
        influence().fit(Broken())


# unpack= --------------------------------------------------------------------------------------------------------------


def test_items_of_any_form_are_unpacked_in_fit_and_in_every_verb():
    weights, expected = torch.linspace(0.5, 2, 12).double(), influence(hw.Ekfac()).fit(TRAIN)
    scores = expected.attribute(TRAIN, QUERIES).values
    dicts = [{"input": x, "label": y, "other": 1} for x, y in TRAIN]
    asked = [{"input": XQ, "label": YQ}]
    made = influence(hw.Ekfac(), unpack=lambda batch: (batch["input"], batch["label"])).fit(dicts)
    assert np.allclose(made.attribute(dicts, asked).values, scores)
    assert np.allclose(made.self_influence(dicts), expected.self_influence(TRAIN))
    assert np.allclose(made.removal(dicts, asked), expected.removal(TRAIN, QUERIES))
    assert made.verify(dicts, asked, rows=2, queries=2).tolerance > 0
    three = [(k, *row) for k, row in enumerate(TRAIN)]
    made = influence(hw.Ekfac(), unpack=lambda b: (b[1], b[2], b[0] * 10 + torch.arange(len(b[2])))).fit(three)
    found = made.attribute(three, [(5, *QUERIES[0])])
    assert np.allclose(found.values, scores) and found.train_ids.tolist()[:5] == [0, 1, 2, 3, 10]
    whole = [(X, Y, weights)]
    made = influence(hw.Direct(), unpack=lambda b: (b[0], b[1], None, b[2])).fit(whole)
    weighted = influence(hw.Direct()).fit([TorchBatch(X, Y, weights=weights)])
    assert np.allclose(made.influences(XQ, YQ), weighted.influences(XQ, YQ))
    made = influence(hw.Ekfac(), unpack=lambda b: TorchBatch(b[1], b[2])).fit(three)
    assert np.allclose(made.influences(XQ, YQ, X, Y), scores)


@pytest.mark.parametrize("make", [jax_influence, sklearn_influence])
def test_other_frameworks_unpack_too(make):
    kind, rows = (JaxBatch if make is jax_influence else SklearnBatch), arrays(TRAIN)
    weights = np.linspace(0.5, 2, 12).reshape(3, 4)
    expected = make(hw.GradDot()).fit([kind(x, y, weights=w) for (x, y), w in zip(rows, weights, strict=True)])
    dicts = [{"w": w, "a": x, "b": y} for (x, y), w in zip(rows, weights, strict=True)]
    made = make(hw.GradDot(), unpack=lambda b: (b["a"], b["b"], None, b["w"])).fit(dicts)
    assert made.n_train == pytest.approx(expected.n_train)
    weighted = expected.self_influence([kind(*rows[0], weights=weights[0])])
    assert np.allclose(made.self_influence(dicts[:1]), weighted)


def test_what_unpack_cannot_do_is_said():
    with pytest.raises(InvalidInput, match=r"unpack= failed on batch 0 of the loader.*KeyError"):
        influence(unpack=lambda b: (b["x"], b["y"])).fit([{"a": X}])
    with pytest.raises(InvalidInput, match=r"unpack= gave a tuple of 5 entries"):
        influence(unpack=lambda b: (1, 2, 3, 4, 5)).fit(TRAIN)
    with pytest.raises(InvalidInput, match="unpack is 'x'; expected a function"):
        influence(unpack="x")


# Saved fits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [hw.Ekfac(), hw.Cg(curvature="hessian"), hw.Dual()])
def test_a_saved_fit_knows_which_rows_were_fitted(method, tmp_path):
    expected = influence(method).fit(TRAIN)
    expected.save(tmp_path / "fit")
    loaded = influence(method).load(tmp_path / "fit", batches(size=12))
    found = loaded.attribute(batches(size=5), QUERIES, unit="removal")
    assert np.allclose(found.values, expected.attribute(TRAIN, QUERIES, unit="removal").values)
    with pytest.raises(RowsNotFitted, match="Train row 0"):
        loaded.attribute(QUERIES, QUERIES, unit="removal")


@pytest.mark.parametrize("rows", [TRAIN[:2], [*TRAIN, TRAIN[0]], CHANGES["augments"]])
def test_a_saved_fit_that_reads_rows_refuses_others(rows, tmp_path):
    influence(hw.Cg(curvature="hessian")).fit(TRAIN).save(tmp_path / "fit")
    with pytest.raises(BatchMismatch, match="other rows than those that were fitted and saved"):
        influence(hw.Cg(curvature="hessian")).load(tmp_path / "fit", rows).influences(XQ, YQ)
