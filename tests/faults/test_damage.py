"""Every file of every artefact is cut, changed and lost: a reader gets what was written, or an error that names it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from damage import damaged, damages, files_of
from fault_job import QUERIES, TRAIN, fit, fitted, influence, score, self_influence

import headwater as hw
from headwater.errors import DamagedFile, HeadwaterError, InvalidInput, NotSaved
from headwater.evaluate.bank import Bank, plan_subsets
from headwater.store import seal
from headwater.store.info import info
from headwater.store.runs import check, compact, delete

TWENTY = tuple(np.linspace(0, 1, 20))
"""Places of bits, as shares of a file."""


def write_bank(path: Path) -> np.ndarray:
    bank = Bank(path, plan_subsets(6, subsets=3, repeated=1), 2, {"recipe": 1})
    return bank.fill(lambda rows, seed: np.array([rows.sum(), 1.0])).outputs


def add_rows(path: Path) -> np.ndarray:
    return fitted().attribute(TRAIN, QUERIES, store=path / "run", append=True).values


def open_saved(path: Path) -> np.ndarray:
    return influence().load(path / "saved", TRAIN).attribute(TRAIN[:1], QUERIES).values


WRITERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "sums": ("fit", fit),
    "run": ("run", score),
    "run of rows": ("run", self_influence),
    "saved fit": ("saved", lambda path: fitted().save(path / "saved")),
    "saved scores": ("scores", lambda path: fitted().attribute(TRAIN, QUERIES).save(path / "scores")),
    "bank": ("bank", lambda path: write_bank(path / "bank")),
}
"""By what it is: the folder's name, and the call that writes it."""
RUN = {
    "open": lambda path: hw.Scores.open(path / "run").values,
    "check": lambda path: check(path / "run"),
    "append": add_rows,
    "top": lambda path: hw.Scores.open(path / "run").top(2),
    "delete": lambda path: delete(path / "run", [100]),
    "compact": lambda path: (delete(path / "run", [100]), compact(path / "run")),
    "again": score,
}
READERS: dict[str, dict[str, Callable[[Path], Any]]] = {
    "sums": {"again": fit},
    "run": RUN,
    "run of rows": {"again": self_influence},
    "saved fit": {"load": open_saved},
    "saved scores": {"open": lambda path: hw.Scores.open(path / "scores").values},
    "bank": {"open": lambda path: Bank.open(path / "bank").outputs, "again": lambda path: write_bank(path / "bank")},
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        import fault_job

        for module, name, value in fault_job.SIZES:
            patch.setattr(module, name, value)
        for kind, (_, write) in WRITERS.items():
            (folder / kind).mkdir()
            write(folder / kind)
    return folder


def names(said: str, file: Path) -> bool:
    """Whether an error speaks of a file, or of the folder whose parts are one thing (zarr's, a run's tiles)."""
    return any(each in said for each in (file.name, *file.parts[1:-1])) or file.parts[0] in said


@pytest.mark.parametrize(
    ("kind", "places"),
    [
        *[pytest.param(kind, (0.6,), id=f"{kind}: one bit") for kind in WRITERS if kind != "run of rows"],
        *[pytest.param(kind, TWENTY, id=f"{kind}: all", marks=pytest.mark.faults) for kind in WRITERS],
    ],
)
def test_no_damage_shows_as_an_error_of_others_or_as_another_number(kind, places, written, tmp_path):
    """Each reader meets each damage afresh. What it says is said by name; `info` names it before."""
    where, few = WRITERS[kind][0], len(places) == 1
    for file in files_of(written / kind):
        for name, damage in list(damages(places).items())[: 1 if few else None]:
            for reader, read in list(READERS[kind].items())[: 1 if few else None]:
                folder, place = tmp_path / "one", file.relative_to(written / kind)
                shutil.copytree(written / kind, folder)
                content = damage(file.read_bytes())
                (folder / place).unlink() if content is None else (folder / place).write_bytes(content)
                done = f"{place} {name}, {reader}"
                try:
                    found = info(folder / where, check=True)
                    assert found.all_damage or found.missing or content is None or content == file.read_bytes(), done
                except (NotSaved, DamagedFile):
                    pass
                try:
                    read(folder)
                except HeadwaterError as error:
                    assert names(str(error), place), f"{done}: {error}"
                except Exception as error:
                    raise AssertionError(f"{done}: {error!r}") from error
                shutil.rmtree(folder)


def test_the_other_tiles_of_a_damaged_run_can_be_read(tmp_path, monkeypatch):
    """Of two spans of queries, one each: scores of some queries need those queries' tiles, and no others."""
    from headwater.run import attribute
    from headwater.store.plan import Sizes

    monkeypatch.setattr(attribute, "tile_sizes", lambda *given: Sizes(8, 2))
    whole, spans = score(tmp_path), ((0, slice(0, 2)), (1, slice(2, 3)))
    chunks = tmp_path / "run" / "tiles.zarr" / "scores" / "c" / "0"
    for span, mine in spans:
        for done in damaged(chunks / str(span), (0.5,)):
            if not span and done.startswith("0:"):  # the first tile, which says what the others are like
                continue
            found = hw.Scores.open(tmp_path / "run")
            for each, queries in spans:
                if each != span:
                    np.testing.assert_array_equal(found[queries], whole[queries])
            with pytest.raises(DamagedFile, match=f"tiles.zarr/scores/c/0/{span}/"):
                _ = found[mine]


# Versions -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [0, 2])
@pytest.mark.parametrize("kind", WRITERS)
def test_what_another_version_wrote_is_said_to_be(kind, version, tmp_path, monkeypatch):
    monkeypatch.setattr(seal, "VERSION", version)
    WRITERS[kind][1](tmp_path)
    monkeypatch.undo()
    with pytest.raises(HeadwaterError, match=rf"seals of version {version}; this headwater knows 1"):
        next(iter(READERS[kind].values()))(tmp_path)
    try:
        said = " ".join(info(tmp_path / WRITERS[kind][0], check=True).all_damage)
    except HeadwaterError as error:
        said = str(error)
    assert f"version {version}" in said


def heads(folder: Path) -> list[Path]:
    """Its sealed JSON files."""
    return [each for each in files_of(folder) if each.suffix == ".json" and "seal" in each.read_text()]


@pytest.mark.parametrize("kind", [pytest.param(each, marks=[pytest.mark.faults] * ("run" in each)) for each in WRITERS])
def test_a_field_that_an_older_schema_lacked_is_no_error_of_others(kind, written, tmp_path):
    """Each field of each sealed JSON file in turn, with a seal that fits."""
    where = WRITERS[kind][0]
    for head in heads(written / kind):
        inside = "attributes" if head.name == "zarr.json" else None
        values, entry = seal.unsealed(head, inside)
        for field in values if inside is None else values[inside]:
            for reader, read in [*READERS[kind].items(), ("info", lambda path: info(path / where, check=True))]:
                folder, place = tmp_path / "one", head.relative_to(written / kind)
                shutil.copytree(written / kind, folder)
                known, _ = seal.unsealed(head, inside)
                (known if inside is None else known[inside]).pop(field)
                (folder / place).write_text(json.dumps(seal.sealed(known, entry["files"], inside)))
                try:
                    read(folder)
                except HeadwaterError as error:
                    assert folder.name in str(error), f"{place} without {field}, {reader}: {error}"
                except Exception as error:
                    raise AssertionError(f"{place} without {field}, {reader}: {error!r}") from error
                shutil.rmtree(folder)


# Places ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", WRITERS)
def test_a_folder_that_was_moved_is_the_same(kind, written, tmp_path, monkeypatch):
    shutil.copytree(written / kind, tmp_path / "elsewhere")
    (tmp_path / "elsewhere").rename(tmp_path / "moved")
    monkeypatch.setattr("headwater.store.tiles.TileStore.write", None)
    monkeypatch.setattr("headwater.store.parts.PartStore.write", None)
    for reader, read in READERS[kind].items():
        if reader not in ("append", "delete", "compact"):
            read(tmp_path / "moved")
    assert info(tmp_path / "moved" / WRITERS[kind][0], check=True).all_damage == ()


def test_another_model_is_refused_in_a_moved_folder_too(written, tmp_path):
    shutil.copytree(written / "run", tmp_path / "moved")
    with pytest.raises(InvalidInput, match="fingerprint was"):
        score(tmp_path / "moved", seed=2)
