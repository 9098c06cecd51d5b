"""A law that no mistake can break tests nothing: every mutant is noticed by at least one quick law.

A third of the mutants are among the fast tests, the others in `./dev slow`: they test the tests, which change less.

The one registry of all mutants. Each group has its own laws, and a mutant runs those that concern it until one breaks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import contract_mutations
import file_mutations
import losses_mutations
import mutations
import numerics_mutations
import passes_mutations
import projected_mutations
import pytest
import row_mutations
import solver_mutations
import test_ensemble
import test_removal
import test_representer

import headwater as hw

Law = Callable[[], None]

# The laws of removal are identities of linear algebra, which hold however little curvature stays.
pytestmark = [pytest.mark.sampled, pytest.mark.filterwarnings("ignore::headwater.errors.RoughForecast")]


def _with(laws: Iterable[Law], mutants: dict[str, Any]) -> dict[str, tuple[Any, tuple[Law, ...]]]:
    return {name: (mutant, tuple(laws)) for name, mutant in mutants.items()}


GROUPS: dict[str, tuple[tuple[Law, ...], dict[str, tuple[Any, tuple[Law, ...]]]]] = {
    "scores": (mutations.LAWS, _with(mutations.LAWS, mutations.MUTANTS)),
    "solvers": (solver_mutations.LAWS, solver_mutations.MUTANTS),
    **{
        group: (tuple(module.LAWS), _with(module.LAWS, module.MUTANTS))
        for group, module in {
            "contract": contract_mutations,
            "projections": projected_mutations,
            "numerics": numerics_mutations,
            "ensembles": test_ensemble,
            "representers": test_representer,
            "removal": test_removal,
            "losses": losses_mutations,
            "files": file_mutations,
            "rows": row_mutations,
            "passes": passes_mutations,
        }.items()
    },
}
LAWS = [pytest.param(law, id=f"{group}: {law.__name__}") for group, (laws, _) in GROUPS.items() for law in laws]
MUTANTS = [
    pytest.param(mutant, laws, id=f"{group}: {name.replace('_', ' ')}", marks=() if k % 3 == 0 else pytest.mark.slow)
    for group, (_, mutants) in GROUPS.items()
    for k, (name, (mutant, laws)) in enumerate(mutants.items())
]


@pytest.mark.parametrize("law", LAWS)
def test_the_laws_hold_without_a_mutant(law: Law) -> None:
    law()


@pytest.mark.parametrize(("mutant", "laws"), MUTANTS)
def test_a_law_notices_that(mutant: Any, laws: tuple[Law, ...]) -> None:
    with mutant():
        for law in laws:
            try:
                law()
            except AssertionError as error:
                assert str(error).startswith("off by"), "the mutant broke something else than a number"
                return
    raise AssertionError(f"all {len(laws)} laws hold all the same")


INVERTED = [entry.class_name for entry in hw.METHODS if not issubclass(entry.cls, hw.GradDot)]


@pytest.mark.parametrize("method", INVERTED)
def test_there_is_a_mutant_whose_inverse_is_a_multiple_of_the_identity(method: str) -> None:
    """Which a test cannot tell from an inverse when its damping is huge."""
    names = {name for _, mutants in GROUPS.values() for name in mutants}
    assert f"{method} inverts to a multiple of the identity" in names


def test_every_mutant_restores_what_it_changed() -> None:
    for _, mutants in GROUPS.values():
        for mutant, _ in mutants.values():
            with mutant():
                pass
    for laws in (solver_mutations.LAWS[:3], mutations.LAWS[:2]):
        for law in laws:
            law()
