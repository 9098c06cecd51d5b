"""A torch model's training steps, taken again: gradients, and cotangents pulled through them for all queries at once.

With c the rows' shares, L(w, c) = sum c_i l_i(w) and g = grad_w L: the derivatives of <g, r> by c and by w are
<r, grad l_i> and H r. So one backward pass through the graph of g gives both, for each cotangent r, and torch's
vectorised backward for all of them together.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import nn

from headwater.arrays import to_numpy
from headwater.errors import UnsupportedModel
from headwater.torch.batch import TorchBatch
from headwater.torch.capture import detached_state, run
from headwater.torch.losses import Loss, row_losses
from headwater.torch.plan import differs_in_training, mixes_rows_always
from headwater.torch.precision import wide
from headwater.torch.products import batched_vjp, ggn_product
from headwater.torch.provider import TorchGradientProvider
from headwater.torch.surroundings import autograd_on, lock_of, twice_differentiable
from headwater.torch.tree import dense
from headwater.trajectory.rules import Arrays, State
from headwater.trajectory.steps import Blocks, Piece, Point, TrainingModel
from headwater.trajectory.trajectory import Trajectory

Tensors = dict[str, torch.Tensor]
_generator_lock = threading.RLock()
"""Held while torch's generator, one for the whole process, is in a record's state. Taken after a model's own lock."""


def draws_in_training(module: nn.Module) -> bool:
    """Whether, in train mode, it draws random numbers, from a generator whose state can be put back."""
    # Recurrent layers keep a generator of their own on a GPU, and batch normalisation draws nothing: it mixes rows.
    mixes = isinstance(module, (nn.RNNBase, nn.modules.batchnorm._BatchNorm))
    return differs_in_training(module) and not mixes


def norms_of(model: nn.Module) -> dict[str, nn.Module]:
    """Batch normalisations that keep statistics, by name: in eval mode each is an affine map of its own buffers."""
    kept = ((name, m) for name, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
    return {name: module for name, module in kept if not mixes_rows_always(module)}


def statistics_of(model: nn.Module, names: Collection[str]) -> dict[str, np.ndarray]:
    """Copies of the buffers of these modules, by name."""
    modules = dict(model.named_modules())
    return {
        f"{name}.{buffer}".removeprefix("."): np.array(to_numpy(value))
        for name in names
        for buffer, value in modules[name].named_buffers()
    }


MIXES = (
    "mixes the rows of a step in train mode: each row's outputs, and so its gradient, are those of its batch, and a "
    "row's weight has no derivative of its own. Freeze it (.eval() before hw.record and after each model.train(): its "
    "statistics are then in the record), or train with layer or group norm"
)


def check_repeatable(model: nn.Module, random: bool = False, frozen: Collection[str] = ()) -> None:
    """Whatever mode it is in now. random: whether it is known what dropout drew. frozen: batch normalisations that
    were in eval mode all along.

    Errors: UnsupportedModel for other batch normalisation, and for dropout unless what it drew is known.
    """
    norms = norms_of(model)
    for name, module in model.named_modules():
        if differs_in_training(module) and not (random and draws_in_training(module)) and name not in frozen:
            why = (
                "is random in training, and what it drew is not in the record: take that with hw.record in train "
                "mode, or train with p=0"
                if draws_in_training(module)
                else MIXES
                if name in norms
                else "mixes the rows of a step, or keeps random numbers of its own: its steps cannot be taken again "
                "row by row. Train with layer or group norm, and recurrent layers with dropout=0"
            )
            raise UnsupportedModel(f"{name or 'The model'} is {type(module).__name__}, which {why}.")


@contextmanager
def drawing(
    model: nn.Module, random: np.ndarray | None, device: torch.device, still: Collection[str] = ()
) -> Iterator[None]:
    """In train mode, with the generator in this state; both are put back. None: the model as it is.

    still: names of modules that are in eval mode for all that.
    """
    if random is None:
        yield
        return
    modes = [(name, module, module.training) for name, module in model.named_modules()]
    state = torch.as_tensor(random)
    # The model's modes and the process's generator, whichever model draws from it: one thread at a time.
    forked = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
    with lock_of(model), _generator_lock, forked:
        if device.type == "cuda":
            torch.cuda.set_rng_state(state, device)
        else:
            torch.set_rng_state(state)
        try:
            model.train()
            for name, module, _ in modes:
                module.training = module.training and name not in still
            yield
        finally:
            for _, module, mode in modes:
                module.training = mode


def generator_state(device: torch.device) -> np.ndarray:
    """Of the generator that a model there draws from: [bytes], uint8."""
    found = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
    return np.array(found.numpy())


def weights_of(provider: TorchGradientProvider) -> dict[str, np.ndarray]:
    """The model's parameters as they are now, by name."""
    return {name: to_numpy(p) for name, p in provider.model.named_parameters()}


def buffers_of(provider: TorchGradientProvider) -> dict[str, np.ndarray]:
    """The model's buffers as they are now, by name."""
    return {name: to_numpy(value) for name, value in provider.model.named_buffers()}


class TorchTraining(TrainingModel):
    """The model of a provider, whatever its present weights: in eval mode, and where its steps drew random numbers in
    train mode with these.

    random: whether the record has what was drawn. still: modules that were in eval mode all the same. frozen: batch
    normalisations among these, or of a model that was in eval mode as a whole.
    Errors: UnsupportedModel for other batch normalisation, and for dropout whose numbers are not known.
    """

    def __init__(
        self,
        provider: TorchGradientProvider,
        random: bool = False,
        still: Collection[str] = (),
        frozen: Collection[str] = (),
    ):
        check_repeatable(provider.model, random, frozen)
        self.provider, self.random, self.still, self.frozen = provider, random, frozenset(still), frozenset(frozen)
        self._own: dict[str, torch.Tensor] = {n: p.detach() for n, p in provider.model.named_parameters()}
        self._fixed = detached_state(provider.model)

    @classmethod
    def of(cls, provider: TorchGradientProvider, record: Trajectory) -> TorchTraining:
        """As the record's training called it. Errors: as above."""
        return cls(provider, record.header.random > 0, record.header.still, record.header.frozen)

    def put(self, state: State) -> State:
        def own(values: Any) -> Any:
            return {name: torch.as_tensor(value).to(self._own[name], copy=True) for name, value in values.items()}

        return State(own(state.parameters), {kind: own(values) for kind, values in state.memory.items()})

    def at(self, parameters: Arrays, pieces: Sequence[Piece], curvature: str | None) -> Point:
        return TorchPoint(self, parameters, pieces, curvature)

    def gradient(self, parameters: Arrays, pieces: Sequence[Piece]) -> Arrays:
        if not pieces:  # a step whose rows are not known
            return {name: torch.zeros_like(value) for name, value in parameters.items()}
        # Fused attention draws its masks inside a kernel of its own, and other ones than plain operations do: a replay
        # has to be of the operations that the sweep differentiates.
        plain = twice_differentiable() if self.random else nullcontext()
        with autograd_on(), self.provider.own_precision(), plain:
            leaves = self.leaves(parameters)
            totals = []
            for piece in pieces:
                losses = self.losses(self.provider.loss, leaves, self.ready(piece.batch), piece.random)
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
        # A GPU's masks are others in another precision.
        if self.provider.dtype == "float64" or (self.random and self.provider.device.type != "cpu"):
            return None
        return TorchTraining(self.provider.in_float64(), self.random, self.still, self.frozen)

    # For points ---------------------------------------------------------------------------------------------------

    def leaves(self, parameters: Any) -> Tensors:
        return {name: value.detach().requires_grad_() for name, value in parameters.items()}

    def ready(self, batch: TorchBatch) -> TorchBatch:
        return self.provider.as_batch(batch.x, batch.y)

    def output(self, leaves: Any, batch: TorchBatch, random: np.ndarray | None = None) -> Any:
        with drawing(self.provider.model, random, self.provider.device, self.still):
            return run(self.provider.model, {**self._fixed, **leaves}, batch.x)

    def losses(self, loss: Loss, leaves: Any, batch: TorchBatch, random: np.ndarray | None = None) -> torch.Tensor:
        """Of each row: [n]."""
        return wide(row_losses(loss, self.output(leaves, batch, random), batch.y))


class TorchPoint(Point):
    """The objective of a step at some parameters: its graph stays while this does."""

    def __init__(self, model: TorchTraining, parameters: Arrays, pieces: Sequence[Piece], curvature: str | None):
        self.model, self.pieces, self.curvature = model, pieces, curvature
        with autograd_on(), model.provider.own_precision(), twice_differentiable():
            self.leaves = model.leaves(parameters)
            batches = [model.ready(piece.batch) for piece in pieces]
            self.batches = batches
            each = [
                model.losses(model.provider.loss, self.leaves, batch, piece.random)
                for batch, piece in zip(batches, pieces, strict=True)
            ]
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

    def pull(self, through: Arrays, blocks: Blocks = None) -> tuple[np.ndarray, Arrays]:
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
            each = along[None] if blocks is None else torch.stack([self._along(through, names) for names in blocks])
        tau = to_numpy((each * self.shares.detach()).detach().double())
        return tau, {name: product.detach() for name, product in zip(self.leaves, products, strict=True)}

    def _along(self, through: Arrays, names: Sequence[str]) -> torch.Tensor:
        """<r, grad l_i> over some parameters: [q, n]."""
        mine = dict(zip(self.leaves, self.slopes, strict=True))
        return batched_vjp([mine[name] for name in names], [self.shares], [through[name] for name in names])[0]

    def _ggn(self, leaves: list[torch.Tensor], cotangents: list[torch.Tensor]) -> list[torch.Tensor]:
        starts = np.cumsum([0, *(len(piece.shares) for piece in self.pieces)])
        totals: list[torch.Tensor] = []
        for start, batch, piece in zip(starts[:-1].tolist(), self.batches, self.pieces, strict=True):
            shares = self.shares.detach()[start : start + len(batch)]

            def output(given: Sequence[torch.Tensor], batch: TorchBatch = batch, piece: Piece = piece) -> Any:
                return self.model.output(dict(zip(self.leaves, given, strict=True)), batch, piece.random)

            def total(output: Any, batch: TorchBatch = batch, shares: torch.Tensor = shares) -> torch.Tensor:
                return (row_losses(self.model.provider.loss, output, batch.y) * shares).sum()

            # Forward mode goes through the model once for all cotangents, where random numbers are refused.
            found, _ = ggn_product(output, total, leaves, cotangents, forward=piece.random is None)
            totals = found if not totals else [a + b for a, b in zip(totals, found, strict=True)]
        return totals
