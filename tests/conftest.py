"""One thread per process, so that sums have one order; hypothesis draws the same examples on every machine.

A test in a framework's folder has the framework's marker: `-m "jax and not slow"`. Of a test with many cases a sample
is fast, and the others are slow (SAMPLES): in all folders, and in files that are marked `sampled`.
"""

import ctypes
import gc
import os
import sys
from pathlib import Path
from zlib import crc32

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

HERE = Path(__file__).parent
FRAMEWORKS = ("torch", "jax", "hf", "sklearn")
MUCH = 1_750_000_000
"""Bytes of memory beyond which a process drops what JAX compiled, which is kept for ever otherwise."""


SAMPLES = ((40, 12), (20, 7), (12, 5), (6, 3))
"""(cases, n): of a test with at least so many cases one in n is fast."""


def pytest_collection() -> None:
    """Modules and tests by the thousand are made and none is dropped: the collector would walk over all in vain."""
    gc.disable()


def pytest_collection_finish() -> None:
    gc.freeze()  # neither do tests have to walk over what stays to the end
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        folder = item.path.parent.name
        if folder in FRAMEWORKS:
            item.add_marker(folder)
        sampled = item.path.parent != HERE or item.get_closest_marker("sampled")
        if sampled and not item.get_closest_marker("slow"):
            cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for each in cases.values():
        one_in = next((n for count, n in SAMPLES if len(each) >= count), 1)
        # By a hash of the name: every n-th might have one value of some parameter throughout.
        for item in sorted(each, key=lambda item: crc32(item.nodeid.encode()))[-(-len(each) // one_in) :]:
            item.add_marker("slow")


def pytest_runtest_teardown() -> None:
    if "jax" in sys.modules and sys.platform == "linux" and resident() > MUCH:
        sys.modules["jax"].clear_caches()
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what is freed goes back to the system only when asked for


def resident() -> int:
    """Bytes, on Linux."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
