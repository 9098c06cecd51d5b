"""The command that all verbs belong to."""

from __future__ import annotations

import sys
from contextvars import ContextVar
from pathlib import Path
from shutil import get_terminal_size
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import App, Group, Parameter

import headwater
from headwater.errors import InvalidSetting

EXITS = (
    "Exit status: 0 all went well; 1 a check failed; 2 something was wrong with what was given; 130 interrupted "
    "(Ctrl-C); 141 nobody reads what is printed; 143 terminated (SIGTERM)."
)


class CheckFailed(Exception):
    """What was checked is not so; what was found has been printed."""


command: ContextVar[str] = ContextVar("command", default="headwater")
"""As it was typed."""

app = App(
    name="headwater",
    help="Which training examples made the model do this, and by how much?",
    help_epilogue=EXITS,
    version=headwater.__version__,
    # Plain text: to parse Markdown takes longer than all the rest of --help.
    help_format="plaintext",
    # Signals are told of in one place, with how to go on.
    suppress_keyboard_interrupt=False,
)

YOURS, LOOK, TRY = (Group.create_ordered(name) for name in ("Your own job", "Look at results", "Try it"))

Quiet = Annotated[bool, Parameter(negative="", help="No progress bars, and no words.")]
Json = Annotated[bool, Parameter(name="--json", negative="", help="Print JSON.")]

SetupOrJob = Annotated[
    str,
    Parameter(help="A job file (see `headwater init`); or only a setup: FILE.py, FILE.py:function or module:function."),
]
Store = Annotated[Path | None, Parameter(help="Folder of the results, in place of the job's.")]
Memory = Annotated[
    str | None, Parameter(help="Bytes that the process may hold in all, as 2GiB or 500MB, in place of the job's.")
]
Worker = Annotated[
    str,
    Parameter(
        help="Share the work: NUMBER/COUNT, each process with its number from 0, as 0/4, 1/4, 2/4, 3/4; or env, under "
        "torchrun or SLURM."
    ),
]

if TYPE_CHECKING:
    Method = str
else:
    Method = Literal[tuple(entry.name for entry in headwater.METHODS)]


def print_wrapped(words: object) -> None:
    """Print, on a terminal in lines that it can hold; what reads a pipe gets each sentence in one line."""
    text = str(words)
    if sys.stdout.isatty():
        from headwater.tables import wrapped

        text = wrapped(text, get_terminal_size().columns)
    print(text)


def checked_seed(seed: int) -> int:
    """Errors: InvalidSetting."""
    if seed < 0:
        raise InvalidSetting(f"--seed {seed}: expected a whole number of at least 0.")
    return seed
