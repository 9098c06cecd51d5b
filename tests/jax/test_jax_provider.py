"""Gradients and products of JAX functions, against plain differentiation one row at a time and against torch."""

from functools import cache

import jax
import jax.numpy as jnp
import jax_models
import numpy as np
import pytest
from jax_models import CASES

from headwater.gradients.algebra import Dense, Sum
from headwater.gradients.outer import Outer, RowSparse
from headwater.jax import JaxBatch, JaxGradientProvider, squared_error
from headwater.testing import StructuredProviderContract
from headwater.torch import TorchBatch, TorchGradientProvider


@cache
def case_of(name):
    return CASES[name]()


@cache
def provider_of(name, blocks="full"):
    case = case_of(name)
    return JaxGradientProvider(case.apply, case.params, case.loss, blocks=blocks, likelihood=case.likelihood)


@cache
def truth(name, what):
    found = {"grads": jax_models.grads, "mixed": jax_models.mixed_grads}
    return found[what](case_of(name)) if what in found else jax_models.curvature(case_of(name), what)


class JaxProvider(StructuredProviderContract):
    name = ""
    fishers = ("exact", "sampled", "empirical")
    rows = 7

    def provider(self):
        return provider_of(self.name)

    def array(self, values):
        return jax_models.jnp.asarray(values)

    def batch(self, index):
        case = case_of(self.name)
        return JaxBatch(case.x[list(index)], case.y[list(index)])

    def slow_grads(self):
        return truth(self.name, "grads")[: self.rows]

    def slow_mixed_grads(self):
        mixed = truth(self.name, "mixed")
        return None if mixed is None else mixed[: self.rows]


class TestKernels(JaxProvider):
    """The maths in NumPy's arrays, as users have it."""

    name = "kernels"
    rows = jax_models.models.TRAIN

    def provider(self):
        return provider_of(self.name).in_numpy()

    def array(self, values):
        return np.asarray(values)

    def slow_curvature(self, kind):
        return truth(self.name, kind)


@pytest.mark.slow
class TestKernelsInJax(TestKernels):
    """JAX's arrays, each of whose operations is compiled for each shape: `test_gradients_in_numpy_are_those_in_jax` is
    fast."""

    def provider(self):
        return provider_of(self.name)

    def array(self, values):
        return jax_models.jnp.asarray(values)


@pytest.mark.slow
class TestOdd(JaxProvider):
    name = "odd"
    rows = jax_models.models.TRAIN

    def slow_curvature(self, kind):
        return truth(self.name, kind)


@pytest.mark.slow
class TestLanguage(JaxProvider):
    name = "language"
    fishers = ("sampled", "empirical")


@pytest.mark.parametrize("blocks", ["layer", pytest.param("parameter", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["mlp", "images", "language"])
def test_gradients_and_their_structure_are_those_of_torch(name, blocks):
    case = case_of(name)
    provider = provider_of(name, blocks)
    twin = TorchGradientProvider(case.twin.model, case.twin.loss, blocks=blocks)
    mine, theirs = provider.grads(JaxBatch(case.x, case.y)), twin.grads(TorchBatch(case.twin.x, case.twin.y))
    assert sum(provider.sizes.values()) == sum(twin.sizes.values())
    assert sorted(mine) == sorted(theirs)
    for name_ in theirs:
        mine_by_kind, theirs_by_kind = (sorted(v.parts, key=kind_and_size) for v in (mine[name_], theirs[name_]))
        for one, other in zip(mine_by_kind, theirs_by_kind, strict=True):
            assert type(one) is type(other)
            assert one.shape == other.shape
            assert getattr(one, "positions", 0) == getattr(other, "positions", 0)
            same(one.dense(), other.dense().numpy())


def kind_and_size(part):
    return type(part).__name__, part.shape, float(np.abs(np.asarray(part.dense())).sum())


def same(got, expected, tolerance=1e-10):
    got, expected = np.asarray(got), np.asarray(expected)
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() <= tolerance * np.abs(expected).max()


def test_what_is_a_weight_keeps_its_structure():
    kinds = {
        name: {part: type(value) for part, value in zip(names_of(name), values_of(name), strict=True)}
        for name in ("kernels", "images", "language", "odd")
    }
    assert set(kinds["kernels"].values()) == {Outer}
    assert kinds["images"]["wide.weight"] is kinds["images"]["turn.weight"] is Outer
    assert kinds["images"]["split.weight"] is Outer
    assert kinds["images"]["tight.weight"] is Dense
    assert kinds["language"]["tokens.weight"] is Sum
    assert kinds["language"]["position"] is Dense
    assert kinds["odd"]["2.0"] is kinds["odd"]["2.1"] is kinds["odd"]["0.1"] is Outer  # the head, in remat, a stack
    assert kinds["odd"]["0.0"] is kinds["odd"]["1.loop"] is kinds["odd"]["1.scale"] is Dense


def structured(name):
    """The provider whose functions other claims compile too."""
    return provider_of(name, "layer" if name in ("images", "language") else "full")


def values_of(name):
    case = case_of(name)
    found = structured(name).grads(JaxBatch(case.x, case.y))
    return [part for value in found.values() for part in value.parts]


def names_of(name):
    """After a look at rows."""
    values_of(name)
    return [part.weight.parameter for layout in structured(name).layouts.values() for part in layout.parts]


def test_gradients_of_an_odd_function_are_plain_gradients():
    case = case_of("odd")
    same(provider_of("odd").flat_grads(JaxBatch(case.x, case.y)), truth("odd", "grads"))


def test_a_table_alone_is_never_made_dense():
    case = case_of("language")

    def apply(table, ids):
        return jax_models.jnp.take(table["words"], ids, axis=0).sum(1)

    table = {"words": case.params["tokens"].weight}
    provider = JaxGradientProvider(apply, table, case.loss)
    (part,) = provider.grads(JaxBatch(case.x, case.y[:, 0] % 4))["full"].parts
    assert isinstance(part, RowSparse)
    assert part.ids.shape == case.x.shape


@pytest.mark.parametrize("name", ["mlp", "kernels"])
@pytest.mark.parametrize("kind", ["ggn", "hessian"])
def test_curvature_products_are_those_of_torch(name, kind):
    case = case_of(name)
    twin = TorchGradientProvider(case.twin.model, case.twin.loss, blocks="layer")
    for block in ("first", "second"):
        eye = np.eye(twin.sizes[block])
        mine = provider_of(name, "layer").curvature_product(
            JaxBatch(case.x, case.y), block, jax_models.jnp.asarray(eye), kind
        )
        batch = TorchBatch(case.twin.x, case.twin.y)
        theirs = twin.curvature_product(batch, block, jax_models.torch.as_tensor(eye), kind)
        if name == "mlp":
            same(mine, theirs)
        same(np.linalg.eigvalsh(mine), np.linalg.eigvalsh(theirs.numpy()))


def test_the_same_rows_have_the_same_keys_in_torch():
    case = case_of("mlp")
    twin = TorchGradientProvider(case.twin.model, case.twin.loss)
    np.testing.assert_array_equal(
        provider_of("mlp").row_keys(JaxBatch(case.x, case.y)), twin.row_keys(TorchBatch(case.twin.x, case.twin.y))
    )


def test_a_weight_of_two_means_the_row_twice():
    case, provider = case_of("kernels"), provider_of("kernels")
    weighted = JaxBatch(case.x[:3], case.y[:3], weights=np.array([2.0, 1.0, 0.0]))
    plain = JaxBatch(case.x[[0, 0, 1]], case.y[[0, 0, 1]])
    same(provider.flat_grads(weighted).sum(0), provider.flat_grads(plain).sum(0))
    eye = jax_models.jnp.eye(provider.n_parameters)
    for kind in ("ggn", "hessian"):
        one, other = (provider.curvature_product(batch, "full", eye, kind) for batch in (weighted, plain))
        same(one, other)
    same(provider.flat_mixed_grads(weighted)[0], 2 * provider.flat_mixed_grads(plain)[0])


@pytest.mark.slow
def test_losses_margins_and_own_ggn():
    case, provider = case_of("mlp"), provider_of("mlp")
    twin = TorchGradientProvider(case.twin.model, case.twin.loss)
    mine, theirs = JaxBatch(case.x, case.y), TorchBatch(case.twin.x, case.twin.y)
    same(provider.losses(mine), twin.losses(theirs))
    for function in ("margin", "logit"):
        same(provider.of_output(function).losses(mine), twin.of_output(function).losses(theirs))
        same(provider.of_output(function).flat_grads(mine), twin.of_output(function).flat_grads(theirs))
    draws = [draw["full"].flat() for draw in provider.ggn_grads(mine)]
    same(sum(g.T @ g for g in draws), truth("mlp", "ggn"))


def test_parameters_are_in_the_order_of_flat_gradients():
    flat, _ = jax_models.flattened(case_of("odd"))
    same(provider_of("odd").parameters("full"), flat)
    assert provider_of("odd").coverage_fraction == 1.0


@pytest.mark.slow
def test_gradients_in_float64_are_plain_and_know_their_rows():
    case = case_of("kernels")
    narrow = jax_models.jax.tree.map(lambda v: v.astype("float32"), case.params)
    provider = JaxGradientProvider(case.apply, narrow, case.loss, blocks="layer")
    wide, batch = provider.in_float64(), JaxBatch(case.x.astype("float32"), case.y)
    assert (provider.dtype, wide.dtype) == ("float32", "float64")
    np.testing.assert_array_equal(wide.row_keys(batch), provider.row_keys(batch))
    same(wide.flat_grads(batch), provider.flat_grads(batch), 1e-5)
    (mine,), (theirs,) = (p.fisher_grads(batch, "sampled") for p in (provider, wide))
    same(mine["first"].flat(), theirs["first"].flat(), 1e-5)
    with jax_models.jax.enable_x64(False):
        assert provider.in_float64() is None


def test_a_key_of_random_numbers_may_stand_among_the_parameters() -> None:
    params = {"w": jnp.ones((3, 2)), "rng": jax.random.key(0)}
    other = {"w": jnp.ones((3, 2)), "rng": jax.random.key(1)}
    first, second = (JaxGradientProvider(lambda p, x: x @ p["w"], p, squared_error) for p in (params, other))
    assert list(first.sizes.values()) == [6]
    assert first.fingerprint() != second.fingerprint()
