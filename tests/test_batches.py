"""Claims about batches of every framework: all columns are counted, cut and joined, those that a subclass adds too."""

from dataclasses import dataclass, field, replace

import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
import torch

import headwater as hw
from headwater.errors import BatchMismatch
from headwater.jax import JaxBatch, JaxComposableInfluence
from headwater.sklearn import SklearnBatch, SklearnComposableInfluence
from headwater.testing import BatchContract
from headwater.torch import TorchBatch, TorchComposableInfluence
from headwater.types import Batch, join

RNG = np.random.default_rng(2)
X, Y, WEIGHTS = RNG.standard_normal((7, 3)), RNG.standard_normal((7, 2)), np.array([1.0, 2, 1, 3, 1, 1, 2])


@dataclass(frozen=True, eq=False)
class Labelled(Batch[np.ndarray]):
    """A column without a default, one of words, and what is no column: a name, a number, names of classes."""

    groups: np.ndarray
    words: list = None
    source: str = "web"
    temperature: float = 1.0
    classes: tuple = field(default=("cat", "dog"), metadata={"column": False})
    total: float = field(init=False, default=0.0)

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "total", 0.0 if isinstance(self.x, dict) else float(np.sum(self.x)))


@dataclass(frozen=True, eq=False)
class Masked(TorchBatch):
    """More columns of tensors, one of them nested."""

    mask: torch.Tensor = None
    extra: dict = None


class TestBatch(BatchContract):
    def batch(self, index):
        i = list(index)
        return Batch({"a": X[i], "b": (Y[i], X[i, 0])}, Y[i], weights=WEIGHTS[i], ids=np.arange(7)[i])


class TestLabelled(BatchContract):
    def batch(self, index):
        i = list(index)
        return Labelled(X[i], Y[i], np.arange(7)[i] % 3, [f"word {k}" for k in i], "books", 0.5, ("cat", "dog", "eel"))

    def columns(self, batch):
        return [np.asarray(column) for column in (batch.x, batch.y, batch.groups, batch.words)]

    def carried(self, batch):
        assert batch.total == np.sum(batch.x)  # computed anew from what was cut or joined
        return [batch.source, batch.temperature, batch.classes]


class TestTorchBatch(BatchContract):
    def batch(self, index):
        i = torch.tensor(list(index))
        x, y, weights = map(torch.tensor, (X, Y, WEIGHTS))
        return TorchBatch((x[i], y[i, 0]), y[i], weights[i], i)


class TestMasked(BatchContract):
    def batch(self, index):
        i = torch.tensor(list(index))
        x, y = torch.tensor(X), torch.tensor(Y)
        return Masked(x[i], y[i], ids=i, mask=x[i] > 0, extra={"scale": y[i, 0], "shift": [y[i], x[i]]})


class TestJaxBatch(BatchContract):
    def batch(self, index):
        i = jnp.array(list(index))
        return JaxBatch({"a": jnp.array(X)[i]}, jnp.array(Y)[i], jnp.array(WEIGHTS)[i], np.asarray(i))


class TestSklearnBatch(BatchContract):
    def batch(self, index):
        i = list(index)
        return SklearnBatch(X[i], Y[i, 0], WEIGHTS[i], np.arange(7)[i])


def test_a_column_of_a_data_frame_is_cut():
    batch = SklearnBatch(pd.DataFrame(X, columns=list("abc")), Y[:, 0], WEIGHTS).take(np.array([4, 1]))
    pd.testing.assert_frame_equal(batch.x, pd.DataFrame(X, columns=list("abc")).iloc[[4, 1]])
    np.testing.assert_array_equal(batch.weights, WEIGHTS[[4, 1]])
    assert len(join([batch, batch])) == 2  # frames do not become one, and are not lost


def test_batches_that_carry_something_else_are_not_joined():
    batch = TestLabelled().batch([0, 1])
    for changes in [
        {"source": "web"},
        {"temperature": 1.0},
        {"classes": ("cat",)},
        {"groups": None},
        {"words": None},
        {"weights": np.ones(2)},
        {"x": X[:2].astype(np.float32)},
        {"x": {"a": X[:2]}},
    ]:
        assert join([batch, replace(batch, **changes)])[0] is batch
    rows = TestBatch().batch([0, 1])
    for x in ({"a": X[:2]}, {"a": X[:2], "b": (Y[:2], X[:2, 0]), "c": Y[:2]}, {"a": X[:2], "b": (Y[:2],)}, X[:2]):
        assert len(join([rows, replace(rows, x=x)])) == len(join([replace(rows, x=x), rows])) == 2
    plain = Batch(X[:2], Y[:2])
    assert len(join([plain, TorchBatch(torch.tensor(X[:2]), torch.tensor(Y[:2]))])) == 2


def test_what_is_carried_may_be_an_array():
    @dataclass(frozen=True, eq=False)
    class Scaled(Batch):
        scale: object = field(default=None, metadata={"column": False})

    first, same, another = (
        Scaled(X[:2], Y[:2], scale=torch.tensor(s)) for s in ([1.0, 2, 3], [1.0, 2, 3], [1.0, 2, 4])
    )
    (joined,) = join([first, same])
    assert len(joined) == 4
    assert joined.scale is first.scale
    assert len(join([first, another])) == 2


def test_a_field_that_is_no_column_and_looks_like_one_is_refused_with_the_mend():
    @dataclass(frozen=True, eq=False)
    class Named(Batch):
        names: tuple = ("cat", "dog")

    with pytest.raises(BatchMismatch, match=r"names has 2.*If names is no column.*field\(metadata={'column': False}\)"):
        Named(X, Y)


@pytest.mark.parametrize("name", ["weights", "ids"])
def test_weights_and_ids_are_keywords_and_one_for_each_row(name):
    with pytest.raises(TypeError):
        Batch(X, Y, WEIGHTS)
    with pytest.raises(BatchMismatch, match=rf"{name} has shape \(7, 3\); expected one number"):
        Batch(X, Y, **{name: X})
    with pytest.raises(BatchMismatch, match=f"{name} has 2"):
        Batch(X, Y, **{name: np.ones(2)})
    with pytest.raises(BatchMismatch, match=f"{name} has no batch dimension"):
        Batch(X, Y, **{name: 2.0})


def of_torch():
    model = torch.nn.Linear(3, 2).double()
    return TorchComposableInfluence(model, torch.nn.MSELoss(), hw.Direct()), TorchBatch, torch.tensor


def of_jax():
    def loss(output, y):
        return jnp.sum((output - y) ** 2)

    influence = JaxComposableInfluence(lambda p, x: x @ p["w"], {"w": jnp.ones((3, 2))}, loss, hw.Direct())
    return influence, JaxBatch, jnp.array


def of_sklearn():
    from sklearn.linear_model import Ridge

    return SklearnComposableInfluence(Ridge().fit(X, Y), hw.Direct()), SklearnBatch, np.array


@pytest.mark.parametrize("make", [of_torch, of_jax, of_sklearn])
def test_a_plain_batch_keeps_its_weights_and_ids(make):
    influence, own, array = make()
    x, y, weights = array(X), array(Y), array(WEIGHTS)
    given = {"weights": weights, "ids": np.arange(20, 27)}
    theirs = influence.unfitted().fit([own(x, y, **given)])
    mine = influence.unfitted().fit([Batch(x, y, **given)])
    assert mine.n_train == theirs.n_train == WEIGHTS.sum()
    expected = theirs.provider.flat_grads(own(x, y, **given))
    np.testing.assert_array_equal(mine.provider.flat_grads(Batch(x, y, **given)), expected)
    np.testing.assert_array_equal(mine.influences(x, y), theirs.influences(x, y))
    scores = mine.attribute([Batch(x, y, **given)], [Batch(x, y)])
    np.testing.assert_array_equal(scores.train_ids, given["ids"])
