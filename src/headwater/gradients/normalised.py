"""A provider whose gradients have length one, over all blocks together."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

from headwater.arrays import Array, namespace, summed
from headwater.errors import InvalidSetting
from headwater.gradients.provider import BlockGradients, Fisher, Kind
from headwater.gradients.view import ProviderView
from headwater.types import Batch


class NormalisedGradientProvider(ProviderView):
    """g / |g| for every row; a row whose gradient is zero stays zero. Mixed gradients are those of g / |g|."""

    def grads(self, batch: Batch, *, query: bool = False, weighted: bool = True) -> BlockGradients:
        values = self.plain.grads(batch, query=query, weighted=False)
        inverse = _inverse_norms(values)
        weights = self.plain.row_weights(batch)
        if weighted and weights is not None:
            inverse = inverse * weights
        return OrderedDict((name, value.weighted(inverse)) for name, value in values.items())

    def mixed_prod(self, batch: Batch, factors: Mapping[str, Array]) -> Array:
        """grad_x <f, g/|g|> = (grad_x <f, g> - <f, u> grad_x <g0, g> |g|^-1 ) / |g|, u = g/|g|, g0 = g held fixed."""
        values = self.plain.grads(batch, weighted=False)
        inverse = _inverse_norms(values)
        units = OrderedDict((name, value.weighted(inverse)) for name, value in values.items())
        along = sum(units[name].project(factor) for name, factor in factors.items())
        turn = self._turn(batch, units)
        plain = self.plain.mixed_prod(batch, factors)
        shape = (1, -1) + (1,) * (turn.ndim - 1)
        cosine = namespace(turn).permute_dims(along, (1, 0)).reshape((*plain.shape[:2],) + (1,) * (turn.ndim - 1))
        return (plain - cosine * turn[None]) * inverse.reshape(shape)

    def _turn(self, batch: Batch, units: BlockGradients) -> Array:
        """grad_x <u, g> of each row with its own unit gradient held fixed: [n, *x_shape]; one row at a time."""
        xp = namespace(next(iter(units.values())).like)
        rows = [
            self.plain.mixed_prod(
                batch.take(slice(k, k + 1)),
                {name: value.take(slice(k, k + 1)).flat() for name, value in units.items()},
            )[0]
            for k in range(len(batch))
        ]
        return xp.concat(rows, axis=0)

    def flat_mixed_grads(self, batch: Batch) -> Array:
        """(N, *x_shape, D): d/dx (g / |g|) = (dg - u <u, dg>) / |g|."""
        values = self.plain.grads(batch, weighted=False)
        xp = namespace(next(iter(values.values())).like)
        inverse = _inverse_norms(values)
        mixed = self.plain.flat_mixed_grads(batch)
        unit = xp.concat([value.weighted(inverse).flat() for value in values.values()], axis=1)
        middle = (1,) * (mixed.ndim - 2)
        unit = unit.reshape((unit.shape[0], *middle, unit.shape[1]))
        along = xp.sum(mixed * unit, axis=-1)[..., None]
        return (mixed - along * unit) * inverse.reshape((-1, *middle, 1))

    def fisher_grads(
        self, batch: Batch, fisher: Fisher, *, draws: range = range(1), seed: int = 0
    ) -> list[BlockGradients]:
        """Errors: InvalidSetting."""
        raise InvalidSetting("Unit gradients have no Fisher information; use hw.GradCos() by itself.")

    def ggn_grads(self, batch: Batch) -> list[BlockGradients] | None:
        """Errors: InvalidSetting."""
        raise InvalidSetting("Unit gradients have no curvature; use hw.GradCos() by itself.")

    def curvature_product(self, batch: Batch, block: str, vectors: Array, kind: Kind) -> Array:
        """Errors: InvalidSetting."""
        raise InvalidSetting("Unit gradients have no curvature; use hw.GradCos() by itself.")


def _inverse_norms(values: BlockGradients) -> Array:
    """1 / |g| over all blocks, zero where the gradient is zero: [n]."""
    square = summed(value.squared_norms() for value in values.values())
    xp = namespace(square)
    safe = xp.where(square > 0, square, xp.ones_like(square))
    return xp.where(square > 0, 1.0 / xp.sqrt(safe), xp.zeros_like(square))
