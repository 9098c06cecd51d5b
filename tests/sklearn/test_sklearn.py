"""Fitted estimators of every kind: the contract, and gradients and scores against torch's autograd, row by row."""

import subprocess
import sys

import numpy as np
import pytest
from kept_fits import KeptFits
from sklearn_cases import MAKERS, case_of

import headwater as hw
from headwater.sklearn import SklearnBatch, SklearnComposableInfluence, SklearnGradientProvider
from headwater.testing import StructuredProviderContract

each_case = pytest.mark.parametrize("name", MAKERS)


class ProviderOf(StructuredProviderContract):
    name: str
    blocks: object = "full"

    @property
    def rows(self):
        return len(case_of(self.name).y)

    def provider(self):
        return SklearnGradientProvider(case_of(self.name).estimator, blocks=self.blocks)

    def batch(self, index):
        case, index = case_of(self.name), np.asarray(index)
        return self.provider().as_batch(case.x[index], case.y[index])

    def slow_grads(self):
        case = case_of(self.name)
        return case.train_grads

    def slow_mixed_grads(self):
        case = case_of(self.name)
        return case.train_mixed

    def slow_curvature(self, kind):
        case = case_of(self.name)
        return case.train_hessians.sum(0)


class InfluenceOf(KeptFits):
    name: str
    blocks: object = "full"

    @property
    def symmetric(self):
        case = case_of(self.name)
        return not (case.per_row and case.strength)

    def influence(self, damping=None):
        return SklearnComposableInfluence(
            case_of(self.name).estimator, hw.Direct("ggn"), blocks=self.blocks, damping=damping
        )

    def train(self):
        case = case_of(self.name)
        return case.x, case.y

    def queries(self):
        case = case_of(self.name)
        return case.x_query, case.y_query

    def slow_scores(self, mode, damping):
        case, n = case_of(self.name), len(case_of(self.name).y)
        curvature, penalty = case.train_hessians.mean(0), np.diag(case.penalty(n))
        size = len(curvature)
        cut = (slice(None),) if self.blocks == "full" else self._halves(case, size)
        inverse = np.zeros((size, size))
        for own in cut:
            matrix = curvature[own, own]
            shift = damping * np.trace(matrix) / len(matrix) * np.eye(len(matrix))
            inverse[own, own] = np.linalg.inv(matrix + penalty[own, own] + shift)
        factors = case.grads(case.x_query, case.y_query) @ inverse
        if mode == "up":
            return factors @ case.train_grads.T
        return np.einsum("qd,n...d->qn...", factors, case.train_mixed)

    def _halves(self, case, size):
        coefficients = int(case.held.sum())
        return slice(0, coefficients), slice(coefficients, size)


def _subclasses(base, names, **options):
    """A test class for each case."""
    for name in names:
        title = (
            "Test"
            + base.__name__.removesuffix("Of")
            + "Of"
            + name.title().replace(" ", "")
            + "".join(str(v).title() for v in options.values())
        )
        globals()[title] = type(title, (base,), {"name": name, **options})


_subclasses(ProviderOf, MAKERS)
_subclasses(ProviderOf, ["multinomial", "poisson", "sgd of three classes"], blocks="parameter")
_subclasses(InfluenceOf, ["least squares", "ridge of two targets", "logistic", "multinomial", "poisson"])
_subclasses(InfluenceOf, ["multinomial without intercept", "sgd of three classes"])
_subclasses(InfluenceOf, ["ridge", "gamma"], blocks="parameter")


@each_case
def test_losses_are_those_of_the_estimator(name):
    case = case_of(name)
    provider = SklearnGradientProvider(case.estimator)
    got = provider.losses(provider.as_batch(case.x_query, case.y_query), query=True)
    np.testing.assert_allclose(got, case.losses(case.x_query, case.y_query), rtol=0, atol=1e-12)


@each_case
def test_query_gradients_are_those_of_the_loss_alone(name):
    case = case_of(name)
    provider = SklearnGradientProvider(case.estimator)
    (value,) = provider.grads(provider.as_batch(case.x_query, case.y_query), query=True).values()
    np.testing.assert_allclose(value.flat(), case.grads(case.x_query, case.y_query), rtol=0, atol=1e-12)


@each_case
def test_gradients_for_each_output_sum_to_the_curvature(name):
    """Where the Hessian and the Fisher information are one (canonical links, least squares), so do exact labels."""
    case = case_of(name)
    provider = SklearnGradientProvider(case.estimator)
    batch = provider.as_batch(case.x, case.y)
    expected = case.train_hessians.sum(0)

    def summed(draws):
        flat = [next(iter(draw.values())).flat() for draw in draws]
        return sum(f.T @ f for f in flat)

    np.testing.assert_allclose(summed(provider.ggn_grads(batch)), expected, rtol=0, atol=1e-10)
    own = ("sgd squared hinge", "sgd modified huber", "sgd huber", "sgd beyond epsilon")  # no negative log-likelihoods
    if name in ("logistic", "multinomial", "poisson", "ridge", "sgd of three classes", "normal with identity", *own):
        np.testing.assert_allclose(summed(provider.fisher_grads(batch, "exact")), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", [n for n in MAKERS if "sgd" not in n])
def test_at_the_optimum_the_rows_gradients_and_the_penalty_sum_to_zero(name):
    """So do the influences of all rows, where the penalty goes with them; else what is left is the penalty's pull."""
    case, n = case_of(name), len(case_of(name).y)
    influence = SklearnComposableInfluence(case.estimator, hw.Direct("hessian"), damping=0.0).fit([(case.x, case.y)])
    total = influence.influences(case.x_query, case.y_query, case.x, case.y).sum(1)
    pull = np.zeros(case.held.shape) if case.per_row else -n * case.penalty(n) * case.flat(case.weights)
    matrix = case.train_hessians.mean(0) + np.diag(case.penalty(n))
    expected = case.grads(case.x_query, case.y_query) @ np.linalg.pinv(matrix) @ pull
    np.testing.assert_allclose(total, expected, rtol=0, atol=2e-5 * np.abs(total).max() + 1e-5)


def test_a_batch_may_be_built_with_weights_and_ids():
    case = case_of("ridge")
    provider = SklearnGradientProvider(case.estimator)
    weights, ids = np.arange(len(case.y)) % 3 + 0.5, np.arange(100, 100 + len(case.y))
    batch = SklearnBatch(case.x, case.y, weights, ids)
    got = provider.flat_grads(batch)
    np.testing.assert_allclose(got, case.grads(case.x, case.y) * weights[:, None], rtol=0, atol=1e-12)
    np.testing.assert_array_equal(provider.row_keys(batch), ids.astype(np.uint64))
    np.testing.assert_array_equal(provider.row_weights(batch.take(np.array([3, 1]))), weights[[3, 1]])


@each_case
def test_the_plain_gradients_are_the_same_numbers(name):
    """Of the loss and of its measurements, by numerical differentiation."""
    case = case_of(name)
    given = [SklearnGradientProvider(case.estimator)]
    if name in ("logistic", "multinomial"):
        given += [given[0].of_output("margin"), given[0].of_output("logit")]
    for provider in given:
        batch = provider.as_batch(case.x, case.y)
        plain = provider.in_float64()
        for query in (False, True):
            got = plain.grads(batch, query=query)["full"].flat()
            expected = provider.grads(batch, query=query)["full"].flat()
            np.testing.assert_allclose(got, expected, rtol=0, atol=1e-9 * np.abs(expected).max())


def test_a_pipeline_of_texts_is_known_again_in_another_process():
    """Vectorizers keep where their stop words lay in memory."""
    code = """
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from headwater.sklearn import SklearnGradientProvider
texts, labels = ["a cat sat", "a dog ran", "the cat ran", "the dog sat"], [0, 1, 0, 1]
for words in (None, ["the"]):
    model = make_pipeline(TfidfVectorizer(stop_words=words), LogisticRegression()).fit(texts, labels)
    print(SklearnGradientProvider(model).fingerprint())
"""
    first, second = (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split("\n")
        for _ in range(2)
    )
    assert first == second and first[0] != first[1]
