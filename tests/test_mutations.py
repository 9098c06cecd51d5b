"""A law that no mistake can break tests nothing: every mutant is noticed by at least one quick law."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from mutations import LAWS, MUTANTS


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_the_laws_hold_without_a_mutant(law: Callable[[], None]) -> None:
    law()


@pytest.mark.parametrize("name", MUTANTS)
def test_a_law_notices_that(name: str) -> None:
    broken = []
    with MUTANTS[name]():
        for law in LAWS:
            try:
                law()
            except AssertionError as error:
                assert str(error).startswith("off by"), "the mutant broke something else than a number"
                broken.append(law.__name__)
                break
    assert broken, f"all {len(LAWS)} laws hold although {name.replace('_', ' ')}"
