"""One forward pass that remembers what went through chosen layers, and backward passes without weight gradients.

The user's model is called with detached copies of its parameters swapped in for the call, so only layer outputs need
gradients; hooks live for one call. Afterwards, also after an exception, nothing about the model has changed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.utils._pytree import tree_leaves

from headwater.torch.batch import call
from headwater.torch.precision import wide
from headwater.torch.sharded import FORWARD, checksum, shards_of
from headwater.torch.surroundings import callers_dtype, lock_of, model_call
from headwater.torch.tree import map_tensors, tensors_in
from headwater.torch.wrapped import is_spread


@dataclass
class Use:
    """One call of one layer: its name, its input, and its output."""

    layer: str
    input: torch.Tensor
    output: torch.Tensor
    input_version: int
    output_version: int

    @property
    def is_spoilt(self) -> bool:
        """Whether input or output has been changed in place since."""
        return (self.input._version, self.output._version) != (self.input_version, self.output_version)


@dataclass(frozen=True)
class Recording:
    """A forward pass: the model's output, and the calls of the watched layers, in order."""

    output: Any
    uses: tuple[Use, ...]
    rows: int
    hidden: tuple[str, ...] = ()
    """Layers with calls that could not be watched."""

    @property
    def unbatched_layers(self) -> list[str]:
        """Layers that were called on another number of rows than the model: what they got does not belong to rows."""
        sizes = ((use.layer, {len(use.input), len(use.output)}) for use in self.uses)
        # Positions, buffers or mixtures of experts: gradients of such calls cannot be assigned to rows.
        return list(dict.fromkeys([*self.hidden, *(layer for layer, found in sizes if found != {self.rows})]))

    @property
    def one_row_layers(self) -> list[str]:
        """Those of them that were called on one row, perhaps for all, such as an embedding of positions."""
        return [use.layer for use in self.uses if len(use.input) == len(use.output) == 1 < self.rows]

    @property
    def dtype(self) -> torch.dtype:
        """The coarsest numbers on the way: under autocast, or where the model itself converts, not its parameters'."""
        seen = chain(tensors_in(self.output), *((use.input, use.output) for use in self.uses))
        kinds = {t.dtype for t in seen if t.is_floating_point()}
        # By eps, not by bits: bfloat16 and float16 are of one size, and the coarser one decides what agrees.
        return max(kinds, key=lambda kind: torch.finfo(kind).eps, default=torch.float32)

    def output_grads(self, total: torch.Tensor, *, again: bool = False) -> list[torch.Tensor]:
        """The gradient of a number at each use's output, zero where it does not depend on it. again: not the last."""
        watched = [use.output for use in self.uses]
        if not watched or not total.requires_grad:
            return [torch.zeros_like(output) for output in watched]
        # All layers in one backward pass, by their outputs: no gradient of a weight is ever made.
        return list(torch.autograd.grad(total, watched, retain_graph=again, allow_unused=True, materialize_grads=True))


def detached_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters without gradients, and copies of the buffers (a forward pass may write to them)."""
    if (shards := shards_of(model)) is not None:
        shards.put_back()  # a pass may have left whole parameters in the place of this process's parts
    parameters = ((name, p.detach()) for name, p in model.named_parameters())
    # What was made in inference mode cannot be saved for backward; its copy can.
    return {name: p.clone() if p.is_inference() else p for name, p in parameters} | copied_buffers(model)


def copied_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: b.clone() for name, b in model.named_buffers()}


def own_leaves(model: nn.Module, names: Collection[str]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """What to swap for a call, and what to differentiate by: the model's own parameters wherever they can be.

    A call with swapped parameters need not be the user's: a scripted layer keeps its own, and hooks stay behind.
    """
    if (shards := shards_of(model)) is not None:
        spread = shards.whole_parameters(names)
        state, leaves = own_leaves_here(model, [name for name in names if name not in spread])
        return state, {name: spread[name] if name in spread else leaves[name] for name in names}
    return own_leaves_here(model, names)


def own_leaves_here(model: nn.Module, names: Iterable[str]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """`own_leaves` of parameters that this process has as a whole."""
    own, state = dict(model.named_parameters()), copied_buffers(model)
    leaves: dict[str, torch.Tensor] = {}
    for name in names:
        leaves[name] = own[name]
        if not own[name].requires_grad or own[name].is_inference():  # frozen since, or made in inference mode
            leaves[name] = state[name] = own[name].detach().clone().requires_grad_()
    return state, leaves


def run(model: nn.Module, state: Mapping[str, torch.Tensor], x: object) -> Any:
    """The model's output with these parameters and buffers instead of its own; others stay.

    Under the caller's autocast the model computes in its precision; half-precision outputs then become float32, so that
    losses are not reduced in less.
    """
    shards = shards_of(model)
    if shards is not None:
        shards.agree(FORWARD, checksum(x))
        state = {name: tensor for name, tensor in state.items() if not is_spread(tensor)}  # FSDP2 puts these in place
    # Swapped for this call alone: the user's parameters never require, or hold, a gradient of ours.
    slots = {slot: state[name] for slot, name in _slots(model).items() if name in state}

    def functional(*args: Any, **kwargs: Any) -> Any:
        return torch.func.functional_call(model, slots, args, kwargs, tie_weights=False)

    try:
        with model_call(model):
            output = call(functional, x)
    except Exception:
        if shards is not None:
            shards.put_back()
        raise
    return output if callers_dtype() is None else map_tensors(wide, output)


def _slots(model: nn.Module) -> dict[str, str]:
    """Every place that holds a parameter or buffer, once, to the canonical name of what it holds.

    A module with two names has one place: torch would swap it twice, and put the wrong tensor back (torch 2.13).
    """
    names: dict[int, str] = {}
    found = {}
    # One walk: the first place of a tensor is its canonical name, as in `named_parameters`.
    for prefix, module in model.named_modules():
        for role, tensor in chain(module._parameters.items(), module._buffers.items()):
            if tensor is not None:
                slot = f"{prefix}.{role}" if prefix else role
                found[slot] = names.setdefault(id(tensor), slot)
    return found


def record(
    model: nn.Module,
    state: Mapping[str, torch.Tensor],
    layers: Mapping[str, nn.Module],
    x: object,
    shared: Collection[str] = (),
) -> Recording:
    """One forward pass with the layers watched.

    A layer's input or output may be changed in place by what follows (a ReLU, say), which would spoil its gradient;
    then the pass is repeated with copies. shared: layers that are called on one row for all rows; their outputs are
    handed on once for each row, so that each has its own gradient.
    """
    try:
        recording = _record(model, state, layers, x, shared, copies=False)
        # Copies cost memory at every layer, and few models write in place: copy only once that was seen.
        if not any(use.is_spoilt for use in recording.uses):
            return recording
    except RuntimeError as error:
        # Torch has no class of its own for it: an in-place change of a leaf or a view raises a plain RuntimeError.
        if "in-place" not in str(error):
            raise
    return _record(model, state, layers, x, shared, copies=True)


def _record(
    model: nn.Module,
    state: Mapping[str, torch.Tensor],
    layers: Mapping[str, nn.Module],
    x: Any,
    shared: Collection[str],
    copies: bool,
) -> Recording:
    uses: list[Use] = []
    hidden: list[str] = []
    # The model's rows; a layer called on another number is none of theirs.
    rows = next((len(leaf) for leaf in tree_leaves(x) if isinstance(leaf, torch.Tensor) and leaf.ndim), 1)

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            # By keyword the layer's input may have any name: the first one given is taken for it.
            given = args[0] if args else kwargs.get("input", next(iter(kwargs.values()), None))
            if not _is_recordable(given) or not _is_recordable(output) or not output.is_floating_point():
                return None
            if is_functorch_wrapped_tensor(output):  # inside a vmap of the model's own, which shows no rows
                hidden.append(name)
                return None
            if not output.requires_grad:
                # Parameters are detached, so that the first watched layer's output is a leaf: the graph begins there.
                output.requires_grad_()
            # Detached: its own history would be kept alive for nothing.
            given = given.detach().clone() if copies else given.detach()
            for_all = name in shared and len(given) == len(output) == 1 < rows
            if for_all:
                # A copy for each row, so that each gets its own gradient and not the sum over all rows.
                given, output = (v.expand(rows, *v.shape[1:]).clone() for v in (given, output))
            uses.append(Use(name, given, output, given._version, output._version))
            if copies:
                # What follows writes into the copy; the recorded output stays as the layer gave it.
                return output.clone()
            return output if for_all else None

        return hook

    with ExitStack() as stack:
        # Hooks are on the user's module: two threads would record each other's calls.
        stack.enter_context(lock_of(model))
        for name, module in layers.items():
            stack.callback(module.register_forward_hook(watch(name), with_kwargs=True).remove)
        output = run(model, state, x)
    return Recording(output, tuple(uses), rows, tuple(hidden))


def _is_recordable(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim > 0


def summed_products(tensors: Sequence[torch.Tensor], cotangents: Sequence[torch.Tensor]) -> torch.Tensor:
    """A number whose gradient is the vector-Jacobian product.

    Not `torch.autograd.grad(..., grad_outputs)`, which imports a computer algebra at its first call (3 CPU seconds in
    torch 2.13).
    """
    products = [(t * c).sum() for t, c in zip(tensors, cotangents, strict=True)]
    return sum(products[1:], products[0])
