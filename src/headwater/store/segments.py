"""Arrays of some rows in one file that never changes, and is mapped into memory where it is read.

Layout: the format of safetensors, so that others read it too: eight bytes with the length of a JSON header, the header,
and the arrays one after the other, rows first. Each array is stored as float32, float64, bfloat16, or as int8 with a
float32 scale for each row (an array of its own, "NAME.scale" [n, columns' groups]). Beside the numbers a row has keys,
an id and a weight, which are stored as they are.

A checksum of the whole file is in its header: BLAKE2b of the header and of the CRC-32C of each megabyte, which a
processor computes about as fast as it reads. It says where the file belongs too. A file is checked when a process
reads it first.
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import google_crc32c
import numpy as np

from headwater.errors import DamagedFile
from headwater.settings import check_word
from headwater.store.draft import write_whole
from headwater.store.seal import digest

Stored = Literal["float32", "bfloat16", "int8", "float64"]
SUFFIX = ".safetensors"
NAMES: dict[str, str] = {
    "float64": "F64",
    "float32": "F32",
    "bfloat16": "BF16",
    "int8": "I8",
    "uint8": "U8",
    "int64": "I64",
    "uint64": "U64",
    "int32": "I32",
}
"""Of dtypes in headers."""
KINDS = {word: np.dtype(np.uint16 if kind == "bfloat16" else kind) for kind, word in NAMES.items()}
"""In memory: bfloat16 as its bits."""
ALIGNED = 64
"""Bytes that the arrays begin at a multiple of."""
PIECE = 2**20
"""Bytes that have one CRC-32C."""
AT_ONCE = 2**17
"""Numbers that are multiplied at once: the product's own copy of them stays in the processor's cache."""
REMEDY = "The call of gradients or factors that made it computes its rows again; check(drop=True) leaves them out."


def checked_dtype(dtype: str) -> Stored:
    """Errors: InvalidSetting for what numbers are not stored as."""
    check_word("dtype", dtype, get_args(Stored))
    return dtype  # type: ignore[return-value]


# Numbers --------------------------------------------------------------------------------------------------------------


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """float32 rounded to the nearest bfloat16, ties to even, as its bits: uint16. Relative error: at most 2^-8."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    # The upper half, after adding half of what is cut off; the lowest kept bit decides a tie.
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)
    return rounded.astype(np.uint16)


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    """The float32 that bits stand for."""
    wide = bits.astype(np.uint32)
    wide <<= np.uint32(16)
    return wide.view(np.float32)


def to_int8(values: np.ndarray, groups: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Whole numbers from -127 to 127, and what they are multiplied by: int8 as the values, float32 [n, groups].

    groups: where groups of columns of [n, D] end, each with a scale of its own; of arrays with more axes all numbers of
    a row are one group. Error: at most half a scale, which is the largest number of row and group over 127.
    """
    flat = values.reshape((len(values), math.prod(values.shape[1:]))).astype(np.float32, copy=False)
    found, scales = np.empty(flat.shape, dtype=np.int8), np.empty((len(flat), len(groups)), dtype=np.float32)
    for k, columns in enumerate(_columns(groups)):
        part = flat[:, columns]
        largest = np.abs(part).max(axis=1, initial=0.0)
        # A row of zeros has no scale; one whose scale is below float32's normal numbers is a row of zeros too.
        scales[:, k] = np.where(largest >= 127 * np.finfo(np.float32).tiny, largest / np.float32(127), 0)
        inverse = np.divide(1.0, scales[:, k], out=np.zeros(len(part)), where=scales[:, k] > 0)
        np.clip(np.rint(part * inverse[:, None]), -127, 127, out=found[:, columns], casting="unsafe")
    return found.reshape(values.shape), scales


def _columns(groups: Sequence[int]) -> Iterator[slice]:
    start = 0
    for stop in groups:
        yield slice(start, stop)
        start = stop


# Files ----------------------------------------------------------------------------------------------------------------


def write_segment(
    file: Path,
    place: str,
    about: Mapping[str, Any],
    arrays: Mapping[str, np.ndarray],
    numbers: Mapping[str, np.ndarray],
    dtype: Stored,
    groups: Mapping[str, Sequence[int]] | None = None,
) -> str:
    """Write a file whole; its checksum. place: where it belongs. about: JSON values that say what is in it.

    arrays: kept as they are; numbers: stored as `dtype`. groups: of columns that have one scale each (see `to_int8`);
    by default all of a row. Errors: NotWritten.
    """
    stored: dict[str, np.ndarray] = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    named = {name: NAMES[array.dtype.name] for name, array in stored.items()}
    for name, values in numbers.items():
        if dtype == "int8":
            size = int(np.prod(values.shape[1:]))
            stored[name], stored[f"{name}.scale"] = to_int8(values, (groups or {}).get(name, [size]))
            named[f"{name}.scale"] = "F32"
        else:
            stored[name] = to_bfloat16(values) if dtype == "bfloat16" else np.ascontiguousarray(values, dtype)
        named[name] = NAMES[dtype]
    return write_arrays(file, place, about, stored, named)


def write_arrays(
    file: Path, place: str, about: Mapping[str, Any], stored: Mapping[str, np.ndarray], named: Mapping[str, str]
) -> str:
    """As `write_segment`, of arrays that are as they are to be stored; named: their dtypes as headers say them."""
    # Large items first: then each array begins at a multiple of its own item's size, without holes between.
    order = sorted(stored, key=lambda name: -stored[name].dtype.itemsize)
    entries, start = {}, 0
    for name in order:
        stop = start + stored[name].nbytes
        entries[name] = {"dtype": named[name], "shape": list(stored[name].shape), "data_offsets": [start, stop]}
        start = stop
    data = b"".join(stored[name].tobytes() for name in order)
    said = {"about": json.dumps(about), "belongs": digest(place.encode())}
    checksum = _checksum(said, entries, np.frombuffer(data, dtype=np.uint8))
    header = json.dumps({"__metadata__": {**said, "checksum": checksum}, **entries}).encode()
    header += b" " * (-(8 + len(header)) % ALIGNED)
    write_whole(file, len(header).to_bytes(8, "little") + header + data)
    return checksum


def _checksum(said: Mapping[str, str], entries: Mapping[str, Any], data: np.ndarray) -> str:
    pieces = (data[start : start + PIECE] for start in range(0, len(data), PIECE))
    # The compiled implementation takes an array as it is; the one in Python counts in integers of Python alone.
    compiled = google_crc32c.implementation == "c"
    codes = [google_crc32c.value(piece if compiled else piece.tobytes()) for piece in pieces]
    words = json.dumps([said, entries], sort_keys=True).encode()
    return digest(words, np.array(codes, dtype="<u4").tobytes())


_CHECKED: dict[str, tuple[int, ...]] = {}
"""Files whose checksum this process has compared: what their inode, size and time were then."""


@dataclass(frozen=True, eq=False)
class Segment:
    """A file of rows, open: nothing is read before it is asked for."""

    file: Path
    about: dict[str, Any]
    checksum: str
    belongs: str
    _entries: dict[str, Any]
    _data: np.ndarray
    _memory: mmap.mmap

    @classmethod
    def open(cls, file: Path, check: bool | None = None, remedy: str = REMEDY) -> Segment:
        """check: compare the checksum; None for once in a process. remedy: what to do, for the error.

        Errors: DamagedFile, naming the file.
        """
        try:
            state = os.stat(file)
            with open(file, "rb") as opened:
                # Copy on write: frameworks take arrays without a copy only if they may write; the file stays as it is.
                memory = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
            mapped = np.frombuffer(memory, dtype=np.uint8)
            length = int.from_bytes(mapped[:8].tobytes(), "little")
            if not 0 < length <= len(mapped) - 8:
                raise ValueError("its header is cut off")
            header = json.loads(mapped[8 : 8 + length].tobytes())
            said = dict(header.pop("__metadata__"))
            checksum, about, data = said.pop("checksum"), json.loads(said["about"]), mapped[8 + length :]
            if max((entry["data_offsets"][1] for entry in header.values()), default=0) != len(data):
                raise ValueError("it is cut off, or longer than it was")
            mark = (state.st_ino, state.st_size, state.st_mtime_ns)
            if check or (check is None and _CHECKED.get(str(file)) != mark):
                if _checksum(said, header, data) != checksum:
                    raise ValueError("its checksum is not that of its content")
                _CHECKED[str(file)] = mark
        except FileNotFoundError:
            raise DamagedFile(f"{file} is missing. {remedy}") from None
        # A damaged header may say anything; whatever comes of that is one error.
        except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
            raise DamagedFile(f"{file} is damaged: {error}. {remedy}") from error
        return cls(file, about, checksum, str(said["belongs"]), header, data, memory)

    def is_of(self, place: str) -> bool:
        return self.belongs == digest(place.encode())

    def will_be_read(self) -> None:
        """Tell the system, so that it reads ahead while something else is computed."""
        if os.name == "posix":
            self._memory.madvise(mmap.MADV_WILLNEED)

    @property
    def rows(self) -> int:
        return int(self.about["rows"])

    @property
    def nbytes(self) -> int:
        return len(self._data)

    @property
    def names(self) -> list[str]:
        return list(self._entries)

    def has(self, name: str) -> bool:
        return name in self._entries

    def raw(self, name: str) -> np.ndarray:
        """As it is stored, on the memory map: bfloat16 as its bits."""
        entry = self._entries[name]
        start, stop = entry["data_offsets"]
        return self._data[start:stop].view(KINDS[entry["dtype"]]).reshape(entry["shape"])

    def numbers(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """Some rows in float32, or float64: on the memory map itself, where they are stored so."""
        raw, kind = self.raw(name)[rows], self._entries[name]["dtype"]
        if kind == "BF16":
            return from_bfloat16(raw)
        if kind != "I8":
            return raw
        scales, groups = self.raw(f"{name}.scale")[rows], self.groups(name)
        flat = np.empty((len(raw), int(np.prod(raw.shape[1:]))), dtype=np.float32)
        whole = raw.reshape(flat.shape)
        for k, columns in enumerate(_columns(groups)):
            np.multiply(whole[:, columns], scales[:, k, None], out=flat[:, columns])
        return flat.reshape(raw.shape)

    def groups(self, name: str) -> list[int]:
        """Where groups of columns with one scale each end."""
        found: dict[str, list[int]] = self.about.get("groups", {})
        return found.get(name) or [int(np.prod(self._entries[name]["shape"][1:]))]

    def product(self, name: str, queries: np.ndarray, rows: slice = slice(None)) -> np.ndarray:
        """Dot products of rows of a matrix [n, D] with queries [D, q]: [n, q], of the queries' dtype.

        A matrix product on the memory map, a few rows after the other; bfloat16 and int8 are converted on the way.
        """
        warm_up_blas()
        entry = self._entries[name]
        first, last, _ = rows.indices(entry["shape"][0])
        found = np.empty((last - first, queries.shape[1]), dtype=queries.dtype)
        step = max(1, AT_ONCE // max(1, entry["shape"][1]))
        for start in range(first, last, step):
            few, out = slice(start, min(start + step, last)), slice(start - first, min(start + step, last) - first)
            if entry["dtype"] == "I8":
                found[out] = self._int8_product(name, queries, few)
            else:
                np.matmul(self.numbers(name, few), queries, out=found[out])
        return found

    def _int8_product(self, name: str, queries: np.ndarray, rows: slice) -> np.ndarray:
        """[n, q]. Scales are a row's: dot products are multiplied by them, which are fewer than the row's numbers."""
        whole, scales = self.raw(name)[rows].astype(np.float32), self.raw(f"{name}.scale")[rows]
        columns = list(_columns(self.groups(name)))
        found = (whole[:, columns[0]] @ queries[columns[0]]) * scales[:, :1]
        for k, part in enumerate(columns[1:], 1):
            found += (whole[:, part] @ queries[part]) * scales[:, k, None]
        return found

    @cached_property
    def ids(self) -> np.ndarray | None:
        """What the rows are called, [n]; None where they are called by their positions."""
        if self.has("ids"):
            return np.array(self.raw("ids"))
        if not self.has("ids.text"):
            return None
        text = self.raw("ids.text")
        return np.char.decode(np.ascontiguousarray(text).view(f"S{text.shape[1]}")[:, 0], "utf-8")

    def without(self, rows: Sequence[int], file: Path, place: str, added: Mapping[str, np.ndarray]) -> str:
        """Write another file, without some rows; its checksum. added: arrays of this one's rows that go with them."""
        kept = np.setdiff1d(np.arange(self.rows), np.asarray(rows, dtype=np.int64))
        arrays = {name: self.raw(name)[kept] for name in self._entries} | {n: a[kept] for n, a in added.items()}
        named = {name: entry["dtype"] for name, entry in self._entries.items()}
        named |= {name: NAMES[array.dtype.name] for name, array in added.items()}
        return write_arrays(file, place, {**self.about, "rows": len(kept)}, arrays, named)


@cache
def warm_up_blas() -> None:
    """One product that is wide enough, in 2 ms, once in a process: later ones with few columns are faster then.

    OpenBLAS copies what it multiplies into a buffer of its own. Where only narrow products were made, most pages of it
    were never written, and its kernels slow down: they seem to fetch ahead into these, and each miss walks the page
    tables. Measured with OpenBLAS 0.3.31 (Haswell kernels) on an AMD EPYC virtual machine, 2026-11-30: rows of 256
    numbers on 100 queries at 10 GFLOP/s before and 30 after, on 20 queries at 13 and 22.
    """
    np.zeros((64, 384), dtype=np.float32) @ np.zeros((384, 512), dtype=np.float32)


def packed_ids(ids: np.ndarray | None) -> dict[str, np.ndarray]:
    """Rows' ids as arrays of a segment: whole numbers as they are, all else as text."""
    if ids is None:
        return {}
    if ids.dtype.kind in "iu":
        return {"ids": ids.astype(np.int64 if ids.dtype.kind == "i" else np.uint64)}
    text = np.char.encode(ids.astype(str), "utf-8")
    width = max(1, text.dtype.itemsize)
    return {"ids.text": np.ascontiguousarray(text).view(np.uint8).reshape((len(ids), width))}
