"""Queries that are kept as few outer products each, so that many of them fit into memory.

1. The part of a preconditioned query is a matrix M [o, i], o i numbers; r outer products are r (o + i).
2. Its range is found by random vectors, with one power of M M^T between: Q [o, p] orthonormal, B = Q^T M. What r of
   the singular vectors of B lose is |M - Q B|^2 and the squares of its singular values from the r-th on: nothing is
   subtracted, so that small errors are measured as well as large ones.
3. r is the least for which the lost length is at most `error` of the whole; p grows until there is one. Each query's
   own matrix decides, so that scores do not depend on which queries are asked together.
4. A part for which outer products would be no fewer numbers stays dense.

A score is then off by at most `error` times the length of the query's factor times that of the train row's gradient.
Source: Halko, Martinsson and Tropp 2011, SIAM Review 53(2), algorithms 4.3 and 4.4.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from headwater.arrays import Array, accumulable, as_like, namespace, to_numpy, transpose, zeros_like
from headwater.errors import InvalidSetting
from headwater.gradients.algebra import Dense, Gradient
from headwater.gradients.block import BlockGradient
from headwater.gradients.outer import Outer
from headwater.mapper import Queries

FIRST = 16
"""Random vectors at first; twice as many each time they are too few."""
SMALLEST = 1e-5
"""The least error that can be asked for: float32 measures no smaller one."""


def check_error(error: float | None) -> float | None:
    """Errors: InvalidSetting."""
    if error is not None and not SMALLEST <= error < 1:
        raise InvalidSetting(f"query_error is {error!r}; expected None, or a number from {SMALLEST:g} to below 1.")
    return error


def shorten(queries: Queries, error: float) -> tuple[Queries, dict[str, float]]:
    """Queries as few outer products as `error` allows, and the largest relative length that one has lost, by block."""
    left: OrderedDict[str, BlockGradient] = OrderedDict()
    lost: dict[str, float] = {}
    for name, value in queries.left.items():
        parts, errors = zip(*(_short(part, error) for part in value.parts), strict=True)
        left[name], lost[name] = replace(value, parts=parts), max(errors)
    return replace(queries, left=left), lost


def level(queries: Sequence[Queries]) -> list[Queries]:
    """The same, with as many outer products in each: positions of zeros are added where there are fewer."""
    levelled = [OrderedDict(found.left) for found in queries]
    for name, first in queries[0].left.items():
        values = [found.left[name] for found in queries]
        parts = [_level_parts([value.parts[k] for value in values]) for k in range(len(first.parts))]
        for n, value in enumerate(values):
            levelled[n][name] = replace(value, parts=tuple(found[n] for found in parts))
    return [replace(found, left=left) for found, left in zip(queries, levelled, strict=True)]


def _level_parts(parts: Sequence[Gradient]) -> list[Gradient]:
    outers = [part.bordered() for part in parts if isinstance(part, Outer)]
    if len(outers) < len(parts):
        return list(parts)
    most = max(part.positions for part in outers)
    return [Outer(_padded(part.a, most), _padded(part.b, most)) for part in outers]


def _padded(values: Array, positions: int) -> Array:
    n, t, size = values.shape
    return (
        values
        if t == positions
        else namespace(values).concat([values, zeros_like(values, (n, positions - t, size))], axis=1)
    )


def _short(part: Gradient, error: float) -> tuple[Gradient, float]:
    """The part as it is kept, and the largest relative length that a row has lost."""
    o, i = part.shape
    if not isinstance(part, (Outer, Dense)) or FIRST * (o + i) >= o * i or _is_short(part):
        return part, 0.0
    pieces, lost = [], 0.0
    for _, rows in part.chunks(3 * o * i):
        found, off = _low_rank(accumulable(rows.dense()), error)
        if found is None:  # one that stays dense makes all dense: they meet as one
            return part, 0.0
        pieces.append(found)
        lost = max(lost, off)
    if not pieces:
        return part, 0.0
    levelled, xp = _level_parts(pieces), namespace(pieces[0].a)
    outers = [piece for piece in levelled if isinstance(piece, Outer)]
    return Outer(xp.concat([p.a for p in outers], axis=0), xp.concat([p.b for p in outers], axis=0)), lost


def _is_short(part: Gradient) -> bool:
    return isinstance(part, Outer) and part.positions <= FIRST


def _low_rank(values: Array, error: float) -> tuple[Outer | None, float]:
    """Of matrices [n, o, i]; None where one of them needs as many numbers as it has."""
    n, o, i = values.shape
    width = FIRST
    waiting, lost = np.arange(n), 0.0
    found: list[tuple[np.ndarray, Outer]] = []
    while len(waiting):
        if width * (o + i) >= o * i:
            return None, 0.0
        some = values if len(waiting) == n else values[as_like(waiting, values, namespace(values).int64)]
        short, off = _at_width(some, width, error)
        done = off <= error
        if done.any():
            index = as_like(np.flatnonzero(done), values, namespace(values).int64)
            found.append((waiting[done], short.take(index)))
            lost = max(lost, float(off[done].max()))
        waiting, width = waiting[~done], 2 * width
    order = np.argsort(np.concatenate([rows for rows, _ in found]), kind="stable")
    most = max(short.positions for _, short in found)
    xp = namespace(values)
    index = as_like(order, values, xp.int64)
    a, b = (
        xp.concat([_padded(side, most) for side in sides], axis=0)
        for sides in zip(*((s.a, s.b) for _, s in found), strict=True)
    )
    return Outer(a[index], b[index]), lost


def _at_width(values: Array, width: int, error: float) -> tuple[Outer, np.ndarray]:
    """Each matrix as up to `width` outer products, those that it does not need zero; and the relative length lost."""
    xp, (n, _, i) = namespace(values), values.shape
    start = as_like(np.random.default_rng(0).standard_normal((i, width)), values)
    seen = xp.linalg.qr(values @ start)[0]
    basis = xp.linalg.qr(values @ (transpose(values) @ seen))[0]
    rest = transpose(basis) @ values
    outside = _squares(values - basis @ rest)
    whole = np.maximum(_squares(values), np.finfo(np.float32).tiny)
    powers, turns = xp.linalg.eigh(rest @ transpose(rest))
    # Ascending: what the smallest hold is what is lost without them.
    tails = np.cumsum(np.maximum(to_numpy(powers).astype(np.float64), 0.0), axis=1) + outside[:, None]
    dropped = np.sum(np.sqrt(tails / whole[:, None]) <= error, axis=1)
    off = np.sqrt(np.where(dropped > 0, tails[np.arange(n), np.maximum(dropped, 1) - 1], outside) / whole)
    kept = np.arange(width)[None, :] >= dropped[:, None]
    first = int(dropped.min()) if n else 0
    turns = (turns * as_like(kept.astype(np.float32), values)[:, None, :])[:, :, first:]
    return Outer(transpose(turns) @ rest, transpose(basis @ turns)), off


def _squares(values: Array) -> np.ndarray:
    return to_numpy(namespace(values).sum(values * values, axis=(1, 2))).astype(np.float64)
