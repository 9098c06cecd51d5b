"""Per-sample gradients and second-order products of a torch model, as values of the gradient algebra."""

from __future__ import annotations

import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from headwater.arrays import rows_within_memory
from headwater.blocks import Layout, Structure
from headwater.errors import (
    BatchMismatch,
    BlockMismatch,
    InvalidInput,
    RowsInteract,
    ShapeMismatch,
    UnsupportedModel,
)
from headwater.gradients.algebra import Dense, Gradient
from headwater.gradients.block import BlockGradient
from headwater.gradients.coverage import Coverage
from headwater.gradients.outer import Outer, RowSparse
from headwater.gradients.provider import BlockGradients, Fisher, Kind, OutputFunction, StructuredGradientProvider
from headwater.gradients.rowwise import differing
from headwater.gradients.words import in_words
from headwater.random import name_keys, row_digests, row_keys, row_numbers
from headwater.torch.batch import TorchBatch, as_tensor, differentiable_input
from headwater.torch.capture import Recording, autograd_on, detached_state, record, run, twice_differentiable
from headwater.torch.check import (
    check_finite_factors,
    check_finite_grads,
    check_independence,
    check_rows,
    close,
    one_row_alone,
)
from headwater.torch.likelihoods import Likelihood, find_likelihood, fisher_cotangents, ggn_cotangents
from headwater.torch.losses import Loss, check_finite, check_loss, normalisation, row_losses
from headwater.torch.measurements import negative_logit, negative_margin
from headwater.torch.plan import as_matrix, check_eval, fill_parts, make_plan, trainable_parameters, wide
from headwater.torch.products import batched_vjp, ggn_product, hessian_product, rowwise, rowwise_grads

ARRAYS = (torch.Tensor, np.ndarray)


class TorchGradientProvider(StructuredGradientProvider[TorchBatch, torch.Tensor]):
    """Per-sample gradients of a torch model.

    The loss of a row is `loss(model(row), target)` on that row alone, summed if it is not reduced; `measurement`, a
    function of the same kind, takes its place for query rows. The model is never changed: not its mode, parameters,
    gradients, hooks or buffers. On the first rows that it sees, the provider compares what its layer rules give with
    plain autograd, row by row; parameters that disagree get plain per-sample gradients, and rows that act on each
    other are refused.

    model: any nn.Module that takes rows along the first axis. loss: any callable of (output, target). blocks: "full",
    "layer", "parameter" or {name: [parameter or module names]}. likelihood: the distribution behind the loss, where it
    is not known by itself ("cross_entropy", "binary_cross_entropy", "squared_error", or a `Likelihood`).
    Errors: RowsInteract for a model in train mode with dropout or batch norm; UnsupportedLoss; BlockMismatch.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        *,
        blocks: Structure = "full",
        measurement: Loss | None = None,
        likelihood: Likelihood | str | None = None,
    ):
        check_loss(loss)
        check_loss(loss if measurement is None else measurement)
        self.model = model
        self.loss = loss
        self.measurement = loss if measurement is None else measurement
        self.likelihood = find_likelihood(loss, likelihood)
        self._normalisation: str | None = None
        self._structure = blocks
        self._modules = dict(model.named_modules())
        self._plan = make_plan(model, blocks)
        self._checked = 0
        self._numbers_per_row = 1

    # What there is ------------------------------------------------------------------------------------------------

    @property
    def layouts(self) -> OrderedDict[str, Layout]:
        return self._plan.layouts

    @property
    def coverage(self) -> Coverage:
        """Attributed and trainable parameters."""
        inside = {p.name for layout in self.layouts.values() for p in layout.block.parameters}
        frozen = sum(p.numel() for p in self.model.parameters() if not p.requires_grad)
        return Coverage.of(trainable_parameters(self.model), inside, frozen)

    @property
    def dtype(self) -> str:
        return str(next(self.model.parameters()).dtype).removeprefix("torch.")

    @property
    def coverage_fraction(self) -> float:
        return self.coverage.fraction

    @property
    def explained(self) -> str:
        if self.measurement is self.loss:
            return "loss"
        return getattr(self.measurement, "__name__", type(self.measurement).__name__)

    def settings(self) -> tuple[str, ...]:
        return tuple(in_words(value) for value in (self.loss, self.measurement, self.likelihood))

    @property
    def normalisation(self) -> str | None:
        return self._normalisation

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def fingerprint(self) -> tuple[int, ...]:
        """Checksums of the parameters' and buffers' bytes."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        return tuple(zlib.crc32(_host(_as_bytes(t)).tobytes()) for t in tensors)

    # Batches ------------------------------------------------------------------------------------------------------

    def as_batch(self, x: Any, y: Any) -> TorchBatch:
        return self._ready(TorchBatch(x, y))

    def _ready(self, batch: TorchBatch) -> TorchBatch:
        if not isinstance(batch, TorchBatch):
            batch = TorchBatch(batch.x, batch.y)
        if batch.x is None or batch.y is None:
            raise InvalidInput(f"{'x' if batch.x is None else 'y'} is None; a batch needs inputs and targets.")
        if len(batch) == 0:
            raise BatchMismatch("The batch has no rows.")
        batch = batch.to(self.device)
        kind = next(self.model.parameters()).dtype
        for leaf in tree_leaves(batch.x):
            if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() and leaf.dtype != kind and not self._checked:
                self._try_dtype(batch, leaf.dtype, kind)
        return batch

    def _try_dtype(self, batch: TorchBatch, given: torch.dtype, kind: torch.dtype) -> None:
        try:
            with torch.no_grad():
                run(self.model, detached_state(self.model), batch.take(slice(0, 1)).x)
        except RuntimeError as error:
            raise InvalidInput(
                f"x is {given}, the model's parameters are {kind}, and the model does not convert: {error}. "
                f"Pass x.to({kind})."
            ) from error

    def rows_at_once(self, batch: TorchBatch) -> int:
        self._prepare(batch)
        return rows_within_memory(self._numbers_per_row, next(self.model.parameters()))

    def row_weights(self, batch: TorchBatch) -> torch.Tensor | None:
        weights = as_tensor(batch.weights, self.device)
        return None if weights is None else weights.to(wide(next(self.model.parameters()).detach()).dtype)

    # Gradients ----------------------------------------------------------------------------------------------------

    def grads(self, batch: TorchBatch, *, query: bool = False, weighted: bool = True) -> BlockGradients:
        batch = self._prepare(batch)
        loss = self.measurement if query else self.loss
        with autograd_on():
            recording, state = self._record(batch)
            losses = row_losses(loss, recording.output, batch.y)
            check_finite(losses)
            values = self._values(recording, [losses], [torch.ones_like(losses)], batch)
            plain = self._plain_grads(batch, state, lambda output, target: loss(output, target).sum())
        return self._blocks(values | plain, len(batch), batch.weights if weighted else None)

    def fisher_grads(
        self, batch: TorchBatch, fisher: Fisher, *, draws: range = range(1), seed: int = 0
    ) -> list[BlockGradients]:
        batch = self._prepare(batch)
        numbers = [partial(self._numbers, self.row_keys(batch), number, seed) for number in draws]

        def choose(output: Any) -> list[torch.Tensor]:
            return list(fisher_cotangents(self.likelihood, self.loss, output, batch.y, fisher, numbers))

        found = self._pull_back(batch, choose)
        assert found is not None
        return found

    def ggn_grads(self, batch: TorchBatch) -> list[BlockGradients] | None:
        batch = self._prepare(batch)
        return self._pull_back(batch, lambda output: ggn_cotangents(self.likelihood, self.loss, output, batch.y))

    def _pull_back(
        self, batch: TorchBatch, choose: Callable[[Any], list[torch.Tensor] | None]
    ) -> list[BlockGradients] | None:
        """Gradient values of the output along cotangents [n, ...] that are chosen when the output is known."""
        with autograd_on():
            recording, state = self._record(batch)
            output = recording.output
            cold = tree_map(lambda t: t.detach(), output)
            check_finite(row_losses(self.loss, cold, batch.y))
            cotangents = choose(cold)
            if cotangents is None:
                return None
            watched = [use.output for use in recording.uses]
            grads = batched_vjp([output], watched, [torch.stack(cotangents)]) if watched else []
            first: dict[tuple[str, int], Gradient] = {}
            found = []
            for k, v in enumerate(cotangents):
                values = self._filled(recording, [g[k] for g in grads], batch)
                values = {place: _with_inputs(value, first.setdefault(place, value)) for place, value in values.items()}
                values |= self._plain_grads(batch, state, _against, v)
                found.append(self._blocks(values, len(batch), None))
        return found

    def losses(self, batch: TorchBatch, *, query: bool = False) -> torch.Tensor:
        batch = self._prepare(batch)
        with torch.no_grad():
            output = run(self.model, detached_state(self.model), batch.x)
            return row_losses(self.measurement if query else self.loss, output, batch.y)

    def of_output(self, function: OutputFunction) -> TorchGradientProvider:
        chosen = {"margin": negative_margin, "logit": negative_logit}[function]
        return type(self)(self.model, chosen, blocks=self._structure)

    def in_float64(self) -> TorchGradientProvider:
        from headwater.torch.plain import PlainTorchProvider, wide_copy

        found = PlainTorchProvider(
            wide_copy(self.model, "model"),
            loss := wide_copy(self.loss, "loss"),
            blocks=self._structure,
            measurement=loss if self.measurement is self.loss else wide_copy(self.measurement, "measurement"),
            likelihood=self.likelihood,
        )
        found._plan, found._checked, found._normalisation = self._plan, self._checked, self._normalisation
        found._numbers_per_row = self._numbers_per_row
        return found

    def parameters(self, block: str) -> torch.Tensor:
        state = dict(self.model.named_parameters())
        return wide(torch.cat([state[p.name].detach().reshape(-1) for p in self._block_parameters(block)]))

    def _numbers(self, keys: np.ndarray, number: int, seed: int, count: int, normal: bool) -> torch.Tensor:
        """Random numbers [n, count] for the rows of a batch: uniform, or standard normal."""
        return torch.as_tensor(row_numbers(keys, number, seed, count, normal), device=self.device)

    def row_keys(self, batch: TorchBatch) -> np.ndarray:
        if batch.ids is not None:
            ids = np.asarray(batch.ids.cpu() if isinstance(batch.ids, torch.Tensor) else batch.ids)
            return ids.astype(np.uint64) if ids.dtype.kind in "iu" else name_keys(ids.tolist())
        return row_keys([_host(t) for t in tree_leaves((batch.x, batch.y)) if isinstance(t, ARRAYS)])

    def content_keys(self, batch: TorchBatch) -> np.ndarray:
        leaves = [_host(t) for t in tree_leaves((batch.x, batch.y)) if isinstance(t, ARRAYS)]
        leaves += [] if batch.weights is None else [_host(batch.weights)]
        return row_digests(leaves if batch.ids is None else [*leaves, self.row_keys(batch)])

    def _record(self, batch: TorchBatch) -> tuple[Recording, dict[str, torch.Tensor]]:
        state = detached_state(self.model)
        layers = {name: self._modules[name] for name in self._plan.layers}
        recording = record(self.model, state, layers, batch.x)
        if recording.strange and self._checked >= min(2, len(batch)):
            raise UnsupportedModel(
                f"{recording.strange} got other rows than the {len(batch)} of the batch, which they did not before."
            )
        return recording, state

    def _values(
        self, recording: Recording, outputs: list[torch.Tensor], cotangents: list[torch.Tensor], batch: TorchBatch
    ) -> dict[tuple[str, int], Gradient]:
        """Gradient values from the layers."""
        return self._filled(recording, recording.output_grads(outputs, cotangents), batch)

    def _filled(
        self, recording: Recording, grads: list[torch.Tensor], batch: TorchBatch
    ) -> dict[tuple[str, int], Gradient]:
        """Gradient values from gradients at the outputs of the recorded uses."""
        strange = set(recording.strange)
        uses = [(use, grad) for use, grad in zip(recording.uses, grads, strict=True) if use.layer not in strange]
        return fill_parts(self._plan, self._modules, uses, self.positions(batch))

    def positions(self, batch: TorchBatch) -> torch.Tensor | None:
        """Which positions rows have, [n, t], where some are padding; None if all are the row's own."""
        return None

    def _plain_grads(
        self, batch: TorchBatch, state: Mapping[str, torch.Tensor], score: Any, cotangents: torch.Tensor | None = None
    ) -> dict[tuple[str, int], Gradient]:
        """Per-sample gradients of score(output, target) by autograd, for the parts that no layer rule fills."""
        if not self._plan.plain:
            return {}
        names = [name for _, _, name in self._plan.plain]
        target = batch.y if cotangents is None else cotangents

        def one(chosen: dict[str, torch.Tensor], x: Any, y: Any) -> torch.Tensor:
            output = run(self.model, {**state, **chosen}, tree_map(lambda t: t.unsqueeze(0), x))
            return score(output, tree_map(lambda t: t.unsqueeze(0), y))

        chosen = {name: state[name] for name in names}
        size = 4 * sum(t.numel() for t in chosen.values())
        step = rows_within_memory(size, next(iter(chosen.values())))
        found: dict[str, list[torch.Tensor]] = {name: [] for name in names}
        with twice_differentiable():
            for start in range(0, len(batch), step):
                piece = batch.take(slice(start, start + step))
                for name, grad in rowwise_grads(
                    one,
                    chosen,
                    piece.x,
                    target[start : start + step] if isinstance(target, torch.Tensor) else piece.y,
                ).items():
                    found[name].append(wide(grad))
        return {
            (block, k): Dense(torch.cat(found[name]).reshape(len(batch), *as_matrix(tuple(state[name].shape))))
            for block, k, name in self._plan.plain
        }

    def _blocks(
        self, values: Mapping[tuple[str, int], Gradient], rows: int, weights: torch.Tensor | None
    ) -> BlockGradients:
        blocks: BlockGradients = OrderedDict()
        for name, layout in self.layouts.items():
            value = self._block(layout, values, rows)
            blocks[name] = value if weights is None else value.weighted(weights.to(value.like.dtype))
        check_finite_grads(blocks)
        return blocks

    def _block(self, layout: Layout, values: Mapping[tuple[str, int], Gradient], rows: int) -> BlockGradient:
        """The parts of a block; those that no layer call filled are zero."""
        like = wide(next(self.model.parameters()).detach())
        parts = (
            values.get((layout.block.name, k)) or Dense(like.new_zeros((rows, *part.shape)))
            for k, part in enumerate(layout.parts)
        )
        return BlockGradient(layout, tuple(parts))

    # The check on the first rows ----------------------------------------------------------------------------------

    def _prepare(self, batch: TorchBatch) -> TorchBatch:
        batch = self._ready(batch)
        check_eval(self.model)
        if self._checked < min(2, len(batch)):  # one row, or two alike, do not show whether rows act on each other
            chosen = differing(row_keys([_host(t) for t in tree_leaves(batch.x) if isinstance(t, ARRAYS)]))
            if self._checked < len(chosen):
                with autograd_on():
                    self._check(batch.take(chosen))
                self._checked = len(chosen)
        return batch

    def _check(self, rows: TorchBatch) -> None:
        """Compare with plain autograd, one row at a time; see the class."""
        state = detached_state(self.model)
        names = [p.name for layout in self.layouts.values() for p in layout.block.parameters]
        leaves = {name: state[name].requires_grad_() for name in names}
        last = len(rows) - 1
        output, grads = one_row_alone(
            self.model, self.loss, rows.take(slice(last, last + 1)), {**state, **leaves}, leaves
        )
        for tensor in state.values():
            tensor.requires_grad_(False)
        recording, _ = self._record(rows)
        check_rows(recording.output, len(rows))
        losses = row_losses(self.loss, recording.output, rows.y)
        check_finite(losses)
        kind = next(self.model.parameters()).dtype
        check_independence(recording.output, output, last, kind)
        if last:
            with torch.no_grad():
                check_independence(recording.output, run(self.model, state, rows.take(slice(0, 1)).x), 0, kind)
        self._normalisation = normalisation(self.loss, recording.output, rows.y)
        values = self._values(recording, [losses], [torch.ones_like(losses)], rows)
        self._numbers_per_row = sum(a.numel() for v in values.values() for a in v.arrays) // len(rows)
        wrong = [*self._disagreeing(values, grads, last), *self._held_by(recording.strange)]
        if wrong and self._checked:
            raise RowsInteract(f"The gradients of {wrong} depend on the other rows of the batch.")
        if wrong:
            self._plan = make_plan(self.model, self._structure, wrong)

    def _held_by(self, layers: Iterable[str]) -> list[str]:
        """The attributed parameters of these layers."""
        held = {id(p) for layer in layers for p in self._modules[layer].parameters(recurse=False)}
        return [name for name, p in self.model.named_parameters() if id(p) in held]

    def _disagreeing(
        self, values: Mapping[tuple[str, int], Gradient], expected: Mapping[str, torch.Tensor], row: int
    ) -> list[str]:
        """Parameters whose gradient for this row, as the layer rules give it, is not autograd's."""
        plain = {name for _, _, name in self._plan.plain}
        floor = float(torch.stack([grad.norm() for grad in expected.values()]).norm())
        wrong = []
        for layout in self.layouts.values():
            flat = self._block(layout, values, row + 1).take(slice(row, row + 1)).flat()[0]
            pieces = flat.split([p.size for p in layout.block.parameters])
            for parameter, got in zip(layout.block.parameters, pieces, strict=True):
                truth = expected[parameter.name].reshape(-1)
                if parameter.name not in plain and not close(got.to(truth.dtype), truth, floor):
                    wrong.append(parameter.name)
        return wrong

    # Second order -------------------------------------------------------------------------------------------------

    def curvature_product(self, batch: TorchBatch, block: str, vectors: torch.Tensor, kind: Kind) -> torch.Tensor:
        batch = self._prepare(batch)
        parameters = self._block_parameters(block)
        vectors = vectors.to(next(self.model.parameters()).dtype)
        if vectors.ndim != 2 or vectors.shape[1] != self.layouts[block].size:
            raise ShapeMismatch(f"Expected vectors (K, {self.layouts[block].size}), got {tuple(vectors.shape)}.")
        with autograd_on(), twice_differentiable():
            state = detached_state(self.model)
            leaves = [state[p.name].requires_grad_() for p in parameters]

            def function(given: Any) -> Any:
                chosen = {p.name: t for p, t in zip(parameters, given, strict=True)}
                return run(self.model, {**state, **chosen}, batch.x)

            weights = self.row_weights(batch)

            def total(output: Any) -> torch.Tensor:
                losses = row_losses(self.loss, output, batch.y)
                check_finite(losses)
                return (losses if weights is None else losses * weights).sum()

            found = []
            step = rows_within_memory(8 * (self.layouts[block].size + len(batch) * 64), vectors)
            for start in range(0, len(vectors), step):
                tangents = self._pieces(block, vectors[start : start + step])
                if kind == "ggn":
                    products = ggn_product(function, total, leaves, tangents)
                else:
                    products = hessian_product(total(function(leaves)), leaves, tangents)
                found.append(torch.cat([p.reshape(len(p), -1) for p in products], dim=1))
        return wide(torch.cat(found).detach()) if found else vectors.clone()

    def _block_parameters(self, block: str) -> Any:
        if block not in self.layouts:
            raise BlockMismatch(f"There is no block {block!r}; the blocks are {list(self.layouts)}.")
        return self.layouts[block].block.parameters

    def _pieces(self, block: str, vectors: torch.Tensor) -> list[torch.Tensor]:
        """Flat vectors (K, D) as one tensor [K, *shape] for each parameter."""
        parameters = self._block_parameters(block)
        cut = vectors.split([p.size for p in parameters], dim=1)
        return [piece.reshape(len(vectors), *p.shape) for piece, p in zip(cut, parameters, strict=True)]

    def mixed_prod(self, batch: TorchBatch, factors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        batch = self._prepare(batch)
        differentiable_input(batch.x)
        check_finite_factors(factors)
        with autograd_on(), twice_differentiable():
            state = detached_state(self.model)
            names = [p.name for block in factors for p in self._block_parameters(block)]
            leaves = [state[name].requires_grad_() for name in names]
            x = batch.x.clone().requires_grad_()
            losses = row_losses(self.loss, run(self.model, state, x), batch.y)
            check_finite(losses)
            weights = self.row_weights(batch)
            losses = losses if weights is None else losses * weights
            slopes = torch.autograd.grad(
                losses.sum(), leaves, create_graph=True, allow_unused=True, materialize_grads=True
            )
            count = len(next(iter(factors.values())))
            step = rows_within_memory(8 * (x.numel() + sum(t.numel() for t in leaves)), x)
            found = []
            for start in range(0, count, step):
                pieces = [p for block, f in factors.items() for p in self._pieces(block, f[start : start + step])]
                found += batched_vjp(slopes, [x], pieces)
        return wide(torch.cat(found).detach()) if found else x.new_zeros((0, *x.shape))

    def flat_mixed_grads(self, batch: TorchBatch) -> torch.Tensor:
        """(N, *x_shape, D). Errors: UnsupportedModel if x is not one floating-point tensor."""
        batch = self._prepare(batch)
        differentiable_input(batch.x)
        state = detached_state(self.model)
        names = [p.name for layout in self.layouts.values() for p in layout.block.parameters]

        def loss(chosen: dict[str, torch.Tensor], x: torch.Tensor, y: Any) -> torch.Tensor:
            output = run(self.model, {**state, **chosen}, x.unsqueeze(0))
            return self.loss(output, tree_map(lambda t: t.unsqueeze(0), y)).sum()

        def mixed(chosen: dict[str, torch.Tensor], x: torch.Tensor, y: Any) -> dict[str, torch.Tensor]:
            return torch.func.jacrev(torch.func.grad(loss, argnums=1))(chosen, x, y)

        with autograd_on(), twice_differentiable():
            found = rowwise(mixed, {name: state[name] for name in names}, batch.x, batch.y)
        flat = torch.cat([found[name].reshape(*batch.x.shape, -1) for name in names], dim=-1).detach()
        weights = self.row_weights(batch)
        return wide(flat if weights is None else flat * weights.reshape((-1,) + (1,) * (flat.ndim - 1)))


def _against(output: Any, cotangent: torch.Tensor) -> torch.Tensor:
    """The output contracted with a cotangent: its gradient is the vector-Jacobian product."""
    return (output * cotangent).sum()


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A copy: what has one element may have any stride, and count as contiguous all the same."""
    return tensor.detach().clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)


def _host(tensor: torch.Tensor | np.ndarray) -> np.ndarray:
    if isinstance(tensor, np.ndarray):
        return tensor
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.dtype is torch.bfloat16 else tensor).numpy()


def _with_inputs(value: Gradient, first: Gradient) -> Gradient:
    """The same layer inputs as the first draw's, so that what depends on them alone is computed once."""
    if isinstance(value, Outer) and isinstance(first, Outer):
        return replace(value, a=first.a)
    if isinstance(value, RowSparse) and isinstance(first, RowSparse):
        return replace(value, ids=first.ids)
    return value
