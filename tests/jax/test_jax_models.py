"""What a user brings: Flax and Equinox models, losses of optax, checkpoints, weights, half precision; and mistakes."""

import equinox as eqx
import flax.linen as linen
import jax_models
import numpy as np
import optax
import pytest
from flax import nnx
from jax_models import CASES, jax, jnp

import headwater as hw
from headwater.errors import (
    InvalidInput,
    InvalidSetting,
    NonFiniteValue,
    RowsInteract,
    UnsupportedLoss,
    UnsupportedModel,
)
from headwater.gradients.likelihoods import OwnHessian
from headwater.gradients.outer import Outer, RowSparse
from headwater.gradients.provider import StructuredGradientProvider
from headwater.jax import CrossEntropy, JaxBatch, JaxComposableInfluence, JaxGradientProvider, SquaredError
from headwater.jax.losses import find_likelihood

DRAW = np.random.default_rng(0)
X, Y = DRAW.standard_normal((6, 5, 5, 2)), DRAW.integers(0, 3, 6)
IDS = DRAW.integers(0, 7, (6, 3))
ROWS = X[:, 0, 0]


class Small(linen.Module):
    """Convolution, normalisation, dense."""

    @linen.compact
    def __call__(self, x):
        x = linen.Conv(4, (3, 3), strides=2)(x)
        x = linen.relu(x).reshape(len(x), -1)
        return linen.Dense(3)(linen.LayerNorm()(x))


def double(params):
    return jax.tree.map(lambda v: v.astype(float), params)


def parts_of(provider, x, y):
    values = provider.grads(JaxBatch(x, y))
    return {
        part.weight.parameter: value
        for name, layout in provider.layouts.items()
        for part, value in zip(layout.parts, values[name].parts, strict=True)
    }


def check_against_plain(provider, x, y):
    plain = provider.in_float64()
    expected = np.asarray(plain.flat_grads(JaxBatch(x, y)))
    got = np.asarray(provider.flat_grads(JaxBatch(x, y)))
    assert np.abs(got - expected).max() <= 1e-12 * np.abs(expected).max()


def test_a_flax_model():
    model = Small()
    params = double(model.init(jax.random.key(0), X[:1]))
    loss = optax.softmax_cross_entropy_with_integer_labels
    provider = JaxGradientProvider(model.apply, params, loss, blocks="layer")
    check_against_plain(provider, X, Y)
    parts = parts_of(provider, X, Y)
    assert list(provider.layouts) == ["params.Conv_0", "params.Dense_0", "params.LayerNorm_0"]
    assert type(parts["params.Conv_0.kernel"]) is type(parts["params.Dense_0.kernel"]) is Outer
    assert parts["params.Dense_0.kernel"].ones
    assert parts["params.Conv_0.kernel"].ones
    assert parts["params.Conv_0.kernel"].positions == 9
    assert provider.normalisation == "none"


@pytest.mark.slow
def test_a_flax_model_with_attention_and_a_table():
    class Words(linen.Module):
        @linen.compact
        def __call__(self, ids):
            x = linen.Embed(7, 4)(ids)
            return linen.Dense(3)(linen.MultiHeadDotProductAttention(2)(x).mean(1))

    model = Words()
    params = double(model.init(jax.random.key(1), IDS[:1]))
    provider = JaxGradientProvider(model.apply, params, jax_models.cross_entropy, blocks="layer")
    check_against_plain(provider, IDS, Y)
    parts = parts_of(provider, IDS, Y)
    kernels = [value for name, value in parts.items() if name.endswith("kernel")]
    assert len(kernels) == 5
    assert all(type(value) is Outer and value.ones for value in kernels)
    assert type(parts["params.Embed_0.embedding"]) is RowSparse


@pytest.mark.slow
def test_a_flax_nnx_model():
    class Two(nnx.Module):
        def __init__(self, rngs):
            self.hidden = nnx.Linear(2, 4, rngs=rngs)
            self.out = nnx.Linear(4, 3, rngs=rngs)

        def __call__(self, x):
            return self.out(jnp.tanh(self.hidden(x)))

    graph, state = nnx.split(Two(nnx.Rngs(0)), nnx.Param)

    def apply(params, x):
        return nnx.merge(graph, params)(x)

    x = X[:, 0, 0]
    provider = JaxGradientProvider(apply, double(state), jax_models.cross_entropy, blocks="layer")
    check_against_plain(provider, x, Y)
    assert all(type(value) is Outer for value in parts_of(provider, x, Y).values())
    assert [name.split(".")[0] for name in provider.layouts] == ["hidden", "out"]


def test_an_equinox_model():
    class Picture(eqx.Module):
        conv: eqx.nn.Conv2d
        head: eqx.nn.Linear

        def __call__(self, x):
            return self.head(jnp.tanh(self.conv(x)).mean((1, 2)))

    one, other = jax.random.split(jax.random.key(0))
    model = Picture(eqx.nn.Conv2d(2, 4, 3, key=one), eqx.nn.Linear(4, 3, key=other))
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def apply(params, x):
        return jax.vmap(eqx.combine(params, static))(x)

    x = np.moveaxis(X, 3, 1)
    provider = JaxGradientProvider(apply, double(params), jax_models.cross_entropy, blocks="layer")
    check_against_plain(provider, x, Y)
    parts = parts_of(provider, x, Y)
    assert list(provider.layouts) == ["conv", "head"]
    assert all(type(value) is Outer and value.ones for value in parts.values())
    assert parts["head.weight"].shape == (3, 5)


def test_an_equinox_table():
    table = eqx.nn.Embedding(7, 4, key=jax.random.key(0))
    params, static = eqx.partition(table, eqx.is_inexact_array)

    def apply(params, ids):
        return jax.vmap(jax.vmap(eqx.combine(params, static)))(ids).sum(1)

    provider = JaxGradientProvider(apply, double(params), jax_models.cross_entropy)
    check_against_plain(provider, IDS, Y)
    assert type(parts_of(provider, IDS, Y)["weight"]) is RowSparse


@pytest.mark.slow
def test_a_function_with_a_derivative_of_its_own_keeps_it():
    @jax.custom_vjp
    def rounded(x):
        return jnp.round(x)

    rounded.defvjp(lambda x: (rounded(x), None), lambda _, g: (g,))

    def apply(p, x):
        return rounded(x @ p["w"]) @ p["v"] + rounded(p["b"])

    params = {"w": DRAW.standard_normal((2, 4)), "v": DRAW.standard_normal((4, 3)), "b": np.ones(3)}
    x = X[:, 0, 0]
    provider = JaxGradientProvider(apply, params, jax_models.cross_entropy)
    check_against_plain(provider, x, Y)
    eye = jnp.eye(provider.n_parameters)
    ggn = np.asarray(provider.curvature_product(JaxBatch(x, Y), "full", eye, "ggn"))
    draws = [draw["full"].flat() for draw in provider.ggn_grads(JaxBatch(x, Y))]
    np.testing.assert_allclose(ggn, sum(g.T @ g for g in draws), atol=1e-12 * np.abs(ggn).max())


def test_rows_may_be_tuples_and_dicts():
    def of_dict(p, x):
        return jnp.take(p["t"], x["ids"], axis=0).mean(1) * x["scale"][:, None]

    table, scale = DRAW.standard_normal((7, 3)), DRAW.standard_normal(6)
    provider = JaxGradientProvider(of_dict, {"t": table}, jax_models.cross_entropy)
    grads = provider.flat_grads(JaxBatch({"ids": IDS, "scale": scale}, Y))

    def of_tuple(p, x):
        return of_dict(p, {"ids": x[0], "scale": x[1]})

    other = JaxGradientProvider(of_tuple, {"t": table}, jax_models.cross_entropy)
    np.testing.assert_array_equal(other.flat_grads(JaxBatch((IDS, scale), Y)), grads)
    with pytest.raises(UnsupportedModel, match=r"one floating-point tensor.*dict of int64, float64"):
        provider.flat_mixed_grads(JaxBatch({"ids": IDS, "scale": scale}, Y))


@pytest.mark.slow
def test_half_precision_is_accumulated_in_float32():
    case = CASES["kernels"]()
    half = jax.tree.map(lambda v: v.astype(jnp.bfloat16), case.params)
    batch = JaxBatch(jnp.asarray(case.x, jnp.bfloat16), case.y)
    provider = JaxGradientProvider(case.apply, half, case.loss, blocks="layer")
    exact = JaxGradientProvider(case.apply, double(half), case.loss, blocks="layer")
    got = provider.flat_grads(batch)
    assert (provider.dtype, str(got.dtype)) == ("bfloat16", "float32")
    expected = np.asarray(exact.flat_grads(JaxBatch(batch.x.astype(float), case.y)))
    assert np.abs(np.asarray(got) - expected).max() < 0.05 * np.abs(expected).max()


@pytest.mark.slow
def test_without_float64_everything_stays_in_float32_and_says_nothing():
    case = CASES["kernels"]()
    with jax.enable_x64(False):
        params = jax.tree.map(lambda v: jnp.asarray(np.asarray(v, np.float32)), case.params)
        x, y = case.x.astype(np.float32), case.y.astype(np.int32)
        for method in (hw.Ekfac(fisher="sampled"), hw.Direct("ggn"), hw.DataInf()):
            influence = JaxComposableInfluence(case.apply, params, case.loss, method).fit([(x, y)])
            scores = influence.influences(x[:2], y[:2], x, y)
            assert str(scores.dtype) == "float32"
            assert np.isfinite(np.asarray(scores)).all()


def test_checkpoints_are_the_mean_over_them():
    case = CASES["mlp"]()
    other = jax.tree.map(lambda v: 1.1 * v, case.params)
    options = {"blocks": "full", "damping": 0.1}

    def scores(**more):
        influence = JaxComposableInfluence(case.apply, case.params, case.loss, hw.GradDot(), **options, **more)
        return np.asarray(influence.fit(case.loader()).influences(*case.queries))

    one = scores()
    both = scores(checkpoints=[case.params, other])
    assert not np.allclose(one, both)
    alone = JaxComposableInfluence(case.apply, other, case.loss, hw.GradDot(), **options).fit(case.loader())
    np.testing.assert_allclose(both, (one + np.asarray(alone.influences(*case.queries))) / 2, rtol=1e-12)
    for wrong, said in ([], "empty"), (other, "one dict"):
        with pytest.raises(InvalidSetting, match=said):
            scores(checkpoints=wrong)
    with pytest.raises(InvalidInput, match=r"Checkpoint 1.*another architecture"):
        scores(checkpoints=[other, {"first": other["first"]}])


def test_other_parameters_are_another_fingerprint():
    case = CASES["mlp"]()
    provider = JaxGradientProvider(case.apply, case.params, case.loss)
    same, other = provider.with_params(case.params), provider.with_params(jax.tree.map(lambda v: -v, case.params))
    assert provider.fingerprint() == same.fingerprint() != other.fingerprint()
    assert jax.tree.structure(other.params) == jax.tree.structure(case.params)


def test_numpy_parameters_are_copied():
    case = CASES["odd"]()
    provider = JaxGradientProvider(case.apply, case.params, case.loss)
    before = np.asarray(provider.flat_grads(JaxBatch(case.x, case.y)))
    case.params[0][0][:] = 0.0
    np.testing.assert_array_equal(provider.flat_grads(JaxBatch(case.x, case.y)), before)


def test_own_blocks_and_what_they_leave_out():
    case = CASES["kernels"]()
    provider = JaxGradientProvider(case.apply, case.params, case.loss, blocks={"late": ["second"]})
    assert provider.coverage.missing == ("first.bias", "first.kernel")
    assert provider.coverage.fraction == 15 / 31
    flat = jnp.asarray(jax_models.grads(case))[:, 16:]
    np.testing.assert_allclose(provider.flat_grads(JaxBatch(case.x, case.y)), flat, atol=1e-14)


def test_losses_of_optax_are_known():
    known = {
        optax.softmax_cross_entropy_with_integer_labels: CrossEntropy,
        optax.squared_error: SquaredError,
        optax.l2_loss: SquaredError,
        jax_models.cross_entropy: CrossEntropy,
    }
    for loss, kind in known.items():
        assert type(find_likelihood(loss, None)) is kind
    assert type(find_likelihood(optax.hinge_loss, None)) is OwnHessian
    assert type(find_likelihood(lambda output, target: optax.l2_loss(output, target), None)) is OwnHessian
    assert type(find_likelihood(None, "squared_error")) is SquaredError


@pytest.mark.parametrize(
    ("loss", "integers"),
    [(optax.sigmoid_binary_cross_entropy, True), (optax.l2_loss, False), (optax.squared_error, False)],
)
def test_the_fisher_of_a_known_loss_is_its_ggn(loss, integers):
    x, y = X[:, 0, 0], (X[:, 1, 1] > 0).astype(float) if integers else X[:, 1, 1]
    provider = JaxGradientProvider(lambda p, x: jnp.sin(x @ p["w"]), {"w": DRAW.standard_normal((2, 2))}, loss)
    draws = provider.fisher_grads(JaxBatch(x, y), "exact")
    fisher = sum(np.asarray(d["full"].flat()).T @ np.asarray(d["full"].flat()) for d in draws)
    ggn = provider.curvature_product(JaxBatch(x, y), "full", jnp.eye(4), "ggn")
    np.testing.assert_allclose(fisher, ggn, atol=1e-12)


def test_a_layer_that_is_called_twice_has_the_positions_of_both_calls():
    def apply(p, x):
        for _ in range(2):
            x = x + jnp.tanh(x + x @ p["w"] + p["b"])
        return x @ p["head"]

    params = {"w": DRAW.standard_normal((2, 2)), "b": np.ones(2), "head": DRAW.standard_normal((2, 3))}
    provider = JaxGradientProvider(apply, params, jax_models.cross_entropy)
    check_against_plain(provider, ROWS, Y)
    part = parts_of(provider, ROWS, Y)["w"]
    assert (type(part), part.positions, part.ones) == (Outer, 2, True)


def test_ids_that_count_from_the_end_or_lie_outside():
    def apply(p, ids):
        return p["t"].at[ids].get(mode="clip").sum(1)

    ids = IDS.copy()
    ids[0], ids[1] = [-1, -2, 0], [9, 6, 1]
    provider = JaxGradientProvider(apply, {"t": DRAW.standard_normal((7, 3))}, jax_models.cross_entropy)
    check_against_plain(provider, ids, Y)
    assert type(parts_of(provider, ids, Y)["t"]) is RowSparse


def test_a_matrix_with_a_product_on_either_side_is_a_sum_of_outer_products():
    def apply(p, x):
        return jnp.tanh(x @ p["w"].T) @ p["w"] @ p["head"]

    params = {"w": DRAW.standard_normal((4, 2)), "head": DRAW.standard_normal((2, 3))}
    provider = JaxGradientProvider(apply, params, jax_models.cross_entropy)
    check_against_plain(provider, ROWS, Y)
    part = parts_of(provider, ROWS, Y)["w"]
    assert (type(part), part.positions) == (Outer, 2)


def test_bias_of_a_product_that_something_else_reads_is_its_own():
    def apply(p, x):
        h = x @ p["w"]
        return jnp.tanh(h + p["b"]) + h

    params = {"w": DRAW.standard_normal((2, 3)), "b": np.ones(3)}
    provider = JaxGradientProvider(apply, params, jax_models.cross_entropy)
    check_against_plain(provider, ROWS, Y)
    assert not parts_of(provider, ROWS, Y)["w"].ones


def test_rows_of_another_shape_keep_the_parts_and_may_fill_them_otherwise():
    def apply(p, x):
        product = x @ p["w"] if x.shape[1] == 2 else (x[:, :2, None] * p["w"]).sum(1)
        return product + p["b"]

    params = {"w": DRAW.standard_normal((2, 3)), "b": np.ones(3)}
    provider = JaxGradientProvider(apply, params, jax_models.cross_entropy)
    two, three = X[:, 0, 0], X[:, 0, :, 0][:, :3]
    check_against_plain(provider, two, Y)
    layouts = provider.layouts
    check_against_plain(provider, three, Y)
    assert provider.layouts == layouts


# Mistakes -------------------------------------------------------------------------------------------------------------


def linear(p, x):
    return x @ p["w"]


W = {"w": DRAW.standard_normal((2, 3))}


def test_rows_that_act_on_each_other_are_refused():
    provider = JaxGradientProvider(lambda p, x: (x - x.mean(0)) @ p["w"], W, jax_models.cross_entropy)
    with pytest.raises(RowsInteract, match="row 0 changes by"):
        provider.grads(JaxBatch(ROWS, Y))


def test_batch_norm_in_train_mode_is_refused():
    class Norm(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen.BatchNorm(use_running_average=False)(linen.Dense(3)(x))

    model = Norm()
    variables = model.init(jax.random.key(0), ROWS)
    state = {"batch_stats": variables["batch_stats"]}

    def apply(params, x):
        return model.apply({"params": params, **state}, x, mutable=["batch_stats"])[0]

    provider = JaxGradientProvider(apply, double(variables["params"]), jax_models.cross_entropy)
    with pytest.raises(RowsInteract):
        provider.grads(JaxBatch(ROWS, Y))


def test_a_loss_over_pairs_of_rows_is_refused():
    def contrast(output, target):
        return jnp.mean((output @ output.T - jnp.eye(len(output))) ** 2)

    with pytest.raises(UnsupportedLoss, match="rows act on each other"):
        JaxGradientProvider(linear, W, contrast).grads(JaxBatch(ROWS, Y))


def test_rows_that_are_not_finite_are_named():
    x = ROWS.copy()
    x[3, 1] = np.nan
    provider = JaxGradientProvider(linear, W, jax_models.cross_entropy)
    with pytest.raises(NonFiniteValue, match=r"rows \[3\]"):
        provider.grads(JaxBatch(x, Y))
    with pytest.raises(NonFiniteValue, match=r"rows \[3\]"):
        provider.curvature_product(JaxBatch(x, Y), "full", jnp.eye(6), "ggn")


def test_a_gradient_that_is_not_finite_names_its_rows():
    def root(output, target):
        return jnp.sqrt(jnp.sum(jnp.maximum(output, 0.0) ** 2, axis=-1))

    x = np.abs(ROWS) + 0.1
    x[4] = 0.0
    with pytest.raises(NonFiniteValue, match=r"block 'full' are not finite for rows \[4\]"):
        JaxGradientProvider(linear, {"w": np.ones((2, 3))}, root).grads(JaxBatch(x, Y))


@pytest.mark.parametrize(
    ("apply", "params", "loss", "said"),
    [
        (linear, {"w": np.arange(6).reshape(2, 3)}, jax_models.cross_entropy, "nothing to attribute"),
        (linear, {"w": "weights"}, jax_models.cross_entropy, "'w' is str"),
        (None, W, jax_models.cross_entropy, "apply is None"),
        (linear, W, "cross_entropy", "loss is 'cross_entropy'"),
    ],
)
def test_what_is_no_function_or_parameter_is_refused(apply, params, loss, said):
    with pytest.raises(InvalidSetting, match=said):
        JaxGradientProvider(apply, params, loss)


@pytest.mark.parametrize(
    ("x", "y", "error", "said"),
    [
        (ROWS, None, ValueError, "y is None"),
        (ROWS, Y[:2], ValueError, "x has 6, y has 2"),
        (ROWS[:, :1], Y, InvalidInput, r"apply failed.*\(2, 1\) of float64"),
        (ROWS, Y.astype(float), InvalidInput, "The loss failed"),
        (["a"] * 6, Y, InvalidInput, "arrays of JAX or NumPy, not str"),
    ],
)
def test_rows_that_do_not_fit_are_refused(x, y, error, said):
    provider = JaxGradientProvider(linear, W, jax_models.cross_entropy)
    with pytest.raises(error, match=said):
        provider.grads(provider.as_batch(x, y))


def test_an_output_without_rows_is_refused():
    with pytest.raises(UnsupportedModel, match="first axis must run over"):
        JaxGradientProvider(lambda p, x: (x @ p["w"]).T, W, jax_models.cross_entropy).grads(JaxBatch(ROWS, Y))


def test_a_loss_without_curvature_has_no_fisher_but_the_empirical_one():
    provider = JaxGradientProvider(linear, W, optax.hinge_loss)
    with pytest.raises(UnsupportedLoss, match=r"hinge_loss is piecewise linear.*empirical"):
        provider.fisher_grads(JaxBatch(ROWS, np.sign(X[:, 0, 0, :1]) * np.ones(3)), "sampled")


def test_the_provider_is_one_of_the_algebra():
    assert issubclass(JaxGradientProvider, StructuredGradientProvider)
