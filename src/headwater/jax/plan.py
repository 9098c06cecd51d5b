"""Which parameters form blocks and parts, and how the uses of a parameter fill its part."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from headwater.blocks import Block, Layout, Part, Piece, Structure, partition
from headwater.gradients.algebra import Dense, Gradient, Sum
from headwater.gradients.outer import Outer, RowSparse
from headwater.jax.trace import Program, Site
from headwater.jax.tree import Tree, wide

Place = tuple[str, int]
"""(block name, part index)."""


@dataclass(frozen=True)
class Plan:
    """Blocks and their layouts, and the weights whose uses fill their parts; how, is decided for each shape of the
    rows, by `fill`."""

    layouts: tuple[Layout, ...]
    structured: frozenset[str]

    @property
    def by_name(self) -> OrderedDict[str, Layout]:
        return OrderedDict((layout.block.name, layout) for layout in self.layouts)

    @property
    def parts(self) -> list[tuple[Place, Part]]:
        return [((layout.block.name, k), part) for layout in self.layouts for k, part in enumerate(layout.parts)]


def make_plan(
    tree: Tree, structure: Structure, program: Program | None = None, distrusted: Collection[str] = ()
) -> Plan:
    """Blocks by structure; parts by what the program does with parameters, plain matrices where it is not known."""
    weights = {} if program is None else _weights(program, distrusted)
    biases = {} if program is None else _biases(program, weights, distrusted)
    blocks = partition(tree.parameters, structure)
    layouts = tuple(Layout(block, tuple(_parts(block, weights, biases))) for block in blocks.values())
    return Plan(layouts, frozenset(weights))


def _weights(program: Program, distrusted: Collection[str]) -> dict[str, tuple[Piece, ...]]:
    """Parameters all of whose uses are sites, and the matrices that they are cut to."""
    pieces: dict[str, dict[int, Piece]] = {}
    # Tied to a product, a table would else have to be read transposed, which row-sparse values cannot.
    for site in sorted(program.sites, key=lambda s: not s.is_table):  # a table decides which way it lies
        for piece in site.pieces:
            pieces.setdefault(site.parameter, {}).setdefault(piece.start, piece)
    found = {}
    for name, cuts in pieces.items():
        # By their place in the parameter: a grouped convolution's weight is cut into one matrix a group.
        cut = tuple(cuts[start] for start in sorted(cuts))
        # A use of a slice leaves numbers whose gradient would be missing.
        whole = sum(piece.size for piece in cut) == math.prod(program.shapes[name])
        if name in program.loose or name in distrusted or not whole:
            continue
        if all(_matches(piece, cuts) for site in program.sites if site.parameter == name for piece in site.pieces):
            found[name] = cut
    return found


def _matches(piece: Piece, cuts: Mapping[int, Piece]) -> bool:
    """Whether it is one of the matrices, or its transpose."""
    known = cuts.get(piece.start)
    return known is not None and (piece == known or _transposed(piece) == known)


def _transposed(piece: Piece) -> Piece:
    return Piece(piece.parameter, piece.start, (piece.shape[1], piece.shape[0]), not piece.transposed)


def _biases(program: Program, weights: Mapping[str, Sequence[Piece]], distrusted: Collection[str]) -> dict[str, str]:
    """Weight to bias, where each use of the one is followed by the other."""
    found: dict[str, str] = {}
    for name, pieces in weights.items():
        sites = [site for site in program.sites if site.parameter == name]
        # Where some uses add the bias and others do not, one column cannot stand for it.
        biases = {site.bias for site in sites}
        bias = biases.pop() if len(biases) == 1 else None
        # A bias behind two weights would be a column of both, and counted twice.
        alone = all(site.parameter == name for site in program.sites if site.bias == bias)
        # In a transposed use inputs and outputs change places, and the ones' column is on the wrong side.
        straight = all(site.pieces == tuple(pieces) for site in sites) and len(pieces) == 1
        if bias is not None and alone and straight and bias not in program.loose and bias not in distrusted:
            found[name] = bias
    return found


def _parts(block: Block, weights: Mapping[str, Sequence[Piece]], biases: Mapping[str, str]) -> list[Part]:
    inside = {p.name for p in block.parameters}
    together = {w: b for w, b in biases.items() if w in inside and b in inside}
    parts, plain = [], []
    for parameter in block.parameters:
        bias = together.get(parameter.name)
        for piece in weights.get(parameter.name, ()):
            parts.append(Part(piece, None if bias is None else Piece(bias, 0, (piece.shape[0], 1))))
        if parameter.name not in weights and parameter.name not in together.values():
            plain.append(parameter)
    columns: dict[tuple[str, int], list[Piece]] = {}
    for parameter in plain:
        if len(parameter.shape) == 1:
            # Vectors of one module and size: a normalisation's scale and shift, if there are two.
            columns.setdefault((parameter.owner, parameter.size), []).append(
                Piece(parameter.name, 0, (parameter.size, 1))
            )
        else:
            parts.append(Part(Piece(parameter.name, 0, as_matrix(parameter.shape))))
    for pieces in columns.values():
        parts += _stacked(pieces)
    return parts


def _stacked(pieces: Sequence[Piece]) -> list[Part]:
    """Scale and shift of a normalisation as one column vector, small enough for an exact block."""
    if len(pieces) != 2 or pieces[0].parameter.rpartition(".")[0] == "":
        return [Part(piece) for piece in pieces]
    # The bias below, as in PyTorch: blocks of both frameworks then have the same order of numbers.
    low, high = sorted(pieces, key=lambda piece: "bias" not in piece.parameter.rpartition(".")[2])
    return [Part(high, low, below=True)]


def as_matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """A parameter's shape as a matrix: the first axis against the rest."""
    if len(shape) < 2:
        return (shape[0] if shape else 1), 1
    return shape[0], math.prod(shape[1:])


@dataclass(frozen=True)
class Filling:
    """For rows of one shape: which uses fill each part, and which parameters are differentiated plainly."""

    program: Program
    uses: dict[Place, tuple[Part, list[tuple[Site, int]]]]
    """A part, its sites, and which of a site's pieces the part is."""
    plain: dict[Place, Part]

    @property
    def steps(self) -> list[int]:
        return sorted({site.step for _, sites in self.uses.values() for site, _ in sites})

    @property
    def sharing(self) -> set[Place]:
        """Parts whose inputs are operands alone, so that they are the same whatever is differentiated."""
        return {
            place
            for place, (part, uses) in self.uses.items()
            if all(site.is_table or site.pieces[k] == part.weight for site, k in uses)
        }

    @property
    def parameters(self) -> list[str]:
        """Those that are differentiated plainly."""
        return sorted({piece.parameter for part in self.plain.values() for piece in part.pieces})

    def values(
        self, operands: Mapping[int, jax.Array], slopes: Mapping[int, jax.Array], grads: Mapping[str, jax.Array]
    ) -> dict[Place, Gradient]:
        """From operands and output-gradients of sites [n, ...], by step, and plain gradients [n, *shape]."""
        sites = {site.step: site for _, uses in self.uses.values() for site, _ in uses}
        # Once for each step: several pieces (groups, tied uses) share its operand.
        factors = {step: site.rule(wide(operands[step]), wide(slopes[step])) for step, site in sites.items()}
        found: dict[Place, Gradient] = {}
        for place, (part, uses) in self.uses.items():
            found[place] = add([_value(part, site, k, *factors[site.step][k]) for site, k in uses])
        return found | {place: Dense(wide(_matrix(part, grads))) for place, part in self.plain.items()}


def fill(plan: Plan, program: Program) -> Filling:
    """How the program's uses fill the plan's parts; what they do not fill as it was planned is differentiated."""
    uses: dict[Place, tuple[Part, list[tuple[Site, int]]]] = {}
    plain: dict[Place, Part] = {}
    for place, part in plan.parts:
        found = _uses(part, program) if part.weight.parameter in plan.structured else None
        if found is None:
            plain[place] = part
        else:
            uses[place] = part, found
    return Filling(program, uses, plain)


def _uses(part: Part, program: Program) -> list[tuple[Site, int]] | None:
    """The sites that make up the part's gradient; None if there are others, or none."""
    # Rows of another shape may take another branch: a plan's weight may be loose in this program.
    if part.weight.parameter in program.loose:
        return None
    sites = [site for site in program.sites if site.parameter == part.weight.parameter]
    found = []
    for site in sites:
        if part.bias is not None and site.bias != part.bias.parameter:
            return None
        for k, piece in enumerate(site.pieces):
            if piece in (part.weight, _transposed(part.weight)):
                found.append((site, k))
            # It overlaps the part otherwise than planned: its share of the gradient has another form.
            elif piece.start < part.weight.start + part.weight.size and part.weight.start < piece.start + piece.size:
                return None
    return found or None


def _value(part: Part, site: Site, k: int, first: jax.Array, second: jax.Array) -> Gradient:
    if site.is_table:
        return RowSparse(first, second, part.weight.shape[0])
    if site.pieces[k] == part.weight:
        return Outer(first, second, ones=part.bias is not None)
    # The weight was used transposed: inputs and output-gradients change roles, (b a^T)^T = a b^T.
    return Outer(second, first)


def _matrix(part: Part, grads: Mapping[str, jax.Array]) -> jax.Array:
    """A part's matrices [n, o, i] from its parameters' gradients."""
    cuts: list[Any] = []
    for piece in part.pieces:
        flat = grads[piece.parameter].reshape(len(grads[piece.parameter]), -1)
        cuts.append(piece.read(flat[:, piece.start : piece.start + piece.size]))
    return cuts[0] if len(cuts) == 1 else jnp.concatenate(cuts, axis=1 if part.below else 2)


def add(values: Sequence[Gradient]) -> Gradient:
    """Gradients of one matrix from several uses: of one kind, more positions of it; else a sum of kinds."""
    kinds: list[Gradient] = []
    for value in values:
        for k, mine in enumerate(kinds):
            if type(mine) is type(value):
                # More positions of the same matrix, which stays a sum of outer products.
                kinds[k] = mine.join(value)  # type: ignore[attr-defined]
                break
        else:
            kinds.append(value)
    return kinds[0] if len(kinds) == 1 else Sum(tuple(kinds))
