"""The slow plain way: a model in float64, one row at a time, first derivatives by backward passes alone.

It is what other ways are verified against, and shares no derivative with them: no layer rule, no vectorised pass, no
forward mode, no algebra. A provider made with `plain=True` computes like this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from headwater.gradients.likelihoods import MOST
from headwater.gradients.provider import BlockGradients, Kind
from headwater.torch.batch import TorchBatch
from headwater.torch.capture import detached_state, run
from headwater.torch.check import close, one_row_alone
from headwater.torch.losses import Loss, row_losses
from headwater.torch.surroundings import autograd_on
from headwater.torch.tree import floating, tensors_in, with_tensors

ByName = Mapping[str, torch.Tensor]
Leaves = dict[str, torch.Tensor]

Choose = Callable[[TorchBatch, Any], Sequence[torch.Tensor] | None]
"""(a batch of one row, its output) -> cotangents like the output."""

MOST_OUTPUTS = 512
"""Numbers of output of a row up to which its Jacobian is written out."""


@dataclass(frozen=True, eq=False)
class PlainRows:
    """Gradients and curvature of single rows of a model in float64, by plain autograd.

    names: of parameters, in their order.
    """

    model: nn.Module
    loss: Loss

    def gradient(self, row: TorchBatch, names: Iterable[str], loss: Loss) -> ByName:
        """Of this loss, at a batch of one row."""
        with autograd_on():
            state, leaves = self._leaves(names)
            return one_row_alone(self.model, loss, row, {**state, **leaves}, leaves)[1]

    def along(self, rows: Sequence[TorchBatch], names: Sequence[str], choose: Choose) -> list[list[ByName]] | None:
        """Gradients of each row's output along its cotangents, [cotangent][row].

        None if a row has no cotangents, or another number of them than others.
        """
        found: list[list[ByName]] = []
        for row in rows:
            with autograd_on():
                state, leaves = self._leaves(names)
                output = run(self.model, {**state, **leaves}, row.x)
                cotangents = choose(row, output.detach() if isinstance(output, torch.Tensor) else output)
                if cotangents is None or (found and len(cotangents) != len(found[0])):
                    return None
                # A backward pass for each cotangent: nothing is vectorised that could hide a mistake.
                flat = (_slopes((output * v).sum(), list(leaves.values()), again=True) for v in cotangents)
                found.append([_by_name(slopes, leaves) for slopes in flat])
        return [[row[k] for row in found] for k in range(len(found[0]))]

    def ggn_cotangents(self, row: TorchBatch, output: object) -> Sequence[torch.Tensor] | None:
        """From the eigenvectors of the row's output Hessian; None where it is large, or has a negative eigenvalue."""
        if not isinstance(output, torch.Tensor) or output.numel() > MOST:
            return None
        values, vectors = torch.linalg.eigh(self._output_hessian(row, output))
        # As the fast path decides: both must have draws for the same rows.
        if bool((values < -1e-9 * values.abs().max()).any()):
            return None
        return [(v * c.clamp(min=0).sqrt()).reshape(output.shape) for v, c in zip(vectors.T, values, strict=True)]

    def product(self, row: TorchBatch, names: Iterable[str], vectors: torch.Tensor, kind: Kind) -> torch.Tensor:
        """The row's curvature by these parameters times vectors: (K, D)."""
        with autograd_on():
            state, leaves = self._leaves(names)
            output = run(self.model, {**state, **leaves}, row.x)
            compute = self._ggn if kind == "ggn" else self._hessian
            return compute(row, output, list(leaves.values()), vectors)

    def _ggn(self, row: TorchBatch, output: object, leaves: list[torch.Tensor], vectors: torch.Tensor) -> torch.Tensor:
        """J^T H J v, J written out: one backward pass for each number of output; for many, v by v through backward."""
        outputs = floating(output)
        if sum(t.numel() for t in outputs) > MOST_OUTPUTS:
            return torch.stack([self._ggn_along(row, output, outputs, leaves, v) for v in vectors])
        jacobian = torch.stack(
            [_slopes(number, leaves, again=True) for t in outputs for number in t.reshape(-1).unbind()]
        )
        return vectors @ jacobian.T @ self._output_hessian(row, output) @ jacobian

    def _ggn_along(
        self, row: TorchBatch, output: object, outputs: list[torch.Tensor], leaves: list[torch.Tensor], v: torch.Tensor
    ) -> torch.Tensor:
        """J v as the slope of <J^T d, v> by d; then H; then J^T."""
        # J^T d is linear in d: its derivative along v by d, at any d, is J v.
        d = [torch.zeros_like(t, requires_grad=True) for t in outputs]
        pulled = _slopes(_dot(outputs, d), leaves, create_graph=True)
        along = _slopes((pulled * v).sum(), d, again=True)
        everything = [t.detach() for t in tensors_in(output)]
        points = [t.requires_grad_() for t in everything if t.is_floating_point()]
        loss = row_losses(self.loss, with_tensors(output, iter(everything)), row.y).sum()
        product = _slopes((_slopes(loss, points, create_graph=True) * along).sum(), points)
        pieces = zip(product.split([t.numel() for t in outputs]), outputs, strict=True)
        return _slopes(_dot(outputs, [piece.reshape(t.shape) for piece, t in pieces]), leaves, again=True)

    def _hessian(
        self, row: TorchBatch, output: object, leaves: list[torch.Tensor], vectors: torch.Tensor
    ) -> torch.Tensor:
        """Each vector's product from the slope along it."""
        # H v is the gradient of <gradient, v> (Pearlmutter 1994).
        slope = _slopes(row_losses(self.loss, output, row.y).sum(), leaves, create_graph=True)
        return torch.stack([_slopes((slope * v).sum(), leaves, again=True) for v in vectors])

    def _output_hessian(self, row: TorchBatch, output: object) -> torch.Tensor:
        """Of the row's loss by the numbers of its output: [c, c]."""
        with autograd_on():
            everything = [t.detach() for t in tensors_in(output)]
            leaves = [t.requires_grad_() for t in everything if t.is_floating_point()]
            loss = row_losses(self.loss, with_tensors(output, iter(everything)), row.y).sum()
            slope = _slopes(loss, leaves, create_graph=True)
            return torch.stack([_slopes(number, leaves, again=True) for number in slope.unbind()])

    def _leaves(self, names: Iterable[str]) -> tuple[dict[str, torch.Tensor], Leaves]:
        state = detached_state(self.model)
        return state, {name: state[name].requires_grad_() for name in names}


def rows_of(batch: TorchBatch) -> list[TorchBatch]:
    """Batches of one row."""
    return [batch.take(slice(k, k + 1)) for k in range(len(batch))]


def is_the_same(plain: BlockGradients, layered: BlockGradients, rows: slice) -> bool:
    """Whether layers' inputs and output-gradients, which Kronecker factors need, give the plain numbers."""
    for name, value in plain.items():
        got: Any = layered[name].take(rows).flat()
        expected: Any = value.flat()
        if not close(got, expected):
            return False
    return True


def _dot(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.stack([(a * b).sum() for a, b in zip(one, other, strict=True)]).sum()


def _slopes(
    value: torch.Tensor, leaves: list[torch.Tensor], *, again: bool = False, create_graph: bool = False
) -> torch.Tensor:
    """The gradient of a number by all leaves, flat. again: the graph is needed once more."""
    if not value.requires_grad:
        return torch.cat([torch.zeros_like(leaf).reshape(-1) for leaf in leaves])
    grads = torch.autograd.grad(
        value,
        leaves,
        retain_graph=again or create_graph,
        create_graph=create_graph,
        allow_unused=True,
        materialize_grads=True,
    )
    # Written out again: what verifies takes no part in what it verifies.
    return torch.cat([(g.to_dense() if g.is_sparse else g).reshape(-1) for g in grads])


def _by_name(flat: torch.Tensor, leaves: Leaves) -> ByName:
    pieces = flat.split([leaf.numel() for leaf in leaves.values()])
    return {name: piece.reshape(leaf.shape) for (name, leaf), piece in zip(leaves.items(), pieces, strict=True)}
