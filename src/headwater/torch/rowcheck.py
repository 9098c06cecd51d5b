"""Is what the layer rules give really each row's gradient? Autograd answers for many rows at once.

1. With random weights w, the sum of w_i g_i must be autograd's gradient of the sum of w_i l_i: one backward pass sees
   all of them, and rows that were mixed up, routed or left out do not cancel.
2. Autograd takes these rows in another order and in other company than the batch they came in, so that outputs which
   depend on either are seen, too.
3. Parameters that disagree are looked at row by row. Where that agrees with autograd, the layer's rule was wrong, and
   plain gradients replace it; where not, rows act on each other.
4. Below float64 a gate may flip by rounding, so that what disagrees is looked at again in float64.

It is done on the first batch of each pass, and now and then on later ones.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from random import Random
from typing import Any

import numpy as np
import torch
from torch import nn

from headwater.arrays import summed
from headwater.gradients.block import BlockGradient
from headwater.torch.batch import TorchBatch
from headwater.torch.capture import own_leaves, run
from headwater.torch.check import check_independence, check_rows, close, rounding_of
from headwater.torch.tree import dense

Score = Callable[[Any, np.ndarray], torch.Tensor]
"""(output of some rows, their numbers in the batch) -> a number for each: what is differentiated."""

WORK = 2**20
"""Multiply-adds of gradients up to which all rows of a batch are looked at; of larger ones a part."""
FEW = 4
"""Rows that are looked at however large the model is."""
LATER = 1 / 16
"""Share of the later batches of a pass that are looked at, a 16th of their rows each."""


def coarse(kind: torch.dtype) -> torch.dtype:
    """What sums are compared in: a model may compute parts in float32 whatever its parameters are.

    A wrong rule, and rows that act on each other, are off by far more.
    """
    return torch.float32 if kind == torch.float64 else kind


class RowSampler:
    """Which rows of which batches are looked at; seeded."""

    def __init__(self) -> None:
        self._random = Random(0)  # the standard library's: numpy.random takes 25 CPU ms to import
        self._seen: set[Any] = set()

    def begin_pass(self) -> None:
        self._seen.clear()

    def choose(self, rows: int, work: int, what: object) -> np.ndarray | None:
        """Numbers of rows in random order, or None for a batch that is left alone.

        work: multiply-adds for one row. what: is differentiated; the first batch for each is looked at.
        """
        # The first batch always; later ones by chance, as a model may route rows differently further on.
        first = what not in self._seen
        self._seen.add(what)
        if not first and self._random.random() >= LATER:
            return None
        # A check as dear as the gradients themselves would double every pass.
        count = min(rows, max(FEW, WORK // max(work, 1)))
        if not first:
            count = min(count, max(FEW, rows // 16))
        # In random order: step 2 of the module's text needs other neighbours than the batch had.
        return np.array(self._random.sample(range(rows), count))


def random_weights(values: Iterable[BlockGradient], seed: int) -> torch.Tensor:
    """Random signs and sizes [n], larger for rows with small gradients, so that these are seen beside others."""
    # Over all blocks of a row: the weight belongs to the row.
    norms: torch.Tensor = summed(value.squared_norms() for value in values).sqrt()
    largest = norms.max().clamp(min=torch.finfo(norms.dtype).tiny)
    random = torch.Generator().manual_seed(seed)
    # Random sizes beside signs: with signs alone, two rows that were swapped cancel half of the time.
    drawn = 2 * torch.rand(len(norms), generator=random, dtype=torch.float64) - 1
    drawn += 0.5 * torch.where(drawn < 0, -1.0, 1.0)
    # At most a thousandfold, lest rounding of tiny rows look like a fault.
    return drawn.to(norms) / (norms / largest).clamp(min=1e-3)


def weighted_sums(values: Mapping[str, BlockGradient], weights: torch.Tensor) -> dict[str, torch.Tensor]:
    """sum_i w_i g_i as the values have it, by parameter, flat."""
    found = {}
    for value in values.values():
        flat = value.combine(weights[None].to(value.like.dtype))[0]
        parameters = value.layout.block.parameters
        for parameter, piece in zip(parameters, flat.split([p.size for p in parameters]), strict=True):
            found[parameter.name] = piece
    return found


def autograd_sums(
    model: nn.Module,
    names: Collection[str],
    batch: TorchBatch,
    rows: np.ndarray,
    weights: torch.Tensor,
    score: Score,
    output: object,
    kind: torch.dtype,
) -> dict[str, torch.Tensor]:
    """sum_i w_i grad l_i by autograd on the model's own parameters, flat; `rows` [s] in their order, weights [s].

    output: of the whole batch, which must not differ. kind: the dtype that was computed in.
    Errors: RowsInteract where it does; UnsupportedModel for outputs that are not of rows.
    """
    # The model's own parameters: a call with swapped ones is what is under suspicion.
    state, parameters = own_leaves(model, names)
    total: dict[str, torch.Tensor] = {}
    for part in _in_other_company(len(rows), len(batch)):
        chosen = batch.take(rows[part])
        found = run(model, state, chosen.x)
        check_rows(found, len(chosen))
        # Outputs first: where they depend on the company, gradients do too, and the message is clearer.
        check_independence(output, found, rows[part], kind)
        value = score(found, rows[part])
        value = (value * weights[torch.as_tensor(part, device=weights.device)].to(value.dtype)).sum()
        # A score may not depend on any parameter at all, as where a mask hides the row.
        if not value.requires_grad:
            continue
        grads = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
        for name, grad in zip(parameters, grads, strict=True):
            if grad is not None:
                flat = dense(grad).reshape(-1)
                total[name] = total[name] + flat if name in total else flat
    return {name: total[name] if name in total else p.new_zeros(p.numel()) for name, p in parameters.items()}


def _in_other_company(chosen: int, rows: int) -> list[np.ndarray]:
    """The chosen rows at once, if there are others; else in two halves."""
    every = np.arange(chosen)
    # The whole batch again would be the same company: rows that act on each other would still agree.
    return [every] if chosen < rows or rows == 1 else [every[: chosen // 2], every[chosen // 2 :]]


def disagreeing(got: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], kind: torch.dtype) -> list[str]:
    """Parameters whose sums are not autograd's, beyond the rounding of `kind`."""
    truth = torch.cat(list(expected.values()))
    mine = torch.cat([got[name].to(truth.dtype) for name in expected])
    # Absolute for each parameter: one with a gradient of zero has nothing of its own to be relative to.
    floor = _norm(truth)
    if _norm(mine - truth) <= rounding_of(kind) * floor:  # all at once, as nearly always
        return []
    return [name for name, truth in expected.items() if not close(got[name].to(truth.dtype), truth, floor, kind)]


def _norm(vector: torch.Tensor) -> float:
    """Added up in double, without a copy in double."""
    return float(torch.linalg.vector_norm(vector, dtype=torch.float64))
