"""Models whose parameters FSDP2 (`fully_shard`) spreads over processes.

1. A whole parameter is there only while its module runs, and is another tensor than the one that the module holds.
   Gradients of rows are read at the outputs of layers, as of any model; the whole parameters themselves are asked for
   where rules are checked and second derivatives taken. Hooks on the model's own parameters would never fire.
2. Each forward pass, backward pass and gathering is a collective: all processes make the same calls, on the same rows,
   in the same order. Before each they compare what they are about to do: where one has other rows, or none left, all
   of them say so, and nobody waits for who does not come.
3. Second derivatives go backward twice through one forward pass: the whole model is kept gathered meanwhile. Forward
   mode does not pass FSDP2's hooks, and is not used.
"""

from __future__ import annotations

import json
import sys
import weakref
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from headwater.errors import (
    BatchMismatch,
    DamagedFile,
    HeadwaterError,
    InvalidInput,
    NotSaved,
    NotWritten,
    ProcessLost,
    UnsupportedModel,
)
from headwater.gradients.together import Answer, Together
from headwater.torch.wrapped import fsdp_modules, is_spread, is_within

FORWARD, END, FAILED, GATHER, QUESTION, PLAN, FIRST = (
    "a forward pass",
    "the end of its rows",
    "an error",
    "gathering weights",
    "looking into a folder",
    "planning tiles",
    "the folder, which the first looks after",
)
ACTS = (FORWARD, END, FAILED, GATHER, QUESTION, PLAN, FIRST)
KINDS = {kind.__name__: kind for kind in (InvalidInput, BatchMismatch, DamagedFile, NotSaved, NotWritten)}
"""Errors of process 0 that are raised on all as what they are; others there as `ProcessLost`."""
REMEDY = (
    "With FSDP2 every process reads all rows, in one order: no DistributedSampler, no shuffling, and the same calls on "
    "each process."
)

_known: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Shards]] = weakref.WeakKeyDictionary()
"""By the module that is called; the providers of the model keep what is found alive, as it keeps the model."""


def shards_of(model: nn.Module) -> Shards | None:
    """How the model is spread, once `look_for_shards` has found it to be."""
    known = _known.get(model)
    return None if known is None else known()


def look_for_shards(model: nn.Module, called: nn.Module) -> Shards | None:
    """How FSDP2 spreads a model that passed `check_unwrapped`; None where it does not.

    Known to `shards_of`, while it is held, by the module that is called: the model, or another face of it.
    Errors: UnsupportedModel for one that is spread over several meshes.
    """
    if not any(is_spread(parameter) for parameter in model.parameters()):
        _known.pop(called, None)
        return None
    found = shards_of(called) or Shards(model)  # one for all providers: whichever goes last, it stays known
    _known[called] = weakref.ref(found)
    return found


class Shards(Together):
    """A model that FSDP2 has spread: its modules, and the processes that hold it together."""

    def __init__(self, model: nn.Module):
        self._model = model
        named = fsdp_modules(model)
        self.modules = list(named.values())
        # Those that no other one is around: FSDP2 keeps the state of a pass with them.
        self._roots = [
            module
            for name, module in named.items()
            if not any(is_within(name, other) for other in named if other != name)
        ]
        spread: list[Any] = [parameter for parameter in model.parameters() if is_spread(parameter)]
        mesh = spread[0].device_mesh
        if any(parameter.device_mesh != mesh for parameter in spread):
            raise UnsupportedModel(
                "The model's parameters are spread over several device meshes, whose processes cannot be kept in step "
                "with each other. Call fully_shard with one mesh for all modules."
            )
        self._group = mesh.get_group(mesh.ndim - 1)
        self._device = mesh.device_type
        self.count = mesh.size(mesh.ndim - 1)
        self.number = mesh.get_local_rank(mesh.ndim - 1)
        self._nobody_waits = False
        """Whether a failure here would be told in vain: the others know of one, or may have gone."""

    # Together -----------------------------------------------------------------------------------------------------

    def agree(self, act: str, about: int = 0) -> None:
        """Go on once all processes have come here; one of `ACTS`, and a checksum of what it is done with.

        Errors: BatchMismatch, on all of them, if they are about to do different things; ProcessLost if one does not
        come within the process group's timeout.
        """
        said = self._said(act, about)
        self._nobody_waits = act == FAILED
        if len(set(said)) > 1:
            self._refuse(said)

    def all_say(self, answer: bool) -> bool:
        """Errors: as `agree`."""
        return all(self._values(QUESTION, answer))

    def least(self, number: int) -> int:
        """Errors: as `agree`."""
        return min(self._values(PLAN, number))

    def first_does(self, act: Callable[[], Answer]) -> Answer:
        """Errors: as `agree`, and those of the act."""
        answer: dict[str, Any] = {}
        failure: Exception | None = None
        if self.number == 0:
            try:
                answer = {"found": act()}
            except Exception as error:
                failure, answer = error, {"failed": type(error).__name__, "said": str(error)}
        answer = json.loads(self._from_first(json.dumps(answer).encode()))
        if "failed" in answer:
            self._nobody_waits = True
            said = f"Process 0, which looks after the folder for all {self.count}: {answer['said']}"
            raise failure or KINDS.get(answer["failed"], ProcessLost)(said)
        found: Answer = answer["found"]
        return found

    def tell_failure(self) -> None:
        """Waits for the others as `agree` does."""
        if not self._nobody_waits:
            with suppress(HeadwaterError):  # what this process has raised is the news
                self.agree(FAILED)

    def _from_first(self, content: bytes) -> bytes:
        """What process 0 has. Errors: as `agree`."""
        import torch.distributed as dist

        size = self._values(FIRST, len(content))[0]
        if self.count == 1:
            return content
        sent = bytearray(content if self.number == 0 else size)
        letter = torch.frombuffer(sent, dtype=torch.uint8).to(self._device)
        with self._waited_for(FIRST):
            dist.broadcast(letter, dist.get_global_rank(self._group, 0), group=self._group)
        return letter.cpu().numpy().tobytes()

    def _values(self, act: str, value: int) -> list[int]:
        """Of all processes, in their order, which are about to do the same. Errors: as `agree`."""
        said = self._said(act, value)
        if any(mine != act for mine, _ in said):
            self._refuse(said)
        return [each for _, each in said]

    def _said(self, act: str, about: int) -> list[tuple[str, int]]:
        """What each process is about to do. Errors: ProcessLost."""
        import torch.distributed as dist

        if self.count == 1:
            return [(act, about)]
        mine = torch.tensor([ACTS.index(act), about], device=self._device)
        each = [torch.empty_like(mine) for _ in range(self.count)]
        with self._waited_for(act):
            dist.all_gather(each, mine, group=self._group)
        return [(ACTS[int(number)], int(value)) for number, value in each]

    @contextmanager
    def _waited_for(self, act: str) -> Iterator[None]:
        """Errors: ProcessLost."""
        self._nobody_waits = True  # after an error: who has gone cannot be told
        try:
            yield
        except RuntimeError as error:
            raise ProcessLost(
                f"Of the {self.count} processes that hold the model together, not all came to {act} in time, or one "
                f"has ended: {str(error)[:200]}. {REMEDY}"
            ) from error
        self._nobody_waits = False

    def _refuse(self, said: list[tuple[str, int]]) -> NoReturn:
        self._nobody_waits = True
        acts = {act: [number for number, (mine, _) in enumerate(said) if mine == act] for act, _ in said}
        if len(acts) == 1:
            raise BatchMismatch(f"The {self.count} processes that hold the model have different rows. {REMEDY}")
        who = ", ".join(f"{act} on {numbers}" for act, numbers in acts.items())
        raise BatchMismatch(f"The processes that hold the model are not in step: {who}. {REMEDY}")

    # Parameters ---------------------------------------------------------------------------------------------------

    def whole_parameters(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """The tensors that stand for these parameters while their modules run: leaves of every graph through them.

        They hold numbers only while gathered. Errors: UnsupportedModel for one that has been frozen since.
        """
        self.agree(GATHER)
        found: dict[str, torch.Tensor] = {}
        model, wanted = self._model, set(names)
        self.put_back()
        for module in self.modules:  # one after the other: only one is gathered at a time
            module.unshard()
            found |= {
                name: parameter
                for name, parameter in model.named_parameters()
                if name in wanted and not is_spread(parameter)
            }
            module.reshard()
        frozen = [name for name, parameter in found.items() if not parameter.requires_grad]
        if frozen:
            raise UnsupportedModel(f"{frozen[0]} was trainable, and has been frozen since. Make the influence anew.")
        return found

    @contextmanager
    def kept_whole(self) -> Iterator[None]:
        """Parameters stay gathered after a backward pass, for another one through the same graph."""
        states = [module._get_fsdp_state()._fsdp_param_group for module in self.modules]
        before = [None if state is None else state.reshard_after_backward for state in states]
        try:
            for module in self.modules:
                module.set_reshard_after_backward(False, recurse=False)
            yield
        finally:
            for module, was in zip(self.modules, before, strict=True):
                if was is not None:
                    module.set_reshard_after_backward(was, recurse=False)
            self.put_back()

    def put_back(self) -> None:
        """Each process holds its part again, whatever was broken off in the middle."""
        for root in self._roots:
            # Not in older torch; and a larger model's part is no root of its own.
            with suppress(AttributeError, RuntimeError):
                root.reset_iter_state()
        for module in self.modules:
            module.reshard()

    @contextmanager
    def tidied(self) -> Iterator[None]:
        """The model is left as it was found."""
        try:
            yield
        finally:
            self.put_back()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor that several processes hold: a collective. Other tensors as they are."""
    found: torch.Tensor = tensor.full_tensor() if is_spread(tensor) else tensor
    return found


def own_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of it, of the same device and dtype."""
    found: torch.Tensor = tensor.to_local() if is_spread(tensor) else tensor
    return found


def checksum(x: object) -> int:
    """Of all tensors in a model's input, in order."""
    found = 0
    for leaf in tree_leaves(x):
        if isinstance(leaf, torch.Tensor):
            found = zlib.crc32(repr(tuple(leaf.shape)).encode(), found)
            flat = leaf.detach().cpu().contiguous().reshape(-1)
            found = zlib.crc32(flat.view(torch.uint8).numpy().tobytes(), found)
    return found


def class_of(module: nn.Module) -> type[nn.Module]:
    """The module's class before FSDP2 put one of its own in its place, "FSDP" and the name."""
    # Who has such a module has imported what makes them; for all others that would be most of a second.
    if "torch.distributed.fsdp" not in sys.modules:
        return type(module)
    from torch.distributed.fsdp import FSDPModule

    if not isinstance(module, FSDPModule):
        return type(module)
    after = type(module).__mro__[type(module).__mro__.index(FSDPModule) + 1]
    assert issubclass(after, nn.Module)
    return after
