"""`measurement=` by name: scikit-learn's own functions, moved by hand, are the truth; the sign is that of help."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from sklearn.linear_model import LinearRegression, LogisticRegression, PoissonRegressor, Ridge, RidgeClassifier
from torch import nn

import headwater as hw
from headwater.errors import InvalidSetting, UnsupportedModel
from headwater.gradients.measurements import NAMED
from headwater.jax import JaxGradientProvider
from headwater.jax.losses import cross_entropy
from headwater.sklearn import SklearnBatch, SklearnComposableInfluence, SklearnGradientProvider
from headwater.torch import TorchGradientProvider

jax.config.update("jax_enable_x64", True)
rng = np.random.default_rng(3)
X = rng.normal(size=(60, 3))
Y = {
    "binary": np.where(X[:, 0] + rng.normal(size=60) > 0, "paid", "denied"),
    "classes": np.array([4, 8, 15])[(X[:, 0] + rng.normal(size=60) > 0).astype(int) + (X[:, 1] > 0)],
    "values": X @ [1.0, -1.0, 0.5] + rng.normal(size=60),
    "counts": rng.poisson(np.exp(0.5 * X[:, 0])).astype(float),
}
ESTIMATORS: dict[str, Any] = {
    "binary": LogisticRegression(C=0.5, tol=1e-10),
    "classes": LogisticRegression(C=0.5, tol=1e-10),
    "values": Ridge(alpha=3.0),
    "counts": PoissonRegressor(alpha=0.1, tol=1e-10),
}
FITTED = {name: deepcopy(estimator).fit(X, Y[name]) for name, estimator in ESTIMATORS.items()}


def probability(estimator: Any, x: Any, y: Any) -> Any:
    return estimator.predict_proba(x)[np.arange(len(y)), np.searchsorted(estimator.classes_, y)]


def odds(estimator: Any, x: Any, y: Any) -> Any:
    p = probability(estimator, x, y)
    return np.log(p / (1 - p))


def own_logit(estimator: Any, x: Any, y: Any) -> Any:
    z = estimator.decision_function(x)
    if z.ndim == 1:
        return np.where(y == estimator.classes_[1], z, -z)
    return z[np.arange(len(y)), np.searchsorted(estimator.classes_, y)]


TRUTH: list[tuple[str, str, Any]] = [
    *[
        (case, name, function)
        for case in ("binary", "classes")
        for name, function in (
            ("probability", probability),
            ("log_probability", lambda e, x, y: np.log(probability(e, x, y))),
            ("margin", odds),
            ("logit", own_logit),
        )
    ],
    ("binary", "output", lambda e, x, y: e.decision_function(x)),
    ("values", "output", lambda e, x, y: e.predict(x)),
    ("values", "prediction", lambda e, x, y: e.predict(x)),
    ("counts", "output", lambda e, x, y: np.log(e.predict(x))),
    ("counts", "prediction", lambda e, x, y: e.predict(x)),
]


def moved(estimator: Any, step: np.ndarray) -> Any:
    """With other coefficients and intercepts: [o, features + 1] flat."""
    found, size = deepcopy(estimator), estimator.coef_.size
    found.coef_ = estimator.coef_ + step[:size].reshape(estimator.coef_.shape)
    found.intercept_ = estimator.intercept_ + step[size:].reshape(np.shape(estimator.intercept_))
    return found


@pytest.mark.parametrize("case", FITTED)
def test_gradients_are_minus_those_of_scikit_learns_own_numbers(case: str) -> None:
    estimator, x, y = FITTED[case], X[:6], Y[case][:6]
    for name, function in [(name, function) for kind, name, function in TRUTH if kind == case]:
        provider = SklearnGradientProvider(estimator, measurement=name, blocks="parameter")  # type: ignore[arg-type]
        grads = provider.grads(provider.as_batch(x, y), query=True)
        got = np.concatenate([grads["coef"].flat(), grads["intercept"].flat()], axis=1)
        h = 1e-5
        steps = h * np.eye(got.shape[1])
        slopes = [(function(moved(estimator, s), x, y) - function(moved(estimator, -s), x, y)) / (2 * h) for s in steps]
        np.testing.assert_allclose(got, -np.stack(slopes, axis=1), rtol=0, atol=1e-8, err_msg=name)
        np.testing.assert_allclose(provider.losses(provider.as_batch(x, y), query=True), -function(estimator, x, y))
        assert provider.explained == f"negative_{name}"
        plain = provider.in_float64().grads(provider.as_batch(x, y), query=True)
        np.testing.assert_allclose(plain["coef"].flat(), grads["coef"].flat(), rtol=0, atol=1e-8)


@pytest.mark.parametrize(("case", "name"), [("binary", "probability"), ("classes", "margin"), ("values", "output")])
def test_a_positive_score_is_a_row_without_which_the_number_falls(case: str, name: str) -> None:
    """Refitted without a row: the forecast of unit="removal" is the rise of minus the number."""
    influence = SklearnComposableInfluence(
        FITTED[case],
        hw.Direct("hessian"),
        damping=0.0,
        measurement=name,  # type: ignore[arg-type]
    ).fit([(X, Y[case])])
    query = X[:4], Y[case][:4]
    scores = influence.attribute([(X, Y[case])], [query], unit="removal")
    assert scores.explained == f"negative_{name}"
    function = next(f for kind, known, f in TRUTH if (kind, known) == (case, name))
    rows = np.argsort(-np.abs(scores.values[0]))[:8]
    refitted = [deepcopy(ESTIMATORS[case]).fit(np.delete(X, k, 0), np.delete(Y[case], k, 0)) for k in rows]
    fall = function(FITTED[case], *query)[:, None] - np.stack([function(e, *query) for e in refitted], axis=1)
    np.testing.assert_array_equal(np.sign(fall[0]), np.sign(scores.values[0, rows]))
    np.testing.assert_allclose(scores.values[:, rows], fall, rtol=0, atol=0.25 * np.abs(fall).max())


def test_what_an_estimator_does_not_have_is_refused() -> None:
    two = LinearRegression().fit(X, np.stack([Y["values"], Y["counts"]], axis=1))
    for estimator, name, said in (
        (FITTED["values"], "probability", "log loss of classes"),
        (FITTED["classes"], "output", "this model has 3"),
        (FITTED["binary"], "prediction", "explain='prediction'"),
        (RidgeClassifier().fit(X, Y["binary"]), "margin", "log loss of classes"),
        (two, "output", "this model has 2"),
    ):
        with pytest.raises(UnsupportedModel, match=said):
            SklearnGradientProvider(estimator, measurement=name)
    for given in ("odds", lambda z, y: z):
        with pytest.raises(InvalidSetting, match="expected one of 'probability'"):
            SklearnGradientProvider(FITTED["binary"], measurement=given)  # type: ignore[arg-type]


def test_the_measurement_of_a_prediction_is_about_the_predicted_label() -> None:
    estimator = FITTED["binary"]
    influence = SklearnComposableInfluence(estimator, hw.Direct(), measurement="probability").fit([(X, Y["binary"])])
    train = [(X, Y["binary"])]
    asked = influence.attribute(train, train, explain="prediction")
    assert asked.explained == "negative_probability under the predicted label"
    by_hand = influence.attribute(train, [(X, estimator.predict(X))])
    np.testing.assert_array_equal(asked.values, by_hand.values)


def test_the_same_words_serve_torch_and_jax() -> None:
    """Of one linear model of three classes, as scikit-learn has it."""
    estimator, x = FITTED["classes"], X[:6]
    y = np.searchsorted(estimator.classes_, Y["classes"][:6])
    layer = nn.Linear(3, 3).double()
    with torch.no_grad():
        layer.weight.copy_(torch.as_tensor(estimator.coef_))
        layer.bias.copy_(torch.as_tensor(estimator.intercept_))
    params = {"weight": jnp.asarray(estimator.coef_), "bias": jnp.asarray(estimator.intercept_)}
    for name in ("probability", "log_probability", "margin", "logit"):
        mine = SklearnGradientProvider(estimator, measurement=name, blocks="parameter")  # type: ignore[arg-type]
        expected = mine.grads(mine.as_batch(x, Y["classes"][:6]), query=True)["coef"].flat()
        torchs = TorchGradientProvider(layer, nn.CrossEntropyLoss(), blocks="parameter", measurement=name)
        got = torchs.grads(torchs.as_batch(torch.as_tensor(x), torch.as_tensor(y)), query=True)["weight"].flat()
        np.testing.assert_allclose(np.asarray(got), expected, rtol=0, atol=1e-12)
        jaxs = JaxGradientProvider(
            lambda p, x: x @ p["weight"].T + p["bias"], params, cross_entropy, blocks="parameter", measurement=name
        )
        got = jaxs.grads(jaxs.as_batch(x, y), query=True)["weight"].flat()
        np.testing.assert_allclose(np.asarray(got), expected, rtol=0, atol=1e-12)
        assert mine.explained == torchs.explained == jaxs.explained == f"negative_{name}"


def test_output_is_about_one_number_a_row() -> None:
    x, y = torch.as_tensor(X), torch.as_tensor(Y["values"])[:, None]
    model = nn.Linear(3, 1).double()
    provider = TorchGradientProvider(model, nn.MSELoss(), blocks="parameter", measurement="output")
    batch = provider.as_batch(x, y)
    torch.testing.assert_close(provider.grads(batch, query=True)["weight"].flat(), -x)
    torch.testing.assert_close(provider.losses(batch, query=True), -model(x)[:, 0].detach())
    many = TorchGradientProvider(nn.Linear(3, 2).double(), nn.MSELoss(), measurement="output")
    with pytest.raises(UnsupportedModel, match="one output a row"):
        many.grads(many.as_batch(x, y.expand(-1, 2)), query=True)


def test_another_name_is_refused_in_every_framework() -> None:
    for make in (
        lambda: TorchGradientProvider(nn.Linear(3, 1), nn.MSELoss(), measurement="odds"),
        lambda: JaxGradientProvider(lambda p, x: x @ p, jnp.ones((3, 1)), cross_entropy, measurement="odds"),
    ):
        with pytest.raises(InvalidSetting, match="expected one of 'probability'"):
            make()
    assert list(NAMED) == ["probability", "log_probability", "margin", "logit", "output"]


def test_a_probability_of_almost_one_has_a_gradient_and_no_overflow() -> None:
    estimator = deepcopy(FITTED["binary"])
    estimator.coef_ = estimator.coef_ * 1e4
    provider = SklearnGradientProvider(estimator, measurement="probability")
    batch = provider.prepared(SklearnBatch(X, Y["binary"]))
    assert np.isfinite(provider.grads(batch, query=True)["full"].flat()).all()
