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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from numbers import Real

import numpy as np

from headwater.arrays import Array, accumulable, as_like, namespace, to_numpy, transpose, zeros_like
from headwater.errors import InvalidSetting
from headwater.gradients.algebra import Dense, Gradient
from headwater.gradients.block import BlockGradient
from headwater.gradients.outer import Outer
from headwater.mapper import Queries

FIRST = 16
"""Random vectors at first; twice as many each time they are too few."""
SPARE = 8
"""Random vectors beyond a rank that is given: the range is found the better for them."""
SMALLEST = 1e-5
"""The least error that can be asked for: float32 measures no smaller one."""


@dataclass(frozen=True)
class Shortening:
    """How short queries are kept. Errors: InvalidSetting."""

    error: float | None = None
    """Of a query's length, what may be lost; None for no bound."""
    rank: int | None = None
    """Outer products of a query's part, at most, whatever that loses; None for as many as the error takes."""

    def __post_init__(self) -> None:
        if self.error is not None and not (isinstance(self.error, Real) and SMALLEST <= self.error < 1):
            raise InvalidSetting(
                f"query_error is {self.error!r}; expected None, or a number from {SMALLEST:g} to below 1."
            )
        if self.rank is not None and (isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1):
            raise InvalidSetting(f"query_rank is {self.rank!r}; expected None, or a whole number of at least 1.")

    @classmethod
    def of(cls, error: float | None, rank: int | None) -> Shortening | None:
        """None where queries stay whole."""
        return None if error is None and rank is None else cls(error, rank)

    @property
    def widths(self) -> Iterator[int]:
        """Numbers of random vectors, one after the other, until the error is met."""
        last = None if self.rank is None else self.rank + SPARE
        width = FIRST if self.error is not None else last or FIRST
        while last is None or width < last:
            yield width
            width *= 2
        yield last

    def described(self) -> dict[str, float]:
        """As a run's identity has it."""
        found = {"query_error": self.error, "query_rank": self.rank}
        return {name: value for name, value in found.items() if value is not None}


def shorten(queries: Queries, how: Shortening) -> tuple[Queries, dict[str, float]]:
    """Queries as few outer products, and the largest relative length that one has lost, by block."""
    left: OrderedDict[str, BlockGradient] = OrderedDict()
    lost: dict[str, float] = {}
    for name, value in queries.left.items():
        parts, errors = zip(*(_short(part, how) for part in value.parts), strict=True)
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


def _short(part: Gradient, how: Shortening) -> tuple[Gradient, float]:
    """The part as it is kept, and the largest relative length that a row has lost."""
    o, i = part.shape
    enough = FIRST if how.rank is None else how.rank
    short = isinstance(part, Outer) and part.positions <= enough
    if not isinstance(part, (Outer, Dense)) or short or not part.rows or enough * (o + i) >= o * i:
        return part, 0.0
    pieces, lost = [], 0.0
    for _, rows in part.chunks(3 * o * i):
        found, off = _low_rank(accumulable(rows.dense()), how)
        if found is None:  # one that stays dense makes all dense: they meet as one
            return part, 0.0
        pieces.append(found)
        lost = max(lost, off)
    return _under(pieces), lost


def _low_rank(values: Array, how: Shortening) -> tuple[Outer | None, float]:
    """Of matrices [n, o, i]; None where one of them needs as many numbers as it has."""
    n, o, i = values.shape
    xp, waiting, lost = namespace(values), np.arange(n), 0.0
    found: list[tuple[np.ndarray, Outer]] = []
    for width in how.widths:
        if how.rank is None and width * (o + i) >= o * i:
            return None, 0.0
        some = values if len(waiting) == n else values[as_like(waiting, values, xp.int64)]
        last = how.rank is not None and width == how.rank + SPARE
        short, off = _at_width(some, min(width, o, i), how.error or 0.0, how.rank or width)
        done = (off <= (how.error or 0.0)) | last
        if done.any():
            found.append((waiting[done], short.take(as_like(np.flatnonzero(done), values, xp.int64))))
            lost = max(lost, float(off[done].max()))
        waiting = waiting[~done]
        if not len(waiting):
            break
    order = np.argsort(np.concatenate([rows for rows, _ in found]), kind="stable")
    return _under([short for _, short in found]).take(as_like(order, values, xp.int64)), lost


def _under(pieces: Sequence[Outer]) -> Outer:
    """Rows of several under one another."""
    xp, most = namespace(pieces[0].a), max(piece.positions for piece in pieces)
    a, b = (
        xp.concat([_padded(side, most) for side in sides], axis=0)
        for sides in ([piece.a for piece in pieces], [piece.b for piece in pieces])
    )
    return Outer(a, b)


def _at_width(values: Array, width: int, error: float, rank: int) -> tuple[Outer, np.ndarray]:
    """Each matrix as up to `rank` outer products, those that it does not need zero; and the relative length lost."""
    xp, (n, _, i) = namespace(values), values.shape
    start = as_like(np.random.default_rng(0).standard_normal((i, width)), values)
    seen = xp.linalg.qr(values @ start)[0]
    basis = xp.linalg.qr(values @ (transpose(values) @ seen))[0]
    rest = transpose(basis) @ values
    outside = _squares(values - basis @ rest)
    whole = np.maximum(_squares(values), np.finfo(np.float32).tiny)
    powers, turns = xp.linalg.eigh(rest @ transpose(rest))
    # Ascending: what the smallest hold is what is lost without them; [n, how many are dropped].
    tails = np.cumsum(np.concatenate([outside[:, None], to_numpy(powers).clip(0.0)], axis=1), axis=1)
    dropped = np.maximum(np.sum(np.sqrt(tails / whole[:, None]) <= error, axis=1) - 1, max(0, width - rank))
    # A matrix of zeros needs none; one stays, as arrays without positions meet nothing.
    dropped = np.minimum(dropped, width - 1)
    off = np.sqrt(tails[np.arange(n), dropped] / whole)
    first = int(dropped.min())
    kept = np.arange(width)[None, first:] >= dropped[:, None]
    turns = turns[:, :, first:] * as_like(kept.astype(np.float32), values)[:, None, :]
    return Outer(transpose(turns) @ rest, transpose(basis @ turns)), off


def _squares(values: Array) -> np.ndarray:
    return to_numpy(namespace(values).sum(values * values, axis=(1, 2))).astype(np.float64)
