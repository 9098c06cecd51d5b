"""One thread per process, so that sums have one order; hypothesis draws the same examples on every machine.

A test in a framework's folder has the framework's marker: `-m "jax and not slow"`.
"""

import ctypes
import gc
import os
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # read once, when the first numerical library is loaded
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # compiling is most of what tests of JAX do, so it is kept short
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_use_fusion_emitters=false"

import pytest
import torch
from hypothesis import settings

from headwater import rows

torch.set_num_threads(1)
rows.FEW = 1  # the few rows of a test stay in the batches that it gives; what joins them is tested by itself
settings.register_profile("headwater", deadline=None, derandomize=True)
settings.load_profile("headwater")

FRAMEWORKS = ("torch", "jax", "hf", "sklearn")
MUCH = 1_750_000_000
"""Bytes of memory beyond which a process drops what JAX compiled, which is kept for ever otherwise."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        folder = item.path.parent.name
        if folder in FRAMEWORKS:
            item.add_marker(folder)


def pytest_runtest_teardown() -> None:
    if "jax" in sys.modules and sys.platform == "linux" and resident() > MUCH:
        sys.modules["jax"].clear_caches()
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what is freed goes back to the system only when asked for


def resident() -> int:
    """Bytes, on Linux."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
