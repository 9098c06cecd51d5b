"""CRC-32 of tensors where they are, the same as zlib's, so that parameters need not be copied to the host for it.

1. Without zlib's inversions, the CRC is linear over the field of two elements, and zero bytes before the first change
   nothing: each tensor is filled up at its front to whole pieces of PIECE bytes.
2. All pieces, of all tensors, go through the usual tables together, four bytes a step (Kounavis and Berry 2005).
3. A piece with p pieces behind it counts with its state moved over p PIECE zero bytes: a linear map, whose powers of
   two are tables as well, applied where p has that bit. The tensor's CRC is the sum, xor, of its pieces.
4. zlib begins with all bits set, and inverts at the end: both depend on the number of bytes alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache

import numpy as np
import torch

PIECE = 256
"""Bytes."""
GROUP = 2**18
"""Pieces that go together: 64 MiB of parameters are copied at a time, and some numbers for each piece."""

_POLYNOMIAL = 0xEDB88320


def crc32s(tensors: Iterable[torch.Tensor]) -> tuple[int, ...]:
    """zlib's CRC-32 of each tensor of bytes, uint8 [n], contiguous; computed where the tensors are."""
    sizes: list[int] = []
    found: list[int] = []
    for owners, pieces, behind in _groups(tensors, sizes):
        # One look at the device for each group: four bytes for each piece.
        states = _moved(_states(pieces), behind).to(torch.int32).cpu().numpy().view(np.uint32)
        found += [0] * (len(sizes) - len(found))
        starts = np.flatnonzero(np.r_[True, owners[1:] != owners[:-1]])
        for owner, state in zip(owners[starts], np.bitwise_xor.reduceat(states, starts), strict=True):
            found[owner] ^= int(state)
    found += [0] * (len(sizes) - len(found))
    return tuple(state ^ _of_zeros(size) for state, size in zip(found, sizes, strict=True))


def _groups(
    tensors: Iterable[torch.Tensor], sizes: list[int]
) -> Iterator[tuple[np.ndarray, torch.Tensor, torch.Tensor]]:
    """Numbers of the tensors that pieces belong to; pieces [k, PIECE]; how many pieces are behind each in its tensor.

    sizes: is filled with the tensors' bytes on the way.
    """
    held: list[tuple[int, torch.Tensor, torch.Tensor]] = []
    for number, tensor in enumerate(tensors):
        sizes.append(len(tensor))
        count = -(-len(tensor) // PIECE)
        for start in range(0, count, GROUP):
            stop = min(start + GROUP, count)
            # Missing bytes are zeros at the front of the first piece.
            front = count * PIECE - len(tensor)
            some = tensor[max(0, start * PIECE - front) : stop * PIECE - front]
            if start == 0 and front:
                some = torch.cat([some.new_zeros(front), some])
            behind = torch.arange(count - 1 - start, count - 1 - stop, -1, device=tensor.device)
            if held and (sum(len(b) for _, _, b in held) + len(behind) > GROUP or held[0][1].device != some.device):
                yield _joined(held)
                held = []
            held.append((number, some.reshape(-1, PIECE), behind))
    if held:
        yield _joined(held)


def _joined(held: list[tuple[int, torch.Tensor, torch.Tensor]]) -> tuple[np.ndarray, torch.Tensor, torch.Tensor]:
    owners = np.repeat([number for number, _, _ in held], [len(behind) for _, _, behind in held])
    return owners, torch.cat([pieces for _, pieces, _ in held]), torch.cat([behind for _, _, behind in held])


def _states(pieces: torch.Tensor) -> torch.Tensor:
    """Of each piece by itself: [k], int64 below 2^32."""
    tables = _on(pieces.device, "bytes")
    # Little-endian on every machine that torch runs on.
    words = pieces.contiguous().view(torch.int32).T.contiguous()
    state = torch.zeros(len(pieces), dtype=torch.int64, device=pieces.device)
    for word in words:
        state = _through(tables, state ^ (word.long() & 0xFFFFFFFF))
    return state


def _moved(states: torch.Tensor, behind: torch.Tensor) -> torch.Tensor:
    """Over as many pieces of zeros as are behind each."""
    for bit in range(int(behind.max()).bit_length()):
        tables = _on(states.device, f"pieces {bit}")
        states = torch.where((behind >> bit) & 1 == 1, _through(tables, states), states)
    return states


def _through(tables: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """A linear map of 32 bits, as a table for each byte: [4, 256]."""
    found = tables[0][states & 255]
    for k in (1, 2, 3):
        found = found ^ tables[k][(states >> (8 * k)) & 255]
    return found


@cache
def _on(device: torch.device, name: str) -> torch.Tensor:
    return torch.as_tensor(_tables(name), device=device)


@cache
def _tables(name: str) -> np.ndarray:
    """Of the map over four zero bytes, or over 2^bit pieces of zeros: int64 [4, 256]."""
    columns = _columns(4) if name == "bytes" else _columns(PIECE << int(name.rpartition(" ")[2]))
    found = np.zeros((4, 256), dtype=np.int64)
    for k in range(4):
        for byte in range(256):
            for bit in range(8):
                if byte >> bit & 1:
                    found[k, byte] ^= columns[8 * k + bit]
    return found


@cache
def _columns(zeros: int) -> tuple[int, ...]:
    """What each of the 32 bits becomes over so many zero bytes."""
    if zeros == 1:
        return tuple(_over_one(1 << bit) for bit in range(32))
    half = _columns(zeros // 2)
    doubled = tuple(_apply(half, column) for column in half)
    return tuple(_over_one(column) for column in doubled) if zeros % 2 else doubled


def _apply(columns: tuple[int, ...], state: int) -> int:
    found = 0
    for bit, column in enumerate(columns):
        if state >> bit & 1:
            found ^= column
    return found


def _over_one(state: int) -> int:
    for _ in range(8):
        state = state >> 1 ^ (_POLYNOMIAL if state & 1 else 0)
    return state


@cache
def _of_zeros(size: int) -> int:
    """What the two inversions add: the CRC of so many zero bytes."""
    return (_apply(_columns(size), 0xFFFFFFFF) ^ 0xFFFFFFFF) if size else 0
