"""The folder of a run of scores, looked at without the run: which tiles are there, and what is damaged or lost."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from headwater.errors import DamagedFile
from headwater.store.draft import is_draft
from headwater.store.seal import digest, file_digests, open_bytes
from headwater.store.tiles import _line

AGAIN = "Call again: what is damaged is computed again."
Range = tuple[int, int]
"""Train rows from, to."""


def run_facts(folder: Path, bound: str) -> tuple[list[Range], list[Range]]:
    """The tiles that are there, and the rows between them that are not. bound: the digest of the folder's identity."""
    lines, _ = _ledger(folder, bound)
    tiles = sorted(place for place in lines if (folder / "tiles.zarr" / _name(place)).is_dir())
    holes, end = [], 0
    for start, stop in tiles:
        if start > end:
            holes.append((end, start))
        end = max(end, stop)
    return tiles, holes


def run_damage(folder: Path, bound: str, check: bool) -> Iterator[str]:
    """Each file that is lost, in a sentence; check: each that is damaged, too."""
    lines, broken = _ledger(folder, bound)
    tiles, ledger, probe = folder / "tiles.zarr", folder / "ledger.jsonl", folder / "probe.npz"
    if ledger.exists() and not probe.exists():
        yield f"{probe} is missing: without it no tile is trusted. Remove the folder, and call again."
    for place, line in lines.items():
        found = file_digests(tiles / _name(place)) if check and (tiles / _name(place)).is_dir() else None
        for name, expected in line["tile"].items():
            file = tiles / _name(place) / name
            if not file.is_file():
                yield f"{file} is missing. {AGAIN}"
            elif found is not None and found[name] != expected:
                yield f"{file} is damaged: it is not what was written. {AGAIN}"
    there = {each.name for each in tiles.iterdir() if each.is_dir()} if tiles.is_dir() else set()
    unlisted = sorted(name for name in there - {_name(place) for place in lines} if not is_draft(name))
    if check and there and not _is_group(tiles / "zarr.json"):
        yield f"{tiles / 'zarr.json'} is damaged or missing: zarr itself cannot open the tiles; headwater can."
    if unlisted or broken:
        what = "is missing" if not ledger.exists() else "is damaged, or its writer was killed"
        yield f"{ledger} {what}: it has no whole line for {', '.join(unlisted) or 'some tile'}. {AGAIN}"
    if check:
        yield from _sealed_damage(folder, bound)


def _is_group(file: Path) -> bool:
    """It is the same in every run."""
    with suppress(OSError, ValueError):
        return bool(json.loads(file.read_bytes()) == {"zarr_format": 3, "node_type": "group", "attributes": {}})
    return False


def _sealed_damage(folder: Path, bound: str) -> Iterator[str]:
    for name, place in (("probe.npz", f"{bound}/probe"), ("sums.npz", f"{_belonging(folder, bound)}/sums")):
        if (folder / name).exists():
            try:
                open_bytes(folder / name, place, AGAIN)
            except DamagedFile as error:
                yield str(error)


def _ledger(folder: Path, bound: str) -> tuple[dict[Range, dict[str, Any]], bool]:
    """The whole lines, by tile; and whether one is damaged, not only torn by a kill."""
    file = folder / "ledger.jsonl"
    texts = [text for text in file.read_bytes().split(b"\n") if text] if file.exists() else []
    lines = [_line(text, _belonging(folder, bound)) for text in texts]
    broken = any(line is None and text.endswith(b"}") for text, line in zip(texts, lines, strict=True))
    return {(line["start"], line["stop"]): line for line in lines if line is not None}, broken


def _belonging(folder: Path, bound: str) -> str:
    probe = folder / "probe.npz"
    return digest(bound.encode(), probe.read_bytes() if probe.exists() else b"")


def _name(place: Range) -> str:
    return f"{place[0]}-{place[1]}"
