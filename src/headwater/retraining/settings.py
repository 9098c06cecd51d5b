"""The settings of a training: one frozen object, which a user gives as it is, or by the names of its fields."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from headwater.errors import InvalidSetting
from headwater.settings import check_whole

S = TypeVar("S")


def settings_of(kind: type[S], given: S | None, fields: Mapping[str, object]) -> S:
    """The settings that were given, or made of fields. Errors: InvalidSetting for both; those of the kind."""
    if given is None:
        return kind(**fields)
    if fields:
        raise InvalidSetting(
            f"settings were given, and {', '.join(fields)} too; dataclasses.replace(settings, ...) changes single ones."
        )
    return given


def check_counts(**counts: object) -> None:
    """Errors: InvalidSetting for what is no whole number of at least one."""
    for name, value in counts.items():
        check_whole(name, value, 1)
