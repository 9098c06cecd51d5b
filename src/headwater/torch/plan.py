"""Which parameters of a model are attributed, how they form blocks and parts, and which layer calls fill each part."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from headwater.blocks import Block, Layout, Parameter, Part, Piece, Structure, partition
from headwater.errors import InvalidSetting, RowsInteract, UnsupportedModel
from headwater.gradients.algebra import Dense, Gradient, Sum
from headwater.gradients.outer import Outer, RowSparse
from headwater.torch.capture import Use
from headwater.torch.layers import Rule, rule_for
from headwater.torch.precision import wide


@dataclass(frozen=True)
class Source:
    """A layer that gives gradients to some parts: which of its parameters, and where its parts begin in the block."""

    layer: str
    weight: bool
    bias: bool
    block: str
    first: int


@dataclass(frozen=True)
class Plan:
    """Blocks and their layouts; the layers that fill parts; the parameters that plain autograd fills, by part."""

    layouts: OrderedDict[str, Layout]
    sources: tuple[Source, ...]
    plain: tuple[tuple[str, int, str], ...]
    """(block, part index, parameter) for parts without a layer."""

    @property
    def layers(self) -> list[str]:
        return list(OrderedDict.fromkeys(source.layer for source in self.sources))


@dataclass(frozen=True)
class Layer:
    """A layer with a rule, and the canonical names of its trainable parameters."""

    name: str
    module: nn.Module
    rule: Rule
    weight: str | None
    bias: str | None


def trainable_parameters(model: nn.Module) -> list[Parameter]:
    """Parameters that require gradients and hold numbers, tied ones once.

    Errors: InvalidSetting if there is none; UnsupportedModel for complex, sparse and lazy ones.
    """
    found = []
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        kind = "lazy" if isinstance(p, UninitializedParameter) else str(p.dtype) if p.is_complex() else str(p.layout)
        if kind != str(torch.strided):
            raise UnsupportedModel(
                f"The parameter {name} is {kind.removeprefix('torch.')}; gradients are taken by dense real ones. "
                + ("Run the model on a batch first." if kind == "lazy" else "Leave it out by requires_grad_(False).")
            )
        if p.numel():
            found.append(Parameter(name, tuple(p.shape)))
    if not found:
        raise InvalidSetting(f"{type(model).__name__} has no parameter that requires gradients: nothing to attribute.")
    return found


def check_eval(model: nn.Module) -> None:
    """Errors: RowsInteract if the model is in train mode and that matters."""
    modules = list(model.named_modules())
    mixing = [_called(name, module) for name, module in modules if mixes_rows_always(module)]
    if mixing:
        raise RowsInteract(
            f"{', '.join(mixing[:4])} has no running statistics, so that it normalises with those of the batch, also "
            "in eval mode: rows act on each other and have no gradients of their own. Train with "
            "track_running_stats=True, or use a norm of single rows."
        )
    live = [_called(name, module) for name, module in modules if module.training and differs_in_training(module)]
    if live:
        raise RowsInteract(
            f"The model is in train mode with {', '.join(live[:4])}{' ...' if len(live) > 4 else ''}: a row's gradient "
            "would depend on chance or on the other rows. Call model.eval() first."
        )


def _called(name: str, module: nn.Module) -> str:
    return f"{name or 'the model'} ({type(module).__name__})"


def mixes_rows_always(module: nn.Module) -> bool:
    """Whether it normalises with the batch's own statistics whatever its mode."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None


def differs_in_training(module: nn.Module) -> bool:
    """Whether, in train mode, it is random or lets the rows of a batch act on each other."""
    random = isinstance(module, nn.RReLU) or (isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0)
    random |= isinstance(module, (nn.MultiheadAttention, nn.RNNBase)) and module.dropout > 0
    return random or isinstance(module, nn.modules.batchnorm._BatchNorm)


def make_plan(model: nn.Module, structure: Structure, distrusted: Collection[str] = ()) -> Plan:
    """Blocks by structure; parts by layer rules, or plain autograd for `distrusted` parameters and the rest."""
    blocks = partition(trainable_parameters(model), structure)
    block_of = {p.name: block.name for block in blocks.values() for p in block.parameters}
    layers = _layers(model, {name for name in block_of if name not in distrusted})
    # Counted over all layers first: whether a bias joins its weight depends on who else uses either.
    users = _count_uses(layers)
    layouts, sources, plain = OrderedDict(), [], []
    for block in blocks.values():
        parts, own_sources, own_plain = _fill(block, layers, users, block_of)
        layouts[block.name] = Layout(block, tuple(parts))
        sources += own_sources
        plain += own_plain
    return Plan(layouts, tuple(sources), tuple(plain))


def _layers(model: nn.Module, wanted: Collection[str]) -> list[Layer]:
    # By identity: a tied parameter has one name, whichever layer holds it.
    canonical = {id(p): name for name, p in model.named_parameters()}
    found = []
    for name, module in model.named_modules():
        rule = rule_for(module)
        # A parametrised weight is computed anew at each call: what the layer holds is no parameter of the model.
        if rule is None or _is_parametrised(module):
            continue
        own = dict(module.named_parameters(recurse=False))
        weight, bias = (canonical.get(id(own.get(role))) for role in ("weight", "bias"))
        weight, bias = (n if n in wanted else None for n in (weight, bias))
        if weight is not None or bias is not None:
            found.append(Layer(name, module, rule, weight, bias))
    return found


def _is_parametrised(module: nn.Module) -> bool:
    return nn.utils.parametrize.is_parametrized(module)


def _count_uses(layers: list[Layer]) -> dict[str, int]:
    uses: dict[str, int] = {}
    for layer in layers:
        for name in (layer.weight, layer.bias):
            if name is not None:
                uses[name] = uses.get(name, 0) + 1
    return uses


def _fill(
    block: Block, layers: list[Layer], users: Mapping[str, int], block_of: Mapping[str, str]
) -> tuple[list[Part], list[Source], list[tuple[str, int, str]]]:
    parts: list[Part] = []
    sources: list[Source] = []
    at: dict[str, int] = {}
    for layer in layers:
        # By-parameter blocks may separate a weight from its bias; then each is a part of its own block.
        roles = [n if n is not None and block_of[n] == block.name else None for n in (layer.weight, layer.bias)]
        # A bias is a column of its weight only where both have this one use: uses of a tied weight must have one
        # form, or they could not be added up.
        together = all(n is not None and users[n] == 1 for n in roles)
        for weight, bias in [tuple(roles)] if together else [(roles[0], None), (None, roles[1])]:
            name = weight if weight is not None else bias
            if name is None:
                continue
            new = layer.rule.parts(layer.module, weight, bias)
            if name not in at:
                at[name] = len(parts)
                parts += new
            # Another use of a tied parameter, whose rule gives it another form: the plain way takes both.
            elif _forms(new) != _forms(parts[at[name] : at[name] + len(new)]):
                continue
            sources.append(Source(layer.name, weight is not None, bias is not None, block.name, at[name]))
    # Parameters without a rule, of any shape: one plain matrix each, filled by autograd row by row.
    filled = {piece.parameter for part in parts for piece in part.pieces}
    plain = []
    for parameter in block.parameters:
        if parameter.name not in filled:
            plain.append((block.name, len(parts), parameter.name))
            parts.append(Part(Piece(parameter.name, 0, as_matrix(parameter.shape))))
    return parts, sources, plain


def _forms(parts: list[Part]) -> list[tuple[tuple[int, int], bool]]:
    """What two uses of a parameter must share to add up."""
    return [(part.shape, part.weight.transposed) for part in parts]


def as_matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """A parameter's shape as a matrix: the first axis against the rest."""
    if len(shape) < 2:
        return (shape[0] if shape else 1), 1
    rest = 1
    for size in shape[1:]:
        rest *= size
    return shape[0], rest


def fill_parts(
    plan: Plan,
    modules: Mapping[str, nn.Module],
    uses: Iterable[tuple[Use, torch.Tensor]],
    kept: torch.Tensor | None = None,
) -> tuple[dict[tuple[str, int], Gradient], list[str]]:
    """(block, part index) to the gradient value that the layer calls give, several calls added up.

    uses: with the gradient at each use's output.
    kept [n, t]: the positions that rows have, where some are padding; for layers that work on all t of them.
    Also the layers whose rule does not apply to what they were given: it raised, or its values are of another shape.
    """
    # A layer may be called several times, and each call adds positions to the same parts.
    calls: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for use, grad in uses:
        calls.setdefault(use.layer, []).append((use.input, grad))
    found: dict[tuple[str, int], list[Gradient]] = {}
    failed: list[str] = []
    for source in plan.sources:
        module = modules[source.layer]
        rule = rule_for(module)
        assert rule is not None
        parts = plan.layouts[source.block].parts[source.first :]
        for given, grad in calls.get(source.layer, []):
            try:
                # In float32 at least: sums over positions in half precision would lose small terms.
                values = rule.values(module, wide(given), wide(grad), source.weight, source.bias)
            # Not a failed rule: falling back to plain gradients would need more memory still.
            except torch.OutOfMemoryError:
                raise
            except Exception:  # a rule that raises, of whatever kind, is a rule that does not apply
                failed.append(source.layer)
                continue
            # A subclass may put more through a layer than its type says; wrong shapes must not reach a sum over rows.
            if any(v.shape != part.shape or v.rows != len(given) for v, part in zip(values, parts, strict=False)):
                failed.append(source.layer)
                continue
            for k, value in enumerate(values):
                found.setdefault((source.block, source.first + k), []).append(without_padding(value, kept))
    return {place: add(values) for place, values in found.items()}, failed


def without_padding(value: Gradient, kept: torch.Tensor | None) -> Gradient:
    """The value with its padding marked as such, if it has as many positions as `kept` [n, t].

    Padding has no part in a row's loss: its output-gradients are zero. Its inputs could be anything.
    """
    if kept is None or not isinstance(value, (Outer, RowSparse)):
        return value
    inputs: Any
    b: Any
    inputs, b = (value.a, value.b) if isinstance(value, Outer) else (value.ids, value.values)
    # A layer that works on one position a row (a classifier's head) has no padding of its own.
    if inputs.shape[:2] != kept.shape:
        return value
    # Filled, not multiplied: 0 x inf and 0 x nan of padding would spoil the row.
    b = b.masked_fill(~kept.unsqueeze(2), 0.0)
    if isinstance(value, RowSparse):
        return replace(value, values=b, kept=kept)
    # Of whatever kind of outer products: what such a kind knows of its inputs no longer holds.
    return Outer(inputs.masked_fill(~kept.unsqueeze(2), 0.0), b, value.ones, kept)


def add(values: list[Gradient]) -> Gradient:
    """Gradients of one matrix from several calls: of one kind, more positions of it; else a sum of kinds."""
    kinds: list[Gradient] = []
    for value in values:
        for k, mine in enumerate(kinds):
            if isinstance(mine, (Outer, RowSparse)) and type(mine) is type(value):
                # Positions are joined, not matrices summed: the gradient stays a sum of outer products.
                kinds[k] = mine.join(value)  # type: ignore[arg-type]
                break
            if isinstance(mine, Dense) and isinstance(value, Dense):
                kinds[k] = Dense(mine.values + value.values)
                break
        else:
            kinds.append(value)
    return kinds[0] if len(kinds) == 1 else Sum(tuple(kinds))
