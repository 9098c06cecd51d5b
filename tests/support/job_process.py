"""A command line in a process that was forked off a server which has imported what it needs: real, and soon there."""

import os
import signal
from multiprocessing import get_context
from pathlib import Path

from headwater import cli

FORKS = get_context("forkserver")
FORKS.set_forkserver_preload(
    ["job_process", "headwater.torch", "headwater.run.attribute", "headwater.evaluate.bank", "zarr"]
)


def start(folder: Path, words: list[str], **environment: str):
    """The process; what it says on its error stream is in the file `said` of the folder."""
    process = FORKS.Process(target=_main, args=(folder, words, environment))
    process.start()
    return process


def _main(folder: Path, words: list[str], environment: dict[str, str]) -> None:
    # Shells let what they start in the background ignore Ctrl-C, and that is inherited.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(folder)
    os.environ.update(environment)
    os.dup2(os.open("said", os.O_WRONLY | os.O_CREAT), 2)
    cli.main(words)
