"""Counter-based random numbers: a number depends on what it is for, never on what was drawn before it.

Philox-4x32-10 in NumPy integers, so that every framework and device sees the same numbers.
Source: Salmon, Moraes, Dror and Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3".
"""

from __future__ import annotations

from hashlib import blake2b
from typing import Any

import numpy as np

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)


def philox(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Ten rounds of Philox-4x32. Shapes: counter [..., 4], 32-bit words in any integer type; the result is uint32."""
    c0, c1, c2, c3 = (np.asarray(counter[..., k], dtype=np.uint64) & _LOW for k in range(4))
    k0, k1 = key
    for _ in range(10):
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (second >> _HALF) ^ c1 ^ np.uint64(k0),
            second & _LOW,
            (first >> _HALF) ^ c3 ^ np.uint64(k1),
            first & _LOW,
        )
        k0, k1 = (k0 + _WEYL[0]) & 0xFFFFFFFF, (k1 + _WEYL[1]) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=-1).astype(np.uint32)


def row_uniforms(rows: np.ndarray, count: int, *, draw: int, seed: int) -> np.ndarray:
    """Pairs of uniform numbers in (0, 1) for rows named by 64-bit keys: float64 [n, count, 2]."""
    rows = rows.astype(np.uint64)[:, None]
    position = np.broadcast_to(np.arange(count, dtype=np.uint64), (len(rows), count))
    low, high = np.broadcast_to(rows & _LOW, position.shape), np.broadcast_to(rows >> _HALF, position.shape)
    counter = np.stack([low, high, np.full_like(position, draw), position], axis=-1)
    words = philox(counter, (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF)).astype(np.uint64)
    bits = ((words[..., 0::2] << _HALF) | words[..., 1::2]) >> np.uint64(12)
    return (bits.astype(np.float64) + 0.5) * 2.0**-52


def row_normals(rows: np.ndarray, count: int, *, draw: int, seed: int) -> np.ndarray:
    """Standard normal numbers for rows named by keys, by Box and Muller: float64 [n, count]."""
    u = row_uniforms(rows, count, draw=draw, seed=seed)
    return np.sqrt(-2.0 * np.log(u[..., 0])) * np.cos(2.0 * np.pi * u[..., 1])


def row_keys(columns: list[Any]) -> np.ndarray:
    """A 64-bit key for each row, from its content alone: the same row has the same key in every batch.

    Columns are NumPy arrays whose first axis runs over the rows.
    """
    total = np.zeros(len(columns[0]), dtype=np.uint64)
    for number, column in enumerate(columns):
        raw = np.ascontiguousarray(column).reshape(len(column), -1).view(np.uint8)
        words = np.pad(raw, ((0, 0), (0, -raw.shape[1] % 8))).view(np.uint64)
        index = np.arange(words.shape[1], dtype=np.uint64) + np.uint64(number << 40)
        total += (words * (_mix(index) | np.uint64(1))).sum(axis=1, dtype=np.uint64) + _mix(words + index).sum(
            axis=1, dtype=np.uint64
        )
    return _mix(total)


def name_keys(names: list[Any]) -> np.ndarray:
    """A 64-bit key for each name: uint64 [n]."""
    digests = (blake2b(str(name).encode(), digest_size=8).digest() for name in names)
    return np.array([int.from_bytes(digest, "little") for digest in digests], dtype=np.uint64)


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea and Flood 2014)."""
    x = (x + np.uint64(0x9E3779B97F4A7C15)).astype(np.uint64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
