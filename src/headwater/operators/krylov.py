"""Krylov spaces with full orthogonalisation: extreme eigenvalues, eigenpairs, and one space for all right-hand sides.

Layout: a basis is [m, D], orthonormal rows. A symmetric operator A is seen in it as T = V A V^T [m, m].
Sources: Lanczos 1950; Golub and Underwood 1977 (blocks); Saad 2011, "Numerical methods for large eigenvalue problems".
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol, Self

import numpy as np

from headwater.arrays import Array, add_product, as_like, namespace, precise, rows_within_memory, to_numpy, transpose
from headwater.errors import NotConverged
from headwater.operators.algebra import LinearOperator
from headwater.operators.finite import refuse_nonfinite
from headwater.operators.iterative import host, row_norms
from headwater.operators.structured import EigenpairsOperator
from headwater.random import row_normals


def orthonormal(rows: Array, against: Iterable[Array] = ()) -> Array:
    """An orthonormal basis [m, D] of what rows [k, D] add to the span of orthonormal bases `against`; m may be below k.

    Directions below 100 eps of the rows' own size are dropped. Rounding that the division by small singular values has
    blown up is mended by a second pass: twice is enough.
    """
    xp = namespace(rows)
    eps = float(xp.finfo(rows.dtype).eps)
    norms = row_norms(rows)
    # Length one first, so that "100 eps of the rows' own size" is an absolute bound below.
    rows = rows / xp.where(norms > 0, norms, xp.ones_like(norms))[:, None]
    bases, smallest = False, 0.0
    # Values come from a Gram matrix, which squares the condition; after the first pass all that is kept is near 1, so
    # that the second loses nothing, and can be strict.
    for least in (1e2 * eps, 0.5):
        for basis in against:
            # Block by block (modified Gram-Schmidt): it loses fewer digits than one projection on the whole basis.
            rows, bases = rows - (rows @ transpose(basis)) @ basis, True
        if not int(rows.shape[0]):
            break
        values, vectors = principal(rows)
        kept = host(values) > least
        if not kept.any():
            return rows[:0]
        index = as_like(np.flatnonzero(kept), rows, dtype=xp.int64)
        smallest = float(host(values)[kept].min())
        turn = xp.take(vectors, index, axis=1) / xp.take(values, index, axis=0)
        rows = xp.astype(transpose(turn), rows.dtype) @ rows
        # Well conditioned and nothing to be orthogonal to: the second pass would change no digit that counts.
        if smallest > 0.05 and not bases:
            break
    return rows


def principal(rows: Array) -> tuple[Array, Array]:
    """Singular values [k] and left singular vectors [k, k] of rows [k, D], smaller than D or not."""
    xp = namespace(rows)
    if str(rows.dtype).endswith("64"):
        left, values, _ = xp.linalg.svd(
            transpose(xp.linalg.qr(transpose(rows), mode="reduced")[1]), full_matrices=False
        )
        return values, left
    gram, step = None, rows_within_memory(2 * int(rows.shape[0]), rows)
    for start in range(0, int(rows.shape[1]), step):
        gram = add_product(gram, *[precise(transpose(rows[:, start : start + step]))] * 2)
    values, vectors = xp.linalg.eigh(gram)
    return xp.sqrt(xp.where(values > 0, values, xp.zeros_like(values))), vectors


@dataclass(frozen=True)
class Bounds:
    """The ends of a symmetric operator's spectrum, as far as some products show them."""

    lowest: float
    """The smallest Ritz value: no eigenvalue bound from below, but one from above on the smallest."""
    highest: float
    lowest_error: float
    """There is an eigenvalue this near to `lowest`; zero where the space was exhausted."""
    highest_error: float
    products: int


def extreme_eigenvalues(operator: LinearOperator, start: Array, steps: int = 60, tolerance: float = 1e-2) -> Bounds:
    """Both ends of the spectrum by Lanczos from one vector [1, D]; stops when both have converged."""
    with operator.repeated():
        return _extremes(KrylovSpace(operator, start), steps, tolerance)


def _extremes(space: KrylovSpace, steps: int, tolerance: float) -> Bounds:
    for _ in range(steps):
        # One vector's chain: the ends of a spectrum converge first (Saad 2011, chapter 6), so a few dozen steps do.
        space.extend()
        values, _, errors = space.ritz()
        scale = max(abs(values[0]), abs(values[-1]))
        if space.exhausted or max(errors[0], errors[-1]) <= tolerance * scale:
            break
    return Bounds(float(values[0]), float(values[-1]), float(errors[0]), float(errors[-1]), space.products)


class Basis(Protocol):
    """Where the blocks of a basis are kept, in order: a list, or a `BasisOnDisk`."""

    def append(self, block: Array, /) -> None: ...

    def __iter__(self) -> Iterator[Array]: ...


class BasisOnDisk:
    """Blocks of a basis in a folder that is removed at the end of its context; each is read when it is needed."""

    def __init__(self, like: Array, folder: str | None = None):
        self.like = like
        self._folder = TemporaryDirectory(prefix="headwater-basis-", dir=folder)
        self._count = 0

    def append(self, block: Array) -> None:
        np.save(self._file(self._count), to_numpy(block))
        self._count += 1

    def __iter__(self) -> Iterator[Array]:
        for k in range(self._count):
            yield as_like(np.load(self._file(k)), self.like)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *reason: object) -> None:
        self._folder.cleanup()

    def _file(self, k: int) -> Path:
        return Path(self._folder.name) / f"{k}.npy"


def mirrored(rows: list[np.ndarray]) -> np.ndarray:
    """A symmetric matrix from its lower block triangle, one array [new, all so far] for each block."""
    size = rows[-1].shape[1] if rows else 0
    full, start = np.zeros((size, size)), 0
    for row in rows:
        stop = start + row.shape[0]
        # Row k holds products with all blocks up to k: the lower triangle. The upper one is its transpose.
        full[start:stop, : row.shape[1]] = row
        full[: row.shape[1], start:stop] = row.T
        start = stop
    # The diagonal blocks come from one product each and are symmetric only within rounding.
    return (full + full.T) / 2


class KrylovSpace:
    """span {S, A S, A^2 S, ...} for a block S of start vectors [k, D], grown one power at a time.

    `restart` and `join` bring in other start vectors: the space is then the sum of several chains.
    """

    def __init__(self, operator: LinearOperator, start: Array):
        self.operator = operator
        self.blocks: list[Array] = []
        self.next = orthonormal(start)
        self.products = 0
        self._rows: list[np.ndarray] = []
        self._coupling = np.zeros((0, 0))
        self._left: list[_Left] = []

    @property
    def size(self) -> int:
        return sum(int(block.shape[0]) for block in self.blocks)

    @property
    def exhausted(self) -> bool:
        """Whether the space is invariant: another power adds nothing."""
        return int(self.next.shape[0]) == 0

    def extend(self) -> None:
        """One more power: as many products as the next block has vectors."""
        block = self.next
        if self.exhausted:
            return
        self.blocks.append(block)
        # What a chain left outside may be taken up by later blocks; its error bound then shrinks.
        self._left = [left.without(block) for left in self._left]
        image = self.operator.apply(block)
        self.products += int(block.shape[0])
        row = np.concatenate([host(image @ transpose(b)) for b in self.blocks], axis=1)
        self._rows.append(refuse_nonfinite(row, "A product of the curvature"))
        self.next = orthonormal(image, self.blocks)
        # How far A V reaches out of the space: the residuals of Ritz pairs follow from this alone, without a product.
        self._coupling = host(image @ transpose(self.next))

    def restart(self, start: Array) -> None:
        """Leave the chain as it is, and begin another: an eigenvalue shows once for each start vector."""
        # An exhausted chain leaves no residue: its error stays zero.
        if not self.exhausted:
            size = self.size
            rows = slice(size - self._rows[-1].shape[0], size)
            self._left.append(_Left(rows, self._coupling, self.next))
        self._coupling = self._coupling[:, :0]
        self.next = orthonormal(start, self.blocks)

    def join(self, start: Array) -> None:
        """Go on with the chain, and with other vectors beside it."""
        # The fresh vectors are no image of the last block, so that its coupling with them is zero.
        fresh = orthonormal(start, [*self.blocks, self.next])
        self._coupling = np.pad(self._coupling, ((0, 0), (0, int(fresh.shape[0]))))
        self.next = namespace(fresh).concat([self.next, fresh], axis=0)

    def projected(self) -> np.ndarray:
        """T = V A V^T, float64 [m, m]."""
        return mirrored(self._rows)

    def ritz(self, first: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Eigenvalues of T ascending [m], eigenvectors in columns [m, m], and |A u - theta u| of each [m].

        first: of the part of the basis that begins there, as if A were projected off the rest. The norms are exact for
        one chain, and bounds from above for several.
        """
        values, vectors = np.linalg.eigh(self.projected()[first:, first:])
        last = self._rows[-1].shape[0]
        # |A u - theta u| = |B^T s|, s the last block's part of the eigenvector of T (Saad 2011, chapter 6).
        errors = np.linalg.norm(self._coupling.T @ vectors[-last:], axis=0)
        # Beside a projected-off part (first > 0) only the newest chain lives.
        for left in self._left if first == 0 else ():
            errors = errors + left.errors(vectors)
        return values, vectors, errors

    def combine(self, coefficients: np.ndarray) -> Array:
        """Linear combinations of the basis, coefficients [k, m]: [k, D]."""
        total: Any = None
        start = 0
        for block in self.blocks:
            stop = start + int(block.shape[0])
            piece = as_like(coefficients[:, start:stop], block) @ block
            total, start = (piece if total is None else total + piece), stop
        return total


@dataclass(frozen=True, eq=False)
class _Left:
    """Where a chain was left: images of its last block reach out of the space along `beyond`."""

    rows: slice
    """Of the last block, in the basis."""
    coupling: np.ndarray
    beyond: Array
    """What later blocks have not taken up of it: [k, D]."""

    def without(self, block: Array) -> _Left:
        return replace(self, beyond=self.beyond - (self.beyond @ transpose(block)) @ block)

    def errors(self, vectors: np.ndarray) -> np.ndarray:
        """What this adds to |A u - theta u|, for u in columns [m, m]."""
        gram, along = host(self.beyond @ transpose(self.beyond)), self.coupling.T @ vectors[self.rows]
        return np.sqrt(np.clip(np.sum(along * (gram @ along), axis=0), 0.0, None))


ALIKE = 3e-3
"""Relative gap up to which eigenvalues count as copies of one another."""
OVERLOOKED = 1e-3
"""The probability with which a look beside the space may miss what it looks for."""


def leading_eigenpairs(
    operator: LinearOperator, start: Array, rank: int, *, tolerance: float, max_products: int, label: str = ""
) -> EigenpairsOperator:
    """The `rank` eigenpairs that are largest in magnitude, by block Lanczos with full reorthogonalisation.

    start [b, D], normal random numbers. Settled: |A u - theta u| of all pairs is at most tolerance times the largest
    magnitude. After max_products a warning (`NotConverged`) says what has not converged, or may have been missed.

    1. The space of b start vectors holds b copies of an eigenvalue at most, however often it occurs. So when all pairs
       have converged and none of them comes b times, no copy is missing, and nothing more is done.
    2. Else one more vector looks beside the space: Lanczos on A, projected off the space, until it meets an eigenvalue
       that belongs to the leading ones, or has all but surely no such eigenvalue before it (`_overlooked`).
    3. Where it meets one, it goes on together with b more vectors, until all pairs have converged again; then step 2.
    """
    with operator.repeated():
        return _search_leading(KrylovSpace(operator, start), start, rank, tolerance, max_products, label)


def _search_leading(
    space: KrylovSpace, start: Array, rank: int, tolerance: float, max_products: int, label: str
) -> EigenpairsOperator:
    """`leading_eigenpairs`, in a space of the start vectors."""
    # Before the first step, `next` is the start vectors' own basis: their coordinates in it count copies later.
    coordinates = host(start @ transpose(space.next))
    search = _Search(space, rank, tolerance, max(max_products, 1), float(namespace(start).finfo(start.dtype).eps))
    chains = 0
    while search.goes_on:
        space.extend()
        search.look()
        if not search.converged:
            continue
        if not chains and not search.may_lack_copies(coordinates):
            search.complete = True
            break
        chains += 1
        # One vector looks; the b others join only if it finds something, as each costs a product at every step.
        fresh = as_like(row_normals(np.arange(len(start) + 1), space.operator.input_size, draw=chains, seed=0), start)
        if not search.finds_more(fresh[:1]):
            break
        space.join(fresh[1:])
    search.warn(label)
    values, vectors, _ = space.ritz()
    # Ascending, as eigh gives them; the rank largest in magnitude.
    chosen = np.sort(_leading(values, rank))
    basis = space.combine(vectors[:, chosen].T)
    return EigenpairsOperator(precise(as_like(values[chosen], basis)), basis)


def _leading(values: np.ndarray, rank: int) -> np.ndarray:
    """Where the values of largest magnitude are, the largest first."""
    return np.argsort(-np.abs(values), kind="stable")[:rank]


class _Search:
    """How far a search for the leading eigenpairs has come."""

    def __init__(self, space: KrylovSpace, rank: int, tolerance: float, limit: int, eps: float):
        self.space, self.size, self.limit = space, space.operator.input_size, limit
        self.rank = min(rank, self.size)
        self.share = max(tolerance, 1e3 * eps)
        self.tolerance, self.eps = tolerance, eps
        self.complete = False
        """Whether nothing that belongs to the leading ones is left out, as far as can be told."""

    @property
    def goes_on(self) -> bool:
        return not self.space.exhausted and (self.space.products < self.limit or not self.space.products)

    def look(self) -> None:
        """At the Ritz pairs."""
        self.values, self.vectors, self.errors = self.space.ritz()
        self.kept = _leading(self.values, self.rank)
        self.scale = float(np.abs(self.values).max())
        self.unconverged = int((self.errors[self.kept] > self.tolerance * self.scale).sum())
        # A basis of the whole space: T is A in other coordinates, and nothing can be missing.
        whole = self.space.size >= self.size
        invariant = self.errors.max() <= 1e3 * self.eps * self.scale  # but for rounding
        enough = len(self.values) >= self.rank and not self.unconverged
        self.converged = whole or bool(invariant) or enough
        self.complete = whole

    @property
    def floor(self) -> float:
        """The magnitude above which an eigenvalue belongs to the leading ones; within the tolerance."""
        least = float(np.abs(self.values[self.kept]).min()) if len(self.values) >= self.rank else 0.0
        return least + self.share * self.scale

    def may_lack_copies(self, coordinates: np.ndarray) -> bool:
        """Whether some leading eigenvalue comes as often as there are start vectors, or is likely to come more often.

        coordinates [b, b] of the start vectors in the first block. Over eigenvalues that the tolerance cannot tell
        apart, the squares of the start vectors' coordinates sum to b times their true number on average, and not to b
        times the number found: they see the copies that the space lacks, too.
        """
        width = coordinates.shape[1]
        # How much of the start vectors lies along each Ritz vector: about 1 for one copy, 2 for two, ...
        weights = np.sum((coordinates @ self.vectors[:width]) ** 2, axis=0) / len(coordinates)
        kept = np.sort(self.kept[np.abs(self.values[self.kept]) > self.floor])
        values, weights = self.values[kept], weights[kept]
        for k in range(len(values) - width + 1):
            # b copies were found, as many as b vectors can show: there may be more.
            if values[k + width - 1] - values[k] <= ALIKE * np.abs(values[k : k + width]).max():
                return True
            # A cluster that the tolerance cannot resolve may hide copies between its members.
            near = np.flatnonzero((values >= values[k]) & (values <= values[k] + 2 * self.share * self.scale))
            # Three standard deviations of a chi-squared sum: more weight than so many eigenvalues carry by chance.
            dense = weights[near].sum() - len(near) > 3 * (2 * len(near) / len(coordinates)) ** 0.5
            if len(near) >= width and dense:
                return True
        return False

    def finds_more(self, start: Array) -> bool:
        """Whether there is an eigenvalue beside the space that belongs to the leading ones. start [1, D]."""
        space, floor = self.space, self.floor
        space.restart(start)
        first, rest = space.size, self.size - space.size
        while self.goes_on:
            space.extend()
            values, _, errors = space.ritz(first)
            # Ritz values of A off the space only grow, so that the first above the floor settles it.
            top = int(np.abs(values).argmax())
            found = float(np.abs(values[top]))
            if found > floor:
                return True
            missed = _overlooked(found, floor, len(values), rest, space.operator.psd)
            if missed <= OVERLOOKED or errors[top] <= self.tolerance * self.scale:
                self.complete = True
                return False
        self.complete = space.exhausted
        return False

    def warn(self, label: str) -> None:
        if self.converged and self.complete:
            return
        what = (
            f"{self.unconverged} of {self.rank} leading eigenpairs have not converged"
            if not self.converged
            else "some of the leading eigenvalues come several times, and copies may be missing"
        )
        warnings.warn(
            f"Block {label!r}: after {self.space.products} products {what}. "
            f"Allow more (max_products={2 * self.limit}), or take a lower rank.",
            NotConverged,
            stacklevel=3,
        )


def _overlooked(found: float, floor: float, steps: int, size: int, psd: bool) -> float:
    """The probability that Lanczos, from one random vector, has met nothing above `found` where `floor` is exceeded.

    For the largest eigenvalue of a matrix that is never negative: at most 1.648 sqrt(D) exp(-sqrt(e) (2 k - 1)) to be
    off by more than the share e of itself after k steps; of the whole spread, for others.
    Source: Kuczynski and Wozniakowski 1992, theorem 4.2.
    """
    # The theorem speaks of an error relative to the largest eigenvalue; an indefinite matrix is shifted by its spread.
    share = (1.0 - found / floor) / (1.0 if psd else 2.0)
    return float(1.648 * max(size, 1) ** 0.5 * np.exp(-(share**0.5) * (2 * steps - 1)))


def steepness(
    operator: LinearOperator, damping: float, inverse: LinearOperator, start: Array, steps: int = 10
) -> float:
    """A little above the largest eigenvalue of inverse (operator + damping), by power iteration from [1, D]."""
    x, found = start, 0.0
    for _ in range(steps):
        # Power iteration on P (C + damping): not symmetric, but similar to a symmetric matrix, so that its spectrum is
        # real.
        image = inverse.apply(operator.apply(x) + x * damping)
        size = host(row_norms(x))[0]
        found = max(found, float(host(row_norms(image))[0] / size)) if size else found
        x = image / row_norms(image)[:, None]
    # A norm ratio approaches the largest eigenvalue from below; a tenth covers what ten steps leave.
    return 1.1 * found
