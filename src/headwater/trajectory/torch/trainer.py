"""The training of one model of `train_many`, recorded."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Unpack

import numpy as np
import torch
from torch import Tensor, nn

from headwater.errors import BatchMismatch
from headwater.retraining.settings import settings_of
from headwater.retraining.torch.many import RowLosses
from headwater.retraining.torch.sgd import Sgd, SgdFields
from headwater.torch.batch import TorchBatch
from headwater.torch.provider import TorchGradientProvider
from headwater.trajectory import optimizers
from headwater.trajectory.rows import HeldRows
from headwater.trajectory.torch.influence import at
from headwater.trajectory.torch.steps import TorchTraining
from headwater.trajectory.train import train


def train_recorded(
    make: Callable[[], nn.Module] | nn.Module,
    x: Tensor,
    y: Tensor,
    folder: str | os.PathLike[str],
    *,
    loss: RowLosses,
    keep: object = None,
    seed: int = 0,
    settings: Sgd | None = None,
    states: str = "sqrt",
    **fields: Unpack[SgdFields],
) -> nn.Module:
    """The model that `train_many` trains for this seed, in eval mode, with a record of how; rows go by their positions.

    make, x, y, loss, settings: as of `train_many`. keep: the rows that it sees, bool [n]; None for all. states: which
    are kept, as `keep` of hw.record. The same call goes on with a record that was broken off.
    Errors: as of `train_many`; AlreadySaved where there is a record.
    """
    sgd = settings_of(Sgd, settings, fields)
    kept = torch.ones(len(x), dtype=torch.bool) if keep is None else torch.as_tensor(keep).bool().cpu()
    if kept.shape != (len(x),) or len(y) != len(x) or not kept.any():
        raise BatchMismatch(f"There are {len(x)} rows x, {len(y)} rows y, and keep is {tuple(kept.shape)}.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = (at(make, {}) if isinstance(make, nn.Module) else make()).eval()
    order = sgd.visited_rows(kept, torch.Generator().manual_seed(int(seed)))
    provider = TorchGradientProvider(model, loss)
    held = HeldRows.of(provider, [TorchBatch(x, y)])
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    rule = optimizers.Sgd(sgd.rate, momentum=sgd.momentum, weight_decay=sgd.l2)
    steps = (np.asarray(rows) for rows in order)
    state = train(TorchTraining(provider), start, rule, steps, held.pieces, folder, keep=states, framework="torch")
    return at(model, {name: value.cpu().numpy() for name, value in state.parameters.items()})
