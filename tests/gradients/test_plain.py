"""plain=True: the numbers of the usual way, one row at a time, in each framework; and what it does not take."""

import jax
import jax.numpy as jnp
import jax_models  # noqa: F401  # JAX in double precision, and quick to compile
import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn

from headwater.arrays import as_like
from headwater.errors import InvalidSetting
from headwater.gradients.algebra import Dense
from headwater.jax import JaxGradientProvider
from headwater.sklearn import SklearnGradientProvider
from headwater.testing.contract import host
from headwater.torch import TorchBatch, TorchGradientProvider

RNG = np.random.default_rng(0)
X, Y = RNG.standard_normal((5, 3)), np.array([0, 2, 1, 1, 0])
WEIGHTS = np.array([1.0, 2.0, 0.0, 1.0, 3.0])


def torch_provider(**options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    return TorchGradientProvider(model, nn.CrossEntropyLoss(), blocks="layer", **options)


def jax_provider(**options):
    params = {"w": jnp.asarray(np.random.default_rng(1).standard_normal((3, 3)))}
    return JaxGradientProvider(lambda p, x: jnp.tanh(x) @ p["w"], params, cross_entropy, **options)


def cross_entropy(output, target):
    return -jax.nn.log_softmax(output)[jnp.arange(len(target)), target].mean()


def sklearn_provider(**options):
    return SklearnGradientProvider(LogisticRegression().fit(X, Y), **options)


MAKERS = {"torch": torch_provider, "jax": jax_provider, "sklearn": sklearn_provider}


def batch_of(provider, framework):
    if framework == "torch":
        return TorchBatch(torch.as_tensor(X), torch.as_tensor(Y), torch.as_tensor(WEIGHTS))
    batch = provider.as_batch(X, Y)
    return type(batch)(batch.x, batch.y, WEIGHTS, batch.ids)


@pytest.mark.parametrize("framework", MAKERS)
def test_plain_gradients_products_and_draws_are_the_usual_ones(framework):
    usual, plain = MAKERS[framework](), MAKERS[framework](plain=True)
    batch, other = batch_of(usual, framework), batch_of(plain, framework)
    for query in (False, True):
        for name, value in usual.grads(batch, query=query).items():
            got = plain.grads(other, query=query)[name]
            np.testing.assert_allclose(host(got.flat()), host(value.flat()), atol=1e-9)
    for kind in ("ggn", "hessian"):
        for name, layout in usual.layouts.items():
            vectors = as_like(np.eye(layout.size), usual.parameters(name))
            one, two = (p.curvature_product(b, name, vectors, kind) for p, b in ((usual, batch), (plain, other)))
            np.testing.assert_allclose(host(two), host(one), atol=1e-10)
    (one,), (two,) = (p.fisher_grads(b, "sampled", seed=3) for p, b in ((usual, batch), (plain, other)))
    for name, value in one.items():
        np.testing.assert_allclose(host(two[name].flat()), host(value.flat()), atol=1e-10)


@pytest.mark.parametrize("provider", [torch_provider(), jax_provider()], ids=["torch", "jax"])
def test_plain_stays_with_what_is_made_of_it(provider):
    given = (X, Y) if isinstance(provider, JaxGradientProvider) else map(torch.as_tensor, (X, Y))
    batch = provider.as_batch(*given)
    one = provider.of_output("margin").grads(batch)
    two = provider.in_float64().of_output("margin").grads(batch)
    for name, value in one.items():
        assert all(isinstance(part, Dense) for part in two[name].parts)
        np.testing.assert_allclose(host(two[name].flat()), host(value.flat()), atol=1e-10)


def test_plain_takes_float64_alone():
    with pytest.raises(InvalidSetting, match=r"float64, not float32; in_float64\(\)"):
        TorchGradientProvider(nn.Linear(3, 3), nn.CrossEntropyLoss(), plain=True)
    with pytest.raises(InvalidSetting, match=r"float64, not float32; in_float64\(\)"):
        JaxGradientProvider(lambda p, x: x @ p, np.ones((3, 3), np.float32), cross_entropy, plain=True)
