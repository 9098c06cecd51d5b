"""Every layer of torch.nn is right or refused with a reason, as docs/reliability.md says; the whole sweep is slow."""

from pathlib import Path

import numpy as np
import odd_sweep
import pytest
import torch
from layer_cases import CASES, LEFT_OUT, build, classes_of_torch
from layer_sweep import COMPILER, VARIATIONS, Given, Verdict, failures, grad_dot, judge, sweep, table, verdicts
from odd_models import CE, MODELS, vectors
from row_oracle import RowOracle
from torch import nn

from headwater.errors import UnsupportedModel

PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"
QUICK = [
    "Linear(3, 2)",
    "Conv2d(2, 4, 2, groups=2)",
    "Embedding(5, 3, padding_idx=0)",
    "BatchNorm2d(3, track_running_stats=False)",
]


# The oracle and the judge themselves ----------------------------------------------------------------------------------


def test_the_oracle_is_the_formula_of_softmax_regression():
    torch.manual_seed(0)
    x, y = vectors(), torch.arange(5) % 3
    model = nn.Linear(4, 3, bias=False).double()
    oracle = RowOracle(model, CE, x, y, 5)
    p = model(x).softmax(1).detach().numpy()
    residual = p - np.eye(3)[y]
    assert np.allclose(oracle.grads(), (residual[:, :, None] * x.numpy()[:, None, :]).reshape(5, 12))
    wanted = sum(np.kron(np.diag(q) - np.outer(q, q), np.outer(row, row)) for q, row in zip(p, x.numpy(), strict=True))
    assert np.allclose(oracle.ggn(), wanted / 5)
    assert np.allclose(oracle.hessian(), wanted / 5)


def test_what_is_off_is_called_wrong_and_raw_errors_raw():
    model, x, y = build(CASES[0])
    other = build(CASES[0], seed=1)[0]
    assert judge(grad_dot, Given(model, other, x, y), wrapped=False).kind == "wrong"

    def raises(given):
        raise KeyError("raw")

    def refuses(given):
        raise UnsupportedModel("This and that.")

    assert judge(raises, Given(model, model, x, y), wrapped=False).fails
    assert judge(refuses, Given(model, model, x, y), wrapped=False) == Verdict(
        "refused", "UnsupportedModel: This and that."
    )
    assert judge(refuses, Given(model, model, x, y), wrapped=True).fails  # does not say how to get at the model inside


def test_every_layer_class_has_a_case_or_a_reason_why_not():
    covered = {case.covers.__name__ for case in CASES}
    assert not sorted(set(classes_of_torch()) - covered - set(LEFT_OUT)), "add them to layer_cases.py"
    assert not sorted(set(LEFT_OUT) & covered)
    assert len({case.name for case in CASES}) == len(CASES)
    assert len({odd.name for odd in MODELS}) == len(MODELS)


# A sample -------------------------------------------------------------------------------------------------------------


def cases(names):
    return pytest.mark.parametrize("case", [c for c in CASES if c.name in names], ids=lambda case: case.name)


@cases(QUICK)
def test_a_few_layers_as_they_are(case):
    assert not failures({case.name: {"as is": verdicts(case, VARIATIONS[0])}})


@pytest.mark.parametrize("name", ["used twice", "tied", "DataParallel"])
@cases(["Linear(3, 2)", "Conv2d(2, 4, 2)"])
def test_a_few_layers_changed(case, name):
    variation = next(v for v in VARIATIONS if v.name == name)
    found = verdicts(case, variation)
    assert found
    assert not failures({case.name: {name: found}})


@pytest.mark.parametrize(
    "name",
    [
        "rows are sorted from three on",
        "experts, one of which gets one row",
        "two heads",
    ],
)
def test_a_few_odd_models(name):
    odd = next(odd for odd in MODELS if odd.name == name)
    assert not failures({name: {"": odd_sweep.verdicts(odd)}})


# All ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def swept():
    return sweep()


@pytest.fixture(scope="module")
def odd_swept():
    return odd_sweep.sweep()


@pytest.mark.slow
def test_every_layer_is_right_or_refused_with_a_reason(swept):
    assert not failures(swept)


@pytest.mark.slow
def test_every_odd_model_is_right_or_refused_with_a_reason(odd_swept):
    assert not failures({"": odd_swept})


@pytest.mark.slow
def test_layers_whose_rows_have_gradients_are_hardly_ever_refused(swept):
    """A sweep in which everything is refused would be green."""
    plain = {case.name: swept[case.name]["as is"] for case in CASES if not case.refused}
    right = [name for name, found in plain.items() if found["gradients"].kind == "right"]
    assert len(right) >= 0.98 * len(plain)


@pytest.mark.slow
@pytest.mark.skipif(not COMPILER, reason="without a C++ compiler the table has two columns less")
def test_the_page_shows_the_tables_of_the_sweep(swept, odd_swept):
    """Of the release of torch that the page names."""
    page = PAGE.read_text()
    if f"torch {torch.__version__.partition('+')[0]}" not in page:
        pytest.skip("the page is about another release of torch")
    assert table(swept, compiling=False) in page
    assert table(swept, compiling=True) in page
    assert odd_sweep.table(odd_swept) in page
