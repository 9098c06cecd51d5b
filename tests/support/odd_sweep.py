"""Odd models against the row-by-row oracle. Run as a script, prints the table of docs/reliability.md."""

from __future__ import annotations

import copy
import sys
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from layer_sweep import REFUSALS, Given, Verdict, agree, batches_do_not_matter, cell, failures, ggn, grad_dot, judge
from odd_models import CE, MODELS, Net, Odd, classes, vectors
from row_oracle import RowOracle, solved

import headwater as hw


def dual(given: Given) -> None:
    """The empirical Fisher of the oracle's own gradients."""
    grads = given.oracle.grads()
    fisher = grads.T @ grads / len(grads)
    damping = float(np.trace(fisher)) / len(fisher)
    scores = given.scores(given.fitted(hw.Dual(), 3, 2, blocks="full", damping=damping))
    agree(scores, solved(fisher, damping, grads))


def same_in_batches(method: Any) -> Callable[[Given], None]:
    def check(given: Given) -> None:
        whole, parts = (given.scores(given.fitted(method, *sizes, damping=0.1)) for sizes in ((5,), (3, 2)))
        agree(parts, whole, 1e-8)

    return check


GRADIENTS_ALONE = {
    "gradients": grad_dot,
    "dual": dual,
    "datainf": same_in_batches(hw.DataInf()),
    "logra": same_in_batches(hw.LoGra(2)),
    "ekfac of labels": same_in_batches(hw.Ekfac(fisher="empirical")),
}
OF_ONE_TENSOR = {
    "gradients": grad_dot,
    "ggn": ggn(hw.Direct()),
    "cg": ggn(hw.Cg(tolerance=1e-10), 1e-6),
    "ekfac": batches_do_not_matter,
}


def verdicts(odd: Odd) -> dict[str, Verdict]:
    checks = REFUSALS if odd.refused else OF_ONE_TENSOR if odd.one_tensor else GRADIENTS_ALONE
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, check in checks.items():
            model, x, y = odd.build()
            plain = odd.truth()
            found[name] = judge(check, Given(model, plain, x, y, odd.loss), wrapped=False)
            if not odd.after(model):
                found[f"{name}, afterwards"] = Verdict("wrong", "the model was changed")
    return found


# The caller's surroundings --------------------------------------------------------------------------------------------


def single() -> tuple[Net, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return Net().float().eval(), vectors().float(), classes()


class OnlyInside(torch.nn.Module):
    """The model's call under autocast; nothing else."""

    def __init__(self, inner: torch.nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.inner(x).float()


def under_autocast(method: Any, curvature: str) -> Callable[[Given], None]:
    """The truth is rounded as the model's call is, row by row: half precision has three digits."""

    def check(given: Given) -> None:
        oracle = RowOracle(OnlyInside(given.plain), CE, given.x, given.y, 5)
        grads, settings, wanted = oracle.grads().astype(np.float64), {}, None
        if curvature:
            matrix = grads.T @ grads / 5 if curvature == "fisher" else oracle.ggn().astype(np.float64)
            settings["damping"] = float(np.trace(matrix)) / len(matrix)
            wanted = solved(matrix, settings["damping"], grads)
        with torch.autocast("cpu", torch.bfloat16):
            scores = given.scores(given.fitted(method, 3, 2, blocks="full", **settings))
        agree(scores, grads @ grads.T if wanted is None else wanted, 0.05)

    return check


def same_under_autocast(method: Any) -> Callable[[Given], None]:
    """No truth at hand: close to what it is without."""

    def check(given: Given) -> None:
        wanted = given.scores(given.fitted(method, 3, 2, damping=0.1))
        with torch.autocast("cpu", torch.bfloat16):
            agree(given.scores(given.fitted(method, 3, 2, damping=0.1)), wanted, 0.05)

    return check


AUTOCAST = {
    "gradients": under_autocast(hw.GradDot(), ""),
    "ggn": under_autocast(hw.Direct(), "ggn"),
    "cg": under_autocast(hw.Cg(), "ggn"),
    "dual": under_autocast(hw.Dual(), "fisher"),
    **{
        type(m).__name__.lower(): same_under_autocast(m)
        for m in (hw.Ekfac(), hw.Kfac(), hw.DataInf(), hw.LoGra(2), hw.Arnoldi(rank=5), hw.Trak(dimension=None))
    },
}


def autocast_verdicts() -> dict[str, Verdict]:
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, check in AUTOCAST.items():
            model, x, y = single()
            found[name] = judge(check, Given(model, copy.deepcopy(model), x, y, CE), wrapped=False)
    return found


def at_once(*work: Callable[[], None]) -> None:
    """In threads; the first error of any is raised here."""
    errors: list[Exception] = []

    def guarded(task: Callable[[], None]) -> None:
        try:
            task()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(task,)) for task in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def in_threads(same_model: bool, check: Callable[[Given], None]) -> Callable[[Given], None]:
    def both(given: Given) -> None:
        def task(model: torch.nn.Module) -> Callable[[], None]:
            mine = Given(model, copy.deepcopy(given.plain), given.x, given.y, CE)

            def many_times() -> None:
                for _ in range(15):
                    check(mine)

            return many_times

        at_once(task(given.model), task(given.model if same_model else copy.deepcopy(given.model)))

    return both


def thread_verdicts() -> dict[str, Verdict]:
    found = {}
    for same in (False, True):
        for name, check in {"gradients": grad_dot, "ggn": ggn(hw.Direct())}.items():
            torch.manual_seed(0)
            model = Net().double().eval()
            given = Given(model, copy.deepcopy(model), vectors(), classes(), CE)
            found[f"{name}, {'one model' if same else 'two models'}"] = judge(in_threads(same, check), given, False)
    return found


def without_gradients(mode: Callable[[], Any]) -> Callable[[Given], None]:
    """The caller's own no_grad or inference_mode around all of it."""

    def check(given: Given) -> None:
        grads, matrix = given.oracle.grads(), given.oracle.ggn()
        damping = float(np.trace(matrix)) / len(matrix)
        with mode():
            agree(given.scores(given.fitted(hw.GradDot(), 3, 2, blocks="full")), grads @ grads.T)
            scores = given.scores(given.fitted(hw.Direct(), 3, 2, blocks="full", damping=damping))
        agree(scores, solved(matrix, damping, grads))

    return check


def caller_verdicts() -> dict[str, Verdict]:
    found = {}
    for name, mode in {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}.items():
        torch.manual_seed(0)
        model = Net().double().eval()
        given = Given(model, copy.deepcopy(model), vectors(), classes(), CE)
        found[name] = judge(without_gradients(mode), given, False)
    return found


SURROUNDINGS = {
    "the caller's autocast to bfloat16": autocast_verdicts,
    "two threads": thread_verdicts,
    "the caller's no_grad and inference_mode": caller_verdicts,
}


def sweep(words: Sequence[str] = ()) -> dict[str, dict[str, Verdict]]:
    """By model, by check; all models where no word is given."""
    tasks: dict[str, Callable[[], dict[str, Verdict]]] = {o.name: partial(verdicts, o) for o in MODELS} | SURROUNDINGS
    return {name: task() for name, task in tasks.items() if not words or any(word in name for word in words)}


def table(swept: dict[str, dict[str, Verdict]]) -> str:
    """One row for each."""
    lines = ["| model, or what is around it | answer |", "| --- | --- |"]
    return "\n".join([*lines, *(f"| {name} | {cell(found)} |" for name, found in swept.items())])


def main() -> None:
    torch.set_num_threads(1)
    start = time.process_time()
    swept = sweep(sys.argv[1:])
    bad = failures({"": swept})
    print(table(swept))
    print(f"{time.process_time() - start:.0f} CPU seconds, {len(bad)} failures", *bad, sep="\n", file=sys.stderr)
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
