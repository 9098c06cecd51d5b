"""A matrix of positive weights as a short sum of outer products, so that elementwise scaling keeps outer products.

Unweighted truncation is useless here: where curvature is small the inverse is large and varies most, but gradients
are small too. So the approximation is weighted by the curvature: errors are counted where gradients live.
"""

from __future__ import annotations

from headwater.arrays import Array, as_like, namespace, precise, transpose

SWEEPS = 15


def separate(target: Array, weights: Array, rank: int) -> tuple[Array, Array, float]:
    """u [R, o], v [R, i] with sum_r u_r v_r^T near `target` [o, i], and the relative error, both weighted by weights^2.

    Starts from a singular value decomposition weighted by the weights' marginals, then alternates least squares.
    """
    target, weights = precise(target), precise(weights)
    xp = namespace(target)
    largest = float(xp.max(weights))
    weights = (
        weights / largest if largest > 0 else xp.ones_like(weights)
    )  # without any curvature all errors count alike
    rank = min(int(rank), *target.shape)
    square = weights**2
    square = square / xp.max(square)
    # No weight is zero: the least-squares systems below stay regular.
    square = square + 1e-12
    # A rank-one stand-in for the weights: with it the weighted problem is an ordinary SVD.
    rows = xp.sqrt(xp.mean(square, axis=1))
    columns = xp.sqrt(xp.mean(square, axis=0))
    left, values, right = xp.linalg.svd(target * rows[:, None] * columns[None, :], full_matrices=False)
    u = transpose(left[:, :rank]) / rows[None, :]
    v = (values[:rank, None] * right[:rank]) / columns[None, :]
    for _ in range(SWEEPS):
        # Alternating least squares: with one side fixed, each row of the other is a small linear problem.
        u = _solve(v, target, square)
        v = _solve(u, transpose(target), transpose(square))
    residual = xp.sum(square * (target - transpose(u) @ v) ** 2) / xp.sum(square * target**2)
    return u, v, float(xp.sqrt(residual))


def _solve(fixed: Array, target: Array, square: Array) -> Array:
    """For each row of target [o, i], the weighted least-squares coefficients of fixed [R, i]: [R, o]."""
    xp, rank = namespace(target), int(fixed.shape[0])
    pairs = (fixed[:, None, :] * fixed[None, :, :]).reshape((rank * rank, -1))
    grams = (square @ transpose(pairs)).reshape((-1, rank, rank))
    trace = xp.sum(xp.linalg.diagonal(grams), axis=1)
    # Two terms may become parallel; a ridge at rounding level keeps the system solvable.
    ridge = (1e-12 * trace / rank)[:, None, None] * as_like(xp.eye(rank, dtype=target.dtype), target)
    sides = (square * target) @ transpose(fixed)
    return transpose(xp.linalg.solve(grams + ridge, sides[:, :, None])[:, :, 0])
