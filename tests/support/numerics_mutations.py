"""Ways in which eigenpairs, sketches, large arrays and large numbers have been wrong, and laws that notice each."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from test_solvers import F32, Counted, exact, normal, true_residual, with_spectrum

import headwater as hw
from headwater import memory
from headwater.curvature import kronecker
from headwater.errors import HeadwaterError
from headwater.memory import refuse_too_large
from headwater.methods.iterative import near_inverse
from headwater.operators import iterative, krylov, sketch
from headwater.operators.cg import ConjugateGradient
from headwater.operators.iterative import IterativeInverse
from headwater.operators.krylov import leading_eigenpairs
from headwater.operators.sketch import fit_nystroem, normal_vectors
from headwater.operators.structured import DenseOperator
from headwater.torch import layers, patches

Law = Callable[[], None]
Mutant = Callable[[], AbstractContextManager[Any]]


def copies_are_found() -> None:
    values = np.concatenate([np.full(9, 3.0), np.linspace(0, 0.1, 91)])
    operator = with_spectrum(values)
    found = leading_eigenpairs(
        operator, normal_vectors(4, 100, operator.matrix, seed=0), 9, tolerance=1e-3, max_products=90
    )
    off = float((np.sort(found.values.numpy()) - 3.0).__abs__().max())
    assert off < 1e-2, f"off by {off}"


def eigenvalues_that_are_nearly_copies_are_found() -> None:
    values = np.concatenate([3 * (1 + 6e-4 * np.arange(12)), np.linspace(0, 0.1, 188)])
    for seed in range(4):
        operator = with_spectrum(values)
        start = normal_vectors(2, 200, operator.matrix, seed=seed)
        found = leading_eigenpairs(operator, start, 12, tolerance=1e-2, max_products=120)
        off = 36.0 - float(found.values.sum())
        assert off < 0.5, f"off by {off}"


def spectra_without_copies_cost_no_product_more() -> None:
    counted = Counted(with_spectrum(np.logspace(0, -4, 200)))
    start = normal_vectors(4, 200, counted.inner.matrix, seed=0)
    leading_eigenpairs(counted, start, 8, tolerance=1e-3, max_products=80)
    assert counted.vectors % 4 == 0, f"off by {counted.vectors % 4} products"


def a_shifted_sketch_preconditions_an_indefinite_hessian() -> None:
    operator, sides = with_spectrum(np.concatenate([np.logspace(0, 3, 12), np.linspace(-0.5, 0.05, 48)])), normal(3, 60)
    try:
        inverse = near_inverse(fit_nystroem(operator, operator.matrix, rank=20, seed=0, shifted=True), 0.51, 1.0)
        lowest = float(torch.linalg.eigvalsh(inverse.dense(operator.matrix))[0])
        steps = ConjugateGradient(1e-9).solve(operator, 0.51, sides, inverse, "").report.iterations.max()
    except HeadwaterError as error:
        raise AssertionError(f"off by a refusal: {error}") from None
    assert lowest > 0 and steps <= 80, f"off by {lowest} or {steps} steps"


def large_sides_are_solved() -> None:
    operator = with_spectrum(np.logspace(-1, 0, 20), dtype=F32)
    for size in (1e25, 1e-30):
        sides = normal(2, 20).to(F32) * size
        try:
            x = IterativeInverse(operator, 0.1, ConjugateGradient(1e-4)).apply(sides)
        except HeadwaterError as error:
            raise AssertionError(f"off by a refusal: {error}") from None
        off = float((x.double() - exact(operator, 0.1, sides)).norm() / exact(operator, 0.1, sides).norm())
        assert off < 1e-2, f"off by {off}"
        assert true_residual(operator, 0.1, x, sides).max() < 1e-2


def norms_are_those_of_float64() -> None:
    rows = normal(2, 9).to(F32) * torch.tensor([[1e30], [1e-30]], dtype=F32)
    off = float((iterative.row_norms(rows).double() / rows.double().norm(dim=1) - 1).abs().max())
    assert off < 1e-5, f"off by {off}"


def what_is_not_finite_is_refused() -> None:
    matrix = torch.eye(5, dtype=F32)
    matrix[0, 0] = float("inf")
    for use in (
        lambda: IterativeInverse(DenseOperator(matrix, psd=True), 0.1, ConjugateGradient()).apply(torch.ones(1, 5)),
        lambda: fit_nystroem(DenseOperator(matrix, psd=True), matrix, rank=5, seed=0),
        lambda: leading_eigenpairs(
            DenseOperator(matrix, psd=True), torch.eye(5)[:1], 2, tolerance=1e-3, max_products=20
        ),
    ):
        try:
            use()
        except HeadwaterError:
            continue
        except Exception as error:
            raise AssertionError(f"off by a raw {type(error).__name__}") from None
        raise AssertionError("off by an answer where there is none")


def what_has_no_room_is_refused() -> None:
    try:
        refuse_too_large("A matrix", (10**7, 10**7), 8e14, "Use less.")
    except HeadwaterError:
        return
    raise AssertionError("off by 8e14 bytes")


def sums_from_an_image_are_those_of_its_patches() -> None:
    torch.manual_seed(0)
    convolution = torch.nn.Conv2d(16, 2, 3, padding=1)
    x, weights = torch.randn(3, 16, 9, 8), torch.rand(3) + 0.5
    found = layers.CONVOLUTION.values(convolution, x, torch.randn(3, 2, 9, 8), True, False)[0]
    assert isinstance(found, patches.Patches), "off by what is not tried"
    truth = torch.einsum("nti,ntj,n->ij", found.a, found.a, weights)
    off = float((found.moments(weights).right - truth).norm() / truth.norm())
    assert off < 1e-5, f"off by {off}"


def a_basis_of_some_rows_is_the_same_in_any_batches() -> None:
    torch.manual_seed(0)
    model, x, y = torch.nn.Linear(4, 3).double(), torch.randn(40, 4, dtype=torch.float64), torch.arange(40) % 3
    method = hw.Ekfac(fisher="empirical", basis_share=0.4)
    scores = []
    for size, order in ((40, torch.arange(40)), (7, torch.randperm(40))):
        batches = list(zip(x[order].split(size), y[order].split(size), strict=True))
        fitted = hw.Influence(model, "cross_entropy", method, damping=0.01).fit(batches)
        scores.append(fitted.attribute((x, y), (x[:5], y[:5])).values)
    off = float(abs(scores[0] - scores[1]).max() / abs(scores[0]).max())
    assert off < 1e-8, f"off by {off}"


LAWS: tuple[Law, ...] = (
    sums_from_an_image_are_those_of_its_patches,
    a_basis_of_some_rows_is_the_same_in_any_batches,
    copies_are_found,
    eigenvalues_that_are_nearly_copies_are_found,
    spectra_without_copies_cost_no_product_more,
    a_shifted_sketch_preconditions_an_indefinite_hessian,
    large_sides_are_solved,
    norms_are_those_of_float64,
    what_is_not_finite_is_refused,
    what_has_no_room_is_refused,
)


def _replaced(owner: Any, attribute: str, make: Callable[[Any], Any]) -> Mutant:
    return lambda: patch.object(owner, attribute, make(getattr(owner, attribute)))


def _finds_nothing(self: Any, start: Any) -> bool:
    self.complete = True
    return False


MUTANTS: dict[str, Mutant] = {
    "every offset reaches all of the image": _replaced(patches, "_ends", lambda f: lambda *given: []),
    "rows of a basis are chosen by their places": _replaced(
        kronecker, "row_uniforms", lambda f: lambda keys, *given, **more: f(np.arange(len(keys)), *given, **more)
    ),
    "nobody looks for missing copies": _replaced(
        krylov._Search, "may_lack_copies", lambda f: lambda self, coordinates: False
    ),
    "everybody looks for missing copies": _replaced(
        krylov._Search, "may_lack_copies", lambda f: lambda self, coordinates: True
    ),
    "the look beside the space finds nothing": _replaced(krylov._Search, "finds_more", lambda f: _finds_nothing),
    "the look beside the space is content at once": _replaced(krylov, "_overlooked", lambda f: lambda *given: 0.0),
    "a preconditioner has to be positive by itself": _replaced(
        sketch, "_met", lambda f: lambda core, operator, eps, shifted: f(core, operator, eps, False)
    ),
    "a shift is no larger than what was met": _replaced(sketch, "_met", lambda f: lambda *given: 1e-9 * f(*given)),
    "sides are taken as they are": _replaced(iterative, "_scaled", lambda f: lambda sides, label: (sides, None)),
    "norms are taken as they come": _replaced(
        iterative, "row_norms", lambda f: lambda rows: (rows * rows).sum(-1) ** 0.5
    ),
    "nobody looks whether numbers are finite": lambda: patch.multiple(
        krylov, refuse_nonfinite=lambda array, what: array
    ),
    "the machine has room for everything": _replaced(memory, "available_memory", lambda f: lambda: float("inf")),
}
