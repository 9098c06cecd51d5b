"""Python code in a process of its own, which is forked off a server that has imported what most code needs.

It is as real as `python -c`, may kill itself, and is soon there. What is asked about imports, or about what differs
between two starts of Python (the hashes of texts), needs a new interpreter.
"""

import os
import sys
import tempfile
import textwrap
from pathlib import Path

from job_process import FORKS


class Script:
    """Running; `words` are its `sys.argv[1:]`."""

    def __init__(self, code: str, *words: object):
        descriptor, self._said = tempfile.mkstemp()
        os.close(descriptor)
        self.process = FORKS.Process(target=_main, args=(textwrap.dedent(code), [*map(str, words)], self._said))
        self.process.start()

    def poll(self) -> int | None:
        """The exit status, or minus the signal that ended it; None while it runs."""
        return self.process.exitcode

    def end(self, timeout: float = 120) -> tuple[int, str]:
        """The exit status, or minus the signal that ended it; and what it said, errors too."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
        said = Path(self._said).read_text()
        os.unlink(self._said)
        return self.process.exitcode, said


def run(code: str, *words: object) -> tuple[int, str]:
    """To its end: the exit status, or minus the signal that ended it; and what it said, errors too."""
    return Script(code, *words).end()


def _main(code: str, words: list[str], said: str) -> None:
    out = os.open(said, os.O_WRONLY)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.argv[1:] = words
    exec(compile(code, "script", "exec"), {"__name__": "__main__"})
    sys.stdout.flush()
