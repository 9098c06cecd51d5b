"""Scores of JAX functions: the contract, and the same numbers as torch with the same weights, for every method."""

from functools import cache

import numpy as np
import pytest
from jax_models import CASES, jax, jnp

import headwater as hw
from headwater.errors import HeadwaterError
from headwater.jax import JaxComposableInfluence
from headwater.testing import InfluenceContract
from headwater.torch import TorchComposableInfluence

pytestmark = pytest.mark.filterwarnings("ignore::headwater.errors.NotConverged")  # LiSSA and ASTRA of few steps

ITERATED = {
    "cg": hw.Cg(tolerance=1e-13),
    "cg alone": hw.Cg(tolerance=1e-13, block=False),
    "block krylov": hw.BlockKrylov(tolerance=1e-13),
    "lissa": hw.Lissa(steps=20, scale=3.0, rows=4),
    "astra": hw.Astra(steps=6, step_size=0.3, rows=4),
    "arnoldi": hw.Arnoldi(rank=10**6, tolerance=1e-13),
}
CLOSED = {
    "grad-dot": hw.GradDot(),
    "grad-cos": hw.GradCos(),
    "tracin": hw.TracIn(0.3),
    "hessian": hw.Direct("hessian", allow_indefinite=True),
    "ggn": hw.Direct("ggn"),
    "fisher": hw.Direct("fisher"),
    "sampled fisher": hw.Direct("fisher", fisher="sampled"),
    "empirical": hw.Direct("empirical_fisher"),
    "nystroem": hw.Nystroem(rank=6),
    "kfac": hw.Kfac(),
    "kfac factored": hw.Kfac("factored", fisher="sampled"),
    "ekfac": hw.Ekfac(),
    "ekfac rank": hw.Ekfac(rank=2),
    "ekfac sampled": hw.Ekfac(fisher="sampled", samples=2),
    "datainf": hw.DataInf(),
    "dual": hw.Dual(),
    "dual ggn": hw.Dual("ggn"),
    "trak": hw.Trak(dimension=None),
    "trak projected": hw.Trak(dimension=16),
    "logra": hw.LoGra(dimension=2),
    "logra pca": hw.LoGra(dimension=2, init="pca"),
    "lorif": hw.LoRif(dimension=3),
    "factgrass": hw.FactGrass(dimension=3),
}
METHODS = CLOSED | ITERATED
FAST = ("grad-dot", "ekfac")
NAMED = ("nystroem", "trak projected", "logra", "logra pca", "lorif", "factgrass")
"""Their random numbers go by the parameters' names, or by the place in the flat vector."""


@cache
def case_of(name):
    return CASES[name]()


def fitted(case, method, **options):
    influence = JaxComposableInfluence(case.apply, case.params, case.loss, method, **options)
    return influence.fit(case.loader())


@cache
def of_torch(name, method):
    case = case_of(name).twin
    influence = TorchComposableInfluence(case.model, case.loss, METHODS[method]).fit(case.loader())
    rows = case.x_query, case.y_query, case.x, case.y
    return tuple(influence.influences(*rows, mode=mode).numpy() for mode in ("up", "perturbation"))


def same(got, expected, tolerance=1e-10):
    got, expected = np.asarray(got), np.asarray(expected)
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() <= tolerance * np.abs(expected).max()


def each(names):
    return [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in names]


@pytest.mark.parametrize("method", each(METHODS))
def test_scores_are_those_of_torch(method):
    influence, case = fitted(case_of("mlp"), METHODS[method]), case_of("mlp")
    for mode, expected in zip(("up", "perturbation"), of_torch("mlp", method), strict=True):
        same(influence.influences(*case.queries, mode=mode), expected)


@pytest.mark.slow
@pytest.mark.parametrize("method", [name for name in METHODS if name not in NAMED])
def test_scores_of_kernels_that_lie_the_other_way_are_those_of_torch(method):
    influence, case = fitted(case_of("kernels"), METHODS[method]), case_of("kernels")
    for mode, expected in zip(("up", "perturbation"), of_torch("mlp", method), strict=True):
        same(influence.influences(*case.queries, mode=mode), expected)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["kfac", "ekfac", "ekfac rank", "ggn", "trak projected"])
@pytest.mark.parametrize("name", ["images"])
def test_scores_of_a_convolutional_net_are_those_of_torch(name, method):
    influence, case = fitted(case_of(name), METHODS[method]), case_of(name)
    for mode, expected in zip(("up", "perturbation"), of_torch(name, method), strict=True):
        same(influence.influences(*case.queries, mode=mode), expected)


@pytest.mark.slow
class TestEkfac(InfluenceContract):
    """On weights that lie as [i, o]."""

    method = hw.Ekfac()

    def array(self, values):
        return jax.numpy.asarray(values)

    def influence(self, damping=None):
        case = case_of("kernels")
        return JaxComposableInfluence(case.apply, case.params, case.loss, self.method, damping=damping, example=case.x)

    def train(self):
        case = case_of("kernels")
        return case.x[:7], case.y[:7]

    def queries(self):
        case = case_of("kernels")
        return case.x_query[:4], case.y_query[:4]

    def take(self, rows, index):
        return tuple(part[np.asarray(index)] for part in rows)


class TestCg(TestEkfac):
    """Products of the GGN, solved for."""

    method = hw.Cg(tolerance=1e-13)


@pytest.mark.slow
def test_representer_scores_of_the_last_layer_are_those_of_torch():
    case, last = case_of("mlp"), {"head": ["second"]}
    options = {"blocks": last, "damping": None}
    mine = JaxComposableInfluence(case.apply, case.params, case.loss, hw.Representer(0.1, tolerance=1e9), **options)
    twin = case.twin
    theirs = TorchComposableInfluence(twin.model, twin.loss, hw.Representer(0.1, tolerance=1e9), **options)
    expected = theirs.fit(twin.loader()).influences(twin.x_query, twin.y_query, twin.x, twin.y)
    same(mine.fit(case.loader()).influences(*case.queries), expected.numpy())


@pytest.mark.slow
def test_what_it_knows_about_itself_is_right():
    case = case_of("kernels")
    influence = fitted(case, hw.Ekfac(), blocks="full")
    assert influence.verify(case.loader(), [(case.x_query, case.y_query)], rows=3, queries=2).passed


def test_a_measurement_may_read_targets_that_train_rows_do_not_have_and_the_loss_those_of_queries():
    """Each is tried on rows of its own kind, whichever come first, and counts what a row costs without either."""
    key = jax.random.PRNGKey(0)
    params = {"w": jax.random.normal(key, (4, 3)), "b": jnp.zeros(3)}
    x = jax.random.normal(jax.random.PRNGKey(1), (12, 4))
    train, query = [(x, {"label": jnp.arange(12) % 3})], [(x[:3], {"weights": jnp.ones((3, 3))})]

    def apply(params, x):
        return x @ params["w"] + params["b"]

    def loss(output, target):
        picked = jnp.take_along_axis(jax.nn.log_softmax(output), target["label"][:, None], axis=1)
        return -picked[:, 0].mean()

    def measurement(output, target):
        return (output * target["weights"]).sum(axis=1).mean()

    def made():
        return JaxComposableInfluence(apply, params, loss, hw.GradDot(), measurement=measurement)

    influence = made().fit(train)
    scores = influence.attribute(train, query).values
    provider = made().source
    assert provider.rows_at_once(provider.as_batch(*query[0])) >= 1  # a query batch comes first
    assert provider.grads(provider.as_batch(*query[0]), query=True).keys() == influence.provider.layouts.keys()
    residual = jax.nn.softmax(apply(params, x)) - jax.nn.one_hot(jnp.arange(12) % 3, 3)
    g = jnp.concatenate([(x[:, :, None] * residual[:, None, :]).reshape(12, -1), residual], axis=1)
    ones = jnp.ones((3, 3))
    q = jnp.concatenate([(x[:3, :, None] * ones[:, None, :]).reshape(3, -1), ones], axis=1)
    np.testing.assert_allclose(scores, np.asarray(q @ g.T), rtol=1e-4, atol=1e-5)


def test_a_measurement_that_mixes_rows_is_refused_at_the_first_queries():
    params, x = {"w": jnp.ones((4, 3))}, jax.random.normal(jax.random.PRNGKey(1), (12, 4))
    influence = JaxComposableInfluence(
        lambda params, x: x @ params["w"],
        params,
        lambda output, target: ((output - target) ** 2).mean(),
        hw.GradDot(),
        measurement=lambda output, target: ((output - output.mean(0)) ** 2).mean(),
    ).fit([(x, x[:, :3])])
    with pytest.raises(HeadwaterError):
        influence.attribute([(x, x[:, :3])], [(x[:5], x[:5, :3])])
