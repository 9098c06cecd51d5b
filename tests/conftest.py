"""One thread per process, so that sums have one order; hypothesis draws the same examples on every machine.

A test in a framework's folder has the framework's marker: `-m "jax and not slow"`. Of a test with many cases a sample
is fast, and the others are slow (SAMPLES): in all folders, and in files that are marked `sampled`.
"""

import ctypes
import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from zlib import crc32

os.environ["OMP_NUM_THREADS"] = "1"  # read once, when the first numerical library is loaded
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # compiling is most of what tests of JAX do, so it is kept short
os.environ["XLA_FLAGS"] = (  # small programs are not split among threads, each with a copy of the whole to optimise
    os.environ.get("XLA_FLAGS", "") + " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
)

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


SAMPLES = ((40, 20), (20, 10), (12, 6), (6, 3))
"""(cases, n): of a test with at least so many cases one in n is fast."""


def pytest_collection() -> None:
    """Modules and tests by the thousand are made and none is dropped: the collector would walk over all in vain."""
    gc.disable()


def pytest_collection_finish() -> None:
    gc.freeze()  # neither do tests have to walk over what stays to the end
    gc.enable()


@pytest.hookimpl(wrapper=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> Iterator[None]:
    """Of two cases in three nothing is made where slow ones do not run: that was a fifth of collecting."""
    yield
    if not without_slow(metafunc.config):
        return
    test = metafunc.definition
    names = {f"{test.nodeid}[{call.id}]": call for call in metafunc._calls if all(m.name != "slow" for m in call.marks)}
    slow = slow_cases(test, list(names))
    # Pytest has no public list of the cases; of a test whose cases are all slow one stays, to be deselected.
    metafunc._calls[:] = [call for name, call in names.items() if name not in slow] or metafunc._calls[:1]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        folder = item.path.parent.name
        if folder in FRAMEWORKS:
            item.add_marker(folder)
        if not item.get_closest_marker("slow"):
            cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for each in [] if without_slow(config) else cases.values():
        slow = slow_cases(each[0], [item.nodeid for item in each])
        for item in each:
            if item.nodeid in slow:
                item.add_marker("slow")


def without_slow(config: pytest.Config) -> bool:
    """Whether no slow test runs, and none is asked for by its name."""
    return "not slow" in config.option.markexpr and not any("::" in argument for argument in config.args)


def slow_cases(test: pytest.Item, names: list[str]) -> set[str]:
    """Those of the cases of a test that are not in its sample.

    By a hash of the name: every n-th might have one value of some parameter throughout.
    """
    if test.path.parent == HERE and not test.get_closest_marker("sampled"):
        return set()
    one_in = next((n for count, n in SAMPLES if len(names) >= count), 1)
    return set(sorted(names, key=lambda name: crc32(name.encode()))[-(-len(names) // one_in) :])


def pytest_runtest_teardown() -> None:
    if "jax" in sys.modules and sys.platform == "linux" and resident() > MUCH:
        sys.modules["jax"].clear_caches()
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what is freed goes back to the system only when asked for


def resident() -> int:
    """Bytes, on Linux."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
