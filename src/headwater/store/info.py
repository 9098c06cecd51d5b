"""What a folder of ours is, how far it has come, and whether it is as it was written: without a model; only read."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from headwater.errors import DamagedFile, NotSaved
from headwater.evaluate.bank import PACKED, PLAN, RECIPE, Plan
from headwater.store import parts, record, tiles
from headwater.store.draft import is_draft
from headwater.store.folder import DESCRIPTION
from headwater.store.identity import IDENTITY, OTHER_FOLDER
from headwater.store.kept import LATER, MANIFEST, SegmentFolder
from headwater.store.parts import check_part, passes_in
from headwater.store.run_seen import RunSeen, said_of
from headwater.store.scores import HEAD
from headwater.store.seal import SAVE_AGAIN, folder_damage, open_bytes, unsealed
from headwater.store.segments import REMEDY, SUFFIX
from headwater.tables import table

UNFINISHED = "it is not finished"


@dataclass(frozen=True)
class Info:
    """What was found in a folder."""

    path: str
    kind: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Method, rows, tiles and the like."""
    missing: str = ""
    """What there is still to do; "" for nothing that is known of."""
    damage: tuple[str, ...] = ()
    """Files that are lost or not as they were written, each in a sentence. Content is read only for a check."""
    checked: bool = False
    """Whether every file was read."""
    inside: tuple[Info, ...] = ()
    """Of a job: its fit, scores and saved fit."""

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.stat().st_size for file in Path(self.path).rglob("*") if file.is_file())

    @property
    def all_damage(self) -> tuple[str, ...]:
        """Also of what is inside."""
        return (*self.damage, *(said for each in self.inside for said in each.all_damage))

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "path": self.path,
            "kind": self.kind,
            **self.facts,
            "size": self.size,
            "missing": self.missing,
            "checked": self.checked,
            "damage": list(self.damage),
            "inside": [each.to_dict() for each in self.inside],
        }

    def __str__(self) -> str:
        rows = [["what", self.kind], *([name, _shown(value)] for name, value in self.facts.items())]
        rows += [["size", _size(self.size)], ["missing", self.missing or "nothing"]]
        if self.checked or self.damage:
            rows += [["damage", said] for said in self.damage or ("none: every file is as it was written",)]
        indented = "\n".join(f"  {line}" for line in table(rows, left=(0, 1)).splitlines())
        return "\n\n".join([f"{self.path}\n{indented}", *map(str, self.inside)])


def info(path: Path, check: bool = False) -> Info:
    """What is in the folder. check: read every file, and say of each that is damaged or lost which one it is.

    Errors: NotSaved for what is nothing of ours; without a check, DamagedFile if the file that says what it is is
    damaged.
    """
    for head, (kind, look) in KINDS.items():
        if (path / head).is_file():
            found = Info(str(path), kind, checked=check)
            try:
                return look(path, found)
            except DamagedFile as error:
                if not check:
                    raise
                return replace(found, damage=(str(error),))
    if (path / record.FIT / IDENTITY).is_file() or any(path.glob(f"{record.SCORES}*/{IDENTITY}")):
        return _job(path, Info(str(path), KINDS[record.RECORD][0], checked=check))
    said = "is no folder" if path.exists() and not path.is_dir() else "does not exist" if not path.exists() else ""
    raise NotSaved(f"{path} {said or 'holds nothing of headwater'}.")


# Kinds ----------------------------------------------------------------------------------------------------------------


def _job(path: Path, found: Info) -> Info:
    """Its record, and what its verbs found."""
    known = record.read_record(path)
    damage = [] if known else [f"{path / record.RECORD} is missing. {record.REMEDY}"]
    facts = {"job": known.job, "settings": known.settings, "versions": known.versions} if known else {}
    verbs = known.verbs if known else {}
    inside = []
    scored = verbs.get("score", {}).get("folder", record.SCORES)
    others = sorted(each.parent.name for each in path.glob(f"{record.SCORES}*/{IDENTITY}"))
    for name in dict.fromkeys([record.FIT, scored, *others]):
        # What the record knows is of the last call: of other dampings' scores it says nothing.
        call = verbs.get("fit" if name == record.FIT else "score", {}) if name in (record.FIT, scored) else {}
        if (path / name / IDENTITY).is_file():
            inside.append(_as_told(info(path / name, found.checked), call))
        elif call.get("finished"):
            damage.append(f"{path / name / IDENTITY} is missing. Remove the folder, and call again.")
    if (path / record.FITTED).is_dir():  # of methods that can be saved
        try:
            inside.append(info(path / record.FITTED, found.checked))
        except NotSaved:
            damage.append(f"{path / record.FITTED / DESCRIPTION} is missing. Remove the folder, and call again.")
    for bank in (bank for name in record.BANKS for bank in sorted((path / name).glob("*/"))):
        try:
            inside.append(info(bank, found.checked))
        except NotSaved:
            damage.append(f"{bank / RECIPE} is missing. Remove the folder, and call again.")
    if found.checked and (path / record.CALIBRATION).exists():
        damage += said_of(partial(unsealed, path / record.CALIBRATION, remedy=record.CALIBRATE_AGAIN))
    left = [verb for verb in ("fit", "score") if not verbs.get(verb, {}).get("finished")]
    missing = f"{' and '.join(left)}: not finished" if left and known else ""
    return replace(found, facts=facts, missing=missing, damage=tuple(damage), inside=tuple(inside))


def _as_told(found: Info, call: Mapping[str, Any]) -> Info:
    """With what the job's record knows beside the folder."""
    if not call.get("finished"):
        return found
    if found.missing == UNFINISHED:
        said = f"{Path(found.path) / tiles.FINISHED} is missing. {tiles.AGAIN}"
        return replace(found, damage=(*found.damage, said))
    return replace(found, facts={"rows": call["rows"], **found.facts} if "rows" in call else found.facts)


def _identified(path: Path, found: Info) -> Info:
    """Tiles of a run, or sums of a fit: both have an identity."""
    identity, seal = unsealed(path / IDENTITY, remedy=OTHER_FOLDER)
    if identity.get("kind") == parts.KIND:
        return _fit(path, found, identity, str(seal["digest"]))
    if identity.get("kind") == tiles.KIND:
        return _run(found, RunSeen(path))
    if (path / MANIFEST).is_file() or (path / "tiles-0").is_dir():
        return _kept(path, found, identity)
    raise NotSaved(f"{path} holds {identity.get('kind', 'something')!r}, of which this version knows nothing.")


def _fit(path: Path, found: Info, identity: Mapping[str, Any], bound: str) -> Info:
    seen = passes_in(path)
    damage = [f"{path / each.label}/{k}.npz is missing. It is computed again." for each in seen for k in each.lost]
    if found.checked:
        names = [f"{each.label}/{tile}" for each in seen for tile in each.tiles]
        damage += [said for name in names for said in said_of(partial(check_part, path, bound, name))]
    open_passes = [each.label for each in seen if each.of is None]
    of = sum(each.of or len(each.tiles) for each in seen)
    facts = {
        "method": identity["method"],
        "blocks": list(identity["blocks"]),
        "passes": len(seen),
        "tiles": sum(len(each.tiles) for each in seen),
    }
    missing = f"the rest of {', '.join(open_passes)}" if open_passes else ""
    if of > facts["tiles"]:
        missing = f"{of - facts['tiles']} of {of} tiles"
    return replace(found, kind="the sums of a fit", facts=facts, missing=missing, damage=tuple(damage))


def _kept(path: Path, found: Info, identity: Mapping[str, Any]) -> Info:
    """Gradients or factors."""
    folder = SegmentFolder(path, identity["kind"])
    facts: dict[str, Any] = {name: identity[name] for name in ("method", "form", "dtype") if name in identity}
    now = folder.manifest()
    if now is None:
        tiles = len(list(path.glob(f"tiles-0/*{SUFFIX}")))
        return replace(found, kind=identity["kind"], facts={**facts, "tiles": tiles}, missing=UNFINISHED)
    gone = sum(len(entry.gone) for entry in now.entries)
    facts |= {"rows": now.rows, "segments": len(now.entries), "changed": f"{now.generation} times"}
    if gone:
        facts["deleted"] = f"{gone} rows, whose bytes are there until they are compacted"
    damage = []
    for entry in now.entries:
        if not (path / entry.file).is_file():
            damage.append(f"{path / entry.file} is missing. {REMEDY if entry.is_first else LATER}")
        elif found.checked:
            damage += said_of(partial(folder.segment, entry, True))
    return replace(found, kind=identity["kind"], facts=facts, damage=tuple(damage))


def _run(found: Info, run: RunSeen) -> Info:
    known = ("method", "verb", "unit", "explained")
    facts: dict[str, Any] = {name: run.identity[name] for name in known if name in run.identity}
    facts |= {"queries": len(run.identity["query_ids"]), "rows": run.rows_there, "tiles": run.complete()}
    left = 0 if run.wanted is None else run.wanted - run.complete()
    missing = UNFINISHED if run.wanted is None else f"{left} of {run.wanted} tiles" if left else ""
    damage = tuple(run.damage(found.checked))
    return replace(found, kind="the tiles of a run of scores", facts=facts, missing=missing, damage=damage)


def _saved_fit(path: Path, found: Info) -> Info:
    values, seal = unsealed(path / DESCRIPTION)
    facts = {"method": values["method"], "rows": values["rows"], "blocks": list(values["blocks"])}
    return replace(found, facts=facts, damage=_in_folder(path, DESCRIPTION, seal, found.checked))


def _saved_scores(path: Path, found: Info) -> Info:
    values, seal = unsealed(path / HEAD, "attributes")
    facts = {name: values["attributes"][name] for name in ("method", "unit", "explained", "n_train", "blocks")}
    try:
        queries, rows = json.loads((path / "scores" / HEAD).read_bytes())["shape"]
        facts |= {"queries": queries, "rows": rows}
    except (OSError, ValueError, KeyError):  # told by the check of its digest
        pass
    return replace(found, facts=facts, damage=_in_folder(path, HEAD, seal, found.checked))


def _in_folder(path: Path, head: str, seal: Mapping[str, Any], check: bool) -> tuple[str, ...]:
    if check:
        return tuple(folder_damage(path, head, seal))
    return tuple(f"{path / name} is missing. {SAVE_AGAIN}" for name in seal["files"] if not (path / name).is_file())


def _bank(path: Path, found: Info) -> Info:
    asked, seal = unsealed(path / RECIPE)
    facts = {name: asked[name] for name in ("rows", "subsets", "queries", "alpha", "recipe")}
    names = [f"runs/{file.name}" for file in sorted((path / "runs").glob("*.npy")) if not is_draft(file.name)]
    names += [name for name in (PLAN, PACKED) if (path / name).exists()]
    damage = [] if (path / PLAN).exists() else [f"{path / PLAN} is missing. Bank(path, plan, ...) writes it again."]
    if found.checked:
        damage += [said for name in names for said in said_of(partial(_content, path, seal, name))]
    try:
        plan, done = _load(path, seal, PLAN), {name for name in names if name.startswith("runs/")}
        places = Plan(np.unpackbits(plan["keep"], axis=1, count=asked["rows"]).astype(bool), plan["seeds"]).places
        if PACKED in names:
            done |= {f"runs/{m}-{r}.npy" for m, r in np.argwhere(_load(path, seal, PACKED)["done"])}
        facts |= {"runs": f"{len(done)} of {len(places)}"}
        left = len(places) - len(done)
    except DamagedFile:
        left = 0
    return replace(found, facts=facts, missing=f"{left} runs" if left else "", damage=tuple(damage))


def _content(path: Path, seal: Mapping[str, Any], name: str) -> bytes:
    return open_bytes(path / name, f"{seal['digest']}/{name}", SAVE_AGAIN)


def _load(path: Path, seal: Mapping[str, Any], name: str) -> Any:
    return dict(np.load(io.BytesIO(_content(path, seal, name)), allow_pickle=False))


KINDS: dict[str, tuple[str, Callable[[Path, Info], Info]]] = {
    record.RECORD: ("the results of a job", _job),
    DESCRIPTION: ("a saved fit", _saved_fit),
    RECIPE: ("a bank of retrained models", _bank),
    IDENTITY: ("the tiles of a run, the sums of a fit, or kept rows", _identified),
    HEAD: ("saved scores", _saved_scores),
}
"""By the file that each has, in the order in which they are looked for."""


def _shown(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_shown(each)}" for name, each in value.items()) or "-"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _size(size: float) -> str:
    power = min(4, int(np.log10(max(size, 1)) / 3))
    return f"{size / 1000**power:.3g} {('bytes', 'kB', 'MB', 'GB', 'TB')[power]}"
