"""Ways in which a row's gradient was another row's, or J not the transpose of J^T; and the laws that notice each."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import wraps
from typing import Any
from unittest.mock import patch

import numpy as np
import test_row_check as rows
import torch
from torch import nn

import headwater as hw
from headwater.errors import HeadwaterError, RowsInteract
from headwater.torch import TorchBatch, TorchComposableInfluence, TorchGradientProvider, capture, products, rowcheck
from headwater.torch import provider as providers
from headwater.torch.surroundings import SharedSwitch

Law = Callable[[], None]


def law(check: Law) -> Law:
    """In float64; a refusal counts as being off."""

    @wraps(check)
    def checked() -> None:
        torch.manual_seed(0)
        torch.set_default_dtype(torch.float64)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # of torch's nested tensors
                check()
        except (HeadwaterError, RuntimeError, AssertionError) as error:
            raise error if str(error).startswith("off by") else AssertionError(f"off by all: {error}") from error
        finally:
            torch.set_default_dtype(torch.float32)

    return checked


def right(model: nn.Module) -> None:
    x, y = rows.data()
    g = rows.by_row(model, rows.CE, x, y)
    rows.assert_near(rows.grad_dot(model, x, y), g @ g.T)


@law
def sorted_rows_have_their_own_gradients() -> None:
    x, y = rows.data()
    x[0], x[1] = x[0] / 100, x[1] * 100
    model = rows.Reordered(rows.ORDERS["sorted by length"])
    g = rows.by_row(model, rows.CE, x, y)
    rows.assert_near(rows.grad_dot(model, x, y), g @ g.T)


@law
def rows_that_count_on_others_are_refused() -> None:
    x, y = rows.data()
    try:
        rows.grad_dot(rows.Centred(detached=True), x, y)
    except RowsInteract:
        return
    raise AssertionError("off by what the other rows bring")


@law
def rules_that_raise_give_way() -> None:
    right(rows.RULES["norm over another axis"]())


@law
def rules_of_other_shapes_give_way() -> None:
    right(rows.RULES["linear of another shape"]())


@law
def a_layer_called_row_by_row_is_left_as_it_is() -> None:
    right(rows.OneByOne())


@law
def curvature_stops_where_gradients_do() -> None:
    x, y = rows.data()
    for model in (rows.StoppedInPart(), rows.Applied(rows.Through)):
        rows.assert_near(rows.direct(model, x, y), rows.expected_direct(model, x, y))


@law
def curvature_has_the_second_pass_checked() -> None:
    x, y = rows.data()
    model = rows.Applied(rows.Once)
    rows.assert_near(rows.direct(model, x, y), rows.expected_direct(model, x, y))


@law
def padding_goes_the_way_of_training() -> None:
    ids = torch.randint(1, 7, (6, 5)) * (torch.arange(5) < torch.tensor([3, 5, 2, 4, 5, 3])[:, None])
    y, model = torch.randint(3, (6,)), rows.Encoder().eval()
    g = rows.by_row(model, rows.CE, ids, y)
    rows.assert_near(rows.grad_dot(model, ids, y), g @ g.T)


@law
def autocast_reaches_the_model_alone() -> None:
    x, y = rows.data()
    inner = nn.Linear(4, 3).float()

    def scores(by_itself: bool) -> torch.Tensor:
        model = rows.UnderAutocast(inner, by_itself)
        influence = TorchComposableInfluence(model, rows.CE, hw.Kfac(), damping=0.1)
        return influence.fit([(x.float(), y)]).influences(x.float(), y).float()

    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = scores(by_itself=False)
    rows.assert_near(found, scores(by_itself=True), 1e-4)


@law
def weights_of_rows_are_no_whole_numbers() -> None:
    x, y = rows.data()
    batch = TorchBatch(x, y, weights=torch.linspace(0.1, 1.9, 20))
    model = rows.Beside(torch.arange(3))
    found, expected = (
        TorchComposableInfluence(m, rows.CE, hw.Kfac(), damping=0.1).fit([batch]).influences(x, y)
        for m in (model, model.layer)
    )
    rows.assert_near(found, expected)


LAWS: list[Law] = [
    sorted_rows_have_their_own_gradients,
    rows_that_count_on_others_are_refused,
    rules_that_raise_give_way,
    rules_of_other_shapes_give_way,
    a_layer_called_row_by_row_is_left_as_it_is,
    curvature_stops_where_gradients_do,
    curvature_has_the_second_pass_checked,
    padding_goes_the_way_of_training,
    autocast_reaches_the_model_alone,
    weights_of_rows_are_no_whole_numbers,
]


@contextmanager
def every_one_row_call_is_answered_for_all() -> Iterator[None]:
    def record_first(self: Any, batch: Any, state: Any) -> Any:
        plain = capture.record(self.model, state, self._watched, batch.x)
        self._shared_layers = tuple(plain.one_row_layers)
        return capture.record(self.model, state, self._watched, batch.x, self._shared_layers)

    with patch.object(TorchGradientProvider, "_record_first", record_first):
        yield


@contextmanager
def a_rule_that_raises_fails_the_batch() -> Iterator[None]:
    def fill(plan: Any, modules: Any, uses: Any, kept: Any = None) -> Any:
        found, _ = original(plan, modules, uses, kept)
        return found, []

    original = providers.fill_parts
    with (
        patch.object(providers, "fill_parts", fill),
        patch.object(rowcheck.RowSampler, "choose", lambda *_: None),
        patch.object(TorchGradientProvider, "_disagreeing", lambda *_: []),
    ):
        yield


MUTANTS: dict[str, Callable[[], Any]] = {
    "no row is looked at": lambda: patch.object(rowcheck.RowSampler, "choose", lambda *_: None),
    "rows are looked at in the company they came in": lambda: patch.object(
        rowcheck, "_in_other_company", lambda chosen, rows: [np.arange(chosen)]
    ),
    "a layer whose rule failed counts as zero": a_rule_that_raises_fails_the_batch,
    "every one row call is answered for all rows": every_one_row_call_is_answered_for_all,
    "forward mode is trusted": lambda: patch.object(products, "_are_transposed", lambda *_: True),
    "no random tangent is asked": lambda: patch.object(products, "_with_probe", lambda tangents: list(tangents)),
    "attention takes its fast path": lambda: patch(
        "headwater.torch.surroundings._attention_as_in_training", SharedSwitch(nullcontext)
    ),
    "autocast reaches the maths": lambda: patch.object(providers, "own_precision", lambda device: nullcontext()),
    "the first parameter decides the dtype": lambda: patch.object(
        TorchGradientProvider, "_like", property(lambda self: next(self.model.parameters()).detach())
    ),
}
