"""Krylov spaces with full orthogonalisation: extreme eigenvalues, eigenpairs, and one space for all right-hand sides.

Layout: a basis is [m, D], orthonormal rows. A symmetric operator A is seen in it as T = V A V^T [m, m].
Sources: Lanczos 1950; Golub and Underwood 1977 (blocks); Saad 2011, "Numerical methods for large eigenvalue problems".
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol, Self

import numpy as np

from headwater.arrays import Array, add_product, as_like, namespace, precise, rows_within_memory, to_numpy, transpose
from headwater.operators.algebra import LinearOperator
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
    rows = rows / xp.where(norms > 0, norms, xp.ones_like(norms))[:, None]
    bases, smallest = False, 0.0
    for least in (1e2 * eps, 0.5):
        for basis in against:
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
    """Both ends of the spectrum by Lanczos from one vector [1, D]; stops when both have settled."""
    space = KrylovSpace(operator, start)
    for _ in range(steps):
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
        full[start:stop, : row.shape[1]] = row
        full[: row.shape[1], start:stop] = row.T
        start = stop
    return (full + full.T) / 2


class KrylovSpace:
    """span {S, A S, A^2 S, ...} for a block S of start vectors [k, D], grown one power at a time."""

    def __init__(self, operator: LinearOperator, start: Array):
        self.operator = operator
        self.blocks: list[Array] = []
        self.next = orthonormal(start)
        self.products = 0
        self._rows: list[np.ndarray] = []
        self._coupling = np.zeros((0, 0))

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
        image = self.operator.apply(block)
        self.products += int(block.shape[0])
        self._rows.append(np.concatenate([host(image @ transpose(b)) for b in self.blocks], axis=1))
        self.next = orthonormal(image, self.blocks)
        self._coupling = host(image @ transpose(self.next))

    def restart(self, start: Array) -> None:
        """Go on from other vectors, where the space is exhausted: an eigenvalue shows once for each start vector."""
        self.next = orthonormal(start, self.blocks)

    def projected(self) -> np.ndarray:
        """T = V A V^T, float64 [m, m]."""
        return mirrored(self._rows)

    def ritz(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Eigenvalues of T ascending [m], eigenvectors in columns [m, m], and |A u - theta u| of each [m]."""
        values, vectors = np.linalg.eigh(self.projected())
        last = self._rows[-1].shape[0]
        return values, vectors, np.linalg.norm(self._coupling.T @ vectors[-last:], axis=0)

    def combine(self, coefficients: np.ndarray) -> Array:
        """Linear combinations of the basis, coefficients [k, m]: [k, D]."""
        total, start = None, 0
        for block in self.blocks:
            stop = start + int(block.shape[0])
            piece = as_like(coefficients[:, start:stop], block) @ block
            total, start = (piece if total is None else total + piece), stop
        return total


def leading_eigenpairs(
    operator: LinearOperator, start: Array, rank: int, *, tolerance: float, max_products: int
) -> EigenpairsOperator:
    """The `rank` eigenpairs that are largest in magnitude, by block Lanczos with full reorthogonalisation.

    start [b, D]. Stops when |A u - theta u| of all of them is at most tolerance times the largest magnitude, or after
    max_products (then the last pairs are only as good as the space). A space that is exhausted is begun again from
    other vectors until that shows no further copies of an eigenvalue; else at most b copies of each are found.
    """
    space, seen, restarts = KrylovSpace(operator, start), None, 0
    eps = float(namespace(start).finfo(start.dtype).eps)
    while not space.exhausted and (space.products < max_products or not space.products):
        space.extend()
        values, _, errors = space.ritz()
        kept, scale = _leading(values, rank), np.abs(values).max()
        if errors.max() <= 1e3 * eps * scale and space.size < operator.input_size:  # invariant, but for rounding
            found = np.pad(values[kept], (0, rank - len(kept)))
            if seen is not None and np.abs(np.abs(found) - np.abs(seen)).max() <= tolerance * scale:
                break
            seen, restarts = found, restarts + 1
            space.restart(
                as_like(row_normals(np.arange(len(start)), operator.input_size, draw=restarts, seed=0), start)
            )
        elif seen is None and len(values) >= min(rank, operator.input_size) and errors[kept].max() <= tolerance * scale:
            break
    values, vectors, _ = space.ritz()
    chosen = np.sort(_leading(values, rank))
    basis = space.combine(vectors[:, chosen].T)
    return EigenpairsOperator(precise(as_like(values[chosen], basis)), basis)


def _leading(values: np.ndarray, rank: int) -> np.ndarray:
    """Where the values of largest magnitude are, the largest first."""
    return np.argsort(-np.abs(values), kind="stable")[:rank]


def steepness(
    operator: LinearOperator, damping: float, inverse: LinearOperator, start: Array, steps: int = 10
) -> float:
    """A little above the largest eigenvalue of inverse (operator + damping), by power iteration from [1, D]."""
    x, found = start, 0.0
    for _ in range(steps):
        image = inverse.apply(operator.apply(x) + x * damping)
        size = host(row_norms(x))[0]
        found = max(found, float(host(row_norms(image))[0] / size)) if size else found
        x = image / row_norms(image)[:, None]
    return 1.1 * found
