"""What happens to files: damage of every kind, and what killed processes leave."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import headwater as hw
from headwater.store import draft
from headwater.torch import TorchComposableInfluence

X, Y = torch.randn(11, 4, generator=torch.Generator().manual_seed(0)), torch.arange(11) % 3
TRAIN, QUERY = [(X[:6], Y[:6]), (X[6:], Y[6:])], [(X[:2], Y[:2])]


def network(activation: type = torch.nn.Tanh) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 3), activation(), torch.nn.Linear(3, 3))


def by_torch(method: Any = None, activation: type = torch.nn.Tanh, **options: Any) -> TorchComposableInfluence:
    return TorchComposableInfluence(network(activation), torch.nn.CrossEntropyLoss(), method or hw.Ekfac(), **options)


def left_by_a_dead_process(file: Path) -> Path:
    """The name of a draft of `file` whose writer is no more."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return file.with_name(f".{file.name}.{draft.HOST}-{child.pid}-{draft.TOKEN}-00000000.draft")


def files_of(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())


def damages(where: Sequence[float]) -> dict[str, Callable[[bytes], bytes | None]]:
    """By name: what becomes of a file's bytes. where: places at which one bit is flipped, as shares of the length."""

    def flipped(share: float) -> Callable[[bytes], bytes]:
        def flip(content: bytes) -> bytes:
            if not content:
                return content
            at = min(len(content) - 1, int(len(content) * share))
            return content[:at] + bytes([content[at] ^ 1 << int(share * 997) % 8]) + content[at + 1 :]

        return flip

    return {
        **{f"flipped at {share:.2f}": flipped(share) for share in where},
        "cut to half": lambda content: content[: len(content) // 2],
        "cut by the last byte": lambda content: content[:-1],
        "empty": lambda content: b"",
        "lost": lambda content: None,
    }


def damaged(folder: Path, where: Sequence[float], ways: int | None = None) -> Iterator[str]:
    """The folder with one file damaged in one way after another, whole again in the end; each time, what was done.

    ways: so many for each file, other ones for the next; None for all.
    """
    all_ways = [*damages(where).items()]
    for k, file in enumerate(files_of(folder)):
        for turn in range(len(all_ways) if ways is None else ways):
            name, damage = all_ways[(k + turn) % len(all_ways)]
            yield from _with(folder, file, damage(file.read_bytes()), name)


def exchanged(folder: Path, other: Path) -> Iterator[str]:
    """The same with one file of another artefact of its kind in the place of its own."""
    for file in files_of(folder):
        name = file.relative_to(folder)
        if (other / name).is_file() and (other / name).read_bytes() != file.read_bytes():
            yield from _with(folder, file, (other / name).read_bytes(), "exchanged")


def _with(folder: Path, file: Path, content: bytes | None, done: str) -> Iterator[str]:
    """What readers write in the meantime is undone too."""
    kept = folder.with_name(f"{folder.name} before")
    shutil.copytree(folder, kept)
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content)
    try:
        yield f"{file.relative_to(folder)}: {done}"
    finally:
        shutil.rmtree(folder)
        kept.rename(folder)
