"""Gradient values as arrays of a segment, and back.

A block's parts are kept as they are, or cut down:

    kind      arrays                                    the row's matrix [o, i]
    outer     a [n, t, i], b [n, t, o]                  sum over t of b_t a_t^T; `ones`: with a further input 1;
              kept [n, t], where not all positions      which of them count in means over positions
              are the row's own
    dense     columns of "flat" [n, all dense parts]    itself
    table     ids [n, t], values [n, t, d]              rows of a table: an embedding's
    sum       the terms'                                their sum

All dense parts of all blocks lie side by side in one matrix, so that a scan of a tile is one matrix product. A row that
was cut to rank c by its singular values is a sum of c outer products.
"""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np

from headwater.arrays import Array, as_like, namespace, to_numpy, transpose
from headwater.blocks import Layout
from headwater.errors import InvalidSetting, NonFiniteValue
from headwater.gradients.algebra import Dense, Gradient, Sum
from headwater.gradients.block import BlockGradient
from headwater.gradients.outer import Outer, RowSparse
from headwater.gradients.provider import BlockGradients
from headwater.operators.algebra import LinearOperator
from headwater.operators.projection import ProjectedGradient
from headwater.settings import check_word
from headwater.store.segments import Segment

Form = Literal["auto", "outer", "dense", "low_rank", "projected"]
VERSION = 1
"""Of what is said of parts."""
FLAT = "flat"
"""The matrix of all dense parts."""


@dataclass(frozen=True)
class Packing:
    """How rows are kept. Errors: InvalidSetting for a form that means nothing, and a rank without need, or none."""

    form: Form = "auto"
    rank: int | None = None
    operators: Mapping[str, LinearOperator] = field(default_factory=dict)
    """By block, where rows are projected: those that say what is stored of rows; else empty."""
    number: Literal["float32", "float64"] = "float32"
    """What numbers are before they are stored, in this dtype or rounded further."""

    def __post_init__(self) -> None:
        check_word("form", self.form, get_args(Form))
        if (self.form == "low_rank") != (self.rank is not None):
            need = "form='low_rank' needs rank=" if self.rank is None else "rank= is for form='low_rank'"
            raise InvalidSetting(f"form is {self.form!r} and rank is {self.rank!r}: {need}.")
        if self.rank is not None and (isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1):
            raise InvalidSetting(f"rank is {self.rank!r}; expected a whole number of at least 1.")

    def of(self, grads: BlockGradients) -> Packed:
        """Errors: NonFiniteValue for what the dtype does not hold, naming the row."""
        first = next(iter(grads.values()))
        found = Packed(first.rows, {}, {}, number=self.number)
        lost: Any = 0.0
        size: Any = 0.0
        for number, (name, value) in enumerate(grads.items()):
            value = self.operators[name].stored(value) if self.operators else value
            parts = []
            for k, part in enumerate(value.parts):
                kept, gap, whole = self._cut(part)
                lost, size = lost + gap, size + whole
                said = found.add(f"{number}.{k}", kept)
                parts.append(said if kept is part or said["kind"] != "dense" else {**said, "mixed": True})
            found.blocks[name] = parts
        if self.rank is not None:
            lost, size = np.broadcast_to(lost, first.rows), np.broadcast_to(size, first.rows)
            error = np.sqrt(np.divide(lost, size, out=np.zeros(first.rows), where=size > 0))
            found.arrays["error"] = error.astype(np.float32)
        return found

    def _cut(self, part: Gradient) -> tuple[Gradient, Any, Any]:
        """The part as it is kept; of each row the squared length that is lost by that, and its whole one."""
        if self.form == "dense":
            return Dense(part.dense()), 0.0, 0.0
        if self.rank is not None and isinstance(part, (Outer, Dense)):
            return low_rank(part, self.rank)
        if self.rank is not None:  # a table's row, and a sum that has one, are short as they are
            return part, 0.0, to_numpy(part.quadratic()).astype(np.float64)
        if self.form in ("auto", "projected") and isinstance(part, Outer):
            o, i = part.shape
            if part.positions * (int(part.a.shape[2]) + o) >= o * i:
                return Dense(part.dense()), 0.0, 0.0
        return part, 0.0, 0.0


def low_rank(part: Gradient, rank: int) -> tuple[Gradient, np.ndarray, np.ndarray]:
    """Each row's matrix at its best approximation of this rank, as `rank` outer products; what is lost, and the whole:
    squared lengths [n], in float64.

    Of a sum of t outer products, t below o and i, the singular values are those of a matrix [t, t] between the
    orthonormal bases of its factors. Source: Eckart and Young 1936.
    """
    t = part.positions if isinstance(part, Outer) else None
    whole = to_numpy(part.quadratic()).astype(np.float64)
    if min(part.shape if t is None else (t, *part.shape)) <= rank:
        return part, np.zeros(part.rows), whole
    xp = namespace(part.arrays[0])
    if isinstance(part, Outer) and part.positions < min(part.shape):
        full = part.bordered()
        (qa, ra), (qb, rb) = (xp.linalg.qr(transpose(factor)) for factor in (full.a, full.b))
        u, s, v = xp.linalg.svd(rb @ transpose(ra), full_matrices=False)
        u, v = qb @ u, v @ transpose(qa)
    else:
        u, s, v = xp.linalg.svd(part.dense(), full_matrices=False)
    lost = (to_numpy(s[:, rank:]).astype(np.float64) ** 2).sum(axis=1)
    return Outer(v[:, :rank], transpose(u[:, :, :rank] * s[:, None, :rank])), lost, whole


# To the host ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Packed:
    """Some rows on the host."""

    rows: int
    blocks: dict[str, list[dict[str, Any]]]
    """By block, what each part is, and the names of its arrays."""
    numbers: dict[str, np.ndarray]
    """Rows first."""
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    """What is no floating-point number of a gradient: ids, keys, weights."""
    number: str = "float32"
    """Of the numbers."""

    def add(self, name: str, part: Gradient) -> dict[str, Any]:
        """Errors: NonFiniteValue."""
        if isinstance(part, Outer):
            self._put(f"{name}.a", part.a)
            self._put(f"{name}.b", part.b)
            self._put_kept(name, part.kept)
            return {"kind": "outer", "name": name, "ones": part.ones}
        if isinstance(part, RowSparse):
            self._put(f"{name}.values", part.values)
            self.arrays[f"{name}.ids"] = to_numpy(part.ids).astype(np.int64)
            self._put_kept(name, part.kept)
            return {"kind": "table", "name": name, "size": part.size}
        if isinstance(part, Sum):
            return {"kind": "sum", "terms": [self.add(f"{name}.{k}", term) for k, term in enumerate(part.terms)]}
        self._put(name, part.dense())
        return {"kind": "dense", "name": name, "shape": list(part.shape)}

    def _put_kept(self, name: str, kept: Array | None) -> None:
        if kept is not None:
            self.arrays[f"{name}.kept"] = to_numpy(kept).astype(np.uint8)

    def _put(self, name: str, array: Array) -> None:
        with np.errstate(over="ignore"):
            found = to_numpy(array).astype(self.number, copy=False)
        if not np.isfinite(found).all():
            row = int(np.argwhere(~np.isfinite(found))[0][0])
            raise NonFiniteValue(f"The gradient is not finite in {self.number}, and cannot be kept.", [row])
        self.numbers[name] = found

    @property
    def bytes_per_row(self) -> float:
        """In float32."""
        total = sum(array.nbytes for array in (*self.numbers.values(), *self.arrays.values()))
        return total / max(1, self.rows)


def joined(pieces: Sequence[Packed]) -> tuple[dict[str, Any], dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Pieces under one another: what is said of them, their arrays, and their numbers.

    Pieces with fewer positions get some of length zero; where a part has several kinds, it is made dense.
    """
    numbers: dict[str, np.ndarray] = {}
    arrays: dict[str, np.ndarray] = {}
    flat: list[np.ndarray] = []
    blocks = {}
    for name, first in pieces[0].blocks.items():
        found = [[piece.blocks[name][k] for piece in pieces] for k in range(len(first))]
        blocks[name] = [_joined_part(parts, pieces, numbers, arrays, flat) for parts in found]
    named = {name for piece in pieces for name in piece.arrays}
    for name in named - set(arrays) - {n for n in named if n.endswith((".ids", ".kept")) and n[0].isdigit()}:
        arrays[name] = np.concatenate([piece.arrays[name] for piece in pieces])
    about = {"version": VERSION, "rows": sum(piece.rows for piece in pieces), "blocks": blocks}
    if flat:
        numbers[FLAT] = flat[0] if len(flat) == 1 else np.concatenate(flat, axis=1)
        about["groups"] = {FLAT: np.cumsum([part.shape[1] for part in flat]).tolist()}
    return about, arrays, numbers


def _joined_part(
    parts: Sequence[dict[str, Any]],
    pieces: Sequence[Packed],
    numbers: dict[str, np.ndarray],
    arrays: dict[str, np.ndarray],
    flat: list[np.ndarray],
) -> dict[str, Any]:
    first = parts[0]
    same = all(part["kind"] == first["kind"] and part.get("ones") == first.get("ones") for part in parts)
    name = first.get("name", "")
    if same and first["kind"] == "outer":
        for side in "ab":
            numbers[f"{name}.{side}"] = _under(f"{name}.{side}", [piece.numbers for piece in pieces])
        _join_kept(name, f"{name}.a", pieces, arrays)
        return first
    if same and first["kind"] == "table":
        numbers[f"{name}.values"] = _under(f"{name}.values", [piece.numbers for piece in pieces])
        arrays[f"{name}.ids"] = _under(f"{name}.ids", [piece.arrays for piece in pieces])
        _join_kept(name, f"{name}.values", pieces, arrays)
        return first
    if same and first["kind"] == "sum" and len({len(part["terms"]) for part in parts}) == 1:
        terms = [[part["terms"][k] for part in parts] for k in range(len(first["terms"]))]
        return {"kind": "sum", "terms": [_joined_part(term, pieces, numbers, arrays, flat) for term in terms]}
    # What a fit of layers' inputs would miss, where some of the rows had them.
    mixed = {"mixed": True} if any(part["kind"] != "dense" or part.get("mixed") for part in parts) else {}
    dense = [_host_dense(part, piece) for part, piece in zip(parts, pieces, strict=True)]
    start, shape = sum(part.shape[1] for part in flat), list(dense[0].shape[1:])
    flat.append(np.concatenate([part.reshape((len(part), -1)) for part in dense]))
    return {"kind": "dense", "columns": [start, start + math.prod(shape)], "shape": shape, **mixed}


def _join_kept(name: str, like: str, pieces: Sequence[Packed], arrays: dict[str, np.ndarray]) -> None:
    """Which positions count: not those that some pieces have more than others."""
    sizes = [piece.numbers[like].shape[:2] for piece in pieces]
    each = [piece.arrays.get(f"{name}.kept") for piece in pieces]
    if len({positions for _, positions in sizes}) > 1 or any(kept is not None for kept in each):
        there = [np.ones(size, np.uint8) if kept is None else kept for kept, size in zip(each, sizes, strict=True)]
        arrays[f"{name}.kept"] = _under(f"{name}.kept", [{f"{name}.kept": kept} for kept in there])


def _under(name: str, pieces: Sequence[Mapping[str, np.ndarray]]) -> np.ndarray:
    """[n, t, ...] each: under one another, with zeros at the positions that some have not."""
    positions = max(piece[name].shape[1] for piece in pieces)
    padded = [
        np.pad(piece[name], [(0, 0), (0, positions - piece[name].shape[1])] + [(0, 0)] * (piece[name].ndim - 2))
        for piece in pieces
    ]
    return padded[0] if len(padded) == 1 else np.concatenate(padded)


def _host_dense(part: Mapping[str, Any], piece: Packed) -> np.ndarray:
    """[n, o, i]."""
    if part["kind"] == "dense":
        return piece.numbers[part["name"]]
    return np.asarray(_value(part, lambda name: piece.numbers[name], piece.arrays.get).dense())


# From a segment -------------------------------------------------------------------------------------------------------


def _value(part: Mapping[str, Any], numbers: Any, integers: Any) -> Gradient:
    """What was kept of a part. numbers and integers: from an array's name to it; integers: to None if there is none."""
    kind, name = part["kind"], part.get("name", "")
    if kind == "outer":
        return Outer(numbers(f"{name}.a"), numbers(f"{name}.b"), part["ones"], integers(f"{name}.kept"))
    if kind == "table":
        ids, values = integers(f"{name}.ids"), numbers(f"{name}.values")
        return RowSparse(ids, values, part["size"], integers(f"{name}.kept"))
    if kind == "sum":
        return Sum(tuple(_value(term, numbers, integers) for term in part["terms"]))
    start, stop = part["columns"]
    flat = numbers(FLAT)
    return Dense(flat[:, start:stop].reshape((int(flat.shape[0]), *part["shape"])))


def unpacked(
    segment: Segment, layouts: Mapping[str, tuple[Layout, bool]], like: Array, rows: slice = slice(None)
) -> BlockGradients:
    """The rows of a segment as values of the model's framework. layouts: by block, and whether it is projected."""
    taken: dict[str, Array] = {}

    def numbers(name: str) -> Array:
        if name not in taken:  # the matrix of all dense parts is read once
            taken[name] = as_like(segment.numbers(name, rows), like)
        return taken[name]

    def integers(name: str) -> Array | None:
        return as_like(segment.raw(name)[rows], like, namespace(like).int64) if segment.has(name) else None

    found: BlockGradients = OrderedDict()
    for name, (layout, projected) in layouts.items():
        parts = tuple(_value(part, numbers, integers) for part in segment.about["blocks"][name])
        found[name] = ProjectedGradient(layout, parts) if projected else BlockGradient(layout, parts)
    return found


def is_flat(segment: Segment) -> bool:
    """Whether all of the rows is in the one matrix."""
    return all(part["kind"] == "dense" for parts in segment.about["blocks"].values() for part in parts)


def has_layers(segment: Segment) -> bool:
    """Whether every part is what the model's layers gave: inputs and output-gradients, where they gave these."""
    # Of files without a version nobody noted which parts were made matrices.
    parts = [part for parts in segment.about["blocks"].values() for part in parts]
    return "version" in segment.about and not any(map(_has_mixed, parts))


def _has_mixed(part: Mapping[str, Any]) -> bool:
    return bool(part.get("mixed")) or any(map(_has_mixed, part.get("terms", ())))


def described(about: Mapping[str, Any]) -> np.ndarray:
    """JSON as an array, as parts of passes are."""
    return np.array(json.dumps(about))
