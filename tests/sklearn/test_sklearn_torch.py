"""The same linear models with the same weights, in NumPy and in torch: the same numbers from every method."""

import warnings

import numpy as np
import pytest
import torch
from sklearn import linear_model as lm
from sklearn_cases import X_QUERY, X, case_of

import headwater as hw
from headwater.sklearn import SklearnBatch, SklearnComposableInfluence, SklearnGradientProvider
from headwater.torch import TorchBatch, TorchComposableInfluence, TorchGradientProvider

METHODS = {
    "grad-dot": hw.GradDot(),
    "grad-cos": hw.GradCos(),
    "tracin": hw.TracIn(0.3),
    "hessian": hw.Direct("hessian"),
    "ggn": hw.Direct("ggn"),
    "fisher": hw.Direct("fisher"),
    "sampled fisher": hw.Direct("fisher", fisher="sampled", seed=3),
    "empirical": hw.Direct("empirical_fisher"),
    "cg": hw.Cg(curvature="ggn", tolerance=1e-13),
    "block krylov": hw.BlockKrylov(curvature="ggn", tolerance=1e-13),
    "lissa": hw.Lissa(curvature="ggn", steps=20),
    "astra": hw.Astra(curvature="ggn", steps=8),
    "arnoldi": hw.Arnoldi(curvature="ggn", rank=4),
    "nystroem": hw.Nystroem(curvature="ggn", rank=4),
    "kfac": hw.Kfac(),
    "kfac sampled": hw.Kfac(fisher="sampled", samples=2),
    "kfac factored": hw.Kfac("factored"),
    "ekfac": hw.Ekfac(),
    "ekfac of rank one": hw.Ekfac(rank=1),
    "ekfac sampled": hw.Ekfac(fisher="sampled", samples=2),
    "datainf": hw.DataInf(),
    "dual": hw.Dual(),
    "dual ggn": hw.Dual("ggn"),
    "trak": hw.Trak(dimension=6),
    "trak of the loss": hw.Trak(dimension=6, output="loss"),
    "logra": hw.LoGra(),
    "lorif": hw.LoRif(),
    "factgrass": hw.FactGrass(),
}
APART = ("grad-cos", "ggn", "cg", "kfac", "ekfac", "datainf", "dual ggn", "trak", "logra", "lorif", "factgrass")
"""Those that are also compared with coefficients and intercepts as blocks of their own."""
MODELS = ("multinomial", "logistic", "least squares of two targets")


def half_squared(output, target):
    return ((output - target) ** 2).sum() / 2


def targets(name, y):
    """As torch's loss takes them: numbers of the output's shape for one logit."""
    return torch.tensor(y)[:, None].double() if name == "logistic" else torch.tensor(y)


def unpenalised(name):
    """The estimator with no penalty in its objective, at the coefficients of a penalised fit: finite, no optimum."""
    case = case_of(name)
    estimator = lm.LinearRegression() if "least" in name else lm.LogisticRegression(C=np.inf)
    for attribute in ("coef_", "intercept_", "classes_", "n_features_in_"):
        if hasattr(case.estimator, attribute):
            setattr(estimator, attribute, getattr(case.estimator, attribute))
    estimator.fit_intercept = case.estimator.fit_intercept
    return estimator


def twin(name):
    """torch.nn.Linear with the same weights, its loss and likelihood."""
    weights = case_of(name).weights
    features = X.shape[1]
    model = torch.nn.Linear(features, len(weights), bias=weights.shape[1] > features).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor(weights[:, :features]))
        if model.bias is not None:
            model.bias.copy_(torch.tensor(weights[:, features]))
    if name == "multinomial":
        return model, torch.nn.CrossEntropyLoss(), None
    return (model, half_squared, "squared_error") if "least" in name else (model, torch.nn.BCEWithLogitsLoss(), None)


def pair(name, method, blocks, damping):
    model, loss, likelihood = twin(name)
    options = {"blocks": blocks, "damping": damping}
    mine = SklearnComposableInfluence(unpenalised(name), method, names=("weight", "bias"), **options)
    return mine, TorchComposableInfluence(model, loss, method, likelihood=likelihood, **options)


def assert_same(got, expected, tolerance=1e-10):
    expected = expected.detach().numpy() if isinstance(expected, torch.Tensor) else expected
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def rows_of(name):
    case = case_of(name)
    return case.x, case.y, case.x_query, case.y_query


BLOCKS = {"full": "full", "apart": {"late": ["bias"], "early": ["weight"]}}


def combinations():
    for name in MODELS:
        for method in METHODS:
            if method != "trak" or "least" not in name:  # no margin without classes
                yield name, method, "full"
            if name == "multinomial" and method in APART:
                yield name, method, "apart"


@pytest.mark.parametrize(("name", "method", "blocks"), list(combinations()))
def test_scores_equal_those_of_torch(name, method, blocks):
    x, y, x_query, y_query = rows_of(name)
    ids = np.arange(len(y))
    mine, theirs = pair(name, METHODS[method], BLOCKS[blocks], hw.relative(0.3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", hw.NotConverged)
        mine.fit([SklearnBatch(x[:9], y[:9], ids=ids[:9]), SklearnBatch(x[9:], y[9:], ids=ids[9:])])
        halves = [(x[:9], y[:9], ids[:9]), (x[9:], y[9:], ids[9:])]
        theirs.fit([TorchBatch(torch.tensor(a), targets(name, b), ids=c) for a, b, c in halves])
        assert mine.absolute_damping == pytest.approx(theirs.absolute_damping, rel=1e-10)
        tensors = torch.tensor(x_query), targets(name, y_query), torch.tensor(x), targets(name, y)
        assert_same(mine.influences(x_query, y_query, x, y), theirs.influences(*tensors))
        assert_same(mine.influence_factors(x_query, y_query), theirs.influence_factors(*tensors[:2]))
        if "cos" not in method and method != "trak":
            got = mine.influences(x_query, y_query, x, y, mode="perturbation")
            assert_same(got, theirs.influences(*tensors, mode="perturbation"))


def test_rows_have_the_same_keys_as_in_torch():
    x, y, _, _ = rows_of("multinomial")
    model, loss, _ = twin("multinomial")
    mine, theirs = SklearnGradientProvider(unpenalised("multinomial")), TorchGradientProvider(model, loss)
    for keys in ("row_keys", "content_keys"):
        got = getattr(mine, keys)(mine.as_batch(x, y))
        expected = getattr(theirs, keys)(theirs.as_batch(torch.tensor(x), torch.tensor(y)))
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("function", ["margin", "logit"])
@pytest.mark.parametrize("name", ["multinomial", "logistic"])
def test_margins_and_logits_are_those_of_torch(name, function):
    x, y, _, _ = rows_of(name)
    model, loss, _ = twin(name)
    mine = SklearnGradientProvider(unpenalised(name)).of_output(function)
    theirs = TorchGradientProvider(model, loss).of_output(function)
    batch, other = mine.as_batch(x, y), theirs.as_batch(torch.tensor(x), targets(name, y))
    assert_same(mine.losses(batch), theirs.losses(other))
    assert_same(mine.flat_grads(batch), theirs.flat_grads(other))
    assert_same(mine.flat_mixed_grads(batch), theirs.flat_mixed_grads(other))
    eye = np.eye(mine.n_parameters)
    got = mine.curvature_product(batch, "full", eye, "hessian")
    np.testing.assert_allclose(got, theirs.curvature_product(other, "full", torch.tensor(eye), "hessian"), atol=1e-12)
    draws = mine.ggn_grads(batch)
    flat = [draw["full"].flat() for draw in draws]
    np.testing.assert_allclose(sum(f.T @ f for f in flat), got, atol=1e-12)


def test_a_representer_decomposes_the_logit_and_equals_torch():
    """Without an intercept, the penalty of the estimator is the l2 of the representer theorem."""
    case = case_of("multinomial without intercept")
    estimator = lm.LogisticRegression(C=2.0, fit_intercept=False, tol=1e-12, max_iter=1000, solver="newton-cg")
    estimator.fit(case.x, case.y)
    n, l2 = len(case.y), 1 / (2.0 * len(case.y))
    influence = SklearnComposableInfluence(estimator, hw.Representer(l2=l2)).fit([(case.x, case.y)])
    shares = influence.attribute([(case.x, case.y)], [(case.x_query, case.y_query)]).values / n
    logits = (case.x_query @ estimator.coef_.T)[np.arange(len(case.y_query)), case.y_query]
    np.testing.assert_allclose(shares.sum(1), logits, rtol=0, atol=1e-8)
    model = torch.nn.Linear(case.x.shape[1], 3, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor(estimator.coef_))
    theirs = TorchComposableInfluence(model, torch.nn.CrossEntropyLoss(), hw.Representer(l2=l2))
    tensors = [torch.tensor(part) for part in (case.x_query, case.y_query, case.x, case.y)]
    theirs.fit([tuple(tensors[2:])])
    assert_same(influence.influences(case.x_query, case.y_query, case.x, case.y), theirs.influences(*tensors))


def test_a_query_may_be_explained_by_its_margin():
    x, y, x_query, y_query = rows_of("multinomial")
    from headwater.torch import negative_margin

    model, loss, _ = twin("multinomial")
    mine = SklearnComposableInfluence(unpenalised("multinomial"), hw.Direct(), damping=0.1, measurement="margin")
    theirs = TorchComposableInfluence(model, loss, hw.Direct(), blocks="full", damping=0.1, measurement=negative_margin)
    tensors = [torch.tensor(part) for part in (x_query, y_query, x, y)]
    got = mine.fit([(x, y)]).influences(x_query, y_query, x, y)
    assert_same(got, theirs.fit([tuple(tensors[2:])]).influences(*tensors))
    assert mine.explained == theirs.explained == "negative_margin"


def test_the_queries_alone_are_not_the_train_rows():
    """The comparison is of numbers that differ between rows and queries."""
    assert not np.allclose(X[: len(X_QUERY)], X_QUERY)
