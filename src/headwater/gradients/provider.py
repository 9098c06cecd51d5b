"""A gradient provider that speaks the algebra: what a framework fills, and what follows from it.

`StructuredGradientProvider` is the seam between a framework and the maths: everything above it (curvature,
influence, methods) is written once, for every framework.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal
from zlib import crc32

import numpy as np

from headwater.arrays import Array, identity, is_array, namespace, shape_of, sigmoid, summed, to_numpy
from headwater.blocks import Layout
from headwater.errors import ShapeMismatch, UnsupportedModel
from headwater.gradients.block import BlockGradient
from headwater.gradients.likelihoods import Likelihood
from headwater.gradients.together import Together
from headwater.random import name_keys, row_digests, row_keys
from headwater.types import Batch, BatchType, GradientProvider, TensorType, split

BlockGradients = OrderedDict[str, BlockGradient]
Fisher = Literal["auto", "exact", "sampled", "empirical"]
Kind = Literal["hessian", "ggn"]
OutputFunction = Literal["margin", "logit"]
EXPLAIN = ("label", "prediction")
"""Whose label a query gets: its own, or what the model predicts (`StructuredGradientProvider.predicted`)."""


@dataclass(frozen=True, eq=False)
class Linearised:
    """The curvature of some rows at the weights of the moment, for several products."""

    product: Callable[[Any], Any]
    """Of vectors (K, D_block), as `curvature_product` gives it."""
    size: int
    """Bytes that it holds, at most."""


class StructuredGradientProvider(GradientProvider[BatchType, TensorType]):
    """Per-sample gradients as values of the algebra, block by block, and second-order products of the model.

    The loss of a row is the loss function's value on that row alone, whatever its reduction; a row's weight
    multiplies it, so that a weight of 2 means the row twice.
    """

    likelihood: Likelihood | None = None
    """The distribution of targets behind the loss, as `fisher_grads` takes it; None where that is known otherwise."""

    @property
    @abstractmethod
    def layouts(self) -> OrderedDict[str, Layout]:
        """The blocks, in order, and how each is laid out."""

    @abstractmethod
    def grads(self, batch: BatchType, *, query: bool = False, weighted: bool = True) -> BlockGradients:
        """Per-sample gradients by block: of the loss, or of the measurement for query rows."""

    @abstractmethod
    def fisher_grads(
        self, batch: BatchType, fisher: Fisher, *, draws: range = range(1), seed: int = 0
    ) -> list[BlockGradients]:
        """Gradient values whose summed g g^T is each row's Fisher information (unweighted).

        "empirical" gives one, with the batch's own targets; "exact" one for each class, times the square root of its
        probability; "sampled" one for each draw, divided by the square root of their number. A draw depends on the
        row, the seed and the draw's number, never on the batch that the row arrives in. "auto" is exact where the
        classes are few, else sampled.
        """

    def ggn_grads(self, batch: BatchType) -> list[BlockGradients] | None:
        """Gradient values whose summed g g^T is exactly each row's own GGN (unweighted): one for each output.

        None where a row has many outputs, or its loss is not convex in them; then only products are to be had.
        """
        return None

    @abstractmethod
    def curvature_product(self, batch: BatchType, block: str, vectors: TensorType, kind: Kind) -> TensorType:
        """Weighted sum over the rows of the block's own square of the Hessian or GGN, times vectors: (K, D_block)."""

    def linearised(self, batch: BatchType, block: str, kind: Kind) -> Linearised | None:
        """`curvature_product` of these rows, with what all vectors share computed once; None where nothing is saved.

        It holds on to that, and is right as long as the weights stay: for one solve, not for keeping.
        """
        return None

    @abstractmethod
    def mixed_prod(self, batch: BatchType, factors: Mapping[str, TensorType]) -> TensorType:
        """`grad_x <factor_k, grad_w l(row)>`, summed over the blocks of the factors (K, D_block): (K, N, *x_shape).

        Equals the contraction of `flat_mixed_grads`, which is never built.
        """

    def losses(self, batch: BatchType, *, query: bool = False) -> Array:
        """The rows' losses, unweighted, or their measurements for query rows: [n].

        Errors: UnsupportedModel where a provider does not give them.
        """
        raise UnsupportedModel(f"{type(self).__name__} does not give its rows' losses.")

    def predicted(self, batch: BatchType) -> BatchType:
        """The same rows, each with what the model predicts as its label: `explain="prediction"`.

        Errors: UnsupportedModel where a prediction is no label, or no label of this model is known.
        """
        raise UnsupportedModel(
            f'explain="prediction": {type(self).__name__} does not say what its model predicts. Give the query rows '
            'the labels that you ask about as y, with explain="label".'
        )

    def labels_of(self, y: Any) -> Any:
        """Targets of a batch, or of `predicted`, as people write them: those of a batch may be numbers of classes."""
        return y

    def self_grads(self, batch: BatchType) -> BlockGradients:
        """Gradients of train rows whose length, in any metric, is the score of a row on itself."""
        return self.grads(batch)

    def self_scale(self, batch: BatchType) -> Array | None:
        """What each row of `self_grads` is of the row of `grads`: [n]; None where they are the same."""
        return None

    def curvature_scale(self, self_scale: Array | None) -> Array | None:
        """What each row of `fisher_grads(..., "empirical")` is of the row of `grads`: [n]; None for the same.

        self_scale: the rows' own, by which it is known where the rows themselves are gone.
        """
        return None

    def one_minus_p(self, batch: BatchType) -> Array:
        """1 - p, the chance of another answer, where the losses are minus the margin (`of_output("margin")`): [n]."""
        return sigmoid(self.losses(batch))

    def of_output(self, function: OutputFunction) -> StructuredGradientProvider:
        """The same model and blocks, with another function of the output as loss and as measurement.

        "margin": minus log p/(1-p) of the row's target; "logit": minus the output that belongs to it. Both are better
        when lower, as losses are. Errors: UnsupportedModel for outputs and targets that have no such thing.
        """
        raise UnsupportedModel(f"{type(self).__name__} knows no other functions of its output, such as the {function}.")

    def parameters(self, block: str) -> Array:
        """The block's weights as a flat vector: (D_block,).

        Errors: UnsupportedModel where a provider does not give them.
        """
        raise UnsupportedModel(f"{type(self).__name__} does not give its weights.")

    def in_float64(self) -> StructuredGradientProvider | None:
        """A float64 copy of the model with the same blocks and parts, for checks; None where there is no such thing.

        Its `grads` are computed the plain way, one row at a time, whatever this provider knows about layers. It takes
        the same batches, and draws the same random numbers for the same rows.
        """
        return None

    def each(self, change: Callable[[StructuredGradientProvider], StructuredGradientProvider]) -> Any:
        """The provider after a change; an ensemble of models changes each of them."""
        return change(self)

    def block_scale(self, block: str) -> float:
        """What the block's operator is multiplied by: one, or the share of a model in an ensemble's score."""
        return 1.0

    def penalty(self, block: str, weight: float) -> Array | None:
        """What the training objective adds to the block's curvature beside its rows: a diagonal (D_block,), or None.

        weight: the rows' total weight; a penalty beside the *sum* of the losses is over that beside their mean. Every
        operator that inverts curvature inverts it with this diagonal; where an approximation has no place for one that
        differs between parameters (projected gradients), its largest entry serves as damping.
        """
        return None

    def as_batch(self, x: Any, y: Any) -> BatchType:
        """Inputs and targets as this framework's batch, moved to where the model is; by default as they are."""
        return Batch(x, y)  # type: ignore[return-value]

    def row_weights(self, batch: BatchType) -> Array | None:
        """The rows' weights [n], or None if all are one."""
        return None

    def row_keys(self, batch: BatchType) -> np.ndarray:
        """A 64-bit key for each row, from its id where the batch carries ids, else from its content: uint64 [n].

        Random draws depend on it. Padding is content: rows that are padded differently in another batch need ids.
        """
        if batch.ids is None:
            return self.keys_by_content(batch)
        ids = np.asarray(to_numpy(batch.ids) if is_array(batch.ids) else batch.ids)
        return ids.astype(np.uint64) if ids.dtype.kind in "iu" else name_keys(ids.tolist())

    def content_keys(self, batch: BatchType) -> np.ndarray:
        """A 64-bit key for each row, from everything that the batch says of it, its weight included: uint64 [n]."""
        leaves = self.host_arrays(batch, weighted=True)
        return row_digests(leaves if batch.ids is None else [*leaves, self.row_keys(batch)])

    def keys_by_content(self, batch: BatchType) -> np.ndarray:
        """`row_keys` of rows without ids."""
        return row_keys(self.host_arrays(batch))

    def host_arrays(self, batch: BatchType, weighted: bool = False) -> list[np.ndarray]:
        """The arrays of x and y in host memory, rows first; weighted: and the weights that the batch carries."""
        given = [batch.x, batch.y, *([batch.weights] if weighted and batch.weights is not None else [])]
        return [np.asarray(to_numpy(value)) for value in given]

    def fingerprint(self) -> tuple[object, ...]:
        """Changes when the weights do; by default, when the attributed ones do."""
        return tuple(crc32(np.asarray(to_numpy(self.parameters(name))).tobytes()) for name in self.layouts)

    @property
    def form(self) -> int:
        """Another number when gradients have taken another form (other parts) than those that were given before."""
        return 0

    def begin_pass(self) -> None:
        """Told before the first batch of each pass over rows; a provider may look at that batch more closely."""
        return None

    def end_pass(self, failed: bool = False) -> None:
        """Told after the last batch of each pass that was not broken off, or (failed) when the loader raised."""
        return None

    @property
    def together(self) -> Together | None:
        """The processes that hold parts of the model, and make the same calls on the same rows; None for this alone."""
        return None

    def own_precision(self) -> AbstractContextManager[object]:
        """Around the maths on this provider's gradients: without what the caller changed of the numbers' precision.

        The caller's automatic mixed precision, say, reaches the model's own call and nothing else.
        """
        return nullcontext()

    def rows_at_once(self, batch: BatchType) -> int:
        """How many rows to take through the model together; larger batches are cut. The numbers do not depend on it."""
        return len(batch)

    @property
    def explained(self) -> str:
        """What `grads(query=True)` differentiates: "loss", or the name of a measurement."""
        return "loss"

    def settings(self) -> tuple[str, ...]:
        """What besides the weights decides its gradients, in words: loss, measurement, likelihood."""
        return ()

    @property
    def views(self) -> tuple[str, ...]:
        """What changes the model's own gradients on their way, by name, the outermost first."""
        return ()

    @property
    def architecture(self) -> str:
        """What besides its weights decides what the model computes, in words; empty where nothing is known of it."""
        return ""

    @property
    def normalisation(self) -> str | None:
        """How the loss treats several rows ("mean", "sum", "none", ...), if that is known."""
        return None

    @property
    def dtype(self) -> str:
        """The numbers that the model computes with: "float32", "float64", ..."""
        return "unknown"

    @property
    def device(self) -> Any:
        """Where its arrays live; None where there is only one place."""
        return None

    @property
    def needs_rows(self) -> bool:
        """Whether the parts of its blocks are not known yet, as only rows show where a function uses its parameters."""
        return False

    @property
    def coverage_fraction(self) -> float:
        """The share of the model's trainable parameters that is attributed."""
        return 1.0

    @property
    def sizes(self) -> OrderedDict[str, int]:
        return OrderedDict((name, layout.size) for name, layout in self.layouts.items())

    @property
    def n_parameters(self) -> int:
        """D, over all blocks."""
        return sum(self.sizes.values())

    def flat_grads(self, batch: BatchType) -> TensorType:
        """(N, D): `grads` made dense and flat, block after block."""
        flat = [value.flat() for value in self.grads(batch).values()]
        return namespace(*flat).concat(flat, axis=1)

    def flat_mixed_grads(self, batch: BatchType) -> TensorType:
        """(N, *x_shape, D): the mixed derivatives themselves, by `mixed_prod` with all unit vectors of each block."""
        like = next(iter(self.grads(batch).values())).like
        units: dict[str, Any] = {name: identity(size, like) for name, size in self.sizes.items()}
        found = [self.mixed_prod(batch, {name: unit}) for name, unit in units.items()]
        xp = namespace(*found)
        return xp.moveaxis(xp.concat(found, axis=0), 0, -1)

    def jacobian_prod(self, batch: BatchType, g: TensorType) -> TensorType:
        """(N, K) for g (K, D): `grads` projected on g, never made dense where that costs more.

        Errors: ShapeMismatch.
        """
        given = shape_of(g) or ()
        if len(given) != 2 or given[1] != self.n_parameters:
            raise ShapeMismatch(f"Expected g of shape (K, {self.n_parameters}), got {tuple(given)}.")
        pieces = split(g, self.sizes)
        return summed(value.project(pieces[name]) for name, value in self.grads(batch).items())

    def block(self, name: str) -> BlockProvider:
        """This provider, seen through one block."""
        return BlockProvider(self, name)


class BlockProvider(GradientProvider[Batch, Array]):
    """One block of a structured provider, as a provider of its own.

    explained: the batch, this very object, whose rows are queries: their gradients are those of the measurement.
    """

    def __init__(self, whole: StructuredGradientProvider, name: str, explained: Batch | None = None):
        self.whole = whole
        self.name = name
        self.explained = explained

    def flat_grads(self, batch: Batch) -> Array:
        """(N, D_block)."""
        return self._grads(batch).flat()

    def flat_mixed_grads(self, batch: Batch) -> Array:
        """(N, *x_shape, D_block)."""
        return split(self.whole.flat_mixed_grads(batch), self.whole.sizes)[self.name]

    def jacobian_prod(self, batch: Batch, g: Array) -> Array:
        """(N, K) for g (K, D_block)."""
        return self._grads(batch).project(g)

    def _grads(self, batch: Batch) -> BlockGradient:
        return self.whole.grads(batch, query=batch is self.explained)[self.name]
