"""Named blocks of parameters: which numbers belong together, in which order, and in which matrices.

Three levels, each a frozen value:

- a `Parameter` has a name and a shape;
- a `Block` is a named, ordered group of parameters; its flat vectors hold them one after the other;
- a `Part` is a group of numbers in a block whose per-sample gradient is one matrix [o, i]: the weight of a linear
  map with its bias as a last column, one group of a grouped convolution, or anything else as a plain matrix.

A `Layout` knows both orders of a block. Example: for `Linear(3, 2)` the block's flat vector has 8 numbers, the six
weights row by row and then the two biases; its one part is a matrix [2, 4] whose last column is the bias.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from headwater.arrays import Array, namespace, transpose
from headwater.errors import BlockMismatch, InvalidSetting, ShapeMismatch

Structure = str | Mapping[str, Sequence[str]]
"""How parameters are grouped: "full", "layer", "parameter", or {block name: [parameter or module names]}."""


@dataclass(frozen=True)
class Parameter:
    """One array of a model."""

    name: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def owner(self) -> str:
        """The module that holds it: "encoder.0" for "encoder.0.weight", "root" for a parameter of the model itself."""
        return self.name.rpartition(".")[0] or "root"


@dataclass(frozen=True)
class Block:
    """A named, ordered group of parameters."""

    name: str
    parameters: tuple[Parameter, ...]

    @property
    def size(self) -> int:
        return sum(p.size for p in self.parameters)


def partition(parameters: Sequence[Parameter], structure: Structure) -> OrderedDict[str, Block]:
    """Group parameters into blocks, keeping their order.

    Errors: InvalidSetting for an unknown structure; BlockMismatch for a name that no parameter has, or a parameter in
    two blocks. Parameters that the user's own mapping leaves out belong to no block.
    """
    if isinstance(structure, Mapping):
        return _own_blocks(parameters, structure)
    keys = {"full": lambda p: "full", "layer": lambda p: p.owner, "parameter": lambda p: p.name}
    if not isinstance(structure, str) or structure not in keys:
        raise InvalidSetting(f"blocks is {structure!r}; expected 'full', 'layer', 'parameter' or a mapping of names.")
    groups: OrderedDict[str, list[Parameter]] = OrderedDict()
    for parameter in parameters:
        groups.setdefault(keys[structure](parameter), []).append(parameter)
    return OrderedDict((name, Block(name, tuple(group))) for name, group in groups.items())


def _own_blocks(parameters: Sequence[Parameter], mapping: Mapping[str, Sequence[str]]) -> OrderedDict[str, Block]:
    blocks = OrderedDict()
    for name, wanted in mapping.items():
        if isinstance(wanted, str):
            raise InvalidSetting(f"Block {name!r} is the string {wanted!r}; expected a list of names.")
        if not wanted:
            raise BlockMismatch(f"Block {name!r} has no parameters.")
        blocks[name] = Block(name, tuple(p for entry in wanted for p in _named(entry, parameters, name)))
    doubled = [n for n, k in Counter(p.name for b in blocks.values() for p in b.parameters).items() if k > 1]
    if doubled:
        raise BlockMismatch(f"Parameters {doubled} are in a block twice, or in two blocks.")
    return blocks


def _named(entry: str, parameters: Sequence[Parameter], block: str) -> list[Parameter]:
    found = [p for p in parameters if p.name == entry or p.name.startswith(entry + ".")]
    if not found:
        raise BlockMismatch(
            f"Block {block!r} asks for {entry!r}; the attributed parameters are {[p.name for p in parameters]}."
        )
    return found


@dataclass(frozen=True)
class Piece:
    """Consecutive numbers of one flattened parameter, read as a matrix [o, i].

    `transposed` where they lie the other way round, as [i, o]: a kernel that is multiplied from the right.
    """

    parameter: str
    start: int
    shape: tuple[int, int]
    transposed: bool = False

    @property
    def size(self) -> int:
        return self.shape[0] * self.shape[1]

    def read(self, flat: Array) -> Array:
        """Numbers as they lie (K, size) to matrices (K, o, i)."""
        if not self.transposed:
            return flat.reshape((flat.shape[0], *self.shape))
        return transpose(flat.reshape((flat.shape[0], *reversed(self.shape))))

    def lay(self, matrices: Array) -> Array:
        """The inverse of `read`."""
        return (transpose(matrices) if self.transposed else matrices).reshape((matrices.shape[0], self.size))


@dataclass(frozen=True)
class Part:
    """A matrix [o, i] of a block; a bias is its last column, or, `below`, the last rows of a column vector."""

    weight: Piece
    bias: Piece | None = None
    below: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        o, i = self.weight.shape
        if self.bias is None:
            return o, i
        return (o + self.bias.shape[0], i) if self.below else (o, i + 1)

    @property
    def size(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def pieces(self) -> tuple[Piece, ...]:
        return (self.weight,) if self.bias is None else (self.weight, self.bias)


@dataclass(frozen=True)
class Layout:
    """The two orders of a block: flat, parameter by parameter; and part by part, as matrices."""

    block: Block
    parts: tuple[Part, ...]

    def __post_init__(self) -> None:
        if sum(part.size for part in self.parts) != self.block.size:
            raise ShapeMismatch(
                f"The parts of block {self.block.name!r} hold {sum(p.size for p in self.parts)} numbers, "
                f"its parameters {self.block.size}."
            )

    @property
    def size(self) -> int:
        return self.block.size

    @cached_property
    def _flat_order(self) -> tuple[tuple[int, Piece], ...]:
        """(part index, piece), in the order of the flat vector."""
        order = {p.name: k for k, p in enumerate(self.block.parameters)}
        pieces = [(k, piece) for k, part in enumerate(self.parts) for piece in part.pieces]
        return tuple(sorted(pieces, key=lambda item: (order[item[1].parameter], item[1].start)))

    def split(self, flat: Array) -> list[Array]:
        """Flat vectors (K, D) to one array (K, o, i) for each part. Errors: ShapeMismatch for another D."""
        if flat.ndim != 2 or flat.shape[1] != self.size:
            raise ShapeMismatch(
                f"Block {self.block.name!r} takes flat vectors (K, {self.size}), got shape {tuple(flat.shape)}."
            )
        found, start = {}, 0
        for _, piece in self._flat_order:
            found[piece] = piece.read(flat[:, start : start + piece.size])
            start += piece.size
        xp = namespace(flat)
        return [
            found[part.weight]
            if part.bias is None
            else xp.concat([found[part.weight], found[part.bias]], axis=1 if part.below else 2)
            for part in self.parts
        ]

    def merge(self, matrices: Sequence[Array]) -> Array:
        """The inverse of `split`."""
        flat = [piece.lay(self._cut(matrices[k], k, piece)) for k, piece in self._flat_order]
        return flat[0] if len(flat) == 1 else namespace(*flat).concat(flat, axis=1)

    def _cut(self, matrix: Array, part: int, piece: Piece) -> Array:
        whole = self.parts[part]
        if whole.bias is None:
            return matrix
        if whole.below:
            cut = whole.weight.shape[0]
            return matrix[:, cut:] if piece is whole.bias else matrix[:, :cut]
        return matrix[:, :, -1:] if piece is whole.bias else matrix[:, :, :-1]
