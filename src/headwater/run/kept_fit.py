"""A fit of kept gradients: a second method, or another setting, without the model.

1. A fit asks a provider for gradients of batches of rows. Here the batches are rows of a folder, `StoredRows`, and
   `StoredGradients` answers for them with what was kept; so every method fits as it does over a loader.
2. What a method asks beyond gradients of the rows' own losses was not kept: other labels, outputs, products with a
   curvature that is no sum of these. `Method.fit_reads` says what it asks, and it is refused before anything is read.
3. What was cut when it was kept, or rounded to less than float32, would be another curvature, and is refused as well;
   scores may be of it. Gradients of a float64 model that were kept in float32 give a fit of float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn, Self

import numpy as np

from headwater.arrays import Array, as_like
from headwater.errors import InvalidInput, InvalidSetting
from headwater.gradients.provider import (
    BlockGradients,
    Fisher,
    Kind,
    Linearised,
    OutputFunction,
    StructuredGradientProvider,
)
from headwater.gradients.view import ProviderView
from headwater.methods.base import Method
from headwater.run.stored_rows import StoredRows

WHOLE = ("float32", "float64")
"""Dtypes of kept gradients that a fit may be of."""
SURE = 100
"""Times eps: 1 - p below which a margin's gradient is not to be had from the loss's, which is 1 - p times as long."""
LOADER = "Or give the train rows' loader."


def refuse_to_fit(method: Method[Any], identity: Mapping[str, Any], path: object) -> None:
    """Errors: InvalidSetting, saying what the method asks of rows that was not kept."""
    reads, form, dtype, said = method.fit_reads, identity["form"], identity["dtype"], method.describe()
    if reads == "labels":
        raise InvalidSetting(
            f"{said} averages over labels that the model would give, and kept gradients are of the rows' own labels. "
            f"Take fisher='empirical' (and curvature='empirical_fisher', where there is one). {LOADER}"
        )
    if reads == "keys":
        raise InvalidSetting(
            f"{said} takes its basis from rows that the keys of random draws choose, which were not kept: take "
            f"basis_share=1. {LOADER}"
        )
    if reads == "model":
        raise InvalidSetting(
            f"{said} asks for more than the rows' gradients when it is fitted: the model's outputs, or products with a "
            f"curvature that is no sum of them. Take curvature='empirical_fisher', where there is one. {LOADER}"
        )
    if identity["projection"]:
        raise InvalidSetting(
            f"The rows in {path} are projected, and a fit needs them whole: keep them with form='outer'. {LOADER}"
        )
    if reads == "weights":
        return
    if form == "low_rank":
        raise InvalidSetting(
            f"The rows in {path} are cut to rank {identity['rank']}, and the curvature of what is left is another one: "
            f"keep them with form='outer'. {LOADER}"
        )
    if dtype not in WHOLE:
        raise InvalidSetting(
            f"The rows in {path} are rounded to {dtype}, and the curvature would be of rounded rows: keep them in "
            f"float32 or float64. {LOADER}"
        )
    if reads == "layers" and form == "dense":
        refuse_matrices(path, said)


def refuse_matrices(path: object, said: str) -> NoReturn:
    """Errors: InvalidSetting."""
    raise InvalidSetting(
        f"{said} is fitted on layers' inputs and output-gradients, and in {path} some rows are kept as their "
        f"products, which do not tell them: keep them with form='outer'. {LOADER}"
    )


class StoredGradients(ProviderView):
    """What a fit asks of rows that are kept; their blocks, and all that is known of the model, are the provider's."""

    def __init__(self, plain: StructuredGradientProvider, path: object):
        super().__init__(plain)
        self.path = path

    def _over(self, plain: StructuredGradientProvider) -> Self:
        return type(self)(plain, self.path)

    # What was kept ------------------------------------------------------------------------------------------------

    def grads(self, batch: StoredRows, *, query: bool = False, weighted: bool = True) -> BlockGradients:  # type: ignore[override]
        if query:
            self._refuse("what a measurement says of them")
        return batch.times(batch.weights if weighted else None, batch.grads())

    def fisher_grads(  # type: ignore[override]
        self, batch: StoredRows, fisher: Fisher, *, draws: range = range(1), seed: int = 0
    ) -> list[BlockGradients]:
        if fisher != "empirical":
            self._refuse(f"other labels than their own (fisher={fisher!r})")
        scale = self.curvature_scale(self._self_scale(batch))
        return [batch.times(None if scale is None else np.asarray(scale), batch.grads())]

    def _self_scale(self, batch: StoredRows) -> Any:
        """Errors: InvalidInput for a row whose margin is lost."""
        scale = batch.self_scale
        if scale is None:
            return None
        # 1 / sqrt(1 - p), and 0 where there is nothing under the root.
        largest = (SURE * float(np.finfo(self.dtype).eps)) ** -0.5
        lost = np.flatnonzero((scale == 0) | (scale > largest))
        if len(lost):
            raise InvalidInput(
                f"Of row {batch.names[lost[0]]} the model is so sure that 1 - p is zero to rounding: the margin's "
                f"gradient cannot be had from the loss's, which is kept in {self.path}. {LOADER}"
            )
        return scale

    def self_grads(self, batch: StoredRows) -> BlockGradients:
        return batch.times(batch.self_scale, self.grads(batch))

    def self_scale(self, batch: StoredRows) -> Array | None:
        return self._own(batch, batch.self_scale)

    def row_weights(self, batch: StoredRows) -> Array | None:  # type: ignore[override]
        return self._own(batch, batch.weights)

    def content_keys(self, batch: StoredRows) -> np.ndarray:  # type: ignore[override]
        return batch.keys.whole

    def rows_at_once(self, batch: StoredRows) -> int:  # type: ignore[override]
        return len(batch)

    @staticmethod
    def _own(batch: StoredRows, values: np.ndarray | None) -> Array | None:
        """As an array beside the gradients."""
        return None if values is None else as_like(values, batch.like)

    def begin_pass(self) -> None:
        """The model is not asked."""

    def end_pass(self, failed: bool = False) -> None:
        """The model is not asked."""

    # What was not -------------------------------------------------------------------------------------------------

    def _refuse(self, what: str) -> NoReturn:
        """Errors: InvalidSetting."""
        raise InvalidSetting(f"{self.path} holds gradients of train rows, and not {what}. Give the train rows' loader.")

    def ggn_grads(self, batch: object) -> list[BlockGradients] | None:
        self._refuse("those of the model's outputs, which make up a GGN")

    def curvature_product(self, batch: object, block: str, vectors: Array, kind: Kind) -> Array:
        self._refuse(f"what products with a {kind} are made of")

    def linearised(self, batch: object, block: str, kind: Kind) -> Linearised | None:
        self._refuse(f"what products with a {kind} are made of")

    def mixed_prod(self, batch: object, factors: Mapping[str, Array]) -> Array:
        self._refuse("their derivatives by inputs")

    def flat_mixed_grads(self, batch: object) -> Array:
        self._refuse("their derivatives by inputs")

    def losses(self, batch: object, *, query: bool = False) -> Array:
        self._refuse("their losses")

    def one_minus_p(self, batch: object) -> Array:
        self._refuse("how sure the model is of them")

    def predicted(self, batch: object) -> Any:
        self._refuse("what the model says of them")

    def row_keys(self, batch: object) -> np.ndarray:
        self._refuse("the keys that random numbers are drawn by")

    def keys_by_content(self, batch: object) -> np.ndarray:
        self._refuse("the keys that random numbers are drawn by")

    def host_arrays(self, batch: object, weighted: bool = False) -> list[np.ndarray]:
        self._refuse("the rows themselves")

    def of_output(self, function: OutputFunction) -> StructuredGradientProvider:
        self._refuse(f"those of the {function}")

    def in_float64(self) -> StructuredGradientProvider | None:
        return None
