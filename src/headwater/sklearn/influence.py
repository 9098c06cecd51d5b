"""Influence for fitted scikit-learn estimators."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from headwater.attributor import Attributor
from headwater.blocks import Structure
from headwater.errors import InvalidInput
from headwater.loaders.batches import Unpack, check_loader
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
    ):
        provider = SklearnGradientProvider(
            estimator, blocks=blocks, measurement=measurement, class_weight=class_weight, names=names
        )
        self._estimator, self._prepare = estimator, provider.prepared
        super().__init__(provider, method, damping=damping, unpack=unpack)

    @property
    def estimator(self) -> Any:
        return self._estimator

    def as_loader(self, loader: Iterable[object]) -> Iterable[object]:
        """A `SklearnBatch` goes through the steps of a pipeline once; pairs (x, y) do in every pass."""
        check_loader(loader.source if isinstance(loader, Rows) else loader, "given")
        return [self._prepared(number, item) for number, item in enumerate(loader)]

    def _prepared(self, number: int, item: object) -> Any:
        """Errors: as `SklearnGradientProvider.prepared`, naming the batch."""
        try:
            return self._prepare(item) if isinstance(item, SklearnBatch) and len(item) else item
        except InvalidInput as error:
            error.args = (f"Batch {number} of the loader: {error}",)
            raise
