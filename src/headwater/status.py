"""What a fitted influence knows about itself: settings, spectrum, what was cut off, and how far its solves came."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from headwater.arrays import to_numpy
from headwater.errors import NotFittedError
from headwater.methods.base import Method
from headwater.operators.algebra import LinearOperator
from headwater.operators.approximated import ApproximatedOperator
from headwater.operators.iterative import SolveReport
from headwater.operators.projected import ProjectedOperator
from headwater.operators.structured import EigenpairsOperator
from headwater.tables import shown, table

if TYPE_CHECKING:
    from headwater.influence import ComposableInfluence


@dataclass(frozen=True, eq=False)
class BlockStatus:
    """One block: its curvature's spectrum, and what the method left of it."""

    size: int
    """Parameters."""
    damping: float
    """Absolute, in the units of the curvature."""
    curvature: LinearOperator = field(repr=False)
    """Undamped."""
    kept_rank: int | None = None
    """Directions that a low-rank method keeps; None for a method that keeps all."""
    kept_mass: float | None = None
    """Share of the trace that these hold; None for curvature that may be negative, whose trace has no shares."""
    truncation_error: float = 0.0
    """Relative error of a separable inverse spectrum, of the worst part; zero for an exact one."""
    solve: SolveReport | None = None
    """How far the solves of the last call came."""

    @property
    def mean_eigenvalue(self) -> float:
        """Of the undamped curvature, as the method damps it: of a projected one, over the projected numbers.

        Of a Hessian asking costs up to 256 products, once.
        """
        return self.curvature.mean_eigenvalue()

    @property
    def mean_error(self) -> float:
        """Standard error of the mean eigenvalue where it is estimated; zero where it is exact."""
        self.curvature.trace()  # says so, too
        return self.curvature.trace_error / self.size

    @cached_property
    def bounds(self) -> tuple[float, float] | None:
        """The smallest and largest eigenvalue of the undamped curvature; see `LinearOperator.spectrum_bounds`.

        Where there are only products, asking costs a few dozen of them, once; None if their rows are not at hand.
        """
        try:
            return self.curvature.spectrum_bounds()
        except NotFittedError:
            return None

    @property
    def lowest(self) -> float | None:
        return None if self.bounds is None else self.bounds[0]

    @property
    def highest(self) -> float | None:
        return None if self.bounds is None else self.bounds[1]

    @property
    def lowest_damped(self) -> float | None:
        """The smallest eigenvalue after damping: what the inverse divides by."""
        return None if self.lowest is None else self.lowest + self.damping

    @property
    def condition(self) -> float | None:
        """The largest damped eigenvalue over the smallest; infinite where that is not positive."""
        if self.bounds is None:
            return None
        low, high = self.bounds[0] + self.damping, self.bounds[1] + self.damping
        return high / low if low > 0 else np.inf


@dataclass(frozen=True, eq=False)
class Status:
    """What a fitted influence is and knows. `print` shows it as a table, spectrum bounds included."""

    method: str
    """The method's settings."""
    n_train: float
    """Rows that were fitted, each counted with its weight."""
    coverage: float
    """The share of the model's trainable parameters that is attributed."""
    dtype: str
    """In which gradients are computed."""
    seed: int | None
    """Of the method's random numbers; None for a method without any."""
    explained: str
    """What the scores are about."""
    blocks: Mapping[str, BlockStatus]
    fisher: str = ""
    """What stands for the Fisher information where no distribution is known behind the loss; "" where one is."""
    instead: str = ""
    """What `print` shows in place of the blocks, of a method that has no curvature of the trained model."""

    def __str__(self) -> str:
        seed = "no random numbers" if self.seed is None else f"seed {self.seed}"
        head = (
            f"{self.method}\n{self.n_train:g} train rows, {self.coverage:.1%} of the trainable parameters, "
            f"{self.dtype}, {seed}, explains the {self.explained}\n"
        )
        head += f"in place of the Fisher information: {self.fisher}\n" if self.fisher else ""
        if self.instead:
            return f"{head}\n{self.instead}"
        names = ["block", "size", "damping", "mean", "lowest", "highest", "lowest damped", "kept", "cut", "residual"]
        rows = [[name, *_cells(block)] for name, block in self.blocks.items()]
        return head + "\n" + table([names, *rows])


def _cells(block: BlockStatus) -> list[str]:
    mean = shown(block.mean_eigenvalue) + (f" +- {block.mean_error:.1g}" if block.mean_error else "")
    kept = "all" if block.kept_rank is None else str(block.kept_rank)
    kept += "" if block.kept_mass is None else f" ({block.kept_mass:.1%} of the trace)"
    solve = block.solve
    residual = "-" if solve is None else f"{solve.residual.max(initial=0.0):.2g} ({solve.columns})"
    return [
        str(block.size),
        shown(block.damping),
        mean,
        shown(block.lowest),
        shown(block.highest),
        shown(block.lowest_damped),
        kept,
        shown(block.truncation_error),
        residual,
    ]


def status_of(influence: ComposableInfluence) -> Status:
    """See `ComposableInfluence.status`. Errors: NotFittedError."""
    fitted, damping = influence.block_mapper.operators, influence.absolute_damping
    curvature = influence.curvature
    blocks = {
        name: BlockStatus(
            size=operator.input_size,
            damping=damping[name],
            curvature=curvature[name],
            **_kept(influence.method, curvature[name]),
            truncation_error=max(influence.truncation_errors[name]),
            solve=influence.solves.get(name),
        )
        for name, operator in fitted.items()
    }
    return Status(
        method=influence.method.describe(),
        n_train=influence.n_train,
        coverage=influence.provider.coverage_fraction,
        dtype=influence.source.dtype,
        seed=influence.method.seed,
        explained=influence.explained,
        blocks=blocks,
        fisher="" if influence.provider.likelihood is None else influence.provider.likelihood.said,
    )


def _share(leading: EigenpairsOperator, trace: float) -> float:
    """Of a trace that is never negative; what is below zero is rounding, and what is above one the trace's estimate."""
    kept = float(to_numpy(leading.values).clip(0.0).sum())
    return min(1.0, kept / trace) if trace > 0 else 1.0


def _kept(method: Method, curvature: LinearOperator) -> dict[str, Any]:
    """Rank and share of the trace, where a method sees the curvature through few directions."""
    if isinstance(curvature, ProjectedOperator):
        return {"kept_rank": curvature.kept_rank, "kept_mass": curvature.kept_mass}
    if method.keeps_leading and isinstance(curvature, ApproximatedOperator):
        leading = curvature.approximation
        assert isinstance(leading, EigenpairsOperator)
        return {
            "kept_rank": int(leading.vectors.shape[0]),
            "kept_mass": _share(leading, curvature.trace()) if curvature.psd else None,
        }
    return {}
