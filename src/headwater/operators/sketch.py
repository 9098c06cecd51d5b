"""Curvature through a few random vectors: its diagonal (Hutchinson), its low-rank part (Nystroem), its spectrum."""

from __future__ import annotations

import numpy as np

from headwater.arrays import Array, as_like, device, identity, itemsize, namespace, precise, transpose
from headwater.errors import IndefiniteCurvature
from headwater.memory import refuse_too_large
from headwater.operators.algebra import LinearOperator
from headwater.operators.finite import refuse_nonfinite
from headwater.operators.iterative import host, row_norms
from headwater.operators.krylov import KrylovSpace, orthonormal, principal
from headwater.operators.spectrum import Spectrum
from headwater.operators.structured import DiagonalOperator, EigenpairsOperator
from headwater.random import philox, row_normals

SIGNS_IN_BLOCK = 128
WHOLE = 256
"""Dimensions up to which a spectrum is computed whole, from as many products, and not estimated."""


def sign_vectors(count: int, size: int, like: Array, *, seed: int, stream: int, first: int = 0) -> Array:
    """Vectors of random signs [count, size], from a counter, which begins at `first`: any cut of them is the same."""
    blocks = -(-size // SIGNS_IN_BLOCK)
    counter = np.zeros((count, blocks, 4), dtype=np.uint64)
    # Philox by position: column block, vector, stream. So vector k is the same however many are drawn at once.
    counter[..., 0] = np.arange(blocks, dtype=np.uint64)
    counter[..., 1] = np.arange(first, first + count, dtype=np.uint64)[:, None]
    counter[..., 2] = stream
    words = philox(counter, (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF))
    # One bit, one sign: little-endian both ways, so that machines agree.
    bits = np.unpackbits(words.view(np.uint8).reshape(count, -1), axis=1, count=size, bitorder="little")
    return as_like(bits.astype(np.int8) * 2 - 1, like)


def normal_vectors(count: int, size: int, like: Array, *, seed: int) -> Array:
    """Vectors of normal random numbers [count, size], from a counter: where searches for eigenvectors begin.

    Signs would not do: an eigenvector with two equal entries and zeros is orthogonal to every second vector of signs.
    """
    return as_like(row_normals(np.arange(count), size, draw=0, seed=seed), like)


def refuse_vectors(what: str, count: int, size: int, copies: int, like: Array, remedy: str) -> None:
    """Errors: InvalidSetting where so many vectors of D numbers, and their copies, have no room in memory."""
    refuse_too_large(
        f"{what} from vectors", (count, size), copies * count * size * itemsize(like), remedy, device(like)
    )


def estimate_diagonal(operator: LinearOperator, like: Array, *, probes: int, seed: int) -> DiagonalOperator:
    """The mean of z * (A z) over random signs z, and zero where that is negative. Source: Bekas et al. 2007."""
    size = operator.input_size
    refuse_vectors("A diagonal", probes, size, 2, like, "Use another preconditioner, or smaller blocks.")
    vectors = sign_vectors(probes, size, like, seed=seed, stream=1)
    xp = namespace(vectors)
    diagonal = xp.mean(vectors * operator.apply(vectors), axis=0)
    # An estimate of a positive diagonal may come out negative; a preconditioner must not.
    return DiagonalOperator(xp.where(diagonal > 0, diagonal, xp.zeros_like(diagonal)))


def fit_nystroem(
    operator: LinearOperator, like: Array, *, rank: int, seed: int, shifted: bool = False
) -> EigenpairsOperator:
    """Y W^+ Y^T for Y = A S and W = S^T A S with random signs S [D, r]: U diag(values) U^T with orthonormal U.

    Signs that depend on each other, as in few dimensions they may, count once; with r = D nothing is left to chance.
    A small multiple of S S^T is added for the decomposition and taken off the eigenvalues again.
    shifted: where S^T A S has a negative eigenvalue -s, the sketch is that of A + 2 s, in Y and W alike (with s alone W
    would be singular where Y is not small), and 2 s is taken off its eigenvalues. None is left below -s: wherever the
    damped A is positive, so is the damped sketch, as a preconditioner must be.
    Errors: IndefiniteCurvature if S^T A S has a negative eigenvalue beyond rounding, unless `shifted`.
    Source: Frangella, Tropp and Udell 2023, arXiv 2110.02820, algorithm 2.1.
    """
    size = operator.input_size
    rank = min(rank, size)
    refuse_vectors("A Nystroem sketch", rank, size, 3, like, "Use a lower rank, or smaller blocks (blocks='layer').")
    xp = namespace(like)
    whole = rank == size
    # Signs are orthonormalised: the range is the same, and the core then has the condition of A, not of S.
    basis = identity(size, like) if whole else orthonormal(sign_vectors(rank, size, like, seed=seed, stream=2))
    image = operator.apply(basis)
    # In float64 where there is one: the step below divides by the root of small eigenvalues.
    core = refuse_nonfinite(precise(basis @ transpose(image)), "A product of the curvature")
    core = (core + transpose(core)) / 2
    met = _met(core, operator, float(xp.finfo(like.dtype).eps), shifted)
    # In Y and W alike: a core of A + 2 s beside products of A would belong to no matrix.
    if met:
        image, core = image + 2 * met * basis, core + 2 * met * identity(int(core.shape[0]), core)
    norm = float(np.linalg.norm(host(row_norms(image))))
    if norm == 0.0:
        return EigenpairsOperator(xp.zeros_like(core[0]), basis)
    # nu of algorithm 2.1: just above rounding of the products, so that Cholesky (here: eigh) is stable.
    shift = float(xp.finfo(like.dtype).eps) * size**0.5 * norm
    values, vectors = xp.linalg.eigh(core)
    values = xp.where(values > 0, values, xp.zeros_like(values)) + shift
    # B = Y C^-1: then B B^T is the Nystroem approximation, and its singular values give the spectrum.
    half = xp.astype(transpose(vectors / xp.sqrt(values)), like.dtype) @ (image + shift * basis)
    singular, left = principal(half)
    singular, left = precise(singular), precise(left)
    turn = left / xp.where(singular > 0, singular, xp.ones_like(singular))
    right = xp.astype(transpose(turn), like.dtype) @ half
    # The stabilising shift is taken off again; what was only shift becomes zero.
    spectrum = singular**2 - shift
    # With 2 met taken off, no eigenvalue ends below -met: as low as the core itself was.
    spectrum = xp.where(spectrum > met, spectrum, xp.ones_like(spectrum) * met) - 2 * met
    return EigenpairsOperator(spectrum, right)


def _met(core: Array, operator: LinearOperator, eps: float, shifted: bool) -> float:
    """How far below zero the core is, where a sketch may be shifted; else zero, or IndefiniteCurvature."""
    if shifted:
        return max(0.0, -float(namespace(core).linalg.eigvalsh(core)[0]))
    _refuse_indefinite(core, eps, operator)
    return 0.0


def _refuse_indefinite(core: Array, eps: float, operator: LinearOperator) -> None:
    # Rounding of a positive matrix leaves eigenvalues down to about -eps |A|; a hundred times that is curvature.
    values = namespace(core).linalg.eigvalsh(core)
    lowest, size = float(values[0]), float(namespace(values).max(namespace(values).abs(values)))
    if lowest < -1e2 * eps * size:
        raise IndefiniteCurvature(
            f"A Nystroem sketch needs curvature that is never negative; it has met {lowest:g} (largest {size:g}). "
            "Use curvature='ggn' or a Fisher, or Arnoldi for a Hessian."
        )


def estimate_spectra(operator: LinearOperator, like: Array, *, probes: int, steps: int, seed: int) -> list[Spectrum]:
    """A symmetric operator's spectrum, as each of some random vectors shows it: for traces of its functions.

    1. For random signs z, the mean of z^T f(A) z is tr f(A) (Hutchinson).
    2. In the Krylov space V of all z together, after `steps` powers, z^T f(A) z is nearly c^T f(T) c with T = V A V^T
       and c = V z: Gauss quadrature with nodes theta, the eigenvalues of T, and weights (c^T u)^2.
    3. So every z gives a `Spectrum` with values theta and counts (c^T u)^2, which sum to D; and means over z have a
       standard error. One space serves all functions, so all dampings.

    Up to `WHOLE` dimensions the answer is one exact spectrum. Costs: probes times steps products, and as many vectors
    in memory. Source: Ubaru, Chen and Saad 2017 (stochastic Lanczos quadrature).
    """
    size, xp = operator.input_size, namespace(like)
    eps = float(xp.finfo(like.dtype).eps)
    if size <= WHOLE:
        # No estimate where as many products give all of it.
        matrix = host(operator.apply(identity(size, like)))
        return [_as_spectrum(np.linalg.eigvalsh((matrix + matrix.T) / 2), np.ones(size), operator.psd, eps)]
    refuse_vectors("An estimate of the spectrum", probes * steps, size, 1, like, "Use fewer probes.")
    signs = sign_vectors(probes, size, like, seed=seed, stream=5)
    space = KrylovSpace(operator, signs)
    # Taken before the first step, when `next` spans just the signs.
    coordinates = host(signs @ transpose(space.next))
    for _ in range(steps):
        space.extend()
    values, vectors, _ = space.ritz()
    # Gauss weights: squared first components, times |z|^2 = D, which the coordinates have in them.
    weights = (coordinates @ vectors[: coordinates.shape[1]]) ** 2
    return [_as_spectrum(values, counts, operator.psd, eps) for counts in weights]


def _as_spectrum(values: np.ndarray, counts: np.ndarray, psd: bool, eps: float) -> Spectrum:
    # Below this a count of eigenvalues, or a rank, says nothing.
    rounding = len(values) * eps * float(np.abs(values).max())
    return Spectrum(values.clip(0.0) if psd else values, counts, rounding)
