"""What JAX compiles for scores, and that what NumPy does in its place gives the same numbers."""

import logging
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import jax_models  # noqa: F401  # JAX in double precision
import numpy as np
import pytest

import headwater as hw
from headwater.attributor import Attributor
from headwater.jax import (
    CrossEntropy,
    JaxBatch,
    JaxComposableInfluence,
    JaxGradientProvider,
    compilation_cache,
    cross_entropy,
)

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(40, 5)), RNG.integers(0, 3, 40)
PARAMS = {
    f"layer{k}": {"w": jnp.asarray(RNG.normal(size=s)), "b": jnp.zeros(s[1])} for k, s in enumerate([(5, 7), (7, 3)])
}
TRAIN, QUERY = [(X[:16], Y[:16]), (X[16:], Y[16:])], [(X[:6], Y[:6])]


def fresh():
    """Another function each time, for which nothing is compiled yet."""

    def apply(params, x):
        hidden = jnp.tanh(x @ params["layer0"]["w"] + params["layer0"]["b"])
        return hidden @ params["layer1"]["w"] + params["layer1"]["b"]

    return apply


@contextmanager
def compilations():
    """The names of the programs that JAX compiles meanwhile."""
    found = []

    class Kept(logging.Handler):
        def emit(self, record):
            said = record.getMessage()
            if "Finished XLA compilation" in said:
                found.append(said.split("jit(", 1)[-1].split(")")[0])

    handler, logger = Kept(), logging.getLogger("jax._src.dispatch")
    before = logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    try:
        with jax.log_compiles():
            yield found
    finally:
        logger.removeHandler(handler)
        logger.propagate = before


@pytest.mark.parametrize(
    ("method", "programs"),
    [
        (hw.GradDot(), {"_look", "gradients"}),
        (hw.Ekfac(), {"_look", "gradients", "outputs_and_losses", "_gradient", "pulled_back"}),
        (hw.Ekfac(fisher="sampled"), {"_look", "gradients", "outputs_and_losses", "_gradient", "pulled_back"}),
    ],
)
def test_first_scores_compile_each_derivative_once_and_no_algebra(method, programs):
    influence = JaxComposableInfluence(fresh(), PARAMS, cross_entropy, method, damping=0.1)
    with compilations() as found:
        influence.fit(TRAIN).attribute(TRAIN, QUERY)
    assert len(found) == len(set(found)) and set(found) <= programs
    with compilations() as again:
        influence.fit([(X[:9], Y[:9]), (X[9:], Y[9:])]).attribute([(X[:3], Y[:3])], [(X[:2], Y[:2])])
    assert not again


def test_gradients_in_numpy_are_those_in_jax():
    provider = JaxGradientProvider(fresh(), PARAMS, cross_entropy, blocks="layer")
    batch = JaxBatch(X[:11], Y[:11], weights=RNG.uniform(size=11))
    found = []
    for each in (provider.in_numpy(), provider.in_jax()):
        found.append([array for value in each.grads(batch).values() for part in value.parts for array in part.arrays])
        vectors = np.ones((2, provider.sizes["layer0"]))
        found[-1] += [each.curvature_product(batch, "layer0", each.asked(vectors), "ggn"), each.parameters("layer1")]
        found[-1] += [each.losses(batch), each.row_weights(batch)]
    for ours, theirs in zip(*found, strict=True):
        assert isinstance(ours, np.ndarray) and isinstance(theirs, jax.Array) and ours.dtype == theirs.dtype
        assert np.abs(ours - np.asarray(theirs)).max() <= 1e-12 * np.abs(ours).max()


@pytest.mark.slow  # JAX compiles each operation of the algebra: a minute in all
@pytest.mark.parametrize("method", [hw.GradDot(), hw.Kfac(), hw.Ekfac(), hw.Ekfac(fisher="sampled"), hw.Cg()])
def test_scores_by_numpy_are_those_by_jax(method):
    apply = fresh()
    ours = JaxComposableInfluence(apply, PARAMS, cross_entropy, method, damping=0.1).fit(TRAIN)
    jaxs = JaxGradientProvider(apply, PARAMS, cross_entropy, blocks="layer")
    theirs = Attributor(jaxs, method, damping=0.1).fit(TRAIN)
    one, other = (np.asarray(each.attribute(TRAIN, QUERY)) for each in (ours, theirs))
    assert np.abs(one - other).max() <= 1e-12 * np.abs(other).max()


def test_tensors_are_handed_out_as_jaxs_and_taken_back():
    influence = JaxComposableInfluence(fresh(), PARAMS, cross_entropy, hw.Ekfac(), damping=0.1).fit(TRAIN)
    rows = X[:4], Y[:4], X, Y
    factors = influence.influence_factors(X[:4], Y[:4])
    found = [influence.influences(*rows), influence.influences_from_factors(factors, X, Y)]
    found += [factors, *influence.influences_by_block(*rows).values(), *influence.damping_path([0.1], *rows)]
    found += [influence.influences(*rows, mode="perturbation")]
    assert all(isinstance(each, jax.Array) for each in found)
    assert jnp.allclose(found[0], found[1], rtol=1e-12)


def test_a_users_likelihood_gets_arrays_of_jax():
    seen = []

    class Mine(CrossEntropy):
        def exact(self, loss, output, target):
            seen.extend([output, target])
            return super().exact(loss, output, target)

    provider = JaxGradientProvider(fresh(), PARAMS, cross_entropy, likelihood=Mine()).in_numpy()
    provider.fisher_grads(JaxBatch(X[:4], Y[:4]), "exact")
    assert seen and all(isinstance(each, jax.Array) for each in seen)


def test_draws_of_a_weight_that_is_used_straight_and_transposed_have_inputs_of_their_own():
    w = jnp.asarray(RNG.normal(size=(5, 4)))

    def apply(w, x):
        return jnp.tanh(x @ w) @ w.T

    y = RNG.integers(0, 5, 40)
    provider = JaxGradientProvider(apply, w, cross_entropy).in_numpy()
    batch = JaxBatch(X, y)
    draws = [next(iter(draw.values())).flat() for draw in provider.ggn_grads(batch)]
    found = sum(draw.T @ draw for draw in draws)
    expected = provider.curvature_product(batch, next(iter(provider.layouts)), np.eye(20), "ggn")
    assert np.abs(found - expected).max() <= 1e-12 * np.abs(expected).max()


def test_what_was_compiled_is_kept_in_a_folder_while_that_is_asked_for(tmp_path):
    before = jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs
    with compilation_cache(tmp_path):
        JaxComposableInfluence(fresh(), PARAMS, cross_entropy, hw.GradDot()).fit(TRAIN).attribute(TRAIN, QUERY)
        names = {path.name.split("-")[0] for path in tmp_path.iterdir()}
    assert {"jit__look", "jit_gradients"} <= names
    assert before == (jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs)
    kept = len(list(tmp_path.iterdir()))
    jax.jit(lambda x: x * 3 + 1)(jnp.ones(3))
    assert len(list(tmp_path.iterdir())) == kept
