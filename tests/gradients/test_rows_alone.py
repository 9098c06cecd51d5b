"""A row's loss is its own, and the model's output for it too: what acts on other rows is noticed in every framework."""

import jax.numpy as jnp
import jax_models  # noqa: F401  # JAX in double precision
import numpy as np
import pytest
import torch
from torch import nn

import headwater as hw
from headwater.errors import InvalidInput, NonFiniteValue, RowsInteract, UnsupportedLoss
from headwater.gradients.rowwise import differing, is_weighted_sum
from headwater.jax import JaxBatch, JaxComposableInfluence, JaxGradientProvider, cross_entropy, squared_error
from headwater.torch import TorchBatch, TorchGradientProvider


def data(seed: int, rows: int = 6) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((rows, 3)), rng.standard_normal(rows)


def torch_grads(loss, seed, model=None, x=None, y=None):
    torch.manual_seed(seed)
    model = model or nn.Linear(3, 1).double()
    found = data(seed)
    x, y = (torch.as_tensor(found[k] if given is None else given) for k, given in enumerate((x, y)))
    return TorchGradientProvider(model, loss).grads(TorchBatch(x, y))


def jax_grads(loss, seed, apply=None, x=None, y=None):
    x, y = (data(seed)[k] if given is None else given for k, given in enumerate((x, y)))
    w = jnp.asarray(np.random.default_rng(seed + 50).standard_normal((3, 1)))
    return JaxGradientProvider(apply or (lambda w, x: x @ w), w, loss).grads(JaxBatch(jnp.asarray(x), jnp.asarray(y)))


@pytest.mark.parametrize("seed", range(5))
def test_a_loss_that_spreads_targets_over_outputs_is_refused(seed):
    """(rows, 1) against (rows,): every output meets every target."""
    with pytest.raises(UnsupportedLoss, match="no weighted sum"):
        torch_grads(lambda o, t: ((o - t) ** 2).mean(), seed)
    with pytest.raises(UnsupportedLoss, match="no weighted sum"):
        jax_grads(lambda o, t: jnp.mean((o - t) ** 2), seed)


@pytest.mark.parametrize("seed", range(5))
def test_a_loss_that_compares_outputs_is_refused(seed):
    with pytest.raises(UnsupportedLoss, match="no weighted sum"):
        torch_grads(lambda o, t: ((o[:, 0] - t) ** 2).mean() + (o.var() if len(o) > 1 else 0.0), seed)
    with pytest.raises(UnsupportedLoss, match="no weighted sum"):
        jax_grads(lambda o, t: jnp.mean((o[:, 0] - t) ** 2) + jnp.var(o), seed)


@pytest.mark.parametrize("seed", range(5))
def test_a_loss_with_weights_of_its_own_is_taken(seed):
    torch_grads(lambda o, t: (t.abs() * (o[:, 0] - t) ** 2).sum() / 7, seed)
    jax_grads(lambda o, t: jnp.sum(jnp.abs(t) * (o[:, 0] - t) ** 2) / 7, seed)


def test_rows_that_act_on_each_other_are_noticed_behind_equal_first_rows():
    x, y = data(0)
    x[1] = x[0]

    class Centred(nn.Linear):
        def forward(self, x):
            h = super().forward(x)
            return h - h.mean(0)

    with pytest.raises(RowsInteract):
        torch_grads(nn.MSELoss(), 0, Centred(3, 1).double(), x, y[:, None])
    with pytest.raises(RowsInteract):
        jax_grads(squared_error, 0, lambda w, x: x @ w - jnp.mean(x @ w, axis=0), x, y[:, None])


def test_rows_that_differ_are_found():
    assert differing(np.array([3, 3, 5, 5], dtype=np.uint64)).tolist() == [0, 2]
    assert differing(np.array([3, 3], dtype=np.uint64)).tolist() == [0]


def test_a_weighted_sum_has_weights_that_no_output_moves():
    rng = np.random.default_rng(0)
    own, moved = rng.standard_normal((3, 1)), rng.standard_normal((3, 1))
    moved[1:] = own[1:]
    weights = np.array([[2.0], [0.5], [1.0]])
    assert is_weighted_sum((weights * own, own), (weights * moved, moved))
    assert not is_weighted_sum((weights * own, own), (np.array([[3.0], [0.5], [1.0]]) * moved, moved))
    assert not is_weighted_sum((weights * own, own), (weights * moved * [[1.0], [1.0], [-1.0]], moved))


@pytest.mark.parametrize("label", [-1, 3])
def test_a_label_that_is_no_class_is_not_read_as_another(label):
    x, y = data(0)[0], np.array([0, 1, 2, label, 0, 1])
    w = jnp.ones((3, 3))
    with pytest.raises(NonFiniteValue):
        JaxGradientProvider(lambda w, x: x @ w, w, cross_entropy).grads(JaxBatch(jnp.asarray(x), jnp.asarray(y)))


def test_shapes_that_would_be_spread_are_refused_by_name():
    with pytest.raises(InvalidInput, match=r"\(N, 1\) and the targets \(N,\)|\(2, 1\) and the target \(2,\)"):
        jax_grads(squared_error, 0)


def test_nan_in_the_first_row_is_called_that():
    x, y = data(0)
    x[0, 0] = np.nan
    with pytest.raises(NonFiniteValue, match="row"):
        jax_grads(squared_error, 0, x=x, y=y[:, None])


class Unhashable:
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, function):
        self.function = function

    def __call__(self, *given):
        return self.function(*given)


def test_functions_need_not_be_hashable():
    x, y = data(0)
    apply, loss = Unhashable(lambda w, x: x @ w), Unhashable(squared_error)
    provider = JaxGradientProvider(apply, jnp.ones((3, 1)), loss, measurement=lambda o, t: jnp.sum(o))
    batch = JaxBatch(jnp.asarray(x), jnp.asarray(y[:, None]))
    assert provider.grads(batch)["full"].rows == provider.grads(batch, query=True)["full"].rows == 6


def test_rows_of_a_jax_function_are_taken_alone_by_every_method():
    """A function that mixes rows from the third on: curvature and draws see each row by itself, as its loss does."""
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((7, 3)), rng.integers(2, size=7)
    w = jnp.asarray(rng.standard_normal((3, 2)))

    def centred(w, x):
        output = x @ w
        return output - output.mean(0) if len(x) > 2 else output

    for method in (hw.Direct(), hw.Direct("hessian"), hw.Ekfac()):
        found, expected = (
            JaxComposableInfluence(f, w, cross_entropy, method, damping=0.1).fit([(x, y)]).influences(x, y)
            for f in (centred, lambda w, x: x @ w)
        )
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9)
