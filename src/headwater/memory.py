"""How much memory is free. Arrays that surely do not fit are refused before anything is allocated."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from headwater.errors import InvalidSetting

WORTH_A_LOOK = 2**28
"""Bytes up to which nobody asks what the machine has."""


def refuse_too_large(what: str, shape: Sequence[int], size: float, remedy: str, place: object = None) -> None:
    """Before arrays are allocated that take `size` bytes in all, the largest of this shape.

    what: names the block. place: the arrays' device; only the host's memory is known here, and an accelerator's own
    allocator refuses at once what it has no room for. Errors: InvalidSetting, naming the shape, GB and the remedy.
    """
    if size <= WORTH_A_LOOK or not on_host(place):
        return
    room = available_memory()
    if size > room:
        needed, free = f"{size / 1e9:.3g} GB of memory", f"{room / 1e9:.3g} GB are free"
        raise InvalidSetting(f"{what} of shape {list(map(int, shape))} would take {needed}, and {free}. {remedy}")


def as_many_as_fit(count: int, size: float, place: object = None) -> int:
    """How many of `count` things of `size` bytes have room in half of the memory; at least one."""
    if count * size <= WORTH_A_LOOK or not on_host(place):
        return count
    return max(1, min(count, int(available_memory() / 2 // size)))


def on_host(place: object) -> bool:
    """Whether a framework's device is the processor: "cpu", `torch.device("cpu")`, JAX's TFRT_CPU_0; None counts."""
    return place is None or "cpu" in str(place).lower()


def available_memory() -> float:
    """Bytes that can be had without swapping; infinite where the system does not say."""
    return min(_free_in_system(), _free_in_group())


def _free_in_system() -> float:
    """As Linux estimates it, caches that can be dropped included; else all that there is."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found = {name: value for name, _, value in (line.partition(":") for line in lines)}
        return float(found["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError, IndexError):
        pass
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):
        return math.inf


def _free_in_group() -> float:
    """Of a container's limit, where there is one: what is used less what can be dropped."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit = float((folder / "memory.max").read_text())  # "max", without a limit, is no number
        used = float((folder / "memory.current").read_text())
        kept = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return limit - used + float(kept.get("inactive_file", 0))
    except (OSError, ValueError):
        return math.inf


def resident_memory() -> int:
    """Bytes that this process holds now; 0 where the system does not say."""
    return _of_process("VmRSS")


@contextmanager
def peak_memory() -> Iterator[Callable[[], int]]:
    """What is called inside gives the bytes that the process held at most since; 0 where the system does not say.

    On Linux. Of an accelerator's memory nothing is known here.
    """
    with suppress(OSError):  # "5" sets the mark of the highest water to where it is now
        Path("/proc/self/clear_refs").write_text("5")
    yield lambda: _of_process("VmHWM")


def _of_process(name: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        found = next(line for line in lines if line.startswith(f"{name}:"))
        return int(found.split()[1]) * 1024
    except (OSError, StopIteration, ValueError, IndexError):
        return 0
