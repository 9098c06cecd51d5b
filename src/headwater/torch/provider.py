"""Per-sample gradients and second-order products of a torch model, as values of the gradient algebra."""

from __future__ import annotations

import math
import re
import weakref
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial, wraps
from itertools import chain
from typing import Any, Self, TypeVar

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from headwater.arrays import rows_within_memory
from headwater.blocks import Layout, Part, Structure
from headwater.errors import (
    BatchMismatch,
    BlockMismatch,
    InvalidInput,
    InvalidSetting,
    RowsInteract,
    RulesChanged,
    ShapeMismatch,
    UnsupportedModel,
)
from headwater.gradients.algebra import Dense, Gradient
from headwater.gradients.block import BlockGradient, rows_in_blocks
from headwater.gradients.coverage import Coverage
from headwater.gradients.identity import identity_of, name_of
from headwater.gradients.likelihoods import predicted_labels
from headwater.gradients.measurements import measurement_of
from headwater.gradients.outer import Outer, with_inputs
from headwater.gradients.provider import (
    BlockGradients,
    Fisher,
    Kind,
    Linearised,
    OutputFunction,
    StructuredGradientProvider,
)
from headwater.gradients.rowwise import differing
from headwater.gradients.together import Together
from headwater.loaders.frames import in_numbers, missing_column
from headwater.random import row_keys, row_numbers
from headwater.torch.batch import TorchBatch, as_tensor, differentiable_input
from headwater.torch.capture import Recording, detached_state, own_leaves, record, run, summed_products
from headwater.torch.check import (
    check_finite_factors,
    check_finite_grads,
    check_independence,
    check_loss_reads_outputs,
    check_model,
    check_rows,
    close,
    one_row_alone,
    with_a_gradient,
)
from headwater.torch.checksums import crc32s
from headwater.torch.likelihoods import Likelihood, find_likelihood, fisher_cotangents, ggn_cotangents
from headwater.torch.linearised import KeptGradient
from headwater.torch.losses import Loss, check_finite, check_loss, normalisation, row_losses, slopes_at
from headwater.torch.measurements import negative_logit, negative_margin
from headwater.torch.plain import Choose, PlainRows, is_the_same, rows_of
from headwater.torch.plan import as_matrix, check_eval, fill_parts, make_plan, trainable_parameters
from headwater.torch.precision import doubled, wide, wide_copy
from headwater.torch.products import batched_vjp, ggn_product, hessian_product, rowwise, rowwise_grads
from headwater.torch.rowcheck import (
    RowSampler,
    Score,
    autograd_sums,
    coarse,
    disagreeing,
    random_weights,
    weighted_sums,
)
from headwater.torch.sharded import END, FAILED, GATHER, class_of, look_for_shards, own_part, whole
from headwater.torch.surroundings import autograd_on, lock_of, own_precision, twice_differentiable
from headwater.torch.tree import dense, floating, map_tensors, tensors_in
from headwater.torch.wrapped import unwrapped

ARRAYS = (torch.Tensor, np.ndarray)
MANY = 32
"""Vectors beside which one more, to see whether J and J^T are transposes, costs little."""
Method = TypeVar("Method", bound=Callable[..., Any])
AttemptType = TypeVar("AttemptType", bound="Attempt | None")
Place = tuple[str, int]
"""A block and the number of a part in it."""


def undisturbed(method: Method) -> Method:
    """One thread at a time reads the model, and the caller's autocast reaches its call alone; see `surroundings`."""

    @wraps(method)
    def wrapped(self: TorchGradientProvider, *args: Any, **kwargs: Any) -> Any:
        # Parameters are swapped and hooks set while the model runs: two threads would see each other's.
        with lock_of(self.model), self.own_precision(), self._tidied():
            return method(self, *args, **kwargs)

    return wrapped  # type: ignore[return-value]


@dataclass(frozen=True, eq=False)
class Attempt:
    """Gradient values of a batch, and what is needed to look at them once more."""

    values: list[dict[Place, Gradient]]
    """One for each thing that was differentiated."""
    what: str
    """Is differentiated: the loss, the measurement, or the output."""
    output: Any
    dtype: torch.dtype
    """Of the coarsest numbers on the way."""
    failed: list[str]
    """Layers whose rule raised, or that got other rows than the batch has."""
    score: Score
    """The number of each row whose gradients are the first of the values."""
    repeat: Callable[[TorchGradientProvider, TorchBatch], Attempt | None]
    """The same by another provider of the model, on the same rows."""
    slopes: Callable[[], list[torch.Tensor]]
    """Its gradient at each floating tensor of the output: [n, ...]."""
    losses: torch.Tensor | None = None
    """Of the rows, [n], where nobody has looked yet whether they are finite."""


class TorchGradientProvider(StructuredGradientProvider[TorchBatch, torch.Tensor]):
    """Per-sample gradients of a torch model.

    The loss of a row is `loss(model(row), target)` on that row alone, summed if it is not reduced; `measurement`, a
    function of the same kind, or the name of one in `gradients.measurements` ("probability", "margin", "output", ...),
    takes its place for query rows. The model is never changed: not its mode, parameters, gradients, hooks or buffers.
    What the layer rules give is compared with plain autograd, row by row on the first rows, and for many rows at once
    on the first batch of each pass and on some later ones (see `rowcheck`); parameters that disagree get plain
    per-sample gradients, and rows that act on each other are refused.

    model: any nn.Module that takes rows along the first axis. loss: any callable of (output, target). blocks: "full",
    "layer", "parameter" or {name: [parameter or module names]}. likelihood: the distribution behind the loss, where it
    is not known by itself ("cross_entropy", "binary_cross_entropy", "squared_error", or a `Likelihood`).

    plain: the slow truth, for a model in float64: one row at a time, by backward passes alone; see `torch/plain.py`.
    Gradients of drawn labels keep their layers' inputs, which Kronecker factors are made of, where a quarter of the
    batch's rows shows that these give the plain numbers.

    Errors: RowsInteract for a model in train mode with dropout or batch norm; UnsupportedLoss; UnsupportedModel;
    BlockMismatch; RulesChanged where a later batch shows that a rule does not hold, for the caller to start again.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        *,
        blocks: Structure = "full",
        measurement: Loss | str | None = None,
        likelihood: Likelihood | str | None = None,
        plain: bool = False,
    ):
        model = unwrapped(model)
        check_model(self._whole_model(model))
        check_loss(loss)
        measured = loss if measurement is None else measurement_of(measurement)
        check_loss(measured)
        self.model = model
        self.loss = loss
        self.measurement: Loss = measured
        self.likelihood = find_likelihood(loss, likelihood)
        self._normalisation: str | None = None
        self._structure = blocks
        self._plain = PlainRows(model, loss) if plain else None
        self._distrusted: frozenset[str] = frozenset()
        with lock_of(model):
            self._shards = look_for_shards(self._whole_model(model), model)
            self._modules = dict(model.named_modules())
            self._plan = make_plan(model, blocks)
        # By place, not the tensor: `load_state_dict(assign=True)` puts another one there.
        owner, _, role = self._names[0].rpartition(".")
        self._first = (self._modules[owner], role)
        if plain:
            self._refuse_shards("computing rows one at a time, plain=True,")
        if plain and self._like.dtype != torch.float64:
            raise InvalidSetting(
                f"plain=True takes a model in float64, not {self.dtype}; in_float64() makes such a copy."
            )
        self._shared_layers: tuple[str, ...] = ()
        self._checked = 0
        self._measured = 0
        self._last_ready: tuple[weakref.ref[TorchBatch] | None, Any] = (None, None)
        self._sampler = RowSampler()
        self._handed_out = False
        self._form = 0
        self._forward_mode = True
        self._probed: set[str] = set()
        self._numbers_per_row: int | None = None
        self._work_per_row = self.n_parameters

    # What there is ------------------------------------------------------------------------------------------------

    @property
    def layouts(self) -> OrderedDict[str, Layout]:
        return self._plan.layouts

    @property
    def coverage(self) -> Coverage:
        """Attributed and trainable parameters."""
        with lock_of(self.model):
            frozen = sum(p.numel() for p in self.model.parameters() if not p.requires_grad)
            return Coverage.of(trainable_parameters(self.model), set(self._names), frozen)

    @property
    def _names(self) -> list[str]:
        """Of the attributed parameters, in order."""
        return [p.name for layout in self.layouts.values() for p in layout.block.parameters]

    @property
    def _like(self) -> torch.Tensor:
        """An attributed parameter: its device, and the dtype of the gradients. Others may hold whole numbers."""
        module, role = self._first
        return own_part(module._parameters[role].detach())

    @property
    def dtype(self) -> str:
        return str(self._like.dtype).removeprefix("torch.")

    @property
    def coverage_fraction(self) -> float:
        return self.coverage.fraction

    @property
    def explained(self) -> str:
        if self.measurement is self.loss:
            return "loss"
        return name_of(self.measurement)

    def settings(self) -> tuple[str, ...]:
        return tuple(identity_of(value) for value in (self.loss, self.measurement, self.likelihood))

    @property
    def architecture(self) -> str:
        """A checksum of what the model prints as, and of its modules' forward passes where they are not torch's."""
        # A dict, not a set: the order of a set changes from process to process.
        classes = {type(m): class_of(m) for m in self.model.modules()}
        kinds = [kind for kind in dict.fromkeys(classes.values()) if not kind.__module__.startswith("torch.")]
        # Addresses in a repr are another each time.
        said = re.sub("0x[0-9a-f]+", "", repr(self.model))
        for found, kind in classes.items():
            if found is not kind:  # FSDP2 calls it otherwise
                said = re.sub(rf"\b{found.__name__}(?=\()", kind.__name__, said)
        said += "".join(identity_of(kind.forward) for kind in kinds)
        return f"{class_of(self.model).__name__} #{zlib.crc32(said.encode())}"

    @property
    def normalisation(self) -> str | None:
        return self._normalisation

    @property
    def device(self) -> torch.device:
        return self._like.device

    @property
    def form(self) -> int:
        return self._form

    @property
    def plain(self) -> bool:
        """Whether rows are computed one at a time, by plain autograd."""
        return self._plain is not None

    def own_precision(self) -> AbstractContextManager[object]:
        return own_precision(self.device)

    def begin_pass(self) -> None:
        self._sampler.begin_pass()

    def end_pass(self, failed: bool = False) -> None:
        """Errors: BatchMismatch, ProcessLost where others hold parts of the model, and are not at their end."""
        if self._shards is not None:
            self._shards.agree(FAILED if failed else END)

    @property
    def together(self) -> Together | None:
        return self._shards if self._shards is not None and self._shards.count > 1 else None

    def _whole_model(self, model: nn.Module) -> nn.Module:
        """The module that may be spread over processes, where the one that is called shows another face of it."""
        return model

    def _tidied(self) -> AbstractContextManager[object]:
        return nullcontext() if self._shards is None else self._shards.tidied()

    def _refuse_shards(self, what: str) -> None:
        """Errors: UnsupportedModel for a model that FSDP2 spreads over processes."""
        if self._shards is not None:
            raise UnsupportedModel(
                f"The model is spread over processes by fully_shard (FSDP2), and {what} takes a model that one process "
                "holds. Load the weights, get_model_state_dict(...) with full_state_dict=True, into one that is not."
            )

    @undisturbed
    def fingerprint(self) -> tuple[int, ...]:
        """Checksums of the parameters' and buffers' bytes."""
        if self._shards is not None:
            self._shards.agree(GATHER)
            self._shards.put_back()
        tensors = [whole(t.detach()) for t in chain(self.model.parameters(), self.model.buffers())]
        away = [k for k, t in enumerate(tensors) if not _is_on_host(t)]
        found = dict(zip(away, crc32s(_as_bytes(tensors[k]) for k in away), strict=True))
        return tuple(found[k] if k in found else _checksum(t) for k, t in enumerate(tensors))

    # Batches ------------------------------------------------------------------------------------------------------

    def as_batch(self, x: object, y: object) -> TorchBatch:
        return self._ready(TorchBatch(self._in_numbers("x", x), self._in_numbers("y", y)))

    def _in_numbers(self, name: str, value: object) -> Any:
        """Data frames as tensors of the model's dtype."""
        return in_numbers(name, value, lambda numbers: torch.as_tensor(numbers).to(self._like.dtype))

    def _ready(self, batch: TorchBatch) -> TorchBatch:
        """The batch as the model takes it, on its device; a batch that this gave is taken as it is."""
        # One pass asks for gradients, keys and weights of the same batch: it is moved to the device once.
        last, where = self._last_ready
        if last is not None and last() is batch and where == self.device:
            return batch
        batch = self._made_ready(batch)
        self._last_ready = (weakref.ref(batch), self.device)
        return batch

    def _keys_of_ready(self, batch: TorchBatch) -> np.ndarray:
        """`keys_by_content` of a batch that is being made ready: it must not ask for that."""
        return super().keys_by_content(batch)

    def _made_ready(self, batch: TorchBatch) -> TorchBatch:
        if not isinstance(batch, TorchBatch):
            batch = TorchBatch(batch.x, batch.y, batch.weights, batch.ids)
        if batch.x is None or batch.y is None:
            raise InvalidInput(missing_column("x" if batch.x is None else "y"))
        if len(batch) == 0:
            raise BatchMismatch("The batch has no rows.")
        batch = batch.to(self.device)
        if self._plain is not None:
            # Rows are named by what they hold before they become float64, so that random draws stay theirs.
            ids = self._keys_of_ready(batch) if batch.ids is None else batch.ids
            batch = doubled(TorchBatch(batch.x, batch.y, batch.weights, ids))
        kind = self._like.dtype
        for leaf in tree_leaves(batch.x):
            # Other numbers than the parameters' may be right (a model that converts), so it is tried, and only on the
            # first batch.
            if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() and leaf.dtype != kind and not self._checked:
                self._try_dtype(batch, leaf.dtype, kind)
        return batch

    def _try_dtype(self, batch: TorchBatch, given: torch.dtype, kind: torch.dtype) -> None:
        try:
            with torch.no_grad(), self.own_precision():
                run(self.model, detached_state(self.model), batch.take(slice(0, 1)).x)
        except RuntimeError as error:
            raise InvalidInput(
                f"x is {given}, the model's parameters are {kind}, and the model does not convert: {error}. "
                f"Pass x.to({kind})."
            ) from error

    @undisturbed
    def rows_at_once(self, batch: TorchBatch) -> int:
        batch = self._ready(batch)
        check_eval(self.model)
        if self._numbers_per_row is None:  # counted without a loss: nobody says whether these are train or query rows
            with autograd_on():
                one = batch.take(slice(0, 1))
                recording, _ = self._record(one)
                total = torch.stack([t.double().sum() for t in floating(recording.output)] or [torch.zeros(())]).sum()
                numbers = self._count(self._filled(recording, recording.output_grads(total), one)[0], 1)
            # A loader's batch may be larger than its gradients allow: it is cut by this.
            return rows_within_memory(numbers, self._like)
        return rows_within_memory(self._numbers_per_row, self._like)

    def _count(self, values: Mapping[Place, Gradient], rows: int) -> int:
        """Keep what gradients of a row cost. Returns the numbers that they hold."""
        self._numbers_per_row = sum(math.prod(a.shape) for v in values.values() for a in v.arrays) // rows
        self._work_per_row = sum(_positions(v) * v.shape[0] * v.shape[1] for v in values.values())
        return self._numbers_per_row

    def row_weights(self, batch: TorchBatch) -> torch.Tensor | None:
        weights = as_tensor(batch.weights, self.device)
        return None if weights is None else weights.to(wide(self._like).dtype)

    # Gradients ----------------------------------------------------------------------------------------------------

    @undisturbed
    def grads(self, batch: TorchBatch, *, query: bool = False, weighted: bool = True) -> BlockGradients:
        loss = self.measurement if query else self.loss
        batch = self._prepare(batch, loss)
        if self._plain is not None:
            rows = [self._plain.gradient(row, self._names, loss) for row in rows_of(batch)]
            return rows_in_blocks(self.layouts, rows, self.row_weights(batch) if weighted else None)
        found = self._trusted(batch, lambda: self._of_loss(batch, loss))
        return self._blocks(found, len(batch), batch.weights if weighted else None)[0]

    @undisturbed
    def fisher_grads(
        self, batch: TorchBatch, fisher: Fisher, *, draws: range = range(1), seed: int = 0
    ) -> list[BlockGradients]:
        batch = self._prepare(batch)
        # Kronecker factors need layer inputs, which plain rows lack: a part of the rows shows that the layers' values
        # are right.
        few = slice(0, max(1, len(batch) // 4))  # each row costs a backward pass for every draw
        if fisher == "empirical":  # the loss's own gradients, whatever the model's output is
            found = self._trusted(batch, lambda: self._of_loss(batch, self.loss))
            own = self._blocks(found, len(batch), None)
            if self._plain is None or is_the_same(self.grads(batch.take(few), weighted=False), own[0], few):
                return own
            return [self.grads(batch, weighted=False)]

        def choose(rows: TorchBatch, output: object) -> list[torch.Tensor]:
            # Only where a label is drawn: keys are made of the rows' content, on the host.
            keys = cache(lambda: self.row_keys(rows))
            numbers = [partial(self._numbers, keys, number, seed) for number in draws]
            return list(fisher_cotangents(self.likelihood, self.loss, output, rows.y, fisher, numbers))

        grads = self._pull_back(batch, partial(choose, batch))
        assert grads is not None
        if self._plain is None:
            return grads
        alone = self._by_row(rows_of(batch.take(few)), choose) or []
        if all(is_the_same(plain, layered, few) for plain, layered in zip(alone, grads, strict=True)):
            return grads
        return self._by_row(rows_of(batch), choose) or []

    def _by_row(self, rows: list[TorchBatch], choose: Choose) -> list[BlockGradients] | None:
        """Plain gradients of the output along cotangents that are chosen for each row."""
        assert self._plain is not None
        found = self._plain.along(rows, self._names, choose)
        return None if found is None else [rows_in_blocks(self.layouts, along) for along in found]

    @undisturbed
    def ggn_grads(self, batch: TorchBatch) -> list[BlockGradients] | None:
        batch = self._prepare(batch)
        if self._plain is not None:
            return self._by_row(rows_of(batch), self._plain.ggn_cotangents)
        return self._pull_back(batch, lambda output: ggn_cotangents(self.likelihood, self.loss, output, batch.y))

    def _pull_back(
        self, batch: TorchBatch, choose: Callable[[Any], list[torch.Tensor] | None]
    ) -> list[BlockGradients] | None:
        """Gradient values of the output along cotangents [n, ...] that are chosen when the output is known."""
        found = self._trusted(batch, lambda: self._of_output(batch, choose))
        return None if found is None else self._blocks(found, len(batch), None)

    def _trusted(self, batch: TorchBatch, attempt: Callable[[], AttemptType]) -> AttemptType:
        """An attempt whose layer rules hold for the rows that are looked at, after plain gradients replaced others."""
        # At most once for each set of parameters: what is distrusted stays so.
        while True:
            found = attempt()
            if found is None:
                return found
            wrong = self._held_by(found.failed) or self._wrong_by_autograd(batch, found)
            if not wrong:
                self._handed_out = True
                return found
            self._distrust(wrong)

    def _of_loss(self, batch: TorchBatch, loss: Loss) -> Attempt:
        with autograd_on():
            recording, state = self._record(batch)
            losses = row_losses(loss, recording.output, batch.y)
            values, failed = self._filled(recording, recording.output_grads(losses.sum()), batch)
            # The graph is let go as soon as the gradients are there: it holds every activation.
            cold = map_tensors(torch.Tensor.detach, recording.output)
            slopes = cache(partial(slopes_at, loss, cold, batch.y))
            values |= self._plain_grads(batch, state, slopes)
        return Attempt(
            values=[values],
            what="loss" if loss is self.loss else "measurement",
            output=cold,
            dtype=recording.dtype,
            failed=failed,
            score=lambda output, rows: row_losses(loss, output, batch.take(rows).y),
            repeat=lambda other, rows: other._of_loss(rows, other.loss if loss is self.loss else other.measurement),
            slopes=slopes,
            losses=losses.detach(),
        )

    def _of_output(self, batch: TorchBatch, choose: Callable[[Any], list[torch.Tensor] | None]) -> Attempt | None:
        with autograd_on():
            recording, state = self._record(batch)
            output = recording.output
            cold = map_tensors(torch.Tensor.detach, output)
            check_finite(row_losses(self.loss, cold, batch.y))
            cotangents = choose(cold)
            if cotangents is None:
                return None
            watched = [use.output for use in recording.uses]
            # All draws in one vectorised backward pass through the shared forward pass.
            at_once = self._shards is None  # hooks of FSDP2's must not be left in the middle of a pass
            grads = batched_vjp([output], watched, [torch.stack(cotangents)], at_once=at_once) if watched else []
            first: dict[Place, Gradient] = {}
            found: list[dict[Place, Gradient]] = []
            failed: list[str] = []
            for k, v in enumerate(cotangents):
                values, failed = self._filled(recording, [g[k] for g in grads], batch)
                # Draws share the very arrays of their inputs: `gradients/draws.py` knows them by identity.
                values = {place: with_inputs(value, first.setdefault(place, value)) for place, value in values.items()}
                found.append(values | self._plain_grads(batch, state, partial(_only, v)))
        along = cotangents[0]
        return Attempt(
            values=found,
            what="output",
            output=cold,
            dtype=recording.dtype,
            failed=failed,
            # One draw stands for all: a layer's rule is right or wrong whatever the cotangent.
            score=lambda output, rows: (output * along[rows]).reshape(len(rows), -1).sum(1),
            repeat=lambda other, rows: other._of_output(rows, lambda _: [along.to(other._like.dtype)]),
            slopes=lambda: [along],
        )

    @undisturbed
    def losses(self, batch: TorchBatch, *, query: bool = False) -> torch.Tensor:
        loss = self.measurement if query else self.loss
        batch = self._prepare(batch, loss)
        with torch.no_grad():
            return row_losses(loss, run(self.model, detached_state(self.model), batch.x), batch.y)

    @undisturbed
    def predicted(self, batch: TorchBatch) -> TorchBatch:
        batch = self._prepare(batch, self.measurement)
        with torch.no_grad():
            output = run(self.model, detached_state(self.model), batch.x)
        return replace(batch, y=predicted_labels(self.likelihood, output, batch.y))

    def of_output(self, function: OutputFunction) -> TorchGradientProvider:
        chosen = {"margin": negative_margin, "logit": negative_logit}[function]
        return type(self)(self.model, chosen, blocks=self._structure, plain=self.plain)

    def in_float64(self) -> Self:
        return self._wide(plain=True)

    def _wide(self, plain: bool) -> Self:
        """A provider for a copy of the model in float64. Errors: UnsupportedModel if there is none."""
        self._refuse_shards("a copy of it in float64")
        # One copy where measurement and loss are the same: `explained` compares them by identity.
        loss = wide_copy(self.loss, "loss")
        found = type(self)(
            wide_copy(self.model, "model"),
            loss,
            blocks=self._structure,
            measurement=loss if self.measurement is self.loss else wide_copy(self.measurement, "measurement"),
            likelihood=self.likelihood,
            plain=plain,
        )
        return found._informed_by(self)

    def _informed_by(self, other: TorchGradientProvider) -> Self:
        """With what another provider of the same model has found out on its first rows."""
        self._distrusted, self._plan, self._shared_layers = other._distrusted, other._plan, other._shared_layers
        self._checked, self._measured, self._normalisation = other._checked, other._measured, other._normalisation
        self._numbers_per_row, self._work_per_row = other._numbers_per_row, other._work_per_row
        return self

    @undisturbed
    def parameters(self, block: str) -> torch.Tensor:
        if self._shards is not None:
            self._shards.agree(GATHER)
            self._shards.put_back()
        state = dict(self.model.named_parameters())
        return wide(torch.cat([whole(state[p.name].detach()).reshape(-1) for p in self._block_parameters(block)]))

    def _numbers(
        self, keys: Callable[[], np.ndarray], number: int, seed: int, count: int, normal: bool
    ) -> torch.Tensor:
        """Random numbers [n, count] for the rows of a batch: uniform, or standard normal."""
        return torch.as_tensor(row_numbers(keys(), number, seed, count, normal), device=self.device)

    def host_arrays(self, batch: TorchBatch, weighted: bool = False) -> list[np.ndarray]:
        leaves = [_host(t) for t in tree_leaves((batch.x, batch.y)) if isinstance(t, ARRAYS)]
        return [*leaves, _host(batch.weights)] if weighted and batch.weights is not None else leaves

    def _record(self, batch: TorchBatch) -> tuple[Recording, dict[str, torch.Tensor]]:
        state = detached_state(self.model)
        return record(self.model, state, self._watched, batch.x, self._shared_layers), state

    @property
    def _watched(self) -> dict[str, nn.Module]:
        return {name: self._modules[name] for name in self._plan.layers}

    def _filled(
        self, recording: Recording, grads: list[torch.Tensor], batch: TorchBatch
    ) -> tuple[dict[Place, Gradient], list[str]]:
        """Gradient values from gradients at the outputs of the recorded uses; and the layers that gave none."""
        # What such layers got belongs to no row: their parameters are filled by plain gradients.
        unbatched = recording.unbatched_layers
        uses = [(use, grad) for use, grad in zip(recording.uses, grads, strict=True) if use.layer not in unbatched]
        values, failed = fill_parts(self._plan, self._modules, uses, self.positions(batch))
        return values, [*unbatched, *failed]

    def positions(self, batch: TorchBatch) -> torch.Tensor | None:
        """Which positions rows have, [n, t], where some are padding; None if all are the row's own."""
        return None

    def _plain_grads(
        self, batch: TorchBatch, state: Mapping[str, torch.Tensor], slopes: Callable[[], list[torch.Tensor]]
    ) -> dict[Place, Gradient]:
        """Per-sample gradients by autograd, for the parts that no layer rule fills."""
        names = [name for _, _, name in self._plan.plain]
        found = self._grads_by_row(names, batch, state, slopes()) if names else {}
        return {
            (block, k): Dense(wide(found[name]).reshape(len(batch), *as_matrix(tuple(state[name].shape))))
            for block, k, name in self._plan.plain
        }

    def _grads_by_row(
        self,
        names: list[str],
        batch: TorchBatch,
        state: Mapping[str, torch.Tensor],
        slopes: list[torch.Tensor],
    ) -> dict[str, torch.Tensor]:
        """The gradient of each row's output along its slopes [n, ...]: [n, *shape] for each of these parameters.

        The loss is left out of what is vectorised: not every loss can be, and some of torch's import a computer algebra
        there.
        """

        def one(chosen: dict[str, torch.Tensor], x: object, along: list[torch.Tensor]) -> torch.Tensor:
            output = run(self.model, {**state, **chosen}, tree_map(lambda t: t.unsqueeze(0), x))
            return summed_products(floating(output), [v.unsqueeze(0) for v in along])

        if self._shards is not None:
            return self._grads_one_by_one(names, batch, slopes)
        # Only these get a batch axis; all others are shared by the rows of the vmap.
        chosen = {name: state[name] for name in names}
        # A whole matrix for each row, and what vmap holds beside it.
        step = rows_within_memory(4 * sum(t.numel() for t in chosen.values()), self._like)
        found: dict[str, list[torch.Tensor]] = {name: [] for name in names}
        with twice_differentiable():
            for start in range(0, len(batch), step):
                piece = slice(start, start + step)
                along = [slope[piece] for slope in slopes]
                for name, grad in rowwise_grads(one, chosen, batch.take(piece).x, along).items():
                    found[name].append(grad)
        return {name: torch.cat(pieces) for name, pieces in found.items()}

    def _grads_one_by_one(
        self, names: list[str], batch: TorchBatch, slopes: list[torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """`_grads_by_row` by the model's own parameters: a forward and a backward pass for each row."""
        state, leaves = own_leaves(self.model, names)
        found: dict[str, list[torch.Tensor]] = {name: [] for name in names}
        for k in range(len(batch)):
            output = run(self.model, state, batch.take(slice(k, k + 1)).x)
            value = summed_products(floating(output), [slope[k : k + 1] for slope in slopes])
            grads = torch.autograd.grad(value, [*leaves.values()], allow_unused=True, materialize_grads=True)
            for name, grad in zip(leaves, grads, strict=True):
                found[name].append(dense(grad))
        return {name: torch.stack(rows) for name, rows in found.items()}

    def _blocks(self, found: Attempt, rows: int, weights: torch.Tensor | None) -> list[BlockGradients]:
        """For each thing that was differentiated. Errors: NonFiniteValue."""
        draws: list[BlockGradients] = []
        for values in found.values:
            blocks: BlockGradients = OrderedDict()
            for name, layout in self.layouts.items():
                value = self._block(layout, values, rows)
                blocks[name] = value if weights is None else value.weighted(weights.to(value.like.dtype))
            draws.append(blocks)
        check_finite_grads(draws, found.losses)
        return draws

    def _block(self, layout: Layout, values: Mapping[Place, Gradient], rows: int) -> BlockGradient:
        """The parts of a block; those that no layer call filled are zero."""
        name = layout.block.name
        parts = (values.get((name, k)) or self._nothing(part, rows) for k, part in enumerate(layout.parts))
        return BlockGradient(layout, tuple(parts))

    def _nothing(self, part: Part, rows: int) -> Gradient:
        return Dense(wide(self._like).new_zeros((rows, *part.shape)))

    # The check on the first rows ----------------------------------------------------------------------------------

    def _prepare(self, batch: TorchBatch, loss: Loss | None = None) -> TorchBatch:
        """The batch as the model takes it; its first rows are looked at.

        loss: what is asked of these rows, the train loss unless it is said. A measurement is tried on query rows alone:
        it may read targets that train rows do not have.
        """
        batch = self._ready(batch)
        check_eval(self.model)
        measured = loss is not None and loss is not self.loss
        checked = self._measured if measured else self._checked
        # A first batch of one row leaves the check open for the next.
        if checked < min(2, len(batch)):  # one row, or two alike, do not show whether rows act on each other
            chosen = differing(row_keys([_host(t) for t in tree_leaves(batch.x) if isinstance(t, ARRAYS)]))
            if checked < len(chosen):
                with autograd_on(), self.own_precision():
                    self._check(batch, chosen, self.measurement if measured else self.loss)
                if measured:
                    self._measured = len(chosen)
                else:
                    self._checked = len(chosen)
        return batch

    def _check(self, batch: TorchBatch, chosen: np.ndarray, loss: Loss) -> None:
        """Compare the chosen rows with plain autograd, one row at a time; see the class."""
        state, last = detached_state(self.model), len(chosen) - 1
        swapped, leaves = own_leaves(self.model, self._names)
        output, grads = one_row_alone(self.model, loss, batch.take(chosen[last:]), swapped, leaves)
        # A row whose gradient is zero agrees with any rule: another one is looked for.
        if not any(bool(grad.any()) for grad in grads.values()):
            chosen = with_a_gradient(self.model, loss, batch, chosen, swapped)
            output, grads = one_row_alone(self.model, loss, batch.take(chosen[last:]), swapped, leaves)
        rows, what = batch.take(chosen), "loss" if loss is self.loss else "measurement"
        recording = self._record_first(rows, state)
        check_rows(recording.output, len(rows))
        losses = row_losses(loss, recording.output, rows.y)
        check_finite(losses)
        # Alone and in company: batch statistics, or attention across rows, show in the output already.
        check_independence(recording.output, output, [last], recording.dtype)
        if last:
            with torch.no_grad():
                alone = run(self.model, state, rows.take(slice(0, 1)).x)
            check_independence(recording.output, alone, [0], recording.dtype)
        treats_rows = normalisation(loss, recording.output, rows.y, what)
        self._normalisation = treats_rows if loss is self.loss else self._normalisation
        check_loss_reads_outputs(loss, recording.output, rows.y, leaves, what)
        values, failed = self._filled(recording, recording.output_grads(losses.sum()), rows)
        self._count(values, len(rows))
        wrong = {*self._disagreeing(values, grads, last, recording.dtype), *self._held_by(failed)}
        if wrong:
            self._distrust(wrong)

    def _record_first(self, rows: TorchBatch, state: Mapping[str, torch.Tensor]) -> Recording:
        """A recording; and which layers may be told to answer once for each row, because nothing else changes by it."""
        recording = record(self.model, state, self._watched, rows.x, self._shared_layers)
        for name in recording.one_row_layers:
            shared = (*self._shared_layers, name)
            try:
                trial = record(self.model, state, self._watched, rows.x, shared)
                check_rows(trial.output, len(rows))
                pairs = zip(tensors_in(trial.output), tensors_in(recording.output), strict=True)
                # Bit by bit: handing the output on once for each row must change nothing at all.
                same = all(bool(torch.equal(one, other)) for one, other in pairs)
            except Exception:  # whatever a model does with rows that it did not ask for
                continue
            if same:
                self._shared_layers, recording = shared, trial
        return recording

    def _distrust(self, names: Iterable[str]) -> None:
        """Plain gradients for these parameters from now on.

        Errors: RulesChanged if values of another form have been handed out; UnsupportedModel if plain ones fail, too.
        """
        # Plain gradients that disagree as well: no rule is at fault then.
        more = frozenset(names) - self._distrusted
        if not more:
            raise UnsupportedModel(
                f"The gradients of {sorted(names)[:4]} differ from those of the model's own backward pass, also when "
                "they are computed plainly, row by row: is the model random?"
            )
        self._distrusted |= more
        self._plan = make_plan(self.model, self._structure, self._distrusted)
        # A curvature of gradients in two forms would mix layouts of parts.
        if self._handed_out:
            self._handed_out = False
            self._form += 1
            raise RulesChanged(
                f"The gradients of {sorted(more)[:4]} do not follow from their layers' inputs and outputs for these "
                "rows, as they did for others before. Call fit again: it takes plain gradients for them now."
            )

    def _wrong_by_autograd(self, batch: TorchBatch, found: Attempt) -> list[str]:
        rows = self._sampler.choose(len(batch), self._work_per_row, found.what)
        if rows is None:
            return []
        if found.losses is not None:  # NaN differs from everything: rows would be said to act on each other
            check_finite(found.losses)
        return self._compared(batch, found, rows)

    def _compared(self, batch: TorchBatch, found: Attempt, rows: np.ndarray) -> list[str]:
        """Parameters whose layer rules are wrong for these rows; see `rowcheck`. Errors: RowsInteract."""
        index = torch.as_tensor(rows, device=self.device)
        blocks = {
            name: self._block(layout, found.values[0], len(batch)).take(index) for name, layout in self.layouts.items()
        }
        weights = random_weights(blocks.values(), len(rows))
        got, kind = weighted_sums(blocks, weights), coarse(found.dtype)
        # One look at the device for all of them.
        # A sum is finite only if all of it is; in double, which sums of finite numbers do not exceed.
        sums = [values.sum(dtype=torch.float64) for values in (weights, *got.values())]
        if not bool(torch.isfinite(torch.stack(sums).sum())):
            # NaN differs from everything: the sums would blame a rule.
            return []  # refused elsewhere, by the name of the rows
        with autograd_on():
            expected = autograd_sums(self.model, self._names, batch, rows, weights, found.score, found.output, kind)
            wrong = disagreeing(got, expected, kind)
            if (
                wrong
                and found.dtype != torch.float64
                and (again := self._compared_in_float64(batch, found, rows)) is not None
            ):
                return again
            return self._rules_among(wrong, batch, rows, weights, found, expected) if wrong else []

    def _compared_in_float64(self, batch: TorchBatch, found: Attempt, rows: np.ndarray) -> list[str] | None:
        """The same without rounding; None if the model has no such copy, or no room for it."""
        try:
            other, batch = self._wide(plain=False), doubled(batch)
            again = found.repeat(other, batch)
            return None if again is None else other._compared(batch, again, rows)
        except (UnsupportedModel, torch.OutOfMemoryError) as error:
            if isinstance(error, RowsInteract):
                raise
            return None

    def _rules_among(
        self,
        wrong: list[str],
        batch: TorchBatch,
        rows: np.ndarray,
        weights: torch.Tensor,
        found: Attempt,
        expected: Mapping[str, torch.Tensor],
    ) -> list[str]:
        """These parameters, if it is their layers' rules that are wrong. Errors: RowsInteract if it is the rows."""
        slopes, kind = [slope[rows] for slope in found.slopes()], coarse(found.dtype)
        alone = self._grads_by_row(wrong, batch.take(rows), detached_state(self.model), slopes)
        sums = {name: weights.to(g.dtype) @ g.reshape(len(rows), -1) for name, g in alone.items()}
        mixed = disagreeing(sums, {name: expected[name] for name in wrong}, kind)
        if mixed:
            first = autograd_sums(
                self.model, mixed, batch, rows[:1], torch.ones_like(weights[:1]), found.score, found.output, kind
            )
            swapped = disagreeing({name: alone[name][0].reshape(-1) for name in mixed}, first, kind)
            if swapped:
                raise UnsupportedModel(
                    f"The gradients of {swapped[:4]} differ from those of the model's own backward pass when other "
                    "tensors stand in for these parameters. Is there a hook on them, or a scripted layer, which keeps "
                    "its own? Then pass the module that torch.jit was given."
                )
            raise RowsInteract(
                f"The gradients of {mixed[:4]} depend on which rows come in one batch: rows act on each other, or the "
                "model is random. Its rows have no gradients of their own."
            )
        return wrong

    def _held_by(self, layers: Iterable[str]) -> list[str]:
        """The attributed parameters of these layers."""
        held = {id(p) for layer in layers for p in self._modules[layer].parameters(recurse=False)}
        return [name for name, p in self.model.named_parameters() if id(p) in held]

    def _disagreeing(
        self, values: Mapping[Place, Gradient], expected: Mapping[str, torch.Tensor], row: int, kind: torch.dtype
    ) -> list[str]:
        """Parameters whose gradient for this row, as the layer rules give it, is not autograd's."""
        plain = {name for _, _, name in self._plan.plain}
        # Relative to the whole gradient: a parameter with hardly any has nothing but rounding.
        floor = float(torch.stack([grad.norm() for grad in expected.values()]).norm())
        wrong = []
        for layout in self.layouts.values():
            flat = self._block(layout, values, row + 1).take(slice(row, row + 1)).flat()[0]
            pieces = flat.split([p.size for p in layout.block.parameters])
            for parameter, got in zip(layout.block.parameters, pieces, strict=True):
                truth = expected[parameter.name].reshape(-1)
                if parameter.name not in plain and not close(got.to(truth.dtype), truth, floor, kind):
                    wrong.append(parameter.name)
        return wrong

    # Second order -------------------------------------------------------------------------------------------------

    @undisturbed
    def curvature_product(self, batch: TorchBatch, block: str, vectors: torch.Tensor, kind: Kind) -> torch.Tensor:
        """vectors (K, D_block). Errors: ShapeMismatch; BlockMismatch; UnsupportedModel without second derivatives."""
        batch = self._prepare(batch)
        parameters = self._block_parameters(block)
        vectors = vectors.to(self._like.dtype)
        weights = self.row_weights(batch)
        self._check_vectors(block, vectors)
        if self._plain is not None:
            total = torch.zeros_like(vectors)
            for k, row in enumerate(rows_of(batch)):
                mine = self._plain.product(row, [p.name for p in parameters], vectors, kind)
                total += mine if weights is None else mine * weights[k]
            return total
        with autograd_on(), twice_differentiable(), self._kept_whole():
            state, leaves = self._leaves([p.name for p in parameters])

            def function(given: Any) -> Any:
                chosen = {} if self._shards else {p.name: t for p, t in zip(parameters, given, strict=True)}
                return run(self.model, {**state, **chosen}, batch.x)

            loss_of = partial(self._summed_loss, batch, weights)
            found = []
            # All vectors of a piece go through together: each needs tangents of parameters and of activations.
            for piece in self._vectors_at_once(block, vectors, len(batch)):
                tangents = self._pieces(block, piece)
                if kind == "ggn":
                    # The first time in each block, and whenever one more vector costs next to nothing.
                    probe = block not in self._probed or len(tangents[0]) >= MANY
                    forward = self._forward_mode and self._shards is None
                    products, self._forward_mode = ggn_product(
                        function, loss_of, leaves, tangents, forward=forward, probe=probe
                    )
                    self._probed.add(block)
                else:
                    products = hessian_product(loss_of(function(leaves)), leaves, tangents)
                found.append(torch.cat([p.reshape(len(p), -1) for p in products], dim=1))
        return _joined(found, vectors)

    @undisturbed
    def linearised(self, batch: TorchBatch, block: str, kind: Kind) -> Linearised | None:
        # FSDP2 takes whole parameters away after each pass; the plain way is for checks, and in no hurry.
        if kind != "hessian" or self._plain is not None or self._shards is not None:
            return None
        batch = self._prepare(batch)
        with autograd_on(), twice_differentiable():
            state, leaves = self._leaves([p.name for p in self._block_parameters(block)])
            kept = KeptGradient(
                lambda: self._summed_loss(batch, self.row_weights(batch), run(self.model, state, batch.x)), leaves
            )
        return Linearised(partial(self._along_kept, kept, block, len(batch)), kept.size)

    @undisturbed
    def _along_kept(self, kept: KeptGradient, block: str, rows: int, vectors: torch.Tensor) -> torch.Tensor:
        """The Hessian of the kept loss times vectors (K, D_block). Errors: as `curvature_product`."""
        vectors = vectors.to(self._like.dtype)
        self._check_vectors(block, vectors)
        found = []
        with autograd_on(), twice_differentiable():
            for piece in self._vectors_at_once(block, vectors, rows):
                products = kept.product(self._pieces(block, piece))
                found.append(torch.cat([p.reshape(len(p), -1) for p in products], dim=1))
        return _joined(found, vectors)

    def _summed_loss(self, batch: TorchBatch, weights: torch.Tensor | None, output: object) -> torch.Tensor:
        losses = row_losses(self.loss, output, batch.y)
        check_finite(losses)
        return (losses if weights is None else losses * weights).sum()

    def _vectors_at_once(self, block: str, vectors: torch.Tensor, rows: int) -> Sequence[torch.Tensor]:
        """Pieces of vectors that go through together: each needs tangents of parameters and of activations."""
        step = rows_within_memory(8 * (self.layouts[block].size + rows * 64), vectors)
        return [vectors[start : start + step] for start in range(0, len(vectors), step)]

    def _check_vectors(self, block: str, vectors: torch.Tensor) -> None:
        """Errors: ShapeMismatch."""
        if vectors.ndim != 2 or vectors.shape[1] != self.layouts[block].size:
            raise ShapeMismatch(f"Expected vectors (K, {self.layouts[block].size}), got {tuple(vectors.shape)}.")

    def _leaves(self, names: list[str]) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
        """What to swap for a call, and what to differentiate by: stand-ins for these parameters where possible."""
        if self._shards is not None:
            state, own = own_leaves(self.model, names)
            return state, [*own.values()]
        state = detached_state(self.model)
        return state, [state[name].requires_grad_() for name in names]

    def _kept_whole(self) -> AbstractContextManager[object]:
        return nullcontext() if self._shards is None else self._shards.kept_whole()

    def _block_parameters(self, block: str) -> Any:
        if block not in self.layouts:
            raise BlockMismatch(f"There is no block {block!r}; the blocks are {list(self.layouts)}.")
        return self.layouts[block].block.parameters

    def _pieces(self, block: str, vectors: torch.Tensor) -> list[torch.Tensor]:
        """Flat vectors (K, D) as one tensor [K, *shape] for each parameter."""
        parameters = self._block_parameters(block)
        cut = vectors.split([p.size for p in parameters], dim=1)
        return [piece.reshape(len(vectors), *p.shape) for piece, p in zip(cut, parameters, strict=True)]

    @undisturbed
    def mixed_prod(self, batch: TorchBatch, factors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        self._refuse_shards("mode='perturbation'")
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
            # d/dx <grad_w loss, v> by a second backward pass: [n, *x_shape] for each factor, never [n, D, x].
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

    @undisturbed
    def flat_mixed_grads(self, batch: TorchBatch) -> torch.Tensor:
        """(N, *x_shape, D). Errors: UnsupportedModel if x is not one floating-point tensor."""
        self._refuse_shards("mode='perturbation'")
        batch = self._prepare(batch)
        differentiable_input(batch.x)
        state = detached_state(self.model)
        names = [p.name for layout in self.layouts.values() for p in layout.block.parameters]

        def loss(chosen: dict[str, torch.Tensor], x: torch.Tensor, y: object) -> torch.Tensor:
            output = run(self.model, {**state, **chosen}, x.unsqueeze(0))
            return self.loss(output, tree_map(lambda t: t.unsqueeze(0), y)).sum()

        def mixed(chosen: dict[str, torch.Tensor], x: torch.Tensor, y: object) -> dict[str, torch.Tensor]:
            return torch.func.jacrev(torch.func.grad(loss, argnums=1))(chosen, x, y)

        with autograd_on(), twice_differentiable():
            found = rowwise(mixed, {name: state[name] for name in names}, batch.x, batch.y)
        flat = torch.cat([found[name].reshape(*batch.x.shape, -1) for name in names], dim=-1).detach()
        weights = self.row_weights(batch)
        return wide(flat if weights is None else flat * weights.reshape((-1,) + (1,) * (flat.ndim - 1)))


def _joined(products: list[torch.Tensor], vectors: torch.Tensor) -> torch.Tensor:
    """Products of pieces of vectors, one below the other; a single one as it is, without a copy."""
    if not products:
        return vectors.clone()
    return wide((products[0] if len(products) == 1 else torch.cat(products)).detach())


def _only(tensor: torch.Tensor) -> list[torch.Tensor]:
    return [tensor]


def _positions(value: Gradient) -> int:
    return value.positions if isinstance(value, Outer) else 1


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A copy: what has one element may have any stride, and count as contiguous all the same."""
    if tensor.is_sparse:
        # Uncoalesced, the same numbers have many forms.
        tensor = tensor.detach().coalesce()
        return torch.cat([_as_bytes(tensor.indices()), _as_bytes(tensor.values())])
    return tensor.detach().clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)


def _checksum(tensor: torch.Tensor) -> int:
    """Of a tensor on the host."""
    data: Any = _as_bytes(tensor).numpy()
    return zlib.crc32(data)


def _is_on_host(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu"


def _host(tensor: torch.Tensor | np.ndarray) -> np.ndarray:
    if isinstance(tensor, np.ndarray):
        return tensor
    tensor = tensor.detach().cpu()
    # NumPy has no bfloat16; float32 holds each of its numbers exactly.
    return (tensor.float() if tensor.dtype is torch.bfloat16 else tensor).numpy()
