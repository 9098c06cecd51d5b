"""One name for recording a training, whatever the framework: `hw.record`."""

from __future__ import annotations

import os
from typing import Any

from headwater.errors import UnsupportedModel
from headwater.trajectory.optimizers import Optimizer


def record(model: Any, optimizer: Any, folder: str | os.PathLike[str], **options: Any) -> Any:
    """A context around a training loop that keeps what training did, for `hw.Unrolled` and `hw.Trajectory`.

        with hw.record(model, optimizer, "folder") as r:
            ...
            optimizer.step()
            r.step(ids)

    model, optimizer: a torch.nn.Module, and SGD, Adam or AdamW of torch; or parameters of JAX, and the settings of
    their optimizer, `headwater.trajectory.optimizers.Sgd` or `AdamW`: then r.step(ids, params, state).

    keep: which states are kept, "all", "sqrt" (before steps 0, 1, 4, 9, ...) or "log". clip: the norm that
    clip_grad_norm_ clips to, if it is called. reduction: how the training loss treats a batch's rows, "mean" or "sum".
    random: whether the model draws random numbers in train mode, so that the generator's state before each of its calls
    is kept (5 kB on a CPU); None looks for modules of dropout, True also says it of torch.nn.functional.dropout.
    resume: go on with a record that was broken off; the model, the optimizer's memory and torch's random state are put
    back to its last state, and `r.start` says with which step to go on. `r.bytes_for(steps, rows)` says beforehand how
    large the folder becomes.

    Errors: UnsupportedModel for other optimizers, and for batch normalisation; AlreadySaved where there is a
    record; NotWritten.
    """
    kinds = {f"{kind.__module__}.{kind.__qualname__}" for kind in type(model).__mro__}
    if "torch.nn.modules.module.Module" in kinds:
        from headwater.trajectory.torch.recorder import TorchRecorder

        return TorchRecorder(model, optimizer, folder, **options)
    if isinstance(optimizer, Optimizer):
        from headwater.trajectory.jax.recorder import JaxRecorder

        return JaxRecorder(model, optimizer, folder, **options)
    raise UnsupportedModel(
        f"{type(model).__name__} with {type(optimizer).__name__} is no training that can be recorded: "
        "a torch.nn.Module with its optimizer is, and parameters of JAX with those of headwater.trajectory.optimizers."
    )
