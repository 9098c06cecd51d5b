"""One training step on chosen rows, from a torch model as it is: the `patch` of `headwater.evaluate.tail_patch`."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import nn

from headwater.errors import InvalidSetting, NonFiniteValue, UnsupportedModel
from headwater.positions import row_positions
from headwater.retraining.settings import check_counts
from headwater.torch.batch import TorchBatch, call
from headwater.torch.losses import Loss, row_losses
from headwater.torch.surroundings import autograd_on

State = dict[str, torch.Tensor]


def gradient_step(
    model: nn.Module,
    loss: Loss,
    x: object,
    y: object,
    x_query: object,
    y_query: object,
    *,
    lr: float,
    steps: int = 1,
    batch_size: int = 256,
) -> Callable[[ArrayLike], NDArray[np.float64]]:
    """A function: train rows [k] -> the queries' losses [q] after a step of gradient descent on the rows' mean loss.

    Every call starts from the weights that the model has now, in evaluation mode (no dropout, batch norm as learnt);
    the model itself is copied and never changed. Without rows no step is made. Frozen parameters stay as they are.

    x, y: train rows; x_query, y_query: queries; tensors or arrays, x also a tuple or dict of them. lr: step size.
    steps: this many, on the same rows. batch_size: queries that are evaluated at once.
    Errors: InvalidSetting; InvalidInput for rows that do not exist; NonFiniteValue if a step makes losses infinite;
    UnsupportedModel for a model that cannot be copied, or has nothing to train.
    """
    if not (np.isfinite(lr) and lr > 0):
        raise InvalidSetting(f"lr is {lr}; expected a step size above 0.")
    check_counts(steps=steps, batch_size=batch_size)
    own = _copied(model)
    start: State = {name: p.detach() for name, p in own.named_parameters()}
    trained = [name for name, p in own.named_parameters() if p.requires_grad]
    if not trained:
        raise UnsupportedModel("The model has no parameter that requires a gradient: there is nothing to step.")
    device = start[trained[0]].device
    train, query = TorchBatch(x, y).to(device), TorchBatch(x_query, y_query).to(device)

    def losses(state: State, batch: TorchBatch) -> torch.Tensor:
        output = call(lambda *args, **options: torch.func.functional_call(own, state, args, options), batch.x)
        return row_losses(loss, output, batch.y)

    def stepped(state: State, batch: TorchBatch) -> State:
        with autograd_on():
            leaves = {name: state[name].clone().requires_grad_() for name in trained}
            value = losses(state | leaves, batch).mean()
            slopes = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
        moved = {
            name: leaf.detach() if slope is None else leaf.detach() - lr * slope
            for (name, leaf), slope in zip(leaves.items(), slopes, strict=True)
        }
        return state | moved

    def patch(rows: ArrayLike) -> NDArray[np.float64]:
        """Errors: NonFiniteValue."""
        chosen = row_positions(rows, len(train), "The rows", distinct=False)
        state = start
        for _ in range(steps if len(chosen) else 0):
            state = stepped(state, train.take(chosen))
        with torch.no_grad():
            pieces = [
                losses(state, query.take(slice(first, first + batch_size))).double()
                for first in range(0, len(query), batch_size)
            ]
        found = torch.cat(pieces).cpu().numpy()
        if not np.isfinite(found).all():
            first = int(np.isfinite(found).argmin())
            raise NonFiniteValue(
                f"The loss of query {first} is {found[first]} after {steps if len(chosen) else 0} steps of lr {lr}; "
                "a smaller lr may help."
            )
        return found

    return patch


def _copied(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model).eval()
    except (RuntimeError, TypeError) as error:
        raise UnsupportedModel(f"The model cannot be copied: {error}") from error
