"""Files and folders that are written whole or not at all.

What is being written has another name beside the one that it will take: a draft. Its name says which process writes it,
so that drafts of processes that were killed are known, and removed by whoever writes beside them next.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import socket
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from headwater.errors import AlreadySaved, NotWritten

HOST = f"{zlib.crc32(socket.gethostname().encode()):08x}"
TOKEN = secrets.token_hex(4)
"""Of this process, beside its number: a container that starts again gives the same numbers to other processes."""
NAMED = re.compile(r"\..*\.([0-9a-f]{8})-([0-9]+)-([0-9a-f]{8})-[0-9a-f]{8}\.draft")


@contextmanager
def draft(path: str | os.PathLike[str]) -> Iterator[Path]:
    """An empty folder beside `path`, which takes its name when all went well and is removed when not.

    Errors: AlreadySaved if there is something of that name already; NotWritten, of a full disk for example.
    """
    wanted = Path(path)
    with explained_errors(wanted):
        if wanted.exists():
            raise _there(wanted)
        wanted.parent.mkdir(parents=True, exist_ok=True)
        # Here, since who is killed cannot clean up after itself.
        remove_dead(wanted.parent)
        folder = draft_of(wanted)
        try:
            folder.mkdir()
            yield folder
            try:
                # A rename is atomic within a file system: others see all of the folder, or nothing.
                folder.rename(wanted)
            except OSError:
                if wanted.exists():  # another process was quicker
                    raise _there(wanted) from None
                raise
        # KeyboardInterrupt too: an interrupted save leaves nothing behind.
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise


def write_whole(file: Path, content: bytes) -> None:
    """In place of what was there. Errors: NotWritten."""
    with explained_errors(file), _drafted(file) as (written, opened):
        opened.write(content)
        _finish(opened)
        # Atomic: a reader sees the old file or the new one, never half of it.
        os.replace(written, file)
        sync_folder(file.parent)


def write_new(file: Path, content: bytes) -> bool:
    """Whether this call made the file: of several at once, in any processes, one does. Errors: NotWritten."""
    with explained_errors(file), _drafted(file) as (written, opened):
        opened.write(content)
        _finish(opened)
        try:
            # A link fails if the name is taken, where a rename would overwrite: one of several processes wins.
            os.link(written, file)
        except FileExistsError:
            return False
        except OSError:  # a file system without links: it may be seen before it is whole, but is made once
            try:
                with open(file, "xb") as opened:
                    opened.write(content)
            except FileExistsError:
                return False
        sync_folder(file.parent)
    return True


def sync_folder(folder: Path) -> None:
    """Names too, and not only contents, outlast a power cut from here on."""
    if os.name != "posix":  # elsewhere a folder cannot be opened
        return
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


@contextmanager
def drafted_file(file: Path) -> Iterator[BinaryIO]:
    """A file to be written piece by piece, which takes the place of what was there when all went well.

    Errors: NotWritten.
    """
    with explained_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        remove_dead(file.parent)
        with _drafted(file) as (written, opened):
            yield opened
            _finish(opened)
            os.replace(written, file)
        sync_folder(file.parent)


def _finish(opened: BinaryIO) -> None:
    opened.flush()
    # Before the rename: after a power cut the name may else be there and the content not.
    os.fsync(opened.fileno())


@contextmanager
def _drafted(file: Path) -> Iterator[tuple[Path, BinaryIO]]:
    written = draft_of(file)
    try:
        with open(written, "xb") as opened:
            yield written, opened
    finally:
        with suppress(OSError):
            written.unlink(missing_ok=True)


@contextmanager
def explained_errors(path: Path) -> Iterator[None]:
    """Errors: NotWritten in place of what the system says, with the path and what to do."""
    try:
        yield
    except NotWritten:
        raise
    except OSError as error:
        found = NotWritten(
            f"{path} could not be written: {error}. Nothing of it was kept; make room, or choose a folder that can be "
            "written to, and call again."
        )
        # Who catches OSError for ENOSPC still finds it.
        found.errno = error.errno
        raise found from error


def draft_of(file: Path) -> Path:
    """A new name beside it for what becomes it."""
    # Cut to 100: names end at 255 bytes in most file systems.
    return file.with_name(f".{file.name[:100]}.{HOST}-{os.getpid()}-{TOKEN}-{secrets.token_hex(4)}.draft")


def remove_dead(folder: Path) -> None:
    """Remove what processes of this machine that are no more left half-written in the folder."""
    if os.name != "posix" or not folder.is_dir():  # elsewhere, asking whether a process lives may end it
        return
    for entry in list(folder.iterdir()):
        named = NAMED.fullmatch(entry.name)
        # Of this machine only: on a shared disk another machine's processes cannot be asked.
        if named and named[1] == HOST and not is_alive(int(named[2]), named[3]):
            if entry.is_dir():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                with suppress(OSError):
                    entry.unlink()


def is_draft(name: str) -> bool:
    return NAMED.fullmatch(name) is not None


def is_alive(pid: int, token: str) -> bool:
    """Whether a process of this machine, which gave itself that token, is there."""
    if pid == os.getpid():
        # Our number, another token: a process before us had it, and is gone.
        return token == TOKEN
    try:
        # Signal 0 sends nothing; it asks whether there is such a process.
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # it is someone else's
        return True
    return not _is_zombie(pid)


def _is_zombie(pid: int) -> bool:
    """Dead, and its parent has not asked how it ended: in containers whose first process never asks, for good."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:  # no Linux, or gone by now
        return False
    # After the name, which is in brackets and may have any bytes in it.
    return stat.rpartition(b") ")[2][:1] in (b"Z", b"X")


def _there(path: Path) -> AlreadySaved:
    return AlreadySaved(f"{path} exists; remove it, or choose another name.")
