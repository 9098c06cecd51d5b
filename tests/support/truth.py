"""What the scores of a case ought to be: the oracle's matrices, put together by the formula of each method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache, cached_property
from typing import Any

import numpy as np
import oracle
import torch
from models import CASES, Case

import headwater as hw
from headwater.methods.base import Method
from headwater.methods.iterative import ProductMethod
from headwater.methods.stochastic import SteppedMethod
from headwater.operators.sketch import sign_vectors
from headwater.random import row_uniforms
from headwater.torch import TorchBatch, TorchComposableInfluence

EPS = float(np.finfo(np.float64).eps)
CUT = 1e-6
"""Singular values of a root below this share of the largest are zeros: their squares are below 1e-12."""
Structure = str | Mapping[str, Sequence[str]]


def assert_close(got: Any, expected: Any, condition: float = 1.0, slack: float = 0.0) -> None:
    """Every entry, to rounding: a solve at condition number c is good to about c eps of the largest entry.

    slack: what an iteration that stopped before may be off besides.
    """
    got, expected = (np.asarray(v.detach() if isinstance(v, torch.Tensor) else v) for v in (got, expected))
    assert got.shape == expected.shape, f"{got.shape} instead of {expected.shape}"
    scale = np.abs(expected).max() if expected.size else 0.0
    gap = np.abs(got - expected).max() if expected.size else 0.0
    allowed = 1e3 * EPS * (1e2 + condition) * scale + slack
    assert gap <= allowed, f"off by {gap:g} where {allowed:g} is allowed and the largest entry is {scale:g}"


class Truth:
    """Dense gradients and curvatures of one case, computed once; scores for any method, blocks and damping."""

    def __init__(self, case: Case, weights: np.ndarray | None = None):
        self.case = case
        self.weights = weights
        self.names = oracle.trainable(case.model)
        self._cache: dict[Any, Any] = {}

    # Gradients and curvature of all parameters, in the model's order

    @cached_property
    def train_grads(self) -> np.ndarray:
        return oracle.per_sample_grads(self.case.model, self.case.loss, self.case.x, self.case.y, self.names)

    @cached_property
    def query_grads(self) -> np.ndarray:
        case = self.case
        return oracle.per_sample_grads(case.model, case.loss, case.x_query, case.y_query, self.names)

    @cached_property
    def mixed(self) -> np.ndarray:
        return oracle.mixed_grads(self.case.model, self.case.loss, self.case.x, self.case.y, self.names)

    def uniforms(self, draw: int, seed: int) -> np.ndarray:
        """The counter-based numbers of rows whose ids are their positions."""
        each = self.case.y[0].numel()
        return row_uniforms(np.arange(len(self.case.y)), each, draw=draw, seed=seed)[..., 0]

    def pseudo(self, kind: str, draws: Sequence[int] = (0,), seed: int = 0) -> oracle.Pseudo:
        """What the Fisher is summed over: "exact", "sampled", "empirical", or "auto"."""
        case = self.case
        if kind == "empirical":
            return oracle.own_targets(case.y)
        if kind == "sampled" or (kind == "auto" and case.y.ndim > 1 and not case.y.is_floating_point()):
            uniforms = [self.uniforms(draw, seed) for draw in draws]
            terms = case.y[0].numel()  # `token_loss` is the mean over them
            return oracle.sampled_classes(case.model, case.x, case.y, uniforms, terms)
        every = oracle.every_direction if case.y.is_floating_point() else oracle.every_class
        return every(case.model, case.x, case.y)

    def curvature(self, kind: str, fisher: str = "auto", seed: int = 0) -> np.ndarray:
        """Over all parameters."""
        key = (kind, fisher, seed)
        if key not in self._cache:
            case, arguments = self.case, (self.names, self.weights)
            if kind in ("hessian", "ggn"):
                compute = getattr(oracle, kind)
                self._cache[key] = compute(case.model, case.loss, case.x, case.y, *arguments)
            else:
                pseudo = self.pseudo("empirical" if kind == "empirical_fisher" else fisher, seed=seed)
                self._cache[key] = oracle.fisher(case.model, case.loss, case.x, pseudo, *arguments)
        return self._cache[key]

    # One block

    def index(self, names: Sequence[str]) -> np.ndarray:
        """Where these parameters' numbers are in the model's order."""
        sizes = {n: p.numel() for n, p in self.case.model.named_parameters()}
        starts = dict(zip(self.names, np.cumsum([0] + [sizes[n] for n in self.names]), strict=False))
        return np.concatenate([np.arange(starts[n], starts[n] + sizes[n]) for n in names])

    def kronecker(self, method: hw.Kfac | hw.Ekfac, names: Sequence[str]) -> list[Any]:
        key = (type(method), method.fisher, method.samples, method.seed, tuple(names))
        if key not in self._cache:
            case, samples = self.case, method.samples
            first = self.pseudo(method.fisher, range(samples), method.seed)
            ekfac = isinstance(method, hw.Ekfac)
            parts: list[Any] = oracle.kronecker_parts(
                case.model, case.loss, case.x, first, names, self.weights, tied_table=ekfac
            )
            if ekfac:
                second = self.pseudo(method.fisher, range(samples, 2 * samples), method.seed)
                parts = oracle.eigen_parts(case.model, case.loss, case.x, second, names, parts, self.weights)
            self._cache[key] = parts
        return self._cache[key]

    def matrix(self, method: Method, names: Sequence[str]) -> np.ndarray:
        """The undamped curvature of a block as this method sees it."""
        index = self.index(names)
        if isinstance(method, (hw.Direct, ProductMethod, hw.Dual)):
            return self.curvature(method.curvature, method.fisher, method.seed)[np.ix_(index, index)]
        if isinstance(method, hw.DataInf):
            return self.curvature("empirical_fisher")[np.ix_(index, index)]
        if isinstance(method, (hw.Kfac, hw.Ekfac)):
            return oracle.assemble(self.kronecker(method, names), len(index), lambda part: part.matrix())
        (rate,) = method.rates(1) if isinstance(method, hw.TracIn) else (1.0,)
        return rate * np.eye(len(index))

    def inverse(self, method: Method, names: Sequence[str], damping: float) -> np.ndarray:
        matrix = self.matrix(method, names)
        if isinstance(method, hw.GradDot):
            return matrix
        if isinstance(method, hw.Kfac) and method.damping_form == "factored":
            parts = self.kronecker(method, names)
            return oracle.assemble(parts, len(matrix), lambda part: part.factored_inverse(damping))
        if isinstance(method, hw.DataInf):
            return self.swapped(names, damping)
        if isinstance(method, hw.Nystroem):
            matrix = self.sketched(method, matrix)
        if isinstance(method, hw.Arnoldi):
            return self.truncated(method, matrix, damping)
        if isinstance(method, SteppedMethod):
            return self.descended(method, names, damping)
        return oracle.damped_solve(matrix, damping, np.eye(len(matrix)))

    def condition(self, method: Method, names: Sequence[str], damping: float) -> float:
        """How much rounding may grow: the condition number of what is inverted, or a worse one on the way there.

        The k leading eigenvectors are good to eps times |C| over the gap behind the k-th eigenvalue; a sketch to eps
        times |C| over the smallest eigenvalue of its core.
        """
        if isinstance(method, SteppedMethod):
            return 1e4  # a polynomial of the curvature of low degree, with moves of about its own size
        matrix = self.matrix(method, names)
        values = np.linalg.eigvalsh(matrix + damping * np.eye(len(matrix)))
        condition = 1.0 / float(np.abs(values).min() / np.abs(values).max())
        if isinstance(method, hw.Arnoldi):
            condition = max(condition, self.gap(method, matrix))
        if isinstance(method, hw.Nystroem):
            found = np.linalg.svd(self.sketch(method, matrix), compute_uv=False)
            condition = max(condition, float(found[0] / found[found > CUT * found[0]].min()) ** 2)
        return condition

    # Formulas of the approximations

    def swapped(self, names: Sequence[str], damping: float) -> np.ndarray:
        """DataInf: the mean over rows of (g g^T + damping I)^-1."""
        grads = self.train_grads[:, self.index(names)]
        weights = np.ones(len(grads)) if self.weights is None else np.asarray(self.weights, dtype=float)
        inverses = [np.linalg.inv(np.outer(g, g) + damping * np.eye(len(g))) for g in grads]
        return np.tensordot(weights, np.stack(inverses), axes=1) / weights.sum()

    def sketch(self, method: hw.Nystroem, matrix: np.ndarray) -> np.ndarray:
        """C^(1/2) O for an orthonormal basis O of the span of random signs, or of everything: [D, r]."""
        size, like = len(matrix), torch.zeros(1, dtype=torch.float64)
        basis = np.eye(size)
        if method.rank < size:
            signs = sign_vectors(method.rank, size, like, seed=method.seed, stream=2).numpy()
            left, found, _ = np.linalg.svd(signs.T, full_matrices=False)
            basis = left[:, found > CUT]
        values, vectors = np.linalg.eigh(matrix)
        return (vectors * np.sqrt(values.clip(min=0.0))) @ vectors.T @ basis

    def sketched(self, method: hw.Nystroem, matrix: np.ndarray) -> np.ndarray:
        """C O (O^T C O)^+ O^T C, which is C^(1/2) P C^(1/2) with P the projection on the range of C^(1/2) O."""
        left, found, _ = np.linalg.svd(self.sketch(method, matrix), full_matrices=False)
        left = left[:, found > CUT * found[0]]
        values, vectors = np.linalg.eigh(matrix)
        root = left.T @ (vectors * np.sqrt(values.clip(min=0.0))) @ vectors.T
        return root.T @ root

    def truncated(self, method: hw.Arnoldi, matrix: np.ndarray, damping: float) -> np.ndarray:
        """The eigenpairs of largest magnitude; off them 1 / damping, or nothing."""
        values, vectors = np.linalg.eigh(matrix)
        kept = np.argsort(-np.abs(values))[: method.rank]
        values, vectors, beside = values[kept], vectors[:, kept], 1.0 / damping if method.complement else 0.0
        return (vectors * (1.0 / (values + damping) - beside)) @ vectors.T + beside * np.eye(len(matrix))

    def gap(self, method: hw.Arnoldi, matrix: np.ndarray) -> float:
        """|C| over what separates the kept eigenvalues from the rest; 1 where nothing of any size is left out."""
        sizes = np.sort(np.abs(np.linalg.eigvalsh(matrix)))[::-1]
        if method.rank >= len(sizes) or (method.complement and sizes[method.rank - 1] < 1e-9 * sizes[0]):
            return 1.0
        return float(sizes[0] / max(sizes[method.rank - 1] - sizes[method.rank], 1e-300))

    @cached_property
    def row_ggns(self) -> np.ndarray:
        """Each row's own: [n, D, D]."""
        case = self.case
        return np.stack(
            [
                oracle.ggn(case.model, case.loss, oracle.row(case.x, k), oracle.row(case.y, k), self.names)
                for k in range(len(case.y))
            ]
        )

    def step_rows(self, method: SteppedMethod) -> list[np.ndarray]:
        """The rows of each step: in the order of the counter's numbers, a fresh one when too few are left."""
        n, found, epoch = len(self.case.y), [], 0
        each = min(method.rows or n, n)
        while len(found) < method.steps:
            order = np.argsort(row_uniforms(np.arange(n), 1, draw=(1 << 20) + epoch, seed=method.seed)[:, 0, 0])
            found += [order[start : start + each] for start in range(0, n - each + 1, each)]
            epoch += 1
        return found[: method.steps]

    def descended(self, method: hw.Lissa | hw.Astra, names: Sequence[str], damping: float) -> np.ndarray:
        """The recursion, on all unit vectors at once."""
        assert method.curvature == "ggn"
        index = self.index(names)
        unit = np.eye(len(index))
        if isinstance(method, hw.Astra):
            parts = self.kronecker(hw.Ekfac(fisher=method.fisher, seed=method.seed), names)
            helper = oracle.assemble(parts, len(index), lambda part: part.inverse(damping))
            step, momentum, x = method.step_size, method.momentum, helper
        else:
            assert method.scale is not None
            helper, step, momentum, x = unit, 1.0 / method.scale, 0.0, unit / method.scale
        move = 0.0 * x
        for rows in self.step_rows(method):
            of_step = (
                self.matrix(method, names) if method.rows is None else self.row_ggns[rows].mean(0)[np.ix_(index, index)]
            )
            move = momentum * move + step * helper @ (unit - of_step @ x - damping * x)
            x = x + move
        return x

    # Scores

    def absolute(self, method: Method, structure: Structure, factor: float) -> dict[str, float]:
        """`factor` mean eigenvalues of each block; for a Hessian, mean absolute eigenvalues."""
        found = {}
        for block, names in oracle.block_names(self.case.model, structure).items():
            matrix = self.matrix(method, names)
            hessian = getattr(method, "curvature", None) == "hessian"
            mean = np.abs(np.linalg.eigvalsh(matrix)).mean() if hessian else np.trace(matrix) / len(matrix)
            found[block] = factor * float(mean)
        return found

    def gradients(self, method: Method, structure: Structure, mixed: bool) -> tuple[np.ndarray, np.ndarray]:
        """Of queries and of train rows, (mixed) gradients of all blocks' parameters, in the model's order."""
        query, train = self.query_grads, self.mixed if mixed else self.train_grads
        if not isinstance(method, hw.GradCos):
            return query, train
        names = [n for group in oracle.block_names(self.case.model, structure).values() for n in group]
        inside = np.zeros(query.shape[1])
        inside[self.index(names)] = 1.0
        query = _unit(query * inside)
        if not mixed:
            return query, _unit(train * inside)
        key = ("unit", tuple(names))
        if key not in self._cache:
            case = self.case
            self._cache[key] = oracle.mixed_grads(case.model, case.loss, case.x, case.y, names, unit=True)
        whole = np.zeros(self.mixed.shape)
        whole[..., self.index(names)] = self._cache[key]
        return query, whole

    def scores(
        self, method: Method, structure: Structure, damping: Mapping[str, float], mixed: bool = False
    ) -> tuple[dict[str, np.ndarray], float]:
        """By block: [q, n] or [q, n, *x_shape]; and the worst condition number among the blocks."""
        query, train = self.gradients(method, structure, mixed)
        found, condition = {}, 1.0
        for block, names in oracle.block_names(self.case.model, structure).items():
            index, inverse = self.index(names), self.inverse(method, names, damping[block])
            found[block] = oracle.contract(query[:, index] @ inverse.T, train[..., index])
            condition = max(condition, self.condition(method, names, damping[block]))
        return found, condition


@cache
def truth_of(name: str) -> Truth:
    """Of a case by its name."""
    return Truth(CASES[name]())


def _unit(grads: np.ndarray) -> np.ndarray:
    return grads / np.linalg.norm(grads, axis=1, keepdims=True)


def named_loader(case: Case, size: int, order: torch.Tensor | None = None) -> list[TorchBatch]:
    """Batches whose ids are the rows' positions in the case, whatever their order."""
    ids = torch.arange(len(case.y)) if order is None else order
    return [
        TorchBatch(x, y, ids=ids[start : start + len(y)])
        for start, (x, y) in zip(range(0, len(ids), size), case.loader(size, order), strict=True)
    ]


def fitted(
    case: Case, method: Method, structure: Structure, size: int = 4, order: torch.Tensor | None = None, **options: Any
) -> TorchComposableInfluence:
    influence = TorchComposableInfluence(
        case.model, case.loss, method, blocks=structure, likelihood=case.likelihood, **options
    )
    return influence.fit(named_loader(case, size, order))
