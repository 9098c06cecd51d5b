"""The proximal Bregman response: what damped influence approximates on a network that has not converged.

Retraining a network without a row answers another question than influence does: a new run starts elsewhere, ends
elsewhere, and goes on where the given one was stopped. The proximal Bregman response keeps the model at hand. With
weights w0, outputs f_n(w), losses l_n, a removed group G of N rows, and damping lambda, it is the minimum w* of

    1/N sum_n D_n(f_n(w), f_n(w0)) + lambda/2 |w - w0|^2 - 1/N sum_{n in G} l_n(w)

that is found downhill from w0, where D_n(f, f0) = l_n(f) - l_n(f0) - <l_n'(f0), f - f0> is the Bregman divergence of
the loss in the outputs, not below zero for a loss that is convex in them. What is returned is the rise of the queries'
losses from w0 to w*. It is deterministic: no seed, no noise.

1. Collected by rows, with c_n = 0 for rows of G and 1 for the others, the objective is, but for a constant,
   1/N sum_n [c_n (l_n(f_n) - l_n(f_n(w0))) - <l_n'(f_n(w0)), f_n - f_n(w0)>] + lambda/2 |w - w0|^2.
2. So w0 is its stationary point for an empty group, converged or not. Its Hessian there is the damped GGN, and the
   slope is -g_G / N, g_G the group's summed gradient: to first order the rise is <(GGN + lambda)^-1 g_G, g_q> / N.
3. For a model that is linear in its weights, at the minimum of mean loss + lambda/2 |w|^2, it is the exact retraining.

What is not linear in the group (its own curvature, the losses' curvature) is part of it, as it is of `removal`; what is
not linear in the weights too.

Source: Bae, Ng, Lo, Ghassemi and Grosse 2022, arXiv 2209.05364.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypedDict, Unpack

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import nn
from torch.utils._pytree import tree_map

from headwater.errors import (
    InvalidSetting,
    NonFiniteValue,
    NotConverged,
    UnsupportedLoss,
    UnsupportedModel,
)
from headwater.positions import row_groups, row_positions
from headwater.progress import track
from headwater.retraining.settings import check_counts, settings_of
from headwater.torch.batch import TorchBatch
from headwater.torch.capture import detached_state, run
from headwater.torch.check import check_independence, check_rows
from headwater.torch.losses import Loss, check_finite, check_loss, normalisation, row_losses
from headwater.torch.precision import wide_copy
from headwater.torch.surroundings import autograd_on, twice_differentiable

EPS = float(np.finfo(np.float64).eps)
INNER_STEPS = 500
"""Of conjugate gradients within a Newton step, at most."""
HALVINGS = 40


@dataclass(frozen=True)
class ProximalSettings:
    """What is minimised, and how far. Errors: InvalidSetting."""

    damping: float
    """Absolute, in the units of the mean curvature over rows."""
    weight: float = 1.0
    """The share of the group that is removed, in (0, 1]; divided by it, the changes of a small one are the influence to
    first order."""
    steps: int = 100
    """Newton's, at most."""
    tolerance: float = 1e-9
    """On the gradient's norm, relative to where it started."""
    batch_size: int | None = None
    """Rows at once, None for all."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.damping) and self.damping >= 0):
            raise InvalidSetting(f"damping is {self.damping}; expected a finite number, not below 0.")
        if not (math.isfinite(self.weight) and 0 < self.weight <= 1):
            raise InvalidSetting(
                f"weight is {self.weight}; expected the share of the group that is removed, in (0, 1]."
            )
        if not 0 < self.tolerance < 1:
            raise InvalidSetting(f"tolerance is {self.tolerance}; expected a number between 0 and 1.")
        check_counts(steps=self.steps, batch_size=1 if self.batch_size is None else self.batch_size)


class ProximalFields(TypedDict, total=False):
    """The fields of `ProximalSettings`, as they are taken by name."""

    damping: float
    weight: float
    steps: int
    tolerance: float
    batch_size: int | None


def pbrf(
    model: nn.Module,
    loss: Loss,
    x: object,
    y: object,
    x_query: object,
    y_query: object,
    groups: Iterable[ArrayLike] | None = None,
    *,
    settings: ProximalSettings | None = None,
    measurement: Loss | None = None,
    progress: bool = False,
    **fields: Unpack[ProximalFields],
) -> NDArray[np.float64]:
    """The rise of each query's loss when a row, or a group, is removed: [q, groups].

    x, y: all train rows; x_query, y_query: queries; tensors or arrays, x also a tuple or dict of them. groups: for each
    the positions of its rows; None for every row by itself. For the rest see `ProximalBregman`.
    Errors: those of `ProximalBregman`; InvalidInput and BatchMismatch for groups that are empty, name rows that are not
    there, or one twice. Warns: NotConverged, naming the first group whose minimum was not reached.
    """
    response = ProximalBregman(
        model, loss, x, y, x_query, y_query, settings=settings, measurement=measurement, **fields
    )
    chosen = row_groups(groups, response.rows)
    found, missed = np.empty((len(response.losses), len(chosen))), []
    for number, group in enumerate(track(chosen, "proximal Bregman", progress)):
        solved = response.solve(group)
        found[:, number] = solved.losses - response.losses
        if not solved.converged:
            missed.append((number, solved.steps, solved.slope))
    if missed:
        first, taken, slope = missed[0]
        warn_not_converged(
            f"{len(missed)} of {len(chosen)} groups; the first is group {first}", taken, slope, response.settings
        )
    return found


@dataclass(frozen=True, eq=False)
class Response:
    """Where the model goes without some rows."""

    weights: torch.Tensor
    """[d], all trained parameters one after another, in float64."""
    losses: NDArray[np.float64]
    """[q], of the queries."""
    steps: int
    """Newton steps."""
    slope: float
    """The gradient's norm at the end over that at the start; zero where it is rounding."""
    converged: bool


class ProximalBregman:
    """A model as it is, and the minima of its proximal Bregman objectives; a `measure` for `headwater.evaluate.Bank`.

    As a measure, (rows kept, seed) -> losses of the queries [q], it fills a bank for any metric, with groups left out
    or with random subsets (the seed changes nothing, so one run of each is enough):

        measure = ProximalBregman(model, loss, x, y, x_query, y_query, damping=0.01)
        bank = Bank("pbrf", plan_removals(len(x), groups), len(x_query), {"truth": "pbrf", "damping": 0.01})
        print(leave_one_out(scores, *bank.fill(measure)))

    The user's model is copied, in float64 and in evaluation mode (no dropout, batch norm as learnt), and never changed;
    parameters that need no gradient stay as they are. Newton's method goes downhill, each step by conjugate gradients
    on exact second-order products; where the curvature is negative it goes along what it has. Workers of a bank may be
    threads or processes.

    loss: convex in the model's output. settings: `ProximalSettings`, or its fields by name (damping=0.01). measurement:
    of the queries, (output, target) -> number, in place of the loss.
    Errors: InvalidSetting; UnsupportedModel for an output that is no single tensor of floats, or nothing to train;
    RowsInteract; UnsupportedLoss for one that is not convex, or no weighted sum over rows; NonFiniteValue.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        x: Any,
        y: Any,
        x_query: Any,
        y_query: Any,
        *,
        settings: ProximalSettings | None = None,
        measurement: Loss | None = None,
        **fields: Unpack[ProximalFields],
    ):
        self.settings = settings_of(ProximalSettings, settings, fields)
        check_loss(loss)
        self._model = wide_copy(model, "model").eval()
        self._loss = wide_copy(loss, "loss")
        self._measurement = self._loss if measurement is None else wide_copy(measurement, "measurement")
        trained = {name: p.detach() for name, p in self._model.named_parameters() if p.requires_grad}
        if not trained:
            raise UnsupportedModel("The model has no parameter that requires a gradient: nothing can respond.")
        self._shapes = {name: p.shape for name, p in trained.items()}
        self.start = torch.cat([p.reshape(-1) for p in trained.values()])
        """[d], all trained weights of the model as it is, one after another."""
        device = self.start.device
        self._train, self._query = (_wide(TorchBatch(*pair).to(device)) for pair in ((x, y), (x_query, y_query)))
        self._step = self.rows if self.settings.batch_size is None else self.settings.batch_size
        self._base = self._base_outputs()
        self._floor = self._gradient_rounding()
        self.losses = self._query_losses(self._model, self.start)
        """[q], of the model as it is."""

    @property
    def rows(self) -> int:
        """Train rows."""
        return len(self._train)

    def __call__(self, kept: ArrayLike, seed: int = 0) -> NDArray[np.float64]:
        """The queries' losses [q] without the rows that are not `kept`. Warns: NotConverged."""
        mask = np.ones(self.rows, dtype=bool)
        mask[row_positions(kept, self.rows, "The rows kept")] = False
        solved = self.solve(np.flatnonzero(mask))
        if not solved.converged:
            warn_not_converged(f"the model without {int(mask.sum())} rows", solved.steps, solved.slope, self.settings)
        return solved.losses

    def solve(self, removed: ArrayLike) -> Response:
        """The response to the removal of these rows [k]."""
        own = copy.deepcopy(self._model)  # calls of a module swap its parameters: threads need one each
        share = torch.ones(self.rows, dtype=torch.float64, device=self.start.device)
        gone = torch.as_tensor(row_positions(removed, self.rows, "The rows removed"), device=share.device)
        # c_n of step 1: zero for the rows of the group, or what their weight leaves.
        share[gone] -= self.settings.weight
        with autograd_on(), twice_differentiable():
            moved, steps, slope = self._minimise(_Objective(self, own, share))
        # At the end, where it matters; a loss that is convex near the start may not be there.
        self._check_convex(own, moved)
        weights = self.start + moved
        return Response(weights, self._query_losses(own, weights), steps, slope, slope <= self.settings.tolerance)

    # The model --------------------------------------------------------------------------------------------------------

    def outputs(self, model: nn.Module, weights: torch.Tensor, batch: TorchBatch) -> torch.Tensor:
        """Of these weights [d]: [rows, ...]. Errors: UnsupportedModel."""
        pieces = torch.split(weights, [shape.numel() for shape in self._shapes.values()])
        own = {name: piece.reshape(shape) for (name, shape), piece in zip(self._shapes.items(), pieces, strict=True)}
        found = run(model, detached_state(model) | own, batch.x)
        if not isinstance(found, torch.Tensor) or not found.is_floating_point():
            raise UnsupportedModel(f"The model's output is {type(found).__name__}; expected one tensor of floats.")
        check_rows(found, len(batch))
        return found

    def pieces(self) -> Iterator[tuple[slice, TorchBatch]]:
        """The train rows, so many at once."""
        for start in range(0, self.rows, self._step):
            yield (where := slice(start, start + self._step)), self._train.take(where)

    def _base_outputs(self) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Outputs f0 of each piece, the losses there [rows], and their slopes by the outputs."""
        found: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        for _, batch in self.pieces():
            with torch.no_grad():
                output = self.outputs(self._model, self.start, batch)
                if not found:
                    # Rows that act on each other have no losses of their own to take away.
                    alone = self.outputs(self._model, self.start, batch.take(slice(0, 1)))
                    check_independence(output, alone, [0], output.dtype)
            with autograd_on():
                leaf = output.clone().requires_grad_()
                losses = row_losses(self._loss, leaf, batch.y)
                check_finite(losses)
                if not found:
                    normalisation(self._loss, leaf, batch.y)
                # Of each row's own loss, as losses do not depend on other rows' outputs.
                found.append((output, losses.detach(), torch.autograd.grad(losses.sum(), leaf)[0]))
        return found

    def mean_gradient(self) -> torch.Tensor:
        """Of the mean loss, at the model's own weights: [d]."""
        total = torch.zeros_like(self.start)
        with autograd_on(), twice_differentiable():
            leaf = self.start.clone().requires_grad_()
            for (_, batch), (_, _, slope) in zip(self.pieces(), self._base, strict=True):
                found = self.outputs(self._model, leaf, batch)
                total += torch.autograd.grad((slope * found).sum(), leaf)[0]
        return total / self.rows

    def _gradient_rounding(self) -> float:
        """What rounding leaves of the objective's gradient: EPS times the size of a sum of rows with random signs."""
        signs = 2 * torch.randint(2, (self.rows,), generator=torch.Generator().manual_seed(0)).double() - 1
        signs, total = signs.to(self.start.device), torch.zeros_like(self.start)
        with autograd_on(), twice_differentiable():
            leaf = self.start.clone().requires_grad_()
            for where, _, linear in self.rises(self._model, leaf):
                if linear.requires_grad:
                    # With random signs rows do not cancel, as they do at a minimum: this is how large the summands are.
                    total += torch.autograd.grad((signs[where] * linear).sum(), leaf)[0]
        return 100 * EPS * float(total.norm()) / self.rows

    def rises(self, model: nn.Module, weights: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
        """Piece by piece: its rows, the rise of their losses from w0 [rows], and what its slope at w0 gives [rows]."""
        for (where, batch), (output, losses, slope) in zip(self.pieces(), self._base, strict=True):
            found = self.outputs(model, weights, batch)
            linear = (slope * (found - output)).reshape(len(batch), -1).sum(1)
            yield where, row_losses(self._loss, found, batch.y) - losses, linear

    def _query_losses(self, model: nn.Module, weights: torch.Tensor) -> NDArray[np.float64]:
        found = []
        with torch.no_grad():
            for start in range(0, len(self._query), self._step):
                batch = self._query.take(slice(start, start + self._step))
                found.append(row_losses(self._measurement, self.outputs(model, weights, batch), batch.y))
        values = torch.cat(found).cpu().numpy()
        if not np.isfinite(values).all():
            first = int(np.isfinite(values).argmin())
            raise NonFiniteValue(f"The loss of query {first} is {values[first]}.")
        return values

    def _check_convex(self, model: nn.Module, moved: torch.Tensor) -> None:
        """Errors: UnsupportedLoss if a row's divergence is below zero."""
        with torch.no_grad():
            for where, rise, linear in self.rises(model, self.start + moved):
                # A Bregman divergence of a convex loss is never negative, but for rounding of the two terms.
                below = (rise - linear) < -1e-7 * (rise.abs() + linear.abs()) - 1e-12
                if bool(below.any()):
                    row = int(below.nonzero()[0, 0])
                    raise UnsupportedLoss(
                        f"The loss of row {where.start + row} is not convex in the output: its Bregman divergence is "
                        f"{float(rise[row] - linear[row]):.3g}. The response needs a convex loss."
                    )

    # Newton's method --------------------------------------------------------------------------------------------------

    def _minimise(self, objective: _Objective) -> tuple[torch.Tensor, int, float]:
        """How far the weights move [d], the steps taken, and the gradient's norm over that at the start."""
        at = torch.zeros_like(self.start)
        value, gradient = objective.value(at)
        first = float(gradient.norm())
        for step in range(self.settings.steps):
            size = float(gradient.norm())
            # Nothing but rounding is left: a group without gradient would else divide by about zero.
            if size <= self._floor:
                return at, step, 0.0
            if size <= self.settings.tolerance * first:
                return at, step, size / first
            # An inexact Newton step (Dembo, Eisenstat and Steihaug 1982): the nearer to the end, the more exact.
            direction = _conjugate_gradients(objective.product(at), -gradient, min(0.1, size / first))
            found = _line_search(objective, at, value, gradient, direction)
            if found is None:
                return at, step, size / first
            at, value, gradient = found
        size = float(gradient.norm())
        return at, self.settings.steps, 0.0 if size <= self._floor else size / first


class _Objective:
    """The objective of one group as a function of how far the weights move, [d]; `share` [n] is each row's c_n."""

    def __init__(self, response: ProximalBregman, model: nn.Module, share: torch.Tensor):
        self._response, self._model, self._share = response, model, share
        self._damping = float(response.settings.damping)
        self.rounding = EPS * float(torch.cat([losses.abs() for _, losses, _ in response._base]).mean())
        """Of the objective, about."""

    def value(self, at: torch.Tensor) -> tuple[float, torch.Tensor]:
        """And its gradient [d]."""
        total, gradient = self._damping / 2 * float(at @ at), self._damping * at
        for leaf, value in self._parts(at):
            total += float(value.detach())
            gradient = gradient + torch.autograd.grad(value, leaf)[0]
        return total, gradient

    def product(self, at: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        """The Hessian there times a vector [d]. One piece's graph is kept; of several, each is made anew every time."""

        def slopes() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
            for leaf, value in self._parts(at):
                yield leaf, torch.autograd.grad(value, leaf, create_graph=True)[0]

        # A graph holds every activation of its rows: several at once would not fit where rows are cut into pieces.
        kept = list(slopes()) if len(self._response._base) == 1 else None

        def apply(vector: torch.Tensor) -> torch.Tensor:
            found = self._damping * vector
            for leaf, slope in slopes() if kept is None else kept:
                if slope.requires_grad:
                    found = found + torch.autograd.grad((slope * vector).sum(), leaf, retain_graph=True)[0]
            return found

        return apply

    def _parts(self, at: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Each piece's share of the objective without its damping, and the leaf that it is a function of."""
        leaf = at.clone().requires_grad_()
        response = self._response
        for where, rise, linear in response.rises(self._model, response.start + leaf):
            yield leaf, (self._share[where] * rise - linear).sum() / response.rows


def _conjugate_gradients(
    product: Callable[[torch.Tensor], torch.Tensor], right: torch.Tensor, tolerance: float
) -> torch.Tensor:
    """An approximate solution of product(x) = right; at negative curvature the one so far, or `right` itself."""
    x, residual = torch.zeros_like(right), right
    direction, rho = right, float(right @ right)
    goal = tolerance**2 * rho
    for step in range(min(INNER_STEPS, 2 * len(right) + 10)):
        image = product(direction)
        curvature = float(direction @ image)
        if not curvature > 0:
            # Truncated Newton: before the first step, steepest descent.
            return x if step else right
        alpha = rho / curvature
        x, residual = x + alpha * direction, residual - alpha * image
        following = float(residual @ residual)
        if following <= goal:
            break
        direction, rho = residual + following / rho * direction, following
    return x


def _line_search(
    objective: _Objective, at: torch.Tensor, value: float, gradient: torch.Tensor, direction: torch.Tensor
) -> tuple[torch.Tensor, float, torch.Tensor] | None:
    """Halve the step until the objective falls enough, or until, within its rounding, the gradient does."""
    falls, length, steepness = float(gradient @ direction), 1.0, float(gradient.norm())
    for _ in range(HALVINGS):
        there = at + length * direction
        lower, slope = objective.value(there)
        # Armijo's rule.
        enough = lower <= value + 1e-4 * length * falls
        # The predicted fall is below what the objective can show: there the gradient decides.
        rounding = abs(length * falls) <= 1e4 * (objective.rounding + EPS * abs(value))
        if math.isfinite(lower) and (enough or (rounding and float(slope.norm()) < steepness)):
            return there, lower, slope
        length /= 2
    return None


def warn_not_converged(what: str, steps: int, slope: float, settings: ProximalSettings) -> None:
    warnings.warn(
        f"The proximal Bregman response has not converged for {what}: after {steps} steps the gradient is "
        f"{slope:.2g} of what it was, with tolerance {settings.tolerance:.2g}. More steps, more damping or a smooth "
        "activation may help.",
        NotConverged,
        stacklevel=3,
    )


def _wide(batch: TorchBatch) -> TorchBatch:
    def double(value: object) -> Any:
        return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    return TorchBatch(tree_map(double, batch.x), tree_map(double, batch.y))
