"""Banks and scores in the files of bergson, whose leaderboard is of a public bank of GPT-2 on WikiText.

    subsets.json         for each subset, the positions of the train rows that were left out
    validation.csv       subset, query, diff, score_sum: diff is the query's loss after the whole training, minus that
                         after the training without the subset. One query: subset, diff, score_sum
    validation_A_B.csv   the same of subsets A to B - 1, where processes shared the work
    summary.csv          query, ..., baseline_loss: the loss after the whole training (also summary_A_B.csv)
    scores/info.json     num_items, num_scores, and dtype: names (score_0, written_0, score_1, ...), formats, offsets,
                         itemsize
    scores/scores.bin    a record for each train row, as dtype says

A bank of another seed is a folder of its own with the same subsets. A subset's rows must have been left out, not
weighted down (bergson's `subset_weight`), which these files do not say. Nothing here is pickled, and bergson is not
imported. Source: github.com/EleutherAI/bergson, `validate.py`, `score/score_writer.py`, `LEADERBOARD.md`.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from headwater.errors import AlreadySaved, InvalidInput, NonFiniteValue, NotSaved
from headwater.evaluate.bank import Bank, Plan
from headwater.evaluate.checks import Flags, Floats, score_matrix
from headwater.settings import check_whole
from headwater.store.draft import write_whole

PathLike = str | os.PathLike[str]
SUBSETS, VALIDATION, SUMMARY, INFO, BINARY = "subsets.json", "validation", "summary", "info.json", "scores.bin"
READABLE = ("float16", "float32", "float64")


# Banks ----------------------------------------------------------------------------------------------------------------


def read_bank(
    source: PathLike | Mapping[int, PathLike],
    path: PathLike,
    *,
    rows: int,
    recipe: Mapping[str, Any] | None = None,
) -> Bank:
    """The bank that bergson wrote, as a full `Bank` in the folder `path`: `lds(scores, *read_bank(...))`.

    source: bergson's folder, or {seed: folder} of trainings of the same subsets with several seeds; one folder is of
    seed 42, bergson's default. rows: how many train rows there are (4608 on the leaderboard), which these files do not
    say. recipe: what else is known of the trainings, as JSON has it.
    Outputs are losses where every folder has its summary, else the losses minus a constant for each query, the loss
    after the whole training: rank correlations over subsets are the same. The recipe's "output" says which.
    Errors: NotSaved for a folder without these files; InvalidInput, naming file and line, for what is no number,
    is there twice, or is missing, and for subsets of folders that differ; as `Bank` for another bank in `path`.
    """
    check_whole("rows", rows, 2)
    folders = source if isinstance(source, Mapping) else {42: source}
    if not folders:
        raise InvalidInput("There is no folder to read: source is an empty mapping.")
    runs = [_read_run(Path(folder), rows) for folder in folders.values()]
    keep, first = runs[0].keep, next(iter(folders.values()))
    for run, folder in zip(runs, folders.values(), strict=True):
        if not np.array_equal(run.keep, keep):
            raise InvalidInput(f"{folder} and {first} leave out other subsets; runs of one bank have the same.")
        if run.diffs.shape != runs[0].diffs.shape:
            raise InvalidInput(f"{folder} has {run.diffs.shape[1]} queries and {first} has {runs[0].diffs.shape[1]}.")
    bases = [run.baseline for run in runs if run.baseline is not None]
    known = len(bases) == len(runs)
    losses = np.stack([-run.diffs for run in runs], axis=1)
    if known:
        losses += np.stack(bases)
    seeds = np.tile(np.array(list(folders), dtype=np.int64), (len(keep), 1))
    asked = {
        "bank": "bergson",
        **(recipe or {}),
        "output": "loss" if known else "loss minus that of the whole training",
        # What was read: else another bank of the same subsets would be taken for the one in `path`.
        "digest": hashlib.sha256(losses.tobytes()).hexdigest(),
    }
    bank = Bank(path, Plan(keep, seeds), losses.shape[2], asked)
    # Subsets are told by their masks, which `_read_run` has found to be all different.
    place_of = {mask.tobytes(): number for number, mask in enumerate(keep)}
    run_of = {seed: number for number, seed in enumerate(folders)}

    def outputs(masks: Flags, chosen: NDArray[np.int64]) -> Floats:
        places = [(place_of[mask.tobytes()], run_of[int(seed)]) for mask, seed in zip(masks, chosen, strict=True)]
        return np.stack([losses[at] for at in places])

    return bank.fill_many(outputs).pack() if bank.missing else bank


class _Run(NamedTuple):
    """What a folder of bergson's holds."""

    keep: Flags
    diffs: Floats
    """[m, q]."""
    baseline: Floats | None
    """[q]."""


def _read_run(folder: Path, rows: int) -> _Run:
    keep = _read_subsets(folder / SUBSETS, rows)
    files = _parts(folder, VALIDATION)
    if not files:
        raise NotSaved(f"{folder} holds no measurements: there is no {VALIDATION}.csv in it.")
    found: dict[tuple[int, int], float] = {}
    for file in files:
        for line, row in _lines(file, ("subset", "diff")):
            pair = (_whole(file, line, row, "subset"), _whole(file, line, row, "query") if "query" in row else 0)
            if pair in found:
                raise InvalidInput(f"{file}, line {line}: subset {pair[0]}, query {pair[1]} is there twice.")
            if pair[0] >= len(keep):
                raise InvalidInput(f"{file}, line {line}: subset {pair[0]} is not among the {len(keep)} of {SUBSETS}.")
            found[pair] = _number(file, line, row, "diff")
    queries = 1 + max((query for _, query in found), default=-1)
    diffs = np.full((len(keep), queries), np.nan)
    for pair, value in found.items():
        diffs[pair] = value
    _check_full(diffs, folder)
    return _Run(keep, diffs, _read_baseline(folder, queries))


def _check_full(diffs: Floats, folder: Path) -> None:
    """Errors: InvalidInput, naming the first subset and query that were not measured."""
    missing = np.argwhere(np.isnan(diffs))
    if not diffs.size:
        raise InvalidInput(f"{folder}/{VALIDATION}.csv has no line but its head.")
    if len(missing):
        subset, query = missing[0]
        raise InvalidInput(
            f"{folder} lacks {len(missing)} of {diffs.size} measurements, the first of subset {subset}, query {query}. "
            f"Was every part of {VALIDATION}_A_B.csv copied?"
        )


def _read_subsets(file: Path, rows: int) -> Flags:
    """Which rows each subset keeps: [m, n]."""
    listed = _json(file)
    if not isinstance(listed, list) or not listed:
        raise InvalidInput(f"{file}: expected a list of subsets, each a list of row positions.")
    keep = np.ones((len(listed), rows), dtype=bool)
    known: dict[bytes, int] = {}
    for number, (left_out, mask) in enumerate(zip(listed, keep, strict=True)):
        if not isinstance(left_out, list) or not left_out or not all(type(row) is int for row in left_out):
            raise InvalidInput(f"{file}: subset {number} is {left_out!r:.60}; expected a list of row positions.")
        worst = max(left_out) if min(left_out) >= 0 else min(left_out)
        if not 0 <= worst < rows:
            raise InvalidInput(f"{file}: subset {number} leaves out row {worst}; there are {rows} rows.")
        if len(set(left_out)) < len(left_out):
            raise InvalidInput(f"{file}: subset {number} names a row twice.")
        mask[left_out] = False
        if (other := known.setdefault(mask.tobytes(), number)) != number:
            raise InvalidInput(f"{file}: subsets {other} and {number} leave out the same rows.")
    return keep


def _read_baseline(folder: Path, queries: int) -> Floats | None:
    """The losses after the whole training, [q]; None where no summary says them."""
    files = _parts(folder, SUMMARY)
    if not files:
        return None
    file, found = files[0], np.full(queries, np.nan)
    for line, row in _lines(file, ("baseline_loss",)):
        query = _whole(file, line, row, "query") if "query" in row else 0
        if query >= queries or not np.isnan(found[query]):
            raise InvalidInput(f"{file}, line {line}: query {query} is there twice, or is none of {queries}.")
        found[query] = _number(file, line, row, "baseline_loss")
    if np.isnan(found).any():
        raise InvalidInput(f"{file} lacks query {int(np.isnan(found).argmax())} of {queries}.")
    return found


def _parts(folder: Path, name: str) -> list[Path]:
    """The whole file, or else all parts of it."""
    whole = folder / f"{name}.csv"
    return [whole] if whole.exists() else sorted(folder.glob(f"{name}_*_*.csv"))


def _lines(file: Path, needed: Sequence[str]) -> Iterable[tuple[int, dict[str, str]]]:
    """(line, its values by column). Errors: InvalidInput for other columns, or a line that is cut short."""
    with file.open(newline="", encoding="utf-8") as opened:
        reader = csv.DictReader(opened)
        columns = reader.fieldnames or ()
        if not set(needed) <= set(columns):
            raise InvalidInput(f"{file} has the columns {list(columns)}; expected {', '.join(needed)} among them.")
        for row in reader:
            if None in row or None in row.values():
                raise InvalidInput(f"{file}, line {reader.line_num}: expected {len(columns)} values.")
            yield reader.line_num, row


def _whole(file: Path, line: int, row: Mapping[str, str], column: str) -> int:
    if not row[column].isdecimal():
        raise InvalidInput(f"{file}, line {line}: {column} is {row[column]!r}; expected a whole number from 0 on.")
    return int(row[column])


def _number(file: Path, line: int, row: Mapping[str, str], column: str) -> float:
    try:
        found = float(row[column])
    except ValueError:
        found = float("nan")
    if not np.isfinite(found):
        raise InvalidInput(f"{file}, line {line}: {column} is {row[column]!r}; expected a finite number.")
    return found


def _json(file: Path) -> Any:
    if not file.exists():
        raise NotSaved(f"{file.parent} is no folder of bergson's: there is no {file.name} in it.")
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InvalidInput(f"{file} is no JSON: {error}") from error


# Scores ---------------------------------------------------------------------------------------------------------------


def read_scores(folder: PathLike, *, helps: bool) -> Floats:
    """Scores that bergson wrote, in our sign, positive where the row helps: [q, n].

    helps: whether they are of that sign there, too (EK-FAC, TrackStar); MAGIC, SOURCE and its baselines have the other.
    Errors: NotSaved; InvalidInput for files of another layout or size, and for scores that were not written.
    """
    info, file = _json(Path(folder) / INFO), Path(folder) / BINARY
    try:
        rows, queries, layout = info["num_items"], info["num_scores"], info["dtype"]
        formats = {name: layout["formats"][k] for k, name in enumerate(layout["names"])}
        scores = [formats[f"score_{q}"] for q in range(queries)]
        written = [formats[f"written_{q}"] for q in range(queries)]
    except (KeyError, IndexError, TypeError) as error:
        raise InvalidInput(f"{Path(folder) / INFO} is not of bergson's layout of one score a row: {error!r}") from error
    if not queries or set(written) != {"bool"} or not set(scores) <= set(READABLE):
        raise InvalidInput(
            f"{Path(folder) / INFO} has scores of {sorted(set(scores))}; known are {', '.join(READABLE)}."
        )
    try:
        kind = _record({key: layout[key] for key in ("names", "formats", "offsets", "itemsize")})
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidInput(f"{Path(folder) / INFO} does not say how a row's scores lie in the file: {error}") from error
    if not file.exists():
        raise NotSaved(f"{folder} holds no scores: there is no {BINARY} in it.")
    if file.stat().st_size != rows * kind.itemsize:
        raise InvalidInput(f"{file} has {file.stat().st_size} bytes; {rows} rows take {rows * kind.itemsize}.")
    table = np.fromfile(file, dtype=kind)
    for query in range(queries):
        if not table[f"written_{query}"].all():
            row = int(table[f"written_{query}"].argmin())
            raise InvalidInput(f"{file}: the score of row {row} for query {query} was not written.")
    found = np.stack([table[f"score_{query}"].astype(np.float64) for query in range(queries)])
    if not np.isfinite(found).all():
        query, row = np.argwhere(~np.isfinite(found))[0]
        raise InvalidInput(f"{file}: the score of row {row} for query {query} is {found[query, row]}.")
    return found if helps else -found


def write_scores(folder: PathLike, scores: ArrayLike) -> None:
    """Our scores [q, n] as bergson's, float32, for its `validate`: there, negative is the row that helps.

    Errors: AlreadySaved; ShapeMismatch; NonFiniteValue.
    """
    given, target = score_matrix(scores), Path(folder)
    if (target / INFO).exists():
        raise AlreadySaved(f"{target} holds scores already; choose another folder.")
    queries, rows = given.shape
    names = [name for query in range(queries) for name in (f"score_{query}", f"written_{query}")]
    # As its writer lays them out: a score and whether it was written take eight bytes together.
    offsets = [place for query in range(queries) for place in (8 * query, 8 * query + 4)]
    layout = {"names": names, "formats": ["float32", "bool"] * queries, "offsets": offsets, "itemsize": 8 * queries}
    table: NDArray[Any] = np.zeros(rows, dtype=_record(layout))
    largest = float(np.abs(given).max(initial=0.0))
    if largest > float(np.finfo(np.float32).max):
        raise NonFiniteValue(f"A score is {largest:g}, which float32, bergson's, does not hold. Divide all of them.")
    for query in range(queries):
        table[f"score_{query}"], table[f"written_{query}"] = -given[query], True
    target.mkdir(parents=True, exist_ok=True)
    write_whole(target / BINARY, table.tobytes())
    info = {"num_items": rows, "num_scores": queries, "dtype": layout}
    # Last: scores without it are no scores.
    write_whole(target / INFO, json.dumps(info, indent=2).encode())


def _record(layout: Any) -> np.dtype[Any]:
    """A train row's scores, as `info.json` has it: names, formats, offsets, itemsize."""
    return np.dtype(layout)
