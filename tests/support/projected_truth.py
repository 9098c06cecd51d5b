"""What the scores of the projected methods ought to be: projection matrices number by number, dense, in NumPy.

A block's projection is one matrix [K, D] over its flat vector. Only the random streams are headwater's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import oracle
import torch
from truth import Structure, Truth

from headwater.methods.projected import FactGrass, LoGra, LoRif, Trak
from headwater.random import normals, signs, words

Method = Trak | LoGra | FactGrass


def shared_by(output_rows: int) -> int:
    """How many projected numbers share a sign, in these tests: the models here are too small for `mixing` itself."""
    return 3 if output_rows >= 4 else 1


def negative_margin(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    p = output.softmax(-1)[0, int(target[0])]
    return -(p / (1 - p)).log()


class ProjectedTruth(Truth):
    """Scores of the projected methods by their formulas."""

    @cached_property
    def margins(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Gradients of minus the margin of queries and of train rows, and the train rows' 1 - p."""
        case, found = self.case, []
        for x, y in ((case.x_query, case.y_query), (case.x, case.y)):
            found.append(oracle.per_sample_grads(case.model, negative_margin, x, y, self.names))
        with torch.no_grad():
            logits = [oracle.call(case.model, oracle.row(case.x, k))[0] for k in range(len(case.y))]
        doubt = [1 - float(row.softmax(-1)[int(y)]) for row, y in zip(logits, case.y, strict=True)]
        return found[0], found[1], np.array(doubt)

    @cached_property
    def doubted_mixed(self) -> np.ndarray:
        """The derivative by the input of (1 - p) times the gradient of minus the margin: [n, *x_shape, D]."""
        case, out = self.case, []
        leaves = oracle.parameters(case.model, self.names)
        for k in range(len(case.y)):
            point = case.x[k : k + 1].clone().requires_grad_()
            margin = negative_margin(oracle.call(case.model, point), case.y[k : k + 1])
            g = torch.sigmoid(margin) * oracle.gradient(margin, leaves, create_graph=True)
            columns = [
                torch.autograd.grad(v, point, retain_graph=True, allow_unused=True, materialize_grads=True)[0][0]
                for v in g
            ]
            out.append(torch.stack(columns, dim=-1).numpy())
        return np.stack(out)

    # Projections of one block

    def matrix_of(self, method: Method, names: Sequence[str]) -> tuple[np.ndarray, list[tuple[int, int]]]:
        """P [K, D] of a block, and the shapes of its small parts."""
        key = ("P", method, tuple(names))
        if key not in self._cache:
            if isinstance(method, Trak) and method.dimension is None:
                self._cache[key] = (np.eye(len(self.index(names))), [])
            elif isinstance(method, Trak):
                self._cache[key] = (self._random(method, names), [(1, method.dimension)])
            else:
                self._cache[key] = self._sided(method, names)
        return self._cache[key]

    def _random(self, method: Trak, names: Sequence[str]) -> np.ndarray:
        shapes = {n: tuple(p.shape) for n, p in self.case.model.named_parameters()}
        columns = []
        for name in names:
            size, o = math.prod(shapes[name]), shapes[name][0]
            m = 1 if method.projection == "dense" else shared_by(o)
            rows = []
            for j in range(method.dimension):
                row = signs(name, range(j // m, j // m + 1), range(size), seed=method.seed)[0].astype(float)
                if m > 1:
                    owner = name.rpartition(".")[0] or "root"
                    other = signs(f"{owner} mixed", range(j % m, j % m + 1), range(o), seed=method.seed)[0]
                    row = row * np.repeat(other.astype(float), size // o)
                rows.append(row)
            columns.append(np.stack(rows))
        return np.concatenate(columns, axis=1) / math.sqrt(method.dimension)

    def _sided(self, method: LoGra | FactGrass, names: Sequence[str]) -> tuple[np.ndarray, list[tuple[int, int]]]:
        size = len(self.index(names))
        rows, shapes = [], []
        for key, (_, index) in oracle._places(self.case.model, names).items():
            left, right = self._sides(method, key, index, names)
            small = np.zeros((len(left) * len(right), size))
            small[:, index.ravel()] = np.kron(left, right)
            rows.append(small)
            shapes.append((len(left), len(right)))
        return np.concatenate(rows), shapes

    def _sides(self, method: Any, key: str, index: np.ndarray, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        streams = self._streams(key, index)
        sizes = (method.dimension,) * 2 if isinstance(method.dimension, int) else method.dimension
        if isinstance(method, FactGrass):
            masks = (method.mask,) * 2 if not isinstance(method.mask, tuple) else method.mask
            return tuple(_sketch(s, k, m, method.seed) for s, k, m in zip(streams, sizes, masks, strict=True))  # type: ignore[return-value]
        drawn = [_gaussian(s, k, method.seed) for s, k in zip(streams, sizes, strict=True)]
        if method.init == "random":
            return drawn[0], drawn[1]
        part = self._kronecker_part(method, index, names)
        found = [leading(side, k, d) for side, k, d in zip((part.left, part.right), sizes, drawn, strict=True)]
        return found[0], found[1]

    def _kronecker_part(self, method: LoGra, index: np.ndarray, names: Sequence[str]) -> Any:
        key = ("kronecker", method.fisher, tuple(names))
        if key not in self._cache:
            pseudo = self.pseudo(method.fisher, seed=method.seed)
            case = self.case
            self._cache[key] = oracle.kronecker_parts(
                case.model, case.loss, case.x, pseudo, names, self.weights, tied_table=True
            )
        return next(part for part in self._cache[key] if np.array_equal(part.index, index))

    def _streams(self, key: str, index: np.ndarray) -> tuple[list[tuple[str, range]], list[tuple[str, range]]]:
        """Of rows and of columns: a weight [o, i], its bias as a last column, or as further rows of a column."""
        name, _, group = key.partition("#")
        shape = tuple(dict(self.case.model.named_parameters())[name].shape)
        owner, bias = name.rpartition(".")[0] or "root", f"{name[:-6]}bias"
        o, i = index.shape
        width = math.prod(shape[1:])
        first = int(group or 0) * o
        if i == width + 1 and (width > 1 or len(shape) > 1):
            columns = [(f"{name} columns", range(width)), (f"{bias} columns", range(1))]
        else:
            columns = [(f"{name} columns", range(i))]
        if i == 1 and o == 2 * shape[0] and len(shape) == 1:
            return [(f"{owner} rows", range(shape[0])), (f"{bias} rows", range(shape[0]))], columns
        return [(f"{owner} rows", range(first, first + o))], columns

    # Scores

    def stored(self, method: Method, names: Sequence[str], grads: np.ndarray) -> np.ndarray:
        """What is kept of rows: [n, K]."""
        matrix, shapes = self.matrix_of(method, names)
        small = grads @ matrix.T
        if not isinstance(method, LoRif):
            return small
        cut, start = [], 0
        for o, i in shapes:
            piece = small[:, start : start + o * i].reshape(-1, o, i)
            cut.append(np.stack([_best_of_rank(g, method.rank) for g in piece]).reshape(len(small), -1))
            start += o * i
        return np.concatenate(cut, axis=1)

    def core(self, method: Method, names: Sequence[str]) -> np.ndarray:
        """The second moment that is inverted: [K, K]."""
        key = ("core", method, tuple(names))
        if key not in self._cache:
            index, weights = self.index(names), self.weights
            weights = np.ones(len(self.case.y)) if weights is None else weights
            if isinstance(method, Trak):
                draws = [(self.margins[1] if method.output == "margin" else self.train_grads, np.ones(len(weights)))]
            elif method.fisher == "empirical":
                draws = [(self.train_grads, np.ones(len(weights)))]
            else:
                case, second = self.case, (1,) if method.init == "pca" else (0,)
                draws = [
                    (oracle.per_sample_grads(case.model, case.loss, case.x, target, self.names), w)
                    for target, w in self.pseudo(method.fisher, second, method.seed)
                ]
            total = 0.0
            for grads, w in draws:
                phi = self.stored(method, names, grads[:, index])
                total = total + phi.T @ ((w * weights)[:, None] * phi)
            core = total / weights.sum()
            if isinstance(method, LoRif) and method.kept is not None and method.kept < len(core):
                values, vectors = np.linalg.eigh(core)
                top = vectors[:, -method.kept :]
                core = (top * values[-method.kept :]) @ top.T
            self._cache[key] = core
        return self._cache[key]

    def damping_of(self, method: Method, structure: Structure, factor: float) -> dict[str, float]:
        """`factor` times the mean of the K eigenvalues of each block's core."""
        blocks = oracle.block_names(self.case.model, structure).items()
        return {
            block: factor * float(np.trace(c)) / len(c) for block, names in blocks for c in [self.core(method, names)]
        }

    def projected_scores(
        self, method: Method, structure: Structure, damping: dict[str, float], mixed: bool = False
    ) -> tuple[dict[str, np.ndarray], float]:
        """By block: [q, n] or [q, n, *x_shape]; and the worst condition number."""
        found, condition = {}, 1.0
        margin = isinstance(method, Trak) and method.output == "margin"
        query = self.margins[0] if margin else self.query_grads
        for block, names in oracle.block_names(self.case.model, structure).items():
            index = self.index(names)
            core = self.core(method, names)
            damped = core + damping[block] * np.eye(len(core))
            factors = np.linalg.solve(damped, self.stored(method, names, query[:, index]).T).T
            if mixed:
                train = (self.doubted_mixed if margin else self.mixed)[..., index]
                found[block] = oracle.contract(factors @ self.matrix_of(method, names)[0], train)
            else:
                train = self.margins[1] if margin else self.train_grads
                scores = factors @ self.stored(method, names, train[:, index]).T
                found[block] = scores * self.margins[2] if margin else scores
            condition = max(condition, float(np.linalg.cond(damped)))
        return found, condition


def _best_of_rank(matrix: np.ndarray, rank: int) -> np.ndarray:
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    return sum((s[k] * np.outer(u[:, k], v[k]) for k in range(min(rank, len(s)))), np.zeros(matrix.shape))


def _gaussian(streams: list[tuple[str, range]], size: int, seed: int) -> np.ndarray:
    total = sum(len(r) for _, r in streams)
    if size >= total:
        return np.eye(total)
    numbers = [normals(name, range(c, c + 1), size, seed=seed)[0] for name, r in streams for c in r]
    return np.stack(numbers, axis=1) / math.sqrt(size)


def _sketch(streams: list[tuple[str, range]], size: int, mask: int | None, seed: int) -> np.ndarray:
    """Coordinates in the order of a random number, the first `mask` of them kept; each to a place, with a sign."""
    drawn = [[int(w) for w in words(name, range(c, c + 1), seed=seed)[0]] for name, r in streams for c in r]
    total = len(drawn)
    kept = sorted(range(total), key=lambda c: drawn[c][2] * 2**32 + drawn[c][3])[: total if mask is None else mask]
    scale = math.sqrt(total / len(kept))
    side = np.zeros((min(size, len(kept)), total))
    for place, c in enumerate(sorted(kept)):
        if size >= len(kept):
            side[place, c] = scale
        else:
            side[drawn[c][0] * size // 2**32, c] = scale * (1 if drawn[c][1] % 2 else -1)
    return side


def leading(side: np.ndarray, size: int, drawn: np.ndarray) -> np.ndarray:
    """The leading eigenvectors, in rows; axes for a diagonal matrix; what was drawn for a multiple of the identity."""
    if size >= len(side):
        return np.eye(len(side))
    if np.array_equal(side, np.diag(np.diag(side))):
        if np.ptp(np.diag(side)) == 0:
            return drawn
        return np.eye(len(side))[np.argsort(-np.diag(side), kind="stable")[:size]]
    return np.linalg.eigh(side)[1][:, ::-1].T[:size]
