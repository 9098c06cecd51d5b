"""One door: `hw.Influence(model, loss, method)` finds the framework in what the model is.

    torch.nn.Module                                             headwater.torch.TorchComposableInfluence
    transformers.PreTrainedModel, or with PEFT's adapters       headwater.hf.HfComposableInfluence
    a fitted estimator, pipeline or search of scikit-learn      headwater.sklearn.SklearnComposableInfluence
    (function, parameters), a module of Flax or Equinox         headwater.jax.JaxComposableInfluence

These classes stay beneath it, and give the same numbers. A framework is told by the names of the model's classes, so
that none is imported that is not there already.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from headwater.attributor import Attributor
from headwater.blocks import Structure
from headwater.errors import InvalidInput, InvalidSetting, UnsupportedModel
from headwater.gradients.provider import Fisher
from headwater.methods.base import Method
from headwater.methods.registry import METHODS
from headwater.trajectory.methods import Source, TrajectoryMethod, Unrolled

if TYPE_CHECKING:
    from headwater.curvature.exact import Curvature
    from headwater.curvature.model import ModelCurvature

TAKEN = (
    "a torch.nn.Module, a transformers.PreTrainedModel (also with PEFT's adapters), a fitted scikit-learn estimator or "
    "pipeline, or for JAX a pair (function, parameters), a flax.nnx.Module or an equinox.Module"
)


def Influence(  # noqa: N802  a class to who calls it: it makes an influence
    model: Any, loss: Any = None, method: Method | str | None = None, **options: Any
) -> Attributor[Any]:
    """Which training rows made a model do this, and by how much; `.fit(train).attribute(train, query)` says it.

    model: see the table above. For JAX also a function alone, with params=. loss: a function of (output, target), a
    loss module, or a word: "cross_entropy", "binary_cross_entropy" (of logits), "mse"; estimators and pretrained models
    have their own. method: settings such as hw.Ekfac(rank=64), or a name in `hw.METHODS`, such as "kfac"; None for
    hw.Ekfac(), of scikit-learn's models hw.Direct() without damping. options: those of the framework's class: blocks,
    damping, measurement, checkpoints, unpack, target, ids, batch_size, ...

    Rows are what people hold: a loader, a data set, (x, y) arrays, a data frame; see `headwater.loaders.forms`.
    Errors: InvalidInput for a loss that means nothing here; InvalidSetting for unknown methods and options;
    UnsupportedModel, saying what is taken; EstimatorNotFittedError.
    """
    if isinstance(loss, Method):
        raise InvalidInput(f"loss is a method, {loss!r}; pass it as method=.")
    make = _maker_of(model, options)
    return make(model, loss, method, options)


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

    model, loss, params, data (the train rows): as `Influence` and `fit` take them. kind: "hessian", "ggn", "fisher" or
    "empirical_fisher". blocks: "full" for the whole matrix, or "layer", "parameter", {name: [...]} for blocks by
    themselves. penalty: with that of the estimator.
    Errors: InvalidInput where something is missing; those of the framework's provider.
    """
    if data is None:
        raise InvalidInput("data is None; give the train rows: curvature_of(model, loss, loader), or data=(x, y).")
    options = {} if params is None else {"params": params}
    found = Influence(model, loss, method_of("direct"), blocks=blocks, **options)
    return found.curvature_of(data, kind, fisher=fisher, seed=seed, penalty=penalty, progress=progress)


Maker = Callable[[Any, Any, "Method | str | None", dict[str, Any]], Attributor[Any]]


def _maker_of(model: Any, options: Mapping[str, Any]) -> Maker:
    """Errors: UnsupportedModel."""
    if isinstance(model, type):
        raise UnsupportedModel(f"The model is the class {model.__name__}; pass an instance of it, trained.")
    if isinstance(model, str):
        raise UnsupportedModel(
            f"The model is a name, {model!r:.60}; load it first, with from_pretrained({model!r:.60})."
        )
    if isinstance(model, tuple):
        if len(model) == 2 and callable(model[0]):
            return _of_jax
        raise UnsupportedModel(f"The model is a tuple of {len(model)}; expected (function, parameters).")
    if "torch.nn.modules.module.Module" in _kinds(model):
        return _of_pretrained if _is_pretrained(model) else _of_torch
    if "sklearn.base.BaseEstimator" in _kinds(model):
        return _of_sklearn
    if _kinds(model) & FLAX_AND_EQUINOX or (callable(model) and "params" in options):
        return _of_jax
    if callable(model):
        raise UnsupportedModel(
            f"{_called(model)} is a function, and nothing says which numbers are its parameters: pass "
            "(function, parameters), or params=, for function(parameters, x)."
        )
    raise UnsupportedModel(f"{type(model).__name__} is no model that is known here. Taken are {TAKEN}.")


FLAX_AND_EQUINOX = {"flax.nnx.module.Module", "flax.linen.module.Module", "equinox._module._module.Module"}


def _kinds(model: Any) -> set[str]:
    """The classes that it is one of, by their full names."""
    return {f"{kind.__module__}.{kind.__qualname__}" for kind in type(model).__mro__}


def _called(model: Any) -> str:
    return model.__name__ if inspect.isfunction(model) else type(model).__name__


def _is_pretrained(model: Any) -> bool:
    from headwater.torch.wrapped import unwrapped

    kinds = _kinds(unwrapped(model))
    return "transformers.modeling_utils.PreTrainedModel" in kinds or any(kind.startswith("peft.") for kind in kinds)


# Frameworks -----------------------------------------------------------------------------------------------------------


def _of_torch(model: Any, loss: Any, method: Method | str | None, options: dict[str, Any]) -> Attributor[Any]:
    from headwater.torch.influence import TorchComposableInfluence
    from headwater.torch.losses import LOSSES

    if isinstance(method, TrajectoryMethod):
        from headwater.trajectory.torch.influence import TorchTrajectoryInfluence

        check_options(TorchTrajectoryInfluence, options)
        return TorchTrajectoryInfluence(model, _loss(loss, LOSSES), method, **options)
    check_options(TorchComposableInfluence, options)
    return TorchComposableInfluence(model, _loss(loss, LOSSES), method_of(method), **options)


def _of_pretrained(model: Any, loss: Any, method: Method | str | None, options: dict[str, Any]) -> Attributor[Any]:
    from headwater.hf import HfComposableInfluence

    if loss is not None:
        raise InvalidInput(
            f"loss is {loss!r:.60}, and {type(model).__name__} has its own: leave it out. task= and per_token= say how "
            "it is taken; measurement= explains something else about query rows. For a loss of your own wrap the model "
            "in a torch.nn.Module that returns the logits."
        )
    if isinstance(method, TrajectoryMethod):
        from headwater.trajectory.torch.hf import HfTrajectoryInfluence

        check_options(HfTrajectoryInfluence, options)
        return HfTrajectoryInfluence(model, method, **options)
    check_options(HfComposableInfluence, options)
    return HfComposableInfluence(model, method_of(method), **options)


def _of_sklearn(model: Any, loss: Any, method: Method | str | None, options: dict[str, Any]) -> Attributor[Any]:
    from headwater.sklearn.influence import SklearnComposableInfluence

    if loss is not None:
        raise InvalidInput(
            f"loss is {loss!r:.60}, and {type(model).__name__} has its own, which it was fitted to: leave it out. "
            "measurement='margin' or 'logit' explains something else about query rows."
        )
    check_options(SklearnComposableInfluence, options)
    if method is None:
        # Exact: what an estimator's own penalty does not hold has no forecast, and is said.
        return SklearnComposableInfluence(model, method_of("direct"), **{"damping": 0.0, **options})
    return SklearnComposableInfluence(model, method_of(method), **options)


def _of_jax(model: Any, loss: Any, method: Method | str | None, options: dict[str, Any]) -> Attributor[Any]:
    from headwater.jax.influence import JaxComposableInfluence
    from headwater.jax.losses import LOSSES
    from headwater.jax.modules import as_function

    given = dict(options)
    model, params = model if isinstance(model, tuple) else (model, given.pop("params", None))
    check_options(JaxComposableInfluence, given, "params")
    apply, params = as_function(model, params)
    if isinstance(method, TrajectoryMethod):
        from headwater.trajectory.jax.influence import JaxTrajectoryInfluence

        return JaxTrajectoryInfluence(apply, params, _loss(loss, LOSSES), method, **given)
    return JaxComposableInfluence(apply, params, _loss(loss, LOSSES), method_of(method), **given)


# What goes with a model -----------------------------------------------------------------------------------------------


RECORDED: Mapping[str, type[TrajectoryMethod]] = {"unrolled": Unrolled, "source": Source}
"""Methods that no word can ask for: they need a folder."""


def method_of(method: Method | str | None) -> Method:
    """Errors: InvalidSetting for what is no method."""
    if isinstance(method, Method):
        return method
    names = {name: entry for entry in METHODS for name in (entry.name, entry.class_name.lower())}
    name = "ekfac" if method is None else method
    recorded = name if isinstance(name, type) else RECORDED.get(name.lower()) if isinstance(name, str) else None
    if recorded is not None and issubclass(recorded, TrajectoryMethod):
        raise InvalidSetting(
            f"method is {method!r}, which is made of a record of the training, and a word does not say where that is: "
            f'pass hw.{recorded.__name__}("folder"), the folder that hw.record(model, optimizer, "folder") wrote.'
        )
    if isinstance(name, type) and issubclass(name, Method):
        raise InvalidSetting(f"method is the class {name.__name__}; pass its settings: hw.{name.__name__}().")
    entry = names.get(name.lower().replace("_", "-")) if isinstance(name, str) else None
    if entry is None:
        raise InvalidSetting(
            f"method is {method!r:.60}; expected settings such as hw.Ekfac(), or one of "
            f"{', '.join(repr(entry.name) for entry in METHODS)}."
        )
    needed = [p.name for p in inspect.signature(entry.cls).parameters.values() if p.default is p.empty]
    if needed:
        said = ", ".join(f"{name}=..." for name in needed)
        raise InvalidSetting(
            f"method is {method!r}, which has no default settings: pass hw.{entry.class_name}({said})."
        )
    return entry.cls()


def _loss(loss: Any, known: Mapping[str, Callable[[], Any]]) -> Any:
    """A loss that was given by a word. Errors: InvalidInput for none, and for words that are not known."""
    words = ", ".join(map(repr, known))
    if loss is None:
        raise InvalidInput(f"There is no loss; pass the one that the model was trained with: a function, or {words}.")
    if not isinstance(loss, str):
        return loss
    name = loss.lower().replace("-", "_").replace(" ", "_")
    if name not in known:
        raise InvalidInput(f"loss is {loss!r:.60}; the words that are known are {words}. All else is a function.")
    return known[name]()


def check_options(cls: type, options: Mapping[str, Any], *more: str) -> None:
    """Errors: InvalidSetting for an option that the class does not take, with those that it takes."""
    parameters = inspect.signature(cls).parameters.values()
    known = [*more, *(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)]
    for name in options:
        if name not in known:
            near = get_close_matches(name, known, 1)
            meant = f" Did you mean {near[0]!r}?" if near else ""
            raise InvalidSetting(f"{name!r} is no option of {cls.__name__}.{meant} It takes {', '.join(known)}.")
