"""headwater: which training examples made the model do this, and by how much?"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headwater import errors as errors
    from headwater.arrays import working_memory as working_memory
    from headwater.influence import ComposableInfluence as ComposableInfluence
    from headwater.methods.damping import Relative as Relative
    from headwater.methods.damping import relative as relative
    from headwater.methods.direct import Direct as Direct
    from headwater.methods.grad_dot import GradCos as GradCos
    from headwater.methods.grad_dot import GradDot as GradDot
    from headwater.methods.kronecker import Ekfac as Ekfac
    from headwater.methods.kronecker import Kfac as Kfac
    from headwater.store.scores import Extremes as Extremes
    from headwater.store.scores import Scores as Scores
    from headwater.types import Batch as Batch
    from headwater.types import InfluenceMode as InfluenceMode

__version__ = "0.1.0"

_HOMES = {
    "Batch": "types",
    "ComposableInfluence": "influence",
    "Direct": "methods.direct",
    "Ekfac": "methods.kronecker",
    "Extremes": "store.scores",
    "GradCos": "methods.grad_dot",
    "GradDot": "methods.grad_dot",
    "InfluenceMode": "types",
    "Kfac": "methods.kronecker",
    "Relative": "methods.damping",
    "Scores": "store.scores",
    "errors": "",
    "relative": "methods.damping",
    "working_memory": "arrays",
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    """Names are looked up when they are first used, so that importing headwater imports next to nothing."""
    if name not in _HOMES:
        raise AttributeError(f"headwater has no {name!r}; it has {', '.join(__all__)}.")
    home = _HOMES[name]
    found = import_module(f"headwater.{home or name}")
    return getattr(found, name) if home else found


def __dir__() -> list[str]:
    return sorted(__all__)
