"""Gradients, GGN and Hessian of a torch model, one row at a time, by reverse mode alone. Nothing of headwater is used.

J^T H J has J from one backward pass for each output, so that what a model does to its gradients on the way back (hooks,
detached parts, functions with a backward of their own) is in both J and J^T.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map

Loss = Callable[[Any, Any], torch.Tensor]


def call(model: Callable[..., Any], x: Any) -> Any:
    return model(*x) if isinstance(x, tuple) else model(x)


def some(rows: Any, chosen: slice) -> Any:
    return tree_map(lambda t: t[chosen], rows)


class RowOracle:
    """Of the mean over rows of `loss(model(row), target)`; D numbers, in the order of the model's parameters."""

    def __init__(self, model: nn.Module, loss: Loss, x: Any, y: Any, rows: int):
        self.model, self.loss, self.x, self.y, self.rows = model, loss, x, y, rows
        self.leaves = [p for p in model.parameters() if p.requires_grad]

    def pull(self, value: torch.Tensor, **options: Any) -> torch.Tensor:
        """The gradient of one number by all parameters, flat: zero for those that it does not depend on."""
        if not value.requires_grad:
            return torch.cat([torch.zeros_like(p).reshape(-1) for p in self.leaves])
        found = torch.autograd.grad(value, self.leaves, allow_unused=True, **options)
        dense = [
            torch.zeros_like(p) if g is None else g.to_dense() if g.is_sparse else g
            for g, p in zip(found, self.leaves, strict=True)
        ]
        return torch.cat([g.reshape(-1) for g in dense])

    def outputs(self) -> Iterator[tuple[Any, Any]]:
        with sdpa_kernel(SDPBackend.MATH):  # the other kernels have no second derivatives
            for k in range(self.rows):
                yield call(self.model, some(self.x, slice(k, k + 1))), some(self.y, slice(k, k + 1))

    def grads(self) -> np.ndarray:
        """[n, D]."""
        return np.stack([self.pull(self.loss(o, t).sum()).numpy() for o, t in self.outputs()])

    def ggn(self) -> np.ndarray:
        """The mean over rows of J^T H J: [D, D]."""
        total = 0.0
        for output, target in self.outputs():
            jacobian = torch.stack([self.pull(o, retain_graph=True) for o in output.reshape(-1)])
            flat, shape = output.detach().reshape(-1), output.shape
            curvature = torch.autograd.functional.hessian(
                lambda o, t=target, s=shape: self.loss(o.reshape(s), t).sum(), flat
            )
            total = total + jacobian.T @ curvature @ jacobian
        return (total / self.rows).numpy()

    def hessian(self) -> np.ndarray:
        """[D, D]. Errors: RuntimeError from torch where a layer has no second derivative."""
        mean = sum(self.loss(o, t).sum() for o, t in self.outputs()) / self.rows
        slope = self.pull(mean, create_graph=True)
        return torch.stack([self.pull(s, retain_graph=True) for s in slope]).numpy()


def solved(curvature: np.ndarray, damping: float, grads: np.ndarray) -> np.ndarray:
    """Scores of all rows against all: [n, n]."""
    return grads @ np.linalg.solve(curvature + damping * np.eye(len(curvature)), grads.T)
