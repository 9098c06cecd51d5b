"""What a framework says of a training's steps: the seam between it and the sweep."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from headwater.trajectory.rules import Arrays, State

Blocks = tuple[tuple[str, ...], ...] | None
"""Names of the parameters of each block; None for all together."""


class Piece(NamedTuple):
    """Some rows of a step, as the framework's batch, and their shares [n]."""

    batch: Any
    shares: np.ndarray
    random: np.ndarray | None = None
    """The generator's state before the model's call on these rows; None where it draws nothing."""


class Point(ABC):
    """A step's objective, sum of share times row loss, at some parameters."""

    @property
    @abstractmethod
    def grads(self) -> Arrays:
        """Its gradient: [*shape] by name."""

    @abstractmethod
    def pull(self, through: Arrays, blocks: Blocks = None) -> tuple[np.ndarray, Arrays]:
        """For cotangents r [q, *shape] of the gradient: <r, share_i grad l_i> [1, q, n], and H r [q, *shape] by name.

        blocks: names of parameters that go together, each in one; [block, q, n] is then of the parameters of each.
        The rows in the order of the pieces; [block, q, n] is in float64.
        """


class TrainingModel(ABC):
    """A model whose steps are taken again, with arrays of its framework. No state: parameters are given."""

    @abstractmethod
    def put(self, state: State) -> State:
        """Arrays of NumPy as the framework's, in the dtype and at the place of the model's own."""

    @abstractmethod
    def at(self, parameters: Arrays, pieces: Sequence[Piece], curvature: str | None) -> Point:
        """The step's objective there. curvature: which H; None for zero."""

    @abstractmethod
    def gradient(self, parameters: Arrays, pieces: Sequence[Piece]) -> Arrays:
        """As `at(...).grads`, for a step forward alone."""

    @abstractmethod
    def query_grads(self, parameters: Arrays, batch: Any) -> Arrays:
        """Of what is explained of each query row: [q, *shape] by name."""

    @abstractmethod
    def query_losses(self, parameters: Arrays, batch: Any) -> np.ndarray:
        """What is explained of each query row: [q], in float64."""

    @abstractmethod
    def wide(self) -> TrainingModel | None:
        """A copy in float64; None where that is what it is, or where there is none."""
