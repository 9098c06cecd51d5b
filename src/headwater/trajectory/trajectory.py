"""A record of training, opened: its steps, its rates, and the states that it kept. Arrays are NumPy's."""

from __future__ import annotations

import json
import os
import re
import zipfile
import zlib
from bisect import bisect_right
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from headwater.errors import DamagedFile, InvalidInput, NotSaved
from headwater.trajectory.record import FORMAT, HEAD, Call, Header, Step, Writer, state_name, steps_name
from headwater.trajectory.rules import Clip, Rates, State, rule_of

STATE = re.compile(r"state-(\d{8})\.npz")
STEPS = re.compile(r"steps-(\d{8})-(\d{8})\.npz")


class Trajectory:
    """What `hw.record` kept of a training. `print` says how much there is.

    Errors: NotSaved where there is none; DamagedFile, naming what is missing or is not as it was written; InvalidInput
    for a format or an optimizer of another version.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder)
        self._held: tuple[int, dict[str, np.ndarray]] | None = None
        try:
            self._head: dict[str, Any] = json.loads((self.folder / HEAD).read_text())
        except FileNotFoundError as error:
            raise NotSaved(f"{folder} has no {HEAD}: hw.record(model, optimizer, folder) writes one.") from error
        except (OSError, ValueError) as error:
            raise DamagedFile(f"{self.folder / HEAD} cannot be read ({error}).") from error
        if self._head.get("format") != FORMAT:
            raise InvalidInput(f"{folder} has format {self._head.get('format')!r}; this version reads {FORMAT}.")
        head = self._head
        self.header = Header(
            rule_of(head["rule"]),
            tuple(map(tuple, head["groups"])),
            {name: tuple(shape) for name, shape in head["shapes"].items()},
            head["dtypes"],
            head["keep"],
            head["clip"],
            head["first"],
            head["framework"],
            head.get("random", 0),
            tuple(head.get("still", ())),
            tuple(head.get("frozen", ())),
        )
        self.rule = self.header.rule
        self.clip = None if self.header.clip is None else Clip(self.header.clip)

    # What there is ------------------------------------------------------------------------------------------------

    @cached_property
    def kept(self) -> tuple[int, ...]:
        """Steps before which the state was kept, as far as all steps up to them are there."""
        names = os.listdir(self.folder)
        states = sorted(int(found[1]) for name in names if (found := STATE.fullmatch(name)))
        pieces = {int(found[1]): int(found[2]) for name in names if (found := STEPS.fullmatch(name))}
        if not states:
            raise DamagedFile(f"{self.folder} has a {HEAD}, and no state. Record the training again.")
        whole = [states[0]]
        while whole[-1] in pieces and pieces[whole[-1]] in states:
            whole.append(pieces[whole[-1]])
        if self.is_ended and whole[-1] != self._head["steps"]:
            raise DamagedFile(
                f"{self.folder} recorded {self._head['steps']} steps, and those after step {whole[-1]} are not there."
            )
        return tuple(whole)

    @property
    def is_ended(self) -> bool:
        """Whether the training came to its end; else it can be gone on with."""
        return "steps" in self._head

    @property
    def steps(self) -> int:
        """Steps that can be followed: up to the last kept state."""
        return self.kept[-1]

    @property
    def names(self) -> list[str]:
        """Of the trained parameters."""
        return list(self.header.shapes)

    @property
    def n_parameters(self) -> int:
        return sum(int(np.prod(shape)) for shape in self.header.shapes.values())

    @property
    def bytes(self) -> int:
        """Of the folder."""
        return sum(file.stat().st_size for file in self.folder.iterdir() if file.is_file())

    def __len__(self) -> int:
        return self.steps

    def __repr__(self) -> str:
        ended = "" if self.is_ended else ", not ended"
        return (
            f"Trajectory({str(self.folder)!r}: {self.steps} steps{ended}, {len(self.kept)} states kept, "
            f"{self.n_parameters:,} parameters, {type(self.rule).__name__}, {self.bytes / 2**20:.1f} MiB)"
        )

    # Steps --------------------------------------------------------------------------------------------------------

    def step(self, number: int) -> Step:
        """A step, from 0."""
        if not 0 <= number < self.steps:
            raise InvalidInput(f"There is no step {number}: the record has {self.steps}, from 0.")
        place = bisect_right(self.kept, number) - 1
        found = self._piece(place)
        k = number - self.kept[place]
        rows = slice(int(found["starts"][k]), int(found["starts"][k + 1]))
        rates = tuple(Rates(*r) for r in found["rates"][k].tolist())
        return Step(found["ids"][rows], found["shares"][rows], rates, _calls(found, k))

    def rates(self, step: Step) -> dict[str, Rates]:
        """By the name of the parameter."""
        return {name: rate for names, rate in zip(self.header.groups, step.rates, strict=True) for name in names}

    def count(self, number: int) -> int:
        """What the optimizer counts step `number` as: from 1."""
        return self.header.first + number + 1

    @cached_property
    def rows(self) -> np.ndarray:
        """Ids of all rows that any step saw, sorted."""
        return np.unique(np.concatenate([self._piece(k)["ids"] for k in range(len(self.kept) - 1)]))

    @cached_property
    def weighed(self) -> np.ndarray:
        """Ids of the rows that some step gave a share other than zero, sorted."""
        pieces = [self._piece(k) for k in range(len(self.kept) - 1)]
        return np.unique(np.concatenate([piece["ids"][piece["shares"] != 0] for piece in pieces]))

    def visits(self, ids: np.ndarray) -> np.ndarray:
        """How often each of these rows was seen: [n]."""
        found, counts = np.unique(
            np.concatenate([self._piece(k)["ids"] for k in range(len(self.kept) - 1)]), return_counts=True
        )
        places = np.minimum(np.searchsorted(found, ids), len(found) - 1)
        return np.where(found[places] == ids, counts[places], 0)

    @cached_property
    def digest(self) -> int:
        """Another number for another training: of the header, the steps, and the last state."""
        found = zlib.crc32(json.dumps({k: v for k, v in self._head.items() if k != "steps"}, sort_keys=True).encode())
        for k in range(len(self.kept) - 1):
            for name, array in sorted(self._piece(k).items()):
                found = zlib.crc32(name.encode() + np.ascontiguousarray(array).tobytes(), found)
        for name, array in sorted(self.arrays(self.kept[-1]).items()):
            found = zlib.crc32(name.encode() + np.ascontiguousarray(array).tobytes(), found)
        return found

    def _piece(self, place: int) -> dict[str, np.ndarray]:
        # One at a time is held: a sweep goes from one to the next.
        if self._held is None or self._held[0] != place:
            self._held = (place, _load(self.folder / steps_name(self.kept[place], self.kept[place + 1])))
        return self._held[1]

    # States -------------------------------------------------------------------------------------------------------

    def arrays(self, step: int) -> dict[str, np.ndarray]:
        """A kept state as it is in its file."""
        if step not in self.kept:
            raise InvalidInput(f"The state before step {step} was not kept; kept are {list(self.kept)}.")
        return _load(self.folder / state_name(step))

    def state(self, step: int) -> State:
        """A kept state: the parameters before step `step`, and what the optimizer remembered."""
        arrays = self.arrays(step)
        try:
            return State(
                {name: arrays[f"w/{name}"] for name in self.names},
                {kind: {name: arrays[f"{kind}/{name}"] for name in self.names} for kind in self.rule.remembers},
            )
        except KeyError as error:
            raise DamagedFile(f"{self.folder / state_name(step)} has no {error}.") from error

    @cached_property
    def statistics(self) -> dict[str, np.ndarray]:
        """Buffers of frozen batch normalisations, which the whole training left as they are, by name."""
        if not self.header.frozen:
            return {}
        return {name[2:]: value for name, value in self.arrays(self.steps).items() if name.startswith("b/")}

    def resumed(self) -> Writer:
        """For whoever goes on with a training that did not end: from its last kept state. Errors: InvalidInput."""
        if self.is_ended:
            raise InvalidInput(
                f"{self.folder} is the record of a training that came to its end, after {self.steps} steps: nothing is "
                "left to resume. Ask it (hw.Unrolled), or record another training into another folder."
            )
        for name in os.listdir(self.folder):
            found = STEPS.fullmatch(name)
            if found and int(found[1]) >= self.steps:
                (self.folder / name).unlink()
        return Writer(self.folder, replace(self.header), self.steps, self.steps)


def _calls(found: dict[str, np.ndarray], k: int) -> tuple[Call, ...]:
    """Of a model that draws random numbers, in step k of a file; of others none."""
    if "calls" not in found:
        return ()
    mine = slice(int(found["call_starts"][k]), int(found["call_starts"][k + 1]))
    return tuple(map(Call, found["calls"][mine].tolist(), found["random"][mine]))


def open_record(record: Trajectory | str | os.PathLike[str]) -> Trajectory:
    return record if isinstance(record, Trajectory) else Trajectory(record)


def _load(file: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(file, allow_pickle=False) as found:
            return {name: found[name] for name in found.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise DamagedFile(f"{file} cannot be read ({error}).") from error
