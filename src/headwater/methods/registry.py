"""Every method, one line each: `hw`'s names, the command line, the demo, the docs' table and the tests read them here.

A new paper is a file in this package and a line of METHODS (and its import above, for type checkers).
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from headwater.methods.base import Method
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


class Costs(NamedTuple):
    """What docs/methods.md says of a method, in its words and letters."""

    curvature: str
    """C, and how it is inverted."""
    fit: str
    query: str
    pair: str
    memory: str
    needs: str = ""


@dataclass(frozen=True)
class MethodEntry:
    """A method, by its names."""

    name: str
    """On the command line."""
    class_name: str
    """As an attribute of `headwater`."""
    module: str
    """In `headwater.methods`."""
    title: str
    """In reports."""
    costs: Costs

    @property
    def cls(self) -> type[Method]:
        """The class of its settings."""
        found: type[Method] = getattr(import_module(f"headwater.methods.{self.module}"), self.class_name)
        return found


# fmt: off
METHODS: tuple[MethodEntry, ...] = (
    MethodEntry("grad-dot", "GradDot", "grad_dot", "grad-dot", Costs("none", "nothing", "nothing", "T^2 (o + i) or o i", "the queries' gradients")),  # noqa: E501
    MethodEntry("grad-cos", "GradCos", "grad_dot", "grad-cos", Costs("none; unit gradients", "nothing", "nothing", "as above", "as above")),  # noqa: E501
    MethodEntry("tracin", "TracIn", "tracin", "TracIn", Costs("none; summed over checkpoints", "nothing", "nothing", "as above, per checkpoint", "as above, per checkpoint", "checkpoints, learning rates")),  # noqa: E501
    MethodEntry("representer", "Representer", "representer", "representer points", Costs("l2, on one layer", "nothing", "nothing", "o + i", "little", "a last layer where its regularised loss is stationary")),  # noqa: E501
    MethodEntry("direct", "Direct", "direct", "exact GGN", Costs("any, exact; dense", "N P^2 + P^3", "P^2", "P", "P^2", "blocks of 10,000 parameters at most or so")),  # noqa: E501
    MethodEntry("dual", "Dual", "dual", "dual form", Costs("empirical Fisher (or GGN), exact; N x N", "N^2 (o + i) + N^3", "2 N (o + i)", "o i", "N^2, Q P", "few rows; for the GGN few outputs")),  # noqa: E501
    MethodEntry("cg", "Cg", "iterative", "conjugate gradients", Costs("GGN or Hessian, exact; conjugate gradients", "a preconditioner", "few outputs: m numbers; else 3 to 40 products", "o i", "few outputs: m^2; else 4 Q P", "C + damping positive")),  # noqa: E501
    MethodEntry("block-krylov", "BlockKrylov", "iterative", "block Krylov", Costs("as Cg; one space for all queries and dampings", "a preconditioner", "3 to 50 products", "o i", "2 k Q P, in groups", "as Cg")),  # noqa: E501
    MethodEntry("lissa", "Lissa", "stochastic", "LiSSA", Costs("as Cg; steps of few rows", "nothing", "200 steps of 64 rows", "o i", "Q P, all steps' rows", "a scale above half the top eigenvalue")),  # noqa: E501
    MethodEntry("astra", "Astra", "stochastic", "ASTRA", Costs("as Cg; steps of few rows, after EKFAC", "EKFAC", "50 steps of 256 rows", "o i", "2 Q P, all steps' rows", "as EKFAC")),  # noqa: E501
    MethodEntry("arnoldi", "Arnoldi", "low_rank", "Arnoldi", Costs("GGN or Hessian, its k leading eigenpairs", "2 to 10 k products", "k P", "o i", "k P", "eigenvalues that fall fast")),  # noqa: E501
    MethodEntry("nystroem", "Nystroem", "low_rank", "Nystroem", Costs("GGN, seen through k random vectors", "k products", "k P", "o i", "k P", "C positive semi-definite")),  # noqa: E501
    MethodEntry("kfac", "Kfac", "kronecker", "KFAC", Costs("Fisher, a Kronecker product for each layer", "N T (o^2 + i^2) + o^3 + i^3", "o i (o + i)", "o i; factored: o + i", "o^2 + i^2", "a likelihood")),  # noqa: E501
    MethodEntry("ekfac", "Ekfac", "kronecker", "EKFAC", Costs("Fisher, diagonal in KFAC's eigenbasis", "twice KFAC's, two passes", "o i (o + i)", "o i; with a rank: rank (o + i)", "o^2 + i^2 + o i", "a likelihood")),  # noqa: E501
    MethodEntry("datainf", "DataInf", "dual", "DataInf", Costs("empirical Fisher; mean of inverses", "norms", "N (o + i), and N^2 once", "o + i, and N", "N Q, or Q P")),  # noqa: E501
    MethodEntry("trak", "Trak", "projected", "TRAK", Costs("empirical Fisher of projected margins", "N P k, 16 times less when mixed", "P k", "k", "k^2", "a classifier")),  # noqa: E501
    MethodEntry("logra", "LoGra", "projected", "LoGra", Costs("empirical Fisher of gradients projected on two sides", "N T k (o + i) + N k^4 + k^6", "T k (o + i) + k^4", "k^2", "k^4", "layers with two sides")),  # noqa: E501
    MethodEntry("lorif", "LoRif", "projected", "LoRIF", Costs("as LoGra, of rows cut to rank c", "as LoGra, and N SVDs of k x k", "as LoGra", "k^2", "as LoGra; a stored row is 2 c k", "as LoGra")),  # noqa: E501
    MethodEntry("factgrass", "FactGrass", "projected", "FactGraSS", Costs("as LoGra, sparse projections", "N T (o + i) + N k^4 + k^6", "T (o + i) + k^4", "k^2", "k^4", "as LoGra")),  # noqa: E501
)
# fmt: on


def costs_table() -> str:
    """METHODS as the table of docs/methods.md."""
    head = ["method", "C, and its inverse", "fit", "per query", "per pair", "memory", "needs"]
    rows = [head, ["---"] * len(head), *([f"`hw.{entry.class_name}()`", *entry.costs] for entry in METHODS)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in rows)
