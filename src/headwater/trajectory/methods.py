"""What to make of a record of training: frozen settings, as every method has them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from headwater.errors import InvalidSetting
from headwater.gradients.provider import Fisher, StructuredGradientProvider
from headwater.methods.base import check_fisher
from headwater.methods.grad_dot import GradDot
from headwater.settings import check_whole, check_word
from headwater.trajectory.trajectory import Trajectory, open_record

CURVATURES = ("hessian", "ggn", "fisher", None)
AT = ("final", "step")


@dataclass(frozen=True)
class TrajectoryMethod(GradDot):
    """A method whose scores are made of a record: `fit` only learns which rows have which ids."""

    record: Trajectory | str | os.PathLike[str] = field(repr=False)
    """What `hw.record` wrote: the folder, or opened."""

    @cached_property
    def trajectory(self) -> Trajectory:
        """Errors: as `Trajectory`."""
        return open_record(self.record)

    @property
    def is_damped(self) -> bool:
        return False

    @property
    def predicts_removal(self) -> bool:
        return True

    @property
    def assumes_minimum(self) -> bool:
        return False

    def view(self, provider: StructuredGradientProvider) -> StructuredGradientProvider:
        return provider

    def describe(self) -> str:
        """The settings in words, and of which training: a folder may be moved."""
        said = repr(self)
        return f"{said[:-1]}{', ' if said[-2] != '(' else ''}training #{self.trajectory.digest:08x})"


@dataclass(frozen=True)
class Source(TrajectoryMethod):
    """Unrolling in a few segments, each with the mean curvature of its kept states, diagonal in Kronecker bases.

    Between the Unrolled derivative and influence functions: of a training that has not converged, at the cost of an
    EKFAC fit for each state that is used. A segment of K steps with rates adding up to c (over 1 - momentum) answers a
    row's gradient by (1 - exp(-c s)) / s for each eigenvalue s of its mean Fisher, and passes on exp(-c s). Of Adam,
    the same with the Fisher scaled by the segment's mean 1 / (root + eps) on both sides, by Lanczos.
    `fit` takes some of the record's steps again, of as many rows as there are train rows, where the record has them:
    one pass beside two for each state.
    Damping has no meaning here. Source: Bae et al. 2024, arXiv 2405.12186. Errors: InvalidSetting.
    """

    segments: int = 3
    """Of equal numbers of steps."""
    checkpoints: int = 2
    """States of each segment that are used, at most: of those kept, spread over it."""
    fisher: Fisher = "auto"
    """How labels are chosen; see `StructuredGradientProvider.fisher_grads`."""
    samples: int = 1
    """Labels drawn for each row, where they are drawn."""
    random_seed: int = 0
    replay: bool = field(default=True, repr=False)
    """Whether `fit` takes some steps again, and refuses those that do not come to the record's states, naming value and
    step; False for a training that is known to have done a little more than the record says, as of mixed precision."""

    def __post_init__(self) -> None:
        for name, value in (("segments", self.segments), ("checkpoints", self.checkpoints), ("samples", self.samples)):
            check_whole(name, value, 1)
        check_fisher(self.fisher)

    @property
    def seed(self) -> int | None:
        return self.random_seed


@dataclass(frozen=True)
class Unrolled(TrajectoryMethod):
    """What each row's weight did to each query, by differentiating the training that a record is of.

    One sweep from the end to the beginning for all queries that fit into memory, at about one training's cost for
    each query and a few for the record (see docs/trajectory.md). Damping has no meaning here.
    Source: Ilyas and Engstrom 2025, arXiv 2503.13751; see `headwater.trajectory.sweep` for the others.
    Errors: InvalidSetting.
    """

    curvature: str | None = "hessian"
    """"hessian": the exact derivative. "ggn", "fisher" (the batch's gradients): what curvature a step passes on is an
    approximation that cannot grow by itself. None: nothing is passed on, as in TracIn with the final query."""
    at: str = "final"
    """"final": what is asked of the trained model. "step": at each step, what it did to the query there and then
    (in-run attribution); with curvature=None."""
    removals: Sequence[float] = (0.01,)
    """Shares of the rows whose removal is tried in the verdict that comes with the scores; () for no verdict."""
    replays: int = 2
    """Trainings, forward alone, that it takes for each share."""

    def __post_init__(self) -> None:
        if self.curvature not in CURVATURES:
            words = ", ".join(map(repr, CURVATURES))
            raise InvalidSetting(f"curvature is {self.curvature!r}; expected one of {words}.")
        check_word("at", self.at, AT)
        if self.at == "step" and self.curvature is not None:
            raise InvalidSetting(
                f"at='step' asks each step by itself, and passes no curvature on: curvature is {self.curvature!r}; "
                "give curvature=None."
            )
        object.__setattr__(self, "removals", tuple(self.removals))
        if not all(0 < share < 1 for share in self.removals):
            raise InvalidSetting(f"removals are {self.removals}; expected shares of the rows, between 0 and 1.")
        if self.replays < 1:
            raise InvalidSetting(f"replays is {self.replays}; expected a whole number of at least one.")
