"""`hw.curvature_of`: the curvature of any model, whatever its framework."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from headwater.blocks import Structure
from headwater.curvature.exact import Curvature
from headwater.errors import InvalidInput
from headwater.gradients.provider import Fisher

if TYPE_CHECKING:
    from headwater.curvature.model import ModelCurvature
    from headwater.influence import ComposableInfluence


def curvature_of(
    model: Any,
    loss: Any = None,
    data: Any = None,
    *,
    kind: Curvature = "ggn",
    blocks: Structure = "full",
    params: Any = None,
    fisher: Fisher = "auto",
    seed: int = 0,
    penalty: bool = True,
    progress: bool = False,
) -> ModelCurvature:
    """The Hessian of a model's mean loss over its train rows, its GGN or its Fisher information.

    An object of products (`apply`, `@`), `trace()`, `spectrum(k)`, `diagonal()` and, for small models or blocks,
    `dense()`; by name it has each block's. Nothing is damped. See `headwater.curvature.model`.

    model: a torch module, a pretrained model, a fitted estimator, or a function (params, x) -> output of JAX with its
    `params`. loss: of (output, target); estimators and pretrained models have their own. data: a loader, or the rows
    themselves, a tuple (x, y). kind: "hessian", "ggn", "fisher" or "empirical_fisher". blocks: "full" for the whole
    matrix, or "layer", "parameter", {name: [...]} for blocks by themselves. penalty: with that of the estimator.
    Errors: InvalidInput where something is missing; those of the framework's provider.
    """
    if data is None:
        raise InvalidInput("data is None; give the train rows: curvature_of(model, loss, loader), or data=(x, y).")
    loader: Iterable[object] = [data] if isinstance(data, tuple) and len(data) == 2 else data
    found = _composable(model, loss, params, blocks)
    return found.curvature_of(loader, kind, fisher=fisher, seed=seed, penalty=penalty, progress=progress)


def _composable(model: Any, loss: Any, params: Any, blocks: Structure) -> ComposableInfluence:
    """By what the model is; a framework is imported only for a model of its own."""
    from headwater.methods.direct import Direct

    libraries = {kind.__module__.partition(".")[0] for kind in type(model).__mro__}
    if params is not None:
        from headwater.jax import JaxComposableInfluence

        return JaxComposableInfluence(model, params, _given(loss, model), Direct(), blocks=blocks)
    if libraries & {"transformers", "peft"} and loss is None:
        from headwater.hf import HfComposableInfluence

        return HfComposableInfluence(model, Direct(), blocks=blocks)
    if "torch" in libraries:
        from headwater.torch import TorchComposableInfluence

        return TorchComposableInfluence(model, _given(loss, model), Direct(), blocks=blocks)
    if "sklearn" in libraries:
        from headwater.sklearn import SklearnComposableInfluence

        if loss is not None:
            raise InvalidInput(f"{type(model).__name__} has a loss of its own: curvature_of(estimator, data=(x, y)).")
        return SklearnComposableInfluence(model, Direct(), blocks=blocks)
    raise InvalidInput(
        f"The model is {model!r:.60}; expected a torch module, a pretrained model, a fitted estimator of scikit-learn, "
        "or a function (params, x) -> output with params=."
    )


def _given(loss: Any, model: Any) -> Callable[[Any, Any], Any]:
    """Errors: InvalidInput."""
    if loss is None:
        raise InvalidInput(
            f"loss is None, and a {type(model).__name__} has none of its own: curvature_of(model, loss, data)."
        )
    return loss
