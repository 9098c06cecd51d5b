"""The slow plain way: a copy of the model in float64, one row at a time, first derivatives by backward passes alone.

It is what other ways are verified against, and shares no derivative with them: no layer rule, no vectorised pass, no
forward mode, no algebra.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from headwater.gradients.block import BlockGradient
from headwater.gradients.likelihoods import MOST
from headwater.gradients.provider import BlockGradients, Fisher, Kind
from headwater.torch.batch import TorchBatch
from headwater.torch.capture import detached_state, run
from headwater.torch.check import close, one_row_alone
from headwater.torch.likelihoods import fisher_cotangents
from headwater.torch.losses import row_losses
from headwater.torch.precision import doubled
from headwater.torch.provider import TorchGradientProvider, undisturbed
from headwater.torch.surroundings import autograd_on
from headwater.torch.tree import floating, tensors_in, with_tensors

ByName = Mapping[str, torch.Tensor]
Leaves = dict[str, torch.Tensor]

MOST_OUTPUTS = 512
"""Numbers of output of a row up to which its Jacobian is written out."""


class PlainTorchProvider(TorchGradientProvider):
    """A model in float64 whose rows' gradients and curvature come from plain autograd, one row at a time.

    Only which labels are drawn is TorchGradientProvider's; and gradients of drawn labels keep its layers' inputs, which
    Kronecker factors are made of, where a quarter of the batch's rows shows that these give the plain numbers. Rows
    without ids are named by what they held before they became float64, so that random draws stay theirs.
    """

    def _made_ready(self, batch: TorchBatch) -> TorchBatch:
        if not isinstance(batch, TorchBatch) or batch.ids is None:
            batch = TorchBatch(batch.x, batch.y, weights=getattr(batch, "weights", None), ids=super().row_keys(batch))
        return super()._made_ready(doubled(batch.to(self.device)))

    def as_batch(self, x: Any, y: Any) -> TorchBatch:
        return self._ready(TorchBatch(x, y))

    @undisturbed
    def grads(self, batch: TorchBatch, *, query: bool = False, weighted: bool = True) -> BlockGradients:
        loss = self.measurement if query else self.loss
        batch = self._prepare(batch, loss)
        return self._in_blocks([self._of_loss_alone(row, loss) for row in _rows(batch)], batch, weighted)

    @undisturbed
    def fisher_grads(
        self, batch: TorchBatch, fisher: Fisher, *, draws: range = range(1), seed: int = 0
    ) -> list[BlockGradients]:
        if fisher == "empirical":
            return [self.grads(batch, weighted=False)]
        batch = self._prepare(batch)

        def along(row: TorchBatch, output: Any) -> Sequence[torch.Tensor]:
            numbers = [partial(self._numbers, self.row_keys(row), number, seed) for number in draws]
            return list(fisher_cotangents(self.likelihood, self.loss, output, row.y, fisher, numbers))

        layered = super().fisher_grads(batch, fisher, draws=draws, seed=seed)
        few = slice(0, max(1, len(batch) // 4))  # each row costs a backward pass for every draw
        found = self._pulled_back(batch.take(few), along) or []
        if all(_is_the_same(*pair, few) for pair in zip(found, layered, strict=True)):
            return layered
        return self._pulled_back(batch, along) or []

    @undisturbed
    def ggn_grads(self, batch: TorchBatch) -> list[BlockGradients] | None:
        """From the eigenvectors of each row's output Hessian; None where it is large, or has a negative eigenvalue."""
        batch = self._prepare(batch)

        def along(row: TorchBatch, output: Any) -> Sequence[torch.Tensor] | None:
            if not isinstance(output, torch.Tensor) or output.numel() > MOST:
                return None
            values, vectors = torch.linalg.eigh(self._output_hessian(row, output))
            if bool((values < -1e-9 * values.abs().max()).any()):
                return None
            return [(v * c.clamp(min=0).sqrt()).reshape(output.shape) for v, c in zip(vectors.T, values, strict=True)]

        return self._pulled_back(batch, along)

    @undisturbed
    def curvature_product(self, batch: TorchBatch, block: str, vectors: torch.Tensor, kind: Kind) -> torch.Tensor:
        batch = self._prepare(batch)
        names = [p.name for p in self._block_parameters(block)]
        weights = self.row_weights(batch)
        vectors, total = vectors.double(), torch.zeros_like(vectors, dtype=torch.float64)
        with autograd_on():
            for k, row in enumerate(_rows(batch)):
                state, leaves = self._leaves(names)
                output = run(self.model, {**state, **leaves}, row.x)
                product = self._ggn if kind == "ggn" else self._hessian
                mine = product(row, output, list(leaves.values()), vectors)
                total += mine if weights is None else mine * weights[k]
        return total

    def _ggn(self, row: TorchBatch, output: Any, leaves: list[torch.Tensor], vectors: torch.Tensor) -> torch.Tensor:
        """J^T H J v, J written out: one backward pass for each number of output; for many, v by v through backward."""
        outputs = floating(output)
        if sum(t.numel() for t in outputs) > MOST_OUTPUTS:
            return torch.stack([self._ggn_along(row, output, outputs, leaves, v) for v in vectors])
        jacobian = torch.stack(
            [_slopes(number, leaves, again=True) for t in outputs for number in t.reshape(-1).unbind()]
        )
        return vectors @ jacobian.T @ self._output_hessian(row, output) @ jacobian

    def _ggn_along(
        self, row: TorchBatch, output: Any, outputs: list[torch.Tensor], leaves: list[torch.Tensor], v: torch.Tensor
    ) -> torch.Tensor:
        """J v as the slope of <J^T d, v> by d; then H; then J^T."""
        d = [torch.zeros_like(t, requires_grad=True) for t in outputs]
        pulled = _slopes(_dot(outputs, d), leaves, create_graph=True)
        along = _slopes((pulled * v).sum(), d, again=True)
        everything = [t.detach() for t in tensors_in(output)]
        points = [t.requires_grad_() for t in everything if t.is_floating_point()]
        loss = row_losses(self.loss, with_tensors(output, iter(everything)), row.y).sum()
        bent = _slopes((_slopes(loss, points, create_graph=True) * along).sum(), points)
        pieces = zip(bent.split([t.numel() for t in outputs]), outputs, strict=True)
        return _slopes(_dot(outputs, [piece.reshape(t.shape) for piece, t in pieces]), leaves, again=True)

    def _hessian(self, row: TorchBatch, output: Any, leaves: list[torch.Tensor], vectors: torch.Tensor) -> torch.Tensor:
        """Each vector's product from the slope along it."""
        slope = _slopes(row_losses(self.loss, output, row.y).sum(), leaves, create_graph=True)
        return torch.stack([_slopes((slope * v).sum(), leaves, again=True) for v in vectors])

    def _output_hessian(self, row: TorchBatch, output: Any) -> torch.Tensor:
        """Of the row's loss by the numbers of its output: [c, c]."""
        with autograd_on():
            everything = [t.detach() for t in tensors_in(output)]
            leaves = [t.requires_grad_() for t in everything if t.is_floating_point()]
            loss = row_losses(self.loss, with_tensors(output, iter(everything)), row.y).sum()
            slope = _slopes(loss, leaves, create_graph=True)
            return torch.stack([_slopes(number, leaves, again=True) for number in slope.unbind()])

    def _pulled_back(
        self, batch: TorchBatch, along: Callable[[TorchBatch, Any], Sequence[torch.Tensor] | None]
    ) -> list[BlockGradients] | None:
        """Gradients of each row's output along cotangents; None if a row has none, or another number than others."""
        found: list[list[ByName]] = []
        for row in _rows(batch):
            with autograd_on():
                state, leaves = self._leaves(self._names)
                output = run(self.model, {**state, **leaves}, row.x)
                cotangents = along(row, output.detach() if isinstance(output, torch.Tensor) else output)
                if cotangents is None or (found and len(cotangents) != len(found[0])):
                    return None
                flat = (_slopes((output * v).sum(), list(leaves.values()), again=True) for v in cotangents)
                found.append([_by_name(slopes, leaves) for slopes in flat])
        return [self._in_blocks([row[k] for row in found], batch, weighted=False) for k in range(len(found[0]))]

    def _of_loss_alone(self, row: TorchBatch, loss: Any) -> ByName:
        with autograd_on():
            state, leaves = self._leaves(self._names)
            return one_row_alone(self.model, loss, row, {**state, **leaves}, leaves)[1]

    def _leaves(self, names: Iterable[str]) -> tuple[dict[str, torch.Tensor], Leaves]:
        state = detached_state(self.model)
        return state, {name: state[name].requires_grad_() for name in names}

    def _in_blocks(self, rows: Sequence[ByName], batch: TorchBatch, weighted: bool) -> BlockGradients:
        blocks: BlockGradients = BlockGradients()
        weights = self.row_weights(batch) if weighted else None
        for name, layout in self.layouts.items():
            names = [p.name for p in layout.block.parameters]
            flat = torch.stack([torch.cat([row[n].reshape(-1) for n in names]) for row in rows])
            value = BlockGradient.from_flat(layout, flat)
            blocks[name] = value if weights is None else value.weighted(weights)
        return blocks


def _is_the_same(plain: BlockGradients, layered: BlockGradients, rows: slice) -> bool:
    """Whether layers' inputs and output-gradients, which Kronecker factors need, give the plain numbers."""
    return all(close(layered[name].take(rows).flat(), value.flat()) for name, value in plain.items())


def _dot(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.stack([(a * b).sum() for a, b in zip(one, other, strict=True)]).sum()


def _rows(batch: TorchBatch) -> list[TorchBatch]:
    return [batch.take(slice(k, k + 1)) for k in range(len(batch))]


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
