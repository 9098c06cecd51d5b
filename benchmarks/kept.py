"""Kept gradients: how fast they are written and scanned, beside this machine's bandwidth, measured in the same run.

    python benchmarks/kept.py [--rows 100000] [--numbers 256] [--folder /tmp] [--json FILE]

One thread. A store of `rows` projected gradients of `numbers` numbers is written tile by tile, by the writer that
`influence.gradients` uses, and scanned for the ten best and worst rows of 1, 20 and 100 queries, by the product
and the sink that `influence.top` uses; no model is in it. Beside that, in bytes of what is stored:

- memory: adding up a float32 array that is in memory, once (what one thread reads);
- disk: reading the store's files by 8 MB with their pages dropped before (what one thread reads from a cold disk);
- multiply-adds: the product of two square float32 matrices of 2,048 rows, the most that one core computes.

"at most" is the share of the memory's rate that a scan can have on one core: at its most of multiply-adds, one for each
number and query. "of memory" is the scan's rate, once the files are in the page cache, as a share of the memory's; "of
disk" is that of a scan with the pages dropped before, as a share of the disk's, so far as this process may drop them;
"of peak" is what the scan multiplies, as a share of the core's most. Medians of three.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[name] = "1"

import numpy as np  # noqa: E402

from headwater.run.packing import FLAT  # noqa: E402
from headwater.store.ends import TopKSink  # noqa: E402
from headwater.store.segments import Segment, write_segment  # noqa: E402

TILE, K = 4096, 10
QUERIES = (1, 20, 50, 100)
DTYPES: tuple[Any, ...] = ("float32", "bfloat16", "int8")


def seconds(
    work: Callable[[], object],
    before: Callable[[], object] = lambda: None,
    clock: Callable[[], float] = time.process_time,
) -> float:
    """The median of three runs, in CPU seconds, or by another clock."""
    found = []
    for _ in range(3):
        before()
        start = clock()
        work()
        found.append(clock() - start)
    return statistics.median(found)


def written(folder: Path, rows: int, numbers: int, dtype: Any) -> tuple[list[Path], float]:
    """The files of a store, and the seconds that writing took."""
    rng, files, spent = np.random.default_rng(0), [], 0.0
    for start in range(0, rows, TILE):
        values = rng.standard_normal((min(TILE, rows - start), numbers), dtype=np.float32)
        file = folder / f"{start:09d}.safetensors"
        begun = time.process_time()
        write_segment(file, "benchmark", {"rows": len(values)}, {}, {FLAT: values}, dtype)
        spent += time.process_time() - begun
        files.append(file)
    return files, spent


def scan(files: list[Path], queries: np.ndarray) -> TopKSink:
    """Both ends of all queries' rankings."""
    sink, start = TopKSink(K, np.arange(queries.shape[1])), 0
    segments = [Segment.open(files[0])]
    for number in range(len(files)):
        segment = segments.pop()
        if number + 1 < len(files):  # as a run over kept rows does it
            segments.append(Segment.open(files[number + 1]))
            segments[0].will_be_read()
        scores = np.ascontiguousarray(segment.product(FLAT, queries).T)
        sink.add(scores, np.arange(start, start + segment.rows))
        start += segment.rows
    return sink


def dropped(files: list[Path]) -> None:
    """Ask the system to forget the files' pages."""
    for file in files:
        number = os.open(file, os.O_RDONLY)
        os.fsync(number)
        os.posix_fadvise(number, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(number)


def read(files: list[Path]) -> None:
    for file in files:
        with open(file, "rb", buffering=0) as opened:
            while opened.read(8 * 2**20):
                pass


def bandwidth(size: int) -> float:
    """Bytes a second that one thread reads from memory."""
    array = np.ones(size // 4, dtype=np.float32)
    return array.nbytes / seconds(array.sum)


def peak() -> float:
    """Floating-point operations a second of one core."""
    matrix = np.ones((2048, 2048), dtype=np.float32)
    return 2 * 2048**3 / seconds(lambda: matrix @ matrix)


def measured(rows: int, numbers: int, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"rows": rows, "numbers": numbers, "memory GB/s": bandwidth(2**28) / 1e9}
    found["peak GFLOP/s"] = peak() / 1e9
    for dtype in DTYPES:
        place = folder / dtype
        place.mkdir()
        files, spent = written(place, rows, numbers, dtype)
        size = sum(file.stat().st_size for file in files)
        cold = size / seconds(lambda f=files: read(f), lambda f=files: dropped(f), time.perf_counter)
        of: dict[str, Any] = {"bytes/row": size / rows, "written GB/s": size / spent / 1e9, "disk GB/s": cold / 1e9}
        of["checked GB/s"] = size / seconds(lambda f=files: [Segment.open(file, check=True) for file in f]) / 1e9
        for q in QUERIES:
            queries = np.random.default_rng(q).standard_normal((numbers, q), dtype=np.float32)
            warm = seconds(lambda f=files, x=queries: scan(f, x))
            of[f"{q} queries"] = {
                "seconds": warm,
                "GB/s": size / warm / 1e9,
                "of memory": size / warm / 1e9 / found["memory GB/s"],
                "at most": min(1.0, found["peak GFLOP/s"] / (2 * rows * numbers * q / size) / found["memory GB/s"]),
                "of peak": 2 * rows * numbers * q / warm / 1e9 / found["peak GFLOP/s"],
            }
            if q <= 20:
                slow = seconds(lambda f=files, x=queries: scan(f, x), lambda f=files: dropped(f), time.perf_counter)
                of[f"{q} queries"]["of disk"] = size / slow / cold
        found[dtype] = of
        shutil.rmtree(place)
    return found


def shown(found: dict[str, Any]) -> str:
    lines = [
        f"{found['rows']} rows of {found['numbers']} numbers, one thread; memory {found['memory GB/s']:.1f} GB/s, "
        f"{found['peak GFLOP/s']:.0f} GFLOP/s",
        f"{'stored as':>10} {'bytes/row':>9} {'written':>8} {'checked':>8} {'disk':>6}   "
        f"{'queries':>7} {'s':>7} {'GB/s':>6} {'of memory':>9} {'at most':>8} {'of peak':>8} {'of disk':>8}",
    ]
    for dtype in DTYPES:
        of = found[dtype]
        head = f"{dtype:>10} {of['bytes/row']:9.0f} {of['written GB/s']:8.2f} {of['checked GB/s']:8.2f} "
        head += f"{of['disk GB/s']:6.2f}   "
        for q in QUERIES:
            one = of[f"{q} queries"]
            disk = f"{one['of disk']:8.0%}" if "of disk" in one else " " * 8
            lines.append(
                f"{head}{q:7} {one['seconds']:7.3f} {one['GB/s']:6.2f} {one['of memory']:9.0%} "
                f"{one['at most']:8.0%} {one['of peak']:8.0%} {disk}"
            )
            head = " " * len(head)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--numbers", type=int, default=256)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        found = measured(given.rows, given.numbers, Path(folder))
    print(shown(found))
    if given.json:
        given.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
