"""Influence for JAX functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from headwater.arrays import is_array, is_jax, to_numpy
from headwater.attributor import Attributor
from headwater.blocks import Structure
from headwater.errors import InvalidInput, InvalidSetting
from headwater.gradients.coverage import Coverage
from headwater.gradients.ensemble import EnsembleProvider
from headwater.gradients.likelihoods import Likelihood
from headwater.gradients.provider import StructuredGradientProvider
from headwater.jax.losses import Loss
from headwater.jax.provider import Apply, JaxGradientProvider
from headwater.loaders.batches import Unpack
from headwater.loaders.forms import Form, map_structure
from headwater.methods.base import Method
from headwater.methods.damping import Damping


class JaxComposableInfluence(Attributor[jax.Array]):
    """Which training rows made a JAX function do this, and by how much.

    apply, params, loss, measurement, likelihood, example: see `JaxGradientProvider`. method: settings such as
    hw.Ekfac(). blocks: "full", "layer", "parameter" or {name: [parameter or module names]}. damping: a float
    (absolute), hw.relative(...) (times the block's mean eigenvalue), a dict of these by block, or None for the method's
    default.

    checkpoints: pytrees of parameters of the same architecture, from one run or from models that were trained apart.
    The scores are then the mean over them (for hw.TracIn the sum, with learning rates), and the blocks are
    "0/<block>", "1/<block>", ... `params` gives the architecture only: it is no further checkpoint.

    unpack: makes (x, y[, ids, weights]) of a loader's items, where they have another form.
    target, ids: which columns are the targets and the rows' ids, in data frames and dicts. batch_size: rows in a batch
    that is cut of (x, y), a data frame or a Dataset; no number depends on it. See `headwater.loaders.forms`.
    """

    def __init__(
        self,
        apply: Apply,
        params: Any,
        loss: Loss,
        method: Method,
        *,
        blocks: Structure = "layer",
        damping: Damping | Mapping[str, Damping] | None = None,
        measurement: Loss | str | None = None,
        likelihood: Likelihood | str | None = None,
        checkpoints: Sequence[Any] | None = None,
        example: Any = None,
        unpack: Unpack | None = None,
        target: str | Sequence[str] | None = None,
        ids: str | None = None,
        batch_size: int = 256,
    ):
        self._jax_provider = JaxGradientProvider(
            apply, params, loss, blocks=blocks, measurement=measurement, likelihood=likelihood, example=example
        ).in_numpy()
        provider: StructuredGradientProvider = self._jax_provider
        if checkpoints is not None:
            provider = EnsembleProvider(_load_all(self._jax_provider, checkpoints))
        super().__init__(provider, method, damping=damping, unpack=unpack, form=Form(batch_size, target, ids))

    def as_own(self, name: str, array: Any) -> Any:
        """Tensors of other frameworks as NumPy arrays; fractions of NumPy in the parameters' dtype."""
        return map_structure(self._array, array)

    def _array(self, array: Any) -> Any:
        if not is_array(array) or is_jax(array):
            return array
        found = to_numpy(array)
        return found.astype(self._jax_provider.dtype) if found.dtype.kind == "f" else found

    def handed_out(self, array: Any) -> jax.Array:
        return jnp.asarray(array)

    def taken_in(self, arrays: Any) -> Any:
        return jax.tree.map(self._jax_provider.asked, arrays)

    @property
    def own_source(self) -> StructuredGradientProvider:
        found: StructuredGradientProvider = self.source.each(_in_jax)
        return found

    @property
    def params(self) -> Any:
        """The parameters, as a pytree."""
        return self._jax_provider.params

    @property
    def coverage(self) -> Coverage:
        """How many of the floating-point parameters are attributed, and which are not."""
        return self._jax_provider.coverage


def _in_jax(provider: StructuredGradientProvider) -> StructuredGradientProvider:
    return provider.in_jax() if isinstance(provider, JaxGradientProvider) else provider


def _load_all(provider: JaxGradientProvider, checkpoints: Sequence[object]) -> list[JaxGradientProvider]:
    """The provider at each of the weights. Errors: InvalidSetting if there are none; InvalidInput for others."""
    if not isinstance(checkpoints, (list, tuple)):
        raise InvalidSetting(f"checkpoints is one {type(checkpoints).__name__}; expected a list of pytrees.")
    if not checkpoints:
        raise InvalidSetting("checkpoints is empty; give at least one, or None for the parameters as they are.")
    found = []
    for k, checkpoint in enumerate(checkpoints):
        try:
            found.append(provider.with_params(checkpoint))
        except InvalidInput as error:
            raise InvalidInput(f"Checkpoint {k}: {error}") from error
    return found
