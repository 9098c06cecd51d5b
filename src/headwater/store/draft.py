"""A folder that is written whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def draft(path: str | os.PathLike[str]) -> Iterator[Path]:
    """An empty folder beside `path`, which takes its name when all went well and is removed when not.

    Errors: FileExistsError if there is something of that name already.
    """
    wanted = Path(path)
    if wanted.exists():
        raise FileExistsError(f"{wanted} exists; remove it, or choose another name.")
    wanted.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=wanted.parent, prefix=f".{wanted.name}-"))
    try:
        folder.chmod(0o755)
        yield folder
        folder.rename(wanted)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
