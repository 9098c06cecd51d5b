"""The curvature of a model itself, for who asks for it: products, trace, ends of the spectrum, diagonal, matrix.

C is the mean over the train rows, each counted with its weight, of the Hessian of a row's loss, or of what stands for
it (GGN, Fisher); with the penalty of the training objective, where the provider knows one, over the same weight. It is
what every method of headwater inverts, or approximates, once damped. Blocks are taken by themselves: with several, C is
block-diagonal, and what is between blocks is left out. One block, blocks="full", leaves nothing out.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from headwater.arrays import (
    Array,
    as_like,
    identity,
    is_array,
    namespace,
    rows_within_memory,
    shape_of,
    transpose,
    zeros_like,
)
from headwater.curvature.exact import Curvature
from headwater.curvature.products import CurvatureOperator, DrawnRows, fit_products
from headwater.errors import BlockMismatch, InvalidSetting, NotConverged, RulesChanged, ShapeMismatch, StaleFit
from headwater.gradients.provider import Fisher, StructuredGradientProvider
from headwater.operators.algebra import LinearOperator, SumOperator
from headwater.operators.iterative import host
from headwater.operators.krylov import KrylovSpace
from headwater.operators.sketch import WHOLE, normal_vectors, refuse_vectors
from headwater.operators.structured import DiagonalOperator
from headwater.rows import Rows, Total
from headwater.settings import check_whole
from headwater.tables import shown, table
from headwater.types import split

LARGEST_MATRIX = 4096
"""Parameters up to which `dense` gives a matrix, and `diagonal` one that takes as many products."""


class Estimate(NamedTuple):
    """A number, and its standard error: zero where it is exact."""

    value: float
    error: float

    def __float__(self) -> float:
        return self.value


@dataclass(frozen=True, eq=False)
class SpectrumEnds:
    """The smallest and the largest eigenvalues of a symmetric matrix, each with a bound on how far off it is."""

    lowest: np.ndarray
    """Ascending: [k]."""
    highest: np.ndarray
    """Descending: [k]."""
    lowest_error: np.ndarray
    """|C u - theta u| of each: there is an eigenvalue this near to it. Zero where all of them were computed. [k]"""
    highest_error: np.ndarray
    lowest_vectors: Any = None
    """Eigenvectors of length one, [k, D]; None of several blocks together."""
    highest_vectors: Any = None

    def __str__(self) -> str:
        rows = [["", "eigenvalue", "off by at most"]]
        rows += [["highest", shown(v), f"{e:.1g}"] for v, e in zip(self.highest, self.highest_error, strict=True)]
        lowest = list(zip(self.lowest, self.lowest_error, strict=True))
        return table(rows + [["lowest", shown(v), f"{e:.1g}"] for v, e in reversed(lowest)])


class _Asked:
    """What a block and all blocks together answer."""

    size: int
    """D."""

    @property
    def shape(self) -> tuple[int, int]:
        return self.size, self.size

    def __matmul__(self, vectors: Any) -> Any:
        """C v for v [D], or C V for columns V [D, k], as matrices multiply."""
        shape = shape_of(vectors) or ()
        if len(shape) not in (1, 2) or shape[0] != self.size:
            raise ShapeMismatch(f"The curvature is {self.shape}, the right-hand side {tuple(shape)}.")
        return self._product(vectors) if len(shape) == 1 else transpose(self._product(transpose(vectors)))

    def _product(self, vectors: Any) -> Any:
        """Vectors along the trailing axis."""
        raise NotImplementedError


class BlockCurvature(_Asked):
    """The curvature of one block, [D, D], by products: each is a pass over the train rows for any number of vectors."""

    def __init__(self, whole: ModelCurvature, name: str, rows: CurvatureOperator, penalty: Array | None):
        self.name, self.size = name, rows.input_size
        self._whole, self._rows, self._penalty = whole, rows, penalty

    @property
    def operator(self) -> LinearOperator:
        """As the operators' algebra has it, to be added, scaled and inverted."""
        return self._rows if self._penalty is None else SumOperator(self._rows, DiagonalOperator(self._penalty))

    def apply(self, vectors: Any) -> Any:
        """C v for vectors along the trailing axis: (..., D) to (..., D). NumPy's become the framework's."""
        return self._whole.asked(lambda: self.operator.apply(self._taken(vectors)))

    def _product(self, vectors: Any) -> Any:
        return self.apply(vectors)

    def _taken(self, vectors: Any) -> Array:
        like = self._rows.like
        if is_array(vectors) and namespace(vectors) is namespace(like):
            return vectors
        return as_like(np.asarray(vectors), like)

    def trace(self) -> Estimate:
        """The sum of the eigenvalues: exact where gradients give it, or few products; else Hutchinson's estimate."""

        def found() -> Estimate:
            penalty = 0.0 if self._penalty is None else float(namespace(self._penalty).sum(self._penalty))
            return Estimate(self._rows.trace() + penalty, self._rows.trace_error)

        return self._whole.asked(found)

    def spectrum(self, k: int = 1, *, tolerance: float = 1e-4, products: int | None = None) -> SpectrumEnds:
        """The k smallest and the k largest eigenvalues, with their vectors.

        All of them from the matrix up to 256 parameters; beyond, block Lanczos from k random vectors, so that an
        eigenvalue that occurs several times is found as often, up to k times. tolerance: of |C u - theta u|, relative
        to the largest magnitude. products: at most so many, also held as vectors of D numbers; None for 100 + 20 k.
        Warns: NotConverged, where these were too few; the errors say how far each came.
        Source: Golub and Underwood 1977.
        """
        check_whole("k", k, 1)
        return self._whole.asked(lambda: self._ends(min(k, self.size), tolerance, products or 100 + 20 * k))

    def _ends(self, k: int, tolerance: float, products: int) -> SpectrumEnds:
        like = self._rows.like
        if self.size <= WHOLE:
            values, vectors = np.linalg.eigh(host(self._matrix()))
            none, ends = np.zeros(k), [as_like(rows, like) for rows in (vectors.T[:k], vectors.T[::-1][:k].copy())]
            return SpectrumEnds(values[:k], values[::-1][:k], none, none, *ends)
        limit = min(products, self.size)
        refuse_vectors("Ends of a spectrum", limit, self.size, 2, like, "Give a smaller products=, or smaller blocks.")
        space = KrylovSpace(self.operator, normal_vectors(k, self.size, like, seed=self._rows.source.seed))
        allowed = max(tolerance, 1e2 * float(namespace(like).finfo(like.dtype).eps))
        ends = np.r_[:k, -1 : -k - 1 : -1]
        while True:
            space.extend()
            values, turned, errors = space.ritz()
            enough = len(values) >= 2 * k
            converged = enough and bool((errors[ends] <= allowed * np.abs(values).max()).all())
            if converged or space.exhausted or space.products >= limit:
                break
        # An invariant space smaller than 2 k has every eigenvalue; then the two ends overlap.
        k = min(k, len(values))
        ends = np.r_[:k, -1 : -k - 1 : -1]
        if not (converged or space.exhausted):
            warnings.warn(
                NotConverged(
                    f"Block {self.name!r}: after {space.products} products an end of the spectrum is off by up to "
                    f"{errors[ends].max():.2g}. Give products= more than {limit}."
                ),
                stacklevel=4,
            )
        basis = space.combine(turned[:, ends].T)
        return SpectrumEnds(
            values[ends[:k]], values[ends[k:]], errors[ends[:k]], errors[ends[k:]], basis[:k], basis[k:]
        )

    def diagonal(self) -> Array:
        """[D]. From gradients in one pass, whatever the size, where C is a sum of g g^T; else from D products.

        Errors: InvalidSetting for a Hessian of more than 4096 parameters.
        """
        found = self._whole.asked(self._diagonal)
        return found if self._penalty is None else found + namespace(found).astype(self._penalty, found.dtype)

    def _diagonal(self) -> Array:
        source, kind = self._rows.source, self._rows.source.kind
        if kind != "hessian":
            total = source.sweep(Total(self._squares), with_draws=True)
            if source.has_draws:
                return total / source.weight
        self._refuse_large("diagonal", "Only of sums of gradients (kind='fisher', mostly 'ggn') it is had for less.")
        pieces = [namespace(rows).linalg.diagonal(rows, offset=start) for start, rows in self._products_of_units()]
        return namespace(pieces[0]).concat(pieces, axis=0)

    def _squares(self, rows: DrawnRows) -> Array:
        """What some rows add to the diagonal, [D]; zero where they have no gradients that C is a sum of."""
        total = zeros_like(self._rows.like, (self.size,))
        for draw in rows.draws or ():
            value = draw[self.name]
            if rows.weights is not None:
                value = value.weighted(namespace(rows.weights).astype(rows.weights**0.5, value.like.dtype))
            for flat in value.flat_chunks():
                total = total + namespace(flat).sum(flat * flat, axis=0)
        return total

    def dense(self) -> Array:
        """The matrix [D, D]. Errors: InvalidSetting for more than 4096 parameters."""
        self._refuse_large(
            "matrix", "Ask for products, the trace, the spectrum or the diagonal; or for smaller blocks."
        )
        return self._whole.asked(self._matrix)

    def _matrix(self) -> Array:
        pieces = [rows for _, rows in self._products_of_units()]
        found = namespace(pieces[0]).concat(pieces, axis=0)
        if self._penalty is not None:
            found = found + DiagonalOperator(self._penalty).dense(found)
        # Symmetric by definition, and by rounding not quite.
        return (found + transpose(found)) / 2

    def _products_of_units(self) -> Iterator[tuple[int, Array]]:
        """Rows of the matrix without the penalty, some at a time, and where they begin."""
        units = identity(self.size, self._rows.like)
        step = max(1, rows_within_memory(4 * self.size, units))
        for start in range(0, self.size, step):
            yield start, self._rows.apply(units[start : start + step])

    def _refuse_large(self, what: str, remedy: str) -> None:
        if self.size > LARGEST_MATRIX:
            raise InvalidSetting(
                f"Block {self.name!r} has {self.size} parameters: its {what} would take as many products, and up to "
                f"{LARGEST_MATRIX} are made. {remedy}"
            )

    def __repr__(self) -> str:
        return f"BlockCurvature({self.name!r}, {self._whole.kind}, {self.size} parameters)"


class ModelCurvature(_Asked, Mapping[str, BlockCurvature]):
    """The curvature of all blocks, side by side: a mapping from names to `BlockCurvature`, and [D, D] as a whole.

    kind: "hessian", "ggn", "fisher" or "empirical_fisher". fisher, seed: how the Fisher's labels are enumerated or
    drawn, as for hw.Direct(). penalty: with that of the training objective, where the provider knows one (scikit-learn
    estimators), as a diagonal. rows: the train rows, read once now and again for products. Nothing is damped.
    Errors of use: StaleFit if the model's weights have changed; BatchMismatch for a loader that gives other rows.
    """

    def __init__(
        self,
        provider: StructuredGradientProvider,
        rows: Rows,
        kind: Curvature = "ggn",
        *,
        fisher: Fisher = "auto",
        seed: int = 0,
        penalty: bool = True,
        progress: bool = False,
    ):
        self.kind, self.provider = kind, provider
        with provider.own_precision():
            while True:
                try:
                    found, self.weight = fit_products(provider, rows, kind, fisher=fisher, seed=seed, progress=progress)
                    break
                except RulesChanged:  # layer rules that turned out not to hold: fewer are left, so that this ends
                    continue
        self._state = self._seen()
        self._blocks = OrderedDict(
            (name, BlockCurvature(self, name, operator, provider.penalty(name, self.weight) if penalty else None))
            for name, operator in found.items()
        )
        self.size = sum(block.size for block in self._blocks.values())

    def __getitem__(self, name: str) -> BlockCurvature:
        if name not in self._blocks:
            raise BlockMismatch(f"There is no block {name!r}; the blocks are {list(self._blocks)}.")
        return self._blocks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._blocks)

    def __len__(self) -> int:
        return len(self._blocks)

    def __contains__(self, name: object) -> bool:
        return name in self._blocks

    def _seen(self) -> tuple[object, ...]:
        return self.provider.fingerprint(), self.provider.form

    def asked(self, answer: Callable[[], Any]) -> Any:
        """What a function of products gives, in the model's own precision. Errors: StaleFit."""
        if self._seen() != self._state:
            raise StaleFit("The model's weights have changed since its curvature was asked for. Ask anew.")
        with self.provider.own_precision():
            return answer()

    def apply(self, vectors: Any) -> Any:
        """C v: vectors (..., D), blocks side by side, or {block: (..., D_block)}; in the same form."""
        if isinstance(vectors, Mapping):
            if set(vectors) != set(self._blocks):
                raise BlockMismatch(f"The vectors have blocks {list(vectors)}, the curvature {list(self._blocks)}.")
            return OrderedDict((name, block.apply(vectors[name])) for name, block in self._blocks.items())
        pieces = split(vectors, {name: block.size for name, block in self._blocks.items()})
        found = [block.apply(pieces[name]) for name, block in self._blocks.items()]
        return found[0] if len(found) == 1 else namespace(*found).concat(found, axis=-1)

    def _product(self, vectors: Any) -> Any:
        return self.apply(vectors)

    def trace(self) -> Estimate:
        """The sum over blocks; their errors add up as those of independent estimates."""
        found = [block.trace() for block in self._blocks.values()]
        return Estimate(sum(e.value for e in found), sum(e.error**2 for e in found) ** 0.5)

    def spectrum(self, k: int = 1, *, tolerance: float = 1e-4, products: int | None = None) -> SpectrumEnds:
        """The ends of all blocks' spectra together, as `BlockCurvature.spectrum` has them of each."""
        found = [b.spectrum(k, tolerance=tolerance, products=products) for b in self._blocks.values()]
        if len(found) == 1:
            return found[0]
        lowest, highest = (np.concatenate([ends.lowest for ends in found]), np.concatenate([e.highest for e in found]))
        low, high = np.argsort(lowest, kind="stable")[:k], np.argsort(-highest, kind="stable")[:k]
        errors = [np.concatenate([e.lowest_error for e in found]), np.concatenate([e.highest_error for e in found])]
        return SpectrumEnds(lowest[low], highest[high], errors[0][low], errors[1][high])

    def diagonal(self) -> Array:
        """[D], blocks side by side."""
        found = [block.diagonal() for block in self._blocks.values()]
        return namespace(*found).concat(found, axis=0)

    def dense(self) -> Array:
        """The block-diagonal matrix [D, D]. Errors: InvalidSetting for more than 4096 parameters in all."""
        if self.size > LARGEST_MATRIX:
            raise InvalidSetting(
                f"The blocks have {self.size} parameters, and a matrix of up to {LARGEST_MATRIX} is made. Take a "
                f"block's own, by name: {list(self._blocks)[:5]}."
            )
        rows, start = [], 0
        for block in self._blocks.values():
            own = block.dense()
            # Zeros on both sides: arrays of some frameworks cannot be written to.
            beside = [zeros_like(own, (block.size, n)) for n in (start, self.size - start - block.size)]
            rows.append(namespace(own).concat([beside[0], own, beside[1]], axis=1))
            start += block.size
        return namespace(*rows).concat(rows, axis=0)

    def __repr__(self) -> str:
        blocks = ", ".join(f"{name!r}: {block.size}" for name, block in list(self._blocks.items())[:8])
        more = ", ..." if len(self) > 8 else ""
        return f"ModelCurvature({self.kind}, mean over rows of weight {self.weight:g}, {{{blocks}{more}}})"
