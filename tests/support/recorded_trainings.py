"""Records of small trainings, and sweeps over them: what tests of `headwater.trajectory` ask."""

import numpy as np

from headwater.torch.batch import TorchBatch
from headwater.torch.provider import TorchGradientProvider
from headwater.trajectory.replay import Replay
from headwater.trajectory.steps import Piece
from headwater.trajectory.sweep import Sweep
from headwater.trajectory.torch.recorder import TorchRecorder
from headwater.trajectory.torch.steps import TorchTraining
from headwater.trajectory.trajectory import Trajectory


def recorded(what, folder, **options):
    """The model that was trained, and its record."""
    model = what.run(recorder=lambda m, o: TorchRecorder(m, o, folder, clip=what.clip, **options))
    return model, Trajectory(folder)


def sweep_of(what, model, record, curvature="hessian", held=32, at_each_step=False):
    loss = lambda output, y: what.loss(output, y)  # noqa: E731
    provider = TorchGradientProvider(model, loss)
    rows = lambda step: [Piece(TorchBatch(what.x[step.ids], what.y[step.ids]), step.shares)]  # noqa: E731
    replay = Replay(record, TorchTraining.of(provider, record), rows, held, "float64")
    return Sweep(replay, lambda ids: ids, len(what.x), curvature, at_each_step)


def off(found, expected):
    return np.abs(found - expected).max() / np.abs(expected).max()
