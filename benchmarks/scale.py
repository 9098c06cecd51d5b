"""A million train rows on a thousand queries within a budget of memory, killed and resumed on the way; and growth.

    python benchmarks/scale.py run FOLDER [--rows 1000000] [--queries 1000] [--memory 2GiB] [--kills 3]
    python benchmarks/scale.py growth FOLDER      # 1e4, 1e5 and 1e6 rows, 100 queries

The network is 32-64-10 and fitted with EKFAC; rows are made batch by batch from their number, so that the data take no
memory. Each job is a process of its own, with one thread; peaks are VmHWM of Linux, CPU seconds of the process. A
killed process gets SIGKILL at a random moment. Bandwidth is that of plain files of the same size, written and read in
the same run.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

BATCH = 4096


class Made:
    """Rows made from their number; 32 inputs, ten classes that a fixed network gives."""

    def __init__(self, rows: int, seed: int = 0):
        import torch

        self.rows, self.seed = rows, seed
        torch.manual_seed(7)
        self.teacher = torch.nn.Sequential(torch.nn.Linear(32, 16), torch.nn.Tanh(), torch.nn.Linear(16, 10))

    def __iter__(self) -> Iterator[tuple[object, object]]:
        import torch

        for start in range(0, self.rows, BATCH):
            draw = torch.Generator().manual_seed(self.seed * 2**32 + start)
            x = torch.randn(min(BATCH, self.rows - start), 32, generator=draw)
            with torch.no_grad():
                y = (3 * self.teacher(x) + torch.randn(len(x), 10, generator=draw)).argmax(1)
            yield x, y


def model() -> object:
    import torch

    torch.manual_seed(0)
    found = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.Tanh(), torch.nn.Linear(64, 10))
    optimizer = torch.optim.Adam(found.parameters(), lr=3e-3)
    for x, y in Made(20 * BATCH):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(found(x), y).backward()
        optimizer.step()
    return found


def job(folder: Path, rows: int, queries: int, memory: str) -> None:
    """Fit, score, and read both ends of all rankings; prints what it took as JSON."""
    import torch

    import headwater as hw
    from headwater.memory import peak_memory
    from headwater.torch import TorchComposableInfluence

    torch.set_num_threads(1)
    influence = TorchComposableInfluence(model(), torch.nn.CrossEntropyLoss(), hw.Ekfac())
    train, query = Made(rows), list(Made(queries, seed=1))
    found = {}

    def timed(name: str, call: object) -> object:
        begun, cpu = time.monotonic(), time.process_time()
        with peak_memory() as peak:
            given = call()  # type: ignore[operator]
            found[name] = {"wall": time.monotonic() - begun, "cpu": time.process_time() - cpu, "peak": peak()}
        return given

    timed("fit", lambda: influence.fit(train, store=folder / "fit"))
    scores = timed("score", lambda: influence.attribute(train, query, store=folder / "scores", memory=memory))
    top = timed("top", lambda: scores.top(10))  # type: ignore[attr-defined]
    found["digest"] = f"{top.helpful_scores.sum():.6e} {top.harmful_ids.sum()}"  # type: ignore[attr-defined]
    print(json.dumps(found))


def started(folder: Path, rows: int, queries: int, memory: str) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, "job", str(folder), str(rows), str(queries), memory]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def finished(process: subprocess.Popen[str]) -> dict[str, object]:
    said, _ = process.communicate()
    assert process.returncode == 0, process.returncode
    found: dict[str, object] = json.loads(said)
    return found


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def bandwidth(folder: Path, size: int) -> tuple[float, float]:
    """Bytes a second of one file in 16 MiB pieces, written with fsync, and read."""
    file, piece = folder / "plain", os.urandom(16 * 2**20)
    begun = time.monotonic()
    with open(file, "wb") as opened:
        for _ in range(max(1, size // len(piece))):
            opened.write(piece)
        opened.flush()
        os.fsync(opened.fileno())
    written = time.monotonic() - begun
    begun = time.monotonic()
    with open(file, "rb", buffering=0) as opened:
        while opened.read(len(piece)):
            pass
    read, total = time.monotonic() - begun, file.stat().st_size
    file.unlink()
    return total / written, total / read


def shown(found: dict[str, object], folder: Path, rows: int, queries: int) -> None:
    size = size_of(folder / "scores")
    write, read = bandwidth(folder, min(size, 2**31))
    for name in ("fit", "score", "top"):
        took = found[name]
        assert isinstance(took, dict)
        print(
            f"{name:6} {rows / took['wall']:10.0f} rows/s  {took['cpu']:8.1f} CPU s  {took['wall']:8.1f} s  "
            f"peak {took['peak'] / 2**20:6.0f} MiB"
        )
        if name != "fit":
            of = write if name == "score" else read
            print(f"       {size / took['wall'] / of:.1%} of plain {'writing' if name == 'score' else 'reading'}")
    print(f"{size / rows / queries:.3f} bytes a score, {size / rows:.0f} a row, {size / 2**20:.0f} MiB in all")


def run(folder: Path, rows: int, queries: int, memory: str, kills: int) -> None:
    draw = random.Random(0)
    for _ in range(kills):
        process = started(folder, rows, queries, memory)
        pause = draw.uniform(8, 40)
        try:
            process.wait(timeout=pause)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
        tiles = len(list((folder / "scores" / "rows").glob("*.npz")))
        parts = len(list((folder / "fit").rglob("*.npz")))
        print(f"killed after {pause:.0f} s: {parts} sums of the fit and {tiles} tiles of scores are there", flush=True)
    found = finished(started(folder, rows, queries, memory))
    shown(found, folder, rows, queries)
    print("digest", found["digest"])
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    print(f"the largest peak of any process: {peak / 2**10:.0f} MiB, of {memory}")


def growth(folder: Path) -> None:
    for rows in (10_000, 100_000, 1_000_000):
        print(f"{rows} rows, 100 queries")
        shown(finished(started(folder / str(rows), rows, 100, "1GiB")), folder / str(rows), rows, 100)
        shutil.rmtree(folder / str(rows))


def main() -> None:
    verb, folder, *rest = sys.argv[1:]
    if verb == "job":
        job(Path(folder), int(rest[0]), int(rest[1]), rest[2])
        return
    given = dict(zip(rest[::2], rest[1::2], strict=True))
    Path(folder).mkdir(parents=True, exist_ok=True)
    if verb == "growth":
        growth(Path(folder))
        return
    run(
        Path(folder),
        int(given.get("--rows", 1_000_000)),
        int(given.get("--queries", 1000)),
        given.get("--memory", "2GiB"),
        int(given.get("--kills", 3)),
    )


if __name__ == "__main__":
    main()
