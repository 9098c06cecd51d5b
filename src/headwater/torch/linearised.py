"""A gradient that is kept with its graph: products of the Hessian with more vectors need no forward pass of their own.

Of the five or six products of matrices that a Hessian product with one vector takes at each layer, the model's own
forward and backward pass are two to three, the same for all vectors. Whoever asks one vector at a time (Lanczos) saves
them from the second product on; with twenty vectors at a time they are a tenth, and keeping the graph gains nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from headwater.torch.products import along_leaves, gradient_graph

Tensors = Sequence[torch.Tensor]


class Allocated(TorchDispatchMode):
    """Counts the bytes of what operations write: a bound from above of what the graph of their results holds."""

    def __init__(self) -> None:
        super().__init__()
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(found):
            if isinstance(leaf, torch.Tensor) and leaf.layout is torch.strided:
                # By address: views count once, and so does memory that was free in between.
                place, size = leaf.untyped_storage().data_ptr(), leaf.untyped_storage().nbytes()
                self._sizes[place] = max(size, self._sizes.get(place, 0))
        return found

    @property
    def bytes(self) -> int:
        return sum(self._sizes.values())


class KeptGradient:
    """The gradient of a loss by some leaves, and the graph that it came from; `size` in bytes, at most."""

    def __init__(self, loss: Callable[[], torch.Tensor], leaves: Tensors):
        # Counted, not guessed: attention, say, holds more than its layers' inputs and outputs.
        with Allocated() as allocated:
            self.slopes = gradient_graph(loss(), leaves)
        self.leaves = leaves
        self.size = allocated.bytes

    def product(self, tangents: Tensors) -> list[torch.Tensor]:
        """The loss's Hessian times each tangent [K, *shape]."""
        return along_leaves(self.slopes, self.leaves, tangents)
