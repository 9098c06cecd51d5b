"""Modules of Flax and Equinox as functions of their parameters.

Each library has its own idea of where parameters are: beside the module (`flax.linen`), in it as variables
(`flax.nnx`), or the module is the tree of them, and takes one row (`equinox`).
"""

from __future__ import annotations

from typing import Any

import jax

from headwater.errors import UnsupportedModel
from headwater.jax.provider import Apply


def as_function(model: Any, params: Any) -> tuple[Apply, Any]:
    """(apply, params) for `JaxGradientProvider`; params None where the module has them.

    Errors: UnsupportedModel for parameters that are missing, or given twice.
    """
    kinds = {f"{kind.__module__}.{kind.__qualname__}" for kind in type(model).__mro__}
    if "flax.linen.module.Module" in kinds:
        return model.apply, _given(model, params)
    holds = kinds & {"flax.nnx.module.Module", "equinox._module._module.Module"}
    if not holds:
        return model, _given(model, params)
    if params is not None:
        raise UnsupportedModel(f"{type(model).__name__} holds its parameters; leave params out.")
    return _of_nnx(model) if "flax.nnx.module.Module" in holds else _of_equinox(model)


def _given(model: Any, params: Any) -> Any:
    if params is None:
        raise UnsupportedModel(f"{type(model).__name__} does not hold its parameters; pass (model, parameters).")
    return params


def _of_nnx(model: Any) -> tuple[Apply, Any]:
    from flax import nnx

    # What is no parameter (statistics, counts of random numbers) stays as it is.
    parts: Any = nnx.split(model, nnx.Param, ...)
    graph, params, rest = parts

    def apply(params: Any, x: Any) -> Any:
        return nnx.merge(graph, params, rest)(x)

    return apply, params


def _of_equinox(model: Any) -> tuple[Apply, Any]:
    import equinox as eqx

    params, static = eqx.partition(model, eqx.is_inexact_array)

    def apply(params: Any, x: Any) -> Any:
        return jax.vmap(eqx.combine(params, static))(x)

    return apply, params
