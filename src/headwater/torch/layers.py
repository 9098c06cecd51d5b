"""Layer types whose per-sample gradients follow from their input and their output-gradient.

A rule says, for one type of layer, which parts its parameters form and what gradient values fill them. A new layer
type is a new rule here. A rule reads the weight's own shape, which may be another than the module's settings say. It is
never trusted blindly: the provider compares it with autograd, so that a subclass with another forward, or a rule that
raises, falls back to plain per-sample gradients.

Layout: layer inputs x [n, *, i] and output-gradients g [n, *, o]; convolutions have channels second.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from headwater.blocks import Part, Piece
from headwater.errors import UnsupportedModel
from headwater.gradients.algebra import Dense, Gradient
from headwater.gradients.outer import Outer, RowSparse
from headwater.torch.patches import Patches, frame_of, patches
from headwater.torch.precision import wide


@dataclass(frozen=True)
class Rule:
    """How one type of layer fills its parts.

    `parts(module, weight, bias)`: names in, None for a parameter that is not wanted; parts out.
    `values(module, x, g, weight, bias)`: whether each is wanted; gradient values out, one for each part.
    """

    parts: Callable[[Any, str | None, str | None], list[Part]]
    values: Callable[[Any, torch.Tensor, torch.Tensor, bool, bool], list[Gradient]]


def matrix_parts(shape: tuple[int, int], weight: str | None, bias: str | None) -> list[Part]:
    """One part for a weight [o, i], its bias as the last column; or what there is of the two."""
    o, i = shape
    column = None if bias is None else Piece(bias, 0, (o, 1))
    if weight is None:
        return [] if column is None else [Part(column)]
    return [Part(Piece(weight, 0, (o, i)), column)]


def _outer(a: torch.Tensor, b: torch.Tensor, weight: bool, bias: bool) -> list[Gradient]:
    """a [n, t, i], b [n, t, o]."""
    if weight:
        return [Outer(a, b, ones=bias)]
    # A bias alone is [n, o] numbers: already as small as its factors.
    return [Dense(b.sum(1).unsqueeze(2))] if bias else []


def _positions(x: torch.Tensor) -> torch.Tensor:
    """[n, *, i] to [n, t, i]."""
    return x.reshape(len(x), -1, x.shape[-1]) if x.ndim > 2 else x.unsqueeze(1)


def _transposed_parts(m: Any, weight: str | None, bias: str | None) -> list[Part]:
    """Those of a linear map whose weight is kept as [i, o]."""
    # y = x W with W [i, o]: the same map as Linear, with the weight stored transposed.
    i, o = m.weight.shape
    parts = matrix_parts((o, i), weight, bias)
    return parts if weight is None else [replace(part, weight=replace(part.weight, transposed=True)) for part in parts]


LINEAR = Rule(
    parts=lambda m, weight, bias: matrix_parts(tuple(m.weight.shape), weight, bias),
    values=lambda m, x, g, weight, bias: _outer(_positions(x), _positions(g), weight, bias),
)


TRANSPOSED_LINEAR = replace(LINEAR, parts=_transposed_parts)
"""GPT-2's `Conv1D`, a linear map."""


def _conv_parts(m: Any, weight: str | None, bias: str | None) -> list[Part]:
    channels, i = len(m.weight), m.weight[0].numel()
    if m.groups == 1:
        return matrix_parts((channels, i), weight, bias)
    o = channels // m.groups
    # Each group has inputs and outputs of its own; one matrix for all would be mostly structural zeros.
    groups = [] if weight is None else [Part(Piece(weight, k * o * i, (o, i))) for k in range(m.groups)]
    return groups + matrix_parts((channels, 1), None, bias)


def _conv_values(m: Any, x: torch.Tensor, g: torch.Tensor, weight: bool, bias: bool) -> list[Gradient]:
    # [n, o, *space] to [n, t, o]: every output position of the kernel is one position of the sum.
    b = g.flatten(2).transpose(1, 2)
    if not weight:
        return _outer(b, b, False, bias)
    a = patches(m, x)
    if m.groups == 1:
        frame = frame_of(m, x)
        return [Outer(a, b, ones=bias) if frame is None else Patches(a, b, ones=bias, image=x, frame=frame)]
    groups: list[Gradient] = [
        # Contiguous: chunks of one array would be read with strides at every ghost product.
        Outer(a_k.contiguous(), b_k.contiguous())
        for a_k, b_k in zip(a.chunk(m.groups, dim=2), b.chunk(m.groups, dim=2), strict=True)
    ]
    return groups + _outer(b, b, False, bias)


CONVOLUTION = Rule(parts=_conv_parts, values=_conv_values)


def _embedding_parts(m: Any, weight: str | None, bias: str | None) -> list[Part]:
    # Refused, not left to plain gradients: autograd's gradient is of another function than the forward pass, too.
    if m.max_norm is not None or m.scale_grad_by_freq:
        option = "max_norm" if m.max_norm is not None else "scale_grad_by_freq"
        raise UnsupportedModel(
            f"Embedding({option}=...) changes the weights in its forward pass, or mixes the rows of a batch; "
            "attribute the model without it."
        )
    return [] if weight is None else [Part(Piece(weight, 0, tuple(m.weight.shape)))]


def _embedding_values(m: Any, x: torch.Tensor, g: torch.Tensor, weight: bool, bias: bool) -> list[Gradient]:
    ids = x.reshape(len(x), -1).long()
    values = g.reshape(*ids.shape, -1)
    if m.padding_idx is not None:
        # As torch has it: the padding row gets no gradient, though its output-gradient need not be zero.
        values = values * (ids != m.padding_idx).unsqueeze(-1)
    return [RowSparse(ids, values, len(m.weight))]


EMBEDDING = Rule(parts=_embedding_parts, values=_embedding_values)


def _affine_parts(m: Any, weight: str | None, bias: str | None) -> list[Part]:
    """Scale and shift as one column vector [2c, 1], the shift below: small enough for an exact block."""
    size = (m.weight if m.weight is not None else m.bias).numel()
    low = None if bias is None else Piece(bias, 0, (size, 1))
    if weight is None:
        return [] if low is None else [Part(low)]
    return [Part(Piece(weight, 0, (size, 1)), low, below=low is not None)]


def _affine(normalise: Callable[[Any, torch.Tensor], torch.Tensor], channels_last: bool) -> Rule:
    def values(m: Any, x: torch.Tensor, g: torch.Tensor, weight: bool, bias: bool) -> list[Gradient]:
        n, size = len(g), (m.weight if m.weight is not None else m.bias).numel()
        shape, axis = ((n, -1, size), 1) if channels_last else ((n, size, -1), 2)
        parts = []
        if weight:
            # y = scale * z + shift: the gradients are sums of g z and of g over positions, 2 c numbers a row.
            parts.append((g * normalise(m, x)).reshape(shape).sum(axis))
        if bias:
            parts.append(g.reshape(shape).sum(axis))
        return [Dense(torch.cat(parts, dim=1).unsqueeze(2))]

    return Rule(parts=_affine_parts, values=values)


LAYER_NORM = _affine(lambda m, x: F.layer_norm(x, m.normalized_shape, None, None, m.eps), channels_last=True)
# f(1) - f(0) is what the weight multiplies, whatever else the class adds: it is affine in the weight.
OWN_RMS_NORM = _affine(lambda m, x: _with_weight(m, 1.0, x) - _with_weight(m, 0.0, x), channels_last=True)
"""A model's own class, which may add to its weight or normalise in another precision; only affine in the weight."""
RMS_NORM = _affine(lambda m, x: F.rms_norm(x, m.normalized_shape, None, m.eps), channels_last=True)
GROUP_NORM = _affine(lambda m, x: F.group_norm(x, m.num_groups, None, None, m.eps), channels_last=False)
BATCH_NORM = _affine(
    # With running statistics (eval mode): batch statistics would let rows act on each other, and are refused.
    lambda m, x: F.batch_norm(x, wide(m.running_mean), wide(m.running_var), None, None, False, 0.0, m.eps),
    channels_last=False,
)
INSTANCE_NORM = _affine(
    lambda m, x: F.instance_norm(
        x, m.running_mean, m.running_var, None, None, m.training or not m.track_running_stats, 0.0, m.eps
    ),
    channels_last=False,
)


def _with_weight(m: nn.Module, value: float, x: torch.Tensor) -> torch.Tensor:
    """The layer on x, with a weight of this number all over."""
    weight = torch.full_like(m.weight, value, dtype=x.dtype)  # type: ignore[arg-type]
    return torch.func.functional_call(m, {"weight": weight}, (x,))


RULES: dict[type[nn.Module], Rule] = {
    nn.Linear: LINEAR,
    nn.Conv1d: CONVOLUTION,
    nn.Conv2d: CONVOLUTION,
    nn.Conv3d: CONVOLUTION,
    nn.Embedding: EMBEDDING,
    nn.LayerNorm: LAYER_NORM,
    nn.RMSNorm: RMS_NORM,
    nn.GroupNorm: GROUP_NORM,
    nn.BatchNorm1d: BATCH_NORM,
    nn.BatchNorm2d: BATCH_NORM,
    nn.BatchNorm3d: BATCH_NORM,
    nn.InstanceNorm1d: INSTANCE_NORM,
    nn.InstanceNorm2d: INSTANCE_NORM,
    nn.InstanceNorm3d: INSTANCE_NORM,
}


RULES_BY_NAME: dict[str, Rule] = {"transformers.pytorch_utils.Conv1D": TRANSPOSED_LINEAR}
"""Layers of libraries that are not imported here."""


def rule_for(module: nn.Module) -> Rule | None:
    """The rule of the nearest known base class; lazy and transposed layers have none."""
    kind: Any = type(module)
    known, rule = _rule_of(kind)
    return rule if known or not _is_own_rms_norm(module) else OWN_RMS_NORM


@lru_cache(maxsize=1024)
def _rule_of(kind: type[nn.Module]) -> tuple[bool, Rule | None]:
    """Whether the class says what the rule is, and the rule."""
    # A transposed convolution is a subclass of the convolutions' base and would take their rule.
    if issubclass(kind, (nn.modules.lazy.LazyModuleMixin, nn.modules.conv._ConvTransposeNd)):
        return True, None
    found = (RULES.get(base) or RULES_BY_NAME.get(f"{base.__module__}.{base.__qualname__}") for base in kind.__mro__)
    rule = next((rule for rule in found if rule is not None), None)
    return rule is not None, rule


def _is_own_rms_norm(module: nn.Module) -> bool:
    own = dict(module.named_parameters())
    # By name and shape, as every model library has its own class; a wrong guess is found by the row checks.
    return [*own] == ["weight"] and own["weight"].ndim == 1 and type(module).__name__.endswith("RMSNorm")
