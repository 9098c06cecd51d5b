"""Claims about a third party's whole backend, in plain NumPy: it fills the seam, and all methods work and agree.

Linear regression with two outputs and loss sum_o c_o (w_o x + b_o - y_o)^2 / 2, a block for each output. Its mean GGN,
Hessian and Fisher information are block-diagonal, with blocks c_o times the mean of (x, 1) (x, 1)^T; so the exact
method, KFAC and EKFAC must all give the closed form.
"""

from collections import OrderedDict
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest

import headwater as hw
from headwater.attributor import Attributor
from headwater.blocks import Block, Layout, Parameter, Part, Piece
from headwater.errors import InvalidInput, InvalidSetting, StaleFit
from headwater.gradients.block import BlockGradient
from headwater.gradients.normalised import NormalisedGradientProvider
from headwater.gradients.outer import Outer
from headwater.gradients.provider import StructuredGradientProvider
from headwater.mapper import InfluenceMapper
from headwater.methods.direct import Direct
from headwater.operators.algebra import IdentityOperator, ScaledOperator
from headwater.operators.kronecker import KroneckerOperator
from headwater.operators.partial_penalty import PartialPenaltyInverse
from headwater.operators.structured import BlockDiagonalOperator
from headwater.random import row_keys, row_normals
from headwater.testing import BlockMapperContract, InfluenceContract, StructuredProviderContract
from headwater.types import Batch, BilinearForm, OperatorBilinearForm

I = 3  # noqa: E741
COSTS = np.array([1.0, 4.0])
NAMES = ("first", "second")
RNG = np.random.default_rng(3)
WEIGHTS, BIASES = RNG.standard_normal((2, I)), RNG.standard_normal(2)
X, Y = RNG.standard_normal((7, I)) * [3.0, 1.0, 0.2], RNG.standard_normal((7, 2))
QUERY_X, QUERY_Y = RNG.standard_normal((4, I)), RNG.standard_normal((4, 2))
QUERIES = QUERY_X, QUERY_Y


@dataclass(frozen=True, eq=False)
class Rows(Batch):
    """NumPy arrays, with or without weights."""

    weights: object = None


class LinearProvider(StructuredGradientProvider):
    """The model is two arrays, and everything has a closed form."""

    def __init__(self, weights=WEIGHTS, biases=BIASES):
        self.weights, self.biases = weights.copy(), biases.copy()

    @property
    def layouts(self):
        return OrderedDict((name, _layout(name)) for name in NAMES)

    def as_batch(self, x, y):
        return Rows(x, y)

    def parameters(self, block):
        output = NAMES.index(block)
        return np.append(self.weights[output], self.biases[output])

    def row_weights(self, batch):
        return getattr(batch, "weights", None)

    def row_keys(self, batch):
        return row_keys([batch.x, batch.y])

    def fingerprint(self):
        return self.weights.tobytes(), self.biases.tobytes()

    def rows_at_once(self, batch):
        return 2

    def _residuals(self, batch):
        return batch.x @ self.weights.T + self.biases - batch.y

    def _weight_each(self, batch):
        weights = self.row_weights(batch)
        return np.ones(len(batch)) if weights is None else weights

    def _values(self, batch, cotangents):
        """Gradient values for derivatives by the outputs [n, 2]."""
        parts = [Outer(batch.x[:, None], cotangents[:, None, k, None], ones=True) for k in range(2)]
        return OrderedDict(
            (name, BlockGradient(_layout(name), (part,))) for name, part in zip(NAMES, parts, strict=True)
        )

    def grads(self, batch, *, query=False, weighted=True):
        each = self._weight_each(batch) if weighted else np.ones(len(batch))
        return self._values(batch, COSTS * self._residuals(batch) * each[:, None])

    def fisher_grads(self, batch, fisher, *, draws=range(1), seed=0):
        if fisher == "empirical":
            return [self.grads(batch, weighted=False)]
        if fisher in ("auto", "exact"):
            return [self._values(batch, np.tile(row, (len(batch), 1))) for row in np.diag(np.sqrt(COSTS))]
        keys = self.row_keys(batch)
        drawn = [row_normals(keys, 2, draw=number, seed=seed) * np.sqrt(COSTS / len(draws)) for number in draws]
        return [self._values(batch, cotangents) for cotangents in drawn]

    def curvature_product(self, batch, block, vectors, kind):
        inputs = np.concatenate([batch.x, np.ones((len(batch), 1))], axis=1)
        cost = COSTS[NAMES.index(block)]
        return cost * ((vectors @ inputs.T) * self._weight_each(batch)) @ inputs

    def mixed_prod(self, batch, factors):
        mixed = dict(zip(NAMES, np.split(self.flat_mixed_grads(batch), 2, axis=-1), strict=True))
        return sum(np.einsum("kd,nxd->knx", factor, mixed[name]) for name, factor in factors.items())

    def flat_mixed_grads(self, batch):
        """d/dx of c r (x, 1) with r = w x + b - y: c (w (x, 1)^T + r (I, 0))."""
        inputs = np.concatenate([batch.x, np.ones((len(batch), 1))], axis=1)
        pairs = zip(COSTS, self.weights, self._residuals(batch).T, strict=True)
        blocks = [c * (w[:, None] * inputs[:, None, :] + r[:, None, None] * np.eye(I, I + 1)) for c, w, r in pairs]
        return np.concatenate(blocks, axis=-1) * self._weight_each(batch)[:, None, None]


def _layout(name):
    parameters = (Parameter(f"{name}.weight", (I,)), Parameter(f"{name}.bias", (1,)))
    return Layout(
        Block(name, parameters), (Part(Piece(f"{name}.weight", 0, (1, I)), Piece(f"{name}.bias", 0, (1, 1))),)
    )


class LinearInfluence(Attributor):
    def __init__(self, method, *, damping=None):
        super().__init__(LinearProvider(), method, damping=damping)


def slow_gradient(x, y):
    residual = WEIGHTS @ x + BIASES - y
    return np.concatenate([cost * r * np.append(x, 1.0) for cost, r in zip(COSTS, residual, strict=True)])


def slow_unit(x, y):
    return slow_gradient(x, y) / np.linalg.norm(slow_gradient(x, y))


def by_differences(x, y, function=slow_gradient, step=1e-4):
    """[I, D]; exact but for rounding for the plain gradient, which is quadratic in x."""
    return np.stack([(function(x + e, y) - function(x - e, y)) / (2 * step) for e in step * np.eye(I)])


def slow_curvature(rows):
    inputs = np.append(rows, np.ones((len(rows), 1)), axis=1)
    return np.kron(np.diag(COSTS), inputs.T @ inputs)


def slow_inverse(damping):
    """Each block's own, at `damping` times its own mean eigenvalue."""
    curvature = slow_curvature(X) / len(X)
    means = [np.trace(part[k : k + I + 1]) / (I + 1) for k, part in ((0, curvature), (I + 1, curvature[:, I + 1 :]))]
    return np.linalg.inv(curvature + damping * np.kron(np.diag(means), np.eye(I + 1)))


class TestProvider(StructuredProviderContract):
    rounding = 1e5  # the truth of the mixed gradients is a difference quotient

    def provider(self):
        return LinearProvider()

    def batch(self, index):
        return Rows(X[list(index)], Y[list(index)])

    def slow_grads(self):
        return np.array([slow_gradient(x, y) for x, y in zip(X, Y, strict=True)])

    def slow_mixed_grads(self):
        return np.array([by_differences(x, y) for x, y in zip(X, Y, strict=True)])

    def slow_curvature(self, kind):
        return slow_curvature(X)


class TestWeightedProvider(TestProvider):
    """Every row has a weight, which multiplies its loss."""

    each = np.arange(1.0, 8.0)

    def batch(self, index):
        return Rows(X[list(index)], Y[list(index)], self.each[list(index)])

    def slow_grads(self):
        return super().slow_grads() * self.each[:, None]

    def slow_mixed_grads(self):
        return super().slow_mixed_grads() * self.each[:, None, None]

    def slow_curvature(self, kind):
        return sum(weight * slow_curvature(row[None]) for weight, row in zip(self.each, X, strict=True))


class TestUnitProvider(TestWeightedProvider):
    """Gradients of length one over both blocks together, times the rows' weights."""

    rounding = 1e7  # a difference quotient of what is not quadratic
    fishers = kinds = ()

    def provider(self):
        return NormalisedGradientProvider(LinearProvider())

    def slow_grads(self):
        return np.array([weight * slow_unit(*row) for weight, *row in zip(self.each, X, Y, strict=True)])

    def slow_mixed_grads(self):
        rows = zip(self.each, X, Y, strict=True)
        return np.array([weight * by_differences(x, y, slow_unit, 1e-5) for weight, x, y in rows])


class TestMapper(BlockMapperContract):
    """The library's own mapper over a third party's provider: one pass for all blocks."""

    def mapper(self):
        operators = {
            name: BlockDiagonalOperator(_layout(name), [KroneckerOperator(cost * np.eye(1), np.diag([1.0, 2, 3, 4]))])
            for name, cost in zip(NAMES, COSTS, strict=True)
        }
        return InfluenceMapper(LinearProvider(), operators)

    def left(self):
        return Rows(X, Y)

    def right(self):
        return Rows(QUERY_X, QUERY_Y)


class Cubed(BilinearForm):
    """A form that is no product with an operator's image, and counts what it is asked."""

    def inner_prod(self, left, right):
        right = left if right is None else right
        return np.einsum("nd,m...d->nm...", left**3, right)


class OwnForm(BlockDiagonalOperator):
    def as_bilinear_form(self):
        return Cubed()


class Doubled(OperatorBilinearForm):
    """Inherits the default form, and is another one all the same."""

    def inner_prod(self, left, right):
        return 2 * super().inner_prod(left, right)


class InheritedForm(BlockDiagonalOperator):
    def as_bilinear_form(self):
        return Doubled(self)


class AnothersForm(BlockDiagonalOperator):
    """The default form, of another operator."""

    def as_bilinear_form(self):
        return OperatorBilinearForm(ScaledOperator(3.0, IdentityOperator(self.input_size)))


def with_own_form(kind, name="second"):
    """The mapper of `TestMapper` with one operator of the given kind."""
    operators = TestMapper().mapper().operators
    operators[name] = kind(_layout(name), operators[name].operators)
    return InfluenceMapper(LinearProvider(), operators)


@pytest.mark.parametrize("kind", [OwnForm, InheritedForm, AnothersForm])
class TestMapperWithAFormOfItsOwn(TestMapper):
    """One block is computed by its operator's form, the other in the mapper's own way."""

    @pytest.fixture(autouse=True)
    def _which(self, kind):
        self.kind = kind

    def mapper(self):
        return with_own_form(self.kind)


class TestMapperInAnotherOrder(TestMapper):
    """The order of the operators, not that of the provider's blocks."""

    def mapper(self):
        operators = super().mapper().operators
        return InfluenceMapper(LinearProvider(), OrderedDict((name, operators[name]) for name in reversed(NAMES)))


@dataclass(frozen=True)
class CubedMethod(Direct):
    """A method whose inverse of one block has a form of its own."""

    def invert(self, curvature, damping):
        inverse = super().invert(curvature, damping)
        inverse.as_bilinear_form = Cubed
        return inverse


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_influences_obey_the_form_of_a_methods_operators(scale, monkeypatch):
    """In every verb that meets two sides of rows; scaled as the blocks of an ensemble are."""
    monkeypatch.setattr(LinearProvider, "block_scale", lambda self, block: scale)
    influence = LinearInfluence(CubedMethod(), damping=0.5).fit([(X, Y)])
    train, queries = (np.array([slow_gradient(*row) for row in zip(*rows, strict=True)]) for rows in ((X, Y), QUERIES))
    expected = scale * queries**3 @ train.T
    close = partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-12 * np.abs(expected).max())
    close(influence.influences(*QUERIES, X, Y), expected)
    close(influence.influences(X, Y), scale * train**3 @ train.T)
    close(sum(influence.influences_by_block(*QUERIES, X, Y).values()), expected)
    close(influence.damping_path([0.1, 1.0], *QUERIES, X, Y), [expected, expected])
    close(influence.attribute([(X[:4], Y[:4]), (X[4:], Y[4:])], [QUERIES]).values, expected)
    mixed = np.array([by_differences(*row) for row in zip(X, Y, strict=True)])
    expected = scale * np.einsum("qd,nxd->qnx", queries**3, mixed)
    close = partial(np.testing.assert_allclose, rtol=1e-7, atol=1e-7 * np.abs(expected).max())
    close(influence.influences(*QUERIES, X, Y, mode="perturbation"), expected)
    close(influence.damping_path([0.1], *QUERIES, X, Y, mode="perturbation"), [expected])


def test_rows_on_the_left_of_a_form_are_explained_by_the_measurement():
    class Measured(LinearProvider):
        def grads(self, batch, *, query=False, weighted=True):
            found = super().grads(batch, query=query, weighted=weighted)
            return (
                OrderedDict((name, v.weighted(np.full(len(batch), 10.0))) for name, v in found.items())
                if query
                else found
            )

    operators = with_own_form(OwnForm).operators
    rows, plain = Rows(X, Y), InfluenceMapper(LinearProvider(), operators)
    for mode in ("up", "perturbation"):
        got = InfluenceMapper(Measured(), operators).interactions(rows, None, mode)
        expected = plain.interactions(rows, rows, mode)
        np.testing.assert_allclose(got["first"], 10 * expected["first"], rtol=1e-12)
        np.testing.assert_allclose(got["second"], 10**3 * expected["second"], rtol=1e-12)


def test_a_form_of_its_own_refuses_a_penalty_on_some_parameters():
    inverse = ScaledOperator(2.0, IdentityOperator(4))
    partial = PartialPenaltyInverse(inverse, np.array([1.0, 0, 0, 0]))
    assert partial.as_bilinear_form().is_default_of(partial)
    inverse.as_bilinear_form = Cubed
    with pytest.raises(InvalidSetting, match="ScaledOperator has a bilinear form of its own"):
        partial.as_bilinear_form()


EXACT = {
    "exact, GGN": hw.Direct("ggn"),
    "exact, Hessian": hw.Direct("hessian"),
    "exact, Fisher": hw.Direct("fisher"),
    "KFAC": hw.Kfac(),
    "EKFAC": hw.Ekfac(),
}
"""All of them are the closed form here."""
OTHERS = {
    "exact, empirical Fisher": hw.Direct("empirical_fisher"),
    "KFAC, factored": hw.Kfac(damping_form="factored"),
    "KFAC, sampled": hw.Kfac(fisher="sampled", samples=2),
    "EKFAC, sampled": hw.Ekfac(fisher="sampled"),
    "EKFAC, empirical": hw.Ekfac(fisher="empirical"),
}
WITHOUT_DAMPING = {"gradient dot product": hw.GradDot(), "gradient cosine": hw.GradCos()}


class Contract(InfluenceContract):
    @pytest.fixture(autouse=True)
    def _which(self, method):
        self.method = method

    def influence(self, damping=None):
        return LinearInfluence(self.method, damping=damping)

    def train(self):
        return X, Y

    def queries(self):
        return QUERY_X, QUERY_Y


@pytest.mark.parametrize("method", EXACT.values(), ids=EXACT)
class TestExactMethods(Contract):
    def slow_scores(self, mode, damping):
        queries = np.array([slow_gradient(x, y) for x, y in zip(QUERY_X, QUERY_Y, strict=True)])
        kind = slow_gradient if mode == "up" else by_differences
        train = np.array([kind(x, y) for x, y in zip(X, Y, strict=True)])
        return np.einsum("qd,de,n...e->qn...", queries, slow_inverse(damping), train)


@pytest.mark.parametrize("method", OTHERS.values(), ids=OTHERS)
class TestOtherMethods(Contract):
    pass


@pytest.mark.parametrize("method", WITHOUT_DAMPING.values(), ids=WITHOUT_DAMPING)
class TestMethodsWithoutDamping(Contract):
    dampings = ()

    def slow_scores(self, mode, damping):
        self.rounding = 1e7  # a difference quotient of what is not quadratic
        plain = slow_unit if isinstance(self.method, hw.GradCos) else slow_gradient
        queries = np.array([plain(x, y) for x, y in zip(QUERY_X, QUERY_Y, strict=True)])
        if mode == "up":
            train = np.array([plain(x, y) for x, y in zip(X, Y, strict=True)])
        else:
            train = np.array([by_differences(x, y, plain, 1e-5) for x, y in zip(X, Y, strict=True)])
        return np.einsum("qd,n...d->qn...", queries, train)


@pytest.mark.parametrize("method", [*EXACT.values(), hw.Kfac(damping_form="factored")], ids=repr)
def test_a_weight_of_two_is_the_row_twice(method):
    weights = np.array([1.0, 2.0, 1.0, 3.0, 1.0, 1.0, 2.0])
    index = np.repeat(np.arange(7), weights.astype(int))
    weighted, repeated = LinearInfluence(method), LinearInfluence(method)
    weighted.fit([Rows(X[:4], Y[:4], weights[:4]), Rows(X[4:], Y[4:], weights[4:])])
    repeated.fit([Rows(X[index], Y[index])])
    assert weighted.n_train == repeated.n_train == 11
    expected = repeated.influences(QUERY_X, QUERY_Y, X, Y)
    got = weighted.influences(QUERY_X, QUERY_Y, X, Y)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-11 * np.abs(expected).max())


def test_weights_that_a_provider_does_not_know_are_refused(monkeypatch):
    weighted = [Batch(X, Y, weights=np.arange(1.0, 8.0))]
    assert LinearInfluence(hw.Direct()).fit(weighted).n_train == 28
    monkeypatch.setattr(LinearProvider, "row_weights", StructuredGradientProvider.row_weights)
    with pytest.raises(InvalidInput, match=r"LinearProvider knows no weights.*row_weights gives None"):
        LinearInfluence(hw.Direct()).fit(weighted)


@pytest.mark.parametrize("method", [hw.Direct(), hw.Ekfac(), hw.GradDot()], ids=repr)
def test_weights_that_change_after_the_fit_are_noticed(method):
    influence = LinearInfluence(method).fit([(X, Y)])
    influence.provider.weights[0, 0] += 1e-9
    with pytest.raises(StaleFit, match="changed since"):
        influence.influences(QUERY_X, QUERY_Y, X, Y)
    influence.provider.weights[0, 0] = WEIGHTS[0, 0]
    influence.influences(QUERY_X, QUERY_Y, X, Y)
