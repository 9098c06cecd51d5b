"""What people pass in their first hour: each mistake has a sentence of its own, which says how to mend it."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.utils.data import TensorDataset

import headwater as hw
from headwater.errors import BatchMismatch, InvalidInput
from headwater.jax import JaxComposableInfluence
from headwater.torch import TorchBatch, TorchComposableInfluence

torch.manual_seed(0)
X, Y = torch.randn(6, 4), torch.arange(6) % 3
CE = nn.CrossEntropyLoss()


def influence():
    return TorchComposableInfluence(nn.Linear(4, 3), CE, hw.GradDot())


LOADERS = {
    "a Dataset of three": (TensorDataset(X, Y, Y), r"not a tuple of 3 entries.*of \(x, y, ids\)"),
    "a row of a Dataset": ([(X[0], Y[0])], r"y is one number, tensor\(0\).*single row.*y\[None\]"),
    "a label": ([(X[:1], 2)], r"y is one number, 2,.*has no batch axis.*y\[None\]"),
    "a row without its axis": ([(X[0], Y[:1])], r"x has shape \(4,\) and y \(1,\).*x\[None\]"),
    "labels in a list": ([(X, Y.tolist())], "y is a list of 6 numbers or lists; pass one array"),
    "rows in lists": ([(X.tolist(), Y)], "x is a list of 6 numbers or lists; pass one array"),
    "words for labels": ([(X, ["cat"] * 6)], "y has words, 'cat'.*give numbers"),
    "one word": ([(X, "cat")], "y is one word, 'cat'"),
    "an iterator": (iter([(X, Y)]), "list_iterator, which can be read only once.*list"),
    "a generator": ((b for b in [(X, Y)]), "generator, which can be read only once"),
    "a path": ("train.csv", r"one str, 'train.csv'.*A loader is a list of batches, \[\(x, y\), ...\]"),
    "a frame": (pd.DataFrame({"a": [1.0]}), r"is a DataFrame.*\(frame, 'column'\).*target='column'"),
    "None": (None, "train loader is None"),
    "a number": (3, "train loader is int"),
    "an empty list": ([], "empty list: it has no rows"),
    "inputs alone": (X, r"one array of shape \(6, 4\).*pass inputs and targets, \(x, y\)"),
    "three arrays": ((X, Y, Y), r"is a tuple of 3 entries, some of them arrays: .*all rows, \(x, y\)"),
    "one batch of ours": (TorchBatch(X, Y), r"is one TorchBatch: pass \[batch\]"),
    "a dict": ({"x": X, "y": Y}, r"one dict of 'x', 'y'"),
    "dicts": ([{"x": X, "y": Y}], r"unpack= makes.*unpack=lambda batch: \(batch\['x'\], batch\['y'\]\)"),
    "three entries": ([(X, Y, Y)], r"not a tuple of 3 entries.*of \(x, y, ids\), .*of \(ids, x, y\)"),
    "inputs without targets": ([X, Y], r"Train rows, batch 0: .*not Tensor of shape \(6, 4\)"),
}


@pytest.mark.parametrize("what", LOADERS)
def test_what_is_no_loader_of_batches_has_its_own_sentence(what):
    loader, said = LOADERS[what]
    with pytest.raises(InvalidInput, match=said):
        influence().fit(loader)


def test_inputs_and_targets_side_by_side_are_told_to_be_a_pair():
    with pytest.raises(InvalidInput, match=r"one thing, the train rows: .*fit\(\(x, y\)\)"):
        influence().fit(X, Y)


def test_queries_are_called_queries():
    fitted = influence().fit([(X, Y)])
    for loader, said in (
        (None, "query loader is None"),
        ([], "query loader is an empty list"),
        ([(X, 1)], "Query rows"),
    ):
        with pytest.raises(InvalidInput, match=said):
            fitted.attribute([(X, Y)], loader)
    with pytest.raises(BatchMismatch, match=r"x_test and y_test: y is one number"):
        fitted.influences(X[0], Y[0])
    with pytest.raises(InvalidInput, match="x and y: y is a list of 6"):
        fitted.influences(X, Y, X, Y.tolist())


@pytest.mark.parametrize(
    "loss",
    [
        nn.MSELoss(),
        nn.MSELoss(reduction="sum"),
        nn.SmoothL1Loss(),
        F.l1_loss,
        nn.PoissonNLLLoss(),
        lambda o, t: ((o - t) ** 2).mean(),
        lambda o, t: (o - t) ** 2,
        lambda o, t: (o - t).abs(),
    ],
)
@pytest.mark.filterwarnings("ignore:Using a target size")
def test_targets_that_would_be_spread_over_the_outputs_show_the_two_shapes(loss):
    column, flat = nn.Linear(4, 1), nn.Sequential(nn.Linear(4, 1), nn.Flatten(0))
    y = torch.rand(6)
    cases = (
        (column, y, r"outputs have the shape \(N, 1\) and the targets \(N,\).*y.reshape\(-1, 1\)"),
        (flat, y[:, None], r"outputs have the shape \(N,\) and the targets \(N, 1\).*y.reshape\(-1\)"),
    )
    for model, target, said in cases:
        with pytest.raises((InvalidInput, TypeError), match=said):
            TorchComposableInfluence(model, loss, hw.GradDot()).fit([(X, target)]).influences(X, target)
    TorchComposableInfluence(column, loss, hw.GradDot()).fit([(X, y[:, None])]).influences(X, y[:, None])


@pytest.mark.parametrize(
    "loss", [hw_loss for hw_loss in (None, lambda o, t: jnp.mean((o - t) ** 2), lambda o, t: abs(o - t))]
)
def test_jax_shows_the_two_shapes_too(loss):
    from headwater.jax.losses import squared_error

    made = JaxComposableInfluence(lambda p, x: x @ p["w"], {"w": jnp.ones((4, 1))}, loss or squared_error, hw.GradDot())
    with pytest.raises((InvalidInput, TypeError), match=r"shape \(N, 1\) and the targets \(N,\)"):
        made.fit([(X.numpy(), np.arange(6.0))]).influences(X.numpy(), np.arange(6.0))


def test_flat_token_losses_are_not_taken_for_spread_ones():
    """Outputs (N, T, 1) and targets (N, T) look alike; here the loss itself makes them of one shape, (N T,)."""
    model = nn.Sequential(nn.Unflatten(1, (4, 1)), nn.Linear(1, 1))
    fitted = TorchComposableInfluence(model, lambda o, t: (o.reshape(-1) - t.reshape(-1)) ** 2, hw.GradDot())
    rows = [(X, torch.rand(6, 4))]
    fitted.fit(rows).attribute(rows, rows)
    assert fitted.provider.normalisation == "per token"


def test_a_loss_is_a_function_and_no_class():
    for option in ({"loss": nn.CrossEntropyLoss}, {"loss": CE, "measurement": nn.CrossEntropyLoss}):
        with pytest.raises(InvalidInput, match=r"class CrossEntropyLoss; pass an instance of it: CrossEntropyLoss\(\)"):
            TorchComposableInfluence(nn.Linear(4, 3), method=hw.GradDot(), **option)
    for loss in (None, "cross_entropy", 3):
        with pytest.raises(InvalidInput, match=r"expected a function of \(output, target\)"):
            TorchComposableInfluence(nn.Linear(4, 3), loss, hw.GradDot())


def test_no_sentence_praises():
    source = Path(hw.__file__).parent
    praise = ("all is well", "looks good", "looks fine", "looks great", "excellent", "congratulations", "well done")
    found = [(path.name, word) for path in source.rglob("*.py") for word in praise if word in path.read_text().lower()]
    assert not found


def test_a_list_of_inputs_and_targets_is_told_to_be_a_batch_and_a_triple_which_entry_is_which():
    made = TorchComposableInfluence(nn.Linear(4, 3), CE, hw.GradDot())
    with pytest.raises(InvalidInput, match=r"one batch, \[x, y\]\? Pass a list of batches, \[\(x, y\)\]\.$"):
        made.fit([X, Y])
    with pytest.raises(InvalidInput, match=r"\(batch\[0\], batch\[2\], batch\[1\]\) of \(x, ids, y\)"):
        made.fit([(X, torch.arange(6), Y)])


@pytest.mark.parametrize("method", [hw.Kfac(), hw.Ekfac(), hw.Direct(), hw.GradDot(), hw.GradCos(), hw.TracIn(0.1)])
def test_weights_that_are_all_zero_are_called_so(method):
    made = TorchComposableInfluence(nn.Linear(4, 3), CE, method)
    with pytest.raises(InvalidInput, match="weights sum to 0"):
        made.fit([TorchBatch(X, Y, weights=torch.zeros(6))])
