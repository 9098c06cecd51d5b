"""A torch model's training steps, taken again: gradients, and cotangents pulled through them for all queries at once.

With c the rows' shares, L(w, c) = sum c_i l_i(w) and g = grad_w L: the derivatives of <g, r> by c and by w are
<r, grad l_i> and H r. So one backward pass through the graph of g gives both, for each cotangent r, and torch's
vectorised backward for all of them together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from headwater.arrays import to_numpy
from headwater.errors import UnsupportedModel
from headwater.torch.batch import TorchBatch
from headwater.torch.capture import detached_state, run
from headwater.torch.losses import Loss, row_losses
from headwater.torch.plan import differs_in_training
from headwater.torch.precision import wide
from headwater.torch.products import batched_vjp, ggn_product
from headwater.torch.provider import TorchGradientProvider
from headwater.torch.surroundings import autograd_on, twice_differentiable
from headwater.torch.tree import dense
from headwater.trajectory.rules import Arrays, State
from headwater.trajectory.steps import Piece, Point, TrainingModel

Tensors = dict[str, torch.Tensor]


class TorchTraining(TrainingModel):
    """The model of a provider, in eval mode, whatever its present weights.

    Errors: UnsupportedModel for dropout and batch normalisation: such a step is another one each time.
    """

    def __init__(self, provider: TorchGradientProvider):
        for name, module in provider.model.named_modules():
            if differs_in_training(module):
                raise UnsupportedModel(
                    f"{name or 'The model'} is {type(module).__name__}, whose training steps are random or mix rows: "
                    "they cannot be taken again row by row. Train with p=0, and with layer or group norm."
                )
        self.provider = provider
        self._own: dict[str, torch.Tensor] = {n: p.detach() for n, p in provider.model.named_parameters()}
        self._fixed = detached_state(provider.model)

    def put(self, state: State) -> State:
        def own(values: Any) -> Any:
            return {name: torch.as_tensor(value).to(self._own[name], copy=True) for name, value in values.items()}

        return State(own(state.parameters), {kind: own(values) for kind, values in state.memory.items()})

    def own(self) -> dict[str, np.ndarray]:
        return {name: to_numpy(value) for name, value in self._own.items()}

    def at(self, parameters: Arrays, pieces: Sequence[Piece], curvature: str | None) -> Point:
        return TorchPoint(self, parameters, pieces, curvature)

    def gradient(self, parameters: Arrays, pieces: Sequence[Piece]) -> Arrays:
        if not pieces:  # a step whose rows are not known
            return {name: torch.zeros_like(value) for name, value in parameters.items()}
        with autograd_on(), self.provider.own_precision():
            leaves = self.leaves(parameters)
            totals = []
            for piece in pieces:
                losses = self.losses(self.provider.loss, leaves, self.ready(piece.batch))
                totals.append((losses * torch.as_tensor(piece.shares).to(losses)).sum())
            slopes = torch.autograd.grad(torch.stack(totals).sum(), list(leaves.values()), allow_unused=True)
        return {
            name: torch.zeros_like(leaf) if g is None else dense(g).detach()
            for (name, leaf), g in zip(leaves.items(), slopes, strict=True)
        }

    def query_grads(self, parameters: Arrays, batch: Any) -> Arrays:
        with autograd_on(), self.provider.own_precision():
            leaves = self.leaves(parameters)
            losses = self.losses(self.provider.measurement, leaves, self.ready(batch))
            units = torch.eye(len(losses), dtype=losses.dtype, device=losses.device)
            found = batched_vjp([losses], list(leaves.values()), [units])
        return dict(zip(leaves, found, strict=True))

    def query_losses(self, parameters: Arrays, batch: Any) -> np.ndarray:
        with torch.no_grad(), self.provider.own_precision():
            losses = self.losses(self.provider.measurement, dict(parameters), self.ready(batch))
        return to_numpy(losses.double())

    def wide(self) -> TrainingModel | None:
        return None if self.provider.dtype == "float64" else TorchTraining(self.provider.in_float64())

    # For points ---------------------------------------------------------------------------------------------------

    def leaves(self, parameters: Any) -> Tensors:
        return {name: value.detach().requires_grad_() for name, value in parameters.items()}

    def ready(self, batch: TorchBatch) -> TorchBatch:
        return self.provider.as_batch(batch.x, batch.y)

    def output(self, leaves: Any, batch: TorchBatch) -> Any:
        return run(self.provider.model, {**self._fixed, **leaves}, batch.x)

    def losses(self, loss: Loss, leaves: Any, batch: TorchBatch) -> torch.Tensor:
        """Of each row: [n]."""
        return wide(row_losses(loss, self.output(leaves, batch), batch.y))


class TorchPoint(Point):
    """The objective of a step at some parameters: its graph stays while this does."""

    def __init__(self, model: TorchTraining, parameters: Arrays, pieces: Sequence[Piece], curvature: str | None):
        self.model, self.pieces, self.curvature = model, pieces, curvature
        with autograd_on(), model.provider.own_precision(), twice_differentiable():
            self.leaves = model.leaves(parameters)
            batches = [model.ready(piece.batch) for piece in pieces]
            self.batches = batches
            each = [model.losses(model.provider.loss, self.leaves, batch) for batch in batches]
            self.losses = torch.cat(each)
            self.shares = torch.as_tensor(np.concatenate([piece.shares for piece in pieces])).to(self.losses)
            self.shares.requires_grad_()
            total = (self.losses * self.shares).sum()
            self.slopes = [
                dense(g)
                for g in torch.autograd.grad(
                    total, list(self.leaves.values()), create_graph=True, allow_unused=True, materialize_grads=True
                )
            ]

    @property
    def grads(self) -> Arrays:
        return {name: g.detach() for name, g in zip(self.leaves, self.slopes, strict=True)}

    def pull(self, through: Arrays) -> tuple[np.ndarray, Arrays]:
        cotangents: list[Any] = [through[name] for name in self.leaves]
        leaves = list(self.leaves.values())
        with autograd_on(), self.model.provider.own_precision(), twice_differentiable():
            wanted = [self.shares, *leaves] if self.curvature == "hessian" else [self.shares]
            along, *products = batched_vjp(self.slopes, wanted, cotangents)
            if self.curvature == "fisher":
                # sum over rows of share_i g_i <g_i, r>.
                products = batched_vjp([self.losses], leaves, [along * self.shares.detach()])
            elif self.curvature == "ggn":
                products = self._ggn(leaves, cotangents)
            elif self.curvature is None:
                products = [torch.zeros_like(c) for c in cotangents]
        tau = to_numpy((along * self.shares.detach()).detach().double())
        return tau, {name: product.detach() for name, product in zip(self.leaves, products, strict=True)}

    def _ggn(self, leaves: list[torch.Tensor], cotangents: list[torch.Tensor]) -> list[torch.Tensor]:
        starts = np.cumsum([0, *(len(piece.shares) for piece in self.pieces)])
        totals: list[torch.Tensor] = []
        for start, batch in zip(starts[:-1].tolist(), self.batches, strict=True):
            shares = self.shares.detach()[start : start + len(batch)]

            def output(given: Sequence[torch.Tensor], batch: TorchBatch = batch) -> Any:
                return self.model.output(dict(zip(self.leaves, given, strict=True)), batch)

            def total(output: Any, batch: TorchBatch = batch, shares: torch.Tensor = shares) -> torch.Tensor:
                return (row_losses(self.model.provider.loss, output, batch.y) * shares).sum()

            found, _ = ggn_product(output, total, leaves, cotangents)
            totals = found if not totals else [a + b for a, b in zip(totals, found, strict=True)]
        return totals
