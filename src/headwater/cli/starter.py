"""The job that `headwater init` writes."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

from headwater.errors import AlreadySaved, InvalidSetting
from headwater.store.draft import write_new

TOML = """\
# A job of headwater: what to attribute, and where the results go.
#
#     headwater fit {toml}      fits the influence to the train rows
#     headwater score {toml}    scores all train rows on all queries; fits first, if need be
#     headwater top {toml}      prints the rows that help and harm each query most
#     headwater info {toml}     says what is finished, without running anything
#
# Each goes on where a stopped one ended.

# A function that returns influence, train rows and queries: your own code, which every verb but info runs.
# "FILE.py:function", relative to this file, or "module:function".
setup = "{python}:setup"

# A folder for the results, relative to this file. It belongs to one model, method and data set.
store = "{store}"

[fit]
# For the temporary arrays of a batch. The numbers do not depend on it.
# working_memory = "64MiB"

[score]
# "influence": how much the query's loss falls for each unit of weight on the train row.
# "removal": how much the query's loss is predicted to rise when the row is removed.
unit = "removal"
# Keep each block's share of a score.
# by_block = false
# Bytes that a process may hold in all; without it, only the working memory is bounded.
# memory = "2GiB"

[top]
# Rows at each end of a query's ranking.
k = 5
"""

TORCH = '''\
"""What to attribute: a small network on digits. Put your own model and data in their place."""

import torch
from sklearn.datasets import load_digits

import headwater as hw
from headwater.torch import TorchComposableInfluence


def setup():
    """Influence, train rows, queries."""
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)

    # Loaders: any DataLoader or list of (inputs, targets). They give the same rows in the same order every time.
    # Rows are named by their position; headwater.torch.TorchBatch(x, y, ids=...) gives them names of yours.
    train = [(x[i : i + 200], y[i : i + 200]) for i in range(0, 1200, 200)]
    query = [(x[1700:], y[1700:])]

    # The loss that the model was trained with; the method and its damping. See docs/methods.md.
    model = trained_model(train)
    influence = TorchComposableInfluence(model, torch.nn.CrossEntropyLoss(), hw.Ekfac(), damping=hw.relative(0.1))
    return influence, train, query


def trained_model(train):
    """Load your own here. This one is trained each time, from one seed: every verb must meet the same weights."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, weight_decay=1e-4)
    for _ in range(30):
        for inputs, targets in train:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
    return model.eval()
'''

SKLEARN = '''\
"""What to attribute: a linear classifier of digits. Put your own estimator and data in their place."""

from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

import headwater as hw
from headwater.sklearn import SklearnComposableInfluence


def setup():
    """Influence, train rows, queries."""
    images, labels = load_digits(return_X_y=True)
    x, y = images / 16, labels

    # Lists of batches (inputs, targets). They give the same rows in the same order every time.
    # Rows are named by their position; headwater.sklearn.SklearnBatch(x, y, ids=...) gives them names of yours.
    train = [(x[:1200], y[:1200])]
    query = [(x[1700:], y[1700:])]

    # Load your own estimator here. This one is fitted each time: every verb must meet the same coefficients.
    estimator = LogisticRegression(C=1.0, max_iter=1000).fit(x[:1200], y[:1200])
    influence = SklearnComposableInfluence(estimator, hw.Direct(), damping=0.0)
    return influence, train, query
'''


def write_starter(file: Path) -> Path:
    """A job file, and beside it the Python file, which is returned.

    Errors: InvalidSetting for another kind of name; AlreadySaved if one of the two is there.
    """
    if file.suffix != ".toml":
        raise InvalidSetting(f"{file}: expected the name of a job file, for example job.toml.")
    python = file.with_suffix(".py")
    if not file.resolve().parent.is_dir():
        raise InvalidSetting(f"{file}: there is no folder {file.resolve().parent}.")
    if python.stem in {*sys.stdlib_module_names, "headwater", "numpy", "sklearn", "torch"}:
        raise InvalidSetting(f"{python.name} would hide the module {python.stem}. Choose another name.")
    for each in (file, python):
        if each.exists():
            raise AlreadySaved(f"{each} exists; remove it, or choose another name.")
    settings = {"toml": file.name, "python": python.name, "store": "results"}
    code = TORCH if find_spec("torch") else SKLEARN
    for each, text in ((python, code), (file, TOML.format(**settings))):
        if not write_new(each, text.encode()):
            raise AlreadySaved(f"{each} exists; remove it, or choose another name.")
    return python


def missing_extra() -> str:
    """What brings the packages that the starter needs; "" where they are there. The data are scikit-learn's."""
    return "" if find_spec("sklearn") else "sklearn"
