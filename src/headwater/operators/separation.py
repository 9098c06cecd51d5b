"""The inverse spectrum of a damped Kronecker product, 1 / (x_a y_b + d), as a short sum of outer products.

1. With p_a = d / x_a it is 1 / (x_a (p_a + y_b)), a Cauchy matrix with scaled rows. Eliminating a pivot (x, y), as
   Gauss does, leaves a matrix of the same kind: the entry (a, b) times f(x_a) g(y_b), with
       f(x_a) = (x - x_a) / (x_a y + d),   g(y_b) = d (y_b - y) / (x y_b + d).
2. So after pivots (x_k, y_k) the *relative* error of entry (a, b) is prod_k f_k(x_a) g_k(y_b), without cancellation.
   Its maximum over all entries is max_a |prod_k f_k| max_b |prod_k g_k|: o + i numbers, never the matrix [o, i].
3. It is the error that scores need. With gradients g and h in the eigenbasis and |dS| <= e S, entry by entry,
       |sum dS g h| <= e sum S |g| |h| <= e sqrt(<S g, g> <S h, h>),
   so that no score is off by more than e times the geometric mean of the two rows' self-influences, whatever the rows.
4. A pivot with x y = d has |f g| <= 1 everywhere: what is left never grows, and the terms do not cancel. It need not
   be a pair of eigenvalues. A pivot on eigenvalues of both sides ends sooner, and is taken where it leaves less.

Source: Demmel 1999, SIAM J. Matrix Anal. Appl. 21(2), section 4 (1, 2); Beckermann and Townsend 2017, arXiv 1609.09494
(the number of terms grows with the logarithms of x_max y_max / d and of 1 / e).
"""

from __future__ import annotations

import numpy as np

SMALLEST, LARGEST = 1e-13, 1e-6
"""Of the errors that are asked for: rounding of float64, and what float32 cannot tell from rounding."""


def tolerated(eps: float) -> float:
    """The relative error at which a sum of outer products is taken for the spectrum, in this precision."""
    return max(SMALLEST, min(LARGEST, 8 * eps))


def separate_inverse(
    left: np.ndarray, right: np.ndarray, damping: float, error: float, most: int
) -> tuple[np.ndarray, np.ndarray, float] | None:
    """u [R, o], v [R, i] with sum_r u_ra v_rb near 1 / (left_a right_b + damping), and the largest relative error.

    left [o], right [i]: eigenvalues, damping > 0. None where more than `most` terms are needed for `error`.
    """
    x, y = left.astype(np.float64), right.astype(np.float64)
    f, g = np.ones_like(x), np.ones_like(y)
    u: list[np.ndarray] = []
    v: list[np.ndarray] = []
    while (left_over := float(abs(f).max() * abs(g).max())) > error:
        if len(u) >= most:
            return None
        pivots = _pivots(x, y, f, g, damping)
        steps = [(*_factors(x, y, pivot, damping), pivot) for pivot in pivots]
        by_f, by_g, (at_x, at_y) = min(steps, key=lambda s: float(abs(f * s[0]).max() * abs(g * s[1]).max()))
        u.append(f / (x * at_y + damping))
        v.append(g * (at_x * at_y + damping) / (at_x * y + damping))
        f, g = f * by_f, g * by_g
        # f in units of 1 / d, g of d: neither may leave what floats hold.
        scale = float(abs(f).max()) or 1.0
        f, g = f / scale, g * scale
    return np.array(u), np.array(v), left_over


def _factors(x: np.ndarray, y: np.ndarray, pivot: tuple[float, float], damping: float) -> tuple[np.ndarray, np.ndarray]:
    """f(x) and g(y) of step 1."""
    at_x, at_y = pivot
    return (at_x - x) / (x * at_y + damping), damping * (y - at_y) / (at_x * y + damping)


def _pivots(
    x: np.ndarray, y: np.ndarray, f: np.ndarray, g: np.ndarray, damping: float
) -> tuple[tuple[float, float], ...]:
    """Where the error is largest: on one side, with its partner on x y = d; on the other; and on both."""
    worst_x, worst_y = float(x[abs(f).argmax()]), float(y[abs(g).argmax()])
    return (
        (worst_x, _partner(worst_x, y, damping)),
        (_partner(worst_y, x, damping), worst_y),
        (worst_x, worst_y),
    )


def _partner(value: float, others: np.ndarray, damping: float) -> float:
    lowest, highest = float(others.min()), float(others.max())
    return min(max(damping / value, lowest), highest) if value > 0 else highest
