"""headwater: which training examples made the model do this, and by how much?"""

import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

from headwater.methods.registry import METHODS as METHODS

if TYPE_CHECKING:
    from headwater import errors as errors
    from headwater.arrays import working_memory as working_memory
    from headwater.attributor import Attributor as Attributor
    from headwater.door import Influence as Influence
    from headwater.door import curvature_of as curvature_of
    from headwater.errors import NotConverged as NotConverged
    from headwater.influence import ComposableInfluence as ComposableInfluence
    from headwater.methods.damping import Relative as Relative
    from headwater.methods.damping import relative as relative
    from headwater.methods.registry import *  # noqa: F403
    from headwater.run.factors import KeptFactors as KeptFactors
    from headwater.run.kept import KeptGradients as KeptGradients
    from headwater.store.scores import Scores as Scores
    from headwater.store.topk import TopK as TopK
    from headwater.trajectory.methods import Source as Source
    from headwater.trajectory.methods import Unrolled as Unrolled
    from headwater.trajectory.recorders import record as record
    from headwater.trajectory.trajectory import Trajectory as Trajectory
    from headwater.types import Batch as Batch
    from headwater.types import InfluenceMode as InfluenceMode

__version__ = "0.1.0"

_HOMES = {entry.class_name: f"methods.{entry.module}" for entry in METHODS} | {
    "Attributor": "attributor",
    "Batch": "types",
    "ComposableInfluence": "influence",
    "Influence": "door",
    "InfluenceMode": "types",
    "KeptFactors": "run.factors",
    "KeptGradients": "run.kept",
    "MethodEntry": "methods.registry",
    "NotConverged": "errors",
    "Relative": "methods.damping",
    "Scores": "store.scores",
    "Source": "trajectory.methods",
    "TopK": "store.topk",
    "Trajectory": "trajectory.trajectory",
    "Unrolled": "trajectory.methods",
    "curvature_of": "door",
    "errors": "",
    "record": "trajectory.recorders",
    "relative": "methods.damping",
    "working_memory": "arrays",
}
__all__ = ["METHODS", "__version__", *_HOMES]
_RENAMED = {"Extremes": "TopK"}


def __getattr__(name: str) -> Any:
    """Names are looked up when they are first used, so that importing headwater imports next to nothing."""
    if name in _RENAMED:
        said = f"headwater.{name} is now headwater.{_RENAMED[name]}; the old name ends in 0.2."
        warnings.warn(said, DeprecationWarning, stacklevel=2)
        name = _RENAMED[name]
    if name not in _HOMES:
        raise AttributeError(f"headwater has no {name!r}; it has {', '.join(__all__)}.")
    home = _HOMES[name]
    found = import_module(f"headwater.{home or name}")
    return getattr(found, name) if home else found


def __dir__() -> list[str]:
    return sorted(__all__)
