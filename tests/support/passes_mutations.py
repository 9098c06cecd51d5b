"""Ways in which passes over a loader lied, and quick laws that must notice each."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import nn

import headwater as hw
from headwater.errors import BatchMismatch, InvalidInput, NonFiniteValue, RowsNotFitted
from headwater.loaders import places
from headwater.loaders.batches import Unpacked
from headwater.loaders.keys import LoadersSeen, RowKeys, RowMemory
from headwater.run import attribute as attributing
from headwater.torch import TorchComposableInfluence
from headwater.torch import losses as torch_losses

Mutant = Callable[[], AbstractContextManager[Any]]

torch.manual_seed(0)
X, Y = torch.randn(8, 4, dtype=torch.float64), torch.arange(8) % 3
TRAIN, QUERIES = [(X[:4], Y[:4]), (X[4:], Y[4:])], [(X[:2] + 1, Y[:2])]


class Changing:
    def __init__(self, *passes: Any):
        self.passes, self.reads = passes, 0

    def __iter__(self) -> Any:
        self.reads += 1
        return iter(self.passes[min(self.reads, len(self.passes)) - 1])


def _influence(method: Any, **options: Any) -> TorchComposableInfluence:
    return TorchComposableInfluence(nn.Linear(4, 3).double(), nn.CrossEntropyLoss(), method, damping=0.5, **options)


def _refused(what: str, kind: type[Exception], said: str, call: Callable[[], object]) -> None:
    try:
        call()
    except kind as error:
        if said in str(error):
            return
    raise AssertionError(f"off by {what}")


def rows_that_change_between_passes_are_refused() -> None:
    changed = Changing(TRAIN, [TRAIN[0], (X[4:] + 1, Y[4:])])
    _refused("other rows", BatchMismatch, "batch 1, row 0", lambda: _influence(hw.Ekfac()).fit(changed))


def a_shorter_pass_is_refused() -> None:
    _refused("rows", BatchMismatch, "4 this time", lambda: _influence(hw.Ekfac()).fit(Changing(TRAIN, TRAIN[:1])))


def a_fitted_loader_that_shuffles_is_refused() -> None:
    loader = Changing(TRAIN, TRAIN[::-1])
    fitted = _influence(hw.Direct()).fit(loader)
    _refused("the order of rows", BatchMismatch, "shuffles", lambda: fitted.attribute(loader, QUERIES))


def removal_of_rows_that_were_not_fitted_is_refused() -> None:
    fitted = _influence(hw.Direct()).fit(TRAIN)
    _refused("rows", RowsNotFitted, "row 0", lambda: fitted.attribute(QUERIES, TRAIN, unit="removal"))


def a_value_that_is_not_finite_has_a_place() -> None:
    bad = X.clone()
    bad[6, 1] = float("nan")
    rows = [(bad[:4], Y[:4]), (bad[4:], Y[4:])]
    said = "Train rows, batch 1, row 2 (row 6 of the loader)"
    _refused("its place", NonFiniteValue, said, lambda: _influence(hw.Direct()).fit(rows))


def scores_that_overflow_are_refused() -> None:
    model, rows = nn.Linear(4, 3), [(X.float() * 3e19, Y)]
    made = TorchComposableInfluence(model, nn.CrossEntropyLoss(), hw.GradDot()).fit(rows)
    _refused("infinity", NonFiniteValue, "score of query", lambda: made.attribute(rows, rows))


def targets_that_are_spread_are_refused() -> None:
    """By a loss that says nothing about it."""
    made = TorchComposableInfluence(nn.Linear(4, 1).double(), nn.PoissonNLLLoss(reduction="none"), hw.GradDot())
    y = X[:, 0].abs()
    _refused("shapes", InvalidInput, "(N, 1)", lambda: made.fit([(X, y)]).influences(X, y))


def unpacked_items_are_what_unpack_says() -> None:
    made = _influence(hw.GradDot(), unpack=lambda b: (b[0], b[1], None, b[2])).fit([(X, Y, torch.full((8,), 2.0))])
    if made.n_train != 16:
        raise AssertionError(f"off by {abs(made.n_train - 16)} rows")


def labels_of_some_rows_are_those_of_each() -> None:
    from headwater.hf.rows import Rows

    rows = Rows(columns=frozenset({"input_ids", "attention_mask"}), reads_itself=True)
    found = rows.collate([{"input_ids": [1, 2, 3]}, {"input_ids": [4, 5], "labels": [-100, 5]}])
    if "labels" not in found or found["labels"].tolist() != [[1, 2, 3], [-100, 5, -100]]:
        raise AssertionError("off by labels")


LAWS: tuple[Callable[[], None], ...] = (
    rows_that_change_between_passes_are_refused,
    a_shorter_pass_is_refused,
    a_fitted_loader_that_shuffles_is_refused,
    removal_of_rows_that_were_not_fitted_is_refused,
    a_value_that_is_not_finite_has_a_place,
    scores_that_overflow_are_refused,
    targets_that_are_spread_are_refused,
    unpacked_items_are_what_unpack_says,
    labels_of_some_rows_are_those_of_each,
)


def _replaced(owner: Any, name: str, wrong: Any) -> Mutant:
    return lambda: patch.object(owner, name, wrong)


def _without_extras(self: Unpacked) -> Any:
    return ((self.unpack(item)[:2]) for item in self.source)


def _hf_mutant() -> AbstractContextManager[Any]:
    from headwater.hf.rows import Rows

    def of_the_first(self: Any, rows: list[Any]) -> list[Any]:
        return [{name: v for name, v in row.items() if name in rows[0]} for row in rows]

    return patch.object(Rows, "_completed", of_the_first)


MUTANTS: dict[str, Mutant] = {
    "rows are not compared from pass to pass": _replaced(RowMemory, "compare", lambda self, keys, place: None),
    "the number of rows is not compared": _replaced(RowMemory, "end", lambda self, keys, role: None),
    "no loader is known again": _replaced(LoadersSeen, "memory", lambda self, loader: RowMemory()),
    "every row was fitted": _replaced(RowKeys, "among", lambda self, known: np.ones(len(self), dtype=bool)),
    "errors do not say where": _replaced(places, "raise_at", lambda error, place: None),
    "scores are not looked at": _replaced(attributing, "check_scores", lambda *given: None),
    "targets are spread over outputs": _replaced(torch_losses, "spread_in_words", lambda *given: None),
    "unpacked weights are lost": _replaced(Unpacked, "__iter__", _without_extras),
    "the first row says which columns there are": _hf_mutant,
}
