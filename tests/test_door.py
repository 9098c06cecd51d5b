"""One door: the framework is found in what the model is, and its class gives the same numbers."""

from __future__ import annotations

import subprocess
import sys

import equinox as eqx
import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
import torch
from flax import nnx
from peft import LoraConfig, get_peft_model
from sklearn.ensemble import HistGradientBoostingRegressor, RandomForestClassifier
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import GridSearchCV
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC, LinearSVC
from torch import nn
from torch.utils.data import TensorDataset
from transformers import BertConfig, BertForSequenceClassification

import headwater as hw
from headwater.errors import InvalidInput, InvalidSetting, NotFittedError, UnsupportedModel
from headwater.hf import HfComposableInfluence
from headwater.jax import JaxComposableInfluence, cross_entropy, squared_error
from headwater.sklearn import SklearnComposableInfluence
from headwater.torch import TorchComposableInfluence

RNG = np.random.default_rng(1)
X, Y = RNG.standard_normal((17, 4)).astype(np.float32), np.arange(17) % 3
torch.manual_seed(0)
NET = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
PARAMS = {"w": jnp.asarray(RNG.standard_normal((4, 3)), dtype=jnp.float32), "b": jnp.zeros(3)}


def affine(params, x):
    return x @ params["w"] + params["b"]


def scores(influence, train=(X, Y), query=(X[:3], Y[:3])):
    return influence.fit(train).attribute(train, query).values


def tensors():
    return [(torch.tensor(X), torch.tensor(Y))]


def bert():
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    torch.manual_seed(1)
    return BertForSequenceClassification(BertConfig(vocab_size=12, num_labels=3, **sizes)).eval()


TOKENS = [{"input_ids": [1 + (k + j) % 11 for j in range(3 + k % 3)], "labels": k % 3} for k in range(8)]


def test_torch_modules():
    expected = scores(TorchComposableInfluence(NET, nn.CrossEntropyLoss(), hw.Ekfac()), tensors())
    for loss in ("cross_entropy", "Cross-Entropy", nn.CrossEntropyLoss(), nn.functional.cross_entropy):
        for method in (None, "ekfac", "Ekfac", hw.Ekfac()):
            found = hw.Influence(NET, loss, method)
            assert type(found) is TorchComposableInfluence
            np.testing.assert_array_equal(scores(found, tensors()), expected)
    known = scores(TorchComposableInfluence(NET, nn.CrossEntropyLoss(), hw.Kfac()), tensors())
    np.testing.assert_array_equal(scores(hw.Influence(NET, "cross_entropy", "kfac"), tensors()), known)
    given = TensorDataset(*tensors()[0])
    options = {"blocks": "full", "damping": hw.relative(0.5), "batch_size": 5}
    known = TorchComposableInfluence(NET, nn.CrossEntropyLoss(), hw.Direct(), **options)
    np.testing.assert_array_equal(
        scores(hw.Influence(NET, "cross_entropy", "direct", **options), given), scores(known, given)
    )
    column = nn.Linear(4, 1)
    y = torch.tensor(X[:, :1])
    for word, loss in {"mse": nn.MSELoss(), "binary_cross_entropy": nn.BCEWithLogitsLoss()}.items():
        known = TorchComposableInfluence(column, loss, hw.Ekfac())
        rows = [(tensors()[0][0], (y > 0).float())]
        np.testing.assert_array_equal(scores(hw.Influence(column, word), rows, rows), scores(known, rows, rows))


def test_modules_in_wrappers_are_what_is_inside():
    found = hw.Influence(nn.DataParallel(NET), "cross_entropy")
    assert type(found) is TorchComposableInfluence and found.model is NET
    assert type(hw.Influence(nn.DataParallel(bert()))) is HfComposableInfluence


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # between PEFT and transformers
def test_pretrained_models_and_adapters():
    adapted = get_peft_model(bert(), LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")).eval()
    for model in (bert(), adapted):
        found = hw.Influence(model, method="grad-dot", batch_size=3)
        assert type(found) is HfComposableInfluence
        known = HfComposableInfluence(model, hw.GradDot(), batch_size=3)
        np.testing.assert_array_equal(scores(found, TOKENS, TOKENS), scores(known, TOKENS, TOKENS))
    assert hw.Influence(bert()).method == hw.Ekfac()
    with pytest.raises(InvalidInput, match=r"BertForSequenceClassification has its own: leave it out\. task="):
        hw.Influence(bert(), "cross_entropy")


def test_fitted_estimators():
    frame = pd.DataFrame(X, columns=list("abcd"), index=[f"loan {k}" for k in range(17)])
    pipeline = make_pipeline(StandardScaler(), LogisticRegression()).fit(frame, Y)
    search = GridSearchCV(LogisticRegression(), {"C": [1.0]}, cv=2).fit(frame, Y)
    for model in (pipeline, search, LogisticRegression().fit(frame, Y), Ridge().fit(frame, Y)):
        found = hw.Influence(model)
        assert type(found) is SklearnComposableInfluence and found.method == hw.Direct()
        known = SklearnComposableInfluence(model, hw.Direct(), damping=0.0)
        rows = [(frame, Y)]
        np.testing.assert_array_equal(
            scores(found, (frame, Y), (frame[:3], Y[:3])), scores(known, rows, [(frame[:3], Y[:3])])
        )
    assert found.attribute((frame, Y), (frame[:3], Y[:3])).train_ids.tolist() == list(frame.index)
    with pytest.raises(InvalidInput, match="has its own, which it was fitted to: leave it out"):
        hw.Influence(pipeline, "cross_entropy")
    for model in (LogisticRegression(), make_pipeline(StandardScaler(), Ridge()), GridSearchCV(Ridge(), {})):
        with pytest.raises(NotFittedError, match="fit"):
            hw.Influence(model)


@pytest.mark.parametrize(
    "model", [RandomForestClassifier(), HistGradientBoostingRegressor(), SVC(), KNeighborsClassifier()]
)
def test_estimators_without_gradients_are_sent_to_retraining(model):
    said = f"{type(model).__name__} has no parameters .*retraining fits it.*headwater.evaluate.retrain"
    for given in (model, make_pipeline(StandardScaler(), model), model.fit(X, Y)):
        with pytest.raises(UnsupportedModel, match=said):
            hw.Influence(given)


def test_linear_estimators_that_are_not_known_are_not():
    with pytest.raises(UnsupportedModel, match="LinearSVC is not supported; supported are LinearRegression, Ridge"):
        hw.Influence(LinearSVC().fit(X, Y))


@pytest.mark.slow
def test_functions_with_parameters_give_the_numbers_of_their_class():
    known = scores(JaxComposableInfluence(affine, PARAMS, cross_entropy, hw.Direct()))
    for found in (
        hw.Influence((affine, PARAMS), "cross_entropy", "direct"),
        hw.Influence(affine, cross_entropy, hw.Direct(), params=PARAMS),
    ):
        np.testing.assert_array_equal(scores(found), known)


def test_functions_with_parameters():
    for found in (
        hw.Influence((affine, PARAMS), "cross_entropy"),
        hw.Influence(affine, cross_entropy, params=PARAMS, damping=0.1),
    ):
        assert type(found) is JaxComposableInfluence
        assert found.method == hw.Ekfac()
        assert found.params["w"].shape == (4, 3)
    assert set(found.damping.values()) == {0.1}
    with pytest.raises(UnsupportedModel, match=r"affine is a function.*\(function, parameters\), or params="):
        hw.Influence(affine, "cross_entropy")


@pytest.mark.slow
def test_modules_of_flax_and_equinox():
    batches, queries = [(X, Y)], [(X[:3], Y[:3])]
    dense = linen.Dense(3)
    variables = dense.init(jax.random.key(0), X[:1])
    known = scores(JaxComposableInfluence(dense.apply, variables, cross_entropy, hw.Direct()), batches, queries)
    for given, params in (((dense, variables), {}), (dense, {"params": variables})):
        found = hw.Influence(given, "cross_entropy", "direct", **params)
        np.testing.assert_allclose(scores(found, batches, queries), known, rtol=1e-5)
    with pytest.raises(UnsupportedModel, match=r"Dense does not hold its parameters; pass \(model, parameters\)"):
        hw.Influence(dense, "cross_entropy")

    module = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    graph, state = nnx.split(module, nnx.Param)
    inner = JaxComposableInfluence(lambda p, x: nnx.merge(graph, p)(x), state, cross_entropy, hw.Direct())
    found = hw.Influence(module, "cross_entropy", "direct")
    np.testing.assert_allclose(scores(found, batches, queries), scores(inner, batches, queries), rtol=1e-5)

    network = eqx.nn.Linear(4, 3, key=jax.random.key(2))
    arrays, static = eqx.partition(network, eqx.is_inexact_array)
    inner = JaxComposableInfluence(lambda p, x: jax.vmap(eqx.combine(p, static))(x), arrays, squared_error, hw.Direct())
    rows = [(X, X[:, :3])]
    found = hw.Influence(network, "mse", "direct")
    np.testing.assert_allclose(scores(found, rows, rows), scores(inner, rows, rows), rtol=1e-5)
    with pytest.raises(UnsupportedModel, match="holds its parameters; leave params out"):
        hw.Influence(network, "mse", params=arrays)


# What is refused, and why ---------------------------------------------------------------------------------------------

UNKNOWN = {
    "an object": (object(), r"object is no model that is known here\. Taken are a torch\.nn\.Module.*equinox\.Module"),
    "a class": (nn.Linear, "the class Linear; pass an instance"),
    "a class of an estimator": (Ridge, "the class Ridge; pass an instance"),
    "a name": ("gpt2", r"a name, 'gpt2'; load it first, with from_pretrained\('gpt2'\)"),
    "a tuple": ((1, 2, 3), r"a tuple of 3; expected \(function, parameters\)"),
    "an array": (X, "ndarray is no model"),
}


@pytest.mark.parametrize("what", UNKNOWN)
def test_what_is_no_model_is_told_what_is(what):
    model, said = UNKNOWN[what]
    with pytest.raises(UnsupportedModel, match=said):
        hw.Influence(model, "cross_entropy")


def test_losses_and_methods_that_mean_nothing():
    for model in (NET, (affine, PARAMS)):
        with pytest.raises(InvalidInput, match=r"no loss; .*'cross_entropy', 'binary_cross_entropy', 'mse'"):
            hw.Influence(model)
        with pytest.raises(InvalidInput, match="loss is 'hinge'; the words that are known are 'cross_entropy'"):
            hw.Influence(model, "hinge")
    with pytest.raises(InvalidInput, match=r"loss is a method, Ekfac.*pass it as method="):
        hw.Influence(NET, hw.Ekfac())
    with pytest.raises(InvalidInput, match=r"class CrossEntropyLoss; pass an instance"):
        hw.Influence(NET, nn.CrossEntropyLoss)
    with pytest.raises(
        InvalidSetting, match=r"method is 'shapley'; expected settings such as hw.Ekfac\(\), or .*'trak'"
    ):
        hw.Influence(NET, "mse", "shapley")
    with pytest.raises(InvalidSetting, match=r"the class Kfac; pass its settings: hw.Kfac\(\)"):
        hw.Influence(NET, "mse", hw.Kfac)
    for method in ("unrolled", "Source", hw.Unrolled):
        with pytest.raises(InvalidSetting, match=r'record of the training.*pass hw\.(Unrolled|Source)\("folder"\)'):
            hw.Influence(NET, "mse", method)


def test_every_method_has_its_name_at_the_door():
    for entry in hw.METHODS:
        if entry.name == "representer":
            continue
        assert hw.Influence(NET, "cross_entropy", entry.name).method == entry.cls()
    with pytest.raises(InvalidSetting, match=r"no default settings: pass hw\.Representer\(l2=\.\.\.\)"):
        hw.Influence(NET, "cross_entropy", "representer")


@pytest.mark.parametrize(
    ("model", "loss", "cls"),
    [
        (NET, "mse", TorchComposableInfluence),
        ((affine, PARAMS), "mse", JaxComposableInfluence),
        (Ridge().fit(X, Y), None, SklearnComposableInfluence),
        (bert(), None, HfComposableInfluence),
    ],
)
def test_an_option_that_is_not_known_is_named_with_those_that_are(model, loss, cls):
    said = rf"'dampings' is no option of {cls.__name__}\. Did you mean 'damping'\? It takes .*blocks, damping"
    with pytest.raises(InvalidSetting, match=said):
        hw.Influence(model, loss, dampings=0.1)


@pytest.mark.slow
def test_no_other_framework_is_imported():
    code = """
import sys, torch, headwater as hw
hw.Influence(torch.nn.Linear(2, 2), "mse")
try:
    hw.Influence(object(), "mse")
except TypeError:
    pass
print(*sorted({"jax", "sklearn", "transformers", "pandas", "datasets"} & set(sys.modules)))
"""
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.split() == []
