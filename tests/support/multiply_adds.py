"""Multiply-adds of all matrix products that torch makes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
OPERANDS = {aten.mm: (0, 1), aten.bmm: (0, 1), aten.addmm: (1, 2), aten.addmm_: (1, 2), aten.baddbmm: (1, 2)}
"""Of each kind of product, which two arguments are multiplied."""


class counted(TorchDispatchMode):  # noqa: N801  (used as a function: `with counted() as products`)
    """What is multiplied inside, `multiply_adds`; and the largest array that a product makes, `largest`, in numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.multiply_adds = self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        operands = OPERANDS.get(func.overloadpacket)
        if operands is not None:
            left, right = (args[k] for k in operands)
            self.multiply_adds += math.prod(left.shape) * int(right.shape[-1])
            self.largest = max(self.largest, math.prod(result.shape))
        return result
