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
    # Salmon et al. 2011: multiply, cross over, and change the key by a Weyl sequence.
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
    # 52 of 64 bits, plus one half: never 0 or 1, whose logarithm Box and Muller take.
    bits = ((words[..., 0::2] << _HALF) | words[..., 1::2]) >> np.uint64(12)
    return (bits.astype(np.float64) + 0.5) * 2.0**-52


def row_normals(rows: np.ndarray, count: int, *, draw: int, seed: int) -> np.ndarray:
    """Standard normal numbers for rows named by keys, by Box and Muller: float64 [n, count]."""
    u = row_uniforms(rows, count, draw=draw, seed=seed)
    return np.sqrt(-2.0 * np.log(u[..., 0])) * np.cos(2.0 * np.pi * u[..., 1])


def row_numbers(rows: np.ndarray, draw: int, seed: int, count: int, normal: bool) -> np.ndarray:
    """What a draw of labels takes: `count` uniform, or standard normal, numbers for each row: float64 [n, count]."""
    if normal:
        return row_normals(rows, count, draw=draw, seed=seed)
    return row_uniforms(rows, count, draw=draw, seed=seed)[..., 0]


def row_keys(columns: list[Any]) -> np.ndarray:
    """A 64-bit key for each row, from its content alone: the same row has the same key in every batch.

    Columns are NumPy arrays whose first axis runs over the rows.
    """
    total = np.zeros(len(columns[0]), dtype=np.uint64)
    for number, column in enumerate(columns):
        raw = np.ascontiguousarray(column).reshape(len(column), -1).view(np.uint8)
        # Bytes, not values: -0.0 and 0.0, and the same number in another dtype, are other rows.
        words = np.pad(raw, ((0, 0), (0, -raw.shape[1] % 8))).view(np.uint64)
        # Each word's place counts, and the column's: the same bytes elsewhere are another row.
        index = np.arange(words.shape[1], dtype=np.uint64) + np.uint64(number << 40)
        total += (words * (_mix(index) | np.uint64(1))).sum(axis=1, dtype=np.uint64) + _mix(words + index).sum(
            axis=1, dtype=np.uint64
        )
    return _mix(total)


def row_digests(columns: list[Any]) -> np.ndarray:
    """A 64-bit key for each row, as `row_keys`, at a tenth of its cost: for telling rows apart, not for random draws.

    The words w of a row, 32 bits each, are summed with random factors: sum_i w_i a_i modulo 2^64. Two rows that differ
    have the same sum with a probability of 2^-32 at most, whatever they are, and of 2^-64 where the lowest bits of some
    word differ. Source: multilinear hashing; Lemire and Kaser 2014, arXiv 1202.4961.
    """
    total = np.zeros(len(columns[0]), dtype=np.uint64)
    for number, column in enumerate(columns):
        raw = np.ascontiguousarray(column).reshape(len(column), -1).view(np.uint8)
        if raw.shape[1] % 4:
            raw = np.pad(raw, ((0, 0), (0, -raw.shape[1] % 4)))
        words = raw.view(np.uint32)
        factors = _mix(np.arange(words.shape[1], dtype=np.uint64) + np.uint64(number << 40)) | np.uint64(1)
        # Modulo 2^64 on purpose: overflow is the arithmetic of the hash.
        total += np.einsum("nw,w->n", words, factors, dtype=np.uint64, casting="unsafe")
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


# Numbers of named matrices --------------------------------------------------------------------------------------------

PROJECTION_VERSION = 1
"""Changes when any of the numbers below do; part of the identity of everything that was projected with them."""

_SIGNS, _NORMALS, _WORDS = range(3)
_BLOCKS_AT_ONCE = 2**14
"""Philox blocks in one call: their words stay in the processor's cache."""


def signs(name: str, rows: range, columns: range, *, seed: int) -> np.ndarray:
    """Signs of a named matrix: int8 [rows, columns], each 1 or -1.

    Entry (r, c) depends on the name, the seed, r and c alone, so that any cut of the matrix is the same. One Philox
    block gives the 128 signs of columns 128 b to 128 b + 127: bit c % 32 of word (c % 128) // 32.
    """
    first = columns.start // 128
    words = _words(name, rows, range(first, -(-columns.stop // 128)), _SIGNS, seed)
    bits = np.unpackbits(words.astype("<u4").view(np.uint8).reshape(len(rows), -1), axis=1, bitorder="little")
    start = columns.start - 128 * first
    cut = bits[:, start : start + len(columns)].view(np.int8)
    return cut * np.int8(2) - np.int8(1)


def normals(name: str, rows: range, columns: int, *, seed: int) -> np.ndarray:
    """Standard normal numbers of a named matrix: float64 [rows, columns]; entries as independent as those of `signs`.

    One Philox block gives four columns of a row: its words u are the uniforms (u + 1/2) / 2^32, and each two of them
    give two normals by Box and Muller. None is larger than 6.8.
    """
    words = _words(name, rows, range(-(-columns // 4)), _NORMALS, seed).reshape(len(rows), -1, 2)
    uniform = (words.astype(np.float64) + 0.5) * 2.0**-32
    radius, angle = np.sqrt(-2.0 * np.log(uniform[..., 0])), 2.0 * np.pi * uniform[..., 1]
    pairs = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)
    return pairs.reshape(len(rows), -1)[:, :columns]


def words(name: str, rows: range, *, seed: int) -> np.ndarray:
    """Four random words for each row of a named list: uint32 [rows, 4]."""
    return _words(name, rows, range(1), _WORDS, seed)[:, 0]


def _words(name: str, rows: range, blocks: range, kind: int, seed: int) -> np.ndarray:
    """One Philox block for each row and column block: uint32 [rows, blocks, 4]."""
    # The name is in the key and the place in the counter: streams of two names never meet.
    key, wide = _stream(name, seed), len(blocks)
    found = np.empty((len(rows) * wide, 4), dtype=np.uint32)
    for start in range(0, len(found), _BLOCKS_AT_ONCE):
        place = np.arange(start, min(start + _BLOCKS_AT_ONCE, len(found)), dtype=np.uint64)
        row, block = place // np.uint64(wide) + np.uint64(rows.start), place % np.uint64(wide) + np.uint64(blocks.start)
        # The last word says the kind: signs and normals of one matrix are independent.
        counter = np.stack([block & _LOW, block >> _HALF, row, np.full_like(row, kind)], axis=-1)
        found[start : start + len(place)] = philox(counter, key)
    return found.reshape(len(rows), wide, 4)


def _stream(name: str, seed: int) -> tuple[int, int]:
    """Philox's key for a name and a seed."""
    digest = blake2b(f"{PROJECTION_VERSION}/{seed}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")
