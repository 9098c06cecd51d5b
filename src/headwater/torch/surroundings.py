"""What surrounds a call of the user's model: its own numbers, and nothing of torch's process changed for others.

Checkpointing, fast paths and compiled code are switched off while the model runs, since hooks and derivatives need the
plain operations. Some of these switches belong to the whole process: they are counted under a lock, so that several
threads can hold them at once and the last one puts back what the first one found.
"""

from __future__ import annotations

import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
import torch.utils.checkpoint
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel


class SharedSwitch:
    """A process-wide setting that several threads may hold at once: set by the first, put back by the last."""

    def __init__(self, change: Callable[[], AbstractContextManager[object]]):
        self._change = change
        self._lock = threading.Lock()
        self._holders = 0
        self._held = ExitStack()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock:
            # A switch of the whole process: the first thread to need it turns it on, the last turns it off.
            if self._holders == 0:
                self._held.enter_context(self._change())
            self._holders += 1
        try:
            yield
        finally:
            with self._lock:
                self._holders -= 1
                if self._holders == 0:
                    self._held.close()


class _OfThread(threading.local):
    """What one thread is in the middle of."""

    without_checkpointing = 0
    autocast: tuple[str, torch.dtype] | None = None
    """The caller's autocast (device type, dtype), kept for the model's call."""


_thread = _OfThread()


@contextmanager
def autograd_on() -> Iterator[None]:
    """Gradients on, also inside the caller's no_grad or inference_mode."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


twice_differentiable = SharedSwitch(lambda: sdpa_kernel(SDPBackend.MATH))
"""Attention in plain operations, which have second and forward-mode derivatives."""


@contextmanager
def _without_remarks() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
        warnings.filterwarnings("ignore", "`torch.jit.script`", DeprecationWarning)
        yield


quiet = SharedSwitch(_without_remarks)
"""Without torch's remarks on how it vectorises or scripts an operation: its user can do nothing about it."""


# Autocast -------------------------------------------------------------------------------------------------------------


@contextmanager
def own_precision(device: torch.device) -> Iterator[None]:
    """Without the caller's autocast, which the model's call alone gets back (see `as_the_caller_computes`)."""
    kind = device.type
    # Already put aside by an outer call of this thread, or never on.
    if _thread.autocast is not None or not torch.is_autocast_enabled(kind):
        yield
        return
    _thread.autocast = (kind, torch.get_autocast_dtype(kind))
    try:
        with torch.autocast(kind, enabled=False):
            yield
    finally:
        _thread.autocast = None


def callers_dtype() -> torch.dtype | None:
    """The dtype of the caller's autocast, which the model computes in; None without one."""
    return None if _thread.autocast is None else _thread.autocast[1]


def _as_the_caller_computes() -> AbstractContextManager[object]:
    if _thread.autocast is None:
        return nullcontext()
    kind, dtype = _thread.autocast
    return torch.autocast(kind, dtype=dtype)


# The model's call -----------------------------------------------------------------------------------------------------


@contextmanager
def _checkpointing_passed_by() -> Iterator[None]:
    """`torch.utils.checkpoint` does nothing in threads that ask for that; both its ways, whoever imported them."""
    apply = torch.utils.checkpoint.CheckpointFunction.apply
    generator = torch.utils.checkpoint._checkpoint_without_reentrant_generator

    def at_once(function: Any, preserve: bool, *args: Any) -> Any:
        return function(*args) if _thread.without_checkpointing else apply(function, preserve, *args)

    def nothing_else() -> Iterator[None]:
        yield

    def chosen(*args: Any, **kwargs: Any) -> Any:
        return nothing_else() if _thread.without_checkpointing else generator(*args, **kwargs)

    with (
        # On the class and the module: models have imported `checkpoint` itself long before.
        patch.object(torch.utils.checkpoint.CheckpointFunction, "apply", at_once),
        patch.object(torch.utils.checkpoint, "_checkpoint_without_reentrant_generator", chosen),
    ):
        yield


@contextmanager
def _slow_path() -> Iterator[None]:
    found = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(found)


_dispatched_checkpointing = SharedSwitch(_checkpointing_passed_by)
_attention_as_in_training = SharedSwitch(_slow_path)
_not_compiled = SharedSwitch(lambda: torch.compiler.set_stance("force_eager"))

_locks: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()
_locks_lock = threading.Lock()


def lock_of(model: nn.Module) -> threading.RLock:
    """Held while parameters are swapped or hooks are on; the same for two wrappers of one model."""
    # By the first child: two wrappers (ours for logits, say) around one model must share the lock.
    first = next(model.children(), model)
    with _locks_lock:
        return _locks.setdefault(first, threading.RLock())


@contextmanager
def model_call(model: nn.Module) -> Iterator[None]:
    """While the model runs: one thread at a time, in the caller's precision, in plain operations.

    Without `torch.utils.checkpoint`: what is computed again later would see other weights than the call did. Without
    the fast path of attention, which only inference takes and whose padded outputs differ. Without compiled code, which
    passes hooks by.
    """
    with ExitStack() as stack:
        stack.enter_context(lock_of(model))
        stack.enter_context(_dispatched_checkpointing())
        stack.enter_context(_attention_as_in_training())
        if "torch._dynamo" in sys.modules:  # else nothing is compiled
            stack.enter_context(_not_compiled())
        # A count, not a flag: the model's call may be entered again from a hook.
        _thread.without_checkpointing += 1
        stack.callback(_leave_call)
        stack.enter_context(_as_the_caller_computes())
        yield


def _leave_call() -> None:
    _thread.without_checkpointing -= 1
