"""What is done to runs in folders without the model: rows are deleted, their bytes removed, all files checked."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from headwater.errors import DamagedFile, InvalidInput
from headwater.store.base import Tile
from headwater.store.draft import explained_errors, write_whole
from headwater.store.identity import IDENTITY
from headwater.store.lock import locked
from headwater.store.matrix import StoredMatrix, deleted_rows, meaning_of
from headwater.store.plan import Sizes, spans
from headwater.store.run_seen import RunSeen
from headwater.store.seal import open_arrays, seal_arrays, sealed
from headwater.store.tiles import AGAIN, COMPACTED, COMPLETE, LOCK, PLAN, TileFolder, TileStore, take_compacted


def delete(path: str | os.PathLike[str], ids: Iterable[object]) -> int:
    """Take rows out of a finished run: `Scores.open` no longer shows them, from now on. Returns how many rows are out.

    Their bytes go with `compact`. Errors: NotSaved; InvalidInput, naming an id that is not there; NotWritten.
    """
    with locked(TileFolder(path).path / LOCK):
        take_compacted(Path(path))  # of one that was killed since
        folder = TileFolder(path)
        belongs, names = _labels(folder)
        wanted = np.atleast_1d(np.asarray(list(ids)))
        known = names["train"]
        # Text and numbers: NumPy would compare them as text, or not at all.
        alike = not len(wanted) or (wanted.dtype.kind in "US") == (known.dtype.kind in "US")
        missing = wanted[~np.isin(wanted, known)].tolist() if alike else wanted.tolist()
        if missing:
            raise InvalidInput(f"There is no train row {missing[0]!r} in {path}: ids are like {known[:3].tolist()}.")
        out = np.union1d(deleted_rows(folder.path, belongs), np.flatnonzero(np.isin(known, wanted)))
        write_whole(folder.path / "deleted.npz", seal_arrays({"rows": out.astype(np.int64)}, f"{belongs}/deleted"))
        return len(out)


def compact(path: str | os.PathLike[str]) -> None:
    """Write the run again without its deleted rows, as if they had never been in the loader.

    A process that is killed on the way leaves the run as it was, or one that whoever opens it next brings to its end.
    Takes the room of the run once more, while it lasts. Errors: NotSaved; DamagedFile; NotWritten.
    """
    with locked(TileFolder(path).path / LOCK):
        take_compacted(Path(path))  # of one that was killed since
        folder = TileFolder(path)
        belongs, names = _labels(folder)
        meaning, out = meaning_of(folder), deleted_rows(folder.path, belongs)
        if not len(out):
            return
        columns = np.setdiff1d(np.arange(len(names["train"])), out, assume_unique=True)
        if not len(columns):
            raise InvalidInput(f"All rows of {path} are deleted: remove the folder.")
        made = folder.path / COMPACTED
        shutil.rmtree(made, ignore_errors=True)
        with explained_errors(made):
            made.mkdir()
            for name in (IDENTITY, PLAN):
                shutil.copyfile(folder.path / name, made / name)
        few = open_arrays(folder.path / "probe.npz", f"{folder.run}/probe", AGAIN)
        shown = ~np.isin(np.arange(len(few["keys"])), out)
        probe = {"keys": few["keys"][shown], "scores": few["scores"][:, :, shown]}
        write_whole(made / "probe.npz", seal_arrays(probe, f"{folder.run}/probe"))
        store = TileStore(made, None, lambda: folder.sizes)
        _copy(folder, store, columns, len(names["query"]), len(names["train"]))
        words = {name: value for name, value in meaning.items() if name not in ("train_rows", "blocks", "belongs")}
        store.finish(names["query"], _left(names["train"], columns), meaning["blocks"], words)
        files = [each.name for each in made.iterdir() if each.name not in (IDENTITY, PLAN, LOCK)]
        write_whole(made / COMPLETE, json.dumps(sealed({"files": files})).encode())
        take_compacted(folder.path)


def _copy(folder: TileFolder, store: TileStore, columns: np.ndarray, queries: int, rows: int) -> None:
    """The columns that stay, tile by tile."""
    first_line = folder.line(0, 0)
    if first_line is None:
        raise DamagedFile(f"{folder.path}: the first tile is gone, or the ledger's line that is about it. {AGAIN}")
    matrices = [StoredMatrix(folder, queries, columns, rows, block) for block in range(first_line["shape"][0])]
    ids, keys = _rows(folder, columns, rows)
    for first in range(0, queries, store.sizes.queries):
        wanted = np.arange(first, min(first + store.sizes.queries, queries))
        streams = [_pieces(matrix, wanted, store.sizes) for matrix in matrices]
        for span in spans(len(columns), store.sizes.rows):
            scores = np.stack([next(stream) for stream in streams])
            mine = slice(*span)
            store.write(Tile(span.start, ids[mine], keys[mine], scores, first))


def _pieces(matrix: StoredMatrix, wanted: np.ndarray, sizes: Sizes) -> Iterator[np.ndarray]:
    """The columns again, as many at once as a tile has rows."""
    held: list[np.ndarray] = []
    for _, tile in matrix.tiles(wanted):
        held.append(tile)
        while sum(each.shape[1] for each in held) >= sizes.rows:
            whole = np.concatenate(held, axis=1)
            yield whole[:, : sizes.rows]
            held = [whole[:, sizes.rows :]]
    if held and held[0].shape[1]:
        yield np.concatenate(held, axis=1)


def _rows(folder: TileFolder, columns: np.ndarray, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and keys of the rows that stay. Errors: DamagedFile."""
    found = []
    for number in range(-(-rows // folder.sizes.rows)):
        known = folder.rows(number)
        if known is None:
            raise DamagedFile(f"{folder.path / 'rows' / f'{number}.npz'} is missing or damaged. {AGAIN}")
        found.append(known)
    ids, keys = (np.concatenate([known[name] for known in found]) for name in ("ids", "keys"))
    return _left(ids, columns), keys[columns]


def _left(names: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """The names of the rows that stay; rows that are called by their position have another one now."""
    by_position = names.dtype.kind in "iu" and np.array_equal(names, np.arange(len(names)))
    return np.arange(len(columns)) if by_position else names[columns]


def _labels(folder: TileFolder) -> tuple[str, dict[str, np.ndarray]]:
    """What the files of a finished run belong to, and the ids of its rows."""
    belongs = str(meaning_of(folder)["belongs"])
    return belongs, open_arrays(folder.path / "ids.npz", f"{belongs}/ids", AGAIN)


def check(path: str | os.PathLike[str]) -> list[str]:
    """Read everything in the folder of a run: what is damaged or missing, each file by name. Empty where nothing is.

    What `headwater info --check` says of it; and, in a sentence more, that a run is not finished. Errors: NotSaved for
    a folder of something else; DamagedFile where what says what the rest is cannot be read.
    """
    seen = RunSeen(path)
    return [*seen.damage(check=True), *seen.unfinished]
