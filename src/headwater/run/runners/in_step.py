"""A fit in a folder by processes that hold one model together: each tile is computed by all, and written by the first.

Which tiles are there is asked of all of them, since none may leave a forward pass to the others. So there is nothing to
claim and nobody to wait for: the runner of `shared.py` does the same on all, by what this store answers.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from headwater.gradients.together import Together
from headwater.store.claims import Claims
from headwater.store.draft import remove_dead
from headwater.store.parts import PartStore, Values


class PartsInStep(PartStore):
    """Parts that are there once all processes see them."""

    def __init__(self, path: str | os.PathLike[str], identity: Mapping[str, Any], together: Together):
        super().__init__(path, identity)
        self._together = together
        self.claims = NoClaims(self.path)

    def has(self, name: str) -> bool:
        return self._together.all_say(super().has(name))

    def read(self, name: str, rows: str) -> dict[str, Any] | None:
        found = super().read(name, rows)
        return found if self._together.all_say(found is not None) else None

    def write(self, name: str, rows: str, values: Values) -> None:
        if self._together.number == 0:
            super().write(name, rows, values)
            remove_dead(self._file(name).parent)


class NoClaims(Claims):
    """All compute what is missing: everything is theirs, and nothing is another's."""

    def claim(self, name: str) -> bool:
        return True

    def is_free(self, name: str) -> bool:
        return True

    def touch(self, name: str) -> None:
        pass

    def release(self, name: str) -> None:
        pass
