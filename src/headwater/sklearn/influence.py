"""Influence for fitted scikit-learn estimators."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from headwater.arrays import is_array, to_numpy
from headwater.attributor import Attributor
from headwater.blocks import Structure
from headwater.errors import InvalidInput
from headwater.loaders.batches import Unpack, check_loader
from headwater.loaders.forms import Collated, Cut, Form, Targeted, map_structure
from headwater.loaders.frames import ids_of
from headwater.methods.base import Method
from headwater.methods.damping import Damping
from headwater.rows import Rows
from headwater.sklearn.batch import SklearnBatch
from headwater.sklearn.families import Array
from headwater.sklearn.measurements import Measurement
from headwater.sklearn.provider import NAMES, SklearnGradientProvider


class SklearnComposableInfluence(Attributor[Array]):
    """Which training rows made a fitted estimator predict this, and by how much.

    The loss is the estimator's own, and its penalty is part of the curvature (`SklearnGradientProvider.penalty`), so
    that scores in the unit "removal" forecast how a query's loss changes when scikit-learn fits again without the row.

    estimator, blocks, measurement, class_weight, names: see `SklearnGradientProvider`. method: settings, hw.Direct().
    damping: a float (absolute), hw.relative(...) (times the mean eigenvalue of the rows' curvature), a dict of these by
    block, or None for the method's default. The penalty is no damping: it is there besides, and damping may be 0.
    unpack: makes (x, y[, ids, weights]) of a loader's items, where they have another form.
    target, ids: which columns are the targets and the rows' ids, in data frames and dicts. batch_size: rows in a batch
    that is cut of (x, y), a data frame or a Dataset; no number depends on it. See `headwater.loaders.forms`.
    """

    def __init__(
        self,
        estimator: Any,
        method: Method,
        *,
        blocks: Structure = "full",
        damping: Damping | Mapping[str, Damping] | None = None,
        measurement: Measurement | None = None,
        class_weight: Mapping[Any, float] | None = None,
        names: tuple[str, str] = NAMES,
        unpack: Unpack | None = None,
        target: str | Sequence[str] | None = None,
        ids: str | None = None,
        batch_size: int = 4096,
    ):
        provider = SklearnGradientProvider(
            estimator, blocks=blocks, measurement=measurement, class_weight=class_weight, names=names
        )
        self._estimator, self._prepare = estimator, provider.prepared
        super().__init__(provider, method, damping=damping, unpack=unpack, form=Form(batch_size, target, ids))

    @property
    def estimator(self) -> Any:
        return self._estimator

    def as_loader(self, loader: Iterable[object]) -> Iterable[object]:
        """A `SklearnBatch` goes through the steps of a pipeline once; pairs (x, y) do in every pass."""
        if isinstance(loader, (Cut, Collated, Targeted)):  # pairs, made as they are read
            return loader
        check_loader(loader.source if isinstance(loader, Rows) else loader, "given")
        found, start = [], 0
        for number, item in enumerate(loader):
            if isinstance(item, SklearnBatch) and len(item):
                item = self._prepared(number, item, start)
                start += len(item)
            found.append(item)
        return found

    def as_own(self, name: str, array: Any) -> Any:
        """Tensors of any framework as NumPy arrays."""
        return map_structure(lambda value: to_numpy(value) if is_array(value) else value, array)

    def _prepared(self, number: int, item: SklearnBatch, start: int) -> SklearnBatch:
        """Errors: as `SklearnGradientProvider.prepared`, naming the batch."""
        try:
            # A frame's index is gone once it is through the pipeline.
            ids = ids_of(item.x, item.y, start) if item.ids is None else item.ids
            return self._prepare(item if ids is item.ids else replace(item, ids=ids))
        except InvalidInput as error:
            error.args = (f"Batch {number} of the loader: {error}",)
            raise
