"""What shows that files are as they were written: digests, kept beside what they are about.

1. A JSON file has an entry "seal": a digest of all its other content, and digests of the files that belong to it. A
   folder is sealed by one JSON file of its own, which names all others: none can be lost, changed or exchanged.
2. A file of bytes ends with a mark and a digest of the bytes before it and of where they belong ("run 3 of that bank"),
   so that files of one kind cannot be exchanged. NumPy reads .npy and .npz files with such an end as any others.

A digest is BLAKE2b of 16 bytes: against accidents, not against people.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from headwater.errors import DamagedFile

VERSION = 1
"""Of seals; files without one were written before there were any."""
MARK = b"\nheadwater seal "
SIZE = 16
SAVE_AGAIN = "Save it again, or take a copy that is whole."


def digest(*pieces: bytes) -> str:
    """Of the pieces in order; where one ends counts."""
    found = hashlib.blake2b(digest_size=SIZE)
    for piece in pieces:
        # With lengths, so that ("ab", "c") and ("a", "bc") differ.
        found.update(len(piece).to_bytes(8, "little"))
        found.update(piece)
    return found.hexdigest()


# JSON -----------------------------------------------------------------------------------------------------------------


def sealed(
    values: Mapping[str, Any], files: Mapping[str, str] | None = None, inside: str | None = None
) -> dict[str, Any]:
    """JSON values with their seal; files: the digests of those that belong to them. inside: the entry that takes it."""
    entry: dict[str, Any] = {"version": VERSION, "files": dict(files or {})}
    # The seal's own fields are digested, too: nobody can drop a file from the list.
    entry["digest"] = digest(_canonical(values), _canonical(entry))
    holder = values if inside is None else values[inside]
    closed = {**holder, "seal": entry}
    return closed if inside is None else {**values, inside: closed}


class Fields(dict[str, Any]):
    """What a sealed file says. Errors: DamagedFile for a field that it has not, as files of another version."""

    def __init__(self, values: Mapping[str, Any], file: Path):
        super().__init__(values)
        self.file = file

    def __missing__(self, name: str) -> Any:
        raise DamagedFile(
            f"{self.file} has no field {name!r}: another version of headwater wrote it. Read it with that version, or "
            "remove it and make the call that wrote it again."
        )


def unsealed(file: Path, inside: str | None = None, remedy: str = SAVE_AGAIN) -> tuple[dict[str, Any], dict[str, Any]]:
    """A sealed JSON file's values, and its seal. Errors: DamagedFile."""
    try:
        values = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise DamagedFile(f"{file} is missing. {remedy}") from None
    # A damaged file may nest brackets deeper than Python recurses.
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedFile(f"{file} cannot be read ({error}). {remedy}") from error
    holder = values if inside is None else values.get(inside) if isinstance(values, dict) else None
    entry = holder.pop("seal", None) if isinstance(holder, dict) else None
    if not isinstance(entry, dict):
        raise DamagedFile(
            f"{file} has no checksums: it was written by a version of headwater before there were any, or it is "
            f"damaged. {remedy}"
        )
    claimed = entry.pop("digest", None)
    # Before the version is believed: it may be what was damaged.
    if claimed != digest(_canonical(values), _canonical(entry)):
        raise DamagedFile(f"{file} is damaged: it is not what was written. {remedy}")
    if entry.get("version") != VERSION:
        raise DamagedFile(
            f"{file} has seals of version {entry.get('version')}; this headwater knows {VERSION}. {remedy}"
        )
    if inside is not None:
        values[inside] = Fields(values[inside], file)
    return Fields(values, file), Fields({**entry, "digest": claimed}, file)


def _canonical(values: Mapping[str, object]) -> bytes:
    """As JSON gives it back, whatever the order and the spaces."""
    # Through JSON and back: tuples become lists and keys text before the digest, as after reading.
    return json.dumps(json.loads(json.dumps(values)), sort_keys=True).encode()


# Folders --------------------------------------------------------------------------------------------------------------


def file_digests(folder: Path, head: str | None = None) -> dict[str, str]:
    """By name, of all files in the folder and below, but for `head` and hidden ones (which file browsers leave)."""
    found = {}
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder)
        # The head holds the digests and cannot hold its own.
        if file.is_file() and str(name) != head and not any(part.startswith(".") for part in name.parts):
            with open(file, "rb") as opened:
                content = hashlib.file_digest(opened, lambda: hashlib.blake2b(digest_size=SIZE))
            found[name.as_posix()] = content.hexdigest()
    return found


def seal_folder(folder: Path, head: str, inside: str | None = None) -> None:
    """Seal all that a folder holds; head: its JSON file that takes the seal."""
    values = json.loads((folder / head).read_bytes())
    (folder / head).write_text(json.dumps(sealed(values, file_digests(folder, head), inside), indent=1))


def check_folder(folder: Path, head: str, inside: str | None = None) -> dict[str, Any]:
    """The values of a folder's head, if all files are what was written. Errors: DamagedFile, naming one that is not."""
    values, entry = unsealed(folder / head, inside)
    for said in folder_damage(folder, head, entry):
        raise DamagedFile(said)
    return values


def folder_damage(folder: Path, head: str, entry: Mapping[str, Any]) -> Iterator[str]:
    """What is not as it was written, each file in a sentence. entry: the seal, as `unsealed` gives it.

    Errors: DamagedFile if the folder cannot be read.
    """
    try:
        found = file_digests(folder, head)
    except OSError as error:
        raise DamagedFile(f"{folder} cannot be read ({error}). {SAVE_AGAIN}") from error
    for name, expected in entry["files"].items():
        if name not in found:
            yield f"{folder / name} is missing. {SAVE_AGAIN}"
        elif found.pop(name) != expected:
            yield f"{folder / name} is damaged: it is not what was written. {SAVE_AGAIN}"
    # What was not listed is refused: a file added later could be read in place of a right one.
    for name in found:
        yield f"{folder / name} was not written with the rest. Remove it, or save again."


# Bytes ----------------------------------------------------------------------------------------------------------------


def seal_bytes(content: bytes, place: str) -> bytes:
    """The content, and its end; place: where it belongs."""
    return content + MARK + digest(place.encode(), content).encode()


def open_bytes(file: Path, place: str, remedy: str) -> bytes:
    """What `seal_bytes` was given. Errors: DamagedFile, naming the file, where it is not whole or belongs elsewhere."""
    try:
        whole = file.read_bytes()
    except FileNotFoundError:
        raise DamagedFile(f"{file} is missing. {remedy}") from None
    except OSError as error:
        raise DamagedFile(f"{file} cannot be read ({error}). {remedy}") from error
    # From the right: the content may have the mark in it by chance.
    content, mark, claimed = whole.rpartition(MARK)
    if not mark or claimed.decode("ascii", "replace") != digest(place.encode(), content):
        raise DamagedFile(
            f"{file} is damaged, or belongs elsewhere: it cannot be read as what was written here. {remedy}"
        )
    return content


def seal_arrays(arrays: Mapping[str, np.ndarray], place: str) -> bytes:
    """Arrays as a sealed .npz file; place: where it belongs."""
    file = io.BytesIO()
    np.savez(file, allow_pickle=False, **arrays)
    return seal_bytes(file.getvalue(), place)


def open_arrays(file: Path, place: str, remedy: str) -> dict[str, np.ndarray]:
    """What `seal_arrays` was given, in its order. Errors: as `open_bytes`."""
    with np.load(io.BytesIO(open_bytes(file, place, remedy)), allow_pickle=False) as found:
        return {name: found[name] for name in found.files}
