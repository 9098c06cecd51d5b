"""What the scores of a case ought to be: the oracle's matrices, put together by the formula of each method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import oracle
import torch
from models import Case

import headwater as hw
from headwater.methods.base import Method
from headwater.random import row_uniforms
from headwater.torch import TorchBatch, TorchComposableInfluence

EPS = float(np.finfo(np.float64).eps)
Structure = str | Mapping[str, Sequence[str]]


def assert_close(got: Any, expected: Any, condition: float = 1.0) -> None:
    """Every entry, to rounding: a solve at condition number c is good to about c eps of the largest entry."""
    got, expected = (np.asarray(v.detach() if isinstance(v, torch.Tensor) else v) for v in (got, expected))
    assert got.shape == expected.shape, f"{got.shape} instead of {expected.shape}"
    scale = np.abs(expected).max() if expected.size else 0.0
    gap = np.abs(got - expected).max() if expected.size else 0.0
    allowed = 1e3 * EPS * (1e2 + condition) * scale
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
        if isinstance(method, hw.Direct):
            return self.curvature(method.curvature, method.fisher, method.seed)[np.ix_(index, index)]
        if isinstance(method, (hw.Kfac, hw.Ekfac)):
            return oracle.assemble(self.kronecker(method, names), len(index), lambda part: part.matrix())
        return np.eye(len(index))

    def inverse(self, method: Method, names: Sequence[str], damping: float) -> np.ndarray:
        if isinstance(method, hw.GradDot):
            return np.eye(len(self.index(names)))
        if isinstance(method, hw.Kfac) and method.damping_form == "factored":
            parts = self.kronecker(method, names)
            return oracle.assemble(parts, len(self.index(names)), lambda part: part.factored_inverse(damping))
        matrix = self.matrix(method, names)
        return oracle.damped_solve(matrix, damping, np.eye(len(matrix)))

    # Scores

    def absolute(self, method: Method, structure: Structure, factor: float) -> dict[str, float]:
        """`factor` mean eigenvalues of each block; for a Hessian, mean absolute eigenvalues."""
        found = {}
        for block, names in oracle.block_names(self.case.model, structure).items():
            matrix = self.matrix(method, names)
            hessian = isinstance(method, hw.Direct) and method.curvature == "hessian"
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
            condition = max(condition, float(np.linalg.cond(inverse)))
        return found, condition


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
