"""How much of a model is attributed."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from headwater.blocks import Parameter


@dataclass(frozen=True)
class Coverage:
    """How many of the trainable parameters are attributed, and which are not."""

    attributed: int
    trainable: int
    missing: tuple[str, ...] = ()
    frozen: int = 0
    """Numbers that are not trainable, and never attributed: all but the adapters of a model that has some, say."""

    @classmethod
    def of(cls, trainable: Sequence[Parameter], inside: Collection[str], frozen: int = 0) -> Coverage:
        """Of these parameters those whose names are inside."""
        return cls(
            sum(p.size for p in trainable if p.name in inside),
            sum(p.size for p in trainable),
            tuple(p.name for p in trainable if p.name not in inside),
            frozen,
        )

    @property
    def fraction(self) -> float:
        return self.attributed / self.trainable
