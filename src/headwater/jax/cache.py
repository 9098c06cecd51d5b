"""Keeping what JAX compiles, from one process to the next."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache as caches

_SETTINGS = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
)


@contextmanager
def compilation_cache(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Inside, JAX keeps what it compiles in this folder, and finds there what it compiled in other processes.

    A process's first scores are mostly compiling. The settings are those of the whole process,
    `jax_compilation_cache_dir` and its two thresholds: while this is open they hold for everything that JAX compiles,
    and at its end they are again what they were. The folder is no exchange format: another version of JAX, or another
    machine, compiles anew.
    """
    before = [jax.config.values[name] for name in _SETTINGS]
    _use((os.fspath(folder), 0.0, -1))
    try:
        yield
    finally:
        _use(before)


def _use(values: Sequence[Any]) -> None:
    for name, value in zip(_SETTINGS, values, strict=True):
        jax.config.update(name, value)
    # JAX opens its cache once, at the first compilation, and would not look at the settings again.
    caches.reset_cache()
