"""Every layer of torch.nn, as it is and changed in the ways that people change layers, against a row-by-row oracle.

The truth is autograd on one row at a time, in float64, on a plain copy of the model; nothing of headwater is used for
it. Run as a script, prints the table of docs/reliability.md; with words, the cases whose names have them.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import logging
import re
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from layer_cases import CASES, Case, Model, Twice, build
from row_oracle import RowOracle, solved, some
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

import headwater as hw
from headwater.errors import HeadwaterError
from headwater.torch import TorchComposableInfluence

LOSS = nn.CrossEntropyLoss()
TOLERANCE = 1e-7
"""Relative to the largest number of the truth."""


# What is asked of headwater -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Given:
    """A model as the user has it, and a plain copy that gives the same numbers."""

    model: nn.Module
    plain: nn.Module
    x: Any
    y: Any
    loss: Callable[[Any, Any], torch.Tensor] = LOSS

    def fitted(self, method: Any, *sizes: int, **settings: Any) -> Any:
        """On batches of these sizes."""
        ends = np.cumsum([0, *sizes])
        pieces = [slice(a, b) for a, b in itertools.pairwise(ends)]
        influence = TorchComposableInfluence(self.model, self.loss, method, **settings)
        return influence.fit([(some(self.x, s), some(self.y, s)) for s in pieces])

    def scores(self, influence: Any) -> np.ndarray:
        return influence.influences(self.x, self.y, self.x, self.y).numpy()

    def first(self, rows: int) -> Given:
        return replace(self, x=some(self.x, slice(rows)), y=some(self.y, slice(rows)))

    @property
    def oracle(self) -> RowOracle:
        return RowOracle(self.plain, self.loss, self.x, self.y, len(tree_leaves(self.y)[0]))


class Wrong(Exception):
    """A number that is not the truth's."""


def agree(got: np.ndarray, wanted: np.ndarray, tolerance: float = TOLERANCE) -> None:
    gap = float(np.abs(got - wanted).max() / max(np.abs(wanted).max(), 1e-30))
    if not gap <= tolerance:
        raise Wrong(f"off by {gap:.1g}")


def grad_dot(given: Given) -> None:
    """In full, and by layer, whose blocks add up to the same; by batches, and all at once."""
    grads = given.oracle.grads()
    for blocks in ("full", "layer"):
        influence = given.fitted(hw.GradDot(), 3, 2, blocks=blocks)
        agree(given.scores(influence), grads @ grads.T)
        last = some((given.x, given.y), slice(3, 5))
        agree(influence.influences(given.x, given.y, *last).numpy(), (grads @ grads.T)[:, 3:])


def one_grad_dot(given: Given) -> None:
    grads = given.oracle.grads()
    agree(given.scores(given.fitted(hw.GradDot(), 3, 2, blocks="full")), grads @ grads.T)


def ggn(method: Any, tolerance: float = TOLERANCE) -> Callable[[Given], None]:
    def check(given: Given) -> None:
        """Damped by the size of the eigenvalues: neither the gradients nor the curvature alone would do."""
        matrix, grads = given.oracle.ggn(), given.oracle.grads()
        damping = float(np.trace(matrix)) / len(matrix)
        scores = given.scores(given.fitted(method, 3, 2, blocks="full", damping=damping))
        agree(scores, solved(matrix, damping, grads), tolerance)

    return check


def hessian(given: Given) -> None:
    """On two rows, since the truth is slow; damped beyond the most negative eigenvalue."""
    given = given.first(2)
    method = hw.Direct("hessian", allow_indefinite=True)
    try:
        matrix = given.oracle.hessian()
    except RuntimeError as error:
        given.scores(given.fitted(method, 1, 1, blocks="full", damping=1.0))
        raise Wrong(f"a number, where torch has no second derivative: {error}") from None
    damping = 2 * float(np.abs(np.linalg.eigvalsh(matrix)).max())
    scores = given.scores(given.fitted(method, 1, 1, blocks="full", damping=damping))
    agree(scores, solved(matrix, damping, given.oracle.grads()))


def batches_do_not_matter(given: Given) -> None:
    whole, parts = (given.scores(given.fitted(hw.Ekfac(), *sizes, damping=0.1)) for sizes in ((5,), (3, 2)))
    agree(parts, whole, 1e-8)


def asked(method: Any) -> Callable[[Given], None]:
    """For rows that have no gradients of their own: there is no right number."""

    def check(given: Given) -> None:
        given.scores(given.fitted(method, 3, 2, damping=0.1))
        raise Wrong("a number where there is none")

    return check


CHECKS: dict[str, Callable[[Given], None]] = {
    "gradients": grad_dot,
    "ggn": ggn(hw.Direct()),
    "cg": ggn(hw.Cg(tolerance=1e-10), 1e-6),
    "hessian": hessian,
    "ekfac": batches_do_not_matter,
}
QUICK = {"gradients": one_grad_dot, "ggn": ggn(hw.Direct())}
REFUSALS = {"gradients": asked(hw.GradDot()), "ggn": asked(hw.Direct()), "ekfac": asked(hw.Ekfac())}
SMALL = 120
"""Up to so many parameters the Hessian is built."""


# Variations -----------------------------------------------------------------------------------------------------------


COMPILER = shutil.which("g++") or shutil.which("c++")


class NotHere(Exception):
    """The variation means nothing for this case."""


def layers_of(model: nn.Module, case: Case) -> list[nn.Module]:
    """The modules that the case is about."""
    return [m for m in model.modules() if isinstance(m, case.covers)] or [model.layer]


def as_it_is(model: nn.Module, case: Case, x: Any) -> Any:
    """Plain copy and model are equal, if not the same."""
    return copy.deepcopy(model), model


def subclassed(model: nn.Module, case: Case, x: Any) -> Any:
    """Its class gets a subclass whose forward changes what goes in and what comes out."""

    def change(t: Any) -> Any:
        return t + 0.3 * torch.sin(t) if isinstance(t, torch.Tensor) and t.is_floating_point() else t

    for layer in layers_of(model, case):
        known = type(layer)

        def forward(self: Any, *args: Any, known: Any = known, **kwargs: Any) -> Any:
            first = args[0].flip(-1) if args[0].dim() > 1 and known.__name__ not in ("EmbeddingBag",) else args[0]
            return tree_map(change, known.forward(self, first, *args[1:], **kwargs))

        layer.__class__ = type(f"Own{known.__name__}", (known,), {"forward": forward})
    return copy.deepcopy(model), model


def frozen(role: str) -> Callable[[nn.Module, Case, Any], Any]:
    def freeze(model: nn.Module, case: Case, x: Any) -> Any:
        own = [(n, p) for layer in layers_of(model, case) for n, p in layer.named_parameters()]
        chosen = [p for n, p in own if role in n.rpartition(".")[2]]
        if not chosen or len(chosen) == len({id(p) for _, p in own}):
            raise NotHere
        for p in chosen:
            p.requires_grad_(False)
        return copy.deepcopy(model), model

    return freeze


def twice(model: Model, case: Case, x: Any) -> Any:
    found = Twice(model, None)
    return copy.deepcopy(found), found


def shared(model: Model, case: Case, x: Any) -> Any:
    """The same layer under two names."""
    found = Twice(model, model.layer)
    return copy.deepcopy(found), found


def tied(model: Model, case: Case, x: Any) -> Any:
    """Another layer with the same parameters."""
    if not list(model.layer.parameters()) or nn.utils.parametrize.is_parametrized(model.layer):
        raise NotHere
    found = Twice(model, copy.deepcopy(model.layer, {id(p): p for p in model.layer.parameters()}))
    return copy.deepcopy(found), found


class ReverseOnly(torch.autograd.Function):
    """The identity, as older code defines operations: no forward mode, no vmap."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad


class Reversed(nn.Module):
    def __init__(self, tail: nn.Module):
        super().__init__()
        self.inner = tail

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(ReverseOnly.apply(x))


def reverse_only(model: Model, case: Case, x: Any) -> Any:
    plain = copy.deepcopy(model)
    model.tail = Reversed(model.tail)
    return plain, model


def compiled(backend: str, part: str = "") -> Callable[[nn.Module, Case, Any], Any]:
    """The whole model, the layer alone, or the whole in place."""

    def compile_it(model: Model, case: Case, x: Any) -> Any:
        if backend == "inductor" and not COMPILER:
            raise NotHere
        plain = copy.deepcopy(model)
        torch._dynamo.reset()
        if part == "layer":
            model.layer = torch.compile(model.layer, backend=backend)
        elif part == "in place":
            model.compile(backend=backend)
        else:
            return plain, torch.compile(model, backend=backend)
        return plain, model

    return compile_it


def scripted(part: str) -> Callable[[nn.Module, Case, Any], Any]:
    def script(model: Model, case: Case, x: Any) -> Any:
        plain = copy.deepcopy(model)
        try:
            if part == "layer":
                model.layer = torch.jit.script(model.layer)
                return plain, model
            return plain, torch.jit.script(model)
        except Exception:
            raise NotHere from None

    return script


def parallel(model: nn.Module, case: Case, x: Any) -> Any:
    return copy.deepcopy(model), nn.DataParallel(model)


@dataclass(frozen=True)
class Variation:
    name: str
    change: Callable[[Any, Case, Any], tuple[nn.Module, nn.Module]]
    """To a plain copy and the model that is given."""
    thorough: bool = False
    """On every setting of a layer with parameters, not on one for each class."""
    wrapped: bool = False
    """A refusal has to say how to get at the model inside."""
    only: Sequence[str] = ()
    """The cases that it is tried on, where it is slow."""


A_FEW = ["Linear(3, 2)", "Conv1d(2, 4, 2)", "LayerNorm(4)", "Embedding(5, 3)", "LSTM(3, 2, batch_first=True)"]
"""Compiling takes seconds each."""

VARIATIONS = [
    Variation("as is", as_it_is),
    Variation("subclassed", subclassed, thorough=True),
    Variation("bias frozen", frozen("bias")),
    Variation("weight frozen", frozen("weight")),
    Variation("used twice", twice),
    Variation("two names", shared),
    Variation("tied", tied),
    Variation("reverse only", reverse_only),
    Variation("scripted", scripted("model"), wrapped=True),
    Variation("scripted layer", scripted("layer"), wrapped=True),
    Variation("DataParallel", parallel, wrapped=True),
    Variation("compiled", compiled("eager"), wrapped=True, only=A_FEW),
    Variation("compiled layer", compiled("eager", "layer"), wrapped=True, only=A_FEW),
    Variation("compiled in place", compiled("eager", "in place"), wrapped=True, only=A_FEW),
    Variation("aot_eager", compiled("aot_eager"), wrapped=True, only=A_FEW),
    Variation("aot_eager layer", compiled("aot_eager", "layer"), wrapped=True, only=A_FEW),
    Variation("inductor", compiled("inductor"), wrapped=True, only=A_FEW[:1]),
    Variation("inductor layer", compiled("inductor", "layer"), wrapped=True, only=A_FEW[:1]),
]

INSIDE = re.compile(r"model\.module|\._orig_mod|[Pp]ass the module that")


# Verdicts -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """right, refused, wrong, or raw (an error that is not headwater's own); what was said."""

    kind: str
    said: str = ""

    @property
    def fails(self) -> bool:
        return self.kind in ("wrong", "raw")


def judge(check: Callable[[Given], None], given: Given, wrapped: bool) -> Verdict:
    try:
        check(given)
    except Wrong as gap:
        return Verdict("wrong", str(gap))
    except HeadwaterError as error:
        told = str(error)
        if wrapped and not INSIDE.search(told):
            return Verdict("raw", f"a refusal that does not say how to get at the model inside: {told}")
        return Verdict("refused", f"{type(error).__name__}: {told}") if told else Verdict("raw", "an empty message")
    except Exception as error:
        return Verdict("raw", f"{type(error).__name__}: {error}")
    return Verdict("right")


def is_first(case: Case) -> bool:
    """Of its class: the setting that everything is tried on."""
    return case is next(c for c in CASES if c.covers is case.covers)


def applies(variation: Variation, case: Case) -> bool:
    if case.refused or variation.change is as_it_is:
        return variation.change is as_it_is
    if variation.only:
        return case.name in variation.only
    return is_first(case) or (variation.thorough and any(True for _ in case.make().parameters()))


def checks_of(variation: Variation, case: Case) -> dict[str, Callable[[Given], None]]:
    if case.refused:
        return REFUSALS
    if variation.change is not as_it_is:
        return QUICK
    return CHECKS if is_first(case) else {"gradients": grad_dot, "ggn": CHECKS["ggn"]}


def verdicts(case: Case, variation: Variation) -> dict[str, Verdict]:
    """By check; empty where the variation means nothing, or is tried on another setting of the layer."""
    found: dict[str, Verdict] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if not applies(variation, case):
            return {}
        for name, check in checks_of(variation, case).items():
            model, x, y = build(case)
            if name == "hessian" and sum(p.numel() for p in model.parameters()) > SMALL:
                continue
            try:
                plain, model = variation.change(model, case, x)
            except NotHere:
                return {}
            found[name] = judge(check, Given(model, plain, x, y), variation.wrapped)
    return found


Swept = dict[str, dict[str, dict[str, Verdict]]]
"""By case, by variation, by check."""


def sweep(words: Sequence[str] = (), variations: Sequence[str] = ()) -> Swept:
    """Every case whose name has one of the words, in the variations of these names; all of them where none is given."""
    return {
        case.name: {v.name: verdicts(case, v) for v in VARIATIONS if not variations or v.name in variations}
        for case in CASES
        if not words or any(word in case.name for word in words)
    }


def failures(swept: Mapping[str, Mapping[str, Mapping[str, Verdict]]]) -> list[str]:
    return [
        f"{case} | {variation} | {check} | {verdict.kind} | {verdict.said[:400]}"
        for case, by_variation in swept.items()
        for variation, found in by_variation.items()
        for check, verdict in found.items()
        if verdict.fails
    ]


# The table ------------------------------------------------------------------------------------------------------------


def cell(found: Mapping[str, Verdict]) -> str:
    """In short: empty if it was not tried."""
    answers = {
        check: v.kind if v.kind != "refused" else f"refused ({v.said.partition(':')[0]})" for check, v in found.items()
    }
    first = next(iter(answers.values()), "")
    others = [f"{check} {answer}" for check, answer in answers.items() if answer != first]
    return "; ".join([first, *others])


SHORT = {"right": "✓", "refused (UnsupportedModel)": "U", "refused (RowsInteract)": "R"}
"""What a cell says, in one sign; other answers are spelt out."""


def short(answer: str) -> str:
    for long, sign in SHORT.items():
        answer = answer.replace(long, sign)
    return answer


def table(swept: Swept, compiling: bool) -> str:
    """Of the columns about compiling, or of the others.

    A class has the row of its first setting; others have one where they have another answer. Equal rows are one.
    """
    names = [v.name for v in VARIATIONS if bool(v.only) == compiling]
    rows = {case.name: tuple(cell(swept[case.name][n]) for n in names) for case in CASES if case.name in swept}
    firsts = {case.covers: rows[case.name] for case in CASES if case.name in rows and is_first(case)}
    merged: dict[tuple[str, ...], list[str]] = {}
    for case in CASES:
        row = rows.get(case.name, ())
        if not any(row):
            continue
        if is_first(case) and f"{case.covers.__name__}(" in case.name:
            merged.setdefault(row, []).append(case.covers.__name__)
        elif is_first(case) or not _agree(row, firsts.get(case.covers, row)):
            merged.setdefault(row, []).append(f"`{case.name}`")
    lines = [(*names, "layers"), ("---",) * (1 + len(names))]
    lines += [(*(short(answer or "-") for answer in row), ", ".join(layers)) for row, layers in merged.items()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _agree(row: Sequence[str], first: Sequence[str]) -> bool:
    """Where both were tried; fewer checks are made on the settings after the first."""
    return all(
        not one or not two or two == one or two.startswith(f"{one};") for one, two in zip(row, first, strict=True)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("words", nargs="*", help="words in the names of cases; all without")
    parser.add_argument("--variations", default="", help="some of them, with commas")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    start = time.process_time()
    swept = sweep(chosen.words, list(filter(None, chosen.variations.split(","))))
    bad = failures(swept)
    print(table(swept, compiling=False), table(swept, compiling=True), sep="\n\n")
    print(f"{time.process_time() - start:.0f} CPU seconds, {len(bad)} failures", *bad, sep="\n", file=sys.stderr)
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
