"""headwater: which training examples made the model do this, and by how much?"""

import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headwater import errors as errors
    from headwater.arrays import working_memory as working_memory
    from headwater.attributor import Attributor as Attributor
    from headwater.errors import NotConverged as NotConverged
    from headwater.influence import ComposableInfluence as ComposableInfluence
    from headwater.methods.damping import Relative as Relative
    from headwater.methods.damping import relative as relative
    from headwater.methods.direct import Direct as Direct
    from headwater.methods.dual import DataInf as DataInf
    from headwater.methods.dual import Dual as Dual
    from headwater.methods.grad_dot import GradCos as GradCos
    from headwater.methods.grad_dot import GradDot as GradDot
    from headwater.methods.iterative import BlockKrylov as BlockKrylov
    from headwater.methods.iterative import Cg as Cg
    from headwater.methods.kronecker import Ekfac as Ekfac
    from headwater.methods.kronecker import Kfac as Kfac
    from headwater.methods.low_rank import Arnoldi as Arnoldi
    from headwater.methods.low_rank import Nystroem as Nystroem
    from headwater.methods.projected import FactGrass as FactGrass
    from headwater.methods.projected import LoGra as LoGra
    from headwater.methods.projected import LoRif as LoRif
    from headwater.methods.projected import Trak as Trak
    from headwater.methods.representer import Representer as Representer
    from headwater.methods.stochastic import Astra as Astra
    from headwater.methods.stochastic import Lissa as Lissa
    from headwater.methods.tracin import TracIn as TracIn
    from headwater.store.scores import Scores as Scores
    from headwater.store.scores import TopK as TopK
    from headwater.types import Batch as Batch
    from headwater.types import InfluenceMode as InfluenceMode

__version__ = "0.1.0"

_HOMES = {
    "Arnoldi": "methods.low_rank",
    "Astra": "methods.stochastic",
    "Attributor": "attributor",
    "Batch": "types",
    "BlockKrylov": "methods.iterative",
    "Cg": "methods.iterative",
    "ComposableInfluence": "influence",
    "DataInf": "methods.dual",
    "Direct": "methods.direct",
    "Dual": "methods.dual",
    "Ekfac": "methods.kronecker",
    "FactGrass": "methods.projected",
    "GradCos": "methods.grad_dot",
    "GradDot": "methods.grad_dot",
    "InfluenceMode": "types",
    "Kfac": "methods.kronecker",
    "Lissa": "methods.stochastic",
    "LoGra": "methods.projected",
    "LoRif": "methods.projected",
    "NotConverged": "errors",
    "Nystroem": "methods.low_rank",
    "Relative": "methods.damping",
    "Representer": "methods.representer",
    "Scores": "store.scores",
    "TopK": "store.scores",
    "TracIn": "methods.tracin",
    "Trak": "methods.projected",
    "errors": "",
    "relative": "methods.damping",
    "working_memory": "arrays",
}
__all__ = ["__version__", *_HOMES]
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
