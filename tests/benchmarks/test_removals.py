"""Trainings without some rows, side by side: the same batches for all, and weight zero for what is left out."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from headwater.retraining.torch import train_many

FOLDER = Path(__file__).parents[2] / "benchmarks" / "leaderboard"


@pytest.fixture(scope="module")
def scripts():
    """The script and the tasks, which find each other by their names."""
    added = [str(FOLDER), str(FOLDER.parent)]
    sys.path[:0] = added
    import removals
    import tasks

    yield removals, tasks
    for name in added:
        sys.path.remove(name)


@pytest.fixture
def removals(scripts):
    return scripts[0]


@pytest.fixture
def task(scripts):
    _, tasks = scripts
    training = {"steps": 12, "batch_size": 8, "lr": 0.1, "momentum": 0.9}
    make = lambda: nn.Sequential(nn.Linear(64, 8), nn.GELU(), nn.Linear(8, 10))  # noqa: E731
    return tasks.Task("small", "small", lambda: tasks.digits(30, 4), make, l2=1e-3, training=training)


def test_with_all_rows_it_is_the_training_that_was_scored(removals, task):
    x, y, *_ = task.rows()
    _, found = removals.trained(task, 3, torch.ones(2, 30), x, y)
    many = train_many(task.make, x, y, torch.ones(1, 30), [3], loss=task.losses, l2=task.l2, **task.training)
    for name, value in many.parameters.items():
        torch.testing.assert_close(found[name][1], value[0], rtol=1e-4, atol=1e-6)


def test_a_row_that_is_left_out_moves_nothing_else(removals, task):
    """As a loop of torch's own optimizer has it."""
    x, y, xq, yq = task.rows()
    keep = removals.subsets(30, 0.2, 3)
    assert (~keep).sum(axis=1).tolist() == [6, 6, 6]
    found = removals.losses(task, 0, keep, side_by_side=2)
    model = removals.started(task, 0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=task.l2)
    settings = removals.Sgd(**task.training, l2=task.l2)
    order = settings.visited_rows(torch.ones(30, dtype=torch.bool), torch.Generator().manual_seed(0))
    weight = torch.as_tensor(keep[2].astype(np.float32))
    for step, ids in enumerate(order):
        optimizer.param_groups[0]["lr"] = settings.rate(step)
        optimizer.zero_grad()
        (task.losses(model(x[ids]), y[ids]) * weight[ids]).mean().backward()
        optimizer.step()
    np.testing.assert_allclose(found[2], task.losses(model(xq), yq).detach().numpy(), rtol=1e-4)
