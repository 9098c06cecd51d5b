"""Models in wrappers that spread them over devices: what is inside, and which cannot be attributed.

`DistributedDataParallel`, `DataParallel` and `torch.compile` change nothing that a gradient depends on: the module
inside is read, and the wrapper is neither called nor changed, so that no collective runs. FSDP2 is in `sharded.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, TypeGuard

import torch
from torch import nn

from headwater.errors import UnsupportedModel

COPIES = (nn.DataParallel, nn.parallel.DistributedDataParallel)
"""Each device has the whole model."""
REASONS = {
    "torch.distributed.fsdp.fully_sharded_data_parallel": (
        "{} (FSDP1) keeps parameters as slices of flat ones, whose layers cannot be told apart. Wrap the model by "
        "fully_shard (FSDP2), or load its full state dict into the model that is not wrapped."
    ),
    "torch.distributed.pipelining": (
        "{} is one stage of a pipeline: the loss is known on the last one alone, and a row's gradient on no process. "
        "Load the whole model into one process, or spread it by fully_shard (FSDP2)."
    ),
}
"""Why what a module of torch's (by the beginning of its name) defines cannot be attributed, and what can."""
TENSOR_PARALLEL = (
    "The parameter {} is a DTensor, {}, that fully_shard (FSDP2) did not make: with tensor parallelism each process "
    "sees slices of a layer's inputs and output gradients, which no rule for a layer takes. Gather the weights "
    "(full_tensor()) into the model that is not parallelised, or spread that one by fully_shard (FSDP2)."
)


def unwrapped(model: nn.Module) -> nn.Module:
    """The module itself, without data parallelism and `torch.compile` around it."""
    while (inner := _inside(model)) is not None:
        model = inner
    return model


def _inside(model: nn.Module) -> nn.Module | None:
    if isinstance(model, COPIES):
        inner: nn.Module = model.module
        return inner
    if "torch._dynamo" not in sys.modules:  # else nothing is compiled
        return None
    from torch._dynamo.eval_frame import OptimizedModule

    return model._orig_mod if isinstance(model, OptimizedModule) else None


def check_unwrapped(model: nn.Module) -> None:
    """Errors: UnsupportedModel for parts that are spread over devices in ways that gradients of rows do not survive."""
    _check_kind(model)
    for name, module in model.named_modules():
        _check_kind(module)
        if isinstance(module, COPIES):
            raise UnsupportedModel(
                f"{name or 'The model'} is wrapped in {type(module).__name__} within the model, whose forward pass "
                "runs collectives; pass a model that has the module itself in its place."
            )
    sharded = fsdp_modules(model)
    for each in sharded.values():
        each.reshard()  # else the whole parameters of an earlier forward pass may still be there
    for name, parameter in model.named_parameters():
        if is_spread(parameter) and not _is_of_fsdp(parameter, name, sharded):
            raise UnsupportedModel(TENSOR_PARALLEL.format(name, parameter.placements))


def _check_kind(module: object) -> None:
    for kind in type(module).__mro__:
        for beginning, reason in REASONS.items():
            if kind.__module__.startswith(beginning):
                raise UnsupportedModel(reason.format(type(module).__name__))


def is_spread(tensor: object) -> TypeGuard[Any]:
    """Whether it is a `DTensor`: numbers that several processes hold together."""
    if type(tensor) is torch.Tensor or "torch.distributed.tensor" not in sys.modules:
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def fsdp_modules(model: nn.Module) -> dict[str, Any]:
    """The modules, by name, that `fully_shard` was called on."""
    if "torch.distributed.fsdp" not in sys.modules:
        return {}
    from torch.distributed.fsdp import FSDPModule

    return {name: module for name, module in model.named_modules() if isinstance(module, FSDPModule)}


def is_within(name: str, outer: str) -> bool:
    """Whether this is the name of something in a module, or of the module itself."""
    return not outer or name == outer or name.startswith(f"{outer}.")


def _is_of_fsdp(parameter: Any, name: str, sharded: Iterable[str]) -> bool:
    """Cut along one axis of the mesh, the last, by a module around it that FSDP2 shards."""
    *others, last = parameter.placements
    # Of tensor parallelism inside FSDP2 another axis is cut as well, or the last one is not.
    if not last.is_shard() or not all(placement.is_replicate() for placement in others):
        return False
    return any(is_within(name, outer) for outer in sharded)
