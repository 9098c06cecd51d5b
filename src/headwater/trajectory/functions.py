"""A function of a symmetric operator times vectors, by Lanczos: f(A) v from products of A alone."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from headwater.arrays import Array, as_like, namespace, to_numpy

STEPS = 64
"""Products at most."""


def function_of(
    product: Callable[[Array], Array],
    vectors: Array,
    function: Callable[[np.ndarray], np.ndarray],
    steps: int = STEPS,
    tolerance: float = 1e-10,
) -> tuple[Array, float]:
    """f(A) v for each row of `vectors` [q, D]; and how much the last quarter of the products changed it, relative.

    f takes eigenvalues [...] to values. Basis vectors are orthogonalised against all before: [steps, q, D] numbers.
    """
    xp = namespace(vectors)
    size = vectors.shape[1]
    lengths = xp.sum(vectors * vectors, axis=1) ** 0.5
    safe = xp.where(lengths > 0, lengths, xp.ones_like(lengths))
    basis = [vectors / safe[:, None]]
    diagonal: list[np.ndarray] = []
    beside: list[np.ndarray] = []
    for _ in range(min(steps, size)):
        w = product(basis[-1])
        along = xp.sum(w * basis[-1], axis=1)
        # Twice is enough (Parlett): one pass leaves what rounding in the first put back.
        for _ in range(2):
            for b in basis:
                w = w - xp.sum(w * b, axis=1)[:, None] * b
        rest = xp.sum(w * w, axis=1) ** 0.5
        diagonal.append(to_numpy(along).astype(np.float64))
        beside.append(to_numpy(rest).astype(np.float64))
        scale = np.abs(np.stack(diagonal)).max(axis=0)
        done = beside[-1] <= tolerance * np.maximum(scale, np.finfo(np.float64).tiny)
        if done.all() or len(diagonal) == min(steps, size):
            break
        # A vector whose space is exhausted goes on with zeros, which change nothing.
        mask = as_like(np.where(done, 0.0, 1.0), vectors)
        basis.append(w * (mask / xp.where(rest > 0, rest, xp.ones_like(rest)))[:, None])
    weights = _first_columns(np.stack(diagonal), np.stack(beside), function)
    earlier = max(1, 3 * len(diagonal) // 4)
    before = _first_columns(np.stack(diagonal)[:earlier], np.stack(beside)[:earlier], function)
    padded = np.zeros_like(weights)
    padded[: len(before)] = before
    change = np.linalg.norm(weights - padded, axis=0) / np.maximum(np.linalg.norm(weights, axis=0), 1e-300)
    host = to_numpy(lengths).astype(np.float64)
    found = sum(as_like(weights[k] * host, vectors)[:, None] * b for k, b in enumerate(basis[: len(weights)]))
    exhausted = len(diagonal) < min(steps, size) or len(diagonal) == size
    return found, 0.0 if exhausted else float(change.max(initial=0.0))


def _first_columns(
    diagonal: np.ndarray, beside: np.ndarray, function: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """f(T) e_1 of each tridiagonal matrix; diagonal and beside are [m, q], the result too."""
    m, count = diagonal.shape
    found = np.zeros((m, count))
    for q in range(count):
        matrix = np.diag(diagonal[:, q]) + np.diag(beside[: m - 1, q], 1) + np.diag(beside[: m - 1, q], -1)
        values, vectors = np.linalg.eigh(matrix)
        found[:, q] = vectors @ (function(values) * vectors[0])
    return found
