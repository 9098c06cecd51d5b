"""The command line: few verbs. What goes wrong is one line on the error stream, and an exit status: see `EXITS`."""

from __future__ import annotations

import os
import shlex
import sys
import traceback
from collections.abc import Sequence
from typing import Literal, NoReturn

from cyclopts import CycloptsError

import headwater
from headwater.cli import demo, job, results, serve, store, verify
from headwater.cli.app import EXITS, CheckFailed, Method, app, command
from headwater.cli.stops import Stopped, stop_signals
from headwater.errors import HeadwaterError

__all__ = [
    "EXITS",
    "Method",
    "app",
    "completion",
    "demo",
    "job",
    "main",
    "results",
    "serve",
    "store",
    "verify",
    "version",
]


@app.command
def version() -> None:
    """Print the version."""
    print(headwater.__version__)


@app.command
def completion(shell: Literal["bash", "zsh", "fish"], /) -> None:
    """Print what makes a shell complete headwater's commands; see the README for where it goes."""
    print(app.generate_completion(prog_name="headwater", shell=shell))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and exit: 0 when all went well, else as `EXITS` says, with one line on the error stream.

    What is none of headwater's errors came out of the user's own code, or is a fault of ours: with its traceback.
    """
    given = sys.argv[1:] if arguments is None else list(arguments)
    command.set(shlex.join(["headwater", *given]))
    try:
        with stop_signals():
            app(given, exit_on_error=False, print_error=False, result_action="return_value")
            sys.stdout.flush()
    except CheckFailed:
        sys.exit(1)
    except BrokenPipeError:
        _unread()
    except SystemExit as ended:
        if isinstance(ended.__context__, BrokenPipeError):  # rich, which prints help
            _unread()
        _say(f"The code that was called ended Python: SystemExit: {ended.code}")
        sys.exit(2)
    except Stopped as stopped:
        _say(str(stopped))
        sys.exit(stopped.status)
    except (CycloptsError, HeadwaterError, OSError) as error:
        _say(str(error))
        sys.exit(2)
    except Exception:
        traceback.print_exc()
        sys.exit(2)


def _unread() -> NoReturn:
    """As in `headwater top job.toml | head`: nobody is told, for nobody listens."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python itself flushes it once more in the end
    sys.exit(141)  # 128 + SIGPIPE, as shells have it


def _say(text: str) -> None:
    print(f"headwater: {' '.join(text.split())}", file=sys.stderr)
