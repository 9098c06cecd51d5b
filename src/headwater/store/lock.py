"""One process at a time: a lock that the system takes back from whoever ends, however it ends.

A claim (`store.claims`) saves double work, and two processes that find a dead one may both take it. Where each reads
what the other is about to replace, that loses what one of them wrote: so this is the system's own lock on an open file.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from headwater.store.draft import explained_errors

if sys.platform != "win32":
    import fcntl

NONE_HERE = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL}
"""What a file system without locks says."""


@contextmanager
def locked(file: Path) -> Iterator[bool]:
    """Wait until nobody else holds the file's lock, and hold it; False where system or file system has no locks.

    The file is made, and stays. Threads of one process wait for one another too. Errors: NotWritten.
    """
    with explained_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        opened = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        held = _lock(opened)
        try:
            yield held
        finally:
            if held and sys.platform != "win32":
                # Not by closing alone: a process that was forked meanwhile has the file open too.
                fcntl.flock(opened, fcntl.LOCK_UN)
    finally:
        os.close(opened)


def _lock(opened: int) -> bool:
    if sys.platform == "win32":
        return False
    try:
        fcntl.flock(opened, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno in NONE_HERE:
            return False
        raise
    return True
