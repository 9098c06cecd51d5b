"""One forward pass that remembers what went through chosen layers, and backward passes without weight gradients.

The user's model is called with detached copies of its parameters swapped in for the call, so only layer outputs need
gradients; hooks live for one call. Afterwards, also after an exception, nothing about the model has changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any
from unittest.mock import patch

import torch
import torch.utils.checkpoint
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves

from headwater.torch.batch import call


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

    @property
    def strange(self) -> list[str]:
        """Layers that were called on another number of rows than the model: what they got does not belong to rows."""
        sizes = ((use.layer, {len(use.input), len(use.output)}) for use in self.uses)
        return list(dict.fromkeys(layer for layer, found in sizes if found != {self.rows}))

    def output_grads(self, outputs: Sequence[torch.Tensor], cotangents: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The gradient at each use's output, zero where the output does not depend on it."""
        if not self.uses:
            return []
        live = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad]
        if not live:
            return [torch.zeros_like(use.output) for use in self.uses]
        grads = torch.autograd.grad(
            [o for o, _ in live],
            [use.output for use in self.uses],
            [c for _, c in live],
            allow_unused=True,
            materialize_grads=True,
        )
        return list(grads)


def detached_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters without gradients, and copies of the buffers (a forward pass may write to them)."""
    state = {name: p.detach() for name, p in model.named_parameters()}
    state |= {name: b.clone() for name, b in model.named_buffers()}
    return state


def run(model: nn.Module, state: Mapping[str, torch.Tensor], x: Any) -> Any:
    """The model's output with these parameters and buffers instead of its own."""
    slots = {slot: state[name] for slot, name in _slots(model).items()}

    def functional(*args: Any, **kwargs: Any) -> Any:
        return torch.func.functional_call(model, slots, args, kwargs, tie_weights=False)

    with everything_remembered():
        return call(functional, x)


@contextmanager
def everything_remembered() -> Iterator[None]:
    """Without `torch.utils.checkpoint`: what is computed again later would see other weights than the call did.

    Both of its ways are passed by, whoever imported its function, and under whatever name.
    """

    def at_once(function: Any, preserve: bool, *args: Any) -> Any:
        return function(*args)

    def nothing_else(*args: Any, **kwargs: Any) -> Iterator[None]:
        yield

    with (
        patch.object(torch.utils.checkpoint.CheckpointFunction, "apply", at_once),
        patch.object(torch.utils.checkpoint, "_checkpoint_without_reentrant_generator", nothing_else),
    ):
        yield


def _slots(model: nn.Module) -> dict[str, str]:
    """Every place that holds a parameter or buffer, once, to the canonical name of what it holds.

    A module with two names has one place: torch would swap it twice, and put the wrong tensor back (torch 2.13).
    """
    names = {id(t): name for name, t in chain(model.named_parameters(), model.named_buffers())}
    return {
        f"{prefix}.{role}" if prefix else role: names[id(tensor)]
        for prefix, module in model.named_modules()
        for role, tensor in chain(module._parameters.items(), module._buffers.items())
        if tensor is not None
    }


@contextmanager
def autograd_on() -> Iterator[None]:
    """Gradients on, also inside the caller's no_grad or inference_mode."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def twice_differentiable() -> Any:
    """Attention in plain operations, which have second and forward-mode derivatives."""
    return sdpa_kernel(SDPBackend.MATH)


def record(model: nn.Module, state: Mapping[str, torch.Tensor], layers: Mapping[str, nn.Module], x: Any) -> Recording:
    """One forward pass with the layers watched.

    A layer's input or output may be changed in place by what follows (a ReLU, say), which would spoil its gradient;
    then the pass is repeated with copies.
    """
    try:
        recording = _record(model, state, layers, x, copies=False)
        if not any(use.is_spoilt for use in recording.uses):
            return recording
    except RuntimeError as error:
        if "in-place" not in str(error):
            raise
    return _record(model, state, layers, x, copies=True)


def _record(
    model: nn.Module, state: Mapping[str, torch.Tensor], layers: Mapping[str, nn.Module], x: Any, copies: bool
) -> Recording:
    uses: list[Use] = []
    rows = next((len(leaf) for leaf in tree_leaves(x) if isinstance(leaf, torch.Tensor) and leaf.ndim), 1)

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            given = args[0] if args else kwargs.get("input", next(iter(kwargs.values()), None))
            if not isinstance(output, torch.Tensor) or not isinstance(given, torch.Tensor):
                return None
            if not output.requires_grad:
                output.requires_grad_()
            given = given.detach().clone() if copies else given.detach()
            shared = rows > 1 and given.ndim > 1 and output.ndim > 1 and len(given) == len(output) == 1
            if shared:  # one row for all, such as the embedding of positions
                given, output = (v.expand(rows, *v.shape[1:]).clone() for v in (given, output))
            uses.append(Use(name, given, output, given._version, output._version))
            if copies:
                return output.clone()
            return output if shared else None

        return hook

    with ExitStack() as stack:
        for name, module in layers.items():
            stack.callback(module.register_forward_hook(watch(name), with_kwargs=True).remove)
        output = run(model, state, x)
    return Recording(output, tuple(uses), rows)
